//go:build linux

package packetbench

import (
	"time"

	"github.com/boardlink/boardlink/bench/benchkit"
	"github.com/boardlink/boardlink/doorbell"
)

// pace is how often a side that polls reads a word of its own between two looks.
const pace = 4

// idle counts looks in vain, and waits where that is asked for.
type idle int

func (i *idle) nothing(s *side, wait func() (doorbell.Reason, error)) error {
	*i++
	if *i&(1<<18-1) == 0 {
		if err := s.Late(); err != nil {
			return err
		}
	}
	if !s.c.Sleep || int(*i) < s.c.Spins {
		if s.c.Direction != Echo {
			benchkit.Relax(pace)
		}
		return nil
	}
	*i = 0
	if _, err := wait(); err != nil {
		return err
	}
	return s.Late()
}

// send sends n frames.
func (s *side) send(n int) error {
	var id idle
	for n > 0 {
		out, err := s.out.Reserve(min(n, s.c.Batch))
		if err != nil {
			return err
		}
		if len(out) == 0 {
			if err := id.nothing(s, s.out.Wait); err != nil {
				return err
			}
			continue
		}
		id = 0
		s.fill(out)
		if err := s.out.Send(len(out)); err != nil {
			return err
		}
		n -= len(out)
	}
	return nil
}

// receive takes n frames.
func (s *side) receive(n int) error {
	var id idle
	for n > 0 {
		in, err := s.in.Receive(s.c.Batch)
		if err != nil {
			return err
		}
		if len(in) == 0 {
			if err := id.nothing(s, s.in.Wait); err != nil {
				return err
			}
			continue
		}
		id = 0
		s.check(in)
		n -= len(in)
		if s.c.Direction == Echo && !s.c.Sleep {
			continue // the answer goes first: the next Receive gives the buffer back
		}
		if err := s.in.Done(); err != nil {
			return err
		}
	}
	return nil
}

// echo passes one frame to and fro, n times. The leading side tells the times.
func (s *side) echo(n int, h *benchkit.Histogram) error {
	last := time.Now()
	for ; n > 0; n-- {
		if !s.device {
			if err := s.send(1); err != nil {
				return err
			}
		}
		if err := s.receive(1); err != nil {
			return err
		}
		if s.device {
			if err := s.send(1); err != nil {
				return err
			}
			continue
		}
		if h == nil {
			continue
		}
		now := time.Now()
		h.Record(now.Sub(last))
		last = now
	}
	return nil
}

// run is one run of n frames, by the driver side or the device side.
func (s *side) run(n int, h *benchkit.Histogram) error {
	switch {
	case s.c.Direction == Echo:
		return s.echo(n, h)
	case (s.c.Direction == BoardToHost) != s.device:
		return s.send(n)
	}
	return s.receive(n)
}
