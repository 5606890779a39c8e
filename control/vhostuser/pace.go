package vhostuser

import "time"

// A front end may ask for starts of queues and changes of memory without end, and each takes time
// of the kernel: startBurst of them at once, and one each startEvery in the long run. Messages are
// bounded as well.
const (
	startEvery   = 5 * time.Millisecond
	startBurst   = 512
	messageEvery = time.Millisecond
	messageBurst = 4096
)

// bucket keeps something within a rate: burst times at once, once each every in the long run.
type bucket struct {
	every time.Duration
	burst int
	full  time.Time // when the whole burst is there again
}

// take notes that it happens.
func (b *bucket) take(now time.Time) {
	if b.full.Before(now) {
		b.full = now
	}
	b.full = b.full.Add(b.every)
}

// wait returns how long it takes until it may happen; 0: now.
func (b *bucket) wait(now time.Time) time.Duration {
	if b.full.Before(now) {
		return 0
	}
	if d := b.full.Sub(now) - time.Duration(b.burst-1)*b.every; d > 0 {
		return d
	}
	return 0
}
