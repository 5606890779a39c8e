package mmio_test

import (
	"fmt"
	"testing"
	"unsafe"

	"github.com/boardlink/boardlink/mmio"
)

func BenchmarkAccess(b *testing.B) {
	mem := aligned(4096)
	p := unsafe.Pointer(&mem[0])
	m := mmio.NewMem(p, 4096, mmio.Uncached)
	c := mmio.NewMem(p, 4096, mmio.Cached)
	r, _ := c.RAM()
	var sum uint32
	b.Run("stub/Load32", func(b *testing.B) {
		for b.Loop() {
			sum += mmio.Load32(p)
		}
	})
	b.Run("stub/Store32", func(b *testing.B) {
		for b.Loop() {
			mmio.Store32(p, sum)
		}
	})
	b.Run("Mem/Load32", func(b *testing.B) {
		for b.Loop() {
			sum += m.Load32(8)
		}
	})
	b.Run("Mem/Store32", func(b *testing.B) {
		for b.Loop() {
			m.Store32(8, sum)
		}
	})
	b.Run("RAM/Load32", func(b *testing.B) {
		for b.Loop() {
			sum += r.Load32(8)
		}
	})
	b.Run("RAM/Store32", func(b *testing.B) {
		for b.Loop() {
			r.Store32(8, sum)
		}
	})
	for _, m := range []mmio.Mem{c, m} {
		b.Run("Mem/Publish32/"+m.Kind().String(), func(b *testing.B) {
			for b.Loop() {
				m.Publish32(8, sum)
			}
		})
		b.Run("Mem/Consume32/"+m.Kind().String(), func(b *testing.B) {
			for b.Loop() {
				sum += m.Consume32(8)
			}
		})
	}
	b.Run("RAM/Publish32", func(b *testing.B) {
		for b.Loop() {
			r.Publish32(8, sum)
		}
	})
	b.Run("RAM/Consume32", func(b *testing.B) {
		for b.Loop() {
			sum += r.Consume32(8)
		}
	})
}

func BenchmarkFence(b *testing.B) {
	for _, k := range []mmio.Kind{mmio.Cached, mmio.Uncached} {
		for i, name := range []string{"read", "write", "full"} {
			b.Run(k.String()+"/"+name, func(b *testing.B) {
				for b.Loop() {
					mmio.Fence(k, mmio.Barrier(i))
				}
			})
		}
	}
}

// BenchmarkCopy runs the device path over RAM too: what is measured is the loop, not a bus.
func BenchmarkCopy(b *testing.B) {
	mem, buf := aligned(1<<16+64), aligned(1<<16)
	for _, k := range []mmio.Kind{mmio.Cached, mmio.Uncached} {
		m := mmio.NewMem(unsafe.Pointer(&mem[0]), uint64(len(mem)), k)
		for _, off := range []uint64{0, 1} {
			for _, n := range []int{16, 64, 256, 1514, 4096, 65536} {
				b.Run(fmt.Sprintf("In/%v/off=%d/%d", k, off, n), func(b *testing.B) {
					b.SetBytes(int64(n))
					for b.Loop() {
						m.CopyIn(off, buf[:n])
					}
				})
				b.Run(fmt.Sprintf("Out/%v/off=%d/%d", k, off, n), func(b *testing.B) {
					b.SetBytes(int64(n))
					for b.Loop() {
						m.CopyOut(buf[:n], off)
					}
				})
			}
		}
	}
}

// BenchmarkWide runs the copies for device memory with every width over RAM: what is measured is the instructions, not a bus.
func BenchmarkWide(b *testing.B) {
	mem, buf := aligned(1<<16+64), aligned(1<<16)
	for w := range allWidths() {
		m, err := mmio.NewMem(unsafe.Pointer(&mem[0]), uint64(len(mem)), mmio.WriteCombining).WithWidths(w)
		if err != nil {
			b.Fatal(err)
		}
		for _, off := range []uint64{0, 1} {
			for _, n := range []int{16, 64, 256, 1514, 65536} {
				b.Run(fmt.Sprintf("In/%d/off=%d/%d", w.Store, off, n), func(b *testing.B) {
					b.SetBytes(int64(n))
					for b.Loop() {
						m.CopyIn(off, buf[:n])
					}
				})
				b.Run(fmt.Sprintf("Out/%d/off=%d/%d", w.Load, off, n), func(b *testing.B) {
					b.SetBytes(int64(n))
					for b.Loop() {
						m.CopyOut(buf[:n], off)
					}
				})
			}
		}
	}
}
