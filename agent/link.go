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
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/driver"
	"github.com/boardlink/boardlink/pci"
	"github.com/boardlink/boardlink/session"
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/virtiomsg"
)

// Where things lie in the window; the link page tells the host (docs/wire.md).
const (
	offAgentToHost = 1 * virtiomsg.PageSize
	offHostToAgent = 2 * virtiomsg.PageSize
	offHeap        = 3 * virtiomsg.PageSize // rings and buffers, to the end of the window
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
	// Classes are, by device number, how urgent devices are where they share a doorbell; doorbell.Interactive where there is none.
	Classes map[uint16]doorbell.Class
	// Drivers make drivers for further devices that the host offers, by virtio device id. Such a driver belongs to
	// the Link, which closes it when the host removes the device.
	Drivers map[uint32]Maker
	// Shares is into how many equal parts the memory is divided, of which each device gets one: how many devices there can be at a
	// time. 0, or fewer than Devices, means as many as Devices.
	Shares int
	Log    session.Logger
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

	cfg Config
	s   *session.Session

	// The owner's goroutine only.
	region  *dma.Region // the heap, in the board's memory
	shares  *driver.Shares
	small   []driver.Small  // those that NewLink was given, which have parts of the memory of their own
	pairs   int             // at most so many queue pairs for a device whose number the operator did not choose; 0: any
	search  bool            // devices may have come that this side does not know
	passed  map[uint16]pass // device numbers that are not driven, so that they are not looked at again
	full    bool            // a device goes without memory, which was logged
	looking session.Bucket

	mu   sync.Mutex
	devs []*device   // by number; see setDevices
	pool *dma.Region // the host's memory, across the bus; nil in placement window
}

type linkCounters struct {
	BringUps  uint64 // devices brought up
	Failures  uint64 // attempts that failed
	HostReset uint64 // devices that the host put to NEEDS_RESET
	Broken    uint64 // queues in which the host broke the rules
	Changes   uint64 // changed configurations that were applied
	Damped    uint64 // changes of a configuration that were left to the next one to apply
	Added     uint64 // devices that were driven because the host offers them
	Removed   uint64 // of these, how many the host removed
	Searches  uint64 // looks for devices that the host has added
}

// NewLink returns the end of a link; Run runs it.
func NewLink(c Config) *Link {
	c.Log, c.Pace = session.Limit(c.Log), c.Pace.Defaults()
	if c.Slots == 0 || c.Slots > virtiomsg.MaxSlots {
		c.Slots = virtiomsg.MaxSlots
	}
	l := &Link{cfg: c, looking: session.NewBucket(c.Pace.Devices)}
	ds := append([]driver.Driver(nil), c.Devices...)
	sort.Slice(ds, func(i, j int) bool { return ds[i].Number() < ds[j].Number() })
	shares := 0
	for _, n := range ds {
		d := l.place(n)
		if s, ok := n.(driver.Small); ok {
			l.small = append(l.small, s)
			d.small = s
		} else {
			shares++
		}
		l.devs = append(l.devs, d)
	}
	if shares < c.Shares {
		shares = c.Shares
	}
	if shares == 0 {
		shares = 1
	}
	l.shares = driver.NewShares(shares)
	for _, d := range l.devs {
		if d.small == nil {
			d.index, _ = l.shares.Take() // there is one for each
		}
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
	for _, d := range l.devices() {
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
		Changes: atomic.LoadUint64(&l.n.Changes), Damped: atomic.LoadUint64(&l.n.Damped),
		Added: atomic.LoadUint64(&l.n.Added), Removed: atomic.LoadUint64(&l.n.Removed), Searches: atomic.LoadUint64(&l.n.Searches)}) {
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
	for _, d := range l.devices() {
		ds := d.n.Status()
		ds.Class = l.cfg.Classes[d.n.Number()].String()
		s.Devices = append(s.Devices, ds)
	}
	session.SumBus(&s)
	return s
}

// handler is what the session sees of a Link.
type handler Link

func (l *handler) Queues() []session.Queue {
	var qs []session.Queue
	for _, d := range l.devs {
		qs = append(qs, d.listQueues()...)
	}
	return qs
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
	l.search, l.full = true, false
	for n, why := range l.passed {
		if why != gaveUp {
			delete(l.passed, n)
		}
	}
	for _, d := range l.devs {
		d.next, d.backoff, d.met = time.Time{}, 0, false
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
