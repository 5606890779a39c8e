package vring_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/vring"
	"github.com/boardlink/boardlink/vring/vringtest"
)

// stateFromBase is what a control plane of vhost-user does at the start of a queue.
func stateFromBase(r *vringtest.Rig, base uint32) (vring.State, error) {
	if r.Ring.Packed {
		return vring.PackedStateFromBase(r.DevCfg, base)
	}
	return vring.SplitStateFromBase(r.DevCfg, base)
}

func TestPackedBase(t *testing.T) {
	const wrap = 1 << 15
	for _, c := range []struct {
		what  string
		size  uint16
		base  uint32
		state vring.State
		says  string // what the error says; empty: none
	}{
		{"new, as QEMU says it", 256, 0x80008000, vring.State{Avail: wrap, Used: wrap}, ""},
		{"new, as DPDK says it", 256, 0x00008000, vring.State{Avail: wrap, Used: wrap}, ""},
		{"upper half left out in the first lap", 256, 0x000080ff, vring.State{Avail: wrap | 255, Used: wrap | 255}, ""},
		{"start of the second lap", 256, 0x00000000, vring.State{}, ""},
		{"second lap, five in flight", 256, 0x00000005, vring.State{Avail: 5}, ""},
		{"in flight across the end of a lap", 256, 0x80fe0001, vring.State{Avail: 1, Used: wrap | 254}, ""},
		{"the same into an odd lap", 256, 0x00fe8001, vring.State{Avail: wrap | 1, Used: 254}, ""},
		{"all in flight", 7, 0x80030003, vring.State{Avail: 3, Used: wrap | 3}, ""},
		{"one more than all", 7, 0x80030004, vring.State{}, "base 0x80030004: 8 descriptors in flight in a queue of 7"},
		{"used ahead", 7, 0x80038002, vring.State{}, "-1 descriptors in flight in a queue of 7"},
		{"available position outside", 7, 0x80008007, vring.State{}, "positions 7 and 0 in a queue of 7"},
		{"used position outside", 7, 0x80078000, vring.State{}, "positions 0 and 7 in a queue of 7"},
		{"no size", 0, 0x80008000, vring.State{}, "in a queue of 0"},
		{"largest", vring.MaxSize, 0xffffffff, vring.State{Avail: 0xffff, Used: 0xffff}, ""},
	} {
		s, err := vring.PackedStateFromBase(vring.Config{Name: "net0 rx0", Size: c.size}, c.base)
		if c.says != "" {
			if !errors.Is(err, vring.ErrState) || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), "net0 rx0") {
				t.Errorf("%s: %+v, %v, want an error that says %q", c.what, s, err, c.says)
			}
			continue
		}
		c.state.Packed = true
		if err != nil || s != c.state {
			t.Errorf("%s: %+v, %v, want %+v", c.what, s, err, c.state)
		}
		if again, err := vring.PackedStateFromBase(vring.Config{Size: c.size}, s.Base()); err != nil || again != s {
			t.Errorf("%s: base %#x gives %+v, %v", c.what, s.Base(), again, err)
		}
		if w := (vring.State{Avail: s.Used, Used: s.Used, Packed: true}); s.Rewound() != w {
			t.Errorf("%s: rewound %+v, want %+v", c.what, s.Rewound(), w)
		}
	}
	// A device side takes what the codec gives, the states of laps with wrap counter 0 too.
	r := vringtest.NewRig(t, vringtest.Params{Ring: vringtest.Packed, Memory: vringtest.Heap}, 8, 4096)
	for _, base := range []uint32{0, 0x8000, 0x80008000, 0x80060001} {
		var err error
		if r.DevCfg.State, err = vring.PackedStateFromBase(r.DevCfg, base); err != nil {
			t.Fatal(err)
		}
		d, err := vring.NewPackedDevice(r.DevCfg)
		if err != nil {
			t.Fatalf("base %#x: %v", base, err)
		}
		if d.State() != r.DevCfg.State {
			t.Errorf("base %#x: state %+v, want %+v", base, d.State(), r.DevCfg.State)
		}
	}
}

// The used index comes out of the ring: a driver may have written anything there.
func TestSplitBase(t *testing.T) {
	for _, m := range vringtest.Memories {
		r := raw{vringtest.NewRig(t, split(m, true, false), 8, 4096)}
		for _, c := range []struct {
			base uint32
			used uint16
			says string
		}{
			{0, 0, ""},
			{8, 0, ""},
			{65535, 65535, ""},
			{3, 65531, ""},
			{9, 0, "base 9 and used index 0 in the ring: 9 chains in flight in a queue of 8"},
			{3, 65530, "9 chains in flight in a queue of 8"},
			{1, 2, "65535 chains in flight in a queue of 8"}, // ahead
			{0, 1, ""}, // of who tells 0 whenever it connects
			{0, 65527, ""},
			{0x10000, 0, "base 0x10000 of a split queue: an index is at most 0xffff"},
		} {
			r.usedIdx(c.used)
			r.usedFlags(0xffff) // not what is asked for
			// What a queue had before does not count, whatever it is.
			r.DevCfg.State = vring.State{Avail: 77, Packed: true}
			s, err := vring.SplitStateFromBase(r.DevCfg, c.base)
			if c.says != "" {
				if !errors.Is(err, vring.ErrState) || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), "test0 q0") {
					t.Errorf("%s: base %d, used %d: %+v, %v, want an error that says %q", m.Name, c.base, c.used, s, err, c.says)
				}
				continue
			}
			want := vring.State{Avail: uint16(c.base), Used: c.used}
			if c.base == 0 {
				want.Avail = c.used
			}
			if err != nil || s != want || s.Base() != uint32(want.Avail) {
				t.Errorf("%s: base %d, used %d: %+v, %v", m.Name, c.base, c.used, s, err)
			}
			r.DevCfg.State = s
			d, err := vring.NewSplitDevice(r.DevCfg)
			if err != nil {
				t.Fatal(err)
			}
			if d.State() != s || r.getUsedIdx() != c.used {
				t.Errorf("%s: state %+v and used index %d, want %+v", m.Name, d.State(), r.getUsedIdx(), s)
			}
		}
	}
}

// Chains that an earlier device side took, and did not complete, are popped again where the state is rewound.
func TestSplitBaseAfterDeath(t *testing.T) {
	r, d := device(t, split(vringtest.Heap, false, false), 8)
	for i := uint16(0); i < 8; i++ {
		r.desc(i, r.Addr(0), uint32(i)+1, 0, 0)
		r.entry(i, i)
	}
	r.availIdx(8)
	var b vring.Batch
	if n, err := d.Pop(&b, 6); n != 6 || err != nil {
		t.Fatal(n, err)
	}
	if err := d.Complete([]vring.Used{{ID: 0}, {ID: 1}}); err != nil {
		t.Fatal(err)
	}
	s, err := vring.SplitStateFromBase(r.DevCfg, 6)
	if err != nil || s != (vring.State{Avail: 6, Used: 2}) {
		t.Fatalf("%+v, %v", s, err)
	}
	r.DevCfg.State = s.Rewound()
	if d, err = vring.NewSplitDevice(r.DevCfg); err != nil {
		t.Fatal(err)
	}
	b = vring.Batch{}
	if n, err := d.Pop(&b, 8); n != 6 || err != nil || b.Chains[0].ID != 2 || b.Chains[5].ID != 7 {
		t.Fatalf("%d, %v, %+v", n, err, b.Chains)
	}
}

// A ring that cannot be read is refused before it is.
func TestSplitBaseConfig(t *testing.T) {
	empty := mmio.NewBusMem(emptyBus{}, 4096, mmio.Uncached) // a read of it panics
	rw := dma.DeviceRead | dma.DeviceWrite
	for what, c := range map[string]vring.Config{
		"no region":    {Size: 8},
		"size":         {Size: 12, Device: dma.Span{Region: &dma.Region{Mem: empty, Access: rw}, Len: 4096}},
		"too short":    {Size: 8, Device: dma.Span{Region: &dma.Region{Mem: empty, Access: rw}, Len: 69}},
		"outside":      {Size: 8, Device: dma.Span{Region: &dma.Region{Mem: empty, Access: rw}, Off: 4096 - 64, Len: 70}},
		"not aligned":  {Size: 8, Device: dma.Span{Region: &dma.Region{Mem: empty, Access: rw}, Off: 2, Len: 70}},
		"not writable": {Size: 8, Device: dma.Span{Region: &dma.Region{Mem: empty, Access: dma.DeviceRead}, Len: 70}},
	} {
		c.Name = "net0 tx0"
		if s, err := vring.SplitStateFromBase(c, 0); !errors.Is(err, vring.ErrConfig) {
			t.Errorf("%s: %+v, %v", what, s, err)
		}
	}
}
