//go:build linux

package ringbench

import (
	"fmt"
	"slices"
	"strconv"

	"github.com/boardlink/boardlink/bench/benchkit"
	"github.com/boardlink/boardlink/dma"
)

// Result is what was measured.
type Result struct {
	Ring        string `json:"ring"`
	Placement   string `json:"placement"`
	Memory      string `json:"memory"`
	Size        int    `json:"size"`
	Batch       int    `json:"batch"`
	Outstanding int    `json:"outstanding"`
	Sleep       bool   `json:"sleep"`
	EventIdx    bool   `json:"event_idx"`
	InOrder     bool   `json:"in_order"`
	Write       bool   `json:"write"`
	Buffers     int    `json:"buffers"`
	CPU         []int  `json:"cpu"`
	// NS is the time for a buffer, there and back, RoundTripNS that of a cache line between the two processors, measured around
	// each run; Ratio is the first in units of the second, run by run. All are medians; Best is the fastest run in units of the median round trip:
	// what remains where other programs disturb most runs.
	NS          float64  `json:"ns_per_buffer"`
	RoundTripNS float64  `json:"round_trip_ns"`
	Ratio       float64  `json:"round_trips_per_buffer"`
	Best        float64  `json:"best_round_trips_per_buffer"`
	Runs        []Sample `json:"runs"`
	// Each buffer's accesses across the bus, of the two sides, over all runs.
	Driver Bus `json:"driver_bus"`
	Device Bus `json:"device_bus"`
	// Idle is how often a side looked for each buffer and found nothing: polling, each look across the bus is a read
	// that is counted above.
	Idle float64 `json:"idle_polls_per_buffer"`
	// InVain is how many of the reads across were such looks: what is left without them does not depend on who waits for whom.
	InVain float64 `json:"reads_in_vain"`
	// With Sleep, how often each side slept for each buffer, and rang.
	Sleeps float64 `json:"sleeps_per_buffer"`
	Rings  float64 `json:"rings_per_buffer"`
	Lost   uint64  `json:"lost_wakeups"` // found by a time-out of a second: a defect
}

// Sample is one of the runs.
type Sample struct {
	NS          float64 `json:"ns_per_buffer"`
	RoundTripNS float64 `json:"round_trip_ns"`
}

// Bus is what went across, for each buffer.
type Bus struct {
	Reads      float64 `json:"reads"`
	Writes     float64 `json:"writes"`
	ReadBytes  float64 `json:"read_bytes"`
	WriteBytes float64 `json:"write_bytes"`
	FlushReads float64 `json:"flush_reads"`
	// Areas is the same, by area: "descriptor", "driver", "device". There is no payload.
	Areas map[string]Bus `json:"areas,omitempty"`
}

func perQueue(a *dma.QueueAccount, n float64) Bus {
	b := Bus{Areas: make(map[string]Bus)}
	for name, acc := range map[string]dma.Account{"descriptor": a.Descriptor, "driver": a.Driver, "device": a.Device} {
		p := perBuffer(acc, n)
		b.Areas[name] = p
		b.Reads += p.Reads
		b.Writes += p.Writes
		b.ReadBytes += p.ReadBytes
		b.WriteBytes += p.WriteBytes
		b.FlushReads += p.FlushReads
	}
	return b
}

// summarise takes the medians from the runs.
func (r *Result) summarise() {
	var ns, trip, ratio []float64
	for _, s := range r.Runs {
		ns, trip, ratio = append(ns, s.NS), append(trip, s.RoundTripNS), append(ratio, s.NS/s.RoundTripNS)
	}
	r.NS, r.RoundTripNS, r.Ratio = benchkit.Median(ns), benchkit.Median(trip), benchkit.Median(ratio)
	r.Best = slices.Min(ns) / r.RoundTripNS
}

// Add takes the runs of another measurement with the same configuration into r: those that were made in turns with others.
func (r *Result) Add(o *Result) {
	a, b := float64(len(r.Runs)*r.Buffers), float64(len(o.Runs)*o.Buffers)
	mean := func(p *float64, v float64) { *p = (*p*a + v*b) / (a + b) }
	bus := func(to *Bus, from Bus) {
		mean(&to.Reads, from.Reads)
		mean(&to.Writes, from.Writes)
		mean(&to.ReadBytes, from.ReadBytes)
		mean(&to.WriteBytes, from.WriteBytes)
		mean(&to.FlushReads, from.FlushReads)
	}
	for _, d := range []struct{ to, from *Bus }{{&r.Driver, &o.Driver}, {&r.Device, &o.Device}} {
		bus(d.to, *d.from)
		for name, area := range d.to.Areas {
			bus(&area, d.from.Areas[name])
			d.to.Areas[name] = area
		}
	}
	mean(&r.Idle, o.Idle)
	mean(&r.InVain, o.InVain)
	mean(&r.Sleeps, o.Sleeps)
	mean(&r.Rings, o.Rings)
	r.Lost += o.Lost
	r.Runs = append(r.Runs, o.Runs...)
	r.summarise()
}

func perBuffer(a dma.Account, n float64) Bus {
	return Bus{Reads: float64(a.Reads) / n, Writes: float64(a.Writes) / n, ReadBytes: float64(a.ReadBytes) / n,
		WriteBytes: float64(a.WriteBytes) / n, FlushReads: float64(a.FlushReads) / n}
}

// String is the result in a line.
func (r *Result) String() string {
	how := "polling"
	if r.Sleep {
		how = "sleeping"
	}
	if r.InOrder {
		how += ", in order"
	}
	return fmt.Sprintf("%s, %s, batch %d of %d, %s: %.1f ns a buffer, %.3f round trips of %.0f ns (at best %.3f); bus: %s reads, %s writes",
		r.Ring, r.Placement, r.Batch, r.Outstanding, how, r.NS, r.Ratio, r.RoundTripNS, r.Best,
		strconv.FormatFloat(r.Driver.Reads+r.Device.Reads, 'f', 2, 64), strconv.FormatFloat(r.Driver.Writes+r.Device.Writes, 'f', 2, 64))
}
