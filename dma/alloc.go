package dma

import (
	"errors"
	"fmt"
	"sort"
	"sync"
)

var (
	// ErrNoSpace: no hole is large enough.
	ErrNoSpace = errors.New("no space")
	// ErrNotAllocated: the address is not the start of an allocation (any more).
	ErrNotAllocated = errors.New("not allocated")
	// ErrBadRequest: zero size, or an alignment that is not a power of two.
	ErrBadRequest = errors.New("bad size or alignment")
)

// AllocError tells which request an Allocator refused, and why.
type AllocError struct {
	Addr    Addr   // of Free
	Size    uint64 // of Alloc, in bytes
	Align   uint64 // of Alloc, in bytes
	Largest uint64 // the largest hole, in bytes
	Free    uint64 // all holes together, in bytes
	Reason  error  // ErrNoSpace, ErrNotAllocated or ErrBadRequest
}

// Error names the request, the reason and what is left.
func (e *AllocError) Error() string {
	switch e.Reason {
	case ErrNotAllocated:
		return fmt.Sprintf("dma: free of %#x: %v", uint64(e.Addr), e.Reason)
	case ErrNoSpace:
		return fmt.Sprintf("dma: %d bytes aligned to %d: %v (largest hole %d bytes, %d free in all)", e.Size, e.Align, e.Reason, e.Largest, e.Free)
	}
	return fmt.Sprintf("dma: %d bytes aligned to %d: %v", e.Size, e.Align, e.Reason)
}

// Unwrap returns the reason.
func (e *AllocError) Unwrap() error { return e.Reason }

type hole struct{ addr, size uint64 }

// Allocator hands out address ranges of one region, first fit. Its records lie outside
// the region, so that no peer can spoil them. It is for set-up, not for every packet.
// It is safe for concurrent use.
type Allocator struct {
	mu    sync.Mutex
	base  uint64
	size  uint64
	holes []hole            // sorted by address, none empty, none adjacent
	used  map[uint64]uint64 // address to size
}

// NewAllocator manages the size bytes at base. It panics where they pass the end of
// the address space.
func NewAllocator(base Addr, size uint64) *Allocator {
	if size > 0 && uint64(base)+size-1 < uint64(base) {
		panic(fmt.Sprintf("dma: allocator over %#x bytes at %#x passes the end of the address space", size, uint64(base)))
	}
	a := &Allocator{base: uint64(base), size: size}
	a.Reset()
	return a
}

// Reset gives everything back.
func (a *Allocator) Reset() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.used = make(map[uint64]uint64)
	a.holes = a.holes[:0]
	if a.size > 0 {
		a.holes = append(a.holes, hole{a.base, a.size})
	}
}

// Alloc returns the address of n free bytes, a multiple of align (a power of two). It
// fails with an *AllocError.
func (a *Allocator) Alloc(n, align uint64) (Addr, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if n == 0 || align == 0 || align&(align-1) != 0 {
		return 0, &AllocError{Size: n, Align: align, Reason: ErrBadRequest}
	}
	for i, h := range a.holes {
		pad := -h.addr & (align - 1)
		if pad > h.size || n > h.size-pad {
			continue
		}
		front := hole{h.addr, pad}
		back := hole{h.addr + pad + n, h.size - pad - n}
		switch {
		case front.size > 0 && back.size > 0:
			a.holes = append(a.holes, hole{})
			copy(a.holes[i+1:], a.holes[i:])
			a.holes[i], a.holes[i+1] = front, back
		case front.size > 0:
			a.holes[i] = front
		case back.size > 0:
			a.holes[i] = back
		default:
			a.holes = append(a.holes[:i], a.holes[i+1:]...)
		}
		a.used[h.addr+pad] = n
		return Addr(h.addr + pad), nil
	}
	free, largest := a.free()
	return 0, &AllocError{Size: n, Align: align, Largest: largest, Free: free, Reason: ErrNoSpace}
}

// Free gives back what Alloc returned. It fails with an *AllocError where addr is not
// the start of an allocation.
func (a *Allocator) Free(addr Addr) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	at := uint64(addr)
	n, ok := a.used[at]
	if !ok {
		return &AllocError{Addr: addr, Reason: ErrNotAllocated}
	}
	delete(a.used, at)
	i := sort.Search(len(a.holes), func(i int) bool { return a.holes[i].addr > at })
	before := i > 0 && a.holes[i-1].addr+a.holes[i-1].size == at
	after := i < len(a.holes) && at+n == a.holes[i].addr
	switch {
	case before && after:
		a.holes[i-1].size += n + a.holes[i].size
		a.holes = append(a.holes[:i], a.holes[i+1:]...)
	case before:
		a.holes[i-1].size += n
	case after:
		a.holes[i].addr = at
		a.holes[i].size += n
	default:
		a.holes = append(a.holes, hole{})
		copy(a.holes[i+1:], a.holes[i:])
		a.holes[i] = hole{at, n}
	}
	return nil
}

func (a *Allocator) free() (all, largest uint64) {
	for _, h := range a.holes {
		all += h.size
		if h.size > largest {
			largest = h.size
		}
	}
	return all, largest
}

// InUse returns the number of bytes that are allocated.
func (a *Allocator) InUse() uint64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	all, _ := a.free()
	return a.size - all
}

// FreeBytes returns the number of bytes that are not allocated.
func (a *Allocator) FreeBytes() uint64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	all, _ := a.free()
	return all
}

// Largest returns the size of the largest hole in bytes.
func (a *Allocator) Largest() uint64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	_, largest := a.free()
	return largest
}
