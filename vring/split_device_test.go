package vring_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/vring"
	"github.com/boardlink/boardlink/vring/vringtest"
	"github.com/google/go-cmp/cmp"
)

// Scenario 1: what cannot be a queue is refused, and the message names it.
func TestSplitConfig(t *testing.T) {
	p := split(vringtest.Heap, true, true)
	good := func() vring.Config { return vringtest.NewRig(t, p, 8, 4096).DevCfg }
	tests := []struct {
		name   string
		change func(c *vring.Config)
		want   string // part of the message; "" is good
		both   bool   // the driver side refuses too
		code   error
	}{
		{"good", func(c *vring.Config) {}, "", true, nil},
		{"size 0", func(c *vring.Config) { c.Size = 0 }, "size 0", true, vring.ErrConfig},
		{"size 3", func(c *vring.Config) { c.Size = 3 }, "size 3", true, vring.ErrConfig},
		{"size above the limit", func(c *vring.Config) { c.Size = 32769 }, "size 32769", true, vring.ErrConfig},
		{"size 65535", func(c *vring.Config) { c.Size = 65535 }, "size 65535", true, vring.ErrConfig},
		{"size 1", func(c *vring.Config) { c.Size = 1; c.IndirectMax = 1 }, "", true, nil},
		{"desc misaligned", func(c *vring.Config) { c.Desc.Off += 8 }, "descriptor area", true, vring.ErrConfig},
		{"driver misaligned by 1", func(c *vring.Config) { c.Driver.Off++ }, "driver area", true, vring.ErrConfig},
		{"driver aligned to 2", func(c *vring.Config) { c.Driver.Off += 2 }, "", false, nil},
		{"device misaligned", func(c *vring.Config) { c.Device.Off += 2 }, "device area", true, vring.ErrConfig},
		{"desc short", func(c *vring.Config) { c.Desc.Len-- }, "descriptor area", true, vring.ErrConfig},
		{"driver short", func(c *vring.Config) { c.Driver.Len-- }, "driver area", true, vring.ErrConfig},
		{"device short", func(c *vring.Config) { c.Device.Len-- }, "device area", true, vring.ErrConfig},
		{"desc outside", func(c *vring.Config) { c.Desc.Off = 1 << 30 }, "descriptor area", true, vring.ErrConfig},
		{"driver end outside", func(c *vring.Config) { c.Driver.Off = c.Driver.Region.Mem.Size() - 4 }, "driver area", true, vring.ErrConfig},
		{"device offset overflows", func(c *vring.Config) { c.Device.Off = ^uint64(0) - 3 }, "device area", true, vring.ErrConfig},
		{"address overflows", func(c *vring.Config) {
			r := *c.Desc.Region
			r.Addr = ^dma.Addr(0) - 127
			c.Desc.Region = &r
		}, "descriptor area", true, vring.ErrConfig},
		{"no region", func(c *vring.Config) { c.Device.Region = nil }, "device area", true, vring.ErrConfig},
		{"desc not readable", func(c *vring.Config) {
			r := *c.Desc.Region
			r.Access = dma.DeviceWrite
			c.Desc.Region = &r
		}, "access w", true, vring.ErrConfig},
		{"device not writable", func(c *vring.Config) {
			r := *c.Device.Region
			r.Access = dma.DeviceRead
			c.Device.Region = &r
		}, "access r", true, vring.ErrConfig},
		{"more in flight than descriptors", func(c *vring.Config) { c.State = vring.State{Avail: 5, Used: 65532} }, "9 chains in flight", false, vring.ErrState},
		{"used ahead", func(c *vring.Config) { c.State = vring.State{Avail: 5, Used: 6} }, "in flight", false, vring.ErrState},
		{"all in flight", func(c *vring.Config) { c.State = vring.State{Avail: 5, Used: 65533} }, "", false, nil},
		{"no table", func(c *vring.Config) { c.Table = nil }, "region table", false, vring.ErrConfig},
	}
	check := func(t *testing.T, err error, want string, code error) {
		t.Helper()
		switch {
		case want == "" && err != nil:
			t.Errorf("refused: %v", err)
		case want != "" && (err == nil || !strings.Contains(err.Error(), want) || !errors.Is(err, code)):
			t.Errorf("error %v, want %v with %q", err, code, want)
		}
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := good()
			tt.change(&c)
			_, err := vring.NewSplitDevice(c)
			check(t, err, tt.want, tt.code)
			if tt.both {
				_, err := vring.NewSplitDriver(c)
				check(t, err, tt.want, tt.code)
			}
		})
	}
	t.Run("driver side", func(t *testing.T) {
		for _, tt := range []struct {
			name   string
			change func(c *vring.Config)
			want   string
			code   error
		}{
			{"driver area aligned to 2", func(c *vring.Config) { c.Driver.Off += 2 }, "not aligned to 4", vring.ErrConfig},
			{"in flight", func(c *vring.Config) { c.State = vring.State{Avail: 1} }, "in flight", vring.ErrState},
			{"no table length", func(c *vring.Config) { c.IndirectMax = 0 }, "indirect tables of 0", vring.ErrConfig},
			{"tables longer than the queue", func(c *vring.Config) { c.IndirectMax = 9 }, "indirect tables of 9", vring.ErrConfig},
			{"tables short", func(c *vring.Config) { c.IndirectMem.Len-- }, "indirect tables", vring.ErrConfig},
			{"tables misaligned", func(c *vring.Config) { c.IndirectMem.Off += 8 }, "indirect tables", vring.ErrConfig},
		} {
			c := vringtest.NewRig(t, p, 8, 4096).DrvCfg
			tt.change(&c)
			_, err := vring.NewSplitDriver(c)
			check(t, err, tt.want, tt.code)
		}
	})
	t.Run("local memory misaligned", func(t *testing.T) {
		// The link address is aligned, this side's mapping of it is not.
		c := good()
		m, err := c.Desc.Region.Mem.Slice(4, c.Desc.Region.Mem.Size()-4)
		if err != nil {
			t.Fatal(err)
		}
		r := *c.Desc.Region
		r.Mem = m
		c.Desc.Region = &r
		_, err = vring.NewSplitDevice(c)
		check(t, err, "local memory", vring.ErrConfig)
	})
}

// Scenario 2: chains of several descriptors.
func TestSplitDeviceChains(t *testing.T) {
	vringtest.Each(t, vringtest.Split, func(t *testing.T, p vringtest.Params) {
		r, d := device(t, p, 16)
		a := func(i uint64) dma.Addr { return r.Addr(i * 1000) }
		r.desc(0, a(0), 100, next, 1)
		r.desc(1, a(1), 101, 0, 7) // next without NEXT means nothing
		r.desc(2, a(2), 102, next, 3)
		r.desc(3, a(3), 103, write|next, 4)
		r.desc(4, a(4), 104, write, 0)
		r.desc(5, a(5), 105, write|next, 6)
		r.desc(6, a(6), 106, write, 0)
		r.entry(0, 0)
		r.entry(1, 2)
		r.entry(2, 5)
		r.availIdx(3)
		var b vring.Batch
		n, err := d.Pop(&b, 100)
		if n != 3 || err != nil {
			t.Fatalf("Pop = %d, %v", n, err)
		}
		want := []vring.Chain{
			{ID: 0, Count: 1, First: 0, Readable: 2, ReadLen: 201},
			{ID: 2, Count: 1, First: 2, Readable: 1, Writable: 2, ReadLen: 102, WriteLen: 207},
			{ID: 5, Count: 1, First: 5, Writable: 2, WriteLen: 211},
		}
		if diff := cmp.Diff(want, b.Chains); diff != "" {
			t.Error(diff)
		}
		if len(b.Spans) != 7 {
			t.Fatalf("%d spans", len(b.Spans))
		}
		for i, s := range b.Spans {
			if s.Addr() != a(uint64(i)) || s.Len != 100+uint32(i) {
				t.Errorf("span %d: %#x + %d", i, s.Addr(), s.Len)
			}
		}
		if n, err := d.Pop(&b, 100); n != 0 || err != nil || len(b.Chains) != 3 {
			t.Errorf("Pop of nothing = %d, %v", n, err)
		}
		if s := d.State(); s != (vring.State{Avail: 3}) {
			t.Errorf("state %+v", s)
		}
		if s := d.Stats().Load(); s.Chains != 3 || s.Bytes != 201+309+211 {
			t.Errorf("stats %+v", s)
		}
	})
}

// Scenario 3: what is given back is popped again, anew.
func TestSplitDeviceUnpop(t *testing.T) {
	vringtest.Each(t, vringtest.Split, func(t *testing.T, p vringtest.Params) {
		r, d := device(t, p, 8)
		for i := uint16(0); i < 4; i++ {
			r.desc(i, r.Addr(uint64(i)*64), 64, 0, 0)
			r.entry(i, i)
		}
		r.availIdx(4)
		var b, again vring.Batch
		if n, err := d.Pop(&b, 3); n != 3 || err != nil {
			t.Fatal(n, err)
		}
		d.Unpop(2)
		if s := d.State(); s.Avail != 1 {
			t.Errorf("state %+v", s)
		}
		if pending, err := d.ArmKick(); !pending || err != nil {
			t.Errorf("ArmKick with chains given back = %v, %v", pending, err)
		}
		if n, err := d.Pop(&again, 8); n != 3 || err != nil {
			t.Fatal(n, err)
		}
		if diff := cmp.Diff(b.Chains[1].ID, again.Chains[0].ID); diff != "" {
			t.Error(diff)
		}
		if again.Chains[2].ID != 3 {
			t.Errorf("chain %d", again.Chains[2].ID)
		}
		if c := d.Stats().Load().Chains; c != 4 {
			t.Errorf("%d chains counted", c)
		}
		d.Unpop(0)
		defer func() {
			if recover() == nil {
				t.Error("unpopped 5 of 4")
			}
		}()
		d.Unpop(5)
	})
}

// Scenario 3: arming sets avail_event to the next available index.
func TestSplitDeviceArmSetsEvent(t *testing.T) {
	for _, m := range vringtest.Memories {
		t.Run(m.Name, func(t *testing.T) {
			r, d := device(t, split(m, true, false), 8)
			r.desc(0, r.Addr(0), 1, 0, 0)
			for i := uint16(0); i < 5; i++ {
				r.availIdx(i + 1)
				var b vring.Batch
				if pending, err := d.ArmKick(); !pending || err != nil {
					t.Fatal(pending, err)
				}
				if n, err := d.Pop(&b, 1); n != 1 || err != nil {
					t.Fatal(n, err)
				}
				if err := d.Complete([]vring.Used{{}}); err != nil {
					t.Fatal(err)
				}
				if pending, err := d.ArmKick(); pending || err != nil {
					t.Fatal(pending, err)
				}
				if e := r.getAvailEvent(); e != i+1 {
					t.Errorf("avail_event %d, want %d", e, i+1)
				}
			}
		})
	}
}

// Scenario 4: the available index.
func TestSplitDeviceIndexJump(t *testing.T) {
	vringtest.Each(t, vringtest.Split, func(t *testing.T, p vringtest.Params) {
		for _, tt := range []struct {
			state vring.State
			idx   uint16
			n     int // -1: ErrIndexJump
		}{
			{vring.State{}, 4, 4},
			{vring.State{}, 5, -1},
			{vring.State{Avail: 1}, 4, 3},
			{vring.State{Avail: 1}, 5, -1}, // with the one in flight
			{vring.State{Avail: 1, Used: 1}, 5, 4},
			{vring.State{Avail: 1, Used: 1}, 6, -1},
			{vring.State{Avail: 1, Used: 1}, 0, -1}, // back
			{vring.State{Avail: 7, Used: 7}, 6, -1},
			{vring.State{Avail: 65535, Used: 65535}, 3, 4},
			{vring.State{Avail: 65535, Used: 65535}, 4, -1},
			{vring.State{Avail: 65535, Used: 65535}, 65534, -1},
			{vring.State{Avail: 0, Used: 65532}, 0, 0},
			{vring.State{Avail: 0, Used: 65532}, 1, -1},
			{vring.State{}, 65535, -1},
			{vring.State{}, 32768, -1},
		} {
			for _, arm := range []bool{false, true} {
				r := raw{vringtest.NewRig(t, p, 4, 4096)}
				r.DevCfg.State = tt.state
				d, err := vring.NewSplitDevice(r.DevCfg)
				if err != nil {
					t.Fatal(err)
				}
				for i := uint16(0); i < 4; i++ {
					r.desc(i, r.Addr(0), 1, 0, 0)
					r.entry(i, i)
				}
				r.availIdx(tt.idx)
				var b vring.Batch
				if arm {
					pending, err := d.ArmKick()
					if tt.n < 0 != (err != nil) || pending != (tt.n > 0) {
						t.Errorf("%+v to %d: ArmKick = %v, %v", tt.state, tt.idx, pending, err)
					}
				}
				n, err := d.Pop(&b, 10)
				if tt.n >= 0 {
					if n != tt.n || err != nil {
						t.Errorf("%+v to %d: Pop = %d, %v, want %d", tt.state, tt.idx, n, err, tt.n)
					}
					continue
				}
				var e *vring.Error
				if n != 0 || !errors.Is(err, vring.ErrIndexJump) || !errors.As(err, &e) || e.Index != tt.idx || e.Queue != "test0 q0" {
					t.Errorf("%+v to %d: Pop = %d, %v", tt.state, tt.idx, n, err)
				}
				if s := d.State(); s != tt.state {
					t.Errorf("state moved to %+v", s)
				}
				broken(t, d, err)
			}
		}
	})
}

// broken checks that every call of a broken device side returns the error.
func broken(t *testing.T, d *vring.SplitDevice, err error) {
	t.Helper()
	var b vring.Batch
	if _, e := d.Pop(&b, 1); e != err {
		t.Errorf("Pop of a broken queue: %v", e)
	}
	if _, e := d.ArmKick(); e != err {
		t.Errorf("ArmKick of a broken queue: %v", e)
	}
	if e := d.Complete([]vring.Used{{}}); e != err {
		t.Errorf("Complete of a broken queue: %v", e)
	}
	if d.NeedCall() {
		t.Error("a broken queue needs a call")
	}
	d.DisarmKick()
	d.Unpop(1)
	if e := d.Broken(); e != err {
		t.Errorf("Broken() = %v", e)
	}
	if n := d.Stats().Load().Errors; n != 1 {
		t.Errorf("%d errors counted", n)
	}
}

// Scenario 5: used elements.
func TestSplitDeviceComplete(t *testing.T) {
	eachAnyOrder(t, vringtest.Split, func(t *testing.T, p vringtest.Params) {
		r := raw{vringtest.NewRig(t, p, 4, 4096)}
		start := uint16(65534)
		r.DevCfg.State = vring.State{Avail: start, Used: start}
		d, err := vring.NewSplitDevice(r.DevCfg)
		if err != nil {
			t.Fatal(err)
		}
		r.desc(3, r.Addr(0), 100, write, 0)
		idx := start
		if got := r.getUsedIdx(); got != start {
			t.Fatalf("used index %d at start", got)
		}
		for i := 0; i < 10; i++ {
			r.entry(idx, 3)
			r.entry(idx+1, 3)
			r.entry(idx+2, 3)
			r.availIdx(idx + 3)
			var b vring.Batch
			if n, err := d.Pop(&b, 4); n != 3 || err != nil {
				t.Fatal(n, err)
			}
			for _, bad := range [][]vring.Used{{{ID: 3, Len: 5}, {ID: 4}}, {{ID: 65535}}, {{}, {}, {}, {}}} {
				if err := d.Complete(bad); !errors.Is(err, vring.ErrComplete) {
					t.Errorf("Complete(%v) = %v", bad, err)
				}
				if got := r.getUsedIdx(); got != idx {
					t.Fatalf("used index moved to %d", got)
				}
			}
			if err := d.Complete(nil); err != nil {
				t.Error(err)
			}
			if err := d.Complete([]vring.Used{{ID: 3, Len: 5}, {ID: 2, Len: 1 << 31}, {ID: 1, Len: 0}}); err != nil {
				t.Fatal(err)
			}
			for k, want := range [][2]uint32{{3, 5}, {2, 1 << 31}, {1, 0}} {
				if id, n := r.getUsed(idx + uint16(k)); id != want[0] || n != want[1] {
					t.Errorf("element %d: %d, %d", k, id, n)
				}
			}
			idx += 3
			if got := r.getUsedIdx(); got != idx {
				t.Fatalf("used index %d, want %d", got, idx)
			}
			if s := d.State(); s != (vring.State{Avail: idx, Used: idx}) {
				t.Errorf("state %+v", s)
			}
		}
		if d.Broken() != nil {
			t.Error("the caller's errors broke the queue")
		}
		// Nothing but the elements, the flags and index, and the event was written.
		if r.getAvailIdx() != idx || r.getEntry(idx-1) != 3 {
			t.Error("driver area changed")
		}
	})
}

// passes lets n chains through a device side, in one batch, and returns NeedCall.
func passes(t *testing.T, r raw, d *vring.SplitDevice, n int) bool {
	t.Helper()
	r.availIdx(d.State().Avail + uint16(n))
	var b vring.Batch
	for got := 0; got < n; {
		k, err := d.Pop(&b, n)
		if err != nil || k == 0 {
			t.Fatal(k, err)
		}
		got += k
	}
	if err := d.Complete(make([]vring.Used, n)); err != nil {
		t.Fatal(err)
	}
	return d.NeedCall()
}

// Scenario 6: whether to call.
func TestSplitDeviceNeedCall(t *testing.T) {
	at := func(t *testing.T, m vringtest.Memory, event bool, idx uint16) (raw, *vring.SplitDevice) {
		r := raw{vringtest.NewRig(t, split(m, event, false), 16, 4096)}
		r.DevCfg.State = vring.State{Avail: idx, Used: idx}
		d, err := vring.NewSplitDevice(r.DevCfg)
		if err != nil {
			t.Fatal(err)
		}
		r.desc(0, r.Addr(0), 1, 0, 0)
		return r, d
	}
	for _, m := range vringtest.Memories {
		t.Run(m.Name, func(t *testing.T) {
			t.Run("flags", func(t *testing.T) {
				r, d := at(t, m, false, 0)
				r.usedEvent(1000) // not negotiated: means nothing
				for i := 0; i < 20; i++ {
					if !passes(t, r, d, 1) {
						t.Fatal("no call")
					}
					if d.NeedCall() {
						t.Fatal("called twice")
					}
				}
				r.availFlags(1)
				if passes(t, r, d, 3) {
					t.Error("called with NO_INTERRUPT")
				}
				r.availFlags(0xfffe) // no other flag counts
				if !passes(t, r, d, 3) {
					t.Error("not called")
				}
				if s := d.Stats().Load(); s.Notify != 21 || s.Suppressed != 1 {
					t.Errorf("stats %+v", s)
				}
			})
			t.Run("event sweep", func(t *testing.T) {
				r, d := at(t, m, true, 0)
				r.usedEvent(4)
				r.availFlags(1) // means nothing with the event index
				for i := 1; i < 65536+12; i++ {
					if got, want := passes(t, r, d, 1), uint16(i) == 5; got != want {
						t.Fatalf("used index %d: call %v", i, got)
					}
					if d.NeedCall() {
						t.Fatal("called twice")
					}
				}
			})
			t.Run("event wraps", func(t *testing.T) {
				r, d := at(t, m, true, 65530)
				r.usedEvent(65532)
				passes(t, r, d, 1) // the first after a restart calls anyway
				if passes(t, r, d, 1) {
					t.Error("65532: called")
				}
				if !passes(t, r, d, 1) {
					t.Error("65533: not called")
				}
				if passes(t, r, d, 10) {
					t.Error("7: called")
				}
			})
			t.Run("first after a restart", func(t *testing.T) {
				r, d := at(t, m, true, 9)
				r.usedEvent(5)
				if !passes(t, r, d, 1) || passes(t, r, d, 1) {
					t.Error("the first batch after a restart calls, the second does not")
				}
			})
			t.Run("batches", func(t *testing.T) {
				// The used index goes to 10; the event is 6.
				for added, want := range map[int]bool{5: true, 4: true, 3: false} {
					r, d := at(t, m, true, 0)
					r.usedEvent(0xff00)
					passes(t, r, d, 10-added)
					r.usedEvent(6)
					if got := passes(t, r, d, added); got != want {
						t.Errorf("batch of %d: %v", added, got)
					}
				}
			})
			t.Run("guest fast and slow", func(t *testing.T) {
				r, d := at(t, m, true, 0)
				move := func(to uint16) bool {
					any := false
					for d.State().Used != to {
						n := int(to - d.State().Used)
						if n > 16 {
							n = 16
						}
						r.availIdx(d.State().Avail + uint16(n))
						var b vring.Batch
						if k, err := d.Pop(&b, n); k != n || err != nil {
							t.Fatal(k, err)
						}
						if err := d.Complete(make([]vring.Used, n)); err != nil {
							t.Fatal(err)
						}
					}
					any = d.NeedCall() || any
					return any
				}
				// A fast guest moves the event along.
				for _, s := range []struct{ event, to uint16 }{{0, 0x100}, {0x100, 0x300}, {0x300, 65535}, {65535, 0}, {0, 0x10}} {
					r.usedEvent(s.event)
					if !move(s.to) {
						t.Errorf("event %#x, used index %#x: no call", s.event, s.to)
					}
				}
				// A slow one leaves it behind.
				for _, s := range []struct {
					event, to uint16
					want      bool
				}{{0x10, 0x100, true}, {0x10, 0x101, false}, {0x10, 65535, false}, {0x10, 0, false}, {0x10, 0x10, false}, {0x10, 0x11, true}} {
					r.usedEvent(s.event)
					if got := move(s.to); got != s.want {
						t.Errorf("event %#x, used index %#x: %v", s.event, s.to, got)
					}
				}
			})
			t.Run("more than 65536 at once", func(t *testing.T) {
				r, d := at(t, m, true, 0)
				r.usedEvent(60000)
				for i := 0; i < 65536+16; i += 16 {
					r.availIdx(d.State().Avail + 16)
					var b vring.Batch
					if k, err := d.Pop(&b, 16); k != 16 || err != nil {
						t.Fatal(k, err)
					}
					if err := d.Complete(make([]vring.Used, 16)); err != nil {
						t.Fatal(err)
					}
				}
				if !d.NeedCall() {
					t.Error("no call for more than a whole turn of the index")
				}
			})
		})
	}
}

// Scenario 7: arming and disarming, and the race with a chain that comes meanwhile.
func TestSplitDeviceArm(t *testing.T) {
	for _, m := range vringtest.Memories {
		for _, event := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/%v", m.Name, event), func(t *testing.T) {
				r, d := device(t, split(m, event, false), 8)
				r.desc(0, r.Addr(0), 1, 0, 0)
				d.DisarmKick()
				if got, want := r.getUsedFlags(), uint16(1); !event && got != want {
					t.Errorf("used flags %d", got)
				}
				if event && r.getUsedFlags() != 0 {
					t.Error("flags written with the event index")
				}
				if pending, err := d.ArmKick(); pending || err != nil {
					t.Fatal(pending, err)
				}
				if r.getUsedFlags() != 0 {
					t.Error("NO_NOTIFY while armed")
				}
				// The loop of the data path, with a chain that comes just before it sleeps.
				got, turns := 0, 0
				for {
					turns++
					d.DisarmKick()
					var b vring.Batch
					for {
						n, err := d.Pop(&b, 4)
						if err != nil {
							t.Fatal(err)
						}
						if n == 0 {
							break
						}
						got += n
					}
					if turns == 1 {
						r.availIdx(1)
					}
					pending, err := d.ArmKick()
					if err != nil {
						t.Fatal(err)
					}
					if !pending {
						break
					}
				}
				if turns != 2 || got != 1 {
					t.Errorf("%d chains in %d turns", got, turns)
				}
				if s := d.Stats().Load(); s.Arms != 3 || s.ArmPending != 1 {
					t.Errorf("stats %+v", s)
				}
				// The index and the flags share a word: neither may disturb the other.
				d.DisarmKick()
				if err := d.Complete([]vring.Used{{}}); err != nil {
					t.Fatal(err)
				}
				if f := r.getUsedFlags(); r.getUsedIdx() != 1 || (f == 1) == event {
					t.Errorf("flags %d, index %d", f, r.getUsedIdx())
				}
			})
		}
	}
}

// Scenarios 8, 9, 12: what a driver can do wrong in a chain. Each case is the
// second chain of a batch of three; the first must come through.
func TestSplitDeviceBadChains(t *testing.T) {
	const size = 8
	const hole = dma.Addr(0x1000)
	tests := []struct {
		name  string
		ind   int // 0: either way, 1: needs indirect, -1: needs it not negotiated
		build func(r raw) (head uint16)
		want  error // nil: good
		cause error
	}{
		{"head out of range", 0, func(r raw) uint16 { return size }, vring.ErrHeadRange, nil},
		{"head 65535", 0, func(r raw) uint16 { return 65535 }, vring.ErrHeadRange, nil},
		{"next out of range", 0, func(r raw) uint16 { r.desc(1, r.Addr(0), 1, next, size); return 1 }, vring.ErrNextRange, nil},
		{"next 65535", 0, func(r raw) uint16 { r.desc(1, r.Addr(0), 1, next, 65535); return 1 }, vring.ErrNextRange, nil},
		{"self loop", 0, func(r raw) uint16 { r.desc(1, r.Addr(0), 1, next, 1); return 1 }, vring.ErrLoop, nil},
		{"loop of two", 0, func(r raw) uint16 {
			r.desc(1, r.Addr(0), 1, next, 2)
			r.desc(2, r.Addr(0), 1, next, 1)
			return 1
		}, vring.ErrLoop, nil},
		{"longer than what is left", 0, func(r raw) uint16 {
			// 8 descriptors, but the chain before holds one of them.
			for i := uint16(0); i < size; i++ {
				r.desc(i, r.Addr(0), 1, next, i+1)
			}
			r.desc(0, r.Addr(0), 10, 0, 0)
			r.desc(size-1, r.Addr(0), 1, next, 0)
			return 1
		}, vring.ErrLoop, nil},
		{"readable behind writable", 0, func(r raw) uint16 {
			r.desc(1, r.Addr(0), 1, next|write, 2)
			r.desc(2, r.Addr(0), 1, 0, 0)
			return 1
		}, vring.ErrOrder, nil},
		{"zero length", 0, func(r raw) uint16 { r.desc(1, r.Addr(0), 0, 0, 0); return 1 }, vring.ErrZeroLength, nil},
		{"zero length in a chain", 0, func(r raw) uint16 {
			r.desc(1, r.Addr(0), 1, next, 2)
			r.desc(2, r.Addr(0), 0, write, 0)
			return 1
		}, vring.ErrZeroLength, nil},
		{"overflow", 0, func(r raw) uint16 { r.desc(1, ^dma.Addr(0), 2, 0, 0); return 1 }, vring.ErrOverflow, nil},
		{"overflow in a chain", 0, func(r raw) uint16 {
			r.desc(1, r.Addr(0), 1, next, 2)
			r.desc(2, ^dma.Addr(0)-0xfffffffd, 0xffffffff, write, 0)
			return 1
		}, vring.ErrOverflow, nil},
		{"hole", 0, func(r raw) uint16 { r.desc(1, hole, 1, 0, 0); return 1 }, vring.ErrTranslate, dma.ErrHole},
		{"end in a hole", 0, func(r raw) uint16 { r.desc(1, r.Addr(65535), 2, 0, 0); return 1 }, vring.ErrTranslate, dma.ErrHole},
		{"before the region", 0, func(r raw) uint16 { r.desc(1, vringtest.Base-1, 2, 0, 0); return 1 }, vring.ErrTranslate, dma.ErrHole},
		{"total of 4 GiB", 0, func(r raw) uint16 {
			r.desc(1, bigBase, 1<<31, next, 2)
			r.desc(2, bigBase, 1<<31, write, 0)
			return 1
		}, vring.ErrTotal, nil},
		{"total of 4 GiB - 1", 0, func(r raw) uint16 {
			r.desc(1, bigBase, 1<<31, next, 2)
			r.desc(2, bigBase, 1<<31-1, write, 0)
			return 1
		}, nil, nil},
		{"write to what may be read", 0, func(r raw) uint16 { r.desc(1, roBase, 1, write, 0); return 1 }, vring.ErrTranslate, dma.ErrAccess},
		{"read of what may be read", 0, func(r raw) uint16 { r.desc(1, roBase, 1, 0, 0); return 1 }, nil, nil},
		{"unknown flags", 0, func(r raw) uint16 { r.desc(1, r.Addr(0), 1, 0xfff8, 0); return 1 }, nil, nil},

		{"indirect not negotiated", -1, func(r raw) uint16 { r.desc(1, r.Addr(0), 16, indirect, 0); return 1 }, vring.ErrIndirectNotNegotiated, nil},
		{"indirect not negotiated, behind another", -1, func(r raw) uint16 {
			r.desc(1, r.Addr(0), 16, next, 2)
			r.desc(2, r.Addr(0), 16, indirect, 0)
			return 1
		}, vring.ErrIndirectNotNegotiated, nil},
		{"indirect", 1, func(r raw) uint16 {
			r.descAt(r.Payload, r.Addr(64), 1, 0, 0)
			r.desc(1, r.Addr(0), 16, indirect, 0)
			return 1
		}, nil, nil},
		{"indirect, WRITE means nothing", 1, func(r raw) uint16 {
			r.descAt(r.Payload, r.Addr(64), 1, 0, 0)
			r.desc(1, r.Addr(0), 16, indirect|write, 0)
			return 1
		}, nil, nil},
		{"table of no bytes", 1, func(r raw) uint16 { r.desc(1, r.Addr(0), 0, indirect, 0); return 1 }, vring.ErrIndirectLen, nil},
		{"table of 15 bytes", 1, func(r raw) uint16 { r.desc(1, r.Addr(0), 15, indirect, 0); return 1 }, vring.ErrIndirectLen, nil},
		{"table of 17 bytes", 1, func(r raw) uint16 { r.desc(1, r.Addr(0), 17, indirect, 0); return 1 }, vring.ErrIndirectLen, nil},
		{"table longer than the queue", 1, func(r raw) uint16 { r.desc(1, r.Addr(0), 16*(size+1), indirect, 0); return 1 }, vring.ErrIndirectLen, nil},
		{"table of 65536 descriptors", 1, func(r raw) uint16 { r.desc(1, r.Addr(0), 16*65536, indirect, 0); return 1 }, vring.ErrIndirectLen, nil},
		{"table of 4 GiB - 16", 1, func(r raw) uint16 { r.desc(1, r.Addr(0), 0xfffffff0, indirect, 0); return 1 }, vring.ErrIndirectLen, nil},
		{"table in a hole", 1, func(r raw) uint16 { r.desc(1, hole, 16, indirect, 0); return 1 }, vring.ErrTranslate, dma.ErrHole},
		{"table that wraps", 1, func(r raw) uint16 { r.desc(1, ^dma.Addr(0), 16, indirect, 0); return 1 }, vring.ErrOverflow, nil},
		{"table that may not be read", 1, func(r raw) uint16 { r.desc(1, woBase, 16, indirect, 0); return 1 }, vring.ErrTranslate, dma.ErrAccess},
		{"nested", 1, func(r raw) uint16 {
			r.descAt(r.Payload, r.Addr(0), 16, indirect, 0)
			r.desc(1, r.Addr(0), 16, indirect, 0)
			return 1
		}, vring.ErrIndirectNested, nil},
		{"indirect with next", 1, func(r raw) uint16 {
			r.descAt(r.Payload, r.Addr(64), 1, 0, 0)
			r.desc(1, r.Addr(0), 16, indirect|next, 2)
			r.desc(2, r.Addr(0), 1, 0, 0)
			return 1
		}, vring.ErrIndirectNext, nil},
		{"next outside the table", 1, func(r raw) uint16 {
			r.descAt(r.Payload, r.Addr(64), 1, next, 1)
			r.desc(1, r.Addr(0), 16, indirect, 0)
			return 1
		}, vring.ErrIndirectNextRange, nil},
		{"loop in the table", 1, func(r raw) uint16 {
			r.descAt(r.Payload, r.Addr(64), 1, next, 1)
			r.descAt(r.Payload+16, r.Addr(64), 1, next, 0)
			r.desc(1, r.Addr(0), 32, indirect, 0)
			return 1
		}, vring.ErrLoop, nil},
		{"ring and table longer than the queue", 1, func(r raw) uint16 {
			for i := uint16(0); i < size; i++ {
				r.descAt(r.Payload+16*uint64(i), r.Addr(512), 1, next, i+1)
			}
			r.descAt(r.Payload+16*(size-1), r.Addr(512), 1, 0, 0)
			r.desc(1, r.Addr(512), 1, next, 2)
			r.desc(2, r.Addr(0), 16*size, indirect, 0)
			return 1
		}, vring.ErrLoop, nil},
		{"table as long as the queue", 1, func(r raw) uint16 {
			for i := uint16(0); i < size; i++ {
				r.descAt(r.Payload+16*uint64(i), r.Addr(512), 1, next, i+1)
			}
			r.descAt(r.Payload+16*(size-1), r.Addr(512), 1, 0, 0)
			r.desc(1, r.Addr(0), 16*size, indirect, 0)
			return 1
		}, nil, nil},
		{"order across ring and table", 1, func(r raw) uint16 {
			r.descAt(r.Payload, r.Addr(64), 1, 0, 0)
			r.desc(1, r.Addr(512), 1, next|write, 2)
			r.desc(2, r.Addr(0), 16, indirect, 0)
			return 1
		}, vring.ErrOrder, nil},
		{"hole in the table", 1, func(r raw) uint16 {
			r.descAt(r.Payload, hole, 1, 0, 0)
			r.desc(1, r.Addr(0), 16, indirect, 0)
			return 1
		}, vring.ErrTranslate, dma.ErrHole},
		{"zero length in the table", 1, func(r raw) uint16 {
			r.descAt(r.Payload, r.Addr(0), 0, 0, 0)
			r.desc(1, r.Addr(0), 16, indirect, 0)
			return 1
		}, vring.ErrZeroLength, nil},
	}
	seen := map[error]bool{}
	vringtest.Each(t, vringtest.Split, func(t *testing.T, p vringtest.Params) {
		for _, tt := range tests {
			if tt.ind > 0 && !p.Indirect || tt.ind < 0 && p.Indirect {
				continue
			}
			t.Run(tt.name, func(t *testing.T) {
				r, d := device(t, p, size)
				more(t, r)
				r.desc(0, r.Addr(512), 10, 0, 0)
				r.entry(0, 0)
				r.desc(7, r.Addr(512), 10, 0, 0)
				r.entry(1, tt.build(r))
				r.entry(2, 7)
				r.availIdx(3)
				b := vring.Batch{Chains: make([]vring.Chain, 1), Spans: make([]dma.Span, 1)} // appended to
				n, err := d.Pop(&b, 3)
				if tt.want == nil {
					if n == 2 && err == nil { // many spans end a batch early
						var k int
						k, err = d.Pop(&b, 3)
						n += k
					}
					if n != 3 || err != nil {
						t.Fatalf("Pop = %d, %v", n, err)
					}
					return
				}
				seen[tt.want] = true
				if n != 1 || !errors.Is(err, tt.want) || tt.cause != nil && !errors.Is(err, tt.cause) {
					t.Fatalf("Pop = %d, %v, want 1, %v", n, err, tt.want)
				}
				if len(b.Chains) != 2 || len(b.Spans) != 2 || b.Chains[1].ReadLen != 10 || b.Chains[1].First != 1 {
					t.Errorf("batch %+v", b)
				}
				var e *vring.Error
				if !errors.As(err, &e) || e.Index != 1 || e.Code != tt.want || !strings.Contains(err.Error(), "test0 q0") {
					t.Errorf("error %+v", e)
				}
				if s := d.State(); s.Avail != 1 {
					t.Errorf("state %+v", s)
				}
				broken(t, d, err)
			})
		}
	})
	for _, e := range []error{vring.ErrHeadRange, vring.ErrNextRange, vring.ErrLoop, vring.ErrIndirectNotNegotiated, vring.ErrIndirectLen,
		vring.ErrIndirectNested, vring.ErrIndirectNext, vring.ErrIndirectNextRange, vring.ErrOrder, vring.ErrZeroLength, vring.ErrOverflow,
		vring.ErrTranslate, vring.ErrTotal} {
		if !seen[e] {
			t.Errorf("no case reached: %v", e)
		}
	}
}

// Regions that more adds to a rig's table: memory that the device may only read or
// only write, and a region of 4 GiB, of a model that holds nothing.
const (
	roBase  dma.Addr = 0x10_0000_0000
	woBase  dma.Addr = 0x11_0000_0000
	bigBase dma.Addr = 0x12_0000_0000
)

type emptyBus struct{}

func (emptyBus) Load(uint64, uint) uint64   { panic("read") }
func (emptyBus) Store(uint64, uint, uint64) { panic("written") }
func (emptyBus) Barrier(mmio.Barrier)       {}

func more(t testing.TB, r raw) {
	t.Helper()
	regions := r.Ref.Load().Regions()
	m := vringtest.Heap.New(t, 4096)
	regions = append(regions,
		dma.Region{Name: "ro", Addr: roBase, Mem: m, Access: dma.DeviceRead},
		dma.Region{Name: "wo", Addr: woBase, Mem: m, Access: dma.DeviceWrite},
		dma.Region{Name: "big", Addr: bigBase, Mem: mmio.NewBusMem(emptyBus{}, 1<<32, mmio.Uncached), Access: dma.DeviceRead | dma.DeviceWrite})
	table, err := dma.NewTable(regions...)
	if err != nil {
		t.Fatal(err)
	}
	r.Ref.Store(table)
}

// Scenario 8: a chain of exactly the queue's size is fine; with a batch that goes on.
func TestSplitDeviceLongestChain(t *testing.T) {
	vringtest.Each(t, vringtest.Split, func(t *testing.T, p vringtest.Params) {
		for _, size := range []uint16{1, 2, 8, 256} {
			r, d := device(t, p, size)
			for i := uint16(0); i < size; i++ {
				f := uint16(next)
				if i == size-1 {
					f = 0
				}
				r.desc(i, r.Addr(uint64(i)), 1, f, i+1)
			}
			r.availIdx(1)
			var b vring.Batch
			if n, err := d.Pop(&b, 1); n != 1 || err != nil || b.Chains[0].Readable != size || b.Chains[0].ReadLen != uint32(size) {
				t.Errorf("size %d: %d, %v, %+v", size, n, err, b.Chains)
			}
		}
	})
}

// Chains may share nothing: the spans of a batch, and so its memory, are bounded.
func TestSplitDeviceBatchIsBounded(t *testing.T) {
	const size = 64
	r, d := device(t, split(vringtest.Heap, true, true), size)
	// All heads name the same chain of 40 descriptors.
	for i := uint16(0); i < 40; i++ {
		f := uint16(next)
		if i == 39 {
			f = 0
		}
		r.desc(i, r.Addr(uint64(i)), 1, f, i+1)
	}
	r.availIdx(size)
	var b vring.Batch
	if n, err := d.Pop(&b, size); n != 1 || !errors.Is(err, vring.ErrLoop) {
		t.Errorf("Pop = %d, %v", n, err)
	}
	// Indirect tables may be as long as the queue each: the batch ends early.
	r, d = device(t, split(vringtest.Heap, true, true), size)
	for i := uint16(0); i < size; i++ {
		f := uint16(next)
		if i == size-1 {
			f = 0
		}
		r.descAt(r.Payload+16*uint64(i), r.Addr(0), 1, f, i+1)
	}
	r.desc(0, r.Addr(0), 16*size, indirect, 0)
	r.availIdx(size)
	total := 0
	for total < size {
		b = vring.Batch{}
		n, err := d.Pop(&b, size)
		if n == 0 || err != nil || len(b.Spans) > 2*size {
			t.Fatalf("Pop = %d, %v, %d spans", n, err, len(b.Spans))
		}
		total += n
	}
}

// Scenario 9: an indirect table at any address, across the border of two regions.
func TestSplitDeviceIndirectPlaces(t *testing.T) {
	for _, m := range vringtest.Memories {
		t.Run(m.Name, func(t *testing.T) {
			for shift := uint64(0); shift < 17; shift++ {
				r, d := device(t, split(m, true, true), 8)
				// Cut the payload in two regions in the middle of the table.
				whole := r.Ref.Load().Regions()[0]
				cut := r.Payload + 24
				lo, hi := whole, whole
				var err error
				if lo.Mem, err = whole.Mem.Slice(0, cut); err != nil {
					t.Fatal(err)
				}
				if hi.Mem, err = whole.Mem.Slice(cut, whole.Mem.Size()-cut); err != nil {
					t.Fatal(err)
				}
				hi.Addr += dma.Addr(cut)
				table, err := dma.NewTable(lo, hi)
				if err != nil {
					t.Fatal(err)
				}
				r.Ref.Store(table)
				for i := uint64(0); i < 3; i++ {
					f := uint16(next)
					if i == 2 {
						f = 0
					}
					r.descAt(r.Payload+shift+16*i, r.Addr(100*(i+1)), uint32(i)+1, f, uint16(i)+1)
				}
				r.desc(5, r.Addr(shift), 48, indirect, 0)
				// A buffer across the border too.
				r.desc(6, r.Addr(20), 8, 0, 0)
				r.entry(0, 5)
				r.entry(1, 6)
				r.availIdx(2)
				var b vring.Batch
				if n, err := d.Pop(&b, 8); n != 2 || err != nil {
					t.Fatalf("shift %d: %d, %v", shift, n, err)
				}
				if c := b.Chains[0]; c.Readable != 3 || c.ReadLen != 6 {
					t.Errorf("shift %d: %+v", shift, c)
				}
				for i := uint64(0); i < 3; i++ {
					if b.Spans[i].Addr() != r.Addr(100*(i+1)) || b.Spans[i].Len != uint32(i)+1 {
						t.Errorf("shift %d: span %d at %#x", shift, i, b.Spans[i].Addr())
					}
				}
				if c := b.Chains[1]; c.Readable != 2 || c.ReadLen != 8 || b.Spans[3].Len != 4 || b.Spans[4].Len != 4 {
					t.Errorf("shift %d: %+v", shift, c)
				}
			}
		})
	}
}

// Scenario 12: regions of one byte each.
func TestSplitDeviceOneByteRegions(t *testing.T) {
	r, d := device(t, split(vringtest.Heap, false, false), 8)
	m := vringtest.Heap.New(t, 64)
	regions := r.Ref.Load().Regions()
	for i := uint64(0); i < 64; i++ {
		s, err := m.Slice(63-i, 1) // backwards: the pieces really are apart
		if err != nil {
			t.Fatal(err)
		}
		regions = append(regions, dma.Region{Name: fmt.Sprint(i), Addr: roBase + dma.Addr(i), Mem: s, Access: dma.DeviceRead})
	}
	table, err := dma.NewTable(regions...)
	if err != nil {
		t.Fatal(err)
	}
	r.Ref.Store(table)
	r.desc(0, roBase+3, dma.MaxSpans, next, 1)
	r.desc(1, roBase+50, 3, 0, 0)
	r.availIdx(1)
	var b vring.Batch
	if n, err := d.Pop(&b, 1); n != 1 || err != nil || b.Chains[0].Readable != dma.MaxSpans+3 {
		t.Fatalf("%d, %v, %+v", n, err, b.Chains)
	}
	for i, s := range b.Spans[:dma.MaxSpans] {
		if s.Len != 1 || s.Addr() != roBase+3+dma.Addr(i) {
			t.Errorf("span %d: %#x + %d", i, s.Addr(), s.Len)
		}
	}
	// One more is too many for one buffer.
	r.desc(0, roBase, dma.MaxSpans+1, 0, 0)
	r.availIdx(2)
	if n, err := d.Pop(&b, 1); n != 0 || !errors.Is(err, vring.ErrTranslate) || !errors.Is(err, dma.ErrTooManySpans) {
		t.Errorf("%d, %v", n, err)
	}
}

// What one chain may do in a region says nothing of the next one in it.
func TestSplitDeviceRights(t *testing.T) {
	for _, m := range vringtest.Memories {
		for _, second := range []uint16{0, write} {
			r, d := device(t, split(m, false, false), 8)
			more(t, r)
			base, first := roBase, uint16(0)
			if second == 0 {
				base, first = woBase, write
			}
			r.desc(0, base, 16, first, 0)
			r.desc(1, base, 16, first, 0)
			r.desc(2, base, 16, second, 0)
			for i := uint16(0); i < 3; i++ {
				r.entry(i, i)
			}
			r.availIdx(3)
			var b vring.Batch
			if n, err := d.Pop(&b, 3); n != 2 || !errors.Is(err, dma.ErrAccess) {
				t.Errorf("%s: Pop = %d, %v", m.Name, n, err)
			}
		}
	}
}

// ErrSpans: a chain in more than 65535 pieces, each buffer of MaxSpans of them.
func TestSplitDeviceSpans(t *testing.T) {
	const size = 4096
	r, d := device(t, split(vringtest.Heap, false, false), size)
	m := vringtest.Heap.New(t, 64)
	regions := r.Ref.Load().Regions()
	for i := uint64(0); i < dma.MaxSpans; i++ {
		s, err := m.Slice(i, 1)
		if err != nil {
			t.Fatal(err)
		}
		regions = append(regions, dma.Region{Name: fmt.Sprint(i), Addr: roBase + dma.Addr(i), Mem: s, Access: dma.DeviceRead})
	}
	table, err := dma.NewTable(regions...)
	if err != nil {
		t.Fatal(err)
	}
	r.Ref.Store(table)
	for i := uint16(0); i < size; i++ {
		f := uint16(next)
		if i == size-1 {
			f = 0
		}
		r.desc(i, roBase, dma.MaxSpans, f, i+1)
	}
	r.availIdx(1)
	var b vring.Batch
	if n, err := d.Pop(&b, 1); n != 0 || !errors.Is(err, vring.ErrSpans) {
		t.Errorf("%d, %v", n, err)
	}
	r.desc(size-2, roBase, dma.MaxSpans, 0, 0)
	d, err = vring.NewSplitDevice(r.DevCfg)
	if err != nil {
		t.Fatal(err)
	}
	if n, err := d.Pop(&b, 1); n != 1 || err != nil || b.Chains[0].Readable != (size-1)*dma.MaxSpans {
		t.Errorf("%d, %v", n, err)
	}
}

// Scenario 10: a device side made anew over a zeroed ring starts from nothing, whatever the
// one before left, and works on.
func TestSplitDeviceReset(t *testing.T) {
	vringtest.Each(t, vringtest.Split, func(t *testing.T, p vringtest.Params) {
		r, d := device(t, p, 256)
		for i := uint16(0); i < 255; i++ {
			r.desc(i, r.Addr(0), 1, next, i+1)
		}
		r.desc(255, r.Addr(0), 1, 0, 0)
		r.availIdx(1)
		d.DisarmKick()
		var b vring.Batch
		if n, err := d.Pop(&b, 1); n != 1 || err != nil {
			t.Fatal(n, err)
		}
		r.Mem.Zero(0, r.Payload)
		d, err := vring.NewSplitDevice(r.DevCfg)
		if err != nil {
			t.Fatal(err)
		}
		if n, err := d.Pop(&b, 1); n != 0 || err != nil {
			t.Errorf("Pop after reset = %d, %v", n, err)
		}
		if f := r.getUsedFlags(); f != 0 || d.State() != (vring.State{}) || d.Stats().Load().Chains != 0 {
			t.Errorf("flags %d, state %+v", f, d.State())
		}
		for i := uint16(0); i < 3; i++ {
			r.availIdx(i + 1)
			r.desc(0, r.Addr(0), 1, 0, 0)
			if n, err := d.Pop(&b, 1); n != 1 || err != nil {
				t.Errorf("Pop = %d, %v", n, err)
			}
		}
	})
}

// Scenario 11: state read out and restored in the middle, with chains in flight.
func TestSplitDeviceRestore(t *testing.T) {
	vringtest.Each(t, vringtest.Split, func(t *testing.T, p vringtest.Params) {
		r := raw{vringtest.NewRig(t, p, 8, 4096)}
		r.DevCfg.State = vring.State{Avail: 65533, Used: 65533}
		d, err := vring.NewSplitDevice(r.DevCfg)
		if err != nil {
			t.Fatal(err)
		}
		for i := uint16(0); i < 8; i++ {
			r.desc(i, r.Addr(0), uint32(i)+1, write, 0)
			r.entry(65533+i, i)
		}
		r.availIdx(3) // 65533 + 6
		var b vring.Batch
		if n, err := d.Pop(&b, 5); n != 5 || err != nil {
			t.Fatal(n, err)
		}
		if err := d.Complete([]vring.Used{{ID: 0}, {ID: 1}}); err != nil {
			t.Fatal(err)
		}
		s := d.State()
		if s != (vring.State{Avail: 2, Used: 65535}) {
			t.Fatalf("state %+v", s)
		}
		r.DevCfg.State = s
		d2, err := vring.NewSplitDevice(r.DevCfg)
		if err != nil {
			t.Fatal(err)
		}
		if d2.State() != s || r.getUsedIdx() != 65535 {
			t.Errorf("state %+v, used index %d", d2.State(), r.getUsedIdx())
		}
		b = vring.Batch{}
		if n, err := d2.Pop(&b, 5); n != 1 || err != nil || b.Chains[0].ID != 5 {
			t.Fatalf("%d, %v, %+v", n, err, b.Chains)
		}
		// The owner knows the three in flight; here it gives them back instead.
		if err := d2.Complete([]vring.Used{{ID: 2}, {ID: 3}, {ID: 4}, {ID: 5}}); err != nil {
			t.Fatal(err)
		}
		if id, _ := r.getUsed(2); id != 5 || r.getUsedIdx() != 3 {
			t.Errorf("id %d, used index %d", id, r.getUsedIdx())
		}
	})
}

// Restored chains in flight may be unpopped, and so popped anew.
func TestSplitDeviceRestoreUnpop(t *testing.T) {
	r := raw{vringtest.NewRig(t, split(vringtest.Heap, true, false), 8, 4096)}
	for i := uint16(0); i < 4; i++ {
		r.desc(i, r.Addr(0), 1, 0, 0)
		r.entry(i, i)
	}
	r.availIdx(4)
	r.DevCfg.State = vring.State{Avail: 3, Used: 1}
	d, err := vring.NewSplitDevice(r.DevCfg)
	if err != nil {
		t.Fatal(err)
	}
	d.Unpop(2)
	var b vring.Batch
	n, err := d.Pop(&b, 8)
	for n < 3 && err == nil {
		var k int
		if k, err = d.Pop(&b, 8); k == 0 {
			break
		}
		n += k
	}
	if n != 3 || err != nil || b.Chains[0].ID != 1 {
		t.Errorf("%d, %v, %+v", n, err, b.Chains)
	}
}

// Scenario 13: weird but legal: ring descriptors, then a table whose entries are out of order.
func TestSplitDeviceWeird(t *testing.T) {
	for _, m := range vringtest.Memories {
		t.Run(m.Name, func(t *testing.T) {
			r, d := device(t, split(m, true, true), 8)
			r.desc(6, r.Addr(100), 1, next, 1)
			r.desc(1, r.Addr(101), 2, next, 4)
			r.desc(4, r.Addr(0), 5*16, indirect, 0)
			// 7 pieces of 28 bytes: two in the ring, five in the table, entered at 0.
			r.descAt(r.Payload, r.Addr(103), 3, next, 3)
			r.descAt(r.Payload+3*16, r.Addr(106), 4, next, 1)
			r.descAt(r.Payload+1*16, r.Addr(110), 5, next|write, 4)
			r.descAt(r.Payload+4*16, r.Addr(115), 6, next|write, 2)
			r.descAt(r.Payload+2*16, r.Addr(121), 7, write, 0)
			r.entry(0, 6)
			r.availIdx(1)
			var b vring.Batch
			if n, err := d.Pop(&b, 8); n != 1 || err != nil {
				t.Fatal(n, err)
			}
			want := vring.Chain{ID: 6, Count: 1, Readable: 4, Writable: 3, ReadLen: 10, WriteLen: 18}
			if diff := cmp.Diff(want, b.Chains[0]); diff != "" {
				t.Error(diff)
			}
			at := r.Addr(100)
			for i, s := range b.Spans {
				if s.Addr() != at || s.Len != uint32(i)+1 {
					t.Errorf("span %d: %#x + %d", i, s.Addr(), s.Len)
				}
				at += dma.Addr(s.Len)
			}
		})
	}
}

// A driver area aligned to 2 is legal: flags and index are read apart.
func TestSplitDeviceHalfAligned(t *testing.T) {
	for _, m := range vringtest.Memories {
		for _, event := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/%v", m.Name, event), func(t *testing.T) {
				r := raw{vringtest.NewRig(t, split(m, event, false), 8, 4096)}
				r.DriverOff += 2
				r.DevCfg.Driver.Off += 2
				d, err := vring.NewSplitDevice(r.DevCfg)
				if err != nil {
					t.Fatal(err)
				}
				for i := uint16(0); i < 8; i++ {
					r.desc(i, r.Addr(0), uint32(i)+1, write, 0)
				}
				for i := uint16(0); i < 100; i += 5 {
					for k := uint16(0); k < 5; k++ {
						r.entry(i+k, (i+k)%8)
					}
					r.usedEvent(i + 4)
					quiet := i%2 == 1
					if quiet {
						r.availFlags(1)
						r.usedEvent(i - 1)
					} else {
						r.availFlags(0)
					}
					if pending, err := d.ArmKick(); pending || err != nil {
						t.Fatal(pending, err)
					}
					r.availIdx(i + 5)
					var b vring.Batch
					if n, err := d.Pop(&b, 8); n != 5 || err != nil || b.Chains[4].WriteLen != uint32((i+4)%8+1) {
						t.Fatal(n, err, b.Chains)
					}
					if err := d.Complete(make([]vring.Used, 5)); err != nil {
						t.Fatal(err)
					}
					if d.NeedCall() == quiet {
						t.Errorf("batch at %d: call %v", i, !quiet)
					}
				}
				r.availIdx(99)
				if _, err := d.ArmKick(); !errors.Is(err, vring.ErrIndexJump) {
					t.Error(err)
				}
			})
		}
	}
}

// The table may be replaced between batches.
func TestSplitDeviceTableReplaced(t *testing.T) {
	r, d := device(t, split(vringtest.Heap, true, false), 8)
	old := r.Ref.Load()
	r.desc(0, roBase, 1, 0, 0)
	r.desc(1, r.Addr(0), 1, 0, 0)
	r.entry(0, 1)
	r.entry(1, 0)
	r.entry(2, 0)
	r.availIdx(1)
	var b vring.Batch
	if n, err := d.Pop(&b, 1); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	more(t, r)
	r.availIdx(2)
	if n, err := d.Pop(&b, 1); n != 1 || err != nil || b.Spans[1].Region.Name != "ro" {
		t.Fatal(n, err)
	}
	r.Ref.Store(old)
	r.availIdx(3)
	if n, err := d.Pop(&b, 1); n != 0 || !errors.Is(err, dma.ErrHole) {
		t.Fatal(n, err)
	}
}
