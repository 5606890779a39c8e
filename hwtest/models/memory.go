//go:build linux

package models

import (
	"fmt"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/mmio"
)

// Memory is a board's memory. The board sees it as RAM (Local), the carrier through a Bus that takes aligned accesses of
// the allowed widths only.
type Memory struct {
	reads, writes uint64 // atomic, first for their alignment
	base          uint64 // atomic: where the window leads to
	faults
	off    uint32 // atomic: 1 where nobody answers
	widths uint32 // of accesses, a set of 1, 2, 4, 8
	b      []byte
	dev    mmio.Mem // the same bytes, accessed as a device's
}

// NewMemory makes size bytes, a multiple of the page, that take accesses of the given widths, in bytes, through the bus. Close it.
func NewMemory(size uint64, widths ...uint) (*Memory, error) {
	b, err := unix.Mmap(-1, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("models: %d bytes of memory: %w", size, err)
	}
	m := &Memory{b: b, dev: mmio.NewMem(unsafe.Pointer(&b[0]), size, mmio.Uncached)}
	for _, w := range widths {
		m.widths |= uint32(w)
	}
	return m, nil
}

// Local is the memory as the board sees it: RAM, from off on.
func (m *Memory) Local(off, size uint64) mmio.Mem {
	s, err := mmio.FromBytes(m.b).Slice(off, size)
	if err != nil {
		panic(err)
	}
	return s
}

// Aim lets the window lead to offset base.
func (m *Memory) Aim(base uint64) { atomic.StoreUint64(&m.base, base) }

// Answer lets the window answer, or not: then loads are all-ones and stores vanish.
func (m *Memory) Answer(on bool) {
	v := uint32(1)
	if on {
		v = 0
	}
	atomic.StoreUint32(&m.off, v)
}

// Accesses returns how many loads and stores came through the bus.
func (m *Memory) Accesses() (reads, writes uint64) {
	return atomic.LoadUint64(&m.reads), atomic.LoadUint64(&m.writes)
}

func (m *Memory) allowed(what string, off uint64, width uint) (uint64, bool) {
	switch at := off + atomic.LoadUint64(&m.base); {
	case width&(width-1) != 0 || m.widths&uint32(width) == 0:
		m.add("window: %s of %d bytes at %#x: the board takes no such accesses", what, width, off)
	case off%uint64(width) != 0:
		m.add("window: %s of %d bytes at %#x: misaligned", what, width, off)
	case at+uint64(width) > m.dev.Size():
		m.add("window: %s of %d bytes at %#x: outside the memory", what, width, off)
	default:
		return at, true
	}
	return 0, false
}

// Load implements mmio.Bus.
func (m *Memory) Load(off uint64, width uint) uint64 {
	atomic.AddUint64(&m.reads, 1)
	at, ok := m.allowed("load", off, width)
	if !ok || atomic.LoadUint32(&m.off) != 0 {
		return ones(width)
	}
	return load(&m.dev, at, width)
}

// Store implements mmio.Bus.
func (m *Memory) Store(off uint64, width uint, v uint64) {
	atomic.AddUint64(&m.writes, 1)
	at, ok := m.allowed("store", off, width)
	if !ok || atomic.LoadUint32(&m.off) != 0 {
		return
	}
	store(&m.dev, at, width, v)
}

// Barrier implements mmio.Bus.
func (m *Memory) Barrier(b mmio.Barrier) { m.dev.Barrier(b) }

// Close unmaps the memory; nothing may use it any more.
func (m *Memory) Close() error { return unix.Munmap(m.b) }

func load(m *mmio.Mem, off uint64, width uint) uint64 {
	switch width {
	case 1:
		return uint64(m.Load8(off))
	case 2:
		return uint64(m.Load16(off))
	case 4:
		return uint64(m.Load32(off))
	}
	return m.Load64(off)
}

func store(m *mmio.Mem, off uint64, width uint, v uint64) {
	switch width {
	case 1:
		m.Store8(off, uint8(v))
	case 2:
		m.Store16(off, uint16(v))
	case 4:
		m.Store32(off, uint32(v))
	default:
		m.Store64(off, v)
	}
}
