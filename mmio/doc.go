// Package mmio accesses memory that may be a device: naturally aligned loads
// and stores of 8, 16, 32 and 64 bits in little-endian byte order, barriers,
// and copy loops that a BAR mapping tolerates.
//
// In the room: Mem (a piece of mapped memory of a known kind), the barriers,
// the copies, and the assembly stubs behind them. Never in it: what the bytes
// mean (rings, link page), bus addresses, file descriptors, mmap.
//
// Rules (docs/architecture.md, "Memory"):
//
//   - Memory of kind WriteCombining or Uncached is touched by the stubs of this
//     package alone, never by Go's copy or clear, sync/atomic, or a system call.
//   - A []byte view exists for cached memory only, and only through RAM.
//   - Every access is opaque to the compiler or a single Go load or store, which
//     the Go memory model forbids to tear or repeat.
package mmio
