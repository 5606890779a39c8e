package tunbridge

import (
	"testing"
	"time"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
	"golang.org/x/sys/unix"
)

// A Mover in the path costs no allocation, no system call and no doorbell more.
func TestMovedPumpCosts(t *testing.T) {
	for _, toHost := range []bool{true, false} {
		for _, size := range []int{64, 1514, 9014} {
			name := map[bool]string{true: "to host", false: "to board"}[toHost]
			t.Run(name, func(t *testing.T) {
				ifaceNS(t)
				m := dma.NewMover(dma.MoverConfig{Engine: dma.NewCPUEngine(16), Min: 1})
				p := newPathWith(t, toHost, true, size, mmio.Uncached, m)
				const batch, runs = 8, 20 // few enough for batchBytes
				if err := p.move(batch); err != nil {
					t.Fatal(err)
				}
				frames, bells, copies := p.moved.Frames(), *p.bells, m.Stats().Get("engine_copies")
				allocs := testing.AllocsPerRun(runs, func() {
					if err := p.move(batch); err != nil {
						t.Fatal(err)
					}
				})
				if allocs != 0 {
					t.Errorf("%v allocations for %d frames", allocs, batch)
				}
				if got := p.moved.Frames() - frames; got != batch*(runs+1) {
					t.Errorf("%d of %d frames came over", got, batch*(runs+1))
				}
				if got := *p.bells - bells; got > 2*(runs+1) {
					t.Errorf("%d doorbells for %d batches", got, runs+1)
				}
				if got := m.Stats().Get("engine_copies") - copies; got != batch*(runs+1) {
					t.Errorf("%d copies for %d frames: one each, header and all", got, batch*(runs+1))
				}
			})
		}
	}
}

// neverEngine takes copies and never ends one, until it is aborted.
type neverEngine struct {
	dma.Engine
	tags    []uint64
	aborted bool
}

func (e *neverEngine) Submit(batch []dma.Copy) (int, error) {
	for _, c := range batch {
		e.tags = append(e.tags, c.Tag)
	}
	return len(batch), nil
}

func (e *neverEngine) Poll(done []dma.Completion) int {
	if !e.aborted {
		return 0
	}
	n := 0
	for ; n < len(done) && n < len(e.tags); n++ {
		done[n] = dma.Completion{Tag: e.tags[n], Err: dma.ErrAborted}
	}
	e.tags = e.tags[n:]
	return n
}

func (e *neverEngine) Abort() error { e.aborted = true; return dma.ErrRunaway }
func (e *neverEngine) Close() error { return nil }

// A pump that ends with frames in flight leaves nothing to the engine, and the next pump delivers each frame once. The
// engine cannot be stopped, so its staging memory is not used again.
func TestMovedPumpEnds(t *testing.T) {
	ifaceNS(t)
	m := dma.NewMover(dma.MoverConfig{Engine: &neverEngine{Engine: dma.NewCPUEngine(16)}, Min: 1, Timeout: 10 * time.Millisecond, Spin: time.Millisecond})
	p := newPathWith(t, true, false, 500, mmio.Uncached, m)
	p.to.Stop.Raise()
	tx := NewDeviceTX(p.to, p.dev)
	for i := 0; i < 3; i++ {
		if _, err := unix.Write(p.socket, p.frame); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.in(); err != nil {
		t.Fatal(err)
	}
	// As in drainMoved, up to where it would wait.
	k, err := tx.pop(tx.fly.can())
	if err != nil || k != 3 {
		t.Fatalf("popped %d, %v", k, err)
	}
	if err := tx.launchAll(k); err != nil {
		t.Fatal(err)
	}
	if err := tx.Run(); err != nil { // the Stop is raised: it only ends
		t.Fatal(err)
	}
	if s := p.dev.State(); s.Avail != s.Used {
		t.Errorf("state %+v after the pump's end: chains were not given back", s)
	}
	if m.Runaway() == nil {
		t.Error("the mover does not tell of the engine")
	}
	next := NewDeviceTX(p.to, p.dev)
	if n, err := next.drain(); n != 3 || err != nil || next.fly != nil {
		t.Errorf("the next pump moved %d frames, %v", n, err)
	}
	next.stats.flush(&next.d)
	if p.moved.Frames() != 3 {
		t.Errorf("%d frames in all", p.moved.Frames())
	}
}
