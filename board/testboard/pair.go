package testboard

import (
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/mmio"
)

// PairOptions describe a free-running board.
type PairOptions struct {
	// Options: BoardMem is the size of the window, HostMem that of the pool. Their
	// limit of 16 MiB holds here too; StaleLoads is ignored.
	Options
	// Base is the board's bus address of the window, PoolBase that of the pool; 0 means
	// 0x80000000 and 0x100000000.
	Base, PoolBase dma.Addr
	// Vectors is how many doorbells each side has; 0 means 4.
	Vectors uint32
	// MaxDelay is up to how long a posted write stays under way; 0 means 100 microseconds.
	MaxDelay time.Duration
	// Seed of the delays; 0 takes one from the system.
	Seed uint64
}

// backlog is how many posted writes of a direction can be under way: then a store
// waits for the oldest to arrive, as a bus out of credits makes it.
const backlog = 4096

// Pair is a board whose two ends are used in one process, without the scheduler: posted
// writes arrive after random delays, doorbells are eventfds. What it can find it finds by
// chance; it is there to run whole programs.
type Pair struct {
	opt PairOptions

	mu    sync.Mutex // guards all below
	m     *model
	r     rng
	cpus  [2]*cpu
	ends  [2]*End
	last  uint32 // number of the end opened last
	count [2]stats
	held  bool
	moved chan struct{} // something is under way
	quit  chan struct{}
	gone  chan struct{}
}

// NewPair makes a free-running board. Close it.
func NewPair(o PairOptions) (*Pair, error) {
	o.defaults()
	if o.Base == 0 {
		o.Base = 0x80000000
	}
	if o.PoolBase == 0 {
		o.PoolBase = 0x100000000
	}
	if o.Vectors == 0 {
		o.Vectors = 4
	}
	if o.MaxDelay == 0 {
		o.MaxDelay = 100 * time.Microsecond
	}
	if o.Seed == 0 {
		var err error
		if o.Seed, err = systemSeed(); err != nil {
			return nil, err
		}
	}
	p := &Pair{opt: o, m: newModel(o.HostMem, o.BoardMem), r: rng(o.Seed),
		moved: make(chan struct{}, 1), quit: make(chan struct{}), gone: make(chan struct{})}
	for s := range p.cpus {
		p.cpus[s] = p.m.newCPU(board.Side(s), o.Ordering, false)
	}
	p.m.delivered = func(s *store) {
		if !s.bell {
			return
		}
		if e := p.ends[s.dst]; e != nil && e.num == uint32(s.val>>32) {
			// It fails only if the end is being closed.
			_ = e.bells[uint32(s.val)].Ring()
		}
	}
	go p.run()
	return p, nil
}

func systemSeed() (uint64, error) {
	var buf [8]byte
	if n, err := unix.Getrandom(buf[:], 0); err != nil || n != len(buf) {
		return 0, fmt.Errorf("testboard: no random seed: getrandom: %v", err)
	}
	v := uint64(0)
	for _, c := range buf {
		v = v<<8 | uint64(c)
	}
	return v, nil
}

// run delivers what is under way.
func (p *Pair) run() {
	defer close(p.gone)
	for {
		select {
		case <-p.quit:
			return
		case <-p.moved:
		}
		for more := true; more; {
			p.mu.Lock()
			d := time.Duration(p.r.next() % uint64(p.opt.MaxDelay))
			p.mu.Unlock()
			time.Sleep(d)
			p.mu.Lock()
			more = p.some()
			p.mu.Unlock()
			select {
			case <-p.quit:
				return
			default:
			}
		}
	}
}

// some lets a random part of what is under way arrive, and tells whether there is more.
func (p *Pair) some() bool {
	if p.held {
		return false
	}
	more := false
	for s, c := range p.cpus {
		for n := len(c.pending); n > 0 && p.r.n(4) > 0; n-- {
			c.drain(p.r.n(len(c.pending)))
			if len(c.pending) == 0 {
				break
			}
		}
		if n := p.m.post[s].len(); n > 0 {
			p.m.deliver(board.Side(s), p.r.n(n+1))
		}
		more = more || len(c.pending) > 0 || p.m.post[s].len() > 0
	}
	return more
}

// Hold keeps everything that is posted under way until Release (or until a load across
// the bus pushes it).
func (p *Pair) Hold() {
	p.mu.Lock()
	p.held = true
	p.mu.Unlock()
}

// Release ends Hold.
func (p *Pair) Release() {
	p.mu.Lock()
	p.held = false
	p.mu.Unlock()
	p.kick()
}

func (p *Pair) kick() {
	select {
	case p.moved <- struct{}{}:
	default:
	}
}

// Reads returns the loads across the bus that a side has done.
func (p *Pair) Reads(side board.Side) uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.count[side].reads
}

// Writes returns the stores across the bus that a side has done, doorbells excluded.
func (p *Pair) Writes(side board.Side) uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.count[side].writes
}

// Rings returns the doorbells that a side has rung.
func (p *Pair) Rings(side board.Side) uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.count[side].rings
}

// Close stops the bus and closes both ends.
func (p *Pair) Close() error {
	select {
	case <-p.quit:
	default:
		close(p.quit)
	}
	<-p.gone
	for s := range p.ends {
		p.mu.Lock()
		e := p.ends[s]
		p.mu.Unlock()
		if e != nil {
			if err := e.Close(); err != nil {
				return err
			}
		}
	}
	return nil
}

// Open opens an end, as a process of that side would. There is one open end a side:
// the error says so where there is one already. Of the options, Side, Kind (how the other
// side's memory is seen; not cached) and Account are used.
func (p *Pair) Open(o board.Options) (*End, error) {
	k := p.opt.kind(o.Side, o.Side.Other())
	if o.Kind != nil {
		if *o.Kind == mmio.Cached {
			return nil, fmt.Errorf("testboard: %v: memory across the bus cannot be cached", o.Side)
		}
		k = *o.Kind
	}
	e := &End{p: p, side: o.Side, kind: k, acct: o.Account, events: make(chan struct{}, 1)}
	for v := uint32(0); v < p.opt.Vectors; v++ {
		b, err := doorbell.NewEventfd()
		if err != nil {
			e.closeBells()
			return nil, err
		}
		e.bells = append(e.bells, b)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ends[o.Side] != nil {
		e.closeBells()
		return nil, fmt.Errorf("testboard: the %v end is open already", o.Side)
	}
	p.last++
	e.num = p.last
	p.ends[o.Side] = e
	p.tellPeer(o.Side)
	return e, nil
}

// tellPeer lets the other side know that a side came or went.
func (p *Pair) tellPeer(side board.Side) {
	if o := p.ends[side.Other()]; o != nil {
		select {
		case o.events <- struct{}{}:
		default:
		}
	}
}

// End is an open end of a Pair. It implements board.Board.
type End struct {
	p      *Pair
	side   board.Side
	kind   mmio.Kind // of the other side's memory
	acct   *dma.Account
	num    uint32
	bells  []*doorbell.Eventfd
	events chan struct{}
	dead   bool // under p.mu: closed or killed; its accesses go nowhere
	closed bool // under p.mu
}

// String implements board.Board.
func (e *End) String() string { return "testboard:" + e.side.String() }

func (e *End) region(name string, of board.Side, base dma.Addr) dma.Region {
	k := mmio.Cached
	if of != e.side {
		k = e.kind
	}
	r := dma.Region{Name: name, Addr: base, Access: dma.DeviceRead | dma.DeviceWrite, Across: of != e.side,
		Mem: mmio.NewBusMem(&freeView{e, of, k}, uint64(len(e.p.m.mem[of])), k)}
	if r.Across {
		r.Account = e.acct
	}
	return r
}

// Window implements board.Board: the board's memory.
func (e *End) Window() dma.Region { return e.region("window", board.Agent, e.p.opt.Base) }

// Pool implements board.Pooled.
func (e *End) Pool() (dma.Region, bool) {
	return e.region("pool", board.Host, e.p.opt.PoolBase), true
}

// Self implements board.Board: each opened end has a number of its own.
func (e *End) Self() board.RingInfo {
	return board.RingInfo{Method: board.RingIvshmem, Peer: e.num, Vectors: e.p.opt.Vectors}
}

// Waiter implements board.Board.
func (e *End) Waiter(v uint32) doorbell.Waiter { return e.bells[v] }

// Ringer implements board.Board. To ring an end that is gone does nothing.
func (e *End) Ringer(info board.RingInfo, v uint32) (doorbell.Ringer, error) {
	if info.Method == board.RingNone {
		return board.Silent, nil
	}
	if info.Method != board.RingIvshmem || v >= info.Vectors || v >= e.p.opt.Vectors {
		return nil, fmt.Errorf("testboard: cannot ring method %d, vector %d of %d", info.Method, v, info.Vectors)
	}
	return &ringer{e, uint64(info.Peer)<<32 | uint64(v)}, nil
}

type ringer struct {
	e   *End
	val uint64
}

// Ring implements doorbell.Ringer.
func (r *ringer) Ring() error {
	p := r.e.p
	p.mu.Lock()
	defer p.mu.Unlock()
	if r.e.dead {
		return doorbell.ErrClosed
	}
	c := p.cpus[r.e.side]
	c.barrier(mmio.WriteBarrier, true)
	c.store(store{dst: r.e.side.Other(), bell: true, val: r.val})
	p.count[r.e.side].rings++
	p.kick()
	return nil
}

// PeerDead implements board.Board.
func (e *End) PeerDead() bool {
	e.p.mu.Lock()
	defer e.p.mu.Unlock()
	return e.p.ends[e.side.Other()] == nil
}

// Events implements board.Board.
func (e *End) Events() <-chan struct{} { return e.events }

// Kill takes the end away from under whoever uses it, as SIGKILL does: later stores
// and rings go nowhere, loads return all ones; what was posted still arrives. The end can be
// opened anew at once; the old one still wants to be closed.
func (e *End) Kill() {
	e.p.mu.Lock()
	defer e.p.mu.Unlock()
	if e.dead {
		return
	}
	e.dead = true
	e.p.ends[e.side] = nil
	e.p.tellPeer(e.side)
}

// Close implements board.Board.
func (e *End) Close() error {
	e.Kill()
	e.p.mu.Lock()
	again := e.closed
	e.closed = true
	e.p.mu.Unlock()
	if again {
		return nil
	}
	return e.closeBells()
}

func (e *End) closeBells() error {
	var first error
	for _, b := range e.bells {
		if err := b.Close(); err != nil && first == nil {
			first = err
		}
	}
	return first
}

// freeView is a memory as an end sees it.
type freeView struct {
	e    *End
	of   board.Side
	kind mmio.Kind
}

// Load implements mmio.Bus.
func (v *freeView) Load(off uint64, width uint) uint64 {
	p := v.e.p
	p.mu.Lock()
	defer p.mu.Unlock()
	if v.e.dead {
		return 1<<(8*width) - 1
	}
	if v.of != v.e.side {
		p.count[v.e.side].reads++
	}
	return p.cpus[v.e.side].load(v.of, off, uint8(width), v.kind, false)
}

// Store implements mmio.Bus.
func (v *freeView) Store(off uint64, width uint, x uint64) {
	p := v.e.p
	p.mu.Lock()
	defer p.mu.Unlock()
	if v.e.dead {
		return
	}
	c := p.cpus[v.e.side]
	if v.of != v.e.side {
		p.count[v.e.side].writes++
		if p.m.post[v.e.side].len() >= backlog {
			p.m.deliver(v.e.side, 1)
		}
	}
	if len(c.pending) >= backlog {
		c.drain(0)
	}
	c.store(store{dst: v.of, off: off, width: uint8(width), val: x, wc: v.kind == mmio.WriteCombining})
	if len(c.pending) > 0 || v.of != v.e.side {
		p.kick()
	}
}

// Barrier implements mmio.Bus.
func (v *freeView) Barrier(b mmio.Barrier) {
	p := v.e.p
	p.mu.Lock()
	defer p.mu.Unlock()
	if !v.e.dead {
		p.cpus[v.e.side].barrier(b, v.kind != mmio.Cached)
	}
}
