//go:build linux

package models

import (
	"sync"
	"sync/atomic"

	"github.com/boardlink/boardlink/doorbell"
)

// Line is an interrupt with a level, as the kernel gives it to a program by VFIO or UIO: it is taken once, masked, and
// again after Ack if it is still asserted. It is a doorbell.Waiter.
type Line struct {
	n LineCounters // first: 64-bit alignment

	mu     sync.Mutex
	e      *doorbell.Eventfd
	level  bool
	masked bool
	cut    bool
}

// LineCounters of a Line.
type LineCounters struct {
	Taken uint64 // interrupts that reached the program
	Lost  uint64 // that a cut kept away
}

// NewLine makes a line that is not asserted.
func NewLine() (*Line, error) {
	e, err := doorbell.NewEventfd()
	if err != nil {
		return nil, err
	}
	return &Line{e: e}, nil
}

// Set asserts the line or not.
func (l *Line) Set(level bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.level = level
	l.fire()
}

// fire takes the interrupt where it is due.
func (l *Line) fire() {
	if !l.level || l.masked {
		return
	}
	if l.cut {
		atomic.AddUint64(&l.n.Lost, 1)
		return
	}
	l.masked = true
	atomic.AddUint64(&l.n.Taken, 1)
	l.e.Ring()
}

// Cut keeps interrupts away from the program, or lets them through again: a broken wire. What was lost meanwhile
// stays lost until the line is set again.
func (l *Line) Cut(on bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cut = on
}

// Counters returns what was counted.
func (l *Line) Counters() LineCounters {
	return LineCounters{Taken: atomic.LoadUint64(&l.n.Taken), Lost: atomic.LoadUint64(&l.n.Lost)}
}

// FD implements doorbell.Waiter.
func (l *Line) FD() int { return l.e.FD() }

// Ack implements doorbell.Waiter: it unmasks the line.
func (l *Line) Ack() (uint64, error) {
	n, err := l.e.Ack()
	if err != nil {
		return 0, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if n > 0 {
		l.masked = false
		l.fire()
	}
	return n, nil
}

// Close gives the descriptor back.
func (l *Line) Close() error { return l.e.Close() }
