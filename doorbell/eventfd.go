package doorbell

import (
	"fmt"
	"os"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Eventfd is an eventfd(2): both Ringer and Waiter, between threads or, passed on, between
// processes. Its methods may be used by several goroutines; Close may run beside Ring and Ack, which
// then return ErrClosed or finish first.
type Eventfd struct {
	state uint32 // closedBit, and the number of Ring and Ack under way
	fd    int
}

const closedBit = 1 << 31

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
// who shares it: the flag belongs to the open file) and close-on-exec. It owns fd from then on; on an error fd
// stays the caller's. Something that is no eventfd is refused, where /proc lets it be recognised.
func FromFD(fd int) (*Eventfd, error) {
	if l, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd)); err == nil && l != "anon_inode:[eventfd]" {
		return nil, fmt.Errorf("doorbell: fd %d is no eventfd but %s", fd, l)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, fmt.Errorf("doorbell: fd %d: %w", fd, err)
	}
	unix.CloseOnExec(fd)
	return &Eventfd{fd: fd}, nil
}

func (e *Eventfd) enter() bool {
	if atomic.AddUint32(&e.state, 1)&closedBit != 0 {
		e.leave()
		return false
	}
	return true
}

// leave closes the descriptor as the last one out, so that no Ring ever writes to a
// number that was reused for another file. The state then stays at a value that no
// later enter and leave can bring back to closedBit.
func (e *Eventfd) leave() {
	if atomic.AddUint32(&e.state, ^uint32(0)) == closedBit &&
		atomic.CompareAndSwapUint32(&e.state, closedBit, closedBit|1<<30) {
		unix.Close(e.fd)
	}
}

// Ring adds 1 to the counter. A counter that is full is a success: the peer has not looked yet,
// and will be woken.
func (e *Eventfd) Ring() error {
	if !e.enter() {
		return ErrClosed
	}
	err := e.ring()
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
			return nil
		case err == nil:
			return fmt.Errorf("doorbell: ring of fd %d wrote %d bytes of 8: it is no eventfd", e.fd, n)
		}
		return fmt.Errorf("doorbell: ring of fd %d: %w", e.fd, err)
	}
}

// FD returns the file descriptor, which polls readable while rings are pending.
func (e *Eventfd) FD() int { return e.fd }

// Ack takes the pending rings and returns their number.
func (e *Eventfd) Ack() (uint64, error) {
	if !e.enter() {
		return 0, ErrClosed
	}
	n, err := e.ack()
	e.leave()
	return n, err
}

func (e *Eventfd) ack() (uint64, error) {
	var count uint64
	for {
		// Not unix.Read: with the race detector on, its slice would escape.
		n, _, err := unix.Syscall(unix.SYS_READ, uintptr(e.fd), uintptr(unsafe.Pointer(&count)), 8)
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.EAGAIN:
			return 0, nil
		case err != 0:
			return 0, fmt.Errorf("doorbell: read of fd %d: %w", e.fd, err)
		case n != 8:
			return 0, fmt.Errorf("doorbell: read of fd %d gave %d bytes of 8: it is no eventfd", e.fd, n)
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
