package access

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/pci"
)

// Extent is a piece of a BAR.
type Extent struct{ Offset, Size uint64 }

// BARs are the mapped BARs of a function. The zero value has none. The owner locks it.
type BARs struct {
	maps  [pci.NumBARs]*pci.Mapping
	unmap []func() error
}

// Get returns the mapping of BAR i, nil where there is none.
func (s *BARs) Get(i int) *pci.Mapping {
	if i < 0 || i >= len(s.maps) {
		return nil
	}
	return s.maps[i]
}

// ResourcePath is the sysfs file of a BAR.
func ResourcePath(s pci.Sysfs, a pci.Address, i int, wc bool) string {
	name := fmt.Sprintf("resource%d", i)
	if wc {
		name += "_wc"
	}
	return filepath.Join(s.Dir(a), name)
}

// Add maps the areas of a BAR, which starts at offset off of the file. The kernel rounds the ends up to
// whole pages; only the areas themselves are given out.
func (s *BARs) Add(a pci.Address, b pci.BAR, fd int, off int64, areas []Extent, kind mmio.Kind) (*pci.Mapping, error) {
	page := uint64(os.Getpagesize())
	m := &pci.Mapping{BAR: b}
	var undo []func() error
	fail := func(err error, e Extent) (*pci.Mapping, error) {
		for _, u := range undo {
			u()
		}
		p := &pci.Error{Problem: pci.NoBAR, Spec: a.String(), Reason: fmt.Sprintf("%#x bytes at %#x of BAR %d cannot be mapped", e.Size, e.Offset, b.Index), Err: err}
		switch err {
		case unix.EPERM, unix.EACCES:
			p.Problem, p.Mend = pci.Permission, "run it as root"
		case unix.ENODEV, unix.ENXIO:
			p.Problem = pci.Gone
		}
		return nil, p
	}
	for _, e := range areas {
		// mmap wants whole pages; an area may begin inside one.
		head := (uint64(off) + e.Offset) & (page - 1)
		length := e.Size + head
		if length < e.Size || uint64(int(length)) != length || int(length) < 0 {
			return fail(fmt.Errorf("it is too large for this process"), e)
		}
		data, err := unix.Mmap(fd, off+int64(e.Offset-head), int(length), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			return fail(err, e)
		}
		base := unsafe.Pointer(&data[0])
		release := pci.GuardRange(uintptr(base), length, fmt.Sprintf("%s BAR %d", a, b.Index))
		undo = append(undo, unmapper(data, release))
		m.Areas = append(m.Areas, pci.Area{Offset: e.Offset, Mem: mmio.NewMem(unsafe.Add(base, head), e.Size, kind)})
	}
	s.maps[b.Index] = m
	s.unmap = append(s.unmap, undo...)
	return m, nil
}

func unmapper(data []byte, release func()) func() error {
	return func() error {
		release()
		if err := unix.Munmap(data); err != nil {
			return fmt.Errorf("pci: munmap: %w", err)
		}
		return nil
	}
}

// AddFile maps a whole BAR from a sysfs file. The kernel maps from the page's start, so a BAR
// smaller than a page begins where its address does.
func (s *BARs) AddFile(a pci.Address, b pci.BAR, name string, kind mmio.Kind) (*pci.Mapping, error) {
	fd, err := unix.Open(name, unix.O_RDWR|unix.O_SYNC|unix.O_CLOEXEC, 0)
	if err != nil {
		p := &pci.Error{Problem: pci.NoBAR, Spec: a.String(), Reason: "cannot open " + name, Err: err}
		if err == unix.EACCES || err == unix.EPERM {
			p.Problem, p.Mend = pci.Permission, "run it as root"
		}
		return nil, p
	}
	defer unix.Close(fd)
	page := uint64(os.Getpagesize())
	head := b.Start & (page - 1)
	if head == 0 {
		return s.Add(a, b, fd, 0, []Extent{{0, b.Size}}, kind)
	}
	m, err := s.Add(a, b, fd, 0, []Extent{{0, head + b.Size}}, kind)
	if err != nil {
		return nil, err
	}
	mem, err := m.Areas[0].Mem.Slice(head, b.Size)
	if err != nil {
		return nil, err
	}
	m.Areas[0] = pci.Area{Mem: mem}
	return m, nil
}

// AddSyscalls makes a BAR accessible by reads and writes of a file at off: one that cannot be
// mapped, as I/O ports. fd stays the caller's and open until Close.
func (s *BARs) AddSyscalls(b pci.BAR, fd int, off int64) *pci.Mapping {
	m := &pci.Mapping{BAR: b, Syscalls: true}
	m.Areas = []pci.Area{{Mem: mmio.NewBusMem(&fileBus{fd: fd, off: off}, b.Size, mmio.Uncached)}}
	s.maps[b.Index] = m
	return m
}

// Own makes Close close fd as well.
func (s *BARs) Own(fd int) {
	s.unmap = append(s.unmap, func() error { return unix.Close(fd) })
}

// Close unmaps everything.
func (s *BARs) Close() error {
	var first error
	for _, u := range s.unmap {
		if err := u(); err != nil && first == nil {
			first = err
		}
	}
	*s = BARs{}
	return first
}

// fileBus is a BAR behind pread and pwrite: the kernel makes one access of each, in order.
type fileBus struct {
	fd  int
	off int64
}

// Load implements mmio.Bus. What cannot be read is all-ones, as on the bus.
func (p *fileBus) Load(off uint64, width uint) uint64 {
	if width == 8 {
		return p.Load(off, 4) | p.Load(off+4, 4)<<32
	}
	var b [8]byte
	for {
		n, err := unix.Pread(p.fd, b[:width], p.off+int64(off))
		if err == unix.EINTR {
			continue
		}
		if err != nil || n != int(width) {
			return ^uint64(0) >> (64 - 8*width)
		}
		return binary.LittleEndian.Uint64(b[:])
	}
}

// Store implements mmio.Bus. What cannot be written is lost, as on the bus.
func (p *fileBus) Store(off uint64, width uint, v uint64) {
	if width == 8 {
		p.Store(off, 4, v&0xffffffff)
		p.Store(off+4, 4, v>>32)
		return
	}
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], v)
	for {
		if _, err := unix.Pwrite(p.fd, b[:width], p.off+int64(off)); err != unix.EINTR {
			return
		}
	}
}

// Barrier implements mmio.Bus. The kernel's accessors are ordered among each other; cached memory needs
// the processor's barrier.
func (p *fileBus) Barrier(b mmio.Barrier) { mmio.Fence(mmio.Uncached, b) }
