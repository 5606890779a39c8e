package vring_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/vring"
	"github.com/boardlink/boardlink/vring/vringtest"
)

// recorder is a bus that remembers in which order a queue did what.
type recorder struct {
	*vringtest.Bus
	r   raw
	log []string
}

// name tells what lies at an offset.
func (b *recorder) name(off uint64) string {
	r := b.r
	desc, driver, device := vring.SplitSizes(r.Size)
	in := func(start, n uint64) bool { return off >= start && off < start+n }
	switch {
	case in(r.DescOff, desc):
		return "desc"
	case in(r.DriverOff, 4):
		return "avail.idx"
	case in(r.DriverOff+driver-2, 2):
		return "used_event"
	case in(r.DriverOff, driver):
		return "avail.ring"
	case in(r.DeviceOff, 4):
		return "used.idx"
	case in(r.DeviceOff+device-2, 2):
		return "avail_event"
	case in(r.DeviceOff, device):
		return "used.ring"
	case in(r.IndirectOff, r.Payload-r.IndirectOff):
		return "table"
	}
	return "payload"
}

func (b *recorder) note(s string) {
	if n := len(b.log); n == 0 || b.log[n-1] != s {
		b.log = append(b.log, s)
	}
}

func (b *recorder) Load(off uint64, width uint) uint64 {
	b.note("load " + b.name(off))
	return b.Bus.Load(off, width)
}

func (b *recorder) Store(off uint64, width uint, v uint64) {
	b.note("store " + b.name(off))
	b.Bus.Store(off, width, v)
}

func (b *recorder) Barrier(k mmio.Barrier) {
	b.note([]string{"read barrier", "write barrier", "full barrier"}[k])
}

// TestOrder: the publishing order, and where the barriers stand. Processors that reorder are
// not at hand for every run; what a queue asks for is the same on all of them.
func TestOrder(t *testing.T) {
	for i := 0; i < 4; i++ {
		event, ind := i&1 != 0, i&2 != 0
		t.Run(fmt.Sprintf("event=%v,indirect=%v", event, ind), func(t *testing.T) {
			rec := &recorder{Bus: vringtest.NewBus(1 << 20)}
			m := vringtest.Memory{Name: "recorded", New: func(tb testing.TB, n int) mmio.Mem { return mmio.NewBusMem(rec, uint64(n), mmio.Uncached) }}
			rec.r = raw{vringtest.NewRig(t, split(m, event, ind), 8, 65536)}
			r := rec.r
			drv, dev := r.Pair(t)
			suppressDrv, suppressDev := "used_event", "avail_event"
			if !event {
				suppressDrv, suppressDev = "avail.idx", "used.idx" // flags share the index's word
			}
			step := func(name string, f func() error, want ...string) {
				t.Helper()
				rec.log = nil
				if err := f(); err != nil {
					t.Fatalf("%s: %v", name, err)
				}
				if got := strings.Join(rec.log, "; "); got != strings.Join(want, "; ") {
					t.Errorf("%s: %s\nwant: %s", name, got, strings.Join(want, "; "))
				}
			}
			drv.DisarmCall()
			dev.DisarmKick()
			// In a table slot of 8 descriptors by 2 the request fills a table where it may.
			reqs := []vring.Request{request(r, 1, 1, 10, 20), request(r, 2, 1, 10, 20)}
			added := []string{"store desc", "store avail.ring", "write barrier", "store avail.idx"}
			popped := []string{"load avail.idx", "read barrier", "load avail.ring", "load desc"}
			if ind {
				added = []string{"store table", "store desc", "store table", "store desc", "store avail.ring", "write barrier", "store avail.idx"}
				popped = []string{"load avail.idx", "read barrier", "load avail.ring", "load desc", "load table"}
			}
			step("Add", func() error { _, err := drv.Add(reqs); return err }, added...)
			step("NeedKick", func() error { drv.NeedKick(); return nil }, "full barrier", "load "+suppressDev)
			var b vring.Batch
			step("Pop", func() error { _, err := dev.Pop(&b, 8); return err }, popped...)
			used := []vring.Used{{ID: b.Chains[0].ID, Len: 1}, {ID: b.Chains[1].ID, Len: 2}}
			step("Complete", func() error { return dev.Complete(used) }, "store used.ring", "write barrier", "store used.idx")
			step("NeedCall", func() error { dev.NeedCall(); return nil }, "full barrier", "load "+suppressDrv)
			step("Reap", func() error { _, err := drv.Reap(make([]vring.Completion, 8)); return err }, "load used.idx", "read barrier", "load used.ring")
			step("ArmCall", func() error { _, err := drv.ArmCall(); return err }, "store "+suppressDrv, "full barrier", "load used.idx")
			step("ArmKick", func() error { _, err := dev.ArmKick(); return err }, "store "+suppressDev, "full barrier", "load avail.idx")
			// Armed already: nothing to write, nothing to wait for.
			step("ArmCall again", func() error { _, err := drv.ArmCall(); return err }, "load used.idx")
			step("ArmKick again", func() error { _, err := dev.ArmKick(); return err }, "load avail.idx")
		})
	}
}

// TestPayloadBarriers: payload in a device's memory makes the barriers of a queue in
// RAM as strong as that memory needs, from the batch on that sees the table.
func TestPayloadBarriers(t *testing.T) {
	r, d := device(t, split(vringtest.Heap, true, false), 8)
	bus := vringtest.NewBus(4096)
	table, err := dma.NewTable(append(r.Ref.Load().Regions(), dma.Region{Name: "bar", Addr: roBase, Mem: mmio.NewBusMem(bus, 4096, mmio.Uncached), Access: dma.DeviceWrite})...)
	if err != nil {
		t.Fatal(err)
	}
	r.Ref.Store(table)
	r.desc(0, roBase, 64, write, 0)
	r.availIdx(1)
	var b vring.Batch
	if n, err := d.Pop(&b, 1); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	if bus.Fences[mmio.ReadBarrier] == 0 {
		t.Error("no read barrier between the index and the payload")
	}
	if err := d.Complete([]vring.Used{{Len: 64}}); err != nil {
		t.Fatal(err)
	}
	if bus.Fences[mmio.WriteBarrier] == 0 {
		t.Error("no write barrier between the payload and the index")
	}
	d.NeedCall()
	if bus.Fences[mmio.FullBarrier] == 0 {
		t.Error("no full barrier between the index and the event")
	}
	// The driver side does not see regions: it is told the kind, and works the same.
	r.DrvCfg.PayloadKind = mmio.WriteCombining
	r.DevCfg.PayloadKind = mmio.WriteCombining
	drv, dev := r.Pair(t)
	var used []vring.Used
	if err := cycle(drv, dev, requests(r.Rig, 4, 1), &vring.Batch{}, used, make([]vring.Completion, 4)); err != nil {
		t.Fatal(err)
	}
}
