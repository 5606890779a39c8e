package export

import (
	"math/bits"
	"sync"
)

// Buffers of the sizes 1<<minBuffer to 1<<maxBuffer are kept for the next request.
const (
	minBuffer = 12
	maxBuffer = 21
)

var buffers [maxBuffer - minBuffer + 1]sync.Pool

// sizeClass returns which of buffers has room for n bytes; false: none.
func sizeClass(n uint32) (int, bool) {
	if n <= 1<<minBuffer {
		return 0, true
	}
	c := bits.Len32(n-1) - minBuffer
	return c, c < len(buffers)
}

// takeBuffer returns a buffer of at least n bytes, with any content.
func takeBuffer(n uint32) *[]byte {
	c, ok := sizeClass(n)
	if !ok {
		b := make([]byte, n)
		return &b
	}
	if b, ok := buffers[c].Get().(*[]byte); ok {
		return b
	}
	b := make([]byte, 1<<(minBuffer+c))
	return &b
}

// giveBuffer gives a buffer back that nobody uses any more.
func giveBuffer(b *[]byte) {
	if c, ok := sizeClass(uint32(len(*b))); ok && len(*b) == 1<<(minBuffer+c) {
		buffers[c].Put(b)
	}
}
