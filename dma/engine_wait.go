package dma

import (
	"fmt"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// Wait starts what is queued and returns when the copy with the given ticket, and all before
// it, have landed.
func (m *Mover) Wait(ticket uint64) {
	if ticket > m.issued {
		panic(fmt.Sprintf("dma: waits for ticket %d of %d", ticket, m.issued))
	}
	m.Start()
	var w waiting
	for m.landed() < ticket {
		m.pause(&w)
	}
}

// WaitFor is Wait for d and a sleep of a millisecond at most: false where the copy has not landed by then. What takes
// too long is aborted, as by Wait.
func (m *Mover) WaitFor(ticket uint64, d time.Duration) bool {
	if ticket > m.issued {
		panic(fmt.Sprintf("dma: waits for ticket %d of %d", ticket, m.issued))
	}
	m.Start()
	w := waiting{longest: time.Millisecond}
	for end := (time.Time{}); m.landed() < ticket; {
		m.pause(&w)
		if now := time.Now(); end.IsZero() {
			end = now.Add(d)
		} else if now.After(end) {
			break
		}
	}
	return m.landed() >= ticket
}

// waitSlot waits until the slots below i have landed.
func (m *Mover) waitSlot(i uint64) {
	m.Start()
	var w waiting
	for m.head < i {
		m.pause(&w)
	}
}

// Move does all copies of the batch and returns when they have landed. It stops at the first
// that Queue refuses; those before it have landed then.
func (m *Mover) Move(batch []Copy) error {
	var err error
	for i := range batch {
		if _, err = m.Queue(batch[i].Dst, batch[i].Src); err != nil {
			break
		}
	}
	m.Wait(m.issued)
	return err
}

// The longest sleep between two looks: what a lost interrupt costs, and the pace without one.
const (
	longestSleep = 10 * time.Millisecond
	firstNap     = 20 * time.Microsecond
	longestNap   = time.Millisecond
)

// waiting is how long a caller waits already. The zero value is its start.
type waiting struct {
	began   time.Time
	nap     time.Duration
	longest time.Duration // sleep; 0: longestSleep
}

func (w *waiting) restart() { *w = waiting{longest: w.longest} }

// pause looks once, and if nothing has come spins or sleeps.
func (m *Mover) pause(w *waiting) {
	came := m.poll() > 0
	m.Start()
	if came {
		w.restart()
		return
	}
	m.watch()
	if m.flying == 0 {
		return
	}
	now := time.Now()
	if w.began.IsZero() {
		w.began = now
	}
	if now.Sub(w.began) < m.spin {
		runtime.Gosched()
		return
	}
	bell := m.e.Waiter()
	if bell == nil {
		if w.nap == 0 {
			w.nap = firstNap
		} else if w.nap < longestNap {
			w.nap *= 2
		}
		time.Sleep(w.nap)
		return
	}
	m.stats.add(mSleeps, 1)
	if m.sleep(bell, w.longest) {
		w.restart() // a controller may tell a little before it has stopped: spin for that
	} else if m.poll() > 0 {
		m.stats.add(mRescued, 1)
		w.restart()
	}
}

// sleep waits for the interrupt, no longer than until the oldest transfer is late, or for longest; false where it
// did not come.
func (m *Mover) sleep(w EngineWaiter, longest time.Duration) bool {
	d := m.timeout - time.Since(m.since)
	if longest == 0 {
		longest = longestSleep
	}
	if d > longest {
		d = longest
	}
	if d < time.Millisecond {
		d = time.Millisecond
	}
	fds := [1]unix.PollFd{{Fd: int32(w.FD()), Events: unix.POLLIN}}
	n, err := unix.Poll(fds[:], int(d/time.Millisecond))
	if err != nil || n == 0 {
		return err == unix.EINTR // counts as no loss
	}
	w.Ack()
	return true
}
