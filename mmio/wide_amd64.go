//go:build gc && amd64

package mmio

import "unsafe"

// cpuid executes CPUID.
func cpuid(leaf, sub uint32) (a, b, c, d uint32)

// xgetbv returns the low half of XCR0: which registers the system saves and restores.
func xgetbv() uint32

// loadWide reads n bytes, pieces of width (16, 32 or 64), from device memory at src, which is aligned to width, with streaming loads. dst need not
// be aligned.
//
//go:noescape
func loadWide(dst, src unsafe.Pointer, n, width uint64)

// storeWide writes n bytes, pieces of width (16, 32 or 64), to device memory at dst, which is aligned to width. src need not be aligned.
//
//go:noescape
func storeWide(dst, src unsafe.Pointer, n, width uint64)

var widest, emulated = features(cpuid, xgetbv)

// features finds out what the processor has and the system supports (Intel SDM volume 2, CPUID; volume 1, 13.2 and 14.3).
func features(cpuid func(leaf, sub uint32) (a, b, c, d uint32), xgetbv func() uint32) (w Widths, emulated bool) {
	const (
		sse41, osxsave, avx, hypervisor = 1 << 19, 1 << 27, 1 << 28, 1 << 31 // leaf 1, ECX
		avx2, avx512f                   = 1 << 5, 1 << 16                    // leaf 7, EBX
		xmmYmm, zmm                     = 0x6, 0xe6                          // XCR0: SSE and AVX state; with opmask and both ZMM states
	)
	w = Widths{8, 16} // SSE2 is part of amd64
	top, _, _, _ := cpuid(0, 0)
	_, _, c, _ := cpuid(1, 0)
	emulated = c&hypervisor != 0
	if c&sse41 == 0 {
		return w, emulated
	}
	w.Load = 16
	if c&osxsave == 0 || c&avx == 0 || top < 7 {
		return w, emulated
	}
	_, b, _, _ := cpuid(7, 0)
	x := xgetbv()
	if b&avx2 != 0 && x&xmmYmm == xmmYmm {
		w = Widths{32, 32}
		if b&avx512f != 0 && x&zmm == zmm {
			w = Widths{64, 64}
		}
	}
	return w, emulated
}
