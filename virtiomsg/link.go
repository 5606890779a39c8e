package virtiomsg

import (
	"encoding/binary"
	"fmt"
	"sync/atomic"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
	"golang.org/x/sys/unix"
)

// Event is what Poll tells its caller to do.
type Event uint8

const (
	// EventNone: nothing; wait to be rung or for the next tick.
	EventNone Event = iota
	// EventPeer: the peer's block has been read and is good. Peer tells how to ring it.
	EventPeer
	// EventUp: both sides have let go of everything that was before, and messages may be sent.
	// The agent may now rewrite all memory that it shows. (The host's pool is the agent's to
	// fill: the agent may have come up, and begun, before the host.)
	EventUp
	// EventQuiesce: the link is no longer up, Reason tells why. The caller stops whatever
	// touches the peer's or shared memory, makes sure that its writes across the bus have
	// landed (see Quiesced), and calls Quiesced. It does not rewrite memory that it has shown
	// until the next EventUp.
	EventQuiesce
	// EventStopped: after Stop, the peer has let go. Regions and pool may be unmapped and freed.
	// (Link page and FIFOs stay set apart for the link: a host that is just starting may still
	// write its words there.)
	EventStopped
)

// String names the event.
func (e Event) String() string {
	switch e {
	case EventNone:
		return "none"
	case EventPeer:
		return "peer"
	case EventUp:
		return "up"
	case EventQuiesce:
		return "quiesce"
	case EventStopped:
		return "stopped"
	}
	return fmt.Sprintf("event(%d)", uint8(e))
}

// Reason is why a link is no longer up.
type Reason uint8

const (
	// ReasonNone: it has not been up yet.
	ReasonNone Reason = iota
	// ReasonRestarted: the peer shows another epoch: a new process, or it has reset the link.
	ReasonRestarted
	// ReasonLeft: the peer stops cleanly.
	ReasonLeft
	// ReasonLost: the peer's heartbeat has stood still for too long.
	ReasonLost
	// ReasonDead: the peer's process is known to be dead.
	ReasonDead
	// ReasonGone: the window reads as all-ones.
	ReasonGone
	// ReasonBroken: the peer moved a FIFO index out of bounds.
	ReasonBroken
	// ReasonReset: Reset, Redeclare or Stop was called on this side.
	ReasonReset
	// ReasonWiped: somebody else changed this side's block of the link page.
	ReasonWiped

	reasons = int(ReasonWiped) + 1
)

// String says it in a few words.
func (r Reason) String() string {
	switch r {
	case ReasonNone:
		return "not up yet"
	case ReasonRestarted:
		return "peer restarted"
	case ReasonLeft:
		return "peer left"
	case ReasonLost:
		return "no heartbeat"
	case ReasonDead:
		return "peer dead"
	case ReasonGone:
		return "window gone"
	case ReasonBroken:
		return "peer broke a FIFO"
	case ReasonReset:
		return "reset by this side"
	case ReasonWiped:
		return "link page wiped"
	}
	return fmt.Sprintf("reason(%d)", uint8(r))
}

// LinkStats counts what happened to a link. The fields are updated with sync/atomic.
type LinkStats struct {
	Ups        uint64          // handshakes completed
	Downs      [reasons]uint64 // EventQuiesce, by Reason
	Ticks      uint64
	PageErrors uint64 // blocks of the peer that were refused
	FIFOErrors uint64 // impossible indices
	Sent       uint64 // messages
	Received   uint64
	Full       uint64 // Send found the FIFO full
	Wiped      uint64 // own block found changed by somebody else and written again
}

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

func getrandom() (uint32, error) {
	var b [4]byte
	for {
		n, err := unix.Getrandom(b[:], 0)
		if err == nil && n == len(b) {
			return binary.LittleEndian.Uint32(b[:]), nil
		}
		if err != nil && err != unix.EINTR {
			return 0, fmt.Errorf("virtiomsg: getrandom: %v", err)
		}
	}
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

// nextEpoch picks an epoch that was not used since Start, that the peer does not echo, and that
// is neither 0 nor all-ones.
func (l *Link) nextEpoch() {
	stale := l.w.load32(l.peer + offEcho)
	for {
		l.epoch += 0x9e3779b9 // odd: comes back after 2^32 steps
		if l.epoch != 0 && l.epoch != allOnes && l.epoch != stale {
			return
		}
	}
}

// publish writes the whole own block with a new epoch. No loop of this side runs: the epoch is 0
// for a while, which says just that.
func (l *Link) publish() {
	l.republish = false
	l.setEcho(0)
	l.w.store32(l.own+offEpoch, 0)
	l.image.write(&l.w, l.side)
	l.w.store32(l.own+offBeat, l.beat)
	l.newEpoch()
}

// newEpoch shows a new epoch with no echo. The order is what the peer relies on: whoever reads the
// new epoch and then an echo reads one that was given under the new epoch; and finds the
// state that belongs to it.
func (l *Link) newEpoch() {
	l.setEcho(0)
	l.nextEpoch()
	state := uint32(StateStarting)
	if l.stopping {
		state = StateStopping
	}
	l.w.store32(l.own+offState, state)
	l.w.store32(l.own+offEpoch, l.epoch)
	l.released = false
	l.ring = true
}

func (l *Link) setEcho(v uint32) {
	l.w.store32(l.own+offEcho, v)
	l.echo = v
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

// Poll moves the link on. tick is set once for each interval of the owner's clock; the heartbeat
// counts ticks. The owner calls it again (without tick) until the event is EventNone.
//
// An error is news about the peer and comes once: a *PageError for a block that is refused until its
// epoch changes, ErrLinkGone. The link goes on all the same.
func (l *Link) Poll(tick bool) (Event, error) {
	if l.phase == phaseIdle {
		return EventNone, nil
	}
	if tick {
		l.beat++
		l.w.store32(l.own+offBeat, l.beat)
		atomic.AddUint64(&l.stats.Ticks, 1)
	}
	check := tick || l.look
	l.look = false

	if l.phase == phaseUp {
		return l.pollUp(tick, check)
	}
	if l.phase == phaseQuiescing {
		return EventNone, nil
	}

	epoch, echo := l.w.load64(l.peer + offEpoch)
	if epoch == allOnes || echo == allOnes {
		// Neither word ever holds this value.
		if l.window.Across {
			return EventNone, l.markGone()
		}
		epoch = 0 // our own memory, that nobody has written yet
	}
	l.gone = false // what it left of our own block is looked at with the peer's next epoch
	if l.republish {
		l.publish()
	}
	if tick && l.wiped() {
		// The peer may be waiting for what stood there.
		l.rewrite()
	}
	if l.hold && l.phase == phaseDown {
		return EventNone, nil
	}
	if epoch == 0 {
		l.peerEpoch, l.badEpoch = 0, 0
		if l.side == board.Host && l.phase == phaseStopping && !l.released && l.w.load32(l.peer+offMagic) == Magic {
			// By its own word the agent touches nothing. (Without the magic it is no word, but
			// memory that was cleared.) A host's word would not be enough: one that is starting
			// may have index words under way to where an earlier agent had its FIFOs.
			l.released = true
		}
		return l.pollStopping(check), nil
	}
	if epoch != l.peerEpoch {
		return l.adopt(epoch, check)
	}
	if echo == l.epoch {
		// An earlier Poll has read this epoch of the peer, which clears its echo before it shows
		// a new epoch: so this echo was not given under an earlier one.
		l.released = true
		return l.pollReleased(), nil
	}
	return l.pollStopping(check), nil
}

func (l *Link) pollUp(tick, check bool) (Event, error) {
	epoch := l.w.load32(l.peer + offEpoch)
	if epoch != l.peerEpoch {
		if epoch == allOnes && l.window.Across {
			l.leave(ReasonGone)
			return EventQuiesce, l.markGone()
		}
		switch l.w.load32(l.peer + offState) {
		case StateStopping, StateStopped:
			l.leave(ReasonLeft)
		default:
			l.leave(ReasonRestarted)
		}
		return EventQuiesce, nil
	}
	if l.broken != ReasonNone {
		l.leave(l.broken)
		return EventQuiesce, nil
	}
	if tick {
		beat, state := l.w.load64(l.peer + offBeat)
		if beat != l.peerBeat {
			l.peerBeat, l.stillTicks = beat, 0
		} else if l.stillTicks++; l.stillTicks >= l.lostTicks {
			l.leave(ReasonLost)
			return EventQuiesce, nil
		}
		// A peer that is not up with this side may be waiting for what stood in its block.
		if state != StateRunning && l.wiped() {
			atomic.AddUint64(&l.stats.Wiped, 1)
			l.leave(ReasonWiped)
			l.republish = true
			return EventQuiesce, nil
		}
	}
	if check && l.peerDead != nil && l.peerDead() {
		l.leave(ReasonDead)
		return EventQuiesce, nil
	}
	return EventNone, nil
}

// adopt takes notice of a new epoch of the peer. This side's loops are stopped.
func (l *Link) adopt(epoch uint32, check bool) (Event, error) {
	if epoch == l.badEpoch {
		return l.pollStopping(check), nil
	}
	l.peerEpoch = 0
	d, err := readStatics(&l.w, l.side.Other())
	state := l.w.load32(l.peer + offState)
	if l.w.load32(l.peer+offEpoch) != epoch {
		return l.pollStopping(check), nil // being rewritten: the next Poll looks again
	}
	if err == nil {
		err = l.checkPeer(&d)
	}
	// A reset of the board, or whatever spoilt the peer's block, may have taken our own with it. The
	// peer cannot know before ours is good again, so a page that is refused is an occasion to look, too.
	if !l.stands() {
		l.rewrite()
	}
	if err != nil {
		l.badEpoch, l.err = epoch, err
		atomic.AddUint64(&l.stats.PageErrors, 1)
		return EventNone, err
	}
	l.err = nil
	l.peerEpoch, l.badEpoch, l.decl = epoch, 0, d
	l.peerStops = state == StateStopping
	l.ring = true // now that it is known how
	agent := &l.self
	if l.side == board.Host {
		agent = &l.decl
	}
	a2h := makeFIFO("agent to host", l.window, agent.FIFOAgentToHost, agent.SlotsAgentToHost)
	h2a := makeFIFO("host to agent", l.window, agent.FIFOHostToAgent, agent.SlotsHostToAgent)
	if l.side == board.Host {
		l.tx, l.rx = Producer{h2a}, Consumer{a2h}
		// The host answers at once. The agent may still run its loops on what it showed before,
		// but these words are the host's, and it looks at our new epoch before it
		// complains of them.
		l.answer()
	} else {
		l.tx, l.rx = Producer{a2h}, Consumer{h2a}
	}
	return EventPeer, nil
}

// stands tells whether the own block is in the window as this side wrote it.
func (l *Link) stands() bool {
	e, o := l.w.load64(l.own + offEpoch)
	return e == l.epoch && o == l.echo && l.image.stands(&l.w, l.side)
}

// wholeCheck is how many ticks pass between two comparisons of the whole own block, while one of the
// sides is not up.
const wholeCheck = 10

// wiped tells, on a tick of a link that one side at least is not up on, whether somebody else changed the own block. Each
// tick looks at three words, which no wiping of the block leaves as they were: magic comes first
// whenever the block is written. Each tenth tick looks at all of it.
func (l *Link) wiped() bool {
	if l.looks++; l.looks >= wholeCheck {
		l.looks = 0
		return !l.stands()
	}
	if e, o := l.w.load64(l.own + offEpoch); e != l.epoch || o != l.echo {
		return true
	}
	return l.w.load32(l.own+offMagic) != Magic
}

// rewrite publishes the own block, which was changed by somebody else, with a new epoch. The peer's
// epoch is to be answered once more.
func (l *Link) rewrite() {
	atomic.AddUint64(&l.stats.Wiped, 1)
	l.peerEpoch, l.badEpoch = 0, 0
	l.publish()
}

// answer resets the index words of this side and echoes the peer's epoch.
func (l *Link) answer() {
	l.tx.Reset()
	l.rx.Reset()
	// All that this side ever did, loops included, before the promise.
	l.w.mem.Barrier(mmio.FullBarrier)
	l.setEcho(l.peerEpoch)
	l.ring = true
}

func (l *Link) checkPeer(d *Declaration) error {
	agent, host := &l.self, d
	if l.side == board.Host {
		agent, host = d, &l.self
	}
	if err := d.Check(l.side.Other(), l.self.WindowSize); err != nil {
		return err
	}
	if err := checkPair(agent, host); err != nil || l.canRing == nil {
		return err
	}
	if err := l.canRing(d.Ring); err != nil {
		return pageErr(l.side.Other(), ErrRing, "ring method", uint64(d.Ring.Method), "%v", err)
	}
	return nil
}

// pollReleased goes on when the peer has echoed our epoch.
func (l *Link) pollReleased() Event {
	if l.phase == phaseStopping {
		return l.pollStopping(false)
	}
	// The agent's index words lie in memory that a host of before may have used otherwise: they
	// are not touched before the host's echo.
	if l.side == board.Agent && l.echo != l.peerEpoch {
		l.answer()
	}
	if l.peerStops {
		return EventNone
	}
	l.phase = phaseUp
	l.peerBeat, l.stillTicks = l.w.load32(l.peer+offBeat), 0
	l.w.store32(l.own+offState, StateRunning)
	atomic.AddUint64(&l.stats.Ups, 1)
	return EventUp
}

// pollStopping ends a clean stop where the peer has let go.
func (l *Link) pollStopping(check bool) Event {
	if !l.released && l.peerDead != nil && (check || l.phase == phaseStopping) && l.peerDead() {
		l.released = true
	}
	if l.phase != phaseStopping || !l.released {
		return EventNone
	}
	l.setEcho(0)
	l.w.store32(l.own+offState, StateStopped)
	l.w.store32(l.own+offEpoch, 0)
	l.phase = phaseIdle
	l.stopping = false
	l.ring = true
	return EventStopped
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

// Redeclare changes what this side declares, from the next handshake on, and starts that: how to
// ring it, when the board was connected anew; its memory. It returns as Reset does. The error is
// a *PageError: nothing has changed then.
func (l *Link) Redeclare(d Declaration) (wasUp bool, err error) {
	if l.phase == phaseStopping {
		return false, ErrState
	}
	if err := l.declare(d); err != nil {
		return false, err
	}
	if l.phase == phaseIdle {
		return false, nil
	}
	l.republish = true
	wasUp = l.Reset()
	if !wasUp {
		l.forget()
	}
	return wasUp, nil
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

// Released tells whether the peer has let go of all memory that this side has shown before its
// present epoch: while up, and from some time on after it.
func (l *Link) Released() bool { return l.released }

// Side returns whose side it is.
func (l *Link) Side() board.Side { return l.side }

// Epoch returns this side's epoch.
func (l *Link) Epoch() uint32 { return l.epoch }

// PeerEpoch returns the peer's epoch that was last looked at and found good; 0 if there is none.
func (l *Link) PeerEpoch() uint32 { return l.peerEpoch }

// Peer returns what the peer declares, and false where it is not known: before EventPeer, and
// after EventQuiesce. The slices are never written again.
func (l *Link) Peer() (Declaration, bool) { return l.decl, l.peerEpoch != 0 }

// Self returns what this side declares.
func (l *Link) Self() Declaration { return l.self }

// Reason tells why the link was last taken down.
func (l *Link) Reason() Reason { return l.reason }

// Err returns what is wrong with the peer at present: a *PageError, ErrLinkGone or nil.
func (l *Link) Err() error { return l.err }

// NeedRing tells, once, that the peer should be rung (its vector 0): there is something new in the
// link page or a FIFO.
func (l *Link) NeedRing() bool {
	r := l.ring
	l.ring = false
	return r
}

// Send puts a message into the FIFO. Errors: ErrDown, ErrFIFOFull, a *FIFOError (the next
// Poll takes the link down).
func (l *Link) Send(s *Slot) error {
	if l.phase != phaseUp || l.broken != ReasonNone {
		return ErrDown
	}
	switch err := l.tx.Put(s); err {
	case nil:
	case ErrFIFOFull:
		atomic.AddUint64(&l.stats.Full, 1)
		return err
	case ErrFIFOSpent:
		l.broken = ReasonReset
		return ErrDown
	default:
		return l.fifoError(err)
	}
	atomic.AddUint64(&l.stats.Sent, 1)
	l.ring = true
	return nil
}

// Room tells whether the FIFO to the peer has room for a message. Errors: as Send's, but for
// ErrFIFOFull.
func (l *Link) Room() (bool, error) {
	if l.phase != phaseUp || l.broken != ReasonNone {
		return false, ErrDown
	}
	ok, err := l.tx.Room()
	if err != nil {
		return false, l.fifoError(err)
	}
	return ok, nil
}

// Peek copies the oldest message that the peer has sent, without taking it, and tells whether there
// is one. Whoever has looked at the copy uses that one, and calls Take: the peer may have written to
// the slot since. Errors: as Recv's.
func (l *Link) Peek(s *Slot) (bool, error) {
	if l.phase != phaseUp || l.broken != ReasonNone {
		return false, ErrDown
	}
	ok, err := l.rx.Peek(s)
	if err != nil {
		return false, l.fifoError(err)
	}
	if ok && l.window.Across && l.w.load32(l.peer+offEpoch) != l.peerEpoch {
		// A reset of the board may have run into the slot while it was read.
		return false, ErrDown
	}
	return ok, nil
}

// Take gives the slot of the message that Peek has returned back to the peer.
func (l *Link) Take() {
	if l.phase != phaseUp || l.broken != ReasonNone {
		return
	}
	l.rx.Take()
	atomic.AddUint64(&l.stats.Received, 1)
	// The producer may be waiting for room: the head that was read before cannot tell, it may have
	// filled the FIFO since.
	l.ring = true
}

// Recv takes a message, and tells whether there was one. Errors: ErrDown, a *FIFOError (the
// next Poll takes the link down).
func (l *Link) Recv(s *Slot) (bool, error) {
	ok, err := l.Peek(s)
	if ok {
		l.Take()
	}
	return ok, err
}

// fifoError judges an impossible index: a peer that starts anew resets its index words after it
// has shown its new epoch.
func (l *Link) fifoError(err error) error {
	if l.w.load32(l.peer+offEpoch) != l.peerEpoch {
		return ErrDown // Poll will tell
	}
	l.broken = ReasonBroken
	atomic.AddUint64(&l.stats.FIFOErrors, 1)
	return err
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
