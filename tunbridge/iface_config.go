package tunbridge

import (
	"fmt"
	"strconv"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// LinkType is the kind of an interface.
type LinkType uint8

const (
	// TAP carries Ethernet frames.
	TAP LinkType = iota
	// TUN carries IPv4 and IPv6 packets, without a link header.
	TUN
)

// String returns "tap" or "tun".
func (t LinkType) String() string {
	switch t {
	case TAP:
		return "tap"
	case TUN:
		return "tun"
	}
	return fmt.Sprintf("LinkType(%d)", uint8(t))
}

// flag returns the IFF_ bit of TUNSETIFF.
func (t LinkType) flag() uint16 {
	if t == TUN {
		return unix.IFF_TUN
	}
	return unix.IFF_TAP
}

// MinMTU is the smallest MTU that the kernel gives an IPv4 interface, in bytes.
const MinMTU = 68

// MinMTU6 is the smallest MTU that IPv6 works with, in bytes (RFC 8200, 5). Below it the kernel removes an interface's IPv6
// addresses.
const MinMTU6 = 1280

// MaxMTU returns the largest MTU of an interface of type t, in bytes (the kernel's
// limit: 65535 less the link header).
func MaxMTU(t LinkType) int {
	if t == TUN {
		return 65535
	}
	return 65535 - 14
}

// Config says which interface Open opens, and how.
type Config struct {
	// Name is the interface's name, of 1 to 15 bytes; empty lets the kernel pick tapN
	// or tunN. A persistent interface of that name and type is attached to as it is,
	// with its addresses.
	Name string
	Type LinkType
	// Offload asks for vnet mode. Where the kernel lacks it the mode is plain:
	// HeaderLen tells, and Warnings says why.
	Offload bool
	// Persist keeps the interface when the program ends, by whatever end. Without it
	// an interface that Open created disappears with the Iface; one that was there
	// before stays either way (Remove removes it).
	Persist bool
	// MAC is the address of a TAP; zero leaves the kernel's choice.
	MAC MAC
	// MTU is in bytes, MinMTU to MaxMTU; 0 leaves what is set (1500 if new).
	MTU int
	// Queues is how many queues to open, at most MaxQueues; 0 means 1. Where the kernel has no multi-queue devices, or the
	// interface was made with a single queue, there is one: Iface.Queues tells, and Warnings says why. An interface that was made with
	// several is attached to with as many as are asked for.
	Queues int
}

// Validate reports what is wrong with c whatever the machine: a *ConfigError, or nil. Open does it, too.
func (c Config) Validate() error {
	if c.Type != TAP && c.Type != TUN {
		return configError(c.Name, nil, "there is no interface of type %v: use tap or tun", c.Type)
	}
	if c.Name != "" {
		if err := checkName(c.Name); err != nil {
			return err
		}
	}
	if err := checkMTU(c.Name, c.Type, c.MTU); c.MTU != 0 && err != nil {
		return err
	}
	if c.Queues < 0 || c.Queues > MaxQueues {
		return configError(c.Name, nil, "%d queues are out of bounds: 1 to %d", c.Queues, MaxQueues)
	}
	if c.MAC != (MAC{}) {
		return checkMAC(c.Name, c.Type, c.MAC)
	}
	return nil
}

func checkName(name string) error {
	if len(name) >= unix.IFNAMSIZ {
		return configError(name, nil, "the name has %d bytes, the limit is %d", len(name), unix.IFNAMSIZ-1)
	}
	switch name {
	case ".", "..", "all", "default":
		return configError(name, nil, "the kernel reserves this name; choose another one")
	}
	for i, c := range name {
		if c <= ' ' || c >= 0x7f || c == '/' || c == ':' || c == '%' {
			what := strconv.QuoteRune(c)
			if c == utf8.RuneError && name[i] >= 0x80 {
				what = fmt.Sprintf("%#02x", name[i]) // not UTF-8
			}
			return configError(name, nil, "%s (at byte %d) cannot be in the name of an interface: use letters, digits, '-', '_' and '.'", what, i)
		}
	}
	return nil
}

func checkMTU(name string, t LinkType, mtu int) error {
	if mtu < MinMTU || mtu > MaxMTU(t) {
		return configError(name, nil, "MTU %d is out of bounds: a %v takes %d to %d", mtu, t, MinMTU, MaxMTU(t))
	}
	return nil
}

func checkMAC(name string, t LinkType, m MAC) error {
	if t != TAP {
		return configError(name, nil, "a %v has no MAC address; %v was asked for", t, m)
	}
	if m == (MAC{}) || m[0]&1 != 0 {
		return configError(name, nil, "MAC address %v is not a unicast address", m)
	}
	return nil
}
