package dma_test

import (
	"fmt"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
)

// A table translates what descriptors carry to local memory, and checks the rights.
func ExampleTable() {
	window := mmio.FromBytes(make([]byte, 4096))
	table, err := dma.NewTable(dma.Region{Name: "window", Addr: 0x8000_0000, Mem: window, Access: dma.DeviceRead})
	if err != nil {
		fmt.Println(err)
		return
	}
	spans, err := table.Translate(nil, 0x8000_0100, 64, dma.DeviceRead)
	fmt.Println(len(spans), spans[0].Off, spans[0].Len, err)
	_, err = table.Translate(nil, 0x8000_0100, 64, dma.DeviceWrite)
	fmt.Println(err != nil)
	// Output:
	// 1 256 64 <nil>
	// true
}

// An allocator hands out ranges of a region.
func ExampleAllocator() {
	a := dma.NewAllocator(0x8000_0000, 8192)
	x, _ := a.Alloc(100, 64)
	y, _ := a.Alloc(100, 64)
	fmt.Printf("%#x %#x\n", uint64(x), uint64(y))
	// Output: 0x80000000 0x80000080
}
