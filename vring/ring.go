package vring

import (
	"fmt"
	"sync/atomic"
	"unsafe"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
)

// ring is what both sides of both kinds of virtqueue have in common.
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
type ring struct {
	name                 string
	size, mask           uint16 // mask: split only
	eventIdx, inOrder    bool
	desc, driver, device area
	kind                 mmio.Kind  // the strongest
	buses                []mmio.Mem // modelled memories, which want to hear of barriers
	weak                 bool       // all of it is RAM: Publish32 and Consume32 suffice
	err                  error      // what broke the queue; the owner's copy
	broken               atomic.Value
	state                uint32 // State for other goroutines: Avail | Used<<16
	packed               bool
	stats                *Stats
}

// place makes the three areas of a queue, and what every side has. driverAlign is what this side
// asks of the driver area, access what it needs of the descriptor area.
func (q *ring) place(c *Config, desc, driver, device, driverAlign uint64, access dma.Access) error {
	var err error
	if q.desc, err = newArea("descriptor area", c.Desc, desc, SplitDescAlign, 8, access); err != nil {
		return err
	}
	if q.driver, err = newArea("driver area", c.Driver, driver, driverAlign, driverAlign, dma.DeviceRead); err != nil {
		return err
	}
	if q.device, err = newArea("device area", c.Device, device, SplitDeviceAlign, SplitDeviceAlign, dma.DeviceWrite); err != nil {
		return err
	}
	q.name, q.size, q.eventIdx, q.inOrder = c.Name, c.Size, c.EventIdx, c.InOrder
	q.stats = new(Stats)
	q.cover(c.PayloadKind, nil)
	q.setState(c.State.Avail, c.State.Used)
	return nil
}

func splitSize(n uint16) error {
	if n == 0 || n > MaxSize || n&(n-1) != 0 {
		return fmt.Errorf("size %d is not a power of two from 1 to %d", n, MaxSize)
	}
	return nil
}

// setupSplit checks what both sides of a split queue need. driverAlign is 2 or 4.
func (q *ring) setupSplit(c *Config, driverAlign uint64) error {
	n := c.Size
	if err := splitSize(n); err != nil {
		return err
	}
	if c.State.Packed {
		return errPackedState
	}
	desc, driver, device := SplitSizes(n)
	q.mask = n - 1
	return q.place(c, desc, driver, device, driverAlign, dma.DeviceRead)
}

// cover makes the barriers strong enough for the areas, memory of kind k, and regions.
// They never get weaker: chains translated before may still be in use.
func (q *ring) cover(k mmio.Kind, regions []dma.Region) {
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

func (q *ring) coverMem(k mmio.Kind, m mmio.Mem) mmio.Kind {
	if m.Modelled() {
		q.buses = append(q.buses, m)
	}
	return mmio.Stronger(k, m.Kind())
}

func (q *ring) fence(b mmio.Barrier) {
	mmio.Fence(q.kind, b)
	for i := range q.buses {
		q.buses[i].Barrier(b)
	}
}

// publish is barrier A and the word at off that announces what came before it: the index (with the
// flags: both are ours), or a packed descriptor's flags.
func (q *ring) publish(a *area, off uint64, v uint32) {
	a.writes++
	a.writeBytes += 4
	if !q.weak {
		q.fence(mmio.WriteBarrier)
		if !a.isRAM {
			a.mem.Store32(off, v)
			return
		}
	}
	a.ram.Publish32(off, v)
}

// consume reads the flags and index of the other side. Where the index has moved,
// acquire must follow.
func (q *ring) consume(a *area) uint32 {
	a.reads++
	a.readBytes += 4
	if a.isRAM {
		return a.ram.Consume32(0)
	}
	return a.mem.Load32(0)
}

// acquire is barrier B, as far as consume was not.
func (q *ring) acquire() {
	if !q.weak {
		q.fence(mmio.ReadBarrier)
	}
}

// settle is barrier D: what was written to the suppression word in area a, of width
// bytes at off, arrives before the index in area idx is read again. A processor's
// barrier orders nothing that is in flight on the bus: where the word lies across, it is read
// back, which flushes. Where the index lies in the same memory across, reading the
// index does that.
func (q *ring) settle(a *area, off uint64, width uint, idx *area) {
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
func (q *ring) fail(e *Error) error {
	e.Queue = q.name
	q.stats.add(cErrors, 1)
	q.err = e
	q.broken.Store(e)
	return e
}

// misuse is the caller's error; the queue goes on.
func (q *ring) misuse(e *Error) error {
	e.Queue = q.name
	q.stats.add(cErrors, 1)
	return e
}

func (q *ring) setState(avail, used uint16) {
	mmio.Store32(unsafe.Pointer(&q.state), uint32(avail)|uint32(used)<<16)
}

// Size returns the queue size in descriptors.
func (q *ring) Size() int { return int(q.size) }

// State returns the state of the ring, as of the last call by the owner. Any goroutine
// may call it.
func (q *ring) State() State {
	v := mmio.Load32(unsafe.Pointer(&q.state))
	return State{Avail: uint16(v), Used: uint16(v >> 16), Packed: q.packed}
}

// Broken returns the *Error that broke the queue, nil as long as none has. Any
// goroutine may call it.
func (q *ring) Broken() error {
	if e, ok := q.broken.Load().(*Error); ok {
		return e
	}
	return nil
}

// Stats returns the live counters.
func (q *ring) Stats() *Stats { return q.stats }

// flush hands the accounts what was transferred in a batch.
func (q *ring) flush() {
	q.desc.flush()
	q.driver.flush()
	q.device.flush()
}
