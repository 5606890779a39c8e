package block

import (
	"sync/atomic"
	"time"
)

// pace decides which requests a queue's goroutine serves itself, without the pool: a reader of cached data is answered sooner then, as
// no other goroutine has to be woken. While it serves one, others of its queue wait; so it does that only where nothing else is under
// way, and requests have lately been quick.
type pace struct {
	took int64 // nanoseconds that requests have lately taken, a moving average; with sync/atomic
	off  bool  // never
}

const (
	// quick is how long requests may take on average to be served by the queue's goroutine.
	quick = 100 * time.Microsecond
	// quickLen is how many bytes such a request has at most.
	quickLen = 64 << 10
)

// served notes how long a request took.
func (p *pace) served(d time.Duration) {
	was := atomic.LoadInt64(&p.took)
	if d > 64*quick {
		d = 64 * quick // one that was very slow is forgotten after some tens
	}
	atomic.StoreInt64(&p.took, was+(int64(d)-was)/8) // one that is lost between two goroutines does not matter
}

// quick tells whether a request with so many bytes to read and to write, data and all, is served by the queue's goroutine. Flushes and what else
// has no data never are.
func (p *pace) quick(readLen, writeLen uint32) bool {
	n := readLen + writeLen
	return !p.off && n > 512 && n <= quickLen+64 && time.Duration(atomic.LoadInt64(&p.took)) < quick
}
