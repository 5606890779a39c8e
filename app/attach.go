package app

import (
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/ctl"
	"github.com/boardlink/boardlink/device/console"
)

// goneTick is how often it is looked whether a client has gone that nothing is read from, as the board does not take what it typed.
const goneTick = 500 * time.Millisecond

// findConsole returns the host's console of a name, on a link or on any.
func (e *ends) findConsole(link, name string) (*console.Console, string, error) {
	var found *console.Console
	var at, all []string
	for _, l := range e.links {
		for _, p := range l.plans {
			c, ok := p.Plan.(*consolePlan)
			if !ok || c.model() == nil {
				continue
			}
			all = append(all, l.name+"/"+c.Name)
			if c.Name == name && (link == "" || link == l.name) {
				found = c.model()
				at = append(at, l.name)
			}
		}
	}
	switch {
	case len(at) == 1:
		return found, at[0], nil
	case len(at) > 1:
		return nil, "", fmt.Errorf("the links %s have a console %s each: name one as LINK/%s", strings.Join(at, ", "), name, name)
	case len(all) == 0:
		return nil, "", errors.New("this program has no console")
	}
	return nil, "", fmt.Errorf("there is no such console; there are: %s", strings.Join(all, " "))
}

// attach is the verb console.
func (e *ends) attach(c *ctl.Conn, req *ctl.Request, conn *net.UnixConn) {
	r := req.Console
	if r == nil {
		_ = c.SendLine(ctl.Reply{Boardlink: ctl.Version, Kind: ctl.KindRequest, Error: "the request does not say which console"})
		return
	}
	dev, link, err := e.findConsole(r.Link, r.Name)
	if err != nil {
		_ = c.SendLine(ctl.Reply{Boardlink: ctl.Version, Kind: ctl.KindNotFound, Error: err.Error()})
		return
	}
	a := &attached{c: c, dev: dev, link: link, r: r, size: r.Size, t: dev.Attach(whoIs(r.Who, conn), r.Back)}
	defer a.t.Close()
	if !r.ReadOnly {
		_ = a.keyboard(r.TakeOver) // the state tells whether it was given
	}
	s := a.state(a.t.State())
	if c.SendLine(ctl.Reply{Boardlink: ctl.Version}) != nil || c.Send(ctl.Message{Type: ctl.Attached, State: s, Bytes: a.t.Kept()}, nil) != nil {
		return
	}
	var others sync.WaitGroup
	others.Add(2)
	over := make(chan struct{})
	go func() {
		defer others.Done()
		a.print()
		conn.Close() // ends take
	}()
	go func() {
		defer others.Done()
		tick := time.NewTicker(goneTick)
		defer tick.Stop()
		for !gone(conn) {
			select {
			case <-tick.C:
			case <-over:
				return
			}
		}
		a.t.Close()
	}()
	a.take()
	a.t.Close()
	close(over)
	others.Wait()
}

// whoIs returns the name of a terminal, for others to read.
func whoIs(who string, conn *net.UnixConn) string {
	who = strings.Map(func(r rune) rune {
		if r <= ' ' || r >= 0x7f || r == '*' {
			return -1
		}
		return r
	}, who)
	if len(who) > 48 {
		who = who[:48]
	}
	var cred *unix.Ucred
	if raw, err := conn.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { cred, _ = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	}
	if cred == nil {
		return who
	}
	if who == "" {
		who = fmt.Sprintf("uid%d", cred.Uid)
	}
	return fmt.Sprintf("%s(pid%d)", who, cred.Pid)
}

// gone tells whether the client has closed its end.
func gone(conn *net.UnixConn) bool {
	hup := true // also where the connection is closed here
	if raw, err := conn.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) {
			fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
			_, err := unix.Poll(fds, 0)
			hup = err == nil && fds[0].Revents&(unix.POLLHUP|unix.POLLRDHUP|unix.POLLERR) != 0
		})
	}
	return hup
}

// attached is a terminal of a client.
type attached struct {
	c    *ctl.Conn
	dev  *console.Console
	link string
	r    *ctl.ConsoleRequest
	t    *console.Terminal

	mu     sync.Mutex // guards what follows
	size   ctl.Size
	denied bool // the client knows that it does not type
}

// keyboard asks for the keyboard. Who has it says how large the terminal is.
func (a *attached) keyboard(take bool) error {
	err := a.t.Keyboard(take)
	a.mu.Lock()
	s := a.size
	a.mu.Unlock()
	if err == nil && s != (ctl.Size{}) {
		a.dev.SetSize(s.Cols, s.Rows)
	}
	return err
}

func (a *attached) state(s console.State) *ctl.State {
	return &ctl.State{Link: a.link, Name: a.r.Name, Running: s.Running, Keyboard: s.Keyboard, Terminals: s.Terminals}
}

// print sends what the board prints, and what changes, until the terminal or the client's end is closed.
func (a *attached) print() {
	buf := make([]byte, 32<<10)
	for {
		n, lost, s, err := a.t.Next(buf)
		if err == nil && s != nil {
			a.mu.Lock()
			a.denied = a.denied && !s.Keyboard
			a.mu.Unlock()
			err = a.c.Send(ctl.Message{Type: ctl.Changed, State: a.state(*s)}, nil)
		}
		if err == nil && n > 0 {
			err = a.c.Send(ctl.Message{Type: ctl.Output, Lost: lost}, buf[:n])
		}
		if err != nil {
			if errors.Is(err, console.ErrClosed) {
				_ = a.c.Send(ctl.Message{Type: ctl.End, Text: err.Error()}, nil) // as far as the client is there
			}
			return
		}
	}
}

// take does what the client says, until its end or the terminal is closed.
func (a *attached) take() {
	buf := make([]byte, 32<<10)
	for {
		m, b, err := a.c.Receive(buf)
		if err != nil {
			return
		}
		switch m.Type {
		case ctl.Input:
			err = a.typed(b)
		case ctl.Resize:
			a.mu.Lock()
			a.size = m.Size
			a.mu.Unlock()
			if a.t.State().Keyboard {
				a.dev.SetSize(m.Cols, m.Rows)
			}
		case ctl.Take:
			if !a.r.ReadOnly {
				err = a.keyboard(true)
			}
		case ctl.Finish:
			for {
				done, wait := a.t.Drained()
				if done {
					break
				}
				<-wait
			}
			err = a.c.Send(ctl.Message{Type: ctl.End}, nil)
		}
		if err != nil {
			return
		}
	}
}

// typed types b, if nobody else has the keyboard.
func (a *attached) typed(b []byte) error {
	err := console.ErrReadOnly
	if !a.r.ReadOnly {
		if err = a.keyboard(false); err == nil {
			_, err = a.t.Write(b)
		}
	}
	if !errors.Is(err, console.ErrReadOnly) {
		return err
	}
	a.mu.Lock()
	told := a.denied
	a.denied = true
	a.mu.Unlock()
	if told {
		return nil
	}
	return a.c.Send(ctl.Message{Type: ctl.Denied}, nil)
}
