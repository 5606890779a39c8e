package tty

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ErrHungUp: no program has the terminal open at present.
var ErrHungUp = errors.New("no program has the terminal open")

// Pty is the master of a pseudo-terminal. Its methods may be called from any goroutine.
type Pty struct {
	f     *os.File
	name  string
	link  string // "": none
	fresh Mode   // of a pseudo-terminal that nobody has changed
}

// Open makes a pseudo-terminal.
func Open() (*Pty, error) {
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("pseudo-terminal: /dev/ptmx: %w", err)
	}
	n, err := unix.IoctlGetUint32(fd, unix.TIOCGPTN) // not an int: the kernel writes 32 bits
	if err == nil {
		err = unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0)
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("pseudo-terminal: %w", err)
	}
	p := &Pty{f: os.NewFile(uintptr(fd), "/dev/ptmx"), name: "/dev/pts/" + strconv.FormatUint(uint64(n), 10)}
	if p.fresh, err = getMode(p.f); err == nil {
		// The kernel tells that no program has the terminal open from the moment on in which the first one has closed it.
		var slave *os.File
		if slave, err = p.OpenSlave(); err == nil {
			err = slave.Close()
		}
	}
	if err != nil {
		p.f.Close()
		return nil, fmt.Errorf("pseudo-terminal: %w", err)
	}
	return p, nil
}

// Name returns the path of the terminal that programs open.
func (p *Pty) Name() string { return p.name }

// OpenSlave opens the terminal, for a program.
func (p *Pty) OpenSlave() (*os.File, error) {
	return os.OpenFile(p.name, os.O_RDWR|unix.O_NOCTTY, 0)
}

// Read waits for what programs print. The error is ErrHungUp where none has the terminal open, also for a
// moment where one hangs it up (vhangup(2)); os.ErrClosed after Close.
func (p *Pty) Read(b []byte) (int, error) {
	n, err := p.f.Read(b)
	if errors.Is(err, unix.EIO) {
		err = ErrHungUp
	}
	return n, err
}

// Write passes on what is typed. It waits while programs do not read.
func (p *Pty) Write(b []byte) (int, error) { return p.f.Write(b) }

// Interrupt ends a Write that waits, and those that come, with os.ErrDeadlineExceeded; until it is called with on false.
func (p *Pty) Interrupt(on bool) error {
	var at time.Time
	if on {
		at = time.Unix(1, 0)
	}
	return p.f.SetWriteDeadline(at)
}

// Discard drops what was written and no program has read.
func (p *Pty) Discard() error {
	f, err := p.OpenSlave() // the master's TCOFLUSH leaves what has reached the line discipline
	if err != nil {
		return err
	}
	defer f.Close()
	return control(f, func(fd int) error { return unix.IoctlSetInt(fd, unix.TCFLSH, unix.TCIFLUSH) })
}

// HungUp tells whether no program has the terminal open.
func (p *Pty) HungUp() bool {
	hup := false
	err := control(p.f, func(fd int) error {
		fds := []unix.PollFd{{Fd: int32(fd), Events: 0}}
		_, err := unix.Poll(fds, 0)
		hup = fds[0].Revents&unix.POLLHUP != 0
		return err
	})
	return hup || err != nil && !errors.Is(err, unix.EINTR)
}

// SetSize tells programs the size of the terminal.
func (p *Pty) SetSize(s Size) error {
	return control(p.f, func(fd int) error {
		return unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Col: s.Cols, Row: s.Rows})
	})
}

// Restore gives the terminal the mode of a new one; raw: one that passes on every byte as it is.
func (p *Pty) Restore(raw bool) error {
	m := p.fresh
	if raw {
		m = m.Raw()
	}
	return SetMode(p.f, m)
}

// Link makes a symbolic link to the terminal. A link to another pseudo-terminal, which an earlier program has
// left, is replaced; anything else is not.
func (p *Pty) Link(path string) error {
	st, err := os.Lstat(path)
	if err == nil {
		if st.Mode()&os.ModeSymlink == 0 {
			return fmt.Errorf("%s exists and is not a symbolic link: choose another path, or remove it", path)
		}
		to, err := os.Readlink(path)
		if err != nil {
			return err
		}
		if !strings.HasPrefix(to, "/dev/pts/") {
			return fmt.Errorf("%s is a symbolic link to %s, not to a pseudo-terminal: choose another path, or remove it", path, to)
		}
	}
	tmp := filepath.Join(filepath.Dir(path), fmt.Sprintf(".%s.%d.%d", filepath.Base(path), os.Getpid(), time.Now().UnixNano()))
	if err := os.Symlink(p.name, tmp); err != nil {
		return fmt.Errorf("%s: %w", path, cause(err))
	}
	if err := os.Rename(tmp, path); err != nil {
		os.Remove(tmp)
		return fmt.Errorf("%s: %w", path, cause(err))
	}
	p.link = path
	return nil
}

// cause returns what is below the names of an error of package os.
func cause(err error) error {
	var e unix.Errno
	if errors.As(err, &e) {
		return e
	}
	return err
}

// Close hangs the terminal up, and removes the link if it is still this terminal's.
func (p *Pty) Close() error {
	if p.link != "" {
		if to, err := os.Readlink(p.link); err == nil && to == p.name {
			os.Remove(p.link)
		}
	}
	return p.f.Close()
}
