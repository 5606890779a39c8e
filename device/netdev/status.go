package netdev

import (
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/tunbridge"
	"github.com/boardlink/boardlink/virtio"
)

// Status implements device.Device.
func (n *Net) Status() status.Device {
	n.mu.Lock()
	defer n.mu.Unlock()
	s := status.Device{Name: n.cfg.Name, Type: "net", Number: n.cfg.Number,
		Interface: n.ifc.Name(), LinkType: n.ifc.Type().String(), MTU: n.ifc.MTU(), Carrier: n.carrier,
		Offload: tunbridge.DeviceOffload(n.acked.Mask()).String(),
		Offered: n.possible().Names(), Allowed: n.Features().Names(), Negotiated: n.acked.Names(),
		Pairs: n.inUse, MaxPairs: n.maxPairs(),
		Counters: map[string]uint64{"starts": n.starts, "broken": n.broken, "remade": uint64(n.ifc.Remakes())}}
	if len(n.pairs) > 1 {
		for k, v := range status.Counters(n.ctl.load()) {
			s.Counters[k] = v
		}
	}
	if n.ifc.Type() == tunbridge.TAP {
		s.MAC = n.ifc.MAC().String()
	}
	if n.lastErr != nil {
		s.LastError = n.lastErr.Error()
	}
	for i := range n.pairs {
		s.Queues = append(s.Queues, n.pairs[i].rx.describe(2*i, virtio.NetQueueName(2*i, len(n.pairs))),
			n.pairs[i].tx.describe(2*i+1, virtio.NetQueueName(2*i+1, len(n.pairs))))
	}
	if len(n.pairs) > 1 {
		s.Queues = append(s.Queues, n.ctrl.describe(virtio.NetQueueCtrl(n.maxPairs()), "ctrl"))
	}
	return s
}

func (q *netQueue) describe(index int, name string) status.Queue {
	qs := status.Queue{Index: index, Name: name, Ready: q.started, Size: q.size}
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
