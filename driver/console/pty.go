package console

import (
	"errors"
	"sync"
	"time"

	"github.com/boardlink/boardlink/tty"
)

// How long it takes at most until it is seen that a program has opened a terminal that none had open: a terminal that somebody
// hangs up (vhangup) is opened again at once.
const (
	reopenMin = time.Millisecond
	reopenMax = 100 * time.Millisecond
)

// Pty is an End: a pseudo-terminal that programs of this machine open. What is typed while none has it open is dropped, as on a serial line.
type Pty struct {
	pty    *tty.Pty
	joined string
	hold   bool // keep what is typed until there is a program

	quit chan struct{}
	once sync.Once
}

// OpenPty makes a pseudo-terminal in raw mode, and at path a symbolic link to it.
func OpenPty(path string) (*Pty, error) {
	p, err := newPty()
	if err != nil {
		return nil, err
	}
	if err := p.pty.Restore(true); err != nil {
		p.pty.Close()
		return nil, err
	}
	if err := p.pty.Link(path); err != nil {
		p.pty.Close()
		return nil, err
	}
	p.joined = path + " (" + p.pty.Name() + ")"
	return p, nil
}

func newPty() (*Pty, error) {
	t, err := tty.Open()
	if err != nil {
		return nil, err
	}
	return &Pty{pty: t, joined: t.Name(), quit: make(chan struct{})}, nil
}

// Read implements End. That no program has the terminal open is not its end.
func (p *Pty) Read(b []byte) (int, error) {
	for pause := reopenMin; ; pause *= 2 {
		n, err := p.pty.Read(b)
		if n > 0 {
			return n, nil
		}
		if err != nil && !errors.Is(err, tty.ErrHungUp) {
			return 0, p.fail(err)
		}
		if pause > reopenMax {
			pause = reopenMax
		}
		if p.wait(pause) {
			return 0, errClosed
		}
	}
}

// wait waits for d, and tells whether the terminal was closed.
func (p *Pty) wait(d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return false
	case <-p.quit:
		return true
	}
}

// fail returns the error of Read or Write: errClosed after Close, else err.
func (p *Pty) fail(err error) error {
	select {
	case <-p.quit:
		return errClosed
	default:
		return err
	}
}

// Write implements End.
func (p *Pty) Write(b []byte) (int, error) {
	for pause := reopenMin; p.pty.HungUp(); pause *= 2 {
		if !p.hold {
			return 0, p.fail(nil)
		}
		if pause > reopenMax {
			pause = reopenMax
		}
		if p.wait(pause) {
			return 0, errClosed
		}
	}
	n, err := p.pty.Write(b)
	if err != nil {
		err = p.fail(err)
	}
	return n, err
}

// Resize implements End.
func (p *Pty) Resize(s tty.Size) { _ = p.pty.SetSize(s) } // a terminal that is closed has none

// Keeps implements End: what programs print is taken, so that they go on without a link.
func (p *Pty) Keeps() bool { return false }

// Joined implements End.
func (p *Pty) Joined() string { return p.joined }

// State implements End.
func (p *Pty) State() (string, map[string]uint64) {
	if p.pty.HungUp() {
		return "no program has the terminal open", nil
	}
	return "", nil
}

// Close implements End.
func (p *Pty) Close() error {
	var err error
	p.once.Do(func() {
		close(p.quit)
		err = p.pty.Close()
	})
	return err
}
