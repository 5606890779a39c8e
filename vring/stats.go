package vring

import (
	"sync/atomic"
	"unsafe"

	"github.com/boardlink/boardlink/mmio"
)

// Counters is a snapshot of what a side of a queue has done.
type Counters struct {
	// Chains counts those added (driver side) or popped (device side; unpopped ones
	// are taken off again), Bytes the bytes of their buffers.
	Chains, Bytes uint64
	// Done counts the chains reaped (driver side) or completed (device side),
	// DoneBytes what the device wrote into them.
	Done, DoneBytes uint64
	// Published counts the writes of this side's index: the batches.
	Published uint64
	// IndexReads counts the reads of the other side's index, IndexMoved those that
	// found something.
	IndexReads, IndexMoved uint64
	// Notify counts the batches for which the other side wanted a kick or a call,
	// Suppressed those for which it did not.
	Notify, Suppressed uint64
	// Arms counts ArmKick or ArmCall, ArmPending those that found something and so
	// avoided a sleep, FlushReads the reads back across the bus that they needed.
	Arms, ArmPending, FlushReads uint64
	// Errors counts what this side refused: at most one that broke the queue, and
	// the errors of the caller.
	Errors uint64
}

// counters is Counters as its owner keeps it; the order is that of the constants.
const (
	cChains = iota
	cBytes
	cDone
	cDoneBytes
	cPublished
	cIndexReads
	cIndexMoved
	cNotify
	cSuppressed
	cArms
	cArmPending
	cFlushReads
	cErrors
	nCounters
)

// Stats are the live counters of one side of a queue: written by its owner, once a
// batch, and read by any goroutine through Load.
type Stats struct {
	v   [nCounters]uint64 // first in an allocation of its own: aligned to 64 bits everywhere
	own [nCounters]uint64 // the owner's copy
}

// wide tells that an aligned 64-bit access is one access.
const wide = ^uintptr(0)>>32 != 0

// add counts n more. Only the owner writes, so a plain store is enough where it
// does not tear, and costs a fraction of a locked one.
func (s *Stats) add(i int, n uint64) {
	s.own[i] += n
	if wide {
		mmio.Store64(unsafe.Pointer(&s.v[i]), s.own[i])
		return
	}
	atomic.StoreUint64(&s.v[i], s.own[i])
}

func (s *Stats) get(i int) uint64 {
	if wide {
		return mmio.Load64(unsafe.Pointer(&s.v[i]))
	}
	return atomic.LoadUint64(&s.v[i])
}

// Load returns the counters; each is read on its own, not all at one instant.
func (s *Stats) Load() Counters {
	return Counters{
		Chains:     s.get(cChains),
		Bytes:      s.get(cBytes),
		Done:       s.get(cDone),
		DoneBytes:  s.get(cDoneBytes),
		Published:  s.get(cPublished),
		IndexReads: s.get(cIndexReads),
		IndexMoved: s.get(cIndexMoved),
		Notify:     s.get(cNotify),
		Suppressed: s.get(cSuppressed),
		Arms:       s.get(cArms),
		ArmPending: s.get(cArmPending),
		FlushReads: s.get(cFlushReads),
		Errors:     s.get(cErrors),
	}
}
