package vhostuser

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/virtio"
)

// running brings a front end up to a pair that moves.
func running(t testing.TB, d *door, feat virtio.Features) *front {
	t.Helper()
	f := newFront(t, d.connect(t))
	f.negotiate(feat, allProto)
	f.setTable()
	for i := 0; i < 2; i++ {
		f.queue(i, feat)
		f.start(i, firstBase(feat))
		f.enable(i, 1)
	}
	return f
}

// TestRefused: each request that cannot be served is refused, the connection and its queues go on.
func TestRefused(t *testing.T) {
	feat := kinds[0].f
	e := newEcho(t, 1)
	d := newDoor(t, e)
	f := running(t, d, feat)
	move := func() error { _, err := e.echo(0); return err }
	f.trip(0, 10, 1, move)
	bell := f.qs[0].call.FD()
	file := memfd(t, mib)
	one := region{1 << 40, mib, 1 << 45, 0}
	long := make([]byte, 8+9*regionLen)
	native.PutUint32(long, 9)
	short := make([]byte, 8+regionLen)
	native.PutUint32(short, 2)
	moved := f.addr(0)
	native.PutUint64(moved[8:], userBase+0x1000)
	for _, c := range []struct {
		name    string
		req     Request
		payload []byte
		fds     []int
	}{
		{"features not offered", SetFeatures, encodeU64(1 << 33), nil},
		{"features in 4 bytes", SetFeatures, make([]byte, 4), nil},
		{"protocol features not offered", SetProtocolFeatures, encodeU64(1 << 5), nil},
		{"9 regions", SetMemTable, long, nil},
		{"2 regions in the room of one", SetMemTable, short, nil},
		{"an empty table message", SetMemTable, nil, nil},
		{"a region without a descriptor", SetMemTable, table([]region{one}), nil},
		{"a region with two", SetMemTable, table([]region{one}), []int{file, file}},
		{"a doorbell as memory", SetMemTable, table([]region{one}), []int{bell}},
		{"regions that overlap", SetMemTable, table([]region{one, one}), []int{file, file}},
		{"a region beyond its file", AddMemReg, slot(region{1 << 40, 2 * mib, 1 << 45, 0}), []int{file}},
		{"a region over another", AddMemReg, slot(region{guestBase + 4096, 4096, 1 << 45, 0}), []int{file}},
		{"a region of another file", AddMemReg, slot(f.regs[0]), []int{memfd(t, frontSize)}},
		{"more addresses than a connection may have", AddMemReg, slot(region{1 << 44, 1 << 42, 1 << 46, 0}), []int{memfd(t, 1<<42)}},
		{"a slot without a descriptor", AddMemReg, slot(one), nil},
		{"a slot with three", AddMemReg, slot(one), []int{file, file, file}},
		{"queue 2 of 2", SetVringNum, vringState{2, 64}.encode(), nil},
		{"the last queue number", SetVringBase, vringState{1<<32 - 1, 0}.encode(), nil},
		{"no descriptors", SetVringNum, vringState{0, 0}.encode(), nil},
		{"too many descriptors", SetVringNum, vringState{0, 512}.encode(), nil},
		{"another size while it runs", SetVringNum, vringState{0, 32}.encode(), nil},
		{"another base while it runs", SetVringBase, vringState{0, 5}.encode(), nil},
		{"other addresses while it runs", SetVringAddr, moved, nil},
		{"enabled by 2", SetVringEnable, vringState{0, 2}.encode(), nil},
		{"a kick without its descriptor", SetVringKick, encodeU64(0), nil},
		{"a call with two", SetVringCall, encodeU64(0), []int{bell, bell}},
		{"none that is one", SetVringErr, encodeU64(0 | noFD), []int{bell}},
		{"memory as a doorbell", SetVringKick, encodeU64(0), []int{file}},
		{"a doorbell of queue 9", SetVringCall, encodeU64(9), []int{bell}},
		{"a status of 9 bits", SetStatus, encodeU64(0x100), nil},
		{"an MTU of 67", NetSetMTU, encodeU64(67), nil},
		{"the log, which is not offered", SetLogBase, make([]byte, 16), []int{file}},
		{"an unknown request", 4711, make([]byte, 100), []int{file, file}},
		{"CONFIG, which was not negotiated", SetConfig, config{data: []byte{1}}.encode(), nil},
	} {
		if f.ask(c.req, c.payload, c.fds...) {
			t.Errorf("%s: %s was done", c.name, c.req)
		}
		if run, started, enabled := e.state(); !run || started != 3 || enabled != 3 {
			t.Fatalf("%s: running %v, started %#x, enabled %#x", c.name, run, started, enabled)
		}
	}
	f.trip(0, 100, 2, move)
	if n := openFDs(t, file); n != 1 || mapsOf(t, file) != 0 {
		t.Errorf("%d descriptors and %d mappings of what was refused", n, mapsOf(t, file))
	}
	n := d.n.load()
	if n["unknown"] != 3 || n["failed"] != 31 || n["descriptors_closed"] != 13 || n["connections"] != 1 {
		t.Errorf("%v", n)
	}
	// Unknown requests that want no answer are passed over.
	send(t, f.fd, encodeMessage(4712, flagVersion, nil))
	f.trip(0, 10, 3, move)
}

// TestClosed: what nobody can be told of ends the connection: a request without REPLY_ACK, a
// message that makes no sense. The device, the memory and the socket are free afterwards.
func TestClosed(t *testing.T) {
	e := newEcho(t, 1)
	d := newDoor(t, e)
	junk := encodeMessage(SetFeatures, 2, encodeU64(1))
	for i, c := range []struct {
		name  string
		bytes []byte
		want  string
	}{
		{"no acknowledgement wanted", encodeMessage(SetVringNum, flagVersion, vringState{7, 1}.encode()), "SET_VRING_NUM"},
		{"a base without a queue", encodeMessage(GetVringBase, flagVersion|flagNeedReply, vringState{7, 1}.encode()), "GET_VRING_BASE"},
		{"another version", junk, "SET_FEATURES"},
		{"64 KiB of zeros", make([]byte, 1<<16), "request 0"},
	} {
		f := running(t, d, kinds[0].f)
		f.trip(0, 10, byte(i), func() error { _, err := e.echo(0); return err })
		_ = unix.Sendmsg(f.fd, c.bytes, nil, nil, unix.MSG_NOSIGNAL)
		if _, _, _, err := f.recv(); err == nil {
			t.Errorf("%s: an answer", c.name)
		}
		eventually(t, c.name+": the memory is unmapped", func() bool { return mapsOf(t, f.file) == 1 })
		if run, started, _ := e.state(); run || started != 0 {
			t.Errorf("%s: running %v, started %#x", c.name, run, started)
		}
		if !d.log.has("the connection to the front end is closed link door0 error " + c.want) {
			t.Errorf("%s: the log says nothing of %s: %q", c.name, c.want, d.log.lines)
		}
	}
}

// TestBrokenQueue: a ring that makes no sense stops by itself; the front end is told by the err
// descriptor, and starts it anew.
func TestBrokenQueue(t *testing.T) {
	feat := kinds[0].f
	e := newEcho(t, 1)
	d := newDoor(t, e)
	f := running(t, d, feat)
	move := func() error { _, err := e.echo(0); return err }
	f.trip(0, 10, 1, move)
	bell := f.qs[1].kick // any descriptor of the front end's
	f.set(SetVringErr, encodeU64(1), bell.FD())
	bell.Ack()
	f.mem.Store16(ringRoom+0x2000+2, 9999) // the available index of queue 1
	_, err := e.echo(0)
	if err == nil {
		t.Fatal("the ring is not broken")
	}
	e.notify(device.Event{Broken: err, Queue: 1})
	eventually(t, "the queue stops", func() bool { _, started, _ := e.state(); return started == 1 })
	eventually(t, "the err descriptor is rung", func() bool { n, _ := bell.Ack(); return n == 1 })
	if run, _, _ := e.state(); run {
		t.Error("the device runs")
	}
	if s := f.getU64(GetStatus); s&uint64(virtio.StatusNeedsReset) == 0 {
		t.Errorf("status %#x", s)
	}
	if s := d.Status(); !strings.Contains(s.Devices[0].Status, "NEEDS_RESET") {
		t.Errorf("status %q", s.Devices[0].Status)
	}
	for i := 0; i < 2; i++ {
		f.stop(i)
		f.queue(i, feat)
		f.start(i, 0)
	}
	f.trip(0, 50, 2, move)
	if s := f.getU64(GetStatus); s != 0 {
		t.Errorf("status %#x", s)
	}
	if n := d.n.load(); n["queues_broken"] != 1 || n["connections"] != 1 {
		t.Errorf("%v", n)
	}
}

// TestInterfaceAway: queues that stop because of this side's interface go on by themselves.
func TestInterfaceAway(t *testing.T) {
	e := newEcho(t, 1)
	d := newDoor(t, e)
	f := running(t, d, kinds[0].f)
	move := func() error { _, err := e.echo(0); return err }
	f.trip(0, 10, 1, move)
	e.mu.Lock()
	e.startErr = errors.New("no interface yet")
	e.mu.Unlock()
	e.notify(device.Event{Broken: &device.Error{Cause: device.CauseEnd, Err: errors.New("gone")}, Queue: -1})
	eventually(t, "the queues stop", func() bool { return d.n.load()["queue_stops"] == 2 })
	eventually(t, "the device runs again", func() bool { run, _, _ := e.state(); return run })
	f.trip(0, 50, 2, move)
	if !d.log.has("no interface yet") {
		t.Error("the log does not say why")
	}
}

// TestWaitingRingBroken: what lies in one ring, when all are tried again, is no reason to end the connection or to refuse
// requests about others.
func TestWaitingRingBroken(t *testing.T) {
	e := newEcho(t, 2)
	d := newDoor(t, e)
	f := running(t, d, kinds[0].f)
	move := func() error { _, err := e.echo(0); return err }
	f.trip(0, 10, 1, move)
	bell := f.qs[1].kick
	f.set(SetVringErr, encodeU64(1), bell.FD())
	bell.Ack()
	f.mem.Store16(ringRoom+0x3000+2, f.mem.Load16(ringRoom+0x3000+2)+9999) // the used index of queue 1
	e.notify(device.Event{Broken: &device.Error{Cause: device.CauseEnd, Err: errors.New("gone")}, Queue: -1})
	eventually(t, "the err descriptor is rung", func() bool { n, _ := bell.Ack(); return n > 0 })
	eventually(t, "the other queue is started", func() bool { _, started, _ := e.state(); return started == 1 })
	f.enable(0, 0)
	f.enable(0, 1)
	f.stop(1)
	f.queue(1, kinds[0].f)
	f.start(1, 0)
	eventually(t, "the device runs again", func() bool { run, started, _ := e.state(); return run && started == 3 })
	if n := d.n.load(); n["queues_broken"] != 1 || n["connections"] != 1 || n["failed"] != 0 {
		t.Errorf("%v", n)
	}
}

// TestFeaturesRefusedTwice: front ends send the features for each queue pair; what the device refuses stays refused.
func TestFeaturesRefusedTwice(t *testing.T) {
	e := newEcho(t, 1)
	d := newDoor(t, e)
	f := running(t, d, kinds[0].f)
	e.mu.Lock()
	e.featErr = errors.New("not with this interface")
	e.mu.Unlock()
	v := encodeU64(virtio.FeaturesOf(virtio.Version1).Mask() | featProtocol)
	for i := 0; i < 2; i++ {
		if f.ask(SetFeatures, v) {
			t.Errorf("request %d: features that the device refuses are acknowledged", i)
		}
	}
	e.mu.Lock()
	e.featErr = nil
	e.mu.Unlock()
	f.set(SetFeatures, v)
}

// TestTruncated: memory that is truncated under the queues is an error of the connection, and of
// nothing else.
func TestTruncated(t *testing.T) {
	e := newEcho(t, 1)
	d := newDoor(t, e)
	f := running(t, d, kinds[0].f)
	f.trip(0, 10, 1, func() error { _, err := e.echo(0); return err })
	f.stop(0)
	if err := unix.Ftruncate(f.file, 0); err != nil {
		t.Fatal(err)
	}
	// The used index is read from memory that is not there any more.
	send(t, f.fd, encodeMessage(SetVringKick, flagVersion|flagNeedReply, encodeU64(0)), f.qs[0].kick.FD())
	if _, _, _, err := f.recv(); err == nil {
		t.Error("an answer")
	}
	eventually(t, "the memory is unmapped", func() bool { return mapsOf(t, f.file) == 1 })
	if n := d.n.load(); n["memory_faults"] != 1 {
		t.Errorf("%v", n)
	}
	f = running(t, d, kinds[0].f)
	f.trip(0, 10, 2, func() error { _, err := e.echo(0); return err })
}

// TestLegacy: a driver that does not accept VERSION_1 is told of once, with what to do, and can
// come back.
func TestLegacy(t *testing.T) {
	e := newEcho(t, 1)
	d := newDoor(t, e)
	f := newFront(t, d.connect(t))
	f.negotiate(virtio.Features{}, allProto)
	f.setTable()
	for i := 0; i < 2; i++ {
		f.queue(i, kinds[0].f)
		f.start(i, 0)
	}
	if _, started, _ := e.state(); started != 0 || d.log.count("disable-legacy=on") != 1 {
		t.Errorf("started %#x, log %q", started, d.log.lines)
	}
	f.set(SetFeatures, encodeU64(kinds[0].f.Mask()|featProtocol))
	for i := 0; i < 2; i++ {
		f.start(i, 0)
		f.enable(i, 1)
	}
	f.trip(0, 50, 2, func() error { _, err := e.echo(0); return err })
}

// TestNotOffered: protocol features that the operator has switched off are not there.
func TestNotOffered(t *testing.T) {
	d := newDoor(t, newEcho(t, 1))
	f := newFront(t, d.connect(t))
	if p := f.getU64(GetProtocolFeatures); p&(protoMemSlots|protoStatus) != protoMemSlots|protoStatus {
		t.Errorf("protocol features %#x", p)
	}
	d = &door{path: t.TempDir() + "/s", log: &testLog{}}
	d.Door = New(Config{Name: "door0", Spec: Spec{Path: d.path, FD: -1, NoSlots: true, NoStatus: true}, Device: newEcho(t, 1), Log: d.log})
	d.run(t)
	f = newFront(t, d.connect(t))
	if p := f.getU64(GetProtocolFeatures); p&(protoMemSlots|protoStatus) != 0 || p&protoReplyAck == 0 {
		t.Errorf("protocol features %#x", p)
	}
	f.negotiate(kinds[0].f, allProto&^(protoMemSlots|protoStatus))
	if f.ask(SetStatus, encodeU64(1)) {
		t.Error("SET_STATUS was taken")
	}
	f.setTable()
}

// TestSecondFrontEnd: one front end at a time; another one is turned away, and the first one goes
// on.
func TestSecondFrontEnd(t *testing.T) {
	e := newEcho(t, 1)
	d := newDoor(t, e)
	f := running(t, d, kinds[0].f)
	g := newFront(t, d.connect(t))
	if _, _, _, err := g.recv(); err != io.EOF {
		t.Errorf("the second one is answered: %v", err)
	}
	f.trip(0, 10, 1, func() error { _, err := e.echo(0); return err })
	if n := d.n.load(); n["refused"] != 1 || n["connections"] != 1 {
		t.Errorf("%v", n)
	}
}

// TestSilentFrontEnd: one that does not read its answers, or says nothing, keeps nobody from
// stopping.
func TestSilentFrontEnd(t *testing.T) {
	d := newDoor(t, newEcho(t, 1))
	fd := d.connect(t)
	unix.SetNonblock(fd, true)
	for i := 0; i < 100000; i++ {
		if err := unix.Sendmsg(fd, encodeMessage(GetFeatures, flagVersion, nil), nil, nil, 0); err != nil {
			break // both sockets are full, or the burst is used up
		}
	}
	start := time.Now()
	if err := d.stop(); err != nil {
		t.Fatal(err)
	}
	if time.Since(start) > 2*writeLimit {
		t.Errorf("it took %v", time.Since(start))
	}
}

// TestSockets: listening, connecting, a descriptor; and what is refused.
func TestSockets(t *testing.T) {
	e := newEcho(t, 1)
	d := newDoor(t, e)
	if st, err := os.Stat(d.path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
	if _, err := listen(d.path, 0); err == nil || !strings.Contains(err.Error(), "another program listens there") {
		t.Error(err)
	}
	d.stop()
	if _, err := os.Stat(d.path); !os.IsNotExist(err) {
		t.Errorf("the socket is still there: %v", err)
	}
	// A socket that a dead program left is replaced.
	old, err := listen(d.path, 0o660)
	if err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(d.path); err != nil || st.Mode().Perm() != 0o660 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
	old.UnixListener.Close()
	d.Door = New(Config{Name: "door0", Spec: Spec{Path: d.path, FD: -1}, Device: e, Log: d.log})
	d.run(t)
	move := func() error { _, err := e.echo(0); return err }
	running(t, d, kinds[0].f).trip(0, 10, 1, move)
	d.stop()
	os.WriteFile(d.path, nil, 0o600)
	var in *InputError
	if _, err := listen(d.path, 0); !errors.As(err, &in) || !strings.Contains(err.Error(), "is not a socket") {
		t.Error(err)
	}
	if _, _, err := inherited(memfd(t, 1)); !errors.As(err, &in) {
		t.Error(err)
	}

	// The front end listens, and this side connects, again after each end.
	path := t.TempDir() + "/front"
	c := &door{log: &testLog{}}
	c.Door = New(Config{Name: "door0", Spec: Spec{Path: path, FD: -1, Client: true}, Device: e, Log: c.log})
	c.run(t)
	l, err := listen(path, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for turn := byte(0); turn < 3; turn++ {
		conn, err := l.AcceptUnix()
		if err != nil {
			t.Fatal(err)
		}
		file, err := conn.File()
		conn.Close()
		if err != nil {
			t.Fatal(err)
		}
		unix.SetNonblock(int(file.Fd()), false)
		f := newFront(t, int(file.Fd()))
		f.negotiate(kinds[0].f, allProto)
		f.setTable()
		for i := 0; i < 2; i++ {
			f.queue(i, kinds[0].f)
			f.start(i, 0)
			f.enable(i, 1)
		}
		f.trip(0, 10, turn, move)
		file.Close()
	}
	c.stop()

	// A connected descriptor: its end ends Run.
	p, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	one := &door{log: &testLog{}}
	one.Door = New(Config{Name: "door0", Spec: Spec{FD: p[1]}, Device: e, Log: one.log})
	one.run(t)
	f := newFront(t, p[0])
	if f.getU64(GetFeatures) == 0 {
		t.Error("no features")
	}
	unix.Close(p[0])
	eventually(t, "Run ends", func() bool { return one.Status().State == stateStopped })
}

func TestParseSpec(t *testing.T) {
	for s, want := range map[string]Spec{
		"vhost-user:/run/x.sock":                     {Path: "/run/x.sock", FD: -1},
		"vhost-user:x,client":                        {Path: "x", FD: -1, Client: true},
		"vhost-user:/run/x,mode=0660,queues=4":       {Path: "/run/x", FD: -1, Mode: 0o660, Queues: 4},
		"vhost-user:fd=3":                            {FD: 3},
		"vhost-user:fd=0,queues=128":                 {FD: 0, Queues: 128},
		"vhost-user:/x,slots=off,status=off":         {Path: "/x", FD: -1, NoSlots: true, NoStatus: true},
		"vhost-user:fd=3,slots=on,status=on":         {FD: 3},
		"vhost-user:" + strings.Repeat("a", maxPath): {Path: strings.Repeat("a", maxPath), FD: -1},
	} {
		if got, err := ParseSpec(s); err != nil || got != want {
			t.Errorf("%s: %+v, %v", s, got, err)
		}
	}
	for _, s := range []string{"", "loopback:/x", "vhost-user:", "vhost-user:,client", "vhost-user:fd=", "vhost-user:fd=-1", "vhost-user:fd=x",
		"vhost-user:fd=3,client", "vhost-user:fd=3,mode=660", "vhost-user:/x,mode=888", "vhost-user:/x,mode=0", "vhost-user:/x,mode=1777", "vhost-user:/x,queues=0",
		"vhost-user:/x,queues=129", "vhost-user:/x,server", "vhost-user:/x,slots=no", "vhost-user:/x,status", "vhost-user:/x,", "vhost-user:/x,client,mode=660",
		"vhost-user:" + strings.Repeat("a", maxPath+1)} {
		if got, err := ParseSpec(s); err == nil || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: %+v, %v", s, got, err)
		}
	}
}

// FuzzConversation: any bytes, with any number of descriptors here and there, as a conversation
// with a back end: no panic, no access outside the memory, and at the end nothing is left open or
// mapped.
func FuzzConversation(f *testing.F) {
	add := func(ms ...[]byte) {
		var all []byte
		for _, m := range ms {
			all = append(all, m...)
		}
		f.Add(all)
	}
	state := func(r Request, i, n uint32) []byte {
		return encodeMessage(r, flagVersion|flagNeedReply, vringState{i, n}.encode())
	}
	u64 := func(r Request, v uint64) []byte { return encodeMessage(r, flagVersion|flagNeedReply, encodeU64(v)) }
	addr := make([]byte, vringAddrLen)
	native.PutUint64(addr[8:], userBase)
	native.PutUint64(addr[16:], userBase+0x3000)
	native.PutUint64(addr[24:], userBase+0x2000)
	add(u64(SetProtocolFeatures, allProto), u64(SetFeatures, featProtocol|1<<32), encodeMessage(SetMemTable, flagVersion, table([]region{{guestBase, mib, userBase, 0}})),
		state(SetVringNum, 0, 64), state(SetVringBase, 0, 0), encodeMessage(SetVringAddr, flagVersion, addr), u64(SetVringCall, 0), u64(SetVringKick, 0),
		state(SetVringEnable, 0, 1), state(GetVringBase, 0, 0))
	add(u64(SetProtocolFeatures, allProto), encodeMessage(AddMemReg, flagVersion, slot(region{guestBase, mib, userBase, 0})),
		encodeMessage(RemMemReg, flagVersion, slot(region{guestBase, mib, userBase, 0})), u64(SetStatus, 0), encodeMessage(ResetDevice, flagVersion, nil))
	logged := append([]byte(nil), addr...)
	native.PutUint32(logged[4:], logRing)
	native.PutUint64(logged[32:], guestBase+0x3000)
	add(u64(SetProtocolFeatures, logProto), u64(SetFeatures, featProtocol|1<<32), encodeMessage(SetMemTable, flagVersion, table([]region{{1 << 20, mib / 2, userBase, 0}})),
		state(SetVringNum, 0, 64), encodeMessage(SetVringAddr, flagVersion, addr), u64(SetVringKick, 0), state(SetVringEnable, 0, 1),
		encodeMessage(SetLogBase, flagVersion, logBase(4096, 0)), u64(SetFeatures, featProtocol|featLogAll|1<<32), encodeMessage(SetVringAddr, flagVersion|flagNeedReply, logged),
		encodeMessage(SetLogFD, flagVersion, nil), encodeMessage(SetLogBase, flagVersion, logBase(8192, 4096)), u64(SetFeatures, featProtocol|1<<32), state(GetVringBase, 0, 0))
	f.Fuzz(func(t *testing.T, b []byte) {
		n := new(counters)
		e := newEcho(t, 2)
		be := newBackend("fuzz", e, &testLog{}, n)
		be.places = newPlaces("fuzz", "", 4, &testLog{})
		defer be.places.close()
		file := memfd(t, mib)
		src := &pieces{b: b}
		r := &reader{src: src, n: n}
		for k := 0; k < 200; k++ {
			m, err := r.next()
			if err != nil {
				break
			}
			if be.answer != nil { // as the door does behind an answer
				be.heard(be.answer)
				be.answer = nil
			}
			// Descriptors as the message wants them, mostly.
			want := 0
			switch m.req {
			case SetMemTable:
				if len(m.payload) > 0 {
					want = int(m.payload[0] % 9)
				}
			case AddMemReg, SetVringKick, SetVringCall, SetVringErr, SetLogBase, SetLogFD:
				want = 1
			}
			if len(m.payload) > 0 && m.payload[len(m.payload)-1] == 0xff {
				want++
			}
			for i := 0; i < want; i++ {
				var fd int
				if m.req == SetMemTable || m.req == AddMemReg || m.req == SetLogBase {
					fd, err = unix.FcntlInt(uintptr(file), unix.F_DUPFD_CLOEXEC, 0)
				} else {
					fd, err = unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
				}
				if err != nil {
					t.Fatal(err)
				}
				m.fds = append(m.fds, fd)
			}
			reply, err := be.handle(m)
			if len(m.fds) != 0 {
				t.Fatal("descriptors are left")
			}
			if err != nil {
				if reply != nil {
					t.Fatal("an answer beside an error")
				}
				break
			}
			if reply != nil && (Request(native.Uint32(reply)) != m.req || len(reply) != headerLen+int(native.Uint32(reply[8:]))) {
				t.Fatalf("answer % x to %s", reply, m.req)
			}
			if _, err := e.echo(0); err != nil { // the ring is whatever the fuzzer put there
				if err := be.broke(device.Event{Broken: err, Queue: 1}); err != nil {
					break
				}
			}
			checkMemory(t, be, e)
			checkLogs(t, be, e)
		}
		if err := be.close(time.Time{}); err != nil {
			t.Fatal(err)
		}
		if n := openFDs(t, file); n != 1 || mapsOf(t, file) != 0 {
			t.Fatalf("%d descriptors and %d mappings are left", n, mapsOf(t, file))
		}
	})
}

// checkLogs holds the logs of all started queues to the one that is mapped, which covers what they mark.
func checkLogs(t testing.TB, b *backend, e *echo) {
	t.Helper()
	e.mu.Lock()
	defer e.mu.Unlock()
	for i := range e.queues {
		if l := e.queues[i].r.Log; e.queues[i].started && l.Bits != nil && (b.dirty == nil || l.Bits != b.dirty.bits) {
			t.Fatalf("queue %d marks in a log that is gone", i)
		}
	}
	if b.dirty != nil && b.dirty.bits.Outside() != 0 {
		t.Fatalf("%d marks outside the log", b.dirty.bits.Outside())
	}
}

// checkMemory holds the areas of all started queues to the memory that is mapped.
func checkMemory(t testing.TB, b *backend, e *echo) {
	t.Helper()
	e.mu.Lock()
	defer e.mu.Unlock()
	for i := range e.queues {
		if !e.queues[i].started {
			continue
		}
		for _, s := range []dma.Span{e.queues[i].r.Areas.Desc, e.queues[i].r.Areas.Driver, e.queues[i].r.Areas.Device} {
			ok := false
			ram, _ := s.RAM()
			for _, m := range b.mem.maps {
				whole, _ := m.mem.RAM()
				lo, hi := uintptr(whole.Pointer(0)), uintptr(whole.Pointer(0))+uintptr(m.size)
				if p := uintptr(ram.Pointer(0)); p >= lo && p+uintptr(s.Len) <= hi {
					ok = true
				}
			}
			if !ok {
				t.Fatalf("an area of queue %d lies in no mapping", i)
			}
		}
	}
	if got := fmt.Sprint(len(b.table.Load().Regions())); got != fmt.Sprint(len(b.mem.maps)) {
		t.Fatalf("%s regions in the table, %d mapped", got, len(b.mem.maps))
	}
}
