package dmabench

import (
	"context"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"math"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/board/loopback"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/dma/engine"
	"github.com/boardlink/boardlink/dma/engine/fsl"
	dmamodel "github.com/boardlink/boardlink/hwtest/models/dma"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/pci"
)

var quick = Config{Sizes: []int{64, 4096, 64 << 10}, InFlight: []int{1, 8}, Duration: 500 * time.Microsecond}

func TestLoopback(t *testing.T) {
	target, err := Loopback()
	if err != nil {
		t.Fatal(err)
	}
	defer target.Close()
	r, err := Run(context.Background(), target, quick)
	if err != nil {
		t.Fatal(err)
	}
	// Three copies of one in flight, those of other widths that this processor has, an engine of two.
	wide := 0
	for n := uint8(16); n <= mmio.Widest().Load && n <= mmio.Widest().Store; n *= 2 {
		wide++
	}
	if want := 2 * 2 * 3 * (3 + wide + 2); len(r.Points) != want || r.Corrupt != 0 || len(r.Skipped) != 0 {
		t.Errorf("%d points, want %d; %d corrupt; skipped %v", len(r.Points), want, r.Corrupt, r.Skipped)
	}
	sums := map[string]string{}
	for _, p := range r.Points {
		if p.MBps <= 0 || p.P50 <= 0 || p.P99 < p.P50 || p.CPU <= 0 || p.CPU > 1 || p.Copies < p.InFlight || len(p.CRC) != 8 {
			t.Errorf("%+v", p)
		}
		sums[p.CRC] = p.Variant
	}
	if len(sums) < 3 {
		t.Errorf("checksums %v: the patterns do not change", sums)
	}
	if r.Ratio == nil || r.Ratio.HostToBoard <= 0 || r.Ratio.BoardToHost <= 0 {
		t.Errorf("ratio %v", r.Ratio)
	}
	b, err := json.Marshal(r)
	if err != nil || !strings.Contains(string(b), `"device_copy_ratio_64k":{"host_to_board":`) {
		t.Errorf("%v: %s", err, b)
	}
}

// modelTarget is a board with a modelled engine.
func modelTarget(t *testing.T, fault func(uint64) dmamodel.Fault) (*Target, *dmamodel.FSL) {
	t.Helper()
	const size, desc = 1 << 20, 1 << 16
	near, far := make([]byte, size+desc), make([]byte, size)
	m := dmamodel.NewFSL(false, dmamodel.Options{Fault: fault, Polls: 1, Memory: []dmamodel.Range{
		{Name: "board", Base: 1 << 28, Bytes: near}, {Name: "host", Base: 1 << 31, Bytes: far, Far: true}}})
	rw := dma.DeviceRead | dma.DeviceWrite
	maps, err := engine.NewMap(0, engine.Window{Name: "board", Size: size, Bus: 1 << 28, Access: rw},
		engine.Window{Name: "host", Link: hostLink, Size: size, Bus: 1 << 31, Side: engine.Far, Access: rw})
	if err != nil {
		t.Fatal(err)
	}
	lists, err := mmio.FromBytes(near).Slice(size, desc)
	if err != nil {
		t.Fatal(err)
	}
	open := func(Direction) (dma.Engine, dma.Span, error) {
		e, err := fsl.New(fsl.Config{Regs: m.Mem(), Channels: []int{0, 1}, Desc: lists, DescBus: 1<<28 + size, Map: maps})
		return e, dma.Span{}, err
	}
	board := &dma.Region{Name: "board", Mem: mmio.FromBytes(near[:size]), Access: rw}
	host := &dma.Region{Name: "host", Addr: hostLink, Mem: mmio.FromBytes(far), Access: rw}
	return &Target{Name: "model", Memory: "RAM", Link: &Link{Width: 1, SpeedGTps: 2.5, MaxPayload: 128, LimitMBps: 210},
		Variants: []Variant{{Name: "fsl", Host: dma.Span{Region: host, Len: size}, Board: dma.Span{Region: board, Len: size}, Engine: open}}}, m
}

// TestEngine: an engine under the measurement keeps to its rules, with eight copies in flight.
func TestEngine(t *testing.T) {
	target, m := modelTarget(t, nil)
	c := quick
	c.Sizes = append(c.Sizes, 256<<10)
	r, err := Run(context.Background(), target, c)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Err(); err != nil {
		t.Error(err)
	}
	if r.Corrupt != 0 || len(r.Points) != 2*2*(3*2+1) || len(r.Skipped) != 4 {
		t.Errorf("%d corrupt, %d points, skipped %v", r.Corrupt, len(r.Points), r.Skipped)
	}
	if r.Ratio != nil {
		t.Error("a ratio without the copies")
	}
	var b strings.Builder
	if err := Plot(&b, r); err != nil {
		t.Fatal(err)
	}
	checkSVG(t, b.String(), 2, true)
}

// TestEngineFails: a transfer that fails is an error of the measurement, which is about the engine.
func TestEngineFails(t *testing.T) {
	target, _ := modelTarget(t, func(n uint64) dmamodel.Fault {
		if n == 100 {
			return dmamodel.Error
		}
		return dmamodel.NoFault
	})
	if _, err := Run(context.Background(), target, quick); !errors.Is(err, dma.ErrTransfer) {
		t.Errorf("%v", err)
	}
}

// liar says it has copied.
type liar struct{ dma.Engine }

func (l liar) Submit(b []dma.Copy) (int, error) {
	for i := range b {
		// One byte is missing.
		b[i].Src.Len--
	}
	return l.Engine.Submit(b)
}

// TestCorrupt: bytes that do not arrive are found.
func TestCorrupt(t *testing.T) {
	target, _ := modelTarget(t, nil)
	target.Variants[0].Engine = func(Direction) (dma.Engine, dma.Span, error) {
		return liar{dma.NewCPUEngine(8)}, dma.Span{}, nil
	}
	r, err := Run(context.Background(), target, quick)
	if err != nil || r.Corrupt != len(r.Points) || r.Corrupt == 0 {
		t.Errorf("%d of %d are corrupt, %v", r.Corrupt, len(r.Points), err)
	}
}

func TestInterrupted(t *testing.T) {
	target, _ := modelTarget(t, nil)
	ctx, stop := context.WithCancel(context.Background())
	stop()
	if _, err := Run(ctx, target, quick); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func checkSVG(t *testing.T, s string, lines int, limit bool) {
	t.Helper()
	d := xml.NewDecoder(strings.NewReader(s))
	for {
		if _, err := d.Token(); err == io.EOF {
			break
		} else if err != nil {
			t.Fatalf("the plot is no XML: %v", err)
		}
	}
	if n := strings.Count(s, "<polyline"); n != lines || strings.Contains(s, `class="limit"`) != limit || strings.Contains(s, "NaN") || strings.Contains(s, "Inf") {
		t.Errorf("%d lines, want %d; limit %v:\n%s", n, lines, !limit, s)
	}
}

// TestLink: limits as they are known: 8 GT/s a lane are 985 MB/s, less the headers.
func TestLink(t *testing.T) {
	for _, c := range []struct {
		p    *pci.PCIeCap
		want float64
	}{
		{&pci.PCIeCap{Speed: 80, Width: 8, MaxPayload: 256}, 984.6 * 8 * 256 / 280},
		{&pci.PCIeCap{Speed: 25, Width: 1, MaxPayload: 128}, 250.0 * 128 / 152},
		{&pci.PCIeCap{Speed: 50, Width: 4, MaxPayload: 128}, 2000.0 * 128 / 152},
		{&pci.PCIeCap{Speed: 0, Width: 4, MaxPayload: 128}, 0},
		{nil, 0},
	} {
		l := NewLink(c.p)
		if (l == nil) != (c.want == 0) || l != nil && math.Abs(l.LimitMBps-c.want) > 1 {
			t.Errorf("%+v: %+v, want %.0f", c.p, l, c.want)
		}
	}
}

// TestBoard: a window as a board has it, seen as each kind of memory.
func TestBoard(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	s, err := loopback.NewServer(loopback.ServerConfig{Path: path, Size: 1 << 20, Vectors: 1})
	if err != nil {
		t.Fatal(err)
	}
	go s.Serve()
	defer s.Close()
	for _, kind := range []mmio.Kind{mmio.Cached, mmio.WriteCombining, mmio.Uncached} {
		b, err := board.Open("loopback:"+path, board.Options{Side: board.Host, Kind: &kind})
		if err != nil {
			t.Fatal(err)
		}
		target, err := Board(b, 4096, 0)
		if err != nil {
			t.Fatal(err)
		}
		w := b.Window()
		w.Mem.Store32(4092, 0x12345678)
		r, err := Run(context.Background(), target, quick)
		if err != nil {
			t.Fatal(err)
		}
		if r.Corrupt != 0 || len(r.Points) != 2*2*(3+5) || r.Target.Link != nil || r.Target.Memory != kind.String() {
			t.Errorf("%v: %d corrupt, %d points, link %v, memory %s, skipped %v", kind, r.Corrupt, len(r.Points), r.Target.Link, r.Target.Memory, r.Skipped)
		}
		if w.Mem.Load32(4092) != 0x12345678 {
			t.Error("the window in front of the offset was written")
		}
		if _, err := Board(b, w.Mem.Size(), 0); err == nil {
			t.Error("an offset behind the window: accepted")
		}
		target.Close()
		b.Close()
	}
}

// TestSmallCopiesInBatches: below 2 KiB the clock is read once for a batch of 16 KiB, by the processor's copies and an engine's.
func TestSmallCopiesInBatches(t *testing.T) {
	reads := 0
	real := now
	now = func() time.Time { reads++; return real() }
	defer func() { now = real }()
	target, err := Loopback()
	if err != nil {
		t.Fatal(err)
	}
	defer target.Close()
	for i := range target.Variants {
		v := &target.Variants[i]
		for _, size := range []int{64, 1 << 10, 2 << 10} {
			m := &meter{v: v, d: HostToBoard, host: v.Host}
			k := 1
			if v.Engine != nil {
				var mem dma.Span
				if m.e, mem, err = v.Engine(HostToBoard); err != nil {
					t.Fatal(err)
				}
				if mem.Region != nil {
					m.host = mem
				}
				k = 4
			}
			if !m.place(size, k, true) {
				t.Fatal("no room")
			}
			m.prepare()
			reads = 0
			var p Point
			if err := m.measure(2*time.Millisecond, &p); err != nil {
				t.Fatal(err)
			}
			if _, bad := m.verify(); bad {
				t.Errorf("%s, %d bytes: corrupt", v.Name, size)
			}
			// One read for a batch, some at the start, at the end, and while nothing is done.
			if least := (reads - 8) * 16384 / size / 2; size < batched && p.Copies < least {
				t.Errorf("%s, %d bytes: %d copies for %d readings of the clock, want %d", v.Name, size, p.Copies, reads, least)
			}
			if p.P50 <= 0 || p.Copies == 0 {
				t.Errorf("%s, %d bytes: %+v", v.Name, size, p)
			}
			if m.e != nil {
				if err := m.e.Close(); err != nil {
					t.Error(err)
				}
			}
		}
	}
}

func TestBest(t *testing.T) {
	r := &Result{Points: []Point{
		{Variant: "a", Direction: HostToBoard, Size: 64, MBps: 5},
		{Variant: "b", Direction: HostToBoard, Size: 4096, MBps: 9},
		{Variant: "b", Direction: HostToBoard, Size: 2048, MBps: 9},
		{Variant: "e", Direction: HostToBoard, Size: 4096, MBps: 99, Engine: true},
		{Variant: "c", Direction: BoardToHost, Size: 128, MBps: 1},
	}}
	for _, c := range []struct {
		d      Direction
		engine bool
		want   string
	}{{HostToBoard, false, "b 2048"}, {HostToBoard, true, "e 4096"}, {BoardToHost, false, "c 128"}, {BoardToHost, true, "none"}} {
		got := "none"
		if p := r.Best(c.d, c.engine); p != nil {
			got = fmt.Sprint(p.Variant, " ", p.Size)
		}
		if got != c.want {
			t.Errorf("%s, engine %v: %s, want %s", c.d, c.engine, got, c.want)
		}
	}
}
