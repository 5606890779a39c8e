package frames

import (
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
)

// HeaderLen is the length of the virtio-net header in front of each frame, in bytes (virtio 1.2, 5.1.6, with
// num_buffers: VIRTIO_F_VERSION_1).
const HeaderLen = 12

// Fields of the header: its first two bytes ask for work that nobody agreed to do here.
const (
	hdrNeedsCsum = 1 // bit of flags, byte 0: the checksum is partial
	hdrGSONone   = 0 // value of gso_type, byte 1
)

// header is what an end writes: all zero but num_buffers, little-endian at offset 10, which is 1 from the device side
// (virtio 1.2, 5.1.6.4) and 0 from the driver side (5.1.6.2.1).
const (
	headerLow  uint64 = 0       // bytes 0 to 7
	headerHigh uint32 = 1 << 16 // bytes 8 to 11, from the device side
)

// line is what memory is laid out by. A frame starts on a line of its own, its header at the end of the line before:
// in cached memory that line stays as it is, in the caches of both sides, from frame to frame.
const line = 64

// DefaultBatch is the batch of an end whose Config names none.
const DefaultBatch = 64

// Limits of Config.
const (
	MaxBatch = 1024
	// MaxMaxFrame is the largest MaxFrame: 64 KiB of IP packet, an Ethernet header and two VLAN tags.
	MaxMaxFrame = 65535 + 14 + 2*4
)

// What a peer, or the caller, does wrong. The errors that ends return wrap them and name the queue.
var (
	// ErrShortBuffer: the device side returned a receive buffer with fewer bytes than the header has.
	ErrShortBuffer = errors.New("used buffer is shorter than the virtio-net header")
	// ErrSmallBuffer: the driver side offers a receive buffer in which the largest frame does not fit (virtio 1.2,
	// 5.1.6.3.1).
	ErrSmallBuffer = errors.New("receive buffer is too small for the largest frame")
	// ErrLen: the caller sends a frame of no bytes or of more than its room.
	ErrLen = errors.New("frame is empty or longer than its room")
	// ErrCount: the caller sends more frames than it reserved, or less than none.
	ErrCount = errors.New("more frames than reserved")
	// ErrConfig: an end cannot be made.
	ErrConfig = errors.New("bad configuration")
)

// Config is what every end needs. The zero value of a field but MaxFrame stands for its default.
type Config struct {
	Name string // of device and queue, for errors: "net0 tx"
	// MaxFrame is the largest frame in bytes, its header apart: 1 to MaxMaxFrame.
	MaxFrame int
	// Batch is the most frames that Reserve or Receive hand out at once; default DefaultBatch, at most MaxBatch.
	Batch int
	// Copy makes a receiver on the device side hand out copies in private memory, which the driver side
	// cannot change while they are looked at.
	Copy bool
	// Ring rings the peer's doorbell; nil where the peer polls.
	Ring doorbell.Ringer
	// Sleep makes the Sleeper of Wait: doorbell, stop, fallback. Extra descriptors are waited for as readable.
	Sleep doorbell.SleeperConfig
	// Stats, if not nil, is counted in: counters that outlive the end.
	Stats *Stats
}

// Out is room for one frame to send.
type Out struct {
	// Room is where the frame goes: MaxFrame bytes at least. Its content is undefined, and a peer may see and, where the region's
	// rights let it, change what is written at once.
	Room []byte
	// Len is the frame's length in bytes, 1 to len(Room): to be set by the caller. Reserve leaves what it was.
	Len int
}

// Sender is an end that sends: *DriverSender and *DeviceSender.
type Sender interface {
	// Reserve returns room for up to n frames, none where the peer has not given enough back: then Wait, or
	// poll. Room that is not sent is handed out again by the next call. It ends what Reserve returned before.
	// An error means that the peer misbehaved: the queue is broken for good.
	Reserve(n int) ([]Out, error)
	// Send makes the first n of the reserved frames available to the peer, with one write of the index, and
	// rings at most once.
	Send(n int) error
	// Wait asks the peer to ring for room, looks once more, and sleeps until it rings, the fallback polls, or Stop is
	// rung. Why it woke is 0 where there was room already.
	Wait() (doorbell.Reason, error)
	// Stats returns the counters.
	Stats() *Stats
}

// Receiver is an end that receives: *DriverReceiver and *DeviceReceiver.
type Receiver interface {
	// Receive returns up to n frames, header apart: none where there are none. They are the caller's until Done, which
	// it calls first where frames are still out. Frames that ask for what no end here does (a checksum, segmentation), that have
	// no bytes, or that are longer than MaxFrame, are counted and dropped: with those, fewer than there are may be returned, none too.
	// An error means that the peer misbehaved: the queue is broken, or to be given up.
	Receive(n int) ([][]byte, error)
	// Done gives the memory of all frames received back to the peer, with one write of the index, and rings at most
	// once.
	Done() error
	// Wait asks the peer to ring for frames, looks once more, and sleeps, as a Sender's does. Frames received are
	// given back first.
	Wait() (doorbell.Reason, error)
	// Stats returns the counters.
	Stats() *Stats
}

// Counters of an end.
const (
	cFrames     = iota // frames sent or received
	cBytes             // their bytes, header apart
	cBatches           // publications
	cBadHeader         // frames dropped: header that asks for what was not agreed, no bytes
	cOversize          // frames dropped: longer than MaxFrame
	cStaged            // frames copied through private memory
	cRings             // doorbells rung
	cRingErrors        // doorbells that could not be rung: the peer is absent
	cSleeps
	numCounters
)

var counterNames = [numCounters]string{"frames", "bytes", "batches", "bad_header", "oversize", "staged", "rings", "ring_errors", "sleeps"}

// Stats are the counters of an end: written by its goroutine once a batch, read at any time.
type Stats struct{ n [numCounters]uint64 } // first word of an allocated struct: 64-bit aligned on 32-bit machines

// Each calls f with the name and value of each counter.
func (s *Stats) Each(f func(name string, v uint64)) {
	for i := range s.n {
		f(counterNames[i], atomic.LoadUint64(&s.n[i]))
	}
}

// Frames returns the number of frames sent or received.
func (s *Stats) Frames() uint64 { return atomic.LoadUint64(&s.n[cFrames]) }

// Rings returns the number of doorbells rung.
func (s *Stats) Rings() uint64 { return atomic.LoadUint64(&s.n[cRings]) }

// Sleeps returns how often Wait slept.
func (s *Stats) Sleeps() uint64 { return atomic.LoadUint64(&s.n[cSleeps]) }

// Dropped returns the number of frames dropped.
func (s *Stats) Dropped() uint64 {
	return atomic.LoadUint64(&s.n[cBadHeader]) + atomic.LoadUint64(&s.n[cOversize])
}

func (s *Stats) add(i int, n uint64) {
	if n != 0 {
		atomic.AddUint64(&s.n[i], n)
	}
}

// end is what the four ends share.
type end struct {
	name    string
	max     int // of a frame
	batch   int
	ringer  doorbell.Ringer
	sleeper *doorbell.Sleeper
	extra   int16
	stats   *Stats
	woke    bool // by Wait, and the Sleeper wants to know whether there was work
}

func newEnd(c *Config, queue int) (end, error) {
	if c.MaxFrame < 1 || c.MaxFrame > MaxMaxFrame {
		return end{}, fmt.Errorf("%s: frames of at most %d bytes: 1 to %d: %w", c.Name, c.MaxFrame, MaxMaxFrame, ErrConfig)
	}
	if c.Batch < 0 || c.Batch > MaxBatch {
		return end{}, fmt.Errorf("%s: a batch of %d frames: 1 to %d: %w", c.Name, c.Batch, MaxBatch, ErrConfig)
	}
	e := end{name: c.Name, max: c.MaxFrame, batch: c.Batch, ringer: c.Ring, stats: c.Stats}
	if e.batch == 0 {
		e.batch = DefaultBatch
	}
	if e.batch > queue {
		e.batch = queue
	}
	if e.stats == nil {
		e.stats = new(Stats)
	}
	if c.Sleep.HasExtra {
		e.extra = doorbell.In
	}
	e.sleeper = doorbell.NewSleeper(c.Sleep)
	return e, nil
}

// Stats returns the counters.
func (e *end) Stats() *Stats { return e.stats }

// ring notifies the peer. A ring that fails is counted, and no more: the poll fallback of the peer rescues it.
func (e *end) ring() {
	if e.ringer == nil {
		return
	}
	if e.ringer.Ring() != nil {
		e.stats.add(cRingErrors, 1)
		return
	}
	e.stats.add(cRings, 1)
}

func (e *end) sleep() (doorbell.Reason, error) {
	e.stats.add(cSleeps, 1)
	why, err := e.sleeper.Sleep(e.extra)
	if err != nil {
		return why, fmt.Errorf("%s: wait for the doorbell: %w", e.name, err)
	}
	e.woke = true
	return why, nil
}

// found tells the poll fallback what the first look after a sleep found.
func (e *end) found(work bool) {
	if e.woke {
		e.woke = false
		e.sleeper.Found(work)
	}
}

// bounds cuts n to what may be handed out at once.
func (e *end) bounds(n int) int {
	if n > e.batch {
		return e.batch
	}
	if n < 0 {
		return 0
	}
	return n
}

// local tells that frames may be looked at where they lie: RAM, on this side of the bus. RAM across the bus (where a
// test, or loopback, counts what crosses) is copied, once, as it would be there.
func local(r *dma.Region) bool {
	_, ok := r.Mem.RAM()
	return ok && !r.Across && r.Account == nil
}

// plain tells whether a header asks for nothing. Its bytes are read once, here.
func plain(flags, gso byte) bool { return flags&hdrNeedsCsum == 0 && gso == hdrGSONone }

// slots cuts mem into pieces for frames of at most max bytes with their headers, at most n, and returns where the
// headers are, in bytes from the region's start. The pieces are an odd number of lines long: those of one place in all of them then do
// not share a few sets of a cache.
func slots(mem dma.Span, max, n int) (first, stride uint64, count int) {
	addr := uint64(mem.Region.Addr) + mem.Off
	pad := -addr & (line - 1)
	lines := 1 + (uint64(max)+line-1)/line
	stride = (lines | 1) * line
	if uint64(mem.Len) < pad+stride {
		return 0, stride, 0
	}
	k := (uint64(mem.Len) - pad) / stride
	if k > uint64(n) {
		k = uint64(n)
	}
	return mem.Off + pad + line - HeaderLen, stride, int(k)
}

// MemSize returns how many bytes of memory n frames of at most max bytes take on the driver side.
func MemSize(max, n int) uint64 {
	return ((1+(uint64(max)+line-1)/line)|1)*line*uint64(n) + line
}

// staging returns private memory for n frames with headers, one apart from the next.
func staging(n, max int) [][]byte {
	stride := (line + max + line - 1) &^ (line - 1)
	b := make([]byte, n*stride)
	s := make([][]byte, n)
	for i := range s {
		at := i*stride + line - HeaderLen
		s[i] = b[at : at+HeaderLen+max : at+HeaderLen+max]
	}
	return s
}
