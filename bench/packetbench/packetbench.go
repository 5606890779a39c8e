//go:build linux

// Package packetbench measures frames through the whole virtio path without an interface: package frames on virtqueues in shared
// memory, the driver side (the board) in this process, the device side (the host) in one that it starts, each on a
// processor of its own. For comparison it runs DPDK's vhost and virtio-user drivers as such a pair, in turns.
//
// In the room: the processes, the loops of both sides, what is measured, DPDK's programs. Never in it: flags, printing, testing.T.
//
// # What is done for each frame
//
// As DPDK's testpmd does it in its modes txonly and rxonly. The sender writes the frame's first 64 bytes, with its number in them; what
// is behind them stays as it is. One copy of the whole frame is made, by the device side (the host), as vhost does: from the ring's
// buffers to memory of its own where it receives, from memory of its own to the ring's buffers where it sends. The driver
// side sends and receives in place, as virtio-user does. The receiver looks at each frame's length and number. (testpmd's looks at
// nothing.) Of Echo the answer goes first, then the buffer back, where the sides poll. With Verify, the sender writes every byte, and the receiver checks a checksum of all.
package packetbench

import (
	"context"
	"encoding/json"
	"runtime/debug"
	"time"

	"github.com/boardlink/boardlink/bench/benchkit"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/frames"
	"golang.org/x/sys/unix"
)

const (
	tripRounds = 2000
	warmUp     = 20000 // frames of the first run, which says how many make a run
)

// told is what the peer reports.
type told struct {
	Bus     dma.QueueAccount
	Bells   doorbell.Counters
	Rings   uint64
	Corrupt uint64
	Dropped uint64
}

func init() {
	// The device side's process. Its files: memory, and the doorbells.
	benchkit.Register("packets", func(order []byte) (any, error) {
		var c Config
		if err := json.Unmarshal(order, &c); err != nil {
			return nil, err
		}
		var t told
		return &t, serve(&c, &t)
	})
}

func serve(c *Config, t *told) error {
	unpin, err := benchkit.Pin(c.CPU[1])
	if err != nil {
		return err
	}
	defer unpin()
	const f = benchkit.FirstFD
	s, err := newSide(c, true, f, []int{f + 1, f + 2, f + 3, f + 4})
	if err != nil {
		return err
	}
	defer s.close()
	for i := 0; i <= c.Runs; i++ { // the first one warms up
		if _, err := s.measure(i, nil); err != nil {
			return err
		}
	}
	s.tell(t)
	return nil
}

func (s *side) tell(t *told) {
	t.Bus, t.Bells, t.Corrupt = *s.mem.Bus, s.counts.Snapshot(), s.corrupt
	for _, st := range s.stats() {
		t.Rings += st.Rings()
		t.Dropped += st.Dropped()
	}
}

func (s *side) stats() (l []*frames.Stats) {
	if s.out != nil {
		l = append(l, s.out.Stats())
	}
	if s.in != nil {
		l = append(l, s.in.Stats())
	}
	return l
}

// measure is one run by either side, between two round trips. The leading side returns how long it took; the other one learns
// from it how many frames it has.
func (s *side) measure(i int, h *benchkit.Histogram) (m Sample, err error) {
	s.Start()
	if m.Before, err = s.line.RoundTrips(tripRounds); err != nil {
		return m, err
	}
	if i == 1 {
		// Forget what was counted while warming up. Nobody else counts meanwhile.
		*s.mem.Bus, *s.counts = dma.QueueAccount{}, doorbell.Counters{}
	}
	if err := s.line.Meet(); err != nil {
		return m, err
	}
	n := int(s.ram.Load64(offOrder))
	start := time.Now()
	if err := s.run(n, h); err != nil {
		return m, err
	}
	if err := s.line.Meet(); err != nil {
		return m, err
	}
	m.Mpps = float64(n) / float64(time.Since(start).Nanoseconds()) * 1e3
	m.After, err = s.line.RoundTrips(tripRounds)
	return m, err
}

// Run measures. Errors name what is wrong with cfg, or with the machine.
func Run(ctx context.Context, cfg Config) (*Result, error) {
	c := cfg
	if err := c.defaults(); err != nil {
		return nil, err
	}
	_, memSize := c.sizes()
	files, fds, err := benchkit.Files("packetbench", int64(2*memSize), 4, unix.EFD_NONBLOCK)
	if err != nil {
		return nil, err
	}
	defer benchkit.CloseFiles(files)
	s, err := newSide(&c, false, fds[0], fds[1:])
	if err != nil {
		return nil, err
	}
	defer s.close()
	r := &Result{Direction: c.Direction, Ring: c.Ring, Placement: c.Placement, Memory: c.Memory, Bytes: c.Bytes, Size: c.Size, Batch: c.Batch,
		Sleep: c.Sleep, EventIdx: c.EventIdx, InOrder: c.InOrder, Verify: c.Verify, CPU: c.CPU}
	if c.Bytes2 > c.Bytes {
		r.Bytes2 = c.Bytes2
	}
	p, err := benchkit.Start(ctx, "packets", &c, files, c.Peer)
	if err != nil {
		return nil, err
	}
	defer p.Stop()
	var t, own told
	gone := func() {
		s.Gone()
		s.stop.Ring()
	}
	err = p.Lead(ctx, benchkit.Sides{Own: "board", Peer: "host"}, func() error { return r.lead(&c, s) }, gone, &t)
	if err != nil {
		return nil, err
	}
	s.tell(&own)
	n := float64(r.Frames)
	r.Driver, r.Device = across(&own.Bus, n), across(&t.Bus, n)
	r.Sleeps = float64(own.Bells.Sleeps+t.Bells.Sleeps) / n
	r.Rings = float64(own.Rings+t.Rings) / n
	r.Rescued = own.Bells.Rescued + t.Bells.Rescued
	r.Corrupt = own.Corrupt + t.Corrupt + own.Dropped + t.Dropped
	return r, nil
}

// lead is the driver side.
func (r *Result) lead(c *Config, s *side) error {
	unpin, err := benchkit.Pin(c.CPU[0])
	if err != nil {
		return err
	}
	defer unpin()
	// Nothing is allocated in the runs; what was before them is not to be collected in them.
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	if err := s.line.Meet(); err != nil {
		return err
	}
	h := benchkit.NewHistogram()
	n := warmUp
	if c.Direction == Echo || c.Duration < 20*time.Millisecond {
		n = warmUp / 10
	}
	n = max(n-n%c.Batch, c.Batch)
	var mpps, trips, ratio []float64
	for i := 0; i <= c.Runs; i++ { // the first one warms up
		s.ram.Store64(offOrder, uint64(n))
		// Reading the clock for each frame takes part of the time that it tells: there are runs without.
		stamps := h
		if i&1 != 0 && c.Runs > 1 {
			stamps = nil
		}
		m, err := s.measure(i, stamps)
		if err != nil {
			return err
		}
		if i == 0 {
			n = int(m.Mpps * 1e6 * c.Duration.Seconds() / float64(c.Runs))
			n = max(n-n%c.Batch, c.Batch)
			h.Reset()
			continue
		}
		r.Runs = append(r.Runs, m)
		r.Frames += uint64(n)
		if c.Direction == Echo && stamps != nil && c.Runs > 1 {
			r.Stamped += uint64(n)
			continue
		}
		rt := min(m.Before, m.After) // the one that was disturbed less
		mpps, trips, ratio = append(mpps, m.Mpps), append(trips, rt), append(ratio, 1e3/m.Mpps/rt)
	}
	r.Mpps = benchkit.SpreadOf(mpps)
	total := 0
	for _, l := range s.length {
		total += l
	}
	r.Gbps = r.Mpps.Median * 8e-3 * float64(total) / lengths
	r.RoundTripNS, r.RoundTrips = benchkit.Median(trips), benchkit.Median(ratio)
	if c.Direction == Echo {
		l := h.Latency()
		r.Latency = &l
	}
	return nil
}

func across(a *dma.QueueAccount, n float64) benchkit.Bus {
	return benchkit.BusOf(n, &a.Descriptor, &a.Driver, &a.Device, &a.Payload)
}
