package dma_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/bits"
	"strings"
	"testing"
	"unsafe"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/mmio/mmiotest"
)

func panics(f func()) (msg string) {
	defer func() {
		if r := recover(); r != nil {
			msg = fmt.Sprint(r)
		}
	}()
	f()
	return ""
}

func mapped(n int, kind mmio.Kind) mmio.Mem {
	words := make([]uint64, (n+7)/8)
	return mmio.NewMem(unsafe.Pointer(&words[0]), uint64(n), kind)
}

func ramp(n, start int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*3 + start)
	}
	return b
}

// accounted returns a region with an account of its own for each sort of memory.
func accounted(t *testing.T, n int) map[string]*dma.Region {
	bus := mmiotest.New(uint64(n))
	t.Cleanup(func() {
		if err := bus.Err(); err != nil {
			t.Error(err)
		}
	})
	rs := map[string]*dma.Region{}
	for name, m := range map[string]mmio.Mem{
		"cached":   mapped(n, mmio.Cached),
		"uncached": mapped(n, mmio.Uncached),
		"bus":      bus.Mem(mmio.WriteCombining),
	} {
		rs[name] = &dma.Region{Name: name, Addr: 0x1000, Mem: m, Access: rw, Across: true, Account: new(dma.Account)}
	}
	return rs
}

// words is how many accesses a 64-bit one is.
func words(r *dma.Region) uint64 {
	if !r.Mem.Modelled() && unsafe.Sizeof(uintptr(0)) == 4 {
		return 2
	}
	return 1
}

func TestSpanCopiesAndAccounts(t *testing.T) {
	for name, r := range accounted(t, 512) {
		t.Run(name, func(t *testing.T) {
			s := dma.Span{Region: r, Off: 64, Len: 200}
			src := ramp(90, 5)
			s.CopyIn(8, src)
			got := make([]byte, 90)
			s.CopyOut(got, 8)
			if !bytes.Equal(got, src) {
				t.Fatalf("% x, want % x", got, src)
			}
			m := s.Mem()
			if m.Size() != 200 || m.Load8(8) != src[0] || m.Load8(97) != src[89] || m.Load8(7) != 0 || m.Load8(98) != 0 {
				t.Error("the bytes are elsewhere")
			}
			// 90 bytes at a multiple of 8: 11 words and 2 bytes; or two started lines.
			n := 11*words(r) + 1
			if name == "cached" {
				n = 2
			}
			want := dma.Account{Reads: n, ReadBytes: 90, Writes: n, WriteBytes: 90}
			if a := r.Account.Load(); a != want {
				t.Errorf("account %+v, want %+v", a, want)
			}
			sub := s.Sub(8, 90).Sub(1, 2)
			if sub.Off != 64+9 || sub.Len != 2 || sub.Addr() != 0x1000+64+9 {
				t.Errorf("piece of a piece: %+v", sub)
			}
			if sub.CopyOut(got[:2], 0); got[0] != src[1] || got[1] != src[2] {
				t.Errorf("piece of a piece holds % x", got[:2])
			}
			for what, f := range map[string]func(){
				"in":      func() { s.CopyIn(111, src) },
				"in far":  func() { s.CopyIn(^uint32(0), src) },
				"out":     func() { s.CopyOut(got, 111) },
				"sub":     func() { s.Sub(199, 2) },
				"sub far": func() { s.Sub(^uint32(0), ^uint32(0)) },
				"mem":     func() { dma.Span{Region: r, Off: 500, Len: 13}.Mem() },
				"empty":   func() { dma.Span{Region: r, Off: 500}.Mem() },
			} {
				if panics(f) == "" {
					t.Errorf("%s: no panic", what)
				}
			}
		})
	}
}

func TestSpanRAM(t *testing.T) {
	for name, r := range accounted(t, 128) {
		s := dma.Span{Region: r, Off: 16, Len: 20}
		ram, ok := s.RAM()
		if ok != (name == "cached") {
			t.Fatalf("%s: RAM view: %v", name, ok)
		}
		if !ok {
			continue
		}
		all, _ := r.Mem.RAM()
		if ram.Size() != 20 || &ram.Bytes()[0] != &all.Bytes()[16] {
			t.Error("the view is elsewhere")
		}
		if panics(func() { dma.Span{Region: r, Off: 120, Len: 9}.RAM() }) == "" {
			t.Error("a view outside the region")
		}
	}
}

func TestCopySpan(t *testing.T) {
	for _, dn := range []string{"cached", "uncached", "bus"} {
		for sn, s := range accounted(t, 2048) {
			d := accounted(t, 2048)[dn]
			src := dma.Span{Region: s, Off: 13, Len: 1500}
			dst := dma.Span{Region: d, Off: 32, Len: 1600}
			s.Mem.CopyIn(13, ramp(1500, 9))
			dma.CopySpan(dst, src)
			got := make([]byte, 1502)
			d.Mem.CopyOut(got, 31)
			want := append(append([]byte{0}, ramp(1500, 9)...), 0)
			if !bytes.Equal(got, want) {
				t.Errorf("%s to %s: wrong bytes", sn, dn)
			}
			if a := s.Account.Load(); a.ReadBytes != 1500 || a.Reads == 0 || a.Writes != 0 {
				t.Errorf("%s to %s: source account %+v", sn, dn, a)
			}
			if a := d.Account.Load(); a.WriteBytes != 1500 || a.Writes == 0 || a.Reads != 0 {
				t.Errorf("%s to %s: destination account %+v", sn, dn, a)
			}
			if panics(func() { dma.CopySpan(dst.Sub(0, 1499), src) }) == "" {
				t.Errorf("%s to %s: copied to a shorter span", sn, dn)
			}
		}
	}
}

func TestAccount(t *testing.T) {
	a := new(dma.Account)
	r := &dma.Region{Name: "r", Mem: mapped(256, mmio.Cached), Account: a}
	s := dma.Span{Region: r, Len: 256}
	s.AccountIovecRead(65)
	s.AccountIovecRead(0)
	s.AccountIovecWrite(64)
	a.AddControlReads(3)
	a.AddControlWrites(4)
	a.AddFlushReads(5)
	want := dma.Account{Reads: 2, ReadBytes: 65, Writes: 1, WriteBytes: 64, ControlReads: 3, ControlWrites: 4, FlushReads: 5}
	if got := a.Load(); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	// Without an account nothing counts, and nothing breaks.
	a, r.Account = nil, nil
	a.AddReads(1, 1)
	a.AddWrites(1, 1)
	a.AddControlReads(1)
	a.AddControlWrites(1)
	a.AddFlushReads(1)
	s.AccountIovecRead(1)
	s.AccountIovecWrite(1)
	s.CopyIn(0, []byte{1})
	if a.Load() != (dma.Account{}) {
		t.Error("no account, but counts")
	}
}

func TestSpansDoNotAllocate(t *testing.T) {
	buf := make([]byte, 100)
	for name, r := range accounted(t, 512) {
		s, d := dma.Span{Region: r, Off: 1, Len: 100}, dma.Span{Region: r, Off: 203, Len: 100}
		if n := testing.AllocsPerRun(50, func() {
			s.CopyIn(0, buf)
			s.CopyOut(buf, 0)
			dma.CopySpan(d, s)
			s.AccountIovecRead(100)
			s.RAM()
			s.Mem()
		}); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

func TestCPUEngine(t *testing.T) {
	rs := accounted(t, 1024)
	r, q := rs["bus"], rs["uncached"]
	r.Mem.CopyIn(0, ramp(512, 1))
	e := dma.NewCPUEngine(4)
	var batch []dma.Copy
	for i := 0; i < 10; i++ {
		batch = append(batch, dma.Copy{
			Dst: dma.Span{Region: q, Off: uint64(i * 50), Len: 50},
			Src: dma.Span{Region: r, Off: uint64(i * 50), Len: 50},
			Tag: uint64(100 + i),
		})
	}
	done := make([]dma.Completion, 3)
	if n := e.Poll(done); n != 0 {
		t.Fatalf("%d completions before the first copy", n)
	}
	next := uint64(100)
	for left := batch; len(left) > 0 || next < 110; {
		n, err := e.Submit(left)
		if err != nil || n > 4 {
			t.Fatalf("Submit: %d, %v", n, err)
		}
		left = left[n:]
		k := e.Poll(done)
		if k == 0 {
			t.Fatalf("no completion, %d copies left", len(left))
		}
		for _, c := range done[:k] {
			if c.Tag != next || c.Err != nil {
				t.Fatalf("completion %+v, want tag %d", c, next)
			}
			next++
		}
	}
	got := make([]byte, 512)
	q.Mem.CopyOut(got, 0)
	if !bytes.Equal(got[:500], ramp(500, 1)) || got[500] != 0 {
		t.Error("wrong bytes")
	}
	if n, err := e.Submit(batch); n != 4 || err != nil {
		t.Errorf("a full engine accepted %d, %v", n, err)
	}
	if n, err := e.Submit(batch[:1]); n != 0 || err != nil {
		t.Errorf("a full engine accepted %d, %v", n, err)
	}
	e.Poll(done)
	short := dma.Copy{Dst: batch[0].Dst.Sub(0, 49), Src: batch[0].Src, Tag: 100}
	if n, err := e.Submit([]dma.Copy{batch[0], short}); n != 1 || !errors.Is(err, dma.ErrBadCopy) || !strings.Contains(err.Error(), "tag 100: 50 bytes") {
		t.Errorf("a destination that is too short: %d, %v", n, err)
	}
	if err := e.Close(); err != nil {
		t.Error(err)
	}
	if n, err := e.Submit(batch); n != 0 || !errors.Is(err, dma.ErrEngineClosed) {
		t.Errorf("a closed engine accepted %d, %v", n, err)
	}
	if n := e.Poll(done); n != 0 {
		t.Errorf("%d completions of a closed engine", n)
	}
}

func BenchmarkSpan(b *testing.B) {
	for _, k := range []mmio.Kind{mmio.Cached, mmio.Uncached} {
		r := &dma.Region{Name: "r", Mem: mapped(4096, k), Account: new(dma.Account)}
		s := dma.Span{Region: r, Off: 64, Len: 1514}
		buf := make([]byte, 1514)
		b.Run("CopyIn/"+k.String(), func(b *testing.B) {
			b.SetBytes(1514)
			for b.Loop() {
				s.CopyIn(0, buf)
			}
		})
		b.Run("CopyOut/"+k.String(), func(b *testing.B) {
			b.SetBytes(1514)
			for b.Loop() {
				s.CopyOut(buf, 0)
			}
		})
		b.Run("RAM/"+k.String(), func(b *testing.B) {
			for b.Loop() {
				s.RAM()
			}
		})
	}
}

// TestAccounted: a span and a view of a table count where they are told to, and nowhere else.
func TestAccounted(t *testing.T) {
	var link dma.Account
	q := new(dma.QueueAccount)
	counted := &dma.Region{Name: "far", Addr: 0x1000, Mem: mapped(256, mmio.Uncached), Access: rw, Across: true, Account: &link}
	near := &dma.Region{Name: "near", Addr: 0x2000, Mem: mapped(256, mmio.Cached), Access: rw}

	s := dma.Span{Region: counted, Off: 8, Len: 16}.Accounted(&q.Device)
	s.CopyIn(0, make([]byte, 16))
	// One store a machine word.
	if q.Device.Load() != (dma.Account{Writes: 16 * 8 / bits.UintSize, WriteBytes: 16}) || link.Load() != (dma.Account{}) {
		t.Errorf("counted %+v, the region's %+v", q.Device.Load(), link.Load())
	}
	if counted.Account != &link || s.Addr() != 0x1008 {
		t.Error("the region has changed")
	}
	for _, s := range []dma.Span{{Region: near, Len: 1}, {Region: counted, Len: 1}, {}} {
		a := &q.Device
		if s.Region == counted {
			a = nil
		}
		if s.Accounted(a) != s {
			t.Errorf("%+v is not itself", s)
		}
	}

	var ref dma.TableRef
	views := []*dma.TableRef{ref.Accounted(&q.Payload), ref.Accounted(&q.Driver)}
	views = append(views, views[0].Accounted(&q.Descriptor))
	want := []*dma.Account{&q.Payload, &q.Driver, &q.Descriptor}
	for _, v := range views {
		if v.Load() != nil {
			t.Error("a view of nothing holds a table")
		}
	}
	for n := 1; n < 3; n++ {
		regions := []dma.Region{*counted, *near}[:n]
		ref.Store(table(t, regions...))
		for i, v := range views {
			tab := v.Load()
			if tab == ref.Load() || tab != v.Load() {
				t.Error("a view holds another table each time, or the table itself")
			}
			rs := tab.Regions()
			if len(rs) != n || rs[0].Account != want[i] || rs[0].Addr != counted.Addr {
				t.Errorf("view %d: %+v", i, rs)
			}
			if n == 2 && rs[1] != *near {
				t.Errorf("view %d: %+v, want %+v", i, rs[1], *near)
			}
			checkTranslate(t, tab, 0x1010, 32, dma.DeviceRead)
			if a := testing.AllocsPerRun(50, func() { v.Load() }); a != 0 {
				t.Errorf("view %d: loading allocates %v times", i, a)
			}
		}
	}
	ref.Store(nil)
	if views[2].Load() != nil {
		t.Error("a view of nothing holds a table")
	}
	defer func() {
		if recover() == nil {
			t.Error("a view can be stored to")
		}
	}()
	views[0].Store(nil)
}
