package status_test

import (
	"encoding/json"
	"testing"

	"github.com/boardlink/boardlink/status"
)

func TestBus(t *testing.T) {
	b := status.Bus{
		Descriptor: status.Traffic{Reads: 1, ReadBytes: 16},
		Driver:     status.Traffic{Reads: 2, ReadBytes: 8, FlushReads: 3},
		Device:     status.Traffic{Writes: 4, WriteBytes: 32},
		Payload:    status.Traffic{Reads: 5, ReadBytes: 40, Writes: 6, WriteBytes: 48},
	}
	if got, want := b.Total(), (status.Traffic{Reads: 8, ReadBytes: 64, Writes: 10, WriteBytes: 80, FlushReads: 3}); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	if got := b.Plus(b).Minus(b); got != b {
		t.Errorf("%+v, want %+v", got, b)
	}
	if got := b.PerFrame(0); got != (status.BusPerFrame{}) {
		t.Errorf("of no frames: %+v", got)
	}
	// The names that scripts read.
	out, err := json.Marshal(b.PerFrame(4))
	if err != nil {
		t.Fatal(err)
	}
	var v struct {
		Packets int
		Reads   float64 `json:"reads_per_packet"`
		Areas   map[string]map[string]float64
	}
	if err := json.Unmarshal(out, &v); err != nil {
		t.Fatal(err)
	}
	if v.Packets != 4 || v.Reads != 2 || v.Areas["driver"]["flush_reads_per_packet"] != 0.75 || v.Areas["payload"]["write_bytes_per_packet"] != 12 ||
		v.Areas["device"]["writes_per_packet"] != 1 || v.Areas["descriptor"]["read_bytes_per_packet"] != 4 {
		t.Errorf("%s", out)
	}
}
