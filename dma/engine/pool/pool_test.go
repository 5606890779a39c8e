package pool_test

import (
	"errors"
	"os"
	"strconv"
	"strings"
	"testing"
	"unsafe"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/dma/engine/pool"
	"github.com/boardlink/boardlink/mmio"
)

// smaps returns the lines of the mapping that holds an address, empty where none does.
func smaps(t *testing.T, addr uintptr) string {
	t.Helper()
	b, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	in := false
	for _, l := range strings.Split(string(b), "\n") {
		if lo, hi, ok := strings.Cut(strings.SplitN(l, " ", 2)[0], "-"); ok {
			a, err1 := strconv.ParseUint(lo, 16, 64)
			z, err2 := strconv.ParseUint(hi, 16, 64)
			if err1 == nil && err2 == nil {
				in = uint64(addr) >= a && uint64(addr) < z
			}
		}
		if in {
			out = append(out, l)
		}
	}
	return strings.Join(out, "\n")
}

func address(p *pool.Pool) uintptr {
	r, _ := p.Region().Mem.RAM()
	return uintptr(unsafe.Pointer(r.Pointer(0)))
}

func TestPool(t *testing.T) {
	for _, noHuge := range []bool{true, false} {
		unmapped := 0
		p, err := pool.New(pool.Config{Name: "staging", Size: 3<<20 + 1, Link: 0x9_0000_0000, Mask: 1<<28 - 1, NoHuge: noHuge,
			Map: func(m mmio.RAM) (dma.Addr, error) { m.Bytes()[0] = 7; return 0x100000, nil },
			Unmap: func(a dma.Addr) error {
				if a != 0x100000 {
					t.Errorf("unmaps %#x", uint64(a))
				}
				unmapped++
				return nil
			}})
		if err != nil {
			t.Fatal(err)
		}
		at := address(p)
		m := smaps(t, at)
		flags := m[strings.Index(m, "VmFlags"):]
		if !strings.Contains(flags, " dc") || !p.Huge() && !strings.Contains(flags, " lo") || p.Huge() != strings.Contains(flags, " ht") || noHuge && p.Huge() {
			t.Errorf("huge %v: locked, kept from children? %s", p.Huge(), flags)
		}
		if !strings.Contains(m, "Rss:") || strings.Contains(m, "Rss:                   0 kB") && !p.Huge() {
			t.Errorf("its pages are not there:\n%s", m)
		}
		t.Logf("huge pages: %v, %d bytes", p.Huge(), p.Region().Mem.Size())
		s, err := p.Take(100, 4096)
		if err != nil || uint64(s.Addr())%4096 != 0 || p.Bus() != 0x100000 {
			t.Errorf("%v at %#x, bus %#x", err, uint64(s.Addr()), p.Bus())
		}
		s.CopyIn(0, []byte("hello"))
		if _, err := p.Take(8<<20, 1); !errors.Is(err, dma.ErrNoSpace) || !strings.Contains(err.Error(), "staging") {
			t.Errorf("more than there is: %v", err)
		}
		for i := 0; i < 2; i++ {
			if err := p.Close(); err != nil || unmapped != 1 {
				t.Errorf("Close: %v, unmapped %d times", err, unmapped)
			}
		}
		if m := smaps(t, at); strings.Contains(m, " lo ") && strings.Contains(m, " dc ") {
			t.Errorf("still there after Close:\n%s", m)
		}
	}
}

// locked returns what the process has locked, in kB.
func locked(t *testing.T) string {
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), "VmLck:")
	l, _, _ := strings.Cut(rest, "\n")
	return strings.TrimSpace(l)
}

// TestPoolFails: whatever fails, nothing is left behind.
func TestPoolFails(t *testing.T) {
	before := locked(t)
	boom := errors.New("boom")
	unmapped := []dma.Addr{}
	unmap := func(a dma.Addr) error { unmapped = append(unmapped, a); return nil }
	to := func(a dma.Addr) func(mmio.RAM) (dma.Addr, error) {
		return func(mmio.RAM) (dma.Addr, error) { return a, nil }
	}
	for what, c := range map[string]pool.Config{
		"the map fails":      {Size: 4096, Map: func(mmio.RAM) (dma.Addr, error) { return 0, boom }, Unmap: unmap},
		"above the mask":     {Size: 8192, Mask: 0xfff_ffff, Map: to(0xfff_f000), Unmap: unmap},
		"far above the mask": {Size: 8192, Mask: 0xfff_ffff, Map: to(1 << 40), Unmap: unmap},
		"no bytes":           {},
		"no reverse":         {Size: 1, Map: to(0)},
		"link wraps":         {Size: 8192, Link: ^dma.Addr(0) - 4095},
	} {
		c.Name, c.NoHuge = "p", true
		if p, err := pool.New(c); err == nil {
			t.Errorf("%s: accepted", what)
			p.Close()
		}
	}
	if len(unmapped) != 2 {
		t.Errorf("unmapped %v, want the two that were mapped too high", unmapped)
	}
	if after := locked(t); after != before {
		t.Errorf("locked %s before, %s after", before, after)
	}

	// What cannot be taken from the device stays mapped; it is not an error to be hidden.
	p, err := pool.New(pool.Config{Name: "p", Size: 4096, NoHuge: true, Map: to(0), Unmap: func(dma.Addr) error { return boom }})
	if err != nil {
		t.Fatal(err)
	}
	at := address(p)
	if err := p.Close(); !errors.Is(err, boom) {
		t.Errorf("Close: %v", err)
	}
	if smaps(t, at) == "" {
		t.Error("memory that the device can reach was given back")
	}
	if err := p.Abandon(); !errors.Is(err, pool.ErrAbandoned) || smaps(t, at) == "" {
		t.Errorf("Abandon: %v", err)
	}
}
