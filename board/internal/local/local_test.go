package local

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/mmio"
)

func TestParseRange(t *testing.T) {
	for _, tc := range []struct {
		s    string
		want Range
	}{
		{"0xe0000000", Range{DevMem, 0, 0xe0000000, 7}},
		{"4096+0x2000", Range{DevMem, 0, 4096, 0x2000}},
		{"/dev/uio3:2@0x100+8", Range{"/dev/uio3", 2, 0x100, 8}},
		{"/dev/uio3@0", Range{"/dev/uio3", 0, 0, 7}},
		{"/a:b@c@1+2", Range{"/a:b@c", 0, 1, 2}},
	} {
		got, err := ParseRange(tc.s, 7)
		if err != nil || got != tc.want {
			t.Errorf("%s: %+v, %v", tc.s, got, err)
		}
		again, err := ParseRange(got.String(), 0)
		if err != nil || again != got {
			t.Errorf("%s: written as %s, read as %+v, %v", tc.s, got, again, err)
		}
	}
	for _, s := range []string{"", "x", "1+", "1+0", "@1+1", "/dev/uio1:x@0+1", "/dev/uio1:999@0+1", "-1+1", "0x10000000000000000+1"} {
		if r, err := ParseRange(s, 7); err == nil {
			t.Errorf("%q: %+v", s, r)
		}
	}
	if _, err := ParseRange("1", 0); err == nil {
		t.Error("a size is missing, and nobody says so")
	}
}

func TestMap(t *testing.T) {
	path := filepath.Join(t.TempDir(), "m")
	if err := os.WriteFile(path, make([]byte, 3*os.Getpagesize()), 0o600); err != nil {
		t.Fatal(err)
	}
	off := uint64(os.Getpagesize()) + 0x108
	m, err := Map("x:y", Range{Path: path, Offset: off, Size: 16}, mmio.Uncached, true)
	if err != nil {
		t.Fatal(err)
	}
	m.Mem.Store64(8, 0x1122334455667788)
	if m.Mem.Size() != 16 || m.Mem.Kind() != mmio.Uncached {
		t.Errorf("%d bytes, %s", m.Mem.Size(), m.Mem.Kind())
	}
	b, err := os.ReadFile(path)
	if err != nil || string(b[off+8:off+16]) != "\x88\x77\x66\x55\x44\x33\x22\x11" {
		t.Errorf("% x, %v", b[off:off+16], err)
	}
	for _, tc := range []struct {
		r     Range
		class error
	}{
		{Range{Path: path, Offset: off, Size: 16}, board.ErrSideTaken},
		{Range{Path: path, Offset: off + 8, Size: 8}, board.ErrSideTaken},
		{Range{Path: path, Offset: off + 4, Size: 8}, board.ErrInput},
		{Range{Path: path, Offset: off, Size: 1 << 20}, board.ErrInput},
		{Range{Path: path, Offset: 1 << 63, Size: 8}, board.ErrInput},
		{Range{Path: path, Offset: 8, Size: 1<<64 - 8}, board.ErrInput},
		{Range{Path: path + "x", Offset: 0, Size: 8}, board.ErrAbsent},
		{Range{Path: "/dev/uio77", Offset: 0, Size: 8}, board.ErrInput},
	} {
		if m, err := Map("x:y", tc.r, mmio.Cached, true); !errors.Is(err, tc.class) {
			t.Errorf("%s: %v, %v", tc.r, m, err)
		}
	}
	// Another range of the file is free, and a mapping that is not exclusive takes no lock.
	for _, x := range []struct {
		off  uint64
		excl bool
	}{{off + 16, true}, {off, false}} {
		o, err := Map("x:y", Range{Path: path, Offset: x.off, Size: 16}, mmio.Uncached, x.excl)
		if err != nil {
			t.Fatal(err)
		}
		o.Close()
	}
	m.Close()
	m.Close()
	if m, err = Map("x:y", Range{Path: path, Offset: off, Size: 16}, mmio.Uncached, true); err != nil {
		t.Fatal(err)
	}
	m.Close()
}

// TestIRQ talks to a socket as the kernel's driver would: a count comes, a 1 goes back.
func TestIRQ(t *testing.T) {
	p, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(p[0])
	q := &IRQ{fd: p[1]}
	send := func(n uint32) {
		t.Helper()
		b := *(*[4]byte)(unsafe.Pointer(&n))
		if _, err := unix.Write(p[0], b[:]); err != nil {
			t.Fatal(err)
		}
	}
	enabled := func() bool {
		var v uint32
		b := (*[4]byte)(unsafe.Pointer(&v))
		n, err := unix.Read(p[0], b[:])
		return err == nil && n == 4 && v == 1
	}
	if n, err := q.Ack(); n != 0 || err != nil || enabled() {
		t.Errorf("nothing pending: %d, %v", n, err)
	}
	for _, tc := range []struct {
		count uint32
		want  uint64
	}{{0xfffffffe, 1}, {0xffffffff, 1}, {2, 3}} {
		send(tc.count)
		if n, err := q.Ack(); n != tc.want || err != nil || !enabled() {
			t.Errorf("count %d: %d, %v", tc.count, n, err)
		}
	}
	if _, err := unix.Write(p[0], []byte{1}); err != nil {
		t.Fatal(err)
	}
	if _, err := q.Ack(); err == nil {
		t.Error("one byte is taken for a count")
	}
	q.Close()
	if err := q.Close(); err != nil || q.FD() != -1 {
		t.Errorf("second Close: %v, fd %d", err, q.FD())
	}
	if _, err := OpenIRQ("x:y", "/dev/uio77"); !errors.Is(err, board.ErrAbsent) {
		t.Errorf("a device that is not there: %v", err)
	}
}
