package dma

import (
	"sync/atomic"

	"github.com/boardlink/boardlink/status"
)

// AddControlReads counts n reads of the control plane. A nil Account counts nothing.
func (a *Account) AddControlReads(n uint64) {
	if a != nil {
		atomic.AddUint64(&a.ControlReads, n)
	}
}

// AddControlWrites counts n writes of the control plane. A nil Account counts nothing.
func (a *Account) AddControlWrites(n uint64) {
	if a != nil {
		atomic.AddUint64(&a.ControlWrites, n)
	}
}

// AddFlushReads counts n reads back across the bus before sleeping. A nil Account
// counts nothing.
func (a *Account) AddFlushReads(n uint64) {
	if a != nil {
		atomic.AddUint64(&a.FlushReads, n)
	}
}

// Load returns the counters; each is read on its own, not all at one instant. A nil
// Account has all zeros.
func (a *Account) Load() Account {
	if a == nil {
		return Account{}
	}
	return Account{
		Reads:         atomic.LoadUint64(&a.Reads),
		ReadBytes:     atomic.LoadUint64(&a.ReadBytes),
		Writes:        atomic.LoadUint64(&a.Writes),
		WriteBytes:    atomic.LoadUint64(&a.WriteBytes),
		ControlReads:  atomic.LoadUint64(&a.ControlReads),
		ControlWrites: atomic.LoadUint64(&a.ControlWrites),
		FlushReads:    atomic.LoadUint64(&a.FlushReads),
	}
}

// QueueAccount counts what one side's accesses for one virtqueue come to, by what they are for. It must be
// allocated on its own (64-bit alignment on 32-bit machines); its counters are updated by the queue's loop alone, so
// that no two processors pass a cache line to and fro for the sake of accounting.
type QueueAccount struct {
	Descriptor Account // the descriptor area, and indirect tables
	Driver     Account // the driver area
	Device     Account // the device area
	Payload    Account // buffers, with the headers in them

	_ [256 - 4*7*8]byte // an allocation of 256 bytes shares no cache line with another
}

// Accounted returns the span with a for account. Where its region does not count, nothing does: then, and where a is nil,
// the span is returned as it is. It allocates.
func (s Span) Accounted(a *Account) Span {
	if a == nil || s.Region == nil || s.Region.Account == nil {
		return s
	}
	r := *s.Region
	r.Account = a
	s.Region = &r
	return s
}

// Accounted returns a view of r: at any time the table that r holds, with a for account in each region that counts. Loading it
// allocates after r has changed, and not else.
func (r *TableRef) Accounted(a *Account) *TableRef { return &TableRef{from: r, account: a} }

// view is a table as a TableRef of Accounted has it.
type view struct{ from, t *Table }

// accounted returns the table with a for account in the regions that count.
func (t *Table) accounted(a *Account) *Table {
	if t == nil {
		return nil
	}
	o := &Table{bounds: t.bounds, regions: t.Regions()}
	for i := range o.regions {
		if o.regions[i].Account != nil {
			o.regions[i].Account = a
		}
	}
	return o
}

// Describe adds to s what a queue's accesses across the bus come to; frames is what its loop has moved. Without a board
// that counts, nothing is there.
func (a *QueueAccount) Describe(s *status.Queue, frames uint64) {
	b := status.Bus{Descriptor: a.Descriptor.traffic(), Driver: a.Driver.traffic(), Device: a.Device.traffic(), Payload: a.Payload.traffic()}
	if b == (status.Bus{}) {
		return
	}
	per := b.PerFrame(frames)
	s.Bus, s.BusPerPacket = &b, &per
}

func (a *Account) traffic() status.Traffic {
	v := a.Load()
	return status.Traffic{Reads: v.Reads, ReadBytes: v.ReadBytes, Writes: v.Writes, WriteBytes: v.WriteBytes, FlushReads: v.FlushReads}
}
