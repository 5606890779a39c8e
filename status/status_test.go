package status

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestCounters(t *testing.T) {
	got := Counters(struct {
		Reads, ReadBytes, FIFOFull uint64
		hidden                     uint64
		Name                       string
	}{1, 2, 3, 4, "x"})
	if d := cmp.Diff(map[string]uint64{"reads": 1, "read_bytes": 2, "fifo_full": 3}, got); d != "" {
		t.Fatal(d)
	}
}
