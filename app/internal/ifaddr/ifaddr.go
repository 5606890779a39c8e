// Package ifaddr gives a network interface its addresses, sets it up, and keeps it so.
//
// In the room: addresses of one interface, the IPv6 settings that make them
// usable at once, and what to do when somebody takes the interface down, lowers its MTU or removes it. Never in it: opening
// interfaces (tunbridge), routes, name servers.
//
// It speaks rtnetlink itself (netlink.go), in Go 1.18: the lean programs for machines that only gccgo
// compiles for use it, and so do ends under an emulator, which alters what it knows of
// netlink only.
//
// All requests go to the network namespace that the interface is in.
package ifaddr

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/tunbridge"
)

// userError returns what the operator can mend: exit status 2.
func userError(ifname string, cause error, format string, args ...interface{}) error {
	return &tunbridge.ConfigError{Name: ifname, Msg: fmt.Sprintf(format, args...), Err: cause}
}

// iface is what requests about an interface need. It is closed after use.
type iface struct {
	name  string
	ctl   int // a socket in its network namespace
	index uint32
}

// with runs f in the network namespace of the interface. Where the interface is gone or cannot be reached, the
// error matches tunbridge.ErrGone or tunbridge.ErrElsewhere.
func with(it *tunbridge.Iface, f func(*iface) error) error {
	return it.InNamespace(func(name string, index int) error {
		ctl, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err == unix.EAFNOSUPPORT {
			ctl, err = unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		}
		if err != nil {
			return fmt.Errorf("interface %q: control socket: %w", name, err)
		}
		i := &iface{name: name, ctl: ctl, index: uint32(index)}
		defer i.close()
		return f(i)
	})
}

func (i *iface) close() { unix.Close(i.ctl) }

func ioctl(fd int, req uint, r *unix.Ifreq) error {
	for {
		if err := unix.IoctlIfreq(fd, req, r); err != unix.EINTR {
			return err
		}
	}
}

// get asks for a value of the interface.
func (i *iface) get(req uint) (*unix.Ifreq, error) {
	r, err := unix.NewIfreq(i.name)
	if err == nil {
		err = ioctl(i.ctl, req, r)
	}
	return r, err
}

// MTUError tells of IPv6 addresses that were not added because the MTU is below 1280. It is a tunbridge.UserError.
type MTUError struct {
	Name  string // of the interface
	MTU   int    // bytes
	Addrs []netip.Prefix
}

// Error names the addresses, the MTU, and the MTU that is needed.
func (e *MTUError) Error() string {
	return fmt.Sprintf("interface %q: addresses %v: IPv6 needs an MTU of 1280 or more, it is %d: raise it here or at the host (--mtu)", e.Name, e.Addrs, e.MTU)
}

// UserError returns true.
func (e *MTUError) UserError() bool { return true }

// Apply adds addrs (an address and its prefix length, as 10.0.0.1/24) to the interface and
// leaves its other addresses alone. What is there already stays as it is and needs no privilege, so that it may
// be called at every start. IPv6 addresses skip duplicate detection: the only
// neighbour on a link of boardlink is the other side, and a restart must not wait a second
// for it. All addresses are checked before the first is added. What the operator can mend is
// a *tunbridge.ConfigError, or, once all others are added, a *MTUError.
func Apply(it *tunbridge.Iface, addrs []netip.Prefix) error {
	if err := Check(it.Name(), addrs, 0); err != nil {
		return err
	}
	return with(it, func(i *iface) error { return i.apply(addrs) })
}

func (i *iface) apply(addrs []netip.Prefix) error {
	i.settle()
	if len(addrs) == 0 {
		return nil
	}
	have, err := i.addresses()
	if err != nil {
		return err
	}
	mtu := tunbridge.MinMTU6
	if r, err := i.get(unix.SIOCGIFMTU); err == nil {
		mtu = int(r.Uint32())
	}
	nl, err := openNetlink()
	if err != nil {
		return fmt.Errorf("interface %q: netlink socket: %w", i.name, err)
	}
	defer nl.close()
	var later []netip.Prefix
	for _, p := range addrs {
		if mtu < tunbridge.MinMTU6 && p.Addr().Is6() {
			later = append(later, p)
			continue
		}
		if have[p] && !i.unusable(p) {
			continue
		}
		if err := i.add(nl, p); err != nil {
			return err
		}
	}
	if later != nil {
		return &MTUError{Name: i.name, MTU: mtu, Addrs: later}
	}
	return nil
}

// addresses returns the addresses that the interface has.
func (i *iface) addresses() (map[netip.Prefix]bool, error) {
	list, err := (&net.Interface{Index: int(i.index), Name: i.name}).Addrs()
	if err != nil {
		return nil, fmt.Errorf("interface %q: list its addresses: %w", i.name, err)
	}
	have := make(map[netip.Prefix]bool, len(list))
	for _, a := range list {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			have[p] = true
		}
	}
	return have, nil
}

// Check refuses addresses that no interface can have: a *tunbridge.ConfigError; and IPv6 addresses beside an MTU, in bytes, that
// is too small for them: a *MTUError. An MTU of 0 is not known yet. ifname is for the error.
func Check(ifname string, addrs []netip.Prefix, mtu int) error {
	var six []netip.Prefix
	for _, p := range addrs {
		if err := check(ifname, p); err != nil {
			return err
		}
		if p.Addr().Is6() {
			six = append(six, p)
		}
	}
	if mtu != 0 && mtu < tunbridge.MinMTU6 && six != nil {
		return &MTUError{Name: ifname, MTU: mtu, Addrs: six}
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

// add adds one address.
func (i *iface) add(nl *rtnl, p netip.Prefix) error {
	err := nl.address(unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_EXCL, i.index, p)
	if err == unix.EEXIST && i.unusable(p) {
		// Somebody added it with duplicate detection, and it is not usable: once more.
		if err := nl.address(unix.RTM_DELADDR, 0, i.index, p); err != nil && err != unix.EADDRNOTAVAIL {
			return fmt.Errorf("interface %q: remove tentative address %v: %w", i.name, p, err)
		}
		err = nl.address(unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_EXCL, i.index, p)
	}
	switch {
	case err == nil, err == unix.EEXIST:
		return nil
	case err == unix.EPERM:
		return userError(i.name, err, "not permitted to add address %v: CAP_NET_ADMIN is missing in this network namespace", p)
	case p.Addr().Is6() && (err == unix.EACCES || err == unix.EOPNOTSUPP || err == unix.EAFNOSUPPORT):
		return userError(i.name, err, "address %v: IPv6 is switched off here (sysctl net.ipv6.conf.%s.disable_ipv6, or a kernel without it)", p, i.name)
	}
	return fmt.Errorf("interface %q: add address %v: %w", i.name, p, err)
}

// unusable tells whether the kernel still looks, or has looked in vain, for the IPv6 address at
// the neighbours'.
func (i *iface) unusable(p netip.Prefix) bool {
	if !p.Addr().Is6() {
		return false
	}
	b, err := os.ReadFile("/proc/thread-self/net/if_inet6")
	if err != nil { // before Linux 3.17
		if b, err = os.ReadFile("/proc/net/if_inet6"); err != nil {
			return false
		}
	}
	return tentative(string(b), p.Addr(), i.index)
}

// tentative finds the address in the text of /proc/net/if_inet6: for each address a line of
// address, index, prefix length, scope, flags (all hexadecimal) and name.
func tentative(text string, a netip.Addr, index uint32) bool {
	want := fmt.Sprintf("%x", a.As16())
	for _, line := range strings.Split(text, "\n") {
		f := strings.Fields(line)
		if len(f) < 6 || f[0] != want {
			continue
		}
		if n, err := strconv.ParseUint(f[1], 16, 32); err != nil || uint32(n) != index {
			continue
		}
		flags, err := strconv.ParseUint(f[4], 16, 32)
		return err == nil && flags&(unix.IFA_F_TENTATIVE|unix.IFA_F_DADFAILED) != 0
	}
	return false
}

// Up sets the interface up; where it is up already no privilege is needed. Its IPv6 link-local address needs no duplicate detection and,
// on a tap, follows from the MAC address: it is usable at once and stable. (A tun has no MAC
// address; the kernel draws its link-local address.)
func Up(it *tunbridge.Iface) error { return with(it, (*iface).up) }

func (i *iface) up() error {
	i.settle()
	r, err := i.get(unix.SIOCGIFFLAGS)
	if err == nil && r.Uint16()&unix.IFF_UP == 0 {
		r.SetUint16(r.Uint16() | unix.IFF_UP)
		err = ioctl(i.ctl, unix.SIOCSIFFLAGS, r)
	}
	if err == unix.EPERM {
		return userError(i.name, err, "not permitted to set the interface up: CAP_NET_ADMIN is missing in this network namespace; run \"ip link set dev %s up\" as root", i.name)
	}
	if err != nil {
		return fmt.Errorf("interface %q: set up: %w", i.name, err)
	}
	return nil
}

// settle makes addresses that the kernel configures by itself usable at once
// (Documentation/networking/ip-sysctl.rst). It is done as well as may be: in a container /proc/sys can be
// read-only, or the kernel without IPv6; then only the link-local address is a second late.
func (i *iface) settle() {
	dir := filepath.Join("/proc/sys/net/ipv6/conf", i.name)
	_ = writeSysctl(filepath.Join(dir, "accept_dad"), "0")
	_ = writeSysctl(filepath.Join(dir, "dad_transmits"), "0")
	if r, err := i.get(unix.SIOCGIFHWADDR); err == nil && r.Uint16() == unix.ARPHRD_ETHER {
		_ = writeSysctl(filepath.Join(dir, "addr_gen_mode"), "0") // EUI-64
	}
	// Carrier off and on flushes the neighbours. A question that was asked while the other side was away, or whose answer came
	// before the own carrier, is repeated after this time: the default second would be most of what a restart costs, and with
	// 100 ms the first datagrams took about as long. As many repetitions keep the time after which a neighbour counts as absent.
	for _, family := range []string{"ipv4", "ipv6"} {
		for _, s := range neighbourSysctls {
			_ = writeSysctl(filepath.Join("/proc/sys/net", family, "neigh", i.name, s.name), s.value)
		}
	}
}

// neighbourSysctls let an unanswered neighbour be asked each 20 ms, for 300 ms.
var neighbourSysctls = []struct{ name, value string }{
	{"retrans_time_ms", "20"}, {"mcast_solicit", "15"}, {"ucast_solicit", "15"},
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
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return errors.New("sysctl " + path + ": " + err.Error())
	}
	return nil
}
