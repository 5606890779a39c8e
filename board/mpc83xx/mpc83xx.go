// Package mpc83xx is boards with a Freescale MPC83xx (MPC8349 and its relatives) as a PCI agent: the window is local
// memory behind an inbound window of its PCI controller, the doorbells are those of its messaging unit, and a level
// interrupt (INTx) rings the carrier.
//
// The carrier opens "mpc83xx:0000:01:00.0", the board "mpc83xx:immr=0xe0000000,window=0x0f000000+0x1000000,irq=/dev/uio0".
//
// In the room: those registers (regs.go), from both sides; where the DMA engine is and how it reaches the carrier. Never in
// it: how the function is opened, the registers of the DMA engine (dma/engine/fsl).
//
// NO SILICON WAS SEEN. The registers are tested against a model (hwtest/models) that was written from the same
// sources as this package; docs/boards.md lists what is not verified.
//
// # Doorbells
//
// Each bit of a doorbell register is a vector: the carrier has 29 (ODR), the board 31 (IDR). A side that is rung
// clears the bit and passes the ring on; several rings of a bit before that are one.
//
// # DMA
//
// With engine=CHANNELS, e.g. engine=2+3, the carrier drives these channels of the board's DMA engine, through IMMR. The engine has to reach the
// carrier's memory by one of the board's outbound windows, outbound=N: a memory window of the first PCI controller that the
// boot loader turned on, with a local access window over it. The carrier lets it lead to its own memory while an
// engine is open, and back at the end.
//
// # Coherence
//
// The inbound window must snoop the core's caches (PIWAR), or the board must map its window uncached.
package mpc83xx

import (
	"fmt"
	"math/bits"
	"strconv"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/board/internal/fn"
	"github.com/boardlink/boardlink/board/internal/local"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/pci"
)

// Name is the kind's name in a board spec.
const Name = "mpc83xx"

// MinWindow is the least size of a window, in bytes.
const MinWindow = 64 << 10

func init() {
	board.Register(board.Kind{
		Name: Name,
		Help: "host: PCI address[,mode=vfio|noiommu|uio|sysfs][,interrupts=off|intx|msi|msix][,target=LOCAL-ADDRESS][,engine=CHANNEL+CHANNEL...][,outbound=N]; " +
			"agent: immr=ADDRESS,window=ADDRESS+SIZE[,bus=ADDRESS][,irq=/dev/uioN][,memory=cached|uncached]",
		Open: func(arg string, o board.Options) (board.Board, error) {
			b, err := Open(arg, o)
			if err != nil {
				return nil, err
			}
			return b, nil
		},
		Examine: func(arg string, o board.Options) []error {
			a, _, err := parseHost(arg)
			if err != nil {
				return []error{err}
			}
			return a.Examine(o)
		},
	})
}

// Board is an end of a link over an MPC83xx.
type Board struct {
	fn.Base
	demux   *fn.Demux
	engines *fn.Engines // nil: none
	out     outbound
}

var _ board.Engined = (*Board)(nil)

// Demux returns what takes the doorbells' interrupt, for its counters; nil where this side polls.
func (b *Board) Demux() *fn.Demux { return b.demux }

// Open opens the end o.Side.
func Open(arg string, o board.Options) (*Board, error) {
	if o.Side == board.Agent {
		return openAgent(arg, o)
	}
	a, c, err := parseHost(arg)
	if err != nil {
		return nil, err
	}
	f, err := a.Open(o)
	if err != nil {
		return nil, err
	}
	return New(a.Spec, f, o, c)
}

// parseHost reads the host's argument.
func parseHost(arg string) (a fn.Arg, c Config, err error) {
	if a, err = fn.ParseArg(Name, arg, "mode", "interrupts", "target", "engine", "outbound"); err != nil {
		return a, c, err
	}
	a.Match = func(i *pci.Info) error { return identify(a.Spec, i) }
	a.Fits = func(i *pci.Info) []error {
		return fn.Bars(a.Spec, i, func(b pci.BAR) error { return checkBAR(a.Spec, b) }, BARRegs, BARWindow)
	}
	irq, err := a.OneOf("interrupts", "on", "on", "off", "intx", "msi", "msix")
	if err != nil {
		return a, c, err
	}
	// The messaging unit raises the line alone. A chip whose function also has MSI would wait for messages
	// that nobody sends.
	a.Interrupts = map[string]pci.InterruptKind{"on": pci.INTx, "intx": pci.INTx, "msi": pci.MSI, "msix": pci.MSIX}[irq]
	c.NoInterrupts = irq == "off"
	if t, ok := a.Get("target"); ok {
		if c.Target, err = strconv.ParseUint(t, 0, 32); err != nil || c.Target&0xfff != 0 {
			return a, c, a.Bad("target=%s: a local address of 32 bits and a multiple of 0x1000 is wanted", t)
		}
		c.SetTarget = true
	}
	if c.Engine, err = channels(a); err != nil {
		return a, c, err
	}
	if n, ok := a.Get("outbound"); ok {
		w, err := strconv.ParseUint(n, 10, 8)
		if err != nil || w >= POTs || len(c.Engine) == 0 {
			return a, c, a.Bad("outbound=%s: the number of an outbound window, 0 to %d, is wanted, for engine=", n, POTs-1)
		}
		c.Outbound = int(w)
	}
	if len(c.Engine) != 0 {
		a.DMAMask = highest
	}
	return a, c, nil
}

// identify returns nil for a function that may be an MPC83xx.
func identify(spec string, i *pci.Info) error {
	if i.Vendor != Vendor {
		return fn.NoSuchBoard(spec, i, fmt.Sprintf("an MPC83xx has the vendor %04x", Vendor))
	}
	return nil
}

// checkBAR returns nil for a BAR of a size that it may have.
func checkBAR(spec string, b pci.BAR) error {
	switch {
	case b.Index == BARRegs && b.Size < PIWAR0+4:
		return bad(spec, board.ErrInput, "BAR %d has %#x bytes: it is not an internal memory map (1 MiB)", BARRegs, b.Size)
	case b.Index == BARWindow && b.Size < MinWindow:
		return bad(spec, board.ErrInput, "its window, BAR %d of %#x bytes, is too small (%#x at least)", BARWindow, b.Size, MinWindow)
	}
	return nil
}

func bad(spec string, class error, format string, args ...interface{}) error {
	return &board.Error{Spec: spec, Reason: fmt.Sprintf(format, args...), Class: class}
}

// Config are the host's wishes beside board.Options.
type Config struct {
	NoInterrupts bool // poll
	// Target is the board's local address that the window is to lead to; SetTarget tells that the host is
	// to set the inbound window up. Else it stays as the board's boot loader made it.
	Target    uint64
	SetTarget bool
	// Engine are the channels of the DMA engine that the host may use: nobody on the board does. None: no engine. The function is to be
	// opened for bus addresses of 32 bits then.
	Engine []int
	// Outbound is the outbound window by which the engine reaches the host's memory.
	Outbound int
}

// New makes the host's end of an opened function, which it owns from then on, also where it fails. spec is for
// messages.
func New(spec string, f pci.Function, o board.Options, c Config) (*Board, error) {
	b := &Board{}
	b.Spec, b.Fn, b.EventC, b.GoneF = spec, f, f.Events(), f.Gone
	b.OnClose(f.Close)
	var err error
	if ferr := pci.Guard(func() { err = b.openHost(f, o, c) }); ferr != nil {
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
	return bad(b.Spec, class, format, args...)
}

func logf(o board.Options) func(string, ...interface{}) {
	if o.Logf == nil {
		return func(string, ...interface{}) {}
	}
	return o.Logf
}

func (b *Board) openHost(f pci.Function, o board.Options, c Config) error {
	if err := identify(b.Spec, f.Info()); err != nil {
		return err
	}
	immr, err := f.MapBAR(BARRegs, mmio.Uncached)
	if err != nil {
		return err
	}
	if err := checkBAR(b.Spec, immr.BAR); err != nil {
		return err
	}
	mu, err := immr.Mem(MU, MUSize)
	if err != nil {
		return err
	}
	want := mmio.Uncached
	if o.Kind != nil {
		if want = *o.Kind; want == mmio.Cached {
			return b.bad(board.ErrInput, "BAR %d is device memory: it cannot be seen as cached; uncached or write-combining", BARWindow)
		}
	}
	win, err := f.MapBAR(BARWindow, want)
	if err != nil {
		return err
	}
	if err := checkBAR(b.Spec, win.BAR); err != nil {
		return err
	}
	if win.Syscalls {
		return b.bad(board.ErrInput, "its window, BAR %d of %#x bytes, cannot be mapped in mode %s", BARWindow, win.BAR.Size, f.Mode())
	}
	mem, err := win.All()
	if err != nil {
		return err
	}
	b.Win = dma.Region{Name: "board", Mem: mem, Access: dma.DeviceRead | dma.DeviceWrite, Across: true, Account: o.Account}
	if mu.Load32(OMIMR) == 0xffffffff && mu.Load32(ODR) == 0xffffffff {
		return b.bad(board.ErrAbsent, "the messaging unit reads as all-ones: the board does not answer (yet)")
	}
	if err := b.inbound(immr, win.BAR.Size, o, c); err != nil {
		return err
	}
	if len(c.Engine) != 0 {
		if err := b.openEngine(f, immr, win.BAR.Size, c); err != nil {
			return err
		}
	}
	b.PeerVectors = InboundBits
	b.Rings = func(v uint32) (doorbell.Ringer, error) {
		return &fn.Reg{Data: mem, Word: fn.Word{Mem: mu, Off: IDR, Width: 32}, Value: 1 << v}, nil
	}
	// Whatever was rung before is nobody's any more.
	mask := fn.Word{Mem: mu, Off: OMIMR, Width: 32}
	mask.Store(mask.Load() | ODI)
	mu.Store32(ODR, 1<<OutboundBits-1)
	if c.NoInterrupts {
		return nil
	}
	irq := f.Interrupts()
	if irq.Count == 0 {
		logf(o)("%s: no interrupts in mode %s: this side polls", b.Spec, f.Mode())
		return nil
	}
	lines, err := f.EnableInterrupts(1)
	if err != nil {
		return fn.Wrap(b.Spec, "its interrupt cannot be had (interrupts=off does without)", err)
	}
	return b.listen(lines[0], &fn.Bits{R: fn.Word{Mem: mu, Off: ODR, Width: 32}, Mask: 1<<OutboundBits - 1, Ack: fn.Word{Mem: mu, Off: ODR, Width: 32}},
		OutboundBits, mask, ODI, o)
}

// listen starts taking the doorbells' interrupt, and unmasks it.
func (b *Board) listen(line doorbell.Waiter, cause *fn.Bits, vectors int, mask fn.Word, bit uint32, o board.Options) error {
	d, err := fn.NewDemux(b.Spec, line, cause, vectors, o.Logf)
	if err != nil {
		return err
	}
	b.demux, b.Waiters = d, d.Waiters()
	b.OnClose(d.Close)
	b.OnClose(func() error {
		// A board that is gone has nothing to be masked.
		_ = pci.Guard(func() { mask.Store(mask.Load() | bit) })
		return nil
	})
	mask.Store(mask.Load() &^ bit)
	return nil
}

// inbound sets the inbound window up where that is wished, and else looks whether it is. Its size stays as it is:
// the BAR was given its addresses by it.
func (b *Board) inbound(immr *pci.Mapping, size uint64, o board.Options, c Config) error {
	reg := func(off uint64) (fn.Word, error) {
		m, err := immr.Mem(off, 4)
		return fn.Word{Mem: m, Width: 32, Big: true}, err
	}
	pitar, err := reg(PITAR0)
	if err != nil {
		return err
	}
	piwar, err := reg(PIWAR0)
	if err != nil {
		return err
	}
	code := uint32(bits.TrailingZeros64(size)) - 1
	if !c.SetTarget {
		switch w := piwar.Load(); {
		case w&PIWAREnable == 0:
			logf(o)("%s: PIWAR0 is %#x: the inbound window seems to be off; have the boot loader turn it on, or give target=", b.Spec, w)
		case w&PIWARSizeMask != code:
			logf(o)("%s: PIWAR0 is %#x: the inbound window does not seem to have the size of BAR %d, %#x", b.Spec, w, BARWindow, size)
		case w&(PIWARReadSnp|PIWARWriteSnp) != PIWARReadSnp|PIWARWriteSnp:
			logf(o)("%s: PIWAR0 is %#x: the inbound window does not seem to snoop: the board has to map its window uncached", b.Spec, w)
		}
		return nil
	}
	if c.Target&(size-1) != 0 {
		return b.bad(board.ErrInput, "target=%#x is not a multiple of the window's size, %#x", c.Target, size)
	}
	// Off while it moves. The prefetch bit is the loader's choice: it shows in the BAR.
	pf := piwar.Load() & PIWARPrefetch
	piwar.Store(pf | code)
	pitar.Store(uint32(c.Target>>12) & pitarMask)
	on := PIWAREnable | pf | PIWARReadSnp | PIWARWriteSnp | code
	piwar.Store(on)
	if t, w := pitar.Load(), piwar.Load(); t&pitarMask != uint32(c.Target>>12) || w != on {
		return b.bad(nil, "the inbound window does not take its set-up: PITAR0 is %#x, PIWAR0 %#x, wanted %#x and %#x", t, w, c.Target>>12, on)
	}
	return nil
}

// Local are the parts of the agent's end, mapped.
type Local struct {
	MU     mmio.Mem // the messaging unit, MUSize bytes
	Window mmio.Mem // local memory behind the inbound window
	Bus    dma.Addr // what descriptors call its first byte
	// IRQ is the messaging unit's interrupt; nil: poll.
	IRQ doorbell.Waiter
}

func openAgent(arg string, o board.Options) (*Board, error) {
	a, err := fn.ParseKeys(Name, arg, "immr", "window", "bus", "irq", "memory")
	if err != nil {
		return nil, err
	}
	is, ok1 := a.Get("immr")
	ws, ok2 := a.Get("window")
	if !ok1 || !ok2 {
		return nil, a.Bad("on the board, immr=ADDRESS and window=ADDRESS+SIZE are wanted")
	}
	ir, err := local.ParseRange(is, 1<<20)
	if err == nil && ir.Size < MU+MUSize {
		err = fmt.Errorf("immr=%s: too small to hold the messaging unit at %#x", is, MU)
	}
	if err != nil {
		return nil, a.Bad("%v", err)
	}
	ir.Offset, ir.Size = ir.Offset+MU, MUSize
	wr, err := local.ParseRange(ws, 0)
	if err != nil {
		return nil, a.Bad("%v", err)
	}
	if wr.Size < MinWindow || wr.Size&(wr.Size-1) != 0 {
		return nil, a.Bad("window=%s: a power of two from %#x on is wanted", ws, MinWindow)
	}
	l := Local{Bus: dma.Addr(wr.Offset)}
	if s, ok := a.Get("bus"); ok {
		n, err := strconv.ParseUint(s, 0, 64)
		if err != nil || n&0xfff != 0 {
			return nil, a.Bad("bus=%s: an address that is a multiple of 0x1000 is wanted", s)
		}
		l.Bus = dma.Addr(n)
	}
	mem, err := a.OneOf("memory", "uncached", "cached", "uncached")
	if err != nil {
		return nil, err
	}
	kind := mmio.Uncached
	if mem == "cached" {
		kind = mmio.Cached
	}
	b := &Board{}
	b.Spec = a.Spec
	err = func() error {
		w, err := local.Map(b.Spec, wr, kind, true)
		if err != nil {
			return err
		}
		b.OnClose(w.Close)
		r, err := local.Map(b.Spec, ir, mmio.Uncached, false)
		if err != nil {
			return err
		}
		b.OnClose(r.Close)
		l.Window, l.MU = w.Mem, r.Mem
		if p, ok := a.Get("irq"); ok {
			q, err := local.OpenIRQ(b.Spec, p)
			if err != nil {
				return err
			}
			b.OnClose(q.Close)
			l.IRQ = q
		}
		return b.openLocal(l, o)
	}()
	if err != nil {
		b.Close()
		return nil, err
	}
	return b, nil
}

// NewLocal makes the agent's end of mapped parts, which stay the caller's and must outlive the Board.
func NewLocal(spec string, l Local, o board.Options) (*Board, error) {
	b := &Board{}
	b.Spec = spec
	if err := b.openLocal(l, o); err != nil {
		b.Close()
		return nil, err
	}
	return b, nil
}

func (b *Board) openLocal(l Local, o board.Options) error {
	b.Win = dma.Region{Name: "board", Addr: l.Bus, Mem: l.Window, Access: dma.DeviceRead | dma.DeviceWrite}
	b.PeerVectors = OutboundBits
	b.Rings = func(v uint32) (doorbell.Ringer, error) {
		return &fn.Reg{Data: l.Window, Word: fn.Word{Mem: l.MU, Off: ODR, Width: 32}, Value: 1 << v}, nil
	}
	mask := fn.Word{Mem: l.MU, Off: IMIMR, Width: 32}
	mask.Store(mask.Load() | IDI)
	l.MU.Store32(IDR, 1<<InboundBits-1)
	if l.IRQ == nil {
		logf(o)("%s: no interrupt (irq=): this side polls", b.Spec)
		return nil
	}
	return b.listen(l.IRQ, &fn.Bits{R: fn.Word{Mem: l.MU, Off: IDR, Width: 32}, Mask: 1<<InboundBits - 1, Ack: fn.Word{Mem: l.MU, Off: IDR, Width: 32}},
		InboundBits, mask, IDI, o)
}
