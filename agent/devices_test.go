package agent_test

import (
	"sync/atomic"
	"testing"
	"time"

	"github.com/boardlink/boardlink/agent"
	"github.com/boardlink/boardlink/driver"
	"github.com/boardlink/boardlink/session"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/virtiomsg"
)

// TestDeviceEventsArePaced: a host that tells of devices that come and go without end is asked for them about five times a
// second, and the device that runs goes on.
func TestDeviceEventsArePaced(t *testing.T) {
	var made uint64
	r := newRig(t, func(r *rig) {
		r.pace, r.shares = session.Pace{}, 4
		r.drivers = map[uint32]agent.Maker{virtio.IDNet: func(uint16) (driver.Driver, error) {
			atomic.AddUint64(&made, 1)
			return nil, nil
		}}
	})
	const first, offered = 104, 16
	r.answered = func(h virtiomsg.Header, m *virtiomsg.Slot) bool {
		if h.Bus() && h.ID == virtiomsg.BusGetDevices {
			var d virtiomsg.Devices
			if err := d.Decode(m); err != nil {
				t.Error(err)
			}
			for n := uint16(first); n < first+offered; n++ {
				d.Set(n)
			}
			d.Encode(m, h.Token)
		}
		return true
	}
	r.waitRunning()
	begin, events := time.Now(), uint64(0)
	for time.Since(begin) < 500*time.Millisecond || events < 200 && time.Since(begin) < 20*time.Second {
		var m virtiomsg.Slot
		e := virtiomsg.DeviceEvent{Dev: first + uint16(events/2%offered), State: virtiomsg.DeviceReady}
		if events%2 == 1 {
			e.State = virtiomsg.DeviceRemoved
		}
		e.Encode(&m)
		r.Send(m)
		events++
		r.Step()
	}
	n, most := r.count("searches"), 18+uint64(time.Since(begin)/(200*time.Millisecond))
	if n > most || n < 2 {
		t.Errorf("asked %d times after %d events, at most %d may be", n, events, most)
	}
	if m := atomic.LoadUint64(&made); m > n*offered {
		t.Errorf("%d drivers asked for in %d searches of %d devices", m, n, offered)
	}
	if r.Downs != 0 || r.running != 1 || !r.dev().Carrier {
		t.Errorf("down %d times, brought up %d times, carrier %v", r.Downs, r.running, r.dev().Carrier)
	}
}

// TestEndlessDevices: a host whose list of devices does not end, or goes back, is not asked for ever: the link is shaken
// hands with anew.
func TestEndlessDevices(t *testing.T) {
	t.Parallel()
	r := newRig(t, func(r *rig) {
		r.shares = 4
		r.drivers = map[uint32]agent.Maker{virtio.IDNet: func(uint16) (driver.Driver, error) { return nil, nil }}
	})
	asked := 0
	r.answered = func(h virtiomsg.Header, m *virtiomsg.Slot) bool {
		if h.Bus() && h.ID == virtiomsg.BusGetDevices {
			var d virtiomsg.Devices
			if err := d.Decode(m); err != nil {
				t.Error(err)
			}
			asked++
			d.Count, d.Next = 8, d.Offset+8
			d.Encode(m, h.Token)
		}
		return true
	}
	r.Until(20*time.Second, "the link goes down", func() bool { return r.Downs > 0 })
	if most := 1<<16/virtiomsg.MaxDevices + 2; asked > most {
		t.Errorf("asked %d times, at most %d may be", asked, most)
	}
	r.answered = nil
	r.waitRunning()
}

// TestRemoveFromMuteHost: an agent whose host does not answer gives a device back all the same; what that host
// does with its memory is not known, so the link is shaken hands with anew.
func TestRemoveFromMuteHost(t *testing.T) {
	t.Parallel()
	var made uint64
	r := newRig(t, func(r *rig) {
		r.drivers = map[uint32]agent.Maker{virtio.IDNet: func(uint16) (driver.Driver, error) {
			atomic.AddUint64(&made, 1)
			return nil, nil
		}}
	})
	r.waitRunning()
	r.answered = func(virtiomsg.Header, *virtiomsg.Slot) bool { return false }
	done := make(chan error, 1)
	go func() { done <- r.link.RemoveDevice(t.Context(), dev) }()
	var err error
	r.Until(20*time.Second, "the device is removed", func() bool {
		select {
		case err = <-done:
			return true
		default:
			return false
		}
	})
	if err != nil {
		t.Error(err)
	}
	r.Until(20*time.Second, "the link is reset", func() bool { return r.Downs == 1 })
	if free, all := r.link.Shares(); free != 1 || all != 1 {
		t.Errorf("%d of %d parts of the memory are free, want 1 of 1", free, all)
	}
	r.answered = nil
	r.WaitUp()

	asked := 0
	r.answered = func(h virtiomsg.Header, m *virtiomsg.Slot) bool {
		if h.Bus() && h.ID == virtiomsg.BusGetDevices {
			asked++
		}
		return true
	}
	ready := func(n uint16) {
		var m virtiomsg.Slot
		(&virtiomsg.DeviceEvent{Dev: n, State: virtiomsg.DeviceReady}).Encode(&m)
		r.Send(m)
	}
	ready(dev + 1) // another one has the agent look at all that are offered
	r.Until(20*time.Second, "the agent looks for devices", func() bool { return asked > 0 })
	ready(dev + 1)
	r.Until(20*time.Second, "and once more, having seen the first answer", func() bool { return asked > 1 })
	if n := atomic.LoadUint64(&made); n != 0 {
		t.Errorf("a removed device is looked at again after a handshake (%d times)", n)
	}
	ready(dev)
	r.Until(20*time.Second, "the device that is offered anew is looked at", func() bool { return atomic.LoadUint64(&made) > 0 })
}
