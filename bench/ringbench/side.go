//go:build linux

package ringbench

import (
	"fmt"

	"github.com/boardlink/boardlink/bench/benchkit"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/vring"
	"golang.org/x/sys/unix"
)

// Where things lie in the board's memory, and of "push" in the host's.
const (
	memSize   = 8 << 20
	offDesc   = 4096 // behind the round trip's line
	offDriver = offDesc + 32768*16
	offDevice = offDriver + 1<<17
	offData   = 2 << 20
)

// frames is how many different buffers there are, length the bytes of one.
const frames = 65521

func length(i int) uint32 { return 60 + uint32(i*37%1440) }

// side is one process' view: its memories, its queue's configuration.
type side struct {
	benchkit.Watch
	c     *Config
	mem   *benchkit.Memories
	kick  int // eventfds
	call  int
	line  *benchkit.Line
	queue vring.Config

	sleeps, rings uint64
	lost, idle    uint64

	// What the loops work with is here, not made by each run: its first touch takes longer than all buffers.
	reqs  []vring.Request
	done  []vring.Completion
	bufs  []vring.Buffer
	batch vring.Batch
	used  []vring.Used
}

func newSide(c *Config, device bool, memfd, kick, call int) (*side, error) {
	mem, err := benchkit.MapMemories(benchkit.Layout{Ring: c.Ring, Placement: c.Placement, Memory: c.Memory, Size: c.Size}, memfd, memSize, device)
	if err != nil {
		return nil, err
	}
	s := &side{c: c, mem: mem, kick: kick, call: call}
	s.Start()
	ram, _ := mmio.FromBytes(mem.Bytes[:benchkit.LineBytes]).RAM()
	s.line = benchkit.NewLine(ram, !device)
	s.line.Late = s.Late
	s.queue = mem.Queue("bench", offDesc, offDriver, offDevice)
	s.queue.EventIdx, s.queue.InOrder = c.EventIdx, c.InOrder
	if device {
		s.used = make([]vring.Used, 0, c.Batch)
		return s, nil
	}
	s.reqs, s.done = make([]vring.Request, c.Batch), make([]vring.Completion, c.Batch)
	// As frames that are sent: no descriptor is what it was one lap ago, so that what rings save by not
	// writing what does not change is not measured. Their number is prime.
	s.bufs = make([]vring.Buffer, frames)
	for i := range s.bufs {
		s.bufs[i] = vring.Buffer{Addr: mem.Far.Addr + dma.Addr(offData+i*64), Len: length(i)}
	}
	return s, nil
}

func (s *side) close() error { return s.mem.Close() }

func (s *side) ring(fd int) error {
	one := [8]byte{1} // whatever the byte order: not 0
	_, err := unix.Write(fd, one[:])
	s.rings++
	return err
}

func (s *side) wait(fd int) error {
	s.sleeps++
	for {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, 1000)
		if n > 0 {
			var b [8]byte
			_, err = unix.Read(fd, b[:])
			return err
		}
		if err == nil {
			s.lost++
			return s.Late()
		}
		if err != unix.EINTR {
			return err
		}
	}
}

// pace is how often a side that polls reads a word of its own between two looks.
const pace = 16

func (s *side) driver(q vring.Driver) error {
	c := s.c
	reqs, done, bufs := s.reqs, s.done, s.bufs
	readable := 1
	if c.Write {
		readable = 0
	}
	added, back, at, idle := 0, 0, 0, 0
	for back < c.Buffers {
		busy := false
		if added < c.Buffers && added-back+c.Batch <= c.Outstanding {
			for i := range reqs {
				reqs[i].Bufs, reqs[i].Readable = bufs[at:at+1:at+1], readable
				if at++; at == len(bufs) {
					at = 0
				}
			}
			n, err := q.Add(reqs)
			if err != nil {
				return err
			}
			if n != len(reqs) {
				return fmt.Errorf("%d of %d buffers fit", n, len(reqs))
			}
			added += n
			busy = true
			if q.NeedKick() {
				if err := s.ring(s.kick); err != nil {
					return err
				}
			}
		}
		n, err := q.Reap(done)
		if err != nil {
			return err
		}
		back += n
		if busy || n > 0 {
			idle = 0
			continue
		}
		idle++
		if idle&(1<<18-1) == 0 {
			if err := s.Late(); err != nil {
				return err
			}
		}
		if !c.Sleep || idle < c.Spins {
			benchkit.Relax(pace)
			continue
		}
		idle = 0
		pending, err := q.ArmCall()
		if err != nil {
			return err
		}
		if !pending {
			if err := s.wait(s.call); err != nil {
				return err
			}
		}
		q.DisarmCall()
	}
	return nil
}

func (s *side) device(q vring.Device) error {
	c := s.c
	b, used := &s.batch, s.used
	idle := 0
	for got := 0; got < c.Buffers; {
		b.Chains, b.Spans, used = b.Chains[:0], b.Spans[:0], used[:0]
		n, err := q.Pop(b, c.Batch)
		if err != nil {
			return err
		}
		if n > 0 {
			idle = 0
			got += n
			for i := range b.Chains {
				ch := &b.Chains[i]
				u := vring.Used{ID: ch.ID, Count: ch.Count}
				if ch.WriteLen != 0 {
					u.Len = ch.WriteLen - 1
				}
				used = append(used, u)
			}
			if err := q.Complete(used); err != nil {
				return err
			}
			if q.NeedCall() {
				if err := s.ring(s.call); err != nil {
					return err
				}
			}
			continue
		}
		idle++
		if idle&(1<<18-1) == 0 {
			if err := s.Late(); err != nil {
				return err
			}
		}
		if !c.Sleep || idle < c.Spins {
			benchkit.Relax(pace)
			continue
		}
		idle = 0
		pending, err := q.ArmKick()
		if err != nil {
			return err
		}
		if !pending {
			if err := s.wait(s.kick); err != nil {
				return err
			}
		}
		q.DisarmKick()
	}
	return nil
}
