package vring

import (
	"fmt"

	"github.com/boardlink/boardlink/dma"
)

// driverSide is what the driver sides of both kinds of virtqueue have in common.
type driverSide struct {
	ring
	indirect     area // the tables; without a region where there are none
	indirectAddr uint64
	indirectMax  int
	indirectMin  int

	run    int    // chains that a used element already read still completes (VIRTIO_F_IN_ORDER) ...
	runLen uint32 // ... and the length of the last of them
}

// tables takes the memory of the indirect tables, where there is one.
func (q *driverSide) tables(c *Config) error {
	if !c.Indirect || c.IndirectMem.Region == nil {
		return nil
	}
	n := int(c.Size)
	if c.IndirectMax < 1 || c.IndirectMax > n {
		return fmt.Errorf("indirect tables of %d descriptors, may have 1 to %d", c.IndirectMax, n)
	}
	var err error
	if q.indirect, err = newArea("indirect tables", c.IndirectMem, uint64(n)*uint64(c.IndirectMax)*descSize, 16, 8, dma.DeviceRead); err != nil {
		return err
	}
	q.indirectAddr = uint64(c.IndirectMem.Region.Addr) + c.IndirectMem.Off
	q.indirectMax, q.indirectMin = c.IndirectMax, c.IndirectMin
	if q.indirectMin == 0 {
		q.indirectMin = 2
	}
	q.cover(q.indirect.mem.Kind(), nil)
	if q.indirect.mem.Modelled() {
		q.buses = append(q.buses, q.indirect.mem)
		q.weak = false
	}
	return nil
}

// wipe zeroes all three areas: the device area is the device's from now on, but must not hold what
// lay there before.
func (q *driverSide) wipe() {
	for _, a := range []*area{&q.desc, &q.driver, &q.device} {
		a.writes += a.mem.Zero(0, a.mem.Size())
		a.writeBytes += a.mem.Size()
	}
}

// check refuses a request that no queue of this size could take, and returns its bytes.
func (q *driverSide) check(r *Request) (uint64, error) {
	if len(r.Bufs) == 0 || r.Readable < 0 || r.Readable > len(r.Bufs) {
		return 0, q.misuse(&Error{Code: ErrRequest, Err: fmt.Errorf("%d buffers, %d of them readable", len(r.Bufs), r.Readable)})
	}
	if len(r.Bufs) > int(q.size) {
		return 0, q.misuse(&Error{Code: ErrTooLong, Value: uint64(len(r.Bufs)), Limit: uint64(q.size)})
	}
	var total uint64
	for i := range r.Bufs {
		b := &r.Bufs[i]
		if b.Len == 0 {
			return 0, q.misuse(&Error{Code: ErrZeroLength, Addr: b.Addr})
		}
		if uint64(b.Addr)+uint64(b.Len)-1 < uint64(b.Addr) {
			return 0, q.misuse(&Error{Code: ErrOverflow, Addr: b.Addr, Len: b.Len})
		}
		total += uint64(b.Len) // at most 2^15 * 2^32
	}
	if total > 1<<32-1 {
		return 0, q.misuse(&Error{Code: ErrTotal, Value: total, Limit: 1<<32 - 1})
	}
	return total, nil
}
