package agent

import (
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/boardlink/boardlink/control/msgdrv"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/driver"
	"github.com/boardlink/boardlink/pci"
	"github.com/boardlink/boardlink/session"
	"github.com/boardlink/boardlink/tunbridge"
	"github.com/boardlink/boardlink/virtiomsg"
)

// A device that does not come up is tried again after retryMin, then twice as long, up to retryMax.
const (
	retryMin = 50 * time.Millisecond
	retryMax = 5 * time.Second
)

// device is one device's place on the link.
type device struct {
	l       *Link
	n       driver.Driver
	index   int             // its share of the memory
	small   driver.Small    // not nil: it has a part of the memory of its own, at the end
	queues  []session.Queue // that have doorbells
	made    bool            // by Config.Drivers
	met     bool            // the host has shown the device since the link came up: it may use the device's memory
	up      bool
	next    time.Time
	since   time.Time // up
	backoff time.Duration
	failed  chan error // of its loops
	toldUp  bool       // what the host was told of the interface
	logged  string     // the last error that was logged
	unmet   []string   // what was unmet when the device came up last
	changed bool       // the host has told of a configuration that was not read yet
	changes session.Bucket
	short   string // what is left out for want of room, as it was logged
}

// Tick takes broken devices down and brings up what is not up.
func (l *handler) Tick() {
	if err := l.look(); err != nil {
		l.search = true
		if !errors.Is(err, virtiomsg.ErrDown) {
			l.cfg.Log.Warn("the devices of the host cannot be told", "link", l.cfg.Name, "error", err)
			l.s.Reset()
		}
		return
	}
	for _, d := range l.devs {
		select {
		case err := <-d.failed:
			if errors.Is(err, pci.ErrGone) || errors.Is(err, tunbridge.ErrFault) {
				l.s.Fault(err)
				return
			}
			if d.up && errors.Is(err, tunbridge.ErrGone) {
				d.down() // whoever looks after the interface tells of it
				d.later()
			} else if d.up {
				atomic.AddUint64(&l.n.Broken, 1)
				d.l.cfg.Log.Warn("device broken, resetting it", "link", l.cfg.Name, "device", d.n.Name(), "error", err)
				d.down()
				d.later()
			}
		default:
		}
		if d.up && d.changed {
			if l.reconfigure(d); !l.s.Up() {
				return
			}
		}
		d.tellLink()
		if d.n.Remade() {
			d.next, d.backoff = time.Time{}, 0
		}
		if d.up || time.Now().Before(d.next) {
			continue
		}
		err := d.bringUp()
		if errors.Is(err, session.ErrRemoved) {
			d.down() // the event that says so comes next
			d.later()
			continue
		}
		if err == nil {
			atomic.AddUint64(&l.n.BringUps, 1)
			continue
		}
		d.down()
		if errors.Is(err, virtiomsg.ErrDown) {
			return // the link went down under us
		}
		if errors.Is(err, session.ErrTimeout) {
			// What the host does with our memory is not known any more.
			l.s.Reset()
		}
		atomic.AddUint64(&l.n.Failures, 1)
		d.later()
		d.n.Failed(err)
		if s := sameError(err); s != d.logged {
			d.logged = s
			l.cfg.Log.Warn("device does not come up", "link", l.cfg.Name, "device", d.n.Name(), "error", err, "again_in", d.backoff.String())
		}
	}
}

// sameError returns what is the same whenever the same thing fails: without tokens.
func sameError(err error) string {
	var m *virtiomsg.MessageError
	if errors.As(err, &m) {
		c := *m
		c.Header.Token = 0
		return c.Error()
	}
	return err.Error()
}

// later puts the next attempt off: the further, the sooner the device broke down again.
func (d *device) later() {
	if !d.since.IsZero() && time.Since(d.since) > retryMax {
		d.backoff = 0
	}
	d.since = time.Time{}
	d.backoff *= 2
	if d.backoff < retryMin {
		d.backoff = retryMin
	}
	if d.backoff > retryMax {
		d.backoff = retryMax
	}
	d.next = time.Now().Add(d.backoff)
}

func (d *device) down() {
	d.l.s.Stopping(d.n.Down)
	d.up, d.changed = false, false
	for {
		select {
		case <-d.failed:
		default:
			return
		}
	}
}

func (d *device) bringUp() error {
	t := msgdrv.New(messages{d.l.s}, d.n.Number(), d.n.Name())
	there, err := t.Exists()
	if err != nil {
		return err
	}
	if !there {
		return fmt.Errorf("%s: the host offers no device %d", d.n.Name(), d.n.Number())
	}
	d.met = true
	if err := t.Check(d.n.DeviceID()); err != nil {
		return err
	}
	// The device is reset before anything is allocated: it knows none of this memory.
	near := d.share(d.l.region)
	m := driver.Layout{Near: near, Far: near, Devices: d.l.shares.Len()}
	if d.l.pool != nil {
		m.Far = d.share(d.l.pool)
	}
	if err := d.n.Up(t, m, d.broken); err != nil {
		return err
	}
	d.up, d.since, d.logged, d.changed, d.toldUp = true, time.Now(), "", false, true // as the host takes it after a reset
	d.tellWarning()
	d.tellLink()
	d.l.cfg.Log.Info("device up", "link", d.l.cfg.Name, "device", d.n.Name(), "interface", d.n.Joined())
	d.tellUnmet()
	if s := d.n.ShortOf(); s != d.short {
		if d.short = s; s != "" {
			d.l.cfg.Log.Warn("the memory is small", "link", d.l.cfg.Name, "device", d.n.Name(), "note", s)
		}
	}
	return nil
}

// share returns the device's part of a region.
func (d *device) share(r *dma.Region) *driver.Memory {
	var kept uint64
	for _, s := range d.l.small {
		n := s.Memory(r.Mem.Size() / uint64(len(d.l.small)))
		if s == d.small {
			return driver.Kept(r, kept, n)
		}
		kept += n
	}
	return driver.Share(r, kept, d.index, d.l.shares.Len())
}

// broken is told by the loops.
func (d *device) broken(err error) {
	select {
	case d.failed <- err:
	default:
	}
	d.l.s.Wake()
}
