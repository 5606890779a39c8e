package host

import (
	"time"

	"github.com/boardlink/boardlink/virtio"
)

// undrivenAfter is how long a link is up when a device that the agent has not touched is told of.
const undrivenAfter = 3 * time.Second

// undrivenNote says what to do about a device that the agent leaves alone.
const undrivenNote = "the agent does not drive this device: give the agent a --net for it as well, or take it away here"

// tellUndriven logs once, while the link is up, which devices the agent leaves alone: else a device too many would
// show nowhere.
func (l *Link) tellUndriven() {
	if l.upSince.IsZero() || time.Since(l.upSince) < undrivenAfter {
		return
	}
	for _, d := range l.devs {
		if d.ran || d.undriven {
			continue
		}
		d.stateMu.Lock()
		d.undriven = d.status == 0
		d.stateMu.Unlock()
		if d.undriven {
			l.cfg.Log.Warn(undrivenNote, "link", l.cfg.Name, "device", d.number, "interface", d.be.Status().Interface)
		}
	}
}

// linkUp and linkDown begin and end the time in which devices are expected to be driven.
func (l *Link) linkUp() {
	l.upSince = time.Now()
	for _, d := range l.devs {
		d.ran = false
		d.stateMu.Lock()
		d.undriven = false
		d.stateMu.Unlock()
	}
}

func (l *Link) linkDown() {
	l.upSince = time.Time{}
	for _, d := range l.devs {
		d.stateMu.Lock()
		d.undriven = false // nobody is there who could
		d.stateMu.Unlock()
	}
}

// driven notes that the driver has written a device status.
func (d *served) driven(s uint32) {
	if s&virtio.StatusDriver != 0 {
		d.ran = true
		d.stateMu.Lock()
		d.undriven = false
		d.stateMu.Unlock()
	}
}
