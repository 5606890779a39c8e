package vring

import (
	"fmt"
	"sync/atomic"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
)

// Journal is where the device side of a packed queue keeps its place, in memory that outlives the
// process: a packed ring does not tell where its device side is. Before a batch of used descriptors
// is written, the journal says what it will be; afterwards, that it was. So a process that was killed at any
// point in between can be followed by another one (JournalState), which writes the batch again if its
// first descriptor, which makes it visible, was not written.
//
// What was popped and not completed is popped again, as by State.Rewound.
//
// Words are JournalWords(Size) of them, which nobody else writes:
//
//	0     bits 0 to 15 the used position before the batch, with its wrap counter, bits 16 to 31 the one behind it,
//	      bits 32 to 47 the number of used descriptors in the batch; both positions are equal between batches
//	1...  a used descriptor each: bits 0 to 31 its length, 32 to 47 its id, 48 to 63 by how many descriptors the
//	      next one is further on
type Journal struct{ Words []uint64 }

// JournalWords returns the number of words of a Journal for a queue of n descriptors.
func JournalWords(n uint16) int { return 1 + int(n) }

// Reset makes the journal that of a queue at s, between two batches.
func (j *Journal) Reset(s State) { j.commit(s.Used) }

// At tells whether the journal is that of a queue at s, between two batches.
func (j *Journal) At(s State) bool {
	return atomic.LoadUint64(&j.Words[0]) == uint64(s.Used)|uint64(s.Used)<<16
}

func (j *Journal) commit(used uint16) {
	atomic.StoreUint64(&j.Words[0], uint64(used)|uint64(used)<<16)
}

// fits tells whether the journal has the words for a queue of n descriptors.
func (j *Journal) fits(n uint16) error {
	if len(j.Words) < JournalWords(n) {
		return fmt.Errorf("a journal of %d words, %d are needed", len(j.Words), JournalWords(n))
	}
	return nil
}

// begin notes the batch that Complete is about to write. All of it is claimed.
func (j *Journal) begin(q *PackedDevice, used []Used, count uint16) {
	words := j.Words[1:]
	n, run := 0, uint64(0)
	for i := range used {
		u := &used[i]
		run += uint64(u.Count)
		if q.leaves(u, i+1 < len(used)) {
			continue
		}
		words[n] = uint64(u.Len) | uint64(u.ID)<<32 | run<<48
		n, run = n+1, 0
	}
	// Plain stores come before an atomic one in the order of the program, and a process that is killed
	// has carried out its instructions up to some point of that order.
	atomic.StoreUint64(&j.Words[0], uint64(q.used)|uint64(q.forward(q.used, count))<<16|uint64(n)<<32)
}

// leaves tells whether the used descriptor of a chain is left to a later one of the batch (virtio 1.2,
// 2.8.8).
func (q *PackedDevice) leaves(u *Used, more bool) bool {
	s := &q.slots[u.ID]
	return s.count != 0 && q.inOrder && s.full|u.Len == 0 && more
}

// PackedRingTouched tells whether a device side with a Journal has used the ring since the driver made it: it always
// leaves something in the event suppression structure in c.Device, which the driver clears when it makes a
// ring. (A driver need not; Linux and DPDK do.) The errors are those of NewPackedDevice.
func PackedRingTouched(c Config) (bool, error) {
	device, err := newArea("device area", c.Device, 4, PackedDeviceAlign, PackedDeviceAlign, dma.DeviceWrite)
	if err != nil {
		return false, configError(&c, err)
	}
	defer device.flush()
	return device.load32(0) != 0, nil
}

// JournalState returns the State of the packed queue that c describes after the end of its device side, whatever
// that was. c.State does not count. Where a batch was not written, or only in part, it is written
// now: nothing else may use the ring. The driver may have to be called. The errors are *Error values: Code ErrConfig where the ring is
// not as NewPackedDevice needs it, ErrState where the journal is not one of this queue.
func JournalState(c Config) (State, error) {
	q := &PackedDevice{}
	if err := q.setupPacked(&c); err != nil {
		return State{}, configError(&c, err)
	}
	if c.Journal == nil {
		return State{}, configError(&c, errNoJournal)
	}
	if err := c.Journal.fits(c.Size); err != nil {
		return State{}, configError(&c, err)
	}
	bad := func(err error) (State, error) {
		return State{}, &Error{Queue: c.Name, Code: ErrState, Err: fmt.Errorf("journal: %w", err)}
	}
	w := atomic.LoadUint64(&c.Journal.Words[0])
	used, next, n := uint16(w), uint16(w>>16), int(uint16(w>>32))
	count, err := packedInFlight(State{Avail: next, Used: used, Packed: true}, c.Size)
	if err != nil {
		return bad(err)
	}
	if count > 0 {
		words := c.Journal.Words[1:]
		sum := uint64(0)
		if n > int(count) {
			return bad(fmt.Errorf("%d used descriptors for %d", n, count))
		}
		for i := 0; i < n; i++ {
			run := words[i] >> 48
			if sum += run; run == 0 {
				return bad(fmt.Errorf("used descriptor %d of none", i))
			}
		}
		if sum != uint64(count) {
			return bad(fmt.Errorf("%d descriptors, and %d used ones for %d", count, n, sum))
		}
		// The first descriptor makes the batch visible: until then it is as the driver made it available.
		flags := uint16(q.desc.load32(uint64(used&^wrapBit)*descSize+12) >> 16)
		if flags&descMark == availMark(used) {
			q.rewrite(used, words[:n])
			if c.Log.Bits != nil {
				q.dirty.set(c.Log, c.Size)
				q.fence(mmio.FullBarrier)
				q.markArea(&q.desc, 0, uint64(c.Size)*descSize)
				q.dirty.bits.Tell()
			}
		}
		c.Journal.commit(next)
	}
	q.flush()
	return State{Avail: next, Used: next, Packed: true}, nil
}

// rewrite writes a batch of used descriptors at position at, the first one last.
func (q *PackedDevice) rewrite(at uint16, words []uint64) {
	first, head := uint32(0), uint64(at&^wrapBit)*descSize+12
	for i, w := range words {
		off := uint64(at&^wrapBit)*descSize + 8
		flags := usedMark(at)
		n, id := uint32(w), uint32(uint16(w>>32))
		if n != 0 {
			flags |= descWrite
		}
		q.desc.store32(off, n)
		if tail := id | uint32(flags)<<16; i == 0 {
			first = tail
		} else {
			q.desc.store32(off+4, tail)
		}
		at = q.forward(at, uint16(w>>48))
	}
	q.publish(&q.desc, head, first) // A
}
