package dmamodel

import (
	"encoding/binary"

	"github.com/boardlink/boardlink/mmio"
)

// DWSize is the size of the registers in bytes.
const DWSize = 0x1200

// DW is the DMA engine of a DesignWare PCIe controller: eDMA with the unrolled register map, or HDMA. Sources: see
// package dma/engine/dwedma.
//
// The interrupt of a chain's last element comes a look before the channel has stopped: only then may its list be written again.
type DW struct {
	model
	hdma bool
	n    [2]int // channels: write, read
	ch   [2][8]dwChannel
	dir  [2]dwDir
}

type dwDir struct {
	enable       bool
	status, mask uint32
	err, errHigh uint32
	llErr        uint32
	done, abort  uint64
	data         [4]uint32
}

type dwChannel struct {
	control1         uint32 // without the state
	state            uint32
	llp              uint64
	wroteLLP, wroteC bool
	chain            chain
	settling         int  // looks from the last interrupt until the channel has stopped
	lie, rie         bool // of the last element
	// HDMA
	enable            uint32
	intStat, intSetup uint32
	stop, abort       uint64
	data              uint32
	wroteCycle        bool
}

// NewDW returns a model with the given numbers of channels, up to 8.
func NewDW(hdma bool, write, read int, o Options) *DW {
	d := &DW{model: model{o: o}, hdma: hdma, n: [2]int{write, read}}
	for i := range d.dir {
		d.dir[i].mask = 0xff00ff
		for j := range d.ch[i] {
			d.ch[i][j].state = 3
		}
	}
	return d
}

// Mem returns the registers, as device memory.
func (d *DW) Mem() mmio.Mem { return mmio.NewBusMem(d, DWSize, mmio.Uncached) }

// Busy makes a channel (of direction 0 write, 1 read) as a dead driver leaves it: at work.
func (d *DW) Busy(dir, n int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	c := &d.ch[dir][n]
	c.state, c.chain = 1, chain{run: true, end: hung}
}

// where finds the channel of an offset; reg is the offset in it.
func (d *DW) where(off uint64) (dir, n int, reg uint64, ok bool) {
	base := uint64(0x200)
	if d.hdma {
		base = 0
	}
	if off < base {
		return 0, 0, 0, false
	}
	off -= base
	n, dir, reg = int(off/0x200), int(off/0x100&1), off%0x100
	return dir, n, reg, n < d.n[dir]
}

// Load implements mmio.Bus.
func (d *DW) Load(off uint64, width uint) uint64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	if width != 4 || off%4 != 0 {
		d.violate("dw: load of %d bytes at %#x", width, off)
		return ^uint64(0)
	}
	dir, n, reg, ok := d.where(off)
	switch {
	case ok && d.hdma:
		return uint64(d.hdmaLoad(dir, n, reg))
	case ok && reg == 0:
		c := &d.ch[dir][n]
		d.look(dir, n)
		return uint64(c.control1 | c.state<<5)
	case ok:
		d.violate("dw: load of channel register %#x", off)
		return 0
	}
	if off == 0x008 && !d.hdma {
		return uint64(d.n[0] | d.n[1]<<16)
	}
	for i := range d.dir {
		r := &d.dir[i]
		switch off {
		case [2]uint64{0x4c, 0xa0}[i]:
			for n := 0; n < d.n[i]; n++ {
				d.look(i, n)
			}
			return uint64(r.status)
		case [2]uint64{0x54, 0xa8}[i]:
			return uint64(r.mask)
		case [2]uint64{0x5c, 0xb4}[i]:
			return uint64(r.err)
		case [2]uint64{0x90, 0xc4}[i]:
			return uint64(r.llErr)
		}
		if k := off - [2]uint64{0x70, 0xdc}[i]; k < 16 {
			return uint64(r.data[k/4])
		}
	}
	if off == 0xb8 {
		return uint64(d.dir[1].errHigh)
	}
	d.violate("dw: load of register %#x", off)
	return ^uint64(0)
}

// look lets time pass for a channel: one look for a channel that has reported its end, to stop.
func (d *DW) look(dir, n int) {
	c := &d.ch[dir][n]
	if c.settling > 0 {
		if c.settling--; c.settling == 0 {
			c.state, c.chain.run = 3, false
		}
		return
	}
	d.looked(&c.chain, func() { d.finish(dir, n) })
}

// Store implements mmio.Bus.
func (d *DW) Store(off uint64, width uint, v uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if width != 4 || off%4 != 0 {
		d.violate("dw: store of %d bytes at %#x", width, off)
		return
	}
	w := uint32(v)
	dir, n, reg, ok := d.where(off)
	switch {
	case ok && d.hdma:
		d.hdmaStore(dir, n, reg, w)
		return
	case ok:
		d.edmaStore(dir, n, reg, w)
		return
	}
	for i := range d.dir {
		r := &d.dir[i]
		if i == 0 && !d.known(off) {
			d.violate("dw: store to register %#x", off)
			return
		}
		switch off {
		case [2]uint64{0x0c, 0x2c}[i]:
			d.reserved("dw: engine enable", v, 1)
			r.enable = w&1 != 0
		case [2]uint64{0x10, 0x30}[i]:
			d.reserved("dw: doorbell", v, 1<<31|7)
			d.doorbell(i, int(w&7), w>>31 != 0)
		case [2]uint64{0x54, 0xa8}[i]:
			d.reserved("dw: interrupt mask", v, 0xff00ff)
			r.mask = w
		case [2]uint64{0x58, 0xac}[i]:
			d.reserved("dw: interrupt clear", v, 0xff00ff)
			r.status &^= w
			r.err &^= w >> 16
			for n := 0; n < d.n[i]; n++ {
				if w>>n&1 != 0 && d.ch[i][n].settling > 0 {
					d.violate("dw: %d channel %d: interrupt cleared while it runs still", i, n)
				}
			}
		case [2]uint64{0x90, 0xc4}[i]:
			d.reserved("dw: linked list error enable", v, 0xff00ff)
			r.llErr = w
		case [2]uint64{0x60, 0xcc}[i]:
			r.done = r.done&^0xffffffff | v
		case [2]uint64{0x64, 0xd0}[i]:
			r.done = r.done&0xffffffff | v<<32
		case [2]uint64{0x68, 0xd4}[i]:
			r.abort = r.abort&^0xffffffff | v
		case [2]uint64{0x6c, 0xd8}[i]:
			r.abort = r.abort&0xffffffff | v<<32
		}
		if k := off - [2]uint64{0x70, 0xdc}[i]; k < 16 {
			r.data[k/4] = w
		}
	}
}

// known tells whether a driver may write a register that all channels share.
func (d *DW) known(off uint64) bool {
	switch off {
	case 0x0c, 0x10, 0x2c, 0x30, 0x54, 0x58, 0x60, 0x64, 0x68, 0x6c, 0x90, 0xa8, 0xac, 0xc4, 0xcc, 0xd0, 0xd4, 0xd8:
		return !d.hdma
	}
	return !d.hdma && (off-0x70 < 16 || off-0xdc < 16)
}

func (d *DW) edmaStore(dir, n int, reg uint64, w uint32) {
	c := &d.ch[dir][n]
	if c.chain.run {
		d.violate("dw: register %#x of channel %d written while it runs", reg, n)
		return
	}
	switch reg {
	case 0x00:
		d.reserved("dw: control1", uint64(w), 0x31f)
		c.control1, c.wroteC = w, true
	case 0x1c:
		c.llp, c.wroteLLP = c.llp&^0xffffffff|uint64(w), true
	case 0x20:
		c.llp = c.llp&0xffffffff | uint64(w)<<32
	default:
		d.violate("dw: store to channel register %#x", reg)
	}
}

func (d *DW) doorbell(dir, n int, stop bool) {
	if n >= d.n[dir] {
		d.violate("dw: doorbell for channel %d of %d", n, d.n[dir])
		return
	}
	c := &d.ch[dir][n]
	if stop {
		d.halt(c)
		d.dir[dir].status |= 0x10000 << n
		return
	}
	if !d.dir[dir].enable {
		d.violate("dw: doorbell while the engine is disabled")
	}
	if !c.wroteC || c.control1&0x300 != 0x300 {
		d.violate("dw: channel %d started with control %#x: no linked list", n, c.control1)
	}
	if d.dir[dir].status>>n&0x10001 != 0 {
		d.violate("dw: channel %d started with interrupt status %#x not cleared", n, d.dir[dir].status)
	}
	if d.dir[dir].llErr>>n&1 == 0 {
		d.violate("dw: channel %d started with its list errors disabled", n)
	}
	if d.dir[dir].mask>>n&0x10001 != 0 {
		d.violate("dw: channel %d started with its interrupts masked", n)
	}
	d.run(dir, n)
}

// halt stops a channel, if it can be.
func (d *DW) halt(c *dwChannel) {
	if c.chain.run && c.chain.end != wild {
		c.chain.run, c.settling, c.state = false, 0, 3
	}
}

// run starts a channel.
func (d *DW) run(dir, n int) {
	c := &d.ch[dir][n]
	if c.chain.run {
		d.violate("dw: channel %d started while it runs", n)
		return
	}
	if !c.wroteLLP {
		d.violate("dw: channel %d started without a list", n)
	}
	c.wroteC, c.wroteLLP, c.wroteCycle = false, false, false
	items := d.fetch(dir, c)
	c.state = 1
	d.begin(&c.chain, items, func() { d.finish(dir, n) })
}

// fetch reads the list up to the element whose cycle bit is not the consumer's.
func (d *DW) fetch(dir int, c *dwChannel) []item {
	var items []item
	e := binary.LittleEndian
	if c.llp%8 != 0 {
		d.violate("dw: list at %#x is not aligned to 8", c.llp)
	}
	c.lie, c.rie = false, false
	for at := c.llp; ; at += 24 {
		b, r := d.at(at, 24, false)
		if b == nil {
			d.violate("dw: no memory for a list element at %#x", at)
			return items
		}
		if r.Far {
			d.violate("dw: list element at %#x lies across the bus", at)
		}
		control := e.Uint32(b)
		if control&4 != 0 {
			d.reserved("dw: link element", uint64(control), 7)
			if control&1 != 0 {
				d.violate("dw: the link at %#x goes on: the list has no end", at)
			} else if control&2 == 0 {
				d.violate("dw: the link at %#x does not toggle the cycle", at)
			}
			if e.Uint64(b[8:]) != c.llp {
				d.violate("dw: the link at %#x points to %#x, not to the list's start %#x", at, e.Uint64(b[8:]), c.llp)
			}
			break
		}
		d.reserved("dw: list element", uint64(control), 0x1f)
		if control&1 == 0 {
			d.violate("dw: the list ends at %#x without a link", at)
			break
		}
		if c.lie {
			d.violate("dw: an interrupt before the last element")
		}
		c.lie, c.rie = control&8 != 0, control&16 != 0
		it := item{src: e.Uint64(b[8:]), dst: e.Uint64(b[16:]), n: uint64(e.Uint32(b[4:]))}
		if it.n == 0 {
			d.violate("dw: element of no bytes at %#x", at)
		}
		_, from := d.at(it.src, 1, false)
		_, to := d.at(it.dst, 1, true)
		if from == nil || to == nil || from.Far == to.Far || from.Far != (dir == 1) {
			d.violate("dw: %#x to %#x is not what a %s channel can do", it.src, it.dst, [2]string{"write", "read"}[dir])
		}
		if items = append(items, it); len(items) > 4096 {
			d.violate("dw: the list does not end")
			break
		}
	}
	if len(items) == 0 {
		d.violate("dw: an empty list at %#x", c.llp)
	}
	if !c.lie {
		d.violate("dw: the last element raises no interrupt")
	}
	if c.rie && d.message(dir, c) == 0 {
		d.violate("dw: a remote interrupt without an address to write to")
	}
	return items
}

func (d *DW) message(dir int, c *dwChannel) uint64 {
	if d.hdma {
		return c.stop
	}
	return d.dir[dir].done
}

func (d *DW) finish(dir, n int) {
	c := &d.ch[dir][n]
	o := d.work(&c.chain)
	if o == hung || o == wild {
		return
	}
	if o == bad {
		c.state, c.chain.run = 2, false
		if d.hdma {
			c.intStat |= 1<<2 | 1<<3
		} else {
			d.dir[dir].status |= 0x10000 << n
			d.dir[dir].err |= 1 << n
		}
	} else {
		c.settling = 2
		if d.hdma {
			c.intStat |= 1
		} else {
			d.dir[dir].status |= 1 << n
		}
	}
	if c.rie {
		d.irq(&c.chain)
	}
}

func (d *DW) hdmaLoad(dir, n int, reg uint64) uint32 {
	c := &d.ch[dir][n]
	switch reg {
	case 0x80:
		d.look(dir, n)
		return c.state
	case 0x84:
		d.look(dir, n)
		return c.intStat
	case 0x88:
		return c.intSetup
	}
	d.violate("hdma: load of register %#x", reg)
	return 0
}

func (d *DW) hdmaStore(dir, n int, reg uint64, w uint32) {
	c := &d.ch[dir][n]
	if c.chain.run && reg != 0x04 && reg != 0x8c {
		d.violate("hdma: register %#x of channel %d written while it runs", reg, n)
		return
	}
	switch reg {
	case 0x00:
		d.reserved("hdma: enable", uint64(w), 1)
		c.enable = w
	case 0x04:
		switch w {
		case 1:
			if c.enable == 0 {
				d.violate("hdma: doorbell while the channel is disabled")
			}
			if !c.wroteC || c.control1&1 == 0 || !c.wroteCycle {
				d.violate("hdma: channel %d started without control or cycle", n)
			}
			if c.intStat&5 != 0 {
				d.violate("hdma: channel %d started with interrupt status %#x not cleared", n, c.intStat)
			}
			d.run(dir, n)
		case 2:
			d.halt(c)
			c.intStat |= 4
		default:
			d.violate("hdma: doorbell %#x", w)
		}
	case 0x10:
		c.llp, c.wroteLLP = c.llp&^0xffffffff|uint64(w), true
	case 0x14:
		c.llp = c.llp&0xffffffff | uint64(w)<<32
	case 0x18:
		d.reserved("hdma: cycle", uint64(w), 3)
		if w != 3 {
			d.violate("hdma: cycle %#x", w)
		}
		c.wroteCycle = true
	case 0x34:
		d.reserved("hdma: control1", uint64(w), 1)
		c.control1, c.wroteC = w, true
	case 0x88:
		d.reserved("hdma: interrupt setup", uint64(w), 0x7f)
		if w&5 != 0 {
			d.violate("hdma: interrupts masked")
		}
		c.intSetup = w
	case 0x8c:
		d.reserved("hdma: interrupt clear", uint64(w), 7)
		if c.settling > 0 {
			d.violate("hdma: channel %d: interrupt cleared while it runs still", n)
		}
		if w&4 != 0 {
			w |= 0xf8
		}
		c.intStat &^= w
	case 0x90:
		c.stop = c.stop&^0xffffffff | uint64(w)
	case 0x94:
		c.stop = c.stop&0xffffffff | uint64(w)<<32
	case 0xa0:
		c.abort = c.abort&^0xffffffff | uint64(w)
	case 0xa4:
		c.abort = c.abort&0xffffffff | uint64(w)<<32
	case 0xa8:
		c.data = w
	default:
		d.violate("hdma: store to register %#x", reg)
	}
}
