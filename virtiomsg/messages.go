package virtiomsg

import "github.com/boardlink/boardlink/virtio"

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

// maxBlocks is how many feature blocks fit in a slot behind index and count.
const maxBlocks = (SlotSize - HeaderSize - 8) / 4

// FeatureBlocks is a run of 32-bit feature blocks: the response to GetDeviceFeatures, or the
// request SetDriverFeatures.
type FeatureBlocks struct {
	Index uint32 // of the first block: block i holds the bits 32*i to 32*i+31
	Count uint32 // at most 12
	Data  [maxBlocks]uint32
}

// BlocksOf returns count blocks of f from index on; those behind FeatureBits are zero. No more than fit in
// a slot are returned.
func BlocksOf(f virtio.Features, index, count uint32) FeatureBlocks {
	if count > maxBlocks {
		count = maxBlocks
	}
	b := FeatureBlocks{Index: index, Count: count}
	for i := uint32(0); i < count; i++ {
		if n := uint64(index) + uint64(i); n < virtio.FeatureBlocks {
			b.Data[i] = f[n]
		}
	}
	return b
}

// Store puts the blocks into f, and fails with ErrBounds where bits that virtio.Features
// cannot hold are set.
func (m *FeatureBlocks) Store(f *virtio.Features) error {
	for i := uint32(0); i < m.Count && i < maxBlocks; i++ {
		n := uint64(m.Index) + uint64(i)
		if n < virtio.FeatureBlocks {
			f[n] = m.Data[i]
		} else if m.Data[i] != 0 {
			return ErrBounds
		}
	}
	return nil
}

// EncodeGetDeviceFeatures asks for count feature blocks from index on; at most 12 are answered.
func EncodeGetDeviceFeatures(s *Slot, dev, token uint16, index, count uint32) {
	s.put(0, GetDeviceFeatures, dev, token, 8)
	s.putU32(0, index)
	s.putU32(4, count)
}

// DecodeGetDeviceFeatures reads the request. Any index and count is possible.
func DecodeGetDeviceFeatures(s *Slot) (index, count uint32, err error) {
	if _, err := s.expect(0, GetDeviceFeatures, 8); err != nil {
		return 0, 0, err
	}
	return s.u32(0), s.u32(4), nil
}

// EncodeResponse writes the response to GetDeviceFeatures.
func (m *FeatureBlocks) EncodeResponse(s *Slot, dev, token uint16) {
	m.encode(s, TypeResponse, GetDeviceFeatures, dev, token)
}

// EncodeRequest writes the request SetDriverFeatures, which has an empty response.
func (m *FeatureBlocks) EncodeRequest(s *Slot, dev, token uint16) {
	m.encode(s, 0, SetDriverFeatures, dev, token)
}

func (m *FeatureBlocks) encode(s *Slot, typ, id uint8, dev, token uint16) {
	n := m.Count
	if n > maxBlocks {
		n = maxBlocks
	}
	s.put(typ, id, dev, token, 8+4*int(n))
	s.putU32(0, m.Index)
	s.putU32(4, n)
	for i := 0; i < int(n); i++ {
		s.putU32(8+4*i, m.Data[i])
	}
}

// DecodeResponse reads the response to GetDeviceFeatures.
func (m *FeatureBlocks) DecodeResponse(s *Slot) error {
	return m.decode(s, TypeResponse, GetDeviceFeatures)
}

// DecodeRequest reads the request SetDriverFeatures.
func (m *FeatureBlocks) DecodeRequest(s *Slot) error { return m.decode(s, 0, SetDriverFeatures) }

func (m *FeatureBlocks) decode(s *Slot, typ, id uint8) error {
	h, err := s.expect(typ, id, -1)
	if err != nil {
		return err
	}
	if h.Size < HeaderSize+8 {
		return msgErr(h, ErrSize, "size", uint64(h.Size))
	}
	n := s.u32(4)
	if n > maxBlocks {
		return msgErr(h, ErrBounds, "blocks", uint64(n))
	}
	if uint32(h.Size) != HeaderSize+8+4*n {
		return msgErr(h, ErrSize, "size", uint64(h.Size))
	}
	*m = FeatureBlocks{Index: s.u32(0), Count: n}
	for i := 0; i < int(n); i++ {
		m.Data[i] = s.u32(8 + 4*i)
	}
	return nil
}

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
