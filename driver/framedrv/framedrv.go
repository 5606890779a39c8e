// Package framedrv drives a virtio-net device whose frames go to the program itself and not to an interface: for programs
// on a board that make or take their packets by package frames.
//
// It must not know messages, sockets, or boards.
package framedrv

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/driver"
	"github.com/boardlink/boardlink/frames"
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
)

// ErrConfig is matched by New's errors.
var ErrConfig = errors.New("bad configuration")

// Config says what a device is to be like on this side. The zero value of a field but Handler stands for its default.
type Config struct {
	Name   string // "net0", the default: for errors, log and status
	Number uint16 // device number on the link
	// Handler sends and receives the frames.
	Handler frames.Handler
	// MTU is the largest packet that is sent, in bytes, MinMTU to MaxMTU; where the device has a lower one, that holds. The
	// default is the device's, or 1500.
	MTU int
	// QueueSize is in descriptors, a power of two from 2 to 32768; the default is frames.DefaultQueue. The device may
	// ask for fewer, and where memory is short fewer frames are in flight.
	QueueSize int
	// Packed asks for packed virtqueues, which need placement window. The default are split ones.
	Packed bool
	// Deny are features not to be accepted.
	Deny virtio.Features
	// Batch is the most frames that Reserve or Receive hand out at once; the default is frames.DefaultBatch.
	Batch int
	// Fallback is how a Wait polls beside its doorbell.
	Fallback doorbell.Fallback
}

// Net drives one virtio-net device with one queue pair.
type Net struct {
	cfg Config

	mu        sync.Mutex // guards what Status reads
	offered   virtio.Features
	acked     virtio.Features
	devStatus uint32
	net       virtio.NetConfig
	mtu       int
	queues    [2]queue
	serving   *frames.Serving
	lastErr   error
	ups       uint64
	broken    uint64
}

// queue is the receive queue (0) or the transmit queue (1).
type queue struct {
	size  uint16
	q     vring.Driver
	stats *frames.Stats
	bells *doorbell.Counters
	bus   *dma.QueueAccount
}

var _ driver.Driver = (*Net)(nil)

// New checks the configuration and returns the driver. Errors match ErrConfig.
func New(cfg Config) (*Net, error) {
	if cfg.Name == "" {
		cfg.Name = "net0"
	}
	if cfg.QueueSize == 0 {
		cfg.QueueSize = frames.DefaultQueue
	}
	switch {
	case cfg.Handler == nil:
		return nil, fmt.Errorf("%s: there is no Handler for its frames: %w", cfg.Name, ErrConfig)
	case cfg.MTU != 0 && (cfg.MTU < MinMTU || cfg.MTU > MaxMTU):
		return nil, fmt.Errorf("%s: an MTU of %d: it has to be from %d to %d: %w", cfg.Name, cfg.MTU, MinMTU, MaxMTU, ErrConfig)
	case cfg.QueueSize < 2 || cfg.QueueSize > vring.MaxSize || cfg.QueueSize&(cfg.QueueSize-1) != 0:
		return nil, fmt.Errorf("%s: a queue size of %d: it has to be a power of two from 2 to %d: %w", cfg.Name, cfg.QueueSize, vring.MaxSize, ErrConfig)
	case cfg.Batch < 0 || cfg.Batch > frames.MaxBatch:
		return nil, fmt.Errorf("%s: a batch of %d frames: it has to be from 1 to %d: %w", cfg.Name, cfg.Batch, frames.MaxBatch, ErrConfig)
	}
	n := &Net{cfg: cfg}
	for i := range n.queues {
		n.queues[i] = queue{stats: new(frames.Stats), bells: new(doorbell.Counters), bus: new(dma.QueueAccount)}
	}
	return n, nil
}

// wanted returns the features that this side can use. Frames are complete: no offload, and each takes one buffer.
func (n *Net) wanted() virtio.Features {
	f := virtio.FeaturesOf(virtio.Version1, virtio.EventIdx, virtio.InOrder, virtio.NetMTU, virtio.NetMAC, virtio.NetStatus)
	if n.cfg.Packed {
		f.Set(virtio.RingPacked)
	}
	return f
}

// choose returns the features to accept of those offered.
func (n *Net) choose(offered virtio.Features, push bool) (virtio.Features, error) {
	f := offered.And(n.wanted()).Without(n.cfg.Deny)
	switch {
	case !f.Has(virtio.Version1):
		return f, fmt.Errorf("%s: the host does not offer version_1: it is not a virtio 1.x device", n.cfg.Name)
	case offered.Has(virtio.NetRawIP):
		return f, fmt.Errorf("%s: the host's end is a tun device (raw IP), and this end takes Ethernet frames: use a tap there", n.cfg.Name)
	case n.cfg.Packed && push:
		return f, fmt.Errorf("%s: packed rings do not go with placement push: use placement window or split rings", n.cfg.Name)
	case n.cfg.Packed && !f.Has(virtio.RingPacked):
		return f, fmt.Errorf("%s: packed rings are asked for, and the host does not offer ring_packed", n.cfg.Name)
	}
	return f, nil
}

// Up implements driver.Driver (virtio 1.2, 3.1.1).
func (n *Net) Up(t driver.Transport, m driver.Layout, broken func(error)) error {
	s, err := t.SetStatus(0)
	if err == nil && s != 0 {
		err = fmt.Errorf("%s: the device does not reset: its status is %s", n.cfg.Name, virtio.StatusString(s))
	}
	if err != nil {
		return err
	}
	set := virtio.StatusAcknowledge | virtio.StatusDriver
	if _, err = t.SetStatus(set); err != nil {
		return err
	}
	if err = n.setUp(t, m, set, broken); err != nil {
		n.Failed(err)
		t.SetStatus(set | virtio.StatusFailed) // best effort: the device is told that we gave up on it
	}
	return err
}

func (n *Net) setUp(t driver.Transport, m driver.Layout, set uint32, broken func(error)) error {
	offered, err := t.Features()
	if err != nil {
		return err
	}
	n.mu.Lock()
	n.offered = offered
	n.mu.Unlock()
	acked, err := n.choose(offered, m.Push())
	if err != nil {
		return err
	}
	if err := t.SetFeatures(acked); err != nil {
		return err
	}
	set |= virtio.StatusFeaturesOK
	s, err := t.SetStatus(set)
	if err != nil {
		return err
	}
	if s&virtio.StatusFeaturesOK == 0 {
		return fmt.Errorf("%s: the host refuses the features %s: see its log", n.cfg.Name, acked)
	}
	b, err := t.Config(0, virtio.NetConfigLen)
	if err != nil {
		return err
	}
	nc := virtio.DecodeNetConfig(b)
	mtu, maxRX := n.lengths(acked, nc)

	stop, err := doorbell.NewEventfd()
	if err != nil {
		return err
	}
	started := false
	defer func() {
		if !started {
			stop.Close()
		}
	}()
	p := frames.Port{MaxFrame: mtu + overhead}
	if acked.Has(virtio.NetMAC) {
		p.MAC = nc.MAC
	}
	rx, tx := virtio.NetQueueRX(0), virtio.NetQueueTX(0)
	if p.Receiver, err = n.receiver(t, m, acked, rx, maxRX, stop); err != nil {
		return err
	}
	if p.Sender, err = n.sender(t, m, acked, tx, p.MaxFrame, stop); err != nil {
		return err
	}
	set |= virtio.StatusDriverOK
	if s, err = t.SetStatus(set); err == nil && s&(virtio.StatusNeedsReset|virtio.StatusDriverOK) != virtio.StatusDriverOK {
		err = fmt.Errorf("%s: the host cannot start the device (status %s): see its log", n.cfg.Name, virtio.StatusString(s))
	}
	if e, ok := t.(driver.Enabler); ok {
		for _, i := range [...]int{rx, tx} {
			if err == nil {
				err = e.EnableQueue(i, true)
			}
		}
	}
	if err != nil {
		return err
	}
	started = true
	n.mu.Lock()
	n.acked, n.devStatus, n.net, n.mtu, n.lastErr = acked, set, nc, mtu, nil
	n.ups++
	n.serving = frames.Serve(n.cfg.Handler, p, stop, func(err error) {
		n.mu.Lock()
		n.lastErr = err
		n.broken++
		n.mu.Unlock()
		broken(fmt.Errorf("%s: %w", n.cfg.Name, err))
	})
	n.mu.Unlock()
	return nil
}

// lengths returns the MTU to send by, and the longest frame that the device may send.
func (n *Net) lengths(acked virtio.Features, nc virtio.NetConfig) (mtu, maxRX int) {
	mtu = n.cfg.MTU
	maxRX = defaultMTU
	if acked.Has(virtio.NetMTU) && nc.MTU >= MinMTU {
		maxRX = int(nc.MTU)
		if mtu == 0 || mtu > maxRX {
			mtu = maxRX
		}
	}
	if mtu == 0 {
		mtu = defaultMTU
	}
	if maxRX < mtu {
		maxRX = mtu
	}
	if maxRX += overhead; maxRX > frames.MaxMaxFrame {
		maxRX = frames.MaxMaxFrame
	}
	return mtu, maxRX
}

// receiver makes the end of the receive queue. Where near and far are the same memory, it takes half of what is left
// at most.
func (n *Net) receiver(t driver.Transport, m driver.Layout, acked virtio.Features, i, max int, stop *doorbell.Eventfd) (frames.Receiver, error) {
	q, c, err := n.queue(t, m, acked, i, max, stop)
	if err != nil {
		return nil, err
	}
	limit := m.Near.Alloc.Largest()
	if !m.Push() {
		limit /= 2
	}
	mem, err := n.room(m.Near, c, q, limit)
	if err != nil {
		return nil, err
	}
	return frames.NewDriverReceiver(c, q.q, mem)
}

// sender makes the end of the transmit queue.
func (n *Net) sender(t driver.Transport, m driver.Layout, acked virtio.Features, i, max int, stop *doorbell.Eventfd) (frames.Sender, error) {
	q, c, err := n.queue(t, m, acked, i, max, stop)
	if err != nil {
		return nil, err
	}
	mem, err := n.room(m.Far, c, q, m.Far.Alloc.Largest())
	if err != nil {
		return nil, err
	}
	return frames.NewDriverSender(c, q.q, mem)
}

// room takes memory for the frames of a queue: one for each descriptor, or as many as limit bytes hold.
func (n *Net) room(m *driver.Memory, c frames.Config, q *queue, limit uint64) (dma.Span, error) {
	bytes := frames.MemSize(c.MaxFrame, int(q.size))
	if bytes > limit {
		bytes = limit &^ 63
	}
	if least := frames.MemSize(c.MaxFrame, 1); bytes < least {
		return dma.Span{}, fmt.Errorf("%s: %d bytes of memory hold no frame of %d, which takes %d: use a larger window, fewer devices or a lower MTU",
			c.Name, bytes, c.MaxFrame, least)
	}
	mem, err := m.Take(c.Name, bytes, 64)
	return mem.Accounted(&q.bus.Payload), err
}

// queue lays queue i out, tells the device, and returns it with the configuration of its end.
func (n *Net) queue(t driver.Transport, m driver.Layout, acked virtio.Features, i, max int, stop *doorbell.Eventfd) (*queue, frames.Config, error) {
	q := &n.queues[i]
	name := n.cfg.Name + " " + virtio.NetQueueName(i, 1)
	c := frames.Config{Name: name, MaxFrame: max, Batch: n.cfg.Batch, Stats: q.stats,
		Sleep: doorbell.SleeperConfig{Stop: stop, Fallback: n.cfg.Fallback, Counters: q.bells}}
	limit, err := t.QueueMax(i)
	if err != nil {
		return nil, c, err
	}
	size := uint16(n.cfg.QueueSize)
	for size > limit {
		size /= 2
	}
	if size < 2 {
		return nil, c, fmt.Errorf("%s: the host has no such queue (largest size %d)", name, limit)
	}
	packed := acked.Has(virtio.RingPacked)
	descLen, driverLen, deviceLen := vring.SplitSizes(size)
	if packed {
		descLen, driverLen, deviceLen = vring.PackedSizes(size)
	}
	r := vring.Config{Name: name, Size: size, EventIdx: acked.Has(virtio.EventIdx), InOrder: acked.Has(virtio.InOrder)}
	for _, a := range [...]struct {
		span    *dma.Span
		m       *driver.Memory
		n       uint64
		account *dma.Account
	}{{&r.Desc, m.Far, descLen, &q.bus.Descriptor}, {&r.Driver, m.Far, driverLen, &q.bus.Driver}, {&r.Device, m.Near, deviceLen, &q.bus.Device}} {
		s, err := a.m.Take(name, a.n, 64)
		if err != nil {
			return nil, c, err
		}
		mem := s.Mem()
		mem.Zero(0, uint64(s.Len))
		*a.span = s.Accounted(a.account)
	}
	var d vring.Driver
	if packed {
		d, err = vring.NewPackedDriver(r)
	} else {
		d, err = vring.NewSplitDriver(r)
	}
	if err != nil {
		return nil, c, err
	}
	n.mu.Lock()
	q.q, q.size = d, size
	n.mu.Unlock()
	if err := t.SetQueue(i, size, r.Desc.Addr(), r.Driver.Addr(), r.Device.Addr()); err != nil {
		return nil, c, err
	}
	c.Ring, c.Sleep.Doorbell = t.Kick(i), t.Call(i)
	return q, c, nil
}

// Down implements driver.Driver. It returns once the Handler has returned.
func (n *Net) Down() {
	n.mu.Lock()
	s := n.serving
	n.mu.Unlock()
	if s == nil {
		return
	}
	s.Stop(time.Time{})
	n.mu.Lock()
	n.serving, n.acked, n.devStatus = nil, virtio.Features{}, 0
	n.mu.Unlock()
}

// Reconfigure implements driver.Driver: Status shows the link state that the device tells. A new MTU holds from the next
// reset on.
func (n *Net) Reconfigure(t driver.Transport) error {
	b, err := t.Config(0, virtio.NetConfigLen)
	if err != nil {
		return err
	}
	n.mu.Lock()
	n.net = virtio.DecodeNetConfig(b)
	n.mu.Unlock()
	return nil
}

// Failed implements driver.Driver.
func (n *Net) Failed(err error) {
	n.mu.Lock()
	n.lastErr = err
	n.mu.Unlock()
}

// Status implements driver.Driver.
func (n *Net) Status() status.Device {
	n.mu.Lock()
	defer n.mu.Unlock()
	s := status.Device{Name: n.cfg.Name, Type: "net", Number: n.cfg.Number, LinkType: "frames", MTU: n.mtu,
		Carrier: n.serving != nil && (!n.acked.Has(virtio.NetStatus) || n.net.LinkUp),
		Status:  virtio.StatusString(n.devStatus), Offered: n.offered.Names(), Allowed: n.wanted().Without(n.cfg.Deny).Names(), Negotiated: n.acked.Names(),
		MaxPairs: 1, Counters: map[string]uint64{"ups": n.ups, "broken": n.broken}}
	if n.serving != nil {
		s.Pairs = 1
	}
	if n.lastErr != nil {
		s.LastError = n.lastErr.Error()
	}
	for i := range n.queues {
		q := &n.queues[i]
		qs := status.Queue{Index: i, Name: virtio.NetQueueName(i, 1), Ready: n.serving != nil, Size: q.size, Pump: map[string]uint64{}}
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

// Name implements driver.Driver.
func (n *Net) Name() string { return n.cfg.Name }

// Number implements driver.Driver.
func (n *Net) Number() uint16 { return n.cfg.Number }

// DeviceID implements driver.Driver.
func (n *Net) DeviceID() uint32 { return virtio.IDNet }

// Joined implements driver.Driver: no interface.
func (n *Net) Joined() string { return "this program" }

// Doorbells implements driver.Driver.
func (n *Net) Doorbells() int { return 2 }

// Pairs implements driver.Driver.
func (n *Net) Pairs() (pairs int, chosen bool) { return 1, true }

// LimitPairs implements driver.Driver: one pair is the least.
func (n *Net) LimitPairs(int) {}

// OnChange implements driver.Driver: nothing here changes by itself.
func (n *Net) OnChange(func()) {}

// LinkUp implements driver.Driver.
func (n *Net) LinkUp() bool { return true }

// Remade implements driver.Driver.
func (n *Net) Remade() bool { return false }

// Warning implements driver.Driver.
func (n *Net) Warning() string { return "" }

// ShortOf implements driver.Driver.
func (n *Net) ShortOf() string { return "" }

// Unmet implements driver.Driver.
func (n *Net) Unmet() []string { return nil }

// Close implements driver.Driver.
func (n *Net) Close() error {
	n.Down()
	return nil
}
