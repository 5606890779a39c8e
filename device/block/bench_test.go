package block

import (
	"fmt"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/vring"
)

// BenchmarkRead is reads of 4 KiB and 1 MiB from a file in the page cache, so many under way at a time.
func BenchmarkRead(b *testing.B) {
	for _, c := range []struct {
		size, depth int
		pool        bool // all by the pool
	}{{4096, 1, false}, {4096, 1, true}, {4096, 32, false}, {4096, 32, true}, {1 << 20, 1, false}, {1 << 20, 8, false}} {
		c := c
		b.Run(fmt.Sprintf("size=%d/depth=%d/pool=%v", c.size, c.depth, c.pool), func(b *testing.B) {
			d := newDisk(b, Config{Backend: openImage(b, FileConfig{Path: image(b, 64<<20)})}, mmio.Cached)
			d.b.pace.off = c.pool
			d.q = d.Queue(0, 128)
			d.restart()
			var reqs []vring.Request
			for i := 0; i < c.depth; i++ {
				reqs = append(reqs, d.request(virtio.BlkTIn, uint64(i*(c.size/512)), false, c.size).vring(uint32(i)))
			}
			b.SetBytes(int64(c.size))
			b.ReportAllocs()
			d.q.Add(reqs...)
			done := make([]vring.Completion, c.depth)
			var ended []vring.Completion // of done, not made available again
			again := make([]vring.Request, 0, c.depth)
			for b.Loop() {
				for len(ended) == 0 {
					k, err := d.q.Reap(done)
					if err != nil {
						b.Fatal(err)
					}
					if ended = done[:k]; k > 0 {
						break
					}
					if pending, _ := d.q.ArmCall(); !pending {
						wait(d.q.Call.FD())
						d.q.Call.Ack()
					}
				}
				again = append(again, reqs[ended[0].Token])
				if ended = ended[1:]; len(ended) == 0 {
					d.q.Add(again...)
					again = again[:0]
				}
			}
		})
	}
}

func wait(fd int) {
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	unix.Poll(p, 1000)
}
