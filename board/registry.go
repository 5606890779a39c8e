package board

import (
	"errors"
	"fmt"
	"sort"
	"strings"
	"sync"
)

// Kind opens boards of one kind.
type Kind struct {
	Name string // "loopback": letters, digits, '-' and '_'
	Help string // one line: what the argument is
	// Open opens the board that arg, the part of the spec behind the colon, names.
	Open func(arg string, o Options) (Board, error)
	// Examine, where the kind has it, returns what stands in the way of opening the host's end, all of it,
	// without opening anything. What Open would refuse comes first, in the words of Open. The rest is what
	// shows from outside only, as that another process has the board.
	Examine func(arg string, o Options) []error
}

// ErrInput is what errors match (errors.Is) that are the fault of what the operator wrote: no
// retry will help.
var ErrInput = errors.New("board: bad board")

// ErrAbsent is what errors match (errors.Is) where the board or its server is not there, and may
// yet come: trying again later makes sense.
var ErrAbsent = errors.New("board: absent")

// ErrSideTaken is what errors match (errors.Is) where another live process holds this
// side of the link.
var ErrSideTaken = errors.New("board: side taken")

// Lasting reports whether err, an error of Open, will not go away by itself: only the operator can
// change what was written (ErrInput). Every other error is temporary, and worth another try later: the
// board is absent, another process has it, no driver is bound to it yet, this process may not open it
// yet, a resource is short.
func Lasting(err error) bool { return errors.Is(err, ErrInput) }

// Error is why a board could not be opened.
type Error struct {
	Spec   string // "loopback:/run/a.sock"
	Reason string // what is wrong, and what to do about it
	Class  error  // ErrInput, ErrAbsent, ErrSideTaken, or nil: none of them
	Err    error  // the cause below, may be nil
}

// Error gives the spec, the reason and the cause.
func (e *Error) Error() string {
	s := "board " + e.Spec + ": " + e.Reason
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	return s
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Is tells whether target is the class of the error.
func (e *Error) Is(target error) bool { return e.Class != nil && target == e.Class }

var (
	kindsMu sync.Mutex
	kinds   = map[string]Kind{}
)

// Register adds a kind of board, from its package's init. A name that is empty, has a colon
// or is taken is a programmer's error and panics.
func Register(k Kind) {
	kindsMu.Lock()
	defer kindsMu.Unlock()
	if k.Name == "" || strings.Contains(k.Name, ":") || k.Open == nil {
		panic(fmt.Sprintf("board: kind %q has no valid name or no Open", k.Name))
	}
	if _, ok := kinds[k.Name]; ok {
		panic(fmt.Sprintf("board: kind %q registered twice", k.Name))
	}
	kinds[k.Name] = k
}

// Kinds returns the registered kinds, sorted by name.
func Kinds() []Kind {
	kindsMu.Lock()
	defer kindsMu.Unlock()
	l := make([]Kind, 0, len(kinds))
	for _, k := range kinds {
		l = append(l, k)
	}
	sort.Slice(l, func(i, j int) bool { return l[i].Name < l[j].Name })
	return l
}

// Examine returns what stands in the way of opening the host's end of a board, without opening anything;
// nothing where nothing is known to, or where kinds of that name cannot tell.
func Examine(spec string, o Options) []error {
	o.Side = Host
	name, arg := spec, ""
	if i := strings.IndexByte(spec, ':'); i >= 0 {
		name, arg = spec[:i], spec[i+1:]
	}
	kindsMu.Lock()
	k := kinds[name]
	kindsMu.Unlock()
	if k.Examine == nil {
		return nil
	}
	return k.Examine(arg, o)
}

// Open opens this program's end of the board that spec, "kind:argument", names. Errors
// match ErrInput, ErrAbsent or ErrSideTaken where one of these is the case.
func Open(spec string, o Options) (Board, error) {
	if o.Side != Host && o.Side != Agent {
		return nil, &Error{Spec: spec, Reason: fmt.Sprintf("no such side: %d", o.Side), Class: ErrInput}
	}
	name, arg := spec, ""
	if i := strings.IndexByte(spec, ':'); i >= 0 {
		name, arg = spec[:i], spec[i+1:]
	}
	kindsMu.Lock()
	k, ok := kinds[name]
	kindsMu.Unlock()
	if !ok {
		var known []string
		for _, k := range Kinds() {
			known = append(known, k.Name)
		}
		return nil, &Error{
			Spec:   fmt.Sprintf("%q", spec),
			Reason: fmt.Sprintf("no kind of board is called %q; it is KIND:ARG, and the kinds are %s (docs/boards.md)", name, strings.Join(known, ", ")),
			Class:  ErrInput,
		}
	}
	return k.Open(arg, o)
}
