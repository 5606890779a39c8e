package vfio

import (
	"encoding/binary"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Request numbers are _IO(';', 100+n) (include/uapi/linux/vfio.h, VFIO_TYPE, VFIO_BASE); _IO itself
// differs between architectures, see ioNone.
const vfioBase = ioNone | ';'<<8 | 100

const (
	reqGetAPIVersion   = vfioBase + 0
	reqCheckExtension  = vfioBase + 1
	reqSetIOMMU        = vfioBase + 2
	reqGroupGetStatus  = vfioBase + 3
	reqGroupSetCont    = vfioBase + 4
	reqGroupUnsetCont  = vfioBase + 5
	reqGroupGetDevice  = vfioBase + 6
	reqDeviceGetInfo   = vfioBase + 7
	reqDeviceGetRegion = vfioBase + 8
	reqDeviceGetIRQ    = vfioBase + 9
	reqDeviceSetIRQs   = vfioBase + 10
	reqDeviceReset     = vfioBase + 11
	// The kinds of IOMMU share numbers.
	reqIOMMUGetInfo    = vfioBase + 12 // type 1, and sPAPR TCE with another structure
	reqIOMMUMapDMA     = vfioBase + 13
	reqIOMMUUnmapDMA   = vfioBase + 14
	reqIOMMUEnable     = vfioBase + 15 // sPAPR TCE v1
	reqIOMMUDisable    = vfioBase + 16
	reqSpaprRegister   = vfioBase + 17 // sPAPR TCE v2
	reqSpaprUnregister = vfioBase + 18
	reqSpaprCreate     = vfioBase + 19
	reqSpaprRemove     = vfioBase + 20
)

// Kinds of IOMMU (CHECK_EXTENSION, SET_IOMMU).
const (
	iommuType1   = 1
	iommuSpapr   = 2
	iommuType1v2 = 3
	iommuSpaprV2 = 7
	iommuNone    = 8
)

const apiVersion = 0

const (
	groupViable       = 1 << 0
	groupContainerSet = 1 << 1
)

const (
	deviceReset = 1 << 0
	devicePCI   = 1 << 1
)

// Regions and interrupts of a PCI function.
const (
	regionConfig = 7
	irqINTx      = 0
	irqMSI       = 1
	irqMSIX      = 2
	irqErr       = 3
	irqReq       = 4
)

const (
	regionRead  = 1 << 0
	regionWrite = 1 << 1
	regionMmap  = 1 << 2
	regionCaps  = 1 << 3

	capSparseMmap   = 1
	capMSIXMappable = 3
)

const irqEventfd = 1 << 0

const (
	irqSetDataNone      = 1 << 0
	irqSetDataEventfd   = 1 << 2
	irqSetActionUnmask  = 1 << 4
	irqSetActionTrigger = 1 << 5
)

const (
	iommuInfoPgsizes  = 1 << 0
	iommuInfoCaps     = 1 << 1
	iommuCapIOVARange = 1
	iommuCapDMAAvail  = 3

	dmaMapRead  = 1 << 0 // the device may read
	dmaMapWrite = 1 << 1 // the device may write

	spaprInfoDDW = 1 << 0
)

type groupStatus struct{ argsz, flags uint32 }

type deviceInfo struct{ argsz, flags, regions, irqs uint32 }

type regionInfo struct {
	argsz, flags, index, capOffset uint32
	size, offset                   uint64
}

type irqInfo struct{ argsz, flags, index, count uint32 }

// irqSetHead is followed by count 32-bit file descriptors.
type irqSetHead struct{ argsz, flags, index, start, count uint32 }

type dmaMap struct {
	argsz, flags      uint32
	vaddr, iova, size uint64
}

type dmaUnmap struct {
	argsz, flags uint32
	iova, size   uint64
}

type type1Info struct {
	argsz, flags uint32
	pgsizes      uint64
	capOffset    uint32
	pad          uint32 // named in newer headers; argsz covers it
}

type spaprInfo struct {
	argsz, flags           uint32
	window32, window32Size uint32
	ddwPgsizes             uint64
	ddwMax, ddwLevels      uint32
}

type spaprRegister struct {
	argsz, flags uint32
	vaddr, size  uint64
}

type spaprCreate struct {
	argsz, flags    uint32
	pageShift, resv uint32
	windowSize      uint64
	levels, resv2   uint32
	startAddr       uint64
}

type spaprRemove struct {
	argsz, flags uint32
	startAddr    uint64
}

// native is the machine's byte order, which the kernel's structures have.
var native = func() binary.ByteOrder {
	x := uint16(1)
	if *(*byte)(unsafe.Pointer(&x)) == 1 {
		return binary.LittleEndian
	}
	return binary.BigEndian
}()

// ioctl returns the result, and nil as the error where it is not negative.
func ioctl(fd int, req uintptr, arg uintptr) (int, error) {
	for {
		r, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), req, arg)
		switch e {
		case 0:
			return int(r), nil
		case unix.EINTR:
		default:
			return -1, e
		}
	}
}

// ioctlPtr passes the address of a structure, which arg keeps alive and in place.
func ioctlPtr(fd int, req uintptr, arg unsafe.Pointer) (int, error) {
	for {
		r, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), req, uintptr(arg))
		switch e {
		case 0:
			return int(r), nil
		case unix.EINTR:
		default:
			return -1, e
		}
	}
}

// infoCap is one entry of a capability chain in an info structure.
type infoCap struct {
	id, version uint16
	data        []byte // behind the header, to the end of the structure
}

// capChain walks the chain that starts at offset first of b. The kernel wrote it, so a defect is
// an error of this program's idea of the structure; it is checked all the same.
func capChain(b []byte, first uint32) ([]infoCap, error) {
	var caps []infoCap
	for off := uint64(first); off != 0; {
		if off+8 > uint64(len(b)) || off&3 != 0 {
			return caps, fmt.Errorf("capability at %#x of %#x bytes", off, len(b))
		}
		if len(caps) >= 64 {
			return caps, fmt.Errorf("the list of capabilities does not end")
		}
		h := b[off:]
		caps = append(caps, infoCap{id: native.Uint16(h), version: native.Uint16(h[2:]), data: h[8:]})
		off = uint64(native.Uint32(h[4:]))
	}
	return caps, nil
}

// extent is a range of offsets or addresses: size bytes, size > 0, that do not wrap.
type extent struct{ start, size uint64 }

// parseSparse reads the areas of a region that can be mapped: struct
// vfio_region_info_cap_sparse_mmap behind its header.
func parseSparse(data []byte, regionSize uint64) ([]extent, error) {
	if len(data) < 8 {
		return nil, fmt.Errorf("sparse areas cut off")
	}
	n := uint64(native.Uint32(data))
	data = data[8:]
	if n > uint64(len(data)/16) {
		return nil, fmt.Errorf("%d sparse areas in %d bytes", n, len(data))
	}
	var l []extent
	for ; n > 0; n-- {
		a := extent{native.Uint64(data), native.Uint64(data[8:])}
		data = data[16:]
		if a.size == 0 {
			continue
		}
		if a.start > regionSize || a.size > regionSize-a.start {
			return nil, fmt.Errorf("sparse area %#x+%#x outside the region of %#x", a.start, a.size, regionSize)
		}
		l = append(l, a)
	}
	return l, nil
}

// parseIOVARanges reads the valid bus addresses: struct vfio_iommu_type1_info_cap_iova_range behind its
// header. Ends are inclusive there; the last byte of the address space is given up here, to
// keep sizes in 64 bits.
func parseIOVARanges(data []byte) ([]extent, error) {
	if len(data) < 8 {
		return nil, fmt.Errorf("address ranges cut off")
	}
	n := uint64(native.Uint32(data))
	data = data[8:]
	if n > uint64(len(data)/16) {
		return nil, fmt.Errorf("%d address ranges in %d bytes", n, len(data))
	}
	var l []extent
	for ; n > 0; n-- {
		start, end := native.Uint64(data), native.Uint64(data[8:])
		data = data[16:]
		if end < start {
			return nil, fmt.Errorf("address range %#x to %#x", start, end)
		}
		size := end - start
		if end != ^uint64(0) {
			size++
		}
		if size > 0 {
			l = append(l, extent{start, size})
		}
	}
	return l, nil
}

// infoBuffer is memory for an info structure with capabilities, aligned to 8.
func infoBuffer(n int) []byte {
	w := make([]uint64, (n+7)/8)
	return unsafe.Slice((*byte)(unsafe.Pointer(&w[0])), len(w)*8)
}
