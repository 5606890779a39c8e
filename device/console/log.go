package console

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/status"
)

// rotated is how often it is looked whether a log file was moved away or removed.
const rotated = time.Second

// logName is that of the log file among the terminals.
const logName = "log"

// logFile keeps what a board prints in a file. It reads as a terminal does, so a file system that is slow or full holds nobody up.
type logFile struct {
	path string
	logf func(format string, args ...interface{})
	t    *Terminal
	done chan struct{}

	f      *os.File
	looked time.Time // when it was looked for last

	mu      sync.Mutex // guards what follows
	lastErr error      // nil: the last write succeeded
	lost    uint64     // bytes
	written uint64
}

// Log appends all that the board prints to a file, from what is kept on, until Close. A file that is moved away or removed is made anew. logf
// hears when the file cannot be written, once until it can, and how many bytes are missing then.
func (c *Console) Log(path string, logf func(format string, args ...interface{})) error {
	l := &logFile{path: path, logf: logf, done: make(chan struct{})}
	if err := l.open(); err != nil {
		return err
	}
	l.t = c.Attach(logName, -1)
	c.mu.Lock()
	c.joined = append(c.joined, l)
	c.mu.Unlock()
	go l.run()
	return nil
}

// open opens the file. It does not wait for a reader of a pipe.
func (l *logFile) open() error {
	f, err := os.OpenFile(l.path, os.O_WRONLY|os.O_APPEND|os.O_CREATE|unix.O_NONBLOCK|unix.O_NOCTTY, 0o640)
	if err != nil {
		return err
	}
	l.f, l.looked = f, time.Now()
	return nil
}

func (l *logFile) run() {
	defer close(l.done)
	buf := make([]byte, 64<<10)
	for {
		n, lost, err := l.t.Read(buf)
		if err != nil {
			break
		}
		if lost > 0 {
			l.write([]byte(fmt.Sprintf("\n[boardlink: %d bytes are missing here]\n", lost)), lost)
		}
		l.write(buf[:n], 0)
	}
	l.t.Close()
	if l.f != nil {
		l.f.Close()
	}
}

// write appends b. missing bytes were lost before.
func (l *logFile) write(b []byte, missing uint64) {
	err := l.follow()
	n := 0
	if err == nil {
		n, err = l.f.Write(b)
	}
	l.mu.Lock()
	told, gone := l.lastErr, l.lost
	l.lastErr = err
	l.written += uint64(n)
	l.lost += missing
	if missing == 0 {
		l.lost += uint64(len(b) - n)
	}
	l.mu.Unlock()
	switch {
	case err != nil && told == nil:
		l.logf("the console's log %s cannot be written: %v; what comes until it can is missing in it", l.path, reason(err))
	case err == nil && told != nil:
		l.logf("the console's log %s is written again; %d bytes are missing in it", l.path, gone)
	}
}

// follow opens the file anew where it is not open, or not at its path any more.
func (l *logFile) follow() error {
	if l.f != nil && time.Since(l.looked) < rotated {
		return nil
	}
	l.looked = time.Now()
	if l.f != nil {
		at, err := os.Stat(l.path)
		is, err2 := l.f.Stat()
		if err == nil && err2 == nil && os.SameFile(at, is) {
			return nil
		}
		l.f.Close()
		l.f = nil
	}
	return l.open()
}

// reason returns what is below the path in an error of package os.
func reason(err error) error {
	var e *os.PathError
	if errors.As(err, &e) {
		return e.Err
	}
	return err
}

func (l *logFile) close(limit time.Duration) {
	t := time.NewTimer(limit)
	defer t.Stop()
	select {
	case <-l.done:
	case <-t.C: // a file system that does not answer: the goroutine is left to it
	}
}

func (l *logFile) describe(d *status.Device) {
	l.mu.Lock()
	defer l.mu.Unlock()
	d.Counters["log_bytes"], d.Counters["log_lost"] = l.written, l.lost
	if l.lastErr != nil {
		d.Notes = append(d.Notes, fmt.Sprintf("the log %s cannot be written: %v", l.path, reason(l.lastErr)))
	}
}
