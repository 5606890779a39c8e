package dmamodel

import "github.com/boardlink/boardlink/mmio"

// EDU is the DMA part of QEMU's educational device. Its own buffer is the Range of Options.Memory at 0x40000 that is not Far.
type EDU struct {
	model
	src, dst, n, cmd uint64
	wrote            int
	status           uint32
	chain            chain
}

const (
	eduSize   = 1 << 20
	eduMask   = 1<<28 - 1
	eduBuffer = 0x40000
)

// NewEDU returns a model.
func NewEDU(o Options) *EDU { return &EDU{model: model{o: o}} }

// Mem returns BAR 0.
func (e *EDU) Mem() mmio.Mem { return mmio.NewBusMem(e, eduSize, mmio.Uncached) }

func (e *EDU) width(off uint64, width uint) bool {
	if off < 0x80 && width != 4 || off >= 0x80 && width != 4 && width != 8 {
		e.violate("edu: access of %d bytes at %#x", width, off)
		return false
	}
	return true
}

// Load implements mmio.Bus.
func (e *EDU) Load(off uint64, width uint) uint64 {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.width(off, width) {
		return ^uint64(0)
	}
	switch off {
	case 0x00:
		return 0x010000ed
	case 0x24:
		return uint64(e.status)
	case 0x80:
		return e.src
	case 0x88:
		return e.dst
	case 0x90:
		return e.n
	case 0x98:
		e.looked(&e.chain, e.finish)
		return e.cmd
	}
	e.violate("edu: load of register %#x", off)
	return ^uint64(0)
}

// Store implements mmio.Bus.
func (e *EDU) Store(off uint64, width uint, v uint64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.width(off, width) {
		return
	}
	if off >= 0x80 && e.cmd&1 != 0 {
		e.violate("edu: register %#x written during a transfer: it is ignored", off)
		return
	}
	switch off {
	case 0x64:
		e.status &^= uint32(v)
	case 0x80, 0x88, 0x90:
		*[]*uint64{&e.src, &e.dst, &e.n}[(off-0x80)/8] = v
		e.wrote |= 1 << ((off - 0x80) / 8)
	case 0x98:
		e.reserved("edu: command", v, 7)
		if v&1 == 0 {
			e.violate("edu: a command that starts nothing")
			return
		}
		e.start(v)
	default:
		e.violate("edu: store to register %#x", off)
	}
}

func (e *EDU) start(cmd uint64) {
	if e.wrote != 7 {
		e.violate("edu: started with registers %#x of 7 written", e.wrote)
	}
	e.wrote = 0
	dev, mem := e.dst, e.src
	if cmd&2 != 0 {
		dev, mem = e.src, e.dst
	}
	if e.n == 0 || e.n > 4088 {
		e.violate("edu: transfer of %d bytes: QEMU 7.2 dies at 4096", e.n)
	}
	if dev < eduBuffer || dev+e.n > eduBuffer+4096 {
		e.violate("edu: %d bytes at %#x are not inside the buffer", e.n, dev)
	}
	if (mem+e.n-1)&^eduMask != 0 {
		e.violate("edu: address %#x is cut to 28 bits", mem)
	}
	if e.status != 0 {
		e.violate("edu: started with interrupt status %#x not acknowledged", e.status)
	}
	e.cmd = cmd
	e.begin(&e.chain, []item{{src: e.src, dst: e.dst, n: e.n}}, e.finish)
}

func (e *EDU) finish() {
	o := e.work(&e.chain)
	if o == hung || o == wild {
		return
	}
	e.chain.run = false
	e.cmd &^= 1
	if e.cmd&4 != 0 {
		e.status |= 0x100
		e.irq(&e.chain)
	}
}
