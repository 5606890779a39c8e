package pci

import (
	"fmt"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
)

// Mode is a way to open a function.
type Mode string

// The modes. Auto takes the one that belongs to the driver that the function is bound to; Sysfs needs no
// driver and must be asked for.
const (
	Auto        Mode = ""
	VFIO        Mode = "vfio"    // driver vfio-pci, behind an IOMMU
	VFIONoIOMMU Mode = "noiommu" // driver vfio-pci, no IOMMU: nothing confines the board
	UIO         Mode = "uio"     // driver uio_pci_generic: INTx, no DMA maps
	SysfsOnly   Mode = "sysfs"   // no driver: BARs alone, no interrupts
)

// Options are the wishes when a function is opened.
type Options struct {
	Mode Mode
	// DMAMask is the highest bus address that the function can reach by DMA; 0 is no limit.
	DMAMask uint64
	// Interrupts is the only kind to use, for boards and machines whose better kinds are broken;
	// NoInterrupts (the zero value) takes the best.
	Interrupts InterruptKind
	// AllowSharedGroup lets two functions of one IOMMU group be open at once in this process. The IOMMU does
	// not tell them apart: each can reach the memory that is mapped for the other.
	AllowSharedGroup bool
	// Sysfs is where to read; the zero value is the machine's own.
	Sysfs Sysfs
	// Logf, if set, hears of what is worth a line: a mapping kind that could not be had, a
	// request to let the function go. It may be called from several goroutines.
	Logf func(format string, args ...interface{})
}

// InterruptKind is how a function interrupts.
type InterruptKind uint8

// The kinds, from none to best.
const (
	NoInterrupts InterruptKind = iota
	INTx                       // a level on a shared line: masked by the kernel, unmasked by Ack
	MSI                        // messages, up to 32
	MSIX                       // messages, up to 2048, each to be wired alone
)

// String returns "none", "INTx", "MSI" or "MSI-X".
func (k InterruptKind) String() string {
	switch k {
	case INTx:
		return "INTx"
	case MSI:
		return "MSI"
	case MSIX:
		return "MSI-X"
	}
	return "none"
}

// Interrupts is what a function has to offer: the best kind that its way of opening supports,
// and how many vectors of it.
type Interrupts struct {
	Kind  InterruptKind
	Count int
}

// Waiter is the end of an interrupt. It has doorbell.Waiter's method set: values are assignable to it.
//
// Ack of an INTx takes the pending interrupts and unmasks the line: first make the function
// lower it (clear its cause register), or it fires again at once.
type Waiter interface {
	// FD polls readable when the interrupt came. It stays open until DisableInterrupts or Close.
	FD() int
	// Ack takes the pending interrupts and returns their number, 0 where there were none. It
	// does not block.
	Ack() (uint64, error)
}

// DMAAccess tells what a function may do with memory that was mapped for it.
type DMAAccess uint8

// The rights. Both may be given.
const (
	DMARead  DMAAccess = 1 << iota // the function may read the memory
	DMAWrite                       // the function may write it
)

// String returns "-", "r", "w" or "rw".
func (a DMAAccess) String() string {
	return [...]string{"-", "r", "w", "rw"}[a&(DMARead|DMAWrite)]
}

// DMAMap is a piece of memory that the function can reach.
type DMAMap struct {
	Addr   dma.Addr // on the bus, behind the IOMMU
	Size   uint64
	Access DMAAccess
}

// Function is an opened PCI function. One process has it at a time. All methods may be used by several
// goroutines, Close excepted, which must come after the last use of mappings and waiters.
type Function interface {
	// String names it for messages: "0000:00:04.0 (vfio)".
	String() string
	// Mode is how it was opened; never Auto.
	Mode() Mode
	// Info is what was known of it at opening, with the BARs and capabilities. Not to be
	// modified.
	Info() *Info
	// ReadConfig returns width (1, 2 or 4) bytes of configuration space at off, which is a
	// multiple of width, as a number. Lost functions read as all-ones, as on the bus.
	ReadConfig(off, width int) (uint32, error)
	// WriteConfig writes width bytes of configuration space.
	WriteConfig(off, width int, v uint32) error
	// MapBAR maps BAR i, 0 <= i < 6, whole, save what the kernel keeps (an MSI-X table). With want
	// WriteCombining that is tried first where the BAR is prefetchable; the Mapping's kind tells
	// what it became. A BAR that is mapped already is given out again, as it is. It stays mapped until Close.
	MapBAR(i int, want mmio.Kind) (*Mapping, error)
	// Interrupts tells the best kind there is, or the one of Options.Interrupts, if there is one.
	Interrupts() Interrupts
	// EnableInterrupts wires the first n vectors of that kind. MSI and MSI-X are writes by the
	// function, so they turn bus mastering on. Vectors that were enabled before are taken down first:
	// their waiters must not be in use any more.
	EnableInterrupts(n int) ([]Waiter, error)
	// DisableInterrupts takes all vectors down.
	DisableInterrupts() error
	// SetBusMaster lets the function write and read memory across the bus, or not. It is off
	// after opening.
	SetBusMaster(on bool) error
	// MapDMA makes m, which starts and ends on page borders, reachable for the function, and nothing
	// else, and returns its bus address. m must stay mapped in this process until UnmapDMA. The error matches ErrUnsupported
	// where no IOMMU stands between.
	MapDMA(m mmio.RAM, access DMAAccess) (dma.Addr, error)
	// UnmapDMA takes back what MapDMA gave: after it the function cannot reach the memory.
	UnmapDMA(addr dma.Addr) error
	// DMAMaps are the maps of the moment, by address.
	DMAMaps() []DMAMap
	// Reset resets the function. Its BARs and configuration are restored by the kernel;
	// the content of its registers is lost.
	Reset() error
	// Events holds a token when something happened to the function: ask Gone.
	Events() <-chan struct{}
	// Gone tells why the function is lost or about to be (an error that matches ErrGone), or
	// nil. After it: stop using it, Close it soon, as an unplugging waits for that.
	Gone() error
	// Close takes everything back: interrupts, bus mastering, DMA maps, mappings. A second
	// Close does nothing.
	Close() error
}

// Area is a piece of a mapped BAR.
type Area struct {
	Offset uint64 // in the BAR
	Mem    mmio.Mem
}

// Mapping is a mapped BAR.
type Mapping struct {
	BAR BAR
	// Areas are the accessible pieces, by offset. It is one, as large as the BAR, unless the
	// kernel keeps a piece for itself.
	Areas []Area
	// Syscalls tells that each access is a system call: an I/O port BAR, or one that
	// shares its page with something else.
	Syscalls bool
}

// Kind is how the processor sees the memory.
func (m *Mapping) Kind() mmio.Kind { return m.Areas[0].Mem.Kind() }

// Mem returns the n bytes at off of the BAR. It fails where they lie outside it, or touch
// what the kernel keeps.
func (m *Mapping) Mem(off, n uint64) (mmio.Mem, error) {
	for _, a := range m.Areas {
		if off >= a.Offset && off-a.Offset < a.Mem.Size() {
			if p, err := a.Mem.Slice(off-a.Offset, n); err == nil {
				return p, nil
			}
		}
	}
	what := "lie outside it"
	if off < m.BAR.Size && n <= m.BAR.Size-off && n > 0 {
		what = "are not all accessible: the kernel keeps the MSI-X table"
	}
	return mmio.Mem{}, fmt.Errorf("pci: BAR %d of %#x bytes: %#x bytes at %#x %s", m.BAR.Index, m.BAR.Size, n, off, what)
}

// All returns the whole BAR. It fails where the kernel keeps a piece.
func (m *Mapping) All() (mmio.Mem, error) { return m.Mem(0, m.BAR.Size) }

// DMACounter is implemented by functions whose kernel part counts DMA maps (VFIO, type 1, since Linux 5.10): the
// proof that there are no more than DMAMaps tells.
type DMACounter interface {
	// DMAAvail returns how many more maps the kernel would allow, and false where it does not
	// tell. Each map takes one off, each unmap gives it back.
	DMAAvail() (uint32, bool)
}

// Counters is what happened to an open function.
type Counters struct {
	BusMasterRestored uint64 // times that somebody turned bus mastering off, and it was turned on again
	BusMasterLost     uint64 // times that it was found off, and did not stay on
}

// CounterTeller is implemented by functions that count what happens to them.
type CounterTeller interface {
	Counters() Counters
}

// IOMMUTeller is implemented by functions that are opened through VFIO.
type IOMMUTeller interface {
	// IOMMU names what confines the function: "type 1", "type 1 v2", "sPAPR TCE", "sPAPR TCE v2",
	// or "none".
	IOMMU() string
}
