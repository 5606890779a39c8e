//go:build linux

package hwtest

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/boardlink/boardlink/hwtest/remote"
	"github.com/boardlink/boardlink/hwtest/vm"
	"github.com/boardlink/boardlink/hwtest/vm/vmtest"
	"github.com/boardlink/boardlink/trial/netns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

var migrationsFlag = flag.Int("migrations", 1, "how often TestVhostUserMigration moves its guest")

// TestVhostUserMigration: a guest moves from one QEMU, and one host program, to others and back while every byte that two TCP
// connections carry is compared: one over a split device, one over a packed device with two pairs and without mergeable
// buffers. When both machines stand still no page of memory differs: what the host programs wrote was logged. At its
// destination the guest's address is announced.
func TestVhostUserMigration(t *testing.T) {
	if netns.NeedsUser() {
		vmtest.Lacks(t, "root (CAP_NET_ADMIN, CAP_SYS_ADMIN)")
	}
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	macs := [2]string{"52:54:00:00:00:0a", "52:54:00:00:00:0b"}
	guests := [2]string{boardIP, "10.67.0.2"}
	// Two hosts, each with two devices; two bridges, each with a device of either host.
	type place struct {
		*doors
		taps    [2]string
		devices []string // of a QEMU that is joined to this host
	}
	var places [2]place
	for i := range places {
		p := &places[i]
		dir := shortDir(t)
		a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
		p.taps = [2]string{fmt.Sprintf("a%d", i), fmt.Sprintf("b%d", i)}
		p.doors = newDoorsIn(t, ns, dir, "--board", "vhost-user:"+a, "--board", "vhost-user:"+b+",queues=2", "--net", "name="+p.taps[0]+",board=0", "--net", "name="+p.taps[1]+",board=1")
		// The size is no multiple of 64 pages. Else QEMU 7.2 forgets, where it reads which pages were written, to have the
		// emulated processors tell of the next writes to them, and loses what the guest itself writes.
		p.devices = []string{"-object", "memory-backend-memfd,id=mem,size=268443648,share=on", "-m", "262152K", "-machine", "memory-backend=mem",
			"-chardev", "socket,id=ca,path=" + a + ",reconnect=1", "-netdev", "vhost-user,id=na,chardev=ca",
			"-device", "virtio-net-pci,netdev=na,disable-legacy=on,vectors=0,addr=0x4,mac=" + macs[0],
			"-chardev", "socket,id=cb,path=" + b + ",reconnect=1", "-netdev", "vhost-user,id=nb,chardev=cb,queues=2",
			"-device", "virtio-net-pci,netdev=nb,disable-legacy=on,vectors=0,addr=0x5,mq=on,packed=on,mrg_rxbuf=off,mac=" + macs[1]}
		p.listening(0)
		p.listening(1)
	}
	var bridges [2]int
	var announced *arrivals
	if err := ns.Do(func() (err error) {
		for k, prefix := range [2]string{hostPrefix, "10.67.0.1/24"} {
			if bridges[k], err = bridge(fmt.Sprintf("br%d", k), prefix, places[0].taps[k], places[1].taps[k]); err != nil {
				return err
			}
		}
		announced, err = watchRARP()
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(announced.close)

	m := vmtest.Boot(t, vm.Config{Memory: 256, SMP: 2, Modules: []string{"virtio_net"}, Programs: map[string]string{"/bin/peer": programs["/bin/peer"]}, Devices: places[0].devices})
	vmtest.Run(t, m, "peer", "up", "eth0", boardPrefix)
	vmtest.Run(t, m, "peer", "up", "eth1", "10.67.0.2/24")
	echo(t, m)
	places[0].connected(0, 1)
	places[0].connected(1, 2)

	// Both connections go on until the last round is over.
	ctx, cancel := context.WithTimeout(t.Context(), time.Duration(*migrationsFlag+2)*time.Minute)
	defer cancel()
	until := make(chan struct{})
	var done [2]atomic.Int64
	var wg sync.WaitGroup
	for k := range guests {
		wg.Go(func() {
			r, err := remote.Check(ctx, ns, netip.MustParseAddr(guests[k]), remote.Config{Pings: 10, Ready: time.Minute, Until: until, Done: &done[k], Pause: 2 * time.Millisecond})
			if err != nil {
				t.Errorf("%s: %v", guests[k], err)
			}
			t.Logf("%s: %d MiB there and back compared, %d bytes wrong", guests[k], r.Bytes>>20, r.Corrupt)
		})
	}
	var once sync.Once
	stop := func() {
		once.Do(func() { close(until) })
		if t.Failed() {
			cancel()
		}
		wg.Wait()
	}
	defer stop()
	more := func(what string) {
		t.Helper()
		for k := range done {
			was, end := done[k].Load(), time.Now().Add(30*time.Second)
			for done[k].Load() < was+1<<20 {
				if t.Failed() || time.Now().After(end) {
					t.Fatalf("%s: %d bytes more came back from %s", what, done[k].Load()-was, guests[k])
				}
				time.Sleep(5 * time.Millisecond)
			}
		}
	}
	more("before the first round")

	for n := range *migrationsFlag {
		from, to := &places[n%2], &places[(n+1)%2]
		was := [2]int{announced.count(bridges[0], macs[0]), announced.count(bridges[1], macs[1])}
		var checked int
		next, r, err := m.Migrate(ctx, to.devices, func(next *vm.VM) error {
			bad, pages, err := comparePages(m.Pid(), next.Pid())
			checked = pages
			if err == nil && len(bad) != 0 {
				err = fmt.Errorf("%d of %d pages differ, those at %#x among them", len(bad), pages, bad[:min(len(bad), 20)])
			}
			return err
		})
		if next != nil {
			t.Cleanup(func() { // the last machine; the others are closed already
				if t.Failed() {
					t.Logf("the console of the machine after round %d:\n%s", n, next.Console())
				}
				if err := next.Close(); err != nil {
					t.Error(err)
				}
			})
		}
		if err != nil {
			t.Fatalf("round %d: %v", n, err)
		}
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
		m = next
		more(fmt.Sprintf("after round %d", n))
		for k := range macs {
			for end := time.Now().Add(30 * time.Second); announced.count(bridges[k], macs[k]) == was[k]; time.Sleep(5 * time.Millisecond) {
				if time.Now().After(end) {
					t.Fatalf("round %d: %s was not announced by %s", n, macs[k], to.taps[k])
				}
			}
			if l := to.connected(k, k+1); l.Counters["rarp"] == 0 {
				t.Errorf("round %d: door %d of the destination announced nothing", n, k)
			}
			l := from.listening(k)
			for _, c := range []string{"failed", "unknown", "queues_broken", "memory_faults", "log_outside", "stuck"} {
				if l.Counters[c] != 0 {
					t.Errorf("round %d: door %d of the source: %d %s", n, k, l.Counters[c], c)
				}
			}
			if turn := uint64(n/2 + 1); l.Counters["logs"] < turn || l.Counters["log_changes"] < turn {
				t.Errorf("round %d: door %d of the source: %d logs, changed %d times", n, k, l.Counters["logs"], l.Counters["log_changes"])
			}
		}
		t.Logf("round %d: %v, the guest stood still for %v, %d MiB were transferred, %d pages compared", n, r.Total, r.Downtime, r.Bytes>>20, checked)
	}
	stop()
	if err := m.Err(); err != nil {
		t.Error(err)
	}
}

// bridge makes a bridge of interfaces, with an address, and returns its index. It runs in the namespace.
func bridge(name, prefix string, ports ...string) (int, error) {
	b := &netlink.Bridge{LinkAttrs: netlink.NewLinkAttrs()}
	b.Name = name
	if err := netlink.LinkAdd(b); err != nil {
		return 0, fmt.Errorf("bridge %s: %w", name, err)
	}
	for _, p := range ports {
		l, err := netlink.LinkByName(p)
		if err == nil {
			err = netlink.LinkSetMaster(l, b)
		}
		if err != nil {
			return 0, fmt.Errorf("port %s: %w", p, err)
		}
	}
	addr, err := netlink.ParseAddr(prefix)
	if err == nil {
		err = netlink.AddrAdd(b, addr)
	}
	if err == nil {
		err = netlink.LinkSetUp(b)
	}
	return b.Index, err
}

// arrivals counts the RARP frames that came up to bridges of a namespace.
type arrivals struct {
	fd   int
	stop chan struct{}
	done chan struct{}
	mu   sync.Mutex
	got  map[string]int
}

// watchRARP runs in the namespace.
func watchRARP() (*arrivals, error) {
	const rarp = 0x8035
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, rarp>>8|rarp&0xff<<8)
	if err != nil {
		return nil, err
	}
	tv := unix.NsecToTimeval(int64(100 * time.Millisecond))
	unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv)
	a := &arrivals{fd: fd, stop: make(chan struct{}), done: make(chan struct{}), got: map[string]int{}}
	go func() {
		defer close(a.done)
		b := make([]byte, 2048)
		for {
			select {
			case <-a.stop:
				return
			default:
			}
			n, from, err := unix.Recvfrom(fd, b, 0)
			if ll, ok := from.(*unix.SockaddrLinklayer); err == nil && ok && n >= 14 {
				a.mu.Lock()
				a.got[fmt.Sprint(ll.Ifindex, net.HardwareAddr(b[6:12]))]++
				a.mu.Unlock()
			}
		}
	}()
	return a, nil
}

func (a *arrivals) count(ifindex int, mac string) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.got[fmt.Sprint(ifindex, " ", mac)]
}

func (a *arrivals) close() {
	close(a.stop)
	<-a.done
	unix.Close(a.fd)
}

// comparePages compares the memory of two machines, each a memfd of its QEMU, and returns the offsets of pages that differ
// and the number of all.
func comparePages(a, b int) (bad []int, pages int, err error) {
	const page = 4096
	var mem [2][]byte
	for i, pid := range [2]int{a, b} {
		if mem[i], err = mapMemory(pid); err != nil {
			return nil, 0, err
		}
		defer unix.Munmap(mem[i])
	}
	if len(mem[0]) != len(mem[1]) || len(mem[0]) == 0 {
		return nil, 0, fmt.Errorf("memories of %d and %d bytes", len(mem[0]), len(mem[1]))
	}
	for p := 0; p+page <= len(mem[0]); p += page {
		if !bytes.Equal(mem[0][p:p+page], mem[1][p:p+page]) {
			bad = append(bad, p)
		}
	}
	return bad, len(mem[0]) / page, nil
}

// mapMemory maps a QEMU's memory-backend-memfd.
func mapMemory(pid int) ([]byte, error) {
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil {
		return nil, err
	}
	for _, fd := range fds {
		name, err := os.Readlink(fd)
		if err != nil || !strings.HasPrefix(name, "/memfd:") {
			continue
		}
		f, err := os.Open(fd)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		if st, err := f.Stat(); err != nil || st.Size() < 64<<20 {
			continue
		} else {
			return unix.Mmap(int(f.Fd()), 0, int(st.Size()), unix.PROT_READ, unix.MAP_SHARED)
		}
	}
	return nil, fmt.Errorf("no memfd of its memory in process %d", pid)
}
