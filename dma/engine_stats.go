package dma

import "sync/atomic"

// Counters of a Mover.
const (
	mEngineCopies = iota // transfers that the engine did
	mEngineBytes
	mCPUCopies // copies, or heads and tails of them, that the processor did without asking the engine
	mCPUBytes
	mFailed   // transfers that the engine reported as failed
	mTimeouts // times that a transfer did not end in time
	mAborted  // transfers that were aborted for it
	mRefused  // copies that the engine refused: out of its reach or limits
	mRedone   // of those all, done over again by the processor
	mRedoneBytes
	mOverlaps // copies that waited for an overlapping one
	mSleeps   // waits for the engine's interrupt
	mRescued  // of them, those where the interrupt did not come although a transfer had ended
	mDisabled // 1 where the engine is not used any more
	numMoverCounters
)

var moverCounterNames = [numMoverCounters]string{
	"engine_copies", "engine_bytes", "cpu_copies", "cpu_bytes", "failed", "timeouts", "aborted", "refused",
	"redone", "redone_bytes", "overlaps", "sleeps", "rescued", "disabled",
}

// MoverStats are a Mover's counters, which may be read at any time. The zero value is ready; it must be
// allocated on its own or first in its struct (64-bit alignment on 32-bit machines).
type MoverStats struct{ n [numMoverCounters]uint64 }

// Each calls f with the name and value of each counter.
func (s *MoverStats) Each(f func(name string, v uint64)) {
	for i := range s.n {
		f(moverCounterNames[i], atomic.LoadUint64(&s.n[i]))
	}
}

// Get returns the counter with the given name, 0 where there is none.
func (s *MoverStats) Get(name string) uint64 {
	for i := range moverCounterNames {
		if moverCounterNames[i] == name {
			return atomic.LoadUint64(&s.n[i])
		}
	}
	return 0
}

func (s *MoverStats) add(i int, v uint64) { atomic.AddUint64(&s.n[i], v) }
