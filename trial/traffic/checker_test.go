//go:build linux

package traffic

import (
	"bytes"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// streamBytes returns n bytes of a stream.
func streamBytes(seed uint64, n int) []byte {
	s := newStream(seed)
	b := make([]byte, 0, n)
	for len(b) < n {
		p := s.next(n - len(b))
		b = append(b, p...)
		s.advance(len(p))
	}
	return b
}

func isPrime(n int) bool {
	for d := 2; d*d <= n; d++ {
		if n%d == 0 {
			return false
		}
	}
	return n > 1
}

func TestPatternLengthsArePrime(t *testing.T) {
	if !isPrime(patternLen) || !isPrime(chunkLen) {
		t.Errorf("lengths %d and %d: both must be prime", patternLen, chunkLen)
	}
	p := pattern()
	if !bytes.Equal(p[patternLen:], p[:chunkLen]) {
		t.Error("the pattern does not go on where it ends")
	}
	var count [256]int
	for _, b := range p[:patternLen] {
		count[b]++
	}
	if lo, hi := slices.Min(count[:]), slices.Max(count[:]); lo < 3700 || hi > 4500 { // 4096 +- 6 sigma
		t.Errorf("the bytes are not random: between %d and %d of each", lo, hi)
	}
}

// TestStreamIsCheckedInAnyPieces cuts a sound stream at random.
func TestStreamIsCheckedInAnyPieces(t *testing.T) {
	const total = 3 << 20
	rapid.Check(t, func(t *rapid.T) {
		seed := rapid.Uint64().Draw(t, "seed")
		data := streamBytes(seed, total)
		c := newChecker(seed)
		for len(data) > 0 {
			n := min(len(data), rapid.OneOf(rapid.IntRange(1, 100), rapid.IntRange(1, 1<<20), rapid.Just(chunkLen)).Draw(t, "n"))
			n = max(n, len(data)/20)
			if !c.check(data[:n]) {
				t.Fatalf("refused at %d of %d", c.firstBad, total)
			}
			data = data[n:]
		}
		if c.off != total || c.bad != 0 || c.firstBad != -1 {
			t.Fatalf("offset %d, %d bad, first %d", c.off, c.bad, c.firstBad)
		}
	})
}

// TestStreamFaults damages a stream as a broken ring would and wants the first wrong byte named.
// Lengths are also those that such rings would give: pages, powers of two, multiples of the block.
func TestStreamFaults(t *testing.T) {
	const total = 4 << 20
	lengths := rapid.OneOf(
		rapid.IntRange(8, 1<<20),
		rapid.SampledFrom([]int{1448, 1500, 2048, 4096, 16384, 1 << 16, 1 << 17, 1 << 18, 1 << 19, 1 << 20, chunkLen, 2 * chunkLen, patternLen, 16 * chunkLen}),
	)
	rapid.Check(t, func(t *rapid.T) {
		seed := rapid.Uint64().Draw(t, "seed")
		good := streamBytes(seed, total)
		n := lengths.Draw(t, "length")
		at := rapid.IntRange(0, total-2*n-1).Draw(t, "at")
		kind := rapid.SampledFrom([]string{"flip", "lose", "repeat", "swap", "stale", "zero", "other stream"}).Draw(t, "kind")
		bad := bytes.Clone(good)
		switch kind {
		case "flip":
			bad[at] ^= 1 << rapid.IntRange(0, 7).Draw(t, "bit")
		case "lose":
			bad = slices.Delete(bad, at, at+n)
		case "repeat":
			bad = slices.Insert(bad, at+n, good[at:at+n]...)
		case "swap": // neighbours of one length
			copy(bad[at:], good[at+n:at+2*n])
			copy(bad[at+n:], good[at:at+n])
		case "stale": // bytes that an earlier lap of the ring left
			copy(bad[at+n:at+2*n], good[at:at+n])
		case "zero":
			clear(bad[at : at+n])
		case "other stream":
			copy(bad[at:at+n], streamBytes(seed+1, total)[at:])
		}
		first, differ := int64(-1), int64(0)
		for i := range bad {
			if i >= len(good) || bad[i] != good[i] {
				if first < 0 {
					first = int64(i)
				}
				if i < len(good) {
					differ++
				}
			}
		}
		c := newChecker(seed)
		ok := c.check(bad)
		if ok || c.firstBad != first || first < int64(at) || first > int64(at+n+16) {
			t.Fatalf("%s of %d bytes at %d: ok %v, first bad %d, want %d", kind, n, at, ok, c.firstBad, first)
		}
		if len(bad) <= len(good) && c.bad != differ {
			t.Fatalf("%s of %d bytes at %d: %d bad, want %d", kind, n, at, c.bad, differ)
		}
		if c.got[0] != bad[first] || len(c.want) == 0 || int(first) < len(good) && c.want[0] != good[first] {
			t.Fatalf("%s: got %x, want %x: not what is at %d", kind, c.got, c.want, first)
		}
	})
}

// TestChunksDiffer looks for two chunks of a stream that start alike, within 2^20 of them.
func TestChunksDiffer(t *testing.T) {
	for seed := range uint64(3) {
		s := newStream(seed)
		seen := make([]bool, patternLen)
		for n := range patternLen {
			if seen[s.start] {
				t.Fatalf("seed %d: chunk %d repeats an earlier one", seed, n)
			}
			seen[s.start] = true
			s.advance(chunkLen)
		}
	}
}

func packet(size int, token, seq uint64) []byte {
	b := make([]byte, size)
	putPacket(b, token, seq)
	return b
}

func TestPacketFaults(t *testing.T) {
	const token = 77
	for _, size := range []int{udpHeader, 64, 1472, udpMaxBytes} {
		check := func(b []byte, want tally) {
			t.Helper()
			c := newPacketChecker(token, size)
			c.check(b, 100)
			if c.tally != want {
				t.Errorf("size %d: %+v, want %+v", size, c.tally, want)
			}
		}
		good := packet(size, token, 42)
		check(good, tally{received: 1})
		for i := 0; i < size; i += max(1, size/200) {
			b := bytes.Clone(good)
			b[i] ^= 0x10
			check(b, tally{corrupt: 1})
		}
		for _, n := range []int{0, 1, udpHeader - 1, size - 1} {
			check(good[:n], tally{corrupt: 1})
		}
		check(append(bytes.Clone(good), 0), tally{corrupt: 1})
		check(packet(size, token, 100), tally{corrupt: 1}) // not sent yet
		check(packet(size, token+1, 42), tally{foreign: 1})
		check(packet(size+1, token, 42), tally{corrupt: 1}) // another size in this run
		if size > udpHeader {
			// A payload under a checksum made for it, as of a sender that mixed up its buffers.
			b := bytes.Clone(good)
			copy(b[udpHeader:], packet(size, token, 43)[udpHeader:])
			le.PutUint32(b, crcOf(b))
			check(b, tally{corrupt: 1})
		}
	}
}

// TestPacketOrder compares the counts with a plain model, over numbers in any order.
func TestPacketOrder(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := newPacketChecker(1, 24)
		seen := make(map[uint64]bool)
		var want tally
		var top, at uint64
		steps := rapid.IntRange(1, 300).Draw(t, "steps")
		for range steps {
			jump := rapid.OneOf(
				rapid.Int64Range(-100, 100), rapid.Just(int64(1)), rapid.SampledFrom([]int64{-4096, -128, -64, 64, 128, 192, 4096}),
				rapid.Int64Range(-2*udpWindow, 2*udpWindow),
			).Draw(t, "jump")
			if jump < 0 && uint64(-jump) > at {
				jump = 0
			}
			at += uint64(jump)
			switch {
			case at >= top:
				top = at + 1
				want.received++
				seen[at] = true
			case top-at > udpWindow || seen[at]:
				want.duplicates++
			default:
				want.reordered++
				want.received++
				seen[at] = true
			}
			c.check(packet(24, 1, at), 1<<62)
		}
		if c.tally != want {
			t.Fatalf("%+v, want %+v", c.tally, want)
		}
	})
}

func TestCheckersDoNotAllocate(t *testing.T) {
	data := streamBytes(5, chunkLen)
	c := newChecker(5)
	c.check(nil)
	if n := testing.AllocsPerRun(100, func() {
		c.in, c.start = 0, newStream(5).start
		c.check(data)
	}); n != 0 || c.bad != 0 {
		t.Errorf("%v allocations a chunk, %d bad", n, c.bad)
	}
	p := make([]byte, 64)
	pc := newPacketChecker(1, 64)
	seq := uint64(0)
	if n := testing.AllocsPerRun(100, func() {
		putPacket(p, 1, seq)
		seq++
		pc.check(p, seq)
	}); n != 0 || pc.corrupt != 0 {
		t.Errorf("%v allocations a packet, %d corrupt", n, pc.corrupt)
	}
}

func TestInetSum(t *testing.T) {
	// The example of RFC 1071, section 3: the sum is ddf2.
	if got := inetSum([]byte{0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7}); got != 0xffff-0xddf2 {
		t.Errorf("%#x", got)
	}
	if got := inetSum([]byte{0x01}); got != 0xfeff {
		t.Errorf("odd length: %#x", got)
	}
}

func TestParseChecksumCounters(t *testing.T) {
	var c csum
	c.parse([]byte("Ip: Forwarding InReceives\nIp: 2 64\n" +
		"Icmp: InMsgs InErrors InCsumErrors\nIcmp: 1 0 3\nIcmpMsg: InType3\nIcmpMsg: 1\n" +
		"Tcp: RtoAlgorithm InCsumErrors\nTcp: 1 5\nUdp: InDatagrams InCsumErrors IgnoredMulti\nUdp: 33 7 9\n" +
		"UdpLite: InDatagrams InCsumErrors\nUdpLite: 0 100\nIpExt: InNoRoutes InCsumErrors\nIpExt: 0 11\n"))
	c.parse([]byte("Ip6InReceives  \t12\nIcmp6InCsumErrors   \t30\nUdp6InCsumErrors \t70\nUdpLite6InCsumErrors 1000\n"))
	if want := (csum{ip: 11, icmp: 33, tcp: 5, udp: 77}); c != want {
		t.Errorf("%+v, want %+v", c, want)
	}
}
