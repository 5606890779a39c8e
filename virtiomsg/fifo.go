package virtiomsg

import (
	"fmt"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
)

// A FIFO (docs/wire.md, "FIFOs") takes a page: the layout of the virtio-msg AMP bus' queue, with
// indices that run freely and never pass 2^32-1.
const (
	// SlotSize is the size of a slot, and of the largest message, in bytes.
	SlotSize = 64
	// MaxSlots is how many slots fit in the page of a FIFO.
	MaxSlots = (PageSize - fifoSlots) / SlotSize

	fifoHead  = 0  // written by the producer
	fifoTail  = 64 // written by the consumer
	fifoSlots = 128
)

// Slot is a message as it travels. Bytes behind the message's size are zero.
type Slot [SlotSize]byte

// fifo is what both ends know.
type fifo struct {
	name  string
	w     words
	off   uint64 // of the page in the window
	slots uint32
	own   uint32 // our index; never read back
	seen  uint32 // the peer's index when it was last looked at
}

func (f *fifo) slot(index uint32) uint64 {
	return f.off + fifoSlots + uint64(index%f.slots)*SlotSize
}

// makeFIFO describes a FIFO in window whose placement has been checked.
func makeFIFO(name string, window dma.Region, off uint64, slots uint32) fifo {
	return fifo{name: name, w: newWords(window), off: off, slots: slots}
}

func checkFIFO(window dma.Region, off uint64, slots uint32) error {
	if off%PageSize != 0 || off > window.Mem.Size() || window.Mem.Size()-off < PageSize {
		return fmt.Errorf("virtiomsg: FIFO at offset %#x does not lie in a window of %#x bytes, or is not aligned to %#x", off, window.Mem.Size(), PageSize)
	}
	if slots == 0 || slots > MaxSlots {
		return fmt.Errorf("virtiomsg: a FIFO of %d slots: 1 to %d fit a page", slots, MaxSlots)
	}
	return nil
}

// Producer is the sending end of a FIFO.
type Producer struct{ f fifo }

// NewProducer returns the sending end of the FIFO at offset off of window, which begins empty once
// Reset has been called and the consumer has done the same. It fails where the FIFO does not
// fit the window.
func NewProducer(name string, window dma.Region, off uint64, slots uint32) (*Producer, error) {
	if err := checkFIFO(window, off, slots); err != nil {
		return nil, err
	}
	return &Producer{makeFIFO(name, window, off, slots)}, nil
}

// Reset begins again at index 0.
func (p *Producer) Reset() {
	p.f.own, p.f.seen = 0, 0
	p.f.w.store32(p.f.off+fifoHead, 0)
}

// Room tells whether there is room for a message. The error is a *FIFOError, as Put's.
func (p *Producer) Room() (bool, error) {
	f := &p.f
	if f.own-f.seen < f.slots {
		return true, nil
	}
	// Only a FIFO that looks full costs a read.
	tail := f.w.load32(f.off + fifoTail)
	if tail < f.seen || tail > f.own {
		return false, &FIFOError{FIFO: f.name, Index: "tail", Value: tail, Low: f.seen, High: f.own}
	}
	f.seen = tail
	return f.own-f.seen < f.slots, nil
}

// Put appends a message. The caller rings the peer. Errors: ErrFIFOFull; a *FIFOError where the
// consumer's index is impossible, which stays so until Reset; ErrFIFOSpent.
func (p *Producer) Put(s *Slot) error {
	f := &p.f
	if ok, err := p.Room(); err != nil {
		return err
	} else if !ok {
		return ErrFIFOFull
	}
	if f.own == ^uint32(0) {
		// Indices do not wrap: 2^32 is not a multiple of 62, and a reset to 0 must never look
		// like progress. The link starts again instead.
		return ErrFIFOSpent
	}
	f.w.storeSlot(f.slot(f.own), s)
	f.own++
	// The slot's data before the index: Publish32 holds the write barrier (pairs with the
	// consumer's Consume32).
	f.w.store32(f.off+fifoHead, f.own)
	return nil
}

// Consumer is the receiving end of a FIFO.
type Consumer struct{ f fifo }

// NewConsumer returns the receiving end of the FIFO at offset off of window.
func NewConsumer(name string, window dma.Region, off uint64, slots uint32) (*Consumer, error) {
	if err := checkFIFO(window, off, slots); err != nil {
		return nil, err
	}
	return &Consumer{makeFIFO(name, window, off, slots)}, nil
}

// Reset begins again at index 0.
func (c *Consumer) Reset() {
	c.f.own, c.f.seen = 0, 0
	c.f.w.store32(c.f.off+fifoTail, 0)
}

// Get takes the next message into s and tells whether there was one. A *FIFOError means that the
// producer's index is impossible, which stays so until Reset.
func (c *Consumer) Get(s *Slot) (bool, error) {
	ok, err := c.Peek(s)
	if ok {
		c.Take()
	}
	return ok, err
}

// Peek copies the next message into s without taking it, and tells whether there is one. Errors: as
// Get's.
func (c *Consumer) Peek(s *Slot) (bool, error) {
	f := &c.f
	if f.own == f.seen {
		head := f.w.load32(f.off + fifoHead)
		if head < f.seen || head-f.own > f.slots {
			high := f.own + f.slots
			if high < f.own {
				high = ^uint32(0)
			}
			return false, &FIFOError{FIFO: f.name, Index: "head", Value: head, Low: f.seen, High: high}
		}
		f.seen = head
		if f.own == head {
			return false, nil
		}
	}
	f.w.loadSlot(f.slot(f.own), s)
	return true, nil
}

// Take gives the slot that Peek has read back to the producer.
func (c *Consumer) Take() {
	f := &c.f
	f.own++
	// The slot has been read before the producer may fill it again.
	f.w.mem.Barrier(mmio.FullBarrier)
	f.w.store32(f.off+fifoTail, f.own)
}
