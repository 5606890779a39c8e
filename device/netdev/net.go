package netdev

import (
	"sync"

	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
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

	cfg Config
	ifc *tunbridge.Iface

	// ops is held by whoever starts, changes or stops queues: the control plane, and the control queue's goroutine where a command
	// puts pairs into use. It is taken before mu.
	ops     sync.Mutex
	running bool // SetRunning
	drained bool // by SetRunning, since the last Reset

	mu      sync.Mutex // guards what follows, which Status reads; not held while a loop is waited for
	notify  func(device.Event)
	acked   virtio.Features
	options device.Options
	pairs   []netPair
	ctrl    netQueue
	control *control // nil: the control queue is not served
	inUse   int      // pairs
	busy    bool     // a queue was started since the last Reset: the interface's descriptors may be in use
	carrier bool
	told    linkState // to the driver, by the last event
	// peerDown: the driver's end is down, as it told since the last reset.
	peerDown bool
	lastErr  error
	starts   uint64
	broken   uint64
}

// netPair is a receive and a transmit queue (the names are the driver's: what it receives, the device fills in), and the queue of
// the interface that they belong to.
type netPair struct {
	ifc    *tunbridge.Iface
	rx, tx netQueue
	loop   *tunbridge.Loop // of both; nil: none of them was started since the last Reset
	live   bool            // it was in use since then: its queues move while the device runs
}

// queues returns the receive queue, and the transmit queue.
func (p *netPair) queues() [2]*netQueue { return [2]*netQueue{&p.rx, &p.tx} }

// pumps returns the pumps of a pair's queues that are started and in order.
func (n *Net) pumps(p *netPair) []tunbridge.DevicePump {
	n.mu.Lock()
	defer n.mu.Unlock()
	var l []tunbridge.DevicePump
	for _, q := range p.queues() {
		if q.started && q.err == nil {
			l = append(l, q.pump)
		}
	}
	return l
}

// ready tells that both queues are started.
func (p *netPair) ready() bool { return p.rx.started && p.tx.started }

type netQueue struct {
	started bool
	enabled bool                 // by EnableQueue
	r       device.Resources     // while it is started
	q       vring.Device         // stays after it has stopped, for its counters
	pump    tunbridge.DevicePump // nil: the control queue
	err     error                // what ended it
	// What the loops count lives as long as the model.
	stats *tunbridge.Stats
	bells *doorbell.Counters
	own   *dma.QueueAccount // where the control plane has none
	bus   *dma.QueueAccount // that of the last start
	size  uint16            // of the last start
}

func newNetQueue() netQueue {
	own := new(dma.QueueAccount)
	return netQueue{stats: new(tunbridge.Stats), bells: new(doorbell.Counters), own: own, bus: own}
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
	n := &Net{cfg: cfg, ifc: ifc, ctrl: newNetQueue()}
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

// Queue implements device.Device.
func (n *Net) Queue(i int) device.QueueInfo {
	n.mu.Lock()
	defer n.mu.Unlock()
	info := device.QueueInfo{Name: n.queueName(i)}
	if i < 0 || i >= n.Queues() || n.acked != (virtio.Features{}) && n.queue(i) == nil {
		return info
	}
	info.Max = n.cfg.QueueMax
	toDriver, toDevice := n.maxFrames()
	switch {
	case n.queue(i) == &n.ctrl:
	case i%2 == 0:
		info.ToDriver, info.Stage = true, tunbridge.StagingMin(toDriver)
	default:
		info.Stage = tunbridge.StagingMin(toDevice)
	}
	return info
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

// WriteConfig implements device.Device: nothing in the configuration of a network device is the driver's to write.
func (n *Net) WriteConfig(uint32, []byte) error { return device.ErrReadOnly }
