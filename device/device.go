// Package device says what a virtio device model is to the control plane that serves it: its identity,
// features, configuration and queues, and what it is given to work with.
//
// It must not know messages, sockets, boards, or link pages: the same models are served over virtio-msg and
// other control planes.
package device

import (
	"errors"
	"fmt"
	"time"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/vring"
)

var (
	// ErrReadOnly is returned by WriteConfig where the driver may not write there.
	ErrReadOnly = errors.New("the configuration is the device's to write")
	// ErrStuck: a queue's loop has not come to rest at the deadline (a system call blocks it, or an engine). Its memory, descriptors
	// and engine are still in use; the call may be made again.
	ErrStuck = errors.New("the queue does not come to rest")
	// ErrStarted: the queue is started already.
	ErrStarted = errors.New("the queue is started")
	// ErrStopped: the queue is not started.
	ErrStopped = errors.New("the queue is not started")
)

// Device is a device model. A control plane drives it in this order:
//
//	Notify, once
//	SetFeatures                   what the driver accepted
//	StartQueue, EnableQueue       for each queue that the driver set up
//	SetRunning(true)              DRIVER_OK, or the first queues are started and enabled
//	   EnableQueue, ChangeQueue, StopQueue, StartQueue: each queue by itself, while the others go on
//	SetRunning(false)             optional: all queues rest, and can go on
//	Reset                         and from the start again
//
// All methods are called from one goroutine, but DeviceID, Features, Config, Queues, Queue and Status, which are
// allowed on any. Those with a deadline wait until the loops concerned are at rest: at the deadline, or never if it is zero, they give
// up with an error that matches ErrStuck.
type Device interface {
	// DeviceID returns the virtio device id (virtio 1.2, 5).
	DeviceID() uint32
	// Features returns what is offered.
	Features() virtio.Features
	// SetFeatures takes what the driver accepted: a subset of Features. An error refuses
	// it (FEATURES_OK stays clear). No queue is started.
	SetFeatures(virtio.Features, Options) error
	// Config returns a copy of the configuration space.
	Config() []byte
	// WriteConfig is the driver's write of b at offset off of the configuration space. ErrReadOnly: nothing
	// there is the driver's to write, and nothing was written.
	WriteConfig(off uint32, b []byte) error
	// Queues returns the number of virtqueues; Queue describes one, as the accepted features have it.
	Queues() int
	Queue(i int) QueueInfo
	// StartQueue gives queue i its resources, to go on at s (the zero State: anew). It begins disabled, unless EnableQueue was called
	// before, and moves nothing before SetRunning.
	StartQueue(i int, r Resources, s vring.State) error
	// EnableQueue enables queue i, or disables it: then what the driver sends is taken and dropped, and it
	// receives nothing. It may come before StartQueue, and holds until Reset.
	EnableQueue(i int, on bool, deadline time.Time) error
	// ChangeQueue gives a started queue some of its resources anew, between two batches. Nothing of what
	// it had before is in use when it returns. A region table is replaced so: store the new one, call ChangeQueue for each started
	// queue, unmap what only the old one had.
	ChangeQueue(i int, c Change, deadline time.Time) error
	// StopQueue ends all access to queue i and its resources before it returns.
	StopQueue(i int, deadline time.Time) (Stopped, error)
	// SetRunning lets the started queues move, and tells the device's other end (the carrier of an interface). The first
	// time after Reset, what waits at that end from before is dropped.
	SetRunning(on bool, deadline time.Time) error
	// Reset stops all queues and forgets what the driver set up. It is idempotent.
	Reset(deadline time.Time) error
	// Notify sets who hears of events, from any goroutine.
	Notify(func(Event))
	// Status describes the model for an operator.
	Status() status.Device
	// Close resets the device and gives back what it is joined to.
	Close() error
}

// Options say how a device is served.
type Options struct {
	// ControlElsewhere: the control queue of a network device is served by somebody else (the front end of vhost-user). EnableQueue
	// tells which queue pairs are in use, and VIRTIO_NET_F_MQ may come without VIRTIO_NET_F_CTRL_VQ.
	ControlElsewhere bool
	// InOrder: where this program is killed, the next one knows no more of a queue than its used index. Chains are completed in the
	// order in which they were made available, so that those behind the index are just the ones to be served again.
	InOrder bool
}

// QueueInfo describes a virtqueue.
type QueueInfo struct {
	Name     string // of device and queue, for errors and logs: "net0 rx0"
	Max      uint16 // the largest size in descriptors; 0: there is no such queue
	ToDriver bool   // the device writes its buffers: a queue that the driver receives by
	Stage    uint32 // bytes of staging memory that a copy engine takes at least; 0: it has no use for one
}

// Areas are where a virtqueue lies, each in one region.
type Areas struct {
	Desc, Driver, Device dma.Span
}

// CopyEngine copies between buffers and this side's memory. It belongs to the control plane, which closes it after the queue has
// stopped.
type CopyEngine struct {
	Mover   *dma.Mover
	Staging dma.Span
}

// Resources are what a queue works with. They stay valid until StopQueue or Reset has returned.
type Resources struct {
	Size  uint16 // descriptors
	Areas Areas  // see Translate
	// Table translates the addresses of buffers. Store replaces it while the queue runs; see ChangeQueue.
	Table *dma.TableRef
	Kick  doorbell.Waiter // the driver kicks it; doorbell.None: it is polled
	Call  doorbell.Ringer // calls the driver
	// Account counts the accesses to memory; nil: the model has an account of its own.
	Account *dma.QueueAccount
	Copy    *CopyEngine // nil: the processor copies
	// Log is where the queue marks what it writes; the zero Log: nowhere.
	Log vring.Log
	// Journal is where a packed queue keeps its place; nil: nowhere.
	Journal *vring.Journal
}

// Change is what of a started queue's Resources is given anew; nil fields stay.
type Change struct {
	Areas *Areas // of the same ring, in another mapping of the same memory
	Kick  doorbell.Waiter
	Call  doorbell.Ringer
	Log   *vring.Log // all writes from then on are marked there, all before are in the one before
}

// Stopped is what is left of a queue that has stopped.
type Stopped struct {
	// State is where StartQueue goes on: what the device did is completed, all else is still the driver's.
	State vring.State
	// Err is what ended the queue before it was stopped, nil where nothing did.
	Err error
}

// Event is what a device model tells its control plane, from any goroutine.
type Event struct {
	// Broken is why the device needs a reset, with a cause (CauseOf); nil where just the configuration changed.
	Broken error
	// Queue is the queue that has ended, until it is stopped and started; the others go on. -1: all of them.
	Queue int
}

// Linked is a Device with a link state at its driver's end.
type Linked interface {
	// SetPeerLink tells whether the driver's end is up. It is called on the control plane's goroutine, and
	// each reset makes it up again.
	SetPeerLink(up bool)
}

// Announcer is a Device that can tell the network at its own end that its driver's address is here now.
type Announcer interface {
	// Announce sends one announcement of the MAC address. It is called on the control plane's goroutine, whether the device
	// runs or not.
	Announce(mac [6]byte) error
}

// Translate checks what a driver says of a queue and translates the addresses of its areas. Errors name the queue, the value and
// the bound.
func Translate(t *dma.Table, q QueueInfo, size uint16, packed bool, desc, driver, dev dma.Addr) (a Areas, err error) {
	if size == 0 || size > q.Max || !packed && size&(size-1) != 0 {
		return a, fmt.Errorf("%s: a queue size of %d: it has to be up to %d, and of a split queue a power of two", q.Name, size, q.Max)
	}
	descLen, driverLen, deviceLen := vring.SplitSizes(size)
	access := dma.DeviceRead
	if packed {
		descLen, driverLen, deviceLen = vring.PackedSizes(size)
		access |= dma.DeviceWrite
	}
	if a.Desc, err = area(t, q.Name, "descriptor", desc, descLen, access); err != nil {
		return a, err
	}
	if a.Driver, err = area(t, q.Name, "driver", driver, driverLen, dma.DeviceRead); err != nil {
		return a, err
	}
	a.Device, err = area(t, q.Name, "device", dev, deviceLen, dma.DeviceWrite)
	return a, err
}

// area translates one area of a queue: n bytes at addr, which have to lie in one region that permits the access.
func area(t *dma.Table, queue, name string, addr dma.Addr, n uint64, need dma.Access) (dma.Span, error) {
	s, err := t.Translate(nil, addr, uint32(n), need)
	if err != nil {
		return dma.Span{}, fmt.Errorf("%s: %s area: %w", queue, name, err)
	}
	if len(s) != 1 {
		return dma.Span{}, fmt.Errorf("%s: %s area of %#x bytes at %#x lies in %d regions, it has to lie in one", queue, name, n, uint64(addr), len(s))
	}
	return s[0], nil
}
