package console

import "sync"

// buffer is a bounded queue of bytes between a goroutine of the end and one of a virtqueue. bell, if not nil, is rung when bytes come
// (rings of the one who takes) or when there is room again (of the one who puts).
type buffer struct {
	mu     sync.Mutex
	ring   []byte
	at, n  int  // the bytes are ring[at:at+n], round the end
	wait   bool // put waits for room; else it drops the oldest bytes
	closed bool
	change *sync.Cond
	came   func() // bytes were put
	went   func() // bytes were taken
}

func newBuffer(size int, came, went func()) *buffer {
	b := &buffer{ring: make([]byte, size), came: came, went: went}
	b.change = sync.NewCond(&b.mu)
	return b
}

// put adds all of p. It returns how many bytes were dropped for lack of room: older ones, or the first ones of p, or what
// was left of p when the buffer was closed.
func (b *buffer) put(p []byte) (dropped int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for len(p) > 0 {
		if b.closed {
			return dropped + len(p)
		}
		room := len(b.ring) - b.n
		if room == 0 && b.wait {
			b.change.Wait()
			continue
		}
		if room < len(p) && !b.wait {
			if over := len(p) - len(b.ring); over > 0 {
				p, dropped = p[over:], dropped+over
			}
			if over := len(p) - room; over > 0 {
				b.skip(over)
				room, dropped = room+over, dropped+over
			}
		}
		k := len(p)
		if k > room {
			k = room
		}
		end := (b.at + b.n) % len(b.ring)
		c := copy(b.ring[end:], p[:k])
		copy(b.ring, p[c:k])
		b.n += k
		p = p[k:]
		b.change.Broadcast()
		b.came()
	}
	return dropped
}

// skip drops the k oldest bytes.
func (b *buffer) skip(k int) { b.at, b.n = (b.at+k)%len(b.ring), b.n-k }

// take moves the first bytes to p, 0 where there are none.
func (b *buffer) take(p []byte) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.takeLocked(p)
}

func (b *buffer) takeLocked(p []byte) int {
	if len(p) > b.n {
		p = p[:b.n]
	}
	c := copy(p, b.ring[b.at:])
	copy(p[c:], b.ring)
	if len(p) > 0 {
		b.skip(len(p))
		b.change.Broadcast()
		b.went()
	}
	return len(p)
}

// await is take that waits; 0: the buffer is closed.
func (b *buffer) await(p []byte) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	for b.n == 0 && !b.closed {
		b.change.Wait()
	}
	if b.closed {
		return 0
	}
	return b.takeLocked(p)
}

// room returns how many bytes fit.
func (b *buffer) room() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.ring) - b.n
}

// setWait says whether put waits for room.
func (b *buffer) setWait(on bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.wait = on
	b.change.Broadcast()
}

func (b *buffer) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	b.change.Broadcast()
}
