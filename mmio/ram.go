package mmio

import (
	"fmt"
	"sync/atomic"
	"unsafe"
)

// The word accessors of RAM are single Go loads and stores that the compiler
// inlines. They order nothing: the barriers, Publish32 and Consume32 do. Offset and base
// must both be aligned to the width; an access outside or misaligned panics.

// Fault is what an access outside its memory, or a misaligned one, panics with: a
// programmer's error. It is a value, so that the accessors stay small enough to be inlined.
type Fault struct {
	Off   uint64 // of the access, in bytes
	Size  uint64 // of the memory, in bytes
	Width uint64 // of the access, in bytes
}

// Error names the access and the memory.
func (f Fault) Error() string {
	return fmt.Sprintf("mmio: access of %d bytes at offset %#x, misaligned or outside a memory of %#x bytes", f.Width, f.Off, f.Size)
}

// bad tells that an access is not allowed. An aligned off has zeros below the
// width, so off|mask is its last byte and cannot overflow.
func (r RAM) bad(off, mask uint64) bool {
	return (uint64(uintptr(r.base))|off)&mask != 0 || off|mask >= r.size
}

// Size returns the size in bytes.
func (r RAM) Size() uint64 { return r.size }

// Slice returns the n bytes at off as a piece of their own. It panics where they
// do not lie inside r.
func (r RAM) Slice(off, n uint64) RAM {
	if n == 0 || off > r.size || n > r.size-off {
		panic(fmt.Sprintf("mmio: %#x bytes at offset %#x do not lie in a memory of %#x bytes", n, off, r.size))
	}
	return RAM{base: unsafe.Add(r.base, off), size: n}
}

// Load16 returns the little-endian 16 bits at off.
func (r RAM) Load16(off uint64) uint16 {
	if r.bad(off, 1) {
		panic(Fault{off, r.size, 2})
	}
	return le16(*(*uint16)(unsafe.Add(r.base, off)))
}

// Load32 returns the little-endian 32 bits at off.
func (r RAM) Load32(off uint64) uint32 {
	if r.bad(off, 3) {
		panic(Fault{off, r.size, 4})
	}
	return le32(*(*uint32)(unsafe.Add(r.base, off)))
}

// Load64 returns the little-endian 64 bits at off. On 32-bit processors it is two
// loads of 32 bits in either order.
func (r RAM) Load64(off uint64) uint64 {
	if r.bad(off, 7) {
		panic(Fault{off, r.size, 8})
	}
	return le64(*(*uint64)(unsafe.Add(r.base, off)))
}

// Load64Pair returns the little-endian 64 bits at off, and the next 64: two loads, one check.
// off must be a multiple of 16; the base need be aligned to 8 bytes only.
func (r RAM) Load64Pair(off uint64) (uint64, uint64) {
	if off&8 != 0 || r.bad(off|8, 7) {
		panic(Fault{off, r.size, 16})
	}
	p := unsafe.Add(r.base, off)
	return le64(*(*uint64)(p)), le64(*(*uint64)(unsafe.Add(p, 8)))
}

// Store16 writes 16 bits, little-endian, at off.
func (r RAM) Store16(off uint64, v uint16) {
	if r.bad(off, 1) {
		panic(Fault{off, r.size, 2})
	}
	*(*uint16)(unsafe.Add(r.base, off)) = le16(v)
}

// Store32 writes 32 bits, little-endian, at off.
func (r RAM) Store32(off uint64, v uint32) {
	if r.bad(off, 3) {
		panic(Fault{off, r.size, 4})
	}
	*(*uint32)(unsafe.Add(r.base, off)) = le32(v)
}

// Store64 writes 64 bits, little-endian, at off. On 32-bit processors it is two
// stores of 32 bits in either order.
func (r RAM) Store64(off uint64, v uint64) {
	if r.bad(off, 7) {
		panic(Fault{off, r.size, 8})
	}
	*(*uint64)(unsafe.Add(r.base, off)) = le64(v)
}

// Consume32 is Mem.Consume32.
func (r RAM) Consume32(off uint64) uint32 {
	if r.bad(off, 3) {
		panic(Fault{off, r.size, 4})
	}
	return le32(atomic.LoadUint32((*uint32)(unsafe.Add(r.base, off))))
}

// CompareAndSwap32 writes v at off, little-endian, if the word there is old, and tells whether it did. It is
// atomic towards other processes that have the memory mapped. Of the accesses before and after it, none
// passes it where it has written.
func (r RAM) CompareAndSwap32(off uint64, old, v uint32) bool {
	if r.bad(off, 3) {
		panic(Fault{off, r.size, 4})
	}
	return atomic.CompareAndSwapUint32((*uint32)(unsafe.Add(r.base, off)), le32(old), le32(v))
}

// Publish32 is Mem.Publish32.
func (r RAM) Publish32(off uint64, v uint32) {
	if r.bad(off, 3) {
		panic(Fault{off, r.size, 4})
	}
	atomic.StoreUint32((*uint32)(unsafe.Add(r.base, off)), le32(v))
}
