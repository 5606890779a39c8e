package session

import (
	"sync/atomic"
	"testing"
)

// TestTransitions: each transition of the diagram is made, each other one is refused and counted. The table in this test
// is the diagram, read arrow by arrow.
func TestTransitions(t *testing.T) {
	diagram := map[State][]State{
		Starting:  {Absent, Listening, GivenUp, Stopped},
		Absent:    {Listening, GivenUp, Stopped},
		Listening: {Handshake, Held, Quiescing},
		Handshake: {Listening, Held, Up, Quiescing},
		Held:      {Listening, Handshake, Quiescing},
		Up:        {Quiescing, Stuck},
		Quiescing: {Listening, Leaving, Closing, Stuck},
		Leaving:   {Closing},
		Closing:   {Absent, Stopped, Stuck},
		Stuck:     {Up, Quiescing, Stopped},
	}
	names := map[string]bool{}
	for from := State(0); int(from) < states; from++ {
		if name := from.String(); name == "" || names[name] {
			t.Errorf("the name of state %d: %q", from, name)
		}
		names[from.String()] = true
		for to := State(0); int(to) < states; to++ {
			want := from == to
			for _, s := range diagram[from] {
				want = want || s == to
			}
			s := New(Config{Log: &lines{}})
			s.state = from
			since := s.since
			got := func() (made bool) {
				defer func() { recover() }() // observe
				return s.transition(to, "why")
			}()
			is, why, refused := s.state, s.why, atomic.LoadUint64(&s.n.Illegal)
			if want && (!got || is != to || why != "why" || refused != 0 || s.since.Equal(since) != (from == to)) {
				t.Errorf("%s to %s: made %v, state %s, why %q, refused %d", from, to, got, is, why, refused)
			}
			if !want && (got || is != from || why != "" || refused != 1 || !s.since.Equal(since)) {
				t.Errorf("%s to %s, which the diagram does not have: made %v, state %s, why %q, refused %d", from, to, got, is, why, refused)
			}
		}
	}
	if s := State(states).String(); s != "state 12" {
		t.Errorf("the name of no state: %q", s)
	}
}
