//go:build linux

package hwtest

import (
	"context"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/boardlink/boardlink/hwtest/remote"
	"github.com/boardlink/boardlink/hwtest/vm"
	"github.com/boardlink/boardlink/hwtest/vm/vmtest"
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/trial/netns"
	"github.com/boardlink/boardlink/trial/traffic"
	"golang.org/x/sys/unix"
)

// doors is a host with two vhost-user sockets, in a namespace of its own.
type doors struct {
	end
	cmd  *exec.Cmd
	args []string
}

func (d *doors) start() {
	d.t.Helper()
	exe, err := programPath()
	if err != nil {
		d.t.Fatal(err)
	}
	d.cmd = exec.Command(exe, d.args...)
	d.cmd.Stdout, d.cmd.Stderr = d.log, d.log
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := d.ns.Start(d.cmd); err != nil {
		d.t.Fatal(err)
	}
}

// connected waits until the driver of door n runs.
func (d *doors) connected(n, pairs int) status.Link {
	d.t.Helper()
	return d.waitState(n, "connected, with carrier", 60*time.Second, func(l status.Link) bool {
		return l.State == "connected" && len(l.Devices) == 1 && l.Devices[0].Carrier && l.Devices[0].Pairs == pairs
	})
}

// newDoors starts a host in a namespace of its own, which ends with the test; args follow those
// that all have.
func newDoors(t *testing.T, dir string, args ...string) *doors {
	t.Helper()
	if netns.NeedsUser() {
		vmtest.Lacks(t, "root (CAP_NET_ADMIN, CAP_SYS_ADMIN)")
	}
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	d := &doors{end: end{t: t, side: "host", ns: ns, socket: filepath.Join(dir, "status"), log: new(logBuffer)}}
	d.args = append([]string{"host", "--status", d.socket}, args...)
	d.logOnFailure()
	d.start()
	t.Cleanup(func() {
		d.cmd.Process.Signal(unix.SIGTERM)
		if err := d.cmd.Wait(); err != nil {
			t.Errorf("the host ended badly: %v", err)
		}
	})
	return d
}

// listening waits until door n has no front end.
func (d *doors) listening(n int) status.Link {
	d.t.Helper()
	return d.waitState(n, "listening, without carrier", 20*time.Second, func(l status.Link) bool {
		return l.State == "waiting for a front end" && !l.Devices[0].Carrier
	})
}

// shortDir makes a folder for sockets, whose paths have 107 bytes.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "bl")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// TestVhostUserGuest: a virtual machine with an unmodified virtio_net stands where a board does.
// One process serves two sockets: a split device, and a packed one with two queue pairs. The host
// is killed and started anew under the guest.
func TestVhostUserGuest(t *testing.T) {
	dir := shortDir(t)
	a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	d := newDoors(t, dir, "--board", "vhost-user:"+a, "--board", "vhost-user:"+b+",queues=2",
		"--net", "name=bl0,addr="+hostPrefix+",board=0,mtu=9000", "--net", "name=bl1,addr=10.67.0.1/24,board=1")
	d.listening(0)
	d.listening(1)
	m := vmtest.Boot(t, vm.Config{Memory: 256, SMP: 2, Modules: []string{"virtio_net"}, Programs: map[string]string{"/bin/peer": programs["/bin/peer"]},
		Devices: []string{"-object", "memory-backend-memfd,id=mem,size=256M,share=on", "-machine", "memory-backend=mem",
			"-chardev", "socket,id=ca,path=" + a + ",reconnect=1", "-netdev", "vhost-user,id=na,chardev=ca",
			"-device", "virtio-net-pci,netdev=na,disable-legacy=on,vectors=0,addr=0x4,mac=52:54:00:00:00:0a,host_mtu=9000",
			"-chardev", "socket,id=cb,path=" + b + ",reconnect=1", "-netdev", "vhost-user,id=nb,chardev=cb,queues=2",
			"-device", "virtio-net-pci,netdev=nb,disable-legacy=on,vectors=0,addr=0x5,mac=52:54:00:00:00:0b,mq=on,packed=on"}})
	vmtest.Run(t, m, "peer", "up", "eth0", boardPrefix)
	vmtest.Run(t, m, "peer", "up", "eth1", "10.67.0.2/24")
	echo(t, m)

	l := d.connected(0, 1)
	if dev := l.Devices[0]; has(dev.Negotiated, "ring_packed") || !has(dev.Negotiated, "event_idx") || !has(dev.Negotiated, "mrg_rxbuf") || !has(dev.Negotiated, "mtu") {
		t.Errorf("split: negotiated %v", dev.Negotiated)
	}
	if mtu := vmtest.Get(t, m, "/sys/class/net/eth0/mtu"); mtu != "9000" {
		t.Errorf("the guest has an MTU of %s", mtu)
	}
	d.check(t, boardIP, remote.Config{Pings: 50, Bytes: 8 << 20, Ready: time.Minute})
	l = d.connected(1, 2)
	if dev := l.Devices[0]; !has(dev.Negotiated, "ring_packed") || !has(dev.Negotiated, "mq") || dev.MaxPairs != 2 {
		t.Errorf("packed: negotiated %v, %d pairs", dev.Negotiated, dev.MaxPairs)
	}
	d.check(t, "10.67.0.2", remote.Config{Pings: 50, Bytes: 8 << 20})
	for i, pairs := range []int{1, 2} {
		if l := d.connected(i, pairs); l.Counters["failed"] != 0 || l.Counters["unknown"] != 0 || l.Counters["queues_broken"] != 0 {
			t.Errorf("door %d: %v", i, l.Counters)
		}
	}

	// The host dies, and another one takes its place: QEMU connects again, and the rings go on.
	d.cmd.Process.Kill()
	d.cmd.Wait()
	d.start()
	d.connected(0, 1)
	d.check(t, boardIP, remote.Config{Pings: 50, Bytes: 8 << 20, Ready: time.Minute})
	if n := m.Err(); n != nil {
		t.Error(n)
	}
}

func has(names []string, name string) bool {
	for _, n := range names {
		if n == name {
			return true
		}
	}
	return false
}

// TestVhostUserDPDK: DPDK's virtio_user driver drives the device and answers pings, over each kind
// of ring; it ends, is killed, and comes back. What it says that it sent has arrived.
func TestVhostUserDPDK(t *testing.T) {
	exe, err := exec.LookPath("dpdk-testpmd")
	if err != nil {
		vmtest.Lacks(t, "dpdk-testpmd (Debian: apt-get install dpdk-dev)")
	}
	dir := shortDir(t)
	sock := filepath.Join(dir, "s")
	d := newDoors(t, dir, "--board", "vhost-user:"+sock+",queues=2", "-i", "bl0", "--addr", hostPrefix)
	sent := func(l status.Link) (n uint64) {
		for _, q := range l.Devices[0].Queues {
			if strings.HasPrefix(q.Name, "tx") {
				n += q.Pump["frames"]
			}
		}
		return n
	}
	for _, c := range []struct {
		name, vdev string
		pairs      int
		packed     bool
		kill       bool
	}{
		{"split", "queues=1,packed_vq=0,mrg_rxbuf=0,in_order=0", 1, false, false},
		{"split, in order, mergeable, killed", "queues=1,packed_vq=0,mrg_rxbuf=1,in_order=1", 1, false, true},
		{"packed, mergeable, two pairs", "queues=2,packed_vq=1,mrg_rxbuf=1,in_order=0", 2, true, false},
		{"packed, in order", "queues=1,packed_vq=1,mrg_rxbuf=0,in_order=1", 1, true, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := sent(d.listening(0))
			p := exec.Command(exe, "--no-huge", "-m", "256", "--lcores", "0,1", "--no-pci", "--no-telemetry", "--file-prefix="+filepath.Base(dir),
				"--vdev", "net_virtio_user0,path="+sock+","+c.vdev, "--", "--forward-mode=icmpecho", "--auto-start", "--nb-cores=1",
				"--rxq="+strconv.Itoa(c.pairs), "--txq="+strconv.Itoa(c.pairs), "--total-num-mbufs=8192", "--no-mlockall")
			var out logBuffer
			p.Stdout, p.Stderr = &out, &out
			p.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
			stdin, err := p.StdinPipe()
			if err == nil {
				err = p.Start()
			}
			if err != nil {
				t.Fatal(err)
			}
			ended := false
			t.Cleanup(func() {
				if !ended {
					p.Process.Kill()
					p.Wait()
				}
				if t.Failed() {
					t.Logf("testpmd:\n%s", &out)
				}
			})
			l := d.connected(0, c.pairs)
			if got := has(l.Devices[0].Negotiated, "ring_packed"); got != c.packed {
				t.Errorf("negotiated %v", l.Devices[0].Negotiated)
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			addr := netip.MustParseAddr(boardIP)
			if err := traffic.WaitReachable(ctx, d.ns, addr); err != nil {
				t.Fatal(err)
			}
			r, err := traffic.Ping(ctx, d.ns, addr, traffic.PingConfig{Count: 200, Interval: time.Millisecond, Sizes: []int{56, 0, 1400}, Timeout: 5 * time.Second})
			if err != nil || r.Lost != 0 || r.Corrupt != 0 || r.Received != 200 {
				t.Fatalf("%+v, %v", r, err)
			}
			l = d.connected(0, c.pairs)
			if l.Counters["failed"] != 0 || l.Counters["unknown"] != 0 || l.Counters["queues_broken"] != 0 {
				t.Errorf("%v", l.Counters)
			}
			if c.kill {
				p.Process.Kill()
			} else {
				stdin.Close()
			}
			p.Wait()
			ended = true
			after := sent(d.listening(0))
			if c.kill {
				return
			}
			m := regexp.MustCompile(`(?s)Accumulated forward statistics.*?TX-packets: (\d+)`).FindStringSubmatch(out.String())
			if m == nil || m[1] != strconv.FormatUint(after-before, 10) {
				t.Errorf("%d frames arrived, testpmd sent %v", after-before, m)
			}
		})
	}
}
