//go:build linux

package netbench

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"

	"github.com/boardlink/boardlink/trial/netns"
	"github.com/vishvananda/netlink"
	vnetns "github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// ifname is the interface's name in either namespace; boardlink's ends have their own.
const ifname = "nb0"

// Addresses of the sides, host and board.
var addrs = [2]netip.Addr{netip.AddrFrom4([4]byte{10, 66, 0, 1}), netip.AddrFrom4([4]byte{10, 66, 0, 2})}

// hdrLen is struct virtio_net_hdr_v1, as boardlink's interfaces have it (virtio 1.2, 5.1.6).
const hdrLen = 12

// Flags of TUNSETOFFLOAD that x/sys lacks (linux/if_tun.h).
const tunFUSO4, tunFUSO6 = 0x20, 0x40

// openTaps makes an interface in a namespace and returns a blocking descriptor for each of its queues.
func openTaps(ns *netns.NS, c *Config) (files []*os.File, err error) {
	defer func() {
		if err != nil {
			closeFiles(files)
			files = nil
		}
	}()
	err = ns.Do(func() error {
		flags := uint16(unix.IFF_TAP)
		if c.Link == "tun" {
			flags = unix.IFF_TUN
		}
		flags |= unix.IFF_NO_PI
		if c.Offload {
			flags |= unix.IFF_VNET_HDR
		}
		if c.Queues > 1 {
			flags |= unix.IFF_MULTI_QUEUE
		}
		for range max(1, c.Queues) {
			fd, err := unix.Open(netns.TunPath, unix.O_RDWR|unix.O_CLOEXEC, 0)
			if err != nil {
				return fmt.Errorf("open %s: %w", netns.TunPath, err)
			}
			r, err := unix.NewIfreq(ifname)
			if err != nil {
				unix.Close(fd)
				return err
			}
			r.SetUint16(flags)
			err = unix.IoctlIfreq(fd, unix.TUNSETIFF, r)
			runtime.KeepAlive(r)
			if err != nil {
				unix.Close(fd)
				return fmt.Errorf("make the interface %s: %w", ifname, err)
			}
			files = append(files, os.NewFile(uintptr(fd), ifname)) // blocking: not watched by the runtime
			if !c.Offload {
				continue
			}
			if err := unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, hdrLen); err != nil {
				return fmt.Errorf("interface %s: TUNSETVNETHDRSZ: %w", ifname, err)
			}
			const tso = unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6
			err = unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, tso|tunFUSO4|tunFUSO6)
			if errors.Is(err, unix.EINVAL) { // before Linux 6.2
				err = unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, tso)
			}
			if err != nil {
				return fmt.Errorf("interface %s: TUNSETOFFLOAD: %w", ifname, err)
			}
		}
		return nil
	})
	if err != nil {
		return files, err
	}
	return files, nil
}

func closeFiles(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// configure gives the interface of a side its address and sets it up.
func configure(ns *netns.NS, side, mtu int) error {
	return withNetlink(ns, func(h *netlink.Handle) error {
		l, err := h.LinkByName(ifname)
		if err != nil {
			return err
		}
		a := &netlink.Addr{IPNet: netlink.NewIPNet(addrs[side].AsSlice())}
		a.Mask = a.IPNet.IP.DefaultMask()
		if err := h.LinkSetMTU(l, mtu); err != nil {
			return fmt.Errorf("interface %s: MTU %d: %w", ifname, mtu, err)
		}
		if err := h.AddrAdd(l, a); err != nil {
			return fmt.Errorf("interface %s: address %v: %w", ifname, a, err)
		}
		if err := h.LinkSetUp(l); err != nil {
			return fmt.Errorf("interface %s: set up: %w", ifname, err)
		}
		return nil
	})
}

func withNetlink(ns *netns.NS, f func(*netlink.Handle) error) error {
	h, err := netlink.NewHandleAt(vnetns.NsHandle(ns.FD()))
	if err != nil {
		return fmt.Errorf("rtnetlink: %w", err)
	}
	defer h.Close()
	return f(h)
}

// joinVeth makes the two ends of a veth.
func joinVeth(ns [2]*netns.NS) error {
	return withNetlink(ns[0], func(h *netlink.Handle) error {
		v := &netlink.Veth{LinkAttrs: netlink.NewLinkAttrs(), PeerName: ifname, PeerNamespace: netlink.NsFd(ns[1].FD())}
		v.Name = ifname
		if err := h.LinkAdd(v); err != nil {
			return fmt.Errorf("make a veth: %w", err)
		}
		return nil
	})
}
