package doorbell

import (
	"runtime"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// dozeFor is how long a sleep that follows upon work keeps its place in Go's scheduler (its P). A thread that gave it up, and comes back
// when the whole program was idle, first wakes the runtime's monitor thread and then gets the place back: a third of a ping's time. With the place
// kept, ppoll returns to the loop at once.
const dozeFor = 20 * time.Millisecond

// holders is how many Sleepers with SleeperConfig.Doze are in use: each may need a place at any time, asleep or not.
var holders int32

// Done tells that the Sleeper, of a SleeperConfig with Doze, is not used again.
func (s *Sleeper) Done() {
	if s.holds {
		s.holds = false
		atomic.AddInt32(&holders, -1)
	}
}

// Dozes tells whether the Sleeper was made with SleeperConfig.Doze.
func (s *Sleeper) Dozes() bool { return s.doze }

// Nap waits until the extra descriptor has one of the given events, as the first 20 ms of a Sleep do with SleeperConfig.Doze: with its place in
// Go's scheduler kept. It returns false at once where there is no place to keep, and after that time; the caller then waits in
// another way. It looks at the extra descriptor only.
func (s *Sleeper) Nap(extra int16) (ready bool, err error) {
	s.idle = false
	if !s.mayDoze() {
		return false, nil
	}
	s.fds[2].Fd, s.fds[2].Events = s.extra, extra
	n, err := s.rawPpoll(dozeFor)
	return n > 0, err
}

// mayDoze tells whether the next sleep keeps its place in the scheduler: if there is one for each Sleeper that might, and one more for all
// other goroutines.
//
// Only the runtime of Go's own compiler interrupts a thread that is in a system call when it wants it to stop (for garbage collection).
func (s *Sleeper) mayDoze() bool {
	if !s.doze || runtime.Compiler != "gc" {
		return false
	}
	if !s.holds {
		s.holds = true
		atomic.AddInt32(&holders, 1)
	}
	return !s.idle && atomic.LoadInt32(&holders) < int32(runtime.GOMAXPROCS(0))
}

// ppoll waits for the descriptors for at most d, for ever where d is negative; n is 0 if nothing happened.
func (s *Sleeper) ppoll(d time.Duration) (n int, err error) {
	if d == 0 {
		return s.rawPpoll(0) // does not block
	}
	if s.mayDoze() {
		first := dozeFor
		if d > 0 && d < first {
			first = d
		}
		n, err = s.rawPpoll(first)
		if n > 0 || err != nil || d == first {
			return n, err
		}
		if d > 0 {
			d -= first
		}
	}
	var ts *unix.Timespec
	if d > 0 {
		s.ts = unix.NsecToTimespec(int64(d))
		ts = &s.ts
	}
	for {
		// ppoll leaves the time that remains in ts, so that a signal (the Go runtime preempts by them) does not make the
		// sleep longer.
		n, err = unix.Ppoll(s.fds[:], ts, nil)
		if err != unix.EINTR {
			return n, err
		}
	}
}

// rawPpoll is ppoll without a word to the scheduler.
func (s *Sleeper) rawPpoll(d time.Duration) (int, error) {
	var end time.Time
	if d > 0 {
		end = time.Now().Add(d)
	}
	for {
		s.ts = unix.NsecToTimespec(int64(d))
		n, _, errno := unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&s.fds[0])), uintptr(len(s.fds)), uintptr(unsafe.Pointer(&s.ts)), 0, 0, 0)
		switch errno {
		case 0:
			return int(n), nil
		case unix.EINTR:
			// The runtime may want this goroutine to stop, which it cannot in the system call. It asks every 10 ms, and not everything
			// that speaks Linux's system calls (qemu-user does not) leaves the time that remains in ts.
			runtime.Gosched()
			if d > 0 {
				if d = time.Until(end); d < 0 {
					d = 0
				}
			}
		default:
			return 0, errno
		}
	}
}
