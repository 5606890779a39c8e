// Package dma knows where bytes are: memory regions, the region table that
// translates a peer's addresses to local memory, spans, allocation inside a region,
// copies, and the engines that move payload.
//
// In the room: Region, Table, Span, Allocator, Account, Engine, Mover. Never in it: rings,
// devices, mmap, file descriptors of our own (a Mover polls that of an engine's interrupt); how a
// single word is accessed (package mmio); engines of any make (dma/engine).
package dma
