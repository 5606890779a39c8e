package ifaddr

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/boardlink/boardlink/tunbridge"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func lacking(t *testing.T, what string, err error) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf("this test needs %s: %v", what, err)
	}
	t.Skipf("this test needs %s: %v", what, err)
}

// open opens a tap or tun with a carrier, in a network namespace that ends with the test's
// thread.
func open(t *testing.T, typ tunbridge.LinkType) *tunbridge.Iface {
	t.Helper()
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		lacking(t, "a network namespace (root)", err)
	}
	it, err := tunbridge.Open(tunbridge.Config{Name: "t0", Type: typ, Offload: true})
	if err != nil {
		lacking(t, "/dev/net/tun", err)
	}
	t.Cleanup(func() { it.Close() })
	return it
}

func prefixes(s ...string) []netip.Prefix {
	var p []netip.Prefix
	for _, x := range s {
		p = append(p, netip.MustParsePrefix(x))
	}
	return p
}

// addresses returns the interface's addresses, and the flags of each.
func addresses(t *testing.T) map[string]int {
	t.Helper()
	l, err := netlink.LinkByName("t0")
	if err != nil {
		t.Fatal(err)
	}
	list, err := netlink.AddrList(l, netlink.FAMILY_ALL)
	if err != nil {
		t.Fatal(err)
	}
	m := map[string]int{}
	for _, a := range list {
		m[a.IPNet.String()] = a.Flags
	}
	return m
}

const unusable = unix.IFA_F_TENTATIVE | unix.IFA_F_DADFAILED

func TestApply(t *testing.T) {
	for _, typ := range []tunbridge.LinkType{tunbridge.TAP, tunbridge.TUN} {
		t.Run(typ.String(), func(t *testing.T) {
			it := open(t, typ)
			l, _ := netlink.LinkByName("t0")
			other, _ := netlink.ParseAddr("192.0.2.7/32")
			if err := netlink.AddrAdd(l, other); err != nil {
				t.Fatal(err)
			}
			want := prefixes("10.9.0.1/24", "10.9.0.2/24", "10.8.0.1/31", "10.7.0.1/32", "fd09::1/64", "fd09::2/128", "fe80::1234/64")
			for i := 0; i < 3; i++ { // the first time, again, and again when up
				if err := Apply(it, want); err != nil {
					t.Fatal(err)
				}
				have := addresses(t)
				for _, p := range want {
					if f, ok := have[p.String()]; !ok || f&unusable != 0 {
						t.Errorf("round %d: %v: there %v, flags %#x", i, p, ok, f)
					}
				}
				if _, ok := have["192.0.2.7/32"]; !ok {
					t.Error("a foreign address is gone")
				}
				if i == 1 {
					if err := Up(it); err != nil {
						t.Fatal(err)
					}
				}
			}
			if err := it.SetCarrier(true); err != nil {
				t.Fatal(err)
			}
			if err := Up(it); err != nil {
				t.Errorf("second Up: %v", err)
			}
			if l, _ := netlink.LinkByName("t0"); l.Attrs().RawFlags&unix.IFF_UP == 0 {
				t.Error("the interface is not up")
			}
		})
	}
}

// TestUsableAtOnce: a socket binds to the IPv6 addresses as soon as the carrier is on, and the
// link-local address follows from the MAC address.
func TestUsableAtOnce(t *testing.T) {
	it := open(t, tunbridge.TAP)
	if err := it.SetMAC(tunbridge.MAC{2, 0, 0, 0, 0, 1}); err != nil {
		t.Fatal(err)
	}
	if err := Apply(it, prefixes("fd09::1/64")); err != nil {
		t.Fatal(err)
	}
	if err := Up(it); err != nil {
		t.Fatal(err)
	}
	bind := func(a string) error {
		s, err := unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(s)
		return unix.Bind(s, &unix.SockaddrInet6{Port: 9, Addr: netip.MustParseAddr(a).As16(), ZoneId: uint32(it.Index())})
	}
	if err := bind("fd09::1"); err != nil {
		t.Errorf("before the carrier: %v", err)
	}
	if err := it.SetCarrier(true); err != nil {
		t.Fatal(err)
	}
	const local = "fe80::ff:fe00:1" // EUI-64 of the MAC address
	deadline := time.Now().Add(3 * time.Second)
	for {
		// The kernel configures it in the background, tentative for a moment.
		if f, ok := addresses(t)[local+"/64"]; ok && f&unusable == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("no link-local address: %v", addresses(t))
		}
		time.Sleep(100 * time.Microsecond)
	}
	if err := bind(local); err != nil {
		t.Errorf("link-local: %v", err)
	}
	// Duplicate detection would have asked the neighbours, from the address "::".
	buf := make([]byte, tunbridge.HeaderLen+2000)
	for {
		n, err := it.Read(buf)
		if err == tunbridge.ErrAgain {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		f := buf[it.HeaderLen():n]
		if len(f) >= 14+40+1 && f[12] == 0x86 && f[13] == 0xdd && f[14+6] == 58 && f[14+40] == 135 {
			t.Errorf("neighbour solicitation % x", f)
		}
	}
}

// TestTentative: an address that somebody added with duplicate detection is made usable.
func TestTentative(t *testing.T) {
	it := open(t, tunbridge.TAP)
	if err := it.SetUp(true); err != nil {
		t.Fatal(err)
	}
	l, _ := netlink.LinkByName("t0")
	a, _ := netlink.ParseAddr("fd09::1/64")
	if err := netlink.AddrAdd(l, a); err != nil {
		t.Fatal(err)
	}
	if f := addresses(t)["fd09::1/64"]; f&unusable == 0 {
		lacking(t, "duplicate detection in the kernel", fmt.Errorf("flags %#x", f))
	}
	if err := Apply(it, prefixes("fd09::1/64")); err != nil {
		t.Fatal(err)
	}
	if f, ok := addresses(t)["fd09::1/64"]; !ok || f&unusable != 0 {
		t.Errorf("there %v, flags %#x", ok, f)
	}
}

func wantUserError(t *testing.T, err error, word string) {
	t.Helper()
	var ue tunbridge.UserError
	if !errors.As(err, &ue) || !ue.UserError() || !strings.Contains(err.Error(), word) || strings.Contains(err.Error(), "\n") {
		t.Errorf("error %v (%T): want one line for the user with %q", err, err, word)
	}
}

func TestErrors(t *testing.T) {
	it := open(t, tunbridge.TAP)
	for _, p := range []netip.Prefix{
		{},
		netip.MustParsePrefix("0.0.0.0/8"),
		netip.MustParsePrefix("::/64"),
		netip.MustParsePrefix("224.0.0.1/4"),
		netip.MustParsePrefix("ff02::1/64"),
		netip.MustParsePrefix("255.255.255.255/32"),
		netip.MustParsePrefix("::ffff:10.9.0.1/120"),
	} {
		wantUserError(t, Apply(it, append(prefixes("10.9.0.1/24"), p)), "address")
	}
	if have := addresses(t); len(have) != 0 {
		t.Errorf("a refused call added %v", have)
	}

	if err := it.SetMTU(1000); err != nil {
		t.Fatal(err)
	}
	wantUserError(t, Apply(it, prefixes("fd09::1/64")), "1280")
	if err := it.SetMTU(1500); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile("/proc/sys/net/ipv6/conf/t0/disable_ipv6", []byte("1"), 0); err != nil {
		lacking(t, "a writable /proc/sys", err)
	}
	wantUserError(t, Apply(it, prefixes("fd09::1/64")), "disable_ipv6")
	if err := Apply(it, prefixes("10.9.0.1/24")); err != nil {
		t.Error(err)
	}
}

const unprivilegedEnv = "IFADDR_TEST_UNPRIVILEGED"

// The unprivileged side of TestNotPermitted: root's interface, without CAP_NET_ADMIN.
func init() {
	if os.Getenv(unprivilegedEnv) == "" {
		return
	}
	h := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var d [2]unix.CapUserData
	err := unix.Capget(&h, &d[0])
	if err == nil {
		d[0].Effective &^= 1 << unix.CAP_NET_ADMIN
		d[0].Permitted &^= 1 << unix.CAP_NET_ADMIN
		err = unix.Capset(&h, &d[0])
	}
	var it *tunbridge.Iface
	if err == nil {
		it, err = tunbridge.Open(tunbridge.Config{Name: "t0", Offload: true})
	}
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	for _, err := range []error{Apply(it, prefixes("10.9.0.1/24")), Apply(it, prefixes("fd09::1/64")), Up(it)} {
		var ue tunbridge.UserError
		if err == nil {
			err = errors.New("passed")
		} else if !errors.As(err, &ue) {
			fmt.Print("not for the user: ")
		}
		fmt.Println(err)
	}
	os.Exit(0)
}

// TestNotPermitted runs this binary without CAP_NET_ADMIN: what is so already is not asked for, all else is refused with a
// line that says why.
func TestNotPermitted(t *testing.T) {
	it := open(t, tunbridge.TAP)
	l, err := netlink.LinkByName("t0")
	if err != nil {
		t.Fatal(err)
	}
	for _, req := range []uintptr{unix.TUNSETPERSIST, unix.TUNSETOWNER} {
		if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(it.FD()), req, map[uintptr]uintptr{unix.TUNSETPERSIST: 1}[req]); e != 0 {
			t.Fatal(e)
		}
	}
	it.Close() // the namespace takes it away with the test's thread
	run := func() string {
		f, err := os.Open("/proc/self/exe")
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		cmd := exec.Command("/proc/self/fd/3")
		cmd.ExtraFiles = []*os.File{f}
		cmd.Env = []string{unprivilegedEnv + "=1"}
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return string(out)
	}
	if out := run(); strings.Count(out, "CAP_NET_ADMIN") != 3 || strings.Contains(out, "not for the user") {
		t.Errorf("output:\n%s", out)
	}
	for _, a := range []string{"10.9.0.1/24", "fd09::1/64"} {
		a, _ := netlink.ParseAddr(a)
		a.Flags = unix.IFA_F_NODAD
		if err := netlink.AddrAdd(l, a); err != nil {
			t.Fatal(err)
		}
	}
	if err := netlink.LinkSetUp(l); err != nil {
		t.Fatal(err)
	}
	if out := run(); out != "passed\npassed\npassed\n" {
		t.Errorf("output:\n%s", out)
	}
}
