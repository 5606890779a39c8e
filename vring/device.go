package vring

import (
	"errors"

	"github.com/boardlink/boardlink/dma"
)

var (
	errNoTable   = errors.New("no region table")
	errNoJournal = errors.New("no journal")
)

// deviceSide is what the device sides of both kinds of virtqueue have in common: the way
// from what a descriptor says to spans.
type deviceSide struct {
	ring
	indirectOK bool
	sent       bool // Config.Sent
	ref        *dma.TableRef
	table      *dma.Table  // of the last batch; what the barriers cover
	hot        *dma.Region // region of table that was used last, its range and rights
	hotAddr    uint64
	hotSize    uint64
	hotAccess  dma.Access
	dirty      dirty
	tab        []byte     // copy of an indirect table
	pieces     []dma.Span // where the indirect table lies
}

// serve takes the region table, and makes room for indirect tables.
func (q *deviceSide) serve(c *Config) {
	q.ref, q.indirectOK, q.sent = c.Table, c.Indirect, c.Sent
	q.dirty.byLen = c.LogByLen
	q.dirty.set(c.Log, c.Size)
	if c.Indirect {
		q.tab = make([]byte, int(c.Size)*descSize)
		q.pieces = make([]dma.Span, 0, dma.MaxSpans)
	}
	q.reload()
}

// reload takes the current table, and makes the barriers cover its regions.
func (q *deviceSide) reload() {
	if t := q.ref.Load(); t != q.table {
		q.table = t
		q.hot, q.hotSize = nil, 0
		q.cover(q.kind, t.Regions())
	}
}

// heat remembers the region of a translated buffer.
func (q *deviceSide) heat(r *dma.Region) {
	q.hot, q.hotAddr, q.hotSize, q.hotAccess = r, uint64(r.Addr), r.Mem.Size(), r.Access
}

// oneMore makes room for a chain, which is written in place: a copy would wait for the stores of its fields.
func oneMore(chains []Chain) []Chain {
	if len(chains) == cap(chains) {
		chains = append(chains, Chain{})[:len(chains)]
	}
	return chains[:len(chains)+1]
}

// access returns what the device does with a buffer.
func access(flags uint16) dma.Access {
	if flags&descWrite != 0 {
		return dma.DeviceWrite
	}
	return dma.DeviceRead
}

// inHot tells whether a buffer lies in the region that was used last, as most do.
func (q *deviceSide) inHot(addr uint64, n uint32, need dma.Access) bool {
	off := addr - q.hotAddr
	return off < q.hotSize && uint64(n) <= q.hotSize-off && n != 0 && q.hotAccess&need != 0
}

// translate appends the spans of the only buffer of a chain, whose descriptor is at.
func (q *deviceSide) translate(spans []dma.Span, c *Chain, at uint16, addr uint64, n uint32, need dma.Access) ([]dma.Span, *Error) {
	spans, err := q.table.Translate(spans, dma.Addr(addr), n, need)
	if err != nil {
		return spans, q.untranslatable(at, at, dma.Addr(addr), n, err)
	}
	q.heat(spans[c.First].Region)
	return spans, nil
}

// only sets the sums of a chain of one buffer of n bytes in the given number of spans.
func (c *Chain) only(n uint32, flags uint16, spans int) {
	if flags&descWrite != 0 {
		c.WriteLen, c.Writable = n, uint16(spans)
	} else {
		c.ReadLen, c.Readable = n, uint16(spans)
	}
}

// buffer appends the spans of one buffer of chain c.
func (q *deviceSide) buffer(b *Batch, c *Chain, at uint16, addr dma.Addr, length uint32, flags uint16) *Error {
	need := dma.DeviceRead
	if flags&descWrite != 0 {
		need = dma.DeviceWrite
	} else if c.Writable != 0 {
		return &Error{Code: ErrOrder, Head: c.ID, Desc: at, Addr: addr, Len: length}
	}
	kept := len(b.Spans)
	var err error
	if b.Spans, err = q.table.Translate(b.Spans, addr, length, need); err != nil {
		return q.untranslatable(c.ID, at, addr, length, err)
	}
	// Neither sum can overflow: 64 bits hold three values of 32.
	if total := uint64(c.ReadLen) + uint64(c.WriteLen) + uint64(length); total > 1<<32-1 {
		return &Error{Code: ErrTotal, Head: c.ID, Desc: at, Value: total, Limit: 1<<32 - 1}
	}
	if spans := len(b.Spans) - int(c.First); spans > 1<<16-1 {
		return &Error{Code: ErrSpans, Head: c.ID, Desc: at, Value: uint64(spans), Limit: 1<<16 - 1}
	}
	if n := uint16(len(b.Spans) - kept); flags&descWrite != 0 {
		c.WriteLen += length
		c.Writable += n
	} else {
		c.ReadLen += length
		c.Readable += n
	}
	return nil
}

// untranslatable gives the reasons that have a Code of their own that Code.
func (q *deviceSide) untranslatable(head, at uint16, addr dma.Addr, n uint32, err error) *Error {
	e := &Error{Code: ErrTranslate, Head: head, Desc: at, Addr: addr, Len: n, Err: err}
	switch {
	case errors.Is(err, dma.ErrZeroLength):
		e.Code, e.Err = ErrZeroLength, nil
	case errors.Is(err, dma.ErrOverflow):
		e.Code, e.Err = ErrOverflow, nil
	}
	return e
}

// fetchTable copies the indirect table that descriptor at of chain head points to: its entries
// are read once, and then parsed in memory of our own.
func (q *deviceSide) fetchTable(head, at uint16, addr dma.Addr, length uint32) ([]byte, *Error) {
	switch {
	case !q.indirectOK:
		return nil, &Error{Code: ErrIndirectNotNegotiated, Head: head, Desc: at, Addr: addr, Len: length}
	case length == 0 || length%descSize != 0 || length > uint32(len(q.tab)):
		return nil, &Error{Code: ErrIndirectLen, Head: head, Desc: at, Addr: addr, Len: length}
	}
	var err error
	if q.pieces, err = q.table.Translate(q.pieces[:0], addr, length, dma.DeviceRead); err != nil {
		return nil, q.untranslatable(head, at, addr, length, err)
	}
	tab := q.tab[:length]
	for i, n := 0, uint32(0); i < len(q.pieces); i++ {
		p := &q.pieces[i]
		reads := p.Region.Mem.CopyOut(tab[n:n+p.Len], p.Off)
		if a := p.Region.Account; a != nil {
			if q.desc.account != nil {
				a = q.desc.account // these are descriptors, wherever they lie
			}
			a.AddReads(reads, uint64(p.Len))
		}
		n += p.Len
	}
	return tab, nil
}
