//go:build gc && (amd64 || arm64 || ppc64 || ppc64le || riscv64)

package mmio

import "unsafe"

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

// The barriers between processors, for cached memory. The call alone keeps the
// compiler from moving accesses across.

func weakRead()
func weakWrite()
func weakFull()

// The barriers towards devices.

func strongRead()
func strongWrite()
func strongFull()
