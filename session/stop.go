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

func (s *Session) stopLimit() time.Duration { return time.Duration(atomic.LoadInt64(&s.limit)) }

// ErrStuck is what Run returns when the link did not stop in time: something of it is blocked. Its memory and its
// descriptors stay as they are, and its devices must not be closed.
var ErrStuck = fmt.Errorf("the link did not stop within %v: something of it is blocked, and it is left as it is", stopLimit)

// Stopping runs f, which stops loops of the owner. Where it takes too long, status and log tell; memory and descriptors are kept
// until it returns.
func (s *Session) Stopping(f func()) {
	limit := s.stopLimit()
	over := false // the loop's
	t := time.AfterFunc(limit, func() {
		s.onLoop(func() {
			if !over {
				s.stuck(fmt.Sprintf("its loops have not stopped for %v: they are blocked; memory and descriptors are kept until they stop", limit), Up, Quiescing)
			}
		})
	})
	defer func() { // also where a fault of the memory ends f
		if !t.Stop() {
			s.onLoop(func() {
				over = true
				s.unstuck()
			})
		}
	}()
	f()
}

// stuck tells that something of the link does not stop. The session is Stuck then, if it is in one of some states.
func (s *Session) stuck(what string, states ...State) {
	s.tellStuck(what)
	if s.in(states...) {
		s.transition(Stuck, "")
	}
}

func (s *Session) tellStuck(what string) {
	atomic.AddUint64(&s.n.Stuck, 1)
	s.fail(errors.New(what))
	s.cfg.Log.Error("the link is stuck", "link", s.cfg.Name, "error", what)
}

// unstuck goes on when what did not stop has stopped.
func (s *Session) unstuck() {
	switch {
	case !s.in(Stuck) || s.closing:
	case s.ending || s.reopen || s.owes || !s.link.Up():
		s.transition(Quiescing, "")
	default:
		s.transition(Up, "")
	}
}

// overdue is asked where the time to stop is over, and tells whether the link is given up as stuck. Any goroutine may call it.
func (s *Session) overdue() (stuck bool) {
	told := make(chan bool, 1)
	go func() {
		stuck := false
		s.onLoop(func() {
			if s.in(Leaving) { // the owner has let go: nothing is stuck
				s.transition(Closing, "")
				return
			}
			s.stuck(ErrStuck.Error(), Quiescing, Closing)
			stuck = true
		})
		told <- stuck
	}()
	limit := time.NewTimer(stopTime)
	defer limit.Stop()
	select {
	case stuck := <-told:
		return stuck
	case <-limit.C:
		// The loop itself: an access to the window does not end.
		s.tellStuck(ErrStuck.Error())
		return true
	}
}

// goodbye begins the clean stop: the peer is told, and given time to let go.
func (s *Session) goodbye() {
	if s.link.Stop() != nil {
		s.transition(Closing, "")
		return
	}
	s.transition(Leaving, "")
	wait := time.Until(s.deadline) / 2
	if wait > stopTime {
		wait = stopTime
	}
	s.leave = time.NewTimer(wait)
	s.pollLeaving(false)
}

// pollLeaving moves the clean stop on.
func (s *Session) pollLeaving(tick bool) {
	if tick {
		// A peer that never was there lets go of nothing.
		if _, known := s.link.Peer(); !known {
			s.transition(Closing, "")
			return
		}
		s.link.Look()
	}
	for n := 0; n < batch; n++ {
		ev, _ := s.link.Poll(tick)
		tick = false
		s.ring()
		switch ev {
		case virtiomsg.EventNone:
			return
		case virtiomsg.EventStopped:
			s.transition(Closing, "")
			return
		case virtiomsg.EventPeer:
			if d, ok := s.link.Peer(); ok {
				if r, err := s.ringer(d.Ring); err == nil {
					s.ctl = r
				}
			}
		}
	}
	s.again()
}
