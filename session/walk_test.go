package session_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/board/testboard"
	"github.com/boardlink/boardlink/hwtest/peer"
	"github.com/boardlink/boardlink/session"
	"github.com/boardlink/boardlink/virtiomsg"
	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// scene is a session with what a test may do to it: to its board, its owner and its peer.
type scene struct {
	t      *testing.T
	s      *session.Session
	spec   string
	p      *peer.Peer
	cancel context.CancelFunc
	done   chan error
	log    peer.Log

	// The board.
	errs   chan error    // of the next attempts to open it
	opens  chan struct{} // closed: it does open
	gone   atomic.Bool
	asks   chan struct{} // closed: Gone returns
	closes chan struct{} // closed: Close returns
	events chan struct{}

	// The owner.
	none
	message, tick, down func()
}

var scenes struct {
	sync.Mutex
	all []*scene
}

func init() {
	board.Register(board.Kind{Name: "acted", Open: func(arg string, o board.Options) (board.Board, error) {
		var n int
		var spec string
		fmt.Sscan(arg, &n, &spec)
		scenes.Lock()
		c := scenes.all[n]
		scenes.Unlock()
		<-c.opens
		select {
		case err := <-c.errs:
			return nil, err
		default:
		}
		if c.gone.Load() {
			return nil, errNotThere
		}
		b, err := board.Open(spec, o)
		return acted{b, c}, err
	}})
}

var (
	errNotThere = &board.Error{Spec: "acted", Reason: "it is not there", Class: board.ErrAbsent}
	errBad      = &board.Error{Spec: "acted", Reason: "bad", Class: board.ErrInput}
)

type acted struct {
	board.Board
	c *scene
}

func (b acted) Gone() error {
	<-b.c.asks
	if b.c.gone.Load() {
		return errNotThere
	}
	return nil
}

func (b acted) Events() <-chan struct{} { return b.c.events }

func (b acted) Close() error {
	<-b.c.closes
	return b.Board.Close()
}

func (c *scene) Message(virtiomsg.Header, *virtiomsg.Slot) { c.message() }
func (c *scene) Tick()                                     { c.tick() }
func (c *scene) Down()                                     { c.down() }

var ready = func() chan struct{} {
	c := make(chan struct{})
	close(c)
	return c
}()

// newScene returns one that is not running; change changes what is asked of the session.
func newScene(t *testing.T, change func(*session.Config)) *scene {
	c := &scene{t: t, done: make(chan error, 1), errs: make(chan error, 9), opens: ready, asks: ready, closes: ready,
		events: make(chan struct{}, 1), message: func() {}, tick: func() {}, down: func() {}}
	_, c.spec = peer.NewBoard(t, testboard.PairOptions{})
	scenes.Lock()
	n := len(scenes.all)
	scenes.all = append(scenes.all, c)
	scenes.Unlock()
	cfg := session.Config{Name: "x", Spec: fmt.Sprintf("acted:%d %s", n, c.spec), Log: &c.log, Handler: c, Beat: 5 * time.Millisecond, LostBeats: 4000}
	if change != nil {
		change(&cfg)
	}
	c.s = session.New(cfg)
	return c
}

func (c *scene) run() {
	var ctx context.Context
	ctx, c.cancel = context.WithCancel(context.Background())
	go func() { c.done <- c.s.Run(ctx) }()
}

// until waits for a condition. The peer, where there is one, goes on meanwhile only if step says so.
func (c *scene) until(step bool, what string, ok func() bool) {
	c.t.Helper()
	for begin := time.Now(); !ok(); time.Sleep(200 * time.Microsecond) {
		if step && c.p != nil {
			c.p.Step()
		}
		if time.Since(begin) > 30*time.Second {
			c.t.Fatalf("not in time: %s; %s after %v; log:\n%s", what, c.s.State(), c.s.Walk(), &c.log)
		}
	}
}

func (c *scene) wait(step bool, st session.State) {
	c.t.Helper()
	c.until(step, st.String(), func() bool { return c.s.State() == st })
}

// up brings the link up, with a peer.
func (c *scene) up() {
	c.t.Helper()
	if c.p == nil {
		c.p = peer.New(c.t, c.spec, board.Agent)
	}
	c.until(true, "up", func() bool { return c.p.Up && c.s.State() == session.Up })
}

// end ends the session.
func (c *scene) end(want error) {
	c.t.Helper()
	c.cancel()
	c.until(true, "the end", func() bool { return len(c.done) > 0 })
	if err := <-c.done; !errors.Is(err, want) {
		c.t.Errorf("Run returned %v, want %v; log:\n%s", err, want, &c.log)
	}
	c.wait(true, session.Stopped)
}

// renew has the peer show a new epoch without coming up, and waits until that was seen.
func (c *scene) renew() {
	c.t.Helper()
	c.p.Redeclare(c.p.Declared)
	c.until(false, "the new epoch is seen", func() bool {
		return c.s.Status().PeerEpoch == c.p.Link.Epoch() || c.s.State() == session.Held
	})
}

// steady leaves out that the peer was not seen for a moment: it shows no epoch while it writes its page anew.
func steady(path []session.State) (out []session.State) {
	for _, s := range path {
		n := len(out)
		if s == session.Handshake && n > 1 && out[n-1] == session.Listening && out[n-2] == session.Handshake {
			out = out[:n-1]
			continue
		}
		out = append(out, s)
	}
	return out
}

// TestWalk has a session walk along each arrow of the diagram, and along no other.
func TestWalk(t *testing.T) {
	const (
		starting, absent, listening, handshake = session.Starting, session.Absent, session.Listening, session.Handshake
		held, up, quiescing, leaving           = session.Held, session.Up, session.Quiescing, session.Leaving
		closing, stuck, givenUp, stopped       = session.Closing, session.Stuck, session.GivenUp, session.Stopped
	)
	type path = []session.State
	breaks := func(cfg *session.Config) {
		cfg.Pace.Breaks = session.Rate{Every: time.Hour, Burst: 4} // one break
	}
	tests := []struct {
		name   string
		change func(*session.Config)
		play   func(c *scene)
		path   path
	}{
		{"a link, and its end", nil, func(c *scene) {
			c.run()
			c.up()
			c.end(nil)
		}, path{starting, listening, handshake, up, quiescing, leaving, closing, stopped}},
		{"a board that comes late", nil, func(c *scene) {
			c.errs <- errNotThere
			c.errs <- errNotThere
			c.run()
			c.wait(true, listening)
			c.end(nil)
		}, path{starting, absent, listening, quiescing, leaving, closing, stopped}},
		{"a board that never comes", nil, func(c *scene) {
			c.gone.Store(true)
			c.run()
			c.wait(true, absent)
			c.end(nil)
		}, path{starting, absent, stopped}},
		{"a board that is still being opened", nil, func(c *scene) {
			c.opens = make(chan struct{})
			c.run()
			c.end(nil)
			close(c.opens)
		}, path{starting, stopped}},
		{"a bad board", nil, func(c *scene) {
			c.errs <- errBad
			c.run()
			c.until(true, "the end", func() bool { return len(c.done) > 0 })
			c.cancel()
		}, path{starting, givenUp}},
		{"a bad board, after it was absent", nil, func(c *scene) {
			c.errs <- errNotThere
			c.errs <- errBad
			c.run()
			c.until(true, "the end", func() bool { return len(c.done) > 0 })
			c.cancel()
		}, path{starting, absent, givenUp}},
		{"a peer that leaves", nil, func(c *scene) {
			c.run()
			c.up()
			if err := c.p.Link.Stop(); err != nil {
				c.t.Error(err)
			}
			c.until(true, "the peer is let go", func() bool { return len(c.s.Walk()) == 8 })
			if st := c.s.Status(); st.State != "waiting for the peer" || st.Counters["downs_peer_left"] != 1 {
				c.t.Errorf("status %+v", st)
			}
			c.end(nil)
		}, path{starting, listening, handshake, up, quiescing, listening, handshake, listening, quiescing, leaving, closing, stopped}},
		{"a board that is pulled, and comes again", nil, func(c *scene) {
			c.run()
			c.up()
			c.gone.Store(true)
			c.events <- struct{}{}
			c.wait(false, absent)
			c.gone.Store(false)
			c.wait(false, handshake)
			c.end(nil)
		}, path{starting, listening, handshake, up, quiescing, closing, absent, listening, handshake, quiescing, leaving, closing, stopped}},
		{"loops that stop late", nil, func(c *scene) {
			free := make(chan struct{})
			var once sync.Once
			c.tick = func() { once.Do(func() { c.s.Stopping(func() { <-free }) }) }
			c.s.SetStopLimit(100 * time.Millisecond)
			c.run()
			c.up()
			c.wait(true, stuck)
			c.s.SetStopLimit(time.Minute)
			close(free)
			c.wait(true, up)
			if n, stuck := c.p.Downs, c.s.Status().Counters["stuck"]; n != 0 || stuck != 1 {
				c.t.Errorf("the link was down %d times, stuck %d times", n, stuck)
			}
			c.end(nil)
		}, path{starting, listening, handshake, up, stuck, up, quiescing, leaving, closing, stopped}},
		{"loops that stop late after the link went down", nil, func(c *scene) {
			free := make(chan struct{})
			c.down = func() { <-free }
			c.s.SetStopLimit(100 * time.Millisecond)
			c.run()
			c.up()
			c.p.Redeclare(c.p.Declared)
			c.wait(true, stuck)
			c.s.SetStopLimit(time.Minute)
			close(free)
			c.up()
			c.end(nil)
		}, path{starting, listening, handshake, up, quiescing, stuck, quiescing, listening, handshake, up, quiescing, leaving, closing, stopped}},
		{"a board that takes its time to be closed", nil, func(c *scene) {
			c.closes = make(chan struct{})
			c.run()
			c.wait(true, listening)
			c.cancel()
			c.wait(true, stuck)
			close(c.closes)
			c.end(session.ErrStuck)
		}, path{starting, listening, quiescing, leaving, closing, stuck, stopped}},
		{"a peer that breaks the link again and again", breaks, func(c *scene) {
			c.run()
			c.up()
			for range 2 {
				c.p.Redeclare(c.p.Declared)
				c.up()
			}
			c.end(nil)
		}, path{starting, listening, handshake, up, quiescing, listening, handshake, up, quiescing, listening, held, listening, handshake, up, quiescing, leaving, closing, stopped}},
		{"a peer that shows epoch after epoch", breaks, func(c *scene) {
			c.run()
			c.up()
			c.p.Redeclare(c.p.Declared)
			c.wait(false, handshake) // the break is used up
			for range 2 {
				for c.s.State() != held {
					c.renew()
				}
				c.wait(false, handshake)
			}
			for c.s.State() != held {
				c.renew()
			}
			if st := c.s.Status(); st.State != "held off" || st.Reason == "" {
				c.t.Errorf("status %+v", st)
			}
			c.end(nil)
		}, path{starting, listening, handshake, up, quiescing, listening, handshake, held, handshake, held, handshake, held, quiescing, leaving, closing, stopped}},
	}
	walked := map[[2]session.State]bool{}
	for _, tt := range tests {
		for i := 1; i < len(tt.path); i++ {
			walked[[2]session.State{tt.path[i-1], tt.path[i]}] = true
		}
	}
	for _, a := range session.Arrows() {
		if !walked[a] {
			t.Errorf("no session here goes from %q to %q", a[0], a[1])
		}
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			c := newScene(t, tt.change)
			tt.play(c)
			if d := cmp.Diff(tt.path, steady(c.s.Walk())); d != "" {
				t.Errorf("another path (-want +got):\n%s\nlog:\n%s", d, &c.log)
			}
			if n := c.s.Status().Counters["illegal"]; n != 0 {
				t.Errorf("%d transitions were refused", n)
			}
		})
	}
}

// TestBusyOwner: while a method of the owner takes its time, the heart beats, the peer's going is seen, and Status tells.
func TestBusyOwner(t *testing.T) {
	t.Parallel()
	c := newScene(t, nil)
	entered, free := make(chan struct{}, 1), make(chan struct{})
	c.message = func() {
		entered <- struct{}{}
		<-free
	}
	var downs int32
	c.down = func() { atomic.AddInt32(&downs, 1) }
	c.run()
	c.up()
	var m virtiomsg.Slot
	virtiomsg.EncodePing(&m, c.p.Token(), 1)
	c.p.Send(m)
	c.until(true, "the owner is busy", func() bool { return len(entered) == 1 })
	ticks := c.s.Status().Counters["link_ticks"]
	c.until(true, "the heart beats", func() bool { return c.s.Status().Counters["link_ticks"] > ticks+20 })
	c.p.Redeclare(c.p.Declared)
	c.wait(true, session.Quiescing)
	if st := c.s.Status(); st.State != "going down" || atomic.LoadInt32(&downs) != 0 {
		t.Errorf("Down came %d times while Message runs, state %q", downs, st.State)
	}
	ticks = c.s.Status().Counters["link_ticks"]
	c.until(true, "the heart beats", func() bool { return c.s.Status().Counters["link_ticks"] > ticks+5 })
	close(free)
	c.up()
	if n := atomic.LoadInt32(&downs); n != 1 {
		t.Errorf("Down came %d times", n)
	}
	c.end(nil)
}

// TestBusyBoard: a board that takes its time to say that it is there holds up nothing but its closing.
func TestBusyBoard(t *testing.T) {
	t.Parallel()
	c := newScene(t, nil)
	c.asks = make(chan struct{})
	c.run()
	c.wait(true, session.Listening)
	ticks := c.s.Status().Counters["link_ticks"]
	c.until(true, "the heart beats", func() bool { return c.s.Status().Counters["link_ticks"] > ticks+5 })
	c.up()
	c.cancel()
	c.wait(true, session.Closing)
	if st := c.s.Status(); st.Window.Size == 0 {
		t.Error("the board is closed while it is asked whether it is there")
	}
	close(c.asks)
	c.end(nil)
}

// TestRandomEvents: whatever happens, in any order, the session goes along the diagram, is up again where it can be,
// and ends.
func TestRandomEvents(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(rt *rapid.T) {
		c := newScene(t, nil)
		var mu sync.Mutex // held: the owner is busy
		busy := false
		work := func() {
			mu.Lock()
			defer mu.Unlock() // nothing to do but to wait
		}
		c.message, c.tick, c.down = work, work, work
		c.run()
		c.wait(false, session.Listening)
		c.p = peer.New(t, c.spec, board.Agent)
		steps := rapid.IntRange(0, 40)
		for _, what := range rapid.SliceOfN(rapid.SampledFrom([]string{"steps", "steps", "beats", "renew", "pull", "plug", "busy", "idle", "wake", "message", "fault"}), 1, 25).Draw(rt, "events") {
			switch what {
			case "steps":
				for range steps.Draw(rt, "steps") {
					c.p.Step()
				}
			case "beats":
				time.Sleep(time.Duration(steps.Draw(rt, "ms")) * time.Millisecond / 4)
			case "renew":
				c.p.Redeclare(c.p.Declared)
			case "pull", "plug":
				c.gone.Store(what == "pull")
				select {
				case c.events <- struct{}{}:
				default:
				}
			case "busy", "idle":
				if busy != (what == "busy") {
					if busy = !busy; busy {
						mu.Lock()
					} else {
						mu.Unlock()
					}
				}
			case "wake":
				c.s.Wake()
			case "message":
				var m virtiomsg.Slot
				virtiomsg.EncodePing(&m, c.p.Token(), 1)
				c.p.Link.Send(&m)
			case "fault":
				c.s.Fault(errors.New("a bus error"))
			}
		}
		if busy {
			mu.Unlock()
		}
		c.gone.Store(false)
		if rapid.Bool().Draw(rt, "up at the end") {
			c.up()
		}
		c.end(nil)
		if st := c.s.Status(); st.Counters["illegal"] != 0 || strings.Contains(c.log.String(), "stuck") {
			rt.Errorf("status %+v; log:\n%s", st, &c.log)
		}
		c.p.B.Close()
	})
}
