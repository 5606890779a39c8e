package mmiotest

import (
	"strings"
	"testing"

	"github.com/boardlink/boardlink/mmio"
)

func TestStrictRefuses(t *testing.T) {
	cases := []struct {
		name string
		do   func(s *Strict)
		want string
	}{
		{"misaligned load", func(s *Strict) { s.Load(2, 4) }, "load of 4 bytes at 0x2: misaligned"},
		{"misaligned store", func(s *Strict) { s.Store(7, 2, 0) }, "store of 2 bytes at 0x7: misaligned"},
		{"width", func(s *Strict) { s.Load(0, 16) }, "no such width"},
		{"no width", func(s *Strict) { s.Load(0, 0) }, "no such width"},
		{"outside", func(s *Strict) { s.Load(64, 1) }, "outside the memory of 0x40 bytes"},
		{"far outside", func(s *Strict) { s.Store(^uint64(7), 8, 0) }, "outside"},
		{"wide value", func(s *Strict) { s.Store(0, 1, 0x100) }, "wider"},
		{"barrier", func(s *Strict) { s.Barrier(9) }, "unknown"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			s := New(64)
			if err := s.Err(); err != nil {
				t.Fatal(err)
			}
			c.do(s)
			err := s.Err()
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("got %v, want %q", err, c.want)
			}
			s.Reset()
			if err := s.Err(); err != nil {
				t.Fatalf("after Reset: %v", err)
			}
		})
	}
}

func TestStrictHoldsBytesAndLog(t *testing.T) {
	s := New(16)
	s.Record(true)
	m := s.Mem(mmio.Uncached)
	m.Store32(4, 0x04030201)
	m.Barrier(mmio.WriteBarrier)
	if v := m.Load16(6); v != 0x0403 {
		t.Fatalf("load: %#x", v)
	}
	var b [4]byte
	if s.Peek(4, b[:]); b != [4]byte{1, 2, 3, 4} {
		t.Fatalf("bytes: %v", b)
	}
	want := []Access{
		{Op: Store, Off: 4, Width: 4, Value: 0x04030201},
		{Op: Fence, Barrier: mmio.WriteBarrier},
		{Op: Load, Off: 6, Width: 2, Value: 0x0403},
	}
	got := s.Log()
	if len(got) != len(want) {
		t.Fatalf("log: %v", got)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("log %d: %v, want %v", i, got[i], want[i])
		}
	}
	if c := s.Counts(); c != (Counts{Loads: 1, LoadBytes: 2, Stores: 1, StoreBytes: 4, Writes: 1}) {
		t.Errorf("counts: %+v", c)
	}
	if err := s.Err(); err != nil {
		t.Error(err)
	}
}
