package block

import (
	"fmt"
	"sync"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/driver/internal/plain"
	"github.com/boardlink/boardlink/pci"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/vring"
)

const (
	// headStride is the room for the header and the segment of a request, statusStride that for its status.
	headStride   = virtio.BlkHeaderLen + virtio.BlkSegmentLen
	statusStride = 16
	// noStatus stands in the status byte until the device writes it.
	noStatus = 0xff
)

// slot is a request in flight on a queue, or a part of one.
type slot struct {
	extent
	mem   *pool // nil: no data
	first int   // page
	pages int
}

// queue is a virtqueue with its requests in flight.
type queue struct {
	d      *Disk
	lim    *limits
	broken func(error)

	mu      sync.Mutex // guards the ring and all shared memory; Disk.mu is never taken with it
	down    bool
	ring    *plain.Queue
	heads   dma.Span // header and segment of each slot
	stats   dma.Span // status of each slot
	near    dma.Span // what the device writes
	far     dma.Span // what it reads
	reqs    []vring.Request
	bufs    []vring.Buffer
	results []result

	slots []slot   // Disk.mu; what is in flight belongs to the queue
	free  []uint16 // Disk.mu
}

// result is a slot that the device has returned.
type result struct {
	slot uint16
	err  error
}

// send is a slot that was filled, and is to be made available.
type send struct {
	q    *queue
	slot uint16
}

// outcome is what is to be done after Disk.mu was released.
type outcome struct {
	sends []send
	done  []*Request
}

func (o *outcome) reset() {
	for i := range o.done {
		o.done[i] = nil
	}
	for i := range o.sends {
		o.sends[i].q = nil
	}
	o.sends, o.done = o.sends[:0], o.done[:0]
}

var outcomes = sync.Pool{New: func() interface{} { return new(outcome) }}

// post makes all slots available, one queue after the other.
func post(sends []send) {
	for len(sends) > 0 {
		n := 1
		for n < len(sends) && sends[n].q == sends[0].q {
			n++
		}
		sends[0].q.post(sends[:n])
		sends = sends[n:]
	}
}

// post makes slots of this queue available. Any goroutine may call it.
func (q *queue) post(sends []send) {
	var err error
	fault := pci.Guard(func() { err = q.add(sends) })
	if fault != nil {
		err = fault
	}
	if err != nil {
		q.broken(err)
	}
}

func (q *queue) add(sends []send) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.down {
		return nil // all of them are sent again when the device has come up
	}
	q.reqs, q.bufs = q.reqs[:0], q.bufs[:0]
	for i := range sends {
		first := len(q.bufs)
		readable := q.prepare(sends[i].slot)
		// Bufs is set below: q.bufs may move.
		q.reqs = append(q.reqs, vring.Request{Bufs: q.bufs[first:len(q.bufs)], Readable: readable, Token: uint32(sends[i].slot)})
	}
	n := 0
	for i := range q.reqs {
		l := len(q.reqs[i].Bufs)
		q.reqs[i].Bufs = q.bufs[n : n+l]
		n += l
	}
	return q.ring.Offer(q.reqs...)
}

// prepare writes what the device reads of a slot, appends the buffers of its chain, and returns how many are to be read.
func (q *queue) prepare(i uint16) (readable int) {
	s := &q.slots[i]
	r := s.r
	head := q.heads.Sub(uint32(i)*headStride, headStride)
	h := virtio.BlkHeader{Type: blkTypes[r.Op]}
	if r.Op == Read || r.Op == Write {
		h.Sector = (r.Offset + s.off) / virtio.BlkSector
	}
	b := h.Encode()
	head.CopyIn(0, b[:])
	q.bufs = append(q.bufs, vring.Buffer{Addr: head.Addr(), Len: virtio.BlkHeaderLen})
	readable = 1
	switch r.Op {
	case Write:
		data := q.data(s)
		data.CopyIn(0, r.Data[s.off:s.off+s.n])
		readable += q.pieces(data)
	case Read, GetID:
		q.pieces(q.data(s))
	case Discard, WriteZeroes:
		seg := virtio.BlkSegment{Sector: (r.Offset + s.off) / virtio.BlkSector, Sectors: uint32(s.n / virtio.BlkSector)}
		if r.Op == WriteZeroes && r.Unmap {
			seg.Flags = virtio.BlkUnmap
		}
		b := seg.Encode()
		head.CopyIn(virtio.BlkHeaderLen, b[:])
		q.bufs = append(q.bufs, vring.Buffer{Addr: head.Addr() + virtio.BlkHeaderLen, Len: virtio.BlkSegmentLen})
		readable++
	}
	st := q.stats.Sub(uint32(i)*statusStride, 1)
	st.CopyIn(0, []byte{noStatus})
	q.bufs = append(q.bufs, vring.Buffer{Addr: st.Addr(), Len: 1})
	return readable
}

// blkTypes are the types of requests.
var blkTypes = [...]uint32{Read: virtio.BlkTIn, Write: virtio.BlkTOut, Flush: virtio.BlkTFlush, Discard: virtio.BlkTDiscard,
	WriteZeroes: virtio.BlkTWriteZeroes, GetID: virtio.BlkTGetID}

// dataLen returns how many bytes of data a slot has.
func (s *slot) dataLen() uint32 {
	switch s.r.Op {
	case Read, Write:
		return uint32(s.n) // at most limits.part
	case GetID:
		return virtio.BlkIDLen
	}
	return 0
}

// data returns where the data of a slot lies.
func (q *queue) data(s *slot) dma.Span {
	m := q.near
	if s.r.Op == Write {
		m = q.far
	}
	return m.Sub(uint32(s.first)*pageSize, s.dataLen())
}

// pieces appends buffers of data and returns their number.
func (q *queue) pieces(data dma.Span) int {
	n := 0
	for off := uint32(0); off < data.Len; n++ {
		l := data.Len - off
		if l > q.lim.piece {
			l = q.lim.piece
		}
		q.bufs = append(q.bufs, vring.Buffer{Addr: data.Addr() + dma.Addr(off), Len: l})
		off += l
	}
	return n
}

// take checks what the device returned, and takes the data. The error is the device's fault.
func (q *queue) take(c vring.Completion) (result, error) {
	i := uint16(c.Token) // ours: the ring keeps it
	s := &q.slots[i]
	if c.Len == 0 {
		return result{}, fmt.Errorf("%s: %w: it wrote no byte for a %s of %d bytes", q.d.cfg.Name, ErrStatus, s.r.Op, s.n)
	}
	var b [1]byte
	q.stats.Sub(uint32(i)*statusStride, 1).CopyOut(b[:], 0)
	res := result{slot: i}
	switch b[0] {
	case virtio.BlkOK:
	case virtio.BlkIOErr:
		res.err = ErrIO
		return res, nil
	case virtio.BlkUnsupp:
		res.err = ErrUnsupported
		return res, nil
	default:
		return result{}, fmt.Errorf("%s: %w: %#x for a %s of %d bytes", q.d.cfg.Name, ErrStatus, b[0], s.r.Op, s.n)
	}
	switch s.r.Op {
	case Read:
		if c.Len != uint32(s.n)+1 {
			return result{}, fmt.Errorf("%s: %w: %d bytes and a status were asked for, it wrote %d", q.d.cfg.Name, ErrShort, s.n, c.Len)
		}
		q.data(s).CopyOut(s.r.Data[s.off:s.off+s.n], 0)
	case GetID:
		q.data(s).CopyOut(s.r.Data, 0)
	}
	return res, nil
}

// loop takes what the device returns, until the device is stopped.
func (q *queue) loop() error {
	defer q.ring.Sleep.Done()
	var done [64]vring.Completion
	var o outcome
	var owners []Owner
	for {
		found, pending, err := q.reap(done[:])
		if found {
			owners = q.d.ended(q, &o, owners)
		}
		if err != nil {
			return err
		}
		if found || pending {
			continue
		}
		if why, err := q.ring.Sleep.Sleep(0); err != nil || why&doorbell.Stopped != 0 {
			return err
		}
	}
}

// reap takes what the device has returned into q.results. Where there was nothing it asks to be called, and pending tells that
// something has come meanwhile.
func (q *queue) reap(done []vring.Completion) (found, pending bool, err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	n, err := q.ring.Reap(done)
	q.ring.Sleep.Found(n > 0)
	q.results = q.results[:0]
	for _, c := range done[:n] {
		r, terr := q.take(c)
		if terr != nil {
			return len(q.results) > 0, false, terr
		}
		q.results = append(q.results, r)
	}
	if n > 0 || err != nil {
		return n > 0, false, err
	}
	pending, err = q.ring.ArmCall()
	return false, pending, err
}
