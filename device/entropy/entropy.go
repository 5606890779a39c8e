// Package entropy is the virtio entropy device (virtio 1.2, 5.4): it fills the driver's buffers with random bytes of this machine's
// kernel.
//
// It must not know messages, sockets, or boards.
package entropy

import (
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/device/internal/plain"
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/vring"
)

// DefaultRate is how many bytes a second the driver gets where Config says nothing. A Linux driver asks for 64 bytes a minute.
const DefaultRate = 64 << 10

// Bounds of Config.Rate, in bytes a second.
const (
	MinRate = minCharge
	MaxRate = 1 << 30
)

const (
	// maxFill is how many bytes one buffer gets at most: the device may fill as few as it likes (5.4.6.2).
	maxFill = 4096
	// minCharge is what a buffer counts for at least, in bytes: it limits the requests a second of a driver that asks for
	// one byte at a time.
	minCharge = 64
	queueMax  = 256 // descriptors
	batch     = 32  // buffers filled before the driver is called

	// sourceRetry is how long a source that has nothing yet is left alone.
	sourceRetry = 100 * time.Millisecond
)

// errReadable: the driver put a buffer that the device is to read into the queue (virtio 1.2, 5.4.6.1).
var errReadable = errors.New("a buffer that the device would have to read")

// Config says what an entropy device is to be like.
type Config struct {
	Name   string // "rng0": for errors and status
	Number uint16 // device number on the link
	// Rate is how many bytes a second the driver gets at most, MinRate to MaxRate; 0: DefaultRate. After a time of rest it gets as
	// many as a second's at once.
	Rate uint64
	Deny virtio.Features // features not to be offered
	// Source fills a slice with random bytes without blocking, or fails: with EAGAIN where it has none yet, and is asked again later.
	// nil: getrandom(2).
	Source func([]byte) error
}

// Entropy is the device model.
type Entropy struct {
	n counters // first: 64-bit alignment

	cfg Config
	*plain.Set
	buf [maxFill]byte
	bucket
}

// counters are updated with sync/atomic.
type counters struct {
	Bytes     uint64 // given to the driver
	Requests  uint64 // buffers filled
	Throttled uint64 // times that the driver had to wait for the rate
}

var _ device.Device = (*Entropy)(nil)

// New returns the model. An error names what is wrong with the configuration.
func New(cfg Config) (*Entropy, error) {
	if cfg.Rate == 0 {
		cfg.Rate = DefaultRate
	}
	if cfg.Rate < MinRate || cfg.Rate > MaxRate {
		return nil, fmt.Errorf("%s: a rate of %d bytes a second: %d to %d are possible", cfg.Name, cfg.Rate, MinRate, MaxRate)
	}
	if cfg.Source == nil {
		cfg.Source = getrandom
	}
	e := &Entropy{cfg: cfg, bucket: bucket{rate: cfg.Rate, level: cfg.Rate, now: time.Now}}
	e.Set = plain.New(cfg.Name, 1, e.Queue, e)
	return e, nil
}

// getrandom fills b, or fails with EAGAIN while the kernel's generator is not initialized, early at boot.
func getrandom(b []byte) error {
	for len(b) > 0 {
		n, err := unix.Getrandom(b, unix.GRND_NONBLOCK)
		if err != nil && err != unix.EINTR {
			return fmt.Errorf("getrandom: %w", err)
		}
		if n > 0 {
			b = b[n:]
		}
	}
	return nil
}

// DeviceID implements device.Device.
func (e *Entropy) DeviceID() uint32 { return virtio.IDEntropy }

// Features implements device.Device.
func (e *Entropy) Features() virtio.Features { return possible.Without(e.cfg.Deny) }

// possible are what the model can do.
var possible = plain.Features.Or(virtio.FeaturesOf(virtio.RingPacked))

// SetFeatures implements device.Device.
func (e *Entropy) SetFeatures(f virtio.Features, _ device.Options) error {
	return e.Accept(f, e.Features())
}

// Config implements device.Device: there is none.
func (e *Entropy) Config() []byte { return nil }

// WriteConfig implements device.Device.
func (e *Entropy) WriteConfig(uint32, []byte) error { return device.ErrReadOnly }

// Queue implements device.Device.
func (e *Entropy) Queue(i int) device.QueueInfo {
	q := device.QueueInfo{Name: e.cfg.Name + " requests", ToDriver: true}
	if i == 0 {
		q.Max = queueMax
	}
	return q
}

// Serve implements plain.Model.
func (e *Entropy) Serve(w *plain.Worker) (plain.Next, error) {
	if !w.Enabled() {
		return plain.OnWake, nil
	}
	wait := e.wait(minCharge)
	if wait > 0 {
		atomic.AddUint64(&e.n.Throttled, 1)
		return plain.Next(wait), nil
	}
	chains, spans, err := w.Pop(batch)
	var done [batch]vring.Used
	n, early := 0, false
	for n < len(chains) && e.wait(minCharge) == 0 {
		c := &chains[n]
		if c.Readable > 0 {
			err = fmt.Errorf("%s: descriptor %d: %w", e.cfg.Name, c.ID, errReadable)
			break
		}
		b := e.buf[:e.grant(c.WriteLen)]
		if serr := e.cfg.Source(b); errors.Is(serr, unix.EAGAIN) {
			early = true
			break
		} else if serr != nil {
			err = serr
			break
		}
		rest := b
		for _, s := range spans[c.First : int(c.First)+int(c.Writable)] {
			k := len(rest)
			if uint32(k) > s.Len {
				k = int(s.Len)
			}
			if k == 0 {
				break
			}
			s.CopyIn(0, rest[:k])
			rest = rest[k:]
		}
		done[n] = vring.Used{ID: c.ID, Count: c.Count, Len: uint32(len(b))}
		n++
		atomic.AddUint64(&e.n.Requests, 1)
		atomic.AddUint64(&e.n.Bytes, uint64(len(b)))
	}
	// They are the driver's secrets from here on.
	for i := range e.buf {
		e.buf[i] = 0
	}
	if len(chains) > 0 {
		if serr := w.Settle(done[:n], len(chains)-n); err == nil {
			err = serr
		}
	}
	if err != nil {
		return 0, err
	}
	switch {
	case early:
		return plain.Next(sourceRetry), nil
	case len(chains) == 0:
		return plain.OnKick, nil
	}
	return plain.Again, nil
}

// Status implements device.Device.
func (e *Entropy) Status() status.Device {
	d := status.Device{Name: e.cfg.Name, Type: "entropy", Number: e.cfg.Number, Interface: "the kernel's random numbers",
		Offered: possible.Names(), Allowed: e.Features().Names(),
		Counters: status.Counters(counters{Bytes: atomic.LoadUint64(&e.n.Bytes), Requests: atomic.LoadUint64(&e.n.Requests),
			Throttled: atomic.LoadUint64(&e.n.Throttled)})}
	e.Describe(&d)
	return d
}

// Close implements device.Device.
func (e *Entropy) Close() error { return e.Reset(time.Time{}) }

// bucket holds what may be given at once, up to a second's worth.
type bucket struct {
	rate  uint64 // bytes a second
	level uint64 // bytes
	last  time.Time
	now   func() time.Time
}

// wait returns how long it takes until n bytes may be given, at most rate; 0: now.
func (b *bucket) wait(n uint64) time.Duration {
	now := b.now()
	if past := now.Sub(b.last); b.last.IsZero() || past >= time.Second || past < 0 {
		b.level, b.last = b.rate, now
	} else if more := uint64(past) * b.rate / uint64(time.Second); more > 0 {
		// What a byte's time is left over stays for the next time.
		b.last = b.last.Add(time.Duration(more * uint64(time.Second) / b.rate))
		if b.level += more; b.level > b.rate {
			b.level = b.rate
		}
	}
	if b.level >= n {
		return 0
	}
	return time.Duration((n-b.level)*uint64(time.Second)/b.rate) + 1
}

// grant returns how many of n bytes are given, 1 at least, and takes them. There are minCharge bytes.
func (b *bucket) grant(n uint32) int {
	g := uint64(n)
	if g > maxFill {
		g = maxFill
	}
	if g > b.level {
		g = b.level
	}
	charge := g
	if charge < minCharge {
		charge = minCharge
	}
	b.level -= charge
	return int(g)
}
