package mmio_test

import (
	"os"
	"runtime"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/boardlink/boardlink/mmio"
)

// both runs a and b at the same time, again and again, each on a thread of its own, each
// time behind prepare, which both threads run, and ahead of judge. It returns
// the number of rounds.
func both(t *testing.T, d time.Duration, prepare, a, b, judge func()) (rounds int) {
	t.Helper()
	if runtime.NumCPU() < 2 {
		if os.Getenv("CI") == "true" {
			t.Fatal("needs two processors")
		}
		t.Skip("needs two processors")
	}
	var stop, ready uint32
	thread := func(part func(), between func() bool) {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		met, round, pace := uint32(0), 0, byte(0)
		meet := func() {
			met += 2
			atomic.AddUint32(&ready, 1)
			for i := 1; int32(atomic.LoadUint32(&ready)-met) < 0; i++ {
				if i%4096 == 0 { // the other thread may have lost its processor
					syscall.RawSyscall(syscall.SYS_SCHED_YIELD, 0, 0, 0)
					runtime.Gosched()
				}
			}
		}
		for {
			prepare()
			skew := round % 256
			if between == nil {
				skew = 255 - skew
			}
			round++
			meet()
			for ; skew > 0; skew-- { // sweep over who comes first, and by how much
				mmio.Load8(unsafe.Pointer(&pace))
			}
			part()
			meet()
			if between != nil && between() {
				atomic.StoreUint32(&stop, 1)
			}
			meet()
			if atomic.LoadUint32(&stop) == 1 {
				return
			}
		}
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		thread(b, nil)
	}()
	end := time.Now().Add(d)
	thread(a, func() bool {
		judge()
		rounds++
		return time.Now().After(end)
	})
	<-done
	return rounds
}

// TestStoreBuffer is Dekker's test: of two threads that store to their own word and then
// load the other's, one must see the other's store. The sleep protocol of the rings stands on
// it. Without the barrier x86 fails about one round in a hundred.
func TestStoreBuffer(t *testing.T) {
	for _, kind := range []mmio.Kind{mmio.Cached, mmio.WriteCombining, mmio.Uncached} {
		t.Run(kind.String(), func(t *testing.T) {
			const slots, line = 64, 128
			p := mapped(2*slots*line, kind, mmio.DefaultWidths(kind))
			m := p.mem
			var sawX, sawY [slots]uint32
			bad := 0
			rounds := both(t, 300*time.Millisecond, func() {
				// Have all words in both caches, so that loads are quick and stores slow.
				for off := uint64(0); off < 2*slots*line; off += line {
					m.Load32(off)
				}
			}, func() {
				for i := range sawY {
					x, y := uint64(i*2*line), uint64(i*2*line+line)
					m.Store32(x, 1)
					m.Barrier(mmio.FullBarrier)
					sawY[i] = m.Load32(y)
				}
			}, func() {
				for i := range sawX {
					x, y := uint64(i*2*line), uint64(i*2*line+line)
					m.Store32(y, 1)
					m.Barrier(mmio.FullBarrier)
					sawX[i] = m.Load32(x)
				}
			}, func() {
				for i := range sawX {
					if sawX[i] == 0 && sawY[i] == 0 {
						bad++
					}
				}
				m.Zero(0, 2*slots*line)
			})
			t.Logf("%d rounds", rounds*slots)
			if bad > 0 {
				t.Errorf("in %d of %d rounds neither thread saw the other's store", bad, rounds*slots)
			}
		})
	}
}

// TestMessagePassing sees that who consumes an index finds the data behind it.
func TestMessagePassing(t *testing.T) {
	for _, kind := range []mmio.Kind{mmio.Cached, mmio.WriteCombining, mmio.Uncached} {
		t.Run(kind.String(), func(t *testing.T) {
			p := mapped(8192, kind, mmio.DefaultWidths(kind))
			m := p.mem
			const slots, data, index, back = 64, 4096, 0, 2048
			const total = 50000
			stale := make(chan int, 1)
			go func() {
				bad := 0
				yield := 0
				for seen := uint32(0); seen < total; {
					idx := m.Consume32(index)
					if idx == seen {
						if yield++; yield%1024 == 0 {
							runtime.Gosched()
						}
						continue
					}
					for ; seen != idx; seen++ {
						if m.Load64(data+uint64(seen%slots)*64) != uint64(seen)*0x100000001 {
							bad++
						}
					}
					m.Publish32(back, seen) // releases the loads above
				}
				stale <- bad
			}()
			yield := 0
			for i := uint32(0); i < total; {
				if i-m.Consume32(back) >= slots {
					if yield++; yield%1024 == 0 {
						runtime.Gosched()
					}
					continue
				}
				m.Store64(data+uint64(i%slots)*64, uint64(i)*0x100000001)
				i++
				m.Publish32(index, i)
			}
			if bad := <-stale; bad > 0 {
				t.Errorf("%d of %d messages were stale or overwritten early", bad, total)
			}
		})
	}
}
