package host

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/control/msgdev"
	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/tunbridge"
)

// timedBoard has an engine that says it copies, and takes its time.
type timedBoard struct {
	board.Board
	win      dma.Region
	free     int
	none     error // why there is no free one; nil: board.ErrNoEngine
	takes    time.Duration
	closeErr error
	size     uint32 // of its memory; 0: what is wanted
	opened   []board.EngineConfig
	closed   int
}

func (b *timedBoard) Window() dma.Region { return b.win }
func (b *timedBoard) String() string     { return "timed" }

func (b *timedBoard) Engine(c board.EngineConfig) (dma.Engine, dma.Span, error) {
	if b.free == 0 && b.none != nil {
		return nil, dma.Span{}, fmt.Errorf("timed: %w", b.none)
	}
	if b.free == 0 {
		return nil, dma.Span{}, fmt.Errorf("timed: %w", board.ErrNoEngine)
	}
	b.free--
	b.opened = append(b.opened, c)
	n := uint32(c.Size)
	if b.size != 0 {
		n = b.size
	}
	r := &dma.Region{Name: "staging", Addr: c.Link, Mem: mmio.FromBytes(make([]byte, n)), Access: dma.DeviceRead | dma.DeviceWrite}
	return &timedEngine{b: b}, dma.Span{Region: r, Len: n}, nil
}

type timedEngine struct {
	b    *timedBoard
	tags []uint64
	once sync.Once
}

func (e *timedEngine) Caps() dma.Caps {
	return dma.Caps{Name: "timed", MaxLen: 1 << 20, Depth: 16, Channels: 1}
}

func (e *timedEngine) Submit(batch []dma.Copy) (int, error) {
	time.Sleep(e.b.takes)
	for i := range batch {
		e.tags = append(e.tags, batch[i].Tag)
	}
	return len(batch), nil
}

func (e *timedEngine) Poll(done []dma.Completion) int {
	n := 0
	for ; n < len(done) && n < len(e.tags); n++ {
		done[n] = dma.Completion{Tag: e.tags[n]}
	}
	e.tags = e.tags[n:]
	return n
}

func (e *timedEngine) Waiter() dma.EngineWaiter { return nil }
func (e *timedEngine) Abort() error             { return nil }
func (e *timedEngine) Close() error {
	e.once.Do(func() {
		e.b.closed++
		e.b.free++
	})
	return e.b.closeErr
}

// slowMem is memory of which each load takes long.
type slowMem struct{}

func (slowMem) Load(off uint64, width uint) uint64     { time.Sleep(100 * time.Microsecond); return 0 }
func (slowMem) Store(off uint64, width uint, v uint64) {}
func (slowMem) Barrier(mmio.Barrier)                   {}

// lines is a log.
type lines struct {
	mu sync.Mutex
	l  []string
}

func (l *lines) add(msg string, args ...interface{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.l = append(l.l, fmt.Sprint(append([]interface{}{msg}, args...)...))
}
func (l *lines) Debug(msg string, args ...interface{}) { l.add(msg, args...) }
func (l *lines) Info(msg string, args ...interface{})  { l.add(msg, args...) }
func (l *lines) Warn(msg string, args ...interface{})  { l.add(msg, args...) }
func (l *lines) Error(msg string, args ...interface{}) { l.add(msg, args...) }

// quiet hears no more than an operator does.
type quiet struct{ *lines }

func (quiet) Debug(string, ...interface{}) {}

func jobs(pairs int) []msgdev.EngineJob {
	var l []msgdev.EngineJob
	for i := 0; i < 2*pairs; i++ {
		l = append(l, msgdev.EngineJob{Queue: i, QueueInfo: device.QueueInfo{Name: fmt.Sprintf("q%d", i), ToDriver: i%2 == 0, Stage: tunbridge.StagingMin(tunbridge.MaxFrame(1500, false))}})
	}
	return l
}

// TestEngines: which queues get an engine, by what the operator wants, how many there are, and how fast they are.
func TestEngines(t *testing.T) {
	const slow, fast = 5 * time.Millisecond, 0
	ram, device := mmio.FromBytes(make([]byte, 1<<20)), mmio.NewBusMem(slowMem{}, 1<<20, mmio.Uncached)
	for _, c := range []struct {
		name  string
		cfg   DMAConfig
		pairs int
		free  int
		takes time.Duration
		win   mmio.Mem
		want  []int // queues with an engine
		min   uint32
	}{
		{"auto, faster", DMAConfig{}, 1, 4, fast, device, []int{1}, 0},
		{"auto, slower", DMAConfig{}, 1, 4, slow, ram, nil, 0},
		{"auto, told from when on", DMAConfig{Min: 2000}, 1, 4, slow, ram, []int{1}, 2000},
		{"on, slower", DMAConfig{Mode: DMAOn}, 1, 4, slow, ram, []int{0, 1}, dma.DefaultMin},
		{"on, told from when on", DMAConfig{Mode: DMAOn, Min: 100}, 1, 4, slow, ram, []int{0, 1}, 100},
		{"on, one for two pairs", DMAConfig{Mode: DMAOn, Min: 1}, 2, 1, slow, ram, []int{1}, 1},
		{"on, three for two pairs", DMAConfig{Mode: DMAOn, Min: 1}, 2, 3, slow, ram, []int{0, 1, 3}, 1},
		{"off", DMAConfig{Mode: DMAOff}, 1, 4, fast, device, nil, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := &timedBoard{win: dma.Region{Mem: c.win}, free: c.free, takes: c.takes}
			log := &lines{}
			var s engineSet
			s.src = newEngineSource(b, c.cfg, log, "l", []board.WindowPart{{Link: 1 << 32, Offset: 4096, Size: 1<<20 - 4096}}, func(err error) { t.Error(err) })
			for start := 0; start < 2; start++ {
				s.Prepare(jobs(c.pairs))
				var got []int
				var min uint32
				for i := 0; i < 2*c.pairs; i++ {
					if e := s.Engine(i); e != nil {
						got, min = append(got, i), e.Mover.Min()
						if e.Staging.Len < jobs(1)[0].Stage {
							t.Errorf("%d bytes of staging memory", e.Staging.Len)
						}
					}
				}
				if fmt.Sprint(got) != fmt.Sprint(c.want) || c.min != 0 && min != c.min {
					t.Errorf("queues %v have engines, from %d bytes on; want %v, %d: %q", got, min, c.want, c.min, log.l)
				}
				s.Release()
				if b.free != c.free || b.closed != len(b.opened) {
					t.Errorf("%d engines opened, %d closed", len(b.opened), b.closed)
				}
			}
			d := status.Device{Counters: map[string]uint64{}, Queues: []status.Queue{{Index: 0}, {Index: 1}}}
			s.Describe(&d)
			for i := range d.Queues {
				if want := strings.Contains(fmt.Sprint(c.want), fmt.Sprint(i)); (d.Queues[i].DMA != nil) != want {
					t.Errorf("queue %d: counters %v", i, d.Queues[i].DMA)
				}
			}
			for i := range b.opened {
				for j := range b.opened[:i] {
					if b.opened[i].Link == b.opened[j].Link {
						t.Errorf("two engines with the link address %#x", uint64(b.opened[i].Link))
					}
				}
			}
		})
	}
}

// TestEngineWords: a board that has no engine does not have none left. Nothing is said of it unless the operator asked for one.
func TestEngineWords(t *testing.T) {
	for _, c := range []struct {
		err  error
		mode DMAMode
		want string // "": no line
	}{
		{board.ErrNoEngine, DMAAuto, "no DMA engine left"},
		{board.ErrNoEngine, DMAOn, "no DMA engine left"},
		{board.ErrHasNoEngine, DMAAuto, ""},
		{board.ErrHasNoEngine, DMAOn, "the board has no DMA engine"},
	} {
		log := &lines{}
		b := &timedBoard{win: dma.Region{Mem: mmio.FromBytes(make([]byte, 1<<20))}, none: c.err}
		s := &engineSet{}
		s.src = newEngineSource(b, DMAConfig{Mode: c.mode}, quiet{log}, "l", []board.WindowPart{{Link: 1 << 32, Size: 1 << 20}}, nil)
		s.Prepare(jobs(1))
		text := fmt.Sprint(log.l)
		if c.want == "" && len(log.l) != 0 || !strings.Contains(text, c.want) || errors.Is(c.err, board.ErrHasNoEngine) && strings.Contains(text, "left") {
			t.Errorf("%v, --dma %v: %s", c.err, c.mode, text)
		}
	}
}

// TestEnginesRefused: engines that do not open or close as they should.
func TestEnginesRefused(t *testing.T) {
	ram := mmio.FromBytes(make([]byte, 1<<20))
	all := []board.WindowPart{{Link: 1 << 32, Size: 1 << 20}}
	var told error
	set := func(b *timedBoard, window []board.WindowPart) *engineSet {
		told = nil
		s := &engineSet{}
		s.src = newEngineSource(b, DMAConfig{Mode: DMAOn, Min: 1}, &lines{}, "l", window, func(err error) { told = err })
		s.Prepare(jobs(1))
		return s
	}
	got := func(s *engineSet) bool {
		return s.Engine(1) != nil
	}
	b := &timedBoard{win: dma.Region{Mem: ram}, free: 2, size: 4096}
	if s := set(b, all); got(s) || b.closed != 2 {
		t.Errorf("too little memory: used, or not closed (%d)", b.closed)
	}
	b = &timedBoard{win: dma.Region{Mem: ram}, free: 2}
	if s := set(b, []board.WindowPart{{Link: stageLink, Size: 1 << 20}}); got(s) || len(b.opened) != 0 {
		t.Error("the board's memory where the staging memory is: used")
	}
	b.closeErr = errors.New("stiff")
	s := set(b, all)
	if s.Release(); told != nil {
		t.Errorf("an engine that does not close: %v", told)
	}
	b = &timedBoard{win: dma.Region{Mem: ram}, free: 2, closeErr: fmt.Errorf("timed: %w", dma.ErrRunaway)}
	s = set(b, all)
	if s.Release(); !errors.Is(told, dma.ErrRunaway) {
		t.Errorf("a runaway: told %v", told)
	}
	for _, text := range []string{"", "ON", "yes"} {
		if _, err := ParseDMAMode(text); err == nil {
			t.Errorf("%q: accepted", text)
		}
	}
	for text, want := range map[string]DMAMode{"auto": DMAAuto, "off": DMAOff, "on": DMAOn} {
		if m, err := ParseDMAMode(text); m != want || err != nil {
			t.Errorf("%q: %v, %v", text, m, err)
		}
	}
	// A board without an engine, where one is wanted.
	l := NewLink(Config{DMA: DMAConfig{Mode: DMAOn}, Log: &lines{}})
	if _, err := (*handler)(l).Declare(plainBoard{}); !errors.Is(err, board.ErrInput) {
		t.Errorf("on, without an engine: %v", err)
	}
}

type plainBoard struct{ board.Board }

func (plainBoard) String() string { return "plain:" }
