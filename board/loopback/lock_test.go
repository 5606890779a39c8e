package loopback

import (
	"testing"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/board"
)

// TestLockLivesWithMapping: as long as memory can be written through a mapping its side stays locked, also
// when the descriptor is closed; other descriptors of the file that are closed do not matter.
func TestLockLivesWithMapping(t *testing.T) {
	shm, err := unix.MemfdCreate("lock", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(shm)
	if err := unix.Ftruncate(shm, MinSize); err != nil {
		t.Fatal(err)
	}
	reopen := func() sideLock {
		fd, err := unix.FcntlInt(uintptr(shm), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		l := openLock(fd)
		if !l.ofd {
			t.Fatal("/proc is missing: a lock of the description wanted")
		}
		return l
	}
	taken := func(l sideLock, s board.Side, want bool) {
		t.Helper()
		if got, err := l.taken(s); got != want || err != nil {
			t.Errorf("side %s taken = %v, %v, want %v", s, got, err, want)
		}
	}
	a, b := reopen(), reopen()
	defer unix.Close(b.fd)
	if _, err := a.take(board.Agent); err != nil {
		t.Fatal(err)
	}
	taken(a, board.Agent, false) // its own
	taken(b, board.Agent, true)
	taken(b, board.Host, false)
	mem, err := unix.Mmap(a.fd, 0, MinSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(reopen().fd)
	taken(b, board.Agent, true)
	unix.Close(a.fd)
	taken(b, board.Agent, true)
	if _, err := b.take(board.Agent); err != unix.EAGAIN {
		t.Errorf("take of a side whose memory is mapped: %v", err)
	}
	if err := unix.Munmap(mem); err != nil {
		t.Fatal(err)
	}
	taken(b, board.Agent, false)
	if _, err := b.take(board.Agent); err != nil {
		t.Errorf("take of a free side: %v", err)
	}
}
