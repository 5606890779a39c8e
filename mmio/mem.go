package mmio

import (
	"fmt"
	"math/bits"
	"sync/atomic"
	"unsafe"
)

// Kind tells how the processor that uses a mapping sees it.
type Kind uint8

// The kinds of memory, from the most to the least permissive.
const (
	// Cached is RAM: loopback, host memory, a board's view of its own memory.
	Cached Kind = iota
	// WriteCombining is device memory whose stores the processor may gather and
	// reorder until a barrier (sysfs resourceN_wc).
	WriteCombining
	// Uncached is device memory whose accesses go out one by one, in order
	// (VFIO's and sysfs' default for a BAR).
	Uncached
)

// String returns "cached", "write-combining" or "uncached".
func (k Kind) String() string {
	switch k {
	case Cached:
		return "cached"
	case WriteCombining:
		return "write-combining"
	case Uncached:
		return "uncached"
	}
	return fmt.Sprintf("kind(%d)", uint8(k))
}

// Bus stands where mapped memory would be: a model of a bus or of a chip's
// registers. Offsets count from the start of the model's memory; width is 1, 2,
// 4 or 8 bytes; values are the little-endian numbers that stand in memory.
// Only tests and models implement it; the rings take the same path for it as
// for device memory.
type Bus interface {
	Load(off uint64, width uint) uint64
	Store(off uint64, width uint, v uint64)
	Barrier(b Barrier)
}

// Mem is a piece of memory of one kind: mapped (RAM or a BAR) or modelled by a
// Bus. It is a small value: copy it freely. It does not own the mapping: whoever
// mapped it unmaps it after the last use.
//
// Offsets are in bytes from the start of the piece and must be aligned to the
// width of the access. An access outside the piece, or a misaligned one, is a
// programmer's error and panics: what a peer sends is checked before it becomes
// an offset.
type Mem struct {
	base   unsafe.Pointer // nil where a bus is set
	size   uint64
	kind   Kind
	widths Widths // of copies, where mapped
	bus    Bus
	off    uint64 // of this piece in the bus' memory
}

// NewMem describes size bytes mapped at base, which must be aligned to 8 bytes.
func NewMem(base unsafe.Pointer, size uint64, kind Kind) Mem {
	if base == nil || uintptr(base)&7 != 0 || size == 0 {
		panic(fmt.Sprintf("mmio: memory at %p of %d bytes is nil, empty or not aligned to 8", base, size))
	}
	return Mem{base: base, size: size, kind: kind, widths: DefaultWidths(kind)}
}

// FromBytes describes b as cached memory. b must stay reachable or be memory that
// Go does not manage, and start at a multiple of 8.
func FromBytes(b []byte) Mem {
	if len(b) == 0 {
		panic("mmio: empty memory")
	}
	return NewMem(unsafe.Pointer(&b[0]), uint64(len(b)), Cached)
}

// NewBusMem describes size bytes of a modelled bus, seen as the given kind. Even
// with kind Cached there is no RAM view of it.
func NewBusMem(bus Bus, size uint64, kind Kind) Mem {
	return Mem{size: size, kind: kind, widths: words, bus: bus}
}

// Size returns the size in bytes; 0 for the zero Mem.
func (m Mem) Size() uint64 { return m.size }

// Kind returns how this side sees the memory.
func (m Mem) Kind() Kind { return m.kind }

// Modelled tells whether a Bus stands behind the memory.
func (m Mem) Modelled() bool { return m.bus != nil }

// Slice returns the n bytes at off as a piece of their own. It fails where they
// do not lie inside m. Mapped pieces may start at any offset; accesses through them
// are still checked for natural alignment of the address itself.
func (m Mem) Slice(off, n uint64) (Mem, error) {
	if n == 0 || off > m.size || n > m.size-off {
		return Mem{}, fmt.Errorf("mmio: %#x bytes at offset %#x do not lie in a memory of %#x bytes", n, off, m.size)
	}
	s := m
	s.size = n
	if m.bus != nil {
		s.off += off
	} else {
		s.base = unsafe.Add(m.base, off)
	}
	return s, nil
}

// RAM returns the view of m as ordinary memory, and false where m is device
// memory or modelled.
func (m Mem) RAM() (RAM, bool) {
	if m.kind != Cached || m.bus != nil || m.base == nil {
		return RAM{}, false
	}
	return RAM{base: m.base, size: m.size}, true
}

// RAM is cached memory: the only type with a []byte view, so that Go's copy, a
// system call or sync/atomic can never be handed a BAR.
type RAM struct {
	base unsafe.Pointer
	size uint64
}

// Bytes returns the memory as a slice. A peer may change its content at any time.
func (r RAM) Bytes() []byte { return unsafe.Slice((*byte)(r.base), r.size) }

// Pointer returns the address of byte off, for an iovec. off must be below the size.
func (r RAM) Pointer(off uint64) unsafe.Pointer {
	if off >= r.size {
		panic("mmio: offset outside the memory")
	}
	return unsafe.Add(r.base, off)
}

// want panics unless an access is inside the memory and aligned. One of base and m.off is 0.
func (m *Mem) want(off, width uint64) {
	if off > m.size || m.size-off < width || (uint64(uintptr(m.base))+m.off+off)&(width-1) != 0 {
		panic(Fault{off, m.size, width})
	}
}

// Load8 returns the byte at off.
func (m *Mem) Load8(off uint64) uint8 {
	m.want(off, 1)
	if m.bus != nil {
		return uint8(m.bus.Load(m.off+off, 1))
	}
	return Load8(unsafe.Add(m.base, off))
}

// Load16 returns the little-endian 16 bits at off.
func (m *Mem) Load16(off uint64) uint16 {
	m.want(off, 2)
	if m.bus != nil {
		return uint16(m.bus.Load(m.off+off, 2))
	}
	return Load16(unsafe.Add(m.base, off))
}

// Load32 returns the little-endian 32 bits at off.
func (m *Mem) Load32(off uint64) uint32 {
	m.want(off, 4)
	if m.bus != nil {
		return uint32(m.bus.Load(m.off+off, 4))
	}
	return Load32(unsafe.Add(m.base, off))
}

// Load64 returns the little-endian 64 bits at off. On 32-bit processors it is two
// loads of 32 bits, low half first.
func (m *Mem) Load64(off uint64) uint64 {
	m.want(off, 8)
	if m.bus != nil {
		return m.bus.Load(m.off+off, 8)
	}
	return Load64(unsafe.Add(m.base, off))
}

// Store8 writes the byte at off.
func (m *Mem) Store8(off uint64, v uint8) {
	m.want(off, 1)
	if m.bus != nil {
		m.bus.Store(m.off+off, 1, uint64(v))
		return
	}
	Store8(unsafe.Add(m.base, off), v)
}

// Store16 writes 16 bits, little-endian, at off.
func (m *Mem) Store16(off uint64, v uint16) {
	m.want(off, 2)
	if m.bus != nil {
		m.bus.Store(m.off+off, 2, uint64(v))
		return
	}
	Store16(unsafe.Add(m.base, off), v)
}

// Store32 writes 32 bits, little-endian, at off.
func (m *Mem) Store32(off uint64, v uint32) {
	m.want(off, 4)
	if m.bus != nil {
		m.bus.Store(m.off+off, 4, uint64(v))
		return
	}
	Store32(unsafe.Add(m.base, off), v)
}

// Store64 writes 64 bits, little-endian, at off. On 32-bit processors it is two
// stores of 32 bits, low half first.
func (m *Mem) Store64(off uint64, v uint64) {
	m.want(off, 8)
	if m.bus != nil {
		m.bus.Store(m.off+off, 8, v)
		return
	}
	Store64(unsafe.Add(m.base, off), v)
}

// Consume32 loads 32 bits that the other side publishes, and keeps every later
// access behind the load (pairs with the peer's Publish32).
func (m *Mem) Consume32(off uint64) uint32 {
	m.want(off, 4)
	if m.bus == nil && m.kind == Cached {
		// sync/atomic: an acquire on every architecture, and an edge that the
		// race detector understands.
		return le32(atomic.LoadUint32((*uint32)(unsafe.Add(m.base, off))))
	}
	v := m.Load32(off)
	m.Barrier(ReadBarrier)
	return v
}

// Publish32 keeps every earlier access before a store of 32 bits that the other
// side waits for (pairs with the peer's Consume32). Where the data lies in memory of a
// stronger kind than the word itself, call BarrierFor first.
func (m *Mem) Publish32(off uint64, v uint32) {
	m.want(off, 4)
	if m.bus == nil && m.kind == Cached {
		atomic.StoreUint32((*uint32)(unsafe.Add(m.base, off)), le32(v))
		return
	}
	m.Barrier(WriteBarrier)
	m.Store32(off, v)
}

// Barrier names what a barrier keeps in order.
type Barrier uint8

const (
	// ReadBarrier keeps every later access behind earlier loads (acquire: between
	// the index and what it announces).
	ReadBarrier Barrier = iota
	// WriteBarrier keeps later stores behind every earlier access, gathered
	// (write-combining) stores included (release: between what is announced, or a
	// buffer that was read and is handed back, and the index).
	WriteBarrier
	// FullBarrier keeps every later access behind every earlier one.
	FullBarrier
)

// Barrier orders accesses to this memory, as strongly as its kind needs, against
// accesses to cached memory.
func (m *Mem) Barrier(b Barrier) {
	if m.bus != nil {
		m.bus.Barrier(b)
		return
	}
	Fence(m.kind, b)
}

// Stronger returns the kind that needs the stronger barriers: a barrier between
// memories of different kinds is the stronger one's.
func Stronger(a, b Kind) Kind {
	if a == Cached {
		return b
	}
	if b == Cached || a == WriteCombining {
		return a
	}
	return b
}

// Fence executes the barrier b, strong enough for memory of kind k together with
// cached memory.
func Fence(k Kind, b Barrier) {
	if k == Cached {
		switch b {
		case ReadBarrier:
			weakRead()
		case WriteBarrier:
			weakWrite()
		default:
			weakFull()
		}
		return
	}
	switch b {
	case ReadBarrier:
		strongRead()
	case WriteBarrier:
		strongWrite()
	default:
		strongFull()
	}
}

func le16(v uint16) uint16 {
	if bigEndian {
		return bits.ReverseBytes16(v)
	}
	return v
}

func le32(v uint32) uint32 {
	if bigEndian {
		return bits.ReverseBytes32(v)
	}
	return v
}

func le64(v uint64) uint64 {
	if bigEndian {
		return bits.ReverseBytes64(v)
	}
	return v
}
