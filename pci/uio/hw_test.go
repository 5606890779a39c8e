package uio_test

import (
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/pci"
	"github.com/boardlink/boardlink/pci/uio"
)

// The tests of this file need real functions of QEMU's; pci/vm_test.go runs them in a virtual machine.
//
//	BOARDLINK_TEST_MODE  uio or sysfs
//	BOARDLINK_TEST_VFIO  address of an ivshmem-doorbell function
//	BOARDLINK_TEST_EDU   address of an edu function

func function(t *testing.T, env string) (pci.Address, pci.Options) {
	t.Helper()
	s := os.Getenv(env)
	mode := pci.Mode(os.Getenv("BOARDLINK_TEST_MODE"))
	if s == "" || mode != pci.UIO && mode != pci.SysfsOnly {
		t.Skipf("%s names no function: pci/vm_test.go runs this in a virtual machine", env)
	}
	a, err := pci.ParseAddress(s)
	if err != nil {
		t.Fatal(err)
	}
	if mode == pci.UIO {
		err = pci.Sysfs{}.Bind(a, uio.Driver)
	} else {
		err = pci.Sysfs{}.Unbind(a)
	}
	if err != nil {
		t.Fatal(err)
	}
	return a, pci.Options{Mode: mode, Logf: t.Logf}
}

func open(t *testing.T, env string) pci.Function {
	t.Helper()
	a, o := function(t, env)
	f, err := pci.Open(a, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
		if err := f.Close(); err != nil {
			t.Errorf("second close: %v", err)
		}
	})
	return f
}

func mem(t *testing.T, f pci.Function, bar int, want mmio.Kind) mmio.Mem {
	t.Helper()
	m, err := f.MapBAR(bar, want)
	if err != nil {
		t.Fatal(err)
	}
	all, err := m.All()
	if err != nil {
		t.Fatal(err)
	}
	if again, err := f.MapBAR(bar, mmio.Uncached); err != nil || again != m {
		t.Errorf("mapping BAR %d again: %p, %v; want the same %p", bar, again, err, m)
	}
	return all
}

func TestIvshmem(t *testing.T) {
	defer goleak.VerifyNone(t)
	f := open(t, "BOARDLINK_TEST_VFIO")
	defer f.Close()
	a := f.Info().Address
	for _, want := range []mmio.Kind{mmio.WriteCombining} {
		window := mem(t, f, 2, want)
		if window.Kind() != want {
			t.Errorf("window is %s, want %s", window.Kind(), want)
		}
		for _, off := range []uint64{0, 64, window.Size() - 8} {
			v := 0x0807060504030201 ^ off
			window.Store64(off, v)
			window.Barrier(mmio.FullBarrier)
			if got := window.Load64(off); got != v {
				t.Errorf("window at %#x: %#x, want %#x", off, got, v)
			}
		}
	}
	regs := mem(t, f, 0, mmio.WriteCombining) // it is not prefetchable
	if regs.Kind() != mmio.Uncached {
		t.Errorf("registers are %s", regs.Kind())
	}
	regs.Store32(0, 0x5a)
	if got := regs.Load32(0); got != 0x5a {
		t.Errorf("the interrupt mask register reads as %#x", got)
	}
	if v, err := f.ReadConfig(pci.RegVendor, 4); err != nil || v != 0x11101af4 {
		t.Errorf("vendor and device read as %#x, %v", v, err)
	}
	if v, err := f.ReadConfig(pci.RegDevice, 2); err != nil || v != 0x1110 {
		t.Errorf("device reads as %#x, %v", v, err)
	}
	for _, c := range [][2]int{{1, 2}, {2, 4}, {0, 3}, {-4, 4}, {4096, 4}, {0, 8}} {
		if v, err := f.ReadConfig(c[0], c[1]); err == nil {
			t.Errorf("%d bytes at %#x of configuration space: %#x", c[1], c[0], v)
		}
	}
	// It has no INTx, and nothing else reaches user space here.
	if in := f.Interrupts(); in.Kind != pci.NoInterrupts || in.Count != 0 {
		t.Errorf("interrupts %v", in)
	}
	if _, err := f.EnableInterrupts(1); !errors.Is(err, pci.ErrUnsupported) || !strings.Contains(err.Error(), "poll") {
		t.Errorf("interrupts: %v", err)
	}
	if _, err := f.MapDMA(mmio.RAM{}, pci.DMARead); !errors.Is(err, pci.ErrUnsupported) {
		t.Errorf("DMA map: %v", err)
	}
	if err := f.SetBusMaster(true); err != nil {
		t.Error(err)
	}
	if cmd, _ := f.ReadConfig(pci.RegCommand, 2); cmd&pci.CommandBusMaster == 0 {
		t.Error("bus mastering is off")
	}
	if err := f.Gone(); err != nil {
		t.Error(err)
	}
	_, o := function(t, "BOARDLINK_TEST_VFIO")
	if _, err := pci.Open(a, o); !errors.Is(err, pci.ErrBusy) {
		t.Errorf("opened twice: %v", err)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	i, err := pci.Sysfs{}.Read(a)
	if err != nil {
		t.Fatal(err)
	}
	if i.Config[pci.RegCommand]&pci.CommandBusMaster != 0 {
		t.Error("bus mastering is on after Close")
	}
	if _, err := f.MapBAR(2, mmio.Uncached); err != pci.ErrClosed {
		t.Errorf("mapping after Close: %v", err)
	}
	g, err := pci.Open(a, o)
	if err != nil {
		t.Fatalf("opened again: %v", err)
	}
	g.Close()
}

// TestINTx: edu's line, raised and acknowledged many times: each comes once, and the mask is lifted each time.
func TestINTx(t *testing.T) {
	f := open(t, "BOARDLINK_TEST_EDU")
	regs := mem(t, f, 0, mmio.Uncached)
	if f.Mode() == pci.SysfsOnly {
		if _, err := f.EnableInterrupts(1); !errors.Is(err, pci.ErrUnsupported) {
			t.Errorf("interrupts: %v", err)
		}
		return
	}
	if in := f.Interrupts(); in.Kind != pci.INTx || in.Count != 1 {
		t.Fatalf("interrupts %v, want 1 of INTx", in)
	}
	for round := 0; round < 2; round++ {
		ws, err := f.EnableInterrupts(1)
		if err != nil {
			t.Fatal(err)
		}
		w := ws[0]
		if n, err := w.Ack(); n != 0 || err != nil {
			t.Errorf("nothing rang, Ack gave %d, %v", n, err)
		}
		for i := 0; i < 20; i++ {
			regs.Store32(0x60, 2)
			p := []unix.PollFd{{Fd: int32(w.FD()), Events: unix.POLLIN}}
			for {
				n, err := unix.Poll(p, 5000)
				if err == unix.EINTR {
					continue
				}
				if n != 1 || err != nil {
					t.Fatalf("interrupt %d did not come: %v", i, err)
				}
				break
			}
			regs.Store32(0x64, 2)
			if n, err := w.Ack(); n != 1 || err != nil {
				t.Errorf("Ack of interrupt %d: %d, %v", i, n, err)
			}
		}
		if n := testing.AllocsPerRun(100, func() { w.Ack() }); n != 0 {
			t.Errorf("an Ack makes %v allocations", n)
		}
		if err := f.DisableInterrupts(); err != nil {
			t.Fatal(err)
		}
		// Down: the line does nothing.
		regs.Store32(0x60, 2)
		p := []unix.PollFd{{Fd: int32(w.FD()), Events: unix.POLLIN}}
		if n, _ := unix.Poll(p, 200); n != 0 {
			t.Error("an interrupt came through the mask")
		}
		regs.Store32(0x64, 2)
	}
}

// TestWiped: memory access turned off behind our back is noticed, and reads give all-ones, no fault.
func TestWiped(t *testing.T) {
	f := open(t, "BOARDLINK_TEST_EDU")
	regs := mem(t, f, 0, mmio.Uncached)
	cmd, err := f.ReadConfig(pci.RegCommand, 2)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.WriteConfig(pci.RegCommand, 2, cmd&^pci.CommandMemory); err != nil {
		t.Fatal(err)
	}
	if err := pci.Guard(func() {
		if v := regs.Load32(0); v != 0xffffffff && v != 0 {
			t.Errorf("without memory access a register reads as %#x", v)
		}
	}); err != nil {
		t.Error(err)
	}
	select {
	case <-f.Events():
	case <-time.After(5 * time.Second):
		t.Error("nobody told")
	}
	if err := f.Gone(); !errors.Is(err, pci.ErrGone) {
		t.Errorf("without memory access: %v", err)
	}
	if err := f.WriteConfig(pci.RegCommand, 2, cmd); err != nil {
		t.Fatal(err)
	}
	if err := f.Gone(); err != nil {
		t.Error(err)
	}
}

// TestRemoved: a function that is removed while open is gone, and comes back by a rescan.
func TestRemoved(t *testing.T) {
	f := open(t, "BOARDLINK_TEST_VFIO")
	a, s := f.Info().Address, pci.Sysfs{}
	mem(t, f, 2, mmio.Uncached)
	if err := s.Remove(a); err != nil {
		t.Fatal(err)
	}
	select {
	case <-f.Events():
	case <-time.After(5 * time.Second):
		t.Error("nobody told")
	}
	if err := f.Gone(); !errors.Is(err, pci.ErrGone) {
		t.Errorf("removed: %v", err)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	if _, err := pci.Open(a, pci.Options{Mode: f.Mode()}); !errors.Is(err, pci.ErrAbsent) {
		t.Errorf("opening a removed function: %v", err)
	}
	if err := s.Rescan(); err != nil {
		t.Fatal(err)
	}
	_, o := function(t, "BOARDLINK_TEST_VFIO")
	g, err := pci.Open(a, o)
	if err != nil {
		t.Fatalf("after the rescan: %v", err)
	}
	g.Close()
}

// TestWrongDriver: one line with the command that mends it.
func TestWrongDriver(t *testing.T) {
	a, o := function(t, "BOARDLINK_TEST_VFIO")
	var e *pci.Error
	if o.Mode == pci.UIO {
		if err := (pci.Sysfs{}).Unbind(a); err != nil {
			t.Fatal(err)
		}
		_, err := pci.Open(a, o)
		if !errors.As(err, &e) || e.Problem != pci.Unbound || !strings.Contains(err.Error(), "echo uio_pci_generic") {
			t.Errorf("unbound: %v", err)
		}
		t.Log(err)
	}
	_, err := pci.Open(a, pci.Options{Mode: pci.VFIO})
	if err == nil {
		t.Error("opened in mode vfio")
	}
	t.Log(err)
}
