package driver

import (
	"errors"
	"fmt"

	"github.com/boardlink/boardlink/dma"
)

// Memory is a device's part of a region.
type Memory struct {
	Region *dma.Region
	Alloc  *dma.Allocator
}

// Share returns part index of a region that so many devices share equally, but for its last kept bytes.
func Share(r *dma.Region, kept uint64, index, devices int) *Memory {
	n := (r.Mem.Size() - kept) / uint64(devices) &^ 4095
	return &Memory{Region: r, Alloc: dma.NewAllocator(r.Addr+dma.Addr(uint64(index)*n), n)}
}

// Kept returns n bytes of a region, of which the last one is followed by behind more.
func Kept(r *dma.Region, behind, n uint64) *Memory {
	return &Memory{Region: r, Alloc: dma.NewAllocator(r.Addr+dma.Addr(r.Mem.Size()-behind-n), n)}
}

// Small is a Driver that needs little memory, and gets a part of its own instead of one of those that the others share equally.
type Small interface {
	// Memory returns how many bytes of each kind of memory the driver can use, a multiple of 4096: 4096, or at most an eighth of
	// size.
	Memory(size uint64) uint64
}

// Take allocates n bytes and returns them as a span; name is for the error.
func (m *Memory) Take(name string, n, align uint64) (dma.Span, error) {
	a, err := m.Alloc.Alloc(n, align)
	if err != nil {
		return dma.Span{}, fmt.Errorf("%s: %s memory: %w: use a larger window, fewer devices, fewer queue pairs or smaller queues", name, m.Region.Name, err)
	}
	return dma.Span{Region: m.Region, Off: uint64(a - m.Region.Addr), Len: uint32(n)}, nil
}

// Layout is where a device's rings and buffers go: each near its reader ("read locally, write
// remotely"). In placement window both are the same memory of the board.
type Layout struct {
	Near *Memory // of the board: what the host writes (device areas, receive buffers)
	Far  *Memory // what the host reads (descriptor and driver areas, transmit buffers)

	Devices int // that share the memory
}

// Push tells whether the placement is push.
func (m Layout) Push() bool { return m.Near != m.Far }

// String says how much of the memory is free.
func (m Layout) String() string {
	if !m.Push() {
		return fmt.Sprintf("%d bytes of the window", m.Near.Alloc.FreeBytes())
	}
	return fmt.Sprintf("%d bytes of the window and %d of the host's pool", m.Near.Alloc.FreeBytes(), m.Far.Alloc.FreeBytes())
}

// ErrNoShare: all memory that devices may have is in use.
var ErrNoShare = errors.New("no memory is left for a further device")

// Shares says which device has which part of memory that is divided equally, while devices come and go.
type Shares struct {
	taken []bool
	free  int
}

// NewShares divides memory into n parts, 1 <= n.
func NewShares(n int) *Shares { return &Shares{taken: make([]bool, n), free: n} }

// Len returns the number of parts.
func (s *Shares) Len() int { return len(s.taken) }

// Free returns how many parts nobody has.
func (s *Shares) Free() int { return s.free }

// Take hands out the first part that is free, by its index (see Share). The error is ErrNoShare.
func (s *Shares) Take() (index int, err error) {
	for i, t := range s.taken {
		if !t {
			s.taken[i] = true
			s.free--
			return i, nil
		}
	}
	return 0, fmt.Errorf("%w: %d devices share it", ErrNoShare, len(s.taken))
}

// Give takes a part back, whose device does not use it any more: neither this side's driver nor the other side.
func (s *Shares) Give(index int) {
	if s.taken[index] {
		s.taken[index] = false
		s.free++
	}
}
