package virtiomsg

const (
	// MaxConfigData is how many bytes of configuration space fit in GET_CONFIG's response and in
	// SET_CONFIG.
	MaxConfigData = SlotSize - HeaderSize - 12
	// ConfigChunk is how many bytes to ask for at a time. Configuration that does not fit is
	// read in chunks, again from the start where the generation changed in between.
	ConfigChunk = 40
	// MaxEventData is how many bytes of configuration space fit in EVENT_CONFIG.
	MaxEventData = SlotSize - HeaderSize - 16
)

// EncodeGetConfig asks for n bytes, at most MaxConfigData, of configuration space from off on.
func EncodeGetConfig(s *Slot, dev, token uint16, off, n uint32) {
	s.put(0, GetConfig, dev, token, 8)
	s.putU32(0, off)
	s.putU32(4, n)
}

// DecodeGetConfig reads the request. n is at most MaxConfigData, and off+n does not overflow;
// whether they lie in the configuration space is the device's to check.
func DecodeGetConfig(s *Slot) (off, n uint32, err error) {
	h, err := s.expect(0, GetConfig, 8)
	if err != nil {
		return 0, 0, err
	}
	off, n = s.u32(0), s.u32(4)
	if n > MaxConfigData || off+n < off {
		return 0, 0, msgErr(h, ErrBounds, "length", uint64(n))
	}
	return off, n, nil
}

// ConfigData is a piece of configuration space: the response to GetConfig, or the request SetConfig
// and its response.
type ConfigData struct {
	Generation uint32 // of the configuration; in a SetConfig request the one it is based on
	Offset     uint32
	Len        uint32 // at most MaxConfigData; 0 in a response: refused
	Data       [MaxConfigData]byte
}

// EncodeResponse writes the response to id: GetConfig or SetConfig.
func (m *ConfigData) EncodeResponse(s *Slot, id uint8, dev, token uint16) {
	m.encode(s, TypeResponse, id, dev, token)
}

// EncodeRequest writes the request SetConfig.
func (m *ConfigData) EncodeRequest(s *Slot, dev, token uint16) {
	m.encode(s, 0, SetConfig, dev, token)
}

func (m *ConfigData) encode(s *Slot, typ, id uint8, dev, token uint16) {
	n := m.Len
	if n > MaxConfigData {
		n = MaxConfigData
	}
	s.put(typ, id, dev, token, 12+int(n))
	s.putU32(0, m.Generation)
	s.putU32(4, m.Offset)
	s.putU32(8, n)
	copy(s[HeaderSize+12:], m.Data[:n])
}

// DecodeResponse reads the response to id: GetConfig or SetConfig.
func (m *ConfigData) DecodeResponse(s *Slot, id uint8) error { return m.decode(s, TypeResponse, id) }

// DecodeRequest reads the request SetConfig.
func (m *ConfigData) DecodeRequest(s *Slot) error { return m.decode(s, 0, SetConfig) }

func (m *ConfigData) decode(s *Slot, typ, id uint8) error {
	h, err := s.expect(typ, id, -1)
	if err != nil {
		return err
	}
	if h.Size < HeaderSize+12 {
		return msgErr(h, ErrSize, "size", uint64(h.Size))
	}
	off, n := s.u32(4), s.u32(8)
	if n > MaxConfigData || off+n < off {
		return msgErr(h, ErrBounds, "length", uint64(n))
	}
	if uint32(h.Size) != HeaderSize+12+n {
		return msgErr(h, ErrSize, "size", uint64(h.Size))
	}
	*m = ConfigData{Generation: s.u32(0), Offset: off, Len: n}
	copy(m.Data[:n], s[HeaderSize+12:])
	return nil
}

// EncodeSetDeviceStatus writes the request to set a device's status; 0 resets it.
func EncodeSetDeviceStatus(s *Slot, dev, token uint16, status uint32) {
	s.put(0, SetDeviceStatus, dev, token, 4)
	s.putU32(0, status)
}

// DecodeSetDeviceStatus reads the request.
func DecodeSetDeviceStatus(s *Slot) (status uint32, err error) {
	if _, err := s.expect(0, SetDeviceStatus, 4); err != nil {
		return 0, err
	}
	return s.u32(0), nil
}

// EncodeStatus writes the response to id, GetDeviceStatus or SetDeviceStatus: the status that the
// device has now.
func EncodeStatus(s *Slot, id uint8, dev, token uint16, status uint32) {
	s.put(TypeResponse, id, dev, token, 4)
	s.putU32(0, status)
}

// DecodeStatus reads the response to id.
func DecodeStatus(s *Slot, id uint8) (status uint32, err error) {
	if _, err := s.expect(TypeResponse, id, 4); err != nil {
		return 0, err
	}
	return s.u32(0), nil
}

// ConfigEvent is EventConfig, from the device side: its status or its configuration has changed.
type ConfigEvent struct {
	Status     uint32 // device status; NEEDS_RESET is told this way
	Generation uint32
	Offset     uint32
	Len        uint32 // at most MaxEventData; 0: read the configuration again, if at all
	Data       [MaxEventData]byte
}

// Encode writes the event.
func (m *ConfigEvent) Encode(s *Slot, dev uint16) {
	n := m.Len
	if n > MaxEventData {
		n = MaxEventData
	}
	s.put(0, EventConfig, dev, 0, 16+int(n))
	s.putU32(0, m.Status)
	s.putU32(4, m.Generation)
	s.putU32(8, m.Offset)
	s.putU32(12, n)
	copy(s[HeaderSize+16:], m.Data[:n])
}

// Decode reads the event.
func (m *ConfigEvent) Decode(s *Slot) error {
	h, err := s.expect(0, EventConfig, -1)
	if err != nil {
		return err
	}
	if h.Size < HeaderSize+16 {
		return msgErr(h, ErrSize, "size", uint64(h.Size))
	}
	off, n := s.u32(8), s.u32(12)
	if n > MaxEventData || off+n < off {
		return msgErr(h, ErrBounds, "length", uint64(n))
	}
	if uint32(h.Size) != HeaderSize+16+n {
		return msgErr(h, ErrSize, "size", uint64(h.Size))
	}
	*m = ConfigEvent{Status: s.u32(0), Generation: s.u32(4), Offset: off, Len: n}
	copy(m.Data[:n], s[HeaderSize+16:])
	return nil
}
