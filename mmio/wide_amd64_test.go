//go:build gc && amd64

package mmio

import "testing"

// TestFeatures: no width without the processor and the system agreeing to it.
func TestFeatures(t *testing.T) {
	const (
		sse41, osxsave, avx, hyper = 1 << 19, 1 << 27, 1 << 28, 1 << 31
		avx2, avx512               = 1 << 5, 1 << 16
	)
	for _, c := range []struct {
		name           string
		top, ecx1, bx7 uint32
		xcr0           uint32
		want           Widths
		emulated       bool
	}{
		{"nothing", 1, 0, 0, 0, Widths{8, 16}, false},
		{"SSE4.1", 1, sse41, 0, 0, Widths{16, 16}, false},
		{"under a hypervisor", 1, sse41 | hyper, 0, 0, Widths{16, 16}, true},
		{"AVX2 that the system does not save", 7, sse41 | avx, avx2 | avx512, 0xe6, Widths{16, 16}, false},
		{"AVX2 switched off in XCR0", 7, sse41 | avx | osxsave, avx2 | avx512, 0x3, Widths{16, 16}, false},
		{"AVX alone", 7, sse41 | avx | osxsave, 0, 0xe7, Widths{16, 16}, false},
		{"AVX, no leaf 7", 6, sse41 | avx | osxsave, avx2, 0xe7, Widths{16, 16}, false},
		{"AVX2", 7, sse41 | avx | osxsave, avx2, 0x7, Widths{32, 32}, false},
		{"AVX-512 that the system does not save", 7, sse41 | avx | osxsave, avx2 | avx512, 0x27, Widths{32, 32}, false},
		{"AVX-512", 7, sse41 | avx | osxsave, avx2 | avx512, 0xe7, Widths{64, 64}, false},
	} {
		cpuid := func(leaf, sub uint32) (a, b, cx, d uint32) {
			switch {
			case leaf > c.top:
				t.Errorf("%s: leaf %d is asked for", c.name, leaf)
			case leaf == 0:
				a = c.top
			case leaf == 1:
				cx = c.ecx1
			case leaf == 7:
				b = c.bx7
			}
			return
		}
		xgetbv := func() uint32 {
			if c.ecx1&osxsave == 0 {
				t.Errorf("%s: XGETBV is not there", c.name)
			}
			return c.xcr0
		}
		if w, e := features(cpuid, xgetbv); w != c.want || e != c.emulated {
			t.Errorf("%s: %v, hypervisor %v", c.name, w, e)
		}
	}
	for _, c := range []struct {
		k        Kind
		can      Widths
		emulated bool
		want     Widths
	}{
		{WriteCombining, Widths{64, 64}, false, Widths{16, 8}},
		{WriteCombining, Widths{16, 16}, false, Widths{16, 8}},
		{WriteCombining, Widths{8, 16}, false, Widths{8, 8}},
		{WriteCombining, Widths{64, 64}, true, Widths{8, 8}},
		{Uncached, Widths{64, 64}, false, Widths{8, 8}},
		{Cached, Widths{64, 64}, false, Widths{8, 8}},
	} {
		if w := defaultWidths(c.k, c.can, c.emulated); w != c.want {
			t.Errorf("%v, %v, hypervisor %v: %v", c.k, c.can, c.emulated, w)
		}
	}
}
