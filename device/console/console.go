// Package console is the virtio console device (virtio 1.2, 5.3) with one port: what the driver prints is kept in a scrollback, which any
// number of terminals read, also when the board is gone; one of them types.
//
// It must not know messages, sockets, or boards.
package console

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/device/internal/plain"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/vring"
)

// Bounds of Config.Scrollback, in bytes.
const (
	DefaultScrollback = 256 << 10
	MinScrollback     = 4 << 10
	MaxScrollback     = 1 << 30
)

// The queues of port 0 (virtio 1.2, 5.3.2).
const (
	toDriver   = 0 // receiveq
	fromDriver = 1 // transmitq
	queues     = 2
)

const (
	queueMax = 256 // descriptors
	batch    = 8   // buffers taken at once
	// maxBuffer is the longest buffer that a driver may send, in bytes: it bounds what is copied between two looks at a
	// stop.
	maxBuffer = 1 << 20
	configLen = 12 // le16 cols, le16 rows, le32 max_nr_ports, le32 emerg_wr
)

var (
	// errWritable: a buffer to be written, in the queue that the driver sends by (virtio 1.2, 5.3.6.2).
	errWritable = errors.New("a buffer that the device would have to write")
	// errReadable: a buffer to be read, in the queue that the driver receives by.
	errReadable = errors.New("a buffer that the device would have to read")
	// errLong: a buffer longer than maxBuffer.
	errLong = errors.New("a buffer is too long")
)

// Config says what a console is to be like.
type Config struct {
	Name       string          // "con0": for errors and status
	Number     uint16          // device number on the link
	Scrollback int             // bytes that are kept, MinScrollback to MaxScrollback; 0: DefaultScrollback
	Deny       virtio.Features // features not to be offered
}

// Console is the device model.
type Console struct {
	n counters // first: 64-bit alignment

	cfg Config
	hub *hub
	*plain.Set
	out [4096]byte // for the goroutine of fromDriver
	in  [4096]byte // for the goroutine of toDriver

	mu         sync.Mutex // guards what follows
	cols, rows uint16
	joined     []joint
}

// joint is a log file or a pseudo-terminal.
type joint interface {
	close(limit time.Duration)
	describe(d *status.Device)
}

// counters are updated with sync/atomic.
type counters struct {
	Printed uint64 // bytes that the board printed
	Typed   uint64 // bytes that the board was given
	// TypedLost is bytes that the board may have been given or not, as its memory was gone at that moment.
	TypedLost uint64
	Unseen    uint64 // bytes that the board printed while the queue was disabled: dropped
}

var _ device.Device = (*Console)(nil)

// New returns the model. An error names what is wrong with the configuration.
func New(cfg Config) (*Console, error) {
	if cfg.Scrollback == 0 {
		cfg.Scrollback = DefaultScrollback
	}
	if cfg.Scrollback < MinScrollback || cfg.Scrollback > MaxScrollback {
		return nil, fmt.Errorf("%s: a scrollback of %d bytes: %d to %d are possible", cfg.Name, cfg.Scrollback, MinScrollback, MaxScrollback)
	}
	c := &Console{cfg: cfg}
	c.Set = plain.New(cfg.Name, queues, c.Queue, c)
	c.hub = newHub(cfg.Scrollback, func() { c.Wake(toDriver) })
	return c, nil
}

// Attach returns a terminal that begins with the last back bytes that the board printed, as far as they are kept; -1: all. name
// tells others who is attached. Any goroutine may call it, also while no board is there.
func (c *Console) Attach(name string, back int) *Terminal { return c.hub.attach(name, back) }

// Terminals returns the names of all terminals; that of the one with the keyboard comes first, behind an asterisk.
func (c *Console) Terminals() []string { return c.hub.names() }

// SetSize tells the driver the size of the terminal, in characters. Any goroutine may call it.
func (c *Console) SetSize(cols, rows uint16) {
	c.mu.Lock()
	same := c.cols == cols && c.rows == rows
	c.cols, c.rows = cols, rows
	c.mu.Unlock()
	if !same {
		c.Tell()
	}
}

// DeviceID implements device.Device.
func (c *Console) DeviceID() uint32 { return virtio.IDConsole }

// Features implements device.Device.
func (c *Console) Features() virtio.Features {
	return possible.Without(c.cfg.Deny)
}

// possible are what the model can do.
var possible = plain.Features.Or(virtio.FeaturesOf(virtio.ConsoleSize))

// SetFeatures implements device.Device.
func (c *Console) SetFeatures(f virtio.Features, _ device.Options) error {
	return c.Accept(f, c.Features())
}

// Config implements device.Device.
func (c *Console) Config() []byte {
	b := make([]byte, configLen)
	c.mu.Lock()
	defer c.mu.Unlock()
	binary.LittleEndian.PutUint16(b, c.cols)
	binary.LittleEndian.PutUint16(b[2:], c.rows)
	binary.LittleEndian.PutUint32(b[4:], 1)
	return b
}

// WriteConfig implements device.Device: there is no emergency write.
func (c *Console) WriteConfig(uint32, []byte) error { return device.ErrReadOnly }

// Queue implements device.Device.
func (c *Console) Queue(i int) device.QueueInfo {
	switch i {
	case toDriver:
		return device.QueueInfo{Name: c.cfg.Name + " rx", Max: queueMax, ToDriver: true}
	case fromDriver:
		return device.QueueInfo{Name: c.cfg.Name + " tx", Max: queueMax}
	}
	return device.QueueInfo{Name: c.cfg.Name}
}

// Serve implements plain.Model.
func (c *Console) Serve(w *plain.Worker) (plain.Next, error) {
	if w.Index() == fromDriver {
		return c.print(w)
	}
	return c.give(w)
}

// print takes what the board prints.
func (c *Console) print(w *plain.Worker) (plain.Next, error) {
	chains, spans, err := w.Pop(batch)
	var done [batch]vring.Used
	n := 0
	for i := range chains {
		ch := &chains[i]
		if bad := c.check(ch); bad != nil {
			err = bad
			break
		}
		if w.Enabled() {
			c.copyOut(spans[ch.First : int(ch.First)+int(ch.Readable)])
			atomic.AddUint64(&c.n.Printed, uint64(ch.ReadLen))
		} else {
			atomic.AddUint64(&c.n.Unseen, uint64(ch.ReadLen))
		}
		done[i] = vring.Used{ID: ch.ID, Count: ch.Count}
		n++
	}
	return settle(w, done[:n], len(chains), err)
}

// check refuses a buffer that the driver may not print by.
func (c *Console) check(ch *vring.Chain) error {
	switch {
	case ch.Writable > 0:
		return fmt.Errorf("%s: descriptor %d: %w", c.Queue(fromDriver).Name, ch.ID, errWritable)
	case ch.ReadLen > maxBuffer:
		return fmt.Errorf("%s: descriptor %d: %w: %d bytes, at most %d are possible", c.Queue(fromDriver).Name, ch.ID, errLong, ch.ReadLen, maxBuffer)
	}
	return nil
}

// copyOut prints what lies in the spans.
func (c *Console) copyOut(spans []dma.Span) {
	for _, s := range spans {
		for off := uint32(0); off < s.Len; {
			b := c.out[:]
			if uint32(len(b)) > s.Len-off {
				b = b[:s.Len-off]
			}
			s.CopyOut(b, off)
			c.hub.print(b)
			off += uint32(len(b))
		}
	}
}

// settle completes what was done of all popped chains.
func settle(w *plain.Worker, done []vring.Used, popped int, err error) (plain.Next, error) {
	if popped == 0 {
		return plain.OnKick, err
	}
	if serr := w.Settle(done, popped-len(done)); err == nil {
		err = serr
	}
	return plain.Again, err
}

// give hands what is typed to the board.
func (c *Console) give(w *plain.Worker) (plain.Next, error) {
	n := c.hub.peek(c.in[:])
	if n == 0 || !w.Enabled() {
		return plain.OnWake, nil
	}
	chains, spans, err := w.Pop(1)
	if len(chains) == 0 {
		return plain.OnKick, err
	}
	ch := &chains[0]
	if ch.Readable > 0 {
		return settle(w, nil, 1, fmt.Errorf("%s: descriptor %d: %w", c.Queue(toDriver).Name, ch.ID, errReadable))
	}
	used := 0
	for _, s := range spans[ch.First : int(ch.First)+int(ch.Writable)] {
		b := c.in[used:n]
		if uint32(len(b)) > s.Len {
			b = b[:s.Len]
		}
		if len(b) == 0 {
			break
		}
		s.CopyIn(0, b)
		used += len(b)
	}
	// What may be in the board's hands is never given again, whatever comes of it.
	c.hub.take(used)
	given := false
	defer func() { // also where a fault of the memory tears this out
		if given {
			atomic.AddUint64(&c.n.Typed, uint64(used))
		} else {
			atomic.AddUint64(&c.n.TypedLost, uint64(used))
		}
	}()
	next, err := settle(w, []vring.Used{{ID: ch.ID, Count: ch.Count, Len: uint32(used)}}, 1, err)
	given = err == nil
	return next, err
}

// Status implements device.Device.
func (c *Console) Status() status.Device {
	c.hub.mu.Lock()
	dropped, waiting := c.hub.dropped, uint64(len(c.hub.typed))
	c.hub.mu.Unlock()
	d := status.Device{Name: c.cfg.Name, Type: "console", Number: c.cfg.Number, Interface: "nobody",
		Counters: status.Counters(counters{Printed: atomic.LoadUint64(&c.n.Printed), Typed: atomic.LoadUint64(&c.n.Typed),
			TypedLost: atomic.LoadUint64(&c.n.TypedLost), Unseen: atomic.LoadUint64(&c.n.Unseen)})}
	d.Counters["scrollback_lost"], d.Counters["typed_waiting"] = dropped, waiting
	if names := c.Terminals(); len(names) > 0 {
		d.Interface = strings.Join(names, " ")
	}
	c.Describe(&d)
	c.mu.Lock()
	for _, j := range c.joined {
		j.describe(&d)
	}
	c.mu.Unlock()
	d.Offered, d.Allowed, d.Negotiated = virtio.ConsoleNames(possible), virtio.ConsoleNames(c.Features()), virtio.ConsoleNames(c.Accepted())
	return d
}

// SetRunning implements device.Device.
func (c *Console) SetRunning(on bool, deadline time.Time) error {
	err := c.Set.SetRunning(on, deadline)
	c.hub.run(on && err == nil)
	return err
}

// Reset implements device.Device.
func (c *Console) Reset(deadline time.Time) error {
	c.hub.run(false)
	return c.Set.Reset(deadline)
}

// closeTime is how long Close waits for a log file or a terminal that takes its time.
const closeTime = time.Second

// Close implements device.Device. It ends what terminals read behind what is left of the scrollback.
func (c *Console) Close() error {
	err := c.Reset(time.Time{})
	c.hub.close()
	c.mu.Lock()
	joined := c.joined
	c.joined = nil
	c.mu.Unlock()
	for _, j := range joined {
		j.close(closeTime)
	}
	return err
}
