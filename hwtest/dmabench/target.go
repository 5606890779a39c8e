package dmabench

import (
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

func cpu(Direction) (dma.Engine, error) { return dma.NewCPUEngine(cpuDepth), nil }

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
	return &Target{Name: "loopback", Memory: "RAM", Variants: []Variant{
		{Name: RuntimeCopy, Host: h, Board: view(mmio.Cached)},
		{Name: DeviceCopy, Host: h, Board: view(mmio.Uncached)},
		{Name: WCCopy, Host: h, Board: view(mmio.WriteCombining)},
		{Name: CPUEngine, Host: h, Board: view(mmio.Uncached), Engine: cpu},
	}, Close: func() error {
		err := host.Close()
		if uerr := unix.Munmap(mem); err == nil {
			err = uerr
		}
		return err
	}}, nil
}

// hostLink is a link address for the host's memory that no board has.
const hostLink = dma.Addr(1) << 60

// Engined is a board with a DMA engine that the host drives.
type Engined interface {
	// Engine opens the engine for one user and one direction, with memory of the host that it reaches.
	Engine(toBoard bool) (dma.Engine, dma.Span, error)
}

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
	board := dma.Span{Region: &w, Off: off, Len: uint32(n)}
	h := dma.Span{Region: host.Region(), Len: uint32(n)}
	t := &Target{Name: b.String(), Memory: w.Mem.Kind().String(), Close: host.Close}
	if f, ok := b.(hasFunction); ok {
		t.Link = NewLink(f.Function().Info().PCIe)
	}
	name := map[mmio.Kind]string{mmio.Cached: RuntimeCopy, mmio.WriteCombining: WCCopy, mmio.Uncached: DeviceCopy}[w.Mem.Kind()]
	t.Variants = []Variant{{Name: name, Host: h, Board: board}, {Name: CPUEngine, Host: h, Board: board, Engine: cpu}}
	if e, ok := b.(Engined); ok {
		for _, d := range []Direction{HostToBoard, BoardToHost} {
			// Opened here for its name and memory, and again for the measurement.
			eng, mem, err := e.Engine(d == HostToBoard)
			if err != nil {
				t.Close()
				return nil, err
			}
			name := eng.Caps().Name
			if err := eng.Close(); err != nil {
				t.Close()
				return nil, err
			}
			t.Variants = append(t.Variants, Variant{Name: name, Host: mem, Board: board, Only: d, Engine: func(d Direction) (dma.Engine, error) {
				eng, _, err := e.Engine(d == HostToBoard)
				return eng, err
			}})
		}
	}
	return t, nil
}
