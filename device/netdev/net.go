package netdev

import (
	"errors"
	"fmt"
	"sync"

	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/pci"
	"github.com/boardlink/boardlink/tunbridge"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/vring"
)

// Config says what a network device is to be like.
type Config struct {
	Name   string // "net0": for errors and status
	Number uint16 // device number on the link
	// Interface is the device's own end. Its Queues, if above 1, are how many queue pairs are offered
	// (VIRTIO_NET_F_MQ), as far as the kernel has them.
	Interface tunbridge.Config
	// BoardMAC is the address that the driver's interface is given; zero offers none.
	BoardMAC tunbridge.MAC
	// Deny are features not to be offered, whatever else would be.
	Deny virtio.Features
	// QueueMax is the largest queue size, a power of two; 0 means 1024.
	QueueMax uint16
	// Fallback is the pace of the poll fallback; the zero value is the default.
	Fallback doorbell.Fallback
	// Loop is how the loops wait; each pair's has one of the processors.
	Loop tunbridge.LoopConfig
}

// Net is the virtio-net device model: queues on one side, a tap or tun device on the
// other. Each queue pair has a queue of the interface to itself.
type Net struct {
	ctl controlCounters // first: 64-bit alignment

	cfg    Config
	ifc    *tunbridge.Iface
	table  *dma.TableRef
	notify func(device.Event)

	mu      sync.Mutex // guards what Status reads
	acked   virtio.Features
	pairs   []netPair
	ctrl    netQueue
	inUse   int // pairs
	carrier bool
	told    linkState // to the driver, by the last event
	// peerDown: the driver's end is down, as it told since the last reset.
	peerDown bool
	stop     *tunbridge.Stop
	loops    sync.WaitGroup
	lastErr  error
	starts   uint64
	broken   uint64
	engines  device.Engines
}

// netPair is a receive and a transmit queue (the names are the driver's: what it receives, the device fills in), and the queue of
// the interface that they belong to.
type netPair struct {
	ifc     *tunbridge.Iface
	rx, tx  netQueue
	loop    tunbridge.Pump // of both
	running bool
}

// ready tells that the driver has set up both queues.
func (p *netPair) ready() bool { return p.rx.set && p.tx.set }

type netQueue struct {
	cfg   device.QueueConfig
	areas vring.Config
	set   bool
	q     vring.Device
	pump  tunbridge.Pump
	// What the loops count lives as long as the model.
	stats *tunbridge.Stats
	bells *doorbell.Counters
	bus   *dma.QueueAccount
}

func newNetQueue() netQueue {
	return netQueue{stats: new(tunbridge.Stats), bells: new(doorbell.Counters), bus: new(dma.QueueAccount)}
}

var _ device.Device = (*Net)(nil)

// New opens the interface, carrier off, and returns the model. Errors of the user's making satisfy
// tunbridge.UserError.
func New(cfg Config) (*Net, error) {
	if cfg.QueueMax == 0 {
		cfg.QueueMax = 1024
	}
	ifc, err := tunbridge.Open(cfg.Interface)
	if err != nil {
		return nil, err
	}
	n := &Net{cfg: cfg, ifc: ifc, ctrl: newNetQueue(), engines: device.NoEngines{}}
	for i := 0; i < ifc.Queues(); i++ {
		n.pairs = append(n.pairs, netPair{ifc: ifc.Queue(i), rx: newNetQueue(), tx: newNetQueue()})
	}
	if err := ifc.SetCarrier(false); err != nil {
		ifc.Close()
		return nil, err
	}
	n.told = n.linkState()
	ifc.Watch(n.interfaceChanged)
	return n, nil
}

// Interface returns the device's own end.
func (n *Net) Interface() *tunbridge.Iface { return n.ifc }

// DeviceID implements device.Device.
func (n *Net) DeviceID() uint32 { return virtio.IDNet }

// QueueMax implements device.Device.
func (n *Net) QueueMax(i int) uint16 {
	n.mu.Lock()
	defer n.mu.Unlock()
	if i < 0 || i >= n.Queues() || n.acked != (virtio.Features{}) && n.queue(i) == nil {
		return 0
	}
	return n.cfg.QueueMax
}

// negotiated returns the number of pairs that queues are numbered by (virtio 1.2, 5.1.2).
func (n *Net) negotiated() int {
	if n.acked.Has(virtio.NetMQ) {
		return len(n.pairs)
	}
	return 1
}

// queue returns queue i as the negotiated features have it, nil where there is none. mu is held.
func (n *Net) queue(i int) *netQueue {
	m := n.negotiated()
	switch {
	case i == virtio.NetQueueCtrl(m) && n.acked.Has(virtio.NetCtrlVQ):
		return &n.ctrl
	case i < 0 || i >= virtio.NetQueueCtrl(m):
		return nil
	case i%2 == 0:
		return &n.pairs[i/2].rx
	}
	return &n.pairs[i/2].tx
}

// SetMemory implements device.Device.
func (n *Net) SetMemory(t *dma.TableRef) { n.table = t }

// Notify implements device.Device.
func (n *Net) Notify(f func(device.Event)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.notify = f
}

// queueName names queue i for errors. mu is held.
func (n *Net) queueName(i int) string {
	return n.cfg.Name + " " + virtio.NetQueueName(i, n.negotiated())
}

// SetQueue implements device.Device.
func (n *Net) SetQueue(i int, q device.QueueConfig) error {
	n.mu.Lock()
	nq, name := n.queue(i), n.queueName(i)
	packed := n.acked.Has(virtio.RingPacked)
	n.mu.Unlock()
	if nq == nil {
		return fmt.Errorf("%s: there is no queue %d with the features that the driver accepted", n.cfg.Name, i)
	}
	if q.Size == 0 || q.Size > n.cfg.QueueMax || !packed && q.Size&(q.Size-1) != 0 {
		return fmt.Errorf("%s: a queue size of %d: it has to be up to %d, and of a split queue a power of two", name, q.Size, n.cfg.QueueMax)
	}
	t := n.table.Load()
	descLen, driverLen, deviceLen := vring.SplitSizes(q.Size)
	access := dma.DeviceRead
	if packed {
		descLen, driverLen, deviceLen = vring.PackedSizes(q.Size)
		access |= dma.DeviceWrite
	}
	c := vring.Config{Name: name, Size: q.Size, Table: n.table, State: q.State}
	var err error
	if c.Desc, err = device.Area(t, name, "descriptor", q.Desc, descLen, access); err != nil {
		return err
	}
	if c.Driver, err = device.Area(t, name, "driver", q.Driver, driverLen, dma.DeviceRead); err != nil {
		return err
	}
	if c.Device, err = device.Area(t, name, "device", q.Device, deviceLen, dma.DeviceWrite); err != nil {
		return err
	}
	a := nq.bus
	c.Desc, c.Driver, c.Device = c.Desc.Accounted(&a.Descriptor), c.Driver.Accounted(&a.Driver), c.Device.Accounted(&a.Device)
	c.Table = n.table.Accounted(&a.Payload)
	n.mu.Lock()
	defer n.mu.Unlock()
	nq.cfg, nq.areas, nq.set = q, c, true
	return nil
}

// Start implements device.Device. One pair is in use, until the driver asks for more by the control queue (virtio 1.2, 5.1.6.5.5).
func (n *Net) Start() error { return withCause(n.start()) }

func (n *Net) start() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.stop != nil {
		return fmt.Errorf("%s: is running already", n.cfg.Name)
	}
	for i, q := range [...]*netQueue{&n.pairs[0].rx, &n.pairs[0].tx} {
		if !q.set {
			return fmt.Errorf("%s: DRIVER_OK without a queue %s", n.cfg.Name, virtio.NetQueueName(i, len(n.pairs)))
		}
	}
	if err := n.ifc.SetOffload(tunbridge.DeviceOffload(n.acked.Mask())); err != nil {
		return err
	}
	if err := n.ifc.SetQueues(1); err != nil {
		return err
	}
	n.ifc.Drain() // frames queued before may need what is not negotiated any more
	stop, err := tunbridge.NewStop()
	if err != nil {
		return err
	}
	started := false
	defer func() { // also where a fault of the memory tears this out
		if !started {
			n.engines.Release()
			n.stop, n.inUse = nil, 0
			stop.Close()
		}
	}()
	n.engines.Prepare(n.engineJobs())
	for i := range n.pairs {
		p := &n.pairs[i]
		p.running, p.rx.pump, p.tx.pump = false, nil, nil
		if !p.ready() {
			continue
		}
		if err := n.makePumps(i, stop); err != nil {
			return err
		}
	}
	var ctrl *control
	if n.ctrl.set {
		if err := n.open(&n.ctrl); err != nil {
			return err
		}
		ctrl = &control{name: n.queueName(virtio.NetQueueCtrl(n.negotiated())), q: n.ctrl.q, max: n.negotiated(), set: n.setPairs, stop: stop,
			wait: n.ctrl.cfg.Kick, call: n.ctrl.cfg.Call, fallback: n.cfg.Fallback, bells: n.ctrl.bells, n: &n.ctl}
	}
	n.stop, n.inUse = stop, 1
	n.starts++
	n.startPair(&n.pairs[0])
	// Last: from here on the kernel sends.
	if err := n.ifc.SetCarrier(!n.peerDown); err != nil {
		stop.Raise()
		n.mu.Unlock()
		n.loops.Wait() // they may want mu
		n.mu.Lock()
		return err
	}
	started = true
	n.carrier = !n.peerDown
	if ctrl != nil {
		n.loops.Add(1)
		go n.run(ctrl)
	}
	return nil
}

// open makes the device side of a queue that is set up.
func (n *Net) open(q *netQueue) error {
	c := q.areas
	c.EventIdx, c.Indirect = n.acked.Has(virtio.EventIdx), n.acked.Has(virtio.IndirectDesc)
	c.InOrder = n.acked.Has(virtio.InOrder)
	dev, err := newDeviceQueue(c, n.acked.Has(virtio.RingPacked))
	if err == nil {
		q.q = dev
	}
	return err
}

// maxFrames returns the longest frames of each direction, headers included. mu is held.
func (n *Net) maxFrames() (toDriver, toDevice int) {
	mtu, f := n.ifc.MTU(), n.acked.Mask()
	return tunbridge.MaxFrameToDriver(mtu, f), tunbridge.MaxFrameToDevice(mtu, f)
}

// makePumps makes the pumps and the loop of pair i.
func (n *Net) makePumps(i int, stop *tunbridge.Stop) error {
	p := &n.pairs[i]
	toDriver, toDevice := n.maxFrames()
	for j, q := range [...]*netQueue{&p.rx, &p.tx} {
		if err := n.open(q); err != nil {
			return err
		}
		pc := tunbridge.PumpConfig{Name: n.queueName(2*i + j), Iface: p.ifc, Stop: stop, Wait: q.cfg.Kick, Ring: q.cfg.Call,
			MaxFrame: toDevice, MaxFollow: tunbridge.HeaderLen + tunbridge.MaxFrameLen, Fallback: n.cfg.Fallback,
			Across: q.areas.Driver.Region.Across, Stats: q.stats, Bells: q.bells}
		if m, stage, ok := n.engines.Engine(2*i + j); ok {
			pc.Mover, pc.Staging = m, stage
		}
		if q == &p.rx {
			pc.MaxFrame = toDriver
			if n.acked.Has(virtio.NetMTU) {
				pc.MaxFollow = 0 // the driver was told the MTU (virtio 1.2, 5.1.4.1)
			}
			q.pump = tunbridge.NewDeviceRX(pc, q.q, n.acked.Has(virtio.NetMrgRxbuf))
		} else {
			q.pump = tunbridge.NewDeviceTX(pc, q.q)
		}
	}
	var err error
	p.loop, err = tunbridge.NewLoop(n.cfg.Loop.Pair(i), p.rx.pump, p.tx.pump)
	return err
}

// startPair starts the loop of a pair that has one. mu is held.
func (n *Net) startPair(p *netPair) {
	p.running = true
	n.loops.Add(1)
	go n.run(p.loop)
}

// setPairs puts so many pairs into use, as the driver asked: their loops run, and the kernel hands frames to their queues of the
// interface. The loops of a pair that goes out of use go on, with nothing to receive.
func (n *Net) setPairs(pairs int) error {
	n.mu.Lock()
	for i := 0; i < pairs; i++ {
		if !n.pairs[i].ready() {
			n.mu.Unlock()
			return fmt.Errorf("%d queue pairs asked for, and pair %d is not set up", pairs, i)
		}
	}
	for i := 0; i < pairs; i++ {
		if !n.pairs[i].running {
			n.startPair(&n.pairs[i])
		}
	}
	n.mu.Unlock()
	err := n.ifc.SetQueues(pairs)
	n.mu.Lock()
	n.inUse = n.ifc.InUse()
	n.mu.Unlock()
	return err
}

// newDeviceQueue makes the device side of a queue of the negotiated kind.
func newDeviceQueue(c vring.Config, packed bool) (vring.Device, error) {
	if packed {
		return vring.NewPackedDevice(c)
	}
	return vring.NewSplitDevice(c)
}

func (n *Net) run(p tunbridge.Pump) {
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
	if !errors.Is(err, tunbridge.ErrGone) { // that is nobody's fault at the queue
		n.broken++
	}
	notify := n.notify
	n.mu.Unlock()
	if notify != nil {
		notify(device.Event{Broken: withCause(err)})
	}
}

// Stop implements device.Device.
func (n *Net) Stop() []vring.State {
	n.mu.Lock()
	stop := n.stop
	n.mu.Unlock()
	states := make([]vring.State, n.Queues())
	if stop == nil {
		n.reset()
		return states
	}
	n.ifc.SetCarrier(false)
	stop.Raise()
	n.loops.Wait()
	n.mu.Lock()
	for i := range states {
		if q := n.queue(i); q != nil && q.set && q.q != nil {
			states[i] = q.q.State()
		}
	}
	n.mu.Unlock()
	stop.Close()
	// One pair again. Where the interface is gone it cannot be done, and does not matter.
	n.ifc.SetQueues(1)
	n.mu.Lock()
	n.engines.Release()
	n.stop, n.carrier, n.inUse = nil, false, 0
	n.mu.Unlock()
	n.reset()
	return states
}

// reset forgets what the driver set up.
func (n *Net) reset() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.acked, n.peerDown = virtio.Features{}, false
	for i := range n.pairs {
		n.pairs[i].rx.set, n.pairs[i].tx.set = false, false
	}
	n.ctrl.set = false
}

// Close implements device.Device.
func (n *Net) Close() error {
	n.Stop()
	return n.ifc.Close()
}

// SetEngines implements device.Device.
func (n *Net) SetEngines(e device.Engines) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.engines = e
}

// engineJobs lists what an engine can do for this device. mu is held.
func (n *Net) engineJobs() []device.EngineJob {
	toDriver, toDevice := n.maxFrames()
	var jobs []device.EngineJob
	for i := range n.pairs {
		if n.pairs[i].ready() {
			rx, tx := virtio.NetQueueRX(i), virtio.NetQueueTX(i)
			jobs = append(jobs, device.EngineJob{Queue: rx, Name: n.queueName(rx), ToBoard: true, Stage: tunbridge.StagingMin(toDriver)},
				device.EngineJob{Queue: tx, Name: n.queueName(tx), Stage: tunbridge.StagingMin(toDevice)})
		}
	}
	return jobs
}

// WriteConfig implements device.Device: nothing in the configuration of a network device is the driver's to write.
func (n *Net) WriteConfig(uint32, []byte) error { return device.ErrReadOnly }
