package host_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/board/loopback"
	"github.com/boardlink/boardlink/board/testboard"
	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/device/netdev"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/host"
	"github.com/boardlink/boardlink/hwtest/peer"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/session"
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/trial/netns"
	"github.com/boardlink/boardlink/trial/netns/netnstest"
	"github.com/boardlink/boardlink/tunbridge"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/virtiomsg"
	"github.com/boardlink/boardlink/vring"
	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// rig is a host that runs, with a tap device, against an agent that the test plays.
type rig struct {
	*peer.Peer
	t    *testing.T
	ns   *netns.NS
	link *host.Link
	net  *netdev.Net
	log  *peer.Log
	sock int // a packet socket on the tap
	nl   *netlink.Handle
	stop context.CancelFunc
	done chan error

	pace  session.Pace
	queue [2]*queue
}

const (
	dev       = 0
	queueSize = 16
	etherType = 0x88b5 // IEEE 802: for local experiments
)

// unpaced is for tests that break things as fast as they can.
var unpaced = session.Pace{Messages: session.Rate{Every: 1, Burst: 1 << 20}, Breaks: session.Rate{Every: 1, Burst: 1 << 20},
	Starts: session.Rate{Every: 1, Burst: 1 << 20}, Changes: session.Rate{Every: 1, Burst: 1 << 20}}

// onBoards runs a test on the test board, whose window is device memory to the host, and on shared
// memory.
func onBoards(t *testing.T, f func(t *testing.T, r *rig)) {
	onSpecs(t, func(t *testing.T, spec string) { f(t, newRig(t, spec)) })
}

// onSpecs calls f with the boards of onBoards.
func onSpecs(t *testing.T, f func(t *testing.T, spec string)) {
	t.Run("testboard", func(t *testing.T) {
		_, spec := peer.NewBoard(t, testboard.PairOptions{})
		f(t, spec)
	})
	t.Run("loopback", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "s")
		s, err := loopback.NewServer(loopback.ServerConfig{Path: path, Size: 2 << 20, Vectors: 4})
		if err != nil {
			t.Fatal(err)
		}
		served := make(chan error, 1)
		go func() { served <- s.Serve() }()
		t.Cleanup(func() { s.Close(); <-served })
		f(t, "loopback:"+path)
	})
}

func newRig(t *testing.T, spec string) *rig {
	t.Helper()
	return newRigOf(t, spec, 0)
}

// newRigOf is newRig with so many queue pairs.
func newRigOf(t *testing.T, spec string, pairs int) *rig {
	t.Helper()
	return newPacedRig(t, spec, pairs, unpaced)
}

// newPacedRig is newRigOf with a host that bounds what its agent may cause.
func newPacedRig(t *testing.T, spec string, pairs int, pace session.Pace) *rig {
	t.Helper()
	return newRigWith(t, spec, tunbridge.Config{Name: "bl0", MTU: 1500, Queues: pairs}, pace)
}

// newRigWith is newPacedRig with such an interface.
func newRigWith(t *testing.T, spec string, ifc tunbridge.Config, pace session.Pace) *rig {
	t.Helper()
	netnstest.Need(t)
	r := &rig{t: t, pace: pace, log: new(peer.Log), done: make(chan error, 1)}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the host's log:\n%s", r.log)
		}
	})
	var err error
	if r.ns, err = netns.New(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.ns.Close() })
	err = r.ns.Do(func() error {
		if r.net, err = netdev.New(netdev.Config{Name: "net0", Number: dev, Interface: ifc,
			BoardMAC: tunbridge.MAC{2, 0, 0, 0, 0, 1}}); err != nil {
			return err
		}
		if err := r.net.Interface().SetUp(true); err != nil {
			return err
		}
		if r.nl, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
			return err
		}
		if r.sock, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0); err != nil {
			return err
		}
		be := func(v uint16) uint16 { return v<<8 | v>>8 }
		if v := []byte{1, 0}; binary.NativeEndian.Uint16(v) != 1 {
			be = func(v uint16) uint16 { return v }
		}
		return unix.Bind(r.sock, &unix.SockaddrLinklayer{Protocol: be(etherType), Ifindex: r.net.Interface().Index()})
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(r.sock); r.nl.Close() })
	r.link = host.NewLink(host.Config{Name: "a", Board: spec, Devices: map[uint16]device.Device{dev: r.net}, Log: r.log,
		Beat: 10 * time.Millisecond, LostBeats: 200, Pace: r.pace})
	ctx, cancel := context.WithCancel(context.Background())
	r.stop = cancel
	go func() { r.done <- r.link.Run(ctx) }()
	t.Cleanup(r.end)
	r.Peer = peer.New(t, spec, board.Agent)
	r.WaitUp()
	return r
}

// end stops the host: in time, and without an error, whatever the agent did.
func (r *rig) end() {
	r.stop()
	select {
	case err := <-r.done:
		if err != nil {
			r.t.Errorf("the host ends with %v", err)
		}
		r.done <- nil
	case <-time.After(5 * time.Second):
		panic("the host does not end")
	}
}

// in makes t the test that fails.
func (r *rig) in(t *testing.T) {
	r.t = t
	r.Peer.T = t
}

func (r *rig) dev() status.Device       { return r.link.Status().Devices[0] }
func (r *rig) count(name string) uint64 { return r.link.Status().Counters[name] }

// queue is a virtqueue of ours, with a page for each buffer.
type queue struct {
	vring.Driver
	desc, driver, device, bufs dma.Span
}

func (r *rig) span(off, n uint64) dma.Span {
	return dma.Span{Region: &r.Region, Off: off, Len: uint32(n)}
}

func (r *rig) setStatus(s uint32) uint32 {
	r.t.Helper()
	m := r.Ask(func(m *virtiomsg.Slot, token uint16) { virtiomsg.EncodeSetDeviceStatus(m, dev, token, s) })
	got, err := virtiomsg.DecodeStatus(&m, virtiomsg.SetDeviceStatus)
	if err != nil {
		r.t.Fatal(err)
	}
	return got
}

func (r *rig) setFeatures(f virtio.Features) {
	b := virtiomsg.BlocksOf(f, 0, 4)
	m := r.Ask(func(m *virtiomsg.Slot, token uint16) { b.EncodeRequest(m, dev, token) })
	if err := virtiomsg.DecodeEmptyResponse(&m, virtiomsg.SetDriverFeatures); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) setQueue(q virtiomsg.VQueue) {
	m := r.Ask(func(m *virtiomsg.Slot, token uint16) { q.EncodeRequest(m, dev, token) })
	if err := virtiomsg.DecodeEmptyResponse(&m, virtiomsg.SetVQueue); err != nil {
		r.t.Fatal(err)
	}
}

// newQueue lays a queue out, from a clean piece of memory.
func (r *rig) newQueue(i int) (*queue, virtiomsg.VQueue) {
	base := uint64(i) * 0x20000
	q := &queue{desc: r.span(base, 16*queueSize), driver: r.span(base+0x1000, 6+2*queueSize),
		device: r.span(base+0x2000, 6+8*queueSize), bufs: r.span(base+0x4000, 0x800*queueSize)}
	mem := r.span(base, 0x4000).Mem()
	mem.Zero(0, 0x4000)
	d, err := vring.NewSplitDriver(vring.Config{Name: fmt.Sprint("test ", i), Size: queueSize, Desc: q.desc, Driver: q.driver, Device: q.device})
	if err != nil {
		r.t.Fatal(err)
	}
	q.Driver = d
	return q, virtiomsg.VQueue{Index: uint32(i), Size: queueSize, Desc: uint64(q.desc.Addr()), Driver: uint64(q.driver.Addr()), Device: uint64(q.device.Addr())}
}

var plain = virtio.FeaturesOf(virtio.Version1)

// reset and bring up as a good driver does.
func (r *rig) bringUp(f virtio.Features) {
	r.t.Helper()
	r.WaitUp()
	if s := r.setStatus(0); s != 0 {
		r.t.Fatalf("the device does not reset: %s", virtio.StatusString(s))
	}
	r.setStatus(3)
	r.setFeatures(f)
	if s := r.setStatus(11); s != 11 {
		r.t.Fatalf("FEATURES_OK: %s", virtio.StatusString(s))
	}
	for i := range r.queue {
		q, m := r.newQueue(i)
		r.setQueue(m)
		r.queue[i] = q
	}
	if s := r.setStatus(15); s != 15 {
		r.t.Fatalf("DRIVER_OK: %s, %s", virtio.StatusString(s), r.dev().LastError)
	}
	r.Events = nil
}

// frame returns an Ethernet frame behind a virtio-net header.
func frame(n byte) []byte {
	b := make([]byte, 12+60)
	copy(b[12:], []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 1, etherType >> 8, etherType & 0xff})
	b[12+14] = n
	return b
}

// kernelUp waits until the kernel has taken notice of the carrier: before, which may be a second, it
// drops what is sent without a word.
func (r *rig) kernelUp() {
	r.t.Helper()
	r.Until(20*time.Second, "the kernel sees the carrier", func() bool {
		l, err := r.nl.LinkByIndex(r.net.Interface().Index())
		return err == nil && l.Attrs().OperState == netlink.OperUp
	})
}

// works passes a frame each way.
func (r *rig) works() {
	r.t.Helper()
	r.kernelUp()
	rx, tx := r.queue[0], r.queue[1]
	var stale [2048]byte
	for {
		if _, err := unix.Read(r.sock, stale[:]); err != nil {
			break
		}
	}
	b := frame(1)
	tx.bufs.CopyIn(0, b)
	if n, err := tx.Add([]vring.Request{{Bufs: []vring.Buffer{{Addr: tx.bufs.Addr(), Len: uint32(len(b))}}, Readable: 1}}); n != 1 || err != nil {
		r.t.Fatal(n, err)
	}
	r.Ring(dev, 1)
	var done [1]vring.Completion
	r.Until(20*time.Second, "a frame is taken from the queue", func() bool {
		n, err := tx.Reap(done[:])
		if err != nil {
			r.t.Fatal(err)
		}
		return n == 1
	})
	got := make([]byte, 2048)
	r.Until(20*time.Second, "a frame comes out of the tap", func() bool {
		n, _ := unix.Read(r.sock, got)
		return n > 14 && got[14] == 1
	})

	if n, err := rx.Add([]vring.Request{{Bufs: []vring.Buffer{{Addr: rx.bufs.Addr(), Len: 0x800}}}}); n != 1 || err != nil {
		r.t.Fatal(n, err)
	}
	r.Ring(dev, 0)
	if _, err := unix.Write(r.sock, frame(2)[12:]); err != nil {
		r.t.Fatal(err)
	}
	for {
		r.Until(20*time.Second, "a frame comes through the queue", func() bool {
			n, err := rx.Reap(done[:])
			if err != nil {
				r.t.Fatal(err)
			}
			return n == 1
		})
		rx.bufs.CopyOut(got[:100], 0)
		if got[12+12] == etherType>>8 && got[12+14] == 2 {
			return
		}
		// Something that the kernel sends by itself.
		if n, err := rx.Add([]vring.Request{{Bufs: []vring.Buffer{{Addr: rx.bufs.Addr(), Len: 0x800}}}}); n != 1 || err != nil {
			r.t.Fatal(n, err)
		}
		r.Ring(dev, 0)
	}
}

// needsReset waits until the device says that it is broken, and why.
func (r *rig) needsReset(want string) {
	r.t.Helper()
	r.Until(20*time.Second, "NEEDS_RESET is told", func() bool {
		for _, m := range r.Events {
			var e virtiomsg.ConfigEvent
			if err := e.Decode(&m); err == nil && e.Status&virtio.StatusNeedsReset != 0 {
				return true
			}
		}
		return false
	})
	d := r.dev()
	if !strings.Contains(d.Status, "NEEDS_RESET") || d.Carrier {
		r.t.Errorf("status %s, carrier %v", d.Status, d.Carrier)
	}
	if !strings.Contains(d.LastError, want) {
		r.t.Errorf("the device's error is %q, want %q in it", d.LastError, want)
	}
}

func TestWorks(t *testing.T) { onBoards(t, testWorks) }

func testWorks(t *testing.T, r *rig) {
	for i := 0; i < 3; i++ {
		r.bringUp(plain)
		r.works()
	}
	if n := r.count("device_resets"); n != 0 {
		t.Errorf("%d resets", n)
	}
}

// TestMalformedMessages sends every message with everything wrong that its header and length can have.
// The device, or the link where the message names none, is taken out of service, and works
// again after it is reset.
func TestMalformedMessages(t *testing.T) {
	_, spec := peer.NewBoard(t, testboard.PairOptions{})
	r := newRig(t, spec)
	type message struct {
		name string
		make func(m *virtiomsg.Slot)
	}
	const tok = 77
	good := []message{
		{"GET_DEVICE_INFO", func(m *virtiomsg.Slot) { virtiomsg.EncodeGetDeviceInfo(m, dev, tok) }},
		{"GET_DEVICE_FEATURES", func(m *virtiomsg.Slot) { virtiomsg.EncodeGetDeviceFeatures(m, dev, tok, 0, 4) }},
		{"SET_DRIVER_FEATURES", func(m *virtiomsg.Slot) {
			b := virtiomsg.BlocksOf(virtio.Features{}, 0, 2)
			b.EncodeRequest(m, dev, tok)
		}},
		{"GET_CONFIG", func(m *virtiomsg.Slot) { virtiomsg.EncodeGetConfig(m, dev, tok, 0, 12) }},
		{"SET_CONFIG", func(m *virtiomsg.Slot) {
			c := virtiomsg.ConfigData{Len: 4}
			c.EncodeRequest(m, dev, tok)
		}},
		{"GET_DEVICE_STATUS", func(m *virtiomsg.Slot) { virtiomsg.EncodeGetDeviceStatus(m, dev, tok) }},
		{"SET_DEVICE_STATUS", func(m *virtiomsg.Slot) { virtiomsg.EncodeSetDeviceStatus(m, dev, tok, 15) }},
		{"GET_VQUEUE", func(m *virtiomsg.Slot) { virtiomsg.EncodeQueueRequest(m, virtiomsg.GetVQueue, dev, tok, 0) }},
		{"SET_VQUEUE", func(m *virtiomsg.Slot) { (&virtiomsg.VQueue{Size: 16}).EncodeRequest(m, dev, tok) }},
		{"RESET_VQUEUE", func(m *virtiomsg.Slot) { virtiomsg.EncodeQueueRequest(m, virtiomsg.ResetVQueue, dev, tok, 0) }},
		{"GET_SHM", func(m *virtiomsg.Slot) { virtiomsg.EncodeQueueRequest(m, virtiomsg.GetShm, dev, tok, 0) }},
		{"bus GET_DEVICES", func(m *virtiomsg.Slot) { virtiomsg.EncodeGetDevices(m, tok, 0, 8) }},
		{"bus PING", func(m *virtiomsg.Slot) { virtiomsg.EncodePing(m, tok, 1) }},
	}
	bad := []struct {
		name string
		mar  func(m *virtiomsg.Slot)
	}{
		{"a byte short", func(m *virtiomsg.Slot) { m[6]-- }},
		{"a byte long", func(m *virtiomsg.Slot) { m[6]++ }},
		{"size 0", func(m *virtiomsg.Slot) { m[6] = 0 }},
		{"size 65535", func(m *virtiomsg.Slot) { m[6], m[7] = 255, 255 }},
		{"reserved type bits", func(m *virtiomsg.Slot) { m[0] |= 0x84 }},
		{"no token", func(m *virtiomsg.Slot) { m[4], m[5] = 0, 0 }},
	}
	for _, g := range good {
		for _, b := range bad {
			t.Run(g.name+" "+b.name, func(t *testing.T) {
				r.in(t)
				r.bringUp(plain)
				resets, downs := r.count("device_resets"), r.Downs
				var m virtiomsg.Slot
				g.make(&m)
				b.mar(&m)
				if !r.Send(m) {
					t.Fatal("not sent")
				}
				r.Until(20*time.Second, "the host defends itself", func() bool { return r.Downs > downs || r.count("device_resets") > resets })
				if bus := strings.HasPrefix(g.name, "bus"); bus != (r.Downs > downs) {
					t.Errorf("the link went down %d times", r.Downs-downs)
				} else if !bus {
					r.needsReset("")
				}
			})
		}
	}
	r.in(t)
	r.bringUp(plain)
	r.works()
}

// TestUnknownMessages: what is not known, and what nobody asked for, is counted, answered by silence, and does no
// harm.
func TestUnknownMessages(t *testing.T) {
	_, spec := peer.NewBoard(t, testboard.PairOptions{})
	r := newRig(t, spec)
	r.bringUp(plain)
	slot := func(typ, id byte, dev, token, size uint16) (m virtiomsg.Slot) {
		m[0], m[1] = typ, id
		binary.LittleEndian.PutUint16(m[2:], dev)
		binary.LittleEndian.PutUint16(m[4:], token)
		binary.LittleEndian.PutUint16(m[6:], size)
		return m
	}
	for _, c := range []struct {
		m       virtiomsg.Slot
		counter string
	}{
		{slot(0, 0x3f, dev, 1, 8), "unknown"},
		{slot(0, 0x7f, dev, 0, 8), "unknown"},
		{slot(virtiomsg.TypeBus, 0x3f, 0, 1, 8), "unknown"},
		{slot(virtiomsg.TypeBus, 0x7f, 0, 0, 64), "unknown"},
		{slot(0, virtiomsg.GetDeviceInfo, 7, 1, 8), "unknown_dev"},
		{slot(0, virtiomsg.GetDeviceInfo, 65535, 1, 8), "unknown_dev"},
		{slot(virtiomsg.TypeResponse, virtiomsg.GetDeviceInfo, dev, 1, 32), "unexpected"},
		{slot(virtiomsg.TypeResponse|virtiomsg.TypeBus, virtiomsg.BusPing, 0, 1, 12), "unexpected"},
	} {
		before := r.count(c.counter)
		r.Send(c.m)
		r.Until(20*time.Second, c.counter+" counts", func() bool { return r.count(c.counter) == before+1 })
	}
	r.works()
	if n := r.count("device_resets"); n != 0 || r.Downs != 0 {
		t.Errorf("%d device resets, %d times down", n, r.Downs)
	}
}

// TestOrder does things in an order that virtio forbids, and with addresses that are none.
func TestOrder(t *testing.T) {
	_, spec := peer.NewBoard(t, testboard.PairOptions{})
	r := newRig(t, spec)
	heap := uint64(r.Region.Addr)
	size := r.Region.Mem.Size()
	ready := func(r *rig) { // up to FEATURES_OK
		r.setStatus(3)
		r.setFeatures(plain)
		r.setStatus(11)
	}
	good := func(i int) virtiomsg.VQueue { _, m := r.newQueue(i); return m }
	with := func(change func(*virtiomsg.VQueue)) func(*rig) {
		return func(r *rig) {
			ready(r)
			q := good(0)
			change(&q)
			r.setQueue(q)
			if !strings.Contains(r.dev().Status, "NEEDS_RESET") { // what only shows with the ring
				r.setQueue(good(1))
				r.setStatus(15)
			}
		}
	}
	for _, c := range []struct {
		name, want string
		do         func(r *rig)
	}{
		{"DRIVER_OK first", "FEATURES_OK", func(r *rig) { r.setStatus(4) }},
		{"DRIVER_OK before FEATURES_OK", "FEATURES_OK", func(r *rig) { r.setStatus(3); r.setFeatures(plain); r.setStatus(7) }},
		{"DRIVER_OK without queues", "rx0", func(r *rig) { ready(r); r.setStatus(15) }},
		{"DRIVER_OK with one queue", "tx0", func(r *rig) { ready(r); r.setQueue(good(0)); r.setStatus(15) }},
		{"all at once", "rx0", func(r *rig) { r.setFeatures(plain); r.setStatus(15) }},
		{"queue before FEATURES_OK", "status", func(r *rig) { r.setStatus(3); r.setQueue(good(0)) }},
		{"queue after DRIVER_OK", "status", func(r *rig) { r.bringUp(plain); r.setQueue(good(0)) }},
		{"features after FEATURES_OK", "FEATURES_OK", func(r *rig) {
			ready(r)
			b := virtiomsg.BlocksOf(virtio.Features{}, 0, 2)
			var m virtiomsg.Slot
			b.EncodeRequest(&m, dev, r.Token())
			r.Send(m)
		}},
		{"RESET_VQUEUE", "RESET_VQUEUE", func(r *rig) {
			r.bringUp(plain)
			var m virtiomsg.Slot
			virtiomsg.EncodeQueueRequest(&m, virtiomsg.ResetVQueue, dev, r.Token(), 0)
			r.Send(m)
		}},
		{"no such queue", "queue 2", with(func(q *virtiomsg.VQueue) { q.Index = 2 })},
		{"no such queue by far", "4294967295", with(func(q *virtiomsg.VQueue) { q.Index = 1<<32 - 1 })},
		{"size 0", "size", with(func(q *virtiomsg.VQueue) { q.Size = 0 })},
		{"size 3", "size", with(func(q *virtiomsg.VQueue) { q.Size = 3 })},
		{"size 2048", "size", with(func(q *virtiomsg.VQueue) { q.Size = 2048 })},
		{"size 65536", "size", with(func(q *virtiomsg.VQueue) { q.Size = 65536 })},
		{"size 65552", "size", with(func(q *virtiomsg.VQueue) { q.Size = 65536 + 16 })},
		{"descriptor area at 0", "descriptor area", with(func(q *virtiomsg.VQueue) { q.Desc = 0 })},
		{"driver area in the link page", "driver area", with(func(q *virtiomsg.VQueue) { q.Driver = heap - peer.Heap })},
		{"device area in a FIFO", "device area", with(func(q *virtiomsg.VQueue) { q.Device = heap - virtiomsg.PageSize })},
		{"descriptor area over the end", "descriptor area", with(func(q *virtiomsg.VQueue) { q.Desc = heap + size - 16 })},
		{"device area over the end", "device area", with(func(q *virtiomsg.VQueue) { q.Device = heap + size - 4 })},
		{"driver area at the end of the world", "driver area", with(func(q *virtiomsg.VQueue) { q.Driver = 1<<64 - 16 })},
		{"descriptor area misaligned", "align", with(func(q *virtiomsg.VQueue) { q.Desc += 8 })},
		{"driver area misaligned", "align", with(func(q *virtiomsg.VQueue) { q.Driver++ })},
		{"device area misaligned", "align", with(func(q *virtiomsg.VQueue) { q.Device += 2 })},
	} {
		t.Run(c.name, func(t *testing.T) {
			r.in(t)
			r.WaitUp()
			r.setStatus(0)
			r.Events = nil
			before := r.count("device_resets")
			c.do(r)
			r.needsReset(c.want)
			if n := r.count("device_resets") - before; n != 1 {
				t.Errorf("counted %d times", n)
			}
			// It stays so until it is reset.
			if s := r.setStatus(15); s&virtio.StatusNeedsReset == 0 || r.dev().Carrier {
				t.Errorf("DRIVER_OK now: %s", virtio.StatusString(s))
			}
			r.bringUp(plain)
			if c.name == "size 65552" || c.name == "DRIVER_OK first" {
				r.works()
			}
		})
	}
	r.in(t)
	r.works()

	// Features that are refused leave FEATURES_OK clear, and nothing else happens.
	before := r.count("device_resets")
	for name, f := range map[string]virtio.Features{
		"none":              {},
		"not offered":       virtio.FeaturesOf(virtio.Version1, virtio.NetMQ),
		"raw IP over a tap": virtio.FeaturesOf(virtio.Version1, virtio.NetRawIP),
		"all":               {1<<32 - 1, 1<<32 - 1, 1<<32 - 1, 1<<32 - 1},
	} {
		r.setStatus(0)
		r.setStatus(3)
		r.setFeatures(f)
		if s := r.setStatus(11); s != 3 {
			t.Errorf("features %s: status %s", name, virtio.StatusString(s))
		}
	}
	// The driver writes only its own bits.
	r.setStatus(0)
	if s := r.setStatus(^(virtio.StatusFailed | virtio.StatusDriverOK | virtio.StatusFeaturesOK)); s != 3 {
		t.Errorf("every bit: status %s", virtio.StatusString(s))
	}
	// And gives up.
	if s := r.setStatus(128); s != 131 {
		t.Errorf("FAILED: status %s", virtio.StatusString(s))
	}
	r.bringUp(plain)
	r.works()
	if n := r.count("device_resets"); n != before {
		t.Errorf("%d resets of the device", n-before)
	}
}

// TestOverlap: areas and buffers that lie on top of each other are the driver's own loss.
func TestOverlap(t *testing.T) { onBoards(t, testOverlap) }

func testOverlap(t *testing.T, r *rig) {
	for n := 0; n < 20; n++ {
		r.WaitUp()
		r.setStatus(0)
		r.setStatus(3)
		r.setFeatures(plain)
		r.setStatus(11)
		_, q := r.newQueue(0)
		_, q2 := r.newQueue(1)
		all := [...]*uint64{&q.Desc, &q.Driver, &q.Device, &q2.Desc, &q2.Driver, &q2.Device}
		for range 4 {
			*all[rand.IntN(len(all))] = *all[rand.IntN(len(all))]
		}
		r.setQueue(q)
		r.setQueue(q2)
		r.setStatus(15)
		mem := r.Region.Mem
		for range 50 {
			mem.Store32(rand.Uint64N(0x28000)&^3, rand.Uint32N(1<<20))
			r.Ring(dev, rand.Uint32N(2))
			unix.Write(r.sock, frame(3)[12:])
		}
		r.For(5 * time.Millisecond)
	}
	r.bringUp(plain)
	r.works()
}

// TestRingErrors breaks running queues in every way of design.md's list.
func TestRingErrors(t *testing.T) { onBoards(t, testRingErrors) }

func testRingErrors(t *testing.T, r *rig) {
	type d struct {
		addr  uint64
		n     uint32
		flags uint16
		next  uint16
	}
	heap := uint64(r.Region.Addr)
	const buf = 0x10000 // offset of memory nobody uses
	put := func(off uint64, x d) {
		m := r.Region.Mem
		m.Store64(off, x.addr)
		m.Store32(off+8, x.n)
		m.Store16(off+12, x.flags)
		m.Store16(off+14, x.next)
	}
	// avail makes heads available on the transmit queue.
	avail := func(idx uint16, heads ...uint16) {
		q := r.queue[1]
		m := q.driver.Mem()
		for i, h := range heads {
			m.Store16(4+2*uint64(i), h)
		}
		m.Barrier(mmio.WriteBarrier)
		m.Store16(2, idx)
	}
	chain := func(ds ...d) func() {
		return func() {
			for i, x := range ds {
				put(r.queue[1].desc.Off+16*uint64(i), x)
			}
			avail(1, 0)
		}
	}
	table := func(n uint32, ds ...d) func() {
		return func() {
			for i, x := range ds {
				put(buf+0x100+16*uint64(i), x)
			}
			put(r.queue[1].desc.Off, d{heap + buf + 0x100, n, 4, 0})
			avail(1, 0)
		}
	}
	ok := d{heap + buf, 64, 0, 0}
	var loop []d
	for i := 0; i < queueSize; i++ {
		loop = append(loop, d{heap + buf, 64, 1, uint16(i+1) % queueSize})
	}
	indirect := virtio.FeaturesOf(virtio.Version1, virtio.IndirectDesc)
	for _, c := range []struct {
		err error
		f   virtio.Features
		do  func()
	}{
		{vring.ErrIndexJump, plain, func() { avail(queueSize + 1) }},
		{vring.ErrIndexJump, plain, func() { avail(0xffff) }},
		{vring.ErrHeadRange, plain, func() { avail(1, queueSize) }},
		{vring.ErrHeadRange, plain, func() { avail(1, 0xffff) }},
		{vring.ErrNextRange, plain, chain(d{heap + buf, 64, 1, queueSize})},
		{vring.ErrLoop, plain, chain(d{heap + buf, 64, 1, 0})},
		{vring.ErrLoop, plain, chain(loop...)},
		{vring.ErrIndirectNotNegotiated, plain, chain(d{heap + buf, 64, 4, 0})},
		{vring.ErrIndirectLen, indirect, table(0, ok)},
		{vring.ErrIndirectLen, indirect, table(17, ok, ok)},
		{vring.ErrIndirectLen, indirect, table(16 * (queueSize + 1))},
		{vring.ErrIndirectLen, indirect, table(1<<32 - 16)},
		{vring.ErrIndirectNested, indirect, table(16, d{heap + buf, 16, 4, 0})},
		{vring.ErrIndirectNext, indirect, chain(d{heap + buf, 16, 5, 1}, ok)},
		{vring.ErrIndirectNextRange, indirect, table(16, d{heap + buf, 64, 1, 1})},
		{vring.ErrLoop, indirect, table(32, d{heap + buf, 64, 1, 1}, d{heap + buf, 64, 1, 0})},
		{vring.ErrOrder, plain, chain(d{heap + buf, 64, 3, 1}, ok)},
		{vring.ErrZeroLength, plain, chain(d{heap + buf, 0, 0, 0})},
		{vring.ErrOverflow, plain, chain(d{1<<64 - 8, 64, 0, 0})},
		{vring.ErrTranslate, plain, chain(d{0, 64, 0, 0})},
		{vring.ErrTranslate, plain, chain(d{heap - 64, 128, 0, 0})},
		{vring.ErrTranslate, plain, chain(d{heap + r.Region.Mem.Size() - 1, 2, 0, 0})},
		{vring.ErrTranslate, plain, chain(d{heap + buf, 1<<32 - 1, 0, 0})},
		{vring.ErrTranslate, indirect, func() { put(r.queue[1].desc.Off, d{16, 16, 4, 0}); avail(1, 0) }},
	} {
		t.Run(c.err.Error(), func(t *testing.T) {
			r.in(t)
			r.bringUp(c.f)
			resets, broken := r.count("device_resets"), r.dev().Counters["broken"]
			c.do()
			r.Ring(dev, 1)
			r.needsReset(c.err.Error())
			if n := r.count("device_resets") - resets; n != 1 {
				t.Errorf("counted %d times", n)
			}
			if n := r.dev().Counters["broken"] - broken; n != 1 {
				t.Errorf("the queue broke %d times", n)
			}
			if r.Downs != 0 {
				t.Error("the link went down with the device")
			}
		})
		r.in(t)
	}
	r.bringUp(plain)
	r.works()
}

// TestFrameLengths: frames that are longer than was agreed are dropped and counted, both ways, and nothing else happens. What may be
// long follows from the accepted segmentation bits and the MTU alone, so that a driver with little memory gets what fits it.
func TestFrameLengths(t *testing.T) {
	onSpecs(t, func(t *testing.T, spec string) {
		testFrameLengths(t, newRigWith(t, spec, tunbridge.Config{Name: "bl0", MTU: 1500, Offload: true}, unpaced))
	})
}

func testFrameLengths(t *testing.T, r *rig) {
	csum := virtio.FeaturesOf(virtio.Version1, virtio.NetMrgRxbuf, virtio.NetCSUM, virtio.NetGuestCSUM)
	both := csum.Or(virtio.FeaturesOf(virtio.NetGuestTSO4, virtio.NetHostTSO4))
	for _, c := range []struct {
		name  string
		f     virtio.Features
		max   int // of a frame to the host, its header apart
		toBig bool
	}{
		{"plain", plain, 1500 + 14 + 8, true},
		{"MTU", plain.Or(virtio.FeaturesOf(virtio.NetMTU)), 1500 + 14 + 8, true},
		{"checksums", csum, 1500 + 14 + 8, true},
		{"segmentation", both, 0x7000, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			r.in(t)
			if got := r.net.Features(); c.f.Without(got) != (virtio.Features{}) {
				t.Fatalf("needs a kernel with %s", c.f.Without(got))
			}
			r.bringUp(c.f)
			r.works() // with a single receive buffer of 2048 bytes
			pump := func(q int, name string) uint64 { return r.dev().Queues[q].Pump[name] }
			tx := r.queue[1]
			send := func(n int) {
				t.Helper()
				b := append(frame(1)[:26:26], make([]byte, n-14)...)
				tx.bufs.CopyIn(0, b)
				if k, err := tx.Add([]vring.Request{{Bufs: []vring.Buffer{{Addr: tx.bufs.Addr(), Len: uint32(len(b))}}, Readable: 1}}); k != 1 || err != nil {
					t.Fatal(k, err)
				}
				r.Ring(dev, 1)
				var done [1]vring.Completion
				r.Until(20*time.Second, "the buffer comes back", func() bool {
					k, err := tx.Reap(done[:])
					if err != nil {
						t.Fatal(err)
					}
					return k == 1
				})
			}
			over, frames, dropped, bad := pump(1, "oversize"), pump(1, "frames"), pump(1, "dropped"), pump(1, "bad_header")
			send(c.max)
			r.Until(20*time.Second, "the longest frame is counted", func() bool { return pump(1, "frames") == frames+1 })
			if c.toBig {
				send(c.max + 1)
				send(9000)
				r.Until(20*time.Second, "too long ones are counted", func() bool { return pump(1, "oversize") == over+2 })
			}
			if d, b := pump(1, "dropped")-dropped, pump(1, "bad_header")-bad; d != 0 || b != 0 {
				t.Errorf("%d frames counted as refused by the interface, %d as malformed", d, b)
			}
			// The other way: the interface's MTU is raised under the device.
			if err := r.net.Interface().SetMTU(9000); err != nil {
				t.Fatal(err)
			}
			over = pump(0, "oversize")
			if _, err := unix.Write(r.sock, append(frame(4)[12:], make([]byte, 5000)...)); err != nil {
				t.Fatal(err)
			}
			rx := r.queue[0]
			r.Until(20*time.Second, "a frame too long for the driver is counted", func() bool {
				// The kernel's own frames take the buffer, too.
				if rx.Free() == queueSize {
					if k, err := rx.Add([]vring.Request{{Bufs: []vring.Buffer{{Addr: rx.bufs.Addr(), Len: 0x800}}}}); k != 1 || err != nil {
						t.Fatal(k, err)
					}
					r.Ring(dev, 0)
				}
				var done [1]vring.Completion
				if _, err := rx.Reap(done[:]); err != nil {
					t.Fatal(err)
				}
				return pump(0, "oversize") > over
			})
			if err := r.net.Interface().SetMTU(1500); err != nil {
				t.Fatal(err)
			}
			if d := r.dev(); strings.Contains(d.Status, "NEEDS_RESET") || r.count("device_resets") != 0 {
				t.Errorf("status %s, error %q", d.Status, d.LastError)
			}
		})
		r.in(t)
	}
}

// TestReceiveBuffers offers buffers that no frame fits, with and without merging: the frames are dropped and counted,
// or the device breaks.
func TestReceiveBuffers(t *testing.T) { onBoards(t, testReceiveBuffers) }

func testReceiveBuffers(t *testing.T, r *rig) {
	const buf = 0x10000
	type d struct {
		off   uint64
		n     uint32
		flags uint16
	}
	read, write := d{buf, 64, 0}, d{buf, 2048, 2}
	tiny, one := d{buf, 4, 2}, d{buf, 1, 2}
	for _, merge := range []bool{false, true} {
		f := plain
		if merge {
			f.Set(virtio.NetMrgRxbuf)
		}
		for name, ds := range map[string][]d{
			"to be read":               {read, read, read},
			"one to be read":           {read, write, write},
			"one to be read, later":    {write, read, write},
			"shorter than a header":    {tiny, write, write},
			"shorter, later":           {write, tiny, tiny, write},
			"of a byte":                {one, one, one, one, one, one, one, one, one, one, one, one, one, one, one, one},
			"of a byte, then enough":   {one, one, one, write},
			"of a header":              {{buf, 12, 2}, write},
			"of a header without data": {{buf, 12, 2}},
			"on top of the rings":      {{0x1000, 2048, 2}, {0x2000, 2048, 2}},
		} {
			t.Run(fmt.Sprintf("%s, merge %v", name, merge), func(t *testing.T) {
				r.in(t)
				r.bringUp(f)
				m := r.Region.Mem
				avail := r.queue[0].driver.Mem()
				for i, x := range ds {
					off := r.queue[0].desc.Off + 16*uint64(i)
					m.Store64(off, uint64(r.Region.Addr)+x.off)
					m.Store32(off+8, x.n)
					m.Store16(off+12, x.flags)
					avail.Store16(4+2*uint64(i), uint16(i))
				}
				m.Barrier(mmio.WriteBarrier)
				avail.Store16(2, uint16(len(ds)))
				r.Ring(dev, 0)
				r.kernelUp()
				for range 5 {
					unix.Write(r.sock, append(frame(4)[12:], make([]byte, rand.IntN(1400))...))
				}
				pump := func() map[string]uint64 { return r.dev().Queues[0].Pump }
				before := pump()
				for end := time.Now().Add(30 * time.Millisecond); time.Now().Before(end); {
					unix.Write(r.sock, frame(4)[12:])
					r.For(time.Millisecond)
				}
				p := pump()
				if !merge && p["frames"] == before["frames"] && p["oversize"] == before["oversize"] && !strings.Contains(r.dev().Status, "NEEDS_RESET") {
					t.Error("no frame was taken, none was dropped and counted, and the device did not break")
				}
				r.bringUp(plain)
				r.works()
			})
		}
	}
	r.in(t)
}

// TestFlood: an agent that sends without end keeps the host from nothing else.
func TestFlood(t *testing.T) { onBoards(t, testFlood) }

func testFlood(t *testing.T, r *rig) {
	r.bringUp(plain)
	var m virtiomsg.Slot

	// Events are not answered: the host takes them as fast as they come, and has time for
	// everything else.
	ticks := r.count("link_ticks")
	lines := r.log.Lines()
	var worst time.Duration
	sent := 0
	for end, next := time.Now().Add(500*time.Millisecond), time.Now(); time.Now().Before(end); sent++ {
		m = virtiomsg.Slot{}
		switch sent % 3 {
		case 0:
			(&virtiomsg.AvailEvent{Queue: 0}).Encode(&m, dev)
		case 1:
			(&virtiomsg.AvailEvent{Queue: 0}).Encode(&m, 99) // no such device
		case 2:
			m[1], m[6] = 0x7e, 8 // unknown
		}
		if r.Link.Send(&m) != nil {
			r.Step()
		}
		if time.Now().After(next) {
			begin := time.Now()
			r.link.Status()
			worst = max(worst, time.Since(begin))
			next = time.Now().Add(20 * time.Millisecond)
		}
	}
	if n := r.count("link_ticks") - ticks; n < 10 {
		t.Errorf("the host's clock moved %d times in half a second of %d messages", n, sent)
	}
	if worst > 200*time.Millisecond {
		t.Errorf("the status took %v", worst)
	}
	if n := r.log.Lines() - lines; n > 60 {
		t.Errorf("%d messages caused %d lines of log", sent, n)
	}
	t.Logf("%d messages, status within %v", sent, worst)
	r.works()

	// It ends under a flood, too.
	stop := make(chan struct{})
	flooded := make(chan struct{})
	go func() {
		defer close(flooded)
		for {
			select {
			case <-stop:
				return
			default:
			}
			var m virtiomsg.Slot
			virtiomsg.EncodePing(&m, 1, 1)
			r.Link.Send(&m)
			r.Step()
		}
	}()
	r.end()
	close(stop)
	<-flooded
}

// TestRandomMessages sends mutated messages in any state.
func TestRandomMessages(t *testing.T) {
	_, spec := peer.NewBoard(t, testboard.PairOptions{})
	r := newRig(t, spec)
	seed := rand.Uint64()
	rnd := rand.New(rand.NewPCG(seed, 0))
	t.Logf("seed %#x", seed)
	n := 3000
	if testing.Short() {
		n = 300
	}
	for i := 0; i < n; i++ {
		if rnd.IntN(200) == 0 {
			r.settle()
			r.bringUp(plain)
		}
		var m virtiomsg.Slot
		tok := r.Token()
		switch rnd.IntN(6) {
		case 0:
			virtiomsg.EncodeSetDeviceStatus(&m, dev, tok, rnd.Uint32N(256))
		case 1:
			b := virtiomsg.BlocksOf(virtio.FeaturesFromMask(rnd.Uint64()&rnd.Uint64()), 0, rnd.Uint32N(13))
			b.EncodeRequest(&m, dev, tok)
		case 2:
			q := virtiomsg.VQueue{Index: rnd.Uint32N(3), Size: 1 << rnd.IntN(17), Desc: uint64(r.Region.Addr) + rnd.Uint64N(1<<20),
				Driver: uint64(r.Region.Addr) + rnd.Uint64N(1<<20), Device: uint64(r.Region.Addr) + rnd.Uint64N(1<<20)}
			q.EncodeRequest(&m, dev, tok)
		case 3:
			virtiomsg.EncodeGetConfig(&m, dev, tok, rnd.Uint32(), rnd.Uint32N(60))
		case 4:
			virtiomsg.EncodeGetDevices(&m, tok, uint16(rnd.Uint32()), uint16(rnd.Uint32()))
		case 5:
			for j := range m {
				m[j] = byte(rnd.Uint32())
			}
			m[0] &= 3
			m[6], m[7] = byte(8+rnd.IntN(57)), 0
		}
		for rnd.IntN(3) == 0 {
			m[rnd.IntN(16)] ^= 1 << rnd.IntN(8)
		}
		r.WaitUp()
		r.Send(m)
		if i%16 == 0 {
			r.Step()
		}
	}
	r.settle()
	r.bringUp(plain)
	r.works()
}

// settle waits until what was sent has had its effect on the link.
func (r *rig) settle() {
	for {
		r.WaitUp()
		downs, token := r.Downs, r.Token()
		var m virtiomsg.Slot
		virtiomsg.EncodePing(&m, token, 1)
		delete(r.Answers, token) // of a message that was changed
		if !r.Send(m) {
			r.Step()
			continue
		}
		answered := false // all that was sent before is done then
		r.Until(20*time.Second, "an answer, or a new handshake", func() bool {
			_, answered = r.Answers[token]
			return answered || r.Downs != downs
		})
		if answered {
			return
		}
	}
}

// TestLinkPage: an agent that scribbles over its half of the link page, and changes its epoch without end.
func TestLinkPage(t *testing.T) { onBoards(t, testLinkPage) }

func testLinkPage(t *testing.T, r *rig) {
	r.bringUp(plain)
	mem := r.B.Window().Mem
	seed := rand.Uint64()
	rnd := rand.New(rand.NewPCG(seed, 0))
	t.Logf("seed %#x", seed)
	ticks, lines := r.count("link_ticks"), r.log.Lines()
	// On a machine that is busy the clock takes longer.
	for end := time.Now().Add(300 * time.Millisecond); time.Now().Before(end) ||
		r.count("link_ticks")-ticks < 5 && time.Since(end) < 20*time.Second; {
		off := rnd.Uint64N(0x200) &^ 3
		if rnd.IntN(4) > 0 {
			off = 0x40 // the epoch
		}
		mem.Store32(off, rnd.Uint32())
		if rnd.IntN(100) == 0 {
			d, _ := r.Link.Peer()
			if k, err := r.B.Ringer(d.Ring, 0); err == nil {
				k.Ring()
			}
		}
	}
	if n := r.count("link_ticks") - ticks; n < 5 {
		t.Errorf("the host's clock moved %d times", n)
	}
	if n := r.log.Lines() - lines; n > 60 {
		t.Errorf("%d lines of log", n)
	}
	// A new agent is met.
	r.B.Close()
	r.Peer = peer.New(t, r.spec(), board.Agent)
	r.bringUp(plain)
	r.works()
}

func (r *rig) spec() string { return r.link.Status().Board }

// TestRingMethod: an agent that asks to be rung in a way that this kind of board does not have is refused, and met
// when it asks for one that there is.
func TestRingMethod(t *testing.T) { onBoards(t, testRingMethod) }

func testRingMethod(t *testing.T, r *rig) {
	r.bringUp(plain)
	good := r.Declared
	for _, ring := range []board.RingInfo{
		{Method: board.RingRegister, Vectors: 4, Addr: 0x1000},
		{Method: board.RingBoard, Vectors: 4},
	} {
		bad := good
		bad.Ring = ring
		refused, ups := r.count("link_page_errors"), r.count("link_ups")
		r.Redeclare(bad)
		r.Until(20*time.Second, "the page is refused", func() bool {
			return r.count("link_page_errors") > refused && r.link.Status().LastError != ""
		})
		if e := r.link.Status().LastError; !strings.Contains(e, "ring method") || !strings.Contains(e, "agent block") {
			t.Errorf("method %d: the error is %q", ring.Method, e)
		}
		if r.count("link_ups") != ups {
			t.Errorf("method %d: up", ring.Method)
		}
		r.Redeclare(good)
		r.Until(20*time.Second, "the link comes up", func() bool { return r.count("link_ups") > ups })
	}
	// One that polls is not rung, and served all the same.
	r.Until(20*time.Second, "up", func() bool { return r.Up })
	polls := good
	polls.Ring = board.RingInfo{Method: board.RingNone}
	ups := r.count("link_ups")
	r.Redeclare(polls)
	r.Until(20*time.Second, "the link comes up", func() bool { return r.count("link_ups") > ups && r.Up })
	r.bringUp(plain)
}
