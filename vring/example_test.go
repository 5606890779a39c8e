package vring_test

import (
	"fmt"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/vring"
)

// Both sides of a split virtqueue in one memory: a buffer goes to the device and comes back.
func Example() {
	const base = 0x1000
	mem := dma.Region{Name: "memory", Addr: base, Mem: mmio.FromBytes(make([]byte, 8192)), Access: dma.DeviceRead | dma.DeviceWrite}
	table, err := dma.NewTable(mem)
	if err != nil {
		fmt.Println(err)
		return
	}
	var ref dma.TableRef
	ref.Store(table)
	at := func(off, n uint64) dma.Span { return dma.Span{Region: &mem, Off: off, Len: uint32(n)} }
	desc, driver, device := vring.SplitSizes(8)
	c := vring.Config{Name: "net0 tx0", Size: 8, Desc: at(0, desc), Driver: at(1024, driver), Device: at(2048, device)}
	drv, err := vring.NewSplitDriver(c)
	if err != nil {
		fmt.Println(err)
		return
	}
	c.Table = &ref
	dev, err := vring.NewSplitDevice(c)
	if err != nil {
		fmt.Println(err)
		return
	}

	at(4096, 5).CopyIn(0, []byte("hello"))
	drv.Add([]vring.Request{{Bufs: []vring.Buffer{{Addr: base + 4096, Len: 5}}, Readable: 1, Token: 7}})

	var b vring.Batch
	n, err := dev.Pop(&b, 8)
	text := make([]byte, b.Chains[0].ReadLen)
	b.Spans[0].CopyOut(text, 0)
	fmt.Printf("%d %s %v\n", n, text, err)
	dev.Complete([]vring.Used{{ID: b.Chains[0].ID, Count: b.Chains[0].Count}})

	done := make([]vring.Completion, 8)
	n, err = drv.Reap(done)
	fmt.Println(n, done[0].Token, err)
	// Output:
	// 1 hello <nil>
	// 1 7 <nil>
}
