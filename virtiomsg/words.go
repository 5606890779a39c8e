package virtiomsg

import (
	"encoding/binary"
	"sync/atomic"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
)

// words reads and writes control words of the window, and counts them where they cross
// the bus.
type words struct {
	mem  mmio.Mem
	acct *dma.Account // nil: this side does not reach the window across the bus
	wide bool         // 64-bit accesses: device memory, where each one costs
}

func newWords(r dma.Region) words {
	w := words{mem: r.Mem, wide: r.Mem.Kind() != mmio.Cached || r.Mem.Modelled()}
	if r.Across {
		w.acct = r.Account
	}
	return w
}

func (w *words) reads(n uint64) {
	if w.acct != nil {
		atomic.AddUint64(&w.acct.ControlReads, n)
	}
}

func (w *words) writes(n uint64) {
	if w.acct != nil {
		atomic.AddUint64(&w.acct.ControlWrites, n)
	}
}

// load32 loads a word that the peer may be writing and keeps later accesses behind it.
func (w *words) load32(off uint64) uint32 {
	w.reads(1)
	return w.mem.Consume32(off)
}

// load64 loads two neighbouring words, the one at off no later than the other one, and keeps
// later accesses behind both.
func (w *words) load64(off uint64) (lo, hi uint32) {
	if !w.wide {
		// Two acquires: the race detector knows nothing of wider accesses.
		w.reads(2)
		lo = w.mem.Consume32(off)
		hi = w.mem.Consume32(off + 4)
		return lo, hi
	}
	w.reads(1)
	v := w.mem.Load64(off)
	w.mem.Barrier(mmio.ReadBarrier)
	return uint32(v), uint32(v >> 32)
}

func (w *words) loadU64(off uint64) uint64 {
	lo, hi := w.load64(off)
	return uint64(hi)<<32 | uint64(lo)
}

// store32 stores a word behind everything stored before.
func (w *words) store32(off uint64, v uint32) {
	w.writes(1)
	w.mem.Publish32(off, v)
}

// loadSlot copies a slot out of the window, each word once.
func (w *words) loadSlot(off uint64, s *Slot) {
	w.reads(SlotSize / 8)
	for i := uint64(0); i < SlotSize; i += 8 {
		binary.LittleEndian.PutUint64(s[i:], w.mem.Load64(off+i))
	}
}

// storeSlot copies a slot into the window.
func (w *words) storeSlot(off uint64, s *Slot) {
	w.writes(SlotSize / 8)
	for i := uint64(0); i < SlotSize; i += 8 {
		w.mem.Store64(off+i, binary.LittleEndian.Uint64(s[i:]))
	}
}
