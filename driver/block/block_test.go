package block

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/virtio"
)

func newDisk(t *testing.T, c Config) *Disk {
	t.Helper()
	c.Name = "disk0"
	d, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// broken collects what Up's broken hears.
type brokenErrs chan error

func (b brokenErrs) tell(err error) {
	select {
	case b <- err:
	default:
	}
}

func up(t *testing.T, d *Disk, f *fake, near, far int) brokenErrs {
	t.Helper()
	b := make(brokenErrs, 4)
	if err := d.Up(f, f.layout(near, far), b.tell); err != nil {
		t.Fatal(err)
	}
	return b
}

func pattern(n int, seed byte) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i/512)*31 + byte(i) + seed
	}
	return b
}

func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for begin := time.Now(); !ok(); time.Sleep(100 * time.Microsecond) {
		if time.Since(begin) > 30*time.Second {
			t.Fatalf("%s does not happen", what)
		}
	}
}

// Every operation reaches the disk, in both placements, with one queue and several, in memory that is much smaller than a request.
func TestOperations(t *testing.T) {
	for _, c := range []struct {
		name      string
		near, far int
		queues    uint16
		set       func(f *fake)
	}{
		{"window", 1 << 20, 0, 0, func(*fake) {}},
		{"push", 1 << 20, 1 << 20, 0, func(*fake) {}},
		{"small", 64 << 10, 0, 0, func(*fake) {}},
		{"queues", 1 << 20, 0, 4, func(f *fake) { f.config.NumQueues = 4; f.features.Set(virtio.BlkMQ) }},
		{"pieces", 1 << 20, 0, 0, func(f *fake) {
			f.features.Set(virtio.BlkSizeMax)
			f.features.Set(virtio.BlkSegMax)
			f.config.SizeMax, f.config.SegMax = 1000, 5
		}},
		{"blocks", 1 << 20, 1 << 20, 0, func(f *fake) { f.config.BlkSize = 4096 }},
		{"shortest queue", 1 << 20, 0, 0, func(f *fake) { f.max = 4 }},
	} {
		c := c
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			disk := pattern(4<<20, 1)
			want := append([]byte(nil), disk...)
			f := newFake(t, disk)
			f.config.MaxDiscard, f.config.MaxZeroes = 512, 256
			c.set(f)
			d := newDisk(t, Config{Queues: 4})
			up(t, d, f, c.near, c.far)
			stop := f.serve()
			defer stop()
			read := func(off, n uint64) []byte {
				t.Helper()
				b, err := do(d, Request{Op: Read, Offset: off, Length: n, Data: make([]byte, n)})
				if err != nil {
					t.Fatalf("read of %d bytes at %d: %v", n, off, err)
				}
				return b
			}
			for _, n := range []uint64{512, 4096, 69 * 512, 1<<20 + 512, 4 << 20} {
				off := uint64(len(disk)) - n
				if !bytes.Equal(read(off, n), want[off:]) {
					t.Errorf("a read of %d bytes: not what is on the disk", n)
				}
			}
			for _, r := range []Request{{Op: Write, Offset: 4096, Data: pattern(1<<20+4096, 7)}, {Op: Write, Offset: 0, Data: pattern(512, 9)},
				{Op: Discard, Offset: 8192, Length: 1 << 20}, {Op: WriteZeroes, Offset: 2 << 20, Length: 1 << 20, Unmap: true}, {Op: Flush}} {
				if r.Op == Write {
					r.Length = uint64(len(r.Data))
					copy(want[r.Offset:], r.Data)
				} else if r.Op != Flush {
					clear(want[r.Offset : r.Offset+r.Length])
				}
				if _, err := do(d, r); err != nil {
					t.Errorf("%v: %v", r.Op, err)
				}
			}
			if !bytes.Equal(disk, want) || !bytes.Equal(read(0, uint64(len(disk))), want) {
				t.Error("the disk has other bytes than were written")
			}
			if b, err := do(d, Request{Op: GetID, Data: make([]byte, virtio.BlkIDLen)}); err != nil || strings.TrimRight(string(b), "\x00") != f.serial {
				t.Errorf("serial number %q, %v", b, err)
			}
			until(t, "the serial number", func() bool { i, _ := d.Info(); return i.Serial == f.serial })
			i, ok := d.Info()
			i.Preferred = 0
			mustBe(t, "info", i, Info{Size: 4 << 20, BlockSize: f.config.BlkSize, Flush: true, Discard: true, WriteZeroes: true, Serial: f.serial})
			mustBe(t, "known", ok, true)
			n := d.Status().Counters
			for k, v := range map[string]uint64{"writes": 2, "write_bytes": 1<<20 + 4096 + 512, "flushes": 1, "discards": 1, "write_zeroes": 1, "errors": 0, "in_flight": 0, "waiting": 0, "reads": 6} {
				if n[k] != v {
					t.Errorf("%s: %d, want %d", k, n[k], v)
				}
			}
			if f.queues[0].flushes == 0 && len(f.queues) == 1 {
				t.Error("no flush came")
			}
		})
	}
}

// What a device cannot do is an error of that request alone, with the number of the system.
func TestErrors(t *testing.T) {
	f := newFake(t, make([]byte, 1<<20))
	f.features.Clear(virtio.BlkDiscard)
	f.features.Clear(virtio.BlkWriteZeroes)
	f.features.Clear(virtio.BlkFlush)
	f.features.Clear(virtio.BlkBlkSize)
	d := newDisk(t, Config{})
	b := up(t, d, f, 1<<20, 0)
	if f.reads != 8 {
		t.Errorf("%d bytes of the configuration were read; the features say that it has 8", f.reads)
	}
	stop := f.serve()
	one := make([]byte, 512)
	for _, c := range []struct {
		r    Request
		want error
	}{
		{Request{Op: Read, Offset: 1 << 20, Length: 512, Data: one}, unix.ENOSPC},
		{Request{Op: Read, Offset: 1<<64 - 512, Length: 512, Data: one}, unix.ENOSPC},
		{Request{Op: Write, Offset: 1<<20 - 512, Length: 1024, Data: make([]byte, 1024)}, unix.ENOSPC},
		{Request{Op: Read, Offset: 1, Length: 512, Data: one}, unix.EINVAL},
		{Request{Op: Read, Length: 511, Data: one[:511]}, unix.EINVAL},
		{Request{Op: Read, Length: 1024, Data: one}, unix.EINVAL},
		{Request{Op: GetID, Data: one}, unix.EINVAL},
		{Request{Op: 77}, unix.EOPNOTSUPP},
		{Request{Op: Discard, Length: 512}, unix.EOPNOTSUPP},
		{Request{Op: WriteZeroes, Length: 512}, unix.EOPNOTSUPP},
		{Request{Op: Flush}, nil}, // without a cache there is nothing to do
		{Request{Op: Read, Length: 0}, nil},
		{Request{Op: Read, Length: 512, Data: one}, nil},
	} {
		if _, err := do(d, c.r); !errors.Is(err, c.want) {
			t.Errorf("%v of %d bytes at %d: %v, want %v", c.r.Op, c.r.Length, c.r.Offset, err, c.want)
		}
	}
	mustBe(t, "flushes that the device got", f.queues[0].flushes, 0)
	stop()

	// A part that fails fails the request, once, and the device goes on.
	for _, status := range []byte{virtio.BlkIOErr, virtio.BlkUnsupp} {
		o := newOwner()
		d.Submit(&Request{Op: Read, Length: 1 << 20, Data: make([]byte, 1<<20), Owner: o})
		first := true
		for ended := false; !ended; {
			for _, p := range f.pop() {
				if first {
					f.answer(p, status, 0)
					first = false
				} else {
					f.execute(p)
				}
			}
			select {
			case r := <-o.c:
				want := ErrIO
				if status == virtio.BlkUnsupp {
					want = ErrUnsupported
				}
				mustBe(t, "a part of a read that fails", r.Err, want)
				ended = true
			default:
			}
		}
	}

	// After a reset the disk is read-only.
	d.Down()
	g := newFake(t, make([]byte, 1<<20))
	g.features.Set(virtio.BlkRO)
	up(t, d, g, 1<<20, 0)
	stop = g.serve()
	for _, op := range []Op{Write, Discard, WriteZeroes} {
		if _, err := do(d, Request{Op: op, Length: 512, Data: one}); !errors.Is(err, ErrReadOnly) {
			t.Errorf("%v of a read-only disk: %v", op, err)
		}
	}
	if _, err := do(d, Request{Op: Read, Length: 512, Data: one}); err != nil {
		t.Error(err)
	}
	stop()
	select {
	case err := <-b:
		t.Errorf("the device is reset for it: %v", err)
	default:
	}
	d.Close()
	if _, err := do(d, Request{Op: Read, Length: 512, Data: one}); !errors.Is(err, ErrClosed) || !errors.Is(err, unix.ESHUTDOWN) {
		t.Errorf("after Close: %v", err)
	}
}

// A device that breaks the rules is reset, and its requests are sent again to the next one.
func TestHostile(t *testing.T) {
	for _, c := range []struct {
		name string
		op   Op
		act  func(f *fake, p popped)
		want error
	}{
		{"no status", Read, func(f *fake, p popped) { f.do(p); f.complete(p, 4097) }, ErrStatus},
		{"bad status", Write, func(f *fake, p popped) { f.answer(p, 3, 0) }, ErrStatus},
		{"no byte", Write, func(f *fake, p popped) { f.complete(p, 0) }, ErrStatus},
		{"short read", Read, func(f *fake, p popped) { f.answer(p, virtio.BlkOK, 4095) }, ErrShort},
		{"long", Write, func(f *fake, p popped) { f.complete(p, 2) }, nil},
		{"twice", Read, func(f *fake, p popped) {
			f.execute(p)
			// The same element again, by the ring's memory: index 2 of it.
			ring, err := p.q.table.Load().Translate(nil, p.q.dev, 64, 0)
			if err != nil {
				f.t.Error(err)
			}
			at := uint64(p.q.q.State().Used%p.q.size)*8 + 4
			m := ring[0].Mem()
			m.Store32(at, uint32(p.chain.ID))
			m.Store32(at+4, 1)
			m.Store16(2, p.q.q.State().Used+1)
			p.q.call.Ring()
		}, nil},
	} {
		c := c
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			disk := pattern(1<<20, 3)
			f := newFake(t, disk)
			d := newDisk(t, Config{})
			b := up(t, d, f, 1<<20, 0)
			stop := f.serve()
			do(d, Request{Op: Flush}) // the serial number was asked for before
			stop()
			o := newOwner()
			r := &Request{Op: c.op, Offset: 4096, Length: 4096, Data: pattern(4096, 5), Owner: o}
			second := &Request{Op: Read, Offset: 65536, Length: 512, Data: make([]byte, 512), Owner: o}
			d.Submit(r, second)
			var ps []popped
			until(t, "the requests", func() bool { ps = append(ps, f.pop()...); return len(ps) == 2 })
			c.act(f, ps[0])
			var err error
			select {
			case err = <-b:
			case <-time.After(30 * time.Second):
				t.Fatal("the device is not reset")
			}
			if c.want != nil && !errors.Is(err, c.want) {
				t.Errorf("the device is reset for: %v, want %v", err, c.want)
			}
			d.Down()
			g := newFake(t, disk)
			up(t, d, g, 1<<20, 1<<20)
			defer g.serve()()
			ended := map[*Request]bool{}
			for len(ended) < 2 {
				e := <-o.c
				if ended[e] {
					t.Fatal("a request ended twice")
				}
				ended[e] = true
			}
			if r.Err != nil || second.Err != nil || !bytes.Equal(second.Data, pattern(1<<20, 3)[65536:66048]) {
				t.Errorf("sent again: %v, %v", r.Err, second.Err)
			}
			if n := d.Status().Counters; n["resent"] == 0 || n["broken"] != 1 {
				t.Errorf("counters: %v", n)
			}
		})
	}
}

// What a device may not say of itself keeps it from coming up, with an error that tells what it was.
func TestUpRefuses(t *testing.T) {
	for _, c := range []struct {
		want string
		near int
		set  func(f *fake)
	}{
		{"blocks of 513 bytes", 1 << 20, func(f *fake) { f.config.BlkSize = 513 }},
		{"blocks of 131072 bytes", 1 << 20, func(f *fake) { f.config.BlkSize = 128 << 10 }},
		{"sectors", 1 << 20, func(f *fake) { f.config.Capacity = 1 << 62 }},
		{"less than a block", 1 << 20, func(f *fake) { f.features.Set(virtio.BlkSizeMax); f.config.SizeMax = 100 }},
		{"descriptors", 1 << 20, func(f *fake) { f.max = 2 }},
		{"no queue", 1 << 20, func(f *fake) { f.max = 0 }},
		{"window memory", 4 << 10, func(f *fake) {}},
		{"use a larger window", 64 << 10, func(f *fake) { f.config.BlkSize = 64 << 10 }},
		{"version_1", 1 << 20, func(f *fake) { f.features.Clear(virtio.Version1) }},
	} {
		f := newFake(t, make([]byte, 1<<20))
		c.set(f)
		d := newDisk(t, Config{})
		err := d.Up(f, f.layout(c.near, 0), func(error) {})
		if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "disk0") {
			t.Errorf("%v, want %q", err, c.want)
		}
		d.Down()
		// The driver is not spoilt by it.
		g := newFake(t, pattern(1<<20, 1))
		up(t, d, g, 1<<20, 0)
		stop := g.serve()
		if b, err := do(d, Request{Op: Read, Length: 512, Data: make([]byte, 512)}); err != nil || b[5] != pattern(6, 1)[5] {
			t.Error(err)
		}
		stop()
		d.Close()
	}
	for _, c := range []Config{{Queues: -1}, {Queues: MaxQueues + 1}, {QueueSize: 2}, {QueueSize: 48}} {
		if _, err := New(c); err == nil {
			t.Errorf("New takes %+v", c)
		}
	}
}

// A change of the size is taken over while requests run.
func TestResize(t *testing.T) {
	disk := make([]byte, 2<<20)
	f := newFake(t, disk[:1<<20])
	changes := make(chan Info, 16)
	var d *Disk
	d = newDisk(t, Config{Changed: func() {
		if i, ok := d.Info(); ok {
			changes <- i
		}
	}})
	select {
	case <-d.Ready():
		t.Error("the size is known before the device has come up")
	default:
	}
	up(t, d, f, 1<<20, 0)
	<-d.Ready()
	stop := f.serve()
	last := Request{Op: Read, Offset: 2<<20 - 512, Length: 512, Data: make([]byte, 512)}
	if _, err := do(d, last); !errors.Is(err, ErrRange) {
		t.Errorf("behind the end: %v", err)
	}
	stop()
	f.disk, f.config.Capacity = disk, 4096
	if err := d.Reconfigure(f); err != nil {
		t.Fatal(err)
	}
	stop = f.serve()
	if _, err := do(d, last); err != nil {
		t.Errorf("after it has grown: %v", err)
	}
	stop()
	var size uint64
	for len(changes) > 0 {
		size = (<-changes).Size
	}
	if n := d.Status().Counters; size != 2<<20 || n["size_changes"] != 1 || n["size_bytes"] != 2<<20 {
		t.Errorf("size %d, %v", size, n)
	}
}
