package virtiomsg

import (
	"fmt"
	"sync/atomic"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
)

// DefaultLostTicks is how many ticks a peer's heartbeat may stand still.
const DefaultLostTicks = 10

// LinkConfig describes one side of a link.
type LinkConfig struct {
	// Window is the whole window, mapped until Poll has returned EventStopped or the Link is
	// no longer used. Its account, where it lies across the bus, counts ControlReads and
	// ControlWrites.
	Window dma.Region
	Side   board.Side
	// Self is what this side declares. Major, Minor and, if 0, WindowSize are filled in.
	Self Declaration
	// PeerDead tells that the peer's process is known to be dead and that none of its writes
	// is under way any more; nil where that cannot be known. It is asked on ticks and while
	// stopping.
	PeerDead func() bool
	// LostTicks is how many ticks the peer's heartbeat may stand still; 0 means DefaultLostTicks.
	LostTicks int
	// CanRing tells what is wrong with the way in which the peer wants to be rung, on this kind of
	// board; the peer's block is refused then. nil: every method is taken.
	CanRing func(board.RingInfo) error
	// Rand returns a random number; nil means getrandom(2). It is asked at each Start.
	Rand func() (uint32, error)
}

type phase uint8

const (
	phaseIdle      phase = iota // before Start, after EventStopped
	phaseDown                   // shaking hands
	phaseUp                     // the caller's loops may run
	phaseQuiescing              // waiting for Quiesced
	phaseStopping               // the loops are stopped; waiting for the peer to let go
)

// Link is one side of the handshake, with its ends of the two FIFOs. It has no goroutine and
// no clock: its owner calls Poll whenever it is rung (vector 0), and with tick set at regular
// intervals, until Poll returns EventNone; and rings the peer where NeedRing says so. All
// methods but Stats belong to one goroutine.
//
// The rule that everything rests on: a side's echo of an epoch E promises that this side, and
// all its earlier incarnations, no longer touch memory that was shown to it before E, and
// that their writes have landed. docs/wire.md has the argument.
type Link struct {
	stats LinkStats // first: 64-bit alignment

	w         words
	window    dma.Region
	side      board.Side
	own, peer uint64 // offsets of the blocks
	self      Declaration
	image     block // self, as it is written
	peerDead  func() bool
	canRing   func(board.RingInfo) error
	random    func() (uint32, error)
	lostTicks int

	phase      phase
	epoch      uint32 // own
	echo       uint32 // what own echo word holds
	beat       uint32
	stopping   bool // phaseQuiescing goes to phaseStopping
	released   bool // the peer has let go of everything shown before epoch
	gone       bool
	broken     Reason // to leave for, with the next Poll
	look       bool
	hold       bool // new epochs of the peer are left unanswered
	looks      int  // wiped was asked so often since the whole block was compared
	republish  bool // own block must be written anew
	ring       bool
	reason     Reason
	peerEpoch  uint32 // whose block is in decl; 0: none
	badEpoch   uint32 // whose block was refused
	peerStops  bool
	decl       Declaration
	err        error
	peerBeat   uint32
	stillTicks int
	tx         Producer
	rx         Consumer
}

// NewLink checks the configuration. Nothing is written before Start.
func NewLink(c LinkConfig) (*Link, error) {
	if c.Window.Mem.Size() < PageSize {
		return nil, fmt.Errorf("virtiomsg: a window of %#x bytes cannot hold a link page", c.Window.Mem.Size())
	}
	l := &Link{w: newWords(c.Window), window: c.Window, side: c.Side, peerDead: c.PeerDead, canRing: c.CanRing,
		random: c.Rand, lostTicks: c.LostTicks, own: blockOff(c.Side), peer: blockOff(c.Side.Other())}
	if l.lostTicks <= 0 {
		l.lostTicks = DefaultLostTicks
	}
	if l.random == nil {
		l.random = getrandom
	}
	if err := l.declare(c.Self); err != nil {
		return nil, err
	}
	return l, nil
}

func (l *Link) declare(d Declaration) error {
	d.Major, d.Minor = Major, Minor
	if d.WindowSize == 0 {
		d.WindowSize = l.window.Mem.Size()
	}
	if d.WindowSize > l.window.Mem.Size() {
		return pageErr(l.side, ErrWindowSize, "window size", d.WindowSize, "only %#x bytes are mapped", l.window.Mem.Size())
	}
	if err := d.Check(l.side, d.WindowSize); err != nil {
		return err
	}
	d.Regions = append([]Region(nil), d.Regions...)
	d.Pool = append([]PoolRegion(nil), d.Pool...)
	l.self, l.image = d, encodeBlock(l.side, &d)
	return nil
}

// Start shows this side to the peer. The caller is the only live process of its side (it holds the
// lock, or the VFIO group); no DMA of an earlier one is under way, and what an earlier agent wrote to
// the pool has landed. It fails with
// ErrState where the link was started already, and where no random number can be had.
func (l *Link) Start() error {
	if l.phase != phaseIdle {
		return ErrState
	}
	seed, err := l.random()
	if err != nil {
		return err
	}
	// Not what an earlier incarnation shows, in case of a poor random source.
	l.epoch = seed
	if l.epoch == l.w.load32(l.own+offEpoch) {
		l.epoch++
	}
	l.beat = l.w.load32(l.own+offBeat) + 1
	l.phase = phaseDown
	l.reason = ReasonNone
	l.err = nil
	l.stopping, l.gone, l.republish, l.broken = false, false, false, ReasonNone
	l.forget()
	l.publish()
	return nil
}

// forget drops what is known of the peer: its block will be read again.
func (l *Link) forget() {
	l.peerEpoch, l.badEpoch, l.peerStops, l.released = 0, 0, false, false
	l.decl = Declaration{}
}

// leave takes the link down, from phaseUp.
func (l *Link) leave(r Reason) {
	atomic.AddUint64(&l.stats.Downs[r], 1)
	l.phase = phaseQuiescing
	l.reason = r
	l.broken = ReasonNone
	l.forget()
	l.newEpoch()
}

// markGone notes that the window has vanished, and returns the error the first time.
func (l *Link) markGone() error {
	if l.gone {
		return nil
	}
	l.gone = true
	l.forget()
	l.err = ErrLinkGone
	return ErrLinkGone
}

// Quiesced answers EventQuiesce: nothing of this side, no goroutine, no system call under way, no
// DMA channel, touches the peer's or shared memory any more, and all its writes have
// landed. Writes to the window are in order with the echo that follows; whoever wrote to
// other memory across the bus (placement push) has read back from there before.
func (l *Link) Quiesced() error {
	if l.phase != phaseQuiescing {
		return ErrState
	}
	l.w.mem.Barrier(mmio.FullBarrier)
	l.phase = phaseDown
	if l.stopping {
		l.phase = phaseStopping
	}
	return nil
}

// Stop begins to leave cleanly: the peer is told and asked to let go of this side's memory. The
// caller's loops are stopped, as for Quiesced. Poll returns EventStopped when the
// peer has let go or is known to be dead; the caller limits the time that it waits (for an agent
// there may be no host to answer), and may as well just go. It fails with ErrState where the link is not started or
// stops already.
func (l *Link) Stop() error {
	switch l.phase {
	case phaseIdle, phaseStopping:
		return ErrState
	case phaseUp:
		l.stopping = true
		l.leave(ReasonReset)
	default:
		l.stopping = true
		l.forget()
		l.newEpoch()
	}
	l.w.mem.Barrier(mmio.FullBarrier)
	l.phase = phaseStopping
	return nil
}

// Reset takes the link down and shakes hands anew, for a caller whose peer misbehaves in its
// messages or does not answer. It returns true where the link was up: the caller then stops its
// loops and calls Quiesced, as after EventQuiesce.
func (l *Link) Reset() bool {
	if l.phase != phaseUp {
		return false
	}
	l.leave(ReasonReset)
	return true
}

// Fault notes that an access to the window failed by a bus error (the owner recovered from the
// fault): the same as reading all-ones. It returns as Reset does. Nothing is written to the
// window.
func (l *Link) Fault() bool {
	l.markGone()
	if l.phase != phaseUp {
		return false
	}
	atomic.AddUint64(&l.stats.Downs[ReasonGone], 1)
	l.phase = phaseQuiescing
	l.reason = ReasonGone
	l.broken = ReasonNone
	l.republish = true // with a new epoch, when the window is back
	return true
}

// Hold lets a link that is not up leave new epochs of the peer unanswered, and not come up, until it
// is called with false: the owner has had enough of them for now. The heartbeat goes on. A link that
// is up, or is being left, is not concerned.
func (l *Link) Hold(on bool) { l.hold = on }

// Look lets the next Poll ask PeerDead: the board's Events told that a peer came or went.
func (l *Link) Look() { l.look = true }

// Up tells whether messages may be sent.
func (l *Link) Up() bool { return l.phase == phaseUp }

// Epoch returns this side's epoch.
func (l *Link) Epoch() uint32 { return l.epoch }

// PeerEpoch returns the peer's epoch that was last looked at and found good; 0 if there is none.
func (l *Link) PeerEpoch() uint32 { return l.peerEpoch }

// Peer returns what the peer declares, and false where it is not known: before EventPeer, and
// after EventQuiesce. The slices are never written again.
func (l *Link) Peer() (Declaration, bool) { return l.decl, l.peerEpoch != 0 }

// Reason tells why the link was last taken down.
func (l *Link) Reason() Reason { return l.reason }

// NeedRing tells, once, that the peer should be rung (its vector 0): there is something new in the
// link page or a FIFO.
func (l *Link) NeedRing() bool {
	r := l.ring
	l.ring = false
	return r
}

// Stats returns a copy of the counters. Any goroutine may call it.
func (l *Link) Stats() LinkStats {
	s := &l.stats
	c := LinkStats{Ups: atomic.LoadUint64(&s.Ups), Ticks: atomic.LoadUint64(&s.Ticks),
		PageErrors: atomic.LoadUint64(&s.PageErrors), FIFOErrors: atomic.LoadUint64(&s.FIFOErrors),
		Sent: atomic.LoadUint64(&s.Sent), Received: atomic.LoadUint64(&s.Received),
		Full: atomic.LoadUint64(&s.Full), Wiped: atomic.LoadUint64(&s.Wiped)}
	for i := range s.Downs {
		c.Downs[i] = atomic.LoadUint64(&s.Downs[i])
	}
	return c
}
