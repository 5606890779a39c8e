package virtio

import "encoding/binary"

// IDBlock is the device id of a block device (virtio 1.2, 5.2).
const IDBlock uint32 = 2

// Feature bits of the block device (virtio 1.2, 5.2.3). Bits 0 to 23 of other devices mean other things, so Feature.String does
// not name these: BlkNames does.
const (
	BlkSizeMax     Feature = 1  // BlkConfig.SizeMax is valid
	BlkSegMax      Feature = 2  // BlkConfig.SegMax is valid
	BlkRO          Feature = 5  // the disk is read-only
	BlkBlkSize     Feature = 6  // BlkConfig.BlkSize is valid
	BlkFlush       Feature = 9  // BlkTFlush
	BlkTopology    Feature = 10 // BlkConfig's topology is valid
	BlkConfigWCE   Feature = 11 // BlkConfig.Writeback can be read and written
	BlkMQ          Feature = 12 // BlkConfig.NumQueues is valid
	BlkDiscard     Feature = 13 // BlkTDiscard
	BlkWriteZeroes Feature = 14 // BlkTWriteZeroes
)

// blkNames are the specification's names in lower case without the prefix.
var blkNames = map[Feature]string{BlkSizeMax: "size_max", BlkSegMax: "seg_max", BlkRO: "ro", BlkBlkSize: "blk_size", BlkFlush: "flush",
	BlkTopology: "topology", BlkConfigWCE: "config_wce", BlkMQ: "blk_mq", BlkDiscard: "discard", BlkWriteZeroes: "write_zeroes"}

// BlkNames returns the names of the bits of a block device, in the order of their numbers.
func BlkNames(s Features) []string {
	names := []string{}
	for f := Feature(0); f < 32*FeatureBlocks; f++ {
		if !s.Has(f) {
			continue
		}
		name := blkNames[f]
		if name == "" {
			name = f.String()
		}
		names = append(names, name)
	}
	return names
}

// Types of block requests (virtio 1.2, 5.2.6).
const (
	BlkTIn          uint32 = 0  // read
	BlkTOut         uint32 = 1  // write
	BlkTFlush       uint32 = 4  // with BlkFlush
	BlkTGetID       uint32 = 8  // the serial number: BlkIDLen bytes
	BlkTDiscard     uint32 = 11 // with BlkDiscard: BlkSegment
	BlkTWriteZeroes uint32 = 13 // with BlkWriteZeroes: BlkSegment
)

// The status byte behind each block request (virtio 1.2, 5.2.6).
const (
	BlkOK     byte = 0
	BlkIOErr  byte = 1
	BlkUnsupp byte = 2 // the device does not know the type, or a flag
)

const (
	// BlkSector is the unit of capacities, sectors and lengths of a block device in bytes, whatever its block size.
	BlkSector = 512
	// BlkIDLen is the length of a serial number in bytes. A shorter one is padded with zeros; one of this length has
	// no zero at its end.
	BlkIDLen = 20
	// BlkHeaderLen is the length of a request's header in bytes.
	BlkHeaderLen = 16
	// BlkSegmentLen is the length of a segment of BlkTDiscard and BlkTWriteZeroes in bytes.
	BlkSegmentLen = 16
	// BlkUnmap is the flag of a segment of BlkTWriteZeroes that permits the device to unmap it. BlkTDiscard has no flags.
	BlkUnmap uint32 = 1
)

// BlkHeader is what a block request begins with, little-endian.
type BlkHeader struct {
	Type   uint32 // offset 0
	Sector uint64 // offset 8; of BlkTIn and BlkTOut
}

// Encode returns the bytes of the header.
func (h BlkHeader) Encode() (b [BlkHeaderLen]byte) {
	binary.LittleEndian.PutUint32(b[0:], h.Type)
	binary.LittleEndian.PutUint64(b[8:], h.Sector)
	return b
}

// DecodeBlkHeader reads a header. b has at least BlkHeaderLen bytes.
func DecodeBlkHeader(b []byte) BlkHeader {
	return BlkHeader{Type: binary.LittleEndian.Uint32(b), Sector: binary.LittleEndian.Uint64(b[8:])}
}

// BlkSegment is a range that BlkTDiscard or BlkTWriteZeroes is about, little-endian.
type BlkSegment struct {
	Sector  uint64 // offset 0
	Sectors uint32 // offset 8
	Flags   uint32 // offset 12: BlkUnmap
}

// Encode returns the bytes of the segment.
func (s BlkSegment) Encode() (b [BlkSegmentLen]byte) {
	binary.LittleEndian.PutUint64(b[0:], s.Sector)
	binary.LittleEndian.PutUint32(b[8:], s.Sectors)
	binary.LittleEndian.PutUint32(b[12:], s.Flags)
	return b
}

// DecodeBlkSegment reads a segment. b has at least BlkSegmentLen bytes.
func DecodeBlkSegment(b []byte) BlkSegment {
	return BlkSegment{Sector: binary.LittleEndian.Uint64(b), Sectors: binary.LittleEndian.Uint32(b[8:]), Flags: binary.LittleEndian.Uint32(b[12:])}
}

// BlkConfig is the configuration space of a block device (virtio 1.2, 5.2.4), little-endian. There is no geometry.
type BlkConfig struct {
	Capacity  uint64 // offset 0: sectors of 512 bytes
	SizeMax   uint32 // offset 8: bytes of one buffer of a request at most
	SegMax    uint32 // offset 12: buffers of data of a request at most
	BlkSize   uint32 // offset 20: bytes
	PhysExp   uint8  // offset 24: a physical block has 1<<PhysExp blocks
	Offset    uint8  // offset 25: blocks before the first aligned one
	MinIO     uint16 // offset 26: suggested minimum of a request, in blocks
	OptIO     uint32 // offset 28: suggested maximum of a request, in blocks
	Writeback bool   // offset 32: the only field that a driver may write, with BlkConfigWCE
	NumQueues uint16 // offset 34

	MaxDiscard     uint32 // offset 36: sectors of one segment at most
	MaxDiscardSegs uint32 // offset 40: segments of a request at most
	DiscardAlign   uint32 // offset 44: sectors
	MaxZeroes      uint32 // offset 48: sectors of one segment at most
	MaxZeroesSegs  uint32 // offset 52: segments of a request at most
	ZeroesMayUnmap bool   // offset 56
}

const (
	// BlkConfigLen is the length of the configuration space that we use, in bytes.
	BlkConfigLen = 60
	// BlkWritebackOff is the offset of BlkConfig.Writeback, one byte.
	BlkWritebackOff = 32
)

// Encode returns the bytes of the configuration space.
func (c BlkConfig) Encode() (b [BlkConfigLen]byte) {
	binary.LittleEndian.PutUint64(b[0:], c.Capacity)
	binary.LittleEndian.PutUint32(b[8:], c.SizeMax)
	binary.LittleEndian.PutUint32(b[12:], c.SegMax)
	binary.LittleEndian.PutUint32(b[20:], c.BlkSize)
	b[24], b[25] = c.PhysExp, c.Offset
	b[26], b[27] = byte(c.MinIO), byte(c.MinIO>>8)
	binary.LittleEndian.PutUint32(b[28:], c.OptIO)
	if c.Writeback {
		b[BlkWritebackOff] = 1
	}
	b[34], b[35] = byte(c.NumQueues), byte(c.NumQueues>>8)
	binary.LittleEndian.PutUint32(b[36:], c.MaxDiscard)
	binary.LittleEndian.PutUint32(b[40:], c.MaxDiscardSegs)
	binary.LittleEndian.PutUint32(b[44:], c.DiscardAlign)
	binary.LittleEndian.PutUint32(b[48:], c.MaxZeroes)
	binary.LittleEndian.PutUint32(b[52:], c.MaxZeroesSegs)
	if c.ZeroesMayUnmap {
		b[56] = 1
	}
	return b
}

// DecodeBlkConfig reads a configuration space; shorter ones leave the rest zero.
func DecodeBlkConfig(p []byte) BlkConfig {
	var b [BlkConfigLen]byte
	copy(b[:], p)
	return BlkConfig{Capacity: binary.LittleEndian.Uint64(b[0:]), SizeMax: binary.LittleEndian.Uint32(b[8:]), SegMax: binary.LittleEndian.Uint32(b[12:]), BlkSize: binary.LittleEndian.Uint32(b[20:]),
		PhysExp: b[24], Offset: b[25], MinIO: uint16(b[26]) | uint16(b[27])<<8, OptIO: binary.LittleEndian.Uint32(b[28:]),
		Writeback: b[BlkWritebackOff] != 0, NumQueues: uint16(b[34]) | uint16(b[35])<<8,
		MaxDiscard: binary.LittleEndian.Uint32(b[36:]), MaxDiscardSegs: binary.LittleEndian.Uint32(b[40:]), DiscardAlign: binary.LittleEndian.Uint32(b[44:]),
		MaxZeroes: binary.LittleEndian.Uint32(b[48:]), MaxZeroesSegs: binary.LittleEndian.Uint32(b[52:]), ZeroesMayUnmap: b[56] != 0}
}
