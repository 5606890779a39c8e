package tunbridge

import (
	"errors"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Operations of the data path, for errors.
const (
	opRead  = "read"
	opWrite = "write"
)

// The data path's two calls are raw: the descriptor never blocks, so the scheduler has nothing to do while they run, and telling it
// takes some 7 % of a small frame's time.

// ReadV reads one frame, its header first in vnet mode, into the buffers of iov (1 to
// 1024) and returns its length in bytes. ErrAgain: there is none. An ErrDropped
// lost this one frame; ErrBuffers is the caller's fault. A frame that does not fit is cut without
// notice: a result that fills the buffers to the last byte may be one. The memory is the
// kernel's during the call only.
func (it *Iface) ReadV(iov []unix.Iovec) (int, error) {
	if len(iov) == 0 {
		return 0, ErrBuffers
	}
	for {
		n, _, e := unix.RawSyscall(unix.SYS_READV, uintptr(it.fd), uintptr(unsafe.Pointer(&iov[0])), uintptr(len(iov)))
		if e == 0 {
			return int(n), nil
		}
		if e != unix.EINTR {
			return 0, it.ioError(opRead, e)
		}
	}
}

// WriteV writes one frame, its header first in vnet mode, from the buffers of iov (1 to
// 1024) and returns its length in bytes. An ErrDropped lost this one frame; the next may
// pass. The memory is the kernel's during the call only.
func (it *Iface) WriteV(iov []unix.Iovec) (int, error) {
	if len(iov) == 0 {
		return 0, ErrMalformed
	}
	for {
		n, _, e := unix.RawSyscall(unix.SYS_WRITEV, uintptr(it.fd), uintptr(unsafe.Pointer(&iov[0])), uintptr(len(iov)))
		if e == 0 {
			return int(n), nil
		}
		if e != unix.EINTR {
			return 0, it.ioError(opWrite, e)
		}
	}
}

// Read is ReadV with a single buffer.
func (it *Iface) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, ErrBuffers
	}
	for {
		n, _, e := unix.Syscall(unix.SYS_READ, uintptr(it.fd), uintptr(unsafe.Pointer(&p[0])), uintptr(len(p)))
		if e == 0 {
			return int(n), nil
		}
		if e != unix.EINTR {
			return 0, it.ioError(opRead, e)
		}
	}
}

// Write is WriteV with a single buffer.
func (it *Iface) Write(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, ErrMalformed
	}
	for {
		n, _, e := unix.Syscall(unix.SYS_WRITE, uintptr(it.fd), uintptr(unsafe.Pointer(&p[0])), uintptr(len(p)))
		if e == 0 {
			return int(n), nil
		}
		if e != unix.EINTR {
			return 0, it.ioError(opWrite, e)
		}
	}
}

// Drain throws away what waits to be read in all queues and returns the number of frames. Nobody may
// read at the same time.
func (it *Iface) Drain() int {
	it = it.first
	it.mu.Lock()
	defer it.mu.Unlock()
	return it.drain()
}

// maxDrain is far above the queue's length (tx_queue_len, 500 or 1000), so that a sender
// cannot hold Drain for ever.
const maxDrain = 1 << 16

func (it *Iface) drain() int {
	var buf [64]byte // the kernel cuts the rest
	n := 0
	for _, q := range it.queues {
		for i := 0; i < maxDrain; i++ {
			_, err := q.Read(buf[:])
			// ErrBuffers here is a frame that the kernel has no header for: it is gone.
			if err != nil && !errors.Is(err, ErrDropped) && err != ErrBuffers {
				break
			}
			n++
		}
	}
	return n
}
