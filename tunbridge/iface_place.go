package tunbridge

import (
	"errors"
	"fmt"
	"runtime"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// An interface can be renamed, moved to another network namespace and removed while its descriptor is
// open. The descriptor follows the device; names, indices and the control socket do not. So each request that goes by
// name is preceded by locate, which asks the descriptor for the name and the namespace of the moment.
//
// Nothing refers to another namespace than the own one for longer than a request takes: a container that ends takes its
// namespace, and the interface in it, along.

// ErrElsewhere is behind errors about an interface that was moved to a network namespace that this
// program may not enter. Frames and the carrier still work there; requests by name do not.
var ErrElsewhere = errors.New("the interface is in another network namespace, which this program may not enter (CAP_SYS_ADMIN and CAP_NET_ADMIN there)")

// ErrInUse is behind refusals to make an interface again while loops still use the removed one.
var ErrInUse = errors.New("the interface's loops have not ended yet")

// netnsID identifies a network namespace while it exists; the zero value is an unknown one.
type netnsID struct{ dev, ino uint64 }

// statNetns returns the identity of the namespace that fd refers to.
func statNetns(fd int) (netnsID, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return netnsID{}, err
	}
	return netnsID{uint64(st.Dev), st.Ino}, nil
}

// openThreadNetns opens the network namespace of the calling thread. The caller closes fd. Without /proc it
// returns -1 and the unknown namespace.
func openThreadNetns() (fd int, id netnsID) {
	fd, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, netnsID{}
	}
	if id, err = statNetns(fd); err != nil {
		unix.Close(fd)
		return -1, netnsID{}
	}
	return fd, id
}

// inNetns runs f on a thread in the namespace that fd refers to. A thread that does not find its way
// back ends with its goroutine.
func inNetns(fd int, f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, _ := openThreadNetns()
		if home < 0 {
			done <- errors.New("the thread's network namespace cannot be opened: /proc is missing")
			runtime.UnlockOSThread()
			return
		}
		defer unix.Close(home)
		err := unix.Setns(fd, unix.CLONE_NEWNET)
		if err == nil {
			err = f()
		}
		if unix.Setns(home, unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
		done <- err
	}()
	return <-done
}

// place is where an interface is, as its first queue knows it. Iface.mu guards it.
type place struct {
	home   int     // the namespace that Open was called in, -1 if unknown
	homeID netnsID // of home
	id     netnsID // the namespace that it is in, as it was known last, and that of the control socket
	seen   netnsID // without /proc, where the interface was first
	left   bool    // the kernel told that the interface left that namespace
}

// locate makes the control socket one of the interface's namespace and learns the interface's name and
// index. It returns an error matching ErrGone, or ErrElsewhere, in which case nothing may be asked by name. mu is held.
func (it *Iface) locate() error {
	if it.fd < 0 {
		return ErrClosed
	}
	if err := it.refresh(); err != nil {
		return err
	}
	fd, err := tunNetns(it.fd)
	if err != nil {
		// Not permitted, or a kernel older than 5.5.
		return it.compare()
	}
	defer unix.Close(fd)
	id, err := statNetns(fd)
	if err != nil {
		return it.failed("stat its network namespace", err)
	}
	if it.at.id == (netnsID{}) { // no /proc: nothing can follow it
		if it.at.seen == (netnsID{}) {
			it.at.seen = id
		}
		if it.at.seen != id {
			return fmt.Errorf("tunbridge: interface %q: %w (/proc is missing)", it.name, ErrElsewhere)
		}
	} else if id != it.at.id || it.ctl < 0 {
		var ctl int
		err := inNetns(fd, func() (err error) {
			ctl, err = controlSocket()
			return err
		})
		if err != nil {
			return fmt.Errorf("tunbridge: interface %q: %w (%v)", it.name, ErrElsewhere, err)
		}
		it.closeControl()
		it.ctl, it.at.id, it.at.left = ctl, id, false
	}
	r := newIfreq(it.name)
	if err := ioctlIfreq(it.ctl, unix.SIOCGIFINDEX, r); err != nil {
		return it.failed("SIOCGIFINDEX", err)
	}
	it.setIndex(int(*r.i32()))
	return nil
}

// leave ends a request: the control socket is kept at home only. mu is held.
func (it *Iface) leave() {
	if it.at.id != it.at.homeID {
		it.closeControl()
	}
}

func (it *Iface) closeControl() {
	if it.ctl >= 0 {
		unix.Close(it.ctl)
		it.ctl = -1
	}
}

// tunNetns opens the network namespace of the interface behind a tun descriptor.
func tunNetns(fd int) (int, error) {
	for {
		n, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TUNGETDEVNETNS, 0)
		switch e {
		case 0:
			unix.CloseOnExec(int(n))
			return int(n), nil
		case unix.EINTR:
		default:
			return -1, e
		}
	}
}

// compare finds out without TUNGETDEVNETNS whether the interface is in the control socket's
// namespace: the interface that has its index there must have its name, its driver and its MAC address, and the kernel
// must not have told that it left. mu is held.
func (it *Iface) compare() error {
	elsewhere := fmt.Errorf("tunbridge: interface %q: %w", it.name, ErrElsewhere)
	if it.at.left {
		return elsewhere
	}
	r := newIfreq("")
	*r.i32() = int32(it.Index())
	if ioctlIfreq(it.ctl, unix.SIOCGIFNAME, r) != nil || r.ifName() != it.name {
		return elsewhere
	}
	if info, err := unix.IoctlGetEthtoolDrvinfo(it.ctl, it.name); err == nil && unix.ByteSliceToString(info.Driver[:]) != "tun" {
		return elsewhere
	}
	if it.typ == TAP {
		there, own := newIfreq(it.name), newIfreq("")
		if ioctlIfreq(it.ctl, unix.SIOCGIFHWADDR, there) != nil || ioctlIfreq(it.fd, unix.SIOCGIFHWADDR, own) != nil || there.mac() != own.mac() {
			return elsewhere
		}
	}
	return nil
}

// refresh asks for the current name: somebody may have renamed the interface, or removed it. mu is held.
func (it *Iface) refresh() error {
	var r ifreq
	if err := ioctlIfreq(it.fd, unix.TUNGETIFF, &r); err != nil {
		return it.failed("TUNGETIFF", err)
	}
	it.name = r.ifName()
	return nil
}

// setIndex notes the index for all queues.
func (it *Iface) setIndex(n int) {
	for _, q := range it.first.queues {
		atomic.StoreInt32(&q.index, int32(n))
	}
}

// maxRenames bounds how often a request is repeated because the interface was renamed or moved meanwhile.
const maxRenames = 3

// ask runs a request that reads by name, with the interface located, until neither name nor namespace changed
// meanwhile. mu is held.
func (it *Iface) ask(f func() error) error {
	var err error
	for i := 0; i < maxRenames; i++ {
		if err = it.locate(); err != nil {
			return err
		}
		name, id := it.name, it.at.id
		err = f()
		if lerr := it.locate(); lerr != nil {
			return lerr
		}
		if it.name == name && it.at.id == id {
			return err
		}
	}
	if err == nil {
		err = it.failed("it is renamed again and again", unix.EAGAIN)
	}
	return err
}

// InNamespace runs f on a thread in the interface's network namespace, with its name and index there. What f starts on
// other goroutines is not in that namespace. Errors match ErrGone where the interface was removed, ErrElsewhere where the namespace
// may not be entered; else they are f's.
func (it *Iface) InNamespace(f func(name string, index int) error) error {
	it = it.first
	it.mu.Lock()
	err := it.locate()
	it.leave()
	name, index, id := it.name, it.Index(), it.at.id
	fd := -1
	if err == nil {
		fd = it.openNetns()
	}
	it.mu.Unlock()
	if err != nil {
		return err
	}
	if fd >= 0 {
		defer unix.Close(fd)
	}
	cur, here := openThreadNetns()
	if cur >= 0 {
		unix.Close(cur)
	}
	if here == id || fd < 0 && id == (netnsID{}) {
		return f(name, index)
	}
	if fd < 0 {
		return fmt.Errorf("tunbridge: interface %q: %w", name, ErrElsewhere)
	}
	entered := false
	err = inNetns(fd, func() error {
		entered = true
		return f(name, index)
	})
	if err != nil && !entered {
		return fmt.Errorf("tunbridge: interface %q: %w (%v)", name, ErrElsewhere, err)
	}
	return err
}

// openNetns returns a descriptor of the namespace that the interface is in, -1 if there is none to be
// had. The caller closes it. mu is held.
func (it *Iface) openNetns() int {
	if fd, err := tunNetns(it.fd); err == nil {
		return fd
	}
	if it.at.home < 0 || it.at.homeID != it.at.id {
		return -1
	}
	fd, err := unix.FcntlInt(uintptr(it.at.home), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return -1
	}
	return fd
}
