package mmio

import (
	"fmt"
	"unsafe"
)

// Widths are how many bytes a copy moves with one load from, or store to, mapped device memory: at most 8, or 16, 32 or 64 with
// vector registers. Wider accesses are naturally aligned as narrow ones are. Words outside a copy (Load32, Publish32) have
// their own width, and cached and modelled memory is copied without regard to it.
//
// What is known, and what not:
//
//   - Vector accesses to device memory are legal on x86, whatever its kind. Other processors may refuse or tear them (PowerPC, Arm): there is
//     nothing above 8 bytes for them here.
//   - A load from write-combining memory is one read on the bus, of its width; but streaming loads (MOVNTDQA) fetch a line of 64 bytes at once
//     (Intel SDM volume 1, 12.10.3), the neighbours of what was asked for included, which such memory permits. The authors of gdrcopy report
//     670 MB/s with them from a board that gave 1.5 MB/s without.
//   - MOVNTDQA on uncached memory is a plain load of its width. Whether that is one read on the bus is the processor's business.
//   - Stores to write-combining memory that come in order are gathered to 64 bytes, whatever their width: wider ones spare instructions, and
//     over RAM string moves are as fast. They are plain stores, not streaming ones (MOVNTDQ): on write-combining memory that makes
//     no difference, and RAM that is only seen as such (loopback) would be driven out of the caches.
//   - MOVDIR64B would write 64 bytes at once to uncached memory too. It is not used: no processor with it was there to try.
//   - Where a hypervisor models a device, each access is an instruction that it emulates, and KVM, for one, ends the virtual machine at a vector
//     instruction that it does not know. Linux' i915 driver keeps streaming loads from virtual machines for that reason.
//
// There was no board with write-combining memory to measure: the defaults go by the above. Over RAM, streaming loads take twice the
// time of string moves.
type Widths struct {
	Load, Store uint8
}

// words are the widths that every processor can do.
var words = Widths{8, 8}

// String returns "16/8" for loads of 16 and stores of 8 bytes.
func (w Widths) String() string { return fmt.Sprintf("%d/%d", w.Load, w.Store) }

// Widest returns the greatest widths that this processor, and the system on it, can do.
func Widest() Widths { return widest }

// Emulated tells that a hypervisor runs this system, and so may emulate what is done to device memory: vector accesses may then end the
// virtual machine. Memory that the hypervisor has put behind the BAR (ivshmem) or passed through can be told from that by nobody but the
// operator.
func Emulated() bool { return emulated }

// DefaultWidths returns the widths that NewMem gives memory of kind k: 8 bytes, but loads of 16 from write-combining memory where
// the processor has streaming loads and no hypervisor is below.
func DefaultWidths(k Kind) Widths { return defaultWidths(k, widest, emulated) }

func defaultWidths(k Kind, can Widths, emulated bool) Widths {
	w := words
	if k == WriteCombining && can.Load >= 16 && !emulated {
		// The loads are streaming ones: four fetch a line. Wider ones fetch no more.
		w.Load = 16
	}
	return w
}

// Widths returns the widths that copies use on mapped device memory.
func (m Mem) Widths() Widths { return m.widths }

// WithWidths returns the memory with other widths, 8 to Widest. It is for measurement, and for an operator who knows better: see Widths, and
// Emulated above all. An error names a width that cannot be.
func (m Mem) WithWidths(w Widths) (Mem, error) {
	for _, v := range [...]struct {
		what      string
		want, max uint8
	}{{"loads", w.Load, widest.Load}, {"stores", w.Store, widest.Store}} {
		if v.want < 8 || v.want > v.max || v.want&(v.want-1) != 0 {
			return m, fmt.Errorf("mmio: %s of %d bytes: a power of two from 8 to %d, which is all that this processor can do", v.what, v.want, v.max)
		}
	}
	m.widths = w
	return m, nil
}

// loadRun reads dst, whole pieces of width bytes, from device memory at p, which is aligned to width.
func loadRun(dst []byte, p unsafe.Pointer, width uint64) {
	if width == 8 {
		loadWords(dst, p)
		return
	}
	for i := 0; i < len(dst); i += burst {
		n := len(dst) - i
		if n > burst {
			n = burst
		}
		loadWide(unsafe.Pointer(&dst[i]), unsafe.Add(p, i), uint64(n), width)
	}
}

// storeRun is the reverse of loadRun.
func storeRun(p unsafe.Pointer, src []byte, width uint64) {
	if width == 8 {
		storeWords(p, src)
		return
	}
	for i := 0; i < len(src); i += storeBurst {
		n := len(src) - i
		if n > storeBurst {
			n = storeBurst
		}
		storeWide(unsafe.Add(p, i), unsafe.Pointer(&src[i]), uint64(n), width)
	}
}

// How many bytes one call into assembly moves at most: the scheduler cannot stop it there. A read
// from a device may take a microsecond for each word; a write is posted, and some ten times as fast.
const (
	burst      = 1024
	storeBurst = 4096
)
