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

// dozers is how many Sleepers of this process doze now.
var dozers int32

// mayDoze takes a place in the scheduler, unless it is the last: one is left for all other goroutines. Undone by doneDozing.
//
// Only the runtime of Go's own compiler interrupts a thread that is in a system call when it wants it to stop (for garbage collection).
func (s *Sleeper) mayDoze() bool {
	if s.idle || runtime.Compiler != "gc" {
		return false
	}
	if atomic.AddInt32(&dozers, 1) < s.places {
		return true
	}
	doneDozing()
	return false
}

func doneDozing() { atomic.AddInt32(&dozers, -1) }

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
		doneDozing()
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
	s.ts = unix.NsecToTimespec(int64(d))
	for {
		n, _, errno := unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&s.fds[0])), uintptr(len(s.fds)), uintptr(unsafe.Pointer(&s.ts)), 0, 0, 0)
		switch errno {
		case 0:
			return int(n), nil
		case unix.EINTR:
			// The runtime may want this goroutine to stop, which it cannot in the system call.
			runtime.Gosched()
		default:
			return 0, errno
		}
	}
}
