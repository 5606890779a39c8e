package vring

import (
	"fmt"
	"sync/atomic"
	"unsafe"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
)

// split is what both sides of a split virtqueue have in common.
//
// The barriers, and what each pairs with:
//
//	A  publish: data, descriptors, ring entries | write barrier | index.
//	   Pairs with B of the other side.
//	B  consume: index | read barrier | ring entries, descriptors, data.
//	C  index | full barrier | the other side's suppression word (NeedKick, NeedCall).
//	   Pairs with D of the other side: of two sides that each write one word and then
//	   read the other's, at least one sees what the other wrote.
//	D  suppression word | full barrier | (read back across the bus) | the other side's
//	   index (ArmCall, ArmKick).
//
// All of them are as strong as the strongest memory in play needs.
type split struct {
	name                 string
	size, mask           uint16
	eventIdx             bool
	desc, driver, device area
	kind                 mmio.Kind  // the strongest
	buses                []mmio.Mem // modelled memories, which want to hear of barriers
	weak                 bool       // all of it is RAM: Publish32 and Consume32 suffice
	err                  error      // what broke the queue; the owner's copy
	broken               atomic.Value
	state                uint32 // State for other goroutines: Avail | Used<<16
	stats                *Stats
}

// setup checks what both sides need. driverAlign is 2 or 4.
func (q *split) setup(c *Config, driverAlign uint64) error {
	n := c.Size
	if n == 0 || n > MaxSize || n&(n-1) != 0 {
		return fmt.Errorf("size %d is not a power of two from 1 to %d", n, MaxSize)
	}
	desc, driver, device := SplitSizes(n)
	var err error
	if q.desc, err = newArea("descriptor area", c.Desc, desc, SplitDescAlign, 8, dma.DeviceRead); err != nil {
		return err
	}
	if q.driver, err = newArea("driver area", c.Driver, driver, driverAlign, driverAlign, dma.DeviceRead); err != nil {
		return err
	}
	if q.device, err = newArea("device area", c.Device, device, SplitDeviceAlign, SplitDeviceAlign, dma.DeviceWrite); err != nil {
		return err
	}
	q.name, q.size, q.mask, q.eventIdx = c.Name, n, n-1, c.EventIdx
	q.stats = new(Stats)
	q.cover(c.PayloadKind, nil)
	q.setState(c.State.Avail, c.State.Used)
	return nil
}

// cover makes the barriers strong enough for the areas, memory of kind k, and regions.
// They never get weaker: chains translated before may still be in use.
func (q *split) cover(k mmio.Kind, regions []dma.Region) {
	k = mmio.Stronger(q.kind, k)
	q.buses = q.buses[:0]
	for _, a := range []*area{&q.desc, &q.driver, &q.device} {
		k = q.coverMem(k, a.mem)
	}
	for i := range regions {
		k = q.coverMem(k, regions[i].Mem)
	}
	q.kind = k
	q.weak = k == mmio.Cached && len(q.buses) == 0
}

func (q *split) coverMem(k mmio.Kind, m mmio.Mem) mmio.Kind {
	if m.Modelled() {
		q.buses = append(q.buses, m)
	}
	return mmio.Stronger(k, m.Kind())
}

func (q *split) fence(b mmio.Barrier) {
	mmio.Fence(q.kind, b)
	for i := range q.buses {
		q.buses[i].Barrier(b)
	}
}

// publish is barrier A and the index (with the flags: both are ours).
func (q *split) publish(a *area, v uint32) {
	a.writes++
	a.writeBytes += 4
	if !q.weak {
		q.fence(mmio.WriteBarrier)
		if !a.isRAM {
			a.mem.Store32(0, v)
			return
		}
	}
	a.ram.Publish32(0, v)
}

// consume reads the flags and index of the other side. Where the index has moved,
// acquire must follow.
func (q *split) consume(a *area) uint32 {
	a.reads++
	a.readBytes += 4
	if a.isRAM {
		return a.ram.Consume32(0)
	}
	return a.mem.Load32(0)
}

// acquire is barrier B, as far as consume was not.
func (q *split) acquire() {
	if !q.weak {
		q.fence(mmio.ReadBarrier)
	}
}

// settle is barrier D: what was written to the suppression word in area a, of width
// bytes at off, arrives before the index in area idx is read again. A processor's
// barrier orders nothing that is in flight on the bus: where the word lies across, it is read
// back, which flushes. Where the index lies in the same memory across, reading the
// index does that.
func (q *split) settle(a *area, off uint64, width uint, idx *area) {
	q.fence(mmio.FullBarrier)
	if !a.region.Across || sameMemory(a.region, idx.region) {
		return
	}
	if width == 2 {
		a.mem.Load16(off)
	} else {
		a.mem.Load32(off)
	}
	a.account.AddFlushReads(1)
	q.stats.add(cFlushReads, 1)
	q.fence(mmio.FullBarrier)
}

// fail breaks the queue.
func (q *split) fail(e *Error) error {
	e.Queue = q.name
	q.stats.add(cErrors, 1)
	q.err = e
	q.broken.Store(e)
	return e
}

// misuse is the caller's error; the queue goes on.
func (q *split) misuse(e *Error) error {
	e.Queue = q.name
	q.stats.add(cErrors, 1)
	return e
}

func (q *split) setState(avail, used uint16) {
	mmio.Store32(unsafe.Pointer(&q.state), uint32(avail)|uint32(used)<<16)
}

// Size returns the queue size in descriptors.
func (q *split) Size() int { return int(q.size) }

// State returns the state of the ring, as of the last call by the owner. Any goroutine
// may call it.
func (q *split) State() State {
	v := mmio.Load32(unsafe.Pointer(&q.state))
	return State{Avail: uint16(v), Used: uint16(v >> 16)}
}

// Broken returns the *Error that broke the queue, nil as long as none has. Any
// goroutine may call it.
func (q *split) Broken() error {
	if e, ok := q.broken.Load().(*Error); ok {
		return e
	}
	return nil
}

// Stats returns the live counters.
func (q *split) Stats() *Stats { return q.stats }

// flush hands the accounts what was transferred in a batch.
func (q *split) flush() {
	q.desc.flush()
	q.driver.flush()
	q.device.flush()
}
