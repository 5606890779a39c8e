//go:build linux

package traffic

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// A connection of the TCP test: the sender writes helloLen bytes (magic, seed), then the stream of
// the seed, then closes its half. The receiver answers into the half that is still open with
// reportLen bytes (magic, bytes of the stream received, bytes of them that were wrong, offset of
// the first of these or -1) and closes. All little-endian, 8 bytes each.
const (
	helloMagic  = 0x316d7374656b6c62 // "blketsm1"
	reportMagic = 0x317470726b656c62 // "blekrpt1"
	helloLen    = 16
	reportLen   = 32
)

// TCPConfig says how to run TCP streams. The zero value of a field stands for its default.
type TCPConfig struct {
	Duration   time.Duration // of sending, of TCP only; default 3 s
	Streams    int           // connections at once, at most 1024; default 1
	BufferSize int           // bytes of a read and at most of a write (which is at most 64 KiB); default 256 KiB
	Port       int           // to listen on at the receiver; default one that is free
	Rate       float64       // bytes per second that each stream sends; default as fast as can be
	// Congestion is the congestion control of both ends of the connections (SetCongestion); default the namespaces'.
	Congestion string
	// Grace is how long connecting, and the end of the streams after sending, may take; default 10 s.
	Grace time.Duration
}

func (c TCPConfig) withDefaults() (TCPConfig, error) {
	if c.Duration == 0 {
		c.Duration = 3 * time.Second
	}
	if c.Streams == 0 {
		c.Streams = 1
	}
	if c.BufferSize == 0 {
		c.BufferSize = 256 << 10
	}
	if c.Grace == 0 {
		c.Grace = 10 * time.Second
	}
	switch {
	case c.Streams < 0 || c.Streams > 1024:
		return c, fmt.Errorf("tcp: %d streams: must be 1 to 1024", c.Streams)
	case c.BufferSize < 0 || c.BufferSize > 1<<30:
		return c, fmt.Errorf("tcp: buffers of %d bytes: must be 1 to 1 GiB", c.BufferSize)
	case c.Port < 0 || c.Port > 65535:
		return c, fmt.Errorf("tcp: port %d: must be 1 to 65535", c.Port)
	case c.Duration < 0 || c.Grace < 0 || !(c.Rate >= 0):
		return c, errors.New("tcp: duration, grace and rate must not be negative")
	}
	return c, nil
}

// TCPResult is what became of the streams, all together.
type TCPResult struct {
	Bytes   int64   `json:"bytes"`   // received and compared
	Sent    int64   `json:"sent"`    // bytes that the sender's kernel took
	Seconds float64 `json:"seconds"` // from the first byte sent to the last received
	Gbps    float64 `json:"gbps"`    // Bytes in bits, by Seconds, by 1e9
	// Corrupt counts bytes that were not those sent at their place (after a shift nearly all
	// are), and ChecksumErrors. A stream that ended short or long is an error instead.
	Corrupt        uint64 `json:"corrupt"`
	ChecksumErrors uint64 `json:"checksum_errors"`  // packets refused by the kernel, in both namespaces
	FirstBadOffset int64  `json:"first_bad_offset"` // in its stream, -1 if there is none
	Retransmits    uint64 `json:"retransmits"`      // segments sent again (TCP_INFO of the senders)
	// LongestGap is the longest time in which a stream received nothing.
	LongestGap time.Duration `json:"longest_gap_ns"`
}

// TCPStats is what the streams did so far.
type TCPStats struct {
	Sent         int64         // bytes that the sender's kernel took
	Verified     int64         // bytes received and compared
	Corrupt      uint64        // bytes of them that were wrong
	LastProgress time.Time     // when the slowest of the streams last received
	LongestGap   time.Duration // longest time without, of any stream, the one under way included
	Err          error         // that ended a stream, nil as long as all are alive
}

// TCPTraffic is TCP streams under way. Its methods may be called from any goroutine.
type TCPTraffic struct {
	cfg      TCPConfig
	from, to Endpoint
	ln       *net.TCPListener
	flows    []*tcpFlow
	begin    time.Time
	sums     func() (csum, error)
	stopping chan struct{}  // closed when the senders shall end
	ends     sync.WaitGroup // until both ends of all flows are done
	cancel   func() bool    // of the watch over ctx

	stopOnce sync.Once
	res      TCPResult
	err      error
}

// tcpFlow is one connection.
type tcpFlow struct {
	n       int
	snd     *net.TCPConn
	rcv     *net.TCPConn
	retrans uint64

	sent     atomic.Int64
	verified atomic.Int64
	bad      atomic.Int64
	firstBad atomic.Int64
	last     atomic.Int64 // nanoseconds since begin, of the receiver's last progress
	gap      atomic.Int64 // longest, in nanoseconds
	done     atomic.Bool  // the receiver has seen the end
	end      time.Time    // when; the receiver's until ends is done

	mu   sync.Mutex
	errs []error
}

func (f *tcpFlow) fail(err error) {
	f.mu.Lock()
	f.errs = append(f.errs, err)
	f.mu.Unlock()
}

// TCP sends streams from one endpoint to the other for cfg.Duration, ends them, and compares every
// byte and the counts of both sides. Bytes that were wrong or missing are an error, which names
// the offset, beside the result. When ctx ends the connections are cut, which is an error too.
func TCP(ctx context.Context, from, to Endpoint, cfg TCPConfig) (TCPResult, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return TCPResult{FirstBadOffset: -1}, err
	}
	t, err := StartTCP(ctx, from, to, cfg)
	if err != nil {
		return TCPResult{FirstBadOffset: -1}, err
	}
	select {
	case <-time.After(cfg.Duration):
	case <-ctx.Done():
	}
	return t.Stop()
}

// StartTCP connects and starts to send streams from one endpoint to the other, until Stop, which
// must be called. The link may go and come meanwhile: TCP holds on as long as the kernel does
// (net.ipv4.tcp_retries2: some 15 minutes). When ctx ends the connections are cut.
func StartTCP(ctx context.Context, from, to Endpoint, cfg TCPConfig) (*TCPTraffic, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	if err := checkEnds(from, to); err != nil {
		return nil, err
	}
	sums, err := newCsum(from, to)
	if err != nil {
		return nil, err
	}
	pattern()
	t := &TCPTraffic{cfg: cfg, from: from, to: to, sums: sums, stopping: make(chan struct{})}
	if err := t.connect(ctx); err != nil {
		t.closeAll()
		if why := context.Cause(ctx); why != nil && !errors.Is(err, why) {
			err = fmt.Errorf("%w (%w)", err, why)
		}
		return nil, err
	}
	t.begin = time.Now()
	for _, f := range t.flows {
		t.ends.Go(func() {
			if err := t.send(f); err != nil {
				f.fail(t.name(f, err))
			}
		})
		t.ends.Go(func() {
			if err := t.receive(f); err != nil {
				f.fail(t.name(f, err))
			}
		})
	}
	t.cancel = context.AfterFunc(ctx, func() {
		for _, f := range t.flows {
			f.fail(t.name(f, context.Cause(ctx)))
		}
		t.closeAll()
	})
	return t, nil
}

func (t *TCPTraffic) name(f *tcpFlow, err error) error {
	return fmt.Errorf("tcp from %v to %v, stream %d: %w", t.from, t.to, f.n, err)
}

// connect makes the connections, one after the other, so that both ends of each are known.
func (t *TCPTraffic) connect(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, t.cfg.Grace)
	defer cancel()
	err := in(t.to.NS, func() error {
		a, err := tcpAddr(t.to.Addr, t.cfg.Port)
		if err != nil {
			return err
		}
		lc := net.ListenConfig{Control: congestionOf(t.cfg.Congestion)}
		lc.SetMultipathTCP(false) // the default of a listener; its TCP_INFO is another
		// With an address in numbers, the socket is made on this thread.
		ln, err := lc.Listen(ctx, "tcp", net.JoinHostPort((&net.IPAddr{IP: a.IP, Zone: a.Zone}).String(), strconv.Itoa(a.Port)))
		if err != nil {
			return fmt.Errorf("tcp: listen at %v: %w", t.to, err)
		}
		t.ln = ln.(*net.TCPListener)
		return nil
	})
	if err != nil {
		return err
	}
	defer t.ln.Close()
	port := t.ln.Addr().(*net.TCPAddr).Port
	deadline, _ := ctx.Deadline()
	t.ln.SetDeadline(deadline)
	stop := context.AfterFunc(ctx, func() { t.ln.SetDeadline(time.Now()) })
	defer stop()
	for n := range t.cfg.Streams {
		f := &tcpFlow{n: n}
		f.firstBad.Store(-1)
		t.flows = append(t.flows, f)
		err := in(t.from.NS, func() error {
			local, err := tcpAddr(t.from.Addr, 0)
			if err != nil {
				return err
			}
			remote, err := tcpAddr(t.to.Addr, port)
			if err != nil {
				return err
			}
			d := net.Dialer{LocalAddr: local, Control: congestionOf(t.cfg.Congestion)}
			d.SetMultipathTCP(false)
			// One address, in numbers: the socket is made on this thread.
			c, err := d.DialContext(ctx, "tcp", remote.String())
			if err != nil {
				return fmt.Errorf("tcp: connect from %v to %v: %w", t.from, t.to, err)
			}
			f.snd = c.(*net.TCPConn)
			return nil
		})
		if err != nil {
			return err
		}
		// Others may connect to the port, too.
		for f.rcv == nil {
			c, err := t.ln.AcceptTCP()
			if err != nil {
				return fmt.Errorf("tcp: accept at %v: %w", t.to, err)
			}
			if c.RemoteAddr().(*net.TCPAddr).Port != f.snd.LocalAddr().(*net.TCPAddr).Port {
				c.Close()
				continue
			}
			f.rcv = c
		}
	}
	return nil
}

// closeAll cuts the connections.
func (t *TCPTraffic) closeAll() {
	for _, f := range t.flows {
		if f.snd != nil {
			f.snd.SetLinger(0)
			f.snd.Close()
		}
		if f.rcv != nil {
			f.rcv.Close()
		}
	}
}

// send writes the stream of a flow until it shall stop, and reads the receiver's report.
func (t *TCPTraffic) send(f *tcpFlow) error {
	var hello [helloLen]byte
	if _, err := unix.Getrandom(hello[8:], 0); err != nil {
		return err
	}
	binary.LittleEndian.PutUint64(hello[:], helloMagic)
	s := newStream(binary.LittleEndian.Uint64(hello[8:]))
	defer func() {
		f.retrans = retransmits(f.snd)
		f.snd.Close()
	}()
	if _, err := f.snd.Write(hello[:]); err != nil {
		return fmt.Errorf("send at the start: %w", err)
	}
	begin := time.Now()
	for {
		select {
		case <-t.stopping:
			return t.finish(f, s.off)
		default:
		}
		n, err := f.snd.Write(s.next(t.cfg.BufferSize))
		s.advance(n)
		f.sent.Store(s.off)
		if err != nil {
			return fmt.Errorf("send at offset %d: %w", s.off, err)
		}
		if t.cfg.Rate > 0 {
			ahead := time.Duration(float64(s.off)/t.cfg.Rate*1e9) - time.Since(begin)
			if ahead > 0 {
				select {
				case <-time.After(ahead):
				case <-t.stopping:
				}
			}
		}
	}
}

// finish closes the sending half and compares the receiver's report with what was sent.
func (t *TCPTraffic) finish(f *tcpFlow, sent int64) error {
	if err := f.snd.CloseWrite(); err != nil {
		return fmt.Errorf("end at offset %d: %w", sent, err)
	}
	var report [reportLen + 1]byte // one more, to see the end
	n, err := io.ReadFull(f.snd, report[:])
	if !errors.Is(err, io.ErrUnexpectedEOF) || n != reportLen {
		if err == nil || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			err = fmt.Errorf("%d bytes instead of %d", n, reportLen)
		}
		return fmt.Errorf("sent %d bytes, no report of the receiver, which is at offset %d: %w", sent, f.verified.Load(), err)
	}
	word := func(i int) int64 { return int64(binary.LittleEndian.Uint64(report[i*8:])) }
	if word(0) != reportMagic || word(1) != f.verified.Load() || word(2) != f.bad.Load() || word(3) != f.firstBad.Load() {
		return fmt.Errorf("sent %d bytes, the receiver's report arrived damaged: %x", sent, report[:reportLen])
	}
	if word(1) != sent {
		return fmt.Errorf("sent %d bytes, received %d", sent, word(1))
	}
	return nil
}

// receive compares what arrives with the stream of the flow until it ends, and reports.
func (t *TCPTraffic) receive(f *tcpFlow) error {
	defer f.rcv.Close()
	defer func() {
		f.end = time.Now()
		f.progress(int64(f.end.Sub(t.begin)))
		f.done.Store(true)
	}()
	var hello [helloLen]byte
	if _, err := io.ReadFull(f.rcv, hello[:]); err != nil {
		return fmt.Errorf("receive at the start: %w", err)
	}
	if binary.LittleEndian.Uint64(hello[:]) != helloMagic {
		f.bad.Store(helloLen)
		f.firstBad.Store(0)
		return fmt.Errorf("%w: the stream starts with %x", ErrCorrupt, hello[:8])
	}
	c := newChecker(binary.LittleEndian.Uint64(hello[8:]))
	buf := make([]byte, t.cfg.BufferSize)
	for {
		n, err := f.rcv.Read(buf)
		if n > 0 {
			c.check(buf[:n])
			f.progress(int64(time.Since(t.begin)))
			f.bad.Store(c.bad)
			f.firstBad.Store(c.firstBad)
			f.verified.Store(c.off)
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("receive at offset %d: %w", c.off, err)
		}
	}
	var report [reportLen]byte
	for i, w := range []int64{reportMagic, c.off, c.bad, c.firstBad} {
		binary.LittleEndian.PutUint64(report[i*8:], uint64(w))
	}
	_, err := f.rcv.Write(report[:])
	if c.bad > 0 {
		return fmt.Errorf("%w: %d of %d bytes, the first at offset %d: %x instead of %x", ErrCorrupt, c.bad, c.off, c.firstBad, c.got, c.want)
	}
	if err != nil {
		return fmt.Errorf("report at offset %d: %w", c.off, err)
	}
	return nil
}

// progress notes that data came at a time in nanoseconds since begin. The receiver's only.
func (f *tcpFlow) progress(now int64) {
	if gap := now - f.last.Load(); gap > f.gap.Load() {
		f.gap.Store(gap)
	}
	f.last.Store(now)
}

// retransmits returns how many segments a connection sent again, 0 where the kernel does not say.
func retransmits(c *net.TCPConn) uint64 {
	var n uint64
	rc, err := c.SyscallConn()
	if err != nil {
		return 0
	}
	rc.Control(func(fd uintptr) {
		if ti, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
			n = uint64(ti.Total_retrans)
		}
	})
	return n
}

// Stats returns what the streams did so far.
func (t *TCPTraffic) Stats() TCPStats {
	var s TCPStats
	now := int64(time.Since(t.begin))
	for i, f := range t.flows {
		s.Sent += f.sent.Load()
		s.Verified += f.verified.Load()
		s.Corrupt += uint64(f.bad.Load())
		last := f.last.Load()
		if at := t.begin.Add(time.Duration(last)); i == 0 || at.Before(s.LastProgress) {
			s.LastProgress = at
		}
		gap := f.gap.Load()
		if !f.done.Load() {
			gap = max(gap, now-last)
		}
		s.LongestGap = max(s.LongestGap, time.Duration(gap))
		f.mu.Lock()
		if s.Err == nil && len(f.errs) > 0 {
			s.Err = f.errs[0]
		}
		f.mu.Unlock()
	}
	return s
}

// Stop ends the streams: the senders close their half, the receivers compare what is still under
// way and report. It waits for that at most TCPConfig.Grace, then cuts the connections, which is an
// error. A second Stop returns what the first did.
func (t *TCPTraffic) Stop() (TCPResult, error) {
	t.stopOnce.Do(func() { t.res, t.err = t.stop() })
	return t.res, t.err
}

func (t *TCPTraffic) stop() (TCPResult, error) {
	close(t.stopping)
	deadline := time.Now().Add(t.cfg.Grace)
	for _, f := range t.flows {
		f.snd.SetDeadline(deadline)
		f.rcv.SetDeadline(deadline.Add(100 * time.Millisecond)) // the sender's error says more
	}
	t.ends.Wait()
	t.cancel()
	res := TCPResult{FirstBadOffset: -1}
	end := t.begin
	var errs []error
	for _, f := range t.flows {
		res.Bytes += f.verified.Load()
		res.Sent += f.sent.Load()
		res.Corrupt += uint64(f.bad.Load())
		res.Retransmits += f.retrans
		if o := f.firstBad.Load(); o >= 0 && (res.FirstBadOffset < 0 || o < res.FirstBadOffset) {
			res.FirstBadOffset = o
		}
		if f.end.After(end) {
			end = f.end
		}
		res.LongestGap = max(res.LongestGap, time.Duration(f.gap.Load()))
		f.mu.Lock()
		errs = append(errs, f.errs...)
		f.mu.Unlock()
	}
	res.Seconds = end.Sub(t.begin).Seconds()
	if res.Seconds > 0 {
		res.Gbps = float64(res.Bytes) * 8 / res.Seconds / 1e9
	}
	sum, err := t.sums()
	if err != nil {
		errs = append(errs, err)
	}
	res.ChecksumErrors = sum.ip + sum.tcp
	res.Corrupt += res.ChecksumErrors
	if res.ChecksumErrors > 0 {
		errs = append(errs, fmt.Errorf("tcp from %v to %v: %w: %d packets refused by the kernel for their checksum", t.from, t.to, ErrCorrupt, res.ChecksumErrors))
	}
	return res, oneLine(errs)
}

// oneLine joins errors in one line, each but once.
func oneLine(errs []error) error {
	if len(errs) == 0 {
		return nil
	}
	return lineError(errs)
}

type lineError []error

func (e lineError) Unwrap() []error { return e }

func (e lineError) Error() string {
	var b bytes.Buffer
	seen := make(map[string]bool)
	for _, err := range e {
		s := err.Error()
		if seen[s] {
			continue
		}
		seen[s] = true
		if b.Len() > 0 {
			b.WriteString("; ")
		}
		b.WriteString(s)
	}
	return b.String()
}
