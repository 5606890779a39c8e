package mmio_test

import (
	"bytes"
	"syscall"
	"testing"
	"unsafe"

	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/mmio/mmiotest"
)

const (
	guard  = 32 // bytes on either side of a copy
	maxMis = 63
	maxLen = 200
	arena  = guard + maxMis + maxLen + guard + 10
)

func ramp(n, start int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*7 + start)
	}
	return b
}

// accesses is the reference for the number of accesses: it walks the range byte by byte and
// closes an access where no wider one, up to max, could be aligned and inside.
func accesses(off, n, max uint64, word bool) uint64 {
	count := uint64(0)
	for end := off + n; off < end; count++ {
		for w := max; ; w /= 2 {
			if off%w == 0 && off+w <= end {
				if w == 8 && word && unsafe.Sizeof(uintptr(0)) == 4 {
					count++ // two of 32 bits
				}
				off += w
				break
			}
		}
	}
	return count
}

func wantCount(m mmio.Mem, off, n uint64, width uint8) uint64 {
	if m.Kind() == mmio.Cached && !m.Modelled() {
		return (n + 63) / 64
	}
	return accesses(off, n, uint64(width), !m.Modelled())
}

func TestCopies(t *testing.T) {
	for _, p := range places(arena) {
		t.Run(p.name, func(t *testing.T) {
			m := p.mem
			old := ramp(arena, 100)
			for mis := 0; mis <= maxMis; mis++ {
				for n := 0; n <= maxLen; n++ {
					off := guard + mis
					// The private side is misaligned in its own way.
					src := ramp(n+n%8, 3)[n%8:]
					want := append([]byte(nil), old...)
					copy(want[off:], src)
					count := wantCount(m, uint64(off), uint64(n), m.Widths().Store)

					p.fill(old)
					if got := m.CopyIn(uint64(off), src); got != count {
						t.Fatalf("CopyIn %d at +%d: %d transactions, want %d", n, mis, got, count)
					}
					if got := p.bytes(); !bytes.Equal(got, want) {
						t.Fatalf("CopyIn %d at +%d: memory holds\n%x, want\n%x", n, mis, got, want)
					}

					dst := ramp(2*guard+n+n%8, 9)
					keep := append([]byte(nil), dst...)
					copy(keep[guard+n%8:], src)
					count = wantCount(m, uint64(off), uint64(n), m.Widths().Load)
					if got := m.CopyOut(dst[guard+n%8:guard+n%8+n], uint64(off)); got != count {
						t.Fatalf("CopyOut %d at +%d: %d transactions, want %d", n, mis, got, count)
					}
					if !bytes.Equal(dst, keep) {
						t.Fatalf("CopyOut %d at +%d:\n%x, want\n%x", n, mis, dst, keep)
					}

					copy(want[off:off+n], make([]byte, n))
					count = wantCount(m, uint64(off), uint64(n), 8)
					if got := m.Zero(uint64(off), uint64(n)); got != count {
						t.Fatalf("Zero %d at +%d: %d transactions, want %d", n, mis, got, count)
					}
					if got := p.bytes(); !bytes.Equal(got, want) {
						t.Fatalf("Zero %d at +%d: memory holds\n%x, want\n%x", n, mis, got, want)
					}
				}
			}
			p.check(t)
		})
	}
}

// TestCopiesTouchNothingElse looks at each access that a bus sees.
func TestCopiesTouchNothingElse(t *testing.T) {
	s := mmiotest.New(arena)
	s.Record(true)
	m := s.Mem(mmio.Uncached)
	buf := make([]byte, maxLen)
	for mis := uint64(0); mis <= maxMis; mis++ {
		for n := uint64(0); n <= maxLen; n++ {
			off := guard + mis
			for name, do := range map[string]func() uint64{
				"CopyIn":  func() uint64 { return m.CopyIn(off, buf[:n]) },
				"CopyOut": func() uint64 { return m.CopyOut(buf[:n], off) },
				"Zero":    func() uint64 { return m.Zero(off, n) },
			} {
				s.Reset()
				count := do()
				op := mmiotest.Store
				if name == "CopyOut" {
					op = mmiotest.Load
				}
				at := off
				for _, a := range s.Log() {
					if a.Op != op || a.Off != at {
						t.Fatalf("%s of %d at %d: %v, expected the next %v at %d", name, n, off, a, op, at)
					}
					at += uint64(a.Width)
				}
				if at != off+n || uint64(len(s.Log())) != count {
					t.Fatalf("%s of %d at %d ends at %d after %d accesses, %d reported", name, n, off, at, len(s.Log()), count)
				}
				if err := s.Err(); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
}

// TestCopiesAtTheEdge copies up to the borders of pages without access: an access
// outside, reads included, ends the test with a fault.
func TestCopiesAtTheEdge(t *testing.T) {
	page := syscall.Getpagesize()
	b, err := syscall.Mmap(-1, 0, 3*page, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_PRIVATE|syscall.MAP_ANON)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Munmap(b)
	for _, edge := range [][]byte{b[:page], b[2*page:]} {
		if err := syscall.Mprotect(edge, syscall.PROT_NONE); err != nil {
			t.Fatal(err)
		}
	}
	for _, kind := range []mmio.Kind{mmio.Cached, mmio.WriteCombining, mmio.Uncached} {
		m := mmio.NewMem(unsafe.Pointer(&b[page]), uint64(page), kind)
		for n := 0; n <= maxLen; n++ {
			for _, off := range []uint64{0, uint64(page - n)} {
				want := ramp(n, n)
				m.CopyIn(off, want)
				got := make([]byte, n)
				m.CopyOut(got, off)
				if !bytes.Equal(got, want) {
					t.Fatalf("%v: %d bytes at %#x: %x, want %x", kind, n, off, got, want)
				}
				m.Zero(off, uint64(n))
			}
		}
	}
}

func TestLongCopies(t *testing.T) {
	for _, p := range places(10000) {
		for _, n := range []int{511, 512, 1023, 1024, 1025, 1032, 2047, 4096, 9000} {
			src := ramp(n, 1)
			p.fill(ramp(10000, 50))
			want := ramp(10000, 50)
			copy(want[3:], src)
			p.mem.CopyIn(3, src)
			if !bytes.Equal(p.bytes(), want) {
				t.Fatalf("%s: CopyIn of %d bytes", p.name, n)
			}
			got := make([]byte, n)
			p.mem.CopyOut(got, 3)
			if !bytes.Equal(got, src) {
				t.Fatalf("%s: CopyOut of %d bytes", p.name, n)
			}
			p.mem.Zero(3, uint64(n))
			copy(want[3:3+n], make([]byte, n))
			if !bytes.Equal(p.bytes(), want) {
				t.Fatalf("%s: Zero of %d bytes", p.name, n)
			}
		}
		p.check(t)
	}
}

func TestCopyMem(t *testing.T) {
	for _, d := range places(3000) {
		for _, s := range places(3000) {
			t.Run(s.name+" to "+d.name, func(t *testing.T) {
				for _, n := range []uint64{0, 1, 7, 8, 9, 63, 200, 511, 512, 513, 1024, 2048} {
					for mis := uint64(0); mis < 8; mis++ {
						doff, soff := 64+mis, 64+(mis*3)%8
						d.fill(ramp(3000, 1))
						s.fill(ramp(3000, 77))
						want := ramp(3000, 1)
						copy(want[doff:doff+n], ramp(3000, 77)[soff:])
						reads, writes := mmio.CopyMem(&d.mem, doff, &s.mem, soff, n)
						if !bytes.Equal(d.bytes(), want) {
							t.Fatalf("%d bytes from +%d to +%d are wrong", n, soff, doff)
						}
						if !bytes.Equal(s.bytes(), ramp(3000, 77)) {
							t.Fatalf("%d bytes from +%d to +%d: the source changed", n, soff, doff)
						}
						if w := wantCount(s.mem, soff, n, s.mem.Widths().Load); reads != w {
							t.Fatalf("%d bytes from +%d to +%d: %d reads, want %d", n, soff, doff, reads, w)
						}
						// A staged copy may split the destination's words.
						w := wantCount(d.mem, doff, n, d.mem.Widths().Store)
						if staged := n / 440 * 14; writes < w || writes > w+staged {
							t.Fatalf("%d bytes from +%d to +%d: %d writes, want %d", n, soff, doff, writes, w)
						}
					}
				}
				d.check(t)
				s.check(t)
			})
		}
	}
}

func TestCopyMemOverlapsInCachedMemory(t *testing.T) {
	b := ramp(256, 0)
	want := ramp(256, 0)
	m := mmio.FromBytes(b)
	mmio.CopyMem(&m, 16, &m, 8, 200)
	copy(want[16:], want[8:208])
	if !bytes.Equal(b, want) {
		t.Errorf("% x", b)
	}
}

func TestCopyOutsidePanics(t *testing.T) {
	for _, p := range places(64) {
		m, other := p.mem, mmio.FromBytes(aligned(128))
		buf := make([]byte, 65)
		for name, f := range map[string]func(){
			"in long":        func() { m.CopyIn(0, buf) },
			"in behind":      func() { m.CopyIn(65, nil) },
			"in past":        func() { m.CopyIn(60, buf[:5]) },
			"in far":         func() { m.CopyIn(^uint64(0)-1, buf[:5]) },
			"out long":       func() { m.CopyOut(buf, 0) },
			"out far":        func() { m.CopyOut(buf[:1], ^uint64(0)) },
			"zero long":      func() { m.Zero(0, 65) },
			"zero far":       func() { m.Zero(8, ^uint64(0)) },
			"mem source":     func() { mmio.CopyMem(&other, 0, &m, 0, 65) },
			"mem source far": func() { mmio.CopyMem(&other, 0, &m, ^uint64(0), 1) },
			"mem dest":       func() { mmio.CopyMem(&m, 1, &other, 0, 64) },
		} {
			if panics(f) == "" {
				t.Errorf("%s: %s: no panic", p.name, name)
			}
		}
		if m.CopyIn(64, nil) != 0 || m.CopyOut(nil, 64) != 0 || m.Zero(64, 0) != 0 {
			t.Errorf("%s: empty copies have transactions", p.name)
		}
		p.check(t)
	}
}

func TestCopiesDoNotAllocate(t *testing.T) {
	for _, p := range places(2048) {
		buf := make([]byte, 1501)
		d := p.mem
		s := p.mem
		if n := testing.AllocsPerRun(20, func() {
			p.mem.CopyIn(3, buf)
			p.mem.CopyOut(buf, 3)
			p.mem.Zero(3, 1501)
			mmio.CopyMem(&d, 1030, &s, 3, 1000)
			p.mem.Publish32(0, p.mem.Consume32(0))
			p.mem.Barrier(mmio.FullBarrier)
		}); n != 0 {
			t.Errorf("%s: %v allocations", p.name, n)
		}
	}
}
