package doorbell

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Eventfd is an eventfd(2): both Ringer and Waiter, between threads or, passed on, between
// processes. Its methods may be used by several goroutines; Close may run beside Ring and Ack, which
// then return ErrClosed or finish first.
//
// One that a peer shares (FromFD) is one open file description: the peer can clear its O_NONBLOCK, fill it
// and drain it. Ack cannot block all the same (RWF_NOWAIT). Ring can, as eventfds know no such flag for
// writing; a watchdog finds a ring that has blocked for a while and frees it, and from then on the
// eventfd is rung in a slower way that cannot block: see watch.go.
type Eventfd struct {
	state  uint32 // users, slowBit, goneBit, closedBit, and from finished on how many Ring and Ack have ended
	fd     int
	shared bool   // with a peer
	ringer helper // of RingNoWait, where the kernel has nothing better
	// The watchdog's, where the kernel has nothing better.
	drainer helper
	// The watchdog's, guarded by watch.mu.
	place int    // in watch.list
	seen  uint32 // state at its last look
}

// Parts of Eventfd.state.
const (
	users     = 1<<13 - 1 // the number of Ring and Ack under way
	slowBit   = 1 << 13   // a ring has blocked once: from then on by ways that cannot
	goneBit   = 1 << 14   // the descriptor is closed
	closedBit = 1 << 15   // Close was called
	finished  = 1 << 16   // one Ring or Ack has ended; counts modulo 65536
)

// ErrBlocked is returned by a Ring that blocked because the peer made the shared eventfd a blocking one and
// filled its counter, and that was freed by force. The peer breaks the rules; later rings do not block.
var ErrBlocked = errors.New("doorbell: the peer made its doorbell block the ringing side (it cleared O_NONBLOCK of the shared eventfd and filled it); " +
	"the ring was freed, and later ones do not block")

// one is what a ring writes: the number 1 in native byte order (ivshmem-spec.rst,
// "The ivshmem Client-Client Protocol"; eventfd(2)).
var one = func() (b [8]byte) {
	*(*uint64)(unsafe.Pointer(&b)) = 1
	return b
}()

// NewEventfd makes an eventfd with no ring pending, non-blocking and closed on exec.
func NewEventfd() (*Eventfd, error) {
	fd, err := unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("doorbell: eventfd: %w", err)
	}
	return &Eventfd{fd: fd}, nil
}

// FromFD takes an eventfd that came from elsewhere, and makes it non-blocking (for everyone
// who shares it: the flag belongs to the open file, and others may clear it again) and close-on-exec. It owns fd
// from then on; on an error fd stays the caller's. Something that is not an eventfd is refused, where /proc lets it be
// recognised.
func FromFD(fd int) (*Eventfd, error) {
	if l, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd)); err == nil && l != "anon_inode:[eventfd]" {
		return nil, fmt.Errorf("doorbell: fd %d is not an eventfd but %s", fd, l)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, fmt.Errorf("doorbell: fd %d: %w", fd, err)
	}
	unix.CloseOnExec(fd)
	e := &Eventfd{fd: fd, shared: true}
	watch.add(e)
	return e, nil
}

// enter begins a Ring or Ack, to be ended by leave unless it returns false: the eventfd is closed then.
func (e *Eventfd) enter() (state uint32, ok bool) {
	s := atomic.AddUint32(&e.state, 1)
	if s&closedBit != 0 {
		e.leave()
		return s, false
	}
	return s, true
}

// leave closes the descriptor as the last one out, so that no Ring ever writes to a
// number that was reused for another file.
func (e *Eventfd) leave() {
	s := atomic.AddUint32(&e.state, finished-1)
	// The watchdog may set slowBit meanwhile, and somebody who will be told ErrClosed may come: he does it then.
	for s&(users|goneBit|closedBit) == closedBit {
		if atomic.CompareAndSwapUint32(&e.state, s, s|goneBit) {
			if e.shared {
				watch.remove(e)
			}
			unix.Close(e.fd)
			return
		}
		s = atomic.LoadUint32(&e.state)
	}
}

// Ring adds 1 to the counter. A counter that is full is a success: the peer has not looked yet,
// and will be woken. ErrBlocked tells that a peer who shares the eventfd held this ring up.
func (e *Eventfd) Ring() error {
	s, ok := e.enter()
	if !ok {
		return ErrClosed
	}
	var err error
	if s&slowBit == 0 {
		err = e.ring()
	} else {
		err = e.ringNoWait()
	}
	e.leave()
	return err
}

// RingNoWait implements NoWaitRinger.
func (e *Eventfd) RingNoWait() error {
	if !e.shared {
		return e.Ring()
	}
	if _, ok := e.enter(); !ok {
		return ErrClosed
	}
	err := e.ringNoWait()
	e.leave()
	return err
}

func (e *Eventfd) ring() error {
	for {
		n, err := unix.Write(e.fd, one[:])
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.EAGAIN, err == nil && n == 8:
			if atomic.LoadUint32(&e.state)&slowBit != 0 {
				return ErrBlocked // the bit was not set when this ring began
			}
			return nil
		case err == nil:
			return fmt.Errorf("doorbell: ring of fd %d wrote %d bytes of 8: it is not an eventfd", e.fd, n)
		}
		return fmt.Errorf("doorbell: ring of fd %d: %w", e.fd, err)
	}
}

// FD returns the file descriptor, which polls readable while rings are pending.
func (e *Eventfd) FD() int { return e.fd }

// Ack takes the pending rings and returns their number. A peer that shares the eventfd may take them first: then it is 0.
func (e *Eventfd) Ack() (uint64, error) {
	if _, ok := e.enter(); !ok {
		return 0, ErrClosed
	}
	n, err := e.ack()
	e.leave()
	return n, err
}

func (e *Eventfd) ack() (uint64, error) {
	var count uint64
	for {
		var n uintptr
		var err unix.Errno
		// Not unix.Read and unix.Preadv2: with the race detector on, their slices would escape.
		if e.shared && atomic.LoadUint32(&noReadNoWait) == 0 {
			if n, err = readNoWait(e.fd, &count); err == unix.EOPNOTSUPP || err == unix.ENOSYS || err == unix.EPERM {
				atomic.StoreUint32(&noReadNoWait, 1)
				continue
			}
		} else {
			if e.shared && !ready(e.fd, unix.POLLIN) {
				return 0, nil
			}
			// If a peer takes the rings between the two calls, this one blocks until the watchdog rings.
			n, _, err = unix.Syscall(unix.SYS_READ, uintptr(e.fd), uintptr(unsafe.Pointer(&count)), 8)
		}
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.EAGAIN:
			return 0, nil
		case err != 0:
			return 0, fmt.Errorf("doorbell: read of fd %d: %w", e.fd, err)
		case n != 8:
			return 0, fmt.Errorf("doorbell: read of fd %d gave %d bytes of 8: it is not an eventfd", e.fd, n)
		}
		return count, nil
	}
}

// Close gives the descriptor back. Loops that sleep on it must have stopped. A second Close
// does nothing.
func (e *Eventfd) Close() error {
	for {
		s := atomic.LoadUint32(&e.state)
		if s&closedBit != 0 {
			return nil
		}
		// The extra user is this call: the last leave closes.
		if atomic.CompareAndSwapUint32(&e.state, s, (s+1)|closedBit) {
			e.leave()
			return nil
		}
	}
}
