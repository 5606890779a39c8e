package loopback

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// The ivshmem client-server protocol (QEMU, docs/specs/ivshmem-spec.rst): the server sends, the client
// listens. Each message is a little-endian int64 with at most one file descriptor.
const (
	protocolVersion = 0
	shmID           = -1    // the number that goes with the shared memory
	maxID           = 65535 // the doorbell register has 16 bits for it
	msgSize         = 8
)

// MaxVectors is how many vectors a peer may have here; the protocol has no bound, an ivshmem
// device's MSI-X table 2048.
const MaxVectors = 64

var (
	errTwoFDs    = errors.New("a message with more than one file descriptor")
	errTruncated = fmt.Errorf("a file descriptor that was sent found no room (RLIMIT_NOFILE): %w", unix.EMFILE)
)

// message is one of the protocol's.
type message struct {
	val int64
	fd  int // -1: none
	// lost tells that there was a descriptor which this process had no room for.
	lost bool
}

// decoder reads messages. What was read of one when a deadline passed is kept for the next call.
type decoder struct {
	conn *net.UnixConn
	raw  syscall.RawConn
	buf  [msgSize]byte
	n    int
	fd   int // of the message under way, -1: none yet
	lost bool
	oob  [64]byte // room for a few descriptors, so that surplus ones are seen and closed
}

func newDecoder(c *net.UnixConn) *decoder { return &decoder{conn: c, fd: -1} }

// next returns the next message. Its descriptor is the caller's, close-on-exec.
func (d *decoder) next() (message, error) {
	for d.n < msgSize {
		// Never beyond this message: its descriptor is not to be taken for
		// the next one's.
		n, oobn, flags, err := d.read()
		if oobn > 0 {
			if err := d.take(d.oob[:oobn]); err != nil {
				return message{}, err
			}
		}
		if flags&unix.MSG_CTRUNC != 0 && d.fd < 0 {
			d.lost = true
		}
		if n == 0 && (err == nil || errors.Is(err, io.EOF)) {
			if d.n > 0 {
				return message{}, fmt.Errorf("%d bytes of a message: %w", d.n, io.ErrUnexpectedEOF)
			}
			return message{}, io.EOF
		}
		if err != nil {
			return message{}, err
		}
		d.n += n
	}
	m := message{val: int64(binary.LittleEndian.Uint64(d.buf[:])), fd: d.fd, lost: d.lost}
	d.n, d.fd, d.lost = 0, -1, false
	return m, nil
}

// read is ReadMsgUnix, which fails on every message where libgo 12 is compiled for 64-bit big-endian
// PowerPC (its syscall.Recvmsg: EAFNOSUPPORT for the sender's address). It returns when something came or the
// deadline passed.
func (d *decoder) read() (n, oobn, flags int, err error) {
	if d.raw == nil {
		if d.raw, err = d.conn.SyscallConn(); err != nil {
			return 0, 0, 0, err
		}
	}
	rerr := d.raw.Read(func(fd uintptr) bool {
		for {
			n, oobn, flags, _, err = unix.Recvmsg(int(fd), d.buf[d.n:], d.oob[:], unix.MSG_CMSG_CLOEXEC)
			if err != unix.EINTR {
				return err != unix.EAGAIN
			}
		}
	})
	if rerr != nil {
		return 0, 0, 0, rerr
	}
	if err != nil {
		return 0, 0, 0, fmt.Errorf("recvmsg: %w", err)
	}
	return n, oobn, flags, nil
}

// take keeps the one descriptor that came.
func (d *decoder) take(oob []byte) error {
	cms, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return fmt.Errorf("control message: %w", err)
	}
	for i := range cms {
		if cms[i].Header.Level != unix.SOL_SOCKET || cms[i].Header.Type != unix.SCM_RIGHTS {
			continue
		}
		fds, err := unix.ParseUnixRights(&cms[i])
		if err != nil {
			return fmt.Errorf("control message: %w", err)
		}
		for _, fd := range fds {
			if d.fd < 0 {
				d.fd = fd
			} else {
				unix.Close(fd)
				err = errTwoFDs
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// drop closes the descriptor of a message that was not finished.
func (d *decoder) drop() {
	if d.fd >= 0 {
		unix.Close(d.fd)
		d.fd = -1
	}
}
