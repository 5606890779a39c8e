package tunbridge

import (
	"fmt"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// MaxQueues is the largest Config.Queues. The kernel's limit is 256 (MAX_TAP_QUEUES in drivers/net/tun.c).
const MaxQueues = 16

// Queues returns how many queues the interface has been opened with.
func (it *Iface) Queues() int { return len(it.first.queues) }

// Queue returns queue i, 0 <= i < Queues. Each has a descriptor of its own to read, write and poll; all else is the
// interface's, whichever of them is asked. Queue 0 is what Open returned, and closes them all.
func (it *Iface) Queue(i int) *Iface { return it.first.queues[i] }

// InUse returns the number of queues that SetQueues has put into use, 1 after Open.
func (it *Iface) InUse() int {
	it = it.first
	it.mu.Lock()
	defer it.mu.Unlock()
	return it.inUse
}

// SetQueues puts the first n queues into use, 1 <= n <= Queues: the kernel spreads what it sends over them, a flow to
// the queue by which its last frame came in, and hands nothing to the others. Frames that wait in a queue that goes out of use
// are lost. A queue out of use can still be written. After an error InUse tells how many are in use.
func (it *Iface) SetQueues(n int) error {
	it = it.first
	if n < 1 || n > len(it.queues) {
		return fmt.Errorf("tunbridge: interface %q: %d queues in use: it has 1 to %d", it.Name(), n, len(it.queues))
	}
	it.mu.Lock()
	defer it.mu.Unlock()
	if it.fd < 0 {
		return ErrClosed
	}
	for it.inUse < n {
		if err := useQueue(it.queues[it.inUse].fd, true); err != nil {
			return it.failed(fmt.Sprintf("attach queue %d (TUNSETQUEUE)", it.inUse), err)
		}
		it.inUse++
	}
	// From the last one on: the kernel fills a gap with its last queue, which would mix up flows.
	for it.inUse > n {
		if err := useQueue(it.queues[it.inUse-1].fd, false); err != nil {
			return it.failed(fmt.Sprintf("detach queue %d (TUNSETQUEUE)", it.inUse-1), err)
		}
		it.inUse--
	}
	return nil
}

func useQueue(fd int, use bool) error {
	r := newIfreq("")
	*r.u16() = unix.IFF_DETACH_QUEUE
	if use {
		*r.u16() = unix.IFF_ATTACH_QUEUE
	}
	return ioctlIfreq(fd, unix.TUNSETQUEUE, r)
}

// setiff makes fd a queue of the interface that cfg describes, and returns the interface's name. What is there is attached to as it
// is, whether it has one queue or several.
func (it *Iface) setiff(fd int, cfg Config, flags uint16) (string, error) {
	flags |= cfg.Type.flag() | unix.IFF_NO_PI | iffNoCarrier
	multi := cfg.Queues > 1
	if multi {
		if f, err := ioctlGetInt(fd, unix.TUNGETFEATURES); err != nil || f&unix.IFF_MULTI_QUEUE == 0 {
			it.warn("one queue: the kernel's tun driver has no IFF_MULTI_QUEUE")
			multi = false
		}
	}
	var first error
	for try := 0; try < 2; try++ {
		r := newIfreq(cfg.Name)
		*r.u16() = flags
		if multi {
			*r.u16() |= unix.IFF_MULTI_QUEUE
		}
		err := ioctlIfreq(fd, unix.TUNSETIFF, r)
		if err == nil {
			if it.multi = multi; multi && it.attached {
				if n, err := kernelQueues(r.ifName()); err == nil && n > 1 {
					return "", setiffError(it.ctl, cfg.Name, cfg.Type, unix.EBUSY)
				}
			}
			if cfg.Queues > 1 && !multi && try > 0 {
				it.warn("one queue: interface %q was made with a single queue: to have %d, remove it (ip link del %s) and start again", cfg.Name, cfg.Queues, cfg.Name)
			}
			return r.ifName(), nil
		}
		if first == nil || err != unix.EINVAL {
			first = err
		}
		if err != unix.EINVAL || !it.attached {
			break
		}
		multi = !multi // the other kind?
	}
	return "", setiffError(it.ctl, cfg.Name, cfg.Type, first)
}

// openQueues opens the other queues, out of use.
func (it *Iface) openQueues(cfg Config) error {
	it.queues, it.inUse = []*Iface{it}, 1
	if !it.multi {
		return nil
	}
	for i := 1; i < cfg.Queues; i++ {
		fd, err := openTun(it.name)
		if err != nil {
			return err
		}
		q := &Iface{fd: fd, ctl: -1, first: it, hdrLen: it.hdrLen, typ: it.typ, supported: it.supported, attached: it.attached}
		it.queues = append(it.queues, q) // Close finds it
		r := newIfreq(it.name)
		*r.u16() = it.typ.flag() | unix.IFF_NO_PI | unix.IFF_MULTI_QUEUE | iffNoCarrier
		if it.hdrLen != 0 {
			*r.u16() |= unix.IFF_VNET_HDR
		}
		if err := ioctlIfreq(fd, unix.TUNSETIFF, r); err != nil {
			return setiffError(it.ctl, it.name, it.typ, err)
		}
		if err := useQueue(fd, false); err != nil {
			return it.failed("detach a queue (TUNSETQUEUE)", err)
		}
	}
	return nil
}

// Attributes of a link's message (linux/if_link.h, linux/if_tun.h).
const (
	iflaLinkInfo         = 18
	iflaInfoData         = 2
	iflaTunQueues        = 8 // IFLA_TUN_NUM_QUEUES, Linux 4.17
	iflaTunDisabled      = 9 // IFLA_TUN_NUM_DISABLED_QUEUES
	nlaTypeMask          = 0x3fff
	nlaHeader, nlaAligns = 4, 4
)

// kernelQueues returns how many queues an interface of several queues has, in use or not and whoever holds
// them. TUNSETIFF refuses what somebody else holds only where there is a single queue.
func kernelQueues(name string) (int, error) {
	rib, err := syscall.NetlinkRIB(unix.RTM_GETLINK, unix.AF_UNSPEC)
	if err != nil {
		return 0, err
	}
	msgs, err := syscall.ParseNetlinkMessage(rib)
	if err != nil {
		return 0, err
	}
	for i := range msgs {
		if msgs[i].Header.Type != unix.RTM_NEWLINK {
			continue
		}
		as, err := syscall.ParseNetlinkRouteAttr(&msgs[i])
		if err != nil {
			return 0, err
		}
		var info []byte
		found := false
		for _, a := range as {
			switch a.Attr.Type & nlaTypeMask {
			case unix.IFLA_IFNAME:
				found = unix.ByteSliceToString(a.Value) == name
			case iflaLinkInfo:
				info = a.Value
			}
		}
		if !found {
			continue
		}
		n := 0
		eachAttr(info, func(typ uint16, v []byte) {
			if typ != iflaInfoData {
				return
			}
			eachAttr(v, func(typ uint16, v []byte) {
				if (typ == iflaTunQueues || typ == iflaTunDisabled) && len(v) >= 4 {
					var w uint32
					copy((*[4]byte)(unsafe.Pointer(&w))[:], v)
					n += int(w)
				}
			})
		})
		return n, nil
	}
	return 0, fmt.Errorf("tunbridge: interface %q: the kernel does not list it", name)
}

// eachAttr calls f for each netlink attribute in b, in the machine's byte order.
func eachAttr(b []byte, f func(typ uint16, v []byte)) {
	for len(b) >= nlaHeader {
		var h [2]uint16 // length, type
		copy((*[4]byte)(unsafe.Pointer(&h))[:], b)
		n := int(h[0])
		if n < nlaHeader || n > len(b) {
			return
		}
		f(h[1]&nlaTypeMask, b[nlaHeader:n])
		if n = (n + nlaAligns - 1) &^ (nlaAligns - 1); n > len(b) {
			return
		}
		b = b[n:]
	}
}
