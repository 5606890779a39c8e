//go:build linux

package netbench

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/boardlink/boardlink/trial/netns"
	"github.com/boardlink/boardlink/trial/traffic"
	"golang.org/x/sys/unix"
)

const (
	blastBuffer = 128 << 10              // bytes of a read and of a write
	blastTick   = 50 * time.Millisecond  // how long a call may wait, so that stop is seen
	blastGrace  = 5 * time.Second        // for what is under way when the senders stop
	lingering   = 100 * time.Millisecond // at most, before a measurement: connections grow their windows
)

// load is traffic that goes on until it is stopped.
type load interface {
	// received returns the bytes (TCP) or packets (UDP) that have arrived, sent what the kernel took.
	received() uint64
	sent() uint64
	stop() error
}

// blast is TCP streams, as fast as can be, whose bytes nobody looks at: a thread for each end of each.
type blast struct {
	from, to traffic.Endpoint
	fds      []int
	n, out   atomic.Uint64
	stopping atomic.Bool
	wg       sync.WaitGroup
	mu       sync.Mutex
	err      error
}

func (b *blast) fail(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.err == nil {
		b.err = fmt.Errorf("tcp from %v to %v: %w", b.from, b.to, err)
	}
}

// startBlast starts streams of the congestion control of a name.
func startBlast(from, to traffic.Endpoint, streams int, congestion string) (_ *blast, err error) {
	b := &blast{from: from, to: to}
	defer func() {
		if err != nil {
			b.close()
			err = fmt.Errorf("tcp from %v to %v: %w", from, to, err)
		}
	}()
	var ln int
	var at unix.Sockaddr
	err = to.NS.Do(func() error {
		if ln, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		if err := traffic.SetCongestion(ln, congestion); err != nil {
			return err
		}
		if err := errors.Join(unix.Bind(ln, &unix.SockaddrInet4{Addr: to.Addr.As4()}), unix.Listen(ln, streams), limit(ln, blastGrace)); err != nil {
			return err
		}
		at, err = unix.Getsockname(ln)
		return err
	})
	if ln > 0 {
		defer unix.Close(ln)
	}
	if err != nil {
		return nil, err
	}
	for range streams {
		snd, err := b.socket(from.NS, congestion)
		if err != nil {
			return nil, err
		}
		if err := limit(snd, blastGrace); err != nil {
			return nil, err
		}
		// With a time limit the kernel does not go on by itself behind a signal (signal(7)): the runtime sends them.
		err = unix.Connect(snd, at)
		for errors.Is(err, unix.EINTR) {
			err = unix.Connect(snd, at) // waits on for the same connection
		}
		if err != nil && !errors.Is(err, unix.EISCONN) {
			return nil, fmt.Errorf("connect: %w", err)
		}
		rcv, _, err := unix.Accept4(ln, unix.SOCK_CLOEXEC)
		for errors.Is(err, unix.EINTR) {
			rcv, _, err = unix.Accept4(ln, unix.SOCK_CLOEXEC)
		}
		if err != nil {
			return nil, fmt.Errorf("accept: %w", err)
		}
		b.fds = append(b.fds, rcv)
		if err := errors.Join(limit(snd, blastTick), limit(rcv, blastTick)); err != nil {
			return nil, err
		}
	}
	for i := 0; i < len(b.fds); i += 2 {
		snd, rcv := b.fds[i], b.fds[i+1]
		b.wg.Go(func() { b.send(snd) })
		b.wg.Go(func() { b.receive(rcv) })
	}
	return b, nil
}

// socket makes one that b closes.
func (b *blast) socket(ns *netns.NS, congestion string) (fd int, err error) {
	err = ns.Do(func() error {
		if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		b.fds = append(b.fds, fd)
		return traffic.SetCongestion(fd, congestion)
	})
	return fd, err
}

// limit bounds the time that calls on a socket wait.
func limit(fd int, d time.Duration) error {
	tv := unix.NsecToTimeval(int64(d))
	return errors.Join(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv))
}

func again(err error) bool { return errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) }

func (b *blast) send(fd int) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer unix.Shutdown(fd, unix.SHUT_WR)
	buf := make([]byte, blastBuffer)
	for !b.stopping.Load() {
		n, err := unix.Write(fd, buf)
		if n > 0 {
			b.out.Add(uint64(n))
		}
		if err != nil && !again(err) {
			b.fail(fmt.Errorf("send: %w", err))
			return
		}
	}
}

func (b *blast) receive(fd int) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	buf := make([]byte, blastBuffer)
	var since time.Time
	for {
		n, err := unix.Read(fd, buf)
		switch {
		case n > 0:
			b.n.Add(uint64(n))
			since = time.Time{}
		case err == nil:
			return
		case !again(err):
			b.fail(fmt.Errorf("receive: %w", err))
			return
		case b.stopping.Load():
			if since.IsZero() {
				since = time.Now()
			} else if time.Since(since) > blastGrace {
				b.fail(errors.New("the end of a stream does not arrive"))
				return
			}
		}
	}
}

func (b *blast) received() uint64 { return b.n.Load() }
func (b *blast) sent() uint64     { return b.out.Load() }

func (b *blast) stop() error {
	b.stopping.Store(true)
	b.wg.Wait()
	b.close()
	if b.err == nil && b.n.Load() != b.out.Load() {
		b.fail(fmt.Errorf("%d bytes sent, %d received", b.out.Load(), b.n.Load()))
	}
	return b.err
}

func (b *blast) close() {
	for _, fd := range b.fds {
		unix.Close(fd)
	}
}

// checked is a blast with every byte checked.
type checked struct{ *traffic.TCPTraffic }

func (c checked) received() uint64 { return uint64(c.Stats().Verified) }
func (c checked) sent() uint64     { return uint64(c.Stats().Sent) }

func (c checked) stop() error {
	_, err := c.Stop()
	return err
}

func startTCP(ctx context.Context, from, to traffic.Endpoint, streams int, c *Config) (load, error) {
	if !c.Verified {
		return startBlast(from, to, streams, c.Congestion)
	}
	t, err := traffic.StartTCP(ctx, from, to, traffic.TCPConfig{Streams: streams, BufferSize: blastBuffer, Congestion: c.Congestion})
	if err != nil {
		return nil, err
	}
	return checked{t}, nil
}

// packets is small UDP packets, each checked: that costs some 20 ns of microseconds.
type packets struct{ *traffic.UDPTraffic }

func (p packets) received() uint64 { return p.Stats().Received }
func (p packets) sent() uint64     { return p.Stats().Sent }

func (p packets) stop() error {
	_, err := p.Stop()
	return err
}

func startUDP(ctx context.Context, from, to traffic.Endpoint) (load, error) {
	u, err := traffic.StartUDP(ctx, from, to, traffic.UDPConfig{Size: 64, Quiet: 20 * time.Millisecond})
	if err != nil {
		return nil, err
	}
	return packets{u}, nil
}
