package access_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/pci"
	"github.com/boardlink/boardlink/pci/internal/access"
)

var addr = pci.Address{Device: 4}

// file is a file of n pages with the byte i at offset i.
func file(t *testing.T, n int) *os.File {
	t.Helper()
	b := make([]byte, n*os.Getpagesize())
	for i := range b {
		b[i] = byte(i)
	}
	name := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(name, b, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// TestSparse: the areas are there, what lies between them is not, and nothing is mapped after Close.
func TestSparse(t *testing.T) {
	f := file(t, 8)
	page := uint64(os.Getpagesize())
	var s access.BARs
	b := pci.BAR{Index: 1, Size: 6 * page}
	m, err := s.Add(addr, b, int(f.Fd()), int64(page), []access.Extent{{Offset: 0, Size: page}, {Offset: 3*page + 64, Size: 2 * page}}, mmio.Uncached)
	if err != nil {
		t.Fatal(err)
	}
	if s.Get(1) != m || s.Get(0) != nil || s.Get(-1) != nil || s.Get(6) != nil {
		t.Error("mapped BARs are mixed up")
	}
	a, err := m.Mem(16, 16)
	if err != nil || a.Load8(1) != byte(page+17) || m.Kind() != mmio.Uncached {
		t.Errorf("first area: %v", err)
	}
	if a, err = m.Mem(3*page+64, 2*page); err != nil || a.Load8(1) != byte(4*page+65) {
		t.Errorf("second area: %v", err)
	}
	a.Store32(4, 0xdeadbeef)
	var got [4]byte
	if f.ReadAt(got[:], int64(4*page+68)); got != [4]byte{0xef, 0xbe, 0xad, 0xde} {
		t.Errorf("a store landed as %x", got)
	}
	for _, c := range [][2]uint64{{0, page + 1}, {page, 1}, {3 * page, 8}, {0, 6 * page}} {
		if _, err := m.Mem(c[0], c[1]); err == nil || !strings.Contains(err.Error(), "kernel keeps") {
			t.Errorf("%#x bytes at %#x: %v", c[1], c[0], err)
		}
	}
	for _, c := range [][2]uint64{{6 * page, 1}, {0, 6*page + 1}, {^uint64(0), 2}, {0, 0}} {
		if _, err := m.Mem(c[0], c[1]); err == nil || !strings.Contains(err.Error(), "outside") {
			t.Errorf("%#x bytes at %#x: %v", c[1], c[0], err)
		}
	}
	if _, err := m.All(); err == nil {
		t.Error("a BAR with a hole is given out whole")
	}
	maps := func() int {
		b, _ := os.ReadFile("/proc/self/maps")
		return strings.Count(string(b), f.Name())
	}
	if maps() != 2 {
		t.Errorf("%d mappings, want 2", maps())
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if maps() != 0 || s.Get(1) != nil {
		t.Errorf("%d mappings after Close", maps())
	}
}

// TestMapFails: nothing is left of a BAR of which a later area cannot be mapped.
func TestMapFails(t *testing.T) {
	f := file(t, 2)
	ro, err := os.Open(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	defer ro.Close()
	var s access.BARs
	var e *pci.Error
	_, err = s.Add(addr, pci.BAR{Index: 0, Size: 4096}, int(ro.Fd()), 0, []access.Extent{{Size: 4096}}, mmio.Uncached)
	if !errors.As(err, &e) || e.Problem != pci.Permission {
		t.Errorf("a read-only file: %v", err)
	}
	_, err = s.Add(addr, pci.BAR{Index: 0}, int(f.Fd()), 0, []access.Extent{{Size: 4096}, {Offset: 0, Size: 1 << 63}}, mmio.Uncached)
	if !errors.As(err, &e) || e.Problem != pci.NoBAR {
		t.Errorf("an area of 2^63 bytes: %v", err)
	}
	if b, _ := os.ReadFile("/proc/self/maps"); strings.Contains(string(b), f.Name()) {
		t.Error("a mapping is left")
	}
	if _, err := s.AddFile(addr, pci.BAR{}, f.Name()+"x", mmio.Uncached); !errors.As(err, &e) {
		t.Errorf("a missing file: %v", err)
	}
}

// TestSmallBAR: sysfs maps from the start of the page in which a small BAR lies.
func TestSmallBAR(t *testing.T) {
	f := file(t, 1)
	var s access.BARs
	m, err := s.AddFile(addr, pci.BAR{Index: 3, Start: 0xfebd1000 + 0x340, Size: 256}, f.Name(), mmio.Uncached)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	all, err := m.All()
	if err != nil || all.Size() != 256 || all.Load8(1) != 0x41 {
		t.Errorf("%d bytes, %v", all.Size(), err)
	}
}

// TestSyscalls: a BAR behind reads and writes of a file.
func TestSyscalls(t *testing.T) {
	f := file(t, 1)
	var s access.BARs
	m := s.AddSyscalls(pci.BAR{Index: 4, Size: 32, IO: true}, int(f.Fd()), 8)
	all, err := m.All()
	if err != nil || !m.Syscalls {
		t.Fatal(err)
	}
	if _, ok := all.RAM(); ok {
		t.Error("ports are RAM")
	}
	if all.Load8(1) != 9 || all.Load16(2) != 0x0b0a || all.Load32(4) != 0x0f0e0d0c || all.Load64(8) != 0x1716151413121110 {
		t.Errorf("%x %x %x %x", all.Load8(1), all.Load16(2), all.Load32(4), all.Load64(8))
	}
	all.Store64(8, 0x0102030405060708)
	all.Store8(0, 0xee)
	all.Barrier(mmio.FullBarrier)
	var got [16]byte
	f.ReadAt(got[:], 8)
	if got[0] != 0xee || got[1] != 9 || got[8] != 8 || got[15] != 1 {
		t.Errorf("stores landed as %x", got)
	}
	f.Truncate(0)
	if v := all.Load32(4); v != 0xffffffff {
		t.Errorf("what cannot be read is %#x", v)
	}
	fd, err := unix.Dup(int(f.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	s.Own(fd)
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if err := unix.Close(fd); err != unix.EBADF {
		t.Error("Close left the descriptor open")
	}
}

// TestMaster: bus mastering that somebody else turned off is on again at the next look, and counted, where the owner wants
// it; where it does not stay on, that is an error that tells so.
func TestMaster(t *testing.T) {
	f := file(t, 1)
	c := access.Config{Addr: addr, FD: int(f.Fd()), Size: 64}
	var log []string
	m := access.Master{Config: &c, Log: func(format string, args ...interface{}) { log = append(log, format) }}
	command := func() uint32 {
		v, err := c.Read(pci.RegCommand, 2)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	other := func() { // as setpci does
		if err := c.Write(pci.RegCommand, 2, command()&^pci.CommandBusMaster); err != nil {
			t.Fatal(err)
		}
	}
	other()
	if err := m.Look(); err != nil || command()&pci.CommandBusMaster != 0 {
		t.Errorf("turned on though nobody wants it: %v", err)
	}
	if err := m.Set(true); err != nil || command()&pci.CommandBusMaster == 0 {
		t.Errorf("Set: %v", err)
	}
	for i := uint64(1); i < 4; i++ {
		other()
		for j := 0; j < 2; j++ {
			if err := m.Look(); err != nil || command()&pci.CommandBusMaster == 0 {
				t.Errorf("not turned on again: %v", err)
			}
		}
		if n := m.Counters(); n != (pci.Counters{BusMasterRestored: i}) || len(log) != int(i) {
			t.Errorf("%+v, log %q", n, log)
		}
	}
	if err := m.Set(false); err != nil || m.Look() != nil || command()&pci.CommandBusMaster != 0 {
		t.Errorf("turned on after it was turned off here: %v", err)
	}
	if err := m.Set(true); err != nil {
		t.Fatal(err)
	}
	other()
	ro, err := os.Open(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	defer ro.Close()
	c.FD = int(ro.Fd()) // nothing can be written
	if err := m.Look(); !errors.Is(err, pci.ErrGone) || !strings.Contains(err.Error(), "bus mastering") || m.Counters().BusMasterLost != 1 {
		t.Errorf("it does not stay on: %v, %+v", err, m.Counters())
	}
}

func TestConfig(t *testing.T) {
	f := file(t, 1)
	c := access.Config{Addr: addr, FD: int(f.Fd()), Off: 256, Size: 64}
	if v, err := c.Read(4, 4); v != 0x07060504 || err != nil {
		t.Errorf("%#x, %v", v, err)
	}
	if v, err := c.Read(63, 1); v != 63 || err != nil {
		t.Errorf("%#x, %v", v, err)
	}
	if err := c.SetCommand(pci.CommandBusMaster|0x8000, 1); err != nil {
		t.Error(err)
	}
	if v, err := c.Read(pci.RegCommand, 2); v != 0x8504 || err != nil {
		t.Errorf("command %#x, %v", v, err)
	}
	for _, b := range [][2]int{{62, 4}, {64, 1}, {-1, 1}, {1, 2}, {0, 3}, {0, 0}, {0, 8}} {
		if _, err := c.Read(b[0], b[1]); err == nil {
			t.Errorf("read of %d at %d", b[1], b[0])
		}
		if err := c.Write(b[0], b[1], 0); err == nil {
			t.Errorf("write of %d at %d", b[1], b[0])
		}
	}
	f.Truncate(0)
	if v, err := c.Read(0, 2); v != 0xffff || err == nil {
		t.Errorf("read of nothing: %#x, %v", v, err)
	}
}

// TestWatch: tokens come for rings, for a loss, and for the end of one; Quiet keeps the question away.
func TestWatch(t *testing.T) {
	defer goleak.VerifyNone(t)
	var lost, asked, flag, logged uint32
	w, err := access.NewWatch(time.Millisecond, func() error {
		atomic.AddUint32(&asked, 1)
		if atomic.LoadUint32(&lost) != 0 {
			return pci.ErrGone
		}
		return errors.New("cannot be asked") // no reason to give it up
	})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	e, err := w.NewEvent(&flag, func() { atomic.AddUint32(&logged, 1) })
	if err != nil {
		t.Fatal(err)
	}
	w.Start()
	token := func(what string) {
		t.Helper()
		select {
		case <-w.Events():
		case <-time.After(5 * time.Second):
			t.Fatalf("no token: %s", what)
		}
	}
	for i := 0; i < 3; i++ {
		e.Ring()
		token("ring")
	}
	if atomic.LoadUint32(&flag) != 1 || atomic.LoadUint32(&logged) != 1 {
		t.Errorf("flag %d, logged %d times", flag, logged)
	}
	atomic.StoreUint32(&lost, 1)
	token("lost")
	if err := w.Check(); err != pci.ErrGone {
		t.Error(err)
	}
	atomic.StoreUint32(&lost, 0)
	token("back")
	for atomic.LoadUint32(&asked) < 10 {
		time.Sleep(time.Millisecond)
	}
	w.Quiet(func() error {
		n := atomic.LoadUint32(&asked)
		time.Sleep(20 * time.Millisecond)
		if m := atomic.LoadUint32(&asked); m != n {
			t.Errorf("asked %d times in quiet", m-n)
		}
		return nil
	})
	w.Close()
	w.Close()
}
