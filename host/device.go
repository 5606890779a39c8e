package host

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/pci"
	"github.com/boardlink/boardlink/session"
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/tunbridge"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/virtiomsg"
)

// errOrder: the driver does things in an order that virtio 1.2, 3.1.1 does not allow.
var errOrder = errors.New("not allowed in this device status")

// served serves virtio-msg for one device model: it keeps what the transport of a device
// keeps (status, accepted features) and drives the model through device.Device.
type served struct {
	l      *Link
	number uint16
	be     device.Device

	engines engineSet // for be

	// The session's goroutine only.
	driver  virtio.Features // what the driver has written so far
	gen     uint32          // configuration generation
	told    bool            // a ConfigEvent has to be sent: one for all that has changed
	starts  session.Bucket  // starts of the model
	changes session.Bucket  // changes of the driver's end that the model is told of
	gaveUp  bool            // the driver did, which was logged; until it runs
	logged  string          // the refusal of features that was logged; until it runs
	linkUp  bool            // the driver's end, as it told last
	shownUp bool            // and as the model knows it
	ran     bool            // the driver has taken the device since the link came up
	stateMu sync.Mutex      // guards what describe reads
	push    bool            // the driver put a queue's descriptor area into the pool
	status  uint32
	lastErr string
	note    string // what the driver goes without

	undriven bool // the driver leaves the device alone, which was logged

	mu      sync.Mutex // guards what the model has told
	changed bool       // its configuration
	broken  error      // why it needs a reset
}

func newDevice(l *Link, n uint16, be device.Device) *served {
	return &served{l: l, number: n, be: be, linkUp: true, shownUp: true,
		starts: session.NewBucket(l.cfg.Pace.Starts), changes: session.NewBucket(l.cfg.Pace.Changes)}
}

// event is the model's Notify. However much it tells, nothing of it gets lost: that the configuration
// changed, and the first cause of a reset, or one that concerns the whole link.
func (d *served) event(e device.Event) {
	d.mu.Lock()
	if e.Broken == nil {
		d.changed = true
	} else if d.broken == nil || fatal(e.Broken) {
		d.broken = e.Broken
	}
	d.mu.Unlock()
	d.l.s.Wake()
}

// fatal tells that the window cannot be used any more.
func fatal(err error) bool {
	return errors.Is(err, pci.ErrGone) || errors.Is(err, tunbridge.ErrFault) || errors.Is(err, dma.ErrRunaway)
}

// events acts on what the model has told.
func (d *served) events() {
	d.mu.Lock()
	changed, broken := d.changed, d.broken
	d.changed, d.broken = false, nil
	d.mu.Unlock()
	if fatal(broken) {
		d.l.s.Fault(broken)
		return
	}
	if changed {
		d.gen++
		d.told = true
	}
	if broken != nil {
		d.needsReset(broken)
	}
	if be, ok := d.be.(device.Linked); ok && d.linkUp != d.shownUp && d.changes.Wait(time.Now()) == 0 {
		d.changes.Take(time.Now(), 1) // each is a change of the carrier; the last one comes with a later beat
		be.SetPeerLink(d.linkUp)
		d.shownUp = d.linkUp
	}
	if d.told {
		var m virtiomsg.Slot
		(&virtiomsg.ConfigEvent{Status: d.status, Generation: d.gen}).Encode(&m, d.number)
		if d.l.s.Send(&m) == nil {
			d.told = false // else with the next tick
		}
	}
}

func (d *served) setStatus(s uint32) {
	d.stateMu.Lock()
	d.status = s
	d.stateMu.Unlock()
}

// stop stops the loops. Should they not, status and log of the link tell.
func (d *served) stop() { d.l.s.Stopping(func() { d.be.Stop() }) }

// needsReset takes the device out of service until the driver resets it (virtio 1.2, 2.1.2).
func (d *served) needsReset(err error) {
	d.stop()
	d.stateMu.Lock()
	d.lastErr = err.Error()
	d.stateMu.Unlock()
	if d.status&virtio.StatusNeedsReset != 0 {
		return
	}
	atomic.AddUint64(&d.l.n.DeviceResets, 1)
	if errors.Is(err, tunbridge.ErrGone) { // whoever looks after the interface tells of it
		d.l.cfg.Log.Debug("device without an interface", "link", d.l.cfg.Name, "device", d.number, "error", err)
	} else {
		d.l.cfg.Log.Warn("device needs a reset", "link", d.l.cfg.Name, "device", d.number, "error", err)
	}
	d.setStatus(d.status | virtio.StatusNeedsReset)
	d.told = true
	d.l.s.Wake()
}

// reset is what status 0 and the end of the link do.
func (d *served) reset() {
	d.stop()
	d.mu.Lock()
	d.changed, d.broken = false, nil // of what was before
	d.mu.Unlock()
	d.driver = virtio.Features{}
	d.linkUp, d.shownUp = true, true
	d.told = false
	d.setStatus(0)
}

func (d *served) queue(i int) session.QueueID { return session.QueueID{Dev: d.number, Queue: i} }

// message serves a request and writes its answer into m.
func (d *served) message(h virtiomsg.Header, m *virtiomsg.Slot) (answer bool, err error) {
	switch h.ID {
	case virtiomsg.GetDeviceInfo:
		if err := virtiomsg.DecodeEmptyRequest(m, h.ID); err != nil {
			return false, err
		}
		r := virtiomsg.DeviceInfo{DeviceID: d.be.DeviceID(), VendorID: virtio.VendorID, FeatureBits: 32 * virtio.FeatureBlocks,
			ConfigSize: uint32(len(d.be.Config())), MaxQueues: uint32(d.be.Queues())}
		r.Encode(m, h.Dev, h.Token)
	case virtiomsg.GetDeviceFeatures:
		index, count, err := virtiomsg.DecodeGetDeviceFeatures(m)
		if err != nil {
			return false, err
		}
		b := virtiomsg.BlocksOf(d.be.Features(), index, count)
		b.EncodeResponse(m, h.Dev, h.Token)
	case virtiomsg.SetDriverFeatures:
		var b virtiomsg.FeatureBlocks
		if err := b.DecodeRequest(m); err != nil {
			return false, err
		}
		if d.status&virtio.StatusFeaturesOK != 0 {
			return false, fmt.Errorf("features written after FEATURES_OK: %w", errOrder)
		}
		f := d.driver // as it is, should the blocks be refused
		if err := b.Store(&f); err != nil {
			return false, err
		}
		d.driver = f
		virtiomsg.EncodeEmptyResponse(m, h.ID, h.Dev, h.Token)
	case virtiomsg.GetConfig:
		off, n, err := virtiomsg.DecodeGetConfig(m)
		if err != nil {
			return false, err
		}
		r := virtiomsg.ConfigData{Generation: d.gen, Offset: off}
		if c := d.be.Config(); uint64(off)+uint64(n) <= uint64(len(c)) {
			r.Len = n
			copy(r.Data[:n], c[off:])
		}
		r.EncodeResponse(m, h.ID, h.Dev, h.Token)
	case virtiomsg.SetConfig:
		var c virtiomsg.ConfigData
		if err := c.DecodeRequest(m); err != nil {
			return false, err
		}
		// A write that is refused shows by an answer without data (docs/wire.md, 5).
		r := virtiomsg.ConfigData{Generation: d.gen, Offset: c.Offset}
		if c.Len > 0 && uint64(c.Offset)+uint64(c.Len) <= uint64(len(d.be.Config())) && d.be.WriteConfig(c.Offset, c.Data[:c.Len]) == nil {
			r.Len, r.Data = c.Len, c.Data
		}
		r.EncodeResponse(m, h.ID, h.Dev, h.Token)
	case virtiomsg.GetDeviceStatus:
		if err := virtiomsg.DecodeEmptyRequest(m, h.ID); err != nil {
			return false, err
		}
		virtiomsg.EncodeStatus(m, h.ID, h.Dev, h.Token, d.status)
	case virtiomsg.SetDeviceStatus:
		s, err := virtiomsg.DecodeSetDeviceStatus(m)
		if err != nil {
			return false, err
		}
		d.driverStatus(s)
		virtiomsg.EncodeStatus(m, h.ID, h.Dev, h.Token, d.status)
	case virtiomsg.GetVQueue:
		i, err := virtiomsg.DecodeQueueRequest(m, h.ID)
		if err != nil {
			return false, err
		}
		r := virtiomsg.VQueue{Index: i}
		if uint64(i) < uint64(d.be.Queues()) {
			r.MaxSize = uint32(d.be.QueueMax(int(i)))
		}
		r.EncodeResponse(m, h.Dev, h.Token)
	case virtiomsg.SetVQueue:
		var q virtiomsg.VQueue
		if err := q.DecodeRequest(m); err != nil {
			return false, err
		}
		if err := d.setQueue(&q); err != nil {
			// There is no negative answer: the status tells.
			d.needsReset(err)
		}
		virtiomsg.EncodeEmptyResponse(m, h.ID, h.Dev, h.Token)
	case virtiomsg.GetShm:
		i, err := virtiomsg.DecodeQueueRequest(m, h.ID)
		if err != nil {
			return false, err
		}
		(&virtiomsg.Shm{Index: i}).Encode(m, h.Dev, h.Token)
	case virtiomsg.EventLink:
		up, err := virtiomsg.DecodeLink(m)
		if err != nil {
			return false, err
		}
		d.linkUp = up // the model hears of it with the next tick: a driver may tell again and again
		return false, nil
	case virtiomsg.EventAvail:
		// A kick of a peer without doorbells: the poll fallback finds what it is for.
		return false, nil
	case virtiomsg.ResetVQueue:
		return false, fmt.Errorf("RESET_VQUEUE without ring_reset: %w", errOrder)
	default:
		atomic.AddUint64(&d.l.n.Unknown, 1)
		d.l.cfg.Log.Debug("an unknown message", "link", d.l.cfg.Name, "message", h.String())
		return false, nil
	}
	return true, nil
}

// starting tells whether a write of s to the device status starts the model.
func (d *served) starting(s uint32) bool {
	return s&virtio.StatusDriverOK != 0 && d.status&(virtio.StatusDriverOK|virtio.StatusNeedsReset) == 0 &&
		(s|d.status)&(virtio.StatusFeaturesOK|virtio.StatusFailed) == virtio.StatusFeaturesOK
}

// driverStatus is the driver's write to the device status (virtio 1.2, 2.1 and 3.1.1). What is
// not possible does not show in d.status afterwards.
func (d *served) driverStatus(s uint32) {
	if s == 0 {
		d.reset()
		return
	}
	d.driven(s)
	// Bits stay set until a reset; NEEDS_RESET is the device's, and others mean nothing.
	s &= virtio.StatusAcknowledge | virtio.StatusDriver | virtio.StatusFeaturesOK | virtio.StatusDriverOK | virtio.StatusFailed
	s |= d.status
	fresh := s &^ d.status
	if fresh&virtio.StatusFeaturesOK != 0 {
		if err := d.be.SetFeatures(d.driver); err != nil {
			s &^= virtio.StatusFeaturesOK
			d.stateMu.Lock()
			d.lastErr = err.Error()
			d.stateMu.Unlock()
			if d.logged != err.Error() { // the driver tries again and again
				d.logged, d.gaveUp = err.Error(), true
				d.l.cfg.Log.Warn("features refused", "link", d.l.cfg.Name, "device", d.number, "error", err)
			}
		}
	}
	if s&virtio.StatusFailed != 0 {
		d.stop()
		if !d.gaveUp {
			d.gaveUp = true
			d.l.cfg.Log.Warn("the agent cannot use the device: its log says why (--link is to be the same on both sides)", "link", d.l.cfg.Name, "device", d.number,
				"memory", d.memory())
		}
		d.setStatus(s)
		return
	}
	if fresh&virtio.StatusDriverOK != 0 && s&virtio.StatusNeedsReset == 0 {
		err := error(nil)
		if s&virtio.StatusFeaturesOK == 0 {
			err = fmt.Errorf("DRIVER_OK without FEATURES_OK: %w", errOrder)
		} else {
			d.starts.Take(time.Now(), 1)
			err = d.be.Start()
		}
		if err != nil {
			d.setStatus(s &^ virtio.StatusDriverOK)
			d.needsReset(err)
			return
		}
		note := d.without()
		d.stateMu.Lock()
		fresh := note != d.note
		d.lastErr, d.note = "", note
		d.stateMu.Unlock()
		d.gaveUp, d.logged = false, ""
		d.l.cfg.Log.Info("device running", "link", d.l.cfg.Name, "device", d.number, "features", d.driver.String())
		if note != "" && fresh {
			d.l.cfg.Log.Warn("the board accepts less than is offered", "link", d.l.cfg.Name, "device", d.number, "note", note)
		}
	}
	d.setStatus(s)
}

func (d *served) setQueue(q *virtiomsg.VQueue) error {
	if d.status&virtio.StatusFeaturesOK == 0 || d.status&virtio.StatusDriverOK != 0 {
		return fmt.Errorf("queue %d set up: %w", q.Index, errOrder)
	}
	if uint64(q.Index) >= uint64(d.be.Queues()) || q.Size > 1<<15 {
		return fmt.Errorf("queue %d of size %d does not exist", q.Index, q.Size)
	}
	id := d.queue(int(q.Index))
	call := d.l.s.Ringer(id)
	d.stateMu.Lock()
	d.push = dma.Addr(q.Desc) >= poolLink
	d.stateMu.Unlock()
	return d.be.SetQueue(int(q.Index), device.QueueConfig{Size: uint16(q.Size), Desc: dma.Addr(q.Desc), Driver: dma.Addr(q.Driver), Device: dma.Addr(q.Device),
		Kick: d.l.s.Waiter(id), Call: call})
}

// memory says how much memory the devices of the link share.
func (d *served) memory() string {
	board, pool, n := d.l.memory()
	s := fmt.Sprintf("%d bytes of the board", board)
	if pool > 0 {
		s += fmt.Sprintf(" and %d of this side", pool)
	}
	if n == 1 {
		return s + " for 1 device"
	}
	return fmt.Sprintf("%s for %d devices", s, n)
}

// without says which segmentation bits the driver did not accept, and why, as far as it shows: "" where it accepted them
// all. A driver without room for frames of 64 KiB leaves them out (docs/wire.md, section 7).
func (d *served) without() string {
	if d.be.DeviceID() != virtio.IDNet {
		return ""
	}
	lost := d.be.Features().Without(d.driver).And(virtio.FeaturesFromMask(tunbridge.NetFToDriverLong | tunbridge.NetFToDeviceLong))
	if lost == (virtio.Features{}) {
		return ""
	}
	board, pool, n := d.l.memory()
	d.stateMu.Lock()
	push := d.push
	d.stateMu.Unlock()
	pairs := 0
	for _, q := range d.be.Status().Queues {
		if q.Ready && q.Index%2 == 0 && q.Name != "ctrl" {
			pairs++
		}
	}
	if pairs > 1 {
		n *= pairs
	}
	room := board / uint64(n)
	if push && pool/uint64(n) < room {
		room = pool / uint64(n)
	}
	if !push {
		room /= 2 // for both directions
	}
	if room < tunbridge.LongRoom+tunbridge.LongRoom/8 { // and rings
		return fmt.Sprintf("without %s: frames of 64 KiB have no room in %s, they take %d for each queue pair and direction", lost, d.memory(), tunbridge.LongRoom)
	}
	return fmt.Sprintf("without %s: the agent does not accept them", lost)
}

// pushes tells that the driver uses the pool.
func (d *served) pushes() bool {
	d.stateMu.Lock()
	defer d.stateMu.Unlock()
	return d.push && d.status&virtio.StatusDriverOK != 0
}

func (d *served) describe() status.Device {
	s := d.be.Status()
	d.stateMu.Lock()
	defer d.stateMu.Unlock()
	s.Status = virtio.StatusString(d.status)
	if d.note != "" && d.status&virtio.StatusDriverOK != 0 {
		s.Notes = append(s.Notes, d.note)
	}
	if s.LastError == "" {
		s.LastError = d.lastErr
	}
	if d.undriven {
		s.Notes = append(s.Notes, undrivenNote)
	}
	return s
}
