package agent_test

import (
	"context"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/boardlink/boardlink/agent"
	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/board/testboard"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/driver"
	"github.com/boardlink/boardlink/driver/netdrv"
	"github.com/boardlink/boardlink/hwtest/peer"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/session"
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/trial/netns"
	"github.com/boardlink/boardlink/trial/netns/netnstest"
	"github.com/boardlink/boardlink/tunbridge"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/virtiomsg"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// unpaced is for tests that break things as fast as they can.
var unpaced = session.Pace{Messages: session.Rate{Every: 1, Burst: 1 << 20}, Breaks: session.Rate{Every: 1, Burst: 1 << 20},
	Starts: session.Rate{Every: 1, Burst: 1 << 20}, Changes: session.Rate{Every: 1, Burst: 1 << 20}}

const dev = 0

// rig is an agent that runs, with a tap device, against a host that the test plays.
type rig struct {
	*peer.Peer
	t    *testing.T
	link *agent.Link
	ifc  *tunbridge.Iface
	log  *peer.Log
	stop context.CancelFunc
	done chan error

	// The device that the host offers, as its messages see it.
	offered, acked virtio.Features
	config         virtio.NetConfig
	queueMax       uint32
	status         uint32
	queues         [5]virtiomsg.VQueue
	pairs          int // to use at most; 0: the default
	resets         int
	running        int // how often DRIVER_OK was set
	placement      string
	pace           session.Pace
	slots          uint32 // of the FIFOs; 0: as many as there is room for
	drivers        map[uint32]agent.Maker
	shares         int
	// answered, if set, changes an honest answer before it is sent; false sends none.
	answered func(h virtiomsg.Header, m *virtiomsg.Slot) bool
}

func newRig(t *testing.T, change func(*rig)) *rig {
	t.Helper()
	netnstest.Need(t)
	r := &rig{t: t, log: new(peer.Log), done: make(chan error, 1), queueMax: 64, placement: "window", pace: unpaced,
		offered: virtio.FeaturesOf(virtio.Version1, virtio.NetMTU, virtio.NetMAC, virtio.NetStatus, virtio.EventIdx, virtio.NetMrgRxbuf),
		config:  virtio.NetConfig{MAC: [6]byte{2, 0, 0, 0, 0, 9}, LinkUp: true, MaxQueuePairs: 1, MTU: 1400}}
	if change != nil {
		change(r)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the agent's log:\n%s", r.log)
		}
	})
	_, spec := peer.NewBoard(t, testboard.PairOptions{})
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	var n *netdrv.Net
	err = ns.Do(func() error {
		if n, err = netdrv.New(netdrv.Config{Name: "net0", Number: dev, Interface: tunbridge.Config{Name: "bl0"}, Queues: r.pairs, QueueSize: 64}); err != nil {
			return err
		}
		r.ifc = n.Interface()
		return r.ifc.SetUp(true)
	})
	if err != nil {
		t.Fatal(err)
	}
	r.link = agent.NewLink(agent.Config{Name: "a", Board: spec, Placement: r.placement, Devices: []driver.Driver{n}, Log: r.log,
		Beat: 10 * time.Millisecond, LostBeats: 200, Pace: r.pace, Slots: r.slots, Drivers: r.drivers, Shares: r.shares})
	ctx, cancel := context.WithCancel(context.Background())
	r.stop = cancel
	go func() { r.done <- r.link.Run(ctx) }()
	t.Cleanup(r.end)
	r.Peer = peer.New(t, spec, board.Host)
	r.Handle = r.handle
	return r
}

// end stops the agent: in time, and without an error, whatever the host did.
func (r *rig) end() {
	r.stop()
	select {
	case err := <-r.done:
		if err != nil {
			r.t.Errorf("the agent ends with %v", err)
		}
		r.done <- nil
	case <-time.After(8 * time.Second):
		panic("the agent does not end")
	}
}

func (r *rig) dev() status.Device       { return r.link.Status().Devices[0] }
func (r *rig) count(name string) uint64 { return r.link.Status().Counters[name] }

// handle answers as a good host does, but for answered.
func (r *rig) handle(h virtiomsg.Header, m *virtiomsg.Slot) bool {
	if h.Event() {
		return false
	}
	if !r.answer(h, m) {
		r.T.Errorf("the agent asks %v", h)
		return false
	}
	if r.answered == nil || r.answered(h, m) {
		r.Send(*m)
	}
	return true
}

func (r *rig) answer(h virtiomsg.Header, m *virtiomsg.Slot) bool {
	if h.Bus() {
		switch h.ID {
		case virtiomsg.BusGetDevices:
			off, count, _ := virtiomsg.DecodeGetDevices(m)
			d := virtiomsg.Devices{Offset: off, Count: count}
			d.Set(dev)
			d.Encode(m, h.Token)
			return true
		case virtiomsg.BusPing:
			data, _ := virtiomsg.DecodePing(m)
			virtiomsg.EncodePong(m, h.Token, data)
			return true
		}
		return false
	}
	switch h.ID {
	case virtiomsg.GetDeviceInfo:
		(&virtiomsg.DeviceInfo{DeviceID: virtio.IDNet, FeatureBits: 128, ConfigSize: virtio.NetConfigLen, MaxQueues: 2}).Encode(m, h.Dev, h.Token)
	case virtiomsg.GetDeviceFeatures:
		b := virtiomsg.BlocksOf(r.offered, 0, 4)
		b.EncodeResponse(m, h.Dev, h.Token)
	case virtiomsg.SetDriverFeatures:
		var b virtiomsg.FeatureBlocks
		var f virtio.Features
		if b.DecodeRequest(m) != nil || b.Store(&f) != nil {
			return false
		}
		r.acked = f
		virtiomsg.EncodeEmptyResponse(m, h.ID, h.Dev, h.Token)
	case virtiomsg.GetConfig:
		off, n, err := virtiomsg.DecodeGetConfig(m)
		if err != nil {
			return false
		}
		c := r.config.Encode()
		d := virtiomsg.ConfigData{Offset: off, Len: n}
		copy(d.Data[:n], c[off:])
		d.EncodeResponse(m, h.ID, h.Dev, h.Token)
	case virtiomsg.GetDeviceStatus:
		virtiomsg.EncodeStatus(m, h.ID, h.Dev, h.Token, r.status)
	case virtiomsg.SetDeviceStatus:
		s, err := virtiomsg.DecodeSetDeviceStatus(m)
		if err != nil {
			return false
		}
		if r.status = s; s == 0 {
			r.resets++
			r.queues = [5]virtiomsg.VQueue{}
		} else if s&virtio.StatusDriverOK != 0 && s&virtio.StatusFailed == 0 {
			r.running++
		}
		virtiomsg.EncodeStatus(m, h.ID, h.Dev, h.Token, s)
	case virtiomsg.GetVQueue:
		i, _ := virtiomsg.DecodeQueueRequest(m, h.ID)
		(&virtiomsg.VQueue{Index: i, MaxSize: r.queueMax}).EncodeResponse(m, h.Dev, h.Token)
	case virtiomsg.SetVQueue:
		var q virtiomsg.VQueue
		if q.DecodeRequest(m) != nil || int(q.Index) >= len(r.queues) && q.Index != 2*virtio.NetPairsMax {
			return false
		}
		if int(q.Index) < len(r.queues) {
			r.queues[q.Index] = q
		}
		virtiomsg.EncodeEmptyResponse(m, h.ID, h.Dev, h.Token)
	default:
		return false
	}
	return true
}

// waitRunning waits until the agent's device carries frames.
func (r *rig) waitRunning() {
	r.t.Helper()
	r.Until(12*time.Second, "the device comes up", func() bool { return r.Up && r.dev().Carrier && r.status&virtio.StatusDriverOK != 0 })
}

// event sends EVENT_CONFIG.
func (r *rig) event(s uint32) {
	var m virtiomsg.Slot
	(&virtiomsg.ConfigEvent{Status: s}).Encode(&m, dev)
	r.Send(m)
}

func TestWorks(t *testing.T) {
	r := newRig(t, nil)
	r.waitRunning()
	if r.ifc.MTU() != 1400 || r.ifc.MAC() != (tunbridge.MAC{2, 0, 0, 0, 0, 9}) {
		t.Errorf("MTU %d, MAC %v", r.ifc.MTU(), r.ifc.MAC())
	}
	if r.queues[0].Size != 64 || r.queues[1].Size != 64 || !r.acked.Has(virtio.EventIdx) {
		t.Errorf("queues %+v, features %s", r.queues, r.acked)
	}
	// A configuration that changes while the device runs.
	r.config.LinkUp = false
	r.event(r.status)
	r.Until(20*time.Second, "the carrier goes", func() bool { return !r.dev().Carrier })
	r.config.LinkUp, r.config.MAC = true, [6]byte{2, 0, 0, 0, 0, 7}
	r.event(r.status)
	r.Until(20*time.Second, "the carrier and a new MAC address come", func() bool { return r.dev().Carrier && r.ifc.MAC() == tunbridge.MAC{2, 0, 0, 0, 0, 7} })
	if r.running != 1 || r.Downs != 0 {
		t.Errorf("brought up %d times, link down %d times", r.running, r.Downs)
	}
}

// TestBadValues: a host that says what cannot be used. The agent tells why, tries again and again at a
// growing distance, and comes up as soon as it can.
func TestBadValues(t *testing.T) {
	set := func(id uint8, change func(m *virtiomsg.Slot)) func(*rig) {
		return func(r *rig) {
			r.answered = func(h virtiomsg.Header, m *virtiomsg.Slot) bool {
				if !h.Bus() && h.ID == id {
					change(m)
				}
				return true
			}
		}
	}
	status := func(add, remove uint32) func(*rig) {
		return func(r *rig) {
			r.answered = func(h virtiomsg.Header, m *virtiomsg.Slot) bool {
				if h.ID == virtiomsg.SetDeviceStatus && !h.Bus() {
					virtiomsg.EncodeStatus(m, h.ID, h.Dev, h.Token, r.status&^remove|add)
				}
				return true
			}
		}
	}
	byte0 := func(off int, v byte) func(m *virtiomsg.Slot) {
		return func(m *virtiomsg.Slot) { m[virtiomsg.HeaderSize+off] = v }
	}
	for _, c := range []struct {
		name, want string
		do         func(*rig)
	}{
		{"no version_1", "version_1", func(r *rig) { r.offered = virtio.FeaturesOf(virtio.NetMTU) }},
		{"raw IP", "--link", func(r *rig) { r.offered = virtio.FeaturesOf(virtio.Version1, virtio.NetRawIP) }},
		{"another device", "device id 2", set(virtiomsg.GetDeviceInfo, byte0(0, 2))},
		{"never reset", "does not reset", status(1, 0)},
		{"features refused", "refuses the features", status(0, virtio.StatusFeaturesOK)},
		{"does not start", "cannot start", status(0, virtio.StatusDriverOK)},
		{"broken all the time", "does not reset", status(virtio.StatusNeedsReset, 0)},
		{"no queue", "no such queue", func(r *rig) { r.queueMax = 0 }},
		{"queue of one", "no such queue", func(r *rig) { r.queueMax = 1 }},
		{"MTU", "MTU 10", func(r *rig) { r.config.MTU = 10 }},
		{"MAC of a group", "MAC address", func(r *rig) { r.config.MAC = [6]byte{3} }},
		{"no MAC", "MAC address", func(r *rig) { r.config.MAC = [6]byte{} }},
		{"no device", "offers no device", func(r *rig) {
			r.answered = func(h virtiomsg.Header, m *virtiomsg.Slot) bool {
				if h.Bus() && h.ID == virtiomsg.BusGetDevices {
					(&virtiomsg.Devices{Count: 8}).Encode(m, h.Token)
				}
				return true
			}
		}},
		{"short information", "bad message size", set(virtiomsg.GetDeviceInfo, func(m *virtiomsg.Slot) { m[6]-- })},
		{"short features", "bad message size", set(virtiomsg.GetDeviceFeatures, func(m *virtiomsg.Slot) { m[6]-- })},
		{"other configuration", "configuration", set(virtiomsg.GetConfig, byte0(4, 4))},
		{"long configuration", "length", set(virtiomsg.GetConfig, byte0(8, 200))},
		{"long status", "bad message size", set(virtiomsg.SetDeviceStatus, func(m *virtiomsg.Slot) { m[6] += 4 })},
		{"long answer of nothing", "bad message size", set(virtiomsg.SetVQueue, func(m *virtiomsg.Slot) { m[6] += 4 })},
		{"queue with reserved bits", "reserved", set(virtiomsg.GetVQueue, byte0(12, 1))},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t, nil)
			good := *r
			c.do(r)
			r.Until(20*time.Second, "the agent fails", func() bool { return r.count("failures") >= 3 })
			if e := r.dev().LastError; !strings.Contains(e, c.want) || !strings.Contains(r.log.String(), c.want) {
				t.Errorf("error %q, want %q in it; log:\n%s", e, c.want, r.log)
			}
			if n := strings.Count(r.log.String(), "WARN"); n != 1 {
				t.Errorf("%d warnings:\n%s", n, r.log)
			}
			if r.dev().Carrier {
				t.Error("the carrier is on")
			}
			r.answered, r.offered, r.config, r.queueMax = nil, good.offered, good.config, good.queueMax
			r.waitRunning()
			if r.Downs != 0 {
				t.Errorf("the link went down %d times", r.Downs)
			}
		})
	}
}

// TestBigQueues: a host may offer queues larger than any.
func TestBigQueues(t *testing.T) {
	r := newRig(t, func(r *rig) { r.queueMax = 1<<32 - 1 })
	r.waitRunning()
	if r.queues[0].Size != 64 {
		t.Errorf("size %d", r.queues[0].Size)
	}
}

// TestPool: host memory that this board does not reach, or not for both ways, is left alone: everything goes into
// the window.
func TestPool(t *testing.T) {
	const bus, size = 0x100000000, 1 << 20 // of the test board's pool
	good := virtiomsg.PoolRegion{Link: 0x7f0000000000, Size: size, Bus: bus, Access: dma.DeviceRead | dma.DeviceWrite}
	for _, c := range []struct {
		name   string
		push   bool
		change func(p *virtiomsg.PoolRegion)
	}{
		{"good", true, func(p *virtiomsg.PoolRegion) {}},
		{"a part", true, func(p *virtiomsg.PoolRegion) { p.Bus, p.Size = bus+4096, size/2 }},
		{"below", false, func(p *virtiomsg.PoolRegion) { p.Bus = bus - 64 }},
		{"far below", false, func(p *virtiomsg.PoolRegion) { p.Bus = 0 }},
		{"behind", false, func(p *virtiomsg.PoolRegion) { p.Bus = bus + size }},
		{"longer", false, func(p *virtiomsg.PoolRegion) { p.Size = size + 64 }},
		{"far longer", false, func(p *virtiomsg.PoolRegion) { p.Size = 1 << 62 }},
		{"at the end of the world", false, func(p *virtiomsg.PoolRegion) { p.Bus = 1<<64 - 128; p.Size = 64 }},
		{"to read only", false, func(p *virtiomsg.PoolRegion) { p.Access = dma.DeviceRead }},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t, func(r *rig) { r.placement = "auto" })
			p := good
			c.change(&p)
			d := r.Declared
			d.Pool = []virtiomsg.PoolRegion{p}
			r.Redeclare(d)
			r.waitRunning()
			in := r.queues[0].Desc >= uint64(p.Link)
			if in != c.push || (r.link.Status().Placement == "push") != c.push {
				t.Errorf("descriptor area at %#x, placement %s", r.queues[0].Desc, r.link.Status().Placement)
			}
			if !c.push && !strings.Contains(r.log.String(), "pool") {
				t.Error("nothing is said of it")
			}
		})
	}
	// Too small for anything: the device cannot come up, and says so.
	r := newRig(t, func(r *rig) { r.placement = "auto" })
	d := r.Declared
	p := good
	p.Size = 64
	d.Pool = []virtiomsg.PoolRegion{p}
	r.Redeclare(d)
	r.Until(20*time.Second, "the agent fails", func() bool { return r.count("failures") >= 2 })
	if e := r.dev().LastError; !strings.Contains(e, "pool") {
		t.Errorf("error %q", e)
	}
}

// TestResetStorm: a host that asks for a reset as soon as the device runs, and tells of a new device all
// the time, gets fewer and fewer attempts.
func TestResetStorm(t *testing.T) {
	t.Parallel()
	r := newRig(t, nil)
	r.waitRunning()
	var m virtiomsg.Slot
	(&virtiomsg.DeviceEvent{Dev: dev, State: virtiomsg.DeviceReady}).Encode(&m)
	running, events, begin, last := r.running, 0, time.Now(), time.Now()
	for r.running-running < 3 || time.Since(begin) < 1500*time.Millisecond {
		if time.Since(begin) > 20*time.Second {
			t.Fatalf("brought up %d times", r.running-running)
		}
		r.Step()
		if r.status&virtio.StatusDriverOK != 0 {
			r.event(r.status | virtio.StatusNeedsReset)
		}
		if time.Since(last) > 100*time.Millisecond {
			r.Send(m) // asks for an attempt soon, ten times a second
			events++
			last = time.Now()
		}
	}
	// By itself it waits 50, 100, 200 ... ms, up to 5 s; each event allows one attempt more.
	most := events + 1
	for wait, d := time.Duration(0), 50*time.Millisecond; wait <= time.Since(begin); d *= 2 {
		if most++; d > 5*time.Second {
			d = 5 * time.Second
		}
		wait += d
	}
	if n := r.running - running; n > most {
		t.Errorf("brought up %d times in %v, with %d events: at most %d", n, time.Since(begin), events, most)
	}
	if n := r.count("host_reset"); n < 3 {
		t.Errorf("%d resets counted", n)
	}
	r.Until(20*time.Second, "the device comes up again", func() bool {
		if time.Since(last) > 100*time.Millisecond { // its own next attempt may be 5 s away
			r.Send(m)
			last = time.Now()
		}
		return r.dev().Carrier && r.status == virtio.StatusAcknowledge|virtio.StatusDriver|virtio.StatusFeaturesOK|virtio.StatusDriverOK
	})
	if r.Downs != 0 {
		t.Errorf("the link went down %d times", r.Downs)
	}
}

// TestNonsenseEvents: what an event can say wrong. What makes no sense resets the link; what means nothing
// here is ignored.
func TestNonsenseEvents(t *testing.T) {
	r := newRig(t, nil)
	slot := func(bytes ...byte) (m virtiomsg.Slot) { copy(m[:], bytes); return m }
	encode := func(f func(m *virtiomsg.Slot)) (m virtiomsg.Slot) { f(&m); return m }
	for _, c := range []struct {
		name   string
		m      virtiomsg.Slot
		resets bool
	}{
		{"config, short", slot(0, 0x40, 0, 0, 0, 0, 12, 0), true},
		{"config, length", slot(0, 0x40, 0, 0, 0, 0, 24, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4), true},
		{"config, token", slot(0, 0x40, 0, 0, 1, 0, 24, 0), true},
		{"config, response", slot(1, 0x40, 0, 0, 0, 0, 24, 0), true},
		{"size 0", slot(0, 0x42, 0, 0, 0, 0, 0, 0), true},
		{"device, long", slot(2, 0x40, 0, 0, 0, 0, 16, 0), true},
		{"ping, short", slot(2, 3, 0, 0, 1, 0, 8, 0), true},
		{"config of another device", encode(func(m *virtiomsg.Slot) { (&virtiomsg.ConfigEvent{Status: 64}).Encode(m, 99) }), false},
		{"used", slot(0, 0x42, 0, 0, 0, 0, 12, 0), false},
		{"unknown", slot(0, 0x7f, 0, 0, 0, 0, 64, 0), false},
		{"unknown of the bus", slot(2, 0x7f, 0, 0, 0, 0, 64, 0), false},
		{"unknown request", slot(0, 0x3f, 0, 0, 1, 0, 8, 0), false},
		{"a driver's request", encode(func(m *virtiomsg.Slot) { virtiomsg.EncodeSetDeviceStatus(m, dev, 1, 0) }), false},
		{"another device came", encode(func(m *virtiomsg.Slot) { (&virtiomsg.DeviceEvent{Dev: 9, State: 1}).Encode(m) }), false},
		{"device in a state of its own", encode(func(m *virtiomsg.Slot) { (&virtiomsg.DeviceEvent{Dev: dev, State: 0x9000}).Encode(m) }), false},
		{"an answer to nobody", slot(1, 7, 0, 0, 200, 200, 12, 0), false},
	} {
		t.Run(c.name, func(t *testing.T) {
			r.T, r.t = t, t
			r.waitRunning()
			downs, received := r.Downs, r.count("link_received")
			r.Send(c.m)
			if c.resets {
				r.Until(20*time.Second, "the link is reset", func() bool { return r.Downs > downs })
			} else {
				r.Until(20*time.Second, "the agent takes it", func() bool { return r.count("link_received") > received })
				r.For(5 * time.Millisecond)
				if r.Downs != downs || !r.dev().Carrier {
					t.Errorf("the link went down %d times, carrier %v", r.Downs-downs, r.dev().Carrier)
				}
			}
		})
	}
	r.T, r.t = t, t
	r.waitRunning()
	// A device that goes and comes back.
	running := r.running
	r.Send(encode(func(m *virtiomsg.Slot) { (&virtiomsg.DeviceEvent{Dev: dev, State: virtiomsg.DeviceRemoved}).Encode(m) }))
	r.Until(20*time.Second, "the device is brought up again", func() bool { return r.running > running })
	r.waitRunning()
}

// TestSilence: requests without an answer reset the link after a while; late answers are counted and
// dropped.
func TestSilence(t *testing.T) {
	t.Parallel()
	r := newRig(t, nil)
	var late []virtiomsg.Slot
	r.answered = func(h virtiomsg.Header, m *virtiomsg.Slot) bool {
		late = append(late, *m)
		return false
	}
	r.Until(8*time.Second, "the link is reset", func() bool { return r.Downs > 0 })
	if n := r.count("call_timeout"); n != 1 {
		t.Errorf("%d time-outs", n)
	}
	r.WaitUp()
	for _, m := range late[:1] { // of before the reset
		r.Send(m)
	}
	r.Until(20*time.Second, "a late answer is counted", func() bool { return r.count("unexpected") > 0 })
	if n := r.count("failures"); n != 1 {
		t.Errorf("%d failures", n)
	}
	r.answered = nil
	r.waitRunning()

	// Silence about a configuration that changed.
	downs := r.Downs
	r.answered = func(h virtiomsg.Header, m *virtiomsg.Slot) bool { return h.ID != virtiomsg.GetConfig }
	r.event(r.status)
	r.Until(8*time.Second, "the link is reset", func() bool { return r.Downs > downs })
	r.answered = nil
	r.waitRunning()
}

// TestWrongTokens: answers to something else are no answers.
func TestWrongTokens(t *testing.T) {
	r := newRig(t, nil)
	n := 0
	r.answered = func(h virtiomsg.Header, m *virtiomsg.Slot) bool {
		wrong := *m
		wrong[4]++
		r.Send(wrong)
		wrong = *m
		wrong[2]++ // device, or no message of the bus
		if h.Bus() {
			wrong[1]++
			wrong[2]--
		}
		r.Send(wrong)
		n += 2
		return true
	}
	r.waitRunning()
	r.Until(20*time.Second, "they are counted", func() bool { return r.count("unexpected") == uint64(n) })
	if r.Downs != 0 || r.running != 1 {
		t.Errorf("down %d times, brought up %d times", r.Downs, r.running)
	}
}

// TestFlood: a host that sends without end, instead of an answer, or besides.
func TestFlood(t *testing.T) {
	r := newRig(t, nil)
	flooding := true
	var ev virtiomsg.Slot
	(&virtiomsg.ConfigEvent{}).Encode(&ev, dev)
	r.answered = func(h virtiomsg.Header, m *virtiomsg.Slot) bool { return !flooding }
	var req virtiomsg.Slot
	for end := time.Now().Add(5 * time.Second); r.count("floods") == 0; {
		virtiomsg.EncodeGetDeviceStatus(&req, dev, r.Token())
		if r.Link.Send(&req) != nil {
			r.Step()
		}
		if time.Now().After(end) {
			t.Fatal("a flood without an answer does not reset the link")
		}
	}
	flooding = false
	r.waitRunning()

	// With answers: the agent asks for the configuration again and again, and lives.
	ticks, lines, sent := r.count("link_ticks"), r.log.Lines(), 0
	// Half a second, or as long as a busy machine takes for ten beats of the agent's clock.
	for begin := time.Now(); time.Since(begin) < 500*time.Millisecond || r.count("link_ticks")-ticks < 10; sent++ {
		if r.Link.Send(&ev) != nil {
			r.Step()
		}
		if time.Since(begin) > 20*time.Second {
			t.Fatalf("the agent's clock moved %d times in 20 s of %d messages", r.count("link_ticks")-ticks, sent)
		}
	}
	if n := r.log.Lines() - lines; n > 60 {
		t.Errorf("%d lines of log", n)
	}
	r.waitRunning()

	// Answers that nobody asked for.
	m := virtiomsg.Slot{}
	virtiomsg.EncodeStatus(&m, virtiomsg.GetDeviceStatus, dev, 0x7777, 0)
	ticks = r.count("link_ticks")
	for begin := time.Now(); time.Since(begin) < 300*time.Millisecond || r.count("link_ticks")-ticks < 5; {
		if r.Link.Send(&m) != nil {
			r.Step()
		}
		if time.Since(begin) > 20*time.Second {
			t.Fatalf("the agent's clock moved %d times in 20 s", r.count("link_ticks")-ticks)
		}
	}
	r.waitRunning()

	// A FIFO that is never drained: the agent's requests stop fitting, and it goes on trying.
	stop := make(chan struct{})
	flooded := make(chan struct{})
	go func() {
		defer close(flooded)
		for {
			select {
			case <-stop:
				return
			default:
				var m virtiomsg.Slot
				virtiomsg.EncodePing(&m, 1, 1) // asks for an answer
				r.Mute = true
				r.Link.Send(&m)
				r.Step()
			}
		}
	}()
	time.Sleep(300 * time.Millisecond)
	r.end()
	close(stop)
	<-flooded
}

// TestUsedErrors returns what is no buffer: the agent takes the device down, resets it, and goes on.
func TestUsedErrors(t *testing.T) {
	for _, c := range []struct {
		name, want string
		id, n      uint32
		idx        uint16
	}{
		{"id out of range", "not in flight", 64, 100, 1},
		{"id by far", "not in flight", 1<<32 - 1, 100, 1},
		{"length", "length", 0, 1<<32 - 1, 1},
		{"index jumps", "index jumps", 0, 100, 65},
		{"index goes back", "index jumps", 0, 100, 0xffff},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t, nil)
			r.waitRunning()
			resets := r.resets
			w := r.B.Window()
			const base = 0x80000000 // the test board's bus address
			off := r.queues[0].Device - base
			w.Mem.Store32(off+4, c.id)
			w.Mem.Store32(off+8, c.n)
			w.Mem.Barrier(mmio.WriteBarrier)
			w.Mem.Store16(off+2, c.idx)
			r.Ring(dev, 0)
			r.Until(20*time.Second, "the agent finds it", func() bool { return r.count("broken") == 1 })
			r.Until(20*time.Second, "the device is reset", func() bool { return r.resets > resets })
			r.waitRunning()
			if !strings.Contains(r.log.String(), c.want) {
				t.Errorf("the log does not tell of %q:\n%s", c.want, r.log)
			}
			if r.Downs != 0 {
				t.Errorf("the link went down %d times", r.Downs)
			}
		})
	}
}

// TestReceived returns buffers with nonsense in them, and short ones: the frames are dropped, the ring goes on.
func TestReceived(t *testing.T) {
	r := newRig(t, nil)
	r.waitRunning()
	seed := rand.Uint64()
	rnd := rand.New(rand.NewPCG(seed, 0))
	t.Logf("seed %#x", seed)
	w := r.B.Window()
	const base = 0x80000000
	q := r.queues[0]
	used := uint16(0)
	sent := 0
	for end := time.Now().Add(500 * time.Millisecond); time.Now().Before(end); {
		r.Step()
		if !r.dev().Carrier || r.status&virtio.StatusDriverOK == 0 || r.queues[0] != q {
			q, used = r.queues[0], 0
			continue
		}
		// The available ring tells which buffers there are.
		avail := w.Mem.Load16(q.Driver - base + 2)
		if avail == used {
			continue
		}
		head := w.Mem.Load16(q.Driver - base + 4 + 2*uint64(used%uint16(q.Size)))
		desc := q.Desc - base + 16*uint64(head)
		addr, n := w.Mem.Load64(desc), w.Mem.Load32(desc+8)
		b := make([]byte, min(200, n))
		for i := range b {
			b[i] = byte(rnd.Uint32())
		}
		if rnd.IntN(30) > 0 { // a header that makes sense, mostly
			copy(b, make([]byte, 12))
			b[10] = 1 // num_buffers
			b[0], b[1] = byte(rnd.IntN(4)), byte(rnd.IntN(6))
		}
		w.Mem.CopyIn(addr-base, b)
		off := q.Device - base + 4 + 8*uint64(used%uint16(q.Size))
		w.Mem.Store32(off, uint32(head))
		w.Mem.Store32(off+4, uint32(len(b))-rnd.Uint32N(uint32(len(b)))/uint32(1+rnd.IntN(100)))
		w.Mem.Barrier(mmio.WriteBarrier)
		used++
		w.Mem.Store16(q.Device-base+2, used)
		r.Ring(dev, 0)
		sent++
		if rnd.IntN(50) == 0 {
			r.For(time.Millisecond)
		}
	}
	d := r.dev()
	t.Logf("%d buffers, pump %v, broken %d, error %q", sent, d.Queues[0].Pump, r.count("broken"), d.LastError)
	if sent == 0 {
		t.Error("nothing was sent")
	}
	r.waitRunning()
}

// TestLinkPage: a host that scribbles over its half of the link page, and changes its epoch without end.
func TestLinkPage(t *testing.T) {
	r := newRig(t, nil)
	r.waitRunning()
	mem := r.B.Window().Mem
	ticks, lines := r.count("link_ticks"), r.log.Lines()
	// On a machine that is busy the clock takes longer.
	for end := time.Now().Add(300 * time.Millisecond); time.Now().Before(end) ||
		r.count("link_ticks")-ticks < 5 && time.Since(end) < 20*time.Second; {
		off := 0x800 + rand.Uint64N(0x200)&^3
		if rand.IntN(4) > 0 {
			off = 0x840 // the epoch
		}
		mem.Store32(off, rand.Uint32())
	}
	if n := r.count("link_ticks") - ticks; n < 5 {
		t.Errorf("the agent's clock moved %d times", n)
	}
	if n := r.log.Lines() - lines; n > 60 {
		t.Errorf("%d lines of log", n)
	}
	r.B.Close()
	again := peer.New(t, r.link.Status().Board, board.Host)
	again.Handle = r.handle
	r.Peer = again
	r.waitRunning()
}
