package pci

import (
	"encoding/binary"
	"fmt"
)

// Sizes of configuration space, in bytes: the header, PCI's, PCI Express'.
const (
	configHeader = 64
	configSmall  = 256
	configLarge  = 4096
)

// Registers of the header (PCI Local Bus Specification 3.0, 6.1), for ReadConfig and WriteConfig.
const (
	RegVendor     = 0x00 // 16 bits
	RegDevice     = 0x02 // 16 bits
	RegCommand    = 0x04 // 16 bits, Command*
	RegStatus     = 0x06 // 16 bits
	RegRevision   = 0x08 // 8 bits, with the class in the 24 above
	RegHeaderType = 0x0e // 8 bits
	RegBAR0       = 0x10 // 32 bits each
	RegCapability = 0x34 // 8 bits: offset of the first capability
)

// Bits of the command register.
const (
	CommandIO          = 1 << 0
	CommandMemory      = 1 << 1
	CommandBusMaster   = 1 << 2
	CommandINTxDisable = 1 << 10
)

const statusCapList = 1 << 4

// Identities of capabilities (Linux, include/uapi/linux/pci_regs.h; PCI Code and ID Assignment
// Specification).
const (
	CapMSI    = 0x05
	CapVendor = 0x09
	CapPCIe   = 0x10
	CapMSIX   = 0x11

	ExtCapVendor = 0x000b // vendor-specific extended capability (VSEC)
)

// Capability is one entry of the lists.
type Capability struct {
	ID       uint16
	Extended bool // in the list that starts at offset 0x100
	Version  uint8
	Offset   int // in configuration space
	// Length in bytes, where the entry says so: vendor-specific ones; else 0.
	Length int
}

// MSICap is the MSI capability.
type MSICap struct {
	Offset  int
	Vectors int // 1 to 32
	Bits64  bool
	Masks   bool // each vector can be masked
}

// MSIXCap is the MSI-X capability.
type MSIXCap struct {
	Offset      int
	Vectors     int    // 1 to 2048
	TableBAR    int    // BAR that holds the table, 16 bytes a vector
	TableOffset uint32 // in that BAR
	PBABAR      int    // BAR that holds the pending bits
	PBAOffset   uint32
}

// PCIeCap is the PCI Express capability. Speeds are in units of 100 MT/s a lane (25: 2.5 GT/s), 0 where
// the code is not known.
type PCIeCap struct {
	Offset     int
	Type       uint8 // device/port type: 0 endpoint, 1 legacy endpoint, 9 root complex integrated endpoint
	Speed      int   // of the link as it runs
	Width      int   // lanes in use
	MaxSpeed   int
	MaxWidth   int
	MaxPayload int // bytes in a packet, as set
	CanPayload int // bytes in a packet, as supported
	MaxRead    int // bytes of a read request, as set
	FLR        bool
}

// Capabilities are what the capability lists hold.
type Capabilities struct {
	Caps []Capability // all, in the lists' order
	MSI  *MSICap      // nil where there is none
	MSIX *MSIXCap
	PCIe *PCIeCap
}

// linkSpeeds are the codes of the Link Capabilities register (PCI Express Base Specification 5.0,
// 7.5.3.6), in units of 100 MT/s.
var linkSpeeds = [...]int{0, 25, 50, 80, 160, 320, 640}

func linkSpeed(code uint32) int {
	if int(code) < len(linkSpeeds) {
		return linkSpeeds[code]
	}
	return 0
}

// ParseCapabilities walks both capability lists of a configuration space. A list that leaves the
// space, loops, or whose entries are cut off ends there with an error; what was found before is returned
// with it. A space that shorter than 256 bytes has no capabilities to see.
func ParseCapabilities(config []byte) (Capabilities, error) {
	var c Capabilities
	if len(config) < configSmall {
		return c, nil
	}
	config = config[:len(config)&^3]
	if allOnes(config) {
		return c, nil
	}
	if err := c.walk(config[:configSmall]); err != nil {
		return c, err
	}
	if len(config) >= configLarge && c.PCIe != nil {
		return c, c.walkExtended(config)
	}
	return c, nil
}

// allOnes tells that nobody answered.
func allOnes(config []byte) bool {
	return binary.LittleEndian.Uint32(config) == 0xffffffff
}

func (c *Capabilities) walk(b []byte) error {
	le := binary.LittleEndian
	if le.Uint16(b[RegStatus:])&statusCapList == 0 {
		return nil
	}
	off := int(b[RegCapability]) &^ 3
	if b[RegHeaderType]&0x7f == 2 { // CardBus
		off = int(b[0x14]) &^ 3
	}
	var seen [configSmall / 4]bool
	for off != 0 {
		if off < configHeader {
			return fmt.Errorf("pci: capability list points to %#x inside the header", off)
		}
		if seen[off/4] {
			return fmt.Errorf("pci: capability list loops at %#x", off)
		}
		seen[off/4] = true
		id := b[off]
		if id == 0xff {
			return fmt.Errorf("pci: capability at %#x reads as all-ones", off)
		}
		e := Capability{ID: uint16(id), Offset: off}
		need := 2
		switch id {
		case CapMSI:
			need = 10
		case CapMSIX:
			need = 12
		case CapPCIe:
			need = 20
		case CapVendor:
			need = 3
		}
		if off+need > len(b) {
			return fmt.Errorf("pci: capability %#02x at %#x is cut off", id, off)
		}
		p := b[off:]
		switch id {
		case CapVendor:
			e.Length = int(p[2])
			if e.Length < 3 || off+e.Length > len(b) {
				e.Length = 0 // nonsense: not to be relied on
			}
		case CapMSI:
			ctl := le.Uint16(p[2:])
			n := uint(ctl >> 1 & 7)
			if n > 5 {
				n = 5
			}
			if c.MSI == nil {
				c.MSI = &MSICap{Offset: off, Vectors: 1 << n, Bits64: ctl&0x80 != 0, Masks: ctl&0x100 != 0}
			}
		case CapMSIX:
			t, q := le.Uint32(p[4:]), le.Uint32(p[8:])
			if c.MSIX == nil {
				c.MSIX = &MSIXCap{
					Offset: off, Vectors: int(le.Uint16(p[2:])&0x7ff) + 1,
					TableBAR: int(t & 7), TableOffset: t &^ 7, PBABAR: int(q & 7), PBAOffset: q &^ 7,
				}
			}
		case CapPCIe:
			fl, dcap, dctl := le.Uint16(p[2:]), le.Uint32(p[4:]), le.Uint16(p[8:])
			lcap, lsta := le.Uint32(p[12:]), uint32(le.Uint16(p[18:]))
			if c.PCIe == nil {
				x := &PCIeCap{Offset: off, Type: uint8(fl >> 4 & 0xf), FLR: dcap&(1<<28) != 0}
				x.CanPayload = packetSize(dcap & 7)
				x.MaxPayload = packetSize(uint32(dctl) >> 5 & 7)
				x.MaxRead = packetSize(uint32(dctl) >> 12 & 7)
				x.MaxSpeed, x.MaxWidth = linkSpeed(lcap&0xf), int(lcap>>4&0x3f)
				x.Speed, x.Width = linkSpeed(lsta&0xf), int(lsta>>4&0x3f)
				c.PCIe = x
			}
		}
		c.Caps = append(c.Caps, e)
		off = int(b[off+1]) &^ 3
	}
	return nil
}

// packetSize decodes a payload or read request size: 128 bytes shifted; codes above 4096 are
// reserved.
func packetSize(code uint32) int {
	if code > 5 {
		return 0
	}
	return 128 << code
}

func (c *Capabilities) walkExtended(b []byte) error {
	le := binary.LittleEndian
	var seen [configLarge / 4]bool
	for off := configSmall; off != 0; {
		if off < configSmall || off+4 > configLarge {
			return fmt.Errorf("pci: extended capability list points to %#x", off)
		}
		if seen[off/4] {
			return fmt.Errorf("pci: extended capability list loops at %#x", off)
		}
		seen[off/4] = true
		h := le.Uint32(b[off:])
		if h == 0 {
			return nil // an empty list
		}
		if h == 0xffffffff {
			return fmt.Errorf("pci: extended capability at %#x reads as all-ones", off)
		}
		e := Capability{ID: uint16(h), Extended: true, Version: uint8(h >> 16 & 0xf), Offset: off}
		if e.ID == ExtCapVendor && off+8 <= configLarge {
			if n := int(le.Uint32(b[off+4:]) >> 20); n >= 8 && off+n <= configLarge {
				e.Length = n
			}
		}
		if e.ID != 0 { // 0 is an entry that was hidden
			c.Caps = append(c.Caps, e)
		}
		off = int(h>>20) &^ 3
	}
	return nil
}
