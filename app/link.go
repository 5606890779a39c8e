package app

import (
	"context"
	"io"
	"sync"
	"time"

	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/session"
	"github.com/boardlink/boardlink/status"
)

// stateNoInterface is the state of a link, in Status, whose interfaces cannot be made.
const stateNoInterface = "waiting for the interface"

// Interfaces that cannot be made are tried again after retryMake, then after twice the time with each try, up to maxRetryMake;
// as soon as after the first try when what is wrong changes.
const (
	retryMake    = 250 * time.Millisecond
	maxRetryMake = 4 * time.Second
)

// numbered is a Plan with its device number.
type numbered struct {
	Plan
	number uint16
	class  doorbell.Class
}

// classes returns the classes of the devices by their numbers.
func (l *link) classes() map[uint16]doorbell.Class {
	classes := map[uint16]doorbell.Class{}
	for _, p := range l.plans {
		classes[p.number] = p.class
	}
	return classes
}

// link is one end of a link with its devices. Where a program has several, one whose devices cannot be made is tried
// again and does not stop the others.
type link struct {
	name, board string
	plans       []numbered // the devices, as they are to be
	// create makes the devices and the end that they belong to. After an error nothing is left of them.
	create func() (end, []io.Closer, error)
	log    session.Logger
	retry  bool        // there are other links
	lost   func(error) // hears of an interface that cannot be made again; nil: it is tried for ever

	mu      sync.Mutex // guards what Status reads
	end     end        // nil: not made yet
	devices []io.Closer
	since   time.Time // of stateNoInterface
	err     error     // of the last create
	errs    uint64    // failed calls of create
}

// make makes the devices, and the end that they belong to.
func (l *link) make() error {
	end, devices, err := l.create()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err = err; err != nil {
		if l.errs++; l.since.IsZero() {
			l.since = time.Now()
		}
		return err
	}
	l.end, l.devices = end, devices
	return nil
}

// made returns the end, nil where it is not made yet, and the error of the last try.
func (l *link) made() (end, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.end, l.err
}

// Open opens the board of a link whose devices are made; else it returns why they are not.
func (l *link) Open(ctx context.Context) error {
	end, err := l.made()
	if end == nil {
		return err
	}
	return end.Open(ctx)
}

// Run makes the devices if they are not made yet, and serves the link until ctx ends.
func (l *link) Run(ctx context.Context) error {
	if !l.await(ctx) {
		return nil
	}
	for _, p := range l.plans {
		if k, ok := p.Plan.(keeper); ok {
			defer k.keep(l.lost)()
		}
	}
	return l.end.Run(ctx)
}

// await tries to make the devices until they are; false: ctx ended before. It logs a line for each change.
func (l *link) await(ctx context.Context) bool {
	_, err := l.made()
	logged, pause := "", retryMake
	for err != nil {
		if text := err.Error(); text != logged {
			l.log.Warn("the interface cannot be made, it is tried again", "link", l.name, "error", err)
			logged, pause = text, retryMake
		}
		t := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			t.Stop()
			return false
		case <-t.C:
		}
		if pause *= 2; pause > maxRetryMake {
			pause = maxRetryMake
		}
		err = l.make()
	}
	return true
}

// close closes the devices that are made; those that are closed already stay so.
func (l *link) close() {
	for _, d := range l.devices {
		d.Close()
	}
}

// Status describes the link for an operator. Any goroutine may call it.
func (l *link) Status() status.Link {
	l.mu.Lock()
	end, err, errs, since := l.end, l.err, l.errs, l.since
	l.mu.Unlock()
	var s status.Link
	if end != nil {
		s = end.Status()
	} else {
		s = status.Link{Name: l.name, Board: l.board, State: stateNoInterface, Since: since.Format(time.RFC3339Nano),
			LastError: err.Error(), Regions: []status.Region{}, Devices: []status.Device{}, Counters: map[string]uint64{}}
	}
	if l.retry {
		s.Counters["interface_errors"] = errs
	}
	return s
}
