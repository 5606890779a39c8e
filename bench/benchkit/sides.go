//go:build linux

package benchkit

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/boardlink/boardlink/mmio"
)

// Patience is how long a side waits for the other one, each time.
const Patience = 30 * time.Second

var errPatience = errors.New("the other side does not answer")

// Watch tells a side that waits whether that makes sense. Its methods but Gone are called by one goroutine.
type Watch struct {
	deadline time.Time
	gone     atomic.Bool
}

// Start gives the other side all of Patience again.
func (w *Watch) Start() { w.deadline = time.Now().Add(Patience) }

// Gone tells that the other side has ended.
func (w *Watch) Gone() { w.gone.Store(true) }

// Late is asked now and then by whoever waits: it is an error where the other side has ended, or Patience is over.
func (w *Watch) Late() error {
	if w.gone.Load() || time.Now().After(w.deadline) {
		return errPatience
	}
	return nil
}

var idleWord uint64

// Relax lets a moment pass between two looks, so that the line is not taken from who writes it: it reads a word of its own n times.
func Relax(n int) {
	for i := 0; i < n; i++ {
		mmio.Load64(unsafe.Pointer(&idleWord))
	}
}

// Sides are the names of the two sides of a benchmark, for errors.
type Sides struct{ Own, Peer string }

// Lead runs lead, this process' side of a benchmark whose other side is p, until both have ended, and decodes p's result. Where
// p ends too early, it calls gone: lead has to return then.
func (p *Process) Lead(ctx context.Context, names Sides, lead func() error, gone func(), result any) error {
	led := make(chan error, 1)
	go func() { led <- lead() }()
	var err error
	select {
	case err = <-led:
		if err != nil {
			p.Stop()
			err = fmt.Errorf("%s side: %w", names.Own, err)
		} else if err = p.Wait(result); err != nil {
			err = fmt.Errorf("%s side: %w", names.Peer, err)
		}
	case <-p.Gone():
		// This side may still be behind the last round trip, or wait for ever.
		if err = p.Wait(result); err != nil {
			err = fmt.Errorf("%s side: %w", names.Peer, err)
			gone()
		}
		if lerr := <-led; err == nil && lerr != nil {
			err = fmt.Errorf("%s side: %w", names.Own, lerr)
		}
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}
