package vring

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// The record of a driver side: all that it needs, beside its Config and the memory of the queue, to go on
// with chains in flight in another process (hand-over) or after a stop. A device side needs only a
// State, since the ring itself holds the rest; a driver side knows tokens, free descriptors and shadows that
// are in no shared memory.
//
// The record is private to boardlink and versioned; all numbers are little-endian:
//
//	u32 magic, u16 version, u8 kind, u8 flags (event index, indirect, in order)
//	u16 size, u16 available and used index or position, u16 used index seen (split)
//	u16 flags of the available ring, u16 used_event (split); u32 event suppression word (packed)
//	u32 run, u32 length of the run's last chain (VIRTIO_F_IN_ORDER)
//	u16 descriptors of an indirect table
//	split:  size x (u64, u64) descriptors, size x u16 available ring, size x slot, u16 n, n x u16 free descriptors
//	packed: size x slot, u16 n, n x u16 free buffer ids, u16 n, n x u16 ids in flight in order
//	slot:   u32 token, u32 writable bytes, u16 count, u16 next (split)
const (
	recordMagic   = 0x52445256 // "VRDR"
	recordVersion = 1
	recordSplit   = 1
	recordPacked  = 2
)

var errRecord = errors.New("the record of the driver side is damaged")

// recordWriter appends little-endian numbers.
type recordWriter struct{ b []byte }

func (w *recordWriter) u8(v uint8)   { w.b = append(w.b, v) }
func (w *recordWriter) u16(v uint16) { w.b = append(w.b, byte(v), byte(v>>8)) }
func (w *recordWriter) u32(v uint32) { w.u16(uint16(v)); w.u16(uint16(v >> 16)) }
func (w *recordWriter) u64(v uint64) { w.u32(uint32(v)); w.u32(uint32(v >> 32)) }

// recordReader takes little-endian numbers; short tells that there were too few bytes.
type recordReader struct {
	b     []byte
	short bool
}

func (r *recordReader) take(n int) []byte {
	if len(r.b) < n {
		r.short = true
		r.b = nil
		return make([]byte, n)
	}
	b := r.b[:n]
	r.b = r.b[n:]
	return b
}

func (r *recordReader) u8() uint8   { return r.take(1)[0] }
func (r *recordReader) u16() uint16 { return binary.LittleEndian.Uint16(r.take(2)) }
func (r *recordReader) u32() uint32 { return binary.LittleEndian.Uint32(r.take(4)) }
func (r *recordReader) u64() uint64 { return binary.LittleEndian.Uint64(r.take(8)) }

// done reports a record that is too short or too long.
func (r *recordReader) done() error {
	if r.short || len(r.b) != 0 {
		return fmt.Errorf("%w: wrong length", errRecord)
	}
	return nil
}

// recordHead is what records of both kinds begin with.
type recordHead struct {
	avail, used, usedSeen uint16
	flags, usedEvent      uint16
	event                 uint32
}

// recordFlags returns the features that shape a record.
func (q *driverSide) recordFlags() uint8 {
	var f uint8
	if q.eventIdx {
		f |= 1
	}
	if q.indirectMax > 0 {
		f |= 2
	}
	if q.inOrder {
		f |= 4
	}
	return f
}

func (q *driverSide) saveHead(w *recordWriter, kind uint8, h recordHead) {
	w.u32(recordMagic)
	w.u16(recordVersion)
	w.u8(kind)
	w.u8(q.recordFlags())
	for _, v := range [...]uint16{q.size, h.avail, h.used, h.usedSeen, h.flags, h.usedEvent} {
		w.u16(v)
	}
	w.u32(h.event)
	w.u32(uint32(q.run))
	w.u32(q.runLen)
	w.u16(uint16(q.indirectMax))
}

// loadHead takes the head of a record, which has to be one of this queue.
func (q *driverSide) loadHead(r *recordReader, kind uint8) (h recordHead, err error) {
	magic, version, k, flags := r.u32(), r.u16(), r.u8(), r.u8()
	size := r.u16()
	h = recordHead{avail: r.u16(), used: r.u16(), usedSeen: r.u16(), flags: r.u16(), usedEvent: r.u16(), event: r.u32()}
	run, runLen, indirect := r.u32(), r.u32(), r.u16()
	switch {
	case r.short:
		return h, fmt.Errorf("%w: it ends within its head", errRecord)
	case magic != recordMagic:
		return h, fmt.Errorf("%w: magic number %#x, want %#x", errRecord, magic, recordMagic)
	case version != recordVersion:
		return h, fmt.Errorf("a record of version %d: this program knows version %d", version, recordVersion)
	case k != kind:
		return h, fmt.Errorf("a record of a virtqueue of kind %d, want %d (split %d, packed %d)", k, kind, recordSplit, recordPacked)
	case size != q.size:
		return h, fmt.Errorf("a record of a virtqueue of %d descriptors, this one has %d", size, q.size)
	case flags != q.recordFlags() || int(indirect) != q.indirectMax:
		return h, fmt.Errorf("a record of a virtqueue with features %#x and indirect tables of %d, this one has %#x and %d", flags, indirect, q.recordFlags(), q.indirectMax)
	case run > uint32(q.size) || run > 0 && !q.inOrder:
		return h, fmt.Errorf("%w: a run of %d completed chains in a queue of %d", errRecord, run, q.size)
	}
	q.run, q.runLen = int(run), runLen
	return h, nil
}

// ids takes a counted list of numbers below the size.
func (q *driverSide) ids(r *recordReader, what string) ([]uint16, error) {
	n := int(r.u16())
	if n > int(q.size) {
		return nil, fmt.Errorf("%w: %d %s in a queue of %d", errRecord, n, what, q.size)
	}
	list := make([]uint16, n)
	seen := make([]bool, q.size)
	for i := range list {
		v := r.u16()
		if r.short || v >= q.size || seen[v] {
			return nil, fmt.Errorf("%w: %s: entry %d (%d) is out of range or there twice", errRecord, what, i, v)
		}
		list[i], seen[v] = v, true
	}
	return list, nil
}

// Save implements Driver.
func (q *SplitDriver) Save() ([]byte, error) {
	if q.err != nil {
		return nil, q.err
	}
	w := &recordWriter{b: make([]byte, 0, 64+32*int(q.size))}
	q.saveHead(w, recordSplit, recordHead{avail: q.avail, used: q.used, usedSeen: q.usedSeen, flags: q.flags, usedEvent: q.usedEvent})
	for i := range q.descs {
		w.u64(q.descs[i][0])
		w.u64(q.descs[i][1])
	}
	for _, h := range q.ring {
		w.u16(h)
	}
	for i := range q.slots {
		s := &q.slots[i]
		w.u32(s.token)
		w.u32(s.writable)
		w.u16(s.count)
		w.u16(s.next)
	}
	w.u16(uint16(q.nfree))
	for i := 0; i < q.nfree; i++ {
		w.u16(q.free[(q.first+uint16(i))&q.mask])
	}
	return w.b, nil
}

// ResumeSplitDriver makes the driver side of a split virtqueue that goes on where Save left it, with its
// chains in flight. The memory of the queue is taken as it is: c describes the same areas as
// before, its State does not count. It fails with an *Error of Code ErrConfig, or ErrState where the
// record is not one of this queue.
func ResumeSplitDriver(c Config, record []byte) (*SplitDriver, error) {
	c.State = State{}
	q, err := allocSplitDriver(&c)
	if err != nil {
		return nil, err
	}
	if err := q.load(&recordReader{b: record}); err != nil {
		return nil, &Error{Queue: c.Name, Code: ErrState, Err: err}
	}
	// The device may have missed a kick, and a suppression word may still be on its way.
	q.lastKick, q.kickAny, q.settled = q.avail, true, false
	if q.avail != q.used {
		q.sinceKick = 1
	}
	q.setState(q.avail, q.used)
	return q, nil
}

func (q *SplitDriver) load(r *recordReader) error {
	h, err := q.loadHead(r, recordSplit)
	if err != nil {
		return err
	}
	for i := range q.descs {
		q.descs[i] = [2]uint64{r.u64(), r.u64()}
	}
	for i := range q.ring {
		q.ring[i] = r.u16()
	}
	for i := range q.slots {
		q.slots[i] = slot{token: r.u32(), writable: r.u32(), count: r.u16(), next: r.u16()}
	}
	free, err := q.ids(r, "free descriptors")
	if err != nil {
		return err
	}
	if err := r.done(); err != nil {
		return err
	}
	copy(q.free, free)
	q.first, q.nfree = 0, len(free)
	q.avail, q.used, q.usedSeen, q.flags, q.usedEvent = h.avail, h.used, h.usedSeen, h.flags, h.usedEvent
	return q.checkLoaded(free)
}

// checkLoaded makes sure that each descriptor is either free or in one chain in flight, and that the
// indices agree with that: what follows relies on it without checks.
func (q *SplitDriver) checkLoaded(free []uint16) error {
	inflight, seen := q.avail-q.used, q.usedSeen-q.used
	if inflight > q.size || seen > inflight || q.run > int(seen) {
		return fmt.Errorf("%w: indices available %d, used %d, used seen %d, a run of %d", errRecord, q.avail, q.used, q.usedSeen, q.run)
	}
	owned := make([]bool, q.size)
	for _, i := range free {
		owned[i] = true
		if q.slots[i].count != 0 {
			return fmt.Errorf("%w: descriptor %d is free and heads a chain", errRecord, i)
		}
	}
	chains, descs := 0, len(free)
	for head := range q.slots {
		count := q.slots[head].count
		if count == 0 {
			continue
		}
		chains++
		i := uint16(head)
		for ; count > 0; count-- {
			if i >= q.size || owned[i] {
				return fmt.Errorf("%w: descriptor %d of chain %d is out of range or in use twice", errRecord, i, head)
			}
			owned[i] = true
			descs++
			i = q.slots[i].next
		}
	}
	if chains != int(inflight) || descs != int(q.size) {
		return fmt.Errorf("%w: %d chains of %d in flight, %d descriptors of %d", errRecord, chains, inflight, descs, q.size)
	}
	if !q.inOrder {
		return nil
	}
	last := make([]bool, q.size)
	for i := uint16(0); i < inflight; i++ {
		h := q.ring[(q.used+i)&q.mask]
		if h >= q.size || q.slots[h].count == 0 || last[h] {
			return fmt.Errorf("%w: available ring entry %d is no chain in flight", errRecord, q.used+i)
		}
		last[h] = true
	}
	if q.run > 0 {
		h := q.ring[(q.used+uint16(q.run)-1)&q.mask]
		if limit := q.slots[h].writable; q.runLen > limit {
			return fmt.Errorf("%w: a run that ends with %d bytes of %d", errRecord, q.runLen, limit)
		}
	}
	return nil
}

// Save implements Driver.
func (q *PackedDriver) Save() ([]byte, error) {
	if q.err != nil {
		return nil, q.err
	}
	w := &recordWriter{b: make([]byte, 0, 64+16*int(q.size))}
	q.saveHead(w, recordPacked, recordHead{avail: q.avail, used: q.used, event: q.p.event})
	for i := range q.slots {
		s := &q.slots[i]
		w.u32(s.token)
		w.u32(s.writable)
		w.u16(s.count)
	}
	w.u16(uint16(q.nids))
	for _, id := range q.ids[:q.nids] {
		w.u16(id)
	}
	n := 0
	if q.inOrder {
		n = q.flying
	}
	w.u16(uint16(n))
	for i := 0; i < n; i++ {
		w.u16(q.order[(q.first+i)%len(q.order)])
	}
	return w.b, nil
}

// ResumePackedDriver makes the driver side of a packed virtqueue that goes on where Save left it: see
// ResumeSplitDriver.
func ResumePackedDriver(c Config, record []byte) (*PackedDriver, error) {
	c.State = State{}
	q, err := allocPackedDriver(&c)
	if err != nil {
		return nil, err
	}
	if err := q.load(&recordReader{b: record}); err != nil {
		return nil, &Error{Queue: c.Name, Code: ErrState, Err: err}
	}
	q.p.anyhow, q.p.unsettled = true, true
	if q.flying > 0 {
		q.p.since = 1
	}
	q.setState(q.avail, q.used)
	return q, nil
}

func (q *PackedDriver) load(r *recordReader) error {
	h, err := q.loadHead(r, recordPacked)
	if err != nil {
		return err
	}
	for i := range q.slots {
		q.slots[i] = packedSlot{token: r.u32(), writable: r.u32(), count: r.u16()}
	}
	ids, err := q.driverSide.ids(r, "free buffer ids")
	if err != nil {
		return err
	}
	order, err := q.driverSide.ids(r, "buffer ids in order")
	if err != nil {
		return err
	}
	if err := r.done(); err != nil {
		return err
	}
	copy(q.ids, ids)
	copy(q.order, order)
	q.nids, q.first, q.p.event = len(ids), 0, h.event
	q.avail, q.used = h.avail, h.used
	return q.checkLoaded(ids, order)
}

// checkLoaded makes sure that each buffer id is either free or in flight, and that the positions agree
// with the descriptors of those in flight.
func (q *PackedDriver) checkLoaded(free, order []uint16) error {
	_, inflight, err := q.packedState(State{Avail: q.avail, Used: q.used, Packed: true})
	if err != nil {
		return fmt.Errorf("%w: %v", errRecord, err)
	}
	for _, id := range free {
		if q.slots[id].count != 0 {
			return fmt.Errorf("%w: buffer id %d is free and in flight", errRecord, id)
		}
	}
	descs := 0
	q.flying = 0
	for i := range q.slots {
		if n := int(q.slots[i].count); n > 0 {
			descs += n
			q.flying++
		}
	}
	if descs != int(inflight) || len(free)+q.flying != int(q.size) || q.run > q.flying {
		return fmt.Errorf("%w: %d descriptors of %d in flight, %d buffer ids free and %d in flight of %d, a run of %d",
			errRecord, descs, inflight, len(free), q.flying, q.size, q.run)
	}
	q.nfree = int(q.size) - descs
	if !q.inOrder {
		if len(order) != 0 {
			return fmt.Errorf("%w: an order of completion without VIRTIO_F_IN_ORDER", errRecord)
		}
		return nil
	}
	if len(order) != q.flying {
		return fmt.Errorf("%w: %d buffer ids in order, %d in flight", errRecord, len(order), q.flying)
	}
	for _, id := range order {
		if q.slots[id].count == 0 {
			return fmt.Errorf("%w: buffer id %d is in order and not in flight", errRecord, id)
		}
	}
	if q.run > 0 {
		if limit := q.slots[order[q.run-1]].writable; q.runLen > limit {
			return fmt.Errorf("%w: a run that ends with %d bytes of %d", errRecord, q.runLen, limit)
		}
	}
	return nil
}
