package vring

import (
	"encoding/binary"
	"fmt"

	"github.com/boardlink/boardlink/mmio"
)

var _ Driver = (*PackedDriver)(nil)

// PackedDriver is the driver side of a packed virtqueue (virtio 1.2, 2.8). It believes nothing
// of what it reads but the id of a buffer in flight, and a length within it; addresses and
// lengths of buffers it keeps itself.
type PackedDriver struct {
	driverSide
	p     packed
	slots []packedSlot // by buffer id
	ids   []uint16     // free buffer ids, a stack: those used last are in the caches ...
	nids  int          // ... and how many there are
	nfree int          // free descriptors

	avail, used uint16 // positions with wrap counters
	flying      int    // chains in flight

	// With VIRTIO_F_IN_ORDER, the ids of the chains in flight, oldest first.
	order []uint16
	first int

	scratch []byte // an indirect table on its way across
}

// packedSlot is what the driver side knows of a buffer id.
type packedSlot struct {
	token    uint32
	writable uint32 // bytes that the device may write into the buffers
	count    uint16 // descriptors in the ring; 0: not in flight
}

// NewPackedDriver makes the driver side of a packed virtqueue and writes the initial
// content of all three areas: do it before the device is told of the queue. It fails with
// an *Error of Code ErrConfig or ErrState.
func NewPackedDriver(c Config) (*PackedDriver, error) {
	q, err := allocPackedDriver(&c)
	if err != nil {
		return nil, err
	}
	s, n, err := q.packedState(c.State)
	if err == nil && n != 0 {
		err = fmt.Errorf("%d descriptors in flight: a driver side starts with nothing in flight", n)
	}
	if err != nil {
		return nil, &Error{Queue: c.Name, Code: ErrState, Err: err}
	}
	size := int(c.Size)
	for i := range q.ids {
		q.ids[i] = uint16(size - 1 - i)
	}
	q.nids, q.nfree = size, size
	q.p.anyhow = c.State != State{}
	q.avail, q.used = s.Avail, s.Used
	q.setState(q.avail, q.used)
	q.wipe()
	q.fence(mmio.FullBarrier)
	q.flush()
	return q, nil
}

// allocPackedDriver checks c and makes the driver side's own memory. It touches no shared memory.
func allocPackedDriver(c *Config) (*PackedDriver, error) {
	q := &PackedDriver{}
	if err := q.setupPacked(c); err != nil {
		return nil, configError(c, err)
	}
	if err := q.tables(c); err != nil {
		return nil, configError(c, err)
	}
	size := int(c.Size)
	q.slots = make([]packedSlot, size)
	q.ids = make([]uint16, size)
	q.p.words = make([]packedWord, size)
	if q.inOrder {
		q.order = make([]uint16, size)
	}
	q.scratch = make([]byte, q.indirectMax*descSize)
	return q, nil
}

// Free returns how many descriptors are free.
func (q *PackedDriver) Free() int { return q.nfree }

// begun is the first descriptor of a batch, until it is published.
type begun struct {
	off  uint64 // of its flags and id
	word uint32
}

// Add implements Driver.
func (q *PackedDriver) Add(reqs []Request) (int, error) {
	if q.err != nil {
		return 0, q.err
	}
	var err error
	var bytes uint64
	var head begun
	n := 0
	before := q.nfree
	// The loop works on locals, as SplitDevice.Pop does; chain does not, and is given them back.
	direct, ram := q.desc.direct, q.desc.ram
	slots, ids, size := q.slots, q.ids, uint32(q.size)
	pos, mark := uint32(q.avail&^wrapBit), availMark(q.avail)
	nfree, nids, flying := q.nfree, q.nids, q.flying
	for n < len(reqs) {
		r := &reqs[n]
		if len(r.Bufs) == 1 && q.indirectMin != 1 {
			b := &r.Bufs[0]
			if b.Len == 0 || uint64(b.Addr)+uint64(b.Len)-1 < uint64(b.Addr) || uint(r.Readable) > 1 {
				_, err = q.check(r)
				break
			}
			if nfree == 0 {
				break
			}
			nids-- // there is an id for each free descriptor
			id := ids[nids]
			nfree--
			flags, writable := mark, uint32(0)
			if r.Readable == 0 {
				flags, writable = mark|descWrite, b.Len
			}
			s := &slots[id]
			s.token, s.writable, s.count = r.Token, writable, 1
			off := uint64(pos) * descSize
			if n == 0 {
				q.desc.store64(off, uint64(b.Addr))
				q.putLen(off+8, b.Len)
				head = begun{off + 12, uint32(id) | uint32(flags)<<16}
			} else if tail := uint64(b.Len) | uint64(id)<<32 | uint64(flags)<<48; direct {
				ram.Store64(off, uint64(b.Addr))
				ram.Store64(off+8, tail)
			} else {
				q.desc.store64(off, uint64(b.Addr))
				q.putTail(off+8, tail)
			}
			if pos++; pos == size {
				pos, mark = 0, mark^descMark
			}
			if q.inOrder {
				q.queue(id, flying)
			}
			flying++
			bytes += uint64(b.Len)
		} else {
			var total uint64
			if total, err = q.check(r); err != nil {
				break
			}
			q.nfree, q.nids, q.flying = nfree, nids, flying
			h, count := q.chain(r, n == 0, pos, mark)
			nfree, nids, flying = q.nfree, q.nids, q.flying
			if count == 0 {
				break
			}
			if n == 0 {
				head = h
			}
			if pos += count; pos >= size {
				pos, mark = pos-size, mark^descMark
			}
			bytes += total
		}
		n++
	}
	if n > 0 {
		q.nfree, q.nids, q.flying = nfree, nids, flying
		q.avail = uint16(pos)
		if mark == descAvail {
			q.avail |= wrapBit
		}
		q.publish(&q.desc, head.off, head.word) // A
		q.passed(&q.p, uint32(before-q.nfree))
		q.setState(q.avail, q.used)
		q.stats.add(cChains, uint64(n))
		q.stats.add(cBytes, bytes)
		q.stats.add(cPublished, 1)
		q.indirect.flush()
		q.desc.flush()
	}
	return n, err
}

// queue adds an id to those in flight in order, of which there are as many as given.
func (q *PackedDriver) queue(id uint16, flying int) {
	i := q.first + flying
	if i >= len(q.order) {
		i -= len(q.order)
	}
	q.order[i] = id
}

// chain writes the descriptors of a checked request from position pos on, and returns their number, 0 where
// there is no room; the first one's flags and id are left out and returned where it is that of a batch.
func (q *PackedDriver) chain(r *Request, first bool, pos uint32, mark uint16) (head begun, count uint32) {
	n := len(r.Bufs)
	indirect := q.indirectMax > 0 && n >= q.indirectMin && n <= q.indirectMax
	need := n
	if indirect {
		need = 1
	}
	if q.nfree < need {
		return head, 0
	}
	var writable uint32 // check has bounded the sum
	for i := r.Readable; i < n; i++ {
		writable += r.Bufs[i].Len
	}
	q.nids--
	id := q.ids[q.nids]
	q.nfree -= need
	q.slots[id] = packedSlot{token: r.Token, writable: writable, count: uint16(need)}
	if q.inOrder {
		q.queue(id, q.flying)
	}
	q.flying++
	var addr uint64
	length, flags := uint32(n*descSize), uint16(descIndirect)
	if indirect {
		addr = q.table(id, r)
	}
	for k := 0; k < need; k++ {
		if !indirect {
			addr, length, flags = uint64(r.Bufs[k].Addr), r.Bufs[k].Len, 0
			if k >= r.Readable {
				flags = descWrite
			}
			if k < n-1 {
				flags |= descNext
			}
		}
		flags |= mark
		off := uint64(pos) * descSize
		q.desc.store64(off, addr)
		// The id counts in the last one only (2.8.6); it does no harm in the others.
		if first && k == 0 {
			q.putLen(off+8, length)
			head = begun{off + 12, uint32(id) | uint32(flags)<<16}
		} else {
			q.putTail(off+8, uint64(length)|uint64(id)<<32|uint64(flags)<<48)
		}
		if pos++; pos == uint32(q.size) {
			pos, mark = 0, mark^descMark
		}
	}
	return head, uint32(need)
}

// table writes the indirect table of a buffer id and returns its link address. The WRITE flag
// is the only one that counts there (virtio 1.2, 2.8.7).
func (q *PackedDriver) table(id uint16, r *Request) uint64 {
	t := &q.indirect
	off := uint64(id) * uint64(q.indirectMax) * descSize
	for k := range r.Bufs {
		b := &r.Bufs[k]
		w := uint64(b.Len)
		if k >= r.Readable {
			w |= descWrite << 48
		}
		if t.direct {
			t.ram.Store64(off+uint64(k)*descSize, uint64(b.Addr))
			t.ram.Store64(off+uint64(k)*descSize+8, w)
			continue
		}
		binary.LittleEndian.PutUint64(q.scratch[k*descSize:], uint64(b.Addr))
		binary.LittleEndian.PutUint64(q.scratch[k*descSize+8:], w)
	}
	if !t.direct {
		t.copyIn(off, q.scratch[:len(r.Bufs)*descSize])
	}
	return q.indirectAddr + off
}

// NeedKick implements Driver.
func (q *PackedDriver) NeedKick() bool { return q.wants(&q.p, &q.device, q.avail) }

// Reap implements Driver.
func (q *PackedDriver) Reap(done []Completion) (int, error) {
	if q.err != nil {
		return 0, q.err
	}
	if q.flying == 0 || len(done) == 0 {
		return 0, nil
	}
	if q.inOrder {
		return q.reapInOrder(done)
	}
	var bad *Error
	var bytes uint64
	slots, ids := q.slots, q.ids
	nfree, nids, flying := q.nfree, q.nids, q.flying
	at := q.used
	n := 0
	for n < len(done) && flying > 0 && bad == nil {
		max := len(done) - n
		if max > flying {
			max = flying
		}
		words := q.p.words[:max]
		words = words[:q.scan(&q.p, words, at, true)]
		if len(words) == 0 {
			break
		}
		for _, w := range words {
			id, length := w.id(), w.len()
			if int(id) >= len(slots) || slots[id].count == 0 {
				bad = &Error{Code: ErrUsedID, Index: at &^ wrapBit, Value: uint64(id)}
				break
			}
			if w.flags()&descWrite == 0 {
				length = 0 // reserved, not a length (virtio 1.2, 2.8.4)
			}
			s := &slots[id]
			if length > s.writable {
				bad = &Error{Code: ErrUsedLen, Index: at &^ wrapBit, Head: id, Value: uint64(length), Limit: uint64(s.writable)}
				break
			}
			done[n] = Completion{Token: s.token, Len: length}
			n++
			bytes += uint64(length)
			count := s.count
			s.count = 0
			ids[nids] = id // there is room: the id was in flight
			nids++
			nfree += int(count)
			flying--
			at = q.forward(at, count)
			if count != 1 {
				break // what was scanned next is the rest of the chain
			}
		}
	}
	q.nfree, q.nids, q.flying = nfree, nids, flying
	q.used = at
	q.reaped(n, bytes)
	if bad != nil {
		return n, q.fail(bad)
	}
	return n, nil
}

func (q *PackedDriver) reaped(n int, bytes uint64) {
	q.looked(&q.p)
	q.desc.flush()
	if n > 0 {
		q.setState(q.avail, q.used)
		q.stats.add(cDone, uint64(n))
		q.stats.add(cDoneBytes, bytes)
	}
}

// reapInOrder is Reap with VIRTIO_F_IN_ORDER: a used descriptor completes its chain and all before
// it (virtio 1.2, 2.8.8).
func (q *PackedDriver) reapInOrder(done []Completion) (int, error) {
	var bad *Error
	var bytes uint64
	n := 0
	for n < len(done) && q.flying > 0 {
		if q.run == 0 {
			words := q.p.words[:1]
			if q.scan(&q.p, words, q.used, true) == 0 {
				break
			}
			if q.run, q.runLen, bad = q.runOf(words[0], q.used); bad != nil {
				break
			}
		}
		id := q.order[q.first]
		if q.first++; q.first == len(q.order) {
			q.first = 0
		}
		s := &q.slots[id]
		length := s.writable
		if q.run--; q.run == 0 {
			length = q.runLen
		}
		done[n] = Completion{Token: s.token, Len: length}
		n++
		bytes += uint64(length)
		q.used = q.forward(q.used, s.count)
		q.nfree += int(s.count)
		s.count = 0
		q.ids[q.nids] = id
		q.nids++
		q.flying--
	}
	q.reaped(n, bytes)
	if bad != nil {
		return n, q.fail(bad)
	}
	return n, nil
}

// runOf returns how many chains a used descriptor at position at completes, and the length of the last.
func (q *PackedDriver) runOf(w packedWord, at uint16) (run int, length uint32, bad *Error) {
	id := w.id()
	if int(id) >= len(q.slots) || q.slots[id].count == 0 {
		return 0, 0, &Error{Code: ErrUsedID, Index: at &^ wrapBit, Value: uint64(id)}
	}
	if w.flags()&descWrite != 0 {
		length = w.len()
	}
	if limit := q.slots[id].writable; length > limit {
		return 0, 0, &Error{Code: ErrUsedLen, Index: at &^ wrapBit, Head: id, Value: uint64(length), Limit: uint64(limit)}
	}
	// It is in flight, so it is in the order.
	i := q.first
	for run = 1; q.order[i] != id; run++ {
		if i++; i == len(q.order) {
			i = 0
		}
	}
	return run, length, nil
}

// ArmCall implements Driver.
func (q *PackedDriver) ArmCall() (bool, error) { return q.ArmCallAfter(1) }

// ArmCallAfter implements Driver. Of chains of several descriptors, completed in any order, the position of the
// n-th used one is not known: the call may then come earlier.
func (q *PackedDriver) ArmCallAfter(n int) (bool, error) {
	if q.err != nil {
		return false, q.err
	}
	if n > q.flying {
		n = q.flying
	}
	if n < 1 || !q.eventIdx {
		n = 1
	}
	q.stats.add(cArms, 1)
	if q.run > 0 && q.run >= n {
		q.stats.add(cArmPending, 1)
		return true, nil
	}
	// A chain takes one descriptor at least, so the n-th used one lies at this
	// position or behind it.
	at := q.forward(q.used, uint16(n-1))
	if q.flying == 0 {
		at = q.used
	}
	q.arm(&q.p, &q.driver, at)
	pending := q.flying > 0 && q.waiting(n)
	q.looked(&q.p)
	q.desc.flush()
	if pending {
		q.stats.add(cArmPending, 1)
	}
	return pending, nil
}

// waiting tells whether n used chains are there, or something that Reap will refuse. It goes from one used descriptor to
// the next, and takes nothing.
func (q *PackedDriver) waiting(n int) bool {
	at := q.used
	run := q.run
	i := q.first
	for seen := 0; ; {
		if run == 0 {
			w := q.p.words[:1]
			if q.scan(&q.p, w, at, true) == 0 {
				return false
			}
			id := uint16(w[0] >> 32)
			if int(id) >= len(q.slots) || q.slots[id].count == 0 {
				return true
			}
			if !q.inOrder {
				if seen++; seen == n {
					return true
				}
				at = q.forward(at, q.slots[id].count)
				continue
			}
			for run = 1; q.order[(i+run-1)%len(q.order)] != id; run++ {
				if run == q.flying {
					return true // of a chain that is taken already
				}
			}
		}
		for ; run > 0; run-- {
			if seen++; seen == n {
				return true
			}
			at = q.forward(at, q.slots[q.order[i]].count)
			if i++; i == len(q.order) {
				i = 0
			}
		}
	}
}

// DisarmCall implements Driver. With the event index too there is something to write: positions come again every
// two laps.
func (q *PackedDriver) DisarmCall() {
	if q.err == nil {
		q.suppress(&q.p, &q.driver, eventDisable<<16)
	}
}
