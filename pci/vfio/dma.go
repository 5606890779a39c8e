package vfio

import (
	"sort"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/pci"
)

// MapDMA implements pci.Function.
func (f *function) MapDMA(m mmio.RAM, access pci.DMAAccess) (dma.Addr, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return 0, pci.ErrClosed
	}
	at, err := f.g.mapDMA(f.info.Address, m, access, f.opt.DMAMask)
	if err == nil {
		f.maps[at] = true
	}
	return at, err
}

// UnmapDMA implements pci.Function.
func (f *function) UnmapDMA(at dma.Addr) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return pci.ErrClosed
	}
	return f.unmapDMA(at)
}

func (f *function) unmapDMA(at dma.Addr) error {
	if !f.maps[at] {
		return f.fail(pci.Other, nil, "no DMA map of it starts at %#x", uint64(at))
	}
	if err := f.g.unmapDMA(f.info.Address, at); err != nil {
		return err
	}
	delete(f.maps, at)
	return nil
}

// DMAMaps implements pci.Function. Functions that share an IOMMU group reach each other's
// memory, so the maps of the group are what it tells.
func (f *function) DMAMaps() []pci.DMAMap {
	f.g.mu.Lock()
	defer f.g.mu.Unlock()
	l := make([]pci.DMAMap, 0, len(f.g.maps))
	for _, m := range f.g.maps {
		l = append(l, m.DMAMap)
	}
	sort.Slice(l, func(i, j int) bool { return l[i].Addr < l[j].Addr })
	return l
}

// IOMMU implements pci.IOMMUTeller.
func (f *function) IOMMU() string {
	switch f.g.iommu {
	case iommuType1:
		return "type 1"
	case iommuType1v2:
		return "type 1 v2"
	case iommuSpapr:
		return "sPAPR TCE"
	case iommuSpaprV2:
		return "sPAPR TCE v2"
	}
	return "none"
}

// DMAAvail implements pci.DMACounter.
func (f *function) DMAAvail() (uint32, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return 0, false
	}
	return f.g.dmaAvail()
}
