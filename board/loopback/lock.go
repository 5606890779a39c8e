package loopback

import (
	"fmt"
	"io"
	"time"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/board"
)

const (
	// sideByte is the offset of the lock of side 0 in the memory file; fcntl(2) locks are
	// advisory and independent of the content.
	sideByte = 0
	// pidByte is the offset of a second lock for each side, of the process: nothing
	// depends on it, but F_GETLK tells whose it is, which it cannot of the first.
	pidByte = 16
	// takeover is how long a side may stay locked: the kernel needs a moment to take a large mapping of a
	// killed process apart.
	takeover = 250 * time.Millisecond
)

// sideLock is the lock of one side, held by fd.
type sideLock struct {
	fd  int // the description that the memory is mapped through
	ofd bool
}

// openLock returns a descriptor of the memory for locking and mapping. It owns shm from then on.
func openLock(shm int) sideLock {
	fd, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", shm), unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return sideLock{fd: shm}
	}
	// The two must be one file: /proc could be something else's.
	var a, b unix.Stat_t
	if unix.Fstat(fd, &a) != nil || unix.Fstat(shm, &b) != nil || a.Dev != b.Dev || a.Ino != b.Ino {
		unix.Close(fd)
		return sideLock{fd: shm}
	}
	// Before any lock of the process is taken: this close would drop it.
	unix.Close(shm)
	return sideLock{fd: fd, ofd: true}
}

func byteLock(typ int16, off int64) unix.Flock_t {
	return unix.Flock_t{Type: typ, Whence: io.SeekStart, Start: off, Len: 1}
}

// take locks a side. Where another process holds it, the error is unix.EAGAIN, and pid is that
// process, 0 where it cannot be told.
func (l sideLock) take(s board.Side) (pid int, err error) {
	cmd := unix.F_SETLK
	if l.ofd {
		cmd = unix.F_OFD_SETLK
	}
	for end := time.Now().Add(takeover); ; time.Sleep(5 * time.Millisecond) {
		lk := byteLock(unix.F_WRLCK, sideByte+int64(s))
		err := unix.FcntlFlock(uintptr(l.fd), cmd, &lk)
		if err == nil {
			break
		}
		if err != unix.EAGAIN && err != unix.EACCES && err != unix.EINTR {
			return 0, err
		}
		if time.Now().After(end) {
			return l.holder(s), unix.EAGAIN
		}
	}
	if l.ofd {
		lk := byteLock(unix.F_WRLCK, pidByte+int64(s))
		_ = unix.FcntlFlock(uintptr(l.fd), unix.F_SETLK, &lk) // information only
	}
	return 0, nil
}

// holder returns the process that holds a side, 0 where that cannot be told.
func (l sideLock) holder(s board.Side) int {
	for _, off := range [...]int64{pidByte, sideByte} {
		lk := byteLock(unix.F_WRLCK, off+int64(s))
		if unix.FcntlFlock(uintptr(l.fd), unix.F_GETLK, &lk) == nil && lk.Type != unix.F_UNLCK && lk.Pid > 0 {
			return int(lk.Pid)
		}
	}
	return 0
}

// taken tells whether a side is locked by anyone else than this description (or, without /proc,
// process).
func (l sideLock) taken(s board.Side) (bool, error) {
	cmd := unix.F_GETLK
	if l.ofd {
		cmd = unix.F_OFD_GETLK
	}
	for {
		lk := byteLock(unix.F_WRLCK, sideByte+int64(s))
		err := unix.FcntlFlock(uintptr(l.fd), cmd, &lk)
		if err == unix.EINTR {
			continue
		}
		return lk.Type != unix.F_UNLCK, err
	}
}
