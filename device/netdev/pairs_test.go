package netdev

import (
	"testing"
	"time"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/vring"
)

// startAll starts n queues that nobody rings.
func (r *restartRig) startAll(n int) {
	r.t.Helper()
	for i := 0; i < n; i++ {
		r.startQuiet(i, vring.State{})
	}
}

func (r *restartRig) startQuiet(i int, s vring.State) {
	r.t.Helper()
	r.must(r.n.StartQueue(i, device.Resources{Size: ringSize, Areas: r.areas(i), Table: &r.table, Kick: doorbell.None, Call: board.Silent}, s))
}

// TestControlQueueRestarts: a driver that asks for queue pairs without end has to wait. The control queue stops all the same: a
// command that waits is neither carried out nor answered, and is once the queue goes on.
func TestControlQueueRestarts(t *testing.T) {
	t.Parallel()
	r := newPairsRig(t, 2, virtio.NetMQ, virtio.NetCtrlVQ)
	r.must(r.n.SetFeatures(r.features, device.Options{}))
	const ctrl, pairs = 4, 2
	local := &dma.Region{Name: "mine", Addr: base, Mem: mmio.FromBytes(r.mine), Access: dma.DeviceRead | dma.DeviceWrite}
	descLen, driverLen, deviceLen := vring.SplitSizes(ringSize)
	l := areasOf(ctrl)
	d, err := vring.NewSplitDriver(vring.Config{Name: "driver ctrl", Size: ringSize, Desc: dma.Span{Region: local, Off: l.desc, Len: uint32(descLen)},
		Driver: dma.Span{Region: local, Off: l.driver, Len: uint32(driverLen)}, Device: dma.Span{Region: local, Off: l.device, Len: uint32(deviceLen)}})
	r.must(err)
	// Commands 0, 1, 2 ask for 2, 1, 2 pairs and so on: each is a change.
	asked, answered := 0, 0
	ask := func() {
		at := txPart + uint64(asked)*64
		copy(r.mine[at:], []byte{4, 0, byte(pairs - asked%2), 0, 0xee})
		_, err := d.Add([]vring.Request{{Readable: 1, Token: uint32(asked), Bufs: []vring.Buffer{{Addr: base + dma.Addr(at), Len: 4}, {Addr: base + dma.Addr(at) + 4, Len: 1}}}})
		r.must(err)
		asked++
	}
	reap := func() {
		t.Helper()
		var done [ringSize]vring.Completion
		n, err := d.Reap(done[:])
		r.must(err)
		for _, c := range done[:n] {
			if ack := r.mine[txPart+uint64(c.Token)*64+4]; int(c.Token) != answered || ack != virtio.NetCtrlOK {
				t.Errorf("command %d is answered by %d, in place of %d", c.Token, ack, answered)
			}
			answered++
		}
	}
	r.startAll(ctrl + 1)
	r.must(r.n.SetRunning(true, soon()))
	ask()
	r.until("the first command is answered", func() bool { reap(); return answered == 1 })
	if s := r.n.Status(); s.Pairs != 2 {
		t.Errorf("%d pairs in use, 2 were asked for", s.Pairs)
	}
	for asked < controlBurst+3 {
		ask()
	}
	r.until("commands wait", func() bool { reap(); return answered >= controlBurst })
	for i := 0; i < 3; i++ {
		s, err := r.n.StopQueue(ctrl, soon())
		r.must(err)
		reap()
		if s.Err != nil || s.State.Avail != s.State.Used || int(s.State.Used) != answered {
			t.Fatalf("the control queue stops with %+v, %d commands are answered", s, answered)
		}
		for k := answered; k < asked; k++ {
			if ack := r.mine[txPart+uint64(k)*64+4]; ack != 0xee {
				t.Errorf("command %d is answered by %d while the queue stops", k, ack)
			}
		}
		r.startQuiet(ctrl, s.State)
	}
	r.until("all commands are answered", func() bool { reap(); return answered == asked })
	if s := r.n.Status(); s.Pairs != pairs-(asked-1)%2 || s.Counters["control_refused"] != 0 {
		t.Errorf("%d pairs in use after %d commands, %d refused", s.Pairs, asked, s.Counters["control_refused"])
	}
	r.must(r.n.Reset(soon()))
	r.check()
}

// TestPairsByEnabling: where somebody else serves the control queue, the pairs that are enabled are in use, and a device that pauses
// keeps those that it had.
func TestPairsByEnabling(t *testing.T) {
	t.Parallel()
	r := newPairsRig(t, 3, virtio.NetMQ)
	if err := r.n.SetFeatures(r.features, device.Options{}); err == nil {
		t.Error("several pairs are accepted without a control queue")
	}
	r.must(r.n.SetFeatures(r.features, device.Options{ControlElsewhere: true}))
	if q := r.n.Queue(6); q.Max != 0 {
		t.Errorf("there is a control queue: %+v", q)
	}
	enable := func(pair int, on bool) {
		t.Helper()
		for i := 2 * pair; i < 2*pair+2; i++ {
			r.must(r.n.EnableQueue(i, on, soon()))
		}
	}
	inUse := func(want int) {
		t.Helper()
		if got := r.n.Status().Pairs; got != want {
			t.Errorf("%d pairs in use, want %d", got, want)
		}
	}
	r.startAll(4)
	enable(0, true)
	r.must(r.n.SetRunning(true, time.Time{}))
	inUse(1)
	enable(1, true)
	inUse(2)
	enable(2, true) // is not started
	inUse(2)
	r.startQuiet(4, vring.State{})
	r.startQuiet(5, vring.State{})
	inUse(3)
	enable(1, false)
	inUse(1) // a pair behind a gap cannot be in use
	enable(1, true)
	inUse(3)
	for i := 0; i < 3; i++ {
		enable(i, false)
	}
	inUse(3)
	r.check()
}
