package netdev

import (
	"errors"
	"fmt"
	"time"

	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/tunbridge"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/vring"
)

// startLimit is how long StartQueue, which has no deadline, waits for the loop of the other queue of the pair.
const startLimit = 5 * time.Second

// lookup returns queue i, its name, and its pair, nil for the control queue.
func (n *Net) lookup(i int) (q *netQueue, p *netPair, name string, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	q, name = n.queue(i), n.queueName(i)
	if q == nil {
		return nil, nil, name, fmt.Errorf("%s: there is no queue %d with the features that the driver accepted", n.cfg.Name, i)
	}
	if q != &n.ctrl {
		p = &n.pairs[i/2]
	}
	return q, p, name, nil
}

// ringConfig describes the ring of queue q with resources r, to go on at s.
func (n *Net) ringConfig(q *netQueue, i int, name string, r *device.Resources, a *dma.QueueAccount, s vring.State) vring.Config {
	return vring.Config{Name: name, Size: r.Size, State: s, Journal: r.Journal, Table: r.Table.Accounted(&a.Payload),
		Desc: r.Areas.Desc.Accounted(&a.Descriptor), Driver: r.Areas.Driver.Accounted(&a.Driver), Device: r.Areas.Device.Accounted(&a.Device),
		EventIdx: n.acked.Has(virtio.EventIdx), Indirect: n.acked.Has(virtio.IndirectDesc), InOrder: n.acked.Has(virtio.InOrder),
		Sent: q != &n.ctrl && i%2 == 1, Log: r.Log, LogByLen: q != &n.ctrl}
}

// newDeviceQueue makes the device side of a queue of the negotiated kind.
func newDeviceQueue(c vring.Config, packed bool) (vring.Device, error) {
	if packed {
		return vring.NewPackedDevice(c)
	}
	return vring.NewSplitDevice(c)
}

// StartQueue implements device.Device.
func (n *Net) StartQueue(i int, r device.Resources, s vring.State) error {
	n.ops.Lock()
	defer n.ops.Unlock()
	q, p, name, err := n.lookup(i)
	if err != nil {
		return err
	}
	if q.started {
		return fmt.Errorf("%s: %w", name, device.ErrStarted)
	}
	if p != nil && p.loop == nil {
		if p.loop, err = n.openLoop(i / 2); err != nil {
			return err
		}
	}
	n.mu.Lock()
	n.busy = true
	n.mu.Unlock()
	bus := r.Account
	if bus == nil {
		bus = q.own
	}
	ring, err := newDeviceQueue(n.ringConfig(q, i, name, &r, bus, s), n.acked.Has(virtio.RingPacked))
	if err != nil {
		return err
	}
	var pump tunbridge.DevicePump
	if p != nil {
		pump = n.newPump(name, q, p, &r, ring)
	}
	n.mu.Lock()
	q.started, q.r, q.q, q.pump, q.err, q.bus, q.size = true, r, ring, pump, nil, bus, r.Size
	n.mu.Unlock()
	if err := n.move(q, p, time.Now().Add(startLimit)); err != nil {
		return err
	}
	return n.followEnabled()
}

// newPump makes the pump of a queue of pair p.
func (n *Net) newPump(name string, q *netQueue, p *netPair, r *device.Resources, ring vring.Device) tunbridge.DevicePump {
	n.mu.Lock()
	defer n.mu.Unlock()
	toDriver, toDevice := n.maxFrames()
	c := tunbridge.PumpConfig{Name: name, Iface: p.ifc, Wait: r.Kick, Ring: r.Call, Muted: !q.enabled,
		MaxFrame: toDevice, MaxFollow: tunbridge.HeaderLen + tunbridge.MaxFrameLen, Fallback: n.cfg.Fallback,
		Across: r.Areas.Driver.Region.Across, Stats: q.stats, Bells: q.bells}
	if r.Copy != nil {
		c.Mover, c.Staging = r.Copy.Mover, r.Copy.Staging
	}
	if q == &p.tx {
		return tunbridge.NewDeviceTX(c, ring)
	}
	c.MaxFrame = toDriver
	if n.acked.Has(virtio.NetMTU) {
		c.MaxFollow = 0 // the driver was told the MTU (virtio 1.2, 5.1.4.1)
	}
	return tunbridge.NewDeviceRX(c, ring, n.acked.Has(virtio.NetMrgRxbuf))
}

// maxFrames returns the longest frames of each direction, headers included. mu is held.
func (n *Net) maxFrames() (toDriver, toDevice int) {
	mtu, f := n.ifc.MTU(), n.acked.Mask()
	return tunbridge.MaxFrameToDriver(mtu, f), tunbridge.MaxFrameToDevice(mtu, f)
}

// openLoop makes the loop of pair i. It goes on as its queues come and go, until Reset.
func (n *Net) openLoop(i int) (*tunbridge.Loop, error) {
	p := &n.pairs[i]
	return tunbridge.OpenLoop(tunbridge.LiveConfig{Name: fmt.Sprintf("%s pair %d", n.cfg.Name, i), Iface: p.ifc, Loop: n.cfg.Loop.Pair(i),
		Fallback: n.cfg.Fallback, Broken: func(pump tunbridge.DevicePump, err error) { n.broke(i, pump, err) }})
}

// move lets a started queue move if the device runs, and its pair is in use.
func (n *Net) move(q *netQueue, p *netPair, deadline time.Time) error {
	switch {
	case !n.running || !q.started:
		return nil
	case p == nil:
		return n.startControl()
	case !p.live:
		return nil
	}
	return stuck(p.loop.Attach(deadline, q.pump))
}

// stuck makes the error of a loop one of package device.
func stuck(err error) error {
	if errors.Is(err, tunbridge.ErrStuck) {
		return fmt.Errorf("%w: %v", device.ErrStuck, err)
	}
	return err
}

// broke notes that a pump of pair i ended by itself, nil for both.
func (n *Net) broke(i int, pump tunbridge.DevicePump, err error) {
	n.mu.Lock()
	queue := -1
	for j, q := range n.pairs[i].queues() {
		if q.started && (pump == nil || q.pump == pump) {
			q.err = err
			if pump != nil {
				queue = 2*i + j
			}
		}
	}
	n.mu.Unlock()
	n.tellBroken(queue, err)
}

// tellBroken counts an error that ended a queue, or all where it is -1, and tells of it.
func (n *Net) tellBroken(queue int, err error) {
	n.mu.Lock()
	n.lastErr = err
	if !errors.Is(err, tunbridge.ErrGone) { // that is nobody's fault at the queue
		n.broken++
	}
	notify := n.notify
	n.mu.Unlock()
	if notify != nil {
		notify(device.Event{Broken: withCause(err), Queue: queue})
	}
}

// EnableQueue implements device.Device.
func (n *Net) EnableQueue(i int, on bool, deadline time.Time) error {
	n.ops.Lock()
	defer n.ops.Unlock()
	q, p, _, err := n.lookup(i)
	if err != nil || q.enabled == on && !q.started { // a started one may have been stuck the last time
		return err
	}
	n.mu.Lock()
	q.enabled = on
	n.mu.Unlock()
	if p == nil {
		return nil
	}
	if q.started {
		mute := !on
		if err := stuck(p.loop.Change(q.pump, func() (tunbridge.Change, error) { return tunbridge.Change{Mute: &mute}, nil }, deadline)); err != nil {
			return err
		}
	}
	return n.followEnabled()
}

// followEnabled puts as many pairs of the interface into use as are enabled, where it is EnableQueue that tells. With
// the first one disabled all stay: the device pauses, and a queue of the interface that goes out of use loses its frames.
func (n *Net) followEnabled() error {
	if !n.options.ControlElsewhere || !n.running {
		return nil
	}
	k := 0
	for k < n.negotiated() && n.pairs[k].rx.enabled && n.pairs[k].ready() {
		k++
	}
	if k == 0 {
		return nil
	}
	return n.use(k)
}

// use puts so many queues of the interface into use.
func (n *Net) use(pairs int) error {
	err := n.ifc.SetQueues(pairs)
	n.mu.Lock()
	n.inUse = n.ifc.InUse()
	n.mu.Unlock()
	return err
}

// ChangeQueue implements device.Device.
func (n *Net) ChangeQueue(i int, c device.Change, deadline time.Time) error {
	if err := n.pauseControl(i, deadline); err != nil {
		return err
	}
	n.ops.Lock()
	defer n.ops.Unlock()
	q, p, name, err := n.lookup(i)
	if err != nil {
		return err
	}
	if !q.started {
		return fmt.Errorf("%s: %w", name, device.ErrStopped)
	}
	change := func() (tunbridge.Change, error) {
		t := tunbridge.Change{Wait: c.Kick, Ring: c.Call}
		n.mu.Lock()
		r, old := q.r, q.q
		n.mu.Unlock()
		if c.Kick != nil {
			r.Kick = c.Kick
		}
		if c.Call != nil {
			r.Call = c.Call
		}
		if c.Log != nil {
			r.Log = *c.Log
			old.SetLog(r.Log)
		}
		if c.Areas != nil {
			r.Areas = *c.Areas
			ring, err := newDeviceQueue(n.ringConfig(q, i, name, &r, q.bus, old.State()), n.acked.Has(virtio.RingPacked))
			if err != nil {
				return t, err
			}
			t.Queue = ring
		}
		n.mu.Lock()
		defer n.mu.Unlock()
		if q.r = r; t.Queue != nil {
			q.q = t.Queue
		}
		return t, nil
	}
	if p != nil {
		return stuck(p.loop.Change(q.pump, change, deadline))
	}
	if _, err := change(); err != nil {
		return err
	}
	return n.move(q, nil, deadline)
}

// StopQueue implements device.Device.
func (n *Net) StopQueue(i int, deadline time.Time) (device.Stopped, error) {
	if err := n.pauseControl(i, deadline); err != nil {
		return device.Stopped{}, err
	}
	n.ops.Lock()
	defer n.ops.Unlock()
	q, p, name, err := n.lookup(i)
	if err != nil {
		return device.Stopped{}, err
	}
	if !q.started {
		return device.Stopped{}, fmt.Errorf("%s: %w", name, device.ErrStopped)
	}
	if p != nil {
		if err := stuck(p.loop.Detach(deadline, q.pump)); err != nil {
			return device.Stopped{}, err
		}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	q.release()
	return device.Stopped{State: q.q.State(), Err: q.err}, nil
}

// release forgets the resources of a queue that rests.
func (q *netQueue) release() { q.started, q.r, q.pump = false, device.Resources{}, nil }

// SetRunning implements device.Device. One pair is in use at first, until the driver asks for more by the control queue (virtio
// 1.2, 5.1.6.5.5), or as many as are enabled.
func (n *Net) SetRunning(on bool, deadline time.Time) (err error) {
	if !on {
		return n.rest(deadline)
	}
	n.ops.Lock()
	defer n.ops.Unlock()
	if n.running {
		return nil
	}
	for i, q := range n.pairs[0].queues() {
		if !q.started {
			return fmt.Errorf("%s: DRIVER_OK without a queue %s", n.cfg.Name, virtio.NetQueueName(i, len(n.pairs)))
		}
	}
	if err := n.ifc.SetOffload(tunbridge.DeviceOffload(n.acked.Mask())); err != nil {
		return err
	}
	if !n.drained {
		if err := n.use(1); err != nil {
			return err
		}
		n.ifc.Drain() // frames queued before may need what is not negotiated any more
		n.drained = true
	}
	n.running = true
	defer func() {
		if err != nil {
			n.running = false // so that another call does all of it
		}
	}()
	for i := range n.pairs {
		p := &n.pairs[i]
		if p.live = p.live || i == 0 || n.options.ControlElsewhere; !p.live || p.loop == nil {
			continue
		}
		if err := stuck(p.loop.Attach(deadline, n.pumps(p)...)); err != nil {
			return err
		}
	}
	if err := n.followEnabled(); err != nil {
		return err
	}
	// From here on the kernel sends.
	n.mu.Lock()
	err = n.ifc.SetCarrier(!n.peerDown)
	if err == nil {
		n.carrier = !n.peerDown
		n.starts++
	}
	n.mu.Unlock()
	if err != nil {
		return err
	}
	return n.move(&n.ctrl, nil, deadline)
}

// rest lets all queues rest, carrier off.
func (n *Net) rest(deadline time.Time) error {
	n.mu.Lock()
	on := n.carrier
	n.carrier = false
	n.mu.Unlock()
	if on {
		n.ifc.SetCarrier(false) // where the interface is gone it cannot be done, and does not matter
	}
	if err := n.stopControl(deadline); err != nil {
		return err
	}
	n.ops.Lock()
	defer n.ops.Unlock()
	n.running = false
	for i := range n.pairs {
		if p := &n.pairs[i]; p.loop != nil {
			if err := stuck(p.loop.Detach(deadline, n.pumps(p)...)); err != nil {
				return err
			}
		}
	}
	return nil
}

// Reset implements device.Device.
func (n *Net) Reset(deadline time.Time) error {
	if err := n.rest(deadline); err != nil {
		return err
	}
	n.ops.Lock()
	defer n.ops.Unlock()
	for i := range n.pairs {
		p := &n.pairs[i]
		if p.loop == nil {
			continue
		}
		if err := stuck(p.loop.Close(deadline)); err != nil {
			return err
		}
		p.loop, p.live = nil, false
	}
	n.mu.Lock()
	busy := n.busy
	n.mu.Unlock()
	if busy {
		// One pair again. Where the interface is gone it cannot be done, and does not matter.
		n.ifc.SetQueues(1)
	}
	n.drained = false
	n.mu.Lock()
	defer n.mu.Unlock()
	n.busy, n.inUse, n.control = false, 0, nil
	n.acked, n.options, n.peerDown = virtio.Features{}, device.Options{}, false
	for i := range n.pairs {
		for _, q := range n.pairs[i].queues() {
			q.release()
			q.enabled = false
		}
	}
	n.ctrl.release()
	n.ctrl.enabled = false
	return nil
}

// Close implements device.Device.
func (n *Net) Close() error {
	if err := n.Reset(time.Time{}); err != nil {
		return err
	}
	return n.ifc.Close()
}

// setPairs puts so many pairs into use, as the driver asked: their queues move, and the kernel hands frames to their queues of the
// interface. The loops of a pair that goes out of use go on, with nothing to receive.
func (n *Net) setPairs(pairs int) error {
	n.ops.Lock()
	defer n.ops.Unlock()
	if !n.running {
		return errStopped
	}
	for i := 0; i < pairs; i++ {
		if !n.pairs[i].ready() {
			return fmt.Errorf("%d queue pairs asked for, and pair %d is not set up", pairs, i)
		}
	}
	for i := 0; i < pairs; i++ {
		if p := &n.pairs[i]; !p.live {
			p.live = true
			if err := p.loop.Attach(time.Now().Add(startLimit), n.pumps(p)...); err != nil {
				return err
			}
		}
	}
	return n.use(pairs)
}
