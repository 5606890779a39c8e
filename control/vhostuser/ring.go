package vhostuser

import (
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/vring"
)

// ring is one virtqueue as the front end has set it up. It is started, i.e. given to the device,
// when its features, size and addresses are known, its areas lie in the memory, and SET_VRING_KICK
// has come (specification, "Ring states"):
//
//	stopped --SET_VRING_KICK--> started --GET_VRING_BASE, SET_STATUS 0, an error in the ring--> stopped
//	           started --its areas' memory is removed--> waiting --memory is added--> started
//
// enabled is independent of that (SET_VRING_ENABLE).
type ring struct {
	index     int
	size      uint16
	addr      vringAddr
	addressed bool   // addr is set
	base      uint32 // where to go on
	based     bool   // base is set: 0 is a place in a packed ring as well
	own       bool   // base is where this back end has stopped
	told      uint32 // the base that the front end knows, ...
	toldBase  bool   // ... if it knows one
	kicked    bool   // SET_VRING_KICK has come since the ring was stopped
	enabled   bool
	started   bool
	broken    bool // it ended by what lay in it; until it is stopped by the front end

	log vring.Log // where it marks what it writes, while it is started

	kick, call, err *doorbell.Eventfd // nil: none came
}

// silent rings nobody: the front end polls.
type silent struct{}

func (silent) Ring() error { return nil }

func (r *ring) waiter() doorbell.Waiter {
	if r.kick == nil {
		return doorbell.None
	}
	return r.kick
}

func (r *ring) ringer() doorbell.Ringer {
	if r.call == nil {
		return silent{}
	}
	return r.call
}

// ringOnce rings a doorbell of the front end from the control plane, which must not block.
func ringOnce(e *doorbell.Eventfd) {
	if e != nil {
		_ = e.RingNoWait() // one that cannot be rung is the front end's loss: it owns it
	}
}

// replace puts e into place, and closes what was there. Nothing uses that any more.
func replace(place **doorbell.Eventfd, e *doorbell.Eventfd) {
	if *place != nil {
		_ = (*place).Close()
	}
	*place = e
}

// deadline is when a change of a queue has to be done.
func deadline() time.Time { return time.Now().Add(changeLimit) }

// areas finds the areas of a ring in the memory m.
func (b *backend) areas(r *ring, m *memory) (device.Areas, error) {
	info := b.dev.Queue(r.index)
	if info.Max == 0 {
		return device.Areas{}, fmt.Errorf("%w: there is no queue %d with the features that were accepted", ErrQueue, r.index)
	}
	packed := b.packed()
	desc, driver, dev := vring.SplitSizes(r.size)
	if packed {
		desc, driver, dev = vring.PackedSizes(r.size)
	}
	var at [3]dma.Addr
	for i, a := range [...]struct {
		name    string
		user, n uint64
	}{{"descriptor", r.addr.desc, desc}, {"driver", r.addr.avail, driver}, {"device", r.addr.used, dev}} {
		g, ok := m.guest(a.user, a.n)
		if !ok {
			return device.Areas{}, fmt.Errorf("%w: %s: the %s area of %#x bytes at %#x of the front end lies in none of its %d regions",
				ErrAddress, info.Name, a.name, a.n, a.user, len(m.maps))
		}
		at[i] = g
	}
	as, err := device.Translate(m.table, info, r.size, packed, at[0], at[1], at[2])
	if err != nil {
		return as, fmt.Errorf("%w: %v", ErrAddress, err)
	}
	return as, nil
}

// state returns where a ring goes on. Chains that were taken before and not completed are taken
// again: the front end knows no more than the available index (split), and nothing is in flight
// here.
func (b *backend) state(r *ring, as device.Areas) (s vring.State, err error) {
	c := vring.Config{Name: b.dev.Queue(r.index).Name, Size: r.size, Desc: as.Desc, Driver: as.Driver, Device: as.Device}
	if b.packed() {
		if !r.own {
			s, ok, err := b.recall(r, as, c)
			if err != nil {
				b.log.Warn("the place of a packed queue that was kept is of no use", "link", b.name, "queue", r.index, "error", err)
			}
			if ok {
				return s, nil
			}
		}
		if !r.based {
			return vring.State{}, nil // a new queue
		}
		s, err = vring.PackedStateFromBase(c, r.base)
	} else {
		s, err = vring.SplitStateFromBase(c, r.base)
	}
	if err != nil {
		return s, fmt.Errorf("%w: %v", ErrQueue, err)
	}
	if s.Avail != s.Used {
		atomic.AddUint64(&b.n.BaseResent, 1)
	}
	return s.Rewound(), nil
}

// ready tells whether a ring has all that it needs, but for its memory.
func (b *backend) ready(r *ring) bool {
	return b.usable && b.again.IsZero() && r.kicked && r.addressed && r.size > 0 &&
		(b.dirty != nil || !b.logs(r)) // QEMU starts queues before it sends the log, when a guest restarts while it is migrated
}

// start starts a ring that is ready. With pending, one whose memory is not there waits for it, else
// that is an error.
func (b *backend) start(r *ring, pending bool) error {
	if r.started || !b.ready(r) {
		return nil
	}
	as, err := b.areas(r, b.mem)
	if err != nil {
		if pending {
			return nil
		}
		return err
	}
	s, err := b.state(r, as)
	if err != nil {
		return err
	}
	if err := b.checkLog(b.dirty, b.mem); err != nil {
		return err
	}
	b.starts.take(time.Now())
	l := b.ringLog(r)
	var j *vring.Journal
	if b.packed() {
		j = b.keep(r, as, s)
	}
	err = b.dev.EnableQueue(r.index, b.enabled(r), deadline())
	if err == nil {
		err = b.dev.StartQueue(r.index, device.Resources{Size: r.size, Areas: as, Table: &b.table, Kick: r.waiter(), Call: r.ringer(), Log: l, Journal: j}, s)
	}
	if err != nil {
		return b.notNow(err)
	}
	r.started, r.broken, r.log = true, false, l
	atomic.AddUint64(&b.n.QueueStarts, 1)
	// After a restart of either side nobody may owe a call any more.
	ringOnce(r.call)
	return nil
}

// notNow sorts the errors of the device: what lies in the ring, and a device that is stuck, are
// errors; all else is not the front end's fault (the interface is away), and is tried again.
func (b *backend) notNow(err error) error {
	var bad *vring.Error
	switch {
	case isStuck(err):
		return err
	case errors.As(err, &bad):
		return fmt.Errorf("%w: %v", ErrQueue, err)
	}
	return b.suspend(err)
}

// suspend gives the device back, as its other end is away, and has all tried again later. The rings
// keep their places.
func (b *backend) suspend(err error) error {
	b.log.Warn("the device cannot run, it is tried again", "link", b.name, "error", err)
	for i := range b.rings {
		if err := b.stop(&b.rings[i]); err != nil {
			return err
		}
	}
	if err := b.dev.Reset(deadline()); err != nil {
		return err
	}
	b.running, b.taken = false, false
	b.retry()
	return nil
}

// enabled tells whether a ring may move. Without the feature bit that SET_VRING_ENABLE depends on,
// all may (specification, "Ring states").
func (b *backend) enabled(r *ring) bool { return r.enabled || b.features&featProtocol == 0 }

// stop stops a ring and keeps where it was. It stays to be started by the next SET_VRING_KICK, or
// by memory that is added where kicked is left.
func (b *backend) stop(r *ring) error {
	if !r.started {
		return nil
	}
	if b.running && r.index < b.first {
		if err := b.setRunning(false); err != nil {
			return err
		}
	}
	st, err := b.dev.StopQueue(r.index, deadline())
	if err != nil {
		return err
	}
	r.started = false
	r.base, r.based, r.own = st.State.Base(), true, true
	atomic.AddUint64(&b.n.QueueStops, 1)
	return nil
}

// settle starts what can be started, and lets the device run, or rest, as its first queues are.
func (b *backend) settle(pending bool) error {
	for i := range b.rings {
		r := &b.rings[i]
		switch err := b.start(r, pending); {
		case err == nil:
		case errors.Is(err, ErrQueue), errors.Is(err, ErrAddress), errors.Is(err, ErrLog):
			// What lies in this ring is no matter of the others, nor of the request that had it looked at.
			b.log.Warn("queue cannot go on: the guest's driver has to reset the device", "link", b.name, "queue", i, "error", err)
			b.ringBroke(r)
		default:
			return err
		}
	}
	run := true
	for i := 0; i < b.first; i++ {
		r := &b.rings[i]
		run = run && r.started && b.enabled(r)
	}
	if run == b.running {
		return nil
	}
	return b.setRunning(run)
}

func (b *backend) setRunning(on bool) error {
	b.starts.take(time.Now()) // the interface's carrier and offload change
	if err := b.dev.SetRunning(on, deadline()); err != nil {
		return b.notNow(err)
	}
	b.running = on
	b.repeat = time.Time{}
	if on && b.owed {
		b.repeat = time.Now().Add(repeatAfter)
	}
	if on {
		b.log.Info("device running", "link", b.name, "features", b.accepted().String())
	} else {
		b.log.Debug("device rests", "link", b.name)
	}
	return nil
}

// broke takes note of a queue that ended by itself. The error is one that ends the connection.
func (b *backend) broke(e device.Event) error {
	switch device.CauseOf(e.Broken) {
	case device.CauseMemory:
		atomic.AddUint64(&b.n.MemoryFaults, 1)
		return fmt.Errorf("%w: %v", ErrMemory, e.Broken)
	case device.CauseEnd:
		if !b.taken {
			return nil // of before it was suspended
		}
		return b.suspend(e.Broken)
	}
	b.log.Warn("queue broken by the front end: the guest's driver has to reset the device", "link", b.name, "error", e.Broken)
	for i := range b.rings {
		r := &b.rings[i]
		if e.Queue >= 0 && e.Queue != i || !r.started {
			continue
		}
		if err := b.stop(r); err != nil {
			return err
		}
		b.ringBroke(r)
	}
	return b.settle(true)
}

// ringBroke marks a stopped ring as broken, until it is kicked anew, and rings its err descriptor.
func (b *backend) ringBroke(r *ring) {
	r.kicked, r.broken = false, true
	atomic.AddUint64(&b.n.QueuesBroken, 1)
	ringOnce(r.err)
}

// finalError is an error after which the connection has to end: old and new resources may both be in use.
type finalError struct{ err error }

// Error implements error.
func (e *finalError) Error() string { return e.err.Error() }

// Unwrap returns the error itself.
func (e *finalError) Unwrap() error { return e.err }

// isFinal tells whether the connection has to end, whatever was asked to be acknowledged.
func isFinal(err error) bool {
	var f *finalError
	return isStuck(err) || errors.As(err, &f)
}

// isStuck tells whether a queue did not come to rest: the memory and its doorbells are still in
// use.
func isStuck(err error) bool { return errors.Is(err, device.ErrStuck) }
