package host

import (
	"context"
	"errors"
	"fmt"
	"sort"
	"sync"
	"sync/atomic"
	"time"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/control/msgdev"
	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/session"
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/virtiomsg"
)

// Config describes the host's end of one link.
type Config struct {
	Name  string // "board0": for log and status
	Board string // spec: "loopback:/run/a.sock"
	// Options are how the board is opened; Side is filled in.
	Options board.Options
	// Devices are what is offered, by device number. They belong to the Link from NewLink on.
	Devices map[uint16]device.Device
	// Classes are, by device number, how urgent devices are where they share a doorbell; doorbell.Interactive where there is none.
	Classes map[uint16]doorbell.Class
	// NoPool keeps the board out of the host's memory: no placement but window.
	NoPool bool
	// DMA says what the board's DMA engine is for.
	DMA DMAConfig
	Log session.Logger
	// Beat, LostBeats, NoInterrupts, Retry, Pace: see session.Config.
	Beat         time.Duration
	LostBeats    int
	NoInterrupts bool
	Retry        bool
	Pace         session.Pace
}

// Link is the host's end of one link: it offers devices to the agent.
type Link struct {
	n linkCounters // first: 64-bit alignment

	cfg   Config
	s     *session.Session
	table dma.TableRef

	// The owner's goroutine only.
	wild    error           // an engine could not be stopped
	up      bool            // devices are expected to be driven
	engines *engineSource   // of the board that is open, while the link is up; nil: it has none
	notices []notice        // what the agent was not told yet, oldest first
	gone    map[uint16]bool // removed since the link came up: requests may still be under way

	mu   sync.Mutex // guards changes of devs
	devs []*offered // by number
}

type linkCounters struct {
	Requests   uint64 // answered
	UnknownDev uint64 // messages for devices that do not exist
	Unknown    uint64 // messages of the bus that are not known here
	// DeviceEvents are those that told the agent of added and removed devices.
	DeviceEvents uint64
	Devices      msgdev.Counters
}

// NewLink returns the end of a link; Run runs it.
func NewLink(c Config) *Link {
	c.Log, c.Pace = session.Limit(c.Log), c.Pace.Defaults()
	l := &Link{cfg: c}
	c.Options.Side = board.Host
	l.s = session.New(session.Config{Name: c.Name, Spec: c.Board, Options: c.Options, Log: c.Log,
		Beat: c.Beat, LostBeats: c.LostBeats, NoInterrupts: c.NoInterrupts, Retry: c.Retry, Pace: c.Pace, Handler: (*handler)(l)})
	for n, dev := range c.Devices {
		l.devs = append(l.devs, l.offer(n, dev))
	}
	sort.Slice(l.devs, func(i, j int) bool { return l.devs[i].number < l.devs[j].number })
	return l
}

// Open opens the board, so that what is wrong with it shows before Run, which has to follow where
// this succeeds. An absent board is no error, nor is the end of ctx.
func (l *Link) Open(ctx context.Context) error { return l.s.Open(ctx) }

// Run serves the link until ctx ends, and closes the devices. Errors are those of the
// board; a peer cannot cause any.
func (l *Link) Run(ctx context.Context) error {
	err := l.s.Run(ctx)
	if errors.Is(err, session.ErrStuck) {
		return err // loops may still run
	}
	for _, d := range l.devices() {
		if cerr := d.dev.Close(); cerr != nil && err == nil {
			err = cerr
		}
	}
	return err
}

// Status describes the link for an operator. Any goroutine may call it.
func (l *Link) Status() status.Link {
	s := l.s.Status()
	for k, v := range status.Counters(linkCounters{
		Requests: atomic.LoadUint64(&l.n.Requests), UnknownDev: atomic.LoadUint64(&l.n.UnknownDev), DeviceEvents: atomic.LoadUint64(&l.n.DeviceEvents),
		Unknown: atomic.LoadUint64(&l.n.Unknown) + atomic.LoadUint64(&l.n.Devices.Unknown)}) {
		s.Counters[k] = v
	}
	s.Counters["device_resets"] = atomic.LoadUint64(&l.n.Devices.DeviceResets)
	if t := l.table.Load(); t != nil {
		s.Regions = session.RegionStatus(t.Regions())
	}
	s.Placement = "window"
	s.Devices = []status.Device{}
	for _, d := range l.devices() {
		s.Devices = append(s.Devices, d.describe())
		if d.Pushes() {
			s.Placement = "push"
		}
	}
	session.SumBus(&s)
	return s
}

// room returns how many bytes the agent has for rings and buffers, and how many devices share them.
func (l *Link) room() device.Room {
	r := device.Room{Devices: len(l.devs)}
	if t := l.table.Load(); t != nil {
		for _, m := range t.Regions() {
			if m.Addr == poolLink {
				r.Pool += m.Mem.Size()
			} else {
				r.Board += m.Mem.Size()
			}
		}
	}
	return r
}

// describe describes a device for an operator.
func (d *offered) describe() status.Device {
	s := d.Status()
	s.Class = d.class.String()
	d.engines.Describe(&s)
	if atomic.LoadUint32(&d.undriven) != 0 && !d.Driven() {
		s.Notes = append(s.Notes, undrivenNote)
	}
	return s
}

// handler is what the session sees of a Link.
type handler Link

func (l *handler) Queues() []session.Queue {
	var qs []session.Queue
	for _, d := range l.devs {
		qs = append(qs, d.queues()...)
	}
	return qs
}

// poolLink is the link address of the pool. It is unlike bus addresses, so that the agent's regions hardly
// ever overlap it (one that does is refused by the link page's checks).
const poolLink dma.Addr = 0x7f00_0000_0000_0000

// pool returns the host's memory that the board may reach.
func (l *handler) pool(b board.Board) (dma.Region, bool) {
	p, ok := b.(board.Pooled)
	if !ok || l.cfg.NoPool {
		return dma.Region{}, false
	}
	return p.Pool()
}

// Declare implements session.Handler: the pool, where the board can reach one.
func (l *handler) Declare(b board.Board) (virtiomsg.Declaration, error) {
	d := virtiomsg.Declaration{Features: virtiomsg.FeatureLinkState}
	if _, ok := b.(board.Engined); !ok && l.cfg.DMA.Mode == DMAOn {
		return d, &board.Error{Spec: b.String(), Reason: "boards of this kind have no DMA engine that the host drives: leave --dma at auto", Class: board.ErrInput}
	}
	if r, ok := l.pool(b); ok {
		d.Pool = []virtiomsg.PoolRegion{{Link: poolLink, Size: r.Mem.Size(), Bus: uint64(r.Addr), Access: r.Access}}
	}
	return d, nil
}

// Up builds the region table of what the agent declares, and the pool.
func (l *handler) Up() {
	w := l.s.Board().Window()
	var rs []dma.Region
	var parts []board.WindowPart
	for i, r := range l.s.Peer().Regions {
		m, err := w.Mem.Slice(r.Offset, r.Size)
		if err != nil {
			// The link page was checked: cannot happen.
			l.cfg.Log.Error("region outside the window", "link", l.cfg.Name, "region", i, "error", err)
			l.s.Reset()
			return
		}
		rs = append(rs, dma.Region{Name: fmt.Sprintf("board%d", i), Addr: r.Addr, Mem: m, Access: r.Access,
			Across: w.Across, Account: w.Account})
		parts = append(parts, board.WindowPart{Link: r.Addr, Offset: r.Offset, Size: r.Size})
	}
	if r, ok := l.pool(l.s.Board()); ok {
		r.Addr = poolLink
		rs = append(rs, r)
	}
	t, err := dma.NewTable(rs...)
	if err != nil {
		l.cfg.Log.Error("the agent's regions are refused", "link", l.cfg.Name, "error", err)
		l.s.Reset()
		return
	}
	l.table.Store(t)
	l.wild = nil
	(*Link)(l).linkUp()
	l.engines = newEngineSource(l.s.Board(), l.cfg.DMA, l.cfg.Log, l.cfg.Name, parts, l.runaway)
	for _, d := range l.devs {
		d.engines.src = l.engines
	}
}

// Down stops all devices: when it returns, no loop touches the window.
func (l *handler) Down() {
	(*Link)(l).linkDown()
	for _, d := range l.devs {
		d.Reset()
	}
	l.engines, l.notices, l.gone = nil, nil, nil
}

func (l *handler) device(n uint16) *offered {
	if i, ok := (*Link)(l).find(n); ok && !(*Link)(l).hidden(n) {
		return l.devs[i]
	}
	return nil
}

// Message answers a request of the agent.
func (l *handler) Message(h virtiomsg.Header, m *virtiomsg.Slot) {
	var err error
	var answer bool
	if h.Bus() {
		answer, err = l.bus(h, m)
	} else if d := l.device(h.Dev); d != nil {
		answer, err = d.Message(h, m)
	} else {
		atomic.AddUint64(&l.n.UnknownDev, 1)
		tell := l.cfg.Log.Warn
		if l.gone[h.Dev] {
			tell = l.cfg.Log.Debug
		}
		tell("a message for a device that does not exist", "link", l.cfg.Name, "message", h.String())
		return
	}
	if err != nil {
		l.Malformed(m, err)
		return
	}
	if !answer {
		return
	}
	atomic.AddUint64(&l.n.Requests, 1)
	if err := l.s.Send(m); err != nil {
		// The agent does not take its answers: nothing can be agreed on with it.
		l.cfg.Log.Warn("the agent does not take answers", "link", l.cfg.Name, "message", h.String(), "error", err)
		l.s.Reset()
	}
}

// Wait implements session.Pacer.
func (l *handler) Wait(h virtiomsg.Header, m *virtiomsg.Slot) time.Duration {
	if h.Bus() {
		return 0
	}
	if d := l.device(h.Dev); d != nil {
		return d.Wait(h, m)
	}
	return 0
}

// Malformed takes the device that a senseless message is for out of service; without one, the link.
func (l *handler) Malformed(m *virtiomsg.Slot, err error) {
	h, _ := m.Header()
	if d := l.device(h.Dev); d != nil && !h.Bus() {
		d.NeedsReset(err)
		return
	}
	l.cfg.Log.Warn("malformed message", "link", l.cfg.Name, "error", err)
	l.s.Reset()
}

// runaway notes that an engine could not be stopped. Its bus mastering is off; what it had read before may
// still be written into the board's memory, so nothing there is used any more.
func (l *handler) runaway(err error) {
	l.wild = err
	l.s.Wake()
}

// Tick looks for what the device models have told meanwhile.
func (l *handler) Tick() {
	if err := l.wild; err != nil {
		l.wild = nil
		l.s.Fault(err)
		return
	}
	for _, d := range l.devs {
		d.Tick()
	}
	(*Link)(l).tellAgent()
	(*Link)(l).tellUndriven()
}

func (l *handler) bus(h virtiomsg.Header, m *virtiomsg.Slot) (answer bool, err error) {
	switch h.ID {
	case virtiomsg.BusGetDevices:
		off, count, err := virtiomsg.DecodeGetDevices(m)
		if err != nil {
			return false, err
		}
		if count > virtiomsg.MaxDevices {
			count = virtiomsg.MaxDevices
		}
		if int(off)+int(count) > 1<<16 {
			count = uint16(1<<16 - int(off))
		}
		r := virtiomsg.Devices{Offset: off, Count: count}
		for _, d := range l.devs {
			if (*Link)(l).hidden(d.number) {
				continue
			}
			r.Set(d.number)
			if int(d.number) >= int(off)+int(count) && r.Next == 0 {
				r.Next = d.number &^ 7
			}
		}
		r.Encode(m, h.Token)
		return true, nil
	case virtiomsg.BusPing:
		data, err := virtiomsg.DecodePing(m)
		if err != nil {
			return false, err
		}
		virtiomsg.EncodePong(m, h.Token, data)
		return true, nil
	}
	atomic.AddUint64(&l.n.Unknown, 1)
	l.cfg.Log.Debug("an unknown message", "link", l.cfg.Name, "message", h.String())
	return false, nil
}

// messages is a session as the servers of its devices see it.
type messages struct{ *session.Session }

// Call implements msgdev.Link.
func (m messages) Call(dev uint16, queue int) doorbell.Ringer {
	return m.Ringer(session.QueueID{Dev: dev, Queue: queue})
}

// Kicked implements msgdev.Link.
func (m messages) Kicked(dev uint16, queue int) doorbell.Waiter {
	return m.Waiter(session.QueueID{Dev: dev, Queue: queue})
}
