// Package dmamodel has DMA controllers at the level of their registers: models that move real bytes between memories, check every
// rule of programming that their documentation gives, and fail on request.
//
// In the room: FSL, DW and EDU, each an mmio.Bus. Never in it: the engines that drive them (dma/engine), what the
// bytes mean.
//
// A transfer moves its bytes as late as it can: when it is reported as ended, not before. What reads the
// destination too early, or reuses the source, is found out.
package dmamodel

import (
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/boardlink/boardlink/mmio"
)

// Fault is what goes wrong with a transfer.
type Fault uint8

// The faults.
const (
	NoFault Fault = iota
	Error         // half of it is written, then the controller reports an error
	Stuck         // it stays busy until it is stopped
	Runaway       // it stays busy, and cannot be stopped
	LostIRQ       // it ends, without an interrupt
)

// Range is memory at a bus address.
type Range struct {
	Name  string
	Base  uint64
	Bytes []byte
	Far   bool // across the bus, as the controller sees it
	// Once Frozen, an access is a violation: memory that was taken away.
	Frozen bool
}

// Options of a model.
type Options struct {
	Memory []Range
	// Resolve, if set, is asked for what lies in none of Memory: n bytes at a bus address, nil where there is nothing, or nothing that may be
	// accessed so. It must not call back into the model. far tells that they lie across the bus.
	Resolve func(addr, n uint64, write bool) (b []byte, far bool)
	// Fault, if set, is asked for each transfer, counted from 0.
	Fault func(n uint64) Fault
	// Polls is how many looks at its status a chain takes to end. With Delay it ends by itself, that long after its start.
	Polls int
	Delay time.Duration
	// IRQ, if set, is called at the end of each chain whose interrupts are on.
	IRQ func()
}

// model is what all have in common. Methods in lower case are called with mu held.
type model struct {
	mu         sync.Mutex
	o          Options
	violations []string
	broken     int
	transfers  uint64
	bytes      uint64
	chains     uint64
	timers     sync.WaitGroup
}

// maxViolations bounds how many are kept.
const maxViolations = 20

func (m *model) violate(format string, args ...any) {
	if m.broken++; len(m.violations) < maxViolations {
		m.violations = append(m.violations, fmt.Sprintf(format, args...))
	}
}

// Err returns nil, or an error that lists the violations of programming rules.
func (m *model) Err() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.broken == 0 {
		return nil
	}
	return fmt.Errorf("%d rules broken: %s", m.broken, strings.Join(m.violations, "; "))
}

// Counts returns the transfers that were begun, their bytes, and the chains.
func (m *model) Counts() (transfers, bytes, chains uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.transfers, m.bytes, m.chains
}

// Freeze takes the named memory away: an access from now on is a violation.
func (m *model) Freeze(name string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := range m.o.Memory {
		if m.o.Memory[i].Name == name {
			m.o.Memory[i].Frozen = true
		}
	}
}

// Settle waits until what was started with a Delay has ended.
func (m *model) Settle() { m.timers.Wait() }

// at returns n bytes at a bus address, nil where there are none.
func (m *model) at(addr, n uint64, write bool) ([]byte, *Range) {
	for i := range m.o.Memory {
		r := &m.o.Memory[i]
		if off := addr - r.Base; off < uint64(len(r.Bytes)) && n <= uint64(len(r.Bytes))-off {
			if r.Frozen {
				m.violate("access of %d bytes at %#x in %s, which was taken away", n, addr, r.Name)
				return nil, nil
			}
			return r.Bytes[off : off+n], r
		}
	}
	if m.o.Resolve != nil {
		if b, far := m.o.Resolve(addr, n, write); b != nil {
			return b, &Range{Far: far}
		}
	}
	return nil, nil
}

// item is a transfer of a chain.
type item struct {
	src, dst, n uint64
	fault       Fault
}

// Outcomes of a chain.
type outcome uint8

const (
	good outcome = iota
	bad          // an error: stopped there
	hung
	wild // hung for good
)

// draw asks for the fault of the next transfer.
func (m *model) draw() Fault {
	f := NoFault
	if m.o.Fault != nil {
		f = m.o.Fault(m.transfers)
	}
	m.transfers++
	return f
}

// move does one transfer.
func (m *model) move(it *item) outcome {
	m.bytes += it.n
	switch it.fault {
	case Stuck:
		return hung
	case Runaway:
		return wild
	}
	src, from := m.at(it.src, it.n, false)
	dst, to := m.at(it.dst, it.n, true)
	if from == nil || to == nil {
		m.violate("transfer of %d bytes from %#x to %#x: no memory there", it.n, it.src, it.dst)
		return bad
	}
	if it.fault == Error {
		for i := range dst[:len(dst)/2] {
			dst[i] = 0xee
		}
		return bad
	}
	copy(dst, src)
	return good
}

// chain is what a channel works on.
type chain struct {
	items []item
	polls int // left
	run   bool
	end   outcome // of what was done so far
	quiet bool    // no interrupt
}

// begin starts c; finish is called, with mu held, when its time has come.
func (m *model) begin(c *chain, items []item, finish func()) {
	*c = chain{items: items, polls: m.o.Polls, run: true}
	m.chains++
	if m.o.Delay > 0 {
		m.timers.Add(1)
		time.AfterFunc(m.o.Delay, func() {
			defer m.timers.Done()
			m.mu.Lock()
			defer m.mu.Unlock()
			if c.run {
				finish()
			}
		})
	}
}

// looked counts a look at the status of c.
func (m *model) looked(c *chain, finish func()) {
	if !c.run || m.o.Delay > 0 || c.end == hung || c.end == wild {
		return
	}
	if c.polls--; c.polls < 0 {
		finish()
	}
}

// work moves the bytes of c and returns how it ended.
func (m *model) work(c *chain) outcome {
	for i := range c.items {
		it := &c.items[i]
		it.fault = m.draw()
		if it.fault == LostIRQ {
			c.quiet = true
		}
		if c.end = m.move(it); c.end != good {
			break
		}
	}
	return c.end
}

// irq raises the interrupt. It must not call back into the model.
func (m *model) irq(c *chain) {
	if m.o.IRQ != nil && !c.quiet {
		m.o.IRQ()
	}
}

// Barrier implements mmio.Bus; the models have no posted writes.
func (m *model) Barrier(mmio.Barrier) {}

// bits returns v as its bits where they fit, and records a violation otherwise.
func (m *model) reserved(what string, v, allowed uint64) {
	if v&^allowed != 0 {
		m.violate("%s: %#x has reserved bits %#x", what, v, v&^allowed)
	}
}
