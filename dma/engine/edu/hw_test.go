package edu_test

import (
	"bytes"
	"crypto/rand"
	"errors"
	"math/big"
	"os"
	"testing"
	"time"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/dma/engine"
	"github.com/boardlink/boardlink/dma/engine/edu"
	"github.com/boardlink/boardlink/dma/engine/pool"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/pci"
	_ "github.com/boardlink/boardlink/pci/vfio"
)

// The tests of this file need an edu function behind an IOMMU, and run where it is: in a virtual machine (vm_test.go
// starts it) or, with the same environment, on any machine that has one.
//
//	BOARDLINK_TEST_EDU  address of the function, which is bound to vfio-pci

const (
	rw         = dma.DeviceRead | dma.DeviceWrite
	bufferLink = dma.Addr(0x1_0004_0000)
	poolLink   = dma.Addr(0x9_0000_0000)
	poolSize   = 64 << 10
)

// countedWaiter counts what came.
type countedWaiter struct {
	pci.Waiter
	n uint64
}

func (w *countedWaiter) Ack() (uint64, error) {
	n, err := w.Waiter.Ack()
	w.n += n
	return n, err
}

type device struct {
	f      pci.Function
	p      *pool.Pool
	irq    *countedWaiter
	buffer *dma.Region
	config edu.Config
}

func open(t *testing.T) *device {
	t.Helper()
	s := os.Getenv("BOARDLINK_TEST_EDU")
	if s == "" {
		t.Skip("BOARDLINK_TEST_EDU names no function: vm_test.go runs this in a virtual machine")
	}
	a, err := pci.ParseAddress(s)
	if err != nil {
		t.Fatal(err)
	}
	if err := (pci.Sysfs{}).Bind(a, "vfio-pci"); err != nil {
		t.Fatal(err)
	}
	f, err := pci.Open(a, pci.Options{Mode: pci.VFIO, DMAMask: edu.Mask, Logf: t.Logf})
	if err != nil {
		t.Fatal(err)
	}
	d := &device{f: f, buffer: &dma.Region{Name: "edu buffer", Addr: bufferLink, Access: rw}}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	avail := func() uint32 {
		if c, ok := f.(pci.DMACounter); ok {
			n, _ := c.DMAAvail()
			return n
		}
		return 0
	}
	before := avail()
	d.p, err = pool.New(pool.Config{Name: "pool", Size: poolSize, Link: poolLink, Mask: edu.Mask,
		Map:   func(m mmio.RAM) (dma.Addr, error) { return f.MapDMA(m, pci.DMARead|pci.DMAWrite) },
		Unmap: f.UnmapDMA})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.p.Close(); err != nil {
			t.Error(err)
		}
		if maps := f.DMAMaps(); len(maps) != 0 || avail() != before {
			t.Errorf("maps left: %v, %d of %d available", maps, avail(), before)
		}
	})
	if err := f.SetBusMaster(true); err != nil {
		t.Fatal(err)
	}
	if i := f.Interrupts(); i.Kind != pci.MSI {
		t.Fatalf("interrupts: %v", i)
	}
	w, err := f.EnableInterrupts(1)
	if err != nil {
		t.Fatal(err)
	}
	d.irq = &countedWaiter{Waiter: w[0]}
	bar, err := f.MapBAR(0, mmio.Uncached)
	if err != nil {
		t.Fatal(err)
	}
	regs, err := bar.Mem(0, edu.RegsSize)
	if err != nil {
		t.Fatal(err)
	}
	d.config = edu.Config{Regs: regs, Buffer: bufferLink, Waiter: d.irq, Host: []engine.Window{{
		Name: "pool", Link: poolLink, Size: d.p.Region().Mem.Size(), Bus: d.p.Bus(), Side: engine.Far, Access: rw}}}
	t.Logf("pool of %#x bytes at bus address %#x, huge pages %v", d.p.Region().Mem.Size(), d.p.Bus(), d.p.Huge())
	return d
}

func (d *device) engine(t *testing.T) dma.Engine {
	t.Helper()
	e, err := edu.New(d.config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
	return e
}

func random(t *testing.T, max int) int {
	t.Helper()
	n, err := rand.Int(rand.Reader, big.NewInt(int64(max)))
	if err != nil {
		t.Fatal(err)
	}
	return int(n.Int64())
}

// TestHardwareMoves: random blocks from memory to the device and back to another place, byte-exact, nothing beside them touched;
// each end is told by an MSI.
func TestHardwareMoves(t *testing.T) {
	d := open(t)
	m := dma.NewMover(dma.MoverConfig{Engine: d.engine(t), Min: 1, Spin: -1, Timeout: 5 * time.Second})
	ram, _ := d.p.Region().Mem.RAM()
	mem := ram.Bytes()
	const half = poolSize / 2
	for _, n := range []int{1, edu.MaxLen, 1 + random(t, edu.MaxLen), 1 + random(t, edu.MaxLen), 1 + random(t, edu.MaxLen), 1 + random(t, 64)} {
		rand.Read(mem)
		src, dst, at := random(t, half-n), half+random(t, half-n), random(t, edu.MaxLen-n+1)
		want := bytes.Clone(mem)
		copy(want[dst:dst+n], mem[src:src+n])
		in := dma.Span{Region: d.buffer, Off: uint64(at), Len: uint32(n)}
		err := m.Move([]dma.Copy{
			{Dst: in, Src: dma.Span{Region: d.p.Region(), Off: uint64(src), Len: uint32(n)}},
			{Dst: dma.Span{Region: d.p.Region(), Off: uint64(dst), Len: uint32(n)}, Src: in},
		})
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(mem, want) {
			t.Errorf("%d bytes from %#x by %#x to %#x: the memory differs", n, src, at, dst)
		}
	}
	s := m.Stats()
	if s.Get("engine_copies") != 12 || s.Get("redone") != 0 || s.Get("cpu_copies") != 0 || d.irq.n != 12 {
		t.Errorf("%d transfers, %d done over again, %d MSIs", s.Get("engine_copies"), s.Get("redone"), d.irq.n)
	}
	t.Logf("12 transfers, %d MSIs, %d sleeps, %d rescued", d.irq.n, s.Get("sleeps"), s.Get("rescued"))
}

// outside is memory that is not mapped for the device; bus addresses equal link addresses there.
const outside = dma.Addr(0x9000000)

// TestHardwareRefuses: an address outside the mapped pool is refused before it is programmed.
func TestHardwareRefuses(t *testing.T) {
	d := open(t)
	e := d.engine(t)
	buffer := dma.Span{Region: d.buffer, Len: 256}
	end := d.p.Region().Mem.Size()
	big := *d.p.Region()
	big.Mem = mmio.NewBusMem(nil, end+4096, mmio.Uncached)
	regs := func() (v [4]uint64) { // source, destination, count, command
		for i := range v {
			v[i] = d.config.Regs.Load64(0x80 + 8*uint64(i))
		}
		return v
	}
	before := regs()
	for _, bad := range []dma.Span{
		{Region: &dma.Region{Name: "outside", Addr: outside, Access: rw}, Len: 256},
		{Region: &big, Off: end - 255, Len: 256},
		{Region: &big, Off: end, Len: 256},
	} {
		for _, c := range []dma.Copy{{Dst: bad, Src: buffer}, {Dst: buffer, Src: bad}} {
			if n, err := e.Submit([]dma.Copy{c}); n != 0 || !errors.Is(err, dma.ErrUnreachable) {
				t.Errorf("%#x to %#x: %d, %v", uint64(c.Src.Addr()), uint64(c.Dst.Addr()), n, err)
			} else {
				t.Log(err)
			}
		}
	}
	if after := regs(); after != before {
		t.Errorf("the registers held %#x, and now %#x", before, after)
	}
}

// TestHardwareUnchecked: without the check the IOMMU stops the transfer; vm_test.go looks for its report.
func TestHardwareUnchecked(t *testing.T) {
	d := open(t)
	d.config.Unchecked = true
	e := d.engine(t)
	ram, _ := d.p.Region().Mem.RAM()
	mem := ram.Bytes()
	rand.Read(mem)
	buffer := dma.Span{Region: d.buffer, Len: 256}
	pool := func(off uint64) dma.Span { return dma.Span{Region: d.p.Region(), Off: off, Len: 256} }
	want := bytes.Clone(mem)
	copy(want[4096:], mem[:256])
	done := make([]dma.Completion, 1)
	for _, c := range []dma.Copy{
		{Dst: buffer, Src: pool(0)},
		{Dst: dma.Span{Region: &dma.Region{Name: "outside", Addr: outside, Access: rw}, Len: 256}, Src: buffer},
		{Dst: pool(4096), Src: buffer}, // the device and its buffer are as they were
	} {
		if n, err := e.Submit([]dma.Copy{c}); n != 1 || err != nil {
			t.Fatal(n, err)
		}
		for end := time.Now().Add(5 * time.Second); e.Poll(done) == 0; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal("no end")
			}
		}
	}
	if !bytes.Equal(mem, want) {
		t.Error("memory differs")
	}
}
