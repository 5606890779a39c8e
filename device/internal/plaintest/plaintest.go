// Package plaintest drives a device model in a test: it lays queues out in memory of the heap, starts them, and is their driver.
package plaintest

import (
	"testing"
	"time"
	"unsafe"

	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/vring"
)

// Base is the link address of the memory.
const Base dma.Addr = 0x10000

// Rig is a device model with memory for its queues.
type Rig struct {
	tb     testing.TB
	Dev    device.Device
	Region *dma.Region
	Alloc  *dma.Allocator
	Table  dma.TableRef
	Events chan device.Event
}

// New resets a model and has it accept features. size is that of the memory in bytes.
func New(tb testing.TB, d device.Device, f virtio.Features, size int) *Rig {
	tb.Helper()
	return NewKind(tb, d, f, size, mmio.Cached)
}

// NewKind is New with memory of a kind.
func NewKind(tb testing.TB, d device.Device, f virtio.Features, size int, kind mmio.Kind) *Rig {
	tb.Helper()
	b := make([]uint64, size/8+512)
	// At a page, as mappings are.
	p := unsafe.Add(unsafe.Pointer(&b[0]), -uintptr(unsafe.Pointer(&b[0]))&4095)
	return NewMem(tb, d, f, mmio.NewMem(p, uint64(size), kind))
}

// NewMem is New with memory of the caller's.
func NewMem(tb testing.TB, d device.Device, f virtio.Features, mem mmio.Mem) *Rig {
	tb.Helper()
	size := mem.Size()
	r := &Rig{tb: tb, Dev: d, Alloc: dma.NewAllocator(Base, size), Events: make(chan device.Event, 64)}
	t, err := dma.NewTable(dma.Region{Name: "heap", Addr: Base, Mem: mem, Access: dma.DeviceRead | dma.DeviceWrite})
	if err != nil {
		tb.Fatal(err)
	}
	r.Table.Store(t)
	r.Region = &t.Regions()[0]
	d.Notify(func(e device.Event) { r.Events <- e })
	if err := d.SetFeatures(f, device.Options{}); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := d.Close(); err != nil {
			tb.Error(err)
		}
	})
	return r
}

// Take returns n bytes of the memory.
func (r *Rig) Take(n uint64) dma.Span {
	r.tb.Helper()
	a, err := r.Alloc.Alloc(n, 64)
	if err != nil {
		r.tb.Fatal(err)
	}
	return dma.Span{Region: r.Region, Off: uint64(a - Base), Len: uint32(n)}
}

// Queue is a queue of the model and its driver.
type Queue struct {
	*vring.SplitDriver
	Areas device.Areas
	Kick  *doorbell.Eventfd // rings the model
	Call  *doorbell.Eventfd // which the model rings
	r     *Rig
	index int
	size  uint16
}

// Queue lays out queue i.
func (r *Rig) Queue(i int, size uint16) *Queue {
	r.tb.Helper()
	q := &Queue{r: r, index: i, size: size}
	d, a, u := vring.SplitSizes(size)
	q.Areas = device.Areas{Desc: r.Take(d), Driver: r.Take(a), Device: r.Take(u)}
	var err error
	if q.SplitDriver, err = vring.NewSplitDriver(vring.Config{Name: "test", Size: size, Desc: q.Areas.Desc, Driver: q.Areas.Driver, Device: q.Areas.Device, EventIdx: true}); err != nil {
		r.tb.Fatal(err)
	}
	for _, e := range []**doorbell.Eventfd{&q.Kick, &q.Call} {
		if *e, err = doorbell.NewEventfd(); err != nil {
			r.tb.Fatal(err)
		}
		e := *e
		r.tb.Cleanup(func() { e.Close() })
	}
	return q
}

// Start starts the queue, enabled, at state s, and the device.
func (q *Queue) Start(s vring.State) {
	q.r.tb.Helper()
	err := q.r.Dev.StartQueue(q.index, device.Resources{Size: q.size, Areas: q.Areas, Table: &q.r.Table, Kick: q.Kick, Call: q.Call}, s)
	if err == nil {
		err = q.r.Dev.EnableQueue(q.index, true, time.Time{})
	}
	if err == nil {
		err = q.r.Dev.SetRunning(true, time.Time{})
	}
	if err != nil {
		q.r.tb.Fatal(err)
	}
}

// Add makes requests available and kicks.
func (q *Queue) Add(reqs ...vring.Request) {
	q.r.tb.Helper()
	if n, err := q.SplitDriver.Add(reqs); err != nil || n != len(reqs) {
		q.r.tb.Fatal(n, err)
	}
	if q.NeedKick() {
		if err := q.Kick.Ring(); err != nil {
			q.r.tb.Fatal(err)
		}
	}
}

// Wait waits for n completions.
func (q *Queue) Wait(n int) []vring.Completion {
	q.r.tb.Helper()
	var all []vring.Completion
	for begin := time.Now(); len(all) < n; {
		done := make([]vring.Completion, n-len(all))
		k, err := q.Reap(done)
		if err != nil {
			q.r.tb.Fatal(err)
		}
		if all = append(all, done[:k]...); k == 0 {
			if time.Since(begin) > 20*time.Second {
				q.r.tb.Fatalf("%d completions, want %d: %+v", len(all), n, q.r.Dev.Status())
			}
			time.Sleep(100 * time.Microsecond)
		}
	}
	return all
}

// Broken waits for the event that a queue has ended, and returns its error.
func (r *Rig) Broken() error {
	r.tb.Helper()
	select {
	case e := <-r.Events:
		return e.Broken
	case <-time.After(20 * time.Second):
		r.tb.Fatalf("no event: %+v", r.Dev.Status())
		return nil
	}
}
