//go:build linux

// Command peer is the end of a trial inside of a virtual machine: it echoes, or checks another's echo and prints the
// result as JSON.
//
//	peer echo
//	peer check ADDRESS [PINGS [BYTES]]
//	peer memory FUNCTION on|off
//	peer master FUNCTION on|off
//	peer wipe FUNCTION
//	peer up INTERFACE PREFIX [MTU]
//	peer down INTERFACE
//	peer ethtool INTERFACE FEATURE=on|off ...
//	peer channels INTERFACE PAIRS
//	peer shout
//	peer disk DEVICE write|verify SEED
//
// memory sets or clears the memory-enable bit of a PCI function, master its bus-master bit, wipe clears its BARs and command register as a reset of the
// board does, both behind the back of whoever uses it. up gives an interface an IPv4 address and sets it up. ethtool and channels
// do what ethtool -K and ethtool -L do, and fail where the interface is not as wanted afterwards. shout answers each
// line of its terminal in capitals, with the terminal's size. disk writes files to the ext4 file system on a device, or verifies
// them.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"

	"github.com/boardlink/boardlink/hwtest/remote"
	"golang.org/x/sys/unix"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "peer:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	switch {
	case len(args) == 1 && args[0] == "echo":
		return remote.Echo(ctx)
	case len(args) == 1 && args[0] == "shout":
		return shout()
	case len(args) >= 2 && args[0] == "check":
		addr, err := netip.ParseAddr(args[1])
		if err != nil {
			return err
		}
		var c remote.Config
		if len(args) > 2 {
			if c.Pings, err = strconv.Atoi(args[2]); err != nil {
				return err
			}
		}
		if len(args) > 3 {
			if c.Bytes, err = strconv.ParseInt(args[3], 10, 64); err != nil {
				return err
			}
		}
		r, err := remote.Check(ctx, nil, addr, c)
		if jerr := json.NewEncoder(os.Stdout).Encode(r); jerr != nil {
			return jerr
		}
		return err
	}
	if len(args) == 3 && args[0] == "memory" {
		return command(args[1], 1<<1, args[2] == "on")
	}
	if len(args) == 3 && args[0] == "master" {
		return command(args[1], 1<<2, args[2] == "on")
	}
	if len(args) == 2 && args[0] == "wipe" {
		return wipe(args[1])
	}
	if len(args) >= 3 && args[0] == "up" {
		return up(args[1], args[2], args[3:])
	}
	if len(args) == 2 && args[0] == "down" {
		return down(args[1])
	}
	if len(args) >= 3 && args[0] == "ethtool" {
		return offload(args[1], args[2:])
	}
	if len(args) == 3 && args[0] == "channels" {
		return channels(args[1], args[2])
	}
	if len(args) == 4 && args[0] == "disk" && (args[2] == "write" || args[2] == "verify") {
		return disk(args[1], args[2], args[3])
	}
	return fmt.Errorf("usage: peer shout | peer disk DEVICE write|verify SEED | peer down INTERFACE | peer ethtool INTERFACE FEATURE=on|off ... | peer channels INTERFACE PAIRS | peer up INTERFACE PREFIX [MTU] | peer echo | peer check ADDRESS [PINGS [BYTES]] | peer memory FUNCTION on|off | peer master FUNCTION on|off | peer wipe FUNCTION")
}

func shout() error {
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		size, err := unix.IoctlGetWinsize(0, unix.TIOCGWINSZ)
		if err != nil {
			return err
		}
		fmt.Printf("%s (%dx%d)\n", strings.ToUpper(lines.Text()), size.Col, size.Row)
	}
	return lines.Err()
}

// command sets or clears a bit of the command register in configuration space (PCI 3.0, 6.2.2).
func command(fn string, bit byte, on bool) error {
	const register = 4
	f, err := os.OpenFile("/sys/bus/pci/devices/"+fn+"/config", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	var b [2]byte
	if _, err := f.ReadAt(b[:], register); err != nil {
		return err
	}
	b[0] &^= bit
	if on {
		b[0] |= bit
	}
	_, err = f.WriteAt(b[:], register)
	return err
}

// wipe clears what a reset of the board clears: command register and BARs.
func wipe(fn string) error {
	f, err := os.OpenFile("/sys/bus/pci/devices/"+fn+"/config", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.WriteAt(make([]byte, 2), 4); err != nil {
		return err
	}
	for off := int64(0x10); off < 0x28; off += 4 {
		if _, err := f.WriteAt(make([]byte, 4), off); err != nil {
			return err
		}
	}
	return nil
}

// down sets an interface down.
func down(name string) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	r, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	r.SetUint16(0)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, r)
}

// up gives an interface an IPv4 address, an MTU if there is one, and sets it up.
func up(name, prefix string, mtu []string) error {
	p, err := netip.ParsePrefix(prefix)
	if err != nil || !p.Addr().Is4() {
		return fmt.Errorf("%q is not an IPv4 address with its prefix length", prefix)
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	do := func(req uint, set func(*unix.Ifreq) error) error {
		r, err := unix.NewIfreq(name)
		if err == nil {
			err = set(r)
		}
		if err == nil {
			err = unix.IoctlIfreq(fd, req, r)
		}
		if err != nil {
			return fmt.Errorf("interface %s, ioctl %#x: %w", name, req, err)
		}
		return nil
	}
	if len(mtu) > 0 {
		n, err := strconv.Atoi(mtu[0])
		if err != nil {
			return err
		}
		if err := do(unix.SIOCSIFMTU, func(r *unix.Ifreq) error { r.SetUint32(uint32(n)); return nil }); err != nil {
			return err
		}
	}
	mask := net.CIDRMask(p.Bits(), 32)
	if err := do(unix.SIOCSIFADDR, func(r *unix.Ifreq) error { return r.SetInet4Addr(p.Addr().AsSlice()) }); err != nil {
		return err
	}
	if err := do(unix.SIOCSIFNETMASK, func(r *unix.Ifreq) error { return r.SetInet4Addr(mask) }); err != nil {
		return err
	}
	return do(unix.SIOCSIFFLAGS, func(r *unix.Ifreq) error { r.SetUint16(unix.IFF_UP | unix.IFF_RUNNING); return nil })
}
