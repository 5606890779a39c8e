//go:build !gc || !amd64

package mmio

import "unsafe"

var widest, emulated = words, false

// Nobody can ask for more than words.

func loadWide(dst, src unsafe.Pointer, n, width uint64)  { panic("mmio: no wide loads here") }
func storeWide(dst, src unsafe.Pointer, n, width uint64) { panic("mmio: no wide stores here") }
