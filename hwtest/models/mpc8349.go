//go:build linux

package models

import (
	"sync"
	"sync/atomic"

	"github.com/boardlink/boardlink/board/mpc83xx"
	"github.com/boardlink/boardlink/dma"
	dmamodel "github.com/boardlink/boardlink/hwtest/models/dma"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/pci"
)

// IMMRSize is the size of BAR 0.
const IMMRSize = 1 << 20

// MPC8349 is the messaging unit, the first inbound window, the outbound windows and the DMA engine of the chip as a PCI agent. It has the registers of
// package mpc83xx (whose sources and doubts are its own) and two views: PCI's and the core's.
type MPC8349 struct {
	rings [2]uint64 // atomic, first for its alignment: doorbell registers written, outbound and inbound

	faults

	// Mem is the local memory. BAR 1 leads into it.
	Mem  *Memory
	PCI  *Line // INTA
	Core *Line // to the core's interrupt controller
	// DMA is the DMA engine. It reaches the local memory, and through the outbound windows what the newest Function has
	// mapped for it.
	DMA *dmamodel.FSL

	winSize uint64

	mu                  sync.Mutex
	odr, idr            uint32
	omimr, imimr        uint32
	pitar, pibar, piwar uint32
	pot                 [mpc83xx.POTs]struct{ potar, pobar, pocmr uint32 }
	f                   *Function
	stopped             uint64
	stuckOut, stuckIn   uint32
	dead                bool
}

// NewMPC8349 makes a chip with mem bytes of local memory of which BAR 1 shows win bytes, from local address target on:
// what a boot loader leaves. Close it.
func NewMPC8349(mem, win, target uint64) (*MPC8349, error) {
	return NewMPC8349WithDMA(mem, win, target, dmamodel.Options{})
}

// NewMPC8349WithDMA is NewMPC8349 with a DMA engine that fails as o says; o has no memory.
func NewMPC8349WithDMA(mem, win, target uint64, o dmamodel.Options) (*MPC8349, error) {
	m, err := NewMemory(mem, 1, 2, 4, 8)
	if err != nil {
		return nil, err
	}
	c := &MPC8349{Mem: m, winSize: win, pibar: 0x90000000 >> 12}
	if c.PCI, err = NewLine(); err == nil {
		c.Core, err = NewLine()
	}
	if err != nil {
		return nil, err
	}
	code := uint32(0)
	for win>>(code+1) > 1 {
		code++
	}
	o.Resolve = c.resolve
	c.DMA = dmamodel.NewFSL(false, o)
	// As a boot loader leaves them: the first one for prefetchable memory, the second one for I/O.
	c.pot[0].potar, c.pot[0].pobar, c.pot[0].pocmr = OutboundPCI>>12, OutboundLocal>>12, mpc83xx.POCMREnable|0xf0000
	c.pot[1].potar, c.pot[1].pobar, c.pot[1].pocmr = 0, 0xe2000000>>12, mpc83xx.POCMREnable|mpc83xx.POCMRIO|0xff000
	c.pitar = uint32(target >> 12)
	c.piwar = mpc83xx.PIWAREnable | mpc83xx.PIWARPrefetch | mpc83xx.PIWARReadSnp | mpc83xx.PIWARWriteSnp | code
	c.aim()
	return c, nil
}

// OutboundLocal is where the first outbound window is, OutboundPCI where the boot loader lets it lead to. It has 256 MiB.
const (
	OutboundLocal = 0x80000000
	OutboundPCI   = 0xa0000000
)

// Outbound returns POTAR of an outbound window.
func (c *MPC8349) Outbound(n int) uint32 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.pot[n].potar
}

// Stopped returns how often the DMA engine went where bus mastering, or the IOMMU, did not let it.
func (c *MPC8349) Stopped() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.stopped
}

// resolve is what the DMA engine finds at a local address.
func (c *MPC8349) resolve(addr, n uint64, write bool) (b []byte, far bool) {
	if size := c.Mem.dev.Size(); addr < size && n <= size-addr {
		return c.Mem.b[addr : addr+n], false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, p := range c.pot {
		mask := uint64(p.pocmr&mpc83xx.POCMRMask) << 12
		if p.pocmr&mpc83xx.POCMREnable == 0 || p.pocmr&mpc83xx.POCMRIO != 0 || addr&mask != uint64(p.pobar)<<12&mask {
			continue
		}
		need := pci.DMARead
		if write {
			need = pci.DMAWrite
		}
		if c.f != nil {
			if b := c.f.Burst(dma.Addr(uint64(p.potar)<<12&mask|addr&^mask), n, need); b != nil {
				return b, true
			}
		}
		c.stopped++
		return nil, true
	}
	return nil, false
}

// Function returns the chip as a PCI function, each time a new one.
func (c *MPC8349) Function() *Function {
	f := c.function()
	c.mu.Lock()
	c.f = f
	c.mu.Unlock()
	return f
}

func (c *MPC8349) function() *Function {
	return NewFunction(FunctionConfig{Vendor: mpc83xx.Vendor, Device: 0x0080, Line: c.PCI, BARs: []BARConfig{
		{Index: mpc83xx.BARRegs, Size: IMMRSize, Bus: &immr{c, false}},
		{Index: mpc83xx.BARWindow, Size: c.winSize, Prefetch: true, Bus: c.Mem},
	}})
}

// MU is the messaging unit as the core sees it.
func (c *MPC8349) MU() mmio.Mem {
	m, err := mmio.NewBusMem(&immr{c, true}, IMMRSize, mmio.Uncached).Slice(mpc83xx.MU, mpc83xx.MUSize)
	if err != nil {
		panic(err)
	}
	return m
}

// Stick makes doorbell bits stuck: outbound ones that PCI cannot clear, inbound ones that the core cannot.
func (c *MPC8349) Stick(out, in uint32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stuckOut, c.stuckIn = out, in
	c.odr |= out
	c.idr |= in
	c.lines()
}

// Unstick frees them; they stay set until cleared.
func (c *MPC8349) Unstick() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stuckOut, c.stuckIn = 0, 0
}

// Answer lets the chip answer on PCI, or not: reset, or without power.
func (c *MPC8349) Answer(on bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.dead = !on
	c.aim()
}

// Doorbells returns the doorbell registers, outbound and inbound.
func (c *MPC8349) Doorbells() (out, in uint32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.odr, c.idr
}

// Masks returns the mask registers, outbound and inbound.
func (c *MPC8349) Masks() (out, in uint32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.omimr, c.imimr
}

// Window returns PITAR0 and PIWAR0.
func (c *MPC8349) Window() (pitar, piwar uint32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.pitar, c.piwar
}

// SetWindow writes PITAR0 and PIWAR0, as a boot loader does.
func (c *MPC8349) SetWindow(pitar, piwar uint32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pitar, c.piwar = pitar, piwar
	c.aim()
}

// Rings returns how often an outbound and an inbound doorbell was written.
func (c *MPC8349) Rings() (out, in uint64) {
	return atomic.LoadUint64(&c.rings[0]), atomic.LoadUint64(&c.rings[1])
}

// Err returns nil, or what was misused of registers or window.
func (c *MPC8349) Err() error {
	if err := c.faults.Err(); err != nil {
		return err
	}
	if err := c.DMA.Err(); err != nil {
		return err
	}
	return c.Mem.Err()
}

// Close gives memory and lines back.
func (c *MPC8349) Close() error {
	c.DMA.Settle()
	c.PCI.Close()
	c.Core.Close()
	return c.Mem.Close()
}

// aim follows the window's registers.
func (c *MPC8349) aim() {
	c.Mem.Answer(c.piwar&mpc83xx.PIWAREnable != 0 && !c.dead)
	c.Mem.Aim(uint64(c.pitar) << 12)
}

// lines sets the interrupts to what status and mask say.
func (c *MPC8349) lines() {
	out, in := c.status()
	c.PCI.Set(out&^c.omimr != 0)
	c.Core.Set(in&^c.imimr != 0)
}

func (c *MPC8349) status() (omisr, imisr uint32) {
	if c.odr != 0 {
		omisr = mpc83xx.ODI
	}
	if c.idr != 0 {
		imisr = mpc83xx.IDI
	}
	return omisr, imisr
}

// immr is a view of the registers: the core's, or PCI's.
type immr struct {
	c    *MPC8349
	core bool
}

func (v *immr) side() string {
	if v.core {
		return "core"
	}
	return "PCI"
}

// dma tells whether an access is for the DMA engine, and where in its registers.
func (v *immr) dma(off uint64) (uint64, bool) {
	return off - mpc83xx.DMA, off >= mpc83xx.DMA && off < mpc83xx.DMA+mpc83xx.DMASize
}

// outbound returns the outbound window's register at off, nil where there is none.
func (v *immr) outbound(off uint64) *uint32 {
	n, reg := (off-mpc83xx.POT)/mpc83xx.POTSize, (off-mpc83xx.POT)%mpc83xx.POTSize
	if off < mpc83xx.POT || n >= mpc83xx.POTs {
		return nil
	}
	switch p := &v.c.pot[n]; reg {
	case mpc83xx.POTAR:
		return &p.potar
	case mpc83xx.POBAR:
		return &p.pobar
	case mpc83xx.POCMR:
		return &p.pocmr
	}
	return nil
}

// Load implements mmio.Bus.
func (v *immr) Load(off uint64, width uint) uint64 {
	c := v.c
	if at, ok := v.dma(off); ok && !v.quiet() {
		return c.DMA.Load(at, width)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.dead && !v.core {
		return ones(width)
	}
	if width != 4 || off&3 != 0 {
		c.add("IMMR (%s): load of %d bytes at %#x: registers have 4", v.side(), width, off)
		return ones(width)
	}
	omisr, imisr := c.status()
	if r := v.outbound(off); r != nil {
		return uint64(swap32(*r))
	}
	switch off {
	case mpc83xx.MU + mpc83xx.ODR:
		return uint64(c.odr)
	case mpc83xx.MU + mpc83xx.IDR:
		return uint64(c.idr)
	case mpc83xx.PITAR0:
		return uint64(swap32(c.pitar))
	case mpc83xx.PIBAR0:
		return uint64(swap32(c.pibar))
	case mpc83xx.PIWAR0:
		return uint64(swap32(c.piwar))
	}
	if v.core {
		switch off {
		case mpc83xx.MU + mpc83xx.IMISR:
			return uint64(imisr)
		case mpc83xx.MU + mpc83xx.IMIMR:
			return uint64(c.imimr)
		}
	} else {
		switch off {
		case mpc83xx.MU + mpc83xx.OMISR:
			return uint64(omisr)
		case mpc83xx.MU + mpc83xx.OMIMR:
			return uint64(c.omimr)
		}
	}
	c.add("IMMR (%s): load at %#x: no register of that side", v.side(), off)
	return ones(width)
}

// quiet tells that nobody answers.
func (v *immr) quiet() bool {
	v.c.mu.Lock()
	defer v.c.mu.Unlock()
	return v.c.dead && !v.core
}

// Store implements mmio.Bus.
func (v *immr) Store(off uint64, width uint, x uint64) {
	c := v.c
	if at, ok := v.dma(off); ok && !v.quiet() {
		c.DMA.Store(at, width, x)
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.dead && !v.core {
		return
	}
	if width != 4 || off&3 != 0 {
		c.add("IMMR (%s): store of %d bytes at %#x: registers have 4", v.side(), width, off)
		return
	}
	w := uint32(x)
	defer c.lines()
	if r := v.outbound(off); r != nil {
		*r = swap32(w)
		return
	}
	switch {
	case off == mpc83xx.MU+mpc83xx.ODR && v.core:
		// The reserved bits do not stick.
		c.odr |= w & (1<<mpc83xx.OutboundBits - 1)
		atomic.AddUint64(&c.rings[0], 1)
	case off == mpc83xx.MU+mpc83xx.ODR:
		c.odr = c.odr&^w | c.stuckOut
	case off == mpc83xx.MU+mpc83xx.IDR && v.core:
		c.idr = c.idr&^w | c.stuckIn
	case off == mpc83xx.MU+mpc83xx.IDR:
		if w>>mpc83xx.InboundBits != 0 {
			c.add("IMMR (PCI): IDR bit 31 is a machine check")
		}
		c.idr |= w
		atomic.AddUint64(&c.rings[1], 1)
	case off == mpc83xx.MU+mpc83xx.IMIMR && v.core:
		c.imimr = w
	case off == mpc83xx.MU+mpc83xx.OMIMR && !v.core:
		c.omimr = w
	case off == mpc83xx.PITAR0:
		c.pitar = swap32(w) & 0xfffff
		c.aim()
	case off == mpc83xx.PIWAR0:
		c.piwar = swap32(w)
		c.aim()
	default:
		c.add("IMMR (%s): store at %#x: no register of that side", v.side(), off)
	}
}

// Barrier implements mmio.Bus: accesses take effect at once.
func (v *immr) Barrier(mmio.Barrier) {}
