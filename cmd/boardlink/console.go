package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"os/user"
	"sort"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/boardlink/boardlink/app"
	"github.com/boardlink/boardlink/cmd/boardlink/internal/statusd"
	"github.com/boardlink/boardlink/ctl"
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/tty"
)

type consoleCmd struct {
	Name     string `arg:"" optional:"" help:"The console, as NAME or LINK/NAME (default: list those that there are)."`
	ReadOnly bool   `help:"Do not type: the keyboard is left to others."`
	TakeOver bool   `help:"Take the keyboard from the terminal that has it."`
	Log      bool   `help:"Print what is kept of what the board printed, and end."`
	Follow   bool   `short:"f" help:"With --log, go on with what it prints."`
	Back     string `default:"16K" placeholder:"BYTES" help:"How much of what the board printed before is shown first (default: 16K; all for all that is kept)."`
	Status   string `placeholder:"PATH" help:"Status socket of the host (default: that of the one which has the console)."`
}

func (c *consoleCmd) Run(s *streams) error {
	switch {
	case c.Follow && !c.Log:
		return usagef("-f goes with --log")
	case c.Log && c.TakeOver, c.ReadOnly && c.TakeOver:
		return usagef("--take-over is for a terminal that types: not with --read-only or --log")
	}
	back := -1
	if c.Back != "all" && !c.Log {
		n, err := parseSize(c.Back)
		if err != nil && c.Back != "0" {
			return usagef("--back %s: a number of bytes, with K or M, or all", c.Back)
		}
		back = int(n)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	all, err := findConsoles(ctx, s, c.Status)
	if err != nil {
		return err
	}
	if c.Name == "" {
		return listConsoles(s, all)
	}
	one, err := chooseConsole(all, c.Name)
	if err != nil {
		return err
	}
	a := &attachment{out: s.out, notes: s.err, log: c.Log, follow: c.Follow, readOnly: c.ReadOnly || c.Log}
	req := ctl.ConsoleRequest{Link: one.link, Name: one.d.Name, Who: whoAmI(), ReadOnly: a.readOnly, TakeOver: c.TakeOver, Back: back}
	if !a.readOnly || tty.IsTerminal(os.Stdin) {
		a.in = os.Stdin
	}
	if a.in != nil && !a.log && tty.IsTerminal(os.Stdin) {
		a.terminal = true
		req.Size = sizeOf(os.Stdin)
	}
	conn, raw, err := statusd.Ask(ctx, one.path, ctl.Request{Verb: ctl.VerbConsole, Console: &req})
	if err != nil {
		return err
	}
	defer raw.Close()
	a.c = conn
	return a.run()
}

// found is a console of a host that runs.
type found struct {
	path, link string
	d          status.Device
}

// findConsoles asks the hosts that run for their consoles, or just the one at path.
func findConsoles(ctx context.Context, s *streams, path string) ([]found, error) {
	paths := []string{path}
	var notes []string
	if path == "" {
		paths, notes = app.FindStatus()
	}
	answers, errs := make([]status.Program, len(paths)), make([]error, len(paths))
	var wg sync.WaitGroup
	for i, p := range paths {
		wg.Go(func() { answers[i], errs[i] = statusd.Get(ctx, p) })
	}
	wg.Wait()
	var all []found
	for i, err := range errs {
		if err != nil && path != "" {
			return nil, usageError{err}
		}
		if err != nil && !errors.Is(err, statusd.ErrNobody) {
			notes = append(notes, err.Error())
		}
		if err != nil || answers[i].Side != "host" {
			continue
		}
		for _, l := range answers[i].Links {
			for _, d := range l.Devices {
				if d.Type == "console" {
					all = append(all, found{paths[i], l.Name, d})
				}
			}
		}
	}
	if len(all) > 0 {
		return all, nil
	}
	for _, n := range notes {
		fmt.Fprintf(s.err, "boardlink console: %s\n", printable(n))
	}
	if path != "" {
		return nil, usagef("%s: no console of a host is there; boardlink host --console makes one", path)
	}
	return nil, usagef("no host with a console runs; boardlink host --console makes one")
}

// chooseConsole returns the console that a user means by NAME or LINK/NAME.
func chooseConsole(all []found, name string) (found, error) {
	link, base, ok := strings.Cut(name, "/")
	if !ok {
		link, base = "", name
	}
	var one []found
	var names, places []string
	for _, f := range all {
		names = append(names, f.link+"/"+f.d.Name)
		if f.d.Name == base && (link == "" || link == f.link) {
			one = append(one, f)
			places = append(places, f.link+"/"+f.d.Name+" at "+f.path)
		}
	}
	sort.Strings(names)
	sort.Strings(places)
	switch len(one) {
	case 1:
		return one[0], nil
	case 0:
		return found{}, usagef("there is no console %s; there are: %s", printable(name), printable(strings.Join(names, " ")))
	}
	return found{}, usagef("%s is ambiguous: %s; name the link too, or the program by --status", printable(name), printable(strings.Join(places, ", ")))
}

func listConsoles(s *streams, all []found) error {
	sort.Slice(all, func(i, j int) bool { return all[i].link+"/"+all[i].d.Name < all[j].link+"/"+all[j].d.Name })
	for _, f := range all {
		board := "no board"
		if strings.Contains(f.d.Status, "DRIVER_OK") {
			board = "board up"
		}
		if _, err := fmt.Fprintln(s.out, printable(fmt.Sprintf("%s/%s  %s, attached: %s", f.link, f.d.Name, board, f.d.Interface))); err != nil {
			return err
		}
	}
	return nil
}

// whoAmI names this terminal for others: user@pts/3.
func whoAmI() string {
	name := "uid" + fmt.Sprint(os.Getuid())
	if u, err := user.Current(); err == nil {
		name = u.Username
	}
	if t, err := os.Readlink("/proc/self/fd/0"); err == nil && strings.HasPrefix(t, "/dev/") {
		name += "@" + strings.TrimPrefix(t, "/dev/")
	}
	return name
}

func sizeOf(f *os.File) ctl.Size {
	s, err := tty.SizeOf(f)
	if err != nil {
		return ctl.Size{}
	}
	return ctl.Size{Cols: s.Cols, Rows: s.Rows}
}

// attachment is this program as a terminal of a console.
type attachment struct {
	c           *ctl.Conn
	in          *os.File // nil: nothing is typed
	out, notes  io.Writer
	terminal    bool // in is one, in raw mode
	log, follow bool
	readOnly    bool

	left int // bytes of the scrollback that are to come

	mu    sync.Mutex
	state ctl.State // of the last message
}

// errEnded: the host's program has closed the connection.
var errEnded = errors.New("the host has ended")

// run passes on what is typed and printed until either side ends it. The terminal has its mode from before when it returns.
func (a *attachment) run() (err error) {
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer signal.Stop(signals)
	end := make(chan error, 3)
	if a.terminal {
		before, err := tty.MakeRaw(a.in)
		if err != nil {
			return fmt.Errorf("the terminal: %w", err)
		}
		defer tty.SetMode(a.in, before)
		sizes := make(chan os.Signal, 1)
		signal.Notify(sizes, syscall.SIGWINCH)
		defer signal.Stop(sizes)
		go func() {
			for range sizes {
				if a.c.Send(ctl.Message{Type: ctl.Resize, Size: sizeOf(a.in)}, nil) != nil {
					return
				}
			}
		}()
	}
	go func() { end <- a.print() }()
	if a.in != nil && !a.log {
		go func() {
			if err := a.typeIn(); err != nil {
				end <- err
			}
		}()
	}
	select {
	case err = <-end:
	case sig := <-signals:
		return statusError(128 + int(sig.(syscall.Signal)))
	}
	if errors.Is(err, errDone) {
		return nil
	}
	if errors.Is(err, errDetached) {
		a.note("detached from %s", a.now().Name)
		return nil
	}
	if err != nil && a.terminal {
		a.note("%v", err)
		return statusError(exitFail) // it is told already, and the next line begins anew
	}
	return err
}

// note prints a line of this program's own.
func (a *attachment) note(format string, args ...any) {
	text := printable(fmt.Sprintf(format, args...))
	if a.terminal {
		fmt.Fprintf(a.notes, "\r\n[boardlink: %s]\r\n", text)
	} else {
		fmt.Fprintf(a.notes, "boardlink console: %s\n", text)
	}
}

// print prints what the board does, until the host's end.
func (a *attachment) print() error {
	buf := make([]byte, 64<<10)
	first := true
	for {
		m, b, err := a.c.Receive(buf)
		if errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, io.ErrUnexpectedEOF) {
			return errEnded
		}
		if err != nil {
			return err
		}
		switch m.Type {
		case ctl.Attached, ctl.Changed:
			if m.State != nil {
				a.tell(a.now(), *m.State, first)
				first = false
				a.mu.Lock()
				a.state = *m.State
				a.mu.Unlock()
			}
			if m.Type == ctl.Attached {
				a.left = m.Bytes
			}
		case ctl.Output:
			if m.Lost > 0 {
				a.note("%d bytes are missing here: they were not read in time", m.Lost)
			}
			if a.log && !a.follow && len(b) > a.left {
				b = b[:a.left]
			}
			a.left -= min(a.left, len(b))
			if _, err := a.out.Write(b); err != nil {
				return err
			}
		case ctl.Denied:
			a.note("what is typed is dropped: %s has the keyboard (--take-over, or ~! in a new line, takes it)", keyboard(a.now()))
		case ctl.End:
			if m.Text == "" || a.log && !a.follow {
				return errDone
			}
			return fmt.Errorf("%w: %s", errEnded, m.Text)
		}
		if a.log && !a.follow && a.left == 0 {
			return nil
		}
	}
}

// keyboard returns the terminal that types.
func keyboard(s ctl.State) string {
	for _, t := range s.Terminals {
		if strings.HasPrefix(t, "*") {
			return t[1:]
		}
	}
	return "nobody"
}

// tell tells what is new of a state.
func (a *attachment) tell(was, s ctl.State, first bool) {
	if a.log {
		return
	}
	if first {
		how := ""
		switch {
		case a.readOnly:
			how = ", read only"
		case !s.Keyboard:
			how = fmt.Sprintf(", read only: %s has the keyboard (--take-over takes it)", keyboard(s))
		}
		a.note("attached to %s/%s%s; attached are: %s", s.Link, s.Name, how, strings.Join(s.Terminals, " "))
		if !s.Running {
			a.note("there is no board at present")
		}
		return
	}
	if was.Keyboard && !s.Keyboard {
		a.note("%s has taken the keyboard (~! in a new line takes it back)", keyboard(s))
	}
	switch {
	case was.Running && !s.Running:
		a.note("the board has gone")
	case !was.Running && s.Running:
		a.note("the board is there")
	}
}

// Ends of an attachment that are no errors.
var (
	errDetached = errors.New("detached")
	errDone     = errors.New("done")
)

// typeIn sends what is typed, until the end of the input.
func (a *attachment) typeIn() error {
	buf := make([]byte, 16<<10)
	esc := escapes{start: true}
	for {
		n, err := a.in.Read(buf)
		send, act, rest := buf[:n], byte(0), []byte(nil)
		if a.terminal {
			send, act, rest = esc.next(buf[:n])
		}
		for {
			if err := a.do(send, act); err != nil {
				return err
			}
			if len(rest) == 0 {
				break
			}
			send, act, rest = esc.next(rest)
		}
		if err == nil {
			continue
		}
		if a.terminal || a.readOnly {
			return errDetached
		}
		if err := a.c.Send(ctl.Message{Type: ctl.Finish}, nil); err != nil {
			return errEnded
		}
		return nil // print ends when all has arrived
	}
}

// do sends what was typed, and follows an escape.
func (a *attachment) do(send []byte, act byte) error {
	if len(send) > 0 && !a.readOnly {
		if err := a.c.Send(ctl.Message{Type: ctl.Input}, send); err != nil {
			return errEnded
		}
	}
	switch act {
	case '.':
		return errDetached
	case '?':
		a.note("in a new line: ~. detaches, ~# tells who is attached, ~! takes the keyboard, ~~ types ~, ~? is this help")
	case '#':
		a.note("attached are: %s", strings.Join(a.now().Terminals, " "))
	case '!':
		if err := a.c.Send(ctl.Message{Type: ctl.Take}, nil); err != nil {
			return errEnded
		}
	}
	return nil
}

// now returns the state that was told last.
func (a *attachment) now() ctl.State {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.state
}

// escapes finds the escapes in what is typed, as ssh has them: ~ at the start of a line, and a character.
type escapes struct {
	start bool // a line starts
	tilde bool // a ~ at the start of a line was typed, and is held back
}

// next cuts b behind the first escape in it. It returns what is to be sent of the first part, the escape's character, 0 where there
// is none, and the second part.
func (e *escapes) next(b []byte) (send []byte, act byte, rest []byte) {
	for i, ch := range b {
		if e.tilde {
			e.tilde = false
			switch ch {
			case '.', '?', '#', '!':
				e.start = true
				return send, ch, b[i+1:]
			case '~': // one of the two is typed
			default:
				send = append(send, '~')
			}
		} else if e.start && ch == '~' {
			e.tilde, e.start = true, false
			continue
		}
		e.start = ch == '\r' || ch == '\n'
		send = append(send, ch)
	}
	return send, 0, nil
}
