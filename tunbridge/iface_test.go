package tunbridge

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// modes are the four ways to open an interface.
var modes = []Config{
	{Name: "t0", Type: TAP, Offload: true},
	{Name: "t0", Type: TAP},
	{Name: "t0", Type: TUN, Offload: true},
	{Name: "t0", Type: TUN},
}

func forModes(t *testing.T, f func(t *testing.T, cfg Config)) {
	for _, cfg := range modes {
		mode := "plain"
		if cfg.Offload {
			mode = "vnet"
		}
		t.Run(fmt.Sprintf("%v/%s", cfg.Type, mode), func(t *testing.T) {
			ifaceNS(t)
			f(t, cfg)
		})
	}
}

func wantUserError(t *testing.T, err error, words ...string) {
	t.Helper()
	var ue UserError
	if !errors.As(err, &ue) || !ue.UserError() {
		t.Fatalf("error %v (%T) is no UserError", err, err)
	}
	if s := err.Error(); strings.Contains(s, "\n") {
		t.Errorf("more than one line: %q", s)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("error %q does not mention %q", err, w)
		}
	}
}

func TestIfaceOpen(t *testing.T) {
	forModes(t, func(t *testing.T, cfg Config) {
		it := mustOpen(t, cfg)
		l := kernelLink(t, "t0")
		if l == nil || l.Type() != "tuntap" {
			t.Fatalf("the kernel shows %v", l)
		}
		if it.Name() != "t0" || it.Index() != l.Attrs().Index || it.Type() != cfg.Type || it.MTU() != 1500 || it.Attached() {
			t.Errorf("name %q index %d type %v MTU %d attached %v", it.Name(), it.Index(), it.Type(), it.MTU(), it.Attached())
		}
		if m := it.MAC(); !bytes.Equal(m[:], append(l.Attrs().HardwareAddr, make([]byte, 6)...)[:6]) || (cfg.Type == TAP) == (m == MAC{}) {
			t.Errorf("MAC %v, the kernel shows %v", m, l.Attrs().HardwareAddr)
		}
		if len(it.Warnings()) != 0 {
			t.Errorf("warnings: %q", it.Warnings())
		}
		fl, _ := unix.FcntlInt(uintptr(it.FD()), unix.F_GETFL, 0)
		fd, _ := unix.FcntlInt(uintptr(it.FD()), unix.F_GETFD, 0)
		if fl&unix.O_NONBLOCK == 0 || fd&unix.FD_CLOEXEC == 0 {
			t.Errorf("descriptor flags: O_NONBLOCK %v, FD_CLOEXEC %v", fl&unix.O_NONBLOCK != 0, fd&unix.FD_CLOEXEC != 0)
		}
		var r ifreq
		if err := ioctlIfreq(it.FD(), unix.TUNGETIFF, &r); err != nil {
			t.Fatal(err)
		}
		if vnet := *r.u16()&unix.IFF_VNET_HDR != 0; vnet != cfg.Offload {
			t.Errorf("IFF_VNET_HDR is %v", vnet)
		}
		if cfg.Offload {
			n, err1 := ioctlGetInt(it.FD(), unix.TUNGETVNETHDRSZ)
			le, err2 := ioctlGetInt(it.FD(), unix.TUNGETVNETLE)
			if it.HeaderLen() != 12 || n != 12 || le != 1 || err1 != nil || err2 != nil {
				t.Errorf("header of %d bytes, the kernel's of %d, little-endian %d", it.HeaderLen(), n, le)
			}
			if it.OffloadSupported()&(OffloadCSUM|OffloadTSO4|OffloadTSO6) != OffloadCSUM|OffloadTSO4|OffloadTSO6 {
				t.Errorf("offload supported: %v", it.OffloadSupported())
			}
		} else if it.HeaderLen() != 0 || it.OffloadSupported() != 0 {
			t.Errorf("header of %d bytes, offload %v", it.HeaderLen(), it.OffloadSupported())
		}
		if _, err := it.Read(make([]byte, 100)); err != ErrAgain {
			t.Errorf("Read with nothing there: %v", err)
		}
		if err := it.Close(); err != nil {
			t.Error(err)
		}
		if err := it.Close(); err != nil {
			t.Errorf("second Close: %v", err)
		}
		if kernelLink(t, "t0") != nil {
			t.Error("the interface outlived Close")
		}
	})
}

func TestIfaceKernelPicksName(t *testing.T) {
	forModes(t, func(t *testing.T, cfg Config) {
		cfg.Name = ""
		a, b := mustOpen(t, cfg), mustOpen(t, cfg)
		p := cfg.Type.String()
		if a.Name() != p+"0" || b.Name() != p+"1" {
			t.Errorf("names %q and %q", a.Name(), b.Name())
		}
	})
}

// TestIfaceEcho: the kernel answers ARP and ICMP that we write.
func TestIfaceEcho(t *testing.T) {
	forModes(t, func(t *testing.T, cfg Config) {
		cfg.MAC = MAC{}
		if cfg.Type == TAP {
			cfg.MAC = StableMAC("echo")
		}
		it := mustOpen(t, cfg)
		ready(t, it, "10.9.0.1/24")
		hdr := make([]byte, it.HeaderLen())
		me, you := [4]byte{10, 9, 0, 2}, [4]byte{10, 9, 0, 1}
		mac := it.MAC()
		if mac != cfg.MAC {
			t.Errorf("MAC %v instead of %v", mac, cfg.MAC)
		}
		if cfg.Type == TAP {
			arp := append(append([]byte{255, 255, 255, 255, 255, 255}, peerMAC[:]...), 8, 6, 0, 1, 8, 0, 6, 4, 0, 1)
			arp = append(append(append(append(arp, peerMAC[:]...), me[:]...), 0, 0, 0, 0, 0, 0), you[:]...)
			f := append(hdr[:len(hdr):len(hdr)], arp...)
			if n, err := it.Write(f); err != nil || n != len(f) {
				t.Fatalf("Write: %d, %v", n, err)
			}
			got := readFrame(t, it)[it.HeaderLen():]
			want := append(append(append([]byte{}, peerMAC[:]...), mac[:]...), 8, 6, 0, 1, 8, 0, 6, 4, 0, 2)
			want = append(append(append(append(want, mac[:]...), you[:]...), peerMAC[:]...), me[:]...)
			if !bytes.Equal(got, want) {
				t.Fatalf("ARP reply\n% x, want\n% x", got, want)
			}
		}
		// An echo in three pieces, and the answer into three.
		echo := append([]byte{8, 0, 0, 0, 0x12, 0x34, 0, 1}, bytes.Repeat([]byte("boardlink"), 100)...)
		c := fold(sum(0, echo))
		echo[2], echo[3] = byte(c>>8), byte(c)
		f := hdr[:len(hdr):len(hdr)]
		if cfg.Type == TAP {
			f = append(append(append(f, mac[:]...), peerMAC[:]...), 8, 0)
		}
		head := len(f)
		f = append(f, ipv4(1, me, you, echo)...)
		iov := make([]unix.Iovec, 3)
		set := func(b []byte) {
			cut := [...]int{0, 12, 40, len(b)}
			for i := range iov {
				p := b[cut[i]:cut[i+1]]
				iov[i].Base = &p[0]
				iov[i].SetLen(len(p))
			}
		}
		set(f)
		if n, err := it.WriteV(iov); err != nil || n != len(f) {
			t.Fatalf("WriteV: %d, %v", n, err)
		}
		p := []unix.PollFd{{Fd: int32(it.FD()), Events: unix.POLLIN}}
		if n, err := unix.Poll(p, 1000); n != 1 {
			t.Fatalf("no answer: %v", err)
		}
		got := make([]byte, 2000)
		set(got)
		n, err := it.ReadV(iov)
		if err != nil || n != len(f) {
			t.Fatalf("ReadV: %d, %v; want %d bytes", n, err, len(f))
		}
		icmp := got[head+20 : n]
		if icmp[0] != 0 || fold(sum(0, icmp)) != 0 || !bytes.Equal(icmp[4:], echo[4:]) {
			t.Errorf("echo reply % x ...", icmp[:16])
		}
	})
}

// TestIfaceSeenByPacketSocket: a frame that we write is what a packet socket receives.
func TestIfaceSeenByPacketSocket(t *testing.T) {
	ifaceNS(t)
	for _, offload := range []bool{true, false} {
		it := mustOpen(t, Config{Name: "t0", Offload: offload})
		ready(t, it, "10.9.0.1/24")
		const proto = 0x88b5 // local experimental
		s, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, proto>>8|proto&0xff<<8)
		if err != nil {
			lacking(t, "packet sockets", err)
		}
		if err := unix.SetsockoptTimeval(s, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 1}); err != nil {
			t.Fatal(err)
		}
		mac := it.MAC()
		frame := append(append(append([]byte{}, mac[:]...), peerMAC[:]...), proto>>8, proto&0xff)
		for i := 0; i < 1000; i++ {
			frame = append(frame, byte(i))
		}
		if _, err := it.Write(append(make([]byte, it.HeaderLen()), frame...)); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 2000)
		n, err := unix.Read(s, got)
		if err != nil || !bytes.Equal(got[:max(n, 0)], frame) {
			t.Errorf("the socket received %d bytes, %v; want the frame of %d", n, err, len(frame))
		}
		unix.Close(s)
		it.Close()
	}
}

// sendUDP sends size bytes in datagrams of seg through the interface; the kernel keeps them
// one packet as long as it can.
func sendUDP(t testing.TB, size, seg int) {
	t.Helper()
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(s)
	if err := unix.SetsockoptInt(s, unix.IPPROTO_UDP, unix.UDP_SEGMENT, seg); err != nil {
		lacking(t, "UDP_SEGMENT", err)
	}
	if err := unix.Sendto(s, make([]byte, size), 0, &unix.SockaddrInet4{Port: 9, Addr: [4]byte{10, 9, 0, 2}}); err != nil {
		t.Fatal(err)
	}
}

// TestIfaceOffloadFollows: what comes out is as complete as SetOffload says, and after Open
// it is complete whatever a former owner of the interface had set.
func TestIfaceOffloadFollows(t *testing.T) {
	for _, typ := range []LinkType{TAP, TUN} {
		t.Run(typ.String(), func(t *testing.T) {
			ifaceNS(t)
			it := mustOpen(t, Config{Name: "t0", Type: typ, Offload: true, Persist: true})
			if it.OffloadSupported()&OffloadUSO4 == 0 {
				lacking(t, "a kernel with USO (6.2)", errors.New("offload is "+it.OffloadSupported().String()))
			}
			ready(t, it, "10.9.0.1/24")
			neighbour(t, it, net.IP{10, 9, 0, 2})
			link := 0
			if typ == TAP {
				link = 14
			}
			const size, seg = 20000, 1000
			complete := func() {
				t.Helper()
				sendUDP(t, size, seg)
				for got := 0; got < size; got += seg {
					f := readFrame(t, it)
					if h := it.HeaderLen(); h > 0 && !bytes.Equal(f[:10], make([]byte, 10)) && f[HdrOffFlags] != HdrFlagDataValid {
						t.Fatalf("header % x of a complete frame", f[:h])
					}
					if p := f[it.HeaderLen()+link:]; len(p) != 28+seg {
						t.Fatalf("packet of %d bytes", len(p))
					} else if err := checkIPv4(p); err != nil {
						t.Fatal(err)
					}
				}
			}
			complete()

			if err := it.SetOffload(it.OffloadSupported()); err != nil {
				t.Fatal(err)
			}
			sendUDP(t, size, seg)
			f := readFrame(t, it)
			h := f[:HeaderLen]
			if len(f) != HeaderLen+link+28+size || h[HdrOffFlags]&HdrFlagNeedsCsum == 0 || h[HdrOffGSOType] != HdrGSOUDPL4 ||
				int(h[HdrOffGSOSize])|int(h[HdrOffGSOSize+1])<<8 != seg || int(h[HdrOffCSUMStart]) != link+20 || h[HdrOffCSUMOffset] != 6 {
				t.Errorf("super-packet of %d bytes, header % x", len(f), h)
			}

			if err := it.SetOffload(OffloadCSUM); err != nil {
				t.Fatal(err)
			}
			sendUDP(t, size, seg)
			if f := readFrame(t, it); len(f) != HeaderLen+link+28+seg || f[HdrOffGSOType] != HdrGSONone {
				t.Errorf("with csum alone: frame of %d bytes, header % x", len(f), f[:HeaderLen])
			}
			// 19 more wait. They are for the dustbin.
			if n := it.Drain(); n != size/seg-1 {
				t.Errorf("Drain found %d frames", n)
			}

			// A restart, into either mode, with a super-packet left in the queue.
			for _, offload := range []bool{true, false} {
				if it.HeaderLen() != 0 {
					if err := it.SetOffload(it.OffloadSupported()); err != nil {
						t.Fatal(err)
					}
				}
				sendUDP(t, size, seg)
				it.Close()
				it = mustOpen(t, Config{Name: "t0", Type: typ, Offload: offload})
				if !it.Attached() {
					t.Fatal("not attached to what was there")
				}
				carrierOn(t, it)
				it.Drain()
				complete()
			}
		})
	}
}

func TestIfaceSetOffloadRefuses(t *testing.T) {
	ifaceNS(t)
	it := mustOpen(t, Config{Offload: true})
	for _, o := range []Offload{OffloadTSO4, OffloadCSUM | OffloadUSO4, 0x80 | OffloadCSUM} {
		if err := it.SetOffload(o); err == nil {
			t.Errorf("SetOffload(%#x) passed", uint8(o))
		}
	}
	plain := mustOpen(t, Config{})
	if err := plain.SetOffload(OffloadCSUM); err == nil {
		t.Error("offload in plain mode passed: the kernel would hand over frames that nobody can tell from complete ones")
	}
	if err := plain.SetOffload(0); err != nil {
		t.Error(err)
	}
}

// bridge carries frames between two interfaces of the same mode untouched, as the rings do,
// until stop; it returns the number of super-packets.
func bridge(t *testing.T, from, to *Iface, stop <-chan struct{}, gso *int64, bad *error) {
	buf := make([]byte, HeaderLen+MaxFrameLen+1)
	for {
		select {
		case <-stop:
			return
		default:
		}
		n, err := from.Read(buf)
		if err == ErrAgain {
			p := []unix.PollFd{{Fd: int32(from.FD()), Events: unix.POLLIN}}
			unix.Poll(p, 20)
			continue
		}
		if err == nil {
			if from.HeaderLen() != 0 {
				if buf[HdrOffGSOType] == HdrGSOTCPv4 || buf[HdrOffGSOType] == HdrGSOTCPv6 {
					atomic.AddInt64(gso, 1)
				}
				buf[HdrOffFlags] &^= HdrFlagDataValid
			}
			if n > HeaderLen+MaxFrameLen {
				err = fmt.Errorf("frame of %d bytes", n)
			} else {
				_, err = to.Write(buf[:n])
			}
		}
		if err != nil && !IsDrop(err) {
			*bad = err
			return
		}
	}
}

// TestIfaceTCP: TCP between two namespaces, each with its interface, and a copying loop
// between them. With offload the super-packets pass whole.
func TestIfaceTCP(t *testing.T) {
	for _, cfg := range modes {
		for _, ip := range []string{"10.9.0.%d", "fd09::%d"} {
			t.Run(fmt.Sprintf("%v/offload=%v/%s", cfg.Type, cfg.Offload, fmt.Sprintf(ip, 1)), func(t *testing.T) {
				ifaceNS(t)
				addr := [2]string{fmt.Sprintf(ip, 1), fmt.Sprintf(ip, 2)}
				bits := "/24"
				if strings.Contains(ip, ":") {
					bits = "/64"
				}
				setup := func(addr string) (*Iface, error) {
					it, err := Open(cfg)
					if err != nil {
						return nil, err
					}
					l, err := netlink.LinkByName(it.Name())
					if err != nil {
						return nil, err
					}
					a, err := netlink.ParseAddr(addr + bits)
					if err != nil {
						return nil, err
					}
					if bits == "/64" {
						a.Flags = unix.IFA_F_NODAD
					}
					if err := netlink.AddrAdd(l, a); err != nil {
						return nil, err
					}
					if err := it.SetOffload(it.OffloadSupported()); err != nil {
						return nil, err
					}
					if err := it.SetUp(true); err != nil {
						return nil, err
					}
					return it, it.SetCarrier(true)
				}
				a, err := setup(addr[0])
				if err != nil {
					t.Fatal(err)
				}
				defer a.Close()
				var b *Iface
				var ln net.Listener
				err = inNewNS(func() (err error) {
					if b, err = setup(addr[1]); err == nil {
						ln, err = net.Listen("tcp", net.JoinHostPort(addr[1], "7"))
					}
					return err
				})
				if b != nil {
					defer b.Close()
				}
				if err != nil {
					t.Fatal(err)
				}
				defer ln.Close()

				const size = 4 << 20
				data := make([]byte, size)
				for i := range data {
					data[i] = byte(uint32(i) * 2654435761 >> 13)
				}
				var wg sync.WaitGroup
				var gso int64
				var bad [2]error
				stop := make(chan struct{})
				wg.Add(2)
				go func() { defer wg.Done(); bridge(t, a, b, stop, &gso, &bad[0]) }()
				go func() { defer wg.Done(); bridge(t, b, a, stop, &gso, &bad[1]) }()

				served := make(chan error, 1)
				go func() { // echo all of it
					c, err := ln.Accept()
					if err == nil {
						c.SetDeadline(time.Now().Add(20 * time.Second))
						_, err = io.Copy(c, c)
						c.Close()
					}
					served <- err
				}()
				c, err := net.DialTimeout("tcp", net.JoinHostPort(addr[1], "7"), 5*time.Second)
				if err != nil {
					close(stop)
					ln.Close()
					wg.Wait()
					t.Fatal(err, bad)
				}
				c.SetDeadline(time.Now().Add(20 * time.Second))
				go func() {
					c.Write(data)
					c.(*net.TCPConn).CloseWrite()
				}()
				got, err := io.ReadAll(c)
				c.Close()
				if err := <-served; err != nil {
					t.Errorf("server: %v", err)
				}
				close(stop)
				wg.Wait()
				if err != nil || !bytes.Equal(got, data) {
					t.Errorf("%d of %d bytes came back (%v), equal: %v; %v", len(got), size, err, bytes.Equal(got, data), bad)
				}
				if cfg.Offload != (atomic.LoadInt64(&gso) > 0) {
					t.Errorf("%d super-packets with offload %v", gso, cfg.Offload)
				}
			})
		}
	}
}

func TestIfaceCarrier(t *testing.T) {
	forModes(t, func(t *testing.T, cfg Config) {
		it := mustOpen(t, cfg)
		a, _ := netlink.ParseAddr("10.9.0.1/24")
		if err := netlink.AddrAdd(kernelLink(t, "t0"), a); err != nil {
			t.Fatal(err)
		}
		if err := it.SetUp(true); err != nil {
			t.Fatal(err)
		}
		lower := func(want bool) {
			t.Helper()
			if got := kernelLink(t, "t0").Attrs().RawFlags&unix.IFF_LOWER_UP != 0; got != want {
				t.Errorf("carrier is %v, want %v", got, want)
			}
		}
		lower(false) // until there is a peer
		for _, on := range []bool{true, false, true} {
			if err := it.SetCarrier(on); err != nil {
				t.Fatal(err)
			}
			lower(on)
		}
		addrs, err := netlink.AddrList(kernelLink(t, "t0"), netlink.FAMILY_V4)
		if err != nil || len(addrs) != 1 {
			t.Errorf("addresses %v, %v", addrs, err)
		}
	})
}

func TestIfaceSettings(t *testing.T) {
	forModes(t, func(t *testing.T, cfg Config) {
		cfg.MTU = 9000
		it := mustOpen(t, cfg)
		if m := kernelLink(t, "t0").Attrs().MTU; m != 9000 || it.MTU() != 9000 {
			t.Errorf("MTU %d, the kernel's %d", it.MTU(), m)
		}
		for _, mtu := range []int{MinMTU, 65000, MaxMTU(cfg.Type)} {
			if err := it.SetMTU(mtu); err != nil {
				t.Error(err)
			}
			if m := kernelLink(t, "t0").Attrs().MTU; m != mtu || it.MTU() != mtu {
				t.Errorf("MTU %d, the kernel's %d, want %d", it.MTU(), m, mtu)
			}
		}
		wantUserError(t, it.SetMTU(MaxMTU(cfg.Type)+1), "t0", "MTU")
		wantUserError(t, it.SetMTU(MinMTU-1), "t0", "MTU")
		if err := it.SetMTU(1500); err != nil {
			t.Error(err)
		}

		// Up, with an address that must survive the change of the MAC address.
		a, _ := netlink.ParseAddr("fd09::1/64")
		a.Flags = unix.IFA_F_NODAD
		if err := netlink.AddrAdd(kernelLink(t, "t0"), a); err != nil {
			t.Fatal(err)
		}
		if err := it.SetUp(true); err != nil {
			t.Fatal(err)
		}
		mac := StableMAC("settings")
		if err := it.SetMAC(mac); cfg.Type == TAP && err != nil {
			t.Error(err)
		} else if cfg.Type == TUN {
			wantUserError(t, err, "no MAC")
			mac = MAC{}
		}
		l := kernelLink(t, "t0")
		if it.MAC() != mac || cfg.Type == TAP && l.Attrs().HardwareAddr.String() != mac.String() {
			t.Errorf("MAC %v, the kernel's %v, want %v", it.MAC(), l.Attrs().HardwareAddr, mac)
		}
		if l.Attrs().RawFlags&unix.IFF_UP == 0 {
			t.Error("the interface is down")
		}
		addrs, err := netlink.AddrList(l, netlink.FAMILY_V6)
		found := false
		for _, a := range addrs {
			found = found || a.IP.String() == "fd09::1"
		}
		if !found {
			t.Errorf("the address is gone: %v, %v", addrs, err)
		}
		// Somebody else renames it.
		if err := it.SetUp(false); err != nil {
			t.Fatal(err)
		}
		if err := netlink.LinkSetName(l, "other"); err != nil {
			t.Fatal(err)
		}
		if it.Name() != "other" {
			t.Errorf("name is %q after the renaming", it.Name())
		}
		if err := it.SetMTU(1400); err != nil || it.MTU() != 1400 {
			t.Errorf("MTU %d, %v", it.MTU(), err)
		}
	})
}

func TestIfacePersist(t *testing.T) {
	forModes(t, func(t *testing.T, cfg Config) {
		cfg.Persist = true
		it := mustOpen(t, cfg)
		ready(t, it, "10.9.0.1/24")
		index, mac := it.Index(), it.MAC()
		it.Close()
		l := kernelLink(t, "t0")
		if l == nil {
			t.Fatal("a persistent interface disappeared")
		}
		if l.Attrs().RawFlags&unix.IFF_LOWER_UP != 0 {
			t.Error("it has a carrier with nobody behind it")
		}
		for _, cfg := range []Config{cfg, {Name: "t0", Type: cfg.Type, Offload: !cfg.Offload}, {Name: "t0", Type: cfg.Type, Offload: cfg.Offload}} {
			it = mustOpen(t, cfg)
			if !it.Attached() || it.Index() != index || it.MAC() != mac || (it.HeaderLen() != 0) != cfg.Offload {
				t.Errorf("attached %v, index %d (%d), MAC %v (%v), header %d", it.Attached(), it.Index(), index, it.MAC(), mac, it.HeaderLen())
			}
			addrs, err := netlink.AddrList(kernelLink(t, "t0"), netlink.FAMILY_V4)
			if err != nil || len(addrs) != 1 || addrs[0].IP.String() != "10.9.0.1" {
				t.Errorf("addresses %v, %v", addrs, err)
			}
			wantUserError(t, Remove("t0"), "t0", "another process")
			it.Close()
			if kernelLink(t, "t0") == nil {
				t.Fatal("it disappeared with a user that did not create it")
			}
		}
		if err := Remove("t0"); err != nil {
			t.Fatal(err)
		}
		if kernelLink(t, "t0") != nil {
			t.Error("Remove left it")
		}
		if err := Remove("t0"); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("second Remove: %v", err)
		}
	})
}

// TestIfaceConflicts: each way in which a name can be taken is told apart, and leaves neither
// a descriptor nor a change behind.
func TestIfaceConflicts(t *testing.T) {
	ifaceNS(t)
	for _, l := range []netlink.Link{
		&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "veth0"}, PeerName: "veth1"},
		&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}},
	} {
		if err := netlink.LinkAdd(l); err != nil {
			lacking(t, l.Attrs().Name, err)
		}
	}
	// Multi-queue taps of somebody else: one that is left, one that is held.
	for _, name := range []string{"mq0", "mqb"} {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		r := newIfreq(name)
		*r.u16() = unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_MULTI_QUEUE
		if err := ioctlIfreq(fd, unix.TUNSETIFF, r); err != nil {
			t.Fatal(err)
		}
		if name == "mqb" {
			t.Cleanup(func() { unix.Close(fd) })
			continue
		}
		if err := ioctlValue(fd, unix.TUNSETPERSIST, 1); err != nil {
			t.Fatal(err)
		}
		unix.Close(fd)
	}
	for _, typ := range []LinkType{TAP, TUN} {
		mustOpen(t, Config{Name: typ.String() + "p", Type: typ, Persist: true}).Close()
		mustOpen(t, Config{Name: typ.String() + "b", Type: typ})
	}
	fds := openFDs()
	for _, offload := range []bool{true, false} {
		for _, c := range []struct {
			name  string
			typ   LinkType
			words string
			errno error
		}{
			{"veth0", TAP, "driver is veth", nil},
			{"br0", TUN, "driver is bridge", nil},
			{"lo", TAP, "neither a tap nor a tun", nil},
			{"tapp", TUN, "a tap and not a tun", nil},
			{"tunp", TAP, "a tun and not a tap", nil},
			{"tapb", TAP, "another process", unix.EBUSY},
			{"tunb", TUN, "another process", unix.EBUSY},
			{"mq0", TUN, "a tap and not a tun", nil},
			{"mqb", TAP, "another process", unix.EBUSY},
		} {
			it, err := Open(Config{Name: c.name, Type: c.typ, Offload: offload, MTU: 1234})
			if err == nil {
				it.Close()
				t.Errorf("%s passed", c.name)
				continue
			}
			wantUserError(t, err, c.name, c.words)
			if c.errno != nil && !errors.Is(err, c.errno) {
				t.Errorf("%v is no %v", err, c.errno)
			}
			if l := kernelLink(t, c.name); l == nil || l.Attrs().MTU == 1234 {
				t.Errorf("%s is not as it was: %v", c.name, l)
			}
		}
	}
	for _, name := range []string{"veth0", "lo", "mqb", "tapb"} {
		wantUserError(t, Remove(name), name)
		if kernelLink(t, name) == nil {
			t.Errorf("Remove removed %s", name)
		}
	}
	if err := Remove("mq0"); err != nil || kernelLink(t, "mq0") != nil {
		t.Errorf("Remove of a persistent interface of several queues: %v", err)
	}
	checkFDs(t, fds)
}

func TestIfaceBadConfig(t *testing.T) {
	ifaceNS(t)
	fds := openFDs()
	for _, c := range []struct {
		cfg  Config
		word string
	}{
		{Config{Name: "sixteen-bytes-xx"}, "16 bytes"},
		{Config{Name: strings.Repeat("x", 5000)}, "5000 bytes"},
		{Config{Name: "a/b"}, "byte 1"},
		{Config{Name: "a b"}, "byte 1"},
		{Config{Name: "a\tb"}, "byte 1"},
		{Config{Name: "a\x00b"}, "byte 1"},
		{Config{Name: "tap%d"}, "byte 3"},
		{Config{Name: "t:0"}, "byte 1"},
		{Config{Name: "tüp"}, "byte 1"},
		{Config{Name: "."}, "reserves"},
		{Config{Name: ".."}, "reserves"},
		{Config{Name: "all"}, "reserves"},
		{Config{Name: "default"}, "reserves"},
		{Config{Name: "t0", Type: 2}, "LinkType(2)"},
		{Config{Name: "t0", MTU: 67}, "67"},
		{Config{Name: "t0", MTU: -1}, "-1"},
		{Config{Name: "t0", MTU: 65522}, "65522"},
		{Config{Name: "t0", Type: TUN, MTU: 65536}, "65536"},
		{Config{Name: "t0", MAC: MAC{1}}, "unicast"},
		{Config{Name: "t0", Type: TUN, MAC: MAC{2}}, "no MAC"},
	} {
		for _, c.cfg.Offload = range []bool{true, false} {
			it, err := Open(c.cfg)
			if err == nil {
				it.Close()
				t.Errorf("%+v passed", c.cfg)
				continue
			}
			wantUserError(t, err, c.word)
		}
	}
	links, err := netlink.LinkList()
	if err != nil || len(links) != 1 {
		t.Errorf("links %v, %v", links, err)
	}
	checkFDs(t, fds)
	// The kernel takes every byte that checkName takes.
	var name []byte
	for c := 1; c < 256; c++ {
		if checkName(string([]byte{'a', byte(c)})) == nil {
			name = append(name, byte(c))
		}
		if len(name) < unix.IFNAMSIZ-1 && c < 255 {
			continue
		}
		it, err := Open(Config{Name: string(name), Offload: true})
		if err != nil {
			t.Errorf("the kernel refuses %q: %v", name, err)
		} else {
			if it.Name() != string(name) {
				t.Errorf("%q became %q", name, it.Name())
			}
			it.Close()
		}
		name = name[:0]
	}
}

// TestIfaceLeaksNothing opens and closes over and over, with failures in every step.
func TestIfaceLeaksNothing(t *testing.T) {
	forModes(t, func(t *testing.T, cfg Config) {
		fds := openFDs()
		for i := 0; i < 5; i++ {
			it, err := Open(cfg)
			if err != nil {
				t.Fatal(err)
			}
			it.Close()
		}
		checkFDs(t, fds)
		cfg.Persist = true
		cfg.MTU = 1400
		for _, req := range []uint32{unix.SIOCSIFMTU, unix.TUNSETOFFLOAD, unix.SIOCGIFMTU} {
			req := req
			err := inNewNS(func() error {
				refuse(t, refusal{req, 0, unix.EPERM})
				it, err := Open(cfg)
				if err == nil {
					it.Close()
					return fmt.Errorf("Open passed without ioctl %#x", req)
				}
				if !errors.Is(err, unix.EPERM) {
					return err
				}
				if l, _ := netlink.LinkByName("t0"); l != nil {
					return fmt.Errorf("after %v the interface is there", err)
				}
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		}
		checkFDs(t, fds)
	})
}

// TestIfaceOldKernel: what a kernel lacks is done without, with a word about it.
func TestIfaceOldKernel(t *testing.T) {
	for _, c := range []struct {
		name   string
		list   []refusal
		hdr    int
		sup    Offload
		warned string
	}{
		{"no features", []refusal{{unix.TUNGETFEATURES, 0, unix.EINVAL}}, 0, 0, "IFF_VNET_HDR"},
		{"no header size", []refusal{{unix.TUNSETVNETHDRSZ, 0, unix.EINVAL}}, 0, 0, "TUNSETVNETHDRSZ"},
		{"no USO", []refusal{{unix.TUNSETOFFLOAD, tunFUSO4 | tunFUSO6, unix.EINVAL}}, 12, OffloadCSUM | OffloadTSO4 | OffloadTSO6, "6.2"},
		{"no TSO", []refusal{{unix.TUNSETOFFLOAD, tunFUSO4 | tunFUSO6 | unix.TUN_F_TSO4, unix.EINVAL}}, 12, OffloadCSUM, "6.2"},
		{"no carrier", []refusal{{unix.TUNSETCARRIER, 0, unix.EINVAL}}, 12, offloadAll, "carrier"},
	} {
		t.Run(c.name, func(t *testing.T) {
			ifaceNS(t)
			refuse(t, c.list...)
			fds := openFDs()
			it := mustOpen(t, Config{Name: "t0", Offload: true})
			if it.HeaderLen() != c.hdr || it.OffloadSupported()&^(OffloadUSO4|OffloadUSO6) != c.sup&^(OffloadUSO4|OffloadUSO6) ||
				c.sup&OffloadUSO4 == 0 && it.OffloadSupported()&OffloadUSO4 != 0 {
				t.Errorf("header %d, offload %v", it.HeaderLen(), it.OffloadSupported())
			}
			if w := strings.Join(it.Warnings(), "\n"); !strings.Contains(w, c.warned) {
				t.Errorf("warnings %q", w)
			}
			if c.name == "no carrier" {
				if err := it.SetCarrier(true); err == nil {
					t.Error("SetCarrier passed")
				}
			}
			it.Close()
			checkFDs(t, fds)
		})
	}
	t.Run("no byte order", func(t *testing.T) { // before 3.19
		ifaceNS(t)
		refuse(t, refusal{unix.TUNSETVNETLE, 0, unix.EINVAL}, refusal{unix.TUNGETVNETLE, 0, unix.EINVAL})
		it := mustOpen(t, Config{Name: "t0", Offload: true})
		if (it.HeaderLen() == 12) != littleEndian() {
			t.Errorf("header %d on a machine whose own order is little-endian: %v", it.HeaderLen(), littleEndian())
		}
	})
}

func TestIfaceDataErrors(t *testing.T) {
	forModes(t, func(t *testing.T, cfg Config) {
		it := mustOpen(t, cfg)
		hdr := it.HeaderLen()
		frame := make([]byte, hdr+14)
		if cfg.Type == TAP {
			frame = append(frame, ipv4(17, [4]byte{10, 9, 0, 2}, [4]byte{10, 9, 0, 1}, make([]byte, 8))...)
			frame[hdr+12] = 8
		} else {
			frame = append(frame[:hdr], ipv4(17, [4]byte{10, 9, 0, 2}, [4]byte{10, 9, 0, 1}, make([]byte, 8))...)
		}
		if _, err := it.Write(frame); err != ErrDown {
			t.Errorf("write to an interface that is down: %v", err)
		}
		ready(t, it, "10.9.0.1/24")
		if _, err := it.Write(frame); err != nil {
			t.Errorf("write: %v", err)
		}
		for name, f := range map[string][]byte{"empty": {}, "short": make([]byte, 5), "no frame": frame[:hdr]} {
			if _, err := it.Write(f); err != ErrMalformed || !errors.Is(err, ErrDropped) || !IsDrop(err) {
				t.Errorf("%s frame: %v", name, err)
			}
		}
		if hdr != 0 {
			bad := append([]byte{}, frame...)
			bad[HdrOffFlags] = HdrFlagNeedsCsum
			bad[HdrOffCSUMStart+1] = 0xff // beyond the frame
			if _, err := it.Write(bad); err != ErrMalformed {
				t.Errorf("checksum beyond the frame: %v", err)
			}
			bad = append([]byte{}, frame...)
			bad[HdrOffGSOType], bad[HdrOffGSOSize] = 0x7f, 1
			if _, err := it.Write(bad); err != ErrMalformed {
				t.Errorf("unknown segmentation: %v", err)
			}
		}
		// Memory that is gone.
		m, err := unix.Mmap(-1, 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Mprotect(m, unix.PROT_NONE); err != nil {
			t.Fatal(err)
		}
		iov := []unix.Iovec{{Base: (*byte)(unsafe.Pointer(&m[0]))}}
		iov[0].SetLen(100)
		if _, err := it.WriteV(iov); err != ErrFault {
			t.Errorf("write from memory that is gone: %v", err)
		}
		if err := unix.Munmap(m); err != nil {
			t.Fatal(err)
		}
		if _, err := it.WriteV(nil); err != ErrMalformed {
			t.Errorf("WriteV(nil): %v", err)
		}
		if _, err := it.ReadV(nil); err != ErrBuffers {
			t.Errorf("ReadV(nil): %v", err)
		}
		// Somebody removes the interface.
		if err := netlink.LinkDel(kernelLink(t, "t0")); err != nil {
			t.Fatal(err)
		}
		if _, err := it.Write(frame); err != ErrGone {
			t.Errorf("write after removal: %v", err)
		}
		if _, err := it.Read(frame); err != ErrGone {
			t.Errorf("read after removal: %v", err)
		}
		p := []unix.PollFd{{Fd: int32(it.FD()), Events: unix.POLLIN}}
		if n, err := unix.Poll(p, 1000); n != 1 || err != nil {
			t.Errorf("a sleeper is not woken by the removal: %d, %v", n, err)
		}
		it.Close()
		if _, err := it.Write(frame); err != ErrClosed {
			t.Errorf("write after Close: %v", err)
		}
		if err := it.SetCarrier(true); err != ErrClosed {
			t.Errorf("SetCarrier after Close: %v", err)
		}
		_, _, _ = it.Name(), it.MTU(), it.MAC()
	})
}

func TestIfaceAllocatesNothing(t *testing.T) {
	forModes(t, func(t *testing.T, cfg Config) {
		it := mustOpen(t, cfg)
		ready(t, it, "10.9.0.1/24")
		neighbour(t, it, net.IP{10, 9, 0, 2})
		link := 0
		if cfg.Type == TAP {
			link = 14
		}
		f := make([]byte, it.HeaderLen()+link)
		f = append(f, ipv4(17, [4]byte{10, 9, 0, 2}, [4]byte{10, 9, 0, 99}, make([]byte, 100))...) // not for us
		if cfg.Type == TAP {
			f[it.HeaderLen()+12] = 8
		}
		junk := []byte{0xff, 0, 0} // no frame, no packet, no header
		buf := make([]byte, 2000)
		in := []unix.Iovec{{Base: &buf[0]}, {Base: &buf[100]}}
		in[0].SetLen(100)
		in[1].SetLen(1900)
		out := []unix.Iovec{{Base: &f[0]}, {Base: &f[20]}}
		out[0].SetLen(20)
		out[1].SetLen(len(f) - 20)
		check := func(what string, want error, op func() (int, error)) {
			t.Helper()
			var err error
			if n := testing.AllocsPerRun(50, func() { _, err = op() }); n != 0 || err != want {
				t.Errorf("%s: %v allocations, %v", what, n, err)
			}
		}
		check("WriteV", nil, func() (int, error) { return it.WriteV(out) })
		check("Write", nil, func() (int, error) { return it.Write(f) })
		check("Write of a bad frame", ErrMalformed, func() (int, error) { return it.Write(junk) })
		it.Drain()
		check("ReadV of nothing", ErrAgain, func() (int, error) { return it.ReadV(in) })
		sendUDP(t, 55*100, 100)
		sendUDP(t, 55*100, 100)
		check("ReadV", nil, func() (int, error) { return it.ReadV(in) })
		check("Read", nil, func() (int, error) { return it.Read(buf) })
		if err := it.SetUp(false); err != nil {
			t.Fatal(err)
		}
		check("WriteV when down", ErrDown, func() (int, error) { return it.WriteV(out) })
	})
}

// TestIfaceConcurrent: settings from one goroutine while others move frames, for the race
// detector.
func TestIfaceConcurrent(t *testing.T) {
	ifaceNS(t)
	it := mustOpen(t, Config{Name: "t0", Offload: true})
	ready(t, it, "10.9.0.1/24")
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for _, op := range []func([]byte) (int, error){it.Read, it.Write} {
		op := op
		wg.Add(1)
		go func() {
			defer wg.Done()
			b := make([]byte, 200)
			for {
				select {
				case <-stop:
					return
				default:
					if _, err := op(b); err != nil && err != ErrAgain && !IsDrop(err) {
						t.Error(err)
						return
					}
				}
			}
		}()
	}
	for i := 0; i < 10; i++ {
		for _, err := range []error{it.SetOffload(it.OffloadSupported()), it.SetCarrier(i%2 == 0), it.SetMTU(1400 + i), it.SetMAC(StableMAC(fmt.Sprint(i))), it.SetOffload(0)} {
			if err != nil {
				t.Error(err)
			}
		}
		_, _, _ = it.Name(), it.MTU(), it.MAC()
	}
	close(stop)
	wg.Wait()
}

// privateDev puts an empty file system over /dev/net, for the calling thread alone.
func privateDev(t *testing.T) {
	t.Helper()
	ifaceNS(t, unix.CLONE_NEWNS)
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		lacking(t, "a mount namespace", err)
	}
	if err := unix.Mount("none", "/dev/net", "tmpfs", 0, "mode=0755"); err != nil {
		lacking(t, "a tmpfs", err)
	}
}

func TestIfaceNoDevice(t *testing.T) {
	privateDev(t)
	fds := openFDs()
	for _, offload := range []bool{true, false} {
		_, err := Open(Config{Name: "t0", Offload: offload})
		wantUserError(t, err, "t0", "/dev/net/tun", "modprobe tun")
		if !errors.Is(err, unix.ENOENT) {
			t.Errorf("%v is no ENOENT", err)
		}
	}
	checkFDs(t, fds)
}

const unprivilegedEnv = "TUNBRIDGE_TEST_UNPRIVILEGED"

// The unprivileged side of TestIfaceUnprivileged.
func init() {
	if os.Getenv(unprivilegedEnv) == "" {
		return
	}
	before := len(openFDs())
	for _, offload := range []bool{true, false} {
		for _, typ := range []LinkType{TAP, TUN} {
			for _, name := range []string{"new0", typ.String() + "mine", typ.String() + "root"} {
				it, err := Open(Config{Name: name, Type: typ, Offload: offload, MTU: 1500})
				var ue UserError
				fmt.Printf("%v %s %v %v\n", offload, name, errors.As(err, &ue), err)
				if err == nil {
					fmt.Println("set MTU:", it.SetMTU(1400))
					fmt.Println("set up:", it.SetUp(true))
					it.Close()
				}
			}
		}
	}
	fmt.Println("descriptors more than before:", len(openFDs())-before)
	os.Exit(0)
}

// TestIfaceUnprivileged runs this binary as another user: once without the permission to open
// /dev/net/tun, once with it but without CAP_NET_ADMIN. An interface that belongs
// to the user can be used all the same.
func TestIfaceUnprivileged(t *testing.T) {
	const uid = 65534
	for _, mode := range []uint32{0o600, 0o666} {
		t.Run(fmt.Sprintf("%o", mode), func(t *testing.T) {
			privateDev(t)
			if err := unix.Mknod("/dev/net/tun", unix.S_IFCHR|0o600, int(unix.Mkdev(10, 200))); err != nil {
				lacking(t, "mknod", err)
			}
			if err := os.Chmod("/dev/net/tun", os.FileMode(mode)); err != nil {
				t.Fatal(err)
			}
			for _, typ := range []LinkType{TAP, TUN} {
				mustOpen(t, Config{Name: typ.String() + "root", Type: typ, Persist: true}).Close()
				it := mustOpen(t, Config{Name: typ.String() + "mine", Type: typ, Persist: true})
				for _, req := range []uintptr{unix.TUNSETOWNER, unix.TUNSETGROUP} {
					if err := ioctlValue(it.FD(), req, uid); err != nil {
						t.Fatal(err)
					}
				}
				it.Close()
				it = mustOpen(t, Config{Name: typ.String() + "root", Type: typ})
				for _, req := range []uintptr{unix.TUNSETOWNER, unix.TUNSETGROUP} {
					if err := ioctlValue(it.FD(), req, 1); err != nil {
						t.Fatal(err)
					}
				}
				it.Close()
			}
			// The binary lies where only root can go.
			bin, err := os.ReadFile("/proc/self/exe")
			if err != nil {
				t.Fatal(err)
			}
			const path = "/dev/net/tunbridge.test"
			if err := os.WriteFile(path, bin, 0o755); err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command(path)
			cmd.Dir = "/"
			cmd.Env = []string{unprivilegedEnv + "=1"}
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			t.Logf("%s", out)
			s := string(out)
			if !strings.Contains(s, "descriptors more than before: 0\n") {
				t.Error("descriptors leak")
			}
			if strings.Contains(s, " false interface") || strings.Contains(s, " false tunbridge") {
				t.Error("an error is not a UserError")
			}
			if mode == 0o600 {
				if n := strings.Count(s, "no permission to open /dev/net/tun"); n != 12 {
					t.Errorf("%d of 12 refusals name /dev/net/tun", n)
				}
				return
			}
			if n := strings.Count(s, "CAP_NET_ADMIN is missing in this network namespace"); n != 8 {
				t.Errorf("%d of 8 refusals name CAP_NET_ADMIN", n)
			}
			for _, line := range []string{"true tapmine false <nil>", "false tapmine false <nil>", "true tunmine false <nil>", "false tunmine false <nil>"} {
				if !strings.Contains(s, line+"\n") {
					t.Errorf("no line %q: the user's own interface is refused", line)
				}
			}
			if n := strings.Count(s, "not permitted to set"); n != 8 {
				t.Errorf("%d of 8 refusals of MTU and up", n)
			}
		})
	}
}

func TestStableMAC(t *testing.T) {
	// Pinned: another release must give the same.
	for seed, want := range map[string]string{
		"":            "26:29:99:ba:60:1f",
		"net0 host":   "06:31:43:bf:39:85",
		"net0 agent":  "26:ae:c3:fd:ae:cf",
		"net1 agent":  "5a:74:c3:17:44:c8",
		"board7/net0": "6a:68:8e:e5:39:88",
	} {
		if m := StableMAC(seed); m.String() != want {
			t.Errorf("StableMAC(%q) = %v, want %v", seed, m, want)
		}
	}
	seen := map[MAC]string{}
	for i := 0; i < 100000; i++ {
		seed := fmt.Sprintf("net%d", i)
		m := StableMAC(seed)
		if m[0]&3 != 2 {
			t.Fatalf("%v is not locally administered and unicast", m)
		}
		if o, ok := seen[m]; ok {
			t.Fatalf("%q and %q share %v", o, seed, m)
		}
		seen[m] = seed
	}
}
