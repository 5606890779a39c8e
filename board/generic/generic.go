// Package generic is boards that a file describes: which BAR is the window, what to write where to ring the board,
// how it rings us. A user adds a board without writing Go; docs/boards.md has an example with each key.
//
// The carrier opens "generic:FILE@0000:01:00.0", the board "generic:FILE".
//
// In the room: the description (Config), how its file is read and checked, the board made of it. Never in it: registers of any
// one board.
package generic

import (
	"fmt"
	"math/bits"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/board/internal/fn"
	"github.com/boardlink/boardlink/board/internal/local"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/pci"
)

// Name is the kind's name in a board spec.
const Name = "generic"

// maxFile limits what is read for a description, in bytes.
const maxFile = 1 << 20

func init() {
	board.Register(board.Kind{
		Name: Name,
		Help: "host: FILE@ADDRESS of a PCI function[,mode=vfio|noiommu|uio|sysfs][,interrupts=off]; agent: FILE (docs/boards.md)",
		Open: func(arg string, o board.Options) (board.Board, error) {
			b, err := Open(arg, o)
			if err != nil {
				return nil, err
			}
			return b, nil
		},
		Examine: func(arg string, o board.Options) []error {
			a, _, _, err := parseHost(arg)
			if err != nil {
				return []error{err}
			}
			return a.Examine(o)
		},
	})
}

// Board is an end of a link over a described board.
type Board struct {
	fn.Base
	demux   *fn.Demux
	engines *fn.Engines // nil: none
}

var _ board.Engined = (*Board)(nil)

// Demux returns what takes the doorbells' interrupt, for its counters; nil where there is no cause register.
func (b *Board) Demux() *fn.Demux { return b.demux }

// New makes the host's end of an opened function, which it owns from then on, also where it fails. c must
// be valid. noInterrupts makes this side poll.
func New(spec string, f pci.Function, c *Config, o board.Options, noInterrupts bool) (*Board, error) {
	b := &Board{}
	b.Spec, b.Fn, b.EventC, b.GoneF = spec, f, f.Events(), f.Gone
	b.OnClose(f.Close)
	var err error
	if ferr := pci.Guard(func() { err = b.openHost(f, c, o, noInterrupts) }); ferr != nil {
		err = ferr
	}
	if err != nil {
		b.Close()
		return nil, fn.Wrap(spec, "cannot be used", err)
	}
	fn.Warn(spec, f, o)
	return b, nil
}

func (b *Board) bad(class error, format string, args ...interface{}) error {
	return &board.Error{Spec: b.Spec, Reason: fmt.Sprintf(format, args...), Class: class}
}

// find returns n bytes at a place; n 0 means the rest.
type find func(key string, p Place, n uint64, want mmio.Kind) (mmio.Mem, error)

func (b *Board) openHost(f pci.Function, c *Config, o board.Options, noInterrupts bool) error {
	h := c.Host
	if err := c.identify(b.Spec, f.Info()); err != nil {
		return err
	}
	at := func(key string, p Place, n uint64, want mmio.Kind) (mmio.Mem, error) {
		m, err := f.MapBAR(p.BAR, want)
		if err != nil {
			return mmio.Mem{}, fn.Wrap(b.Spec, "host."+key, err)
		}
		if n == 0 {
			if p.Offset >= m.BAR.Size {
				return mmio.Mem{}, b.bad(board.ErrInput, "host.%s.offset: %#x lies behind BAR %d of %#x bytes", key, p.Offset, p.BAR, m.BAR.Size)
			}
			n = m.BAR.Size - p.Offset
		}
		mem, err := m.Mem(p.Offset, n)
		if err != nil {
			return mmio.Mem{}, b.bad(board.ErrInput, "host.%s: %v", key, err)
		}
		return mem, nil
	}
	want, _ := h.Window.kind(true)
	if o.Kind != nil {
		if want = *o.Kind; want == mmio.Cached {
			return b.bad(board.ErrInput, "BAR %d is device memory: it cannot be seen as cached; uncached or write-combining", h.Window.BAR)
		}
	}
	mem, err := at("window", h.Window.Place, h.Window.Size, want)
	if err != nil {
		return err
	}
	if err := h.checkWindow(b.Spec, mem.Size()); err != nil {
		return err
	}
	min, max := h.Window.access()
	mem = limit(mem, min, max)
	b.Win = dma.Region{Name: "board", Addr: dma.Addr(h.Window.BusAddress), Mem: mem, Access: dma.DeviceRead | dma.DeviceWrite,
		Across: true, Account: o.Account}
	if err := b.openRing(h.Ring, at); err != nil {
		return err
	}
	if p := h.Pool; p != nil {
		if err := b.openPool(f, p); err != nil {
			return err
		}
	}
	if e := h.Engine; e != nil {
		if err := b.openEngine(f, c, at); err != nil {
			return err
		}
	}
	if noInterrupts || h.Interrupt == nil {
		return nil
	}
	irq := f.Interrupts()
	wish := interruptKinds[h.Interrupt.Kind]
	if irq.Count == 0 && wish != pci.NoInterrupts && f.Mode() != pci.SysfsOnly {
		return b.bad(board.ErrInput, "host.interrupt.kind: in mode %s the function has no %s (\"any\" takes what it has, interrupts=off does without)", f.Mode(), wish)
	}
	if irq.Count == 0 {
		if o.Logf != nil {
			o.Logf("%s: no interrupts in mode %s: this side polls", b.Spec, f.Mode())
		}
		return nil
	}
	if wish != pci.NoInterrupts && wish != irq.Kind {
		return b.bad(board.ErrInput, "host.interrupt.kind: in mode %s the function interrupts by %s", f.Mode(), irq.Kind)
	}
	if irq.Kind == pci.INTx && h.Interrupt.Cause == nil {
		return b.bad(board.ErrInput, "host.interrupt.cause is missing: in mode %s the function interrupts by INTx, which goes on until its cause is cleared", f.Mode())
	}
	n := 1
	if h.Interrupt.Cause == nil {
		if n = irq.Count; n > maxVectors {
			n = maxVectors
		}
		if v := int(h.Interrupt.Vectors); v != 0 && v < n {
			n = v
		}
	}
	ws, err := f.EnableInterrupts(n)
	if err != nil {
		return fn.Wrap(b.Spec, "its interrupts cannot be had (interrupts=off does without)", err)
	}
	if h.Interrupt.Cause != nil {
		return b.listen(ws[0], h.Interrupt, at, o)
	}
	for _, w := range ws {
		b.Waiters = append(b.Waiters, w)
	}
	return nil
}

// openRing finds the registers that ring the other side.
func (b *Board) openRing(r *Ring, at find) error {
	if r == nil {
		return nil
	}
	n := r.vectors()
	step := uint64(r.width() / 8)
	mem, err := at("ring", r.Place, uint64(n-1)*r.Stride+step, mmio.Uncached)
	if err != nil {
		return err
	}
	data := b.Win.Mem
	b.PeerVectors = n
	b.Rings = func(vec uint32) (doorbell.Ringer, error) {
		v, off := r.value(vec)
		return &fn.Reg{Data: data, Word: fn.Word{Mem: mem, Off: off, Width: r.width(), Big: r.BigEndian}, Value: v}, nil
	}
	return nil
}

// listen starts taking the interrupt of a cause register, and lets it through.
func (b *Board) listen(line doorbell.Waiter, i *Interrupt, at find, o board.Options) error {
	c := i.Cause
	word := func(key string, r *Register, off uint64) (fn.Word, error) {
		p := r.Place
		p.Offset = off
		m, err := at(key, p, uint64(r.width()/8), mmio.Uncached)
		return fn.Word{Mem: m, Width: r.width(), Big: r.BigEndian}, err
	}
	cause := &fn.Bits{Mask: c.Mask, Shift: uint(bits.TrailingZeros32(c.Mask))}
	var err error
	if cause.R, err = word("interrupt.cause", &c.Register, c.Offset); err != nil {
		return err
	}
	cause.Ack = cause.R
	if c.ClearOffset != 0 {
		if cause.Ack, err = word("interrupt.cause", &c.Register, c.ClearOffset); err != nil {
			return err
		}
	}
	switch c.Clear {
	case "zeros":
		cause.How = fn.ClearByZeros
	case "read":
		cause.How = fn.ClearByRead
	}
	var enable fn.Word
	if c.Enable != nil {
		if enable, err = word("interrupt.cause.enable", &c.Enable.Register, c.Enable.Offset); err != nil {
			return err
		}
	}
	let := func(through bool) {
		if c.Enable == nil {
			return
		}
		v := enable.Load()
		if through != c.Enable.MasksWhenSet {
			v |= c.Enable.Bits
		} else {
			v &^= c.Enable.Bits
		}
		enable.Store(v)
	}
	let(false)
	// Whatever was rung before is nobody's any more.
	if p, ok := cause.Pending(); ok {
		cause.Clear(p)
	} else {
		return b.bad(board.ErrAbsent, "the interrupt's cause register reads as all-ones: the board does not answer (yet)")
	}
	d, err := fn.NewDemux(b.Spec, line, cause, int(i.vectors()), o.Logf)
	if err != nil {
		return err
	}
	b.demux, b.Waiters = d, d.Waiters()
	b.OnClose(d.Close)
	b.OnClose(func() error {
		_ = pci.Guard(func() { let(false) }) // a board that is gone has nothing to be masked
		return nil
	})
	let(true)
	return nil
}

// openPool makes memory that the board can reach.
func (b *Board) openPool(f pci.Function, p *Pool) error {
	mem, err := pinned(p.Size)
	if err != nil {
		return b.bad(nil, "host.pool.size: %#x bytes of memory: %v", p.Size, err)
	}
	b.OnClose(func() error { return unix.Munmap(mem) })
	ram, _ := mmio.FromBytes(mem).RAM()
	addr, err := f.MapDMA(ram, pci.DMARead|pci.DMAWrite)
	if err != nil {
		return fn.Wrap(b.Spec, "host.pool: the board cannot be given memory (leave the pool out, or use mode vfio)", err)
	}
	b.OnClose(func() error { return f.UnmapDMA(addr) })
	if err := f.SetBusMaster(true); err != nil {
		return fn.Wrap(b.Spec, "host.pool", err)
	}
	b.OnClose(func() error { return f.SetBusMaster(false) })
	bus := addr + dma.Addr(p.BusOffset)
	if bus < addr || bus+dma.Addr(p.Size)-1 < bus {
		return b.bad(board.ErrInput, "host.pool.bus_offset: %#x added to the bus address %#x passes 2^64", p.BusOffset, uint64(addr))
	}
	b.Host = dma.Region{Name: "pool", Addr: bus, Mem: mmio.FromBytes(mem), Access: dma.DeviceRead | dma.DeviceWrite}
	return nil
}

// dmaMask is the highest bus address that memory for the board may have; 0: any.
func (h *Host) dmaMask() uint64 {
	mask := uint64(0)
	if h.Pool != nil {
		mask = h.Pool.HighestAddress
	}
	if h.Engine != nil && h.Engine.HighestAddress != 0 && (mask == 0 || h.Engine.HighestAddress < mask) {
		mask = h.Engine.HighestAddress
	}
	return mask
}

// openEngine finds the DMA controller.
func (b *Board) openEngine(f pci.Function, c *Config, at find) error {
	e := c.Host.Engine
	ec := fn.EngineConfig{Spec: b.Spec, F: f, Make: fn.EngineMake(e.Kind), ToHost: e.ToHost, ToBoard: e.ToBoard,
		WindowBus: e.WindowAddress, Mask: e.HighestAddress}
	if ec.WindowBus == 0 {
		ec.WindowBus = c.Host.Window.BusAddress
	}
	ec.Far = func(bus, size uint64) (uint64, error) {
		a := bus + e.BusOffset
		if a < bus || a+size-1 < a {
			return 0, fmt.Errorf("host.engine.bus_offset: %#x added to the bus address %#x passes 2^64", e.BusOffset, bus)
		}
		return a, nil
	}
	var err error
	if ec.Regs, err = at("engine", e.Place, e.registers(), mmio.Uncached); err != nil {
		return err
	}
	if d := e.Descriptors; d != nil {
		if ec.Desc, err = at("engine.descriptors", d.Place, d.Size, mmio.Uncached); err != nil {
			return err
		}
		ec.DescBus = d.BusAddress
	}
	if b.engines, err = fn.NewEngines(ec); err != nil {
		return err
	}
	b.GoneF = b.engines.Gone(b.GoneF)
	return nil
}

// Engine implements board.Engined. A description without [host.engine] has none.
func (b *Board) Engine(c board.EngineConfig) (dma.Engine, dma.Span, error) {
	if b.engines == nil {
		return nil, dma.Span{}, fmt.Errorf("%s: %w (the description has no [host.engine])", b.Spec, board.ErrHasNoEngine)
	}
	return b.engines.Engine(c)
}

// pinned returns zero bytes, in huge pages where there are any: fewer entries in the IOMMU's
// tables. The DMA map pins them.
func pinned(n uint64) ([]byte, error) {
	if uint64(int(n)) != n {
		return nil, unix.ENOMEM
	}
	const huge = 2 << 20
	if n%huge == 0 {
		if b, err := unix.Mmap(-1, 0, int(n), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS|unix.MAP_HUGETLB); err == nil {
			return b, nil
		}
	}
	b, err := unix.Mmap(-1, 0, int(n), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, err
	}
	if uintptr(unsafe.Pointer(&b[0]))%uintptr(os.Getpagesize()) != 0 {
		unix.Munmap(b)
		return nil, unix.EINVAL
	}
	return b, nil
}

func openAgent(spec string, c *Config, o board.Options, noInterrupts bool) (*Board, error) {
	b := &Board{}
	b.Spec = spec
	at := func(key string, p Place, n uint64, want mmio.Kind) (mmio.Mem, error) {
		r := local.Range{Path: p.Path, Map: p.Map, Offset: p.Offset, Size: n}
		if r.Path == "" {
			r.Path = local.DevMem
		}
		// Registers need not start at 8 bytes.
		lead := r.Offset & 7
		r.Offset, r.Size = r.Offset-lead, r.Size+lead
		m, err := local.Map(spec, r, want, key == "window")
		if err != nil {
			return mmio.Mem{}, err
		}
		b.OnClose(m.Close)
		return m.Mem.Slice(lead, n)
	}
	err := func() error {
		var irq doorbell.Waiter
		if i := c.Agent.Interrupt; i != nil && !noInterrupts {
			q, err := local.OpenIRQ(spec, i.Path)
			if err != nil {
				return err
			}
			b.OnClose(q.Close)
			irq = q
		}
		return b.openLocal(c, o, at, irq)
	}()
	if err != nil {
		b.Close()
		return nil, err
	}
	return b, nil
}

// Local gives the agent's end what it would map: n bytes at a place, of the given kind. key is what it is for
// ("window", "ring", "pool" ...).
type Local func(key string, p Place, n uint64, want mmio.Kind) (mmio.Mem, error)

// NewLocal makes the agent's end over memory from at; irq is its interrupt, nil: poll. c must be valid.
func NewLocal(spec string, c *Config, o board.Options, at Local, irq doorbell.Waiter) (*Board, error) {
	b := &Board{}
	b.Spec = spec
	if err := b.openLocal(c, o, find(at), irq); err != nil {
		b.Close()
		return nil, err
	}
	return b, nil
}

func (b *Board) openLocal(c *Config, o board.Options, at find, irq doorbell.Waiter) error {
	a := c.Agent
	kind, err := a.Window.kind(false)
	if err != nil {
		return err
	}
	mem, err := at("window", a.Window.Place, a.Window.Size, kind)
	if err != nil {
		return err
	}
	min, max := a.Window.access()
	b.Win = dma.Region{Name: "board", Addr: dma.Addr(a.Window.bus()), Mem: limit(mem, min, max), Access: dma.DeviceRead | dma.DeviceWrite}
	if err := b.openRing(a.Ring, at); err != nil {
		return err
	}
	if p := a.Pool; p != nil {
		k := mmio.Uncached
		if o.Kind != nil {
			if k = *o.Kind; k == mmio.Cached {
				return b.bad(board.ErrInput, "the host's memory is device memory here: it cannot be seen as cached; uncached or write-combining")
			}
		}
		m, err := at("pool", p.Place, p.Size, k)
		if err != nil {
			return err
		}
		b.Host = dma.Region{Name: "pool", Addr: dma.Addr(p.BusAddress), Mem: m, Access: dma.DeviceRead | dma.DeviceWrite, Across: true, Account: o.Account}
	}
	if irq == nil || a.Interrupt == nil {
		return nil
	}
	if a.Interrupt.Cause != nil {
		return b.listen(irq, a.Interrupt, at, o)
	}
	b.Waiters = []doorbell.Waiter{irq}
	return nil
}
