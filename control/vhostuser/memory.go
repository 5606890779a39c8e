package vhostuser

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/pci"
)

// regionAlign is what the addresses and the file offset of a region have to be multiples of, in
// bytes: the strictest alignment that a ring asks for. Front ends use whole pages.
const regionAlign = 16

// mapping is one memory region of the front end, mapped into this process.
type mapping struct {
	region
	*sharedFile
	mem mmio.Mem
}

// fileSystems are those whose files are mapped: memory of the kernel. A file system of a program
// (FUSE) that stopped answering would stop this whole process at the next garbage collection, as a
// page fault cannot be interrupted.
var fileSystems = map[uint32]bool{unix.TMPFS_MAGIC: true, unix.HUGETLBFS_MAGIC: true}

// maxMapped is how many bytes the regions of one connection may have together, those of the table before while it is replaced
// included: sparse files cost nothing, and this process needs addresses of its own.
const maxMapped = uint64(^uintptr(0)>>2) & (1<<42 - 1)

// inMemory tells whether fd is a file of tmpfs or hugetlbfs. It asks no file system: that of a program (FUSE) might not
// answer, even to fstat.
func inMemory(fd int) bool {
	_, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0)
	return err == nil
}

// mapRegion maps the region r of the file fd, which stays the caller's. name is the door's, for the
// error of an access that fails. All errors match ErrMemory.
func mapRegion(name string, r region, fd int) (*mapping, error) {
	bad := func(format string, args ...interface{}) (*mapping, error) {
		return nil, fmt.Errorf("region at %#x of %#x bytes: %w: %s", r.guest, r.size, ErrMemory, fmt.Sprintf(format, args...))
	}
	switch {
	case r.size == 0:
		return bad("it has no bytes")
	case r.guest+(r.size-1) < r.guest:
		return bad("it passes the end of the guest's addresses")
	case r.user+(r.size-1) < r.user:
		return bad("at address %#x of the front end it passes the end of the addresses", r.user)
	case (r.guest|r.user|r.offset)%regionAlign != 0:
		return bad("address %#x of the front end and file offset %#x: all have to be multiples of %d", r.user, r.offset, regionAlign)
	}
	f, at, err := mapShared(fd, r.offset, r.size, fmt.Sprintf("%s: memory region at %#x", name, r.guest))
	if err != nil {
		return bad("%v", err)
	}
	return &mapping{region: r, sharedFile: f, mem: mmio.NewMem(at, r.size, mmio.Cached)}, nil
}

// sharedFile is a piece of a file in memory, mapped into this process.
type sharedFile struct {
	dev, ino uint64 // of the file
	bytes    []byte // the whole mapping, which starts at a page
	unguard  func()
}

// mapShared maps size bytes at offset of the file fd, which stays the caller's, and returns where they are. name is for
// the error of an access that fails. size is not 0.
func mapShared(fd int, offset, size uint64, name string) (*sharedFile, unsafe.Pointer, error) {
	bad := func(format string, args ...interface{}) (*sharedFile, unsafe.Pointer, error) {
		return nil, nil, fmt.Errorf(format, args...)
	}
	if !inMemory(fd) {
		return bad("its descriptor is no file in memory: only tmpfs (memfd, /dev/shm) and hugetlbfs are taken, " +
			"e.g. -object memory-backend-memfd,share=on of QEMU")
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return bad("fstat: %v", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return bad("its descriptor is no file in memory (mode %#o)", st.Mode)
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(fd, &fs); err != nil {
		return bad("fstatfs: %v", err)
	}
	if !fileSystems[uint32(fs.Type)] {
		return bad("its file is on a file system of type %#x: only tmpfs (memfd, /dev/shm) and hugetlbfs are taken, "+
			"e.g. -object memory-backend-memfd,share=on of QEMU", uint32(fs.Type))
	}
	if end := offset + size; end < offset || st.Size < 0 || end > uint64(st.Size) {
		return bad("from offset %#x on it passes the end of its file of %#x bytes", offset, uint64(st.Size))
	}
	// A mapping starts at a page, of hugetlbfs at a huge one.
	page := uint64(unix.Getpagesize())
	if b := uint64(fs.Bsize); b > page && b&(b-1) == 0 {
		page = b
	}
	skip := offset % page
	length := (skip + size + page - 1) / page * page
	if length < size || int(length) < 0 || uint64(int(length)) != length {
		return bad("it is too large for this process")
	}
	b, err := unix.Mmap(fd, int64(offset-skip), int(length), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_NORESERVE)
	if err != nil {
		return bad("mmap: %v", err)
	}
	_ = unix.Madvise(b, unix.MADV_DONTDUMP) // no core dump needs the guest's memory
	f := &sharedFile{dev: uint64(st.Dev), ino: st.Ino, bytes: b}
	f.unguard = pci.GuardShared(uintptr(unsafe.Pointer(&b[0])), length, name)
	return f, unsafe.Pointer(&b[skip]), nil
}

// unmap ends the use of the memory. Nothing touches it any more.
func (f *sharedFile) unmap() {
	f.unguard()
	_ = unix.Munmap(f.bytes)
}

// of tells whether f is a piece of the file fd.
func (f *sharedFile) of(fd int) bool {
	var st unix.Stat_t
	return inMemory(fd) && unix.Fstat(fd, &st) == nil && uint64(st.Dev) == f.dev && st.Ino == f.ino
}

// same tells whether m is the region r of the file fd.
func (m *mapping) same(r region, fd int) bool { return m.region == r && m.of(fd) }

// memory is the regions of one connection. It is immutable: a change makes another one, which
// shares the mappings that stay.
type memory struct {
	maps  []*mapping
	table *dma.Table // by guest physical addresses, as descriptors have them
}

// newMemory checks that the regions do not overlap, in either kind of address, and makes the table.
func newMemory(maps []*mapping) (*memory, error) {
	rs := make([]dma.Region, len(maps))
	for i, m := range maps {
		rs[i] = dma.Region{Name: fmt.Sprintf("guest%d", i), Addr: dma.Addr(m.guest), Mem: m.mem, Access: dma.DeviceRead | dma.DeviceWrite}
		for _, o := range maps[:i] {
			if m.user <= o.user+(o.size-1) && o.user <= m.user+(m.size-1) {
				return nil, fmt.Errorf("%w: regions at %#x and %#x of %#x and %#x bytes overlap in the front end's addresses", ErrMemory, m.user, o.user, m.size, o.size)
			}
		}
	}
	t, err := dma.NewTable(rs...)
	if err != nil {
		return nil, fmt.Errorf("%w: %v", ErrMemory, err)
	}
	return &memory{maps: maps, table: t}, nil
}

// find returns the region r, whatever file it is of; nil where there is none.
func (m *memory) find(r region) *mapping {
	for _, o := range m.maps {
		if o.guest == r.guest && o.user == r.user && o.size == r.size {
			return o
		}
	}
	return nil
}

// without returns the mappings but one.
func (m *memory) without(gone *mapping) []*mapping {
	var maps []*mapping
	for _, o := range m.maps {
		if o != gone {
			maps = append(maps, o)
		}
	}
	return maps
}

// guest translates n bytes at an address of the front end's process into a guest physical address,
// by which the table finds them; false where they do not lie in one region.
func (m *memory) guest(user, n uint64) (dma.Addr, bool) {
	for _, o := range m.maps {
		if off := user - o.user; user >= o.user && off < o.size && n <= o.size-off {
			return dma.Addr(o.guest + off), true
		}
	}
	return 0, false
}

// holds tells whether the mapping is one of the memory.
func (m *memory) holds(x *mapping) bool {
	for _, o := range m.maps {
		if o == x {
			return true
		}
	}
	return false
}

// unmapBut unmaps what keep does not have too; keep may be nil.
func (m *memory) unmapBut(keep *memory) {
	for _, o := range m.maps {
		if keep == nil || !keep.holds(o) {
			o.unmap()
		}
	}
}
