package vfio_test

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"math/bits"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/pci"
	_ "github.com/boardlink/boardlink/pci/vfio"
)

// The tests of this file need real functions of QEMU's, and run where these are: in a virtual machine
// (pci/vm_test.go starts it) or, with the same environment, on any machine that has them.
//
//	BOARDLINK_TEST_MODE  vfio or noiommu
//	BOARDLINK_TEST_VFIO  address of an ivshmem-doorbell function
//	BOARDLINK_TEST_EDU   address of an edu function
//	BOARDLINK_TEST_SHARED address of a function whose IOMMU group a driver of the kernel, virtio-pci, shares
//	BOARDLINK_TEST_RESET not empty where the kernel can reset the former: behind a port of its own

// function returns the address and mode, and binds the function to vfio-pci.
func function(t *testing.T, env string) (pci.Address, pci.Options) {
	t.Helper()
	s := os.Getenv(env)
	mode := pci.Mode(os.Getenv("BOARDLINK_TEST_MODE"))
	if s == "" || mode != pci.VFIO && mode != pci.VFIONoIOMMU {
		t.Skipf("%s names no function: pci/vm_test.go runs this in a virtual machine", env)
	}
	a, err := pci.ParseAddress(s)
	if err != nil {
		t.Fatal(err)
	}
	if err := (pci.Sysfs{}).Bind(a, "vfio-pci"); err != nil {
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

// waitRung waits for a waiter and acknowledges it.
func waitRung(t *testing.T, w pci.Waiter, d time.Duration) uint64 {
	t.Helper()
	p := []unix.PollFd{{Fd: int32(w.FD()), Events: unix.POLLIN}}
	end := time.Now().Add(d)
	for {
		left := time.Until(end)
		if left <= 0 {
			return 0
		}
		n, err := unix.Poll(p, int(left/time.Millisecond)+1)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if n == 0 {
			return 0
		}
		k, err := w.Ack()
		if err != nil {
			t.Fatal(err)
		}
		if k > 0 {
			return k
		}
	}
}

// pages maps RAM that can be mapped for DMA.
func pages(t *testing.T, n int) mmio.RAM {
	t.Helper()
	b, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(b) })
	r, ok := mmio.FromBytes(b).RAM()
	if !ok {
		t.Fatal("no RAM")
	}
	return r
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

// TestIvshmem: window, registers and interrupts of an ivshmem-doorbell function, whose own doorbell rings it.
func TestIvshmem(t *testing.T) {
	defer goleak.VerifyNone(t)
	f := open(t, "BOARDLINK_TEST_VFIO")
	defer f.Close()
	i := f.Info()
	t.Logf("%s: %s, BARs %v, MSI-X %+v, group %s with %v", f, i, i.BARs, i.MSIX, i.IOMMUGroup, i.GroupMembers)
	if i.Vendor != 0x1af4 || i.Device != 0x1110 {
		t.Fatalf("%s is not an ivshmem function", i)
	}
	if v, err := f.ReadConfig(pci.RegVendor, 4); err != nil || v != 0x11101af4 {
		t.Errorf("vendor and device read as %#x, %v", v, err)
	}
	if i.MSIX == nil || i.MSIX.Vectors != 4 || i.MSIX.TableBAR != 1 {
		t.Fatalf("MSI-X capability %+v, want 4 vectors with the table in BAR 1", i.MSIX)
	}
	if err := f.Gone(); err != nil {
		t.Error(err)
	}

	window := mem(t, f, 2, mmio.WriteCombining)
	regs := mem(t, f, 0, mmio.Uncached)
	t.Logf("window: %d bytes, %s; registers: %d bytes, %s", window.Size(), window.Kind(), regs.Size(), regs.Kind())
	if regs.Kind() != mmio.Uncached || window.Kind() == mmio.Cached {
		t.Error("BARs are not device memory")
	}
	for _, off := range []uint64{0, 64, window.Size() - 8} {
		want := 0x0102030405060708 ^ off
		window.Store64(off, want)
		window.Barrier(mmio.FullBarrier)
		if got := window.Load64(off); got != want {
			t.Errorf("window at %#x: %#x, want %#x", off, got, want)
		}
	}

	in := f.Interrupts()
	if in.Kind != pci.MSIX || in.Count != 4 {
		t.Fatalf("interrupts %v, want 4 of MSI-X", in)
	}
	if _, err := f.EnableInterrupts(5); !errors.Is(err, pci.ErrUnsupported) {
		t.Errorf("5 interrupts of 4: %v", err)
	}
	for round := 0; round < 2; round++ { // taken down and up again
		ws, err := f.EnableInterrupts(4)
		if err != nil {
			t.Fatal(err)
		}
		self := regs.Load32(8)
		for v := 3; v >= 0; v-- {
			regs.Store32(12, self<<16|uint32(v))
			if n := waitRung(t, ws[v], 5*time.Second); n == 0 {
				t.Errorf("vector %d did not ring", v)
			}
			for o, w := range ws {
				if n, err := w.Ack(); n != 0 || err != nil {
					t.Errorf("vector %d rang vector %d (%d times, %v)", v, o, n, err)
				}
			}
		}
		if round == 0 {
			if n := testing.AllocsPerRun(100, func() { ws[0].Ack() }); n != 0 {
				t.Errorf("an Ack makes %v allocations", n)
			}
		}
	}
	if cmd, _ := f.ReadConfig(pci.RegCommand, 2); cmd&(pci.CommandMemory|pci.CommandBusMaster) != pci.CommandMemory|pci.CommandBusMaster {
		t.Errorf("command register %#x: memory access and bus mastering should be on", cmd)
	}
	if err := f.DisableInterrupts(); err != nil {
		t.Error(err)
	}
	if err := f.SetBusMaster(false); err != nil {
		t.Error(err)
	}
	if cmd, _ := f.ReadConfig(pci.RegCommand, 2); cmd&pci.CommandBusMaster != 0 {
		t.Errorf("command register %#x: bus mastering should be off", cmd)
	}
	if _, err := f.MapBAR(3, mmio.Uncached); err == nil {
		t.Error("BAR 3 does not exist and was mapped")
	}
}

// TestSecondOpen: a function that is open is busy for others, and one line says who has it. A holder that is killed
// leaves nothing behind.
func TestSecondOpen(t *testing.T) {
	f := open(t, "BOARDLINK_TEST_VFIO")
	a, o := function(t, "BOARDLINK_TEST_VFIO")
	if g, err := pci.Open(a, o); !errors.Is(err, pci.ErrBusy) {
		t.Errorf("opened twice in one process: %v, %v", g, err)
	}
	ch, _ := elsewhere(t, "open", a)
	if got := receive(t, ch, "open"); !strings.Contains(got, fmt.Sprintf("in use by another process: pid %d ", os.Getpid())) {
		t.Errorf("opened in another process: %q", got)
	}
	f.Close()
	ch, cmd := elsewhere(t, "hold", a)
	if got := receive(t, ch, "hold"); got != "held" {
		t.Fatalf("after Close another process gets %q", got)
	}
	_, err := pci.Open(a, o)
	var e *pci.Error
	if !errors.As(err, &e) || e.Problem != pci.Busy || !e.UserError() || !strings.Contains(err.Error(), fmt.Sprintf("pid %d ", cmd.Process.Pid)) {
		t.Errorf("while another process has it: %v", err)
	}
	t.Log(err)
	cmd.Process.Kill()
	receive(t, ch, "kill")
	g, err := pci.Open(a, o)
	if err != nil {
		t.Fatalf("after the holder was killed: %v", err)
	}
	if cmd, _ := g.ReadConfig(pci.RegCommand, 2); cmd&pci.CommandBusMaster != 0 {
		t.Errorf("command register %#x: bus mastering is on", cmd)
	}
	g.Close()
}

// What another process does for a test: this binary again, with helperEnv set. Taking a function away must not be done by
// the process that has it open: the kernel waits for it to be closed, and a process that dies meanwhile never gets to
// that.
const helperEnv = "BOARDLINK_TEST_HELPER"

func TestMain(m *testing.M) {
	h := strings.Fields(os.Getenv(helperEnv))
	if len(h) != 2 {
		os.Exit(m.Run())
	}
	a, err := pci.ParseAddress(h[1])
	if err == nil {
		switch h[0] {
		case "unbind":
			err = pci.Sysfs{}.Unbind(a)
		case "remove":
			err = pci.Sysfs{}.Remove(a)
		case "open":
			_, err = pci.Open(a, pci.Options{Mode: pci.Mode(os.Getenv("BOARDLINK_TEST_MODE"))})
		case "hold":
			if _, err = pci.Open(a, pci.Options{Mode: pci.Mode(os.Getenv("BOARDLINK_TEST_MODE"))}); err == nil {
				os.Stdout.WriteString("held\n")
				select {} // until killed
			}
		}
	}
	if err != nil {
		os.Stdout.WriteString(err.Error() + "\n")
	}
	os.Exit(0)
}

// elsewhere starts a helper. Its output and its end come by the channel.
func elsewhere(t *testing.T, what string, a pci.Address) (<-chan string, *exec.Cmd) {
	t.Helper()
	return elsewhereAs(t, what, a, nil)
}

func elsewhereAs(t *testing.T, what string, a pci.Address, attr *syscall.SysProcAttr) (<-chan string, *exec.Cmd) {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe)
	cmd.SysProcAttr = attr
	cmd.Env = append(os.Environ(), helperEnv+"="+what+" "+a.String())
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	ch := make(chan string, 2)
	go func() {
		sc := bufio.NewScanner(out)
		for sc.Scan() {
			ch <- sc.Text()
		}
		cmd.Wait()
		close(ch)
	}()
	t.Cleanup(func() { cmd.Process.Kill() })
	return ch, cmd
}

func receive(t *testing.T, ch <-chan string, what string) string {
	t.Helper()
	select {
	case s := <-ch:
		return s
	case <-time.After(20 * time.Second):
		t.Fatalf("%s: the other process does not answer", what)
		return ""
	}
}

// edu's registers (QEMU, docs/specs/edu.rst).
const (
	eduID      = 0x00
	eduIRQ     = 0x24
	eduRaise   = 0x60
	eduAck     = 0x64
	eduSrc     = 0x80
	eduDst     = 0x88
	eduCount   = 0x90
	eduCmd     = 0x98
	eduBuffer  = 0x40000
	eduStart   = 1
	eduToRAM   = 2
	eduWantIRQ = 4
	eduMax     = 4088 // 4096 kills QEMU 7.2
)

// edu is a function's registers. QEMU gives them the byte order of the machine's architecture, and POWER's is big.
type edu struct {
	mmio.Mem
	swap bool
}

func eduRegs(t *testing.T, f pci.Function) edu {
	t.Helper()
	e := edu{Mem: mem(t, f, 0, mmio.Uncached)}
	e.swap = e.Mem.Load32(eduID) == 0xed000001
	if id := e.Load32(eduID); id != 0x010000ed {
		t.Fatalf("%s is not an edu function: %#x", f, id)
	}
	return e
}

func (e *edu) Load32(off uint64) uint32 {
	v := e.Mem.Load32(off)
	if e.swap {
		v = bits.ReverseBytes32(v)
	}
	return v
}

func (e *edu) Store32(off uint64, v uint32) {
	if e.swap {
		v = bits.ReverseBytes32(v)
	}
	e.Mem.Store32(off, v)
}

func (e *edu) Load64(off uint64) uint64 {
	v := e.Mem.Load64(off)
	if e.swap {
		v = bits.ReverseBytes64(v)
	}
	return v
}

func (e *edu) Store64(off uint64, v uint64) {
	if e.swap {
		v = bits.ReverseBytes64(v)
	}
	e.Mem.Store64(off, v)
}

// eduDMA runs one transfer and waits until it is over.
func eduDMA(t *testing.T, regs edu, src, dst, n, cmd uint64) {
	t.Helper()
	regs.Store64(eduSrc, src)
	regs.Store64(eduDst, dst)
	regs.Store64(eduCount, n)
	regs.Store64(eduCmd, cmd|eduStart)
	end := time.Now().Add(5 * time.Second)
	for regs.Load64(eduCmd)&eduStart != 0 {
		if time.Now().After(end) {
			t.Fatal("the transfer does not end")
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// TestINTx: a level on a line: each Ack unmasks it, and an Ack before the function lowered it brings it again.
func TestINTx(t *testing.T) {
	a, o := function(t, "BOARDLINK_TEST_EDU")
	o.Interrupts = pci.INTx
	f, err := pci.Open(a, o)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	regs := eduRegs(t, f)
	if in := f.Interrupts(); in.Kind != pci.INTx || in.Count != 1 {
		t.Fatalf("interrupts %v, want 1 of INTx", in)
	}
	ws, err := f.EnableInterrupts(1)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < 20; i++ {
		regs.Store32(eduRaise, 2)
		p := []unix.PollFd{{Fd: int32(ws[0].FD()), Events: unix.POLLIN}}
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
		if i == 10 { // too early
			if n, err := ws[0].Ack(); n != 1 || err != nil {
				t.Errorf("Ack of a line that is up: %d, %v", n, err)
			}
			if waitRung(t, ws[0], 5*time.Second) == 0 {
				t.Error("the line is up, and did not ring again")
			}
		}
		regs.Store32(eduAck, 2)
		if i == 10 {
			ws[0].Ack() // the one that came in between
			continue
		}
		if n, err := ws[0].Ack(); n != 1 || err != nil {
			t.Errorf("Ack of interrupt %d: %d, %v", i, n, err)
		}
	}
	if n, err := ws[0].Ack(); n != 0 || err != nil {
		t.Errorf("nothing rings, Ack gave %d, %v", n, err)
	}
	if cmd, _ := f.ReadConfig(pci.RegCommand, 2); cmd&pci.CommandBusMaster != 0 {
		t.Errorf("command register %#x: INTx needs no bus mastering", cmd)
	}
}

// eduMask is what its DMA engine reaches.
const eduMask = 1<<28 - 1

// TestEdu: interrupts of the best kind, and a DMA engine that reaches what was mapped and nothing else.
func TestEdu(t *testing.T) {
	a, o := function(t, "BOARDLINK_TEST_EDU")
	o.DMAMask = eduMask
	f, err := pci.Open(a, o)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	regs := eduRegs(t, f)
	in := f.Interrupts()
	if in.Kind != pci.MSI || in.Count != 1 {
		t.Fatalf("interrupts %v, want 1 of MSI", in)
	}
	if f.Info().MSI == nil || f.Info().MSI.Vectors != 1 {
		t.Errorf("MSI capability %+v", f.Info().MSI)
	}
	ws, err := f.EnableInterrupts(1)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < 3; i++ {
		regs.Store32(eduRaise, 2)
		if waitRung(t, ws[0], 5*time.Second) == 0 {
			t.Errorf("MSI %d did not come", i)
		}
		regs.Store32(eduAck, 2)
	}

	r := pages(t, 4*os.Getpagesize())
	if o.Mode == pci.VFIONoIOMMU {
		if _, err := f.MapDMA(r, pci.DMARead); !errors.Is(err, pci.ErrUnsupported) {
			t.Errorf("DMA map without an IOMMU: %v", err)
		}
		return
	}
	before, counts := f.(pci.DMACounter).DMAAvail()
	t.Logf("the IOMMU is %s", f.(pci.IOMMUTeller).IOMMU())
	if strings.HasPrefix(f.(pci.IOMMUTeller).IOMMU(), "type 1") != counts {
		t.Error("the kernel does not count maps: it is older than 5.10")
	}
	page := os.Getpagesize()
	all := r.Bytes()
	sub := func(i, n int) mmio.RAM {
		m, _ := mmio.FromBytes(all[i*page : (i+n)*page]).RAM()
		return m
	}
	src, err := f.MapDMA(sub(0, 1), pci.DMARead)
	if err != nil {
		t.Fatal(err)
	}
	dst, err := f.MapDMA(sub(1, 1), pci.DMAWrite)
	if err != nil {
		t.Fatal(err)
	}
	if src == 0 || dst == 0 || uint64(src)+uint64(page) > eduMask || uint64(dst)+uint64(page) > eduMask {
		t.Errorf("bus addresses %#x and %#x are not below the mask %#x", uint64(src), uint64(dst), eduMask)
	}
	maps := f.DMAMaps()
	if len(maps) != 2 || maps[0].Access|maps[1].Access != pci.DMARead|pci.DMAWrite || maps[0].Size != uint64(page) {
		t.Errorf("maps %v, want the two", maps)
	}
	if now, _ := f.(pci.DMACounter).DMAAvail(); counts && now != before-2 {
		t.Errorf("the kernel has %d maps, want 2", before-now)
	}
	for i := range all {
		all[i] = byte(i * 7)
	}
	want := bytes.Clone(all[:eduMax])
	zero := make([]byte, eduMax)
	copy(all[page:2*page], make([]byte, page))
	eduDMA(t, regs, uint64(src), eduBuffer, eduMax, 0)
	eduDMA(t, regs, eduBuffer, uint64(dst), eduMax, eduToRAM)
	if !bytes.Equal(all[page:page+eduMax], want) {
		t.Error("the copy by the board differs")
	}
	// The source is not the board's to write, nor is anything beside the maps.
	for i := range all[page : 2*page] {
		all[page+i] = 0
	}
	copy(all[:eduMax], zero)
	eduDMA(t, regs, eduBuffer, uint64(src), eduMax, eduToRAM)
	if !bytes.Equal(all[:eduMax], zero) {
		t.Error("the board wrote memory that was mapped for reading")
	}
	if err := f.UnmapDMA(dst); err != nil {
		t.Fatal(err)
	}
	eduDMA(t, regs, eduBuffer, uint64(dst), eduMax, eduToRAM)
	if !bytes.Equal(all[page:page+eduMax], zero) {
		t.Error("the board wrote memory that was unmapped")
	}
	if err := f.UnmapDMA(dst); err == nil {
		t.Error("unmapped twice")
	}
	if now, _ := f.(pci.DMACounter).DMAAvail(); counts && now != before-1 {
		t.Errorf("the kernel has %d maps, want 1", before-now)
	}
	if l := f.DMAMaps(); len(l) != 1 || l[0].Addr != src {
		t.Errorf("maps %v, want the one at %#x", l, uint64(src))
	}
	t.Logf("bus addresses %#x and %#x; %d maps are left to the kernel", uint64(src), uint64(dst), before)
	// Bus mastering off: no DMA at all.
	again, err := f.MapDMA(sub(1, 1), pci.DMARead|pci.DMAWrite)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.SetBusMaster(false); err != nil {
		t.Fatal(err)
	}
	eduDMA(t, regs, eduBuffer, uint64(again), eduMax, eduToRAM)
	if !bytes.Equal(all[page:page+eduMax], zero) {
		t.Error("the board wrote with bus mastering off")
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	if _, err := f.MapDMA(r, pci.DMARead); err != pci.ErrClosed {
		t.Errorf("DMA map after Close: %v", err)
	}
}

// TestGroupShared: a group of which a driver of the kernel has another function cannot be opened, and one line names
// that function.
func TestGroupShared(t *testing.T) {
	a, o := function(t, "BOARDLINK_TEST_SHARED")
	_, err := pci.Open(a, o)
	var e *pci.Error
	if !errors.As(err, &e) || e.Problem != pci.GroupShared || !e.UserError() || !strings.Contains(err.Error(), "driver virtio-pci") || strings.Contains(err.Error(), "\n") {
		t.Errorf("%v", err)
	}
	t.Log(err)
}

// TestTwoFunctions: two functions of one process, in one IOMMU group, which has to be allowed, or in two. Closing one
// leaves the other.
func TestTwoFunctions(t *testing.T) {
	f := open(t, "BOARDLINK_TEST_VFIO")
	a, o := function(t, "BOARDLINK_TEST_EDU")
	i, err := o.Sysfs.Read(a)
	if err != nil {
		t.Fatal(err)
	}
	same := f.Info().IOMMUGroup == i.IOMMUGroup
	t.Logf("groups %s and %s", f.Info().IOMMUGroup, i.IOMMUGroup)
	e, err := pci.Open(a, o)
	if same {
		// Each of them would reach the other's memory.
		var pe *pci.Error
		if !errors.As(err, &pe) || pe.Problem != pci.GroupShared || !pe.UserError() || !strings.Contains(err.Error(), f.Info().Address.String()) ||
			!strings.Contains(err.Error(), "--allow-shared-group") {
			t.Fatalf("a second function of a group: %v", err)
		}
		o.AllowSharedGroup = true
		e, err = pci.Open(a, o)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	if f.Mode() == pci.VFIO {
		if _, err := f.MapDMA(pages(t, os.Getpagesize()), pci.DMARead); err != nil {
			t.Fatal(err)
		}
		if got := len(e.DMAMaps()) == 1; got != same {
			t.Errorf("the other function has the map: %v, in the same group: %v", got, same)
		}
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	if l := e.DMAMaps(); len(l) != 0 {
		t.Errorf("maps %v are left", l)
	}
	eduRegs(t, e)
	if e.Mode() == pci.VFIO {
		if _, err := e.MapDMA(pages(t, os.Getpagesize()), pci.DMARead); err != nil {
			t.Error(err)
		}
	}
}

// TestPermission: an unprivileged user gets one line that says what to do.
func TestPermission(t *testing.T) {
	a, _ := function(t, "BOARDLINK_TEST_VFIO")
	ch, _ := elsewhereAs(t, "open", a, &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}})
	got := receive(t, ch, "open")
	if !strings.Contains(got, "permission denied") && !strings.Contains(got, "CAP_SYS_RAWIO") || !strings.Contains(got, "run it as root") {
		t.Errorf("an unprivileged user gets %q", got)
	}
	t.Log(got)
}

// TestDMAErrors: what cannot be mapped is refused, and nothing stays behind.
func TestDMAErrors(t *testing.T) {
	a, o := function(t, "BOARDLINK_TEST_VFIO")
	if o.Mode != pci.VFIO {
		t.Skip("there is no IOMMU in mode " + string(o.Mode))
	}
	o.DMAMask = 1<<20 - 1
	f, err := pci.Open(a, o)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	page := os.Getpagesize()
	r := pages(t, 64*page)
	b := r.Bytes()
	part := func(from, to int) mmio.RAM { m, _ := mmio.FromBytes(b[from:to]).RAM(); return m }
	for name, m := range map[string]mmio.RAM{
		"unaligned start": part(64, page), "unaligned end": part(0, page+64), "empty": {},
	} {
		if at, err := f.MapDMA(m, pci.DMARead); err == nil {
			t.Errorf("%s: mapped at %#x", name, uint64(at))
		}
	}
	if _, err := f.MapDMA(part(0, page), 0); err == nil {
		t.Error("mapped without access")
	}
	if _, err := f.MapDMA(pages(t, 2<<20), pci.DMARead); !errors.Is(err, pci.ErrUnsupported) {
		t.Errorf("2 MiB below a mask of 1 MiB: %v", err)
	}
	if err := f.UnmapDMA(dma.Addr(page)); err == nil {
		t.Error("unmapped what was never mapped")
	}
	if l := f.DMAMaps(); len(l) != 0 {
		t.Errorf("maps %v are left", l)
	}
	// As many as fit are mapped, and all are taken back by Close.
	for i := 0; i < 10; i++ {
		if _, err := f.MapDMA(part(i*page, (i+1)*page), pci.DMAWrite); err != nil {
			t.Fatal(err)
		}
	}
	if l := f.DMAMaps(); len(l) != 10 {
		t.Errorf("%d maps, want 10", len(l))
	}
}

// TestMemlock: too low a limit of locked memory is one line that says so. The limit holds for those without
// CAP_IPC_LOCK only.
func TestMemlock(t *testing.T) {
	a, o := function(t, "BOARDLINK_TEST_VFIO")
	if o.Mode != pci.VFIO {
		t.Skip("there is no IOMMU in mode " + string(o.Mode))
	}
	f, err := pci.Open(a, o)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r := pages(t, 1<<20)
	var got error
	done := make(chan struct{})
	go func() { // the thread ends with the goroutine: its capabilities are not for others
		defer close(done)
		runtime.LockOSThread()
		dropIPCLock(t)
		var old unix.Rlimit
		unix.Getrlimit(unix.RLIMIT_MEMLOCK, &old)
		unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: 64 << 10, Max: old.Max})
		_, got = f.MapDMA(r, pci.DMARead)
		unix.Setrlimit(unix.RLIMIT_MEMLOCK, &old)
	}()
	<-done
	var e *pci.Error
	if !errors.As(got, &e) || e.Problem != pci.Memlock || !e.UserError() || !strings.Contains(got.Error(), "ulimit -l") || !strings.Contains(got.Error(), "64 KiB") {
		t.Errorf("mapping 1 MiB with a limit of 64 KiB: %v", got)
	}
	t.Log(got)
}

// dropIPCLock takes CAP_IPC_LOCK (14) from the effective set of this thread.
func dropIPCLock(t *testing.T) {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		t.Error(err)
		return
	}
	data[0].Effective &^= 1 << 14
	if err := unix.Capset(&hdr, &data[0]); err != nil {
		t.Error(err)
	}
}

// TestReset: a function that can be reset goes on afterwards, with its BARs, and bus mastering as it was; one that
// cannot says what to do instead.
func TestReset(t *testing.T) {
	for _, env := range []string{"BOARDLINK_TEST_VFIO", "BOARDLINK_TEST_EDU"} {
		t.Run(env, func(t *testing.T) {
			f := open(t, env)
			regs := edu{Mem: mem(t, f, 0, mmio.Uncached)}
			reg, want := uint64(eduID), uint32(0x010000ed)
			if env == "BOARDLINK_TEST_EDU" {
				regs = eduRegs(t, f)
			} else {
				reg, want = 0, 0x5a // the interrupt mask: kept until the reset
				regs.Store32(reg, want)
			}
			if got := regs.Load32(reg); got != want {
				t.Fatalf("register %#x reads as %#x, want %#x", reg, got, want)
			}
			err := f.Reset()
			var e *pci.Error
			switch {
			case errors.As(err, &e) && e.Problem == pci.NoReset:
				if !strings.Contains(err.Error(), "rescan") || env == "BOARDLINK_TEST_VFIO" && os.Getenv("BOARDLINK_TEST_RESET") != "" {
					t.Error(err)
				}
				return
			case err != nil:
				t.Fatal(err)
			}
			if got := regs.Load32(reg); env == "BOARDLINK_TEST_VFIO" && got != 0 || got == 0xffffffff {
				t.Errorf("after the reset register %#x reads as %#x", reg, got)
			}
			if err := f.Gone(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestGuard: the window goes away under a loop that reads it, as memory access is turned off: the loop ends with an
// error that says so, and the program lives.
func TestGuard(t *testing.T) {
	f := open(t, "BOARDLINK_TEST_VFIO")
	window := mem(t, f, 2, mmio.Uncached)
	started := make(chan struct{})
	result := make(chan error, 1)
	go func() {
		result <- pci.Guard(func() {
			for i := 0; ; i++ {
				window.Load32(0)
				if i == 100 {
					close(started)
				}
			}
		})
	}()
	<-started
	cmd, err := f.ReadConfig(pci.RegCommand, 2)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.WriteConfig(pci.RegCommand, 2, cmd&^pci.CommandMemory); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-result:
		var fe *pci.FaultError
		if !errors.As(err, &fe) || !errors.Is(err, pci.ErrGone) || !strings.Contains(err.Error(), "BAR 2") {
			t.Errorf("the loop ended with %v", err)
		}
		t.Log(err)
	case <-time.After(10 * time.Second):
		t.Fatal("the loop does not end")
	}
	if err := f.Gone(); !errors.Is(err, pci.ErrGone) {
		t.Errorf("with memory access off: %v", err)
	}
	select {
	case <-f.Events():
	case <-time.After(5 * time.Second):
		t.Error("nobody told that the function is lost")
	}
	if err := f.WriteConfig(pci.RegCommand, 2, cmd); err != nil {
		t.Fatal(err)
	}
	if err := f.Gone(); err != nil {
		t.Errorf("with memory access on again: %v", err)
	}
	if err := pci.Guard(func() { window.Load32(0) }); err != nil {
		t.Errorf("with memory access on again: %v", err)
	}
}

// TestMasterCleared: somebody else turns bus mastering off while messages are in use. It is turned on again and
// counted, and the next message arrives.
func TestMasterCleared(t *testing.T) {
	f := open(t, "BOARDLINK_TEST_VFIO")
	regs := mem(t, f, 0, mmio.Uncached)
	ws, err := f.EnableInterrupts(1)
	if err != nil {
		t.Fatal(err)
	}
	self := regs.Load32(8)
	cfg, err := os.OpenFile(pci.Sysfs{}.Dir(f.Info().Address)+"/config", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer cfg.Close()
	for round := uint64(1); round <= 2; round++ {
		var b [2]byte
		if _, err := cfg.ReadAt(b[:], pci.RegCommand); err != nil {
			t.Fatal(err)
		}
		b[0] &^= pci.CommandBusMaster
		if _, err := cfg.WriteAt(b[:], pci.RegCommand); err != nil {
			t.Fatal(err)
		}
		end := time.Now().Add(10 * time.Second)
		for f.(pci.CounterTeller).Counters().BusMasterRestored != round {
			if time.Now().After(end) {
				t.Fatalf("nobody notices: %+v", f.(pci.CounterTeller).Counters())
			}
			time.Sleep(10 * time.Millisecond)
		}
		regs.Store32(12, self<<16)
		if waitRung(t, ws[0], 5*time.Second) == 0 {
			t.Error("no message with bus mastering on again")
		}
		if err := f.Gone(); err != nil {
			t.Error(err)
		}
	}
}

// TestRequest: unbinding asks for the function; closing it lets the kernel go on.
func TestRequest(t *testing.T) {
	f := open(t, "BOARDLINK_TEST_VFIO")
	a := f.Info().Address
	unbound, _ := elsewhere(t, "unbind", a)
	select {
	case <-f.Events():
	case s := <-unbound:
		t.Fatalf("unbound under our hands: %q", s)
	case <-time.After(10 * time.Second):
		t.Fatal("no request came")
	}
	if err := f.Gone(); !errors.Is(err, pci.ErrGone) {
		t.Errorf("after the request: %v", err)
	}
	select {
	case s := <-unbound:
		t.Fatalf("unbound before Close: %q", s)
	default:
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	if s := receive(t, unbound, "unbind"); s != "" {
		t.Error(s)
	}
	// Unbound: one line with the command that binds it.
	_, err := pci.Open(a, pci.Options{})
	var e *pci.Error
	if !errors.As(err, &e) || e.Problem != pci.Unbound || !strings.Contains(err.Error(), "drivers_probe") {
		t.Errorf("opening an unbound function: %v", err)
	}
	t.Log(err)
	_, o := function(t, "BOARDLINK_TEST_VFIO")
	g, err := pci.Open(a, o)
	if err != nil {
		t.Fatalf("bound again: %v", err)
	}
	g.Close()
}

// TestRemoved: a function that was removed is gone, absent, and comes back with a rescan.
func TestRemoved(t *testing.T) {
	f := open(t, "BOARDLINK_TEST_VFIO")
	a, s := f.Info().Address, pci.Sysfs{}
	removed, _ := elsewhere(t, "remove", a)
	select {
	case <-f.Events():
	case <-time.After(10 * time.Second):
		t.Fatal("nobody told")
	}
	if err := f.Gone(); !errors.Is(err, pci.ErrGone) {
		t.Errorf("while it is being removed: %v", err)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	if s := receive(t, removed, "remove"); s != "" {
		t.Fatal(s)
	}
	if _, err := pci.Open(a, pci.Options{}); !errors.Is(err, pci.ErrAbsent) {
		t.Errorf("opening a removed function: %v", err)
	}
	if err := s.Check(a); !errors.Is(err, pci.ErrGone) {
		t.Errorf("a removed function: %v", err)
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
