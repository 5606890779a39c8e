// Package driver says what a virtio driver is to the program that runs it, and what a driver needs:
// a transport to its device, and memory to lay its queues and buffers out in.
//
// It must not know messages, sockets, boards, or link pages: the same drivers run over virtio-msg
// and other transports.
package driver

import (
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/virtio"
)

// Transport is a virtio device as its driver reaches it, whatever carries the requests.
type Transport interface {
	// Features returns what the device offers; SetFeatures tells what is accepted.
	Features() (virtio.Features, error)
	SetFeatures(virtio.Features) error
	// Config reads n bytes of the configuration space from off on, at most 40.
	Config(off, n uint32) ([]byte, error)
	// WriteConfig writes b, 1 to 40 bytes, at offset off of the configuration space. An
	// error tells that the device takes no writes there.
	WriteConfig(off uint32, b []byte) error
	// SetStatus writes the device status and returns what the device made of it.
	SetStatus(s uint32) (uint32, error)
	// QueueMax returns the largest size of queue i; 0 where there is none.
	QueueMax(i int) (uint16, error)
	// SetQueue tells the device where the areas of queue i lie.
	SetQueue(i int, size uint16, desc, driver, device dma.Addr) error
	// Kick returns what kicks queue i, Call the end that the device calls for it.
	Kick(i int) doorbell.Ringer
	Call(i int) doorbell.Waiter
}

// Enabler is a Transport whose control plane puts the queues of a network device into use, in place
// of the device's control queue: VIRTIO_NET_F_MQ is offered without VIRTIO_NET_F_CTRL_VQ.
type Enabler interface {
	// EnableQueue puts queue i into use, or out of it; it is called while DRIVER_OK is set. Queues
	// are out of use until then: the device drops what is sent by them, and sends nothing.
	EnableQueue(i int, on bool) error
}

// Driver drives one device of a link. Its owner calls the methods from one goroutine; Status, Close
// and the methods that tell of the interface may be called from others.
type Driver interface {
	// Name is for errors, log and status ("net0"); Number is the device number on the link.
	Name() string
	Number() uint16
	// DeviceID is the virtio device id that the device has to have (virtio 1.2, 5).
	DeviceID() uint32
	// Joined names what the driver joins the device to, for the log: an interface.
	Joined() string
	// Doorbells is for how many queues, from 0 on, the device is to call this side.
	Doorbells() int
	// Pairs returns how many queue pairs the driver could use, and whether the operator chose that
	// number; LimitPairs lowers it.
	Pairs() (n int, chosen bool)
	LimitPairs(n int)
	// Up brings the device up over t (virtio 1.2, 3.1.1), with rings and buffers in m. broken
	// hears, from any goroutine, that a queue ended by an error.
	Up(t Transport, m Layout, broken func(error)) error
	// Down stops all access to rings and buffers before it returns. It is idempotent.
	Down()
	// Reconfigure takes over a configuration that the device changed while it runs.
	Reconfigure(t Transport) error
	// Failed notes for Status why the device does not come up.
	Failed(error)
	// OnChange sets who hears that LinkUp or Remade may have changed.
	OnChange(func())
	// LinkUp tells whether what the device is joined to is up; Remade whether it was made anew
	// since the last call, so that the device has to come up again at once.
	LinkUp() bool
	Remade() bool
	// Warning returns a warning for the log that was not returned before, empty if there is none.
	// ShortOf says what is left out for lack of memory, Unmet what the operator asked for and the
	// device does not have.
	Warning() string
	ShortOf() string
	Unmet() []string
	// Status describes the driver for an operator.
	Status() status.Device
	// Close stops the device and gives back what it is joined to.
	Close() error
}
