package fn

import (
	"fmt"
	"math/bits"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/pci"
)

// Cause is a register that tells which doorbells are rung, and how it is cleared.
type Cause interface {
	// Pending returns the doorbells that are rung, a bit for each vector. ok is false where the register reads
	// as all-ones: nobody answered.
	Pending() (bits uint32, ok bool)
	// Clear clears them in the register.
	Clear(bits uint32)
}

// Demux shares one level interrupt among the vectors whose doorbells it stands for: a goroutine takes the
// interrupt, clears the doorbells and rings a local eventfd for each.
type Demux struct {
	n DemuxCounters // first: 64-bit alignment

	line  doorbell.Waiter
	cause Cause
	logf  func(format string, args ...interface{})
	spec  string
	out   []*doorbell.Eventfd
	stop  *doorbell.Eventfd
	done  chan struct{}
}

// DemuxCounters of a Demux, updated with sync/atomic.
type DemuxCounters struct {
	Interrupts uint64 // taken
	Spurious   uint64 // of these, without a doorbell of ours: a shared line
	Rings      uint64 // passed on
	Stuck      uint64 // held back: their doorbells stayed rung however often they were cleared
	Dead       uint64 // the register read as all-ones
}

const (
	// again is how often in one interrupt doorbells that are rung anew are taken at once.
	again = 4
	// loud is after how many interrupts in a row that did not go quiet a doorbell counts as stuck.
	loud = 64
	// pause is how long the line of a stuck doorbell, or of a board that does not answer, waits: an
	// interrupt that never ends must not take the processor.
	pause = 10 * time.Millisecond
)

// NewDemux starts it. It does not own line. Close it before what the cause's registers lie in goes.
func NewDemux(spec string, line doorbell.Waiter, cause Cause, vectors int, logf func(string, ...interface{})) (*Demux, error) {
	if vectors < 1 || vectors > 32 {
		return nil, fmt.Errorf("%s: %d doorbells on one interrupt: 1 to 32 are possible", spec, vectors)
	}
	d := &Demux{spec: spec, line: line, cause: cause, logf: logf, done: make(chan struct{})}
	if d.logf == nil {
		d.logf = func(string, ...interface{}) {}
	}
	for i := 0; i <= vectors; i++ {
		e, err := doorbell.NewEventfd()
		if err != nil {
			d.closeFDs()
			return nil, err
		}
		d.out = append(d.out, e)
	}
	d.stop, d.out = d.out[vectors], d.out[:vectors]
	go func() {
		defer close(d.done)
		// A board that is pulled faults at its registers; the poll fallback carries on, and the owner
		// finds out by the function's events.
		if err := pci.Guard(d.run); err != nil {
			d.logf("%s: no interrupts any more: %v", spec, err)
		}
	}()
	return d, nil
}

// Waiters returns the ends of the vectors, valid until Close.
func (d *Demux) Waiters() []doorbell.Waiter {
	l := make([]doorbell.Waiter, len(d.out))
	for i, e := range d.out {
		l[i] = e
	}
	return l
}

// Counters returns what was counted.
func (d *Demux) Counters() DemuxCounters {
	return DemuxCounters{
		Interrupts: atomic.LoadUint64(&d.n.Interrupts), Spurious: atomic.LoadUint64(&d.n.Spurious),
		Rings: atomic.LoadUint64(&d.n.Rings), Stuck: atomic.LoadUint64(&d.n.Stuck), Dead: atomic.LoadUint64(&d.n.Dead),
	}
}

// Close ends it and closes the ends of the vectors.
func (d *Demux) Close() error {
	d.stop.Ring()
	<-d.done
	d.closeFDs()
	return nil
}

func (d *Demux) closeFDs() {
	for _, e := range d.out {
		e.Close()
	}
	if d.stop != nil {
		d.stop.Close()
	}
}

func (d *Demux) run() {
	fds := []unix.PollFd{{Fd: int32(d.line.FD()), Events: unix.POLLIN}, {Fd: int32(d.stop.FD()), Events: unix.POLLIN}}
	told, row := false, 0
	for {
		fds[0].Revents, fds[1].Revents = 0, 0
		if _, err := unix.Poll(fds, -1); err == unix.EINTR {
			continue
		} else if err != nil {
			d.logf("%s: no interrupts any more: poll: %v", d.spec, err)
			return
		}
		if fds[1].Revents != 0 {
			return
		}
		if fds[0].Revents&(unix.POLLERR|unix.POLLHUP|unix.POLLNVAL) != 0 {
			d.logf("%s: no interrupts any more: the interrupt's descriptor is lost", d.spec)
			return
		}
		atomic.AddUint64(&d.n.Interrupts, 1)
		quiet, ok := d.take()
		if row++; quiet {
			row = 0
		}
		if row >= loud || !ok {
			if row >= loud {
				atomic.AddUint64(&d.n.Stuck, 1)
			}
			if !told && ok {
				told = true
				d.logf("%s: the interrupt does not go quiet when its doorbells are cleared; it is taken every %v at most", d.spec, pause)
			}
			if d.wait(pause) {
				return
			}
		}
		// Unmasks the line: after the cause is cleared, or it fires again at once.
		if _, err := d.line.Ack(); err != nil {
			d.logf("%s: no interrupts any more: %v", d.spec, err)
			return
		}
	}
}

// take clears and passes on what is rung, and tells whether the cause is clear then, and
// whether the register answers. A ring that comes after a
// clear sets the cause anew. Each look after a clear is also the read across the bus that makes sure that the clear has
// arrived before the line is unmasked.
func (d *Demux) take() (quiet, ok bool) {
	for i := 0; ; i++ {
		p, ok := d.cause.Pending()
		if !ok {
			atomic.AddUint64(&d.n.Dead, 1)
			return false, false
		}
		if p == 0 {
			if i == 0 {
				atomic.AddUint64(&d.n.Spurious, 1)
			}
			return true, true
		}
		if i == again {
			return false, true
		}
		d.cause.Clear(p)
		for p != 0 {
			v := bits.TrailingZeros32(p)
			p &^= 1 << uint(v)
			if v < len(d.out) {
				atomic.AddUint64(&d.n.Rings, 1)
				_ = d.out[v].Ring() // to our own eventfd: it cannot fail
			}
		}
	}
}

// wait waits, and tells whether it was stopped meanwhile.
func (d *Demux) wait(t time.Duration) bool {
	fds := []unix.PollFd{{Fd: int32(d.stop.FD()), Events: unix.POLLIN}}
	n, _ := unix.Poll(fds, int(t/time.Millisecond))
	return n > 0
}

// Bits is a Cause: one register in which each bit is a doorbell.
type Bits struct {
	R     Word
	Shift uint   // bit of vector 0
	Mask  uint32 // the bits that are doorbells of ours, in the register
	// Ack is the register that clears, R where it is the same; How is by what.
	Ack Word
	How Clearing
}

// Clearing is how bits of a cause register are cleared.
type Clearing uint8

// The ways.
const (
	ClearByOnes  Clearing = iota // write 1 to the bits
	ClearByZeros                 // write 0 to the bits, 1 to the others
	ClearByRead                  // reading clears
)

// Pending implements Cause. A register that is not all doorbells reads as all-ones only where nobody
// answers.
func (c *Bits) Pending() (uint32, bool) {
	v := c.R.Load()
	all := uint32(1<<c.R.Width - 1)
	if v == all && c.Mask != all {
		return 0, false
	}
	return v & c.Mask >> c.Shift, true
}

// Clear implements Cause.
func (c *Bits) Clear(b uint32) {
	switch c.How {
	case ClearByOnes:
		c.Ack.Store(b << c.Shift)
	case ClearByZeros:
		c.Ack.Store(^(b << c.Shift))
	}
}
