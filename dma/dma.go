package dma

import (
	"sync/atomic"

	"github.com/boardlink/boardlink/mmio"
)

// Addr is a link address: what descriptors and queue set-up messages carry. For
// memory of the board it is the board's bus address, the same number on both
// sides; the region table of each side translates it to local memory.
type Addr uint64

// Access tells what the virtio device side may do with a region.
type Access uint8

const (
	// DeviceRead lets the device side read the region.
	DeviceRead Access = 1 << iota
	// DeviceWrite lets the device side write the region.
	DeviceWrite
)

// String returns "-", "r", "w" or "rw".
func (a Access) String() string {
	switch a & (DeviceRead | DeviceWrite) {
	case DeviceRead:
		return "r"
	case DeviceWrite:
		return "w"
	case DeviceRead | DeviceWrite:
		return "rw"
	}
	return "-"
}

// Account counts what crosses the bus. All fields are updated with sync/atomic;
// an Account must be allocated on its own or first in its struct (64-bit alignment
// on 32-bit machines). The reads and writes are transactions as the processor issues
// them: one for each load or store, one for each 64 bytes (or part) of a bulk
// access by a system call or by the runtime's copy. What hardware gathers (stores to write-combining memory, streaming
// loads from it) is fewer on the bus.
type Account struct {
	Reads, ReadBytes            uint64 // data path
	Writes, WriteBytes          uint64
	ControlReads, ControlWrites uint64 // link page, FIFOs, heartbeat
	FlushReads                  uint64 // read back before sleeping
}

// AddReads counts n reads of bytes in all. A nil Account counts nothing.
func (a *Account) AddReads(n, bytes uint64) {
	if a != nil {
		atomic.AddUint64(&a.Reads, n)
		atomic.AddUint64(&a.ReadBytes, bytes)
	}
}

// AddWrites counts n writes of bytes in all. A nil Account counts nothing.
func (a *Account) AddWrites(n, bytes uint64) {
	if a != nil {
		atomic.AddUint64(&a.Writes, n)
		atomic.AddUint64(&a.WriteBytes, bytes)
	}
}

// Region is a range of link addresses and the local memory behind it. The owner of
// the mapping keeps it mapped as long as any Table that holds the Region is in use.
type Region struct {
	Name   string // for errors and status: "board", "pool"
	Addr   Addr
	Mem    mmio.Mem
	Access Access
	// Across tells that this side reaches the memory across the bus: a read
	// stalls, a write is posted, and going to sleep needs a read-back.
	Across bool
	// Account counts the accesses of this side across the bus; nil does not count.
	Account *Account
}

// Span is a piece of one region: what a translated buffer consists of. It is a value;
// it stays valid as long as the Region is mapped.
type Span struct {
	Region *Region
	Off    uint64 // in bytes from the region's start
	Len    uint32
}
