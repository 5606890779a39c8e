package tunbridge

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// newNetns makes a network namespace that goes with the test, and returns a descriptor of it.
func newNetns(t testing.TB) int {
	t.Helper()
	fd := -1
	err := inNewNS(func() error {
		fd, _ = openThreadNetns()
		return nil
	})
	if err != nil || fd < 0 {
		lacking(t, "a network namespace (root)", err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// stranger makes a tap of somebody else's in the namespace that netns refers to (-1: the thread's), with the index, unless
// that is 0, and returns what the kernel tells of it.
func stranger(t testing.TB, netns int, name string, index int) func() string {
	t.Helper()
	fd := -1
	enter := func(f func() error) error {
		if netns < 0 {
			return f()
		}
		return inNetns(netns, f)
	}
	err := enter(func() (err error) {
		if fd, err = openTun(name); err != nil {
			return err
		}
		if index != 0 {
			v := int32(index)
			if err := ioctlSetInt(fd, unix.TUNSETIFINDEX, v); err != nil {
				return fmt.Errorf("TUNSETIFINDEX: %w", err)
			}
		}
		r := newIfreq(name)
		*r.u16() = unix.IFF_TAP | unix.IFF_NO_PI
		if err := ioctlIfreq(fd, unix.TUNSETIFF, r); err != nil {
			return err
		}
		l, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		return netlink.LinkSetMTU(l, 1234)
	})
	t.Cleanup(func() { unix.Close(fd) })
	if err != nil {
		t.Fatal(err)
	}
	return func() (s string) {
		err := enter(func() error {
			l, err := netlink.LinkByName(name)
			if err != nil {
				return err
			}
			a := l.Attrs()
			s = fmt.Sprintf("index %d, MTU %d, MAC %v, flags %#x", a.Index, a.MTU, a.HardwareAddr, a.RawFlags)
			return nil
		})
		if err != nil {
			s = err.Error()
		}
		return s
	}
}

// moves are what can happen to an interface t0 behind the program's back, each with a stranger that takes what it had.
var moves = []struct {
	name  string
	moved bool // to another namespace
	do    func(t *testing.T, index, netns int) (now string, strangers []func() string)
}{
	{"renamed", false, func(t *testing.T, index, netns int) (string, []func() string) {
		rename(t, -1, "t0", "other")
		return "other", []func() string{stranger(t, -1, "t0", 0)}
	}},
	{"moved", true, func(t *testing.T, index, netns int) (string, []func() string) {
		move(t, "t0", netns)
		return "t0", []func() string{stranger(t, -1, "t0", 0)}
	}},
	{"moved, and a stranger has the name and the index", true, func(t *testing.T, index, netns int) (string, []func() string) {
		move(t, "t0", netns)
		return "t0", []func() string{stranger(t, -1, "t0", index)}
	}},
	{"moved, and a stranger has the name, the index and the MAC address", true, func(t *testing.T, index, netns int) (string, []func() string) {
		mac := kernelLink(t, "t0").Attrs().HardwareAddr
		move(t, "t0", netns)
		s := stranger(t, -1, "t0", index)
		if err := netlink.LinkSetHardwareAddr(kernelLink(t, "t0"), mac); err != nil {
			t.Fatal(err)
		}
		return "t0", []func() string{s}
	}},
	{"moved and renamed", true, func(t *testing.T, index, netns int) (string, []func() string) {
		s := stranger(t, -1, "eth0", 0)
		move(t, "t0", netns)
		rename(t, netns, "t0", "eth0")
		return "eth0", []func() string{s}
	}},
	{"moved to where its index is taken", true, func(t *testing.T, index, netns int) (string, []func() string) {
		there := stranger(t, netns, "there", index)
		move(t, "t0", netns)
		return "t0", []func() string{there, stranger(t, -1, "t0", index)}
	}},
}

func rename(t *testing.T, netns int, from, to string) {
	t.Helper()
	f := func() error {
		l, err := netlink.LinkByName(from)
		if err != nil {
			return err
		}
		if err := netlink.LinkSetDown(l); err != nil {
			return err
		}
		return netlink.LinkSetName(l, to)
	}
	var err error
	if netns < 0 {
		err = f()
	} else {
		err = inNetns(netns, f)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func move(t *testing.T, name string, netns int) {
	t.Helper()
	if err := netlink.LinkSetNsFd(kernelLink(t, name), netns); err != nil {
		t.Fatal(err)
	}
}

// Whatever happens to the interface, requests reach it and no other.
func TestIfaceRequestsFollow(t *testing.T) {
	for _, m := range moves {
		t.Run(m.name, func(t *testing.T) {
			ifaceNS(t)
			it := mustOpen(t, Config{Name: "t0", Type: TAP, Offload: true, MTU: 1400})
			netns := newNetns(t)
			now, strangers := m.do(t, it.Index(), netns)
			var before []string
			for _, s := range strangers {
				before = append(before, s())
			}
			if n := it.MTU(); n != 1400 {
				t.Errorf("MTU %d is told, it is 1400", n)
			}
			mac := StableMAC("follow")
			if err := it.SetMTU(1300); err != nil {
				t.Error(err)
			}
			if err := it.SetMAC(mac); err != nil {
				t.Error(err)
			}
			if err := it.SetUp(true); err != nil {
				t.Error(err)
			}
			check := func() error {
				l, err := netlink.LinkByName(now)
				if err != nil {
					return err
				}
				a := l.Attrs()
				if a.MTU != 1300 || a.HardwareAddr.String() != mac.String() || a.RawFlags&unix.IFF_UP == 0 {
					return fmt.Errorf("%s has MTU %d, MAC %v, flags %#x: want 1300, %v and up", now, a.MTU, a.HardwareAddr, a.RawFlags, mac)
				}
				want := State{Name: now, Index: a.Index, MTU: 1300, Up: true, Moved: m.moved, Made: 1}
				s := it.State()
				want.Lapses = s.Lapses
				if s != want {
					return fmt.Errorf("state %+v, want %+v", s, want)
				}
				return it.InNamespace(func(name string, index int) error {
					if l, err := netlink.LinkByName(name); err != nil || l.Attrs().Index != index || index != a.Index || name != now {
						return fmt.Errorf("in its namespace: name %q, index %d; want %q, %d (%v)", name, index, now, a.Index, err)
					}
					return nil
				})
			}
			if err := it.atHome(m.moved, netns, check); err != nil {
				t.Error(err)
			}
			for i, s := range strangers {
				if s := s(); s != before[i] {
					t.Errorf("a stranger had %s, and has %s", before[i], s)
				}
			}
		})
	}
}

// atHome runs f in the namespace netns where moved is set, else here.
func (it *Iface) atHome(moved bool, netns int, f func() error) error {
	if moved {
		return inNetns(netns, f)
	}
	return f()
}

const elsewhereEnv = "TUNBRIDGE_TEST_ELSEWHERE"

// The unprivileged side of TestIfaceRequestsRefused: it opens the tap of its user, waits for what happens to it, and
// prints the answers to its requests, a line each.
func init() {
	if os.Getenv(elsewhereEnv) == "" {
		return
	}
	it, err := Open(Config{Name: "t0", Type: TAP, Offload: true})
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	changed := make(chan State, 16)
	it.Watch(func(s State) { changed <- s })
	fmt.Println("ready")
	var line string
	fmt.Scanln(&line)
	select {
	case <-changed:
	case <-time.After(5 * time.Second):
		fmt.Println("nothing was noticed")
	}
	s := it.State()
	fmt.Printf("elsewhere=%v name=%s MTU=%d,%d\n", s.Elsewhere, s.Name, s.MTU, it.MTU())
	for _, err := range []error{it.SetMTU(1300), it.SetUp(true), it.InNamespace(func(string, int) error { return nil })} {
		fmt.Printf("elsewhere=%v EPERM=%v %v\n", errors.Is(err, ErrElsewhere), errors.Is(err, unix.EPERM), err)
	}
	fmt.Println("SetMAC:", it.SetMAC(MAC{2, 0, 0, 0, 0, 7}))
	os.Exit(0)
}

// Without privileges the kernel does not tell where the interface is: after a move requests are refused, and none
// reaches a stranger, even one of the same name, index and MAC address.
func TestIfaceRequestsRefused(t *testing.T) {
	const uid = 65534
	for _, m := range moves {
		t.Run(m.name, func(t *testing.T) {
			privateDev(t)
			if err := unix.Mknod("/dev/net/tun", unix.S_IFCHR|0o666, int(unix.Mkdev(10, 200))); err != nil {
				lacking(t, "mknod", err)
			}
			if err := os.Chmod("/dev/net/tun", 0o666); err != nil {
				t.Fatal(err)
			}
			it := mustOpen(t, Config{Name: "t0", Type: TAP, Persist: true, MTU: 1400})
			if err := ioctlValue(it.FD(), unix.TUNSETOWNER, uid); err != nil {
				t.Fatal(err)
			}
			it.Close()
			bin, err := os.ReadFile("/proc/self/exe")
			if err != nil {
				t.Fatal(err)
			}
			const path = "/dev/net/tunbridge.test"
			if err := os.WriteFile(path, bin, 0o755); err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command(path)
			cmd.Dir, cmd.Env = "/", []string{elsewhereEnv + "=1"}
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
			in, _ := cmd.StdinPipe()
			out, _ := cmd.StdoutPipe()
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			defer cmd.Wait()
			defer cmd.Process.Kill()
			r := bufio.NewReader(out)
			if line, err := r.ReadString('\n'); line != "ready\n" {
				t.Fatalf("%q, %v", line, err)
			}
			index := kernelLink(t, "t0").Attrs().Index
			netns := newNetns(t)
			now, strangers := m.do(t, index, netns)
			var before []string
			for _, s := range strangers {
				before = append(before, s())
			}
			fmt.Fprintln(in, "go")
			rest, err := io.ReadAll(r)
			if err != nil {
				t.Fatal(err)
			}
			want := fmt.Sprintf("elsewhere=%v name=%s MTU=1400,1400\n", m.moved, now)
			if !strings.HasPrefix(string(rest), want) {
				t.Errorf("want %s", want)
			}
			if n := strings.Count(string(rest), "\nelsewhere=true EPERM=false"); m.moved && n != 3 {
				t.Errorf("%d of 3 requests are refused", n)
			}
			if n := strings.Count(string(rest), "\nelsewhere=false EPERM=true"); !m.moved && n != 2 {
				t.Errorf("%d of 2 requests are not permitted", n)
			}
			if !strings.Contains(string(rest), "\nSetMAC: <nil>\n") { // by the descriptor: always its own
				t.Error("the MAC address cannot be set")
			}
			for i, s := range strangers {
				if s := s(); s != before[i] {
					t.Errorf("a stranger had %s, and has %s", before[i], s)
				}
			}
			if t.Failed() {
				t.Logf("%s", rest)
			}
		})
	}
}

// Removed, and made again: as it was, whoever has its name meanwhile.
func TestIfaceRemake(t *testing.T) {
	for _, c := range []Config{
		{Type: TAP, Offload: true}, {Type: TUN, Offload: true}, {Type: TAP}, {Type: TAP, Offload: true, Queues: 4}, {Type: TAP, Offload: true, Persist: true},
		{Type: TAP, Queues: 2, Persist: true},
	} {
		t.Run(fmt.Sprintf("%v offload=%v queues=%d persist=%v", c.Type, c.Offload, c.Queues, c.Persist), func(t *testing.T) {
			ifaceNS(t)
			c.Name, c.MTU = "t0", 1400
			s := stranger(t, -1, "other", 0)
			had := s()
			before := openFDs()
			it := mustOpen(t, c)
			queues := it.Queues()
			mac := it.MAC()
			if c.Type == TAP {
				mac = StableMAC("remake")
				if err := it.SetMAC(mac); err != nil {
					t.Fatal(err)
				}
			}
			if err := it.SetMTU(1350); err != nil {
				t.Fatal(err)
			}
			seen := make(chan State, 16)
			it.Watch(func(s State) { seen <- s })
			if err := it.Remake(); err != nil || it.Remakes() != 0 {
				t.Errorf("Remake of what is there: %v, %d made", err, it.Remakes())
			}
			if err := netlink.LinkDel(kernelLink(t, "t0")); err != nil {
				t.Fatal(err)
			}
			for s := range seen {
				if s.Gone {
					break
				}
			}
			if !it.Gone() {
				t.Error("not gone")
			}
			if _, err := it.Read(make([]byte, 100)); err != ErrGone {
				t.Errorf("Read: %v", err)
			}
			for what, err := range map[string]error{"SetMTU": it.SetMTU(1300), "SetUp": it.SetUp(true), "SetCarrier": it.SetCarrier(true),
				"SetOffload": it.SetOffload(0), "InNamespace": it.InNamespace(func(string, int) error { return nil })} {
				if !errors.Is(err, ErrGone) {
					t.Errorf("%s: %v", what, err)
				}
			}
			rename(t, -1, "other", "t0") // a stranger has its name now
			wantUserError(t, it.Remake(), "t0")
			if !it.Gone() {
				t.Error("not gone any more, with a stranger in its place")
			}
			rename(t, -1, "t0", "other")
			if now := s(); now != had {
				t.Errorf("the stranger had %s, and has %s", had, now)
			}
			if err := it.Remake(); err != nil {
				t.Fatal(err)
			}
			want := State{Name: "t0", Index: kernelLink(t, "t0").Attrs().Index, MTU: 1350, Lapses: 1, Made: 2}
			for s := range seen {
				if s.Made == 2 {
					if s != want {
						t.Errorf("told %+v, want %+v", s, want)
					}
					break
				}
			}
			if s := it.State(); s != want || it.MAC() != mac || it.Queues() != queues || it.InUse() != 1 || it.KnownMTU() != 1350 {
				t.Errorf("state %+v, MAC %v, %d queues, %d in use; want %+v, %v, %d, 1", s, it.MAC(), it.Queues(), it.InUse(), want, mac, queues)
			}
			if err := it.SetQueues(queues); err != nil {
				t.Error(err)
			}
			if err := it.SetOffload(it.OffloadSupported()); err != nil {
				t.Error(err)
			}
			ready(t, it, "10.9.0.1/24")
			neighbour(t, it, []byte{10, 9, 0, 2})
			udpFlow(t, 4000)
			arrives(t, it, 4000)
			it.Close()
			if l := kernelLink(t, "t0"); (l != nil) != c.Persist {
				t.Errorf("after Close the interface is there: %v", l != nil)
			}
			checkFDs(t, before)
		})
	}
}

// Made again in the namespace that it was opened in, also where it was removed in another one, by another thread.
func TestIfaceRemakeAtHome(t *testing.T) {
	ifaceNS(t)
	it := mustOpen(t, Config{Name: "t0", Type: TAP, Offload: true})
	netns := newNetns(t)
	move(t, "t0", netns)
	rename(t, netns, "t0", "eth0")
	if s := it.State(); !s.Moved || s.Name != "eth0" {
		t.Fatalf("state %+v", s)
	}
	err := inNetns(netns, func() error {
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return netlink.LinkDel(l)
	})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- it.Remake() }() // of the process's namespace
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if s := it.State(); s.Moved || s.Gone || s.Name != "t0" || kernelLink(t, "t0") == nil {
		t.Errorf("state %+v", s)
	}
}

// An interface that was moved does not keep its new namespace alive: when whoever else has that lets go of it, the kernel
// removes both.
func TestIfaceNamespaceEnds(t *testing.T) {
	ifaceNS(t)
	it := mustOpen(t, Config{Name: "t0", Type: TAP, Offload: true})
	seen := make(chan State, 16)
	it.Watch(func(s State) { seen <- s })
	netns := -1
	if err := inNewNS(func() error {
		netns, _ = openThreadNetns()
		return nil
	}); err != nil {
		lacking(t, "a network namespace (root)", err)
	}
	move(t, "t0", netns)
	wait := func(what string, ok func(State) bool) {
		t.Helper()
		for late := time.After(20 * time.Second); ; {
			select {
			case s := <-seen:
				if ok(s) {
					return
				}
			case <-late:
				t.Fatalf("it is not told that the interface is %s: %+v", what, it.State())
			}
		}
	}
	wait("moved", func(s State) bool { return s.Moved })
	err := it.SetMTU(1300)
	if err == nil {
		err = it.SetUp(true)
	}
	if err == nil {
		err = it.InNamespace(func(string, int) error { return nil })
	}
	if err != nil || it.MTU() != 1300 {
		t.Fatalf("MTU %d, %v", it.MTU(), err)
	}
	wait("up", func(s State) bool { return s.Moved && s.Up && s.MTU == 1300 })
	unix.Close(netns)
	wait("gone", func(s State) bool { return s.Gone })
	if err := it.Remake(); err != nil {
		t.Fatal(err)
	}
	if s := it.State(); s.Moved || s.Gone || kernelLink(t, "t0") == nil {
		t.Errorf("state %+v", s)
	}
}

// Each change is told once, the last state in any case.
func TestIfaceWatch(t *testing.T) {
	for _, deaf := range []bool{false, true} {
		t.Run(fmt.Sprintf("deaf=%v", deaf), func(t *testing.T) {
			ifaceNS(t)
			it := mustOpen(t, Config{Name: "t0", Type: TAP, Offload: true})
			seen := make(chan State, 64)
			if deaf {
				it.Watch(func(State) {})
				it.watch.mu.Lock()
				it.watch.file.Close() // as where no netlink socket can be had
				it.watch.mu.Unlock()
			}
			it.Watch(func(s State) { seen <- s })
			want := it.State()
			for i, change := range []func(l netlink.Link) error{
				func(l netlink.Link) error { want.MTU = 1300; return netlink.LinkSetMTU(l, 1300) },
				func(l netlink.Link) error { want.Up = true; return netlink.LinkSetUp(l) },
				func(l netlink.Link) error { want.Up = false; want.Lapses++; return netlink.LinkSetDown(l) },
				func(l netlink.Link) error { want.Name = "t1"; return netlink.LinkSetName(l, "t1") },
			} {
				if err := change(kernelLink(t, it.Name())); err != nil {
					t.Fatal(err)
				}
				if s := <-seen; s != want {
					t.Errorf("change %d: %+v, want %+v", i, s, want)
				}
				if it.KnownMTU() != want.MTU || it.recentMTU() != want.MTU {
					t.Errorf("change %d: MTU %d is known, want %d", i, it.KnownMTU(), want.MTU)
				}
				if deaf {
					break
				}
			}
			// Many in a row are few calls, the last of which tells how it ended.
			for mtu := 1000; mtu < 1500; mtu++ {
				if err := netlink.LinkSetMTU(kernelLink(t, it.Name()), mtu); err != nil {
					t.Fatal(err)
				}
			}
			n := 0
			for s := range seen {
				if n++; s.MTU == 1499 {
					break
				}
			}
			if n > 100 {
				t.Errorf("%d calls for 500 changes", n)
			}
			if deaf {
				return
			}
			// Down, or an MTU too small for IPv6, and back at once: it looks as before, and is told all the same.
			l := kernelLink(t, it.Name())
			do := func(fs ...func() error) {
				t.Helper()
				for _, f := range fs {
					if err := f(); err != nil {
						t.Fatal(err)
					}
				}
			}
			up, down := func() error { return netlink.LinkSetUp(l) }, func() error { return netlink.LinkSetDown(l) }
			mtu := func(n int) func() error { return func() error { return netlink.LinkSetMTU(l, n) } }
			do(up)
			s := State{}
			for !s.Up {
				s = <-seen
			}
			for i, undone := range [][]func() error{{down, up}, {mtu(MinMTU6 - 1), mtu(1499)}} {
				before := s.Lapses
				do(undone...)
				for s = <-seen; !s.Up || s.MTU != 1499 || s.Lapses == before; s = <-seen {
				}
				if s.Lapses != before+1 {
					t.Errorf("%d: %d lapses, want 1", i, s.Lapses-before)
				}
			}
			it.Close()
		})
	}
}
