package dma

import (
	"fmt"

	"github.com/boardlink/boardlink/mmio"
)

func (s *Span) check(off, n uint64) {
	if off > uint64(s.Len) || n > uint64(s.Len)-off {
		panic(fmt.Sprintf("dma: %#x bytes at offset %#x lie outside a span of %#x bytes in region %q", n, off, s.Len, s.Region.Name))
	}
}

// Addr returns the link address of the span's first byte.
func (s Span) Addr() Addr { return s.Region.Addr + Addr(s.Off) }

// Mem returns the memory of the span's bytes. It panics where the span is empty or lies
// outside its region.
func (s Span) Mem() mmio.Mem {
	m, err := s.Region.Mem.Slice(s.Off, uint64(s.Len))
	if err != nil {
		panic(fmt.Sprintf("dma: span in region %q: %v", s.Region.Name, err))
	}
	return m
}

// RAM returns the span's bytes as ordinary memory, and false where they are device
// memory or modelled. The view stays valid as long as the region is mapped.
func (s Span) RAM() (mmio.RAM, bool) {
	r, ok := s.Region.Mem.RAM()
	if !ok {
		return r, false
	}
	return r.Slice(s.Off, uint64(s.Len)), true
}

// Sub returns the n bytes at off of the span. It panics where they do not lie inside.
func (s Span) Sub(off, n uint32) Span {
	s.check(uint64(off), uint64(n))
	return Span{Region: s.Region, Off: s.Off + uint64(off), Len: n}
}

// CopyIn writes b to the span at off and accounts it. It panics where b does not fit.
func (s Span) CopyIn(off uint32, b []byte) {
	s.check(uint64(off), uint64(len(b)))
	n := s.Region.Mem.CopyIn(s.Off+uint64(off), b)
	s.Region.Account.AddWrites(n, uint64(len(b)))
}

// CopyOut reads the span at off into b and accounts it. It panics where the span has
// fewer bytes.
func (s Span) CopyOut(b []byte, off uint32) {
	s.check(uint64(off), uint64(len(b)))
	n := s.Region.Mem.CopyOut(b, s.Off+uint64(off))
	s.Region.Account.AddReads(n, uint64(len(b)))
}

// CopySpan copies all of src to the start of dst and accounts both. It panics where
// dst is shorter. Spans that overlap are allowed in cached memory only.
func CopySpan(dst, src Span) {
	n := uint64(src.Len)
	dst.check(0, n)
	reads, writes := mmio.CopyMem(&dst.Region.Mem, dst.Off, &src.Region.Mem, src.Off, n)
	src.Region.Account.AddReads(reads, n)
	dst.Region.Account.AddWrites(writes, n)
}

// AccountIovecRead accounts n bytes of the span that a system call read through an
// iovec (writev): one read for each started 64 bytes.
func (s Span) AccountIovecRead(n uint64) { s.Region.Account.AddReads((n+63)/64, n) }

// AccountIovecWrite accounts n bytes of the span that a system call wrote through an
// iovec (readv): one write for each started 64 bytes.
func (s Span) AccountIovecWrite(n uint64) { s.Region.Account.AddWrites((n+63)/64, n) }
