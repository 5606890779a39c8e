package session

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/pci"
	"github.com/boardlink/boardlink/virtiomsg"
)

// A board that cannot be opened is tried again after retryOpen. Where it is absent, that stays the
// interval: it costs little, and the board is to come up soon after it is there. After any other
// error the interval doubles with each try, up to maxRetryOpen.
var (
	retryOpen    = 250 * time.Millisecond
	maxRetryOpen = 4 * time.Second
)

// openBoard opens the board. When ctx ends it returns early; a board that comes later is closed.
func (s *Session) openBoard(ctx context.Context) (board.Board, error) {
	if ctx.Done() == nil {
		return board.Open(s.cfg.Spec, s.cfg.Options)
	}
	type result struct {
		b   board.Board
		err error
	}
	c := make(chan result)
	go func() {
		b, err := board.Open(s.cfg.Spec, s.cfg.Options)
		select {
		case c <- result{b, err}:
		case <-ctx.Done():
			if err == nil {
				b.Close()
			}
		}
	}()
	for {
		select {
		case r := <-c:
			return r.b, r.err
		case <-s.posts.bell:
			s.work()
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func (s *Session) open(ctx context.Context) error {
	b, err := s.openBoard(ctx)
	if err != nil {
		atomic.AddUint64(&s.n.OpenErrors, 1)
		return err
	}
	decl, err := s.cfg.Handler.Declare(b)
	if err != nil {
		atomic.AddUint64(&s.n.OpenErrors, 1)
		b.Close()
		return err
	}
	self := b.Self()
	decl.Ring = self
	link, err := virtiomsg.NewLink(virtiomsg.LinkConfig{Window: b.Window(), Side: s.cfg.Options.Side, Self: decl,
		PeerDead: b.PeerDead, LostTicks: s.cfg.LostBeats,
		CanRing: func(r board.RingInfo) error {
			_, err := b.Ringer(r, 0)
			return err
		}})
	if err == nil {
		err = s.assign(b, self)
	}
	if err == nil {
		var serr error
		if err = pci.Guard(func() { serr = link.Start() }); err == nil {
			err = serr
		}
		if err != nil {
			s.assigned.Close()
		}
	}
	if err != nil {
		atomic.AddUint64(&s.n.OpenErrors, 1)
		b.Close()
		return fmt.Errorf("board %s: %w", s.cfg.Spec, err)
	}
	atomic.AddUint64(&s.n.Opened, 1)
	s.b, s.link, s.ctl = b, link, nil
	s.heldTill, s.due = time.Time{}, time.Time{}
	s.mu.Lock()
	s.shown, s.shownL = b, link
	s.mu.Unlock()
	s.fail(nil)
	s.transition(Listening, "")
	return nil
}

// assign gives the control plane and each queue the end of its doorbell.
func (s *Session) assign(b board.Board, self board.RingInfo) error {
	vectors := vectorsOf(self)
	bells := make([]doorbell.Waiter, vectors)
	for v := range bells {
		bells[v] = b.Waiter(uint32(v))
		if s.cfg.NoInterrupts {
			bells[v] = doorbell.None
		}
	}
	qs := s.cfg.Handler.Queues()
	users := make([]int, 1+len(qs))
	s.users = make(map[QueueID]int, len(qs))
	for i, q := range qs {
		users[1+i] = int(virtiomsg.Vector(q.Dev, uint32(q.Queue), vectors))
		s.users[q] = 1 + i
	}
	var err error
	s.assigned, err = doorbell.Assign(bells, users)
	return err
}

func (s *Session) close() {
	s.mu.Lock()
	if c, ok := s.shown.(board.Counting); ok {
		if s.counts == nil {
			s.counts = map[string]uint64{}
		}
		for k, v := range c.Counters() {
			s.counts[k] += v
		}
	}
	s.shown, s.shownL = nil, nil
	s.mu.Unlock()
	if err := s.assigned.Close(); err != nil {
		s.cfg.Log.Warn("doorbells do not close", "link", s.cfg.Name, "error", err)
	}
	if err := s.b.Close(); err != nil {
		s.cfg.Log.Warn("board does not close", "link", s.cfg.Name, "error", err)
	}
	s.b, s.link = nil, nil
}

// gone asks the board whether it is still there.
func (s *Session) gone(look bool) error {
	v, ok := s.b.(board.Vanishing)
	if !ok || !look && !s.faulted {
		return nil
	}
	s.faulted = false
	return v.Gone()
}
