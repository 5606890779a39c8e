// Package framedev is a virtio-net device whose frames go to the program itself and not to an interface: for programs on
// the host that make or take the packets of a board by package frames.
//
// It must not know messages, sockets, or boards.
package framedev

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/frames"
	"github.com/boardlink/boardlink/pci"
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/vring"
)

const (
	defaultMTU = 1500
	// overhead is what a frame has beside its packet, in bytes: an Ethernet header and two VLAN tags.
	overhead = 14 + 2*4
	// MinMTU is the smallest MTU, in bytes: IPv4 needs it.
	MinMTU = 68
	// MaxMTU is the largest MTU, in bytes.
	MaxMTU = 65535 - 14
	// startLimit is how long StartQueue, which has no deadline, waits for what uses the other queue.
	startLimit = 5 * time.Second
)

// ErrConfig is matched by New's errors.
var ErrConfig = errors.New("bad configuration")

// Config says what a device is to be like. The zero value of a field but Handler stands for its default.
type Config struct {
	Name   string // "net0", the default: for errors and status
	Number uint16 // device number on the link
	// Handler sends and receives the frames.
	Handler frames.Handler
	// MAC is this end's Ethernet address, as Port.MAC tells it; zero where the program needs none. BoardMAC is the address that the
	// driver is given; zero offers none.
	MAC, BoardMAC [6]byte
	// MTU is the largest packet either way, in bytes, MinMTU to MaxMTU; the default is 1500. The driver is told.
	MTU int
	// QueueMax is the largest queue size, in descriptors, a power of two from 2 to 32768; the default is 1024.
	QueueMax int
	// Batch is the most frames that Reserve or Receive hand out at once; the default is frames.DefaultBatch.
	Batch int
	// Shared lets Receive return frames that lie in the driver's memory, which the driver can change while they are looked at. The
	// default are copies.
	Shared bool
	// Fallback is how a Wait polls beside its doorbell.
	Fallback doorbell.Fallback
}

// Net is the device model: one queue pair, whose ends a Handler has while both queues are started and enabled.
type Net struct {
	cfg Config

	// Of the control plane's goroutine:
	running  bool
	sender   *frames.DeviceSender // while serving
	receiver *frames.DeviceReceiver

	mu      sync.Mutex // guards what follows
	notify  func(device.Event)
	acked   virtio.Features
	queues  [2]queue // by number: what the driver receives by, what it sends by
	serving *frames.Serving
	handled bool  // the Handler is serving
	ended   error // why the Handler has ended, until a queue is started anew
	lastErr error
	starts  uint64
	broken  uint64
}

type queue struct {
	started, enabled bool
	r                device.Resources
	q                vring.Device
	size             uint16
	// What is counted lives as long as the model.
	stats *frames.Stats
	bells *doorbell.Counters
	own   *dma.QueueAccount
	bus   *dma.QueueAccount // own, or the control plane's
}

var _ device.Device = (*Net)(nil)

// New checks the configuration and returns the device model. Errors match ErrConfig.
func New(cfg Config) (*Net, error) {
	if cfg.Name == "" {
		cfg.Name = "net0"
	}
	if cfg.MTU == 0 {
		cfg.MTU = defaultMTU
	}
	if cfg.QueueMax == 0 {
		cfg.QueueMax = 1024
	}
	switch {
	case cfg.Handler == nil:
		return nil, fmt.Errorf("%s: there is no Handler for its frames: %w", cfg.Name, ErrConfig)
	case cfg.MTU < MinMTU || cfg.MTU > MaxMTU:
		return nil, fmt.Errorf("%s: an MTU of %d: it has to be from %d to %d: %w", cfg.Name, cfg.MTU, MinMTU, MaxMTU, ErrConfig)
	case cfg.QueueMax < 2 || cfg.QueueMax > vring.MaxSize || cfg.QueueMax&(cfg.QueueMax-1) != 0:
		return nil, fmt.Errorf("%s: a queue size of %d: it has to be a power of two from 2 to %d: %w", cfg.Name, cfg.QueueMax, vring.MaxSize, ErrConfig)
	case cfg.Batch < 0 || cfg.Batch > frames.MaxBatch:
		return nil, fmt.Errorf("%s: a batch of %d frames: it has to be from 1 to %d: %w", cfg.Name, cfg.Batch, frames.MaxBatch, ErrConfig)
	}
	n := &Net{cfg: cfg}
	for i := range n.queues {
		own := new(dma.QueueAccount)
		n.queues[i] = queue{stats: new(frames.Stats), bells: new(doorbell.Counters), own: own, bus: own}
	}
	return n, nil
}

// DeviceID implements device.Device.
func (n *Net) DeviceID() uint32 { return virtio.IDNet }

// Features implements device.Device. Frames are complete, and each takes one buffer.
func (n *Net) Features() virtio.Features {
	f := virtio.FeaturesOf(virtio.Version1, virtio.EventIdx, virtio.InOrder, virtio.IndirectDesc, virtio.RingPacked, virtio.NetMTU, virtio.NetStatus)
	if n.cfg.BoardMAC != ([6]byte{}) {
		f.Set(virtio.NetMAC)
	}
	return f
}

// SetFeatures implements device.Device.
func (n *Net) SetFeatures(f virtio.Features, _ device.Options) error {
	if bad := f.Without(n.Features()); bad != (virtio.Features{}) {
		return fmt.Errorf("%s: the driver accepts what was not offered: %s", n.cfg.Name, bad)
	}
	if !f.Has(virtio.Version1) {
		return fmt.Errorf("%s: the driver does not accept version_1: it is not a virtio 1.x driver", n.cfg.Name)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.acked = f
	return nil
}

// Config implements device.Device.
func (n *Net) Config() []byte {
	c := virtio.NetConfig{MAC: n.cfg.BoardMAC, LinkUp: true, MaxQueuePairs: 1, MTU: uint16(n.cfg.MTU)}
	b := c.Encode()
	return b[:]
}

// WriteConfig implements device.Device: nothing in the configuration of a network device is the driver's to write.
func (n *Net) WriteConfig(uint32, []byte) error { return device.ErrReadOnly }

// Queues implements device.Device.
func (n *Net) Queues() int { return len(n.queues) }

// Queue implements device.Device.
func (n *Net) Queue(i int) device.QueueInfo {
	info := device.QueueInfo{Name: n.cfg.Name + " " + virtio.NetQueueName(i, 1)}
	if i >= 0 && i < len(n.queues) {
		info.Max, info.ToDriver = uint16(n.cfg.QueueMax), i == virtio.NetQueueRX(0)
	}
	return info
}

// Notify implements device.Device.
func (n *Net) Notify(f func(device.Event)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.notify = f
}

// lookup returns queue i and its name.
func (n *Net) lookup(i int) (*queue, string, error) {
	name := n.Queue(i).Name
	if i < 0 || i >= len(n.queues) {
		return nil, name, fmt.Errorf("%s: there is no queue %d", n.cfg.Name, i)
	}
	return &n.queues[i], name, nil
}

// ring makes the device side of queue i.
func (n *Net) ring(i int, name string, r *device.Resources, a *dma.QueueAccount, s vring.State) (vring.Device, error) {
	c := vring.Config{Name: name, Size: r.Size, State: s, Table: r.Table.Accounted(&a.Payload),
		Desc: r.Areas.Desc.Accounted(&a.Descriptor), Driver: r.Areas.Driver.Accounted(&a.Driver), Device: r.Areas.Device.Accounted(&a.Device),
		EventIdx: n.acked.Has(virtio.EventIdx), Indirect: n.acked.Has(virtio.IndirectDesc), InOrder: n.acked.Has(virtio.InOrder),
		Sent: i == virtio.NetQueueTX(0), Log: r.Log, Journal: r.Journal}
	if n.acked.Has(virtio.RingPacked) {
		return vring.NewPackedDevice(c)
	}
	return vring.NewSplitDevice(c)
}

// StartQueue implements device.Device.
func (n *Net) StartQueue(i int, r device.Resources, s vring.State) error {
	q, name, err := n.lookup(i)
	if err != nil {
		return err
	}
	if q.started {
		return fmt.Errorf("%s: %w", name, device.ErrStarted)
	}
	bus := r.Account
	if bus == nil {
		bus = q.own
	}
	ring, err := n.ring(i, name, &r, bus, s)
	if err != nil {
		return err
	}
	return n.change(time.Now().Add(startLimit), func() error {
		n.mu.Lock()
		q.started, q.r, q.q, q.size, q.bus = true, r, ring, r.Size, bus
		n.ended = nil
		n.mu.Unlock()
		return nil
	})
}

// EnableQueue implements device.Device.
func (n *Net) EnableQueue(i int, on bool, deadline time.Time) error {
	q, _, err := n.lookup(i)
	if err != nil || q.enabled == on {
		return err
	}
	return n.change(deadline, func() error {
		n.mu.Lock()
		q.enabled = on
		n.mu.Unlock()
		return nil
	})
}

// ChangeQueue implements device.Device. The Handler is called anew.
func (n *Net) ChangeQueue(i int, c device.Change, deadline time.Time) error {
	q, name, err := n.lookup(i)
	if err != nil {
		return err
	}
	if !q.started {
		return fmt.Errorf("%s: %w", name, device.ErrStopped)
	}
	return n.change(deadline, func() error {
		r, ring := q.r, q.q
		if c.Kick != nil {
			r.Kick = c.Kick
		}
		if c.Call != nil {
			r.Call = c.Call
		}
		if c.Log != nil {
			r.Log = *c.Log
			ring.SetLog(r.Log)
		}
		if c.Areas != nil {
			r.Areas = *c.Areas
			var err error
			if ring, err = n.ring(i, name, &r, q.bus, q.q.State().Rewound()); err != nil {
				return err
			}
		}
		n.mu.Lock()
		q.r, q.q = r, ring
		n.mu.Unlock()
		return nil
	})
}

// StopQueue implements device.Device.
func (n *Net) StopQueue(i int, deadline time.Time) (device.Stopped, error) {
	q, name, err := n.lookup(i)
	if err != nil {
		return device.Stopped{}, err
	}
	if !q.started {
		return device.Stopped{}, fmt.Errorf("%s: %w", name, device.ErrStopped)
	}
	var s device.Stopped
	err = n.change(deadline, func() error {
		n.mu.Lock()
		defer n.mu.Unlock()
		// Rewound: of a ring that broke, what was popped is still in flight.
		s = device.Stopped{State: q.q.State().Rewound(), Err: n.ended}
		q.started, q.r = false, device.Resources{}
		return nil
	})
	return s, err
}

// SetRunning implements device.Device.
func (n *Net) SetRunning(on bool, deadline time.Time) error {
	for i := range n.queues {
		if on && !n.queues[i].started {
			return fmt.Errorf("%s: DRIVER_OK without a queue %s", n.cfg.Name, virtio.NetQueueName(i, 1))
		}
	}
	return n.change(deadline, func() error {
		n.running = on
		return nil
	})
}

// Reset implements device.Device. It returns once the Handler has returned.
func (n *Net) Reset(deadline time.Time) error {
	n.running = false
	return n.change(deadline, func() error {
		n.mu.Lock()
		defer n.mu.Unlock()
		n.acked, n.ended = virtio.Features{}, nil
		for i := range n.queues {
			q := &n.queues[i]
			q.started, q.enabled, q.r = false, false, device.Resources{}
		}
		return nil
	})
}

// change lets the queues rest, calls f, and lets them move again as things then are.
func (n *Net) change(deadline time.Time, f func() error) error {
	if err := n.rest(deadline); err != nil {
		return err
	}
	err := f()
	if merr := n.move(); err == nil {
		err = merr
	}
	return err
}

// rest waits until nobody uses the queues. What was received is completed then, and what was not sent the driver's.
func (n *Net) rest(deadline time.Time) error {
	n.mu.Lock()
	s := n.serving
	n.mu.Unlock()
	if s == nil {
		return nil
	}
	if !s.Stop(deadline) {
		return fmt.Errorf("%s: the Handler has not returned: %w", n.cfg.Name, device.ErrStuck)
	}
	// A ring that is broken, or whose memory is gone, stays as it is.
	pci.Guard(func() { n.receiver.Done() })
	if n.sender != nil {
		pci.Guard(func() { n.sender.Close() })
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.serving, n.handled, n.sender, n.receiver = nil, false, nil, nil
	return nil
}

// move calls the Handler where both queues are started and enabled, and drops what the driver sends where it
// sends although its transmit queue is disabled.
func (n *Net) move() error {
	rx, tx := &n.queues[virtio.NetQueueRX(0)], &n.queues[virtio.NetQueueTX(0)]
	both := rx.started && rx.enabled && tx.started && tx.enabled
	if !n.running || n.ended != nil || !both && (!tx.started || tx.enabled) {
		return nil
	}
	stop, err := doorbell.NewEventfd()
	if err != nil {
		return err
	}
	moving := false
	defer func() { // also where a fault of the memory tears this out
		if !moving {
			stop.Close()
		}
	}()
	h, p := frames.Handler(frames.Discard), frames.Port{MaxFrame: n.cfg.MTU + overhead, MAC: n.cfg.MAC}
	if n.receiver, err = frames.NewDeviceReceiver(n.end(virtio.NetQueueTX(0), stop), tx.q); err != nil {
		return err
	}
	p.Receiver = n.receiver
	if both {
		if n.sender, err = frames.NewDeviceSender(n.end(virtio.NetQueueRX(0), stop), rx.q); err != nil {
			return err
		}
		h, p.Sender = n.cfg.Handler, n.sender
	}
	moving = true
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.handled = both; both {
		n.starts++
		n.lastErr = nil
	}
	n.serving = frames.Serve(h, p, stop, n.failed)
	return nil
}

// end returns the configuration of the end at queue i.
func (n *Net) end(i int, stop *doorbell.Eventfd) frames.Config {
	q := &n.queues[i]
	return frames.Config{Name: n.Queue(i).Name, MaxFrame: n.cfg.MTU + overhead, Batch: n.cfg.Batch, Copy: !n.cfg.Shared, Ring: q.r.Call, Stats: q.stats,
		Sleep: doorbell.SleeperConfig{Doorbell: q.r.Kick, Stop: stop, Fallback: n.cfg.Fallback, Counters: q.bells}}
}

// failed takes the error of the Handler.
func (n *Net) failed(err error) {
	err = fmt.Errorf("%s: %w", n.cfg.Name, err)
	if errors.Is(err, pci.ErrGone) {
		err = &device.Error{Cause: device.CauseMemory, Err: err}
	}
	n.mu.Lock()
	n.ended, n.lastErr = err, err
	n.broken++
	notify := n.notify
	n.mu.Unlock()
	if notify != nil {
		notify(device.Event{Broken: err, Queue: -1})
	}
}

// Status implements device.Device.
func (n *Net) Status() status.Device {
	n.mu.Lock()
	defer n.mu.Unlock()
	s := status.Device{Name: n.cfg.Name, Type: "net", Number: n.cfg.Number, LinkType: "frames", MTU: n.cfg.MTU, Carrier: n.handled,
		Offered: n.Features().Names(), Allowed: n.Features().Names(), Negotiated: n.acked.Names(),
		MaxPairs: 1, Counters: map[string]uint64{"starts": n.starts, "broken": n.broken}}
	if n.handled {
		s.Pairs = 1
	}
	if n.lastErr != nil {
		s.LastError = n.lastErr.Error()
	}
	for i := range n.queues {
		q := &n.queues[i]
		qs := status.Queue{Index: i, Name: virtio.NetQueueName(i, 1), Ready: q.started, Size: q.size, Pump: map[string]uint64{}}
		if q.q != nil {
			st := q.q.State()
			qs.Avail, qs.Used = st.Avail, st.Used
			qs.Ring = status.Counters(q.q.Stats().Load())
		}
		q.stats.Each(func(name string, v uint64) { qs.Pump[name] = v })
		qs.Doorbell = status.Counters(q.bells.Snapshot())
		q.bus.Describe(&qs, q.stats.Frames())
		s.Queues = append(s.Queues, qs)
	}
	return s
}

// Close implements device.Device.
func (n *Net) Close() error {
	return n.Reset(time.Time{})
}
