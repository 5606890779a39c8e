package virtiomsg

// Supersedes tells whether the event later makes the event earlier, which came before it from the same
// side and was not looked at yet, superfluous: whoever keeps events for a while keeps the later one
// alone. A device's configuration is read again after the last of several changes; a removal is not
// made undone by a device that comes. Both slots have good headers.
func Supersedes(later, earlier *Slot) bool {
	a, errA := later.Header()
	b, errB := earlier.Header()
	if errA != nil || errB != nil || !a.Event() || a.Type != b.Type || a.ID != b.ID || a.Dev != b.Dev {
		return false
	}
	if a.Bus() && a.ID == BusEventDevice {
		// The payload: device number, state.
		return later.u16(0) == earlier.u16(0) && (later.u16(2) == earlier.u16(2) || later.u16(2) == DeviceRemoved)
	}
	if a.Bus() {
		return *later == *earlier
	}
	switch a.ID {
	case EventConfig, EventLink:
		return true
	case EventAvail, EventUsed: // a doorbell's stand-in
		return later.u32(0) == earlier.u32(0)
	}
	return *later == *earlier // nobody knows it
}

// Removes tells whether a message is the event that device number dev was removed.
func Removes(m *Slot, dev uint16) bool {
	var e DeviceEvent
	return e.Decode(m) == nil && e.Dev == dev && e.State == DeviceRemoved
}
