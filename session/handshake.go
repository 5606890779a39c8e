package session

import (
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/virtiomsg"
)

// poll moves the handshake on.
func (s *Session) poll(tick bool) {
	if !s.due.After(time.Now()) {
		s.due = time.Time{}
	}
	switch s.at() {
	case Listening, Handshake, Up:
	case Held:
		if !s.heldTill.After(time.Now()) {
			s.heldTill, s.tries = time.Time{}, 0
			s.link.Hold(false)
			s.settle()
		}
	case Quiescing, Stuck:
		// The heartbeat goes on while the owner lets go. A handshake does not begin meanwhile, and a board that is
		// lost is left alone.
		if s.gone || s.link == nil || !s.link.Up() && !s.owes {
			return
		}
	case Leaving:
		s.pollLeaving(tick)
		return
	default:
		return
	}
	for n := 0; n < batch; n++ {
		ev, err := s.link.Poll(tick)
		tick = false
		if err != nil {
			s.fail(err)
			s.cfg.Log.Warn("the other side's link page is refused", "link", s.cfg.Name, "error", err)
			s.tried()
		}
		switch ev {
		case virtiomsg.EventNone:
			s.settle()
			s.epoch()
			s.ring()
			return
		case virtiomsg.EventPeer:
			d, _ := s.link.Peer()
			s.mu.Lock()
			s.peer = d
			s.mu.Unlock()
			if s.ctl, err = s.ringer(d.Ring); err != nil {
				s.ctl = nil
				s.cfg.Log.Warn("the other side cannot be rung, it has to poll", "link", s.cfg.Name, "error", err)
			}
			s.transition(Handshake, "")
			s.tried()
		case virtiomsg.EventUp:
			s.up()
		case virtiomsg.EventQuiesce:
			s.owes = true
			s.quiesce()
		}
	}
	s.again()
}

// settle shows whether the peer is known, where the link is not up.
func (s *Session) settle() {
	if !s.in(Listening, Handshake, Held) || !s.heldTill.IsZero() {
		return
	}
	_, known := s.link.Peer()
	switch {
	case known:
		s.transition(Handshake, "")
	case !s.in(Listening): // else it says why
		s.transition(Listening, "")
	}
}

// up begins to be up.
func (s *Session) up() {
	s.transition(Up, "")
	s.upDue, s.tickDue, s.taken = true, true, 0
	s.tries, s.ended, s.told, s.sure, s.redo = 0, false, false, false, false
	s.requests.Reset()
	s.fail(nil)
	s.epoch()
	s.cfg.Log.Info("link up", "link", s.cfg.Name, "epoch", fmt.Sprintf("0x%08x", s.link.Epoch()), "peer_epoch", fmt.Sprintf("0x%08x", s.link.PeerEpoch()))
}

// quiesce has the owner let go of shared memory: the link is no longer up, the board is lost, or Run is to end.
func (s *Session) quiesce() {
	s.upDue = false
	s.deferred, s.peeked = nil, false
	s.failCalls(virtiomsg.ErrDown)
	if s.in(Listening, Handshake, Held, Up) {
		s.transition(Quiescing, "")
	}
}

// quiesced goes on where the owner has let go.
func (s *Session) quiesced() {
	reason, cost := "", 0
	if s.owes {
		s.owes = false
		if s.link.Quiesced() == nil {
			reason, cost = s.link.Reason().String(), costBreak
			if s.ended || s.link.Reason() == virtiomsg.ReasonDead {
				cost = costRestart
			}
			s.ended = false
			if s.gone {
				reason, cost = "board out of reach", 0
			}
			s.cfg.Log.Warn("link down", "link", s.cfg.Name, "reason", reason)
		}
	}
	s.told, s.sure, s.redo = false, false, false
	switch {
	case s.reopen:
		s.transition(Closing, reason)
	case s.ending:
		s.safely(s.goodbye)
		if s.in(Quiescing) { // the memory faulted: nobody can be told
			s.transition(Closing, "")
		}
	default:
		s.transition(Listening, reason)
		s.charge(cost)
		s.safely(func() { s.poll(false) })
	}
}

// Reset takes the link down, because of a peer that cannot be gone on with.
func (s *Session) Reset() { s.onLoop(s.reset) }

func (s *Session) reset() {
	if s.link != nil && s.link.Reset() {
		s.owes = true
		s.quiesce()
	}
}

// Fault takes the link down after a bus error at the window in a loop of the owner.
func (s *Session) Fault(err error) { s.onLoop(func() { s.fault(err) }) }

func (s *Session) fault(err error) {
	if s.link == nil || s.closing {
		return
	}
	s.fail(err)
	s.look = true // whether the board is there
	wasUp := s.link.Fault()
	if wasUp || s.in(Up) { // it may have happened on the way down
		s.cfg.Log.Warn("bus error", "link", s.cfg.Name, "board", s.cfg.Spec, "error", err)
		s.owes = true
		s.quiesce()
	}
	if s.in(Leaving) {
		s.transition(Closing, "")
	}
}

// tried notes that the peer's page was read once more: one that changes it without end, and never
// comes up, is left alone for a while.
func (s *Session) tried() {
	if s.tries++; s.tries > freeTries {
		s.charge(costTry)
	}
}

// charge takes from what the peer may spoil, and puts the handshake off where nothing is left.
func (s *Session) charge(cost int) {
	now := time.Now()
	if cost == 0 || !s.in(Listening, Handshake) {
		return
	}
	if s.breaks.Wait(now) == 0 {
		s.breaks.Take(now, cost)
		s.backoff = 0
		return
	}
	if s.backoff *= 2; s.backoff < minBackoff {
		s.backoff = minBackoff
	}
	if s.backoff > MaxBackoff {
		s.backoff = MaxBackoff
	}
	atomic.AddUint64(&s.n.Backoffs, 1)
	s.cfg.Log.Warn("the other side breaks the link again and again: the next handshake waits", "link", s.cfg.Name, "wait", s.backoff.String())
	s.breaks.Skip(now, s.backoff)
	s.heldTill = now.Add(s.backoff)
	s.link.Hold(true)
	s.transition(Held, "the other side breaks the link again and again")
	s.after(s.backoff)
}

func (s *Session) bad(err error) {
	if err == nil || errors.Is(err, virtiomsg.ErrDown) {
		return
	}
	s.fail(err)
	s.cfg.Log.Warn("the other side breaks the link", "link", s.cfg.Name, "error", err)
}

// ringer returns what rings the peer's control plane, and does not block whatever the peer does.
func (s *Session) ringer(info board.RingInfo) (doorbell.Ringer, error) {
	r, err := s.b.Ringer(info, 0)
	if err != nil {
		return nil, err
	}
	return doorbell.NoWait(r), nil
}

func (s *Session) ring() {
	if s.link.NeedRing() && s.ctl != nil && s.ctl.Ring() != nil {
		atomic.AddUint64(&s.n.RingErrors, 1)
	}
}

func (s *Session) epoch() {
	s.mu.Lock()
	s.epochs = [2]uint32{s.link.Epoch(), s.link.PeerEpoch()}
	s.mu.Unlock()
}
