//go:build linux

package traffic

import (
	"bytes"
	"testing"
	"time"
)

// BenchmarkStreamCheck is the receiver's work on a TCP stream in buffers of the default size.
func BenchmarkStreamCheck(b *testing.B) {
	data := make([]byte, 0, 32<<20)
	for s := newStream(1); len(data) < cap(data); {
		p := s.next(cap(data) - len(data))
		data = append(data, p...)
		s.advance(len(p))
	}
	// Like a socket's read, which leaves the buffer in the cache.
	buf := make([]byte, 256<<10)
	c := newChecker(1)
	off := 0
	b.SetBytes(int64(len(buf)))
	b.ReportAllocs()
	for b.Loop() {
		if off == len(data) {
			off, c = 0, newChecker(1)
		}
		b.StopTimer()
		copy(buf, data[off:])
		b.StartTimer()
		if !c.check(buf) {
			b.Fatal("differs")
		}
		off += len(buf)
	}
}

// BenchmarkStreamCheckCold is the same over 32 MiB that no cache holds.
func BenchmarkStreamCheckCold(b *testing.B) {
	data := make([]byte, 0, 32<<20)
	for s := newStream(1); len(data) < cap(data); {
		p := s.next(cap(data) - len(data))
		data = append(data, p...)
		s.advance(len(p))
	}
	b.SetBytes(int64(len(data)))
	for b.Loop() {
		c := newChecker(1)
		if !c.check(data) {
			b.Fatal("differs")
		}
	}
}

// BenchmarkStreamNext is the sender's work besides the system call, here a copy out of the pattern.
func BenchmarkStreamNext(b *testing.B) {
	s := newStream(1)
	sink := make([]byte, chunkLen)
	b.SetBytes(chunkLen)
	b.ReportAllocs()
	for b.Loop() {
		p := s.next(chunkLen)
		s.advance(copy(sink, p))
	}
}

// BenchmarkPutPacket and BenchmarkPacketCheck are the work on a packet of 64 bytes.
func BenchmarkPutPacket(b *testing.B) {
	p := make([]byte, 64)
	var seq uint64
	b.ReportAllocs()
	for b.Loop() {
		putPacket(p, 7, seq)
		seq++
	}
}

func BenchmarkPacketCheck(b *testing.B) {
	const n = 1 << 12
	ps := make([][]byte, n)
	for i := range ps {
		ps[i] = make([]byte, 64)
		putPacket(ps[i], 7, uint64(i))
	}
	c := newPacketChecker(7, 64)
	i := 0
	b.ReportAllocs()
	for b.Loop() {
		c.check(ps[i%n], n)
		i++
	}
	if c.corrupt != 0 {
		b.Fatal("corrupt")
	}
}

func BenchmarkEqual(b *testing.B) {
	p := pattern()
	x, y := bytes.Clone(p[:chunkLen]), p[:chunkLen]
	b.SetBytes(chunkLen)
	for b.Loop() {
		if !bytes.Equal(x, y) {
			b.Fatal("differs")
		}
	}
}

// BenchmarkTCPOverVeth is a stream over a veth pair: the kernel's work on both ends and ours. The
// profile shows our share.
func BenchmarkTCPOverVeth(b *testing.B) {
	p := newVeth(b)
	p.wait(b)
	c, err := StartTCP(b.Context(), p.v4.Board, p.v4.Host, TCPConfig{})
	if err != nil {
		b.Fatal(err)
	}
	const each = 16 << 20
	b.SetBytes(each)
	next := c.Stats().Verified
	for b.Loop() {
		next += each
		for c.Stats().Verified < next {
			time.Sleep(50 * time.Microsecond)
		}
	}
	if _, err := c.Stop(); err != nil {
		b.Error(err)
	}
}

// BenchmarkUDPOverVeth sends packets of 64 bytes as fast as can be, and shows what arrives.
func BenchmarkUDPOverVeth(b *testing.B) {
	p := newVeth(b)
	p.wait(b)
	u, err := StartUDP(b.Context(), p.v4.Board, p.v4.Host, UDPConfig{})
	if err != nil {
		b.Fatal(err)
	}
	const each = 10000
	next := u.Stats().Received
	for b.Loop() {
		next += each
		for u.Stats().Received < next {
			time.Sleep(50 * time.Microsecond)
		}
	}
	r, err := u.Stop()
	if err != nil {
		b.Error(err)
	}
	b.ReportMetric(r.KppsSent, "kpps-sent")
	b.ReportMetric(r.KppsReceived, "kpps-received")
}
