// Package board is the kinds of board: where the window, the doorbells, the interrupts and the
// DMA engine of each kind are. Kinds register themselves by name; package host and package
// agent open them by a spec "kind:argument".
//
// In the room: the Board interface, the registry. Below it one folder for each kind. Never in it:
// the link page, rings, devices.
package board

import (
	"errors"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/mmio"
)

// Side is an end of a link.
type Side uint8

const (
	// Host is the carrier: the virtio device side.
	Host Side = iota
	// Agent is the board: the virtio driver side.
	Agent
)

// String returns "host" or "agent".
func (s Side) String() string {
	if s == Host {
		return "host"
	}
	return "agent"
}

// Other returns the opposite end.
func (s Side) Other() Side { return Host + Agent - s }

// Options are the operator's wishes when a board is opened.
type Options struct {
	Side Side
	// Kind overrides how memory across the bus is seen, the window at the host, the pool at
	// the agent (tests force the device-memory path on RAM); nil leaves it to the board.
	Kind *mmio.Kind
	// Account turns on accounting of accesses across the bus. Virtqueues have accounts of their own (dma.QueueAccount) where it is set: it
	// keeps what is done for anything else.
	Account *dma.Account
	// AllowSharedGroup lets this program open two boards of one IOMMU group, each of which can then reach the
	// memory that is meant for the other.
	AllowSharedGroup bool
	// Logf, if set, hears of peers that come and go, and of lost connections. It may be
	// called from several goroutines.
	Logf func(format string, args ...interface{})
	// Warnf, if set, hears of what an operator should change, once for each time that a board is
	// opened; otherwise Logf does. It may be called from several goroutines.
	Warnf func(format string, args ...interface{})
}

// RingMethod tells how a side is rung; it is declared in the link page.
type RingMethod uint32

const (
	// RingNone: the side polls.
	RingNone RingMethod = 0
	// RingIvshmem: ring peer number Peer, vectors 0 to Vectors-1.
	RingIvshmem RingMethod = 1
	// RingRegister: write Value+vector, 32 bits, at link address Addr.
	RingRegister RingMethod = 2
	// RingBoard: by the board's own doorbell, as the kind of board defines it, vectors 0 to Vectors-1. Both
	// ends are of a kind that does.
	RingBoard RingMethod = 3
)

// RingInfo is how to ring a side.
type RingInfo struct {
	Method  RingMethod
	Peer    uint32   // RingIvshmem
	Vectors uint32   // how many different rings there are, at least 1 unless RingNone
	Addr    dma.Addr // RingRegister
	Value   uint32
}

// Board is an opened end of a board. All methods but Close may be used by several
// goroutines.
type Board interface {
	// String names the board for messages: "loopback:/run/a.sock".
	String() string
	// Window is the memory that both sides see, whole. Region.Addr is the board's bus address
	// of offset 0, and 0 on a host that cannot know it (the link page tells).
	Window() dma.Region
	// Self is how this side is rung, to be declared to the peer.
	Self() RingInfo
	// Waiter returns the end of this side's vector v; doorbell.None where v is not
	// below Self().Vectors. It is valid until Close.
	Waiter(v uint32) doorbell.Waiter
	// Ringer returns what rings vector v of the peer that declared itself as info. It fails
	// where info is not valid on this board. A peer that is absent (not yet or no more there)
	// is no error here: the Ringer's Ring then returns one, until the peer is there.
	Ringer(info RingInfo, v uint32) (doorbell.Ringer, error)
	// PeerDead tells that no process of the other side has the window mapped any more, so that no late
	// write can come; false where that cannot be known. It asks the kernel: not for the data path.
	PeerDead() bool
	// Events becomes readable when a peer came or went; nil where the kind cannot
	// tell. It holds no data; a token means: look again.
	Events() <-chan struct{}
	// Close gives everything back: the window, the waiters and the ringers must not be in
	// use any more. A second Close does nothing.
	Close() error
}

// Pooled is a Board whose board can also reach memory of the host, by mastering the bus
// (placement push).
type Pooled interface {
	Board
	// Pool returns the host's memory for this board, and false where there is none. Region.Addr is its bus
	// address. On the host's end it is local memory; on the agent's end it lies across the
	// bus, and may be more than what the host declares in the link page.
	Pool() (dma.Region, bool)
}

// ErrNoEngine: the board has no DMA engine for this side that is free and goes in the wanted direction.
var ErrNoEngine = errors.New("board: no DMA engine is free")

// ErrHasNoEngine: the board has no DMA engine that this side drives, and never had. It matches ErrNoEngine too.
var ErrHasNoEngine error = hasNoEngine{}

type hasNoEngine struct{}

func (hasNoEngine) Error() string { return "the board has no DMA engine that this side drives" }

func (hasNoEngine) Is(target error) bool { return target == ErrNoEngine }

// WindowPart is a part of the window, and the link address that copies call its first byte by.
type WindowPart struct {
	Link         dma.Addr
	Offset, Size uint64 // in the window, in bytes
}

// EngineConfig says what a DMA engine is opened for.
type EngineConfig struct {
	// ToBoard: copies go from this side's memory to the window; else the other way.
	ToBoard bool
	// Window are the parts of the window that the engine may touch. Everything else there is refused before it is
	// programmed.
	Window []WindowPart
	// Size is how much memory of this side the engine is to reach, in bytes; Link is the link address of its first byte,
	// where no part of the window lies.
	Size uint64
	Link dma.Addr
}

// Engined is a Board with a DMA engine that this side drives.
type Engined interface {
	Board
	// Engine opens an engine, or some channels of one, for one user: in one direction, with memory of this side that it
	// reaches. Close of the engine takes that memory away from the board and gives it back; the span is not valid any
	// more then. Close all before the Board.
	//
	// Errors: ErrNoEngine where none is left, ErrHasNoEngine where there never was one; others tell what is in the way.
	//
	// Where Close fails with dma.ErrRunaway, bus mastering is off, and the Board is lost (Vanishing): it does not open again before
	// its engine stands still, which may take a reset.
	Engine(c EngineConfig) (dma.Engine, dma.Span, error)
}

// SelfRinging is a Board that can ring this side's own vectors: the way over the bus and back, to try the wiring.
type SelfRinging interface {
	Board
	// RingSelf returns what rings this side's vector v.
	RingSelf(v uint32) (doorbell.Ringer, error)
}

// Vanishing is a Board that can be pulled, or lose its function, while it is open.
type Vanishing interface {
	Board
	// Gone tells why the board is lost or about to be, nil if it is there. Close it soon then; to
	// open it again fails with an error that matches ErrAbsent until it is back.
	Gone() error
}

// Counting is a Board that counts what happens to it while it is open, for status: by name, "bus_master_restored".
type Counting interface {
	Board
	Counters() map[string]uint64
}

// Served is a Board that depends on a connection beside the window itself.
type Served interface {
	Board
	// ServerLost tells that the connection is gone: the board goes on with the memory and the
	// doorbells that it has, but a peer that comes anew will not be met. When the link is down,
	// close the board and open it again.
	ServerLost() bool
}

// Silent rings nobody: what Ringer returns for a peer that declares RingNone, as it polls.
var Silent doorbell.Ringer = silent{}

type silent struct{}

func (silent) Ring() error { return nil }
