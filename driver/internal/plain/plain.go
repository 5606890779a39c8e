// Package plain is what drivers of devices that need no great speed have in common: the way up to a running device, split
// virtqueues, goroutines that end with the device, and the methods of driver.Driver that only a network interface needs.
//
// It must not know what a device is for, nor what carries its requests.
package plain

import (
	"fmt"
	"sync"
	"time"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/driver"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/pci"
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/vring"
)

// Features are what all drivers of this package can use.
var Features = virtio.FeaturesOf(virtio.Version1, virtio.EventIdx)

// Config says which device is driven.
type Config struct {
	Name     string // "rng0": for errors and status
	Type     string // "entropy": for status
	Number   uint16 // device number on the link
	DeviceID uint32 // virtio device id
	Queues   int    // which the device is to call this side for
	Features virtio.Features
	Joined   string // what the device is joined to, for the log
	// Names returns the names of features; nil: Features.Names, which does not know those of each type of device.
	Names func(virtio.Features) []string
}

// Base is the part of a driver that does not depend on what the device is for.
type Base struct {
	c Config

	mu      sync.Mutex // guards what follows
	offered virtio.Features
	acked   virtio.Features
	status  uint32
	queues  []*Queue
	stop    *doorbell.Eventfd // nil: the device is down
	quit    chan struct{}     // closed with a ring of stop
	lastErr error
	ups     uint64
	broken  uint64

	loops sync.WaitGroup
}

// New returns the Base of a driver.
func New(c Config) *Base {
	if c.Names == nil {
		c.Names = virtio.Features.Names
	}
	return &Base{c: c}
}

// Session is a device on its way up.
type Session struct {
	b        *Base
	T        driver.Transport
	Accepted virtio.Features
	Stop     *doorbell.Eventfd // rung when the loops are to end: never to be acknowledged
	Quit     chan struct{}     // closed when the loops are to end

	m       driver.Layout
	broken  func(error)
	queues  []*Queue
	loops   []func() error
	started bool
}

// Up brings the device up (virtio 1.2, 3.1.1). setUp sets the queues up with s.Queue, and names the loops with s.Loop, which start
// when the device runs. broken hears of a loop that ends by an error.
func (b *Base) Up(t driver.Transport, m driver.Layout, broken func(error), setUp func(s *Session) error) error {
	st, err := t.SetStatus(0)
	if err == nil && st != 0 {
		err = fmt.Errorf("%s: the device does not reset: its status is %s", b.c.Name, virtio.StatusString(st))
	}
	if err != nil {
		return err
	}
	set := virtio.StatusAcknowledge | virtio.StatusDriver
	if _, err := t.SetStatus(set); err != nil {
		return err
	}
	s := &Session{b: b, T: t, Quit: make(chan struct{}), m: m, broken: broken}
	defer func() { // also where a fault of the memory tears this out
		if !s.started && s.Stop != nil {
			s.Stop.Close()
		}
	}()
	if err := b.up(s, set, setUp); err != nil {
		b.Failed(err)
		t.SetStatus(set | virtio.StatusFailed) // as far as possible: the device is told that we gave up on it
		return err
	}
	return nil
}

func (b *Base) up(s *Session, set uint32, setUp func(s *Session) error) error {
	offered, err := s.T.Features()
	if err != nil {
		return err
	}
	s.Accepted = offered.And(b.c.Features)
	b.mu.Lock()
	b.offered = offered
	b.mu.Unlock()
	if !s.Accepted.Has(virtio.Version1) {
		return fmt.Errorf("%s: the host does not offer version_1: it is no virtio 1.x device", b.c.Name)
	}
	if err := s.T.SetFeatures(s.Accepted); err != nil {
		return err
	}
	set |= virtio.StatusFeaturesOK
	st, err := s.T.SetStatus(set)
	if err != nil {
		return err
	}
	if st&virtio.StatusFeaturesOK == 0 {
		return fmt.Errorf("%s: the host refuses the features %s: see its log", b.c.Name, s.Accepted)
	}
	if s.Stop, err = doorbell.NewEventfd(); err != nil {
		return err
	}
	if err := setUp(s); err != nil {
		return err
	}
	set |= virtio.StatusDriverOK
	st, err = s.T.SetStatus(set)
	if err == nil && st&(virtio.StatusNeedsReset|virtio.StatusDriverOK) != virtio.StatusDriverOK {
		err = fmt.Errorf("%s: the host cannot start the device (status %s): see its log", b.c.Name, virtio.StatusString(st))
	}
	if err != nil {
		return err
	}
	b.mu.Lock()
	b.acked, b.status, b.queues, b.stop, b.quit, b.lastErr = s.Accepted, set, s.queues, s.Stop, s.Quit, nil
	b.ups++
	b.mu.Unlock()
	s.started = true // Down ends it from here on
	for _, f := range s.loops {
		b.loops.Add(1)
		go b.run(f, s.broken)
	}
	return nil
}

func (b *Base) run(f func() error, broken func(error)) {
	defer b.loops.Done()
	var err error
	if fault := pci.Guard(func() { err = f() }); fault != nil {
		err = fault
	}
	if err == nil {
		return
	}
	b.mu.Lock()
	b.lastErr = err
	b.broken++
	b.mu.Unlock()
	broken(err)
}

// Loop names a loop that is to run as long as the device does, until Stop is rung. One that ends by an error has the device
// reset and brought up again.
func (s *Session) Loop(f func() error) { s.loops = append(s.loops, f) }

// Pause waits for d, and tells whether the loops are to end.
func (s *Session) Pause(d time.Duration) (stopped bool) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return false
	case <-s.Quit:
		return true
	}
}

// Queue is a virtqueue, with what its loop sleeps on.
type Queue struct {
	*vring.SplitDriver
	Sleep *doorbell.Sleeper
	// Buffers are of one size, one for each request in flight: near their reader.
	Buffers []dma.Span
	// Bus counts this side's accesses across the bus, by what they are for.
	Bus *dma.QueueAccount

	name  string
	kick  doorbell.Ringer
	bells *doorbell.Counters
}

// Layout returns where the device's rings and buffers go.
func (s *Session) Layout() driver.Layout { return s.m }

// Queue sets queue i up, with up to size descriptors (a power of two), and a buffer of n bytes for each; without buffers where n is
// 0: then they are the driver's own, in memory of s.Layout, and its sleeps keep their place in Go's scheduler for a moment after work
// (doorbell.SleeperConfig.Doze), so its loop calls Sleep.Done at its end. toDriver: the device writes them. second, if not nil, is one more thing that ends its sleeps: that of another queue of the same loop.
func (s *Session) Queue(i int, name string, size uint16, n uint32, toDriver bool, second doorbell.Waiter) (*Queue, error) {
	name = s.b.c.Name + " " + name
	max, err := s.T.QueueMax(i)
	if err != nil {
		return nil, err
	}
	for size > max {
		size /= 2
	}
	if size == 0 {
		return nil, fmt.Errorf("%s: the host has no queue %d", name, i)
	}
	q := &Queue{name: name, kick: s.T.Kick(i), bells: new(doorbell.Counters), Bus: new(dma.QueueAccount)}
	c := vring.Config{Name: name, Size: size, EventIdx: s.Accepted.Has(virtio.EventIdx)}
	descLen, driverLen, deviceLen := vring.SplitSizes(size)
	buffers := s.m.Far
	if toDriver {
		buffers = s.m.Near
	}
	var all dma.Span
	for _, a := range []struct {
		to   *dma.Span
		m    *driver.Memory
		n    uint64
		acct *dma.Account
	}{{&c.Desc, s.m.Far, descLen, &q.Bus.Descriptor}, {&c.Driver, s.m.Far, driverLen, &q.Bus.Driver},
		{&c.Device, s.m.Near, deviceLen, &q.Bus.Device}, {&all, buffers, uint64(size) * uint64(n), &q.Bus.Payload}} {
		if a.n == 0 {
			continue
		}
		sp, err := a.m.Take(name, a.n, 64)
		if err != nil {
			return nil, err
		}
		*a.to = sp.Accounted(a.acct)
	}
	c.PayloadKind = mmio.Stronger(s.m.Near.Region.Mem.Kind(), s.m.Far.Region.Mem.Kind())
	if q.SplitDriver, err = vring.NewSplitDriver(c); err != nil {
		return nil, err
	}
	for k := uint32(0); k < uint32(size) && n > 0; k++ {
		q.Buffers = append(q.Buffers, all.Sub(k*n, n))
	}
	if err := s.T.SetQueue(i, size, c.Desc.Addr(), c.Driver.Addr(), c.Device.Addr()); err != nil {
		return nil, err
	}
	q.Sleep = doorbell.NewSleeper(doorbell.SleeperConfig{Doorbell: s.T.Call(i), Second: second, Stop: s.Stop, Counters: q.bells, Doze: n == 0})
	s.queues = append(s.queues, q)
	return q, nil
}

// Offer makes requests available and kicks the device if it asks for that. There is room for them.
func (q *Queue) Offer(reqs ...vring.Request) error {
	n, err := q.Add(reqs)
	if err == nil && n < len(reqs) {
		err = fmt.Errorf("%s: %d requests, and room for %d", q.name, len(reqs), n)
	}
	if err != nil {
		return err
	}
	if q.NeedKick() {
		q.Kick()
	}
	return nil
}

// Kick kicks the device: what NeedKick asks for. It does not block, and any goroutine may call it.
func (q *Queue) Kick() {
	_ = doorbell.NoWait(q.kick).Ring() // one that is lost is made good by the device's polling
}

// Read is the request that buffer i be written by the device.
func (q *Queue) Read(i uint32) vring.Request {
	b := q.Buffers[i]
	return vring.Request{Bufs: []vring.Buffer{{Addr: b.Addr(), Len: b.Len}}, Token: i}
}

// Write is the request that the first n bytes of buffer i be read by the device.
func (q *Queue) Write(i, n uint32) vring.Request {
	return vring.Request{Bufs: []vring.Buffer{{Addr: q.Buffers[i].Addr(), Len: n}}, Readable: 1, Token: i}
}

// Down stops the loops. The rings stay as they are: the device may still look at them. It is idempotent.
func (b *Base) Down() {
	b.mu.Lock()
	stop := b.stop
	if stop != nil && b.quit != nil {
		close(b.quit)
		b.quit = nil
		stop.Ring() // cannot fail: it is this program's alone
	}
	b.mu.Unlock()
	if stop == nil {
		return
	}
	b.loops.Wait()
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.stop == stop { // else another call, at the same time, has come first
		stop.Close()
		b.stop, b.status, b.acked = nil, 0, virtio.Features{}
	}
}

// Describe returns the status of the device.
func (b *Base) Describe() status.Device {
	b.mu.Lock()
	defer b.mu.Unlock()
	d := status.Device{Name: b.c.Name, Type: b.c.Type, Number: b.c.Number, Interface: b.c.Joined, Status: virtio.StatusString(b.status),
		Offered: b.c.Names(b.offered), Allowed: b.c.Names(b.c.Features), Negotiated: b.c.Names(b.acked),
		Counters: map[string]uint64{"ups": b.ups, "broken": b.broken}}
	if b.lastErr != nil {
		d.LastError = b.lastErr.Error()
	}
	for i, q := range b.queues {
		st, n := q.State(), q.Stats().Load()
		qs := status.Queue{Index: i, Name: q.name, Ready: b.stop != nil, Size: uint16(q.Size()), Avail: st.Avail, Used: st.Used,
			Ring: status.Counters(n), Doorbell: status.Counters(q.bells.Snapshot())}
		q.Bus.Describe(&qs, n.Done)
		d.Queues = append(d.Queues, qs)
	}
	return d
}

// Features returns the features that the device offered, that the driver can use, and that were accepted; those of the last time
// that the device was asked.
func (b *Base) Features() (offered, allowed, accepted virtio.Features) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.offered, b.c.Features, b.acked
}

// Memory implements driver.Small: a page is enough for the rings and buffers of a few requests.
func (b *Base) Memory(uint64) uint64 { return 4096 }

// Failed implements driver.Driver.
func (b *Base) Failed(err error) {
	b.mu.Lock()
	b.lastErr = err
	b.mu.Unlock()
}

// Name implements driver.Driver.
func (b *Base) Name() string { return b.c.Name }

// Number implements driver.Driver.
func (b *Base) Number() uint16 { return b.c.Number }

// DeviceID implements driver.Driver.
func (b *Base) DeviceID() uint32 { return b.c.DeviceID }

// Joined implements driver.Driver.
func (b *Base) Joined() string { return b.c.Joined }

// Doorbells implements driver.Driver.
func (b *Base) Doorbells() int { return b.c.Queues }

// Pairs implements driver.Driver.
func (b *Base) Pairs() (int, bool) { return 1, true }

// LimitPairs implements driver.Driver.
func (b *Base) LimitPairs(int) {}

// Reconfigure implements driver.Driver.
func (b *Base) Reconfigure(driver.Transport) error { return nil }

// OnChange implements driver.Driver.
func (b *Base) OnChange(func()) {}

// LinkUp implements driver.Driver.
func (b *Base) LinkUp() bool { return true }

// Remade implements driver.Driver.
func (b *Base) Remade() bool { return false }

// Warning implements driver.Driver.
func (b *Base) Warning() string { return "" }

// ShortOf implements driver.Driver.
func (b *Base) ShortOf() string { return "" }

// Unmet implements driver.Driver.
func (b *Base) Unmet() []string { return nil }
