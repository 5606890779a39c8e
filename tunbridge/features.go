package tunbridge

import (
	"strings"

	"github.com/boardlink/boardlink/virtio"
)

// Feature bits of a network device that speak of checksums and segmentation, as masks (virtio 1.2, 5.1.3).
const (
	NetFCSUM       uint64 = 1 << virtio.NetCSUM      // device handles packets with partial checksum
	NetFGuestCSUM  uint64 = 1 << virtio.NetGuestCSUM // driver handles packets with partial checksum
	NetFGuestTSO4  uint64 = 1 << virtio.NetGuestTSO4 // driver receives TSOv4; needs GuestCSUM
	NetFGuestTSO6  uint64 = 1 << virtio.NetGuestTSO6 // driver receives TSOv6; needs GuestCSUM
	NetFHostTSO4   uint64 = 1 << virtio.NetHostTSO4  // device receives TSOv4; needs CSUM
	NetFHostTSO6   uint64 = 1 << virtio.NetHostTSO6  // device receives TSOv6; needs CSUM
	NetFGuestUSO4  uint64 = 1 << virtio.NetGuestUSO4 // driver receives USOv4; needs GuestCSUM
	NetFGuestUSO6  uint64 = 1 << virtio.NetGuestUSO6 // driver receives USOv6; needs GuestCSUM
	NetFHostUSO    uint64 = 1 << virtio.NetHostUSO   // device receives USO; needs CSUM
	netFDriverMask        = NetFCSUM | NetFHostTSO4 | NetFHostTSO6 | NetFHostUSO
	netFDeviceMask        = NetFGuestCSUM | NetFGuestTSO4 | NetFGuestTSO6 | NetFGuestUSO4 | NetFGuestUSO6
)

// NetFOffload is every feature bit that speaks of checksums and segmentation.
const NetFOffload = netFDriverMask | netFDeviceMask

// The header before each frame, struct virtio_net_hdr with num_buffers (virtio 1.2, 5.1.6),
// all of it little-endian: its length and the offsets of its fields, in bytes.
const (
	HeaderLen        = 12
	HdrOffFlags      = 0  // u8: HdrFlagNeedsCsum ...
	HdrOffGSOType    = 1  // u8: HdrGSONone ...
	HdrOffHdrLen     = 2  // le16: length of the headers to repeat
	HdrOffGSOSize    = 4  // le16: payload of each segment
	HdrOffCSUMStart  = 6  // le16: where to start summing
	HdrOffCSUMOffset = 8  // le16: where, from there, to put the sum
	HdrOffNumBuffers = 10 // le16: receive buffers that the frame takes
)

// Bits of the header's flags (virtio 1.2, 5.1.6).
const (
	HdrFlagNeedsCsum = 1 // the checksum is partial: csum_start and csum_offset hold
	HdrFlagDataValid = 2 // the checksum was verified; from device to driver only
	HdrFlagRscInfo   = 4 // csum fields hold coalescing counts; never negotiated here
)

// Values of the header's gso_type (virtio 1.2, 5.1.6).
const (
	HdrGSONone  = 0
	HdrGSOTCPv4 = 1
	HdrGSOUDP   = 3 // UFO: never negotiated here
	HdrGSOTCPv6 = 4
	HdrGSOUDPL4 = 5    // USO
	HdrGSOECN   = 0x80 // ored to a TCP type; never negotiated here
)

// MaxFrameLen is the longest frame an interface hands over or takes, its header apart, in
// bytes: 64 KiB of IP packet, an Ethernet header and two VLAN tags. (The receive buffers of 65562
// bytes in virtio 1.2, 5.1.6.3.1, have no room for the tags of the very longest ones.)
const MaxFrameLen = 65535 + linkOverhead

// linkOverhead is what a frame may have beside the IP packet, in bytes: an Ethernet header and two
// VLAN tags (IEEE 802.1ad), which do not count for the MTU.
const linkOverhead = 14 + 2*4

// Offload is a set of jobs that the sender of a frame may leave to its receiver.
type Offload uint8

// The jobs. TSO and USO need CSUM.
const (
	OffloadCSUM Offload = 1 << iota // fill in a partial checksum
	OffloadTSO4                     // cut TCP over IPv4
	OffloadTSO6                     // cut TCP over IPv6
	OffloadUSO4                     // cut UDP over IPv4
	OffloadUSO6                     // cut UDP over IPv6
)

const offloadAll = OffloadCSUM | OffloadTSO4 | OffloadTSO6 | OffloadUSO4 | OffloadUSO6

var offloadNames = [...]string{"csum", "tso4", "tso6", "uso4", "uso6"}

// String returns the names, joined by commas, or "none".
func (o Offload) String() string {
	if o&offloadAll == 0 {
		return "none"
	}
	names := make([]string, 0, len(offloadNames))
	for i, name := range offloadNames {
		if o&(1<<uint(i)) != 0 {
			names = append(names, name)
		}
	}
	return strings.Join(names, ",")
}

// Usable returns the part of o that the kernel's TUNSETOFFLOAD can express: nothing
// without CSUM, and USO only for both IP versions at once.
func (o Offload) Usable() Offload {
	o &= offloadAll
	if o&OffloadCSUM == 0 {
		return 0
	}
	if o&(OffloadUSO4|OffloadUSO6) != OffloadUSO4|OffloadUSO6 {
		o &^= OffloadUSO4 | OffloadUSO6
	}
	return o
}

// OffloadFeatures returns the feature bits that a side can offer (device) or accept
// (driver) when its interface supports o. The same set serves both: the kernel writes
// what it can also read. Bits whose prerequisite is missing are left out.
func OffloadFeatures(o Offload) uint64 {
	o = o.Usable()
	var f uint64
	if o&OffloadCSUM != 0 {
		f |= NetFCSUM | NetFGuestCSUM
	}
	if o&OffloadTSO4 != 0 {
		f |= NetFHostTSO4 | NetFGuestTSO4
	}
	if o&OffloadTSO6 != 0 {
		f |= NetFHostTSO6 | NetFGuestTSO6
	}
	if o&OffloadUSO4 != 0 { // Usable: then USO6 too
		f |= NetFHostUSO | NetFGuestUSO4 | NetFGuestUSO6
	}
	return f
}

// Segmentation bits of each direction: with one of them frames are up to MaxFrameLen long, without
// any as long as the MTU allows.
const (
	NetFToDriverLong = NetFGuestTSO4 | NetFGuestTSO6 | NetFGuestUSO4 | NetFGuestUSO6
	NetFToDeviceLong = NetFHostTSO4 | NetFHostTSO6 | NetFHostUSO
)

// MaxFrameToDriver returns the longest frame that the device may send to the driver once features
// are negotiated, in bytes with its virtio-net header. Nothing but the accepted segmentation bits
// of this direction and the MTU decides it: not what room there is in receive buffers.
func MaxFrameToDriver(mtu int, features uint64) int {
	return MaxFrame(mtu, features&NetFToDriverLong != 0)
}

// MaxFrameToDevice is MaxFrameToDriver for what the driver sends.
func MaxFrameToDevice(mtu int, features uint64) int {
	return MaxFrame(mtu, features&NetFToDeviceLong != 0)
}

// LongRoom is how much memory a driver has at least for each direction in which it accepts segmentation, in bytes: two of the
// longest frames.
const LongRoom = 2 * ((HeaderLen + MaxFrameLen + 1 + 63) &^ 63)

// DeviceOffload returns what the device side's interface may leave to the driver once
// features are negotiated: the GUEST bits.
func DeviceOffload(features uint64) Offload {
	var o Offload
	if features&NetFGuestCSUM != 0 {
		o |= OffloadCSUM
	}
	if features&NetFGuestTSO4 != 0 {
		o |= OffloadTSO4
	}
	if features&NetFGuestTSO6 != 0 {
		o |= OffloadTSO6
	}
	if features&NetFGuestUSO4 != 0 {
		o |= OffloadUSO4
	}
	if features&NetFGuestUSO6 != 0 {
		o |= OffloadUSO6
	}
	return o.Usable()
}

// DriverOffload returns what the driver side's interface may leave to the device once
// features are negotiated: CSUM and the HOST bits.
func DriverOffload(features uint64) Offload {
	var o Offload
	if features&NetFCSUM != 0 {
		o |= OffloadCSUM
	}
	if features&NetFHostTSO4 != 0 {
		o |= OffloadTSO4
	}
	if features&NetFHostTSO6 != 0 {
		o |= OffloadTSO6
	}
	if features&NetFHostUSO != 0 {
		o |= OffloadUSO4 | OffloadUSO6
	}
	return o.Usable()
}
