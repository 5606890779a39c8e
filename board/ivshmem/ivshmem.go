// Package ivshmem is a board made of QEMU's ivshmem-doorbell or ivshmem-plain device (QEMU,
// docs/specs/ivshmem-spec.rst, revision 1): the window is the shared memory in BAR 2, the doorbell a register in
// BAR 0, and MSI-X rings us. The other end is another such device, or a loopback board on the same server: both
// divide the memory by the same rule. A board is opened by "ivshmem:0000:00:04.0".
//
// In the room: those registers. Never in it: how the function is opened, what the memory holds.
//
// # Which side
//
// The device knows no sides: either end can be host or agent. On both it is a PCI function, so all of its
// memory is device memory to the processor, of the kind that the mapping has, also the part that stands for this
// side's own. VFIO's group, or the lock on the function's configuration space in the other modes, keeps a second
// process of this machine away; that two machines take the same side, nobody can prevent.
//
// # Death
//
// The device tells neither that a peer came nor that it went. PeerDead is always false, a dead peer shows by its
// heartbeat, and Events tell about the function itself.
//
// # Without interrupts
//
// The device interrupts by MSI-X alone. Where that cannot be had (modes uio and sysfs, ivshmem-plain) or is not
// wanted (interrupts=off), this side declares ring method 0, "not at all (it polls)" (docs/wire.md, section 2):
// the peer need not pay for rings that nobody hears. This side rings the peer all the same.
package ivshmem

import (
	"errors"
	"fmt"
	"sync"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/board/internal/fn"
	"github.com/boardlink/boardlink/board/internal/share"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/pci"
)

// Name is the kind's name in a board spec.
const Name = "ivshmem"

// Identity of the device (ivshmem-spec.rst, "Device interface").
const (
	Vendor   = 0x1af4
	Device   = 0x1110
	Revision = 1
)

// MaxVectors is how many MSI-X vectors are used at most.
const MaxVectors = 64

const (
	barRegs = 0
	barMem  = 2
)

// Registers of BAR 0, 32 bits each, little-endian. IntrMask (0) and IntrStatus (4) are for the INTx that
// revision 1 has only where it has no doorbell at all.
const (
	regIVPosition = 8  // our peer number
	regDoorbell   = 12 // peer << 16 | vector
	regsSize      = 16
)

// noPosition is what IVPosition reads before the server has given us a number, and what every register of
// a function reads that does not answer.
const noPosition = 0xffffffff

// maxPeer is the highest peer number that the doorbell register can name.
const maxPeer = 0xffff

func init() {
	board.Register(board.Kind{
		Name: Name,
		Help: "PCI address of an ivshmem device[,mode=vfio|noiommu|uio|sysfs][,interrupts=off]",
		Open: func(arg string, o board.Options) (board.Board, error) {
			b, err := Open(arg, o)
			if err != nil {
				return nil, err
			}
			return b, nil
		},
		Examine: func(arg string, o board.Options) []error {
			a, _, err := parse(arg)
			if err != nil {
				return []error{err}
			}
			return a.Examine(o)
		},
	})
}

// Board is an end of a link over an ivshmem device.
type Board struct {
	spec   string
	f      pci.Function
	regs   mmio.Mem
	window dma.Region
	pool   dma.Region // Mem is zero where there is none
	plain  bool       // no registers that do anything: ivshmem-plain
	id     uint32
	irqs   []pci.Waiter
	once   sync.Once
	err    error // of Close
}

var (
	_ board.Pooled    = (*Board)(nil)
	_ board.Vanishing = (*Board)(nil)
	_ board.Counting  = (*Board)(nil)
)

// Config are the wishes beside board.Options.
type Config struct {
	NoInterrupts bool // poll
}

// Open opens the device that arg, "ADDRESS[,mode=...][,interrupts=off]", names.
func Open(arg string, o board.Options) (*Board, error) {
	a, c, err := parse(arg)
	if err != nil {
		return nil, err
	}
	f, err := a.Open(o)
	if err != nil {
		return nil, err
	}
	return New(a.Spec, f, o, c)
}

func parse(arg string) (fn.Arg, Config, error) {
	a, err := fn.ParseArg(Name, arg, "mode", "interrupts")
	if err != nil {
		return a, Config{}, err
	}
	a.Match = func(i *pci.Info) error { return identify(a.Spec, i) }
	a.Fits = func(i *pci.Info) []error {
		return fn.Bars(a.Spec, i, func(b pci.BAR) error {
			if b.Index == barMem {
				return checkSize(a.Spec, b.Size)
			}
			return nil
		}, barRegs, barMem)
	}
	irq, err := a.OneOf("interrupts", "on", "on", "off")
	return a, Config{NoInterrupts: irq == "off"}, err
}

// identify returns nil for an ivshmem device.
func identify(spec string, i *pci.Info) error {
	if i.Vendor != Vendor || i.Device != Device {
		return fn.NoSuchBoard(spec, i, fmt.Sprintf("an ivshmem device is %04x:%04x", Vendor, Device))
	}
	if i.Revision != Revision {
		return bad(spec, board.ErrInput, "the ivshmem device has revision %d; only %d is known (QEMU's ivshmem-doorbell and ivshmem-plain)", i.Revision, Revision)
	}
	return nil
}

// checkSize returns nil for a size that the shared memory may have.
func checkSize(spec string, size uint64) error {
	if size < share.MinSize || size&(size-1) != 0 {
		return bad(spec, board.ErrInput, "its shared memory has %d bytes, a power of two from %d on is wanted", size, share.MinSize)
	}
	return nil
}

func bad(spec string, class error, format string, args ...interface{}) error {
	return &board.Error{Spec: spec, Reason: fmt.Sprintf(format, args...), Class: class}
}

// New makes a board of an opened function, which it owns from then on, also where it fails. spec is for
// messages. Errors match board.ErrInput where the function is no such device, and board.ErrAbsent where it has not
// got its peer number yet.
func New(spec string, f pci.Function, o board.Options, c Config) (*Board, error) {
	b := &Board{spec: spec, f: f}
	var err error
	if ferr := pci.Guard(func() { err = b.open(o, c) }); ferr != nil {
		err = ferr
	}
	if err != nil {
		f.Close()
		return nil, fn.Wrap(spec, "cannot be used", err)
	}
	fn.Warn(spec, f, o)
	return b, nil
}

func (b *Board) bad(class error, format string, args ...interface{}) error {
	return bad(b.spec, class, format, args...)
}

func (b *Board) open(o board.Options, c Config) error {
	if err := identify(b.spec, b.f.Info()); err != nil {
		return err
	}
	// VFIO itself maps uncached; without it there is nothing better than write-combining, where the
	// kernel offers it.
	want := mmio.Uncached
	if m := b.f.Mode(); m == pci.UIO || m == pci.SysfsOnly {
		want = mmio.WriteCombining
	}
	if o.Kind != nil {
		if want = *o.Kind; want == mmio.Cached {
			return b.bad(board.ErrInput, "BAR %d is device memory: it cannot be seen as cached; uncached or write-combining", barMem)
		}
	}
	if err := b.openRegs(); err != nil {
		return err
	}
	if err := b.openMem(o, want); err != nil {
		return err
	}
	if c.NoInterrupts || b.plain {
		return nil
	}
	irq := b.f.Interrupts()
	if irq.Kind != pci.MSIX {
		if o.Logf != nil {
			o.Logf("%s: no MSI-X in mode %s: this side polls", b.spec, b.f.Mode())
		}
		return nil
	}
	n := irq.Count
	if n > MaxVectors {
		n = MaxVectors
	}
	var err error
	if b.irqs, err = b.f.EnableInterrupts(n); err != nil {
		return fn.Wrap(b.spec, fmt.Sprintf("its %d MSI-X vectors cannot be had (interrupts=off does without)", n), err)
	}
	return nil
}

func (b *Board) openRegs() error {
	m, err := b.f.MapBAR(barRegs, mmio.Uncached)
	if err != nil {
		return err
	}
	if b.regs, err = m.Mem(0, regsSize); err != nil {
		return err
	}
	// A plain device has no doorbell; its position is 0 always.
	b.plain = b.f.Info().CapsKnown() && b.f.Info().MSIX == nil
	b.id = b.regs.Load32(regIVPosition)
	switch {
	case b.id == noPosition:
		return b.bad(board.ErrAbsent, "the device has no peer number yet: its ivshmem server has given it none, or the device does not answer")
	case b.id > maxPeer:
		return b.bad(nil, "the device says that its peer number is %#x, at most %#x is possible", b.id, maxPeer)
	}
	return nil
}

func (b *Board) openMem(o board.Options, want mmio.Kind) error {
	m, err := b.f.MapBAR(barMem, want)
	if err != nil {
		return err
	}
	size := m.BAR.Size
	if err := checkSize(b.spec, size); err != nil {
		return err
	}
	if m.Syscalls {
		return b.bad(board.ErrInput, "BAR %d cannot be mapped in mode %s", barMem, b.f.Mode())
	}
	all, err := m.All()
	if err != nil {
		return err
	}
	agent := o.Side == board.Agent
	part := func(name string, off, n uint64, addr dma.Addr, local bool) (dma.Region, error) {
		r := dma.Region{Name: name, Addr: addr, Access: dma.DeviceRead | dma.DeviceWrite, Across: !local}
		if !local {
			r.Account = o.Account
		}
		var err error
		r.Mem, err = all.Slice(off, n)
		return r, err
	}
	win, pool := share.Split(size)
	if pool != 0 {
		if b.pool, err = part("pool", win, pool, share.PoolAddr, !agent); err != nil {
			return err
		}
	}
	addr := dma.Addr(0)
	if agent {
		addr = share.BusAddr
	}
	b.window, err = part("board", 0, win, addr, agent)
	return err
}

// String returns the board's spec.
func (b *Board) String() string { return b.spec }

// Window implements board.Board: the lower half of the shared memory, or all of one that is small.
func (b *Board) Window() dma.Region { return b.window }

// Pool implements board.Pooled: the upper half of the shared memory. To either side it is as much device memory
// as the window.
func (b *Board) Pool() (dma.Region, bool) { return b.pool, b.pool.Mem.Size() != 0 }

// Self returns this end's peer number and vectors; ring method 0 where it has no interrupts.
func (b *Board) Self() board.RingInfo {
	if len(b.irqs) == 0 {
		return board.RingInfo{Method: board.RingNone}
	}
	return board.RingInfo{Method: board.RingIvshmem, Peer: b.id, Vectors: uint32(len(b.irqs))}
}

// Waiter returns MSI-X vector v.
func (b *Board) Waiter(v uint32) doorbell.Waiter {
	if uint64(v) >= uint64(len(b.irqs)) {
		return doorbell.None
	}
	return b.irqs[v]
}

// ErrNoDoorbell is returned by Ring on an ivshmem-plain device: the peer has to find out by polling.
var ErrNoDoorbell = errors.New("ivshmem: the device is an ivshmem-plain, which has no doorbell")

type mute struct{}

func (mute) Ring() error { return ErrNoDoorbell }

// Ringer returns what rings vector v of the peer. To ring a peer that is not connected does
// nothing: the device does not tell.
func (b *Board) Ringer(info board.RingInfo, v uint32) (doorbell.Ringer, error) {
	switch {
	case info.Method == board.RingNone:
		return board.Silent, nil
	case info.Method != board.RingIvshmem:
		return nil, fmt.Errorf("%s: the peer is rung by method %d; an ivshmem device knows %d (ivshmem) only", b.spec, info.Method, board.RingIvshmem)
	case info.Peer > maxPeer:
		return nil, fmt.Errorf("%s: peer number %d is not in 0 to %d", b.spec, info.Peer, maxPeer)
	case info.Peer == b.id && !b.plain:
		return nil, fmt.Errorf("%s: the peer declares our own number %d", b.spec, info.Peer)
	case v >= info.Vectors || v > 0xffff:
		return nil, fmt.Errorf("%s: vector %d of peer %d, which has %d", b.spec, v, info.Peer, info.Vectors)
	}
	if b.plain {
		return mute{}, nil
	}
	return &fn.Reg{Data: b.window.Mem, Word: fn.Word{Mem: b.regs, Off: regDoorbell, Width: 32}, Value: info.Peer<<16 | v}, nil
}

// RingSelf implements board.SelfRinging: the device takes its own number too.
func (b *Board) RingSelf(v uint32) (doorbell.Ringer, error) {
	if b.plain {
		return nil, fmt.Errorf("%s: %w", b.spec, ErrNoDoorbell)
	}
	return &fn.Reg{Data: b.window.Mem, Word: fn.Word{Mem: b.regs, Off: regDoorbell, Width: 32}, Value: b.id<<16 | v}, nil
}

// PeerDead is false: the device does not tell.
func (b *Board) PeerDead() bool { return false }

// Events becomes readable when something happened to the function: ask Gone.
func (b *Board) Events() <-chan struct{} { return b.f.Events() }

// Gone tells why the function is lost, nil while it is there.
func (b *Board) Gone() error { return b.f.Gone() }

// Counters implements board.Counting.
func (b *Board) Counters() map[string]uint64 { return fn.Counters(b.f) }

// Function returns the PCI function, for tools that look at it. The board owns it.
func (b *Board) Function() pci.Function { return b.f }

// Close gives the function back.
func (b *Board) Close() error {
	b.once.Do(func() { b.err = b.f.Close() })
	return b.err
}
