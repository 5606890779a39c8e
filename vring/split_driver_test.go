package vring_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/vring"
	"github.com/boardlink/boardlink/vring/vringtest"
)

// desc4 is one descriptor as it should stand in the ring or a table.
type desc4 struct {
	addr        dma.Addr
	n           uint32
	flags, next uint16
}

func (r raw) wantDesc(t *testing.T, off uint64, want desc4) {
	t.Helper()
	var got desc4
	got.addr, got.n, got.flags, got.next = r.getDescAt(off)
	if got != want {
		t.Errorf("descriptor at %#x: %+v, want %+v", off, got, want)
	}
}

func request(r raw, token uint32, readable int, lens ...uint32) vring.Request {
	q := vring.Request{Token: token, Readable: readable}
	for i, n := range lens {
		q.Bufs = append(q.Bufs, vring.Buffer{Addr: r.Addr(1000*uint64(token) + uint64(i)*100), Len: n})
	}
	return q
}

// The bytes of four descriptors, direct and indirect.
func TestSplitDriverBytes(t *testing.T) {
	vringtest.Each(t, vringtest.Split, func(t *testing.T, p vringtest.Params) {
		// What lay there before must not shine through.
		r := raw{vringtest.NewRig(t, p, 8, 65536)}
		dirt := make([]byte, r.Payload)
		for i := range dirt {
			dirt[i] = 0xa5
		}
		r.Mem.CopyIn(0, dirt)
		d, err := vring.NewSplitDriver(r.DrvCfg)
		if err != nil {
			t.Fatal(err)
		}
		if r.getAvailIdx() != 0 || r.getAvailFlags() != 0 || r.getUsedIdx() != 0 || r.getUsedFlags() != 0 || r.getUsedEvent() != 0 || r.getAvailEvent() != 0 {
			t.Error("rings are not empty at start")
		}
		if d.Size() != 8 || d.Free() != 8 {
			t.Errorf("size %d, %d free", d.Size(), d.Free())
		}
		reqs := []vring.Request{request(r, 1, 1, 10), request(r, 2, 2, 20, 21, 22, 23), request(r, 3, 0, 30)}
		if n, err := d.Add(reqs); n != 3 || err != nil {
			t.Fatal(n, err)
		}
		// Add owns nothing of the caller's any more.
		reqs[1].Bufs[0] = vring.Buffer{}
		r.wantDesc(t, r.DescOff, desc4{r.Addr(1000), 10, 0, 0})
		last := uint16(5)
		if p.Indirect {
			last = 2
			table := r.IndirectOff + 16*vringtest.IndirectMax // of head 1
			r.wantDesc(t, r.DescOff+16, desc4{vringtest.Base + dma.Addr(table), 64, indirect, 0})
			r.wantDesc(t, table, desc4{r.Addr(2000), 20, next, 1})
			r.wantDesc(t, table+16, desc4{r.Addr(2100), 21, next, 2})
			r.wantDesc(t, table+32, desc4{r.Addr(2200), 22, next | write, 3})
			r.wantDesc(t, table+48, desc4{r.Addr(2300), 23, write, 0})
		} else {
			r.wantDesc(t, r.DescOff+16, desc4{r.Addr(2000), 20, next, 2})
			r.wantDesc(t, r.DescOff+32, desc4{r.Addr(2100), 21, next, 3})
			r.wantDesc(t, r.DescOff+48, desc4{r.Addr(2200), 22, next | write, 4})
			r.wantDesc(t, r.DescOff+64, desc4{r.Addr(2300), 23, write, 0})
		}
		r.wantDesc(t, r.DescOff+16*uint64(last), desc4{r.Addr(3000), 30, write, 0})
		if r.getEntry(0) != 0 || r.getEntry(1) != 1 || r.getEntry(2) != last || r.getAvailIdx() != 3 {
			t.Errorf("available ring %d %d %d, index %d", r.getEntry(0), r.getEntry(1), r.getEntry(2), r.getAvailIdx())
		}
		if d.Free() != 8-int(last)-1 || d.State() != (vring.State{Avail: 3}) {
			t.Errorf("%d free, state %+v", d.Free(), d.State())
		}
		if s := d.Stats().Load(); s.Chains != 3 || s.Bytes != 10+86+30 || s.Published != 1 {
			t.Errorf("stats %+v", s)
		}
	})
}

// What no queue could take is the caller's error and harms nothing.
func TestSplitDriverBadRequests(t *testing.T) {
	vringtest.Each(t, vringtest.Split, func(t *testing.T, p vringtest.Params) {
		r, d := driver(t, p, 8)
		good := request(r, 1, 1, 10)
		for name, tt := range map[string]struct {
			req  vring.Request
			want error
		}{
			"empty":                 {vring.Request{}, vring.ErrRequest},
			"readable below 0":      {request(r, 1, -1, 10), vring.ErrRequest},
			"readable above":        {request(r, 1, 2, 10), vring.ErrRequest},
			"readable above, chain": {request(r, 1, 3, 10, 11), vring.ErrRequest},
			"zero length":           {request(r, 1, 1, 0), vring.ErrZeroLength},
			"zero length, chain":    {request(r, 1, 1, 1, 0), vring.ErrZeroLength},
			"overflow":              {vring.Request{Bufs: []vring.Buffer{{Addr: ^dma.Addr(0), Len: 2}}}, vring.ErrOverflow},
			"overflow, chain":       {vring.Request{Bufs: []vring.Buffer{{Addr: 1, Len: 1}, {Addr: ^dma.Addr(0), Len: 2}}}, vring.ErrOverflow},
			"too many buffers":      {request(r, 1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9), vring.ErrTooLong},
			"4 GiB":                 {request(r, 1, 1, 1<<31, 1<<31), vring.ErrTotal},
		} {
			before := d.State().Avail
			n, err := d.Add([]vring.Request{good, tt.req, good})
			if n != 1 || !errors.Is(err, tt.want) {
				t.Errorf("%s: Add = %d, %v, want %v", name, n, err, tt.want)
			}
			if d.Broken() != nil || r.getAvailIdx() != before+1 {
				t.Fatalf("%s: available index %d, broken: %v", name, r.getAvailIdx(), d.Broken())
			}
			r.used(before, uint32(r.getEntry(before)), 0)
			r.usedIdx(before + 1)
			if n, err := d.Reap(make([]vring.Completion, 2)); n != 1 || err != nil || d.Free() != 8 {
				t.Fatalf("%s: Reap = %d, %v, %d free", name, n, err, d.Free())
			}
		}
		if n, err := d.Add(nil); n != 0 || err != nil {
			t.Errorf("Add of nothing = %d, %v", n, err)
		}
		if n, err := d.Reap(nil); n != 0 || err != nil {
			t.Errorf("Reap into nothing = %d, %v", n, err)
		}
	})
}

// More than fits: what fits is added, and it is the chain that counts, not its buffers.
func TestSplitDriverFull(t *testing.T) {
	eachAnyOrder(t, vringtest.Split, func(t *testing.T, p vringtest.Params) {
		r, d := driver(t, p, 8)
		reqs := make([]vring.Request, 20)
		for i := range reqs {
			reqs[i] = request(r, uint32(i), 1, 1, 2, 3)
		}
		want, free := 2, 2
		if p.Indirect {
			want, free = 8, 0
		}
		if n, err := d.Add(reqs); n != want || err != nil || d.Free() != free {
			t.Fatalf("Add = %d, %v, %d free", n, err, d.Free())
		}
		if n, err := d.Add(reqs); n != 0 || err != nil {
			t.Fatalf("Add to a full queue = %d, %v", n, err)
		}
		if s := d.Stats().Load(); s.Published != 1 {
			t.Errorf("stats %+v", s)
		}
		// One comes back: one more fits.
		r.used(0, uint32(r.getEntry(1)), 5)
		r.usedIdx(1)
		done := make([]vring.Completion, 8)
		if n, err := d.Reap(done); n != 1 || err != nil || done[0] != (vring.Completion{Token: 1, Len: 5}) {
			t.Fatalf("Reap = %d, %v, %+v", n, err, done[0])
		}
		if n, err := d.Add(reqs[7:]); n != 1 || err != nil {
			t.Fatalf("Add = %d, %v", n, err)
		}
	})
}

// A device that scribbles over what is the driver's harms only itself: the shadow wins.
func TestSplitDriverShadow(t *testing.T) {
	eachAnyOrder(t, vringtest.Split, func(t *testing.T, p vringtest.Params) {
		r, d := driver(t, p, 8)
		reqs := []vring.Request{request(r, 1, 1, 10, 11, 12), request(r, 2, 0, 20)}
		if n, err := d.Add(reqs); n != 2 || err != nil {
			t.Fatal(n, err)
		}
		heads := []uint32{uint32(r.getEntry(0)), uint32(r.getEntry(1))}
		desc, drv, _ := vring.SplitSizes(8)
		dirt := make([]byte, desc)
		for i := range dirt {
			dirt[i] = 0xff
		}
		r.Mem.CopyIn(r.DescOff, dirt)
		r.Mem.CopyIn(r.DriverOff, dirt[:drv])
		r.used(0, heads[1], 20)
		r.used(1, heads[0], 23)
		r.usedIdx(2)
		done := make([]vring.Completion, 8)
		n, err := d.Reap(done)
		if n != 2 || err != nil || done[0] != (vring.Completion{Token: 2, Len: 20}) || done[1] != (vring.Completion{Token: 1, Len: 23}) {
			t.Fatalf("Reap = %d, %v, %+v", n, err, done[:n])
		}
		if d.Free() != 8 {
			t.Errorf("%d free", d.Free())
		}
		if n, err := d.Add(reqs); n != 2 || err != nil || r.getAvailIdx() != 4 {
			t.Errorf("Add = %d, %v, index %d", n, err, r.getAvailIdx())
		}
	})
}

// What a device can do wrong. Each case finds three chains in flight, at index 65534 and on.
func TestSplitDriverBadUsed(t *testing.T) {
	const start = 65534
	tests := []struct {
		name string
		do   func(r raw, heads [3]uint32)
		n    int   // chains before the bad one
		want error // nil: good
	}{
		{"good", func(r raw, h [3]uint32) {
			r.used(start, h[1], 20)
			r.used(start+1, h[2], 0)
			r.used(0, h[0], 0)
			r.usedIdx(1)
		}, 3, nil},
		{"index jumps", func(r raw, h [3]uint32) { r.usedIdx(2) }, 0, vring.ErrUsedJump},
		{"index goes back", func(r raw, h [3]uint32) { r.usedIdx(start - 1) }, 0, vring.ErrUsedJump},
		{"index jumps half around", func(r raw, h [3]uint32) { r.usedIdx(start - 32768) }, 0, vring.ErrUsedJump},
		{"id out of range", func(r raw, h [3]uint32) { r.used(start, 8, 0); r.usedIdx(start + 1) }, 0, vring.ErrUsedID},
		{"id 2^32-1", func(r raw, h [3]uint32) { r.used(start, ^uint32(0), 0); r.usedIdx(start + 1) }, 0, vring.ErrUsedID},
		{"id with bits above 16", func(r raw, h [3]uint32) { r.used(start, h[0]|1<<16, 0); r.usedIdx(start + 1) }, 0, vring.ErrUsedID},
		{"id that is free", func(r raw, h [3]uint32) { r.used(start, 7, 0); r.usedIdx(start + 1) }, 0, vring.ErrUsedID},
		{"id twice", func(r raw, h [3]uint32) {
			r.used(start, h[0], 0)
			r.used(start+1, h[0], 0)
			r.usedIdx(0)
		}, 1, vring.ErrUsedID},
		{"length above", func(r raw, h [3]uint32) {
			r.used(start, h[0], 0)
			r.used(start+1, h[1], 21)
			r.usedIdx(0)
		}, 1, vring.ErrUsedLen},
		{"length of a readable chain", func(r raw, h [3]uint32) { r.used(start, h[0], 1); r.usedIdx(start + 1) }, 0, vring.ErrUsedLen},
		{"length 2^32-1", func(r raw, h [3]uint32) { r.used(start, h[2], ^uint32(0)); r.usedIdx(start + 1) }, 0, vring.ErrUsedLen},
		{"length of the writable part", func(r raw, h [3]uint32) { r.used(start, h[2], 61); r.usedIdx(start + 1) }, 1, nil},
		{"length above the writable part", func(r raw, h [3]uint32) { r.used(start, h[2], 62); r.usedIdx(start + 1) }, 0, vring.ErrUsedLen},
	}
	eachAnyOrder(t, vringtest.Split, func(t *testing.T, p vringtest.Params) {
		for _, tt := range tests {
			t.Run(tt.name, func(t *testing.T) {
				r := raw{vringtest.NewRig(t, p, 8, 4096)}
				r.DrvCfg.State = vring.State{Avail: start, Used: start}
				d, err := vring.NewSplitDriver(r.DrvCfg)
				if err != nil {
					t.Fatal(err)
				}
				if n, err := d.Add([]vring.Request{request(r, 1, 1, 10), request(r, 2, 0, 20), request(r, 3, 1, 30, 31, 30)}); n != 3 || err != nil {
					t.Fatal(n, err)
				}
				tt.do(r, [3]uint32{uint32(r.getEntry(start)), uint32(r.getEntry(start + 1)), uint32(r.getEntry(0))})
				done := make([]vring.Completion, 8)
				n, err := d.Reap(done)
				if n != tt.n || !errors.Is(err, tt.want) {
					t.Fatalf("Reap = %d, %v, want %d, %v", n, err, tt.n, tt.want)
				}
				if tt.want == nil {
					return
				}
				var e *vring.Error
				if !errors.As(err, &e) || e.Code != tt.want || !strings.Contains(err.Error(), "test0 q0") {
					t.Errorf("error %+v", e)
				}
				if _, e := d.Add([]vring.Request{request(r, 1, 1, 10)}); e != err {
					t.Errorf("Add to a broken queue: %v", e)
				}
				if _, e := d.Reap(done); e != err {
					t.Errorf("Reap of a broken queue: %v", e)
				}
				if _, e := d.ArmCall(); e != err {
					t.Errorf("ArmCall of a broken queue: %v", e)
				}
				if d.NeedKick() {
					t.Error("a broken queue needs a kick")
				}
				d.DisarmCall()
				if e := d.Broken(); e != err {
					t.Errorf("Broken() = %v", e)
				}
				if s := d.Stats().Load(); s.Errors != 1 || s.Done != uint64(tt.n) {
					t.Errorf("stats %+v", s)
				}
				if s := d.State(); s.Used != start+uint16(tt.n) {
					t.Errorf("state %+v", s)
				}
			})
		}
		t.Run("arming sees a jump too", func(t *testing.T) {
			r, d := driver(t, p, 8)
			r.usedIdx(1)
			if pending, err := d.ArmCall(); pending || !errors.Is(err, vring.ErrUsedJump) {
				t.Errorf("%v, %v", pending, err)
			}
		})
		t.Run("arming sees an index that goes back", func(t *testing.T) {
			if !p.EventIdx {
				return // arming for the second next takes the event index
			}
			r, d := driver(t, p, 8)
			if n, err := d.Add([]vring.Request{request(r, 1, 1, 10), request(r, 2, 0, 20), request(r, 3, 0, 20)}); n != 3 || err != nil {
				t.Fatal(n, err)
			}
			r.usedIdx(2)
			if pending, err := d.ArmCallAfter(3); pending || err != nil {
				t.Fatal(pending, err)
			}
			r.usedIdx(1)
			if pending, err := d.ArmCallAfter(3); pending || !errors.Is(err, vring.ErrUsedJump) {
				t.Errorf("%v, %v", pending, err)
			}
		})
		t.Run("index goes back behind what was seen", func(t *testing.T) {
			r, d := driver(t, p, 8)
			if n, err := d.Add([]vring.Request{request(r, 1, 1, 10), request(r, 2, 0, 20)}); n != 2 || err != nil {
				t.Fatal(n, err)
			}
			r.used(0, uint32(r.getEntry(0)), 0)
			r.used(1, uint32(r.getEntry(1)), 0)
			r.usedIdx(2)
			if n, err := d.Reap(make([]vring.Completion, 1)); n != 1 || err != nil {
				t.Fatal(n, err)
			}
			r.usedIdx(1)
			// What was seen is taken still; then the index is read again.
			if n, err := d.Reap(make([]vring.Completion, 1)); n != 1 || err != nil {
				t.Fatal(n, err)
			}
			if n, err := d.Reap(make([]vring.Completion, 1)); n != 0 || !errors.Is(err, vring.ErrUsedJump) {
				t.Errorf("%d, %v", n, err)
			}
		})
	})
}

// Whether to kick, and the words that ask for a call.
func TestSplitDriverNotify(t *testing.T) {
	for _, m := range vringtest.Memories {
		t.Run(m.Name, func(t *testing.T) {
			one := func(r raw) []vring.Request { return []vring.Request{request(r, 1, 1, 10)} }
			back := func(t *testing.T, r raw, d *vring.SplitDriver) {
				t.Helper()
				s := d.State()
				for s.Used != s.Avail {
					r.used(s.Used, uint32(r.getEntry(s.Used)), 0)
					s.Used++
				}
				r.usedIdx(s.Used)
				for d.State().Used != s.Used {
					if n, err := d.Reap(make([]vring.Completion, 8)); n == 0 || err != nil {
						t.Fatal(n, err)
					}
				}
			}
			t.Run("flags", func(t *testing.T) {
				r, d := driver(t, split(m, false, false), 8)
				if d.NeedKick() {
					t.Error("kick for nothing")
				}
				r.availEvent(1000) // means nothing
				for i, tt := range []struct {
					flags uint16
					want  bool
				}{{0, true}, {1, false}, {0xfffe, true}, {0xffff, false}} {
					if n, err := d.Add(one(r)); n != 1 || err != nil {
						t.Fatal(n, err)
					}
					r.usedFlags(tt.flags)
					if got := d.NeedKick(); got != tt.want {
						t.Errorf("%d: flags %#x: %v", i, tt.flags, got)
					}
					if d.NeedKick() {
						t.Error("kicked twice")
					}
				}
				d.DisarmCall()
				if r.getAvailFlags() != 1 || r.getAvailIdx() != 4 {
					t.Errorf("flags %d, index %d", r.getAvailFlags(), r.getAvailIdx())
				}
				if n, err := d.Add(one(r)); n != 1 || err != nil || r.getAvailFlags() != 1 {
					t.Errorf("flags %d after Add", r.getAvailFlags())
				}
				if pending, err := d.ArmCall(); pending || err != nil || r.getAvailFlags() != 0 || r.getAvailIdx() != 5 {
					t.Errorf("%v, %v, flags %d, index %d", pending, err, r.getAvailFlags(), r.getAvailIdx())
				}
				if r.getUsedEvent() != 0 {
					t.Error("used_event written, not negotiated")
				}
			})
			t.Run("event", func(t *testing.T) {
				r, d := driver(t, split(m, true, false), 8)
				r.usedFlags(1) // means nothing
				r.availEvent(3)
				for i := 0; i < 65536+8; i++ {
					if n, err := d.Add(one(r)); n != 1 || err != nil {
						t.Fatal(n, err)
					}
					if got, want := d.NeedKick(), uint16(i) == 3; got != want {
						t.Fatalf("chain %d: %v", i, got)
					}
					back(t, r, d)
				}
				// A batch that steps over the event.
				r.availEvent(d.State().Avail + 2)
				if n, err := d.Add([]vring.Request{one(r)[0], one(r)[0], one(r)[0], one(r)[0]}); n != 4 || err != nil || !d.NeedKick() {
					t.Errorf("%d, %v: no kick", n, err)
				}
				back(t, r, d)
				d.DisarmCall()
				if r.getAvailFlags() != 0 {
					t.Error("flags written with the event index")
				}
				for i := 0; i < 3; i++ {
					if n, err := d.Add(one(r)); n != 1 || err != nil {
						t.Fatal(n, err)
					}
					if pending, err := d.ArmCall(); pending || err != nil || r.getUsedEvent() != d.State().Used {
						t.Errorf("%v, %v, used_event %d at %d", pending, err, r.getUsedEvent(), d.State().Used)
					}
					back(t, r, d)
				}
			})
			t.Run("first after a restart", func(t *testing.T) {
				r := raw{vringtest.NewRig(t, split(m, true, false), 8, 65536)}
				r.DrvCfg.State = vring.State{Avail: 77, Used: 77}
				d, err := vring.NewSplitDriver(r.DrvCfg)
				if err != nil {
					t.Fatal(err)
				}
				if r.getAvailIdx() != 77 || r.getUsedIdx() != 77 || r.getAvailEvent() != 77 || r.getUsedEvent() != 77 {
					t.Error("indices do not start at the state")
				}
				r.availEvent(5)
				for i, want := range []bool{true, false} {
					if n, err := d.Add(one(r)); n != 1 || err != nil || d.NeedKick() != want {
						t.Errorf("batch %d: %d, %v, want kick %v", i, n, err, want)
					}
				}
			})
			t.Run("delayed", func(t *testing.T) {
				for _, event := range []bool{true, false} {
					r, d := driver(t, split(m, event, false), 8)
					reqs := make([]vring.Request, 6)
					for i := range reqs {
						reqs[i] = request(r, uint32(i), 1, 10)
					}
					if n, err := d.Add(reqs); n != 6 || err != nil {
						t.Fatal(n, err)
					}
					pending, err := d.ArmCallAfter(4)
					if pending || err != nil || event && r.getUsedEvent() != 3 {
						t.Fatalf("%v, %v, used_event %d", pending, err, r.getUsedEvent())
					}
					for i := uint16(0); i < 6; i++ {
						r.used(i, uint32(r.getEntry(i)), 0)
						r.usedIdx(i + 1)
						pending, err := d.ArmCallAfter(4)
						if want := i >= 3 || !event; pending != want || err != nil {
							t.Errorf("%d used: %v, %v", i+1, pending, err)
						}
					}
					if n, err := d.Reap(make([]vring.Completion, 8)); n == 0 || err != nil {
						t.Fatal(n, err)
					}
					for d.State().Used != 6 {
						if n, err := d.Reap(make([]vring.Completion, 8)); n == 0 || err != nil {
							t.Fatal(n, err)
						}
					}
					// Nothing in flight: the next one is asked for.
					if pending, err := d.ArmCallAfter(100); pending || err != nil || event && r.getUsedEvent() != 6 {
						t.Errorf("%v, %v, used_event %d", pending, err, r.getUsedEvent())
					}
				}
			})
		})
	}
}

// In the steady state of a device that completes in order, only the index changes.
func TestSplitDriverWritesWhatChanges(t *testing.T) {
	bus := vringtest.NewBus(1 << 20)
	m := vringtest.Memory{Name: "counting", New: busMemory(bus)}
	r, d := driver(t, split(m, true, false), 8)
	reqs := make([]vring.Request, 4)
	for i := range reqs {
		reqs[i] = request(r, uint32(i), 0, 100)
	}
	for i := uint16(0); i < 20; i += 4 {
		writes := bus.Writes
		if n, err := d.Add(reqs); n != 4 || err != nil {
			t.Fatal(n, err)
		}
		want := uint64(1)
		switch i {
		case 0: // addresses, lengths; entries 1 to 3 (0 is there): 16 + 32 bits
			want += 4*2 + 2
		case 4: // entries 4 to 7: offset 12: 32, 32 bits
			want += 4*2 + 2
		}
		if got := bus.Writes - writes; got != want {
			t.Errorf("batch at %d: %d writes, want %d", i, got, want)
		}
		for k := uint16(0); k < 4; k++ {
			r.used(i+k, uint32(r.getEntry(i+k)), 0)
		}
		r.usedIdx(i + 4)
		if n, err := d.Reap(make([]vring.Completion, 8)); n != 4 || err != nil {
			t.Fatal(n, err)
		}
	}
}

// A request goes to a table only from IndirectMin buffers on, and only if it fits one.
func TestSplitDriverIndirectLimits(t *testing.T) {
	for _, tt := range []struct {
		min, max, bufs int
		want           bool
	}{{0, 4, 1, false}, {0, 4, 2, true}, {0, 4, 4, true}, {0, 4, 5, false}, {1, 4, 1, true}, {3, 4, 2, false}, {3, 4, 3, true}, {3, 2, 3, false}, {0, 1, 1, false}, {1, 1, 1, true}} {
		t.Run(fmt.Sprintf("%+v", tt), func(t *testing.T) {
			r := raw{vringtest.NewRig(t, split(vringtest.Heap, true, true), 8, 65536)}
			r.DrvCfg.IndirectMin, r.DrvCfg.IndirectMax = tt.min, tt.max
			d, err := vring.NewSplitDriver(r.DrvCfg)
			if err != nil {
				t.Fatal(err)
			}
			q := vring.Request{}
			for i := 0; i < tt.bufs; i++ {
				q.Bufs = append(q.Bufs, vring.Buffer{Addr: r.Addr(uint64(i)), Len: 1})
			}
			if n, err := d.Add([]vring.Request{q, q}); err != nil || n == 0 {
				t.Fatal(n, err)
			}
			if _, _, flags, _ := r.getDesc(0); (flags == indirect) != tt.want {
				t.Errorf("flags %d", flags)
			}
		})
	}
}
