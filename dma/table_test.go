package dma_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/mmio/mmiotest"
)

const rw = dma.DeviceRead | dma.DeviceWrite

// region makes a region of n bytes; large ones have a bus behind them that nobody uses.
func region(name string, addr dma.Addr, n uint64, access dma.Access) dma.Region {
	return dma.Region{Name: name, Addr: addr, Mem: mmio.NewBusMem(mmiotest.New(0), n, mmio.Uncached), Access: access}
}

func table(t testing.TB, regions ...dma.Region) *dma.Table {
	t.Helper()
	tab, err := dma.NewTable(regions...)
	if err != nil {
		t.Fatal(err)
	}
	return tab
}

func TestNewTableRefuses(t *testing.T) {
	for _, c := range []struct {
		name    string
		regions []dma.Region
		want    []string
	}{
		{"no memory", []dma.Region{{Name: "void", Addr: 0x1000}}, []string{`"void"`, "0x1000", "no memory"}},
		{"overflow", []dma.Region{region("top", ^dma.Addr(0), 2, rw)}, []string{`"top"`, "0xffffffffffffffff", "end of the address space"}},
		{"overlap by one", []dma.Region{region("b", 0x1fff, 0x1000, rw), region("a", 0x1000, 0x1000, rw)}, []string{`"a"`, `"b"`, "overlap", "0x1fff"}},
		{"same", []dma.Region{region("a", 0x1000, 0x1000, rw), region("b", 0x1000, 0x1000, rw)}, []string{`"a"`, `"b"`, "overlap"}},
		{"inside", []dma.Region{region("in", 0x1800, 0x10, rw), region("out", 0x1000, 0x1000, rw)}, []string{`"in"`, `"out"`, "overlap"}},
		{"inside the last but one", []dma.Region{region("a", 0, 0x100, rw), region("b", 0x100, 0x1000, rw), region("c", 0x200, 1, rw)}, []string{`"b"`, `"c"`}},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := dma.NewTable(c.regions...)
			if err == nil {
				t.Fatal("accepted")
			}
			for _, w := range c.want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("%q does not name %s", err, w)
				}
			}
		})
	}
	for _, ok := range [][]dma.Region{
		nil,
		{region("all but one", 0, ^uint64(0), rw)},
		{region("top", ^dma.Addr(0), 1, rw)},
		{region("b", 0x2000, 0x1000, rw), region("a", 0x1000, 0x1000, rw)},
	} {
		table(t, ok...)
	}
}

func TestTableIsACopy(t *testing.T) {
	in := []dma.Region{region("b", 0x2000, 0x1000, rw), region("a", 0x1000, 0x1000, rw)}
	tab := table(t, in...)
	in[0].Addr = 0x9000
	got := tab.Regions()
	if len(got) != 2 || got[0].Name != "a" || got[1].Name != "b" || got[1].Addr != 0x2000 {
		t.Fatalf("regions: %v", got)
	}
	got[0].Access = 0
	if tab.Regions()[0].Access != rw {
		t.Error("Regions gave the table's own slice away")
	}
	if (*dma.Table)(nil).Regions() != nil {
		t.Error("a nil table has regions")
	}
}

func many(n int) []dma.Region {
	var rs []dma.Region
	for i := 0; i < n; i++ {
		rs = append(rs, region(fmt.Sprintf("r%d", i), dma.Addr(0x1000+i*0x10), 0x10, rw))
	}
	return rs
}

func TestTranslate(t *testing.T) {
	tab := table(t,
		region("low", 0x1000, 0x1000, rw),
		region("next", 0x2000, 0x800, dma.DeviceRead),
		region("last", 0x2800, 0x800, dma.DeviceWrite),
		region("far", 0x8000, 0x10, rw),
		region("top", ^dma.Addr(0)-0xf, 0x10, rw),
	)
	type span struct {
		region string
		off    uint64
		len    uint32
	}
	for _, c := range []struct {
		addr   dma.Addr
		n      uint32
		need   dma.Access
		want   []span
		reason error
		text   string
	}{
		{0x1000, 1, rw, []span{{"low", 0, 1}}, nil, ""},
		{0x1000, 0x1000, rw, []span{{"low", 0, 0x1000}}, nil, ""},
		{0x1fff, 1, dma.DeviceWrite, []span{{"low", 0xfff, 1}}, nil, ""},
		{0x1fff, 2, dma.DeviceRead, []span{{"low", 0xfff, 1}, {"next", 0, 1}}, nil, ""},
		{0x1800, 0x1800, 0, []span{{"low", 0x800, 0x800}, {"next", 0, 0x800}, {"last", 0, 0x800}}, nil, ""},
		{^dma.Addr(0), 1, rw, []span{{"top", 0xf, 1}}, nil, ""},
		{^dma.Addr(0) - 0xf, 0x10, rw, []span{{"top", 0, 0x10}}, nil, ""},
		{0x1fff, 2, dma.DeviceWrite, nil, dma.ErrAccess, `"next" at 0x2000`},
		{0x2000, 0x801, dma.DeviceRead, nil, dma.ErrAccess, `"last" at 0x2800`},
		{0x2000, 1, rw, nil, dma.ErrAccess, "rw"},
		{0xfff, 2, rw, nil, dma.ErrHole, "at 0xfff"},
		{0x2fff, 2, dma.DeviceWrite, nil, dma.ErrHole, "at 0x3000"},
		{0x8000, 0x11, rw, nil, dma.ErrHole, "at 0x8010"},
		{0x8000, ^uint32(0), rw, nil, dma.ErrHole, "at 0x8010"},
		{0, ^uint32(0), rw, nil, dma.ErrHole, "at 0x0"},
		{0x1000, 0, rw, nil, dma.ErrZeroLength, "0x1000 of 0 bytes"},
		{0x9999999, 0, rw, nil, dma.ErrZeroLength, ""},
		{^dma.Addr(0), 2, rw, nil, dma.ErrOverflow, "0xffffffffffffffff of 2 bytes"},
		{^dma.Addr(0) - 0xf, 0x11, rw, nil, dma.ErrOverflow, ""},
		{^dma.Addr(0), ^uint32(0), rw, nil, dma.ErrOverflow, ""},
	} {
		dst := make([]dma.Span, 1, 8)
		got, err := tab.Translate(dst, c.addr, c.n, c.need)
		name := fmt.Sprintf("%#x+%#x %v", uint64(c.addr), c.n, c.need)
		if !errors.Is(err, c.reason) || (c.reason == nil) != (err == nil) {
			t.Errorf("%s: %v, want %v", name, err, c.reason)
			continue
		}
		if err != nil {
			te, ok := err.(*dma.TranslateError)
			if !ok || te.Addr != c.addr || te.Len != c.n || !strings.Contains(err.Error(), c.text) {
				t.Errorf("%s: %#v: %v, want %q", name, err, err, c.text)
			}
			if len(got) != 1 {
				t.Errorf("%s: %d spans with an error", name, len(got)-1)
			}
			continue
		}
		var flat []span
		for _, s := range got[1:] {
			flat = append(flat, span{s.Region.Name, s.Off, s.Len})
		}
		if fmt.Sprint(flat) != fmt.Sprint(c.want) {
			t.Errorf("%s: %v, want %v", name, flat, c.want)
		}
		if got[1].Addr() != c.addr {
			t.Errorf("%s: the span's address is %#x", name, uint64(got[1].Addr()))
		}
	}
}

func TestTranslateTooManySpans(t *testing.T) {
	tab := table(t, many(dma.MaxSpans+1)...)
	got, err := tab.Translate(nil, 0x1000, dma.MaxSpans*0x10, rw)
	if err != nil || len(got) != dma.MaxSpans {
		t.Fatalf("%d spans: %v", len(got), err)
	}
	got, err = tab.Translate(nil, 0x1000, dma.MaxSpans*0x10+1, rw)
	if !errors.Is(err, dma.ErrTooManySpans) || len(got) != 0 {
		t.Fatalf("%d spans: %v", len(got), err)
	}
}

func TestTranslateWithoutTable(t *testing.T) {
	var ref dma.TableRef
	if ref.Load() != nil {
		t.Fatal("the zero reference has a table")
	}
	for _, tab := range []*dma.Table{nil, {}, table(t)} {
		if _, err := tab.Translate(nil, 1, 1, 0); !errors.Is(err, dma.ErrHole) {
			t.Errorf("no regions: %v", err)
		}
	}
	a, b := table(t, many(1)...), table(t, many(2)...)
	ref.Store(a)
	if ref.Load() != a {
		t.Error("Load after Store")
	}
	ref.Store(b)
	ref.Store(nil)
	if ref.Load() != nil {
		t.Error("Load after Store(nil)")
	}
}

// checkTranslate compares Translate with a byte-wise reading of the regions.
func checkTranslate(t interface {
	Fatalf(string, ...interface{})
}, tab *dma.Table, addr dma.Addr, n uint32, need dma.Access) {
	regions := tab.Regions()
	owner := func(a uint64) int {
		for i := range regions {
			if a >= uint64(regions[i].Addr) && a-uint64(regions[i].Addr) < regions[i].Mem.Size() {
				return i
			}
		}
		return -1
	}
	var want error
	spans := 0
	switch {
	case n == 0:
		want = dma.ErrZeroLength
	case uint64(addr) > ^uint64(0)-(uint64(n)-1):
		want = dma.ErrOverflow
	default:
		prev := -1
		for i := uint64(0); i < uint64(n) && want == nil; i++ {
			o := owner(uint64(addr) + i)
			if o == prev && o >= 0 {
				continue
			}
			spans++
			switch {
			case o >= 0 && spans > dma.MaxSpans, o < 0 && spans > dma.MaxSpans:
				want = dma.ErrTooManySpans
			case o < 0:
				want = dma.ErrHole
			case regions[o].Access&need != need:
				want = dma.ErrAccess
			}
			prev = o
		}
	}
	got, err := tab.Translate(nil, addr, n, need)
	if !errors.Is(err, want) || (err == nil) != (want == nil) {
		t.Fatalf("%#x+%#x %v: %v, want %v", uint64(addr), n, need, err, want)
	}
	if err != nil {
		if len(got) != 0 || err.Error() == "" {
			t.Fatalf("%#x+%#x: %d spans with error %v", uint64(addr), n, len(got), err)
		}
		return
	}
	if len(got) != spans {
		t.Fatalf("%#x+%#x: %d spans, want %d", uint64(addr), n, len(got), spans)
	}
	at, sum := uint64(addr), uint64(0)
	for _, s := range got {
		if uint64(s.Addr()) != at || s.Len == 0 || s.Off+uint64(s.Len) > s.Region.Mem.Size() || s.Region.Access&need != need {
			t.Fatalf("%#x+%#x: span %q+%#x of %#x bytes at %#x", uint64(addr), n, s.Region.Name, s.Off, s.Len, at)
		}
		at += uint64(s.Len)
		sum += uint64(s.Len)
	}
	if sum != uint64(n) {
		t.Fatalf("%#x+%#x: the spans have %#x bytes", uint64(addr), n, sum)
	}
}

func TestTranslateModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		base := rapid.SampledFrom([]uint64{0, 0x1000, 1<<32 - 100, ^uint64(0) - 400}).Draw(t, "base")
		at := base
		var regions []dma.Region
		for i := rapid.IntRange(0, 30).Draw(t, "regions"); i > 0; i-- {
			at += uint64(rapid.SampledFrom([]int{0, 0, 0, 1, 7}).Draw(t, "gap"))
			n := uint64(rapid.IntRange(1, 20).Draw(t, "size"))
			if at+n-1 < at || at < base {
				break
			}
			acc := rapid.SampledFrom([]dma.Access{rw, rw, rw, dma.DeviceRead, dma.DeviceWrite, 0}).Draw(t, "access")
			regions = append(regions, region(fmt.Sprint(i), dma.Addr(at), n, acc))
			at += n
			if at < base {
				break
			}
		}
		regions = rapid.Permutation(regions).Draw(t, "order")
		tab, err := dma.NewTable(regions...)
		if err != nil {
			t.Fatalf("%v", err)
		}
		for i := 0; i < 20; i++ {
			addr := base - 3 + uint64(rapid.IntRange(0, 420).Draw(t, "addr"))
			n := uint32(rapid.IntRange(0, 400).Draw(t, "len"))
			need := dma.Access(rapid.IntRange(0, 3).Draw(t, "need"))
			checkTranslate(t, tab, dma.Addr(addr), n, need)
		}
	})
}

func FuzzTranslate(f *testing.F) {
	f.Add([]byte{}, uint64(0), uint16(0), byte(0))
	f.Add([]byte{0, 16, 3, 0, 16, 1}, uint64(8), uint16(20), byte(1))
	f.Add([]byte{4, 16, 3, 0, 16, 3, 9, 1, 2}, uint64(19), uint16(2), byte(3))
	f.Add([]byte{255, 255, 3}, ^uint64(0), uint16(2), byte(3))
	f.Fuzz(func(t *testing.T, layout []byte, addr uint64, n uint16, need byte) {
		// Three bytes a region: gap, size, rights. The first bit of the first gap
		// puts all at the end of the address space.
		at := uint64(0)
		if len(layout) > 0 && layout[0]&1 != 0 {
			at = ^uint64(0) - 0x3ff
		}
		var regions []dma.Region
		for ; len(layout) >= 3 && len(regions) < 64; layout = layout[3:] {
			start := at + uint64(layout[0]>>1)
			size := uint64(layout[1]) + 1
			if start < at || start+size-1 < start {
				break
			}
			regions = append(regions, region(fmt.Sprint(len(regions)), dma.Addr(start), size, dma.Access(layout[2]&3)))
			if at = start + size; at == 0 {
				break
			}
		}
		tab, err := dma.NewTable(regions...)
		if err != nil {
			t.Fatal(err)
		}
		checkTranslate(t, tab, dma.Addr(addr), uint32(n), dma.Access(need&3))
		if len(regions) > 0 {
			checkTranslate(t, tab, regions[0].Addr+dma.Addr(addr%0x1000), uint32(n), dma.Access(need&3))
		}
	})
}

func TestTranslateDoesNotAllocate(t *testing.T) {
	for _, n := range []int{1, 4, 40} {
		tab := table(t, many(n)...)
		dst := make([]dma.Span, 0, dma.MaxSpans)
		var err error
		if a := testing.AllocsPerRun(100, func() {
			dst, err = tab.Translate(dst[:0], 0x1003, 5, dma.DeviceRead)
		}); a != 0 || err != nil {
			t.Errorf("%d regions: %v allocations, %v", n, a, err)
		}
		if n == 1 {
			continue
		}
		if a := testing.AllocsPerRun(100, func() {
			dst, err = tab.Translate(dst[:0], 0x1003, 0x20, dma.DeviceRead)
		}); a != 0 || err != nil || len(dst) != 3 {
			t.Errorf("%d regions, split: %v allocations, %v", n, a, err)
		}
	}
}

func BenchmarkTranslate(b *testing.B) {
	for _, n := range []int{1, 2, 4, 8, 9, 64} {
		tab := table(b, many(n)...)
		for _, which := range []int{0, n - 1} {
			b.Run(fmt.Sprintf("regions=%d/hit=%d", n, which), func(b *testing.B) {
				dst := make([]dma.Span, 0, 16)
				addr := dma.Addr(0x1003 + which*0x10)
				for b.Loop() {
					dst, _ = tab.Translate(dst[:0], addr, 5, dma.DeviceRead)
				}
			})
		}
		if n >= 4 {
			b.Run(fmt.Sprintf("regions=%d/split=4", n), func(b *testing.B) {
				dst := make([]dma.Span, 0, 16)
				for b.Loop() {
					dst, _ = tab.Translate(dst[:0], 0x1008, 0x30, dma.DeviceRead)
				}
			})
		}
	}
}

func BenchmarkTableRefLoad(b *testing.B) {
	var ref dma.TableRef
	ref.Store(table(b, many(2)...))
	for b.Loop() {
		ref.Load()
	}
}
