package vhostuser

import (
	"bytes"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/device/block"
	"github.com/boardlink/boardlink/device/entropy"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/vring"
)

// gated is a backend whose reads at offset 0 wait for the gate.
type gated struct {
	block.Backend
	mu   sync.Mutex
	gate chan struct{} // nil: they do not wait
}

// Geometry says that calls may wait for somebody else, so that no queue waits for them.
func (g *gated) Geometry() block.Geometry {
	geo := g.Backend.Geometry()
	geo.Remote = true
	return geo
}

func (g *gated) ReadAt(bufs []unix.Iovec, off uint64) error {
	g.mu.Lock()
	gate := g.gate
	g.mu.Unlock()
	if off == 0 && gate != nil {
		<-gate
	}
	return g.Backend.ReadAt(bufs, off)
}

// open lets what waits go on.
func (g *gated) open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.gate != nil {
		close(g.gate)
		g.gate = nil
	}
}

// newDisk returns a disk of 1 MiB whose sectors hold their numbers.
func newDisk(t *testing.T) (*block.Block, *gated) {
	path := filepath.Join(t.TempDir(), "disk.img")
	var img []byte
	for i := 0; i < 2048; i++ {
		img = append(img, bytes.Repeat([]byte{byte(i)}, 512)...)
	}
	if err := os.WriteFile(path, img, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := block.OpenFile(block.FileConfig{Path: path})
	if err != nil {
		t.Fatal(err)
	}
	g := &gated{Backend: f}
	b, err := block.New(block.Config{Name: "root", Backend: g, Serial: "BL-7", Queues: 2})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		g.open()
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	})
	return b, g
}

// blk adds a request of a page's data as buffer n; 512 bytes of it are used.
func (f *front) blk(n int, kind uint32, sector uint64) {
	f.t.Helper()
	q := &f.qs[0]
	off := buffer(0, n)
	h := virtio.BlkHeader{Type: kind, Sector: sector}.Encode()
	f.mem.CopyIn(off, h[:])
	f.mem.CopyIn(off+1024, []byte{0xff})
	at := func(o uint64, n uint32) vring.Buffer { return vring.Buffer{Addr: guestBase + dma.Addr(off+o), Len: n} }
	r := vring.Request{Token: uint32(n), Readable: 1, Bufs: []vring.Buffer{at(0, 16), at(512, 512), at(1024, 1)}}
	if kind == virtio.BlkTOut {
		r.Readable = 2
	}
	if k, err := q.drv.Add([]vring.Request{r}); err != nil || k != 1 {
		f.t.Fatal(k, err)
	}
	if q.drv.NeedKick() {
		q.kick.Ring()
	}
}

// status returns the status byte of buffer n, and its data.
func (f *front) status(n int) (byte, []byte) {
	st, b := make([]byte, 1), make([]byte, 512)
	f.mem.CopyOut(st, buffer(0, n)+1024)
	f.mem.CopyOut(b, buffer(0, n)+512)
	return st[0], b
}

// completed waits for n completions, and returns their tokens in order.
func (f *front) completed(n int) (tokens []uint32) {
	f.t.Helper()
	done := make([]vring.Completion, 8)
	eventually(f.t, "requests are completed", func() bool {
		k, err := f.qs[0].drv.Reap(done)
		if err != nil {
			f.t.Fatal(err)
		}
		for _, c := range done[:k] {
			tokens = append(tokens, c.Token)
		}
		return len(tokens) >= n
	})
	return tokens
}

// TestBlock: a disk as vhost-user-blk: its configuration, written and read, split and packed.
func TestBlock(t *testing.T) {
	for _, packed := range []bool{false, true} {
		b, _ := newDisk(t)
		d := newDoor(t, b)
		f := newFront(t, d.connect(t))
		feat := virtio.FeaturesOf(virtio.Version1, virtio.BlkFlush, virtio.BlkConfigWCE, virtio.BlkMQ, virtio.BlkSegMax)
		if packed {
			feat.Set(virtio.RingPacked)
		}
		f.negotiate(feat, protoReplyAck|protoConfig|protoMQ)
		if n := f.getU64(GetQueueNum); n != 2 {
			t.Errorf("%d queues, want 2", n)
		}
		// Front ends know more fields than there are, and want them all.
		p := f.get(GetConfig, config{data: make([]byte, 96)}.encode())
		if len(p) != configHead+96 {
			t.Fatalf("GET_CONFIG of 96 bytes: %d", len(p)-configHead)
		}
		if c := virtio.DecodeBlkConfig(p[configHead:]); c.Capacity != 2048 || !c.Writeback || c.NumQueues != 2 {
			t.Errorf("%+v", c)
		}
		f.set(SetConfig, config{offset: virtio.BlkWritebackOff, data: []byte{0}}.encode())
		if virtio.DecodeBlkConfig(b.Config()).Writeback {
			t.Error("the write cache stays on")
		}
		if f.ask(SetConfig, config{offset: 0, data: []byte{0}}.encode()) {
			t.Error("the capacity could be written")
		}
		f.setTable()
		f.queue(0, feat)
		f.start(0, firstBase(feat))
		f.enable(0, 1)
		f.mem.CopyIn(buffer(0, 0)+512, bytes.Repeat([]byte{0xaa}, 512))
		f.blk(0, virtio.BlkTOut, 3)
		f.completed(1)
		f.blk(1, virtio.BlkTIn, 3)
		f.blk(2, virtio.BlkTIn, 2047)
		f.blk(3, virtio.BlkTIn, 2048)
		f.completed(3)
		for i, want := range []struct {
			st   byte
			data byte
		}{1: {0, 0xaa}, 2: {0, 0xff}, 3: {virtio.BlkIOErr, 0}} {
			if st, data := f.status(i); i > 0 && (st != want.st || !bytes.Equal(data, bytes.Repeat([]byte{want.data}, 512))) {
				t.Errorf("packed %v, request %d: status %d, % x...", packed, i, st, data[:4])
			}
		}
		f.stop(0)
		if n := d.n.load(); n["failed"] != 1 || n["unknown"] != 0 { // that write
			t.Errorf("%v", n)
		}
	}
}

// TestBlockKilled: requests that a killed back end had are served again by the next one, each once, though some of them had ended
// already: none of those was completed before one that was made available earlier.
func TestBlockKilled(t *testing.T) {
	b, g := newDisk(t)
	g.gate = make(chan struct{})
	d := newDoor(t, b)
	f := newFront(t, d.connect(t))
	feat := virtio.FeaturesOf(virtio.Version1, virtio.BlkFlush)
	f.negotiate(feat, protoReplyAck|protoConfig)
	f.setTable()
	f.queue(0, feat)
	f.start(0, 0)
	f.enable(0, 1)
	f.blk(0, virtio.BlkTIn, 5)
	f.completed(1)
	f.blk(1, virtio.BlkTIn, 0) // waits
	f.blk(2, virtio.BlkTIn, 7)
	f.blk(3, virtio.BlkTIn, 8)
	eventually(t, "the others end", func() bool {
		a, _ := f.status(2)
		b, _ := f.status(3)
		return a == 0 && b == 0
	})
	if n, err := f.qs[0].drv.Reap(make([]vring.Completion, 4)); n != 0 || err != nil {
		t.Fatalf("%d are completed before the first one (%v)", n, err)
	}
	// The memory as it is at the moment of a kill.
	ring := make([]byte, ringRoom)
	f.mem.CopyOut(ring, 0)
	unix.Shutdown(f.fd, unix.SHUT_RDWR)
	g.open()
	eventually(t, "the door lets go", func() bool { return d.Status().State == stateListening })
	f.mem.CopyIn(0, ring)
	for i := 1; i < 4; i++ {
		f.mem.CopyIn(buffer(0, i)+512, make([]byte, 513))
	}
	f.fd = d.connect(t)
	f.negotiate(feat, protoReplyAck|protoConfig)
	f.setTable()
	f.bells(0)
	f.start(0, 4)
	f.enable(0, 1)
	if got := f.completed(3); len(got) != 3 || got[0] != 1 || got[1] != 2 || got[2] != 3 {
		t.Errorf("completed %v, want each once, in order", got)
	}
	for i, sector := range []int{1: 0, 2: 7, 3: 8} {
		if st, data := f.status(i); i > 0 && (st != 0 || !bytes.Equal(data, bytes.Repeat([]byte{byte(sector)}, 512))) {
			t.Errorf("request %d: status %d, % x...", i, st, data[:4])
		}
	}
	if n := d.n.load(); n["base_resent"] != 1 {
		t.Errorf("%v", n)
	}
}

// TestEntropy: a source of entropy as vhost-user-rng.
func TestEntropy(t *testing.T) {
	e, err := entropy.New(entropy.Config{Name: "rng0"})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	d := newDoor(t, e)
	f := newFront(t, d.connect(t))
	feat := virtio.FeaturesOf(virtio.Version1, virtio.RingPacked)
	f.negotiate(feat, protoReplyAck|protoConfig)
	f.setTable()
	f.queue(0, feat)
	f.start(0, firstBase(feat))
	f.enable(0, 1)
	if k, err := f.qs[0].drv.Add([]vring.Request{{Bufs: []vring.Buffer{{Addr: guestBase + dma.Addr(buffer(0, 0)), Len: 64}}}}); err != nil || k != 1 {
		t.Fatal(k, err)
	}
	if f.qs[0].drv.NeedKick() {
		f.qs[0].kick.Ring()
	}
	f.completed(1)
	b := make([]byte, 64)
	if f.mem.CopyOut(b, buffer(0, 0)); bytes.Equal(b, make([]byte, 64)) {
		t.Error("64 bytes of 0")
	}
	d.stop()
}
