package session

import "time"

// Rate is how often something may happen: Burst times at once, and once each Every in the long run.
type Rate struct {
	Every time.Duration
	Burst int
}

// Pace bounds what a peer may cause, however fast it asks. A zero field means the default: honest
// peers do not come near those.
type Pace struct {
	// Messages are taken at this rate; the others wait in the FIFO. The burst is for the bring-up of
	// many devices. Default: 4096 at once, 1000 a second.
	Messages Rate
	// Breaks are steps towards a link that goes down again. A break costs 4, where the peer's process
	// ended 1. Where none is left the link waits before it shakes hands again, twice as long each
	// time, up to MaxBackoff. Default: 200 at once, 20 a second: 5 breaks, 20 restarts a second.
	Breaks Rate
	// Starts are starts of one device by its driver, each of which takes the kernel's lock of network
	// configuration. Default: 16 at once, 5 a second.
	Starts Rate
	// Changes are changes of one device's configuration that are applied; the last one always is.
	// Default: 2 at once, 10 a second.
	Changes Rate
	// Devices are looks for devices that the other side has added, each of which may be brought up then. Default: 16 at
	// once, 5 a second.
	Devices Rate
}

// The wait before a handshake with a peer that breaks the link again and again, at first and at most.
const (
	minBackoff = 100 * time.Millisecond
	MaxBackoff = 5 * time.Second
)

// What Pace.Breaks is taken for.
const (
	costBreak   = 4 // the link went down
	costRestart = 1 // the same, and the peer's process had ended
	costTry     = 1 // the peer's page was read once more without the link coming up
	freeTries   = 8 // so often that costs nothing
)

// bells is how often the control plane's doorbell is listened to. A ring that comes later than it
// could finds more to do.
var bellRate = Rate{2 * time.Millisecond, 4096}

// bellPause is how long the doorbell is left alone where it rings too often.
const bellPause = 10 * time.Millisecond

// Defaults returns p with the defaults in place of what is zero.
func (p Pace) Defaults() Pace {
	for _, f := range [...]struct {
		r   *Rate
		def Rate
	}{
		{&p.Messages, Rate{time.Millisecond, 4096}},
		{&p.Breaks, Rate{50 * time.Millisecond, 200}},
		{&p.Starts, Rate{200 * time.Millisecond, 16}},
		{&p.Changes, Rate{100 * time.Millisecond, 2}},
		{&p.Devices, Rate{200 * time.Millisecond, 16}},
	} {
		if *f.r == (Rate{}) {
			*f.r = f.def
		}
	}
	return p
}

// Bucket keeps something within a Rate. It belongs to one goroutine.
type Bucket struct {
	rate Rate
	full time.Time // when the whole burst is there again
}

// NewBucket returns a full bucket.
func NewBucket(r Rate) Bucket { return Bucket{rate: r} }

// Wait returns how long it takes until it may happen; 0: now.
func (b *Bucket) Wait(now time.Time) time.Duration {
	if b.full.Before(now) {
		return 0
	}
	d := b.full.Sub(now) - time.Duration(b.rate.Burst-1)*b.rate.Every
	if d < 0 {
		return 0
	}
	return d
}

// Take notes that it happens, n times.
func (b *Bucket) Take(now time.Time, n int) {
	if b.full.Before(now) {
		b.full = now
	}
	b.full = b.full.Add(time.Duration(n) * b.rate.Every)
}

// Skip lets a time not count: nothing is refilled in it.
func (b *Bucket) Skip(now time.Time, d time.Duration) {
	if b.full.After(now) {
		b.full = b.full.Add(d)
	}
}
