package generic

import (
	"fmt"

	"github.com/boardlink/boardlink/mmio"
)

// Config describes a kind of board. The tags are those of the TOML file; docs/boards.md explains each key with
// an example. The host's program uses Host, the agent's Agent: one file serves both ends, and makes sure
// that they agree.
type Config struct {
	// Name is for messages.
	Name string `toml:"name"`
	// Vendor and Device, where not 0, are what the PCI function must have.
	Vendor uint16 `toml:"vendor"`
	Device uint16 `toml:"device"`
	Host   *Host  `toml:"host"`
	Agent  *Agent `toml:"agent"`
}

// Host is how the carrier reaches the board, and is rung by it.
type Host struct {
	Window Window `toml:"window"`
	// Ring rings the board; nil: the board polls.
	Ring *Ring `toml:"ring"`
	// Interrupt is how the board rings the carrier; nil: the carrier polls.
	Interrupt *Interrupt `toml:"interrupt"`
	// Pool is memory of the carrier that the board may write and read; nil: none.
	Pool *Pool `toml:"pool"`
	// Engine is the board's DMA controller, as far as the carrier drives it; nil: none.
	Engine *Engine `toml:"engine"`
}

// Agent is how the board reaches its own memory and registers.
type Agent struct {
	Window    Window     `toml:"window"`
	Ring      *Ring      `toml:"ring"`      // rings the carrier
	Interrupt *Interrupt `toml:"interrupt"` // how the carrier rings the board
	Pool      *Pool      `toml:"pool"`
}

// Place is where memory or a register is: at the host in a BAR, at the agent in a file that can be mapped.
type Place struct {
	BAR    int    `toml:"bar"`    // host
	Path   string `toml:"path"`   // agent: /dev/mem (the default) or /dev/uioN
	Map    int    `toml:"map"`    // agent: number of the UIO map
	Offset uint64 `toml:"offset"` // in the BAR, the map; with /dev/mem the physical address
}

// Window is the memory that both sides see.
type Window struct {
	Place
	// Size in bytes; 0: at the host, the rest of the BAR.
	Size uint64 `toml:"size"`
	// BusAddress is what descriptors call its first byte: the board's own address of it, as a rule. The agent's counts, and
	// is its physical address if 0.
	BusAddress uint64 `toml:"bus_address"`
	// Memory is "uncached" (default), "write-combining", at the agent also "cached".
	Memory string `toml:"memory"`
	// MinAccess and MaxAccess are the widths, in bits, of accesses that the memory takes: 8, 16, 32 and 64; 0: 8 and
	// 64. MaxAccess is at least 16, see docs/boards.md.
	MinAccess uint `toml:"min_access"`
	MaxAccess uint `toml:"max_access"`
}

// Register is a register.
type Register struct {
	Place
	Width     uint `toml:"width"` // bits: 8, 16 or 32 (0)
	BigEndian bool `toml:"big_endian"`
}

// Ring is a doorbell register of the other side.
type Ring struct {
	Register
	// Vectors is how many different rings there are; 0 is 1.
	Vectors uint32 `toml:"vectors"`
	// Write is what is written for vector v: "bit" (1 << (Value+v)), "number" (Value+v) or "value" (Value, the
	// default). A register in which ones set bits takes "bit".
	Write string `toml:"write"`
	Value uint32 `toml:"value"`
	// Stride is the distance in bytes between the registers of successive vectors; 0: one register.
	Stride uint64 `toml:"stride"`
}

// Interrupt is how this side is rung.
type Interrupt struct {
	// Kind is, at the host, "msix", "msi", "intx" or "any" (the default: the best there is). At the agent it
	// is left out.
	Kind string `toml:"kind"`
	// Path is, at the agent, the UIO device whose interrupt it is.
	Path string `toml:"path"`
	// Vectors is how many are used; 0: all that there are, 64 at most, or with Cause the doorbells in it.
	Vectors uint32 `toml:"vectors"`
	// Cause is the register that tells what a level interrupt is for, and lowers it.
	Cause *Cause `toml:"cause"`
}

// Cause is a register in which each bit is a doorbell.
type Cause struct {
	Register
	// Mask are the bits that are doorbells of ours, without gaps: the lowest is vector 0.
	Mask uint32 `toml:"mask"`
	// Clear is how bits are cleared: "ones" (write ones to them; the default), "zeros", "read" (reading does).
	Clear string `toml:"clear"`
	// ClearOffset is where they are cleared, in the same BAR or map; 0 is the register itself.
	ClearOffset uint64 `toml:"clear_offset"`
	// Enable, where given, lets the interrupts through, and keeps them off at the end.
	Enable *Enable `toml:"enable"`
}

// Enable is a register in which bits enable or mask the interrupts.
type Enable struct {
	Register
	// Bits are set to let interrupts through or, with MasksWhenSet, cleared.
	Bits         uint32 `toml:"bits"`
	MasksWhenSet bool   `toml:"masks_when_set"`
}

// Pool is memory of the host that the board reaches by mastering the bus.
type Pool struct {
	// Size in bytes, a multiple of 64 KiB.
	Size uint64 `toml:"size"`
	// BusOffset, at the host, is what the board adds to addresses on the PCI bus: where its outbound window
	// lies. The board's address of the pool is the bus address plus this.
	BusOffset uint64 `toml:"bus_offset"`
	// HighestAddress, at the host, is the highest PCI bus address that the board can reach; 0: any.
	HighestAddress uint64 `toml:"highest_address"`
	// Place, at the agent, is where the outbound window to the host's memory is; BusAddress the board's
	// address of its first byte, what the host declares lies within Size from there.
	Place
	BusAddress uint64 `toml:"bus_address"`
}

// Engine is a DMA controller whose registers the carrier reaches in a BAR.
type Engine struct {
	Place // of its registers; at the host
	// Kind is "fsl83xx", "fsl85xx", "dw-edma" or "dw-hdma".
	Kind string `toml:"kind"`
	// ToHost and ToBoard are the channels for each direction, from 0 on; nobody else may use them. Of the fsl kinds a
	// channel may stand in both. DesignWare's to_host are its write channels, to_board its read channels.
	ToHost  []int `toml:"to_host"`
	ToBoard []int `toml:"to_board"`
	// WindowAddress is the board's own address of the window's first byte; 0: Window.BusAddress, which has to be given then.
	WindowAddress uint64 `toml:"window_address"`
	// BusOffset is what the board's outbound window adds to addresses on the PCI bus; HighestAddress the highest PCI bus address
	// that it leads to, 0: any.
	BusOffset      uint64 `toml:"bus_offset"`
	HighestAddress uint64 `toml:"highest_address"`
	// Descriptors is memory of the board for the controller's descriptors; nil: they lie in the carrier's memory, which the fsl kinds can.
	Descriptors *Descriptors `toml:"descriptors"`
}

// Descriptors is memory of the board in a BAR, outside of the window.
type Descriptors struct {
	Place
	Size       uint64 `toml:"size"`        // 512 bytes for each channel
	BusAddress uint64 `toml:"bus_address"` // the board's own address of its first byte, a multiple of 64
}

// ConfigError is an invalid key of a Config.
type ConfigError struct {
	Key    string // "host.window.size"
	Reason string
}

// bus is the board's address of the window.
func (w *Window) bus() uint64 {
	if w.BusAddress != 0 {
		return w.BusAddress
	}
	return w.Offset
}

func (w *Window) kind(host bool) (mmio.Kind, error) {
	switch w.Memory {
	case "", "uncached":
		return mmio.Uncached, nil
	case "write-combining":
		return mmio.WriteCombining, nil
	case "cached":
		if host {
			return 0, fmt.Errorf("cached: a BAR is device memory; uncached or write-combining")
		}
		return mmio.Cached, nil
	}
	return 0, fmt.Errorf("%q: uncached, write-combining or (agent) cached is wanted", w.Memory)
}
