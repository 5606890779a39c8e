package vring

import (
	"encoding/binary"
	"fmt"

	"github.com/boardlink/boardlink/dma"
)

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

// fetched returns the address of the i-th of the descriptors that were scanned and fetched.
func (q *PackedDevice) fetched(i int) uint64 { return binary.LittleEndian.Uint64(q.run[i*descSize:]) }

// Pop implements Device. Its steps, and what each checks:
//
//	nothing             where all descriptors are in flight: ErrRestamp
//	available           flags, ids and lengths of the next descriptors, read once
//	slots               the buffer id: ErrIDRange, ErrIDInFlight
//	fetched             the address, read once
//	inHot, translate    the buffer of a chain that has one: ErrZeroLength, ErrOverflow, ErrTranslate
//	walk, buffer        a chain of several descriptors: the same, ErrUnavailable, ErrLoop, ErrOrder, ErrTotal, ErrSpans
//	walkTable           one in an indirect table: the same, ErrIndirectNotNegotiated, ErrIndirectLen, ...
//	hold                the chain is in flight
func (q *PackedDevice) Pop(b *Batch, max int) (int, error) {
	if q.err != nil || max <= 0 {
		return 0, q.err
	}
	q.reload()
	if q.flying == q.size {
		return 0, q.nothing()
	}
	chains, spans := b.Chains, b.Spans
	limit := len(spans) + int(q.size)
	at, flying := q.avail, q.flying // with what this batch took
	var bytes uint64
	var bad *Error
	q.taken, q.scanned = 0, 0
	n := 0
	for n < max && len(spans) < limit {
		if q.taken == q.scanned && !q.available(at, max-n, q.size-flying) {
			break
		}
		w := q.p.words[q.taken]
		kept := len(spans)
		chains = oneMore(chains)
		c := &chains[len(chains)-1]
		*c = Chain{ID: w.id(), Count: 1, First: int32(kept)}
		if w.alone() {
			if int(w.id()) >= len(q.slots) || q.slots[w.id()].count != 0 {
				bad = q.badID(at, w.id())
			} else {
				var addr uint64
				if q.desc.direct {
					addr = q.desc.ram.Load64(uint64(at&^wrapBit) * descSize)
				} else {
					addr = q.fetched(q.taken)
				}
				if need := access(w.flags()); q.inHot(addr, w.len(), need) {
					spans = append(spans, dma.Span{Region: q.hot, Off: addr - q.hotAddr, Len: w.len()})
				} else {
					spans, bad = q.translate(spans, c, at&^wrapBit, addr, w.len(), need)
				}
				c.only(w.len(), w.flags(), len(spans)-kept)
				bytes += uint64(w.len())
				q.taken++
			}
		} else {
			b.Spans = spans
			bad = q.walk(b, c, at, q.size-flying)
			spans = b.Spans
			bytes += uint64(c.ReadLen) + uint64(c.WriteLen)
		}
		if bad != nil {
			chains, spans = chains[:len(chains)-1], spans[:kept]
			break
		}
		q.hold(c)
		flying += c.Count
		at = q.forward(at, c.Count)
		n++
	}
	b.Chains, b.Spans = chains, spans
	if q.dirty.kept != nil {
		q.dirty.keep(b, n)
	}
	q.avail, q.flying = at, flying
	return n, q.popped(n, bytes, bad)
}

// nothing makes sure that nothing is available where all descriptors are in flight: one that is would be one
// that the device has not used.
func (q *PackedDevice) nothing() error {
	found := q.scan(&q.p, q.p.words[:1], q.avail, false)
	q.looked(&q.p)
	q.desc.flush()
	if found == 0 {
		return nil
	}
	return q.fail(&Error{Code: ErrRestamp, Index: q.avail &^ wrapBit, Desc: q.avail &^ wrapBit})
}

// available scans up to max descriptors from position at on, and tells whether one is available. The driver cannot
// have made more than free available.
func (q *PackedDevice) available(at uint16, max int, free uint16) bool {
	if max > int(free) {
		max = int(free)
	}
	q.taken, q.scanned = 0, q.scan(&q.p, q.p.words[:max], at, false)
	if q.scanned > 0 && !q.desc.direct {
		q.fetch(at, q.scanned)
	}
	return q.scanned > 0
}

// hold notes a chain as in flight.
func (q *PackedDevice) hold(c *Chain) {
	s := &q.slots[c.ID]
	s.full, s.count = c.WriteLen, c.Count
	q.log[q.last] = c.ID
	if q.last++; q.last == len(q.log) {
		q.last = 0
	}
}

// popped counts n chains of a batch as popped, and breaks the queue where bad ended it.
func (q *PackedDevice) popped(n int, bytes uint64, bad *Error) error {
	q.held += n
	q.looked(&q.p)
	q.desc.flush()
	if n > 0 {
		q.setState(q.avail, q.used)
		q.stats.add(cChains, uint64(n))
		q.stats.add(cBytes, bytes)
	}
	if bad != nil {
		bad.Index = q.avail &^ wrapBit
		return q.fail(bad)
	}
	return nil
}

func (q *PackedDevice) badID(at, id uint16) *Error {
	e := &Error{Code: ErrIDRange, Desc: at &^ wrapBit, Value: uint64(id), Limit: uint64(q.size) - 1}
	if id < q.size {
		e.Code = ErrIDInFlight
	}
	return e
}

// walk takes the chain c that starts at position at, of at most free descriptors.
func (q *PackedDevice) walk(b *Batch, c *Chain, at uint16, free uint16) *Error {
	head := at &^ wrapBit
	c.Count = 0
	for {
		if c.Count == free {
			return &Error{Code: ErrLoop, Head: head, Desc: at &^ wrapBit, Value: uint64(c.Count) + 1, Limit: uint64(c.Count)}
		}
		if q.taken == q.scanned && !q.available(at, 1, 1) {
			return &Error{Code: ErrUnavailable, Head: head, Desc: at &^ wrapBit}
		}
		w := q.p.words[q.taken]
		var addr uint64
		if q.desc.direct {
			addr = q.desc.ram.Load64(uint64(at&^wrapBit) * descSize)
		} else {
			addr = q.fetched(q.taken)
		}
		q.taken++
		c.Count++
		id, length, flags := w.id(), w.len(), w.flags()
		c.ID = head // for errors, until the id is known
		if flags&descIndirect != 0 {
			if flags&descNext != 0 || c.Count > 1 {
				return &Error{Code: ErrIndirectNext, Head: head, Desc: at &^ wrapBit, Addr: dma.Addr(addr), Len: length}
			}
			if bad := q.walkTable(b, c, at&^wrapBit, dma.Addr(addr), length); bad != nil {
				return bad
			}
		} else if bad := q.buffer(b, c, at&^wrapBit, dma.Addr(addr), length, flags); bad != nil {
			return bad
		}
		if flags&descNext == 0 {
			if id >= q.size || q.slots[id].count != 0 {
				return q.badID(at, id)
			}
			c.ID = id
			return nil
		}
		at = q.forward(at, 1)
	}
}

// walkTable takes chain c from the indirect table that the descriptor at points to: all of its
// entries, in order; WRITE is the only flag that counts (virtio 1.2, 2.8.7), if any (Config.Sent).
func (q *PackedDevice) walkTable(b *Batch, c *Chain, at uint16, addr dma.Addr, length uint32) *Error {
	tab, bad := q.fetchTable(at, at, addr, length)
	if bad != nil {
		return bad
	}
	for i := 0; i < len(tab); i += descSize {
		addr, w := dma.Addr(binary.LittleEndian.Uint64(tab[i:])), packedWord(binary.LittleEndian.Uint64(tab[i+8:]))
		flags := w.flags()
		if q.sent {
			flags &^= descWrite
		}
		if bad := q.buffer(b, c, uint16(i/descSize), addr, w.len(), flags); bad != nil {
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
		if q.last--; q.last < 0 {
			q.last = len(q.log) - 1
		}
		id := q.log[q.last]
		q.avail = q.back(q.avail, q.slots[id].count)
		q.flying -= q.slots[id].count
		q.slots[id].count = 0
	}
	q.held -= n
	q.setState(q.avail, q.used)
	q.stats.add(cChains, -uint64(n))
}
