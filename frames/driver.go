package frames

import (
	"fmt"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/vring"
)

var (
	_ Sender   = (*DriverSender)(nil)
	_ Receiver = (*DriverReceiver)(nil)
)

// pieces is the driver side's memory, cut into slots: one for each frame, with a request that stands ready.
type pieces struct {
	slots []dma.Span      // header and room
	views [][]byte        // behind the header; nil where it is not local
	bufs  []vring.Buffer  // of the requests
	reqs  []vring.Request // by slot; the token is the slot's number
	done  []vring.Completion
	heads []byte // of the region: local memory
}

func newPieces(name string, mem dma.Span, max, size, readable int) (pieces, error) {
	if mem.Region == nil {
		return pieces{}, fmt.Errorf("%s: no memory: %w", name, ErrConfig)
	}
	first, stride, n := slots(mem, max, size)
	if n == 0 {
		return pieces{}, fmt.Errorf("%s: %d bytes of memory are too few for a frame of %d, which takes %d: %w", name, mem.Len, max, stride, ErrConfig)
	}
	p := pieces{
		slots: make([]dma.Span, n),
		views: make([][]byte, n),
		bufs:  make([]vring.Buffer, n),
		reqs:  make([]vring.Request, n),
		done:  make([]vring.Completion, n),
	}
	near := local(mem.Region)
	for i := range p.slots {
		s := dma.Span{Region: mem.Region, Off: first + uint64(i)*stride, Len: uint32(HeaderLen + max)}
		p.slots[i] = s
		if near {
			ram, _ := s.RAM()
			p.views[i] = ram.Bytes()[HeaderLen:]
		}
		p.bufs[i] = vring.Buffer{Addr: s.Addr(), Len: s.Len}
		p.reqs[i] = vring.Request{Bufs: p.bufs[i : i+1 : i+1], Readable: readable, Token: uint32(i)}
	}
	if near {
		ram, _ := mem.Region.Mem.RAM()
		p.heads = ram.Bytes()
	}
	return p, nil
}

// DriverSender sends frames on the driver side's transmit queue.
type DriverSender struct {
	end
	pieces
	q        vring.Driver
	outs     []Out // by slot
	head     int   // the next slot to hand out ...
	tail     int   // ... the oldest in flight ...
	free     int   // ... and how many are neither
	reserved int
	late     []bool // slots that came back before the one at tail ...
	lates    int    // ... and their number
	stage    [][]byte
}

// NewDriverSender makes a sender. mem is where frames lie while the device reads them: as many are in flight as fit, see
// MemSize, and as the queue has descriptors. The sender owns queue and memory.
func NewDriverSender(c Config, q vring.Driver, mem dma.Span) (*DriverSender, error) {
	e, err := newEnd(&c, q.Size())
	if err != nil {
		return nil, err
	}
	p, err := newPieces(c.Name, mem, c.MaxFrame, q.Size(), 1)
	if err != nil {
		return nil, err
	}
	s := &DriverSender{end: e, pieces: p, q: q, free: len(p.slots),
		outs: make([]Out, len(p.slots)), late: make([]bool, len(p.slots))}
	if p.heads == nil {
		s.stage = staging(e.batch, e.max)
	}
	// The header is zero, and stays so: what a device that may write there makes of it is its own affair.
	var zero [HeaderLen]byte
	for i := range p.slots {
		p.slots[i].CopyIn(0, zero[:])
		s.outs[i].Room = p.views[i]
	}
	q.DisarmCall()
	return s, nil
}

// Reserve implements Sender.
func (s *DriverSender) Reserve(n int) ([]Out, error) {
	n = s.bounds(n)
	s.reserved = 0
	// What the device has used is taken only when it is needed: each look at its index may cost a transfer of
	// the line.
	if s.free < n {
		if err := s.reap(); err != nil {
			return nil, err
		}
	}
	if n > s.free {
		n = s.free
	}
	if rest := len(s.slots) - s.head; n > rest {
		n = rest
	}
	s.reserved = n
	out := s.outs[s.head : s.head+n : s.head+n]
	if s.stage != nil {
		for i := range out {
			out[i].Room = s.stage[i][HeaderLen:]
		}
	}
	return out, nil
}

func (s *DriverSender) reap() error {
	n, err := s.q.Reap(s.done)
	s.found(n > 0)
	tail, free, last := s.tail, s.free+n, len(s.slots)
	for i := range s.done[:n] {
		t := int(s.done[i].Token)
		if t == tail {
			if tail++; tail == last {
				tail = 0
			}
			continue
		}
		s.late[t] = true
		s.lates++
		free--
	}
	for s.lates > 0 && s.late[tail] {
		s.late[tail] = false
		s.lates--
		free++
		if tail++; tail == last {
			tail = 0
		}
	}
	s.tail, s.free = tail, free
	return err
}

// Send implements Sender.
func (s *DriverSender) Send(n int) error {
	if n < 0 || n > s.reserved {
		return fmt.Errorf("%s: %d frames of %d: %w", s.name, n, s.reserved, ErrCount)
	}
	if n == 0 {
		return nil
	}
	bytes, max := 0, s.max
	out, bufs := s.outs[s.head:s.head+n], s.bufs[s.head:s.head+n]
	for i := range out {
		k := out[i].Len
		if uint(k-1) >= uint(max) {
			return fmt.Errorf("%s: frame %d of %d bytes, at most %d: %w", s.name, i, k, max, ErrLen)
		}
		bufs[i].Len = uint32(k + HeaderLen)
		bytes += k
	}
	if s.stage != nil {
		for i := range out {
			// The header stands there already.
			s.slots[s.head+i].CopyIn(HeaderLen, out[i].Room[:out[i].Len])
		}
		s.stats.add(cStaged, uint64(n))
	}
	k, err := s.q.Add(s.reqs[s.head : s.head+n])
	s.head += k
	if s.head == len(s.slots) {
		s.head = 0
	}
	s.free -= k
	s.reserved -= k
	if err != nil {
		return err
	}
	if k != n {
		return fmt.Errorf("%s: %d of %d frames fit into the queue although it had room", s.name, k, n)
	}
	s.stats.add(cFrames, uint64(n))
	s.stats.add(cBytes, uint64(bytes))
	s.stats.add(cBatches, 1)
	if s.q.NeedKick() {
		s.ring()
	}
	return nil
}

// Wait implements Sender.
func (s *DriverSender) Wait() (doorbell.Reason, error) {
	if s.free > 0 {
		return 0, nil
	}
	pending, err := s.q.ArmCall()
	if err != nil || pending {
		return 0, err
	}
	why, err := s.sleep()
	s.q.DisarmCall()
	return why, err
}

// DriverReceiver receives frames from the driver side's receive queue.
type DriverReceiver struct {
	end
	pieces
	q     vring.Driver
	in    [][]byte
	out   int // done[:out] are with the caller
	again []vring.Request
	stage [][]byte
}

// NewDriverReceiver makes a receiver and offers its buffers to the device. mem is where they lie: as many as fit,
// see MemSize, and as the queue has descriptors. The receiver owns queue and memory. Mergeable receive buffers are not for it: each
// frame takes one.
func NewDriverReceiver(c Config, q vring.Driver, mem dma.Span) (*DriverReceiver, error) {
	e, err := newEnd(&c, q.Size())
	if err != nil {
		return nil, err
	}
	p, err := newPieces(c.Name, mem, c.MaxFrame, q.Size(), 0)
	if err != nil {
		return nil, err
	}
	r := &DriverReceiver{end: e, pieces: p, q: q, in: make([][]byte, e.batch), again: make([]vring.Request, e.batch)}
	if p.heads == nil {
		r.stage = staging(e.batch, e.max)
	}
	q.DisarmCall()
	return r, r.offer(p.reqs)
}

func (r *DriverReceiver) offer(reqs []vring.Request) error {
	n, err := r.q.Add(reqs)
	if err != nil {
		return err
	}
	if n != len(reqs) {
		return fmt.Errorf("%s: %d of %d receive buffers fit into the queue they came from", r.name, n, len(reqs))
	}
	if r.q.NeedKick() {
		r.ring()
	}
	return nil
}

// Receive implements Receiver.
func (r *DriverReceiver) Receive(n int) ([][]byte, error) {
	if r.out > 0 {
		if err := r.Done(); err != nil {
			return nil, err
		}
	}
	n, qerr := r.q.Reap(r.done[:r.cut(n)])
	r.found(n > 0)
	if n == 0 {
		return nil, qerr
	}
	r.out = n
	k, bytes := 0, 0
	in, heads, slots, views := r.in, r.heads, r.slots, r.views
	for i := range r.done[:n] {
		c := &r.done[i]
		t, size := c.Token, int(c.Len)-HeaderLen
		if size < 0 {
			return nil, fmt.Errorf("%s: %d bytes: %w", r.name, c.Len, ErrShortBuffer)
		}
		// The ring has checked that the length is not above that of the buffer.
		if heads != nil {
			h := heads[slots[t].Off:]
			if size == 0 || !plain(h[0], h[1]) {
				continue
			}
			in[k] = views[t][:size]
		} else {
			s := r.stage[k]
			slots[t].CopyOut(s[:c.Len], 0)
			if size == 0 || !plain(s[0], s[1]) {
				continue
			}
			in[k] = s[HeaderLen : HeaderLen+size]
		}
		k++
		bytes += size
	}
	r.received(n, k, bytes, heads == nil)
	return in[:k], nil
}

// cut is bounds, and not above the number of buffers.
func (r *DriverReceiver) cut(n int) int {
	if n = r.bounds(n); n > len(r.done) {
		return len(r.done)
	}
	return n
}

// received counts k frames out of n buffers of which none was too long.
func (e *end) received(n, k, bytes int, staged bool) {
	e.stats.add(cFrames, uint64(k))
	e.stats.add(cBytes, uint64(bytes))
	e.stats.add(cBatches, 1)
	e.stats.add(cBadHeader, uint64(n-k))
	if staged {
		e.stats.add(cStaged, uint64(k))
	}
}

// Done implements Receiver.
func (r *DriverReceiver) Done() error {
	n := r.out
	if n == 0 {
		return nil
	}
	r.out = 0
	// Where buffers come back in the order of the slots, the requests stand ready, one behind the other.
	first := int(r.done[0].Token)
	if first+n <= len(r.reqs) {
		row := true
		for i := range r.done[:n] {
			row = row && int(r.done[i].Token) == first+i
		}
		if row {
			return r.offer(r.reqs[first : first+n])
		}
	}
	for i := range r.done[:n] {
		r.again[i] = r.reqs[r.done[i].Token]
	}
	return r.offer(r.again[:n])
}

// Wait implements Receiver.
func (r *DriverReceiver) Wait() (doorbell.Reason, error) {
	if err := r.Done(); err != nil {
		return 0, err
	}
	pending, err := r.q.ArmCall()
	if err != nil || pending {
		return 0, err
	}
	why, err := r.sleep()
	r.q.DisarmCall()
	return why, err
}
