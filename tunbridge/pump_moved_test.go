package tunbridge_test

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/dma/engine"
	"github.com/boardlink/boardlink/dma/engine/dwedma"
	"github.com/boardlink/boardlink/dma/engine/fsl"
	"github.com/boardlink/boardlink/hwtest/models/dma"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/trial/traffic"
	"github.com/boardlink/boardlink/tunbridge"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// engines makes the movers of a rig: an engine for each direction over one modelled controller on the board.
type engines struct {
	t      testing.TB
	chip   string
	min    uint32
	limit  int
	fault  func(n uint64) dmamodel.Fault
	time   time.Duration
	model  interface{ Err() error }
	regs   mmio.Mem
	maps   *engine.Map
	desc   mmio.Mem
	stage  []byte
	movers [2]*dma.Mover
	logs   []string
	mu     sync.Mutex
}

const (
	boardBus  = 0x1000_0000
	descBus   = 0x7000_0000
	stageBus  = 0x4000_0000
	stageLink = dma.Addr(0x90_0000_0000)
	stageSize = 2 << 20
)

func (e *engines) mover(q int, board mmio.Mem) (*dma.Mover, dma.Span) {
	t := e.t
	ram, _ := board.RAM()
	if e.model == nil {
		var err error
		if e.stage, err = unix.Mmap(-1, 0, 2*stageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS); err != nil {
			t.Fatal(err)
		}
		desc := make([]byte, 64<<10)
		e.desc = mmio.FromBytes(desc)
		o := dmamodel.Options{Fault: e.fault, Polls: 1, Memory: []dmamodel.Range{
			{Name: "board", Base: boardBus, Bytes: ram.Bytes()},
			{Name: "lists", Base: descBus, Bytes: desc},
			{Name: "staging", Base: stageBus, Bytes: e.stage, Far: true},
		}}
		if strings.HasPrefix(e.chip, "fsl") {
			m := dmamodel.NewFSL(e.chip == "fsl 85xx", o)
			e.model, e.regs = m, m.Mem()
		} else {
			m := dmamodel.NewDW(e.chip == "hdma", 2, 2, o)
			e.model, e.regs = m, m.Mem()
		}
		e.maps, err = engine.NewMap(0,
			engine.Window{Name: "board", Link: 0x8000_0000, Size: board.Size(), Bus: boardBus, Side: engine.Near, Access: dma.DeviceRead | dma.DeviceWrite},
			engine.Window{Name: "staging", Link: stageLink, Size: 2 * stageSize, Bus: stageBus, Side: engine.Far, Access: dma.DeviceRead | dma.DeviceWrite})
		if err != nil {
			t.Fatal(err)
		}
	}
	desc, err := e.desc.Slice(uint64(q)*32<<10, 32<<10)
	if err != nil {
		t.Fatal(err)
	}
	bus := uint64(descBus + q*32<<10)
	var eng dma.Engine
	switch {
	case strings.HasPrefix(e.chip, "fsl"):
		chip := fsl.MPC83xx
		if e.chip == "fsl 85xx" {
			chip = fsl.MPC85xx
		}
		eng, err = fsl.New(fsl.Config{Chip: chip, Regs: e.regs, Channels: []int{2 * q, 2*q + 1}, Desc: desc, DescBus: bus, Map: e.maps})
	default:
		c := dwedma.Config{Regs: e.regs, List: desc, ListBus: bus, Map: e.maps}
		if e.chip == "hdma" {
			c.Kind = dwedma.HDMA
		}
		if q == 0 {
			c.Read = []int{0, 1} // frames for the board
		} else {
			c.Write = []int{0, 1}
		}
		eng, err = dwedma.New(c)
	}
	if err != nil {
		t.Fatal(err)
	}
	e.movers[q] = dma.NewMover(dma.MoverConfig{Engine: eng, Min: e.min, Timeout: e.time, MaxFailures: e.limit, Logf: func(f string, a ...any) {
		e.mu.Lock()
		defer e.mu.Unlock()
		e.logs = append(e.logs, fmt.Sprintf(f, a...))
	}})
	stage := &dma.Region{Name: "staging", Addr: stageLink, Mem: mmio.FromBytes(e.stage), Access: dma.DeviceRead | dma.DeviceWrite}
	return e.movers[q], dma.Span{Region: stage, Off: uint64(q) * stageSize, Len: stageSize}
}

func (e *engines) sum(name string) uint64 {
	return e.movers[0].Stats().Get(name) + e.movers[1].Stats().Get(name)
}

// close is for when the pumps have ended.
func (e *engines) close() {
	for _, m := range e.movers {
		if err := m.Close(); err != nil {
			e.t.Error(err)
		}
	}
	if err := e.model.Err(); err != nil {
		e.t.Error(err)
	}
	unix.Munmap(e.stage)
}

func oneIn(n uint64, f dmamodel.Fault) func(uint64) dmamodel.Fault {
	return func(i uint64) dmamodel.Fault {
		if i%n == n/2 {
			return f
		}
		return dmamodel.NoFault
	}
}

// TestMovedPumps: real traffic over pumps whose payload a modelled controller moves, with failures in between: nothing is lost,
// nothing is corrupt, and what failed is counted.
func TestMovedPumps(t *testing.T) {
	t.Cleanup(func() { goleak.VerifyNone(t) }) // after all that run at the same time: most of their time is waiting
	base := rigConfig{typ: tunbridge.TAP, offload: true, mtu: 1500, merge: true, eventIdx: true, indirect: true, rxBuffer: 16 << 10, kind: mmio.Uncached, account: true}
	for name, c := range map[string]struct {
		e    *engines
		with func(*rigConfig)
	}{
		"fsl 83xx":                       {&engines{chip: "fsl 83xx", min: 256}, nil},
		"fsl 85xx, all by the engine":    {&engines{chip: "fsl 85xx", min: 1}, func(c *rigConfig) { c.offload = false }},
		"edma, one in a thousand fails":  {&engines{chip: "edma", min: 64, fault: oneIn(1000, dmamodel.Error)}, nil},
		"hdma, one in a thousand fails":  {&engines{chip: "hdma", min: 1, fault: oneIn(1000, dmamodel.Error)}, func(c *rigConfig) { c.mtu, c.offload = 9000, false }},
		"fsl 83xx, one in a thousand":    {&engines{chip: "fsl 83xx", min: 64, fault: oneIn(1000, dmamodel.Error)}, func(c *rigConfig) { c.rxBuffer = 2048 }},
		"fsl 83xx, some are stuck":       {&engines{chip: "fsl 83xx", min: 64, time: 10 * time.Millisecond, fault: oneIn(5000, dmamodel.Stuck)}, nil},
		"edma, cached memory, no merge":  {&engines{chip: "edma", min: 1}, func(c *rigConfig) { c.kind, c.account, c.merge = mmio.Cached, false, false }},
		"hdma, all fail: it is given up": {&engines{chip: "hdma", min: 1, limit: 4, fault: oneIn(1, dmamodel.Error)}, nil},
		"tun, write-combining":           {&engines{chip: "edma", min: 128}, func(c *rigConfig) { c.typ, c.kind = tunbridge.TUN, mmio.WriteCombining }},
		"tiny queue":                     {&engines{chip: "fsl 83xx", min: 1}, func(c *rigConfig) { c.queue = 8 }},
	} {
		if testing.Short() && name != "edma, one in a thousand fails" && name != "fsl 83xx, some are stuck" {
			continue
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e := c.e
			e.t = t
			cfg := base
			if c.with != nil {
				c.with(&cfg)
			}
			cfg.mover = e.mover
			t.Cleanup(func() {
				if e.movers[1] != nil {
					e.close()
				}
			})
			r := newRig(t, cfg)
			ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
			defer cancel()
			res, err := traffic.Run(ctx, r.pairs(), traffic.RunConfig{Duration: 60 * time.Millisecond, Ping: traffic.PingConfig{Count: 30, Interval: time.Millisecond}})
			if err != nil {
				t.Fatal(err)
			}
			if !res.OK() {
				t.Errorf("ping sent %d lost %d, corrupt %d", res.Ping.Sent, res.Ping.Lost, res.Corrupt)
			}
			t.Logf("tcp %.2f/%.2f Gbit/s; by the engine %d (%d MB), by the processor %d (%d MB); failed %d, timeouts %d, redone %d", res.TCPGbps.BoardToHost, res.TCPGbps.HostToBoard,
				e.sum("engine_copies"), e.sum("engine_bytes")>>20, e.sum("cpu_copies"), e.sum("cpu_bytes")>>20, e.sum("failed"), e.sum("timeouts"), e.sum("redone"))
			for i, s := range r.stats {
				m := counters(s)
				if m["frames"] == 0 || m["bad_header"]+m["oversize"] != 0 {
					t.Errorf("pump %d: %v", i, m)
				}
				if i < 2 && m["staged"] == 0 {
					t.Errorf("pump %d did not use the staging memory: %v", i, m)
				}
			}
			all := e.limit != 0
			if all != (e.sum("disabled") == 2) || all == (e.sum("engine_copies") > 0) {
				t.Errorf("given up %d times, %d copies by the engine; log %q", e.sum("disabled"), e.sum("engine_copies"), e.logs)
			}
			switch {
			case all && (e.sum("failed") < 8 || e.sum("failed") > 16 || e.sum("cpu_copies") == 0):
				t.Errorf("%d failed, %d by the processor", e.sum("failed"), e.sum("cpu_copies"))
			case e.fault == nil && e.sum("redone") != 0:
				t.Errorf("%d done over again", e.sum("redone"))
			case e.fault != nil && e.sum("failed")+e.sum("timeouts") == 0:
				t.Error("nothing failed: the test shows nothing")
			}
		})
	}
}
