//go:build linux

package packetbench

import (
	"github.com/boardlink/boardlink/bench/benchkit"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/frames"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/vring"
	"golang.org/x/sys/unix"
)

// In the memory of the board: the round trip's line, the number of frames of a run, the areas of the queues, buffers.
const (
	offOrder = 1024
	offAreas = 4096
	areaStep = 1 << 20 // of a queue: three areas
	offData  = offAreas + 2*areaStep
)

// queue numbers.
const (
	tx = iota // board to host
	rx
)

// side is one process' view.
type side struct {
	benchkit.Watch
	c      *Config
	device bool
	mem    *benchkit.Memories
	ram    mmio.RAM // the line, and offOrder
	line   *benchkit.Line

	bells  [4]*doorbell.Eventfd // kick and call of each queue
	stop   *doorbell.Eventfd
	counts *doorbell.Counters
	out    frames.Sender // whichever the direction needs
	in     frames.Receiver

	length   []int // of the frames, over and over
	own      [][]byte
	template [minBytes]byte
	sent     uint64 // numbers of the next frame
	got      uint64
	corrupt  uint64
}

func newSide(c *Config, device bool, memfd int, bells []int) (_ *side, err error) {
	data, memSize := c.sizes()
	mem, err := benchkit.MapMemories(c.layout(), memfd, memSize, device)
	if err != nil {
		return nil, err
	}
	s := &side{c: c, device: device, mem: mem, counts: new(doorbell.Counters), length: c.lengths()}
	s.Start()
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	for i := range s.bells {
		fd, err := unix.FcntlInt(uintptr(bells[i]), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return nil, err
		}
		if s.bells[i], err = doorbell.FromFD(fd); err != nil {
			unix.Close(fd)
			return nil, err
		}
	}
	if s.stop, err = doorbell.NewEventfd(); err != nil {
		return nil, err
	}
	s.ram, _ = mmio.FromBytes(mem.Bytes[:offAreas]).RAM()
	s.line = benchkit.NewLine(s.ram, !device)
	s.line.Late = s.Late
	if device {
		err = s.serve()
	} else {
		err = s.drive(data)
	}
	if err != nil {
		return nil, err
	}
	copy(s.template[:], header)
	return s, nil
}

var names = [...]string{tx: "tx", rx: "rx"}

// queue describes queue n.
func (s *side) queue(n int) vring.Config {
	off := uint64(offAreas + n*areaStep)
	q := s.mem.Queue(names[n], off, off+areaStep/2, off+areaStep*3/4)
	q.EventIdx, q.InOrder = s.c.EventIdx, s.c.InOrder
	if s.mem.Far != s.mem.Board || s.mem.Kind != mmio.Cached {
		q.PayloadKind = s.mem.Kind
	}
	return q
}

// end describes this side's end of queue n.
func (s *side) end(n int) frames.Config {
	f := frames.Config{Name: names[n], MaxFrame: s.c.Bytes2, Batch: s.c.Batch, Copy: true}
	kick, call := s.bells[2*n], s.bells[2*n+1]
	f.Ring, f.Sleep = doorbell.Ringer(kick), doorbell.SleeperConfig{Doorbell: call, Stop: s.stop, Counters: s.counts}
	if s.device {
		f.Ring, f.Sleep.Doorbell = call, kick
	}
	return f
}

// drive makes the ends of the driver side, each with data bytes for its frames.
func (s *side) drive(data int) error {
	m := s.mem
	if s.c.Direction != HostToBoard {
		q, err := m.Driver(s.queue(tx))
		if err != nil {
			return err
		}
		memory := dma.Span{Region: m.Far, Off: offData, Len: uint32(data)}
		if s.out, err = frames.NewDriverSender(s.end(tx), q, memory.Accounted(&m.Bus.Payload)); err != nil {
			return err
		}
	}
	if s.c.Direction != BoardToHost {
		q, err := m.Driver(s.queue(rx))
		if err != nil {
			return err
		}
		memory := dma.Span{Region: m.Board, Off: uint64(offData + data), Len: uint32(data)}
		if s.in, err = frames.NewDriverReceiver(s.end(rx), q, memory.Accounted(&m.Bus.Payload)); err != nil {
			return err
		}
	}
	return nil
}

// serve makes the ends of the device side.
func (s *side) serve() error {
	// The driver side sets the rings up; the first meeting says that it has.
	if err := s.line.Meet(); err != nil {
		return err
	}
	if s.c.Direction != HostToBoard {
		q, err := s.mem.Device(s.queue(tx))
		if err != nil {
			return err
		}
		if s.in, err = frames.NewDeviceReceiver(s.end(tx), q); err != nil {
			return err
		}
	}
	if s.c.Direction != BoardToHost {
		q, err := s.mem.Device(s.queue(rx))
		if err != nil {
			return err
		}
		if s.out, err = frames.NewDeviceSender(s.end(rx), q); err != nil {
			return err
		}
		s.makeOwn()
	}
	return nil
}

// makeOwn makes the memory in which a device side's frames lie first, one beside the other.
func (s *side) makeOwn() {
	s.own = make([][]byte, s.c.Size)
	stride := (s.c.Bytes2 + 63) / 64 * 64
	all := make([]byte, s.c.Size*stride)
	for i := range s.own {
		s.own[i] = all[i*stride : i*stride+s.c.Bytes2 : i*stride+s.c.Bytes2]
	}
}

func (s *side) close() error {
	for _, e := range append(s.bells[:], s.stop) {
		if e != nil {
			e.Close()
		}
	}
	return s.mem.Close()
}
