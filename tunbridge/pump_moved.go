package tunbridge

import (
	"fmt"
	"time"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/vring"
)

// The device side's pumps with a dma.Mover in them: frames cross the bus as whole chains, many in flight, between the ring's buffers and staging
// memory on this side. A chain is handed back only when its bytes have landed.

// txFlight are the frames of a transmit queue that are on their way into the staging memory, in the order of the queue.
type txFlight struct {
	frames     []txFrame
	mask       uint32
	first, nxt uint32 // frames[first..nxt), free-running
	room       uint32 // of the staging memory that one frame may take
	size       uint32
	head, tail uint64 // of the staging memory: head-tail bytes are in use, positions are never wrapped
}

type txFrame struct {
	used   vring.Used
	off, n uint32 // in the staging memory, with header; n is 0 for what is no frame
	ticket uint64
	end    uint64 // position behind it
}

func newTXFlight(stage dma.Span, max int) *txFlight {
	const frames = 4 * batchFrames
	return &txFlight{frames: make([]txFrame, frames), mask: frames - 1, room: stagingRoom(max), size: stage.Len &^ 63}
}

// can returns how many chains may be popped: as many as there is room for whatever their lengths.
func (f *txFlight) can() int {
	n := len(f.frames) - int(f.nxt-f.first)
	free := uint64(f.size) - (f.head - f.tail)
	// The end of the memory may be skipped once.
	if left := uint64(f.size) - f.head%uint64(f.size); left < free {
		if a, b := left/uint64(f.room), (free-left)/uint64(f.room); int(a+b) < n {
			n = int(a + b)
		}
	} else if int(free/uint64(f.room)) < n {
		n = int(free / uint64(f.room))
	}
	if n > batchFrames {
		n = batchFrames
	}
	return n
}

// put finds room for n bytes that lie in their buffer at link address a.
func (f *txFlight) put(a dma.Addr, n uint32) *txFrame {
	off := uint32(f.head % uint64(f.size))
	if off+f.room > f.size {
		f.head += uint64(f.size - off)
		off = 0
	}
	lead := uint32(a) & 63
	f.head += uint64((lead + n + 63) &^ 63)
	t := &f.frames[f.nxt&f.mask]
	*t = txFrame{off: off + lead, n: n, end: f.head}
	f.nxt++
	return t
}

// moment is how long a loop waits for an engine at most while the other direction may get something to do.
const moment = time.Millisecond

// drainMoved moves chains into the staging memory, and frames that have landed there to the interface. It does not wait for the engine:
// where it returns 0, flying tells that something is in flight.
func (p *DeviceTX) drainMoved() (int, error) {
	f := p.fly
	popped, qerr := 0, error(nil)
	if p.mover.Runaway() == nil {
		if k := f.can(); k > 0 {
			popped, qerr = p.pop(k)
		}
	} else if f.first == f.nxt {
		// The engine may write the staging memory at any time: it is not used again.
		p.fly = nil
		return p.drain()
	}
	if popped > 0 && f.first == f.nxt && !p.moveAll && p.allRAM(popped) {
		return p.direct(popped, qerr)
	}
	if err := p.launchAll(popped); err != nil {
		return popped, err
	}
	moved, err := p.arrived()
	if err == nil {
		err = qerr
	}
	return popped + moved, err
}

// await gives the oldest frame in flight a moment to land.
func (p *DeviceTX) await() (result, error) {
	f := p.fly
	if !p.mover.WaitFor(f.frames[f.first&f.mask].ticket, moment) {
		return result{}, nil
	}
	n, err := p.arrived()
	return p.wrote(n), err
}

// arrived writes the frames that have landed to the interface, and returns their number.
func (p *DeviceTX) arrived() (moved int, err error) {
	f := p.fly
	bytes, landed := 0, p.mover.Landed()
	for ; f.first != f.nxt && f.frames[f.first&f.mask].ticket <= landed; moved++ {
		t := &f.frames[f.first&f.mask]
		if err := p.arrive(t); err != nil {
			return moved, err
		}
		p.used = append(p.used, t.used)
		f.tail = t.end
		f.first++
		if bytes += int(t.n); bytes >= batchBytes || len(p.used) == batchFrames {
			if err := p.complete(); err != nil {
				return moved, err
			}
			bytes = 0
		}
	}
	if f.first == f.nxt {
		f.head, f.tail = 0, 0 // the same memory again, while it is in the caches
	}
	p.flying = f.first != f.nxt
	return moved, p.complete()
}

func (p *DeviceTX) allRAM(n int) bool {
	for i := range p.b.Chains[:n] {
		if c := &p.b.Chains[i]; c.Readable > 0 && !isRAM(&p.b.Spans[c.First]) {
			return false
		}
	}
	return true
}

// launchAll starts the way of n chains that were popped.
func (p *DeviceTX) launchAll(n int) error {
	for p.next < n {
		p.next++
		if err := p.launch(&p.b.Chains[p.next-1]); err != nil {
			return err
		}
	}
	p.mover.Start()
	return nil
}

// launch queues the bytes of one chain, header and all: one read across the bus less.
func (p *DeviceTX) launch(c *vring.Chain) error {
	f := p.fly
	total := int(c.ReadLen)
	if p.muted || !p.passes(total) {
		t := f.put(0, 0)
		t.used = vring.Used{ID: c.ID, Count: c.Count}
		return nil
	}
	spans := p.b.Spans[c.First : int(c.First)+int(c.Readable)]
	t := f.put(spans[0].Addr(), uint32(total))
	t.used = vring.Used{ID: c.ID, Count: c.Count}
	at := t.off
	for i := range spans {
		s := &spans[i]
		ticket, err := p.mover.Queue(p.stage.Sub(at, s.Len), *s)
		if err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
		t.ticket = ticket
		at += s.Len
	}
	return nil
}

// arrive writes a frame that has landed.
func (p *DeviceTX) arrive(t *txFrame) error {
	if t.n == 0 {
		return nil // no frame that passes: give the buffer back
	}
	b := p.stageRAM[t.off : t.off+t.n]
	copy(p.hdr[:], b)
	p.hdr.forInterface()
	p.iov = p.iov[:0]
	switch {
	case p.vnet:
		p.addIov(&p.hdr[0], HeaderLen)
	case !p.hdr.plain():
		p.d[cBadHeader]++
		return nil
	}
	p.addIov(&b[HeaderLen], len(b)-HeaderLen)
	p.d[cStaged]++
	return p.write(len(b) - HeaderLen)
}

// landAll waits until nothing is in flight any more, and returns how many chains were: they are popped again.
func (p *DeviceTX) landAll() int {
	f := p.fly
	if f == nil {
		return 0
	}
	last := uint64(0)
	for i := f.first; i != f.nxt; i++ {
		if t := f.frames[i&f.mask].ticket; t > last {
			last = t
		}
	}
	p.mover.Wait(last)
	n := int(f.nxt - f.first)
	f.first, f.head, f.tail = f.nxt, 0, 0
	p.flying = false
	return n
}

// stageHasRoom tells whether one more frame fits into the staging memory.
func (p *DeviceRX) stageHasRoom() bool {
	return p.mover == nil || p.bump+stagingRoom(p.max) <= p.stage.Len
}

// place returns staging memory for one frame, and its offset. It lies as its first buffer does.
func (p *DeviceRX) place() ([]byte, uint32) {
	lead := uint32(0)
	if s := p.writable(&p.b.Chains[p.next]); len(s) > 0 {
		lead = uint32(s[0].Addr()) & 63
	}
	at := p.bump + lead
	return p.stageRAM[at:], at
}

// moveOut queues m bytes of the staging memory at off for the buffer s.
func (p *DeviceRX) moveOut(s dma.Span, off uint32, m int) error {
	ticket, err := p.mover.Queue(s, p.stage.Sub(off, uint32(m)))
	if err != nil {
		return fmt.Errorf("%s: %w", p.name, err)
	}
	p.ticket = ticket
	return nil
}

// land waits until all that was queued is in the buffers. Behind it the used index may be published: that write goes the same way
// across the bus as the data, or after it has landed. An engine that cannot be stopped may write a buffer long after
// the driver has it back, so that ends the pump.
func (p *DeviceRX) land() error {
	if p.mover == nil {
		return nil
	}
	p.mover.Wait(p.ticket)
	p.bump = 0
	if err := p.mover.Runaway(); err != nil {
		return fmt.Errorf("%s: frames on their way to the driver: %w", p.name, err)
	}
	return nil
}
