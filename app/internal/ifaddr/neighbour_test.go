package ifaddr

import (
	"net/netip"
	"testing"
	"time"

	"github.com/boardlink/boardlink/tunbridge"
	"golang.org/x/sys/unix"
)

// TestNeighbourAskedOften: an unanswered question for a neighbour is repeated 15 times, 20 ms apart, over IPv4 and IPv6; the first ones are lost where
// the carrier has just come. (The kernel's default is 3 times in 3 s: a link that comes up between two of them waits for the next one.)
func TestNeighbourAskedOften(t *testing.T) {
	it := open(t, tunbridge.TAP)
	if err := Apply(it, prefixes("10.9.0.1/24", "fd09::1/64")); err != nil {
		t.Fatal(err)
	}
	if err := Up(it); err != nil {
		t.Fatal(err)
	}
	if err := it.SetCarrier(true); err != nil {
		t.Fatal(err)
	}
	for _, far := range []string{"10.9.0.9", "fd09::9"} {
		a := netip.MustParseAddr(far)
		family, to := unix.AF_INET6, unix.Sockaddr(&unix.SockaddrInet6{Port: 9, Addr: a.As16()})
		if a.Is4() {
			family, to = unix.AF_INET, &unix.SockaddrInet4{Port: 9, Addr: a.As4()}
		}
		s, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(s)
		if err := unix.Sendto(s, []byte("x"), 0, to); err != nil {
			t.Fatal(err)
		}
		n := 0
		buf := make([]byte, tunbridge.HeaderLen+2000)
		for end := time.Now().Add(10 * time.Second); n < 10 && time.Now().Before(end); {
			m, err := it.Read(buf)
			if err == tunbridge.ErrAgain {
				unix.Poll([]unix.PollFd{{Fd: int32(it.FD()), Events: unix.POLLIN}}, 100)
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			f := buf[it.HeaderLen():m]
			arp := len(f) >= 14+28 && f[12] == 8 && f[13] == 6 && f[14+7] == 1 && netip.AddrFrom4([4]byte(f[14+24:14+28])) == a
			ns := len(f) >= 14+40+24 && f[12] == 0x86 && f[13] == 0xdd && f[14+6] == 58 && f[14+40] == 135 && netip.AddrFrom16([16]byte(f[14+48:14+64])) == a
			if arp || ns {
				n++
			}
		}
		if n < 10 {
			t.Errorf("%s is asked for %d times, want at least 10", far, n)
		}
	}
}
