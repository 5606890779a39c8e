package session

import (
	"context"
	"time"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/pci"
	"github.com/boardlink/boardlink/virtiomsg"
)

// batch limits how many messages and steps of the handshake are taken in a row: a peer that never
// stops must not keep this side from its clock, its signals and its other work.
const batch = 2 * virtiomsg.MaxSlots

// run is the session's loop: one event after the other, and after each what has to be done then. It waits nowhere but
// here. What may take its time has a goroutine of its own, whose end is an event: the owner's methods (job), and to
// open, to ask and to close a board.
//
// Events are handled by whoever has the turn: this goroutine, or the owner's, where it calls the Session (onLoop) and
// where its method has ended (own). That spares two changes of goroutines for each message.
func (s *Session) run(ctx context.Context) error {
	s.turn.Lock()
	defer s.turn.Unlock()
	s.runs, s.ctx = true, ctx
	s.jobs, s.asked, s.closed = make(chan func() error, 1), make(chan error, 1), make(chan struct{}, 1)
	go s.own(s.jobs)
	stop := ctx.Done()
	if s.b != nil {
		s.safely(s.serve)
	}
	for !s.proceed() {
		on := s.waitsOn()
		s.on = on
		var tick <-chan time.Time
		var events <-chan struct{}
		if on.tick != nil {
			tick, events = on.tick.C, s.b.Events()
		}
		bell := s.bell
		s.turn.Unlock()
		select {
		case <-stop:
			s.turn.Lock()
			stop = nil
			s.end()
		case <-s.turned:
			s.turn.Lock()
		case o := <-on.opened:
			s.turn.Lock()
			s.opened = nil
			if o.err != nil {
				s.opening = false
				s.wait(o.err)
			} else {
				s.fresh = o.b
			}
		case <-fires(on.pause):
			s.turn.Lock()
			s.pause = nil
		case err := <-s.asked:
			s.turn.Lock()
			s.asking = false
			if err != nil {
				s.lost(err)
			}
		case <-s.closed:
			s.turn.Lock()
			s.isClosed()
		case <-fires(on.leave):
			s.turn.Lock()
			s.leave = nil
			if s.in(Leaving) {
				s.transition(Closing, "")
			}
		case <-tick:
			s.turn.Lock()
			s.beat()
		case <-bell:
			s.turn.Lock()
			s.safely(func() { s.poll(false) })
		case <-events:
			s.turn.Lock()
			s.boardEvent()
		case <-s.wake:
			s.turn.Lock()
			s.tickDue = true
		case <-s.posts.bell:
			s.turn.Lock()
		}
	}
	close(s.jobs)
	s.runs = false
	return s.err
}

// waits is what the loop's goroutine waits on, as far as that changes.
type waits struct {
	over         bool // it does not wait
	opened       chan opening
	pause, leave *time.Timer
	tick         *time.Ticker
}

func (s *Session) waitsOn() waits {
	return waits{over: s.in(GivenUp, Stopped) && s.job == jobNone, opened: s.opened, pause: s.pause, leave: s.leave, tick: s.tick}
}

// giveTurn goes on behind an event that was not handled by the loop's goroutine, and gives the turn back.
func (s *Session) giveTurn() {
	defer s.turn.Unlock()
	s.safely(func() { s.proceed() })
	if s.waitsOn() != s.on {
		ring(s.turned)
	}
}

// boardEvent looks what happened to the board, or to the processes of the other side.
func (s *Session) boardEvent() {
	if s.link == nil {
		return
	}
	s.look, s.ended = true, true
	s.link.Look()
	s.safely(func() { s.poll(false) })
}

func fires(t *time.Timer) <-chan time.Time {
	if t == nil {
		return nil
	}
	return t.C
}

// proceed begins what is due in the present state, and tells whether the session is over.
func (s *Session) proceed() (over bool) {
	for {
		before := s.at()
		switch before {
		case Starting, Absent:
			s.proceedAbsent()
		case Listening, Handshake, Held:
			s.mayAsk()
			s.work()
		case Up:
			s.mayAsk()
			s.safely(s.serveCalls)
			if s.job == jobNone && s.at() == Up {
				s.safely(s.serveOwner)
			}
		case Quiescing:
			s.proceedQuiescing()
		case Closing:
			if s.job == jobNone && !s.asking && !s.closing {
				s.close()
			}
			s.work()
		case Stuck:
			s.mayAsk()
			if s.job == jobNone && !s.asking && !s.closing {
				s.unstuck()
			}
		case GivenUp, Stopped:
			return s.job == jobNone
		}
		if s.at() == before {
			return false
		}
	}
}

func (s *Session) proceedAbsent() {
	switch {
	case s.job != jobNone:
	case s.fresh != nil:
		b := s.fresh
		s.fresh = nil
		s.begin(jobPrepare, func() { s.prepared = s.prepare(b) })
	case s.ending:
		if s.pause != nil {
			s.pause.Stop()
		}
		s.transition(Stopped, "")
	case !s.opening && s.pause == nil:
		s.opening, s.opened = true, s.openBoard(s.ctx)
	}
	if s.in(Starting, Absent) {
		s.work()
	}
}

// mayAsk asks the board whether it is there, where there is reason to.
func (s *Session) mayAsk() {
	if s.look && !s.asking {
		s.askBoard()
	}
}

// proceedQuiescing has the owner let go, and goes on when it has.
func (s *Session) proceedQuiescing() {
	if s.job != jobNone {
		return
	}
	if !s.told {
		s.told = true
		s.begin(jobDown, func() { s.Stopping(s.cfg.Handler.Down) })
		return
	}
	if s.owes && !s.ending && !s.gone {
		// What is read of a board that cannot be reached may look like anything that a peer does.
		if !s.asking && !s.sure {
			s.sure = true
			s.askBoard()
		}
		if s.asking {
			return
		}
	}
	s.quiesced()
}

// beat is the clock's.
func (s *Session) beat() {
	if s.link == nil {
		return
	}
	s.safely(func() { s.poll(true) })
	s.tickDue = true
	if s.in(Listening, Handshake, Held) {
		s.look = true
		if served, ok := s.b.(board.Served); ok && served.ServerLost() {
			s.reopen = true
			s.quiesce()
		}
	}
}

// end begins to stop.
func (s *Session) end() {
	s.ending, s.deadline = true, time.Now().Add(s.stopLimit())
	if s.link != nil {
		s.quiesce()
	}
}

// job is a method of the Handler that is under way.
type job uint8

const (
	jobNone    job = iota
	jobPrepare     // Declare, and what goes with it
	jobDown
	jobOther
)

// own is the owner's goroutine.
func (s *Session) own(jobs <-chan func() error) {
	for f := range jobs {
		fault := f()
		s.turn.Lock()
		s.jobEnded(fault)
		s.giveTurn()
	}
}

// begin has the owner's goroutine run f. None is under way.
func (s *Session) begin(j job, f func()) {
	s.job = j
	s.jobs <- func() error { return pci.Guard(f) } // has room
}

// work has the owner's goroutine run what is posted next, if it is idle.
func (s *Session) work() {
	if s.job != jobNone {
		return
	}
	if j := s.posts.next(); j != nil {
		s.job = jobOther
		s.jobs <- j.run
	}
}

// jobEnded goes on behind a method of the Handler; fault is a bus error that ended it, or nil.
func (s *Session) jobEnded(fault error) {
	j := s.job
	s.job = jobNone
	if j == jobPrepare {
		s.opening = false
		p := s.prepared
		s.prepared = prepared{}
		if p.err != nil {
			s.wait(p.err)
			return
		}
		s.adopt(p)
		s.safely(s.serve)
		return
	}
	if fault != nil {
		if j == jobDown && !s.redo { // some loops may not have been stopped
			s.redo, s.told = true, false
		}
		s.fault(fault)
	}
	s.safely(func() { s.poll(false) })
}

// safely runs f, which touches the window: a bus error there takes the link down, not the
// program.
func (s *Session) safely(f func()) {
	if err := pci.Guard(f); err != nil {
		s.fault(err)
	}
}

// onLoop does f as an event of the loop. It returns false where no loop runs. Only what the loop does itself must not
// call it.
func (s *Session) onLoop(f func()) bool {
	s.turn.Lock()
	if !s.runs {
		s.turn.Unlock()
		return false
	}
	s.safely(f)
	s.giveTurn()
	return true
}

// listen turns rings of vector 0 into tokens.
func (s *Session) listen(w doorbell.Waiter, stop *doorbell.Eventfd, bell chan<- struct{}, done chan<- struct{}) {
	defer close(done)
	sl := doorbell.NewSleeper(doorbell.SleeperConfig{Doorbell: w, Stop: stop, Counters: s.bells})
	rings := NewBucket(bellRate)
	for {
		why, err := sl.Sleep(0)
		if err != nil || why&doorbell.Stopped != 0 {
			return // the beat goes on polling
		}
		sl.Found(why&doorbell.Rung != 0)
		if why&doorbell.Rung != 0 || w.FD() < 0 {
			ring(bell)
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

func ring(bell chan<- struct{}) {
	select {
	case bell <- struct{}{}:
	default:
	}
}
