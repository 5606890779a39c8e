package vhostuser

import (
	"errors"
	"fmt"
	"io"
	"net"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// source is where a reader gets bytes with descriptors from: a socket, or a test.
type source interface {
	// recv is recvmsg(2): it waits until something comes.
	recv(p, oob []byte) (n, oobn, flags int, err error)
}

// reader reads messages. It never reads beyond the end of a message, so descriptors belong to the
// message that they came with.
type reader struct {
	src     source
	n       *counters
	closer  *closer
	replies bool // it reads a back end's answers, not a front end's requests
}

// next returns the next message; its descriptors are the caller's. io.EOF: the other side has
// closed the connection between two messages.
func (r *reader) next() (m *message, err error) {
	if err := r.closer.full(); err != nil {
		atomic.AddUint64(&r.n.DescriptorsStuck, 1)
		return nil, err
	}
	m = &message{closer: r.closer}
	defer func() {
		if err != nil {
			m.close()
			m = nil
		}
	}()
	var head [headerLen]byte
	if err := r.fill(m, head[:]); err != nil {
		return m, err
	}
	m.req, m.flags = Request(native.Uint32(head[:])), native.Uint32(head[4:])
	if m.flags&versionMask != flagVersion || (m.flags&flagReply != 0) != r.replies {
		return m, m.errorf(ErrVersion, "flags %#x", m.flags)
	}
	size := native.Uint32(head[8:])
	if size > maxPayload {
		return m, m.errorf(ErrLength, "a payload of %d bytes, at most %d are possible", size, maxPayload)
	}
	m.payload = make([]byte, size)
	if err := r.fill(m, m.payload); err != nil {
		if errors.Is(err, io.EOF) {
			err = fmt.Errorf("within %s: %w", m.req, io.ErrUnexpectedEOF)
		}
		return m, err
	}
	atomic.AddUint64(&r.n.Messages, 1)
	return m, nil
}

// fill reads all of b, and the descriptors that come with it.
func (r *reader) fill(m *message, b []byte) error {
	whole := len(b)
	for len(b) > 0 {
		// The kernel drops the descriptors for which there is no room here: they never become
		// descriptors of this process.
		var oob []byte
		room := maxFDs - len(m.fds)
		if room > 0 {
			oob = make([]byte, unix.CmsgLen(4*room))
		}
		n, oobn, flags, err := r.src.recv(b, oob)
		got := 0
		if oobn > 0 {
			before := len(m.fds)
			if terr := m.takeRights(oob[:oobn]); terr != nil && err == nil {
				err = terr
			}
			got = len(m.fds) - before
		}
		if err != nil {
			return err
		}
		if flags&unix.MSG_CTRUNC != 0 {
			atomic.AddUint64(&r.n.DescriptorsClosed, 1)
			if got < room {
				return m.errorf(ErrDescriptors, "a descriptor found no room in this process (RLIMIT_NOFILE)")
			}
			return m.errorf(ErrDescriptors, "more than %d of them in one message", maxFDs)
		}
		if n == 0 {
			if len(b) < whole {
				return fmt.Errorf("within %d bytes: %w", whole, io.ErrUnexpectedEOF)
			}
			return io.EOF
		}
		b = b[n:]
	}
	return nil
}

// takeRights adds the descriptors of a control message.
func (m *message) takeRights(oob []byte) error {
	cms, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return m.errorf(ErrDescriptors, "control message: %v", err)
	}
	for i := range cms {
		if cms[i].Header.Level != unix.SOL_SOCKET || cms[i].Header.Type != unix.SCM_RIGHTS {
			continue
		}
		fds, err := unix.ParseUnixRights(&cms[i])
		if err != nil {
			return m.errorf(ErrDescriptors, "control message: %v", err)
		}
		m.fds = append(m.fds, fds...)
	}
	return nil
}

// socket is a source: a connection's socket. The goroutine that reads waits in the runtime's
// poller; closing the connection ends the wait.
type socket struct{ raw syscall.RawConn }

func newSocket(c *net.UnixConn) (*socket, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	return &socket{raw}, nil
}

func (s *socket) recv(p, oob []byte) (n, oobn, flags int, err error) {
	rerr := s.raw.Read(func(fd uintptr) bool {
		for {
			// Not ReadMsgUnix: it fails where libgo 12 is compiled for 64-bit big-endian PowerPC.
			n, oobn, flags, _, err = unix.Recvmsg(int(fd), p, oob, unix.MSG_CMSG_CLOEXEC)
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
