package vring

import (
	"fmt"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
)

// packed is what both sides of a packed virtqueue (virtio 1.2, 2.8) have in common.
//
// The barriers are those of ring, with a descriptor's flags in the place of the index:
//
//	A  publish: addresses, lengths, ids, the flags of all descriptors of a batch but the first |
//	   write barrier | the flags of the first. The other side looks at descriptors in their
//	   order, so nothing of a batch is seen before its first one is.
//	B  scan: flags, ids, lengths of as many descriptors as are marked | read barrier |
//	   their addresses, the data.
//
// Flags, id and length of a descriptor are one aligned word of 64 bits, and are read as one where the machine
// can: who finds the flags set finds the rest, which was written before them. Where it cannot, flags and id are
// one word of 32 bits, and read first.
type packed struct {
	words     []packedWord // flags, ids, lengths as scanned
	event     uint32       // own event suppression word, as written
	enable    uint32       // that which asks to be notified of everything
	unsettled bool         // it may not have reached the other side since it was written

	since   uint32 // descriptors made available, or used, since NeedKick, NeedCall
	anyhow  bool   // the first batch after a restart notifies
	scanned uint64 // looks and ...
	moved   uint64 // ... those that found something, of this call
}

// Alignments of the areas of a packed queue in bytes (virtio 1.2, 2.8).
const (
	PackedDescAlign   = 16
	PackedDriverAlign = 4
	PackedDeviceAlign = 4
)

// Flags of packed descriptors (virtio 1.2, 2.8.1), besides those of split ones.
const (
	descAvail = 1 << 7
	descUsed  = 1 << 15
	descMark  = descAvail | descUsed
)

// Flags of the event suppression structures (virtio 1.2, 2.8.10): le16 offset and wrap counter, le16 flags.
const (
	eventEnable  = 0
	eventDisable = 1
	eventDesc    = 2
	eventFlags   = 3 // the others are reserved
)

// wrapBit is the wrap counter beside a position, as in State and in event suppression.
const wrapBit = 1 << 15

// PackedSizes returns the lengths in bytes of the three areas of a packed virtqueue of n descriptors
// (virtio 1.2, 2.8).
func PackedSizes(n uint16) (desc, driver, device uint64) { return descSize * uint64(n), 4, 4 }

// availMark returns the bits that mark a descriptor at position at, with its wrap counter, as
// available, usedMark those that mark it as used.
func availMark(at uint16) uint16 {
	if at&wrapBit != 0 {
		return descAvail
	}
	return descUsed
}

func usedMark(at uint16) uint16 {
	if at&wrapBit != 0 {
		return descMark
	}
	return 0
}

// packedWord is the second half of a packed descriptor, as it was read: once.
type packedWord uint64 // le32 len, le16 id, le16 flags

func (w packedWord) len() uint32   { return uint32(w) }
func (w packedWord) id() uint16    { return uint16(w >> 32) }
func (w packedWord) flags() uint16 { return uint16(w >> 48) }

// alone tells whether it is that of a chain of one buffer.
func (w packedWord) alone() bool { return w.flags()&(descNext|descIndirect) == 0 }

// setupPacked checks what both sides of a packed queue need.
func (q *ring) setupPacked(c *Config) error {
	n := c.Size
	if n == 0 || n > MaxSize {
		return fmt.Errorf("size %d is not from 1 to %d", n, MaxSize)
	}
	desc, driver, device := PackedSizes(n)
	q.packed = true
	if err := q.place(c, desc, driver, device, PackedDriverAlign, dma.DeviceRead|dma.DeviceWrite); err != nil {
		return err
	}
	return nil
}

// packedState checks a state and returns it, the zero one as that of a new queue, with the
// number of descriptors in flight.
func (q *ring) packedState(s State) (State, uint16, error) {
	if s == (State{}) {
		s = State{Avail: wrapBit, Used: wrapBit}
	} else if !s.Packed {
		return s, 0, errSplitState
	}
	n, err := packedInFlight(s, q.size)
	if err != nil {
		return s, 0, err
	}
	s.Packed = true
	return s, n, nil
}

// packedInFlight returns how many descriptors are in flight in the State of a packed queue of size descriptors.
func packedInFlight(s State, size uint16) (uint16, error) {
	avail, used := s.Avail&^wrapBit, s.Used&^wrapBit
	if avail >= size || used >= size {
		return 0, fmt.Errorf("positions %d and %d in a queue of %d", avail, used, size)
	}
	n := int(avail) - int(used)
	if (s.Avail^s.Used)&wrapBit != 0 {
		n += int(size)
	}
	if n < 0 || n > int(size) {
		return 0, fmt.Errorf("%d descriptors in flight in a queue of %d", n, size)
	}
	return uint16(n), nil
}

// forward moves a position with its wrap counter on by n descriptors, at most the size; back
// moves it back.
func (q *ring) forward(at, n uint16) uint16 {
	pos := uint32(at&^wrapBit) + uint32(n)
	wrap := at & wrapBit
	if pos >= uint32(q.size) {
		pos -= uint32(q.size)
		wrap ^= wrapBit
	}
	return uint16(pos) | wrap
}

func (q *ring) back(at, n uint16) uint16 {
	pos, wrap := at&^wrapBit, at&wrapBit
	if pos < n {
		pos += q.size
		wrap ^= wrapBit
	}
	return pos - n | wrap
}

// whole tells that the flags, id and length of a descriptor may be read by a plain load of 64 bits: they are one
// access, and no race detector watches.
const whole = wide && !raceEnabled

// tail reads flags, id and length of a descriptor in memory that is not direct; off is that of the length.
func (q *ring) tail(off uint64) uint64 {
	a := &q.desc
	if wide || a.mem.Modelled() {
		a.reads++
		a.readBytes += 8
		return a.mem.Load64(off)
	}
	f := a.load32(off + 4)
	q.acquire()
	return uint64(f)<<32 | uint64(a.load32(off))
}

// scan reads the flags, ids and lengths of descriptors from position at on, as long as they
// are marked (as used, else as available), to words, and returns their number. Then their addresses, and
// what they stand for, may be read.
func (q *ring) scan(p *packed, words []packedWord, at uint16, used bool) int {
	n, pos, wrap := 0, int(at&^wrapBit), at&wrapBit
	direct, ram := q.desc.direct, q.desc.ram
	for n < len(words) {
		mark := uint64(availMark(wrap)) << 48
		if used {
			mark = uint64(usedMark(wrap)) << 48
		}
		end := n + int(q.size) - pos
		if end > len(words) {
			end = len(words)
		}
		off := uint64(pos)*descSize + 8
		lap := words[n:end]
		k := 0
		if direct && whole {
			for ; k < len(lap); k++ {
				w := ram.Load64(off)
				if w&(descMark<<48) != mark {
					break
				}
				lap[k] = packedWord(w)
				off += descSize
			}
		} else {
			for ; k < len(lap); k++ {
				var w uint64
				if direct {
					w = uint64(ram.Consume32(off+4)) << 32
					if w&(descMark<<48) != mark {
						break
					}
					w |= uint64(ram.Load32(off))
				} else if w = q.tail(off); w&(descMark<<48) != mark {
					break
				}
				lap[k] = packedWord(w)
				off += descSize
			}
		}
		n += k
		if n < end {
			break
		}
		pos, wrap = 0, wrap^wrapBit
	}
	p.scanned++
	if n > 0 {
		p.moved++
		q.fence(mmio.ReadBarrier) // B
	}
	return n
}

// putTail writes flags, id and length of a descriptor that is not the first of its batch; off is that of the
// length.
func (q *ring) putTail(off uint64, tail uint64) {
	a := &q.desc
	if a.direct {
		a.ram.Store64(off, tail)
		return
	}
	a.writes += a.words
	a.writeBytes += 8
	a.mem.Store64(off, tail)
}

// putLen writes the length of the first descriptor of a batch, whose flags are published last.
func (q *ring) putLen(off uint64, n uint32) {
	a := &q.desc
	if a.direct {
		a.ram.Store32(off, n)
		return
	}
	a.store32(off, n)
}

// looked adds what scan counted to the statistics.
func (q *ring) looked(p *packed) {
	if p.scanned != 0 {
		q.stats.add(cIndexReads, p.scanned)
		if p.moved != 0 {
			q.stats.add(cIndexMoved, p.moved)
		}
		p.scanned, p.moved = 0, 0
	}
}

// wants reads the event suppression word of the other side, in area a, and tells whether it wants to be notified
// of the descriptors before position at that were made available, or used, since the last call.
func (q *ring) wants(p *packed, a *area, at uint16) bool {
	n := p.since
	if n == 0 || q.err != nil {
		return false
	}
	any := p.anyhow
	p.since, p.anyhow = 0, false
	q.fence(mmio.FullBarrier) // C
	var w uint32
	if a.direct {
		w = a.ram.Consume32(0)
	} else {
		w = a.load32(0)
	}
	need := true
	switch f := w >> 16 & eventFlags; {
	case f == eventEnable:
	case f == eventDisable:
		need = false
	case f == eventDesc && q.eventIdx && uint16(w)&^wrapBit < q.size:
		// Both positions on a circle of two laps: with the wrap counter, a position comes again after so many.
		laps := 2 * uint32(q.size)
		d := (q.lapped(at) + laps - 1 - q.lapped(uint16(w))) % laps
		need = d < n || any
	default:
		// Reserved, not negotiated, or no descriptor of the queue: to notify does no harm.
		q.stats.add(cErrors, 1)
	}
	if need {
		q.stats.add(cNotify, 1)
	} else {
		q.stats.add(cSuppressed, 1)
	}
	a.flush()
	return need
}

// lapped returns a position on the circle of two laps.
func (q *ring) lapped(at uint16) uint32 {
	if at&wrapBit != 0 {
		return uint32(at &^ wrapBit)
	}
	return uint32(at) + uint32(q.size)
}

// passed counts n more descriptors for wants.
func (q *ring) passed(p *packed, n uint32) {
	if p.since += n; p.since > 2*uint32(q.size) {
		p.since = 2 * uint32(q.size)
	}
}

// suppress writes the own event suppression word to area a, where it is another.
func (q *ring) suppress(p *packed, a *area, w uint32) {
	if p.event == w {
		return
	}
	p.event, p.unsettled = w, true
	if a.direct {
		a.ram.Publish32(0, w)
		return
	}
	a.store32(0, w)
	a.flush()
}

// arm asks in area a to be notified of the descriptor at position at.
func (q *ring) arm(p *packed, a *area, at uint16) {
	w := p.enable
	if q.eventIdx {
		w = eventDesc<<16 | uint32(at)
	}
	q.suppress(p, a, w)
	// Where the word stands as it was, the other side has seen it since it was settled.
	if p.unsettled {
		q.settle(a, 0, 4, &q.desc) // D
		p.unsettled = false
		a.flush()
	}
}
