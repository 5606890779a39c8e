package vring_test

import (
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/vring"
	"github.com/boardlink/boardlink/vring/vringtest"
	"pgregory.net/rapid"
)

// Flags of packed descriptors and of event suppression, and the wrap counter beside a position, written down again
// on purpose (virtio 1.2, 2.8).
const (
	pAvail   = 1 << 7
	pUsed    = 1 << 15
	evEnable = 0
	evOff    = 1
	evDesc   = 2
	wrap     = 1 << 15
)

// praw plays the other side of a packed ring by hand.
type praw struct {
	*vringtest.Rig
}

// desc writes a descriptor with the given flags besides those that mark it.
func (r praw) desc(pos uint16, addr dma.Addr, n uint32, id, flags uint16) {
	raw(r).descAt(r.DescOff+16*uint64(pos), addr, n, id, flags) // id and flags stand in the places of flags and next
}

// avail writes a descriptor that is available in a lap with the given wrap counter.
func (r praw) avail(pos uint16, lap bool, addr dma.Addr, n uint32, id, flags uint16) {
	if lap {
		flags |= pAvail
	} else {
		flags |= pUsed
	}
	r.desc(pos, addr, n, id, flags)
}

// used writes a used descriptor; its address stays.
func (r praw) used(pos uint16, lap bool, id uint16, n uint32) {
	flags := uint16(0)
	if lap {
		flags = pAvail | pUsed
	}
	if n > 0 {
		flags |= write
	}
	off := r.DescOff + 16*uint64(pos)
	r.Mem.Store32(off+8, n)
	r.Mem.Store32(off+12, uint32(id)|uint32(flags)<<16)
}

type pdesc struct {
	addr      dma.Addr
	n         uint32
	id, flags uint16
}

func (r praw) get(pos uint16) (d pdesc) {
	w := r.Mem.Load64(r.DescOff + 16*uint64(pos) + 8)
	return pdesc{dma.Addr(r.Mem.Load64(r.DescOff + 16*uint64(pos))), uint32(w), uint16(w >> 32), uint16(w >> 48)}
}

func (r praw) driverEvent(at, flags uint16) { r.Mem.Store32(r.DriverOff, uint32(at)|uint32(flags)<<16) }
func (r praw) deviceEvent(at, flags uint16) { r.Mem.Store32(r.DeviceOff, uint32(at)|uint32(flags)<<16) }
func packed(m vringtest.Memory, event, ind bool) vringtest.Params {
	return vringtest.Params{Ring: vringtest.Packed, Memory: m, EventIdx: event, Indirect: ind}
}

func packedDevice(t testing.TB, p vringtest.Params, n uint16) (praw, *vring.PackedDevice) {
	t.Helper()
	r := praw{vringtest.NewRig(t, p, n, 65536)}
	d, err := vring.NewPackedDevice(r.DevCfg)
	if err != nil {
		t.Fatal(err)
	}
	return r, d
}

func packedDriver(t testing.TB, p vringtest.Params, n uint16) (praw, *vring.PackedDriver) {
	t.Helper()
	r := praw{vringtest.NewRig(t, p, n, 65536)}
	d, err := vring.NewPackedDriver(r.DrvCfg)
	if err != nil {
		t.Fatal(err)
	}
	return r, d
}

// eachPacked runs f over all memories and features of packed rings.
func eachPacked(t *testing.T, f func(t *testing.T, p vringtest.Params)) {
	vringtest.Each(t, vringtest.Packed, f)
}

func TestPackedConfig(t *testing.T) {
	for size, good := range map[uint16]bool{0: false, 1: true, 2: true, 3: true, 255: true, 32767: true, 32768: true, 32769: false, 65535: false} {
		n := size
		if !good {
			n = 8
		}
		r := vringtest.NewRig(t, packed(vringtest.Heap, true, false), n, 4096)
		r.DrvCfg.Size, r.DevCfg.Size = size, size
		_, err := vring.NewPackedDriver(r.DrvCfg)
		if (err == nil) != good || !good && !errors.Is(err, vring.ErrConfig) {
			t.Errorf("driver side of size %d: %v", size, err)
		}
		if _, err = vring.NewPackedDevice(r.DevCfg); (err == nil) != good || !good && !errors.Is(err, vring.ErrConfig) {
			t.Errorf("device side of size %d: %v", size, err)
		}
	}
	for name, tt := range map[string]struct {
		change func(c *vring.Config)
		code   error
		device bool // the device side goes on with chains in flight
	}{
		"desc misaligned":   {func(c *vring.Config) { c.Desc.Off += 8 }, vring.ErrConfig, false},
		"driver misaligned": {func(c *vring.Config) { c.Driver.Off += 2 }, vring.ErrConfig, false},
		"device misaligned": {func(c *vring.Config) { c.Device.Off += 2 }, vring.ErrConfig, false},
		"desc short":        {func(c *vring.Config) { c.Desc.Len-- }, vring.ErrConfig, false},
		"event word short":  {func(c *vring.Config) { c.Driver.Len-- }, vring.ErrConfig, false},
		"desc not writable": {func(c *vring.Config) {
			g := *c.Desc.Region
			g.Access = dma.DeviceRead
			c.Desc.Region = &g
		}, vring.ErrConfig, false},
		"state of a split queue":    {func(c *vring.Config) { c.State = vring.State{Avail: 3, Used: 3} }, vring.ErrState, false},
		"position outside":          {func(c *vring.Config) { c.State = vring.State{Avail: 5, Used: 5, Packed: true} }, vring.ErrState, false},
		"used ahead":                {func(c *vring.Config) { c.State = vring.State{Avail: 2, Used: 3, Packed: true} }, vring.ErrState, false},
		"more in flight than fit":   {func(c *vring.Config) { c.State = vring.State{Avail: 3 | wrap, Used: 2, Packed: true} }, vring.ErrState, false},
		"all in flight":             {func(c *vring.Config) { c.State = vring.State{Avail: 3 | wrap, Used: 3, Packed: true} }, vring.ErrState, true},
		"some in flight":            {func(c *vring.Config) { c.State = vring.State{Avail: 1, Used: 3 | wrap, Packed: true} }, vring.ErrState, true},
		"nothing in flight, lap 2 ": {func(c *vring.Config) { c.State = vring.State{Packed: true} }, nil, true},
	} {
		r := vringtest.NewRig(t, packed(vringtest.Heap, true, false), 5, 4096)
		tt.change(&r.DrvCfg)
		r.DevCfg.Desc.Region.Access = r.DrvCfg.Desc.Region.Access
		tt.change(&r.DevCfg)
		if _, err := vring.NewPackedDriver(r.DrvCfg); !errors.Is(err, tt.code) {
			t.Errorf("%s: driver side: %v", name, err)
		}
		want := tt.code
		if tt.device {
			want = nil
		}
		d, err := vring.NewPackedDevice(r.DevCfg)
		if !errors.Is(err, want) {
			t.Errorf("%s: device side: %v", name, err)
		} else if err == nil && d.State() != r.DevCfg.State {
			t.Errorf("%s: state %+v", name, d.State())
		}
	}
	// A split queue refuses the state of a packed one, and the descriptor area of a split one may be read-only.
	r := vringtest.NewRig(t, split(vringtest.Heap, true, false), 4, 4096)
	r.DevCfg.State = vring.State{Packed: true}
	if _, err := vring.NewSplitDevice(r.DevCfg); !errors.Is(err, vring.ErrState) {
		t.Error(err)
	}
}

func unhexBytes(t *testing.T, text string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(text, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// The byte images of a packed ring, written down by hand (virtio 1.2, 2.8.8): each side is held against them alone.
func TestPackedBytes(t *testing.T) {
	eachPacked(t, func(t *testing.T, p vringtest.Params) {
		// Driver side: a lap and a half of a queue of three.
		r := praw{vringtest.NewRig(t, p, 3, 65536)}
		dirt := make([]byte, r.Payload)
		for i := range dirt {
			dirt[i] = 0xa5
		}
		r.Mem.CopyIn(0, dirt)
		drv, err := vring.NewPackedDriver(r.DrvCfg)
		if err != nil {
			t.Fatal(err)
		}
		bytes := func(off uint64, n int) string {
			b := make([]byte, n)
			r.Mem.CopyOut(b, off)
			return hex.EncodeToString(b)
		}
		if got := bytes(r.DescOff, 48) + bytes(r.DriverOff, 4) + bytes(r.DeviceOff, 4); strings.Trim(got, "0") != "" {
			t.Fatalf("at start: %s", got)
		}
		one := func(token uint32, a dma.Addr, n uint32, readable int) vring.Request {
			return vring.Request{Token: token, Readable: readable, Bufs: []vring.Buffer{{Addr: a, Len: n}}}
		}
		add := func(reqs ...vring.Request) {
			t.Helper()
			if n, err := drv.Add(reqs); n != len(reqs) || err != nil {
				t.Fatal(n, err)
			}
		}
		add(one(1, 0x1122334455667788, 0x01020304, 1), one(2, 0x99aabbccddeeff01, 0x0a0b0c0d, 0))
		// Lap 1: AVAIL set, USED not; ids count up.
		want := "8877665544332211 04030201 0000 8000" + "01ffeeddccbbaa99 0d0c0b0a 0100 8200" + "0000000000000000 00000000 0000 0000"
		if got := bytes(r.DescOff, 48); got != strings.ReplaceAll(want, " ", "") {
			t.Errorf("%s, want %s", got, want)
		}
		r.used(0, true, 0, 0)
		r.used(1, true, 1, 0x0a0b)
		done := make([]vring.Completion, 4)
		if n, err := drv.Reap(done); n != 2 || err != nil || done[0] != (vring.Completion{Token: 1}) || done[1] != (vring.Completion{Token: 2, Len: 0x0a0b}) {
			t.Fatal(n, err, done[:2])
		}
		// A list of two over the end of the ring: the wrap counter flips inside it, the id is that of the last.
		q := one(3, 0x100, 7, 1)
		q.Bufs = append(q.Bufs, vring.Buffer{Addr: 0x200, Len: 9})
		add(q)
		if p.Indirect {
			d := r.get(2)
			if d.n != 32 || d.flags != indirect|pAvail || d.addr != r.IndirectAddr(d.id) {
				t.Errorf("%+v", d)
			}
			tab := "0001000000000000 07000000 0000 0000 0002000000000000 09000000 0000 0200"
			if got := bytes(r.IndirectOff+uint64(d.id)*uint64(r.DrvCfg.IndirectMax)*16, 32); got != strings.ReplaceAll(tab, " ", "") {
				t.Errorf("table %s, want %s", got, tab)
			}
		} else {
			d2, d0 := r.get(2), r.get(0)
			if d2.flags != next|pAvail || d2.addr != 0x100 || d2.n != 7 || d0.flags != write|pUsed || d0.addr != 0x200 || d0.n != 9 || d0.id != d2.id {
				t.Errorf("%+v, %+v", d2, d0)
			}
		}
		if pending, err := drv.ArmCall(); pending || err != nil {
			t.Fatal(pending, err)
		}
		ev := "0000 0000"
		if p.EventIdx {
			ev = "0280 0200" // position 2, wrap counter 1; descriptor
		}
		if got := bytes(r.DriverOff, 4); got != strings.ReplaceAll(ev, " ", "") {
			t.Errorf("driver event %s, want %s", got, ev)
		}
		drv.DisarmCall()
		if got := bytes(r.DriverOff, 4); got != "00000100" {
			t.Errorf("driver event %s", got)
		}

		// Device side: descriptors by bytes.
		r = praw{vringtest.NewRig(t, p, 3, 65536)}
		r.Mem.CopyIn(r.DescOff, unhexBytes(t, "0000 0040 0800 0000 04030000 0200 8000"+"0100 0040 0800 0000 05030000 0100 8200"))
		dev, err := vring.NewPackedDevice(r.DevCfg)
		if err != nil {
			t.Fatal(err)
		}
		var b vring.Batch
		if n, err := dev.Pop(&b, 8); n != 2 || err != nil {
			t.Fatal(n, err)
		}
		c0 := vring.Chain{ID: 2, Count: 1, Readable: 1, ReadLen: 0x304}
		c1 := vring.Chain{ID: 1, Count: 1, First: 1, Writable: 1, WriteLen: 0x305}
		if b.Chains[0] != c0 || b.Chains[1] != c1 || b.Spans[0].Addr() != 0x8_4000_0000 || b.Spans[1].Addr() != 0x8_4000_0001 {
			t.Errorf("%+v, %+v", b.Chains, b.Spans)
		}
		used := []vring.Used{{ID: 2, Count: 1}, {ID: 1, Count: 1, Len: 0x203}}
		want = "0000004008000000 00000000 0200 8080" + "0100004008000000 03020000 0100 8280"
		if p.InOrder { // the first is skipped
			want = "0000004008000000 03020000 0100 8280" + "0100004008000000 05030000 0100 8200"
		}
		if err := dev.Complete(used); err != nil {
			t.Fatal(err)
		}
		if got := bytes(r.DescOff, 32); got != strings.ReplaceAll(want, " ", "") {
			t.Errorf("%s, want %s", got, want)
		}
		if pending, err := dev.ArmKick(); pending || err != nil {
			t.Fatal(pending, err)
		}
		if got := bytes(r.DeviceOff, 4); got != strings.ReplaceAll(ev, " ", "") {
			t.Errorf("device event %s, want %s", got, ev)
		}
		dev.DisarmKick()
		if got := bytes(r.DeviceOff, 4); got != "00000100" {
			t.Errorf("device event %s", got)
		}
	})
}

// Lists over the end of the ring, and lists of exactly the ring's size, lap after lap.
func TestPackedWrap(t *testing.T) {
	for _, size := range []uint16{1, 2, 3, 5, 8} {
		for list := uint16(1); list <= size; list++ {
			for _, m := range []vringtest.Memory{vringtest.Memories[1], vringtest.Memories[3]} {
				r, d := packedDevice(t, packed(m, true, false), size)
				pos, lap := uint16(0), true
				state := func() uint16 {
					if lap {
						return pos | wrap
					}
					return pos
				}
				for i := 0; i < 20; i++ {
					start, startLap := pos, lap
					for k := uint16(0); k < list; k++ {
						flags := uint16(next)
						if k == list-1 {
							flags = 0
						}
						r.avail(pos, lap, r.Addr(uint64(pos)*8), uint32(k)+1, 0, flags)
						if pos++; pos == size {
							pos, lap = 0, !lap
						}
					}
					var b vring.Batch
					if n, err := d.Pop(&b, 8); n != 1 || err != nil || b.Chains[0].Count != list || b.Chains[0].Readable != list || d.State().Avail != state() {
						t.Fatalf("size %d, list %d, round %d: %d, %v, %+v, %+v", size, list, i, n, err, b.Chains, d.State())
					}
					if n, err := d.Pop(&b, 8); n != 0 || err != nil {
						t.Fatal(n, err)
					}
					if err := d.Complete([]vring.Used{{Count: list}}); err != nil {
						t.Fatal(err)
					}
					flags := uint16(0)
					if startLap {
						flags = pAvail | pUsed
					}
					if got := r.get(start); got.flags != flags || d.State().Used != state() {
						t.Fatalf("size %d, list %d, round %d: used descriptor %+v, %+v", size, list, i, got, d.State())
					}
				}
			}
		}
	}
}

// What a driver side may do wrong, and what the device side says to it.
func TestPackedDeviceErrors(t *testing.T) {
	type errcase struct {
		name   string
		set    func(r praw)
		code   error
		popped int // good chains before
	}
	for _, tt := range []errcase{
		{"id out of range", func(r praw) { r.avail(0, true, r.Addr(0), 1, 4, 0) }, vring.ErrIDRange, 0},
		{"id 65535", func(r praw) { r.avail(0, true, r.Addr(0), 1, 65535, 0) }, vring.ErrIDRange, 0},
		{"id twice", func(r praw) { r.avail(0, true, r.Addr(0), 1, 2, 0); r.avail(1, true, r.Addr(0), 1, 2, 0) }, vring.ErrIDInFlight, 1},
		{"id out of range behind a list", func(r praw) {
			r.avail(0, true, r.Addr(0), 1, 0, next)
			r.avail(1, true, r.Addr(0), 1, 99, 0)
		}, vring.ErrIDRange, 0},
		{"list without end", func(r praw) {
			for i := uint16(0); i < 4; i++ {
				r.avail(i, true, r.Addr(0), 1, 0, next)
			}
		}, vring.ErrLoop, 0},
		{"list into the next lap", func(r praw) {
			r.avail(0, true, r.Addr(0), 1, 0, 0)
			for i := uint16(1); i < 4; i++ {
				r.avail(i, true, r.Addr(0), 1, 1, next)
			}
		}, vring.ErrLoop, 1},
		{"list cut off", func(r praw) {
			r.avail(0, true, r.Addr(0), 1, 0, next)
			r.avail(1, false, r.Addr(0), 1, 0, 0)
		}, vring.ErrUnavailable, 0},
		{"writable before readable", func(r praw) {
			r.avail(0, true, r.Addr(0), 1, 0, next|write)
			r.avail(1, true, r.Addr(0), 1, 0, 0)
		}, vring.ErrOrder, 0},
		{"zero length", func(r praw) { r.avail(0, true, r.Addr(0), 0, 0, 0) }, vring.ErrZeroLength, 0},
		{"overflow", func(r praw) { r.avail(0, true, ^dma.Addr(0), 2, 0, 0) }, vring.ErrOverflow, 0},
		{"hole", func(r praw) { r.avail(0, true, 0, 2, 0, 0) }, vring.ErrTranslate, 0},
		{"more than 4 GiB", func(r praw) {
			r.avail(0, true, r.Addr(0), 1, 0, next)
			r.avail(1, true, r.Addr(0), 1<<32-1, 0, 0)
		}, vring.ErrTranslate, 0},
		{"indirect table of no multiple", func(r praw) { r.avail(0, true, r.Addr(0), 17, 0, indirect) }, vring.ErrIndirectLen, 0},
		{"indirect table of nothing", func(r praw) { r.avail(0, true, r.Addr(0), 0, 0, indirect) }, vring.ErrIndirectLen, 0},
		{"indirect table longer than the queue", func(r praw) { r.avail(0, true, r.Addr(0), 80, 0, indirect) }, vring.ErrIndirectLen, 0},
		{"indirect and next", func(r praw) { r.avail(0, true, r.Addr(0), 16, 0, indirect|next) }, vring.ErrIndirectNext, 0},
		{"indirect behind direct", func(r praw) {
			r.avail(0, true, r.Addr(0), 1, 0, next)
			r.avail(1, true, r.Addr(0), 16, 0, indirect)
		}, vring.ErrIndirectNext, 0},
		{"indirect table in a hole", func(r praw) { r.avail(0, true, 64, 16, 0, indirect) }, vring.ErrTranslate, 0},
	} {
		for _, m := range vringtest.Memories {
			r, d := packedDevice(t, packed(m, true, true), 4)
			tt.set(r)
			var b vring.Batch
			n, err := d.Pop(&b, 8)
			var e *vring.Error
			if n != tt.popped || len(b.Chains) != n || !errors.Is(err, tt.code) || !errors.As(err, &e) || e.Queue == "" {
				t.Errorf("%s, %s: %d, %v", tt.name, m.Name, n, err)
				continue
			}
			if !strings.Contains(err.Error(), "test0 q0") || d.Broken() != err || d.Stats().Load().Errors != 1 {
				t.Errorf("%s: %v", tt.name, err)
			}
			// Reported once more to whoever asks, and parked.
			if n, err2 := d.Pop(&b, 8); n != 0 || err2 != err {
				t.Errorf("%s: then %d, %v", tt.name, n, err2)
			}
			if err2 := d.Complete([]vring.Used{{ID: 2, Count: 1}}); err2 != err {
				t.Errorf("%s: then %v", tt.name, err2)
			}
			if _, err2 := d.ArmKick(); err2 != err || d.NeedCall() {
				t.Errorf("%s: then %v", tt.name, err2)
			}
		}
	}
	r, d := packedDevice(t, packed(vringtest.Heap, true, false), 4)
	r.avail(0, true, r.Addr(0), 16, 0, indirect)
	if _, err := d.Pop(&vring.Batch{}, 1); !errors.Is(err, vring.ErrIndirectNotNegotiated) {
		t.Error(err)
	}
}

// A slot that is made available again before the device has used it: by Pop, and by ArmKick.
func TestPackedRestamp(t *testing.T) {
	for _, arm := range []bool{false, true} {
		for _, m := range vringtest.Memories {
			r, d := packedDevice(t, packed(m, true, false), 3)
			for i := uint16(0); i < 3; i++ {
				r.avail(i, true, r.Addr(0), 1, i, 0)
			}
			var b vring.Batch
			if n, err := d.Pop(&b, 9); n != 3 || err != nil {
				t.Fatal(n, err)
			}
			if n, err := d.Pop(&b, 9); n != 0 || err != nil {
				t.Fatal(n, err)
			}
			if pending, err := d.ArmKick(); pending || err != nil {
				t.Fatal(pending, err)
			}
			r.avail(0, false, r.Addr(0), 1, 0, 0)
			var err error
			if arm {
				_, err = d.ArmKick()
			} else {
				_, err = d.Pop(&b, 9)
			}
			if !errors.Is(err, vring.ErrRestamp) {
				t.Errorf("%s: %v", m.Name, err)
			}
		}
	}
}

// An indirect table is taken whole, in order, whatever its flags and next say but WRITE (2.8.7).
func TestPackedIndirectIgnoresNext(t *testing.T) {
	for _, m := range vringtest.Memories {
		r, d := packedDevice(t, packed(m, false, true), 4)
		for i := uint64(0); i < 4; i++ {
			flags := uint16([]int{next, indirect | 0x7ff8, next | write, write | indirect}[i])
			raw(r).descAt(r.Payload+4096+16*i, r.Addr(100*i), uint32(i)+1, 0xeeee, flags)
		}
		r.avail(0, true, r.Addr(4096), 64, 3, indirect|write)
		var b vring.Batch
		want := vring.Chain{ID: 3, Count: 1, Readable: 2, Writable: 2, ReadLen: 3, WriteLen: 7}
		if n, err := d.Pop(&b, 1); n != 1 || err != nil || b.Chains[0] != want {
			t.Fatalf("%s: %d, %v, %+v", m.Name, n, err, b.Chains)
		}
		for i, s := range b.Spans {
			if s.Addr() != r.Addr(uint64(100*i)) {
				t.Errorf("span %d at %#x", i, s.Addr())
			}
		}
	}
}

// What the device may do wrong.
func TestPackedDriverErrors(t *testing.T) {
	for _, inOrder := range []bool{false, true} {
		for name, tt := range map[string]struct {
			set  func(r praw, id func(int) uint16)
			code error
			n    int
		}{
			"id out of range":        {func(r praw, id func(int) uint16) { r.used(0, true, 4, 0) }, vring.ErrUsedID, 0},
			"id not in flight":       {func(r praw, id func(int) uint16) { r.used(0, true, id(2), 0) }, vring.ErrUsedID, 0},
			"too long":               {func(r praw, id func(int) uint16) { r.used(0, true, id(0), 11) }, vring.ErrUsedLen, 0},
			"written where readable": {func(r praw, id func(int) uint16) { r.used(0, true, id(1), 1) }, vring.ErrUsedLen, 0},
			"id twice": {func(r praw, id func(int) uint16) {
				r.used(0, true, id(0), 10)
				r.used(1, true, id(0), 10)
			}, vring.ErrUsedID, 1},
		} {
			for _, m := range vringtest.Memories {
				p := packed(m, true, false)
				p.InOrder = inOrder
				r, d := packedDriver(t, p, 4)
				reqs := []vring.Request{request(raw(r), 1, 0, 10), request(raw(r), 2, 1, 10)}
				if n, err := d.Add(reqs); n != 2 || err != nil {
					t.Fatal(n, err)
				}
				ids := []uint16{r.get(0).id, r.get(1).id, 2}
				tt.set(r, func(i int) uint16 { return ids[i] })
				n, err := d.Reap(make([]vring.Completion, 8))
				if n != tt.n || !errors.Is(err, tt.code) || !strings.Contains(err.Error(), "test0 q0") {
					t.Errorf("%s, %s, in order %v: %d, %v", name, m.Name, inOrder, n, err)
					continue
				}
				if n, err2 := d.Reap(make([]vring.Completion, 8)); n != 0 || err2 != err {
					t.Errorf("%s: then %d, %v", name, n, err2)
				}
				if n, err2 := d.Add(reqs); n != 0 || err2 != err || d.NeedKick() {
					t.Errorf("%s: then %d, %v", name, n, err2)
				}
				if _, err2 := d.ArmCall(); err2 != err {
					t.Errorf("%s: then %v", name, err2)
				}
			}
		}
	}
}

// The length of a used descriptor without WRITE is reserved (2.8.4).
func TestPackedReservedLength(t *testing.T) {
	r, d := packedDriver(t, packed(vringtest.Heap, true, false), 4)
	if n, err := d.Add([]vring.Request{request(raw(r), 1, 0, 10)}); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	r.Mem.Store32(r.DescOff+8, 0xffffffff)
	r.Mem.Store32(r.DescOff+12, uint32(r.get(0).id)|(pAvail|pUsed)<<16)
	done := make([]vring.Completion, 1)
	if n, err := d.Reap(done); n != 1 || err != nil || done[0].Len != 0 {
		t.Error(n, err, done)
	}
}

// What cannot be completed is refused, and nothing of the batch is published, nor taken.
func TestPackedComplete(t *testing.T) {
	for _, inOrder := range []bool{false, true} {
		for _, m := range vringtest.Memories {
			p := packed(m, true, false)
			p.InOrder = inOrder
			r, d := packedDevice(t, p, 4)
			r.avail(0, true, r.Addr(0), 1, 3, next)
			r.avail(1, true, r.Addr(0), 1, 3, 0)
			r.avail(2, true, r.Addr(0), 1, 1, 0)
			var b vring.Batch
			if n, err := d.Pop(&b, 4); n != 2 || err != nil {
				t.Fatal(n, err)
			}
			before, state := r.get(0), d.State()
			bad := [][]vring.Used{{{ID: 0, Count: 1}}, {{ID: 4, Count: 1}}, {{ID: 65535, Count: 1}}, {{ID: 3, Count: 1}}, {{ID: 3, Count: 3}}, {{ID: 3}},
				{{ID: 3, Count: 2}, {ID: 3, Count: 2}}, {{ID: 3, Count: 2}, {ID: 1, Count: 1}, {ID: 1, Count: 1}}, {{ID: 3, Count: 2}, {ID: 2, Count: 1}}}
			if inOrder {
				bad = append(bad, []vring.Used{{ID: 1, Count: 1}, {ID: 3, Count: 2}})
			}
			for _, u := range bad {
				if err := d.Complete(u); !errors.Is(err, vring.ErrComplete) || d.Broken() != nil {
					t.Errorf("%s: Complete(%v) = %v", m.Name, u, err)
				}
				if r.get(0) != before || d.State() != state {
					t.Fatalf("%s: Complete(%v) left %+v, %+v", m.Name, u, r.get(0), d.State())
				}
			}
			if err := d.Complete(nil); err != nil {
				t.Error(err)
			}
			good := []vring.Used{{ID: 1, Count: 1}, {ID: 3, Count: 2}}
			if inOrder {
				good[0], good[1] = good[1], good[0]
			}
			if err := d.Complete(good); err != nil {
				t.Fatal(err)
			}
			if err := d.Complete(good); !errors.Is(err, vring.ErrComplete) {
				t.Error(err)
			}
		}
	}
}

// In order: the driver side takes one used element for all chains before it, in laps that cross the end, with less
// room than they need.
func TestInOrderRuns(t *testing.T) {
	for _, ring := range rings {
		for _, m := range vringtest.Memories {
			p := vringtest.Params{Ring: ring, Memory: m, EventIdx: true, InOrder: true}
			r := vringtest.NewRig(t, p, 8, 65536)
			drv, dev := r.Pair(t)
			var b vring.Batch
			done := make([]vring.Completion, 2)
			for round := uint32(0); round < 30; round++ {
				var reqs []vring.Request
				for i := uint32(0); i < 5; i++ {
					reqs = append(reqs, request(raw{r}, i, int(i%2), 10+i))
				}
				if n, err := drv.Add(reqs); n != 5 || err != nil {
					t.Fatal(n, err)
				}
				b.Chains, b.Spans = b.Chains[:0], b.Spans[:0]
				if n, err := dev.Pop(&b, 8); n != 5 || err != nil {
					t.Fatal(n, err)
				}
				var used []vring.Used
				for i, c := range b.Chains {
					u := vring.Used{ID: c.ID, Count: c.Count, Len: c.WriteLen}
					if i == 2 {
						u.Len-- // not filled: it cannot be skipped
					}
					used = append(used, u)
				}
				if err := dev.Complete(used); err != nil {
					t.Fatal(err)
				}
				if pending, err := drv.(interface {
					ArmCallAfter(int) (bool, error)
				}).ArmCallAfter(5); !pending || err != nil {
					t.Fatalf("%s, %s: ArmCallAfter with 5 used = %v, %v", ring.Name, m.Name, pending, err)
				}
				for i := uint32(0); i < 5; {
					n, err := drv.Reap(done)
					if n == 0 || err != nil {
						t.Fatalf("%s, %s, round %d: %d of 5, %v", ring.Name, m.Name, round, i, err)
					}
					for _, c := range done[:n] {
						want := vring.Completion{Token: i}
						if i%2 == 0 {
							want.Len = 10 + i
						}
						if i == 2 {
							want.Len--
						}
						if c != want {
							t.Fatalf("%s, %s, round %d: %+v, want %+v", ring.Name, m.Name, round, c, want)
						}
						i++
					}
				}
				if n, err := drv.Reap(done); n != 0 || err != nil {
					t.Fatal(n, err)
				}
			}
		}
	}
}

// TestInOrderWrites: a batch that was read only costs one used element.
func TestInOrderWrites(t *testing.T) {
	for _, ring := range rings {
		bus := vringtest.NewBus(1 << 20)
		m := vringtest.Memory{Name: "counting", Across: true, New: busMemory(bus)}
		r := vringtest.NewRig(t, vringtest.Params{Ring: ring, Memory: m, EventIdx: true, InOrder: true}, 64, 65536)
		drv, dev := r.Pair(t)
		reqs := requests(r, 32, 1)
		for i := range reqs {
			reqs[i].Readable = 1
		}
		if n, err := drv.Add(reqs); n != 32 || err != nil {
			t.Fatal(n, err)
		}
		var b vring.Batch
		if n, err := dev.Pop(&b, 32); n != 32 || err != nil {
			t.Fatal(n, err)
		}
		var used []vring.Used
		for _, c := range b.Chains {
			used = append(used, vring.Used{ID: c.ID, Count: c.Count})
		}
		before := bus.Writes
		if err := dev.Complete(used); err != nil {
			t.Fatal(err)
		}
		if n := bus.Writes - before; n > 3 {
			t.Errorf("%s: %d bus writes for a batch of 32", ring.Name, n)
		}
		done := make([]vring.Completion, 64)
		if n, err := drv.Reap(done); n != 32 || err != nil {
			t.Error(n, err)
		}
	}
}

// A split used element that names a chain which the used index does not reach.
func TestSplitInOrderNotDue(t *testing.T) {
	r := raw{vringtest.NewRig(t, vringtest.Params{Ring: vringtest.Split, Memory: vringtest.Heap, InOrder: true}, 8, 65536)}
	d, err := vring.NewSplitDriver(r.DrvCfg)
	if err != nil {
		t.Fatal(err)
	}
	if n, err := d.Add(requests(r.Rig, 4, 1)); n != 4 || err != nil {
		t.Fatal(n, err)
	}
	r.used(0, 2, 0)
	r.usedIdx(2)
	if n, err := d.Reap(make([]vring.Completion, 8)); n != 0 || !errors.Is(err, vring.ErrUsedOrder) {
		t.Error(n, err)
	}
}

// needsEvent is the definition: of the descriptors made available, or used, one is that of the event.
func needsEvent(size, from int, fromLap bool, n int, at uint16) bool {
	for i := 0; i < n; i++ {
		w := uint16(from)
		if fromLap {
			w |= wrap
		}
		if w == at {
			return true
		}
		if from++; from == size {
			from, fromLap = 0, !fromLap
		}
	}
	return false
}

// Event suppression, exhaustive over small queues: each position, each number of descriptors, each event.
func TestPackedEvents(t *testing.T) {
	for size := uint16(1); size <= 5; size++ {
		for start := uint16(0); start < 2*size; start++ {
			for n := uint16(1); n <= size; n++ {
				for at := uint16(0); at <= 2*size; at++ {
					lap, pos := start < size, start%size
					ev := at % size
					if at < size {
						ev |= wrap
					}
					want := needsEvent(int(size), int(pos), lap, int(n), ev)
					bad := at == 2*size
					if bad { // no descriptor of the queue: notified, and counted
						ev, want = size, true
					}
					r := praw{vringtest.NewRig(t, packed(vringtest.Heap, true, false), size, 4096)}
					r.DrvCfg.State = vringtest.Packed.Start(size, start)
					drv, err := vring.NewPackedDriver(r.DrvCfg)
					if err != nil {
						t.Fatal(err)
					}
					if start > 0 { // after a restart the first batch notifies: let it pass
						continueFrom(t, r, drv)
						pos, lap = (pos+1)%size, lap != (pos+1 == size)
						if !bad {
							want = needsEvent(int(size), int(pos), lap, int(n), ev)
						}
					}
					r.deviceEvent(ev, evDesc)
					if got, err := drv.Add(requests(r.Rig, int(n), 1)); got != int(n) || err != nil {
						t.Fatal(got, err)
					}
					if got := drv.NeedKick(); got != want {
						t.Fatalf("size %d: %d made available from %d (%v), event %#x: kick %v", size, n, pos, lap, ev, got)
					}
					if (drv.Stats().Load().Errors == 1) != bad {
						t.Fatalf("%d errors counted", drv.Stats().Load().Errors)
					}
					if drv.NeedKick() {
						t.Fatal("kicks again")
					}
				}
			}
		}
	}
}

// continueFrom passes one chain through a driver side.
func continueFrom(t *testing.T, r praw, drv *vring.PackedDriver) {
	t.Helper()
	s := drv.State()
	pos, lap := s.Avail&^wrap, s.Avail&wrap != 0
	if n, err := drv.Add(requests(r.Rig, 1, 1)); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	r.deviceEvent(0, evEnable)
	if !drv.NeedKick() {
		t.Fatal("does not kick although enabled")
	}
	r.used(pos, lap, r.get(pos).id, 0)
	if n, err := drv.Reap(make([]vring.Completion, 1)); n != 1 || err != nil {
		t.Fatal(n, err)
	}
}

// Flags of event suppression, on both sides; an event inside a chain of several descriptors counts.
func TestPackedEventFlags(t *testing.T) {
	eachPacked(t, func(t *testing.T, p vringtest.Params) {
		for _, tt := range []struct {
			at, flags uint16
			kick      bool
			errors    uint64
		}{{0, evEnable, true, 0}, {0, evOff, false, 0}, {0xffff, evOff, false, 0}, {0, 3, true, 1}, {0, evOff | 0xfff0, false, 0}} {
			r := praw{vringtest.NewRig(t, p, 8, 65536)}
			drv, dev := r.Pair(t)
			r.deviceEvent(tt.at, tt.flags)
			if n, err := drv.Add(requests(r.Rig, 2, 1)); n != 2 || err != nil {
				t.Fatal(n, err)
			}
			if got := drv.NeedKick(); got != tt.kick || drv.Stats().Load().Errors != tt.errors {
				t.Errorf("flags %#x: kick %v, %+v", tt.flags, got, drv.Stats().Load())
			}
			var b vring.Batch
			if n, err := dev.Pop(&b, 8); n != 2 || err != nil {
				t.Fatal(n, err)
			}
			if err := dev.Complete([]vring.Used{{ID: b.Chains[0].ID, Count: 1}, {ID: b.Chains[1].ID, Count: 1}}); err != nil {
				t.Fatal(err)
			}
			r.driverEvent(tt.at, tt.flags)
			if got := dev.NeedCall(); got != tt.kick || dev.Stats().Load().Errors != tt.errors {
				t.Errorf("flags %#x: call %v, %+v", tt.flags, got, dev.Stats().Load())
			}
		}
		// The event inside a chain that is completed by one used descriptor at its start; one with
		// DESC where the event index was not negotiated.
		for at := uint16(0); at < 8; at++ {
			q := p
			q.Indirect = false
			r, d := packedDevice(t, q, 8)
			for i := uint16(0); i < 4; i++ {
				r.avail(i, true, r.Addr(0), 1, 0, uint16([]int{next, next, next, 0}[i]))
			}
			var b vring.Batch
			if n, err := d.Pop(&b, 8); n != 1 || err != nil {
				t.Fatal(n, err)
			}
			if err := d.Complete([]vring.Used{{Count: 4}}); err != nil {
				t.Fatal(err)
			}
			r.driverEvent(at|wrap, evDesc)
			if got, want := d.NeedCall(), at < 4 || !p.EventIdx; got != want {
				t.Errorf("event at %d of a chain of 4: call %v", at, got)
			}
		}
	})
}

// Completed in another order than popped, ids used again at once, by the property that all come back once.
func TestPackedOutOfOrder(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		size := rapid.Uint16Range(1, 9).Draw(rt, "size")
		p := packed(vringtest.Memories[rapid.IntRange(0, len(vringtest.Memories)-1).Draw(rt, "memory")], true, false)
		r := vringtest.NewRig(t, p, size, 65536)
		drv, dev := r.Pair(t)
		held := []vring.Chain{}
		token, flying := uint32(0), map[uint32]bool{}
		for i := 0; i < 60; i++ {
			k := rapid.IntRange(1, min(4, int(size))).Draw(rt, "buffers")
			q := request(raw{r}, token, 1, make([]uint32, k)...)
			for j := range q.Bufs {
				q.Bufs[j].Addr, q.Bufs[j].Len = r.Addr(uint64(token%1000)), 1
			}
			if n, err := drv.Add([]vring.Request{q}); err != nil {
				rt.Fatal(err)
			} else if n == 1 {
				flying[token] = true
				token++
			}
			var b vring.Batch
			if _, err := dev.Pop(&b, 4); err != nil {
				rt.Fatal(err)
			}
			held = append(held, b.Chains...)
			if len(held) > 0 && rapid.Bool().Draw(rt, "complete") {
				j := rapid.IntRange(0, len(held)-1).Draw(rt, "which")
				if err := dev.Complete([]vring.Used{{ID: held[j].ID, Count: held[j].Count}}); err != nil {
					rt.Fatal(err)
				}
				held = append(held[:j], held[j+1:]...)
			}
			done := make([]vring.Completion, 4)
			n, err := drv.Reap(done)
			if err != nil {
				rt.Fatal(err)
			}
			for _, c := range done[:n] {
				if !flying[c.Token] {
					rt.Fatalf("token %d came back twice", c.Token)
				}
				delete(flying, c.Token)
			}
		}
		if len(flying) != len(held) {
			rt.Fatalf("%d in flight, %d held", len(flying), len(held))
		}
	})
}

// stepper is a bus whose every store is followed by a look of the other side.
type stepper struct {
	*vringtest.Bus
	look func()
}

func (s *stepper) Store(off uint64, width uint, v uint64) {
	s.Bus.Store(off, width, v)
	if s.look != nil {
		f := s.look
		s.look = nil // it stores too
		f()
		s.look = f
	}
}

// TestTornPublish: after each single store of one side, the other one looks: it sees a chain whole, or
// not at all.
func TestTornPublish(t *testing.T) {
	for _, ring := range rings {
		for i := 0; i < 8; i++ {
			p := vringtest.Params{Ring: ring, EventIdx: i&1 != 0, Indirect: i&2 != 0, InOrder: i&4 != 0}
			t.Run(p.String(), func(t *testing.T) {
				bus := vringtest.NewBus(1 << 18)
				drvBus, devBus := &stepper{Bus: bus}, &stepper{Bus: bus}
				mem := func(b mmio.Bus) mmio.Mem { return mmio.NewBusMem(b, 1<<18, mmio.Uncached) }
				p.Memory = vringtest.Memory{Name: "step", New: func(testing.TB, int) mmio.Mem { return mem(drvBus) }}
				size := uint16(8)
				if ring.Packed {
					size = 7
				}
				r := vringtest.NewRig(t, p, size, 65536)
				r.Over(t, mem(drvBus), mem(devBus))
				drv, dev := r.Pair(t)
				want := func(tok uint32) (dma.Addr, uint32) { return r.Addr(uint64(tok) % 999 * 16), tok%14 + 1 }
				var popped, reaped uint32
				var held []vring.Chain
				drvBus.look = func() {
					var b vring.Batch
					if _, err := dev.Pop(&b, 8); err != nil {
						t.Fatal(err)
					}
					for _, c := range b.Chains {
						k := int(popped%3) + 1
						if int(c.Readable) != k {
							t.Fatalf("chain %d: %+v", popped, c)
						}
						for j := 0; j < k; j++ {
							a, n := want(popped + uint32(j))
							if s := b.Spans[int(c.First)+j]; s.Addr() != a || s.Len != n {
								t.Fatalf("chain %d, buffer %d: %#x + %d, want %#x + %d", popped, j, s.Addr(), s.Len, a, n)
							}
						}
						popped++
						held = append(held, c)
					}
				}
				devBus.look = func() {
					done := make([]vring.Completion, 8)
					n, err := drv.Reap(done)
					if err != nil {
						t.Fatal(err)
					}
					for _, c := range done[:n] {
						if c.Token != reaped {
							t.Fatalf("token %d, want %d", c.Token, reaped)
						}
						reaped++
					}
				}
				added := uint32(0)
				for round := 0; round < 200; round++ {
					var reqs []vring.Request
					for j := uint32(0); j < 4; j++ {
						tok := added + j
						q := vring.Request{Token: tok, Readable: int(tok%3) + 1}
						for k := 0; k < q.Readable; k++ {
							a, n := want(tok + uint32(k))
							q.Bufs = append(q.Bufs, vring.Buffer{Addr: a, Len: n})
						}
						reqs = append(reqs, q)
					}
					n, err := drv.Add(reqs)
					if err != nil {
						t.Fatal(err)
					}
					added += uint32(n)
					if popped != added {
						t.Fatalf("%d of %d popped", popped, added)
					}
					var used []vring.Used
					for _, c := range held {
						used = append(used, vring.Used{ID: c.ID, Count: c.Count})
					}
					held = held[:0]
					if err := dev.Complete(used); err != nil {
						t.Fatal(err)
					}
					if reaped != added {
						t.Fatalf("%d of %d reaped", reaped, added)
					}
				}
			})
		}
	}
}

// packedRecorder names what a packed ring accesses.
type packedRecorder struct {
	*recorder
}

func (b packedRecorder) name(off uint64, width uint) string {
	r := b.r
	switch {
	case off >= r.DescOff && off < r.DescOff+16*uint64(r.Size):
		i := (off - r.DescOff) / 16
		switch (off-r.DescOff)%16 + uint64(width)*100 {
		case 800:
			return fmt.Sprint("addr ", i)
		case 808:
			return fmt.Sprint("whole ", i)
		case 408:
			return fmt.Sprint("len ", i)
		case 412:
			return fmt.Sprint("flags ", i)
		}
	case off == r.DriverOff && width == 4:
		return "driver event"
	case off == r.DeviceOff && width == 4:
		return "device event"
	case off >= r.IndirectOff && off < r.Payload:
		return "table"
	}
	return fmt.Sprintf("%d bytes at %#x", width, off)
}

func (b packedRecorder) Load(off uint64, width uint) uint64 {
	b.note("load " + b.name(off, width))
	return b.Bus.Load(off, width)
}

func (b packedRecorder) Store(off uint64, width uint, v uint64) {
	b.note("store " + b.name(off, width))
	b.Bus.Store(off, width, v)
}

// TestPackedOrder: the publishing order, where the barriers stand, and that each word is read once.
func TestPackedOrder(t *testing.T) {
	for _, event := range []bool{false, true} {
		rec := &recorder{Bus: vringtest.NewBus(1 << 20)}
		m := vringtest.Memory{Name: "recorded", New: func(tb testing.TB, n int) mmio.Mem {
			return mmio.NewBusMem(packedRecorder{rec}, uint64(n), mmio.Uncached)
		}}
		rec.r = raw{vringtest.NewRig(t, packed(m, event, false), 8, 65536)}
		r := rec.r
		drv, dev := r.Pair(t)
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
		reqs := []vring.Request{request(r, 1, 1, 10, 20), request(r, 2, 1, 10)}
		step("Add", func() error { _, err := drv.Add(reqs); return err },
			"store addr 0", "store len 0", "store addr 1", "store whole 1", "store addr 2", "store whole 2", "write barrier", "store flags 0")
		step("NeedKick", func() error { drv.NeedKick(); return nil }, "full barrier", "load device event")
		var b vring.Batch
		step("Pop", func() error { _, err := dev.Pop(&b, 8); return err },
			"load whole 0", "load whole 1", "load whole 2", "load whole 3", "read barrier", "load addr 0", "load addr 1", "load addr 2", "load whole 3")
		used := []vring.Used{{ID: b.Chains[0].ID, Count: 2, Len: 1}, {ID: b.Chains[1].ID, Count: 1}}
		step("Complete", func() error { return dev.Complete(used) }, "store len 0", "store whole 2", "write barrier", "store flags 0")
		step("NeedCall", func() error { dev.NeedCall(); return nil }, "full barrier", "load driver event")
		step("Reap", func() error { _, err := drv.Reap(make([]vring.Completion, 8)); return err },
			"load whole 0", "load whole 1", "read barrier", "load whole 2", "read barrier")
		step("ArmCall", func() error { _, err := drv.ArmCall(); return err }, "store driver event", "full barrier")
		if n, err := drv.Add(reqs[1:]); n != 1 || err != nil {
			t.Fatal(n, err)
		}
		// Armed already: nothing to write, nothing to wait for.
		step("ArmCall again", func() error { _, err := drv.ArmCall(); return err }, "load whole 3")
		b = vring.Batch{}
		if n, err := dev.Pop(&b, 8); n != 1 || err != nil {
			t.Fatal(n, err)
		}
		step("ArmKick", func() error { _, err := dev.ArmKick(); return err }, "store device event", "full barrier", "load whole 4")
		step("ArmKick again", func() error { _, err := dev.ArmKick(); return err }, "load whole 4")
	}
}
