package netdrv

import (
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/tunbridge"
	"github.com/boardlink/boardlink/virtio"
)

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
	if n.ctrl.q != nil && n.setUps > 1 {
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
