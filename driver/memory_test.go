package driver_test

import (
	"testing"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/driver"
	"github.com/boardlink/boardlink/mmio"
)

// Parts of a region do not overlap, lie inside, and those that are kept back leave the others all else.
func TestParts(t *testing.T) {
	const page = 4096
	r := &dma.Region{Name: "heap", Addr: 1 << 20, Mem: mmio.FromBytes(make([]byte, 32*page+64))}
	type part struct{ first, n uint64 }
	var parts []part
	all := func(m *driver.Memory) {
		n := m.Alloc.FreeBytes()
		s, err := m.Take("test", n, 64)
		if err != nil {
			t.Fatal(err)
		}
		parts = append(parts, part{s.Off, n})
	}
	all(driver.Kept(r, 0, page))
	all(driver.Kept(r, page, 2*page))
	for i := 0; i < 3; i++ {
		all(driver.Share(r, 3*page, i, 3))
	}
	var sum uint64
	for i, p := range parts {
		if p.first+p.n > r.Mem.Size() {
			t.Errorf("part %d, %+v, ends behind the region", i, p)
		}
		sum += p.n
		for j, q := range parts[:i] {
			if p.first < q.first+q.n && q.first < p.first+p.n {
				t.Errorf("parts %d and %d overlap: %+v, %+v", j, i, q, p)
			}
		}
	}
	if want := uint64(3*page + 3*9*page); sum != want {
		t.Errorf("%d bytes in all parts, want %d", sum, want)
	}
}
