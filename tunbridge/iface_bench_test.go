package tunbridge

import (
	"fmt"
	"net"
	"testing"

	"golang.org/x/sys/unix"
)

// benchModes runs f for a small frame and for a super-frame of 64 KiB (cut by the kernel where
// the mode is plain: there the unit stays one frame of the MTU's size).
func benchModes(b *testing.B, f func(b *testing.B, it *Iface, payload int)) {
	for _, c := range []struct {
		name    string
		offload bool
		payload int
	}{
		{"plain/64", false, 64},
		{"plain/1472", false, 1472},
		{"vnet/64", true, 64},
		{"vnet/1472", true, 1472},
		{"vnet/64000", true, 64000},
	} {
		b.Run(c.name, func(b *testing.B) {
			ifaceNS(b)
			it := mustOpen(b, Config{Name: "t0", Offload: c.offload})
			ready(b, it, "10.9.0.1/24")
			neighbour(b, it, net.IP{10, 9, 0, 2})
			if err := it.SetOffload(it.OffloadSupported()); err != nil {
				b.Fatal(err)
			}
			b.ReportAllocs()
			b.SetBytes(int64(c.payload))
			f(b, it, c.payload)
		})
	}
}

// BenchmarkIfaceWrite writes a frame that is for another station: the kernel takes it in,
// looks at it and lets it go.
func BenchmarkIfaceWrite(b *testing.B) {
	benchModes(b, func(b *testing.B, it *Iface, payload int) {
		hdr := make([]byte, it.HeaderLen())
		if payload > 1472 {
			hdr[HdrOffFlags], hdr[HdrOffGSOType], hdr[HdrOffHdrLen] = HdrFlagNeedsCsum, HdrGSOUDPL4, 42
			hdr[HdrOffGSOSize], hdr[HdrOffGSOSize+1] = 1472&0xff, 1472>>8
			hdr[HdrOffCSUMStart], hdr[HdrOffCSUMOffset] = 34, 6
		}
		udp := make([]byte, 8+payload)
		udp[1], udp[3], udp[4], udp[5] = 9, 9, byte(len(udp)>>8), byte(len(udp))
		frame := append(append(peerMAC[:], peerMAC[:]...), 8, 0)
		frame = append(frame, ipv4(17, [4]byte{10, 9, 0, 2}, [4]byte{10, 9, 0, 1}, udp)...)
		var iov [2]unix.Iovec
		n := 1
		if len(hdr) != 0 {
			iov[0].Base = &hdr[0]
			iov[0].SetLen(len(hdr))
			n = 2
		}
		iov[n-1].Base = &frame[0]
		iov[n-1].SetLen(len(frame))
		for b.Loop() {
			if _, err := it.WriteV(iov[:n]); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkIfaceRead reads frames that a socket sent meanwhile, off the clock.
func BenchmarkIfaceRead(b *testing.B) {
	benchModes(b, func(b *testing.B, it *Iface, payload int) {
		s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			b.Fatal(err)
		}
		defer unix.Close(s)
		if err := unix.SetsockoptInt(s, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 64<<20); err != nil {
			b.Fatal(err)
		}
		if payload > 1472 {
			if it.OffloadSupported()&OffloadUSO4 == 0 {
				lacking(b, "a kernel with USO (6.2)", fmt.Errorf("offload is %v", it.OffloadSupported()))
			}
			if err := unix.SetsockoptInt(s, unix.IPPROTO_UDP, unix.UDP_SEGMENT, 1472); err != nil {
				lacking(b, "UDP_SEGMENT", err)
			}
		}
		data := make([]byte, payload)
		to := &unix.SockaddrInet4{Port: 9, Addr: [4]byte{10, 9, 0, 2}}
		buf := make([]byte, HeaderLen+MaxFrameLen)
		var iov [1]unix.Iovec
		iov[0].Base = &buf[0]
		iov[0].SetLen(len(buf))
		queued := 0
		for b.Loop() {
			if queued == 0 {
				b.StopTimer()
				for ; queued < 256; queued++ {
					if err := unix.Sendto(s, data, 0, to); err != nil {
						b.Fatal(err)
					}
				}
				b.StartTimer()
			}
			n, err := it.ReadV(iov[:])
			if err != nil {
				b.Fatal(err)
			}
			if n < payload {
				b.Fatalf("frame of %d bytes", n)
			}
			queued--
		}
	})
}

// BenchmarkIfaceReadNothing is what a busy poll costs.
func BenchmarkIfaceReadNothing(b *testing.B) {
	ifaceNS(b)
	it := mustOpen(b, Config{Name: "t0", Offload: true})
	buf := make([]byte, 100)
	for b.Loop() {
		if _, err := it.Read(buf); err != ErrAgain {
			b.Fatal(err)
		}
	}
}
