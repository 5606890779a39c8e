package entropy

import (
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// kernel is the kernel's random number generator.
type kernel struct {
	f      *os.File
	path   string
	credit bool
}

// errCredit: RNDADDENTROPY needs CAP_SYS_ADMIN.
var errCredit = errors.New("the kernel does not let this program credit entropy (RNDADDENTROPY needs CAP_SYS_ADMIN): run it as root, or with a credit of 0")

// openKernel opens the generator. credit: bytes are to count as entropy, which the kernel has to permit.
func openKernel(credit bool) (*kernel, error) {
	k := &kernel{path: "/dev/urandom", credit: credit}
	if credit {
		k.path = "/dev/random"
	}
	f, err := os.OpenFile(k.path, os.O_WRONLY, 0)
	if err != nil {
		return nil, err
	}
	k.f = f
	if credit {
		// Nothing that counts for nothing: it only asks whether it is permitted.
		if err := k.add(make([]byte, 4), 0); err != nil {
			f.Close()
			if errors.Is(err, unix.EPERM) {
				return nil, errCredit
			}
			return nil, err
		}
	}
	return k, nil
}

// Mix implements Pool.
func (k *kernel) Mix(b []byte, bits int) error {
	if k.credit {
		return k.add(b, bits)
	}
	_, err := k.f.Write(b) // mixed in, and credited for nothing
	return err
}

// add adds b, which counts for so many bits (RNDADDENTROPY).
func (k *kernel) add(b []byte, bits int) error {
	var p struct { // struct rand_pool_info
		count, size int32 // bits, bytes
		buf         [Request]byte
	}
	if len(b) > len(p.buf) {
		return fmt.Errorf("%s: %d bytes at once, at most %d go", k.path, len(b), len(p.buf))
	}
	p.count, p.size = int32(bits), int32(len(b))
	copy(p.buf[:], b)
	_, _, e := unix.Syscall(unix.SYS_IOCTL, k.f.Fd(), unix.RNDADDENTROPY, uintptr(unsafe.Pointer(&p)))
	if e != 0 {
		return fmt.Errorf("%s: RNDADDENTROPY: %w", k.path, e)
	}
	return nil
}

// Close implements Pool.
func (k *kernel) Close() error { return k.f.Close() }
