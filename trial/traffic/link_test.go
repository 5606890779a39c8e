//go:build linux

package traffic

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/boardlink/boardlink/trial/netns"
	"github.com/vishvananda/netlink"
	vnetns "github.com/vishvananda/netns"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func needRoot(t testing.TB) {
	t.Helper()
	if netns.NeedsUser() {
		missing(t, "needs CAP_SYS_ADMIN and CAP_NET_ADMIN")
	}
}

func missing(t testing.TB, what string) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatal(what)
	}
	t.Skip(what)
}

// path is two namespaces with an interface "l0" each.
type path struct {
	a, b *netns.NS
	v4   Pair
	v6   Pair
}

// pairs returns the paths of both families, by name.
func (p *path) pairs() map[string]Pair { return map[string]Pair{"IPv4": p.v4, "IPv6": p.v6} }

func newPath(t testing.TB) *path {
	t.Helper()
	needRoot(t)
	var p path
	for _, n := range []**netns.NS{&p.a, &p.b} {
		ns, err := netns.New()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ns.Close() })
		*n = ns
	}
	p.v4 = Pair{Endpoint{p.a, netip.MustParseAddr("192.0.2.1")}, Endpoint{p.b, netip.MustParseAddr("192.0.2.2")}}
	p.v6 = Pair{Endpoint{p.a, netip.MustParseAddr("2001:db8::1")}, Endpoint{p.b, netip.MustParseAddr("2001:db8::2")}}
	return &p
}

func handle(t testing.TB, n *netns.NS) *netlink.Handle {
	t.Helper()
	h, err := netlink.NewHandleAt(vnetns.NsHandle(n.FD()), unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.Close)
	return h
}

// configure gives l0 of both namespaces their addresses and raises them.
func (p *path) configure(t testing.TB) {
	t.Helper()
	for i, n := range []*netns.NS{p.a, p.b} {
		h := handle(t, n)
		l, err := h.LinkByName("l0")
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range []string{fmt.Sprintf("192.0.2.%d/24", i+1), fmt.Sprintf("2001:db8::%d/64", i+1)} {
			a, err := netlink.ParseAddr(s)
			if err != nil {
				t.Fatal(err)
			}
			a.Flags = unix.IFA_F_NODAD
			if err := h.AddrAdd(l, a); err != nil {
				t.Fatal(err)
			}
		}
		// A first request for a neighbour that came before the carrier is repeated after this
		// time, not after 1 s.
		err = n.Do(func() error {
			for _, f := range []string{"ipv4", "ipv6"} {
				if err := os.WriteFile("/proc/sys/net/"+f+"/neigh/l0/retrans_time_ms", []byte("50"), 0); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := h.LinkSetUp(l); err != nil {
			t.Fatal(err)
		}
	}
}

// wait waits until both ends reach each other.
func (p *path) wait(t testing.TB) {
	t.Helper()
	for _, pair := range p.pairs() {
		if err := WaitReachable(t.Context(), pair.Board.NS, pair.Host.Addr); err != nil {
			t.Fatal(err)
		}
	}
}

func newVeth(t testing.TB) *path {
	t.Helper()
	p := newPath(t)
	h := handle(t, p.a)
	err := h.LinkAdd(&netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: "l0"}, PeerName: "l0", PeerNamespace: netlink.NsFd(p.b.FD()),
	})
	if err != nil {
		t.Fatal(err)
	}
	p.configure(t)
	return p
}

// mangler passes on the frames of one direction as it likes.
type mangler func(frame []byte, emit func([]byte))

// tapPath is a path between two taps that the test forwards itself.
type tapPath struct {
	*path
	tap    [2]*os.File
	mangle [2]atomic.Pointer[mangler] // from a to b, from b to a
}

func newTaps(t testing.TB) *tapPath {
	t.Helper()
	w := &tapPath{path: newPath(t)}
	if err := netns.CheckTun(); err != nil {
		missing(t, err.Error())
	}
	for i, n := range []*netns.NS{w.a, w.b} {
		err := n.Do(func() error {
			fd, err := unix.Open(netns.TunPath, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
			if err != nil {
				return err
			}
			ifr, err := unix.NewIfreq("l0")
			if err != nil {
				return err
			}
			ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
			if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
				return err
			}
			w.tap[i] = os.NewFile(uintptr(fd), "tap") // watched by the runtime only once it is a tap
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	w.configure(t)
	var wg sync.WaitGroup
	for i := range w.tap {
		in, out := w.tap[i], w.tap[1-i]
		wg.Go(func() {
			buf := make([]byte, 1<<16)
			emit := func(b []byte) { out.Write(b) }
			for {
				n, err := in.Read(buf)
				if errors.Is(err, os.ErrClosed) {
					return
				}
				if err != nil { // the interface is down
					time.Sleep(time.Millisecond)
					continue
				}
				if m := w.mangle[i].Load(); m != nil {
					(*m)(buf[:n], emit)
				} else {
					emit(buf[:n])
				}
			}
		})
	}
	t.Cleanup(func() {
		w.tap[0].Close()
		w.tap[1].Close()
		wg.Wait()
	})
	w.wait(t)
	return w
}

// payload returns what a frame carries in a protocol behind a header of that protocol, nil if it
// is of another.
func payload(f []byte, proto byte) []byte {
	const eth = 14
	var l4 int
	switch {
	case len(f) > eth+20 && f[12] == 0x08 && f[13] == 0x00 && f[eth+9] == proto:
		l4 = eth + int(f[eth]&15)*4
		f = f[:eth+int(f[eth+2])<<8+int(f[eth+3])]
	case len(f) > eth+40 && f[12] == 0x86 && f[13] == 0xdd && f[eth+6] == proto:
		l4 = eth + 40
	default:
		return nil
	}
	head := 8 // ICMP, UDP
	if proto == unix.IPPROTO_TCP {
		if len(f) < l4+20 {
			return nil
		}
		head = int(f[l4+12]>>4) * 4
	}
	if len(f) < l4+head {
		return nil
	}
	return f[l4+head:]
}

// every makes a mangler that does something to each nth frame with at least 48 bytes of payload in
// a protocol, from the nth on, and passes on the others. It counts what it did.
func every(n int, proto byte, count *atomic.Int64, do func(frame, payload []byte, emit func([]byte))) *mangler {
	i := 0
	m := mangler(func(f []byte, emit func([]byte)) {
		p := payload(f, proto)
		if len(p) < 48 {
			emit(f)
			return
		}
		if i++; i%n != 0 {
			emit(f)
			return
		}
		count.Add(1)
		do(f, p, emit)
	})
	return &m
}

// atLeast waits until a mangler did something n times.
func atLeast(t *testing.T, count *atomic.Int64, n int64) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); count.Load() < n; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Errorf("only %d faults", count.Load())
			return
		}
	}
}

func drop(f, p []byte, emit func([]byte))  {}
func twice(f, p []byte, emit func([]byte)) { emit(f); emit(f) }

func flip(f, p []byte, emit func([]byte)) {
	p[len(p)/2] ^= 4
	emit(f)
}

// swapWords exchanges two unlike words of 16 bits, which no checksum of RFC 1071 sees.
func swapWords(f, p []byte, emit func([]byte)) {
	for i := 24; i+4 <= len(p); i += 2 {
		if p[i] != p[i+2] || p[i+1] != p[i+3] {
			p[i], p[i+1], p[i+2], p[i+3] = p[i+2], p[i+3], p[i], p[i+1]
			break
		}
	}
	emit(f)
}

// later makes a frame come after the one that follows.
func later() func(f, p []byte, emit func([]byte)) {
	return func(f, p []byte, emit func([]byte)) {
		held := append([]byte(nil), f...)
		time.AfterFunc(5*time.Millisecond, func() { emit(held) })
	}
}

func icmpProto(p Pair) byte {
	if p.Board.Addr.Is4() {
		return unix.IPPROTO_ICMP
	}
	return unix.IPPROTO_ICMPV6
}

func TestRunOverVeth(t *testing.T) {
	p := newVeth(t)
	var steps []string
	r, err := Run(t.Context(), []Pair{p.v4, p.v6}, RunConfig{
		Duration: 200 * time.Millisecond,
		Ping:     PingConfig{Count: 40, Interval: time.Millisecond, Sizes: []int{0, 1, 56, 1400, 9000, maxPingPayload}},
		TCP:      TCPConfig{Streams: 2},
		Step:     func(s string) { steps = append(steps, s) },
	})
	if err != nil || !r.OK() {
		t.Fatalf("%+v: %v", r, err)
	}
	if r.Ping != (PingCounts{Sent: 160, Received: 160}) {
		t.Errorf("ping: %+v", r.Ping)
	}
	if !(0 < r.RTT.P50 && r.RTT.P50 <= r.RTT.P90 && r.RTT.P90 <= r.RTT.P99 && r.RTT.P99 <= r.RTT.Max) {
		t.Errorf("rtt: %+v", r.RTT)
	}
	if len(steps) != 12 || steps[0] != "ping 192.0.2.1 to 192.0.2.2" || steps[11] != "udp 2001:db8::2 to 2001:db8::1" {
		t.Errorf("steps: %q", steps)
	}
	j, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	var m map[string]any
	if err := json.Unmarshal(j, &m); err != nil {
		t.Fatal(err)
	}
	for _, k := range []string{
		"ping.sent", "ping.lost", "rtt_us.p50", "rtt_us.p99", "tcp_gbps.board_to_host", "tcp_gbps.host_to_board",
		"udp64_kpps.board_to_host", "udp64_kpps.host_to_board", "corrupt",
	} {
		var v any = m
		for part := range strings.SplitSeq(k, ".") {
			v = v.(map[string]any)[part]
		}
		f, ok := v.(float64)
		zero := k == "ping.lost" || k == "corrupt"
		if !ok || (f == 0) != zero {
			t.Errorf("%s is %v in %s", k, v, j)
		}
	}
	t.Logf("%s", j)
}

func TestUDPPaced(t *testing.T) {
	p := newVeth(t)
	p.wait(t)
	for name, pair := range p.pairs() {
		for _, cfg := range []UDPConfig{
			{Rate: 2000},
			{Rate: 300, Size: udpMaxBytes},
			{Rate: 200, Size: udpHeader},
			{Rate: 20000, Segments: 16, Size: 1000},
		} {
			cfg.Duration, cfg.Lossless = 100*time.Millisecond, true
			t.Run(fmt.Sprintf("%s/%d bytes", name, cfg.Size), func(t *testing.T) {
				r, err := UDP(t.Context(), pair.Board, pair.Host, cfg)
				if err != nil {
					t.Fatal(err)
				}
				want := cfg.Rate * cfg.Duration.Seconds()
				if float64(r.Sent) > want*r.Seconds/cfg.Duration.Seconds()+64 || r.Sent == 0 || r.Received != r.Sent || r.Lost+r.Reordered+r.Duplicates+r.Foreign != 0 {
					t.Errorf("%+v, want %v sent", r, want)
				}
			})
		}
	}
}

func TestPingFaults(t *testing.T) {
	t.Parallel() // mostly waits
	w := newTaps(t)
	for name, pair := range w.pairs() {
		for _, tc := range []struct {
			what string
			do   func(f, p []byte, emit func([]byte))
			want PingResult // with the faults as -1
		}{
			{"lost", drop, PingResult{Lost: -1}},
			{"twice", twice, PingResult{Duplicates: -1}},
			{"other payload", swapWords, PingResult{Lost: -1, Corrupt: 1}},
			{"bad checksum", flip, PingResult{Lost: -1, Corrupt: 1, ChecksumErrors: 1}},
		} {
			for dir := range w.mangle {
				t.Run(fmt.Sprintf("%s/%s/%d", name, tc.what, dir), func(t *testing.T) {
					var n atomic.Int64
					w.mangle[dir].Store(every(4, icmpProto(pair), &n, tc.do))
					r, err := Ping(t.Context(), pair.Board.NS, pair.Host.Addr, PingConfig{Count: 22, Interval: time.Millisecond, Timeout: 400 * time.Millisecond, Peer: pair.Host.NS})
					w.mangle[dir].Store(nil)
					faults := int(n.Load())
					got := PingResult{Lost: r.Lost, Duplicates: r.Duplicates, Corrupt: r.Corrupt, ChecksumErrors: r.ChecksumErrors}
					want := PingResult{Lost: -tc.want.Lost * faults, Duplicates: -tc.want.Duplicates * faults,
						Corrupt: tc.want.Corrupt * uint64(faults), ChecksumErrors: tc.want.ChecksumErrors * uint64(faults)}
					if faults < 5 || r.Sent != 22 || r.Received+r.Lost != 22 {
						t.Errorf("%d faults: %+v, %v", faults, r, err)
					}
					if got != want {
						t.Errorf("%d faults: %+v, %v", faults, r, err)
					}
					if errors.Is(err, ErrCorrupt) != (want.Corrupt > 0) {
						t.Errorf("error %v", err)
					}
				})
			}
		}
	}
}

func TestUDPFaults(t *testing.T) {
	t.Parallel() // mostly waits
	w := newTaps(t)
	for name, pair := range w.pairs() {
		for _, tc := range []struct {
			what string
			do   func(f, p []byte, emit func([]byte))
			want func(n uint64) UDPResult
		}{
			{"none", func(f, p []byte, emit func([]byte)) { emit(f) }, func(n uint64) UDPResult { return UDPResult{} }},
			{"lost", drop, func(n uint64) UDPResult { return UDPResult{Lost: n} }},
			{"twice", twice, func(n uint64) UDPResult { return UDPResult{Duplicates: n} }},
			{"late", later(), func(n uint64) UDPResult { return UDPResult{Reordered: n} }},
			{"other payload", swapWords, func(n uint64) UDPResult { return UDPResult{Lost: n, Corrupt: n} }},
			{"bad checksum", flip, func(n uint64) UDPResult { return UDPResult{Lost: n, Corrupt: n, ChecksumErrors: n} }},
		} {
			t.Run(name+"/"+tc.what, func(t *testing.T) {
				var n atomic.Int64
				w.mangle[0].Store(every(10, unix.IPPROTO_UDP, &n, tc.do))
				u, err := StartUDP(t.Context(), pair.Board, pair.Host, UDPConfig{Rate: 2000})
				if err != nil {
					t.Fatal(err)
				}
				atLeast(t, &n, 10)
				r, err := u.Stop()
				w.mangle[0].Store(nil)
				got := UDPResult{Lost: r.Lost, Corrupt: r.Corrupt, ChecksumErrors: r.ChecksumErrors, Reordered: r.Reordered, Duplicates: r.Duplicates, Foreign: r.Foreign}
				want := tc.want(uint64(n.Load()))
				if tc.what == "late" && got.Reordered > 0 && got.Reordered <= want.Reordered {
					got.Reordered = want.Reordered // the last ones may have none behind them
				}
				if got != want || n.Load() < 10 || r.Received+r.Lost != r.Sent {
					t.Errorf("%d faults: %+v", n.Load(), r)
				}
				if errors.Is(err, ErrCorrupt) != (want.Corrupt > 0) || err != nil && want.Corrupt == 0 {
					t.Errorf("error %v", err)
				}
			})
		}
	}
}

func TestUDPLosslessIsAnErrorOfItsOwn(t *testing.T) {
	t.Parallel() // mostly waits
	w := newTaps(t)
	var n atomic.Int64
	w.mangle[0].Store(every(50, unix.IPPROTO_UDP, &n, drop))
	u, err := StartUDP(t.Context(), w.v4.Board, w.v4.Host, UDPConfig{Rate: 1000, Lossless: true})
	if err != nil {
		t.Fatal(err)
	}
	atLeast(t, &n, 1)
	r, err := u.Stop()
	if err == nil || errors.Is(err, ErrCorrupt) || r.Lost != uint64(n.Load()) || r.Lost == 0 ||
		!strings.Contains(err.Error(), fmt.Sprintf("%d packets of %d are lost", r.Lost, r.Sent)) {
		t.Errorf("%+v: %v", r, err)
	}
}

func TestTCPFaults(t *testing.T) {
	t.Parallel() // mostly waits
	w := newTaps(t)
	for name, pair := range w.pairs() {
		for _, tc := range []struct {
			what  string
			do    func(f, p []byte, emit func([]byte))
			check func(r TCPResult, err error, n int64) bool
		}{
			{"none", func(f, p []byte, emit func([]byte)) { emit(f) }, func(r TCPResult, err error, n int64) bool {
				return err == nil && r.Corrupt == 0 && r.FirstBadOffset == -1
			}},
			{"lost", drop, func(r TCPResult, err error, n int64) bool {
				return err == nil && r.Corrupt == 0 && r.Retransmits > 0
			}},
			{"other payload", swapWords, func(r TCPResult, err error, n int64) bool {
				return errors.Is(err, ErrCorrupt) && r.Corrupt > 0 && r.Corrupt <= uint64(4*n) && r.ChecksumErrors == 0 && r.FirstBadOffset >= 0 &&
					strings.Contains(err.Error(), fmt.Sprintf("the first at offset %d:", r.FirstBadOffset))
			}},
			{"bad checksum", flip, func(r TCPResult, err error, n int64) bool {
				return errors.Is(err, ErrCorrupt) && r.Corrupt == uint64(n) && r.ChecksumErrors == uint64(n) && r.FirstBadOffset == -1 && r.Retransmits > 0
			}},
		} {
			t.Run(name+"/"+tc.what, func(t *testing.T) {
				var n atomic.Int64
				w.mangle[0].Store(every(100, unix.IPPROTO_TCP, &n, tc.do))
				c, err := StartTCP(t.Context(), pair.Board, pair.Host, TCPConfig{})
				if err != nil {
					t.Fatal(err)
				}
				atLeast(t, &n, 5)
				r, err := c.Stop()
				w.mangle[0].Store(nil)
				if r.Bytes != r.Sent || r.Bytes == 0 || !tc.check(r, err, n.Load()) {
					t.Errorf("%d faults: %+v, %v", n.Load(), r, err)
				}
			})
		}
	}
}

// TestTrafficLivesThroughAnOutage cuts the path for a while, then takes the sender's interface down.
func TestTrafficLivesThroughAnOutage(t *testing.T) {
	w := newTaps(t)
	ctx := t.Context()
	tcp, err := StartTCP(ctx, w.v4.Board, w.v4.Host, TCPConfig{Rate: 2 << 20, Streams: 2})
	if err != nil {
		t.Fatal(err)
	}
	udp, err := StartUDP(ctx, w.v4.Board, w.v4.Host, UDPConfig{Rate: 1000})
	if err != nil {
		t.Fatal(err)
	}
	waitFor := func(what string, cond func() bool) {
		t.Helper()
		for deadline := time.Now().Add(10 * time.Second); !cond(); time.Sleep(2 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("no %s: %+v %+v", what, tcp.Stats(), udp.Stats())
			}
		}
	}
	flows := func(what string) {
		t.Helper()
		v, r := tcp.Stats().Verified, udp.Stats().Received
		waitFor("traffic "+what, func() bool { return tcp.Stats().Verified > v+1<<16 && udp.Stats().Received > r+10 })
	}
	flows("at first")

	const outage = 300 * time.Millisecond
	cut := mangler(func([]byte, func([]byte)) {})
	w.mangle[0].Store(&cut)
	w.mangle[1].Store(&cut)
	cutAt := time.Now()
	time.Sleep(outage)
	if s := tcp.Stats(); s.LongestGap < outage/2 || s.LastProgress.After(cutAt.Add(outage/2)) {
		t.Errorf("during the outage: %+v", s)
	}
	if s := udp.Stats(); s.LongestGap < outage/2 || s.LastProgress.After(cutAt.Add(outage/2)) {
		t.Errorf("during the outage: %+v", s)
	}
	w.mangle[0].Store(nil)
	w.mangle[1].Store(nil)
	flows("after the outage")

	h := handle(t, w.a)
	l, err := h.LinkByName("l0")
	if err != nil {
		t.Fatal(err)
	}
	before := udp.Stats().SendErrors
	if err := h.LinkSetDown(l); err != nil {
		t.Fatal(err)
	}
	waitFor("refusal of packets", func() bool { return udp.Stats().SendErrors > before+10 })
	if err := h.LinkSetUp(l); err != nil {
		t.Fatal(err)
	}
	flows("after the interface was down")

	if s := tcp.Stats(); s.Err != nil {
		t.Error(s.Err)
	}
	tr, err := tcp.Stop()
	if err != nil || tr.Bytes != tr.Sent || tr.Corrupt != 0 || tr.LongestGap < outage/2 || tr.Retransmits == 0 {
		t.Errorf("%+v: %v", tr, err)
	}
	ur, err := udp.Stop()
	if err != nil || ur.Lost == 0 || ur.Corrupt != 0 || ur.LongestGap < outage/2 || ur.SendErrors == 0 || ur.Duplicates != 0 {
		t.Errorf("%+v: %v", ur, err)
	}
	if again, err2 := tcp.Stop(); again != tr || err2 != err {
		t.Errorf("the second Stop: %+v, %v", again, err2)
	}
}

// TestStopOverADeadLink must end, with an error that says how far it got.
func TestStopOverADeadLink(t *testing.T) {
	t.Parallel() // mostly waits
	w := newTaps(t)
	tcp, err := StartTCP(t.Context(), w.v6.Board, w.v6.Host, TCPConfig{Grace: 200 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	udp, err := StartUDP(t.Context(), w.v6.Board, w.v6.Host, UDPConfig{Rate: 1000})
	if err != nil {
		t.Fatal(err)
	}
	for tcp.Stats().Verified == 0 || udp.Stats().Received == 0 {
		time.Sleep(time.Millisecond)
	}
	cut := mangler(func([]byte, func([]byte)) {})
	w.mangle[0].Store(&cut)
	time.Sleep(50 * time.Millisecond)
	begin := time.Now()
	tr, err := tcp.Stop()
	if !errors.Is(err, os.ErrDeadlineExceeded) || !strings.Contains(err.Error(), fmt.Sprintf("at offset %d", tr.Bytes)) || tr.Corrupt != 0 || tr.Sent <= tr.Bytes {
		t.Errorf("%+v: %v", tr, err)
	}
	ur, err := udp.Stop()
	if err != nil || ur.Lost == 0 || ur.Corrupt != 0 {
		t.Errorf("%+v: %v", ur, err)
	}
	if d := time.Since(begin); d > 5*time.Second {
		t.Errorf("Stop took %v", d)
	}
}
