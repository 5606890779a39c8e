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

// A board that cannot be opened is tried again after retryOpen. Where it is absent, that stays the
// interval: it costs little, and the board is to come up soon after it is there. After any other
// error the interval doubles with each try, up to maxRetryOpen.
var (
	retryOpen    = 250 * time.Millisecond
	maxRetryOpen = 4 * time.Second
)

// errWaiting: the board is being opened.
var errWaiting = errors.New("the board is being opened")

// opening is what comes of opening a board.
type opening struct {
	b   board.Board
	err error
}

// openBoard opens the board, which may take any time. When ctx has ended nobody waits for it: a board
// that comes later is closed.
func (s *Session) openBoard(ctx context.Context) chan opening {
	c := make(chan opening)
	go func() {
		b, err := board.Open(s.cfg.Spec, s.cfg.Options)
		select {
		case c <- opening{b, err}:
		case <-ctx.Done():
			if err == nil {
				b.Close()
			}
		}
	}()
	return c
}

// prepared is a board with what is made for it before it can be served.
type prepared struct {
	b        board.Board
	link     *virtiomsg.Link
	assigned *doorbell.Assigned
	users    map[QueueID]int
	unheard  *doorbell.Eventfd
	err      error
}

// prepare has the owner declare, and shows this side to the peer. Where that fails the board is closed. It is called
// as a method of the Handler is.
func (s *Session) prepare(b board.Board) (p prepared) {
	p.b = b
	err := pci.Guard(func() { p.err = s.makeLink(&p) })
	if err != nil {
		p.err = fmt.Errorf("board %s: %w", s.cfg.Spec, err)
	}
	if p.err == nil {
		return p
	}
	if p.assigned != nil {
		p.assigned.Close()
	}
	if p.unheard != nil {
		p.unheard.Close()
	}
	b.Close()
	return p
}

func (s *Session) makeLink(p *prepared) error {
	b := p.b
	decl, err := s.cfg.Handler.Declare(b)
	if err != nil {
		return err
	}
	self := b.Self()
	decl.Ring = self
	p.link, err = virtiomsg.NewLink(virtiomsg.LinkConfig{Window: b.Window(), Side: s.cfg.Options.Side, Self: decl,
		PeerDead: b.PeerDead, LostTicks: s.cfg.LostBeats,
		CanRing: func(r board.RingInfo) error {
			_, err := b.Ringer(r, 0)
			return err
		}})
	if err == nil {
		p.unheard, err = doorbell.NewEventfd()
	}
	if err == nil {
		err = s.assign(p, self)
	}
	if err == nil {
		err = p.link.Start()
	}
	if err != nil {
		return fmt.Errorf("board %s: %w", s.cfg.Spec, err)
	}
	return nil
}

// assign gives the control plane and each queue the end of its doorbell.
func (s *Session) assign(p *prepared, self board.RingInfo) error {
	vectors := vectorsOf(self)
	bells := make([]doorbell.Waiter, vectors)
	for v := range bells {
		bells[v] = p.b.Waiter(uint32(v))
		if s.cfg.NoInterrupts {
			bells[v] = doorbell.None
		}
	}
	qs := s.cfg.Handler.Queues()
	users := make([]doorbell.User, 1+len(qs))
	users[0].Class = doorbell.Control
	p.users = make(map[QueueID]int, len(qs))
	for i, q := range qs {
		users[1+i] = userOf(q, vectors)
		p.users[q.QueueID] = 1 + i
	}
	var err error
	p.assigned, err = doorbell.Assign(bells, users)
	return err
}

// userOf returns which of this side's doorbells a queue is rung by.
func userOf(q Queue, vectors uint32) doorbell.User {
	return doorbell.User{Bell: int(virtiomsg.Vector(q.Dev, uint32(q.Queue), vectors)), Class: q.Class}
}

// adopt takes a board that is prepared over.
func (s *Session) adopt(p prepared) {
	atomic.AddUint64(&s.n.Opened, 1)
	s.b, s.link, s.assigned, s.users, s.unheard, s.ctl = p.b, p.link, p.assigned, p.users, p.unheard, nil
	s.heldTill, s.due = time.Time{}, time.Time{}
	s.reopen, s.gone, s.owes, s.told, s.sure, s.look, s.redo = false, false, false, false, false, false, false
	s.mu.Lock()
	s.shown, s.shownL = p.b, p.link
	s.mu.Unlock()
	s.fail(nil)
	s.transition(Listening, "")
}

// serve begins to serve the board that was adopted: by the clock, and by its doorbell.
func (s *Session) serve() {
	s.cfg.Log.Info("board opened", "link", s.cfg.Name, "board", s.cfg.Spec, "side", s.cfg.Options.Side.String(),
		"window", s.b.Window().Mem.Size(), "memory", s.b.Window().Mem.Kind().String())
	s.waiting, s.retry = "", retryOpen
	s.bell, s.heard = make(chan struct{}, 1), make(chan struct{})
	go s.listen(s.assigned.Waiter(0), s.unheard, s.bell, s.heard)
	s.tick = time.NewTicker(s.cfg.Beat)
	if s.ending {
		s.quiesce()
	} else {
		s.poll(false)
	}
}

// openFailed notes an error of opening the board.
func (s *Session) openFailed(err error) {
	atomic.AddUint64(&s.n.OpenErrors, 1)
	s.fail(err)
}

// wait puts the next attempt to open the board off, or gives the link up.
func (s *Session) wait(err error) {
	s.openFailed(err)
	absent := errors.Is(err, board.ErrAbsent)
	if !s.cfg.Retry && !absent && atomic.LoadUint64(&s.n.Opened) == 0 && (s.waiting == "" || board.Lasting(err)) {
		s.err = err
		s.transition(GivenUp, "")
		return
	}
	if text := err.Error(); text != s.waiting {
		tell := s.cfg.Log.Warn
		if absent {
			tell = s.cfg.Log.Info
		}
		tell("waiting for the board", "link", s.cfg.Name, "board", s.cfg.Spec, "error", err)
		s.waiting, s.retry = text, retryOpen
	}
	s.transition(Absent, "")
	s.pause = time.NewTimer(s.retry)
	if s.retry *= 2; absent {
		s.retry = retryOpen
	} else if s.retry > maxRetryOpen {
		s.retry = maxRetryOpen
	}
}

// askBoard asks the board whether it is still there, which may take any time.
func (s *Session) askBoard() {
	s.look = false
	v, ok := s.b.(board.Vanishing)
	if !ok {
		return
	}
	s.asking = true
	asked := s.asked
	go func() { asked <- v.Gone() }()
}

// lost lets go of a board that is lost, at once: the kernel waits for it with an unplugging.
func (s *Session) lost(err error) {
	if s.gone {
		return
	}
	s.gone, s.reopen = true, true
	s.fail(err)
	s.cfg.Log.Warn("the board is gone", "link", s.cfg.Name, "board", s.cfg.Spec, "error", err)
	if s.quiesce(); s.in(Leaving) {
		s.transition(Closing, "")
	}
}

// close gives the board back, which may take any time.
func (s *Session) close() {
	s.closing = true
	s.tick.Stop()
	s.tick = nil
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
	b, assigned, unheard, heard, closed := s.b, s.assigned, s.unheard, s.heard, s.closed
	s.b, s.link, s.assigned, s.users, s.unheard, s.heard = nil, nil, nil, nil, nil, nil
	go func() {
		unheard.Ring()
		<-heard
		unheard.Close()
		if err := assigned.Close(); err != nil {
			s.cfg.Log.Warn("doorbells do not close", "link", s.cfg.Name, "error", err)
		}
		if err := b.Close(); err != nil {
			s.cfg.Log.Warn("board does not close", "link", s.cfg.Name, "error", err)
		}
		closed <- struct{}{}
	}()
}

// isClosed goes on behind close.
func (s *Session) isClosed() {
	s.closing = false
	if s.ending {
		s.transition(Stopped, "")
		return
	}
	s.cfg.Log.Warn("opening the board anew", "link", s.cfg.Name, "board", s.cfg.Spec)
	s.transition(Absent, "")
}
