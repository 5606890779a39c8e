package testboard

import (
	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/mmio"
)

// Ordering is what a processor does to the order of its stores.
type Ordering uint8

const (
	// SC performs stores to cached and uncached memory at once, in program order.
	SC Ordering = iota
	// TSO lets stores wait in a FIFO, so that later loads pass them (x86).
	TSO
	// Weak lets stores that no barrier separates leave in any order.
	Weak
)

// String returns "SC", "TSO" or "weak".
func (o Ordering) String() string {
	switch o {
	case TSO:
		return "TSO"
	case Weak:
		return "weak"
	}
	return "SC"
}

// store is one store or doorbell on its way: first in the processor, then in the
// posted queue of its direction.
type store struct {
	dst   board.Side // whose memory, or who is rung
	width uint8
	bell  bool
	local bool  // to the issuing side's own memory
	wc    bool  // through a write-combining view
	from  uint8 // the issuing processor's number, for the trace
	off   uint64
	val   uint64 // bell: the vector
	// Barriers that the processor had executed before: weak or strong ones, and
	// strong ones alone.
	weakEpoch, strongEpoch uint32
}

func (s *store) overlaps(dst board.Side, off uint64, width uint8) bool {
	return !s.bell && s.dst == dst && s.off < off+uint64(width) && off < s.off+uint64(s.width)
}

// staleBytes are old bytes of local memory that a load may still return.
type staleBytes struct {
	off   uint64
	width uint8
	old   uint64
}

// cpu is the part of a processor that keeps accesses out of order. The scheduler
// (or, free-running, a lock) has one goroutine at a time in here.
type cpu struct {
	m           *model
	side        board.Side
	num         uint8
	ordering    Ordering
	staleLoads  bool
	pending     []store // stores that have not left, in program order
	stale       []staleBytes
	weakEpoch   uint32
	strongEpoch uint32
}

// queue is the posted writes of one direction, oldest first.
type queue struct {
	buf  []store
	head int
}

func (q *queue) len() int        { return len(q.buf) - q.head }
func (q *queue) at(i int) *store { return &q.buf[q.head+i] }
func (q *queue) push(s store) {
	if q.head > 64 && q.head*2 > len(q.buf) {
		q.buf = q.buf[:copy(q.buf, q.buf[q.head:])]
		q.head = 0
	}
	q.buf = append(q.buf, s)
}
func (q *queue) pop() store {
	s := q.buf[q.head]
	q.head++
	if q.head == len(q.buf) {
		q.buf, q.head = q.buf[:0], 0
	}
	return s
}

// model is the two memories and the bus between them.
type model struct {
	mem  [2][]byte // by owner
	post [2]queue  // by issuing side
	cpus []*cpu
	// delivered hears of each store that reached memory, and of each ring.
	delivered func(s *store)
}

func newModel(hostMem, boardMem uint64) *model {
	m := &model{}
	m.mem[board.Host] = make([]byte, hostMem)
	m.mem[board.Agent] = make([]byte, boardMem)
	return m
}

func (m *model) newCPU(side board.Side, o Ordering, stale bool) *cpu {
	c := &cpu{m: m, side: side, num: uint8(len(m.cpus)), ordering: o, staleLoads: stale}
	m.cpus = append(m.cpus, c)
	return c
}

// get reads a little-endian number of the memory itself.
func (m *model) get(of board.Side, off uint64, width uint8) uint64 {
	var v uint64
	for i := int(width) - 1; i >= 0; i-- {
		v = v<<8 | uint64(m.mem[of][off+uint64(i)])
	}
	return v
}

// put writes a little-endian number to the memory itself.
func (m *model) put(of board.Side, off uint64, width uint8, v uint64) {
	for i := uint64(0); i < uint64(width); i++ {
		m.mem[of][off+i] = byte(v)
		v >>= 8
	}
}

// apply lets s take effect: in memory, or as a ring.
func (m *model) apply(s *store) {
	if !s.bell {
		for _, c := range m.cpus {
			if c.side != s.dst || !c.staleLoads {
				continue
			}
			if c.num == s.from {
				c.freshen(s.off, s.width)
			} else {
				c.stale = append(c.stale, staleBytes{s.off, s.width, m.get(s.dst, s.off, s.width)})
			}
		}
		m.put(s.dst, s.off, s.width, s.val)
	}
	if m.delivered != nil {
		m.delivered(s)
	}
}

// deliver delivers the oldest n posted writes of the side from.
func (m *model) deliver(from board.Side, n int) {
	for ; n > 0; n-- {
		s := m.post[from].pop()
		m.apply(&s)
	}
}

// ordered tells whether later must not leave the processor before earlier.
func (c *cpu) ordered(earlier, later *store) bool {
	if !earlier.bell && later.overlaps(earlier.dst, earlier.off, earlier.width) {
		return true
	}
	if earlier.strongEpoch != later.strongEpoch {
		return true
	}
	if earlier.local && later.local && earlier.weakEpoch != later.weakEpoch {
		return true
	}
	if earlier.wc {
		return false
	}
	if c.ordering != Weak {
		return true
	}
	// Stores to uncached memory behind one bus stay in order on every processor.
	return !earlier.local && !later.local && !later.wc
}

// free tells whether pending store j may leave now.
func (c *cpu) free(j int) bool {
	for i := 0; i < j; i++ {
		if c.ordered(&c.pending[i], &c.pending[j]) {
			return false
		}
	}
	return true
}

// drain lets pending store j leave, those first that must precede it.
func (c *cpu) drain(j int) {
	for i := 0; i < j; {
		if c.ordered(&c.pending[i], &c.pending[j]) {
			n := len(c.pending)
			c.drain(i)
			j -= n - len(c.pending)
			i = 0
			continue
		}
		i++
	}
	s := c.pending[j]
	c.pending = append(c.pending[:j], c.pending[j+1:]...)
	if s.local {
		c.m.apply(&s)
	} else {
		c.m.post[c.side].push(s)
	}
}

// drainIf lets all pending stores leave for which want holds.
func (c *cpu) drainIf(want func(s *store) bool) {
	for j := 0; j < len(c.pending); {
		if want(&c.pending[j]) {
			c.drain(j)
			j = 0
			continue
		}
		j++
	}
}

// freshen forgets what is stale of some bytes.
func (c *cpu) freshen(off uint64, width uint8) {
	k := 0
	for _, s := range c.stale {
		if s.off < off+uint64(width) && off < s.off+uint64(s.width) {
			continue
		}
		c.stale[k] = s
		k++
	}
	c.stale = c.stale[:k]
}

// hasStale tells whether a load could return old bytes.
func (c *cpu) hasStale(off uint64, width uint8) bool {
	for i := range c.stale {
		s := &c.stale[i]
		if s.off < off+uint64(width) && off < s.off+uint64(s.width) {
			return true
		}
	}
	return false
}

func patch(v uint64, off uint64, width uint8, by uint64, boff uint64, bwidth uint8) uint64 {
	for i := uint64(0); i < uint64(bwidth); i++ {
		at := boff + i
		if at < off || at >= off+uint64(width) {
			continue
		}
		sh := (at - off) * 8
		v = v&^(0xff<<sh) | (by>>(i*8)&0xff)<<sh
	}
	return v
}

// load returns what the processor reads. old asks for the oldest value that it may see.
func (c *cpu) load(of board.Side, off uint64, width uint8, kind mmio.Kind, old bool) uint64 {
	m := c.m
	if of != c.side {
		// The processor keeps accesses to the same bytes in order, and an
		// uncached load behind uncached stores; it does not push combined stores.
		c.drainIf(func(s *store) bool {
			return s.overlaps(of, off, width) || kind == mmio.Uncached && !s.local && !s.wc
		})
		m.deliver(c.side, m.post[c.side].len())
		v := m.get(of, off, width)
		m.deliver(of, m.post[of].len())
		return v
	}
	v := m.get(of, off, width)
	if len(c.stale) > 0 {
		if old {
			for i := len(c.stale) - 1; i >= 0; i-- {
				s := &c.stale[i]
				v = patch(v, off, width, s.old, s.off, s.width)
			}
		} else {
			c.freshen(off, width)
		}
	}
	for i := range c.pending {
		if s := &c.pending[i]; s.overlaps(of, off, width) {
			v = patch(v, off, width, s.val, s.off, s.width)
		}
	}
	return v
}

// store issues a store, or a doorbell.
func (c *cpu) store(s store) {
	s.from, s.local = c.num, !s.bell && s.dst == c.side
	s.weakEpoch, s.strongEpoch = c.weakEpoch, c.strongEpoch
	c.pending = append(c.pending, s)
	if c.ordering == SC && !s.wc {
		c.drain(len(c.pending) - 1)
	}
}

// barrier executes a barrier of cached (weak) or device memory (strong).
func (c *cpu) barrier(b mmio.Barrier, strong bool) {
	switch b {
	case mmio.ReadBarrier:
		c.stale = c.stale[:0]
	case mmio.WriteBarrier:
		c.weakEpoch++
		if strong {
			c.strongEpoch++
		}
	default:
		c.stale = c.stale[:0]
		c.weakEpoch++
		if strong {
			c.strongEpoch++
		}
		c.drainIf(func(s *store) bool { return strong || s.local })
	}
}
