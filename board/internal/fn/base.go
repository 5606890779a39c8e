package fn

import (
	"fmt"
	"sync"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/pci"
)

// Base is a board made of parts, for kinds whose ends are rung by their own doorbells (board.RingBoard).
// It implements board.Pooled and board.Vanishing.
type Base struct {
	Spec string
	Fn   pci.Function // nil at the agent
	Win  dma.Region
	Host dma.Region // the pool; Mem is zero where there is none
	// Waiters are this side's vectors; none: it polls.
	Waiters []doorbell.Waiter
	// Rings makes what rings vector v of the peer, v < PeerVectors; nil where it cannot be rung.
	Rings       func(v uint32) (doorbell.Ringer, error)
	PeerVectors uint32
	// EventC and GoneF are Events and Gone; either may be nil.
	EventC <-chan struct{}
	GoneF  func() error

	closers []func() error
	once    sync.Once
	err     error
}

var (
	_ board.Pooled    = (*Base)(nil)
	_ board.Vanishing = (*Base)(nil)
	_ board.Counting  = (*Base)(nil)
)

// OnClose adds what Close does, the last one first.
func (b *Base) OnClose(f func() error) { b.closers = append(b.closers, f) }

// String returns the board's spec.
func (b *Base) String() string { return b.Spec }

// Function returns the PCI function, nil at the agent.
func (b *Base) Function() pci.Function { return b.Fn }

// Window implements board.Board.
func (b *Base) Window() dma.Region { return b.Win }

// Pool implements board.Pooled.
func (b *Base) Pool() (dma.Region, bool) { return b.Host, b.Host.Mem.Size() != 0 }

// Self implements board.Board: ring method 3, or 0 where this side polls.
func (b *Base) Self() board.RingInfo {
	if len(b.Waiters) == 0 {
		return board.RingInfo{Method: board.RingNone}
	}
	return board.RingInfo{Method: board.RingBoard, Vectors: uint32(len(b.Waiters))}
}

// Waiter implements board.Board.
func (b *Base) Waiter(v uint32) doorbell.Waiter {
	if uint64(v) >= uint64(len(b.Waiters)) {
		return doorbell.None
	}
	return b.Waiters[v]
}

// Ringer implements board.Board.
func (b *Base) Ringer(info board.RingInfo, v uint32) (doorbell.Ringer, error) {
	switch {
	case info.Method == board.RingNone || (info.Method == board.RingBoard && b.Rings == nil):
		return board.Silent, nil
	case info.Method != board.RingBoard:
		return nil, fmt.Errorf("%s: the peer is rung by method %d; this kind of board knows %d (its own doorbell) only: is the other end of the same kind?",
			b.Spec, info.Method, board.RingBoard)
	case info.Vectors > b.PeerVectors:
		return nil, fmt.Errorf("%s: the peer declares %d vectors, its doorbell has %d", b.Spec, info.Vectors, b.PeerVectors)
	case v >= info.Vectors:
		return nil, fmt.Errorf("%s: vector %d of a peer that has %d", b.Spec, v, info.Vectors)
	}
	return b.Rings(v)
}

// PeerDead is false: registers do not tell.
func (b *Base) PeerDead() bool { return false }

// Events implements board.Board.
func (b *Base) Events() <-chan struct{} { return b.EventC }

// Gone implements board.Vanishing.
func (b *Base) Gone() error {
	if b.GoneF == nil {
		return nil
	}
	return b.GoneF()
}

// Counters implements board.Counting.
func (b *Base) Counters() map[string]uint64 { return Counters(b.Fn) }

// Close takes everything apart, the last part first. The error is the first one.
func (b *Base) Close() error {
	b.once.Do(func() {
		for i := len(b.closers) - 1; i >= 0; i-- {
			if err := b.closers[i](); err != nil && b.err == nil {
				b.err = err
			}
		}
	})
	return b.err
}
