package vfio

import (
	"encoding/binary"
	"math/rand/v2"
	"runtime"
	"testing"
	"unsafe"
)

// TestRequestNumbers: the numbers of include/uapi/linux/vfio.h, as a C compiler gives them for x86 and for powerpc.
func TestRequestNumbers(t *testing.T) {
	none := uintptr(0)
	switch runtime.GOARCH {
	case "ppc64", "ppc64le", "mips", "mipsle", "mips64", "mips64le", "sparc64":
		none = 0x20000000
	}
	for want, got := range map[uintptr]uintptr{
		0x3b64: reqGetAPIVersion, 0x3b65: reqCheckExtension, 0x3b66: reqSetIOMMU, 0x3b67: reqGroupGetStatus, 0x3b68: reqGroupSetCont,
		0x3b69: reqGroupUnsetCont, 0x3b6a: reqGroupGetDevice, 0x3b6b: reqDeviceGetInfo, 0x3b6c: reqDeviceGetRegion,
		0x3b6d: reqDeviceGetIRQ, 0x3b6e: reqDeviceSetIRQs, 0x3b6f: reqDeviceReset, 0x3b70: reqIOMMUGetInfo, 0x3b71: reqIOMMUMapDMA,
		0x3b72: reqIOMMUUnmapDMA, 0x3b73: reqIOMMUEnable, 0x3b74: reqIOMMUDisable, 0x3b75: reqSpaprRegister,
		0x3b76: reqSpaprUnregister, 0x3b77: reqSpaprCreate, 0x3b78: reqSpaprRemove,
	} {
		if got != want|none {
			t.Errorf("request %#x, want %#x", got, want|none)
		}
	}
}

// TestLayouts: offsets and sizes as a C compiler gives them; they are the same on every machine, save that the
// ends of some are padded.
func TestLayouts(t *testing.T) {
	var (
		gs groupStatus
		di deviceInfo
		ri regionInfo
		ii irqInfo
		is irqSetHead
		dm dmaMap
		du dmaUnmap
		ti type1Info
		si spaprInfo
		sr spaprRegister
		sc spaprCreate
		sx spaprRemove
	)
	for name, c := range map[string][2]uintptr{
		"group_status":            {unsafe.Sizeof(gs), 8},
		"device_info":             {unsafe.Sizeof(di), 16},
		"region_info":             {unsafe.Sizeof(ri), 32},
		"region_info.cap_offset":  {unsafe.Offsetof(ri.capOffset), 12},
		"region_info.size":        {unsafe.Offsetof(ri.size), 16},
		"region_info.offset":      {unsafe.Offsetof(ri.offset), 24},
		"irq_info":                {unsafe.Sizeof(ii), 16},
		"irq_set":                 {unsafe.Sizeof(is), 20},
		"dma_map":                 {unsafe.Sizeof(dm), 32},
		"dma_map.iova":            {unsafe.Offsetof(dm.iova), 16},
		"dma_unmap":               {unsafe.Sizeof(du), 24},
		"dma_unmap.size":          {unsafe.Offsetof(du.size), 16},
		"type1_info":              {unsafe.Sizeof(ti), 24},
		"type1_info.cap_offset":   {unsafe.Offsetof(ti.capOffset), 16},
		"spapr_info":              {unsafe.Sizeof(si), 32},
		"spapr_info.ddw.pgsizes":  {unsafe.Offsetof(si.ddwPgsizes), 16},
		"spapr_info.ddw.levels":   {unsafe.Offsetof(si.ddwLevels), 28},
		"spapr_register":          {unsafe.Sizeof(sr), 24},
		"spapr_create":            {unsafe.Sizeof(sc), 40},
		"spapr_create.windowsize": {unsafe.Offsetof(sc.windowSize), 16},
		"spapr_create.levels":     {unsafe.Offsetof(sc.levels), 24},
		"spapr_create.start_addr": {unsafe.Offsetof(sc.startAddr), 32},
		"spapr_remove":            {unsafe.Sizeof(sx), 16},
		"spapr_remove.start_addr": {unsafe.Offsetof(sx.startAddr), 8},
	} {
		if c[0] != c[1] {
			t.Errorf("%s: %d, want %d", name, c[0], c[1])
		}
	}
}

// sparseInfo is a region info with capabilities as the kernel fills it in, in this machine's byte order.
func sparseInfo(areas ...extent) (*regionInfo, []byte) {
	b := infoBuffer(32 + 8 + 16 + 16*len(areas))
	r := (*regionInfo)(unsafe.Pointer(&b[0]))
	*r = regionInfo{argsz: uint32(len(b)), flags: regionMmap | regionCaps, capOffset: 32, size: 0x10000}
	h := b[32:]
	native.PutUint16(h, 7) // one that is not known
	native.PutUint16(h[2:], 1)
	native.PutUint32(h[4:], 40)
	h = b[40:]
	native.PutUint16(h, capSparseMmap)
	native.PutUint16(h[2:], 1)
	native.PutUint32(h[8:], uint32(len(areas)))
	for i, a := range areas {
		native.PutUint64(h[16+16*i:], a.start)
		native.PutUint64(h[24+16*i:], a.size)
	}
	return r, b
}

func TestMappable(t *testing.T) {
	r, b := sparseInfo(extent{0, 0x4000}, extent{0x5000, 0}, extent{0x6000, 0xa000})
	got, err := mappable(r, b)
	if err != nil || len(got) != 2 || got[0] != (extent{0, 0x4000}) || got[1] != (extent{0x6000, 0xa000}) {
		t.Errorf("sparse areas %v, %v", got, err)
	}
	if r, b = sparseInfo(extent{0x6000, 0xa001}); true {
		if got, err := mappable(r, b); err == nil {
			t.Errorf("an area outside the region: %v", got)
		}
	}
	if r, b = sparseInfo(extent{^uint64(0) - 1, 2}); true {
		if got, err := mappable(r, b); err == nil {
			t.Errorf("an area that wraps: %v", got)
		}
	}
	r, b = sparseInfo()
	if got, err := mappable(r, b); err != nil || len(got) != 0 {
		t.Errorf("nothing can be mapped: %v, %v", got, err)
	}
	native.PutUint32(b[48:], 1<<30)
	if got, err := mappable(r, b); err == nil {
		t.Errorf("more areas than there are bytes: %v", got)
	}
	native.PutUint32(b[44:], 32) // a loop
	if got, err := mappable(r, b); err == nil {
		t.Errorf("a loop of capabilities: %v", got)
	}
	r.flags = regionMmap
	if got, err := mappable(r, b); err != nil || len(got) != 1 || got[0] != (extent{0, 0x10000}) {
		t.Errorf("without capabilities: %v, %v", got, err)
	}
	r.flags = regionRead
	if got, err := mappable(r, b); err != nil || got != nil {
		t.Errorf("not to be mapped: %v, %v", got, err)
	}
}

func TestIOVARanges(t *testing.T) {
	data := make([]byte, 8+32)
	native.PutUint32(data, 2)
	native.PutUint64(data[8:], 0)
	native.PutUint64(data[16:], 0xfedfffff)
	native.PutUint64(data[24:], 0xfef00000)
	native.PutUint64(data[32:], ^uint64(0))
	got, err := parseIOVARanges(data)
	if err != nil || len(got) != 2 || got[0] != (extent{0, 0xfee00000}) || got[1] != (extent{0xfef00000, ^uint64(0) - 0xfef00000}) {
		t.Errorf("%x, %v", got, err)
	}
	native.PutUint64(data[16:], 0)
	native.PutUint64(data[8:], 1)
	if got, err := parseIOVARanges(data); err == nil {
		t.Errorf("a range that ends before its start: %v", got)
	}
	if _, err := parseIOVARanges(data[:7]); err == nil {
		t.Error("cut off")
	}
}

// TestIOVASpace: what is given out never overlaps, stays in the valid ranges and below the mask, and comes back.
func TestIOVASpace(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	for round := 0; round < 200; round++ {
		page := uint64(4096) << (rnd.Uint64N(2) * 4)
		valid := []extent{{0, 1 << 20}, {1 << 21, 3 * page}, {1 << 32, 1 << 34}, {^uint64(0) - 1<<16 + 1 - 1, 1 << 16}}
		s, err := newIOVASpace(valid, page)
		if err != nil {
			t.Fatal(err)
		}
		live := map[uint64]uint64{}
		for i := 0; i < 200; i++ {
			if rnd.IntN(3) == 0 {
				for at := range live {
					s.free(at)
					delete(live, at)
					break
				}
				continue
			}
			size := (1 + rnd.Uint64N(40)) * page
			mask := []uint64{0, 1<<20 - 1, 1<<32 - 1, 1<<40 - 1}[rnd.IntN(4)]
			at, ok := s.alloc(size, mask)
			if !ok {
				continue
			}
			if at == 0 || at%page != 0 || mask != 0 && at+size-1 > mask {
				t.Fatalf("%#x bytes at %#x, mask %#x, page %#x", size, at, mask, page)
			}
			in := false
			for _, v := range valid {
				in = in || at >= v.start && at-v.start <= v.size && size <= v.size-(at-v.start)
			}
			if !in {
				t.Fatalf("%#x bytes at %#x lie in no valid range", size, at)
			}
			for b, n := range live {
				if at < b+n && b < at+size {
					t.Fatalf("%#x bytes at %#x overlap %#x at %#x", size, at, n, b)
				}
			}
			live[at] = size
		}
		for at := range live {
			s.free(at)
		}
		if len(s.used) != 0 {
			t.Fatalf("%v is left", s.used)
		}
	}
	s, _ := newIOVASpace([]extent{{0, 1 << 30}}, 4096)
	if at, ok := s.alloc(2<<20, 0); !ok || at != 2<<20 {
		t.Errorf("2 MiB at %#x, want them aligned to their size", at)
	}
	if _, ok := s.alloc(100, 0); ok {
		t.Error("100 bytes")
	}
	if _, ok := s.alloc(1<<30, 0); ok {
		t.Error("address 0 was given out")
	}
	if _, err := newIOVASpace(nil, 3); err == nil {
		t.Error("a page of 3 bytes")
	}
}

func FuzzRegionInfo(f *testing.F) {
	for _, l := range [][]extent{nil, {{0, 0x1000}}, {{0, 0x4000}, {0x5000, 0xb000}}} {
		r, b := sparseInfo(l...)
		f.Add(b, r.capOffset, r.size)
	}
	f.Fuzz(func(t *testing.T, b []byte, off uint32, size uint64) {
		r := &regionInfo{flags: regionMmap | regionCaps, capOffset: off, size: size}
		areas, err := mappable(r, b)
		if err != nil {
			return
		}
		for _, a := range areas {
			if a.size == 0 || a.start+a.size < a.start || a.start+a.size > size {
				t.Errorf("area %+v of a region of %#x bytes", a, size)
			}
		}
	})
}

func FuzzIOVARanges(f *testing.F) {
	data := make([]byte, 24)
	native.PutUint32(data, 1)
	native.PutUint64(data[16:], 0xfedfffff)
	f.Add(data)
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := parseIOVARanges(b)
		if err != nil {
			return
		}
		for _, a := range l {
			if a.size == 0 || a.start+a.size < a.start {
				t.Errorf("range %+v", a)
			}
		}
	})
}

func TestNative(t *testing.T) {
	if native.Uint16([]byte{1, 0}) != binary.NativeEndian.Uint16([]byte{1, 0}) {
		t.Error("the byte order is mixed up")
	}
}
