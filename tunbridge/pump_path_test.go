package tunbridge

import (
	"fmt"
	"sync/atomic"
	"testing"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/vring"
	"golang.org/x/sys/unix"
)

// path is one direction of a link, driven by hand on one goroutine: a socket sends frames out
// of one tap, two pumps carry them to the other.
type path struct {
	socket int
	frame  []byte
	in     func() error // takes what is queued at the first tap into the ring
	out    func() error // takes what is in the ring to the second tap
	moved  *Stats
	sent   *Stats // of the pump that reads the first interface
	bells  *int
	dev    vring.Device // what moved counts for a direction towards the host
	drv    vring.Driver
	to     PumpConfig
	ifc    [2]*Iface // frames come from the first
	driver Pump      // the driver side's pump
	device Pump
	buffer []byte // memory of the driver side's payload
	link   dma.Addr
}

// pathConfig describes a path; newPathWith has the usual one.
type pathConfig struct {
	toHost   bool
	offload  bool
	size     int // of a frame
	kind     mmio.Kind
	mover    *dma.Mover
	mtu      int    // of both interfaces
	max      [2]int // MaxFrame of the pump that reads an interface, and of the one that writes one
	follow   [2]int // MaxFollow
	queue    uint16
	rxBuffer uint32
	rxMem    uint64
	noPumps  bool      // of the driver side: the test puts into the ring what it likes
	log      vring.Log // of the device side
}

type countingRinger struct{ n int }

func (c *countingRinger) Ring() error { c.n++; return nil }

// newPath makes the direction towards the host (toHost) or towards the board. It must run in a
// namespace of its own.
func newPath(t testing.TB, toHost, offload bool, size int, kind mmio.Kind) *path {
	t.Helper()
	return newPathWith(t, toHost, offload, size, kind, nil)
}

// newPathWith is newPath with the device side's payload moved by m.
func newPathWith(t testing.TB, toHost, offload bool, size int, kind mmio.Kind, m *dma.Mover) *path {
	t.Helper()
	max := MaxFrame(9000, offload)
	return newPathOf(t, pathConfig{toHost: toHost, offload: offload, size: size, kind: kind, mover: m, mtu: 9000,
		max: [2]int{max, max}, queue: 256, rxBuffer: 16 << 10, rxMem: 4 << 20})
}

func newPathOf(t testing.TB, cfg pathConfig) *path {
	t.Helper()
	toHost, offload, size, kind, m := cfg.toHost, cfg.offload, cfg.size, cfg.kind, cfg.mover
	var ifc [2]*Iface // first: frames come from there
	for i := range ifc {
		ifc[i] = mustOpen(t, Config{Name: fmt.Sprintf("p%d", i), Type: TAP, Offload: offload, MTU: cfg.mtu})
		ready(t, ifc[i], fmt.Sprintf("10.9.%d.1/24", i))
		ifc[i].Drain()
	}
	const memSize = 8 << 20
	mem, err := unix.Mmap(-1, 0, memSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(mem) })
	ram := mmio.FromBytes(mem)
	local := &dma.Region{Name: "board", Addr: 1 << 32, Mem: ram, Access: dma.DeviceRead | dma.DeviceWrite}
	view, _ := ram.RAM()
	across := dma.Region{Name: "board", Addr: 1 << 32, Mem: mmio.NewMem(view.Pointer(0), memSize, kind), Access: dma.DeviceRead | dma.DeviceWrite, Across: true}
	table, err := dma.NewTable(across)
	if err != nil {
		t.Fatal(err)
	}
	ref := new(dma.TableRef)
	ref.Store(table)
	off := uint64(0)
	take := func(n uint64) dma.Span {
		s := dma.Span{Region: local, Off: off, Len: uint32(n)}
		off += (n + 63) &^ 63
		return s
	}
	far := func(s dma.Span) dma.Span { return dma.Span{Region: &table.Regions()[0], Off: s.Off, Len: s.Len} }
	dn, vn, un := vring.SplitSizes(cfg.queue)
	c := vring.Config{Name: "q", Size: cfg.queue, Desc: take(dn), Driver: take(vn), Device: take(un), EventIdx: true}
	drv, err := vring.NewSplitDriver(c)
	if err != nil {
		t.Fatal(err)
	}
	c.Desc, c.Driver, c.Device, c.Table = far(c.Desc), far(c.Driver), far(c.Device), ref
	c.Log, c.LogByLen = cfg.log, true
	dev, err := vring.NewSplitDevice(c)
	if err != nil {
		t.Fatal(err)
	}
	stop, err := NewStop()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop.Close() })
	bell := new(countingRinger)
	pc := PumpConfig{Name: "test", Stop: stop, Wait: doorbell.None, Ring: bell, Stats: new(Stats)}
	if m != nil {
		stage := mmio.FromBytes(make([]byte, 4<<20))
		pc.Mover, pc.Staging = m, dma.Span{Region: &dma.Region{Name: "staging", Addr: 1 << 40, Mem: stage, Access: dma.DeviceRead | dma.DeviceWrite}, Len: 4 << 20}
	}
	from, to := pc, pc
	if driver := map[bool]*PumpConfig{true: &from, false: &to}[toHost]; m != nil {
		driver.Mover, driver.Staging = nil, dma.Span{} // it is the device side's
	}
	from.Iface, to.Iface = ifc[0], ifc[1]
	from.Stats, to.Stats = new(Stats), new(Stats)
	from.MaxFrame, to.MaxFrame, from.MaxFollow, to.MaxFollow = cfg.max[0], cfg.max[1], cfg.follow[0], cfg.follow[1]
	p := &path{frame: make([]byte, size), sent: from.Stats, moved: to.Stats, bells: &bell.n, dev: dev, drv: drv, to: to, ifc: ifc}
	copy(p.frame, []byte{2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x88, 0xb5}) // a local experimental EtherType
	off = (off + 4095) &^ 4095
	payload := take(cfg.rxMem)
	p.buffer, p.link = mem[payload.Off:][:payload.Len:payload.Len], payload.Addr()
	if toHost {
		rx := NewDeviceTX(to, dev)
		p.device = rx
		p.out = func() error { _, err := rx.drain(); return err }
		if cfg.noPumps {
			return p
		}
		tx, err := NewDriverTX(from, drv, take(1<<20))
		if err != nil {
			t.Fatal(err)
		}
		p.driver = tx
		p.in = func() error { _, err := tx.step(turn{read: true}); return err }
	} else {
		tx := NewDeviceRX(from, dev, true)
		p.device = tx
		p.in = func() error { _, err := tx.step(turn{read: true}); return err }
		if cfg.noPumps {
			p.socket = packetSocket(t, ifc[0])
			return p
		}
		rx, err := NewDriverRX(to, drv, payload, cfg.rxBuffer, true)
		if err != nil {
			t.Fatal(err)
		}
		p.driver = rx
		for i := range rx.bufs {
			rx.give(uint32(i))
		}
		if err := rx.publish(); err != nil {
			t.Fatal(err)
		}
		p.out = func() error { _, err := rx.drain(); return err }
	}
	p.socket = packetSocket(t, ifc[0])
	return p
}

// packetSocket returns a socket that sends frames as they are out of an interface.
func packetSocket(t testing.TB, ifc *Iface) int {
	t.Helper()
	s, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(s) })
	if err := unix.Bind(s, &unix.SockaddrLinklayer{Ifindex: ifc.Index()}); err != nil {
		t.Fatal(err)
	}
	return s
}

// move sends n frames and carries them over.
func (p *path) move(n int) error {
	for i := 0; i < n; i++ {
		if _, err := unix.Write(p.socket, p.frame); err != nil {
			return err
		}
	}
	if err := p.in(); err != nil {
		return err
	}
	return p.out()
}

func forPaths(f func(name string, toHost, offload bool, size int, kind mmio.Kind)) {
	for _, toHost := range []bool{true, false} {
		for _, offload := range []bool{true, false} {
			for _, size := range []int{64, 1514, 9014} {
				for _, kind := range []mmio.Kind{mmio.Cached, mmio.Uncached} {
					dir := "to board"
					if toHost {
						dir = "to host"
					}
					f(fmt.Sprintf("%s/offload=%v/%d/%v", dir, offload, size, kind), toHost, offload, size, kind)
				}
			}
		}
	}
}

// In the steady state neither side allocates for a frame, and each frame costs one system call at
// each interface and one read that finds nothing, for a batch.
func TestPumpCosts(t *testing.T) {
	forPaths(func(name string, toHost, offload bool, size int, kind mmio.Kind) {
		t.Run(name, func(t *testing.T) {
			ifaceNS(t)
			p := newPath(t, toHost, offload, size, kind)
			const batch, runs = 8, 20             // few enough for batchBytes
			if err := p.move(batch); err != nil { // slices grow to their size
				t.Fatal(err)
			}
			frames, bells := p.moved.Frames(), *p.bells
			calls := [2]uint64{p.sent.count(cSyscalls), p.moved.count(cSyscalls)}
			if frames != batch {
				t.Fatalf("%d frames were sent, %d came over", batch, frames)
			}
			// AllocsPerRun runs once more, to warm up.
			if n := testing.AllocsPerRun(runs, func() {
				if err := p.move(batch); err != nil {
					t.Fatal(err)
				}
			}); n != 0 {
				t.Errorf("%v allocations for %d frames", n, batch)
			}
			if got := p.moved.Frames() - frames; got != batch*(runs+1) {
				t.Errorf("%d of %d frames came over", got, batch*(runs+1))
			}
			if got := *p.bells - bells; got > 2*(runs+1) {
				t.Errorf("%d doorbells for %d batches", got, runs+1)
			}
			// One read that finds nothing, for a batch.
			if got := p.sent.count(cSyscalls) - calls[0]; got > (batch+1)*(runs+1) {
				t.Errorf("%d system calls at the first interface for %d frames in %d batches", got, batch*(runs+1), runs+1)
			}
			if got := p.moved.count(cSyscalls) - calls[1]; got != batch*(runs+1) {
				t.Errorf("%d system calls at the second interface for %d frames", got, batch*(runs+1))
			}
		})
	})
}

func (s *Stats) count(i int) uint64 { return atomic.LoadUint64(&s.n[i]) }

// BenchmarkPath is a frame's whole way over a link without a wake-up: sent by a socket, read
// from the first tap, through the ring, written to the second.
func BenchmarkPath(b *testing.B) {
	forPaths(func(name string, toHost, offload bool, size int, kind mmio.Kind) {
		b.Run(name, func(b *testing.B) {
			ifaceNS(b)
			p := newPath(b, toHost, offload, size, kind)
			batch := 32
			for batch*size > batchBytes {
				batch /= 2
			}
			b.ReportAllocs()
			b.SetBytes(int64(size))
			n := 0
			for b.Loop() {
				// One iteration is one frame: they go in batches.
				if n++; n%batch == 0 {
					if err := p.move(batch); err != nil {
						b.Fatal(err)
					}
				}
			}
		})
	})
}
