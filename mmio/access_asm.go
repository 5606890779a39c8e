//go:build gc && (amd64 || arm64 || ppc64 || ppc64le || riscv64)

package mmio

import (
	"runtime"
	"unsafe"
)

// wordAccesses is the number of bus accesses that one 64-bit access makes.
const wordAccesses = 1

// Load8 returns the byte at p with one access.
//
//go:noescape
func Load8(p unsafe.Pointer) uint8

// Load16 returns the little-endian 16 bits at p, which must be aligned to 2,
// with one access.
//
//go:noescape
func Load16(p unsafe.Pointer) uint16

// Load32 returns the little-endian 32 bits at p, which must be aligned to 4,
// with one access.
//
//go:noescape
func Load32(p unsafe.Pointer) uint32

// Load64 returns the little-endian 64 bits at p, which must be aligned to 8,
// with one access (two of 32 bits, low half first, on 32-bit processors).
//
//go:noescape
func Load64(p unsafe.Pointer) uint64

// Store8 writes the byte at p with one access.
//
//go:noescape
func Store8(p unsafe.Pointer, v uint8)

// Store16 writes 16 bits, little-endian, at p, which must be aligned to 2, with
// one access.
//
//go:noescape
func Store16(p unsafe.Pointer, v uint16)

// Store32 writes 32 bits, little-endian, at p, which must be aligned to 4, with
// one access.
//
//go:noescape
func Store32(p unsafe.Pointer, v uint32)

// Store64 writes 64 bits, little-endian, at p, which must be aligned to 8, with
// one access (two of 32 bits, low half first, on 32-bit processors).
//
//go:noescape
func Store64(p unsafe.Pointer, v uint64)

// copyWords copies 64-bit words one by one, upwards, with plain loads and stores. The device
// side is aligned to 8; the other may not be (except on riscv64).
//
//go:noescape
func copyWords(dst, src unsafe.Pointer, words uint64)

// zeroWords writes zero words; dst is aligned to 8.
//
//go:noescape
func zeroWords(dst unsafe.Pointer, words uint64)

// storeWords writes src, whole words, to device memory at p, aligned to 8.
func storeWords(p unsafe.Pointer, src []byte) {
	if runtime.GOARCH == "riscv64" && uintptr(unsafe.Pointer(&src[0]))&7 != 0 {
		slowStoreWords(p, src)
		return
	}
	for i := 0; i < len(src); i += storeBurst {
		n := len(src) - i
		if n > storeBurst {
			n = storeBurst
		}
		copyWords(unsafe.Add(p, i), unsafe.Pointer(&src[i]), uint64(n)/8)
	}
}

// loadWords reads dst, whole words, from device memory at p, aligned to 8.
func loadWords(dst []byte, p unsafe.Pointer) {
	if runtime.GOARCH == "riscv64" && uintptr(unsafe.Pointer(&dst[0]))&7 != 0 {
		slowLoadWords(dst, p)
		return
	}
	for i := 0; i < len(dst); i += burst {
		n := len(dst) - i
		if n > burst {
			n = burst
		}
		copyWords(unsafe.Pointer(&dst[i]), unsafe.Add(p, i), uint64(n)/8)
	}
}

// clearWords writes n bytes, whole words, of zeros to device memory at p, aligned to 8.
func clearWords(p unsafe.Pointer, n uint64) {
	for i := uint64(0); i < n; i += storeBurst {
		w := n - i
		if w > storeBurst {
			w = storeBurst
		}
		zeroWords(unsafe.Add(p, i), w/8)
	}
}
