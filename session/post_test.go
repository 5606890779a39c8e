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

var (
	held    = make(chan struct{})
	release sync.Once
)

func init() {
	board.Register(board.Kind{Name: "held", Open: func(arg string, o board.Options) (board.Board, error) {
		<-held
		return nil, &board.Error{Spec: "held", Reason: "not there", Class: board.ErrAbsent}
	}})
}

// What is posted to a session runs once, alone, in every state of the link; and never after its end.
func TestDo(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var log peer.Log
	post := func(t *testing.T, s *session.Session) {
		t.Helper()
		n := 0 // not guarded: the race detector sees two at a time
		var wg sync.WaitGroup
		for range 20 {
			wg.Add(1)
			go func() {
				defer wg.Done()
				if err := s.Do(ctx, func() { n++ }); err != nil {
					t.Error(err)
				}
			}()
		}
		wg.Wait()
		if n != 20 {
			t.Errorf("%d of 20 ran", n)
		}
	}

	// A board that takes its time to be opened, and then is not there.
	s := session.New(session.Config{Name: "x", Spec: "held:", Log: &log, Handler: none{}, Beat: 5 * time.Millisecond})
	post(t, s)
	stop := run(t, ctx, s)
	post(t, s)
	release.Do(func() { close(held) })
	for range 20 {
		post(t, s)
		time.Sleep(time.Millisecond)
	}
	stop()

	_, spec := peer.NewBoard(t, testboard.PairOptions{})
	s = session.New(session.Config{Name: "x", Spec: spec, Log: &log, Handler: none{}, Beat: 5 * time.Millisecond})
	if err := s.Open(ctx); err != nil {
		t.Fatal(err)
	}
	stop = run(t, ctx, s)
	post(t, s)
	// While it is busy, one that gives up does not run.
	entered, leave := make(chan struct{}), make(chan struct{})
	first := make(chan error, 1)
	go func() { first <- s.Do(ctx, func() { close(entered); <-leave }) }()
	<-entered
	short, end := context.WithCancel(ctx)
	end()
	if err := s.Do(short, func() { t.Error("ran though it was given up") }); !errors.Is(err, context.Canceled) {
		t.Errorf("given up: %v", err)
	}
	close(leave)
	if err := <-first; err != nil {
		t.Error(err)
	}
	post(t, s)
	stop()
	if err := s.Do(ctx, func() { t.Error("ran after the end") }); !errors.Is(err, session.ErrEnded) {
		t.Errorf("after the end: %v", err)
	}
}

// run runs a session until stop is called.
func run(t *testing.T, ctx context.Context, s *session.Session) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	return func() {
		t.Helper()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}
