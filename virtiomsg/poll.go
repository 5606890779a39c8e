package virtiomsg

import (
	"sync/atomic"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/mmio"
)

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
	// The agent's index words lie in memory that an earlier host process may have used otherwise: they
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
