package virtiomsg

import (
	"errors"
	"runtime"
	"testing"
	"time"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
)

// newWindow returns a window of n bytes as the agent and as the host see it.
func newWindow(n int) (agent, host dma.Region) {
	b := make([]uint64, n/8)
	m := mmio.FromBytes(bytesOf(b))
	agent = dma.Region{Name: "window", Addr: 0x80000000, Mem: m, Access: dma.DeviceRead | dma.DeviceWrite}
	host = agent
	host.Across, host.Account = true, new(dma.Account)
	return agent, host
}

func agentDeclaration() Declaration {
	return Declaration{FIFOAgentToHost: 0x1000, FIFOHostToAgent: 0x2000, SlotsAgentToHost: MaxSlots, SlotsHostToAgent: MaxSlots,
		Ring:    board.RingInfo{Method: board.RingIvshmem, Peer: 3, Vectors: 5},
		Regions: []Region{{Addr: 0x80003000, Size: 0x1000, Offset: 0x3000, Access: 3}}}
}

func hostDeclaration() Declaration {
	return Declaration{Ring: board.RingInfo{Method: board.RingRegister, Vectors: 2, Value: 7, Addr: 0xfee00000}}
}

func mustLink(t testing.TB, c LinkConfig) *Link {
	t.Helper()
	l, err := NewLink(c)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// pair returns two links over one memory, not started.
func pair(t testing.TB) (agent, host *Link, window dma.Region) {
	t.Helper()
	a, h := newWindow(0x4000)
	return mustLink(t, LinkConfig{Window: a, Side: board.Agent, Self: agentDeclaration(), LostTicks: 3}),
		mustLink(t, LinkConfig{Window: h, Side: board.Host, Self: hostDeclaration(), LostTicks: 3}), h
}

func expectEvent(t testing.TB, l *Link, want Event) {
	t.Helper()
	got, err := l.Poll(false)
	if err != nil || got != want {
		t.Fatalf("%s: Poll returned %s, %v; want %s", l.side, got, err, want)
	}
}

// rung polls like an owner that is only ever woken by the peer's ring.
func rung(t testing.TB, links ...*Link) {
	t.Helper()
	for n := 0; ; n++ {
		if n > 20 {
			t.Fatal("the links ring each other without end")
		}
		again := false
		for i, l := range links {
			ring := links[1-i].NeedRing() || n == 0
			for ring {
				again = true
				ev, err := l.Poll(false)
				if err != nil {
					t.Fatal(err)
				}
				if ev == EventQuiesce {
					if err := l.Quiesced(); err != nil {
						t.Fatal(err)
					}
				}
				ring = ev != EventNone
			}
		}
		if !again {
			return
		}
	}
}

func up(t testing.TB) (agent, host *Link, window dma.Region) {
	t.Helper()
	agent, host, window = pair(t)
	for _, l := range []*Link{agent, host} {
		if err := l.Start(); err != nil {
			t.Fatal(err)
		}
	}
	rung(t, agent, host)
	if !agent.Up() || !host.Up() {
		t.Fatal("not up")
	}
	return agent, host, window
}

// TestRings: no tick is needed to come up, in any order of start, or to come up again: every step
// that the peer waits for asks for a ring.
func TestRings(t *testing.T) {
	for name, first := range map[string]int{"agent first": 0, "host first": 1} {
		t.Run(name, func(t *testing.T) {
			a, h, _ := pair(t)
			l := []*Link{a, h}
			if err := l[first].Start(); err != nil {
				t.Fatal(err)
			}
			rung(t, a, h)
			if a.Up() || h.Up() {
				t.Fatal("up with nobody")
			}
			if err := l[1-first].Start(); err != nil {
				t.Fatal(err)
			}
			rung(t, a, h)
			if !a.Up() || !h.Up() || a.PeerEpoch() != h.Epoch() || h.PeerEpoch() != a.Epoch() {
				t.Fatalf("agent up %v, host up %v", a.Up(), h.Up())
			}
			for i := range l {
				old := l[i].Epoch()
				if !l[i].Reset() || l[i].Epoch() == old {
					t.Fatal("Reset has no effect")
				}
				if err := l[i].Quiesced(); err != nil {
					t.Fatal(err)
				}
				rung(t, a, h)
				if !a.Up() || !h.Up() {
					t.Fatalf("not up again after the %s's reset", l[i].side)
				}
				if r := l[1-i].Reason(); r != ReasonRestarted {
					t.Errorf("the other side says: %s", r)
				}
			}
		})
	}
}

func TestLostHeartbeat(t *testing.T) {
	a, h, _ := up(t)
	for i := 0; i < 20; i++ { // both tick: nobody is lost
		for _, l := range []*Link{a, h} {
			if ev, err := l.Poll(true); ev != EventNone || err != nil {
				t.Fatal(ev, err)
			}
		}
	}
	// The agent's process stands still.
	for i := 1; ; i++ {
		ev, err := h.Poll(true)
		if err != nil {
			t.Fatal(err)
		}
		if ev == EventQuiesce {
			if i != 3 || h.Reason() != ReasonLost {
				t.Fatalf("lost after %d ticks: %s", i, h.Reason())
			}
			break
		}
		if i > 10 {
			t.Fatal("not lost")
		}
	}
	if h.released {
		t.Error("the agent may still run its loops")
	}
	if err := h.Quiesced(); err != nil {
		t.Fatal(err)
	}
	// It wakes. Nothing tells it that its clock stood still: it must not think the host lost.
	if ev, err := a.Poll(true); ev != EventQuiesce || err != nil || a.Reason() != ReasonRestarted {
		t.Fatal(ev, err, a.Reason())
	}
	if err := a.Quiesced(); err != nil {
		t.Fatal(err)
	}
	rung(t, a, h)
	if !a.Up() || !h.Up() {
		t.Fatal("not up again")
	}
	if s := h.Stats(); s.Ups != 2 || s.Downs[ReasonLost] != 1 {
		t.Errorf("%+v", s)
	}
}

func TestPeerDead(t *testing.T) {
	wa, wh := newWindow(0x4000)
	dead := false
	a := mustLink(t, LinkConfig{Window: wa, Side: board.Agent, Self: agentDeclaration(), PeerDead: func() bool { return dead }})
	h := mustLink(t, LinkConfig{Window: wh, Side: board.Host, Self: hostDeclaration()})
	a.Start()
	h.Start()
	rung(t, a, h)
	dead = true
	expectEvent(t, a, EventNone) // it is not asked every time
	a.Look()
	expectEvent(t, a, EventQuiesce)
	if a.Reason() != ReasonDead {
		t.Error(a.Reason())
	}
	if err := a.Stop(); err != nil {
		t.Fatal(err)
	}
	for i := 0; i < 3; i++ {
		if ev, _ := a.Poll(false); ev == EventStopped {
			return
		}
	}
	t.Error("a dead host keeps the agent from stopping")
}

func TestStop(t *testing.T) {
	for name, who := range map[string]int{"agent": 0, "host": 1} {
		t.Run(name, func(t *testing.T) {
			a, h, win := up(t)
			l, o := a, h
			if who == 1 {
				l, o = h, a
			}
			if err := l.Stop(); err != nil {
				t.Fatal(err)
			}
			if err := l.Stop(); err != ErrState {
				t.Errorf("second Stop: %v", err)
			}
			for i := 0; i < 3; i++ {
				if ev, err := l.Poll(true); ev == EventStopped || err != nil {
					t.Fatalf("%s before the peer has let go, %v", ev, err)
				}
			}
			expectEvent(t, o, EventQuiesce)
			if o.Reason() != ReasonLeft {
				t.Errorf("the peer says: %s", o.Reason())
			}
			if ev, _ := l.Poll(false); ev == EventStopped {
				t.Fatal("stopped while the peer's loops run")
			}
			if err := o.Quiesced(); err != nil {
				t.Fatal(err)
			}
			rung(t, a, h)
			b, err := ReadBlock(win, l.side)
			if err != nil || b.Epoch != 0 || b.Echo != 0 || b.State != StateStopped {
				t.Fatalf("after the stop the block shows %+v, %v", b, err)
			}
			if o.Up() || l.Up() {
				t.Error("still up")
			}
			// And again.
			if err := l.Start(); err != nil {
				t.Fatal(err)
			}
			rung(t, a, h)
			if !a.Up() || !h.Up() {
				t.Error("not up again")
			}
		})
	}
}

// TestStopAlone: a host that stops may go by the word of an agent that is not there, but not by memory
// that was cleared: the agent's last writes to the pool may be under way.
func TestStopAlone(t *testing.T) {
	for _, cleared := range []bool{false, true} {
		a, h, win := up(t)
		win.Mem.Store32(offEpoch, 0) // an agent that is starting again
		if cleared {
			win.Mem.Store32(offMagic, 0)
		}
		if err := h.Stop(); err != nil {
			t.Fatal(err)
		}
		ev, err := h.Poll(false)
		if want := map[bool]Event{false: EventStopped, true: EventNone}[cleared]; ev != want || err != nil {
			t.Errorf("cleared %v: %s, %v", cleared, ev, err)
		}
		// For an agent, a host's epoch of 0 is never enough.
		win.Mem.Store32(blockSize+offEpoch, 0)
		if err := a.Stop(); err != nil {
			t.Fatal(err)
		}
		if ev, err := a.Poll(true); ev != EventNone || err != nil {
			t.Errorf("agent: %s, %v", ev, err)
		}
	}
}

// allOnesBus is a device that can vanish.
type allOnesBus struct {
	m    mmio.Mem
	gone *bool
}

func (b allOnesBus) Load(off uint64, width uint) uint64 {
	if *b.gone {
		return ^uint64(0) >> (64 - 8*width)
	}
	if width == 8 {
		return b.m.Load64(off)
	}
	return uint64(b.m.Load32(off))
}

func (b allOnesBus) Store(off uint64, width uint, v uint64) {
	if *b.gone {
		return
	}
	if width == 8 {
		b.m.Store64(off, v)
	} else {
		b.m.Store32(off, uint32(v))
	}
}

func (b allOnesBus) Barrier(mmio.Barrier) {}

func TestGone(t *testing.T) {
	for _, fault := range []bool{false, true} {
		wa, wh := newWindow(0x4000)
		gone := false
		wh.Mem = mmio.NewBusMem(allOnesBus{wh.Mem, &gone}, 0x4000, mmio.Uncached)
		a := mustLink(t, LinkConfig{Window: wa, Side: board.Agent, Self: agentDeclaration()})
		h := mustLink(t, LinkConfig{Window: wh, Side: board.Host, Self: hostDeclaration()})
		a.Start()
		h.Start()
		rung(t, a, h)
		exchange(t, a, h, 10)
		rung(t, a, h)
		gone = true
		if fault {
			if !h.Fault() {
				t.Fatal("Fault: was not up")
			}
		} else if ev, err := h.Poll(true); ev != EventQuiesce || !errors.Is(err, ErrLinkGone) {
			t.Fatal(ev, err)
		}
		if h.Reason() != ReasonGone || !errors.Is(h.err, ErrLinkGone) {
			t.Error(h.Reason(), h.err)
		}
		if err := h.Quiesced(); err != nil {
			t.Fatal(err)
		}
		for i := 0; i < 3; i++ { // it is said once
			if ev, err := h.Poll(true); ev != EventNone || err != nil {
				t.Fatal(ev, err)
			}
		}
		gone = false
		// The host's writes were lost meanwhile: it must notice.
		for i := 0; i < 6 && !(a.Up() && h.Up() && a.PeerEpoch() == h.Epoch()); i++ {
			rung(t, a, h)
		}
		if !a.Up() || !h.Up() || a.PeerEpoch() != h.Epoch() || h.PeerEpoch() != a.Epoch() {
			t.Fatalf("fault %v: not up again: %v %v", fault, a.Up(), h.Up())
		}
		if h.err != nil {
			t.Error(h.err)
		}
		exchange(t, a, h, 2*MaxSlots) // nobody is left behind in the old session
	}
}

// hookBus runs a function before each access, and between the two halves of a read of 64 bits, of which it
// takes the upper one first.
type hookBus struct {
	m    mmio.Mem
	hook func(off uint64)
}

func (b *hookBus) run(off uint64) {
	if h := b.hook; h != nil {
		b.hook = nil // not within itself
		h(off)
		b.hook = h
	}
}

func (b *hookBus) Load(off uint64, width uint) uint64 {
	b.run(off)
	if width == 4 {
		return uint64(b.m.Load32(off))
	}
	hi := uint64(b.m.Load32(off + 4))
	b.run(off)
	return hi<<32 | uint64(b.m.Load32(off))
}

func (b *hookBus) Store(off uint64, width uint, v uint64) {
	b.run(off)
	if width == 4 {
		b.m.Store32(off, uint32(v))
	} else {
		b.m.Store64(off, v)
	}
}

func (b *hookBus) Barrier(mmio.Barrier) {}

// agentUpFirst returns two links of which the agent is up and the host is not yet: the moment in which
// the agent's echo holds the host's epoch, and the host has not acted on it.
func agentUpFirst(t *testing.T) (a, h *Link, abus, hbus *hookBus) {
	t.Helper()
	wa, wh := newWindow(0x4000)
	abus, hbus = &hookBus{m: wa.Mem}, &hookBus{m: wh.Mem}
	wa.Mem, wh.Mem = mmio.NewBusMem(abus, 0x4000, mmio.Uncached), mmio.NewBusMem(hbus, 0x4000, mmio.Uncached)
	a = mustLink(t, LinkConfig{Window: wa, Side: board.Agent, Self: agentDeclaration()})
	h = mustLink(t, LinkConfig{Window: wh, Side: board.Host, Self: hostDeclaration()})
	a.Start()
	h.Start()
	expectEvent(t, h, EventPeer)
	expectEvent(t, a, EventPeer)
	expectEvent(t, a, EventUp)
	return a, h, abus, hbus
}

// TestStaleEcho: an agent leaves that was up before the host was. The host must not take the agent's echo
// of before for one of after, wherever between two of the agent's accesses, or within a read of
// its own, it meets it.
func TestStaleEcho(t *testing.T) {
	met := 0
	for k := 0; k < 12; k++ {
		a, h, abus, _ := agentUpFirst(t)
		n, old := 0, a.Epoch()
		abus.hook = func(uint64) {
			if n++; n-1 != k {
				return
			}
			for i := 0; i < 4; i++ {
				h.Poll(false)
				if h.Up() && h.PeerEpoch() != old {
					t.Fatalf("access %d: up in a session that the agent has not agreed to", k)
				}
				if h.PeerEpoch() != old {
					met++
				}
			}
		}
		a.Reset()
		abus.hook = nil
	}
	a, h, _, hbus := agentUpFirst(t)
	old := a.Epoch()
	n := 0
	hbus.hook = func(off uint64) {
		if n++; off == offEpoch && n == 2 { // between the halves
			a.Reset()
			met++
		}
	}
	for i := 0; i < 4; i++ {
		h.Poll(false)
		if h.Up() && h.PeerEpoch() != old {
			t.Fatal("up by an echo that was read before the epoch")
		}
	}
	if met == 0 {
		t.Error("the test does not meet what it is about")
	}
}

// TestAnotherDeclaration: the next process of a side may declare another memory layout, and another way to ring it.
func TestAnotherDeclaration(t *testing.T) {
	_, h, _ := up(t)
	w, _ := newWindow(0x4000)
	w.Mem = h.window.Mem
	d := agentDeclaration()
	d.Ring.Peer = 99
	d.FIFOAgentToHost, d.FIFOHostToAgent = d.FIFOHostToAgent, d.FIFOAgentToHost
	bad := d
	bad.FIFOAgentToHost = 12
	if _, err := NewLink(LinkConfig{Window: w, Side: board.Agent, Self: bad}); !errors.Is(err, ErrAlign) {
		t.Fatal(err)
	}
	a := mustLink(t, LinkConfig{Window: w, Side: board.Agent, Self: d, LostTicks: 3})
	if err := a.Start(); err != nil {
		t.Fatal(err)
	}
	rung(t, a, h)
	rung(t, a, h)
	if p, ok := h.Peer(); !a.Up() || !h.Up() || !ok || p.Ring.Peer != 99 || p.FIFOAgentToHost != 0x2000 {
		t.Fatalf("%v %v %+v", a.Up(), h.Up(), p)
	}
	exchange(t, a, h, 200)
}

func exchange(t testing.TB, a, h *Link, n uint32) {
	t.Helper()
	for _, d := range [][2]*Link{{a, h}, {h, a}} {
		var m, got Slot
		for i := uint32(0); i < n; i++ {
			EncodePing(&m, uint16(i)+1, i)
			if err := d[0].Send(&m); err != nil {
				t.Fatal(err)
			}
			if ok, err := d[1].Recv(&got); err != nil || !ok || got != m {
				t.Fatal(ok, err, got)
			}
		}
		if ok, err := d[1].Recv(&got); ok || err != nil {
			t.Fatal(ok, err)
		}
	}
}

func TestBadPeer(t *testing.T) {
	a, h, win := pair(t)
	a.Start()
	h.Start()
	win.Mem.Store32(offVersion, 2)
	ev, err := h.Poll(false)
	var pe *PageError
	if ev != EventNone || !errors.As(err, &pe) || !errors.Is(err, ErrVersion) || pe.Side != board.Agent {
		t.Fatal(ev, err)
	}
	for i := 0; i < 3; i++ {
		if ev, err := h.Poll(true); ev != EventNone || err != nil {
			t.Fatal("said again:", ev, err)
		}
	}
	if h.err == nil || h.Stats().PageErrors != 1 {
		t.Error(h.err, h.Stats())
	}
	// Once it is replaced by a good one, all is well.
	a2 := mustLink(t, LinkConfig{Window: mustWindow(a), Side: board.Agent, Self: agentDeclaration()})
	a2.Start()
	rung(t, a2, h)
	if !a2.Up() || !h.Up() || h.err != nil {
		t.Error("not up", h.err)
	}
}

func mustWindow(l *Link) dma.Region { return l.window }

func TestPoolOverlap(t *testing.T) {
	wa, wh := newWindow(0x4000)
	d := hostDeclaration()
	d.Pool = []PoolRegion{{Link: 0x80003fc0, Size: 0x80, Bus: 0x1000, Access: 3}}
	a := mustLink(t, LinkConfig{Window: wa, Side: board.Agent, Self: agentDeclaration()})
	h := mustLink(t, LinkConfig{Window: wh, Side: board.Host, Self: d})
	a.Start()
	h.Start()
	for _, l := range []*Link{a, h} {
		if _, err := l.Poll(false); !errors.Is(err, ErrOverlap) {
			t.Errorf("%s: %v", l.side, err)
		}
	}
}

// TestBrokenFIFO: a peer that moves an index out of bounds costs the session, nothing else.
func TestBrokenFIFO(t *testing.T) {
	a, h, win := up(t)
	win.Mem.Store32(0x1000+fifoHead, MaxSlots+1)
	var m Slot
	_, err := h.Recv(&m)
	var fe *FIFOError
	if !errors.As(err, &fe) || !errors.Is(err, ErrFIFO) || fe.Value != MaxSlots+1 {
		t.Fatal(err)
	}
	if _, err := h.Recv(&m); err != ErrDown {
		t.Fatal(err)
	}
	if err := h.Send(&m); err != ErrDown {
		t.Fatal(err)
	}
	expectEvent(t, h, EventQuiesce)
	if h.Reason() != ReasonBroken || h.Stats().FIFOErrors != 1 {
		t.Error(h.Reason(), h.Stats())
	}
	h.Quiesced()
	rung(t, a, h)
	exchange(t, a, h, 100)
}

// TestIndicesUsedUp: an index does not wrap; the link begins anew instead.
func TestIndicesUsedUp(t *testing.T) {
	a, h, win := up(t)
	const last = ^uint32(0) - 2
	a.tx.f.own, a.tx.f.seen, h.rx.f.own, h.rx.f.seen = last, last, last, last
	win.Mem.Store32(0x1000+fifoHead, last)
	win.Mem.Store32(0x1000+fifoTail, last)
	var m, got Slot
	EncodePing(&m, 1, 1)
	for i := 0; i < 2; i++ {
		if err := a.Send(&m); err != nil {
			t.Fatal(err)
		}
		if ok, err := h.Recv(&got); !ok || err != nil {
			t.Fatal(ok, err)
		}
	}
	if err := a.Send(&m); err != ErrDown {
		t.Fatal(err)
	}
	expectEvent(t, a, EventQuiesce)
	if a.Reason() != ReasonReset {
		t.Error(a.Reason())
	}
	a.Quiesced()
	rung(t, a, h)
	exchange(t, a, h, 10)
}

func TestFull(t *testing.T) {
	a, h, _ := up(t)
	var m, got Slot
	EncodePing(&m, 1, 1)
	for i := 0; i < MaxSlots; i++ {
		if err := a.Send(&m); err != nil {
			t.Fatal(i, err)
		}
	}
	if err := a.Send(&m); err != ErrFIFOFull {
		t.Fatal(err)
	}
	h.NeedRing()
	if ok, err := h.Recv(&got); !ok || err != nil {
		t.Fatal(ok, err)
	}
	if !h.NeedRing() {
		t.Error("the agent may wait for room: it must be rung")
	}
	if h.NeedRing() {
		t.Error("one ring is enough")
	}
	if err := a.Send(&m); err != nil {
		t.Fatal(err)
	}
}

func TestStates(t *testing.T) {
	a, _, _ := pair(t)
	var m Slot
	if _, err := a.Recv(&m); err != ErrDown {
		t.Error(err)
	}
	if err := a.Send(&m); err != ErrDown {
		t.Error(err)
	}
	if err := a.Quiesced(); err != ErrState {
		t.Error(err)
	}
	if err := a.Stop(); err != ErrState {
		t.Error(err)
	}
	if ev, err := a.Poll(true); ev != EventNone || err != nil {
		t.Error(ev, err)
	}
	if err := a.Start(); err != nil {
		t.Error(err)
	}
	if err := a.Start(); err != ErrState {
		t.Error(err)
	}
	if a.Epoch() == 0 || a.Epoch() == allOnes {
		t.Error(a.Epoch())
	}
	w, _ := newWindow(0x1000)
	w.Mem, _ = w.Mem.Slice(0, 0x800)
	if _, err := NewLink(LinkConfig{Window: w, Side: board.Host}); err == nil {
		t.Error("half a page is no window")
	}
}

// TestBusAccesses counts what the host's polling costs across the bus: these are promises of
// docs/wire.md.
func TestBusAccesses(t *testing.T) {
	wa, wh := newWindow(0x4000)
	gone := false
	wh.Mem = mmio.NewBusMem(allOnesBus{wh.Mem, &gone}, 0x4000, mmio.Uncached)
	a := mustLink(t, LinkConfig{Window: wa, Side: board.Agent, Self: agentDeclaration()})
	h := mustLink(t, LinkConfig{Window: wh, Side: board.Host, Self: hostDeclaration()})
	a.Start()
	h.Start()
	rung(t, a, h)
	acct := wh.Account
	t.Logf("until up: %d reads, %d writes", acct.ControlReads, acct.ControlWrites)
	var m Slot
	EncodePing(&m, 1, 1)
	for _, c := range []struct {
		name          string
		f             func()
		reads, writes uint64
	}{
		{"Poll while up", func() { h.Poll(false) }, 1, 0},
		{"Poll with a tick", func() { h.Poll(true) }, 2, 1},
		{"Recv of nothing", func() { h.Recv(&m) }, 1, 0},
		{"Send", func() { h.Send(&m) }, 0, 9},
		{"Recv of a message", func() { a.Send(&m); acct.ControlReads = 0; h.Recv(&m) }, 10, 1},
	} {
		acct.ControlReads, acct.ControlWrites = 0, 0
		c.f()
		if acct.ControlReads != c.reads || acct.ControlWrites != c.writes {
			t.Errorf("%s: %d reads and %d writes, want %d and %d", c.name, acct.ControlReads, acct.ControlWrites, c.reads, c.writes)
		}
	}
	if acct.Reads+acct.Writes+acct.FlushReads != 0 {
		t.Errorf("%+v", *acct)
	}
}

// TestTwoGoroutines runs both sides over cached memory for the race detector, with resets.
func TestTwoGoroutines(t *testing.T) {
	a, h, _ := pair(t)
	const messages = 3000
	done := make(chan error, 2)
	run := func(l *Link, resets int) {
		var m Slot
		var sent, got uint32
		deadline := time.Now().Add(30 * time.Second)
		if err := l.Start(); err != nil {
			done <- err
			return
		}
		for polls := 0; ; polls++ {
			ev, err := l.Poll(false)
			if err != nil {
				done <- err
				return
			}
			switch ev {
			case EventQuiesce:
				l.Quiesced()
				continue
			case EventUp:
				sent, got = 0, 0
			}
			if time.Now().After(deadline) {
				done <- errors.New(l.side.String() + ": no end")
				return
			}
			if !l.Up() {
				runtime.Gosched()
				continue
			}
			if resets > 0 && got > messages/2 {
				resets--
				l.Reset()
				l.Quiesced()
				continue
			}
			if sent < messages {
				EncodePing(&m, 1, sent)
				if l.Send(&m) == nil {
					sent++
				}
			}
			ok, err := l.Recv(&m)
			if err != nil && err != ErrDown {
				done <- err
				return
			}
			if ok {
				if data, err := DecodePing(&m); err != nil || data != got {
					done <- errors.New("message out of order")
					return
				}
				got++
			}
			if got == messages && sent == messages && resets == 0 {
				done <- nil
				return
			}
			if !ok {
				runtime.Gosched()
			}
		}
	}
	go run(a, 3)
	go run(h, 2)
	for i := 0; i < 2; i++ {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

func TestNoAllocations(t *testing.T) {
	a, h, _ := up(t)
	var m Slot
	var r Requests
	if n := testing.AllocsPerRun(1000, func() {
		token, err := r.Begin(true, BusPing, 0)
		if err != nil {
			t.Fatal(err)
		}
		EncodePing(&m, token, 1)
		if a.Send(&m) != nil {
			t.Fatal("Send")
		}
		h.Poll(true)
		h.NeedRing()
		if ok, _ := h.Recv(&m); !ok {
			t.Fatal("Recv")
		}
		data, _ := DecodePing(&m)
		EncodePong(&m, token, data)
		if h.Send(&m) != nil {
			t.Fatal("Send")
		}
		a.Poll(true)
		a.NeedRing()
		if ok, _ := a.Recv(&m); !ok {
			t.Fatal("Recv")
		}
		hd, err := m.Header()
		if err != nil || !r.Match(hd) {
			t.Fatal(err)
		}
		var f FeatureBlocks
		var q VQueue
		var c ConfigData
		f.EncodeRequest(&m, 0, 1)
		f.DecodeRequest(&m)
		q.EncodeRequest(&m, 0, 1)
		q.DecodeRequest(&m)
		c.EncodeRequest(&m, 0, 1)
		c.DecodeRequest(&m)
	}); n != 0 {
		t.Errorf("%v allocations for a PING there and back", n)
	}
}

func BenchmarkPollUp(b *testing.B) {
	_, h, _ := up(b)
	b.ReportAllocs()
	for b.Loop() {
		h.Poll(false)
	}
}

func BenchmarkSendRecv(b *testing.B) {
	a, h, _ := up(b)
	var m Slot
	EncodePing(&m, 1, 1)
	b.ReportAllocs()
	for b.Loop() {
		if a.Send(&m) != nil {
			b.Fatal("Send")
		}
		if ok, _ := h.Recv(&m); !ok {
			b.Fatal("Recv")
		}
	}
}

func BenchmarkHandshake(b *testing.B) {
	a, h, _ := up(b)
	b.ReportAllocs()
	for b.Loop() {
		a.Reset()
		a.Quiesced()
		rung(b, a, h)
		if !a.Up() || !h.Up() {
			b.Fatal("not up")
		}
	}
}

func BenchmarkVQueueCodec(b *testing.B) {
	var m Slot
	q := VQueue{Index: 1, Size: 256, Desc: 0x1000, Driver: 0x2000, Device: 0x3000}
	b.ReportAllocs()
	for b.Loop() {
		q.EncodeRequest(&m, 1, 2)
		if q.DecodeRequest(&m) != nil {
			b.Fatal("decode")
		}
	}
}

// TestWiped: whoever clears the blocks of the link page under the two ends, the agent's, the host's or
// both, to zeros or ones, in whatever state of the handshake: both come up again by themselves.
func TestWiped(t *testing.T) {
	for _, across := range []bool{false, true} {
		for _, with := range []uint64{0, ^uint64(0)} {
			for which := 1; which <= 3; which++ {
				// Polls of both sides between the start and the wiping: 0 to 3 lie before "up".
				for when := 0; when < 8; when++ {
					wa, wh := newWindow(0x4000)
					wh.Across = across
					links := []*Link{mustLink(t, LinkConfig{Window: wa, Side: board.Agent, Self: agentDeclaration(), LostTicks: 3}),
						mustLink(t, LinkConfig{Window: wh, Side: board.Host, Self: hostDeclaration(), LostTicks: 3})}
					poll := func(l *Link, tick bool) {
						ev, err := l.Poll(tick)
						var page *PageError
						if err != nil && !errors.As(err, &page) && err != ErrLinkGone {
							t.Fatal(err)
						}
						if ev == EventQuiesce {
							if err := l.Quiesced(); err != nil {
								t.Fatal(err)
							}
						}
					}
					for _, l := range links {
						if err := l.Start(); err != nil {
							t.Fatal(err)
						}
					}
					for i := 0; i < when; i++ {
						poll(links[i%2], false)
					}
					for i := uint64(0); i < 2; i++ {
						for o := i * blockSize; which>>i&1 != 0 && o < (i+1)*blockSize; o += 8 {
							wa.Mem.Store64(o, with)
						}
					}
					ticks := 0
					up := func() bool {
						a, h := links[0], links[1]
						return a.Up() && h.Up() && a.PeerEpoch() == h.Epoch() && h.PeerEpoch() == a.Epoch() &&
							a.stands() && h.stands()
					}
					for ; !up(); ticks++ {
						if ticks == 20 {
							t.Fatalf("across %v, block %d wiped to %x after %d polls: not up within %d ticks: the agent's error %v, the host's %v",
								across, which, with, when, ticks, links[0].err, links[1].err)
						}
						for _, l := range links {
							poll(l, true)
							poll(l, false)
						}
					}
					if s := links[0].Stats().Wiped + links[1].Stats().Wiped; s == 0 && when >= 2 {
						t.Errorf("across %v, block %d wiped after %d polls: nobody counts it", across, which, when)
					}
				}
			}
		}
	}
}

// TestCorrupted: words of the own block that somebody changed, and no wiping would have found, are written
// again within a second of default ticks while the link is not up.
func TestCorrupted(t *testing.T) {
	a, h, _ := pair(t)
	if err := a.Start(); err != nil {
		t.Fatal(err)
	}
	for off := uint64(0); off < blockLen; off += 4 {
		if off == offBeat || off == offState {
			continue // nobody relies on them before the link is up
		}
		a.w.store32(off, a.w.load32(off)^0x100)
		for n := 0; !a.stands(); n++ {
			if n > wholeCheck {
				t.Fatalf("offset %#x is not mended in %d ticks", off, n)
			}
			if _, err := a.Poll(true); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := h.Start(); err != nil {
		t.Fatal(err)
	}
	rung(t, a, h)
	if !a.Up() || !h.Up() {
		t.Error("not up")
	}
}

// TestCanRing: a peer that wants to be rung in a way that this board does not have is refused, by name.
func TestCanRing(t *testing.T) {
	wa, wh := newWindow(0x4000)
	bad := errors.New("a board without doorbell registers")
	a := mustLink(t, LinkConfig{Window: wa, Side: board.Agent, Self: agentDeclaration(), CanRing: func(r board.RingInfo) error {
		if r.Method == board.RingRegister {
			return bad
		}
		return nil
	}})
	h := mustLink(t, LinkConfig{Window: wh, Side: board.Host, Self: hostDeclaration()})
	h.Start()
	a.Start()
	_, err := a.Poll(false)
	var page *PageError
	if !errors.As(err, &page) || page.Side != board.Host || page.Field != "ring method" || page.Value != 2 || !errors.Is(err, ErrRing) {
		t.Fatalf("Poll returns %v", err)
	}
	d := hostDeclaration()
	d.Ring = board.RingInfo{Method: board.RingIvshmem, Peer: 4, Vectors: 1}
	h = mustLink(t, LinkConfig{Window: wh, Side: board.Host, Self: d})
	h.Start()
	rung(t, a, h)
	if !a.Up() || !h.Up() {
		t.Error("not up after the host asks for another way")
	}
}

// TestHold: a side that holds answers nothing, keeps its heartbeat, and comes up when it is let.
func TestHold(t *testing.T) {
	a, h, _ := up(t)
	h.Reset()
	h.Quiesced()
	h.Hold(true)
	for i := 0; i < 5; i++ {
		for _, l := range []*Link{a, h} {
			if ev, err := l.Poll(true); err != nil {
				t.Fatal(err)
			} else if ev == EventQuiesce {
				l.Quiesced()
			}
		}
	}
	beat := h.w.load32(h.own + offBeat)
	if h.Poll(true); h.Up() || a.Up() || h.echo != 0 || h.w.load32(h.own+offBeat) != beat+1 {
		t.Errorf("held, and up %v, the agent %v, echo %x", h.Up(), a.Up(), h.echo)
	}
	h.Hold(false)
	rung(t, h, a)
	if !a.Up() || !h.Up() {
		t.Fatal("not up")
	}
	h.Hold(true)
	if ev, err := h.Poll(true); ev != EventNone || err != nil || !h.Up() {
		t.Errorf("a link that is up: %v, %v", ev, err)
	}
}

// TestPeek: a message stays where it is until it is taken; what was peeked at is what was there then.
func TestPeek(t *testing.T) {
	wa, wh := newWindow(0x4000)
	d := agentDeclaration()
	d.SlotsAgentToHost, d.SlotsHostToAgent = 1, 1
	a := mustLink(t, LinkConfig{Window: wa, Side: board.Agent, Self: d})
	h := mustLink(t, LinkConfig{Window: wh, Side: board.Host, Self: hostDeclaration()})
	a.Start()
	h.Start()
	rung(t, a, h)
	for i := uint32(1); i < 5; i++ {
		var m, n Slot
		if ok, err := a.Room(); !ok || err != nil {
			t.Fatalf("room %v, %v", ok, err)
		}
		EncodePing(&m, 1, i)
		if err := a.Send(&m); err != nil {
			t.Fatal(err)
		}
		for j := 0; j < 2; j++ {
			if ok, err := h.Peek(&n); !ok || err != nil || n != m {
				t.Fatalf("Peek: %v, %v, % x", ok, err, n)
			}
			if ok, err := a.Room(); ok || err != nil {
				t.Fatalf("room %v, %v before it is taken", ok, err)
			}
		}
		h.Take()
		if ok, err := h.Peek(&n); ok || err != nil {
			t.Fatalf("Peek after Take: %v, %v", ok, err)
		}
	}
	if s := h.Stats(); s.Received != 4 {
		t.Errorf("received %d", s.Received)
	}
}
