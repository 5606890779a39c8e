package virtiomsg_test

import (
	"fmt"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/virtiomsg"
)

// A message crosses a FIFO in shared memory.
func Example() {
	window := dma.Region{Name: "window", Mem: mmio.FromBytes(make([]byte, 4096)), Access: dma.DeviceRead | dma.DeviceWrite}
	p, err := virtiomsg.NewProducer("to the board", window, 0, 8)
	if err != nil {
		fmt.Println(err)
		return
	}
	c, err := virtiomsg.NewConsumer("from the host", window, 0, 8)
	if err != nil {
		fmt.Println(err)
		return
	}
	p.Reset()
	c.Reset()

	var out, in virtiomsg.Slot
	virtiomsg.EncodePing(&out, 1, 42)
	if err := p.Put(&out); err != nil {
		fmt.Println(err)
	}
	ok, err := c.Get(&in)
	data, derr := virtiomsg.DecodePing(&in)
	fmt.Println(ok, err, data, derr)
	// Output: true <nil> 42 <nil>
}
