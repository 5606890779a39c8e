package agent

import (
	"fmt"
	"sync"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/pci"
	"github.com/boardlink/boardlink/session"
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/tunbridge"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/vring"
)

const (
	queueRX = 0
	queueTX = 1
)

var netQueueNames = [...]string{"rx0", "tx0"}

// Sizes that the operator did not choose.
const (
	defaultQueueSize = 256
	defaultRXBuffer  = 16 << 10 // largest receive buffer where merging is on
	minRXBuffer      = 2 << 10
	maxTXMemory      = 4 << 20 // more only spreads the frames over the caches
)

// NetConfig says what a network device is to be like on this side.
type NetConfig struct {
	Name   string // "net0": for errors and status
	Number uint16 // device number on the link
	// Interface is the device's own end. A MAC set here wins over the one that the host gives; an
	// MTU here is lowered to the host's.
	Interface tunbridge.Config
	// Deny are features not to be accepted.
	Deny virtio.Features
	// Ring is the kind of virtqueue: "split", "packed" (placement window only), or "auto", the default.
	Ring string
	// QueueSize is in descriptors, a power of two; 0 means 256. The host may ask for fewer.
	QueueSize uint16
	// RXBuffer is the size in bytes of one receive buffer where they can be merged; 0 chooses by the
	// memory there is, 16 KiB at most.
	RXBuffer uint32
	// Fallback is the pace of the poll fallback; the zero value is the default.
	Fallback doorbell.Fallback
}

// transport is a virtio device as its driver reaches it, whatever carries the messages.
type transport interface {
	// Features returns what the device offers; SetFeatures tells what is accepted.
	Features() (virtio.Features, error)
	SetFeatures(virtio.Features) error
	// Config reads n bytes of the configuration space from off on.
	Config(off, n uint32) ([]byte, error)
	// SetStatus writes the device status and returns what the device made of it.
	SetStatus(s uint32) (uint32, error)
	// QueueMax returns the largest size of queue i; 0 where there is none.
	QueueMax(i int) (uint16, error)
	SetQueue(i int, size uint16, desc, driver, device dma.Addr) error
	// Kick returns what kicks queue i, Call the end that the device calls for it.
	Kick(i int) doorbell.Ringer
	Call(i int) doorbell.Waiter
}

// Net drives one virtio-net device.
type Net struct {
	cfg NetConfig
	ifc *tunbridge.Iface

	mu        sync.Mutex // guards what Status reads
	offered   virtio.Features
	acked     virtio.Features
	devStatus uint32
	carrier   bool
	queues    [2]netQueue
	stop      *tunbridge.Stop
	loops     sync.WaitGroup
	lastErr   error
	ups       uint64
	broken    uint64
}

type netQueue struct {
	size  uint16
	q     vring.Driver
	pump  tunbridge.Pump
	stats *tunbridge.Stats
	bells *doorbell.Counters
	bus   *dma.QueueAccount
}

// NewNet opens the interface, carrier off. Errors of the user's making satisfy
// tunbridge.UserError.
func NewNet(cfg NetConfig) (*Net, error) {
	switch cfg.Ring {
	case "", "auto", "split", "packed":
	default:
		return nil, fmt.Errorf("%s: a ring %q: it has to be auto, split or packed", cfg.Name, cfg.Ring)
	}
	if cfg.QueueSize == 0 {
		cfg.QueueSize = defaultQueueSize
	}
	if cfg.QueueSize&(cfg.QueueSize-1) != 0 || cfg.QueueSize > vring.MaxSize || cfg.QueueSize < 2 {
		return nil, fmt.Errorf("%s: a queue size of %d: it has to be a power of two from 2 to %d", cfg.Name, cfg.QueueSize, vring.MaxSize)
	}
	ifc, err := tunbridge.Open(cfg.Interface)
	if err != nil {
		return nil, err
	}
	if err := ifc.SetCarrier(false); err != nil {
		ifc.Close()
		return nil, err
	}
	n := &Net{cfg: cfg, ifc: ifc}
	for i := range n.queues {
		n.queues[i].stats, n.queues[i].bells, n.queues[i].bus = new(tunbridge.Stats), new(doorbell.Counters), new(dma.QueueAccount)
	}
	return n, nil
}

// Interface returns the device's own end.
func (n *Net) Interface() *tunbridge.Iface { return n.ifc }

// wanted returns what this side can use.
func (n *Net) wanted() virtio.Features {
	f := virtio.FeaturesOf(virtio.Version1, virtio.EventIdx, virtio.IndirectDesc, virtio.InOrder,
		virtio.NetMrgRxbuf, virtio.NetMTU, virtio.NetMAC, virtio.NetStatus)
	if n.cfg.Ring == "packed" {
		f.Set(virtio.RingPacked)
	}
	if n.ifc.Type() == tunbridge.TUN {
		f.Set(virtio.NetRawIP)
	}
	return f.Or(virtio.FeaturesFromMask(tunbridge.OffloadFeatures(n.ifc.OffloadSupported())))
}

// choose returns the features to accept of those offered, for placement push or window.
func (n *Net) choose(offered virtio.Features, push bool) (virtio.Features, error) {
	f := offered.And(n.wanted()).Without(n.cfg.Deny)
	if n.cfg.Ring == "packed" {
		if push {
			return f, fmt.Errorf("%s: packed rings do not go with placement push: both sides write the one ring, and one of them would read it across the bus: use --placement window or --ring split", n.cfg.Name)
		}
		if !f.Has(virtio.RingPacked) {
			return f, fmt.Errorf("%s: packed rings are asked for, and the host does not offer ring_packed (or it is denied here): use --ring split", n.cfg.Name)
		}
	}
	if !f.Has(virtio.Version1) {
		return f, fmt.Errorf("%s: the host does not offer version_1: it is no virtio 1.x device", n.cfg.Name)
	}
	if raw := n.ifc.Type() == tunbridge.TUN; raw != offered.Has(virtio.NetRawIP) {
		if raw {
			return f, fmt.Errorf("%s: this end is a tun device (raw IP), the host's a tap: give both ends the same --link", n.cfg.Name)
		}
		return f, fmt.Errorf("%s: this end is a tap device, the host's a tun (raw IP): give both ends the same --link", n.cfg.Name)
	}
	if !f.Has(virtio.NetCSUM) {
		f = f.Without(virtio.FeaturesOf(virtio.NetHostTSO4, virtio.NetHostTSO6, virtio.NetHostUSO))
	}
	if !f.Has(virtio.NetGuestCSUM) {
		f = f.Without(virtio.FeaturesOf(virtio.NetGuestTSO4, virtio.NetGuestTSO6, virtio.NetGuestUSO4, virtio.NetGuestUSO6))
	}
	return f, nil
}

// memory is a device's part of a region.
type memory struct {
	region *dma.Region
	alloc  *dma.Allocator
}

// layout is where a device's rings and buffers go: each near its reader ("read locally, write
// remotely"). In placement window both are the same memory of the board.
type layout struct {
	near *memory // of the board: what the host writes (device areas, receive buffers)
	far  *memory // what the host reads (descriptor and driver areas, transmit buffers)
}

// take allocates n bytes and returns them as a span.
func (m *memory) take(name string, n, align uint64) (dma.Span, error) {
	a, err := m.alloc.Alloc(n, align)
	if err != nil {
		return dma.Span{}, fmt.Errorf("%s: %s memory: %w: use a larger window, fewer devices or smaller queues", name, m.region.Name, err)
	}
	return dma.Span{Region: m.region, Off: uint64(a - m.region.Addr), Len: uint32(n)}, nil
}

// up brings the device up (virtio 1.2, 3.1.1). The memory is not shown to the device
// by anybody else. notify hears when a loop ends by an error.
func (n *Net) up(t transport, m layout, notify func(error)) error {
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
	err = n.setUp(t, m, set, notify)
	n.mu.Lock()
	n.lastErr = err
	n.mu.Unlock()
	if err != nil {
		// Best effort: the device is told that we gave up on it.
		t.SetStatus(set | virtio.StatusFailed)
	}
	return err
}

func (n *Net) setUp(t transport, m layout, set uint32, notify func(error)) error {
	offered, err := t.Features()
	if err != nil {
		return err
	}
	n.mu.Lock()
	n.offered = offered
	n.mu.Unlock()
	acked, err := n.choose(offered, m.near != m.far)
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
	cb, err := t.Config(0, virtio.NetConfigLen)
	if err != nil {
		return err
	}
	if err := n.configure(acked, virtio.DecodeNetConfig(cb)); err != nil {
		return err
	}
	if err := n.ifc.SetOffload(tunbridge.DriverOffload(acked.Mask())); err != nil {
		return err
	}
	n.ifc.Drain() // frames queued before may need what is not negotiated any more
	stop, err := tunbridge.NewStop()
	if err != nil {
		return err
	}
	queues, err := n.layOut(t, m, acked, stop)
	if err != nil {
		stop.Close()
		return err
	}
	set |= virtio.StatusDriverOK
	if s, err = t.SetStatus(set); err == nil && s&(virtio.StatusNeedsReset|virtio.StatusDriverOK) != virtio.StatusDriverOK {
		err = fmt.Errorf("%s: the host cannot start the device (status %s): see its log", n.cfg.Name, virtio.StatusString(s))
	}
	if err != nil {
		stop.Close()
		return err
	}
	n.mu.Lock()
	n.acked, n.devStatus, n.stop, n.queues = acked, set, stop, queues
	n.ups++
	n.mu.Unlock()
	for i := range queues {
		n.loops.Add(1)
		go n.run(queues[i].pump, notify)
	}
	if err := n.ifc.SetCarrier(true); err != nil {
		n.down()
		return err
	}
	n.mu.Lock()
	n.carrier = true
	n.mu.Unlock()
	return nil
}

// configure takes over what the host's configuration space says.
func (n *Net) configure(acked virtio.Features, c virtio.NetConfig) error {
	if acked.Has(virtio.NetMAC) && n.cfg.Interface.MAC == (tunbridge.MAC{}) && n.ifc.Type() == tunbridge.TAP &&
		n.ifc.MAC() != tunbridge.MAC(c.MAC) {
		if err := n.ifc.SetMAC(tunbridge.MAC(c.MAC)); err != nil {
			return err
		}
	}
	mtu := n.cfg.Interface.MTU
	if acked.Has(virtio.NetMTU) && (mtu == 0 || mtu > int(c.MTU)) {
		mtu = int(c.MTU)
	}
	if mtu != 0 && mtu != n.ifc.MTU() {
		return n.ifc.SetMTU(mtu)
	}
	return nil
}

// reconfigure takes over a configuration that changed while the device runs: the link's state, the
// MAC. The MTU decides how large buffers are: a change of it takes effect with the next reset.
func (n *Net) reconfigure(t transport) error {
	b, err := t.Config(0, virtio.NetConfigLen)
	if err != nil {
		return err
	}
	n.mu.Lock()
	acked, running := n.acked, n.stop != nil
	n.mu.Unlock()
	if !running {
		return nil
	}
	c := virtio.DecodeNetConfig(b)
	up := !acked.Has(virtio.NetStatus) || c.LinkUp
	if err := n.ifc.SetCarrier(up); err != nil {
		return err
	}
	n.mu.Lock()
	n.carrier = up
	n.mu.Unlock()
	c.MTU = uint16(n.ifc.MTU())
	return n.configure(acked, c)
}

// layOut places rings and buffers in the device's memory, tells the device, and makes the loops.
func (n *Net) layOut(t transport, m layout, acked virtio.Features, stop *tunbridge.Stop) ([2]netQueue, error) {
	queues := n.queues
	offload := acked.Mask()&tunbridge.NetFOffload != 0
	max := tunbridge.MaxFrame(n.ifc.MTU(), offload)
	for i := range queues {
		name := n.cfg.Name + " " + netQueueNames[i]
		limit, err := t.QueueMax(i)
		if err != nil {
			return queues, err
		}
		size := n.cfg.QueueSize
		for size > limit {
			size /= 2
		}
		if size < 2 {
			return queues, fmt.Errorf("%s: the host has no such queue (largest size %d)", name, limit)
		}
		c := vring.Config{Name: name, Size: size, EventIdx: acked.Has(virtio.EventIdx), Indirect: acked.Has(virtio.IndirectDesc)}
		c.InOrder = acked.Has(virtio.InOrder)
		packed := acked.Has(virtio.RingPacked)
		desc, driver, device := vring.SplitSizes(size)
		if packed {
			desc, driver, device = vring.PackedSizes(size)
		}
		// Each area on cache lines of its own: both sides write near each other otherwise.
		for _, a := range [...]struct {
			span *dma.Span
			m    *memory
			n    uint64
		}{{&c.Desc, m.far, desc}, {&c.Driver, m.far, driver}, {&c.Device, m.near, device}} {
			if *a.span, err = a.m.take(name, a.n, 64); err != nil {
				return queues, err
			}
			mem := a.span.Mem()
			mem.Zero(0, a.n)
		}
		b := queues[i].bus
		c.Desc, c.Driver, c.Device = c.Desc.Accounted(&b.Descriptor), c.Driver.Accounted(&b.Driver), c.Device.Accounted(&b.Device)
		if queues[i].q, err = newDriverQueue(c, packed); err != nil {
			return queues, err
		}
		if err = t.SetQueue(i, size, c.Desc.Addr(), c.Driver.Addr(), c.Device.Addr()); err != nil {
			return queues, err
		}
		queues[i].size = size
	}
	for i := range queues {
		q := &queues[i]
		name := n.cfg.Name + " " + netQueueNames[i]
		pc := tunbridge.PumpConfig{Name: name, Iface: n.ifc, Stop: stop, Wait: t.Call(i), Ring: t.Kick(i),
			MaxFrame: max, Fallback: n.cfg.Fallback, Stats: q.stats, Bells: q.bells}
		if i == queueRX {
			merge := acked.Has(virtio.NetMrgRxbuf)
			room := m.near.alloc.Largest()
			if m.near == m.far {
				room /= 2 // the other half is for transmission
			}
			size, count := rxBuffers(room, q.size, n.cfg.RXBuffer, uint32(max), merge)
			mem, err := m.near.take(name, uint64(size)*uint64(count), 64)
			if err != nil {
				return queues, err
			}
			if q.pump, err = tunbridge.NewDriverRX(pc, q.q, mem.Accounted(&q.bus.Payload), size, merge); err != nil {
				return queues, err
			}
			continue
		}
		size := m.far.alloc.Largest() &^ 63
		if size > maxTXMemory {
			size = maxTXMemory
		}
		mem, err := m.far.take(name, size, 64)
		if err != nil {
			return queues, err
		}
		if q.pump, err = tunbridge.NewDriverTX(pc, q.q, mem.Accounted(&q.bus.Payload)); err != nil {
			return queues, err
		}
	}
	return queues, nil
}

// newDriverQueue makes the driver side of a queue of the negotiated kind.
func newDriverQueue(c vring.Config, packed bool) (vring.Driver, error) {
	if packed {
		return vring.NewPackedDriver(c)
	}
	return vring.NewSplitDriver(c)
}

// rxBuffers chooses size and number of receive buffers in so many bytes: large ones, so that a
// super-packet takes few, as long as there is one for each descriptor.
func rxBuffers(bytes uint64, queue uint16, wish, max uint32, merge bool) (size uint32, count int) {
	size = (max + 63) &^ 63
	if merge {
		size = defaultRXBuffer
		if wish != 0 {
			size = (wish + 63) &^ 63
		}
		for size > minRXBuffer && uint64(size)*uint64(queue) > bytes {
			size /= 2
		}
		size &^= 63
	}
	count = int(queue)
	if uint64(count)*uint64(size) > bytes {
		count = int(bytes / uint64(size))
	}
	return size, count
}

func (n *Net) run(p tunbridge.Pump, notify func(error)) {
	defer n.loops.Done()
	var err error
	if fault := pci.Guard(func() { err = p.Run() }); fault != nil {
		err = fault
	}
	if err != nil {
		n.mu.Lock()
		n.lastErr = err
		n.broken++
		n.mu.Unlock()
		notify(err)
	}
}

// failed notes for Status why the device does not come up.
func (n *Net) failed(err error) {
	n.mu.Lock()
	n.lastErr = err
	n.mu.Unlock()
}

// down stops the loops, carrier off. The rings stay as they are: the device may still
// look at them. It is idempotent.
func (n *Net) down() {
	n.mu.Lock()
	stop := n.stop
	n.mu.Unlock()
	if stop == nil {
		return
	}
	n.ifc.SetCarrier(false)
	stop.Raise()
	n.loops.Wait()
	stop.Close()
	n.mu.Lock()
	n.stop, n.carrier, n.devStatus, n.acked = nil, false, 0, virtio.Features{}
	n.mu.Unlock()
}

// Close stops the loops and gives the interface back.
func (n *Net) Close() error {
	n.down()
	return n.ifc.Close()
}

// Status describes the device for an operator.
func (n *Net) Status() status.Device {
	n.mu.Lock()
	defer n.mu.Unlock()
	s := status.Device{Name: n.cfg.Name, Type: "net", Number: n.cfg.Number,
		Interface: n.ifc.Name(), LinkType: n.ifc.Type().String(), MTU: n.ifc.MTU(), Carrier: n.carrier,
		Offload: tunbridge.DriverOffload(n.acked.Mask()).String(), Status: virtio.StatusString(n.devStatus),
		Offered: n.offered.Names(), Allowed: n.wanted().Without(n.cfg.Deny).Names(), Negotiated: n.acked.Names(),
		Counters: map[string]uint64{"ups": n.ups, "broken": n.broken}}
	if n.ifc.Type() == tunbridge.TAP {
		s.MAC = n.ifc.MAC().String()
	}
	if n.lastErr != nil {
		s.LastError = n.lastErr.Error()
	}
	for i := range n.queues {
		q := &n.queues[i]
		qs := status.Queue{Index: i, Name: netQueueNames[i], Ready: n.stop != nil, Size: q.size}
		if q.q != nil {
			st := q.q.State()
			qs.Avail, qs.Used = st.Avail, st.Used
			qs.Ring = status.Counters(q.q.Stats().Load())
		}
		qs.Pump = make(map[string]uint64)
		q.stats.Each(func(name string, v uint64) { qs.Pump[name] = v })
		qs.Doorbell = status.Counters(q.bells.Snapshot())
		session.QueueBus(&qs, q.bus, q.stats.Frames())
		s.Queues = append(s.Queues, qs)
	}
	return s
}
