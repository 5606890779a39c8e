package agent

import (
	"context"
	"errors"
	"fmt"
	"sort"
	"sync/atomic"
	"time"

	"github.com/boardlink/boardlink/control/msgdrv"
	"github.com/boardlink/boardlink/driver"
	"github.com/boardlink/boardlink/session"
	"github.com/boardlink/boardlink/virtiomsg"
)

// Errors of AddDevice and RemoveDevice, with driver.ErrNoShare.
var (
	ErrDeviceExists = errors.New("the link drives a device of this number already")
	ErrNoDevice     = errors.New("the link drives no device of this number")
)

// Maker makes a driver for device number n of the link. nil without an error leaves the device alone. It is called on the
// owner's goroutine: messages wait meanwhile.
type Maker func(n uint16) (driver.Driver, error)

// place returns the place on the link of a device without memory and doorbells.
func (l *Link) place(n driver.Driver) *device {
	return &device{l: l, n: n, failed: make(chan error, n.Doorbells()+1), changes: session.NewBucket(l.cfg.Pace.Changes)}
}

// listQueues lists the queues that the host is to ring this side for.
func (d *device) listQueues() []session.Queue {
	d.queues = nil
	// Not the control queue, whose number depends on the host: it has one answer to wait for, and polls.
	for i := 0; i < d.n.Doorbells(); i++ {
		d.queues = append(d.queues, session.Queue{QueueID: session.QueueID{Dev: d.n.Number(), Queue: i}, Class: d.l.cfg.Classes[d.n.Number()]})
	}
	return d.queues
}

// find returns the index in l.devs of device number n, or of the first one above it.
func (l *Link) find(n uint16) (i int, ok bool) {
	i = sort.Search(len(l.devs), func(i int) bool { return l.devs[i].n.Number() >= n })
	return i, i < len(l.devs) && l.devs[i].n.Number() == n
}

// setDevices replaces the list of devices, which Status reads. The owner's goroutine, which alone calls it, reads l.devs as
// it is.
func (l *Link) setDevices(devs []*device) {
	l.mu.Lock()
	l.devs = devs
	l.mu.Unlock()
}

// devices returns the list of devices. Any goroutine may call it.
func (l *Link) devices() []*device {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.devs
}

// AddDevice drives one more device from now on, as if it were in Config.Devices: it comes up where the host offers it, now or later. The
// driver belongs to the Link from then on, unless there is an error: ErrDeviceExists; driver.ErrNoShare where
// all memory is in use (Config.Shares); session.ErrEnded where Run has returned; that of ctx where it ended before the link
// came to it; one of the system that has no doorbells (file descriptors) left. Any goroutine may call it, but no method of a
// driver may.
func (l *Link) AddDevice(ctx context.Context, n driver.Driver) error {
	var err error
	if derr := l.s.Do(ctx, func() { _, err = l.add(n) }); derr != nil {
		err = derr
	}
	if err != nil {
		return fmt.Errorf("link %s: device %d is not added: %w", l.cfg.Name, n.Number(), err)
	}
	return nil
}

func (l *Link) add(n driver.Driver) (*device, error) {
	i, exists := l.find(n.Number())
	if exists {
		return nil, ErrDeviceExists
	}
	d := l.place(n)
	var err error
	if d.index, err = l.shares.Take(); err != nil {
		return nil, err
	}
	if pairs, chosen := n.Pairs(); !chosen && l.pairs > 0 && pairs > l.pairs {
		n.LimitPairs(l.pairs)
	}
	if err := l.s.AddQueues(d.listQueues()); err != nil {
		l.shares.Give(d.index)
		return nil, err
	}
	n.OnChange(l.s.Wake)
	devs := append([]*device(nil), l.devs[:i]...)
	l.setDevices(append(append(devs, d), l.devs[i:]...))
	delete(l.passed, n.Number())
	l.s.Wake()
	return d, nil
}

// RemoveDevice takes device number n off the link and closes its driver: first the host is asked to reset the device. It
// stays away also where Config.Drivers has a Maker for it, until the host offers it anew. Errors: ErrNoDevice;
// session.ErrEnded where Run has returned, which closes all drivers; that of ctx where it ended before the link came to it;
// else what Close of the driver returns, which is removed all the same. Any goroutine may call it, but no method of a driver may.
func (l *Link) RemoveDevice(ctx context.Context, n uint16) error {
	var gone *device
	err := l.s.Do(ctx, func() {
		if i, ok := l.find(n); ok {
			gone = l.devs[i]
			l.release(gone)
		}
	})
	if gone != nil {
		if cerr := gone.n.Close(); err == nil {
			err = cerr
		}
		if err != nil {
			return fmt.Errorf("link %s: device %d is removed: %w", l.cfg.Name, n, err)
		}
		return nil
	}
	if err == nil {
		err = ErrNoDevice
	}
	return fmt.Errorf("link %s: device %d is not removed: %w", l.cfg.Name, n, err)
}

// release stops a device, has the host let go of its memory, and takes it off the link.
func (l *Link) release(d *device) {
	d.down()
	if d.met && l.s.Up() {
		t := msgdrv.New(messages{l.s}, d.n.Number(), d.n.Name())
		if s, err := t.SetStatus(0); err != nil || s != 0 {
			l.letGo(d, err)
		}
	}
	l.drop(d)
	if l.passed == nil {
		l.passed = map[uint16]pass{}
	}
	l.passed[d.n.Number()] = gaveUp
}

// letGo judges a reset of a device that failed: unless the host has let go of the device's memory by other means, the
// link shakes hands anew.
func (l *Link) letGo(d *device, err error) {
	if errors.Is(err, virtiomsg.ErrDown) || errors.Is(err, session.ErrRemoved) {
		return
	}
	l.cfg.Log.Warn("the host does not reset a device that is removed here", "link", l.cfg.Name, "device", d.n.Name(), "error", err)
	l.s.Reset()
}

// drop takes a device off the link that is down, and whose memory nobody uses.
func (l *Link) drop(d *device) {
	i, _ := l.find(d.n.Number())
	l.s.RemoveQueues(d.queues)
	d.n.OnChange(func() {})
	devs := append([]*device(nil), l.devs[:i]...)
	l.setDevices(append(devs, l.devs[i+1:]...))
	if d.small == nil {
		l.shares.Give(d.index)
	}
	if l.full {
		l.full, l.search = false, true // there is room for one that went without
	}
}

// deviceEvent acts on the host's EVENT_DEVICE.
func (l *handler) deviceEvent(e virtiomsg.DeviceEvent) {
	delete(l.passed, e.Dev)
	i, known := (*Link)(l).find(e.Dev)
	switch {
	case e.State == virtiomsg.DeviceReady && !known:
		l.search = true
		l.s.Wake()
	case e.State == virtiomsg.DeviceReady:
		if d, soon := l.devs[i], time.Now().Add(retryMin); d.next.After(soon) {
			d.next = soon // not at once: a host may send this without end
		}
	case e.State == virtiomsg.DeviceRemoved && known:
		d := l.devs[i]
		d.met = false // the host does not use its memory any more
		if d.made {
			(*Link)(l).removed(d)
		} else if d.up {
			d.down()
			d.later()
		}
	}
}

// removed gives back a device that the host does not offer any more.
func (l *Link) removed(d *device) {
	d.down()
	l.drop(d)
	atomic.AddUint64(&l.n.Removed, 1)
	l.cfg.Log.Info("the host has removed a device", "link", l.cfg.Name, "device", d.n.Name(), "interface", d.n.Joined())
	if err := d.n.Close(); err != nil {
		l.cfg.Log.Warn("a driver does not close", "link", l.cfg.Name, "device", d.n.Name(), "error", err)
	}
}

// pass is why a device is not driven.
type pass uint8

const (
	unknown pass = iota // no Maker drives it; it is looked at again after the next handshake
	gaveUp              // RemoveDevice; it stays away until it is offered anew, also through handshakes
)

// maxPassed limits how many devices that are not driven are looked at while the link is up.
const maxPassed = 1024

// look asks the host which devices it offers and makes drivers for those that Config.Drivers knows; where the
// host offers one of those no more, it is given back. Events say when to look, as often as Pace.Devices allows. The error is that of a
// request; what was to be done is done the next time then.
func (l *handler) look() error {
	now := time.Now()
	if !l.search || len(l.cfg.Drivers) == 0 || l.looking.Wait(now) > 0 {
		return nil
	}
	l.looking.Take(now, 1)
	l.search = false
	atomic.AddUint64(&l.n.Searches, 1)
	link := messages{l.s}
	offers, err := msgdrv.Devices(link)
	if err != nil {
		return err
	}
	there := make(map[uint16]bool, len(offers))
	for _, n := range offers {
		there[n] = true
	}
	for _, d := range l.devs { // a list that is not written again
		if d.made && !there[d.n.Number()] {
			(*Link)(l).removed(d)
		}
	}
	for _, n := range offers {
		if _, known := (*Link)(l).find(n); known {
			continue
		}
		if _, passed := l.passed[n]; passed {
			continue
		}
		if l.shares.Free() == 0 {
			if !l.full {
				l.full = true
				l.cfg.Log.Warn("the host offers a further device, for which no memory is left", "link", l.cfg.Name, "device", n, "devices", l.shares.Len())
			}
			return nil
		}
		if len(l.passed) >= maxPassed {
			return nil
		}
		switch id, err := msgdrv.New(link, n, fmt.Sprintf("device %d", n)).ID(); {
		case errors.Is(err, session.ErrRemoved):
			continue
		case err != nil:
			return err
		default:
			(*Link)(l).drive(n, id)
		}
	}
	return nil
}

// drive makes a driver for a device that the host offers, if the configuration knows one. Where not, the device is left alone until
// the host tells of it again.
func (l *Link) drive(n uint16, id uint32) {
	leave := func() {
		if l.passed == nil {
			l.passed = map[uint16]pass{}
		}
		l.passed[n] = unknown
	}
	maker := l.cfg.Drivers[id]
	if maker == nil {
		leave()
		l.cfg.Log.Debug("a device that nothing here drives", "link", l.cfg.Name, "device", n, "virtio_id", id)
		return
	}
	drv, err := maker(n)
	if err == nil && drv == nil {
		leave()
		return
	}
	if err == nil && drv.Number() != n {
		err = fmt.Errorf("its driver is for device %d", drv.Number())
	} else if err == nil {
		var d *device
		if d, err = l.add(drv); err == nil {
			d.made = true
			atomic.AddUint64(&l.n.Added, 1)
			return
		}
	}
	if drv != nil {
		drv.Close()
	}
	leave()
	l.cfg.Log.Warn("a device that the host has added cannot be driven", "link", l.cfg.Name, "device", n, "error", err)
}

// Shares returns how many parts of the memory no device has, and how many there are. It must not be called while Run
// returns.
func (l *Link) Shares() (free, all int) {
	if l.s.Do(context.Background(), func() { free = l.shares.Free() }) != nil {
		free = l.shares.Free()
	}
	return free, l.shares.Len()
}
