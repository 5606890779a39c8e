package vfio

import (
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// sPAPR TCE is the IOMMU of POWER machines, also under a hypervisor (Documentation/driver-api/vfio.rst,
// "PPC64 sPAPR implementation note"). Bus addresses lie in windows: one of 32 bits that the platform
// sets up, and, in version 2, more that the program asks for. In version 1 the container is enabled as a
// whole, which counts the whole window as locked memory; in version 2 the memory is registered piece by
// piece.

// spaprState is what a group with such an IOMMU has beside.
type spaprState struct {
	info    spaprInfo
	enabled bool           // v1
	regs    map[extent]int // v2: registered memory (process addresses), and how many maps use it
	windows int            // v2: created
}

func (g *group) spaprKind() bool { return g.iommu == iommuSpapr || g.iommu == iommuSpaprV2 }

func (g *group) initSpapr() error {
	s := &g.spapr
	s.regs = map[extent]int{}
	s.info.argsz = uint32(unsafe.Sizeof(s.info))
	if _, err := ioctlPtr(g.container, reqIOMMUGetInfo, unsafe.Pointer(&s.info)); err != nil {
		return fmt.Errorf("sPAPR TCE information: %w", err)
	}
	var valid []extent
	if s.info.window32Size > 0 {
		valid = append(valid, extent{uint64(s.info.window32), uint64(s.info.window32Size)})
	}
	var err error
	g.space, err = newIOVASpace(valid, uint64(os.Getpagesize()))
	return err
}

// spaprPrepare makes memory ready to be mapped.
func (g *group) spaprPrepare(vaddr uintptr, size uint64) error {
	s := &g.spapr
	if g.iommu == iommuSpapr {
		if s.enabled {
			return nil
		}
		if _, err := ioctl(g.container, reqIOMMUEnable, 0); err != nil {
			return fmt.Errorf("enabling the container: %w", err)
		}
		s.enabled = true
		return nil
	}
	key := extent{uint64(vaddr), size}
	if s.regs[key] == 0 {
		arg := spaprRegister{argsz: uint32(unsafe.Sizeof(spaprRegister{})), vaddr: uint64(vaddr), size: size}
		if _, err := ioctlPtr(g.container, reqSpaprRegister, unsafe.Pointer(&arg)); err != nil {
			return fmt.Errorf("registering the memory: %w", err)
		}
	}
	s.regs[key]++
	return nil
}

// spaprRelease undoes spaprPrepare for one map; nothing for other IOMMUs.
func (g *group) spaprRelease(vaddr uintptr, size uint64) {
	if g.iommu != iommuSpaprV2 {
		return
	}
	key := extent{uint64(vaddr), size}
	if g.spapr.regs[key]--; g.spapr.regs[key] > 0 {
		return
	}
	delete(g.spapr.regs, key)
	arg := spaprRegister{argsz: uint32(unsafe.Sizeof(spaprRegister{})), vaddr: uint64(vaddr), size: size}
	// A failure leaves the memory pinned until the container closes; nothing can reach it.
	ioctlPtr(g.container, reqSpaprUnregister, unsafe.Pointer(&arg))
}

// minWindow is the least size of a window that is asked for: each takes a table in the kernel of 8
// bytes a page, and platforms have few windows.
const minWindow = 1 << 30

// spaprGrow asks for another window, and takes size bytes from it. There is none with version 1, nor
// where the platform's are all taken; their addresses lie far above 4 GiB.
func (g *group) spaprGrow(size, mask uint64) (uint64, bool, error) {
	s := &g.spapr
	// The platform counts the default window as one of them.
	if g.iommu != iommuSpaprV2 || s.info.flags&spaprInfoDDW == 0 || s.windows+1 >= int(s.info.ddwMax) {
		return 0, false, nil
	}
	shift := uint32(12)
	for uint64(1)<<shift < uint64(os.Getpagesize()) {
		shift++
	}
	if s.info.ddwPgsizes&(1<<shift) == 0 {
		if s.info.ddwPgsizes&(1<<12) == 0 {
			return 0, false, nil
		}
		shift = 12
	}
	want := uint64(minWindow)
	for want < size && want != 0 {
		want <<= 1
	}
	if want == 0 {
		return 0, false, nil
	}
	arg := spaprCreate{argsz: uint32(unsafe.Sizeof(spaprCreate{})), pageShift: shift, windowSize: want, levels: 1}
	if _, err := ioctlPtr(g.container, reqSpaprCreate, unsafe.Pointer(&arg)); err != nil {
		if err == unix.ENOSPC || err == unix.EINVAL {
			return 0, false, nil
		}
		return 0, false, fmt.Errorf("creating a DMA window: %w", err)
	}
	if mask != 0 && (arg.startAddr > mask || size-1 > mask-arg.startAddr) {
		rm := spaprRemove{argsz: uint32(unsafe.Sizeof(spaprRemove{})), startAddr: arg.startAddr}
		ioctlPtr(g.container, reqSpaprRemove, unsafe.Pointer(&rm))
		return 0, false, nil
	}
	s.windows++
	g.space.addRange(extent{arg.startAddr, want})
	at, ok := g.space.alloc(size, mask)
	return at, ok, nil
}
