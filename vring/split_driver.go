package vring

import (
	"encoding/binary"
	"fmt"

	"github.com/boardlink/boardlink/mmio"
)

var _ Driver = (*SplitDriver)(nil)

// SplitDriver is the driver side of a split virtqueue (virtio 1.2, 2.7). It keeps
// shadows of all that it wrote and believes nothing that it could read back: what the
// device scribbles over descriptors or the available ring harms nobody but the device.
//
// It writes only what changes. Descriptors are taken from the free ones in the order in
// which they came back, so that where the device completes in order, descriptors follow one
// another, and the available ring repeats itself and is not written at all.
type SplitDriver struct {
	driverSide
	descs [][2]uint64 // shadow of the descriptor area, as two words each
	ring  []uint16    // shadow of the available ring
	slots []slot      // by descriptor
	free  []uint16    // FIFO of the free descriptors
	first uint16      // where the FIFO starts ...
	nfree int         // ... and how many it holds

	avail    uint16 // next available index
	used     uint16 // next used index to reap
	usedSeen uint16 // used index as last read and checked

	flags     uint16 // of the available ring
	usedEvent uint16 // as written
	settled   bool   // the suppression word has reached the device since it was written

	lastKick  uint16 // available index at the last NeedKick ...
	sinceKick uint32 // ... and the chains added since
	kickAny   bool   // lastKick is not known: the first batch after a restart kicks

	scratch []byte // pieces of rings and tables on their way across
}

// slot is what the driver side knows of a descriptor.
type slot struct {
	token    uint32
	writable uint32 // bytes that the device may write into the chain
	count    uint16 // descriptors of the chain that starts here; 0: no head in flight
	next     uint16 // next descriptor of the chain
}

// NewSplitDriver makes the driver side of a split virtqueue and writes the initial
// content of all three areas: do it before the device is told of the queue. It fails with
// an *Error of Code ErrConfig or ErrState.
func NewSplitDriver(c Config) (*SplitDriver, error) {
	q, err := allocSplitDriver(&c)
	if err != nil {
		return nil, err
	}
	for i := range q.free {
		q.free[i] = uint16(i)
	}
	q.nfree = len(q.free)
	q.avail, q.used, q.usedSeen, q.lastKick = c.State.Avail, c.State.Used, c.State.Used, c.State.Avail
	q.usedEvent = c.State.Used
	q.kickAny = c.State != State{}

	q.wipe()
	q.driver.store16(usedEventOff(q.size), q.usedEvent)
	q.device.store16(availEventOff(q.size), q.avail)
	q.publish(&q.device, 0, word(0, q.used))
	q.publish(&q.driver, 0, word(0, q.avail))
	q.fence(mmio.FullBarrier)
	q.flush()
	return q, nil
}

// allocSplitDriver checks c and makes the driver side's own memory. It touches no shared memory.
func allocSplitDriver(c *Config) (*SplitDriver, error) {
	q := &SplitDriver{}
	if err := q.setupSplit(c, SplitDriverAlign); err != nil {
		return nil, configError(c, err)
	}
	if c.State.Avail != c.State.Used {
		return nil, &Error{Queue: c.Name, Code: ErrState, Err: fmt.Errorf("available index %d and used index %d differ: a driver side starts with nothing in flight", c.State.Avail, c.State.Used)}
	}
	n := int(c.Size)
	if err := q.tables(c); err != nil {
		return nil, configError(c, err)
	}
	scratch := n * usedSize
	if t := q.indirectMax * descSize; t > scratch {
		scratch = t
	}
	q.descs = make([][2]uint64, n)
	q.ring = make([]uint16, n)
	q.slots = make([]slot, n)
	q.free = make([]uint16, n)
	q.scratch = make([]byte, scratch)
	return q, nil
}

// Free returns how many descriptors are free.
func (q *SplitDriver) Free() int { return q.nfree }

// take takes the oldest free descriptor.
func (q *SplitDriver) take() uint16 {
	i := q.free[q.first&q.mask]
	q.first++
	q.nfree--
	return i
}

// give frees a descriptor.
func (q *SplitDriver) give(i uint16) {
	q.free[(q.first+uint16(q.nfree))&q.mask] = i
	q.nfree++
}

// put writes what differs of a descriptor.
func (q *SplitDriver) put(i uint16, addr, rest uint64) {
	s := &q.descs[i]
	if s[0] != addr {
		s[0] = addr
		q.desc.store64(uint64(i)*descSize, addr)
	}
	if s[1] != rest {
		s[1] = rest
		q.desc.store64(uint64(i)*descSize+8, rest)
	}
}

// rest is the second word of a descriptor.
func rest(n uint32, flags, next uint16) uint64 {
	return uint64(n) | uint64(flags)<<32 | uint64(next)<<48
}

// Add implements Driver.
func (q *SplitDriver) Add(reqs []Request) (int, error) {
	if q.err != nil {
		return 0, q.err
	}
	var err error
	var bytes uint64
	n := 0
	// Of the batch's ring entries, those from lo up to hi changed.
	lo, hi := -1, 0
	// The loop works on locals, as SplitDevice.Pop does.
	ring, slots, descs := q.ring, q.slots, q.descs
	direct, ram := q.driver.direct, q.driver.ram
	for n < len(reqs) {
		r := &reqs[n]
		var head uint16
		if len(r.Bufs) == 1 && q.indirectMin != 1 {
			b := &r.Bufs[0]
			if b.Len == 0 || uint64(b.Addr)+uint64(b.Len)-1 < uint64(b.Addr) || uint(r.Readable) > 1 {
				_, err = q.check(r)
				break
			}
			if q.nfree == 0 {
				break
			}
			head = q.take()
			w := rest(b.Len, 0, 0)
			writable := uint32(0)
			if r.Readable == 0 {
				w = rest(b.Len, descWrite, 0)
				writable = b.Len
			}
			s := &slots[head]
			s.token, s.writable, s.count = r.Token, writable, 1
			if d := &descs[head]; d[0] != uint64(b.Addr) || d[1] != w {
				q.put(head, uint64(b.Addr), w)
			}
			bytes += uint64(b.Len)
		} else {
			var total uint64
			if total, err = q.check(r); err != nil {
				break
			}
			var ok bool
			if head, ok = q.chain(r); !ok {
				break
			}
			bytes += total
		}
		pos := (q.avail + uint16(n)) & q.mask
		if ring[pos] != head {
			ring[pos] = head
			if direct {
				ram.Store16(ringHead+2*uint64(pos), head)
			} else {
				if lo < 0 {
					lo = n
				}
				hi = n + 1
			}
		}
		n++
	}
	if n > 0 {
		if lo >= 0 {
			q.writeAvail(q.avail+uint16(lo), hi-lo)
		}
		q.avail += uint16(n)
		q.publish(&q.driver, 0, word(q.flags, q.avail))
		if q.sinceKick += uint32(n); q.sinceKick > 1<<16 {
			q.sinceKick = 1 << 16
		}
		q.setState(q.avail, q.used)
		q.stats.add(cChains, uint64(n))
		q.stats.add(cBytes, bytes)
		q.stats.add(cPublished, 1)
		q.indirect.flush()
		q.flush()
	}
	return n, err
}

// writeAvail writes n entries of the available ring, from index idx on, as they stand in
// the shadow.
func (q *SplitDriver) writeAvail(idx uint16, n int) {
	b := q.scratch[:2*n]
	for i := 0; i < n; i++ {
		binary.LittleEndian.PutUint16(b[2*i:], q.ring[(idx+uint16(i))&q.mask])
	}
	q.driver.writeRing(b, uint64(idx&q.mask), uint64(n), uint64(q.size), 2)
}

// chain writes the descriptors of a checked request, and tells false where there are
// too few.
func (q *SplitDriver) chain(r *Request) (uint16, bool) {
	n := len(r.Bufs)
	indirect := q.indirectMax > 0 && n >= q.indirectMin && n <= q.indirectMax
	need := n
	if indirect {
		need = 1
	}
	if q.nfree < need {
		return 0, false
	}
	var writable uint32 // check has bounded the sum
	for i := r.Readable; i < n; i++ {
		writable += r.Bufs[i].Len
	}
	head := q.take()
	if indirect {
		q.slots[head] = slot{token: r.Token, writable: writable, count: 1}
		q.table(head, r)
		return head, true
	}
	i := head
	for k := range r.Bufs {
		b := &r.Bufs[k]
		var flags, next uint16
		if k >= r.Readable {
			flags = descWrite
		}
		if k < n-1 {
			flags |= descNext
			next = q.take()
		}
		q.put(i, uint64(b.Addr), rest(b.Len, flags, next))
		q.slots[i].next = next
		i = next
	}
	s := &q.slots[head]
	s.token, s.writable, s.count = r.Token, writable, uint16(n)
	return head, true
}

// table writes the indirect table of head and the descriptor that points to it
// (virtio 1.2, 2.7.5.3).
func (q *SplitDriver) table(head uint16, r *Request) {
	n := len(r.Bufs)
	t := &q.indirect
	off := uint64(head) * uint64(q.indirectMax) * descSize
	for k := range r.Bufs {
		b := &r.Bufs[k]
		var flags, next uint16
		if k >= r.Readable {
			flags = descWrite
		}
		if k < n-1 {
			flags |= descNext
			next = uint16(k + 1)
		}
		if t.direct {
			t.ram.Store64(off+uint64(k)*descSize, uint64(b.Addr))
			t.ram.Store64(off+uint64(k)*descSize+8, rest(b.Len, flags, next))
			continue
		}
		binary.LittleEndian.PutUint64(q.scratch[k*descSize:], uint64(b.Addr))
		binary.LittleEndian.PutUint64(q.scratch[k*descSize+8:], rest(b.Len, flags, next))
	}
	if !t.direct {
		t.copyIn(off, q.scratch[:n*descSize])
	}
	q.put(head, q.indirectAddr+off, rest(uint32(n)*descSize, descIndirect, 0))
}

// NeedKick implements Driver.
func (q *SplitDriver) NeedKick() bool {
	n := q.sinceKick
	if n == 0 || q.err != nil {
		return false
	}
	old, any := q.lastKick, q.kickAny
	q.lastKick, q.sinceKick, q.kickAny = q.avail, 0, false
	q.fence(mmio.FullBarrier) // C
	var need bool
	if q.eventIdx {
		need = needEvent(q.device.load16(availEventOff(q.size)), q.avail, old) || any || n >= 1<<16
	} else {
		need = uint16(q.device.load32(0))&usedNoNotify == 0
	}
	if need {
		q.stats.add(cNotify, 1)
	} else {
		q.stats.add(cSuppressed, 1)
	}
	q.device.flush()
	return need
}

// look reads the used index and returns how many used elements wait.
func (q *SplitDriver) look() (uint16, error) {
	idx := uint16(q.consume(&q.device) >> 16)
	q.stats.add(cIndexReads, 1)
	q.device.flush()
	if idx == q.usedSeen {
		return idx - q.used, nil
	}
	waiting, inflight := idx-q.used, q.avail-q.used
	if waiting > inflight || waiting < q.usedSeen-q.used {
		return 0, q.fail(&Error{Code: ErrUsedJump, Index: idx, Value: uint64(waiting), Limit: uint64(inflight)})
	}
	q.usedSeen = idx
	q.acquire() // B
	q.stats.add(cIndexMoved, 1)
	return waiting, nil
}

// Reap implements Driver.
func (q *SplitDriver) Reap(done []Completion) (int, error) {
	if q.err != nil {
		return 0, q.err
	}
	waiting := q.usedSeen - q.used
	if waiting == 0 {
		var err error
		if waiting, err = q.look(); err != nil {
			return 0, err
		}
	}
	m := len(done)
	if m > int(waiting) {
		m = int(waiting)
	}
	if m == 0 {
		return 0, nil
	}
	if q.inOrder {
		return q.reapInOrder(done[:m])
	}
	direct, ram := q.device.direct, q.device.ram
	slots := q.slots
	if !direct {
		q.device.readRing(q.scratch, uint64(q.used&q.mask), uint64(m), uint64(q.size), usedSize)
		q.device.flush()
	}
	var err error
	var bytes uint64
	n := 0
	for n < m {
		var id, length uint32
		if direct {
			off := ringHead + usedSize*uint64((q.used+uint16(n))&q.mask)
			id, length = ram.Load32(off), ram.Load32(off+4)
		} else {
			id = binary.LittleEndian.Uint32(q.scratch[n*usedSize:])
			length = binary.LittleEndian.Uint32(q.scratch[n*usedSize+4:])
		}
		if id >= uint32(len(slots)) || slots[id].count == 0 {
			err = q.fail(&Error{Code: ErrUsedID, Index: q.used + uint16(n), Value: uint64(id)})
			break
		}
		s := &slots[id]
		if length > s.writable {
			err = q.fail(&Error{Code: ErrUsedLen, Index: q.used + uint16(n), Head: uint16(id), Value: uint64(length), Limit: uint64(s.writable)})
			break
		}
		done[n] = Completion{Token: s.token, Len: length}
		bytes += uint64(length)
		q.release(uint16(id))
		n++
	}
	q.reaped(n, bytes)
	return n, err
}

// release frees the descriptors of a chain.
func (q *SplitDriver) release(head uint16) {
	s := &q.slots[head]
	i := head
	for c := s.count; ; c-- {
		q.give(i)
		if c == 1 {
			break
		}
		i = q.slots[i].next
	}
	s.count = 0
}

func (q *SplitDriver) reaped(n int, bytes uint64) {
	q.used += uint16(n)
	q.setState(q.avail, q.used)
	q.stats.add(cDone, uint64(n))
	q.stats.add(cDoneBytes, bytes)
}

// reapInOrder is Reap with VIRTIO_F_IN_ORDER, of no more chains than the used index tells: a used element
// completes its chain and all before it (virtio 1.2, 2.7.9). The shadow of the available ring
// knows their order.
func (q *SplitDriver) reapInOrder(done []Completion) (int, error) {
	var bytes uint64
	n := 0
	for n < len(done) {
		if q.run == 0 {
			at := q.used + uint16(n)
			off := ringHead + usedSize*uint64(at&q.mask)
			id, length := q.device.load32(off), q.device.load32(off+4)
			if id >= uint32(len(q.slots)) || q.slots[id].count == 0 {
				q.reaped(n, bytes)
				return n, q.fail(&Error{Code: ErrUsedID, Index: at, Value: uint64(id)})
			}
			if s := &q.slots[id]; length > s.writable {
				q.reaped(n, bytes)
				return n, q.fail(&Error{Code: ErrUsedLen, Index: at, Head: uint16(id), Value: uint64(length), Limit: uint64(s.writable)})
			}
			waiting, k := int(q.usedSeen-at), 0
			for k < waiting && uint32(q.ring[(at+uint16(k))&q.mask]) != id {
				k++
			}
			if k == waiting {
				q.reaped(n, bytes)
				return n, q.fail(&Error{Code: ErrUsedOrder, Index: at, Head: uint16(id), Value: uint64(waiting)})
			}
			q.run, q.runLen = k+1, length
		}
		head := q.ring[(q.used+uint16(n))&q.mask]
		s := &q.slots[head]
		length := s.writable
		if q.run--; q.run == 0 {
			length = q.runLen
		}
		done[n] = Completion{Token: s.token, Len: length}
		bytes += uint64(length)
		q.release(head)
		n++
	}
	q.device.flush()
	q.reaped(n, bytes)
	return n, nil
}

// ArmCall implements Driver.
func (q *SplitDriver) ArmCall() (bool, error) { return q.ArmCallAfter(1) }

// ArmCallAfter implements Driver.
func (q *SplitDriver) ArmCallAfter(n int) (bool, error) {
	if q.err != nil {
		return false, q.err
	}
	if inflight := int(q.avail - q.used); n > inflight {
		n = inflight
	}
	if n < 1 || !q.eventIdx {
		n = 1
	}
	q.stats.add(cArms, 1)
	if int(q.usedSeen-q.used) >= n {
		q.stats.add(cArmPending, 1)
		return true, nil
	}
	off, width := uint64(0), uint(4)
	if q.eventIdx {
		off, width = usedEventOff(q.size), 2
		if event := q.used + uint16(n) - 1; event != q.usedEvent {
			q.usedEvent, q.settled = event, false
			q.driver.store16(off, event)
		}
	} else if q.flags != 0 {
		q.flags, q.settled = 0, false
		q.driver.store32(0, word(0, q.avail))
	}
	// Where the word stands as it was, the device has seen it since it was settled.
	if !q.settled {
		q.settle(&q.driver, off, width, &q.device) // D
		q.settled = true
		q.driver.flush()
	}
	waiting, err := q.look()
	if err != nil {
		return false, err
	}
	if int(waiting) < n {
		return false, nil
	}
	q.stats.add(cArmPending, 1)
	return true, nil
}

// DisarmCall implements Driver. With the event index there is nothing to write: the event
// stays behind as the used index moves on, and asks for one call in 65536 at most.
func (q *SplitDriver) DisarmCall() {
	if q.eventIdx || q.flags == availNoInterrupt || q.err != nil {
		return
	}
	q.flags, q.settled = availNoInterrupt, false
	q.driver.store32(0, word(q.flags, q.avail))
	q.driver.flush()
}
