package vring

import (
	"encoding/binary"
	"fmt"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
)

// look reads the available index to availSeen, once all that it had seen is popped.
func (q *SplitDevice) look() error {
	var idx uint16
	if q.half {
		idx = q.driver.load16(2)
	} else {
		idx = uint16(q.consume(&q.driver) >> 16)
	}
	q.stats.add(cIndexReads, 1)
	q.driver.flush()
	waiting := idx - q.avail
	if waiting == 0 {
		return nil
	}
	// A chain takes a descriptor at least, so no more can be in flight than the queue
	// has. An index that went back shows as a jump by nearly 65536.
	inflight := uint32(q.avail-q.used) + uint32(waiting)
	if inflight > uint32(q.size) {
		return q.fail(&Error{Code: ErrIndexJump, Index: idx, Value: uint64(inflight), Limit: uint64(q.size)})
	}
	q.availSeen = idx
	if q.half {
		q.fence(mmio.ReadBarrier)
	} else {
		q.acquire() // B
	}
	q.stats.add(cIndexMoved, 1)
	return nil
}

// Pop implements Device. Its steps, and what each checks:
//
//	look                the available index, once for a batch: ErrIndexJump
//	head                the entry of the available ring: ErrHeadRange
//	fetch               the descriptor, read once
//	inHot, translate    the buffer of a chain that has one: ErrZeroLength, ErrOverflow, ErrTranslate
//	walk, buffer        a chain of several descriptors: the same, ErrNextRange, ErrLoop, ErrOrder, ErrTotal, ErrSpans
//	walkTable           what it has in an indirect table: the same, ErrIndirectNotNegotiated, ErrIndirectLen, ...
//
// The last three are calls, the others are inlined where the memory is direct.
func (q *SplitDevice) Pop(b *Batch, max int) (int, error) {
	if q.err != nil {
		return 0, q.err
	}
	q.reload()
	if q.availSeen == q.avail {
		if err := q.look(); err != nil {
			return 0, err
		}
	}
	m := int(q.availSeen - q.avail)
	if m > max {
		m = max
	}
	if m <= 0 {
		return 0, nil
	}
	if !q.driver.direct {
		q.readHeads(m)
	}
	q.runLo, q.runHi = 0, 0
	direct, desc := q.desc.direct, q.desc.ram
	size, chains, spans := q.size, b.Chains, b.Spans
	limit := len(spans) + int(size)
	left := int(size) // descriptors that the batch may take: chains share none
	var bytes uint64
	var bad *Error
	n := 0
	for n < m && len(spans) < limit {
		slot := (q.avail + uint16(n)) & q.mask // of the available ring
		head := q.head(slot, n)
		if head >= size {
			bad = &Error{Code: ErrHeadRange, Value: uint64(head), Limit: uint64(size) - 1}
			break
		}
		var d splitDesc
		if direct {
			d.addr, d.rest = desc.Load64Pair(uint64(head) * descSize)
		} else {
			d = q.fetch(head, n, m)
		}
		kept := len(spans)
		chains = oneMore(chains)
		c := &chains[len(chains)-1]
		*c = Chain{ID: head, Count: 1, First: int32(kept)}
		if d.alone() {
			left-- // not below 0: each descriptor taken made a span, and limit stops the batch
			if need := access(d.flags()); q.inHot(d.addr, d.len(), need) {
				spans = append(spans, dma.Span{Region: q.hot, Off: d.addr - q.hotAddr, Len: d.len()})
			} else {
				spans, bad = q.translate(spans, c, head, d.addr, d.len(), need)
			}
			c.only(d.len(), d.flags(), len(spans)-kept)
			bytes += uint64(d.len())
		} else {
			b.Spans = spans
			left, bad = q.walk(b, c, d, left)
			spans = b.Spans
			bytes += uint64(c.ReadLen) + uint64(c.WriteLen)
		}
		if bad != nil {
			chains, spans = chains[:len(chains)-1], spans[:kept]
			break
		}
		if q.inOrder {
			q.order[slot], q.full[head] = head, c.WriteLen
		}
		n++
	}
	b.Chains, b.Spans = chains, spans
	if q.dirty.kept != nil {
		q.dirty.keep(b, n)
	}
	return n, q.popped(n, bytes, bad)
}

// head returns the head of the n-th chain of a batch, which stands in the given slot of the available ring.
func (q *SplitDevice) head(slot uint16, n int) uint16 {
	if q.driver.direct {
		return q.driver.ram.Load16(ringHead + 2*uint64(slot))
	}
	return q.heads[n]
}

// popped counts n chains of a batch as popped, and breaks the queue where bad ended it.
func (q *SplitDevice) popped(n int, bytes uint64, bad *Error) error {
	q.avail += uint16(n)
	q.setState(q.avail, q.used)
	q.stats.add(cChains, uint64(n))
	q.stats.add(cBytes, bytes)
	q.driver.flush()
	q.desc.flush()
	if bad != nil {
		bad.Index = q.avail
		return q.fail(bad)
	}
	return nil
}

// readHeads copies the next m entries of the available ring to heads.
func (q *SplitDevice) readHeads(m int) {
	q.driver.readRing(q.raw, uint64(q.avail&q.mask), uint64(m), uint64(q.size), 2)
	for i := range q.heads[:m] {
		q.heads[i] = binary.LittleEndian.Uint16(q.raw[2*i:])
	}
}

// fetch returns descriptor head of chain n of m, in memory that is not direct. Where the
// heads that follow are those of the descriptors that follow, all are read in one burst.
func (q *SplitDevice) fetch(head uint16, n, m int) splitDesc {
	h := int(head)
	if h < q.runLo || h >= q.runHi {
		k := 1
		// Where the driver area is direct while the descriptors are not, heads are
		// not at hand.
		if q.heads != nil {
			for n+k < m && int(q.heads[n+k]) == h+k && h+k < int(q.size) {
				k++
			}
		}
		q.runLo, q.runHi = h, h+k
		q.desc.copyOut(q.run[h*descSize:(h+k)*descSize], uint64(h)*descSize)
	}
	return splitDesc{binary.LittleEndian.Uint64(q.run[h*descSize:]), binary.LittleEndian.Uint64(q.run[h*descSize+8:])}
}

// walk takes the chain c that starts with descriptor d, of at most left
// descriptors in the ring, and returns how many are left.
func (q *SplitDevice) walk(b *Batch, c *Chain, d splitDesc, left int) (int, *Error) {
	head := c.ID
	at := head
	buffers := 0 // of the chain, those of an indirect table included
	for {
		if left == 0 {
			return 0, &Error{Code: ErrLoop, Head: head, Desc: at, Value: uint64(q.size) + 1, Limit: uint64(q.size)}
		}
		left--
		addr, length, flags := dma.Addr(d.addr), d.len(), d.flags()
		if flags&descIndirect != 0 {
			if flags&descNext != 0 {
				return 0, &Error{Code: ErrIndirectNext, Head: head, Desc: at, Addr: addr, Len: length}
			}
			return left, q.walkTable(b, c, at, addr, length, buffers)
		}
		if bad := q.buffer(b, c, at, addr, length, flags); bad != nil {
			return 0, bad
		}
		buffers++
		if flags&descNext == 0 {
			return left, nil
		}
		next := d.next()
		if next >= q.size {
			return 0, &Error{Code: ErrNextRange, Head: head, Desc: at, Value: uint64(next), Limit: uint64(q.size) - 1}
		}
		at = next
		if q.desc.direct {
			d.addr, d.rest = q.desc.ram.Load64Pair(uint64(at) * descSize)
		} else {
			d = q.fetch(at, 0, 0)
		}
	}
}

// walkTable takes the rest of chain c from the indirect table that descriptor at points to
// (virtio 1.2, 2.7.5.3). Its WRITE flag means nothing (2.7.5.3.2).
func (q *SplitDevice) walkTable(b *Batch, c *Chain, at uint16, addr dma.Addr, length uint32, buffers int) *Error {
	tab, bad := q.fetchTable(c.ID, at, addr, length)
	if bad != nil {
		return bad
	}
	entries := length / descSize
	for i, steps := uint32(0), uint32(0); ; steps++ {
		if steps == entries || buffers == int(q.size) {
			// One more than the table, or the queue, has room for.
			return &Error{Code: ErrLoop, Head: c.ID, Desc: uint16(i), Value: uint64(buffers) + 1, Limit: uint64(buffers)}
		}
		a := dma.Addr(binary.LittleEndian.Uint64(tab[i*descSize:]))
		w := binary.LittleEndian.Uint64(tab[i*descSize+8:])
		n, flags, next := uint32(w), uint16(w>>32), uint16(w>>48)
		if flags&descIndirect != 0 {
			return &Error{Code: ErrIndirectNested, Head: c.ID, Desc: uint16(i), Addr: a, Len: n}
		}
		if bad := q.buffer(b, c, uint16(i), a, n, flags); bad != nil {
			return bad
		}
		buffers++
		if flags&descNext == 0 {
			return nil
		}
		if uint32(next) >= entries {
			return &Error{Code: ErrIndirectNextRange, Head: c.ID, Desc: uint16(i), Value: uint64(next), Limit: uint64(entries) - 1}
		}
		i = uint32(next)
	}
}

// Unpop implements Device.
func (q *SplitDevice) Unpop(n int) {
	if n == 0 || q.err != nil {
		return
	}
	if inflight := int(q.avail - q.used); n < 0 || n > inflight {
		panic(fmt.Sprintf("vring: %s: unpops %d chains of %d", q.name, n, inflight))
	}
	q.avail -= uint16(n)
	q.setState(q.avail, q.used)
	q.stats.add(cChains, -uint64(n))
}
