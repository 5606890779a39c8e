package vring

import (
	"testing"
)

// TestCountersAreWide: counters count beyond 32 bits, and a reader never sees half of one, on machines of 32 bits too.
func TestCountersAreWide(t *testing.T) {
	s := new(Stats)
	const start, step = 1<<32 - 1<<12, 1
	s.add(cBytes, start)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := 0; i < 1<<13; i++ {
			s.add(cBytes, step) // carries into the upper half on the way
		}
	}()
	last := uint64(start)
	for running := true; running; {
		select {
		case <-done:
			running = false
		default:
		}
		v := s.Load().Bytes
		if v < last || v > start+1<<13 {
			t.Fatalf("read %#x after %#x", v, last)
		}
		last = v
	}
	if last != start+1<<13 {
		t.Errorf("%#x, want %#x", last, uint64(start+1<<13))
	}
}
