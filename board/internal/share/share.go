// Package share says how one shared memory that stands for both machines' is divided: the memory of a loopback
// board, and BAR 2 of an ivshmem device, which is the same memory seen by PCI. Both ends have to agree.
//
// In the room: the rule. Never in it: mappings.
package share

import "github.com/boardlink/boardlink/dma"

const (
	// MinSize is the least shared memory that is taken for a board, in bytes.
	MinSize = 64 << 10
	// PoolMinSize is the least shared memory, in bytes, that is divided.
	PoolMinSize = 1 << 20
	// BusAddr is what the agent's end declares as bus address of the window's first byte. No bus is
	// there; a number above 32 bits that is not 0 makes a missing translation show.
	BusAddr dma.Addr = 0x12_0000_0000
	// PoolAddr is the bus address of the pool.
	PoolAddr dma.Addr = 0x34_0000_0000
)

// Split divides size bytes: the lower part stands for the board's memory and is the window, the
// upper for the host's and is the pool. Of less than PoolMinSize all is the window.
func Split(size uint64) (window, pool uint64) {
	if size < PoolMinSize {
		return size, 0
	}
	return size / 2, size / 2
}
