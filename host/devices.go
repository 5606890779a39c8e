package host

import (
	"context"
	"errors"
	"fmt"
	"sort"
	"sync/atomic"
	"time"

	"github.com/boardlink/boardlink/control/msgdev"
	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/session"
	"github.com/boardlink/boardlink/virtiomsg"
)

// Errors of AddDevice and RemoveDevice.
var (
	ErrDeviceExists = errors.New("the link has a device of this number already")
	ErrNoDevice     = errors.New("the link has no device of this number")
)

// offered is a device of the link.
type offered struct {
	*msgdev.Server
	number   uint16
	dev      device.Device
	class    doorbell.Class
	engines  engineSet // for dev
	since    time.Time // the driver is expected to take it from then on; the owner's goroutine only
	undriven uint32    // atomic; 1: the driver leaves the device alone, which was logged
}

// notice is what the agent has to be told of a device number by EVENT_DEVICE: that a device was removed, and then that
// there is one.
type notice struct {
	number         uint16
	removed, ready bool
}

// offer makes what serves a device.
func (l *Link) offer(n uint16, dev device.Device) *offered {
	d := &offered{number: n, dev: dev, class: l.cfg.Classes[n]}
	starts, changes := session.NewBucket(l.cfg.Pace.Starts), session.NewBucket(l.cfg.Pace.Changes)
	d.Server = msgdev.New(messages{l.s}, msgdev.Config{Link: l.cfg.Name, Number: n, Device: dev, Log: l.cfg.Log, Counters: &l.n.Devices,
		Table: &l.table, Engines: &d.engines, Starts: &starts, Changes: &changes, Room: l.room, Far: func(a dma.Addr) bool { return a >= poolLink }})
	return d
}

// queues lists the device's queues.
func (d *offered) queues() []session.Queue {
	qs := make([]session.Queue, d.dev.Queues())
	for i := range qs {
		qs[i] = session.Queue{QueueID: session.QueueID{Dev: d.number, Queue: i}, Class: d.class}
	}
	return qs
}

// find returns the index in l.devs of device number n, or of the first one above it.
func (l *Link) find(n uint16) (i int, ok bool) {
	i = sort.Search(len(l.devs), func(i int) bool { return l.devs[i].number >= n })
	return i, i < len(l.devs) && l.devs[i].number == n
}

// setDevices replaces the list of devices, which Status reads. The owner's goroutine, which alone calls it, reads l.devs as
// it is.
func (l *Link) setDevices(devs []*offered) {
	l.mu.Lock()
	l.devs = devs
	l.mu.Unlock()
}

// devices returns the list of devices. Any goroutine may call it.
func (l *Link) devices() []*offered {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.devs
}

// AddDevice offers one more device, with number n, from now on, whether the link is up or not. An agent that is there hears of it by
// EVENT_DEVICE, others find it when the link comes up. The device belongs to the Link from then on, unless there is an
// error: ErrDeviceExists; session.ErrEnded where Run has returned; that of ctx where it ended before the link came to
// it; one of the system that has no doorbells (file descriptors) left. Any goroutine may call it, but no
// method of a device may.
func (l *Link) AddDevice(ctx context.Context, n uint16, dev device.Device) error {
	var err error
	if derr := l.s.Do(ctx, func() { err = l.add(n, dev) }); derr != nil {
		err = derr
	}
	if err != nil {
		return fmt.Errorf("link %s: device %d is not added: %w", l.cfg.Name, n, err)
	}
	return nil
}

func (l *Link) add(n uint16, dev device.Device) error {
	i, exists := l.find(n)
	if exists {
		return ErrDeviceExists
	}
	d := l.offer(n, dev)
	if err := l.s.AddQueues(d.queues()); err != nil {
		dev.Notify(func(device.Event) {})
		return err
	}
	d.engines.src, d.since = l.engines, time.Now()
	devs := append([]*offered(nil), l.devs[:i]...)
	l.setDevices(append(append(devs, d), l.devs[i:]...))
	l.tell(n, func(e *notice) { e.ready = true })
	l.cfg.Log.Info("device added", "link", l.cfg.Name, "device", n)
	return nil
}

// RemoveDevice takes device number n away and closes it, whether a driver uses it or not. When it returns nothing touches
// the device's queues any more; the agent hears of it by EVENT_DEVICE, and other devices are not concerned. Errors:
// ErrNoDevice; session.ErrEnded where Run has returned, which closes all devices; that of ctx where it ended
// before the link came to it; else what Close of the device returns, which is removed all the same. Any goroutine may call
// it, but no method of a device may.
func (l *Link) RemoveDevice(ctx context.Context, n uint16) error {
	var gone *offered
	err := l.s.Do(ctx, func() { gone = l.remove(n) })
	if gone != nil {
		if cerr := gone.dev.Close(); err == nil {
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

// remove stops a device and takes it off the link; nil: there is none.
func (l *Link) remove(n uint16) *offered {
	i, ok := l.find(n)
	if !ok {
		return nil
	}
	d := l.devs[i]
	d.Reset()
	l.s.RemoveQueues(d.queues())
	d.dev.Notify(func(device.Event) {})
	devs := append([]*offered(nil), l.devs[:i]...)
	l.setDevices(append(devs, l.devs[i+1:]...))
	if l.gone == nil {
		l.gone = map[uint16]bool{}
	}
	l.gone[n] = true
	l.tell(n, func(e *notice) { e.removed, e.ready = true, false })
	l.cfg.Log.Info("device removed", "link", l.cfg.Name, "device", n)
	return d
}

// tell changes what the agent is to be told of a device number, while the link is up: when it comes up the agent asks.
func (l *Link) tell(n uint16, change func(*notice)) {
	if !l.s.Up() {
		return
	}
	defer l.tellAgent()
	for i := range l.notices {
		if l.notices[i].number == n {
			change(&l.notices[i])
			return
		}
	}
	l.notices = append(l.notices, notice{number: n})
	change(&l.notices[len(l.notices)-1])
}

// hidden tells whether the agent was not told yet that an earlier device of this number was removed.
// It must not meet the next one before that: the event would take that one away.
func (l *Link) hidden(n uint16) bool {
	for i := range l.notices {
		if l.notices[i].number == n {
			return l.notices[i].removed
		}
	}
	return false
}

// tellAgent sends what the agent is to be told, as far as there is room.
func (l *Link) tellAgent() {
	send := func(n uint16, state uint16) bool {
		var m virtiomsg.Slot
		(&virtiomsg.DeviceEvent{Dev: n, State: state}).Encode(&m)
		if l.s.Send(&m) != nil {
			return false // with the next tick
		}
		atomic.AddUint64(&l.n.DeviceEvents, 1)
		return true
	}
	for len(l.notices) > 0 {
		e := &l.notices[0]
		if e.removed {
			if !send(e.number, virtiomsg.DeviceRemoved) {
				return
			}
			e.removed = false
		}
		if e.ready && !send(e.number, virtiomsg.DeviceReady) {
			return
		}
		l.notices = l.notices[1:]
	}
	l.notices = nil
}
