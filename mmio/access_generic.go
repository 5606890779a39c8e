//go:build !gc || !(amd64 || arm64 || ppc64 || ppc64le || riscv64)

package mmio

import "unsafe"

// wordAccesses is the number of bus accesses that one 64-bit access makes: two
// where a pointer, and so a register, has 32 bits.
const wordAccesses = 8 / unsafe.Sizeof(uintptr(0))

// Load8 returns the byte at p with one access.
//
//go:noinline
func Load8(p unsafe.Pointer) uint8 { return *(*uint8)(p) }

// Load16 returns the little-endian 16 bits at p, which must be aligned to 2,
// with one access.
//
//go:noinline
func Load16(p unsafe.Pointer) uint16 { return le16(*(*uint16)(p)) }

// Load32 returns the little-endian 32 bits at p, which must be aligned to 4,
// with one access.
//
//go:noinline
func Load32(p unsafe.Pointer) uint32 { return le32(*(*uint32)(p)) }

// Load64 returns the little-endian 64 bits at p, which must be aligned to 8,
// with one access (two of 32 bits, low half first, on 32-bit processors).
//
//go:noinline
func Load64(p unsafe.Pointer) uint64 {
	if wordAccesses == 1 {
		return le64(*(*uint64)(p))
	}
	lo := Load32(p)
	return uint64(lo) | uint64(Load32(unsafe.Add(p, 4)))<<32
}

// Store8 writes the byte at p with one access.
//
//go:noinline
func Store8(p unsafe.Pointer, v uint8) { *(*uint8)(p) = v }

// Store16 writes 16 bits, little-endian, at p, which must be aligned to 2, with
// one access.
//
//go:noinline
func Store16(p unsafe.Pointer, v uint16) { *(*uint16)(p) = le16(v) }

// Store32 writes 32 bits, little-endian, at p, which must be aligned to 4, with
// one access.
//
//go:noinline
func Store32(p unsafe.Pointer, v uint32) { *(*uint32)(p) = le32(v) }

// Store64 writes 64 bits, little-endian, at p, which must be aligned to 8, with
// one access (two of 32 bits, low half first, on 32-bit processors).
//
//go:noinline
func Store64(p unsafe.Pointer, v uint64) {
	if wordAccesses == 1 {
		*(*uint64)(p) = le64(v)
		return
	}
	Store32(p, uint32(v))
	Store32(unsafe.Add(p, 4), uint32(v>>32))
}

func storeWords(p unsafe.Pointer, src []byte) { slowStoreWords(p, src) }
func loadWords(dst []byte, p unsafe.Pointer)  { slowLoadWords(dst, p) }

func clearWords(p unsafe.Pointer, n uint64) {
	for i := uint64(0); i < n; i += 8 {
		Store64(unsafe.Add(p, i), 0)
	}
}
