package agent

import "github.com/boardlink/boardlink/virtiomsg"

// tellUnmet logs what is unmet, each thing once.
func (d *device) tellUnmet() {
	for _, s := range d.n.Unmet() {
		if d.told[s] {
			continue
		}
		if d.told == nil {
			d.told = map[string]bool{}
		}
		d.told[s] = true
		d.l.cfg.Log.Warn(s, "link", d.l.cfg.Name, "device", d.n.Name(), "interface", d.n.Joined())
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
