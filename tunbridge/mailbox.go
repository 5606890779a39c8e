package tunbridge

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/pci"
)

// ErrStuck: a loop has not come to the end of its batch in time. What it was asked for stays asked for: its memory and
// descriptors are in use until a later call succeeds.
var ErrStuck = errors.New("a loop does not come to the end of its batch")

// errTorn: a fault of the memory ended what a loop was asked for.
var errTorn = errors.New("the memory of a queue faulted meanwhile")

// mailbox is how other goroutines reach a loop whose pumps come and go. What they post runs on the loop's
// goroutine, between two batches and with both pumps grounded.
//
//	            Do, which leaves a pump                 the last pump is gone, nothing is posted
//	no goroutine ----------------------> running -----------------------------------------> no goroutine
//
// Without a goroutine the function runs on its caller's. The loop learns of letters by its Stop, which here is the
// loop's own and means "look into the mailbox": one load for each batch.
type mailbox struct {
	broken func(DevicePump, error)

	mu      sync.Mutex
	running bool
	gone    chan struct{} // closed when the goroutine has ended
	posted  []*letter
}

type letter struct {
	f    func() error
	err  error
	done chan struct{}
}

// LiveConfig is what a loop is made of whose pumps come and go.
type LiveConfig struct {
	Name  string // of device and pair, for errors: "net0 pair 0"
	Iface *Iface
	Loop  LoopConfig
	// Fallback is the pace of the poll fallback; the zero value is the default.
	Fallback doorbell.Fallback
	// Broken hears, on the loop's goroutine, that a pump ended by an error of its queue; the other one goes
	// on. It is told nil for both, which end where the interface or the memory is gone. What was done of the
	// last batch is completed by then, the rest given back.
	Broken func(p DevicePump, err error)
}

// OpenLoop returns a loop without pumps. It runs, on a goroutine of its own, while it has some: device sides only. Its policies
// keep what they have learned while pumps come and go. Close gives it back.
func OpenLoop(c LiveConfig) (*Loop, error) {
	stop, err := NewStop()
	if err != nil {
		return nil, err
	}
	l := newLoop(c.Loop)
	l.name, l.ifc, l.stop, l.box = c.Name, c.Iface, stop, &mailbox{broken: c.Broken}
	l.makeSleeper(c.Fallback, c.Loop)
	return l, nil
}

// Do runs f between two batches, on the goroutine of the loop if it has one. Nothing of the rings is popped, and nothing is in
// flight, while it runs. It fails with ErrStuck where the loop has not come so far at the deadline; f runs then when it
// has. A zero deadline waits as long as it takes. f must not call methods of the Loop.
func (l *Loop) Do(f func() error, deadline time.Time) error {
	b := l.box
	b.mu.Lock()
	if !b.running {
		defer b.mu.Unlock()
		err := f()
		if l.out != nil || l.in != nil {
			b.running, b.gone = true, make(chan struct{})
			go l.live(b.gone)
		}
		return err
	}
	m := &letter{f: f, err: errTorn, done: make(chan struct{})}
	b.posted = append(b.posted, m)
	l.stop.Raise()
	b.mu.Unlock()
	if !wait(m.done, deadline) {
		return fmt.Errorf("%s: %w", l.name, ErrStuck)
	}
	return m.err
}

// wait waits until c is closed or the deadline has passed, which it tells by false.
func wait(c chan struct{}, deadline time.Time) bool {
	if deadline.IsZero() {
		<-c
		return true
	}
	t := time.NewTimer(time.Until(deadline))
	defer t.Stop()
	select {
	case <-c:
		return true
	case <-t.C:
		return false
	}
}

// Attach adds pumps, at most one each way in all. They run from then on.
func (l *Loop) Attach(deadline time.Time, pumps ...DevicePump) error {
	return l.Do(func() error {
		defer l.wire() // also of those before one that is refused
		for _, p := range pumps {
			h := half(p)
			if h == l.out || h == l.in {
				continue
			}
			if err := l.put(h); err != nil {
				return err
			}
		}
		return nil
	}, deadline)
}

// Detach takes pumps out of the loop: what they did is completed, the rest is given back to their rings, and they touch neither any
// more. One that is not in the loop stays out of it.
func (l *Loop) Detach(deadline time.Time, pumps ...DevicePump) error {
	return l.Do(func() error {
		for _, p := range pumps {
			l.take(p)
		}
		return nil
	}, deadline)
}

// take removes h, which is grounded.
func (l *Loop) take(h half) {
	switch h {
	case l.out:
		l.out = nil
	case l.in:
		l.in = nil
	default:
		return
	}
	l.wire()
}

// Change gives a pump of the loop something new, or one that is attached later. c is called once the pump is
// grounded.
func (l *Loop) Change(p DevicePump, c func() (Change, error), deadline time.Time) error {
	return l.Do(func() error {
		change, err := c()
		if err != nil {
			return err
		}
		p.change(change)
		l.wire()
		return nil
	}, deadline)
}

// Close detaches all pumps and gives the loop's descriptor back, after which the loop is not used again. After
// ErrStuck it may be called once more.
func (l *Loop) Close(deadline time.Time) error {
	if err := l.Do(func() error {
		l.out, l.in = nil, nil
		return nil
	}, deadline); err != nil {
		return err
	}
	b := l.box
	b.mu.Lock()
	gone := b.gone
	b.mu.Unlock()
	if gone != nil && !wait(gone, deadline) {
		return fmt.Errorf("%s: %w", l.name, ErrStuck)
	}
	return l.stop.Close()
}

// live runs the loop while it has pumps, or letters.
func (l *Loop) live(gone chan struct{}) {
	defer close(gone)
	b := l.box
	if err := l.pin(); err != nil {
		l.breakAll(err)
	}
	for {
		var err error
		if fault := pci.Guard(func() { err = l.run() }); fault != nil {
			err = fault
		}
		if err != nil {
			l.breakAll(err)
		}
		b.mu.Lock()
		if l.out == nil && l.in == nil && len(b.posted) == 0 {
			b.running = false
			b.mu.Unlock()
			return
		}
		if len(b.posted) > 0 {
			l.stop.Raise() // a fault may have torn attend out before it took them
		}
		b.mu.Unlock()
	}
}

// attend looks into the mailbox, and tells whether the loop goes on. Without a mailbox there is one message: stop.
func (l *Loop) attend() bool {
	b := l.box
	if b == nil {
		return false
	}
	l.ground()
	b.mu.Lock()
	l.stop.lower() // not between the flag and the bell of a Raise: that would leave the bell rung, and no sleep would last
	posted := b.posted
	b.posted = nil
	b.mu.Unlock()
	defer func() { // of the others too, where a fault tears one out
		for _, m := range posted {
			close(m.done)
		}
	}()
	for len(posted) > 0 {
		m := posted[0]
		m.err = m.f()
		posted = posted[1:]
		close(m.done)
	}
	return l.out != nil || l.in != nil
}

// ground brings both pumps to rest.
func (l *Loop) ground() {
	for _, h := range [...]half{l.out, l.in} {
		if h != nil {
			h.ground()
			h.shared().flush()
		}
	}
}

// broke is what becomes of a pump that failed: with a mailbox it is taken out, if the fault is its queue's, and told of; then, and
// where there is nothing to do, err is nil. Any other error is the whole loop's.
func (l *Loop) broke(h half, err error) error {
	if l.box == nil || errors.Is(err, ErrGone) || errors.Is(err, ErrClosed) {
		return err
	}
	h.ground()
	h.shared().flush()
	l.take(h)
	l.box.broken(h.(DevicePump), err)
	return nil
}

// breakAll takes all pumps out after an error of the whole loop.
func (l *Loop) breakAll(err error) {
	for _, h := range [...]half{l.out, l.in} {
		if h != nil {
			h := h
			// A fault here is the one that ended the loop, or follows from it.
			if fault := pci.Guard(func() { h.ground() }); fault != nil && !errors.Is(err, pci.ErrGone) {
				err = fault
			}
			h.shared().flush()
		}
	}
	if l.out != nil || l.in != nil {
		l.out, l.in = nil, nil
		l.box.broken(nil, err)
	}
}

// lower takes Raise back, as the loop does which a Stop belongs to. The caller holds what all callers of Raise hold.
func (s *Stop) lower() {
	s.bell.Ack()
	atomic.StoreUint32(&s.raised, 0)
}
