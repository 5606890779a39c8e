package tunbridge

import (
	"fmt"
	"time"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/vring"
)

// DeviceRX reads frames from the interface into buffers that the driver offers: the
// device side of a receive queue.
type DeviceRX struct {
	common
	q      vring.Device
	b      vring.Batch // chains popped and not yet used, from next on
	next   int         // first chain in b that is still ours
	room   int         // writable bytes in b.Chains[next:]
	merge  bool
	need   int       // with merge: room for a frame, max unless the driver has less memory than that
	lacked int       // room at the last arm ...
	since  time.Time // ... and since when it has been that
	used   []vring.Used
	bump   uint32 // bytes of the staging memory that frames in flight take
	ticket uint64 // of the last copy
}

// NewDeviceRX returns the pump of a receive queue; merge tells that
// VIRTIO_NET_F_MRG_RXBUF was negotiated.
func NewDeviceRX(c PumpConfig, q vring.Device, merge bool) *DeviceRX {
	p := &DeviceRX{common: newCommon(c), q: q, merge: merge,
		used: make([]vring.Used, 0, q.Size())}
	p.reads = true
	p.need = p.max
	return p
}

// Run implements Pump. When it returns, buffers popped and not used have been
// given back to the ring's state.
func (p *DeviceRX) Run() error { return alone(p) }

func (p *DeviceRX) begin() error {
	p.q.DisarmKick()
	return nil
}

// ground gives the buffers back that hold no frame.
func (p *DeviceRX) ground() {
	rest := len(p.b.Chains) - p.next
	if p.land() != nil {
		// The engine may go on writing to them: nothing that it was to write counts as a frame.
		rest += len(p.used)
		p.used = p.used[:0]
	}
	p.settle(p.q, &p.used, rest)
	p.b, p.next, p.room = vring.Batch{}, 0, 0
	p.starved, p.dry, p.lacked = false, false, 0
}

func (p *DeviceRX) change(c Change) {
	if c.Queue != nil {
		p.q = c.Queue
	}
	p.common.change(c)
}

func (p *DeviceRX) step(t turn) (result, error) {
	if p.muted {
		return result{}, nil
	}
	p.want = t.want
	ring, frames, err := p.receive(t.read)
	return p.did(ring, frames), err
}

// receive looks for buffers if it lacks them, reads a batch if there are some, and hands it to the driver.
func (p *DeviceRX) receive(read bool) (ring, frames int, err error) {
	if p.starved {
		before := p.room
		ok, err := p.gather()
		ring = p.room - before
		if err != nil || !ok {
			return ring, 0, err
		}
		read = true // the interface was left unread
	}
	if !read {
		return ring, 0, nil
	}
	frames, err = p.fill()
	if err == nil && len(p.used) > 0 {
		err = p.publish()
	}
	return ring, frames, err
}

// arm waits for buffers, if there are too few for a frame; the interface is left unread until the driver offers more.
func (p *DeviceRX) arm() (a arming, err error) {
	if !p.starved {
		return a, nil
	}
	p.d[cNoBuffers]++
	if a.pending = p.short(); !a.pending {
		a.pending, err = p.q.ArmKick()
	}
	return a, err
}

// shortAfter is how long a driver may take to offer more buffers before what it offers counts as all that it has.
const shortAfter = 100 * time.Millisecond

// short tells whether the driver offers less than the longest frame takes, and no more will come. From then on frames are
// read all the same: what fits goes, what does not is dropped and counted. With more room all is as before (gather). Called before
// each sleep for want of buffers.
func (p *DeviceRX) short() bool {
	if !p.merge || p.room <= HeaderLen {
		return false
	}
	now := time.Now()
	if p.room != p.lacked {
		p.lacked, p.since = p.room, now
		return false
	}
	if now.Sub(p.since) < shortAfter {
		return false
	}
	p.need = p.room
	return true
}

func (p *DeviceRX) disarm() {
	if p.starved {
		p.q.DisarmKick()
	}
}

func (p *DeviceRX) publish() error {
	if p.mover != nil {
		if err := p.land(); err != nil {
			return err
		}
	}
	if err := p.q.Complete(p.used); err != nil {
		return err
	}
	p.used = p.used[:0]
	p.d[cBatches]++
	var err error
	if p.q.NeedCall() {
		err = p.ring()
	}
	p.stats.flush(&p.d)
	return err
}

// gather pops buffers until the largest frame fits; false where the driver does not
// offer enough. From a driver that is short of memory it takes all that is there: it may offer more by now.
func (p *DeviceRX) gather() (bool, error) {
	for {
		enough := p.merge && p.room >= p.need || !p.merge && len(p.b.Chains) > p.next
		if enough && p.need == p.max {
			return true, nil
		}
		if p.next > 0 {
			p.compact()
		}
		// As many as it may take, so that the ring is read in few bursts.
		before := len(p.b.Chains)
		n, err := p.q.Pop(&p.b, batchFrames)
		for i := before; i < before+n; i++ {
			p.room += int(p.b.Chains[i].WriteLen)
		}
		if p.need < p.max && p.room > p.need {
			if p.need = p.room; p.need > p.max {
				p.need = p.max
			}
		}
		if err != nil || n == 0 {
			return enough && err == nil, err
		}
	}
}

// compact moves what is left of the batch to its start.
func (p *DeviceRX) compact() {
	if p.next == len(p.b.Chains) {
		p.b.Chains, p.b.Spans = p.b.Chains[:0], p.b.Spans[:0]
		p.next = 0
		return
	}
	base := p.b.Chains[p.next].First
	k := copy(p.b.Spans, p.b.Spans[base:])
	p.b.Spans = p.b.Spans[:k]
	k = copy(p.b.Chains, p.b.Chains[p.next:])
	p.b.Chains = p.b.Chains[:k]
	for i := range p.b.Chains {
		p.b.Chains[i].First -= base
	}
	p.next = 0
}

func (p *DeviceRX) writable(c *vring.Chain) []dma.Span {
	i := int(c.First) + int(c.Readable)
	return p.b.Spans[i : i+int(c.Writable)]
}

// fill reads frames until the interface is dry, the batch is full, or buffers run out (starved), and returns their number.
func (p *DeviceRX) fill() (frames int, err error) {
	p.dry, p.starved, p.lacked = false, false, 0
	for bytes := 0; !p.enough(frames, bytes) && p.stageHasRoom(); frames++ {
		ok, err := p.gather()
		if err != nil {
			return frames, err
		}
		if !ok {
			p.starved = true
			return frames, nil
		}
		n, err := p.readFrame()
		if err != nil || n == 0 {
			return frames, err
		}
		bytes += n
	}
	return frames, nil
}

// readFrame reads one frame into the buffers from p.next on and queues them as used; it
// returns the frame's length, 0 where there is none.
//
// The header goes through local memory: num_buffers is ours to write (virtio 1.2, 5.1.6.4.2), and the buffers
// lie across the bus, where writing is cheap and reading is not.
func (p *DeviceRX) readFrame() (int, error) {
	p.iov = p.iov[:0]
	if p.vnet {
		p.addIov(&p.hdr[0], HeaderLen)
	} else {
		*p.hdr = header{}
	}
	// The iovecs over just as many buffers as the largest frame may take, and one byte more: that is filled only by
	// a frame which is too long, and which the kernel would cut without a word.
	direct := true
	room, left := 0, p.max+1-HeaderLen
	for i := p.next; i < len(p.b.Chains) && room < p.max; i++ {
		spans := p.writable(&p.b.Chains[i])
		if i == p.next && len(spans) == 0 {
			direct = false // a driver that offers nothing to write: there is no place for the header
		}
		for j := range spans {
			s := &spans[j]
			if !isRAM(s) || p.moveAll || i == p.next && j == 0 && s.Len < HeaderLen || len(p.iov) >= maxIOV-1 {
				direct = false // device memory, a header cut in pieces, or very many pieces: legal, and slow
				break
			}
			skip := uint32(0)
			if i == p.next && j == 0 {
				skip = HeaderLen
			}
			m := int(s.Len - skip)
			if m > left {
				m = left
			}
			if m > 0 {
				p.addSpan(s, skip, m)
				left -= m
			}
		}
		room += int(p.b.Chains[i].WriteLen)
		if !p.merge {
			break
		}
	}
	// Where the buffers are too small for the largest frame it is read through the staging memory, to find out
	// whether it fits.
	if !direct || room < p.max {
		return p.readStaged(room)
	}
	if left > 0 {
		p.addIov(&p.over[0], 1) // the buffers end with the largest frame
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
		p.spoiled(n)
		if whole := p.need == p.max; p.tooLong() && whole {
			p.need = p.max
		}
		return n, nil
	}
	if p.hdr.gso() {
		p.d[cGSO]++
	}
	first := p.writable(&p.b.Chains[p.next])[0]
	k := p.use(n)
	p.hdr[10], p.hdr[11] = byte(k), byte(k>>8)
	first.CopyIn(0, p.hdr[:])
	p.countFrame(n - HeaderLen)
	return n, nil
}

// spoiled tells the ring that n bytes were read into buffers that stay ours, header and all.
func (p *DeviceRX) spoiled(n int) {
	for i := p.next; n > 0 && i < len(p.b.Chains); i++ {
		c := &p.b.Chains[i]
		l := int(c.WriteLen)
		if l > n {
			l = n
		}
		p.q.Wrote(c.ID, uint32(l))
		n -= l
	}
}

// use marks the buffers that n bytes fill as used, and returns their number.
func (p *DeviceRX) use(n int) int {
	k := 0
	for n > 0 {
		c := &p.b.Chains[p.next]
		l := int(c.WriteLen)
		p.room -= l
		if l > n {
			l = n
		}
		for left, spans := l, p.writable(c); left > 0; spans = spans[1:] {
			m := int(spans[0].Len)
			if m > left {
				m = left
			}
			if k == 0 && l == left {
				spans[0].AccountIovecWrite(uint64(m - HeaderLen)) // the header is written apart
			} else {
				spans[0].AccountIovecWrite(uint64(m))
			}
			left -= m
		}
		p.used = append(p.used, vring.Used{ID: c.ID, Count: c.Count, Len: uint32(l)})
		p.next++
		n -= l
		k++
	}
	return k
}

// readStaged reads one frame into local memory and copies it into the buffers: for device memory,
// and for buffers of odd shapes. room is what the buffers hold.
func (p *DeviceRX) readStaged(room int) (int, error) {
	skip := 0
	staging, at := p.staging, uint32(0)
	if p.mover != nil {
		staging, at = p.place()
	}
	if !p.vnet {
		skip = HeaderLen
		copy(staging, p.hdr[:]) // zero
	}
	p.iov = p.iov[:0]
	p.addIov(&staging[skip], p.max+1-skip)
	n, err := p.read()
	if err != nil || n == 0 {
		return 0, err
	}
	n += skip
	if n <= HeaderLen {
		return 0, fmt.Errorf("%s: %s gave a frame of %d bytes with its header", p.name, p.ifc.Name(), n)
	}
	if n > p.max {
		if whole := p.need == p.max; p.tooLong() && whole {
			p.need = p.max
		}
		return n, nil
	}
	if n > room {
		p.d[cOversize]++
		return n, nil
	}
	if staging[1] != HdrGSONone {
		p.d[cGSO]++
	}
	// How many buffers it takes has to be known before the header goes out.
	k, left := 0, n
	for i := p.next; left > 0; i++ {
		left -= int(p.b.Chains[i].WriteLen)
		k++
	}
	staging[10], staging[11] = byte(k), byte(k>>8)
	src := staging[:n]
	first, whole := p.next, len(p.used)
	for i := 0; i < k; i++ {
		c := &p.b.Chains[p.next]
		done := 0
		for _, s := range p.writable(c) {
			m := int(s.Len)
			if m > len(src) {
				m = len(src)
			}
			if m == 0 {
				break
			}
			if p.mover == nil {
				s.CopyIn(0, src[:m])
			} else if err := p.moveOut(s, at, m); err != nil {
				p.next, p.used = first, p.used[:whole] // no frame
				return 0, err
			}
			src = src[m:]
			at += uint32(m)
			done += m
		}
		p.room -= int(c.WriteLen)
		p.used = append(p.used, vring.Used{ID: c.ID, Count: c.Count, Len: uint32(done)})
		p.next++
	}
	if p.mover != nil {
		p.bump = (at + 63) &^ 63
	}
	p.countFrame(n - HeaderLen)
	p.d[cStaged]++
	return n, nil
}
