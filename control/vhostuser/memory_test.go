package vhostuser

import (
	"errors"
	"os"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/pci"
)

const mib = 1 << 20

// mapped maps a region of a file, for a test.
func mapped(t testing.TB, r region, fd int) *mapping {
	t.Helper()
	m, err := mapRegion("test", r, fd)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.unmap)
	return m
}

func TestMapRegionRefuses(t *testing.T) {
	fd := memfd(t, mib)
	var pipe [2]int
	if err := unix.Pipe(pipe[:]); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pipe[0])
	defer unix.Close(pipe[1])
	zero, err := unix.Open("/dev/zero", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(zero)
	proc, err := unix.Open("/proc/self/maps", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(proc)
	ro, err := unix.Open("/proc/self/fd/"+strconv.Itoa(fd), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(ro)
	for _, c := range []struct {
		name string
		r    region
		fd   int
	}{
		{"no bytes", region{0, 0, 0, 0}, fd},
		{"end of the guest's addresses", region{1<<64 - 4096, 8192, 0, 0}, fd},
		{"end of the front end's addresses", region{0, 8192, 1<<64 - 4096, 0}, fd},
		{"end of the file", region{0, mib + 4096, 0, 0}, fd},
		{"offset beyond the file", region{0, 4096, 0, mib}, fd},
		{"offset and size overflow", region{0, 4096, 0, 1<<64 - 4096}, fd},
		{"huge", region{0, 1<<64 - 4096, 0, 0}, fd},
		{"guest address not aligned", region{8, 4096, 0, 0}, fd},
		{"user address not aligned", region{0, 4096, 1, 0}, fd},
		{"offset not aligned", region{0, 4096, 0, 4}, fd},
		{"a pipe", region{0, 4096, 0, 0}, pipe[0]},
		{"a device", region{0, 4096, 0, 0}, zero},
		{"procfs", region{0, 4096, 0, 0}, proc},
		{"read only", region{0, 4096, 0, 0}, ro},
		{"no descriptor", region{0, 4096, 0, 0}, -1},
	} {
		if m, err := mapRegion("test", c.r, c.fd); !errors.Is(err, ErrMemory) || m != nil {
			t.Errorf("%s: %v, want %v", c.name, err, ErrMemory)
		}
	}
	if n := openFDs(t, fd); n != 2 {
		t.Errorf("%d descriptors are open, want 2: they are the caller's", n)
	}
}

// TestMapRegionOnDisk: a file of a file system that may be slow, or a program's, is refused.
func TestMapRegionOnDisk(t *testing.T) {
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	f.Truncate(4096)
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil {
		t.Fatal(err)
	}
	m, err := mapRegion("test", region{0, 4096, 0, 0}, int(f.Fd()))
	if fileSystems[uint32(fs.Type)] {
		if err != nil {
			t.Fatal(err)
		}
		m.unmap()
		return // the folder of temporary files is in memory: what this test is about is in the one above too
	}
	if !errors.Is(err, ErrMemory) {
		t.Errorf("%v, want %v", err, ErrMemory)
	}
}

func TestMemory(t *testing.T) {
	fd := memfd(t, 2*mib)
	// As a PC's: a hole between two regions of the guest, and one file; in the front end's
	// addresses both are one piece.
	low := mapped(t, region{0, mib, 0x7f0000000000, 0}, fd)
	high := mapped(t, region{1 << 32, mib - 4096, 0x7f0000000000 + mib, mib + 4096}, fd)
	m, err := newMemory([]*mapping{low, high})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		user, n uint64
		want    dma.Addr
		ok      bool
	}{
		{0x7f0000000000, mib, 0, true},
		{0x7f0000000000, mib + 1, 0, false}, // one piece here, and not in the guest
		{0x7f0000000000 + mib - 16, 16, mib - 16, true},
		{0x7f0000000000 + mib, 4096, 1 << 32, true},
		{0x7f0000000000 + 2*mib - 4096, 1, 0, false},
		{0x7f0000000000 - 1, 2, 0, false},
		{1<<64 - 1, 2, 0, false},
		{0x7f0000000000 + mib, 1<<64 - 1, 0, false},
		{0, 1, 0, false},
	} {
		if a, ok := m.guest(c.user, c.n); a != c.want || ok != c.ok {
			t.Errorf("%#x, %#x bytes: %#x %v, want %#x %v", c.user, c.n, uint64(a), ok, uint64(c.want), c.ok)
		}
	}
	// What is written by the table is in the file at the region's offset.
	s, err := m.table.Translate(nil, 1<<32+32, 4, dma.DeviceWrite|dma.DeviceRead)
	if err != nil || len(s) != 1 {
		t.Fatal(s, err)
	}
	s[0].CopyIn(0, []byte("here"))
	b := make([]byte, 4)
	if _, err := unix.Pread(fd, b, mib+4096+32); err != nil || string(b) != "here" {
		t.Errorf("the file has %q, %v", b, err)
	}
	if !low.same(low.region, fd) || low.same(high.region, fd) || low.same(low.region, memfd(t, mib)) {
		t.Error("same does not tell regions apart")
	}
	if m.find(region{1 << 32, mib - 4096, 0x7f0000000000 + mib, 0}) != high || m.find(region{1 << 32, mib, 0x7f0000000000 + mib, 0}) != nil {
		t.Error("find")
	}
}

func TestMemoryOverlap(t *testing.T) {
	fd := memfd(t, mib)
	a := mapped(t, region{0x10000, 0x10000, 0x50000, 0}, fd)
	for _, c := range []struct {
		name string
		r    region
		ok   bool
	}{
		{"behind it", region{0x20000, 0x1000, 0x60000, 0}, true},
		{"before it", region{0xf000, 0x1000, 0x4f000, 0}, true},
		{"at its first byte of the guest", region{0xf000, 0x1010, 0x4000, 0}, false},
		{"at its last byte of the guest", region{0x1fff0, 0x1000, 0x4000, 0}, false},
		{"at its first byte of the front end", region{0, 0x1010, 0x4f000, 0}, false},
		{"at its last byte of the front end", region{0, 0x1000, 0x5fff0, 0}, false},
		{"in it", region{0x11000, 0x1000, 0x51000, 0}, false},
		{"the same", a.region, false},
	} {
		_, err := newMemory([]*mapping{a, mapped(t, c.r, fd)})
		if c.ok && err != nil || !c.ok && !errors.Is(err, ErrMemory) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

// TestMemoryTruncated: an access to a file that was truncated is an error of this door, which names
// it.
func TestMemoryTruncated(t *testing.T) {
	fd := memfd(t, mib)
	m := mapped(t, region{0, mib, 0, 0}, fd)
	if err := unix.Ftruncate(fd, 0); err != nil {
		t.Fatal(err)
	}
	err := pci.Guard(func() { m.mem.Load32(0) })
	var fault *pci.FaultError
	if !errors.As(err, &fault) || !fault.Shared || fault.Name != "test: memory region at 0x0" {
		t.Errorf("%v, want the fault of the region", err)
	}
}
