package dma

import (
	"fmt"
	"sync/atomic"

	"github.com/boardlink/boardlink/mmio"
)

// LogPage is how many bytes of link addresses one bit of a Log stands for (vhost: VHOST_LOG_PAGE).
const LogPage = 1 << logPageBits

const logPageBits = 12

// A Log is a dirty log: a bitmap in memory that another process reads, and clears bit by bit, to learn
// which pages were written. Bit n%8 of byte n/8 stands for page n, that of the link addresses from
// n*LogPage on (vhost-user, "Migration").
//
// Whoever writes to a page marks it afterwards. The reader clears the bit first and copies the page
// then, so it misses no write: what it does not copy is marked again.
//
// Any number of goroutines may use a Log.
type Log struct {
	outside uint64 // first: 64-bit alignment
	ram     mmio.RAM
	pages   uint64
	bell    func()
}

// NewLog returns the log in m, which has to be ordinary memory that starts at a multiple of 4. It has
// whole words of 32 bits, bytes behind them are not used. bell, if not nil, is called by Tell.
func NewLog(m mmio.Mem, bell func()) (*Log, error) {
	ram, ok := m.RAM()
	if !ok || m.Size() < 4 || uintptr(ram.Pointer(0))%4 != 0 {
		return nil, fmt.Errorf("dma: a dirty log of %d bytes: it has to be ordinary memory, of 4 bytes at least, that starts at a multiple of 4", m.Size())
	}
	return &Log{ram: ram, pages: m.Size() / 4 * 32, bell: bell}, nil
}

// Covers tells whether there is a bit for each of the n bytes at a.
func (l *Log) Covers(a Addr, n uint64) bool {
	last := uint64(a) + n - 1
	return n == 0 || last >= uint64(a) && last>>logPageBits < l.pages
}

// End returns the first address that the log has no bit for.
func (l *Log) End() uint64 {
	if l.pages > (1<<64-1)>>logPageBits {
		return 1<<64 - 1
	}
	return l.pages << logPageBits
}

// Outside returns how many marks lay beyond the log, wholly or in part.
func (l *Log) Outside() uint64 { return atomic.LoadUint64(&l.outside) }

// Tell calls the bell: pages were marked.
func (l *Log) Tell() {
	if l.bell != nil {
		l.bell()
	}
}

// Mark marks the pages of the n bytes at a, which were written. A full barrier (mmio.FullBarrier) has to
// be between those writes and Mark, one for any number of marks: Mark leaves alone what is marked already, and reads
// that. What lies beyond the log is not marked, and counted.
func (l *Log) Mark(a Addr, n uint64) {
	if n == 0 {
		return
	}
	first, end := uint64(a)>>logPageBits, uint64(a)+n-1
	last := end >> logPageBits
	if end < uint64(a) || last >= l.pages {
		atomic.AddUint64(&l.outside, 1)
		if first >= l.pages {
			return
		}
		last = l.pages - 1
	}
	for w := first / 32; w <= last/32; w++ {
		l.set(4*w, between(w, first, last))
	}
}

// between returns the bits of word w of a log that stand for pages from first to last.
func between(w, first, last uint64) uint32 {
	bits := ^uint32(0)
	if w == first/32 {
		bits <<= first % 32
	}
	if w == last/32 {
		bits &= ^uint32(0) >> (31 - last%32)
	}
	return bits
}

// CopyTo marks in to, of the pages of the n bytes at a, those that are marked in l. Both logs cover them.
func (l *Log) CopyTo(to *Log, a Addr, n uint64) {
	if n == 0 || !l.Covers(a, n) || !to.Covers(a, n) {
		return
	}
	first, last := uint64(a)>>logPageBits, (uint64(a)+n-1)>>logPageBits
	for w := first / 32; w <= last/32; w++ {
		if bits := l.ram.Consume32(4*w) & between(w, first, last); bits != 0 {
			to.set(4*w, bits)
		}
	}
}

// maxTries is how often set tries to set bits of a word that somebody changes at the same time.
const maxTries = 64

// set sets bits of the word at off. Against a reader that changes the word all the time it marks all of its
// pages in the end: to mark too many is no error, and the loop has to end.
func (l *Log) set(off uint64, bits uint32) {
	for i := 0; i < maxTries; i++ {
		old := l.ram.Consume32(off)
		if old&bits == bits || l.ram.CompareAndSwap32(off, old, old|bits) {
			return
		}
	}
	l.ram.Publish32(off, ^uint32(0))
}
