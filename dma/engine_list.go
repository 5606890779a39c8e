package dma

import (
	"errors"
	"fmt"
)

// ErrListLength: the two scatter/gather lists of a copy have different lengths.
var ErrListLength = errors.New("dma: scatter/gather lists of different lengths")

// AppendCopies cuts a copy between two scatter/gather lists into copies of one span each, all with the
// given tag, and appends them to dst. Empty spans are passed over. It fails with ErrListLength, and
// then appends nothing, where the lists have different lengths. It allocates only where dst has no room.
func AppendCopies(dst []Copy, to, from []Span, tag uint64) ([]Copy, error) {
	kept := len(dst)
	var i, j int      // spans
	var io, jo uint32 // bytes of them that are dealt with
	for {
		for i < len(to) && io == to[i].Len {
			i, io = i+1, 0
		}
		for j < len(from) && jo == from[j].Len {
			j, jo = j+1, 0
		}
		if i == len(to) && j == len(from) {
			return dst, nil
		}
		if i == len(to) || j == len(from) {
			return dst[:kept], fmt.Errorf("%w: %d bytes to %d", ErrListLength, ListLen(from), ListLen(to))
		}
		n := to[i].Len - io
		if m := from[j].Len - jo; m < n {
			n = m
		}
		dst = append(dst, Copy{Dst: to[i].Sub(io, n), Src: from[j].Sub(jo, n), Tag: tag})
		io += n
		jo += n
	}
}

// ListLen returns the length of a scatter/gather list in bytes.
func ListLen(l []Span) uint64 {
	n := uint64(0)
	for i := range l {
		n += uint64(l[i].Len)
	}
	return n
}

// overlap tells whether n bytes at a and m bytes at b share a byte. Neither passes the end of
// the address space.
func overlap(a Addr, n uint32, b Addr, m uint32) bool {
	return n != 0 && m != 0 && uint64(a) <= uint64(b)+uint64(m-1) && uint64(b) <= uint64(a)+uint64(n-1)
}
