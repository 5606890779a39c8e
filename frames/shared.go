package frames

import (
	"fmt"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/vring"
)

// DefaultQueue is how many descriptors each queue of a Shared has that names no number.
const DefaultQueue = 256

// Shared describes memory that two programs, or two goroutines, have in common, with two virtqueues in it: one for frames from the
// driver side to the device side, one for frames back. One of the two calls Driver, the other one Device, with the same Mem, MaxFrame,
// Size and Packed. Connect makes both ends in one program.
//
// The zero value of a field but MaxFrame stands for its default.
type Shared struct {
	Name string // for errors: "link0"
	// Mem is the memory: SharedSize bytes at least, from a multiple of 8 on, as from mmap. Connect makes some where there is none.
	Mem mmio.Mem
	// MaxFrame is the largest frame in bytes: 1 to MaxMaxFrame.
	MaxFrame int
	// Size is the number of descriptors of each queue: at most 32768, and of split queues a power of two. The default is DefaultQueue.
	Size   int
	Packed bool // packed virtqueues; the default are split ones
	Batch  int  // see Config
	Copy   bool // see Config: the device side receives copies
	// Bells wake who waits; nil: both sides poll.
	Bells *Bells
	// Stop, once rung, ends each Wait of this side, now and later, with doorbell.Stopped.
	Stop *doorbell.Eventfd
	// Fallback is how a Wait polls beside its bell.
	Fallback doorbell.Fallback
}

// Bells are the doorbells of a Shared: of each queue the one that the driver side rings, and the one that the device side
// rings. Two programs share them by passing on their descriptors in this order (doorbell.FromFD).
type Bells [4]*doorbell.Eventfd

// NewBells makes four doorbells.
func NewBells() (*Bells, error) {
	b := new(Bells)
	for i := range b {
		e, err := doorbell.NewEventfd()
		if err != nil {
			b.Close()
			return nil, err
		}
		b[i] = e
	}
	return b, nil
}

// Close closes the doorbells. No Wait is under way.
func (b *Bells) Close() error {
	var err error
	for _, e := range b {
		if e == nil {
			continue
		}
		if cerr := e.Close(); err == nil {
			err = cerr
		}
	}
	return err
}

// Port is one end of a link of two queues. Sender and Receiver may belong to a goroutine each.
type Port struct {
	Sender   Sender
	Receiver Receiver
	// MaxFrame is the longest frame to send, in bytes; frames received are not longer than what the other side was told.
	MaxFrame int
	// MAC is this end's Ethernet address; zero where none was agreed on.
	MAC [6]byte

	stop *doorbell.Eventfd // ends each Wait; nil where the program has it
}

// sharedBase is the address of the memory in the descriptors.
const sharedBase dma.Addr = 1 << 20

// SharedSize returns how many bytes of memory a Shared takes, for frames of at most maxFrame bytes and queues of so many
// descriptors, both within the bounds of its fields.
func SharedSize(maxFrame, queue int) uint64 {
	n := uint64(0)
	for _, sizes := range []func(uint16) (uint64, uint64, uint64){vring.SplitSizes, vring.PackedSizes} {
		desc, driver, device := sizes(uint16(queue))
		if k := wholeLines(desc) + wholeLines(driver) + wholeLines(device); k > n {
			n = k
		}
	}
	return 2 * (n + wholeLines(MemSize(maxFrame, queue)))
}

// wholeLines rounds up to whole lines.
func wholeLines(n uint64) uint64 { return (n + line - 1) &^ (line - 1) }

// queues fills in defaults, checks, and lays both queues out: their areas, and the memory for their frames.
func (s *Shared) queues() (q [2]vring.Config, data [2]dma.Span, err error) {
	if s.Name == "" {
		s.Name = "shared"
	}
	if s.Size == 0 {
		s.Size = DefaultQueue
	}
	if s.Size < 1 || s.Size > vring.MaxSize {
		return q, data, fmt.Errorf("%s: queues of %d descriptors: 1 to %d: %w", s.Name, s.Size, vring.MaxSize, ErrConfig)
	}
	if s.MaxFrame < 1 || s.MaxFrame > MaxMaxFrame {
		return q, data, fmt.Errorf("%s: frames of at most %d bytes: 1 to %d: %w", s.Name, s.MaxFrame, MaxMaxFrame, ErrConfig)
	}
	if need := SharedSize(s.MaxFrame, s.Size); s.Mem.Size() < need {
		return q, data, fmt.Errorf("%s: memory of %d bytes, frames of %d bytes and queues of %d descriptors take %d (SharedSize): %w", s.Name, s.Mem.Size(),
			s.MaxFrame, s.Size, need, ErrConfig)
	}
	region := &dma.Region{Name: s.Name, Addr: sharedBase, Mem: s.Mem, Access: dma.DeviceRead | dma.DeviceWrite}
	table, err := dma.NewTable(*region)
	if err != nil {
		return q, data, fmt.Errorf("%s: %w", s.Name, err)
	}
	ref := new(dma.TableRef)
	ref.Store(table)
	off := uint64(0)
	take := func(n uint64) dma.Span {
		a := dma.Span{Region: region, Off: off, Len: uint32(n)}
		off += wholeLines(n)
		return a
	}
	sizes := vring.SplitSizes
	if s.Packed {
		sizes = vring.PackedSizes
	}
	for i := range q {
		desc, driver, device := sizes(uint16(s.Size))
		q[i] = vring.Config{Name: fmt.Sprintf("%s queue %d", s.Name, i), Size: uint16(s.Size), Desc: take(desc), Driver: take(driver), Device: take(device),
			EventIdx: true, InOrder: true, Table: ref, PayloadKind: s.Mem.Kind()}
		data[i] = take(MemSize(s.MaxFrame, s.Size))
	}
	return q, data, nil
}

// config returns what the end at queue i needs.
func (s *Shared) config(i int, device bool) Config {
	c := Config{Name: fmt.Sprintf("%s queue %d", s.Name, i), MaxFrame: s.MaxFrame, Batch: s.Batch, Copy: s.Copy && device,
		Sleep: doorbell.SleeperConfig{Doorbell: doorbell.None, Stop: s.Stop, Fallback: s.Fallback}}
	if s.Bells != nil {
		ring, wait := s.Bells[2*i], s.Bells[2*i+1]
		if device {
			ring, wait = wait, ring
		}
		c.Ring, c.Sleep.Doorbell = ring, wait
	}
	return c
}

// Driver makes the driver side's end. It writes both queues anew, so that it comes first: the other side calls Device when
// Driver has returned.
func (s Shared) Driver() (Port, error) {
	q, data, err := s.queues()
	if err != nil {
		return Port{}, err
	}
	var d [2]vring.Driver
	for i := range d {
		if s.Packed {
			d[i], err = vring.NewPackedDriver(q[i])
		} else {
			d[i], err = vring.NewSplitDriver(q[i])
		}
		if err != nil {
			return Port{}, err
		}
	}
	send, err := NewDriverSender(s.config(0, false), d[0], data[0])
	if err != nil {
		return Port{}, err
	}
	receive, err := NewDriverReceiver(s.config(1, false), d[1], data[1])
	if err != nil {
		return Port{}, err
	}
	return Port{Sender: send, Receiver: receive, MaxFrame: s.MaxFrame, stop: s.Stop}, nil
}

// Device makes the device side's end, once the driver side has made its own.
func (s Shared) Device() (Port, error) {
	q, _, err := s.queues()
	if err != nil {
		return Port{}, err
	}
	var d [2]vring.Device
	for i := range d {
		if s.Packed {
			d[i], err = vring.NewPackedDevice(q[i])
		} else {
			d[i], err = vring.NewSplitDevice(q[i])
		}
		if err != nil {
			return Port{}, err
		}
	}
	receive, err := NewDeviceReceiver(s.config(0, true), d[0])
	if err != nil {
		return Port{}, err
	}
	send, err := NewDeviceSender(s.config(1, true), d[1])
	if err != nil {
		return Port{}, err
	}
	return Port{Sender: send, Receiver: receive, MaxFrame: s.MaxFrame, stop: s.Stop}, nil
}

// Connection is a Shared with both ends in one program.
type Connection struct {
	Driver, Device Port

	stop, bells []*doorbell.Eventfd // to close
	ring        *doorbell.Eventfd
}

// Connect makes both ends of s, with memory, bells and Stop of their own where s has none.
func Connect(s Shared) (*Connection, error) {
	if s.Size == 0 {
		s.Size = DefaultQueue
	}
	if s.Mem.Size() == 0 && s.Size > 0 && s.Size <= vring.MaxSize && s.MaxFrame > 0 && s.MaxFrame <= MaxMaxFrame {
		s.Mem = mmio.FromBytes(make([]byte, SharedSize(s.MaxFrame, s.Size)))
	}
	c := new(Connection)
	var err error
	if s.Stop == nil {
		if s.Stop, err = doorbell.NewEventfd(); err != nil {
			return nil, err
		}
		c.stop = append(c.stop, s.Stop)
	}
	c.ring = s.Stop
	if s.Bells == nil {
		if s.Bells, err = NewBells(); err != nil {
			c.Close()
			return nil, err
		}
		c.bells = s.Bells[:]
	}
	if c.Driver, err = s.Driver(); err == nil {
		c.Device, err = s.Device()
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// Stop ends each Wait, now and later, with doorbell.Stopped.
func (c *Connection) Stop() error { return c.ring.Ring() }

// Close closes the bells that Connect made. No Wait is under way.
func (c *Connection) Close() error {
	var err error
	for _, e := range append(c.bells, c.stop...) {
		if cerr := e.Close(); err == nil {
			err = cerr
		}
	}
	c.bells, c.stop = nil, nil
	return err
}
