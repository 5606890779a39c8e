// Package echo is a virtio device that no specification has, with its driver: what the driver sends comes back with each
// byte changed by a key from the configuration. Tests use it to show what a device model and a driver
// take: this folder, and nothing else of the tree.
//
// It must not know messages, sockets, or boards.
package echo

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/driver"
	"github.com/boardlink/boardlink/pci"
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/vring"
)

const (
	ID        = 0xfff0 // virtio device id: no device of the specification
	configLen = 2      // le8 key, which the driver writes; le8 reserved
	queueSize = 16
	maxBytes  = 128 // of a request
)

// features are all that both sides can do.
var features = virtio.FeaturesOf(virtio.Version1, virtio.EventIdx)

// Device is the model.
type Device struct {
	mu     sync.Mutex // guards key
	key    byte
	notify func(device.Event)

	acked   virtio.Features
	queue   *device.Resources // nil: the queue is not started
	q       *vring.SplitDevice
	enabled uint32 // atomic
	running bool
	stop    *doorbell.Eventfd // nil: the queue does not move
	done    chan struct{}
	err     error // what ended it; read it when done is closed
}

var _ device.Device = (*Device)(nil)

// DeviceID implements device.Device.
func (d *Device) DeviceID() uint32 { return ID }

// Features implements device.Device.
func (d *Device) Features() virtio.Features { return features }

// SetFeatures implements device.Device.
func (d *Device) SetFeatures(f virtio.Features, _ device.Options) error {
	if bad := f.Without(features); bad != (virtio.Features{}) {
		return fmt.Errorf("echo: the driver accepts what was not offered: %s", bad)
	}
	d.acked = f
	return nil
}

// Config implements device.Device.
func (d *Device) Config() []byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	return []byte{d.key, 0}
}

// WriteConfig implements device.Device: the key is the driver's to write.
func (d *Device) WriteConfig(off uint32, b []byte) error {
	if off != 0 || len(b) != 1 {
		return device.ErrReadOnly
	}
	d.mu.Lock()
	d.key = b[0]
	d.mu.Unlock()
	return nil
}

// Queues implements device.Device.
func (d *Device) Queues() int { return 1 }

// Queue implements device.Device.
func (d *Device) Queue(i int) device.QueueInfo {
	info := device.QueueInfo{Name: "echo0"}
	if i == 0 {
		info.Max = queueSize
	}
	return info
}

// StartQueue implements device.Device.
func (d *Device) StartQueue(_ int, r device.Resources, s vring.State) (err error) {
	if d.queue != nil {
		return fmt.Errorf("echo: %w", device.ErrStarted)
	}
	if d.q, err = d.ring(&r, s); err != nil {
		return err
	}
	d.queue, d.err = &r, nil
	return d.start()
}

// ring makes the device side of the queue.
func (d *Device) ring(r *device.Resources, s vring.State) (*vring.SplitDevice, error) {
	return vring.NewSplitDevice(vring.Config{Name: "echo", Size: r.Size, Desc: r.Areas.Desc, Driver: r.Areas.Driver, Device: r.Areas.Device,
		Table: r.Table, State: s, EventIdx: d.acked.Has(virtio.EventIdx)})
}

// EnableQueue implements device.Device: what comes while the queue is disabled comes back empty.
func (d *Device) EnableQueue(_ int, on bool, _ time.Time) error {
	v := uint32(0)
	if on {
		v = 1
	}
	atomic.StoreUint32(&d.enabled, v)
	return nil
}

// ChangeQueue implements device.Device.
func (d *Device) ChangeQueue(_ int, c device.Change, deadline time.Time) (err error) {
	if d.queue == nil {
		return fmt.Errorf("echo: %w", device.ErrStopped)
	}
	if err := d.rest(deadline); err != nil {
		return err
	}
	r := *d.queue
	if c.Kick != nil {
		r.Kick = c.Kick
	}
	if c.Call != nil {
		r.Call = c.Call
	}
	if c.Areas != nil {
		r.Areas = *c.Areas
		if d.q, err = d.ring(&r, d.q.State()); err != nil {
			return err
		}
	}
	d.queue = &r
	return d.start()
}

// StopQueue implements device.Device.
func (d *Device) StopQueue(_ int, deadline time.Time) (device.Stopped, error) {
	if d.queue == nil {
		return device.Stopped{}, fmt.Errorf("echo: %w", device.ErrStopped)
	}
	if err := d.rest(deadline); err != nil {
		return device.Stopped{}, err
	}
	s := device.Stopped{State: d.q.State(), Err: d.err}
	d.queue, d.q = nil, nil
	return s, nil
}

// SetRunning implements device.Device.
func (d *Device) SetRunning(on bool, deadline time.Time) error {
	if d.running = on; !on {
		return d.rest(deadline)
	}
	if d.queue == nil {
		return fmt.Errorf("echo: DRIVER_OK without a queue")
	}
	return d.start()
}

// Reset implements device.Device.
func (d *Device) Reset(deadline time.Time) error {
	if err := d.rest(deadline); err != nil {
		return err
	}
	d.running, d.queue, d.q, d.acked = false, nil, nil, virtio.Features{}
	return d.EnableQueue(0, false, deadline)
}

// start lets the queue move.
func (d *Device) start() (err error) {
	if !d.running || d.queue == nil || d.stop != nil || d.err != nil {
		return nil
	}
	if d.stop, err = doorbell.NewEventfd(); err != nil {
		return err
	}
	d.done = make(chan struct{})
	go d.run(d.q, d.queue, d.stop, d.done)
	return nil
}

// rest waits until the queue does not move any more.
func (d *Device) rest(deadline time.Time) error {
	if d.stop == nil {
		return nil
	}
	d.stop.Ring()
	if deadline.IsZero() {
		<-d.done
	} else {
		t := time.NewTimer(time.Until(deadline))
		defer t.Stop()
		select {
		case <-d.done:
		case <-t.C:
			return fmt.Errorf("echo: %w", device.ErrStuck)
		}
	}
	d.stop.Close()
	d.stop = nil
	return nil
}

func (d *Device) run(q *vring.SplitDevice, c *device.Resources, stop *doorbell.Eventfd, done chan struct{}) {
	defer close(done)
	if fault := pci.Guard(func() { d.err = d.serve(q, c, stop) }); fault != nil {
		d.err = fault
	}
	if d.err != nil {
		d.notify(device.Event{Broken: d.err})
	}
}

func (d *Device) serve(q *vring.SplitDevice, c *device.Resources, stop *doorbell.Eventfd) error {
	s := doorbell.NewSleeper(doorbell.SleeperConfig{Doorbell: c.Kick, Stop: stop})
	var b vring.Batch
	var used [queueSize]vring.Used
	for {
		b.Chains, b.Spans = b.Chains[:0], b.Spans[:0]
		n, err := q.Pop(&b, queueSize)
		s.Found(n > 0)
		for i := 0; i < n; i++ {
			used[i] = d.answer(&b, &b.Chains[i])
		}
		if n > 0 {
			call, serr := q.Settle(used[:n], 0)
			if call {
				c.Call.Ring() // one that is lost is made good by the driver's polling
			}
			if err == nil {
				err = serr
			}
		}
		if err != nil {
			return err
		}
		if n > 0 {
			if r, _ := s.Look(0); r&doorbell.Stopped != 0 {
				return nil
			}
			continue
		}
		if pending, err := q.ArmKick(); err != nil {
			return err
		} else if pending {
			continue
		}
		why, err := s.Sleep(0)
		if err != nil || why&doorbell.Stopped != 0 {
			return err
		}
	}
}

// answer fills the writable part of a chain with what its readable part holds.
func (d *Device) answer(b *vring.Batch, c *vring.Chain) vring.Used {
	var buf [maxBytes]byte
	if atomic.LoadUint32(&d.enabled) == 0 {
		return vring.Used{ID: c.ID, Count: c.Count}
	}
	key := d.Config()[0]
	spans := b.Spans[c.First:]
	have := uint32(0)
	for _, s := range spans[:c.Readable] {
		n := s.Len
		if n > maxBytes-have {
			n = maxBytes - have
		}
		s.CopyOut(buf[have:have+n], 0)
		have += n
	}
	for i := range buf[:have] {
		buf[i] ^= key
	}
	used := uint32(0)
	for _, s := range spans[c.Readable : c.Readable+c.Writable] {
		n := s.Len
		if n > have-used {
			n = have - used
		}
		if n > 0 {
			s.CopyIn(0, buf[used:used+n])
		}
		used += n
	}
	return vring.Used{ID: c.ID, Count: c.Count, Len: used}
}

// Notify implements device.Device.
func (d *Device) Notify(f func(device.Event)) { d.notify = f }

// Status implements device.Device.
func (d *Device) Status() status.Device { return status.Device{Name: "echo0", Type: "echo"} }

// Close implements device.Device.
func (d *Device) Close() error { return d.Reset(time.Time{}) }

// Driver sends requests without end, one at a time, and compares what comes back.
type Driver struct {
	echoed uint64 // answers, atomic; first: 64-bit alignment

	Dev uint16 // device number
	Key byte

	closed uint32 // atomic
	stop   *doorbell.Eventfd
	done   chan struct{}
}

var _ driver.Driver = (*Driver)(nil)

// Echoed returns how many answers came, each of them right. Any goroutine may call it.
func (d *Driver) Echoed() uint64 { return atomic.LoadUint64(&d.echoed) }

// Closed tells whether Close was called. Any goroutine may call it.
func (d *Driver) Closed() bool { return atomic.LoadUint32(&d.closed) != 0 }

// Name implements driver.Driver.
func (d *Driver) Name() string { return "echo0" }

// Number implements driver.Driver.
func (d *Driver) Number() uint16 { return d.Dev }

// DeviceID implements driver.Driver.
func (d *Driver) DeviceID() uint32 { return ID }

// Joined implements driver.Driver.
func (d *Driver) Joined() string { return "nothing" }

// Doorbells implements driver.Driver.
func (d *Driver) Doorbells() int { return 1 }

// Pairs implements driver.Driver.
func (d *Driver) Pairs() (int, bool) { return 1, true }

// LimitPairs implements driver.Driver.
func (d *Driver) LimitPairs(int) {}

// Up implements driver.Driver.
func (d *Driver) Up(t driver.Transport, m driver.Layout, broken func(error)) error {
	set := uint32(0)
	for _, s := range []uint32{0, virtio.StatusAcknowledge | virtio.StatusDriver} {
		set = s
		if _, err := t.SetStatus(set); err != nil {
			return err
		}
	}
	f, err := t.Features()
	if err != nil {
		return err
	}
	f = f.And(features)
	if err := t.SetFeatures(f); err != nil {
		return err
	}
	set |= virtio.StatusFeaturesOK
	if s, err := t.SetStatus(set); err != nil || s&virtio.StatusFeaturesOK == 0 {
		return fmt.Errorf("echo: features %s: status %#x, %v", f, s, err)
	}
	if err := t.WriteConfig(0, []byte{d.Key}); err != nil {
		return err
	}
	if err := t.WriteConfig(1, []byte{1}); err == nil {
		return fmt.Errorf("echo: a write of the reserved byte is accepted")
	}
	if c, err := t.Config(0, configLen); err != nil || c[0] != d.Key {
		return fmt.Errorf("echo: the key %d reads as %v, %v", d.Key, c, err)
	}
	size, err := t.QueueMax(0)
	if err != nil {
		return err
	}
	descLen, driverLen, deviceLen := vring.SplitSizes(size)
	c := vring.Config{Name: "echo0", Size: size, EventIdx: f.Has(virtio.EventIdx)}
	var out, in dma.Span
	for _, a := range []struct {
		s *dma.Span
		m *driver.Memory
		n uint64
	}{{&c.Desc, m.Far, descLen}, {&c.Driver, m.Far, driverLen}, {&c.Device, m.Near, deviceLen}, {&out, m.Far, maxBytes}, {&in, m.Near, maxBytes}} {
		if *a.s, err = a.m.Take(c.Name, a.n, 64); err != nil {
			return err
		}
	}
	q, err := vring.NewSplitDriver(c)
	if err != nil {
		return err
	}
	if err := t.SetQueue(0, size, c.Desc.Addr(), c.Driver.Addr(), c.Device.Addr()); err != nil {
		return err
	}
	if s, err := t.SetStatus(set | virtio.StatusDriverOK); err != nil || s&virtio.StatusNeedsReset != 0 {
		return fmt.Errorf("echo: the device does not start: status %#x, %v", s, err)
	}
	if d.stop, err = doorbell.NewEventfd(); err != nil {
		return err
	}
	d.done = make(chan struct{})
	go func(stop *doorbell.Eventfd, done chan struct{}) {
		defer close(done)
		var err error
		if fault := pci.Guard(func() { err = d.ask(q, out, in, t.Kick(0), t.Call(0), stop) }); fault != nil {
			err = fault
		}
		if err != nil {
			broken(err)
		}
	}(d.stop, d.done)
	return nil
}

// ask sends numbers and checks what comes back.
func (d *Driver) ask(q *vring.SplitDriver, out, in dma.Span, kick doorbell.Ringer, call doorbell.Waiter, stop *doorbell.Eventfd) error {
	s := doorbell.NewSleeper(doorbell.SleeperConfig{Doorbell: call, Stop: stop})
	for seq := uint64(0); ; seq++ {
		var msg, got, want [8]byte
		binary.LittleEndian.PutUint64(msg[:], seq*0x9e3779b97f4a7c15)
		for i := range msg {
			want[i] = msg[i] ^ d.Key
		}
		out.CopyIn(0, msg[:])
		if _, err := q.Add([]vring.Request{{Readable: 1, Bufs: []vring.Buffer{{Addr: out.Addr(), Len: 8}, {Addr: in.Addr(), Len: 8}}}}); err != nil {
			return err
		}
		if q.NeedKick() {
			kick.Ring() // one that is lost is made good by the device's polling
		}
		for {
			var done [1]vring.Completion
			n, err := q.Reap(done[:])
			s.Found(n > 0)
			if err != nil {
				return err
			}
			if n > 0 {
				if in.CopyOut(got[:], 0); done[0].Len != 8 || !bytes.Equal(got[:], want[:]) {
					return fmt.Errorf("echo: request %d: %x came back as %x (%d bytes), want %x", seq, msg, got, done[0].Len, want)
				}
				atomic.AddUint64(&d.echoed, 1)
				break
			}
			if pending, err := q.ArmCall(); err != nil {
				return err
			} else if pending {
				continue
			}
			if why, err := s.Sleep(0); err != nil || why&doorbell.Stopped != 0 {
				return err
			}
		}
		if n, _ := stop.Ack(); n > 0 {
			return nil
		}
	}
}

// Down implements driver.Driver.
func (d *Driver) Down() {
	if d.stop == nil {
		return
	}
	d.stop.Ring()
	<-d.done
	d.stop.Close()
	d.stop = nil
}

// Reconfigure implements driver.Driver.
func (d *Driver) Reconfigure(driver.Transport) error { return nil }

// Failed implements driver.Driver.
func (d *Driver) Failed(error) {}

// OnChange implements driver.Driver.
func (d *Driver) OnChange(func()) {}

// LinkUp implements driver.Driver.
func (d *Driver) LinkUp() bool { return true }

// Remade implements driver.Driver.
func (d *Driver) Remade() bool { return false }

// Warning implements driver.Driver.
func (d *Driver) Warning() string { return "" }

// ShortOf implements driver.Driver.
func (d *Driver) ShortOf() string { return "" }

// Unmet implements driver.Driver.
func (d *Driver) Unmet() []string { return nil }

// Status implements driver.Driver.
func (d *Driver) Status() status.Device {
	return status.Device{Name: "echo0", Type: "echo", Number: d.Dev}
}

// Close implements driver.Driver.
func (d *Driver) Close() error {
	atomic.StoreUint32(&d.closed, 1)
	d.Down()
	return nil
}
