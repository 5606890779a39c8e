package doorbell

import (
	"errors"
	"sync/atomic"
)

// Ringer notifies the other side. Ring is called by one goroutine at a time and does not
// block; earlier stores to the shared memory are visible to the other side before it
// is notified (the implementation holds the store fence that its memory needs).
//
// An error of Ring means that this notification may be lost: the peer finds the work by its
// poll fallback. It is to be counted (see Counted), and is no reason to stop.
type Ringer interface {
	Ring() error
}

// NoWaitRinger is a Ringer over something that the peer shares, and could make block.
type NoWaitRinger interface {
	Ringer
	// RingNoWait is Ring that cannot block, whatever the peer does. It takes longer: it is not for data loops, whose
	// rings that block are freed by a watchdog.
	RingNoWait() error
}

// NoWait returns a Ringer for a thread that must live on (a control plane, a stop path): its Ring is r's RingNoWait, or
// Ring where there is none, as nothing is shared with the peer then.
func NoWait(r Ringer) Ringer {
	if n, ok := r.(NoWaitRinger); ok {
		return noWait{n}
	}
	return r
}

type noWait struct{ r NoWaitRinger }

func (n noWait) Ring() error { return n.r.RingNoWait() }

// Waiter is the end that is rung.
type Waiter interface {
	// FD returns the file descriptor that polls readable when rung, or -1 where
	// nothing can be waited for: the loop polls. It stays open at least
	// until every loop that sleeps on it has stopped.
	FD() int
	// Ack takes the pending rings (and re-enables the interrupt where the kind
	// needs it) and returns their number, 0 where there were none. It does not block.
	Ack() (uint64, error)
}

// ErrClosed is returned when a doorbell is used after its Close.
var ErrClosed = errors.New("doorbell: closed")

// None is the Waiter that is never rung: its owner lives on polling alone.
var None Waiter = none{}

type none struct{}

func (none) FD() int              { return -1 }
func (none) Ack() (uint64, error) { return 0, nil }

// Counters counts notifications. Its fields are updated with sync/atomic, once for each
// ring or sleep; read them with Snapshot. It must be allocated on its own or stand first in its struct
// (64-bit alignment on 32-bit machines). Several Sleepers and ringers may share one.
type Counters struct {
	Rings      uint64 `json:"rings"`       // sent, as far as this side can know
	RingErrors uint64 `json:"ring_errors"` // could not be sent
	Sleeps     uint64 `json:"sleeps"`      // times a loop went to sleep
	Wakeups    uint64 `json:"wakeups"`     // sleeps that a ring ended
	Spurious   uint64 `json:"spurious"`    // of these, how many found no work
	Timeouts   uint64 `json:"timeouts"`    // sleeps that the poll fallback ended
	Rescued    uint64 `json:"rescued"`     // of these, how many found work that should have been rung for
	Polled     uint64 `json:"polled"`      // of these, how many found work where no doorbell is wired at all
}

// Snapshot returns the present counts, each read once; they need not be of one instant.
func (c *Counters) Snapshot() Counters {
	return Counters{
		Rings:      atomic.LoadUint64(&c.Rings),
		RingErrors: atomic.LoadUint64(&c.RingErrors),
		Sleeps:     atomic.LoadUint64(&c.Sleeps),
		Wakeups:    atomic.LoadUint64(&c.Wakeups),
		Spurious:   atomic.LoadUint64(&c.Spurious),
		Timeouts:   atomic.LoadUint64(&c.Timeouts),
		Rescued:    atomic.LoadUint64(&c.Rescued),
		Polled:     atomic.LoadUint64(&c.Polled),
	}
}

// Counted is a Ringer that counts its rings and errors in C.
type Counted struct {
	R Ringer
	C *Counters
}

// Ring rings R and counts it.
func (r *Counted) Ring() error {
	if err := r.R.Ring(); err != nil {
		atomic.AddUint64(&r.C.RingErrors, 1)
		return err
	}
	atomic.AddUint64(&r.C.Rings, 1)
	return nil
}
