package session

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/pci"
	"github.com/boardlink/boardlink/virtiomsg"
)

// batch limits how many messages and steps of the handshake are taken in a row: a peer that never
// stops must not keep this side from its clock, its signals and its other work.
const batch = 2 * virtiomsg.MaxSlots

func (s *Session) run(ctx context.Context) error {
	var waiting string // the error that was logged last; empty: none since the board was open
	pause := retryOpen
	for {
		var err error
		if s.b == nil {
			err = s.open(ctx)
		}
		if ctx.Err() != nil && s.b == nil {
			s.transition(Stopped, "")
			return nil
		}
		if err == nil {
			s.cfg.Log.Info("board opened", "link", s.cfg.Name, "board", s.cfg.Spec, "side", s.cfg.Options.Side.String(),
				"window", s.b.Window().Mem.Size(), "memory", s.b.Window().Mem.Kind().String())
			waiting, pause = "", retryOpen
			again := s.serve(ctx)
			s.transition(Closing, "")
			s.close()
			if !again {
				s.transition(Stopped, "")
				return nil
			}
			s.cfg.Log.Warn("opening the board anew", "link", s.cfg.Name, "board", s.cfg.Spec)
			s.transition(Absent, "")
			continue
		}
		s.fail(err)
		absent := errors.Is(err, board.ErrAbsent)
		if !s.cfg.Retry && !absent && atomic.LoadUint64(&s.n.Opened) == 0 && (waiting == "" || board.Lasting(err)) {
			s.transition(GivenUp, "")
			return err
		}
		if text := err.Error(); text != waiting {
			tell := s.cfg.Log.Warn
			if absent {
				tell = s.cfg.Log.Info
			}
			tell("waiting for the board", "link", s.cfg.Name, "board", s.cfg.Spec, "error", err)
			waiting, pause = text, retryOpen
		}
		s.transition(Absent, "")
		if !s.pause(ctx, pause) {
			s.transition(Stopped, "")
			return nil
		}
		if pause *= 2; absent {
			pause = retryOpen
		} else if pause > maxRetryOpen {
			pause = maxRetryOpen
		}
	}
}

// pause waits, without a board; false: ctx ended.
func (s *Session) pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return false
		case <-s.posts.bell:
			s.work()
		case <-t.C:
			return true
		}
	}
}

// serve runs the opened board; again tells that it has to be opened anew.
func (s *Session) serve(ctx context.Context) (again bool) {
	stop, err := doorbell.NewEventfd()
	if err != nil {
		// Out of descriptors or memory, which passes.
		s.transition(Quiescing, "")
		s.fail(err)
		s.cfg.Log.Warn("the link cannot be served now", "link", s.cfg.Name, "error", err)
		select {
		case <-ctx.Done():
			return false
		case <-time.After(retryOpen):
			return true
		}
	}
	s.ctx = ctx
	s.bell = make(chan struct{}, 1)
	done := make(chan struct{})
	go s.listen(stop, s.bell, done)
	s.tick = time.NewTicker(s.cfg.Beat)
	defer func() {
		s.tick.Stop()
		stop.Ring()
		<-done
		stop.Close()
	}()
	served, _ := s.b.(board.Served)
	s.safely(func() { s.poll(false) })
	for {
		s.safely(func() { s.handle(false) })
		look := false // at the board itself
		select {
		case <-ctx.Done():
			s.safely(s.leave)
			return false
		case <-s.tick.C:
			s.safely(func() {
				s.poll(true)
				s.handle(true)
			})
			look = !s.link.Up()
			if served != nil && served.ServerLost() && look {
				s.safely(s.down)
				return true
			}
		case <-s.bell:
			s.safely(func() { s.poll(false) })
		case <-s.b.Events():
			look = true
			s.ended = true
			s.safely(func() {
				s.link.Look()
				s.poll(false)
			})
		case <-s.wake:
			s.safely(func() { s.handle(true) })
		case <-s.posts.bell:
			s.work()
		}
		if gone := s.gone(look); gone != nil {
			// Let go at once: the kernel waits for it with an unplugging.
			s.fail(gone)
			s.cfg.Log.Warn("the board is gone", "link", s.cfg.Name, "board", s.cfg.Spec, "error", gone)
			s.safely(s.down)
			return true
		}
	}
}

// handle tells the owner what is due, outside of poll: the owner may call back.
func (s *Session) handle(tick bool) {
	s.busy = true
	if s.upNow {
		s.upNow = false
		s.requests.Reset()
		s.fail(nil)
		s.transition(Up, "")
		s.cfg.Log.Info("link up", "link", s.cfg.Name, "epoch", fmt.Sprintf("0x%08x", s.link.Epoch()), "peer_epoch", fmt.Sprintf("0x%08x", s.link.PeerEpoch()))
		s.cfg.Handler.Up()
		tick = true
	}
	for n := 0; !s.downNow && s.link.Up(); n++ {
		if n == batch {
			s.again()
			break
		}
		var m virtiomsg.Slot
		if !s.next(&m) {
			break
		}
		h, err := m.Header()
		switch {
		case err != nil:
			atomic.AddUint64(&s.n.Malformed, 1)
			s.cfg.Handler.Malformed(&m, err)
		case h.Response():
			s.requests.Match(h) // too late for whoever asked
			atomic.AddUint64(&s.n.Unexpected, 1)
		default:
			s.cfg.Handler.Message(h, &m)
		}
		s.ring()
	}
	if tick && !s.downNow && s.link.Up() {
		s.cfg.Handler.Tick()
	}
	s.busy = false
	if s.downNow {
		s.down()
	}
	s.poll(false)
}

// safely runs f, which touches the window: a bus error there takes the link down, not the
// program.
func (s *Session) safely(f func()) {
	if err := pci.Guard(f); err != nil {
		s.Fault(err)
	}
}

// Fault takes the link down after a bus error at the window, here or in a loop of the owner.
func (s *Session) Fault(err error) {
	s.faulted = true
	s.busy, s.upNow = false, false
	s.fail(err)
	if s.link.Fault() {
		s.cfg.Log.Warn("bus error", "link", s.cfg.Name, "board", s.cfg.Spec, "error", err)
		s.downNow = true
		s.down()
	}
}

// listen turns rings of vector 0 into tokens.
func (s *Session) listen(stop *doorbell.Eventfd, bell chan<- struct{}, done chan<- struct{}) {
	defer close(done)
	w := s.assigned.Waiter(0)
	sl := doorbell.NewSleeper(doorbell.SleeperConfig{Doorbell: w, Stop: stop, Counters: s.bells})
	rings := NewBucket(bellRate)
	for {
		why, err := sl.Sleep(0)
		if err != nil || why&doorbell.Stopped != 0 {
			return // the beat goes on polling
		}
		sl.Found(why&doorbell.Rung != 0)
		if why&doorbell.Rung != 0 || w.FD() < 0 {
			select {
			case bell <- struct{}{}:
			default:
			}
		}
		if why&doorbell.Rung != 0 {
			now := time.Now()
			if rings.Wait(now) > 0 {
				time.Sleep(bellPause)
			}
			rings.Take(now, 1)
		}
	}
}

// after calls again in a while.
func (s *Session) after(d time.Duration) {
	if d < time.Millisecond {
		d = time.Millisecond // several at once
	}
	at := time.Now().Add(d)
	if s.due.IsZero() || at.Before(s.due) {
		s.due = at
		bell := s.bell // of this board
		time.AfterFunc(d, func() { ring(bell) })
	}
}

// again lets this side's other work come first, then go on.
func (s *Session) again() { ring(s.bell) }

func (s *Session) ring() {
	if s.link.NeedRing() && s.ctl != nil && s.ctl.Ring() != nil {
		atomic.AddUint64(&s.n.RingErrors, 1)
	}
}

func ring(bell chan<- struct{}) {
	select {
	case bell <- struct{}{}:
	default:
	}
}
