// Package mmiotest has a checking model of a bus for tests: it refuses what device
// memory does not tolerate, and remembers every access.
//
// In the room: Strict. Never in it: delays and reordering between two machines (the test
// board has those), meaning of the bytes.
package mmiotest

import (
	"errors"
	"fmt"
	"strings"
	"sync"

	"github.com/boardlink/boardlink/mmio"
)

// Op is what an Access did.
type Op uint8

// The operations.
const (
	Load Op = iota
	Store
	Fence
)

// String returns "load", "store" or "fence".
func (o Op) String() string {
	switch o {
	case Load:
		return "load"
	case Store:
		return "store"
	case Fence:
		return "fence"
	}
	return fmt.Sprintf("op(%d)", uint8(o))
}

// Access is one entry of the log.
type Access struct {
	Op      Op
	Off     uint64       // in bytes; 0 for a Fence
	Width   uint         // in bytes; 0 for a Fence
	Value   uint64       // loaded or stored
	Barrier mmio.Barrier // of a Fence
}

// Counts sums up the accesses.
type Counts struct {
	Loads, LoadBytes   uint64
	Stores, StoreBytes uint64
	Reads              uint64 // fences of kind mmio.ReadBarrier
	Writes             uint64 // fences of kind mmio.WriteBarrier
	Fulls              uint64 // fences of kind mmio.FullBarrier
}

// maxFailures bounds how many failures are kept.
const maxFailures = 20

// Strict is a mmio.Bus over bytes of its own. An access that is misaligned, of a width
// other than 1, 2, 4 or 8, outside the memory, or with a value wider than its width
// is recorded as a failure and not done (a load returns all ones, as from a dead bus).
// It is safe for concurrent use.
type Strict struct {
	mu       sync.Mutex
	mem      []byte
	log      []Access
	keep     bool
	counts   Counts
	failures []string
	failed   int
}

var _ mmio.Bus = (*Strict)(nil)

// New returns a bus over size zero bytes. It counts accesses but logs them only
// after Record(true).
func New(size uint64) *Strict { return &Strict{mem: make([]byte, size)} }

// Mem returns all of the bus' memory, seen as kind.
func (s *Strict) Mem(kind mmio.Kind) mmio.Mem {
	return mmio.NewBusMem(s, uint64(len(s.mem)), kind)
}

// Record turns the log on or off. It grows without bound while on.
func (s *Strict) Record(on bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keep = on
}

// Load is mmio.Bus' Load.
func (s *Strict) Load(off uint64, width uint) uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	v := ^uint64(0)
	if s.allowed(Load, off, width) {
		v = 0
		for i := int(width) - 1; i >= 0; i-- {
			v = v<<8 | uint64(s.mem[off+uint64(i)])
		}
	}
	s.counts.Loads++
	s.counts.LoadBytes += uint64(width)
	s.note(Access{Op: Load, Off: off, Width: width, Value: v})
	return v
}

// Store is mmio.Bus' Store.
func (s *Strict) Store(off uint64, width uint, v uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.allowed(Store, off, width) {
		if width < 8 && v>>(8*width) != 0 {
			s.fail("store of %d bytes at %#x: the value %#x is wider", width, off, v)
		} else {
			for i := uint64(0); i < uint64(width); i++ {
				s.mem[off+i] = byte(v >> (8 * i))
			}
		}
	}
	s.counts.Stores++
	s.counts.StoreBytes += uint64(width)
	s.note(Access{Op: Store, Off: off, Width: width, Value: v})
}

// Barrier is mmio.Bus' Barrier.
func (s *Strict) Barrier(b mmio.Barrier) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch b {
	case mmio.ReadBarrier:
		s.counts.Reads++
	case mmio.WriteBarrier:
		s.counts.Writes++
	case mmio.FullBarrier:
		s.counts.Fulls++
	default:
		s.fail("barrier %d is unknown", b)
	}
	s.note(Access{Op: Fence, Barrier: b})
}

func (s *Strict) allowed(op Op, off uint64, width uint) bool {
	switch {
	case width != 1 && width != 2 && width != 4 && width != 8:
		s.fail("%v of %d bytes at %#x: no such width", op, width, off)
	case off%uint64(width) != 0:
		s.fail("%v of %d bytes at %#x: misaligned", op, width, off)
	case off > uint64(len(s.mem)) || uint64(width) > uint64(len(s.mem))-off:
		s.fail("%v of %d bytes at %#x: outside the memory of %#x bytes", op, width, off, len(s.mem))
	default:
		return true
	}
	return false
}

func (s *Strict) fail(format string, args ...interface{}) {
	if s.failed++; len(s.failures) < maxFailures {
		s.failures = append(s.failures, fmt.Sprintf(format, args...))
	}
}

func (s *Strict) note(a Access) {
	if s.keep {
		s.log = append(s.log, a)
	}
}

// Err returns nil, or an error that lists the first failures.
func (s *Strict) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failed == 0 {
		return nil
	}
	return errors.New(fmt.Sprintf("mmiotest: %d bad accesses: ", s.failed) + strings.Join(s.failures, "; "))
}

// Log returns a copy of the log.
func (s *Strict) Log() []Access {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]Access(nil), s.log...)
}

// Counts returns what was accessed since the last Reset.
func (s *Strict) Counts() Counts {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.counts
}

// Reset forgets log, counts and failures; the memory stays.
func (s *Strict) Reset() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.log, s.counts, s.failures, s.failed = s.log[:0], Counts{}, s.failures[:0], 0
}

// Peek copies the memory at off to b behind the bus' back. The bytes must lie inside.
func (s *Strict) Peek(off uint64, b []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	copy(b, s.mem[off:off+uint64(len(b))])
}

// Poke copies b to the memory at off behind the bus' back. The bytes must lie inside.
func (s *Strict) Poke(off uint64, b []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	copy(s.mem[off:off+uint64(len(b))], b)
}
