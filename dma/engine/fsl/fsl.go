// Package fsl drives the DMA controllers of Freescale's PowerPC processors: MPC83xx (little-endian registers,
// addresses of 32 bits) and MPC85xx "eloplus" (big-endian registers, of 36 bits).
//
// In the room: the registers of the channels and their link descriptors. Never in it: how the registers
// became accessible: through BAR0 (IMMR) from the host, or mapped on the board.
//
// Register offsets and bits: U-Boot arch/powerpc/include/asm/fsl_dma.h and drivers/dma/fsl_dma.c, Linux
// drivers/dma/fsldma.h and fsldma.c. Both were read; no silicon has confirmed this package.
package fsl

import (
	"fmt"
	"math/bits"
	"time"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/dma/engine"
	"github.com/boardlink/boardlink/mmio"
)

// Chip is a variant of the controller.
type Chip uint8

// The variants.
const (
	MPC83xx Chip = iota
	MPC85xx
)

// String returns "mpc83xx" or "mpc85xx".
func (c Chip) String() string {
	if c == MPC83xx {
		return "mpc83xx"
	}
	return "mpc85xx"
}

// Where the channels are, in bytes: 83xx counts from IMMR, 85xx from CCSR.
const (
	Base83xx     = 0x8100 // of channel 0
	Base85xx     = 0x21100
	ChannelSize  = 0x80 // from one channel to the next
	MaxChannels  = 4
	DescSize     = 32        // of a link descriptor, and its alignment
	MaxCount     = 0x3ffffff // bytes of one transfer
	DefaultChain = 16
)

// Registers of a channel. 83xx has 32-bit addresses in SAR, DAR, CDAR and NDAR; on 85xx each is a pair, high half first,
// and the high half of SAR and DAR are the attributes.
const (
	regMR   = 0x00
	regSR   = 0x04
	regCDAR = 0x08
	regSAR  = 0x10
	regDAR  = 0x18
	regBCR  = 0x20
)

// Mode register.
const (
	mrCS     = 1 << 0 // channel start: 0 to 1 starts, 1 to 0 halts
	mrCTM    = 1 << 2 // direct mode
	mrCA     = 1 << 3 // 85xx: abort
	mrEIE    = 1 << 6 // 85xx: error interrupt
	mrEOTIE  = 1 << 7 // 83xx: end-of-transfer interrupt
	mrEOLNIE = 1 << 8 // 85xx: end-of-links interrupt
	mrEOSIE  = 1 << 9 // 85xx: end-of-segment interrupt
	mrPRCRM  = 0x800  // 83xx: PCI read multiple
	mrIRQS   = 1 << 19
	mrDMSEN  = 1 << 20    // 83xx: snoop in direct mode
	mrBWC    = 0x0a000000 // 85xx: 1024 bytes before the next channel's turn, as Linux has it
)

// Status register. Interrupt and error bits are cleared by writing them as 1.
const (
	srEOCDI = 1 << 0
	srEOSI  = 1 << 1
	srCB    = 1 << 2 // busy
	srEOLNI = 1 << 3 // 85xx
	srPE    = 1 << 4 // 85xx: programming error
	srCH    = 1 << 5 // 85xx: halted
	srTE    = 1 << 7 // transfer error
	srClear = srEOCDI | srEOSI | srEOLNI | srPE | srTE
)

const (
	descEOL   = 1 << 0     // in a descriptor's next address: the last one
	descSnoop = 1 << 4     // 83xx: of the transfer to come, and in CDAR
	attrSnoop = 0x00050000 // 85xx: SATR read with snoop, DATR write with snoop
)

// Config describes a controller.
type Config struct {
	Chip Chip
	// Regs are the registers from channel 0 on: Base83xx in IMMR, Base85xx in CCSR.
	Regs mmio.Mem
	// Channels are those that this engine uses; nobody else may use them.
	Channels []int
	// Desc is memory for link descriptors, which the controller reads at bus address DescBus: a multiple of DescSize, Chain
	// descriptors for each channel.
	Desc    mmio.Mem
	DescBus uint64
	Chain   int // descriptors in one chain; 0 is DefaultChain
	// Map is how the controller reaches memory: the board's as Near, the host's, through an
	// outbound window, as Far.
	Map *engine.Map
	// Waiter is the controller's interrupt; nil polls, and then no interrupt is enabled. ToHost steers it to the
	// PCI side (83xx), instead of the board's processor.
	Waiter dma.EngineWaiter
	ToHost bool
	// StopTime bounds the wait for a halted channel; 0 is 10 ms.
	StopTime time.Duration
}

// New returns an engine. Channels that are busy are halted first.
func New(c Config) (dma.Engine, error) {
	if c.Chain <= 0 {
		c.Chain = DefaultChain
	}
	if c.StopTime <= 0 {
		c.StopTime = 10 * time.Millisecond
	}
	limit := uint64(1<<32 - 1)
	if c.Chip == MPC85xx {
		limit = 1<<36 - 1
	}
	need := uint64(c.Chain * len(c.Channels) * DescSize)
	switch {
	case len(c.Channels) == 0:
		return nil, fmt.Errorf("fsl: no channels")
	case c.Desc.Size() < need || c.DescBus%DescSize != 0 || c.DescBus+need-1 > limit:
		return nil, fmt.Errorf("fsl: %#x bytes of descriptor memory at bus address %#x: needs %#x, at a multiple of %d, below %#x", c.Desc.Size(), c.DescBus, need, DescSize, limit)
	}
	for _, w := range c.Map.Windows() {
		if w.Bus+w.Size-1 > limit {
			return nil, fmt.Errorf("fsl: window %q ends at bus address %#x, the %v reaches %#x", w.Name, w.Bus+w.Size-1, c.Chip, limit)
		}
	}
	var chans []engine.Channel
	used := 0
	for i, n := range c.Channels {
		if n < 0 || n >= MaxChannels || used>>uint(n)&1 != 0 {
			return nil, fmt.Errorf("fsl: channel %d: there are 0 to %d, each once", n, MaxChannels-1)
		}
		used |= 1 << uint(n)
		regs, err := c.Regs.Slice(uint64(n)*ChannelSize, ChannelSize)
		if err != nil {
			return nil, fmt.Errorf("fsl: channel %d: %w", n, err)
		}
		off := uint64(i * c.Chain * DescSize)
		desc, err := c.Desc.Slice(off, uint64(c.Chain*DescSize))
		if err != nil {
			return nil, fmt.Errorf("fsl: channel %d: %w", n, err)
		}
		ch := &channel{c: &c, n: n, regs: regs, desc: desc, bus: c.DescBus + off}
		if err := ch.init(); err != nil {
			return nil, err
		}
		chans = append(chans, ch)
	}
	return engine.NewCore(engine.CoreConfig{Name: "fsl " + c.Chip.String(), Channels: chans, Map: c.Map, MaxLen: MaxCount, Chain: c.Chain, Waiter: c.Waiter,
		OnClose: func() error {
			for _, ch := range chans {
				ch.(*channel).store(regMR, 0)
			}
			return nil
		}})
}

type channel struct {
	c    *Config
	n    int
	regs mmio.Mem
	desc mmio.Mem
	bus  uint64 // of desc
	mode uint32
}

func (ch *channel) load(reg uint64) uint32 {
	v := ch.regs.Load32(reg)
	if ch.c.Chip == MPC85xx {
		return bits.ReverseBytes32(v)
	}
	return v
}

func (ch *channel) store(reg uint64, v uint32) {
	if ch.c.Chip == MPC85xx {
		v = bits.ReverseBytes32(v)
	}
	ch.regs.Store32(reg, v)
}

// storeAddr writes an address register, on 85xx with what belongs above it.
func (ch *channel) storeAddr(reg uint64, a uint64) {
	if ch.c.Chip == MPC85xx {
		ch.store(reg, uint32(a>>32))
		ch.store(reg+4, uint32(a))
		return
	}
	ch.store(reg, uint32(a))
}

// word returns a descriptor's 64 bits as they stand in memory.
func (ch *channel) word(v uint64) uint64 {
	if ch.c.Chip == MPC85xx {
		return bits.ReverseBytes64(v)
	}
	return v
}

func (ch *channel) init() error {
	if sr := ch.load(regSR); sr == ^uint32(0) {
		return fmt.Errorf("fsl: channel %d: its registers read as all ones: the board does not answer", ch.n)
	}
	if err := ch.Stop(); err != nil {
		return err
	}
	if ch.c.Chip == MPC85xx {
		ch.mode = mrBWC
		if ch.c.Waiter != nil {
			ch.mode |= mrEIE | mrEOLNIE | mrEOSIE
		}
	} else {
		ch.mode = mrPRCRM | mrDMSEN
		if ch.c.Waiter != nil {
			ch.mode |= mrEOTIE
			if ch.c.ToHost {
				ch.mode |= mrIRQS
			}
		}
	}
	ch.store(regMR, ch.mode)
	return nil
}

// Flows implements engine.Channel.
func (ch *channel) Flows() engine.Flow { return engine.AnyFlow }

// attr is what 85xx wants above an address.
func (ch *channel) attr() uint64 {
	if ch.c.Chip == MPC85xx {
		return attrSnoop << 32
	}
	return 0
}

// Start implements engine.Channel. CS is clear: State, Stop and init see to it.
func (ch *channel) Start(items []engine.Item) error {
	attr := ch.attr()
	if len(items) == 1 {
		// Direct mode: no descriptors to write, nor to be fetched.
		it := &items[0]
		ch.storeAddr(regDAR, attr|it.Dst)
		ch.storeAddr(regSAR, attr|it.Src)
		ch.store(regBCR, it.Len)
		ch.store(regMR, ch.mode|mrCTM)
		ch.regs.Barrier(mmio.WriteBarrier)
		ch.store(regMR, ch.mode|mrCTM|mrCS)
		return nil
	}
	snoop := uint64(0)
	if ch.c.Chip == MPC83xx {
		snoop = descSnoop
	}
	for i := range items {
		at, next := uint64(i)*DescSize, (ch.bus+uint64(i+1)*DescSize)|snoop
		if i == len(items)-1 {
			next = descEOL | snoop
		}
		ch.desc.Store64(at, ch.word(attr|items[i].Src))
		ch.desc.Store64(at+8, ch.word(attr|items[i].Dst))
		ch.desc.Store64(at+16, ch.word(next))
		n := uint64(items[i].Len)
		if ch.c.Chip == MPC85xx {
			n <<= 32 // the count stands first
		}
		ch.desc.Store64(at+24, ch.word(n))
	}
	// Registers and memory are different targets on the board: what was posted to one may pass what was posted
	// to the other there. The answer to a read comes behind the writes.
	ch.desc.Barrier(mmio.WriteBarrier)
	if ch.desc.Kind() != mmio.Cached || ch.desc.Modelled() {
		ch.desc.Load64(uint64(len(items)-1)*DescSize + 24)
	}
	ch.desc.Barrier(mmio.FullBarrier)
	ch.store(regMR, ch.mode)
	ch.storeAddr(regCDAR, ch.bus|snoop)
	ch.regs.Barrier(mmio.WriteBarrier)
	ch.store(regMR, ch.mode|mrCS)
	return nil
}

// State implements engine.Channel. A function that is gone reads as all ones: busy, until the time-out.
func (ch *channel) State() (engine.State, uint64) {
	sr := ch.load(regSR)
	if sr == ^uint32(0) || sr&srCB != 0 && sr&(srTE|srPE) == 0 {
		return engine.Running, 0
	}
	if sr&(srTE|srPE) != 0 {
		if ch.Stop() != nil {
			return engine.Running, 0
		}
		return engine.Failed, uint64(sr)
	}
	ch.regs.Barrier(mmio.ReadBarrier)
	ch.idle(sr)
	return engine.Ended, 0
}

// idle clears CS and what is left in the status register.
func (ch *channel) idle(sr uint32) {
	ch.store(regMR, ch.mode)
	if sr&srClear != 0 {
		ch.store(regSR, sr&srClear)
	}
}

// Stop implements engine.Channel: CS from 1 to 0 halts at the next burst; 85xx aborts.
func (ch *channel) Stop() error {
	if ch.c.Chip == MPC85xx {
		ch.store(regMR, ch.mode|mrCA)
	}
	ch.store(regMR, ch.mode)
	for end := time.Now().Add(ch.c.StopTime); ; {
		sr := ch.load(regSR)
		if sr != ^uint32(0) && (sr&srCB == 0 || ch.c.Chip == MPC85xx && sr&srCH != 0) {
			ch.idle(sr)
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("fsl: channel %d stays busy, status %#x: %w", ch.n, sr, dma.ErrRunaway)
		}
		time.Sleep(50 * time.Microsecond)
	}
}
