package mpc83xx

import "github.com/boardlink/boardlink/dma/engine/fsl"

// Registers, as offsets from the start of the internal memory map (IMMR). Sources: U-Boot,
// arch/powerpc/include/asm/immap_83xx.h (offsets) and include/mpc83xx.h (window bits); MPC8240 User's Manual,
// chapter 9, whose messaging unit has the same registers at the same offsets from 0x50 to 0x68 (what they do).
// The MPC8349 manual was not at hand, and no silicon was seen: what is marked "unverified" below stands in this one
// place only.
const (
	// MU is the messaging unit. Its registers are little-endian, also for the core.
	MU     = 0x8000
	MUSize = 0x100

	OMISR = 0x30 // from MU: outbound message interrupt status; PCI side only
	OMIMR = 0x34 // outbound message interrupt mask, 1: masked; PCI side only
	ODR   = 0x60 // outbound doorbells: the core sets by ones, PCI clears by ones
	IDR   = 0x68 // inbound doorbells: PCI sets by ones, the core clears by ones
	IMISR = 0x80 // inbound message interrupt status; core side
	IMIMR = 0x84 // inbound message interrupt mask, 1: masked; core side
)

const (
	// OutboundBits is how many outbound doorbells are used: bits 0 to 28, as on the MPC8240. Ira Snyder
	// wrote of 30 on the MPC8349: unverified, 29 is safe.
	OutboundBits = 29
	// InboundBits is how many inbound doorbells are used: bits 0 to 30. Bit 31 is a machine check on
	// the MPC8240.
	InboundBits = 31

	// ODI is the bit of OMISR and OMIMR that stands for the outbound doorbells: unverified, by analogy with
	// the inbound one.
	ODI = 1 << 3
	// IDI is the bit of IMISR and IMIMR that stands for the inbound doorbells. Not in any manual that was
	// read; a published driver for an MPC8343E card (PowerPC boards for the Amiga) uses it.
	IDI = 1 << 3
)

// Inbound windows: the registers of the first PCI controller, big-endian as the rest of the IMMR (unverified across
// PCI; the same Amiga driver writes them so).
const (
	PCI1 = 0x8500

	PITAR0 = PCI1 + 0x68 // local address >> 12 where the window of BAR 1 leads to
	PIBAR0 = PCI1 + 0x70 // PCI address >> 12, the same as BAR 1
	PIWAR0 = PCI1 + 0x78 // attributes

	PIWAREnable   = 0x80000000
	PIWARPrefetch = 0x20000000
	PIWARReadSnp  = 0x00050000 // reads snoop the core's caches
	PIWARWriteSnp = 0x00005000 // writes do
	PIWARSizeMask = 0x0000003f // log2(size) - 1: 0x0b is 4 KiB

	pitarMask = 0x000fffff
)

// BARs of the function (unverified, save by the same driver: BAR 0 the IMMR, BAR 1 the window of PITAR0).
const (
	BARRegs   = 0
	BARWindow = 1
)

// Vendor is Freescale's vendor id. Device ids are not checked: boards have their own.
const Vendor = 0x1957

// Outbound windows of the sequencer: how the board's bus masters, its DMA engine among them, reach PCI. Big-endian, as the inbound
// windows. Offsets and bits: U-Boot, immap_83xx.h (ios83xx) and mpc83xx.h; a driver for an MPC8343E card has the same.
const (
	POT     = 0x8400 // of window 0
	POTSize = 0x18   // from one window to the next
	POTs    = 6

	POTAR = 0x00 // PCI address >> 12
	POBAR = 0x08 // local address >> 12
	POCMR = 0x10 // attributes, and the bits of a local address >> 12 that are compared

	POCMREnable = 0x80000000
	POCMRIO     = 0x40000000 // I/O space
	POCMRDst    = 0x10000000 // the second PCI controller
	POCMRMask   = 0x000fffff
)

// DMA is the first channel of the DMA engine, DMAChannels how many there are (package dma/engine/fsl).
const (
	DMA         = fsl.Base83xx
	DMAChannels = fsl.MaxChannels
	DMASize     = DMAChannels * fsl.ChannelSize
)
