package vring

import (
	"errors"
	"fmt"

	"github.com/boardlink/boardlink/dma"
)

// What the driver did wrong, found by the device side. Each breaks the queue.
var (
	// ErrIndexJump: the available index claims more chains in flight than the queue has
	// descriptors, or went back.
	ErrIndexJump = errors.New("available index jumps")
	// ErrHeadRange: an available ring entry is no descriptor of the queue.
	ErrHeadRange = errors.New("head out of range")
	// ErrNextRange: a descriptor's next is no descriptor of the queue.
	ErrNextRange = errors.New("next out of range")
	// ErrLoop: a chain loops, or has more descriptors than the queue, or the chains of
	// one batch have together.
	ErrLoop = errors.New("chain loops or is longer than the queue")
	// ErrIndirectNotNegotiated: an indirect descriptor without VIRTIO_F_INDIRECT_DESC.
	ErrIndirectNotNegotiated = errors.New("indirect descriptor, not negotiated")
	// ErrIndirectLen: an indirect table of no bytes, of no multiple of 16, or of
	// more descriptors than the queue.
	ErrIndirectLen = errors.New("bad length of indirect table")
	// ErrIndirectNested: an indirect descriptor inside an indirect table.
	ErrIndirectNested = errors.New("indirect descriptor inside an indirect table")
	// ErrIndirectNext: INDIRECT and NEXT in one descriptor (virtio 1.2, 2.7.5.3.1 forbids it;
	// some devices follow or ignore the NEXT, this one refuses).
	ErrIndirectNext = errors.New("indirect descriptor with a next")
	// ErrIndirectNextRange: a next inside an indirect table points outside it.
	ErrIndirectNextRange = errors.New("next outside the indirect table")
	// ErrIDRange: the buffer id of a packed descriptor is not below the queue size.
	ErrIDRange = errors.New("buffer id out of range")
	// ErrIDInFlight: a packed descriptor carries the buffer id of a buffer in flight.
	ErrIDInFlight = errors.New("buffer id is in flight")
	// ErrUnavailable: the list of a packed descriptor runs into one that is not available.
	ErrUnavailable = errors.New("list runs into a descriptor that is not available")
	// ErrRestamp: a packed descriptor is made available that the device has not used.
	ErrRestamp = errors.New("descriptor made available again before it was used")
	// ErrOrder: a descriptor to read behind one to write (2.7.4.2).
	ErrOrder = errors.New("readable descriptor behind a writable one")
	// ErrZeroLength: a buffer of no bytes.
	ErrZeroLength = errors.New("buffer of zero length")
	// ErrOverflow: a buffer passes the end of the address space.
	ErrOverflow = errors.New("buffer passes the end of the address space")
	// ErrTranslate: a buffer or an indirect table lies outside the regions, or where the
	// device has no such right, or in too many pieces; the cause is a *dma.TranslateError.
	ErrTranslate = errors.New("buffer is not in the regions")
	// ErrSpans: a chain touches more pieces of regions than can be counted (65535).
	ErrSpans = errors.New("chain in too many pieces")
	// ErrTotal: the buffers of a chain add up to more than 4 GiB - 1 (2.7.5.2).
	ErrTotal = errors.New("chain of more than 4 GiB")
)

// What the device did wrong, found by the driver side. Each breaks the queue.
var (
	// ErrUsedJump: the used index moved further than there are chains in flight, or back.
	ErrUsedJump = errors.New("used index jumps")
	// ErrUsedID: a used element names no head in flight.
	ErrUsedID = errors.New("used element of a chain that is not in flight")
	// ErrUsedOrder: a used element names a chain that is not yet due (VIRTIO_F_IN_ORDER): the used
	// index does not reach to it.
	ErrUsedOrder = errors.New("used element of a chain that is not due")
	// ErrUsedLen: a used element claims more bytes than the chain had writable.
	ErrUsedLen = errors.New("used length above the writable length")
)

// What the owner of the queue did wrong. None breaks the queue.
var (
	// ErrRequest: a request without a buffer, or Readable outside its buffers.
	ErrRequest = errors.New("request without buffers")
	// ErrTooLong: a request of more buffers than the queue can ever take.
	ErrTooLong = errors.New("request longer than the queue")
	// ErrComplete: a chain that cannot be completed: not popped, or no such ID.
	ErrComplete = errors.New("completes a chain that was not popped")
	// ErrConfig: the queue cannot be made as described.
	ErrConfig = errors.New("bad queue")
	// ErrState: the state cannot be that of this queue.
	ErrState = errors.New("bad queue state")
)

// Error is what went wrong on a queue. errors.Is finds Code and, in what Err wraps, the
// cause. Fields that Code has no use for are zero.
type Error struct {
	Queue string // Config.Name
	Code  error  // one of the Err values of this package
	Index uint16 // the ring index where it was found, or the index that jumped
	Head  uint16 // the head of the chain
	Desc  uint16 // the descriptor, in the ring or in the indirect table
	Value uint64 // what is out of range: an id, a next, a distance, a length
	Limit uint64 // what it may be at most
	Addr  dma.Addr
	Len   uint32
	Err   error // the cause, where there is one
}

// A state of another kind of queue.
var (
	errPackedState = errors.New("the state of a packed queue, this one is split")
	errSplitState  = errors.New("the state of a split queue, this one is packed")
)

// configError is err as the *Error of a queue that cannot be made.
func configError(c *Config, err error) error {
	code := ErrConfig
	if err == errPackedState || err == errSplitState {
		code = ErrState
	}
	return &Error{Queue: c.Name, Code: code, Err: err}
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Is tells whether target is the Code.
func (e *Error) Is(target error) bool { return target == e.Code }

// Error names the queue, what is wrong with which index, descriptor, address and length,
// and what to do.
func (e *Error) Error() string {
	s := fmt.Sprintf("vring: %s: %v", e.Queue, e.Code)
	remedy := ""
	switch e.Code {
	case ErrIndexJump, ErrUsedJump:
		s += fmt.Sprintf(": to %d, %d chains in flight of at most %d", e.Index, e.Value, e.Limit)
		remedy = "reset the device"
	case ErrHeadRange:
		s += fmt.Sprintf(": entry %d holds %d of at most %d", e.Index, e.Value, e.Limit)
		remedy = "reset the device"
	case ErrIDRange, ErrIDInFlight:
		s += fmt.Sprintf(": descriptor %d holds id %d of at most %d", e.Desc, e.Value, e.Limit)
		remedy = "reset the device"
	case ErrUnavailable, ErrRestamp:
		s += fmt.Sprintf(": list at %d, descriptor %d", e.Index, e.Desc)
		remedy = "reset the device"
	case ErrUsedOrder:
		s += fmt.Sprintf(": element %d of chain %d, which is not among the next %d", e.Index, e.Head, e.Value)
		remedy = "reset the device"
	case ErrUsedID:
		s += fmt.Sprintf(": element %d holds id %d", e.Index, e.Value)
		remedy = "reset the device"
	case ErrUsedLen:
		s += fmt.Sprintf(": element %d of chain %d has length %d of at most %d", e.Index, e.Head, e.Value, e.Limit)
		remedy = "reset the device"
	case ErrNextRange, ErrIndirectNextRange, ErrLoop, ErrSpans, ErrTotal:
		s += fmt.Sprintf(": chain %d, descriptor %d: %d of at most %d", e.Head, e.Desc, e.Value, e.Limit)
		remedy = "reset the device"
	case ErrIndirectNotNegotiated, ErrIndirectLen, ErrIndirectNested, ErrIndirectNext, ErrOrder, ErrZeroLength, ErrOverflow, ErrTranslate:
		s += fmt.Sprintf(": chain %d, descriptor %d: address %#x, length %d", e.Head, e.Desc, uint64(e.Addr), e.Len)
		remedy = "reset the device"
	case ErrTooLong, ErrComplete:
		s += fmt.Sprintf(": %d of at most %d", e.Value, e.Limit)
	}
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	if remedy != "" {
		s += " (" + remedy + ")"
	}
	return s
}
