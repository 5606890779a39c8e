// Package entropy drives a virtio entropy device (virtio 1.2, 5.4): it asks for random bytes when the device comes up and from time
// to time, and mixes them into the random number generator of this machine's kernel.
//
// It must not know messages, sockets, or boards.
package entropy

import (
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/driver"
	"github.com/boardlink/boardlink/driver/internal/plain"
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/vring"
)

const (
	// Request is how many bytes are asked for at once, twice what a generator of 256 bits needs.
	Request = 64
	// DefaultInterval is the time between two requests.
	DefaultInterval = time.Minute
	// MaxCredit is the most that a byte can be credited for, in bits.
	MaxCredit = 8
)

// errEmpty: the device returned a buffer without a byte in it (virtio 1.2, 5.4.6.2).
var errEmpty = errors.New("the host returns a buffer without a random byte")

// Config says how an entropy device is used.
type Config struct {
	Name   string // "rng0": for errors and status
	Number uint16 // device number on the link
	// Credit is how many bits of entropy each byte counts for, 0 to MaxCredit. With 0 the bytes are mixed in, and the kernel
	// waits for other sources until it takes its generator for initialized.
	Credit   int
	Interval time.Duration   // 0: DefaultInterval
	Deny     virtio.Features // features not to be accepted
	// Pool is what the bytes are mixed into; nil: the kernel's generator.
	Pool Pool
}

// Pool is a random number generator.
type Pool interface {
	// Mix adds b, which counts for so many bits of entropy.
	Mix(b []byte, bits int) error
	Close() error
}

// Entropy drives one entropy device.
type Entropy struct {
	n counters // first: 64-bit alignment

	cfg Config
	*plain.Base
}

// counters are updated with sync/atomic.
type counters struct {
	Bytes    uint64 // mixed in
	Bits     uint64 // credited
	Requests uint64 // answered
}

var _ driver.Driver = (*Entropy)(nil)

// New returns the driver. An error names what is wrong with the configuration, or that the kernel does not let this program
// credit entropy.
func New(cfg Config) (*Entropy, error) {
	if cfg.Credit < 0 || cfg.Credit > MaxCredit {
		return nil, fmt.Errorf("%s: a credit of %d bits for a byte: 0 to %d are possible", cfg.Name, cfg.Credit, MaxCredit)
	}
	if cfg.Interval <= 0 {
		cfg.Interval = DefaultInterval
	}
	joined := "a pool of the caller"
	if cfg.Pool == nil {
		k, err := openKernel(cfg.Credit > 0)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", cfg.Name, err)
		}
		cfg.Pool, joined = k, k.path
	}
	return &Entropy{cfg: cfg, Base: plain.New(plain.Config{Name: cfg.Name, Type: "entropy", Number: cfg.Number, DeviceID: virtio.IDEntropy,
		Queues: 1, Features: plain.Features.Without(cfg.Deny), Joined: joined})}, nil
}

// Up implements driver.Driver.
func (e *Entropy) Up(t driver.Transport, m driver.Layout, broken func(error)) error {
	return e.Base.Up(t, m, broken, func(s *plain.Session) error {
		q, err := s.Queue(0, "requests", 2, Request, true, nil)
		if err != nil {
			return err
		}
		s.Loop(func() error { return e.feed(q, s) })
		return nil
	})
}

// feed asks for random bytes, one request at a time.
func (e *Entropy) feed(q *plain.Queue, s *plain.Session) error {
	var buf [Request]byte
	var done [1]vring.Completion
	for {
		if err := q.Offer(q.Read(0)); err != nil {
			return err
		}
		for {
			n, err := q.Reap(done[:])
			q.Sleep.Found(n > 0)
			if err != nil {
				return err
			}
			if n > 0 {
				break
			}
			if pending, err := q.ArmCall(); err != nil {
				return err
			} else if pending {
				continue
			}
			if why, err := q.Sleep.Sleep(0); err != nil || why&doorbell.Stopped != 0 {
				return err
			}
		}
		b := buf[:done[0].Len] // at most what was asked for
		if len(b) == 0 {
			return fmt.Errorf("%s: %w", e.cfg.Name, errEmpty)
		}
		q.Buffers[0].CopyOut(b, 0)
		bits := len(b) * e.cfg.Credit
		if err := e.cfg.Pool.Mix(b, bits); err != nil {
			return fmt.Errorf("%s: %w", e.cfg.Name, err)
		}
		for i := range buf {
			buf[i] = 0
		}
		atomic.AddUint64(&e.n.Bytes, uint64(len(b)))
		atomic.AddUint64(&e.n.Bits, uint64(bits))
		atomic.AddUint64(&e.n.Requests, 1)
		if s.Pause(e.cfg.Interval) {
			return nil
		}
	}
}

// Status implements driver.Driver.
func (e *Entropy) Status() status.Device {
	d := e.Describe()
	for k, v := range status.Counters(counters{Bytes: atomic.LoadUint64(&e.n.Bytes), Bits: atomic.LoadUint64(&e.n.Bits),
		Requests: atomic.LoadUint64(&e.n.Requests)}) {
		d.Counters[k] = v
	}
	return d
}

// Close implements driver.Driver.
func (e *Entropy) Close() error {
	e.Down()
	return e.cfg.Pool.Close()
}
