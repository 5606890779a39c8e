//go:build linux

package models

import (
	"sync"
	"sync/atomic"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/pci"
)

// Registers of a Synth. The carrier's are in BAR 0, 16 bits, big-endian; the board's own have 32 bits,
// little-endian.
const (
	SynthRing    = 0x10  // carrier: write 0x40+v to ring the board's doorbell v, 0 to 7
	SynthCause   = 0x20  // carrier: bits 4 to 11 are its doorbells; the others read as ones
	SynthClear   = 0x22  // carrier: zeros clear doorbells
	SynthMask    = 0x30  // carrier: bit 15 keeps INTx off, the others have to stay as they are
	SynthLocRing = 0x100 // board: ones at bit 0 to 7 ring the carrier's doorbells
	SynthLocCaus = 0x104 // board: bits 0 to 7 are its doorbells; reading clears them
	SynthLocEna  = 0x108 // board: bit 3 lets its interrupt through

	synthMaskRest = 0x1234
	synthBase     = 0x40
)

// SynthWindow is where the board's processor has the window, SynthOutbound where it reaches PCI bus
// address 0.
const (
	SynthWindow   = 0x2000_0000
	SynthOutbound = 0x80_0000_0000
)

// Synth is a board that nobody would build: 16-bit accesses only to its window, registers of two byte orders and three
// ways to ring and clear, INTx. With DMA it also reaches the carrier's memory.
type Synth struct {
	outReads uint64 // atomic, first for its alignment
	faults
	Mem  *Memory
	INTx *Line
	Core *Line

	mu    sync.Mutex
	cause uint32 // of the carrier, bits 0 to 7
	loc   uint32 // of the board
	mask  uint16
	ena   uint32
	stuck uint32
	f     *Function
}

// NewSynth makes a board with win bytes of window, which takes accesses of the given widths in bytes. Close it.
func NewSynth(win uint64, widths ...uint) (*Synth, error) {
	m, err := NewMemory(win, widths...)
	if err != nil {
		return nil, err
	}
	s := &Synth{Mem: m, mask: synthMaskRest}
	if s.INTx, err = NewLine(); err == nil {
		s.Core, err = NewLine()
	}
	return s, err
}

// Function returns the board as a PCI function, each time a new one. The board's DMA goes to the newest.
func (s *Synth) Function() *Function {
	f := NewFunction(FunctionConfig{Vendor: 0x1234, Device: 0xb0a2, Line: s.INTx, BARs: []BARConfig{
		{Index: 0, Size: 4096, Bus: (*synthPCI)(s)},
		{Index: 2, Size: s.Mem.dev.Size(), Bus: s.Mem},
	}})
	s.mu.Lock()
	s.f = f
	s.mu.Unlock()
	return f
}

// Registers are the board's own, from address 0 on.
func (s *Synth) Registers() mmio.Mem {
	return mmio.NewBusMem((*synthLocal)(s), 0x1000, mmio.Uncached)
}

// Outbound is the carrier's memory as the board's processor sees it, from PCI bus address base on.
func (s *Synth) Outbound(base dma.Addr, size uint64) mmio.Mem {
	return mmio.NewBusMem(&outbound{s, base}, size, mmio.Uncached)
}

// OutboundReads returns how often the board read from the carrier's memory.
func (s *Synth) OutboundReads() uint64 { return atomic.LoadUint64(&s.outReads) }

// Stick makes doorbells of the carrier stuck: rung for good.
func (s *Synth) Stick(bits uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stuck = bits
	s.cause |= bits
	s.lines()
}

// Err returns nil, or what was misused.
func (s *Synth) Err() error {
	if err := s.faults.Err(); err != nil {
		return err
	}
	return s.Mem.Err()
}

// Close gives memory and lines back.
func (s *Synth) Close() error {
	s.INTx.Close()
	s.Core.Close()
	return s.Mem.Close()
}

func (s *Synth) lines() {
	s.INTx.Set(s.cause != 0 && s.mask&0x8000 == 0)
	s.Core.Set(s.loc != 0 && s.ena&8 != 0)
}

func swap16(v uint16) uint16 { return v<<8 | v>>8 }

type synthPCI Synth

// Load implements mmio.Bus.
func (p *synthPCI) Load(off uint64, width uint) uint64 {
	s := (*Synth)(p)
	s.mu.Lock()
	defer s.mu.Unlock()
	v := uint16(0)
	switch {
	case width == 2 && off == SynthCause:
		v = uint16(s.cause)<<4 | 0xf00f
	case width == 2 && off == SynthMask:
		v = s.mask
	default:
		s.add("BAR 0: load of %d bytes at %#x", width, off)
		return ones(width)
	}
	return uint64(swap16(v))
}

// Store implements mmio.Bus.
func (p *synthPCI) Store(off uint64, width uint, x uint64) {
	s := (*Synth)(p)
	s.mu.Lock()
	defer s.mu.Unlock()
	defer s.lines()
	v := swap16(uint16(x))
	switch {
	case width == 2 && off == SynthRing && v >= synthBase && v < synthBase+8:
		s.loc |= 1 << (v - synthBase)
	case width == 2 && off == SynthClear:
		s.cause = s.cause&uint32(v>>4&0xff) | s.stuck
	case width == 2 && off == SynthMask && v&0x7fff == synthMaskRest:
		s.mask = v
	default:
		s.add("BAR 0: store of %#x, %d bytes at %#x", x, width, off)
	}
}

// Barrier implements mmio.Bus.
func (p *synthPCI) Barrier(mmio.Barrier) {}

type synthLocal Synth

// Load implements mmio.Bus.
func (p *synthLocal) Load(off uint64, width uint) uint64 {
	s := (*Synth)(p)
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case width == 4 && off == SynthLocCaus:
		v := s.loc
		s.loc = 0
		s.lines()
		return uint64(v)
	case width == 4 && off == SynthLocEna:
		return uint64(s.ena)
	}
	s.add("board: load of %d bytes at %#x", width, off)
	return ones(width)
}

// Store implements mmio.Bus.
func (p *synthLocal) Store(off uint64, width uint, x uint64) {
	s := (*Synth)(p)
	s.mu.Lock()
	defer s.mu.Unlock()
	defer s.lines()
	switch {
	case width == 4 && off == SynthLocRing && x < 0x100:
		s.cause |= uint32(x)
	case width == 4 && off == SynthLocEna:
		s.ena = uint32(x)
	default:
		s.add("board: store of %#x, %d bytes at %#x", x, width, off)
	}
}

// Barrier implements mmio.Bus.
func (p *synthLocal) Barrier(mmio.Barrier) {}

// outbound is the board's processor reaching for the carrier's memory.
type outbound struct {
	s    *Synth
	base dma.Addr
}

func (o *outbound) at(off uint64, width uint, access pci.DMAAccess) (mmio.Mem, bool) {
	o.s.mu.Lock()
	f := o.s.f
	o.s.mu.Unlock()
	if off%uint64(width) != 0 {
		o.s.add("outbound: %d bytes at %#x: misaligned", width, off)
		return mmio.Mem{}, false
	}
	m, err := f.DMA(o.base+dma.Addr(off), uint64(width), access)
	if err != nil {
		o.s.add("outbound: %v", err)
		return mmio.Mem{}, false
	}
	return m, true
}

// Load implements mmio.Bus.
func (o *outbound) Load(off uint64, width uint) uint64 {
	atomic.AddUint64(&o.s.outReads, 1)
	m, ok := o.at(off, width, pci.DMARead)
	if !ok {
		return ones(width)
	}
	return load(&m, 0, width)
}

// Store implements mmio.Bus.
func (o *outbound) Store(off uint64, width uint, v uint64) {
	if m, ok := o.at(off, width, pci.DMAWrite); ok {
		store(&m, 0, width, v)
	}
}

// Barrier implements mmio.Bus.
func (o *outbound) Barrier(b mmio.Barrier) { mmio.Fence(mmio.Uncached, b) }
