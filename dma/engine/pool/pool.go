// Package pool gives host memory to DMA engines: locked, in huge pages where there are any, mapped for the device, within the
// addresses that the engine reaches, and taken back in the order that leaves the device nothing to write to.
//
// In the room: the memory and its mapping. Never in it: how a device's IOMMU is programmed (the owner passes
// functions in), what lies in the memory.
package pool

import (
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
)

// HugePage is the size of the huge pages that are asked for, in bytes: the smallest of x86, arm64 with 4 KiB pages, and riscv64. Where the
// kernel's default differs, small pages are used.
const HugePage = 2 << 20

// Config describes a pool.
type Config struct {
	Name string // of its region, for errors and status
	// Size in bytes; it is rounded up to whole pages.
	Size uint64
	// Link is the link address that stands for the memory. It must not overlap other regions.
	Link dma.Addr
	// Mask is the highest bus address that the engine reaches; 0 is no limit.
	Mask uint64
	// NoHuge does not ask for huge pages.
	NoHuge bool
	// Map makes the memory reachable for the device and returns its bus address; Unmap takes that back: after it the
	// device cannot reach the memory. With pci.Function: its MapDMA and UnmapDMA. Both nil: no device is involved.
	Map   func(mmio.RAM) (dma.Addr, error)
	Unmap func(dma.Addr) error
}

// Pool is host memory for DMA. Its methods may be called from any goroutine.
type Pool struct {
	*dma.Allocator // of the link addresses
	c              Config
	region         dma.Region
	bus            uint64
	huge           bool
	mu             sync.Mutex
	mem            []byte
	mapped         bool
}

// New makes a pool. When it fails nothing is left behind.
func New(c Config) (*Pool, error) {
	if c.Size == 0 || c.Size > 1<<40 || (c.Map == nil) != (c.Unmap == nil) {
		return nil, fmt.Errorf("pool %s: %d bytes, or a mapping without its reverse", c.Name, c.Size)
	}
	p := &Pool{c: c}
	if err := p.alloc(); err != nil {
		return nil, err
	}
	size := uint64(len(p.mem))
	if uint64(c.Link)+size-1 < uint64(c.Link) {
		p.Close()
		return nil, fmt.Errorf("pool %s: %#x bytes at link address %#x pass the end of the address space", c.Name, size, uint64(c.Link))
	}
	m := mmio.FromBytes(p.mem)
	if c.Map != nil {
		ram, _ := m.RAM()
		at, err := c.Map(ram)
		if err != nil {
			p.Close()
			return nil, fmt.Errorf("pool %s: map %#x bytes for the device: %w", c.Name, size, err)
		}
		p.bus, p.mapped = uint64(at), true
		if c.Mask != 0 && (p.bus > c.Mask || size-1 > c.Mask-p.bus) {
			err := fmt.Errorf("pool %s: %#x bytes at bus address %#x: the engine reaches %#x: open the function with that DMA mask", c.Name, size, p.bus, c.Mask)
			if cerr := p.Close(); cerr != nil {
				err = fmt.Errorf("%w; and %v", err, cerr)
			}
			return nil, err
		}
	}
	p.region = dma.Region{Name: c.Name, Addr: c.Link, Mem: m, Access: dma.DeviceRead | dma.DeviceWrite}
	p.Allocator = dma.NewAllocator(c.Link, size)
	return p, nil
}

// alloc takes the memory and locks it. It is not passed on to child processes: the device would go on with the
// pages that only one of both has.
func (p *Pool) alloc() error {
	const prot, flags = unix.PROT_READ | unix.PROT_WRITE, unix.MAP_PRIVATE | unix.MAP_ANONYMOUS | unix.MAP_POPULATE
	if !p.c.NoHuge && p.c.Size >= HugePage/2 {
		n := (p.c.Size + HugePage - 1) &^ (HugePage - 1)
		if b, err := unix.Mmap(-1, 0, int(n), prot, flags|unix.MAP_HUGETLB); err == nil {
			p.mem, p.huge = b, true
		}
	}
	if p.mem == nil {
		page := uint64(unix.Getpagesize())
		n := (p.c.Size + page - 1) &^ (page - 1)
		b, err := unix.Mmap(-1, 0, int(n), prot, flags)
		if err != nil {
			return fmt.Errorf("pool %s: %d bytes: %w", p.c.Name, n, err)
		}
		p.mem = b
		if err := unix.Mlock(b); err != nil {
			p.Close()
			return fmt.Errorf("pool %s: lock %d bytes: %w: raise the limit (ulimit -l), or run as root", p.c.Name, n, err)
		}
	}
	if err := unix.Madvise(p.mem, unix.MADV_DONTFORK); err != nil {
		p.Close()
		return fmt.Errorf("pool %s: keep %d bytes from child processes: %w", p.c.Name, len(p.mem), err)
	}
	return nil
}

// Region is the memory, all of it.
func (p *Pool) Region() *dma.Region { return &p.region }

// Bus is the bus address of its first byte; 0 where it is not mapped for a device.
func (p *Pool) Bus() uint64 { return p.bus }

// Huge tells that it consists of huge pages.
func (p *Pool) Huge() bool { return p.huge }

// Take returns n bytes at a multiple of align, as Alloc does, as a span.
func (p *Pool) Take(n uint32, align uint64) (dma.Span, error) {
	a, err := p.Alloc(uint64(n), align)
	if err != nil {
		return dma.Span{}, fmt.Errorf("pool %s: %w", p.c.Name, err)
	}
	return dma.Span{Region: &p.region, Off: uint64(a - p.region.Addr), Len: n}, nil
}

// Close takes the memory away from the device and gives it back. Close the engine first. Where the device
// cannot be kept from it, or the engine is a runaway (dma.ErrRunaway: call Abandon), the memory stays. A second Close does
// nothing. The kernel does the same for a process that dies.
func (p *Pool) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.mem == nil {
		return nil
	}
	if p.mapped {
		if err := p.c.Unmap(dma.Addr(p.bus)); err != nil {
			return fmt.Errorf("pool %s: unmap bus address %#x: %w; the memory stays", p.c.Name, p.bus, err)
		}
		p.mapped = false
	}
	mem := p.mem
	p.mem = nil
	if err := unix.Munmap(mem); err != nil {
		return fmt.Errorf("pool %s: %w", p.c.Name, err)
	}
	return nil
}

// ErrAbandoned is what Abandon returns.
var ErrAbandoned = errors.New("memory stays, as a device may still write it")

// Abandon is Close for memory that a device may still access without an IOMMU in between: it stays until the process ends.
func (p *Pool) Abandon() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.mem == nil {
		return nil
	}
	n := len(p.mem)
	p.mem = nil
	return fmt.Errorf("pool %s: %d bytes: %w", p.c.Name, n, ErrAbandoned)
}
