package vhostuser

import (
	"bytes"
	"errors"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/virtio"
)

// fake is a back end that answers as a test has it.
type fake struct {
	t     testing.TB
	path  string
	feat  uint64
	proto uint64
	pairs uint64
	// answer may change what is written for a request; nil: nothing is.
	answer func(m *message, usual []byte) (bytes []byte, fds []int)

	mu    sync.Mutex
	seen  []Request
	last  map[Request][]byte // payloads
	fds   map[Request]int    // descriptors that came last with a request, duplicated
	conn  *net.UnixConn
	conns int
}

const fakeFeatures = featProtocol | 1<<uint(virtio.Version1) | 1<<uint(virtio.EventIdx) | 1<<uint(virtio.NetMQ) | 1<<uint(virtio.NetMTU) |
	1<<uint(virtio.NetMAC) | 1<<uint(virtio.NetStatus) | 1<<uint(virtio.NetCtrlVQ) | 1<<uint(virtio.AccessPlatform) | 1<<uint(virtio.RingPacked)

// newFake makes a back end that listens.
func newFake(t testing.TB, change func(*fake)) *fake {
	t.Helper()
	b := &fake{t: t, path: t.TempDir() + "/s", feat: fakeFeatures, proto: protoMQ | protoReplyAck | protoStatus | protoMTU, pairs: 2,
		last: map[Request][]byte{}, fds: map[Request]int{}}
	if change != nil {
		change(b)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: b.path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	all.Add(1)
	go func() {
		defer all.Done()
		for {
			c, err := l.AcceptUnix()
			if err != nil {
				return
			}
			b.mu.Lock()
			b.conn, b.seen = c, nil
			b.conns++
			b.mu.Unlock()
			all.Add(1)
			go func() { defer all.Done(); b.serve(c) }()
		}
	}()
	t.Cleanup(func() {
		l.Close()
		b.mu.Lock()
		if b.conn != nil {
			b.conn.Close()
		}
		b.mu.Unlock()
		all.Wait()
		for _, fd := range b.fds {
			unix.Close(fd)
		}
	})
	return b
}

func (b *fake) serve(c *net.UnixConn) {
	defer c.Close()
	src, err := newSocket(c)
	if err != nil {
		b.t.Error(err)
		return
	}
	r := &reader{src: src, n: new(counters)}
	status := uint64(0)
	for {
		m, err := r.next()
		if err != nil {
			return
		}
		var p []byte
		switch m.req {
		case GetFeatures:
			p = encodeU64(b.feat)
		case GetProtocolFeatures:
			p = encodeU64(b.proto)
		case GetQueueNum:
			p = encodeU64(b.pairs)
		case SetStatus:
			status, _ = m.u64()
		case GetStatus:
			p = encodeU64(status)
		case GetVringBase:
			s, _ := m.vringState()
			p = vringState{s.index, 0}.encode()
		case GetConfig:
			cfg, _ := m.config()
			space := virtio.NetConfig{MAC: [6]byte{2, 3, 4, 5, 6, 7}, LinkUp: true, MaxQueuePairs: 2, MTU: 1300}.Encode()
			copy(cfg.data, space[cfg.offset:])
			p = cfg.encode()
		}
		if p == nil && m.needReply() {
			p = encodeU64(0)
		}
		var reply []byte
		if p != nil {
			reply = encodeReply(m.req, p)
		}
		b.mu.Lock()
		b.seen, b.last[m.req] = append(b.seen, m.req), m.payload
		if fd := m.takeFD(0); fd >= 0 {
			if old, ok := b.fds[m.req]; ok {
				unix.Close(old)
			}
			b.fds[m.req] = fd
		}
		m.close()
		b.mu.Unlock()
		var fds []int
		if b.answer != nil {
			reply, fds = b.answer(m, reply)
		}
		if reply != nil {
			var oob []byte
			if len(fds) > 0 {
				oob = unix.UnixRights(fds...)
			}
			c.WriteMsgUnix(reply, oob, nil)
		}
	}
}

// requests returns what this connection's requests were, and what came with one.
func (b *fake) requests() []Request {
	b.mu.Lock()
	defer b.mu.Unlock()
	return append([]Request(nil), b.seen...)
}

func (b *fake) connections() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.conns
}

func (b *fake) front(t testing.TB, drv *tripper, change func(*FrontendConfig)) *frontend {
	t.Helper()
	return newFrontend(t, Spec{Path: b.path, FD: -1, Client: true}, drv, change)
}

var tripFeatures = virtio.FeaturesOf(virtio.Version1, virtio.EventIdx, virtio.NetMQ, virtio.NetMTU)

// TestFrontendRequests holds the requests of a bring-up and of the end to their order, and what
// they carry to what a back end needs.
func TestFrontendRequests(t *testing.T) {
	t.Parallel()
	queue := []Request{SetVringNum, SetVringBase, SetVringAddr, SetVringErr, SetVringCall, SetVringKick}
	for _, c := range []struct {
		name       string
		feat       virtio.Features
		proto      uint64
		noProto    bool
		pairs      int
		begin, end []Request
	}{
		{"two pairs", tripFeatures, protoMQ | protoReplyAck | protoStatus | protoMTU, false, 2,
			[]Request{GetFeatures, GetProtocolFeatures, SetProtocolFeatures, GetQueueNum, SetOwner, SetStatus, SetStatus, GetStatus, SetFeatures, NetSetMTU,
				SetStatus, GetStatus, SetMemTable, 0, 0, 0, 0, SetStatus, GetStatus, SetVringEnable, SetVringEnable, SetVringEnable, SetVringEnable},
			[]Request{GetVringBase, GetVringBase, GetVringBase, GetVringBase, SetStatus}},
		{"packed, without acknowledgements", tripFeatures.Or(virtio.FeaturesOf(virtio.RingPacked)), 0, false, 1,
			[]Request{GetFeatures, GetProtocolFeatures, SetProtocolFeatures, SetOwner, SetFeatures, SetMemTable, 0, 0, GetFeatures, SetVringEnable, SetVringEnable},
			[]Request{GetVringBase, GetVringBase}},
		{"without protocol features", tripFeatures, 0, true, 1,
			[]Request{GetFeatures, SetOwner, SetFeatures, SetMemTable, 0, 0, GetFeatures},
			[]Request{GetVringBase, GetVringBase}},
	} {
		c := c
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			b := newFake(t, func(b *fake) {
				if b.proto = c.proto; c.noProto {
					b.feat &^= featProtocol
				}
			})
			drv := newTripper(t, c.feat, c.pairs)
			f := b.front(t, drv, nil)
			drv.up(1)
			var want []Request
			for _, r := range c.begin {
				if r == 0 {
					want = append(want, queue...)
				} else {
					want = append(want, r)
				}
			}
			eventually(t, "all requests", func() bool { return len(b.requests()) >= len(want) })
			if err := f.stop(); err != nil {
				t.Fatal(err)
			}
			want = append(want, c.end...)
			got := b.requests()
			for i := 0; i < len(got) || i < len(want); i++ {
				if i >= len(got) || i >= len(want) || got[i] != want[i] {
					t.Fatalf("request %d of\n%v, want\n%v", i, got, want)
				}
			}
			features := native.Uint64(b.last[SetFeatures])
			if lack := drv.accepted.Mask() &^ features; lack != 0 || (features&featProtocol != 0) == c.noProto {
				t.Errorf("features %#x were accepted, %s wanted", features, drv.accepted)
			}
			for _, f := range []virtio.Feature{virtio.NetMAC, virtio.NetStatus, virtio.NetCtrlVQ, virtio.AccessPlatform} {
				if drv.accepted.Has(f) {
					t.Errorf("%s is the front end's own", f)
				}
			}
			rs, err := (&message{req: SetMemTable, payload: b.last[SetMemTable]}).memTable()
			if err != nil || len(rs) != 1 || rs[0] != (region{sharedBase, frontSize, sharedBase, 0}) {
				t.Errorf("memory %+v, %v", rs, err)
			}
			a, err := (&message{req: SetVringAddr, payload: b.last[SetVringAddr]}).vringAddr()
			if i := uint32(2*c.pairs - 1); err != nil || a.index != i || a.desc != sharedBase+uint64(i)*ringRoom || a.avail != a.desc+0x2000 || a.used != a.desc+0x3000 {
				t.Errorf("areas %+v, %v", a, err)
			}
			base := (&message{req: SetVringBase, payload: b.last[SetVringBase]})
			if s, err := base.vringState(); err != nil || s.num != firstBase(c.feat) {
				t.Errorf("base %+v, %v", s, err)
			}
			// The memory's size is sealed.
			fd := b.fds[SetMemTable]
			for _, size := range []int64{0, frontSize - 4096, frontSize + 4096} {
				if err := unix.Ftruncate(fd, size); err != unix.EPERM {
					t.Errorf("ftruncate to %d: %v, want EPERM", size, err)
				}
			}
			for _, r := range []Request{SetVringKick, SetVringCall, SetVringErr} {
				if b.fds[r] == 0 {
					t.Errorf("%s without a descriptor", r)
				}
			}
		})
	}
}

// TestFrontendConfig: a back end with a configuration space is asked for it, and one that offers it
// and has none is used without.
func TestFrontendConfig(t *testing.T) {
	t.Parallel()
	want := tripFeatures.Or(virtio.FeaturesOf(virtio.NetMAC, virtio.NetStatus))
	b := newFake(t, func(b *fake) { b.proto |= protoConfig })
	drv := newTripper(t, want, 2)
	b.front(t, drv, nil)
	drv.up(1)
	if c := drv.config; c.MAC != [6]byte{2, 3, 4, 5, 6, 7} || c.MTU != 1300 || !drv.accepted.Has(virtio.NetMAC) {
		t.Errorf("%+v, accepted %s", c, drv.accepted)
	}
	b = newFake(t, func(b *fake) {
		b.proto |= protoConfig
		b.answer = func(m *message, usual []byte) ([]byte, []int) {
			switch m.req {
			case GetConfig:
				return encodeReply(m.req, nil), nil
			case NetSetMTU:
				return encodeReply(m.req, encodeU64(1)), nil
			}
			return usual, nil
		}
	})
	drv = newTripper(t, want, 2)
	f := b.front(t, drv, nil)
	drv.up(1)
	if c := drv.config; c.MTU != 1400 || drv.accepted.Has(virtio.NetMAC) || b.connections() != 1 {
		t.Errorf("%+v, accepted %s, %d connections", c, drv.accepted, b.connections())
	}
	if !f.log.has("refuses an MTU of 1400") {
		t.Errorf("%q", f.log.lines)
	}
	f.count(t, "refused", 1)
}

// TestFrontendHostile: whatever a back end answers is an error that says what is wrong, and a
// counter; the connection is closed where it cannot go on, another one follows, and the front end
// ends when it is told.
func TestFrontendHostile(t *testing.T) {
	t.Parallel()
	// on changes the answer to one request.
	on := func(r Request, change func(usual []byte) []byte) func(*message, []byte) ([]byte, []int) {
		return func(m *message, usual []byte) ([]byte, []int) {
			if m.req == r {
				return change(usual), nil
			}
			return usual, nil
		}
	}
	is := func(p []byte) func([]byte) []byte { return func([]byte) []byte { return p } }
	head := func(at int, v uint32) func([]byte) []byte {
		return func(b []byte) []byte {
			native.PutUint32(b[at:], v)
			return b
		}
	}
	file := memfd(t, 4096)
	fds := func(n int) (l []int) {
		for i := 0; i < n; i++ {
			l = append(l, file)
		}
		return l
	}
	for _, c := range []struct {
		name    string
		answer  func(*message, []byte) ([]byte, []int)
		counter string
		text    string
		stays   bool // connected: only the device does not come up
	}{
		{"silent from the start", on(GetFeatures, is(nil)), "timeouts", "GET_FEATURES: the back end does not answer", false},
		{"silent at an acknowledgement", on(SetMemTable, is(nil)), "timeouts", "SET_MEM_TABLE: the back end does not answer", false},
		{"answer to another request", on(GetFeatures, head(0, uint32(GetQueueNum))), "unexpected", "GET_QUEUE_NUM: unexpected answer", false},
		{"no answer but a request", on(GetFeatures, head(4, flagVersion)), "lost", "wrong direction", false},
		{"version 2", on(GetFeatures, head(4, flagReply|2)), "lost", "no message of protocol version 1", false},
		{"far too long", on(GetFeatures, head(8, 1<<31)), "lost", "wrong length", false},
		{"too short", on(GetQueueNum, is(encodeReply(GetQueueNum, []byte{1, 2, 3}))), "malformed", "a payload of 3 bytes, 8 are wanted", false},
		{"empty acknowledgement", on(SetVringAddr, is(encodeReply(SetVringAddr, nil))), "malformed", "SET_VRING_ADDR: wrong length", false},
		{"cut off", on(GetFeatures, is(encodeReply(GetFeatures, nil)[:7])), "timeouts", "GET_FEATURES", false},
		{"two answers", on(GetFeatures, func(b []byte) []byte { return append(b, b...) }), "unexpected", "unexpected answer", false},
		{"answers without end", on(SetFeatures, func(b []byte) []byte { return bytes.Repeat(b, 100) }), "unexpected", "unexpected answer", false},
		{"no queues", on(GetQueueNum, is(encodeReply(GetQueueNum, encodeU64(0)))), "malformed", "no queues at all", false},
		{"refused features", on(SetFeatures, is(encodeReply(SetFeatures, encodeU64(1)))), "refused", "SET_FEATURES: the back end refuses it", true},
		{"refused queue", on(SetVringNum, is(encodeReply(SetVringNum, encodeU64(1)))), "refused", "queue 0 of 64 descriptors: SET_VRING_NUM: the back end refuses it", true},
		{"needs reset", on(GetStatus, is(encodeReply(GetStatus, encodeU64(uint64(virtio.StatusNeedsReset))))), "failures", "start: status 0x4f", true},
		{"base of another queue", func(m *message, usual []byte) ([]byte, []int) {
			switch m.req {
			case SetVringEnable:
				return encodeReply(m.req, encodeU64(7)), nil
			case GetVringBase:
				return encodeReply(m.req, vringState{9, 0}.encode()), nil
			}
			return usual, nil
		}, "malformed", "the base of queue 9", false},
		{"descriptors", func(m *message, usual []byte) ([]byte, []int) {
			if m.req == GetFeatures {
				return usual, fds(8)
			}
			return usual, nil
		}, "descriptors_closed", "", false},
		{"too many descriptors", func(m *message, usual []byte) ([]byte, []int) {
			if m.req == GetFeatures {
				return usual, fds(100)
			}
			return usual, nil
		}, "descriptors_closed", "wrong file descriptors", false},
	} {
		c := c
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			b := newFake(t, func(b *fake) { b.answer = c.answer })
			drv := newTripper(t, tripFeatures, 2)
			f := b.front(t, drv, func(c *FrontendConfig) { c.Answer = 200 * time.Millisecond })
			eventually(t, "counter "+c.counter, func() bool { return f.n.load()[c.counter] > 0 })
			if c.text == "" { // it is of no harm
				drv.up(1)
				f.count(t, c.counter, 8)
				return
			}
			find := func() bool {
				s := f.Status()
				return strings.Contains(s.LastError, c.text) || f.log.has(c.text)
			}
			if c.name == "no answer but a request" {
				find = func() bool { return f.log.has("no message of protocol version 1 in this direction") }
			}
			eventually(t, "error "+c.text, find)
			if c.stays {
				eventually(t, "three tries", func() bool { return f.n.load()["failures"] >= 3 })
				if n := b.connections(); n != 1 {
					t.Errorf("%d connections", n)
				}
			} else {
				eventually(t, "another connection", func() bool { return b.connections() >= 3 })
			}
			if n := f.n.load(); n["bring_ups"] != 0 || n["connections"] > n["lost"]+1 {
				t.Errorf("%v", n)
			}
		})
	}
	t.Cleanup(func() {
		eventually(t, "all descriptors are closed", func() bool { return openFDs(t, file) == 1 })
	})
}

// TestFrontendUp: what a back end does while the device is up.
func TestFrontendUp(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name    string
		do      func(b *fake)
		counter string
		same    bool // connection
	}{
		{"closes", func(b *fake) { b.conn.Close() }, "lost", false},
		{"answers what nobody asked", func(b *fake) { b.conn.Write(encodeReply(GetStatus, encodeU64(0))) }, "unexpected", false},
		{"sends half a message", func(b *fake) { b.conn.Write([]byte{1, 2, 3}); b.conn.CloseWrite() }, "lost", false},
		{"tells of an error", func(b *fake) { unix.Write(b.fds[SetVringErr], []byte{1, 0, 0, 0, 0, 0, 0, 1}) }, "rung", true},
		{"fills the error descriptor", func(b *fake) {
			fd := b.fds[SetVringErr]
			unix.SetNonblock(fd, true)
			full := encodeU64(1<<64 - 2)
			unix.Write(fd, full)
		}, "rung", true},
	} {
		c := c
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			b := newFake(t, nil)
			drv := newTripper(t, tripFeatures, 2)
			f := b.front(t, drv, nil)
			drv.up(1)
			f.count(t, "bring_ups", 1)
			b.mu.Lock()
			c.do(b)
			b.mu.Unlock()
			drv.up(2)
			f.count(t, c.counter, 1)
			if n := b.connections(); (n == 1) != c.same {
				t.Errorf("%d connections", n)
			}
		})
	}
}

// TestFrontendEnds: nothing that a back end leaves undone keeps the front end from ending.
func TestFrontendEnds(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name  string
		quiet Request // is not answered
		up    bool    // before the end
	}{
		{"while it waits for an answer", GetFeatures, false},
		{"while the queues are to stop", GetVringBase, true},
	} {
		c := c
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			asked := make(chan struct{}, 16)
			b := newFake(t, func(b *fake) {
				b.answer = func(m *message, usual []byte) ([]byte, []int) {
					if m.req != c.quiet {
						return usual, nil
					}
					asked <- struct{}{}
					return nil, nil
				}
			})
			drv := newTripper(t, tripFeatures, 2)
			f := b.front(t, drv, func(c *FrontendConfig) { c.Answer = time.Hour })
			if c.up {
				drv.up(1)
				f.count(t, "bring_ups", 1)
			} else {
				<-asked
			}
			if err := f.stop(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestFrontendUnread: a back end that does not read its socket.
func TestFrontendUnread(t *testing.T) {
	t.Parallel()
	other, ours := pair(t)
	var n frontCounters
	b, err := newBackConn(ours, &n, new(closer), 100*time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	defer b.close()
	for i := 0; i < 100000 && err == nil; i++ {
		err = b.tell(SetOwner, make([]byte, 4000))
	}
	if !errors.Is(err, ErrTimeout) || n.load()["timeouts"] != 1 {
		t.Errorf("%v, %v", err, n.load())
	}
	if err2 := b.tell(SetOwner, nil); err2 != err {
		t.Errorf("after that: %v", err2)
	}
	_ = other
}

// TestFrontendPassed: a connection that was passed as a descriptor is the only one.
func TestFrontendPassed(t *testing.T) {
	t.Parallel()
	p, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	e := newEcho(t, 1)
	d := &door{log: &testLog{}}
	d.Door = New(Config{Name: "door0", Spec: Spec{FD: p[0]}, Device: e, Log: d.log})
	d.run(t)
	drv := newTripper(t, tripFeatures, 1)
	f := newFrontend(t, Spec{FD: p[1]}, drv, nil)
	fr := drv.up(1)
	fr.trip(0, 100, 3, func() error { _, err := e.echo(0); return err })
	if err := d.stop(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "its end", func() bool { return f.Status().State == stateStopped })
	if err := f.stop(); err == nil || !strings.Contains(err.Error(), "the back end has closed the connection") {
		t.Errorf("%v", err)
	}
	f.stop = func() error { return nil } // the error is as it has to be
}

// FuzzFrontend: whatever a back end says, the front end ends with an error or is up, and nothing is
// left open.
func FuzzFrontend(f *testing.F) {
	reply := func(r Request, v uint64) []byte { return encodeReply(r, encodeU64(v)) }
	good := bytes.Join([][]byte{reply(GetFeatures, fakeFeatures), reply(GetProtocolFeatures, protoMQ|protoReplyAck), reply(GetQueueNum, 2), reply(SetOwner, 0),
		reply(SetFeatures, 0), reply(SetMemTable, 0)}, nil)
	f.Add(good)
	f.Add(good[:50])
	f.Add(append(reply(GetFeatures, featProtocol), reply(GetProtocolFeatures, protoConfig)...))
	f.Add(append(append(reply(GetFeatures, featProtocol|1<<32), reply(GetProtocolFeatures, protoConfig|protoStatus)...),
		encodeReply(GetConfig, config{data: make([]byte, 12)}.encode())...))
	f.Add([]byte{1, 0, 0, 0, 5, 0, 0, 0, 0xff, 0xff, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		file := os.NewFile(uintptr(p[1]), "front")
		c, err := net.FileConn(file)
		file.Close()
		if err != nil {
			t.Fatal(err)
		}
		unix.SetNonblock(p[0], true)
		unix.Write(p[0], b)
		unix.Shutdown(p[0], unix.SHUT_WR)
		var n frontCounters
		conn, err := newBackConn(c.(*net.UnixConn), &n, new(closer), limit)
		if err != nil {
			t.Fatal(err)
		}
		mem, err := newSharedMemory("fuzz", frontSize)
		if err != nil {
			t.Fatal(err)
		}
		tr := &transport{b: conn, name: "fuzz", n: &n, mem: mem, mtu: func() int { return 1500 }, queues: map[int]*sharedQueue{}, warn: func(string) {}}
		if err = tr.negotiate(); err == nil {
			if tr.pairs < 1 || tr.pairs > maxPairs || tr.proto&^wantedProto != 0 {
				t.Errorf("%d pairs, protocol features %#x", tr.pairs, tr.proto)
			}
			drv := newTripper(t, tripFeatures, 1)
			if err = drv.Up(tr, mem.layout(), func(error) {}); err == nil {
				_ = tr.rest()
			}
		}
		tr.close()
		unix.Close(p[0])
		if conn.broken == nil {
			t.Error("the connection is open")
		}
	})
}
