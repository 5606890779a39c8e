// Package ifaddr gives a network interface its addresses and sets it up, over netlink.
//
// In the room: addresses of one interface, and the IPv6 settings that make them
// usable at once. Never in it: opening interfaces (tunbridge), routes, name servers.
//
// All functions act in the network namespace of the calling thread.
package ifaddr

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/boardlink/boardlink/tunbridge"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// userError returns what the operator can mend: exit status 2.
func userError(ifname string, cause error, format string, args ...any) error {
	return &tunbridge.ConfigError{Name: ifname, Msg: fmt.Sprintf(format, args...), Err: cause}
}

// Apply adds addrs (an address and its prefix length, as 10.0.0.1/24) to the interface and
// leaves its other addresses alone. What is there already stays as it is, so that it may
// be called at every start. IPv6 addresses skip duplicate detection: the only
// neighbour on a link of boardlink is the other side, and a restart must not wait a second
// for it. All addresses are checked before the first is added. What the operator can mend is
// a *tunbridge.ConfigError.
func Apply(ifname string, addrs []netip.Prefix) error {
	for _, p := range addrs {
		if err := check(ifname, p); err != nil {
			return err
		}
	}
	link, err := linkByName(ifname)
	if err != nil {
		return err
	}
	settle(link)
	have, err := netlink.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("interface %q: list addresses: %w", ifname, err)
	}
	for _, p := range addrs {
		if err := add(link, p, have); err != nil {
			return err
		}
	}
	return nil
}

// check refuses what cannot be an interface's address.
func check(ifname string, p netip.Prefix) error {
	a := p.Addr()
	switch {
	case !p.IsValid():
		return userError(ifname, nil, "an address without a valid prefix length: write it as 10.0.0.1/24 or fd00::1/64")
	case a.Is4In6():
		return userError(ifname, nil, "address %v: write an IPv4 address as such", p)
	case a.IsUnspecified(), a.IsMulticast(), a == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return userError(ifname, nil, "address %v cannot belong to an interface", p)
	}
	return nil
}

// add adds one address. have is what the interface has.
func add(link netlink.Link, p netip.Prefix, have []netlink.Addr) error {
	name := link.Attrs().Name
	want := &netlink.Addr{IPNet: &net.IPNet{
		IP:   p.Addr().AsSlice(),
		Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen()),
	}}
	if p.Addr().Is6() {
		want.Flags = unix.IFA_F_NODAD
	}
	for i := range have {
		h := &have[i]
		if !samePrefix(h.IPNet, p) {
			continue
		}
		if h.Flags&(unix.IFA_F_TENTATIVE|unix.IFA_F_DADFAILED) == 0 {
			return nil
		}
		// Somebody added it with duplicate detection, and it is not usable: once more.
		if err := netlink.AddrDel(link, h); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return fmt.Errorf("interface %q: remove tentative address %v: %w", name, p, err)
		}
	}
	err := netlink.AddrAdd(link, want)
	switch {
	case err == nil, errors.Is(err, unix.EEXIST): // added by somebody else meanwhile
		return nil
	case errors.Is(err, unix.EPERM):
		return userError(name, err, "not permitted to add address %v: CAP_NET_ADMIN is missing in this network namespace", p)
	case p.Addr().Is6() && (errors.Is(err, unix.EACCES) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EAFNOSUPPORT)):
		return userError(name, err, "address %v: IPv6 is switched off here (sysctl net.ipv6.conf.%s.disable_ipv6, or a kernel without it)", p, name)
	case p.Addr().Is6() && errors.Is(err, unix.EINVAL):
		return userError(name, err, "address %v: the kernel refuses it; IPv6 needs an MTU of 1280 or more (it is %d)", p, link.Attrs().MTU)
	}
	return fmt.Errorf("interface %q: add address %v: %w", name, p, err)
}

func samePrefix(n *net.IPNet, p netip.Prefix) bool {
	if n == nil {
		return false
	}
	a, ok := netip.AddrFromSlice(n.IP)
	ones, _ := n.Mask.Size()
	return ok && a.Unmap() == p.Addr() && ones == p.Bits()
}

// Up sets the interface up. Its IPv6 link-local address needs no duplicate detection and,
// on a tap, follows from the MAC address: it is usable at once and stable. (A tun has no MAC
// address; the kernel draws its link-local address.)
func Up(ifname string) error {
	link, err := linkByName(ifname)
	if err != nil {
		return err
	}
	settle(link)
	if err := netlink.LinkSetUp(link); err != nil {
		if errors.Is(err, unix.EPERM) {
			return userError(ifname, err, "not permitted to set the interface up: CAP_NET_ADMIN is missing in this network namespace")
		}
		return fmt.Errorf("interface %q: set up: %w", ifname, err)
	}
	return nil
}

func linkByName(ifname string) (netlink.Link, error) {
	link, err := netlink.LinkByName(ifname)
	if err != nil {
		var nf netlink.LinkNotFoundError
		if errors.As(err, &nf) {
			return nil, userError(ifname, nil, "there is no such interface in this network namespace")
		}
		return nil, fmt.Errorf("interface %q: look it up: %w", ifname, err)
	}
	return link, nil
}

// settle makes addresses that the kernel configures by itself usable at once
// (Documentation/networking/ip-sysctl.rst). It is done as well as may be: in a container /proc/sys can be
// read-only, or the kernel without IPv6; then only the link-local address is a second late.
func settle(link netlink.Link) {
	dir := filepath.Join("/proc/sys/net/ipv6/conf", link.Attrs().Name)
	_ = writeSysctl(filepath.Join(dir, "accept_dad"), "0")
	_ = writeSysctl(filepath.Join(dir, "dad_transmits"), "0")
	if len(link.Attrs().HardwareAddr) != 0 {
		_ = writeSysctl(filepath.Join(dir, "addr_gen_mode"), "0") // EUI-64
	}
	// Carrier off and on flushes the neighbours, and a question asked while the other side is away is
	// repeated after this time: the default second would be most of what a restart costs.
	for _, family := range []string{"ipv4", "ipv6"} {
		_ = writeSysctl(filepath.Join("/proc/sys/net", family, "neigh", link.Attrs().Name, "retrans_time_ms"), "100")
	}
}

// writeSysctl writes value unless it is there already.
func writeSysctl(path, value string) error {
	old, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if len(old) > 0 && string(old[:len(old)-1]) == value {
		return nil
	}
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}
