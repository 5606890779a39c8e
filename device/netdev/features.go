package netdev

import (
	"fmt"

	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/tunbridge"
	"github.com/boardlink/boardlink/virtio"
)

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
	if len(n.pairs) > 1 {
		f.Set(virtio.NetMQ)
		f.Set(virtio.NetCtrlVQ)
	}
	return f.Or(virtio.FeaturesFromMask(tunbridge.OffloadFeatures(n.ifc.OffloadSupported())))
}

// Features implements device.Device: what is possible and not denied. Bits that depend on
// a denied one are left out too (virtio 1.2, 5.1.3.1).
func (n *Net) Features() virtio.Features {
	f := virtio.WithoutOrphans(n.possible().Without(n.cfg.Deny))
	if !f.Has(virtio.NetMQ) {
		f.Clear(virtio.NetCtrlVQ) // the number of pairs is all that it is for here
	}
	return f
}

// maxPairs returns max_virtqueue_pairs.
func (n *Net) maxPairs() int {
	if n.Features().Has(virtio.NetMQ) {
		return len(n.pairs)
	}
	return 1
}

// SetFeatures implements device.Device.
func (n *Net) SetFeatures(f virtio.Features, o device.Options) error {
	if bad := f.Without(n.Features()); bad != (virtio.Features{}) {
		return fmt.Errorf("%s: the driver accepts what was not offered: %s", n.cfg.Name, bad)
	}
	if !f.Has(virtio.Version1) {
		return fmt.Errorf("%s: the driver does not accept version_1: legacy drivers are not served", n.cfg.Name)
	}
	if raw := n.ifc.Type() == tunbridge.TUN; f.Has(virtio.NetRawIP) != raw {
		return fmt.Errorf("%s: this end is a tun device (raw IP), the board's a tap: give both ends the same --link", n.cfg.Name)
	}
	whole := f
	if o.ControlElsewhere && f.Has(virtio.NetMQ) {
		whole.Set(virtio.NetCtrlVQ)
	}
	if err := virtio.CheckNet(whole); err != nil {
		return fmt.Errorf("%s: the driver accepts %w", n.cfg.Name, err)
	}
	n.ops.Lock()
	defer n.ops.Unlock()
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.anyStarted() {
		return fmt.Errorf("%s: features written: %w", n.cfg.Name, device.ErrStarted)
	}
	n.acked, n.options = f, o
	return nil
}

// anyStarted tells whether a queue is started. mu is held.
func (n *Net) anyStarted() bool {
	for i := range n.pairs {
		if n.pairs[i].rx.started || n.pairs[i].tx.started {
			return true
		}
	}
	return n.ctrl.started
}

// Config implements device.Device.
func (n *Net) Config() []byte {
	l := n.linkState()
	b := virtio.NetConfig{MAC: [6]byte(n.cfg.BoardMAC), LinkUp: l.up, MaxQueuePairs: uint16(n.maxPairs()), MTU: uint16(l.mtu)}.Encode()
	return b[:]
}

// Queues implements device.Device: those of all pairs, and the control queue where there are several.
func (n *Net) Queues() int {
	if m := n.maxPairs(); m > 1 {
		return virtio.NetQueueCtrl(m) + 1
	}
	return 2
}
