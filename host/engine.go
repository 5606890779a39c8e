package host

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/control/msgdev"
	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/pci"
	"github.com/boardlink/boardlink/session"
	"github.com/boardlink/boardlink/status"
)

// DMAMode says what a board's DMA engine is used for.
type DMAMode uint8

const (
	// DMAAuto uses it for what the board sends, from the length on where it is faster than the processor.
	DMAAuto DMAMode = iota
	// DMAOff leaves all to the processor.
	DMAOff
	// DMAOn uses it both ways, however fast it is; a board of a kind without an engine is refused.
	DMAOn
)

// ParseDMAMode reads "auto", "off" or "on".
func ParseDMAMode(s string) (DMAMode, error) {
	for m, name := range [...]string{"auto", "off", "on"} {
		if s == name {
			return DMAMode(m), nil
		}
	}
	return DMAAuto, fmt.Errorf("%q: auto, off or on is wanted", s)
}

// DMAConfig says how a link uses the DMA engine of its board, where that has one (board.Engined). The zero value is the default.
type DMAConfig struct {
	Mode DMAMode
	// Min is the length in bytes below which the processor copies; 0: measured when the link has come up, for what the board sends,
	// dma.DefaultMin the other way.
	Min uint32
	// Timeout bounds one transfer; 0 is dma.DefaultTimeout.
	Timeout time.Duration
}

const (
	// stageLink is the link address of the first staging memory, stageStep the distance to the next. No board has memory there: one
	// that declares some goes without an engine.
	stageLink dma.Addr = 0x7e00_0000_0000_0000
	stageStep dma.Addr = 1 << 32
	// stageSize is how much staging memory a queue gets, in bytes: 62 of the largest frames.
	stageSize = 4 << 20
	// calibrateTime is about how long the first start of a device may be held up to compare the engine with the processor,
	// calibrateSpan how many bytes of the board's memory are read for it, again and again.
	calibrateTime = 20 * time.Millisecond
	calibrateSpan = 256 << 10
)

// engineSource is where the devices of a link get engines from, while it is up.
type engineSource struct {
	b      board.Engined
	c      DMAConfig
	log    session.Logger
	link   string
	window []board.WindowPart
	sample dma.Span // memory of the board that may be read at any time; of length 0: there is none
	next   dma.Addr // of the next staging memory
	min    uint32   // from where on an engine is faster than the processor; 0: not measured yet
	wild   func(error)
}

// newEngineSource returns nil where the link's board has no engine, or is to go without. window is what the agent declares.
func newEngineSource(b board.Board, c DMAConfig, log session.Logger, link string, window []board.WindowPart, wild func(error)) *engineSource {
	e, ok := b.(board.Engined)
	if !ok || c.Mode == DMAOff {
		return nil
	}
	s := &engineSource{b: e, c: c, log: log, link: link, window: window, next: stageLink, wild: wild}
	for _, w := range window {
		if w.Link+dma.Addr(w.Size-1) >= stageLink {
			log.Warn("no DMA engine: the board's memory is where this side's staging memory would be", "link", link, "address", uint64(w.Link))
			return nil
		}
		if s.sample.Len != 0 {
			continue
		}
		n := uint64(calibrateSpan)
		if w.Size < n {
			n = w.Size
		}
		// Not accounted: it is no traffic.
		r := dma.Region{Name: "board", Addr: w.Link, Access: dma.DeviceRead, Across: true}
		var err error
		if r.Mem, err = b.Window().Mem.Slice(w.Offset, w.Size); err == nil {
			s.sample = dma.Span{Region: &r, Len: uint32(n)}
		}
	}
	return s
}

// engineSet are the engines of one device. It implements msgdev.Engines.
type engineSet struct {
	src   *engineSource
	mu    sync.Mutex           // held while engines are opened and closed: Describe reads what they change
	queue map[int]*queueEngine // made once for a queue, so that its counters live as long as the model
}

type queueEngine struct {
	stats *dma.MoverStats
	open  bool // since the last Prepare
	eng   dma.Engine
	mover *dma.Mover
	stage dma.Span
	used  bool // it had an engine once
	min   uint32
}

// Prepare implements msgdev.Engines: it opens engines for the queues of a device that starts: for transmit queues first, as long as there are some. What
// cannot be had is left to the processor.
func (s *engineSet) Prepare(jobs []msgdev.EngineJob) {
	if s.src == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.queue == nil {
		s.queue = map[int]*queueEngine{}
	}
	for _, toBoard := range []bool{false, true} {
		if toBoard && s.src.c.Mode != DMAOn {
			return // posted writes by the processor are fast
		}
		for _, j := range jobs {
			j := j
			if j.ToDriver != toBoard {
				continue
			}
			q := s.queue[j.Queue]
			if q == nil {
				q = &queueEngine{stats: new(dma.MoverStats)}
				s.queue[j.Queue] = q
			}
			var err error
			if fault := pci.Guard(func() { err = s.src.open(q, j) }); fault != nil {
				err = fault
			}
			if err == nil {
				continue
			}
			s.src.close(q)
			if errors.Is(err, board.ErrHasNoEngine) {
				// Nobody asked for one, unless the operator did.
				tell := s.src.log.Debug
				if s.src.c.Mode == DMAOn {
					tell = s.src.log.Warn
				}
				tell("the processor copies", "link", s.src.link, "queue", j.Name, "error", err)
			} else if errors.Is(err, board.ErrNoEngine) {
				s.src.log.Info("no DMA engine left: the processor copies", "link", s.src.link, "queue", j.Name, "error", err)
			} else {
				s.src.log.Warn("no DMA engine: the processor copies", "link", s.src.link, "queue", j.Name, "error", err)
			}
		}
	}
}

// open gives q an engine, unless the processor is faster.
func (s *engineSource) open(q *queueEngine, j msgdev.EngineJob) error {
	size := uint64(stageSize)
	if n := 64 * uint64(j.Stage); n < size {
		size = n // what all frames in flight can take
	}
	measure := !j.ToDriver && s.c.Min == 0 && s.sample.Len != 0
	if measure && s.min == dma.Never && s.c.Mode == DMAAuto {
		return nil
	}
	if s.next >= poolLink-stageStep {
		s.next = stageLink
	}
	e, stage, err := s.b.Engine(board.EngineConfig{ToBoard: j.ToDriver, Window: s.window, Size: size, Link: s.next})
	if err != nil {
		return err
	}
	s.next += stageStep
	q.open, q.eng, q.stage = true, e, stage
	if ram, ok := stage.RAM(); !ok || uint64(ram.Size()) < size {
		return fmt.Errorf("board %s: its engine comes with %d bytes of memory, %d were wanted", s.b, stage.Len, size)
	}
	mc := dma.MoverConfig{Engine: e, Min: s.c.Min, Timeout: s.c.Timeout, Stats: q.stats,
		Logf: func(format string, args ...interface{}) {
			s.log.Warn(fmt.Sprintf(format, args...), "link", s.link, "queue", j.Name)
		}}
	q.mover = dma.NewMover(mc)
	if measure && s.min == 0 {
		// Once for all channels of the board: messages wait meanwhile.
		s.min = q.mover.Calibrate(stage, s.sample, calibrateTime)
		if err := q.mover.Runaway(); err != nil {
			return err
		}
	}
	if measure {
		if s.min == dma.Never && s.c.Mode == DMAAuto {
			s.log.Info("the processor copies: the DMA engine is not faster", "link", s.link, "queue", j.Name, "engine", e.Caps().Name)
			s.close(q)
			return nil
		}
		if mc.Min = s.min; s.min == dma.Never {
			mc.Min = dma.DefaultMin // it is wanted all the same
		}
		q.mover = dma.NewMover(mc)
	}
	q.used, q.min = true, q.mover.Min()
	s.log.Info("DMA engine", "link", s.link, "queue", j.Name, "engine", e.Caps().Name, "from_bytes", q.min)
	return nil
}

// Engine implements msgdev.Engines.
func (s *engineSet) Engine(queue int) *device.CopyEngine {
	s.mu.Lock()
	defer s.mu.Unlock()
	q := s.queue[queue]
	if q == nil || !q.open {
		return nil
	}
	return &device.CopyEngine{Mover: q.mover, Staging: q.stage}
}

// Release implements msgdev.Engines: then the engines they touch nothing any more, or may not use the bus any more, and the link is lost. The pumps have ended.
func (s *engineSet) Release() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, q := range s.queue {
		s.src.close(q)
	}
}

func (s *engineSource) close(q *queueEngine) {
	if !q.open {
		return
	}
	var err error
	if q.mover != nil {
		if fault := pci.Guard(func() { err = q.mover.Close() }); fault != nil {
			err = fault
		}
	}
	// Once more where the Mover did not come that far, which gives the memory back.
	if cerr := q.eng.Close(); err == nil {
		err = cerr
	}
	q.open, q.eng, q.mover, q.stage = false, nil, nil, dma.Span{}
	if err == nil {
		return
	}
	s.log.Warn("the DMA engine does not close", "link", s.link, "error", err)
	if errors.Is(err, dma.ErrRunaway) {
		s.wild(err)
	}
}

// Describe adds the counters of the queues that had an engine once, and their sums to the device's.
func (s *engineSet) Describe(d *status.Device) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range d.Queues {
		q := s.queue[d.Queues[i].Index]
		if q == nil || !q.used {
			continue
		}
		m := map[string]uint64{"min": uint64(q.min)}
		q.stats.Each(func(name string, v uint64) {
			m[name] = v
			d.Counters["dma_"+name] += v
		})
		d.Queues[i].DMA = m
	}
}
