package virtiomsg

// EncodeQueueRequest writes the request id, GetVQueue, ResetVQueue or GetShm, for a queue or a
// shared-memory region.
func EncodeQueueRequest(s *Slot, id uint8, dev, token uint16, index uint32) {
	s.put(0, id, dev, token, 4)
	s.putU32(0, index)
}

// DecodeQueueRequest reads the request id.
func DecodeQueueRequest(s *Slot, id uint8) (index uint32, err error) {
	if _, err := s.expect(0, id, 4); err != nil {
		return 0, err
	}
	return s.u32(0), nil
}

// VQueue describes a virtqueue: the response to GetVQueue, or the request SetVQueue.
type VQueue struct {
	Index   uint32
	MaxSize uint32 // response only: 0 where there is no such queue
	Size    uint32 // descriptors; 0 where the queue is not set up
	// Link addresses of the three areas.
	Desc, Driver, Device uint64
}

// EncodeResponse writes the response to GetVQueue.
func (m *VQueue) EncodeResponse(s *Slot, dev, token uint16) {
	m.encode(s, TypeResponse, GetVQueue, dev, token)
	s.putU32(4, m.MaxSize)
}

// EncodeRequest writes the request SetVQueue, which has an empty response.
func (m *VQueue) EncodeRequest(s *Slot, dev, token uint16) { m.encode(s, 0, SetVQueue, dev, token) }

func (m *VQueue) encode(s *Slot, typ, id uint8, dev, token uint16) {
	s.put(typ, id, dev, token, 40)
	s.putU32(0, m.Index)
	s.putU32(8, m.Size)
	s.putU64(16, m.Desc)
	s.putU64(24, m.Driver)
	s.putU64(32, m.Device)
}

// DecodeResponse reads the response to GetVQueue.
func (m *VQueue) DecodeResponse(s *Slot) error { return m.decode(s, TypeResponse, GetVQueue) }

// DecodeRequest reads the request SetVQueue.
func (m *VQueue) DecodeRequest(s *Slot) error { return m.decode(s, 0, SetVQueue) }

func (m *VQueue) decode(s *Slot, typ, id uint8) error {
	h, err := s.expect(typ, id, 40)
	if err != nil {
		return err
	}
	if typ == 0 && s.u32(4) != 0 {
		return msgErr(h, ErrReserved, "bytes 4 to 7", uint64(s.u32(4)))
	}
	if s.u32(12) != 0 {
		return msgErr(h, ErrReserved, "bytes 12 to 15", uint64(s.u32(12)))
	}
	*m = VQueue{Index: s.u32(0), MaxSize: s.u32(4), Size: s.u32(8), Desc: s.u64(16), Driver: s.u64(24), Device: s.u64(32)}
	return nil
}

// AvailEvent is EventAvail, from the driver side. Doorbells stand in its place; it is decoded for
// a peer that has none.
type AvailEvent struct {
	Queue uint32
	Next  uint32 // next offset, 31 bits; 0 without VIRTIO_F_NOTIFICATION_DATA
	Wrap  bool   // next wrap counter
}

// Encode writes the event.
func (m *AvailEvent) Encode(s *Slot, dev uint16) {
	s.put(0, EventAvail, dev, 0, 8)
	s.putU32(0, m.Queue)
	next := m.Next &^ (1 << 31)
	if m.Wrap {
		next |= 1 << 31
	}
	s.putU32(4, next)
}

// Decode reads the event.
func (m *AvailEvent) Decode(s *Slot) error {
	if _, err := s.expect(0, EventAvail, 8); err != nil {
		return err
	}
	next := s.u32(4)
	*m = AvailEvent{Queue: s.u32(0), Next: next &^ (1 << 31), Wrap: next>>31 != 0}
	return nil
}

// EncodeEventUsed writes EventUsed, from the device side; see AvailEvent.
func EncodeEventUsed(s *Slot, dev uint16, queue uint32) {
	s.put(0, EventUsed, dev, 0, 4)
	s.putU32(0, queue)
}

// DecodeEventUsed reads the event.
func DecodeEventUsed(s *Slot) (queue uint32, err error) {
	if _, err := s.expect(0, EventUsed, 4); err != nil {
		return 0, err
	}
	return s.u32(0), nil
}
