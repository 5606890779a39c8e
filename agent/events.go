package agent

import (
	"errors"
	"sync/atomic"
	"time"

	"github.com/boardlink/boardlink/control/msgdrv"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/session"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/virtiomsg"
)

// Message takes the host's events.
func (l *handler) Message(h virtiomsg.Header, m *virtiomsg.Slot) {
	if h.Bus() {
		switch h.ID {
		case virtiomsg.BusPing:
			data, err := virtiomsg.DecodePing(m)
			if err != nil {
				l.Malformed(m, err)
				return
			}
			virtiomsg.EncodePong(m, h.Token, data)
			l.s.Send(m)
		case virtiomsg.BusEventDevice:
			var e virtiomsg.DeviceEvent
			if err := e.Decode(m); err != nil {
				l.Malformed(m, err)
				return
			}
			l.deviceEvent(e)
		}
		return
	}
	if h.ID != virtiomsg.EventConfig {
		return // EVENT_USED: the doorbell or the poll fallback tells the same
	}
	var e virtiomsg.ConfigEvent
	if err := e.Decode(m); err != nil {
		l.Malformed(m, err)
		return
	}
	for _, d := range l.devs {
		if d.n.Number() != h.Dev || !d.up {
			continue
		}
		if e.Status&virtio.StatusNeedsReset != 0 {
			atomic.AddUint64(&l.n.HostReset, 1)
			l.cfg.Log.Warn("the host asks for a reset of the device", "link", l.cfg.Name, "device", d.n.Name())
			d.down()
			d.later()
			continue
		}
		if d.changed {
			atomic.AddUint64(&l.n.Damped, 1)
		}
		d.changed = true
		l.reconfigure(d)
	}
}

// reconfigure applies a configuration that has changed, unless that has been done too often lately:
// then Tick does it, once for all that has changed until then. Who listens to the interface hears of
// each change.
func (l *handler) reconfigure(d *device) {
	now := time.Now()
	if d.changes.Wait(now) > 0 {
		return
	}
	d.changes.Take(now, 1)
	d.changed = false
	atomic.AddUint64(&l.n.Changes, 1)
	t := msgdrv.New(messages{l.s}, d.n.Number(), d.n.Name())
	err := d.n.Reconfigure(t)
	d.tellWarning()
	if err != nil && !errors.Is(err, virtiomsg.ErrDown) && !errors.Is(err, session.ErrRemoved) {
		if errors.Is(err, session.ErrTimeout) {
			l.s.Reset() // as in Tick
		}
		l.cfg.Log.Warn("the device's new configuration cannot be used", "link", l.cfg.Name, "device", d.n.Name(), "error", err)
	}
}

// Malformed implements session.Handler: after a malformed message of the host, the handshake is done anew.
func (l *handler) Malformed(m *virtiomsg.Slot, err error) {
	l.cfg.Log.Warn("malformed message", "link", l.cfg.Name, "error", err)
	l.s.Reset()
}

// messages is a session as the transports of its devices see it.
type messages struct{ *session.Session }

// Kick implements msgdrv.Link.
func (m messages) Kick(dev uint16, queue int) doorbell.Ringer {
	return m.Ringer(session.QueueID{Dev: dev, Queue: queue})
}

// Called implements msgdrv.Link.
func (m messages) Called(dev uint16, queue int) doorbell.Waiter {
	return m.Waiter(session.QueueID{Dev: dev, Queue: queue})
}
