// Package dma knows where bytes are: memory regions, the region table that
// translates a peer's addresses to local memory, spans, allocation inside a region,
// copies, and the engines that move payload.
//
// In the room: Region, Table, Span, Allocator, Account, Engine. Never in it: rings,
// devices, file descriptors, mmap; how a single word is accessed (package mmio).
package dma
