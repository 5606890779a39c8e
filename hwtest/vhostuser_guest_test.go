//go:build linux

package hwtest

import (
	"context"
	"fmt"
	"net/netip"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/boardlink/boardlink/hwtest/remote"
	"github.com/boardlink/boardlink/hwtest/vm"
	"github.com/boardlink/boardlink/hwtest/vm/vmtest"
	"github.com/boardlink/boardlink/status"
)

// guestRig is a host with three vhost-user sockets, and a virtual machine at them.
type guestRig struct {
	*doors
	m *vm.VM
}

// guestNIC is an interface of the guest.
type guestNIC struct {
	door                   int
	name, fn, addr, prefix string
	pairs                  int
}

var (
	// A split ring, MTU 9000, memory by slots; and a packed one with four pairs, MTU 1500, memory by tables, no status.
	splitNIC  = guestNIC{0, "eth0", "0000:00:04.0", boardIP, boardPrefix, 1}
	packedNIC = guestNIC{1, "eth1", "0000:00:05.0", "10.67.0.2", "10.67.0.2/24", 4}
)

// run runs a part of the test. The host's failures are that part's.
func (g *guestRig) run(t *testing.T, name string, f func(t *testing.T)) {
	t.Helper()
	ok := t.Run(name, func(t *testing.T) {
		defer func(before *testing.T) { g.t = before }(g.t)
		g.t = t
		begin := time.Now()
		f(t)
		t.Logf("in %.1f s", time.Since(begin).Seconds())
	})
	if !ok {
		t.FailNow()
	}
}

// flow starts traffic that goes on during a part of the test. The returned function ends it and checks
// that all came back as it was sent.
func (g *guestRig) flow(t *testing.T, addr string) (*remote.Flow, func()) {
	t.Helper()
	f, err := remote.NewFlow(t.Context(), g.ns, netip.MustParseAddr(addr))
	if err != nil {
		t.Fatal(err)
	}
	stop := func() {
		t.Helper()
		if err := f.Stop(); err != nil {
			t.Errorf("traffic with %s: %v", addr, err)
		}
	}
	t.Cleanup(func() { f.Stop() })
	return f, stop
}

// advance waits until traffic has moved.
func advance(t *testing.T, flows ...*remote.Flow) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	for _, f := range flows {
		if err := f.Advance(ctx, 512<<10); err != nil {
			t.Fatalf("the traffic does not go on: %v", err)
		}
	}
}

// up gives the guest's interfaces their addresses and starts the echo.
func (g *guestRig) up(t *testing.T) {
	t.Helper()
	for _, n := range []guestNIC{splitNIC, packedNIC} {
		g.upOne(t, n)
	}
	echo(t, g.m)
}

// upOne brings up one interface, with all its queue pairs in use: a Linux guest begins with one for
// each processor at most.
func (g *guestRig) upOne(t *testing.T, n guestNIC) {
	t.Helper()
	vmtest.Run(t, g.m, "peer", "up", n.name, n.prefix)
	if n.pairs > 1 {
		vmtest.Run(t, g.m, "peer", "channels", n.name, strconv.Itoa(n.pairs))
	}
}

// clean checks that a door has refused nothing, and its queues are well.
func (g *guestRig) clean(t *testing.T, door, pairs int) status.Link {
	t.Helper()
	l := g.connected(door, pairs)
	for _, c := range []string{"failed", "unknown", "queues_broken", "stuck", "memory_faults", "no_acknowledge"} {
		if l.Counters[c] != 0 {
			t.Errorf("door %d: %s is %d: %v", door, c, l.Counters[c], l.Counters)
		}
	}
	return l
}

// traffic checks an interface in both directions: ping, TCP and UDP.
func (g *guestRig) traffic(t *testing.T, n guestNIC, sizes ...int) {
	t.Helper()
	g.check(t, n.addr, remote.Config{Pings: 30, Bytes: 4 << 20, Ready: time.Minute})
	if err := remote.UDP(t.Context(), g.ns, netip.MustParseAddr(n.addr), 200, sizes...); err != nil {
		t.Errorf("UDP with %s: %v", n.addr, err)
	}
}

// packets returns what the guest has sent by an interface: both numbers of one moment.
func packets(t *testing.T, m *vm.VM, name string) (packets, bytes int64) {
	t.Helper()
	for _, line := range strings.Split(vmtest.Get(t, m, "/proc/net/dev"), "\n") {
		n, rest, _ := strings.Cut(strings.TrimSpace(line), ":")
		if f := strings.Fields(rest); n == name && len(f) == 16 {
			bytes, _ = strconv.ParseInt(f[8], 10, 64)
			packets, _ = strconv.ParseInt(f[9], 10, 64)
		}
	}
	if packets == 0 {
		t.Fatalf("the guest has sent nothing by %s, or does not tell", name)
	}
	return packets, bytes
}

// TestVhostUserGuest: a virtual machine with an unmodified virtio_net stands where a board does. One
// process serves three sockets: a split device, a packed one, and one whose driver is a legacy
// one.
func TestVhostUserGuest(t *testing.T) {
	dir := shortDir(t)
	a, b, c := filepath.Join(dir, "a"), filepath.Join(dir, "b"), filepath.Join(dir, "c")
	g := &guestRig{doors: newDoors(t, dir, "--board", "vhost-user:"+a, "--board", "vhost-user:"+b+",queues=4,slots=off,status=off", "--board", "vhost-user:"+c,
		"--net", "name=bl0,addr="+hostPrefix+",board=0,mtu=9000", "--net", "name=bl1,addr=10.67.0.1/24,board=1", "--net", "name=bl2,addr=10.68.0.1/24,board=2")}
	for i := 0; i < 3; i++ {
		g.listening(i)
	}
	chardev := func(id, path string) []string {
		return []string{"-chardev", "socket,id=c" + id + ",path=" + path + ",reconnect=1"}
	}
	devices := []string{"-object", "memory-backend-memfd,id=mem,size=256M,share=on", "-machine", "memory-backend=mem"}
	devices = append(devices, chardev("a", a)...)
	devices = append(devices, chardev("b", b)...)
	devices = append(devices, "-netdev", "vhost-user,id=na,chardev=ca", "-netdev", "vhost-user,id=nb,chardev=cb,queues=4")
	cfg := vm.Config{Name: "guest", Memory: 256, SMP: 2, Modules: []string{"virtio_net"}, Programs: map[string]string{"/bin/peer": programs["/bin/peer"]}}
	cfg.Devices = append(append(append([]string{"-m", "256,slots=2,maxmem=1G"}, devices...), chardev("c", c)...),
		"-device", "virtio-net-pci,id=da,romfile=,netdev=na,disable-legacy=on,vectors=0,addr=0x4,mac=52:54:00:00:00:0a,host_mtu=9000",
		"-device", "virtio-net-pci,id=db,romfile=,netdev=nb,disable-legacy=on,vectors=0,addr=0x5,mac=52:54:00:00:00:0b,mq=on,packed=on",
		"-netdev", "vhost-user,id=nc,chardev=cc",
		"-device", "virtio-net-pci,romfile=,netdev=nc,disable-legacy=off,disable-modern=on,vectors=0,addr=0x6,mac=52:54:00:00:00:0c")
	begin := time.Now()
	g.m = vmtest.Boot(t, cfg)
	t.Logf("booted after %.1f s", time.Since(begin).Seconds())
	g.up(t)

	g.run(t, "traffic", g.testTraffic)
	g.run(t, "legacy driver", g.testLegacy)
	g.run(t, "offload", g.testOffload)
	g.run(t, "channels", g.testChannels)
	g.run(t, "guest rebooted", g.testReboot)
	g.run(t, "memory plugged", g.testMemory)
	g.run(t, "driver bound anew", g.testRebind)
	g.run(t, "host killed", g.testHostKilled)
	g.run(t, "guest killed", func(t *testing.T) {
		clock := regexp.MustCompile(`tsc: Detected ([0-9]+)\.([0-9]{3}) MHz`)
		line, err := g.m.WaitKernelLog(t.Context(), clock)
		if err != nil {
			t.Fatal(err)
		}
		mhz := clock.FindStringSubmatch(line)
		g.m.Close()
		for i := 0; i < 3; i++ {
			g.listening(i)
		}
		cfg.Machine, cfg.Append = "microvm", "tsc_early_khz="+mhz[1]+mhz[2]
		cfg.Devices = append(devices[:len(devices):len(devices)],
			"-device", "virtio-net-device,netdev=na,mac=52:54:00:00:00:0a,host_mtu=9000",
			"-device", "virtio-net-device,netdev=nb,mac=52:54:00:00:00:0b,mq=on,packed=on")
		g.m = vmtest.Boot(t, cfg)
		g.up(t)
		g.testTraffic(t)
	})
}

// testTraffic: what was negotiated, and every byte in both directions.
func (g *guestRig) testTraffic(t *testing.T) {
	l := g.connected(0, 1)
	if dev := l.Devices[0]; has(dev.Negotiated, "ring_packed") || !has(dev.Negotiated, "event_idx") || !has(dev.Negotiated, "mrg_rxbuf") || !has(dev.Negotiated, "mtu") {
		t.Errorf("split: negotiated %v", dev.Negotiated)
	}
	l = g.connected(1, 4)
	if dev := l.Devices[0]; !has(dev.Negotiated, "ring_packed") || !has(dev.Negotiated, "mq") || dev.MaxPairs != 4 {
		t.Errorf("packed: negotiated %v, %d pairs", dev.Negotiated, dev.MaxPairs)
	}
	for name, want := range map[string]string{"eth0": "9000", "eth1": "1500"} {
		if mtu := vmtest.Get(t, g.m, "/sys/class/net/"+name+"/mtu"); mtu != want {
			t.Errorf("the guest has an MTU of %s at %s", mtu, name)
		}
	}
	g.traffic(t, splitNIC, 16, 1472, 8972, 20000)
	g.traffic(t, packedNIC, 16, 64, 1472, 9000)
	g.clean(t, 0, 1)
	g.clean(t, 1, 4)
}

// testLegacy: a driver before virtio 1 is refused, with one line that says what to set.
func (g *guestRig) testLegacy(t *testing.T) {
	name := ""
	for _, n := range []string{"eth0", "eth1", "eth2"} {
		if vmtest.Get(t, g.m, "/sys/class/net/"+n+"/address") == "52:54:00:00:00:0c" {
			name = n
		}
	}
	if name == "" {
		t.Fatal("the guest has no interface at the legacy device")
	}
	for range 3 {
		vmtest.Run(t, g.m, "peer", "up", name, "10.68.0.2/24")
	}
	defer vmtest.Run(t, g.m, "peer", "down", name)
	g.waitLog("disable-legacy=on")
	l := g.waitState(2, "connected", 20*time.Second, func(l status.Link) bool { return l.State == "connected" })
	if l.Devices[0].Carrier || l.Counters["queue_starts"] != 0 {
		t.Errorf("a legacy driver is served: %+v", l)
	}
	if n := strings.Count(g.log.String(), "disable-legacy=on"); n != 1 {
		t.Errorf("%d lines say what to set, one is wanted", n)
	}
}

// testOffload: checksums and segmentation, by the guest and by the device, in turn under traffic.
func (g *guestRig) testOffload(t *testing.T) {
	for _, n := range []guestNIC{splitNIC, packedNIC} {
		f, stop := g.flow(t, n.addr)
		mtu, _ := strconv.ParseInt(vmtest.Get(t, g.m, "/sys/class/net/"+n.name+"/mtu"), 10, 64)
		for _, c := range []struct {
			settings string
			segments bool // the device cuts segments
		}{
			{"tso=off gso=off gro=off", false},
			{"tx=off", false},
			{"tx=on sg=on tso=off gso=on gro=on", false},
			{"tx=on sg=on tso=on gso=on gro=on", true},
		} {
			vmtest.Run(t, g.m, "peer", append([]string{"ethtool", n.name}, strings.Fields(c.settings)...)...)
			advance(t, f)
			p0, b0 := packets(t, g.m, n.name)
			g.check(t, n.addr, remote.Config{Pings: 5, Bytes: 2 << 20})
			if err := remote.UDP(t.Context(), g.ns, netip.MustParseAddr(n.addr), 40, 16, int(mtu)-28, 3*int(mtu)); err != nil {
				t.Errorf("%s: UDP with %s: %v", c.settings, n.addr, err)
			}
			p1, b1 := packets(t, g.m, n.name)
			mean := (b1 - b0) / max(1, p1-p0)
			if !c.segments && mean > mtu+14 || c.segments && mtu == 1500 && mean < 2*mtu {
				t.Errorf("%s: %s sends frames of %d bytes on average, with an MTU of %d", c.settings, n.name, mean, mtu)
			}
		}
		stop()
		g.clean(t, n.door, n.pairs)
	}
}

// testChannels: the number of queue pairs changes under traffic.
func (g *guestRig) testChannels(t *testing.T) {
	f, stop := g.flow(t, packedNIC.addr)
	for i := 0; i < *roundFlag; i++ {
		for _, pairs := range []int{1, 2, 4, 1, 4, 2} {
			vmtest.Run(t, g.m, "peer", "channels", packedNIC.name, strconv.Itoa(pairs))
			advance(t, f)
			g.clean(t, 1, pairs)
		}
	}
	g.check(t, packedNIC.addr, remote.Config{Pings: 20, Bytes: 1 << 20})
	stop()
	vmtest.Run(t, g.m, "peer", "channels", packedNIC.name, "4")
	g.clean(t, 1, 4)
}

// testMemory: memory is plugged into the guest, and used for its frames, under traffic; the front end tells of it by
// slots, and by a whole table.
func (g *guestRig) testMemory(t *testing.T) {
	fa, stopA := g.flow(t, splitNIC.addr)
	fb, stopB := g.flow(t, packedNIC.addr)
	for i := 0; i < 2; i++ {
		var before [2]status.Link
		for d, pairs := range []int{1, 4} {
			before[d] = g.connected(d, pairs)
		}
		id, had := fmt.Sprintf("dimm%d", i), g.memTotal(t)
		if _, err := g.m.QMP(t.Context(), "object-add", map[string]any{"qom-type": "memory-backend-memfd", "id": "mem" + id, "size": 128 << 20, "share": true}); err != nil {
			t.Fatal(err)
		}
		if err := g.m.DeviceAdd(t.Context(), map[string]any{"driver": "pc-dimm", "id": id, "memdev": "mem" + id}); err != nil {
			t.Fatal(err)
		}
		for d := range before {
			l := g.waitState(d, "with the new memory", 20*time.Second, func(l status.Link) bool { return len(l.Regions) == len(before[d].Regions)+1 })
			if r := l.Regions[len(l.Regions)-1]; r.Size != 128<<20 || l.Counters["tables"] == before[d].Counters["tables"] {
				t.Errorf("door %d: %+v, %v", d, l.Regions, l.Counters)
			}
		}
		g.online(t, had+128<<10)
		advance(t, fa, fb)
	}
	// New memory is above 4 GiB: it is what the kernel prefers for buffers from now on.
	for _, n := range []guestNIC{splitNIC, packedNIC} {
		g.check(t, n.addr, remote.Config{Pings: 20, Bytes: 4 << 20})
	}
	stopA()
	stopB()
	g.clean(t, 0, 1)
	g.clean(t, 1, 4)
}

// memTotal returns how much memory the guest's kernel has, in KiB.
func (g *guestRig) memTotal(t *testing.T) (kib int) {
	t.Helper()
	if _, err := fmt.Sscanf(vmtest.Get(t, g.m, "/proc/meminfo"), "MemTotal: %d", &kib); err != nil {
		t.Fatal(err)
	}
	return kib
}

// online waits until the guest's kernel has all of the memory that was plugged in. Some kernels have to be told.
func (g *guestRig) online(t *testing.T, kib int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for ; g.memTotal(t) < kib; time.Sleep(10 * time.Millisecond) {
		paths, err := g.m.Glob(ctx, "/sys/devices/system/memory/memory*/state")
		if err != nil {
			t.Fatalf("%d KiB of memory, want %d: %v", g.memTotal(t), kib, err)
		}
		for _, p := range paths {
			if vmtest.Get(t, g.m, p) == "offline" {
				g.m.Write(ctx, p, "online_kernel") // it may be online by now
			}
		}
	}
}

// testRebind: the driver lets go of the device and takes it again.
func (g *guestRig) testRebind(t *testing.T) {
	f, stop := g.flow(t, packedNIC.addr)
	ctx := t.Context()
	rebind := func(n guestNIC) {
		t.Helper()
		devs, err := g.m.Glob(ctx, "/sys/bus/pci/devices/"+n.fn+"/virtio*")
		if err != nil || len(devs) != 1 {
			t.Fatal(devs, err)
		}
		for _, file := range []string{"unbind", "bind"} {
			if err := g.m.Write(ctx, "/sys/bus/virtio/drivers/virtio_net/"+file, filepath.Base(devs[0])); err != nil {
				t.Fatal(err)
			}
		}
		g.upOne(t, n)
	}
	for i := 0; i < 2**roundFlag; i++ {
		rebind(splitNIC)
		g.clean(t, 0, 1)
		g.check(t, splitNIC.addr, remote.Config{Pings: 3, Bytes: 256 << 10})
	}
	advance(t, f) // the other device has not noticed
	stop()
	for i := 0; i < 2**roundFlag; i++ {
		rebind(packedNIC)
		g.clean(t, 1, 4)
		g.check(t, packedNIC.addr, remote.Config{Pings: 3, Bytes: 256 << 10})
	}
}

// testHostKilled: the host program dies, and another one takes its place: QEMU connects again, and the rings go
// on, with the TCP connections over them. QEMU does not know where the packed ones were: the host does.
func (g *guestRig) testHostKilled(t *testing.T) {
	fa, stopA := g.flow(t, splitNIC.addr)
	fb, stopB := g.flow(t, packedNIC.addr)
	for i := 0; i < *roundFlag; i++ {
		advance(t, fa, fb)
		g.cmd.Process.Kill()
		g.cmd.Wait()
		g.start()
		g.connected(0, 1)
		l := g.connected(1, 4)
		if l.Counters["places_recalled"] != 8 || l.Counters["places_lost"] != 0 {
			t.Errorf("the places of 8 packed queues: %v", l.Counters)
		}
		advance(t, fa, fb)
	}
	stopA()
	stopB()
	g.clean(t, 0, 1)
	g.clean(t, 1, 4)
}

// testReboot: the guest's machine is reset under traffic.
func (g *guestRig) testReboot(t *testing.T) {
	for i := 0; i < *roundFlag/2; i++ {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := g.m.Reboot(ctx); err != nil {
			t.Fatal(err)
		}
		t.Logf("rebooted in %.1f s, the kernel says %s", g.m.BootTime.Seconds(), vmtest.Get(t, g.m, "/proc/uptime"))
		g.up(t)
		g.testTraffic(t)
	}
}
