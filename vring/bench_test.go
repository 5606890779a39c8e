package vring_test

import (
	"fmt"
	"runtime"
	"testing"

	"github.com/boardlink/boardlink/vring"
	"github.com/boardlink/boardlink/vring/vringtest"
)

func requests(r *vringtest.Rig, n, bufs int) []vring.Request {
	reqs := make([]vring.Request, n)
	for i := range reqs {
		for k := 0; k < bufs; k++ {
			off := uint64(i*bufs+k) * 64 % 32768
			reqs[i].Bufs = append(reqs[i].Bufs, vring.Buffer{Addr: r.Addr(off), Len: 64})
		}
		reqs[i].Readable = bufs / 2
		reqs[i].Token = uint32(i)
	}
	return reqs
}

// cycle passes one batch through both sides.
func cycle(drv vring.Driver, dev vring.Device, reqs []vring.Request, b *vring.Batch, used []vring.Used, done []vring.Completion) error {
	n, err := drv.Add(reqs)
	if err != nil || n != len(reqs) {
		return fmt.Errorf("added %d of %d: %v", n, len(reqs), err)
	}
	drv.NeedKick()
	b.Chains, b.Spans = b.Chains[:0], b.Spans[:0]
	if n, err = dev.Pop(b, len(reqs)); err != nil || n != len(reqs) {
		return fmt.Errorf("popped %d of %d: %v", n, len(reqs), err)
	}
	used = used[:0]
	for i := range b.Chains {
		c := &b.Chains[i]
		used = append(used, vring.Used{ID: c.ID, Count: c.Count, Len: c.WriteLen})
	}
	if err = dev.Complete(used); err != nil {
		return err
	}
	dev.NeedCall()
	if n, err = drv.Reap(done); err != nil || n != len(reqs) {
		return fmt.Errorf("reaped %d of %d: %v", n, len(reqs), err)
	}
	return nil
}

func benchCycle(b *testing.B, p vringtest.Params, batch, bufs int) {
	benchRig(b, vringtest.NewRig(b, p, 256, 65536), batch, bufs)
}

func benchRig(b *testing.B, r *vringtest.Rig, batch, bufs int) {
	drv, dev := r.Pair(b)
	reqs := requests(r, batch, bufs)
	var bt vring.Batch
	used := make([]vring.Used, 0, batch)
	done := make([]vring.Completion, batch)
	b.ReportAllocs()
	for b.Loop() {
		if err := cycle(drv, dev, reqs, &bt, used, done); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(batch*bufs), "ns/buffer")
}

// BenchmarkCycle is add, kick check, pop, complete, call check and reap, on one processor. The buffers are those of one
// lap before: compare kinds of ring with package bench/ringbench.
func BenchmarkCycle(b *testing.B) {
	for _, r := range vringtest.Rings {
		for _, m := range vringtest.Memories[1:5] {
			for _, batch := range []int{1, 64} {
				p := vringtest.Params{Ring: r, Memory: m, EventIdx: true}
				b.Run(fmt.Sprintf("%s/%s/batch%d", r.Name, m.Name, batch), func(b *testing.B) { benchCycle(b, p, batch, 1) })
			}
		}
		mm := vringtest.Memories[1]
		b.Run(r.Name+"/mmap64/flags", func(b *testing.B) {
			benchCycle(b, vringtest.Params{Ring: r, Memory: mm}, 64, 1)
		})
		b.Run(r.Name+"/mmap64/inorder", func(b *testing.B) {
			benchCycle(b, vringtest.Params{Ring: r, Memory: mm, EventIdx: true, InOrder: true}, 64, 1)
		})
		b.Run(r.Name+"/mmap64/chain2", func(b *testing.B) {
			benchCycle(b, vringtest.Params{Ring: r, Memory: mm, EventIdx: true}, 64, 2)
		})
		b.Run(r.Name+"/mmap64/indirect2", func(b *testing.B) {
			benchCycle(b, vringtest.Params{Ring: r, Memory: mm, EventIdx: true, Indirect: true}, 64, 2)
		})
	}
}

// BenchmarkJournal is BenchmarkCycle of a packed queue whose place is kept.
func BenchmarkJournal(b *testing.B) {
	for _, batch := range []int{1, 64} {
		b.Run(fmt.Sprintf("batch%d", batch), func(b *testing.B) {
			r := vringtest.NewRig(b, vringtest.Params{Ring: vringtest.Packed, Memory: vringtest.Memories[1], EventIdx: true}, 256, 65536)
			r.DevCfg.Journal = &vring.Journal{Words: make([]uint64, vring.JournalWords(256))}
			r.DevCfg.Journal.Reset(vring.State{Avail: wrap, Used: wrap, Packed: true})
			benchRig(b, r, batch, 1)
		})
	}
}

// BenchmarkPingPong passes batches between two goroutines that poll.
func BenchmarkPingPong(b *testing.B) {
	for i := 0; i < 4; i++ {
		ring, batch := vringtest.Rings[i>>1], []int{1, 64}[i&1]
		b.Run(fmt.Sprintf("%s/batch%d", ring.Name, batch), func(b *testing.B) {
			p := vringtest.Params{Ring: ring, Memory: vringtest.Memories[1], EventIdx: true}
			r := vringtest.NewRig(b, p, 256, 65536)
			drv, dev := r.Pair(b)
			reqs := requests(r, batch, 1)
			done := make([]vring.Completion, 256)
			stop := make(chan struct{})
			failed := make(chan error, 1)
			go func() {
				var bt vring.Batch
				var used []vring.Used
				for spins := 0; ; spins++ {
					bt.Chains, bt.Spans = bt.Chains[:0], bt.Spans[:0]
					n, err := dev.Pop(&bt, 64)
					if err != nil {
						failed <- err
						return
					}
					if n == 0 {
						select {
						case <-stop:
							failed <- nil
							return
						default:
						}
						if spins%64 == 0 {
							runtime.Gosched()
						}
						continue
					}
					used = used[:0]
					for i := range bt.Chains {
						used = append(used, vring.Used{ID: bt.Chains[i].ID, Count: bt.Chains[i].Count, Len: bt.Chains[i].WriteLen})
					}
					if err := dev.Complete(used); err != nil {
						failed <- err
						return
					}
				}
			}()
			b.ReportAllocs()
			for b.Loop() {
				if _, err := drv.Add(reqs); err != nil {
					b.Fatal(err)
				}
				for left := batch; left > 0; {
					n, err := drv.Reap(done)
					if err != nil {
						b.Fatal(err)
					}
					left -= n
				}
			}
			close(stop)
			if err := <-failed; err != nil {
				b.Fatal(err)
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(batch), "ns/buffer")
		})
	}
}

// BenchmarkPop is the device side's Pop alone: a batch is popped and given back.
func BenchmarkPop(b *testing.B) {
	for _, r := range vringtest.Rings {
		for _, m := range []vringtest.Memory{vringtest.Memories[1], vringtest.Memories[3]} {
			for _, c := range []struct {
				name            string
				batch, bufs     int
				inOrder, tables bool
			}{{"batch1", 1, 1, false, false}, {"batch64", 64, 1, false, false}, {"inorder", 64, 1, true, false}, {"chain2", 64, 2, false, false}, {"indirect2", 64, 2, false, true}} {
				b.Run(fmt.Sprintf("%s/%s/%s", r.Name, m.Name, c.name), func(b *testing.B) {
					rig := vringtest.NewRig(b, vringtest.Params{Ring: r, Memory: m, EventIdx: true, InOrder: c.inOrder, Indirect: c.tables}, 256, 65536)
					drv, dev := rig.Pair(b)
					if n, err := drv.Add(requests(rig, c.batch, c.bufs)); err != nil || n != c.batch {
						b.Fatal(n, err)
					}
					var bt vring.Batch
					b.ReportAllocs()
					for b.Loop() {
						bt.Chains, bt.Spans = bt.Chains[:0], bt.Spans[:0]
						if n, err := dev.Pop(&bt, c.batch); err != nil || n != c.batch {
							b.Fatal(n, err)
						}
						dev.Unpop(c.batch)
					}
					b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(c.batch*c.bufs), "ns/buffer")
				})
			}
		}
	}
}
