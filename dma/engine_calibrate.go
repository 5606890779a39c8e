package dma

import "time"

// calibrateRound is the number of copies in flight that are measured, as in a batch of the data path.
const calibrateRound = 4

// Calibrate finds the length from which on the engine is faster than the processor, from src to
// dst, and makes it Min unless the configuration says one. It overwrites dst, and takes
// about the budget, or a little more where a single transfer takes longer. It returns the length found, Never where the
// processor is faster at all lengths that the spans, and the budget, allow.
func (m *Mover) Calibrate(dst, src Span, budget time.Duration) uint32 {
	if !m.Enabled() && !m.fixed || m.off || m.closed {
		return Never
	}
	kept := m.min
	found := uint32(Never)
	end := time.Now().Add(budget)
	for size := uint32(64); ; size *= 2 {
		if uint64(size)*calibrateRound > uint64(dst.Len) || uint64(size)*calibrateRound > uint64(src.Len) || size > m.caps.MaxLen {
			break
		}
		m.min = Never
		cpu := m.round(dst, src, size)
		m.min = 1
		before := m.stats.Get("engine_copies")
		engine := m.round(dst, src, size)
		switch {
		case m.off || m.stats.Get("engine_copies") == before:
			found = Never // it failed, or the alignment is not the engine's
		case engine >= cpu:
			found = Never
		case found == Never:
			found = size
		}
		if m.off || time.Now().After(end) {
			break
		}
	}
	if m.min = found; m.fixed {
		m.min = kept
	}
	return found
}

// round returns the shortest of three times that a round of copies of one size takes.
func (m *Mover) round(dst, src Span, size uint32) time.Duration {
	best := time.Duration(1<<63 - 1)
	for try := 0; try < 3; try++ {
		began := time.Now()
		for i := uint32(0); i < calibrateRound; i++ {
			if _, err := m.Queue(dst.Sub(i*size, size), src.Sub(i*size, size)); err != nil {
				return best
			}
		}
		m.Wait(m.issued)
		d := time.Since(began)
		if d < best {
			best = d
		}
		if d > 50*time.Millisecond {
			break // a slow one, which two more will not make fast
		}
	}
	return best
}
