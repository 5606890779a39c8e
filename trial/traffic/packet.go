//go:build linux

package traffic

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
)

var le = binary.LittleEndian

// A packet of the UDP test: CRC-32C of all that follows (4 bytes), length of the packet (4), token
// of the run (8), number of the packet (8), little-endian; then payload out of the pattern, from a
// place that its number and the token give.
const udpHeader = 24

// udpWindow is how many packet numbers, up to the highest received, are remembered to tell a
// duplicate from a late one. A power of two.
const udpWindow = 1 << 20

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// payloadAt returns where in the pattern the payload of a packet starts.
func payloadAt(token, seq uint64) uint64 { return mix(token^seq) % patternLen }

// putPacket writes packet number seq of len(b) bytes.
func putPacket(b []byte, token, seq uint64) {
	le.PutUint32(b[4:], uint32(len(b)))
	le.PutUint64(b[8:], token)
	le.PutUint64(b[16:], seq)
	copy(b[udpHeader:], pattern()[payloadAt(token, seq):])
	le.PutUint32(b, crcOf(b))
}

// crcOf returns the checksum that belongs in a packet of at least 4 bytes.
func crcOf(b []byte) uint32 { return crc32.Checksum(b[4:], castagnoli) }

// tally counts received packets by what they turned out to be. See UDPResult.
type tally struct {
	received, corrupt, reordered, duplicates, foreign uint64
}

// packetChecker judges received packets.
type packetChecker struct {
	tally
	token uint64
	size  int
	seen  []uint64 // bits by number modulo udpWindow, of the numbers in (top-udpWindow, top)
	top   uint64   // one above the highest number received
}

func newPacketChecker(token uint64, size int) *packetChecker {
	return &packetChecker{token: token, size: size, seen: make([]uint64, udpWindow/64)}
}

// check judges one packet; numbers from limit on were not sent yet.
func (c *packetChecker) check(b []byte, limit uint64) {
	if len(b) < udpHeader || le.Uint32(b) != crcOf(b) || le.Uint32(b[4:]) != uint32(len(b)) {
		c.corrupt++
		return
	}
	if le.Uint64(b[8:]) != c.token {
		c.foreign++
		return
	}
	seq := le.Uint64(b[16:])
	at := payloadAt(c.token, seq)
	if len(b) != c.size || seq >= limit || !bytes.Equal(b[udpHeader:], pattern()[at:at+uint64(len(b)-udpHeader)]) {
		c.corrupt++
		return
	}
	word, bit := &c.seen[seq%udpWindow/64], uint64(1)<<(seq%64)
	switch {
	case seq >= c.top:
		c.forget(seq)
		c.top = seq + 1
	case c.top-seq > udpWindow || *word&bit != 0:
		c.duplicates++
		return
	default:
		c.reordered++
	}
	*word |= bit
	c.received++
}

// forget clears the bits of the numbers from top to seq, which leave the window's other end.
func (c *packetChecker) forget(seq uint64) {
	if seq-c.top >= udpWindow {
		clear(c.seen)
		return
	}
	for s := c.top; s <= seq; {
		if s%64 == 0 && seq-s >= 63 {
			c.seen[s%udpWindow/64] = 0
			s += 64
			continue
		}
		c.seen[s%udpWindow/64] &^= 1 << (s % 64)
		s++
	}
}
