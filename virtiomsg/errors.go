package virtiomsg

import (
	"errors"
	"fmt"

	"github.com/boardlink/boardlink/board"
)

// What can be wrong with a link page. A *PageError wraps one of them.
var (
	ErrMagic       = errors.New("no link page")
	ErrVersion     = errors.New("link page of another major version")
	ErrSide        = errors.New("block written by the wrong side")
	ErrBlockLength = errors.New("bad block length")
	ErrWindowSize  = errors.New("window sizes do not match")
	ErrAlign       = errors.New("misaligned")
	ErrOutside     = errors.New("outside the window")
	ErrOverlap     = errors.New("overlap")
	ErrCount       = errors.New("bad count")
	ErrAccess      = errors.New("bad access flags")
	ErrRing        = errors.New("bad doorbell description")
)

// What can happen to a link.
var (
	// ErrLinkGone: the window reads as all-ones; the device behind it has vanished or is in
	// reset. The link stays down until the window reads sensibly again.
	ErrLinkGone = errors.New("the window reads as all-ones: the device has vanished or is in reset")
	// ErrDown: the link is not up; no message can be sent or received.
	ErrDown = errors.New("the link is not up")
	// ErrFIFO: the peer moved an index of a FIFO where it cannot be. The link resets itself.
	ErrFIFO = errors.New("the peer moved a FIFO index out of bounds")
	// ErrFIFOFull: the peer has not taken the earlier messages yet; send again later.
	ErrFIFOFull = errors.New("the FIFO is full")
	// ErrFIFOSpent: 2^32-1 messages were sent since Reset; begin anew (a Link does by itself).
	ErrFIFOSpent = errors.New("the FIFO's indices are used up")
	// ErrState: a method of Link was called in a state that does not allow it.
	ErrState = errors.New("not possible in the link's state")
)

// What can be wrong with a message. A *MessageError wraps one of them.
var (
	ErrSize     = errors.New("bad message size")
	ErrType     = errors.New("bad message type")
	ErrReserved = errors.New("reserved bits are not zero")
	ErrToken    = errors.New("bad token")
	ErrBounds   = errors.New("length or index out of bounds")
)

// ErrTooMany: as many requests as Requests can hold wait for their answer.
var ErrTooMany = errors.New("too many requests are waiting for an answer")

// PageError tells what is wrong with one side's block of the link page.
type PageError struct {
	Side  board.Side // whose block
	Field string     // as docs/wire.md names it
	Value uint64     // what it holds
	Why   string     // the bound that it breaks, and what to do
	Err   error      // one of the values above
}

// Error names the block, the field, its value and the bound.
func (e *PageError) Error() string {
	return fmt.Sprintf("link page, %s block, %s = %#x: %v: %s", e.Side, e.Field, e.Value, e.Err, e.Why)
}

// Unwrap returns the kind of error.
func (e *PageError) Unwrap() error { return e.Err }

// MessageError tells what is wrong with a message.
type MessageError struct {
	Header Header
	Field  string
	Value  uint64
	Err    error
}

// Error names the message, the field and its value.
func (e *MessageError) Error() string {
	return fmt.Sprintf("%s: %s = %#x: %v", e.Header, e.Field, e.Value, e.Err)
}

// Unwrap returns the kind of error.
func (e *MessageError) Unwrap() error { return e.Err }

// FIFOError tells which index of which FIFO is impossible. It wraps ErrFIFO.
type FIFOError struct {
	FIFO  string // "agent to host" or "host to agent"
	Index string // "head" or "tail"
	Value uint32 // what the peer wrote
	Low   uint32 // what it could have been,
	High  uint32 // at least and at most
}

// Error names the FIFO, the index and its bounds.
func (e *FIFOError) Error() string {
	return fmt.Sprintf("FIFO %s: the peer's %s is %#x, not within %#x to %#x: the link is reset", e.FIFO, e.Index, e.Value, e.Low, e.High)
}

// Unwrap returns ErrFIFO.
func (e *FIFOError) Unwrap() error { return ErrFIFO }
