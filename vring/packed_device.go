package vring

import "github.com/boardlink/boardlink/mmio"

var _ Device = (*PackedDevice)(nil)

// PackedDevice is the device side of a packed virtqueue (virtio 1.2, 2.8). It trusts
// nothing that the driver wrote, as SplitDevice. It never looks at more descriptors than the driver can have
// made available.
type PackedDevice struct {
	deviceSide
	p packed

	avail, used uint16 // positions with wrap counters
	flying      uint16 // descriptors in flight: popped, not completed ...
	unknown     uint16 // ... and those of them that were popped before a restart
	held        int    // chains popped since then and not completed

	slots []heldSlot // by buffer id
	log   []uint16   // the ids popped last, a ring ...
	last  int        // ... and where the next one goes
	done  int        // with VIRTIO_F_IN_ORDER: where the next one to complete is

	run            []byte // copy of descriptors in memory that is not direct
	taken, scanned int    // of p.words: how many this batch took, and has scanned

	journal *Journal // nil: none is kept
}

// touched is set in the event suppression word of a device side with a Journal: as the position
// of an event, which means nothing beside eventEnable and eventDisable, it tells that the ring is in use.
const touched = 1

// heldSlot is what the device side knows of a buffer id.
type heldSlot struct {
	full    uint32 // bytes that the device may write
	count   uint16 // descriptors of the chain; 0: not in flight, or from before a restart
	claimed bool   // by the Complete that is going on
}

// NewPackedDevice makes the device side of a packed virtqueue. It fails with an *Error of Code ErrConfig or
// ErrState.
func NewPackedDevice(c Config) (*PackedDevice, error) {
	q := &PackedDevice{}
	if c.Table == nil {
		return nil, &Error{Queue: c.Name, Code: ErrConfig, Err: errNoTable}
	}
	if err := q.setupPacked(&c); err != nil {
		return nil, configError(&c, err)
	}
	s, n, err := q.packedState(c.State)
	if err != nil {
		return nil, &Error{Queue: c.Name, Code: ErrState, Err: err}
	}
	size := int(c.Size)
	q.p.words = make([]packedWord, size)
	q.p.anyhow = c.State != State{}
	q.slots, q.log = make([]heldSlot, size), make([]uint16, size)
	if !q.desc.direct {
		q.run = make([]byte, size*descSize)
	}
	q.avail, q.used, q.flying, q.unknown = s.Avail, s.Used, n, n
	q.setState(q.avail, q.used)
	q.serve(&c)
	q.p.enable = eventEnable << 16
	if c.Journal != nil {
		if err := c.Journal.fits(c.Size); err != nil {
			return nil, configError(&c, err)
		}
		q.journal = c.Journal
		q.p.enable |= touched
	}
	q.p.event = q.p.enable
	q.device.store32(0, q.p.event)
	q.fence(mmio.FullBarrier)
	if q.dirty.bits != nil {
		q.markArea(&q.device, 0, 4)
	}
	q.flush()
	return q, nil
}

// claim checks that used can be completed, and marks the chains. It returns their descriptors and bytes.
func (q *PackedDevice) claim(used []Used) (count uint32, bytes uint64, err error) {
	unknown, done := q.unknown, q.done
	slots := q.slots
	for i := range used {
		u := &used[i]
		ok := int(u.ID) < len(slots)
		if ok {
			s := &slots[u.ID]
			if s.count != 0 {
				ok = u.Count == s.count && !s.claimed
				if q.inOrder {
					ok = ok && unknown == 0 && q.log[done] == u.ID
					if done++; done == len(q.log) {
						done = 0
					}
				}
				s.claimed = ok || s.claimed
			} else if ok = u.Count > 0 && u.Count <= unknown; ok {
				unknown -= u.Count // popped before a restart: its owner knows
			}
		}
		if !ok {
			for k := range used[:i] {
				slots[used[k].ID].claimed = false
			}
			return 0, 0, q.misuse(&Error{Code: ErrComplete, Value: uint64(u.ID), Limit: uint64(q.size) - 1})
		}
		count += uint32(u.Count)
		bytes += uint64(u.Len)
	}
	return count, bytes, nil
}

// Complete implements Device. With VIRTIO_F_IN_ORDER, the used descriptor of a chain that had nothing to be written is
// left to the next one of the batch (virtio 1.2, 2.8.8). That of one that was written to its end could be left too, but
// DPDK's driver (22.11) waits for each.
func (q *PackedDevice) Complete(used []Used) error {
	if q.err != nil {
		return q.err
	}
	if len(used) == 0 {
		return nil
	}
	count, bytes, err := q.claim(used)
	if err != nil {
		return err
	}
	if q.dirty.kept != nil {
		q.markUsed(used)
	}
	if q.journal != nil {
		q.journal.begin(q, used, uint16(count))
	}
	direct, ram, slots, inOrder := q.desc.direct, q.desc.ram, q.slots, q.inOrder
	size := uint32(q.size)
	pos, mark := uint32(q.used&^wrapBit), usedMark(q.used)
	start := uint64(pos)
	at, atMark := pos, mark // where the next used descriptor goes
	var head begun
	first := true
	for i := range used {
		u := &used[i]
		s := &slots[u.ID]
		skip := false
		if s.count != 0 {
			skip = inOrder && s.full|u.Len == 0 && i+1 < len(used) // as leaves
			s.count, s.claimed = 0, false
			q.held--
			if q.done++; q.done == len(q.log) {
				q.done = 0
			}
		} else {
			q.unknown -= u.Count
		}
		if pos += uint32(u.Count); pos >= size {
			pos, mark = pos-size, mark^descMark
		}
		if skip {
			continue
		}
		off := uint64(at)*descSize + 8
		flags := atMark
		if u.Len != 0 {
			flags |= descWrite
		}
		if first {
			first = false
			q.putLen(off, u.Len)
			head = begun{off + 4, uint32(u.ID) | uint32(flags)<<16}
		} else if tail := uint64(u.Len) | uint64(u.ID)<<32 | uint64(flags)<<48; direct {
			ram.Store64(off, tail)
		} else {
			q.putTail(off, tail)
		}
		at, atMark = pos, mark
	}
	q.used = q.forward(q.used, uint16(count))
	q.flying -= uint16(count)
	q.publish(&q.desc, head.off, head.word) // A
	if q.dirty.bits != nil {
		q.fence(mmio.FullBarrier)
		q.markRing(&q.desc, 0, start, uint64(count), descSize)
		q.dirty.bits.Tell()
	}
	if q.journal != nil {
		q.journal.commit(q.used)
	}
	q.passed(&q.p, count)
	q.setState(q.avail, q.used)
	q.stats.add(cDone, uint64(len(used)))
	q.stats.add(cDoneBytes, bytes)
	q.stats.add(cPublished, 1)
	q.desc.flush()
	return nil
}

// NeedCall implements Device.
func (q *PackedDevice) NeedCall() bool { return q.wants(&q.p, &q.driver, q.used) }

// ArmKick implements Device.
func (q *PackedDevice) ArmKick() (bool, error) {
	if q.err != nil {
		return false, q.err
	}
	q.stats.add(cArms, 1)
	before := q.p.event
	q.arm(&q.p, &q.device, q.avail)
	if q.dirty.bits != nil && q.p.event != before {
		q.markWord(0, 4)
	}
	pending := q.scan(&q.p, q.p.words[:1], q.avail, false) > 0
	q.looked(&q.p)
	q.desc.flush()
	if pending {
		if q.flying == q.size {
			return false, q.fail(&Error{Code: ErrRestamp, Index: q.avail &^ wrapBit, Desc: q.avail &^ wrapBit})
		}
		q.stats.add(cArmPending, 1)
	}
	return pending, nil
}

// DisarmKick implements Device. With the event index too there is something to write: positions come again every
// two laps.
func (q *PackedDevice) DisarmKick() {
	if q.err != nil || q.p.event == eventDisable<<16 {
		return
	}
	q.suppress(&q.p, &q.device, eventDisable<<16)
	if q.dirty.bits != nil {
		q.markWord(0, 4)
	}
}
