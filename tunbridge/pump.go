package tunbridge

import (
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/vring"
	"golang.org/x/sys/unix"
)

// A pump moves frames in one direction between an interface and one virtqueue.
// There are four: the driver side's transmit and receive, the device side's
// transmit (frames that the driver sent) and receive (frames for the driver).
// Each takes a batch, moves it, publishes it once, rings once if asked. A loop (NewLoop) runs the two of a queue pair on
// one goroutine, and waits for both.
//
// Back-pressure: without buffers on the far side the interface is left unread; a frame that
// the interface refuses is dropped and counted.
type Pump interface {
	// Run moves frames until Stop is raised (nil) or the peer or the interface
	// misbehaves (an error that names queue and cause). It may be called once.
	Run() error
}

// Limits of one batch: the queue is published when either is reached, so that a
// flood neither starves the peer of buffers nor waits for them.
const (
	batchFrames = 64
	batchBytes  = 128 << 10
)

// maxIOV is the most iovecs that the kernel takes in one call (IOV_MAX).
const maxIOV = 1024

// MaxFrame returns the room in bytes that one frame with its virtio-net header may
// need: super-packets where segmentation is left to the receiver, otherwise what the MTU allows,
// with two VLAN tags. See MaxFrameToDriver and MaxFrameToDevice.
func MaxFrame(mtu int, segmentation bool) int {
	if segmentation || mtu+linkOverhead > MaxFrameLen {
		return HeaderLen + MaxFrameLen
	}
	return HeaderLen + mtu + linkOverhead
}

// Stop ends the loops of one device: a flag that busy loops look at once a batch, and an
// eventfd for those that sleep.
type Stop struct {
	raised uint32
	bell   *doorbell.Eventfd
}

// NewStop returns a Stop that is not raised.
func NewStop() (*Stop, error) {
	e, err := doorbell.NewEventfd()
	if err != nil {
		return nil, err
	}
	return &Stop{bell: e}, nil
}

// Raise ends the loops; they return soon after. It may be called more than once.
func (s *Stop) Raise() {
	atomic.StoreUint32(&s.raised, 1)
	s.bell.Ring()
}

// Raised tells whether Raise was called.
func (s *Stop) Raised() bool { return atomic.LoadUint32(&s.raised) != 0 }

// Wait waits for d, or until Raise is called: then it returns true.
func (s *Stop) Wait(d time.Duration) bool {
	end := time.Now().Add(d)
	for !s.Raised() {
		left := time.Until(end)
		if left <= 0 {
			return false
		}
		ts := unix.NsecToTimespec(int64(left))
		fds := [1]unix.PollFd{{Fd: int32(s.bell.FD()), Events: unix.POLLIN}}
		if _, err := unix.Ppoll(fds[:], &ts, nil); err != nil && err != unix.EINTR {
			return s.Raised()
		}
	}
	return true
}

// Bell is the eventfd that stays readable once the Stop is raised.
func (s *Stop) Bell() *doorbell.Eventfd { return s.bell }

// Close gives the eventfd back, after all loops have returned.
func (s *Stop) Close() error { return s.bell.Close() }

// Counters of a pump.
const (
	cFrames      = iota // frames moved
	cBytes              // their bytes, virtio-net header apart
	cGSO                // of them, super-packets that still have to be segmented
	cBatches            // publications
	cSyscalls           // reads and writes on the interface
	cAgain              // reads that found nothing
	cDropped            // frames that the interface refused
	cOversize           // frames longer than what was agreed, than the MTU, or than the buffers the driver offers
	cBadHeader          // frames whose virtio-net header asks for what was not negotiated
	cStaged             // frames copied through a staging buffer (device memory)
	cNoBuffers          // times the loop slept while there was no buffer or descriptor for a frame
	cRings              // doorbells rung
	cRingErrors         // doorbells that could not be rung: the peer is absent
	cRingBlocked        // of them, those that the peer made block
	cSleeps             // of the loop
	cLooks              // polls of the descriptors by the loop while it was awake with nothing to do
	numCounters
)

var counterNames = [numCounters]string{
	"frames", "bytes", "gso_frames", "batches", "syscalls", "again", "dropped", "oversize",
	"bad_header", "staged", "no_buffers", "rings", "ring_errors", "ring_blocked", "sleeps", "looks",
}

// Stats are a pump's counters: written by its loop once a batch, read at any time.
type Stats struct{ n [numCounters]uint64 } // first word of an allocated struct: 64-bit aligned on 32-bit machines

type delta [numCounters]uint64

func (s *Stats) flush(d *delta) {
	for i := range d {
		if d[i] != 0 {
			atomic.AddUint64(&s.n[i], d[i])
			d[i] = 0
		}
	}
}

// Each calls f with the name and value of each counter.
func (s *Stats) Each(f func(name string, v uint64)) {
	for i := range s.n {
		f(counterNames[i], atomic.LoadUint64(&s.n[i]))
	}
}

// slept counts one sleep of the loop.
func (s *Stats) slept() { atomic.AddUint64(&s.n[cSleeps], 1) }

// looked counts one look of the loop at its descriptors.
func (s *Stats) looked() { atomic.AddUint64(&s.n[cLooks], 1) }

// Frames returns the number of frames moved.
func (s *Stats) Frames() uint64 { return atomic.LoadUint64(&s.n[cFrames]) }

// header is a virtio-net header in local memory (virtio 1.2, 5.1.6).
type header [HeaderLen]byte

func (h *header) gso() bool { return h[1] != HdrGSONone }

func (h *header) buffers() int { return int(h[10]) | int(h[11])<<8 }

// forInterface makes h what this side may hand to its own kernel: the number of buffers is the
// ring's business, DATA_VALID a claim that a peer cannot make for us.
func (h *header) forInterface() {
	h[0] &^= HdrFlagDataValid | HdrFlagRscInfo
	h[10], h[11] = 0, 0
}

// plain tells whether h asks for nothing that needs a kernel which knows virtio-net headers.
func (h *header) plain() bool { return h[0]&HdrFlagNeedsCsum == 0 && h[1] == HdrGSONone }

// common is what the four pumps share.
type common struct {
	stats    *Stats
	d        delta
	name     string
	ifc      *Iface
	stop     *Stop
	wait     doorbell.Waiter
	fallback doorbell.Fallback
	bells    *doorbell.Counters
	ringer   doorbell.Ringer
	max      int  // of a frame with header: longer ones are dropped and counted
	most     int  // what max may become where the interface's MTU is raised
	vnet     bool // the interface speaks virtio-net headers
	across   bool
	reads    bool // from the interface, to the ring
	muted    bool // frames from the ring are dropped, and none is read from the interface
	iov      []unix.Iovec
	staging  []byte
	hdr      *header
	over     [1]byte   // where the kernel puts the byte that makes a frame too long
	followed time.Time // when max was last compared with the interface's MTU

	moved int // frames, since it was set to 0

	// Of those that read the interface.
	dry     bool // the last read found nothing
	want    int  // how many frames the batch is to have, 0 if as many as it may have
	starved bool // there is no room for a frame: the interface is not read
	patient bool // where it is starved, it asks to be notified when there is much room

	// Of those that write it: see result.flying.
	flying bool

	mover    *dma.Mover // nil where the processor copies
	stage    dma.Span
	stageRAM []byte // the same
	moveAll  bool
}

// PumpConfig is what every pump needs.
type PumpConfig struct {
	Name  string // of device and queue, for errors: "net0 rx"
	Iface *Iface
	Stop  *Stop
	// Wait is this side's end of the queue's doorbell, Ring the peer's.
	Wait doorbell.Waiter
	Ring doorbell.Ringer
	// Muted: see Change.
	Muted bool
	// MaxFrame is the largest frame in bytes, header included: see MaxFrameToDriver and
	// MaxFrameToDevice. Longer ones are dropped and counted (oversize).
	MaxFrame int
	// MaxFollow, if above MaxFrame, lets the limit follow the interface's MTU when that is raised, up to
	// so many bytes. A pump with a Mover does not follow.
	MaxFollow int
	// Fallback is the pace of the poll fallback; the zero value is the default.
	Fallback doorbell.Fallback
	// Across tells that to look at the queue is to read across the bus.
	Across bool
	// Stats and Bells, if not nil, are counted in, so that counters outlive the pump. Those of the pump that writes the interface count
	// the sleeps of the loop.
	Stats *Stats
	Bells *doorbell.Counters
	// Mover, if not nil, moves the frames of a device side's pump between the buffers and Staging, where the buffers are no
	// RAM, or always with MoveAll (for tests). The pump uses it alone while it runs, and leaves nothing in flight.
	Mover *dma.Mover
	// Staging is RAM that the Mover's engine reaches: StagingMin bytes at least, more let more
	// frames be in flight.
	Staging dma.Span
	MoveAll bool
}

// StagingMin returns the size in bytes of the smallest PumpConfig.Staging for frames of at most maxFrame bytes.
func StagingMin(maxFrame int) uint32 { return 2 * stagingRoom(maxFrame) }

// stagingRoom is what a frame may take of it: it lies as its buffer does in a line of 64 bytes, so that engines
// that need alignment can do the whole of it.
func stagingRoom(maxFrame int) uint32 { return uint32(maxFrame+63)&^63 + 64 }

func newCommon(c PumpConfig) common {
	if c.Stats == nil {
		c.Stats = new(Stats)
	}
	m := common{
		stats:    c.Stats,
		name:     c.Name,
		ifc:      c.Iface,
		stop:     c.Stop,
		wait:     c.Wait,
		fallback: c.Fallback,
		bells:    c.Bells,
		ringer:   c.Ring,
		max:      c.MaxFrame,
		most:     c.MaxFollow,
		vnet:     c.Iface.HeaderLen() != 0,
		across:   c.Across,
		muted:    c.Muted,
		staging:  make([]byte, c.MaxFrame+1),
		hdr:      new(header),
	}
	if c.Mover != nil {
		ram, ok := c.Staging.RAM()
		if !ok || c.Staging.Len < StagingMin(c.MaxFrame) {
			panic(fmt.Sprintf("tunbridge: %s: staging memory of %d bytes is no RAM or smaller than %d", c.Name, c.Staging.Len, StagingMin(c.MaxFrame)))
		}
		m.mover, m.stage, m.stageRAM, m.moveAll = c.Mover, c.Staging, ram.Bytes(), c.MoveAll
		m.most = 0
	}
	return m
}

// ring notifies the peer. A ring that fails is counted, and no more: the peer is absent, which the
// link finds out, or its poll fallback rescues it.
//
// A ring that the peer made block is its fault, and the error.
func (c *common) ring() error {
	if err := c.ringer.Ring(); err != nil {
		c.d[cRingErrors]++
		if errors.Is(err, doorbell.ErrBlocked) {
			c.d[cRingBlocked]++
			return fmt.Errorf("%s: %w", c.name, err)
		}
		return nil
	}
	c.d[cRings]++
	return nil
}

// flush makes what was counted visible.
func (c *common) flush() { c.stats.flush(&c.d) }

func (c *common) shared() *common { return c }

// Change is what a pump of the device side may be given while its loop runs. Nil fields stay as they are.
type Change struct {
	Queue vring.Device    // goes on where the one before has stopped
	Wait  doorbell.Waiter // this side's end of the doorbell
	Ring  doorbell.Ringer // the peer's
	// Mute, if not nil, tells whether frames from the ring are to be given back unsent, and the interface is to be left unread.
	Mute *bool
}

// DevicePump is a pump of the device side, which can be attached to a Loop of OpenLoop.
type DevicePump interface {
	half
	change(Change)
}

func (c *common) change(n Change) {
	if n.Wait != nil {
		c.wait = n.Wait
	}
	if n.Ring != nil {
		c.ringer = n.Ring
	}
	if n.Mute != nil {
		c.muted = *n.Mute
	}
}

// await is that of a half which never has frames in flight.
func (c *common) await() (result, error) { return result{}, nil }

// did returns the result of a step that took so many chains from the ring, and read so many frames.
func (c *common) did(ring, frames int) result {
	return result{ring: ring, frames: frames, dry: c.dry, starved: c.starved}
}

// wrote returns the result of a step that took so many chains from the ring, and wrote what countFrame counted.
func (c *common) wrote(ring int) result {
	r := result{ring: ring, frames: c.moved, flying: c.flying}
	c.moved = 0
	return r
}

func (c *common) countFrame(n int) {
	c.moved++
	c.d[cFrames]++
	c.d[cBytes] += uint64(n)
}

func (c *common) addIov(p *byte, n int) {
	c.iov = append(c.iov, unix.Iovec{Base: p})
	c.iov[len(c.iov)-1].SetLen(n)
}

// addSpan appends n bytes of s behind skip to the iovecs. s is RAM (isRAM).
func (c *common) addSpan(s *dma.Span, skip uint32, n int) {
	if r, ok := s.RAM(); ok {
		c.addIov((*byte)(r.Pointer(uint64(skip))), n)
	}
}

// followEvery is how often frames that are too long make a pump look at the interface's MTU, at most.
const followEvery = 100 * time.Millisecond

// follow raises max where the interface's MTU was raised meanwhile, and tells whether it did. It is called
// for frames that are too long, so that nothing has to ask for the MTU as long as there are none.
func (c *common) follow() bool {
	if c.max >= c.most {
		return false
	}
	now := time.Now()
	if now.Sub(c.followed) < followEvery {
		return false
	}
	c.followed = now
	max := MaxFrame(c.ifc.recentMTU(), false)
	if max > c.most {
		max = c.most
	}
	if max <= c.max {
		return false
	}
	c.max = max
	c.staging = make([]byte, max+1)
	return true
}

// passes tells whether a frame of n bytes with its header, which the peer sent, is one that this side
// takes. One that is not is counted.
func (c *common) passes(n int) bool {
	switch {
	case n <= HeaderLen:
		c.d[cBadHeader]++
		return false
	case n > c.max && !(c.follow() && n <= c.max):
		c.d[cOversize]++
		return false
	}
	return true
}

// tooLong counts a frame from the interface that is longer than max. What was read of it is not
// passed on: the kernel may have cut it. raised tells that the next one of its length may pass.
func (c *common) tooLong() (raised bool) {
	c.d[cOversize]++
	return c.follow()
}

// read takes one frame from the interface into the iovecs.
// n is 0 where there is none.
func (c *common) read() (n int, err error) {
	c.d[cSyscalls]++
	n, err = c.ifc.ReadV(c.iov)
	if err == nil {
		return n, nil
	}
	if err == ErrAgain {
		c.dry = true
		c.d[cAgain]++
		return 0, nil
	}
	if IsDrop(err) {
		// One frame is lost, or the interface is down: poll tells when there is another.
		c.dry = true
		c.d[cDropped]++
		return 0, nil
	}
	return 0, c.failed("read a frame from", err)
}

// write hands the frame in the iovecs, of n bytes behind its header, to the interface. A refused frame is
// counted, and no error.
func (c *common) write(n int) error {
	c.d[cSyscalls]++
	_, err := c.ifc.WriteV(c.iov)
	if err == nil {
		if c.hdr.gso() {
			c.d[cGSO]++
		}
		c.countFrame(n)
		return nil
	}
	if IsDrop(err) || err == ErrAgain {
		c.d[cDropped]++
		return nil
	}
	return c.failed("write a frame to", err)
}

// failed wraps what ends the pump. Memory that is gone is not the interface's fault: all of a frame's memory
// that is not this program's own is the queue's.
func (c *common) failed(what string, err error) error {
	if err == ErrFault {
		return &MemoryError{Queue: c.name}
	}
	return fmt.Errorf("%s: %s %s: %w", c.name, what, c.ifc.Name(), err)
}

// enough tells whether a batch from the interface ends with so many frames and bytes.
func (c *common) enough(frames, bytes int) bool {
	return frames >= batchFrames || bytes >= batchBytes || c.want > 0 && frames >= c.want
}

// isRAM tells whether a system call may touch the span.
func isRAM(s *dma.Span) bool {
	return s.Region.Mem.Kind() == mmio.Cached && !s.Region.Mem.Modelled()
}
