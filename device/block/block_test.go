package block

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/device/internal/plaintest"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/pci"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/vring"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fake is a backend in memory that can be made to block and to fail.
type fake struct {
	geo Geometry

	mu      sync.Mutex
	mem     []byte
	gate    chan struct{} // nil: calls do not wait
	waiting int
	calls   []string
	fail    error // of the next calls
	aborts  int
	closed  int
}

func newFake(size int) *fake {
	return &fake{mem: make([]byte, size), geo: Geometry{Name: "fake", Size: uint64(size), BlockSize: 512, Discard: true, Remote: true}}
}

func (f *fake) Geometry() Geometry { return f.geo }

func (f *fake) enter(call string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, call)
	if g := f.gate; g != nil {
		f.waiting++
		f.mu.Unlock()
		<-g
		f.mu.Lock()
		f.waiting--
	}
	return f.fail
}

func (f *fake) ReadAt(bufs []unix.Iovec, off uint64) error {
	if err := f.enter("read"); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, b := range bufs {
		off += uint64(copy(unsafe.Slice(b.Base, int(b.Len)), f.mem[off:]))
	}
	return nil
}

func (f *fake) WriteAt(bufs []unix.Iovec, off uint64, durable bool) error {
	call := "write"
	if durable {
		call = "write durable"
	}
	if err := f.enter(call); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, b := range bufs {
		off += uint64(copy(f.mem[off:], unsafe.Slice(b.Base, int(b.Len))))
	}
	return nil
}

func (f *fake) Flush() error { return f.enter("flush") }

func (f *fake) Discard(off, n uint64) error {
	for i := range f.mem[off : off+n] {
		f.mem[off+uint64(i)] = 0xdd
	}
	return f.enter("discard")
}

func (f *fake) WriteZeroes(off, n uint64, unmap bool) error {
	f.enter("zeroes")
	return ErrUnsupported
}

func (f *fake) Abort() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.aborts++
	if f.gate != nil {
		f.fail = ErrAborted
		close(f.gate)
		f.gate = nil
	}
}

func (f *fake) Close() error { f.closed++; return nil }

// took returns the calls since the last took.
func (f *fake) took() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	c := f.calls
	f.calls = nil
	return c
}

// wait waits until so many calls wait at the gate.
func (f *fake) wait(t *testing.T, n int) {
	t.Helper()
	for begin := time.Now(); ; time.Sleep(100 * time.Microsecond) {
		f.mu.Lock()
		w := f.waiting
		f.mu.Unlock()
		if w == n {
			return
		}
		if time.Since(begin) > 20*time.Second {
			t.Fatalf("%d calls wait, want %d", w, n)
		}
	}
}

// open opens the gate.
func (f *fake) open() {
	f.mu.Lock()
	defer f.mu.Unlock()
	close(f.gate)
	f.gate = nil
}

// disk is a model and the rig that drives it.
type disk struct {
	*plaintest.Rig
	b *Block
	t testing.TB
	q *plaintest.Queue
}

// split returns the features of a disk but for packed queues, which package plaintest has no driver for.
func split(b *Block) virtio.Features {
	return b.Features().Without(virtio.FeaturesOf(virtio.RingPacked))
}

// newDisk returns a disk with a started queue in memory of a kind. The driver accepts all features but without.
func newDisk(t testing.TB, c Config, kind mmio.Kind, without ...virtio.Feature) *disk {
	t.Helper()
	c.Name = "root"
	b, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	d := &disk{b: b, t: t, Rig: plaintest.NewKind(t, b, split(b).Without(virtio.FeaturesOf(without...)), 16<<20, kind)}
	d.q = d.Queue(0, 64)
	d.q.Start(vring.State{})
	return d
}

// restart resets the device and starts its queue anew.
func (d *disk) restart() {
	d.t.Helper()
	if err := d.b.Reset(time.Time{}); err != nil {
		d.t.Fatal(err)
	}
	if err := d.b.SetFeatures(split(d.b), device.Options{}); err != nil {
		d.t.Fatal(err)
	}
	d.q.Start(vring.State{})
}

// Only what is alone, short, and has been quick is served by the queue's goroutine.
func TestPace(t *testing.T) {
	var p pace
	for _, c := range []struct {
		read, write uint32
		want        bool
	}{{16, 4097, true}, {16 + 4096, 1, true}, {16, 1, false}, {32, 1, false}, {16, 21, false}, {16, quickLen + 1, true}, {16, 2*quickLen + 1, false}} {
		if got := p.quick(c.read, c.write); got != c.want {
			t.Errorf("%d and %d bytes: %v", c.read, c.write, got)
		}
	}
	for i := 0; i < 10; i++ {
		p.served(20 * time.Microsecond)
	}
	if !p.quick(16, 513) {
		t.Error("not after quick ones")
	}
	p.served(time.Second) // a disk that sleeps
	if p.quick(16, 513) {
		t.Error("after a slow one")
	}
	for i := 0; i < 40; i++ {
		p.served(20 * time.Microsecond)
	}
	if !p.quick(16, 513) {
		t.Error("not after many quick ones")
	}
	// Of several at a time none is: that the first one waits for the image does not hold up the second one.
	f := newFake(1 << 20)
	f.gate = make(chan struct{})
	d := newDisk(t, Config{Backend: f}, mmio.Cached)
	d.q.Add(d.request(virtio.BlkTIn, 0, false, 512).vring(1), d.request(virtio.BlkTIn, 0, false, 512).vring(2))
	f.wait(t, 2)
	f.open()
	d.q.Wait(2)
}

// req is a request as a driver lays it out.
type req struct {
	head     []dma.Span // readable
	data     []dma.Span // readable or writable
	write    bool       // data is readable
	status   dma.Span
	noStatus bool
}

func (d *disk) fill(s dma.Span, b []byte) dma.Span { s.CopyIn(0, b); return s }

// bytesOf returns what lies in the spans.
func bytesOf(spans ...dma.Span) (b []byte) {
	for _, s := range spans {
		p := make([]byte, s.Len)
		s.CopyOut(p, 0)
		b = append(b, p...)
	}
	return b
}

// request makes a request of a type with data of lengths.
func (d *disk) request(kind uint32, sector uint64, write bool, lens ...int) *req {
	h := virtio.BlkHeader{Type: kind, Sector: sector}.Encode()
	r := &req{head: []dma.Span{d.fill(d.Take(virtio.BlkHeaderLen), h[:])}, write: write, status: d.fill(d.Take(1), []byte{0xff})}
	for _, n := range lens {
		r.data = append(r.data, d.Take(uint64(n)))
	}
	return r
}

// vring returns the request for the queue.
func (r *req) vring(token uint32) vring.Request {
	v := vring.Request{Token: token}
	add := func(spans ...dma.Span) {
		for _, s := range spans {
			v.Bufs = append(v.Bufs, vring.Buffer{Addr: s.Addr(), Len: s.Len})
		}
	}
	add(r.head...)
	if r.write {
		add(r.data...)
	}
	v.Readable = len(v.Bufs)
	if !r.write {
		add(r.data...)
	}
	if !r.noStatus {
		add(r.status)
	}
	return v
}

// do has a request served and returns its status.
func (d *disk) do(r *req) byte {
	d.t.Helper()
	d.q.Add(r.vring(1))
	c := d.q.Wait(1)[0]
	want := r.status.Len
	if !r.write {
		for _, s := range r.data {
			want += s.Len
		}
	}
	if c.Token != 1 || c.Len != want {
		d.t.Errorf("completion %+v, want a length of %d", c, want)
	}
	b := bytesOf(r.status)
	return b[len(b)-1]
}

// read returns n bytes at a sector.
func (d *disk) read(sector uint64, n int) []byte {
	d.t.Helper()
	r := d.request(virtio.BlkTIn, sector, false, n)
	if st := d.do(r); st != virtio.BlkOK {
		d.t.Fatalf("read: status %d", st)
	}
	return bytesOf(r.data...)
}

// write writes b at a sector and returns the status.
func (d *disk) write(sector uint64, b []byte) byte {
	d.t.Helper()
	r := d.request(virtio.BlkTOut, sector, true, len(b))
	d.fill(r.data[0], b)
	return d.do(r)
}

// pattern returns n bytes that differ with seed and place.
func pattern(seed byte, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = seed + byte(i) + byte(i>>8)*7
	}
	return b
}

// image returns a file of n bytes.
func image(t testing.TB, n int) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), "root.img")
	if err := os.WriteFile(p, make([]byte, n), 0o600); err != nil {
		t.Fatal(err)
	}
	return p
}

func openImage(t testing.TB, c FileConfig) Backend {
	t.Helper()
	f, err := OpenFile(c)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// Data comes and goes at the right place, in memory and in device memory, however the driver cuts header, data and status into
// buffers (virtio 1.2, 2.7.4), also in requests longer than what is moved at once.
func TestReadWrite(t *testing.T) {
	for _, c := range []struct {
		name   string
		kind   mmio.Kind
		direct bool
	}{{"cached", mmio.Cached, false}, {"uncached", mmio.Uncached, false}, {"direct", mmio.Cached, true}} {
		c := c
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			path := image(t, 8<<20)
			be, err := OpenFile(FileConfig{Path: path, Direct: c.direct})
			if c.direct && err != nil && strings.Contains(err.Error(), "O_DIRECT") {
				absent(t, "%v", err)
			} else if err != nil {
				t.Fatal(err)
			}
			d := newDisk(t, Config{Backend: be}, c.kind)
			want := make([]byte, 8<<20)
			put := func(sector uint64, r *req) {
				t.Helper()
				off := int(sector * 512)
				for i, s := range r.data {
					b := pattern(byte(i+off), int(s.Len))
					d.fill(s, b)
					off += copy(want[off:], b)
				}
				if st := d.do(r); st != virtio.BlkOK {
					t.Fatalf("write at sector %d: status %d", sector, st)
				}
			}
			put(0, d.request(virtio.BlkTOut, 0, true, 512))
			put(7, d.request(virtio.BlkTOut, 7, true, 1, 510, 1025, 4096, 512))
			put(1024, d.request(virtio.BlkTOut, 1024, true, 5<<20)) // more than maxCall and stagingLen
			put(16383, d.request(virtio.BlkTOut, 16383, true, 512)) // the last sector
			// The header in three buffers, the last with data in it.
			r := d.request(virtio.BlkTOut, 100, true)
			h := virtio.BlkHeader{Type: virtio.BlkTOut, Sector: 100}.Encode()
			data := pattern(9, 1024)
			copy(want[100*512:], data)
			r.head = []dma.Span{d.fill(d.Take(3), h[:3]), d.fill(d.Take(10), h[3:13]), d.fill(d.Take(3+24), append(append([]byte{}, h[13:]...), data[:24]...)),
				d.fill(d.Take(1000), data[24:])}
			if st := d.do(r); st != virtio.BlkOK {
				t.Fatalf("split header: status %d", st)
			}
			got, err := os.ReadFile(path)
			if err != nil || !bytes.Equal(got, want) {
				t.Fatalf("the file differs from what was written (%v)", err)
			}
			for _, at := range []struct{ sector, n int }{{0, 1}, {3, 30}, {100, 2}, {1000, 10500}, {16383, 1}} {
				if got := d.read(uint64(at.sector), at.n*512); !bytes.Equal(got, want[at.sector*512:][:at.n*512]) {
					t.Errorf("%d sectors at %d differ", at.n, at.sector)
				}
			}
			// The status in one buffer with the end of the data.
			r = d.request(virtio.BlkTIn, 100, false, 100, 412)
			r.status = d.Take(513)
			if st := d.do(r); st != virtio.BlkOK || !bytes.Equal(append(bytesOf(r.data...), bytesOf(r.status)[:512]...), data) {
				t.Errorf("status %d, or the data differ", st)
			}
			n := d.b.Status().Counters
			if n["writes"] != 5 || n["reads"] != 6 || n["written_bytes"] != 512+6144+5<<20+512+1024 || (n["staged"] != 0) != (c.kind != mmio.Cached) {
				t.Errorf("counters %v", n)
			}
		})
	}
}

// What the driver reads and may not write, or asks for beyond the end, is answered; nothing of the disk changes, nor of memory.
func TestRefused(t *testing.T) {
	f := newFake(1 << 20) // 2048 sectors
	copy(f.mem, pattern(1, 1<<20))
	before := append([]byte(nil), f.mem...)
	d := newDisk(t, Config{Backend: f, Serial: "BL-0001"}, mmio.Cached)
	segs := func(kind uint32, g ...virtio.BlkSegment) *req {
		r := d.request(kind, 0, true, len(g)*virtio.BlkSegmentLen)
		for i := range g {
			b := g[i].Encode()
			r.data[0].CopyIn(uint32(i*virtio.BlkSegmentLen), b[:])
		}
		return r
	}
	many := make([]virtio.BlkSegment, maxSegments+1)
	for i := range many {
		many[i] = virtio.BlkSegment{Sector: uint64(i), Sectors: 1}
	}
	const bad, unsupported = virtio.BlkIOErr, virtio.BlkUnsupp
	for _, c := range []struct {
		name string
		r    *req
		want byte
	}{
		{"read beyond the end", d.request(virtio.BlkTIn, 2048, false, 512), bad},
		{"read across the end", d.request(virtio.BlkTIn, 2047, false, 1024), bad},
		{"read, sector overflows", d.request(virtio.BlkTIn, 1<<64-1, false, 512), bad},
		{"read, bytes overflow", d.request(virtio.BlkTIn, 1<<55, false, 512), bad},
		{"read of 511 bytes", d.request(virtio.BlkTIn, 0, false, 511), bad},
		{"read of nothing", d.request(virtio.BlkTIn, 0, false), bad},
		{"read with data to read", d.request(virtio.BlkTIn, 0, true, 512), bad},
		{"write beyond the end", d.request(virtio.BlkTOut, 2048, true, 512), bad},
		{"write, sector overflows", d.request(virtio.BlkTOut, 1<<64-1, true, 1024), bad},
		{"write of 513 bytes", d.request(virtio.BlkTOut, 0, true, 513), bad},
		{"write with data to write", d.request(virtio.BlkTOut, 0, false, 512), bad},
		{"flush with data", d.request(virtio.BlkTFlush, 0, true, 512), bad},
		{"GET_ID into nothing", d.request(virtio.BlkTGetID, 0, false), bad},
		{"a type that is none", d.request(0x12345678, 0, false, 512), unsupported},
		{"secure erase", d.request(14, 0, true, 16), unsupported},
		{"discard of nothing", d.request(virtio.BlkTDiscard, 0, true), bad},
		{"discard of half a segment", d.request(virtio.BlkTDiscard, 0, true, 24), bad},
		{"discard beyond the end", segs(virtio.BlkTDiscard, virtio.BlkSegment{Sector: 2040, Sectors: 9}), bad},
		{"discard, overflows", segs(virtio.BlkTDiscard, virtio.BlkSegment{Sector: 1<<64 - 1, Sectors: 1}), bad},
		{"discard of no sectors", segs(virtio.BlkTDiscard, virtio.BlkSegment{Sector: 1}), bad},
		{"discard, the second is bad", segs(virtio.BlkTDiscard, virtio.BlkSegment{Sectors: 8}, virtio.BlkSegment{Sector: 4000, Sectors: 1}), bad},
		{"discard of too many", segs(virtio.BlkTDiscard, many...), bad},
		{"discard with unmap", segs(virtio.BlkTDiscard, virtio.BlkSegment{Sectors: 1, Flags: virtio.BlkUnmap}), unsupported},
		{"zeroes with unknown flags", segs(virtio.BlkTWriteZeroes, virtio.BlkSegment{Sectors: 1, Flags: 2}), unsupported},
		{"zeroes of too much", segs(virtio.BlkTWriteZeroes, virtio.BlkSegment{Sectors: maxRange + 1}), bad},
	} {
		if got := d.do(c.r); got != c.want {
			t.Errorf("%s: status %d, want %d", c.name, got, c.want)
		}
		if !c.r.write {
			for i, v := range bytesOf(c.r.data...) {
				if v != 0 {
					t.Errorf("%s: byte %d of the data was written", c.name, i)
					break
				}
			}
		}
	}
	if calls := f.took(); calls != nil || !bytes.Equal(f.mem, before) {
		t.Errorf("the image was touched: %v", calls)
	}
	if n := d.b.Status().Counters; n["refused"] != 21 || n["unsupported"] != 4 || n["failed"] != 0 || n["broken"] != 0 {
		t.Errorf("counters %v", n)
	}

	// And what is right.
	r := d.request(virtio.BlkTGetID, 0, false, virtio.BlkIDLen)
	if st := d.do(r); st != virtio.BlkOK || !bytes.Equal(bytesOf(r.data...), append([]byte("BL-0001"), make([]byte, 13)...)) {
		t.Errorf("GET_ID: status %d, %q", st, bytesOf(r.data...))
	}
	if st := d.do(segs(virtio.BlkTDiscard, virtio.BlkSegment{Sector: 8, Sectors: 8}, virtio.BlkSegment{Sector: 2047, Sectors: 1})); st != virtio.BlkOK || f.mem[8*512] != 0xdd || f.mem[1<<20-1] != 0xdd {
		t.Errorf("discard: status %d", st)
	}
	if st := d.do(segs(virtio.BlkTWriteZeroes, virtio.BlkSegment{Sector: 100, Sectors: 1000, Flags: virtio.BlkUnmap})); st != virtio.BlkOK {
		t.Errorf("zeroes: status %d", st)
	}
	want := append([]byte(nil), before...)
	copy(want[100*512:], make([]byte, 1000*512))
	if !bytes.Equal(f.mem[100*512-1:2000*512], want[100*512-1:2000*512]) {
		t.Error("zeroes: other bytes than those, or not all of them")
	}
	if c := f.took(); !reflect.DeepEqual(c, []string{"discard", "discard", "zeroes", "write", "write"}) { // 500 KiB in pieces of 256
		t.Errorf("calls %v", c)
	}
}

// A disk that is read-only, or whose driver did not accept features, does not do what belongs to them.
func TestNotOffered(t *testing.T) {
	f := newFake(1 << 20)
	f.geo.ReadOnly = true
	d := newDisk(t, Config{Backend: f}, mmio.Cached)
	if fs := d.b.Features(); !fs.Has(virtio.BlkRO) || fs.Has(virtio.BlkConfigWCE) || fs.Has(virtio.BlkDiscard) || fs.Has(virtio.BlkWriteZeroes) {
		t.Errorf("read-only: offers %v", virtio.BlkNames(fs))
	}
	if st := d.write(0, make([]byte, 512)); st != virtio.BlkIOErr {
		t.Errorf("write of a read-only disk: status %d", st)
	}
	if st := d.do(d.request(virtio.BlkTDiscard, 0, true, 16)); st != virtio.BlkUnsupp {
		t.Errorf("discard of a read-only disk: status %d", st)
	}
	if f.took() != nil {
		t.Error("the image was touched")
	}

	f = newFake(1 << 20)
	d = newDisk(t, Config{Backend: f}, mmio.Cached, virtio.BlkFlush, virtio.BlkConfigWCE, virtio.BlkDiscard, virtio.BlkWriteZeroes)
	for _, kind := range []uint32{virtio.BlkTFlush, virtio.BlkTDiscard, virtio.BlkTWriteZeroes} {
		if st := d.do(d.request(kind, 0, true)); st != virtio.BlkUnsupp {
			t.Errorf("type %d, not accepted: status %d", kind, st)
		}
	}
	// Without flushes, each write is on stable storage when it ends (virtio 1.2, 5.2.6.2).
	if st := d.write(0, make([]byte, 512)); st != virtio.BlkOK {
		t.Error(st)
	}
	if c := f.took(); !reflect.DeepEqual(c, []string{"write durable"}) {
		t.Errorf("calls %v", c)
	}
}

// A request without header or status breaks the queue, with an error of its own. What is under way ends, and after a reset the disk
// works again.
func TestMalformed(t *testing.T) {
	f := newFake(1 << 20)
	d := newDisk(t, Config{Backend: f}, mmio.Cached)
	for i, c := range []struct {
		make func() *req
		want error
	}{
		{func() *req { r := d.request(0, 0, false, 512); r.head[0] = r.head[0].Sub(0, 15); return r }, ErrHeader},
		{func() *req { r := d.request(0, 0, false, 512); r.head = nil; return r }, ErrHeader},
		{func() *req { r := d.request(virtio.BlkTOut, 0, true, 512); r.noStatus = true; return r }, ErrStatus},
		{func() *req { r := d.request(virtio.BlkTFlush, 0, true); r.noStatus = true; return r }, ErrStatus},
	} {
		f.mu.Lock()
		f.gate = make(chan struct{})
		f.mu.Unlock()
		under := d.request(virtio.BlkTIn, 0, false, 512)
		d.q.Add(under.vring(7))
		f.wait(t, 1)
		d.q.Add(c.make().vring(8))
		if err := d.Broken(); !errors.Is(err, c.want) || device.CauseOf(err) != device.CausePeer || !strings.Contains(err.Error(), "root") {
			t.Errorf("%d: %v, want %v", i, err, c.want)
		}
		f.open()
		if done := d.q.Wait(1)[0]; done.Token != 7 || bytesOf(under.status)[0] != virtio.BlkOK {
			t.Errorf("%d: the request under way: %+v, status %d", i, done, bytesOf(under.status)[0])
		}
		if n := d.b.Status(); n.Counters["broken"] != uint64(i+1) || n.LastError == "" {
			t.Errorf("%d: %v %q", i, n.Counters, n.LastError)
		}
		d.q = d.Queue(0, 64)
		d.restart()
		if got := d.read(0, 512); !bytes.Equal(got, f.mem[:512]) {
			t.Errorf("%d: after the reset the data differ", i)
		}
	}
}

// Requests are under way at the same time and end in any order. A queue that is stopped waits for them, up to the deadline, and goes on
// where it stopped, with nothing lost or done twice.
func TestInFlight(t *testing.T) {
	f := newFake(1 << 20)
	f.gate = make(chan struct{})
	d := newDisk(t, Config{Backend: f}, mmio.Cached)
	var slow []*req
	for i := 0; i < 8; i++ {
		r := d.request(virtio.BlkTOut, uint64(i), true, 512)
		d.fill(r.data[0], pattern(byte(i), 512))
		slow = append(slow, r)
		d.q.Add(r.vring(uint32(i)))
	}
	f.wait(t, 8)
	// GET_ID needs no backend, and overtakes them.
	id := d.request(virtio.BlkTGetID, 0, false, virtio.BlkIDLen)
	d.q.Add(id.vring(100))
	if c := d.q.Wait(1)[0]; c.Token != 100 {
		t.Fatalf("%+v", c)
	}
	if _, err := d.b.StopQueue(0, time.Now().Add(50*time.Millisecond)); !errors.Is(err, device.ErrStuck) {
		t.Fatalf("with requests under way: %v", err)
	}
	// The status can be asked for meanwhile.
	if s := d.b.Status(); !s.Queues[0].Ready {
		t.Errorf("%+v", s)
	}
	f.open()
	st, err := d.b.StopQueue(0, time.Time{})
	if err != nil || st.Err != nil || st.State.Avail != 9 || st.State.Used != 9 {
		t.Fatalf("%+v, %v", st, err)
	}
	seen := map[uint32]bool{}
	for _, c := range d.q.Wait(8) {
		seen[c.Token] = true
	}
	for i, r := range slow {
		if !seen[uint32(i)] || bytesOf(r.status)[0] != virtio.BlkOK || !bytes.Equal(f.mem[i*512:(i+1)*512], pattern(byte(i), 512)) {
			t.Errorf("request %d", i)
		}
	}
	d.q.Start(st.State)
	if got := d.read(3, 512); !bytes.Equal(got, pattern(3, 512)) {
		t.Error("after the start the data differ")
	}
}

// Where chains are to be completed in order, one that ended early waits for those before it, and all are completed then.
func TestInOrder(t *testing.T) {
	f := newFake(1 << 20)
	d := newDisk(t, Config{Backend: f}, mmio.Cached)
	if err := d.b.Reset(time.Time{}); err != nil {
		t.Fatal(err)
	}
	if err := d.b.SetFeatures(split(d.b), device.Options{InOrder: true}); err != nil {
		t.Fatal(err)
	}
	d.q = d.Queue(0, 16)
	d.q.Start(vring.State{})
	for round := 0; round < 10; round++ { // the ring goes round
		f.mu.Lock()
		f.gate = make(chan struct{})
		f.mu.Unlock()
		d.q.Add(d.request(virtio.BlkTIn, 0, false, 512).vring(0))
		f.wait(t, 1)
		for i := 1; i < 4; i++ {
			r := d.request(virtio.BlkTGetID, 0, false, virtio.BlkIDLen)
			d.q.Add(r.vring(uint32(i)))
			for begin := time.Now(); d.b.Status().Counters["other"] != uint64(3*round+i); time.Sleep(100 * time.Microsecond) {
				if time.Since(begin) > 20*time.Second {
					t.Fatal("it does not overtake the first one")
				}
			}
		}
		if n, err := d.q.Reap(make([]vring.Completion, 4)); n != 0 || err != nil {
			t.Fatalf("%d chains are completed before the first one (%v)", n, err)
		}
		f.open()
		for i, c := range d.q.Wait(4) {
			if c.Token != uint32(i) {
				t.Errorf("chain %d is completed as number %d", c.Token, i)
			}
		}
	}
	if st, err := d.b.StopQueue(0, time.Time{}); err != nil || st.State.Avail != 40 || st.State.Used != 40 {
		t.Errorf("%+v, %v", st, err)
	}
}

// A backend that waits for somebody does not hold up a reset: it is told to give up. Requests that it has not seen are dropped.
func TestResetAborts(t *testing.T) {
	f := newFake(1 << 20)
	f.geo.Parallel = 2
	f.gate = make(chan struct{})
	d := newDisk(t, Config{Backend: f}, mmio.Cached)
	for i := 0; i < 5; i++ {
		d.q.Add(d.request(virtio.BlkTOut, uint64(i), true, 512).vring(uint32(i)))
	}
	f.wait(t, 2)
	if err := d.b.Reset(time.Now().Add(100 * time.Millisecond)); err != nil && !errors.Is(err, device.ErrStuck) {
		t.Fatal(err)
	}
	if err := d.b.Reset(time.Time{}); err != nil {
		t.Fatal(err)
	}
	if n := d.b.Status().Counters; f.aborts < 1 || n["dropped"] != 5 || len(f.took()) != 2 {
		t.Errorf("%d aborts, counters %v", f.aborts, n)
	}
	if done, err := d.q.Reap(make([]vring.Completion, 8)); done != 0 || err != nil {
		t.Errorf("%d requests were completed after the reset (%v)", done, err)
	}
}

// One flush of the driver is one sync call, and with the write cache off each write is durable and needs none.
func TestFlush(t *testing.T) {
	be := openImage(t, FileConfig{Path: image(t, 1<<20)})
	syncs := int32(0)
	be.(*file).sync = func(fd int) error { atomic.AddInt32(&syncs, 1); return unix.Fdatasync(fd) }
	d := newDisk(t, Config{Backend: be}, mmio.Cached)
	for i := 0; i < 10; i++ {
		if st := d.write(uint64(i), make([]byte, 512)); st != virtio.BlkOK {
			t.Fatal(st)
		}
		if n := atomic.LoadInt32(&syncs); n != int32(i) {
			t.Fatalf("%d syncs after %d flushes and a write", n, i)
		}
		if st := d.do(d.request(virtio.BlkTFlush, 0, true)); st != virtio.BlkOK {
			t.Fatal(st)
		}
	}
	if n := atomic.LoadInt32(&syncs); n != 10 || d.b.Status().Counters["syncs"] != 10 || d.b.Status().Counters["flushes"] != 10 {
		t.Errorf("%d syncs of 10 flushes, %v", n, d.b.Status().Counters)
	}

	f := newFake(1 << 20)
	d = newDisk(t, Config{Backend: f}, mmio.Cached)
	wce := func(want bool) {
		t.Helper()
		if c := virtio.DecodeBlkConfig(d.b.Config()); c.Writeback != want {
			t.Errorf("writeback %v, want %v", c.Writeback, want)
		}
	}
	wce(true)
	for _, bad := range []struct {
		off uint32
		b   []byte
	}{{0, []byte{1}}, {31, []byte{0, 0}}, {32, []byte{0, 0}}, {33, []byte{0}}, {32, []byte{2}}, {32, nil}} {
		if err := d.b.WriteConfig(bad.off, bad.b); err != device.ErrReadOnly {
			t.Errorf("write of %v at %d: %v", bad.b, bad.off, err)
		}
	}
	wce(true)
	for _, on := range []byte{0, 1} {
		if err := d.b.WriteConfig(virtio.BlkWritebackOff, []byte{on}); err != nil {
			t.Fatal(err)
		}
		wce(on == 1)
		d.write(0, make([]byte, 512))
	}
	if c := f.took(); !reflect.DeepEqual(c, []string{"write durable", "write"}) {
		t.Errorf("calls %v", c)
	}
	// A reset turns it on again.
	d.b.WriteConfig(virtio.BlkWritebackOff, []byte{0})
	if err := d.b.Reset(time.Time{}); err != nil {
		t.Fatal(err)
	}
	wce(true)

	// The operator's write-through is not the driver's to change.
	f = newFake(1 << 20)
	d = newDisk(t, Config{Backend: f, WriteThrough: true}, mmio.Cached)
	wce(false)
	if err := d.b.WriteConfig(virtio.BlkWritebackOff, []byte{1}); err != device.ErrReadOnly {
		t.Error(err)
	}
	d.write(0, make([]byte, 512))
	if c := f.took(); !reflect.DeepEqual(c, []string{"write durable"}) {
		t.Errorf("calls %v", c)
	}
}

// Errors of the image are the request's; one line of the log tells of the first. After a failed flush no later one succeeds.
func TestImageFails(t *testing.T) {
	f := newFake(1 << 20)
	var mu sync.Mutex
	var lines []string
	d := newDisk(t, Config{Backend: f, Logf: func(s string, a ...interface{}) { mu.Lock(); lines = append(lines, s); mu.Unlock() }}, mmio.Cached)
	set := func(err error) { f.mu.Lock(); f.fail = err; f.mu.Unlock() }
	for _, e := range []error{unix.EIO, unix.ENOSPC, unix.ENOSPC, unix.EDQUOT, unix.EIO} {
		set(e)
		if st := d.write(0, make([]byte, 512)); st != virtio.BlkIOErr {
			t.Errorf("%v: status %d", e, st)
		}
	}
	set(nil)
	if st := d.write(0, make([]byte, 512)); st != virtio.BlkOK {
		t.Errorf("afterwards: status %d", st)
	}
	if n := d.b.Status().Counters; n["failed"] != 5 || n["full"] != 3 || len(lines) != 2 {
		t.Errorf("counters %v, %d lines", n, len(lines))
	}
	flush := func() byte { return d.do(d.request(virtio.BlkTFlush, 0, true)) }
	if st := flush(); st != virtio.BlkOK {
		t.Error(st)
	}
	set(unix.EIO)
	if st := flush(); st != virtio.BlkIOErr {
		t.Error(st)
	}
	set(nil)
	if st := flush(); st != virtio.BlkIOErr {
		t.Errorf("a flush after one that failed: status %d", st)
	}
}

// Memory that its owner truncates is an error of the memory, whether a system call finds it or this program.
func TestMemoryGone(t *testing.T) {
	for _, c := range []struct {
		name string
		kind mmio.Kind
	}{{"system call", mmio.Cached}, {"copy", mmio.Uncached}} {
		t.Run(c.name, func(t *testing.T) {
			fd, err := unix.MemfdCreate("mem", unix.MFD_CLOEXEC)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(fd)
			const size = 1 << 20
			if err := unix.Ftruncate(fd, size); err != nil {
				t.Fatal(err)
			}
			m, err := unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Munmap(m)
			defer pci.GuardShared(uintptr(unsafe.Pointer(&m[0])), size, "mem")()
			b, err := New(Config{Name: "root", Backend: openImage(t, FileConfig{Path: image(t, 1<<20)})})
			if err != nil {
				t.Fatal(err)
			}
			d := &disk{b: b, t: t, Rig: plaintest.NewMem(t, b, split(b), mmio.NewMem(unsafe.Pointer(&m[0]), size, c.kind))}
			defer b.Close()
			d.q = d.Queue(0, 64)
			d.q.Start(vring.State{})
			d.read(0, 4096)
			d.Take(128 << 10)
			r := d.request(virtio.BlkTIn, 0, false)
			r.data = []dma.Span{d.Take(64 << 10)}
			if err := unix.Ftruncate(fd, int64(r.data[0].Off)); err != nil {
				t.Fatal(err)
			}
			d.q.Add(r.vring(1))
			if err := d.Broken(); device.CauseOf(err) != device.CauseMemory {
				t.Errorf("%v", err)
			}
		})
	}
}

func TestNew(t *testing.T) {
	f := newFake(1 << 20)
	for want, c := range map[string]Config{
		"17 queues":              {Queues: 17},
		"-1 queues":              {Queues: -1},
		"serial number of 21":    {Serial: "123456789012345678901"},
		"serial number of 2":     {Serial: "1\x00"},
		"1000 bytes in blocks":   {Backend: &fake{geo: Geometry{Size: 1000, BlockSize: 512}}},
		"in blocks of 700":       {Backend: &fake{geo: Geometry{Size: 1024, BlockSize: 700}}},
		"0 bytes in blocks of 5": {Backend: &fake{geo: Geometry{BlockSize: 512}}},
	} {
		if c.Backend == nil {
			c.Backend = f
		}
		c.Name = "root"
		if b, err := New(c); err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: %v, %v", want, b, err)
		}
	}
	f.geo.Physical, f.geo.BlockSize, f.geo.MinIO, f.geo.OptIO = 4096, 512, 4096, 1<<20
	b, err := New(Config{Name: "root", Backend: f, Queues: 4, Deny: virtio.FeaturesOf(virtio.BlkFlush, virtio.EventIdx)})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	// The network device's bits do not count, those of all devices do.
	if fs := b.Features(); !fs.Has(virtio.BlkFlush) || fs.Has(virtio.EventIdx) || !fs.Has(virtio.BlkMQ) {
		t.Errorf("%v", virtio.BlkNames(fs))
	}
	if c := virtio.DecodeBlkConfig(b.Config()); c != (virtio.BlkConfig{Capacity: 2048, SegMax: segMax, BlkSize: 512, PhysExp: 3, MinIO: 8, OptIO: 2048, Writeback: true,
		NumQueues: 4, MaxDiscard: maxRange, MaxDiscardSegs: maxSegments, DiscardAlign: 1, MaxZeroes: maxRange, MaxZeroesSegs: maxSegments, ZeroesMayUnmap: true}) {
		t.Errorf("%+v", c)
	}
	if s := b.Status(); len(s.Queues) != 4 || s.Queues[3].Name != "root requests 3" {
		t.Errorf("status %+v", s.Queues)
	}
	if b.Queues() != 4 || b.Queue(0).Max != queueMax || b.Queue(1).Max != 0 {
		t.Errorf("queues before features: %+v", b.Queue(1))
	}
	if err := b.SetFeatures(virtio.FeaturesOf(virtio.Version1, virtio.BlkMQ), device.Options{}); err != nil || b.Queue(3).Max != queueMax || b.Queue(4).Max != 0 {
		t.Errorf("queues with MQ: %+v, %v", b.Queue(3), err)
	}
}
