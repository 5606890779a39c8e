// Package block is the virtio block device (virtio 1.2, 5.2): the driver's requests are served from a file, a block device, or an
// NBD server, by several goroutines, so that requests are under way at the same time and end in any order.
//
// It must not know messages, boards, or what a driver uses the disk for.
package block

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/device/internal/plain"
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/virtio"
)

const (
	// MaxQueues is the most queues that a disk can have.
	MaxQueues = 16
	queueMax  = 256 // descriptors
	// segMax is how many buffers of data a request of a Linux driver has at most, which fit in a queue of 128 with header and
	// status: some front ends make queues no larger. The device takes more.
	segMax = 126

	// Limits of discards and writes of zeros, offered in the configuration space.
	maxRange    = 1 << 22 // sectors of one segment
	maxSegments = 32      // of one request

	// maxCall is how many bytes one call of the backend moves at most, and an abort waits for.
	maxCall = 4 << 20
	// stagingLen is how many bytes are staged at a time where the driver's buffers are device memory.
	stagingLen = 256 << 10
	// defaultParallel is how many requests are under way at a time, unless the backend says.
	defaultParallel = 32
)

var (
	// ErrHeader: a request without a header (virtio 1.2, 5.2.6).
	ErrHeader = errors.New("a request of less than 16 bytes to read: it has no header")
	// ErrStatus: a request without a status byte.
	ErrStatus = errors.New("a request without a byte to write: it has no status")
)

// Config says what a disk is to be like.
type Config struct {
	Name   string // "root": for errors and status
	Number uint16 // device number on the link
	// Backend is what the disk lies on; the device closes it.
	Backend Backend
	// Serial is what GET_ID tells, up to 20 bytes.
	Serial string
	// WriteThrough: a write ends on stable storage. Otherwise the driver flushes, and may change that.
	WriteThrough bool
	// Queues is how many queues the driver may use, up to MaxQueues; 0: 1.
	Queues int
	// Deny are features not to be offered. Those below bit 24 are the network device's, and do not count.
	Deny virtio.Features
	// Logf, if set, hears of what an operator has to do something about, a line each.
	Logf func(format string, args ...interface{})
}

// Block is the device model.
type Block struct {
	n    counters // first: 64-bit alignment
	pace pace     // next: it begins with 64 bits

	cfg Config
	geo Geometry
	*plain.Set
	pool *pool
	own  []scratch // of the queues' goroutines
	busy int32     // requests in the pool's hands; with sync/atomic

	through  uint32 // 1: the driver turned the write cache off (VIRTIO_BLK_F_CONFIG_WCE); with sync/atomic
	aborting uint32 // 1: Reset, requests that are not served yet are dropped; with sync/atomic
	lost     uint32 // 1: a flush failed; with sync/atomic

	once sync.Once // closes
}

// counters are updated with sync/atomic.
type counters struct {
	Reads, Writes, Flushes, Discards, Zeroes uint64 // requests that succeeded
	ReadBytes, WrittenBytes                  uint64 // of those
	Other                                    uint64 // GET_ID
	Refused                                  uint64 // requests that cannot be: beyond the end, bad lengths
	Unsupported                              uint64 // requests of an unknown type or with unknown flags
	Failed                                   uint64 // requests that the image failed
	Full                                     uint64 // of those, for want of space
	Dropped                                  uint64 // requests under way at a reset
	Staged                                   uint64 // bytes copied from and to device memory
	Syncs                                    uint64 // flushes of the image
}

var _ device.Device = (*Block)(nil)

// New returns the model. An error names what is wrong with the configuration; the backend is still the caller's then.
func New(cfg Config) (*Block, error) {
	if cfg.Queues == 0 {
		cfg.Queues = 1
	}
	if cfg.Queues < 1 || cfg.Queues > MaxQueues {
		return nil, fmt.Errorf("%s: %d queues: 1 to %d are possible", cfg.Name, cfg.Queues, MaxQueues)
	}
	if len(cfg.Serial) > virtio.BlkIDLen || strings.IndexByte(cfg.Serial, 0) >= 0 {
		return nil, fmt.Errorf("%s: a serial number of %d bytes: up to %d are possible, none of them 0", cfg.Name, len(cfg.Serial), virtio.BlkIDLen)
	}
	geo := cfg.Backend.Geometry()
	if geo.Size == 0 || geo.Size%virtio.BlkSector != 0 || geo.BlockSize < virtio.BlkSector || geo.BlockSize&(geo.BlockSize-1) != 0 {
		return nil, fmt.Errorf("%s: %s: %d bytes in blocks of %d are no disk", cfg.Name, geo.Name, geo.Size, geo.BlockSize)
	}
	if cfg.Logf == nil {
		cfg.Logf = func(string, ...interface{}) {}
	}
	cfg.Deny[0] &= 0xff << 24
	b := &Block{cfg: cfg, geo: geo}
	b.Set = plain.New(cfg.Name, cfg.Queues, b.Queue, b)
	b.Set.Doze()
	n := geo.Parallel
	if n <= 0 {
		n = defaultParallel
	}
	b.pace.off = geo.Remote
	b.own = make([]scratch, cfg.Queues)
	b.pool = newPool(n, cfg.Queues*queueMax, func(s *scratch, r *request) {
		b.work(s, r)
		atomic.AddInt32(&b.busy, -1)
	})
	return b, nil
}

// DeviceID implements device.Device.
func (b *Block) DeviceID() uint32 { return virtio.IDBlock }

// Features implements device.Device.
func (b *Block) Features() virtio.Features { return b.possible().Without(b.cfg.Deny) }

// possible are what the model can do.
func (b *Block) possible() virtio.Features {
	f := plain.Features.Or(virtio.FeaturesOf(virtio.RingPacked, virtio.BlkSegMax, virtio.BlkBlkSize, virtio.BlkTopology, virtio.BlkFlush))
	if b.cfg.Queues > 1 {
		f.Set(virtio.BlkMQ)
	}
	if b.geo.ReadOnly {
		f.Set(virtio.BlkRO)
		return f
	}
	if !b.cfg.WriteThrough {
		f.Set(virtio.BlkConfigWCE)
	}
	if b.geo.Discard {
		f.Set(virtio.BlkDiscard)
	}
	f.Set(virtio.BlkWriteZeroes)
	return f
}

// SetFeatures implements device.Device.
func (b *Block) SetFeatures(f virtio.Features, o device.Options) error {
	b.InOrder(o.InOrder)
	return b.Accept(f, b.Features())
}

// Config implements device.Device.
func (b *Block) Config() []byte {
	block := b.geo.BlockSize
	c := virtio.BlkConfig{Capacity: b.geo.Size / virtio.BlkSector, SegMax: segMax, BlkSize: block, NumQueues: uint16(b.cfg.Queues),
		Writeback: !b.cfg.WriteThrough && atomic.LoadUint32(&b.through) == 0}
	for b.geo.Physical>>(c.PhysExp+1) >= block {
		c.PhysExp++
	}
	if n := b.geo.MinIO / block; n < 1<<16 {
		c.MinIO = uint16(n)
	}
	c.OptIO = b.geo.OptIO / block
	if !b.geo.ReadOnly {
		c.MaxDiscard, c.MaxDiscardSegs, c.DiscardAlign = maxRange, maxSegments, block/virtio.BlkSector
		c.MaxZeroes, c.MaxZeroesSegs, c.ZeroesMayUnmap = maxRange, maxSegments, true
	}
	e := c.Encode()
	return e[:]
}

// WriteConfig implements device.Device: the driver may turn the write cache off and on (virtio 1.2, 5.2.5.1).
func (b *Block) WriteConfig(off uint32, p []byte) error {
	if !b.Accepted().Has(virtio.BlkConfigWCE) || off != virtio.BlkWritebackOff || len(p) != 1 || p[0] > 1 {
		return device.ErrReadOnly
	}
	atomic.StoreUint32(&b.through, uint32(1-p[0]))
	return nil
}

// durable tells whether a write has to end on stable storage (virtio 1.2, 5.2.6.2).
func (b *Block) durable() bool {
	return b.cfg.WriteThrough || atomic.LoadUint32(&b.through) != 0 || !b.Accepted().Has(virtio.BlkFlush)
}

// Queue implements device.Device.
func (b *Block) Queue(i int) device.QueueInfo {
	q := device.QueueInfo{Name: b.cfg.Name + " requests"}
	if b.cfg.Queues > 1 {
		q.Name = fmt.Sprintf("%s requests %d", b.cfg.Name, i)
	}
	if i == 0 || i > 0 && i < b.cfg.Queues && b.Accepted().Has(virtio.BlkMQ) {
		q.Max = queueMax
	}
	return q
}

// Serve implements plain.Model: it hands requests to the pool, unless pace says otherwise.
func (b *Block) Serve(w *plain.Worker) (plain.Next, error) {
	if !w.Enabled() {
		return plain.OnWake, nil
	}
	chains, spans, err := w.Pop(queueMax)
	if len(chains) == 0 {
		return plain.OnKick, err
	}
	ticket := w.Later(len(chains))
	for i := range chains {
		c := &chains[i]
		r := b.pool.request()
		r.w, r.chain, r.ticket = w, *c, ticket+uint64(i)
		r.spans = append(r.spans[:0], spans[c.First:int(c.First)+int(c.Readable)+int(c.Writable)]...)
		if len(chains) == 1 && atomic.LoadInt32(&b.busy) == 0 && b.pace.quick(c.ReadLen, c.WriteLen) {
			b.work(&b.own[w.Index()], r)
			b.pool.done(r)
			break
		}
		atomic.AddInt32(&b.busy, 1)
		b.pool.submit(r)
	}
	return plain.Again, err
}

// resetPatience is how much of a reset's time requests have to end by themselves, before the backend is told to give up those that it
// can.
const resetPatience = 2 * time.Second

// Reset implements device.Device. Requests that are not served yet are dropped.
func (b *Block) Reset(deadline time.Time) error {
	atomic.StoreUint32(&b.aborting, 1)
	first := time.Now().Add(resetPatience)
	if !deadline.IsZero() {
		if half := time.Now().Add(time.Until(deadline) / 2); half.Before(first) {
			first = half
		}
	}
	err := b.Set.Reset(first)
	if errors.Is(err, device.ErrStuck) {
		b.cfg.Backend.Abort()
		err = b.Set.Reset(deadline)
	}
	if err != nil {
		return err
	}
	atomic.StoreUint32(&b.aborting, 0)
	atomic.StoreUint32(&b.through, 0)
	return nil
}

// Status implements device.Device.
func (b *Block) Status() status.Device {
	n := &b.n
	c := counters{Reads: atomic.LoadUint64(&n.Reads), Writes: atomic.LoadUint64(&n.Writes), Flushes: atomic.LoadUint64(&n.Flushes),
		Discards: atomic.LoadUint64(&n.Discards), Zeroes: atomic.LoadUint64(&n.Zeroes), ReadBytes: atomic.LoadUint64(&n.ReadBytes),
		WrittenBytes: atomic.LoadUint64(&n.WrittenBytes), Other: atomic.LoadUint64(&n.Other), Refused: atomic.LoadUint64(&n.Refused),
		Unsupported: atomic.LoadUint64(&n.Unsupported), Failed: atomic.LoadUint64(&n.Failed), Full: atomic.LoadUint64(&n.Full),
		Dropped: atomic.LoadUint64(&n.Dropped), Staged: atomic.LoadUint64(&n.Staged), Syncs: atomic.LoadUint64(&n.Syncs)}
	d := status.Device{Name: b.cfg.Name, Type: "block", Number: b.cfg.Number, Interface: b.describe(), Counters: status.Counters(c)}
	d.Counters["capacity"] = b.geo.Size
	if c, ok := b.cfg.Backend.(*client); ok {
		for k, v := range c.Counters() {
			d.Counters[k] = v
		}
	}
	b.Describe(&d)
	d.Offered, d.Allowed, d.Negotiated = virtio.BlkNames(b.possible()), virtio.BlkNames(b.Features()), virtio.BlkNames(b.Accepted())
	return d
}

// describe says what the disk lies on: "file /srv/root.img, read-only".
func (b *Block) describe() string {
	s := b.geo.Name
	if b.geo.ReadOnly {
		s += ", read-only"
	}
	if c, ok := b.cfg.Backend.(*client); ok && c.State() != "" {
		s += ", " + c.State()
	}
	return s
}

// Close implements device.Device.
func (b *Block) Close() (err error) {
	if err := b.Reset(time.Time{}); err != nil {
		return err
	}
	b.once.Do(func() {
		b.pool.close()
		err = b.cfg.Backend.Close()
	})
	return err
}

// noSpace tells whether a write failed for want of space.
func noSpace(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) }
