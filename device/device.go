// Package device says what a virtio device model is to the control plane that serves it: its identity,
// features, configuration and queues, and what it is given to work with.
//
// It must not know messages, sockets, boards, or link pages: the same models are served over virtio-msg and
// other control planes.
package device

import (
	"errors"
	"fmt"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/vring"
)

// ErrReadOnly is returned by WriteConfig where the driver may not write there.
var ErrReadOnly = errors.New("the configuration is the device's to write")

// QueueConfig is one virtqueue as a control plane sets it up.
type QueueConfig struct {
	Size                 uint16
	Desc, Driver, Device dma.Addr // link addresses of the three areas
	State                vring.State
	Kick                 doorbell.Waiter // the driver kicks it
	Call                 doorbell.Ringer // calls the driver
}

// Event is what a device model tells its control plane, from any goroutine.
type Event struct {
	// Broken is why the device needs a reset; nil where just the configuration changed.
	Broken error
}

// Device is a device model.
//
// The control plane calls the methods from one goroutine: SetEngines once, at first; SetFeatures, SetMemory
// and SetQueue while stopped; then Start; then Stop, which returns the queues' states. Features, Config, QueueMax
// and Status are allowed at any time, on any goroutine.
type Device interface {
	// DeviceID returns the virtio device id (virtio 1.2, 5).
	DeviceID() uint32
	// Features returns what is offered.
	Features() virtio.Features
	// SetFeatures takes what the driver accepted: a subset of Features. An error refuses
	// it (FEATURES_OK stays clear).
	SetFeatures(virtio.Features) error
	// Config returns a copy of the configuration space.
	Config() []byte
	// WriteConfig is the driver's write of b at offset off of the configuration space. ErrReadOnly: nothing
	// there is the driver's to write, and nothing was written.
	WriteConfig(off uint32, b []byte) error
	// Queues returns the number of virtqueues; QueueMax the largest size of one.
	Queues() int
	QueueMax(i int) uint16
	// SetMemory gives the region table that translates link addresses.
	SetMemory(*dma.TableRef)
	// SetEngines gives the copy engines for the device's queues.
	SetEngines(Engines)
	// SetQueue sets up queue i; an error names what is wrong with it.
	SetQueue(i int, q QueueConfig) error
	// Start begins to serve the queues that are set up.
	Start() error
	// Stop ends all access to the queues and the memory before it returns; it is
	// idempotent. The queues are to be set up again before the next Start.
	Stop() []vring.State
	// Notify sets who hears of events; it is called while stopped.
	Notify(func(Event))
	// Status describes the model for an operator.
	Status() status.Device
	// Close gives back what the device is joined to. The model is stopped.
	Close() error
}

// Linked is a Device with a link state at its driver's end.
type Linked interface {
	// SetPeerLink tells whether the driver's end is up. It is called on the control plane's goroutine, and
	// each reset makes it up again.
	SetPeerLink(up bool)
}

// EngineJob is a queue that may use a copy engine.
type EngineJob struct {
	Queue   int
	Name    string // of device and queue, for the log
	ToBoard bool   // the engine would write to the board: a queue that the driver receives by
	Stage   uint32 // bytes of staging memory that two frames in flight take
}

// Engines hands out copy engines for the queues of one device. What cannot be had is left to the
// processor. Prepare, Engine and Release are called on the goroutine that starts and stops the device.
type Engines interface {
	// Prepare opens engines for the queues of a device that starts.
	Prepare(jobs []EngineJob)
	// Engine returns what Prepare opened for a queue, with its staging memory; false: the processor copies.
	Engine(queue int) (m *dma.Mover, staging dma.Span, ok bool)
	// Release closes all engines: then they touch no memory any more. The queues have stopped.
	Release()
	// Describe adds the engines' counters to the status of the device.
	Describe(*status.Device)
}

// NoEngines are the Engines of a device whose copies are all the processor's.
type NoEngines struct{}

// Prepare implements Engines.
func (NoEngines) Prepare([]EngineJob) {}

// Engine implements Engines.
func (NoEngines) Engine(int) (*dma.Mover, dma.Span, bool) { return nil, dma.Span{}, false }

// Release implements Engines.
func (NoEngines) Release() {}

// Describe implements Engines.
func (NoEngines) Describe(*status.Device) {}

// Area translates one area of a queue for a model: n bytes at addr, which have to lie in one region that permits
// the access. queue and name are for the error.
func Area(t *dma.Table, queue, name string, addr dma.Addr, n uint64, need dma.Access) (dma.Span, error) {
	s, err := t.Translate(nil, addr, uint32(n), need)
	if err != nil {
		return dma.Span{}, fmt.Errorf("%s: %s area: %w", queue, name, err)
	}
	if len(s) != 1 {
		return dma.Span{}, fmt.Errorf("%s: %s area of %#x bytes at %#x lies in %d regions, it has to lie in one", queue, name, n, uint64(addr), len(s))
	}
	return s[0], nil
}
