package host

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

// The virtqueues of a network device with one queue pair (virtio 1.2, 5.1.2). The names are the
// driver's: what it receives, the device fills in.
const (
	queueRX = 0
	queueTX = 1
)

var netQueueNames = [...]string{"rx0", "tx0"}

// NetConfig says what a network device is to be like.
type NetConfig struct {
	Name      string // "net0": for errors and status
	Number    uint16 // device number on the link
	Interface tunbridge.Config
	// BoardMAC is the address that the driver's interface is given; zero offers none.
	BoardMAC tunbridge.MAC
	// Deny are features not to be offered, whatever else would be.
	Deny virtio.Features
	// QueueMax is the largest queue size, a power of two; 0 means 1024.
	QueueMax uint16
	// Fallback is the pace of the poll fallback; the zero value is the default.
	Fallback doorbell.Fallback
}

// Net is the virtio-net device model: queues on one side, a tap or tun device on the
// other.
type Net struct {
	cfg    NetConfig
	ifc    *tunbridge.Iface
	table  *dma.TableRef
	notify func(Event)

	mu      sync.Mutex // guards what Status reads
	acked   virtio.Features
	queues  [2]netQueue
	carrier bool
	stop    *tunbridge.Stop
	loops   sync.WaitGroup
	lastErr error
	starts  uint64
	broken  uint64
}

type netQueue struct {
	cfg   QueueConfig
	areas vring.Config
	set   bool
	q     vring.Device
	pump  tunbridge.Pump
	// What the loops count lives as long as the model.
	stats *tunbridge.Stats
	bells *doorbell.Counters
	bus   *dma.QueueAccount
}

var _ Backend = (*Net)(nil)

// NewNet opens the interface, carrier off, and returns the model. Errors of the user's making satisfy
// tunbridge.UserError.
func NewNet(cfg NetConfig) (*Net, error) {
	if cfg.QueueMax == 0 {
		cfg.QueueMax = 1024
	}
	ifc, err := tunbridge.Open(cfg.Interface)
	if err != nil {
		return nil, err
	}
	n := &Net{cfg: cfg, ifc: ifc}
	for i := range n.queues {
		n.queues[i].stats, n.queues[i].bells, n.queues[i].bus = new(tunbridge.Stats), new(doorbell.Counters), new(dma.QueueAccount)
	}
	if err := ifc.SetCarrier(false); err != nil {
		ifc.Close()
		return nil, err
	}
	return n, nil
}

// Interface returns the device's own end.
func (n *Net) Interface() *tunbridge.Iface { return n.ifc }

// DeviceID implements Backend.
func (n *Net) DeviceID() uint32 { return virtio.IDNet }

// possible returns what this build and this kernel can do.
func (n *Net) possible() virtio.Features {
	f := virtio.FeaturesOf(virtio.Version1, virtio.EventIdx, virtio.IndirectDesc, virtio.RingPacked, virtio.InOrder,
		virtio.NetMrgRxbuf, virtio.NetMTU, virtio.NetStatus)
	if n.cfg.BoardMAC != (tunbridge.MAC{}) && n.ifc.Type() == tunbridge.TAP {
		f.Set(virtio.NetMAC)
	}
	if n.ifc.Type() == tunbridge.TUN {
		f.Set(virtio.NetRawIP)
	}
	return f.Or(virtio.FeaturesFromMask(tunbridge.OffloadFeatures(n.ifc.OffloadSupported())))
}

// Features implements Backend: what is possible and not denied. Bits that depend on
// a denied one are left out too (virtio 1.2, 5.1.3.1).
func (n *Net) Features() virtio.Features {
	f := n.possible().Without(n.cfg.Deny)
	if !f.Has(virtio.NetCSUM) {
		f = f.Without(virtio.FeaturesOf(virtio.NetHostTSO4, virtio.NetHostTSO6, virtio.NetHostUSO))
	}
	if !f.Has(virtio.NetGuestCSUM) {
		f = f.Without(virtio.FeaturesOf(virtio.NetGuestTSO4, virtio.NetGuestTSO6, virtio.NetGuestUSO4, virtio.NetGuestUSO6))
	}
	return f
}

// SetFeatures implements Backend.
func (n *Net) SetFeatures(f virtio.Features) error {
	if bad := f.Without(n.Features()); bad != (virtio.Features{}) {
		return fmt.Errorf("%s: the driver accepts what was not offered: %s", n.cfg.Name, bad)
	}
	if !f.Has(virtio.Version1) {
		return fmt.Errorf("%s: the driver does not accept version_1: legacy drivers are not served", n.cfg.Name)
	}
	if raw := n.ifc.Type() == tunbridge.TUN; f.Has(virtio.NetRawIP) != raw {
		return fmt.Errorf("%s: this end is a tun device (raw IP), the board's a tap: give both ends the same --link", n.cfg.Name)
	}
	for _, d := range [...]struct{ bit, needs virtio.Feature }{
		{virtio.NetHostTSO4, virtio.NetCSUM}, {virtio.NetHostTSO6, virtio.NetCSUM}, {virtio.NetHostUSO, virtio.NetCSUM},
		{virtio.NetGuestTSO4, virtio.NetGuestCSUM}, {virtio.NetGuestTSO6, virtio.NetGuestCSUM},
		{virtio.NetGuestUSO4, virtio.NetGuestCSUM}, {virtio.NetGuestUSO6, virtio.NetGuestCSUM},
	} {
		if f.Has(d.bit) && !f.Has(d.needs) {
			return fmt.Errorf("%s: the driver accepts %s without %s (virtio 1.2, 5.1.3.1)", n.cfg.Name, d.bit, d.needs)
		}
	}
	n.mu.Lock()
	n.acked = f
	n.mu.Unlock()
	return nil
}

// Config implements Backend.
func (n *Net) Config() []byte {
	b := virtio.NetConfig{MAC: [6]byte(n.cfg.BoardMAC), LinkUp: true, MaxQueuePairs: 1, MTU: uint16(n.ifc.MTU())}.Encode()
	return b[:]
}

// Queues implements Backend.
func (n *Net) Queues() int { return len(n.queues) }

// QueueMax implements Backend.
func (n *Net) QueueMax(i int) uint16 { return n.cfg.QueueMax }

// SetMemory implements Backend.
func (n *Net) SetMemory(t *dma.TableRef) { n.table = t }

// Notify implements Backend.
func (n *Net) Notify(f func(Event)) { n.notify = f }

func (n *Net) queueName(i int) string { return n.cfg.Name + " " + netQueueNames[i] }

// SetQueue implements Backend.
func (n *Net) SetQueue(i int, q QueueConfig) error {
	if i < 0 || i >= len(n.queues) {
		return fmt.Errorf("%s: there is no queue %d, only %d", n.cfg.Name, i, len(n.queues))
	}
	name := n.queueName(i)
	n.mu.Lock()
	packed := n.acked.Has(virtio.RingPacked)
	n.mu.Unlock()
	if q.Size == 0 || q.Size > n.cfg.QueueMax || !packed && q.Size&(q.Size-1) != 0 {
		return fmt.Errorf("%s: a queue size of %d: it has to be up to %d, and of a split queue a power of two", name, q.Size, n.cfg.QueueMax)
	}
	t := n.table.Load()
	desc, driver, device := vring.SplitSizes(q.Size)
	access := dma.DeviceRead
	if packed {
		desc, driver, device = vring.PackedSizes(q.Size)
		access |= dma.DeviceWrite
	}
	c := vring.Config{Name: name, Size: q.Size, Table: n.table, State: q.State}
	var err error
	if c.Desc, err = area(t, name, "descriptor", q.Desc, desc, access); err != nil {
		return err
	}
	if c.Driver, err = area(t, name, "driver", q.Driver, driver, dma.DeviceRead); err != nil {
		return err
	}
	if c.Device, err = area(t, name, "device", q.Device, device, dma.DeviceWrite); err != nil {
		return err
	}
	a := n.queues[i].bus
	c.Desc, c.Driver, c.Device = c.Desc.Accounted(&a.Descriptor), c.Driver.Accounted(&a.Driver), c.Device.Accounted(&a.Device)
	c.Table = n.table.Accounted(&a.Payload)
	n.mu.Lock()
	defer n.mu.Unlock()
	n.queues[i].cfg, n.queues[i].areas, n.queues[i].set = q, c, true
	return nil
}

// Start implements Backend.
func (n *Net) Start() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.stop != nil {
		return fmt.Errorf("%s: is running already", n.cfg.Name)
	}
	for i := range n.queues {
		if !n.queues[i].set {
			return fmt.Errorf("%s: DRIVER_OK without a queue %s", n.cfg.Name, netQueueNames[i])
		}
	}
	if err := n.ifc.SetOffload(tunbridge.DeviceOffload(n.acked.Mask())); err != nil {
		return err
	}
	n.ifc.Drain() // frames queued before may need what is not negotiated any more
	stop, err := tunbridge.NewStop()
	if err != nil {
		return err
	}
	offload := n.acked.Mask()&tunbridge.NetFOffload != 0
	for i := range n.queues {
		q := &n.queues[i]
		c := q.areas
		c.EventIdx, c.Indirect = n.acked.Has(virtio.EventIdx), n.acked.Has(virtio.IndirectDesc)
		c.InOrder = n.acked.Has(virtio.InOrder)
		dev, err := newDeviceQueue(c, n.acked.Has(virtio.RingPacked))
		if err != nil {
			stop.Close()
			return err
		}
		q.q = dev
		pc := tunbridge.PumpConfig{Name: n.queueName(i), Iface: n.ifc, Stop: stop, Wait: q.cfg.Kick, Ring: q.cfg.Call,
			MaxFrame: tunbridge.MaxFrame(n.ifc.MTU(), offload), Fallback: n.cfg.Fallback,
			Stats: q.stats, Bells: q.bells}
		if i == queueRX {
			q.pump = tunbridge.NewDeviceRX(pc, dev, n.acked.Has(virtio.NetMrgRxbuf))
		} else {
			q.pump = tunbridge.NewDeviceTX(pc, dev)
		}
	}
	n.stop = stop
	n.starts++
	for i := range n.queues {
		n.loops.Add(1)
		go n.run(n.queues[i].pump, n.notify)
	}
	// Last: from here on the kernel sends.
	if err := n.ifc.SetCarrier(true); err != nil {
		stop.Raise()
		n.loops.Wait()
		n.stop = nil
		stop.Close()
		return err
	}
	n.carrier = true
	return nil
}

// newDeviceQueue makes the device side of a queue of the negotiated kind.
func newDeviceQueue(c vring.Config, packed bool) (vring.Device, error) {
	if packed {
		return vring.NewPackedDevice(c)
	}
	return vring.NewSplitDevice(c)
}

func (n *Net) run(p tunbridge.Pump, notify func(Event)) {
	defer n.loops.Done()
	var err error
	if fault := pci.Guard(func() { err = p.Run() }); fault != nil {
		err = fault
	}
	if err == nil {
		return
	}
	n.mu.Lock()
	n.lastErr = err
	n.broken++
	n.mu.Unlock()
	if notify != nil {
		notify(Event{Broken: err})
	}
}

// Stop implements Backend.
func (n *Net) Stop() []vring.State {
	n.mu.Lock()
	stop := n.stop
	n.mu.Unlock()
	states := make([]vring.State, len(n.queues))
	if stop == nil {
		n.reset()
		return states
	}
	n.ifc.SetCarrier(false)
	stop.Raise()
	n.loops.Wait()
	for i := range n.queues {
		states[i] = n.queues[i].q.State()
	}
	stop.Close()
	n.mu.Lock()
	n.stop, n.carrier = nil, false
	n.mu.Unlock()
	n.reset()
	return states
}

// reset forgets what the driver set up.
func (n *Net) reset() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.acked = virtio.Features{}
	for i := range n.queues {
		n.queues[i].set = false
	}
}

// Close implements Backend.
func (n *Net) Close() error {
	n.Stop()
	return n.ifc.Close()
}

// Status implements Backend.
func (n *Net) Status() status.Device {
	n.mu.Lock()
	defer n.mu.Unlock()
	s := status.Device{Name: n.cfg.Name, Type: "net", Number: n.cfg.Number,
		Interface: n.ifc.Name(), LinkType: n.ifc.Type().String(), MTU: n.ifc.MTU(), Carrier: n.carrier,
		Offload: tunbridge.DeviceOffload(n.acked.Mask()).String(),
		Offered: n.possible().Names(), Allowed: n.Features().Names(), Negotiated: n.acked.Names(),
		Counters: map[string]uint64{"starts": n.starts, "broken": n.broken}}
	if n.ifc.Type() == tunbridge.TAP {
		s.MAC = n.ifc.MAC().String()
	}
	if n.lastErr != nil {
		s.LastError = n.lastErr.Error()
	}
	for i := range n.queues {
		q := &n.queues[i]
		qs := status.Queue{Index: i, Name: netQueueNames[i], Ready: q.set, Size: q.cfg.Size}
		if q.pump != nil {
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
