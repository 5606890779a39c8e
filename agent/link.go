package agent

import (
	"context"
	"errors"
	"fmt"
	"sort"
	"sync"
	"sync/atomic"
	"time"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/control/msgdrv"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/driver"
	"github.com/boardlink/boardlink/pci"
	"github.com/boardlink/boardlink/session"
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/tunbridge"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/virtiomsg"
)

// Where things lie in the window; the link page tells the host (docs/wire.md).
const (
	offAgentToHost = 1 * virtiomsg.PageSize
	offHostToAgent = 2 * virtiomsg.PageSize
	offHeap        = 3 * virtiomsg.PageSize // rings and buffers, to the end of the window
)

// A device that does not come up is tried again after retryMin, then twice as long, up to retryMax.
const (
	retryMin = 50 * time.Millisecond
	retryMax = 5 * time.Second
)

// Config describes the agent's end of a link.
type Config struct {
	Name  string // for log and status
	Board string // spec: "loopback:/run/a.sock"
	// Options are how the board is opened; Side is filled in.
	Options board.Options
	// Placement is where rings and buffers are to lie: "window" (all in the board's memory), "push" (each
	// where its reader is), "auto" or "" (push where the host declares a pool).
	Placement string
	// Devices are what this side drives, where the host offers it.
	Devices []driver.Driver
	Log     session.Logger
	// Beat, LostBeats, NoInterrupts, Pace: see session.Config.
	Beat         time.Duration
	LostBeats    int
	NoInterrupts bool
	Pace         session.Pace
	// Slots is how many messages each of the two FIFOs holds, 1 to virtiomsg.MaxSlots; 0 means as many
	// as there is room for.
	Slots uint32
}

// Link is the agent's end of a link: it brings up what the host offers.
type Link struct {
	n linkCounters // first: 64-bit alignment

	cfg    Config
	s      *session.Session
	region *dma.Region // the heap, in the board's memory
	devs   []*device

	mu   sync.Mutex
	pool *dma.Region // the host's memory, across the bus; nil in placement window
}

type linkCounters struct {
	BringUps  uint64 // devices brought up
	Failures  uint64 // attempts that failed
	HostReset uint64 // devices that the host put to NEEDS_RESET
	Broken    uint64 // queues in which the host broke the rules
	Changes   uint64 // changed configurations that were applied
	Damped    uint64 // changes of a configuration that were left to the next one to apply
}

// device is one device's place on the link.
type device struct {
	l       *Link
	n       driver.Driver
	index   int // its share of the heap
	up      bool
	absent  bool // told that the host does not offer it
	next    time.Time
	since   time.Time // up
	backoff time.Duration
	failed  chan error // of its loops
	toldUp  bool       // what the host was told of the interface
	logged  string     // the last error that was logged
	unmet   []string   // what was unmet when the device came up last
	changed bool       // the host has told of a configuration that was not read yet
	changes session.Bucket
	short   string // what is left out for want of room, as it was logged
}

// NewLink returns the end of a link; Run runs it.
func NewLink(c Config) *Link {
	c.Log, c.Pace = session.Limit(c.Log), c.Pace.Defaults()
	if c.Slots == 0 || c.Slots > virtiomsg.MaxSlots {
		c.Slots = virtiomsg.MaxSlots
	}
	l := &Link{cfg: c}
	ds := append([]driver.Driver(nil), c.Devices...)
	sort.Slice(ds, func(i, j int) bool { return ds[i].Number() < ds[j].Number() })
	for i, n := range ds {
		l.devs = append(l.devs, &device{l: l, n: n, index: i, failed: make(chan error, n.Doorbells()+1),
			changes: session.NewBucket(c.Pace.Changes)})
	}
	c.Options.Side = board.Agent
	l.s = session.New(session.Config{Name: c.Name, Spec: c.Board, Options: c.Options, Log: c.Log,
		Beat: c.Beat, LostBeats: c.LostBeats, NoInterrupts: c.NoInterrupts, Pace: c.Pace, Handler: (*handler)(l)})
	for _, d := range l.devs {
		d.n.OnChange(l.s.Wake)
	}
	return l
}

// Open opens the board, so that what is wrong with it shows before Run, which has to follow where
// this succeeds. An absent board is no error, nor is the end of ctx.
func (l *Link) Open(ctx context.Context) error { return l.s.Open(ctx) }

// Run keeps the link going until ctx ends, and closes the devices. Errors are those of the
// board; a peer cannot cause any.
func (l *Link) Run(ctx context.Context) error {
	err := l.s.Run(ctx)
	if errors.Is(err, session.ErrStuck) {
		return err // loops may still run
	}
	for _, d := range l.devs {
		if cerr := d.n.Close(); cerr != nil && err == nil {
			err = cerr
		}
	}
	return err
}

// Status describes the link for an operator. Any goroutine may call it.
func (l *Link) Status() status.Link {
	s := l.s.Status()
	for k, v := range status.Counters(linkCounters{
		BringUps: atomic.LoadUint64(&l.n.BringUps), Failures: atomic.LoadUint64(&l.n.Failures),
		HostReset: atomic.LoadUint64(&l.n.HostReset), Broken: atomic.LoadUint64(&l.n.Broken),
		Changes: atomic.LoadUint64(&l.n.Changes), Damped: atomic.LoadUint64(&l.n.Damped)}) {
		s.Counters[k] = v
	}
	s.Placement = "window"
	l.mu.Lock()
	if l.pool != nil {
		s.Placement = "push"
		s.Regions = session.RegionStatus([]dma.Region{*l.pool})
	}
	l.mu.Unlock()
	s.Devices = []status.Device{}
	for _, d := range l.devs {
		s.Devices = append(s.Devices, d.n.Status())
	}
	session.SumBus(&s)
	return s
}

// handler is what the session sees of a Link.
type handler Link

func (l *handler) Queues() []session.QueueID {
	var qs []session.QueueID
	for _, d := range l.devs {
		// Not the control queue, whose number depends on the host: it has one answer to wait for, and polls.
		for i := 0; i < d.n.Doorbells(); i++ {
			qs = append(qs, session.QueueID{Dev: d.n.Number(), Queue: i})
		}
	}
	return qs
}

// limitPairs lowers the number of pairs of devices for which the operator did not choose it, so that further pairs do not share the
// doorbells of the first ones, where those have them to themselves.
func (l *handler) limitPairs(vectors uint32) {
	most := 1
	for _, d := range l.devs {
		if n, chosen := d.n.Pairs(); !chosen && n > most {
			most = n
		}
	}
	best := l.alone(vectors, 1)
	for most > 1 && l.alone(vectors, most) < best {
		most--
	}
	l.alone(vectors, most)
}

// alone sets the number of pairs where the operator did not choose it, and returns how many queues of first pairs have a vector to
// themselves then.
func (l *handler) alone(vectors uint32, pairs int) int {
	users := map[uint32]int{}
	for _, d := range l.devs {
		n, chosen := d.n.Pairs()
		if !chosen && n > pairs {
			n = pairs
		}
		d.n.LimitPairs(n)
		for q := 0; q < 2*n; q++ {
			users[virtiomsg.Vector(d.n.Number(), uint32(q), vectors)]++
		}
	}
	own := 0
	for _, d := range l.devs {
		for q := uint32(0); q < 2; q++ {
			if users[virtiomsg.Vector(d.n.Number(), q, vectors)] == 1 {
				own++
			}
		}
	}
	return own
}

// Declare implements session.Handler: everything behind the FIFOs is for rings and buffers.
func (l *handler) Declare(b board.Board) (virtiomsg.Declaration, error) {
	// The pool of the board that was open before is not mapped any more.
	l.mu.Lock()
	l.pool = nil
	l.mu.Unlock()
	l.limitPairs(b.Self().Vectors)
	w := b.Window()
	size := w.Mem.Size() &^ (virtiomsg.RegionAlign - 1)
	if size < offHeap+virtiomsg.PageSize {
		return virtiomsg.Declaration{}, fmt.Errorf("board %s: a window of %d bytes has no room behind link page and FIFOs (%d)", b, w.Mem.Size(), offHeap)
	}
	m, err := w.Mem.Slice(offHeap, size-offHeap)
	if err != nil {
		return virtiomsg.Declaration{}, err
	}
	l.region = &dma.Region{Name: "heap", Addr: w.Addr + offHeap, Mem: m, Access: dma.DeviceRead | dma.DeviceWrite,
		Across: w.Across, Account: w.Account}
	return virtiomsg.Declaration{
		Features:        virtiomsg.FeatureLinkState,
		FIFOAgentToHost: offAgentToHost, FIFOHostToAgent: offHostToAgent,
		SlotsAgentToHost: l.cfg.Slots, SlotsHostToAgent: l.cfg.Slots,
		Regions: []virtiomsg.Region{{Addr: l.region.Addr, Size: m.Size(), Offset: offHeap, Access: l.region.Access}},
	}, nil
}

// Up implements session.Handler: all devices are to come up, at once.
func (l *handler) Up() {
	r, err := l.reach()
	if err != nil {
		l.cfg.Log.Warn("no placement push", "link", l.cfg.Name, "error", err)
	}
	l.mu.Lock()
	l.pool = r
	l.mu.Unlock()
	for _, d := range l.devs {
		d.next, d.backoff, d.absent = time.Time{}, 0, false
	}
}

// reach returns the host's pool as this side reaches it; nil in placement window.
func (l *handler) reach() (*dma.Region, error) {
	if l.cfg.Placement == "window" {
		return nil, nil
	}
	pools := l.s.Peer().Pool
	b, ok := l.s.Board().(board.Pooled)
	var there dma.Region
	if ok {
		there, ok = b.Pool()
	}
	if len(pools) == 0 || !ok {
		if l.cfg.Placement == "push" {
			return nil, errors.New("the host declares no memory that this board reaches: everything goes into the window")
		}
		return nil, nil
	}
	p := pools[0]
	m, err := there.Mem.Slice(p.Bus-uint64(there.Addr), p.Size)
	if err != nil || p.Bus < uint64(there.Addr) {
		return nil, fmt.Errorf("the host's pool of %#x bytes at bus address %#x is not what this board reaches (%#x bytes at %#x)",
			p.Size, p.Bus, there.Mem.Size(), uint64(there.Addr))
	}
	if p.Access != dma.DeviceRead|dma.DeviceWrite {
		return nil, fmt.Errorf("the host's pool is for access %s only", p.Access)
	}
	there.Name, there.Addr, there.Mem = "pool", p.Link, m
	return &there, nil
}

// Down implements session.Handler.
func (l *handler) Down() {
	for _, d := range l.devs {
		d.down()
	}
	if l.pool != nil {
		// The promise of Quiesced: what was written across the bus has landed, which a read from
		// there makes sure of.
		pci.Guard(func() { l.pool.Mem.Load32(0) }) // where the bus is gone, nothing lands any more
		l.pool.Account.AddFlushReads(1)
	}
}

// Tick takes broken devices down and brings up what is not up.
func (l *handler) Tick() {
	for _, d := range l.devs {
		select {
		case err := <-d.failed:
			if errors.Is(err, pci.ErrGone) || errors.Is(err, tunbridge.ErrFault) {
				l.s.Fault(err)
				return
			}
			if d.up && errors.Is(err, tunbridge.ErrGone) {
				d.down() // whoever looks after the interface tells of it
				d.later()
			} else if d.up {
				atomic.AddUint64(&l.n.Broken, 1)
				d.l.cfg.Log.Warn("device broken, resetting it", "link", l.cfg.Name, "device", d.n.Name(), "error", err)
				d.down()
				d.later()
			}
		default:
		}
		if d.up && d.changed {
			if l.reconfigure(d); !l.s.Up() {
				return
			}
		}
		d.tellLink()
		if d.n.Remade() {
			d.next, d.backoff = time.Time{}, 0
		}
		if d.up || time.Now().Before(d.next) {
			continue
		}
		err := d.bringUp()
		if err == nil {
			atomic.AddUint64(&l.n.BringUps, 1)
			continue
		}
		d.down()
		if errors.Is(err, virtiomsg.ErrDown) {
			return // the link went down under us
		}
		if errors.Is(err, session.ErrTimeout) {
			// What the host does with our memory is not known any more.
			l.s.Reset()
		}
		atomic.AddUint64(&l.n.Failures, 1)
		d.later()
		d.n.Failed(err)
		if s := sameError(err); s != d.logged {
			d.logged = s
			l.cfg.Log.Warn("device does not come up", "link", l.cfg.Name, "device", d.n.Name(), "error", err, "again_in", d.backoff.String())
		}
	}
}

// sameError returns what is the same whenever the same thing fails: without tokens.
func sameError(err error) string {
	var m *virtiomsg.MessageError
	if errors.As(err, &m) {
		c := *m
		c.Header.Token = 0
		return c.Error()
	}
	return err.Error()
}

// later puts the next attempt off: the further, the sooner the device broke down again.
func (d *device) later() {
	if !d.since.IsZero() && time.Since(d.since) > retryMax {
		d.backoff = 0
	}
	d.since = time.Time{}
	d.backoff *= 2
	if d.backoff < retryMin {
		d.backoff = retryMin
	}
	if d.backoff > retryMax {
		d.backoff = retryMax
	}
	d.next = time.Now().Add(d.backoff)
}

func (d *device) down() {
	d.l.s.Stopping(d.n.Down)
	d.up, d.changed = false, false
	for {
		select {
		case <-d.failed:
		default:
			return
		}
	}
}

func (d *device) bringUp() error {
	t := msgdrv.New(messages{d.l.s}, d.n.Number(), d.n.Name())
	there, err := t.Exists()
	if err != nil {
		return err
	}
	if !there {
		return fmt.Errorf("%s: the host offers no device %d", d.n.Name(), d.n.Number())
	}
	if err := t.Check(d.n.DeviceID()); err != nil {
		return err
	}
	// The device is reset before anything is allocated: it knows none of this memory.
	near := d.share(d.l.region)
	m := driver.Layout{Near: near, Far: near, Devices: len(d.l.devs)}
	if d.l.pool != nil {
		m.Far = d.share(d.l.pool)
	}
	if err := d.n.Up(t, m, d.broken); err != nil {
		return err
	}
	d.up, d.since, d.logged, d.changed, d.toldUp = true, time.Now(), "", false, true // as the host takes it after a reset
	d.tellWarning()
	d.tellLink()
	d.l.cfg.Log.Info("device up", "link", d.l.cfg.Name, "device", d.n.Name(), "interface", d.n.Joined())
	d.tellUnmet()
	if s := d.n.ShortOf(); s != d.short {
		if d.short = s; s != "" {
			d.l.cfg.Log.Warn("the memory is small", "link", d.l.cfg.Name, "device", d.n.Name(), "note", s)
		}
	}
	return nil
}

// share returns the device's part of a region.
func (d *device) share(r *dma.Region) *driver.Memory {
	return driver.Share(r, d.index, len(d.l.devs))
}

// broken is told by the loops.
func (d *device) broken(err error) {
	select {
	case d.failed <- err:
	default:
	}
	d.l.s.Wake()
}

// Message takes the host's events.
func (l *handler) Message(h virtiomsg.Header, m *virtiomsg.Slot) {
	if h.Bus() {
		switch h.ID {
		case virtiomsg.BusPing:
			data, err := virtiomsg.DecodePing(m)
			if err != nil {
				l.Malformed(m, err)
				return
			}
			virtiomsg.EncodePong(m, h.Token, data)
			l.s.Send(m)
		case virtiomsg.BusEventDevice:
			var e virtiomsg.DeviceEvent
			if err := e.Decode(m); err != nil {
				l.Malformed(m, err)
				return
			}
			for _, d := range l.devs {
				if d.n.Number() != e.Dev {
					continue
				}
				if e.State == virtiomsg.DeviceRemoved && d.up {
					d.down()
					d.later()
				}
				if soon := time.Now().Add(retryMin); e.State == virtiomsg.DeviceReady && d.next.After(soon) {
					d.next = soon // not at once: a host may send this without end
				}
			}
		}
		return
	}
	if h.ID != virtiomsg.EventConfig {
		return // EVENT_USED: the doorbell or the poll fallback tells the same
	}
	var e virtiomsg.ConfigEvent
	if err := e.Decode(m); err != nil {
		l.Malformed(m, err)
		return
	}
	for _, d := range l.devs {
		if d.n.Number() != h.Dev || !d.up {
			continue
		}
		if e.Status&virtio.StatusNeedsReset != 0 {
			atomic.AddUint64(&l.n.HostReset, 1)
			l.cfg.Log.Warn("the host asks for a reset of the device", "link", l.cfg.Name, "device", d.n.Name())
			d.down()
			d.later()
			continue
		}
		if d.changed {
			atomic.AddUint64(&l.n.Damped, 1)
		}
		d.changed = true
		l.reconfigure(d)
	}
}

// reconfigure applies a configuration that has changed, unless that has been done too often lately:
// then Tick does it, once for all that has changed until then. Who listens to the interface hears of
// each change.
func (l *handler) reconfigure(d *device) {
	now := time.Now()
	if d.changes.Wait(now) > 0 {
		return
	}
	d.changes.Take(now, 1)
	d.changed = false
	atomic.AddUint64(&l.n.Changes, 1)
	t := msgdrv.New(messages{l.s}, d.n.Number(), d.n.Name())
	err := d.n.Reconfigure(t)
	d.tellWarning()
	if err != nil && !errors.Is(err, virtiomsg.ErrDown) {
		if errors.Is(err, session.ErrTimeout) {
			l.s.Reset() // as in Tick
		}
		l.cfg.Log.Warn("the device's new configuration cannot be used", "link", l.cfg.Name, "device", d.n.Name(), "error", err)
	}
}

// Malformed implements session.Handler: a host that talks nonsense is shaken hands with anew.
func (l *handler) Malformed(m *virtiomsg.Slot, err error) {
	l.cfg.Log.Warn("a message makes no sense", "link", l.cfg.Name, "error", err)
	l.s.Reset()
}

// messages is a session as the transports of its devices see it.
type messages struct{ *session.Session }

// Kick implements msgdrv.Link.
func (m messages) Kick(dev uint16, queue int) doorbell.Ringer {
	return m.Ringer(session.QueueID{Dev: dev, Queue: queue})
}

// Called implements msgdrv.Link.
func (m messages) Called(dev uint16, queue int) doorbell.Waiter {
	return m.Waiter(session.QueueID{Dev: dev, Queue: queue})
}
