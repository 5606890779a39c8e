package testboard

import (
	"fmt"
	"runtime"
	"runtime/debug"
	"sync"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/mmio"
)

// Options describe a board.
type Options struct {
	// HostMem and BoardMem are the sizes of the two memories in bytes, at most 16 MiB; 0
	// means 64 KiB.
	HostMem, BoardMem uint64
	// HostWindow and AgentWindow tell how either side sees the other's memory: Uncached
	// or WriteCombining. The zero value, Cached, means Uncached.
	HostWindow, AgentWindow mmio.Kind
	// Ordering is what the processors do to the order of their stores.
	Ordering Ordering
	// StaleLoads lets loads of local memory that no barrier separates be executed out
	// of order.
	StaleLoads bool
}

func (o *Options) defaults() {
	for _, s := range []*uint64{&o.HostMem, &o.BoardMem} {
		if *s == 0 {
			*s = 64 << 10
		}
		if *s > 16<<20 {
			panic(fmt.Sprintf("testboard: a memory of %#x bytes, above 16 MiB", *s))
		}
	}
	for _, k := range []*mmio.Kind{&o.HostWindow, &o.AgentWindow} {
		if *k == mmio.Cached {
			*k = mmio.Uncached
		}
	}
}

func (o *Options) kind(side, of board.Side) mmio.Kind {
	switch {
	case side == of:
		return mmio.Cached
	case side == board.Host:
		return o.HostWindow
	}
	return o.AgentWindow
}

// opKind is a step that a processor asks for, and what a trace line tells of.
type opKind uint8

const (
	opStart opKind = iota
	opLoad
	opStore
	opBarrier
	opRing
	opWait
	opWaitTimeout
	opYield
	opChance
	opDone
	evDeliver
	evFault
	evLog
)

type op struct {
	kind  opKind
	of    board.Side
	width uint8
	flag  uint8 // barrier number; 1 for a stale load, a chance taken, a time-out
	proc  uint8
	off   uint64
	val   uint64
	text  string
}

// Proc is a processor of one side, running one goroutine. Its methods are called by
// that goroutine alone, and so are the accesses through its memories.
type Proc struct {
	b        *Board
	c        *cpu
	name     string
	wake     chan struct{}
	op       op
	mems     [2]mmio.Mem
	daemon   bool
	done     bool
	held     bool // killed or stalled
	dead     bool
	took     int // steps
	others   int // steps of the others before the next time-out
	timedOut int // step of the last time-out
}

// stats counts what crosses the bus.
type stats struct{ reads, writes, rings uint64 }

// Board is one run of a modelled board. It is made by Explore and Find for each run;
// the set-up function adds processors, faults and checks to it.
type Board struct {
	opt    Options
	m      *model
	procs  []*Proc
	cur    *Proc
	policy policy
	over   bool
	steps  int
	idle   int // last resorts since a stalled processor went on
	max    int
	bells  [2]map[uint32]uint64
	count  [2]stats
	faults []*fault
	checks []func() error
	names  [2][]name
	trace  []op
	fail   *Failure
	fin    chan struct{}
	wg     sync.WaitGroup
	moves  []move
}

type name struct {
	off, size uint64
	text      string
}

type fault struct {
	name string
	left int
	fn   func()
}

// policy decides what happens next. Its next returns the processor that goes on, after
// performing any moves of the environment; nil where nothing can happen.
type policy interface {
	next(b *Board, p *Proc) *Proc
	chance(b *Board) bool // a choice left to the environment: stale load, Chance
}

func newBoard(o Options, p policy, max int, trace []op) *Board {
	o.defaults()
	b := &Board{opt: o, m: newModel(o.HostMem, o.BoardMem), policy: p, max: max, trace: trace[:0], fin: make(chan struct{}, 1)}
	b.bells[0], b.bells[1] = map[uint32]uint64{}, map[uint32]uint64{}
	b.m.delivered = func(s *store) {
		if s.bell {
			b.bells[s.dst][uint32(s.val)]++
		}
		b.note(op{kind: evDeliver, of: s.dst, width: s.width, off: s.off, val: s.val, proc: s.from, flag: boolByte(s.bell)})
	}
	return b
}

func boolByte(v bool) uint8 {
	if v {
		return 1
	}
	return 0
}

func (b *Board) note(o op) { b.trace = append(b.trace, o) }

// Go adds a processor of the given side that runs fn. The run ends when all
// processors are done.
func (b *Board) Go(side board.Side, name string, fn func(p *Proc)) *Proc {
	return b.spawn(side, name, fn, false)
}

// GoDaemon adds a processor that may still be running or asleep when the run ends: a
// server without an end of its own.
func (b *Board) GoDaemon(side board.Side, name string, fn func(p *Proc)) *Proc {
	return b.spawn(side, name, fn, true)
}

func (b *Board) spawn(side board.Side, name string, fn func(p *Proc), daemon bool) *Proc {
	if len(b.procs) >= 200 {
		panic("testboard: more than 200 processors")
	}
	p := &Proc{b: b, c: b.m.newCPU(side, b.opt.Ordering, b.opt.StaleLoads), name: name, wake: make(chan struct{}, 1), daemon: daemon}
	for _, of := range []board.Side{board.Host, board.Agent} {
		k := b.opt.kind(side, of)
		p.mems[of] = mmio.NewBusMem(&view{p, of, k}, uint64(len(b.m.mem[of])), k)
	}
	p.op = op{kind: opStart}
	b.procs = append(b.procs, p)
	b.wg.Add(1)
	go func() {
		defer b.wg.Done()
		<-p.wake
		if b.over {
			return
		}
		defer func() {
			if r := recover(); r != nil && !b.over {
				b.failed(PanicFailure, fmt.Errorf("%s: panic: %v\n%s", p.name, r, debug.Stack()))
				b.end()
			}
		}()
		fn(p)
		if b.over {
			return
		}
		p.done = true
		b.note(op{kind: opDone, proc: p.c.num})
		b.handOver(p)
	}()
	return p
}

// Fault registers something that the environment may do up to max times, between any
// two steps, or not at all: a kill, a stall, a restart. fn must not access memory; it may
// call Go, Kill, Stall and Resume.
func (b *Board) Fault(name string, max int, fn func()) {
	b.faults = append(b.faults, &fault{name, max, fn})
}

// AtEnd registers a check that runs when all processors are done and everything that
// was under way is delivered. It may call Peek and the counters.
func (b *Board) AtEnd(check func() error) { b.checks = append(b.checks, check) }

// Name names bytes of a memory in traces. Later names go before earlier ones.
func (b *Board) Name(of board.Side, off, size uint64, text string) {
	b.names[of] = append(b.names[of], name{off, size, text})
}

// Kill stops a processor for good, as SIGKILL does: its stores leave it, since the kernel
// goes on with something else on it, and what is posted is still delivered.
func (b *Board) Kill(p *Proc) {
	b.Stall(p)
	p.dead = true
}

// Stall stops a processor until Resume, as SIGSTOP does. A stalled processor also goes on
// when the search wants it, at the latest when the others have done nothing but time out
// for a while.
func (b *Board) Stall(p *Proc) {
	b.idle = 0
	p.held = true
	p.c.drainIf(func(*store) bool { return true })
}

func (p *Proc) stalled() bool { return p.held && !p.dead && !p.done }

// UnderWay tells whether stores or rings of a side have not arrived yet.
func (b *Board) UnderWay(side board.Side) bool {
	for _, p := range b.procs {
		if p.c.side == side && len(p.c.pending) > 0 {
			return true
		}
	}
	return b.m.post[side].len() > 0
}

// Resume lets a stalled processor go on.
func (b *Board) Resume(p *Proc) { p.held = p.dead }

// Peek reads 1, 2, 4 or 8 bytes of a memory behind the model's back.
func (b *Board) Peek(of board.Side, off uint64, width uint) uint64 {
	return b.m.get(of, off, uint8(width))
}

// Poke writes 1, 2, 4 or 8 bytes of a memory behind the model's back: before the run
// starts, or in a fault.
func (b *Board) Poke(of board.Side, off uint64, width uint, v uint64) {
	b.m.put(of, off, uint8(width), v)
}

// Reads returns the loads across the bus that a side has done.
func (b *Board) Reads(side board.Side) uint64 { return b.count[side].reads }

// Writes returns the stores across the bus that a side has done, doorbells excluded.
func (b *Board) Writes(side board.Side) uint64 { return b.count[side].writes }

// Rings returns the doorbells that a side has rung.
func (b *Board) Rings(side board.Side) uint64 { return b.count[side].rings }

// Board returns the run that the processor belongs to.
func (p *Proc) Board() *Board { return p.b }

// Side returns the side that the processor belongs to.
func (p *Proc) Side() board.Side { return p.c.side }

// Mem returns the memory of a side as this processor sees it.
func (p *Proc) Mem(of board.Side) mmio.Mem { return p.mems[of] }

// Ring rings vector v of the other side, behind all earlier stores to memory
// across the bus: it holds the strong write barrier of doorbell.Ringer.
func (p *Proc) Ring(v uint32) {
	p.barrier(mmio.WriteBarrier)
	p.RingBare(v)
}

// RingBare rings without the barrier: the bare register write, for tests of what
// goes wrong then.
func (p *Proc) RingBare(v uint32) {
	p.step(op{kind: opRing, of: p.c.side.Other(), val: uint64(v)})
	p.b.count[p.c.side].rings++
	p.c.store(store{dst: p.c.side.Other(), bell: true, val: uint64(v)})
}

// WaitDoorbell sleeps until vector v of this side is rung, and takes all rings that
// are pending. It returns their number, at least 1. Waking up is a full barrier.
func (p *Proc) WaitDoorbell(v uint32) uint64 {
	p.barrier(mmio.FullBarrier) // a system call and an interrupt
	p.step(op{kind: opWait, of: p.c.side, val: uint64(v)})
	return p.Ack(v)
}

// WaitTimeout is WaitDoorbell that may time out, and returns 0 then. A time-out is a
// choice of the search; it happens for sure where nothing else can.
func (p *Proc) WaitTimeout(v uint32) uint64 {
	p.barrier(mmio.FullBarrier)
	p.step(op{kind: opWaitTimeout, of: p.c.side, val: uint64(v)})
	return p.Ack(v)
}

// Ack takes the pending rings of vector v and returns their number. It does not sleep.
func (p *Proc) Ack(v uint32) uint64 {
	if p.b.over {
		runtime.Goexit()
	}
	n := p.b.bells[p.c.side][v]
	p.b.bells[p.c.side][v] = 0
	p.barrier(mmio.FullBarrier)
	return n
}

// Yield lets the others go first: call it in each turn of a polling loop.
func (p *Proc) Yield() { p.step(op{kind: opYield}) }

// Chance is a choice left to the search: usually false.
func (p *Proc) Chance(what string) bool {
	p.step(op{kind: opChance, text: what})
	v := p.b.policy.chance(p.b)
	p.b.trace[len(p.b.trace)-1].flag = boolByte(v)
	return v
}

// Logf puts a line into the trace.
func (p *Proc) Logf(format string, args ...interface{}) {
	p.b.note(op{kind: evLog, proc: p.c.num, text: fmt.Sprintf(format, args...)})
}

// Fail ends the run as failed.
func (p *Proc) Fail(err error) {
	p.b.failed(CheckFailure, fmt.Errorf("%s: %w", p.name, err))
	p.b.end()
	runtime.Goexit()
}

// Failf is Fail with a message.
func (p *Proc) Failf(format string, args ...interface{}) { p.Fail(fmt.Errorf(format, args...)) }

// barrier is a barrier that is not a step of its own.
func (p *Proc) barrier(b mmio.Barrier) {
	if p.b.over {
		runtime.Goexit()
	}
	p.c.barrier(b, true)
}

// step asks for a step, and returns when the scheduler grants it.
func (p *Proc) step(o op) {
	b := p.b
	if b.over {
		runtime.Goexit()
	}
	o.proc = p.c.num
	p.op = o
	if b.cur != p {
		panic("testboard: " + p.name + " is used by a goroutine that is not its own")
	}
	b.handOver(p)
	b.note(p.op)
}

// handOver decides who goes on, and returns when it is p. For a processor that is done
// it returns at once.
func (b *Board) handOver(p *Proc) {
	n := b.next(p)
	if n == p {
		return
	}
	if n == nil {
		b.end()
		if !p.done {
			runtime.Goexit()
		}
		return
	}
	n.wake <- struct{}{}
	if p.done {
		return
	}
	<-p.wake
	if b.over {
		runtime.Goexit()
	}
}

func (b *Board) next(p *Proc) *Proc {
	if b.finished() {
		return nil
	}
	b.steps++
	if b.steps > b.max {
		b.failed(StepFailure, fmt.Errorf("no end after %d steps: a live-lock, or Search.MaxSteps is too low", b.max))
		return nil
	}
	n := b.policy.next(b, p)
	if n == nil && b.fail == nil && !b.finished() {
		b.failed(LostWakeup, fmt.Errorf("lost wake-up: nothing is under way, and asleep are %s", b.sleepers()))
	}
	if n != nil {
		b.cur = n
		n.took++
	}
	return n
}

// patience is how many steps the others take, if they can, between two time-outs of a
// processor: a time-out means that time has passed, for all.
const patience = 32

// mayTimeOut tells whether a processor sleeps and could time out.
func (b *Board) mayTimeOut(p *Proc) bool {
	return p.op.kind == opWaitTimeout && !p.done && !p.held && b.steps-p.took >= p.others
}

func (b *Board) finished() bool {
	for _, p := range b.procs {
		if !p.done && !p.daemon && !p.dead {
			return false
		}
	}
	return true
}

func (b *Board) sleepers() string {
	s := ""
	for _, p := range b.procs {
		if p.done {
			continue
		}
		if s != "" {
			s += ", "
		}
		s += p.name
		if p.held {
			s += " (stopped)"
		}
	}
	return s
}

// ready tells whether a processor can take its step.
func (b *Board) ready(p *Proc) bool {
	if p == nil || p.done || p.held {
		return false
	}
	return p.op.kind != opWait && p.op.kind != opWaitTimeout || b.bells[p.c.side][uint32(p.op.val)] > 0
}

func (b *Board) failed(k FailureKind, err error) {
	if b.fail == nil {
		b.fail = &Failure{Kind: k, Err: err}
	}
}

// end ends the run; whoever calls it holds the token.
func (b *Board) end() {
	if !b.over {
		b.over = true
		b.fin <- struct{}{}
	}
}

// takeFault lets fault i happen.
func (b *Board) takeFault(i int) {
	f := b.faults[i]
	f.left--
	b.note(op{kind: evFault, text: f.name})
	f.fn()
}

// view is a memory as a processor sees it.
type view struct {
	p    *Proc
	of   board.Side
	kind mmio.Kind
}

// Load implements mmio.Bus.
func (v *view) Load(off uint64, width uint) uint64 {
	p := v.p
	p.step(op{kind: opLoad, of: v.of, off: off, width: uint8(width)})
	old := false
	if v.of == p.c.side {
		old = p.c.hasStale(off, uint8(width)) && p.b.policy.chance(p.b)
	} else {
		p.b.count[p.c.side].reads++
	}
	at := len(p.b.trace) - 1
	x := p.c.load(v.of, off, uint8(width), v.kind, old)
	p.b.trace[at].val, p.b.trace[at].flag = x, boolByte(old)
	return x
}

// Store implements mmio.Bus.
func (v *view) Store(off uint64, width uint, x uint64) {
	p := v.p
	p.step(op{kind: opStore, of: v.of, off: off, width: uint8(width), val: x})
	if v.of != p.c.side {
		p.b.count[p.c.side].writes++
	}
	p.c.store(store{dst: v.of, off: off, width: uint8(width), val: x, wc: v.kind == mmio.WriteCombining})
}

// Barrier implements mmio.Bus.
func (v *view) Barrier(b mmio.Barrier) {
	strong := v.kind != mmio.Cached
	v.p.step(op{kind: opBarrier, flag: uint8(b)<<1 | boolByte(strong)})
	v.p.c.barrier(b, strong)
}
