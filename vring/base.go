package vring

import (
	"fmt"

	"github.com/boardlink/boardlink/dma"
)

// A vring base is how vhost-user carries a State (SET_VRING_BASE, GET_VRING_BASE), in 32 bits:
//
//	split:   bits 0 to 15 the available index, the others 0. The used index is that of the used ring.
//	packed:  bits 0 to 14 the available position, bit 15 its wrap counter,
//	         bits 16 to 30 the used position, bit 31 its wrap counter.
//
// A front end may leave the upper half of a packed base out (DPDK starts queues with 0x00008000): 0
// beside an available position with wrap counter 1 means that nothing is in flight. (All of a queue in flight at
// the start of a lap, which is the same number, cannot be carried.)

// Base returns the vring base of s. That of a split queue does not carry s.Used: complete or unpop what is
// in flight first. Base of the zero State is that of a new split queue; State methods of
// queues set Packed.
func (s State) Base() uint32 {
	if s.Packed {
		return uint32(s.Avail) | uint32(s.Used)<<16
	}
	return uint32(s.Avail)
}

// Rewound returns s with nothing in flight: what was popped and not completed will be popped
// again. It suits devices that complete chains in the order of their ring.
func (s State) Rewound() State {
	s.Avail = s.Used
	return s
}

// PackedStateFromBase returns the State that a vring base gives to the packed queue that c describes, of
// which only Name and Size count. The error, an *Error of Code ErrState, tells that a
// position lies outside the queue, or that more descriptors would be in flight than the queue has.
func PackedStateFromBase(c Config, base uint32) (State, error) {
	s := State{Avail: uint16(base), Used: uint16(base >> 16), Packed: true}
	if s.Used == 0 && s.Avail&wrapBit != 0 {
		s.Used = s.Avail
	}
	if _, err := packedInFlight(s, c.Size); err != nil {
		return State{}, &Error{Queue: c.Name, Code: ErrState, Err: fmt.Errorf("base %#08x: %w", base, err)}
	}
	return s, nil
}

// SplitStateFromBase returns the State that a vring base gives to the split queue that c describes: its
// used index is read, once, from the used ring in c.Device, so the queue goes on with the chains that an
// earlier device side took and did not complete (State.Rewound pops them again). c.State does not count.
// The errors are *Error values: Code ErrConfig where the ring is not as NewSplitDevice needs it, ErrState
// where the base is no index of 16 bits, or where the used index is not at most c.Size
// behind it. A base of 0 then means the used index: DPDK's virtio-user tells it whenever it connects
// again, wherever its ring is.
func SplitStateFromBase(c Config, base uint32) (State, error) {
	if err := splitSize(c.Size); err != nil {
		return State{}, configError(&c, err)
	}
	_, _, n := SplitSizes(c.Size)
	device, err := newArea("device area", c.Device, n, SplitDeviceAlign, SplitDeviceAlign, dma.DeviceWrite)
	if err != nil {
		return State{}, configError(&c, err)
	}
	if base > 1<<16-1 {
		return State{}, &Error{Queue: c.Name, Code: ErrState, Err: fmt.Errorf("base %#x of a split queue: an index is at most %#x", base, 1<<16-1)}
	}
	// Flags and index are one aligned word, as whoever wrote them may have written them as one.
	used := uint16(device.load32(0) >> 16)
	device.flush()
	s := State{Avail: uint16(base), Used: used}
	if n := s.Avail - s.Used; n > c.Size {
		if base == 0 {
			s.Avail = used
			return s, nil
		}
		return State{}, &Error{Queue: c.Name, Code: ErrState, Err: fmt.Errorf("base %d and used index %d in the ring: %d chains in flight in a queue of %d", s.Avail, s.Used, n, c.Size)}
	}
	return s, nil
}
