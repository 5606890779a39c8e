package vhostuser

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/driver"
	"github.com/boardlink/boardlink/status"
)

// FrontendConfig describes a Frontend.
type FrontendConfig struct {
	Name  string // "board0": for log and status
	Board string // the spec as it was given, for status
	Spec  Spec
	// Driver is the device's; it belongs to the caller, who closes it when Run has returned.
	Driver driver.Driver
	// MTU returns the MTU of the driver's interface, which the back end is told.
	MTU func() int
	// Memory is how much memory is shared with the back end, in bytes; 0: as much as the driver's
	// queues can use.
	Memory uint64
	// Answer is how long a back end may take for an answer; 0: 2 s.
	Answer time.Duration
	// Log should limit lines that repeat: a back end can cause them at will.
	Log Logger
}

// The states of a front end, in its status:
//
//	starting -> connecting, waiting -> connected <-> up
//	connected, up -> connecting, waiting       (the connection is lost)
//	any -> stopped
const (
	frontConnecting = "connecting to the back end"
	frontWaiting    = "waiting for a back end"
	frontConnected  = "connected" // the device does not run
	frontUp         = "up"
)

const (
	frontAnswer = 2 * time.Second
	// pairMemory is the shared memory for each queue pair of 256 descriptors, in bytes: more than
	// its rings, receive buffers and transmit buffers take. Pages that are not used take no memory.
	pairMemory = 16 << 20
	// A device that does not come up, or a back end whose connection is of no use, is tried again
	// after frontRetryMin, then twice as long, up to frontRetryMax; anew where the device was up
	// for frontRetryMax.
	frontRetryMin = 50 * time.Millisecond
	frontRetryMax = 5 * time.Second
	// restLimit is how long a back end may take in all to stop the queues when this program ends.
	restLimit = time.Second
)

// ErrRung: the back end rang the descriptor of SET_VRING_ERR.
var ErrRung = errors.New("the back end tells that a queue is broken")

// frontCounters are a front end's, over all its connections. They are updated with sync/atomic.
type frontCounters struct {
	reader counters // of which Messages, DescriptorsClosed and DescriptorsStuck count

	Connections       uint64 // back ends that were connected
	Lost              uint64 // connections that ended before this side ended them
	BringUps          uint64 // times the device came up
	Failures          uint64 // attempts that failed
	Broken            uint64 // queues in which the back end broke the rules
	Rung              uint64 // errors that the back end told by SET_VRING_ERR
	Timeouts          uint64 // answers that did not come in time
	Refused           uint64 // requests that the back end answered by an error
	Malformed         uint64 // answers that cannot be
	Unexpected        uint64 // answers to what was not asked
	DescriptorsClosed uint64 // descriptors that came with answers
}

func (c *frontCounters) load() map[string]uint64 {
	m := status.Counters(frontCounters{
		Connections: atomic.LoadUint64(&c.Connections), Lost: atomic.LoadUint64(&c.Lost), BringUps: atomic.LoadUint64(&c.BringUps),
		Failures: atomic.LoadUint64(&c.Failures), Broken: atomic.LoadUint64(&c.Broken), Rung: atomic.LoadUint64(&c.Rung),
		Timeouts: atomic.LoadUint64(&c.Timeouts), Refused: atomic.LoadUint64(&c.Refused), Malformed: atomic.LoadUint64(&c.Malformed),
		Unexpected: atomic.LoadUint64(&c.Unexpected), DescriptorsClosed: atomic.LoadUint64(&c.DescriptorsClosed)})
	m["messages"] = atomic.LoadUint64(&c.reader.Messages)
	m["descriptors_closed"] += atomic.LoadUint64(&c.reader.DescriptorsClosed)
	m["descriptors_stuck"] = atomic.LoadUint64(&c.reader.DescriptorsStuck)
	return m
}

// Frontend drives one device that a back end serves: it owns the memory and the rings. It keeps the
// connection: where that is lost, the driver's interface stays with its carrier off, and the next
// connection begins with memory of its own, as the back end of before may still write to the other.
type Frontend struct {
	n frontCounters // first: 64-bit alignment

	cfg    FrontendConfig
	ln     *listener     // nil: this side connects
	single *net.UnixConn // of Spec.FD, until it is used
	wake   chan struct{} // the driver's interface has changed
	failed chan error    // of the driver's loops
	closer closer        // of what back ends sent

	up      bool
	next    time.Time // when the device, or another connection, is tried
	since   time.Time // when the device came up; zero: it is not
	backoff time.Duration
	logged  string          // the last failure that was logged
	watch   *errWatch       // while the device is up
	short   string          // what is left out for want of room, as it was logged
	unmet   map[string]bool // what was unmet when the device came up last

	mu      sync.Mutex // guards what follows
	state   string
	changed time.Time
	lastErr string
	memory  uint64 // bytes that are shared now
}

// NewFrontend returns a front end. Its driver belongs to it until Run has returned.
func NewFrontend(c FrontendConfig) *Frontend {
	if c.Answer <= 0 {
		c.Answer = frontAnswer
	}
	if c.Memory == 0 {
		n, _ := c.Driver.Pairs()
		c.Memory = uint64(n) * pairMemory
	}
	f := &Frontend{cfg: c, wake: make(chan struct{}, 1), failed: make(chan error, c.Driver.Doorbells()+1)}
	c.Driver.OnChange(f.awake)
	f.setState(stateStarting, nil)
	return f
}

func (f *Frontend) awake() {
	select {
	case f.wake <- struct{}{}:
	default:
	}
}

// broken is told by the driver's loops.
func (f *Frontend) broken(err error) {
	select {
	case f.failed <- err:
	default:
	}
}

func (f *Frontend) setState(s string, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err != nil {
		f.lastErr = err.Error()
	} else if s == frontUp {
		f.lastErr = ""
	}
	if f.state != s {
		f.state, f.changed = s, time.Now()
	}
}

// Open makes the socket that listens, or takes the one that was passed. One that connects has
// nothing to open.
func (f *Frontend) Open(context.Context) error {
	return f.cfg.Spec.open(f.cfg.Name, &f.ln, &f.single)
}

// Run drives the device until ctx ends. Nothing that a back end does ends it, but where the
// connection was passed as a descriptor, its end does.
func (f *Frontend) Run(ctx context.Context) (err error) {
	defer func() { f.setState(stateStopped, err) }()
	if err := f.Open(ctx); err != nil {
		return err
	}
	if f.ln != nil {
		defer f.ln.Close()
		stop := make(chan struct{})
		defer close(stop)
		go func() { // Accept ends with ctx
			select {
			case <-ctx.Done():
				_ = f.ln.SetDeadline(time.Now())
			case <-stop:
			}
		}()
	}
	for {
		if !sleep(ctx, time.Until(f.next)) {
			return nil
		}
		c := f.connect(ctx)
		if c == nil {
			return nil
		}
		atomic.AddUint64(&f.n.Connections, 1)
		err := f.serve(ctx, c)
		if ctx.Err() != nil {
			return nil
		}
		atomic.AddUint64(&f.n.Lost, 1)
		f.later()
		f.setState(frontConnected, err)
		f.tellFailure("the connection to the back end is lost", err)
		if f.cfg.Spec.FD >= 0 && f.ln == nil {
			return fmt.Errorf("%s: descriptor %d: %w", f.cfg.Name, f.cfg.Spec.FD, err)
		}
	}
}

// connect returns the next connection; nil: ctx has ended.
func (f *Frontend) connect(ctx context.Context) *net.UnixConn {
	if c := f.single; c != nil {
		f.single = nil
		return c
	}
	if f.ln != nil {
		f.setState(frontWaiting, nil)
		for {
			c, err := f.ln.AcceptUnix()
			if ctx.Err() != nil {
				if err == nil {
					c.Close()
				}
				return nil
			}
			if err == nil {
				return c
			}
			f.setState(frontWaiting, err) // out of descriptors, which passes
			if !sleep(ctx, time.Second) {
				return nil
			}
		}
	}
	f.setState(frontConnecting, nil)
	dialer := net.Dialer{Timeout: f.cfg.Answer} // of a back end that accepts no connections, and whose queue is full
	for {
		c, err := dialer.DialContext(ctx, "unix", f.cfg.Spec.Path)
		if err == nil {
			return c.(*net.UnixConn)
		}
		if ctx.Err() != nil {
			return nil
		}
		f.setState(frontConnecting, err)
		f.tellFailure("the back end cannot be reached, it is tried again", err)
		if !sleep(ctx, dialPause) {
			return nil
		}
	}
}

// serve drives the device over a connection until that ends, and returns why it did. Then the
// driver is down.
func (f *Frontend) serve(ctx context.Context, c *net.UnixConn) error {
	f.setState(frontConnected, nil)
	t, err := f.begin(ctx, c)
	if err != nil {
		return err
	}
	defer t.close()
	defer f.down()
	f.showMemory(t.mem.region.Mem.Size())
	defer f.showMemory(0)
	f.next = time.Time{}
	for {
		if err := f.bringUp(t); err != nil {
			return err
		}
		if err := f.wait(ctx, t); err != nil {
			return err
		}
	}
}

// begin makes the transport to a back end that has just been connected.
func (f *Frontend) begin(ctx context.Context, c *net.UnixConn) (*transport, error) {
	b, err := newBackConn(c, &f.n, &f.closer, f.cfg.Answer)
	if err != nil {
		return nil, err
	}
	b.cancel = ctx.Done()
	page := uint64(1) << 21 // whole huge pages, for those who have them
	mem, err := newSharedMemory(f.cfg.Name, (f.cfg.Memory+page-1)&^(page-1))
	if err != nil {
		b.close()
		return nil, err
	}
	t := &transport{b: b, name: f.cfg.Name, n: &f.n, mem: mem, mtu: f.cfg.MTU, queues: map[int]*sharedQueue{}, warn: func(s string) {
		f.cfg.Log.Warn("the device is not all that it could be", "link", f.cfg.Name, "device", f.cfg.Driver.Name(), "note", s)
	}}
	if err := t.negotiate(); err != nil {
		t.close()
		return nil, err
	}
	return t, nil
}

// bringUp brings the device up, if it is not and its time has come. The error is one of the
// connection.
func (f *Frontend) bringUp(t *transport) error {
	if f.up || time.Now().Before(f.next) {
		return nil
	}
	d := f.cfg.Driver
	err := d.Up(t, t.mem.layout(), f.broken)
	if err == nil {
		f.up, f.since, f.logged, f.watch = true, time.Now(), "", watch(t.errs)
		atomic.AddUint64(&f.n.BringUps, 1)
		f.setState(frontUp, nil)
		f.cfg.Log.Info("device up", "link", f.cfg.Name, "device", d.Name(), "interface", d.Joined())
		f.tellNotes()
		return nil
	}
	f.down()
	if t.b.broken != nil {
		return t.b.broken
	}
	atomic.AddUint64(&f.n.Failures, 1)
	d.Failed(err)
	f.later()
	f.setState(frontConnected, err)
	f.tellFailure("device does not come up", err)
	return t.rest() // what was started of it
}

// down stops the driver's loops.
func (f *Frontend) down() {
	f.cfg.Driver.Down()
	if f.up = false; f.watch != nil {
		f.watch.end()
		f.watch = nil
	}
	for {
		select {
		case <-f.failed:
		default:
			return
		}
	}
}

// later puts the next attempt off: the further, the sooner the device broke down again.
func (f *Frontend) later() {
	if !f.since.IsZero() && time.Since(f.since) > frontRetryMax {
		f.backoff = 0
	}
	f.since = time.Time{}
	if f.backoff *= 2; f.backoff < frontRetryMin {
		f.backoff = frontRetryMin
	}
	if f.backoff > frontRetryMax {
		f.backoff = frontRetryMax
	}
	f.next = time.Now().Add(f.backoff)
}

// wait waits for something to do, and does it. The error is why the connection ends.
func (f *Frontend) wait(ctx context.Context, t *transport) error {
	var again <-chan time.Time
	if !f.up {
		timer := time.NewTimer(time.Until(f.next))
		defer timer.Stop()
		again = timer.C
	}
	var rung <-chan error
	if f.watch != nil {
		rung = f.watch.rung
	}
	select {
	case <-ctx.Done():
		f.down()
		// The back end stops in order, while it still has the memory.
		t.b.cancel, t.b.limit = nil, f.cfg.Answer
		late := time.AfterFunc(restLimit, func() { t.b.c.Close() })
		defer late.Stop()
		_ = t.rest()
		return ctx.Err()
	case <-t.b.ended:
		return t.b.lost()
	case m := <-t.b.answers:
		return t.b.fail(t.b.unexpected(m))
	case err := <-f.failed:
		return f.restart(t, err)
	case err := <-rung:
		atomic.AddUint64(&f.n.Rung, 1)
		return f.restart(t, err)
	case <-f.wake:
		if f.cfg.Driver.Remade() {
			f.next, f.backoff = time.Time{}, 0
		}
	case <-again:
	}
	return nil
}

// restart takes a device down that broke, so that it comes up again later.
func (f *Frontend) restart(t *transport, err error) error {
	if !f.up {
		return nil
	}
	f.cfg.Log.Warn("device broken, resetting it", "link", f.cfg.Name, "device", f.cfg.Driver.Name(), "error", err)
	atomic.AddUint64(&f.n.Broken, 1)
	f.down()
	f.later()
	f.setState(frontConnected, err)
	return t.rest()
}

// tellFailure logs what fails, unless the same was logged last.
func (f *Frontend) tellFailure(what string, err error) {
	if s := err.Error(); s != f.logged {
		f.logged = s
		f.cfg.Log.Warn(what, "link", f.cfg.Name, "device", f.cfg.Driver.Name(), "error", err)
	}
}

// tellNotes logs what the device that came up goes without, as far as it is new.
func (f *Frontend) tellNotes() {
	d := f.cfg.Driver
	if w := d.Warning(); w != "" {
		f.cfg.Log.Warn("the interface is used as it is", "link", f.cfg.Name, "device", d.Name(), "interface", d.Joined(), "note", w)
	}
	unmet := map[string]bool{}
	for _, s := range d.Unmet() {
		if unmet[s] = true; !f.unmet[s] {
			f.cfg.Log.Warn("not all that was asked for", "link", f.cfg.Name, "device", d.Name(), "interface", d.Joined(), "note", s)
		}
	}
	f.unmet = unmet
	if s := d.ShortOf(); s != f.short {
		if f.short = s; s != "" {
			f.cfg.Log.Warn("the memory is small", "link", f.cfg.Name, "device", d.Name(), "note", s)
		}
	}
}

func (f *Frontend) showMemory(n uint64) {
	f.mu.Lock()
	f.memory = n
	f.mu.Unlock()
}

// Status describes the front end for an operator. Any goroutine may call it.
func (f *Frontend) Status() status.Link {
	dev := f.cfg.Driver.Status()
	f.mu.Lock()
	defer f.mu.Unlock()
	s := status.Link{Name: f.cfg.Name, Board: f.cfg.Board, State: f.state, Since: f.changed.Format(time.RFC3339Nano), LastError: f.lastErr,
		Placement: "shared", Window: status.Window{Size: f.memory, Kind: "cached"}, Regions: []status.Region{}, Counters: f.n.load(),
		Bus: map[string]uint64{}, Devices: []status.Device{dev}}
	if f.memory != 0 {
		s.Regions = append(s.Regions, status.Region{Name: "shared", Addr: sharedBase, Size: f.memory, Access: (dma.DeviceRead | dma.DeviceWrite).String()})
	}
	return s
}
