package block

import (
	"errors"
	"fmt"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/pci"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/vring"
)

// scratch is what a goroutine of the pool works with.
type scratch struct {
	data    []dma.Span // of the request, without header and status
	bufs    []unix.Iovec
	staging []byte // nil until it is needed
}

// stage returns the staging memory.
func (s *scratch) stage() []byte {
	if s.staging == nil {
		s.staging = aligned(stagingLen, 4096)
	}
	return s.staging
}

// work serves a request of the pool.
func (b *Block) work(s *scratch, r *request) {
	if atomic.LoadUint32(&b.aborting) != 0 {
		atomic.AddUint64(&b.n.Dropped, 1)
		r.w.Drop(1)
		return
	}
	begin := time.Now()
	var err error
	fault := pci.Guard(func() {
		if err = b.serve(s, r); err == nil {
			b.pace.served(time.Since(begin))
			// The status byte was written last of what the driver may write.
			err = r.w.Finish(r.ticket, vring.Used{ID: r.chain.ID, Count: r.chain.Count, Len: r.chain.WriteLen})
		}
	})
	switch {
	case fault != nil:
		err = &device.Error{Cause: device.CauseMemory, Err: fault}
	case err == nil:
		return
	case errors.Is(err, ErrMemory):
		err = &device.Error{Cause: device.CauseMemory, Err: fmt.Errorf("%s: %w", b.cfg.Name, err)}
	case err == ErrAborted: // the driver gets no answer any more
		atomic.AddUint64(&b.n.Dropped, 1)
		r.w.Drop(1)
		return
	}
	r.w.Fail(err)
	r.w.Drop(1)
}

// serve does what a request asks for, and writes its status. An error ends the queue, but for ErrAborted.
func (b *Block) serve(s *scratch, r *request) error {
	c := &r.chain
	switch {
	case c.ReadLen < virtio.BlkHeaderLen:
		return fmt.Errorf("%s: descriptor %d: %w", b.cfg.Name, c.ID, ErrHeader)
	case c.WriteLen < 1:
		return fmt.Errorf("%s: descriptor %d: %w", b.cfg.Name, c.ID, ErrStatus)
	}
	readable, writable := r.spans[:c.Readable], r.spans[c.Readable:]
	var head [virtio.BlkHeaderLen]byte
	copyOut(head[:], readable, 0)
	h := virtio.DecodeBlkHeader(head[:])

	st, err := b.answer(s, h, c, readable, writable)
	if err != nil {
		return err
	}
	last := &writable[len(writable)-1]
	last.CopyIn(last.Len-1, []byte{st})
	return nil
}

// answer does what a request asks for and returns its status.
func (b *Block) answer(s *scratch, h virtio.BlkHeader, c *vring.Chain, readable, writable []dma.Span) (byte, error) {
	in, out := c.WriteLen-1, c.ReadLen-virtio.BlkHeaderLen // bytes of data
	switch f := b.Accepted(); {
	case h.Type == virtio.BlkTIn:
		if out > 0 || !b.inside(h.Sector, in) {
			return b.refuse()
		}
		s.data = cut(s.data[:0], writable, 0, in)
		return b.end(&b.n.Reads, &b.n.ReadBytes, in, b.move(s, h.Sector*virtio.BlkSector, false, false))
	case h.Type == virtio.BlkTOut:
		if in > 0 || b.geo.ReadOnly || !b.inside(h.Sector, out) {
			return b.refuse()
		}
		s.data = cut(s.data[:0], readable, virtio.BlkHeaderLen, out)
		return b.end(&b.n.Writes, &b.n.WrittenBytes, out, b.move(s, h.Sector*virtio.BlkSector, true, b.durable()))
	case h.Type == virtio.BlkTFlush && f.Has(virtio.BlkFlush):
		if in > 0 || out > 0 {
			return b.refuse()
		}
		return b.end(&b.n.Flushes, nil, 0, b.flush())
	case h.Type == virtio.BlkTGetID:
		if in == 0 || out > 0 {
			return b.refuse()
		}
		var id [virtio.BlkIDLen]byte
		copy(id[:], b.cfg.Serial)
		n := in
		if n > virtio.BlkIDLen {
			n = virtio.BlkIDLen
		}
		s.data = cut(s.data[:0], writable, 0, n)
		copyIn(s.data, id[:n])
		atomic.AddUint64(&b.n.Other, 1)
		return virtio.BlkOK, nil
	case h.Type == virtio.BlkTDiscard && f.Has(virtio.BlkDiscard), h.Type == virtio.BlkTWriteZeroes && f.Has(virtio.BlkWriteZeroes):
		if in > 0 || b.geo.ReadOnly || out == 0 || out%virtio.BlkSegmentLen != 0 || out > maxSegments*virtio.BlkSegmentLen {
			return b.refuse()
		}
		return b.segments(s, h.Type, readable, out)
	}
	atomic.AddUint64(&b.n.Unsupported, 1)
	return virtio.BlkUnsupp, nil
}

// refuse is the answer to a request that cannot be.
func (b *Block) refuse() (byte, error) {
	atomic.AddUint64(&b.n.Refused, 1)
	return virtio.BlkIOErr, nil
}

// inside tells whether n bytes of data from a sector on are a request that the disk can serve.
func (b *Block) inside(sector uint64, n uint32) bool {
	return n > 0 && n%virtio.BlkSector == 0 && b.holds(sector, uint64(n)/virtio.BlkSector)
}

// holds tells whether the disk has n sectors from a sector on.
func (b *Block) holds(sector, n uint64) bool {
	sectors := b.geo.Size / virtio.BlkSector
	return sector <= sectors && n <= sectors-sector
}

// end counts a request of n bytes and turns the backend's error into its status. Errors that concern more than this request
// are passed on.
func (b *Block) end(requests, bytes *uint64, n uint32, err error) (byte, error) {
	switch {
	case err == nil:
		if atomic.AddUint64(requests, 1); bytes != nil {
			atomic.AddUint64(bytes, uint64(n))
		}
		return virtio.BlkOK, nil
	case errors.Is(err, ErrMemory):
		return 0, err
	case errors.Is(err, ErrAborted):
		return 0, ErrAborted
	case errors.Is(err, ErrUnsupported):
		atomic.AddUint64(&b.n.Unsupported, 1)
		return virtio.BlkUnsupp, nil
	}
	// virtio has no status for a lack of space.
	first := atomic.AddUint64(&b.n.Failed, 1) == 1
	if noSpace(err) {
		first = atomic.AddUint64(&b.n.Full, 1) == 1
	}
	if first {
		b.cfg.Logf("%s: %s: %v (only the first such error is told; status counts them)", b.cfg.Name, b.geo.Name, err)
	}
	return virtio.BlkIOErr, nil
}

// flush is a flush of the backend. Once one has failed, what the driver wrote before may be lost, and later ones, which would succeed
// without it, fail too.
func (b *Block) flush() error {
	atomic.AddUint64(&b.n.Syncs, 1)
	err := b.cfg.Backend.Flush()
	if err != nil && !errors.Is(err, ErrAborted) {
		atomic.StoreUint32(&b.lost, 1)
	}
	if err == nil && atomic.LoadUint32(&b.lost) != 0 {
		return errLost
	}
	return err
}

var errLost = errors.New("an earlier flush failed, what was written before it may be lost")

// segments serves a discard or a write of zeros; out is the length of its segments.
func (b *Block) segments(s *scratch, kind uint32, readable []dma.Span, out uint32) (byte, error) {
	var buf [maxSegments * virtio.BlkSegmentLen]byte
	raw := buf[:out]
	copyOut(raw, readable, virtio.BlkHeaderLen)
	// All of them are checked before anything is done.
	for i := 0; i < len(raw); i += virtio.BlkSegmentLen {
		g := virtio.DecodeBlkSegment(raw[i:])
		// A discard with the unmap flag is to be answered so too (virtio 1.2, 5.2.6.2).
		if g.Flags != 0 && (kind == virtio.BlkTDiscard || g.Flags != virtio.BlkUnmap) {
			atomic.AddUint64(&b.n.Unsupported, 1)
			return virtio.BlkUnsupp, nil
		}
		if g.Sectors == 0 || g.Sectors > maxRange || !b.holds(g.Sector, uint64(g.Sectors)) {
			return b.refuse()
		}
	}
	requests := &b.n.Discards
	if kind == virtio.BlkTWriteZeroes {
		requests = &b.n.Zeroes
	}
	var err error
	for i := 0; i < len(raw) && err == nil; i += virtio.BlkSegmentLen {
		g := virtio.DecodeBlkSegment(raw[i:])
		off, n := g.Sector*virtio.BlkSector, uint64(g.Sectors)*virtio.BlkSector
		if kind == virtio.BlkTDiscard {
			err = b.cfg.Backend.Discard(off, n)
		} else {
			err = b.zero(s, off, n, g.Flags == virtio.BlkUnmap)
		}
	}
	if err == nil && b.durable() {
		err = b.flush()
	}
	return b.end(requests, nil, 0, err)
}

// zero makes n bytes at off zeros.
func (b *Block) zero(s *scratch, off, n uint64, unmap bool) error {
	err := b.cfg.Backend.WriteZeroes(off, n, unmap)
	if !errors.Is(err, ErrUnsupported) {
		return err
	}
	zeros := s.stage()
	for i := range zeros {
		zeros[i] = 0
	}
	for n > 0 {
		k := uint64(len(zeros))
		if k > n {
			k = n
		}
		if err := b.transfer(s.one(zeros[:k]), off, true, false); err != nil {
			return err
		}
		off, n = off+k, n-k
	}
	return nil
}

// one returns the bytes as the only buffer of a request.
func (s *scratch) one(p []byte) []unix.Iovec {
	s.bufs = append(s.bufs[:0], unix.Iovec{Base: &p[0]})
	s.bufs[0].SetLen(len(p))
	return s.bufs
}

// transfer is a call of the backend, unless the device is being reset.
func (b *Block) transfer(bufs []unix.Iovec, off uint64, write, durable bool) error {
	if atomic.LoadUint32(&b.aborting) != 0 {
		return ErrAborted
	}
	if write {
		return b.cfg.Backend.WriteAt(bufs, off, durable)
	}
	return b.cfg.Backend.ReadAt(bufs, off)
}

// move reads the data of a request from the image at off, or writes it there.
func (b *Block) move(s *scratch, off uint64, write, durable bool) error {
	for i := range s.data {
		if _, ok := s.data[i].RAM(); !ok {
			return b.moveStaged(s, off, write, durable)
		}
	}
	rest := s.data
	done := uint32(0) // of the first of rest
	for len(rest) > 0 {
		s.bufs = s.bufs[:0]
		n := uint32(0)
		for len(rest) > 0 && len(s.bufs) < MaxBuffers && n < maxCall {
			sp := &rest[0]
			k := sp.Len - done
			if k > maxCall-n {
				k = maxCall - n
			}
			r, _ := sp.RAM()
			s.bufs = append(s.bufs, unix.Iovec{Base: (*byte)(r.Pointer(uint64(done)))})
			s.bufs[len(s.bufs)-1].SetLen(int(k))
			if write {
				sp.AccountIovecRead(uint64(k))
			} else {
				sp.AccountIovecWrite(uint64(k))
			}
			n += k
			if done += k; done == sp.Len {
				rest, done = rest[1:], 0
			}
		}
		if err := b.transfer(s.bufs, off, write, durable); err != nil {
			return err
		}
		off += uint64(n)
	}
	return nil
}

// moveStaged is move by way of the staging memory, for device memory.
func (b *Block) moveStaged(s *scratch, off uint64, write, durable bool) error {
	staging := s.stage()
	rest := s.data
	done := uint32(0) // of the first of rest
	left := length(rest)
	for left > 0 {
		p := staging
		if left < uint64(len(p)) {
			p = p[:left]
		}
		if !write {
			if err := b.transfer(s.one(p), off, false, false); err != nil {
				return err
			}
		}
		for q := p; len(q) > 0; {
			sp := &rest[0]
			k := len(q)
			if uint32(k) > sp.Len-done {
				k = int(sp.Len - done)
			}
			if write {
				sp.CopyOut(q[:k], done)
			} else {
				sp.CopyIn(done, q[:k])
			}
			q = q[k:]
			if done += uint32(k); done == sp.Len {
				rest, done = rest[1:], 0
			}
		}
		if write {
			if err := b.transfer(s.one(p), off, true, durable); err != nil {
				return err
			}
		}
		atomic.AddUint64(&b.n.Staged, uint64(len(p)))
		off, left = off+uint64(len(p)), left-uint64(len(p))
	}
	return nil
}

// length returns the sum of the spans' lengths in bytes.
func length(spans []dma.Span) (n uint64) {
	for i := range spans {
		n += uint64(spans[i].Len)
	}
	return n
}

// cut appends to dst the n bytes behind the first skip of the spans, which have as many.
func cut(dst, spans []dma.Span, skip, n uint32) []dma.Span {
	for i := 0; n > 0; i++ {
		s := spans[i]
		if skip >= s.Len {
			skip -= s.Len
			continue
		}
		k := s.Len - skip
		if k > n {
			k = n
		}
		dst = append(dst, s.Sub(skip, k))
		skip, n = 0, n-k
	}
	return dst
}

// copyOut fills b with the bytes behind the first skip of the spans, which have as many.
func copyOut(b []byte, spans []dma.Span, skip uint32) {
	for i := 0; len(b) > 0; i++ {
		s := &spans[i]
		if skip >= s.Len {
			skip -= s.Len
			continue
		}
		k := s.Len - skip
		if uint64(k) > uint64(len(b)) {
			k = uint32(len(b))
		}
		s.CopyOut(b[:k], skip)
		b, skip = b[k:], 0
	}
}

// copyIn writes b to the spans, which have as many bytes.
func copyIn(spans []dma.Span, b []byte) {
	for i := 0; len(b) > 0; i++ {
		s := &spans[i]
		k := int(s.Len)
		if k > len(b) {
			k = len(b)
		}
		s.CopyIn(0, b[:k])
		b = b[k:]
	}
}

// at returns the address n bytes behind p.
func at(p *byte, n uint64) *byte { return (*byte)(unsafe.Add(unsafe.Pointer(p), n)) }
