package vring

import (
	"encoding/binary"
	"fmt"

	"github.com/boardlink/boardlink/mmio"
)

var _ Device = (*SplitDevice)(nil)

// SplitDevice is the device side of a split virtqueue (virtio 1.2, 2.7). It trusts
// nothing that the driver wrote: each shared word is read once into a local and then
// checked, indirect tables are copied before they are parsed, and a buffer becomes
// spans only through the region table. It writes only what changes of the used ring, which
// is its own (the driver must not write there): cache lines, or the bus, are left alone
// where chains come back as they did one lap before.
type SplitDevice struct {
	deviceSide
	half bool // the driver area is aligned to 2 only: flags and index apart

	avail     uint16 // next available index to pop
	availSeen uint16 // available index as last read and checked
	used      uint16 // next used index

	flags      uint16 // of the used ring
	availEvent uint16 // as written
	settled    bool   // the suppression word has reached the driver since it was written

	lastCall  uint16 // used index at the last NeedCall ...
	sinceCall uint32 // ... and the chains completed since
	callAny   bool   // lastCall is not known: the first batch after a restart calls

	ring  []uint64 // shadow of the used ring, by element: what is there already is not written
	heads []uint16 // the batch's ring entries, in memory of our own
	run   []byte   // copy of the descriptor area ...
	runLo int      // ... of which these are of this batch
	runHi int
	raw   []byte // pieces of rings on their way across

	// With VIRTIO_F_IN_ORDER, of the chains in flight by available index: the head, and by head: the bytes
	// that the device may write, which a chain that is skipped counts as written (2.7.9).
	order []uint16
	full  []uint32
}

// unknownHead stands for a chain that was popped before a restart.
const unknownHead = 1<<16 - 1

// unwritten stands for a used element of unknown content: no chain has this id.
const unwritten = 1<<32 - 1

// NewSplitDevice makes the device side of a split virtqueue, and writes its index, its
// flags and its event word as State says. It fails with an *Error of Code ErrConfig or ErrState.
func NewSplitDevice(c Config) (*SplitDevice, error) {
	q := &SplitDevice{}
	if c.Table == nil {
		return nil, &Error{Queue: c.Name, Code: ErrConfig, Err: errNoTable}
	}
	if err := q.setupSplit(&c, 2); err != nil {
		return nil, configError(&c, err)
	}
	if n := c.State.Avail - c.State.Used; n > c.Size {
		return nil, &Error{Queue: c.Name, Code: ErrState, Err: fmt.Errorf("available index %d and used index %d: %d chains in flight in a queue of %d", c.State.Avail, c.State.Used, n, c.Size)}
	}
	q.half = (uint64(q.driver.region.Addr)+c.Driver.Off)%4 != 0 || q.driver.isRAM && uintptr(q.driver.ram.Pointer(0))%4 != 0
	q.avail, q.availSeen, q.used = c.State.Avail, c.State.Avail, c.State.Used
	q.availEvent, q.lastCall = c.State.Avail, c.State.Used
	q.callAny = c.State != State{}
	n := int(c.Size)
	if !q.driver.direct {
		q.heads = make([]uint16, n)
	}
	if !q.desc.direct {
		q.run = make([]byte, n*descSize)
	}
	q.raw = make([]byte, n*usedSize)
	q.ring = make([]uint64, n)
	for i := range q.ring {
		q.ring[i] = unwritten
	}
	if q.inOrder {
		q.order, q.full = make([]uint16, n), make([]uint32, n)
		for i := range q.order {
			q.order[i] = unknownHead
		}
	}
	q.serve(&c)
	q.device.store16(availEventOff(q.size), q.availEvent)
	q.publish(&q.device, 0, word(0, q.used))
	q.fence(mmio.FullBarrier)
	if q.dirty.bits != nil {
		q.markArea(&q.device, 0, ringHead)
		q.markArea(&q.device, availEventOff(q.size), 2)
	}
	q.flush()
	return q, nil
}

// Complete implements Device.
func (q *SplitDevice) Complete(used []Used) error {
	if q.err != nil {
		return q.err
	}
	n := len(used)
	if n == 0 {
		return nil
	}
	if inflight := int(q.avail - q.used); n > inflight {
		return q.misuse(&Error{Code: ErrComplete, Value: uint64(n), Limit: uint64(inflight)})
	}
	if q.dirty.kept != nil {
		q.markUsed(used)
	}
	var bytes uint64
	direct, ram, ring, mask := q.device.direct, q.device.ram, q.ring, q.mask
	lo, hi := -1, 0 // of the batch's elements, those that change
	start := 0      // where the element of a run of chains goes (VIRTIO_F_IN_ORDER)
	for i := range used {
		u := &used[i]
		if u.ID >= q.size || q.inOrder && !q.isNext(uint16(i), u.ID) {
			for k := 0; k < i; k++ { // written or not: nobody knows
				ring[(q.used+uint16(k))&mask] = unwritten
			}
			return q.misuse(&Error{Code: ErrComplete, Value: uint64(u.ID), Limit: uint64(q.size) - 1})
		}
		bytes += uint64(u.Len)
		if q.inOrder && i+1 < n && q.unread(uint16(i), u) {
			continue
		}
		pos := (q.used + uint16(start)) & mask
		v := uint64(u.ID) | uint64(u.Len)<<32
		at := start
		start = i + 1
		if ring[pos] == v {
			continue
		}
		ring[pos] = v
		if direct {
			off := ringHead + usedSize*uint64(pos)
			ram.Store32(off, uint32(u.ID))
			ram.Store32(off+4, u.Len)
			continue
		}
		if lo < 0 {
			lo = at
		}
		hi = at + 1
	}
	if lo >= 0 {
		first := q.used + uint16(lo)
		b := q.raw[:usedSize*(hi-lo)]
		for k := 0; k < hi-lo; k++ {
			binary.LittleEndian.PutUint64(b[usedSize*k:], ring[(first+uint16(k))&mask])
		}
		q.device.writeRing(b, uint64(first&mask), uint64(hi-lo), uint64(q.size), usedSize)
	}
	q.used += uint16(n)
	q.publish(&q.device, 0, word(q.flags, q.used)) // A
	if q.dirty.bits != nil {
		q.fence(mmio.FullBarrier)
		q.markRing(&q.device, ringHead, uint64((q.used-uint16(n))&mask), uint64(n), usedSize)
		q.markArea(&q.device, 0, ringHead)
		q.dirty.bits.Tell()
	}
	if q.sinceCall += uint32(n); q.sinceCall > 1<<16 {
		q.sinceCall = 1 << 16
	}
	q.setState(q.avail, q.used)
	q.stats.add(cDone, uint64(n))
	q.stats.add(cDoneBytes, bytes)
	q.stats.add(cPublished, 1)
	q.device.flush()
	return nil
}

// isNext tells whether head can be the i-th chain to complete in order.
func (q *SplitDevice) isNext(i, head uint16) bool {
	h := q.order[(q.used+i)&q.mask]
	return h == head || h == unknownHead
}

// unread tells whether u, the i-th chain to complete, may be skipped, as it had nothing to be
// written. One that was written to its end could be skipped too, but DPDK's driver (22.11) reads
// the length of each.
func (q *SplitDevice) unread(i uint16, u *Used) bool {
	return q.order[(q.used+i)&q.mask] == u.ID && q.full[u.ID]|u.Len == 0
}

// NeedCall implements Device.
func (q *SplitDevice) NeedCall() bool {
	n := q.sinceCall
	if n == 0 || q.err != nil {
		return false
	}
	old, any := q.lastCall, q.callAny
	q.lastCall, q.sinceCall, q.callAny = q.used, 0, false
	q.fence(mmio.FullBarrier) // C
	var need bool
	switch {
	case q.eventIdx:
		need = needEvent(q.driver.load16(usedEventOff(q.size)), q.used, old) || any || n >= 1<<16
	case q.half:
		need = q.driver.load16(0)&availNoInterrupt == 0
	default:
		need = uint16(q.driver.load32(0))&availNoInterrupt == 0
	}
	if need {
		q.stats.add(cNotify, 1)
	} else {
		q.stats.add(cSuppressed, 1)
	}
	q.driver.flush()
	return need
}

// ArmKick implements Device.
func (q *SplitDevice) ArmKick() (bool, error) {
	if q.err != nil {
		return false, q.err
	}
	q.stats.add(cArms, 1)
	if q.availSeen != q.avail {
		q.stats.add(cArmPending, 1)
		return true, nil
	}
	off, width := uint64(0), uint(4)
	if q.eventIdx {
		off, width = availEventOff(q.size), 2
		if q.availEvent != q.avail {
			q.availEvent, q.settled = q.avail, false
			q.device.store16(off, q.avail)
			if q.dirty.bits != nil {
				q.markWord(off, 2)
			}
		}
	} else if q.flags != 0 {
		q.flags, q.settled = 0, false
		q.device.store32(0, word(0, q.used))
		if q.dirty.bits != nil {
			q.markWord(0, ringHead)
		}
	}
	// Where the word stands as it was, the driver has seen it since it was settled.
	if !q.settled {
		q.settle(&q.device, off, width, &q.driver) // D
		q.settled = true
		q.device.flush()
	}
	if err := q.look(); err != nil || q.availSeen == q.avail {
		return false, err
	}
	q.stats.add(cArmPending, 1)
	return true, nil
}

// DisarmKick implements Device. With the event index there is nothing to write: the event
// stays behind as the available index moves on, and asks for one kick in 65536 at most.
func (q *SplitDevice) DisarmKick() {
	if q.eventIdx || q.flags == usedNoNotify || q.err != nil {
		return
	}
	q.flags, q.settled = usedNoNotify, false
	q.device.store32(0, word(q.flags, q.used))
	if q.dirty.bits != nil {
		q.markWord(0, ringHead)
	}
	q.device.flush()
}
