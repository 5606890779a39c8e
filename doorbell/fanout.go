package doorbell

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

// Fanout shares one Waiter among several consumers: a board with a single interrupt, or more queues
// than vectors. A goroutine waits for the one doorbell and rings a local eventfd
// of each consumer, who looks for work of its own (and often finds none: that counts as spurious there).
// Consumers may come and go while it runs.
type Fanout struct {
	outs    atomic.Value // []*outlet, in the order in which they are rung; never written again once stored
	stop    *Eventfd
	closing uint32 // with sync/atomic
	once    sync.Once
	done    chan struct{}

	mu  sync.Mutex // guards changes of outs, and err
	err error
}

// outlet is one consumer's end.
type outlet struct {
	bell  *Eventfd // nil: there is nothing to be rung by
	class Class
	used  uint32 // 1: somebody has taken this end; with sync/atomic
	gone  uint32 // 1: the consumer has left; with sync/atomic
}

// NewFanout shares w among n consumers, 1 <= n. It does not own w, which must stay open until
// Close has returned. Where w has no descriptor there is nothing to share: the consumers poll.
func NewFanout(w Waiter, n int) (*Fanout, error) {
	if n < 1 {
		return nil, fmt.Errorf("doorbell: fan-out to %d consumers", n)
	}
	outs := make([]*outlet, n)
	for i := range outs {
		outs[i] = new(outlet)
	}
	if w == nil || w.FD() < 0 {
		f := &Fanout{done: make(chan struct{})}
		f.outs.Store(outs)
		close(f.done)
		return f, nil
	}
	for i := range outs {
		e, err := NewEventfd()
		if err != nil {
			closeOutlets(outs[:i])
			return nil, err
		}
		outs[i].bell = e
	}
	f, err := startFanout(w, outs, nil)
	if err != nil {
		closeOutlets(outs)
	}
	return f, err
}

// startFanout begins to forward rings of w to outs. Where moved is not nil, a loop may still sleep on w itself: it is woken
// first, and has until moved is true, or handOver is over, before its rings are taken from it.
func startFanout(w Waiter, outs []*outlet, moved func() bool) (*Fanout, error) {
	f := &Fanout{done: make(chan struct{})}
	f.outs.Store(outs)
	var err error
	if f.stop, err = NewEventfd(); err != nil {
		return nil, err
	}
	s := NewSleeper(SleeperConfig{Doorbell: w, Stop: f.stop})
	go func() {
		defer close(f.done)
		if moved != nil {
			f.handOver(w, moved)
		}
		f.run(s)
	}()
	return f, nil
}

// handOverMax bounds how long a loop has to leave a doorbell that is fanned out from now on. One that does not sleep on it any
// more never tells that it has left.
const handOverMax = 200 * time.Millisecond

// handOver wakes a loop that sleeps on w and lets it go before rings are taken: else the fan-out could take
// one that the kernel has not woken the loop for yet. Where w is not an eventfd that costs a ring, which the loop's poll
// fallback makes good.
func (f *Fanout) handOver(w Waiter, moved func() bool) {
	r, ok := w.(Ringer)
	if !ok || r.Ring() != nil {
		return
	}
	for end := time.Now().Add(handOverMax); !moved() && atomic.LoadUint32(&f.closing) == 0 && time.Now().Before(end); {
		time.Sleep(time.Millisecond)
	}
}

// run forwards rings until stopped. It needs no poll fallback: each consumer has its own.
func (f *Fanout) run(s *Sleeper) {
	for {
		why, err := s.sleep(0, -1)
		if err == nil && why&Rung != 0 {
			for _, o := range f.outs.Load().([]*outlet) {
				if atomic.LoadUint32(&o.used) == 0 || atomic.LoadUint32(&o.gone) != 0 {
					continue
				}
				if err = o.bell.Ring(); err != nil {
					if errors.Is(err, ErrClosed) {
						err = nil // the consumer has just left
						continue
					}
					break
				}
			}
		}
		if err != nil {
			f.mu.Lock()
			f.err = err
			f.mu.Unlock()
			return
		}
		if why&Stopped != 0 {
			return
		}
	}
}

// add adds a consumer with its end.
func (f *Fanout) add(o *outlet) {
	f.mu.Lock()
	outs := f.outs.Load().([]*outlet)
	f.outs.Store(inOrder(outs, o))
	f.mu.Unlock()
}

// inOrder returns outs, which stay as they are, with o behind those of its class and of more urgent ones.
func inOrder(outs []*outlet, o *outlet) []*outlet {
	i := len(outs)
	for i > 0 && o.class.before(outs[i-1].class) {
		i--
	}
	all := append(make([]*outlet, 0, len(outs)+1), outs[:i]...)
	return append(append(all, o), outs[i:]...)
}

// remove takes a consumer out. Its end is its own to close: a ring of it may be under way.
func (f *Fanout) remove(gone *outlet) {
	f.mu.Lock()
	var outs []*outlet
	for _, o := range f.outs.Load().([]*outlet) {
		if o != gone {
			outs = append(outs, o)
		}
	}
	f.outs.Store(outs)
	f.mu.Unlock()
	atomic.StoreUint32(&gone.gone, 1)
}

// Waiter returns the end of consumer i, 0 <= i < n. It is valid until Close, and rung from the first call on: an
// end that nobody takes costs nothing.
func (f *Fanout) Waiter(i int) Waiter {
	o := f.outs.Load().([]*outlet)[i]
	atomic.StoreUint32(&o.used, 1)
	if o.bell == nil {
		return None
	}
	return o.bell
}

// Err returns why forwarding ended by itself, nil while it works. The consumers then live on their
// poll fallback.
func (f *Fanout) Err() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.err
}

// Close ends the forwarding and gives the consumers' eventfds back; no loop may sleep on them any
// more. A second Close does nothing.
func (f *Fanout) Close() error {
	f.end()
	return nil
}

// end ends the forwarding, and closes the ends of the consumers that are left.
func (f *Fanout) end() {
	f.once.Do(func() {
		if f.stop == nil {
			return
		}
		atomic.StoreUint32(&f.closing, 1)
		f.stop.Ring()
		<-f.done
		f.stop.Close()
		closeOutlets(f.outs.Load().([]*outlet))
	})
}

func closeOutlets(outs []*outlet) {
	for _, o := range outs {
		if o.bell != nil {
			o.bell.Close()
		}
	}
}
