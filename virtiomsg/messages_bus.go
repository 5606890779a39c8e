package virtiomsg

// The messages of the bus.

const (
	// MaxDevices is how many device numbers one Devices message covers.
	MaxDevices = (SlotSize - HeaderSize - 6) * 8
)

// EncodeGetDevices asks which of count device numbers, a multiple of 8 and at most MaxDevices, from
// off on, a multiple of 8, exist.
func EncodeGetDevices(s *Slot, token uint16, off, count uint16) {
	s.put(TypeBus, BusGetDevices, 0, token, 4)
	s.putU16(0, off)
	s.putU16(2, count)
}

// DecodeGetDevices reads the request. off and count are multiples of 8; count may be above
// MaxDevices, of which fewer are answered.
func DecodeGetDevices(s *Slot) (off, count uint16, err error) {
	h, err := s.expect(TypeBus, BusGetDevices, 4)
	if err != nil {
		return 0, 0, err
	}
	off, count = s.u16(0), s.u16(2)
	if off%8 != 0 || count%8 != 0 {
		return 0, 0, msgErr(h, ErrBounds, "offset and count", uint64(off)<<16|uint64(count))
	}
	return off, count, nil
}

// Devices answers GetDevices.
type Devices struct {
	Offset uint16               // the first device number covered, a multiple of 8
	Count  uint16               // how many, a multiple of 8, at most MaxDevices
	Next   uint16               // where to go on asking; 0: there are no more
	Bitmap [MaxDevices / 8]byte // bit n%8 of byte n/8: device number Offset+n exists
}

// Has tells whether device number dev is covered and exists.
func (m *Devices) Has(dev uint16) bool {
	if dev < m.Offset || dev-m.Offset >= m.Count {
		return false
	}
	n := dev - m.Offset
	return int(n/8) < len(m.Bitmap) && m.Bitmap[n/8]>>(n%8)&1 != 0
}

// Set notes that device number dev exists; it has no effect where dev is not covered.
func (m *Devices) Set(dev uint16) {
	if dev >= m.Offset && dev-m.Offset < m.Count {
		if n := dev - m.Offset; int(n/8) < len(m.Bitmap) {
			m.Bitmap[n/8] |= 1 << (n % 8)
		}
	}
}

// Encode writes the response.
func (m *Devices) Encode(s *Slot, token uint16) {
	n := int(m.Count) / 8
	if n > len(m.Bitmap) {
		n = len(m.Bitmap)
	}
	s.put(TypeBus|TypeResponse, BusGetDevices, 0, token, 6+n)
	s.putU16(0, m.Offset)
	s.putU16(2, uint16(n)*8)
	s.putU16(4, m.Next)
	copy(s[HeaderSize+6:], m.Bitmap[:n])
}

// Decode reads the response.
func (m *Devices) Decode(s *Slot) error {
	h, err := s.expect(TypeBus|TypeResponse, BusGetDevices, -1)
	if err != nil {
		return err
	}
	if h.Size < HeaderSize+6 {
		return msgErr(h, ErrSize, "size", uint64(h.Size))
	}
	off, count, next := s.u16(0), s.u16(2), s.u16(4)
	if off%8 != 0 || count%8 != 0 || count > MaxDevices {
		return msgErr(h, ErrBounds, "offset and count", uint64(off)<<16|uint64(count))
	}
	if h.Size != HeaderSize+6+count/8 {
		return msgErr(h, ErrSize, "size", uint64(h.Size))
	}
	if next != 0 && (next%8 != 0 || next <= off) {
		// Whoever follows it must come to an end.
		return msgErr(h, ErrBounds, "next", uint64(next))
	}
	*m = Devices{Offset: off, Count: count, Next: next}
	copy(m.Bitmap[:count/8], s[HeaderSize+6:])
	return nil
}

// EncodePing writes a PING request.
func EncodePing(s *Slot, token uint16, data uint32) {
	s.put(TypeBus, BusPing, 0, token, 4)
	s.putU32(0, data)
}

// EncodePong writes the response to a PING: the same data.
func EncodePong(s *Slot, token uint16, data uint32) {
	s.put(TypeBus|TypeResponse, BusPing, 0, token, 4)
	s.putU32(0, data)
}

// DecodePing reads a PING request.
func DecodePing(s *Slot) (data uint32, err error) {
	if _, err := s.expect(TypeBus, BusPing, 4); err != nil {
		return 0, err
	}
	return s.u32(0), nil
}

// DecodePong reads the response to a PING.
func DecodePong(s *Slot) (data uint32, err error) {
	if _, err := s.expect(TypeBus|TypeResponse, BusPing, 4); err != nil {
		return 0, err
	}
	return s.u32(0), nil
}

// States in a DeviceEvent. Those from 0x8000 on are left to the implementation.
const (
	DeviceReady   = 1
	DeviceRemoved = 2
)

// DeviceEvent is EVENT_DEVICE of the bus, from the device side: a device has come or gone.
type DeviceEvent struct {
	Dev   uint16
	State uint16 // DeviceReady, DeviceRemoved
}

// Encode writes the event.
func (m *DeviceEvent) Encode(s *Slot) {
	s.put(TypeBus, BusEventDevice, 0, 0, 4)
	s.putU16(0, m.Dev)
	s.putU16(2, m.State)
}

// Decode reads the event. States that are not known here are for the caller to ignore.
func (m *DeviceEvent) Decode(s *Slot) error {
	if _, err := s.expect(TypeBus, BusEventDevice, 4); err != nil {
		return err
	}
	*m = DeviceEvent{Dev: s.u16(0), State: s.u16(2)}
	return nil
}

// FeatureLinkState is a feature bit of the link (Declaration.Features): the agent tells by EVENT_LINK whether its
// end of a network device is up. In force where both sides show it.
const FeatureLinkState uint32 = 1 << 0

// EncodeLink writes an EVENT_LINK, from the driver side: whether its interface is administratively up.
func EncodeLink(s *Slot, dev uint16, up bool) {
	s.put(0, EventLink, dev, 0, 4)
	v := uint32(0)
	if up {
		v = 1
	}
	s.putU32(0, v)
}

// DecodeLink reads an EVENT_LINK.
func DecodeLink(s *Slot) (up bool, err error) {
	h, err := s.expect(0, EventLink, 4)
	if err != nil {
		return false, err
	}
	v := s.u32(0)
	if v > 1 {
		return false, msgErr(h, ErrBounds, "link state", uint64(v))
	}
	return v == 1, nil
}
