package dma_test

import (
	"errors"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/boardlink/boardlink/dma"
)

func TestAllocator(t *testing.T) {
	a := dma.NewAllocator(0x1010, 0x1000)
	must := func(n, align uint64, want dma.Addr) {
		t.Helper()
		got, err := a.Alloc(n, align)
		if err != nil || got != want {
			t.Fatalf("Alloc(%#x, %#x) = %#x, %v, want %#x", n, align, uint64(got), err, uint64(want))
		}
	}
	must(0x10, 1, 0x1010)
	must(0x100, 0x100, 0x1100) // leaves 0x1020 to 0x1100
	must(0xe0, 0x20, 0x1020)   // first fit
	must(1, 4096, 0x2000)
	if a.InUse() != 0x1f1 || a.FreeBytes() != 0x1000-0x1f1 || a.Largest() != 0xe00 {
		t.Errorf("in use %#x, free %#x, largest %#x", a.InUse(), a.FreeBytes(), a.Largest())
	}
	_, err := a.Alloc(0xe01, 1)
	var ae *dma.AllocError
	if !errors.Is(err, dma.ErrNoSpace) || !errors.As(err, &ae) || ae.Largest != 0xe00 || ae.Free != 0x1000-0x1f1 || !strings.Contains(err.Error(), "largest hole 3584") {
		t.Errorf("no space: %v", err)
	}
	// Room enough, but not at that alignment.
	if _, err := a.Alloc(1, 1<<20); !errors.Is(err, dma.ErrNoSpace) {
		t.Errorf("alignment: %v", err)
	}
	if _, err := a.Alloc(^uint64(0), 1<<63); !errors.Is(err, dma.ErrNoSpace) {
		t.Errorf("huge: %v", err)
	}
	for _, bad := range [][2]uint64{{0, 1}, {1, 0}, {1, 3}, {1, ^uint64(0)}} {
		if _, err := a.Alloc(bad[0], bad[1]); !errors.Is(err, dma.ErrBadRequest) {
			t.Errorf("Alloc(%d, %d): %v", bad[0], bad[1], err)
		}
	}
	if err := a.Free(0x1100); err != nil {
		t.Error(err)
	}
	for _, bad := range []dma.Addr{0x1100, 0x1021, 0, 0x2001} {
		if err := a.Free(bad); !errors.Is(err, dma.ErrNotAllocated) || !strings.Contains(err.Error(), "free of 0x") {
			t.Errorf("Free(%#x): %v", uint64(bad), err)
		}
	}
	a.Reset()
	if a.InUse() != 0 || a.Largest() != 0x1000 {
		t.Errorf("after Reset: in use %#x, largest %#x", a.InUse(), a.Largest())
	}
	if err := a.Free(0x1010); !errors.Is(err, dma.ErrNotAllocated) {
		t.Errorf("Free after Reset: %v", err)
	}
}

func TestAllocatorAtTheEnds(t *testing.T) {
	if _, err := dma.NewAllocator(0, 0).Alloc(1, 1); !errors.Is(err, dma.ErrNoSpace) {
		t.Errorf("empty: %v", err)
	}
	if panics(func() { dma.NewAllocator(^dma.Addr(0), 2) }) == "" {
		t.Error("an allocator past the end of the address space")
	}
	a := dma.NewAllocator(^dma.Addr(0)-0xff, 0x100)
	for i := 0; i < 2; i++ {
		low, err := a.Alloc(0x80, 0x80)
		if err != nil {
			t.Fatal(err)
		}
		high, err := a.Alloc(0x80, 0x80)
		if err != nil || high != ^dma.Addr(0)-0x7f {
			t.Fatalf("%#x, %v", uint64(high), err)
		}
		if _, err := a.Alloc(1, 1); !errors.Is(err, dma.ErrNoSpace) {
			t.Fatalf("full: %v", err)
		}
		// Both orders of giving back.
		first, second := low, high
		if i == 1 {
			first, second = high, low
		}
		if a.Free(first) != nil || a.Free(second) != nil || a.Largest() != 0x100 {
			t.Fatalf("holes do not join: largest %#x", a.Largest())
		}
	}
}

func TestAllocatorModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const size = 1024
		base := rapid.SampledFrom([]uint64{0, 0x1003, 1 << 40, ^uint64(0) - size + 1}).Draw(t, "base")
		a := dma.NewAllocator(dma.Addr(base), size)
		var owner [size]int // 0 is free
		held := map[dma.Addr]uint64{}
		var order []dma.Addr
		id := 0
		room := func(n, align uint64) (uint64, bool) {
			for off := uint64(0); off+n <= size; off++ {
				if (base+off)%align != 0 {
					continue
				}
				ok := true
				for i := off; i < off+n && ok; i++ {
					ok = owner[i] == 0
				}
				if ok {
					return off, true
				}
			}
			return 0, false
		}
		free := func(i int) {
			addr := order[i]
			if err := a.Free(addr); err != nil {
				t.Fatalf("%v", err)
			}
			for k := uint64(0); k < held[addr]; k++ {
				owner[uint64(addr)-base+k] = 0
			}
			delete(held, addr)
			order = append(order[:i], order[i+1:]...)
			if err := a.Free(addr); !errors.Is(err, dma.ErrNotAllocated) {
				t.Fatalf("second Free(%#x): %v", uint64(addr), err)
			}
		}
		t.Repeat(map[string]func(*rapid.T){
			"alloc": func(t *rapid.T) {
				n := uint64(rapid.IntRange(1, 300).Draw(t, "n"))
				align := uint64(1) << rapid.IntRange(0, 8).Draw(t, "align")
				off, ok := room(n, align)
				addr, err := a.Alloc(n, align)
				if !ok {
					if !errors.Is(err, dma.ErrNoSpace) {
						t.Fatalf("Alloc(%d, %d) = %#x, %v, but there is no room", n, align, uint64(addr), err)
					}
					return
				}
				if err != nil || uint64(addr) != base+off {
					t.Fatalf("Alloc(%d, %d) = %#x, %v, want the first fit %#x", n, align, uint64(addr), err, base+off)
				}
				id++
				for i := off; i < off+n; i++ {
					owner[i] = id
				}
				held[addr] = n
				order = append(order, addr)
			},
			"free": func(t *rapid.T) {
				if len(order) == 0 {
					t.Skip("nothing held")
				}
				free(rapid.IntRange(0, len(order)-1).Draw(t, "which"))
			},
			"": func(t *rapid.T) {
				used, run, largest := uint64(0), uint64(0), uint64(0)
				for _, o := range owner {
					if o != 0 {
						used++
						run = 0
					} else if run++; run > largest {
						largest = run
					}
				}
				if a.InUse() != used || a.FreeBytes() != size-used || a.Largest() != largest {
					t.Fatalf("in use %d, free %d, largest %d; want %d, %d, %d", a.InUse(), a.FreeBytes(), a.Largest(), used, size-used, largest)
				}
			},
		})
		for len(order) > 0 {
			free(rapid.IntRange(0, len(order)-1).Draw(t, "which"))
		}
		if a.Largest() != size {
			t.Fatalf("all given back, but the largest hole is %d", a.Largest())
		}
	})
}

func BenchmarkAllocator(b *testing.B) {
	a := dma.NewAllocator(0, 1<<20)
	for i := 0; i < 256; i++ {
		if _, err := a.Alloc(2048, 64); err != nil {
			b.Fatal(err)
		}
	}
	for b.Loop() {
		addr, err := a.Alloc(1536, 64)
		if err != nil {
			b.Fatal(err)
		}
		if err := a.Free(addr); err != nil {
			b.Fatal(err)
		}
	}
}
