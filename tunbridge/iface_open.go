package tunbridge

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/songgao/water"
	"golang.org/x/sys/unix"
)

// Open creates the interface that cfg describes in the calling thread's network namespace, or
// attaches to it. The interface comes up without carrier and without offload, and with
// nothing to read, whoever used it before: call SetCarrier when there is a peer. What the
// user can mend is a *ConfigError. After an error nothing is left behind.
func Open(cfg Config) (*Iface, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	ctl, err := controlSocket()
	if err != nil {
		return nil, fmt.Errorf("tunbridge: interface %q: control socket: %w", cfg.Name, err)
	}
	it := &Iface{fd: -1, ctl: ctl, typ: cfg.Type, cfg: cfg}
	it.at.home, it.at.homeID = openThreadNetns()
	it.at.id = it.at.homeID
	it.first, it.queues, it.inUse = it, []*Iface{it}, 1
	if err := it.open(cfg); err != nil {
		it.Close()
		return nil, err
	}
	return it, nil
}

func (it *Iface) open(cfg Config) error {
	if cfg.Name != "" {
		it.attached = ioctlIfreq(it.ctl, unix.SIOCGIFINDEX, newIfreq(cfg.Name)) == nil
	}
	if cfg.Offload {
		if err := it.openVnet(cfg); err != nil {
			return err
		}
	}
	if it.fd < 0 {
		if err := it.openPlain(cfg); err != nil {
			return err
		}
	}
	if err := it.openQueues(cfg); err != nil {
		return err
	}

	// The carrier waits for the peer. What a former owner left queued may be made for
	// other offloads than ours: it goes. The order matters, the queue is emptied when
	// nothing of that kind can come in any more.
	if err := ioctlSetInt(it.fd, unix.TUNSETCARRIER, 0); err != nil {
		it.warn("the kernel cannot switch the carrier (%v): the interface shows it always on", err)
	}
	if err := ioctlValue(it.fd, unix.TUNSETOFFLOAD, 0); err != nil {
		return it.failed("TUNSETOFFLOAD 0", err)
	}
	it.drain()

	r := newIfreq(it.name)
	if err := ioctlIfreq(it.ctl, unix.SIOCGIFINDEX, r); err != nil {
		return it.failed("SIOCGIFINDEX", err)
	}
	it.setIndex(int(*r.i32()))
	it.made = it.name
	if err := it.getMTU(); err != nil {
		return it.failed("SIOCGIFMTU", err)
	}
	if it.typ == TAP {
		if err := it.getMAC(); err != nil {
			return it.failed("SIOCGIFHWADDR", err)
		}
	}
	if cfg.MTU != 0 {
		if err := it.tolerate(it.setMTU(cfg.MTU), "its MTU stays %d, %d was asked for: run \"ip link set dev %s mtu %d\" as root", it.mtu, cfg.MTU, it.name, cfg.MTU); err != nil {
			return err
		}
	}
	if cfg.MAC != (MAC{}) {
		if err := it.tolerate(it.setMAC(cfg.MAC), "its MAC address stays %v, %v was asked for: run \"ip link set dev %s address %v\" as root", it.mac, cfg.MAC, it.name, cfg.MAC); err != nil {
			return err
		}
	}
	// Last of all: what fails before leaves no interface behind.
	if cfg.Persist {
		if err := ioctlValue(it.fd, unix.TUNSETPERSIST, 1); err != nil {
			return it.failed("TUNSETPERSIST", err)
		}
	}
	return nil
}

// openVnet opens the device in vnet mode. It leaves fd at -1, with a warning, where the
// kernel lacks a part of it.
func (it *Iface) openVnet(cfg Config) error {
	fd, err := openTun(cfg.Name)
	if err != nil {
		return err
	}
	// A negative fd tells the deferred function that it has changed hands.
	defer func() {
		if fd >= 0 {
			unix.Close(fd)
		}
	}()

	if f, err := ioctlGetInt(fd, unix.TUNGETFEATURES); err != nil || f&unix.IFF_VNET_HDR == 0 {
		it.warn("no offload: the kernel's tun driver has no IFF_VNET_HDR")
		return nil
	}
	name, err := it.setiff(fd, cfg, unix.IFF_VNET_HDR)
	if err != nil {
		return err
	}
	r := new(ifreq)

	if err := ioctlSetInt(fd, unix.TUNSETVNETHDRSZ, HeaderLen); err != nil {
		it.warn("no offload: the kernel cannot set the header's length (TUNSETVNETHDRSZ: %v)", err)
		return nil
	}
	leErr := ioctlSetInt(fd, unix.TUNSETVNETLE, 1)
	if leErr != nil && !littleEndian() {
		it.warn("no offload: the kernel cannot set the header's byte order (TUNSETVNETLE: %v)", leErr)
		return nil
	}
	// Read back: a wrong header would garble every frame.
	n, err1 := ioctlGetInt(fd, unix.TUNGETVNETHDRSZ)
	le, err2 := ioctlGetInt(fd, unix.TUNGETVNETLE)
	if leErr != nil {
		le, err2 = 1, nil // before Linux 3.19 the header is in the machine's byte order
	}
	ierr := ioctlIfreq(fd, unix.TUNGETIFF, r)
	if err1 != nil || err2 != nil || ierr != nil || n != HeaderLen || le != 1 || *r.u16()&unix.IFF_VNET_HDR == 0 {
		return configError(name, nil, "the interface keeps its own header settings (length %d, little-endian %d, flags %#x): remove it with \"ip link del %s\" and start again", n, le, *r.u16(), name)
	}
	for _, o := range [...]Offload{offloadAll, offloadAll &^ (OffloadUSO4 | OffloadUSO6), OffloadCSUM} {
		if ioctlValue(fd, unix.TUNSETOFFLOAD, o.tunFlags()) == nil {
			it.supported = o
			break
		}
	}
	if it.supported&OffloadUSO4 == 0 {
		it.warn("no UDP segmentation offload: the kernel is older than 6.2")
	}
	it.fd, it.name, it.hdrLen = fd, name, HeaderLen
	fd = -1
	return nil
}

// openPlain opens the device through the water package, unless it has several queues: water's has
// one. water opens without O_CLOEXEC and leaks its descriptor where TUNSETIFF fails, so everything that can fail is tried
// before it, and fork is held off until the descriptor is ours.
func (it *Iface) openPlain(cfg Config) error {
	if done, err := it.tryPlain(cfg); done || err != nil {
		return err
	}
	wc := water.Config{DeviceType: water.TAP}
	if cfg.Type == TUN {
		wc.DeviceType = water.TUN
	}
	wc.Name = cfg.Name
	wc.Persist = it.attached // water always sets or clears it; ours is set last

	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	w, err := water.New(wc)
	if err != nil {
		return setiffError(it.ctl, cfg.Name, cfg.Type, err)
	}
	defer w.Close()
	sc, ok := w.ReadWriteCloser.(syscall.Conn)
	if !ok {
		return fmt.Errorf("tunbridge: interface %q: the water package hides its descriptor", cfg.Name)
	}
	rc, err := sc.SyscallConn()
	if err != nil {
		return it.failed("SyscallConn", err)
	}
	var dupErr error
	err = rc.Control(func(fd uintptr) {
		it.fd, dupErr = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 3)
	})
	if err == nil {
		err = dupErr
	}
	if err != nil {
		it.fd = -1
		return it.failed("dup", err)
	}
	it.name = w.Name()
	// O_NONBLOCK belongs to the open file, so it came with the dup; not to depend on water:
	if err := unix.SetNonblock(it.fd, true); err != nil {
		return it.failed("O_NONBLOCK", err)
	}
	return nil
}

// tryPlain finds out whether water would succeed, without creating an interface: it
// attaches to an existing one and lets go of it; without one, TUNSETIFF with no type
// answers EPERM to those who must not create it and EINVAL to the others. A device of several queues
// it opens for good, which done tells.
func (it *Iface) tryPlain(cfg Config) (done bool, err error) {
	fd, err := openTun(cfg.Name)
	if err != nil {
		return false, err
	}
	defer func() {
		if !done {
			unix.Close(fd)
		}
	}()
	if it.attached || cfg.Queues > 1 {
		name, err := it.setiff(fd, cfg, 0)
		if err == nil && it.multi {
			it.fd, it.name, done = fd, name, true
		}
		return done, err
	}
	r := newIfreq(cfg.Name)
	*r.u16() = unix.IFF_NO_PI
	if err := ioctlIfreq(fd, unix.TUNSETIFF, r); err != nil && err != unix.EINVAL {
		return false, setiffError(it.ctl, cfg.Name, cfg.Type, err)
	}
	return false, nil
}

// openTun opens the clone device.
func openTun(name string) (int, error) {
	for {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		switch err {
		case nil:
			return fd, nil
		case unix.EINTR:
			continue
		case unix.ENOENT, unix.ENXIO, unix.ENODEV, unix.ENOTDIR:
			return -1, configError(name, err, "there is no /dev/net/tun: load the kernel's tun driver (modprobe tun) or give the container the device")
		case unix.EACCES, unix.EPERM:
			return -1, configError(name, err, "no permission to open /dev/net/tun: run as root, or open the device to this user (chmod 0666 /dev/net/tun)")
		}
		return -1, fmt.Errorf("tunbridge: interface %q: open /dev/net/tun: %w", name, err)
	}
}

// checkKind reports an existing interface that is not of type t; TUNSETIFF says no more than
// EINVAL of it.
func checkKind(ctl int, name string, t LinkType) error {
	info, err := unix.IoctlGetEthtoolDrvinfo(ctl, name)
	if err != nil {
		if err == unix.EOPNOTSUPP { // every tun driver tells
			return configError(name, nil, "there is such an interface already, and it is neither a tap nor a tun: choose another name")
		}
		if err == unix.EPERM {
			return nil // cannot tell
		}
		if err == unix.ENODEV {
			return nil // gone meanwhile
		}
		return fmt.Errorf("tunbridge: interface %q: SIOCETHTOOL: %w", name, err)
	}
	driver := unix.ByteSliceToString(info.Driver[:])
	kind := unix.ByteSliceToString(info.Bus_info[:])
	if driver != "tun" {
		return configError(name, nil, "there is such an interface already, and its driver is %s: choose another name", driver)
	}
	if kind != t.String() {
		return configError(name, nil, "there is such an interface already, a %s and not a %v: choose another name or type, or remove it (ip link del %s)", kind, t, name)
	}
	return nil
}

// setiffError explains a refusal of TUNSETIFF.
func setiffError(ctl int, name string, t LinkType, err error) error {
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return fmt.Errorf("tunbridge: interface %q: %w", name, err)
	}
	switch errno {
	case unix.EPERM:
		return configError(name, errno, "not permitted to create or use a %v: CAP_NET_ADMIN is missing in this network namespace (run as root, or setcap cap_net_admin+ep)", t)
	case unix.EBUSY:
		return configError(name, errno, "another process holds the interface: stop it, or choose another name")
	case unix.EINVAL:
		if name != "" && ioctlIfreq(ctl, unix.SIOCGIFINDEX, newIfreq(name)) == nil {
			if err := checkKind(ctl, name, t); err != nil {
				return err
			}
			return configError(name, errno, "there is such an interface already, and it is not a %v that can be attached to: choose another name, or remove it (ip link del %s)", t, name)
		}
		return configError(name, errno, "the kernel refuses the interface's name or type (%v)", t)
	}
	return fmt.Errorf("tunbridge: interface %q: TUNSETIFF: %w", name, errno)
}

// Remove removes a persistent tap or tun interface of the calling thread's network
// namespace that nobody holds. An error for which errors.Is(err, os.ErrNotExist) holds
// says that there is none of that name.
func Remove(name string) error {
	if err := checkName(name); err != nil {
		return err
	}
	ctl, err := controlSocket()
	if err != nil {
		return fmt.Errorf("tunbridge: interface %q: control socket: %w", name, err)
	}
	defer unix.Close(ctl)
	if ioctlIfreq(ctl, unix.SIOCGIFINDEX, newIfreq(name)) != nil {
		return configError(name, os.ErrNotExist, "there is no such interface")
	}
	var first error
	for _, f := range [...]uint16{unix.IFF_TAP, unix.IFF_TUN, unix.IFF_TAP | unix.IFF_MULTI_QUEUE, unix.IFF_TUN | unix.IFF_MULTI_QUEUE} {
		t := TAP
		if f&unix.IFF_TUN != 0 {
			t = TUN
		}
		fd, err := openTun(name)
		if err != nil {
			return err
		}
		r := newIfreq(name)
		*r.u16() = f | unix.IFF_NO_PI | iffNoCarrier
		if err = ioctlIfreq(fd, unix.TUNSETIFF, r); err == nil {
			if n, qerr := kernelQueues(name); f&unix.IFF_MULTI_QUEUE != 0 && qerr == nil && n > 1 {
				unix.Close(fd)
				return setiffError(ctl, name, t, unix.EBUSY)
			}
			err = ioctlValue(fd, unix.TUNSETPERSIST, 0)
			unix.Close(fd)
			if err != nil {
				return fmt.Errorf("tunbridge: interface %q: TUNSETPERSIST 0: %w", name, err)
			}
			return nil
		}
		unix.Close(fd)
		if err != unix.EINVAL {
			return setiffError(ctl, name, t, err)
		}
		if first == nil {
			first = err
		}
	}
	if info, err := unix.IoctlGetEthtoolDrvinfo(ctl, name); err == nil {
		if driver := unix.ByteSliceToString(info.Driver[:]); driver != "tun" {
			return configError(name, first, "the interface is not a tap or tun (its driver is %s): it is left alone", driver)
		}
	}
	return configError(name, first, "the interface is not a tap or tun that can be attached to: it is left alone (ip link del %s removes it)", name)
}
