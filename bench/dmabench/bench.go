// Package dmabench measures what moves payload between a host and a board: the processor's copies and DMA engines, both ways, at
// many sizes, aligned and not, several in flight, every result checked.
//
// In the room: the measurement, its targets, the plot. Never in it: flags, printing (cmd/boardlink), testing.T.
package dmabench

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"runtime"
	"time"

	"github.com/boardlink/boardlink/bench/benchkit"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/pci"
)

// Direction is a way across the bus.
type Direction string

// The directions.
const (
	HostToBoard Direction = "host to board"
	BoardToHost Direction = "board to host"
)

// Variant is a way to copy.
type Variant struct {
	// Name stands in tables: "runtime copy", "device copy", an engine's name.
	Name string
	// Host and Board are the memories, of the same length. Board is seen as the variant's copy sees it.
	Host, Board dma.Span
	// Engine returns what copies, and the memory of the host that it reaches where that is not Host; nil is the processor,
	// without anything in between. The engine is closed in the end, and its memory goes with it.
	Engine func(Direction) (dma.Engine, dma.Span, error)
	// Only, if not empty, is the one direction that the variant can do.
	Only Direction
}

// Target is what is measured.
type Target struct {
	Name     string       `json:"name"`
	Link     *Link        `json:"link,omitempty"` // nil where it is not known
	Memory   string       `json:"memory"`         // of the board, as the host sees it
	Variants []Variant    `json:"-"`
	Close    func() error `json:"-"`
}

// Link is the PCI Express link to a board.
type Link struct {
	Width      int     `json:"width"`       // lanes
	SpeedGTps  float64 `json:"speed_gtps"`  // GT/s a lane
	MaxPayload int     `json:"max_payload"` // bytes in a packet
	LimitMBps  float64 `json:"limit_mbps"`  // of payload, each way
}

// tlpOverhead is what surrounds the payload of a memory write with 64-bit address on the link, in bytes: framing and sequence 4+2 (or a token of
// 4 and sequence), header 16, LCRC 4, rounded as pcie-model (github.com/pcie-bench) has it.
const tlpOverhead = 24

// NewLink returns the link with its limit: encoding (8b/10b up to 5 GT/s, 128b/130b above) and packet headers taken off; nil where
// a figure is missing. Flow control and acknowledgements take some more.
func NewLink(p *pci.PCIeCap) *Link {
	if p == nil || p.Speed == 0 || p.Width == 0 || p.MaxPayload == 0 {
		return nil
	}
	l := &Link{Width: p.Width, SpeedGTps: float64(p.Speed) / 10, MaxPayload: p.MaxPayload}
	coding := 128.0 / 130
	if p.Speed <= 50 {
		coding = 0.8
	}
	l.LimitMBps = l.SpeedGTps * 1e9 * coding / 8 * float64(l.Width) * float64(l.MaxPayload) / float64(l.MaxPayload+tlpOverhead) / 1e6
	return l
}

// Config says what to measure. The zero value is the default.
type Config struct {
	Sizes    []int         // bytes; nil: 64 to 4 MiB, doubled
	InFlight []int         // of engines; nil: 1, 2, 4, 8
	Duration time.Duration // of one measurement; 0: 6 ms
	Step     func(string)  // if set, hears what is measured
}

// Point is one measurement.
type Point struct {
	Variant   string    `json:"variant"`
	Direction Direction `json:"direction"`
	Size      int       `json:"size"` // bytes
	InFlight  int       `json:"in_flight"`
	Aligned   bool      `json:"aligned"` // false: the board's side starts at an odd address, the host's three bytes behind a line
	MBps      float64   `json:"mbps"`
	P50       float64   `json:"p50_us"` // time of one copy, from submission to completion; below 2 KiB the mean of a batch
	P99       float64   `json:"p99_us"`
	CPU       float64   `json:"cpu"` // processor time by time
	Copies    int       `json:"copies"`
	Engine    bool      `json:"engine,omitempty"` // a DMA engine copied, or the stand-in of one
	CRC       string    `json:"crc32c"`           // of what arrived, equal to what was sent
}

// Best returns the fastest measurement of a direction, by the processor or by engines, and of equally fast ones the
// smallest; nil where there is none.
func (r *Result) Best(d Direction, engine bool) *Point {
	var best *Point
	for i := range r.Points {
		p := &r.Points[i]
		if p.Direction != d || p.Engine != engine {
			continue
		}
		if best == nil || p.MBps > best.MBps || p.MBps == best.MBps && p.Size < best.Size {
			best = p
		}
	}
	return best
}

// Ratio compares the copy for device memory with the runtime's copy between cached memories, aligned, at 64 KiB.
type Ratio struct {
	HostToBoard float64 `json:"host_to_board"`
	BoardToHost float64 `json:"board_to_host"`
}

// Result is what was measured.
type Result struct {
	Target  Target   `json:"target"`
	Points  []Point  `json:"points"`
	Skipped []string `json:"skipped,omitempty"` // and why
	// Ratio is there where both memories are RAM.
	Ratio   *Ratio  `json:"device_copy_ratio_64k,omitempty"`
	Corrupt int     `json:"corrupt"` // copies that did not arrive as they were sent, or touched more
	Seconds float64 `json:"seconds"`
	// Environment is the caller's to fill in.
	Environment *benchkit.Environment `json:"environment,omitempty"`
}

// Names of the variants that loopback and every board have.
const (
	RuntimeCopy = "runtime copy"
	DeviceCopy  = "device copy"
	WCCopy      = "wc copy"
	CPUEngine   = "cpu engine"
)

const (
	guard   = 64                     // bytes in front of and behind each destination
	slowest = 400 * time.Millisecond // a single copy that takes longer ends the sizes
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// DefaultSizes returns 64 bytes to max, doubled.
func DefaultSizes(max int) []int {
	var l []int
	for n := 64; n <= max; n *= 2 {
		l = append(l, n)
	}
	return l
}

// Run measures. It goes on behind copies that are wrong, and counts them.
func Run(ctx context.Context, t *Target, c Config) (*Result, error) {
	if c.Sizes == nil {
		c.Sizes = DefaultSizes(4 << 20)
	}
	if c.InFlight == nil {
		c.InFlight = []int{1, 2, 4, 8}
	}
	if c.Duration <= 0 {
		c.Duration = 6 * time.Millisecond
	}
	if c.Step == nil {
		c.Step = func(string) {}
	}
	runtime.LockOSThread() // processor time is the thread's
	defer runtime.UnlockOSThread()
	began := time.Now()
	r := &Result{Target: *t, Points: []Point{}}
	for i := range t.Variants {
		v := &t.Variants[i]
		for _, d := range []Direction{HostToBoard, BoardToHost} {
			if v.Only != "" && v.Only != d {
				continue
			}
			if err := r.direction(ctx, v, d, &c); err != nil {
				return r, fmt.Errorf("%s, %s: %w", v.Name, d, err)
			}
		}
	}
	r.ratio(ctx, t, &c)
	r.Seconds = time.Since(began).Seconds()
	return r, ctx.Err()
}

func (r *Result) direction(ctx context.Context, v *Variant, d Direction, c *Config) (err error) {
	m := &meter{v: v, d: d, host: v.Host}
	flights := []int{1}
	if v.Engine != nil {
		var mem dma.Span
		if m.e, mem, err = v.Engine(d); err != nil {
			return err
		}
		if mem.Region != nil {
			m.host = mem
		}
		defer func() {
			if cerr := m.e.Close(); err == nil {
				err = cerr
			}
		}()
		flights = c.InFlight
	}
	for _, aligned := range []bool{true, false} {
	sizes:
		for _, size := range c.Sizes {
			for _, k := range flights {
				if err := ctx.Err(); err != nil {
					return err
				}
				c.Step(fmt.Sprintf("%s, %s, %s, %d in flight", v.Name, d, SizeString(size), k))
				what := fmt.Sprintf("%s, %s, aligned %v, %s, %d in flight", v.Name, d, aligned, SizeString(size), k)
				if !m.place(size, k, aligned) {
					r.Skipped = append(r.Skipped, what+": more than the memory")
					continue
				}
				p, err := m.point(c.Duration)
				if errors.Is(err, dma.ErrLimits) {
					r.Skipped = append(r.Skipped, what+": not within the engine's limits")
					continue
				}
				if errors.Is(err, errCorrupt) {
					r.Corrupt++
				} else if err != nil {
					return err
				}
				p.Variant, p.Direction, p.Size, p.InFlight, p.Aligned = v.Name, d, size, k, aligned
				p.Engine = v.Engine != nil
				r.Points = append(r.Points, p)
				if time.Duration(p.P50*1e3) > slowest/time.Duration(k) {
					r.Skipped = append(r.Skipped, what+": too slow for larger ones")
					break sizes
				}
			}
		}
	}
	return nil
}

// meter measures one variant in one direction.
type meter struct {
	v    *Variant
	d    Direction
	host dma.Span
	e    dma.Engine
	jobs []job
	size int
	seed uint32
	buf  []byte
	done []dma.Completion
	lat  []float64 // seconds
}

type job struct {
	c     dma.Copy
	start time.Time
}

// place lays k pieces out; false where the memory is too small.
func (m *meter) place(size, k int, aligned bool) bool {
	stride := (size+2*guard+64+4095)&^4095 + 64 // not all in the same cache sets
	if uint64(stride)*uint64(k) > uint64(m.host.Len) || uint64(stride)*uint64(k) > uint64(m.v.Board.Len) {
		return false
	}
	m.jobs, m.size = m.jobs[:0], size
	for i := range k {
		ho, bo := uint32(i*stride+guard), uint32(i*stride+guard)
		if !aligned {
			ho, bo = ho+3, bo+1
		}
		h, b := m.host.Sub(ho, uint32(size)), m.v.Board.Sub(bo, uint32(size))
		if m.d == HostToBoard {
			m.jobs = append(m.jobs, job{c: dma.Copy{Dst: b, Src: h, Tag: uint64(i)}})
		} else {
			m.jobs = append(m.jobs, job{c: dma.Copy{Dst: h, Src: b, Tag: uint64(i)}})
		}
	}
	return true
}

var errCorrupt = errors.New("what arrived is not what was sent")

// point checks, measures, and checks again.
func (m *meter) point(d time.Duration) (Point, error) {
	var p Point
	m.prepare()
	if err := m.once(); err != nil {
		return p, err
	}
	_, bad := m.verify()
	if err := m.measure(d, &p); err != nil {
		return p, err
	}
	sum, bad2 := m.verify()
	p.CRC = fmt.Sprintf("%08x", sum)
	if bad || bad2 {
		return p, errCorrupt
	}
	return p, nil
}

// around returns s with the guards around it.
func around(s dma.Span) dma.Span {
	return dma.Span{Region: s.Region, Off: s.Off - guard, Len: s.Len + 2*guard}
}

// prepare fills the sources with a pattern that is new each time, and the destinations with another one.
func (m *meter) prepare() {
	if n := m.size + 2*guard; len(m.buf) < n {
		m.buf = make([]byte, n)
	}
	m.seed++
	for i := range m.jobs {
		c := &m.jobs[i].c
		pattern(m.buf[:m.size], m.seed*16+uint32(i))
		c.Src.CopyIn(0, m.buf[:m.size])
		b := m.buf[:m.size+2*guard]
		b[0] = 0xa5
		for n := 1; n < len(b); n *= 2 {
			copy(b[n:], b[:n])
		}
		around(c.Dst).CopyIn(0, b)
	}
}

func pattern(b []byte, seed uint32) {
	x := uint64(seed)*0x9e3779b97f4a7c15 + 1
	next := func() uint64 {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		return x
	}
	for ; len(b) >= 8; b = b[8:] {
		binary.LittleEndian.PutUint64(b, next())
	}
	for v := next(); len(b) > 0; b = b[1:] {
		b[0] = byte(v)
		v >>= 8
	}
}

// verify reads the destinations back and compares checksums.
func (m *meter) verify() (sum uint32, bad bool) {
	for i := range m.jobs {
		c := &m.jobs[i].c
		b := m.buf[:m.size+2*guard]
		around(c.Dst).CopyOut(b, 0)
		for j := range guard {
			bad = bad || b[j] != 0xa5 || b[guard+m.size+j] != 0xa5
		}
		got := crc32.Checksum(b[guard:guard+m.size], castagnoli)
		pattern(b[:m.size], m.seed*16+uint32(i))
		bad = bad || got != crc32.Checksum(b[:m.size], castagnoli)
		sum ^= got
	}
	return sum, bad
}
