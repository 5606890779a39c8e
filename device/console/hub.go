package console

import (
	"errors"
	"sort"
	"sync"
)

// Errors of a Terminal.
var (
	// ErrClosed: the terminal, or the console, is closed.
	ErrClosed = errors.New("the console is closed")
	// ErrReadOnly: another terminal types, or this one was attached to read only.
	ErrReadOnly = errors.New("another terminal has the keyboard")
)

// maxTyped is how many bytes wait for the board at most: who types more waits.
const maxTyped = 4096

// hub is between a board and any number of terminals. What the board prints is kept in a scrollback of fixed size, from which each
// terminal reads at its own pace: one that stalls loses what was overwritten meanwhile, and holds nobody up. One terminal at a
// time has the keyboard.
type hub struct {
	mu       sync.Mutex
	back     []byte // ring: byte n of all that was printed is at n % len(back)
	printed  uint64 // bytes, ever
	dropped  uint64 // bytes that terminals lost
	typed    []byte // for the board, maxTyped at most
	room     chan struct{}
	keyboard *Terminal // nil: nobody has it
	all      map[*Terminal]bool
	wake     func() // there is something typed
	running  bool   // a driver has the device
	closed   bool
}

func newHub(scrollback int, wake func()) *hub {
	return &hub{back: make([]byte, scrollback), room: make(chan struct{}), all: map[*Terminal]bool{}, wake: wake}
}

// print adds what the board prints. It does not block.
func (h *hub) print(b []byte) {
	h.mu.Lock()
	defer h.mu.Unlock()
	size := uint64(len(h.back))
	h.printed += uint64(len(b))
	if uint64(len(b)) > size {
		b = b[uint64(len(b))-size:]
	}
	at := (h.printed - uint64(len(b))) % size
	n := copy(h.back[at:], b)
	copy(h.back, b[n:])
	for t := range h.all {
		t.ring()
	}
}

// peek copies the first bytes that wait for the board to b.
func (h *hub) peek(b []byte) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return copy(b, h.typed)
}

// take removes the first n bytes that wait for the board, which has them.
func (h *hub) take(n int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.typed = append(h.typed[:0], h.typed[n:]...)
	h.retry()
}

// retry has those who wait to type look again.
func (h *hub) retry() {
	close(h.room)
	h.room = make(chan struct{})
}

// changed tells all terminals that State is another one.
func (h *hub) changed() {
	for t := range h.all {
		t.changed = true
		t.ring()
	}
}

// run notes whether a driver has the device.
func (h *hub) run(on bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.running != on {
		h.running = on
		h.changed()
	}
}

func (h *hub) close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closed = true
	for t := range h.all {
		t.ring()
	}
	h.retry()
}

// Terminal is somebody who looks at a console.
type Terminal struct {
	h       *hub
	name    string
	at      uint64 // bytes of all that was printed that it has read
	bell    chan struct{}
	changed bool // State, since Next told
	closed  bool
	quit    chan struct{}
}

// State is how things are with a console.
type State struct {
	Running   bool     // a driver has the device
	Keyboard  bool     // this terminal types
	Terminals []string // names; that of the one with the keyboard comes first, behind an asterisk
}

// attach returns a new terminal, which begins with the last back bytes that were printed, as far as they are kept.
func (h *hub) attach(name string, back int) *Terminal {
	h.mu.Lock()
	defer h.mu.Unlock()
	kept := h.printed
	if kept > uint64(len(h.back)) {
		kept = uint64(len(h.back))
	}
	if back >= 0 && uint64(back) < kept {
		kept = uint64(back)
	}
	t := &Terminal{h: h, name: name, at: h.printed - kept, bell: make(chan struct{}, 1), quit: make(chan struct{})}
	h.all[t] = true
	h.changed()
	return t
}

// State returns how things are.
func (t *Terminal) State() State {
	t.h.mu.Lock()
	defer t.h.mu.Unlock()
	return t.state()
}

func (t *Terminal) state() State {
	return State{Running: t.h.running, Keyboard: t.h.keyboard == t, Terminals: t.h.namesLocked()}
}

// Kept returns how many bytes the terminal has not read, of those that are kept.
func (t *Terminal) Kept() int {
	t.h.mu.Lock()
	defer t.h.mu.Unlock()
	n := t.h.printed - t.at
	if n > uint64(len(t.h.back)) {
		n = uint64(len(t.h.back))
	}
	return int(n)
}

func (t *Terminal) ring() {
	select {
	case t.bell <- struct{}{}:
	default:
	}
}

// Read waits until there is something that the terminal has not read, and reads it into b. lost is how many bytes in front of it were
// overwritten before they were read. The error is ErrClosed.
func (t *Terminal) Read(b []byte) (n int, lost uint64, err error) {
	for len(b) > 0 && n == 0 && err == nil {
		n, lost, _, err = t.Next(b)
	}
	return n, lost, err
}

// Next is Read that returns also when State has become another one, which it returns then, perhaps without a byte.
func (t *Terminal) Next(b []byte) (n int, lost uint64, s *State, err error) {
	for {
		if n, lost, s, err = t.read(b); n > 0 || s != nil || err != nil {
			return n, lost, s, err
		}
		select {
		case <-t.bell:
		case <-t.quit:
		}
	}
}

func (t *Terminal) read(b []byte) (n int, lost uint64, s *State, err error) {
	h := t.h
	h.mu.Lock()
	defer h.mu.Unlock()
	if t.closed {
		return 0, 0, nil, ErrClosed
	}
	if t.changed {
		t.changed = false
		now := t.state()
		s = &now
	}
	size := uint64(len(h.back))
	if h.printed-t.at > size {
		lost = h.printed - t.at - size
		h.dropped += lost
		t.at += lost
	}
	have := h.printed - t.at
	if have == 0 {
		if h.closed {
			err = ErrClosed
		}
		return 0, 0, s, err
	}
	if uint64(len(b)) > have {
		b = b[:have]
	}
	n = copy(b, h.back[t.at%size:])
	n += copy(b[n:], h.back)
	t.at += uint64(n)
	return n, lost, s, nil
}

// Keyboard gives the terminal the keyboard. Where another one has it, take takes it away from that one; without, the error is
// ErrReadOnly.
func (t *Terminal) Keyboard(take bool) error {
	t.h.mu.Lock()
	defer t.h.mu.Unlock()
	switch k := t.h.keyboard; {
	case t.closed || t.h.closed:
		return ErrClosed
	case k == t:
		return nil
	case k != nil && !take:
		return ErrReadOnly
	}
	t.h.keyboard = t
	t.h.changed()
	t.h.retry() // who typed until now, and waits for room, has to hear of it
	return nil
}

// Write types b. It waits while the board does not take what was typed before. The error, ErrClosed or ErrReadOnly, tells why not
// all of it was typed.
func (t *Terminal) Write(b []byte) (n int, err error) {
	h := t.h
	for n < len(b) {
		h.mu.Lock()
		switch {
		case t.closed || h.closed:
			err = ErrClosed
		case h.keyboard != t:
			err = ErrReadOnly
		}
		k := maxTyped - len(h.typed)
		if k > len(b)-n {
			k = len(b) - n
		}
		if err != nil {
			k = 0
		}
		h.typed = append(h.typed, b[n:n+k]...)
		room := h.room
		h.mu.Unlock()
		if err != nil {
			return n, err
		}
		if n += k; k > 0 {
			h.wake()
			continue
		}
		select {
		case <-room:
		case <-t.quit:
		}
	}
	return n, nil
}

// Close detaches the terminal. It ends its Read and Write, and gives the keyboard back.
func (t *Terminal) Close() error {
	h := t.h
	h.mu.Lock()
	defer h.mu.Unlock()
	if t.closed {
		return nil
	}
	t.closed = true
	close(t.quit)
	delete(h.all, t)
	if h.keyboard == t {
		h.keyboard = nil
	}
	h.changed()
	h.retry()
	return nil
}

// Drained tells whether the board has all that was typed, or the terminal is closed; wait is closed when that may have changed.
func (t *Terminal) Drained() (done bool, wait <-chan struct{}) {
	t.h.mu.Lock()
	defer t.h.mu.Unlock()
	return len(t.h.typed) == 0 || t.closed || t.h.closed, t.h.room
}

// names returns those of all terminals, the one with the keyboard first, marked by an asterisk.
func (h *hub) names() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.namesLocked()
}

func (h *hub) namesLocked() []string {
	var first, others []string
	for t := range h.all {
		if t == h.keyboard {
			first = append(first, "*"+t.name)
		} else {
			others = append(others, t.name)
		}
	}
	sort.Strings(others)
	return append(first, others...)
}
