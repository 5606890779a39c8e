package fn

import (
	"errors"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/dma/engine/pool"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/pci"
)

// closing is an engine that is only closed, and the function that it belongs to; log is what is done, in order.
type closing struct {
	dma.Engine
	pci.Function
	close func() error
	log   *[]string
}

func (c closing) Close() error {
	*c.log = append(*c.log, "close")
	return c.close()
}

func (c closing) SetBusMaster(on bool) error {
	*c.log = append(*c.log, map[bool]string{true: "bus master", false: "no bus master"}[on])
	return nil
}

// TestHeldClose: memory is taken away from an engine that stands still, or may not use the bus any more; the latter too where its
// registers could not be reached.
func TestHeldClose(t *testing.T) {
	regs, err := unix.Mmap(-1, 0, 4096, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(regs)
	base := unsafe.Pointer(unsafe.SliceData(regs))
	defer pci.GuardRange(uintptr(base), 4096, "registers")()
	mem := mmio.NewMem(base, 4096, mmio.Uncached)
	other := errors.New("another")
	for _, c := range []struct {
		name  string
		close func() error
		want  error
		off   bool // bus mastering
		wild  bool // the board is lost
	}{
		{"stands still", func() error { return nil }, nil, false, false},
		{"fails otherwise", func() error { return other }, other, false, false},
		{"runs away", func() error { return dma.ErrRunaway }, dma.ErrRunaway, true, true},
		{"cannot be reached", func() error { mem.Store32(0, 0); return nil }, pci.ErrGone, true, false},
	} {
		var log []string
		f := closing{close: c.close, log: &log}
		e := &Engines{c: EngineConfig{F: f}, used: map[int]bool{3: true}}
		p, err := pool.New(pool.Config{Name: "staging", Size: 4096, Link: 1 << 32,
			Map:   func(mmio.RAM) (dma.Addr, error) { return 0x1000, nil },
			Unmap: func(dma.Addr) error { log = append(log, "unmap"); return nil }})
		if err != nil {
			t.Fatal(err)
		}
		h := &held{Engine: f, e: e, key: 3, pools: []*pool.Pool{p}}
		for i := 0; i < 2; i++ {
			if err := h.Close(); !errors.Is(err, c.want) || c.want == nil && err != nil {
				t.Errorf("%s: %v", c.name, err)
			}
		}
		want := []string{"close", "unmap"}
		if c.off {
			want = []string{"close", "no bus master", "unmap"}
		}
		if len(log) != len(want) || log[1] != want[1] || log[len(log)-1] != "unmap" {
			t.Errorf("%s: %q, want %q", c.name, log, want)
		}
		if gone := e.Gone(nil)(); (gone != nil) != c.wild || len(e.used) != 0 {
			t.Errorf("%s: lost: %v, channels in use: %v", c.name, gone, e.used)
		}
	}
}
