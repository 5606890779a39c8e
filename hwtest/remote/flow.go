//go:build linux

package remote

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/boardlink/boardlink/trial/netns"
	"github.com/boardlink/boardlink/trial/traffic"
)

// Flow is one TCP connection to an Echo that goes on until it is stopped: what comes back is compared,
// every byte.
type Flow struct {
	conn net.Conn
	seed uint64
	sent int64
	got  atomic.Int64
	stop atomic.Bool
	ends chan error
	end  func() error
}

const (
	flowBlock = 32 << 10
	// flowPause is what the sender rests after each block: a machine without hardware
	// virtualization is not to be busy with this alone.
	flowPause = 2 * time.Millisecond
	// flowIdle is how long nothing may come back.
	flowIdle = 90 * time.Second
)

// NewFlow connects from the namespace (nil: this process's own) and begins to send.
func NewFlow(ctx context.Context, ns *netns.NS, addr netip.Addr) (*Flow, error) {
	f := &Flow{seed: uint64(time.Now().UnixNano()), ends: make(chan error, 2)}
	var err error
	if f.conn, err = dial(ctx, ns, addr); err != nil {
		return nil, err
	}
	f.end = sync.OnceValue(f.finish)
	go func() { f.ends <- f.send() }()
	go func() { f.ends <- f.receive() }()
	return f, nil
}

// dial connects to the Echo at addr, which may be about to start.
func dial(ctx context.Context, ns *netns.NS, addr netip.Addr) (c net.Conn, err error) {
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		err = in(ns, func() (err error) {
			d := net.Dialer{Timeout: 30 * time.Second}
			c, err = d.DialContext(ctx, "tcp", netip.AddrPortFrom(addr, Port).String())
			return err
		})
		if !errors.Is(err, syscall.ECONNREFUSED) || time.Now().After(end) {
			return c, err
		}
	}
}

// in runs f in the namespace; nil: here.
func in(ns *netns.NS, f func() error) error {
	if ns == nil {
		return f()
	}
	return ns.Do(f)
}

func (f *Flow) send() error {
	b := make([]byte, flowBlock)
	for off := int64(0); !f.stop.Load(); off += flowBlock {
		fill(b, f.seed, off)
		if _, err := f.conn.Write(b); err != nil {
			f.conn.Close()
			return fmt.Errorf("send at offset %d: %w", off, err)
		}
		f.sent = off + flowBlock
		time.Sleep(flowPause)
	}
	return f.conn.(*net.TCPConn).CloseWrite() // the Echo closes when all of it is back
}

func (f *Flow) receive() error {
	got, want := make([]byte, flowBlock), make([]byte, flowBlock)
	for off := int64(0); ; off += flowBlock {
		f.conn.SetReadDeadline(time.Now().Add(flowIdle))
		if _, err := io.ReadFull(f.conn, got); err != nil {
			f.conn.Close()
			if err == io.EOF {
				return nil
			}
			return fmt.Errorf("receive at offset %d: %w", off, err)
		}
		fill(want, f.seed, off)
		for i := range got {
			if got[i] != want[i] {
				f.conn.Close()
				return fmt.Errorf("offset %d: %#02x came back, %#02x was sent: %w", off+int64(i), got[i], want[i], traffic.ErrCorrupt)
			}
		}
		f.got.Store(off + flowBlock)
	}
}

// Bytes returns how many bytes have come back and were compared.
func (f *Flow) Bytes() int64 { return f.got.Load() }

// Advance waits until n more bytes have come back, or the connection has ended.
func (f *Flow) Advance(ctx context.Context, n int64) error {
	for want := f.Bytes() + n; f.Bytes() < want; time.Sleep(2 * time.Millisecond) {
		if ctx.Err() != nil {
			return fmt.Errorf("after %d bytes: %w", f.Bytes(), ctx.Err())
		}
		if len(f.ends) > 0 {
			return f.Stop()
		}
	}
	return nil
}

// Stop ends the connection, once what is under way has come back. The error tells what went wrong in all
// its life.
func (f *Flow) Stop() error { return f.end() }

func (f *Flow) finish() error {
	f.stop.Store(true)
	err := errors.Join(<-f.ends, <-f.ends)
	f.conn.Close()
	if err == nil && f.got.Load() != f.sent {
		err = fmt.Errorf("%d bytes came back of %d", f.got.Load(), f.sent)
	}
	return err
}

// UDP sends count datagrams of the sizes in turn to the Echo at addr, a few at a time, and compares
// every byte of what comes back. Datagrams that do not come back are an error.
func UDP(ctx context.Context, ns *netns.NS, addr netip.Addr, count int, sizes ...int) error {
	var c net.Conn
	dial := func() (err error) {
		var d net.Dialer
		c, err = d.DialContext(ctx, "udp", netip.AddrPortFrom(addr, Port).String())
		return err
	}
	if err := in(ns, dial); err != nil {
		return err
	}
	defer c.Close()
	const window, least = 8, 16
	seed := uint64(time.Now().UnixNano())
	size := func(i int) int { return max(least, sizes[i%len(sizes)]) &^ 7 }
	buf, want := make([]byte, 64<<10), make([]byte, 64<<10)
	for first := 0; first < count; first += window {
		n := min(window, count-first)
		for i := first; i < first+n; i++ {
			// Each begins with its number, which is not part of what depends on the seed.
			fill(buf[:size(i)], seed+uint64(i), 0)
			putWord(buf, uint64(i))
			if _, err := c.Write(buf[:size(i)]); err != nil {
				return err
			}
		}
		seen := map[uint64]bool{}
		for len(seen) < n {
			c.SetReadDeadline(time.Now().Add(20 * time.Second))
			k, err := c.Read(buf)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				return fmt.Errorf("%d of the %d datagrams from %d on came back", len(seen), n, first)
			}
			if err != nil {
				return err
			}
			i := uint64(0)
			if k >= least {
				i = getWord(buf)
			}
			if k < least || i < uint64(first) || i >= uint64(first+n) || k != size(int(i)) || seen[i] {
				return fmt.Errorf("a datagram of %d bytes with number %d came back, of those from %d to %d, or twice: %w", k, i, first, first+n-1, traffic.ErrCorrupt)
			}
			fill(want[:k], seed+i, 0)
			putWord(want, i)
			if string(buf[:k]) != string(want[:k]) {
				return fmt.Errorf("datagram %d of %d bytes came back changed: %w", i, k, traffic.ErrCorrupt)
			}
			seen[i] = true
		}
	}
	return nil
}
