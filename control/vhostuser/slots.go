package vhostuser

import (
	"fmt"
	"sync/atomic"
	"time"

	"github.com/boardlink/boardlink/device"
)

// setMemTable serves SET_MEM_TABLE: a table in place of the one there is. Regions that stay keep
// their mappings.
func (b *backend) setMemTable(m *message) error {
	rs, err := m.memTable()
	if err != nil {
		return err
	}
	if len(m.fds) != len(rs) {
		return m.errorf(ErrDescriptors, "%d of them for %d regions", len(m.fds), len(rs))
	}
	var maps, fresh []*mapping
	undo := func(err error) error {
		for _, o := range fresh {
			o.unmap()
		}
		return err
	}
	for i, r := range rs {
		o := b.mem.find(r)
		if o == nil || !o.same(r, m.fds[i]) || contains(maps, o) {
			if err := b.room(r, fresh); err != nil {
				return undo(err)
			}
			if o, err = mapRegion(b.name, r, m.fds[i]); err != nil {
				return undo(err)
			}
			fresh = append(fresh, o)
		}
		maps = append(maps, o)
		closeFD(m.takeFD(i)) // the mapping holds the file
	}
	next, err := newMemory(maps)
	if err != nil {
		return undo(err)
	}
	if err := b.fitLog(next); err != nil {
		return undo(err)
	}
	return b.replaceMemory(next)
}

// memSlots serves GET_MAX_MEM_SLOTS, ADD_MEM_REG and REM_MEM_REG. QEMU sends each once for each
// queue pair: what is there, or gone, already is acknowledged.
func (b *backend) memSlots(m *message) ([]byte, error) {
	if err := b.negotiated(m, protoMemSlots); err != nil {
		return nil, err
	}
	if m.req == GetMaxMemSlots {
		return encodeReply(m.req, encodeU64(maxSlots)), nil
	}
	r, err := m.memRegion()
	if err != nil {
		return nil, err
	}
	if m.req == RemMemReg {
		o := b.mem.find(r)
		if o == nil {
			atomic.AddUint64(&b.n.TableRepeats, 1)
			return nil, nil
		}
		next, err := newMemory(b.mem.without(o))
		if err != nil {
			return nil, err
		}
		return nil, b.replaceMemory(next)
	}
	if len(m.fds) != 1 {
		return nil, m.errorf(ErrDescriptors, "%d of them, 1 wanted", len(m.fds))
	}
	fd := m.takeFD(0)
	defer m.closer.close(fd)
	if o := b.mem.find(r); o != nil && o.same(r, fd) {
		atomic.AddUint64(&b.n.TableRepeats, 1)
		return nil, nil
	}
	if len(b.mem.maps) >= maxSlots {
		return nil, m.errorf(ErrMemory, "there are %d regions already", len(b.mem.maps))
	}
	if err := b.room(r, nil); err != nil {
		return nil, err
	}
	o, err := mapRegion(b.name, r, fd)
	if err != nil {
		return nil, err
	}
	next, err := newMemory(append(append([]*mapping(nil), b.mem.maps...), o))
	if err == nil {
		err = b.fitLog(next)
	}
	if err != nil {
		o.unmap()
		return nil, err
	}
	return nil, b.replaceMemory(next)
}

// room tells whether one more region may be mapped, beside those in use and fresh ones.
func (b *backend) room(r region, fresh []*mapping) error {
	sum := uint64(0)
	for _, maps := range [][]*mapping{b.mem.maps, fresh} {
		for _, o := range maps {
			sum += o.size // of each at most maxMapped: no overflow
		}
	}
	if r.size > maxMapped || sum > maxMapped-r.size {
		return fmt.Errorf("region at %#x of %#x bytes: %w: with the %#x bytes that are mapped already it passes the limit of a connection, %#x",
			r.guest, r.size, ErrMemory, sum, maxMapped)
	}
	return nil
}

func contains(maps []*mapping, o *mapping) bool {
	for _, m := range maps {
		if m == o {
			return true
		}
	}
	return false
}

// replaceMemory puts next in place of the memory, while queues run: the table is stored, each queue
// takes it at the end of its batch, and what is not in it any more is unmapped when all have.
// Queues whose rings it does not hold stop, until memory is added that does. After an error neither
// memory is unmapped: the connection ends, and close unmaps both.
func (b *backend) replaceMemory(next *memory) error {
	atomic.AddUint64(&b.n.Tables, 1)
	b.starts.take(time.Now())
	old := b.mem
	both := &memory{maps: append([]*mapping(nil), next.maps...), table: next.table}
	less := false
	for _, o := range old.maps {
		if !next.holds(o) {
			both.maps = append(both.maps, o)
			less = true
		}
	}
	b.table.Store(next.table)
	b.mem = both // what close is to unmap, should this fail
	for i := range b.rings {
		r := &b.rings[i]
		if !less || !r.started {
			continue // more memory is known from the next batch on
		}
		as, err := b.areas(r, next)
		if err != nil {
			b.log.Info("queue stopped: its ring's memory was removed", "link", b.name, "queue", i, "error", err)
			if err := b.stop(r); err != nil {
				return err
			}
			continue
		}
		if err := b.dev.ChangeQueue(i, device.Change{Areas: &as}, deadline()); err != nil {
			return &finalError{fmt.Errorf("memory of queue %d: %w", i, err)}
		}
	}
	old.unmapBut(next)
	b.mem = next
	b.moved()
	return b.settle(true)
}
