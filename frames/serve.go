package frames

import (
	"context"
	"sync"
	"time"

	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/pci"
)

// Handler is the program's part of a network device without an interface (device/framedev, driver/framedrv). It is called
// each time the device comes up, in a goroutine of its own, and has both ends of p to itself until it returns.
//
// When the device goes down (the other program ended, a queue broke, the link was lost), ctx ends and each Wait returns
// doorbell.Stopped. The handler then returns: until it has, the device cannot come up again. A handler that polls
// without Wait looks at ctx once a batch.
//
// An error that it returns before ctx ends resets the device, which then comes up again. If it returns nil, the device stays up
// and moves no frames. The goroutine runs in a pci.Guard: a memory fault becomes an error of the device.
type Handler func(ctx context.Context, p Port) error

// Both runs send and receive at the same time, each in a goroutine with a pci.Guard, and returns the first error when both
// have returned. An error of one ends the context of the other, and its Wait. A Handler calls it as
// "return frames.Both(ctx, p, send, receive)".
func Both(ctx context.Context, p Port, send func(context.Context, Sender) error, receive func(context.Context, Receiver) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var (
		wg    sync.WaitGroup
		mu    sync.Mutex
		first error
	)
	run := func(f func() error) {
		defer wg.Done()
		err := guarded(f)
		if err == nil {
			return
		}
		mu.Lock()
		if first == nil {
			first = err
		}
		mu.Unlock()
		cancel()
		if p.stop != nil {
			p.stop.Ring()
		}
	}
	wg.Add(2)
	go run(func() error { return send(ctx, p.Sender) })
	go run(func() error { return receive(ctx, p.Receiver) })
	wg.Wait()
	return first
}

// guarded returns the error of f, or of a fault of the memory that it worked on.
func guarded(f func() error) error {
	var err error
	if fault := pci.Guard(func() { err = f() }); fault != nil {
		return fault
	}
	return err
}

// Serving is a Handler at work.
type Serving struct {
	cancel context.CancelFunc
	stop   *doorbell.Eventfd
	done   chan struct{}

	ring, closed sync.Once
}

// Serve calls h in a goroutine, with an end at each of two queues; it is for device models and drivers. stop is the Stop of both
// ends' Sleepers, and belongs to the Serving. failed hears of an error that h returns before Stop is called, on
// h's goroutine.
func Serve(h Handler, p Port, stop *doorbell.Eventfd, failed func(error)) *Serving {
	ctx, cancel := context.WithCancel(context.Background())
	s := &Serving{cancel: cancel, stop: stop, done: make(chan struct{})}
	p.stop = stop
	go func() {
		defer close(s.done)
		if err := guarded(func() error { return h(ctx, p) }); err != nil && ctx.Err() == nil {
			failed(err)
		}
	}()
	return s
}

// Stop ends the handler's context and each Wait, and returns true once the handler has returned: then nobody uses the ends any
// more. At the deadline it returns false, unless that is zero; it may be called again.
func (s *Serving) Stop(deadline time.Time) bool {
	s.cancel()
	s.ring.Do(func() { s.stop.Ring() })
	if deadline.IsZero() {
		<-s.done
	} else {
		t := time.NewTimer(time.Until(deadline))
		defer t.Stop()
		select {
		case <-s.done:
		case <-t.C:
			return false
		}
	}
	s.closed.Do(func() { s.stop.Close() })
	return true
}

// Discard is a Handler that takes the frames which come and does nothing with them.
func Discard(_ context.Context, p Port) error {
	for {
		in, err := p.Receiver.Receive(MaxBatch)
		if err != nil {
			return err
		}
		if len(in) > 0 {
			continue
		}
		if why, err := p.Receiver.Wait(); err != nil || why&doorbell.Stopped != 0 {
			return err
		}
	}
}
