package host

import (
	"sync/atomic"
	"time"
)

// undrivenAfter is how long a device of a link that is up waits for the agent to touch it before it is told of.
const undrivenAfter = 3 * time.Second

// undrivenNote says what to do about a device that the agent leaves alone.
const undrivenNote = "the agent does not drive this device: give the agent a --net for it as well, or take it away here; " +
	"where it has one, its log says what keeps it from its interface"

// tellUndriven logs once, while the link is up, which devices the agent leaves alone: else a device too many would
// show nowhere.
func (l *Link) tellUndriven() {
	if !l.up {
		return
	}
	for _, d := range l.devs {
		if time.Since(d.since) < undrivenAfter {
			continue
		}
		if d.Driven() {
			atomic.StoreUint32(&d.undriven, 0)
		} else if atomic.CompareAndSwapUint32(&d.undriven, 0, 1) {
			l.cfg.Log.Warn(undrivenNote, "link", l.cfg.Name, "device", d.number, "interface", d.dev.Status().Interface)
		}
	}
}

// linkUp and linkDown begin and end the time in which devices are expected to be driven.
func (l *Link) linkUp() {
	l.up = true
	for _, d := range l.devs {
		d.since = time.Now()
		d.Fresh()
		atomic.StoreUint32(&d.undriven, 0)
	}
}

func (l *Link) linkDown() {
	l.up = false
	for _, d := range l.devs {
		atomic.StoreUint32(&d.undriven, 0) // nobody is there who could
	}
}
