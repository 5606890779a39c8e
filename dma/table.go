package dma

import (
	"errors"
	"fmt"
	"sort"
	"sync/atomic"
)

// MaxSpans is the number of regions that one buffer may touch.
const MaxSpans = 16

// The reasons of a TranslateError.
var (
	// ErrHole: a byte of the buffer lies in no region.
	ErrHole = errors.New("no region there")
	// ErrOverflow: the buffer passes the end of the 64-bit address space.
	ErrOverflow = errors.New("address overflow")
	// ErrZeroLength: the buffer has no bytes.
	ErrZeroLength = errors.New("zero length")
	// ErrAccess: a region does not permit the device side this access.
	ErrAccess = errors.New("access not permitted")
	// ErrTooManySpans: the buffer touches more than MaxSpans regions.
	ErrTooManySpans = errors.New("too many regions in one buffer")
)

// TranslateError tells which buffer could not be translated, and why.
type TranslateError struct {
	Addr   Addr   // where the buffer starts
	Len    uint32 // its length in bytes
	At     Addr   // the first address that failed
	Need   Access
	Region string // the region that refused, for ErrAccess
	Reason error  // ErrHole, ErrOverflow, ErrZeroLength, ErrAccess or ErrTooManySpans
}

// Error names the buffer, the reason and the address.
func (e *TranslateError) Error() string {
	s := fmt.Sprintf("dma: buffer at %#x of %d bytes: %v", uint64(e.Addr), e.Len, e.Reason)
	switch e.Reason {
	case ErrHole:
		s += fmt.Sprintf(" (at %#x)", uint64(e.At))
	case ErrAccess:
		s += fmt.Sprintf(" (%v in region %q at %#x)", e.Need, e.Region, uint64(e.At))
	case ErrTooManySpans:
		s += fmt.Sprintf(" (limit %d)", MaxSpans)
	}
	return s
}

// Unwrap returns the reason.
func (e *TranslateError) Unwrap() error { return e.Reason }

// linearMax is the number of regions up to which a linear search is as fast as a binary one.
const linearMax = 8

// bound is what the search of a region needs, close together in memory.
type bound struct {
	first, last uint64 // both belong to the region
}

// Table translates link addresses to local memory. It is immutable: any number
// of goroutines may use it. The zero Table, and a nil one, have no regions.
type Table struct {
	bounds  []bound // sorted; as regions
	regions []Region
}

// NewTable makes a table of regions, in any order. It refuses an empty region, one that
// passes the end of the address space, and two that overlap, and names them.
func NewTable(regions ...Region) (*Table, error) {
	t := &Table{regions: append([]Region(nil), regions...)}
	sort.SliceStable(t.regions, func(i, j int) bool { return t.regions[i].Addr < t.regions[j].Addr })
	for i := range t.regions {
		r := &t.regions[i]
		size := r.Mem.Size()
		if size == 0 {
			return nil, fmt.Errorf("dma: region %q at %#x has no memory", r.Name, uint64(r.Addr))
		}
		b := bound{first: uint64(r.Addr), last: uint64(r.Addr) + size - 1}
		if b.last < b.first {
			return nil, fmt.Errorf("dma: region %q at %#x of %#x bytes passes the end of the address space", r.Name, b.first, size)
		}
		if i > 0 && t.bounds[i-1].last >= b.first {
			o := t.bounds[i-1]
			return nil, fmt.Errorf("dma: regions %q (%#x to %#x) and %q (%#x to %#x) overlap", t.regions[i-1].Name, o.first, o.last, r.Name, b.first, b.last)
		}
		t.bounds = append(t.bounds, b)
	}
	return t, nil
}

// Regions returns a copy of the regions, sorted by address.
func (t *Table) Regions() []Region {
	if t == nil {
		return nil
	}
	return append([]Region(nil), t.regions...)
}

// find returns the index of the region that holds a, or -1.
func (t *Table) find(a uint64) int {
	b := t.bounds
	if len(b) <= linearMax {
		for i := range b {
			if a-b[i].first <= b[i].last-b[i].first {
				return i
			}
		}
		return -1
	}
	lo, hi := 0, len(b)
	for lo < hi {
		mid := int(uint(lo+hi) >> 1)
		if b[mid].last < a {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	if lo < len(b) && b[lo].first <= a {
		return lo
	}
	return -1
}

// Translate appends to dst the spans of the n bytes at addr, one for each region that they
// touch, in order, and returns it. need names what the device side is about to do. It
// fails with a *TranslateError, and dst as it was, where a byte lies in no
// region, a region does not permit the access, n is 0, the range passes the end of the
// address space, or more than MaxSpans regions are touched. Success allocates nothing
// as long as dst has room.
func (t *Table) Translate(dst []Span, addr Addr, n uint32, need Access) ([]Span, error) {
	a := uint64(addr)
	last := a + uint64(n) - 1
	if n == 0 || last < a || t == nil {
		return dst, t.refuse(addr, n, need)
	}
	i := t.find(a)
	if i < 0 {
		return dst, t.refuse(addr, n, need)
	}
	if b := &t.bounds[i]; last <= b.last {
		r := &t.regions[i]
		if r.Access&need != need {
			return dst, t.refuse(addr, n, need)
		}
		return append(dst, Span{Region: r, Off: a - b.first, Len: n}), nil
	}
	return t.split(dst, i, addr, n, need)
}

// split translates a buffer that starts in region i and ends behind it.
func (t *Table) split(dst []Span, i int, addr Addr, n uint32, need Access) ([]Span, error) {
	kept := len(dst)
	a, left := uint64(addr), uint64(n)
	for ; left > 0; i++ {
		if i == len(t.bounds) || a < t.bounds[i].first || t.regions[i].Access&need != need || len(dst)-kept == MaxSpans {
			return dst[:kept], t.refuse(addr, n, need)
		}
		b := &t.bounds[i]
		room := b.last - a + 1 // 0 only for a region of the whole address space
		if room > left || room == 0 {
			room = left
		}
		dst = append(dst, Span{Region: &t.regions[i], Off: a - b.first, Len: uint32(room)})
		a += room
		left -= room
	}
	return dst, nil
}

// refuse finds out why a buffer cannot be translated. It is apart, so that the path of
// success stays small.
//
//go:noinline
func (t *Table) refuse(addr Addr, n uint32, need Access) error {
	e := &TranslateError{Addr: addr, Len: n, At: addr, Need: need}
	a := uint64(addr)
	switch {
	case n == 0:
		e.Reason = ErrZeroLength
		return e
	case a+uint64(n)-1 < a:
		e.Reason = ErrOverflow
		return e
	case t == nil:
		e.Reason = ErrHole
		return e
	}
	left := uint64(n)
	for spans := 0; left > 0; spans++ {
		e.At = Addr(a)
		i := t.find(a)
		switch {
		case spans == MaxSpans:
			e.Reason = ErrTooManySpans
			return e
		case i < 0:
			e.Reason = ErrHole
			return e
		case t.regions[i].Access&need != need:
			e.Reason, e.Region = ErrAccess, t.regions[i].Name
			return e
		}
		room := t.bounds[i].last - a + 1
		if room > left || room == 0 {
			room = left
		}
		a += room
		left -= room
	}
	panic("dma: refused a buffer that the table holds")
}

// TableRef holds the current Table; it may be replaced while queues run. The zero
// TableRef holds none. It must not be copied after its first use.
type TableRef struct {
	v       atomic.Value
	from    *TableRef // of a view: what it is a view of
	account *Account
}

// Load returns the current table, nil where none was stored. Take it once for a batch, so
// that the whole batch sees one table.
func (r *TableRef) Load() *Table {
	if r.from == nil {
		t, _ := r.v.Load().(*Table)
		return t
	}
	t := r.from.Load()
	if v, ok := r.v.Load().(view); ok && v.from == t {
		return v.t
	}
	// Who loads at the same time may do the same: both tables are good.
	v := view{t, t.accounted(r.account)}
	r.v.Store(v)
	return v.t
}

// Store replaces the table. Queues may go on using the old one until their batch ends:
// keep its memory mapped until they have. A view cannot be stored to: that is a programmer's error, and panics.
func (r *TableRef) Store(t *Table) {
	if r.from != nil {
		panic("dma: a table is stored to a view")
	}
	r.v.Store(t)
}
