//go:build linux

// Package peer is one side of a link, played by a test word by word, against a host or an agent
// that runs for real.
//
// In the room: the kind of board that joins them (board/testboard, free running), the handshake, messages
// sent and received as slots, a log that tests can read. Never in it: what a test says to
// the other side, rings, interfaces.
package peer

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/board/testboard"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/virtiomsg"
)

// kind is the name of the test's boards: "test:1".
const kind = "test"

var boards struct {
	sync.Mutex
	pairs []*testboard.Pair
	ends  map[string][2]*testboard.End // by spec: those opened last
}

func init() {
	board.Register(board.Kind{Name: kind, Help: "number of a Board of this test", Open: open})
}

func open(arg string, o board.Options) (board.Board, error) {
	var n int
	if _, err := fmt.Sscan(arg, &n); err != nil {
		return nil, err
	}
	boards.Lock()
	defer boards.Unlock()
	e, err := boards.pairs[n].Open(o)
	if err != nil {
		return nil, err
	}
	if boards.ends == nil {
		boards.ends = map[string][2]*testboard.End{}
	}
	spec := kind + ":" + arg
	ends := boards.ends[spec]
	ends[o.Side] = e
	boards.ends[spec] = ends
	return e, nil
}

// End returns the end of a board that was opened last by its spec; nil if none was.
func End(spec string, side board.Side) *testboard.End {
	boards.Lock()
	defer boards.Unlock()
	return boards.ends[spec][side]
}

// NewBoard makes a board for the test, closed at its end, and returns it with its spec. Ends opened by
// the spec have to be closed by then.
func NewBoard(t testing.TB, o testboard.PairOptions) (*testboard.Pair, string) {
	t.Helper()
	if o.BoardMem == 0 {
		o.BoardMem = 1 << 20
	}
	if o.HostMem == 0 {
		o.HostMem = 1 << 20
	}
	if o.MaxDelay == 0 {
		o.MaxDelay = 20 * time.Microsecond
	}
	p, err := testboard.NewPair(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	boards.Lock()
	defer boards.Unlock()
	boards.pairs = append(boards.pairs, p)
	return p, fmt.Sprintf("%s:%d", kind, len(boards.pairs)-1)
}

// Where an agent that is played puts things in the window.
const (
	offAgentToHost = 1 * virtiomsg.PageSize
	offHostToAgent = 2 * virtiomsg.PageSize
	// Heap is where the region begins that the agent declares: the rest of the window.
	Heap = 3 * virtiomsg.PageSize
)

// tick is the pace of the played heartbeat.
const tick = 10 * time.Millisecond

// Peer is the played side. It belongs to the test's goroutine, which calls Step, or a method that waits, often
// enough for the heartbeat.
type Peer struct {
	T testing.TB // fails; a subtest may put itself here
	// B is the open board, Link the handshake, both for the test to misuse.
	B    board.Board
	Link *virtiomsg.Link
	// Region is what an agent declares.
	Region dma.Region
	// Declared is what the side declares; Redeclare changes it.
	Declared virtiomsg.Declaration
	// Up tells that messages may be sent; Downs counts how often the link went down.
	Up    bool
	Downs int
	// Events and Requests are what came in, the oldest first; Answers what answers came, by token.
	Events, Requests []virtiomsg.Slot
	Answers          map[uint16]virtiomsg.Slot
	// Handle, if set, takes a request or event before it is kept in Requests or Events.
	Handle func(h virtiomsg.Header, m *virtiomsg.Slot) bool
	// Mute stops Step from receiving: the FIFO fills up.
	Mute bool

	side  board.Side
	ring  doorbell.Ringer
	last  time.Time
	token uint16
}

// New opens the side of the board and shows it to the other side.
func New(t testing.TB, spec string, side board.Side) *Peer {
	t.Helper()
	b, err := board.Open(spec, board.Options{Side: side})
	if err != nil {
		t.Fatal(err)
	}
	p := &Peer{T: t, B: b, Answers: map[uint16]virtiomsg.Slot{}}
	t.Cleanup(func() { b.Close() })
	w := b.Window()
	d := virtiomsg.Declaration{Ring: b.Self()}
	if side == board.Agent {
		m, err := w.Mem.Slice(Heap, w.Mem.Size()-Heap)
		if err != nil {
			t.Fatal(err)
		}
		p.Region = dma.Region{Name: "heap", Addr: w.Addr + Heap, Mem: m, Access: dma.DeviceRead | dma.DeviceWrite}
		d.FIFOAgentToHost, d.FIFOHostToAgent = offAgentToHost, offHostToAgent
		d.SlotsAgentToHost, d.SlotsHostToAgent = virtiomsg.MaxSlots, virtiomsg.MaxSlots
		d.Regions = []virtiomsg.Region{{Addr: p.Region.Addr, Size: m.Size(), Offset: Heap, Access: p.Region.Access}}
	}
	p.side = side
	p.Redeclare(d)
	return p
}

// Redeclare shows another declaration to the other side, with a new handshake, as the next process of this side does.
func (p *Peer) Redeclare(d virtiomsg.Declaration) {
	p.T.Helper()
	if p.Up {
		p.Up = false
		p.Downs++
	}
	var err error
	p.Link, err = virtiomsg.NewLink(virtiomsg.LinkConfig{Window: p.B.Window(), Side: p.side, Self: d, PeerDead: p.B.PeerDead, LostTicks: 200})
	if err == nil {
		err = p.Link.Start()
	}
	if err != nil {
		p.T.Fatal(err)
	}
	p.Declared = d
}

// Step moves the handshake on, and takes what came in.
func (p *Peer) Step() {
	beat := time.Since(p.last) >= tick
	if beat {
		p.last = time.Now()
	}
	for more := true; more; beat = false {
		ev, _ := p.Link.Poll(beat)
		switch ev {
		case virtiomsg.EventNone:
			more = false
		case virtiomsg.EventPeer:
			d, _ := p.Link.Peer()
			p.ring, _ = p.B.Ringer(d.Ring, 0)
		case virtiomsg.EventUp:
			p.Up = true
			p.Events, p.Requests, p.Answers = nil, nil, map[uint16]virtiomsg.Slot{}
		case virtiomsg.EventQuiesce:
			p.Up = false
			p.Downs++
			p.Link.Quiesced()
		}
		p.call()
	}
	for !p.Mute && p.Up {
		var m virtiomsg.Slot
		ok, err := p.Link.Recv(&m)
		if err != nil || !ok {
			break
		}
		h, err := m.Header()
		switch {
		case err != nil:
			p.T.Errorf("the other side sends what is no message: %v", err)
		case h.Response():
			p.Answers[h.Token] = m
		case p.Handle != nil && p.Handle(h, &m):
		case h.Event():
			p.Events = append(p.Events, m)
		default:
			p.Requests = append(p.Requests, m)
		}
	}
	p.call()
}

// call rings where the link asks for it.
func (p *Peer) call() {
	if p.Link.NeedRing() && p.ring != nil {
		p.ring.Ring()
	}
}

// Until steps until ok.
func (p *Peer) Until(limit time.Duration, what string, ok func() bool) {
	p.T.Helper()
	for end := time.Now().Add(limit); ; time.Sleep(200 * time.Microsecond) {
		p.Step()
		if ok() {
			return
		}
		if time.Now().After(end) {
			p.T.Fatalf("not within %v: %s", limit, what)
		}
	}
}

// For steps for a while.
func (p *Peer) For(d time.Duration) {
	end := time.Now().Add(d)
	p.Until(2*d, "time", func() bool { return time.Now().After(end) })
}

// WaitUp waits for the handshake.
func (p *Peer) WaitUp() {
	p.T.Helper()
	p.Until(10*time.Second, "the link comes up", func() bool { return p.Up })
}

// Send sends a slot as it is, and tells whether the link took it before it went down.
func (p *Peer) Send(m virtiomsg.Slot) bool {
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); {
		switch err := p.Link.Send(&m); err {
		case nil:
			p.call()
			return true
		case virtiomsg.ErrFIFOFull:
			p.Step()
		default:
			return false
		}
	}
	return false
}

// Token returns one for a request.
func (p *Peer) Token() uint16 {
	if p.token++; p.token == 0 {
		p.token++
	}
	return p.token
}

// Ask sends a request made by encode and waits for its answer.
func (p *Peer) Ask(encode func(m *virtiomsg.Slot, token uint16)) virtiomsg.Slot {
	p.T.Helper()
	var m virtiomsg.Slot
	token := p.Token()
	encode(&m, token)
	h, _ := m.Header()
	if !p.Send(m) {
		p.T.Fatalf("%v: the link is down", h)
	}
	downs := p.Downs
	p.Until(5*time.Second, h.String()+" is answered", func() bool {
		if p.Downs != downs {
			p.T.Fatalf("%v: the link went down", h)
		}
		_, ok := p.Answers[token]
		return ok
	})
	defer delete(p.Answers, token)
	return p.Answers[token]
}

// Ring rings a vector of the other side.
func (p *Peer) Ring(dev uint16, queue uint32) {
	d, ok := p.Link.Peer()
	if !ok {
		return
	}
	if r, err := p.B.Ringer(d.Ring, virtiomsg.Vector(dev, queue, d.Ring.Vectors)); err == nil {
		r.Ring()
	}
}

// Log keeps what is logged. It is a session.Logger.
type Log struct {
	mu    sync.Mutex
	lines []string
}

func (l *Log) add(level, msg string, args []interface{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, fmt.Sprint(level, " ", msg, " ", args))
}

// Debug implements session.Logger.
func (l *Log) Debug(msg string, args ...interface{}) {}

// Info implements session.Logger.
func (l *Log) Info(msg string, args ...interface{}) { l.add("INFO", msg, args) }

// Warn implements session.Logger.
func (l *Log) Warn(msg string, args ...interface{}) { l.add("WARN", msg, args) }

// Error implements session.Logger.
func (l *Log) Error(msg string, args ...interface{}) { l.add("ERROR", msg, args) }

// Lines returns how many lines there are.
func (l *Log) Lines() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.lines)
}

// String returns them all.
func (l *Log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Join(l.lines, "\n")
}
