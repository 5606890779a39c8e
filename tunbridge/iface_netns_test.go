package tunbridge

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// lacking ends a test that this machine cannot run.
func lacking(t testing.TB, what string, err error) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf("this test needs %s: %v", what, err)
	}
	t.Skipf("this test needs %s: %v", what, err)
}

// ifaceNS moves the calling goroutine into a network namespace of its own (and more, by flags).
// Its thread ends with it, and the namespace with its interfaces. Goroutines that it
// starts, subtests among them, are outside.
func ifaceNS(t testing.TB, flags ...int) {
	t.Helper()
	f := unix.CLONE_NEWNET
	for _, x := range flags {
		f |= x
	}
	runtime.LockOSThread()
	if err := unix.Unshare(f); err != nil {
		lacking(t, "a network namespace (root)", err)
	}
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		lacking(t, "/dev/net/tun", err)
	}
	unix.Close(fd)
}

// inNewNS runs f on a thread in a new network namespace and returns its error; both end with f.
func inNewNS(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			done <- err
			return
		}
		done <- f()
	}()
	return <-done
}

func mustOpen(t testing.TB, cfg Config) *Iface {
	t.Helper()
	it, err := Open(cfg)
	if err != nil {
		t.Fatalf("Open(%+v): %v", cfg, err)
	}
	t.Cleanup(func() { it.Close() })
	return it
}

// kernelLink returns the kernel's view of an interface, or nil.
func kernelLink(t testing.TB, name string) netlink.Link {
	t.Helper()
	l, err := netlink.LinkByName(name)
	if err != nil {
		var nf netlink.LinkNotFoundError
		if errors.As(err, &nf) {
			return nil
		}
		t.Fatal(err)
	}
	return l
}

// ready gives it an address, a neighbour (on a tap) and the carrier, and sets it up, with
// IPv6 off, so that nothing but the test's own traffic comes out.
func ready(t testing.TB, it *Iface, addr string) {
	t.Helper()
	_ = os.WriteFile("/proc/sys/net/ipv6/conf/"+it.Name()+"/disable_ipv6", []byte("1"), 0)
	l := kernelLink(t, it.Name())
	a, err := netlink.ParseAddr(addr)
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.AddrAdd(l, a); err != nil {
		t.Fatal(err)
	}
	if err := it.SetUp(true); err != nil {
		t.Fatal(err)
	}
	carrierOn(t, it)
}

// carrierOn switches the carrier on and waits until the kernel sends: its link watch starts
// the transmit queue a moment later.
func carrierOn(t testing.TB, it *Iface) {
	t.Helper()
	if err := it.SetCarrier(true); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(3 * time.Second)
	for kernelLink(t, it.Name()).Attrs().OperState != netlink.OperUp {
		if time.Now().After(deadline) {
			t.Fatal("the interface does not become operational")
		}
		time.Sleep(100 * time.Microsecond)
	}
}

// peerMAC is the far end in these tests.
var peerMAC = MAC{2, 0, 0, 0, 0, 0xee}

func neighbour(t testing.TB, it *Iface, ip []byte) {
	t.Helper()
	if it.Type() != TAP {
		return
	}
	err := netlink.NeighSet(&netlink.Neigh{LinkIndex: it.Index(), State: netlink.NUD_PERMANENT, IP: ip, HardwareAddr: peerMAC[:]})
	if err != nil {
		t.Fatal(err)
	}
}

// readFrame waits for a frame for at most a second and returns it with its header.
func readFrame(t testing.TB, it *Iface) []byte {
	t.Helper()
	buf := make([]byte, HeaderLen+MaxFrameLen+1)
	for {
		n, err := it.Read(buf)
		if err == nil {
			return buf[:n]
		}
		if err != ErrAgain {
			t.Fatal(err)
		}
		p := []unix.PollFd{{Fd: int32(it.FD()), Events: unix.POLLIN}}
		if n, err := unix.Poll(p, 1000); n == 0 || err != nil && err != unix.EINTR {
			t.Fatalf("no frame: %v", err)
		}
	}
}

// openFDs returns the process's open descriptors and what they are.
func openFDs() map[string]string {
	dir, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		panic(err)
	}
	m := map[string]string{}
	for _, e := range dir {
		// Counted are the kinds that Open uses; the runtime's own come and go.
		if l, err := os.Readlink(filepath.Join("/proc/self/fd", e.Name())); err == nil &&
			(l == "/dev/net/tun" || len(l) > 7 && l[:7] == "socket:") {
			m[e.Name()] = l
		}
	}
	return m
}

func checkFDs(t testing.TB, before map[string]string) {
	t.Helper()
	for fd, what := range openFDs() {
		if before[fd] != what {
			t.Errorf("descriptor %s (%s) was left open", fd, what)
		}
	}
}

// refusal makes an ioctl fail as it does on a kernel that lacks it.
type refusal struct {
	req   uint32
	mask  uint32 // refuse only where the argument has one of these bits; 0 = always
	errno unix.Errno
}

// refuse installs a seccomp filter on the calling thread, which ifaceNS throws away.
func refuse(t testing.TB, list ...refusal) {
	t.Helper()
	lo := uint32(0) // offset of a 64-bit argument's low half
	if !littleEndian() {
		lo = 4
	}
	const (
		ld  = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
		jeq = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		and = unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K
		ret = unix.BPF_RET | unix.BPF_K
	)
	p := []unix.SockFilter{
		{Code: ld, K: 0}, // struct seccomp_data: nr, arch, ip, args[6]
		{Code: jeq, K: unix.SYS_IOCTL, Jt: 1},
		{Code: ret, K: 0x7fff0000}, // SECCOMP_RET_ALLOW
	}
	for _, r := range list {
		p = append(p, unix.SockFilter{Code: ld, K: 24 + lo})
		if r.mask == 0 {
			p = append(p, unix.SockFilter{Code: jeq, K: r.req, Jf: 1})
		} else {
			p = append(p,
				unix.SockFilter{Code: jeq, K: r.req, Jf: 3},
				unix.SockFilter{Code: ld, K: 32 + lo},
				unix.SockFilter{Code: and, K: r.mask, Jf: 1})
		}
		p = append(p, unix.SockFilter{Code: ret, K: 0x00050000 | uint32(r.errno)}) // SECCOMP_RET_ERRNO
	}
	p = append(p, unix.SockFilter{Code: ret, K: 0x7fff0000})
	prog := unix.SockFprog{Len: uint16(len(p)), Filter: &p[0]}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		lacking(t, "prctl", err)
	}
	if err := unix.Prctl(unix.PR_SET_SECCOMP, 2, uintptr(unsafe.Pointer(&prog)), 0, 0); err != nil {
		lacking(t, "seccomp filters", err)
	}
}

// sum adds b to a ones' complement sum.
func sum(s uint32, b []byte) uint32 {
	for i := 0; i+1 < len(b); i += 2 {
		s += uint32(b[i])<<8 | uint32(b[i+1])
	}
	if len(b)%2 == 1 {
		s += uint32(b[len(b)-1]) << 8
	}
	return s
}

func fold(s uint32) uint16 {
	for s>>16 != 0 {
		s = s&0xffff + s>>16
	}
	return ^uint16(s)
}

// ipv4 returns a packet with a correct header.
func ipv4(proto byte, src, dst [4]byte, payload []byte) []byte {
	n := 20 + len(payload)
	p := append([]byte{0x45, 0, byte(n >> 8), byte(n), 0, 1, 0, 0, 64, proto, 0, 0}, src[:]...)
	p = append(p, dst[:]...)
	c := fold(sum(0, p))
	p[10], p[11] = byte(c>>8), byte(c)
	return append(p, payload...)
}

// checkIPv4 checks the checksums of a packet of TCP or UDP.
func checkIPv4(p []byte) error {
	if len(p) < 28 || p[0] != 0x45 {
		return fmt.Errorf("no IPv4 packet: % x", p[:min(len(p), 40)])
	}
	n := int(p[2])<<8 | int(p[3])
	if n != len(p) {
		return fmt.Errorf("packet of %d bytes says it has %d", len(p), n)
	}
	if c := fold(sum(0, p[:20])); c != 0 {
		return fmt.Errorf("header checksum is off by %#x", c)
	}
	s := sum(uint32(p[9])+uint32(n-20), p[12:20])
	if c := fold(sum(s, p[20:])); c != 0 {
		return fmt.Errorf("checksum of protocol %d is off by %#x", p[9], c)
	}
	return nil
}
