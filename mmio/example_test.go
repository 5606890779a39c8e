package mmio_test

import (
	"fmt"

	"github.com/boardlink/boardlink/mmio"
)

// Memory that may be a device's is read and written in aligned words, little-endian on every machine.
func Example() {
	m := mmio.FromBytes(make([]byte, 64))
	m.Store32(8, 0x11223344)
	m.CopyIn(16, []byte("a frame"))
	b := make([]byte, 7)
	m.CopyOut(b, 16)
	fmt.Printf("%#x %#x %s\n", m.Load32(8), m.Load16(8), b)
	// Output: 0x11223344 0x3344 a frame
}
