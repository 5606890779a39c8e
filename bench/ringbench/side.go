//go:build linux

package ringbench

import (
	"errors"
	"fmt"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/boardlink/boardlink/bench/benchkit"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/vring"
	"golang.org/x/sys/unix"
)

// Both memories lie in one file: the board's, then the host's, each with a link address.
const (
	memSize            = 8 << 20
	boardBase dma.Addr = 0x1000_0000
	hostBase  dma.Addr = 0x9_0000_0000
	offDesc            = 4096 // of the board's: behind the round trip's line
	offDriver          = offDesc + 32768*16
	offDevice          = offDriver + 1<<17
	offData            = 2 << 20

	pingRounds = 2000
	patience   = 30 * time.Second
)

// frames is how many different buffers there are, length the bytes of one.
const frames = 65521

func length(i int) uint32 { return 60 + uint32(i*37%1440) }

// side is one process' view: its regions, its queue's configuration.
type side struct {
	c        *Config
	mem      []byte
	kick     int // eventfds
	call     int
	line     *benchkit.Line
	bus      *dma.QueueAccount
	queue    vring.Config
	deadline time.Time
	gone     atomic.Bool // the peer
	buffer   dma.Addr    // where the buffers lie

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
	b, err := unix.Mmap(memfd, 0, 2*memSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return nil, fmt.Errorf("mmap: %w", err)
	}
	s := &side{c: c, mem: b, kick: kick, call: call, bus: new(dma.QueueAccount), deadline: time.Now().Add(patience)}
	ram, _ := mmio.FromBytes(b[:benchkit.LineBytes]).RAM()
	s.line = benchkit.NewLine(ram, !device)
	s.line.Late = s.late
	kind := map[string]mmio.Kind{"cached": mmio.Cached, "write-combining": mmio.WriteCombining, "uncached": mmio.Uncached}[c.Memory]
	region := func(name string, addr dma.Addr, off int, across bool) *dma.Region {
		r := &dma.Region{Name: name, Addr: addr, Access: dma.DeviceRead | dma.DeviceWrite}
		k := mmio.Cached
		if across {
			r.Across, r.Account, k = true, new(dma.Account), kind // the areas have accounts of their own
		}
		r.Mem = mmio.NewMem(unsafe.Pointer(&b[off]), memSize, k)
		return r
	}
	local := c.Placement == "local"
	board := region("board", boardBase, 0, device && !local)
	host := region("host", hostBase, memSize, !device && !local)
	far := board
	s.buffer = boardBase + offData
	if c.Placement == "push" {
		far = host
		s.buffer = hostBase + offData
	}
	sizes := vring.SplitSizes
	if c.Ring == "packed" {
		sizes = vring.PackedSizes
	}
	desc, driver, dev := sizes(uint16(c.Size))
	s.queue = vring.Config{Name: "bench", Size: uint16(c.Size), EventIdx: c.EventIdx, InOrder: c.InOrder,
		Desc:   dma.Span{Region: far, Off: offDesc, Len: uint32(desc)}.Accounted(&s.bus.Descriptor),
		Driver: dma.Span{Region: far, Off: offDriver, Len: uint32(driver)}.Accounted(&s.bus.Driver),
		Device: dma.Span{Region: board, Off: offDevice, Len: uint32(dev)}.Accounted(&s.bus.Device)}
	if !device {
		s.reqs, s.done = make([]vring.Request, c.Batch), make([]vring.Completion, c.Batch)
		// As frames that are sent: no descriptor is what it was one lap ago, so that what rings save by not
		// writing what does not change is not measured. Their number is prime.
		s.bufs = make([]vring.Buffer, frames)
		for i := range s.bufs {
			s.bufs[i] = vring.Buffer{Addr: s.buffer + dma.Addr(i*64), Len: length(i)}
		}
	} else {
		s.used = make([]vring.Used, 0, c.Batch)
		t, err := dma.NewTable(*board, *host)
		if err != nil {
			return nil, err
		}
		s.queue.Table = new(dma.TableRef)
		s.queue.Table.Store(t)
	}
	return s, nil
}

func (s *side) close() error { return unix.Munmap(s.mem) }

var errPatience = errors.New("the other side does not answer")

// late is asked now and then by whoever waits.
func (s *side) late() error {
	if s.gone.Load() || time.Now().After(s.deadline) {
		return errPatience
	}
	return nil
}

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
			return s.late()
		}
		if err != unix.EINTR {
			return err
		}
	}
}

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
			if err := s.late(); err != nil {
				return err
			}
		}
		if !c.Sleep || idle < c.Spins {
			relax()
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
			if err := s.late(); err != nil {
				return err
			}
		}
		if !c.Sleep || idle < c.Spins {
			relax()
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

// pace is how often relax reads a word of its own.
const pace = 16

var idleWord uint64

// relax lets a moment pass between two looks, so that the line is not taken from who writes it.
func relax() {
	for i := 0; i < pace; i++ {
		mmio.Load64(unsafe.Pointer(&idleWord))
	}
}
