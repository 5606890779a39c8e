package vhostuser

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// InputError is an error of the user's making: the path of a socket, a descriptor.
type InputError struct{ Err error }

// Error returns the text of the cause.
func (e *InputError) Error() string { return e.Err.Error() }

// Unwrap returns the cause.
func (e *InputError) Unwrap() error { return e.Err }

func inputf(format string, args ...interface{}) error {
	return &InputError{fmt.Errorf(format, args...)}
}

// listener is a socket that listens, and what to remove when it closes.
type listener struct {
	*net.UnixListener
	path string
	stat unix.Stat_t
}

// listen makes a socket that listens at path. It makes it under another name, with its permissions,
// and then renames it: nobody sees it before it is complete. A socket on which nobody listens is
// replaced.
func listen(path string, mode os.FileMode) (*listener, error) {
	if mode == 0 {
		mode = 0o600
	}
	dir, base := filepath.Split(path)
	var r [4]byte
	if _, err := unix.Getrandom(r[:], 0); err != nil {
		return nil, fmt.Errorf("random: %w", err)
	}
	tmp := fmt.Sprintf("%s.bl%x", dir, r)
	if base == "" || len(tmp) > maxPath {
		return nil, inputf("the socket's path %q names no file, or its folder's name is too long: %d bytes are possible", path, maxPath-11)
	}
	var st unix.Stat_t
	switch err := unix.Lstat(path, &st); {
	case err == unix.ENOENT:
	case err != nil:
		return nil, inputf("%s: %v", path, err)
	case st.Mode&unix.S_IFMT != unix.S_IFSOCK:
		return nil, inputf("%s exists and is not a socket", path)
	default:
		c, err := net.DialTimeout("unix", path, time.Second)
		if err == nil {
			c.Close()
			return nil, inputf("%s: another program listens there: stop it, or use another path", path)
		}
		if !errors.Is(err, unix.ECONNREFUSED) && !errors.Is(err, unix.ENOENT) {
			return nil, inputf("%s: %v", path, err)
		}
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: tmp, Net: "unix"})
	if err != nil {
		return nil, inputf("cannot make a socket in %s: %v", dir, err)
	}
	l.SetUnlinkOnClose(false)
	o := &listener{UnixListener: l, path: path}
	if err = unix.Chmod(tmp, uint32(mode.Perm())); err == nil {
		if err = unix.Lstat(tmp, &o.stat); err == nil {
			err = unix.Rename(tmp, path)
		}
	}
	if err != nil {
		l.Close()
		_ = unix.Unlink(tmp)
		return nil, inputf("cannot make the socket %s: %v", path, err)
	}
	return o, nil
}

// open makes the socket that listens, or takes the one that was passed, unless there is one. A side that connects has nothing to
// open. name is that of the link, for errors.
func (s Spec) open(name string, ln **listener, single **net.UnixConn) (err error) {
	switch {
	case *ln != nil || *single != nil || s.Client:
		return nil
	case s.FD >= 0:
		*ln, *single, err = inherited(s.FD)
	default:
		*ln, err = listen(s.Path, s.Mode)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// Close closes the socket, and removes it from its folder unless somebody has put another one
// there.
func (l *listener) Close() error {
	var st unix.Stat_t
	if l.path != "" && unix.Lstat(l.path, &st) == nil && st.Ino == l.stat.Ino && st.Dev == l.stat.Dev {
		_ = unix.Unlink(l.path)
	}
	return l.UnixListener.Close()
}

// inherited takes a socket that was passed to this program: one that listens, or one that is
// connected.
func inherited(fd int) (*listener, *net.UnixConn, error) {
	kind, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil {
		return nil, nil, inputf("descriptor %d is not a socket: %v", fd, err)
	}
	domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
	if err != nil || kind != unix.SOCK_STREAM || domain != unix.AF_UNIX {
		return nil, nil, inputf("descriptor %d is not a Unix stream socket", fd)
	}
	accepts, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	if err != nil {
		return nil, nil, inputf("descriptor %d: %v", fd, err)
	}
	f := os.NewFile(uintptr(fd), "vhost-user")
	defer f.Close() // what follows makes a duplicate
	if accepts != 0 {
		l, err := net.FileListener(f)
		if err != nil {
			return nil, nil, inputf("descriptor %d: %v", fd, err)
		}
		l.(*net.UnixListener).SetUnlinkOnClose(false)
		return &listener{UnixListener: l.(*net.UnixListener)}, nil, nil
	}
	c, err := net.FileConn(f)
	if err != nil {
		return nil, nil, inputf("descriptor %d: %v", fd, err)
	}
	return nil, c.(*net.UnixConn), nil
}
