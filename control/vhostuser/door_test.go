package vhostuser

import (
	"testing"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/virtio"
)

const allProto = protoMQ | protoReplyAck | protoMemSlots | protoResetDevice | protoStatus | protoMTU | protoRARP

// kinds are the rings that tests run over.
var kinds = []struct {
	name string
	f    virtio.Features
}{
	{"split", virtio.FeaturesOf(virtio.Version1, virtio.EventIdx, virtio.IndirectDesc)},
	{"split in order", virtio.FeaturesOf(virtio.Version1, virtio.InOrder)},
	{"packed", virtio.FeaturesOf(virtio.Version1, virtio.EventIdx, virtio.RingPacked)},
	{"packed in order", virtio.FeaturesOf(virtio.Version1, virtio.RingPacked, virtio.InOrder)},
}

// TestRoundTrips: messages with every byte checked, across stops and starts of the queues, and
// across a front end that goes and comes back.
func TestRoundTrips(t *testing.T) {
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			e := newEcho(t, 1)
			d := newDoor(t, e)
			f := newFront(t, d.connect(t))
			move := func() error { _, err := e.echo(0); return err }
			f.negotiate(k.f, allProto)
			f.setTable()
			base := [2]uint32{firstBase(k.f), firstBase(k.f)}
			for i := 0; i < 2; i++ {
				f.queue(i, k.f)
			}
			for turn := 0; turn < 4; turn++ {
				for i := 0; i < 2; i++ {
					f.start(i, base[i])
					f.enable(i, 1)
				}
				if running, _, _ := e.state(); !running {
					t.Fatal("the device does not run")
				}
				f.trip(0, 100+turn, byte(turn), move)
				for i := 0; i < 2; i++ {
					if n, err := f.qs[i].call.Ack(); n == 0 || err != nil {
						t.Errorf("queue %d was not called: %v", i, err)
					}
					base[i] = f.stop(i)
				}
				if running, started, _ := e.state(); running || started != 0 {
					t.Fatalf("after GET_VRING_BASE the device runs %v, queues %#x", running, started)
				}
			}
			// The front end goes, and a new connection goes on at its rings.
			unix.Shutdown(f.fd, unix.SHUT_RDWR)
			f.fd = d.connect(t)
			f.negotiate(k.f, allProto)
			f.setTable()
			for i := 0; i < 2; i++ {
				f.bells(i)
				f.start(i, base[i])
				f.enable(i, 1)
			}
			f.trip(0, 200, 77, move)
			if err := d.stop(); err != nil {
				t.Fatal(err)
			}
			if n := d.n.load(); n["queue_starts"] != 10 || n["failed"] != 0 || n["unknown"] != 0 || n["descriptors_closed"] != 0 || n["base_resent"] != 0 {
				t.Errorf("%v", n)
			}
			if n := openFDs(t, f.file); n != 1 {
				t.Errorf("%d descriptors of the memory are open, want 1", n)
			}
		})
	}
}

// TestCrash: a front end's rings go on where the used index says, after a back end that never
// answered GET_VRING_BASE.
func TestCrash(t *testing.T) {
	k := kinds[0]
	e := newEcho(t, 1)
	d := newDoor(t, e)
	f := newFront(t, d.connect(t))
	move := func() error { _, err := e.echo(0); return err }
	f.negotiate(k.f, allProto)
	f.setTable()
	for i := 0; i < 2; i++ {
		f.queue(i, k.f)
		f.start(i, 0)
		f.enable(i, 1)
	}
	f.trip(0, 70, 1, move)
	unix.Shutdown(f.fd, unix.SHUT_RDWR)
	f.fd = d.connect(t)
	f.negotiate(k.f, allProto)
	f.setTable()
	for i := 0; i < 2; i++ {
		f.bells(i)
		f.start(i, 75) // QEMU's guess may be an available index
		f.enable(i, 1)
		if n, _ := f.qs[i].call.Ack(); n != 1 {
			t.Errorf("the new call descriptor of queue %d was rung %d times, want once", i, n)
		}
	}
	f.trip(0, 70, 2, move)
	if n := d.n.load(); n["base_resent"] != 2 {
		t.Errorf("%v", n)
	}
}

// TestMemoryReplaced: regions come and go, by table and by slot, while rings run.
func TestMemoryReplaced(t *testing.T) {
	for _, k := range kinds[:3:3] {
		t.Run(k.name, func(t *testing.T) {
			e := newEcho(t, 1)
			d := newDoor(t, e)
			f := newFront(t, d.connect(t))
			move := func() error { _, err := e.echo(0); return err }
			f.negotiate(k.f, allProto)
			f.setTable()
			for i := 0; i < 2; i++ {
				f.queue(i, k.f)
				f.start(i, firstBase(k.f))
				f.enable(i, 1)
			}
			f.trip(0, 50, 1, move)
			maps := func() int { return mapsOf(t, f.file) } // of this test's own process, its own mapping too

			// The same table again keeps all mappings, and touches no queue.
			before := maps()
			changes, _ := e.count()
			changed := func() int { n, _ := e.count(); return n - changes }
			f.setTable()
			if maps() != before || changed() != 0 {
				t.Errorf("%d mappings and %d changes, want %d and none", maps(), changed(), before)
			}
			f.trip(0, 50, 2, move)

			// The same memory in other pieces: all is mapped anew, and the queues change over.
			f.regs = []region{{guestBase, mib, userBase, 0}, {guestBase + mib, frontSize - mib, userBase + 1<<37, mib}}
			f.setTable()
			if maps() != before || changed() != 2 {
				t.Errorf("%d mappings and %d changes, want %d and 2", maps(), changed(), before)
			}
			f.trip(0, 50, 3, move)

			// More memory, by a slot, twice, as QEMU does for two pairs; then less.
			more := region{1 << 40, mib, 1 << 45, 0}
			other := memfd(t, mib)
			for i := 0; i < 2; i++ {
				f.set(AddMemReg, slot(more), other)
			}
			if maps() != before || mapsOf(t, other) != 1 || changed() != 2 {
				t.Errorf("%d and %d mappings, %d changes", maps(), mapsOf(t, other), changed())
			}
			f.trip(0, 50, 4, move)
			for i := 0; i < 2; i++ {
				f.set(RemMemReg, slot(more))
			}
			if mapsOf(t, other) != 0 || changed() != 4 {
				t.Errorf("%d mappings of memory that was removed, %d changes", mapsOf(t, other), changed())
			}
			f.trip(0, 50, 5, move)

			// The memory of the rings goes, and comes back: the queues stop and go on.
			f.set(RemMemReg, slot(f.regs[0]))
			if running, started, _ := e.state(); running || started != 0 {
				t.Errorf("without the rings' memory the device runs %v, queues %#x", running, started)
			}
			f.set(AddMemReg, slot(f.regs[0]), f.file)
			f.trip(0, 50, 6, move)

			if n := d.n.load(); n["table_repeats"] != 2 || n["failed"] != 0 {
				t.Errorf("%v", n)
			}
			d.stop()
			if n := mapsOf(t, f.file); n != 1 {
				t.Errorf("%d mappings at the end, want the front end's own", n)
			}
		})
	}
}

// TestQueuePairs: pairs are enabled in any order; the device runs with the first one.
func TestQueuePairs(t *testing.T) {
	e := newEcho(t, 3)
	d := newDoor(t, e)
	f := newFront(t, d.connect(t))
	if got := f.getU64(GetFeatures); got&(1<<virtio.NetMQ) == 0 || got&(1<<virtio.NetCtrlVQ|1<<virtio.NetMAC) != 0 {
		t.Errorf("features %#x are offered", got)
	}
	if n := f.getU64(GetQueueNum); n != 3 {
		t.Errorf("GET_QUEUE_NUM: %d, want 3 pairs", n)
	}
	feat := kinds[0].f.Or(virtio.FeaturesOf(virtio.NetMQ))
	f.negotiate(feat, allProto)
	f.setTable()
	f.enable(4, 1) // before all else
	for i := 5; i >= 0; i-- {
		f.queue(i, feat)
		f.start(i, 0)
		if i != 4 {
			f.enable(i, 1)
		}
		if running, _, _ := e.state(); running != (i == 0) {
			t.Errorf("with queue %d the device runs: %v", i, running)
		}
	}
	for p := 0; p < 3; p++ {
		p := p
		f.trip(p, 60, byte(p), func() error { _, err := e.echo(p); return err })
	}
	f.enable(2, 0)
	f.enable(3, 0)
	if running, started, enabled := e.state(); !running || started != 0x3f || enabled != 0x33 {
		t.Errorf("running %v, started %#x, enabled %#x", running, started, enabled)
	}
	f.enable(1, 0)
	if running, _, _ := e.state(); running {
		t.Error("the device runs with its first pair disabled")
	}
	f.enable(1, 1)
	f.trip(0, 20, 9, func() error { _, err := e.echo(0); return err })
	if f.ask(SetVringNum, vringState{6, 64}.encode()) {
		t.Error("the control queue is the front end's, and was taken")
	}
}

// TestQEMU is the order of messages of QEMU 7.2: features and doorbells for each pair, STATUS
// before GET_VRING_BASE.
func TestQEMU(t *testing.T) {
	k := kinds[2]
	e := newEcho(t, 1)
	d := newDoor(t, e)
	f := newFront(t, d.connect(t))
	f.negotiate(k.f, allProto)
	if n := f.getU64(GetMaxMemSlots); n != maxSlots {
		t.Errorf("%d slots", n)
	}
	for i, r := range f.regs {
		for pairs := 0; pairs < 2; pairs++ {
			f.set(AddMemReg, slot(r), f.file)
		}
		_ = i
	}
	f.set(SetStatus, encodeU64(8))
	for i := 0; i < 2; i++ {
		f.queue(i, k.f)
		f.start(i, 0x80008000)
		f.set(SetFeatures, encodeU64(k.f.Mask()|featProtocol)) // for the next pair
		f.enable(i, 1)
	}
	f.set(SetStatus, encodeU64(0xf))
	move := func() error { _, err := e.echo(0); return err }
	f.trip(0, 100, 3, move)
	// The guest's driver masks an interrupt, and unmasks it: another descriptor, on a queue that
	// runs.
	bell := f.qs[0].call
	f.bells(0)
	f.set(SetVringCall, encodeU64(0), f.qs[0].call.FD())
	if n, _ := f.qs[0].call.Ack(); n != 1 {
		t.Errorf("the new descriptor was rung %d times, want once", n)
	}
	bell.Ack()
	f.trip(0, 100, 4, move)
	if n, _ := bell.Ack(); n != 0 {
		t.Errorf("the old descriptor was rung %d times", n)
	}
	f.set(SetVringCall, encodeU64(0|noFD))
	f.trip(0, 10, 5, move)
	f.set(SetVringKick, encodeU64(1|noFD))
	f.trip(0, 10, 5, move)

	f.set(SetStatus, encodeU64(0))
	if running, started, _ := e.state(); running || started != 0 {
		t.Errorf("status 0: running %v, queues %#x", running, started)
	}
	if s := f.getU64(GetStatus); s != 0 {
		t.Errorf("status %#x", s)
	}
	if _, runs := e.count(); runs != 1 {
		t.Errorf("the device was started %d times", runs)
	}
	for i := 0; i < 2; i++ {
		base := f.stop(i)
		if base>>16 != base&0xffff || base&0x7fff >= ringSize {
			t.Errorf("queue %d: base %#x", i, base)
		}
		f.start(i, base)
	}
	f.trip(0, 100, 6, move)

	f.set(NetSetMTU, encodeU64(1500))
	if f.ask(NetSetMTU, encodeU64(9000)) {
		t.Error("an MTU above the interface's was taken")
	}
	f.set(SendRARP, []byte{2, 0, 0, 0, 0, 7, 0, 0})
	if macs := e.announced(); len(macs) != 1 || macs[0] != [6]byte{2, 0, 0, 0, 0, 7} {
		t.Errorf("announced: % x", macs)
	}
	// One that comes before the device runs is repeated when it does.
	f.enable(0, 0)
	f.set(SendRARP, []byte{2, 0, 0, 0, 0, 8, 0, 0})
	if macs := e.announced(); len(macs) != 2 {
		t.Errorf("announced: % x", macs)
	}
	f.enable(0, 1)
	eventually(t, "the announcement is repeated", func() bool { macs := e.announced(); return len(macs) == 3 && macs[2] == [6]byte{2, 0, 0, 0, 0, 8} })
	f.enable(0, 0)
	f.enable(0, 1)
	f.set(ResetDevice, nil)
	if running, started, _ := e.state(); running || started != 0 {
		t.Errorf("RESET_DEVICE: running %v, queues %#x", running, started)
	}
	f.set(SetFeatures, encodeU64(k.f.Mask()|featProtocol))
	for i := 0; i < 2; i++ {
		f.queue(i, k.f)
		f.start(i, 0x8000) // DPDK's
		f.enable(i, 1)
	}
	f.trip(0, 100, 7, move)
}

// TestConfig: a device whose configuration space the back end serves.
func TestConfig(t *testing.T) {
	e := newEcho(t, 1)
	e.id, e.offer = virtio.IDConsole, virtio.FeaturesOf(virtio.Version1)
	d := newDoor(t, e)
	f := newFront(t, d.connect(t))
	f.negotiate(e.offer, protoReplyAck|protoConfig)
	f.set(SetConfig, config{offset: 4, data: []byte{1, 2, 3}}.encode())
	p := f.get(GetConfig, config{offset: 3, data: make([]byte, 5)}.encode())
	if want := (config{offset: 3, data: []byte{0, 1, 2, 3, 0}}).encode(); string(p) != string(want) {
		t.Errorf("% x, want % x", p, want)
	}
	p = f.get(GetConfig, config{offset: 8, data: make([]byte, 8)}.encode())
	if want := (config{offset: 8, data: append(append([]byte{}, e.config[8:]...), 0, 0, 0, 0)}).encode(); string(p) != string(want) {
		t.Errorf("a piece longer than the space: % x, want % x", p, want)
	}
	if p := f.get(GetConfig, config{offset: 13, data: make([]byte, 5)}.encode()); len(p) != 0 {
		t.Errorf("a piece beyond the end: % x", p)
	}
	if f.ask(SetConfig, config{offset: 12, data: []byte{1}}.encode()) {
		t.Error("a write beyond the end was taken")
	}
	if f.getU64(GetQueueNum) != 2 {
		t.Error("GET_QUEUE_NUM counts queues but for networks")
	}
}

// TestPackedBases: a packed ring stops and starts at each of its places, at both laps.
func TestPackedBases(t *testing.T) {
	k := kinds[2]
	e := newEcho(t, 1)
	d := newDoor(t, e)
	f := running(t, d, k.f)
	move := func() error { _, err := e.echo(0); return err }
	seen := map[uint32]bool{}
	for i := 0; i < 2*ringSize+3; i++ {
		f.trip(0, 1, byte(i), move)
		for q := 0; q < 2; q++ {
			base := f.stop(q)
			if q == 0 {
				seen[base] = true
			}
			f.start(q, base)
		}
	}
	if len(seen) != 2*ringSize || !seen[0] {
		t.Errorf("%d places, want all %d, 0 among them", len(seen), 2*ringSize)
	}
}
