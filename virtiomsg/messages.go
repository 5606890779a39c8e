package virtiomsg

// The messages of a device. Encode writes a whole slot; Decode checks the slot's header, that the
// message is the one it knows, and that its size is exactly that of the payload.

// EncodeGetDeviceInfo asks for a device's DeviceInfo.
func EncodeGetDeviceInfo(s *Slot, dev, token uint16) { s.put(0, GetDeviceInfo, dev, token, 0) }

// EncodeGetDeviceStatus asks for a device's Status.
func EncodeGetDeviceStatus(s *Slot, dev, token uint16) { s.put(0, GetDeviceStatus, dev, token, 0) }

// DecodeEmptyRequest checks a request without payload: GetDeviceInfo or GetDeviceStatus.
func DecodeEmptyRequest(s *Slot, id uint8) error {
	_, err := s.expect(0, id, 0)
	return err
}

// EncodeEmptyResponse answers a request whose answer has no payload: SetDriverFeatures, SetVQueue
// or ResetVQueue.
func EncodeEmptyResponse(s *Slot, id uint8, dev, token uint16) {
	s.put(TypeResponse, id, dev, token, 0)
}

// DecodeEmptyResponse checks an answer without payload.
func DecodeEmptyResponse(s *Slot, id uint8) error {
	_, err := s.expect(TypeResponse, id, 0)
	return err
}

// DeviceInfo answers GetDeviceInfo.
type DeviceInfo struct {
	DeviceID    uint32 // virtio device id: 1 is a network device
	VendorID    uint32
	FeatureBits uint32 // how many feature bits the device has
	ConfigSize  uint32 // bytes
	MaxQueues   uint32 // virtqueues, administration queues not counted
	AdminStart  uint16 // the first administration queue
	AdminCount  uint16
}

// Encode writes the response.
func (m *DeviceInfo) Encode(s *Slot, dev, token uint16) {
	s.put(TypeResponse, GetDeviceInfo, dev, token, 24)
	s.putU32(0, m.DeviceID)
	s.putU32(4, m.VendorID)
	s.putU32(8, m.FeatureBits)
	s.putU32(12, m.ConfigSize)
	s.putU32(16, m.MaxQueues)
	s.putU16(20, m.AdminStart)
	s.putU16(22, m.AdminCount)
}

// Decode reads the response.
func (m *DeviceInfo) Decode(s *Slot) error {
	if _, err := s.expect(TypeResponse, GetDeviceInfo, 24); err != nil {
		return err
	}
	*m = DeviceInfo{DeviceID: s.u32(0), VendorID: s.u32(4), FeatureBits: s.u32(8), ConfigSize: s.u32(12),
		MaxQueues: s.u32(16), AdminStart: s.u16(20), AdminCount: s.u16(22)}
	return nil
}

// Shm answers GetShm. Our devices have no shared memory and answer a length of 0.
type Shm struct {
	Index, Len, Addr uint32
}

// Encode writes the response.
func (m *Shm) Encode(s *Slot, dev, token uint16) {
	s.put(TypeResponse, GetShm, dev, token, 12)
	s.putU32(0, m.Index)
	s.putU32(4, m.Len)
	s.putU32(8, m.Addr)
}

// Decode reads the response.
func (m *Shm) Decode(s *Slot) error {
	if _, err := s.expect(TypeResponse, GetShm, 12); err != nil {
		return err
	}
	*m = Shm{Index: s.u32(0), Len: s.u32(4), Addr: s.u32(8)}
	return nil
}
