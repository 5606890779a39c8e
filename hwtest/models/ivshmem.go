//go:build linux

package models

import (
	"sync"
	"sync/atomic"

	"github.com/boardlink/boardlink/board/ivshmem"
	"github.com/boardlink/boardlink/mmio"
)

// Ivshmem is shared memory behind two or more ivshmem devices (QEMU, docs/specs/ivshmem-spec.rst), joined by a
// server that never fails.
type Ivshmem struct {
	rings uint64 // atomic, first for its alignment: doorbell registers written
	lost  uint64 // atomic: of these, for nobody

	faults
	Mem *Memory

	mu    sync.Mutex
	peers map[uint32]*ivshmemPeer
}

type ivshmemPeer struct {
	s       *Ivshmem
	id      uint32
	vectors int
	f       *Function
}

// NewIvshmem makes size bytes of shared memory. Close it.
func NewIvshmem(size uint64) (*Ivshmem, error) {
	m, err := NewMemory(size, 1, 2, 4, 8)
	if err != nil {
		return nil, err
	}
	return &Ivshmem{Mem: m, peers: map[uint32]*ivshmemPeer{}}, nil
}

// Function plugs in the device of peer id, with that many MSI-X vectors (0: ivshmem-plain, whose id reads as 0). It
// takes the place of an earlier one of that number.
func (s *Ivshmem) Function(id uint32, vectors int) *Function {
	p := &ivshmemPeer{s: s, id: id, vectors: vectors}
	p.f = NewFunction(FunctionConfig{Vendor: ivshmem.Vendor, Device: ivshmem.Device, Revision: ivshmem.Revision, Vectors: vectors,
		BARs: []BARConfig{{Index: 0, Size: 256, Bus: p}, {Index: 2, Size: s.Mem.dev.Size(), Prefetch: true, Bus: s.Mem}}})
	s.mu.Lock()
	defer s.mu.Unlock()
	s.peers[id] = p
	return p.f
}

// Rings returns how often a doorbell register was written, and how often for nobody.
func (s *Ivshmem) Rings() (rings, lost uint64) {
	return atomic.LoadUint64(&s.rings), atomic.LoadUint64(&s.lost)
}

// Err returns nil, or what was misused.
func (s *Ivshmem) Err() error {
	if err := s.faults.Err(); err != nil {
		return err
	}
	return s.Mem.Err()
}

// Close gives the memory back.
func (s *Ivshmem) Close() error { return s.Mem.Close() }

// Load implements mmio.Bus: BAR 0.
func (p *ivshmemPeer) Load(off uint64, width uint) uint64 {
	if width != 4 || off&3 != 0 {
		p.s.add("BAR 0: load of %d bytes at %#x", width, off)
		return ones(width)
	}
	if off == 8 {
		return uint64(p.id)
	}
	return 0
}

// Store implements mmio.Bus.
func (p *ivshmemPeer) Store(off uint64, width uint, v uint64) {
	if width != 4 || off != 12 || p.vectors == 0 {
		p.s.add("BAR 0: store of %#x, %d bytes at %#x", v, width, off)
		return
	}
	atomic.AddUint64(&p.s.rings, 1)
	p.s.mu.Lock()
	to := p.s.peers[uint32(v)>>16]
	p.s.mu.Unlock()
	if to == nil || int(v&0xffff) >= to.vectors {
		atomic.AddUint64(&p.s.lost, 1)
		return
	}
	to.f.Raise(int(v & 0xffff))
}

// Barrier implements mmio.Bus.
func (p *ivshmemPeer) Barrier(mmio.Barrier) {}
