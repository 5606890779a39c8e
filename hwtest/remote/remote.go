//go:build linux

// Package remote tries a link whose other end is another machine: that one echoes, this one sends and compares.
// Both directions carry every byte.
//
// In the room: the echo and the check. Never in it: machines, interfaces, the two ends of the
// link themselves; traffic between two namespaces of one machine (package traffic).
package remote

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/boardlink/boardlink/trial/netns"
	"github.com/boardlink/boardlink/trial/traffic"
	"golang.org/x/sys/unix"
)

// Port is where Echo listens.
const Port = 7007

// Echo sends back what comes in by TCP and UDP at the Port, until ctx ends. Errors are those of the listening sockets.
func Echo(ctx context.Context) error {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", fmt.Sprintf(":%d", Port))
	if err != nil {
		return err
	}
	u, err := lc.ListenPacket(ctx, "udp", fmt.Sprintf(":%d", Port))
	if err != nil {
		l.Close()
		return err
	}
	context.AfterFunc(ctx, func() { l.Close(); u.Close() })
	go func() {
		buf := make([]byte, 64<<10)
		for {
			n, from, err := u.ReadFrom(buf)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				u.WriteTo(buf[:n], from)
			}
		}
	}()
	for {
		c, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		go func() {
			defer c.Close()
			buf := make([]byte, 256<<10)
			for {
				n, err := c.Read(buf)
				if n > 0 {
					if _, werr := c.Write(buf[:n]); werr != nil {
						return
					}
				}
				if err != nil {
					return
				}
			}
		}()
	}
}

// Config says what to check. The zero value of a field stands for its default.
type Config struct {
	Pings int           // default 100
	Bytes int64         // there and back by TCP; default 32 MiB
	Ready time.Duration // how long the path may take to come up; default 30 s
	Every time.Duration // between pings; default 10 ms
	// Until, if not nil, ends what goes by TCP when it is closed, however many bytes that are; Done counts those that came back.
	Until <-chan struct{}
	Done  *atomic.Int64
	Pause time.Duration // after each 64 KiB that are sent; default none
}

// Result is what was found.
type Result struct {
	Ping    traffic.PingCounts `json:"ping"`
	RTT     traffic.RTT        `json:"rtt_us"`
	Bytes   int64              `json:"bytes"`   // compared
	Seconds float64            `json:"seconds"` // they took there and back
	Gbps    float64            `json:"gbps"`    // each way
	Corrupt uint64             `json:"corrupt"`
}

// Check pings addr from the namespace (nil: this process's own) and sends bytes to its Echo, of which
// each that comes back is compared. Loss and corruption are in the result and, together with what went wrong otherwise, in the
// error.
func Check(ctx context.Context, ns *netns.NS, addr netip.Addr, c Config) (r Result, err error) {
	if c.Pings == 0 {
		c.Pings = 100
	}
	if c.Bytes == 0 {
		c.Bytes = 32 << 20
	}
	if c.Ready == 0 {
		c.Ready = 30 * time.Second
	}
	if c.Every == 0 {
		c.Every = 10 * time.Millisecond
	}
	rctx, cancel := context.WithTimeout(ctx, c.Ready)
	err = traffic.WaitReachable(rctx, ns, addr)
	cancel()
	if err != nil {
		return r, err
	}
	p, err := traffic.Ping(ctx, ns, addr, traffic.PingConfig{Count: c.Pings, Interval: c.Every, Sizes: []int{56, 0, 1400}, Timeout: 5 * time.Second})
	r.Ping = traffic.PingCounts{Sent: p.Sent, Received: p.Received, Lost: p.Lost, Duplicates: p.Duplicates}
	r.RTT, r.Corrupt = p.RTT, p.Corrupt
	if err != nil {
		return r, err
	}
	if p.Lost > 0 {
		return r, fmt.Errorf("%d of %d pings to %v were lost", p.Lost, p.Sent, addr)
	}
	if c.Until != nil {
		c.Bytes = math.MaxInt64 - 1<<30
	}
	return r, r.tcp(ctx, ns, addr, c)
}

// word is the 8 bytes at offset 8*i of the stream: each depends on its place.
func word(seed, i uint64) uint64 {
	x := seed + i*0x9e3779b97f4a7c15 // splitmix64
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

func putWord(b []byte, v uint64) { binary.LittleEndian.PutUint64(b, v) }

func getWord(b []byte) uint64 { return binary.LittleEndian.Uint64(b) }

func fill(b []byte, seed uint64, off int64) {
	for i := 0; i < len(b); i += 8 {
		binary.LittleEndian.PutUint64(b[i:], word(seed, uint64(off+int64(i))/8))
	}
}

func (r *Result) tcp(ctx context.Context, ns *netns.NS, addr netip.Addr, c Config) error {
	const block = 64 << 10
	total := (c.Bytes + block - 1) / block * block
	conn, err := dial(ctx, ns, addr)
	// The other end may be about to listen.
	for end := time.Now().Add(c.Ready); errors.Is(err, unix.ECONNREFUSED) && ctx.Err() == nil && time.Now().Before(end); conn, err = dial(ctx, ns, addr) {
		time.Sleep(20 * time.Millisecond)
	}
	if err != nil {
		return err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	seed := uint64(time.Now().UnixNano())
	begin := time.Now()
	sent, out := make(chan error, 1), int64(0)
	go func() {
		b := make([]byte, block)
		for off := int64(0); off < total; off += block {
			out = off
			select {
			case <-c.Until:
				// What is under way comes back, and then the end.
				sent <- conn.(*net.TCPConn).CloseWrite()
				return
			default:
			}
			fill(b, seed, off)
			if _, err := conn.Write(b); err != nil {
				sent <- fmt.Errorf("send to %v at offset %d: %w", addr, off, err)
				conn.SetReadDeadline(time.Unix(1, 0))
				return
			}
			time.Sleep(c.Pause)
		}
		out = total
		sent <- nil
	}()
	got, want := make([]byte, block), make([]byte, block)
	for off := int64(0); off < total; off += block {
		// Idle for this long, nothing comes any more.
		conn.SetReadDeadline(time.Now().Add(30 * time.Second))
		if ctx.Err() != nil {
			break
		}
		_, err = io.ReadFull(conn, got)
		if err == io.EOF && c.Until != nil {
			select {
			case <-c.Until:
				err = nil
			default:
			}
			break
		}
		if err != nil {
			err = fmt.Errorf("receive from %v at offset %d: %w", addr, off, err)
			break
		}
		fill(want, seed, off)
		for i := range got {
			if got[i] != want[i] {
				r.Corrupt++
			}
		}
		r.Bytes += block
		if c.Done != nil {
			c.Done.Add(block)
		}
	}
	conn.Close()
	err = errors.Join(err, <-sent, ctx.Err())
	if err == nil && out != r.Bytes {
		err = fmt.Errorf("%d bytes were sent to %v, and %d came back", out, addr, r.Bytes)
	}
	r.Seconds = time.Since(begin).Seconds()
	r.Gbps = float64(r.Bytes) * 8 / r.Seconds / 1e9
	if r.Corrupt != 0 {
		err = errors.Join(err, fmt.Errorf("%d bytes of %d came back wrong: %w", r.Corrupt, r.Bytes, traffic.ErrCorrupt))
	}
	return err
}
