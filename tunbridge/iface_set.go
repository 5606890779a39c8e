package tunbridge

import (
	"fmt"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// MTU returns the interface's MTU in bytes, as it is now; as it was known last where it cannot be asked.
func (it *Iface) MTU() int {
	it = it.first
	it.mu.Lock()
	defer it.mu.Unlock()
	defer it.leave()
	_ = it.ask(it.getMTU) // else what we knew
	return it.mtu
}

// KnownMTU returns the MTU in bytes as it was seen last, without a system call: by MTU, SetMTU, State or, soon after
// a change, by Watch.
func (it *Iface) KnownMTU() int { return int(atomic.LoadInt32(&it.first.known)) }

// recentMTU returns the MTU in bytes, for loops: with a Watch without a system call or a lock.
func (it *Iface) recentMTU() int {
	if it = it.first; atomic.LoadInt32(&it.watched) != 0 {
		return it.KnownMTU()
	}
	return it.MTU()
}

func (it *Iface) getMTU() error {
	r := newIfreq(it.name)
	err := ioctlIfreq(it.ctl, unix.SIOCGIFMTU, r)
	if err == nil {
		it.noteMTU(int(*r.i32()))
	}
	return err
}

func (it *Iface) noteMTU(mtu int) {
	it.mtu = mtu
	atomic.StoreInt32(&it.known, int32(mtu))
}

// SetMTU sets the MTU, in bytes.
func (it *Iface) SetMTU(mtu int) error {
	it = it.first
	it.mu.Lock()
	defer it.mu.Unlock()
	defer it.leave()
	if it.fd < 0 {
		return ErrClosed
	}
	if err := checkMTU(it.name, it.typ, mtu); err != nil {
		return err
	}
	if err := it.ask(it.getMTU); err != nil {
		return err
	}
	return it.setMTU(mtu)
}

func (it *Iface) setMTU(mtu int) error {
	if mtu == it.mtu {
		return nil // needs no privilege then
	}
	r := newIfreq(it.name)
	*r.i32() = int32(mtu)
	if err := ioctlIfreq(it.ctl, unix.SIOCSIFMTU, r); err != nil {
		if err == unix.EPERM {
			return configError(it.name, err, "not permitted to set the MTU: CAP_NET_ADMIN is missing")
		}
		return it.failed(fmt.Sprintf("set MTU %d", mtu), err)
	}
	it.noteMTU(mtu)
	return nil
}

// MAC returns the address of a TAP, as it is now; zero for a TUN.
func (it *Iface) MAC() MAC {
	it = it.first
	it.mu.Lock()
	defer it.mu.Unlock()
	if it.typ == TAP && it.fd >= 0 {
		_ = it.getMAC() // else what we knew
	}
	return it.mac
}

func (it *Iface) getMAC() error {
	r := newIfreq("") // the tun device answers for its own interface
	err := ioctlIfreq(it.fd, unix.SIOCGIFHWADDR, r)
	if err == nil {
		it.mac = r.mac()
	}
	return err
}

// SetMAC sets the address of a TAP.
func (it *Iface) SetMAC(m MAC) error {
	it = it.first
	it.mu.Lock()
	defer it.mu.Unlock()
	defer it.leave()
	if it.fd < 0 {
		return ErrClosed
	}
	if err := checkMAC(it.name, it.typ, m); err != nil {
		return err
	}
	if err := it.getMAC(); err != nil {
		return it.failed("SIOCGIFHWADDR", err)
	}
	return it.setMAC(m)
}

func (it *Iface) setMAC(m MAC) error {
	if m == it.mac {
		return nil // needs no privilege then
	}
	// By the descriptor: it goes to the device wherever that is, and needs no privilege.
	r := newIfreq("")
	*r.u16() = arphrdEther
	copy(r.hwaddr()[2:], m[:])
	err := ioctlIfreq(it.fd, unix.SIOCSIFHWADDR, r)
	if err == unix.EBUSY {
		// A kernel that cannot change it while the interface is up.
		if err = it.locate(); err == nil {
			err = it.setUp(false)
		}
		if err == nil {
			err = ioctlIfreq(it.fd, unix.SIOCSIFHWADDR, r)
			if uerr := it.setUp(true); err == nil {
				err = uerr
			}
		}
	}
	if err != nil {
		if err == unix.EPERM {
			return configError(it.name, err, "not permitted to set the MAC address: CAP_NET_ADMIN is missing")
		}
		return it.failed("set MAC "+m.String(), err)
	}
	it.mac = m
	return nil
}

// SetUp sets the interface up or down. Down loses its IPv6 addresses.
func (it *Iface) SetUp(up bool) error {
	it = it.first
	it.mu.Lock()
	defer it.mu.Unlock()
	defer it.leave()
	if it.fd < 0 {
		return ErrClosed
	}
	if err := it.locate(); err != nil {
		return err
	}
	if err := it.setUp(up); err != nil {
		if err == unix.EPERM {
			return configError(it.name, err, "not permitted to set the interface up or down: CAP_NET_ADMIN is missing")
		}
		return it.failed("SIOCSIFFLAGS", err)
	}
	return nil
}

func (it *Iface) setUp(up bool) error {
	r := newIfreq(it.name)
	if err := ioctlIfreq(it.ctl, unix.SIOCGIFFLAGS, r); err != nil {
		return err
	}
	if up == (*r.u16()&unix.IFF_UP != 0) {
		return nil
	}
	*r.u16() ^= unix.IFF_UP
	return ioctlIfreq(it.ctl, unix.SIOCSIFFLAGS, r)
}
