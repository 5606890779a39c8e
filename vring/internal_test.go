package vring

import "testing"

// The definition (virtio 1.2, 2.7.7.2): an index that moves from old to new, one step at a
// time, notifies if it steps over event. Exhaustive over new and old for one event; a
// few more events show that the differences alone count.
func TestNeedEvent(t *testing.T) {
	stride := 1
	if testing.Short() || RaceEnabled {
		stride = 61
	}
	needEventOver(t, 0x1234, stride)
	needEventOver(t, 0, 509)
	needEventOver(t, 65535, 509)
}

func needEventOver(t *testing.T, event uint16, stride int) {
	for o := 0; o < 1<<16; o += stride {
		old := uint16(o)
		first := uint16(event - old) // a move by more than this passes event
		bad := 0
		for d := 0; d < 1<<16; d++ {
			if needEvent(event, old+uint16(d), old) != (d > int(first)) {
				bad++
			}
		}
		if bad != 0 {
			t.Fatalf("event %d, from %d: %d of 65536 moves are wrong", event, old, bad)
		}
	}
}

func TestSplitSizes(t *testing.T) {
	for _, tt := range [][4]uint64{{1, 16, 8, 14}, {8, 128, 22, 70}, {256, 4096, 518, 2054}, {32768, 524288, 65542, 262150}} {
		d, a, u := SplitSizes(uint16(tt[0]))
		if d != tt[1] || a != tt[2] || u != tt[3] {
			t.Errorf("%d: %d, %d, %d", tt[0], d, a, u)
		}
	}
}
