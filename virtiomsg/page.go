package virtiomsg

import (
	"encoding/binary"
	"fmt"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/dma"
)

// The link page (docs/wire.md, "Link page"): window offset 0, one block for each side.
const (
	// PageSize is the size of the link page, and of a FIFO, in bytes.
	PageSize = 4096
	// Magic is the first word of a block: "BLNK".
	Magic = 0x4b4e4c42
	// Major and Minor are the version of the layout. Another major is refused; a higher
	// minor only uses what is reserved here.
	Major = 1
	Minor = 0
	// MaxRegions is how many regions a block can hold.
	MaxRegions = 8
	// Alignment of regions and pool, their addresses, offsets and sizes, in bytes.
	RegionAlign = 64

	blockSize = 0x800 // room of a block
	blockLen  = 0x200 // what this version uses of it

	offMagic    = 0x00
	offVersion  = 0x04 // u16 major, u16 minor
	offSide     = 0x08
	offLength   = 0x0c
	offWindow   = 0x10 // u64
	offFeatures = 0x18
	offEpoch    = 0x40 // aligned to 8: epoch and echo are one read
	offEcho     = 0x44
	offBeat     = 0x48 // heartbeat and state are one read
	offState    = 0x4c
	offMethod   = 0x80
	offPeer     = 0x84
	offVectors  = 0x88
	offValue    = 0x8c
	offRingAddr = 0x90 // u64
	offFIFOA2H  = 0xa0 // u64
	offFIFOH2A  = 0xa8 // u64
	offSlotsA2H = 0xb0
	offSlotsH2A = 0xb4
	offRegions  = 0xc0 // count
	offEntry    = 0xc4 // size of an entry
	offTable    = 0x100
	entrySize   = 32

	sideAgent = 1
	sideHost  = 2

	// allOnes is what a vanished device reads as; no epoch and no echo has this value.
	allOnes = 0xffffffff
)

// The states that a side shows in its block.
const (
	StateStopped  = 0 // nobody, or left cleanly; the epoch is 0
	StateStarting = 1 // shaking hands
	StateRunning  = 2 // up
	StateStopping = 3 // leaving cleanly: waits for the peer to let go of its memory
)

// blockOff returns where a side's block starts in the window.
func blockOff(s board.Side) uint64 {
	if s == board.Host {
		return blockSize
	}
	return 0
}

// Region is a piece of board memory that the agent's descriptors may point into.
type Region struct {
	Addr   dma.Addr // bus address, which is the link address
	Size   uint64   // bytes
	Offset uint64   // of its first byte in the window; behind link page and FIFOs
	Access dma.Access
}

// PoolRegion is a piece of host memory that the board may reach (placement push).
type PoolRegion struct {
	Link   dma.Addr // link address: what descriptors carry
	Size   uint64   // bytes
	Bus    uint64   // bus address: where the board reaches it
	Access dma.Access
}

// Declaration is what a side declares in its block of the link page, the words that move
// (epoch, echo, heartbeat, state) aside.
type Declaration struct {
	Major, Minor uint16         // of a peer; a Link fills in its own
	WindowSize   uint64         // bytes; a Link fills in its own
	Features     uint32         // of the link itself (FeatureLinkState), unknown ones are ignored
	Ring         board.RingInfo // how to ring this side

	// Of the agent only. The FIFOs (one page each, slots of 64 bytes, 1 to MaxSlots of them)
	// lie in the window at multiples of PageSize; the regions, up to MaxRegions, overlap
	// neither them nor the link page.
	FIFOAgentToHost, FIFOHostToAgent   uint64 // offsets in the window
	SlotsAgentToHost, SlotsHostToAgent uint32
	Regions                            []Region

	// Of the host only, up to MaxRegions. Its link addresses overlap none of the agent's
	// regions.
	Pool []PoolRegion
}

func pageErr(side board.Side, err error, field string, v uint64, why string, args ...interface{}) error {
	return &PageError{Side: side, Field: field, Value: v, Why: fmt.Sprintf(why, args...), Err: err}
}

// Check tells what is wrong with a declaration of the given side for a window of windowSize
// bytes; nil if nothing is. The error is a *PageError.
func (d *Declaration) Check(side board.Side, windowSize uint64) error {
	if d.WindowSize > windowSize && side == board.Agent {
		return pageErr(side, ErrWindowSize, "window size", d.WindowSize, "only %#x bytes are mapped here; map the whole window", windowSize)
	}
	if d.WindowSize < windowSize && side == board.Host {
		return pageErr(side, ErrWindowSize, "window size", d.WindowSize, "the agent's window has %#x bytes; the host must map all of them", windowSize)
	}
	if d.WindowSize < PageSize {
		return pageErr(side, ErrWindowSize, "window size", d.WindowSize, "the link page alone takes %#x bytes", PageSize)
	}
	switch d.Ring.Method {
	case board.RingNone:
	case board.RingIvshmem, board.RingRegister, board.RingBoard:
		if d.Ring.Vectors < 1 || d.Ring.Vectors > 0x10000 {
			return pageErr(side, ErrRing, "vectors", uint64(d.Ring.Vectors), "1 to 65536 are possible")
		}
		if d.Ring.Method == board.RingRegister && uint64(d.Ring.Addr)&3 != 0 {
			return pageErr(side, ErrRing, "doorbell address", uint64(d.Ring.Addr), "must be a multiple of 4")
		}
	default:
		return pageErr(side, ErrRing, "method", uint64(d.Ring.Method), "not a known method; the other side is newer: update this one")
	}
	if side == board.Host {
		return d.checkPool()
	}
	return d.checkAgent()
}

// span is a half-open range for the overlap checks; end never overflows.
type span struct {
	name     string
	off, end uint64
}

func (a span) overlaps(b span) bool { return a.off < b.end && b.off < a.end }

func (d *Declaration) checkAgent() error {
	used := make([]span, 1, 3+MaxRegions)
	used[0] = span{"the link page", 0, PageSize}
	for _, f := range []struct {
		name      string
		off       uint64
		slotsName string
		slots     uint32
	}{
		{"FIFO agent to host", d.FIFOAgentToHost, "slots agent to host", d.SlotsAgentToHost},
		{"FIFO host to agent", d.FIFOHostToAgent, "slots host to agent", d.SlotsHostToAgent},
	} {
		if f.off%PageSize != 0 {
			return pageErr(board.Agent, ErrAlign, f.name, f.off, "must be a multiple of %#x", PageSize)
		}
		if d.WindowSize < PageSize || f.off > d.WindowSize-PageSize {
			return pageErr(board.Agent, ErrOutside, f.name, f.off, "the window has %#x bytes", d.WindowSize)
		}
		s := span{f.name, f.off, f.off + PageSize}
		for _, u := range used {
			if s.overlaps(u) {
				return pageErr(board.Agent, ErrOverlap, f.name, f.off, "overlaps %s", u.name)
			}
		}
		used = append(used, s)
		if f.slots == 0 || f.slots > MaxSlots {
			return pageErr(board.Agent, ErrCount, f.slotsName, uint64(f.slots), "1 to %d fit", MaxSlots)
		}
	}
	if len(d.Regions) > MaxRegions {
		return pageErr(board.Agent, ErrCount, "regions", uint64(len(d.Regions)), "at most %d fit", MaxRegions)
	}
	for i, r := range d.Regions {
		name := fmt.Sprintf("region %d", i)
		if err := checkRange(board.Agent, name, uint64(r.Addr), r.Size, r.Access); err != nil {
			return err
		}
		if r.Offset%RegionAlign != 0 {
			return pageErr(board.Agent, ErrAlign, name+" offset", r.Offset, "must be a multiple of %d", RegionAlign)
		}
		if r.Offset > d.WindowSize || r.Size > d.WindowSize-r.Offset {
			return pageErr(board.Agent, ErrOutside, name+" offset", r.Offset, "its %#x bytes do not fit a window of %#x bytes", r.Size, d.WindowSize)
		}
		s := span{name, r.Offset, r.Offset + r.Size}
		for _, u := range used {
			if s.overlaps(u) {
				return pageErr(board.Agent, ErrOverlap, name+" offset", r.Offset, "overlaps %s", u.name)
			}
		}
		used = append(used, s)
		a := span{name, uint64(r.Addr), uint64(r.Addr) + r.Size}
		for j, o := range d.Regions[:i] {
			if a.overlaps(span{"", uint64(o.Addr), uint64(o.Addr) + o.Size}) {
				return pageErr(board.Agent, ErrOverlap, name+" address", uint64(r.Addr), "overlaps region %d", j)
			}
		}
	}
	return nil
}

func (d *Declaration) checkPool() error {
	if len(d.Pool) > MaxRegions {
		return pageErr(board.Host, ErrCount, "pool", uint64(len(d.Pool)), "at most %d regions fit", MaxRegions)
	}
	for i, p := range d.Pool {
		name := fmt.Sprintf("pool %d", i)
		if err := checkRange(board.Host, name, uint64(p.Link), p.Size, p.Access); err != nil {
			return err
		}
		if p.Bus%RegionAlign != 0 {
			return pageErr(board.Host, ErrAlign, name+" bus address", p.Bus, "must be a multiple of %d", RegionAlign)
		}
		if p.Bus+p.Size < p.Bus {
			return pageErr(board.Host, ErrOutside, name+" bus address", p.Bus, "its %#x bytes pass the end of the address space", p.Size)
		}
		for j, o := range d.Pool[:i] {
			if (span{"", uint64(p.Link), uint64(p.Link) + p.Size}).overlaps(span{"", uint64(o.Link), uint64(o.Link) + o.Size}) {
				return pageErr(board.Host, ErrOverlap, name+" link address", uint64(p.Link), "overlaps pool %d", j)
			}
			if (span{"", p.Bus, p.Bus + p.Size}).overlaps(span{"", o.Bus, o.Bus + o.Size}) {
				return pageErr(board.Host, ErrOverlap, name+" bus address", p.Bus, "overlaps pool %d", j)
			}
		}
	}
	return nil
}

func checkRange(side board.Side, name string, addr, size uint64, access dma.Access) error {
	if size == 0 || size%RegionAlign != 0 {
		return pageErr(side, ErrAlign, name+" size", size, "must be a multiple of %d, and not 0", RegionAlign)
	}
	if addr%RegionAlign != 0 {
		return pageErr(side, ErrAlign, name+" address", addr, "must be a multiple of %d", RegionAlign)
	}
	if addr+size < addr {
		return pageErr(side, ErrOutside, name+" address", addr, "its %#x bytes pass the end of the address space", size)
	}
	if access == 0 || access&^(dma.DeviceRead|dma.DeviceWrite) != 0 {
		return pageErr(side, ErrAccess, name+" access", uint64(access), "1 (the device reads), 2 (writes) or 3")
	}
	return nil
}

// checkPair tells whether the host's pool and the agent's regions share link addresses.
func checkPair(agent, host *Declaration) error {
	for i, p := range host.Pool {
		a := span{"", uint64(p.Link), uint64(p.Link) + p.Size}
		for j, r := range agent.Regions {
			if a.overlaps(span{"", uint64(r.Addr), uint64(r.Addr) + r.Size}) {
				return pageErr(board.Host, ErrOverlap, fmt.Sprintf("pool %d link address", i), uint64(p.Link), "overlaps the agent's region %d", j)
			}
		}
	}
	return nil
}

// block is a side's block as it is written, the words that move aside, which are zero here.
type block [blockLen]byte

// moves tells whether the word at off of a block is one that moves.
func moves(off uint64) bool { return off >= offEpoch && off <= offState }

func (b *block) put32(off int, v uint32) { binary.LittleEndian.PutUint32(b[off:], v) }
func (b *block) put64(off int, v uint64) { binary.LittleEndian.PutUint64(b[off:], v) }

// encodeBlock lays a checked declaration out.
func encodeBlock(side board.Side, d *Declaration) block {
	var b block
	b.put32(offMagic, Magic)
	b.put32(offVersion, Major|Minor<<16)
	b.put32(offSide, wireSide(side))
	b.put32(offLength, blockLen)
	b.put64(offWindow, d.WindowSize)
	b.put32(offFeatures, d.Features)
	b.put32(offMethod, uint32(d.Ring.Method))
	b.put32(offPeer, d.Ring.Peer)
	b.put32(offVectors, d.Ring.Vectors)
	b.put32(offValue, d.Ring.Value)
	b.put64(offRingAddr, uint64(d.Ring.Addr))
	b.put32(offEntry, entrySize)
	if side == board.Agent {
		b.put64(offFIFOA2H, d.FIFOAgentToHost)
		b.put64(offFIFOH2A, d.FIFOHostToAgent)
		b.put32(offSlotsA2H, d.SlotsAgentToHost)
		b.put32(offSlotsH2A, d.SlotsHostToAgent)
		b.put32(offRegions, uint32(len(d.Regions)))
		for i, r := range d.Regions {
			b.putEntry(i, uint64(r.Addr), r.Size, r.Offset, r.Access)
		}
	} else {
		b.put32(offRegions, uint32(len(d.Pool)))
		for i, p := range d.Pool {
			b.putEntry(i, uint64(p.Link), p.Size, p.Bus, p.Access)
		}
	}
	return b
}

func (b *block) putEntry(i int, addr, size, where uint64, access dma.Access) {
	o := offTable + i*entrySize
	b.put64(o, addr)
	b.put64(o+8, size)
	b.put64(o+16, where)
	b.put32(o+24, uint32(access))
}

// write puts the block into the window, but for the words that move. The caller keeps the epoch
// word 0 meanwhile.
func (b *block) write(w *words, side board.Side) {
	for o := uint64(0); o < blockLen; o += 4 {
		if !moves(o) {
			w.store32(blockOff(side)+o, binary.LittleEndian.Uint32(b[o:]))
		}
	}
}

// stands tells whether the block is still in the window as it was written.
func (b *block) stands(w *words, side board.Side) bool {
	for o := uint64(0); o < blockLen; o += 8 {
		if !moves(o) && w.loadU64(blockOff(side)+o) != binary.LittleEndian.Uint64(b[o:]) {
			return false
		}
	}
	return true
}

func wireSide(side board.Side) uint32 {
	if side == board.Host {
		return sideHost
	}
	return sideAgent
}

// readStatics reads a block, each word once, and checks what can be checked without the rest
// of the page: the caller still has to Check the declaration.
func readStatics(w *words, side board.Side) (Declaration, error) {
	var d Declaration
	b := blockOff(side)
	magic, version := w.load64(b + offMagic)
	if magic != Magic {
		return d, pageErr(side, ErrMagic, "magic", uint64(magic), "%#x is expected: is the %s running, and is this its window?", uint32(Magic), side)
	}
	d.Major, d.Minor = uint16(version), uint16(version>>16)
	if d.Major != Major {
		return d, pageErr(side, ErrVersion, "version", uint64(version), "%d.%d was found, %d.x is spoken here; update the older side", d.Major, d.Minor, Major)
	}
	writer, length := w.load64(b + offSide)
	if writer != wireSide(side) {
		return d, pageErr(side, ErrSide, "side", uint64(writer), "%d is expected", wireSide(side))
	}
	if length < blockLen || length > blockSize {
		return d, pageErr(side, ErrBlockLength, "block length", uint64(length), "%#x to %#x are possible", blockLen, blockSize)
	}
	d.WindowSize = w.loadU64(b + offWindow)
	d.Features = w.load32(b + offFeatures)
	method, peer := w.load64(b + offMethod)
	vectors, value := w.load64(b + offVectors)
	d.Ring = board.RingInfo{Method: board.RingMethod(method), Peer: peer, Vectors: vectors, Value: value,
		Addr: dma.Addr(w.loadU64(b + offRingAddr))}
	if side == board.Agent {
		d.FIFOAgentToHost = w.loadU64(b + offFIFOA2H)
		d.FIFOHostToAgent = w.loadU64(b + offFIFOH2A)
		d.SlotsAgentToHost, d.SlotsHostToAgent = w.load64(b + offSlotsA2H)
	}
	count, entry := w.load64(b + offRegions)
	if count > MaxRegions {
		return d, pageErr(side, ErrCount, "regions", uint64(count), "at most %d fit", MaxRegions)
	}
	if entry != entrySize {
		return d, pageErr(side, ErrCount, "entry size", uint64(entry), "%d is expected", entrySize)
	}
	for i := uint64(0); i < uint64(count); i++ {
		o := b + offTable + i*entrySize
		addr, size, where := w.loadU64(o), w.loadU64(o+8), w.loadU64(o+16)
		flags := w.load32(o + 24)
		if flags > 0xff {
			return d, pageErr(side, ErrAccess, fmt.Sprintf("region %d access", i), uint64(flags), "1 (the device reads), 2 (writes) or 3")
		}
		if side == board.Agent {
			d.Regions = append(d.Regions, Region{Addr: dma.Addr(addr), Size: size, Offset: where, Access: dma.Access(flags)})
		} else {
			d.Pool = append(d.Pool, PoolRegion{Link: dma.Addr(addr), Size: size, Bus: where, Access: dma.Access(flags)})
		}
	}
	return d, nil
}

// Block is a side's block of the link page as it stands, for tools that look at a window
// without being an end of the link.
type Block struct {
	Epoch, Echo, Heartbeat, State uint32
	Declaration                   Declaration
}

// ReadBlock reads and checks a side's block of the link page in window. A block that is being
// rewritten (epoch 0, or changed meanwhile) is returned with epoch 0 and no declaration. Errors:
// ErrLinkGone, or a *PageError.
func ReadBlock(window dma.Region, side board.Side) (Block, error) {
	var b Block
	if window.Mem.Size() < PageSize {
		return b, pageErr(side, ErrWindowSize, "mapped size", window.Mem.Size(), "the link page alone takes %#x bytes", PageSize)
	}
	w := newWords(window)
	o := blockOff(side)
	b.Epoch, b.Echo = w.load64(o + offEpoch)
	if b.Epoch == allOnes && b.Echo == allOnes && window.Across {
		return Block{}, ErrLinkGone
	}
	b.Heartbeat, b.State = w.load64(o + offBeat)
	if b.Epoch == 0 {
		return b, nil
	}
	d, err := readStatics(&w, side)
	if w.load32(o+offEpoch) != b.Epoch {
		return Block{Heartbeat: b.Heartbeat, State: b.State}, nil
	}
	if err != nil {
		return b, err
	}
	size := window.Mem.Size()
	if side == board.Host {
		size = PageSize // the agent's window size is not known here
	}
	if err := d.Check(side, size); err != nil {
		return b, err
	}
	b.Declaration = d
	return b, nil
}
