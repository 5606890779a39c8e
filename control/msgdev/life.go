package msgdev

import (
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"time"

	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/pci"
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/virtiomsg"
	"github.com/boardlink/boardlink/vring"
)

// errOrder: the driver does things in an order that virtio 1.2, 3.1.1 does not allow.
var errOrder = errors.New("not allowed in this device status")

// fatal tells that the memory cannot be used any more, not by any device of the link.
func fatal(err error) bool {
	return errors.Is(err, pci.ErrGone) || errors.Is(err, dma.ErrRunaway) || device.CauseOf(err) == device.CauseMemory
}

// event is the model's Notify. However much it tells, nothing of it gets lost: that the configuration
// changed, and the first cause of a reset, or one that concerns the whole link.
func (d *Server) event(e device.Event) {
	d.mu.Lock()
	if e.Broken == nil {
		d.changed = true
	} else if d.broken == nil || fatal(e.Broken) {
		d.broken = e.Broken
	}
	d.mu.Unlock()
	d.l.Wake()
}

// Tick acts on what the model has told.
func (d *Server) Tick() {
	d.mu.Lock()
	changed, broken := d.changed, d.broken
	d.changed, d.broken = false, nil
	d.mu.Unlock()
	if fatal(broken) {
		d.l.Fault(broken)
		return
	}
	if changed {
		d.gen++
		d.told = true
	}
	if broken != nil {
		d.NeedsReset(broken)
	}
	if be, ok := d.dev.(device.Linked); ok && d.linkUp != d.shownUp && d.c.Changes.Wait(time.Now()) == 0 {
		d.c.Changes.Take(time.Now(), 1) // each is a change of the carrier; the last one comes with a later beat
		be.SetPeerLink(d.linkUp)
		d.shownUp = d.linkUp
	}
	if d.told {
		var m virtiomsg.Slot
		(&virtiomsg.ConfigEvent{Status: d.status, Generation: d.gen}).Encode(&m, d.c.Number)
		if d.l.Send(&m) == nil {
			d.told = false // else with the next tick
		}
	}
}

func (d *Server) setStatus(s uint32) {
	d.stateMu.Lock()
	d.status = s
	d.stateMu.Unlock()
}

// stop stops the loops. Should they not, status and log of the link tell.
func (d *Server) stop() {
	d.l.Stopping(func() {
		d.dev.Reset(time.Time{}) // without a deadline it does not give up
		if d.c.Engines != nil {
			d.c.Engines.Release()
		}
	})
	d.queues = nil
}

// start starts the queues that the driver has set up, and the device.
func (d *Server) start() error {
	var jobs []EngineJob
	n := d.dev.Queues()
	for i := 0; i < n; i++ {
		if _, ok := d.queues[i]; !ok {
			continue
		}
		if info := d.dev.Queue(i); info.Stage > 0 {
			jobs = append(jobs, EngineJob{Queue: i, QueueInfo: info})
		}
	}
	if d.c.Engines != nil {
		d.c.Engines.Prepare(jobs)
	}
	for i := 0; i < n; i++ {
		r, ok := d.queues[i]
		if !ok {
			continue
		}
		if d.c.Engines != nil {
			r.Copy = d.c.Engines.Engine(i)
		}
		if err := d.dev.StartQueue(i, r, vring.State{}); err != nil {
			return err
		}
		if err := d.dev.EnableQueue(i, true, time.Time{}); err != nil {
			return err
		}
	}
	return d.dev.SetRunning(true, time.Time{})
}

// NeedsReset takes the device out of service until the driver resets it (virtio 1.2, 2.1.2).
func (d *Server) NeedsReset(err error) {
	d.stop()
	d.stateMu.Lock()
	d.lastErr = err.Error()
	d.stateMu.Unlock()
	if d.status&virtio.StatusNeedsReset != 0 {
		return
	}
	atomic.AddUint64(&d.c.Counters.DeviceResets, 1)
	if device.CauseOf(err) == device.CauseEnd { // whoever looks after the interface tells of it
		d.c.Log.Debug("device without an interface", "link", d.c.Link, "device", d.c.Number, "error", err)
	} else {
		d.c.Log.Warn("device needs a reset", "link", d.c.Link, "device", d.c.Number, "error", err)
	}
	d.setStatus(d.status | virtio.StatusNeedsReset)
	d.told = true
	d.l.Wake()
}

// Reset is what status 0 and the end of the link do.
func (d *Server) Reset() {
	d.stop()
	d.mu.Lock()
	d.changed, d.broken = false, nil // of what was before
	d.mu.Unlock()
	d.driver = virtio.Features{}
	d.linkUp, d.shownUp = true, true
	d.told = false
	d.setStatus(0)
}

// starting tells whether a write of s to the device status starts the model.
func (d *Server) starting(s uint32) bool {
	return s&virtio.StatusDriverOK != 0 && d.status&(virtio.StatusDriverOK|virtio.StatusNeedsReset) == 0 &&
		(s|d.status)&(virtio.StatusFeaturesOK|virtio.StatusFailed) == virtio.StatusFeaturesOK
}

// driverStatus is the driver's write to the device status (virtio 1.2, 2.1 and 3.1.1). What is
// not possible does not show in d.status afterwards.
func (d *Server) driverStatus(s uint32) {
	if s == 0 {
		d.Reset()
		return
	}
	d.took(s)
	// Bits stay set until a reset; NEEDS_RESET is the device's, and others mean nothing.
	s &= virtio.StatusAcknowledge | virtio.StatusDriver | virtio.StatusFeaturesOK | virtio.StatusDriverOK | virtio.StatusFailed
	s |= d.status
	fresh := s &^ d.status
	if fresh&virtio.StatusFeaturesOK != 0 {
		if err := d.dev.SetFeatures(d.driver, device.Options{}); err != nil {
			s &^= virtio.StatusFeaturesOK
			d.stateMu.Lock()
			d.lastErr = err.Error()
			d.stateMu.Unlock()
			if d.logged != err.Error() { // the driver tries again and again
				d.logged, d.gaveUp = err.Error(), true
				d.c.Log.Warn("features refused", "link", d.c.Link, "device", d.c.Number, "error", err)
			}
		}
	}
	if s&virtio.StatusFailed != 0 {
		d.stop()
		if !d.gaveUp {
			d.gaveUp = true
			d.c.Log.Warn("the agent cannot use the device: its log says why (--link is to be the same on both sides)", "link", d.c.Link, "device", d.c.Number,
				"memory", d.c.Room().String())
		}
		d.setStatus(s)
		return
	}
	if fresh&virtio.StatusDriverOK != 0 && s&virtio.StatusNeedsReset == 0 {
		err := error(nil)
		if s&virtio.StatusFeaturesOK == 0 {
			err = fmt.Errorf("DRIVER_OK without FEATURES_OK: %w", errOrder)
		} else {
			d.c.Starts.Take(time.Now(), 1)
			err = d.start()
		}
		if err != nil {
			d.setStatus(s &^ virtio.StatusDriverOK)
			d.NeedsReset(err)
			return
		}
		note := d.without()
		d.stateMu.Lock()
		fresh := note != d.note
		d.lastErr, d.note = "", note
		d.stateMu.Unlock()
		d.gaveUp, d.logged = false, ""
		d.c.Log.Info("device running", "link", d.c.Link, "device", d.c.Number, "features", d.features())
		if note != "" && fresh {
			d.c.Log.Warn("the board accepts less than is offered", "link", d.c.Link, "device", d.c.Number, "note", note)
		}
	}
	d.setStatus(s)
}

func (d *Server) setQueue(q *virtiomsg.VQueue) error {
	if d.status&virtio.StatusFeaturesOK == 0 || d.status&virtio.StatusDriverOK != 0 {
		return fmt.Errorf("queue %d set up: %w", q.Index, errOrder)
	}
	if uint64(q.Index) >= uint64(d.dev.Queues()) || q.Size > 1<<15 {
		return fmt.Errorf("queue %d of size %d does not exist", q.Index, q.Size)
	}
	d.stateMu.Lock()
	d.push = d.c.Far(dma.Addr(q.Desc))
	d.stateMu.Unlock()
	i := int(q.Index)
	info := d.dev.Queue(i)
	if info.Max == 0 {
		return fmt.Errorf("%s: there is no queue %d with the features that the driver accepted", info.Name, i)
	}
	areas, err := device.Translate(d.c.Table.Load(), info, uint16(q.Size), d.driver.Has(virtio.RingPacked),
		dma.Addr(q.Desc), dma.Addr(q.Driver), dma.Addr(q.Device))
	if err != nil {
		return err
	}
	if d.queues == nil {
		d.queues = map[int]device.Resources{}
	}
	d.queues[i] = device.Resources{Size: uint16(q.Size), Areas: areas, Table: d.c.Table, Kick: d.l.Kicked(d.c.Number, i), Call: d.l.Call(d.c.Number, i)}
	return nil
}

// Pushes tells that the driver, which runs, has put queues into this side's memory.
func (d *Server) Pushes() bool {
	d.stateMu.Lock()
	defer d.stateMu.Unlock()
	return d.push && d.status&virtio.StatusDriverOK != 0
}

// Status describes the device for an operator.
func (d *Server) Status() status.Device {
	s := d.dev.Status()
	d.stateMu.Lock()
	defer d.stateMu.Unlock()
	s.Status = virtio.StatusString(d.status)
	if d.note != "" && d.status&virtio.StatusDriverOK != 0 {
		s.Notes = append(s.Notes, d.note)
	}
	if s.LastError == "" {
		s.LastError = d.lastErr
	}
	return s
}

// features returns the names of the accepted features: the model knows what those of its type mean.
func (d *Server) features() string {
	if names := d.c.Device.Status().Negotiated; len(names) > 0 {
		return strings.Join(names, " ")
	}
	return d.driver.String()
}

// without says what of the offered features the driver left out, and why.
func (d *Server) without() string {
	e, ok := d.dev.(device.Explainer)
	if !ok {
		return ""
	}
	r := d.c.Room()
	d.stateMu.Lock()
	r.Push = d.push
	d.stateMu.Unlock()
	return e.Without(d.driver, r)
}

// took notes that the driver has written a device status.
func (d *Server) took(s uint32) {
	if s&virtio.StatusDriver != 0 {
		d.stateMu.Lock()
		d.driven = true
		d.stateMu.Unlock()
	}
}

// Fresh begins the time that Driven tells of.
func (d *Server) Fresh() {
	d.stateMu.Lock()
	d.driven = false
	d.stateMu.Unlock()
}

// Driven tells whether the driver has taken the device since Fresh, or has it still.
func (d *Server) Driven() bool {
	d.stateMu.Lock()
	defer d.stateMu.Unlock()
	return d.driven || d.status != 0
}
