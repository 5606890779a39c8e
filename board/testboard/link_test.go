package testboard_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/boardlink/boardlink/board"
	. "github.com/boardlink/boardlink/board/testboard"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/virtiomsg"
)

// The link test: both sides shake hands, exchange messages, and write into memory that the other one
// shows, while processes are killed, started again, stopped and continued. Each side owns
// an area: the agent one in board memory, the host one in host memory (the pool). When a
// handshake is complete it rewrites its area and tells the peer, in a message, the
// number to write there from now on. A write from before that lands in the area
// afterwards is what the handshake must never allow.
const (
	linkA2H   = 0x1000
	linkH2A   = 0x2000
	areaBoard = 0x3000
	areaHost  = 0x100
	areaWords = 2
	messages  = 4 // each side sends, for each handshake
)

var errLate = errors.New("a write from before the handshake landed in an area of the time after it")

type linkTest struct {
	faults []string
	// later: a killed process is started again after some time only, in which the other side
	// knows that it is dead, as a lock tells.
	later bool
	slots uint32 // of the FIFOs; 0: two, which fill up
	// wipes: the link page is wiped now and then, so that a side may find it bad.
	wipes bool
	// Mutations.
	eager bool // rewrite the area without waiting for EventUp
	deaf  bool // go on writing after EventQuiesce
	// noTicks: nothing but doorbells wakes a side.
	noTicks bool
	ignore  func(mmio.Barrier) bool
}

func (c *linkTest) setup(b *Board) {
	r := &linkRun{c: c, b: b}
	for side := board.Host; side <= board.Agent; side++ {
		r.start(side)
	}
	for _, f := range c.faults {
		if wipe, ok := wipes[f]; ok {
			b.Fault(f, 1, func() { wipe(b) })
			continue
		}
		var side board.Side
		switch {
		case f == "kill host", f == "stop host":
			side = board.Host
		case f == "kill agent", f == "stop agent":
			side = board.Agent
		default:
			panic(f)
		}
		kill := f[:4] == "kill"
		b.Fault(f, 1, func() {
			if r.finished() {
				return
			}
			if kill {
				b.Kill(r.procs[side])
				r.start(side)
			} else {
				b.Stall(r.procs[side])
			}
		})
	}
	for _, x := range []struct {
		side board.Side
		off  uint64
	}{{board.Agent, 0}, {board.Host, 0x800}} {
		for off, n := range map[uint64]string{0x40: "epoch", 0x44: "echo", 0x48: "beat", 0x4c: "state"} {
			b.Name(board.Agent, x.off+off, 4, fmt.Sprintf("%s's %s", x.side, n))
		}
	}
	b.Name(board.Agent, linkA2H, 0x1000, "fifo to host")
	b.Name(board.Agent, linkH2A, 0x1000, "fifo to agent")
	b.Name(board.Agent, areaBoard, 8*areaWords, "area")
	b.Name(board.Host, areaHost, 8*areaWords, "area")
}

// wipes are faults of the memory in which the link page lies: a side's block, or both, read as zeros or
// ones from one moment on. No process is told.
var wipes = map[string]func(*Board){
	"wipe agent":         func(b *Board) { wipeBlocks(b, 0, 0) },
	"wipe host":          func(b *Board) { wipeBlocks(b, 0, 0x800) },
	"wipe both":          func(b *Board) { wipeBlocks(b, 0, 0, 0x800) },
	"wipe agent to ones": func(b *Board) { wipeBlocks(b, ^uint64(0), 0) },
	"wipe host to ones":  func(b *Board) { wipeBlocks(b, ^uint64(0), 0x800) },
	"wipe both to ones":  func(b *Board) { wipeBlocks(b, ^uint64(0), 0, 0x800) },
}

func wipeBlocks(b *Board, v uint64, blocks ...uint64) {
	for _, o := range blocks {
		for i := uint64(0); i < 0x200; i += 8 {
			b.Poke(board.Agent, o+i, 8, v)
		}
	}
}

// linkRun is what the processes of a run share behind the model's back.
type linkRun struct {
	c       *linkTest
	b       *Board
	procs   [2]*Proc
	started [2]int
	goal    [2]bool
	alive   [2]bool
	gen     uint64
	over    bool
}

// finished stays true: nothing that comes later counts.
func (r *linkRun) finished() bool {
	r.over = r.over || r.goal[0] && r.goal[1]
	return r.over
}

func (r *linkRun) start(side board.Side) {
	r.started[side]++
	r.goal[side], r.alive[side] = false, false
	n := &linkNode{r: r, side: side}
	r.procs[side] = r.b.Go(side, fmt.Sprintf("%v %d", side, r.started[side]), n.run)
}

type linkNode struct {
	r          *linkRun
	side       board.Side
	p          *Proc
	link       *virtiomsg.Link
	area       dma.Span // own
	peer       dma.Span // the other side's
	gen        uint64   // of the own area
	peerGen    uint64   // to write into the peer's area
	sent, rcvd int
}

func (n *linkNode) run(p *Proc) {
	n.p = p
	for i := 0; i < 5 && n.r.c.later && n.r.started[n.side] > 1; i++ {
		p.WaitTimeout(0)
	}
	n.r.alive[n.side] = true
	window := dma.Region{Name: "window", Addr: windowBase, Mem: p.Mem(board.Agent), Access: dma.DeviceRead | dma.DeviceWrite, Across: n.side == board.Host}
	pool := dma.Region{Name: "pool", Addr: poolBase, Mem: p.Mem(board.Host), Access: dma.DeviceRead | dma.DeviceWrite, Across: n.side == board.Agent}
	if n.r.c.ignore != nil {
		window.Mem = mmio.NewBusMem(&deaf{window.Mem, n.r.c.ignore}, window.Mem.Size(), window.Mem.Kind())
	}
	n.area = dma.Span{Region: &window, Off: areaBoard, Len: 8 * areaWords}
	n.peer = dma.Span{Region: &pool, Off: areaHost, Len: 8 * areaWords}
	self := virtiomsg.Declaration{Ring: board.RingInfo{Method: board.RingIvshmem, Peer: uint32(n.side), Vectors: 1}}
	if n.side == board.Host {
		n.area, n.peer = n.peer, n.area
		self.Pool = []virtiomsg.PoolRegion{{Link: poolBase, Size: 0x1000, Bus: poolBase, Access: dma.DeviceRead | dma.DeviceWrite}}
	} else {
		self.FIFOAgentToHost, self.FIFOHostToAgent = linkA2H, linkH2A
		self.SlotsAgentToHost, self.SlotsHostToAgent = n.r.c.slots, n.r.c.slots
		if n.r.c.slots == 0 {
			self.SlotsAgentToHost, self.SlotsHostToAgent = 2, 2
		}
		self.Regions = []virtiomsg.Region{{Addr: windowBase + areaBoard, Size: 0x1000, Offset: areaBoard, Access: dma.DeviceRead | dma.DeviceWrite}}
	}
	cfg := virtiomsg.LinkConfig{Window: window, Side: n.side, Self: self, LostTicks: 3,
		Rand: func() (uint32, error) {
			return uint32(n.r.started[n.side])*0x01000193 + uint32(n.side)*0x811c9dc5, nil
		}}
	if n.r.c.later {
		o := n.side.Other()
		cfg.PeerDead = func() bool { return !n.r.alive[o] && !p.Board().UnderWay(o) }
	}
	var err error
	if n.link, err = virtiomsg.NewLink(cfg); err != nil {
		p.Fail(err)
	}
	if err := n.link.Start(); err != nil {
		p.Fail(err)
	}
	if n.r.c.eager {
		n.rewrite()
	}
	for tick := false; !n.r.finished(); {
		n.poll(tick)
		if n.link.Up() {
			n.work()
		}
		n.ring()
		if n.r.finished() {
			break
		}
		if n.r.c.noTicks {
			p.WaitDoorbell(0)
		} else {
			tick = p.WaitTimeout(0) == 0
		}
	}
	p.Ring(0) // it may sleep without ticks
}

func (n *linkNode) ring() {
	if n.link.NeedRing() {
		n.p.Ring(0)
	}
}

func (n *linkNode) poll(tick bool) {
	for {
		ev, err := n.link.Poll(tick)
		var page *virtiomsg.PageError
		if err != nil && !(n.r.c.wipes && (errors.As(err, &page) || errors.Is(err, virtiomsg.ErrLinkGone))) {
			n.p.Failf("poll: %v", err)
		}
		tick = false
		switch ev {
		case virtiomsg.EventNone:
			n.ring()
			return
		case virtiomsg.EventUp:
			n.p.Logf("up")
			if !n.r.c.eager {
				n.rewrite()
			}
			n.peerGen, n.sent, n.rcvd = 0, 0, 0
		case virtiomsg.EventQuiesce:
			n.p.Logf("quiesce: %v", n.link.Reason())
			n.r.goal[n.side] = false
			if !n.r.c.deaf {
				n.peerGen = 0
			}
			// What was written to the other side's memory has landed.
			n.peer.Region.Mem.Barrier(mmio.FullBarrier)
			n.peer.Region.Mem.Load64(n.peer.Off)
			if n.r.c.eager {
				n.rewrite()
			}
			if err := n.link.Quiesced(); err != nil {
				n.p.Fail(err)
			}
		}
		n.ring()
		if n.r.c.deaf {
			n.stamp()
		}
	}
}

// rewrite lays the own area out anew.
func (n *linkNode) rewrite() {
	n.r.gen++
	n.gen = n.r.gen
	for i := uint64(0); i < areaWords; i++ {
		n.area.Region.Mem.Store64(n.area.Off+8*i, 0)
	}
	n.area.Region.Mem.Barrier(mmio.FullBarrier)
}

// check looks for writes that do not belong into the area.
func (n *linkNode) check() {
	for i := uint64(0); i < areaWords; i++ {
		if v := n.area.Region.Mem.Load64(n.area.Off + 8*i); v != 0 && v != n.gen {
			n.p.Fail(fmt.Errorf("%w: generation %d, not %d", errLate, v, n.gen))
		}
	}
}

// stamp writes into the peer's area.
func (n *linkNode) stamp() {
	if n.peerGen == 0 {
		return
	}
	for i := uint64(0); i < areaWords; i++ {
		n.peer.Region.Mem.Store64(n.peer.Off+8*i, n.peerGen)
	}
}

func (n *linkNode) work() {
	n.check()
	var s virtiomsg.Slot
	for n.sent < messages {
		binary.LittleEndian.PutUint64(s[:], uint64(n.sent))
		binary.LittleEndian.PutUint64(s[8:], n.gen)
		for i := 16; i < len(s); i++ {
			s[i] = byte(n.gen) + byte(n.sent)
		}
		err := n.link.Send(&s)
		if err == virtiomsg.ErrFIFOFull || err == virtiomsg.ErrDown {
			break
		}
		if err != nil {
			n.p.Failf("send: %v", err)
		}
		n.sent++
	}
	n.ring()
	for {
		ok, err := n.link.Recv(&s)
		if err == virtiomsg.ErrDown || err == nil && !ok {
			break
		}
		if err != nil {
			n.p.Failf("receive: %v", err)
		}
		seq, gen := binary.LittleEndian.Uint64(s[:]), binary.LittleEndian.Uint64(s[8:])
		if seq != uint64(n.rcvd) || gen == 0 || n.rcvd > 0 && gen != n.peerGen {
			n.p.Failf("message %d is number %d with generation %d", n.rcvd, seq, gen)
		}
		for i := 16; i < len(s); i++ {
			if s[i] != byte(gen)+byte(seq) {
				n.p.Failf("message %d is torn at byte %d: % x", n.rcvd, i, s[:])
			}
		}
		n.rcvd++
		n.peerGen = gen
		n.stamp()
	}
	n.stamp()
	n.check()
	if n.sent == messages && n.rcvd == messages {
		n.r.goal[n.side] = true
	}
}

func TestLinkHandshake(t *testing.T) {
	for _, m := range machines {
		m := m
		t.Run(m.name, func(t *testing.T) {
			c := linkTest{}
			Explore(t, Search{Options: m.o, Runs: runs(500), Bound: 1, MaxSystematic: runs(500)}, c.setup)
		})
	}
}

// TestLinkNeedsNoTicks: where no process dies, doorbells alone bring the link up and the
// messages across, whoever is first.
func TestLinkNeedsNoTicks(t *testing.T) {
	for _, m := range machines {
		m := m
		t.Run(m.name, func(t *testing.T) {
			c := linkTest{noTicks: true} // FIFOs that fill up: who waits for room is rung too
			Explore(t, Search{Options: m.o, Runs: runs(500), Bound: 2, MaxSystematic: runs(300)}, c.setup)
		})
	}
}

var linkFaults = []string{"kill host", "kill agent", "stop host", "stop agent"}

// TestLinkRestartAnywhere kills or stops either side at every step of a handshake and the
// exchange after it; a stopped side goes on when the other one has given it up.
func TestLinkRestartAnywhere(t *testing.T) {
	for _, f := range linkFaults {
		f := f
		t.Run(f, func(t *testing.T) {
			c := linkTest{faults: []string{f}}
			if f[:4] == "kill" {
				Explore(t, Search{Options: harshest, FaultsOnly: true, Bound: 1, MaxSystematic: runs(400)}, (&linkTest{faults: c.faults, later: true}).setup)
			}
			res := Explore(t, Search{Options: harshest, FaultsOnly: true, Bound: 1, MaxSystematic: runs(20000)}, c.setup)
			if res.Complete < 1 && runs(10) == 10 {
				t.Errorf("not every step was tried in %d schedules", res.Runs)
			}
		})
	}
}

// TestLinkWipedAnywhere wipes the link page under the two sides at every step of a handshake and the exchange
// after it, and while one of them is killed or stopped, too.
func TestLinkWipedAnywhere(t *testing.T) {
	for f := range wipes {
		f := f
		t.Run(f, func(t *testing.T) {
			c := linkTest{faults: []string{f}, wipes: true}
			if strings.HasSuffix(f, "to ones") { // much the same, and dearer: the host waits for the window
				Explore(t, Search{Options: harshest, FaultsOnly: true, Bound: 1, MaxSystematic: runs(200)}, c.setup)
			} else {
				res := Explore(t, Search{Options: harshest, FaultsOnly: true, Bound: 1, MaxSystematic: runs(10000)}, c.setup)
				if res.Complete < 1 && runs(10) == 10 {
					t.Errorf("not every step was tried in %d schedules", res.Runs)
				}
			}
			c.faults = append(c.faults, linkFaults...)
			Explore(t, Search{Options: harshest, Runs: runs(40), FaultsOnly: true, Bound: 3, MaxSystematic: runs(20)}, c.setup)
		})
	}
}

// TestLinkRestartsTogether lets several faults happen in one run, at any two steps and
// under random schedules.
func TestLinkRestartsTogether(t *testing.T) {
	for _, m := range machines {
		m := m
		t.Run(m.name, func(t *testing.T) {
			for _, later := range []bool{false, true} {
				c := linkTest{faults: linkFaults, later: later}
				Explore(t, Search{Options: m.o, Runs: runs(400), FaultsOnly: true, Bound: 3, MaxSystematic: runs(200)}, c.setup)
			}
		})
	}
}

// TestLinkMutated breaks the owner's part of the handshake: the search must see it.
func TestLinkMutated(t *testing.T) {
	no := func(k mmio.Barrier) func(mmio.Barrier) bool { return func(b mmio.Barrier) bool { return b == k } }
	for _, m := range []struct {
		name string
		o    Options
		c    linkTest
		late bool
	}{
		{"rewrites early, kill host", harshInOrder, linkTest{faults: linkFaults[:1], eager: true}, true},
		{"rewrites early, kill agent", harshInOrder, linkTest{faults: linkFaults[1:2], eager: true}, true},
		{"rewrites early, stop host", harshInOrder, linkTest{faults: linkFaults[2:3], eager: true}, true},
		{"rewrites early, stop agent", harshInOrder, linkTest{faults: linkFaults[3:], eager: true}, true},
		{"goes on writing", harshInOrder, linkTest{faults: linkFaults, deaf: true}, true},
		{"no write barrier", harshInOrder, linkTest{ignore: no(mmio.WriteBarrier)}, false},
		{"no read barrier", Options{StaleLoads: true}, linkTest{ignore: no(mmio.ReadBarrier)}, false},
	} {
		m := m
		t.Run(m.name, func(t *testing.T) {
			res := Find(Search{Options: m.o, Bound: -1, Runs: 5000, Seed: 1}, m.c.setup)
			if res.Failure == nil {
				t.Fatalf("not found in %d schedules", res.Runs)
			}
			if res.Failure.Kind != CheckFailure || m.late && !errors.Is(res.Failure, errLate) {
				t.Fatalf("found something else: %v", res.Failure)
			}
			t.Logf("schedule %d, %s: %v", res.Runs, res.Failure.Replay, res.Failure.Err)
		})
	}
}
