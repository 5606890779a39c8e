//go:build linux

// Package ringbench measures virtqueues between two processes: the driver side in this one, the device side in
// one that it starts, over shared memory, each on a processor of its own.
//
// In the room: the processes, the loops of both sides, what is measured. Never in it: payload
// (buffers are not touched), interfaces, printing.
package ringbench

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"time"

	"github.com/boardlink/boardlink/bench/benchkit"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/vring"
	"golang.org/x/sys/unix"
)

// told is what the peer reports.
type told struct {
	Bus           dma.QueueAccount
	Sleeps, Rings uint64
	Lost, Idle    uint64
}

func init() {
	// The device side's process. Its files: memory, kick, call.
	benchkit.Register("ring", func(order []byte) (any, error) {
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
	s, err := newSide(c, true, benchkit.FirstFD, benchkit.FirstFD+1, benchkit.FirstFD+2)
	if err != nil {
		return err
	}
	defer s.close()
	// The driver side sets up the ring; the first round trip says that it has.
	if _, err := s.line.RoundTrips(pingRounds); err != nil {
		return err
	}
	var q vring.Device
	if c.Ring == "packed" {
		q, err = vring.NewPackedDevice(s.queue)
	} else {
		q, err = vring.NewSplitDevice(s.queue)
	}
	if err != nil {
		return err
	}
	q.DisarmKick()
	for i := 0; i <= c.Runs; i++ { // the first one warms up
		s.deadline = time.Now().Add(patience)
		if _, err := s.line.RoundTrips(pingRounds); err != nil {
			return err
		}
		if i == 1 {
			s.start(q.Stats())
		}
		if err := s.device(q); err != nil {
			return err
		}
		if _, err := s.line.RoundTrips(pingRounds); err != nil {
			return err
		}
	}
	t.Bus, t.Sleeps, t.Rings, t.Lost, t.Idle = *s.bus, s.sleeps, s.rings, s.lost, idle(q.Stats())-s.idle
	return nil
}

// start forgets what was counted while warming up. Nobody else counts meanwhile.
func (s *side) start(q *vring.Stats) {
	s.sleeps, s.rings, s.idle = 0, 0, idle(q)
	*s.bus = dma.QueueAccount{}
}

// idle returns how often a side has looked in vain.
func idle(q *vring.Stats) uint64 {
	c := q.Load()
	return c.IndexReads - c.IndexMoved
}

// Run measures. Errors name what is wrong with cfg, or with the machine.
func Run(ctx context.Context, cfg Config) (*Result, error) {
	c := cfg
	if err := c.defaults(); err != nil {
		return nil, err
	}
	fd, err := unix.MemfdCreate("ringbench", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memfd_create: %w", err)
	}
	files := []*os.File{os.NewFile(uintptr(fd), "memory")}
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	if err := files[0].Truncate(2 * memSize); err != nil {
		return nil, err
	}
	for i := 0; i < 2; i++ {
		e, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
		if err != nil {
			return nil, fmt.Errorf("eventfd: %w", err)
		}
		files = append(files, os.NewFile(uintptr(e), "eventfd"))
	}
	s, err := newSide(&c, false, fd, int(files[1].Fd()), int(files[2].Fd()))
	if err != nil {
		return nil, err
	}
	defer s.close()
	r := &Result{Ring: c.Ring, Placement: c.Placement, Memory: c.Memory, Size: c.Size, Batch: c.Batch, Outstanding: c.Outstanding,
		Sleep: c.Sleep, EventIdx: c.EventIdx, InOrder: c.InOrder, Write: c.Write, Buffers: c.Buffers, CPU: c.CPU}
	p, err := benchkit.Start(ctx, "ring", &c, files, c.Peer)
	if err != nil {
		return nil, err
	}
	defer p.Stop()
	result := make(chan error, 1)
	go func() { result <- r.lead(&c, s) }()
	var t told
	select {
	case err = <-result:
		if err != nil {
			p.Stop()
			err = fmt.Errorf("driver side: %w", err)
		} else if err = p.Wait(&t); err != nil {
			err = fmt.Errorf("device side: %w", err)
		}
	case <-p.Gone():
		// This side may still be behind the last round trip, or wait for ever.
		if err = p.Wait(&t); err != nil {
			err = fmt.Errorf("device side: %w", err)
			s.gone.Store(true)
		}
		if lerr := <-result; err == nil && lerr != nil {
			err = fmt.Errorf("driver side: %w", lerr)
		}
	}
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	if err != nil {
		return nil, err
	}
	n := float64(c.Buffers) * float64(c.Runs)
	r.Device = perQueue(&t.Bus, n)
	r.Sleeps = (r.Sleeps + float64(t.Sleeps)) / n
	r.Rings = (r.Rings + float64(t.Rings)) / n
	switch {
	case c.Placement == "window":
		r.InVain = float64(t.Idle) / n // the device side looks across
	case c.Placement == "push" && c.Ring == "packed":
		r.InVain = r.Idle / n // the driver side
	}
	r.Idle = (r.Idle + float64(t.Idle)) / n
	r.Lost += t.Lost
	return r, nil
}

// lead is the driver side.
func (r *Result) lead(c *Config, s *side) error {
	unpin, err := benchkit.Pin(c.CPU[0])
	if err != nil {
		return err
	}
	defer unpin()
	var q vring.Driver
	if c.Ring == "packed" {
		q, err = vring.NewPackedDriver(s.queue)
	} else {
		q, err = vring.NewSplitDriver(s.queue)
	}
	if err != nil {
		return err
	}
	if _, err := s.line.RoundTrips(pingRounds); err != nil {
		return err
	}
	q.DisarmCall()
	for i := 0; i <= c.Runs; i++ { // the first one warms up
		s.deadline = time.Now().Add(patience)
		before, err := s.line.RoundTrips(pingRounds)
		if err != nil {
			return err
		}
		if i == 1 {
			s.start(q.Stats())
		}
		start := time.Now()
		if err := s.driver(q); err != nil {
			return err
		}
		took := float64(time.Since(start).Nanoseconds()) / float64(c.Buffers)
		after, err := s.line.RoundTrips(pingRounds)
		if err != nil {
			return err
		}
		if i == 0 {
			continue
		}
		rt := before // the one that was disturbed less
		if after < rt {
			rt = after
		}
		r.Runs = append(r.Runs, Sample{took, rt})
	}
	r.summarise()
	r.Driver = perQueue(s.bus, float64(c.Buffers)*float64(c.Runs))
	r.Sleeps, r.Rings, r.Lost = float64(s.sleeps), float64(s.rings), s.lost
	r.Idle = float64(idle(q.Stats()) - s.idle)
	return nil
}
