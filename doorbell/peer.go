package doorbell

import (
	"bytes"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

var (
	// ErrNoEventfd is returned by FromPeer for a descriptor that is no eventfd.
	ErrNoEventfd = errors.New("it is no eventfd")
	// ErrSemaphore is returned by FromPeer for an eventfd of which each read takes one ring only: a peer that fills its counter once
	// would keep the loop that waits for it awake for ever.
	ErrSemaphore = errors.New("it is an eventfd that counts down (EFD_SEMAPHORE), or others take its rings")
)

// IsEventfd tells whether fd is an eventfd. It asks /proc only: never the file, whose file system may not answer. Where there is no
// /proc, it is false.
func IsEventfd(fd int) bool {
	l, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	return err == nil && l == "anon_inode:[eventfd]"
}

// FromPeer is FromFD for a descriptor that a peer chose. waited tells that this side waits for its rings, and does not ring: then it
// may not be a semaphore. Errors match ErrNoEventfd or ErrSemaphore, and leave fd the caller's.
func FromPeer(fd int, waited bool) (*Eventfd, error) {
	if !IsEventfd(fd) {
		return nil, fmt.Errorf("doorbell: fd %d: %w, or /proc is not mounted, which tells", fd, ErrNoEventfd)
	}
	if waited {
		counts, known := semaphore(fd)
		if !known {
			counts = !takesAll(fd)
		}
		if counts {
			return nil, fmt.Errorf("doorbell: fd %d: %w", fd, ErrSemaphore)
		}
	}
	return FromFD(fd)
}

// semaphore tells what the kernel says of the eventfd fd. known is false where it says nothing (before Linux 6.5).
func semaphore(fd int) (counts, known bool) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", fd))
	if err != nil {
		return false, false
	}
	const name = "\neventfd-semaphore:"
	i := bytes.Index(b, []byte(name))
	if i < 0 {
		return false, false
	}
	line := b[i+len(name):]
	if j := bytes.IndexByte(line, '\n'); j >= 0 {
		line = line[:j]
	}
	return string(bytes.TrimSpace(line)) != "0", true
}

// takesAll rings the eventfd fd twice and tells whether one read takes both, together with what was pending: then it is no semaphore.
// A few rings that somebody else takes are forgiven.
func takesAll(fd int) bool {
	d, err := unix.Dup(fd) // not F_DUPFD: qemu-user loses the byte order of an eventfd by it
	if err != nil {
		return false
	}
	e, err := FromFD(d)
	if err != nil {
		_ = unix.Close(d)
		return false
	}
	defer e.Close()
	for i := 0; i < 3; i++ {
		for j := 0; j < 2; j++ {
			if e.Ring() != nil { // the watchdog frees one that blocks
				return false
			}
		}
		if n, err := e.Ack(); err != nil || n != 0 {
			return err == nil && n > 1
		}
	}
	return false
}
