//go:build linux

package traffic

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"

	"github.com/boardlink/boardlink/trial/netns"
	"golang.org/x/sys/unix"
)

// ErrCorrupt is in the chain of an error that says that data was not what was sent.
var ErrCorrupt = errors.New("data is corrupt")

// Endpoint is one end of a path: an address and the namespace it is in.
type Endpoint struct {
	NS   *netns.NS  // nil is the namespace of this process
	Addr netip.Addr // IPv4 or IPv6; a link-local one with its zone (name or index)
}

// String returns the address.
func (e Endpoint) String() string { return e.Addr.String() }

// checkEnds refuses an endpoint without an address, and two of different families.
func checkEnds(from, to Endpoint) error {
	if !from.Addr.IsValid() || !to.Addr.IsValid() {
		return errors.New("traffic: an endpoint has no address")
	}
	if from.Addr.Unmap().Is4() != to.Addr.Unmap().Is4() {
		return fmt.Errorf("traffic from %v to %v: one address is IPv4, the other IPv6", from, to)
	}
	return nil
}

// in runs f in a namespace, on this goroutine's own if ns is nil.
func in(ns *netns.NS, f func() error) error {
	if ns == nil {
		return f()
	}
	return ns.Do(f)
}

// zoneIndex returns the index of an address's zone, 0 if it has none. It must run in the
// namespace of the interface: the cache of package net knows only one namespace.
func zoneIndex(a netip.Addr) (int, error) {
	z := a.Zone()
	if z == "" {
		return 0, nil
	}
	if i, err := strconv.Atoi(z); err == nil {
		return i, nil
	}
	s, err := unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("zone of %v: %w", a, err)
	}
	defer unix.Close(s)
	ifr, err := unix.NewIfreq(z)
	if err != nil {
		return 0, fmt.Errorf("zone of %v: %w", a, err)
	}
	if err := unix.IoctlIfreq(s, unix.SIOCGIFINDEX, ifr); err != nil {
		return 0, fmt.Errorf("zone of %v: %w", a, err)
	}
	return int(ifr.Uint32()), nil
}

// sockaddr returns the address for a system call. It must run in the namespace.
func sockaddr(a netip.Addr, port int) (unix.Sockaddr, error) {
	a = a.Unmap()
	if a.Is4() {
		return &unix.SockaddrInet4{Addr: a.As4(), Port: port}, nil
	}
	z, err := zoneIndex(a)
	if err != nil {
		return nil, err
	}
	return &unix.SockaddrInet6{Addr: a.As16(), Port: port, ZoneId: uint32(z)}, nil
}

// tcpAddr returns the address for package net. It must run in the namespace.
func tcpAddr(a netip.Addr, port int) (*net.TCPAddr, error) {
	a = a.Unmap()
	z, err := zoneIndex(a)
	if err != nil {
		return nil, err
	}
	t := &net.TCPAddr{IP: a.AsSlice(), Port: port}
	if z != 0 {
		t.Zone = strconv.Itoa(z)
	}
	return t, nil
}

func family(a netip.Addr) int {
	if a.Unmap().Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// outage reports whether an error of a system call says that the link is away just now, which
// passes, rather than that the call is wrong.
func outage(err error) bool {
	for _, e := range [...]error{
		unix.ENETDOWN, unix.ENETUNREACH, unix.EHOSTDOWN, unix.EHOSTUNREACH, unix.ENOBUFS,
		unix.ECONNREFUSED, unix.EAGAIN, unix.EADDRNOTAVAIL, unix.ENODEV, unix.EIO, unix.ENONET, unix.ENOMEM,
	} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// csum holds the kernel's counters of received packets with a bad checksum in one or two namespaces.
type csum struct{ ip, icmp, tcp, udp uint64 }

// readCsum reads the counters of the namespaces of both endpoints, each namespace once.
func readCsum(ends ...*netns.NS) (csum, error) {
	type id struct{ dev, ino uint64 }
	var sum csum
	seen := make(map[id]bool)
	for _, ns := range ends {
		n := ns
		if n == nil {
			cur, err := netns.Current()
			if err != nil {
				return csum{}, err
			}
			defer cur.Close()
			n = cur
		}
		dev, ino, err := n.ID()
		if err != nil {
			return csum{}, err
		}
		if seen[id{dev, ino}] {
			continue
		}
		seen[id{dev, ino}] = true
		err = n.Do(func() error {
			// The files are those of the thread that opens them.
			for _, f := range []string{"snmp", "netstat", "snmp6"} {
				b, err := os.ReadFile("/proc/thread-self/net/" + f)
				if errors.Is(err, os.ErrNotExist) && f == "snmp6" {
					continue // a kernel without IPv6
				}
				if err != nil {
					return fmt.Errorf("read the kernel's checksum errors: %w", err)
				}
				sum.parse(b)
			}
			return nil
		})
		if err != nil {
			return csum{}, err
		}
	}
	return sum, nil
}

// parse adds the counters in the text of /proc/net/snmp and netstat (pairs of lines, names and
// values) and /proc/net/snmp6 (a name and a value on each line).
func (c *csum) parse(b []byte) {
	add := func(proto string, v []byte) {
		n, _ := strconv.ParseUint(string(v), 10, 64)
		switch proto {
		case "Icmp:", "Icmp6InCsumErrors":
			c.icmp += n
		case "Tcp:":
			c.tcp += n // of both families
		case "Udp:", "Udp6InCsumErrors":
			c.udp += n
		case "IpExt:":
			c.ip += n // headers of IPv4
		}
	}
	var names [][]byte
	for line := range bytes.Lines(b) {
		f := bytes.Fields(line)
		if len(f) < 2 {
			continue
		}
		if !bytes.HasSuffix(f[0], []byte(":")) {
			add(string(f[0]), f[1])
			continue
		}
		if len(names) != len(f) || !bytes.Equal(names[0], f[0]) {
			names = f
			continue
		}
		for i := 1; i < len(f); i++ {
			if string(names[i]) == "InCsumErrors" {
				add(string(f[0]), f[i])
			}
		}
		names = nil
	}
}

// newCsum reads the counters before a run; the function it returns, the errors since.
func newCsum(from, to Endpoint) (func() (csum, error), error) {
	before, err := readCsum(from.NS, to.NS)
	if err != nil {
		return nil, err
	}
	return func() (csum, error) {
		after, err := readCsum(from.NS, to.NS)
		if err != nil {
			return csum{}, err
		}
		return csum{after.ip - before.ip, after.icmp - before.icmp, after.tcp - before.tcp, after.udp - before.udp}, nil
	}, nil
}

// ctxErr returns why ctx is over, with what was going on.
func ctxErr(ctx context.Context, what string) error {
	if err := context.Cause(ctx); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}
