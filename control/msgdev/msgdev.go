// Package msgdev serves a device model to a driver over virtio-msg: it answers the driver's requests, and keeps what a
// virtio transport keeps of a device: its status, the accepted features, the configuration generation.
//
// It must not know boards, link pages, or what a device is for.
package msgdev

import (
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/virtiomsg"
)

// Link is what carries the messages: one end of a link, on the device side.
type Link interface {
	// Send sends a message. An error: it was not sent.
	Send(m *virtiomsg.Slot) error
	// Wake asks for Server.Tick soon. Any goroutine may call it.
	Wake()
	// Stopping runs f, which stops loops, and tells an operator where that takes too long.
	Stopping(f func())
	// Fault takes the link down: its memory cannot be used any more.
	Fault(err error)
	// Call returns what rings the driver for a queue of device dev, Kicked the end of this side's doorbell for it.
	Call(dev uint16, queue int) doorbell.Ringer
	Kicked(dev uint16, queue int) doorbell.Waiter
}

// Logger hears what happens. Arguments behind the message are pairs of names and values.
type Logger interface {
	Debug(msg string, args ...interface{})
	Info(msg string, args ...interface{})
	Warn(msg string, args ...interface{})
}

// Limiter keeps something within a rate.
type Limiter interface {
	// Wait returns how long it takes until it may happen; 0: now. Take notes that it happens, n times.
	Wait(now time.Time) time.Duration
	Take(now time.Time, n int)
}

// Counters of the devices of a link, updated with sync/atomic. They need 64-bit alignment.
type Counters struct {
	Unknown      uint64 // messages that are not known here
	DeviceResets uint64 // devices that went to NEEDS_RESET
}

// Config says which model is served, and how.
type Config struct {
	Link     string // its name, for the log
	Number   uint16 // of the device on the link
	Device   device.Device
	Log      Logger
	Counters *Counters
	// Starts limits starts of the model, Changes changes of the driver's end that the model is told of.
	Starts, Changes Limiter
	// Table translates the addresses that the driver gives, while the link is up.
	Table *dma.TableRef
	// Engines are the copy engines for the device's queues; nil: there are none.
	Engines Engines
	// Room says how much memory the driver's side has; Far whether an address lies in this side's.
	Room func() device.Room
	Far  func(dma.Addr) bool
}

// EngineJob is a queue that may use a copy engine.
type EngineJob struct {
	Queue int
	device.QueueInfo
}

// Engines hands out copy engines for the queues of one device. What cannot be had is left to the
// processor. The Server calls it on the link's goroutine.
type Engines interface {
	// Prepare opens engines for the queues of a device that starts.
	Prepare(jobs []EngineJob)
	// Engine returns what Prepare opened for a queue; nil: the processor copies.
	Engine(queue int) *device.CopyEngine
	// Release closes all engines: then they touch no memory any more. The queues have stopped.
	Release()
}

// Server serves one device model. Its methods belong to the link's goroutine, but for Status, Pushes and Driven.
type Server struct {
	l   Link
	c   Config
	dev device.Device

	driver  virtio.Features          // what the driver has written so far
	queues  map[int]device.Resources // that the driver has set up
	gen     uint32                   // configuration generation
	told    bool                     // a ConfigEvent has to be sent: one for all that has changed
	gaveUp  bool                     // the driver did, which was logged; until it runs
	logged  string                   // the refusal of features that was logged; until it runs
	linkUp  bool                     // the driver's end, as it told last
	shownUp bool                     // and as the model knows it

	stateMu sync.Mutex // guards what Status, Pushes and Driven read
	push    bool       // the driver put a queue's descriptor area into this side's memory
	status  uint32
	lastErr string
	note    string // what the driver goes without
	driven  bool   // the driver has taken the device since Fresh

	mu      sync.Mutex // guards what the model has told
	changed bool       // its configuration
	broken  error      // why it needs a reset
}

// New returns the server of a model that is stopped, and is told of by nobody else.
func New(l Link, c Config) *Server {
	d := &Server{l: l, c: c, dev: c.Device, linkUp: true, shownUp: true}
	c.Device.Notify(d.event)
	return d
}

// Number returns the device number on the link.
func (d *Server) Number() uint16 { return d.c.Number }

// Wait returns how long a request has to wait: starts of a device take the kernel's lock of all network
// configuration, so a driver that asks for them without end waits.
func (d *Server) Wait(h virtiomsg.Header, m *virtiomsg.Slot) time.Duration {
	if h.ID != virtiomsg.SetDeviceStatus {
		return 0
	}
	s, err := virtiomsg.DecodeSetDeviceStatus(m)
	if err != nil || !d.starting(s) {
		return 0
	}
	return d.c.Starts.Wait(time.Now())
}

// Message serves a request and writes its answer into m.
func (d *Server) Message(h virtiomsg.Header, m *virtiomsg.Slot) (answer bool, err error) {
	switch h.ID {
	case virtiomsg.GetDeviceInfo:
		if err := virtiomsg.DecodeEmptyRequest(m, h.ID); err != nil {
			return false, err
		}
		r := virtiomsg.DeviceInfo{DeviceID: d.dev.DeviceID(), VendorID: virtio.VendorID, FeatureBits: 32 * virtio.FeatureBlocks,
			ConfigSize: uint32(len(d.dev.Config())), MaxQueues: uint32(d.dev.Queues())}
		r.Encode(m, h.Dev, h.Token)
	case virtiomsg.GetDeviceFeatures:
		index, count, err := virtiomsg.DecodeGetDeviceFeatures(m)
		if err != nil {
			return false, err
		}
		b := virtiomsg.BlocksOf(d.dev.Features(), index, count)
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
		if c := d.dev.Config(); uint64(off)+uint64(n) <= uint64(len(c)) {
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
		if c.Len > 0 && uint64(c.Offset)+uint64(c.Len) <= uint64(len(d.dev.Config())) && d.dev.WriteConfig(c.Offset, c.Data[:c.Len]) == nil {
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
		if uint64(i) < uint64(d.dev.Queues()) {
			r.MaxSize = uint32(d.dev.Queue(int(i)).Max)
		}
		r.EncodeResponse(m, h.Dev, h.Token)
	case virtiomsg.SetVQueue:
		var q virtiomsg.VQueue
		if err := q.DecodeRequest(m); err != nil {
			return false, err
		}
		if err := d.setQueue(&q); err != nil {
			// There is no negative answer: the status tells.
			d.NeedsReset(err)
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
		atomic.AddUint64(&d.c.Counters.Unknown, 1)
		d.c.Log.Debug("an unknown message", "link", d.c.Link, "message", h.String())
		return false, nil
	}
	return true, nil
}
