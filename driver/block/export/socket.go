package export

import (
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/doorbell"
)

// socket is a client's connection. It is not one of Go's poller, which would wake a thread for each message beside the goroutine that waits for
// it: goroutines wait in poll(2), first with their place in Go's scheduler kept (doorbell.Sleeper.Nap), as a client with one request in
// flight sends the next one soon.
type socket struct {
	fd    int
	sleep *doorbell.Sleeper // of read's caller

	deadline time.Time // of reads and of write; zero: none
}

// newSocket takes over the connection of u, which it closes.
func newSocket(u *net.UnixConn) (*socket, error) {
	defer u.Close()
	raw, err := u.SyscallConn()
	if err != nil {
		return nil, err
	}
	fd := -1
	if cerr := raw.Control(func(old uintptr) { fd, err = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0) }); cerr != nil {
		return nil, cerr
	}
	if err != nil {
		return nil, err
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, err
	}
	// As far as it goes: it is for speed.
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, socketBuffer) != nil {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, socketBuffer)
	}
	return &socket{fd: fd, sleep: doorbell.NewSleeper(doorbell.SleeperConfig{Extra: fd, HasExtra: true, ExtraName: "client", Doze: true})}, nil
}

// poll waits for events until the deadline. A connection that has ended counts as ready.
func (s *socket) poll(events int16) error {
	for {
		ms := -1
		if !s.deadline.IsZero() {
			d := time.Until(s.deadline)
			if d <= 0 {
				return os.ErrDeadlineExceeded
			}
			ms = int(d/time.Millisecond) + 1
		}
		p := []unix.PollFd{{Fd: int32(s.fd), Events: events}}
		n, err := unix.Poll(p, ms)
		if err == nil && n > 0 {
			return nil
		}
		if err != nil && err != unix.EINTR {
			return err
		}
	}
}

// read reads what there is, and waits until there is something. The end of the connection is an io.EOF.
func (s *socket) read(b []byte) (int, error) {
	for napped := false; ; {
		n, err := unix.Read(s.fd, b)
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN:
			if !napped {
				napped = true
				if ready, err := s.sleep.Nap(doorbell.In); err == nil && ready {
					continue
				}
			}
			if err := s.poll(unix.POLLIN); err != nil {
				return 0, err
			}
		case err != nil:
			return 0, err
		case n == 0:
			return 0, io.EOF
		default:
			return n, nil
		}
	}
}

// readFull fills b. A client that goes instead is an io.EOF.
func (s *socket) readFull(b []byte) error {
	for len(b) > 0 {
		n, err := s.read(b)
		if err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

// write writes all of b.
func (s *socket) write(b []byte) error {
	for len(b) > 0 {
		n, err := unix.SendmsgN(s.fd, b, nil, nil, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT)
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN:
			if err := s.poll(unix.POLLOUT); err != nil {
				return err
			}
		case err != nil:
			return err
		default:
			b = b[n:]
		}
	}
	return nil
}

// gone tells whether the client has closed the connection.
func (s *socket) gone() bool {
	p := []unix.PollFd{{Fd: int32(s.fd)}}
	_, err := unix.Poll(p, 0)
	return err == nil && p[0].Revents&(unix.POLLHUP|unix.POLLERR|unix.POLLNVAL) != 0
}

// shutdown ends all waits; the descriptor stays.
func (s *socket) shutdown() { _ = unix.Shutdown(s.fd, unix.SHUT_RDWR) }
