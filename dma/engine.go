package dma

import (
	"errors"
	"fmt"
)

// What an Engine, or a Mover, has to say of a copy. Errors of engines are *TransferError as a rule.
var (
	// ErrEngineClosed is returned by a closed Engine or Mover.
	ErrEngineClosed = errors.New("dma: engine is closed")
	// ErrBadCopy: the destination of a copy is shorter than its source; submit no such.
	ErrBadCopy = errors.New("destination shorter than source")
	// ErrUnreachable: an address lies where the engine cannot go, or may not. It was not
	// programmed.
	ErrUnreachable = errors.New("outside the engine's reach")
	// ErrLimits: an address or the length is not aligned as the engine needs it, or the length is
	// above its limit (Caps).
	ErrLimits = errors.New("not within the engine's limits")
	// ErrTransfer: the hardware reports that the transfer failed.
	ErrTransfer = errors.New("transfer failed")
	// ErrChained: the transfer belonged to a chain in which another one failed; whether it took
	// place is not known.
	ErrChained = errors.New("another transfer of the chain failed")
	// ErrAborted: the transfer was aborted.
	ErrAborted = errors.New("transfer aborted")
	// ErrRunaway: the hardware could not be stopped, so memory that it was given may still be
	// read and written: neither reuse nor unmap it before bus mastering is off or the board is reset.
	ErrRunaway = errors.New("engine cannot be stopped: turn its bus mastering off, or reset the board, before its memory is used again")
	// ErrTimeout: a transfer did not end in time.
	ErrTimeout = errors.New("transfer did not end in time")
)

// TransferError tells what happened to which transfer.
type TransferError struct {
	Engine   string // its name, with the channel
	Dst, Src Addr
	Len      uint32 // in bytes
	Status   uint64 // the hardware's status word, 0 where none was read
	Reason   error  // one of this package's errors
}

// Error names the engine, the transfer, the reason and the status.
func (e *TransferError) Error() string {
	s := fmt.Sprintf("dma: %s: %d bytes at %#x to %#x: %v", e.Engine, e.Len, uint64(e.Src), uint64(e.Dst), e.Reason)
	if e.Status != 0 {
		s += fmt.Sprintf(" (status %#x)", e.Status)
	}
	return s
}

// Unwrap returns the reason.
func (e *TransferError) Unwrap() error { return e.Reason }

// Copy is one operation of an Engine: all of Src to the start of Dst, which must be at
// least as long. Tag is the submitter's and comes back in the Completion.
type Copy struct {
	Dst, Src Span
	Tag      uint64
}

// Completion tells that a Copy has ended. With an error, any part of the destination may
// have been written, and nothing else.
type Completion struct {
	Tag uint64
	Err error
}

// Caps are the limits of an Engine. They do not change.
type Caps struct {
	// Name for messages and tables: "cpu", "fsl".
	Name string
	// AlignDst, AlignSrc and AlignLen are what both addresses (as the engine sees them; link
	// addresses agree in the low bits) and the length must be multiples of: powers of two, 1 where any will do.
	AlignDst, AlignSrc, AlignLen uint32
	// MaxLen is the largest length of one Copy in bytes.
	MaxLen uint32
	// Depth is the number of copies that may be submitted and not yet polled.
	Depth int
	// Channels is how many copies the hardware works on at a time; 0 for the processor.
	Channels int
}

// EngineWaiter is the end of an engine's interrupt. The waiters of packages doorbell and pci have its
// method set.
type EngineWaiter interface {
	// FD polls readable when the interrupt came. It stays open as long as the Engine.
	FD() int
	// Ack takes the pending interrupts and returns their number. It does not block.
	Ack() (uint64, error)
}

// Engine moves payload: the processor here, a scatter/gather DMA controller elsewhere. It is
// asynchronous: spans belong to the engine from Submit until their completion is
// polled. One goroutine at a time may use an Engine.
//
// Copies under way at the same time must not overlap: neither a destination with anything else. They
// end in any order where the engine has several channels.
//
// Completion of a DMA transfer is taken by the side where the data lands, or that side reads across
// once: what an engine wrote is behind it on the bus, and a status word on the other side
// of the bus can say "done" before the data is there; the answer to a read across cannot overtake it. So an
// engine whose status registers lie across the bus needs no more (reading them is that read), one that is
// told by an interrupt reads its status before it reports, and data that landed on the
// far side is announced there by a write that goes the same way.
type Engine interface {
	// Caps returns the engine's limits.
	Caps() Caps
	// Submit starts the copies of batch in order and returns how many were accepted:
	// fewer than all where the engine is full; then Poll and submit the rest. An
	// error tells that the copy behind the accepted ones is refused for good
	// (ErrBadCopy, ErrUnreachable, ErrLimits), or ErrEngineClosed, or ErrRunaway. Nothing of a refused copy
	// was programmed. The batch itself is the caller's again on return.
	Submit(batch []Copy) (int, error)
	// Poll writes completions to done and returns how many. It never blocks. What a completed copy
	// wrote to memory on this side of the bus is visible to loads that follow; what it wrote on the other
	// is there before anything that this side writes across the bus after Poll.
	Poll(done []Completion) int
	// Waiter is the engine's interrupt, nil where it has none or does not use it. An interrupt
	// that is lost, or shared, is no harm: Poll tells the truth.
	Waiter() EngineWaiter
	// Abort stops all that is under way and returns when the hardware no longer touches any
	// span: each copy then completes, with ErrAborted unless it had ended by itself. The engine can be used
	// again. ErrRunaway: it could not be stopped; the copies complete, with ErrAborted, and the engine takes no more.
	Abort() error
	// Close aborts what is under way and waits until the hardware no longer touches any
	// span. Completions not polled are lost. It fails as Abort does. A second Close does nothing.
	Close() error
}

// cpuEngine copies at Submit.
type cpuEngine struct {
	done       []Completion // a ring
	head, tail uint64       // tail-head completions wait
	closed     bool
}

// NewCPUEngine returns an Engine in which the processor copies, at Submit. depth is the
// number of completions that may wait for Poll, at least 1. It completes in the order of submission.
func NewCPUEngine(depth int) Engine {
	if depth < 1 {
		depth = 1
	}
	return &cpuEngine{done: make([]Completion, depth)}
}

func (e *cpuEngine) Caps() Caps {
	return Caps{Name: "cpu", AlignDst: 1, AlignSrc: 1, AlignLen: 1, MaxLen: 1<<32 - 1, Depth: len(e.done)}
}

func (e *cpuEngine) Submit(batch []Copy) (int, error) {
	if e.closed {
		return 0, ErrEngineClosed
	}
	for i := range batch {
		if e.tail-e.head == uint64(len(e.done)) {
			return i, nil
		}
		c := &batch[i]
		if c.Dst.Len < c.Src.Len {
			return i, BadCopy(c)
		}
		CopySpan(c.Dst, c.Src)
		e.done[e.tail%uint64(len(e.done))] = Completion{Tag: c.Tag}
		e.tail++
	}
	return len(batch), nil
}

func (e *cpuEngine) Poll(done []Completion) int {
	n := 0
	for ; n < len(done) && e.head != e.tail; n++ {
		done[n] = e.done[e.head%uint64(len(e.done))]
		e.head++
	}
	return n
}

func (e *cpuEngine) Waiter() EngineWaiter { return nil }

func (e *cpuEngine) Abort() error { return nil }

func (e *cpuEngine) Close() error {
	e.closed = true
	e.head = e.tail
	return nil
}

// BadCopy is the error of engines for a copy whose destination is shorter than its source.
func BadCopy(c *Copy) error {
	return fmt.Errorf("dma: copy with tag %d: %d bytes at %#x to %d bytes at %#x: %w", c.Tag, c.Src.Len, uint64(c.Src.Addr()), c.Dst.Len, uint64(c.Dst.Addr()), ErrBadCopy)
}
