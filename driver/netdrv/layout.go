package netdrv

import (
	"errors"
	"fmt"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/driver"
	"github.com/boardlink/boardlink/tunbridge"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/vring"
)

// bringUp is what one call of Up works on: the queues that it sets up.
type bringUp struct {
	t      driver.Transport
	m      driver.Layout
	acked  virtio.Features
	offers int // pairs that the host offers
	count  int // pairs to set up; lowered where there is no room, and the operator did not choose
	// The transport enables the queues of pairs: there is no control queue.
	enabled bool
	stop    *tunbridge.Stop

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

// hasCtrl tells whether the control queue is set up.
func (l *bringUp) hasCtrl() bool { return l.count > 1 && !l.enabled }

// errNoRoom: the device's memory does not do for so many queue pairs.
var errNoRoom = errors.New("use a larger window, fewer devices or fewer queue pairs (--queues)")

// layOut places rings and buffers in the device's memory, tells the device, and makes the loops.
func (n *Net) layOut(l *bringUp) error {
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
	if l.hasCtrl() {
		size, err := n.queueSize(l, ctrl, ctrlQueueSize)
		if err != nil {
			return err
		}
		sizes = append(sizes, size)
	}
	places, err := n.reserve(l, sizes)
	for err != nil && errors.Is(err, errNoRoom) && n.cfg.Queues == 0 && l.count > 1 {
		last := sizes[len(sizes)-1]
		l.count--
		if sizes = sizes[:2*l.count]; l.hasCtrl() {
			sizes = append(sizes, last)
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
	if l.hasCtrl() {
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
func (n *Net) queueSize(l *bringUp, i int, wish uint16) (uint16, error) {
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
func (n *Net) reserve(l *bringUp, sizes []uint16) ([]place, error) {
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
	if l.hasCtrl() {
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
func (n *Net) makeQueue(l *bringUp, q *netQueue, i int, size uint16, p *place) error {
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
