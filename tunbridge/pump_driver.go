package tunbridge

import (
	"errors"
	"fmt"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/vring"
)

// ErrMergedFrame: the device side broke the rules of mergeable receive buffers
// (virtio 1.2, 5.1.6.3.2, 5.1.6.4): a number of buffers of zero or above the queue's, or a first
// buffer shorter than the header. A frame that is longer than was agreed breaks no rule of the ring: it is dropped
// and counted.
var ErrMergedFrame = errors.New("malformed frame in receive buffers")

// txArena hands out room for frames in the order they are sent. A frame's size is known
// only once it is read, so room for the largest is reserved and what it did not
// need is given back at once: small frames take little memory, in a board's small
// window too.
type txArena struct {
	size       uint64
	head, tail uint64 // positions, never wrapped: head-tail bytes are in use
	slots      []txSlot
	mask       uint32
	first, nxt uint32 // slots in flight: first..nxt, free-running
}

type txSlot struct {
	end  uint64
	done bool
}

func newTXArena(size uint64, inFlight int) txArena {
	n := 1
	for n < inFlight {
		n *= 2
	}
	return txArena{size: size, slots: make([]txSlot, n), mask: uint32(n - 1)}
}

// reserve returns the offset of max contiguous free bytes.
func (a *txArena) reserve(max uint64) (off uint64, ok bool) {
	if a.nxt-a.first == uint32(len(a.slots)) {
		return 0, false
	}
	off = a.head % a.size
	pad := uint64(0)
	if off+max > a.size {
		pad, off = a.size-off, 0
	}
	return off, a.head-a.tail+pad+max <= a.size
}

// ample tells whether there is room for several frames of max bytes.
func (a *txArena) ample(max uint64) bool { return a.size-(a.head-a.tail) >= a.size/2+max }

// commit keeps n bytes at the offset that reserve gave last, and returns their token.
// Offsets and the size are multiples of 64, so rounding n up never runs over the end.
func (a *txArena) commit(off, n uint64) uint32 {
	if a.head%a.size != off {
		a.head += a.size - a.head%a.size
	}
	a.head += (n + 63) &^ 63
	t := a.nxt & a.mask
	a.slots[t] = txSlot{end: a.head}
	a.nxt++
	return t
}

// release takes the room of a token back. The ring has checked that it is in flight.
func (a *txArena) release(token uint32) {
	a.slots[token].done = true
	for a.first != a.nxt && a.slots[a.first&a.mask].done {
		a.tail = a.slots[a.first&a.mask].end
		a.first++
	}
}

// DriverTX reads frames from the interface and offers them to the device: the driver
// side's transmit queue.
type DriverTX struct {
	common
	q     vring.Driver
	mem   dma.Span
	arena txArena
	reqs  []vring.Request
	bufs  []vring.Buffer
	done  []vring.Completion
}

// TXMemMin returns how many bytes of memory NewDriverTX takes at least for frames of up to maxFrame bytes with
// their header: two of them, each on lines of its own, and the byte that tells that a frame is longer.
func TXMemMin(maxFrame int) uint64 { return 2 * (uint64(maxFrame+1+63) &^ 63) }

// NewDriverTX returns the pump of a transmit queue. mem is the memory frames are kept
// in while the device reads them, TXMemMin at least; the pump owns it while it runs.
func NewDriverTX(c PumpConfig, q vring.Driver, mem dma.Span) (*DriverTX, error) {
	if uint64(mem.Len) < TXMemMin(c.MaxFrame) {
		return nil, fmt.Errorf("%s: %d bytes of transmit memory are too few for frames of %d, which take %d: give the device a larger part of the window", c.Name, mem.Len, c.MaxFrame, TXMemMin(c.MaxFrame))
	}
	if c.MaxFollow > c.MaxFrame && uint64(mem.Len) < TXMemMin(c.MaxFollow) {
		c.MaxFollow = int(mem.Len/2)&^63 - 1
	}
	p := &DriverTX{common: newCommon(c), q: q, mem: mem,
		arena: newTXArena(uint64(mem.Len)&^63, q.Size()),
		reqs:  make([]vring.Request, 0, batchFrames),
		bufs:  make([]vring.Buffer, batchFrames),
		done:  make([]vring.Completion, batchFrames),
	}
	p.reads = true
	p.patient = q.Size() >= batchFrames // the frames of a small queue keep nobody busy while a loop wakes up
	return p, nil
}

// Run implements Pump.
func (p *DriverTX) Run() error { return alone(p) }

func (p *DriverTX) begin() error {
	p.q.DisarmCall()
	return nil
}

func (p *DriverTX) ground() {}

func (p *DriverTX) step(t turn) (result, error) {
	p.want = t.want
	ring, frames, err := p.send(t.read)
	return p.did(ring, frames), err
}

// send takes descriptors back if they run short, reads a batch if there is room, and offers it to the device.
func (p *DriverTX) send(read bool) (ring, frames int, err error) {
	// Both the device's writes of descriptors that run short and our reads of them come in larger
	// pieces then.
	if p.starved || p.q.Free() < p.q.Size()/2 || read && !p.arena.ample(uint64(p.max+1)) {
		if ring, err = p.reap(); err != nil {
			return ring, 0, err
		}
		if ring == 0 && p.starved {
			return 0, 0, nil
		}
		read = read || p.starved // the interface was left unread
	}
	if !read {
		return ring, 0, nil
	}
	// What was read goes out also where the interface fails then.
	err = p.fill()
	n := len(p.reqs)
	if n > 0 {
		if perr := p.publish(); err == nil {
			err = perr
		}
	}
	return ring, n, err
}

// arm waits for most of the frames in flight, if there is no room for another: the rest keeps the device busy until we are
// awake, and a doorbell for each would keep us in step with it.
func (p *DriverTX) arm() (a arming, err error) {
	if !p.starved {
		return a, nil
	}
	p.d[cNoBuffers]++
	// Each takes one descriptor.
	if a.asked = (p.q.Size() - p.q.Free()) * 3 / 4; a.asked < 1 {
		a.asked = 1
	}
	a.pending, err = p.q.ArmCallAfter(a.asked)
	return a, err
}

func (p *DriverTX) disarm() {
	if p.starved {
		p.q.DisarmCall()
	}
}

func (p *DriverTX) publish() error {
	n, err := p.q.Add(p.reqs)
	if err != nil {
		return err
	}
	if n != len(p.reqs) {
		return fmt.Errorf("%s: %d of %d frames fit into the queue although it had room", p.name, n, len(p.reqs))
	}
	p.d[cBatches]++
	if p.q.NeedKick() {
		err = p.ring()
	}
	p.stats.flush(&p.d)
	return err
}

// reap takes back what the device has sent, and returns the number of frames.
func (p *DriverTX) reap() (total int, err error) {
	for {
		n, err := p.q.Reap(p.done)
		for i := 0; i < n; i++ {
			p.arena.release(p.done[i].Token)
		}
		total += n
		if err != nil || n < len(p.done) {
			return total, err
		}
	}
}

// fill reads frames into the arena until the interface is dry, there is no room for another (starved), or the batch is full.
func (p *DriverTX) fill() error {
	p.reqs = p.reqs[:0]
	p.dry, p.starved = false, false
	bytes, free := 0, p.q.Free()
	for !p.enough(len(p.reqs), bytes) {
		off, ok := p.arena.reserve(uint64(p.max + 1))
		if !ok || len(p.reqs) >= free {
			p.starved = true
			return nil
		}
		n, err := p.readFrame(off)
		if err != nil || n == 0 {
			return err
		}
		if bytes += n; n > p.max {
			p.tooLong()
			continue
		}
		i := len(p.reqs)
		p.bufs[i] = vring.Buffer{Addr: p.mem.Region.Addr + dma.Addr(p.mem.Off+off), Len: uint32(n)}
		p.reqs = append(p.reqs, vring.Request{Bufs: p.bufs[i : i+1 : i+1], Readable: 1, Token: p.arena.commit(off, uint64(n))})
		p.countFrame(n - HeaderLen)
	}
	return nil
}

// readFrame reads one frame with its header into the arena at off and returns the
// length of both; 0 where there is none. Of one that is longer than max, one byte more than that was read.
//
// The header goes through local memory: it has to be changed, and the arena may lie across the bus,
// where writing is cheap and reading is not (placement push).
func (p *DriverTX) readFrame(off uint64) (int, error) {
	s := dma.Span{Region: p.mem.Region, Off: p.mem.Off + off, Len: uint32(p.max + 1)}
	ram, direct := s.RAM()
	p.iov = p.iov[:0]
	if p.vnet {
		p.addIov(&p.hdr[0], HeaderLen)
	} else {
		*p.hdr = header{}
	}
	if direct {
		p.addIov((*byte)(ram.Pointer(HeaderLen)), p.max+1-HeaderLen)
	} else {
		p.addIov(&p.staging[HeaderLen], p.max+1-HeaderLen)
	}
	n, err := p.read()
	if err != nil || n == 0 {
		return 0, err
	}
	if !p.vnet {
		n += HeaderLen
	}
	if n <= HeaderLen {
		return 0, fmt.Errorf("%s: %s gave a frame of %d bytes with its header", p.name, p.ifc.Name(), n)
	}
	if n > p.max {
		return n, nil
	}
	// The header is the kernel's; the device side gets what the specification lets a
	// driver say (virtio 1.2, 5.1.6.2.1).
	p.hdr[0] &= HdrFlagNeedsCsum
	p.hdr[10], p.hdr[11] = 0, 0
	if p.hdr.gso() {
		p.d[cGSO]++
	}
	if direct {
		s.CopyIn(0, p.hdr[:])
		s.AccountIovecWrite(uint64(n - HeaderLen))
		return n, nil
	}
	copy(p.staging, p.hdr[:])
	s.CopyIn(0, p.staging[:n])
	p.d[cStaged]++
	return n, nil
}

// DriverRX offers buffers to the device and writes the frames that it fills in to
// the interface: the driver side's receive queue.
type DriverRX struct {
	common
	q       vring.Driver
	bufs    []dma.Span     // by token
	offer   []vring.Buffer // by token: the same, as link addresses
	merge   bool
	reqs    []vring.Request
	done    []vring.Completion
	pending int // done[:pending] wait for the rest of their frame
}

// NewDriverRX returns the pump of a receive queue. mem is cut into buffers of size
// bytes, one for each descriptor at most; without merge (VIRTIO_NET_F_MRG_RXBUF) each has to
// hold a whole frame.
func NewDriverRX(c PumpConfig, q vring.Driver, mem dma.Span, size uint32, merge bool) (*DriverRX, error) {
	n := int(mem.Len / size)
	if n > q.Size() {
		n = q.Size()
	}
	if !merge && int(size) < c.MaxFrame || n == 0 || n*int(size) < c.MaxFrame {
		return nil, fmt.Errorf("%s: %d receive buffers of %d bytes are too few for frames of %d: give the device a larger part of the window or a smaller MTU", c.Name, n, size, c.MaxFrame)
	}
	p := &DriverRX{common: newCommon(c), q: q, merge: merge,
		bufs: make([]dma.Span, n), offer: make([]vring.Buffer, n),
		reqs: make([]vring.Request, 0, n), done: make([]vring.Completion, n)}
	for i := range p.bufs {
		off := mem.Off + uint64(i)*uint64(size)
		p.bufs[i] = dma.Span{Region: mem.Region, Off: off, Len: size}
		p.offer[i] = vring.Buffer{Addr: mem.Region.Addr + dma.Addr(off), Len: size}
	}
	return p, nil
}

func (p *DriverRX) give(token uint32) {
	p.reqs = append(p.reqs, vring.Request{Bufs: p.offer[token : token+1 : token+1], Token: token})
}

func (p *DriverRX) publish() error {
	if len(p.reqs) == 0 {
		return nil
	}
	n, err := p.q.Add(p.reqs)
	if err != nil {
		return err
	}
	if n != len(p.reqs) {
		return fmt.Errorf("%s: %d of %d receive buffers fit into the queue they came from", p.name, n, len(p.reqs))
	}
	p.reqs = p.reqs[:0]
	p.d[cBatches]++
	if p.q.NeedKick() {
		return p.ring()
	}
	return nil
}

// Run implements Pump.
func (p *DriverRX) Run() error { return alone(p) }

func (p *DriverRX) begin() error {
	p.q.DisarmCall()
	for i := range p.bufs {
		p.give(uint32(i))
	}
	return p.publish()
}

func (p *DriverRX) ground() {}

func (p *DriverRX) step(turn) (result, error) {
	ring, err := p.drain()
	return p.wrote(ring), err
}

func (p *DriverRX) arm() (a arming, err error) {
	a.pending, err = p.q.ArmCall()
	return a, err
}

func (p *DriverRX) disarm() { p.q.DisarmCall() }

// drain moves one batch and returns the number of buffers it took.
func (p *DriverRX) drain() (int, error) {
	limit := p.pending + batchFrames
	if limit > len(p.done) {
		limit = len(p.done)
	}
	n, err := p.q.Reap(p.done[p.pending:limit])
	if err != nil || n == 0 {
		return n, err
	}
	have := p.pending + n
	i := 0
	for i < have {
		k, err := p.frame(p.done[i:have])
		if err != nil {
			return n, err
		}
		if k == 0 {
			break // the rest of the frame is still to come
		}
		for j := i; j < i+k; j++ {
			p.give(p.done[j].Token)
		}
		i += k
	}
	copy(p.done, p.done[i:have])
	p.pending = have - i
	err = p.publish()
	p.stats.flush(&p.d)
	return n, err
}

// frame writes the frame that starts in done[0] and returns how many buffers it took; 0
// where some of them have not come yet.
func (p *DriverRX) frame(done []vring.Completion) (int, error) {
	first := &p.bufs[done[0].Token]
	if done[0].Len < HeaderLen {
		return 0, fmt.Errorf("%s: a used buffer of %d bytes cannot hold a virtio-net header: %w", p.name, done[0].Len, ErrMergedFrame)
	}
	first.CopyOut(p.hdr[:], 0) // once, into local memory: the device could change it
	k := 1
	if p.merge {
		k = p.hdr.buffers()
		if k == 0 || k > len(p.bufs) {
			return 0, fmt.Errorf("%s: a frame in %d buffers of %d: %w", p.name, k, len(p.bufs), ErrMergedFrame)
		}
		if k > len(done) {
			return 0, nil
		}
	}
	total := 0
	for i := 0; i < k; i++ {
		total += int(done[i].Len)
	}
	if !p.passes(total) {
		return k, nil
	}
	p.hdr.forInterface()
	p.iov = p.iov[:0]
	switch {
	case p.vnet:
		p.addIov(&p.hdr[0], HeaderLen)
	case !p.hdr.plain():
		p.d[cBadHeader]++
		return k, nil
	}
	if isRAM(first) && k < maxIOV {
		for i := 0; i < k; i++ {
			s := p.bufs[done[i].Token]
			s.Len = done[i].Len
			skip := uint32(0)
			if i == 0 {
				skip = HeaderLen
			}
			if s.Len > skip {
				p.addSpan(&s, skip, int(s.Len-skip))
			}
		}
	} else {
		n := 0
		for i := 0; i < k; i++ {
			s := &p.bufs[done[i].Token]
			s.CopyOut(p.staging[n:n+int(done[i].Len)], 0)
			n += int(done[i].Len)
		}
		p.addIov(&p.staging[HeaderLen], total-HeaderLen)
		p.d[cStaged]++
	}
	return k, p.write(total - HeaderLen)
}
