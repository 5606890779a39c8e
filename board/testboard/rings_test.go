package testboard_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"testing"

	"github.com/boardlink/boardlink/board"
	. "github.com/boardlink/boardlink/board/testboard"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/vring"
)

// Where a ring test lays things out; offsets are the same in both memories.
const (
	windowBase = 0x80000000
	poolBase   = 0x100000000

	atDesc     = 0x1000
	atDriver   = 0x2000
	atDevice   = 0x3000
	atIndirect = 0x4000
	atReadable = 0x5000
	atWritable = 0x6000
	bufSize    = 16
)

// ringTest is a virtqueue between the agent (driver side) and the host (device side): each
// request carries a readable buffer and a writable one, which the device fills with what it
// read, transformed.
type ringTest struct {
	push, eventIdx, indirect bool
	packed, inOrder          bool
	size                     uint16
	transfers, batch         int
	arm                      int    // completions to wait for (ArmCallAfter); 0: one
	start                    uint16 // index to start at
	// Mutations: what is kept from the rings.
	noArm  bool
	near   bool                    // that anything lies across the bus
	ignore func(mmio.Barrier) bool // these barriers
}

// deaf is memory that ignores some barriers.
type deaf struct {
	mem    mmio.Mem
	ignore func(mmio.Barrier) bool
}

func (d *deaf) Load(off uint64, width uint) uint64 {
	switch width {
	case 1:
		return uint64(d.mem.Load8(off))
	case 2:
		return uint64(d.mem.Load16(off))
	case 4:
		return uint64(d.mem.Load32(off))
	}
	return d.mem.Load64(off)
}

func (d *deaf) Store(off uint64, width uint, v uint64) {
	switch width {
	case 1:
		d.mem.Store8(off, uint8(v))
	case 2:
		d.mem.Store16(off, uint16(v))
	case 4:
		d.mem.Store32(off, uint32(v))
	default:
		d.mem.Store64(off, v)
	}
}

func (d *deaf) Barrier(b mmio.Barrier) {
	if !d.ignore(b) {
		d.mem.Barrier(b)
	}
}

func (c *ringTest) name() string {
	s := "window"
	if c.push {
		s = "push"
	}
	if c.eventIdx {
		s += ",event index"
	} else {
		s += ",flags"
	}
	if c.packed {
		s = "packed," + s
	}
	if c.inOrder {
		s += ",in order"
	}
	if c.indirect {
		s += ",indirect"
	}
	if c.arm > 1 {
		s += fmt.Sprintf(",arm after %d", c.arm)
	}
	if c.start != 0 {
		s += fmt.Sprintf(",from %d", c.start)
	}
	return s
}

// ends is the regions as one side sees them.
type ends struct{ window, pool dma.Region }

func (c *ringTest) regions(p *Proc, acct *dma.Account) *ends {
	e := &ends{
		dma.Region{Name: "window", Addr: windowBase, Mem: p.Mem(board.Agent), Access: dma.DeviceRead | dma.DeviceWrite, Across: p.Side() == board.Host},
		dma.Region{Name: "pool", Addr: poolBase, Mem: p.Mem(board.Host), Access: dma.DeviceRead | dma.DeviceWrite, Across: p.Side() == board.Agent},
	}
	if e.window.Across {
		e.window.Account = acct
	} else {
		e.pool.Account = acct
	}
	for _, r := range []*dma.Region{&e.window, &e.pool} {
		if c.near {
			r.Across = false
		}
		if c.ignore != nil {
			r.Mem = mmio.NewBusMem(&deaf{r.Mem, c.ignore}, r.Mem.Size(), r.Mem.Kind())
		}
	}
	return e
}

func (c *ringTest) read(e *ends) *dma.Region { // what the device side reads
	if c.push {
		return &e.pool
	}
	return &e.window
}

func (c *ringTest) config(e *ends, side board.Side) vring.Config {
	desc, driver, device := c.sizes()
	q := vring.Config{
		Name: "test", Size: c.size, EventIdx: c.eventIdx, Indirect: c.indirect, InOrder: c.inOrder,
		Desc:   dma.Span{Region: c.read(e), Off: atDesc, Len: uint32(desc)},
		Driver: dma.Span{Region: c.read(e), Off: atDriver, Len: uint32(driver)},
		Device: dma.Span{Region: &e.window, Off: atDevice, Len: uint32(device)},
	}
	if c.indirect {
		q.IndirectMax = 2
		q.IndirectMem = dma.Span{Region: c.read(e), Off: atIndirect, Len: uint32(c.size) * 2 * 16}
	}
	if side == board.Host {
		t, err := dma.NewTable(e.window, e.pool)
		if err != nil {
			panic(err)
		}
		q.Table = new(dma.TableRef)
		q.Table.Store(t)
	}
	q.State = vring.State{Avail: c.start, Used: c.start, Packed: c.packed && c.start != 0}
	return q
}

func (c *ringTest) sizes() (desc, driver, device uint64) {
	if c.packed {
		return vring.PackedSizes(c.size)
	}
	return vring.SplitSizes(c.size)
}

func (c *ringTest) newDriver(q vring.Config) (vring.Driver, error) {
	if c.packed {
		return vring.NewPackedDriver(q)
	}
	return vring.NewSplitDriver(q)
}

func (c *ringTest) newDevice(q vring.Config) (vring.Device, error) {
	if c.packed {
		return vring.NewPackedDevice(q)
	}
	return vring.NewSplitDevice(q)
}

func (c *ringTest) request(e *ends, seq int) (readable, writable dma.Span) {
	i := uint64(seq % int(c.size))
	return dma.Span{Region: c.read(e), Off: atReadable + i*bufSize, Len: bufSize}, dma.Span{Region: &e.window, Off: atWritable + i*bufSize, Len: bufSize}
}

func pattern(seq int, answer bool) []byte {
	b := make([]byte, bufSize)
	v := uint64(seq+1) * 0x9e3779b97f4a7c15
	if answer {
		v = ^v
	}
	binary.LittleEndian.PutUint64(b, v)
	binary.LittleEndian.PutUint64(b[8:], v>>1)
	return b
}

func (c *ringTest) setup(b *Board) {
	var hostAcct, agentAcct dma.Account
	desc, driver, device := c.sizes()
	of := board.Agent
	if c.push {
		of = board.Host
	}
	if c.packed {
		b.Name(of, atDesc, desc, "desc")
		b.Name(of, atDriver, driver, "driver event")
		b.Name(board.Agent, atDevice, device, "device event")
		b.Name(of, atReadable, 0x1000, "readable")
	} else {
		ringNames(b, of, desc, driver, c.size)
		b.Name(board.Agent, atDevice, device, "used ring")
		b.Name(board.Agent, atDevice, 4, "used flags|idx")
		b.Name(board.Agent, atDevice+device-2, 2, "avail_event")
	}
	b.Name(board.Agent, atWritable, 0x1000, "writable")
	b.Go(board.Host, "device", func(p *Proc) { c.device(p, c.regions(p, &hostAcct)) })
	b.Go(board.Agent, "driver", func(p *Proc) { c.driver(p, c.regions(p, &agentAcct)) })
	b.AtEnd(func() error {
		for _, s := range []struct {
			side board.Side
			a    *dma.Account
		}{{board.Host, &hostAcct}, {board.Agent, &agentAcct}} {
			if got, want := s.a.Reads+s.a.FlushReads, b.Reads(s.side); got != want {
				return fmt.Errorf("the %v accounted %d reads across the bus, and did %d", s.side, got, want)
			}
			if got, want := s.a.Writes, b.Writes(s.side); got != want {
				return fmt.Errorf("the %v accounted %d writes across the bus, and did %d", s.side, got, want)
			}
			if c.push && !c.packed && s.a.Reads != 0 {
				return fmt.Errorf("with push the %v read across the bus %d times, besides %d flushes", s.side, s.a.Reads, s.a.FlushReads)
			}
		}
		return nil
	})
}

func ringNames(b *Board, of board.Side, desc, driver uint64, size uint16) {
	b.Name(of, atDesc, desc, "desc")
	b.Name(of, atDriver, driver, "avail ring")
	b.Name(of, atDriver, 4, "avail flags|idx")
	b.Name(of, atDriver+driver-2, 2, "used_event")
	b.Name(of, atIndirect, uint64(size)*32, "indirect")
	b.Name(of, atReadable, 0x1000, "readable")
}

// processor is what the two sides need of a Proc, or of an End.
type processor interface {
	Ring(vector uint32)
	WaitDoorbell(vector uint32) uint64
	Fail(err error)
	Failf(format string, args ...interface{})
}

func (c *ringTest) driver(p processor, e *ends) {
	q, err := c.newDriver(c.config(e, board.Agent))
	if err != nil {
		p.Fail(err)
	}
	p.Ring(1) // the ring is laid out
	reqs := make([]vring.Request, 0, c.batch)
	done := make([]vring.Completion, c.batch)
	for added, reaped := 0, 0; reaped < c.transfers; {
		busy := false
		n, err := q.Reap(done)
		if err != nil {
			p.Fail(err)
		}
		for _, d := range done[:n] {
			busy = true
			if int(d.Token) != reaped || d.Len != bufSize {
				p.Failf("completion %d has token %d, %d bytes", reaped, d.Token, d.Len)
			}
			_, w := c.request(e, reaped)
			got := make([]byte, bufSize)
			w.CopyOut(got, 0)
			if !bytes.Equal(got, pattern(reaped, true)) {
				p.Failf("answer %d is % x, not % x", reaped, got, pattern(reaped, true))
			}
			reaped++
		}
		// A buffer is used again size transfers later.
		for reqs = reqs[:0]; len(reqs) < c.batch && added+len(reqs) < c.transfers && added+len(reqs) < reaped+int(c.size); {
			seq := added + len(reqs)
			r, w := c.request(e, seq)
			r.CopyIn(0, pattern(seq, false))
			reqs = append(reqs, vring.Request{Token: uint32(seq), Readable: 1,
				Bufs: []vring.Buffer{{Addr: r.Addr(), Len: r.Len}, {Addr: w.Addr(), Len: w.Len}}})
		}
		if n, err = q.Add(reqs); err != nil {
			p.Fail(err)
		}
		added += n
		if n > 0 {
			busy = true
			if q.NeedKick() {
				p.Ring(0)
			}
		}
		if busy {
			continue
		}
		pending := false
		if !c.noArm {
			if c.arm > 1 {
				pending, err = q.ArmCallAfter(c.arm)
			} else {
				pending, err = q.ArmCall()
			}
			if err != nil {
				p.Fail(err)
			}
		}
		if !pending {
			p.WaitDoorbell(0)
		}
		q.DisarmCall()
	}
}

func (c *ringTest) device(p processor, e *ends) {
	p.WaitDoorbell(1)
	q, err := c.newDevice(c.config(e, board.Host))
	if err != nil {
		p.Fail(err)
	}
	var b vring.Batch
	var used []vring.Used
	buf := make([]byte, bufSize)
	for served := 0; served < c.transfers; {
		b.Chains, b.Spans, used = b.Chains[:0], b.Spans[:0], used[:0]
		n, err := q.Pop(&b, c.batch)
		if err != nil {
			p.Fail(err)
		}
		if n > 0 {
			for _, ch := range b.Chains {
				if ch.Readable != 1 || ch.Writable != 1 || ch.ReadLen != bufSize || ch.WriteLen != bufSize {
					p.Failf("chain %d is %+v", served, ch)
				}
				b.Spans[ch.First].CopyOut(buf, 0)
				if !bytes.Equal(buf, pattern(served, false)) {
					p.Failf("request %d is % x, not % x", served, buf, pattern(served, false))
				}
				b.Spans[ch.First+1].CopyIn(0, pattern(served, true))
				used = append(used, vring.Used{ID: ch.ID, Count: ch.Count, Len: bufSize})
				served++
			}
			if err := q.Complete(used); err != nil {
				p.Fail(err)
			}
			if q.NeedCall() {
				p.Ring(0)
			}
			continue
		}
		pending := false
		if !c.noArm {
			if pending, err = q.ArmKick(); err != nil {
				p.Fail(err)
			}
		}
		if !pending {
			p.WaitDoorbell(0)
		}
		q.DisarmKick()
	}
}

var machines = []struct {
	name string
	o    Options
}{
	{"in order", Options{}},
	{"x86", Options{HostWindow: mmio.WriteCombining, AgentWindow: mmio.WriteCombining, Ordering: TSO}},
	{"weak", harshest},
}

func TestSplitRings(t *testing.T) {
	for _, c := range []ringTest{
		{},
		{eventIdx: true},
		{push: true},
		{push: true, eventIdx: true},
		{push: true, eventIdx: true, indirect: true},
		{eventIdx: true, arm: 2},
		{push: true, eventIdx: true, arm: 2},
		{push: true, eventIdx: true, start: 65533},
		{start: 65533},
		{eventIdx: true, inOrder: true},
		{push: true, inOrder: true},
	} {
		c := c
		c.size, c.transfers, c.batch = 2, 5, 2
		if c.arm > 0 {
			c.size, c.transfers = 4, 8
		}
		for _, m := range machines {
			m := m
			t.Run(c.name()+","+m.name, func(t *testing.T) {
				Explore(t, Search{Options: m.o, Runs: runs(600), Bound: 2, MaxSystematic: runs(900)}, c.setup)
			})
		}
	}
}

// TestRingsMutated keeps things from the rings that they depend on: the search
// must see it, or TestSplitRings and TestPackedRings mean nothing.
func TestRingsMutated(t *testing.T) {
	no := func(k mmio.Barrier) func(mmio.Barrier) bool { return func(b mmio.Barrier) bool { return b == k } }
	tso := Options{HostWindow: mmio.WriteCombining, AgentWindow: mmio.WriteCombining, Ordering: TSO}
	for _, c := range []struct {
		name string
		o    Options
		r    ringTest
		kind FailureKind
	}{
		{"no arming, flags", Options{}, ringTest{noArm: true}, LostWakeup},
		{"no arming, event index", Options{}, ringTest{noArm: true, eventIdx: true}, LostWakeup},
		{"no read-back, flags", Options{}, ringTest{push: true, near: true}, LostWakeup},
		{"no read-back, event index", Options{}, ringTest{push: true, near: true, eventIdx: true}, LostWakeup},
		{"no full barrier, flags", tso, ringTest{ignore: no(mmio.FullBarrier)}, LostWakeup},
		{"no full barrier, event index", tso, ringTest{ignore: no(mmio.FullBarrier), eventIdx: true}, LostWakeup},
		{"no full barrier, push", Options{Ordering: TSO}, ringTest{push: true, ignore: no(mmio.FullBarrier), eventIdx: true}, LostWakeup},
		{"no write barrier", harshest, ringTest{ignore: no(mmio.WriteBarrier)}, CheckFailure},
		{"no write barrier, push", harshest, ringTest{push: true, ignore: no(mmio.WriteBarrier)}, CheckFailure},
		{"no read barrier", Options{StaleLoads: true}, ringTest{push: true, ignore: no(mmio.ReadBarrier)}, CheckFailure},
		{"packed, no arming, flags", Options{}, ringTest{packed: true, noArm: true}, LostWakeup},
		{"packed, no arming, event index", Options{}, ringTest{packed: true, noArm: true, eventIdx: true}, LostWakeup},
		{"packed, no read-back", Options{}, ringTest{packed: true, push: true, near: true, eventIdx: true}, LostWakeup},
		{"packed, no full barrier, flags", tso, ringTest{packed: true, ignore: no(mmio.FullBarrier)}, LostWakeup},
		{"packed, no full barrier, event index", tso, ringTest{packed: true, ignore: no(mmio.FullBarrier), eventIdx: true}, LostWakeup},
		{"packed, no read barrier", Options{StaleLoads: true}, ringTest{packed: true, ignore: no(mmio.ReadBarrier)}, CheckFailure},
		{"packed, no write barrier", harshest, ringTest{packed: true, ignore: no(mmio.WriteBarrier)}, CheckFailure},
	} {
		c := c
		t.Run(c.name, func(t *testing.T) {
			c.r.size, c.r.transfers, c.r.batch = 2, 3, 2
			if c.r.packed {
				c.r.size = 4
			}
			searches := map[string]Search{"systematic": {Options: c.o, Bound: 3, MaxSystematic: 60000, Seed: 1}}
			if raceFactor == 1 {
				searches["random"] = Search{Options: c.o, Bound: -1, Runs: 100000, Seed: 1}
			}
			for how, s := range searches {
				res := Find(s, c.r.setup)
				if res.Failure == nil {
					t.Errorf("%s: not found in %d schedules", how, res.Runs)
				} else if res.Failure.Kind != c.kind {
					t.Errorf("%s: found something else: %v", how, res.Failure)
				} else {
					t.Logf("%s: schedule %d, %s: %v", how, res.Runs, res.Failure.Replay, res.Failure.Err)
				}
			}
		})
	}
}

// TestPackedRings: the packed ring in placement window, and with its descriptors in host memory, which nobody
// chooses but which has to be right. A request takes two descriptors: some queues are of a size
// that makes them cross the end.
func TestPackedRings(t *testing.T) {
	for _, c := range []ringTest{
		{size: 4},
		{size: 4, eventIdx: true},
		{size: 3, eventIdx: true},
		{size: 5, eventIdx: true, start: 4},
		{size: 2, eventIdx: true, indirect: true},
		{size: 4, eventIdx: true, inOrder: true},
		{size: 3, inOrder: true, indirect: true},
		{size: 8, eventIdx: true, arm: 2},
		{size: 8, eventIdx: true, arm: 2, inOrder: true},
		{size: 4, eventIdx: true, push: true},
		{size: 4, push: true},
	} {
		c := c
		c.packed, c.transfers, c.batch = true, 5, 2
		if c.arm > 0 {
			c.transfers = 8
		}
		for _, m := range machines {
			m := m
			t.Run(fmt.Sprintf("%s,%d,%s", c.name(), c.size, m.name), func(t *testing.T) {
				Explore(t, Search{Options: m.o, Runs: runs(600), Bound: 2, MaxSystematic: runs(900)}, c.setup)
			})
		}
	}
}
