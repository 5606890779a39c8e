package engine

import (
	"errors"
	"fmt"

	"github.com/boardlink/boardlink/dma"
)

// Item is a transfer as a channel takes it.
type Item struct {
	Src, Dst uint64 // bus addresses
	Len      uint32 // in bytes, not 0
	Flow     Flow   // the one direction that it has
}

// Flow is a set of directions.
type Flow uint8

// The directions, by the sides where source and destination lie.
const (
	NearToNear Flow = 1 << iota
	NearToFar       // a board's engine writes host memory
	FarToNear       // a board's engine reads host memory
	FarToFar
)

// AnyFlow is all directions.
const AnyFlow = NearToNear | NearToFar | FarToNear | FarToFar

func flow(from, to Side) Flow { return NearToNear << (uint(from)<<1 | uint(to)) }

// State is what a channel is doing.
type State uint8

// The states.
const (
	Running State = iota
	Ended         // the whole chain was transferred
	Failed        // the hardware reports an error; it has stopped
)

// Channel is one channel of an engine's hardware. It works on one chain at a time.
type Channel interface {
	// Start programs and starts the chain of items, at most as many as CoreConfig.Chain says. The
	// channel is idle. An error tells that it was not started.
	Start(items []Item) error
	// State looks at the chain that was started. Once it returned Ended or Failed, the hardware no longer
	// touches the memory, interrupt causes are cleared, and the channel is idle. status is the hardware's word. What was transferred to this side of
	// the bus is visible to loads that follow (the register read came back behind it; a read barrier keeps
	// the loads behind the read).
	State() (state State, status uint64)
	// Stop ends the chain, whatever its state. After it the channel is idle. The error matches dma.ErrRunaway where the
	// hardware does not stop.
	Stop() error
	// Flows tells the directions that the channel can take.
	Flows() Flow
}

// CoreConfig describes an engine to Core.
type CoreConfig struct {
	Name     string
	Channels []Channel
	Map      *Map
	// AlignDst, AlignSrc, AlignLen and MaxLen are as in dma.Caps; 0 is 1, and for MaxLen no limit.
	AlignDst, AlignSrc, AlignLen, MaxLen uint32
	// Chain is the number of items in one chain, at least 1.
	Chain int
	// Depth is the number of copies that one channel may hold, those waiting behind its chain included; 0 is
	// twice Chain.
	Depth int
	// Waiter is the end of the engine's interrupt; nil polls.
	Waiter dma.EngineWaiter
	// OnClose, if set, ends Close, when all channels are stopped.
	OnClose func() error
	// Unchecked sends link addresses that no window has to the hardware as they are. It is
	// for tests that show what an IOMMU does then.
	Unchecked bool
}

// Core makes a dma.Engine of channels.
type Core struct {
	c     CoreConfig
	caps  dma.Caps
	chans []lane
	next  int // channel that is asked first
	err   error
	shut  bool
}

var _ dma.Engine = (*Core)(nil)

// lane is a channel and its queue: slots head..ended wait for Poll, ended..running are the chain, the
// rest waits behind it. All indices run freely.
type lane struct {
	ch                         Channel
	flows                      Flow
	q                          []entry
	mask                       uint32
	head, ended, running, tail uint32
	items                      []Item
}

type entry struct {
	item     Item
	tag      uint64
	dst, src dma.Addr
	err      error
}

// NewCore returns an engine. It fails where the configuration is not valid.
func NewCore(c CoreConfig) (*Core, error) {
	if len(c.Channels) == 0 || c.Map == nil || c.Chain < 1 {
		return nil, fmt.Errorf("engine: %s: needs channels, a map, and chains of one item at least", c.Name)
	}
	for _, a := range []*uint32{&c.AlignDst, &c.AlignSrc, &c.AlignLen} {
		if *a == 0 {
			*a = 1
		}
		if *a&(*a-1) != 0 || *a > lowBits+1 {
			return nil, fmt.Errorf("engine: %s: alignment %d is not a power of two up to %d", c.Name, *a, lowBits+1)
		}
	}
	if c.MaxLen == 0 {
		c.MaxLen = 1<<32 - 1
	}
	if c.Depth < c.Chain {
		c.Depth = 2 * c.Chain
	}
	n := uint32(1)
	for n < uint32(c.Depth) {
		n *= 2
	}
	e := &Core{c: c, chans: make([]lane, len(c.Channels))}
	for i := range e.chans {
		e.chans[i] = lane{ch: c.Channels[i], flows: c.Channels[i].Flows(), q: make([]entry, n), mask: n - 1, items: make([]Item, 0, c.Chain)}
	}
	e.caps = dma.Caps{Name: c.Name, AlignDst: c.AlignDst, AlignSrc: c.AlignSrc, AlignLen: c.AlignLen, MaxLen: c.MaxLen,
		Depth: int(n) * len(e.chans), Channels: len(e.chans)}
	return e, nil
}

// Caps implements dma.Engine.
func (e *Core) Caps() dma.Caps { return e.caps }

// Waiter implements dma.Engine.
func (e *Core) Waiter() dma.EngineWaiter { return e.c.Waiter }

// Submit implements dma.Engine.
func (e *Core) Submit(batch []dma.Copy) (int, error) {
	if e.shut {
		return 0, dma.ErrEngineClosed
	}
	if e.err != nil {
		return 0, e.err
	}
	n, err := 0, error(nil)
	for ; n < len(batch); n++ {
		var room bool
		if room, err = e.take(&batch[n]); !room || err != nil {
			break
		}
	}
	for i := range e.chans {
		e.start(&e.chans[i])
	}
	return n, err
}

// take queues one copy; false where there is no room.
func (e *Core) take(c *dma.Copy) (bool, error) {
	n := c.Src.Len
	if c.Dst.Len < n {
		return false, dma.BadCopy(c)
	}
	da, sa := c.Dst.Addr(), c.Src.Addr()
	if (uint32(da)&(e.caps.AlignDst-1))|(uint32(sa)&(e.caps.AlignSrc-1))|(n&(e.caps.AlignLen-1)) != 0 || n > e.caps.MaxLen || n == 0 {
		return false, e.fail(da, sa, n, 0, dma.ErrLimits)
	}
	dst, to, ok1 := e.c.Map.Find(da, n, dma.DeviceWrite)
	src, from, ok2 := e.c.Map.Find(sa, n, dma.DeviceRead)
	if !ok1 || !ok2 {
		if !e.c.Unchecked {
			return false, e.fail(da, sa, n, 0, dma.ErrUnreachable)
		}
		if !ok1 {
			dst, to = uint64(da), Far
		}
		if !ok2 {
			src, from = uint64(sa), Far
		}
	}
	f := flow(from, to)
	best, able := (*lane)(nil), false
	for i := range e.chans {
		// From the next one on, so that equal queues take turns.
		l := &e.chans[(e.next+i)%len(e.chans)]
		if l.flows&f == 0 {
			continue
		}
		able = true
		if used := l.tail - l.head; used <= l.mask && (best == nil || used < best.tail-best.head) {
			best = l
		}
	}
	if !able {
		return false, e.fail(da, sa, n, 0, dma.ErrUnreachable)
	}
	if best == nil {
		return false, nil
	}
	e.next++
	if e.next == len(e.chans) {
		e.next = 0
	}
	best.q[best.tail&best.mask] = entry{item: Item{Src: src, Dst: dst, Len: n, Flow: f}, tag: c.Tag, dst: da, src: sa}
	best.tail++
	return true, nil
}

func (e *Core) fail(dst, src dma.Addr, n uint32, status uint64, why error) error {
	return &dma.TransferError{Engine: e.c.Name, Dst: dst, Src: src, Len: n, Status: status, Reason: why}
}

// start gives an idle channel what waits.
func (e *Core) start(l *lane) {
	for l.running == l.ended && l.running != l.tail {
		l.items = l.items[:0]
		for i := l.running; i != l.tail && len(l.items) < e.c.Chain; i++ {
			l.items = append(l.items, l.q[i&l.mask].item)
		}
		err := l.ch.Start(l.items)
		l.running += uint32(len(l.items))
		if err == nil {
			return
		}
		e.end(l, err, 0)
	}
}

// end marks the chain of l as ended. Which item of a failed chain failed is not known: the first has the
// reason, so that it is one failure.
func (e *Core) end(l *lane, why error, status uint64) {
	for reason := why; l.ended != l.running; l.ended++ {
		t := &l.q[l.ended&l.mask]
		if t.err = nil; why != nil {
			t.err = e.fail(t.dst, t.src, t.item.Len, status, reason)
		}
		if why != nil && !errors.Is(why, dma.ErrAborted) {
			reason = dma.ErrChained
		}
	}
}

// Poll implements dma.Engine.
func (e *Core) Poll(done []dma.Completion) int {
	n := 0
	for i := range e.chans {
		l := &e.chans[i]
		if l.ended != l.running {
			switch state, status := l.ch.State(); state {
			case Ended:
				e.end(l, nil, 0)
			case Failed:
				e.end(l, dma.ErrTransfer, status)
			}
			if l.ended == l.running && !e.shut && e.err == nil {
				e.start(l)
			}
		}
		for ; l.head != l.ended && n < len(done); n++ {
			t := &l.q[l.head&l.mask]
			done[n] = dma.Completion{Tag: t.tag, Err: t.err}
			t.err = nil
			l.head++
		}
	}
	return n
}

// Abort implements dma.Engine.
func (e *Core) Abort() error {
	for i := range e.chans {
		l := &e.chans[i]
		if l.ended != l.running {
			if state, _ := l.ch.State(); state == Ended {
				e.end(l, nil, 0)
			} else if err := l.ch.Stop(); err != nil && e.err == nil {
				e.err = err
			}
		}
		l.running = l.tail
		e.end(l, dma.ErrAborted, 0)
	}
	return e.err
}

// Close implements dma.Engine.
func (e *Core) Close() error {
	if e.shut {
		return nil
	}
	e.shut = true
	err := e.Abort()
	if e.c.OnClose != nil {
		if cerr := e.c.OnClose(); err == nil {
			err = cerr
		}
	}
	return err
}
