package vhostuser

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/pci"
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/virtio"
)

// Logger is where a Door tells what happens: a message, and names with values.
type Logger interface {
	Debug(msg string, args ...interface{})
	Info(msg string, args ...interface{})
	Warn(msg string, args ...interface{})
	Error(msg string, args ...interface{})
}

// Config describes a Door.
type Config struct {
	Name   string // "board0": for log and status
	Board  string // the spec as it was given, for status
	Spec   Spec
	Device device.Device // it belongs to the caller, who closes it when Run has returned
	// State is a file in which the places of packed queues are kept, so that they can go on after this process was
	// killed; empty: they are kept in this process only. It is made where it is not there.
	State string
	// Log should limit lines that repeat: a front end can cause them at will.
	Log Logger
}

// The states of a door, in its status:
//
//	starting -> listening <-> connected         (server)
//	            connecting <-> connected        (client)
//	connected -> stuck -> listening, connecting (a queue did not come to rest in time)
//	any -> stopped
const (
	stateStarting   = "starting"
	stateListening  = "waiting for a front end"
	stateConnecting = "connecting to the front end"
	stateConnected  = "connected"
	stateStuck      = "stuck"
	stateStopped    = "stopped"
)

const (
	// writeLimit is how long a front end may leave an answer unread when its socket is full.
	writeLimit = 5 * time.Second
	// busyLimit is how long another front end waits for the end of the present one's connection
	// before it is turned away.
	busyLimit = time.Second
	// connectEvery and connectBurst bound how often front ends are served: one whose program
	// refuses what this side offers may connect again at once.
	connectEvery = 500 * time.Millisecond
	connectBurst = 10
	// dialPause is the time between tries to connect.
	dialPause = 250 * time.Millisecond
	// stuckLimit is how long a door that is to stop waits for a queue that does not.
	stuckLimit = 5 * time.Second
)

// ErrStuck is returned by Run where a queue's loop does not end: its memory and descriptors are
// still in use.
var ErrStuck = device.ErrStuck

// Door serves one device to one front end at a time.
type Door struct {
	n counters // first: 64-bit alignment

	cfg    Config
	ln     *listener     // nil: a client, or one connection alone
	single *net.UnixConn // of Spec.FD, until it is served
	wake   chan struct{} // there are events
	closer closer        // of what front ends sent
	pace   bucket        // of connections
	places *places

	mu      sync.Mutex // guards what follows
	events  []device.Event
	state   string
	since   time.Time
	lastErr string
	regions []status.Region
	driver  string // device status
}

// New returns a door for a device. The device belongs to the door until Run has returned.
func New(c Config) *Door {
	d := &Door{cfg: c, wake: make(chan struct{}, 1), pace: bucket{every: connectEvery, burst: connectBurst}}
	d.places = newPlaces(c.Name, c.State, dataQueues(c.Device), c.Log)
	d.setState(stateStarting, nil)
	c.Device.Notify(d.event)
	return d
}

// event is the device's Notify.
func (d *Door) event(e device.Event) {
	if e.Broken == nil {
		return // front ends look at the configuration by themselves
	}
	d.mu.Lock()
	if len(d.events) < maxEvents {
		d.events = append(d.events, e)
	}
	d.mu.Unlock()
	select {
	case d.wake <- struct{}{}:
	default:
	}
}

// maxEvents bounds the events that wait: one for each queue at most, as a queue that has ended
// stays so.
const maxEvents = 2*maxPairs + 1

func (d *Door) takeEvents() []device.Event {
	d.mu.Lock()
	defer d.mu.Unlock()
	es := d.events
	d.events = nil
	return es
}

func (d *Door) setState(s string, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err != nil {
		d.lastErr = err.Error()
	}
	if d.state != s {
		d.state, d.since = s, time.Now()
	}
}

// Open makes the socket that listens. A client has nothing to open.
func (d *Door) Open(context.Context) error {
	return d.cfg.Spec.open(d.cfg.Name, &d.ln, &d.single)
}

// Run serves front ends until ctx ends. Where the socket cannot be made it tries again. A single
// connection that was passed as a descriptor ends it too.
func (d *Door) Run(ctx context.Context) (err error) {
	defer func() { d.setState(stateStopped, err) }()
	defer func() {
		if err == nil { // else a queue may still write there
			d.places.close()
		}
	}()
	logged := ""
	for d.ln == nil && d.single == nil && !d.cfg.Spec.Client {
		err := d.Open(ctx)
		if err == nil {
			break
		}
		if d.setState(stateStarting, err); err.Error() != logged {
			logged = err.Error()
			d.cfg.Log.Warn("no socket for front ends, it is tried again", "link", d.cfg.Name, "error", err)
		}
		if !sleep(ctx, time.Second) {
			return nil
		}
	}
	var conns chan *net.UnixConn
	if d.ln != nil {
		conns = make(chan *net.UnixConn)
		accepted := make(chan struct{})
		stop := make(chan struct{})
		go func() { defer close(accepted); d.accept(conns, stop) }()
		defer func() { close(stop); d.ln.Close(); <-accepted }()
	}
	for {
		c := d.next(ctx, conns)
		if c == nil {
			return nil
		}
		if err := d.serve(ctx, c); err != nil {
			return err
		}
		if ctx.Err() != nil || d.cfg.Spec.FD >= 0 && d.ln == nil {
			return nil
		}
	}
}

// sleep waits; false: ctx has ended.
func sleep(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// accept hands over those who connect. One that comes while another is served waits a moment, as
// that one may just end, and is turned away.
func (d *Door) accept(conns chan<- *net.UnixConn, stop <-chan struct{}) {
	for {
		c, err := d.ln.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		wait := time.NewTimer(busyLimit)
		if err != nil { // out of descriptors, which passes
			c = nil
		}
		var to chan<- *net.UnixConn
		if c != nil {
			to = conns
		}
		select {
		case to <- c:
			c = nil
		case <-stop:
		case <-wait.C:
			if c != nil {
				atomic.AddUint64(&d.n.Refused, 1)
				d.cfg.Log.Warn("a front end is turned away: another one is connected", "link", d.cfg.Name)
			}
		}
		wait.Stop()
		if c != nil {
			c.Close()
		}
	}
}

// next returns the next front end's connection; nil: ctx has ended.
func (d *Door) next(ctx context.Context, conns <-chan *net.UnixConn) *net.UnixConn {
	if c := d.single; c != nil {
		d.single = nil
		return c
	}
	if d.cfg.Spec.Client {
		d.setState(stateConnecting, nil)
	} else {
		d.setState(stateListening, nil)
	}
	if !sleep(ctx, d.pace.wait(time.Now())) {
		return nil
	}
	if !d.cfg.Spec.Client {
		select {
		case c := <-conns:
			d.pace.take(time.Now())
			return c
		case <-ctx.Done():
			return nil
		}
	}
	dialer := net.Dialer{Timeout: time.Second}
	for {
		c, err := dialer.DialContext(ctx, "unix", d.cfg.Spec.Path)
		if err == nil {
			d.pace.take(time.Now())
			return c.(*net.UnixConn)
		}
		d.setState(stateConnecting, err)
		if !sleep(ctx, dialPause) {
			return nil
		}
	}
}

// serve serves one front end until it goes, does what cannot be served, or ctx ends. The error is
// one after which this door cannot go on.
func (d *Door) serve(ctx context.Context, c *net.UnixConn) error {
	atomic.AddUint64(&d.n.Connections, 1)
	d.takeEvents() // of the connection before
	b := newBackend(d.cfg.Name, d.cfg.Device, d.cfg.Log, &d.n)
	b.places = d.places
	b.without = d.cfg.Spec.without()
	d.setState(stateConnected, nil)
	d.cfg.Log.Info("front end connected", "link", d.cfg.Name)
	err := d.converse(ctx, c, b)
	c.Close()
	if err == nil || errors.Is(err, io.EOF) || ctx.Err() != nil {
		d.cfg.Log.Info("front end gone", "link", d.cfg.Name)
	} else {
		d.cfg.Log.Warn("the connection to the front end is closed", "link", d.cfg.Name, "error", err)
		d.setState(stateConnected, err)
	}
	d.show(nil)
	return d.release(ctx, b)
}

// release waits until the device has let go of the front end's memory.
func (d *Door) release(ctx context.Context, b *backend) error {
	var late time.Time // when ctx's end is not waited for any more
	for {
		var err error
		if fault := pci.Guard(func() { err = b.close(time.Now().Add(changeLimit)) }); fault != nil {
			err = fault
		}
		if err == nil {
			return nil
		}
		atomic.AddUint64(&d.n.Stuck, 1)
		d.setState(stateStuck, err)
		d.cfg.Log.Error("the device does not let go of the front end's memory, it is tried again", "link", d.cfg.Name, "error", err)
		if ctx.Err() != nil {
			now := time.Now()
			if late.IsZero() {
				late = now.Add(stuckLimit)
			}
			if now.After(late) {
				return fmt.Errorf("%s: %w", d.cfg.Name, err)
			}
			time.Sleep(100 * time.Millisecond)
		} else {
			sleep(ctx, time.Second)
		}
	}
}

// converse reads messages and answers them.
func (d *Door) converse(ctx context.Context, c *net.UnixConn, b *backend) error {
	src, err := newSocket(c)
	if err != nil {
		return err
	}
	msgs, ended, quit := make(chan *message), make(chan error, 1), make(chan struct{})
	go func() {
		r := &reader{src: src, n: &d.n, closer: &d.closer}
		for {
			m, err := r.next()
			if err != nil {
				ended <- err
				return
			}
			select {
			case msgs <- m:
			case <-quit:
				m.close()
				ended <- nil
				return
			}
		}
	}()
	defer func() {
		close(quit)
		c.Close() // ends the reader's wait
		<-ended
	}()
	pace := bucket{every: messageEvery, burst: messageBurst}
	for {
		var again <-chan time.Time
		var timer *time.Timer
		if due := b.due(); !due.IsZero() {
			timer = time.NewTimer(time.Until(due))
			again = timer.C
		}
		err := error(nil)
		select {
		case <-ctx.Done():
			err = ctx.Err()
		case err = <-ended:
			ended <- err // for the deferred function
		case m := <-msgs:
			// What broke before the message came is looked at first: a queue that is started by it is another one.
			if err = d.guard(func() error { return d.react(b) }); err == nil {
				err = d.answer(ctx, c, b, m, &pace)
			} else {
				m.close()
			}
		case <-d.wake:
			err = d.guard(func() error { return d.react(b) })
		case <-again:
			err = d.guard(b.onTime)
		}
		if timer != nil {
			timer.Stop()
		}
		if err != nil {
			return err
		}
		d.show(b)
	}
}

// answer serves a message.
func (d *Door) answer(ctx context.Context, c *net.UnixConn, b *backend, m *message, pace *bucket) error {
	now := time.Now()
	wait := pace.wait(now)
	if w := b.starts.wait(now); w > wait {
		wait = w
	}
	pace.take(now)
	if !sleep(ctx, wait) {
		m.close()
		return ctx.Err()
	}
	var reply []byte
	b.answer = nil
	err := d.guard(func() (err error) {
		reply, err = b.handle(m)
		return err
	})
	m.close() // after a fault
	if err != nil || reply == nil {
		return err
	}
	if err := c.SetWriteDeadline(time.Now().Add(writeLimit)); err != nil {
		return err
	}
	if _, err := c.Write(reply); err != nil {
		return fmt.Errorf("answer to %s: %w", m.req, err)
	}
	if r := b.answer; r != nil {
		return d.guard(func() error { b.heard(r); return nil })
	}
	return nil
}

// guard turns a fault of the front end's memory into an error.
func (d *Door) guard(f func() error) (err error) {
	if fault := pci.Guard(func() { err = f() }); fault != nil {
		atomic.AddUint64(&d.n.MemoryFaults, 1)
		return fmt.Errorf("%w: %v", ErrMemory, fault)
	}
	return err
}

// react acts on what the device has told.
func (d *Door) react(b *backend) error {
	for _, e := range d.takeEvents() {
		if err := b.broke(e); err != nil {
			return err
		}
	}
	return nil
}

// show keeps what Status tells of a connection; nil: there is none.
func (d *Door) show(b *backend) {
	var rs []status.Region
	driver := ""
	if b != nil {
		s := uint32(b.status)
		if b.running {
			s |= virtio.StatusDriverOK
		}
		for i := range b.rings {
			if b.rings[i].broken {
				s |= virtio.StatusNeedsReset
			}
		}
		driver = virtio.StatusString(s)
		for i, m := range b.mem.maps {
			rs = append(rs, status.Region{Name: fmt.Sprintf("guest%d", i), Addr: m.guest, Size: m.size, Access: (dma.DeviceRead | dma.DeviceWrite).String()})
		}
	}
	d.mu.Lock()
	d.regions, d.driver = rs, driver
	d.mu.Unlock()
}

// Status describes the door for an operator. Any goroutine may call it.
func (d *Door) Status() status.Link {
	dev := d.cfg.Device.Status()
	d.mu.Lock()
	defer d.mu.Unlock()
	if dev.Status = d.driver; dev.Status == "" {
		dev.Status = virtio.StatusString(0)
	}
	s := status.Link{Name: d.cfg.Name, Board: d.cfg.Board, State: d.state, Since: d.since.Format(time.RFC3339Nano), LastError: d.lastErr,
		Placement: "guest", Window: status.Window{Kind: "cached"}, Regions: append([]status.Region{}, d.regions...), Counters: d.n.load(),
		Bus: map[string]uint64{}, Devices: []status.Device{dev}}
	for _, r := range d.regions {
		s.Window.Size += r.Size
	}
	return s
}
