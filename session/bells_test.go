package session_test

import (
	"context"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/board/loopback"
	"github.com/boardlink/boardlink/board/testboard"
	"github.com/boardlink/boardlink/hwtest/peer"
	"github.com/boardlink/boardlink/trial/netns"
	"github.com/boardlink/boardlink/trial/netns/netnstest"
)

// newLoopback is newLink over the shared memory and eventfds of a rendezvous server.
func newLoopback(t *testing.T) *link {
	t.Helper()
	netnstest.Need(t)
	path := filepath.Join(t.TempDir(), "s")
	srv, err := loopback.NewServer(loopback.ServerConfig{Path: path, Size: 4 << 20, Vectors: 4})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- srv.Serve() }()
	t.Cleanup(func() {
		srv.Close()
		<-done
	})
	l := &link{t: t, spec: "loopback:" + path}
	for s := range l.ns {
		if l.ns[s], err = netns.New(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.ns[s].Close() })
	}
	t.Cleanup(func() {
		for _, s := range []board.Side{board.Host, board.Agent} {
			if l.stop[s] != nil {
				l.end(s)
			}
		}
		if t.Failed() {
			t.Logf("log of both ends:\n%s", &l.log)
		}
	})
	return l
}

// TestPeerTampersWithBells: somebody who holds the doorbells of both ends makes them block, full or empty, under traffic. Another link of
// the process goes on, both ends of this one stop in time, and live on where the attack ends.
//
// An end that is rung empties its bell, and so sets the one that rings free at once. Where bells are full the agent leaves its own
// unheard, as a hostile peer does: then the host's rings block for certain.
func TestPeerTampersWithBells(t *testing.T) {
	for _, fill := range []bool{true, false} {
		name := "drained"
		if fill {
			name = "filled"
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
			defer cancel()
			l, other := newLoopback(t), newLink(t, testboard.PairOptions{}, "push")
			l.deaf = fill
			for _, l := range []*link{l, other} {
				l.start(board.Host)
				l.start(board.Agent)
			}
			l.waitUp()
			other.waitUp()
			l.works(ctx)
			tamper := func() (stop func()) {
				stop = peer.Tamper(peer.Bells(t, strings.TrimPrefix(l.spec, "loopback:"), 8), fill)
				flood(ctx, t, l)
				return stop
			}
			stop := tamper()
			other.works(ctx)
			for begin := time.Now(); fill && ringBlocked(l) == 0; {
				if time.Since(begin) > 20*time.Second {
					t.Fatal("no ring of a queue blocks and is freed")
				}
				flood(ctx, t, l)
			}
			other.works(ctx)
			stop()
			l.waitUp()
			l.works(ctx)

			// New processes, whose bells are not known to block yet, that are to stop meanwhile.
			for s := range l.ends {
				l.end(board.Side(s))
			}
			for s := range l.ends {
				l.start(board.Side(s))
			}
			l.waitUp()
			stop = tamper()
			l.end(board.Agent)
			l.end(board.Host)
			stop()
			other.works(ctx)
			for s, e := range other.ends {
				if st := e.Status(); st.Counters["link_ups"] != 1 || st.Devices[0].Counters["broken"] != 0 {
					t.Errorf("the other link's %s: %+v", board.Side(s), st)
				}
			}
		})
	}
}

// flood has both ends send frames that need no answer.
func flood(ctx context.Context, t *testing.T, l *link) {
	t.Helper()
	for s := range l.ns {
		err := l.ns[s].Do(func() error {
			c, err := net.Dial("udp", net.JoinHostPort(addrs[1-s], "9"))
			if err != nil {
				return err
			}
			defer c.Close()
			for range 20 {
				c.Write(make([]byte, 100)) // without a neighbour, or a carrier, it does not go
				time.Sleep(time.Millisecond)
			}
			return nil
		})
		if err != nil && ctx.Err() != nil {
			t.Fatal(err)
		}
	}
}

// ringBlocked returns how many rings of queues the ends have found blocked.
func ringBlocked(l *link) uint64 {
	var n uint64
	for _, e := range l.ends {
		for _, q := range e.Status().Devices[0].Queues {
			n += q.Pump["ring_blocked"]
		}
	}
	return n
}
