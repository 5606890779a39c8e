//go:build linux

package models

import (
	"fmt"
	"sync"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/board/loopback"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/dma/engine"
	"github.com/boardlink/boardlink/dma/engine/dwedma"
	"github.com/boardlink/boardlink/dma/engine/fsl"
	"github.com/boardlink/boardlink/dma/engine/pool"
	dmamodel "github.com/boardlink/boardlink/hwtest/models/dma"
	"github.com/boardlink/boardlink/mmio"
)

// EngineMakes are the makes of DMA controllers that a loopback board can have here.
var EngineMakes = []string{"fsl83xx", "fsl85xx", "dw-edma", "dw-hdma"}

// controller is what the models of DMA controllers have in common.
type controller interface {
	Err() error
	Counts() (transfers, bytes, chains uint64)
	Settle()
}

// Where the controller of an Engined has its memories.
const (
	engNear = 0x1000_0000 // the window
	engDesc = 0x6000_0000 // memory for descriptors, on the board's side
	engFar  = 0x8000_0000 // staging memories, engStep apart
	engStep = 0x0100_0000
	engMax  = 8 // channels in all
	// engDescs is how many bytes of descriptors a channel has.
	engDescs = 1024
)

// Engined is the host's end of a loopback board with a modelled DMA controller in it, which moves real bytes between the shared memory and the
// host's. The window is seen as uncached device memory, and there is no pool. The controller reaches what the engines that are open may
// reach; everything else that it touches, at any time, is a violation.
type Engined struct {
	*loopback.Board
	win  dma.Region
	make string
	c    controller
	fsl  *dmamodel.FSL
	dw   *dmamodel.DW
	desc []byte

	mu   sync.Mutex
	used [engMax]bool
	mem  [engMax][]byte // staging memory
	near [engMax][]board.WindowPart
}

var _ board.Engined = (*Engined)(nil)

// NewEngined gives the host's end b, opened as cached memory, a controller of the given make that fails as o says; o has no memory. It owns b.
func NewEngined(b *loopback.Board, kind string, o dmamodel.Options) (*Engined, error) {
	w := b.Window()
	ram, ok := w.Mem.RAM()
	if !ok {
		b.Close()
		return nil, fmt.Errorf("models: the window of %s is no RAM", b)
	}
	e := &Engined{Board: b, win: w, make: kind, desc: make([]byte, engMax*engDescs)}
	e.win.Mem = mmio.NewMem(ram.Pointer(0), ram.Size(), mmio.Uncached)
	o.Resolve = e.resolve
	switch kind {
	case "fsl83xx", "fsl85xx":
		e.fsl = dmamodel.NewFSL(kind == "fsl85xx", o)
		e.c = e.fsl
	case "dw-edma", "dw-hdma":
		e.dw = dmamodel.NewDW(kind == "dw-hdma", engMax/2, engMax/2, o)
		e.c = e.dw
	default:
		b.Close()
		return nil, fmt.Errorf("models: no DMA controller %q", kind)
	}
	return e, nil
}

// Window implements board.Board.
func (e *Engined) Window() dma.Region { return e.win }

// Pool implements board.Pooled: there is none.
func (e *Engined) Pool() (dma.Region, bool) { return dma.Region{}, false }

// Controller returns violations and counters of the controller.
func (e *Engined) Controller() interface {
	Err() error
	Counts() (transfers, bytes, chains uint64)
	Settle()
} {
	return e.c
}

// resolve is what the controller finds at an address.
func (e *Engined) resolve(addr, n uint64, write bool) (b []byte, far bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if off := addr - engDesc; off < uint64(len(e.desc)) && n <= uint64(len(e.desc))-off {
		return e.desc[off : off+n], false
	}
	for i := range e.used {
		if !e.used[i] {
			continue
		}
		if off := addr - engFar - uint64(i)*engStep; off < uint64(len(e.mem[i])) && n <= uint64(len(e.mem[i]))-off {
			return e.mem[i][off : off+n], true
		}
		for _, p := range e.near[i] {
			if off := addr - engNear - p.Offset; off < p.Size && n <= p.Size-off {
				w := e.Board.Window()
				r, _ := w.Mem.RAM()
				at := addr - engNear
				return r.Bytes()[at : at+n], false
			}
		}
	}
	return nil, false
}

// channel takes a free channel: of 4 for both directions (fsl), or for each (dw).
func (e *Engined) channel(toBoard bool) (int, error) {
	first, n := 0, engMax/2
	if e.dw != nil && toBoard {
		first = engMax / 2
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	for i := first; i < first+n; i++ {
		if !e.used[i] {
			e.used[i] = true
			return i, nil
		}
	}
	return 0, fmt.Errorf("models: %w", board.ErrNoEngine)
}

// engined is an open engine.
type engined struct {
	dma.Engine
	e    *Engined
	i    int
	pool *pool.Pool
	once sync.Once
	err  error
}

// Engine implements board.Engined.
func (e *Engined) Engine(c board.EngineConfig) (dma.Engine, dma.Span, error) {
	i, err := e.channel(c.ToBoard)
	if err != nil {
		return nil, dma.Span{}, err
	}
	h := &engined{e: e, i: i}
	s, err := h.open(c)
	if err != nil {
		h.Close()
		return nil, dma.Span{}, err
	}
	return h, s, nil
}

func (h *engined) open(c board.EngineConfig) (s dma.Span, err error) {
	e := h.e
	if h.pool, err = pool.New(pool.Config{Name: "staging", Size: c.Size, Link: c.Link}); err != nil {
		return s, err
	}
	ram, _ := h.pool.Region().Mem.RAM()
	e.mu.Lock()
	e.mem[h.i], e.near[h.i] = ram.Bytes(), append([]board.WindowPart(nil), c.Window...)
	e.mu.Unlock()
	ws := []engine.Window{{Name: "staging", Link: c.Link, Size: uint64(ram.Size()), Bus: engFar + uint64(h.i)*engStep, Side: engine.Far, Access: dma.DeviceRead | dma.DeviceWrite}}
	for _, p := range c.Window {
		ws = append(ws, engine.Window{Name: "board", Link: p.Link, Size: p.Size, Bus: engNear + p.Offset, Access: dma.DeviceRead | dma.DeviceWrite})
	}
	m, err := engine.NewMap(0, ws...)
	if err != nil {
		return s, err
	}
	desc, err := mmio.FromBytes(e.desc).Slice(uint64(h.i)*engDescs, engDescs)
	if err != nil {
		return s, err
	}
	bus := uint64(engDesc + h.i*engDescs)
	if e.fsl != nil {
		chip := fsl.MPC83xx
		if e.make == "fsl85xx" {
			chip = fsl.MPC85xx
		}
		h.Engine, err = fsl.New(fsl.Config{Chip: chip, Regs: e.fsl.Mem(), Channels: []int{h.i}, Desc: desc, DescBus: bus, Map: m})
	} else {
		d := dwedma.Config{Kind: dwedma.EDMA, Regs: e.dw.Mem(), List: desc, ListBus: bus, Map: m}
		if e.make == "dw-hdma" {
			d.Kind = dwedma.HDMA
		}
		if n := h.i % (engMax / 2); c.ToBoard {
			d.Read = []int{n}
		} else {
			d.Write = []int{n}
		}
		h.Engine, err = dwedma.New(d)
	}
	if err != nil {
		return s, err
	}
	return h.pool.Take(uint32(c.Size), 64)
}

// Close implements dma.Engine: from here on the controller reaches nothing by it.
func (h *engined) Close() error {
	h.once.Do(func() {
		if h.Engine != nil {
			h.err = h.Engine.Close()
		}
		h.e.mu.Lock()
		h.e.mem[h.i], h.e.near[h.i], h.e.used[h.i] = nil, nil, false
		h.e.mu.Unlock()
		if h.pool != nil {
			if err := h.pool.Close(); err != nil && h.err == nil {
				h.err = err
			}
		}
	})
	return h.err
}
