package daemon

import (
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// queueRoom is how many bytes wait for a standard error that is not read.
	queueRoom = 256 << 10
	// FlushLimit is how long a program that ends may wait until its last lines are read.
	FlushLimit = time.Second
)

// Queue is a writer that never waits, in front of a file descriptor: what does not fit is dropped and counted, line by line. Any goroutine
// may use it.
type Queue struct {
	fd   int
	room int

	mu      sync.Mutex
	lines   [][]byte
	bytes   int
	writing bool   // a goroutine writes
	lost    uint64 // lines
	told    uint64 // of them, by lines in between
	idle    *sync.Cond
}

// stderr is in front of standard error.
var stderr = NewQueue(2, queueRoom)

// Stderr returns the Queue in front of standard error.
func Stderr() *Queue { return stderr }

// NewQueue returns a Queue in front of fd in which up to room bytes wait. It does not own fd.
func NewQueue(fd, room int) *Queue {
	q := &Queue{fd: fd, room: room}
	q.idle = sync.NewCond(&q.mu)
	return q
}

// Write takes a line, or drops it. It does not fail.
func (q *Queue) Write(b []byte) (int, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.bytes+len(b) > q.room {
		q.lost++
		return len(b), nil
	}
	q.lines = append(q.lines, append([]byte(nil), b...))
	q.bytes += len(b)
	if !q.writing {
		q.writing = true
		go q.drain()
	}
	return len(b), nil
}

// Lost returns how many lines were dropped, or could not be written.
func (q *Queue) Lost() uint64 {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.lost
}

// Flush waits until all is written, for limit at most, and tells whether it is.
func (q *Queue) Flush(limit time.Duration) bool {
	late := false
	t := time.AfterFunc(limit, func() {
		q.mu.Lock()
		late = true
		q.mu.Unlock()
		q.idle.Broadcast()
	})
	defer t.Stop()
	q.mu.Lock()
	defer q.mu.Unlock()
	for q.writing && !late {
		q.idle.Wait()
	}
	return !q.writing
}

// drain writes until nothing is left.
func (q *Queue) drain() {
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.lines) > 0 {
		b := q.lines[0]
		q.lines = q.lines[1:]
		lost, before := q.lost, q.told
		q.mu.Unlock()
		if lost != before && q.write([]byte(line("WARN", fmt.Sprintf("%d lines of this log were lost: standard error was not read", lost-before)))) {
			before = lost
		}
		ok := q.write(b)
		q.mu.Lock()
		q.told = before
		q.bytes -= len(b) // not sooner: what is being written takes room too
		if !ok {
			q.lost++
		}
	}
	q.lines = nil
	q.writing = false
	q.idle.Broadcast()
}

// write writes a line, however long that takes. A reader that has left (EPIPE) makes it fail; that raises no signal that ends the
// program, as os.Stderr would.
func (q *Queue) write(b []byte) bool {
	for len(b) > 0 {
		n, err := unix.Write(q.fd, b)
		switch {
		case err == nil:
			b = b[n:]
		case err == unix.EAGAIN: // somebody who shares it made it non-blocking
			fds := []unix.PollFd{{Fd: int32(q.fd), Events: unix.POLLOUT}}
			unix.Poll(fds, -1)
		case err != unix.EINTR:
			return false
		}
	}
	return true
}
