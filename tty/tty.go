// Package tty makes pseudo-terminals, and sets terminals up: raw mode, window size.
//
// It must not know what is said on a terminal.
package tty

import (
	"os"

	"golang.org/x/sys/unix"
)

// Size is the size of a terminal in characters; 0: unknown.
type Size struct{ Cols, Rows uint16 }

// IsTerminal tells whether f is a terminal.
func IsTerminal(f *os.File) bool {
	_, err := getMode(f)
	return err == nil
}

// SizeOf returns the size of terminal f.
func SizeOf(f *os.File) (s Size, err error) {
	err = control(f, func(fd int) error {
		w, err := unix.IoctlGetWinsize(fd, unix.TIOCGWINSZ)
		if err == nil {
			s = Size{w.Col, w.Row}
		}
		return err
	})
	return s, err
}

// Mode is how a terminal treats what passes through it.
type Mode struct{ t unix.Termios }

// Raw returns the mode in which a terminal passes every byte on as it is, without an echo (cfmakeraw(3)).
func (m Mode) Raw() Mode {
	t := &m.t
	t.Iflag &^= unix.IGNBRK | unix.BRKINT | unix.PARMRK | unix.ISTRIP | unix.INLCR | unix.IGNCR | unix.ICRNL | unix.IXON
	t.Oflag &^= unix.OPOST
	t.Lflag &^= unix.ECHO | unix.ECHONL | unix.ICANON | unix.ISIG | unix.IEXTEN
	t.Cflag &^= unix.CSIZE | unix.PARENB
	t.Cflag |= unix.CS8
	t.Cc[unix.VMIN], t.Cc[unix.VTIME] = 1, 0
	return m
}

// MakeRaw puts terminal f into raw mode, and returns the mode that it had.
func MakeRaw(f *os.File) (before Mode, err error) {
	if before, err = getMode(f); err != nil {
		return before, err
	}
	return before, SetMode(f, before.Raw())
}

// SetMode sets the mode of terminal f.
func SetMode(f *os.File, m Mode) error {
	return control(f, func(fd int) error { return unix.IoctlSetTermios(fd, unix.TCSETS, &m.t) })
}

func getMode(f *os.File) (m Mode, err error) {
	err = control(f, func(fd int) error {
		t, err := unix.IoctlGetTermios(fd, unix.TCGETS)
		if err == nil {
			m.t = *t
		}
		return err
	})
	return m, err
}

// control calls do with the descriptor of f. File.Fd would make it block.
func control(f *os.File, do func(fd int) error) error {
	c, err := f.SyscallConn()
	if err != nil {
		return err
	}
	if cerr := c.Control(func(fd uintptr) { err = do(int(fd)) }); cerr != nil {
		return cerr
	}
	return err
}
