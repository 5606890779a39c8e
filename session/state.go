package session

import (
	"fmt"
	"sync/atomic"
	"time"
)

// State is what a Session is doing. It changes by transition alone, along the arrows of this diagram. What is begun
// in a state: see proceed.
//
//	Starting --- no board ---> Absent <-------------------------+
//	     \                      /                                |
//	      +--- board open ----+                                 |
//	                |                                           |
//	                v                                           |
//	            Listening <------------------------------+      |
//	             ^     ^                                 |      |
//	   peer seen |     | it breaks the link too often    |      |
//	             v     v                                 |      |
//	      Handshake <-> Held                             |      |
//	             |                                       |      |
//	             v                                       |      |
//	             Up <--> Stuck                           |      |
//	             |                                       |      |
//	             v                                       |      |
//	         Quiescing ----- the link went down ---------+      |
//	             |   \                                          |
//	  Run is to  |    +- the board is lost -----> Closing ------+
//	     end     |                                ^     |
//	             +-------> Leaving ---------------+     +-- Run is to end --> Stopped
//
// Beside these:
//
//	Starting, Absent            -> GivenUp    the board cannot be opened
//	Starting, Absent            -> Stopped    Run is to end
//	Listening, Handshake, Held  -> Quiescing  the board is lost, or Run is to end
//	Quiescing, Closing         <-> Stuck      something does not stop; from Closing it goes on as Stopped
type State uint8

// States of a session. Status shows their names.
const (
	// Starting: the board has not been opened yet.
	Starting State = iota
	// Absent: there is no board. It is tried to open one, again and again.
	Absent
	// Listening: the board is open, the peer has not been seen.
	Listening
	// Handshake: the peer's link page is good; the epochs are being exchanged.
	Handshake
	// Held: the next handshake is put off, for a peer that breaks the link again and again.
	Held
	// Up: messages may be sent, queues may run.
	Up
	// Quiescing: the owner is to let go of shared memory. No message comes or goes any more.
	Quiescing
	// Leaving: the owner has let go, as Run is to end; the peer is told, and given time to let go.
	Leaving
	// Closing: the board is given back.
	Closing
	// Stuck: something of the link does not stop. Where it does after all, the session goes on.
	Stuck
	// GivenUp: Run has returned an error of the board.
	GivenUp
	// Stopped: Run has returned nil.
	Stopped

	states = int(Stopped) + 1
)

var stateNames = [states]string{
	Starting:  "starting",
	Absent:    "waiting for the board",
	Listening: "waiting for the peer",
	Handshake: "shaking hands",
	Held:      "held off",
	Up:        "up",
	Quiescing: "going down",
	Leaving:   "stopping",
	Closing:   "closing the board",
	Stuck:     "stuck",
	GivenUp:   "given up",
	Stopped:   "stopped",
}

// String returns the name of the state, as Status shows it.
func (s State) String() string {
	if int(s) < states {
		return stateNames[s]
	}
	return fmt.Sprintf("state %d", uint8(s))
}

// set is a set of states.
type set uint16

func setOf(ss ...State) (t set) {
	for _, s := range ss {
		t |= 1 << s
	}
	return t
}

func (t set) has(s State) bool { return t&(1<<s) != 0 }

// transitions are the arrows of the diagram: where each state may go.
var transitions = [states]set{
	Starting:  setOf(Absent, Listening, GivenUp, Stopped),
	Absent:    setOf(Listening, GivenUp, Stopped),
	Listening: setOf(Handshake, Held, Quiescing),
	Handshake: setOf(Listening, Held, Up, Quiescing),
	Held:      setOf(Listening, Handshake, Quiescing),
	Up:        setOf(Quiescing, Stuck),
	Quiescing: setOf(Listening, Leaving, Closing, Stuck),
	Leaving:   setOf(Closing),
	Closing:   setOf(Absent, Stopped, Stuck),
	Stuck:     setOf(Up, Quiescing, Stopped),
}

// observe hears of each change of state, and of those that are refused, in tests.
var observe = func(s *Session, from, to State, legal bool) {}

// transition makes the transition to a state, and tells whether it did: what the diagram does not have is
// refused and counted. why says what led there, for an operator; it may be empty. A transition to the
// state that the session is in changes nothing but why. Only the loop calls it, and Open.
func (s *Session) transition(to State, why string) bool {
	s.mu.Lock()
	from := s.state
	if from != to && !transitions[from].has(to) {
		s.mu.Unlock()
		atomic.AddUint64(&s.n.Illegal, 1)
		s.cfg.Log.Error("a transition that no link makes", "link", s.cfg.Name, "from", from.String(), "to", to.String())
		observe(s, from, to, false)
		return false
	}
	defer s.mu.Unlock()
	if from != to {
		s.state, s.since = to, time.Now()
		observe(s, from, to, true)
	}
	s.why = why
	return true
}

// at returns the state. Any goroutine may call it.
func (s *Session) at() State {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.state
}

// in tells whether the session is in one of some states. Any goroutine may call it.
func (s *Session) in(ss ...State) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return setOf(ss...).has(s.state)
}
