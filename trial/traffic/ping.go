//go:build linux

package traffic

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"os"
	"sync/atomic"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
	"github.com/boardlink/boardlink/trial/netns"
	"golang.org/x/sys/unix"
)

// ICMP and ICMPv6 echo (RFC 792, RFC 4443 section 4): type, code, checksum, identifier, sequence
// number, then the payload.
const (
	icmpHeader     = 8
	echoRequest4   = 8
	echoReply4     = 0
	echoRequest6   = 128
	echoReply6     = 129
	maxPing        = math.MaxUint16        // pings in one run: each has a sequence number of its own
	pingLinger     = 10 * time.Millisecond // wait for duplicates of the last reply
	maxPingPayload = math.MaxUint16 - 20 - icmpHeader
)

// PingConfig says how to ping. The zero value of a field stands for its default.
type PingConfig struct {
	Count    int           // echo requests, at most 65535; default 100
	Interval time.Duration // between two requests; default 10 ms
	// Sizes are the payloads in bytes, 0 to 65507, used in turn; larger than the MTU less 28 (IPv4)
	// or 48 (IPv6) is sent in fragments. Default 56.
	Sizes   []int
	Timeout time.Duration // after which a request counts as lost; default 5 s, so that a machine that stands still for a moment loses none
	// Peer is the namespace of the address pinged, where the requests' checksum errors are
	// counted; nil if it is not at hand.
	Peer *netns.NS
}

func (c PingConfig) withDefaults() (PingConfig, error) {
	if c.Count == 0 {
		c.Count = 100
	}
	if c.Interval == 0 {
		c.Interval = 10 * time.Millisecond
	}
	if len(c.Sizes) == 0 {
		c.Sizes = []int{56}
	}
	if c.Timeout == 0 {
		c.Timeout = 5 * time.Second
	}
	if c.Count < 0 || c.Count > maxPing {
		return c, fmt.Errorf("ping: count %d: must be 1 to %d", c.Count, maxPing)
	}
	for _, s := range c.Sizes {
		if s < 0 || s > maxPingPayload {
			return c, fmt.Errorf("ping: size %d: must be 0 to %d", s, maxPingPayload)
		}
	}
	if c.Interval < 0 || c.Timeout < 0 {
		return c, errors.New("ping: interval and timeout must not be negative")
	}
	return c, nil
}

// RTT sums up round trips, in microseconds.
type RTT struct {
	P50 float64 `json:"p50"`
	P90 float64 `json:"p90"`
	P99 float64 `json:"p99"`
	Max float64 `json:"max"`
}

// PingResult is what became of the requests.
type PingResult struct {
	Sent       int `json:"sent"` // requests, those that the kernel refused to send included
	Received   int `json:"received"`
	Lost       int `json:"lost"` // no intact reply within the timeout
	Duplicates int `json:"duplicates"`
	// Corrupt counts replies with another payload than their request had, and ChecksumErrors.
	Corrupt        uint64 `json:"corrupt"`
	ChecksumErrors uint64 `json:"checksum_errors"` // packets refused by the kernel, also in Peer
	SendErrors     int    `json:"send_errors"`     // requests that the kernel refused to send
	// RTT is of the replies received, from just before the request's system call until after the
	// reply's: the wake-up of this process included.
	RTT RTT `json:"rtt_us"`

	hist *hdrhistogram.Histogram // of nanoseconds
}

func newHist() *hdrhistogram.Histogram {
	return hdrhistogram.New(1, int64(time.Minute), 3)
}

func rttOf(h *hdrhistogram.Histogram) RTT {
	if h == nil || h.TotalCount() == 0 {
		return RTT{}
	}
	us := func(ns int64) float64 { return float64(ns) / 1e3 }
	return RTT{
		P50: us(h.ValueAtQuantile(50)),
		P90: us(h.ValueAtQuantile(90)),
		P99: us(h.ValueAtQuantile(99)),
		Max: us(h.Max()),
	}
}

// pinger is a socket for echo requests to one address.
type pinger struct {
	f    *os.File
	v4   bool
	raw  bool // a raw socket: replies to others are seen, IPv4 comes with its header
	id   uint16
	seed uint64
}

// newPinger opens a socket in the namespace: a raw one, or a datagram one where the caller has no
// CAP_NET_RAW and net.ipv4.ping_group_range allows it.
func newPinger(from *netns.NS, dst netip.Addr) (*pinger, error) {
	if !dst.IsValid() {
		return nil, errors.New("ping: no address")
	}
	dst = dst.Unmap()
	var r [10]byte
	if _, err := unix.Getrandom(r[:], 0); err != nil {
		return nil, fmt.Errorf("ping %v: %w", dst, err)
	}
	p := &pinger{
		v4: dst.Is4(), raw: true,
		id:   binary.LittleEndian.Uint16(r[8:]),
		seed: binary.LittleEndian.Uint64(r[:]),
	}
	proto := unix.IPPROTO_ICMP
	if !p.v4 {
		proto = unix.IPPROTO_ICMPV6
	}
	err := in(from, func() error {
		const flags = unix.SOCK_CLOEXEC | unix.SOCK_NONBLOCK
		fd, err := unix.Socket(family(dst), unix.SOCK_RAW|flags, proto)
		if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
			p.raw = false
			fd, err = unix.Socket(family(dst), unix.SOCK_DGRAM|flags, proto)
		}
		if err != nil {
			return fmt.Errorf("ping %v: open an ICMP socket: %w", dst, err)
		}
		sa, err := sockaddr(dst, 0)
		if err == nil {
			// Connected: packets from elsewhere do not reach the socket.
			if err = unix.Connect(fd, sa); err != nil {
				err = fmt.Errorf("ping %v: no way there: %w", dst, err)
			}
		}
		if err == nil && !p.raw {
			p.id, err = boundPort(fd) // the kernel writes it in as the identifier
		}
		if err != nil {
			unix.Close(fd)
			return err
		}
		p.f = os.NewFile(uintptr(fd), "icmp")
		return nil
	})
	if err != nil {
		return nil, err
	}
	return p, nil
}

func boundPort(fd int) (uint16, error) {
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return 0, fmt.Errorf("getsockname: %w", err)
	}
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return uint16(sa.Port), nil
	case *unix.SockaddrInet6:
		return uint16(sa.Port), nil
	}
	return 0, errors.New("getsockname: a socket of another family")
}

// request writes request number i (from 1) of n payload bytes to b.
func (p *pinger) request(b []byte, i, n int) []byte {
	b = b[:icmpHeader+n]
	clear(b[:icmpHeader])
	b[0] = echoRequest6
	if p.v4 {
		b[0] = echoRequest4
	}
	binary.BigEndian.PutUint16(b[4:], p.id)
	binary.BigEndian.PutUint16(b[6:], uint16(i))
	for rest, k := b[icmpHeader:], 0; len(rest) > 0; k++ {
		rest = rest[copy(rest, p.payload(i, k)):]
	}
	if p.v4 {
		binary.BigEndian.PutUint16(b[2:], inetSum(b)) // ICMPv6's is the kernel's (RFC 3542 section 3.1)
	}
	return b
}

// payload returns piece k of the payload of request i, chunkLen bytes.
func (p *pinger) payload(i, k int) []byte {
	at := mix(p.seed^uint64(i)<<8^uint64(k)) % patternLen
	return pattern()[at : at+chunkLen]
}

// reply returns the number and the payload of a reply to one of our requests.
func (p *pinger) reply(b []byte) (i int, payload []byte, ok bool) {
	if p.v4 && p.raw {
		if len(b) < 20 || len(b) < int(b[0]&15)*4 {
			return 0, nil, false
		}
		b = b[int(b[0]&15)*4:]
	}
	if len(b) < icmpHeader {
		return 0, nil, false
	}
	want := byte(echoReply6)
	if p.v4 {
		want = echoReply4
	}
	if b[0] != want || b[1] != 0 || binary.BigEndian.Uint16(b[4:]) != p.id {
		return 0, nil, false
	}
	if p.v4 && p.raw && inetSum(b) != 0 {
		return 0, nil, false // the kernel refused and counted it too
	}
	return int(binary.BigEndian.Uint16(b[6:])), b[icmpHeader:], true
}

// intact reports whether a reply's payload is that of request i, n bytes long.
func (p *pinger) intact(payload []byte, i, n int) bool {
	if len(payload) != n {
		return false
	}
	for k := 0; len(payload) > 0; k++ {
		m := min(len(payload), chunkLen)
		if !bytes.Equal(payload[:m], p.payload(i, k)[:m]) {
			return false
		}
		payload = payload[m:]
	}
	return true
}

// inetSum is the checksum of RFC 1071; over data that holds its checksum, it is 0.
func inetSum(b []byte) uint16 {
	var s uint64
	for ; len(b) >= 2; b = b[2:] {
		s += uint64(b[0])<<8 | uint64(b[1])
	}
	if len(b) == 1 {
		s += uint64(b[0]) << 8
	}
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return ^uint16(s)
}

// Ping sends echo requests from a namespace (nil: that of this process) to an address, which may
// be in the same namespace, and checks the replies. Requests that go unanswered, also because the
// link is away, are no error but counted; corrupt ones are both. It needs CAP_NET_RAW in the namespace, or a
// net.ipv4.ping_group_range that allows it. When ctx ends it returns what was counted until then,
// and an error.
func Ping(ctx context.Context, from *netns.NS, dst netip.Addr, cfg PingConfig) (PingResult, error) {
	res := PingResult{hist: newHist()}
	cfg, err := cfg.withDefaults()
	if err != nil {
		return res, err
	}
	ends := [2]Endpoint{{NS: from}, {NS: from}}
	if cfg.Peer != nil {
		ends[1].NS = cfg.Peer
	}
	sums, err := newCsum(ends[0], ends[1])
	if err != nil {
		return res, err
	}
	p, err := newPinger(from, dst)
	if err != nil {
		return res, err
	}
	defer p.f.Close()

	sentAt := make([]atomic.Int64, cfg.Count+1) // nanoseconds since begin; 0 is not sent yet
	begin := time.Now()
	since := func() int64 { return max(1, int64(time.Since(begin))) }
	answered := make([]bool, cfg.Count+1)
	received := make(chan error, 1)
	go func() {
		received <- p.receive(cfg, sentAt, answered, since, &res, true)
	}()

	err = p.send(ctx, cfg, sentAt, since, &res)
	if err != nil {
		p.f.SetReadDeadline(time.Now())
	} else {
		p.f.SetReadDeadline(time.Now().Add(cfg.Timeout))
	}
	stop := context.AfterFunc(ctx, func() { p.f.SetReadDeadline(time.Now()) })
	rerr := <-received
	stop()
	if err == nil && rerr == nil && ctx.Err() == nil {
		// What comes twice comes at once.
		p.f.SetReadDeadline(time.Now().Add(pingLinger))
		rerr = p.receive(cfg, sentAt, answered, since, &res, false)
	}
	if err == nil {
		err = rerr
	}
	if err == nil && res.Received < res.Sent {
		err = ctxErr(ctx, fmt.Sprintf("ping %v", dst))
	}
	res.Lost = res.Sent - res.Received
	res.RTT = rttOf(res.hist)
	sum, serr := sums()
	res.ChecksumErrors = sum.ip + sum.icmp
	res.Corrupt += res.ChecksumErrors
	if err == nil {
		err = serr
	}
	if err == nil && res.Corrupt > 0 {
		err = fmt.Errorf("ping %v: %w: %d packets", dst, ErrCorrupt, res.Corrupt)
	}
	return res, err
}

// send sends the requests; the socket's outages are counted.
func (p *pinger) send(ctx context.Context, cfg PingConfig, sentAt []atomic.Int64, since func() int64, res *PingResult) error {
	size := 0
	for _, s := range cfg.Sizes {
		size = max(size, s)
	}
	buf := make([]byte, icmpHeader+size)
	tick := time.NewTicker(max(cfg.Interval, 1))
	defer tick.Stop()
	for i := 1; i <= cfg.Count; i++ {
		if i > 1 {
			select {
			case <-tick.C:
			case <-ctx.Done():
			}
		}
		if err := ctxErr(ctx, "ping"); err != nil {
			return err
		}
		b := p.request(buf, i, cfg.Sizes[(i-1)%len(cfg.Sizes)])
		res.Sent = i
		sentAt[i].Store(since())
		_, err := p.f.Write(b)
		if err != nil && outage(err) {
			_, err = p.f.Write(b) // the first may have fetched the error of a request before
		}
		if err == nil {
			continue
		}
		if !outage(err) {
			return fmt.Errorf("ping: send %d bytes: %w", len(b), err)
		}
		res.SendErrors++
	}
	return nil
}

// receive takes replies until the read deadline passes, or all have come and these are enough.
func (p *pinger) receive(cfg PingConfig, sentAt []atomic.Int64, answered []bool, since func() int64, res *PingResult, enough bool) error {
	buf := make([]byte, 1<<16)
	for !enough || res.Received < cfg.Count {
		n, err := p.f.Read(buf)
		now := since()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return nil
		}
		if err != nil {
			if outage(err) {
				continue
			}
			return fmt.Errorf("ping: receive: %w", err)
		}
		i, payload, ok := p.reply(buf[:n])
		if !ok {
			continue
		}
		if i == 0 || i > cfg.Count || sentAt[i].Load() == 0 {
			res.Corrupt++ // a reply to what we never asked
			continue
		}
		if !p.intact(payload, i, cfg.Sizes[(i-1)%len(cfg.Sizes)]) {
			res.Corrupt++
			continue
		}
		if answered[i] {
			res.Duplicates++
			continue
		}
		rtt := now - sentAt[i].Load()
		if rtt > int64(cfg.Timeout) {
			continue
		}
		answered[i] = true
		res.Received++
		res.hist.RecordValue(min(rtt, int64(time.Minute)))
	}
	return nil
}

// WaitReachable pings from a namespace until an answer comes: until the carrier is on, addresses
// are usable and neighbours resolved. It returns an error that says what was last in the way when
// ctx ends.
func WaitReachable(ctx context.Context, from *netns.NS, dst netip.Addr) error {
	last := errors.New("no answer")
	for {
		res, err := Ping(ctx, from, dst, PingConfig{Count: 1, Timeout: 100 * time.Millisecond})
		if err == nil && res.Received > 0 {
			return nil
		}
		if err != nil && ctx.Err() == nil {
			if !outage(err) {
				return err
			}
			last = err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for %v: %w (%w)", dst, last, context.Cause(ctx))
		case <-time.After(10 * time.Millisecond):
		}
	}
}
