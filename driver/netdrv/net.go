package netdrv

import (
	"errors"
	"fmt"
	"runtime"
	"sync"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/driver"
	"github.com/boardlink/boardlink/pci"
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/tunbridge"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/vring"
)

// Sizes that the operator did not choose.
const (
	defaultQueueSize = 256
	minRXBuffer      = 2 << 10
	// The largest receive buffer where merging is on. Each takes reads across the bus to find, in placement window, and several TCP
	// streams at once gain by room for more frames.
	maxRXBuffer   = 16 << 10
	maxTXMemory   = 3 << 20   // of a queue; with half of it, several TCP streams at once lost a twentieth
	minPairMemory = 512 << 10 // of the device's memory, each kind, for each queue pair
	ctrlQueueSize = 8
)

// Config says what a network device is to be like on this side.
type Config struct {
	Name   string // "net0": for errors and status
	Number uint16 // device number on the link
	// Interface is the device's own end. A MAC set here wins over the one that the host gives; an
	// MTU here is lowered to the host's.
	Interface tunbridge.Config
	// Deny are features not to be accepted.
	Deny virtio.Features
	// Ring is the kind of virtqueue: "split", "packed" (placement window only), or "auto", the default.
	Ring string
	// Queues is how many queue pairs to use at most; the host may offer fewer. 0 means as many as this machine has processors, and
	// fewer where memory or doorbells are short.
	Queues int
	// QueueSize is in descriptors, a power of two; 0 means 256. The host may ask for fewer, and where memory is short there
	// are fewer.
	QueueSize uint16
	// RXBuffer is the size in bytes of one receive buffer where they can be merged; 0 chooses by the
	// memory there is: at most 16 KiB.
	RXBuffer uint32
	// Fallback is the pace of the poll fallback; the zero value is the default.
	Fallback doorbell.Fallback
	// Loop is how the loops wait; each pair's has one of the processors.
	Loop tunbridge.LoopConfig
}

var _ driver.Driver = (*Net)(nil)

// Net drives one virtio-net device. Each queue pair has a queue of the interface to itself.
type Net struct {
	cfg   Config
	ifc   *tunbridge.Iface
	limit int // pairs to use, at most len(pairs)

	sizeChosen bool // cfg.QueueSize is the operator's

	mu        sync.Mutex // guards what Status reads
	offered   virtio.Features
	acked     virtio.Features
	devStatus uint32
	carrier   bool
	pairs     []netPair
	ctrl      netQueue
	setUps    int // pairs that are set up
	offers    int // pairs that the host offers, which number the queues
	inUse     int // pairs
	stop      *tunbridge.Stop
	loops     sync.WaitGroup
	lastErr   error
	note      string // what is left out for want of room
	ups       uint64
	broken    uint64

	mtuCap  int    // the MTU of an interface that somebody else made: it is not raised; 0: none
	busy    bool   // the interface's descriptors are in use
	ifaceUp bool   // administratively
	remade  bool   // the interface was made again, and the link has not noticed
	wake    func() // of the link
	warning string // to be logged
	warned  string // the last one
}

// netPair is a receive and a transmit queue, and the queue of the interface that they belong to.
type netPair struct {
	ifc    *tunbridge.Iface
	rx, tx netQueue
	loop   tunbridge.Pump // of both
}

type netQueue struct {
	size  uint16
	q     vring.Driver
	pump  tunbridge.Pump
	stats *tunbridge.Stats
	bells *doorbell.Counters
	bus   *dma.QueueAccount
}

func newNetQueue() netQueue {
	return netQueue{stats: new(tunbridge.Stats), bells: new(doorbell.Counters), bus: new(dma.QueueAccount)}
}

// New opens the interface, carrier off. Errors of the user's making satisfy
// tunbridge.UserError.
func New(cfg Config) (*Net, error) {
	switch cfg.Ring {
	case "", "auto", "split", "packed":
	default:
		return nil, fmt.Errorf("%s: a ring %q: it has to be auto, split or packed", cfg.Name, cfg.Ring)
	}
	chosen := cfg.QueueSize != 0
	if !chosen {
		cfg.QueueSize = defaultQueueSize
	}
	if cfg.QueueSize&(cfg.QueueSize-1) != 0 || cfg.QueueSize > vring.MaxSize || cfg.QueueSize < 2 {
		return nil, fmt.Errorf("%s: a queue size of %d: it has to be a power of two from 2 to %d", cfg.Name, cfg.QueueSize, vring.MaxSize)
	}
	cfg.Interface.Queues = cfg.Queues
	if cfg.Queues == 0 {
		if cfg.Interface.Queues = runtime.NumCPU(); cfg.Interface.Queues > tunbridge.MaxQueues {
			cfg.Interface.Queues = tunbridge.MaxQueues
		}
	}
	ifc, err := tunbridge.Open(cfg.Interface)
	if err != nil {
		return nil, err
	}
	if err := ifc.SetCarrier(false); err != nil {
		ifc.Close()
		return nil, err
	}
	n := &Net{cfg: cfg, ifc: ifc, limit: ifc.Queues(), ctrl: newNetQueue(), sizeChosen: chosen}
	for i := 0; i < ifc.Queues(); i++ {
		n.pairs = append(n.pairs, netPair{ifc: ifc.Queue(i), rx: newNetQueue(), tx: newNetQueue()})
	}
	if ifc.Attached() && !cfg.Interface.Persist && cfg.Interface.MTU == 0 {
		n.mtuCap = ifc.MTU()
	}
	n.ifaceUp = ifc.State().Up
	ifc.Watch(n.interfaceChanged)
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
	if n.limit > 1 {
		f.Set(virtio.NetMQ)
		f.Set(virtio.NetCtrlVQ)
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
	f = virtio.WithoutOrphans(f)
	if !f.Has(virtio.NetMQ) {
		f.Clear(virtio.NetCtrlVQ) // of no use alone
	}
	return f, nil
}

// Up implements driver.Driver (virtio 1.2, 3.1.1). The memory is not shown to the device
// by anybody else. notify hears when a loop ends by an error.
func (n *Net) Up(t driver.Transport, m driver.Layout, notify func(error)) error {
	n.setBusy(true)
	defer func() {
		n.mu.Lock()
		n.busy = n.stop != nil
		n.mu.Unlock()
	}()
	if n.ifc.Gone() { // the host is not troubled with it
		return fmt.Errorf("interface %q: %w", n.ifc.Name(), tunbridge.ErrGone)
	}
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
	if err = n.setUp(t, m, set, notify); err != nil {
		n.Failed(err)
		// Best effort: the device is told that we gave up on it.
		t.SetStatus(set | virtio.StatusFailed)
	}
	return err
}

func (n *Net) setUp(t driver.Transport, m driver.Layout, set uint32, notify func(error)) error {
	offered, err := t.Features()
	if err != nil {
		return err
	}
	n.mu.Lock()
	n.offered = offered
	n.mu.Unlock()
	acked, err := n.choose(offered, m.Near != m.Far)
	if err != nil {
		return err
	}
	// Before features are accepted (virtio 1.2, 3.1.1, step 4): which ones have room depends on it.
	cb, err := t.Config(0, virtio.NetConfigLen)
	if err != nil {
		return err
	}
	nc := virtio.DecodeNetConfig(cb)
	lay := laying{t: t, m: m, offers: 1, count: 1, hostMTU: int(nc.MTU)}
	if acked.Has(virtio.NetMQ) {
		lay.offers = int(nc.MaxQueuePairs)
		if lay.offers < 1 || lay.offers > virtio.NetPairsMax {
			return fmt.Errorf("%s: the host offers %d queue pairs: 1 to %d are possible (virtio 1.2, 5.1.4)", n.cfg.Name, lay.offers, virtio.NetPairsMax)
		}
		if lay.count = n.limit; lay.count > lay.offers {
			lay.count = lay.offers
		}
	}
	acked, note, err := n.fit(acked, m, n.mtu(acked, nc), lay.offers)
	if err != nil {
		return err
	}
	lay.acked = acked
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
	if err := n.configure(acked, nc); err != nil {
		return err
	}
	if err := n.ifc.SetOffload(tunbridge.DriverOffload(acked.Mask())); err != nil {
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
			stop.Close()
		}
	}()
	lay.stop = stop
	if err := n.layOut(&lay); err != nil {
		return err
	}
	set |= virtio.StatusDriverOK
	if s, err = t.SetStatus(set); err == nil && s&(virtio.StatusNeedsReset|virtio.StatusDriverOK) != virtio.StatusDriverOK {
		err = fmt.Errorf("%s: the host cannot start the device (status %s): see its log", n.cfg.Name, virtio.StatusString(s))
	}
	if err != nil {
		return err
	}
	started = true // Down stops it from here on
	n.mu.Lock()
	n.acked, n.devStatus, n.stop = acked, set, stop
	n.pairs, n.ctrl, n.setUps, n.offers, n.inUse = lay.pairs, lay.ctrl, lay.count, lay.offers, 1
	n.ups++
	n.note = note
	n.lastErr = nil // from here on the loops may find something
	n.mu.Unlock()
	// Those that are not in use yet have nothing to send, but buffers to offer.
	for i := 0; i < lay.count; i++ {
		n.startPair(&lay.pairs[i], notify)
	}
	carrier := linkUp(acked, nc)
	if err := n.ifc.SetCarrier(carrier); err != nil {
		n.Down()
		return err
	}
	n.mu.Lock()
	n.carrier = carrier
	n.mu.Unlock()
	if lay.count > 1 {
		n.loops.Add(1)
		go n.run(&request{n: n, lay: &lay}, notify)
	}
	return nil
}

// linkUp tells what the configuration says of the link: without the status it is up (virtio 1.2,
// 5.1.5).
func linkUp(acked virtio.Features, c virtio.NetConfig) bool {
	return !acked.Has(virtio.NetStatus) || c.LinkUp
}

// startPair starts the loop of a pair.
func (n *Net) startPair(p *netPair, notify func(error)) {
	n.loops.Add(1)
	go n.run(p.loop, notify)
}

// configure takes over what the host's configuration space says.
func (n *Net) configure(acked virtio.Features, c virtio.NetConfig) error {
	if acked.Has(virtio.NetMAC) && n.cfg.Interface.MAC == (tunbridge.MAC{}) && n.ifc.Type() == tunbridge.TAP &&
		n.ifc.MAC() != tunbridge.MAC(c.MAC) {
		m := tunbridge.MAC(c.MAC)
		if err := n.tolerate(n.ifc.SetMAC(m), "its MAC address stays %v, the host gives %v: run \"ip link set dev %s address %v\" as root", n.ifc.MAC(), m, n.ifc.Name(), m); err != nil {
			return err
		}
	}
	if mtu, have := n.mtu(acked, c), n.ifc.MTU(); mtu != have {
		err := n.ifc.SetMTU(mtu)
		if errors.Is(err, tunbridge.ErrElsewhere) {
			n.warnOnce(fmt.Sprintf("its MTU stays %d, %d is wanted: %v", have, mtu, err))
			return nil
		}
		return n.tolerate(err, "its MTU stays %d, %d is wanted: run \"ip link set dev %s mtu %d\" as root", have, mtu, n.ifc.Name(), mtu)
	}
	return nil
}

// mtu returns the MTU that the interface is to have: the operator's, lowered to the host's, or the host's.
func (n *Net) mtu(acked virtio.Features, c virtio.NetConfig) int {
	mtu := n.cfg.Interface.MTU
	if mtu == 0 {
		mtu = n.mtuCap
	}
	if acked.Has(virtio.NetMTU) && (mtu == 0 || mtu > int(c.MTU)) {
		mtu = int(c.MTU)
	}
	if mtu == 0 {
		return n.ifc.MTU()
	}
	return mtu
}

// Reconfigure implements driver.Driver: it takes over a configuration that changed while the device runs: the link's state, the
// MAC. The MTU decides how large buffers are: a change of it takes effect with the next reset.
func (n *Net) Reconfigure(t driver.Transport) error {
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
	up := linkUp(acked, c)
	if err := n.ifc.SetCarrier(up); err != nil {
		return err
	}
	n.mu.Lock()
	n.carrier = up
	n.mu.Unlock()
	c.MTU = uint16(n.ifc.MTU())
	return n.configure(acked, c)
}

// laying is the set-up of a device's queues under way.
type laying struct {
	t      driver.Transport
	m      driver.Layout
	acked  virtio.Features
	offers int // pairs that the host offers
	count  int // pairs to set up; lowered where there is no room, and the operator did not choose
	stop   *tunbridge.Stop

	hostMTU      int // as the configuration space has it
	maxRX, maxTX int // longest frames with headers, to this side and from it

	pairs []netPair
	ctrl  netQueue
	cmd   dma.Span // what the control queue's command, and its acknowledgement, are written to
	ack   dma.Span
	kick  doorbell.Ringer // of the control queue
	call  doorbell.Waiter
}

// place is where a queue's areas and buffers go.
type place struct {
	desc, driver, device dma.Span
	buffers              dma.Span
	bufferSize           uint32 // of a receive queue
}

// errNoRoom: the device's memory does not do for so many queue pairs.
var errNoRoom = errors.New("use a larger window, fewer devices or fewer queue pairs (--queues)")

// layOut places rings and buffers in the device's memory, tells the device, and makes the loops.
func (n *Net) layOut(l *laying) error {
	mtu, f := n.ifc.MTU(), l.acked.Mask()
	l.maxRX, l.maxTX = tunbridge.MaxFrameToDriver(mtu, f), tunbridge.MaxFrameToDevice(mtu, f)
	const longest = tunbridge.HeaderLen + tunbridge.MaxFrameLen
	follow := longest // where the host says no MTU, all that the interface's allows may be sent
	if l.acked.Has(virtio.NetMTU) {
		follow = tunbridge.MaxFrame(l.hostMTU, false)
	}
	w, err := n.plan(l, mtu)
	if err != nil {
		return err
	}
	sizes := make([]uint16, 0, 2*l.count+1)
	for i := 0; i < 2*l.count; i++ {
		size, err := n.queueSize(l, i, w.size)
		if err != nil {
			return err
		}
		sizes = append(sizes, size)
	}
	ctrl := virtio.NetQueueCtrl(l.offers)
	if l.count > 1 {
		size, err := n.queueSize(l, ctrl, ctrlQueueSize)
		if err != nil {
			return err
		}
		sizes = append(sizes, size)
	}
	places, err := n.reserve(l, sizes)
	for err != nil && errors.Is(err, errNoRoom) && n.cfg.Queues == 0 && l.count > 1 {
		if l.count--; l.count > 1 {
			sizes = append(sizes[:2*l.count], sizes[len(sizes)-1])
		} else {
			sizes = sizes[:2]
		}
		l.m.Near.Alloc.Reset()
		l.m.Far.Alloc.Reset()
		places, err = n.reserve(l, sizes)
	}
	if err != nil {
		return err
	}
	l.pairs, l.ctrl = append([]netPair(nil), n.pairs...), n.ctrl
	l.ctrl.q, l.ctrl.size = nil, 0
	for i := range l.pairs {
		p := &l.pairs[i]
		p.rx.q, p.rx.pump, p.rx.size = nil, nil, 0
		p.tx.q, p.tx.pump, p.tx.size = nil, nil, 0
	}
	for i, size := range sizes {
		q, number := &l.ctrl, ctrl
		if i < 2*l.count {
			q, number = l.pairs[i/2].queue(i), i
		}
		if err := n.makeQueue(l, q, number, size, &places[i]); err != nil {
			return err
		}
	}
	merge := l.acked.Has(virtio.NetMrgRxbuf)
	for i := 0; i < 2*l.count; i++ {
		p := &l.pairs[i/2]
		q := p.queue(i)
		pc := tunbridge.PumpConfig{Name: n.queueName(i, l.offers), Iface: p.ifc, Stop: l.stop, Wait: l.t.Call(i), Ring: l.t.Kick(i),
			MaxFrame: l.maxTX, MaxFollow: follow, Fallback: n.cfg.Fallback, Across: places[i].device.Region.Across, Stats: q.stats, Bells: q.bells}
		mem := places[i].buffers.Accounted(&q.bus.Payload)
		if q == &p.rx {
			pc.MaxFrame, pc.MaxFollow = l.maxRX, longest
			q.pump, err = tunbridge.NewDriverRX(pc, q.q, mem, places[i].bufferSize, merge)
		} else {
			q.pump, err = tunbridge.NewDriverTX(pc, q.q, mem)
		}
		if err != nil {
			return err
		}
		if i%2 == 1 {
			if p.loop, err = tunbridge.NewLoop(n.cfg.Loop.Pair(i/2), p.rx.pump, p.tx.pump); err != nil {
				return err
			}
		}
	}
	if l.count > 1 {
		l.kick, l.call = l.t.Kick(ctrl), l.t.Call(ctrl)
	}
	return nil
}

// queue returns the pair's part of queue i.
func (p *netPair) queue(i int) *netQueue {
	if i%2 == 0 {
		return &p.rx
	}
	return &p.tx
}

func (n *Net) queueName(i, offers int) string {
	return n.cfg.Name + " " + virtio.NetQueueName(i, offers)
}

// queueSize asks for the largest size of queue i and returns which one to use, at most wish.
func (n *Net) queueSize(l *laying, i int, wish uint16) (uint16, error) {
	limit, err := l.t.QueueMax(i)
	if err != nil {
		return 0, err
	}
	for wish > limit {
		wish /= 2
	}
	if wish < 2 {
		return 0, fmt.Errorf("%s: the host has no such queue (largest size %d)", n.queueName(i, l.offers), limit)
	}
	return wish, nil
}

// reserve finds room for queues of the given sizes: the pairs', and the control queue's where there are several. Pairs get
// equal shares of what is left for buffers. Nothing is shown to the device.
func (n *Net) reserve(l *laying, sizes []uint16) ([]place, error) {
	places := make([]place, len(sizes))
	near, far := l.m.Near, l.m.Far
	room := func(err error) error {
		if err != nil && l.count > 1 {
			return fmt.Errorf("%s: no room for %d queue pairs: %s: %w", n.cfg.Name, l.count, err, errNoRoom)
		}
		return err
	}
	var err error
	for i, size := range sizes {
		name := n.queueName(i, l.count)
		descLen, driverLen, deviceLen := vring.SplitSizes(size)
		if l.acked.Has(virtio.RingPacked) {
			descLen, driverLen, deviceLen = vring.PackedSizes(size)
		}
		// Each area on cache lines of its own: both sides write near each other otherwise.
		for _, a := range [...]struct {
			span *dma.Span
			m    *driver.Memory
			n    uint64
		}{{&places[i].desc, far, descLen}, {&places[i].driver, far, driverLen}, {&places[i].device, near, deviceLen}} {
			if *a.span, err = a.m.Take(name, a.n, 64); err != nil {
				return nil, room(err)
			}
		}
	}
	if l.count > 1 {
		if l.cmd, err = far.Take(n.cfg.Name+" ctrl", 64, 64); err == nil {
			l.ack, err = near.Take(n.cfg.Name+" ctrl", 64, 64)
		}
		if err != nil {
			return nil, room(err)
		}
	}
	merge := l.acked.Has(virtio.NetMrgRxbuf)
	for i := 0; i < l.count; i++ {
		rx, tx := &places[virtio.NetQueueRX(i)], &places[virtio.NetQueueTX(i)]
		left := uint64(l.count - i)
		share := near.Alloc.Largest() / left
		bytes := share
		if near == far {
			bytes = rxShare(share, uint64(l.maxRX), tunbridge.TXMemMin(l.maxTX))
		}
		name := n.queueName(virtio.NetQueueRX(i), l.count)
		size, count := rxBuffers(bytes, sizes[virtio.NetQueueRX(i)], n.cfg.RXBuffer, uint32(l.maxRX), merge)
		if l.count > 1 && (count == 0 || count*int(size) < l.maxRX) {
			return nil, room(fmt.Errorf("%s: %d receive buffers of %d bytes are too few for frames of %d", name, count, size, l.maxRX))
		}
		if rx.buffers, err = near.Take(name, uint64(size)*uint64(count), 64); err != nil {
			return nil, room(err)
		}
		rx.bufferSize = size

		name = n.queueName(virtio.NetQueueTX(i), l.count)
		all := far.Alloc.Largest()
		bytes = all / left
		if near == far && left > 1 {
			bytes = share - uint64(rx.buffers.Len)
		}
		if bytes &^= 63; bytes > maxTXMemory {
			bytes = maxTXMemory
		}
		if l.count > 1 && bytes < tunbridge.TXMemMin(l.maxTX) {
			return nil, room(fmt.Errorf("%s: %d bytes of transmit memory are too few for frames of %d", name, bytes, l.maxTX))
		}
		if tx.buffers, err = far.Take(name, bytes, 64); err != nil {
			return nil, room(err)
		}
	}
	return places, nil
}

// makeQueue makes the driver side of queue number i and tells the device.
func (n *Net) makeQueue(l *laying, q *netQueue, i int, size uint16, p *place) error {
	for _, a := range [...]*dma.Span{&p.desc, &p.driver, &p.device} {
		mem := a.Mem()
		mem.Zero(0, uint64(a.Len))
	}
	c := vring.Config{Name: n.queueName(i, l.offers), Size: size, EventIdx: l.acked.Has(virtio.EventIdx), Indirect: l.acked.Has(virtio.IndirectDesc)}
	c.InOrder = l.acked.Has(virtio.InOrder)
	c.Desc, c.Driver, c.Device = p.desc.Accounted(&q.bus.Descriptor), p.driver.Accounted(&q.bus.Driver), p.device.Accounted(&q.bus.Device)
	d, err := newDriverQueue(c, l.acked.Has(virtio.RingPacked))
	if err != nil {
		return err
	}
	q.q, q.size = d, size
	return l.t.SetQueue(i, size, c.Desc.Addr(), c.Driver.Addr(), c.Device.Addr())
}

// newDriverQueue makes the driver side of a queue of the negotiated kind.
func newDriverQueue(c vring.Config, packed bool) (vring.Driver, error) {
	if packed {
		return vring.NewPackedDriver(c)
	}
	return vring.NewSplitDriver(c)
}

// rxShare returns which part of a pair's memory is for reception: half of it, or what frames of these lengths need.
func rxShare(share, maxRX, txMin uint64) uint64 {
	rx := share / 2
	if share-rx < txMin && share > txMin {
		rx = share - txMin
	}
	if need := lines(maxRX); rx < need && need <= share {
		rx = need
	}
	return rx
}

// rxBuffers chooses size and number of receive buffers in so many bytes: large ones, so that a
// super-packet takes few, as long as there is one for each descriptor; and together room for the largest frame.
func rxBuffers(bytes uint64, queue uint16, wish, max uint32, merge bool) (size uint32, count int) {
	whole := (max + 63) &^ 63
	number := func() uint64 {
		if n := bytes / uint64(size); n < uint64(queue) {
			return n
		}
		return uint64(queue)
	}
	size = whole
	if merge {
		size = maxRXBuffer
		if wish != 0 {
			size = (wish + 63) &^ 63
		}
		for size > minRXBuffer && uint64(size)*uint64(queue) > bytes {
			size /= 2
		}
		// Few descriptors: larger ones.
		for wish == 0 && size < whole && uint64(size)*uint64(queue) < 2*uint64(max) && 2*uint64(size)*uint64(queue) <= bytes {
			if size *= 2; size > whole {
				size = whole
			}
		}
		if size &^= 63; number()*uint64(size) < uint64(max) {
			size = whole
		}
	}
	return size, int(number())
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
		if !errors.Is(err, tunbridge.ErrGone) { // that is nobody's fault at the queue
			n.broken++
		}
		n.mu.Unlock()
		notify(err)
	}
}

// ShortOf implements driver.Driver: it returns what is left out for want of room, and why; "" if nothing is.
func (n *Net) ShortOf() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.note
}

// Failed implements driver.Driver: it notes for Status why the device does not come up.
func (n *Net) Failed(err error) {
	n.mu.Lock()
	n.lastErr = err
	n.mu.Unlock()
}

// Down implements driver.Driver: it stops the loops, carrier off. The rings stay as they are: the device may still
// look at them. It is idempotent.
func (n *Net) Down() {
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
	// Where the interface is gone it cannot be done, and does not matter.
	n.ifc.SetQueues(1)
	n.mu.Lock()
	n.stop, n.carrier, n.devStatus, n.acked, n.inUse, n.setUps = nil, false, 0, virtio.Features{}, 0, 0
	n.busy = false
	n.mu.Unlock()
}

// Close stops the loops and gives the interface back.
func (n *Net) Close() error {
	n.Down()
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
		Pairs: n.inUse, MaxPairs: n.limit,
		Counters: map[string]uint64{"ups": n.ups, "broken": n.broken, "remade": uint64(n.ifc.Remakes())}}
	if n.ifc.Type() == tunbridge.TAP {
		s.MAC = n.ifc.MAC().String()
	}
	if n.lastErr != nil {
		s.LastError = n.lastErr.Error()
	}
	if n.note != "" && n.stop != nil {
		s.Notes = []string{n.note}
	}
	for i := 0; i < 2*n.limit; i++ {
		s.Queues = append(s.Queues, n.pairs[i/2].queue(i).describe(i, virtio.NetQueueName(i, len(n.pairs)), i < 2*n.setUps))
	}
	if n.setUps > 1 {
		ctrl := virtio.NetQueueCtrl(n.offers)
		s.Queues = append(s.Queues, n.ctrl.describe(ctrl, "ctrl", true))
	}
	s.Notes = append(s.Notes, n.unmet()...)
	return s
}

func (q *netQueue) describe(index int, name string, ready bool) status.Queue {
	qs := status.Queue{Index: index, Name: name, Ready: ready, Size: q.size}
	if q.q != nil {
		st := q.q.State()
		qs.Avail, qs.Used = st.Avail, st.Used
		qs.Ring = status.Counters(q.q.Stats().Load())
	}
	qs.Pump = make(map[string]uint64)
	q.stats.Each(func(name string, v uint64) { qs.Pump[name] = v })
	qs.Doorbell = status.Counters(q.bells.Snapshot())
	q.bus.Describe(&qs, q.stats.Frames())
	return qs
}

// Name implements driver.Driver.
func (n *Net) Name() string { return n.cfg.Name }

// Number implements driver.Driver.
func (n *Net) Number() uint16 { return n.cfg.Number }

// DeviceID implements driver.Driver.
func (n *Net) DeviceID() uint32 { return virtio.IDNet }

// Joined implements driver.Driver: the interface's name of the moment.
func (n *Net) Joined() string { return n.ifc.Name() }

// Doorbells implements driver.Driver. The control queue, whose number depends on the host, has none: it has one
// answer to wait for, and polls.
func (n *Net) Doorbells() int { return 2 * n.limit }

// Pairs implements driver.Driver.
func (n *Net) Pairs() (pairs int, chosen bool) { return len(n.pairs), n.cfg.Queues != 0 }

// LimitPairs implements driver.Driver.
func (n *Net) LimitPairs(pairs int) {
	n.mu.Lock()
	n.limit = pairs
	n.mu.Unlock()
}
