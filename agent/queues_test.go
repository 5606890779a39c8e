package agent_test

import (
	"strings"
	"testing"
	"time"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/virtiomsg"
	"github.com/boardlink/boardlink/vring"
)

// ctrl is the number of the control queue of a host that offers two pairs.
const ctrl = 4

// newQueuesRig is a rig with a host that offers several queue pairs, and an agent that wants two.
func newQueuesRig(t *testing.T, offered int, without ...virtio.Feature) *rig {
	return newRig(t, func(r *rig) {
		r.pairs = 2
		r.offered = r.offered.Or(virtio.FeaturesOf(virtio.NetMQ, virtio.NetCtrlVQ)).Without(virtio.FeaturesOf(without...))
		r.config.MaxQueuePairs = uint16(offered)
	})
}

// device is the host's end of the control queue, once the agent has set it up.
func (r *rig) device() vring.Device {
	r.t.Helper()
	p, ok := r.Link.Peer()
	if !ok {
		r.t.Fatal("no link")
	}
	var rs []dma.Region
	for _, d := range p.Regions {
		m, err := r.B.Window().Mem.Slice(d.Offset, d.Size)
		if err != nil {
			r.t.Fatal(err)
		}
		rs = append(rs, dma.Region{Name: "board", Addr: d.Addr, Mem: m, Access: d.Access, Across: true})
	}
	table, err := dma.NewTable(rs...)
	if err != nil {
		r.t.Fatal(err)
	}
	ref := new(dma.TableRef)
	ref.Store(table)
	q := r.queues[ctrl]
	area := func(addr uint64, n uint64) dma.Span {
		s, err := table.Translate(nil, dma.Addr(addr), uint32(n), 0)
		if err != nil || len(s) != 1 {
			r.t.Fatalf("area at %#x: %v", addr, err)
		}
		return s[0]
	}
	desc, driver, device := vring.SplitSizes(uint16(q.Size))
	d, err := vring.NewSplitDevice(vring.Config{Name: "ctrl", Size: uint16(q.Size), Desc: area(q.Desc, desc), Driver: area(q.Driver, driver),
		Device: area(q.Device, device), Table: ref, EventIdx: r.acked.Has(virtio.EventIdx)})
	if err != nil {
		r.t.Fatal(err)
	}
	return d
}

// command waits for the command of two pairs, and returns its chain.
func (r *rig) command(d vring.Device) (vring.Chain, dma.Span) {
	r.t.Helper()
	var b vring.Batch
	r.Until(20*time.Second, "a command comes", func() bool {
		n, err := d.Pop(&b, 1)
		if err != nil {
			r.t.Fatal(err)
		}
		return n == 1
	})
	c := b.Chains[0]
	var cmd [4]byte
	if c.Readable != 1 || c.Writable != 1 || c.ReadLen != 4 || c.WriteLen != 1 {
		r.t.Fatalf("chain %+v", c)
	}
	b.Spans[0].CopyOut(cmd[:], 0)
	if cmd != [4]byte{4, 0, 2, 0} {
		r.t.Fatalf("command % x", cmd)
	}
	return c, b.Spans[1]
}

func (r *rig) answer1(d vring.Device, ack byte) {
	r.t.Helper()
	c, s := r.command(d)
	s.CopyIn(0, []byte{ack})
	if err := d.Complete([]vring.Used{{ID: c.ID, Count: c.Count, Len: 1}}); err != nil {
		r.t.Fatal(err)
	}
	d.NeedCall()
}

func (r *rig) inUse(n int) bool { return r.dev().Pairs == n && r.ifc.InUse() == n && r.dev().Carrier }

// TestQueues: the agent sets up its pairs and uses one until the host has acknowledged them; again after each reset.
func TestQueues(t *testing.T) {
	t.Parallel()
	r := newQueuesRig(t, 2)
	for round := 0; round < 2; round++ {
		r.waitRunning()
		if !r.acked.Has(virtio.NetMQ) || !r.acked.Has(virtio.NetCtrlVQ) {
			t.Fatalf("accepted: %s", r.acked)
		}
		for i, q := range r.queues {
			if q.Size == 0 {
				t.Fatalf("queue %d is not set up", i)
			}
		}
		d := r.device()
		if !r.inUse(1) {
			t.Errorf("before the acknowledgement: %+v", r.dev())
		}
		r.answer1(d, virtio.NetCtrlOK)
		r.Until(20*time.Second, "two pairs are in use", func() bool { return r.inUse(2) })
		if round == 0 {
			running := r.running
			r.event(r.status | virtio.StatusNeedsReset)
			r.Until(20*time.Second, "the device is brought up anew", func() bool { return r.running > running })
		}
	}
	if r.Downs != 0 {
		t.Errorf("the link went down %d times", r.Downs)
	}
}

// TestQueuesRefused: a host that refuses, is late, or breaks the control queue.
func TestQueuesRefused(t *testing.T) {
	t.Parallel()
	t.Run("refused", func(t *testing.T) {
		t.Parallel()
		r := newQueuesRig(t, 2)
		r.waitRunning()
		r.answer1(r.device(), virtio.NetCtrlErr)
		r.Until(20*time.Second, "the agent says so", func() bool { return strings.Contains(r.dev().LastError, "refuses 2 queue pairs") })
		if !r.inUse(1) || r.running != 1 {
			t.Errorf("%+v", r.dev())
		}
	})
	t.Run("late", func(t *testing.T) {
		t.Parallel()
		r := newQueuesRig(t, 2)
		r.waitRunning()
		d := r.device()
		r.Until(20*time.Second, "the agent says so", func() bool { return strings.Contains(r.dev().LastError, "does not answer") })
		if !r.inUse(1) {
			t.Errorf("%+v", r.dev())
		}
		r.answer1(d, virtio.NetCtrlOK)
		r.Until(20*time.Second, "two pairs are in use", func() bool { return r.inUse(2) && r.dev().LastError == "" })
		if r.running != 1 || r.Downs != 0 {
			t.Errorf("brought up %d times, link down %d times", r.running, r.Downs)
		}
	})
	t.Run("broken", func(t *testing.T) {
		t.Parallel()
		r := newQueuesRig(t, 2)
		r.waitRunning()
		d := r.device()
		r.command(d)
		q := r.queues[ctrl]
		m := r.B.Window().Mem
		off := q.Device - uint64(r.B.Window().Addr)
		m.Store32(off+4, 7) // the used element's id: never in flight
		m.Store32(off+8, 1)
		broken, running := r.count("broken"), r.running
		m.Store16(off+2, 1) // used index
		r.Until(20*time.Second, "the agent resets the device", func() bool { return r.count("broken") > broken && r.running > running })
		r.answer1(r.device(), virtio.NetCtrlOK)
		r.Until(20*time.Second, "two pairs are in use", func() bool { return r.inUse(2) })
	})
}

// TestQueuesNegotiation: what a host offers decides.
func TestQueuesNegotiation(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name    string
		offered int
		without virtio.Feature
		several bool // features are accepted
	}{
		{"no control queue", 2, virtio.NetCtrlVQ, false},
		{"no MQ", 2, virtio.NetMQ, false},
		{"one pair", 1, virtio.RingReset, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			r := newQueuesRig(t, c.offered, c.without)
			r.waitRunning()
			if r.acked.Has(virtio.NetMQ) != c.several || r.acked.Has(virtio.NetCtrlVQ) != c.several {
				t.Errorf("accepted: %s", r.acked)
			}
			if r.queues[2] != (virtiomsg.VQueue{}) || r.queues[ctrl] != (virtiomsg.VQueue{}) || !r.inUse(1) {
				t.Errorf("queues %+v, %+v", r.queues, r.dev())
			}
		})
	}
	for _, n := range []int{0, virtio.NetPairsMax + 1} {
		r := newQueuesRig(t, n)
		r.Until(20*time.Second, "the agent fails", func() bool { return r.count("failures") >= 2 })
		if e := r.dev().LastError; !strings.Contains(e, "queue pairs") || r.dev().Carrier {
			t.Errorf("%d pairs offered: %q", n, e)
		}
		r.config.MaxQueuePairs = 1
		r.waitRunning()
	}
	// As many as there can be: the control queue is far off.
	r := newQueuesRig(t, virtio.NetPairsMax)
	asked := false
	r.answered = func(h virtiomsg.Header, m *virtiomsg.Slot) bool {
		if h.ID == virtiomsg.GetVQueue && !h.Bus() {
			var q virtiomsg.VQueue
			if q.DecodeResponse(m) == nil && q.Index == 2*virtio.NetPairsMax {
				asked = true
			}
		}
		return true
	}
	r.Until(20*time.Second, "the control queue's size is asked for", func() bool { return asked })
}
