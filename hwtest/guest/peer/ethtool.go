//go:build linux

package main

import (
	"fmt"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Commands of SIOCETHTOOL (linux/ethtool.h).
const (
	ethtoolGChannels = 0x3c
	ethtoolSChannels = 0x3d
)

// features are what ethtool -K sets by name, with the commands that read and set them.
var features = map[string]struct{ get, set uint32 }{
	"tx":  {0x16, 0x17}, // checksums of what is sent
	"sg":  {0x18, 0x19}, // scattered frames
	"tso": {0x1e, 0x1f}, // segmentation by the device
	"gso": {0x23, 0x24}, // segmentation before the device
	"gro": {0x2b, 0x2c}, // received segments put together
}

// ethtool runs a command of SIOCETHTOOL; arg is its struct, which begins with the command.
func ethtool(name string, arg unsafe.Pointer) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	r := struct {
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [24 - unsafe.Sizeof(arg)]byte
	}{data: arg}
	copy(r.name[:unix.IFNAMSIZ-1], name)
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&r))); e != 0 {
		return fmt.Errorf("interface %s, SIOCETHTOOL %#x: %w", name, *(*uint32)(arg), e)
	}
	return nil
}

// offload sets features of an interface, and reads all of them back afterwards.
func offload(name string, settings []string) error {
	type value struct{ cmd, data uint32 }
	want := func(s string) (v uint32, f struct{ get, set uint32 }, err error) {
		n, on, _ := strings.Cut(s, "=")
		f, ok := features[n]
		if !ok || on != "on" && on != "off" {
			return 0, f, fmt.Errorf("%q: FEATURE=on or =off is wanted, with tx, sg, tso, gso or gro", s)
		}
		if on == "on" {
			v = 1
		}
		return v, f, nil
	}
	for _, s := range settings {
		v, f, err := want(s)
		if err != nil {
			return err
		}
		if err := ethtool(name, unsafe.Pointer(&value{f.set, v})); err != nil {
			return fmt.Errorf("%s: %w", s, err)
		}
	}
	for _, s := range settings {
		v, f, _ := want(s)
		got := value{cmd: f.get}
		if err := ethtool(name, unsafe.Pointer(&got)); err != nil {
			return fmt.Errorf("%s: %w", s, err)
		}
		if got.data != v {
			return fmt.Errorf("interface %s: %s was set, and it reads %d", name, s, got.data)
		}
	}
	return nil
}

// channels puts so many queue pairs of an interface into use.
func channels(name, pairs string) error {
	n, err := strconv.ParseUint(pairs, 10, 16)
	if err != nil {
		return err
	}
	var c struct{ cmd, maxRx, maxTx, maxOther, maxCombined, rx, tx, other, combined uint32 }
	c.cmd = ethtoolGChannels
	if err := ethtool(name, unsafe.Pointer(&c)); err != nil {
		return err
	}
	c.cmd, c.combined = ethtoolSChannels, uint32(n)
	if err := ethtool(name, unsafe.Pointer(&c)); err != nil {
		return fmt.Errorf("%d of at most %d pairs: %w", n, c.maxCombined, err)
	}
	c.cmd, c.combined = ethtoolGChannels, 0
	if err := ethtool(name, unsafe.Pointer(&c)); err != nil {
		return err
	}
	if c.combined != uint32(n) {
		return fmt.Errorf("interface %s: %d pairs were set, and it has %d in use", name, n, c.combined)
	}
	return nil
}
