//go:build linux

package traffic

import (
	"bytes"
	"encoding/binary"
	"sync"
)

// The stream that the TCP tests send is never generated: it is cut out of one block of random
// bytes. Chunk n of a stream is the chunkLen bytes of the block that start at
// (start + n*step) mod patternLen. As patternLen is prime, no two of patternLen chunks in a row
// (64 GiB) are alike, whatever the step; as neither length has a factor in common with a page, a
// ring or a buffer, bytes that moved by a multiple of those are seen. start and step are drawn
// from the stream's seed, so that bytes of another stream are seen too. Checking is bytes.Equal.
const (
	patternLen = 1<<20 + 7  // 1048583, prime
	chunkLen   = 1<<16 - 15 // 65521, prime
)

// pattern is patternLen random bytes followed by the first chunkLen of them, so that a chunk
// that starts anywhere is in one piece. It is the same in every process.
var pattern = sync.OnceValue(func() []byte {
	p := make([]byte, patternLen+chunkLen)
	var b [8]byte
	for i := 0; i < patternLen; i += 8 {
		binary.LittleEndian.PutUint64(b[:], mix(uint64(i)))
		copy(p[i:patternLen], b[:])
	}
	copy(p[patternLen:], p[:chunkLen])
	return p
})

// Mix scrambles a number, a different one for each: it makes bytes that tell where they belong. mix is the same.
func Mix(x uint64) uint64 { return mix(x) }

// mix scrambles a number: the finalizer of splitmix64 (Steele, Lea, Flood 2014, doi
// 10.1145/2660193.2660195).
func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// stream is a position in a stream of pattern bytes.
type stream struct {
	block []byte // pattern()
	step  uint32 // 1 to patternLen-1
	start uint32 // of the chunk at hand, below patternLen
	in    int    // bytes of it that are done, below chunkLen
	off   int64  // bytes of the stream that are done
}

func newStream(seed uint64) stream {
	r := mix(seed)
	return stream{
		block: pattern(),
		start: uint32(r % patternLen),
		step:  uint32(mix(r)%(patternLen-1)) + 1,
	}
}

// next returns the bytes at the position, at least one, at most n, and never past the chunk. They
// are the pattern itself: read only.
func (s *stream) next(n int) []byte {
	n = min(n, chunkLen-s.in)
	at := int(s.start) + s.in
	return s.block[at : at+n]
}

// advance moves the position by n bytes, at most to the end of the chunk.
func (s *stream) advance(n int) {
	s.off += int64(n)
	s.in += n
	if s.in == chunkLen {
		s.in = 0
		s.start = (s.start + s.step) % patternLen
	}
}

// checker compares what arrived with a stream.
type checker struct {
	stream
	bad      int64 // bytes that differ
	firstBad int64 // offset of the first of them, -1 if there is none
	got      []byte
	want     []byte // up to 16 bytes each, from firstBad on
}

func newChecker(seed uint64) checker {
	return checker{stream: newStream(seed), firstBad: -1}
}

// check takes the next bytes of the stream and reports whether all of them are right.
func (c *checker) check(b []byte) bool {
	ok := true
	for len(b) > 0 {
		want := c.next(len(b))
		if !bytes.Equal(b[:len(want)], want) {
			c.diff(b[:len(want)], want)
			ok = false
		}
		b = b[len(want):]
		c.advance(len(want))
	}
	return ok
}

// diff counts the bytes that differ.
func (c *checker) diff(got, want []byte) {
	for i := range got {
		if got[i] == want[i] {
			continue
		}
		if c.firstBad < 0 {
			c.firstBad = c.off + int64(i)
			c.got = bytes.Clone(got[i:min(len(got), i+16)])
			c.want = bytes.Clone(want[i:min(len(want), i+16)])
		}
		c.bad++
	}
}
