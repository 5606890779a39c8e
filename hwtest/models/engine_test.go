//go:build linux

package models_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"math/bits"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/boardlink/boardlink/bench/dmabench"
	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/board/generic"
	"github.com/boardlink/boardlink/board/mpc83xx"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/host"
	"github.com/boardlink/boardlink/hwtest/models"
	dmamodel "github.com/boardlink/boardlink/hwtest/models/dma"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/pci"
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/trial/traffic"
)

// faults decides what goes wrong with the transfers of a modelled engine. It can be changed while they run.
type faults struct {
	every uint64 // atomic: one transfer in so many
	hits  uint64 // atomic
	kind  uint32 // atomic: dmamodel.Fault
}

func (f *faults) set(kind dmamodel.Fault, every uint64) {
	atomic.StoreUint32(&f.kind, uint32(kind))
	atomic.StoreUint64(&f.every, every)
}

func (f *faults) draw(n uint64) dmamodel.Fault {
	if e := atomic.LoadUint64(&f.every); e != 0 && n%e == e-1 {
		atomic.AddUint64(&f.hits, 1)
		return dmamodel.Fault(atomic.LoadUint32(&f.kind))
	}
	return dmamodel.NoFault
}

func engineChip(t testing.TB, o dmamodel.Options) *models.MPC8349 {
	t.Helper()
	c, err := models.NewMPC8349WithDMA(chipMem, chipWindow, chipTarget, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Err(); err != nil {
			t.Error(err)
		}
		if n := c.Stopped(); n != 0 {
			t.Errorf("the engine went %d times where it may not", n)
		}
		c.Close()
	})
	return c
}

// windowAll is all of a chip's window, by the agent's addresses.
var windowAll = []board.WindowPart{{Link: chipTarget, Size: chipWindow}}

const stageAt = dma.Addr(0x7000_0000_0000_0000)

// TestMPC83xxEngine: engines of a board, through its registers: both ways, byte-exact; the outbound window leads to their memory while they
// are open; nothing is left mapped.
func TestMPC83xxEngine(t *testing.T) {
	chip := engineChip(t, dmamodel.Options{Polls: 1})
	f := chip.Function()
	b, err := mpc83xx.New("mpc83xx:model", f, board.Options{}, mpc83xx.Config{NoInterrupts: true, Engine: []int{1, 3}})
	if err != nil {
		t.Fatal(err)
	}
	local := chip.Mem.Local(chipTarget, chipWindow)
	ram, _ := local.RAM()
	win := ram.Bytes()
	region := &dma.Region{Name: "board", Addr: chipTarget, Mem: b.Window().Mem, Access: dma.DeviceRead | dma.DeviceWrite}
	for _, toBoard := range []bool{false, true} {
		e, stage, err := b.Engine(board.EngineConfig{ToBoard: toBoard, Window: windowAll, Size: 1 << 20, Link: stageAt})
		if err != nil {
			t.Fatal(err)
		}
		other, _, err := b.Engine(board.EngineConfig{ToBoard: !toBoard, Window: windowAll, Size: 4096, Link: stageAt + 1<<32})
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := b.Engine(board.EngineConfig{Window: windowAll, Size: 4096, Link: stageAt + 2<<32}); !errors.Is(err, board.ErrNoEngine) {
			t.Errorf("a third engine of two channels: %v", err)
		}
		if maps := f.DMAMaps(); len(maps) != 4 || !f.BusMaster() { // staging memory and descriptors
			t.Errorf("DMA maps %+v, bus mastering %v", maps, f.BusMaster())
		}
		if p := chip.Outbound(0); p == models.OutboundPCI>>12 {
			t.Error("the outbound window leads to where it did")
		}
		sram, ok := stage.RAM()
		if !ok || stage.Len != 1<<20 {
			t.Fatalf("staging memory of %d bytes, RAM %v", stage.Len, ok)
		}
		m := dma.NewMover(dma.MoverConfig{Engine: e, Min: 1})
		rand.Read(win[:1<<20])
		rand.Read(sram.Bytes())
		var batch []dma.Copy
		for off := uint32(0); off < 1<<20; off += 4096 + 512 {
			w, s := dma.Span{Region: region, Off: uint64(off), Len: 1514}, stage.Sub(off, 1514)
			if toBoard {
				batch = append(batch, dma.Copy{Dst: w, Src: s})
			} else {
				batch = append(batch, dma.Copy{Dst: s, Src: w})
			}
		}
		if err := m.Move(batch); err != nil {
			t.Fatal(err)
		}
		for off := 0; off < 1<<20; off += 4096 + 512 {
			if !bytes.Equal(win[off:off+1514], sram.Bytes()[off:off+1514]) {
				t.Fatalf("to board %v: the bytes at %#x differ", toBoard, off)
			}
		}
		if n := m.Stats().Get("engine_copies"); n != uint64(len(batch)) || m.Stats().Get("redone") != 0 {
			t.Errorf("%d of %d copies by the engine, %d done over again", n, len(batch), m.Stats().Get("redone"))
		}
		// What is not its business: the other direction, the window's neighbours, memory that nobody mapped.
		out := dma.Span{Region: &dma.Region{Name: "out", Addr: chipTarget + chipWindow, Mem: region.Mem, Access: region.Access}, Len: 64}
		dst, src := batch[0].Dst.Sub(0, 64), batch[0].Src.Sub(0, 64)
		for _, c := range []dma.Copy{{Dst: src, Src: dst}, {Dst: dst, Src: out}, {Dst: out, Src: src}} {
			if n, err := e.Submit([]dma.Copy{c}); n != 0 || !errors.Is(err, dma.ErrUnreachable) {
				t.Errorf("%#x to %#x: %d, %v", uint64(c.Src.Addr()), uint64(c.Dst.Addr()), n, err)
			}
		}
		if err := m.Close(); err != nil {
			t.Error(err)
		}
		if n := len(f.DMAMaps()); n != 2 {
			t.Errorf("%d DMA maps with one engine left", n)
		}
		if err := other.Close(); err != nil {
			t.Error(err)
		}
		if n := len(f.DMAMaps()); n != 0 || chip.Outbound(0) != models.OutboundPCI>>12 {
			t.Errorf("%d DMA maps left, POTAR %#x", n, chip.Outbound(0))
		}
	}
	// Failures half-way leave nothing behind.
	for _, c := range []board.EngineConfig{
		{Window: windowAll, Size: 1 << 20, Link: chipTarget},                                               // overlaps
		{Window: []board.WindowPart{{Link: 8, Size: 64}, {Link: 16, Size: 64}}, Size: 4096, Link: stageAt}, // overlap
		{Window: []board.WindowPart{{Link: chipTarget + 4, Size: 64}}, Size: 4096, Link: stageAt},          // not aligned alike
		{Window: windowAll, Size: 1 << 41, Link: stageAt}, {Window: windowAll, Size: 0, Link: stageAt},     // too much, nothing
	} {
		if e, _, err := b.Engine(c); err == nil {
			t.Errorf("%+v: accepted", c)
			e.Close()
		}
	}
	if n := len(f.DMAMaps()); n != 0 {
		t.Errorf("%d DMA maps left by engines that did not open", n)
	}
	if err := b.Close(); err != nil || f.BusMaster() {
		t.Errorf("%v, bus mastering %v", err, f.BusMaster())
	}
}

// TestMPC83xxEngineRefused: what is wrong with the arguments, or with the board's outbound window.
func TestMPC83xxEngineRefused(t *testing.T) {
	chip := engineChip(t, dmamodel.Options{})
	for name, c := range map[string]mpc83xx.Config{
		"I/O window": {Engine: []int{0}, Outbound: 1},
		"off":        {Engine: []int{0}, Outbound: 2},
		"no window":  {Engine: []int{0}, Outbound: mpc83xx.POTs},
	} {
		f := chip.Function()
		if _, err := mpc83xx.New("mpc83xx:model", f, board.Options{}, c); !errors.Is(err, board.ErrInput) || !f.Closed() {
			t.Errorf("%s: %v", name, err)
		}
	}
	// A channel that an earlier process left at work is halted.
	chip.DMA.Busy(2)
	b, err := mpc83xx.New("mpc83xx:model", chip.Function(), board.Options{}, mpc83xx.Config{NoInterrupts: true, Engine: []int{2}})
	if err != nil {
		t.Fatal(err)
	}
	b.Close()
	b, err = mpc83xx.New("mpc83xx:model", chip.Function(), board.Options{}, mpc83xx.Config{NoInterrupts: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := b.Engine(board.EngineConfig{Window: windowAll, Size: 4096, Link: stageAt}); !errors.Is(err, board.ErrNoEngine) {
		t.Errorf("without engine=: %v", err)
	}
	b.Close()
	// The loader made the outbound window small: 64 KiB.
	f := chip.Function()
	m, err := f.MapBAR(mpc83xx.BARRegs, mmio.Uncached)
	if err != nil {
		t.Fatal(err)
	}
	pocmr, err := m.Mem(mpc83xx.POT+mpc83xx.POCMR, 4)
	if err != nil {
		t.Fatal(err)
	}
	pocmr.Store32(0, bits.ReverseBytes32(mpc83xx.POCMREnable|0xffff0))
	if b, err = mpc83xx.New("mpc83xx:model", f, board.Options{}, mpc83xx.Config{NoInterrupts: true, Engine: []int{0}}); err != nil {
		t.Fatal(err)
	}
	if _, _, err := b.Engine(board.EngineConfig{Window: windowAll, Size: 1 << 20, Link: stageAt}); err == nil || !strings.Contains(err.Error(), "outbound window") {
		t.Errorf("more than the outbound window: %v", err)
	}
	if n := len(f.DMAMaps()); n != 0 || chip.Outbound(0) != models.OutboundPCI>>12 {
		t.Errorf("%d DMA maps left, POTAR %#x", n, chip.Outbound(0))
	}
	b.Close()
}

// moved sums up a counter of a host's engines.
func moved(l status.Link, name string) uint64 {
	n := uint64(0)
	for _, d := range l.Devices {
		n += d.Counters["dma_"+name]
	}
	return n
}

// push sends checked TCP both ways over device 0, until f is content.
func (r *rig) push(f func() bool) {
	r.t.Helper()
	p := r.pair(0)
	ctx, cancel := context.WithTimeout(r.t.Context(), 40*time.Second)
	defer cancel()
	for first := true; first || !f(); first = false {
		for _, e := range [][2]traffic.Endpoint{{p.Board, p.Host}, {p.Host, p.Board}} {
			tcp, err := traffic.TCP(ctx, e[0], e[1], traffic.TCPConfig{Duration: 100 * time.Millisecond})
			if err != nil || tcp.Corrupt != 0 {
				r.t.Fatalf("TCP to %s: %+v, %v", e[1], tcp, err)
			}
		}
	}
}

// lost compares what an end counted as sent with what the other one counted as arrived: the difference has to be counted as
// dropped.
func (r *rig) lost() {
	r.t.Helper()
	check := func() error {
		h, a := r.host.Status().Devices[0], r.agent.Status().Devices[0]
		for i := range h.Queues {
			if i >= len(a.Queues) {
				break
			}
			hq, aq := h.Queues[i].Pump, a.Queues[i].Pump
			if hq["frames"] != aq["frames"] || hq["bad_header"]+aq["bad_header"]+hq["oversize"]+aq["oversize"] != 0 {
				return fmt.Errorf("queue %s: the host moved %d frames, the agent %d; host %v, agent %v", h.Queues[i].Name, hq["frames"], aq["frames"], hq, aq)
			}
		}
		return nil
	}
	var err error
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if err = check(); err == nil {
			return
		}
	}
	r.t.Error(err)
}

// TestMPC83xxEngineTraffic: the whole path with an engine in it, register by register, and errors in one transfer of a thousand: nothing
// is corrupt, nothing lost. Then the engine fails for good, and is given up.
func TestMPC83xxEngineTraffic(t *testing.T) {
	t.Parallel()
	var f faults
	chip := engineChip(t, dmamodel.Options{Fault: f.draw, Delay: 20 * time.Microsecond})
	f.set(dmamodel.Error, 1000)
	e := &chipEnds{chip: chip, cfg: mpc83xx.Config{Engine: []int{0, 1}}}
	r := start(t, e.openers(), func(r *rig) { r.dma = host.DMAConfig{Mode: host.DMAOn, Min: 64} })
	r.waitUp()
	r.try(0)
	r.push(func() bool { return atomic.LoadUint64(&f.hits) >= 3 })
	r.lost()
	s := r.host.Status()
	t.Logf("%d transfers of %d bytes by the engine, %d copies by the processor, %d failed, %d done over again", moved(s, "engine_copies"), moved(s, "engine_bytes"),
		moved(s, "cpu_copies"), moved(s, "failed"), moved(s, "redone"))
	if hits := atomic.LoadUint64(&f.hits); moved(s, "failed") != hits || moved(s, "redone") < hits || moved(s, "disabled") != 0 {
		t.Errorf("%d errors: %d failures, %d done over again, %d given up", hits, moved(s, "failed"), moved(s, "redone"), moved(s, "disabled"))
	}
	for _, dir := range []string{"rx", "tx"} {
		n := uint64(0)
		for _, q := range s.Devices[0].Queues {
			if strings.HasPrefix(q.Name, dir) {
				n += q.DMA["engine_copies"]
			}
		}
		if n < 100 {
			t.Errorf("%s: %d copies by engines", dir, n)
		}
	}
	f.set(dmamodel.Error, 1)
	r.push(func() bool { return moved(r.host.Status(), "disabled") == 2 })
	r.lost()
	if n := r.host.Status().Devices[0].Counters["starts"]; n != 1 {
		t.Errorf("%d starts of the device", n)
	}
	r.close()
	if n := len(e.f.DMAMaps()); n != 0 {
		t.Errorf("%d DMA maps left", n)
	}
}

// TestMPC83xxEngineRunaway: a channel that cannot be stopped costs the link: bus mastering goes off, nothing stays mapped, and the board is
// not used before a reset; then all is well again.
func TestMPC83xxEngineRunaway(t *testing.T) {
	t.Parallel()
	var f faults
	chip := engineChip(t, dmamodel.Options{Fault: f.draw})
	e := &chipEnds{chip: chip, cfg: mpc83xx.Config{Engine: []int{0, 1}}}
	r := start(t, e.openers(), func(r *rig) { r.dma = host.DMAConfig{Mode: host.DMAOn, Min: 64, Timeout: 50 * time.Millisecond} })
	r.waitUp()
	first := e.f
	f.set(dmamodel.Runaway, 1)
	p := r.pair(0)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	ping, err := traffic.Ping(ctx, p.Host.NS, p.Board.Addr, traffic.PingConfig{Count: 5, Interval: 5 * time.Millisecond, Sizes: []int{1400}})
	t.Logf("ping: %d of %d lost, %v", ping.Lost, ping.Sent, err)
	eventually(t, "function given back", first.Closed)
	if first.BusMaster() || len(first.DMAMaps()) != 0 {
		t.Errorf("bus mastering %v, maps %v", first.BusMaster(), first.DMAMaps())
	}
	eventually(t, "the host waits for a reset", func() bool { return r.host.Status().State == "waiting for the board" })
	time.Sleep(300 * time.Millisecond) // it tries again meanwhile
	if s := r.host.Status(); s.State != "waiting for the board" {
		t.Errorf("%s with a channel at work", s.State)
	}
	f.set(dmamodel.NoFault, 0)
	chip.DMA.Reset()
	r.waitUp()
	r.push(func() bool { return true })
	if moved(r.host.Status(), "disabled") == 0 {
		t.Error("the engine was never given up")
	}
}

// TestMPC83xxEngineEnds: the board is pulled, and the agent replaced, with transfers under way: nothing stays mapped, nothing is written into
// the rings to come.
func TestMPC83xxEngineEnds(t *testing.T) {
	t.Parallel()
	chip := engineChip(t, dmamodel.Options{Delay: 200 * time.Microsecond})
	e := &chipEnds{chip: chip, cfg: mpc83xx.Config{Engine: []int{0, 1}}}
	r := start(t, e.openers(), func(r *rig) { r.dma = host.DMAConfig{Mode: host.DMAOn, Min: 64, Timeout: 100 * time.Millisecond} })
	r.waitUp()
	p := r.pair(0)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := traffic.WaitReachable(ctx, p.Board.NS, p.Host.Addr); err != nil {
		t.Fatal(err)
	}
	udp, err := traffic.StartUDP(ctx, p.Board, p.Host, traffic.UDPConfig{Duration: time.Minute, Size: 1400, Rate: 3000})
	if err != nil {
		t.Fatal(err)
	}
	before := moved(r.host.Status(), "engine_copies")
	eventually(t, "transfers", func() bool { return moved(r.host.Status(), "engine_copies") > before+50 })
	first := e.f
	e.pull()
	eventually(t, "function given back", first.Closed)
	if n := len(first.DMAMaps()); n != 0 {
		t.Errorf("%d DMA maps left", n)
	}
	chip.DMA.Settle()
	e.plug()
	r.waitUp()
	if res, err := udp.Stop(); res.Corrupt != 0 {
		t.Errorf("%+v, %v", res, err)
	}
	r.push(func() bool { return true })
}

// TestGenericEngine: the engines of boards that a description tells of, of all makes: both ways, byte-exact, descriptors where it says.
func TestGenericEngine(t *testing.T) {
	const win, outbound = 1 << 20, 0x4000_0000
	for _, kind := range models.EngineMakes {
		t.Run(kind, func(t *testing.T) {
			mem, err := models.NewMemory(win+4096, 1, 2, 4, 8) // the window, and descriptors behind it
			if err != nil {
				t.Fatal(err)
			}
			defer mem.Close()
			local, _ := mem.Local(0, win+4096).RAM()
			var f *models.Function
			o := dmamodel.Options{Polls: 1, Memory: []dmamodel.Range{{Name: "board", Base: chipTarget, Bytes: local.Bytes()}},
				Resolve: func(addr, n uint64, write bool) ([]byte, bool) {
					need := pci.DMARead
					if write {
						need = pci.DMAWrite
					}
					return f.Burst(dma.Addr(addr-outbound), n, need), true
				}}
			var regs mmio.Bus
			var violations func() error
			if strings.HasPrefix(kind, "fsl") {
				m := dmamodel.NewFSL(kind == "fsl85xx", o)
				regs, violations = m, m.Err
			} else {
				m := dmamodel.NewDW(kind == "dw-hdma", 2, 2, o)
				regs, violations = m, m.Err
			}
			c := &generic.Config{Host: &generic.Host{
				Window: generic.Window{Place: generic.Place{BAR: 2}, Size: win, BusAddress: chipTarget},
				Engine: &generic.Engine{Kind: kind, ToHost: []int{0, 1}, ToBoard: []int{0, 1}, BusOffset: outbound, HighestAddress: 0x3fff_ffff}}}
			if kind != "fsl83xx" { // which has them in the carrier's memory
				c.Host.Engine.Descriptors = &generic.Descriptors{Place: generic.Place{BAR: 2, Offset: win}, Size: 4096, BusAddress: chipTarget + win}
			}
			if err := c.Validate(); err != nil {
				t.Fatal(err)
			}
			f = models.NewFunction(models.FunctionConfig{Vendor: 1, Device: 2, BARs: []models.BARConfig{
				{Index: 0, Size: 0x2000, Bus: regs}, {Index: 2, Size: win + 4096, Bus: mem}}})
			b, err := generic.New("generic:model", f, c, board.Options{}, true)
			if err != nil {
				t.Fatal(err)
			}
			defer b.Close()
			target, err := dmabench.Board(b, 0, 0)
			if err != nil {
				t.Fatal(err)
			}
			r, err := dmabench.Run(t.Context(), target, dmabench.Config{Sizes: []int{64, 4096, 64 << 10}, InFlight: []int{1, 8}, Duration: 100 * time.Microsecond})
			if err != nil || r.Corrupt != 0 {
				t.Errorf("%d corrupt, %v", r.Corrupt, err)
			}
			engines := map[dmabench.Direction]int{}
			for _, p := range r.Points {
				if strings.HasPrefix(p.Variant, "fsl ") || strings.HasPrefix(p.Variant, "dw ") {
					engines[p.Direction]++
				}
			}
			if len(engines) != 2 || engines[dmabench.HostToBoard] < 10 || engines[dmabench.BoardToHost] < 10 {
				t.Errorf("measured engines: %v; skipped %v", engines, r.Skipped)
			}
			if err := target.Close(); err != nil {
				t.Error(err)
			}
			if n := len(f.DMAMaps()); n != 0 {
				t.Errorf("%d DMA maps left", n)
			}
			for _, err := range []error{violations(), mem.Err()} {
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
}
