package host

import (
	"fmt"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/vring"
)

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

// Backend is a device model as its control plane sees it: the way a vhost back-end is
// driven. A model knows nothing of messages, link pages and boards, so a second control plane
// (vhost-user) drives the same models.
//
// The control plane calls the methods from one goroutine: SetFeatures, SetMemory and SetQueue
// while stopped; then Start; then Stop, which returns the queues' states. Features, Config,
// QueueMax and Status are allowed at any time.
type Backend interface {
	// DeviceID returns the virtio device id.
	DeviceID() uint32
	// Features returns what is offered.
	Features() virtio.Features
	// SetFeatures takes what the driver accepted: a subset of Features. An error refuses
	// it (FEATURES_OK stays clear).
	SetFeatures(virtio.Features) error
	// Config returns a copy of the configuration space.
	Config() []byte
	// Queues returns the number of virtqueues; QueueMax the largest size of one.
	Queues() int
	QueueMax(i int) uint16
	// SetMemory gives the region table that translates link addresses.
	SetMemory(*dma.TableRef)
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
	// Close gives the interface back. The model is stopped.
	Close() error
}

// area translates one area of a queue: it has to lie in one region.
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
