package virtiomsg

import (
	"encoding/binary"
	"fmt"
)

// Vector returns the doorbell vector, of vectors that the side to be rung has, that stands for a
// queue of a device. Vector 0 is the control plane's: link page and FIFOs; with a single
// vector it is everybody's. A vector may stand for several queues: whoever is rung looks at all of
// them. The first two queues of the devices count from vector 1 up, the others from the last one down: they
// share with each other first.
func Vector(dev uint16, queue, vectors uint32) uint32 {
	if vectors <= 1 {
		return 0
	}
	if queue < 2 {
		return 1 + uint32((2*uint64(dev)+uint64(queue))%uint64(vectors-1))
	}
	return vectors - 1 - uint32((2*uint64(dev)+uint64(queue)-2)%uint64(vectors-1))
}

// Bits of Header.Type.
const (
	TypeResponse = 1 << 0
	TypeBus      = 1 << 1
)

// Message ids of the transport (virtio-msg RFC 3). Ids below 0x40 are requests, which are answered;
// those from 0x40 on are events.
const (
	GetDeviceInfo     = 0x02
	GetDeviceFeatures = 0x03
	SetDriverFeatures = 0x04
	GetConfig         = 0x05
	SetConfig         = 0x06
	GetDeviceStatus   = 0x07
	SetDeviceStatus   = 0x08
	GetVQueue         = 0x09
	SetVQueue         = 0x0a
	ResetVQueue       = 0x0b
	GetShm            = 0x0c
	EventConfig       = 0x40
	EventAvail        = 0x41
	EventUsed         = 0x42
	EventLink         = 0x60 // ours, not of the draft: only with FeatureLinkState
)

// Message ids of the bus: TypeBus is set, the device number is 0.
const (
	BusGetDevices  = 0x02
	BusPing        = 0x03
	BusEventDevice = 0x40

	firstEvent = 0x40
)

// HeaderSize is the size of a message's header in bytes.
const HeaderSize = 8

// Header is what every message begins with.
type Header struct {
	Type  uint8  // TypeResponse, TypeBus
	ID    uint8  // message id, of the bus' where TypeBus is set
	Dev   uint16 // device number; 0 for messages of the bus
	Token uint16 // not 0 in a request, the same in its response; 0 in an event
	Size  uint16 // of the message in bytes, header included: 8 to 64
}

// Bus tells whether it is a message of the bus, not of a device.
func (h Header) Bus() bool { return h.Type&TypeBus != 0 }

// Response tells whether it answers a request.
func (h Header) Response() bool { return h.Type&TypeResponse != 0 }

// Event tells whether it is a message that is not answered.
func (h Header) Event() bool { return h.ID >= firstEvent }

// String names the message: "SET_VQUEUE request, device 1, token 7".
func (h Header) String() string {
	kind := "request"
	if h.Event() {
		kind = "event"
	}
	if h.Response() {
		kind = "response"
	}
	if h.Bus() {
		return fmt.Sprintf("bus %s %s, token %d", MessageName(true, h.ID), kind, h.Token)
	}
	return fmt.Sprintf("%s %s, device %d, token %d", MessageName(false, h.ID), kind, h.Dev, h.Token)
}

// MessageName returns the draft's name of a message id: "GET_VQUEUE".
func MessageName(bus bool, id uint8) string {
	if bus {
		switch id {
		case BusGetDevices:
			return "GET_DEVICES"
		case BusPing:
			return "PING"
		case BusEventDevice:
			return "EVENT_DEVICE"
		}
		return fmt.Sprintf("bus message %#x", id)
	}
	switch id {
	case GetDeviceInfo:
		return "GET_DEVICE_INFO"
	case GetDeviceFeatures:
		return "GET_DEVICE_FEATURES"
	case SetDriverFeatures:
		return "SET_DRIVER_FEATURES"
	case GetConfig:
		return "GET_CONFIG"
	case SetConfig:
		return "SET_CONFIG"
	case GetDeviceStatus:
		return "GET_DEVICE_STATUS"
	case SetDeviceStatus:
		return "SET_DEVICE_STATUS"
	case GetVQueue:
		return "GET_VQUEUE"
	case SetVQueue:
		return "SET_VQUEUE"
	case ResetVQueue:
		return "RESET_VQUEUE"
	case GetShm:
		return "GET_SHM"
	case EventConfig:
		return "EVENT_CONFIG"
	case EventAvail:
		return "EVENT_AVAIL"
	case EventUsed:
		return "EVENT_USED"
	case EventLink:
		return "EVENT_LINK"
	}
	return fmt.Sprintf("message %#x", id)
}

func msgErr(h Header, err error, field string, v uint64) error {
	return &MessageError{Header: h, Field: field, Value: v, Err: err}
}

// Header returns the header of the message in s, checked: size within 8 to 64, no reserved bits,
// device number 0 on the bus, a token where there must be one and none where there must not.
// Errors are *MessageError.
func (s *Slot) Header() (Header, error) {
	h := Header{Type: s[0], ID: s[1], Dev: binary.LittleEndian.Uint16(s[2:]),
		Token: binary.LittleEndian.Uint16(s[4:]), Size: binary.LittleEndian.Uint16(s[6:])}
	switch {
	case h.Size < HeaderSize || h.Size > SlotSize:
		return h, msgErr(h, ErrSize, "size", uint64(h.Size))
	case h.Type&^(TypeResponse|TypeBus) != 0:
		return h, msgErr(h, ErrReserved, "type", uint64(h.Type))
	case h.Event() && h.Response():
		return h, msgErr(h, ErrType, "type", uint64(h.Type))
	case h.Bus() && h.Dev != 0:
		return h, msgErr(h, ErrReserved, "device number", uint64(h.Dev))
	case h.Event() != (h.Token == 0):
		return h, msgErr(h, ErrToken, "token", uint64(h.Token))
	}
	return h, nil
}

// put begins a message of n payload bytes: the header, and zeros behind it.
func (s *Slot) put(typ, id uint8, dev, token uint16, n int) {
	*s = Slot{}
	s[0], s[1] = typ, id
	binary.LittleEndian.PutUint16(s[2:], dev)
	binary.LittleEndian.PutUint16(s[4:], token)
	binary.LittleEndian.PutUint16(s[6:], uint16(HeaderSize+n))
}

// expect checks that the message in s is of the given type and id, and of n payload bytes;
// n < 0 leaves the size to the caller.
func (s *Slot) expect(typ, id uint8, n int) (Header, error) {
	h, err := s.Header()
	if err != nil {
		return h, err
	}
	if h.Type != typ || h.ID != id {
		return h, msgErr(h, ErrType, "type and id", uint64(h.Type)<<8|uint64(h.ID))
	}
	if n >= 0 && int(h.Size) != HeaderSize+n {
		return h, msgErr(h, ErrSize, "size", uint64(h.Size))
	}
	return h, nil
}

func (s *Slot) u16(off int) uint16 { return binary.LittleEndian.Uint16(s[HeaderSize+off:]) }
func (s *Slot) u32(off int) uint32 { return binary.LittleEndian.Uint32(s[HeaderSize+off:]) }
func (s *Slot) u64(off int) uint64 { return binary.LittleEndian.Uint64(s[HeaderSize+off:]) }

func (s *Slot) putU16(off int, v uint16) { binary.LittleEndian.PutUint16(s[HeaderSize+off:], v) }
func (s *Slot) putU32(off int, v uint32) { binary.LittleEndian.PutUint32(s[HeaderSize+off:], v) }
func (s *Slot) putU64(off int, v uint64) { binary.LittleEndian.PutUint64(s[HeaderSize+off:], v) }
