package virtiomsg

import "unsafe"

// bytesOf is the memory of words as bytes, aligned to 8.
func bytesOf(words []uint64) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(&words[0])), 8*len(words))
}
