package mmio_test

import (
	"bytes"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"github.com/boardlink/boardlink/mmio"
)

// TestWideAtTheEdge copies up to the borders of pages without access, with every width that there is, from and to private memory that ends at
// such a border too: an access outside, or a misaligned one, ends the test with a fault.
func TestWideAtTheEdge(t *testing.T) {
	page := syscall.Getpagesize()
	guarded := func() []byte {
		b, err := syscall.Mmap(-1, 0, 3*page, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_PRIVATE|syscall.MAP_ANON)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { syscall.Munmap(b) })
		for _, edge := range [][]byte{b[:page], b[2*page:]} {
			if err := syscall.Mprotect(edge, syscall.PROT_NONE); err != nil {
				t.Fatal(err)
			}
		}
		return b[page : 2*page : 2*page]
	}
	device, private := guarded(), guarded()
	src := ramp(page, 3)
	for w := range allWidths() {
		for _, kind := range []mmio.Kind{mmio.WriteCombining, mmio.Uncached} {
			m, err := mmio.NewMem(unsafe.Pointer(&device[0]), uint64(page), kind).WithWidths(w)
			if err != nil {
				t.Fatal(err)
			}
			if m.Widths() != w {
				t.Fatalf("widths %v, want %v", m.Widths(), w)
			}
			for n := 0; n <= 330; n++ {
				// Both at the start, both at the end, and each at the other's.
				for place := 0; place < 4; place++ {
					off, mine := 0, 0
					if place&1 != 0 {
						off = page - n
					}
					if place&2 != 0 {
						mine = page - n
					}
					want := src[n : 2*n]
					copy(private[mine:], want)
					m.CopyIn(uint64(off), private[mine:mine+n])
					if !bytes.Equal(device[off:off+n], want) {
						t.Fatalf("%v, %v: CopyIn of %d at %#x", kind, w, n, off)
					}
					clear(private[mine : mine+n])
					m.CopyOut(private[mine:mine+n], uint64(off))
					if !bytes.Equal(private[mine:mine+n], want) {
						t.Fatalf("%v, %v: CopyOut of %d at %#x", kind, w, n, off)
					}
				}
			}
		}
	}
}

func TestWidths(t *testing.T) {
	b := aligned(128)
	most := mmio.Widest()
	t.Logf("widest %v, a hypervisor %v", most, mmio.Emulated())
	m := mmio.NewMem(unsafe.Pointer(&b[0]), 128, mmio.WriteCombining)
	for _, w := range []mmio.Widths{{}, {Load: 4, Store: 8}, {Load: 8}, {Load: 8, Store: 12}, {Load: 2 * most.Load, Store: 8}, {Load: 8, Store: 2 * most.Store}, {Load: 128, Store: 128}} {
		if got, err := m.WithWidths(w); err == nil || got.Widths() != m.Widths() || !strings.Contains(err.Error(), "a power of two from 8 to") {
			t.Errorf("%v: %v, %v", w, got.Widths(), err)
		}
	}
	wide, err := m.WithWidths(most)
	if err != nil {
		t.Fatal(err)
	}
	part, err := wide.Slice(3, 100)
	if err != nil || part.Widths() != most {
		t.Errorf("a slice has widths %v: %v", part.Widths(), err)
	}
	for _, k := range []mmio.Kind{mmio.Cached, mmio.Uncached} {
		if w := mmio.DefaultWidths(k); w != (mmio.Widths{Load: 8, Store: 8}) {
			t.Errorf("%v: %v by default", k, w)
		}
	}
	if w := mmio.DefaultWidths(mmio.WriteCombining); w.Store != 8 || mmio.Emulated() && w.Load != 8 {
		t.Errorf("write-combining: %v by default", w)
	}
}
