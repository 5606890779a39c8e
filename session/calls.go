package session

import (
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/boardlink/boardlink/virtiomsg"
)

// ErrTimeout: a request was not answered in time.
var ErrTimeout = errors.New("the other side does not answer")

// Call sends a request and waits for its answer, for timeout at most. encode writes the
// request with the token it is given into the slot, which then receives the answer. It fails with
// virtiomsg.ErrDown when the link goes down meanwhile, or is to stop, and with ErrRemoved when the other side removes the
// device.
func (s *Session) Call(bus bool, id uint8, dev uint16, timeout time.Duration, m *virtiomsg.Slot, encode func(token uint16)) error {
	if s.ctx.Err() != nil {
		return virtiomsg.ErrDown
	}
	if !bus && s.removed(dev) {
		return ErrRemoved
	}
	token, err := s.requests.Begin(bus, id, dev)
	if err != nil {
		return err
	}
	defer s.requests.Cancel(token)
	encode(token)
	s.peeked = false // it is put aside, too
	sent := false
	limit := time.NewTimer(timeout)
	defer limit.Stop()
	var in virtiomsg.Slot
	for {
		// Everything is taken meanwhile, requests without room for their answers, too: they may stand
		// before the answer.
		for n := 0; ; n++ {
			if n == batch {
				s.again()
				break
			}
			now := time.Now()
			if wait := s.messages.Wait(now); wait > 0 {
				s.after(wait)
				break
			}
			ok, err := s.link.Recv(&in)
			if err != nil {
				s.bad(err)
				return err
			}
			if !ok {
				break
			}
			s.messages.Take(now, 1)
			h, err := in.Header()
			switch {
			case err != nil:
				atomic.AddUint64(&s.n.Malformed, 1)
				s.cfg.Handler.Malformed(&in, err)
			case !h.Response():
				if !s.aside(&in) {
					atomic.AddUint64(&s.n.Floods, 1)
					s.cfg.Log.Warn("the other side sends requests without end and does not answer", "link", s.cfg.Name)
					s.Reset()
					return virtiomsg.ErrDown
				}
				if !bus && virtiomsg.Removes(&in, dev) {
					return ErrRemoved
				}
			case !s.requests.Match(h):
				atomic.AddUint64(&s.n.Unexpected, 1)
			case h.Token == token:
				*m = in
				return nil
			}
		}
		s.serveBus()
		if !sent {
			if err := s.link.Send(m); err == nil {
				sent = true
			} else if err != virtiomsg.ErrFIFOFull {
				s.bad(err)
				return err
			}
		}
		s.ring()
		select {
		case <-s.ctx.Done():
			return virtiomsg.ErrDown
		case <-limit.C:
			atomic.AddUint64(&s.n.CallTimeout, 1)
			return fmt.Errorf("%s, device %d: %w within %v", virtiomsg.MessageName(bus, id), dev, ErrTimeout, timeout)
		case <-s.bell:
			s.poll(false)
		case <-s.tick.C:
			s.poll(true)
		case <-s.b.Events():
			s.ended = true
			s.link.Look()
			s.poll(false)
		}
		if s.downNow {
			return virtiomsg.ErrDown
		}
	}
}
