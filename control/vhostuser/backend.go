package vhostuser

import (
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/virtio"
)

// changeLimit is how long a queue may take to come to rest.
const changeLimit = 5 * time.Second

// backend is what one front end has negotiated and set up. All methods run on the door's goroutine,
// under pci.Guard: the front end may truncate its memory at any time.
type backend struct {
	name string
	dev  device.Device
	log  Logger
	n    *counters

	features uint64 // that the front end accepted, with bit 30
	usable   bool   // the device can be served with them
	taken    bool   // the device has them: not while it is suspended
	proto    uint64 // accepted protocol features
	status   uint8  // device status, where that is negotiated
	mem      *memory
	table    dma.TableRef
	rings    []ring
	places   *places // nil: no places of packed rings are kept
	answer   *ring   // whose place is in the answer that is to be sent; nil: none
	first    int     // so many rings have to be started and enabled before the device runs
	running  bool    // the device is told so
	without  uint64  // protocol features that are not offered, as the operator wants it
	told     bool    // the log has told that the driver is a legacy one
	starts   bucket
	kept     []*doorbell.Eventfd // that may be in use until close
	dirty    *dirtyLog           // of SET_LOG_BASE; nil: none
	oldLogs  []*dirtyLog         // that may be in use until close
	logBell  logBell             // of SET_LOG_FD

	owed   bool      // an announcement that came while the device did not run is to be repeated
	mac    [6]byte   // of which address
	repeat time.Time // when; zero: not yet

	again time.Time // when what could not be started is tried again; zero: never
	pause time.Duration
}

// notOffered are features that no device has on this control plane: ACCESS_PLATFORM would need messages that this back end does
// not send. Of a network device, some are the front end's own business besides: it serves the control queue and gives the guest its
// MAC address; bit 127 is for devices of our own.
var notOffered, notOfferedNet = virtio.FeaturesOf(virtio.AccessPlatform), virtio.FeaturesOf(virtio.NetCtrlVQ, virtio.NetMAC, virtio.NetRawIP)

func newBackend(name string, dev device.Device, log Logger, n *counters) *backend {
	b := &backend{name: name, dev: dev, log: log, n: n, mem: &memory{}, starts: bucket{every: startEvery, burst: startBurst}}
	b.table.Store(new(dma.Table))
	b.rings = make([]ring, dataQueues(dev))
	for i := range b.rings {
		b.rings[i].index = i
	}
	b.first = 1
	if dev.DeviceID() == virtio.IDNet {
		b.first = 2
	}
	return b
}

// dataQueues returns the number of queues that the front end may set up: all but a network device's
// control queue.
func dataQueues(dev device.Device) int {
	n := dev.Queues()
	if dev.DeviceID() == virtio.IDNet && dev.Features().Has(virtio.NetCtrlVQ) {
		n--
	}
	return n
}

// offered returns the feature bits of GET_FEATURES.
func (b *backend) offered() uint64 {
	f := b.dev.Features().Without(notOffered)
	if b.dev.DeviceID() == virtio.IDNet {
		f = f.Without(notOfferedNet)
	}
	return f.Mask() | featProtocol | featLogAll
}

// accepted returns the accepted features as the device knows them.
func (b *backend) accepted() virtio.Features {
	return virtio.FeaturesFromMask(b.features &^ (featProtocol | featLogAll))
}

func (b *backend) packed() bool { return b.accepted().Has(virtio.RingPacked) }

// protocol returns the protocol features that are offered.
func (b *backend) protocol() uint64 {
	p := protoMQ | protoLog | protoReplyAck | protoMemSlots | protoResetDevice | protoStatus
	if b.dev.DeviceID() != virtio.IDNet {
		return (p | protoConfig) &^ b.without // QEMU serves a network device's configuration space itself
	}
	p |= protoMTU
	if _, ok := b.dev.(device.Announcer); ok {
		p |= protoRARP
	}
	return p &^ b.without
}

// handle serves a message and returns its answer, nil where there is none. An error is one that
// nobody can be told of: the connection is to be closed.
func (b *backend) handle(m *message) ([]byte, error) {
	reply, err := b.serve(m)
	if n := m.close(); n > 0 {
		atomic.AddUint64(&b.n.DescriptorsClosed, uint64(n))
	}
	switch {
	case err == nil && reply != nil:
		return reply, nil
	case isFinal(err):
		return nil, err
	}
	ack := m.needReply() && b.proto&protoReplyAck != 0 && !b.ownReply(m.req)
	if err == nil {
		if ack {
			return encodeReply(m.req, encodeU64(0)), nil
		}
		return nil, nil
	}
	var named *Error
	if !errors.As(err, &named) {
		err = fmt.Errorf("%s: %w", m.req, err)
	}
	if errors.Is(err, ErrUnknown) {
		atomic.AddUint64(&b.n.Unknown, 1)
		b.log.Debug("an unknown request", "link", b.name, "error", err)
		if !ack { // the specification asks for no answer
			return nil, nil
		}
	} else {
		atomic.AddUint64(&b.n.Failed, 1)
		if ack {
			b.log.Warn("a request of the front end is refused", "link", b.name, "error", err)
		}
	}
	if ack {
		return encodeReply(m.req, encodeU64(1)), nil
	}
	atomic.AddUint64(&b.n.NoAcknowledge, 1)
	return nil, err
}

// ownReply tells whether a request has an answer of its own, which is not an acknowledgement.
func (b *backend) ownReply(r Request) bool {
	return ownReplies[r] || r == SetLogBase && b.proto&protoLog != 0
}

var ownReplies = map[Request]bool{GetFeatures: true, GetProtocolFeatures: true, GetQueueNum: true, GetVringBase: true, GetConfig: true,
	GetMaxMemSlots: true, GetStatus: true}

// serve carries out a message.
func (b *backend) serve(m *message) (reply []byte, err error) {
	switch m.req {
	case GetFeatures:
		return encodeReply(m.req, encodeU64(b.offered())), nil
	case SetFeatures:
		return nil, b.setFeatures(m)
	case GetProtocolFeatures:
		return encodeReply(m.req, encodeU64(b.protocol())), nil
	case SetProtocolFeatures:
		v, err := m.u64()
		if err != nil {
			return nil, err
		}
		if bad := v &^ b.protocol(); bad != 0 {
			return nil, m.errorf(ErrFeatures, "protocol features %#x were not offered", bad)
		}
		b.proto = v
		return nil, nil
	case SetOwner:
		return nil, nil
	case ResetOwner: // deprecated; what it should do differs, and front ends that send it want a reset
		return nil, b.reset()
	case ResetDevice:
		if err := b.negotiated(m, protoResetDevice); err != nil {
			return nil, err
		}
		return nil, b.reset()
	case SetMemTable:
		return nil, b.setMemTable(m)
	case GetMaxMemSlots, AddMemReg, RemMemReg:
		return b.memSlots(m)
	case SetLogBase:
		return b.setLogBase(m)
	case SetLogFD:
		return nil, b.setLogFD(m)
	case GetQueueNum:
		n := len(b.rings)
		if b.dev.DeviceID() == virtio.IDNet {
			n /= 2 // of pairs
		}
		return encodeReply(m.req, encodeU64(uint64(n))), nil
	case SetVringNum, SetVringAddr, SetVringBase, GetVringBase, SetVringEnable:
		return b.setVring(m)
	case SetVringKick, SetVringCall, SetVringErr:
		return nil, b.setVringFD(m)
	case GetConfig:
		return b.getConfig(m)
	case SetConfig:
		return nil, b.setConfig(m)
	case SetStatus, GetStatus:
		return b.deviceStatus(m)
	case SendRARP:
		return nil, b.announce(m)
	case NetSetMTU:
		return nil, b.setMTU(m)
	}
	return nil, m.errorf(ErrUnknown, "")
}

// negotiated refuses a message whose protocol feature was not negotiated.
func (b *backend) negotiated(m *message, bit uint64) error {
	if b.proto&bit != 0 {
		return nil
	}
	name := ""
	for _, p := range protoNames {
		if p.bit == bit {
			name = p.name
		}
	}
	return m.errorf(ErrUnknown, "protocol feature %s was not negotiated", name)
}

// setFeatures serves SET_FEATURES. QEMU sends it once for each queue pair, while others run
// already: what is the same changes nothing.
func (b *backend) setFeatures(m *message) error {
	v, err := m.u64()
	if err != nil {
		return err
	}
	if bad := v &^ b.offered(); bad != 0 {
		return m.errorf(ErrFeatures, "%s were not offered", virtio.FeaturesFromMask(bad))
	}
	if v&featLogAll != 0 {
		if err := b.negotiated(m, protoLog); err != nil {
			return m.errorf(ErrFeatures, "log_all without protocol feature log_shmfd: the log has to be shared memory")
		}
	}
	switch {
	case v == b.features:
		return nil
	case v == b.features^featLogAll && b.usable:
		return b.setLogging(v)
	}
	if err := b.stopAll(); err != nil {
		return err
	}
	b.features, b.usable = v, false
	if err := b.fitLog(b.mem); err != nil {
		return err
	}
	if !b.accepted().Has(virtio.Version1) {
		// Front ends send this before the guest's driver has said anything, too: it is told when a
		// queue is kicked.
		return nil
	}
	if err := b.take(); err != nil {
		b.features = 0 // QEMU repeats the request: it is refused again
		return m.errorf(ErrFeatures, "%v", err)
	}
	b.usable = true
	return nil
}

// take gives the device the accepted features.
func (b *backend) take() error {
	err := b.dev.SetFeatures(b.accepted(), device.Options{ControlElsewhere: true, InOrder: true})
	b.taken = err == nil
	return err
}

// stopAll stops all rings as GET_VRING_BASE does: each goes on with the next SET_VRING_KICK.
func (b *backend) stopAll() error {
	for i := range b.rings {
		if err := b.stop(&b.rings[i]); err != nil {
			return err
		}
		b.rings[i].kicked = false
	}
	return b.settle(true)
}

// reset forgets all but the memory, the doorbells and the protocol features.
func (b *backend) reset() error {
	if err := b.stopAll(); err != nil {
		return err
	}
	if err := b.dev.Reset(deadline()); err != nil {
		return err
	}
	for i := range b.rings {
		b.forget(&b.rings[i])
	}
	b.features, b.usable, b.taken, b.status, b.running = 0, false, false, 0, false
	for i := range b.rings {
		r := &b.rings[i]
		*r = ring{index: i, kick: r.kick, call: r.call, err: r.err}
	}
	return nil
}

// close ends the use of the front end's memory and doorbells. It fails with device.ErrStuck where
// the device does not let go of them: nothing was given back then, and it is to be called again.
func (b *backend) close(limit time.Time) error {
	if err := b.dev.Reset(limit); err != nil {
		return err
	}
	b.running = false
	b.table.Store(new(dma.Table))
	b.mem.unmapBut(nil)
	b.mem = &memory{}
	b.closeLogs()
	for i := range b.rings {
		r := &b.rings[i]
		r.started = false
		for _, e := range [...]**doorbell.Eventfd{&r.kick, &r.call, &r.err} {
			replace(e, nil)
		}
	}
	for i := range b.kept {
		replace(&b.kept[i], nil)
	}
	return nil
}

// ringOf returns the ring of an index.
func (b *backend) ringOf(m *message, index uint32) (*ring, error) {
	if uint64(index) >= uint64(len(b.rings)) {
		return nil, m.errorf(ErrQueue, "queue %d: there are %d", index, len(b.rings))
	}
	return &b.rings[index], nil
}

// setVring serves the requests that have the number of a queue and a value.
func (b *backend) setVring(m *message) ([]byte, error) {
	if m.req == SetVringAddr {
		a, err := m.vringAddr()
		if err != nil {
			return nil, err
		}
		return nil, b.setAddr(m, a)
	}
	s, err := m.vringState()
	if err != nil {
		return nil, err
	}
	r, err := b.ringOf(m, s.index)
	if err != nil {
		return nil, err
	}
	switch m.req {
	case GetVringBase:
		if err := b.stop(r); err != nil {
			return nil, err
		}
		r.kicked, r.broken = false, false
		b.answer = r // sent, the front end knows the place
		return encodeReply(m.req, vringState{s.index, r.base}.encode()), nil
	case SetVringEnable:
		if s.num > 1 {
			return nil, m.errorf(ErrValue, "%d: 0 or 1 is possible", s.num)
		}
		if r.started && r.enabled != (s.num == 1) {
			b.starts.take(time.Now()) // a queue of the interface is attached or detached
		}
		r.enabled = s.num == 1
		if r.started {
			if err := b.dev.EnableQueue(r.index, b.enabled(r), deadline()); err != nil {
				return nil, b.notNow(err)
			}
		}
		return nil, b.settle(true)
	case SetVringNum:
		if uint32(r.size) == s.num {
			return nil, nil
		}
		if max := b.dev.Queue(r.index).Max; s.num == 0 || s.num > uint32(max) {
			return nil, m.errorf(ErrQueue, "queue %d of %d descriptors: 1 to %d are possible (--queue-max)", s.index, s.num, max)
		}
		if err := b.stopped(m, r); err != nil {
			return nil, err
		}
		r.size = uint16(s.num)
	case SetVringBase:
		if err := b.stopped(m, r); err != nil {
			return nil, err
		}
		r.base, r.based, r.own = s.num, true, false
		r.told, r.toldBase = s.num, true
	}
	return nil, nil
}

// stopped refuses a change of a ring that runs.
func (b *backend) stopped(m *message, r *ring) error {
	if r.started {
		return m.errorf(ErrQueue, "queue %d is started: GET_VRING_BASE has to stop it first", r.index)
	}
	return nil
}

// setAddr serves SET_VRING_ADDR. For a ring that runs, front ends send it again to turn its log on
// and off.
func (b *backend) setAddr(m *message, a vringAddr) error {
	r, err := b.ringOf(m, a.index)
	if err != nil {
		return err
	}
	was, again := r.addr, r.addressed && a.desc == r.addr.desc && a.avail == r.addr.avail && a.used == r.addr.used
	if !again {
		if err := b.stopped(m, r); err != nil {
			return err
		}
	}
	r.addr = a
	if err := b.checkRing(r); err != nil {
		r.addr = was
		return err
	}
	r.addressed = true
	return b.relogRing(r)
}

// setVringFD serves the requests that bring a doorbell.
func (b *backend) setVringFD(m *message) error {
	v, err := m.u64()
	if err != nil {
		return err
	}
	r, err := b.ringOf(m, uint32(v&indexMask))
	if err != nil {
		return err
	}
	want := 1
	if v&noFD != 0 {
		want = 0
	}
	if len(m.fds) != want {
		return m.errorf(ErrDescriptors, "%d of them, %d wanted", len(m.fds), want)
	}
	var e *doorbell.Eventfd
	if want == 1 {
		fd := m.takeFD(0)
		if e, err = doorbell.FromPeer(fd, m.req == SetVringKick); err != nil {
			m.closer.close(fd)
			return m.errorf(ErrDescriptors, "%v", err)
		}
	}
	switch m.req {
	case SetVringErr:
		replace(&r.err, e)
		return nil
	case SetVringCall:
		old := r.call
		r.call = e
		if r.started {
			if err := b.dev.ChangeQueue(r.index, device.Change{Call: r.ringer()}, deadline()); err != nil {
				// Both may be in use: the connection ends, and with it all doorbells.
				b.kept = append(b.kept, old)
				return &finalError{err}
			}
			ringOnce(e)
		}
		replace(&old, nil)
		return nil
	}
	old := r.kick
	r.kick = e
	if r.started {
		if err := b.dev.ChangeQueue(r.index, device.Change{Kick: r.waiter()}, deadline()); err != nil {
			b.kept = append(b.kept, old)
			return &finalError{err}
		}
		replace(&old, nil)
		return nil
	}
	replace(&old, nil)
	r.kicked = true
	if !b.usable {
		b.tellLegacy()
		return nil
	}
	return b.settleRing(r)
}

// tellLegacy logs, once for each connection, that queues are not started because the front end has
// not accepted VERSION_1.
func (b *backend) tellLegacy() {
	if b.told {
		return
	}
	b.told = true
	b.log.Warn("the front end starts queues without virtio 1 (VERSION_1): its driver is a legacy one, or negotiated while this program was away. "+
		"Set disable-legacy=on for the device, or let the guest's driver start anew", "link", b.name)
}

// settleRing starts a ring that was kicked, and all else that can be started. What is wrong with
// the ring is the error.
func (b *backend) settleRing(r *ring) error {
	if err := b.start(r, false); err != nil {
		r.kicked = false
		return err
	}
	return b.settle(true)
}

// getConfig serves GET_CONFIG: a piece of the configuration space, or nothing at all as the answer for what is wrong. Front ends that
// know more fields than the device ask for a longer space, and take no shorter answer: the rest is zeros, which fields of features that
// are not offered may be.
func (b *backend) getConfig(m *message) ([]byte, error) {
	if err := b.negotiated(m, protoConfig); err != nil {
		return nil, err
	}
	c, err := m.config()
	if err != nil {
		return nil, err
	}
	space := b.dev.Config()
	if uint64(c.offset) > uint64(len(space)) || len(space) == 0 {
		atomic.AddUint64(&b.n.Failed, 1)
		return encodeReply(m.req, nil), nil
	}
	c.data = make([]byte, len(c.data))
	copy(c.data, space[c.offset:])
	return encodeReply(m.req, c.encode()), nil
}

func (b *backend) setConfig(m *message) error {
	if err := b.negotiated(m, protoConfig); err != nil {
		return err
	}
	c, err := m.config()
	if err != nil {
		return err
	}
	if err := b.dev.WriteConfig(c.offset, c.data); err != nil {
		return m.errorf(ErrValue, "%d bytes at offset %d: %v", len(c.data), c.offset, err)
	}
	return nil
}

// deviceStatus serves SET_STATUS and GET_STATUS. Status 0 stops the rings; their places and the
// features stay, as GET_VRING_BASE comes behind it.
func (b *backend) deviceStatus(m *message) ([]byte, error) {
	if err := b.negotiated(m, protoStatus); err != nil {
		return nil, err
	}
	if m.req == GetStatus {
		s := b.status
		for i := range b.rings {
			if b.rings[i].broken {
				s |= uint8(virtio.StatusNeedsReset)
			}
		}
		return encodeReply(m.req, encodeU64(uint64(s))), nil
	}
	v, err := m.u64()
	if err != nil {
		return nil, err
	}
	if v > 0xff {
		return nil, m.errorf(ErrValue, "a status of %#x: it has 8 bits", v)
	}
	b.status = uint8(v)
	if v == 0 {
		return nil, b.stopAll()
	}
	return nil, nil
}

// announce serves SEND_RARP: the guest has moved here, and the network is to learn where its
// address is.
func (b *backend) announce(m *message) error {
	if err := b.negotiated(m, protoRARP); err != nil {
		return err
	}
	v, err := m.u64()
	if err != nil {
		return err
	}
	var mac [6]byte
	copy(mac[:], encodeU64(v))
	if err := b.dev.(device.Announcer).Announce(mac); err != nil {
		return m.errorf(ErrValue, "%v", err)
	}
	atomic.AddUint64(&b.n.RARP, 1)
	b.owed, b.mac = !b.running, mac
	return nil
}

// repeatAfter is how long a device runs before an announcement is repeated that came too early: a bridge takes a moment to
// use an interface whose carrier has come on.
const repeatAfter = 100 * time.Millisecond

// announceAgain repeats an announcement that came before the device ran, as QEMU's first one does: bridges take nothing from
// interfaces without carrier.
func (b *backend) announceAgain() {
	b.owed, b.repeat = false, time.Time{}
	if err := b.dev.(device.Announcer).Announce(b.mac); err != nil {
		b.log.Warn("the guest's address is not announced", "link", b.name, "error", err)
		return
	}
	atomic.AddUint64(&b.n.RARP, 1)
}

// setMTU serves NET_SET_MTU: what the guest is told. Frames of the interface's own MTU have to fit.
func (b *backend) setMTU(m *message) error {
	if err := b.negotiated(m, protoMTU); err != nil {
		return err
	}
	v, err := m.u64()
	if err != nil {
		return err
	}
	mtu := uint64(virtio.DecodeNetConfig(b.dev.Config()).MTU)
	if v < minMTU || v > mtu {
		return m.errorf(ErrValue, "an MTU of %d for the guest: %d to %d are possible, the MTU of this end's interface (--mtu)", v, minMTU, mtu)
	}
	return nil
}

// minMTU is the smallest MTU of a network device (virtio 1.2, 5.1.4.1).
const minMTU = 68

// retryFirst and retryMax bound the time between tries to start what the interface's loss has
// stopped.
const (
	retryFirst = 250 * time.Millisecond
	retryMax   = 4 * time.Second
)

// retry has what could not be started tried again, later with each time.
func (b *backend) retry() {
	switch {
	case b.pause == 0:
		b.pause = retryFirst
	case b.pause < retryMax:
		b.pause *= 2
	}
	b.again = time.Now().Add(b.pause)
}

// due returns when onTime has something to do, zero for never.
func (b *backend) due() time.Time {
	if b.repeat.IsZero() || !b.again.IsZero() && b.again.Before(b.repeat) {
		return b.again
	}
	return b.repeat
}

// onTime does what has become due.
func (b *backend) onTime() error {
	now := time.Now()
	if !b.repeat.IsZero() && !now.Before(b.repeat) {
		b.announceAgain()
	}
	if !b.again.IsZero() && !now.Before(b.again) {
		return b.tryAgain()
	}
	return nil
}

// tryAgain gives the device what it was given before, and starts what was started.
func (b *backend) tryAgain() error {
	b.again = time.Time{}
	if b.usable && !b.taken {
		if err := b.take(); err != nil {
			return b.suspend(err)
		}
	}
	if err := b.settle(true); err != nil {
		return err
	}
	if b.again.IsZero() {
		b.pause = 0
	}
	return nil
}
