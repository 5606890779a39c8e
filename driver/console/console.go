// Package console drives a virtio console device (virtio 1.2, 5.3) with one port: it joins the port to a pseudo-terminal of this
// machine, to a program that runs on one, or to the kernel's log.
//
// It must not know messages, sockets, or boards.
package console

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/driver"
	"github.com/boardlink/boardlink/driver/internal/plain"
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/tty"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/vring"
)

// The queues of port 0 (virtio 1.2, 5.3.2).
const (
	toDriver   = 0 // receiveq
	fromDriver = 1 // transmitq
	queues     = 2
)

// Backlog is how many bytes are kept, each way: printed ones while there is no link, typed ones that the terminal has not taken.
const Backlog = 64 << 10

// errEmpty: the device returned a buffer without a byte in it.
var errEmpty = errors.New("the host returns a buffer without a byte in it")

// Config says how a console is used.
type Config struct {
	Name   string // "con0": for errors and status
	Number uint16 // device number on the link
	End    End    // what it is joined to; Close closes it
	Deny   virtio.Features
}

// Console drives one console device. Two goroutines serve its end as long as it is open, two its virtqueues while the device runs,
// and a buffer lies between them each way. So an end that does not read holds up nothing but what is typed for it.
type Console struct {
	n counters // first: 64-bit alignment

	cfg Config
	*plain.Base
	out, in *buffer // printed by the end; typed for it
	// more is rung when there is something to be printed, room when something typed was taken.
	more, room *doorbell.Eventfd
	ends       sync.WaitGroup
	short      uint32 // 1: receive waits for room; with sync/atomic

	mu     sync.Mutex // guards what follows
	size   tty.Size   // that the end was told
	gap    uint64     // printed bytes that were dropped since the link was up
	endErr error      // what ended the end
	closed bool
}

// counters are updated with sync/atomic.
type counters struct {
	Printed uint64 // bytes that the host has
	// PrintedLost is bytes that were dropped: more was printed while there was no link than is kept.
	PrintedLost uint64
	// PrintedUnsure is bytes that were in the host's hands when the device went down: it may have printed them or not.
	PrintedUnsure uint64
	Typed         uint64 // bytes that the host sent
	TypedLost     uint64 // bytes of these that nobody took: no program had the terminal open
	InFlight      uint64 // bytes in the host's hands
}

var _ driver.Driver = (*Console)(nil)
var _ driver.Small = (*Console)(nil)

// New returns the driver, and begins to read what its end prints.
func New(cfg Config) (*Console, error) {
	c := &Console{cfg: cfg}
	for _, e := range []**doorbell.Eventfd{&c.more, &c.room} {
		var err error
		if *e, err = doorbell.NewEventfd(); err != nil {
			if c.more != nil {
				c.more.Close()
			}
			return nil, fmt.Errorf("%s: %w", cfg.Name, err)
		}
	}
	nothing := func() {}
	c.out = newBuffer(Backlog, func() { c.more.Ring() }, nothing) // neither ring can fail: they are this program's alone
	c.in = newBuffer(Backlog, nothing, func() {
		if atomic.LoadUint32(&c.short) != 0 {
			c.room.Ring()
		}
	})
	c.out.setWait(cfg.End.Keeps())
	c.in.setWait(true)
	features := plain.Features.Or(virtio.FeaturesOf(virtio.ConsoleSize))
	c.Base = plain.New(plain.Config{Name: cfg.Name, Type: "console", Number: cfg.Number, DeviceID: virtio.IDConsole, Queues: queues,
		Features: features.Without(cfg.Deny), Joined: cfg.End.Joined()})
	c.ends.Add(2)
	go c.read()
	go c.write()
	return c, nil
}

// read takes what the end prints, until it ends.
func (c *Console) read() {
	defer c.ends.Done()
	var buf [4096]byte
	for {
		n, err := c.cfg.End.Read(buf[:])
		if lost := uint64(c.out.put(buf[:n])); lost > 0 {
			atomic.AddUint64(&c.n.PrintedLost, lost)
			c.mu.Lock()
			c.gap += lost
			c.mu.Unlock()
		}
		if err != nil {
			c.ended(err)
			return
		}
	}
}

// write passes on what is typed, until the end ends.
func (c *Console) write() {
	defer c.ends.Done()
	var buf [4096]byte
	for {
		k := c.in.await(buf[:])
		if k == 0 {
			return
		}
		n, err := c.cfg.End.Write(buf[:k])
		atomic.AddUint64(&c.n.TypedLost, uint64(k-n))
		if err != nil {
			c.ended(err)
			return
		}
	}
}

// ended notes why the end does nothing any more.
func (c *Console) ended(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.closed && c.endErr == nil {
		c.endErr = err
	}
}

// The sizes of buffers that are tried, from the one that a large window has room for: descriptors of each queue, bytes of their
// buffers.
var sizes = []struct {
	queue    uint16
	out, in  uint32
	together uint64 // with the rings: 82 bytes for a descriptor and what is aligned at most
}{
	{16, 4096, 2048, 112 << 10},
	{16, 1024, 512, 32 << 10},
	{8, 512, 256, 8 << 10},
	{8, 128, 64, 4 << 10},
}

// Memory implements driver.Small.
func (c *Console) Memory(size uint64) uint64 {
	for _, s := range sizes {
		if s.together <= size/8 {
			return s.together
		}
	}
	return sizes[len(sizes)-1].together
}

// Up implements driver.Driver.
func (c *Console) Up(t driver.Transport, m driver.Layout, broken func(error)) error {
	err := c.Base.Up(t, m, broken, func(s *plain.Session) error {
		free := m.Near.Alloc.FreeBytes()
		if n := m.Far.Alloc.FreeBytes(); n < free {
			free = n
		}
		fit := sizes[len(sizes)-1]
		for _, try := range sizes {
			if try.together <= free {
				fit = try
				break
			}
		}
		rx, err := s.Queue(toDriver, "rx", fit.queue, fit.in, true, c.room)
		if err != nil {
			return err
		}
		tx, err := s.Queue(fromDriver, "tx", fit.queue, fit.out, false, c.more)
		if err != nil {
			return err
		}
		if err := c.resize(t, s.Accepted); err != nil {
			return err
		}
		s.Loop(func() error { return c.receive(rx) })
		s.Loop(func() error { return c.send(tx) })
		c.out.setWait(true)
		return nil
	})
	if err != nil {
		c.out.setWait(c.cfg.End.Keeps())
	}
	return err
}

// Down implements driver.Driver. What is printed from now on waits for the next Up, as far as it is kept.
func (c *Console) Down() {
	c.Base.Down()
	c.out.setWait(c.cfg.End.Keeps())
}

// Reconfigure implements driver.Driver: the size has changed.
func (c *Console) Reconfigure(t driver.Transport) error {
	_, _, accepted := c.Base.Features()
	return c.resize(t, accepted)
}

// resize tells the end the size that the device has, where it has one.
func (c *Console) resize(t driver.Transport, f virtio.Features) error {
	if !f.Has(virtio.ConsoleSize) {
		return nil
	}
	b, err := t.Config(0, 4) // le16 cols, le16 rows
	if err != nil {
		return err
	}
	if len(b) < 4 {
		return fmt.Errorf("%s: the host's configuration has %d bytes, the size needs 4", c.cfg.Name, len(b))
	}
	s := tty.Size{Cols: binary.LittleEndian.Uint16(b), Rows: binary.LittleEndian.Uint16(b[2:])}
	c.mu.Lock()
	same := s == c.size
	c.size = s
	c.mu.Unlock()
	if !same && s != (tty.Size{}) {
		c.cfg.End.Resize(s)
	}
	return nil
}

// receive takes what is typed. As many buffers are the device's as there is room for in c.in, so what comes always fits.
func (c *Console) receive(q *plain.Queue) error {
	var done [batch]vring.Completion
	idle := make([]uint32, 0, len(q.Buffers))
	for i := range q.Buffers {
		idle = append(idle, uint32(i))
	}
	size := int(q.Buffers[0].Len)
	buf := make([]byte, size)
	for {
		n, err := q.Reap(done[:])
		q.Sleep.Found(n > 0)
		if err != nil {
			return err
		}
		for _, d := range done[:n] {
			if d.Len == 0 {
				return errEmpty
			}
			b := buf[:d.Len] // at most what the buffer has
			q.Buffers[d.Token].CopyOut(b, 0)
			atomic.AddUint64(&c.n.Typed, uint64(len(b)))
			atomic.AddUint64(&c.n.TypedLost, uint64(c.in.put(b))) // only of a console that is closed
			idle = append(idle, d.Token)
		}
		for given := len(q.Buffers) - len(idle); len(idle) > 0 && c.in.room() >= (given+1)*size; given++ {
			if err := q.Offer(q.Read(idle[len(idle)-1])); err != nil {
				return err
			}
			idle = idle[:len(idle)-1]
		}
		if n > 0 {
			continue
		}
		if len(idle) == 0 {
			atomic.StoreUint32(&c.short, 0)
		} else if atomic.SwapUint32(&c.short, 1) == 0 {
			continue // room that came before is seen now, what comes later rings
		}
		if stop, err := rest(q); stop || err != nil {
			return err
		}
	}
}

// batch is how many completions are taken at once.
const batch = 16

// rest waits until there may be more to do.
func rest(q *plain.Queue) (stop bool, err error) {
	if pending, err := q.ArmCall(); err != nil || pending {
		return false, err
	}
	why, err := q.Sleep.Sleep(0)
	return why&doorbell.Stopped != 0, err
}

// send prints what the end has. Of what the host has not given back at the end, nobody knows whether it is printed: it is not sent
// again.
func (c *Console) send(q *plain.Queue) error {
	idle := make([]uint32, 0, len(q.Buffers))
	for i := range q.Buffers {
		idle = append(idle, uint32(i))
	}
	lens := make([]uint32, len(q.Buffers))
	defer func() {
		atomic.AddUint64(&c.n.PrintedUnsure, atomic.SwapUint64(&c.n.InFlight, 0))
	}()
	var done [batch]vring.Completion
	reap := func() (int, error) {
		n, err := q.Reap(done[:])
		for _, d := range done[:n] {
			k := uint64(lens[d.Token])
			atomic.AddUint64(&c.n.Printed, k)
			atomic.AddUint64(&c.n.InFlight, -k)
			idle = append(idle, d.Token)
		}
		return n, err
	}
	note := c.missing() // goes out first
	buf := make([]byte, q.Buffers[0].Len)
	for {
		n, err := reap()
		q.Sleep.Found(n > 0)
		if err != nil {
			return err
		}
		sent := false
		for len(idle) > 0 {
			k := copy(buf, note)
			if note = note[k:]; k == 0 {
				k = c.out.take(buf)
			}
			if k == 0 {
				break
			}
			i := idle[len(idle)-1]
			idle = idle[:len(idle)-1]
			q.Buffers[i].CopyIn(0, buf[:k])
			lens[i] = uint32(k)
			atomic.AddUint64(&c.n.InFlight, uint64(k))
			if err := q.Offer(q.Write(i, uint32(k))); err != nil {
				return err
			}
			sent = true
		}
		if sent || n > 0 {
			continue
		}
		stop, err := rest(q)
		if stop && err == nil {
			_, err = reap() // what the host has given back meanwhile is printed
		}
		if stop || err != nil {
			return err
		}
	}
}

// missing returns what tells readers of the console that something was dropped in front of what comes next.
func (c *Console) missing() []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := c.gap
	if c.gap = 0; n == 0 {
		return nil
	}
	return []byte(fmt.Sprintf("\r\n[boardlink: %d bytes were dropped here while there was no link]\r\n", n))
}

// Status implements driver.Driver.
func (c *Console) Status() status.Device {
	d := c.Base.Describe()
	n := counters{Printed: atomic.LoadUint64(&c.n.Printed), PrintedLost: atomic.LoadUint64(&c.n.PrintedLost),
		PrintedUnsure: atomic.LoadUint64(&c.n.PrintedUnsure), Typed: atomic.LoadUint64(&c.n.Typed),
		TypedLost: atomic.LoadUint64(&c.n.TypedLost), InFlight: atomic.LoadUint64(&c.n.InFlight)}
	for k, v := range status.Counters(n) {
		d.Counters[k] = v
	}
	c.mu.Lock()
	if c.endErr != nil {
		d.LastError = c.endErr.Error()
	}
	c.mu.Unlock()
	text, more := c.cfg.End.State()
	for k, v := range more {
		d.Counters[k] = v
	}
	if text != "" {
		d.Notes = append(d.Notes, text)
	}
	d.Offered, d.Allowed, d.Negotiated = c.names()
	return d
}

// names are those of the features, where bit 0 is the console's own.
func (c *Console) names() (offered, allowed, negotiated []string) {
	o, a, n := c.Base.Features()
	return virtio.ConsoleNames(o), virtio.ConsoleNames(a), virtio.ConsoleNames(n)
}

// Close implements driver.Driver.
func (c *Console) Close() error {
	c.mu.Lock()
	was := c.closed
	c.closed = true
	c.mu.Unlock()
	if was {
		return nil
	}
	c.Base.Down()
	c.out.close()
	c.in.close()
	err := c.cfg.End.Close()
	c.ends.Wait()
	c.more.Close()
	c.room.Close()
	return err
}
