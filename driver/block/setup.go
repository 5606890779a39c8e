package block

import (
	"fmt"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/driver"
	"github.com/boardlink/boardlink/driver/internal/plain"
	"github.com/boardlink/boardlink/virtio"
)

// configChunk is how much of the configuration space a Transport returns at once, in bytes.
const configChunk = 40

// readConfig reads the first n bytes of the configuration space.
func readConfig(t driver.Transport, n uint32) (c virtio.BlkConfig, err error) {
	var all []byte
	for off := uint32(0); off < n; off += configChunk {
		l := n - off
		if l > configChunk {
			l = configChunk
		}
		b, err := t.Config(off, l)
		if err != nil {
			return c, err
		}
		all = append(all, b...)
	}
	return virtio.DecodeBlkConfig(all), nil
}

// size returns the size of the disk in bytes.
func (d *Disk) size(c virtio.BlkConfig) (uint64, error) {
	if c.Capacity > 1<<63/virtio.BlkSector {
		return 0, fmt.Errorf("%s: the host's disk has %d sectors: at most %d are possible", d.cfg.Name, c.Capacity, uint64(1<<63/virtio.BlkSector))
	}
	return c.Capacity * virtio.BlkSector, nil
}

// limitsOf reads what the device says of itself.
func (d *Disk) limitsOf(s *plain.Session) (*limits, virtio.BlkConfig, error) {
	has := s.Accepted.Has
	n := uint32(8) // a device need not have the fields of features that it does not offer
	switch {
	case has(virtio.BlkDiscard) || has(virtio.BlkWriteZeroes):
		n = virtio.BlkConfigLen
	case has(virtio.BlkMQ):
		n = 36
	case has(virtio.BlkTopology):
		n = 32
	case has(virtio.BlkBlkSize):
		n = 24
	case has(virtio.BlkSizeMax) || has(virtio.BlkSegMax):
		n = 16
	}
	c, err := readConfig(s.T, n)
	if err != nil {
		return nil, c, err
	}
	l := &limits{Info: Info{BlockSize: virtio.BlkSector, ReadOnly: has(virtio.BlkRO), Flush: has(virtio.BlkFlush),
		Discard: has(virtio.BlkDiscard), WriteZeroes: has(virtio.BlkWriteZeroes)}, part: maxPart, piece: maxPart, pieces: 1}
	if l.Size, err = d.size(c); err != nil {
		return nil, c, err
	}
	if has(virtio.BlkBlkSize) {
		if b := c.BlkSize; b < virtio.BlkSector || b > maxBlock || b&(b-1) != 0 {
			return nil, c, fmt.Errorf("%s: the host's disk has blocks of %d bytes: a power of two from %d to %d is possible", d.cfg.Name, b, virtio.BlkSector, maxBlock)
		}
		l.BlockSize = c.BlkSize
	}
	if p := uint64(c.OptIO) * uint64(l.BlockSize); has(virtio.BlkTopology) && p <= 1<<25 {
		l.Preferred = uint32(p)
	}
	if has(virtio.BlkSizeMax) && c.SizeMax > 0 && c.SizeMax < l.piece {
		// Parts are of whole blocks, so that pieces that are none take some fewer.
		segs := uint32(1)
		if has(virtio.BlkSegMax) && c.SegMax > 1 {
			segs = c.SegMax
		}
		const most = 64 // descriptors of data
		if segs > most {
			segs = most
		}
		l.piece = c.SizeMax
		if total := uint64(c.SizeMax) * uint64(segs); total < uint64(l.part) {
			l.part = uint32(total) &^ (l.BlockSize - 1)
		}
		if l.part == 0 {
			return nil, c, fmt.Errorf("%s: the host's disk takes %d buffers of %d bytes, which are less than a block of %d", d.cfg.Name, segs, c.SizeMax, l.BlockSize)
		}
		l.pieces = int((uint64(l.part) + uint64(l.piece) - 1) / uint64(l.piece))
	}
	l.discard, l.zeroes = rangeMax(c.MaxDiscard, l.BlockSize), rangeMax(c.MaxZeroes, l.BlockSize)
	return l, c, nil
}

// rangeMax returns the most bytes of one segment, whole blocks. 0 sectors mean that the device has no bound.
func rangeMax(sectors, block uint32) uint64 {
	const most = 1 << 40 // in sectors it fits the segment
	n := uint64(sectors) * virtio.BlkSector
	if n == 0 || n > most {
		n = most
	}
	if n &^= uint64(block) - 1; n == 0 {
		n = uint64(block)
	}
	return n
}

// setUp sets the queues up, and divides the memory.
func (d *Disk) setUp(ps *plain.Session, s *session, broken func(error)) error {
	lim, c, err := d.limitsOf(ps)
	if err != nil {
		return err
	}
	s.lim = lim
	n := 1
	if ps.Accepted.Has(virtio.BlkMQ) && c.NumQueues > 1 {
		if n = d.cfg.Queues; n > int(c.NumQueues) {
			n = int(c.NumQueues)
		}
	}
	m := ps.Layout()
	size := d.cfg.QueueSize
	for size > 4 && uint64(n)*queueMem(size) > m.Near.Alloc.FreeBytes()/4 {
		size /= 2
	}
	for i := 0; i < n; i++ {
		q, err := d.newQueue(ps, lim, i, size, broken)
		if err != nil {
			return err
		}
		s.queues = append(s.queues, q)
	}
	near, err := d.take(m.Near, s)
	if err != nil {
		return err
	}
	far := near
	s.near = newPool(int(near.Len / pageSize))
	s.far = s.near
	if m.Push() {
		if far, err = d.take(m.Far, s); err != nil {
			return err
		}
		s.far = newPool(int(far.Len / pageSize))
	}
	if err := s.fit(); err != nil {
		return fmt.Errorf("%s: %w", d.cfg.Name, err)
	}
	for _, q := range s.queues {
		q.near, q.far = near.Accounted(&q.ring.Bus.Payload), far.Accounted(&q.ring.Bus.Payload)
		ps.Loop(q.loop)
	}
	return nil
}

// queueMem returns how many bytes a queue of so many descriptors takes at most, without data.
func queueMem(size uint16) uint64 {
	return uint64(size)*(16+2+8+(headStride+statusStride)/3) + 4*64
}

// newQueue sets queue i up, with the memory for the headers of its requests.
func (d *Disk) newQueue(ps *plain.Session, lim *limits, i int, size uint16, broken func(error)) (*queue, error) {
	ring, err := ps.Queue(i, fmt.Sprintf("requests %d", i), size, 0, false, nil)
	if err != nil {
		return nil, err
	}
	chain := 2 + lim.pieces
	slots := ring.Size() / chain
	for slots == 0 { // a queue of the host's that is very small: fewer pieces, then
		if lim.pieces == 1 {
			return nil, fmt.Errorf("%s: the host's queue has %d descriptors: a request takes %d", d.cfg.Name, ring.Size(), chain)
		}
		lim.pieces /= 2
		if most := uint64(lim.pieces) * uint64(lim.piece) &^ uint64(lim.BlockSize-1); most < uint64(lim.part) {
			lim.part = uint32(most)
		}
		if lim.part == 0 {
			return nil, fmt.Errorf("%s: the host's queue has %d descriptors, which are too few for a block of %d bytes", d.cfg.Name, ring.Size(), lim.BlockSize)
		}
		chain = 2 + lim.pieces
		slots = ring.Size() / chain
	}
	q := &queue{d: d, lim: lim, broken: broken, ring: ring, slots: make([]slot, slots)}
	m := ps.Layout()
	if q.heads, err = m.Far.Take(d.cfg.Name, uint64(slots)*headStride, 64); err != nil {
		return nil, err
	}
	if q.stats, err = m.Near.Take(d.cfg.Name, uint64(slots)*statusStride, 64); err != nil {
		return nil, err
	}
	q.heads, q.stats = q.heads.Accounted(&ring.Bus.Payload), q.stats.Accounted(&ring.Bus.Payload)
	for k := slots; k > 0; k-- {
		q.free = append(q.free, uint16(k-1))
	}
	return q, nil
}

// take takes the memory for data: what is free, as far as it is of use.
func (d *Disk) take(m *driver.Memory, s *session) (dma.Span, error) {
	most := uint64(maxPool)
	n := uint64(0)
	for _, q := range s.queues {
		n += uint64(len(q.slots)) * maxPart
	}
	if n < most {
		most = n
	}
	n = 0
	if free := m.Alloc.Largest(); free > 64 { // 64: to align the start
		n = (free - 64) &^ (pageSize - 1)
	}
	if n > most {
		n = most
	}
	if n == 0 {
		n = pageSize // which fails, with what is wrong
	}
	return m.Take(d.cfg.Name, n, 64)
}

// fit makes parts no larger than a quarter of the memory, so that several are in flight.
func (s *session) fit() error {
	least := s.near.pages
	if s.far.pages < least {
		least = s.far.pages
	}
	n := uint64(least) / 4 * pageSize
	if n < uint64(s.lim.part) {
		if n &^= uint64(s.lim.BlockSize) - 1; n == 0 {
			n = uint64(s.lim.BlockSize)
		}
		s.lim.part = uint32(n)
	}
	if pagesFor(s.lim.part) > least {
		return fmt.Errorf("the memory holds %d bytes of data, and a block of the host's disk has %d: use a larger window or fewer devices", least*pageSize, s.lim.BlockSize)
	}
	return nil
}
