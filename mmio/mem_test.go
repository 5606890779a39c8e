package mmio_test

import (
	"bytes"
	"fmt"
	"iter"
	"strings"
	"testing"
	"unsafe"

	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/mmio/mmiotest"
)

// aligned returns n bytes that start at a multiple of 64.
func aligned(n int) []byte {
	b := make([]byte, n+64)
	skip := int(-uintptr(unsafe.Pointer(&b[0])) & 63)
	return b[skip : skip+n : skip+n]
}

// place is a memory under test, with a way around it.
type place struct {
	name  string
	mem   mmio.Mem
	bytes func() []byte
	fill  func([]byte)
	check func(*testing.T)
}

func mapped(n int, kind mmio.Kind, w mmio.Widths) place {
	b := aligned(n)
	m, err := mmio.NewMem(unsafe.Pointer(&b[0]), uint64(n), kind).WithWidths(w)
	if err != nil {
		panic(err)
	}
	return place{
		name:  "mapped " + kind.String() + " " + w.String(),
		mem:   m,
		bytes: func() []byte { return b },
		fill:  func(v []byte) { copy(b, v) },
		check: func(*testing.T) {},
	}
}

func modelled(n int, kind mmio.Kind) place {
	s := mmiotest.New(uint64(n))
	return place{
		name: "bus " + kind.String(),
		mem:  s.Mem(kind),
		bytes: func() []byte {
			b := make([]byte, n)
			s.Peek(0, b)
			return b
		},
		fill: func(v []byte) { s.Poke(0, v) },
		check: func(t *testing.T) {
			t.Helper()
			if err := s.Err(); err != nil {
				t.Error(err)
			}
		},
	}
}

// allWidths yields widths such that each that this processor has is there for loads and for stores.
func allWidths() iter.Seq[mmio.Widths] {
	return func(yield func(mmio.Widths) bool) {
		most := mmio.Widest()
		for w := uint8(8); w <= max(most.Load, most.Store); w *= 2 {
			if !yield(mmio.Widths{Load: min(w, most.Load), Store: min(w, most.Store)}) {
				return
			}
		}
	}
}

func places(n int) []place {
	var ps []place
	for _, k := range []mmio.Kind{mmio.Cached, mmio.WriteCombining, mmio.Uncached} {
		ps = append(ps, mapped(n, k, mmio.DefaultWidths(k)), modelled(n, k))
	}
	for w := range allWidths() {
		if w != (mmio.Widths{Load: 8, Store: 8}) {
			ps = append(ps, mapped(n, mmio.WriteCombining, w))
		}
	}
	return ps
}

func TestBytesInMemory(t *testing.T) {
	for _, p := range places(64) {
		t.Run(p.name, func(t *testing.T) {
			m := p.mem
			m.Store8(1, 0x11)
			m.Store16(2, 0x2221)
			m.Store32(4, 0x34333231)
			m.Store64(8, 0x8887868584838281)
			m.Publish32(16, 0x44434241)
			want := []byte{0, 0x11, 0x21, 0x22, 0x31, 0x32, 0x33, 0x34, 0x81, 0x82, 0x83, 0x84, 0x85, 0x86, 0x87, 0x88, 0x41, 0x42, 0x43, 0x44, 0, 0, 0, 0}
			if got := p.bytes()[:len(want)]; !bytes.Equal(got, want) {
				t.Fatalf("memory holds\n% x, want\n% x", got, want)
			}
			ramp := make([]byte, 64)
			for i := range ramp {
				ramp[i] = byte(0xf0 + i)
			}
			p.fill(ramp)
			if v := m.Load8(3); v != 0xf3 {
				t.Errorf("Load8: %#x", v)
			}
			if v := m.Load16(2); v != 0xf3f2 {
				t.Errorf("Load16: %#x", v)
			}
			if v := m.Load32(4); v != 0xf7f6f5f4 {
				t.Errorf("Load32: %#x", v)
			}
			if v := m.Load64(8); v != 0xfffefdfcfbfaf9f8 {
				t.Errorf("Load64: %#x", v)
			}
			if v := m.Consume32(20); v != 0x07060504 {
				t.Errorf("Consume32: %#x", v)
			}
			if r, ok := m.RAM(); ok {
				if v := r.Load16(2); v != 0xf3f2 {
					t.Errorf("RAM.Load16: %#x", v)
				}
				if v := r.Load32(4); v != 0xf7f6f5f4 {
					t.Errorf("RAM.Load32: %#x", v)
				}
				if v := r.Load64(8); v != 0xfffefdfcfbfaf9f8 {
					t.Errorf("RAM.Load64: %#x", v)
				}
				if v, w := r.Load64Pair(0); v != m.Load64(0) || w != 0xfffefdfcfbfaf9f8 {
					t.Errorf("RAM.Load64Pair: %#x, %#x", v, w)
				}
				if v := r.Consume32(20); v != 0x07060504 {
					t.Errorf("RAM.Consume32: %#x", v)
				}
				r.Store16(32, 0x0201)
				r.Store32(36, 0x14131211)
				r.Store64(40, 0x2827262524232221)
				r.Publish32(48, 0x34333231)
				got := r.Bytes()[32:52]
				want := []byte{1, 2, 0x12, 0x13, 0x11, 0x12, 0x13, 0x14, 0x21, 0x22, 0x23, 0x24, 0x25, 0x26, 0x27, 0x28, 0x31, 0x32, 0x33, 0x34}
				if !bytes.Equal(got, want) {
					t.Errorf("RAM holds % x, want % x", got, want)
				}
			}
			p.check(t)
		})
	}
}

// TestWidthOfStore sees that a store leaves the neighbours alone.
func TestWidthOfStore(t *testing.T) {
	for _, p := range places(32) {
		t.Run(p.name, func(t *testing.T) {
			for _, w := range []int{1, 2, 4, 8} {
				for off := 0; off < 32; off += w {
					p.fill(bytes.Repeat([]byte{0xa5}, 32))
					switch w {
					case 1:
						p.mem.Store8(uint64(off), 0)
					case 2:
						p.mem.Store16(uint64(off), 0)
					case 4:
						p.mem.Store32(uint64(off), 0)
					case 8:
						p.mem.Store64(uint64(off), 0)
					}
					want := bytes.Repeat([]byte{0xa5}, 32)
					copy(want[off:], make([]byte, w))
					if got := p.bytes(); !bytes.Equal(got, want) {
						t.Fatalf("width %d at %d: % x", w, off, got)
					}
				}
			}
			p.check(t)
		})
	}
}

// panics returns what f panics with, "" where it does not.
func panics(f func()) (msg string) {
	defer func() {
		if r := recover(); r != nil {
			msg = fmt.Sprint(r)
		}
	}()
	f()
	return ""
}

func accessors(m mmio.Mem) map[string]struct {
	width uint64
	do    func(off uint64)
} {
	type acc = struct {
		width uint64
		do    func(off uint64)
	}
	all := map[string]acc{
		"Load8":     {1, func(o uint64) { m.Load8(o) }},
		"Load16":    {2, func(o uint64) { m.Load16(o) }},
		"Load32":    {4, func(o uint64) { m.Load32(o) }},
		"Load64":    {8, func(o uint64) { m.Load64(o) }},
		"Store8":    {1, func(o uint64) { m.Store8(o, 0) }},
		"Store16":   {2, func(o uint64) { m.Store16(o, 0) }},
		"Store32":   {4, func(o uint64) { m.Store32(o, 0) }},
		"Store64":   {8, func(o uint64) { m.Store64(o, 0) }},
		"Consume32": {4, func(o uint64) { m.Consume32(o) }},
		"Publish32": {4, func(o uint64) { m.Publish32(o, 0) }},
	}
	if r, ok := m.RAM(); ok {
		all["RAM.Load16"] = acc{2, func(o uint64) { r.Load16(o) }}
		all["RAM.Load32"] = acc{4, func(o uint64) { r.Load32(o) }}
		all["RAM.Load64"] = acc{8, func(o uint64) { r.Load64(o) }}
		all["RAM.Load64Pair"] = acc{16, func(o uint64) { r.Load64Pair(o) }}
		all["RAM.Store16"] = acc{2, func(o uint64) { r.Store16(o, 0) }}
		all["RAM.Store32"] = acc{4, func(o uint64) { r.Store32(o, 0) }}
		all["RAM.Store64"] = acc{8, func(o uint64) { r.Store64(o, 0) }}
		all["RAM.Consume32"] = acc{4, func(o uint64) { r.Consume32(o) }}
		all["RAM.Publish32"] = acc{4, func(o uint64) { r.Publish32(o, 0) }}
	}
	return all
}

func TestBadAccessPanics(t *testing.T) {
	for _, p := range places(64) {
		for _, size := range []uint64{1, 3, 24, 30, 64} {
			m, err := p.mem.Slice(0, size)
			if err != nil {
				t.Fatal(err)
			}
			for name, a := range accessors(m) {
				for _, off := range []uint64{0, 1, 2, 3, 4, 7, 8, 16, 20, 22, 23, 24, 28, 29, 30, 31, 56, 60, 62, 63, 64, 1 << 32, 1 << 63, ^uint64(0), ^uint64(0) - 1, ^uint64(0) - 3, ^uint64(0) - 7} {
					bad := off%a.width != 0 || off >= size || size-off < a.width
					if got := panics(func() { a.do(off) }); (got != "") != bad {
						t.Errorf("%s: %s at %#x of %d bytes: panic %q", p.name, name, off, size, got)
					} else if bad && !strings.Contains(got, fmt.Sprintf("%d bytes at offset %#x", a.width, off)) {
						t.Errorf("%s: %s at %#x: panic %q does not name the access", p.name, name, off, got)
					}
				}
			}
		}
		p.check(t)
	}
}

// TestMisalignedPiece sees that alignment is that of the address, not of the offset.
func TestMisalignedPiece(t *testing.T) {
	for _, p := range places(64) {
		m, err := p.mem.Slice(2, 32)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"Load32", "Load64", "Store32", "Store64", "Consume32", "Publish32", "RAM.Load32", "RAM.Load64Pair", "RAM.Store64"} {
			a, ok := accessors(m)[name]
			if ok && panics(func() { a.do(0) }) == "" {
				t.Errorf("%s: %s at a misaligned address did not panic", p.name, name)
			}
		}
		if msg := panics(func() { m.Load16(0); m.Load32(2) }); msg != "" {
			t.Errorf("%s: %s", p.name, msg)
		}
		p.check(t)
	}
}

func TestSlice(t *testing.T) {
	for _, p := range places(64) {
		for _, bad := range [][2]uint64{{0, 0}, {0, 65}, {64, 1}, {65, 0}, {1, 64}, {1, ^uint64(0)}, {^uint64(0), 1}} {
			if _, err := p.mem.Slice(bad[0], bad[1]); err == nil {
				t.Errorf("%s: Slice(%#x, %#x) succeeded", p.name, bad[0], bad[1])
			}
		}
		a, err := p.mem.Slice(16, 32)
		if err != nil {
			t.Fatal(err)
		}
		b, err := a.Slice(8, 8)
		if err != nil {
			t.Fatal(err)
		}
		b.Store8(1, 7)
		if p.bytes()[25] != 7 || b.Size() != 8 || b.Kind() != p.mem.Kind() || b.Modelled() != p.mem.Modelled() {
			t.Errorf("%s: a piece of a piece is elsewhere: % x", p.name, p.bytes())
		}
		p.check(t)
	}
}

func TestRAMOnlyOfCached(t *testing.T) {
	for _, p := range places(64) {
		_, ok := p.mem.RAM()
		if want := p.mem.Kind() == mmio.Cached && !p.mem.Modelled(); ok != want {
			t.Errorf("%s: RAM view: %v", p.name, ok)
		}
	}
	if _, ok := (mmio.Mem{}).RAM(); ok {
		t.Error("the zero Mem has a RAM view")
	}
	b := aligned(64)
	r, _ := mmio.FromBytes(b).RAM()
	s := r.Slice(5, 10)
	if s.Size() != 10 || &s.Bytes()[0] != &b[5] || len(s.Bytes()) != 10 || s.Pointer(9) != unsafe.Pointer(&b[14]) {
		t.Error("a piece of RAM is elsewhere")
	}
	for _, bad := range [][2]uint64{{0, 0}, {0, 65}, {64, 1}, {1, ^uint64(0)}, {^uint64(0), 2}} {
		if panics(func() { r.Slice(bad[0], bad[1]) }) == "" {
			t.Errorf("RAM.Slice(%#x, %#x) succeeded", bad[0], bad[1])
		}
	}
	if panics(func() { s.Pointer(10) }) == "" {
		t.Error("Pointer behind the end succeeded")
	}
}

func TestNewMemRefuses(t *testing.T) {
	b := aligned(64)
	for name, f := range map[string]func(){
		"nil":        func() { mmio.NewMem(nil, 8, mmio.Cached) },
		"empty":      func() { mmio.NewMem(unsafe.Pointer(&b[0]), 0, mmio.Cached) },
		"misaligned": func() { mmio.NewMem(unsafe.Pointer(&b[4]), 8, mmio.Cached) },
		"no bytes":   func() { mmio.FromBytes(nil) },
	} {
		if panics(f) == "" {
			t.Errorf("%s: no panic", name)
		}
	}
}

func TestStronger(t *testing.T) {
	for _, c := range [][3]mmio.Kind{
		{mmio.Cached, mmio.Cached, mmio.Cached},
		{mmio.Cached, mmio.Uncached, mmio.Uncached},
		{mmio.WriteCombining, mmio.Cached, mmio.WriteCombining},
		{mmio.WriteCombining, mmio.Uncached, mmio.WriteCombining},
		{mmio.Uncached, mmio.WriteCombining, mmio.WriteCombining},
		{mmio.Uncached, mmio.Uncached, mmio.Uncached},
	} {
		if got := mmio.Stronger(c[0], c[1]); got != c[2] {
			t.Errorf("Stronger(%v, %v) = %v, want %v", c[0], c[1], got, c[2])
		}
	}
}

// TestBusOrder sees where Publish32 and Consume32 put their barriers on a bus.
func TestBusOrder(t *testing.T) {
	for _, k := range []mmio.Kind{mmio.Cached, mmio.WriteCombining, mmio.Uncached} {
		s := mmiotest.New(16)
		s.Record(true)
		m := s.Mem(k)
		m.Publish32(8, 5)
		m.Consume32(8)
		m.Barrier(mmio.FullBarrier)
		want := []mmiotest.Access{
			{Op: mmiotest.Fence, Barrier: mmio.WriteBarrier},
			{Op: mmiotest.Store, Off: 8, Width: 4, Value: 5},
			{Op: mmiotest.Load, Off: 8, Width: 4, Value: 5},
			{Op: mmiotest.Fence, Barrier: mmio.ReadBarrier},
			{Op: mmiotest.Fence, Barrier: mmio.FullBarrier},
		}
		if got := s.Log(); fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("%v: %v, want %v", k, got, want)
		}
	}
}
