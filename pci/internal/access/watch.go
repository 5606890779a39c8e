package access

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/pci"
	"github.com/boardlink/boardlink/pci/internal/evfd"
)

// Watch looks after a function that may vanish: by eventfds that the kernel rings, and by asking
// from time to time.
type Watch struct {
	period time.Duration
	check  func() error
	quiet  sync.Mutex // held while check runs, and while its answer would mislead
	events chan struct{}
	stop   evfd.FD
	evs    []watched
	done   chan struct{}
	run    bool
}

type watched struct {
	fd   evfd.FD
	flag *uint32
	log  func()
}

// NewWatch makes one that asks check every period. Start starts it.
func NewWatch(period time.Duration, check func() error) (*Watch, error) {
	stop, err := evfd.New()
	if err != nil {
		return nil, err
	}
	return &Watch{period: period, check: check, events: make(chan struct{}, 1), stop: stop, done: make(chan struct{})}, nil
}

// NewEvent makes an eventfd to be wired to the kernel, before Start. When it is rung, flag becomes 1 (by
// sync/atomic), log is called the first time, and Events gets a token.
func (w *Watch) NewEvent(flag *uint32, log func()) (evfd.FD, error) {
	e, err := evfd.New()
	if err == nil {
		w.evs = append(w.evs, watched{e, flag, log})
	}
	return e, err
}

// Start starts the goroutine.
func (w *Watch) Start() {
	w.run = true
	go w.loop()
}

// Events holds a token when something happened.
func (w *Watch) Events() <-chan struct{} { return w.events }

func (w *Watch) token() {
	select {
	case w.events <- struct{}{}:
	default:
	}
}

// Check asks now.
func (w *Watch) Check() error {
	w.quiet.Lock()
	defer w.quiet.Unlock()
	return w.check()
}

// Quiet runs f, a reset, while nobody asks: the function would look lost.
func (w *Watch) Quiet(f func() error) error {
	w.quiet.Lock()
	defer w.quiet.Unlock()
	return f()
}

func (w *Watch) loop() {
	defer close(w.done)
	fds := make([]unix.PollFd, 1+len(w.evs))
	fds[0] = unix.PollFd{Fd: int32(w.stop), Events: unix.POLLIN}
	for i, e := range w.evs {
		fds[i+1] = unix.PollFd{Fd: int32(e.fd), Events: unix.POLLIN}
	}
	lost := false
	next := time.Now().Add(w.period)
	for {
		d := time.Until(next)
		if d <= 0 {
			err := w.Check()
			if now := errors.Is(err, pci.ErrGone); now != lost {
				lost = now
				w.token()
			}
			next = time.Now().Add(w.period)
			continue
		}
		n, err := unix.Poll(fds, int(d/time.Millisecond)+1)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			panic(fmt.Sprintf("pci: poll of own eventfds: %v", err)) // a programmer's error
		}
		if n == 0 {
			continue
		}
		if fds[0].Revents != 0 {
			return
		}
		for i, e := range w.evs {
			if fds[i+1].Revents == 0 {
				continue
			}
			if k, err := e.fd.Ack(); err != nil || k == 0 {
				continue
			}
			if atomic.SwapUint32(e.flag, 1) == 0 {
				e.log()
			}
			w.token()
		}
	}
}

// Close stops it. A second Close does nothing.
func (w *Watch) Close() {
	if w.stop < 0 {
		return
	}
	if w.run {
		w.stop.Ring()
		<-w.done
	}
	w.stop.Close()
	w.stop = -1
	for _, e := range w.evs {
		e.fd.Close()
	}
	w.evs = nil
}
