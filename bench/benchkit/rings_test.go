//go:build linux

package benchkit

import (
	"strings"
	"testing"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
	"golang.org/x/sys/unix"
)

func TestLayout(t *testing.T) {
	l := Layout{Size: 256}
	if err := l.Check(1); err != nil || l != (Layout{Ring: "split", Placement: "local", Memory: "cached", Size: 256}) {
		t.Errorf("%+v, %v", l, err)
	}
	for says, l := range map[string]Layout{
		`ring "x"`:                   {Ring: "x", Size: 2},
		`placement "x"`:              {Placement: "x", Size: 2},
		`memory "x"`:                 {Memory: "x", Size: 2},
		"queue of 3 descriptors":     {Size: 3},
		"queue of 1 descriptors":     {Ring: "packed", Size: 1},
		"queue of 32769 descriptors": {Ring: "packed", Size: 32769},
	} {
		if err := l.Check(2); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%+v: %v, want %q", l, err, says)
		}
	}
}

// Each side sees as across what lies with the other one, and both see the same bytes.
func TestMemories(t *testing.T) {
	const size = 1 << 16
	files, fds, err := Files("test", 2*size, 1, unix.EFD_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	defer CloseFiles(files)
	if len(files) != 2 || len(fds) != 2 {
		t.Fatalf("files %v, descriptors %v", files, fds)
	}
	for _, placement := range []string{"local", "window", "push"} {
		l := Layout{Ring: "packed", Placement: placement, Memory: "uncached", Size: 100}
		drv, err := MapMemories(l, fds[0], size, false)
		if err != nil {
			t.Fatal(err)
		}
		dev, err := MapMemories(l, fds[0], size, true)
		if err != nil {
			t.Fatal(err)
		}
		across := placement != "local"
		if drv.Board.Across || drv.Host.Across != across || dev.Board.Across != across || dev.Host.Across {
			t.Errorf("%s: across: board %v, host %v; of the device side %v, %v", placement, drv.Board.Across, drv.Host.Across, dev.Board.Across, dev.Host.Across)
		}
		if k := dev.Board.Mem.Kind(); across != (k == mmio.Uncached) {
			t.Errorf("%s: the device side sees %v", placement, k)
		}
		if far := dev.Queue("q", 0, 4096, 8192); far.Desc.Region.Name != map[bool]string{true: "host", false: "board"}[placement == "push"] ||
			far.Device.Region.Name != "board" || far.Desc.Len != 1600 || far.Table == nil || drv.Queue("q", 0, 4096, 8192).Table != nil {
			t.Errorf("%s: %+v", placement, far)
		}
		host, board := drv.Host.Mem, drv.Board.Mem
		host.Store32(100, 7)
		board.Store32(100, 8)
		if h, b := dev.Host.Mem.Load32(100), dev.Board.Mem.Load32(100); h != 7 || b != 8 {
			t.Errorf("%s: %d and %d", placement, h, b)
		}
		for _, m := range []*Memories{drv, dev} {
			if err := m.Close(); err != nil {
				t.Error(err)
			}
		}
	}
	if _, err := MapMemories(Layout{}, -1, size, false); err == nil {
		t.Error("no file was mapped")
	}
}

func TestBusOf(t *testing.T) {
	if b := BusOf(4, &dma.Account{Reads: 8, ReadBytes: 64}, &dma.Account{Reads: 4, Writes: 2, WriteBytes: 6}); b != (Bus{3, 0.5, 16, 1.5}) {
		t.Errorf("%+v", b)
	}
}

func TestWatch(t *testing.T) {
	var w Watch
	if w.Late() == nil {
		t.Error("not late before Start")
	}
	if w.Start(); w.Late() != nil {
		t.Error("late at once")
	}
	if w.Gone(); w.Late() == nil {
		t.Error("not late where the other side has ended")
	}
}
