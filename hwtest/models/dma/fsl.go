package dmamodel

import (
	"encoding/binary"
	"math/bits"

	"github.com/boardlink/boardlink/mmio"
)

// FSLSize is the size of the registers in bytes: four channels.
const FSLSize = 0x200

// FSL is the DMA controller of an MPC83xx, or of an MPC85xx with BigEndian: four channels, direct and chained mode.
// Sources: see package dma/engine/fsl.
type FSL struct {
	model
	big bool
	ch  [4]fslChannel
}

type fslChannel struct {
	mr, sr, bcr    uint32
	cdar, sar, dar uint64
	wrote          int // registers written since the last start, by bit
	chain          chain
	direct         bool
}

const (
	fslCDAR = 1 << iota
	fslSAR
	fslDAR
	fslBCR
)

const (
	fslMaxCount = 0x3ffffff
	fslMR83     = 0x0ffffc87
	fslMR85     = 0x0f27f7ff
	fslSnoop85  = 0x00050000
	fslMaxLinks = 1 << 12
)

// NewFSL returns a model.
func NewFSL(bigEndian bool, o Options) *FSL { return &FSL{model: model{o: o}, big: bigEndian} }

// Mem returns the registers, as device memory.
func (f *FSL) Mem() mmio.Mem { return mmio.NewBusMem(f, FSLSize, mmio.Uncached) }

// Busy makes a channel as a dead driver leaves it: at work, and with an error in its status.
func (f *FSL) Busy(n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	c := &f.ch[n]
	c.mr, c.sr = 1, 0x84
	c.chain = chain{run: true, end: hung}
}

// Reset makes all channels idle, as a reset of the chip does.
func (f *FSL) Reset() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ch = [4]fslChannel{}
}

func (f *FSL) access(off uint64, width uint) (*fslChannel, uint64, bool) {
	if width != 4 || off%4 != 0 || off >= FSLSize {
		f.violate("fsl: access of %d bytes at %#x: registers are words of 32 bits", width, off)
		return nil, 0, false
	}
	return &f.ch[off/0x80], off % 0x80, true
}

// Load implements mmio.Bus.
func (f *FSL) Load(off uint64, width uint) uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	c, reg, ok := f.access(off, width)
	if !ok {
		return ^uint64(0)
	}
	var v uint32
	switch reg {
	case 0x00:
		v = c.mr
	case 0x04:
		f.looked(&c.chain, func() { f.finish(c) })
		v = c.sr
	case 0x20:
		v = c.bcr
	default:
		if v, ok = f.half(c, reg); !ok {
			f.violate("fsl: load of reserved register %#x", off)
		}
	}
	if f.big {
		v = bits.ReverseBytes32(v)
	}
	return uint64(v)
}

// half returns 32 bits of an address register.
func (f *FSL) half(c *fslChannel, reg uint64) (uint32, bool) {
	for base, v := range map[uint64]uint64{0x08: c.cdar, 0x10: c.sar, 0x18: c.dar} {
		switch {
		case f.big && reg == base:
			return uint32(v >> 32), true
		case f.big && reg == base+4, !f.big && reg == base:
			return uint32(v), true
		}
	}
	return 0, false
}

// Store implements mmio.Bus.
func (f *FSL) Store(off uint64, width uint, v uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	c, reg, ok := f.access(off, width)
	if !ok {
		return
	}
	w := uint32(v)
	if f.big {
		w = bits.ReverseBytes32(w)
	}
	busy := c.chain.run
	set := func(what int, p *uint64, high bool) {
		if busy {
			f.violate("fsl: register %#x written while the channel is busy", off)
			return
		}
		if high {
			*p = *p&0xffffffff | uint64(w)<<32
			return
		}
		*p = *p&^0xffffffff | uint64(w)
		c.wrote |= what
	}
	switch reg {
	case 0x00:
		f.mode(c, w)
	case 0x04:
		clear := uint32(0x83)
		if f.big {
			clear = 0x9b
		}
		f.reserved("fsl: SR", uint64(w), uint64(clear))
		c.sr &^= w & clear
	case 0x20:
		if busy {
			f.violate("fsl: BCR written while the channel is busy")
		}
		c.bcr = w
		c.wrote |= fslBCR
	case 0x08:
		set(fslCDAR, &c.cdar, f.big)
	case 0x10:
		set(fslSAR, &c.sar, f.big)
	case 0x18:
		set(fslDAR, &c.dar, f.big)
	case 0x0c, 0x14, 0x1c:
		if !f.big {
			f.violate("fsl: store to reserved register %#x", off)
			return
		}
		set([]int{fslCDAR, fslSAR, fslDAR}[(reg-0x0c)/8], []*uint64{&c.cdar, &c.sar, &c.dar}[(reg-0x0c)/8], false)
	default:
		f.violate("fsl: store to reserved register %#x", off)
	}
}

// mode is a store to MR.
func (f *FSL) mode(c *fslChannel, w uint32) {
	allowed := uint64(fslMR83)
	if f.big {
		allowed = fslMR85
	}
	f.reserved("fsl: MR", uint64(w), allowed)
	old := c.mr
	c.mr = w &^ 8
	if f.big && w&8 != 0 || w&1 == 0 && old&1 != 0 {
		// Aborted, or halted.
		if c.chain.run && c.chain.end != wild {
			c.chain.run = false
			c.sr &^= 4
			if f.big && w&8 != 0 {
				c.sr |= 0x20
			}
		}
		return
	}
	if w&1 == 0 || old&1 != 0 {
		return
	}
	// CS from 0 to 1 starts.
	if c.chain.run {
		f.violate("fsl: started while busy")
		return
	}
	if c.sr&0x90 != 0 {
		f.violate("fsl: started with an error in the status %#x", c.sr)
	}
	c.sr &^= 0x20
	var items []item
	c.direct = w&4 != 0
	if c.direct {
		if need := fslSAR | fslDAR | fslBCR; c.wrote&need != need {
			f.violate("fsl: direct transfer started with registers %#x of %#x written", c.wrote, need)
		}
		items = []item{f.one(c.sar, c.dar, c.bcr)}
	} else {
		if c.wrote&fslCDAR == 0 {
			f.violate("fsl: chain started without writing CDAR")
		}
		items = f.fetch(c.cdar)
	}
	c.wrote = 0
	c.sr |= 4
	f.begin(&c.chain, items, func() { f.finish(c) })
}

// one checks a transfer.
func (f *FSL) one(sar, dar uint64, n uint32) item {
	if n == 0 || n > fslMaxCount {
		f.violate("fsl: transfer of %d bytes", n)
	}
	for _, a := range []*uint64{&sar, &dar} {
		if f.big {
			if *a>>32&^0xf != fslSnoop85 {
				f.violate("fsl: attributes %#x do not snoop", *a>>32)
			}
			*a &= 0xfffffffff
		} else if *a>>32 != 0 {
			f.violate("fsl: address %#x has more than 32 bits", *a)
		}
	}
	return item{src: sar, dst: dar, n: uint64(n)}
}

// fetch reads the link descriptors.
func (f *FSL) fetch(at uint64) []item {
	var items []item
	for {
		snoop := at & 0x10
		if !f.big && snoop == 0 {
			f.violate("fsl: descriptor at %#x is not snooped", at)
		}
		addr := at &^ 0x10
		if f.big {
			addr = at
		}
		if addr&0x1f != 0 {
			f.violate("fsl: descriptor at %#x is not aligned to 32", addr)
			return items
		}
		b, _ := f.at(addr, 32, false)
		if b == nil {
			f.violate("fsl: no memory for a descriptor at %#x", addr)
			return items
		}
		var src, dst, next uint64
		var n, rest uint32
		if f.big {
			e := binary.BigEndian
			src, dst, next, n, rest = e.Uint64(b), e.Uint64(b[8:]), e.Uint64(b[16:]), e.Uint32(b[24:]), e.Uint32(b[28:])
		} else {
			e := binary.LittleEndian
			src, dst, next, n, rest = e.Uint64(b), e.Uint64(b[8:]), e.Uint64(b[16:]), e.Uint32(b[24:]), e.Uint32(b[28:])
		}
		if rest != 0 {
			f.violate("fsl: descriptor at %#x: reserved word %#x", addr, rest)
		}
		items = append(items, f.one(src, dst, n))
		if next&1 != 0 {
			return items
		}
		if at = next; len(items) == fslMaxLinks {
			f.violate("fsl: the chain does not end")
			return items
		}
	}
}

// finish does the chain's work.
func (f *FSL) finish(c *fslChannel) {
	o := f.work(&c.chain)
	if o == hung || o == wild {
		return
	}
	c.chain.run = false
	c.sr &^= 4
	if o == bad {
		c.sr |= 0x80
		if f.big && c.mr&0x40 != 0 || !f.big && c.mr&0x80 != 0 {
			f.irq(&c.chain)
		}
		return
	}
	switch {
	case !f.big:
		c.sr |= 2 | 1
		if c.mr&0x80 != 0 {
			f.irq(&c.chain)
		}
	case c.direct:
		c.sr |= 2
		if c.mr&0x200 != 0 {
			f.irq(&c.chain)
		}
	default:
		c.sr |= 8 | 2
		if c.mr&0x100 != 0 {
			f.irq(&c.chain)
		}
	}
}
