package session_test

import (
	"context"
	"errors"
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
