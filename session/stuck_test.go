package session_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/board/testboard"
	"github.com/boardlink/boardlink/hwtest/peer"
	"github.com/boardlink/boardlink/session"
)

// blocked is an owner whose loops do not stop before free is closed.
type blocked struct {
	none
	free chan struct{}
}

func (b blocked) Down() { <-b.free }

// TestStuck: a link whose loops do not stop says so, counts it, and is left when it is to end; it keeps its board.
func TestStuck(t *testing.T) {
	t.Parallel()
	_, spec := peer.NewBoard(t, testboard.PairOptions{})
	var log peer.Log
	b := blocked{free: make(chan struct{})}
	s := session.New(session.Config{Name: "x", Spec: spec, Options: board.Options{Side: board.Host}, Log: &log, Handler: b})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	for begin := time.Now(); s.Status().State != "waiting for the peer"; time.Sleep(time.Millisecond) {
		if time.Since(begin) > 20*time.Second {
			t.Fatalf("state %q", s.Status().State)
		}
	}
	cancel()
	select {
	case err := <-done:
		if !errors.Is(err, session.ErrStuck) {
			t.Errorf("the link ends with %v", err)
		}
	case <-time.After(30 * time.Second):
		t.Fatal("Run waits for loops that do not stop")
	}
	if st := s.Status(); st.State != "stuck" || st.Counters["stuck"] == 0 || st.LastError == "" || st.Window.Size == 0 {
		t.Errorf("status of a stuck link: %+v", st)
	}
	close(b.free)
	for begin := time.Now(); s.Status().Window.Size != 0; time.Sleep(time.Millisecond) {
		if time.Since(begin) > 20*time.Second {
			t.Fatal("the link does not end once its loops have stopped")
		}
	}
}

// halting is an owner that stops loops of its own, once, while the link is up; they take until free is closed.
type halting struct {
	none
	s    *session.Session
	free chan struct{}
	once *sync.Once
}

func (h *halting) Tick() { h.once.Do(func() { h.s.Stopping(func() { <-h.free }) }) }

// TestStuckForAWhile: a link whose loops stop after all says no more that it is stuck.
func TestStuckForAWhile(t *testing.T) {
	t.Parallel()
	_, spec := peer.NewBoard(t, testboard.PairOptions{})
	h := &halting{free: make(chan struct{}), once: new(sync.Once)}
	h.s = session.New(session.Config{Name: "x", Spec: spec, Log: new(peer.Log), Handler: h, Beat: 5 * time.Millisecond, LostBeats: 2000})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- h.s.Run(ctx) }()
	p := peer.New(t, spec, board.Agent)
	p.WaitUp()
	wait := func(state string) {
		t.Helper()
		for begin := time.Now(); h.s.Status().State != state; time.Sleep(time.Millisecond) {
			if time.Since(begin) > 20*time.Second {
				t.Fatalf("state %q, want %q", h.s.Status().State, state)
			}
		}
	}
	wait("up")
	wait("stuck")
	close(h.free)
	wait("up")
	if n := h.s.Status().Counters["stuck"]; n != 1 {
		t.Errorf("stuck is counted %d times", n)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
