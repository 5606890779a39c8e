package vring

// Alignments of the areas in bytes (virtio 1.2, 2.7). The specification asks for 2 only
// for the driver area; 4 makes its flags and index one aligned 32-bit word, and the
// driver side insists on it.
const (
	SplitDescAlign   = 16
	SplitDriverAlign = 4
	SplitDeviceAlign = 4
)

// Descriptor flags (virtio 1.2, 2.7.5).
const (
	descNext     = 1 // the chain goes on at next
	descWrite    = 2 // the device may write the buffer, else read it
	descIndirect = 4 // the buffer is a table of descriptors

	descSize = 16 // le64 addr, le32 len, le16 flags, le16 next
)

// The flag of the available ring (2.7.6) and that of the used ring (2.7.8).
const (
	availNoInterrupt = 1
	usedNoNotify     = 1
)

// Both rings start with le16 flags and le16 idx: one 32-bit word with the index in
// the upper half, all of it written by the ring's owner.
const (
	ringHead = 4 // bytes before the entries of either ring
	usedSize = 8 // le32 id, le32 len
)

func word(flags, idx uint16) uint32 { return uint32(flags) | uint32(idx)<<16 }

// SplitSizes returns the lengths in bytes of the three areas of a split virtqueue of
// n descriptors (virtio 1.2, 2.7), the two event words included.
func SplitSizes(n uint16) (desc, driver, device uint64) {
	return descSize * uint64(n), 6 + 2*uint64(n), 6 + 8*uint64(n)
}

// usedEventOff is where used_event lies in the driver area (2.7.7), availEventOff where
// avail_event lies in the device area (2.7.10).
func usedEventOff(n uint16) uint64  { return ringHead + 2*uint64(n) }
func availEventOff(n uint16) uint64 { return ringHead + usedSize*uint64(n) }

// needEvent tells whether an index that moved from old to new has passed event, i.e.
// whether the entry event was among them (vring_need_event, virtio 1.2, 2.7.7.2). All
// three wrap at 65536.
func needEvent(event, new, old uint16) bool {
	return new-event-1 < new-old
}

// splitDesc is a descriptor of a split ring, or of an indirect table, as it was read: once.
type splitDesc struct {
	addr uint64
	rest uint64 // le32 len, le16 flags, le16 next
}

func (d splitDesc) len() uint32   { return uint32(d.rest) }
func (d splitDesc) flags() uint16 { return uint16(d.rest >> 32) }
func (d splitDesc) next() uint16  { return uint16(d.rest >> 48) }

// alone tells whether it is a chain of one buffer.
func (d splitDesc) alone() bool { return d.flags()&(descNext|descIndirect) == 0 }
