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

// call is a request that waits for its answer. Whoever waits is the owner's goroutine; the fields are the loop's.
type call struct {
	bus    bool
	dev    uint16
	token  uint16
	m      *virtiomsg.Slot // the request, then its answer
	sent   bool
	inside chan func() // what the owner's goroutine does meanwhile
	busy   bool        // it does
	done   chan error
}

// Call sends a request and waits for its answer, for timeout at most. encode writes the
// request with the token it is given into the slot, which then receives the answer. It fails with
// virtiomsg.ErrDown when the link goes down meanwhile, or is to stop, and with ErrRemoved when the other side removes the
// device. Only methods of the Handler call it.
func (s *Session) Call(bus bool, id uint8, dev uint16, timeout time.Duration, m *virtiomsg.Slot, encode func(token uint16)) error {
	c := &call{bus: bus, dev: dev, m: m, inside: make(chan func(), 1), done: make(chan error, 1)}
	if !s.onLoop(func() { s.beginCall(c, id, encode) }) {
		return virtiomsg.ErrDown
	}
	limit := time.NewTimer(timeout)
	defer limit.Stop()
	late := limit.C
	for {
		select {
		case err := <-c.done:
			if len(c.inside) > 0 {
				(<-c.inside)()
			}
			return err
		case <-late:
			late = nil
			s.onLoop(func() {
				if s.finish(c, fmt.Errorf("%s, device %d: %w within %v", virtiomsg.MessageName(bus, id), dev, ErrTimeout, timeout)) {
					atomic.AddUint64(&s.n.CallTimeout, 1)
				}
			})
		case f := <-c.inside:
			f()
			s.onLoop(func() { c.busy = false })
		}
	}
}

// beginCall writes the request; serveCalls sends it.
func (s *Session) beginCall(c *call, id uint8, encode func(token uint16)) {
	err := error(virtiomsg.ErrDown)
	if !s.ending && s.in(Up) {
		err = nil
		if !c.bus && s.removed(c.dev) {
			err = ErrRemoved
		}
	}
	if err == nil {
		c.token, err = s.requests.Begin(c.bus, id, c.dev)
	}
	if err != nil {
		c.done <- err
		return
	}
	encode(c.token)
	s.peeked = false // it is put aside, too
	s.calls = append(s.calls, c)
}

// finish ends a call, and tells whether it was waiting.
func (s *Session) finish(c *call, err error) bool {
	for i := range s.calls {
		if s.calls[i] == c {
			s.calls = append(s.calls[:i], s.calls[i+1:]...)
			s.requests.Cancel(c.token)
			c.done <- err
			return true
		}
	}
	return false
}

// failCalls ends all calls.
func (s *Session) failCalls(err error) {
	for len(s.calls) > 0 {
		s.finish(s.calls[len(s.calls)-1], err)
	}
}

// serveCalls moves the innermost call on.
func (s *Session) serveCalls() {
	if len(s.calls) == 0 {
		return
	}
	s.takeAnswers()
	if len(s.calls) > 0 && s.in(Up) {
		c := s.calls[len(s.calls)-1]
		if !c.busy {
			s.serveBus(c)
		}
		if !c.busy && !c.sent {
			switch err := s.link.Send(c.m); err {
			case nil:
				c.sent = true
			case virtiomsg.ErrFIFOFull:
			default:
				s.bad(err)
				s.failCalls(err)
			}
		}
	}
	if len(s.calls) > 0 { // else whoever called has more to do, and the next ring tells of both
		s.ring()
	}
}

// takeAnswers takes everything that the peer sent, requests without room for their answers, too: they may stand
// before an answer that is waited for.
func (s *Session) takeAnswers() {
	var in virtiomsg.Slot
	for n := 0; len(s.calls) > 0; n++ {
		if n == batch {
			s.again()
			return
		}
		now := time.Now()
		if wait := s.messages.Wait(now); wait > 0 {
			s.after(wait)
			return
		}
		ok, err := s.link.Recv(&in)
		if err != nil {
			s.bad(err)
			s.failCalls(err)
			return
		}
		if !ok {
			return
		}
		s.messages.Take(now, 1)
		if h, err := in.Header(); err != nil || !h.Response() {
			if !s.aside(&in) {
				atomic.AddUint64(&s.n.Floods, 1)
				s.cfg.Log.Warn("the other side sends requests without end and does not answer", "link", s.cfg.Name)
				s.reset()
				return
			}
			s.removes(&in)
		} else if !s.requests.Match(h) {
			atomic.AddUint64(&s.n.Unexpected, 1)
		} else {
			s.answered(h, &in)
		}
	}
}

// removes ends the calls for a device that an event says is gone.
func (s *Session) removes(event *virtiomsg.Slot) {
	for i := len(s.calls) - 1; i >= 0; i-- {
		if c := s.calls[i]; !c.bus && virtiomsg.Removes(event, c.dev) {
			s.finish(c, ErrRemoved)
		}
	}
}

// answered ends the call with the token of an answer.
func (s *Session) answered(h virtiomsg.Header, answer *virtiomsg.Slot) {
	for _, c := range s.calls {
		if c.token == h.Token {
			*c.m = *answer
			s.finish(c, nil)
			return
		}
	}
}

// serveBus hands the first request of the bus among the messages that were put aside to the owner, who waits for an
// answer, if there is room for its own: the other side may do nothing else before it has it. Such a request touches no
// device. A message that makes no sense does not wait either.
func (s *Session) serveBus(c *call) {
	for i := range s.deferred {
		h, err := s.deferred[i].Header()
		if err == nil {
			if !h.Bus() || h.Event() {
				continue
			}
			if room, err := s.link.Room(); err != nil || !room {
				s.bad(err)
				return
			}
		}
		m := s.deferred[i]
		s.deferred = append(s.deferred[:i], s.deferred[i+1:]...)
		c.busy = true
		c.inside <- func() {
			if s.Up() {
				s.handOver(&m)
			}
		}
		return
	}
}
