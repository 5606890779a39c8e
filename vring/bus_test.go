package vring_test

import (
	"fmt"
	"strconv"
	"testing"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/vring"
	"github.com/boardlink/boardlink/vring/vringtest"
)

// windowReads runs batches of 32 through a device side that reads across, and returns
// the bus reads and writes of its account.
func windowReads(t *testing.T, r *vringtest.Rig, batches int, vary bool) dma.Account {
	t.Helper()
	drv, dev := r.Pair(t)
	reqs := requests(r, 32, 1)
	var b vring.Batch
	used := make([]vring.Used, 0, 32)
	done := make([]vring.Completion, 32)
	// The steady state starts after a lap.
	for i := 0; i < 8; i++ {
		if err := cycle(drv, dev, reqs, &b, used, done); err != nil {
			t.Fatal(err)
		}
	}
	before := r.Account.Load()
	for i := 0; i < batches; i++ {
		if vary { // other lengths than one lap before
			for k := range reqs {
				reqs[k].Bufs[0].Len = uint32(i%61 + 1)
			}
		}
		if err := cycle(drv, dev, reqs, &b, used, done); err != nil {
			t.Fatal(err)
		}
	}
	a := r.Account.Load()
	a.Reads -= before.Reads
	a.ReadBytes -= before.ReadBytes
	a.Writes -= before.Writes
	a.WriteBytes -= before.WriteBytes
	return a
}

// TestWindowReads: the device side's bus reads for each buffer of one direct descriptor,
// in batches of 32: index, ring entries, descriptors and the driver's event or flags.
func TestWindowReads(t *testing.T) {
	for _, m := range vringtest.Memories {
		if !m.Across {
			continue
		}
		for i := 0; i < 8; i++ {
			p := vringtest.Params{Ring: rings[i&1], Memory: m, EventIdx: i&2 != 0, InOrder: i&4 != 0}
			t.Run(p.String(), func(t *testing.T) {
				const batches, buffers = 64, 64 * 32
				r := vringtest.NewRig(t, p, 256, 65536)
				a := windowReads(t, r, batches, true)
				reads, writes := float64(a.Reads)/buffers, float64(a.Writes)/buffers
				t.Logf("%.3f reads of %.1f bytes, %.3f writes of %.1f bytes for each buffer", reads, float64(a.ReadBytes)/buffers, writes, float64(a.WriteBytes)/buffers)
				maxReads, maxWrites := 2.5, 1.2
				if p.Ring.Packed {
					maxReads = 2.1
					if m.Name == "across" { // addresses come by whole cache lines
						maxReads = 1.35
					}
				}
				if strconv.IntSize == 32 && m.Name != "bus" {
					maxReads, maxWrites = 2*maxReads, 2*maxWrites // two accesses for each of 64 bits
				}
				if reads > maxReads {
					t.Errorf("%.3f bus reads for each buffer", reads)
				}
				if writes > maxWrites {
					t.Errorf("%.3f bus writes for each buffer", writes)
				}
				// 16 bytes of descriptor, 2 of the ring; 4 of index and at most 4 of suppression for each batch.
				perBuffer := uint64(18)
				if p.Ring.Packed {
					perBuffer = 16 // and the word behind the last descriptor, for each batch
					if m.Name == "across" {
						perBuffer = 24
					}
				}
				if a.ReadBytes > buffers*perBuffer+batches*16 {
					t.Errorf("%d bytes read for %d buffers", a.ReadBytes, buffers)
				}
				if a.FlushReads != 0 {
					t.Errorf("%d reads back while awake", a.FlushReads)
				}
			})
		}
	}
}

// In the steady state of chains that come back in order and with the same lengths, the
// device side writes nothing but its index.
func TestSplitDeviceWritesWhatChanges(t *testing.T) {
	for _, m := range vringtest.Memories {
		if !m.Across {
			continue
		}
		r := vringtest.NewRig(t, split(m, true, false), 64, 65536)
		a := windowReads(t, r, 10, false)
		if a.Writes != 10 || a.WriteBytes != 40 {
			t.Errorf("%s: %d writes of %d bytes for 10 batches", m.Name, a.Writes, a.WriteBytes)
		}
	}
}

// Only descriptors that are wanted are read.
func TestSplitDeviceScatteredHeads(t *testing.T) {
	r, d := device(t, split(vringtest.Memories[3], false, false), 16)
	heads := []uint16{4, 5, 6, 9, 2, 3, 15, 0, 8}
	for i, h := range heads {
		r.desc(h, r.Addr(uint64(h)), 1, 0, 0)
		r.entry(uint16(i), h)
	}
	r.availIdx(uint16(len(heads)))
	before := r.Account.Load().ReadBytes
	var b vring.Batch
	if n, err := d.Pop(&b, 16); n != len(heads) || err != nil {
		t.Fatal(n, err)
	}
	for i, h := range heads {
		if b.Chains[i].ID != h || b.Spans[i].Addr() != r.Addr(uint64(h)) {
			t.Errorf("chain %d: %+v", i, b.Chains[i])
		}
	}
	if got, want := r.Account.Load().ReadBytes-before, uint64(4+len(heads)*(2+16)); got != want {
		t.Errorf("%d bytes read, want %d", got, want)
	}
}

// TestBusAgrees: what a queue accounts is what the bus saw.
func TestBusAgrees(t *testing.T) {
	for i := 0; i < 16; i++ {
		bus := vringtest.NewBus(1 << 20)
		m := vringtest.Memory{Name: "counting", Across: true, New: busMemory(bus)}
		p := vringtest.Params{Ring: rings[i>>3], Memory: m, EventIdx: i&1 != 0, Indirect: i&2 != 0, InOrder: i&4 != 0}
		r := vringtest.NewRig(t, p, 64, 65536)
		drv, err := r.Ring.NewDriver(r.DrvCfg)
		if err != nil {
			t.Fatal(err)
		}
		reads, writes := bus.Reads, bus.Writes
		dev, err := r.Ring.NewDevice(r.DevCfg)
		if err != nil {
			t.Fatal(err)
		}
		reads, writes = bus.Reads-reads, bus.Writes-writes
		var b vring.Batch
		done := make([]vring.Completion, 64)
		device := func(f func()) {
			r0, w0 := bus.Reads, bus.Writes
			f()
			reads += bus.Reads - r0
			writes += bus.Writes - w0
		}
		for k := 0; k < 50; k++ {
			if _, err := drv.Add(requests(r, 1+k%7, 1+k%3)); err != nil {
				t.Fatal(err)
			}
			drv.NeedKick()
			device(func() {
				b.Chains, b.Spans = b.Chains[:0], b.Spans[:0]
				if _, err := dev.Pop(&b, 5); err != nil {
					t.Fatal(err)
				}
				var used []vring.Used
				for _, c := range b.Chains {
					used = append(used, vring.Used{ID: c.ID, Count: c.Count, Len: c.WriteLen})
				}
				if err := dev.Complete(used); err != nil {
					t.Fatal(err)
				}
				dev.NeedCall()
				if _, err := dev.ArmKick(); err != nil {
					t.Fatal(err)
				}
				dev.DisarmKick()
			})
			if _, err := drv.Reap(done); err != nil {
				t.Fatal(err)
			}
		}
		a := r.Account.Load()
		if a.Reads+a.FlushReads != reads || a.Writes != writes {
			t.Errorf("accounted %d + %d reads, %d writes; the bus saw %d, %d", a.Reads, a.FlushReads, a.Writes, reads, writes)
		}
	}
}

// pushRig is placement push: descriptors and driver area in host memory, which the
// driver side reaches across, the device area in board memory, which the device side
// reaches across.
type pushRig struct {
	drv, dev               vring.Config
	boardAccount, hostSide *dma.Account // of the driver side's host region, of the device side's board region
}

func newPushRig(t testing.TB, event bool, n uint16) (*pushRig, func(off uint64) dma.Addr) {
	const hostBase, boardBase dma.Addr = 0x9_0000_0000, 0x1000_0000
	host, board := vringtest.Mapped(t, 1<<17, 0), vringtest.Mapped(t, 1<<17, 0)
	p := &pushRig{boardAccount: new(dma.Account), hostSide: new(dma.Account)}
	rw := dma.DeviceRead | dma.DeviceWrite
	drvHost := &dma.Region{Name: "pool", Addr: hostBase, Mem: host, Access: rw, Across: true, Account: p.boardAccount}
	drvBoard := &dma.Region{Name: "board", Addr: boardBase, Mem: board, Access: rw}
	devHost := dma.Region{Name: "pool", Addr: hostBase, Mem: host, Access: rw}
	devBoard := dma.Region{Name: "board", Addr: boardBase, Mem: board, Access: rw, Across: true, Account: p.hostSide}
	table, err := dma.NewTable(devHost, devBoard)
	if err != nil {
		t.Fatal(err)
	}
	ref := new(dma.TableRef)
	ref.Store(table)
	desc, driver, device := vring.SplitSizes(n)
	c := vring.Config{Name: "push0", Size: n, EventIdx: event}
	p.drv, p.dev = c, c
	p.drv.Desc = dma.Span{Region: drvHost, Off: 0, Len: uint32(desc)}
	p.drv.Driver = dma.Span{Region: drvHost, Off: 16384, Len: uint32(driver)}
	p.drv.Device = dma.Span{Region: drvBoard, Off: 0, Len: uint32(device)}
	p.dev.Desc = dma.Span{Region: &devHost, Off: 0, Len: uint32(desc)}
	p.dev.Driver = dma.Span{Region: &devHost, Off: 16384, Len: uint32(driver)}
	p.dev.Device = dma.Span{Region: &devBoard, Off: 0, Len: uint32(device)}
	p.dev.Table = ref
	return p, func(off uint64) dma.Addr { return hostBase + 65536 + dma.Addr(off) }
}

// TestPushReads: with placement push nobody reads across while awake, and once for each sleep.
func TestPushReads(t *testing.T) {
	for _, event := range []bool{false, true} {
		t.Run(fmt.Sprint(event), func(t *testing.T) {
			p, addr := newPushRig(t, event, 256)
			drv, err := vring.NewSplitDriver(p.drv)
			if err != nil {
				t.Fatal(err)
			}
			dev, err := vring.NewSplitDevice(p.dev)
			if err != nil {
				t.Fatal(err)
			}
			reqs := make([]vring.Request, 32)
			for i := range reqs {
				reqs[i] = vring.Request{Bufs: []vring.Buffer{{Addr: addr(uint64(i) * 64), Len: 64}}, Token: uint32(i)}
			}
			var b vring.Batch
			used := make([]vring.Used, 0, 32)
			done := make([]vring.Completion, 32)
			const awake, sleeps = 100, 10
			for i := 0; i < awake; i++ {
				if err := cycle(drv, dev, reqs, &b, used, done); err != nil {
					t.Fatal(err)
				}
			}
			for _, a := range []dma.Account{p.boardAccount.Load(), p.hostSide.Load()} {
				if a.Reads != 0 || a.ReadBytes != 0 || a.FlushReads != 0 || a.Writes == 0 {
					t.Errorf("awake: %+v", a)
				}
			}
			for i := 0; i < sleeps; i++ {
				dev.DisarmKick()
				drv.DisarmCall()
				if err := cycle(drv, dev, reqs, &b, used, done); err != nil {
					t.Fatal(err)
				}
				if pending, err := dev.ArmKick(); pending || err != nil {
					t.Fatal(pending, err)
				}
				if pending, err := drv.ArmCall(); pending || err != nil {
					t.Fatal(pending, err)
				}
			}
			for _, a := range []dma.Account{p.boardAccount.Load(), p.hostSide.Load()} {
				if a.Reads != 0 || a.FlushReads != sleeps {
					t.Errorf("%d sleeps: %+v", sleeps, a)
				}
			}
			if n := drv.Stats().Load().FlushReads; n != sleeps {
				t.Errorf("driver side counts %d", n)
			}
			if n := dev.Stats().Load().FlushReads; n != sleeps {
				t.Errorf("device side counts %d", n)
			}
		})
	}
}

// TestWindowSleeps: where index and suppression word lie in the same memory across, reading
// the index flushes; no read is spent on it.
func TestWindowSleeps(t *testing.T) {
	r, d := device(t, split(vringtest.Memories[3], true, false), 8)
	r.desc(0, r.Addr(0), 1, 0, 0)
	for i := uint16(1); i < 5; i++ {
		r.availIdx(i)
		var b vring.Batch
		if n, err := d.Pop(&b, 1); n != 1 || err != nil {
			t.Fatal(n, err)
		}
		before := r.Account.Load()
		if pending, err := d.ArmKick(); pending || err != nil {
			t.Fatal(pending, err)
		}
		if a := r.Account.Load(); a.FlushReads != 0 || a.Reads != before.Reads+1 || a.Writes != before.Writes+1 {
			t.Errorf("arming cost %+v after %+v", a, before)
		}
	}
}
