package agent

import "github.com/boardlink/boardlink/virtiomsg"

// tellUnmet logs what is unmet, where it was not the last time. The host may make up ever new things by its MTU: the message is the
// same for all of them, so that the log's limit counts them as one.
func (d *device) tellUnmet() {
	lines := d.n.Unmet()
	last := d.unmet
	d.unmet = lines
	for _, s := range lines {
		if !has(last, s) {
			d.l.cfg.Log.Warn("not all that was asked for", "link", d.l.cfg.Name, "device", d.n.Name(), "interface", d.n.Joined(), "note", s)
		}
	}
}

func has(lines []string, s string) bool {
	for _, l := range lines {
		if l == s {
			return true
		}
	}
	return false
}

// tellWarning logs what the device does without, as said of tellUnmet.
func (d *device) tellWarning() {
	if w := d.n.Warning(); w != "" {
		d.l.cfg.Log.Warn("the interface is used as it is", "link", d.l.cfg.Name, "device", d.n.Name(), "interface", d.n.Joined(), "note", w)
	}
}

// tellLink tells the host whether the interface is up, where that has changed.
func (d *device) tellLink() {
	if !d.up || d.l.s.Peer().Features&virtiomsg.FeatureLinkState == 0 {
		return
	}
	up := d.n.LinkUp()
	if up == d.toldUp {
		return
	}
	var m virtiomsg.Slot
	virtiomsg.EncodeLink(&m, d.n.Number(), up)
	if d.l.s.Send(&m) == nil {
		d.toldUp = up // else with the next tick
	}
}
