package vring

import (
	"fmt"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
)

// area is one of the three areas of a queue, as this side sees it.
type area struct {
	region *dma.Region
	addr   uint64   // link address
	mem    mmio.Mem // exactly the area
	ram    mmio.RAM // the same, where isRAM
	isRAM  bool
	// direct memory is accessed word by word, inlined, uncounted: RAM on this side of
	// the bus. All else is read and written in pieces as large as they come: a
	// read across stalls, whatever its width.
	direct  bool
	words   uint64 // accesses that one of 64 bits takes
	account *dma.Account
	// What was transferred since the last flush, in bus transactions and bytes.
	reads, readBytes, writes, writeBytes uint64
}

// newArea checks that n bytes of s can serve as the named area: align is what the link
// address must be a multiple of, native what this side's own accesses need.
func newArea(name string, s dma.Span, n, align, native uint64, access dma.Access) (area, error) {
	r := s.Region
	if r == nil {
		return area{}, fmt.Errorf("%s lies in no region", name)
	}
	addr := uint64(r.Addr) + s.Off
	if uint64(s.Len) < n {
		return area{}, fmt.Errorf("%s at %#x has %d bytes, needs %d", name, addr, s.Len, n)
	}
	if addr < s.Off || addr+n < addr {
		return area{}, fmt.Errorf("%s at offset %#x of region %q passes the end of the address space", name, s.Off, r.Name)
	}
	if addr%align != 0 {
		return area{}, fmt.Errorf("%s at %#x is not aligned to %d", name, addr, align)
	}
	if r.Access&access != access {
		return area{}, fmt.Errorf("%s lies in region %q with access %v, needs %v", name, r.Name, r.Access, access)
	}
	m, err := r.Mem.Slice(s.Off, n)
	if err != nil {
		return area{}, fmt.Errorf("%s in region %q: %v", name, r.Name, err)
	}
	a := area{region: r, addr: addr, mem: m, account: r.Account, words: 1}
	if !wide && !m.Modelled() {
		a.words = 2
	}
	a.ram, a.isRAM = m.RAM()
	if a.isRAM && uint64(uintptr(a.ram.Pointer(0)))%native != 0 {
		return area{}, fmt.Errorf("%s in region %q lies in local memory that is not aligned to %d", name, r.Name, native)
	}
	a.direct = a.isRAM && !r.Across && r.Account == nil
	return a, nil
}

func (a *area) load16(off uint64) uint16 {
	a.reads++
	a.readBytes += 2
	return a.mem.Load16(off)
}

func (a *area) load32(off uint64) uint32 {
	a.reads++
	a.readBytes += 4
	return a.mem.Load32(off)
}

func (a *area) store16(off uint64, v uint16) {
	a.writes++
	a.writeBytes += 2
	a.mem.Store16(off, v)
}

func (a *area) store32(off uint64, v uint32) {
	a.writes++
	a.writeBytes += 4
	a.mem.Store32(off, v)
}

// store64 is the store for descriptors: inlined where the memory is direct.
func (a *area) store64(off uint64, v uint64) {
	if a.direct {
		a.ram.Store64(off, v)
		return
	}
	a.writes += a.words
	a.writeBytes += 8
	a.mem.Store64(off, v)
}

func (a *area) copyOut(dst []byte, off uint64) {
	a.reads += a.mem.CopyOut(dst, off)
	a.readBytes += uint64(len(dst))
}

func (a *area) copyIn(off uint64, src []byte) {
	a.writes += a.mem.CopyIn(off, src)
	a.writeBytes += uint64(len(src))
}

// readRing fills dst with n entries of the given width from entry pos of a ring of
// size entries that starts at ringHead: one copy, two where the ring wraps.
func (a *area) readRing(dst []byte, pos, n, size, width uint64) {
	if first := size - pos; n > first {
		a.copyOut(dst[:first*width], ringHead+pos*width)
		a.copyOut(dst[first*width:n*width], ringHead)
		return
	}
	a.copyOut(dst[:n*width], ringHead+pos*width)
}

// writeRing is the reverse of readRing.
func (a *area) writeRing(src []byte, pos, n, size, width uint64) {
	if first := size - pos; n > first {
		a.copyIn(ringHead+pos*width, src[:first*width])
		a.copyIn(ringHead, src[first*width:n*width])
		return
	}
	a.copyIn(ringHead+pos*width, src[:n*width])
}

// flush adds what was transferred to the region's account, where it has one.
func (a *area) flush() {
	if a.account != nil {
		a.flushAccount()
	}
}

func (a *area) flushAccount() {
	if a.reads != 0 {
		a.account.AddReads(a.reads, a.readBytes)
		a.reads, a.readBytes = 0, 0
	}
	if a.writes != 0 {
		a.account.AddWrites(a.writes, a.writeBytes)
		a.writes, a.writeBytes = 0, 0
	}
}

// sameMemory tells that a read from b, across the bus, pushes earlier posted writes to a
// before it: both are the same memory.
func sameMemory(a, b *dma.Region) bool {
	return a == b || a.Addr == b.Addr && a.Name == b.Name && a.Mem.Size() == b.Mem.Size() && a.Across == b.Across
}
