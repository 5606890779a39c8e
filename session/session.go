// Package session keeps one end of a link going: it opens the board, runs the epoch handshake by the clock
// and the doorbell, hands over messages, and tells its owner when memory may be used and when to
// let go of it. Host and agent are its two owners.
//
// It must not know what messages mean, devices, rings or interfaces.
package session

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/doorbell"
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

// Handler is the owner of a Session. Its methods are called one at a time, on a goroutine of the owner's
// own, and may take their time: the link goes on meanwhile, but for the owner's next piece of work. They
// may use the Session's methods.
type Handler interface {
	// Queues lists the queues for which this side will be rung.
	Queues() []Queue
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
	// Malformed tells of a message that makes no sense. It may come while Call waits.
	Malformed(m *virtiomsg.Slot, err error)
	// Tick comes once a beat, and soon after Wake, while the link is up.
	Tick()
}

// QueueID names a virtqueue of a link.
type QueueID struct {
	Dev   uint16 // device number
	Queue int
}

// Queue is a virtqueue for which this side is rung.
type Queue struct {
	QueueID
	Class doorbell.Class // where it shares a doorbell
}

// Pacer is a Handler that puts requests off: what Wait returns for one is how long, 0 for not at all.
// It stays where it is meanwhile, and everything behind it. Wait is called while no method of the
// Handler runs, must not block, and must not use the Session.
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
	Illegal     uint64 // transitions between states that were refused; a mistake of this program
}

// Session is one end of a link.
type Session struct {
	n     Counters // first: 64-bit alignment
	limit int64    // stopLimit, but in tests; by sync/atomic

	cfg    Config
	wake   chan struct{}
	turn   sync.Mutex    // held where an event is handled; guards the rest, down to mu
	turned chan struct{} // what the loop's goroutine waits on has changed

	// While the owner's goroutine runs something, no event changes these.
	b        board.Board
	assigned *doorbell.Assigned
	users    map[QueueID]int

	link    *virtiomsg.Link
	ctl     doorbell.Ringer // rings the peer's vector 0
	bell    chan struct{}
	unheard *doorbell.Eventfd // ends listen
	heard   chan struct{}     // closed when listen has ended
	tick    *time.Ticker      // nil: no board is served

	// What is under way beside the loop, each with its end as an event.
	opening bool              // the board is being opened, or the owner declares
	fresh   board.Board       // is open, the owner has not declared yet; or nil
	opened  chan opening      // of the board that is being opened
	pause   *time.Timer       // before the board is opened again; nil: none
	jobs    chan func() error // for the owner's goroutine; at most one is under way
	job     job
	posts   posts // of Do
	asking  bool  // the board is asked whether it is there
	asked   chan error
	closing bool // the board is being closed
	closed  chan struct{}
	leave   *time.Timer // limits Leaving; nil: none

	runs bool // Run does
	ctx  context.Context
	on   waits

	// What is to be done.
	err      error     // Run's, in GivenUp
	ending   bool      // Run is to end
	deadline time.Time // of that
	reopen   bool      // the board is to be closed, and opened anew
	gone     bool      // as it is lost: it is not touched any more
	owes     bool      // the handshake waits for Quiesced
	told     bool      // Down was told, and not Up since
	sure     bool      // the board was asked after Down
	look     bool      // the board is to be asked whether it is there
	upDue    bool      // Up is to be told
	tickDue  bool      // Tick is to be told
	taken    int       // messages that were handed over since Tick was
	redo     bool      // Down ended by a bus error, and is told once more

	prepared prepared // what the owner's goroutine made of a board that was opened
	retry    time.Duration
	waiting  string // the error of opening that was logged last; empty: none since the board was open

	requests virtiomsg.Requests
	calls    []*call // that wait for their answers, the innermost last
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

	mu     sync.Mutex // guards what others read
	peer   virtiomsg.Declaration
	state  State
	why    string    // what led to it
	since  time.Time // of the state
	last   string    // error
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
	s := &Session{cfg: c, wake: make(chan struct{}, 1), turned: make(chan struct{}, 1), retry: retryOpen, posts: posts{bell: make(chan struct{}, 1)},
		messages: NewBucket(c.Pace.Messages), breaks: NewBucket(c.Pace.Breaks), bells: new(doorbell.Counters), since: time.Now(), limit: int64(stopLimit)}
	return s
}

// Open opens the board, so that what is wrong with it shows before Run: nothing is said of the link
// yet. That it is absent is no error: Run waits for it. Run has to follow, unless there was an error
// and Config.Retry is not set. It returns nil early when ctx ends: Run does not wait then.
func (s *Session) Open(ctx context.Context) error {
	s.posts.begin()
	o := opening{err: errWaiting}
	for c := s.openBoard(ctx); o.err == errWaiting; {
		select {
		case o = <-c:
		case <-s.posts.bell:
			s.posts.run()
		case <-ctx.Done():
			return nil
		}
	}
	if o.err == nil {
		var p prepared
		if p = s.prepare(o.b); p.err == nil {
			s.adopt(p)
			return nil
		}
		o.err = p.err
	}
	s.openFailed(o.err)
	absent := errors.Is(o.err, board.ErrAbsent)
	if absent || s.cfg.Retry {
		s.transition(Absent, "")
	}
	if absent {
		return nil
	}
	if !s.cfg.Retry {
		s.posts.end(lifeNew)
	}
	return o.err
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
	s.posts.begin()
	defer s.posts.end(lifeEnded)
	done := make(chan error, 1)
	go func() { done <- s.run(ctx) }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	for wait := s.stopLimit(); ; wait = stopTime {
		limit := time.NewTimer(wait)
		select {
		case err := <-done:
			limit.Stop()
			return err
		case <-limit.C:
		}
		if s.overdue() {
			return ErrStuck
		}
	}
}

// Wake asks for a Tick soon. Any goroutine may call it.
func (s *Session) Wake() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// Up tells whether messages may be sent.
func (s *Session) Up() (up bool) {
	s.onLoop(func() { up = s.link != nil && s.link.Up() })
	return up
}

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
	ring := s.Peer().Ring
	r, err := s.b.Ringer(ring, virtiomsg.Vector(q.Dev, uint32(q.Queue), ring.Vectors))
	if err != nil {
		return board.Silent
	}
	return r
}

// Peer returns what the peer declares; while up.
func (s *Session) Peer() virtiomsg.Declaration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.peer
}

// Board returns the board; between Declare and the end of Run.
func (s *Session) Board() board.Board { return s.b }
