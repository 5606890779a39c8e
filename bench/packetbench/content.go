//go:build linux

package packetbench

import (
	"encoding/binary"
	"hash/crc32"

	"github.com/boardlink/boardlink/frames"
)

// header is an Ethernet, IPv4 and UDP header between documentation addresses (RFC 5737); nobody looks at it.
var header = []byte{
	2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0,
	0x45, 0, 0, 50, 0, 0, 0, 0, 64, 17, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2,
	0, 9, 0, 9, 0, 30, 0, 0,
}

const (
	offNumber = 48 // of the frame's number, 64 bits
	offSum    = 56 // of the checksum of what is behind the first 64 bytes, and the number
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// fill makes frame number n of length bytes, every byte of it.
func fill(b []byte, n uint64) {
	x := n*0x9e3779b97f4a7c15 + 1
	p := b[minBytes:]
	for ; len(p) >= 8; p = p[8:] {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		binary.LittleEndian.PutUint64(p, x)
	}
	for i := range p {
		p[i] = byte(x >> (8 * i))
	}
	binary.LittleEndian.PutUint64(b[offSum:], uint64(sum(b, n)))
}

func sum(b []byte, n uint64) uint32 {
	return crc32.Update(uint32(n), castagnoli, b[minBytes:])
}

// fill writes len(out) frames.
func (s *side) fill(out []frames.Out) {
	sent, length, at, own := s.sent, s.length, int(s.sent%lengths), s.own
	t := &s.template
	from := int(sent % uint64(s.c.Size))
	for i := range out {
		n := length[at]
		if at++; at == len(length) {
			at = 0
		}
		o := &out[i]
		o.Len = n
		b := o.Room
		if own != nil {
			b = own[from]
			if from++; from == len(own) {
				from = 0
			}
		}
		*(*[minBytes]byte)(b) = *t
		binary.LittleEndian.PutUint64(b[offNumber:], sent)
		if s.c.Verify {
			fill(b[:n], sent)
		}
		sent++
	}
	if own != nil {
		// Behind all of the batch, as testpmd makes a burst before it sends it.
		from = int(s.sent % uint64(s.c.Size))
		for i := range out {
			o := &out[i]
			copy(o.Room[:o.Len], own[from])
			if from++; from == len(own) {
				from = 0
			}
		}
	}
	s.sent = sent
}

// checkForeign looks at frames of testpmd: their length, and that they are of IPv4. It touches as much of them as check.
func (s *side) checkForeign(in [][]byte) {
	n := s.c.Bytes
	for _, f := range in {
		if len(f) != n || f[12] != 8 || f[13] != 0 {
			s.corrupt++
		}
	}
	s.got += uint64(len(in))
}

// check looks at frames.
func (s *side) check(in [][]byte) {
	got, length, at := s.got, s.length, int(s.got%lengths)
	for _, f := range in {
		n := length[at]
		if at++; at == len(length) {
			at = 0
		}
		if len(f) != n || binary.LittleEndian.Uint64(f[offNumber:]) != got || s.c.Verify && binary.LittleEndian.Uint64(f[offSum:]) != uint64(sum(f, got)) {
			s.corrupt++
		}
		got++
	}
	s.got = got
}
