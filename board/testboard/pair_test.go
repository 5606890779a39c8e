package testboard_test

import (
	"fmt"
	"runtime"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/board"
	. "github.com/boardlink/boardlink/board/testboard"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/mmio"
)

var _ board.Board = (*End)(nil)

func openPair(t *testing.T, o PairOptions) (p *Pair, host, agent *End) {
	t.Helper()
	p, err := NewPair(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	if host, err = p.Open(board.Options{Side: board.Host}); err != nil {
		t.Fatal(err)
	}
	if agent, err = p.Open(board.Options{Side: board.Agent}); err != nil {
		t.Fatal(err)
	}
	return p, host, agent
}

func TestPairPostsAndFlushes(t *testing.T) {
	p, host, agent := openPair(t, PairOptions{})
	hw, aw := host.Window(), agent.Window()
	if !hw.Across || aw.Across || hw.Mem.Kind() != mmio.Uncached || aw.Mem.Kind() != mmio.Cached {
		t.Fatalf("the window lies across for the host alone: %+v, %+v", hw, aw)
	}
	p.Hold()
	hw.Mem.Store32(8, 7)
	if v := aw.Mem.Load32(8); v != 0 {
		t.Fatalf("a held write arrived: %d", v)
	}
	if v := hw.Mem.Load32(8); v != 7 {
		t.Fatalf("a load across does not see the own write before it: %d", v)
	}
	if v := aw.Mem.Load32(8); v != 7 {
		t.Fatalf("a load across did not push the write before it: %d", v)
	}
	// The completion pushes what the other side posted.
	ap, _ := agent.Pool()
	hp, _ := host.Pool()
	ap.Mem.Store32(0, 9)
	if v := hp.Mem.Load32(0); v != 0 {
		t.Fatalf("a held write arrived: %d", v)
	}
	hw.Mem.Load32(8)
	if v := hp.Mem.Load32(0); v != 9 {
		t.Fatalf("a completion passed a posted write: %d", v)
	}
	// Released, writes arrive by themselves.
	hw.Mem.Store32(8, 11)
	p.Release()
	for end := time.Now().Add(5 * time.Second); aw.Mem.Load32(8) != 11; time.Sleep(50 * time.Microsecond) {
		if time.Now().After(end) {
			t.Fatal("a posted write never arrived")
		}
	}
	if r, w := p.Reads(board.Host), p.Writes(board.Host); r != 2 || w != 2 {
		t.Errorf("%d reads and %d writes of the host counted, not 2 and 2", r, w)
	}
}

func TestPairRestart(t *testing.T) {
	p, host, agent := openPair(t, PairOptions{})
	if host.PeerDead() || agent.PeerDead() {
		t.Fatal("dead on arrival")
	}
	if _, err := p.Open(board.Options{Side: board.Host}); err == nil {
		t.Fatal("two ends of one side are open")
	}
	old, err := agent.Ringer(host.Self(), 0)
	if err != nil {
		t.Fatal(err)
	}
	hw := host.Window()
	p.Hold()
	hw.Mem.Store32(0, 1)
	host.Kill()
	hw.Mem.Store32(4, 1)
	if v := hw.Mem.Load32(0); v != 0xffffffff {
		t.Errorf("a dead end reads %#x", v)
	}
	if !agent.PeerDead() {
		t.Error("the agent does not see the host dead")
	}
	select {
	case <-agent.Events():
	default:
		t.Error("no event for the death")
	}
	again, err := p.Open(board.Options{Side: board.Host})
	if err != nil {
		t.Fatal(err)
	}
	w := again.Window()
	if v := w.Mem.Load64(0); v != 1 {
		t.Errorf("after the kill the window holds %#x: what was posted before arrives, what came later does not", v)
	}
	p.Release()
	// A ring for the dead one does not reach the new one.
	if err := old.Ring(); err != nil {
		t.Fatal(err)
	}
	now, err := agent.Ringer(again.Self(), 1)
	if err != nil {
		t.Fatal(err)
	}
	if err := now.Ring(); err != nil {
		t.Fatal(err)
	}
	// Rings arrive in order.
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(50 * time.Microsecond) {
		if n, err := again.Waiter(1).Ack(); err != nil {
			t.Fatal(err)
		} else if n > 0 {
			break
		}
		if time.Now().After(end) {
			t.Fatal("a ring never arrived")
		}
	}
	if n, _ := again.Waiter(0).Ack(); n != 0 {
		t.Error("the ring for a dead end arrived at the new one")
	}
}

// TestPairLeavesNothing checks that Close ends all goroutines.
func TestPairLeavesNothing(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	p, err := NewPair(PairOptions{Options: harshest})
	if err != nil {
		t.Fatal(err)
	}
	h, err := p.Open(board.Options{Side: board.Host})
	if err != nil {
		t.Fatal(err)
	}
	w := h.Window()
	w.Mem.CopyIn(3, make([]byte, 1000))
	r, err := h.Ringer(board.RingInfo{Method: board.RingIvshmem, Peer: 99, Vectors: 1}, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Ring(); err != nil {
		t.Fatal(err)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if err := r.Ring(); err != doorbell.ErrClosed {
		t.Errorf("a closed end rings: %v", err)
	}
	if err := p.Close(); err != nil {
		t.Fatalf("closed twice: %v", err)
	}
}

// freeProc is an end with its doorbells, for ringTest.
type freeProc struct {
	t   *testing.T
	end *End
	out [2]doorbell.Ringer
}

func (f *freeProc) Fail(err error) { f.t.Error(f.end, err); runtime.Goexit() }
func (f *freeProc) Failf(format string, args ...interface{}) {
	f.Fail(fmt.Errorf(format, args...))
}

func (f *freeProc) Ring(v uint32) {
	if err := f.out[v].Ring(); err != nil {
		f.Fail(err)
	}
}

// WaitDoorbell has no poll fallback: a lost wake-up fails the test.
func (f *freeProc) WaitDoorbell(v uint32) uint64 {
	w := f.end.Waiter(v)
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); {
		fds := []unix.PollFd{{Fd: int32(w.FD()), Events: unix.POLLIN}}
		if _, err := unix.Poll(fds, 1000); err != nil && err != unix.EINTR {
			f.Fail(err)
		}
		n, err := w.Ack()
		if err != nil {
			f.Fail(err)
		}
		if n > 0 {
			return n
		}
	}
	f.Failf("never rung")
	return 0
}

// TestPairRings runs the split rings on the free-running board, with real eventfds.
func TestPairRings(t *testing.T) {
	for _, c := range []ringTest{{}, {eventIdx: true}, {push: true}, {push: true, eventIdx: true}} {
		c := c
		c.size, c.transfers, c.batch = 64, runs(10000), 16
		t.Run(c.name(), func(t *testing.T) {
			p, host, agent := openPair(t, PairOptions{Options: harshInOrder, MaxDelay: 30 * time.Microsecond})
			var wg sync.WaitGroup
			for _, x := range []struct {
				end, peer *End
				fn        func(processor, *ends)
			}{{host, agent, c.device}, {agent, host, c.driver}} {
				f := &freeProc{t: t, end: x.end}
				for v := range f.out {
					r, err := x.end.Ringer(x.peer.Self(), uint32(v))
					if err != nil {
						t.Fatal(err)
					}
					f.out[v] = r
				}
				fn := x.fn
				wg.Add(1)
				go func() {
					defer wg.Done()
					pool, _ := f.end.Pool()
					fn(f, &ends{f.end.Window(), pool})
				}()
			}
			wg.Wait()
			if n := p.Reads(board.Host); c.push && n > uint64(c.transfers) {
				t.Errorf("with push the host read across %d times for %d transfers", n, c.transfers)
			}
			t.Logf("%d transfers: host %d reads, %d writes, %d rings; agent %d reads, %d writes, %d rings", c.transfers,
				p.Reads(board.Host), p.Writes(board.Host), p.Rings(board.Host), p.Reads(board.Agent), p.Writes(board.Agent), p.Rings(board.Agent))
		})
	}
}
