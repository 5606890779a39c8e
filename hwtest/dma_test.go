package hwtest

import (
	"encoding/json"
	"fmt"
	"testing"
	"time"

	"github.com/boardlink/boardlink/bench/dmabench"
	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/hwtest/vm"
	"github.com/boardlink/boardlink/hwtest/vm/vmtest"
)

// dmaTarget is the board of -board, or this machine's memory.
func dmaTarget(t testing.TB) *dmabench.Target {
	t.Helper()
	open := dmabench.Loopback
	if *boardFlag != "" {
		open = func() (*dmabench.Target, error) {
			b, err := board.Open(*boardFlag, board.Options{Side: board.Host, Logf: t.Logf})
			if err != nil {
				return nil, err
			}
			t.Cleanup(func() { b.Close() })
			return dmabench.Board(b, 0, 0)
		}
	}
	target, err := open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { target.Close() })
	return target
}

// TestDMA checks every way to copy, at every size, both ways.
//
//	go test ./hwtest -run DMA -bench DMA -board ivshmem:0000:00:04.0
func TestDMA(t *testing.T) {
	r, err := dmabench.Run(t.Context(), dmaTarget(t), dmabench.Config{Duration: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	if r.Corrupt != 0 || len(r.Points) == 0 {
		t.Errorf("%d of %d measurements are corrupt", r.Corrupt, len(r.Points))
	}
	t.Logf("%s: %d measurements in %.1f s, ratio %+v, skipped %v", r.Target.Name, len(r.Points), r.Seconds, r.Ratio, r.Skipped)
}

// BenchmarkDMA is the same in the form that benchstat reads.
func BenchmarkDMA(b *testing.B) {
	target := dmaTarget(b)
	for _, v := range target.Variants {
		for _, d := range []dmabench.Direction{dmabench.HostToBoard, dmabench.BoardToHost} {
			if v.Only != "" && v.Only != d {
				continue
			}
			for _, size := range []uint32{64, 1024, 64 << 10, 1 << 20} {
				if size > v.Board.Len {
					continue
				}
				b.Run(fmt.Sprintf("%s/%s/%d", v.Name, d, size), func(b *testing.B) {
					between := func(host dma.Span) dma.Copy {
						if d == dmabench.BoardToHost {
							return dma.Copy{Dst: host.Sub(0, size), Src: v.Board.Sub(0, size)}
						}
						return dma.Copy{Dst: v.Board.Sub(0, size), Src: host.Sub(0, size)}
					}
					b.SetBytes(int64(size))
					if v.Engine == nil {
						c := between(v.Host)
						for b.Loop() {
							dma.CopySpan(c.Dst, c.Src)
						}
						return
					}
					e, mem, err := v.Engine(d)
					if err != nil {
						b.Fatal(err)
					}
					if mem.Region == nil {
						mem = v.Host
					}
					c := between(mem)
					m := dma.NewMover(dma.MoverConfig{Engine: e, Min: 1})
					batch := []dma.Copy{c}
					for b.Loop() {
						if err := m.Move(batch); err != nil {
							b.Fatal(err)
						}
					}
					if n := m.Stats().Get("redone"); n != 0 {
						b.Errorf("%d copies were done over again", n)
					}
					if err := m.Close(); err != nil {
						b.Error(err)
					}
				})
			}
		}
	}
}

// TestDMAInVM measures an ivshmem board through VFIO: its window is a BAR, and is not overwritten where an agent has its link.
func TestDMAInVM(t *testing.T) {
	vmtest.Short(t, "it boots a virtual machine")
	s := serve(t)
	m := vmtest.Boot(t, config(vm.Carrier(ivshmem(s))))
	bind(t, m, slot, "vfio-pci")
	out := vmtest.Run(t, m, "/bin/boardlink", "bench", "dma", "ivshmem:"+slot, "--json", "--duration", "1ms", "--max-size", "64K")
	var r dmabench.Result
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		t.Fatalf("%v:\n%s", err, out)
	}
	if r.Corrupt != 0 || len(r.Points) == 0 || r.Target.Memory == "cached" || r.Ratio != nil {
		t.Errorf("%d corrupt, %d points, memory %s, ratio %v", r.Corrupt, len(r.Points), r.Target.Memory, r.Ratio)
	}
	for _, p := range r.Points {
		if p.Size == 64<<10 && p.Aligned && p.InFlight == 1 {
			t.Logf("%s, %s: %.0f MB/s", p.Variant, p.Direction, p.MBps)
		}
	}
}
