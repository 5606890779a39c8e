package dmabench

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/dma/engine/pool"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/pci"
)

// cpuDepth is what the processor as an engine may hold.
const cpuDepth = 16

// boardMem is the memory that stands for a board's in loopback, in bytes: eight copies of 4 MiB and what lies between them.
const boardMem = 8*(4<<20) + 1<<20

func cpu(Direction) (dma.Engine, dma.Span, error) { return dma.NewCPUEngine(cpuDepth), dma.Span{}, nil }

// Loopback returns a target of this machine's memory alone: shared memory as a loopback link has it, seen as RAM, and as if it
// were a device's. It shows the loops, not a bus.
func Loopback() (*Target, error) {
	mem, err := unix.Mmap(-1, 0, boardMem, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
	if err != nil {
		return nil, fmt.Errorf("%d bytes of memory: %w", boardMem, err)
	}
	host, err := pool.New(pool.Config{Name: "host", Size: boardMem, Link: hostLink})
	if err != nil {
		unix.Munmap(mem)
		return nil, err
	}
	cached := mmio.FromBytes(mem)
	ram, _ := cached.RAM()
	view := func(k mmio.Kind) dma.Span {
		r := &dma.Region{Name: "board", Addr: 0, Mem: mmio.NewMem(ram.Pointer(0), boardMem, k), Access: dma.DeviceRead | dma.DeviceWrite}
		return dma.Span{Region: r, Len: boardMem}
	}
	h := dma.Span{Region: host.Region(), Len: boardMem}
	return &Target{Name: "loopback", Memory: "RAM", Variants: append([]Variant{
		{Name: RuntimeCopy, Host: h, Board: view(mmio.Cached)},
		{Name: DeviceCopy, Host: h, Board: view(mmio.Uncached)},
		{Name: WCCopy, Host: h, Board: view(mmio.WriteCombining)},
		{Name: CPUEngine, Host: h, Board: view(mmio.Uncached), Engine: cpu},
	}, wide(WCCopy, h, view(mmio.WriteCombining))...), Close: func() error {
		err := host.Close()
		if uerr := unix.Munmap(mem); err == nil {
			err = uerr
		}
		return err
	}}, nil
}

// wide returns variants of the processor's copy called name with each width that it can do and that is not the default.
func wide(name string, host, board dma.Span) (vs []Variant) {
	most := mmio.Widest()
	for n := uint8(8); n <= most.Load && n <= most.Store; n *= 2 {
		w := mmio.Widths{Load: n, Store: n}
		m, err := board.Region.Mem.WithWidths(w)
		if err != nil || w == board.Region.Mem.Widths() {
			continue
		}
		r := *board.Region
		r.Mem = m
		vs = append(vs, Variant{Name: fmt.Sprintf("%s, %d bytes", name, n), Host: host, Board: dma.Span{Region: &r, Off: board.Off, Len: board.Len}})
	}
	return vs
}

// hostLink is a link address for the host's memory that no board has.
const hostLink = dma.Addr(1) << 60

// hasFunction is a board that is a PCI function.
type hasFunction interface{ Function() pci.Function }

// Board returns the target of an opened board, which stays the caller's: its window from offset off on, n bytes (0: all). Whatever is
// there is overwritten.
func Board(b board.Board, off, n uint64) (*Target, error) {
	w := b.Window()
	size := w.Mem.Size()
	if off >= size || n > size-off {
		return nil, fmt.Errorf("%#x bytes at offset %#x: the window of %s has %#x", n, off, b, size)
	}
	if n == 0 {
		n = size - off
	}
	if n > boardMem {
		n = boardMem
	}
	host, err := pool.New(pool.Config{Name: "host", Size: n, Link: hostLink})
	if err != nil {
		return nil, err
	}
	window := dma.Span{Region: &w, Off: off, Len: uint32(n)}
	h := dma.Span{Region: host.Region(), Len: uint32(n)}
	t := &Target{Name: b.String(), Memory: w.Mem.Kind().String(), Close: host.Close}
	if f, ok := b.(hasFunction); ok && f.Function() != nil {
		t.Link = NewLink(f.Function().Info().PCIe)
	}
	name := map[mmio.Kind]string{mmio.Cached: RuntimeCopy, mmio.WriteCombining: WCCopy, mmio.Uncached: DeviceCopy}[w.Mem.Kind()]
	t.Variants = []Variant{{Name: name, Host: h, Board: window}, {Name: CPUEngine, Host: h, Board: window, Engine: cpu}}
	if w.Mem.Kind() != mmio.Cached && !mmio.Emulated() {
		t.Variants = append(t.Variants, wide(name, h, window)...)
	}
	e, ok := b.(board.Engined)
	if !ok {
		return t, nil
	}
	for _, d := range []Direction{HostToBoard, BoardToHost} {
		open := func(d Direction) (dma.Engine, dma.Span, error) {
			return e.Engine(board.EngineConfig{ToBoard: d == HostToBoard, Window: []board.WindowPart{{Link: w.Addr, Size: size}}, Size: n, Link: hostLink})
		}
		// Opened here for its name, and again for the measurement.
		eng, _, err := open(d)
		if errors.Is(err, board.ErrNoEngine) {
			continue
		}
		if err != nil {
			t.Close()
			return nil, err
		}
		name := eng.Caps().Name
		if err := eng.Close(); err != nil {
			t.Close()
			return nil, err
		}
		t.Variants = append(t.Variants, Variant{Name: name, Board: window, Only: d, Engine: open})
	}
	return t, nil
}
