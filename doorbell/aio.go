package doorbell

import (
	"errors"
	"fmt"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// aio signals eventfds by the completion of asynchronous reads (io_submit(2)): the kernel adds 1 to the counter as an interrupt would, without ever
// waiting for room. A read of /dev/zero completes at once.
var aio signaller

// errNoAIO: this kernel, or what confines the program, has no asynchronous I/O.
var errNoAIO = errors.New("doorbell: no asynchronous I/O")

// iocb is struct iocb of linux/aio_abi.h. The fields without a name are 0.
type iocb struct {
	_      uint64 // aio_data
	_      uint64 // aio_key and aio_rw_flags, in an order that depends on the byte order
	opcode uint16
	_      int16 // aio_reqprio
	fildes uint32
	buf    uint64
	nbytes uint64
	_      int64  // aio_offset
	_      uint64 // aio_reserved2
	flags  uint32
	resfd  uint32
}

const (
	iocbCmdPRead  = 0 // IOCB_CMD_PREAD
	iocbFlagResFD = 1 // IOCB_FLAG_RESFD
	aioEvents     = 32
)

// ioEvent is struct io_event: data, obj, res, res2. Nothing reads it.
type ioEvent [4]uint64

type signaller struct {
	mu     sync.Mutex
	tried  bool
	ok     bool
	ctx    uintptr
	cb     iocb
	list   [1]*iocb
	buf    [8]byte
	events [aioEvents]ioEvent
	ts     unix.Timespec // zero
}

// signal adds 1 to the counter of an eventfd. One that is full is a success. errNoAIO: it has to be done in another way.
func (a *signaller) signal(fd int) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.tried {
		a.tried, a.ok = true, a.open() && a.works()
	}
	if !a.ok {
		return errNoAIO
	}
	return a.submit(fd)
}

func (a *signaller) submit(fd int) error {
	a.cb.resfd = uint32(fd)
	for reaped := false; ; {
		n, _, err := unix.Syscall(unix.SYS_IO_SUBMIT, a.ctx, 1, uintptr(unsafe.Pointer(&a.list)))
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.EAGAIN && !reaped:
			// The completions, of which nobody wants to know more, fill the context.
			unix.Syscall6(unix.SYS_IO_GETEVENTS, a.ctx, 0, aioEvents, uintptr(unsafe.Pointer(&a.events)), uintptr(unsafe.Pointer(&a.ts)), 0)
			reaped = true
			continue
		case err == unix.EBADF, err == unix.EINVAL:
			return fmt.Errorf("doorbell: ring of fd %d: %w", fd, err)
		case err != 0 || n != 1:
			return errNoAIO
		}
		return nil
	}
}

// open makes the context. The kernel's own limit for all programs (fs.aio-max-nr) may leave none.
func (a *signaller) open() bool {
	zero, err := unix.Open("/dev/zero", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	if _, _, err := unix.Syscall(unix.SYS_IO_SETUP, aioEvents, uintptr(unsafe.Pointer(&a.ctx)), 0); err != 0 {
		unix.Close(zero)
		return false
	}
	a.cb = iocb{opcode: iocbCmdPRead, fildes: uint32(zero), buf: uint64(uintptr(unsafe.Pointer(&a.buf))), nbytes: 1, flags: iocbFlagResFD}
	a.list[0] = &a.cb
	return true
}

// works tells whether an eventfd of our own is signalled indeed.
func (a *signaller) works() bool {
	e, err := NewEventfd()
	if err != nil {
		return false
	}
	defer e.Close()
	if a.submit(e.fd) != nil {
		return false
	}
	n, err := e.Ack()
	return n == 1 && err == nil
}
