//go:build linux

package hwtest

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/boardlink/boardlink/hwtest/vm"
	"github.com/boardlink/boardlink/hwtest/vm/vmtest"
	"github.com/boardlink/boardlink/status"
)

// TestVhostUserDisk: a virtual machine with unmodified drivers has a disk with ext4 and a source of entropy. The host is killed and
// started anew while the guest writes and syncs: nothing is lost, and the file system is clean.
func TestVhostUserDisk(t *testing.T) {
	dir := shortDir(t)
	img, ds, rs := filepath.Join(dir, "img"), filepath.Join(dir, "d"), filepath.Join(dir, "r")
	if err := os.WriteFile(img, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(img, 64<<20); err != nil {
		t.Fatal(err)
	}
	mkfs, err := exec.LookPath("/sbin/mkfs.ext4")
	if err != nil {
		vmtest.Lacks(t, "mkfs.ext4 (e2fsprogs)")
	}
	if out, err := exec.Command(mkfs, "-q", img).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v %s", err, out)
	}
	d := newDoors(t, dir, "--board", "vhost-user:"+ds, "--disk", "name=data,file="+img+",queues=2", "--board", "vhost-user:"+rs, "--rng=board=1")
	of := func(n int, what string, ok func(status.Device) bool) status.Device {
		t.Helper()
		return d.waitState(n, what, 60*time.Second, func(l status.Link) bool { return len(l.Devices) == 1 && ok(l.Devices[0]) }).Devices[0]
	}
	of(0, "made", func(status.Device) bool { return true })
	of(1, "made", func(status.Device) bool { return true })
	m := vmtest.Boot(t, vm.Config{Name: "guest", Memory: 256, SMP: 2, Modules: []string{"virtio_blk", "ext4", "virtio-rng"}, Programs: map[string]string{"/bin/peer": programs["/bin/peer"]},
		Devices: []string{"-object", "memory-backend-memfd,id=mem,size=256M,share=on", "-machine", "memory-backend=mem",
			"-chardev", "socket,id=cd,path=" + ds + ",reconnect=1", "-device", "vhost-user-blk-pci,chardev=cd,disable-legacy=on,num-queues=2,vectors=0",
			"-chardev", "socket,id=cr,path=" + rs, "-device", "vhost-user-rng-pci,chardev=cr,vectors=0"}})
	if got := vmtest.Get(t, m, "/sys/block/vda/serial"); got != "data" {
		t.Errorf("the disk's serial number is %q", got)
	}
	if got := vmtest.Get(t, m, "/sys/class/misc/hw_random/rng_current"); got != "virtio_rng.0" {
		t.Errorf("the guest's source of entropy is %q", got)
	}
	of(1, "asked for entropy", func(s status.Device) bool { return s.Counters["bytes"] > 0 && s.Counters["broken"] == 0 })
	vmtest.Run(t, m, "peer", "disk", "/dev/vda", "write", "first")
	s := of(0, "written", func(s status.Device) bool { return s.Counters["writes"] > 0 })
	if s.Counters["flushes"] == 0 || s.Counters["syncs"] != s.Counters["flushes"] || s.Counters["failed"] != 0 || s.Counters["refused"] != 0 || s.Counters["broken"] != 0 {
		t.Errorf("counters %v", s.Counters)
	}
	if !has(s.Negotiated, "blk_mq") || !has(s.Negotiated, "discard") || !has(s.Negotiated, "write_zeroes") || !has(s.Negotiated, "flush") {
		t.Errorf("negotiated %v", s.Negotiated)
	}

	// Under way when the host dies.
	p, err := m.Start(t.Context(), vm.Cmd{Args: []string{"peer", "disk", "/dev/vda", "write", "second"}})
	if err != nil {
		t.Fatal(err)
	}
	of(0, "writing", func(n status.Device) bool { return n.Counters["writes"] > s.Counters["writes"]+5 })
	d.cmd.Process.Kill()
	d.cmd.Wait()
	d.start()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	if out, err := p.Wait(ctx); err != nil {
		t.Fatalf("the writer: %v %s", err, out.Stderr)
	}
	vmtest.Run(t, m, "peer", "disk", "/dev/vda", "verify", "second")
	s = of(0, "read", func(s status.Device) bool { return s.Counters["reads"] > 0 })
	if s.Counters["syncs"] != s.Counters["flushes"] || s.Counters["failed"] != 0 || s.Counters["refused"] != 0 || s.Counters["broken"] != 0 {
		t.Errorf("counters after the kill %v", s.Counters)
	}
	m.Close()
	if out, err := exec.Command("/sbin/fsck.ext4", "-fn", img).CombinedOutput(); err != nil {
		t.Errorf("fsck.ext4: %v %s", err, out)
	}
}
