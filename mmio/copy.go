package mmio

import (
	"encoding/binary"
	"fmt"
	"unsafe"
)

// check panics unless the n bytes at off lie inside the memory.
func (m *Mem) check(off, n uint64) {
	if off > m.size || n > m.size-off {
		panic(fmt.Sprintf("mmio: %#x bytes at offset %#x lie outside a memory of %#x bytes", n, off, m.size))
	}
}

// direct tells that Go may touch the memory as RAM.
func (m *Mem) direct() bool { return m.kind == Cached && m.bus == nil }

// bytes returns checked bytes of direct memory.
func (m *Mem) bytes(off, n uint64) []byte {
	return unsafe.Slice((*byte)(unsafe.Add(m.base, off)), n)
}

// lines is what a copy by the runtime counts as: one for each started 64 bytes.
func lines(n uint64) uint64 { return (n + 63) / 64 }

// misaligned returns how far the address of byte off is from an alignment to the width of loads.
func (m *Mem) misaligned(off uint64) uint64 {
	if m.bus != nil {
		return (m.off + off) & 7
	}
	return (uint64(uintptr(m.base)) + off) & (uint64(m.widths.Load) - 1)
}

// step returns the width of the next access of a copy of n bytes at an address: the
// widest up to max that is aligned and does not pass the end.
func step(addr, n, max uint64) uint64 {
	w := max
	for addr&(w-1) != 0 || w > n {
		w >>= 1
	}
	return w
}

// CopyIn writes src to the memory at off. Device and modelled memory sees naturally
// aligned accesses only, as wide as they can be (Widths), none outside the range. It returns the
// number of bus transactions: one for each access there, one for each started 64
// bytes of cached memory. It panics where the range lies outside the memory.
func (m *Mem) CopyIn(off uint64, src []byte) uint64 {
	n := uint64(len(src))
	m.check(off, n)
	if m.direct() {
		copy(m.bytes(off, n), src)
		return lines(n)
	}
	if m.bus == nil {
		return copyIn(unsafe.Add(m.base, off), src, uint64(m.widths.Store))
	}
	count := uint64(0)
	for len(src) > 0 {
		w := step(m.off+off, uint64(len(src)), 8)
		m.bus.Store(m.off+off, uint(w), little(src[:w]))
		count++
		off += w
		src = src[w:]
	}
	return count
}

// CopyOut reads the memory at off into dst. Device and modelled memory sees naturally
// aligned accesses only, as wide as they can be, none outside the range. It returns the
// number of bus transactions, as CopyIn does. It panics where the range lies outside
// the memory.
func (m *Mem) CopyOut(dst []byte, off uint64) uint64 {
	n := uint64(len(dst))
	m.check(off, n)
	if m.direct() {
		copy(dst, m.bytes(off, n))
		return lines(n)
	}
	if m.bus == nil {
		return copyOut(dst, unsafe.Add(m.base, off), uint64(m.widths.Load))
	}
	count := uint64(0)
	for len(dst) > 0 {
		w := step(m.off+off, uint64(len(dst)), 8)
		putLittle(dst[:w], m.bus.Load(m.off+off, uint(w)))
		count++
		off += w
		dst = dst[w:]
	}
	return count
}

// Zero writes n zero bytes at off, under the same rules as CopyIn.
func (m *Mem) Zero(off, n uint64) uint64 {
	m.check(off, n)
	if m.direct() {
		b := m.bytes(off, n)
		for i := range b {
			b[i] = 0
		}
		return lines(n)
	}
	if m.bus == nil {
		return clearAt(unsafe.Add(m.base, off), n)
	}
	count := uint64(0)
	for n > 0 {
		w := step(m.off+off, n, 8)
		m.bus.Store(m.off+off, uint(w), 0)
		count++
		off += w
		n -= w
	}
	return count
}

// CopyMem copies n bytes from src at soff to dst at doff and returns the number of
// bus transactions on either side, as CopyOut and CopyIn count them. Ranges that
// overlap are allowed in cached memory only. It panics where a range lies
// outside its memory.
func CopyMem(dst *Mem, doff uint64, src *Mem, soff, n uint64) (reads, writes uint64) {
	dst.check(doff, n)
	src.check(soff, n)
	switch {
	case src.direct():
		return lines(n), dst.CopyIn(doff, src.bytes(soff, n))
	case dst.direct():
		return src.CopyOut(dst.bytes(doff, n), soff), lines(n)
	}
	// Two devices may be misaligned against each other: stage in between.
	var stage [512]byte
	for n > 0 {
		s := stage[:]
		// End each piece on an aligned source address, so that only the first
		// and the last need narrow loads.
		if room := uint64(len(s)) - src.misaligned(soff); n < room {
			s = s[:n]
		} else {
			s = s[:room]
		}
		reads += src.CopyOut(s, soff)
		writes += dst.CopyIn(doff, s)
		soff += uint64(len(s))
		doff += uint64(len(s))
		n -= uint64(len(s))
	}
	return reads, writes
}

// The copies to and from mapped device memory. A pointer is made only where an access
// follows, so that none ever leaves the memory.

func copyIn(p unsafe.Pointer, src []byte, max uint64) uint64 {
	count, n := uint64(0), uint64(len(src))
	for i := uint64(0); i < n; {
		at, w := unsafe.Add(p, i), step(uint64(uintptr(p))+i, n-i, max)
		if w >= 8 {
			bytes, times := run(w, n-i, max)
			storeRun(at, src[i:i+bytes], w)
			count += times
			i += bytes
			continue
		}
		count++
		switch w {
		case 4:
			Store32(at, binary.LittleEndian.Uint32(src[i:]))
		case 2:
			Store16(at, binary.LittleEndian.Uint16(src[i:]))
		default:
			Store8(at, src[i])
		}
		i += w
	}
	return count
}

func copyOut(dst []byte, p unsafe.Pointer, max uint64) uint64 {
	count, n := uint64(0), uint64(len(dst))
	for i := uint64(0); i < n; {
		at, w := unsafe.Add(p, i), step(uint64(uintptr(p))+i, n-i, max)
		if w >= 8 {
			bytes, times := run(w, n-i, max)
			loadRun(dst[i:i+bytes], at, w)
			count += times
			i += bytes
			continue
		}
		count++
		switch w {
		case 4:
			binary.LittleEndian.PutUint32(dst[i:], Load32(at))
		case 2:
			binary.LittleEndian.PutUint16(dst[i:], Load16(at))
		default:
			dst[i] = Load8(at)
		}
		i += w
	}
	return count
}

// run returns how many of n bytes can be moved by accesses of w bytes from an address aligned to w on, and how many accesses that takes: all of
// the middle where w is the widest there is, else the one before a wider one, or before the end.
func run(w, n, max uint64) (bytes, accesses uint64) {
	bytes = w
	if w == max {
		bytes = n &^ (w - 1)
	}
	if w == 8 {
		return bytes, bytes / 8 * uint64(wordAccesses)
	}
	return bytes, bytes / w
}

func clearAt(p unsafe.Pointer, n uint64) uint64 {
	count := uint64(0)
	for i := uint64(0); i < n; {
		at, w := unsafe.Add(p, i), step(uint64(uintptr(p))+i, n-i, 8)
		count++
		switch w {
		case 8:
			w = (n - i) &^ 7
			clearWords(at, w)
			count += w/8*uint64(wordAccesses) - 1
		case 4:
			Store32(at, 0)
		case 2:
			Store16(at, 0)
		default:
			Store8(at, 0)
		}
		i += w
	}
	return count
}

// The middle of a copy by single accesses, where assembly cannot be used: src and dst
// are private memory, of any alignment.

func slowStoreWords(p unsafe.Pointer, src []byte) {
	for i := 0; i < len(src); i += 8 {
		Store64(unsafe.Add(p, i), binary.LittleEndian.Uint64(src[i:]))
	}
}

func slowLoadWords(dst []byte, p unsafe.Pointer) {
	for i := 0; i < len(dst); i += 8 {
		binary.LittleEndian.PutUint64(dst[i:], Load64(unsafe.Add(p, i)))
	}
}

// little returns the number that stands in b, low byte first.
func little(b []byte) uint64 {
	v := uint64(0)
	for i := len(b) - 1; i >= 0; i-- {
		v = v<<8 | uint64(b[i])
	}
	return v
}

func putLittle(b []byte, v uint64) {
	for i := range b {
		b[i] = byte(v >> (8 * uint(i)))
	}
}
