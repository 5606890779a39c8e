// Package block drives a virtio block device (virtio 1.2, 5.2). Several submitters share a Disk: requests are split into what the
// device takes, wait for memory instead of failing, and are sent again where the host died before it answered them.
//
// It must not know messages, sockets, boards, or who reads and writes the disk.
package block

import (
	"fmt"
	"sort"
	"sync"

	"github.com/boardlink/boardlink/driver"
	"github.com/boardlink/boardlink/driver/internal/plain"
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/virtio"
)

const (
	// DefaultQueueSize is how many descriptors a queue has where Config does not say it. A request takes three.
	DefaultQueueSize = 256
	// MaxQueues is the most that Config.Queues may ask for.
	MaxQueues = 16
	// maxPart is what goes to the device in one request, in bytes: larger ones are split, so that the parts are worked on side by
	// side.
	maxPart = 256 << 10
	// maxBlock is the largest block of a disk, in bytes.
	maxBlock = 64 << 10
	// maxPool bounds the memory for data in each direction, in bytes.
	maxPool = 64 << 20
)

// features are what the driver can use.
var features = plain.Features.Or(virtio.FeaturesOf(virtio.BlkSizeMax, virtio.BlkSegMax, virtio.BlkRO, virtio.BlkBlkSize, virtio.BlkFlush,
	virtio.BlkTopology, virtio.BlkMQ, virtio.BlkDiscard, virtio.BlkWriteZeroes))

// Config says how a block device is used.
type Config struct {
	Name      string // "disk0": for errors and status
	Number    uint16 // device number on the link
	Queues    int    // at most; 0: 1
	QueueSize uint16 // descriptors of a queue at most, a power of two from 4 on; 0: DefaultQueueSize
	Deny      virtio.Features
	// Joined names what the disk is joined to, for the log and status.
	Joined string
	// Changed, if not nil, is called when Info may have changed: after the device came up, and when its size changed. It does not block.
	Changed func()
}

// Info is what a device says of itself.
type Info struct {
	Size        uint64 // bytes
	BlockSize   uint32 // bytes: what requests should be multiples of
	Preferred   uint32 // bytes: a good size for requests; 0: not known
	ReadOnly    bool
	Flush       bool // there is a cache to be flushed
	Discard     bool
	WriteZeroes bool
	Serial      string // as GetID returns it
}

// limits are what the device said, for one session.
type limits struct {
	Info
	part    uint32 // bytes of data of a request
	piece   uint32 // bytes of one buffer of data
	pieces  int    // buffers of data of a request
	discard uint64 // bytes
	zeroes  uint64 // bytes
}

// session is a device that is up.
type session struct {
	lim       *limits
	queues    []*queue
	near, far *pool // the same in placement window
}

// counters are guarded by Disk.mu.
type counters struct {
	Reads        uint64 // completed, with WriteBytes and the others below
	ReadBytes    uint64
	Writes       uint64
	WriteBytes   uint64
	Flushes      uint64
	Discards     uint64
	WriteZeroes  uint64
	Errors       uint64 // requests that failed
	Parts        uint64 // requests sent to the device: parts of those above
	Resent       uint64 // of these, how many were in flight when the device went away, and are sent again
	Canceled     uint64 // requests given up before they were sent
	Held         uint64 // requests that waited for an earlier one which they overlap
	SizeChanges  uint64
	InFlight     uint64 // parts that the device has
	Waiting      uint64 // requests that are not completed
	SizeBytes    uint64
	BlockSize    uint64
	ReadOnlyDisk uint64 // 1 if it is
}

// common is the part of driver.Driver that package plain does for us: all of its Base but driver.Small, as a disk takes an equal
// share of the memory.
type common interface {
	Name() string
	Number() uint16
	DeviceID() uint32
	Joined() string
	Doorbells() int
	Pairs() (int, bool)
	LimitPairs(int)
	OnChange(func())
	LinkUp() bool
	Remade() bool
	Warning() string
	ShortOf() string
	Unmet() []string
	Failed(error)
}

// Disk drives one block device.
type Disk struct {
	cfg Config
	common
	base *plain.Base

	mu     sync.Mutex // guards what follows
	n      counters
	info   Info
	known  bool
	ready  chan struct{} // closed when info is known
	up     *session      // nil: the device is down
	seq    uint64
	first  *Request // requests that have not ended, in the order of Submit
	last   *Request
	count  uint64
	flight uint64
	todo   work // those of them that wait for the device, or parts
	closed bool
}

var _ driver.Driver = (*Disk)(nil)

// New returns the driver. An error names what is wrong with the configuration.
func New(cfg Config) (*Disk, error) {
	if cfg.Queues == 0 {
		cfg.Queues = 1
	}
	if cfg.QueueSize == 0 {
		cfg.QueueSize = DefaultQueueSize
	}
	if cfg.Queues < 1 || cfg.Queues > MaxQueues {
		return nil, fmt.Errorf("%s: %d queues: 1 to %d are possible", cfg.Name, cfg.Queues, MaxQueues)
	}
	if s := cfg.QueueSize; s < 4 || s > 32768 || s&(s-1) != 0 {
		return nil, fmt.Errorf("%s: a queue size of %d: a power of two from 4 to 32768 is possible", cfg.Name, s)
	}
	base := plain.New(plain.Config{Name: cfg.Name, Type: "block", Number: cfg.Number, DeviceID: virtio.IDBlock, Queues: cfg.Queues,
		Features: features.Without(cfg.Deny), Joined: cfg.Joined, Names: virtio.BlkNames})
	return &Disk{cfg: cfg, common: base, base: base, ready: make(chan struct{})}, nil
}

// Info returns what the device said when it came up last; false if it never has.
func (d *Disk) Info() (Info, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.info, d.known
}

// Ready is closed when Info is known, or the Disk is closed.
func (d *Disk) Ready() <-chan struct{} { return d.ready }

// Up implements driver.Driver. Requests that the device had not answered when it went down are sent again.
func (d *Disk) Up(t driver.Transport, m driver.Layout, broken func(error)) error {
	s := new(session)
	if err := d.base.Up(t, m, broken, func(ps *plain.Session) error { return d.setUp(ps, s, broken) }); err != nil {
		return err
	}
	o := new(outcome)
	d.mu.Lock()
	d.up = s
	serial := d.info.Serial
	d.learn(s.lim)
	d.info.Serial = serial // until the device tells it anew
	d.dispatch(o)
	d.mu.Unlock()
	d.deliver(o)
	d.Submit(&Request{Op: GetID, Data: make([]byte, virtio.BlkIDLen), Owner: (*serialOwner)(d)})
	d.changed()
	return nil
}

// learn takes what the device says. d.mu is held.
func (d *Disk) learn(l *limits) {
	if d.known && d.info.Size != l.Size {
		d.n.SizeChanges++
	}
	d.info = l.Info
	if !d.known {
		d.known = true
		if !d.closed {
			close(d.ready)
		}
	}
}

func (d *Disk) changed() {
	if d.cfg.Changed != nil {
		d.cfg.Changed()
	}
}

// serialOwner takes the serial number.
type serialOwner Disk

// Done implements Owner.
func (o *serialOwner) Done(r *Request) {
	d := (*Disk)(o)
	if r.Err != nil {
		return // not every device has one
	}
	n := 0
	for n < len(r.Data) && r.Data[n] != 0 {
		n++
	}
	d.mu.Lock()
	d.info.Serial = string(r.Data[:n])
	d.mu.Unlock()
	d.changed()
}

// Flush implements Owner.
func (o *serialOwner) Flush() {}

// Down implements driver.Driver. What the device has not answered waits until it is up again.
func (d *Disk) Down() {
	d.mu.Lock()
	s := d.up
	d.up = nil
	d.mu.Unlock()
	if s != nil {
		for _, q := range s.queues {
			q.mu.Lock() // until nobody uses the memory
			q.down = true
			q.mu.Unlock()
		}
	}
	d.base.Down()
	if s != nil {
		d.Cancel((*serialOwner)(d)) // it is asked for each time
		d.reclaim(s)
	}
}

// reclaim takes back what the device had.
func (d *Disk) reclaim(s *session) {
	var o outcome
	d.mu.Lock()
	var lost []extent
	for _, q := range s.queues {
		for i := range q.slots {
			if q.slots[i].r != nil {
				lost = append(lost, q.slots[i].extent)
			}
		}
		q.slots = nil
	}
	d.flight -= uint64(len(lost))
	sort.Slice(lost, func(i, j int) bool {
		a, b := &lost[i], &lost[j]
		return a.r.seq < b.r.seq || a.r.seq == b.r.seq && a.off < b.off
	})
	again := lost[:0]
	var dropped []extent
	for _, e := range lost {
		if e.r.dropped {
			dropped = append(dropped, e)
		} else {
			again = append(again, e)
		}
	}
	d.n.Resent += uint64(len(again))
	d.todo.putBack(again)
	for _, e := range dropped {
		d.settle(e.r, e.n, ErrCanceled, &o)
	}
	d.dropWaiting(&o)
	d.mu.Unlock()
	d.deliver(&o)
}

// Reconfigure implements driver.Driver.
func (d *Disk) Reconfigure(t driver.Transport) error {
	c, err := readConfig(t, 8)
	if err != nil {
		return err
	}
	size, err := d.size(c)
	if err != nil {
		return err
	}
	d.mu.Lock()
	if d.up != nil && d.up.lim.Size != size {
		l := *d.up.lim // requests that are being sent use the old one
		l.Size = size
		d.up.lim = &l
		serial := d.info.Serial
		d.learn(&l)
		d.info.Serial = serial
	}
	d.mu.Unlock()
	d.changed()
	return nil
}

// Close implements driver.Driver. Requests that are not completed fail with ErrClosed, and so do later ones.
func (d *Disk) Close() error {
	d.Down()
	var o outcome
	d.mu.Lock()
	if !d.closed {
		d.closed = true
		if !d.known {
			close(d.ready)
		}
	}
	for d.first != nil { // none of them is in flight
		r := d.first
		r.Err = ErrClosed
		d.unlink(r)
		o.done = append(o.done, r)
	}
	d.todo = work{}
	d.mu.Unlock()
	d.deliver(&o)
	return nil
}

// Status implements driver.Driver.
func (d *Disk) Status() status.Device {
	s := d.base.Describe()
	d.mu.Lock()
	n := d.n
	n.InFlight, n.Waiting, n.SizeBytes, n.BlockSize = d.flight, d.count, d.info.Size, uint64(d.info.BlockSize)
	if d.info.ReadOnly {
		n.ReadOnlyDisk = 1
	}
	d.mu.Unlock()
	for k, v := range status.Counters(n) {
		s.Counters[k] = v
	}
	return s
}
