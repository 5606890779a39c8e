package virtiomsg

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand"
	"testing"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
	"pgregory.net/rapid"
)

// The model: two Links over the agent's memory. The host reaches it across a bus with posted
// writes, which land in order, any time later; its reads push them. The agent reaches the host's
// pool the same way. Processes are killed between any two accesses, stopped and started
// again, the board is reset; at each access the other side may run.

const (
	modelSize = 0x4000
	areaWords = 20 // in a page of the agent's: words tagged with its epoch
	poolLink  = 0x90000000
)

// place is where an incarnation of the agent puts its FIFOs and the area: where one has index
// words another one has data.
type place struct{ a2h, h2a, area uint64 }

func randomPlace(rng *rand.Rand) place {
	p := rng.Perm(3)
	return place{uint64(p[0]+1) * PageSize, uint64(p[1]+1) * PageSize, uint64(p[2]+1) * PageSize}
}

type postedWrite struct {
	off   uint64
	width uint
	v     uint64
}

type crash struct{}

type world struct {
	t      failer
	rng    *rand.Rand
	mem    [modelSize]byte // the agent's memory
	pool   [areaWords * 8]byte
	toMem  []postedWrite // the host's writes under way
	toPool []postedWrite // the agent's
	gone   bool          // the board is in reset
	resets int
	wipes  int
	depth  int
	mess   bool // interleave and kill
	sides  [2]*modelSide
	ups    int
	trace  []string
}

type failer interface {
	Fatalf(format string, args ...any)
	Logf(format string, args ...any)
}

type modelSide struct {
	w      *world
	side   board.Side
	link   *Link
	knows  bool // PeerDead works
	alive  bool
	held   bool // SIGSTOP
	inside bool // paused within an access
	killIn int  // accesses until it dies; 0: it does not
	loops  bool // loops may touch shared memory
	asked  bool // EventQuiesce has come
	own    uint32
	peer   uint32 // of the session that the loops run in
	sent   uint32
	recvd  uint32
	place  place
	ready  bool // agent: area and pool are initialised; host: told so
}

func put(b []byte, width uint, v uint64) {
	switch width {
	case 1:
		b[0] = byte(v)
	case 2:
		binary.LittleEndian.PutUint16(b, uint16(v))
	case 4:
		binary.LittleEndian.PutUint32(b, uint32(v))
	default:
		binary.LittleEndian.PutUint64(b, v)
	}
}

func get(b []byte, width uint) uint64 {
	switch width {
	case 1:
		return uint64(b[0])
	case 2:
		return uint64(binary.LittleEndian.Uint16(b))
	case 4:
		return uint64(binary.LittleEndian.Uint32(b))
	}
	return binary.LittleEndian.Uint64(b)
}

// zeros holds when a side's echo becomes visible.
func (w *world) zeros(who string, indices ...uint64) {
	for _, o := range indices {
		if v := binary.LittleEndian.Uint32(w.mem[o:]); v != 0 {
			w.fatalf("the %s's echo is seen while the index at %#x is %d", who, o, v)
		}
	}
}

func (w *world) landMem(n int) {
	for ; n > 0; n-- {
		p := w.toMem[0]
		land(&w.toMem, w.mem[:], 1)
		if p.off == blockSize+offEcho && p.v != 0 {
			if a := w.sides[board.Agent]; a.alive && p.v == uint64(a.link.Epoch()) {
				w.zeros("host", a.place.h2a+fifoHead, a.place.a2h+fifoTail)
			}
		}
	}
}

func land(queue *[]postedWrite, mem []byte, n int) {
	for _, p := range (*queue)[:n] {
		put(mem[p.off:], p.width, p.v)
	}
	*queue = (*queue)[n:]
}

// windowBus is a side's way to the agent's memory.
type windowBus struct{ s *modelSide }

func (b windowBus) Load(off uint64, width uint) uint64 {
	b.s.access()
	w := b.s.w
	if b.s.side == board.Host {
		if w.gone {
			return ^uint64(0) >> (64 - 8*width)
		}
		w.landMem(len(w.toMem))
		if width == 8 && w.rng.Intn(2) == 0 {
			// A bus that takes a wide read as two, in an order of its own.
			hi := get(w.mem[off+4:], 4)
			w.interleave(b.s)
			if w.gone {
				return ^uint64(0)
			}
			return get(w.mem[off:], 4) | hi<<32
		}
	}
	return get(w.mem[off:], width)
}

func (b windowBus) Store(off uint64, width uint, v uint64) {
	b.s.access()
	w := b.s.w
	if b.s.side == board.Agent {
		put(w.mem[off:], width, v)
		if off == offEcho && v != 0 {
			p := b.s.place
			w.zeros("agent", p.a2h+fifoHead, p.a2h+fifoTail, p.h2a+fifoHead, p.h2a+fifoTail)
		}
	} else if !w.gone {
		w.toMem = append(w.toMem, postedWrite{off, width, v})
	}
}

func (b windowBus) Barrier(mmio.Barrier) {}

// access is called before each access of a side: the place to die, or to be overtaken.
func (s *modelSide) access() {
	if s.killIn > 0 {
		if s.killIn--; s.killIn == 0 {
			panic(crash{})
		}
	}
	s.w.interleave(s)
}

func (w *world) interleave(s *modelSide) {
	if w.mess && w.depth == 0 && w.rng.Intn(12) == 0 {
		w.depth++
		s.inside = true
		for n := 1 + w.rng.Intn(4); n > 0; n-- {
			w.act(w.sides[s.side.Other()])
		}
		s.inside = false
		w.depth--
	}
}

func (w *world) logf(format string, args ...any) {
	w.trace = append(w.trace, fmt.Sprintf(format, args...))
}

func (w *world) fatalf(format string, args ...any) {
	n := len(w.trace)
	if n > 60 {
		n = 60
	}
	for _, l := range w.trace[len(w.trace)-n:] {
		w.t.Logf("%s", l)
	}
	w.t.Fatalf(format, args...)
}

func (s *modelSide) start() {
	w := s.w
	region := dma.Region{Name: "window", Mem: mmio.NewBusMem(windowBus{s}, modelSize, mmio.Uncached),
		Across: s.side == board.Host, Account: new(dma.Account)}
	c := LinkConfig{Window: region, Side: s.side, LostTicks: 3 + w.rng.Intn(5),
		Rand: func() (uint32, error) { return w.rng.Uint32(), nil }}
	if s.knows {
		c.PeerDead = func() bool {
			o := w.sides[s.side.Other()]
			return !o.alive && len(w.toMem) == 0 && len(w.toPool) == 0
		}
	}
	if s.side == board.Agent {
		s.place = randomPlace(w.rng)
		// What Start asks for: what a dead agent wrote to the pool has landed. (The host's
		// writes to the window need no such rule: they are in order with its words.)
		land(&w.toPool, w.pool[:], len(w.toPool))
		c.Self = Declaration{FIFOAgentToHost: s.place.a2h, FIFOHostToAgent: s.place.h2a, SlotsAgentToHost: 1 + uint32(w.rng.Intn(MaxSlots)),
			SlotsHostToAgent: 3, Regions: []Region{{Addr: 0x80003000, Size: 0x1000, Offset: s.place.area, Access: 3}}}
	} else {
		c.Self = Declaration{Pool: []PoolRegion{{Link: poolLink, Size: 64, Bus: 0x1000, Access: 3}}}
	}
	l, err := NewLink(c)
	if err != nil {
		w.fatalf("%v", err)
	}
	s.link, s.alive, s.held, s.loops, s.asked, s.ready = l, true, false, false, false, false
	w.logf("%s starts", s.side)
	if err := l.Start(); err != nil {
		w.fatalf("%v", err)
	}
}

func (s *modelSide) kill() {
	s.w.logf("%s killed", s.side)
	s.alive, s.held, s.loops, s.asked, s.ready, s.killIn = false, false, false, false, false, 0
}

// do runs f as the side's process, which may die in it.
func (s *modelSide) do(f func()) {
	defer func() {
		if r := recover(); r != nil {
			if _, ok := r.(crash); !ok {
				panic(r)
			}
			s.kill()
		}
	}()
	f()
}

func tag(epoch, n uint32) uint64 { return uint64(epoch)<<32 | uint64(n) }

func (s *modelSide) poll(tick bool) Event {
	w := s.w
	ev, err := s.link.Poll(tick)
	var page *PageError
	if err != nil && !errors.Is(err, ErrLinkGone) && !(w.resets+w.wipes > 0 && errors.As(err, &page)) {
		w.fatalf("%s: Poll: %v", s.side, err)
	}
	if ev != EventNone {
		w.logf("%s: %s (%s), own %x peer %x", s.side, ev, s.link.Reason(), s.link.Epoch(), s.link.PeerEpoch())
	}
	switch ev {
	case EventUp:
		if s.loops || !s.link.released {
			w.fatalf("%s: up with loops %v, released %v", s.side, s.loops, s.link.released)
		}
		s.loops, s.asked, s.ready = true, false, false
		s.own, s.peer, s.sent, s.recvd = s.link.Epoch(), s.link.PeerEpoch(), 0, 0
		w.ups++
		if s.side == board.Agent {
			if len(w.toMem) > 0 {
				for _, p := range w.toMem {
					if p.off/PageSize*PageSize == s.place.area {
						w.fatalf("agent up, with a host's write to %#x under way", p.off)
					}
				}
			}
			bus := windowBus{s}
			for i := uint64(0); i < areaWords; i++ {
				bus.Store(s.place.area+8*i, 8, tag(s.own, 0))
			}
			for i := uint64(0); i < areaWords; i++ {
				w.toPool = append(w.toPool, postedWrite{8 * i, 8, tag(s.peer, 0)})
			}
			land(&w.toPool, w.pool[:], len(w.toPool)) // read back
			s.ready = true
		}
	case EventQuiesce:
		if !s.loops || s.asked {
			w.fatalf("%s: asked to quiesce with loops %v, asked %v", s.side, s.loops, s.asked)
		}
		s.asked = true
	case EventStopped:
		o := w.sides[s.side.Other()]
		if s.side == board.Agent {
			for _, p := range w.toMem {
				if p.off/PageSize*PageSize == s.place.area {
					w.fatalf("agent stopped with a host's write to %#x under way", p.off)
				}
			}
		} else if len(w.toPool) > 0 {
			w.fatalf("host stopped with an agent's write under way")
		}
		if o.loops {
			w.fatalf("%s stopped while the %s's loops run", s.side, o.side)
		}
		s.alive = false
	}
	return ev
}

// quiesce is the owner's answer to EventQuiesce.
func (s *modelSide) quiesce() {
	if s.side == board.Agent {
		land(&s.w.toPool, s.w.pool[:], len(s.w.toPool)) // read back
	}
	s.loops, s.ready = false, false
	s.w.logf("%s quiesced", s.side)
	if err := s.link.Quiesced(); err != nil {
		s.w.fatalf("%s: Quiesced: %v", s.side, err)
	}
	s.asked = false
}

// work is what the loops do.
func (s *modelSide) work() {
	w := s.w
	if !s.loops || !s.ready {
		return
	}
	i := uint64(w.rng.Intn(areaWords))
	if s.side == board.Agent {
		w.toPool = append(w.toPool, postedWrite{8 * i, 8, tag(s.peer, w.rng.Uint32())})
		return
	}
	windowBus{s}.Store(s.place.area+8*i, 8, tag(s.peer, w.rng.Uint32()))
}

func (s *modelSide) send() {
	if !s.loops || s.asked || (s.side == board.Agent && !s.ready) {
		return
	}
	var m Slot
	m.put(TypeBus, 0x80, 0, 0, 16)
	m.putU32(0, s.own)
	m.putU32(4, s.peer)
	m.putU32(8, s.sent)
	switch err := s.link.Send(&m); {
	case err == nil:
		s.sent++
	case err != ErrFIFOFull && err != ErrDown:
		s.w.fatalf("%s: Send: %v", s.side, err)
	}
}

func (s *modelSide) recv() {
	if !s.loops || s.asked {
		return
	}
	var m Slot
	ok, err := s.link.Recv(&m)
	if err != nil && err != ErrDown {
		s.w.fatalf("%s: Recv: %v", s.side, err)
	}
	if !ok {
		return
	}
	if m.u32(0) != s.peer || m.u32(4) != s.own || m.u32(8) != s.recvd {
		s.w.fatalf("%s: session %x/%x expects message %d, got %x/%x message %d", s.side, s.own, s.peer, s.recvd, m.u32(4), m.u32(0), m.u32(8))
	}
	s.recvd++
	if !s.ready && s.side == board.Host {
		// As a real host learns from SET_VQUEUE.
		d, _ := s.link.Peer()
		s.place = place{d.FIFOAgentToHost, d.FIFOHostToAgent, d.Regions[0].Offset}
		s.ready = true
	}
}

// check holds at every moment: memory that a running side uses is of its session.
func (w *world) check() {
	for _, s := range w.sides {
		if !s.loops || !s.ready {
			continue
		}
		for i := 0; i < areaWords; i++ {
			want := s.own
			if s.side == board.Host {
				want = s.peer
			}
			v := uint32(binary.LittleEndian.Uint64(w.mem[s.place.area+8*uint64(i):]) >> 32)
			if v != want && !w.wiped() {
				w.fatalf("the %s runs in a session of the agent's epoch %x and finds memory of %x", s.side, want, v)
			}
		}
		if s.side == board.Agent {
			for i := 0; i < areaWords; i++ {
				if v := uint32(binary.LittleEndian.Uint64(w.pool[8*i:]) >> 32); v != s.peer {
					w.fatalf("the agent runs in a session of the host's epoch %x, the pool is of %x", s.peer, v)
				}
			}
		}
	}
}

// wiped tells that the agent of the host's session lost its memory by a reset: the host
// cannot know yet, and harms nobody as long as no agent is up.
func (w *world) wiped() bool {
	a, h := w.sides[board.Agent], w.sides[board.Host]
	return h.loops && !(a.loops && a.ready)
}

// wipe clears one side's block of the link page, or both, to zeros or ones: a fault of the memory, or
// a program that writes where it should not. No process is told.
func (w *world) wipe() {
	with, which := byte(0), 1+w.rng.Intn(3)
	if w.rng.Intn(2) == 0 {
		with = 0xff
	}
	w.wipes++
	w.logf("blocks %b wiped to %#x", which, with)
	for i := 0; i < 2; i++ {
		if which>>uint(i)&1 == 0 {
			continue
		}
		for o := range w.mem[i*blockSize : (i+1)*blockSize] {
			w.mem[i*blockSize+o] = with
		}
	}
}

// act lets a side, or the bus, do something.
func (w *world) act(s *modelSide) {
	if s.inside {
		return
	}
	w.check()
	if n := len(w.toMem); n > 0 && w.rng.Intn(3) == 0 {
		w.landMem(1 + w.rng.Intn(n))
	}
	if n := len(w.toPool); n > 0 && w.rng.Intn(3) == 0 {
		land(&w.toPool, w.pool[:], 1+w.rng.Intn(n))
	}
	if w.mess && !w.gone && w.rng.Intn(400) == 0 {
		w.wipe()
	}
	if s.held {
		if w.rng.Intn(20) == 0 {
			s.held = false
		}
		return
	}
	if !s.alive {
		if w.rng.Intn(6) == 0 && !(w.gone && s.side == board.Agent) {
			s.do(s.start)
		} else if s.side == board.Agent && w.rng.Intn(8) == 0 {
			w.gone = !w.gone
			w.resets++
			w.logf("board in reset: %v", w.gone)
			if w.gone {
				w.toMem = nil
				w.mem = [modelSize]byte{}
			}
		}
		return
	}
	if w.mess && s.killIn == 0 {
		switch w.rng.Intn(150) {
		case 0:
			s.killIn = 1 + w.rng.Intn(60)
		case 1:
			s.held = true
			w.logf("%s held", s.side)
		}
	}
	s.do(func() {
		switch w.rng.Intn(16) {
		case 0, 1, 2, 3, 4, 5:
			s.poll(w.rng.Intn(4) == 0)
		case 6, 7:
			if s.asked {
				s.quiesce()
			}
		case 8, 9:
			s.send()
		case 10, 11:
			s.recv()
		case 12:
			if w.mess && w.rng.Intn(40) == 0 {
				if s.link.Reset() {
					s.asked = true
					w.logf("%s resets", s.side)
				}
			}
		case 13:
			if w.mess && w.rng.Intn(40) == 0 && !s.asked {
				s.loops, s.ready = false, false
				if s.side == board.Agent {
					land(&w.toPool, w.pool[:], len(w.toPool))
				}
				w.logf("%s stops", s.side)
				if err := s.link.Stop(); err != nil && err != ErrState {
					w.fatalf("Stop: %v", err)
				}
			}
		default:
			s.work()
		}
	})
	w.check()
}

func newWorld(t failer, seed int64, knows [2]bool) *world {
	w := &world{t: t, rng: rand.New(rand.NewSource(seed))}
	for i := range w.sides {
		w.sides[i] = &modelSide{w: w, side: board.Side(i), knows: knows[i]}
	}
	return w
}

// settle lets both run undisturbed until they are up with each other and have exchanged messages.
func (w *world) settle() {
	w.mess, w.gone = false, false
	for _, s := range w.sides {
		s.held, s.killIn = false, 0
	}
	for round := 0; round < 400; round++ {
		for _, s := range w.sides {
			if !s.alive {
				s.do(s.start)
			}
			for i := 0; i < 4; i++ {
				s.poll(i == 0)
				if !s.alive {
					break
				}
				if s.asked {
					s.quiesce()
				}
			}
			if s.alive {
				s.send()
				s.recv()
				s.work()
			}
			w.check()
		}
		a, h := w.sides[board.Agent], w.sides[board.Host]
		if a.alive && h.alive && a.link.Up() && h.link.Up() && a.own == h.peer && h.own == a.peer && a.recvd > 5 && h.recvd > 5 {
			return
		}
	}
	w.fatalf("not up after 400 rounds")
}

// TestHandshakeModel: whatever happens, no side rewrites memory that the other one may use, no message
// is lost, repeated or of another session, and both come up as soon as they are let.
func TestHandshakeModel(t *testing.T) {
	ups := 0
	for i := 0; i < modelRounds; i++ {
		rapid.Check(t, func(t *rapid.T) {
			w := newWorld(t, rapid.Int64().Draw(t, "seed"), [2]bool{rapid.Bool().Draw(t, "host knows"), rapid.Bool().Draw(t, "agent knows")})
			steps := rapid.IntRange(1, 3000).Draw(t, "steps")
			w.mess = true
			for i := 0; i < steps; i++ {
				w.act(w.sides[w.rng.Intn(2)])
			}
			w.settle()
			ups += w.ups
		})
	}
	t.Logf("%d times up", ups)
	if ups < 50*modelRounds { // 200 to 300 a round with -short: far from what chance does
		t.Errorf("only %d sessions: the model does not get anywhere", ups)
	}
}
