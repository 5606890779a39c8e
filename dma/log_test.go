package dma_test

import (
	"sync"
	"sync/atomic"
	"testing"
	"unsafe"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
)

// newLog returns a log of n words, and the words.
func newLog(t *testing.T, n int) (*dma.Log, []uint32) {
	t.Helper()
	room := make([]uint64, n/2+1) // for its alignment
	w := unsafe.Slice((*uint32)(unsafe.Pointer(&room[0])), n)
	l, err := dma.NewLog(mmio.NewMem(unsafe.Pointer(&w[0]), uint64(4*n), mmio.Cached), nil)
	if err != nil {
		t.Fatal(err)
	}
	return l, w
}

// marked returns which pages are marked, as whoever reads the log byte by byte finds them.
func marked(w []uint32) (pages []int) {
	b := unsafe.Slice((*byte)(unsafe.Pointer(&w[0])), 4*len(w))
	for i := range b {
		for k := 0; k < 8; k++ {
			if b[i]>>uint(k)&1 != 0 {
				pages = append(pages, 8*i+k)
			}
		}
	}
	return pages
}

func TestLogMarks(t *testing.T) {
	const page = dma.LogPage
	for _, c := range []struct {
		at      dma.Addr
		n       uint64
		first   int // of the pages
		count   int
		outside uint64
	}{
		{0, 1, 0, 1, 0},
		{page - 1, 1, 0, 1, 0},
		{page - 1, 2, 0, 2, 0},
		{9*page + 5, 0, 0, 0, 0},
		{9*page + 5, 1, 9, 1, 0},
		{31 * page, 2 * page, 31, 2, 0},
		{7*page + 1, 100 * page, 7, 101, 0},
		{0, 128 * page, 0, 128, 0},
		{127*page + 4095, 1, 127, 1, 0},
		{127*page + 4095, 2, 127, 1, 1},
		{128 * page, 1, 0, 0, 1},
		{1 << 62, 1 << 20, 0, 0, 1},
		{126 * page, 1<<64 - 126*page, 126, 2, 1},
		{126 * page, 1<<64 - 1, 126, 2, 1}, // passes the end of the addresses
		{1<<64 - 1, 2, 0, 0, 1},
	} {
		l, w := newLog(t, 4)
		l.Mark(c.at, c.n)
		got := marked(w)
		ok := len(got) == c.count && l.Outside() == c.outside
		for i := range got {
			ok = ok && got[i] == c.first+i
		}
		if !ok {
			t.Errorf("%#x bytes at %#x: pages %v are marked, %d marks outside; want %d from %d on, %d", c.n, uint64(c.at), got, l.Outside(), c.count, c.first, c.outside)
		}
		if l.Covers(c.at, c.n) != (c.outside == 0) {
			t.Errorf("%#x bytes at %#x: Covers is wrong", c.n, uint64(c.at))
		}
		l.Mark(c.at, c.n)
		if again := marked(w); len(again) != len(got) {
			t.Errorf("%#x bytes at %#x: pages %v are marked the second time", c.n, uint64(c.at), again)
		}
		if l.End() != 128*page {
			t.Errorf("the log ends at %#x", l.End())
		}
	}
}

func TestLogMemory(t *testing.T) {
	w := make([]uint64, 2)
	at := unsafe.Pointer(&w[0])
	for name, m := range map[string]mmio.Mem{
		"3 bytes":       mmio.NewMem(at, 3, mmio.Cached),
		"device memory": mmio.NewMem(at, 16, mmio.Uncached),
	} {
		if l, err := dma.NewLog(m, nil); err == nil || l != nil {
			t.Errorf("%s is taken for a log", name)
		}
	}
	told := 0
	l, err := dma.NewLog(mmio.NewMem(at, 15, mmio.Cached), func() { told++ })
	if err != nil {
		t.Fatal(err)
	}
	if l.Tell(); told != 1 || l.End() != 96*dma.LogPage {
		t.Errorf("told %d times, the log ends at %#x", told, l.End())
	}
}

// TestLogReader: a reader takes words by exchange while several goroutines mark. Each page that was marked
// after it was written is found, and no other one.
func TestLogReader(t *testing.T) {
	const words, writers, rounds = 8, 3, 2000
	l, w := newLog(t, words)
	var want, found [words]uint32
	var wg sync.WaitGroup
	for k := 0; k < writers; k++ {
		k := k
		for i := k; i < rounds; i += writers {
			p := uint64(i*7) % (32 * words)
			want[p/32] |= 1 << (p % 32)
		}
		wg.Add(1)
		go func() {
			defer wg.Done()
			for i := k; i < rounds; i += writers {
				l.Mark(dma.Addr(i*7%(32*words))*dma.LogPage, 1)
			}
		}()
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	for end := false; !end; {
		select {
		case <-done:
			end = true
		default:
		}
		for i := range w {
			found[i] |= mmioLE(atomic.SwapUint32(&w[i], 0))
		}
	}
	if found != want {
		t.Errorf("found %#x, want %#x", found, want)
	}
}

// mmioLE reads a word of the log as little-endian bytes.
func mmioLE(v uint32) uint32 {
	b := (*[4]byte)(unsafe.Pointer(&v))
	return uint32(b[0]) | uint32(b[1])<<8 | uint32(b[2])<<16 | uint32(b[3])<<24
}

// TestLogDisturbed: a reader that changes a word all the time stops nobody, and loses no mark.
func TestLogDisturbed(t *testing.T) {
	l, w := newLog(t, 1)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Add(1)
	go func() {
		defer wg.Done()
		for {
			select {
			case <-stop:
				return
			default:
				for i := 0; i < 100; i++ {
					v := atomic.LoadUint32(&w[0])
					atomic.CompareAndSwapUint32(&w[0], v, v^1<<24) // page 24, or 0 of big-endian machines
				}
			}
		}
	}()
	for i := 1; i < 20000; i++ {
		p := uint(i) % 8
		l.Mark(dma.Addr(p+8)*dma.LogPage, 1)
		if got := mmioLE(atomic.LoadUint32(&w[0])); got>>(p+8)&1 == 0 {
			t.Fatalf("page %d is not marked: %#x", p+8, got)
		}
		for {
			v := atomic.LoadUint32(&w[0])
			if atomic.CompareAndSwapUint32(&w[0], v, v&mmioLE(1<<24)) {
				break
			}
		}
	}
	close(stop)
	wg.Wait()
}
