package vhostuser

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/driver"
	"github.com/boardlink/boardlink/mmio"
)

// sharedBase is where the memory that is shared with a back end lies, in both kinds of its
// addresses: those in descriptors (guest physical addresses of a virtual machine), and those of
// rings (addresses in the front end's process). No address of this process is shown.
const sharedBase = 1 << 32

// sharedMemory is memory of this process that a back end maps too. Each connection has one of its
// own: a back end of before may still write to what it had.
type sharedMemory struct {
	fd     int
	bytes  []byte
	region dma.Region
}

// newSharedMemory makes shared memory of so many bytes, whole pages. Its size is sealed: no side
// can take it from under the other one.
func newSharedMemory(name string, size uint64) (*sharedMemory, error) {
	if uint64(int(size)) != size || int(size) < 0 {
		return nil, fmt.Errorf("shared memory of %d bytes is too large for this process", size)
	}
	fd, err := unix.MemfdCreate("boardlink "+name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("shared memory: memfd_create: %w", err)
	}
	fail := func(call string, err error) (*sharedMemory, error) {
		closeFD(fd)
		return nil, fmt.Errorf("shared memory of %d bytes: %s: %w", size, call, err)
	}
	if err := unix.Ftruncate(fd, int64(size)); err != nil {
		return fail("ftruncate", err)
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL); err != nil {
		return fail("seal of its size", err)
	}
	b, err := unix.Mmap(fd, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fail("mmap", err)
	}
	return &sharedMemory{fd: fd, bytes: b, region: dma.Region{Name: "shared", Addr: sharedBase,
		Mem: mmio.NewMem(unsafe.Pointer(&b[0]), size, mmio.Cached), Access: dma.DeviceRead | dma.DeviceWrite}}, nil
}

// layout returns all of the memory, for one device, with nothing of it in use.
func (s *sharedMemory) layout() driver.Layout {
	m := driver.Share(&s.region, 0, 0, 1)
	return driver.Layout{Near: m, Far: m, Devices: 1}
}

// table is the payload of SET_MEM_TABLE.
func (s *sharedMemory) table() []byte {
	b := make([]byte, 8+regionLen)
	native.PutUint32(b, 1)
	region{guest: sharedBase, size: s.region.Mem.Size(), user: sharedBase}.encode(b[8:])
	return b
}

// close gives the memory back. Nothing of this process uses it any more.
func (s *sharedMemory) close() {
	_ = unix.Munmap(s.bytes)
	closeFD(s.fd)
}
