package vring

import (
	"encoding/binary"
	"fmt"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
)

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

	slots  []heldSlot // by buffer id
	log    []uint16   // the ids popped last, a ring ...
	popped int        // ... and where the next one goes
	done   int        // with VIRTIO_F_IN_ORDER: where the next one to complete is

	run []byte // copy of descriptors in memory that is not direct
}

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
	q.p.words = make([]uint64, size)
	q.p.anyhow = c.State != State{}
	q.slots, q.log = make([]heldSlot, size), make([]uint16, size)
	if !q.desc.direct {
		q.run = make([]byte, size*descSize)
	}
	q.avail, q.used, q.flying, q.unknown = s.Avail, s.Used, n, n
	q.setState(q.avail, q.used)
	q.serve(&c)
	q.p.event = eventEnable << 16
	q.device.store32(0, q.p.event)
	q.fence(mmio.FullBarrier)
	q.flush()
	return q, nil
}

// fetch copies n descriptors from position at on, which were scanned, to run: their addresses count.
func (q *PackedDevice) fetch(at uint16, n int) {
	pos := uint64(at &^ wrapBit)
	if q.desc.isRAM {
		// One access of the memory for each cache line. What was scanned is not taken from
		// here again.
		first := uint64(q.size) - pos
		if uint64(n) < first {
			first = uint64(n)
		}
		q.desc.copyOut(q.run[:first*descSize], pos*descSize)
		if rest := uint64(n) - first; rest > 0 {
			q.desc.copyOut(q.run[first*descSize:(first+rest)*descSize], 0)
		}
		return
	}
	for i := 0; i < n; i++ {
		q.desc.reads += q.desc.words
		q.desc.readBytes += 8
		binary.LittleEndian.PutUint64(q.run[i*descSize:], q.desc.mem.Load64(pos*descSize))
		if pos++; pos == uint64(q.size) {
			pos = 0
		}
	}
}

// Pop implements Device.
func (q *PackedDevice) Pop(b *Batch, max int) (int, error) {
	if q.err != nil {
		return 0, q.err
	}
	if max <= 0 {
		return 0, nil
	}
	q.reload()
	if q.flying == q.size {
		// Nothing can be available: a descriptor that is, is one that the device has not used.
		if q.scan(&q.p, q.p.words[:1], q.avail, false) > 0 {
			q.looked(&q.p)
			q.desc.flush()
			return 0, q.fail(&Error{Code: ErrRestamp, Index: q.avail &^ wrapBit, Desc: q.avail &^ wrapBit})
		}
		q.looked(&q.p)
		q.desc.flush()
		return 0, nil
	}
	direct, ram := q.desc.direct, q.desc.ram
	chains, spans := b.Chains, b.Spans
	limit := len(spans) + int(q.size)
	// The loop works on locals, as SplitDevice.Pop does.
	size, slots, log := uint32(q.size), q.slots, q.log
	flying, popped := q.flying, q.popped
	at := q.avail // of the descriptor words[0]
	var words []uint64
	var bytes uint64
	var bad *Error
	n := 0
	for n < max && len(spans) < limit {
		if len(words) == 0 {
			want := max - n
			if free := int(q.size - flying); want > free {
				want = free
			}
			words = q.p.words[:want]
			words = words[:q.scan(&q.p, words, at, false)]
			if len(words) == 0 {
				break
			}
			if !direct {
				q.fetch(at, len(words))
			}
		}
		w := words[0]
		flags := uint16(w >> 48)
		// Written in place: a copy would wait for the stores of the fields.
		if len(chains) == cap(chains) {
			chains = append(chains, Chain{})[:len(chains)]
		}
		kept := len(spans)
		chains = chains[:len(chains)+1]
		c := &chains[len(chains)-1]
		*c = Chain{Count: 1, First: int32(kept)}
		if flags&(descNext|descIndirect) == 0 {
			id, length := uint16(w>>32), uint32(w)
			if int(id) >= len(slots) || slots[id].count != 0 {
				bad = q.badID(at, id)
			} else {
				var addr uint64
				if direct {
					addr = ram.Load64(uint64(at&^wrapBit) * descSize)
				} else {
					addr = binary.LittleEndian.Uint64(q.run[(cap(q.p.words)-cap(words))*descSize:])
				}
				c.ID = id
				need := dma.DeviceRead
				if flags&descWrite != 0 {
					need = dma.DeviceWrite
				}
				// Most buffers lie in the region of the one before.
				off := addr - q.hotAddr
				if off < q.hotSize && uint64(length) <= q.hotSize-off && length != 0 && q.hotAccess&need != 0 {
					spans = append(spans, dma.Span{Region: q.hot, Off: off, Len: length})
				} else {
					var err error
					if spans, err = q.table.Translate(spans, dma.Addr(addr), length, need); err != nil {
						bad = q.untranslatable(at&^wrapBit, at&^wrapBit, dma.Addr(addr), length, err)
					} else {
						q.heat(spans[kept].Region)
					}
				}
				if flags&descWrite != 0 {
					c.WriteLen, c.Writable = length, uint16(len(spans)-kept)
				} else {
					c.ReadLen, c.Readable = length, uint16(len(spans)-kept)
				}
				bytes += uint64(length)
				words = words[1:]
			}
		} else {
			b.Spans = spans
			words, bad = q.walk(b, c, at, words, q.size-flying)
			spans = b.Spans
			bytes += uint64(c.ReadLen) + uint64(c.WriteLen)
		}
		if bad != nil {
			chains = chains[:len(chains)-1]
			spans = spans[:kept]
			break
		}
		s := &slots[c.ID]
		s.full, s.count = c.WriteLen, c.Count
		log[popped] = c.ID
		if popped++; popped == len(log) {
			popped = 0
		}
		flying += c.Count
		if p := uint32(at&^wrapBit) + uint32(c.Count); p < size {
			at += c.Count
		} else {
			at = q.forward(at, c.Count)
		}
		n++
	}
	q.flying, q.popped = flying, popped
	b.Chains, b.Spans = chains, spans
	q.avail = at
	q.held += n
	q.looked(&q.p)
	q.desc.flush()
	if n > 0 {
		q.setState(q.avail, q.used)
		q.stats.add(cChains, uint64(n))
		q.stats.add(cBytes, bytes)
	}
	if bad != nil {
		bad.Index = at &^ wrapBit
		return n, q.fail(bad)
	}
	return n, nil
}

func (q *PackedDevice) badID(at, id uint16) *Error {
	e := &Error{Code: ErrIDRange, Desc: at &^ wrapBit, Value: uint64(id), Limit: uint64(q.size) - 1}
	if id < q.size {
		e.Code = ErrIDInFlight
	}
	return e
}

// walk takes the chain c that starts at position at, whose descriptors were scanned to words as far as
// they go, of at most free descriptors, and returns the words behind it.
func (q *PackedDevice) walk(b *Batch, c *Chain, at uint16, words []uint64, free uint16) ([]uint64, *Error) {
	head := at &^ wrapBit
	c.Count = 0
	for {
		if c.Count == free {
			return nil, &Error{Code: ErrLoop, Head: head, Desc: at &^ wrapBit, Value: uint64(c.Count) + 1, Limit: uint64(c.Count)}
		}
		if len(words) == 0 {
			words = q.p.words[:1]
			if q.scan(&q.p, words, at, false) == 0 {
				return nil, &Error{Code: ErrUnavailable, Head: head, Desc: at &^ wrapBit}
			}
			if !q.desc.direct {
				q.fetch(at, 1)
			}
		}
		w := words[0]
		var addr uint64
		if q.desc.direct {
			addr = q.desc.ram.Load64(uint64(at&^wrapBit) * descSize)
		} else {
			addr = binary.LittleEndian.Uint64(q.run[(cap(q.p.words)-cap(words))*descSize:])
		}
		words = words[1:]
		c.Count++
		id, length, flags := uint16(w>>32), uint32(w), uint16(w>>48)
		c.ID = head // for errors, until the id is known
		if flags&descIndirect != 0 {
			if flags&descNext != 0 || c.Count > 1 {
				return nil, &Error{Code: ErrIndirectNext, Head: head, Desc: at &^ wrapBit, Addr: dma.Addr(addr), Len: length}
			}
			if bad := q.walkTable(b, c, at&^wrapBit, dma.Addr(addr), length); bad != nil {
				return nil, bad
			}
		} else if bad := q.buffer(b, c, at&^wrapBit, dma.Addr(addr), length, flags); bad != nil {
			return nil, bad
		}
		if flags&descNext == 0 {
			if id >= q.size || q.slots[id].count != 0 {
				return nil, q.badID(at, id)
			}
			c.ID = id
			return words, nil
		}
		at = q.forward(at, 1)
	}
}

// walkTable takes chain c from the indirect table that the descriptor at points to: all of its
// entries, in order; WRITE is the only flag that counts (virtio 1.2, 2.8.7).
func (q *PackedDevice) walkTable(b *Batch, c *Chain, at uint16, addr dma.Addr, length uint32) *Error {
	tab, bad := q.fetchTable(at, at, addr, length)
	if bad != nil {
		return bad
	}
	for i := 0; i < len(tab); i += descSize {
		w := binary.LittleEndian.Uint64(tab[i+8:])
		if bad := q.buffer(b, c, uint16(i/descSize), dma.Addr(binary.LittleEndian.Uint64(tab[i:])), uint32(w), uint16(w>>48)); bad != nil {
			return bad
		}
	}
	return nil
}

// Unpop implements Device. Chains that were popped before a restart cannot be given back: how many
// descriptors each takes is not known.
func (q *PackedDevice) Unpop(n int) {
	if n == 0 || q.err != nil {
		return
	}
	if n < 0 || n > q.held {
		panic(fmt.Sprintf("vring: %s: unpops %d chains of %d", q.name, n, q.held))
	}
	for i := 0; i < n; i++ {
		if q.popped--; q.popped < 0 {
			q.popped = len(q.log) - 1
		}
		id := q.log[q.popped]
		q.avail = q.back(q.avail, q.slots[id].count)
		q.flying -= q.slots[id].count
		q.slots[id].count = 0
	}
	q.held -= n
	q.setState(q.avail, q.used)
	q.stats.add(cChains, -uint64(n))
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

// Complete implements Device. With VIRTIO_F_IN_ORDER, the used descriptor of a chain that was filled, as far as it can
// be, is left to the next one of the batch (virtio 1.2, 2.8.8).
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
	direct, ram, slots, inOrder := q.desc.direct, q.desc.ram, q.slots, q.inOrder
	size := uint32(q.size)
	pos, mark := uint32(q.used&^wrapBit), usedMark(q.used)
	at, atMark := pos, mark // where the next used descriptor goes
	var head begun
	first := true
	for i := range used {
		u := &used[i]
		s := &slots[u.ID]
		skip := false
		if s.count != 0 {
			skip = inOrder && s.full == u.Len && i+1 < len(used)
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
	q.arm(&q.p, &q.device, q.avail)
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
	if q.err == nil {
		q.suppress(&q.p, &q.device, eventDisable<<16)
	}
}
