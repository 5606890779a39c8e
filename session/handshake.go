package session

import (
	"errors"
	"sync/atomic"
	"time"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/virtiomsg"
)

// poll moves the handshake on.
func (s *Session) poll(tick bool) {
	now := time.Now()
	if !s.due.After(now) {
		s.due = time.Time{}
	}
	if !s.heldTill.IsZero() && !s.heldTill.After(now) {
		s.heldTill, s.tries = time.Time{}, 0
		s.link.Hold(false)
		s.resume()
	}
	for n := 0; ; n++ {
		if n == batch {
			s.again()
			return
		}
		ev, err := s.link.Poll(tick)
		tick = false
		if err != nil {
			s.fail(err)
			s.cfg.Log.Warn("the other side's link page is refused", "link", s.cfg.Name, "error", err)
			s.tried()
		}
		switch ev {
		case virtiomsg.EventNone:
			s.epoch()
			s.ring()
			return
		case virtiomsg.EventPeer:
			s.peer, _ = s.link.Peer()
			if s.ctl, err = s.ringer(s.peer.Ring); err != nil {
				s.ctl = nil
				s.cfg.Log.Warn("the other side cannot be rung, it has to poll", "link", s.cfg.Name, "error", err)
			}
			s.transition(Handshake, "")
			s.tried()
		case virtiomsg.EventUp:
			s.upNow = true
			s.tries, s.ended = 0, false
		case virtiomsg.EventQuiesce:
			s.upNow, s.downNow = false, true
			if s.busy {
				s.epoch()
				return
			}
			s.down()
		}
	}
}

// resume goes on with the handshake that was put off.
func (s *Session) resume() {
	if _, known := s.link.Peer(); known {
		s.transition(Handshake, "")
	} else {
		s.transition(Listening, "")
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
	if !s.heldTill.IsZero() {
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

// down lets the owner let go of shared memory and tells the peer.
func (s *Session) down() {
	was := s.downNow
	s.downNow = false
	s.deferred, s.peeked = nil, false
	s.transition(Quiescing, "")
	s.Stopping(s.cfg.Handler.Down)
	if !was {
		return
	}
	if err := s.link.Quiesced(); err == nil {
		cost := costBreak
		if s.ended || s.link.Reason() == virtiomsg.ReasonDead {
			cost = costRestart
		}
		s.ended = false
		reason := s.link.Reason().String()
		// What is read of a board that cannot be reached may look like anything that a peer does.
		if v, ok := s.b.(board.Vanishing); ok {
			if gone := v.Gone(); gone != nil {
				reason, cost = "board out of reach", 0
				s.faulted = true // serve looks at it next
			}
		}
		s.transition(Listening, reason)
		s.cfg.Log.Warn("link down", "link", s.cfg.Name, "reason", reason)
		if cost > 0 {
			s.charge(cost)
		}
	}
}

// ringer returns what rings the peer's control plane, and does not block whatever the peer does.
func (s *Session) ringer(info board.RingInfo) (doorbell.Ringer, error) {
	r, err := s.b.Ringer(info, 0)
	if err != nil {
		return nil, err
	}
	return doorbell.NoWait(r), nil
}

// Reset takes the link down, because of a peer that cannot be gone on with.
func (s *Session) Reset() {
	if s.link.Reset() {
		s.downNow, s.upNow = true, false
	}
}

func (s *Session) epoch() {
	s.mu.Lock()
	s.epochs = [2]uint32{s.link.Epoch(), s.link.PeerEpoch()}
	s.mu.Unlock()
}
