package netdev

import (
	"errors"
	"os"
	"testing"
	"time"
	"unsafe"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/pci"
	"github.com/boardlink/boardlink/trial/netns"
	"github.com/boardlink/boardlink/trial/netns/netnstest"
	"github.com/boardlink/boardlink/tunbridge"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/vring"
	"golang.org/x/sys/unix"
)

// TestStartFaults: memory that vanishes while a device starts costs no descriptor, and the device starts again where it is back.
func TestStartFaults(t *testing.T) {
	netnstest.Need(t)
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	var n *Net
	if err := ns.Do(func() (err error) {
		n, err = New(Config{Name: "net0", Interface: tunbridge.Config{Name: "bl0"}})
		return err
	}); err != nil {
		t.Fatal(err)
	}
	const size, base = 1 << 16, 0x10000
	b, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(b)
	defer pci.GuardShared(uintptr(unsafe.Pointer(&b[0])), size, "test")()
	defer n.Close() // while the memory is there
	r := dma.Region{Name: "test", Addr: base, Mem: mmio.FromBytes(b), Access: dma.DeviceRead | dma.DeviceWrite}
	tab, err := dma.NewTable(r)
	if err != nil {
		t.Fatal(err)
	}
	var table dma.TableRef
	table.Store(tab)
	start := func() (err error) {
		t.Helper()
		if err := n.SetFeatures(virtio.FeaturesOf(virtio.Version1), device.Options{}); err != nil {
			t.Fatal(err)
		}
		if fault := pci.Guard(func() {
			for i := 0; i < 2 && err == nil; i++ {
				at := dma.Addr(base + 0x4000*i)
				areas, terr := device.Translate(table.Load(), n.Queue(i), 16, false, at, at+0x1000, at+0x2000)
				if terr != nil {
					t.Fatal(terr)
				}
				err = n.StartQueue(i, device.Resources{Size: 16, Areas: areas, Table: &table, Kick: doorbell.None, Call: board.Silent}, vring.State{})
			}
			if err == nil {
				err = n.SetRunning(true, time.Time{})
			}
		}); fault != nil {
			err = fault
		}
		return err
	}
	open := func() int {
		d, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(d)
	}
	before := open()
	if err := unix.Mprotect(b, unix.PROT_NONE); err != nil {
		t.Fatal(err)
	}
	for i := 0; i < 10; i++ {
		if err := start(); !errors.Is(err, pci.ErrGone) {
			t.Fatalf("start without memory: %v", err)
		}
		if err := n.Reset(time.Time{}); err != nil {
			t.Fatal(err)
		}
	}
	if after := open(); after > before { // fewer: what tests before left to the garbage collector
		t.Errorf("%d descriptors are open, %d were before", after, before)
	}
	if err := unix.Mprotect(b, unix.PROT_READ|unix.PROT_WRITE); err != nil {
		t.Fatal(err)
	}
	if err := start(); err != nil {
		t.Errorf("start with memory: %v", err)
	}
	if s := n.Status(); !s.Carrier || s.Counters["starts"] != 1 {
		t.Errorf("%+v", s)
	}
}
