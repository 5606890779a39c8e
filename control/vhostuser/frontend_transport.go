package vhostuser

import (
	"errors"
	"fmt"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/driver"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/vring"
)

// wantedProto are the protocol features that the front end makes use of.
const wantedProto = protoMQ | protoReplyAck | protoMTU | protoConfig | protoStatus

// packedBase is the vring base of a packed queue that starts anew: both positions 0, both wrap
// counters 1.
const packedBase = 0x80008000

// transport is the device of one connected back end, as its driver reaches it. It belongs to the
// front end's goroutine.
//
// The back end has no notion of a driver that resets its device and sets it up: until DRIVER_OK the
// transport just takes note of what it is told, and sends what it takes to start all queues then. A
// reset stops them by GET_VRING_BASE.
type transport struct {
	b    *backConn
	name string // of the link, for errors
	n    *frontCounters
	mem  *sharedMemory
	mtu  func() int   // of the driver's interface
	warn func(string) // hears of what the device has to do without

	offered    uint64 // by the back end, with bit 30
	proto      uint64 // protocol features in use
	pairs      int    // that the back end has
	noConfig   bool   // it offered CONFIG, and has no configuration space to give
	accepted   virtio.Features
	status     uint32
	queues     map[int]*sharedQueue // by index
	running    bool                 // the queues were started
	errs       *doorbell.Eventfd    // that the back end rings when it finds a queue broken; all queues have the same
	refusedMTU int                  // that the back end was told of last, and refused
}

// sharedQueue is a queue as the driver laid it out.
type sharedQueue struct {
	size                 uint16
	desc, driver, device dma.Addr
	set                  bool // since the last reset
	started              bool // the back end was told of it
	kick, call           *doorbell.Eventfd
}

var (
	_ driver.Transport = (*transport)(nil)
	_ driver.Enabler   = (*transport)(nil)
)

// newEventfd makes an eventfd that the back end gets too: it may fill it, and make it block.
func newEventfd() (*doorbell.Eventfd, error) {
	fd, err := unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	e, err := doorbell.FromFD(fd)
	if err != nil {
		closeFD(fd)
	}
	return e, err
}

// negotiate asks a back end that has just been connected what it is.
func (t *transport) negotiate() (err error) {
	if t.offered, err = t.b.askU64(GetFeatures); err != nil {
		return err
	}
	t.pairs = 1
	if t.offered&featProtocol != 0 {
		p, err := t.b.askU64(GetProtocolFeatures)
		if err != nil {
			return err
		}
		t.proto = p & wantedProto
		if err := t.b.tell(SetProtocolFeatures, encodeU64(t.proto)); err != nil {
			return err
		}
		t.b.acks = t.proto&protoReplyAck != 0
	}
	if t.proto&protoMQ != 0 {
		n, err := t.b.askU64(GetQueueNum)
		if err != nil {
			return err
		}
		if n == 0 {
			atomic.AddUint64(&t.n.Malformed, 1)
			return t.b.fail(&Error{Request: GetQueueNum, Code: ErrValue, Detail: "it has no queues at all"})
		}
		if t.pairs = maxPairs; n < maxPairs {
			t.pairs = int(n)
		}
	}
	if t.errs, err = newEventfd(); err != nil {
		return err
	}
	return t.b.tell(SetOwner, nil)
}

// close ends the use of the memory and the doorbells: the driver is down.
func (t *transport) close() {
	t.b.close()
	for _, q := range t.queues {
		_ = q.kick.Close()
		_ = q.call.Close()
	}
	if t.errs != nil {
		_ = t.errs.Close()
	}
	t.mem.close()
}

// Features implements driver.Transport. Left out is what a front end does by itself: the control
// queue, and the configuration space unless the back end has one.
func (t *transport) Features() (virtio.Features, error) {
	f := virtio.FeaturesFromMask(t.offered &^ (featProtocol | featLogAll))
	f = f.Without(virtio.FeaturesOf(virtio.AccessPlatform, virtio.NetCtrlVQ))
	if !t.hasConfig() {
		f = f.Without(virtio.FeaturesOf(virtio.NetMAC, virtio.NetStatus))
		if t.proto&protoMTU == 0 {
			f.Clear(virtio.NetMTU)
		}
	}
	if t.proto&protoMQ == 0 || t.pairs < 2 {
		f.Clear(virtio.NetMQ)
	}
	return f, nil
}

// hasConfig tells whether the back end has a configuration space.
func (t *transport) hasConfig() bool { return t.proto&protoConfig != 0 && !t.noConfig }

// SetFeatures implements driver.Transport.
func (t *transport) SetFeatures(f virtio.Features) error {
	offered, err := t.Features()
	if err != nil {
		return err
	}
	if more := f.Without(offered); more != (virtio.Features{}) {
		return fmt.Errorf("%s: %s were not offered", t.name, more)
	}
	if err := t.b.tell(SetFeatures, encodeU64(f.Mask()|t.offered&featProtocol)); err != nil {
		return err
	}
	t.accepted = f
	if t.proto&protoMTU == 0 || !f.Has(virtio.NetMTU) {
		return nil
	}
	mtu := t.mtu()
	switch err := t.b.tell(NetSetMTU, encodeU64(uint64(mtu))); {
	case errors.Is(err, ErrRefused):
		if t.refusedMTU != mtu {
			t.refusedMTU = mtu
			t.warn(fmt.Sprintf("the back end refuses an MTU of %d: frames that are longer than its own MTU may be lost; give both ends the same (--mtu)", mtu))
		}
		return nil
	default:
		return err
	}
}

// Config implements driver.Transport. Where the back end has no configuration space, it is made up
// here.
func (t *transport) Config(off, n uint32) ([]byte, error) {
	c := virtio.NetConfig{LinkUp: true, MaxQueuePairs: uint16(t.pairs), MTU: uint16(t.mtu())}
	if !t.hasConfig() {
		b := c.Encode()
		if uint64(off)+uint64(n) > uint64(len(b)) {
			return nil, fmt.Errorf("%s: %d bytes of configuration at %d: there are %d", t.name, n, off, len(b))
		}
		return append([]byte(nil), b[off:off+n]...), nil
	}
	m, err := t.b.ask(GetConfig, config{offset: off, data: make([]byte, n)}.encode())
	if err != nil {
		return nil, err
	}
	if len(m.payload) == 0 { // how a back end says that it cannot (specification, GET_CONFIG)
		t.noConfig = true
		return nil, m.errorf(ErrRefused, "it has no %d bytes at %d: it is used without a configuration space", n, off)
	}
	got, err := m.config()
	if err == nil && (got.offset != off || len(got.data) != int(n)) {
		err = m.errorf(ErrLength, "%d bytes at %d, %d at %d were asked for", len(got.data), got.offset, n, off)
	}
	if err != nil {
		atomic.AddUint64(&t.n.Malformed, 1)
		return nil, t.b.fail(err)
	}
	return got.data, nil
}

// WriteConfig implements driver.Transport.
func (t *transport) WriteConfig(off uint32, b []byte) error {
	if !t.hasConfig() {
		return fmt.Errorf("%s: the back end has no configuration space", t.name)
	}
	return t.b.tell(SetConfig, config{offset: off, data: b}.encode())
}

// SetStatus implements driver.Transport.
func (t *transport) SetStatus(s uint32) (uint32, error) {
	if s == 0 {
		if err := t.rest(); err != nil {
			return t.status, err
		}
		for _, q := range t.queues {
			q.set = false
		}
		return 0, nil
	}
	if s&virtio.StatusDriverOK != 0 && !t.running {
		if err := t.start(); err != nil {
			return t.status, err
		}
	}
	if err := t.tellStatus(s); err != nil {
		return t.status, err
	}
	if t.proto&protoStatus != 0 {
		now, err := t.b.askU64(GetStatus)
		if err != nil {
			return t.status, err
		}
		// What back ends make of the other bits differs; this one tells that the device cannot go
		// on.
		t.status |= uint32(now) & virtio.StatusNeedsReset
	}
	return t.status, nil
}

// tellStatus tells the back end the device status, where it wants to know.
func (t *transport) tellStatus(s uint32) error {
	t.status = s
	if t.proto&protoStatus == 0 {
		return nil
	}
	return t.b.tell(SetStatus, encodeU64(uint64(s)))
}

// start shows the back end the memory, and starts all queues that are set up.
func (t *transport) start() error {
	if err := t.b.tell(SetMemTable, t.mem.table(), t.mem.fd); err != nil {
		return err
	}
	t.running = true // rest is to stop what was started
	for i := 0; i < 2*t.pairs; i++ {
		q := t.queues[i]
		if q == nil || !q.set {
			continue
		}
		base := uint32(0)
		if t.accepted.Has(virtio.RingPacked) {
			base = packedBase
		}
		q.started = true
		for _, s := range []struct {
			req     Request
			payload []byte
			fds     []int
		}{
			{SetVringNum, vringState{uint32(i), uint32(q.size)}.encode(), nil},
			{SetVringBase, vringState{uint32(i), base}.encode(), nil},
			{SetVringAddr, vringAddr{index: uint32(i), desc: uint64(q.desc), used: uint64(q.device), avail: uint64(q.driver)}.encode(), nil},
			{SetVringErr, encodeU64(uint64(i)), []int{t.errs.FD()}},
			{SetVringCall, encodeU64(uint64(i)), []int{q.call.FD()}},
			{SetVringKick, encodeU64(uint64(i)), []int{q.kick.FD()}},
		} {
			if err := t.b.tell(s.req, s.payload, s.fds...); err != nil {
				return fmt.Errorf("queue %d of %d descriptors: %w", i, q.size, err)
			}
		}
	}
	if t.b.acks {
		return nil
	}
	// Nothing was acknowledged: any answer tells that the back end has read it all.
	_, err := t.b.askU64(GetFeatures)
	return err
}

// EnableQueue implements driver.Enabler.
func (t *transport) EnableQueue(i int, on bool) error {
	if t.offered&featProtocol == 0 {
		return nil // queues are enabled from their start on (specification, "Ring states")
	}
	s := vringState{index: uint32(i)}
	if on {
		s.num = 1
	}
	return t.b.tell(SetVringEnable, s.encode())
}

// rest stops all queues. On return without an error the back end uses neither the memory nor the
// doorbells until they are started again; after an error the connection is of no use.
func (t *transport) rest() error {
	if t.running {
		for i := 0; i < 2*t.pairs; i++ {
			q := t.queues[i]
			if q == nil || !q.started {
				continue
			}
			if err := t.stop(uint32(i), q); err != nil {
				return t.b.fail(err)
			}
			q.started = false
		}
		t.running = false
	}
	if err := t.tellStatus(0); err != nil {
		return t.b.fail(err)
	}
	return nil
}

// stop stops a queue. Where the back end stopped does not matter: the driver sets the queue up
// anew. What it says is checked all the same, as it tells of a back end that does not follow the
// protocol.
func (t *transport) stop(i uint32, q *sharedQueue) error {
	m, err := t.b.ask(GetVringBase, vringState{index: i}.encode())
	if err != nil {
		return err
	}
	s, err := m.vringState()
	if err == nil && s.index != i {
		err = m.errorf(ErrQueue, "the base of queue %d, that of %d was asked for", s.index, i)
	}
	if err == nil && t.accepted.Has(virtio.RingPacked) {
		if _, berr := vring.PackedStateFromBase(vring.Config{Size: q.size}, s.num); berr != nil {
			err = m.errorf(ErrQueue, "queue %d: %v", i, berr)
		}
	} else if err == nil && s.num > 0xffff {
		err = m.errorf(ErrQueue, "base %#x of queue %d: an index has 16 bits", s.num, i)
	}
	if err != nil {
		atomic.AddUint64(&t.n.Malformed, 1)
	}
	return err
}

// QueueMax implements driver.Transport. A back end does not tell how large its queues may be:
// SET_VRING_NUM fails where one is too large.
func (t *transport) QueueMax(i int) (uint16, error) {
	if i >= 2*t.pairs {
		return 0, nil
	}
	return 1 << 15, nil
}

// SetQueue implements driver.Transport.
func (t *transport) SetQueue(i int, size uint16, desc, driver, device dma.Addr) error {
	if i < 0 || i >= 2*t.pairs {
		return fmt.Errorf("%s: queue %d: the back end has %d", t.name, i, 2*t.pairs)
	}
	q := t.queues[i]
	if q == nil {
		q = new(sharedQueue)
		var err error
		if q.kick, err = newEventfd(); err != nil {
			return err
		}
		if q.call, err = newEventfd(); err != nil {
			_ = q.kick.Close()
			return err
		}
		t.queues[i] = q
	}
	q.size, q.desc, q.driver, q.device, q.set = size, desc, driver, device, true
	return nil
}

// Kick implements driver.Transport, for queues that are set.
func (t *transport) Kick(i int) doorbell.Ringer {
	return t.queues[i].kick
}

// Call implements driver.Transport, for queues that are set.
func (t *transport) Call(i int) doorbell.Waiter {
	return t.queues[i].call
}
