//go:build linux

package benchkit

import (
	"errors"
	"fmt"
	"runtime"
	"time"

	"github.com/boardlink/boardlink/mmio"
	"golang.org/x/sys/unix"
)

// LineBytes is what a Line takes of the shared memory: two words, each on cache lines of its own, whatever the prefetcher fetches
// beside them.
const LineBytes = 512

const ping, pong = 0, 256

// Line passes a cache line to and fro between two sides, of one process or of two, that share memory. One side leads, the
// other echoes; both call the same methods in the same order.
type Line struct {
	ram          mmio.RAM
	mine, theirs uint64
	lead         bool
	sent, seen   uint32
	// Late, if not nil, is asked now and then while the other side lets this one wait; its error ends that.
	Late func() error
}

// NewLine returns a side. ram is shared by both, zeroed, LineBytes long at least, and lies on a cache line's boundary.
func NewLine(ram mmio.RAM, lead bool) *Line {
	l := &Line{ram: ram, mine: ping, theirs: pong, lead: lead}
	if !lead {
		l.mine, l.theirs = pong, ping
	}
	return l
}

// Meet returns when both sides have called it.
func (l *Line) Meet() error {
	_, err := l.trips(1)
	return err
}

// RoundTrips passes the line n times to and fro and returns the nanoseconds of one round trip. The sides meet first.
func (l *Line) RoundTrips(n int) (float64, error) {
	if _, err := l.trips(10); err != nil {
		return 0, err
	}
	took, err := l.trips(n)
	return float64(took.Nanoseconds()) / float64(n), err
}

func (l *Line) trips(n int) (time.Duration, error) {
	began := time.Now()
	for i := 0; i < n; i++ {
		if l.lead {
			l.Send()
		}
		if err := l.Await(); err != nil {
			return 0, err
		}
		if !l.lead {
			l.Send()
		}
	}
	return time.Since(began), nil
}

// Send passes the line to the other side. Send and Await take turns: the side that leads sends first.
func (l *Line) Send() {
	l.sent++
	l.ram.Publish32(l.mine, l.sent)
}

// Await returns when the other side has passed the line.
func (l *Line) Await() error {
	l.seen++
	for i := 1; l.ram.Consume32(l.theirs) != l.seen; i++ {
		if i&(1<<16-1) == 0 && l.Late != nil {
			if err := l.Late(); err != nil {
				return err
			}
		}
	}
	return nil
}

const (
	chunks, chunk = 40, 250 // of round trips: others disturb some of the chunks
	probeTime     = 400 * time.Millisecond
)

var errProbe = errors.New("the processors are too busy")

// RoundTrip measures a cache line's way between two processors and back, in nanoseconds: the median of many short
// measurements by two threads that spin. It takes one to five milliseconds, and gives up after 400.
func RoundTrip(a, b int) (float64, error) {
	if a == b {
		return 0, fmt.Errorf("processor %d: two are needed", a)
	}
	mem, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
	if err != nil {
		return 0, fmt.Errorf("mmap: %w", err)
	}
	defer unix.Munmap(mem)
	ram, _ := mmio.FromBytes(mem).RAM()
	if old := runtime.GOMAXPROCS(0); old < 2 { // both spin
		runtime.GOMAXPROCS(2)
		defer runtime.GOMAXPROCS(old)
	}
	deadline := time.Now().Add(probeTime)
	side := func(cpu int, lead bool) (all []float64, err error) {
		unpin, err := Pin(cpu)
		if err != nil {
			return nil, err
		}
		defer unpin()
		l := NewLine(ram, lead)
		l.Late = func() error {
			if time.Now().After(deadline) {
				return errProbe
			}
			return nil
		}
		for i := 0; i < chunks; i++ {
			ns, err := l.RoundTrips(chunk)
			if err != nil {
				return all, err
			}
			all = append(all, ns)
		}
		return all, nil
	}
	other := make(chan error)
	go func() {
		_, err := side(b, false)
		other <- err
	}()
	all, err := side(a, true)
	if oerr := <-other; err == nil {
		err = oerr
	}
	if len(all) >= chunks/4 {
		return Median(all), nil
	}
	return 0, err
}
