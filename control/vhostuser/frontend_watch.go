package vhostuser

import (
	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/doorbell"
)

// errWatch waits for the doorbell by which a back end tells of a broken queue.
type errWatch struct {
	rung chan error // hears of one ring, or nothing
	stop *doorbell.Eventfd
	done chan struct{}
}

// watch waits for a ring of e in a goroutine, until end is called.
func watch(e *doorbell.Eventfd) *errWatch {
	w := &errWatch{rung: make(chan error, 1), done: make(chan struct{})}
	var err error
	if w.stop, err = doorbell.NewEventfd(); err != nil { // out of descriptors: then it is not heard of
		close(w.done)
		return w
	}
	go func() {
		defer close(w.done)
		fds := []unix.PollFd{{Fd: int32(e.FD()), Events: unix.POLLIN}, {Fd: int32(w.stop.FD()), Events: unix.POLLIN}}
		for {
			if _, err := unix.Poll(fds, -1); err != nil && err != unix.EINTR {
				return
			}
			if fds[1].Revents != 0 {
				return
			}
			if fds[0].Revents != 0 {
				// It is taken, however often it was rung: another ring is heard when the device is
				// up again.
				_, _ = e.Ack()
				w.rung <- ErrRung
				return
			}
		}
	}()
	return w
}

// end ends the wait.
func (w *errWatch) end() {
	if w.stop != nil {
		_ = w.stop.Ring()
	}
	<-w.done
	if w.stop != nil {
		_ = w.stop.Close()
	}
}
