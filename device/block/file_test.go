package block

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/virtio"
)

// absent skips a test for what this machine lacks; where CI runs it, nothing may be lacking.
func absent(t *testing.T, format string, args ...interface{}) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf(format, args...)
	}
	t.Skipf(format, args...)
}

// What cannot be a disk is one line that names the file and says what to do.
func TestOpenFileRefuses(t *testing.T) {
	dir := t.TempDir()
	good := filepath.Join(dir, "good.img")
	put := func(name string, n int) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, make([]byte, n), 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	put("good.img", 1<<20)
	if err := unix.Mkfifo(filepath.Join(dir, "pipe"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		path, want string
	}{
		{filepath.Join(dir, "none.img"), "none.img: no such file or directory"},
		{dir, dir + " is neither a file nor a block device"},
		{filepath.Join(dir, "pipe"), "pipe is neither a file nor a block device"},
		{"/dev/null", "/dev/null is neither a file nor a block device"},
		{put("empty.img", 0), "empty.img is empty: give it a size"},
		{put("odd.img", 1000), "odd.img has 1000 bytes, no multiple of 512: extend it by truncate -s %512"},
	} {
		f, err := OpenFile(FileConfig{Path: c.path})
		if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v, %v, want %q", c.path, f, err, c.want)
		}
	}

	// One who writes, or several who read.
	w := openImage(t, FileConfig{Path: good})
	for _, ro := range []bool{false, true} {
		if _, err := OpenFile(FileConfig{Path: good, ReadOnly: ro}); err == nil || err.Error() != good+" is busy: another program has locked it" {
			t.Errorf("beside one who writes, read-only %v: %v", ro, err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	a, b := openImage(t, FileConfig{Path: good, ReadOnly: true}), openImage(t, FileConfig{Path: good, ReadOnly: true})
	if _, err := OpenFile(FileConfig{Path: good}); err == nil || !strings.Contains(err.Error(), "busy") {
		t.Errorf("beside two who read: %v", err)
	}
	a.Close()
	b.Close()
	openImage(t, FileConfig{Path: good}).Close()
}

// A file that is shortened while it is in use fails the requests behind its new end, and no others.
func TestShrunk(t *testing.T) {
	path := image(t, 1<<20)
	d := newDisk(t, Config{Backend: openImage(t, FileConfig{Path: path})}, mmio.Cached)
	if st := d.write(0, pattern(1, 4096)); st != virtio.BlkOK {
		t.Fatal(st)
	}
	if err := os.Truncate(path, 64<<10); err != nil {
		t.Fatal(err)
	}
	if st := d.do(d.request(virtio.BlkTIn, 1000, false, 512)); st != virtio.BlkIOErr {
		t.Errorf("read behind the end: status %d", st)
	}
	if st := d.do(d.request(virtio.BlkTIn, 127, false, 1024)); st != virtio.BlkIOErr {
		t.Errorf("read across the end: status %d", st)
	}
	if got := d.read(0, 4096); !bytes.Equal(got, pattern(1, 4096)) {
		t.Error("read before the end")
	}
	if n := d.b.Status().Counters; n["failed"] != 2 || n["broken"] != 0 {
		t.Errorf("counters %v", n)
	}
}

// Discarded and zeroed ranges read as zeros; their storage is given back where that is permitted, and not where it is not. What lies
// beside them stays.
func TestDiscardFile(t *testing.T) {
	path := image(t, 0)
	const size = 4 << 20
	data := pattern(3, size)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	be := openImage(t, FileConfig{Path: path})
	if !be.Geometry().Discard {
		absent(t, "the file system of %s has no holes", path)
	}
	d := newDisk(t, Config{Backend: be}, mmio.Cached)
	blocks := func() int64 {
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			t.Fatal(err)
		}
		return st.Blocks
	}
	if err := be.Flush(); err != nil {
		t.Fatal(err)
	}
	do := func(kind uint32, flags uint32, off, n int) {
		t.Helper()
		s := virtio.BlkSegment{Sector: uint64(off / 512), Sectors: uint32(n / 512), Flags: flags}.Encode()
		r := d.request(kind, 0, true, virtio.BlkSegmentLen)
		d.fill(r.data[0], s[:])
		if st := d.do(r); st != virtio.BlkOK {
			t.Fatalf("type %d: status %d", kind, st)
		}
		copy(data[off:], make([]byte, n))
	}
	full := blocks()
	do(virtio.BlkTDiscard, 0, 1<<20, 1<<20)
	one := blocks()
	do(virtio.BlkTWriteZeroes, virtio.BlkUnmap, 2<<20, 1<<20)
	two := blocks()
	do(virtio.BlkTWriteZeroes, 0, 3<<20+512, 512<<10)
	if one > full-1800 || two > one-1800 {
		t.Errorf("%d sectors of storage, %d after a discard of 2048, %d after zeroing 2048 more", full, one, two)
	}
	if n := blocks(); n < two-16 {
		t.Errorf("zeroing without unmap gave %d sectors back", two-n)
	}
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, data) {
		t.Errorf("the file differs (%v)", err)
	}
}

// Requests that are not aligned as direct access needs it are served all the same, and see what the others wrote.
func TestDirect(t *testing.T) {
	path := image(t, 1<<20)
	be, err := OpenFile(FileConfig{Path: path, Direct: true})
	if err != nil {
		if strings.Contains(err.Error(), "leave the key direct out") {
			absent(t, "%v", err)
		}
		t.Fatal(err)
	}
	f := be.(*file)
	if f.direct < 0 || f.align < 512 || be.Geometry().BlockSize < uint32(f.align) {
		t.Fatalf("%+v", f)
	}
	d := newDisk(t, Config{Backend: be}, mmio.Cached)
	page := d.Take(8192 + 4096)
	base := uint64(page.Addr()+4095) &^ 4095
	aligned := page.Sub(uint32(base-uint64(page.Addr())), 8192)
	for i, s := range []struct{ off, n uint32 }{{0, 4096}, {1, 4096}, {0, 512}, {3, 512}} {
		r := d.request(virtio.BlkTOut, uint64(8*i), true)
		r.data = append(r.data, aligned.Sub(s.off, s.n))
		d.fill(r.data[0], pattern(byte(i), int(s.n)))
		if st := d.do(r); st != virtio.BlkOK {
			t.Fatalf("%d: status %d", i, st)
		}
		for _, off := range []uint32{0, 5} {
			r := d.request(virtio.BlkTIn, uint64(8*i), false)
			r.data = append(r.data, aligned.Sub(off, s.n))
			if st := d.do(r); st != virtio.BlkOK || !bytes.Equal(bytesOf(r.data...), pattern(byte(i), int(s.n))) {
				t.Fatalf("%d, read to offset %d of a page: status %d, or it differs", i, off, st)
			}
		}
	}
}

// Where the kernel has no RWF_DSYNC a durable write is followed by a sync.
func TestNoDsync(t *testing.T) {
	be := openImage(t, FileConfig{Path: image(t, 1<<20)})
	defer be.Close()
	f := be.(*file)
	syncs := 0
	f.sync = func(int) error { syncs++; return nil }
	b := make([]byte, 512)
	w := func() error { return f.WriteAt([]unix.Iovec{iovec(b)}, 0, true) }
	err := w()
	if had := atomic.LoadUint32(&f.noDsync) == 0; err != nil || had != (syncs == 0) { // qemu-user has no pwritev2
		t.Fatalf("%v, %d syncs, pwritev2 is there: %v", err, syncs, had)
	}
	atomic.StoreUint32(&f.noDsync, 1)
	syncs = 0
	if err := w(); err != nil || syncs != 1 {
		t.Fatalf("%v, %d syncs", err, syncs)
	}
}

func iovec(b []byte) unix.Iovec {
	v := unix.Iovec{Base: &b[0]}
	v.SetLen(len(b))
	return v
}

// A full file system is an I/O error to the driver, counted and told once, and the disk goes on when there is space again.
func TestImageFull(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"); err != nil {
		absent(t, "mount a tmpfs: %v", err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	path := filepath.Join(dir, "sparse.img")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, 16<<20); err != nil {
		t.Fatal(err)
	}
	lines := make(chan string, 10)
	be := openImage(t, FileConfig{Path: path})
	d := newDisk(t, Config{Backend: be, Logf: func(f string, a ...interface{}) { lines <- f }}, mmio.Cached)
	failed := 0
	for i := 0; i < 10; i++ {
		if st := d.write(uint64(i*512), make([]byte, 256<<10)); st == virtio.BlkIOErr {
			failed++
		}
	}
	if n := d.b.Status().Counters; failed < 5 || n["full"] != uint64(failed) || len(lines) != 1 {
		t.Errorf("%d of 10 writes failed, counters %v, %d lines", failed, n, len(lines))
	}
	if err := be.Discard(0, 1<<20); err != nil {
		t.Fatal(err)
	}
	if st := d.write(9*512, pattern(1, 512)); st != virtio.BlkOK {
		t.Errorf("with space again: status %d", st)
	}
}

// Block devices: the kernel's sizes, busy where they are mounted, discards.
func TestBlockDevice(t *testing.T) {
	path := image(t, 8<<20)
	out, err := exec.Command("losetup", "--find", "--show", "--sector-size", "4096", path).CombinedOutput()
	if err != nil {
		absent(t, "losetup: %v, %s", err, out)
	}
	dev := strings.TrimSpace(string(out))
	defer exec.Command("losetup", "--detach", dev).Run()
	be := openImage(t, FileConfig{Path: dev, Direct: true})
	if g := be.Geometry(); g.Size != 8<<20 || g.BlockSize != 4096 || !strings.Contains(g.Name, dev) {
		t.Errorf("%+v", g)
	}
	if _, err := OpenFile(FileConfig{Path: dev}); err == nil || !strings.Contains(err.Error(), "busy") {
		t.Errorf("a second one: %v", err)
	}
	d := newDisk(t, Config{Backend: be}, mmio.Cached)
	if st := d.write(8, pattern(1, 8192)); st != virtio.BlkOK || !bytes.Equal(d.read(8, 8192), pattern(1, 8192)) {
		t.Errorf("status %d, or the data differ", st)
	}
	for _, kind := range []uint32{virtio.BlkTDiscard, virtio.BlkTWriteZeroes} {
		s := virtio.BlkSegment{Sector: 8, Sectors: 8}.Encode()
		r := d.request(kind, 0, true, len(s))
		d.fill(r.data[0], s[:])
		if st := d.do(r); st != virtio.BlkOK {
			t.Errorf("type %d: status %d", kind, st)
		}
	}
	if !bytes.Equal(d.read(8, 4096), make([]byte, 4096)) || !bytes.Equal(d.read(16, 4096), pattern(1, 8192)[4096:]) {
		t.Error("zeroing hit other bytes than those")
	}
}
