//go:build linux

package models

import (
	"encoding/binary"
	"fmt"
	"sort"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/pci"
)

// FunctionConfig describes a PCI function.
type FunctionConfig struct {
	Vendor, Device uint16
	Revision       uint8
	Mode           pci.Mode // VFIO where empty
	BARs           []BARConfig
	// Line is its INTx; nil: none. Vectors is how many MSI-X messages it has, which win.
	Line    *Line
	Vectors int
}

// BARConfig is one BAR.
type BARConfig struct {
	Index    int
	Size     uint64
	Prefetch bool
	Bus      mmio.Bus
}

// Function is a pci.Function over models.
type Function struct {
	cfg    FunctionConfig
	info   pci.Info
	events chan struct{}
	pulled uint32 // atomic

	mu      sync.Mutex
	gone    error
	vectors []*doorbell.Eventfd
	kinds   map[int]mmio.Kind
	enabled int
	master  bool
	closed  bool
	raised  []uint64 // messages for each vector
	next    dma.Addr
	maps    map[dma.Addr]dmaMap
}

type dmaMap struct {
	m      mmio.RAM
	access pci.DMAAccess
}

var _ pci.Function = (*Function)(nil)

// NewFunction makes a function. The models behind it stay the caller's.
func NewFunction(c FunctionConfig) *Function {
	if c.Mode == pci.Auto {
		c.Mode = pci.VFIO
	}
	f := &Function{cfg: c, events: make(chan struct{}, 1), kinds: map[int]mmio.Kind{}, maps: map[dma.Addr]dmaMap{}, next: 0x1000_0000,
		raised: make([]uint64, c.Vectors)}
	cfg := make([]byte, 256)
	binary.LittleEndian.PutUint16(cfg[pci.RegVendor:], c.Vendor)
	binary.LittleEndian.PutUint16(cfg[pci.RegDevice:], c.Device)
	cfg[pci.RegRevision] = c.Revision
	f.info = pci.Info{Address: pci.Address{Bus: 1}, Vendor: c.Vendor, Device: c.Device, Revision: c.Revision, NUMANode: -1, Config: cfg}
	if c.Vectors > 0 {
		f.info.MSIX = &pci.MSIXCap{Vectors: c.Vectors}
	}
	for _, b := range c.BARs {
		f.info.BARs = append(f.info.BARs, pci.BAR{Index: b.Index, Start: 0x8000_0000 + uint64(b.Index)<<28, Size: b.Size, Prefetch: b.Prefetch})
	}
	return f
}

// In makes the function one that was opened in that mode, before it is used.
func (f *Function) In(m pci.Mode) *Function {
	f.cfg.Mode = m
	return f
}

// Pull takes the function out of its slot: nobody answers, and Gone tells. Plug puts a
// closed one back.
func (f *Function) Pull() {
	atomic.StoreUint32(&f.pulled, 1)
	f.mu.Lock()
	f.gone = &pci.Error{Problem: pci.Gone, Spec: f.info.Address.String(), Reason: "was pulled"}
	f.mu.Unlock()
	select {
	case f.events <- struct{}{}:
	default:
	}
}

// Open makes a function that was closed ready to be opened anew. It fails with an error that matches
// pci.ErrAbsent while it is pulled, and pci.ErrBusy while it is open.
func (f *Function) Open() (*Function, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.gone != nil {
		return nil, &pci.Error{Problem: pci.Absent, Spec: f.info.Address.String(), Reason: "is not there"}
	}
	n := NewFunction(f.cfg)
	return n, nil
}

// Raise sends message v, as a function does that writes to its MSI-X address. Without bus mastering, or
// where the vector is not enabled, it goes nowhere.
func (f *Function) Raise(v int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if v < f.enabled && v < len(f.vectors) && f.master && atomic.LoadUint32(&f.pulled) == 0 {
		f.raised[v]++
		f.vectors[v].Ring()
	}
}

// Raised returns how many messages of each vector arrived.
func (f *Function) Raised() []uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]uint64(nil), f.raised...)
}

// DMA returns n bytes of the carrier's memory at a bus address, as the board reaches them: one access at a
// time, as on the bus.
func (f *Function) DMA(addr dma.Addr, n uint64, access pci.DMAAccess) (mmio.Mem, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.master {
		return mmio.Mem{}, fmt.Errorf("models: DMA to %#x without bus mastering", uint64(addr))
	}
	for a, m := range f.maps {
		if addr >= a && uint64(addr-a) < m.m.Size() && m.access&access == access {
			// Not as RAM: accesses of one word must stay one.
			return mmio.NewMem(unsafe.Pointer(&m.m.Bytes()[0]), m.m.Size(), mmio.Uncached).Slice(uint64(addr-a), n)
		}
	}
	return mmio.Mem{}, fmt.Errorf("models: DMA (%s) to %#x, %#x bytes: not mapped", access, uint64(addr), n)
}

// Burst returns n bytes of the carrier's memory at a bus address, as a DMA engine of the board reaches them; nil where it does not.
func (f *Function) Burst(addr dma.Addr, n uint64, access pci.DMAAccess) []byte {
	f.mu.Lock()
	defer f.mu.Unlock()
	for a, m := range f.maps {
		if off := uint64(addr - a); f.master && addr >= a && off < m.m.Size() && n <= m.m.Size()-off && m.access&access == access {
			return m.m.Bytes()[off : off+n]
		}
	}
	return nil
}

// BusMaster tells whether it may master the bus.
func (f *Function) BusMaster() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.master
}

// String implements pci.Function.
func (f *Function) String() string { return f.info.Address.String() + " (model)" }

// Mode implements pci.Function.
func (f *Function) Mode() pci.Mode { return f.cfg.Mode }

// Info implements pci.Function.
func (f *Function) Info() *pci.Info { return &f.info }

// ReadConfig implements pci.Function.
func (f *Function) ReadConfig(off, width int) (uint32, error) {
	if off < 0 || off%width != 0 || off+width > len(f.info.Config) {
		return 0, fmt.Errorf("models: configuration space at %#x, %d bytes", off, width)
	}
	if atomic.LoadUint32(&f.pulled) != 0 {
		return uint32(ones(uint(width))), nil
	}
	var b [4]byte
	copy(b[:], f.info.Config[off:off+width])
	if f.BusMaster() && off == pci.RegCommand {
		b[0] |= pci.CommandBusMaster
	}
	return binary.LittleEndian.Uint32(b[:]), nil
}

// WriteConfig implements pci.Function: there is nothing to be written.
func (f *Function) WriteConfig(off, width int, v uint32) error { return nil }

// MapBAR implements pci.Function.
func (f *Function) MapBAR(i int, want mmio.Kind) (*pci.Mapping, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return nil, pci.ErrClosed
	}
	for n, b := range f.cfg.BARs {
		if b.Index != i {
			continue
		}
		kind, ok := f.kinds[i]
		if !ok {
			kind = mmio.Uncached
			if want == mmio.WriteCombining && b.Prefetch {
				kind = want
			}
			f.kinds[i] = kind
		}
		return &pci.Mapping{BAR: f.info.BARs[n], Areas: []pci.Area{{Mem: mmio.NewBusMem(&slot{f, b.Bus}, b.Size, kind)}}}, nil
	}
	return nil, &pci.Error{Problem: pci.NoBAR, Spec: f.info.Address.String(), Reason: fmt.Sprintf("has no BAR %d", i)}
}

// slot is the bus as long as the function is plugged in.
type slot struct {
	f *Function
	b mmio.Bus
}

func (s *slot) Load(off uint64, width uint) uint64 {
	if atomic.LoadUint32(&s.f.pulled) != 0 {
		return ones(width)
	}
	return s.b.Load(off, width)
}

func (s *slot) Store(off uint64, width uint, v uint64) {
	if atomic.LoadUint32(&s.f.pulled) == 0 {
		s.b.Store(off, width, v)
	}
}

func (s *slot) Barrier(b mmio.Barrier) { s.b.Barrier(b) }

// Interrupts implements pci.Function.
func (f *Function) Interrupts() pci.Interrupts {
	switch {
	case f.cfg.Vectors > 0:
		return pci.Interrupts{Kind: pci.MSIX, Count: f.cfg.Vectors}
	case f.cfg.Line != nil:
		return pci.Interrupts{Kind: pci.INTx, Count: 1}
	}
	return pci.Interrupts{}
}

// EnableInterrupts implements pci.Function.
func (f *Function) EnableInterrupts(n int) ([]pci.Waiter, error) {
	if have := f.Interrupts(); n < 1 || n > have.Count {
		return nil, &pci.Error{Problem: pci.NoInterrupt, Spec: f.info.Address.String(), Reason: fmt.Sprintf("has no %d interrupts but %d", n, have.Count)}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.enabled = n
	if f.cfg.Vectors == 0 {
		return []pci.Waiter{f.cfg.Line}, nil
	}
	f.master = true
	var ws []pci.Waiter
	for len(f.vectors) < n {
		e, err := doorbell.NewEventfd()
		if err != nil {
			return nil, err
		}
		f.vectors = append(f.vectors, e)
	}
	for _, e := range f.vectors[:n] {
		ws = append(ws, e)
	}
	return ws, nil
}

// DisableInterrupts implements pci.Function.
func (f *Function) DisableInterrupts() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.enabled = 0
	return nil
}

// SetBusMaster implements pci.Function.
func (f *Function) SetBusMaster(on bool) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.master = on
	return nil
}

// MapDMA implements pci.Function.
func (f *Function) MapDMA(m mmio.RAM, access pci.DMAAccess) (dma.Addr, error) {
	if f.cfg.Mode != pci.VFIO {
		return 0, &pci.Error{Problem: pci.NoDMA, Spec: f.info.Address.String(), Reason: "no IOMMU"}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	page := uint64(unix.Getpagesize())
	if m.Size()%page != 0 || uint64(uintptr(unsafe.Pointer(&m.Bytes()[0])))%page != 0 {
		return 0, fmt.Errorf("models: DMA map of %#x bytes that are no whole pages", m.Size())
	}
	a := f.next
	f.next += dma.Addr(m.Size() + page) // a hole behind each
	f.maps[a] = dmaMap{m, access}
	return a, nil
}

// UnmapDMA implements pci.Function.
func (f *Function) UnmapDMA(addr dma.Addr) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, ok := f.maps[addr]; !ok {
		return fmt.Errorf("models: no DMA map at %#x", uint64(addr))
	}
	delete(f.maps, addr)
	return nil
}

// DMAMaps implements pci.Function.
func (f *Function) DMAMaps() []pci.DMAMap {
	f.mu.Lock()
	defer f.mu.Unlock()
	var l []pci.DMAMap
	for a, m := range f.maps {
		l = append(l, pci.DMAMap{Addr: a, Size: m.m.Size(), Access: m.access})
	}
	sort.Slice(l, func(i, j int) bool { return l[i].Addr < l[j].Addr })
	return l
}

// Reset implements pci.Function.
func (f *Function) Reset() error { return nil }

// Events implements pci.Function.
func (f *Function) Events() <-chan struct{} { return f.events }

// Gone implements pci.Function.
func (f *Function) Gone() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.gone
}

// Closed tells whether Close came.
func (f *Function) Closed() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.closed
}

// Close implements pci.Function.
func (f *Function) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed, f.enabled, f.master = true, 0, false
	for _, e := range f.vectors {
		e.Close()
	}
	f.vectors = nil
	f.maps = map[dma.Addr]dmaMap{}
	return nil
}
