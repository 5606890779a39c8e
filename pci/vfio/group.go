package vfio

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/pci"
)

// group is an open IOMMU group with a container of its own. The kernel opens a group once, so the functions
// of one group in one process share it, and with it their DMA maps: the IOMMU does not tell them apart.
type group struct {
	path      string
	fd        int
	container int
	iommu     int // kind
	// users are the functions that this process has open, under groupsMu: the kernel would let it open
	// them twice.
	users map[pci.Address]bool

	mu    sync.Mutex
	space *iovaSpace
	maps  map[dma.Addr]*mapped
	spapr spaprState
}

// mapped is a DMA map in the kernel.
type mapped struct {
	pci.DMAMap
	vaddr uintptr
}

var (
	groupsMu sync.Mutex
	groups   = map[string]*group{}
)

const (
	devDir        = "/dev/vfio"
	containerPath = devDir + "/vfio"
)

// openGroup opens the group of a function, or returns the one that this process has open.
func openGroup(info *pci.Info, o pci.Options) (*group, error) {
	groupsMu.Lock()
	defer groupsMu.Unlock()
	path := pci.GroupPath(info)
	if g := groups[path]; g != nil {
		if g.users[info.Address] {
			return nil, &pci.Error{Problem: pci.Busy, Spec: info.Address.String(), Reason: "this program has it open already"}
		}
		// The kernel gives each function without an IOMMU a group of its own.
		for other := range g.users {
			if !o.AllowSharedGroup {
				return nil, pci.GroupTaken(info, other)
			}
		}
		g.users[info.Address] = true
		return g, nil
	}
	g := &group{
		path: path, fd: -1, container: -1, users: map[pci.Address]bool{info.Address: true}, maps: map[dma.Addr]*mapped{},
	}
	if err := g.open(info, o); err != nil {
		g.closeFDs()
		return nil, err
	}
	groups[path] = g
	return g, nil
}

func (g *group) open(info *pci.Info, o pci.Options) error {
	fail := func(p pci.Problem, err error, mend, format string, args ...interface{}) error {
		return &pci.Error{Problem: p, Spec: info.Address.String(), Reason: fmt.Sprintf(format, args...), Mend: mend, Err: err}
	}
	var err error
	if g.fd, err = unix.Open(g.path, unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
		switch err {
		case unix.EBUSY:
			return pci.Held(info, o.Mode, pci.Holders(g.path))
		case unix.EACCES, unix.EPERM:
			return o.Sysfs.NotAllowed(info, o.Mode, err)
		case unix.ENOENT:
			return fail(pci.MissingModule, nil, "modprobe vfio-pci, then bind the function again", "%s is missing", g.path)
		}
		return fail(pci.Other, err, "", "cannot open %s", g.path)
	}
	st := groupStatus{argsz: uint32(unsafe.Sizeof(groupStatus{}))}
	if _, err := ioctlPtr(g.fd, reqGroupGetStatus, unsafe.Pointer(&st)); err != nil {
		return fail(pci.Other, err, "", "cannot ask for the state of %s", g.path)
	}
	if st.flags&groupViable == 0 {
		return o.Sysfs.GroupNotFree(info)
	}
	if g.container, err = unix.Open(containerPath, unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
		switch err {
		case unix.EACCES, unix.EPERM:
			return fail(pci.Permission, err, "run it as root, or: chmod 666 "+containerPath, "may not open %s", containerPath)
		case unix.ENOENT, unix.ENODEV:
			return fail(pci.MissingModule, err, "modprobe vfio", "cannot open %s", containerPath)
		}
		return fail(pci.Other, err, "", "cannot open %s", containerPath)
	}
	if v, err := ioctl(g.container, reqGetAPIVersion, 0); err != nil || v != apiVersion {
		return fail(pci.Other, err, "", "the kernel's VFIO has version %d, not %d", v, apiVersion)
	}
	container := int32(g.container)
	if _, err := ioctlPtr(g.fd, reqGroupSetCont, unsafe.Pointer(&container)); err != nil {
		if err == unix.EPERM {
			return fail(pci.Permission, err, "run it as root", "its IOMMU group cannot be put to use (no interrupt remapping?)")
		}
		return fail(pci.Other, err, "", "its IOMMU group cannot be put to use")
	}
	return g.setIOMMU(info, o, fail)
}

// setIOMMU takes the best kind of IOMMU that the kernel has for the group.
func (g *group) setIOMMU(info *pci.Info, o pci.Options, fail func(pci.Problem, error, string, string, ...interface{}) error) error {
	kinds := []int{iommuType1v2, iommuType1, iommuSpaprV2, iommuSpapr}
	if o.Mode == pci.VFIONoIOMMU {
		kinds = []int{iommuNone}
	}
	known := false
	var last error
	for _, k := range kinds {
		if r, err := ioctl(g.container, reqCheckExtension, uintptr(k)); err != nil || r <= 0 {
			continue
		}
		known = true
		if _, last = ioctl(g.container, reqSetIOMMU, uintptr(k)); last == nil {
			g.iommu = k
			break
		}
	}
	if g.iommu == 0 {
		switch {
		case !known:
			return fail(pci.MissingModule, nil, "modprobe vfio_iommu_type1 (on POWER: modprobe vfio_iommu_spapr_tce)", "the kernel's VFIO has no driver for this IOMMU loaded")
		case last == unix.EPERM:
			return pci.NoRemapping(info.Address, last)
		}
		return fail(pci.Other, last, "", "its IOMMU cannot be used")
	}
	return g.initSpace(fail)
}

// initSpace learns which bus addresses there are.
func (g *group) initSpace(fail func(pci.Problem, error, string, string, ...interface{}) error) error {
	var err error
	switch g.iommu {
	case iommuNone:
		return nil
	case iommuSpapr, iommuSpaprV2:
		err = g.initSpapr()
	default:
		err = g.initType1()
	}
	if err != nil {
		return fail(pci.Other, err, "", "its IOMMU cannot be understood")
	}
	return nil
}

// type1Caps reads the IOMMU's information with its capabilities.
func (g *group) type1Caps() (type1Info, []infoCap, error) {
	size := uint32(unsafe.Sizeof(type1Info{}))
	for {
		b := infoBuffer(int(size))
		info := (*type1Info)(unsafe.Pointer(&b[0]))
		info.argsz = size
		if _, err := ioctlPtr(g.container, reqIOMMUGetInfo, unsafe.Pointer(info)); err != nil {
			return type1Info{}, nil, fmt.Errorf("IOMMU information: %w", err)
		}
		if info.argsz > size && info.argsz < 1<<20 {
			size = info.argsz // the capabilities did not fit
			continue
		}
		if info.flags&iommuInfoCaps == 0 {
			return *info, nil, nil
		}
		caps, err := capChain(b[:size], info.capOffset)
		return *info, caps, err
	}
}

func (g *group) initType1() error {
	info, caps, err := g.type1Caps()
	if err != nil {
		return err
	}
	page := uint64(os.Getpagesize())
	if info.flags&iommuInfoPgsizes != 0 && info.pgsizes != 0 {
		if low := info.pgsizes & -info.pgsizes; low > page {
			page = low
		}
	}
	valid := defaultRanges
	for _, c := range caps {
		if c.id == iommuCapIOVARange {
			if valid, err = parseIOVARanges(c.data); err != nil {
				return err
			}
		}
	}
	g.space, err = newIOVASpace(valid, page)
	return err
}

// dmaAvail is how many more maps the kernel allows (VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL, Linux 5.10).
func (g *group) dmaAvail() (uint32, bool) {
	if g.iommu != iommuType1 && g.iommu != iommuType1v2 {
		return 0, false
	}
	_, caps, err := g.type1Caps()
	if err != nil {
		return 0, false
	}
	for _, c := range caps {
		if c.id == iommuCapDMAAvail && len(c.data) >= 4 {
			return native.Uint32(c.data), true
		}
	}
	return 0, false
}

// dmaError explains why the kernel refused a map.
func dmaError(a pci.Address, err error, size uint64) error {
	e := &pci.Error{Problem: pci.Other, Spec: a.String(), Reason: fmt.Sprintf("%#x bytes cannot be mapped for DMA", size), Err: err}
	switch {
	case errors.Is(err, unix.ENOMEM):
		var r unix.Rlimit
		e.Problem = pci.Memlock
		if unix.Getrlimit(unix.RLIMIT_MEMLOCK, &r) == nil && uint64(r.Cur) != ^uint64(0) {
			e.Reason += fmt.Sprintf(": the limit of locked memory is %d KiB", uint64(r.Cur)>>10)
		}
		e.Mend = fmt.Sprintf("raise it: ulimit -l %d, or LimitMEMLOCK=infinity in the unit, or run it as root", size>>10+64)
	case errors.Is(err, unix.ENOSPC):
		e.Reason += ": there are too many maps"
		e.Mend = "raise /sys/module/vfio_iommu_type1/parameters/dma_entry_limit"
	}
	return e
}

// mapDMA maps memory at a bus address below mask.
func (g *group) mapDMA(a pci.Address, m mmio.RAM, access pci.DMAAccess, mask uint64) (dma.Addr, error) {
	fail := func(p pci.Problem, format string, args ...interface{}) (dma.Addr, error) {
		return 0, &pci.Error{Problem: p, Spec: a.String(), Reason: fmt.Sprintf(format, args...)}
	}
	if access&(pci.DMARead|pci.DMAWrite) == 0 || access&^(pci.DMARead|pci.DMAWrite) != 0 {
		return fail(pci.Other, "a DMA map without access, or with an unknown one (%d)", access)
	}
	b := m.Bytes()
	if len(b) == 0 {
		return fail(pci.Other, "an empty DMA map")
	}
	if g.iommu == iommuNone {
		return 0, &pci.Error{
			Problem: pci.NoDMA, Spec: a.String(), Reason: "no memory can be mapped for it: there is no IOMMU",
			Mend: "turn the IOMMU on, or use a placement in the board's window",
		}
	}
	vaddr, size := uintptr(unsafe.Pointer(&b[0])), uint64(len(b))
	g.mu.Lock()
	defer g.mu.Unlock()
	page := uint64(os.Getpagesize())
	if g.space != nil && g.space.page > page {
		page = g.space.page
	}
	if (uint64(vaddr)|size)&(page-1) != 0 {
		return fail(pci.Other, "memory at %#x, %#x bytes, is not made of whole pages of %#x", vaddr, size, page)
	}
	if g.spaprKind() {
		if err := g.spaprPrepare(vaddr, size); err != nil {
			return 0, dmaError(a, err, size)
		}
	}
	at, ok := g.space.alloc(size, mask)
	if !ok && g.spaprKind() {
		var err error
		if at, ok, err = g.spaprGrow(size, mask); err != nil {
			g.spaprRelease(vaddr, size)
			return 0, dmaError(a, err, size)
		}
	}
	if !ok {
		g.spaprRelease(vaddr, size)
		return fail(pci.NoDMA, "there are no %#x free bus addresses that it can reach (mask %#x)", size, mask)
	}
	arg := dmaMap{argsz: uint32(unsafe.Sizeof(dmaMap{})), vaddr: uint64(vaddr), iova: at, size: size}
	if access&pci.DMARead != 0 {
		arg.flags |= dmaMapRead
	}
	if access&pci.DMAWrite != 0 {
		arg.flags |= dmaMapWrite
	}
	if _, err := ioctlPtr(g.container, reqIOMMUMapDMA, unsafe.Pointer(&arg)); err != nil {
		g.space.free(at)
		g.spaprRelease(vaddr, size)
		return 0, dmaError(a, err, size)
	}
	g.maps[dma.Addr(at)] = &mapped{DMAMap: pci.DMAMap{Addr: dma.Addr(at), Size: size, Access: access}, vaddr: vaddr}
	return dma.Addr(at), nil
}

// unmapDMA takes a map back. The bus address is not given out again if the kernel refuses.
func (g *group) unmapDMA(a pci.Address, at dma.Addr) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	m := g.maps[at]
	if m == nil {
		return &pci.Error{Problem: pci.Other, Spec: a.String(), Reason: fmt.Sprintf("no DMA map starts at %#x", uint64(at))}
	}
	arg := dmaUnmap{argsz: uint32(unsafe.Sizeof(dmaUnmap{})), iova: uint64(at), size: m.Size}
	_, err := ioctlPtr(g.container, reqIOMMUUnmapDMA, unsafe.Pointer(&arg))
	if err == nil && arg.size != m.Size && !g.spaprKind() {
		err = fmt.Errorf("the kernel unmapped %#x bytes of %#x", arg.size, m.Size)
	}
	if err != nil {
		return &pci.Error{Problem: pci.Other, Spec: a.String(), Reason: fmt.Sprintf("the DMA map at %#x stays", uint64(at)), Err: err}
	}
	delete(g.maps, at)
	g.space.free(uint64(at))
	g.spaprRelease(m.vaddr, m.Size)
	return nil
}

// put gives a function back. The last one closes the group, which takes back all that the kernel did.
func (g *group) put(a pci.Address) {
	groupsMu.Lock()
	defer groupsMu.Unlock()
	if delete(g.users, a); len(g.users) > 0 {
		return
	}
	delete(groups, g.path)
	g.closeFDs()
}

func (g *group) closeFDs() {
	// The group first: a container that still has groups is kept by the kernel.
	if g.fd >= 0 {
		unix.Close(g.fd)
	}
	if g.container >= 0 {
		unix.Close(g.container)
	}
	g.fd, g.container = -1, -1
}
