package dma

import (
	"errors"
	"fmt"
)

var (
	// ErrEngineClosed is returned by a closed Engine.
	ErrEngineClosed = errors.New("dma: engine is closed")
	// ErrBadCopy: the destination of a copy is shorter than its source; submit no such.
	ErrBadCopy = errors.New("destination shorter than source")
)

// Copy is one operation of an Engine: all of Src to the start of Dst, which must be at
// least as long. Tag is the submitter's and comes back in the Completion.
type Copy struct {
	Dst, Src Span
	Tag      uint64
}

// Completion tells that a Copy has ended. With an error, any part of the destination may
// have been written.
type Completion struct {
	Tag uint64
	Err error
}

// Engine moves payload: the processor here, a scatter/gather DMA controller elsewhere. It is
// asynchronous: spans belong to the engine from Submit until their completion is
// polled. One goroutine at a time may use an Engine.
type Engine interface {
	// Submit starts the copies of batch in order and returns how many were accepted:
	// fewer than all where the engine is full; then Poll and submit the rest. An
	// error tells that the copy behind the accepted ones is refused for good
	// (ErrBadCopy), or ErrEngineClosed. The batch itself is the caller's again on return.
	Submit(batch []Copy) (int, error)
	// Poll writes completions to done, in the order of submission, and returns how
	// many. It never blocks. What a completed copy wrote to local memory is
	// visible to loads that follow; what it wrote across the bus may still be
	// under way: the side where the data lands takes the completion, or
	// the poller reads across once.
	Poll(done []Completion) int
	// Close aborts what is under way and waits until the hardware no longer touches any
	// span. Completions not polled are lost.
	Close() error
}

// cpuEngine copies at Submit.
type cpuEngine struct {
	done       []Completion // a ring
	head, tail uint64       // tail-head completions wait
	closed     bool
}

// NewCPUEngine returns an Engine in which the processor copies, at Submit. depth is the
// number of completions that may wait for Poll, at least 1.
func NewCPUEngine(depth int) Engine {
	if depth < 1 {
		depth = 1
	}
	return &cpuEngine{done: make([]Completion, depth)}
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
			return i, badCopy(c)
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

func (e *cpuEngine) Close() error {
	e.closed = true
	e.head = e.tail
	return nil
}

func badCopy(c *Copy) error {
	return fmt.Errorf("dma: copy with tag %d: %d bytes at %#x to %d bytes at %#x: %w", c.Tag, c.Src.Len, uint64(c.Src.Addr()), c.Dst.Len, uint64(c.Dst.Addr()), ErrBadCopy)
}
