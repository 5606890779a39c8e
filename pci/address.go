package pci

import (
	"fmt"
	"strconv"
	"strings"
)

// Address is where a function sits: what the kernel calls it in /sys/bus/pci/devices. It is
// comparable and may be a map's key.
type Address struct {
	Domain   uint32 // 0 on most machines; above 0xffff behind some host bridges (Intel VMD)
	Bus      uint8
	Device   uint8 // 0 to 31
	Function uint8 // 0 to 7
}

// ParseAddress reads "0000:00:04.0" or, for domain 0, "00:04.0": hexadecimal, as lspci and sysfs print it. The
// error is an *Error that matches ErrInput.
func ParseAddress(s string) (Address, error) {
	bad := func() (Address, error) {
		return Address{}, &Error{
			Problem: BadInput, Spec: strconv.Quote(s),
			Reason: "is not a PCI address",
			Mend:   "write domain:bus:device.function in hexadecimal, as lspci -D prints it: 0000:00:04.0",
		}
	}
	rest, dom := s, uint64(0)
	if strings.Count(s, ":") == 2 {
		i := strings.IndexByte(s, ':')
		var err error
		if i < 4 || i > 8 {
			return bad()
		}
		if dom, err = strconv.ParseUint(s[:i], 16, 32); err != nil {
			return bad()
		}
		rest = s[i+1:]
	}
	if len(rest) != 7 || rest[2] != ':' || rest[5] != '.' {
		return bad()
	}
	bus, err1 := strconv.ParseUint(rest[:2], 16, 8)
	dev, err2 := strconv.ParseUint(rest[3:5], 16, 8)
	fn, err3 := strconv.ParseUint(rest[6:], 16, 8)
	if err1 != nil || err2 != nil || err3 != nil || dev > 31 || fn > 7 {
		return bad()
	}
	return Address{Domain: uint32(dom), Bus: uint8(bus), Device: uint8(dev), Function: uint8(fn)}, nil
}

// String returns "0000:00:04.0".
func (a Address) String() string {
	return fmt.Sprintf("%04x:%02x:%02x.%x", a.Domain, a.Bus, a.Device, a.Function)
}

// less orders addresses as lspci does.
func (a Address) less(b Address) bool {
	if a.Domain != b.Domain {
		return a.Domain < b.Domain
	}
	if a.Bus != b.Bus {
		return a.Bus < b.Bus
	}
	if a.Device != b.Device {
		return a.Device < b.Device
	}
	return a.Function < b.Function
}
