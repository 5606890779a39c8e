package session

import (
	"sync/atomic"
	"time"

	"github.com/boardlink/boardlink/virtiomsg"
)

// maxDeferred limits the requests and events that are put aside while this side waits for an answer. A
// peer that keeps to docs/wire.md has at most MaxSlots requests under way, and events are merged.
const maxDeferred = 4 * virtiomsg.MaxSlots

// serveOwner has the owner do what is due: Up, then the messages in their order, and Tick, for which they do not make
// it wait for long. The owner is idle, and the link is up.
func (s *Session) serveOwner() {
	if s.upDue {
		s.upDue = false
		s.begin(jobOther, s.cfg.Handler.Up)
		return
	}
	if s.work(); s.job != jobNone {
		return
	}
	for n := 0; !s.tickDue || s.taken < batch; n++ {
		if n == batch {
			s.again()
			return
		}
		var m virtiomsg.Slot
		if !s.next(&m) {
			break
		}
		s.taken++
		if h, err := m.Header(); err == nil && h.Response() {
			s.requests.Match(h) // too late for whoever asked
			atomic.AddUint64(&s.n.Unexpected, 1)
			s.ring()
			continue
		}
		s.begin(jobOther, func() { s.handOver(&m) })
		return
	}
	if s.tickDue && s.in(Up) {
		s.tickDue, s.taken = false, 0
		s.begin(jobOther, s.cfg.Handler.Tick)
	}
}

// handOver gives the owner a request or an event of the peer, on the owner's goroutine.
func (s *Session) handOver(m *virtiomsg.Slot) {
	h, err := m.Header()
	if err != nil {
		atomic.AddUint64(&s.n.Malformed, 1)
		s.cfg.Handler.Malformed(m, err)
		return
	}
	s.cfg.Handler.Message(h, m)
}

// next takes the next message that may be handled now: one that was put aside, or from the FIFO. A
// request waits there until its answer has room.
func (s *Session) next(m *virtiomsg.Slot) bool {
	if !s.peeked {
		if len(s.deferred) > 0 {
			s.head = s.deferred[0]
		} else if ok, err := s.link.Peek(&s.head); err != nil || !ok {
			s.bad(err)
			return false
		}
		s.peeked, s.stalled = true, false
	}
	now := time.Now()
	wait := s.messages.Wait(now)
	if h, err := s.head.Header(); err == nil && wait == 0 && !h.Response() && !h.Event() {
		room, err := s.link.Room()
		if err != nil || !room {
			s.bad(err)
			s.stall(&s.n.NoRoom)
			return false // the peer rings when it has taken messages
		}
		if p, ok := s.cfg.Handler.(Pacer); ok {
			wait = p.Wait(h, &s.head)
		}
	}
	if wait > 0 {
		s.stall(&s.n.Throttled)
		s.after(wait)
		return false
	}
	s.messages.Take(now, 1)
	s.peeked = false
	if len(s.deferred) > 0 {
		s.deferred = s.deferred[1:]
	} else {
		s.link.Take()
	}
	*m = s.head
	return true
}

// stall counts a message that has to wait, once.
func (s *Session) stall(counter *uint64) {
	if !s.stalled {
		s.stalled = true
		atomic.AddUint64(counter, 1)
	}
}

// aside keeps a message for later, and tells whether there was room for it.
func (s *Session) aside(m *virtiomsg.Slot) bool {
	for i := range s.deferred {
		if virtiomsg.Supersedes(m, &s.deferred[i]) {
			s.deferred[i] = *m
			atomic.AddUint64(&s.n.Merged, 1)
			return true
		}
	}
	if len(s.deferred) == maxDeferred {
		return false
	}
	s.deferred = append(s.deferred, *m)
	return true
}

// Send sends a message. Errors: virtiomsg.ErrFIFOFull: try again later; others: the link is down, or
// about to go.
func (s *Session) Send(m *virtiomsg.Slot) error {
	err := error(virtiomsg.ErrDown)
	s.onLoop(func() {
		if s.link == nil {
			return
		}
		if err = s.link.Send(m); err != virtiomsg.ErrFIFOFull {
			s.bad(err)
		}
		s.ring()
	})
	return err
}
