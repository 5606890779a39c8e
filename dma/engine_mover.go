package dma

import (
	"errors"
	"fmt"
	"time"
)

// ErrOverlap: source and destination of a copy share bytes, in memory where that is not allowed.
var ErrOverlap = errors.New("source and destination overlap in device memory")

// Defaults of a MoverConfig.
const (
	DefaultMin         = 1024 // bytes, as Linux' ntb_transport has it
	DefaultTimeout     = time.Second
	DefaultMaxFailures = 8
	DefaultSpin        = 50 * time.Microsecond
	defaultMoverDepth  = 64
)

// Never, as MoverConfig.Min, leaves all to the processor.
const Never = ^uint32(0)

// MoverConfig describes a Mover.
type MoverConfig struct {
	// Engine does the work; the Mover owns it. nil leaves all to the processor.
	Engine Engine
	// Min is the length in bytes below which the processor copies; 0 is DefaultMin until
	// Calibrate finds a better one.
	Min uint32
	// Timeout bounds the time that the oldest transfer takes from when it became the oldest; 0 is DefaultTimeout.
	Timeout time.Duration
	// MaxFailures is the number of failures in a row, with no success in between, after which the
	// engine is not used any more; 0 is DefaultMaxFailures.
	MaxFailures int
	// Spin is how long Wait polls before it sleeps; 0 is DefaultSpin, negative does not spin.
	Spin time.Duration
	// Stats, if not nil, are counted in.
	Stats *MoverStats
	// Logf, if set, hears of failures: the first one and those that have consequences.
	Logf func(format string, args ...interface{})
}

// Mover moves payload by an Engine, and by the processor where the engine cannot, should not (short
// copies), or fails: what an engine did not do is done over again by the processor, so that to the
// user each copy lands. A transfer that does not end is aborted first. One goroutine at a time may use a Mover.
//
// The effect of a sequence of copies is that of doing them one after the other, overlaps included; a copy
// whose own source and destination overlap is refused unless all of it is RAM. For that, link
// addresses must name memory uniquely: the regions of all spans that one Mover sees must not overlap.
type Mover struct {
	e       Engine
	caps    Caps
	min     uint32
	fixed   bool // min is the operator's
	timeout time.Duration
	spin    time.Duration
	limit   int
	stats   *MoverStats
	logf    func(format string, args ...interface{})

	slots           []slot
	mask            uint64
	head, sub, tail uint64 // free-running: head..sub are submitted, sub..tail are queued
	flying          int    // submitted and not completed
	issued          uint64 // tickets

	batch []Copy
	done  []Completion

	since    time.Time // the oldest transfer is waited for since then
	failures int       // in a row
	told     bool      // the first failure was logged
	off      bool      // the engine is not used any more
	runaway  error
	closed   bool

	// What is in flight lies inside these, first and last byte; valid where head != tail.
	dstLo, dstHi, srcLo, srcHi uint64
}

type slot struct {
	dst, src Span // of the same length
	ticket   uint64
	state    uint8
}

const (
	slotQueued = iota
	slotFlying
	slotLanded
)

// NewMover returns a Mover.
func NewMover(c MoverConfig) *Mover {
	if c.Engine == nil {
		c.Engine, c.Min = NewCPUEngine(1), Never
	}
	m := &Mover{e: c.Engine, caps: c.Engine.Caps(), min: c.Min, fixed: c.Min != 0, timeout: c.Timeout, spin: c.Spin, limit: c.MaxFailures, stats: c.Stats, logf: c.Logf}
	if m.min == 0 {
		m.min = DefaultMin
	}
	if m.timeout <= 0 {
		m.timeout = DefaultTimeout
	}
	if m.spin == 0 {
		m.spin = DefaultSpin
	}
	if m.limit <= 0 {
		m.limit = DefaultMaxFailures
	}
	if m.stats == nil {
		m.stats = new(MoverStats)
	}
	for _, a := range []*uint32{&m.caps.AlignDst, &m.caps.AlignSrc, &m.caps.AlignLen} {
		if *a == 0 {
			*a = 1
		}
	}
	n := uint64(1)
	for n < uint64(m.caps.Depth) || n < defaultMoverDepth {
		n *= 2
	}
	m.slots, m.mask = make([]slot, n), n-1
	m.batch = make([]Copy, 0, n)
	m.done = make([]Completion, n)
	return m
}

// Caps returns the limits of the engine.
func (m *Mover) Caps() Caps { return m.caps }

// Stats returns the counters.
func (m *Mover) Stats() *MoverStats { return m.stats }

// Min returns the length in bytes below which the processor copies.
func (m *Mover) Min() uint32 { return m.min }

// Enabled tells whether the engine is still used.
func (m *Mover) Enabled() bool { return !m.off && m.min != Never }

// Runaway returns nil, or the error (ErrRunaway) that tells that the engine could not be stopped: all
// that was queued has landed, but memory that copies touched may be read and written by the engine until
// its bus mastering is off.
func (m *Mover) Runaway() error { return m.runaway }

// Queue takes all of src to the start of dst and returns the copy's ticket: it has landed when Landed returns that number or a
// higher one. The processor's copies are done at once; the engine's start at Start, or when there
// are many. The spans belong to the Mover until the copy has landed. It fails, and does
// nothing, with ErrBadCopy, ErrOverlap or ErrEngineClosed.
func (m *Mover) Queue(dst, src Span) (uint64, error) {
	if m.closed {
		return m.issued, ErrEngineClosed
	}
	n := src.Len
	if dst.Len < n {
		return m.issued, BadCopy(&Copy{Dst: dst, Src: src})
	}
	if n == 0 {
		m.issued++
		return m.issued, nil
	}
	dst.Len = n
	da, sa := dst.Addr(), src.Addr()
	self := overlap(da, n, sa, n)
	if self {
		if _, ok := dst.RAM(); !ok {
			return m.issued, m.overlapError(dst, src)
		}
		if _, ok := src.RAM(); !ok {
			return m.issued, m.overlapError(dst, src)
		}
	}
	if m.head != m.tail {
		m.settle(da, sa, n)
	}
	m.issued++
	if self || n < m.min || m.off {
		m.byCPU(dst, src)
		return m.issued, nil
	}
	m.cut(dst, src)
	return m.issued, nil
}

func (m *Mover) overlapError(dst, src Span) error {
	return &TransferError{Engine: m.caps.Name, Dst: dst.Addr(), Src: src.Addr(), Len: src.Len, Reason: ErrOverlap}
}

// settle waits for copies in flight that overlap the one to come.
func (m *Mover) settle(da, sa Addr, n uint32) {
	d0, d1, s0, s1 := uint64(da), uint64(da)+uint64(n-1), uint64(sa), uint64(sa)+uint64(n-1)
	if (d0 > m.dstHi || m.dstLo > d1) && (d0 > m.srcHi || m.srcLo > d1) && (s0 > m.dstHi || m.dstLo > s1) {
		return
	}
	for i := m.tail; i != m.head; i-- {
		s := &m.slots[(i-1)&m.mask]
		if s.state == slotLanded {
			continue
		}
		od, os := s.dst.Addr(), s.src.Addr()
		if overlap(da, n, od, s.dst.Len) || overlap(da, n, os, s.src.Len) || overlap(sa, n, od, s.dst.Len) {
			m.stats.add(mOverlaps, 1)
			m.waitSlot(i)
			return
		}
	}
}

// cut gives the engine what it can do of a copy, and the rest to the processor.
func (m *Mover) cut(dst, src Span) {
	da, sa, n := uint32(dst.Addr()), uint32(src.Addr()), src.Len
	wide, other, from := m.caps.AlignDst, m.caps.AlignSrc, da
	if other > wide {
		wide, other, from = other, wide, sa
	}
	lead := -from & (wide - 1)
	all := wide
	if m.caps.AlignLen > all {
		all = m.caps.AlignLen
	}
	max := m.caps.MaxLen &^ (all - 1)
	if lead > n || (da+lead)&(m.caps.AlignDst-1) != 0 || (sa+lead)&(m.caps.AlignSrc-1) != 0 || max == 0 {
		m.byCPU(dst, src)
		return
	}
	middle := (n - lead) &^ (m.caps.AlignLen - 1)
	if middle < m.min || middle == 0 {
		m.byCPU(dst, src)
		return
	}
	if lead > 0 {
		m.byCPU(dst.Sub(0, lead), src.Sub(0, lead))
	}
	if tail := n - lead - middle; tail > 0 {
		m.byCPU(dst.Sub(lead+middle, tail), src.Sub(lead+middle, tail))
	}
	for off := lead; middle > 0; {
		k := middle
		if k > max {
			k = max
		}
		m.put(dst.Sub(off, k), src.Sub(off, k))
		off += k
		middle -= k
	}
}

// put queues a transfer.
func (m *Mover) put(dst, src Span) {
	for m.tail-m.head == uint64(len(m.slots)) {
		m.waitSlot(m.head + 1)
	}
	if m.off {
		m.byCPU(dst, src)
		return
	}
	d, s, n := uint64(dst.Addr()), uint64(src.Addr()), uint64(src.Len-1)
	if m.head == m.tail {
		m.dstLo, m.dstHi, m.srcLo, m.srcHi = d, d+n, s, s+n
	} else {
		widen(&m.dstLo, &m.dstHi, d, d+n)
		widen(&m.srcLo, &m.srcHi, s, s+n)
	}
	m.slots[m.tail&m.mask] = slot{dst: dst, src: src, ticket: m.issued, state: slotQueued}
	m.tail++
	if m.tail-m.sub >= uint64(len(m.slots))/2 {
		m.Start()
	}
}

func widen(lo, hi *uint64, a, b uint64) {
	if a < *lo {
		*lo = a
	}
	if b > *hi {
		*hi = b
	}
}

func (m *Mover) byCPU(dst, src Span) {
	CopySpan(dst, src)
	m.stats.add(mCPUCopies, 1)
	m.stats.add(mCPUBytes, uint64(src.Len))
}

func (m *Mover) redo(s *slot) {
	CopySpan(s.dst, s.src)
	s.state = slotLanded
	m.stats.add(mRedone, 1)
	m.stats.add(mRedoneBytes, uint64(s.src.Len))
}

// Start hands what is queued to the engine, as far as it has room; Landed and Wait go on with the rest.
func (m *Mover) Start() {
	for m.sub != m.tail {
		m.batch = m.batch[:0]
		for i := m.sub; i != m.tail; i++ {
			s := &m.slots[i&m.mask]
			m.batch = append(m.batch, Copy{Dst: s.dst, Src: s.src, Tag: i})
		}
		n, err := 0, error(ErrEngineClosed)
		if !m.off {
			n, err = m.e.Submit(m.batch)
		}
		if n > 0 && m.flying == 0 {
			m.since = time.Now()
		}
		for i := m.sub; i != m.sub+uint64(n); i++ {
			m.slots[i&m.mask].state = slotFlying
		}
		m.sub += uint64(n)
		m.flying += n
		if err == nil && m.flying > 0 {
			return // all, or the engine is full
		}
		if err == nil {
			err = fmt.Errorf("dma: engine %s takes no copy although none is in flight: %w", m.caps.Name, ErrLimits)
			m.disable(err)
		}
		// The copy behind the accepted ones is not for the engine.
		if !m.off {
			m.stats.add(mRefused, 1)
			if errors.Is(err, ErrRunaway) || errors.Is(err, ErrEngineClosed) {
				m.disable(err)
			} else {
				m.tell(err)
			}
		}
		m.redo(&m.slots[m.sub&m.mask])
		m.sub++
		m.retire()
	}
}

// retire frees landed slots from the oldest on.
func (m *Mover) retire() {
	moved := false
	for m.head != m.sub && m.slots[m.head&m.mask].state == slotLanded {
		m.head++
		moved = true
	}
	if moved && m.head != m.sub {
		m.since = time.Now()
	}
}

func (m *Mover) landed() uint64 {
	if m.head == m.tail {
		return m.issued
	}
	return m.slots[m.head&m.mask].ticket - 1
}

// Landed asks the engine and returns the highest ticket up to which all copies have landed: their
// destination can be read on this side, or announced to the other. It does not block, unless a transfer has to be aborted.
func (m *Mover) Landed() uint64 {
	if m.head != m.tail {
		m.poll()
		m.Start()
		m.watch()
	}
	return m.landed()
}

// poll takes completions and returns their number.
func (m *Mover) poll() int {
	if m.flying == 0 {
		return 0
	}
	n := m.e.Poll(m.done)
	for i := 0; i < n; i++ {
		c := &m.done[i]
		if c.Tag-m.head >= m.sub-m.head || m.slots[c.Tag&m.mask].state != slotFlying {
			panic(fmt.Sprintf("dma: engine %s completes a copy with tag %d, which it was not given", m.caps.Name, c.Tag))
		}
		m.flying--
		m.ended(&m.slots[c.Tag&m.mask], c.Err)
	}
	if n > 0 {
		m.retire()
	}
	return n
}

// ended deals with a transfer that the engine is done with.
func (m *Mover) ended(s *slot, err error) {
	if err == nil {
		s.state = slotLanded
		m.failures = 0
		m.stats.add(mEngineCopies, 1)
		m.stats.add(mEngineBytes, uint64(s.src.Len))
		return
	}
	switch {
	case errors.Is(err, ErrAborted):
		m.stats.add(mAborted, 1)
	case errors.Is(err, ErrChained):
	default:
		m.stats.add(mFailed, 1)
		m.tell(err)
		if m.failures++; m.failures >= m.limit {
			m.disable(err)
		}
	}
	m.redo(s)
}

// watch aborts what takes too long.
func (m *Mover) watch() {
	if m.flying == 0 || time.Since(m.since) < m.timeout {
		return
	}
	if m.poll() > 0 {
		return
	}
	m.stats.add(mTimeouts, 1)
	s := &m.slots[m.head&m.mask]
	late := &TransferError{Engine: m.caps.Name, Dst: s.dst.Addr(), Src: s.src.Addr(), Len: s.src.Len, Reason: ErrTimeout}
	m.tell(late)
	m.abort()
	if m.failures++; m.failures >= m.limit {
		m.disable(late)
	}
}

// abort ends all that is in flight.
func (m *Mover) abort() {
	if err := m.e.Abort(); err != nil {
		m.runaway = err
		m.disable(err)
	}
	for m.flying > 0 && m.poll() > 0 {
	}
	if m.flying > 0 {
		panic(fmt.Sprintf("dma: engine %s keeps %d copies after Abort", m.caps.Name, m.flying))
	}
}

func (m *Mover) disable(why error) {
	if m.off {
		return
	}
	m.off = true
	m.stats.add(mDisabled, 1)
	if m.logf != nil {
		m.logf("dma: engine %s is not used any more, the processor copies: %v", m.caps.Name, why)
	}
}

// tell logs the first failure; the others are counted.
func (m *Mover) tell(err error) {
	if !m.told && m.logf != nil {
		m.logf("%v; the processor does it over again; later ones are counted", err)
	}
	m.told = true
}

// Close lets what is in flight land, and closes the engine. With ErrRunaway the spans of earlier copies may still be
// written: see Runaway. A second Close does nothing.
func (m *Mover) Close() error {
	if m.closed {
		return nil
	}
	m.Wait(m.issued)
	m.closed = true
	if err := m.e.Close(); err != nil {
		m.runaway = err
		return err
	}
	return m.runaway
}
