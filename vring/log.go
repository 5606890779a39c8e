package vring

import (
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
)

// Log says where the device side of a queue marks the pages that it writes, for whoever copies the memory while
// the queue runs (live migration). The zero Log marks nothing.
//
// All marks follow what they stand for. Those of buffers are made before their chain is published as used; those of
// the ring's own words follow at once. So when a method of Device returns, all that was written in it is marked,
// and all of the buffers of chains that it completed.
type Log struct {
	Bits *dma.Log // nil: off
	// Buffers: buffers are marked. Else only what the device side writes of the ring is.
	Buffers bool
	// At is where the device area is marked besides its own address, if HasAt is set: the front end may say so
	// (vhost-user, log_guest_addr).
	At    dma.Addr
	HasAt bool
}

// dirty is how a device side keeps a Log.
type dirty struct {
	bits  *dma.Log // nil: nothing is marked
	log   Log
	byLen bool
	kept  [][]piece // the writable pieces of chains in flight, by ID; nil: buffers are not marked
}

// piece is a piece of memory that a chain lets the device write.
type piece struct {
	addr dma.Addr
	n    uint32
}

// set replaces the log of a queue of size descriptors.
func (d *dirty) set(l Log, size uint16) {
	d.log, d.bits, d.kept = l, l.Bits, nil
	if l.Bits != nil && l.Buffers {
		d.kept = make([][]piece, size)
	}
}

// keep remembers where the last n chains of b may be written.
func (d *dirty) keep(b *Batch, n int) {
	for i := len(b.Chains) - n; i < len(b.Chains); i++ {
		c := &b.Chains[i]
		k := d.kept[c.ID][:0]
		for _, s := range b.Spans[int(c.First)+int(c.Readable):][:c.Writable] {
			k = append(k, piece{s.Addr(), s.Len})
		}
		d.kept[c.ID] = k
	}
}

// mark marks the first n bytes that the device may write of the chain id.
func (d *dirty) mark(id uint16, n uint32) {
	if int(id) >= len(d.kept) {
		return
	}
	for _, p := range d.kept[id] {
		if p.n > n {
			p.n = n
		}
		d.bits.Mark(p.addr, uint64(p.n))
		n -= p.n
	}
}

// markUsed marks the buffers of chains that are about to be completed.
func (q *deviceSide) markUsed(used []Used) {
	q.fence(mmio.FullBarrier)
	for i := range used {
		n := ^uint32(0)
		if q.dirty.byLen {
			n = used[i].Len
		}
		q.dirty.mark(used[i].ID, n)
	}
}

// markRing marks n entries of the given width, from entry pos on, of the ring of size entries that starts at byte head of
// the area a.
func (q *deviceSide) markRing(a *area, head, pos, n, width uint64) {
	if first := uint64(q.size) - pos; n > first {
		q.markArea(a, head, (n-first)*width)
		n = first
	}
	q.markArea(a, head+pos*width, n*width)
}

// markArea marks n bytes at off of an area. A full barrier has to be between their stores and this.
func (q *deviceSide) markArea(a *area, off, n uint64) {
	q.dirty.bits.Mark(dma.Addr(a.addr+off), n)
	if q.dirty.log.HasAt && a == &q.device {
		q.dirty.bits.Mark(q.dirty.log.At+dma.Addr(off), n)
	}
}

// markWord marks a word of the device area that was written, and tells the log's reader.
func (q *deviceSide) markWord(off, n uint64) {
	q.fence(mmio.FullBarrier)
	q.markArea(&q.device, off, n)
	q.dirty.bits.Tell()
}

// SetLog implements Device.
func (q *deviceSide) SetLog(l Log) { q.dirty.set(l, q.size) }

// Wrote implements Device.
func (q *deviceSide) Wrote(id uint16, n uint32) {
	if q.dirty.kept != nil {
		q.fence(mmio.FullBarrier)
		q.dirty.mark(id, n)
	}
}
