package pci

import (
	"encoding/binary"
	"fmt"
	"strconv"
	"strings"
)

// Info is what sysfs tells about a function. It is a snapshot.
type Info struct {
	Address   Address
	Vendor    uint16
	Device    uint16
	SubVendor uint16
	SubDevice uint16
	Class     uint32 // 24 bits: class, subclass, programming interface
	Revision  uint8

	Driver   string // that it is bound to; "" for none
	Override string // driver_override; "" for none
	Enabled  bool   // the kernel has enabled the function (memory and I/O decoding)
	NUMANode int    // -1 where the machine does not tell

	IOMMUGroup string // number of its group; "" where it is in none
	// NoIOMMUGroup tells that the group is vfio's substitute for one: nothing confines the function.
	NoIOMMUGroup bool
	// GroupMembers are the other functions of the IOMMU group: they share its address space.
	GroupMembers []Address

	BARs []BAR // those that exist, by index; the expansion ROM is left out

	// Config is the configuration space as far as this process may read it: 64 bytes without
	// privilege, else 256 or 4096.
	Config []byte
	Capabilities
}

// CapsKnown tells whether Config reaches far enough for the capabilities.
func (i *Info) CapsKnown() bool { return len(i.Config) >= configSmall }

// String returns "0000:00:04.0 [1af4:1110]".
func (i *Info) String() string {
	return fmt.Sprintf("%s [%04x:%04x]", i.Address, i.Vendor, i.Device)
}

// BAR returns the BAR of that index, and false where the function has none.
func (i *Info) BAR(index int) (BAR, bool) {
	for _, b := range i.BARs {
		if b.Index == index {
			return b, true
		}
	}
	return BAR{}, false
}

// Usable returns BAR n where it exists and has an address. The error is an *Error with Problem NoBAR.
func (i *Info) Usable(n int) (BAR, error) {
	fail := func(mend, format string, args ...interface{}) (BAR, error) {
		return BAR{}, &Error{Problem: NoBAR, Spec: i.Address.String(), Reason: fmt.Sprintf(format, args...), Mend: mend}
	}
	if n < 0 || n >= NumBARs {
		return fail("", "there can be no BAR %d", n)
	}
	b, ok := i.BAR(n)
	if !ok {
		return fail("", "has no BAR %d", n)
	}
	if b.Unassigned {
		return fail("remove the function and rescan the bus, or boot with pci=realloc, or allow large BARs (\"above 4G decoding\") in the firmware",
			"its BAR %d (%s) was given no address: the machine found no room for it", n, b)
	}
	return b, nil
}

// NumBARs is how many base address registers a function has; a 64-bit BAR takes two.
const NumBARs = 6

// BAR is a base address register's range. Start is the address on the processor's bus.
type BAR struct {
	Index    int
	Start    uint64
	Size     uint64 // 0 where the kernel does not know it (see Unassigned)
	IO       bool   // I/O ports, not memory
	Bits64   bool
	Prefetch bool
	// Unassigned tells that the function asks for the range and has no address: the firmware and the
	// kernel found no room. It cannot be mapped.
	Unassigned bool
}

// String returns "BAR2 memory 0xfe000000, 4 MiB, 64 bit, prefetchable".
func (b BAR) String() string {
	s := fmt.Sprintf("BAR%d ", b.Index)
	if b.IO {
		s += "I/O ports"
	} else {
		s += "memory"
	}
	if b.Unassigned {
		s += " (no address)"
	} else {
		s += fmt.Sprintf(" %#x", b.Start)
	}
	s += ", " + sizeString(b.Size)
	if b.Bits64 {
		s += ", 64 bit"
	}
	if b.Prefetch {
		s += ", prefetchable"
	}
	return s
}

func sizeString(n uint64) string {
	for _, u := range []struct {
		shift uint
		name  string
	}{{40, "TiB"}, {30, "GiB"}, {20, "MiB"}, {10, "KiB"}} {
		if n != 0 && n&(1<<u.shift-1) == 0 {
			return fmt.Sprintf("%d %s", n>>u.shift, u.name)
		}
	}
	return fmt.Sprintf("%d bytes", n)
}

// Flags of a line of the sysfs file "resource" (Linux, include/linux/ioport.h, IORESOURCE_*).
const (
	resIO       = 0x100
	resMem      = 0x200
	resPrefetch = 0x2000
	res64       = 0x100000
	resDisabled = 0x10000000
	resUnset    = 0x20000000
)

// Bits of a base address register (PCI Local Bus Specification 3.0, 6.2.5.1).
const (
	barIO       = 0x1
	barType     = 0x6
	bar64       = 0x4
	barPrefetch = 0x8
)

// ParseResource reads the sysfs file "resource": one line of start, end (inclusive) and flags for each
// resource, in hexadecimal. config, which may be short or nil, shows BARs that the kernel
// gave up altogether. Addresses have 64 bits on every machine.
func ParseResource(resource string, config []byte) ([]BAR, error) {
	var bars []BAR
	lines := strings.Split(strings.TrimRight(resource, "\n"), "\n")
	upper := false // the last BAR took this register for its high half
	for i := 0; i < NumBARs; i++ {
		if i >= len(lines) || lines[i] == "" {
			break // bridges and old kernels have fewer
		}
		f := strings.Fields(lines[i])
		if len(f) != 3 {
			return nil, fmt.Errorf("resource %d: %q is not start, end and flags", i, lines[i])
		}
		var v [3]uint64
		for j := range v {
			var err error
			if v[j], err = strconv.ParseUint(f[j], 0, 64); err != nil {
				return nil, fmt.Errorf("resource %d: %q is not start, end and flags: %w", i, lines[i], err)
			}
		}
		start, end, flags := v[0], v[1], v[2]
		b := BAR{
			Index: i, Start: start,
			IO: flags&resIO != 0, Bits64: flags&res64 != 0, Prefetch: flags&resPrefetch != 0,
		}
		if flags&(resIO|resMem) == 0 {
			b = BAR{Index: i}
			// The kernel knows none, or dropped it. What the register's type bits
			// say is left of it.
			if !upper && barHint(config, i, &b) {
				bars = append(bars, b)
			}
			upper = b.Bits64 && !upper
			continue
		}
		upper = b.Bits64
		if end < start || (end == start && start == 0) {
			if end < start && end+1 != start {
				return nil, fmt.Errorf("resource %d: it ends at %#x before its start %#x", i, end, start)
			}
			b.Unassigned, b.Start = true, 0
		} else if b.Size = end - start + 1; b.Size == 0 {
			return nil, fmt.Errorf("resource %d: %#x to %#x is the whole address space", i, start, end)
		}
		if flags&(resUnset|resDisabled) != 0 || start == 0 {
			b.Unassigned, b.Start = true, 0
		}
		bars = append(bars, b)
	}
	return bars, nil
}

// barHint recognises a BAR by the read-only type bits of its register. A plain 32-bit memory BAR has
// none and stays unseen.
func barHint(config []byte, i int, b *BAR) bool {
	if len(config) < 0x28 || config[0x0e]&0x7f != 0 {
		return false
	}
	r := binary.LittleEndian.Uint32(config[0x10+4*i:])
	if r&(barIO|barType|barPrefetch) == 0 || r == 0xffffffff {
		return false
	}
	b.Unassigned, b.Start = true, 0
	if r&barIO != 0 {
		b.IO = true
		return true
	}
	b.Bits64 = r&barType == bar64
	b.Prefetch = r&barPrefetch != 0
	return true
}
