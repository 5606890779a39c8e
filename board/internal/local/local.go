// Package local maps memory and registers of the machine itself for the agent's end of a board: physical
// addresses through /dev/mem, the maps of a UIO device (Linux, Documentation/driver-api/uio-howto.rst), or any file; and
// takes interrupts by reading a UIO device.
//
// In the room: those. Never in it: what the registers mean; PCI.
package local

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/pci"
)

// DevMem is where physical addresses are.
const DevMem = "/dev/mem"

// Range is a piece of memory: Size bytes at Offset of a file that can be mapped. With UIO, Offset counts in
// map number Map of the device; else Map is 0.
type Range struct {
	Path   string
	Map    int
	Offset uint64
	Size   uint64
}

// String writes the range as ParseRange reads it.
func (r Range) String() string {
	if r.uio() {
		return fmt.Sprintf("%s:%d@%#x+%#x", r.Path, r.Map, r.Offset, r.Size)
	}
	return fmt.Sprintf("%s@%#x+%#x", r.Path, r.Offset, r.Size)
}

func (r Range) uio() bool { return strings.HasPrefix(r.Path, "/dev/uio") }

// ParseRange reads "[PATH[:MAP]@]OFFSET[+SIZE]"; without a path, OFFSET is a physical address (DevMem). Numbers are
// decimal, or hexadecimal with 0x. size is the default; 0 means that a size has to be written.
func ParseRange(s string, size uint64) (Range, error) {
	r := Range{Path: DevMem, Size: size}
	rest := s
	if i := strings.LastIndexByte(s, '@'); i >= 0 {
		r.Path, rest = s[:i], s[i+1:]
		if j := strings.LastIndexByte(r.Path, ':'); j >= 0 && r.uio() {
			n, err := strconv.ParseUint(r.Path[j+1:], 10, 8)
			if err != nil {
				return r, fmt.Errorf("%q: invalid map number %q: want 0 to 255", s, r.Path[j+1:])
			}
			r.Path, r.Map = r.Path[:j], int(n)
		}
	}
	if i := strings.IndexByte(rest, '+'); i >= 0 {
		n, err := strconv.ParseUint(rest[i+1:], 0, 64)
		if err != nil || n == 0 {
			return r, fmt.Errorf("%q: invalid size %q: want a number of bytes above 0", s, rest[i+1:])
		}
		r.Size, rest = n, rest[:i]
	}
	n, err := strconv.ParseUint(rest, 0, 64)
	if err != nil || r.Path == "" {
		return r, fmt.Errorf("%q is not [PATH[:MAP]@]ADDRESS[+SIZE]", s)
	}
	r.Offset = n
	if r.Size == 0 {
		return r, fmt.Errorf("%q: the size is missing (+SIZE)", s)
	}
	return r, nil
}

// Mapping is mapped memory.
type Mapping struct {
	Mem     mmio.Mem
	bytes   []byte
	release func()
}

// lock locks the range in the file, for as long as the mapping holds it: two agents on one window would spoil each
// other. It is a lock of the open file description, so that it lives as long as the last mapping. Where the kernel
// has none for the file, nothing keeps a second process away.
func lock(fd int, r Range) error {
	lk := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart, Start: int64(r.Offset), Len: int64(r.Size)}
	if r.uio() {
		lk.Start += int64(r.Map) << 48 // unlike other maps' ranges; the file has no offsets of its own
	}
	if err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &lk); err == unix.EAGAIN || err == unix.EACCES {
		return err
	}
	return nil
}

// Map maps a range, as memory of the given kind: what the kernel really makes of it depends on the file. /dev/mem and
// UIO map what is not the kernel's RAM uncached. Errors are *board.Error: they match board.ErrAbsent where the file is
// not there, board.ErrSideTaken where another mapping is exclusive, as this one is to be.
func Map(spec string, r Range, kind mmio.Kind, exclusive bool) (*Mapping, error) {
	fail := func(class error, err error, format string, args ...interface{}) (*Mapping, error) {
		return nil, &board.Error{Spec: spec, Reason: r.String() + " " + fmt.Sprintf(format, args...), Class: class, Err: err}
	}
	page := uint64(os.Getpagesize())
	file := r.Offset
	if r.uio() {
		// A map need not start on a page border; mmap does, and counts maps in pages.
		size, off, err := uioMap(r.Path, r.Map)
		if err != nil {
			return fail(board.ErrInput, err, "cannot be mapped: there is no such map (ls /sys/class/uio/%s/maps)", filepath.Base(r.Path))
		}
		if r.Offset > size || r.Size > size-r.Offset {
			return fail(board.ErrInput, nil, "does not lie in the map, which has %#x bytes", size)
		}
		file = off + r.Offset
	}
	if r.Size == 0 || file+r.Size < file || file+r.Size > 1<<63-1 || uint64(int(r.Size+page)) != r.Size+page {
		return fail(board.ErrInput, nil, "is more than can be mapped")
	}
	start := file &^ (page - 1)
	lead := file - start
	if lead&7 != 0 {
		return fail(board.ErrInput, nil, "does not start at a multiple of 8")
	}
	pos := start
	if r.uio() {
		// The offset of mmap tells the map: what lies before the range in it is mapped too.
		pos, lead = uint64(r.Map)*page, file
	}
	n := (lead + r.Size + page - 1) &^ (page - 1)
	flags := unix.O_RDWR | unix.O_CLOEXEC
	if kind != mmio.Cached {
		flags |= unix.O_SYNC // /dev/mem: uncached also where it could be cached
	}
	fd, err := unix.Open(r.Path, flags, 0)
	switch {
	case err == unix.ENOENT || err == unix.ENODEV || err == unix.ENXIO:
		return fail(board.ErrAbsent, err, "is not there")
	case err == unix.EACCES || err == unix.EPERM:
		return fail(nil, err, "may not be opened: it needs root (CAP_SYS_RAWIO for /dev/mem)")
	case err != nil:
		return fail(nil, err, "cannot be opened")
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err == nil && st.Mode&unix.S_IFMT == unix.S_IFREG && pos+n > (uint64(st.Size)+page-1)&^(page-1) {
		return fail(board.ErrInput, nil, "does not lie in the file, which has %#x bytes", st.Size)
	}
	if exclusive && lock(fd, r) != nil {
		return fail(board.ErrSideTaken, nil, "is in use by another live process; stop it first")
	}
	b, err := unix.Mmap(fd, int64(pos), int(n), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		reason := "cannot be mapped"
		if errors.Is(err, unix.EPERM) && r.Path == DevMem {
			reason += ": the kernel keeps this range (CONFIG_STRICT_DEVMEM; set it apart by memmap= or reserved-memory, or use UIO)"
		}
		return fail(nil, err, "%s", reason)
	}
	base := unsafe.Add(unsafe.Pointer(&b[0]), lead)
	m := &Mapping{Mem: mmio.NewMem(base, r.Size, kind), bytes: b}
	m.release = pci.GuardRange(uintptr(unsafe.Pointer(&b[0])), uint64(len(b)), r.String())
	return m, nil
}

// Close unmaps. A second Close does nothing.
func (m *Mapping) Close() error {
	if m.bytes == nil {
		return nil
	}
	m.release()
	err := unix.Munmap(m.bytes)
	m.bytes = nil
	return err
}

// uioMap returns the size of a map, and at which offset of its first page it starts.
func uioMap(path string, n int) (size, off uint64, err error) {
	dir := filepath.Join("/sys/class/uio", filepath.Base(path), "maps", "map"+strconv.Itoa(n))
	get := func(name string) uint64 {
		b, rerr := os.ReadFile(filepath.Join(dir, name))
		if rerr != nil {
			if name == "size" {
				err = rerr
			}
			return 0
		}
		v, perr := strconv.ParseUint(strings.TrimSpace(string(b)), 0, 64)
		if perr != nil && err == nil {
			err = perr
		}
		return v
	}
	size, off = get("size"), get("offset")
	return size, off, err
}

// IRQ is an interrupt that a UIO device gives: reading tells how many there were, writing 1 enables it
// again. It is a doorbell.Waiter.
type IRQ struct {
	fd   int
	last uint32
	any  bool
}

// OpenIRQ opens a UIO device for its interrupt, and enables it.
func OpenIRQ(spec, path string) (*IRQ, error) {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		e := &board.Error{Spec: spec, Reason: "the interrupt " + path + " cannot be opened", Err: err}
		if err == unix.ENOENT || err == unix.ENODEV || err == unix.ENXIO {
			e.Class = board.ErrAbsent
		}
		return nil, e
	}
	q := &IRQ{fd: fd}
	if err := q.enable(); err != nil {
		unix.Close(fd)
		return nil, &board.Error{Spec: spec, Reason: path + " gives no interrupt that can be enabled", Class: board.ErrInput, Err: err}
	}
	return q, nil
}

// enable writes the 32-bit number 1, in native byte order. Drivers whose interrupt is never disabled do not
// take it (ENOSYS).
func (q *IRQ) enable() error {
	on := uint32(1)
	for {
		_, _, e := unix.Syscall(unix.SYS_WRITE, uintptr(q.fd), uintptr(unsafe.Pointer(&on)), 4)
		switch e {
		case 0, unix.ENOSYS:
			return nil
		case unix.EINTR:
			continue
		}
		return e
	}
}

// FD returns the descriptor.
func (q *IRQ) FD() int { return q.fd }

// Ack takes the interrupts and enables the next one. The number is how many there were since the last Ack, 1
// for the first.
func (q *IRQ) Ack() (uint64, error) {
	var count uint32
	for {
		n, _, e := unix.Syscall(unix.SYS_READ, uintptr(q.fd), uintptr(unsafe.Pointer(&count)), 4)
		switch {
		case e == unix.EINTR:
			continue
		case e == unix.EAGAIN:
			return 0, nil
		case e != 0:
			return 0, fmt.Errorf("reading the interrupt: %w", e)
		case n != 4:
			return 0, fmt.Errorf("reading the interrupt gave %d bytes of 4: it is not a UIO device", n)
		}
		break
	}
	n := uint64(count - q.last)
	if !q.any {
		n, q.any = 1, true
	}
	q.last = count
	return n, q.enable()
}

// Close closes the descriptor. A second Close does nothing.
func (q *IRQ) Close() error {
	if q.fd < 0 {
		return nil
	}
	err := unix.Close(q.fd)
	q.fd = -1
	return err
}
