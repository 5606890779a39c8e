// Package session keeps one end of a link going: it opens the board, runs the epoch handshake by the clock
// and the doorbell, hands over messages, and tells its owner when memory may be used and when to
// let go of it. Host and agent are its two owners.
//
// In the room: the control goroutine, its clock, who waits on which doorbell. Never in it: what
// messages mean, devices, rings, interfaces.
package session

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/pci"
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/virtiomsg"
)

// Logger hears what happens; *slog.Logger is one. Arguments behind the message are pairs of
// names and values.
type Logger interface {
	Debug(msg string, args ...interface{})
	Info(msg string, args ...interface{})
	Warn(msg string, args ...interface{})
	Error(msg string, args ...interface{})
}

// Beat is the default interval of the heartbeat.
const Beat = 100 * time.Millisecond

// A board that cannot be opened is tried again after retryOpen. Where it is absent, that stays the
// interval: it costs little, and the board is to come up soon after it is there. After any other
// error the interval doubles with each try, up to maxRetryOpen.
var (
	retryOpen    = 250 * time.Millisecond
	maxRetryOpen = 4 * time.Second
)

// batch limits how many messages and steps of the handshake are taken in a row: a peer that never
// stops must not keep this side from its clock, its signals and its other work.
const batch = 2 * virtiomsg.MaxSlots

// maxDeferred limits the requests and events that are put aside while this side waits for an answer. A
// peer that keeps to docs/wire.md has at most MaxSlots requests under way, and events are merged.
const maxDeferred = 4 * virtiomsg.MaxSlots

// stopTime limits how long a clean stop waits for the peer to let go.
const stopTime = time.Second

// stopLimit is how long a link may take to stop, and its loops at any time, before it counts as stuck: the clean stop, and what
// frees a loop that blocks, take less.
const stopLimit = 5 * time.Second

// ErrStuck is what Run returns when the link did not stop in time: something of it is blocked. Its memory and its
// descriptors stay as they are, and its devices must not be closed.
var ErrStuck = fmt.Errorf("the link did not stop within %v: something of it is blocked, and it is left as it is", stopLimit)

// QueueID names a virtqueue of a link.
type QueueID struct {
	Dev   uint16 // device number
	Queue int
}

// Handler is the owner of a Session. All methods are called on the Session's goroutine, and
// may use the Session's methods.
type Handler interface {
	// Queues lists the queues for which this side will be rung.
	Queues() []QueueID
	// Declare says what the link page is to declare of this side; Ring is filled in.
	Declare(b board.Board) (virtiomsg.Declaration, error)
	// Up: all memory of this side may be rewritten, messages may be sent.
	Up()
	// Down: when it returns, nothing of this side touches shared memory. It may come without
	// an Up before.
	Down()
	// Message hands over a request or an event of the peer. A request comes when its answer has room,
	// so that Send of one message succeeds as long as the link is up. Requests of the bus may come
	// while Call waits.
	Message(h virtiomsg.Header, m *virtiomsg.Slot)
	// Malformed tells of a message that makes no sense.
	Malformed(m *virtiomsg.Slot, err error)
	// Tick comes once a beat, and soon after Wake, while the link is up.
	Tick()
}

// Pacer is a Handler that puts requests off: what Wait returns for one is how long, 0 for not at all.
// It stays where it is meanwhile, and everything behind it.
type Pacer interface {
	Wait(h virtiomsg.Header, m *virtiomsg.Slot) time.Duration
}

// Config describes a Session.
type Config struct {
	Name    string // of the link, for the log
	Spec    string // of the board: "loopback:/run/a.sock"
	Options board.Options
	Log     Logger
	// Beat is the interval of the heartbeat, LostBeats after how many without the peer's it counts as
	// lost; 0 means Beat, and 10.
	Beat      time.Duration
	LostBeats int
	// NoInterrupts leaves this side's doorbells unheard: it polls.
	NoInterrupts bool
	// Retry makes Run try to open the board again and again whatever is wrong with it, from the
	// first try on: for a program with several boards, where one must not stop the others.
	Retry   bool
	Handler Handler
	// Pace bounds what the peer may cause.
	Pace Pace
}

// Counters of a session, updated with sync/atomic.
type Counters struct {
	Opened      uint64 // boards opened
	OpenErrors  uint64 // attempts to open the board that failed
	RingErrors  uint64 // the peer could not be rung for the control plane
	Malformed   uint64 // messages that make no sense
	Unexpected  uint64 // answers that nobody waits for
	CallTimeout uint64 // requests without an answer
	Floods      uint64 // links taken down because the peer sent more than is kept
	Stuck       uint64 // times that loops, or the whole link, did not stop in time
	NoRoom      uint64 // requests that waited for room for their answers
	Throttled   uint64 // messages that waited because the peer sends too many, or asks for too much
	Merged      uint64 // events dropped because a later one says all that they said
	Backoffs    uint64 // handshakes put off because the peer breaks the link again and again
}

// Session is one end of a link.
type Session struct {
	n Counters // first: 64-bit alignment

	cfg  Config
	wake chan struct{}

	// The session's goroutine only.
	ctx      context.Context // of serve: Call ends with it
	b        board.Board
	link     *virtiomsg.Link
	assigned *doorbell.Assigned
	users    map[QueueID]int
	peer     virtiomsg.Declaration
	ctl      doorbell.Ringer // rings the peer's vector 0
	bell     chan struct{}
	tick     *time.Ticker
	requests virtiomsg.Requests
	deferred []virtiomsg.Slot
	head     virtiomsg.Slot // the next message, not taken yet
	peeked   bool           // head is one
	stalled  bool           // it was counted that head has to wait
	messages Bucket
	breaks   Bucket
	backoff  time.Duration
	heldTill time.Time // the handshake is put off until then; zero: it is not
	tries    int       // pages of the peer that were read since the link was up
	ended    bool      // a process of the other side came or went since the link was up
	due      time.Time // when again is called by the clock; zero: it is not
	upNow    bool      // Up has to be told
	downNow  bool      // Down has to be told
	busy     bool      // inside a Handler: Up and Down wait
	faulted  bool      // a bus error: look whether the board is there

	mu     sync.Mutex // guards what Status reads
	state  string
	since  time.Time
	last   string // error
	shown  board.Board
	shownL *virtiomsg.Link
	counts map[string]uint64 // of the boards that were closed
	epochs [2]uint32
	bells  *doorbell.Counters
}

// New returns a Session; Run runs it.
func New(c Config) *Session {
	if c.Beat <= 0 {
		c.Beat = Beat
	}
	c.Log = Limit(c.Log)
	c.Pace = c.Pace.Defaults()
	s := &Session{cfg: c, ctx: context.Background(), messages: NewBucket(c.Pace.Messages), breaks: NewBucket(c.Pace.Breaks),
		wake: make(chan struct{}, 1), bells: new(doorbell.Counters)}
	s.setState("starting")
	return s
}

// Open opens the board, so that what is wrong with it shows before Run: nothing is said of the link
// yet. That it is absent is no error: Run waits for it. Run has to follow, unless there was an error
// and Config.Retry is not set. It returns nil early when ctx ends: Run does not wait then.
func (s *Session) Open(ctx context.Context) error {
	err := s.open(ctx)
	if err == nil || ctx.Err() != nil {
		return nil
	}
	s.fail(err)
	absent := errors.Is(err, board.ErrAbsent)
	if absent || s.cfg.Retry {
		s.setState(stateWaiting)
	}
	if absent {
		return nil
	}
	return err
}

// Run keeps the link going until ctx ends (nil), or until the link is given up because its board
// cannot be opened. With Config.Retry it never is. Without:
//
//	at the first try              an absent board is waited for, every other error is returned
//	while waiting for the board   errors that last (board.Lasting) are returned, others waited for
//	after the board was open      whatever is wrong is waited for
//
// A link that has not stopped some seconds after the end of ctx is left: the error is ErrStuck.
func (s *Session) Run(ctx context.Context) error {
	done := make(chan error, 1)
	go func() { done <- s.run(ctx) }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	limit := time.NewTimer(stopLimit)
	defer limit.Stop()
	select {
	case err := <-done:
		return err
	case <-limit.C:
		s.stuck(ErrStuck.Error())
		return ErrStuck
	}
}

// stuck shows that something of the link does not stop.
func (s *Session) stuck(what string) {
	atomic.AddUint64(&s.n.Stuck, 1)
	s.setState(stateStuck)
	s.fail(errors.New(what))
	s.cfg.Log.Error("the link is stuck", "link", s.cfg.Name, "error", what)
}

// Stopping runs f, which stops loops of the owner. Where it takes too long, status and log tell; memory and descriptors are kept
// until it returns.
func (s *Session) Stopping(f func()) {
	s.mu.Lock()
	before := s.state
	s.mu.Unlock()
	told := make(chan struct{})
	t := time.AfterFunc(stopLimit, func() {
		defer close(told)
		s.stuck(fmt.Sprintf("its loops have not stopped for %v: they are blocked; memory and descriptors are kept until they stop", stopLimit))
	})
	defer func() {
		if t.Stop() {
			return
		}
		<-told
		if s.ctx.Err() == nil { // else it is what Run tells
			s.setState(before)
		}
	}()
	f()
}

func (s *Session) run(ctx context.Context) error {
	var waiting string // the error that was logged last; empty: none since the board was open
	pause := retryOpen
	for {
		var err error
		if s.b == nil {
			err = s.open(ctx)
		}
		if ctx.Err() != nil && s.b == nil {
			return nil
		}
		if err == nil {
			s.cfg.Log.Info("board opened", "link", s.cfg.Name, "board", s.cfg.Spec, "side", s.cfg.Options.Side.String(),
				"window", s.b.Window().Mem.Size(), "memory", s.b.Window().Mem.Kind().String())
			waiting, pause = "", retryOpen
			again := s.serve(ctx)
			s.close()
			if !again {
				return nil
			}
			s.cfg.Log.Warn("opening the board anew", "link", s.cfg.Name, "board", s.cfg.Spec)
			s.setState(stateWaiting)
			continue
		}
		s.fail(err)
		absent := errors.Is(err, board.ErrAbsent)
		if !s.cfg.Retry && !absent && atomic.LoadUint64(&s.n.Opened) == 0 && (waiting == "" || board.Lasting(err)) {
			s.setState(stateGivenUp)
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
		s.setState(stateWaiting)
		t := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			t.Stop()
			return nil
		case <-t.C:
		}
		if pause *= 2; absent {
			pause = retryOpen
		} else if pause > maxRetryOpen {
			pause = maxRetryOpen
		}
	}
}

// States of a session in which it has no board, as Status tells them.
const (
	stateWaiting = "waiting for the board"
	stateGivenUp = "given up" // Run has returned an error
	stateStuck   = "stuck"    // something does not stop
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
	select {
	case r := <-c:
		return r.b, r.err
	case <-ctx.Done():
		return nil, ctx.Err()
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
	s.setState("waiting for the peer")
	return nil
}

// assign gives the control plane and each queue the end of its doorbell.
func (s *Session) assign(b board.Board, self board.RingInfo) error {
	vectors := self.Vectors
	if vectors == 0 {
		vectors = 1
	}
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

// serve runs the opened board; again tells that it has to be opened anew.
func (s *Session) serve(ctx context.Context) (again bool) {
	stop, err := doorbell.NewEventfd()
	if err != nil {
		// Out of descriptors or memory, which passes.
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

// gone asks the board whether it is still there.
func (s *Session) gone(look bool) error {
	v, ok := s.b.(board.Vanishing)
	if !ok || !look && !s.faulted {
		return nil
	}
	s.faulted = false
	return v.Gone()
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

// poll moves the handshake on.
func (s *Session) poll(tick bool) {
	now := time.Now()
	if !s.due.After(now) {
		s.due = time.Time{}
	}
	if !s.heldTill.IsZero() && !s.heldTill.After(now) {
		s.heldTill, s.tries = time.Time{}, 0
		s.link.Hold(false)
		s.setState("waiting for the peer")
	}
	for n := 0; ; n++ {
		if n == batch {
			s.again()
			return
		}
		ev, err := s.link.Poll(tick)
		tick = false
		if err != nil {
			s.fail(err)
			s.cfg.Log.Warn("the other side's link page is refused", "link", s.cfg.Name, "error", err)
			s.tried()
		}
		switch ev {
		case virtiomsg.EventNone:
			s.epoch()
			s.ring()
			return
		case virtiomsg.EventPeer:
			s.peer, _ = s.link.Peer()
			if s.ctl, err = s.ringer(s.peer.Ring); err != nil {
				s.ctl = nil
				s.cfg.Log.Warn("the other side cannot be rung, it has to poll", "link", s.cfg.Name, "error", err)
			}
			s.setState("shaking hands")
			s.tried()
		case virtiomsg.EventUp:
			s.upNow = true
			s.tries, s.ended = 0, false
		case virtiomsg.EventQuiesce:
			s.upNow, s.downNow = false, true
			if s.busy {
				s.epoch()
				return
			}
			s.down()
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
		s.setState("up")
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

// next takes the next message that may be handled now: one that was put aside, or from the FIFO. A
// request waits there until its answer has room.
func (s *Session) next(m *virtiomsg.Slot) bool {
	if !s.peeked {
		if len(s.deferred) > 0 {
			s.head = s.deferred[0]
		} else if ok, err := s.link.Peek(&s.head); err != nil || !ok {
			s.bad(err)
			return false
		}
		s.peeked, s.stalled = true, false
	}
	now := time.Now()
	wait := s.messages.Wait(now)
	if h, err := s.head.Header(); err == nil && wait == 0 && !h.Response() && !h.Event() {
		room, err := s.link.Room()
		if err != nil || !room {
			s.bad(err)
			s.stall(&s.n.NoRoom)
			return false // the peer rings when it has taken messages
		}
		if p, ok := s.cfg.Handler.(Pacer); ok {
			wait = p.Wait(h, &s.head)
		}
	}
	if wait > 0 {
		s.stall(&s.n.Throttled)
		s.after(wait)
		return false
	}
	s.messages.Take(now, 1)
	s.peeked = false
	if len(s.deferred) > 0 {
		s.deferred = s.deferred[1:]
	} else {
		s.link.Take()
	}
	*m = s.head
	return true
}

// stall counts a message that has to wait, once.
func (s *Session) stall(counter *uint64) {
	if !s.stalled {
		s.stalled = true
		atomic.AddUint64(counter, 1)
	}
}

// aside keeps a request or an event for later, and tells whether there was room for it.
func (s *Session) aside(m *virtiomsg.Slot) bool {
	for i := range s.deferred {
		if virtiomsg.Supersedes(m, &s.deferred[i]) {
			s.deferred[i] = *m
			atomic.AddUint64(&s.n.Merged, 1)
			return true
		}
	}
	if len(s.deferred) == maxDeferred {
		return false
	}
	s.deferred = append(s.deferred, *m)
	return true
}

// serveBus answers the requests of the bus among those that were put aside, as far as there is room: the
// other side may do nothing else before it has the answer. They touch no device.
func (s *Session) serveBus() {
	for i := 0; i < len(s.deferred); {
		h, err := s.deferred[i].Header()
		if err != nil || !h.Bus() || h.Event() {
			i++
			continue
		}
		if room, err := s.link.Room(); err != nil || !room {
			s.bad(err)
			return
		}
		m := s.deferred[i]
		s.deferred = append(s.deferred[:i], s.deferred[i+1:]...)
		s.cfg.Handler.Message(h, &m)
	}
}

// tried notes that the peer's page was read once more: one that changes it without end, and never
// comes up, is left alone for a while.
func (s *Session) tried() {
	if s.tries++; s.tries > freeTries {
		s.charge(costTry)
	}
}

// charge takes from what the peer may spoil, and puts the handshake off where nothing is left.
func (s *Session) charge(cost int) {
	now := time.Now()
	if !s.heldTill.IsZero() {
		return
	}
	if s.breaks.Wait(now) == 0 {
		s.breaks.Take(now, cost)
		s.backoff = 0
		return
	}
	if s.backoff *= 2; s.backoff < minBackoff {
		s.backoff = minBackoff
	}
	if s.backoff > MaxBackoff {
		s.backoff = MaxBackoff
	}
	atomic.AddUint64(&s.n.Backoffs, 1)
	s.cfg.Log.Warn("the other side breaks the link again and again: the next handshake waits", "link", s.cfg.Name, "wait", s.backoff.String())
	s.breaks.Skip(now, s.backoff)
	s.heldTill = now.Add(s.backoff)
	s.link.Hold(true)
	s.setState("waiting for the peer: it breaks the link again and again")
	s.after(s.backoff)
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

func (s *Session) bad(err error) {
	if err == nil || errors.Is(err, virtiomsg.ErrDown) {
		return
	}
	s.fail(err)
	s.cfg.Log.Warn("the other side breaks the link", "link", s.cfg.Name, "error", err)
}

// down lets the owner let go of shared memory and tells the peer.
func (s *Session) down() {
	was := s.downNow
	s.downNow = false
	s.deferred, s.peeked = nil, false
	s.Stopping(s.cfg.Handler.Down)
	if !was {
		return
	}
	if err := s.link.Quiesced(); err == nil {
		cost := costBreak
		if s.ended || s.link.Reason() == virtiomsg.ReasonDead {
			cost = costRestart
		}
		s.ended = false
		reason := s.link.Reason().String()
		// What is read of a board that cannot be reached may look like anything that a peer does.
		if v, ok := s.b.(board.Vanishing); ok {
			if gone := v.Gone(); gone != nil {
				reason, cost = "board out of reach", 0
				s.faulted = true // serve looks at it next
			}
		}
		s.setState("waiting for the peer: " + reason)
		s.cfg.Log.Warn("link down", "link", s.cfg.Name, "reason", reason)
		if cost > 0 {
			s.charge(cost)
		}
	}
}

// leave stops cleanly: the peer is told, and given time to let go.
func (s *Session) leave() {
	s.down()
	if s.link.Stop() != nil {
		return
	}
	s.setState("stopping")
	limit := time.NewTimer(stopTime)
	defer limit.Stop()
	tick := false
	for {
		for n := 0; n < batch; n++ {
			ev, _ := s.link.Poll(tick)
			tick = false
			s.ring()
			if ev == virtiomsg.EventStopped {
				return
			}
			if ev == virtiomsg.EventPeer {
				if d, ok := s.link.Peer(); ok {
					if r, err := s.ringer(d.Ring); err == nil {
						s.ctl = r
					}
				}
			}
			if ev == virtiomsg.EventNone {
				break
			}
		}
		select {
		case <-limit.C:
			return
		case <-s.bell:
		case <-s.b.Events():
		case <-s.tick.C:
			s.link.Look()
			tick = true
			// A peer that never was there lets go of nothing.
			if _, known := s.link.Peer(); !known {
				return
			}
		}
	}
}

// ringer returns what rings the peer's control plane, and does not block whatever the peer does.
func (s *Session) ringer(info board.RingInfo) (doorbell.Ringer, error) {
	r, err := s.b.Ringer(info, 0)
	if err != nil {
		return nil, err
	}
	return doorbell.NoWait(r), nil
}

func (s *Session) ring() {
	if s.link.NeedRing() && s.ctl != nil && s.ctl.Ring() != nil {
		atomic.AddUint64(&s.n.RingErrors, 1)
	}
}

// Wake asks for a Tick soon. Any goroutine may call it.
func (s *Session) Wake() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// ErrTimeout: a request was not answered in time.
var ErrTimeout = errors.New("the other side does not answer")

// Call sends a request and waits for its answer, for timeout at most. encode writes the
// request with the token it is given into the slot, which then receives the answer. It fails with
// virtiomsg.ErrDown when the link goes down meanwhile, or is to stop.
func (s *Session) Call(bus bool, id uint8, dev uint16, timeout time.Duration, m *virtiomsg.Slot, encode func(token uint16)) error {
	if s.ctx.Err() != nil {
		return virtiomsg.ErrDown
	}
	token, err := s.requests.Begin(bus, id, dev)
	if err != nil {
		return err
	}
	defer s.requests.Cancel(token)
	encode(token)
	s.peeked = false // it is put aside, too
	sent := false
	limit := time.NewTimer(timeout)
	defer limit.Stop()
	var in virtiomsg.Slot
	for {
		// Everything is taken meanwhile, requests without room for their answers, too: they may stand
		// before the answer.
		for n := 0; ; n++ {
			if n == batch {
				s.again()
				break
			}
			now := time.Now()
			if wait := s.messages.Wait(now); wait > 0 {
				s.after(wait)
				break
			}
			ok, err := s.link.Recv(&in)
			if err != nil {
				s.bad(err)
				return err
			}
			if !ok {
				break
			}
			s.messages.Take(now, 1)
			h, err := in.Header()
			switch {
			case err != nil:
				atomic.AddUint64(&s.n.Malformed, 1)
				s.cfg.Handler.Malformed(&in, err)
			case !h.Response():
				if !s.aside(&in) {
					atomic.AddUint64(&s.n.Floods, 1)
					s.cfg.Log.Warn("the other side sends requests without end and does not answer", "link", s.cfg.Name)
					s.Reset()
					return virtiomsg.ErrDown
				}
			case !s.requests.Match(h):
				atomic.AddUint64(&s.n.Unexpected, 1)
			case h.Token == token:
				*m = in
				return nil
			}
		}
		s.serveBus()
		if !sent {
			if err := s.link.Send(m); err == nil {
				sent = true
			} else if err != virtiomsg.ErrFIFOFull {
				s.bad(err)
				return err
			}
		}
		s.ring()
		select {
		case <-s.ctx.Done():
			return virtiomsg.ErrDown
		case <-limit.C:
			atomic.AddUint64(&s.n.CallTimeout, 1)
			return fmt.Errorf("%s, device %d: %w within %v", virtiomsg.MessageName(bus, id), dev, ErrTimeout, timeout)
		case <-s.bell:
			s.poll(false)
		case <-s.tick.C:
			s.poll(true)
		case <-s.b.Events():
			s.ended = true
			s.link.Look()
			s.poll(false)
		}
		if s.downNow {
			return virtiomsg.ErrDown
		}
	}
}

// Send sends a message. Errors: virtiomsg.ErrFIFOFull: try again later; others: the link is down, or
// about to go.
func (s *Session) Send(m *virtiomsg.Slot) error {
	err := s.link.Send(m)
	if err != virtiomsg.ErrFIFOFull {
		s.bad(err)
	}
	s.ring()
	return err
}

// Reset takes the link down, because of a peer that cannot be gone on with.
func (s *Session) Reset() {
	if s.link.Reset() {
		s.downNow, s.upNow = true, false
	}
}

// Up tells whether messages may be sent.
func (s *Session) Up() bool { return !s.downNow && s.link != nil && s.link.Up() }

// Waiter returns the end of the doorbell for a queue of this side's Queues. For others it is doorbell.None.
func (s *Session) Waiter(q QueueID) doorbell.Waiter {
	i, ok := s.users[q]
	if !ok {
		return doorbell.None
	}
	return s.assigned.Waiter(i)
}

// Ringer returns what rings the peer for a queue. A peer that cannot be rung has to poll: that has been logged, and
// what is returned does nothing.
func (s *Session) Ringer(q QueueID) doorbell.Ringer {
	r, err := s.b.Ringer(s.peer.Ring, virtiomsg.Vector(q.Dev, uint32(q.Queue), s.peer.Ring.Vectors))
	if err != nil {
		return board.Silent
	}
	return r
}

// Peer returns what the peer declares; while up.
func (s *Session) Peer() virtiomsg.Declaration { return s.peer }

// Board returns the board; between Declare and the end of Run.
func (s *Session) Board() board.Board { return s.b }

func (s *Session) setState(st string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.state != st {
		s.state, s.since = st, time.Now()
	}
}

func (s *Session) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last = ""
	if err != nil {
		s.last = err.Error()
	}
}

func (s *Session) epoch() {
	s.mu.Lock()
	s.epochs = [2]uint32{s.link.Epoch(), s.link.PeerEpoch()}
	s.mu.Unlock()
}

// Status returns what the session knows of the link. Any goroutine may call it.
func (s *Session) Status() status.Link {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := status.Link{Name: s.cfg.Name, Board: s.cfg.Spec, State: s.state, Since: s.since.Format(time.RFC3339Nano),
		Epoch: s.epochs[0], PeerEpoch: s.epochs[1], LastError: s.last, Regions: []status.Region{}}
	l.Counters = status.Counters(Counters{Opened: atomic.LoadUint64(&s.n.Opened), OpenErrors: atomic.LoadUint64(&s.n.OpenErrors), RingErrors: atomic.LoadUint64(&s.n.RingErrors),
		Malformed: atomic.LoadUint64(&s.n.Malformed), Unexpected: atomic.LoadUint64(&s.n.Unexpected), CallTimeout: atomic.LoadUint64(&s.n.CallTimeout),
		Floods: atomic.LoadUint64(&s.n.Floods), Stuck: atomic.LoadUint64(&s.n.Stuck), NoRoom: atomic.LoadUint64(&s.n.NoRoom), Throttled: atomic.LoadUint64(&s.n.Throttled),
		Merged: atomic.LoadUint64(&s.n.Merged), Backoffs: atomic.LoadUint64(&s.n.Backoffs)})
	for k, v := range status.Counters(s.bells.Snapshot()) {
		l.Counters["bell_"+k] = v
	}
	for k, v := range s.counts {
		l.Counters[k] = v
	}
	if c, ok := s.shown.(board.Counting); ok {
		for k, v := range c.Counters() {
			l.Counters[k] += v
		}
	}
	if s.shownL != nil {
		st := s.shownL.Stats()
		for k, v := range status.Counters(st) {
			l.Counters["link_"+k] = v
		}
		for r, v := range st.Downs {
			l.Counters["downs_"+reasonName(virtiomsg.Reason(r))] = v
		}
	}
	if s.shown != nil {
		w := s.shown.Window()
		l.Window = status.Window{Size: w.Mem.Size(), Kind: w.Mem.Kind().String()}
	}
	if a := s.cfg.Options.Account; a != nil {
		l.Bus = status.Counters(a.Load())
	}
	return l
}

func reasonName(r virtiomsg.Reason) string {
	b := []byte(r.String())
	for i := range b {
		if b[i] == ' ' {
			b[i] = '_'
		}
	}
	return string(b)
}

// SumBus adds what the queues of l.Devices count to l.Bus, which has the accesses for anything else. It is called once.
func SumBus(l *status.Link) {
	if l.Bus == nil {
		return
	}
	var sum status.Traffic
	for _, d := range l.Devices {
		for _, q := range d.Queues {
			if q.Bus != nil {
				sum = sum.Plus(q.Bus.Total())
			}
		}
	}
	for k, v := range status.Counters(sum) {
		l.Bus[k] += v
	}
}

// RegionStatus describes regions for an operator.
func RegionStatus(rs []dma.Region) []status.Region {
	out := []status.Region{}
	for _, r := range rs {
		out = append(out, status.Region{Name: r.Name, Addr: uint64(r.Addr), Size: r.Mem.Size(), Access: r.Access.String(), Across: r.Across})
	}
	return out
}
