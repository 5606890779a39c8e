package tunbridge

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// Constants that golang.org/x/sys v0.6.0 lacks (linux/if_tun.h). The request numbers
// it has differ from machine to machine; it knows them all.
const (
	iffNoCarrier = 0x0040 // Linux 6.3; older kernels ignore it
	tunFUSO4     = 0x20   // Linux 6.2
	tunFUSO6     = 0x40   // Linux 6.2
)

// Hardware types of SIOCGIFHWADDR (linux/if_arp.h).
const arphrdEther = 1

// ifreq is struct ifreq: a name and a union of at most 24 bytes (16 on 32-bit machines,
// where the kernel leaves the rest alone). The words keep the union aligned.
type ifreq struct {
	name [unix.IFNAMSIZ]byte
	data [3]uint64
}

func newIfreq(name string) *ifreq {
	r := new(ifreq)
	copy(r.name[:unix.IFNAMSIZ-1], name)
	return r
}

func (r *ifreq) ifName() string {
	for i, c := range r.name {
		if c == 0 {
			return string(r.name[:i])
		}
	}
	return string(r.name[:])
}

func (r *ifreq) u16() *uint16 { return (*uint16)(unsafe.Pointer(&r.data)) }
func (r *ifreq) i32() *int32  { return (*int32)(unsafe.Pointer(&r.data)) }

// hwaddr is the union's struct sockaddr: a family in the machine's byte order, then
// the address.
func (r *ifreq) hwaddr() *[8]byte { return (*[8]byte)(unsafe.Pointer(&r.data)) }

func (r *ifreq) mac() (m MAC) {
	copy(m[:], r.hwaddr()[2:])
	return m
}

func ioctlPtr(fd int, req uintptr, arg unsafe.Pointer) error {
	for {
		_, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), req, uintptr(arg))
		switch e {
		case 0:
			return nil
		case unix.EINTR:
		default:
			return e
		}
	}
}

func ioctlIfreq(fd int, req uintptr, r *ifreq) error {
	return ioctlPtr(fd, req, unsafe.Pointer(r))
}

// ioctlSetInt passes v by pointer, as TUNSETVNETHDRSZ, TUNSETVNETLE and TUNSETCARRIER
// want it.
func ioctlSetInt(fd int, req uintptr, v int32) error {
	return ioctlPtr(fd, req, unsafe.Pointer(&v))
}

func ioctlGetInt(fd int, req uintptr) (int32, error) {
	var v int32
	err := ioctlPtr(fd, req, unsafe.Pointer(&v))
	return v, err
}

// ioctlValue passes v itself, as TUNSETOFFLOAD and TUNSETPERSIST want it.
func ioctlValue(fd int, req, v uintptr) error {
	for {
		_, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), req, v)
		switch e {
		case 0:
			return nil
		case unix.EINTR:
		default:
			return e
		}
	}
}

// controlSocket opens a socket for requests about interfaces of the calling thread's
// network namespace. Any family will do.
func controlSocket() (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err == unix.EAFNOSUPPORT {
		fd, err = unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	}
	return fd, err
}

// littleEndian tells the machine's byte order.
func littleEndian() bool {
	x := uint16(1)
	return *(*byte)(unsafe.Pointer(&x)) == 1
}
