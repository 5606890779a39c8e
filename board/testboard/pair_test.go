package testboard_test

import (
	"testing"
	"time"

	"go.uber.org/goleak"

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
	ap, hp := agent.Pool(), host.Pool()
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
