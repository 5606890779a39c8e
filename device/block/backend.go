package block

import (
	"errors"

	"golang.org/x/sys/unix"
)

// Backend is what the bytes of a disk lie on. All methods but Close may be called by several goroutines at a time, and may block. Ranges
// lie inside Geometry.Size, and are multiples of 512 bytes. An error is answered with an I/O error, unless it matches ErrUnsupported
// or ErrMemory.
type Backend interface {
	// Geometry returns what the backend is like. It does not change.
	Geometry() Geometry
	// ReadAt fills the buffers with the bytes at off. WriteAt writes them, to stable storage where durable is set. There
	// are 1 to MaxBuffers buffers, none empty. The slice is the backend's during the call, and may be changed.
	ReadAt(bufs []unix.Iovec, off uint64) error
	WriteAt(bufs []unix.Iovec, off uint64, durable bool) error
	// Flush returns when all writes that ended before are on stable storage.
	Flush() error
	// Discard tells that the n bytes at off are not needed any more: they may be anything then.
	Discard(off, n uint64) error
	// WriteZeroes makes the n bytes at off zeros; unmap permits it to give their storage back. With ErrUnsupported nothing was
	// done, and the caller writes zeros.
	WriteZeroes(off, n uint64, unmap bool) error
	// Abort has calls that wait for somebody else return with an error, where that is possible.
	Abort()
	// Close gives everything back. No other call is under way.
	Close() error
}

// Geometry is what a Backend is like.
type Geometry struct {
	Name     string // for status and errors: "file /srv/root.img"
	Size     uint64 // bytes, a multiple of 512
	ReadOnly bool
	// BlockSize is the unit in which the backend works best without reading first, in bytes: a power of two, 512 at least.
	BlockSize uint32
	// Physical, MinIO and OptIO are the size of physical blocks and the suggested smallest and largest requests in bytes; 0: unknown.
	Physical, MinIO, OptIO uint32
	// Discard tells that Discard does something. WriteZeroes is always there, by writing zeros if need be.
	Discard bool
	// Remote tells that calls wait for somebody else, who may not answer.
	Remote bool
	// Parallel is how many calls at a time are useful; 0: a default.
	Parallel int
}

// MaxBuffers is how many buffers one call of a Backend has at most.
const MaxBuffers = 1024

var (
	// ErrUnsupported: the backend cannot do that.
	ErrUnsupported = errors.New("the image does not support this")
	// ErrMemory: the buffers are not memory any more, since their owner truncated the file behind them.
	ErrMemory = errors.New("the shared memory is gone")
	// ErrAborted: Abort ended the call.
	ErrAborted = errors.New("given up")
)

// ioErr makes an error of a system call on the driver's buffers.
func ioErr(err error) error {
	if err == unix.EFAULT {
		return ErrMemory
	}
	return err
}

// total returns the sum of the buffers' lengths in bytes.
func total(bufs []unix.Iovec) (n uint64) {
	for i := range bufs {
		n += uint64(bufs[i].Len)
	}
	return n
}

// advance takes n bytes off the front of the buffers.
func advance(bufs []unix.Iovec, n uint64) []unix.Iovec {
	for len(bufs) > 0 && n >= uint64(bufs[0].Len) {
		n -= uint64(bufs[0].Len)
		bufs = bufs[1:]
	}
	if n > 0 {
		rest := uint64(bufs[0].Len) - n
		bufs[0].Base = at(bufs[0].Base, n)
		bufs[0].SetLen(int(rest))
	}
	return bufs
}
