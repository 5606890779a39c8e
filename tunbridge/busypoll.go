package tunbridge

import "time"

// MaxBusyPoll is the longest time that a loop busy-polls by its own choice before it sleeps: about the
// cost of the two wake-ups of a question and its answer.
const MaxBusyPoll = 60 * time.Microsecond

// minBusyPoll is the shortest adaptive budget; below it busy-polling is off.
const minBusyPoll = 8 * time.Microsecond

// The direction that a loop served last predicts what comes next: an answer comes soon, a question at any time.
// Each has a budget of its own.
const (
	received = iota // frames moved from the ring to the interface, and none came back
	sent            // frames moved from the interface to the ring
	occasions
)

// After maxFruitless busy-polls of MaxBusyPoll in a row that found nothing, each followed by a short
// sleep, the peer lacks a processor while this side polls: then restSleeps sleeps go without.
const (
	maxFruitless = 3
	restSleeps   = 100
)

// busyPoll decides how long a loop busy-polls before it sleeps. The budget doubles after a sleep that was
// shorter than MaxBusyPoll and halves after a longer one, as Linux polls before it halts a
// processor (haltpoll).
type busyPoll struct {
	fixed     time.Duration // as configured; 0: adaptive, negative: off
	budget    [occasions]time.Duration
	fruitless [occasions]int // busy-polls of MaxBusyPoll in a row that found nothing
	rest      [occasions]int // sleeps left until the next try
	last      int            // occasion
}

func (b *busyPoll) set(d time.Duration) { b.fixed = d }

// next returns how long to busy-poll now. A poll that is a read across the bus is never spent by choice.
func (b *busyPoll) next(across bool) time.Duration {
	if b.fixed != 0 {
		return b.fixed // negative: not at all
	}
	if across {
		return 0
	}
	return b.budget[b.last]
}

// found notes a busy-poll that found work.
func (b *busyPoll) found() { b.fruitless[b.last] = 0 }

// slept notes a sleep of length d and whether an event ended it. If next was not 0, a fruitless
// busy-poll came before it.
func (b *busyPoll) slept(d time.Duration, woken bool) {
	c, short := &b.budget[b.last], woken && d < MaxBusyPoll
	switch {
	case b.rest[b.last] > 0:
		b.rest[b.last]--
	case short && *c == MaxBusyPoll:
		if b.fruitless[b.last]++; b.fruitless[b.last] == maxFruitless {
			*c, b.fruitless[b.last], b.rest[b.last] = 0, 0, restSleeps
		}
	case short:
		if *c *= 2; *c < minBusyPoll {
			*c = minBusyPoll
		}
		if *c > MaxBusyPoll {
			*c = MaxBusyPoll
		}
	default:
		if *c /= 2; *c < minBusyPoll {
			*c = 0
		}
	}
}
