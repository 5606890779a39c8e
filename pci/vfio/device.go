package vfio

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/pci"
	"github.com/boardlink/boardlink/pci/internal/access"
	"github.com/boardlink/boardlink/pci/internal/evfd"
)

func init() {
	pci.Register(pci.VFIO, Open)
	pci.Register(pci.VFIONoIOMMU, Open)
}

// function is a pci.Function.
type function struct {
	info   *pci.Info
	opt    pci.Options
	g      *group
	fd     int
	flags  uint32 // of the device
	config access.Config
	master access.Master
	irqs   [irqReq + 1]irqInfo
	bars   access.BARs
	watch  *access.Watch

	mu      sync.Mutex
	closed  bool
	kind    pci.InterruptKind // enabled
	waiters []evfd.FD
	maps    map[dma.Addr]bool

	requested uint32 // the kernel wants the function back
	erred     uint32 // the bus reported an error that was not corrected
}

// checkEvery is how often a function that nobody reports lost is asked whether it is there.
const checkEvery = 500 * time.Millisecond

// Open opens the function, which must be bound to vfio-pci and in a group of the kind that the mode, VFIO or
// VFIONoIOMMU, is for: pci.Open makes sure. Errors are *pci.Error as a rule.
func Open(info *pci.Info, o pci.Options) (pci.Function, error) {
	g, err := openGroup(info, o)
	if err != nil {
		return nil, err
	}
	f := &function{info: info, opt: o, g: g, fd: -1, maps: map[dma.Addr]bool{}}
	if err := f.open(); err != nil {
		f.release()
		return nil, err
	}
	return f, nil
}

func (f *function) fail(p pci.Problem, err error, format string, args ...interface{}) error {
	return &pci.Error{Problem: p, Spec: f.info.Address.String(), Reason: fmt.Sprintf(format, args...), Err: err}
}

func (f *function) open() error {
	name, err := unix.BytePtrFromString(f.info.Address.String())
	if err != nil {
		return err
	}
	if f.fd, err = ioctlPtr(f.g.fd, reqGroupGetDevice, unsafe.Pointer(name)); err != nil {
		f.fd = -1
		if err == unix.EBUSY {
			return f.fail(pci.Busy, err, "is open already")
		}
		return f.fail(pci.Other, err, "cannot be opened through its IOMMU group %s", f.info.IOMMUGroup)
	}
	unix.CloseOnExec(f.fd)
	di := deviceInfo{argsz: uint32(unsafe.Sizeof(deviceInfo{}))}
	if _, err := ioctlPtr(f.fd, reqDeviceGetInfo, unsafe.Pointer(&di)); err != nil {
		return f.fail(pci.Other, err, "VFIO gives no information about it")
	}
	if di.flags&devicePCI == 0 || di.regions <= regionConfig {
		return f.fail(pci.Other, nil, "is not a PCI function for VFIO (flags %#x, %d regions)", di.flags, di.regions)
	}
	f.flags = di.flags
	r, _, err := f.region(regionConfig)
	if err != nil {
		return err
	}
	f.config.Addr, f.config.FD, f.config.Off, f.config.Size = f.info.Address, f.fd, int64(r.offset), r.size
	f.master.Config, f.master.Log = &f.config, f.eventLogf
	for i := range f.irqs {
		ii := irqInfo{argsz: uint32(unsafe.Sizeof(irqInfo{})), index: uint32(i)}
		if uint32(i) < di.irqs {
			// An index that does not apply (ERR on a plain PCI function) is an error: none.
			if _, err := ioctlPtr(f.fd, reqDeviceGetIRQ, unsafe.Pointer(&ii)); err != nil {
				ii.count = 0
			}
		}
		f.irqs[i] = ii
	}
	f.readConfigSpace()
	if err := f.config.SetCommand(pci.CommandMemory, 0); err != nil {
		return err
	}
	return f.startWatch()
}

// readConfigSpace reads all of it: through VFIO every user may, so that the capabilities are known.
func (f *function) readConfigSpace() {
	size := f.config.Size
	if size > 4096 {
		size = 4096
	}
	b := make([]byte, size)
	for n := 0; n < len(b); {
		k, err := unix.Pread(f.fd, b[n:], f.config.Off+int64(n))
		if err == unix.EINTR {
			continue
		}
		if err != nil || k <= 0 {
			b = b[:n]
			break
		}
		n += k
	}
	if len(b) > len(f.info.Config) {
		if c, err := pci.ParseCapabilities(b); err == nil || len(c.Caps) > len(f.info.Caps) {
			f.info.Config, f.info.Capabilities = b, c
		}
	}
}

// region asks for a region, and which of it can be mapped.
func (f *function) region(index uint32) (regionInfo, []extent, error) {
	size := uint32(unsafe.Sizeof(regionInfo{}))
	for {
		b := infoBuffer(int(size))
		r := (*regionInfo)(unsafe.Pointer(&b[0]))
		r.argsz, r.index = size, index
		if _, err := ioctlPtr(f.fd, reqDeviceGetRegion, unsafe.Pointer(r)); err != nil {
			return regionInfo{}, nil, f.fail(pci.Other, err, "VFIO gives no information about its region %d", index)
		}
		if r.argsz > size && r.argsz < 1<<20 {
			size = r.argsz
			continue
		}
		areas, err := mappable(r, b[:size])
		if err != nil {
			return regionInfo{}, nil, f.fail(pci.Other, err, "its region %d", index)
		}
		return *r, areas, nil
	}
}

// mappable returns the areas of a region that mmap takes. b is the whole info structure.
func mappable(r *regionInfo, b []byte) ([]extent, error) {
	if r.flags&regionMmap == 0 || r.size == 0 {
		return nil, nil
	}
	all := []extent{{0, r.size}}
	if r.flags&regionCaps == 0 {
		return all, nil
	}
	caps, err := capChain(b, r.capOffset)
	if err != nil {
		return nil, err
	}
	for _, c := range caps {
		if c.id == capSparseMmap {
			return parseSparse(c.data, r.size)
		}
	}
	return all, nil
}

// String implements pci.Function.
func (f *function) String() string { return fmt.Sprintf("%s (%s)", f.info.Address, f.opt.Mode) }

// Mode implements pci.Function.
func (f *function) Mode() pci.Mode { return f.opt.Mode }

// Info implements pci.Function.
func (f *function) Info() *pci.Info { return f.info }

// ReadConfig implements pci.Function.
func (f *function) ReadConfig(off, width int) (uint32, error) {
	return f.config.Read(off, width)
}

// WriteConfig implements pci.Function.
func (f *function) WriteConfig(off, width int, v uint32) error {
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

// MapBAR implements pci.Function.
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
	r, areas, err := f.region(uint32(i))
	if err != nil {
		return nil, err
	}
	if r.size == 0 {
		return nil, f.fail(pci.NoBAR, nil, "VFIO has no BAR %d", i)
	}
	b.Size = r.size
	if len(areas) == 0 {
		if r.flags&regionRead == 0 || r.flags&regionWrite == 0 {
			return nil, f.fail(pci.NoBAR, nil, "VFIO gives no access to BAR %d (flags %#x)", i, r.flags)
		}
		return f.bars.AddSyscalls(b, f.fd, int64(r.offset)), nil
	}
	if want == mmio.WriteCombining && b.Prefetch && len(areas) == 1 && areas[0].size == r.size {
		// VFIO itself maps uncached only. The sysfs file is for root, and not on kernels that keep
		// the ranges of bound functions for their drivers (CONFIG_IO_STRICT_DEVMEM).
		m, err := f.bars.AddFile(f.info.Address, b, access.ResourcePath(f.opt.Sysfs, f.info.Address, i, true), mmio.WriteCombining)
		if err == nil {
			return m, nil
		}
		f.logf("%s: BAR %d is mapped uncached, not write-combining: %v", f, i, err)
	}
	l := make([]access.Extent, len(areas))
	for j, a := range areas {
		l[j] = access.Extent{Offset: a.start, Size: a.size}
	}
	return f.bars.Add(f.info.Address, b, f.fd, int64(r.offset), l, mmio.Uncached)
}

// Reset implements pci.Function.
func (f *function) Reset() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return pci.ErrClosed
	}
	if f.flags&deviceReset == 0 {
		return &pci.Error{
			Problem: pci.NoReset, Spec: f.info.Address.String(), Reason: "the kernel knows no way to reset it alone",
			Mend: "close it, remove it and rescan the bus",
		}
	}
	err := f.watch.Quiet(func() error {
		_, err := ioctl(f.fd, reqDeviceReset, 0)
		return err
	})
	if err != nil {
		return f.fail(pci.Other, err, "cannot be reset")
	}
	atomic.StoreUint32(&f.erred, 0)
	// What the reset left of the command register is the kernel's to restore; memory access
	// is what we rely on.
	return f.config.SetCommand(pci.CommandMemory, 0)
}

// startWatch wires the error and the request interrupt and looks after the function.
func (f *function) startWatch() error {
	w, err := access.NewWatch(checkEvery, func() error {
		if err := f.opt.Sysfs.Check(f.info.Address); err != nil {
			return err
		}
		return f.master.Look()
	})
	if err != nil {
		return err
	}
	f.watch = w
	for _, k := range []struct {
		index uint32
		flag  *uint32
		what  string
	}{
		{irqErr, &f.erred, "the bus reports an uncorrected error"},
		{irqReq, &f.requested, "the kernel asks to let the function go: it is being unplugged or unbound"},
	} {
		if f.irqs[k.index].count == 0 {
			continue
		}
		e, err := w.NewEvent(k.flag, f.eventLog(k.what))
		if err != nil {
			return err
		}
		if err := f.setEventfds(k.index, []evfd.FD{e}); err != nil {
			return f.fail(pci.Other, err, "its interrupt index %d cannot be wired", k.index)
		}
	}
	w.Start()
	return nil
}

func (f *function) eventLogf(format string, args ...interface{}) {
	f.logf("%s: %s", f, fmt.Sprintf(format, args...))
}

func (f *function) eventLog(what string) func() {
	return func() { f.logf("%s: %s", f, what) }
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
	if atomic.LoadUint32(&f.requested) != 0 {
		return f.fail(pci.Gone, nil, "is being taken away: unplugged or unbound")
	}
	if atomic.LoadUint32(&f.erred) != 0 {
		return f.fail(pci.Wiped, nil, "the bus reported an uncorrected error")
	}
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

// release takes back what open and the methods built, in the order that leaves the function nothing to
// write to: bus mastering first.
func (f *function) release() error {
	var first error
	keep := func(err error) {
		if err != nil && first == nil {
			first = err
		}
	}
	if f.watch != nil {
		f.watch.Close()
	}
	if f.fd >= 0 && f.config.Size > 0 {
		f.master.Set(false) // fails on a function that is gone, which is as good
		keep(f.disableInterrupts())
	}
	for at := range f.maps {
		keep(f.unmapDMA(at))
	}
	keep(f.bars.Close())
	if f.fd >= 0 {
		unix.Close(f.fd)
		f.fd = -1
	}
	f.g.put(f.info.Address)
	return first
}
