package console

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/tty"
)

// opened is how often it is looked whether a program has opened a pseudo-terminal that none had open.
const opened = 50 * time.Millisecond

// terminalFile joins a console to a pseudo-terminal. While a program has that open it is one of the console's terminals, with the keyboard
// if nobody else has it when it types.
type terminalFile struct {
	lost uint64 // typed bytes, as another terminal had the keyboard; with sync/atomic; first: 64-bit alignment
	c    *Console
	path string
	pty  *tty.Pty
	quit chan struct{}
	done chan struct{}
}

// Terminal makes a pseudo-terminal in raw mode, and at path a symbolic link to it, for programs such as picocom, screen or conserver, until
// Close.
func (c *Console) Terminal(path string) error {
	p, err := tty.Open()
	if err != nil {
		return err
	}
	if err = p.Restore(true); err == nil {
		err = p.Link(path)
	}
	if err != nil {
		p.Close()
		return err
	}
	f := &terminalFile{c: c, path: path, pty: p, quit: make(chan struct{}), done: make(chan struct{})}
	c.mu.Lock()
	c.joined = append(c.joined, f)
	c.mu.Unlock()
	go f.run()
	return nil
}

func (f *terminalFile) run() {
	defer close(f.done)
	for f.wait() {
		f.attached()
	}
}

// wait waits until a program has the terminal open; false: it is closed.
func (f *terminalFile) wait() bool {
	for f.pty.HungUp() {
		t := time.NewTimer(opened)
		select {
		case <-t.C:
		case <-f.quit:
			t.Stop()
			return false
		}
	}
	select {
	case <-f.quit:
		return false
	default:
		return true
	}
}

// attached serves the programs that have the terminal open, until none has.
func (f *terminalFile) attached() {
	t := f.c.Attach(f.path, 0)
	var others sync.WaitGroup
	others.Add(2)
	over := make(chan struct{})
	go func() {
		defer others.Done()
		f.print(t)
	}()
	go func() { // a program can go while what it typed waits
		defer others.Done()
		tick := time.NewTicker(10 * opened)
		defer tick.Stop()
		for !f.pty.HungUp() {
			select {
			case <-tick.C:
			case <-over:
				return
			}
		}
		t.Close()
	}()
	var b [4096]byte
	for {
		n, err := f.pty.Read(b[:])
		if err != nil { // hung up or closed
			break
		}
		if err = t.Keyboard(false); err == nil {
			var k int
			k, err = t.Write(b[:n])
			n -= k
		}
		if errors.Is(err, ErrClosed) {
			break
		}
		if err != nil {
			atomic.AddUint64(&f.lost, uint64(n))
		}
	}
	close(over)
	t.Close()
	_ = f.pty.Interrupt(true) // fails where the terminal is closed, as the two after it
	others.Wait()
	_ = f.pty.Interrupt(false)
	_ = f.pty.Discard() // is not for the next one
}

// print passes on what the board prints until t is closed.
func (f *terminalFile) print(t *Terminal) {
	var b [4096]byte
	for {
		n, lost, err := t.Read(b[:])
		if err == nil && lost > 0 {
			_, err = fmt.Fprintf(f.pty, "\r\n[boardlink: %d bytes are missing here]\r\n", lost)
		}
		if err == nil {
			_, err = f.pty.Write(b[:n])
		}
		if err != nil {
			return
		}
	}
}

func (f *terminalFile) close(limit time.Duration) {
	close(f.quit)
	f.pty.Close()
	t := time.NewTimer(limit)
	defer t.Stop()
	select {
	case <-f.done:
	case <-t.C:
	}
}

func (f *terminalFile) describe(d *status.Device) {
	d.Counters["pty_typed_lost"] = atomic.LoadUint64(&f.lost)
	d.Notes = append(d.Notes, "the terminal "+f.path+" is "+f.pty.Name())
}
