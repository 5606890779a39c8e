//go:build linux

package traffic

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	udpBatch    = 64       // packets of a system call
	udpTimeout  = 20e6     // nanoseconds that a system call may wait, so that Stop is seen
	udpRcvbuf   = 16 << 20 // bytes asked for; the kernel may give less
	udpQuiet    = 200 * time.Millisecond
	udpMaxBytes = 65507 // RFC 768 in an IPv4 packet of 65535 bytes
)

// UDPConfig says how to send UDP packets. The zero value of a field stands for its default.
type UDPConfig struct {
	Duration time.Duration // of sending, of UDP only; default 3 s
	Size     int           // payload of a packet in bytes, 24 to 65507; default 64
	Rate     float64       // packets per second; default as fast as can be
	Port     int           // of the receiver; default one that is free
	// Segments is how many packets the kernel makes of one that is sent (UDP_SEGMENT, Linux 4.18),
	// at most 64 and 65507 bytes together; default 1.
	Segments int
	// Lossless makes a lost packet an error. Give a Rate that the path is known to carry, and see
	// WaitReachable: packets also get lost while a neighbour is resolved.
	Lossless bool
	// Quiet is how long Stop waits for packets that are missing, behind the last that came; default 200 ms.
	Quiet time.Duration
}

func (c UDPConfig) withDefaults() (UDPConfig, error) {
	if c.Duration == 0 {
		c.Duration = 3 * time.Second
	}
	if c.Size == 0 {
		c.Size = 64
	}
	if c.Segments == 0 {
		c.Segments = 1
	}
	if c.Quiet == 0 {
		c.Quiet = udpQuiet
	}
	switch {
	case c.Size < udpHeader || c.Size > udpMaxBytes:
		return c, fmt.Errorf("udp: packets of %d bytes: must be %d to %d", c.Size, udpHeader, udpMaxBytes)
	case c.Segments < 0 || c.Segments > 64 || c.Segments*c.Size > udpMaxBytes:
		return c, fmt.Errorf("udp: %d segments of %d bytes: must be at most 64 and %d bytes together", c.Segments, c.Size, udpMaxBytes)
	case c.Port < 0 || c.Port > 65535:
		return c, fmt.Errorf("udp: port %d: must be 1 to 65535", c.Port)
	case c.Duration < 0 || c.Quiet < 0 || !(c.Rate >= 0):
		return c, errors.New("udp: duration, rate and quiet time must not be negative")
	}
	return c, nil
}

// UDPResult is what became of the packets.
type UDPResult struct {
	Sent     uint64 `json:"sent"`     // packets that the sender's kernel took
	Received uint64 `json:"received"` // intact, each once
	Lost     uint64 `json:"lost"`     // Sent without Received
	// Corrupt counts packets whose length, checksum or payload was wrong, and ChecksumErrors.
	Corrupt        uint64 `json:"corrupt"`
	ChecksumErrors uint64 `json:"checksum_errors"` // packets refused by the kernel, in both namespaces
	Reordered      uint64 `json:"reordered"`       // received after a packet that was sent later
	Duplicates     uint64 `json:"duplicates"`      // intact, received before; or over a million packets late
	Foreign        uint64 `json:"foreign"`         // of another run, or of somebody else
	// SendErrors counts system calls refused because the link was away or full; the packets were
	// offered again.
	SendErrors   uint64  `json:"send_errors"`
	Seconds      float64 `json:"seconds"` // of sending
	KppsSent     float64 `json:"kpps_sent"`
	KppsReceived float64 `json:"kpps_received"` // Received by the time until the last was received
	// LongestGap is the longest time in which nothing intact was received.
	LongestGap time.Duration `json:"longest_gap_ns"`
}

// UDPStats is what the packets did so far.
type UDPStats struct {
	Sent, Received, Corrupt, Reordered, Duplicates, Foreign, SendErrors uint64

	LastProgress time.Time     // when the last intact packet came
	LongestGap   time.Duration // longest time without, the one under way included
	Err          error         // that ended the sender or the receiver
}

// UDPTraffic is UDP packets under way. Its methods may be called from any goroutine.
type UDPTraffic struct {
	cfg      UDPConfig
	from, to Endpoint
	snd, rcv int // sockets
	token    uint64
	begin    time.Time
	sums     func() (csum, error)
	stopSend chan struct{}
	stopRecv chan struct{}
	sending  sync.WaitGroup
	recving  sync.WaitGroup

	sent       atomic.Uint64
	offered    atomic.Uint64 // packets below this number may be under way
	sendErrors atomic.Uint64
	last       atomic.Int64  // nanoseconds since begin, of the last intact packet
	gap        atomic.Int64  // longest, in nanoseconds
	sentFor    time.Duration // the sender's until sending is done

	received, corrupt, reordered, duplicates, foreign atomic.Uint64 // see tally

	mu   sync.Mutex
	errs []error

	stopOnce sync.Once
	res      UDPResult
	err      error
}

func (u *UDPTraffic) fail(err error) {
	u.mu.Lock()
	u.errs = append(u.errs, fmt.Errorf("udp from %v to %v: %w", u.from, u.to, err))
	u.mu.Unlock()
}

// UDP sends packets from one endpoint to the other for cfg.Duration and checks each that arrives.
// Lost packets are no error unless cfg.Lossless is set; corrupt ones are, beside the result. When
// ctx ends, so does the sending, which is an error too.
func UDP(ctx context.Context, from, to Endpoint, cfg UDPConfig) (UDPResult, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return UDPResult{}, err
	}
	u, err := StartUDP(ctx, from, to, cfg)
	if err != nil {
		return UDPResult{}, err
	}
	select {
	case <-time.After(cfg.Duration):
	case <-ctx.Done():
		u.fail(context.Cause(ctx))
	}
	return u.Stop()
}

// StartUDP starts to send packets from one endpoint to the other, until Stop, which must be
// called, or until ctx ends. The link may go and come meanwhile.
func StartUDP(ctx context.Context, from, to Endpoint, cfg UDPConfig) (*UDPTraffic, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	if err := checkEnds(from, to); err != nil {
		return nil, err
	}
	if err := ctxErr(ctx, "udp"); err != nil {
		return nil, err
	}
	sums, err := newCsum(from, to)
	if err != nil {
		return nil, err
	}
	pattern()
	u := &UDPTraffic{
		cfg: cfg, from: from, to: to, sums: sums, snd: -1, rcv: -1,
		stopSend: make(chan struct{}), stopRecv: make(chan struct{}),
	}
	var r [8]byte
	if _, err := unix.Getrandom(r[:], 0); err != nil {
		return nil, fmt.Errorf("udp: %w", err)
	}
	u.token = le.Uint64(r[:])
	if err := u.open(); err != nil {
		u.close()
		return nil, fmt.Errorf("udp from %v to %v: %w", from, to, err)
	}
	u.begin = time.Now()
	u.recving.Go(func() {
		if err := u.receive(); err != nil {
			u.fail(err)
		}
	})
	u.sending.Go(func() {
		if err := u.send(ctx.Done()); err != nil {
			u.fail(err)
		}
		u.sentFor = time.Since(u.begin)
	})
	return u, nil
}

// open makes the sockets.
func (u *UDPTraffic) open() error {
	var port uint16
	err := in(u.to.NS, func() (err error) {
		if u.rcv, err = udpSocket(u.to, u.cfg.Port); err != nil {
			return err
		}
		// The first needs CAP_NET_ADMIN, the second gives at most net.core.rmem_max.
		if unix.SetsockoptInt(u.rcv, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, udpRcvbuf) != nil {
			unix.SetsockoptInt(u.rcv, unix.SOL_SOCKET, unix.SO_RCVBUF, udpRcvbuf)
		}
		port, err = boundPort(u.rcv)
		return err
	})
	if err != nil {
		return err
	}
	return in(u.from.NS, func() (err error) {
		if u.snd, err = udpSocket(u.from, 0); err != nil {
			return err
		}
		if u.cfg.Segments > 1 {
			if err := unix.SetsockoptInt(u.snd, unix.IPPROTO_UDP, unix.UDP_SEGMENT, u.cfg.Size); err != nil {
				return fmt.Errorf("segments: set UDP_SEGMENT: %w: it needs Linux 4.18", err)
			}
		}
		sa, err := sockaddr(u.to.Addr, int(port))
		if err != nil {
			return err
		}
		if err := unix.Connect(u.snd, sa); err != nil {
			return fmt.Errorf("connect to port %d: %w", port, err)
		}
		return nil
	})
}

// udpSocket makes a socket bound to an endpoint, whose calls wait for udpTimeout at most. It must
// run in the namespace.
func udpSocket(e Endpoint, port int) (int, error) {
	fd, err := unix.Socket(family(e.Addr), unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open a socket: %w", err)
	}
	sa, err := sockaddr(e.Addr, port)
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	tv := unix.NsecToTimeval(udpTimeout)
	for _, opt := range []int{unix.SO_RCVTIMEO, unix.SO_SNDTIMEO} {
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, opt, &tv); err != nil {
			unix.Close(fd)
			return -1, fmt.Errorf("limit the waiting of a socket: %w", err)
		}
	}
	if err := unix.Bind(fd, sa); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("bind to port %d of %v: %w", port, e, err)
	}
	return fd, nil
}

func (u *UDPTraffic) close() {
	for _, fd := range []int{u.snd, u.rcv} {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

// mmsghdr is struct mmsghdr of sendmmsg(2).
type mmsghdr struct {
	hdr unix.Msghdr
	n   uint32 // bytes sent or received
}

// mmsg is messages of one buffer each. Nothing in it moves: the pointers in it are the collector's
// to see.
type mmsg struct {
	h   []mmsghdr
	iov []unix.Iovec
	buf [][]byte
}

func newMmsg(n, size int) *mmsg {
	m := &mmsg{h: make([]mmsghdr, n), iov: make([]unix.Iovec, n), buf: make([][]byte, n)}
	for i := range n {
		m.buf[i] = make([]byte, size)
		m.iov[i].Base = &m.buf[i][0]
		m.iov[i].SetLen(size)
		m.h[i].hdr.Iov = &m.iov[i]
		m.h[i].hdr.SetIovlen(1)
	}
	return m
}

// call runs sendmmsg or recvmmsg over the messages from..to and returns how many it served.
func (m *mmsg) call(trap uintptr, fd, from, to, flags int) (int, error) {
	n, _, errno := unix.Syscall6(trap, uintptr(fd), uintptr(unsafe.Pointer(&m.h[from])), uintptr(to-from), uintptr(flags), 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

// send sends until it shall stop. A packet's number is used up only when the kernel took it.
func (u *UDPTraffic) send(done <-chan struct{}) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	seg := u.cfg.Segments
	m := newMmsg(max(1, udpBatch/seg), u.cfg.Size*seg)
	var next uint64 // number of the first packet that the kernel has not taken
	filled := 0     // messages from next on that are written
	first := 0      // where the first of these is
	for {
		select {
		case <-u.stopSend:
			return nil
		case <-done:
			return nil
		default:
		}
		want := len(m.h)
		if u.cfg.Rate > 0 {
			due := int64(time.Since(u.begin).Seconds()*u.cfg.Rate) + 1 - int64(next)
			if due < int64(seg) {
				time.Sleep(min(time.Duration(float64(seg)/u.cfg.Rate*1e9), time.Millisecond))
				continue
			}
			want = int(min(int64(want), due/int64(seg)))
		}
		if filled == 0 {
			first = 0
			for ; filled < want; filled++ {
				u.fill(m.buf[filled], next+uint64(filled*seg))
			}
		}
		u.offered.Store(next + uint64(filled*seg))
		n, err := m.call(unix.SYS_SENDMMSG, u.snd, first, first+filled, 0)
		first += n
		filled -= n
		next += uint64(n * seg)
		u.sent.Store(next)
		if err == nil || errors.Is(err, unix.EINTR) {
			continue
		}
		if !outage(err) {
			return fmt.Errorf("send packet %d: %w", next, err)
		}
		u.sendErrors.Add(1)
		if !errors.Is(err, unix.ECONNREFUSED) && !errors.Is(err, unix.EAGAIN) {
			time.Sleep(200 * time.Microsecond) // do not spin while the link is away
		}
	}
}

// fill writes the packets of one message.
func (u *UDPTraffic) fill(b []byte, seq uint64) {
	for len(b) > 0 {
		putPacket(b[:u.cfg.Size], u.token, seq)
		b = b[u.cfg.Size:]
		seq++
	}
}

// receive takes packets and judges them until it shall stop.
func (u *UDPTraffic) receive() error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	m := newMmsg(udpBatch, u.cfg.Size+1) // one more, to see a packet that is too long
	ck := newPacketChecker(u.token, u.cfg.Size)
	for {
		select {
		case <-u.stopRecv:
			return nil
		default:
		}
		n, err := m.call(unix.SYS_RECVMMSG, u.rcv, 0, len(m.h), unix.MSG_WAITFORONE)
		if err != nil {
			if errors.Is(err, unix.EINTR) || outage(err) {
				continue
			}
			return fmt.Errorf("receive: %w", err)
		}
		limit := u.offered.Load()
		before := ck.received
		for i := range m.h[:n] {
			ck.check(m.buf[i][:m.h[i].n], limit)
		}
		if ck.received != before {
			u.progress(int64(time.Since(u.begin)))
		}
		u.received.Store(ck.received)
		u.corrupt.Store(ck.corrupt)
		u.reordered.Store(ck.reordered)
		u.duplicates.Store(ck.duplicates)
		u.foreign.Store(ck.foreign)
	}
}

// progress notes that data came at a time in nanoseconds since begin. The receiver's only.
func (u *UDPTraffic) progress(now int64) {
	if gap := now - u.last.Load(); gap > u.gap.Load() {
		u.gap.Store(gap)
	}
	u.last.Store(now)
}

// Stats returns what the packets did so far.
func (u *UDPTraffic) Stats() UDPStats {
	last := u.last.Load()
	s := UDPStats{
		Received:     u.received.Load(), // before Sent, so as not to be above it
		Corrupt:      u.corrupt.Load(),
		Reordered:    u.reordered.Load(),
		Duplicates:   u.duplicates.Load(),
		Foreign:      u.foreign.Load(),
		SendErrors:   u.sendErrors.Load(),
		LastProgress: u.begin.Add(time.Duration(last)),
		LongestGap:   time.Duration(max(u.gap.Load(), int64(time.Since(u.begin))-last)),
	}
	s.Sent = max(u.sent.Load(), s.Received) // it is noted after the system call
	u.mu.Lock()
	defer u.mu.Unlock()
	if len(u.errs) > 0 {
		s.Err = u.errs[0]
	}
	return s
}

// Stop ends the sending, waits until all packets have come or none has for a moment, and returns
// the result. A second Stop returns what the first did.
func (u *UDPTraffic) Stop() (UDPResult, error) {
	u.stopOnce.Do(func() { u.res, u.err = u.stop() })
	return u.res, u.err
}

func (u *UDPTraffic) stop() (UDPResult, error) {
	close(u.stopSend)
	u.sending.Wait()
	sent := u.sent.Load()
	quiet, before := time.Now(), u.received.Load()
	for u.received.Load() < sent && time.Since(quiet) < u.cfg.Quiet {
		time.Sleep(5 * time.Millisecond)
		if now := u.received.Load(); now != before {
			quiet, before = time.Now(), now
		}
	}
	close(u.stopRecv)
	u.recving.Wait()
	u.close()

	res := UDPResult{
		Sent:       sent,
		Received:   u.received.Load(),
		Corrupt:    u.corrupt.Load(),
		Reordered:  u.reordered.Load(),
		Duplicates: u.duplicates.Load(),
		Foreign:    u.foreign.Load(),
		SendErrors: u.sendErrors.Load(),
		Seconds:    u.sentFor.Seconds(),
		LongestGap: time.Duration(max(u.gap.Load(), int64(u.sentFor)-u.last.Load())),
	}
	res.Lost = sent - min(sent, res.Received)
	if res.Seconds > 0 {
		res.KppsSent = float64(sent) / res.Seconds / 1e3
		res.KppsReceived = float64(res.Received) / max(res.Seconds, float64(u.last.Load())/1e9) / 1e3
	}
	sum, err := u.sums()
	if err != nil {
		u.fail(err)
	}
	res.ChecksumErrors = sum.ip + sum.udp
	res.Corrupt += res.ChecksumErrors
	if res.Corrupt > 0 {
		u.fail(fmt.Errorf("%w: %d packets of %d", ErrCorrupt, res.Corrupt, sent))
	}
	if u.cfg.Lossless && res.Lost > 0 {
		u.fail(fmt.Errorf("%d packets of %d are lost", res.Lost, sent))
	}
	return res, oneLine(u.errs)
}
