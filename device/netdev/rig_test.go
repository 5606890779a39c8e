package netdev

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/pci"
	"github.com/boardlink/boardlink/trial/netns"
	"github.com/boardlink/boardlink/trial/netns/netnstest"
	"github.com/boardlink/boardlink/tunbridge"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/vring"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Frames of the tests here have an Ethernet header with etherType, a sequence number in 64 bits, and a pattern that follows from
// it, of a length that follows from it too.
const (
	etherType  = 0x88b5 // for experiments
	probeType  = 0x88b6 // another one
	frameHead  = 14 + 8
	frameMost  = 1514
	window     = 100 // frames on their way, each direction: fewer than any queue of the kernel holds
	ringSize   = 512 // buffers for more than the window: a driver that offers none for 100 ms counts as short of memory
	ringBytes  = 1 << 20
	slotBytes  = 2048
	bufBytes   = 512 // receive buffers: a long frame takes three or four
	hdrLen     = tunbridge.HeaderLen
	sharedSize = 3 << 20
)

func frame(b []byte, seq uint64) []byte {
	n := frameHead + int(seq*2654435761>>7%uint64(frameMost-frameHead))
	b = b[:n]
	copy(b, "\xff\xff\xff\xff\xff\xff\x02\x00\x00\x00\x00\x01")
	binary.BigEndian.PutUint16(b[12:], etherType)
	binary.LittleEndian.PutUint64(b[14:], seq)
	for i, x := frameHead, seq*0x9e3779b97f4a7c15; i < n; i++ {
		x = x*6364136223846793005 + 1442695040888963407
		b[i] = byte(x >> 56)
	}
	return b
}

// arrivals checks frames at the end of their way.
type arrivals struct {
	next   uint64 // atomic: frames that have come
	probed uint32 // atomic: a frame of probeType has come
	name   string
	want   [frameMost]byte
}

// frame checks one; what is not of the test is ignored.
func (a *arrivals) frame(b []byte) error {
	switch {
	case len(b) < frameHead:
		return nil
	case binary.BigEndian.Uint16(b[12:]) == probeType:
		atomic.StoreUint32(&a.probed, 1)
		return nil
	case binary.BigEndian.Uint16(b[12:]) != etherType:
		return nil
	}
	next := atomic.LoadUint64(&a.next)
	if seq := binary.LittleEndian.Uint64(b[14:]); seq != next {
		return fmt.Errorf("%s: frame %d where %d is expected", a.name, seq, next)
	}
	if want := frame(a.want[:], next); !bytes.Equal(b, want) {
		return fmt.Errorf("%s: frame %d of %d bytes is damaged (%d bytes)", a.name, next, len(want), len(b))
	}
	atomic.StoreUint64(&a.next, next+1)
	return nil
}

func (a *arrivals) count() uint64 { return atomic.LoadUint64(&a.next) }

// mapping is the shared memory as the device sees it: rings, transmit payload, receive buffers.
type mapping struct {
	b     []byte
	free  func()
	table *dma.Table
}

// parts are the offsets of what is in the shared memory, each of ringBytes. Link addresses begin at base.
const (
	base   dma.Addr = 0x4000_0000
	txPart          = ringBytes
	rxPart          = 2 * ringBytes
)

// restartRig is a network device with a driver beside it, and sockets at its interface.
type restartRig struct {
	toEnd    arrivals // first: 64-bit alignment
	toDriver arrivals
	t        *testing.T
	n        *Net
	fd       int // of the shared memory
	mine     []byte
	dev      *mapping
	table    dma.TableRef
	features virtio.Features
	layout   [2]driverAreas
	kick     [2]*doorbell.Eventfd
	kickMu   sync.Mutex // guards kick
	call     [2]blockable
	events   chan device.Event
	sockIn   int // what comes out of the interface
	sockOut  int // what goes in
	stop     uint32
	errs     chan error
	wg       sync.WaitGroup
	seed     uint64   // of the test's goroutine
	last     []string // steps
}

type driverAreas struct{ desc, driver, device uint64 } // offsets

// areasOf says where the areas of queue i lie.
func areasOf(i int) driverAreas {
	at := uint64(i) * 0x10000
	return driverAreas{at, at + 0x4000, at + 0x8000}
}

// blockable is a doorbell that a test lets count as one that the peer made block.
type blockable struct{ blocks uint32 }

func (b *blockable) Ring() error {
	if atomic.CompareAndSwapUint32(&b.blocks, 1, 0) {
		return fmt.Errorf("test: %w", doorbell.ErrBlocked)
	}
	return nil
}

func (r *restartRig) rand(n int) int {
	r.seed = r.seed*6364136223846793005 + 1442695040888963407
	return int(r.seed >> 33 % uint64(n))
}

func (r *restartRig) must(err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatal(err)
	}
}

func newRestartRig(t *testing.T, f ...virtio.Feature) *restartRig { return newPairsRig(t, 1, f...) }

// newPairsRig is newRestartRig for a device of several queue pairs.
func newPairsRig(t *testing.T, pairs int, f ...virtio.Feature) *restartRig {
	netnstest.Need(t)
	r := &restartRig{t: t, features: virtio.FeaturesOf(virtio.Version1, virtio.NetMrgRxbuf), events: make(chan device.Event, 1000),
		errs: make(chan error, 10), seed: 1, toEnd: arrivals{name: "from the driver"}, toDriver: arrivals{name: "to the driver"}}
	for _, bit := range f {
		r.features.Set(bit)
	}
	ns, err := netns.New()
	r.must(err)
	t.Cleanup(func() { ns.Close() })
	r.must(ns.Do(func() (err error) {
		if r.n, err = New(Config{Name: "net0", Interface: tunbridge.Config{Name: "bl0", Queues: pairs}}); err != nil {
			return err
		}
		h, err := netlink.NewHandle()
		if err != nil {
			return err
		}
		defer h.Close()
		l, err := h.LinkByName("bl0")
		if err == nil {
			err = h.LinkSetUp(l)
		}
		if err != nil {
			return err
		}
		for _, s := range []*int{&r.sockIn, &r.sockOut} {
			proto := etherType
			if s == &r.sockOut {
				proto = 0
			}
			if *s, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, proto>>8|proto&0xff<<8); err != nil {
				return err
			}
			if err = unix.Bind(*s, &unix.SockaddrLinklayer{Protocol: uint16(proto>>8 | proto&0xff<<8), Ifindex: l.Attrs().Index}); err != nil {
				return err
			}
		}
		// What this side sends is no frame that came in.
		if err = unix.SetsockoptInt(r.sockIn, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1); err == nil {
			err = unix.SetsockoptTimeval(r.sockIn, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 50000})
		}
		return err
	}))
	if r.fd, err = unix.MemfdCreate("restart", unix.MFD_CLOEXEC); err == nil {
		err = unix.Ftruncate(r.fd, sharedSize)
	}
	r.must(err)
	r.mine, err = unix.Mmap(r.fd, 0, sharedSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	r.must(err)
	t.Cleanup(func() {
		atomic.StoreUint32(&r.stop, 1)
		r.wg.Wait()
		r.n.Close()
		unix.Munmap(r.mine)
		if r.dev != nil {
			r.dev.unmap()
		}
		unix.Close(r.fd)
		unix.Close(r.sockIn)
		unix.Close(r.sockOut)
	})
	r.dev = r.remap()
	r.table.Store(r.dev.table)
	for i := range r.layout {
		r.layout[i] = areasOf(i)
		r.kick[i] = newBell(t)
	}
	r.n.Notify(func(e device.Event) {
		if e.Broken != nil {
			r.events <- e
		}
	})
	return r
}

func newBell(t *testing.T) *doorbell.Eventfd {
	e, err := doorbell.NewEventfd()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.Close() })
	return e
}

// remap maps the shared memory once more, for the device.
func (r *restartRig) remap() *mapping {
	b, err := unix.Mmap(r.fd, 0, sharedSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	r.must(err)
	m := &mapping{b: b, free: pci.GuardShared(uintptr(unsafe.Pointer(&b[0])), sharedSize, "test")}
	m.table = r.tableOf(m, ringBytes, ringBytes)
	return m
}

// tableOf makes a table of the memory, with so many bytes of the transmit payload and of the receive buffers.
func (r *restartRig) tableOf(m *mapping, tx, rx uint64) *dma.Table {
	var regions []dma.Region
	for _, p := range [...][2]uint64{{0, ringBytes}, {txPart, tx}, {rxPart, rx}} {
		regions = append(regions, dma.Region{Name: fmt.Sprintf("part at %#x", p[0]), Addr: base + dma.Addr(p[0]), Mem: mmio.FromBytes(m.b[p[0] : p[0]+p[1]]),
			Access: dma.DeviceRead | dma.DeviceWrite})
	}
	t, err := dma.NewTable(regions...)
	r.must(err)
	return t
}

func (m *mapping) unmap() {
	m.free()
	unix.Munmap(m.b)
}

// areas translates the areas of queue i by the table that is stored now.
func (r *restartRig) areas(i int) device.Areas {
	l := areasOf(i)
	a, err := device.Translate(r.table.Load(), r.n.Queue(i), ringSize, r.features.Has(virtio.RingPacked), base+dma.Addr(l.desc), base+dma.Addr(l.driver), base+dma.Addr(l.device))
	r.must(err)
	return a
}

func (r *restartRig) start(i int, s vring.State) {
	r.t.Helper()
	r.must(r.n.StartQueue(i, device.Resources{Size: ringSize, Areas: r.areas(i), Table: &r.table, Kick: r.kick[i], Call: &r.call[i]}, s))
}

// soon is a generous time for something that takes milliseconds.
func soon() time.Time { return time.Now().Add(30 * time.Second) }

func (r *restartRig) stopQueue(i int) device.Stopped {
	r.t.Helper()
	s, err := r.n.StopQueue(i, soon())
	r.must(err)
	if !s.State.Packed && s.State.Avail != s.State.Used {
		r.t.Fatalf("queue %d stops with chains in flight: %+v", i, s.State)
	}
	return s
}

// run starts the device, its driver and the traffic.
func (r *restartRig) run() {
	r.must(r.n.SetFeatures(r.features, device.Options{}))
	local := &dma.Region{Name: "mine", Addr: base, Mem: mmio.FromBytes(r.mine), Access: dma.DeviceRead | dma.DeviceWrite}
	desc, drv, dev := vring.SplitSizes(ringSize)
	if r.features.Has(virtio.RingPacked) {
		desc, drv, dev = vring.PackedSizes(ringSize)
	}
	for i := range r.layout {
		l := r.layout[i]
		c := vring.Config{Name: fmt.Sprintf("driver %d", i), Size: ringSize, EventIdx: r.features.Has(virtio.EventIdx), InOrder: r.features.Has(virtio.InOrder),
			Desc: dma.Span{Region: local, Off: l.desc, Len: uint32(desc)}, Driver: dma.Span{Region: local, Off: l.driver, Len: uint32(drv)},
			Device: dma.Span{Region: local, Off: l.device, Len: uint32(dev)}}
		d := &testDriver{r: r, c: c, queue: i, seed: uint64(i) + 7}
		r.must(d.open())
		if i == 0 {
			r.goes(d.receive)
		} else {
			r.goes(d.send)
		}
	}
	for i := range r.layout {
		r.start(i, vring.State{})
		r.must(r.n.EnableQueue(i, true, soon()))
	}
	r.must(r.n.SetRunning(true, soon()))
	r.goes(r.receiveAtEnd)
	r.goes(r.sendAtEnd)
}

func (r *restartRig) goes(f func() error) {
	r.wg.Add(1)
	go func() {
		defer r.wg.Done()
		if err := f(); err != nil {
			atomic.StoreUint32(&r.stop, 1)
			r.errs <- err
		}
	}()
}

func (r *restartRig) stopped() bool { return atomic.LoadUint32(&r.stop) != 0 }

func (r *restartRig) receiveAtEnd() error {
	b := make([]byte, 1<<16)
	for !r.stopped() {
		n, err := unix.Read(r.sockIn, b)
		if err == unix.EAGAIN || err == unix.EINTR {
			continue
		}
		if err == nil {
			err = r.toEnd.frame(b[:n])
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (r *restartRig) sendAtEnd() error {
	var b [frameMost]byte
	// The kernel lets frames through, and not into nothing, some time after the carrier has come.
	for probe := frame(b[:], 0); atomic.LoadUint32(&r.toDriver.probed) == 0 && !r.stopped(); time.Sleep(time.Millisecond) {
		binary.BigEndian.PutUint16(probe[12:], probeType)
		unix.Write(r.sockOut, probe)
	}
	for seq := uint64(0); !r.stopped(); {
		if seq-r.toDriver.count() >= window {
			time.Sleep(20 * time.Microsecond)
			continue
		}
		switch _, err := unix.Write(r.sockOut, frame(b[:], seq)); err {
		case nil:
			seq++
		case unix.ENOBUFS, unix.EAGAIN, unix.EINTR:
		default:
			return fmt.Errorf("send frame %d: %w", seq, err)
		}
	}
	return nil
}

// testDriver is the driver's side of one queue, on a goroutine of its own. Every now and then it goes on from its own record.
type testDriver struct {
	r     *restartRig
	c     vring.Config
	d     vring.Driver
	queue int
	seed  uint64
	saves int
}

func (d *testDriver) open() (err error) {
	if d.r.features.Has(virtio.RingPacked) {
		d.d, err = vring.NewPackedDriver(d.c)
	} else {
		d.d, err = vring.NewSplitDriver(d.c)
	}
	return err
}

func (d *testDriver) rand(n int) int {
	d.seed = d.seed*6364136223846793005 + 1442695040888963407
	return int(d.seed >> 33 % uint64(n))
}

// maybeResume saves the driver side and goes on with what is made of the record.
func (d *testDriver) maybeResume() error {
	if d.rand(50) != 0 {
		return nil
	}
	record, err := d.d.Save()
	if err != nil {
		return err
	}
	if d.r.features.Has(virtio.RingPacked) {
		d.d, err = vring.ResumePackedDriver(d.c, record)
	} else {
		d.d, err = vring.ResumeSplitDriver(d.c, record)
	}
	d.saves++
	return err
}

// add makes requests available and kicks.
func (d *testDriver) add(reqs ...vring.Request) error {
	if n, err := d.d.Add(reqs); err != nil || n != len(reqs) {
		return fmt.Errorf("%d of %d requests added: %v", n, len(reqs), err)
	}
	if d.d.NeedKick() {
		d.r.kickMu.Lock()
		k := d.r.kick[d.queue]
		d.r.kickMu.Unlock()
		return k.Ring()
	}
	return nil
}

func (d *testDriver) send() error {
	var free []uint32
	for i := uint32(0); i < ringBytes/slotBytes; i++ {
		free = append(free, i)
	}
	var done [16]vring.Completion
	for seq := uint64(0); !d.r.stopped(); {
		moved := false
		if seq-d.r.toEnd.count() < window && len(free) > 0 && d.d.Free() >= 4 {
			k := d.rand(len(free))
			slot := free[k]
			free[k] = free[len(free)-1]
			free = free[:len(free)-1]
			at := txPart + uint64(slot)*slotBytes
			b := d.r.mine[at : at+slotBytes]
			for i := range b[:hdrLen] {
				b[i] = 0
			}
			n := uint32(len(frame(b[hdrLen:hdrLen+frameMost], seq)))
			// The header by itself, and the frame in up to three pieces.
			addr := base + dma.Addr(at)
			bufs := []vring.Buffer{{Addr: addr, Len: hdrLen}}
			for off, left := uint32(0), n; left > 0; {
				k := left
				if len(bufs) < 3 && left > 1 {
					k = 1 + uint32(d.rand(int(left)))
				}
				bufs = append(bufs, vring.Buffer{Addr: addr + hdrLen + dma.Addr(off), Len: k})
				off, left = off+k, left-k
			}
			if err := d.add(vring.Request{Bufs: bufs, Readable: len(bufs), Token: slot}); err != nil {
				return err
			}
			seq++
			moved = true
		}
		n, err := d.d.Reap(done[:])
		for i := range done[:n] {
			free = append(free, done[i].Token)
		}
		if err != nil {
			return err
		}
		if err := d.maybeResume(); err != nil {
			return err
		}
		if !moved && n == 0 {
			time.Sleep(20 * time.Microsecond)
		}
	}
	return nil
}

func (d *testDriver) receive() error {
	offer := func(i uint32) vring.Request {
		return vring.Request{Token: i, Bufs: []vring.Buffer{{Addr: base + rxPart + dma.Addr(i)*bufBytes, Len: bufBytes}}}
	}
	for i := uint32(0); i < ringSize; i++ {
		if err := d.add(offer(i)); err != nil {
			return err
		}
	}
	var parts []vring.Completion
	done := make([]vring.Completion, 16)
	var b []byte
	for !d.r.stopped() {
		n, err := d.d.Reap(done)
		if err != nil {
			return err
		}
		for _, c := range done[:n] {
			parts = append(parts, c)
			first := d.r.mine[rxPart+uint64(parts[0].Token)*bufBytes:]
			if want := int(first[10]) | int(first[11])<<8; len(parts) < want {
				continue
			} else if want == 0 || len(parts) > want {
				return fmt.Errorf("a frame in %d buffers, %d have come", want, len(parts))
			}
			b = b[:0]
			for _, p := range parts {
				at := rxPart + uint64(p.Token)*bufBytes
				b = append(b, d.r.mine[at:at+uint64(p.Len)]...)
			}
			if err := d.r.toDriver.frame(b[hdrLen:]); err != nil {
				return err
			}
			for _, p := range parts {
				if err := d.add(offer(p.Token)); err != nil {
					return err
				}
			}
			parts = parts[:0]
		}
		if err := d.maybeResume(); err != nil {
			return err
		}
		if n == 0 {
			time.Sleep(20 * time.Microsecond)
		}
	}
	return nil
}

// progress waits until frames go both ways. Which ones were on their way is known only when they have come.
func (r *restartRig) progress() {
	r.t.Helper()
	a, b := r.toEnd.count(), r.toDriver.count()
	for end := soon(); r.toEnd.count() < a+window || r.toDriver.count() < b+window; time.Sleep(100 * time.Microsecond) {
		if time.Now().After(end) || r.stopped() {
			r.check()
			r.t.Fatalf("no progress: %d frames more to the end, %d to the driver; %+v", r.toEnd.count()-a, r.toDriver.count()-b, r.n.Status().Queues)
		}
	}
}

// check fails for what the goroutines and the device found.
func (r *restartRig) check() {
	r.t.Helper()
	select {
	case err := <-r.errs:
		r.t.Fatalf("%v, after %q; %+v", err, r.last[len(r.last)-4:], r.n.Status().Queues[0])
	case e := <-r.events:
		r.t.Fatalf("queue %d broke: %v, after %q", e.Queue, e.Broken, r.last)
	default:
	}
}

// broken waits for the event of a queue that broke.
func (r *restartRig) broken() device.Event {
	r.t.Helper()
	select {
	case e := <-r.events:
		return e
	case err := <-r.errs:
		r.t.Fatal(err)
	case <-time.After(30 * time.Second):
		r.t.Fatal("no queue broke")
	}
	return device.Event{}
}
