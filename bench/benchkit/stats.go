//go:build linux

package benchkit

import (
	"fmt"
	"slices"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// Median returns the middle of v, 0 of nothing. It leaves v as it is.
func Median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(v))
	n := len(s)
	return (s[(n-1)/2] + s[n/2]) / 2
}

// Spread is where several runs lie.
type Spread struct {
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
	N      int     `json:"n"`
}

// SpreadOf returns where the values lie; all 0 of nothing.
func SpreadOf(v []float64) Spread {
	if len(v) == 0 {
		return Spread{}
	}
	return Spread{Median(v), slices.Min(v), slices.Max(v), len(v)}
}

// String is "median (min..max)".
func (s Spread) String() string { return fmt.Sprintf("%.4g (%.4g..%.4g)", s.Median, s.Min, s.Max) }

// Histogram counts times of 1 ns to a minute with three digits. One goroutine uses it at a time.
type Histogram struct{ h *hdrhistogram.Histogram }

// NewHistogram returns an empty one.
func NewHistogram() *Histogram { return &Histogram{hdrhistogram.New(1, int64(time.Minute), 3)} }

// Record counts a time; what is below or above the range counts at its end. It does not allocate.
func (h *Histogram) Record(d time.Duration) {
	h.h.RecordValue(min(max(int64(d), 1), int64(time.Minute))) // cannot fail inside the range
}

// Reset forgets everything.
func (h *Histogram) Reset() { h.h.Reset() }

// Latency is a distribution of times, in nanoseconds.
type Latency struct {
	Count int64   `json:"count"`
	Mean  float64 `json:"mean_ns"`
	Min   int64   `json:"min_ns"`
	P50   int64   `json:"p50_ns"`
	P99   int64   `json:"p99_ns"`
	P999  int64   `json:"p999_ns"`
	Max   int64   `json:"max_ns"`
}

// Latency returns what has been recorded.
func (h *Histogram) Latency() Latency {
	if h.h.TotalCount() == 0 {
		return Latency{}
	}
	return Latency{Count: h.h.TotalCount(), Mean: h.h.Mean(), Min: h.h.Min(), P50: h.h.ValueAtQuantile(50), P99: h.h.ValueAtQuantile(99),
		P999: h.h.ValueAtQuantile(99.9), Max: h.h.Max()}
}

// Micros writes nanoseconds as microseconds, with three digits or so.
func Micros(ns float64) string {
	us := ns / 1e3
	switch {
	case us < 10:
		return fmt.Sprintf("%.2f", us)
	case us < 100:
		return fmt.Sprintf("%.1f", us)
	}
	return fmt.Sprintf("%.0f", us)
}
