package session_test

import (
	"context"
	"encoding/binary"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/board/loopback"
	"github.com/boardlink/boardlink/board/testboard"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/hwtest/netns"
)

// newLoopback is newLink over the shared memory and eventfds of a rendezvous server.
func newLoopback(t *testing.T) *link {
	t.Helper()
	needRoot(t)
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

// bells connects to a rendezvous server as a third client and returns the eventfds of all others: the open files that those ring and
// are rung by.
func bells(t *testing.T, spec string) []int {
	t.Helper()
	c, err := net.Dial("unix", strings.TrimPrefix(spec, "loopback:"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	var fds []int
	t.Cleanup(func() {
		for _, fd := range fds {
			unix.Close(fd)
		}
	})
	self := int64(-1)
	for n := 0; ; n++ {
		var b [8]byte
		oob := make([]byte, 64)
		c.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
		k, on, _, _, err := c.(*net.UnixConn).ReadMsgUnix(b[:], oob)
		if err != nil || k != 8 {
			if len(fds) < 8 {
				t.Fatalf("%d eventfds of two ends with 4 vectors each: %v", len(fds), err)
			}
			return fds
		}
		v := int64(binary.LittleEndian.Uint64(b[:]))
		if n == 1 {
			self = v
		}
		if on == 0 {
			continue
		}
		ms, err := unix.ParseSocketControlMessage(oob[:on])
		if err != nil {
			t.Fatal(err)
		}
		got, err := unix.ParseUnixRights(&ms[0])
		if err != nil {
			t.Fatal(err)
		}
		if n == 2 || v == self {
			unix.Close(got[0]) // the memory, and our own vectors
			continue
		}
		fds = append(fds, got[0])
	}
}

// attack makes the eventfds blocking ones and keeps them full, or empty, until the returned function is called.
func attack(fds []int, fill bool) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for _, fd := range fds {
		wg.Go(func() {
			var b [8]byte
			for ctx.Err() == nil {
				// Non-blocking for these two calls, so that the attack itself ends; blocking nearly all the time.
				unix.SetNonblock(fd, true)
				if fill {
					binary.NativeEndian.PutUint64(b[:], 1<<64-2)
					unix.Write(fd, b[:])
					binary.NativeEndian.PutUint64(b[:], 1)
					unix.Write(fd, b[:])
				} else {
					unix.Read(fd, b[:])
				}
				unix.SetNonblock(fd, false)
				time.Sleep(500 * time.Microsecond)
			}
		})
	}
	return func() {
		cancel()
		wg.Wait()
		for _, fd := range fds {
			var b [8]byte
			unix.SetNonblock(fd, true)
			unix.Read(fd, b[:])
		}
	}
}

// TestPeerTampersWithBells: somebody who holds the doorbells of both ends makes them block, full or empty, under traffic. Another link of
// the process goes on, both ends of this one stop in time, and live on where the attack ends.
func TestPeerTampersWithBells(t *testing.T) {
	for _, fill := range []bool{true, false} {
		name := "drained"
		if fill {
			name = "filled"
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			l, other := newLoopback(t), newLink(t, testboard.PairOptions{}, "push")
			for _, l := range []*link{l, other} {
				l.start(board.Host)
				l.start(board.Agent)
			}
			l.waitUp()
			other.waitUp()
			l.works(ctx)
			fds := bells(t, l.spec)
			before := doorbell.Blocked()
			stop := attack(fds, fill)
			flood(ctx, t, l)
			other.works(ctx)
			if fill {
				for begin := time.Now(); doorbell.Blocked() == before || ringBlocked(l) == 0; time.Sleep(10 * time.Millisecond) {
					flood(ctx, t, l)
					if time.Since(begin) > 20*time.Second {
						t.Fatalf("%d eventfds freed, %d rings of queues counted as blocked", doorbell.Blocked()-before, ringBlocked(l))
					}
				}
			}
			other.works(ctx)
			stop()
			l.waitUp()
			l.works(ctx)

			stop = attack(fds, fill)
			flood(ctx, t, l)
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
