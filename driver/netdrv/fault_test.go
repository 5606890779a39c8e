package netdrv

import (
	"errors"
	"os"
	"testing"
	"unsafe"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/driver"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/pci"
	"github.com/boardlink/boardlink/trial/netns"
	"github.com/boardlink/boardlink/trial/netns/netnstest"
	"github.com/boardlink/boardlink/tunbridge"
	"github.com/boardlink/boardlink/virtio"
	"golang.org/x/sys/unix"
)

// plain is a device with one queue pair that agrees to everything.
type plain struct{ driver.Transport }

func (plain) Features() (virtio.Features, error) {
	return virtio.FeaturesOf(virtio.Version1, virtio.NetMrgRxbuf), nil
}
func (plain) SetFeatures(virtio.Features) error { return nil }
func (plain) Config(off, n uint32) ([]byte, error) {
	b := virtio.NetConfig{LinkUp: true, MaxQueuePairs: 1, MTU: 1500}.Encode()
	return b[off : off+n], nil
}
func (plain) SetStatus(s uint32) (uint32, error)                           { return s, nil }
func (plain) QueueMax(int) (uint16, error)                                 { return 64, nil }
func (plain) SetQueue(int, uint16, dma.Addr, dma.Addr, dma.Addr) (_ error) { return nil }
func (plain) Kick(int) doorbell.Ringer                                     { return board.Silent }
func (plain) Call(int) doorbell.Waiter                                     { return doorbell.None }

// TestUpFaults: memory that vanishes while a device comes up costs no descriptor, and the device comes up where it is back.
func TestUpFaults(t *testing.T) {
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
	const size = 1 << 20
	b, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(b)
	defer pci.GuardShared(uintptr(unsafe.Pointer(&b[0])), size, "test")()
	defer n.Close() // while the memory is there
	up := func() (err error) {
		m := driver.Share(&dma.Region{Name: "test", Addr: 1 << 20, Mem: mmio.FromBytes(b), Access: dma.DeviceRead | dma.DeviceWrite}, 0, 0, 1)
		if fault := pci.Guard(func() { err = n.Up(plain{}, driver.Layout{Near: m, Far: m, Devices: 1}, func(error) {}) }); fault != nil {
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
		if err := up(); !errors.Is(err, pci.ErrGone) {
			t.Fatalf("up without memory: %v", err)
		}
		n.Down()
	}
	if after := open(); after != before {
		t.Errorf("%d descriptors are open, %d were before", after, before)
	}
	if err := unix.Mprotect(b, unix.PROT_READ|unix.PROT_WRITE); err != nil {
		t.Fatal(err)
	}
	if err := up(); err != nil {
		t.Errorf("up with memory: %v", err)
	}
	if s := n.Status(); !s.Carrier || s.Counters["ups"] != 1 {
		t.Errorf("%+v", s)
	}
}
