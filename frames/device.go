package frames

import (
	"encoding/binary"
	"fmt"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/vring"
)

var (
	_ Sender   = (*DeviceSender)(nil)
	_ Receiver = (*DeviceReceiver)(nil)
)

// view is a region as bytes, where frames may be looked at in it: that of the last buffer, as most lie in one.
type view struct {
	region *dma.Region
	bytes  []byte // nil where it is not local
}

func (v *view) of(r *dma.Region) {
	v.region, v.bytes = r, nil
	if local(r) {
		ram, _ := r.Mem.RAM()
		v.bytes = ram.Bytes()
	}
}

// DeviceReceiver receives the frames that the driver sends: the device side of a transmit queue.
type DeviceReceiver struct {
	end
	q     vring.Device
	b     vring.Batch
	used  []vring.Used
	in    [][]byte
	v     view
	copy  bool
	stage [][]byte // made when first needed

	touched byte // what touch read, of no use
}

// NewDeviceReceiver makes a receiver, which owns the queue.
func NewDeviceReceiver(c Config, q vring.Device) (*DeviceReceiver, error) {
	e, err := newEnd(&c, q.Size())
	if err != nil {
		return nil, err
	}
	r := &DeviceReceiver{end: e, q: q, copy: c.Copy, used: make([]vring.Used, 0, e.batch), in: make([][]byte, e.batch)}
	if c.Copy {
		r.stage = staging(e.batch, e.max)
	}
	q.DisarmKick()
	return r, nil
}

// Receive implements Receiver.
func (r *DeviceReceiver) Receive(n int) ([][]byte, error) {
	if len(r.used) > 0 {
		if err := r.Done(); err != nil {
			return nil, err
		}
	}
	r.b.Chains, r.b.Spans = r.b.Chains[:0], r.b.Spans[:0]
	n, err := r.q.Pop(&r.b, r.bounds(n))
	r.found(n > 0)
	if n == 0 {
		return nil, err
	}
	// The loop works on locals: through r, each store would make the compiler load everything anew.
	k, bytes, staged, long := 0, 0, 0, 0
	chains, spans, used, in := r.b.Chains[:n], r.b.Spans, r.used[:n], r.in
	region, mem := r.v.region, r.v.bytes
	max := uint32(r.max + HeaderLen)
	var stage [][]byte
	if r.copy {
		stage = r.stage
		if mem != nil {
			r.touch(chains, spans)
		}
	}
	for i := range chains {
		c := &chains[i]
		u := &used[i]
		u.ID, u.Count, u.Len = c.ID, c.Count, 0
		total := c.ReadLen
		if total-HeaderLen-1 >= max-HeaderLen {
			if total > max {
				long++
			}
			continue // no frame, or one too long: the buffer goes back
		}
		s := &spans[c.First]
		if s.Region != region {
			r.v.of(s.Region)
			region, mem = r.v.region, r.v.bytes
		}
		if c.Readable != 1 || mem == nil {
			f := r.take(c, k)
			if !plain(f[0], f[1]) {
				continue
			}
			staged++
			in[k] = f[HeaderLen:]
		} else {
			f := mem[s.Off : s.Off+uint64(s.Len)]
			if !plain(f[0], f[1]) {
				continue
			}
			f = f[HeaderLen:len(f):len(f)]
			if stage != nil {
				to := stage[k]
				f = to[HeaderLen : HeaderLen+copy(to[HeaderLen:], f)]
			}
			in[k] = f
		}
		k++
		bytes += int(total) - HeaderLen
	}
	r.used = used
	r.received(n-long, k, bytes, false)
	r.stats.add(cOversize, uint64(long))
	if r.copy {
		staged = k
	}
	r.stats.add(cStaged, uint64(staged))
	return in[:k], nil
}

// touch reads a byte of the first two cache lines of each frame that is about to be copied: so they come from the other
// processor's cache all at the same time, and not one after the other as the copies go on.
func (r *DeviceReceiver) touch(chains []vring.Chain, spans []dma.Span) {
	region, mem, sum := r.v.region, r.v.bytes, byte(0)
	for i := range chains {
		if s := &spans[chains[i].First]; s.Region == region && chains[i].Readable != 0 {
			next := s.Off + 64
			if s.Len <= 64 {
				next = s.Off + uint64(s.Len-1)
			}
			sum += mem[s.Off] + mem[next]
		}
	}
	r.touched = sum
}

// take copies the frame of chain c with its header to staging memory k. The device side makes no assumption about how it
// is cut into buffers (virtio 1.2, 2.7.4.1).
func (r *DeviceReceiver) take(c *vring.Chain, k int) []byte {
	if r.stage == nil {
		r.stage = staging(r.batch, r.max)
	}
	to := r.stage[k]
	n := uint32(0)
	for _, s := range r.b.Spans[c.First : int(c.First)+int(c.Readable)] {
		s.CopyOut(to[n:n+s.Len], 0)
		n += s.Len
	}
	return to[:n]
}

// Done implements Receiver.
func (r *DeviceReceiver) Done() error {
	if len(r.used) == 0 {
		return nil
	}
	err := r.q.Complete(r.used)
	r.used = r.used[:0]
	if err != nil {
		return err
	}
	if r.q.NeedCall() {
		r.ring()
	}
	return nil
}

// Wait implements Receiver.
func (r *DeviceReceiver) Wait() (doorbell.Reason, error) {
	if err := r.Done(); err != nil {
		return 0, err
	}
	return r.waitKick(r.q)
}

// waitKick is Wait of both ends of the device side.
func (e *end) waitKick(q vring.Device) (doorbell.Reason, error) {
	pending, err := q.ArmKick()
	if err != nil || pending {
		return 0, err
	}
	why, err := e.sleep()
	q.DisarmKick()
	return why, err
}

// DeviceSender sends frames into the buffers that the driver offers: the device side of a receive queue.
type DeviceSender struct {
	end
	q        vring.Device
	b        vring.Batch
	outs     []Out // as b.Chains; Room is nil for those that are unusable
	next     int   // first chain that was not sent
	reserved int
	used     []vring.Used // as b.Chains
	v        view
	stage    [][]byte // made when first needed
	placed   []bool   // the frame lies where it belongs
}

// NewDeviceSender makes a sender, which owns the queue. VIRTIO_NET_F_MRG_RXBUF may be negotiated: a frame takes one buffer all
// the same.
func NewDeviceSender(c Config, q vring.Device) (*DeviceSender, error) {
	e, err := newEnd(&c, q.Size())
	if err != nil {
		return nil, err
	}
	q.DisarmKick()
	return &DeviceSender{end: e, q: q, outs: make([]Out, e.batch), placed: make([]bool, e.batch), used: make([]vring.Used, e.batch)}, nil
}

// Reserve implements Sender.
func (s *DeviceSender) Reserve(n int) ([]Out, error) {
	n = s.bounds(n)
	s.reserved = 0
	if s.next == len(s.b.Chains) {
		if err := s.gather(n); err != nil {
			return nil, err
		}
	}
	if left := len(s.b.Chains) - s.next; n > left {
		n = left
	}
	s.reserved = n
	return s.outs[s.next : s.next+n : s.next+n], nil
}

// gather pops up to n buffers.
func (s *DeviceSender) gather(n int) error {
	s.next = 0
	s.b.Chains, s.b.Spans = s.b.Chains[:0], s.b.Spans[:0]
	n, err := s.q.Pop(&s.b, n)
	s.found(n > 0)
	if n == 0 {
		return err
	}
	chains, spans, outs, placed, used := s.b.Chains, s.b.Spans, s.outs[:n], s.placed[:n], s.used[:n]
	region, mem := s.v.region, s.v.bytes
	min := uint32(s.max + HeaderLen)
	for i := range outs {
		c := &chains[i]
		if c.WriteLen < min {
			err := fmt.Errorf("%s: a receive buffer of %d bytes, frames take up to %d: %w", s.name, c.WriteLen, min, ErrSmallBuffer)
			s.drop()
			return err
		}
		u := &used[i]
		u.ID, u.Count = c.ID, c.Count
		w := &spans[int(c.First)+int(c.Readable)]
		if w.Region != region {
			s.v.of(w.Region)
			region, mem = s.v.region, s.v.bytes
		}
		if c.Writable == 1 && mem != nil {
			room := mem[w.Off : w.Off+uint64(w.Len)]
			// Mostly the header stands there already: what is not written stays in the driver side's cache.
			h := room[:HeaderLen]
			if binary.LittleEndian.Uint64(h) != headerLow || binary.LittleEndian.Uint32(h[8:]) != headerHigh {
				binary.LittleEndian.PutUint64(h, headerLow)
				binary.LittleEndian.PutUint32(h[8:], headerHigh)
			}
			outs[i].Room = room[HeaderLen:]
			placed[i] = true
			continue
		}
		if s.stage == nil {
			s.stage = staging(s.batch, s.max)
		}
		outs[i].Room = s.stage[i][HeaderLen:]
		placed[i] = false
	}
	return nil
}

// drop gives back what was popped and not sent.
func (s *DeviceSender) drop() {
	s.q.Unpop(len(s.b.Chains) - s.next)
	s.b.Chains, s.b.Spans, s.next, s.reserved = s.b.Chains[:0], s.b.Spans[:0], 0, 0
}

// Close gives the buffers that were taken from the ring and not filled back to its state, for who goes on with the queue.
func (s *DeviceSender) Close() { s.drop() }

// Send implements Sender.
func (s *DeviceSender) Send(n int) error {
	if n < 0 || n > s.reserved {
		return fmt.Errorf("%s: %d frames of %d: %w", s.name, n, s.reserved, ErrCount)
	}
	if n == 0 {
		return nil
	}
	bytes, staged, max := 0, 0, s.max
	outs, placed, used := s.outs[s.next:s.next+n], s.placed[s.next:s.next+n], s.used[s.next:s.next+n]
	for i := range outs {
		k := outs[i].Len
		if uint(k-1) >= uint(max) {
			return fmt.Errorf("%s: frame %d of %d bytes, at most %d: %w", s.name, i, k, max, ErrLen)
		}
		used[i].Len = uint32(k + HeaderLen)
		bytes += k
		if !placed[i] {
			s.place(&s.b.Chains[s.next+i], s.stage[s.next+i], k)
			staged++
		}
	}
	if err := s.q.Complete(used); err != nil {
		return err
	}
	s.next += n
	s.reserved -= n
	s.stats.add(cFrames, uint64(n))
	s.stats.add(cBytes, uint64(bytes))
	s.stats.add(cBatches, 1)
	s.stats.add(cStaged, uint64(staged))
	if s.q.NeedCall() {
		s.ring()
	}
	return nil
}

// place copies a frame of n bytes, with its header, from staging memory to chain c.
func (s *DeviceSender) place(c *vring.Chain, from []byte, n int) {
	binary.LittleEndian.PutUint64(from, headerLow)
	binary.LittleEndian.PutUint32(from[8:], headerHigh)
	from = from[:HeaderLen+n]
	first := int(c.First) + int(c.Readable)
	for _, w := range s.b.Spans[first : first+int(c.Writable)] {
		k := len(from)
		if k > int(w.Len) {
			k = int(w.Len)
		}
		if k == 0 {
			return
		}
		w.CopyIn(0, from[:k])
		from = from[k:]
	}
}

// Wait implements Sender.
func (s *DeviceSender) Wait() (doorbell.Reason, error) {
	if s.next < len(s.b.Chains) {
		return 0, nil
	}
	return s.waitKick(s.q)
}
