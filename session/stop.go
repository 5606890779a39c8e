package session

import (
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/boardlink/boardlink/virtiomsg"
)

// stopTime limits how long a clean stop waits for the peer to let go.
const stopTime = time.Second

// stopLimit is how long a link may take to stop, and its loops at any time, before it counts as stuck: the clean stop, and what
// frees a loop that blocks, take less.
const stopLimit = 5 * time.Second

// ErrStuck is what Run returns when the link did not stop in time: something of it is blocked. Its memory and its
// descriptors stay as they are, and its devices must not be closed.
var ErrStuck = fmt.Errorf("the link did not stop within %v: something of it is blocked, and it is left as it is", stopLimit)

// stuck shows that something of the link does not stop.
func (s *Session) stuck(what string) {
	atomic.AddUint64(&s.n.Stuck, 1)
	s.transition(Stuck, "")
	s.fail(errors.New(what))
	s.cfg.Log.Error("the link is stuck", "link", s.cfg.Name, "error", what)
}

// Stopping runs f, which stops loops of the owner. Where it takes too long, status and log tell; memory and descriptors are kept
// until it returns.
func (s *Session) Stopping(f func()) {
	s.mu.Lock()
	before, why := s.state, s.why
	s.mu.Unlock()
	told := make(chan struct{})
	t := time.AfterFunc(stopLimit, func() {
		defer close(told)
		s.stuck(fmt.Sprintf("its loops have not stopped for %v: they are blocked; memory and descriptors are kept until they stop", stopLimit))
	})
	defer func() {
		if t.Stop() {
			return
		}
		<-told
		if s.ctx.Err() == nil { // else it is what Run tells
			s.transition(before, why)
		}
	}()
	f()
}

// leave stops cleanly: the peer is told, and given time to let go.
func (s *Session) leave() {
	s.down()
	if s.link.Stop() != nil {
		return
	}
	s.transition(Leaving, "")
	limit := time.NewTimer(stopTime)
	defer limit.Stop()
	tick := false
	for {
		for n := 0; n < batch; n++ {
			ev, _ := s.link.Poll(tick)
			tick = false
			s.ring()
			if ev == virtiomsg.EventStopped {
				return
			}
			if ev == virtiomsg.EventPeer {
				if d, ok := s.link.Peer(); ok {
					if r, err := s.ringer(d.Ring); err == nil {
						s.ctl = r
					}
				}
			}
			if ev == virtiomsg.EventNone {
				break
			}
		}
		select {
		case <-limit.C:
			return
		case <-s.bell:
		case <-s.b.Events():
		case <-s.tick.C:
			s.link.Look()
			tick = true
			// A peer that never was there lets go of nothing.
			if _, known := s.link.Peer(); !known {
				return
			}
		}
	}
}
