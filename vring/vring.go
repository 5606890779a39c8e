package vring

import (
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
)

// MaxSize is the largest queue size (virtio 1.2, 2.7 and 2.8).
const MaxSize = 32768

// Buffer is one element of a scatter list that the driver side offers: an address the
// device side can translate, and a length in bytes, not 0.
type Buffer struct {
	Addr dma.Addr
	Len  uint32
}

// Request is one descriptor chain to make available.
type Request struct {
	Bufs     []Buffer // the readable ones first; owned by the caller again when Add returns
	Readable int      // how many of Bufs the device may read; it may write the others
	Token    uint32   // comes back in the Completion; the ring does not interpret it
}

// Completion is a chain that the device has used.
type Completion struct {
	Token uint32
	Len   uint32 // bytes the device wrote; never above the writable length of the chain
}

// Driver is the driver side of a virtqueue. Its methods work on whole batches.
type Driver interface {
	// Size returns the queue size in descriptors.
	Size() int
	// Free returns how many descriptors are free.
	Free() int
	// Add makes as many requests available, from the first on, as there are free
	// descriptors, with a single write of the available index, and returns their number.
	// It does not kick: ask NeedKick after it, always (its barrier also drives out an index
	// that write combining holds back). A request that no queue could take (no
	// buffer, one of no bytes, more than 4 GiB - 1 in all, more buffers than the queue has
	// descriptors) is the caller's error: an *Error with Code ErrRequest, ErrZeroLength,
	// ErrOverflow, ErrTotal or ErrTooLong; those before it were added, and the queue goes on.
	Add(reqs []Request) (int, error)
	// NeedKick tells whether the device wants to be notified of what was added
	// since the last call. It holds the full barrier between the index and the
	// suppression word (pairs with the device side's ArmKick).
	NeedKick() bool
	// Reap fills done with chains that the device has used and returns their
	// number; 0 where there are none. An error means the device misbehaved: those
	// before it are returned, the queue is broken, and stays so.
	Reap(done []Completion) (int, error)
	// ArmCall asks to be called for the next used buffer, and tells whether one
	// is there already (then do not sleep). It follows design rule "going to sleep
	// across a bus".
	ArmCall() (pending bool, err error)
	// ArmCallAfter is ArmCall for the n-th used buffer from now, 1 <= n <= the chains in
	// flight (it is cut to them, and 1 where there are none): the device may stay silent until
	// then. pending tells that n are there already. Without the event index it asks for
	// the next one.
	ArmCallAfter(n int) (pending bool, err error)
	// DisarmCall asks not to be called: to be used while awake.
	DisarmCall()
	// Save returns a versioned record of this side's own state, chains in flight included, from which
	// ResumeSplitDriver and ResumePackedDriver go on, in this process or another one. The owner calls it
	// between other calls, and uses this side no more where another one is resumed. The error is the one
	// that broke the queue.
	Save() ([]byte, error)
	// State returns the ring state, as of the last call by the owner.
	State() State
	// Broken returns the error that broke the queue, nil as long as none has.
	Broken() error
	// Stats returns the live counters; read them with Stats.Load.
	Stats() *Stats
}

// Chain is a descriptor chain that the device side popped.
type Chain struct {
	ID       uint16 // split: the head's index; packed: the buffer id
	Count    uint16 // packed: descriptors in the ring that the chain takes; split: 1
	First    int32  // index of its first span in Batch.Spans
	Readable uint16 // spans that the device may read ...
	Writable uint16 // ... followed by those it may write
	ReadLen  uint32 // their sums, in bytes
	WriteLen uint32
}

// Batch receives what Pop takes. Both slices are reused; they grow until they fit
// and then no more, so the steady state allocates nothing.
type Batch struct {
	Chains []Chain
	Spans  []dma.Span
}

// Used returns a chain to the driver.
type Used struct {
	ID    uint16
	Count uint16
	Len   uint32 // bytes written into the writable spans
}

// Device is the device side of a virtqueue. Its methods work on whole batches.
type Device interface {
	Size() int
	// Pop appends up to max available chains to b, translated and checked, and returns
	// their number. It may return fewer than there are (a batch ends early when its
	// spans outnumber the descriptors of the queue, which bounds its memory): 0 alone
	// means that none was there. An error means the driver misbehaved: chains before the
	// bad one are returned, the queue is broken, and stays so.
	Pop(b *Batch, max int) (int, error)
	// Unpop gives the last n popped chains back: they will be popped again, and read and
	// checked anew. None of them may have been completed; more than are popped and not
	// completed is the caller's error and panics.
	Unpop(n int)
	// Complete hands chains back, in order, with a single write of the used index.
	// It does not call: ask NeedCall after it, always, as Driver.Add says. An ID that cannot be, or more chains than
	// were popped, is the caller's error (Code ErrComplete): nothing is published then.
	Complete(used []Used) error
	// NeedCall tells whether the driver wants to be notified of what was completed
	// since the last call. Pairs with the driver side's ArmCall.
	NeedCall() bool
	// ArmKick asks to be kicked for the next available chain, and tells whether one
	// is there already (then do not sleep).
	ArmKick() (pending bool, err error)
	// DisarmKick asks not to be kicked: to be used while awake.
	DisarmKick()
	// Settle ends a batch for good, also that of a queue that broke: it completes used and gives the last rest chains
	// that were popped back, as Complete and Unpop do, and tells whether the driver wants to be called. A broken
	// queue stays broken; its State is then one to go on from once the driver has mended what broke it.
	Settle(used []Used, rest int) (call bool, err error)
	// SetLog replaces the Log. It is called while no chain is popped and not completed: of such a chain the buffers
	// would not be marked.
	SetLog(Log)
	// Wrote tells that the first n bytes of the writable spans of a popped chain were written, which its completion
	// may not tell, or which is given back. Without a Log it does nothing.
	Wrote(id uint16, n uint32)
	State() State
	Broken() error
	Stats() *Stats
}

// State is what has to be kept of a queue to go on with it elsewhere (vhost's vring
// base). For split rings: the device side's next available index to pop and next used index,
// the driver side's next available index and last seen used index. Avail - Used
// chains are in flight, at most the queue size.
//
// For packed rings both are the position of the next descriptor in 15 bits, with the wrap counter as the
// highest bit: vhost's encoding. Their distance counts descriptors, not chains.
type State struct {
	Avail uint16 // next available index
	Used  uint16 // next used index
	// Packed tells that it is that of a packed ring. The zero State starts a queue of either kind anew: a packed
	// one at descriptor 0, with wrap counters of 1.
	Packed bool
}

// Config describes a queue to either side.
type Config struct {
	Name string // of device and queue, for errors: "net0 rx0"
	Size uint16 // descriptors; at most MaxSize; split: a power of two
	// The three areas, of at least the lengths of SplitSizes or PackedSizes. Each lies in one region that
	// the device may read (Desc, Driver) or write (Device, and Desc of a packed ring), and starts at a multiple of
	// 16, 2 and 4 bytes; a packed ring and the driver side of a split one ask for 4 in place of 2, so that flags and
	// index are one aligned word. Their kinds, whether they lie across the bus, and their
	// accounts come from the regions.
	Desc, Driver, Device dma.Span
	EventIdx, Indirect   bool // negotiated
	// InOrder tells that VIRTIO_F_IN_ORDER was negotiated: the device side completes chains in the order in
	// which it popped them (Complete refuses another), and writes one used element for those of a
	// batch that it only read.
	InOrder bool
	// Sent tells the device side that the driver only sends by this queue: nothing is written to its
	// buffers. Then the entries of a packed ring's indirect tables are read also where they are
	// marked to be written, as DPDK's driver (22.11) marks the header of each frame.
	Sent bool
	// Table translates what descriptors carry; device side only.
	Table *dma.TableRef
	// IndirectMem is where the driver side keeps its indirect tables: Size tables of
	// IndirectMax*16 bytes, table i for head i, aligned to 16; the zero Span where none are
	// used. The device may read its region.
	IndirectMem dma.Span
	IndirectMax int // descriptors of one indirect table, at most Size
	IndirectMin int // buffers from which on a request takes an indirect table; 0 means 2
	// PayloadKind is the strongest kind of the memory of the buffers, as the driver
	// side sees it: the barriers must cover it. The device side finds it in Table.
	PayloadKind mmio.Kind
	// Log is where the device side marks what it writes; SetLog replaces it. With LogByLen, its owner writes no more of
	// a chain than it says by Used.Len, or calls Wrote: then no more is marked. Else all is marked that the
	// device may write of a chain that it completes.
	Log      Log
	LogByLen bool
	// Journal is where the device side of a packed queue keeps its place, for another process that goes on after
	// this one's sudden end; nil: nowhere. It stands at State.Used (Journal.Reset), and no chain of State is in flight.
	Journal *Journal
	// State is where to go on. A driver side starts with nothing in flight (Avail equal
	// to Used); a device side goes on with Avail-Used chains in flight, whose IDs
	// its owner knows.
	State State
}
