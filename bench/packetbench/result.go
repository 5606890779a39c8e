//go:build linux

package packetbench

import (
	"github.com/boardlink/boardlink/bench/benchkit"
)

// Result is what was measured.
type Result struct {
	Direction Direction `json:"direction"`
	Ring      string    `json:"ring"`
	Placement string    `json:"placement"`
	Memory    string    `json:"memory"`
	Bytes     int       `json:"bytes"`
	Bytes2    int       `json:"bytes_max,omitempty"`
	Size      int       `json:"ring_size"`
	Batch     int       `json:"batch"`
	Sleep     bool      `json:"sleep"`
	EventIdx  bool      `json:"event_idx"`
	InOrder   bool      `json:"in_order"`
	Verify    bool      `json:"verify"`
	CPU       [2]int    `json:"cpu"`
	Frames    uint64    `json:"frames"`            // of all runs
	Stamped   uint64    `json:"stamped,omitempty"` // of them, those of Echo's runs for Latency: every other run, which Mpps leaves out
	// Mpps and Gbps are medians of the runs, of the frames' own bytes: no header, no gaps.
	Mpps benchkit.Spread `json:"mpps"`
	Gbps float64         `json:"gbit_per_s"`
	// RoundTripNS is that of a cache line between the two processors, the median; RoundTrips the time of a frame in units of it, run by run.
	RoundTripNS float64  `json:"round_trip_ns"`
	RoundTrips  float64  `json:"round_trips_per_packet"`
	Runs        []Sample `json:"runs"`
	// Latency is there for Echo: from one frame to the next.
	Latency *benchkit.Latency `json:"latency,omitempty"`
	// Of each frame, the accesses across the bus by the two sides.
	Driver benchkit.Bus `json:"driver_bus"`
	Device benchkit.Bus `json:"device_bus"`
	// Of each frame, how often the sides slept, and rang. Rescued sleeps are those that a time-out ended although there was work.
	Sleeps  float64 `json:"sleeps_per_packet"`
	Rings   float64 `json:"rings_per_packet"`
	Rescued uint64  `json:"rescued"`
	Corrupt uint64  `json:"corrupt"` // frames that were not what was sent
}

// Sample is one of the runs. Before and After are the round trips around it, in nanoseconds.
type Sample struct {
	Mpps   float64 `json:"mpps"`
	Before float64 `json:"round_trip_before_ns"`
	After  float64 `json:"round_trip_after_ns"`
}
