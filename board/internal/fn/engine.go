package fn

import (
	"errors"
	"fmt"
	"sync"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/dma/engine"
	"github.com/boardlink/boardlink/dma/engine/dwedma"
	"github.com/boardlink/boardlink/dma/engine/fsl"
	"github.com/boardlink/boardlink/dma/engine/pool"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/pci"
)

// EngineMake is a make of DMA controller.
type EngineMake string

// The makes.
const (
	FSL83xx EngineMake = "fsl83xx"
	FSL85xx EngineMake = "fsl85xx"
	DWeDMA  EngineMake = "dw-edma"
	DWHDMA  EngineMake = "dw-hdma"
)

// EngineConfig describes the DMA controller of a function.
type EngineConfig struct {
	Spec string // of the board, for messages
	F    pci.Function
	Make EngineMake
	Regs mmio.Mem
	// ToHost and ToBoard are the channels for each direction. A channel may stand in both where it can go both ways; nobody
	// else may use them.
	ToHost, ToBoard []int
	// WindowBus is the board's own address of the window's first byte.
	WindowBus uint64
	// Far returns the board's address of size bytes of host memory at bus address bus.
	Far func(bus, size uint64) (uint64, error)
	// Idle, if set, is called when the last engine was closed.
	Idle func()
	// Mask is the highest bus address of the host's that the controller reaches; 0: any.
	Mask uint64
	// Desc is memory for descriptors on the board's side, DescBus its address there; of size 0: they lie in memory of the host.
	Desc    mmio.Mem
	DescBus uint64
}

// Engines gives out a function's DMA controller, channel by channel. It implements the better part of board.Engined and
// board.Vanishing for boards that have it.
type Engines struct {
	c     EngineConfig
	place map[int]uint64 // of a channel's descriptors in Desc, by key

	mu   sync.Mutex
	used map[int]bool // by key
	wild error        // an engine could not be stopped
}

// chainRoom is what the descriptors of one channel take, in bytes, for all makes: 17 elements of 24 bytes, or 16 of 32.
const chainRoom = 512

// NewEngines makes sure that no channel is at work: what an earlier process left running would write into this one's
// buffers. It fails with board.ErrAbsent where one cannot be stopped, since only a reset helps then.
func NewEngines(c EngineConfig) (*Engines, error) {
	e := &Engines{c: c, used: map[int]bool{}, place: map[int]uint64{}}
	for _, toBoard := range []bool{false, true} {
		for _, ch := range e.channels(toBoard) {
			if _, ok := e.place[e.key(ch, toBoard)]; !ok {
				e.place[e.key(ch, toBoard)] = uint64(len(e.place))
			}
		}
	}
	if n, need := c.Desc.Size(), uint64(len(e.place))*chainRoom; n != 0 && n < need {
		return nil, fmt.Errorf("%s: %#x bytes for DMA descriptors: %d channels take %#x", c.Spec, n, len(e.place), need)
	}
	// An engine that is opened halts its channel first.
	none, err := engine.NewMap(0)
	if err != nil {
		return nil, err
	}
	idle := mmio.FromBytes(make([]byte, chainRoom))
	for _, toBoard := range []bool{false, true} {
		for _, ch := range e.channels(toBoard) {
			d, err := e.open(ch, toBoard, none, idle, 0)
			if err == nil {
				err = d.Close()
			}
			if errors.Is(err, dma.ErrRunaway) {
				return nil, &board.Error{Spec: c.Spec, Reason: "its DMA engine is at work and cannot be stopped: reset the board", Class: board.ErrAbsent, Err: err}
			}
			if err != nil {
				return nil, fmt.Errorf("%s: DMA engine: %w", c.Spec, err)
			}
		}
	}
	return e, nil
}

func (e *Engines) channels(toBoard bool) []int {
	if toBoard {
		return e.c.ToBoard
	}
	return e.c.ToHost
}

// key tells channels apart: DesignWare counts those of each direction from 0.
func (e *Engines) key(ch int, toBoard bool) int {
	if toBoard && (e.c.Make == DWeDMA || e.c.Make == DWHDMA) {
		return ch + dwedma.MaxChannels
	}
	return ch
}

// open opens one channel.
func (e *Engines) open(ch int, toBoard bool, m *engine.Map, desc mmio.Mem, descBus uint64) (dma.Engine, error) {
	switch e.c.Make {
	case FSL83xx, FSL85xx:
		chip := fsl.MPC83xx
		if e.c.Make == FSL85xx {
			chip = fsl.MPC85xx
		}
		return fsl.New(fsl.Config{Chip: chip, Regs: e.c.Regs, Channels: []int{ch}, Desc: desc, DescBus: descBus, Map: m})
	case DWeDMA, DWHDMA:
		c := dwedma.Config{Kind: dwedma.EDMA, Regs: e.c.Regs, List: desc, ListBus: descBus, Map: m}
		if e.c.Make == DWHDMA {
			c.Kind = dwedma.HDMA
		}
		if toBoard {
			c.Read = []int{ch}
		} else {
			c.Write = []int{ch}
		}
		return dwedma.New(c)
	}
	return nil, fmt.Errorf("a DMA engine %q is not known", string(e.c.Make))
}

// take takes a free channel.
func (e *Engines) take(toBoard bool) (ch int, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.wild != nil {
		return 0, e.wild
	}
	for _, ch := range e.channels(toBoard) {
		if k := e.key(ch, toBoard); !e.used[k] {
			e.used[k] = true
			return ch, nil
		}
	}
	return 0, fmt.Errorf("%s: %w", e.c.Spec, board.ErrNoEngine)
}

// give gives a channel back; why is set where it runs away.
func (e *Engines) give(key int, why error) {
	e.mu.Lock()
	delete(e.used, key)
	if e.wild == nil {
		e.wild = why
	}
	last := len(e.used) == 0
	e.mu.Unlock()
	if last && e.c.Idle != nil {
		// A board that is gone has nothing to be put back.
		_ = pci.Guard(e.c.Idle)
	}
}

// Gone makes Base.GoneF of the one that there was: a board whose engine runs away is lost until it stands still.
func (e *Engines) Gone(next func() error) func() error {
	return func() error {
		e.mu.Lock()
		wild := e.wild
		e.mu.Unlock()
		if wild != nil {
			return &board.Error{Spec: e.c.Spec, Reason: "its DMA engine cannot be stopped", Class: board.ErrAbsent, Err: wild}
		}
		if next == nil {
			return nil
		}
		return next()
	}
}

// held is an opened engine with what has to go when it is closed.
type held struct {
	dma.Engine
	e     *Engines
	key   int
	pools []*pool.Pool
	once  sync.Once
	err   error
}

// Engine implements board.Engined.
func (e *Engines) Engine(c board.EngineConfig) (dma.Engine, dma.Span, error) {
	ch, err := e.take(c.ToBoard)
	if err != nil {
		return nil, dma.Span{}, err
	}
	h := &held{e: e, key: e.key(ch, c.ToBoard)}
	var s dma.Span
	if fault := pci.Guard(func() { s, err = h.open(ch, c) }); fault != nil {
		err = fault
	}
	if err != nil {
		if cerr := h.Close(); cerr != nil {
			err = fmt.Errorf("%w; and %v", err, cerr)
		}
		return nil, dma.Span{}, fmt.Errorf("%s: DMA engine: %w", e.c.Spec, err)
	}
	return h, s, nil
}

// pool makes memory that the function may access so, and returns its address on the board.
func (h *held) pool(name string, size uint64, link dma.Addr, access pci.DMAAccess) (*pool.Pool, uint64, error) {
	f := h.e.c.F
	p, err := pool.New(pool.Config{Name: name, Size: size, Link: link, Mask: h.e.c.Mask,
		Map:   func(m mmio.RAM) (dma.Addr, error) { return f.MapDMA(m, access) },
		Unmap: f.UnmapDMA})
	if err != nil {
		return nil, 0, err
	}
	h.pools = append(h.pools, p)
	at, err := h.e.c.Far(p.Bus(), p.Region().Mem.Size())
	return p, at, err
}

func (h *held) open(ch int, c board.EngineConfig) (dma.Span, error) {
	e := h.e
	bus, near, far := pci.DMAWrite, dma.DeviceRead, dma.DeviceWrite
	if c.ToBoard {
		bus, near, far = pci.DMARead, dma.DeviceWrite, dma.DeviceRead
	}
	p, at, err := h.pool("staging", c.Size, c.Link, bus)
	if err != nil {
		return dma.Span{}, err
	}
	ws := []engine.Window{{Name: "staging", Link: c.Link, Size: p.Region().Mem.Size(), Bus: at, Side: engine.Far, Access: far}}
	for _, w := range c.Window {
		ws = append(ws, engine.Window{Name: "board", Link: w.Link, Size: w.Size, Bus: e.c.WindowBus + w.Offset, Side: engine.Near, Access: near})
	}
	m, err := engine.NewMap(0, ws...)
	if err != nil {
		return dma.Span{}, err
	}
	desc, descBus := e.c.Desc, e.c.DescBus
	if desc.Size() != 0 {
		off := e.place[h.key] * chainRoom
		descBus += off
		if desc, err = desc.Slice(off, chainRoom); err != nil {
			return dma.Span{}, err
		}
	} else {
		d, at, err := h.pool("descriptors", chainRoom, 0, pci.DMARead)
		if err != nil {
			return dma.Span{}, err
		}
		desc, descBus = d.Region().Mem, at
	}
	if err := e.c.F.SetBusMaster(true); err != nil {
		return dma.Span{}, err
	}
	if h.Engine, err = e.open(ch, c.ToBoard, m, desc, descBus); err != nil {
		return dma.Span{}, err
	}
	return p.Take(uint32(c.Size), 64)
}

// Close implements dma.Engine. First the engine stands still, or may not use the bus any more; then its memory is taken
// away from it.
func (h *held) Close() error {
	h.once.Do(func() {
		var wild error
		if h.Engine != nil {
			fault := pci.Guard(func() { h.err = h.Engine.Close() })
			if fault != nil {
				h.err = fault
			}
			if errors.Is(h.err, dma.ErrRunaway) {
				wild = h.err
			}
			if wild != nil || fault != nil { // whose registers cannot be reached was not told to stand still
				_ = h.e.c.F.SetBusMaster(false) // fails on a function that is gone, which is as good
			}
		}
		for _, p := range h.pools {
			if err := p.Close(); err != nil && h.err == nil {
				h.err = err
			}
		}
		h.e.give(h.key, wild)
	})
	return h.err
}
