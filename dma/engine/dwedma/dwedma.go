// Package dwedma drives the DMA engines inside Synopsys DesignWare PCIe controllers, from the host through a BAR as
// Linux' dw-edma-pcie does, or from the board: eDMA (register map "unrolled") and its successor HDMA.
//
// In the room: their registers and linked lists. Never in it: how the BAR was found (a vendor-specific
// capability, id 6, or a table of devices) and mapped; the register map "legacy", behind a viewport.
//
// Register offsets and bits: Linux drivers/dma/dw-edma (dw-edma-v0-regs.h, dw-edma-v0-core.c, dw-hdma-v0-regs.h,
// dw-hdma-v0-core.c). Bit 31 of eDMA's doorbell register, which stops a channel, is in vendors' drivers (RK3568);
// bit 1 of HDMA's is taken from memory of the databook. No silicon has confirmed this package.
package dwedma

import (
	"fmt"
	"time"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/dma/engine"
	"github.com/boardlink/boardlink/mmio"
)

// Kind is a generation of the engine.
type Kind uint8

// The generations.
const (
	EDMA Kind = iota // unrolled register map
	HDMA
)

// String returns "edma" or "hdma".
func (k Kind) String() string {
	if k == EDMA {
		return "edma"
	}
	return "hdma"
}

// ElementSize is the size of an element of a linked list in bytes, MaxChannels the number of channels of each direction.
const (
	ElementSize  = 24
	MaxChannels  = 8
	DefaultChain = 16
	// MaxLen is the largest transfer: the size register has 32 bits; the highest multiple of 4 KiB in them.
	MaxLen = 1<<32 - 4096
)

// eDMA's registers for all channels of a direction: write, read.
type dirRegs struct{ enable, doorbell, status, mask, clear, err, llErr, done, abort, data uint64 }

var edmaRegs = [2]dirRegs{
	{0x00c, 0x010, 0x04c, 0x054, 0x058, 0x05c, 0x090, 0x060, 0x068, 0x070},
	{0x02c, 0x030, 0x0a0, 0x0a8, 0x0ac, 0x0b4, 0x0c4, 0x0cc, 0x0d4, 0x0dc},
}

const (
	edmaCtrl    = 0x008 // number of write channels 3:0, of read channels 19:16
	edmaChannel = 0x200 // of write channel 0; read channel 0 is 0x100 above
	edmaStride  = 0x200
	edmaRead    = 0x100

	chControl1 = 0x00
	chLLP      = 0x1c

	edmaStop = 1 << 31 // in the doorbell register
)

// HDMA's registers of a channel: write channel n at 0x200n, read channel 0x100 above.
const (
	hdmaStride    = 0x200
	hdmaRead      = 0x100
	hdmaEnable    = 0x00
	hdmaDoorbell  = 0x04
	hdmaLLP       = 0x10
	hdmaCycle     = 0x18
	hdmaControl1  = 0x34
	hdmaStat      = 0x80 // 1:0 state
	hdmaIntStat   = 0x84
	hdmaIntSetup  = 0x88
	hdmaIntClear  = 0x8c
	hdmaMSIStop   = 0x90
	hdmaMSIAbort  = 0xa0
	hdmaMSIData   = 0xa8
	hdmaStart     = 1 << 0
	hdmaStop      = 1 << 1
	hdmaLLEnable  = 1 << 0
	hdmaIntStop   = 1 << 0 // in IntStat and IntClear; in IntSetup it masks
	hdmaIntAbort  = 1 << 2
	hdmaIntErrors = 0xf8 // error code in IntStat
	hdmaLocalInts = 1<<4 | 1<<6
	hdmaFarInts   = 1<<3 | 1<<5
	hdmaCycleInit = 1<<0 | 1<<1 // consumer cycle bit and state
)

// Control words of list elements; eDMA's control1 has the upper two as well.
const (
	ctlCB    = 1 << 0 // producer's cycle bit
	ctlTCB   = 1 << 1 // toggle the consumer's
	ctlLLP   = 1 << 2 // the element is a link
	ctlLIE   = 1 << 3 // local interrupt
	ctlRIE   = 1 << 4 // remote interrupt (MSI)
	ctlState = 3 << 5 // channel state
	ctlCCS   = 1 << 8
	ctlLLE   = 1 << 9
)

// Channel states.
const (
	stateRunning = 1
	stateHalted  = 2 // by an error
	stateStopped = 3
)

// MSI is the message that remote interrupts send; the address is the host's, as the board's bus sees it.
type MSI struct {
	Addr uint64
	Data uint16
}

// RegsSize returns how many bytes of registers the channels below n take, of both directions.
func RegsSize(k Kind, n int) uint64 {
	if k == EDMA {
		return edmaChannel + uint64(n)*edmaStride
	}
	return uint64(n) * hdmaStride
}

// Config describes an engine.
type Config struct {
	Kind Kind
	Regs mmio.Mem
	// Write and Read are the channels that this engine uses; nobody else may use them. Write channels move
	// the board's memory to the host, read channels the host's to the board.
	Write, Read []int
	// List is memory for linked lists, which the engine reads at bus address ListBus (the board's own), a multiple of 8: Chain + 1
	// elements for each channel.
	List    mmio.Mem
	ListBus uint64
	Chain   int // elements of one chain; 0 is DefaultChain
	// Map is how the engine reaches memory: the board's as Near, the host's as Far.
	Map *engine.Map
	// Waiter is the engine's interrupt; nil polls. MSI, where it is not nil, is sent at the end of each chain.
	Waiter dma.EngineWaiter
	MSI    *MSI
	// StopTime bounds the wait for a stopped channel; 0 is 10 ms.
	StopTime time.Duration
}

// New returns an engine. Other engines may run on other channels of the same registers.
func New(c Config) (dma.Engine, error) {
	if c.Chain <= 0 {
		c.Chain = DefaultChain
	}
	if c.StopTime <= 0 {
		c.StopTime = 10 * time.Millisecond
	}
	chans := len(c.Write) + len(c.Read)
	per := (uint64(c.Chain+1)*ElementSize + 63) &^ 63
	switch {
	case chans == 0:
		return nil, fmt.Errorf("dwedma: no channels")
	case c.List.Size() < per*uint64(chans) || c.ListBus%8 != 0 || c.ListBus+per*uint64(chans) < c.ListBus:
		return nil, fmt.Errorf("dwedma: %#x bytes of list memory at bus address %#x: needs %#x at a multiple of 8", c.List.Size(), c.ListBus, per*uint64(chans))
	}
	var there [2]uint32
	if c.Kind == EDMA {
		v := c.Regs.Load32(edmaCtrl)
		if v == ^uint32(0) {
			return nil, fmt.Errorf("dwedma: the registers read as all ones: the board does not answer")
		}
		there = [2]uint32{v & 0xf, v >> 16 & 0xf}
	} else {
		there = [2]uint32{MaxChannels, MaxChannels} // HDMA does not tell
	}
	var list []engine.Channel
	for dir, l := range [2][]int{c.Write, c.Read} {
		used := 0
		for _, n := range l {
			if n < 0 || n >= MaxChannels || uint32(n) >= there[dir] || used>>uint(n)&1 != 0 {
				return nil, fmt.Errorf("dwedma: %s channel %d: there are %d, from 0 on, each once", dirNames[dir], n, there[dir])
			}
			used |= 1 << uint(n)
			off := per * uint64(len(list))
			mem, err := c.List.Slice(off, per)
			if err != nil {
				return nil, fmt.Errorf("dwedma: %w", err)
			}
			b := base{c: &c, n: n, dir: dir, list: mem, bus: c.ListBus + off}
			var ch engine.Channel
			if c.Kind == EDMA {
				ch, err = newEDMA(b)
			} else {
				ch, err = newHDMA(b)
			}
			if err != nil {
				return nil, err
			}
			list = append(list, ch)
		}
	}
	return engine.NewCore(engine.CoreConfig{Name: "dw " + c.Kind.String(), Channels: list, Map: c.Map, MaxLen: MaxLen, Chain: c.Chain, Waiter: c.Waiter})
}

var dirNames = [2]string{"write", "read"}

// base is what the channels of both generations share.
type base struct {
	c    *Config
	n    int
	dir  int // 0 write, 1 read
	list mmio.Mem
	bus  uint64 // of list
}

// Flows implements engine.Channel.
func (b *base) Flows() engine.Flow {
	if b.dir == 0 {
		return engine.NearToFar
	}
	return engine.FarToNear
}

// write writes the linked list: one element for each item, and a link that ends it, since its cycle bit is not the
// consumer's.
func (b *base) write(items []engine.Item) {
	for i := range items {
		control := uint64(ctlCB)
		if i == len(items)-1 {
			control |= ctlLIE
			if b.c.MSI != nil {
				control |= ctlRIE
			}
		}
		at := uint64(i) * ElementSize
		b.list.Store64(at, control|uint64(items[i].Len)<<32)
		b.list.Store64(at+8, items[i].Src)
		b.list.Store64(at+16, items[i].Dst)
	}
	at := uint64(len(items)) * ElementSize
	b.list.Store64(at, ctlLLP|ctlTCB)
	b.list.Store64(at+8, b.bus)
	// The registers are another target than the memory: a read back keeps the doorbell behind the list.
	b.list.Barrier(mmio.WriteBarrier)
	if b.list.Kind() != mmio.Cached || b.list.Modelled() {
		b.list.Load64(at + 8)
	}
	b.list.Barrier(mmio.FullBarrier)
}

func (b *base) runaway(status uint32) error {
	return fmt.Errorf("dwedma: %s channel %d does not stop, status %#x: %w", dirNames[b.dir], b.n, status, dma.ErrRunaway)
}

// edma is a channel of eDMA.
type edma struct {
	base
	regs *mmio.Mem
	r    *dirRegs
	ch   uint64 // offset of the channel's registers
	bits uint32 // of the channel in interrupt registers: done and abort
}

func newEDMA(b base) (*edma, error) {
	ch := &edma{base: b, regs: &b.c.Regs, r: &edmaRegs[b.dir], ch: edmaChannel + uint64(b.n)*edmaStride + uint64(b.dir)*edmaRead,
		bits: 0x10001 << uint(b.n)}
	if _, err := b.c.Regs.Slice(ch.ch, chLLP+8); err != nil {
		return nil, fmt.Errorf("dwedma: %s channel %d: %w", dirNames[b.dir], b.n, err)
	}
	if ch.regs.Load32(ch.ch+chControl1)>>5&3 == stateRunning {
		if err := ch.Stop(); err != nil {
			return nil, err
		}
	}
	ch.regs.Store32(ch.r.enable, 1)
	// The mask bits are unmasked: the status bits are what we go by.
	ch.regs.Store32(ch.r.mask, ch.regs.Load32(ch.r.mask)&^ch.bits)
	// Linked list errors become aborts: locally, and remotely where there is a message for it.
	llErr := uint32(1) << uint(b.n)
	if m := b.c.MSI; m != nil {
		for _, r := range []uint64{ch.r.done, ch.r.abort} {
			ch.regs.Store32(r, uint32(m.Addr))
			ch.regs.Store32(r+4, uint32(m.Addr>>32))
		}
		data, shift := ch.r.data+uint64(b.n/2)*4, uint(b.n%2)*16
		ch.regs.Store32(data, ch.regs.Load32(data)&^(0xffff<<shift)|uint32(m.Data)<<shift)
	}
	ch.regs.Store32(ch.r.llErr, ch.regs.Load32(ch.r.llErr)|llErr)
	ch.regs.Store32(ch.r.clear, ch.bits)
	return ch, nil
}

// Start implements engine.Channel.
func (ch *edma) Start(items []engine.Item) error {
	ch.write(items)
	ch.regs.Store32(ch.ch+chControl1, ctlCCS|ctlLLE)
	ch.regs.Store32(ch.ch+chLLP, uint32(ch.bus))
	ch.regs.Store32(ch.ch+chLLP+4, uint32(ch.bus>>32))
	ch.regs.Barrier(mmio.WriteBarrier)
	ch.regs.Store32(ch.r.doorbell, uint32(ch.n))
	return nil
}

// State implements engine.Channel. The last element's interrupt comes before the channel has read the link that ends the list, so
// that it stopped is asked for as well.
func (ch *edma) State() (engine.State, uint64) {
	v := ch.regs.Load32(ch.r.status)
	if v == ^uint32(0) || v&ch.bits == 0 {
		return engine.Running, 0
	}
	state := ch.regs.Load32(ch.ch+chControl1) >> 5 & 3
	if state == stateRunning {
		return engine.Running, 0
	}
	if v&ch.bits&0xff0000 != 0 || state != stateStopped {
		status := uint64(ch.regs.Load32(ch.r.err))
		if ch.dir == 1 {
			status |= uint64(ch.regs.Load32(ch.r.err+4)) << 32
		}
		ch.regs.Store32(ch.r.clear, ch.bits)
		return engine.Failed, status
	}
	ch.regs.Barrier(mmio.ReadBarrier)
	ch.regs.Store32(ch.r.clear, ch.bits)
	return engine.Ended, 0
}

// Stop implements engine.Channel.
func (ch *edma) Stop() error {
	ch.regs.Store32(ch.r.doorbell, edmaStop|uint32(ch.n))
	for end := time.Now().Add(ch.c.StopTime); ; {
		v := ch.regs.Load32(ch.ch + chControl1)
		if v != ^uint32(0) && v>>5&3 != stateRunning {
			ch.regs.Store32(ch.r.clear, ch.bits)
			return nil
		}
		if time.Now().After(end) {
			return ch.runaway(v)
		}
		time.Sleep(50 * time.Microsecond)
	}
}

// hdma is a channel of HDMA.
type hdma struct {
	base
	regs mmio.Mem
}

func newHDMA(b base) (*hdma, error) {
	regs, err := b.c.Regs.Slice(uint64(b.n)*hdmaStride+uint64(b.dir)*hdmaRead, hdmaRead)
	if err != nil {
		return nil, fmt.Errorf("dwedma: %s channel %d: %w", dirNames[b.dir], b.n, err)
	}
	ch := &hdma{base: b, regs: regs}
	if v := ch.regs.Load32(hdmaStat); v == ^uint32(0) {
		return nil, fmt.Errorf("dwedma: the registers read as all ones: the board does not answer")
	} else if v&3 == stateRunning {
		if err := ch.Stop(); err != nil {
			return nil, err
		}
	}
	ch.regs.Store32(hdmaEnable, 1)
	setup := uint32(hdmaLocalInts)
	if m := b.c.MSI; m != nil {
		setup |= hdmaFarInts
		for _, r := range []uint64{hdmaMSIStop, hdmaMSIAbort} {
			ch.regs.Store32(r, uint32(m.Addr))
			ch.regs.Store32(r+4, uint32(m.Addr>>32))
		}
		ch.regs.Store32(hdmaMSIData, uint32(m.Data))
	}
	ch.regs.Store32(hdmaIntSetup, setup)
	ch.regs.Store32(hdmaIntClear, hdmaIntStop|hdmaIntAbort)
	return ch, nil
}

// Start implements engine.Channel.
func (ch *hdma) Start(items []engine.Item) error {
	ch.write(items)
	ch.regs.Store32(hdmaControl1, hdmaLLEnable)
	ch.regs.Store32(hdmaLLP, uint32(ch.bus))
	ch.regs.Store32(hdmaLLP+4, uint32(ch.bus>>32))
	ch.regs.Store32(hdmaCycle, hdmaCycleInit)
	ch.regs.Barrier(mmio.WriteBarrier)
	ch.regs.Store32(hdmaDoorbell, hdmaStart)
	return nil
}

// State implements engine.Channel.
func (ch *hdma) State() (engine.State, uint64) {
	v := ch.regs.Load32(hdmaIntStat)
	if v == ^uint32(0) || v&(hdmaIntStop|hdmaIntAbort) == 0 {
		return engine.Running, 0
	}
	state := ch.regs.Load32(hdmaStat) & 3
	if state == stateRunning {
		return engine.Running, 0
	}
	ch.regs.Barrier(mmio.ReadBarrier)
	ch.regs.Store32(hdmaIntClear, hdmaIntStop|hdmaIntAbort)
	if v&hdmaIntAbort != 0 || state != stateStopped {
		return engine.Failed, uint64(v)
	}
	return engine.Ended, 0
}

// Stop implements engine.Channel.
func (ch *hdma) Stop() error {
	ch.regs.Store32(hdmaDoorbell, hdmaStop)
	for end := time.Now().Add(ch.c.StopTime); ; {
		v := ch.regs.Load32(hdmaStat)
		if v != ^uint32(0) && v&3 != stateRunning {
			ch.regs.Store32(hdmaIntClear, hdmaIntStop|hdmaIntAbort)
			return nil
		}
		if time.Now().After(end) {
			return ch.runaway(v)
		}
		time.Sleep(50 * time.Microsecond)
	}
}
