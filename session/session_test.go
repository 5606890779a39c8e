package session_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/board/testboard"
	"github.com/boardlink/boardlink/hwtest/peer"
	"github.com/boardlink/boardlink/session"
	"github.com/boardlink/boardlink/virtiomsg"
)

// TestLimit: a burst of lines of each message passes, the rest is counted, and told with its next line that passes.
func TestLimit(t *testing.T) {
	var log peer.Log
	l := session.Limit(&log)
	if session.Limit(l) != l {
		t.Error("a limit of a limit")
	}
	const sent = 10000
	begin := time.Now()
	for range sent {
		l.Warn("x", "a", 1)
		l.Info("y")
		l.Error("z")
	}
	// Of each message 10, and one in each second that passed.
	if n, most := log.Lines(), 3*(10+int(time.Since(begin)/time.Second)); n < 30 || n > most {
		t.Errorf("%d lines of 30000, want 30 to %d", n, most)
	}
	before := log.Lines()
	l.Warn("later", "a", 1)
	if log.Lines() != before+1 || !strings.HasSuffix(log.String(), "WARN later [a 1]") {
		t.Errorf("another message: %s", log.String()[strings.LastIndex(log.String(), "\n")+1:])
	}
	again := 0
	for ; log.Lines() == before+1; time.Sleep(20 * time.Millisecond) {
		if time.Since(begin) > 30*time.Second {
			t.Fatal("no further line passes")
		}
		l.Warn("x", "a", 1)
		again++
	}
	told := strings.Count(log.String(), "WARN x ")
	for _, s := range strings.Split(log.String(), "\n") {
		var n int
		if _, err := fmt.Sscanf(s, "WARN x [a 1 suppressed %d]", &n); err == nil {
			told += n
		}
	}
	if told != sent+again {
		t.Errorf("%d lines were sent, %d passed or were told of", sent+again, told)
	}
	l.Warn("last")
	if s := log.String(); !strings.HasSuffix(s, "WARN last []") {
		t.Error("told twice")
	}
}

// none is the owner of a session that has no devices.
type none struct{}

func (none) Queues() []session.Queue { return nil }
func (none) Declare(board.Board) (virtiomsg.Declaration, error) {
	return virtiomsg.Declaration{}, nil
}
func (none) Up()                                           {}
func (none) Down()                                         {}
func (none) Message(h virtiomsg.Header, m *virtiomsg.Slot) {}
func (none) Malformed(m *virtiomsg.Slot, err error)        {}
func (none) Tick()                                         {}

// openings are what the kind of board "flaky" answers, one after the other.
var openings = make(chan error, 16)

func init() {
	board.Register(board.Kind{Name: "flaky", Open: func(arg string, o board.Options) (board.Board, error) {
		select {
		case err := <-openings:
			if err != nil {
				return nil, err
			}
		default:
		}
		b, err := board.Open(arg, o)
		if err != nil {
			return nil, err
		}
		return served{b, lost}, nil
	}})
}

// lost is whether boards of the kind "flaky" have lost their server.
var lost = new(atomic.Bool)

type served struct {
	board.Board
	lost *atomic.Bool
}

func (s served) ServerLost() bool { return s.lost.Load() }

// TestServerLost: a link that is down opens its board anew when the server is gone, and does not mind what
// is wrong with it meanwhile.
func TestServerLost(t *testing.T) {
	_, spec := peer.NewBoard(t, testboard.PairOptions{})
	var log peer.Log
	s := session.New(session.Config{Name: "x", Spec: "flaky:" + spec, Log: &log, Handler: none{}, Beat: 5 * time.Millisecond})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	wait := func(what string, ok func() bool) {
		t.Helper()
		for begin := time.Now(); !ok(); time.Sleep(time.Millisecond) {
			if time.Since(begin) > 5*time.Second {
				t.Fatalf("not in time: %s; log:\n%s", what, &log)
			}
		}
	}
	opened := func() uint64 { return s.Status().Counters["opened"] }
	wait("open", func() bool { return opened() == 1 })
	for _, class := range []error{board.ErrAbsent, board.ErrInput, board.ErrSideTaken, nil} {
		openings <- &board.Error{Spec: "flaky", Reason: "in between", Class: class}
	}
	lost.Store(true)
	wait("the loss is seen", func() bool { return strings.Contains(s.Status().State, "waiting for the board") })
	lost.Store(false)
	wait("open again", func() bool { return opened() == 2 })
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// bridged is a board below a bridge that may be off: what is read then looks like a peer that left.
type bridged struct {
	board.Board
	off *atomic.Bool
}

func (b bridged) Gone() error {
	if b.off.Load() {
		return &board.Error{Spec: "bridged", Reason: "the bridge above it has its memory access off", Class: board.ErrAbsent}
	}
	return nil
}

func (b bridged) Counters() map[string]uint64 { return map[string]uint64{"bus_master_restored": 3} }

// bridgeOff is whether the bridge above boards of the kind "bridged" is off.
var bridgeOff = new(atomic.Bool)

func init() {
	board.Register(board.Kind{Name: "bridged", Open: func(arg string, o board.Options) (board.Board, error) {
		b := bridged{off: bridgeOff}
		if err := b.Gone(); err != nil {
			return nil, err
		}
		var err error
		b.Board, err = board.Open(arg, o)
		return b, err
	}})
}

// TestOutOfReach: the words for a peer that stops cleanly, and for a board that cannot be reached, whose memory reads as
// if it did. The board is waited for, and its counters go on.
func TestOutOfReach(t *testing.T) {
	for _, off := range []bool{false, true} {
		_, spec := peer.NewBoard(t, testboard.PairOptions{})
		var log peer.Log
		host := session.New(session.Config{Name: "x", Spec: "bridged:" + spec, Log: &log, Handler: none{}, Beat: 5 * time.Millisecond, LostBeats: 1000})
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- host.Run(ctx) }()
		p := peer.New(t, spec, board.Agent)
		wait := func(what string, ok func() bool) {
			t.Helper()
			p.Until(20*time.Second, what, ok)
		}
		wait("up", func() bool { return p.Up && host.Status().State == "up" })
		bridgeOff.Store(off)
		if err := p.Link.Stop(); err != nil {
			t.Fatal(err)
		}
		wait("down", func() bool { return strings.Contains(log.String(), "WARN link down") })
		if left := strings.Contains(log.String(), "peer left"); left == off {
			t.Errorf("bridge off: %v; log:\n%s", off, &log)
		}
		opened := uint64(1)
		if off {
			wait("waiting", func() bool { return host.Status().State == "waiting for the board" })
			if st := host.Status(); !strings.Contains(st.LastError, "the bridge above it") || st.Counters["bus_master_restored"] != 3 || !strings.Contains(log.String(), "board out of reach") {
				t.Errorf("%q, counters %v; log:\n%s", st.LastError, st.Counters, &log)
			}
			bridgeOff.Store(false)
			opened = 2
			wait("open again", func() bool { return host.Status().State == "waiting for the peer" })
		}
		if n := host.Status().Counters["bus_master_restored"]; n != 3*opened {
			t.Errorf("bus_master_restored %d of %d boards that were opened", n, opened)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// TestOpen: what is wrong with a board shows before Run; that it is absent does not matter.
func TestOpen(t *testing.T) {
	s := session.New(session.Config{Name: "x", Spec: "nosuch:kind", Log: new(peer.Log), Handler: none{}})
	if err := s.Open(context.Background()); !errors.Is(err, board.ErrInput) {
		t.Errorf("a bad spec: %v", err)
	}
	if err := s.Run(context.Background()); !errors.Is(err, board.ErrInput) {
		t.Errorf("a bad spec, run: %v", err)
	}

	_, spec := peer.NewBoard(t, testboard.PairOptions{})
	var log peer.Log
	s = session.New(session.Config{Name: "x", Spec: "flaky:" + spec, Log: &log, Handler: none{}})
	openings <- &board.Error{Spec: "flaky", Reason: "not yet", Class: board.ErrAbsent}
	openings <- &board.Error{Spec: "flaky", Reason: "not yet", Class: board.ErrAbsent}
	if err := s.Open(context.Background()); err != nil {
		t.Errorf("an absent board: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	for begin := time.Now(); s.Status().State != "waiting for the peer"; time.Sleep(time.Millisecond) {
		if time.Since(begin) > 5*time.Second {
			t.Fatalf("state %q", s.Status().State)
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if s := log.String(); strings.Count(s, "waiting for the board") != 1 || !strings.Contains(s, "not yet") {
		t.Errorf("log:\n%s", s)
	}

	// Opened before, and ended before it runs.
	s = session.New(session.Config{Name: "x", Spec: spec, Log: &log, Handler: none{}})
	if err := s.Open(context.Background()); err != nil {
		t.Fatal(err)
	}
	if err := s.Run(ctx); err != nil {
		t.Error(err)
	}
}

// TestRetry: which errors end Run, and which are waited for. Each change of the error is one line of the log.
func TestRetry(t *testing.T) {
	input := &board.Error{Spec: "flaky", Reason: "bad", Class: board.ErrInput}
	absent := &board.Error{Spec: "flaky", Reason: "absent", Class: board.ErrAbsent}
	taken := &board.Error{Spec: "flaky", Reason: "taken", Class: board.ErrSideTaken}
	other := &board.Error{Spec: "flaky", Reason: "no driver"}
	for _, c := range []struct {
		name  string
		retry bool
		errs  []error
		up    bool // the board is opened in the end; else the last error ends Run
		lines int  // about waiting
	}{
		{"bad at once", false, []error{input}, false, 0},
		{"taken at once", false, []error{taken}, false, 0},
		{"no driver at once", false, []error{other}, false, 0},
		{"no driver, taken, after absent", false, []error{absent, absent, other, other, taken}, true, 3},
		{"bad after absent", false, []error{absent, input}, false, 1},
		{"several boards", true, []error{input, taken, taken, other, absent, input}, true, 5},
	} {
		var log peer.Log
		_, spec := peer.NewBoard(t, testboard.PairOptions{})
		for len(openings) > 0 {
			<-openings
		}
		for _, err := range c.errs {
			openings <- err
		}
		openings <- nil
		s := session.New(session.Config{Name: "x", Spec: "flaky:" + spec, Log: &log, Handler: none{}, Retry: c.retry})
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- s.Run(ctx) }()
		var err error
		for begin := time.Now(); ; time.Sleep(time.Millisecond) {
			st := s.Status()
			if st.State == "waiting for the peer" || len(done) > 0 {
				cancel()
				err = <-done
				break
			}
			if time.Since(begin) > 30*time.Second {
				t.Fatalf("%s: state %q; log:\n%s", c.name, st.State, &log)
			}
		}
		cancel()
		st := s.Status()
		if c.up && (err != nil || st.Counters["opened"] != 1) {
			t.Errorf("%s: %v, opened %d times", c.name, err, st.Counters["opened"])
		}
		if last := c.errs[len(c.errs)-1]; !c.up && (err != last || st.State != "given up" || st.LastError != last.Error()) {
			t.Errorf("%s: Run returned %v; status: %q, %q", c.name, err, st.State, st.LastError)
		}
		if n := st.Counters["open_errors"]; n != uint64(len(c.errs)) {
			t.Errorf("%s: open_errors %d, want %d", c.name, n, len(c.errs))
		}
		if n := strings.Count(log.String(), "waiting for the board"); n != c.lines {
			t.Errorf("%s: %d lines about waiting, want %d:\n%s", c.name, n, c.lines, &log)
		}
	}
}

// caller is the owner of a session that asks the other side again and again, and answers it.
type caller struct {
	none
	s        *session.Session
	agent    bool
	answered uint64
	failed   atomic.Pointer[error]
}

func (c *caller) Declare(b board.Board) (virtiomsg.Declaration, error) {
	var d virtiomsg.Declaration
	if c.agent {
		d.FIFOAgentToHost, d.FIFOHostToAgent = virtiomsg.PageSize, 2*virtiomsg.PageSize
		d.SlotsAgentToHost, d.SlotsHostToAgent = 1, 1
	}
	return d, nil
}

func (c *caller) Message(h virtiomsg.Header, m *virtiomsg.Slot) {
	data, err := virtiomsg.DecodePing(m)
	if err == nil {
		virtiomsg.EncodePong(m, h.Token, data)
		err = c.s.Send(m)
	}
	if err != nil {
		c.failed.Store(&err)
	}
}

func (c *caller) Tick() {
	for i := uint32(1); i <= 20; i++ {
		var m virtiomsg.Slot
		err := c.s.Call(true, virtiomsg.BusPing, 0, 5*time.Second, &m, func(token uint16) { virtiomsg.EncodePing(&m, token, i) })
		if errors.Is(err, virtiomsg.ErrDown) {
			return // the other side has ended
		}
		if err != nil {
			c.failed.Store(&err)
			return
		}
		atomic.AddUint64(&c.answered, 1)
	}
}

// TestBothAsk: two sides that both wait for an answer, through FIFOs of one slot, get it.
func TestBothAsk(t *testing.T) {
	t.Parallel()
	_, spec := peer.NewBoard(t, testboard.PairOptions{})
	var log peer.Log
	ends := [2]*caller{{}, {agent: true}}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 2)
	for i, c := range ends {
		c.s = session.New(session.Config{Name: "x", Spec: spec, Options: board.Options{Side: board.Side(i)}, Log: &log, Handler: c,
			Beat: 5 * time.Millisecond, LostBeats: 1000})
		go func() { done <- c.s.Run(ctx) }()
	}
	for begin := time.Now(); atomic.LoadUint64(&ends[0].answered) < 200 || atomic.LoadUint64(&ends[1].answered) < 200; time.Sleep(time.Millisecond) {
		for i, c := range ends {
			if err := c.failed.Load(); err != nil || time.Since(begin) > 20*time.Second {
				t.Fatalf("side %d: %d answers, error %v, %+v; log:\n%s", i, atomic.LoadUint64(&c.answered), err, c.s.Status(), &log)
			}
		}
	}
	for i, c := range ends {
		if st := c.s.Status().Counters; st["link_ups"] != 1 || st["call_timeout"] != 0 {
			t.Errorf("side %d: %v", i, st)
		}
	}
	cancel()
	for range ends {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}
