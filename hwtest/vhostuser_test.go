//go:build linux

package hwtest

import (
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/boardlink/boardlink/hwtest/remote"
	"github.com/boardlink/boardlink/hwtest/vm"
	"github.com/boardlink/boardlink/hwtest/vm/vmtest"
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/trial/netns"
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
