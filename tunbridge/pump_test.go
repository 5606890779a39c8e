package tunbridge_test

import (
	"context"
	"net"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/trial/netns"
	"github.com/boardlink/boardlink/trial/traffic"
	"github.com/boardlink/boardlink/tunbridge"
	"github.com/boardlink/boardlink/vring"
	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// need skips where the machine lacks what the test needs, and fails in CI.
func need(t testing.TB, ok bool, what string) {
	t.Helper()
	if ok {
		return
	}
	if os.Getenv("CI") == "true" {
		t.Fatalf("needs %s", what)
	}
	t.Skipf("needs %s", what)
}

// rig is a link without control plane: two interfaces in namespaces of their own and the four
// pumps between them, over rings in one piece of memory that the device side reaches "across".
type rig struct {
	ns      [2]*netns.NS // host, agent
	ifc     [2]*tunbridge.Iface
	account *dma.Account
	stats   [4]*tunbridge.Stats // device rx, device tx, driver rx, driver tx
	errs    chan error
	stop    [2]*tunbridge.Stop
	wg      sync.WaitGroup
}

type rigConfig struct {
	typ      tunbridge.LinkType
	offload  bool
	mtu      int
	kind     mmio.Kind // of the host's view
	merge    bool
	eventIdx bool
	indirect bool
	rxBuffer uint32
	queue    uint16
	account  bool
	lossy    bool // drop every other doorbell
	apart    bool // each pump on a goroutine of its own
	loop     tunbridge.LoopConfig
	// mover, if set, returns what moves the payload of device queue q (0 rx, 1 tx): board is the board's memory.
	mover func(q int, board mmio.Mem) (*dma.Mover, dma.Span)
}

type lossyRinger struct {
	r doorbell.Ringer
	n int
}

func (l *lossyRinger) Ring() error {
	if l.n++; l.n%2 == 0 {
		return nil
	}
	return l.r.Ring()
}

var rigAddrs = [2][]string{{"10.77.0.1/24", "fd77::1/64"}, {"10.77.0.2/24", "fd77::2/64"}}

func newRig(t testing.TB, c rigConfig) *rig {
	t.Helper()
	need(t, os.Geteuid() == 0, "root, for namespaces and interfaces")
	r := &rig{errs: make(chan error, 4), account: new(dma.Account)}
	const size = 16 << 20
	mem, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(mem) })
	bells := [4]*doorbell.Eventfd{newBell(t), newBell(t), newBell(t), newBell(t)}
	t.Cleanup(func() { r.close(t) }) // before what the pumps use goes away
	for i := range r.ns {
		var err error
		if r.ns[i], err = netns.New(); err != nil {
			t.Fatal(err)
		}
		err = r.ns[i].Do(func() error {
			ifc, err := tunbridge.Open(tunbridge.Config{Name: "bl0", Type: c.typ, Offload: c.offload, MTU: c.mtu})
			if err != nil {
				return err
			}
			r.ifc[i] = ifc
			h, err := netlink.NewHandle()
			if err != nil {
				return err
			}
			defer h.Close()
			l, err := h.LinkByName("bl0")
			if err != nil {
				return err
			}
			for _, a := range rigAddrs[i] {
				ip, n, _ := net.ParseCIDR(a)
				n.IP = ip
				if err := h.AddrAdd(l, &netlink.Addr{IPNet: n, Flags: unix.IFA_F_NODAD}); err != nil {
					return err
				}
			}
			return h.LinkSetUp(l)
		})
		if err != nil {
			t.Fatal(err)
		}
		if c.offload {
			if err := r.ifc[i].SetOffload(r.ifc[i].OffloadSupported()); err != nil {
				t.Fatal(err)
			}
		}
		if r.stop[i], err = tunbridge.NewStop(); err != nil {
			t.Fatal(err)
		}
	}
	board := mmio.FromBytes(mem)
	base := dma.Addr(0x8000_0000)
	local := &dma.Region{Name: "board", Addr: base, Mem: board, Access: dma.DeviceRead | dma.DeviceWrite}
	hostMem := mmio.NewMem(mustRAM(board).Pointer(0), size, c.kind)
	across := dma.Region{Name: "board", Addr: base, Mem: hostMem, Access: dma.DeviceRead | dma.DeviceWrite, Across: true}
	if c.account {
		across.Account = r.account
	}
	table, err := dma.NewTable(across)
	if err != nil {
		t.Fatal(err)
	}
	ref := new(dma.TableRef)
	ref.Store(table)
	alloc := dma.NewAllocator(base, size)
	take := func(n uint64) dma.Span {
		a, err := alloc.Alloc(n, 64)
		if err != nil {
			t.Fatal(err)
		}
		return dma.Span{Region: local, Off: uint64(a - base), Len: uint32(n)}
	}
	far := func(s dma.Span) dma.Span {
		return dma.Span{Region: &table.Regions()[0], Off: s.Off, Len: s.Len}
	}
	max := tunbridge.MaxFrame(c.mtu, c.offload)
	if c.queue == 0 {
		c.queue = 256
	}
	var pumps [2][]tunbridge.Pump // of the device side, of the driver side
	for q := 0; q < 2; q++ {
		dn, vn, un := vring.SplitSizes(c.queue)
		vc := vring.Config{Name: []string{"rx0", "tx0"}[q], Size: c.queue, Desc: take(dn), Driver: take(vn), Device: take(un),
			EventIdx: c.eventIdx, Indirect: c.indirect}
		drv, err := vring.NewSplitDriver(vc)
		if err != nil {
			t.Fatal(err)
		}
		vc.Desc, vc.Driver, vc.Device, vc.Table = far(vc.Desc), far(vc.Driver), far(vc.Device), ref
		dev, err := vring.NewSplitDevice(vc)
		if err != nil {
			t.Fatal(err)
		}
		kick, call := bells[2*q], bells[2*q+1]
		var ringKick, ringCall doorbell.Ringer = kick, call
		if c.lossy {
			ringKick, ringCall = &lossyRinger{r: kick}, &lossyRinger{r: call}
		}
		dc := tunbridge.PumpConfig{Name: "device " + vc.Name, Iface: r.ifc[0], Stop: r.stop[0], Wait: kick, Ring: ringCall, MaxFrame: max, Stats: new(tunbridge.Stats)}
		gc := tunbridge.PumpConfig{Name: "driver " + vc.Name, Iface: r.ifc[1], Stop: r.stop[1], Wait: call, Ring: ringKick, MaxFrame: max, Stats: new(tunbridge.Stats)}
		r.stats[q], r.stats[2+q] = dc.Stats, gc.Stats
		if c.mover != nil {
			dc.Mover, dc.Staging = c.mover(q, board)
			dc.MoveAll = c.kind == mmio.Cached
		}
		var pd, pg tunbridge.Pump
		if q == 0 {
			pd = tunbridge.NewDeviceRX(dc, dev, c.merge)
			size := c.rxBuffer
			if !c.merge {
				size = uint32(max+63) &^ 63
			}
			n := uint64(size) * uint64(c.queue)
			if n > 6<<20 {
				n = 6 << 20
			}
			pg, err = tunbridge.NewDriverRX(gc, drv, take(n), size, c.merge)
		} else {
			pd = tunbridge.NewDeviceTX(dc, dev)
			pg, err = tunbridge.NewDriverTX(gc, drv, take(1<<20))
		}
		if err != nil {
			t.Fatal(err)
		}
		pumps[0], pumps[1] = append(pumps[0], pd), append(pumps[1], pg)
	}
	var loops []tunbridge.Pump
	for _, ps := range pumps {
		if c.apart {
			loops = append(loops, ps...)
			continue
		}
		l, err := tunbridge.NewLoop(c.loop, ps...)
		if err != nil {
			t.Fatal(err)
		}
		loops = append(loops, l)
	}
	for _, p := range loops {
		r.wg.Add(1)
		go func() {
			defer r.wg.Done()
			if err := p.Run(); err != nil {
				r.errs <- err
			}
		}()
	}
	for i := range r.ifc {
		if err := r.ifc[i].SetCarrier(true); err != nil {
			t.Fatal(err)
		}
	}
	return r
}

func mustRAM(m mmio.Mem) mmio.RAM {
	r, ok := m.RAM()
	if !ok {
		panic("not RAM")
	}
	return r
}

func newBell(t testing.TB) *doorbell.Eventfd {
	e, err := doorbell.NewEventfd()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.Close() })
	return e
}

func (r *rig) close(t testing.TB) {
	for _, s := range r.stop {
		if s != nil {
			s.Raise()
		}
	}
	r.wg.Wait()
	for i := range r.ns {
		if r.ifc[i] != nil {
			r.ifc[i].Close()
		}
		if r.stop[i] != nil {
			r.stop[i].Close()
		}
		if r.ns[i] != nil {
			r.ns[i].Close()
		}
	}
	close(r.errs)
	for err := range r.errs {
		t.Errorf("a pump ended: %v", err)
	}
}

func (r *rig) pairs() []traffic.Pair {
	var ps []traffic.Pair
	for i := range rigAddrs[0] {
		ps = append(ps, traffic.Pair{
			Host:  traffic.Endpoint{NS: r.ns[0], Addr: netip.MustParsePrefix(rigAddrs[0][i]).Addr()},
			Board: traffic.Endpoint{NS: r.ns[1], Addr: netip.MustParsePrefix(rigAddrs[1][i]).Addr()},
		})
	}
	return ps
}

func counters(s *tunbridge.Stats) map[string]uint64 {
	m := map[string]uint64{}
	s.Each(func(n string, v uint64) { m[n] = v })
	return m
}

// someCPU returns a processor that this program may use.
func someCPU(t testing.TB) int {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		t.Fatal(err)
	}
	for i := 0; ; i++ {
		if set.IsSet(i) {
			return i
		}
	}
}

// Real kernel traffic through the four pumps, in every mode.
func TestPumps(t *testing.T) {
	t.Cleanup(func() { goleak.VerifyNone(t) }) // after all that run at the same time: most of their time is waiting
	base := rigConfig{typ: tunbridge.TAP, offload: true, mtu: 1500, merge: true, eventIdx: true, indirect: true, rxBuffer: 16 << 10}
	with := func(f func(*rigConfig)) rigConfig { c := base; f(&c); return c }
	for name, c := range map[string]rigConfig{
		"offload":       base,
		"plain":         with(func(c *rigConfig) { c.offload = false }),
		"plain, jumbo":  with(func(c *rigConfig) { c.offload, c.mtu = false, 65000 }),
		"jumbo":         with(func(c *rigConfig) { c.mtu = 65000 }),
		"tun":           with(func(c *rigConfig) { c.typ = tunbridge.TUN }),
		"tun, plain":    with(func(c *rigConfig) { c.typ, c.offload = tunbridge.TUN, false }),
		"small buffers": with(func(c *rigConfig) { c.rxBuffer = 2048 }),
		"no merge":      with(func(c *rigConfig) { c.merge = false }),
		"flags":         with(func(c *rigConfig) { c.eventIdx, c.indirect = false, false }),
		"uncached":      with(func(c *rigConfig) { c.kind, c.account = mmio.Uncached, true }),
		"wc, plain":     with(func(c *rigConfig) { c.kind, c.offload = mmio.WriteCombining, false }),
		"tiny queue":    with(func(c *rigConfig) { c.queue = 8 }),
		"lossy bells":   with(func(c *rigConfig) { c.lossy = true }),
		"apart":         with(func(c *rigConfig) { c.apart = true }),
		"polling":       with(func(c *rigConfig) { c.loop.BusyPoll = 100 * time.Microsecond }),
		"one processor": with(func(c *rigConfig) { c.loop = tunbridge.LoopConfig{BusyPoll: -1, CPU: []int{someCPU(t)}} }),
	} {
		if testing.Short() && name != "offload" && name != "plain" && name != "uncached" && name != "small buffers" {
			continue
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t, c)
			ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
			defer cancel()
			cfg := traffic.RunConfig{Duration: 50 * time.Millisecond, Ping: traffic.PingConfig{Count: 50, Interval: time.Millisecond}}
			res, err := traffic.Run(ctx, r.pairs(), cfg)
			if err != nil {
				t.Fatal(err)
			}
			if !res.OK() {
				t.Errorf("ping sent %d lost %d, corrupt %d", res.Ping.Sent, res.Ping.Lost, res.Corrupt)
			}
			t.Logf("rtt %.0f us, tcp %.2f/%.2f Gbit/s, udp %.0f/%.0f kpps", res.RTT.P50,
				res.TCPGbps.BoardToHost, res.TCPGbps.HostToBoard, res.UDP64Kpps.BoardToHost, res.UDP64Kpps.HostToBoard)
			var gso, bad uint64
			for i, s := range r.stats {
				m := counters(s)
				if m["frames"] == 0 {
					t.Errorf("pump %d moved nothing: %v", i, m)
				}
				gso += m["gso_frames"]
				bad += m["bad_header"] + m["oversize"]
				if staged := m["staged"] != 0; i < 2 && staged != (c.kind != mmio.Cached) {
					t.Errorf("pump %d: %d of %d frames staged with memory that is %v", i, m["staged"], m["frames"], c.kind)
				}
			}
			if bad != 0 {
				t.Errorf("%d frames with bad headers or too large", bad)
			}
			if (gso != 0) != c.offload {
				t.Errorf("%d super-packets with offload %v", gso, c.offload)
			}
			if c.account {
				a := r.account.Load()
				if a.Reads == 0 || a.Writes == 0 || a.ReadBytes == 0 {
					t.Errorf("nothing was accounted: %+v", a)
				}
			}
		})
	}
}

// TestStopWait: a wait ends by itself, and at once where the Stop is raised.
func TestStopWait(t *testing.T) {
	t.Parallel()
	s, err := tunbridge.NewStop()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if s.Wait(time.Millisecond) {
		t.Error("raised by itself")
	}
	done := make(chan bool, 1)
	go func() { done <- s.Wait(time.Hour) }()
	s.Raise()
	select {
	case raised := <-done:
		if !raised || !s.Wait(time.Hour) {
			t.Error("the end of a wait by Raise is told as its own")
		}
	case <-time.After(20 * time.Second):
		t.Error("the wait goes on")
	}
}
