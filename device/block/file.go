package block

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/virtio"
)

// FileConfig says how a file or a block device is opened.
type FileConfig struct {
	Path     string
	ReadOnly bool
	// Direct passes the page cache by (O_DIRECT). Requests that are not aligned as that needs it go through the page cache.
	Direct bool
}

// Requests of block devices that package unix (x/sys v0.6.0) does not have: _IO(0x12, n), as BLKSSZGET is, on every processor.
const (
	blkBase    = unix.BLKSSZGET &^ 0xff
	blkDiscard = blkBase | 119
	blkIOMin   = blkBase | 120
	blkIOOpt   = blkBase | 121
	blkZeroOut = blkBase | 127
)

// file is a Backend on a regular file or a block device.
type file struct {
	geo     Geometry
	fd      int
	direct  int    // the same by O_DIRECT; -1: not used
	align   uint64 // of addresses, lengths and offsets for direct, a power of two
	device  bool   // a block device
	noDsync uint32 // 1: RWF_DSYNC is not there; with sync/atomic

	// What a test looks at or replaces.
	sync func(fd int) error
}

// OpenFile opens a regular file or a block device. It takes a lock that other processes see, which lets in several readers, or one who
// writes. Errors are one line for the user.
func OpenFile(c FileConfig) (Backend, error) {
	f := &file{fd: -1, direct: -1, sync: unix.Fdatasync}
	if err := f.open(c); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func (f *file) open(c FileConfig) (err error) {
	flags := unix.O_RDWR
	if c.ReadOnly {
		flags = unix.O_RDONLY
	}
	// Nothing but files and block devices: opening a named pipe waits, a terminal or a tape may do something.
	var st unix.Stat_t
	if err := unix.Stat(c.Path, &st); err != nil {
		return &os.PathError{Op: "open", Path: c.Path, Err: err}
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
	case unix.S_IFBLK:
		if f.device = true; !c.ReadOnly {
			flags |= unix.O_EXCL // fails with EBUSY where it is mounted, or somebody else has it so
		}
	default:
		return fmt.Errorf("%s is neither a file nor a block device", c.Path)
	}
	open := func(more int) (int, error) {
		fd, err := unix.Open(c.Path, flags|more|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		switch {
		case err == unix.EBUSY:
			return -1, fmt.Errorf("%s is busy: it is mounted, or another program uses it", c.Path)
		case err == unix.EROFS || err == unix.EACCES && !c.ReadOnly:
			return -1, fmt.Errorf("open %s for writing: %v (a disk that is only read needs the key ro)", c.Path, err)
		case err == unix.EINVAL && more&unix.O_DIRECT != 0:
			return -1, fmt.Errorf("%s: its file system has no direct access (O_DIRECT): leave the key direct out", c.Path)
		case err != nil:
			return -1, &os.PathError{Op: "open", Path: c.Path, Err: err}
		}
		return fd, nil
	}
	if f.fd, err = open(0); err != nil {
		return err
	}
	if err := unix.Fstat(f.fd, &st); err != nil {
		return &os.PathError{Op: "stat", Path: c.Path, Err: err}
	}
	if (st.Mode&unix.S_IFMT == unix.S_IFBLK) != f.device {
		return fmt.Errorf("%s changed while it was opened", c.Path)
	}
	if err := lock(f.fd, c.Path, c.ReadOnly); err != nil {
		return err
	}
	if err := f.measure(c, &st); err != nil {
		return err
	}
	if c.Direct {
		if f.device { // the same holder may not open it twice with O_EXCL
			flags &^= unix.O_EXCL
		}
		if f.direct, err = open(unix.O_DIRECT); err != nil {
			return err
		}
		if f.align, err = directAlign(f.direct, f.geo.Size); err != nil {
			return fmt.Errorf("%s: direct access: %w", c.Path, err)
		}
		if uint64(f.geo.BlockSize) < f.align {
			f.geo.BlockSize = uint32(f.align)
		}
	}
	return nil
}

// lock takes a lock on all of the file, which ends with the descriptor. Those of QEMU and qemu-nbd are of the same kind.
func lock(fd int, path string, shared bool) error {
	l := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart}
	if shared {
		l.Type = unix.F_RDLCK
	}
	switch err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &l); err {
	case nil:
		return nil
	case unix.EAGAIN, unix.EACCES:
		return fmt.Errorf("%s is busy: another program has locked it", path)
	case unix.ENOLCK, unix.EINVAL, unix.ENOSYS, unix.EOPNOTSUPP:
		return nil // its file system has no locks
	default:
		return fmt.Errorf("lock %s: %w", path, err)
	}
}

// measure finds out size, block sizes and abilities.
func (f *file) measure(c FileConfig, st *unix.Stat_t) error {
	f.geo = Geometry{Name: "file " + c.Path, Size: uint64(st.Size), ReadOnly: c.ReadOnly, BlockSize: virtio.BlkSector}
	if f.device {
		if err := f.measureDevice(c.Path, st); err != nil {
			return err
		}
	} else if !c.ReadOnly {
		// Behind the end of the file nothing is changed.
		f.geo.Discard = unix.Fallocate(f.fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, st.Size, 4096) == nil
	}
	switch {
	case f.geo.Size == 0:
		return fmt.Errorf("%s is empty: give it a size, e.g. by truncate -s 1G", c.Path)
	case f.geo.Size%virtio.BlkSector != 0:
		return fmt.Errorf("%s has %d bytes, no multiple of %d: extend it by truncate -s %%%d", c.Path, f.geo.Size, virtio.BlkSector, virtio.BlkSector)
	}
	return nil
}

// measureDevice does so for a block device.
func (f *file) measureDevice(path string, st *unix.Stat_t) error {
	f.geo.Name = "device " + path
	var size uint64
	if err := ioctl(f.fd, unix.BLKGETSIZE64, unsafe.Pointer(&size)); err != nil {
		return fmt.Errorf("the size of %s: %w", path, err)
	}
	f.geo.Size = size
	for _, q := range []struct {
		request uintptr
		to      *uint32
	}{{unix.BLKSSZGET, &f.geo.BlockSize}, {unix.BLKPBSZGET, &f.geo.Physical}, {blkIOMin, &f.geo.MinIO}, {blkIOOpt, &f.geo.OptIO}} {
		var v uint32
		if err := ioctl(f.fd, q.request, unsafe.Pointer(&v)); err == nil && v < 1<<30 {
			*q.to = v
		}
	}
	if b := f.geo.BlockSize; b < virtio.BlkSector || b&(b-1) != 0 {
		return fmt.Errorf("%s has blocks of %d bytes", path, b)
	}
	limit, err := os.ReadFile(fmt.Sprintf("/sys/dev/block/%d:%d/queue/discard_max_bytes", unix.Major(uint64(st.Rdev)), unix.Minor(uint64(st.Rdev))))
	f.geo.Discard = err == nil && string(limit) != "0\n"
	return nil
}

func ioctl(fd int, request uintptr, arg unsafe.Pointer) error {
	for {
		if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(arg)); e == 0 {
			return nil
		} else if e != unix.EINTR {
			return e
		}
	}
}

// directAlign finds what direct access has to be aligned to, by reading.
func directAlign(fd int, size uint64) (uint64, error) {
	const most = 64 << 10
	buf := aligned(most, most)
	last := error(unix.EINVAL)
	for a := uint64(virtio.BlkSector); a <= most; a *= 2 {
		off := int64(a) // an offset that is a multiple of no more than that
		if size < 2*a {
			off = 0
		}
		_, err := unix.Pread(fd, buf[:a], off)
		if err == nil {
			return a, nil
		}
		if last = err; err != unix.EINVAL {
			break
		}
	}
	return 0, last
}

// aligned returns n bytes at a multiple of a, a power of two.
func aligned(n, a int) []byte {
	b := make([]byte, n+a)
	skip := int(-uintptr(unsafe.Pointer(&b[0])) & uintptr(a-1))
	return b[skip : skip+n : skip+n]
}

// Geometry implements Backend.
func (f *file) Geometry() Geometry { return f.geo }

// pick returns the descriptor for a request: the direct one where it is aligned for that.
func (f *file) pick(bufs []unix.Iovec, off uint64) int {
	if f.direct < 0 {
		return f.fd
	}
	bits := off
	for i := range bufs {
		bits |= uint64(uintptr(unsafe.Pointer(bufs[i].Base))) | uint64(bufs[i].Len)
	}
	if bits&(f.align-1) != 0 {
		return f.fd
	}
	return f.direct
}

// ReadAt implements Backend.
func (f *file) ReadAt(bufs []unix.Iovec, off uint64) error {
	fd := f.pick(bufs, off)
	for len(bufs) > 0 {
		n, err := vector(unix.SYS_PREADV, fd, bufs, off, 0)
		if err != nil {
			return err
		}
		if n == 0 {
			return fmt.Errorf("%s ends at %d, it was %d bytes long: %w", f.geo.Name, off, f.geo.Size, io.ErrUnexpectedEOF)
		}
		bufs, off = advance(bufs, n), off+n
	}
	return nil
}

// WriteAt implements Backend.
func (f *file) WriteAt(bufs []unix.Iovec, off uint64, durable bool) error {
	fd := f.pick(bufs, off)
	call, flags := uintptr(unix.SYS_PWRITEV), 0
	if durable && atomic.LoadUint32(&f.noDsync) == 0 {
		call, flags = unix.SYS_PWRITEV2, unix.RWF_DSYNC
	}
	for len(bufs) > 0 {
		n, err := vector(call, fd, bufs, off, flags)
		if flags != 0 && (err == unix.ENOSYS || err == unix.EOPNOTSUPP) { // Linux before 4.7
			atomic.StoreUint32(&f.noDsync, 1)
			call, flags = unix.SYS_PWRITEV, 0
			continue
		}
		if err != nil {
			return err
		}
		if n == 0 {
			return io.ErrShortWrite
		}
		bufs, off = advance(bufs, n), off+n
	}
	if durable && flags == 0 {
		return f.Flush()
	}
	return nil
}

// vector is preadv, pwritev or pwritev2.
func vector(call uintptr, fd int, bufs []unix.Iovec, off uint64, flags int) (uint64, error) {
	for {
		// The kernel takes the offset in two parts, each as long as a register: where one holds all of it, the other does not count.
		n, _, e := unix.Syscall6(call, uintptr(fd), uintptr(unsafe.Pointer(&bufs[0])), uintptr(len(bufs)), uintptr(off), highPart(off), uintptr(flags))
		switch e {
		case 0:
			return uint64(n), nil
		case unix.EINTR:
		default:
			return 0, ioErr(e)
		}
	}
}

// highPart returns what of off is above the length of a register in bits.
func highPart(off uint64) uintptr {
	const bits = 32 << (^uintptr(0) >> 63)
	return uintptr(off >> (bits - 1) >> 1)
}

// Flush implements Backend.
func (f *file) Flush() error { return f.sync(f.fd) }

// Discard implements Backend.
func (f *file) Discard(off, n uint64) error {
	if f.device {
		r := [2]uint64{off, n}
		return unsupported(ioctl(f.fd, blkDiscard, unsafe.Pointer(&r[0])))
	}
	return f.allocate(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

// WriteZeroes implements Backend.
func (f *file) WriteZeroes(off, n uint64, unmap bool) error {
	if f.device && !unmap {
		r := [2]uint64{off, n}
		return unsupported(ioctl(f.fd, blkZeroOut, unsafe.Pointer(&r[0])))
	}
	if unmap { // of a block device: as BLKZEROOUT, and it may unmap (Linux 4.9)
		if err := f.allocate(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n); !errors.Is(err, ErrUnsupported) {
			return err
		}
		if f.device {
			return f.WriteZeroes(off, n, false)
		}
	}
	return f.allocate(unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

// allocate is fallocate.
func (f *file) allocate(mode uint32, off, n uint64) error {
	for {
		if err := unix.Fallocate(f.fd, mode, int64(off), int64(n)); err != unix.EINTR {
			return unsupported(err)
		}
	}
}

// unsupported makes ErrUnsupported of the kernel's numbers for that.
func unsupported(err error) error {
	switch err {
	case unix.EOPNOTSUPP, unix.ENOSYS, unix.ENOTTY, unix.EINVAL, unix.ENODEV:
		return fmt.Errorf("%w: %v", ErrUnsupported, err)
	}
	return err
}

// Abort implements Backend: calls of the kernel end when they end.
func (f *file) Abort() {}

// Close implements Backend.
func (f *file) Close() error {
	var err error
	for _, fd := range [...]*int{&f.direct, &f.fd} {
		if *fd >= 0 {
			if e := unix.Close(*fd); err == nil && e != nil {
				err = fmt.Errorf("%s: %w", f.geo.Name, e)
			}
			*fd = -1
		}
	}
	return err
}
