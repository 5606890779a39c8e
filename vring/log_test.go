package vring_test

import (
	"bytes"
	"fmt"
	"testing"
	"unsafe"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/vring"
	"github.com/boardlink/boardlink/vring/vringtest"
)

const logPage = dma.LogPage

// checker finds pages that the device side wrote and did not mark.
type checker struct {
	r     *vringtest.Rig
	base  uint64 // page of the memory's first byte
	bits  []byte
	log   vring.Log
	was   []byte
	now   []byte
	wrote map[string]int // pages found written, by what lies there
	lost  map[string]int // of these, those not marked
	extra map[string]int // pages that were marked and not written
}

// aliasPage is the page that the device area is marked at besides.
const aliasPage = 17

// newChecker lays the rig's areas out in pages of their own.
func newChecker(t *testing.T, p vringtest.Params, size uint16, payload int) *checker {
	r := vringtest.NewRig(t, p, size, payload)
	up := func(n uint64) uint64 { return (n + logPage - 1) &^ (logPage - 1) }
	desc, driver, device := p.Ring.Sizes(size)
	r.DescOff = 0
	r.DriverOff = up(desc)
	r.DeviceOff = r.DriverOff + up(driver)
	r.IndirectOff = r.DeviceOff + up(device)
	r.Payload = r.IndirectOff + up(uint64(size)*vringtest.IndirectMax*16)
	r.Mem = p.Memory.New(t, int(r.Payload)+payload)
	r.Over(t, r.Mem, r.Mem)
	c := &checker{r: r, base: uint64(vringtest.Base) / logPage, wrote: map[string]int{}, lost: map[string]int{}, extra: map[string]int{}}
	c.was, c.now = make([]byte, r.Mem.Size()), make([]byte, r.Mem.Size())
	words := make([]uint32, (c.base+uint64(len(c.was))/logPage)/32+1)
	c.bits = unsafe.Slice((*byte)(unsafe.Pointer(&words[0])), 4*len(words))
	l, err := dma.NewLog(mmio.NewMem(unsafe.Pointer(&words[0]), uint64(len(c.bits)), mmio.Cached), nil)
	if err != nil {
		t.Fatal(err)
	}
	c.log = vring.Log{Bits: l, Buffers: true, At: aliasPage * logPage, HasAt: true}
	return c
}

// what names what lies in a page of the memory.
func (c *checker) what(page uint64) string {
	switch off := page * logPage; {
	case off < c.r.DriverOff:
		return "descriptors"
	case off < c.r.DeviceOff:
		return "driver area"
	case off < c.r.IndirectOff:
		return "device area"
	case off < c.r.Payload:
		return "indirect tables"
	}
	return "buffers"
}

// during runs what the device side does, and compares memory and marks.
func (c *checker) during(t *testing.T, f func()) {
	t.Helper()
	for i := range c.bits {
		c.bits[i] = 0
	}
	c.r.Mem.CopyOut(c.was, 0)
	f()
	c.r.Mem.CopyOut(c.now, 0)
	marked := func(p uint64) bool { return c.bits[p/8]>>(p%8)&1 != 0 }
	for p := uint64(0); p*logPage < uint64(len(c.was)); p++ {
		end := (p + 1) * logPage
		if end > uint64(len(c.was)) {
			end = uint64(len(c.was))
		}
		wrote := !bytes.Equal(c.was[p*logPage:end], c.now[p*logPage:end])
		has := marked(c.base + p)
		if wrote {
			c.wrote[c.what(p)]++
		}
		if wrote && !has {
			c.lost[c.what(p)]++
		}
		if has && !wrote {
			c.extra[c.what(p)]++
		}
		if c.what(p) == "device area" && has && c.log.HasAt && !marked(aliasPage+p-c.r.DeviceOff/logPage) {
			t.Errorf("page %d of the device area is marked, and not where the front end asks for it too", p)
		}
	}
}

// logTraffic has the device side take and complete chains for several laps, as a device does: it completes some with
// part of their bytes, and gives some back.
func logTraffic(t *testing.T, c *checker, device vring.Log, byLen bool) {
	t.Helper()
	r := c.r
	cfg := r.DevCfg
	cfg.LogByLen = byLen
	cfg.Log = device
	drv, err := r.Ring.NewDriver(r.DrvCfg)
	if err != nil {
		t.Fatal(err)
	}
	var dev vring.Device
	c.during(t, func() {
		if dev, err = r.Ring.NewDevice(cfg); err != nil {
			t.Fatal(err)
		}
	})
	rnd := uint32(1)
	random := func(n int) int {
		rnd = rnd*1664525 + 1013904223
		return int(rnd>>8) % n
	}
	const bufs = 24 // each of 3 pages
	next, fill := 0, 0
	done := make([]vring.Completion, r.Size)
	var b vring.Batch
	for turn := 0; turn < 80; turn++ {
		for drv.Free() > int(r.Size)/2 {
			at := uint64(next%bufs)*3*logPage + uint64(random(64)*8)
			q := vring.Request{Token: uint32(next), Bufs: []vring.Buffer{{Addr: r.Addr(at), Len: uint32(64 + random(2*logPage))}}}
			if random(3) == 0 {
				q.Bufs = append(q.Bufs, vring.Buffer{Addr: r.Addr(at + 5*logPage/2), Len: 200})
			}
			if random(4) == 0 {
				q.Readable = 1
			}
			if n, err := drv.Add([]vring.Request{q}); n != 1 {
				if err != nil {
					t.Fatal(err)
				}
				break
			}
			next++
		}
		drv.NeedKick()
		if random(2) == 0 {
			drv.ArmCall()
		}
		b.Chains, b.Spans = b.Chains[:0], b.Spans[:0]
		var used []vring.Used
		back := 0
		c.during(t, func() {
			n, err := dev.Pop(&b, 1+random(20))
			if err != nil {
				t.Fatal(err)
			}
			for i := range b.Chains[:n] {
				ch := &b.Chains[i]
				room := uint32(0)
				if ch.WriteLen > 0 {
					room = uint32(random(int(ch.WriteLen) + 1))
				}
				left := room
				for _, s := range b.Spans[int(ch.First)+int(ch.Readable):][:ch.Writable] {
					m := s.Len
					if m > left {
						m = left
					}
					fill++
					s.CopyIn(0, bytes.Repeat([]byte{byte(fill)}, int(m)))
					left -= m
				}
				if i >= n-2 && i > 0 && turn%5 == 3 { // given back, although it was written
					back++
					dev.Wrote(ch.ID, room)
					continue
				}
				used = append(used, vring.Used{ID: ch.ID, Count: ch.Count, Len: room})
			}
			dev.Unpop(back)
			if turn%7 == 6 && len(used) > 0 {
				_, err = dev.Settle(used, 0)
			} else {
				err = dev.Complete(used)
			}
			if err != nil {
				t.Fatal(err)
			}
			dev.NeedCall()
		})
		if random(3) == 0 {
			c.during(t, func() {
				if _, err := dev.ArmKick(); err != nil {
					t.Fatal(err)
				}
			})
			c.during(t, dev.DisarmKick)
		}
		if _, err := drv.Reap(done); err != nil {
			t.Fatal(err)
		}
	}
	if c.wrote["buffers"] == 0 || c.wrote["device area"] == 0 || c.wrote["driver area"] != 0 || c.wrote["indirect tables"] != 0 || (c.wrote["descriptors"] != 0) != r.Ring.Packed {
		t.Fatalf("the device side wrote pages of %v", c.wrote)
	}
}

// TestLog: whatever the device side writes of rings and buffers is marked; and a checker that is told of marks left out
// finds them.
func TestLog(t *testing.T) {
	for _, ring := range vringtest.Rings {
		for i := 0; i < 8; i++ {
			p := vringtest.Params{Ring: ring, Memory: vringtest.Heap, EventIdx: i&1 != 0, Indirect: i&2 != 0, InOrder: i&4 != 0}
			t.Run(p.String(), func(t *testing.T) {
				t.Parallel()
				const size, payload = 512, 25 * 3 * logPage
				for _, byLen := range []bool{false, true} {
					c := newChecker(t, p, size, payload)
					logTraffic(t, c, c.log, byLen)
					if len(c.lost) != 0 {
						t.Errorf("by length %v: pages written and not marked: %v of %v", byLen, c.lost, c.wrote)
					}
					// The last byte of a used element may be what it was one lap before, so a marked page may be unchanged.
					if c.extra["driver area"] != 0 || c.extra["indirect tables"] != 0 || !ring.Packed && c.extra["descriptors"] != 0 || byLen && c.extra["buffers"] != 0 {
						t.Errorf("by length %v: pages marked and not written: %v", byLen, c.extra)
					}
					if n := c.log.Bits.Outside(); n != 0 {
						t.Errorf("%d marks outside the log", n)
					}
				}

				// Without the marks of buffers, and without any.
				c := newChecker(t, p, size, payload)
				ringOnly := c.log
				ringOnly.Buffers = false
				logTraffic(t, c, ringOnly, true)
				if c.lost["buffers"] != c.wrote["buffers"] || len(c.lost) != 1 {
					t.Errorf("without marks of buffers: lost %v of %v", c.lost, c.wrote)
				}
				c = newChecker(t, p, size, payload)
				logTraffic(t, c, vring.Log{}, true)
				if fmt.Sprint(c.lost) != fmt.Sprint(c.wrote) {
					t.Errorf("without a log: lost %v of %v", c.lost, c.wrote)
				}
			})
		}
	}
}

// TestLogToggled: SetLog turns marks on, to another log, and off, while the queue stands where it is.
func TestLogToggled(t *testing.T) {
	for _, ring := range vringtest.Rings {
		t.Run(ring.Name, func(t *testing.T) {
			p := vringtest.Params{Ring: ring, Memory: vringtest.Heap, EventIdx: true}
			c := newChecker(t, p, 64, 64*logPage)
			second := newChecker(t, p, 64, 64*logPage) // for its log
			drv, dev := c.r.Pair(t)
			var b vring.Batch
			done := make([]vring.Completion, 4)
			move := func(i int) {
				if n, err := drv.Add([]vring.Request{{Bufs: []vring.Buffer{{Addr: c.r.Addr(uint64(i) * logPage), Len: 100}}}}); n != 1 || err != nil {
					t.Fatal(n, err)
				}
				b.Chains, b.Spans = b.Chains[:0], b.Spans[:0]
				if n, err := dev.Pop(&b, 4); n != 1 || err != nil {
					t.Fatal(n, err)
				}
				b.Spans[0].CopyIn(0, []byte{byte(i + 1)})
				if err := dev.Complete([]vring.Used{{ID: b.Chains[0].ID, Count: b.Chains[0].Count, Len: 1}}); err != nil {
					t.Fatal(err)
				}
				if n, err := drv.Reap(done); n != 1 || err != nil {
					t.Fatal(n, err)
				}
			}
			marks := func(c *checker, i int) (n int) {
				p := c.base + c.r.Payload/logPage + uint64(i)
				n = int(c.bits[p/8] >> (p % 8) & 1)
				c.bits[p/8] = 0
				return n
			}
			for i, l := range []struct{ log, first, second int }{{0, 0, 0}, {1, 1, 0}, {2, 0, 1}, {0, 0, 0}, {1, 1, 0}, {3, 0, 0}} {
				dev.SetLog([]vring.Log{{}, c.log, second.log, {Bits: c.log.Bits}}[l.log])
				move(i)
				if a, z := marks(c, i), marks(second, i); a != l.first || z != l.second {
					t.Errorf("turn %d: %d and %d marks, want %d and %d", i, a, z, l.first, l.second)
				}
			}
			if n := dev.Stats().Load().Done; n != 6 {
				t.Errorf("%d chains were completed, want 6", n)
			}
		})
	}
}
