// Package edu drives the DMA engine of QEMU's educational device (1234:11e8, QEMU docs/specs/edu.rst and
// hw/misc/edu.c): real registers, real DMA through an emulated IOMMU, a real interrupt. A transfer takes 100 ms, so it is for functional tests only.
//
// In the room: its registers. Never in it: how BAR 0 was mapped.
package edu

import (
	"fmt"
	"time"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/dma/engine"
	"github.com/boardlink/boardlink/mmio"
)

const (
	// BufferBus is the address of the device's buffer, as its registers take it.
	BufferBus = 0x40000
	// BufferSize is the size of the buffer in bytes.
	BufferSize = 4096
	// MaxLen is the largest transfer: QEMU 7.2 dies at one of 4096 bytes, by an off-by-one check of the range.
	MaxLen = 4088
	// Mask is the highest bus address of memory that the device reaches: it cuts the bits above.
	Mask = 1<<28 - 1
	// RegsSize is how much of BAR 0 is needed, in bytes.
	RegsSize = 0xa0
)

const (
	regID        = 0x00
	regIRQStatus = 0x24
	regIRQAck    = 0x64
	regSrc       = 0x80
	regDst       = 0x88
	regCount     = 0x90
	regCommand   = 0x98

	cmdRun    = 1 << 0
	cmdToHost = 1 << 1 // from the buffer to memory
	cmdIRQ    = 1 << 2
	irqDMA    = 0x100

	idMask, id = 0xffff, 0x00ed // the rest is the version
)

// Config describes the device.
type Config struct {
	Regs mmio.Mem // BAR 0, RegsSize bytes at least
	// Host are the windows of memory that is mapped for the device, as Far; nothing else is ever programmed.
	Host []engine.Window
	// Buffer is the link address that stands for the device's buffer.
	Buffer dma.Addr
	// Waiter is the device's interrupt; nil polls.
	Waiter dma.EngineWaiter
	// Unchecked lets addresses through that lie in no window. It is for a test that shows what the IOMMU
	// does then.
	Unchecked bool
}

// New returns an engine of one channel, which moves at most MaxLen bytes between memory and the buffer.
func New(c Config) (dma.Engine, error) {
	if _, err := c.Regs.Slice(0, RegsSize); err != nil {
		return nil, fmt.Errorf("edu: %w", err)
	}
	if v := c.Regs.Load32(regID); v&idMask != id {
		return nil, fmt.Errorf("edu: identification %#08x: this is not an edu device", v)
	}
	for _, w := range c.Host {
		if w.Side != engine.Far {
			return nil, fmt.Errorf("edu: window %q is not across the bus", w.Name)
		}
	}
	buffer := engine.Window{Name: "edu buffer", Link: c.Buffer, Size: BufferSize, Bus: BufferBus, Side: engine.Near, Access: dma.DeviceRead | dma.DeviceWrite}
	m, err := engine.NewMap(Mask, append([]engine.Window{buffer}, c.Host...)...)
	if err != nil {
		return nil, err
	}
	ch := &channel{regs: c.Regs}
	if c.Waiter != nil {
		ch.irq = cmdIRQ
	}
	if err := ch.Stop(); err != nil {
		return nil, err
	}
	return engine.NewCore(engine.CoreConfig{Name: "edu", Channels: []engine.Channel{ch}, Map: m, MaxLen: MaxLen, Chain: 1, Depth: 8,
		Waiter: c.Waiter, Unchecked: c.Unchecked})
}

type channel struct {
	regs mmio.Mem
	irq  uint64
}

// Flows implements engine.Channel.
func (ch *channel) Flows() engine.Flow { return engine.NearToFar | engine.FarToNear }

// Start implements engine.Channel.
func (ch *channel) Start(items []engine.Item) error {
	it := &items[0]
	cmd := cmdRun | ch.irq
	if it.Flow == engine.NearToFar {
		cmd |= cmdToHost
	}
	ch.regs.Store64(regSrc, it.Src)
	ch.regs.Store64(regDst, it.Dst)
	ch.regs.Store64(regCount, uint64(it.Len))
	ch.regs.Barrier(mmio.WriteBarrier)
	ch.regs.Store64(regCommand, cmd)
	return nil
}

// State implements engine.Channel. The device knows no errors.
func (ch *channel) State() (engine.State, uint64) {
	v := ch.regs.Load64(regCommand)
	if v&cmdRun != 0 { // all ones, too
		return engine.Running, 0
	}
	ch.regs.Barrier(mmio.ReadBarrier)
	ch.clear()
	return engine.Ended, 0
}

func (ch *channel) clear() {
	if v := ch.regs.Load32(regIRQStatus); v&irqDMA != 0 {
		ch.regs.Store32(regIRQAck, irqDMA)
	}
}

// Stop implements engine.Channel: there is no way but to wait until the transfer has ended.
func (ch *channel) Stop() error {
	for end := time.Now().Add(time.Second); ; {
		if ch.regs.Load64(regCommand)&cmdRun == 0 {
			ch.clear()
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("edu: the transfer does not end: %w", dma.ErrRunaway)
		}
		time.Sleep(time.Millisecond)
	}
}
