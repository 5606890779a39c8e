package virtiomsg

import "github.com/boardlink/boardlink/virtio"

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
