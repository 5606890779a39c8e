package host_test

import (
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/boardlink/boardlink/board/loopback"
	"github.com/boardlink/boardlink/board/testboard"
	"github.com/boardlink/boardlink/hwtest/peer"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/virtiomsg"
	"github.com/boardlink/boardlink/vring"
	"golang.org/x/sys/unix"
)

const pairs = 2 // of the device in these tests

var (
	several = virtio.FeaturesOf(virtio.Version1, virtio.NetMQ, virtio.NetCtrlVQ)
	control = virtio.FeaturesOf(virtio.Version1, virtio.NetCtrlVQ)
)

// negotiate goes up to FEATURES_OK and returns the status.
func (r *rig) negotiate(f virtio.Features) uint32 {
	r.t.Helper()
	r.WaitUp()
	r.setStatus(0)
	r.setStatus(3)
	r.setFeatures(f)
	return r.setStatus(11)
}

// lay sets up queues, and DRIVER_OK.
func (r *rig) lay(numbers ...int) map[int]*queue {
	r.t.Helper()
	qs := map[int]*queue{}
	for _, i := range numbers {
		q, m := r.newQueue(i)
		r.setQueue(m)
		qs[i] = q
	}
	r.Events = nil
	if s := r.setStatus(15); s != 15 {
		r.t.Fatalf("DRIVER_OK: %s, %s", virtio.StatusString(s), r.dev().LastError)
	}
	return qs
}

// command sends a command by the control queue, which has a number, and returns the acknowledgement.
func (r *rig) command(q *queue, number uint32, cmd ...byte) byte {
	r.t.Helper()
	q.bufs.CopyIn(0, append(cmd[:len(cmd):len(cmd)], make([]byte, 8)...))
	q.bufs.CopyIn(0x800, []byte{0xee})
	if n, err := q.Add([]vring.Request{{Readable: 1, Bufs: []vring.Buffer{
		{Addr: q.bufs.Addr(), Len: uint32(len(cmd))}, {Addr: q.bufs.Addr() + 0x800, Len: 1}}}}); n != 1 || err != nil {
		r.t.Fatal(n, err)
	}
	r.Ring(dev, number)
	var done [1]vring.Completion
	r.Until(20*time.Second, "a command is answered", func() bool {
		n, err := q.Reap(done[:])
		if err != nil {
			r.t.Fatal(err)
		}
		return n == 1
	})
	var ack [1]byte
	q.bufs.CopyOut(ack[:], 0x800)
	if done[0].Len != 1 {
		r.t.Errorf("an acknowledgement of %d bytes", done[0].Len)
	}
	return ack[0]
}

// onBoardsOf is onBoards for devices of several queue pairs.
func onBoardsOf(t *testing.T, f func(t *testing.T, r *rig)) {
	t.Run("testboard", func(t *testing.T) {
		t.Parallel()
		_, spec := peer.NewBoard(t, testboard.PairOptions{})
		f(t, newRigOf(t, spec, pairs))
	})
	t.Run("loopback, one interrupt", func(t *testing.T) {
		t.Parallel()
		path := filepath.Join(t.TempDir(), "s")
		s, err := loopback.NewServer(loopback.ServerConfig{Path: path, Size: 2 << 20, Vectors: 1})
		if err != nil {
			t.Fatal(err)
		}
		served := make(chan error, 1)
		go func() { served <- s.Serve() }()
		t.Cleanup(func() { s.Close(); <-served })
		f(t, newRigOf(t, "loopback:"+path, pairs))
	})
}

// TestQueues: which queues there are follows from what is negotiated; the driver chooses how many pairs are in use; a
// reset sets one again.
func TestQueues(t *testing.T) {
	onBoardsOf(t, func(t *testing.T, r *rig) {
		r.WaitUp()
		if f := r.net.Features(); !f.Has(virtio.NetMQ) || !f.Has(virtio.NetCtrlVQ) {
			t.Fatalf("offered: %s", f)
		}
		if c := virtio.DecodeNetConfig(r.net.Config()); c.MaxQueuePairs != pairs {
			t.Errorf("max_virtqueue_pairs %d", c.MaxQueuePairs)
		}
		// MQ needs the control queue (virtio 1.2, 5.1.3.1).
		if s := r.negotiate(virtio.FeaturesOf(virtio.Version1, virtio.NetMQ)); s&virtio.StatusFeaturesOK != 0 || !strings.Contains(r.dev().LastError, "5.1.3.1") {
			t.Errorf("MQ without a control queue: %s, %q", virtio.StatusString(s), r.dev().LastError)
		}
		for _, c := range []struct {
			f      virtio.Features
			queues int
		}{{plain, 2}, {control, 3}, {several, 2*pairs + 1}} {
			if s := r.negotiate(c.f); s != 11 {
				t.Fatalf("%s: %s", c.f, virtio.StatusString(s))
			}
			for i := 0; i < 2*pairs+3; i++ {
				m := r.Ask(func(m *virtiomsg.Slot, token uint16) {
					virtiomsg.EncodeQueueRequest(m, virtiomsg.GetVQueue, dev, token, uint32(i))
				})
				var q virtiomsg.VQueue
				if err := q.DecodeResponse(&m); err != nil || (q.MaxSize != 0) != (i < c.queues) {
					t.Errorf("%s: queue %d has a size of up to %d, %v", c.f, i, q.MaxSize, err)
				}
			}
		}

		ack := func(q *queue, number uint32, want byte, cmd ...byte) {
			t.Helper()
			if got := r.command(q, number, cmd...); got != want {
				t.Errorf("% x: acknowledged with %d, want %d", cmd, got, want)
			}
		}
		inUse := func(n int) {
			t.Helper()
			if d := r.dev(); d.Pairs != n || r.net.Interface().InUse() != max(n, 1) {
				t.Errorf("%d pairs in use, and %d queues of the interface; want %d", d.Pairs, r.net.Interface().InUse(), n)
			}
		}
		const ok, no = virtio.NetCtrlOK, virtio.NetCtrlErr

		// A control queue behind the one pair.
		r.negotiate(control)
		q := r.lay(0, 1, 2)
		inUse(1)
		ack(q[2], 2, ok, 4, 0, 1, 0)
		ack(q[2], 2, no, 4, 0, 2, 0)
		inUse(1)

		for round := 0; round < 2; round++ {
			r.negotiate(several)
			q = r.lay(0, 1, 2, 3, 4)
			r.queue = [2]*queue{q[0], q[1]}
			inUse(1)
			ack(q[4], 4, no, 4, 0, 0, 0)
			ack(q[4], 4, no, 4, 0, 3, 0)
			ack(q[4], 4, no, 4, 0, 2)
			ack(q[4], 4, no, 4, 0, 2, 0, 0)
			ack(q[4], 4, no, 0, 0, 1)
			ack(q[4], 4, no, 9)
			inUse(1)
			ack(q[4], 4, ok, 4, 0, 2, 0)
			inUse(2)
			// The second pair carries frames.
			r.kernelUp()
			b := frame(7)
			q[3].bufs.CopyIn(0, b)
			if n, err := q[3].Add([]vring.Request{{Bufs: []vring.Buffer{{Addr: q[3].bufs.Addr(), Len: uint32(len(b))}}, Readable: 1}}); n != 1 || err != nil {
				t.Fatal(n, err)
			}
			r.Ring(dev, 3)
			got := make([]byte, 2048)
			r.Until(20*time.Second, "a frame comes out of the tap", func() bool {
				n, _ := unix.Read(r.sock, got)
				return n > 14 && got[14] == 7
			})
			ack(q[4], 4, ok, 4, 0, 1, 0)
			inUse(1)
			r.works() // by the first, whatever the kernel thought before
			ack(q[4], 4, ok, 4, 0, 2, 0)
			inUse(2)
			r.setStatus(0)
			inUse(0)
		}

		// A pair that the driver has not set up.
		r.negotiate(several)
		q = r.lay(0, 1, 2, 4)
		ack(q[4], 4, no, 4, 0, 2, 0)
		ack(q[4], 4, ok, 4, 0, 1, 0)
		inUse(1)
		if n := r.count("device_resets"); n != 0 || r.Downs != 0 {
			t.Errorf("%d device resets, %d times down", n, r.Downs)
		}

		// A command that cannot be answered.
		if n, err := q[4].Add([]vring.Request{{Bufs: []vring.Buffer{{Addr: q[4].bufs.Addr(), Len: 4}}, Readable: 1}}); n != 1 || err != nil {
			t.Fatal(n, err)
		}
		r.Ring(dev, 4)
		r.needsReset("without room for its acknowledgement")
		r.bringUp(plain)
		r.works()
	})
}
