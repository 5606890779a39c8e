package block

import (
	"bytes"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/boardlink/boardlink/virtio"
)

// TestModel checks a Disk against a slice of bytes: whatever order the device works in, and however often it dies in the middle, each request has the
// effect that it has where requests are done one after the other as they were submitted. The device executes requests that it never answers, leaves
// out others, and answers in any order; after a death everything about it may be another, but the content.
func TestModel(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		const size = 256 << 10
		disk := make([]byte, size)
		model := make([]byte, size)
		d, err := New(Config{Name: "disk0", Queues: rapid.IntRange(1, 3).Draw(rt, "queues"), QueueSize: 1 << rapid.IntRange(2, 7).Draw(rt, "queue size")})
		if err != nil {
			rt.Fatal(err)
		}
		defer d.Close()
		var f *fake
		var held []popped // that the device has taken and not answered
		wants := map[*Request][]byte{}
		ends := newOwner()
		pending, canceled := 0, map[*Request]bool{}
		var stamp byte

		boot := func() {
			f = newFake(t, disk)
			f.config.MaxDiscard, f.config.MaxZeroes = uint32(rapid.IntRange(1, 64).Draw(rt, "max discard")), uint32(rapid.IntRange(1, 64).Draw(rt, "max zeroes"))
			if rapid.Bool().Draw(rt, "mq") {
				f.features.Set(virtio.BlkMQ)
				f.config.NumQueues = uint16(rapid.IntRange(1, 4).Draw(rt, "host queues"))
			}
			if rapid.Bool().Draw(rt, "pieces") {
				f.features.Set(virtio.BlkSizeMax)
				f.config.SizeMax = uint32(rapid.IntRange(512, 5000).Draw(rt, "size max"))
			}
			far := 0
			if rapid.Bool().Draw(rt, "push") {
				far = rapid.IntRange(5, 40).Draw(rt, "pool") * 4096
			}
			near := rapid.IntRange(8, 64).Draw(rt, "window") * 4096
			if err := d.Up(f, f.layout(near, far), func(err error) { t.Error(err) }); err != nil {
				rt.Fatal(err)
			}
			held = nil
		}
		take := func() { held = append(held, f.pop()...) }
		one := func() { // the device does one request, any
			take()
			if len(held) == 0 {
				return
			}
			i := rapid.IntRange(0, len(held)-1).Draw(rt, "which")
			p := held[i]
			held = append(held[:i], held[i+1:]...)
			f.execute(p)
		}
		collect := func() {
			for len(ends.c) > 0 {
				r := <-ends.c
				pending--
				want, known := wants[r]
				if !known {
					rt.Fatalf("a %v ended twice", r.Op)
				}
				delete(wants, r)
				if r.Err != nil && !canceled[r] {
					rt.Fatalf("%v of %d bytes at %d: %v", r.Op, r.Length, r.Offset, r.Err)
				}
				if r.Op == Read && !bytes.Equal(r.Data, want) {
					rt.Fatalf("read of %d bytes at %d: stale or wrong", r.Length, r.Offset)
				}
			}
		}
		settle := func() {
			for begin := time.Now(); pending > 0; {
				one()
				collect()
				if time.Since(begin) > 30*time.Second {
					rt.Fatalf("%d requests do not end: %v", pending, d.Status().Counters)
				}
			}
		}
		boot()
		rt.Repeat(map[string]func(*rapid.T){
			"submit": func(rt *rapid.T) {
				if pending > 100 {
					return
				}
				var rs []*Request
				for n := rapid.IntRange(1, 4).Draw(rt, "n"); n > 0; n-- {
					first := rapid.IntRange(0, size/512-1).Draw(rt, "sector")
					sectors := rapid.IntRange(1, min(80, size/512-first)).Draw(rt, "sectors")
					r := &Request{Op: Op(rapid.IntRange(int(Read), int(WriteZeroes)).Draw(rt, "op")), Offset: uint64(first) * 512, Owner: ends}
					if r.Op != Flush {
						r.Length = uint64(sectors) * 512
					}
					area := model[r.Offset : r.Offset+r.Length]
					switch r.Op {
					case Read:
						r.Data = make([]byte, r.Length)
						wants[r] = append([]byte(nil), area...)
					case Write:
						stamp++
						r.Data = pattern(int(r.Length), stamp)
						copy(area, r.Data)
					case Discard, WriteZeroes:
						clear(area)
					}
					if r.Op != Read {
						wants[r] = nil
					}
					rs = append(rs, r)
				}
				pending += len(rs)
				d.Submit(rs...)
			},
			"device": func(rt *rapid.T) { one(); collect() },
			"die": func(rt *rapid.T) {
				take()
				for _, p := range held { // done, but nobody hears of it
					if rapid.Bool().Draw(rt, "done") {
						f.do(p)
					}
				}
				d.Down()
				boot()
			},
			"quiet": func(rt *rapid.T) {
				settle()
				if !bytes.Equal(disk, model) {
					rt.Fatal("the disk has other bytes than were written")
				}
			},
			"leave": func(rt *rapid.T) { // a submitter that goes away in the middle, with writes of what is there already
				settle()
				other := newOwner()
				n := rapid.IntRange(1, 8).Draw(rt, "n")
				for i := 0; i < n; i++ {
					d.Submit(&Request{Op: Write, Offset: 0, Length: 4096, Data: append([]byte(nil), model[:4096]...), Owner: other})
				}
				d.Cancel(other)
				for ended, begin := 0, time.Now(); ended < n; {
					one()
					for len(other.c) > 0 {
						if r := <-other.c; r.Err != nil && r.Err != ErrCanceled {
							rt.Fatal(r.Err)
						}
						ended++
					}
					if time.Since(begin) > 30*time.Second {
						rt.Fatal("requests that were given up do not end")
					}
				}
			},
		})
		settle()
		if !bytes.Equal(disk, model) {
			rt.Fatal("the disk has other bytes than were written")
		}
		if n := d.Status().Counters; n["in_flight"] > 1 || n["waiting"] > 1 { // the serial number may be on its way
			rt.Fatalf("left: %v", n)
		}
	})
}

// An acknowledged request is never sent again, one in flight is, and one whose owner has gone is not.
func TestResend(t *testing.T) {
	disk := make([]byte, 1<<20)
	f := newFake(t, disk)
	d := newDisk(t, Config{})
	up(t, d, f, 1<<20, 0)
	o, gone := newOwner(), newOwner()
	write := func(o *owner, sector uint64, fill byte) *Request {
		return &Request{Op: Write, Offset: sector * 512, Length: 512, Data: bytes.Repeat([]byte{fill}, 512), Owner: o}
	}
	first, second, third := write(o, 0, 1), write(o, 1, 2), write(gone, 2, 3)
	d.Submit(first, second, third)
	late := write(o, 2, 4) // waits for third
	d.Submit(late)
	var ps []popped
	until(t, "the requests", func() bool { ps = append(ps, f.pop()...); return len(ps) == 4 }) // with the serial number
	for _, p := range ps {
		if h := virtio.DecodeBlkHeader(gather(p.spans[:1])); h.Type == virtio.BlkTOut && h.Sector == 0 {
			f.execute(p)
		}
	}
	if r := <-o.c; r != first || r.Err != nil {
		t.Fatalf("%v of sector %d ends: %v", r.Op, r.Offset/512, r.Err)
	}
	d.Cancel(gone)
	if n := d.Status().Counters; n["canceled"] != 0 || n["held"] != 1 || len(gone.c) != 0 {
		t.Errorf("a request that the device has is given up: %v", n)
	}
	d.Down()
	if r := <-gone.c; r != third || r.Err != ErrCanceled {
		t.Errorf("given up: %v", r.Err)
	}
	clear(disk) // what is written now shows what is sent again
	g := newFake(t, disk)
	up(t, d, g, 1<<20, 0)
	stop := g.serve()
	<-o.c
	<-o.c
	stop()
	if disk[0] != 0 || disk[512] != 2 || disk[1024] != 4 || second.Err != nil || late.Err != nil {
		t.Errorf("sectors %d %d %d, %v, %v", disk[0], disk[512], disk[1024], second.Err, late.Err)
	}
	if n := d.Status().Counters; n["resent"] != 1 || n["canceled"] != 1 || n["writes"] != 3 {
		t.Errorf("counters: %v", n)
	}

	// With the device down nothing waits for those who have gone; Close ends the rest.
	d.Down()
	d.Submit(write(gone, 7, 1), write(o, 7, 2), write(gone, 7, 3), write(gone, 8, 4))
	d.Cancel(gone)
	for i := 0; i < 2; i++ {
		if r := <-gone.c; r.Err != ErrCanceled {
			t.Error(r.Err)
		}
	}
	if len(o.c) != 0 || len(gone.c) != 0 {
		t.Error("more requests have ended than were given up and wait for nobody")
	}
	d.Close()
	if r := <-o.c; r.Err != ErrClosed {
		t.Error(r.Err)
	}
	if r := <-gone.c; r.Err != ErrClosed {
		t.Error(r.Err)
	}
}

// Memory is short: requests wait for it in their order, and none fails.
func TestBackPressure(t *testing.T) {
	disk := make([]byte, 4<<20)
	f := newFake(t, disk)
	d := newDisk(t, Config{})
	up(t, d, f, 64<<10, 0)
	o := newOwner()
	const n = 200
	for i := 0; i < n; i++ {
		d.Submit(&Request{Op: Write, Offset: uint64(i) * 16384, Length: 16384, Data: bytes.Repeat([]byte{byte(i + 1)}, 16384), Owner: o})
	}
	until(t, "memory that is used up", func() bool { return d.Status().Counters["in_flight"] > 0 })
	if c := d.Status().Counters; c["in_flight"]*4096 > 64<<10 || c["waiting"] < n {
		t.Errorf("%d requests in flight and %d waiting", c["in_flight"], c["waiting"])
	}
	stop := f.serve()
	for i := 0; i < n; i++ {
		if r := <-o.c; r.Err != nil {
			t.Error(r.Err)
		}
	}
	stop()
	for i := 0; i < n; i++ {
		if !bytes.Equal(disk[i*16384:(i+1)*16384], bytes.Repeat([]byte{byte(i + 1)}, 16384)) {
			t.Fatalf("write %d is not on the disk", i)
		}
	}
	until(t, "Flush of the owner", func() bool { o.mu.Lock(); defer o.mu.Unlock(); return o.flushed > 0 })
}

func TestPool(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		pages := rapid.IntRange(1, 200).Draw(rt, "pages")
		p := newPool(pages)
		owner := make([]int, pages)
		type run struct{ first, n int }
		var runs []run
		rt.Repeat(map[string]func(*rapid.T){
			"take": func(rt *rapid.T) {
				n := rapid.IntRange(1, pages).Draw(rt, "n")
				longest, l := 0, 0
				for _, o := range owner {
					if l++; o != 0 {
						l = 0
					}
					longest = max(longest, l)
				}
				first, ok := p.take(n)
				if ok != (n <= longest) {
					rt.Fatalf("%d pages of at most %d together: %v", n, longest, ok)
				}
				if !ok {
					return
				}
				for i := first; i < first+n; i++ {
					if owner[i] != 0 {
						rt.Fatalf("page %d is handed out twice", i)
					}
					owner[i] = 1
				}
				runs = append(runs, run{first, n})
			},
			"give": func(rt *rapid.T) {
				if len(runs) == 0 {
					return
				}
				i := rapid.IntRange(0, len(runs)-1).Draw(rt, "run")
				p.give(runs[i].first, runs[i].n)
				clear(owner[runs[i].first : runs[i].first+runs[i].n])
				runs = append(runs[:i], runs[i+1:]...)
			},
			"": func(rt *rapid.T) {
				free := 0
				for _, o := range owner {
					free += 1 - o
				}
				if free != p.free {
					rt.Fatalf("%d pages free, it says %d", free, p.free)
				}
			},
		})
	})
}
