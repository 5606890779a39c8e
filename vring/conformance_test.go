package vring_test

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"testing"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/vring"
	"github.com/boardlink/boardlink/vring/vringtest"
	"pgregory.net/rapid"
)

// rings are the kinds of virtqueue that the suite below holds for.
var rings = vringtest.Rings

func eachRing(t *testing.T, f func(t *testing.T, p vringtest.Params)) {
	for _, r := range rings {
		vringtest.Each(t, r, f)
	}
}

// eachAnyOrder is for tests whose device side completes in another order.
func eachAnyOrder(t *testing.T, r vringtest.Ring, f func(t *testing.T, p vringtest.Params)) {
	vringtest.Each(t, r, func(t *testing.T, p vringtest.Params) {
		if !p.InOrder {
			f(t, p)
		}
	})
}

// message is a request whose content the test knows.
type message struct {
	token    uint32
	offs     []uint64 // of the buffers in the payload
	lens     []uint32
	readable int
	seed     byte
	written  []byte // what the device wrote
}

// Every token has its own part of the payload.
const (
	tokens    = 64
	tokenRoom = 512
)

func (m *message) request(r *vringtest.Rig) vring.Request {
	q := vring.Request{Token: m.token, Readable: m.readable}
	for i, off := range m.offs {
		q.Bufs = append(q.Bufs, vring.Buffer{Addr: r.Addr(off), Len: m.lens[i]})
	}
	return q
}

func (m *message) pattern(i int) []byte {
	b := make([]byte, m.lens[i])
	for k := range b {
		b[k] = m.seed + byte(i*31+k)
	}
	return b
}

// poke writes what the device is to read.
func (m *message) poke(r *vringtest.Rig) {
	for i := 0; i < m.readable; i++ {
		r.Poke(m.offs[i], m.pattern(i))
	}
}

func (m *message) writable() (n uint32) {
	for _, l := range m.lens[m.readable:] {
		n += l
	}
	return n
}

// checkChain compares what the device side popped with the message, bytes included.
func (m *message) checkChain(r *vringtest.Rig, c vring.Chain, spans []dma.Span) error {
	if int(c.Readable) != m.readable || int(c.Writable) != len(m.offs)-m.readable || c.WriteLen != m.writable() {
		return fmt.Errorf("token %d: chain %+v of %d readable, %d writable buffers", m.token, c, m.readable, len(m.offs)-m.readable)
	}
	read := uint32(0)
	for i := range m.offs {
		s := spans[int(c.First)+i]
		if s.Addr() != r.Addr(m.offs[i]) || s.Len != m.lens[i] {
			return fmt.Errorf("token %d, buffer %d: %#x + %d, want %#x + %d", m.token, i, s.Addr(), s.Len, r.Addr(m.offs[i]), m.lens[i])
		}
		if i < m.readable {
			read += s.Len
			b := make([]byte, s.Len)
			s.CopyOut(b, 0)
			if !bytes.Equal(b, m.pattern(i)) {
				return fmt.Errorf("token %d, buffer %d: bytes differ", m.token, i)
			}
		}
	}
	if c.ReadLen != read {
		return fmt.Errorf("token %d: chain %+v, want %d bytes to read", m.token, c, read)
	}
	return nil
}

// write lets the device write n bytes into the chain.
func (m *message) write(c vring.Chain, spans []dma.Span, n uint32) {
	m.written = m.written[:0]
	for i := int(c.Readable); i < int(c.Readable)+int(c.Writable) && n > 0; i++ {
		s := spans[int(c.First)+i]
		k := s.Len
		if k > n {
			k = n
		}
		b := make([]byte, k)
		for j := range b {
			b[j] = ^m.seed - byte(i*17+j)
		}
		s.CopyIn(0, b)
		m.written = append(m.written, b...)
		n -= k
	}
}

// checkWritten compares what the driver side sees with what the device wrote.
func (m *message) checkWritten(r *vringtest.Rig) error {
	var got []byte
	for i := m.readable; i < len(m.offs); i++ {
		got = append(got, r.Peek(m.offs[i], int(m.lens[i]))...)
	}
	if !bytes.Equal(got[:len(m.written)], m.written) {
		return fmt.Errorf("token %d: what the device wrote differs", m.token)
	}
	return nil
}

// popped is a chain that the device side holds.
type popped struct {
	m     *message
	chain vring.Chain
	spans []dma.Span
	old   bool // by a device side that was replaced since
}

// model is a queue as it ought to be: two lists and a bag.
type model struct {
	t   *rapid.T
	tb  *testing.T
	r   *vringtest.Rig
	drv vring.Driver
	dev vring.Device

	busy     map[uint32]bool // tokens in flight
	needs    map[uint32]int  // descriptors they take
	free     int
	avail    []*message // added, not popped
	held     []popped   // in the order in which they were popped
	used     []*message // completed, not reaped
	kickWant tri        // what NeedKick must say after the next Add
	callWant tri
	kickAny  bool // the next NeedKick says yes after a restart, whatever the other side asked for
	callAny  bool
	added    int // since the last NeedKick
	done     int // since the last NeedCall
}

// tri is yes, no, or either.
type tri int

const (
	either tri = iota
	yes
	no
)

func (m *model) fatalf(format string, args ...any) { m.t.Helper(); m.t.Fatalf(format, args...) }

func (m *model) Add(t *rapid.T) {
	var msgs []*message
	var reqs []vring.Request
	fits, free := 0, m.free
	stop := false
	n := rapid.IntRange(1, 6).Draw(t, "requests")
	for tok := uint32(0); tok < tokens && len(msgs) < n; tok++ {
		if m.busy[tok] {
			continue
		}
		msg := &message{token: tok, seed: rapid.Byte().Draw(t, "seed")}
		bufs := rapid.IntRange(1, 5).Draw(t, "buffers")
		if bufs > int(m.r.Size) {
			bufs = int(m.r.Size)
		}
		off := uint64(tok) * tokenRoom
		for i := 0; i < bufs; i++ {
			l := uint32(rapid.IntRange(1, 90).Draw(t, "length"))
			msg.offs = append(msg.offs, off)
			msg.lens = append(msg.lens, l)
			off += uint64(l)
		}
		msg.readable = rapid.IntRange(0, bufs).Draw(t, "readable")
		need := bufs
		if m.r.Indirect && bufs >= 2 && bufs <= m.r.DrvCfg.IndirectMax {
			need = 1
		}
		if !stop && need <= free {
			free -= need
			fits++
			m.needs[tok] = need
		} else {
			stop = true
		}
		msg.poke(m.r)
		msgs = append(msgs, msg)
		reqs = append(reqs, msg.request(m.r))
	}
	got, err := m.drv.Add(reqs)
	if got != fits || err != nil {
		m.fatalf("Add of %d = %d, %v, want %d", len(reqs), got, err, fits)
	}
	for _, msg := range msgs[:got] {
		m.busy[msg.token] = true
	}
	m.free = free
	m.avail = append(m.avail, msgs[:got]...)
	m.added += got
}

func (m *model) NeedKick(t *rapid.T) {
	got := m.drv.NeedKick()
	want := m.kickWant
	if m.added == 0 {
		want = no
	}
	if want == yes && !got || want == no && got {
		m.fatalf("NeedKick after %d added = %v", m.added, got)
	}
	if m.r.EventIdx && got && m.kickAny {
		m.kickWant = either // it may have been the one armed for, or not
	} else if m.r.EventIdx && got {
		m.kickWant = m.again() // until armed again
	}
	if m.added > 0 {
		m.kickAny = false
	}
	m.added = 0
}

// again is what is to be expected of an event that has fired: packed positions come again every two laps.
func (m *model) again() tri {
	if m.r.Ring.Packed {
		return either
	}
	return no
}

func (m *model) Pop(t *rapid.T) {
	max := rapid.IntRange(1, 8).Draw(t, "max")
	var b vring.Batch
	n, err := m.dev.Pop(&b, max)
	if err != nil || n > max || n > len(m.avail) || n == 0 && len(m.avail) > 0 || len(b.Chains) != n {
		m.fatalf("Pop(%d) of %d = %d, %v", max, len(m.avail), n, err)
	}
	for i, c := range b.Chains {
		if err := m.avail[i].checkChain(m.r, c, b.Spans); err != nil {
			m.fatalf("%v", err)
		}
		m.held = append(m.held, popped{m.avail[i], c, b.Spans, false})
	}
	m.avail = m.avail[n:]
}

// Unpop is allowed as long as nothing popped later was completed: the model completes
// only chains that it marks, so it asks for the tail of held that is untouched.
func (m *model) Unpop(t *rapid.T) {
	k := len(m.held) - m.tail()
	if k == 0 {
		return
	}
	n := rapid.IntRange(1, k).Draw(t, "unpop")
	m.dev.Unpop(n)
	back := m.held[len(m.held)-n:]
	var msgs []*message
	for _, p := range back {
		msgs = append(msgs, p.m)
	}
	m.avail = append(msgs, m.avail...)
	m.held = m.held[:len(m.held)-n]
}

// tail is where the untouched tail of held starts: completed chains leave a hole.
func (m *model) tail() int {
	for i := len(m.held); i > 0; i-- {
		if m.held[i-1].m == nil || m.held[i-1].old && m.r.Ring.Packed {
			return i
		}
	}
	return 0
}

func (m *model) Complete(t *rapid.T) {
	var idx []int
	for i, p := range m.held {
		if p.m != nil {
			idx = append(idx, i)
		}
	}
	if len(idx) == 0 {
		return
	}
	if !m.r.InOrder {
		idx = rapid.Permutation(idx).Draw(t, "order")
	}
	idx = idx[:rapid.IntRange(1, len(idx)).Draw(t, "complete")]
	var used []vring.Used
	for _, i := range idx {
		p := m.held[i]
		n := p.chain.WriteLen
		if rapid.Bool().Draw(t, "short") {
			n = uint32(rapid.IntRange(0, int(n)).Draw(t, "written"))
		}
		p.m.write(p.chain, p.spans, n)
		used = append(used, vring.Used{ID: p.chain.ID, Count: p.chain.Count, Len: n})
		m.used = append(m.used, p.m)
		m.held[i].m = nil
	}
	if err := m.dev.Complete(used); err != nil {
		m.fatalf("Complete: %v", err)
	}
	m.done += len(used)
	// Forget holes at the end: chains before them were completed, those behind were not.
	all := true
	for _, p := range m.held {
		if p.m != nil {
			all = false
		}
	}
	if all {
		m.held = nil
	}
}

func (m *model) NeedCall(t *rapid.T) {
	got := m.dev.NeedCall()
	want := m.callWant
	if m.done == 0 {
		want = no
	}
	if want == yes && !got || want == no && got {
		m.fatalf("NeedCall after %d completed = %v", m.done, got)
	}
	if m.r.EventIdx && got && m.callAny {
		m.callWant = either // it may have been the one armed for, or not
	} else if m.r.EventIdx && got {
		m.callWant = m.again()
	}
	if m.done > 0 {
		m.callAny = false
	}
	m.done = 0
}

func (m *model) Reap(t *rapid.T) {
	done := make([]vring.Completion, rapid.IntRange(1, 8).Draw(t, "max"))
	n, err := m.drv.Reap(done)
	if err != nil || n > len(m.used) || n == 0 && len(m.used) > 0 {
		m.fatalf("Reap(%d) of %d = %d, %v", len(done), len(m.used), n, err)
	}
	for i, c := range done[:n] {
		msg := m.used[i]
		if c.Token != msg.token || int(c.Len) != len(msg.written) {
			m.fatalf("completion %+v, want token %d with %d bytes", c, msg.token, len(msg.written))
		}
		if err := msg.checkWritten(m.r); err != nil {
			m.fatalf("%v", err)
		}
		m.busy[c.Token] = false
		m.free += m.needs[c.Token]
	}
	m.used = m.used[n:]
}

func (m *model) ArmKick(t *rapid.T) {
	pending, err := m.dev.ArmKick()
	if err != nil || pending != (len(m.avail) > 0) {
		m.fatalf("ArmKick with %d available = %v, %v", len(m.avail), pending, err)
	}
	if !pending {
		m.kickWant = yes
		if m.added > 0 {
			m.kickWant = either // what was added before may count or not
		}
	} else {
		m.kickWant = either
	}
}

func (m *model) DisarmKick(t *rapid.T) {
	m.dev.DisarmKick()
	if !m.r.EventIdx || m.r.Ring.Packed {
		m.kickWant = no
	} else if m.kickWant == yes {
		m.kickWant = either
	}
}

func (m *model) ArmCall(t *rapid.T) {
	pending, err := m.drv.ArmCall()
	if err != nil || pending != (len(m.used) > 0) {
		m.fatalf("ArmCall with %d used = %v, %v", len(m.used), pending, err)
	}
	if !pending && m.done == 0 {
		m.callWant = yes
	} else {
		m.callWant = either
	}
}

func (m *model) DisarmCall(t *rapid.T) {
	m.drv.DisarmCall()
	if !m.r.EventIdx || m.r.Ring.Packed {
		m.callWant = no
	} else if m.callWant == yes {
		m.callWant = either
	}
}

// Restart replaces the device side by a new one that goes on.
func (m *model) Restart(t *rapid.T) {
	m.r.DevCfg.State = m.dev.State()
	fullAtStart := m.r.Ring.Packed && m.r.DevCfg.State.Base() == 0x8000 // the one base that is ambiguous
	if s, err := stateFromBase(m.r, m.r.DevCfg.State.Base()); (err != nil || s != m.r.DevCfg.State) && !fullAtStart {
		m.fatalf("base %#x gives %+v (%v), want %+v", m.r.DevCfg.State.Base(), s, err, m.r.DevCfg.State)
	}
	dev, err := m.r.Ring.NewDevice(m.r.DevCfg)
	if err != nil {
		m.fatalf("restart: %v", err)
	}
	m.dev = dev
	for i := range m.held {
		m.held[i].old = true
	}
	m.kickWant, m.callWant, m.callAny, m.done = either, either, true, 0
}

// Check holds after each step.
func (m *model) Check(t *rapid.T) {
	if got := m.drv.Free(); got != m.free {
		m.fatalf("%d descriptors free, want %d", got, m.free)
	}
	if err := m.drv.Broken(); err != nil {
		m.fatalf("%v", err)
	}
	if err := m.dev.Broken(); err != nil {
		m.fatalf("%v", err)
	}
	// What is where, in the unit of the states: chains, or descriptors in the ring.
	var avail, held, used int
	unit := func(msg *message) int {
		if m.r.Ring.Packed {
			return m.needs[msg.token]
		}
		return 1
	}
	for _, msg := range m.avail {
		avail += unit(msg)
	}
	for _, p := range m.held {
		if p.m != nil {
			held += unit(p.m)
		}
	}
	for _, msg := range m.used {
		used += unit(msg)
	}
	d, v := m.drv.State(), m.dev.State()
	if n := m.r.Size; m.r.Ring.Between(n, v.Avail, d.Avail) != avail || m.r.Ring.Between(n, v.Used, v.Avail) != held || m.r.Ring.Between(n, d.Used, v.Used) != used {
		m.fatalf("states %+v, %+v with %d available, %d held, %d used", d, v, avail, held, used)
	}
}

// thorough makes rapid search further than it does by default, where nobody said how far.
func thorough(t *testing.T) {
	for name, value := range map[string][2]string{"rapid.checks": {"100", "1000"}, "rapid.steps": {"30", "80"}} {
		if f := flag.Lookup(name); f.Value.String() == value[0] && !testing.Short() {
			if err := f.Value.Set(value[1]); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestModel drives both sides at random against the model.
func TestModel(t *testing.T) {
	for _, ring := range rings {
		for _, mem := range vringtest.Memories {
			t.Run(ring.Name+"/"+mem.Name, func(t *testing.T) {
				thorough(t)
				rapid.Check(t, func(rt *rapid.T) {
					p := vringtest.Params{Ring: ring, Memory: mem,
						EventIdx: rapid.Bool().Draw(rt, "event"), Indirect: rapid.Bool().Draw(rt, "indirect"),
						InOrder: rapid.Bool().Draw(rt, "inorder")}
					size := uint16(1) << rapid.IntRange(0, 5).Draw(rt, "size")
					if ring.Packed {
						size = rapid.Uint16Range(1, 33).Draw(rt, "descriptors")
					}
					r := vringtest.NewRig(t, p, size, tokens*tokenRoom)
					start := rapid.SampledFrom([]uint16{0, 0, 1, 65535, 65530, 32767}).Draw(rt, "start")
					r.DrvCfg.State = ring.Start(size, start)
					r.DevCfg.State = r.DrvCfg.State
					m := &model{t: rt, tb: t, r: r, busy: map[uint32]bool{}, needs: map[uint32]int{}, free: int(size),
						kickAny: start != 0, callAny: start != 0}
					m.drv, m.dev = r.Pair(t)
					rt.Repeat(map[string]func(*rapid.T){
						"add": m.Add, "needkick": m.NeedKick, "pop": m.Pop, "unpop": m.Unpop, "complete": m.Complete,
						"needcall": m.NeedCall, "reap": m.Reap, "armkick": m.ArmKick, "disarmkick": m.DisarmKick,
						"armcall": m.ArmCall, "disarmcall": m.DisarmCall, "restart": m.Restart, "": m.Check,
					})
				})
			})
		}
	}
}

// TestLaps passes chains of 1 to 4 buffers through queues of every small size, several times
// around the 16-bit indices, in batches that do not divide the size.
func TestLaps(t *testing.T) {
	eachRing(t, func(t *testing.T, p vringtest.Params) {
		laps := 65536 + 100
		if p.Memory.Name != "mmap" || testing.Short() {
			laps = 3000 // the wrap of the index is covered by the start
		}
		if vring.RaceEnabled && p.Memory.Name != vringtest.Heap.Name {
			laps = 500
		}
		sizes := []uint16{1, 2, 4, 16}
		if p.Ring.Packed {
			sizes = []uint16{1, 3, 4, 17}
		}
		for _, size := range sizes {
			r := vringtest.NewRig(t, p, size, tokens*tokenRoom)
			r.DrvCfg.State = p.Ring.Start(size, 65000)
			r.DevCfg.State = r.DrvCfg.State
			drv, dev := r.Pair(t)
			var b vring.Batch
			done := make([]vring.Completion, 16)
			sent, got, back := uint32(0), uint32(0), uint32(0)
			for int(back) < laps {
				for {
					bufs := int(sent%4) + 1
					if bufs > int(size) {
						bufs = int(size)
					}
					q := vring.Request{Token: sent, Readable: int(sent) % (bufs + 1)}
					for i := 0; i < bufs; i++ {
						q.Bufs = append(q.Bufs, vring.Buffer{Addr: r.Addr(uint64(sent%256) + uint64(i)), Len: uint32(i) + 1})
					}
					n, err := drv.Add([]vring.Request{q})
					if err != nil {
						t.Fatal(err)
					}
					if n == 0 {
						break
					}
					sent++
				}
				b.Chains, b.Spans = b.Chains[:0], b.Spans[:0]
				n, err := dev.Pop(&b, 3)
				if err != nil || n == 0 {
					t.Fatalf("Pop = %d, %v with %d sent, %d got", n, err, sent, got)
				}
				used := make([]vring.Used, 0, 3)
				for _, c := range b.Chains {
					bufs := int(got%4) + 1
					if bufs > int(size) {
						bufs = int(size)
					}
					if int(c.Readable) != int(got)%(bufs+1) || int(c.Readable+c.Writable) != bufs || b.Spans[c.First].Addr() != r.Addr(uint64(got%256)) {
						t.Fatalf("chain %d: %+v", got, c)
					}
					used = append(used, vring.Used{ID: c.ID, Count: c.Count, Len: c.WriteLen})
					got++
				}
				if err := dev.Complete(used); err != nil {
					t.Fatal(err)
				}
				for {
					n, err := drv.Reap(done[:2])
					if err != nil {
						t.Fatal(err)
					}
					for _, c := range done[:n] {
						if c.Token != back {
							t.Fatalf("token %d, want %d", c.Token, back)
						}
						back++
					}
					if n == 0 {
						break
					}
				}
			}
		}
	})
}

// TestNoAllocations: the steady state allocates nothing, on either side.
func TestNoAllocations(t *testing.T) {
	eachRing(t, func(t *testing.T, p vringtest.Params) {
		r := vringtest.NewRig(t, p, 256, 65536)
		drv, dev := r.Pair(t)
		var b vring.Batch
		for _, bufs := range []int{1, 3} {
			reqs := requests(r, 64, bufs)
			used := make([]vring.Used, 0, 64)
			done := make([]vring.Completion, 64)
			run := func() {
				if _, err := dev.ArmKick(); err != nil {
					t.Fatal(err)
				}
				if err := cycle(drv, dev, reqs, &b, used, done); err != nil {
					t.Fatal(err)
				}
				dev.DisarmKick()
				if _, err := drv.ArmCall(); err != nil {
					t.Fatal(err)
				}
				drv.DisarmCall()
				drv.State()
				dev.Stats().Load()
				dev.Broken()
			}
			run()
			if n := testing.AllocsPerRun(100, run); n != 0 {
				t.Errorf("%d buffers: %v allocations for each batch", bufs, n)
			}
		}
	})
}

// TestErrorsAreDistinct: errors.Is tells one sentinel from all others, and names the queue.
func TestErrorsAreDistinct(t *testing.T) {
	all := []error{vring.ErrIndexJump, vring.ErrHeadRange, vring.ErrNextRange, vring.ErrLoop, vring.ErrIndirectNotNegotiated, vring.ErrIndirectLen,
		vring.ErrIndirectNested, vring.ErrIndirectNext, vring.ErrIndirectNextRange, vring.ErrOrder, vring.ErrIDRange, vring.ErrIDInFlight, vring.ErrUnavailable, vring.ErrRestamp, vring.ErrUsedOrder, vring.ErrZeroLength, vring.ErrOverflow,
		vring.ErrTranslate, vring.ErrSpans, vring.ErrTotal, vring.ErrUsedJump, vring.ErrUsedID, vring.ErrUsedLen, vring.ErrRequest,
		vring.ErrTooLong, vring.ErrComplete, vring.ErrConfig, vring.ErrState}
	seen := map[string]bool{}
	for i, a := range all {
		e := &vring.Error{Queue: "net0 tx1", Code: a, Err: fmt.Errorf("outer: %w", dma.ErrHole)}
		for k, b := range all {
			if errors.Is(e, b) != (i == k) {
				t.Errorf("%v is %v", a, b)
			}
		}
		if !errors.Is(e, dma.ErrHole) {
			t.Errorf("%v hides its cause", a)
		}
		if s := e.Error(); seen[s] || !bytes.Contains([]byte(s), []byte("net0 tx1")) || !bytes.Contains([]byte(s), []byte(a.Error())) {
			t.Errorf("message %q", s)
		}
	}
}
