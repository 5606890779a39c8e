//go:build linux

package doorbench

import (
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/boardlink/boardlink/bench/benchkit"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/mmio"
	"golang.org/x/sys/unix"
)

// waiter is a side's end of a mechanism: what wakes the other side, and waits for it. Every ring is answered before the next.
type waiter interface {
	ring() error
	wait() error
	slept() uint64
}

var errPatience = errors.New("the other side does not answer")

var one = [8]byte{1, 1, 1, 1, 1, 1, 1, 1} // whatever the byte order: not 0, and less than a counter holds

func ringFD(fd int) error {
	if _, err := unix.Write(fd, one[:]); err != nil {
		return fmt.Errorf("eventfd write: %w", err)
	}
	return nil
}

func newWaiter(o *order, ram mmio.RAM, lead bool) (waiter, error) {
	mine, theirs := benchkit.FirstFD+1, benchkit.FirstFD+2
	if !lead {
		mine, theirs = theirs, mine
	}
	blocks := o.Mechanism == Read || o.Mechanism == ReadLocked
	if err := unix.SetNonblock(mine, !blocks); err != nil {
		return nil, err
	}
	switch o.Mechanism {
	case Read, ReadLocked:
		return &reader{mine: mine, theirs: theirs}, nil
	case Netpoll, NetpollLocked:
		f := os.NewFile(uintptr(mine), "eventfd")
		// Also shows that it is the netpoller that waits.
		if err := f.SetReadDeadline(time.Now().Add(o.Duration*2 + patience)); err != nil {
			return nil, err
		}
		return &polled{f: f, theirs: theirs}, nil
	case Poll:
		w := &line{l: benchkit.NewLine(ram.Slice(offLine, benchkit.LineBytes), lead), lead: lead}
		end := time.Now().Add(o.Duration*2 + patience)
		w.l.Late = func() error {
			if time.Now().After(end) {
				return errPatience
			}
			return nil
		}
		return w, nil
	}
	e, err := doorbell.FromFD(mine)
	if err != nil {
		return nil, err
	}
	s := sleeper{s: doorbell.NewSleeper(doorbell.SleeperConfig{Doorbell: e, Doze: true}), theirs: theirs} // as a loop; for as long as the process lives
	if o.Mechanism == PPoll || o.Mechanism == PPollLocked {
		return &s, nil
	}
	w := &spinner{sleeper: s, mine: ram.Slice(offLead, 512), other: ram.Slice(offEcho, 512), budget: o.Spin}
	if !lead {
		w.mine, w.other = w.other, w.mine
	}
	return w, nil
}

// reader blocks in read(2).
type reader struct {
	mine, theirs int
	n            uint64
	b            [8]byte
}

func (w *reader) ring() error   { return ringFD(w.theirs) }
func (w *reader) slept() uint64 { return w.n }

func (w *reader) wait() error {
	w.n++
	for {
		_, err := unix.Read(w.mine, w.b[:])
		if err != unix.EINTR {
			return err
		}
	}
}

// polled leaves the waiting to Go's netpoller.
type polled struct {
	f      *os.File
	theirs int
	n      uint64
	b      [8]byte
}

func (w *polled) ring() error   { return ringFD(w.theirs) }
func (w *polled) slept() uint64 { return w.n }

func (w *polled) wait() error {
	w.n++
	_, err := w.f.Read(w.b[:])
	return err
}

// sleeper sleeps as the data loops do.
type sleeper struct {
	s      *doorbell.Sleeper
	theirs int
	n      uint64
}

func (w *sleeper) ring() error   { return ringFD(w.theirs) }
func (w *sleeper) slept() uint64 { return w.n }

func (w *sleeper) wait() error {
	var start time.Time
	for {
		w.n++
		why, err := w.s.Sleep(0)
		w.s.Found(true)
		if err != nil || why&doorbell.Rung != 0 {
			return err
		}
		if start.IsZero() {
			start = time.Now()
		} else if time.Since(start) > patience {
			return errPatience
		}
	}
}

// spinner looks at a word of the other side's for a while, and then sleeps: the protocol of a ring's index and suppression word.
// Each side has two words on lines of their own: how often it has rung, at 0; and whether it sleeps, at 256.
type spinner struct {
	sleeper
	mine, other mmio.RAM
	rung, seen  uint32
	budget      time.Duration
}

const offArmed = 256

func (w *spinner) ring() error {
	w.rung++
	w.mine.Publish32(0, w.rung)
	// Pairs with that in wait: either this side sees that the other sleeps, or that sees the new count.
	mmio.Fence(mmio.Cached, mmio.FullBarrier)
	if w.other.Load32(offArmed) == 0 {
		return nil
	}
	return ringFD(w.theirs)
}

func (w *spinner) wait() error {
	w.seen++
	start := time.Now()
	for i := 1; w.other.Consume32(0) != w.seen; i++ {
		if i&31 == 0 && time.Since(start) > w.budget {
			return w.sleep()
		}
	}
	return nil
}

func (w *spinner) sleep() error {
	start := time.Now()
	for w.other.Consume32(0) != w.seen {
		w.mine.Store32(offArmed, 1)
		mmio.Fence(mmio.Cached, mmio.FullBarrier)
		if w.other.Consume32(0) != w.seen {
			w.n++
			_, err := w.s.Sleep(0)
			w.s.Found(true)
			if err != nil {
				return err
			}
			if time.Since(start) > patience {
				return errPatience
			}
		}
		w.mine.Store32(offArmed, 0)
	}
	return nil
}

// line polls; one of Line's trips has a ring and a wait.
type line struct {
	l    *benchkit.Line
	lead bool
}

func (w *line) slept() uint64 { return 0 }

func (w *line) ring() error {
	w.l.Send()
	return nil
}

func (w *line) wait() error { return w.l.Await() }
