package block

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/virtio"
)

// Op is what a request does.
type Op uint8

// The operations. A write that is completed may be in a cache that is not stable, until a Flush that was submitted after it
// completed has completed.
const (
	Read Op = iota
	Write
	Flush
	Discard     // the content of the range may become anything, or zeros
	WriteZeroes // the range reads as zeros then
	GetID       // the serial number
)

var opNames = [...]string{Read: "read", Write: "write", Flush: "flush", Discard: "discard", WriteZeroes: "write zeroes", GetID: "get id"}

// String returns the name of the operation.
func (o Op) String() string {
	if int(o) < len(opNames) {
		return opNames[o]
	}
	return fmt.Sprintf("op(%d)", uint8(o))
}

// ranged tells whether the operation has a range of the disk.
func (o Op) ranged() bool { return o == Read || o == Write || o == Discard || o == WriteZeroes }

// modifies tells whether the operation changes the disk.
func (o Op) modifies() bool { return o == Write || o == Discard || o == WriteZeroes }

// Errors of requests; errors.Is finds the number of the system in each.
var (
	ErrIO          = fmt.Errorf("the host's disk reports an I/O error: %w", unix.EIO)
	ErrUnsupported = fmt.Errorf("the host's disk does not support the request: %w", unix.EOPNOTSUPP)
	ErrReadOnly    = fmt.Errorf("the disk is read-only: %w", unix.EPERM)
	ErrRange       = fmt.Errorf("the range ends behind the end of the disk: %w", unix.ENOSPC)
	ErrAlign       = fmt.Errorf("offset and length have to be multiples of %d: %w", virtio.BlkSector, unix.EINVAL)
	ErrCanceled    = fmt.Errorf("the request was given up before the host had it: %w", unix.ECANCELED)
	ErrClosed      = fmt.Errorf("the disk's driver has ended: %w", unix.ESHUTDOWN)
)

// Errors of a queue, after which the device is reset and all requests that it has not answered are sent again.
var (
	// ErrStatus: the device returned a request whose status byte it did not write, or wrote a value that is none.
	ErrStatus = errors.New("the host returns a request without a valid status")
	// ErrShort: the device returned a read as done with other than all of its bytes.
	ErrShort = errors.New("the host returns a read with missing bytes")
)

// Owner is told of the end of requests. Its methods are called on goroutines of the Disk, or from within Submit and Cancel, and do not
// block. They may call Submit.
type Owner interface {
	// Done tells that r has ended, with r.Err; r and its data belong to the owner again.
	Done(r *Request)
	// Flush follows upon some calls of Done, when there are no more at this moment, but not upon those from within Submit and Cancel.
	Flush()
}

// Request is one request to a disk. It belongs to the Disk from Submit until Done.
type Request struct {
	Op     Op
	Unmap  bool   // of WriteZeroes: the disk may unmap the range
	Offset uint64 // bytes
	Length uint64 // bytes; of Read and Write that of Data
	// Data is what is written, or where to read to; of GetID it has virtio.BlkIDLen bytes.
	Data  []byte
	Owner Owner
	Tag   interface{} // the owner's own
	// Err is why the request failed; nil if it did not.
	Err error

	seq        uint64
	left       uint64     // units that have not ended: see units
	blockers   int        // earlier requests that overlap and have not ended
	blocks     []*Request // later ones that wait for this one
	prev, next *Request   // in Disk.live
	dropped    bool       // the owner has given it up
}

// units returns how much there is to do: bytes of the range, or 1.
func (r *Request) units() uint64 {
	if r.Op.ranged() {
		return r.Length
	}
	return 1
}

// overlaps tells whether the order of r and o matters.
func (r *Request) overlaps(o *Request) bool {
	return (r.Op.modifies() || o.Op.modifies()) && r.Op.ranged() && o.Op.ranged() && r.Offset < o.Offset+o.Length && o.Offset < r.Offset+r.Length
}

// check refuses a request that no disk could take.
func (r *Request) check() error {
	switch {
	case r.Op > GetID:
		return ErrUnsupported
	case r.Op == GetID && len(r.Data) != virtio.BlkIDLen:
		return unix.EINVAL
	case !r.Op.ranged():
		return nil
	case (r.Op == Read || r.Op == Write) && uint64(len(r.Data)) != r.Length:
		return unix.EINVAL
	case (r.Offset|r.Length)%virtio.BlkSector != 0:
		return ErrAlign
	case r.Offset+r.Length < r.Offset:
		return ErrRange
	}
	return nil
}

// extent is a part of a request that is to be sent: n units from unit off on.
type extent struct {
	r      *Request
	off, n uint64
}

// work is the queue of what is to be sent.
type work struct {
	list []extent
	head int
}

func (w *work) len() int { return len(w.list) - w.head }

func (w *work) first() *extent { return &w.list[w.head] }

func (w *work) push(e extent) { w.list = append(w.list, e) }

// pop removes the first one.
func (w *work) pop() {
	w.list[w.head] = extent{}
	w.head++
	switch {
	case w.head == len(w.list):
		w.list, w.head = w.list[:0], 0
	case w.head >= 64 && w.head >= len(w.list)/2:
		n := copy(w.list, w.list[w.head:])
		for i := n; i < len(w.list); i++ {
			w.list[i] = extent{}
		}
		w.list, w.head = w.list[:n], 0
	}
}

// putBack puts es before all others.
func (w *work) putBack(es []extent) {
	w.list = append(es, w.list[w.head:]...)
	w.head = 0
}

// remove takes out what drop says.
func (w *work) remove(drop func(e *extent) bool) {
	var keep []extent
	for i := w.head; i < len(w.list); i++ {
		if !drop(&w.list[i]) {
			keep = append(keep, w.list[i])
		}
	}
	w.list, w.head = keep, 0
}
