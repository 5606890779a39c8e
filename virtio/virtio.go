// Package virtio is the numbers of the virtio specification that every side and every control plane
// shares: feature bits and their names, device status, device ids, the network device's
// configuration space.
//
// In the room: constants, the feature set, byte layouts. Never in it: memory that a peer
// can see, rings, messages, behaviour.
package virtio

import (
	"fmt"
	"strings"
)

// VendorID is what GET_DEVICE_INFO tells of our devices: "BLNK", little-endian. It makes
// the private feature bits ours.
const VendorID uint32 = 0x4b4e4c42

// Device ids (virtio 1.2, 5).
const (
	IDNet     uint32 = 1
	IDConsole uint32 = 3
	IDEntropy uint32 = 4
)

// Device status bits (virtio 1.2, 2.1).
const (
	StatusAcknowledge uint32 = 1
	StatusDriver      uint32 = 2
	StatusDriverOK    uint32 = 4
	StatusFeaturesOK  uint32 = 8
	StatusNeedsReset  uint32 = 64
	StatusFailed      uint32 = 128
)

// StatusString names the bits of a device status.
func StatusString(s uint32) string {
	if s == 0 {
		return "reset"
	}
	names := [...]struct {
		bit  uint32
		name string
	}{{StatusAcknowledge, "ACKNOWLEDGE"}, {StatusDriver, "DRIVER"}, {StatusFeaturesOK, "FEATURES_OK"},
		{StatusDriverOK, "DRIVER_OK"}, {StatusNeedsReset, "NEEDS_RESET"}, {StatusFailed, "FAILED"}}
	var out []string
	for _, n := range names {
		if s&n.bit != 0 {
			out = append(out, n.name)
			s &^= n.bit
		}
	}
	if s != 0 {
		out = append(out, fmt.Sprintf("%#x", s))
	}
	return strings.Join(out, "|")
}

// Feature is the number of a feature bit.
type Feature uint8

// Feature bits: of the network device (virtio 1.2, 5.1.3) and of every device (virtio 1.2, 6).
const (
	NetCSUM      Feature = 0
	NetGuestCSUM Feature = 1
	NetMTU       Feature = 3
	NetMAC       Feature = 5
	NetGuestTSO4 Feature = 7
	NetGuestTSO6 Feature = 8
	NetHostTSO4  Feature = 11
	NetHostTSO6  Feature = 12
	NetMrgRxbuf  Feature = 15
	NetStatus    Feature = 16
	NetCtrlVQ    Feature = 17
	NetMQ        Feature = 22

	// ConsoleSize is of the console device (virtio 1.2, 5.3.3).
	ConsoleSize Feature = 0

	IndirectDesc Feature = 28
	EventIdx     Feature = 29

	Version1         Feature = 32
	AccessPlatform   Feature = 33
	RingPacked       Feature = 34
	InOrder          Feature = 35
	OrderPlatform    Feature = 36
	NotificationData Feature = 38
	RingReset        Feature = 40

	NetGuestUSO4 Feature = 54
	NetGuestUSO6 Feature = 55
	NetHostUSO   Feature = 56

	// NetRawIP is private to devices of our vendor id: frames are IP packets without an Ethernet header
	// (a tun device at both ends). Offered only by a host that was told to use tun; a driver that
	// was told so too accepts it, any other does not come up.
	NetRawIP Feature = 127
)

// featureNames are how operators and status name the bits: the specification's names in lower case without
// the prefix.
var featureNames = [...]struct {
	f    Feature
	name string
}{
	{NetCSUM, "csum"}, {NetGuestCSUM, "guest_csum"}, {NetMTU, "mtu"}, {NetMAC, "mac"},
	{NetGuestTSO4, "guest_tso4"}, {NetGuestTSO6, "guest_tso6"}, {NetHostTSO4, "host_tso4"}, {NetHostTSO6, "host_tso6"},
	{NetMrgRxbuf, "mrg_rxbuf"}, {NetStatus, "status"}, {NetCtrlVQ, "ctrl_vq"}, {NetMQ, "mq"},
	{IndirectDesc, "indirect_desc"}, {EventIdx, "event_idx"},
	{Version1, "version_1"}, {AccessPlatform, "access_platform"}, {RingPacked, "ring_packed"}, {InOrder, "in_order"},
	{OrderPlatform, "order_platform"}, {NotificationData, "notification_data"}, {RingReset, "ring_reset"},
	{NetGuestUSO4, "guest_uso4"}, {NetGuestUSO6, "guest_uso6"}, {NetHostUSO, "host_uso"},
	{NetRawIP, "raw_ip"},
}

// String returns the name of the bit as status shows it.
func (f Feature) String() string {
	for i := range featureNames {
		if featureNames[i].f == f {
			return featureNames[i].name
		}
	}
	return fmt.Sprintf("bit%d", uint8(f))
}

// FeatureBlocks is the number of 32-bit blocks that a Features has.
const FeatureBlocks = 4

// Features is a set of feature bits 0 to 127, in blocks of 32 as messages carry them.
type Features [FeatureBlocks]uint32

// FeaturesOf returns the set of the given bits.
func FeaturesOf(bits ...Feature) Features {
	var s Features
	for _, f := range bits {
		s.Set(f)
	}
	return s
}

// FeaturesFromMask returns the set of the bits 0 to 63 in mask.
func FeaturesFromMask(mask uint64) Features {
	return Features{uint32(mask), uint32(mask >> 32)}
}

// Mask returns bits 0 to 63.
func (s Features) Mask() uint64 { return uint64(s[0]) | uint64(s[1])<<32 }

// Has tells whether bit f is in the set.
func (s Features) Has(f Feature) bool {
	return f < 32*FeatureBlocks && s[f/32]&(1<<(f%32)) != 0
}

// Set adds bit f.
func (s *Features) Set(f Feature) { s[f/32] |= 1 << (f % 32) }

// Clear takes bit f out.
func (s *Features) Clear(f Feature) { s[f/32] &^= 1 << (f % 32) }

// And returns the bits in both sets.
func (s Features) And(t Features) Features {
	for i := range s {
		s[i] &= t[i]
	}
	return s
}

// Or returns the bits in either set.
func (s Features) Or(t Features) Features {
	for i := range s {
		s[i] |= t[i]
	}
	return s
}

// Without returns the bits of s that are not in t.
func (s Features) Without(t Features) Features {
	for i := range s {
		s[i] &^= t[i]
	}
	return s
}

// Names returns the names of the bits, in the order of their numbers.
func (s Features) Names() []string {
	names := []string{}
	for f := 0; f < 32*FeatureBlocks; f++ {
		if s.Has(Feature(f)) {
			names = append(names, Feature(f).String())
		}
	}
	return names
}

// String returns the names, separated by blanks, or "none".
func (s Features) String() string {
	n := s.Names()
	if len(n) == 0 {
		return "none"
	}
	return strings.Join(n, " ")
}

// ParseFeature returns the bit of a name as String prints it. The error lists the names.
func ParseFeature(name string) (Feature, error) {
	for i := range featureNames {
		if featureNames[i].name == name {
			return featureNames[i].f, nil
		}
	}
	var n int
	if _, err := fmt.Sscanf(name, "bit%d", &n); err == nil && n >= 0 && n < 32*FeatureBlocks && name == fmt.Sprintf("bit%d", n) {
		return Feature(n), nil
	}
	all := make([]string, len(featureNames))
	for i := range featureNames {
		all[i] = featureNames[i].name
	}
	return 0, fmt.Errorf("no feature is called %q; known: %s, bitN", name, strings.Join(all, " "))
}

// NetConfig is the configuration space of a network device (virtio 1.2, 5.1.4), little-endian.
type NetConfig struct {
	MAC           [6]byte // offset 0; valid with NetMAC
	LinkUp        bool    // offset 6, bit 0; valid with NetStatus
	Announce      bool    // offset 6, bit 1
	MaxQueuePairs uint16  // offset 8; valid with NetMQ
	MTU           uint16  // offset 10; valid with NetMTU
}

// NetConfigLen is the length of the configuration space that we use, in bytes.
const NetConfigLen = 12

// Encode returns the bytes of the configuration space.
func (c NetConfig) Encode() [NetConfigLen]byte {
	var b [NetConfigLen]byte
	copy(b[:6], c.MAC[:])
	if c.LinkUp {
		b[6] |= 1
	}
	if c.Announce {
		b[6] |= 2
	}
	b[8], b[9] = byte(c.MaxQueuePairs), byte(c.MaxQueuePairs>>8)
	b[10], b[11] = byte(c.MTU), byte(c.MTU>>8)
	return b
}

// DecodeNetConfig reads a configuration space; shorter ones leave the rest zero.
func DecodeNetConfig(p []byte) NetConfig {
	var b [NetConfigLen]byte
	copy(b[:], p)
	var c NetConfig
	copy(c.MAC[:], b[:6])
	c.LinkUp, c.Announce = b[6]&1 != 0, b[6]&2 != 0
	c.MaxQueuePairs = uint16(b[8]) | uint16(b[9])<<8
	c.MTU = uint16(b[10]) | uint16(b[11])<<8
	return c
}
