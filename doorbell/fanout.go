package doorbell

import (
	"fmt"
	"sync"
	"sync/atomic"
)

// Fanout shares one Waiter among several consumers: a board with a single interrupt, or more queues
// than vectors. A goroutine waits for the one doorbell and rings a local eventfd
// of each consumer, who looks for work of its own (and often finds none: that counts as spurious there).
type Fanout struct {
	out  []*Eventfd
	used []uint32 // 1: somebody has taken this end; with sync/atomic
	stop *Eventfd
	once sync.Once
	done chan struct{}

	mu  sync.Mutex
	err error
}

// NewFanout shares w among n consumers, 1 <= n. It does not own w, which must stay open until
// Close has returned. Where w has no descriptor there is nothing to share: the consumers poll.
func NewFanout(w Waiter, n int) (*Fanout, error) {
	if n < 1 {
		return nil, fmt.Errorf("doorbell: fan-out to %d consumers", n)
	}
	f := &Fanout{done: make(chan struct{})}
	if w == nil || w.FD() < 0 {
		f.out, f.used = make([]*Eventfd, n), make([]uint32, n)
		close(f.done)
		return f, nil
	}
	var err error
	if f.stop, err = NewEventfd(); err != nil {
		return nil, err
	}
	for i := 0; i < n; i++ {
		e, err := NewEventfd()
		if err != nil {
			f.closeFDs()
			return nil, err
		}
		f.out = append(f.out, e)
	}
	f.used = make([]uint32, n)
	go f.run(NewSleeper(SleeperConfig{Doorbell: w, Stop: f.stop}))
	return f, nil
}

// run forwards rings until stopped. It needs no poll fallback: each consumer has its own.
func (f *Fanout) run(s *Sleeper) {
	defer close(f.done)
	for {
		why, err := s.sleep(0, -1)
		if err == nil && why&Rung != 0 {
			for i, e := range f.out {
				if atomic.LoadUint32(&f.used[i]) == 0 {
					continue
				}
				if err = e.Ring(); err != nil {
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

// Waiter returns the end of consumer i, 0 <= i < n. It is valid until Close, and rung from the first call on: an
// end that nobody takes costs nothing.
func (f *Fanout) Waiter(i int) Waiter {
	atomic.StoreUint32(&f.used[i], 1)
	if f.out[i] == nil {
		return None
	}
	return f.out[i]
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
	f.once.Do(func() {
		if f.stop == nil {
			return
		}
		f.stop.Ring()
		<-f.done
		f.closeFDs()
	})
	return nil
}

func (f *Fanout) closeFDs() {
	f.stop.Close()
	for _, e := range f.out {
		e.Close()
	}
}
