package engine_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/dma/engine"
	"github.com/boardlink/boardlink/dma/engine/dwedma"
	"github.com/boardlink/boardlink/dma/engine/edu"
	"github.com/boardlink/boardlink/dma/engine/fsl"
	"github.com/boardlink/boardlink/doorbell"
	dmamodel "github.com/boardlink/boardlink/hwtest/models/dma"
	"github.com/boardlink/boardlink/mmio"
)

const (
	memSize  = 1 << 20
	descSize = 64 << 10 // at the end of the near memory, outside of the map
	nearLink = dma.Addr(0x1_0000_0000)
	farLink  = dma.Addr(0x9_0000_0000)
	nearBus  = 0x1000_0000
	farBus   = 0x8000_0000
	rw       = dma.DeviceRead | dma.DeviceWrite
)

// model is what all models have.
type model interface {
	Err() error
	Counts() (transfers, bytes, chains uint64)
	Freeze(name string)
	Settle()
}

// rig is an engine over a model, and the two memories.
type rig struct {
	e         dma.Engine
	m         model
	mem       [2][]byte // near, far
	region    [2]*dma.Region
	irq       *doorbell.Eventfd
	makeAgain func() (dma.Engine, error)
}

var makes = []string{"fsl mpc83xx", "fsl mpc85xx", "dw edma", "dw hdma"}

type rigOptions struct {
	fault func(uint64) dmamodel.Fault
	polls int
	delay time.Duration
	irq   bool
	busy  bool
}

func newRig(t testing.TB, name string, o rigOptions) *rig {
	t.Helper()
	r := &rig{}
	for i := range r.mem {
		r.mem[i] = alignedBytes(memSize)
		r.region[i] = &dma.Region{Name: []string{"near", "far"}[i], Addr: []dma.Addr{nearLink, farLink}[i], Access: rw,
			Mem: mmio.FromBytes(r.mem[i][:memSize-descSize])}
	}
	mo := dmamodel.Options{Fault: o.fault, Polls: o.polls, Delay: o.delay, Memory: []dmamodel.Range{
		{Name: "near", Base: nearBus, Bytes: r.mem[0]},
		{Name: "far", Base: farBus, Bytes: r.mem[1], Far: true},
	}}
	var waiter dma.EngineWaiter
	if o.irq {
		e, err := doorbell.NewEventfd()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { e.Close() })
		r.irq, waiter = e, e
		mo.IRQ = func() { e.Ring() }
	}
	windows, err := engine.NewMap(0,
		engine.Window{Name: "near", Link: nearLink, Size: memSize - descSize, Bus: nearBus, Side: engine.Near, Access: rw},
		engine.Window{Name: "far", Link: farLink, Size: memSize - descSize, Bus: farBus, Side: engine.Far, Access: rw})
	if err != nil {
		t.Fatal(err)
	}
	desc, err := mmio.FromBytes(r.mem[0]).Slice(memSize-descSize, descSize)
	if err != nil {
		t.Fatal(err)
	}
	descBus := uint64(nearBus + memSize - descSize)
	switch name {
	case "fsl mpc83xx", "fsl mpc85xx":
		chip := fsl.MPC83xx
		if name == "fsl mpc85xx" {
			chip = fsl.MPC85xx
		}
		m := dmamodel.NewFSL(chip == fsl.MPC85xx, mo)
		if o.busy {
			m.Busy(0)
			m.Busy(2)
		}
		r.m = m
		r.makeAgain = func() (dma.Engine, error) {
			return fsl.New(fsl.Config{Chip: chip, Regs: m.Mem(), Channels: []int{0, 2}, Desc: desc, DescBus: descBus, Chain: 8, Map: windows, Waiter: waiter, ToHost: true})
		}
	case "dw edma", "dw hdma":
		kind := dwedma.EDMA
		if name == "dw hdma" {
			kind = dwedma.HDMA
		}
		m := dmamodel.NewDW(kind == dwedma.HDMA, 4, 3, mo)
		if o.busy {
			m.Busy(0, 0)
			m.Busy(1, 2)
		}
		r.m = m
		c := dwedma.Config{Kind: kind, Regs: m.Mem(), Write: []int{0, 3}, Read: []int{2}, List: desc, ListBus: descBus, Chain: 8, Map: windows, Waiter: waiter}
		if o.irq {
			c.MSI = &dwedma.MSI{Addr: 0xfee0_0000, Data: 0x41}
		}
		r.makeAgain = func() (dma.Engine, error) { return dwedma.New(c) }
	default:
		t.Fatal(name)
	}
	if r.e, err = r.makeAgain(); err != nil {
		t.Fatal(err)
	}
	return r
}

// alignedBytes returns memory that starts at a multiple of 64.
func alignedBytes(n int) []byte {
	b := make([]byte, n+64)
	for i := range b {
		if uintptrOf(&b[i])%64 == 0 {
			return b[i : i+n : i+n]
		}
	}
	panic("unreachable")
}

func (r *rig) span(side int, off, n uint32) dma.Span {
	return dma.Span{Region: r.region[side], Off: uint64(off), Len: n}
}

func (r *rig) check(t testing.TB) {
	t.Helper()
	if err := r.m.Err(); err != nil {
		t.Error(err)
	}
}

func fill(b []byte, seed uint64) {
	g := rand.New(rand.NewPCG(seed, 7))
	for i := 0; i+8 <= len(b); i += 8 {
		binary.LittleEndian.PutUint64(b[i:], g.Uint64())
	}
}

func forMakes(t *testing.T, f func(t *testing.T, name string)) {
	for _, name := range makes {
		t.Run(name, func(t *testing.T) { f(t, name) })
	}
}

// TestEngines: random copies of every shape, both ways, several in flight, byte-exact, and no rule broken.
func TestEngines(t *testing.T) {
	forMakes(t, func(t *testing.T, name string) {
		r := newRig(t, name, rigOptions{polls: 2})
		g := rand.New(rand.NewPCG(1, 2))
		fill(r.mem[0][:memSize-descSize], 1)
		fill(r.mem[1][:memSize-descSize], 2)
		want := [2][]byte{bytes.Clone(r.mem[0][:memSize-descSize]), bytes.Clone(r.mem[1][:memSize-descSize])}
		done := make([]dma.Completion, 16)
		flying := map[uint64]bool{}
		tag := uint64(0)
		for round := 0; round < 60; round++ {
			// A round fills disjoint pieces: lower half of either memory is read, the upper half written.
			var batch []dma.Copy
			half := uint32(memSize-descSize) / 2
			for off := uint32(0); off < half-9000; {
				n := 1 + g.Uint32N(8000)
				from := g.IntN(2)
				pad := g.Uint32N(64)
				dst, src := r.span(1-from, half+off+pad, n), r.span(from, off+g.Uint32N(64), n)
				batch = append(batch, dma.Copy{Dst: dst, Src: src, Tag: tag})
				copy(want[1-from][dst.Off:dst.Off+uint64(n)], want[from][src.Off:src.Off+uint64(n)])
				tag++
				off += n + 64 + 63
				if len(batch) == 1+g.IntN(40) {
					break
				}
			}
			for len(batch) > 0 || len(flying) > 0 {
				n, err := r.e.Submit(batch)
				if err != nil {
					t.Fatal(err)
				}
				for _, c := range batch[:n] {
					flying[c.Tag] = true
				}
				batch = batch[n:]
				for _, c := range done[:r.e.Poll(done[:1+g.IntN(16)])] {
					if !flying[c.Tag] || c.Err != nil {
						t.Fatalf("completion %+v of %v", c, flying)
					}
					delete(flying, c.Tag)
				}
			}
		}
		for i := range want {
			if !bytes.Equal(want[i], r.mem[i][:memSize-descSize]) {
				t.Errorf("memory %d differs", i)
			}
		}
		if n, _, chains := r.m.Counts(); n != tag || chains == 0 || chains >= n {
			t.Errorf("%d transfers in %d chains, want %d in fewer", n, chains, tag)
		}
		r.check(t)
		if err := r.e.Close(); err != nil {
			t.Error(err)
		}
		if err := r.e.Close(); err != nil {
			t.Error(err)
		}
		if _, err := r.e.Submit(nil); !errors.Is(err, dma.ErrEngineClosed) {
			t.Errorf("Submit after Close: %v", err)
		}
		r.check(t)
	})
}

// TestRefused: what an engine cannot or may not do is an error, and never reaches the hardware.
func TestRefused(t *testing.T) {
	forMakes(t, func(t *testing.T, name string) {
		r := newRig(t, name, rigOptions{})
		outside := &dma.Region{Name: "other", Addr: 0x5_0000_0000, Mem: mmio.FromBytes(make([]byte, 4096)), Access: rw}
		desc := &dma.Region{Name: "lists", Addr: nearLink, Mem: mmio.FromBytes(r.mem[0]), Access: rw}
		ok := dma.Copy{Dst: r.span(1, 0, 64), Src: r.span(0, 0, 64)}
		for what, c := range map[string]struct {
			c    dma.Copy
			want error
		}{
			"destination in no window":   {dma.Copy{Dst: dma.Span{Region: outside, Len: 64}, Src: r.span(0, 0, 64)}, dma.ErrUnreachable},
			"source in no window":        {dma.Copy{Src: dma.Span{Region: outside, Len: 64}, Dst: r.span(0, 0, 64)}, dma.ErrUnreachable},
			"the engine's own lists":     {dma.Copy{Dst: dma.Span{Region: desc, Off: memSize - descSize, Len: 64}, Src: r.span(1, 0, 64)}, dma.ErrUnreachable},
			"one byte behind the window": {dma.Copy{Dst: dma.Span{Region: desc, Off: memSize - descSize - 63, Len: 64}, Src: r.span(1, 0, 64)}, dma.ErrUnreachable},
			"short destination":          {dma.Copy{Dst: r.span(1, 0, 63), Src: r.span(0, 0, 64)}, dma.ErrBadCopy},
			"no bytes":                   {dma.Copy{Dst: r.span(1, 0, 0), Src: r.span(0, 0, 0)}, dma.ErrLimits},
		} {
			n, err := r.e.Submit([]dma.Copy{c.c, ok})
			if n != 0 || !errors.Is(err, c.want) {
				t.Errorf("%s: %d, %v, want %v", what, n, err, c.want)
			}
			var te *dma.TransferError
			if errors.As(err, &te) && !strings.Contains(err.Error(), fmt.Sprintf("%#x", uint64(c.c.Dst.Addr()))) {
				t.Errorf("%s: %v does not name the address", what, err)
			}
		}
		if n, _, _ := r.m.Counts(); n != 0 {
			t.Errorf("%d transfers reached the hardware", n)
		}
		r.check(t)
	})
}

// TestFlows: a direction that the hardware does not have is refused.
func TestFlows(t *testing.T) {
	r := newRig(t, "dw edma", rigOptions{})
	if n, err := r.e.Submit([]dma.Copy{{Dst: r.span(0, 0, 64), Src: r.span(0, 4096, 64)}}); n != 0 || !errors.Is(err, dma.ErrUnreachable) {
		t.Errorf("near to near: %d, %v", n, err)
	}
	r = newRig(t, "fsl mpc83xx", rigOptions{})
	m := dma.NewMover(dma.MoverConfig{Engine: r.e, Min: 1})
	fill(r.mem[0][4096:8192], 5)
	if err := m.Move([]dma.Copy{{Dst: r.span(0, 0, 4096), Src: r.span(0, 4096, 4096)}}); err != nil || !bytes.Equal(r.mem[0][:4096], r.mem[0][4096:8192]) {
		t.Errorf("near to near: %v", err)
	}
	if m.Stats().Get("engine_copies") != 1 {
		t.Error("the engine did not do it")
	}
	r.check(t)
}

func every(n uint64, f dmamodel.Fault) func(uint64) dmamodel.Fault {
	return func(i uint64) dmamodel.Fault {
		if i%n == n-1 {
			return f
		}
		return dmamodel.NoFault
	}
}

// moveMany moves total pieces of 2048 bytes both ways through a Mover and compares.
func moveMany(t *testing.T, r *rig, m *dma.Mover, total int) {
	t.Helper()
	const piece, slots = 2048, 128
	fill(r.mem[0][:piece*slots], 11)
	fill(r.mem[1][:piece*slots], 12)
	for i := 0; i < total; i++ {
		from, k := i&1, uint32(i/2%slots)
		dst, src := r.span(1-from, (slots+k)*piece, piece), r.span(from, k*piece, piece)
		ticket, err := m.Queue(dst, src)
		if err != nil {
			t.Fatal(err)
		}
		if i%24 == 23 || i == total-1 {
			m.Wait(ticket)
			if m.Landed() < ticket {
				t.Fatalf("landed %d after the wait for %d", m.Landed(), ticket)
			}
			for j := i - i%24; j <= i; j++ {
				from, k := j&1, j/2%slots
				if !bytes.Equal(r.mem[1-from][(slots+k)*piece:(slots+k+1)*piece], r.mem[from][k*piece:(k+1)*piece]) {
					t.Fatalf("copy %d did not land", j)
				}
				clear(r.mem[1-from][(slots+k)*piece : (slots+k+1)*piece])
			}
		}
	}
}

// TestErrors: failed transfers are done over again, and counted; the engine goes on.
func TestErrors(t *testing.T) {
	forMakes(t, func(t *testing.T, name string) {
		r := newRig(t, name, rigOptions{fault: every(17, dmamodel.Error), polls: 1})
		var log []string
		m := dma.NewMover(dma.MoverConfig{Engine: r.e, Min: 1, Logf: func(f string, a ...any) { log = append(log, fmt.Sprintf(f, a...)) }})
		moveMany(t, r, m, 600)
		s := m.Stats()
		if s.Get("failed") < 20 || s.Get("redone") < s.Get("failed") || s.Get("engine_copies") == 0 || s.Get("engine_copies")+s.Get("redone") != 600 || !m.Enabled() {
			t.Errorf("failed %d, redone %d, by the engine %d of 600, enabled %v", s.Get("failed"), s.Get("redone"), s.Get("engine_copies"), m.Enabled())
		}
		if len(log) != 1 || !strings.Contains(log[0], "transfer failed") {
			t.Errorf("log: %q", log)
		}
		r.check(t)
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
}

// TestGivesUp: an engine that fails again and again is not used any more.
func TestGivesUp(t *testing.T) {
	forMakes(t, func(t *testing.T, name string) {
		r := newRig(t, name, rigOptions{fault: every(1, dmamodel.Error)})
		m := dma.NewMover(dma.MoverConfig{Engine: r.e, Min: 1, MaxFailures: 5})
		moveMany(t, r, m, 300)
		if s := m.Stats(); s.Get("disabled") != 1 || m.Enabled() || s.Get("failed") < 5 || s.Get("failed") > 8 || s.Get("cpu_copies") == 0 || s.Get("engine_copies") != 0 {
			t.Errorf("disabled %d, failed %d, by the processor %d", s.Get("disabled"), s.Get("failed"), s.Get("cpu_copies"))
		}
		if m.Runaway() != nil {
			t.Error(m.Runaway())
		}
		r.check(t)
	})
}

// TestStuck: a transfer that does not end is aborted, done over again, and the channel works on.
func TestStuck(t *testing.T) {
	forMakes(t, func(t *testing.T, name string) {
		r := newRig(t, name, rigOptions{fault: every(50, dmamodel.Stuck), polls: 1})
		m := dma.NewMover(dma.MoverConfig{Engine: r.e, Min: 1, Timeout: 5 * time.Millisecond})
		moveMany(t, r, m, 300)
		if s := m.Stats(); s.Get("timeouts") < 2 || s.Get("aborted") < s.Get("timeouts") || s.Get("engine_copies") < 100 || !m.Enabled() || m.Runaway() != nil {
			t.Errorf("timeouts %d, aborted %d, by the engine %d, enabled %v, %v", s.Get("timeouts"), s.Get("aborted"), s.Get("engine_copies"), m.Enabled(), m.Runaway())
		}
		r.check(t)
	})
}

// TestRunaway: hardware that cannot be stopped is never given memory again, and that is told.
func TestRunaway(t *testing.T) {
	forMakes(t, func(t *testing.T, name string) {
		r := newRig(t, name, rigOptions{fault: every(50, dmamodel.Runaway), polls: 1})
		m := dma.NewMover(dma.MoverConfig{Engine: r.e, Min: 1, Timeout: 5 * time.Millisecond})
		moveMany(t, r, m, 300)
		if s := m.Stats(); s.Get("timeouts") != 1 || m.Enabled() || !errors.Is(m.Runaway(), dma.ErrRunaway) {
			t.Errorf("timeouts %d, enabled %v, %v", s.Get("timeouts"), m.Enabled(), m.Runaway())
		}
		if err := m.Close(); !errors.Is(err, dma.ErrRunaway) {
			t.Errorf("Close: %v", err)
		}
		if _, err := r.makeAgain(); !errors.Is(err, dma.ErrRunaway) {
			t.Errorf("a new engine on it: %v", err)
		}
	})
}

// TestInterrupts: completion by interrupt; those that are lost cost a little time, and are counted.
func TestInterrupts(t *testing.T) {
	forMakes(t, func(t *testing.T, name string) {
		for _, fault := range []dmamodel.Fault{dmamodel.NoFault, dmamodel.LostIRQ} {
			r := newRig(t, name, rigOptions{fault: every(1, fault), delay: 200 * time.Microsecond, irq: true})
			m := dma.NewMover(dma.MoverConfig{Engine: r.e, Min: 1, Spin: -1})
			moveMany(t, r, m, 240)
			s := m.Stats()
			if s.Get("sleeps") == 0 || s.Get("engine_copies") != 240 || fault == dmamodel.LostIRQ && s.Get("rescued") == 0 {
				t.Errorf("fault %d: slept %d times, rescued %d, by the engine %d", fault, s.Get("sleeps"), s.Get("rescued"), s.Get("engine_copies"))
			}
			r.m.Settle()
			r.check(t)
		}
	})
}

// TestCloseStops: after Close no memory is touched any more.
func TestCloseStops(t *testing.T) {
	forMakes(t, func(t *testing.T, name string) {
		r := newRig(t, name, rigOptions{delay: 20 * time.Millisecond})
		var batch []dma.Copy
		for i := uint32(0); i < 12; i++ {
			batch = append(batch, dma.Copy{Dst: r.span(int(i&1), (100+i)*1024, 1024), Src: r.span(int(1-i&1), i*1024, 1024), Tag: uint64(i)})
		}
		if n, err := r.e.Submit(batch); n != 12 || err != nil {
			t.Fatal(n, err)
		}
		if err := r.e.Close(); err != nil {
			t.Fatal(err)
		}
		r.m.Freeze("near")
		r.m.Freeze("far")
		r.m.Settle()
		r.check(t)
	})
}

// TestAbort: each copy that is under way completes, and the engine works on.
func TestAbort(t *testing.T) {
	forMakes(t, func(t *testing.T, name string) {
		r := newRig(t, name, rigOptions{polls: 1 << 30})
		for round := 0; round < 3; round++ {
			var batch []dma.Copy
			for i := uint32(0); i < 10; i++ {
				batch = append(batch, dma.Copy{Dst: r.span(int(i&1), (100+i)*1024, 1024), Src: r.span(int(1-i&1), i*1024, 1024), Tag: uint64(i)})
			}
			if n, err := r.e.Submit(batch); n != 10 || err != nil {
				t.Fatal(n, err)
			}
			if err := r.e.Abort(); err != nil {
				t.Fatal(err)
			}
			done := make([]dma.Completion, 20)
			n := r.e.Poll(done)
			for _, c := range done[:n] {
				if !errors.Is(c.Err, dma.ErrAborted) {
					t.Errorf("completion %+v", c)
				}
			}
			if n != 10 {
				t.Errorf("%d completions", n)
			}
		}
		r.check(t)
	})
}

// TestTakesOver: channels that a dead process left at work are stopped first.
func TestTakesOver(t *testing.T) {
	forMakes(t, func(t *testing.T, name string) {
		r := newRig(t, name, rigOptions{busy: true})
		m := dma.NewMover(dma.MoverConfig{Engine: r.e, Min: 1})
		moveMany(t, r, m, 60)
		if n := m.Stats().Get("engine_copies"); n != 60 {
			t.Errorf("%d of 60 by the engine", n)
		}
		r.check(t)
	})
}

// TestEdu: the driver against the model, within the device's limits.
func TestEdu(t *testing.T) {
	for _, irq := range []bool{false, true} {
		t.Run(fmt.Sprintf("irq=%v", irq), func(t *testing.T) {
			buf, host := alignedBytes(4096), alignedBytes(1<<16)
			o := dmamodel.Options{Delay: 2 * time.Millisecond, Memory: []dmamodel.Range{{Name: "buffer", Base: edu.BufferBus, Bytes: buf}, {Name: "host", Base: 0x100000, Bytes: host, Far: true}}}
			c := edu.Config{Buffer: nearLink, Host: []engine.Window{{Name: "host", Link: farLink, Size: 1 << 16, Bus: 0x100000, Side: engine.Far, Access: rw}}}
			if irq {
				e, err := doorbell.NewEventfd()
				if err != nil {
					t.Fatal(err)
				}
				defer e.Close()
				o.IRQ = func() { e.Ring() }
				c.Waiter = e
			}
			model := dmamodel.NewEDU(o)
			c.Regs = model.Mem()
			e, err := edu.New(c)
			if err != nil {
				t.Fatal(err)
			}
			m := dma.NewMover(dma.MoverConfig{Engine: e, Min: 1})
			near := &dma.Region{Name: "buffer", Addr: nearLink, Mem: mmio.FromBytes(buf), Access: rw}
			far := &dma.Region{Name: "host", Addr: farLink, Mem: mmio.FromBytes(host), Access: rw}
			fill(host[:4096], 3)
			err = m.Move([]dma.Copy{
				{Dst: dma.Span{Region: near, Len: 4096}, Src: dma.Span{Region: far, Len: 4096}},
				{Dst: dma.Span{Region: far, Off: 8192, Len: 4096}, Src: dma.Span{Region: near, Len: 4096}},
			})
			if err != nil || !bytes.Equal(host[:4096], host[8192:12288]) || bytes.Contains(host[12288:], []byte{1}) {
				t.Errorf("there and back: %v", err)
			}
			if n := m.Stats().Get("engine_copies"); n != 4 {
				t.Errorf("%d transfers, want 4: no more than %d bytes each", n, edu.MaxLen)
			}
			beyond := dma.Span{Region: &dma.Region{Name: "beyond", Addr: farLink + 1<<16, Mem: mmio.FromBytes(make([]byte, 64)), Access: rw}, Len: 64}
			if n, err := e.Submit([]dma.Copy{{Dst: beyond, Src: dma.Span{Region: near, Len: 64}}}); n != 0 || !errors.Is(err, dma.ErrUnreachable) {
				t.Errorf("an address outside the window: %d, %v", n, err)
			}
			if err := m.Close(); err != nil {
				t.Error(err)
			}
			if err := model.Err(); err != nil {
				t.Error(err)
			}
		})
	}
	_, err := edu.New(edu.Config{Regs: dmamodel.NewEDU(dmamodel.Options{}).Mem(), Buffer: nearLink,
		Host: []engine.Window{{Name: "high", Link: farLink, Size: 1 << 16, Bus: 1<<28 - 4096, Side: engine.Far, Access: rw}}})
	if err == nil || !strings.Contains(err.Error(), "0xfffffff") {
		t.Errorf("a window above the mask: %v", err)
	}
}

func TestMapRefuses(t *testing.T) {
	w := func(link dma.Addr, size, bus uint64) engine.Window {
		return engine.Window{Name: "w", Link: link, Size: size, Bus: bus, Access: rw}
	}
	for what, ws := range map[string][]engine.Window{
		"overlap":      {w(0x1000, 0x1000, 0), w(0x1fff, 1, 0x3f)},
		"empty":        {w(0x1000, 0, 0)},
		"link wraps":   {w(^dma.Addr(0), 0x1000, 0x3f)},
		"bus wraps":    {w(0x3f, 0x1000, ^uint64(0))},
		"above mask":   {w(0, 0x1000, 0xffff_f040)},
		"low bits":     {w(0x1001, 0x1000, 0x1000)},
		"mask by one ": {w(0, 1<<32+1, 0)},
	} {
		if _, err := engine.NewMap(1<<32-1, ws...); err == nil {
			t.Errorf("%s: accepted", what)
		}
	}
	m, err := engine.NewMap(1<<32-1, w(0x1000, 0x1000, 0x8000), engine.Window{Link: 0x2000, Size: 0x1000, Bus: 0x4000, Side: engine.Far, Access: dma.DeviceRead})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		a    dma.Addr
		n    uint32
		need dma.Access
		bus  uint64
		ok   bool
	}{
		{0x1000, 0x1000, rw, 0x8000, true}, {0x1fff, 1, rw, 0x8fff, true}, {0x1fff, 2, dma.DeviceRead, 0, false}, {0xfff, 2, rw, 0, false},
		{0x2010, 16, dma.DeviceRead, 0x4010, true}, {0x2010, 16, dma.DeviceWrite, 0, false}, {0x3000, 1, dma.DeviceRead, 0, false}, {^dma.Addr(0), 2, dma.DeviceRead, 0, false},
	} {
		bus, _, ok := m.Find(c.a, c.n, c.need)
		if ok != c.ok || ok && bus != c.bus {
			t.Errorf("%#x+%#x: %#x %v", uint64(c.a), c.n, bus, ok)
		}
	}
}

// instant is a channel whose chains end at the next look: what Core itself costs.
type instant struct{ n int }

func (c *instant) Start(items []engine.Item) error { c.n += len(items); return nil }
func (c *instant) State() (engine.State, uint64)   { return engine.Ended, 0 }
func (c *instant) Stop() error                     { return nil }
func (c *instant) Flows() engine.Flow              { return engine.AnyFlow }

func instantMover(t testing.TB) (*dma.Mover, [2]*dma.Region, *instant) {
	t.Helper()
	m, err := engine.NewMap(0, engine.Window{Link: nearLink, Size: memSize, Bus: nearBus, Access: rw}, engine.Window{Link: farLink, Size: memSize, Bus: farBus, Side: engine.Far, Access: rw})
	if err != nil {
		t.Fatal(err)
	}
	a, b := new(instant), new(instant)
	e, err := engine.NewCore(engine.CoreConfig{Name: "instant", Channels: []engine.Channel{a, b}, Map: m, Chain: 8})
	if err != nil {
		t.Fatal(err)
	}
	r := [2]*dma.Region{{Addr: nearLink, Mem: mmio.FromBytes(alignedBytes(memSize)), Access: rw}, {Addr: farLink, Mem: mmio.FromBytes(alignedBytes(memSize)), Access: rw}}
	return dma.NewMover(dma.MoverConfig{Engine: e, Min: 1}), r, a
}

func TestCoreDoesNotAllocate(t *testing.T) {
	m, r, c := instantMover(t)
	if n := testing.AllocsPerRun(100, func() {
		for i := uint64(0); i < 50; i++ {
			m.Queue(dma.Span{Region: r[1], Off: i * 2048, Len: 1514}, dma.Span{Region: r[0], Off: i * 2048, Len: 1514})
		}
		m.Start()
		m.Wait(m.Landed())
	}); n != 0 || c.n == 0 {
		t.Errorf("%v allocations for 50 copies, %d on the first channel", n, c.n)
	}
}

// BenchmarkCore is the processor's part of one copy by an engine, registers apart, in batches of 32.
func BenchmarkCore(b *testing.B) {
	m, r, _ := instantMover(b)
	i, last := uint64(0), uint64(0)
	for b.Loop() {
		last, _ = m.Queue(dma.Span{Region: r[1], Off: i % 64 * 2048, Len: 1514}, dma.Span{Region: r[0], Off: i % 64 * 2048, Len: 1514})
		if i++; i%32 == 0 {
			m.Wait(last)
		}
	}
}
