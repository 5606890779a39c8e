package vhostuser

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/vring"
)

// limit is how long a test waits for what has to happen.
const limit = 30 * time.Second

// echo is a device whose queue pairs send back what they receive. It moves nothing by itself: the
// test calls echo. It checks that the control plane keeps the order that package device asks for.
type echo struct {
	t      testing.TB
	id     uint32
	offer  virtio.Features
	config []byte

	mu       sync.Mutex
	notify   func(device.Event)
	accepted virtio.Features
	queues   []echoQueue
	running  bool
	runs     int
	changes  int
	macs     [][6]byte
	startErr error // of the next StartQueue
	featErr  error // of each SetFeatures
}

type echoQueue struct {
	started, enabled bool
	r                device.Resources
	q                vring.Device
}

func newEcho(t testing.TB, pairs int) *echo {
	e := &echo{t: t, id: virtio.IDNet, queues: make([]echoQueue, 2*pairs+1)}
	e.offer = virtio.FeaturesOf(virtio.Version1, virtio.RingPacked, virtio.EventIdx, virtio.IndirectDesc, virtio.InOrder, virtio.NetMTU, virtio.NetMAC, virtio.NetStatus)
	if pairs > 1 {
		e.offer = e.offer.Or(virtio.FeaturesOf(virtio.NetMQ, virtio.NetCtrlVQ))
	}
	b := virtio.NetConfig{MTU: 1500, MaxQueuePairs: uint16(pairs)}.Encode()
	e.config = b[:]
	return e
}

func (e *echo) DeviceID() uint32          { return e.id }
func (e *echo) Features() virtio.Features { return e.offer }
func (e *echo) Config() []byte            { return append([]byte(nil), e.config...) }
func (e *echo) Close() error              { return nil }
func (e *echo) Status() status.Device     { return status.Device{Name: "echo0", Type: "echo"} }

func (e *echo) Queues() int {
	if e.offer.Has(virtio.NetCtrlVQ) {
		return len(e.queues)
	}
	return len(e.queues) - 1
}

func (e *echo) SetFeatures(f virtio.Features, o device.Options) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if f.Without(e.offer) != (virtio.Features{}) || !f.Has(virtio.Version1) || !o.ControlElsewhere {
		e.t.Errorf("features %s with %+v", f, o)
	}
	for i := range e.queues {
		if e.queues[i].started {
			e.t.Errorf("features change while queue %d is started", i)
		}
	}
	if e.featErr != nil {
		return e.featErr
	}
	e.accepted = f
	return nil
}

func (e *echo) WriteConfig(off uint32, b []byte) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if int(off)+len(b) > len(e.config) {
		return device.ErrReadOnly
	}
	copy(e.config[off:], b)
	return nil
}

func (e *echo) Queue(i int) device.QueueInfo {
	return device.QueueInfo{Name: fmt.Sprintf("echo0 q%d", i), Max: 256, ToDriver: i%2 == 0}
}

func (e *echo) open(i int, r device.Resources, s vring.State) (vring.Device, error) {
	c := vring.Config{Name: e.Queue(i).Name, Size: r.Size, Desc: r.Areas.Desc, Driver: r.Areas.Driver, Device: r.Areas.Device, Table: r.Table, State: s,
		EventIdx: e.accepted.Has(virtio.EventIdx), Indirect: e.accepted.Has(virtio.IndirectDesc), InOrder: e.accepted.Has(virtio.InOrder), Log: r.Log, Journal: r.Journal}
	if e.accepted.Has(virtio.RingPacked) {
		return vring.NewPackedDevice(c)
	}
	return vring.NewSplitDevice(c)
}

func (e *echo) StartQueue(i int, r device.Resources, s vring.State) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.startErr; err != nil {
		e.startErr = nil
		return err
	}
	if e.queues[i].started || r.Call == nil || r.Kick == nil || r.Table == nil {
		e.t.Errorf("queue %d is started twice, or with %+v", i, r)
	}
	q, err := e.open(i, r, s)
	if err != nil {
		return err
	}
	e.queues[i].started, e.queues[i].r, e.queues[i].q = true, r, q
	return nil
}

func (e *echo) EnableQueue(i int, on bool, _ time.Time) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.queues[i].enabled = on
	return nil
}

func (e *echo) ChangeQueue(i int, c device.Change, _ time.Time) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	q := &e.queues[i]
	if !q.started {
		e.t.Errorf("queue %d changes and is not started", i)
		return device.ErrStopped
	}
	e.changes++
	if c.Log != nil {
		q.r.Log = *c.Log
		q.q.SetLog(q.r.Log)
	}
	if c.Areas != nil {
		q.r.Areas = *c.Areas
		n, err := e.open(i, q.r, q.q.State())
		if err != nil {
			return err
		}
		q.q = n
	}
	if c.Kick != nil {
		q.r.Kick = c.Kick
	}
	if c.Call != nil {
		q.r.Call = c.Call
	}
	return nil
}

func (e *echo) StopQueue(i int, _ time.Time) (device.Stopped, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	q := &e.queues[i]
	if !q.started {
		e.t.Errorf("queue %d stops and is not started", i)
		return device.Stopped{}, device.ErrStopped
	}
	q.started = false
	return device.Stopped{State: q.q.State()}, nil
}

func (e *echo) SetRunning(on bool, _ time.Time) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if on && !(e.queues[0].started && e.queues[1].started && e.queues[0].enabled && e.queues[1].enabled) {
		e.t.Error("running without the first pair")
	}
	if e.running = on; on {
		e.runs++
	}
	return nil
}

func (e *echo) Reset(time.Time) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	for i := range e.queues {
		e.queues[i] = echoQueue{}
	}
	e.running, e.accepted = false, virtio.Features{}
	return nil
}

func (e *echo) Notify(f func(device.Event)) { e.notify = f }

func (e *echo) Announce(mac [6]byte) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.macs = append(e.macs, mac)
	return nil
}

// count returns how many changes there were, and how often the device was started.
func (e *echo) count() (changes, runs int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.changes, e.runs
}

// announced returns what was announced.
func (e *echo) announced() [][6]byte {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.macs
}

// state tells whether the device runs, and which queues are started and enabled, as bits.
func (e *echo) state() (running bool, started, enabled int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for i := range e.queues {
		if e.queues[i].started {
			started |= 1 << uint(i)
		}
		if e.queues[i].enabled {
			enabled |= 1 << uint(i)
		}
	}
	return e.running, started, enabled
}

// echo sends back all that a pair has received, and returns the number of buffers.
func (e *echo) echo(pair int) (int, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	rx, tx := &e.queues[2*pair], &e.queues[2*pair+1]
	if !e.running || !rx.started || !tx.started || !rx.enabled || !tx.enabled {
		return 0, nil
	}
	for n := 0; ; n++ {
		var b, to vring.Batch
		k, err := tx.q.Pop(&b, 1)
		if k == 0 || err != nil {
			return n, err
		}
		if k, err = rx.q.Pop(&to, 1); k == 0 || err != nil {
			tx.q.Unpop(1)
			return n, err
		}
		buf := make([]byte, b.Chains[0].ReadLen)
		at := buf
		for _, s := range b.Spans {
			s.CopyOut(at[:s.Len], 0)
			at = at[s.Len:]
		}
		left := buf
		for _, s := range to.Spans {
			m := len(left)
			if uint32(m) > s.Len {
				m = int(s.Len)
			}
			s.CopyIn(0, left[:m])
			left = left[m:]
		}
		if err := rx.q.Complete([]vring.Used{{ID: to.Chains[0].ID, Count: to.Chains[0].Count, Len: uint32(len(buf) - len(left))}}); err != nil {
			return n, err
		}
		if err := tx.q.Complete([]vring.Used{{ID: b.Chains[0].ID, Count: b.Chains[0].Count}}); err != nil {
			return n, err
		}
		for _, q := range [...]*echoQueue{rx, tx} {
			if q.q.NeedCall() {
				q.r.Call.Ring()
			}
		}
	}
}

// front is a front end: it owns the memory and the driver side of the rings.
type front struct {
	t    testing.TB
	fd   int
	file int
	mem  mmio.Mem
	reg  dma.Region // as the driver side has it: by guest physical addresses
	regs []region
	qs   []frontQueue
}

type frontQueue struct {
	drv  vring.Driver
	c    vring.Config
	call *doorbell.Eventfd
	kick *doorbell.Eventfd
}

const (
	guestBase = 1 << 32
	userBase  = 0x7f5500000000
	frontSize = 4 * mib
	ringSize  = 64
	ringRoom  = 0x4000  // bytes for the areas of a ring
	bufBase   = 2 * mib // buffers are behind the rings, in a region of their own
	bufLen    = 2048
)

func newFront(t testing.TB, conn int) *front {
	f := &front{t: t, fd: conn, file: memfd(t, frontSize)}
	b, err := unix.Mmap(f.file, 0, frontSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(b) })
	f.mem = mmio.NewMem(unsafe.Pointer(&b[0]), frontSize, mmio.Cached)
	f.reg = dma.Region{Name: "guest", Addr: guestBase, Mem: f.mem, Access: dma.DeviceRead | dma.DeviceWrite}
	f.regs = []region{{guestBase, bufBase, userBase, 0}, {guestBase + bufBase, frontSize - bufBase, userBase + 1<<36, bufBase}}
	tv := unix.NsecToTimeval(int64(limit))
	unix.SetsockoptTimeval(conn, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv)
	return f
}

// recv reads an answer.
func (f *front) recv() (Request, uint32, []byte, error) {
	read := func(n int) ([]byte, error) {
		b := make([]byte, n)
		for at := 0; at < n; {
			k, err := unix.Read(f.fd, b[at:])
			if err == unix.EINTR {
				continue
			}
			if err != nil {
				return nil, err
			}
			if k == 0 {
				return nil, io.EOF
			}
			at += k
		}
		return b, nil
	}
	h, err := read(headerLen)
	if err != nil {
		return 0, 0, nil, err
	}
	p, err := read(int(native.Uint32(h[8:])))
	return Request(native.Uint32(h)), native.Uint32(h[4:]), p, err
}

// get sends a request that has its own answer, and returns that.
func (f *front) get(r Request, payload []byte) []byte {
	f.t.Helper()
	send(f.t, f.fd, encodeMessage(r, flagVersion, payload))
	got, flags, p, err := f.recv()
	if err != nil || got != r || flags != flagVersion|flagReply {
		f.t.Fatalf("%s: answer %s with flags %#x, %v", r, got, flags, err)
	}
	return p
}

func (f *front) getU64(r Request) uint64 {
	f.t.Helper()
	p := f.get(r, nil)
	if len(p) != 8 {
		f.t.Fatalf("%s: %d bytes", r, len(p))
	}
	return native.Uint64(p)
}

// ask sends a request with need_reply, and tells whether it was done.
func (f *front) ask(r Request, payload []byte, fds ...int) bool {
	f.t.Helper()
	send(f.t, f.fd, encodeMessage(r, flagVersion|flagNeedReply, payload), fds...)
	got, flags, p, err := f.recv()
	if err != nil || got != r || flags != flagVersion|flagReply || len(p) != 8 {
		f.t.Fatalf("%s: answer %s with flags %#x and %d bytes, %v", r, got, flags, len(p), err)
	}
	return native.Uint64(p) == 0
}

// set is ask for what has to be done.
func (f *front) set(r Request, payload []byte, fds ...int) {
	f.t.Helper()
	if !f.ask(r, payload, fds...) {
		f.t.Fatalf("%s is refused", r)
	}
}

// negotiate does what comes before the queues.
func (f *front) negotiate(features virtio.Features, proto uint64) {
	f.t.Helper()
	if f.getU64(GetFeatures)&featProtocol == 0 {
		f.t.Fatal("no protocol features")
	}
	if have := f.getU64(GetProtocolFeatures); have&proto != proto {
		f.t.Fatalf("protocol features %#x, %#x wanted", have, proto)
	}
	send(f.t, f.fd, encodeMessage(SetProtocolFeatures, flagVersion, encodeU64(proto)))
	send(f.t, f.fd, encodeMessage(SetOwner, flagVersion, nil))
	f.set(SetFeatures, encodeU64(features.Mask()|featProtocol))
}

// table encodes SET_MEM_TABLE.
func table(rs []region) []byte {
	b := make([]byte, 8+len(rs)*regionLen)
	native.PutUint32(b, uint32(len(rs)))
	for i, r := range rs {
		r.encode(b[8+i*regionLen:])
	}
	return b
}

// slot encodes ADD_MEM_REG and REM_MEM_REG.
func slot(r region) []byte {
	b := make([]byte, 8+regionLen)
	r.encode(b[8:])
	return b
}

func (f *front) setTable() {
	f.t.Helper()
	fds := make([]int, len(f.regs))
	for i := range fds {
		fds[i] = f.file
	}
	f.set(SetMemTable, table(f.regs), fds...)
}

// user returns the front end's address of byte off of the file, which is what rings are told by.
func (f *front) user(off uint64) uint64 {
	for _, r := range f.regs {
		if off >= r.offset && off < r.offset+r.size {
			return r.user + off - r.offset
		}
	}
	return off
}

// queue makes the driver side of queue i and its doorbells.
func (f *front) queue(i int, features virtio.Features) {
	f.t.Helper()
	for len(f.qs) <= i {
		f.qs = append(f.qs, frontQueue{})
	}
	q := &f.qs[i]
	packed := features.Has(virtio.RingPacked)
	d, r, u := vring.SplitSizes(ringSize)
	if packed {
		d, r, u = vring.PackedSizes(ringSize)
	}
	at := uint64(i) * ringRoom
	for k := at; k < at+ringRoom; k += 8 {
		f.mem.Store64(k, 0)
	}
	span := func(off, n uint64) dma.Span { return dma.Span{Region: &f.reg, Off: off, Len: uint32(n)} }
	q.c = vring.Config{Name: fmt.Sprintf("driver q%d", i), Size: ringSize, Desc: span(at, d), Driver: span(at+0x2000, r), Device: span(at+0x3000, u),
		EventIdx: features.Has(virtio.EventIdx), InOrder: features.Has(virtio.InOrder)}
	var err error
	if packed {
		q.drv, err = vring.NewPackedDriver(q.c)
	} else {
		q.drv, err = vring.NewSplitDriver(q.c)
	}
	if err != nil {
		f.t.Fatal(err)
	}
	f.bells(i)
}

// bells makes new doorbells for queue i.
func (f *front) bells(i int) {
	f.t.Helper()
	for _, e := range [...]**doorbell.Eventfd{&f.qs[i].call, &f.qs[i].kick} {
		n, err := doorbell.NewEventfd()
		if err != nil {
			f.t.Fatal(err)
		}
		f.t.Cleanup(func() { n.Close() })
		*e = n
	}
}

func (f *front) addr(i int) []byte {
	q := &f.qs[i]
	b := make([]byte, vringAddrLen)
	native.PutUint32(b, uint32(i))
	native.PutUint64(b[8:], f.user(q.c.Desc.Off))
	native.PutUint64(b[16:], f.user(q.c.Device.Off))
	native.PutUint64(b[24:], f.user(q.c.Driver.Off))
	return b
}

// start starts queue i at a base, as QEMU does.
func (f *front) start(i int, base uint32) {
	f.t.Helper()
	f.set(SetVringNum, vringState{uint32(i), ringSize}.encode())
	f.set(SetVringBase, vringState{uint32(i), base}.encode())
	f.set(SetVringAddr, f.addr(i))
	f.set(SetVringCall, encodeU64(uint64(i)), f.qs[i].call.FD())
	f.set(SetVringKick, encodeU64(uint64(i)), f.qs[i].kick.FD())
}

func (f *front) enable(i int, on uint32) {
	f.t.Helper()
	f.set(SetVringEnable, vringState{uint32(i), on}.encode())
}

// stop stops queue i and returns its base.
func (f *front) stop(i int) uint32 {
	f.t.Helper()
	p := f.get(GetVringBase, vringState{uint32(i), 0}.encode())
	if len(p) != 8 || native.Uint32(p) != uint32(i) {
		f.t.Fatalf("base of queue %d: % x", i, p)
	}
	return native.Uint32(p[4:])
}

// firstBase is the base of a new queue, as QEMU has it.
func firstBase(features virtio.Features) uint32 {
	if features.Has(virtio.RingPacked) {
		return 0x80008000
	}
	return 0
}

// buffer returns where buffer n of a queue lies.
func buffer(queue, n int) uint64 {
	return bufBase + uint64(queue*ringSize+n%ringSize)*bufLen
}

// trip sends count messages through a pair and checks what comes back. move makes the device move.
func (f *front) trip(pair, count int, seed byte, move func() error) {
	f.t.Helper()
	rx, tx := &f.qs[2*pair], &f.qs[2*pair+1]
	sent, got := 0, 0
	done := make([]vring.Completion, 8)
	message := func(n int) []byte {
		b := bytes.Repeat([]byte{seed + byte(n)}, 60+n%1400)
		binary.LittleEndian.PutUint32(b, uint32(n))
		return b
	}
	guest := func(off uint64) dma.Addr { return guestBase + dma.Addr(off) }
	posted := 0
	for end := time.Now().Add(limit); got < count; {
		if time.Now().After(end) {
			f.t.Fatalf("%d messages sent, %d came back of %d", sent, got, count)
		}
		for posted < count && posted-got < ringSize/2 {
			n, err := rx.drv.Add([]vring.Request{{Bufs: []vring.Buffer{{Addr: guest(buffer(2*pair, posted)), Len: bufLen}}, Token: uint32(posted)}})
			if err != nil || n == 0 {
				f.t.Fatal(n, err)
			}
			posted++
		}
		if sent < count && sent-got < ringSize/4 {
			m := message(sent)
			off := buffer(2*pair+1, sent)
			f.mem.CopyIn(off, m)
			half := uint32(len(m) / 2)
			n, err := tx.drv.Add([]vring.Request{{Bufs: []vring.Buffer{{Addr: guest(off), Len: half}, {Addr: guest(off + uint64(half)), Len: uint32(len(m)) - half}},
				Readable: 2, Token: uint32(sent)}})
			if err != nil {
				f.t.Fatal(err)
			}
			sent += n
		}
		rx.drv.NeedKick()
		if tx.drv.NeedKick() {
			tx.kick.Ring()
		}
		if err := move(); err != nil {
			f.t.Fatal(err)
		}
		n, err := rx.drv.Reap(done)
		if err != nil {
			f.t.Fatal(err)
		}
		for _, c := range done[:n] {
			want := message(got)
			b := make([]byte, c.Len)
			f.mem.CopyOut(b, buffer(2*pair, int(c.Token)))
			if int(c.Token) != got || !bytes.Equal(b, want) {
				f.t.Fatalf("message %d came back in buffer %d with %d bytes, as % x", got, c.Token, c.Len, b)
			}
			got++
		}
		if _, err := tx.drv.Reap(done); err != nil {
			f.t.Fatal(err)
		}
	}
	for end := time.Now().Add(limit); tx.drv.Free() < ringSize; {
		if _, err := tx.drv.Reap(done); err != nil || time.Now().After(end) {
			f.t.Fatalf("%d descriptors of %d came back, %v", tx.drv.Free(), ringSize, err)
		}
		if err := move(); err != nil {
			f.t.Fatal(err)
		}
	}
}

// testLog is a Logger that keeps what it hears.
type testLog struct {
	mu    sync.Mutex
	lines []string
}

func (l *testLog) add(level, msg string, args ...interface{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, level+" "+msg+" "+fmt.Sprintln(args...))
}

func (l *testLog) Debug(msg string, args ...interface{}) { l.add("debug", msg, args...) }
func (l *testLog) Info(msg string, args ...interface{})  { l.add("info", msg, args...) }
func (l *testLog) Warn(msg string, args ...interface{})  { l.add("warn", msg, args...) }
func (l *testLog) Error(msg string, args ...interface{}) { l.add("error", msg, args...) }

// count returns how many lines have the text.
func (l *testLog) count(text string) (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range l.lines {
		if bytes.Contains([]byte(s), []byte(text)) {
			n++
		}
	}
	return n
}

// has tells whether a line holds text.
func (l *testLog) has(text string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range l.lines {
		if bytes.Contains([]byte(s), []byte(text)) {
			return true
		}
	}
	return false
}

// eventually waits until something holds.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(limit); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not within %v", what, limit)
		}
	}
}

// door runs a door over a device, at a socket in a folder of the test.
type door struct {
	*Door
	path string
	log  *testLog
	stop func() error // ends Run, and returns what it returned
}

func newDoor(t testing.TB, dev device.Device) *door {
	t.Helper()
	d := &door{path: t.TempDir() + "/s", log: &testLog{}}
	d.Door = New(Config{Name: "door0", Board: Prefix + d.path, Spec: Spec{Path: d.path, FD: -1}, Device: dev, Log: d.log})
	d.run(t)
	return d
}

func (d *door) run(t testing.TB) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	if err := d.Open(ctx); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	var once sync.Once
	var err error
	d.stop = func() error {
		once.Do(func() {
			cancel()
			select {
			case err = <-done:
			case <-time.After(limit):
				err = errors.New("the door does not stop")
			}
		})
		return err
	}
	t.Cleanup(func() {
		if err := d.stop(); err != nil {
			t.Error(err)
		}
	})
}

// connect connects to the door as a front end.
func (d *door) connect(t testing.TB) int {
	t.Helper()
	c, err := net.Dial("unix", d.path)
	if err != nil {
		t.Fatal(err)
	}
	f, err := c.(*net.UnixConn).File()
	c.Close()
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	f.Close()
	if err != nil {
		t.Fatal(err)
	}
	unix.SetNonblock(fd, false)
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}
