package session

import (
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

// Tests do not wait long for a board that cannot be opened.
func init() { retryOpen, maxRetryOpen = 5*time.Millisecond, 20*time.Millisecond }

var walks struct {
	sync.Mutex
	m map[*Session][]State
}

// A transition that the diagram does not have is a mistake.
func init() {
	walks.m = map[*Session][]State{}
	observe = func(s *Session, from, to State, legal bool) {
		if !legal {
			panic(fmt.Sprintf("a transition from %q to %q", from, to))
		}
		walks.Lock()
		defer walks.Unlock()
		if len(walks.m[s]) == 0 {
			walks.m[s] = []State{from}
		}
		walks.m[s] = append(walks.m[s], to)
	}
}

// Walk returns the states that the session was in, one after the other.
func (s *Session) Walk() []State {
	walks.Lock()
	defer walks.Unlock()
	return append([]State(nil), walks.m[s]...)
}

// State returns the present state.
func (s *Session) State() State { return s.at() }

// SetStopLimit changes how long something may take to stop.
func (s *Session) SetStopLimit(d time.Duration) { atomic.StoreInt64(&s.limit, int64(d)) }

// Arrows returns the transitions of the diagram.
func Arrows() (all [][2]State) {
	for from := State(0); int(from) < states; from++ {
		for to := State(0); int(to) < states; to++ {
			if transitions[from].has(to) {
				all = append(all, [2]State{from, to})
			}
		}
	}
	return all
}
