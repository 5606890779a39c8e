package generic

import (
	"github.com/boardlink/boardlink/mmio"
)

// narrow is memory that takes accesses of some widths only. Wider ones are split, low part first; narrower ones go by
// the whole unit, stores by reading it and writing it back. That is right because every unit has a single writer: each
// side writes areas of its own, which are aligned to more than a unit.
//
// A split access of 32 bits may see half of what the other side writes. Loads guard against that (Load). Stores of
// the link page's and FIFOs' words are seen in halves by the other side: a passing value of an epoch is one that nobody
// has, an echo is complete when it equals; a FIFO index beyond 65535 would take the link down once, see
// docs/boards.md. The indices of virtqueues have 16 bits.
type narrow struct {
	m        mmio.Mem
	min, max uint // bytes
}

// limit returns m as it is where all widths are allowed, else behind a bus that keeps to them. Widths are in bits.
func limit(m mmio.Mem, min, max uint) mmio.Mem {
	if min <= 8 && max >= 64 {
		return m
	}
	return mmio.NewBusMem(&narrow{m, min / 8, max / 8}, m.Size(), m.Kind())
}

func (n *narrow) load(off uint64, width uint) uint64 {
	switch width {
	case 1:
		return uint64(n.m.Load8(off))
	case 2:
		return uint64(n.m.Load16(off))
	case 4:
		return uint64(n.m.Load32(off))
	}
	return n.m.Load64(off)
}

func (n *narrow) store(off uint64, width uint, v uint64) {
	switch width {
	case 1:
		n.m.Store8(off, uint8(v))
	case 2:
		n.m.Store16(off, uint16(v))
	case 4:
		n.m.Store32(off, uint32(v))
	default:
		n.m.Store64(off, v)
	}
}

// steady is how often a split load is repeated where its high part moves.
const steady = 4

// Load implements mmio.Bus.
func (n *narrow) Load(off uint64, width uint) uint64 {
	switch {
	case width < n.min:
		unit := off &^ uint64(n.min-1)
		v := n.load(unit, n.min) >> (8 * (off - unit))
		return v & (1<<(8*width) - 1)
	case width <= n.max:
		return n.load(off, width)
	case width == 4 && n.max == 2:
		// The other side writes 32 bits at once: low and high are of one value where the high part is the
		// same before and after the low one.
		hi := n.m.Load16(off + 2)
		for i := 0; ; i++ {
			lo := n.m.Load16(off)
			again := n.m.Load16(off + 2)
			if again == hi || i == steady {
				return uint64(again)<<16 | uint64(lo)
			}
			hi = again
		}
	}
	v := uint64(0)
	for i := uint(0); i < width; i += n.max {
		v |= n.load(off+uint64(i), n.max) << (8 * i)
	}
	return v
}

// Store implements mmio.Bus.
func (n *narrow) Store(off uint64, width uint, v uint64) {
	switch {
	case width < n.min:
		unit := off &^ uint64(n.min-1)
		shift := 8 * (off - unit)
		mask := uint64(1<<(8*width)-1) << shift
		n.store(unit, n.min, n.load(unit, n.min)&^mask|v<<shift&mask)
	case width <= n.max:
		n.store(off, width, v)
	default:
		part := uint64(1)<<(8*n.max) - 1
		for i := uint(0); i < width; i += n.max {
			n.store(off+uint64(i), n.max, v>>(8*i)&part)
		}
	}
}

// Barrier implements mmio.Bus.
func (n *narrow) Barrier(b mmio.Barrier) { n.m.Barrier(b) }
