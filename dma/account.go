package dma

import "sync/atomic"

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
