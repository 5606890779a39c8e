package netdrv

import (
	"errors"
	"fmt"

	"github.com/boardlink/boardlink/driver"
	"github.com/boardlink/boardlink/tunbridge"
	"github.com/boardlink/boardlink/virtio"
)

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

// choose returns the features to accept of those offered, for placement push or window. enabled:
// the transport enables queues (driver.Enabler), so that several pairs need no control queue.
func (n *Net) choose(offered virtio.Features, push, enabled bool) (virtio.Features, error) {
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
		return f, fmt.Errorf("%s: the host does not offer version_1: it is not a virtio 1.x device", n.cfg.Name)
	}
	if raw := n.ifc.Type() == tunbridge.TUN; raw != offered.Has(virtio.NetRawIP) {
		if raw {
			return f, fmt.Errorf("%s: this end is a tun device (raw IP), the host's a tap: give both ends the same --link", n.cfg.Name)
		}
		return f, fmt.Errorf("%s: this end is a tap device, the host's a tun (raw IP): give both ends the same --link", n.cfg.Name)
	}
	if enabled {
		f.Set(virtio.NetCtrlVQ) // the transport stands for it
	}
	f = virtio.WithoutOrphans(f)
	if enabled || !f.Has(virtio.NetMQ) {
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
	enabler, enabled := t.(driver.Enabler)
	acked, err := n.choose(offered, m.Near != m.Far, enabled)
	if err != nil {
		return err
	}
	// Before features are accepted (virtio 1.2, 3.1.1, step 4): which ones have room depends on it.
	cb, err := t.Config(0, virtio.NetConfigLen)
	if err != nil {
		return err
	}
	nc := virtio.DecodeNetConfig(cb)
	lay := bringUp{t: t, m: m, offers: 1, count: 1, enabled: enabled, hostMTU: int(nc.MTU)}
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
	for i := 0; enabled && i < 2*lay.count; i++ {
		if err := enabler.EnableQueue(i, true); err != nil {
			return err
		}
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
	if lay.hasCtrl() {
		n.loops.Add(1)
		go n.run(&request{n: n, lay: &lay}, notify)
	} else if lay.count > 1 {
		if err := n.use(lay.count); err != nil {
			n.Down()
			return err
		}
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

// mtu returns the MTU that the interface is to have: the operator's, lowered to the host's, or the
// host's.
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

// Reconfigure implements driver.Driver: it takes over a configuration that changed while the device
// runs: the link's state, the MAC. The MTU decides how large buffers are: a change of it takes
// effect with the next reset.
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
