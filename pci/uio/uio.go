// Package uio opens PCI functions without VFIO: bound to uio_pci_generic, which gives their INTx, or bound to no
// driver at all, where sysfs gives the BARs and the program polls. Importing it registers the modes
// "uio" and "sysfs" with package pci.
//
// In the room: /dev/uioN, the files config, enable, resourceN and resourceN_wc of sysfs
// (Documentation/driver-api/uio-howto.rst, Documentation/PCI/sysfs-pci.rst). Never in it: what a BAR's
// registers mean; other ways to a function.
//
// Nothing confines a function that is opened this way, and there are no DMA maps: bus addresses would be
// physical ones. It needs root. Unlike VFIO, the kernel does not reset the function when the process dies;
// uio_pci_generic at least turns bus mastering off.
package uio

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/pci"
	"github.com/boardlink/boardlink/pci/internal/access"
)

func init() {
	pci.Register(pci.UIO, Open)
	pci.Register(pci.SysfsOnly, Open)
}

// Driver is the driver of the kernel that mode UIO needs.
const Driver = "uio_pci_generic"

// function is a pci.Function.
type function struct {
	info    *pci.Info
	opt     pci.Options
	config  access.Config
	master  access.Master
	enabled bool   // by us, in mode sysfs
	uio     int    // /dev/uioN, -1 in mode sysfs
	event   string // sysfs file that counts its interrupts since it was bound
	irq     bool   // the driver found an interrupt
	bars    access.BARs
	watch   *access.Watch

	mu     sync.Mutex // also: read-modify-write of the command register
	closed bool
	armed  bool
}

// checkEvery is how often a function is asked whether it is there: nobody reports it.
const checkEvery = 200 * time.Millisecond

// Open opens the function in mode UIO, for which it must be bound to uio_pci_generic, or SysfsOnly, for which
// it must be bound to no driver that uses it: pci.Open makes sure. Errors are *pci.Error as a rule.
func Open(info *pci.Info, o pci.Options) (pci.Function, error) {
	f := &function{info: info, opt: o, uio: -1}
	f.config.FD = -1
	if err := f.open(); err != nil {
		f.release()
		return nil, err
	}
	return f, nil
}

func (f *function) fail(p pci.Problem, err error, format string, args ...interface{}) error {
	e := &pci.Error{Problem: p, Spec: f.info.Address.String(), Reason: fmt.Sprintf(format, args...), Err: err}
	if p == pci.Other && (errors.Is(err, os.ErrPermission)) {
		e.Problem, e.Mend = pci.Permission, "run it as root"
	}
	return e
}

func (f *function) open() error {
	s, a := f.opt.Sysfs, f.info.Address
	name := filepath.Join(s.Dir(a), "config")
	fd, err := unix.Open(name, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err == unix.EACCES {
		return s.NotAllowed(f.info, f.opt.Mode, err)
	}
	if err != nil {
		return f.fail(pci.Other, err, "cannot open %s", name)
	}
	f.config.Addr, f.config.FD, f.config.Size = a, fd, 256
	f.master.Config, f.master.Log = &f.config, func(format string, args ...interface{}) {
		f.logf("%s: %s", f, fmt.Sprintf(format, args...))
	}
	if n := len(f.info.Config); n > 256 {
		f.config.Size = uint64(n)
	}
	// VFIO's group keeps other processes out; here a lock does, among those who ask for it.
	if err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if err == unix.EWOULDBLOCK {
			return pci.Held(f.info, f.opt.Mode, pci.Holders(name))
		}
		return f.fail(pci.Other, err, "cannot lock %s", name)
	}
	if f.opt.Mode == pci.UIO {
		if err := f.openUIO(); err != nil {
			return err
		}
	} else if !f.info.Enabled {
		if err := os.WriteFile(filepath.Join(s.Dir(a), "enable"), []byte("1\n"), 0); err != nil {
			return f.fail(pci.Other, err, "cannot be enabled")
		}
		f.enabled = true
	}
	if err := f.config.SetCommand(pci.CommandMemory, pci.CommandBusMaster); err != nil {
		return err
	}
	f.watch, err = access.NewWatch(checkEvery, func() error {
		if err := s.Check(a); err != nil {
			return err
		}
		return f.master.Look()
	})
	if err != nil {
		return err
	}
	f.watch.Start()
	return nil
}

// openUIO finds the number that the driver gave the function, and opens its device.
func (f *function) openUIO() error {
	l, err := os.ReadDir(filepath.Join(f.opt.Sysfs.Dir(f.info.Address), "uio"))
	name := ""
	for _, e := range l {
		if strings.HasPrefix(e.Name(), "uio") {
			name = "/dev/" + e.Name()
			f.event = filepath.Join(f.opt.Sysfs.Dir(f.info.Address), "uio", e.Name(), "event")
		}
	}
	if name == "" {
		return f.fail(pci.Other, err, "the driver %s gave it no device", Driver)
	}
	if f.uio, err = unix.Open(name, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0); err != nil {
		f.uio = -1
		return f.fail(pci.Other, err, "cannot open %s", name)
	}
	// Without an interrupt poll(2) says so at once: uio_poll returns an error.
	p := []unix.PollFd{{Fd: int32(f.uio), Events: unix.POLLIN}}
	for {
		_, err = unix.Poll(p, 0)
		if err != unix.EINTR {
			break
		}
	}
	f.irq = err == nil && p[0].Revents&(unix.POLLERR|unix.POLLNVAL|unix.POLLHUP) == 0
	return nil
}

// String implements pci.Function.
func (f *function) String() string { return fmt.Sprintf("%s (%s)", f.info.Address, f.opt.Mode) }

// Mode implements pci.Function.
func (f *function) Mode() pci.Mode { return f.opt.Mode }

// Info implements pci.Function.
func (f *function) Info() *pci.Info { return f.info }

// ReadConfig implements pci.Function.
func (f *function) ReadConfig(off, width int) (uint32, error) { return f.config.Read(off, width) }

// WriteConfig implements pci.Function.
func (f *function) WriteConfig(off, width int, v uint32) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.config.Write(off, width, v)
}

// SetBusMaster implements pci.Function.
func (f *function) SetBusMaster(on bool) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return pci.ErrClosed
	}
	return f.master.Set(on)
}

// Counters implements pci.CounterTeller.
func (f *function) Counters() pci.Counters { return f.master.Counters() }

// MapBAR implements pci.Function. The page of an MSI-X table is not kept back: nobody uses the table.
func (f *function) MapBAR(i int, want mmio.Kind) (*pci.Mapping, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return nil, pci.ErrClosed
	}
	if m := f.bars.Get(i); m != nil {
		return m, nil
	}
	b, err := f.info.Usable(i)
	if err != nil {
		return nil, err
	}
	s, a := f.opt.Sysfs, f.info.Address
	if b.IO {
		fd, err := unix.Open(access.ResourcePath(s, a, i, false), unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, f.fail(pci.Other, err, "BAR %d (I/O ports) cannot be opened", i)
		}
		m := f.bars.AddSyscalls(b, fd, 0)
		f.bars.Own(fd)
		return m, nil
	}
	if want == mmio.WriteCombining {
		if b.Prefetch {
			m, err := f.bars.AddFile(a, b, access.ResourcePath(s, a, i, true), mmio.WriteCombining)
			if err == nil {
				return m, nil
			}
			f.logf("%s: BAR %d is mapped uncached, not write-combining: %v", f, i, err)
		} else {
			f.logf("%s: BAR %d is mapped uncached, not write-combining: it is not prefetchable", f, i)
		}
	}
	return f.bars.AddFile(a, b, access.ResourcePath(s, a, i, false), mmio.Uncached)
}

// Interrupts implements pci.Function.
func (f *function) Interrupts() pci.Interrupts {
	if f.irq && (f.opt.Interrupts == pci.NoInterrupts || f.opt.Interrupts == pci.INTx) {
		return pci.Interrupts{Kind: pci.INTx, Count: 1}
	}
	return pci.Interrupts{}
}

// waiter is the INTx. The driver masks it in the command register when it came.
type waiter struct {
	f    *function
	last uint32 // count of the last read; Ack belongs to one goroutine, as sleeping does
}

// FD implements pci.Waiter.
func (w *waiter) FD() int { return w.f.uio }

// Ack implements pci.Waiter.
func (w *waiter) Ack() (uint64, error) {
	n, err := w.take()
	if err != nil || n == 0 {
		return n, err
	}
	return n, w.f.unmask()
}

// take reads how many interrupts came since the last time.
func (w *waiter) take() (uint64, error) {
	var count uint32
	for {
		n, _, e := unix.Syscall(unix.SYS_READ, uintptr(w.f.uio), uintptr(unsafe.Pointer(&count)), 4)
		switch {
		case e == unix.EINTR:
			continue
		case e == unix.EAGAIN:
			return 0, nil
		case e == unix.EIO, e == unix.ENODEV:
			return 0, &pci.Error{Problem: pci.Gone, Spec: w.f.info.Address.String(), Reason: "its driver let it go", Err: e}
		case e != 0:
			return 0, fmt.Errorf("pci function %s: reading its interrupt: %w", w.f, e)
		case n != 4:
			return 0, fmt.Errorf("pci function %s: reading its interrupt gave %d bytes of 4", w.f, n)
		}
		rings := uint64(count - w.last) // it wraps
		w.last = count
		return rings, nil
	}
}

// unmask lets the line interrupt again: clears Interrupt Disable, as uio-howto.rst asks for.
func (f *function) unmask() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed || !f.armed {
		return pci.ErrClosed
	}
	return f.config.SetCommand(0, pci.CommandINTxDisable)
}

// EnableInterrupts implements pci.Function.
func (f *function) EnableInterrupts(n int) ([]pci.Waiter, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return nil, pci.ErrClosed
	}
	if n != 1 || f.Interrupts().Count == 0 {
		e := &pci.Error{Problem: pci.NoInterrupt, Spec: f.info.Address.String(), Reason: fmt.Sprintf("has no %d interrupts in mode %s", n, f.opt.Mode)}
		if f.opt.Mode == pci.UIO && !f.irq {
			e.Reason += ": it has no INTx"
			e.Mend = "poll, or use vfio-pci, which knows MSI"
		} else if !f.irq {
			e.Mend = "poll, or bind it to vfio-pci"
		}
		return nil, e
	}
	w := &waiter{f: f}
	// What came before nobody waits for.
	if _, err := w.take(); err != nil {
		return nil, err
	}
	// Reads give the count since the driver was bound, but only once it has changed since /dev/uioN was opened.
	b, err := os.ReadFile(f.event)
	if err != nil {
		return nil, f.fail(pci.Other, err, "its interrupts cannot be counted")
	}
	count, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 32)
	if err != nil {
		return nil, f.fail(pci.Other, err, "its interrupts cannot be counted")
	}
	w.last = uint32(count)
	if err := f.config.SetCommand(0, pci.CommandINTxDisable); err != nil {
		return nil, err
	}
	f.armed = true
	return []pci.Waiter{w}, nil
}

// DisableInterrupts implements pci.Function.
func (f *function) DisableInterrupts() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return pci.ErrClosed
	}
	return f.disable()
}

func (f *function) disable() error {
	if !f.armed {
		return nil
	}
	f.armed = false
	return f.config.SetCommand(pci.CommandINTxDisable, 0)
}

func (f *function) noDMA() error {
	return &pci.Error{
		Problem: pci.NoDMA, Spec: f.info.Address.String(), Reason: fmt.Sprintf("no memory can be mapped for it in mode %s", f.opt.Mode),
		Mend: "bind it to vfio-pci behind an IOMMU, or use a placement in the board's window",
	}
}

// MapDMA implements pci.Function: it always fails.
func (f *function) MapDMA(mmio.RAM, pci.DMAAccess) (dma.Addr, error) { return 0, f.noDMA() }

// UnmapDMA implements pci.Function: it always fails.
func (f *function) UnmapDMA(dma.Addr) error { return f.noDMA() }

// DMAMaps implements pci.Function.
func (f *function) DMAMaps() []pci.DMAMap { return nil }

// Reset implements pci.Function.
func (f *function) Reset() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return pci.ErrClosed
	}
	return f.watch.Quiet(func() error {
		if err := f.opt.Sysfs.Reset(f.info.Address); err != nil {
			return err
		}
		return f.config.SetCommand(pci.CommandMemory, 0)
	})
}

func (f *function) logf(format string, args ...interface{}) {
	if f.opt.Logf != nil {
		f.opt.Logf(format, args...)
	}
}

// Events implements pci.Function.
func (f *function) Events() <-chan struct{} { return f.watch.Events() }

// Gone implements pci.Function.
func (f *function) Gone() error {
	err := f.watch.Check()
	if err != nil && !errors.Is(err, pci.ErrGone) {
		return nil // it could not be asked: no reason to give it up
	}
	return err
}

// Close implements pci.Function.
func (f *function) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return nil
	}
	f.closed = true
	return f.release()
}

func (f *function) release() error {
	if f.watch != nil {
		f.watch.Close()
		// Both fail on a function that is gone, which is as good.
		f.master.Set(false)
		f.disable()
	}
	err := f.bars.Close()
	if f.uio >= 0 {
		unix.Close(f.uio)
		f.uio = -1
	}
	if f.enabled {
		os.WriteFile(filepath.Join(f.opt.Sysfs.Dir(f.info.Address), "enable"), []byte("0\n"), 0)
	}
	if f.config.FD >= 0 {
		unix.Close(f.config.FD)
		f.config.FD = -1
	}
	return err
}
