package netdrv

import (
	"errors"
	"fmt"
	"runtime"
	"sync"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/driver"
	"github.com/boardlink/boardlink/pci"
	"github.com/boardlink/boardlink/tunbridge"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/vring"
)

// Sizes that the operator did not choose.
const (
	defaultQueueSize = 256
	minRXBuffer      = 2 << 10
	// The largest receive buffer where merging is on. Each takes reads across the bus to find, in placement window, and several TCP
	// streams at once gain by room for more frames.
	maxRXBuffer   = 16 << 10
	maxTXMemory   = 3 << 20   // of a queue; with half of it, several TCP streams at once lost a twentieth
	minPairMemory = 512 << 10 // of the device's memory, each kind, for each queue pair
	ctrlQueueSize = 8
)

// Config says what a network device is to be like on this side.
type Config struct {
	Name   string // "net0": for errors and status
	Number uint16 // device number on the link
	// Interface is the device's own end. A MAC set here wins over the one that the host gives; an
	// MTU here is lowered to the host's.
	Interface tunbridge.Config
	// Deny are features not to be accepted.
	Deny virtio.Features
	// Ring is the kind of virtqueue: "split", "packed" (placement window only), or "auto", the default.
	Ring string
	// Queues is how many queue pairs to use at most; the host may offer fewer. 0 means as many as this machine has processors, and
	// fewer where memory or doorbells are short.
	Queues int
	// QueueSize is in descriptors, a power of two; 0 means 256. The host may ask for fewer, and where memory is short there
	// are fewer.
	QueueSize uint16
	// RXBuffer is the size in bytes of one receive buffer where they can be merged; 0 chooses by the
	// memory there is: at most 16 KiB.
	RXBuffer uint32
	// Fallback is the pace of the poll fallback; the zero value is the default.
	Fallback doorbell.Fallback
	// Loop is how the loops wait; each pair's has one of the processors.
	Loop tunbridge.LoopConfig
}

var _ driver.Driver = (*Net)(nil)

// Net drives one virtio-net device. Each queue pair has a queue of the interface to itself.
type Net struct {
	cfg   Config
	ifc   *tunbridge.Iface
	limit int // pairs to use, at most len(pairs)

	sizeChosen bool // cfg.QueueSize is the operator's

	mu        sync.Mutex // guards what Status reads
	offered   virtio.Features
	acked     virtio.Features
	devStatus uint32
	carrier   bool
	pairs     []netPair
	ctrl      netQueue
	setUps    int // pairs that are set up
	offers    int // pairs that the host offers, which number the queues
	inUse     int // pairs
	stop      *tunbridge.Stop
	loops     sync.WaitGroup
	lastErr   error
	note      string // what is left out for want of room
	ups       uint64
	broken    uint64

	mtuCap  int    // the MTU of an interface that somebody else made: it is not raised; 0: none
	busy    bool   // the interface's descriptors are in use
	ifaceUp bool   // administratively
	remade  bool   // the interface was made again, and the link has not noticed
	wake    func() // of the link
	warning string // to be logged
	warned  string // the last one
}

// netPair is a receive and a transmit queue, and the queue of the interface that they belong to.
type netPair struct {
	ifc    *tunbridge.Iface
	rx, tx netQueue
	loop   tunbridge.Pump // of both
}

type netQueue struct {
	size  uint16
	q     vring.Driver
	pump  tunbridge.Pump
	stats *tunbridge.Stats
	bells *doorbell.Counters
	bus   *dma.QueueAccount
}

func newNetQueue() netQueue {
	return netQueue{stats: new(tunbridge.Stats), bells: new(doorbell.Counters), bus: new(dma.QueueAccount)}
}

// New opens the interface, carrier off. Errors of the user's making satisfy
// tunbridge.UserError.
func New(cfg Config) (*Net, error) {
	switch cfg.Ring {
	case "", "auto", "split", "packed":
	default:
		return nil, fmt.Errorf("%s: a ring %q: it has to be auto, split or packed", cfg.Name, cfg.Ring)
	}
	chosen := cfg.QueueSize != 0
	if !chosen {
		cfg.QueueSize = defaultQueueSize
	}
	if cfg.QueueSize&(cfg.QueueSize-1) != 0 || cfg.QueueSize > vring.MaxSize || cfg.QueueSize < 2 {
		return nil, fmt.Errorf("%s: a queue size of %d: it has to be a power of two from 2 to %d", cfg.Name, cfg.QueueSize, vring.MaxSize)
	}
	cfg.Interface.Queues = cfg.Queues
	if cfg.Queues == 0 {
		if cfg.Interface.Queues = runtime.NumCPU(); cfg.Interface.Queues > tunbridge.MaxQueues {
			cfg.Interface.Queues = tunbridge.MaxQueues
		}
	}
	ifc, err := tunbridge.Open(cfg.Interface)
	if err != nil {
		return nil, err
	}
	if err := ifc.SetCarrier(false); err != nil {
		ifc.Close()
		return nil, err
	}
	n := &Net{cfg: cfg, ifc: ifc, limit: ifc.Queues(), ctrl: newNetQueue(), sizeChosen: chosen}
	for i := 0; i < ifc.Queues(); i++ {
		n.pairs = append(n.pairs, netPair{ifc: ifc.Queue(i), rx: newNetQueue(), tx: newNetQueue()})
	}
	if ifc.Attached() && !cfg.Interface.Persist && cfg.Interface.MTU == 0 {
		n.mtuCap = ifc.MTU()
	}
	n.ifaceUp = ifc.State().Up
	ifc.Watch(n.interfaceChanged)
	return n, nil
}

// Interface returns the device's own end.
func (n *Net) Interface() *tunbridge.Iface { return n.ifc }

func (n *Net) run(p tunbridge.Pump, notify func(error)) {
	defer n.loops.Done()
	var err error
	if fault := pci.Guard(func() { err = p.Run() }); fault != nil {
		err = fault
	}
	if err != nil {
		n.mu.Lock()
		n.lastErr = err
		if !errors.Is(err, tunbridge.ErrGone) { // that is nobody's fault at the queue
			n.broken++
		}
		n.mu.Unlock()
		notify(err)
	}
}

// ShortOf implements driver.Driver: it returns what is left out for want of room, and why; "" if nothing is.
func (n *Net) ShortOf() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.note
}

// Failed implements driver.Driver: it notes for Status why the device does not come up.
func (n *Net) Failed(err error) {
	n.mu.Lock()
	n.lastErr = err
	n.mu.Unlock()
}

// Down implements driver.Driver: it stops the loops, carrier off. The rings stay as they are: the device may still
// look at them. It is idempotent.
func (n *Net) Down() {
	n.mu.Lock()
	stop := n.stop
	n.mu.Unlock()
	if stop == nil {
		return
	}
	n.ifc.SetCarrier(false)
	stop.Raise()
	n.loops.Wait()
	stop.Close()
	// Where the interface is gone it cannot be done, and does not matter.
	n.ifc.SetQueues(1)
	n.mu.Lock()
	n.stop, n.carrier, n.devStatus, n.acked, n.inUse, n.setUps = nil, false, 0, virtio.Features{}, 0, 0
	n.busy = false
	n.mu.Unlock()
}

// Close stops the loops and gives the interface back.
func (n *Net) Close() error {
	n.Down()
	return n.ifc.Close()
}

// Name implements driver.Driver.
func (n *Net) Name() string { return n.cfg.Name }

// Number implements driver.Driver.
func (n *Net) Number() uint16 { return n.cfg.Number }

// DeviceID implements driver.Driver.
func (n *Net) DeviceID() uint32 { return virtio.IDNet }

// Joined implements driver.Driver: the interface's name of the moment.
func (n *Net) Joined() string { return n.ifc.Name() }

// Doorbells implements driver.Driver. The control queue, whose number depends on the host, has none: it has one
// answer to wait for, and polls.
func (n *Net) Doorbells() int { return 2 * n.limit }

// Pairs implements driver.Driver.
func (n *Net) Pairs() (pairs int, chosen bool) { return len(n.pairs), n.cfg.Queues != 0 }

// LimitPairs implements driver.Driver.
func (n *Net) LimitPairs(pairs int) {
	n.mu.Lock()
	n.limit = pairs
	n.mu.Unlock()
}
