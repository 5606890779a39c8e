//go:build linux

package traffic

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestReportsAreCompared gives the sender a receiver that says something else than what was sent.
func TestReportsAreCompared(t *testing.T) {
	ns := newPath(t).a // with its lo
	report := func(words ...int64) []byte {
		var b []byte
		for _, w := range words {
			b = binary.LittleEndian.AppendUint64(b, uint64(w))
		}
		return b
	}
	for _, tc := range []struct {
		report []byte
		want   string // in the error; none if empty
	}{
		{report(reportMagic, 1000, 0, -1), ""},
		{report(reportMagic, 999, 0, -1), "sent 1000 bytes, received 999"},
		{report(reportMagic, 1001, 0, -1), "sent 1000 bytes, received 1001"},
		{report(0, 1000, 0, -1), "arrived damaged"},
		{report(reportMagic, 1000, 0, -1)[:31], "31 bytes instead of 32"},
		{report(reportMagic, 1000, 0, -1, 5), "33 bytes instead of 32"},
		{nil, "0 bytes instead of 32"},
	} {
		var snd, rcv net.Conn
		err := ns.Do(func() error {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				return err
			}
			defer l.Close()
			if snd, err = net.Dial("tcp", l.Addr().String()); err != nil {
				return err
			}
			rcv, err = l.Accept()
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		f := &tcpFlow{snd: snd.(*net.TCPConn)}
		f.firstBad.Store(-1)
		if len(tc.report) >= 16 {
			f.verified.Store(int64(binary.LittleEndian.Uint64(tc.report[8:])))
		}
		done := make(chan error, 1)
		go func() {
			_, err := io.Copy(io.Discard, rcv) // until the sender closed its half
			if err == nil {
				_, err = rcv.Write(tc.report)
			}
			rcv.Close()
			done <- err
		}()
		err = (&TCPTraffic{}).finish(f, 1000)
		snd.Close()
		if derr := <-done; derr != nil {
			t.Error(derr)
		}
		if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
			t.Errorf("report %x: %v, want %q", tc.report, err, tc.want)
		}
	}
}

func TestBadInput(t *testing.T) {
	ns := newPath(t).a // with its lo
	lo4, lo6 := Endpoint{ns, netip.MustParseAddr("127.0.0.1")}, Endpoint{ns, netip.MustParseAddr("::1")}
	none := Endpoint{ns, netip.MustParseAddr("192.0.2.77")}
	ctx := t.Context()
	ping := func(d Endpoint, c PingConfig) error { _, err := Ping(ctx, d.NS, d.Addr, c); return err }
	tcp := func(a, b Endpoint, c TCPConfig) error { _, err := TCP(ctx, a, b, c); return err }
	udp := func(a, b Endpoint, c UDPConfig) error { _, err := UDP(ctx, a, b, c); return err }
	for i, tc := range []struct {
		err  error
		want string
	}{
		{ping(lo4, PingConfig{Count: 65536}), "count 65536: must be 1 to 65535"},
		{ping(lo4, PingConfig{Count: -1}), "count -1"},
		{ping(lo4, PingConfig{Sizes: []int{1, 65508}}), "size 65508"},
		{ping(lo4, PingConfig{Sizes: []int{-1}}), "size -1"},
		{ping(lo4, PingConfig{Interval: -1}), "negative"},
		{ping(Endpoint{NS: ns}, PingConfig{}), "no address"},
		{tcp(lo4, lo4, TCPConfig{Streams: 1025}), "1025 streams"},
		{tcp(lo4, lo4, TCPConfig{BufferSize: -1}), "-1 bytes"},
		{tcp(lo4, lo4, TCPConfig{Port: 65536}), "port 65536"},
		{tcp(lo4, lo4, TCPConfig{Rate: -1}), "negative"},
		{tcp(lo4, lo6, TCPConfig{}), "one address is IPv4, the other IPv6"},
		{tcp(lo4, Endpoint{}, TCPConfig{}), "no address"},
		{tcp(lo4, none, TCPConfig{}), "listen at 192.0.2.77"},
		{tcp(none, lo4, TCPConfig{}), "connect from 192.0.2.77 to 127.0.0.1"},
		{udp(lo4, lo4, UDPConfig{Size: 23}), "23 bytes: must be 24 to 65507"},
		{udp(lo4, lo4, UDPConfig{Size: 65508}), "65508 bytes"},
		{udp(lo4, lo4, UDPConfig{Size: 2000, Segments: 33}), "33 segments of 2000 bytes"},
		{udp(lo4, lo4, UDPConfig{Port: -1}), "port -1"},
		{udp(lo4, lo4, UDPConfig{Duration: -1}), "negative"},
		{udp(lo6, lo4, UDPConfig{}), "one address is IPv4, the other IPv6"},
		{udp(lo4, none, UDPConfig{}), "of 192.0.2.77: cannot assign requested address"},
		{udp(none, lo4, UDPConfig{}), "of 192.0.2.77: cannot assign requested address"},
		{udp(lo6, Endpoint{ns, netip.MustParseAddr("fe80::1%nonesuch")}, UDPConfig{}), "zone of fe80::1%nonesuch: no such device"},
		{func() error { _, err := Run(ctx, nil, RunConfig{}); return err }(), "no pair"},
	} {
		if tc.err == nil || !strings.Contains(tc.err.Error(), tc.want) || strings.Contains(tc.err.Error(), "\n") {
			t.Errorf("%d: %v, want %q", i, tc.err, tc.want)
		}
	}
}

// TestTheEndOfTheContext stops everything early, with an error.
func TestTheEndOfTheContext(t *testing.T) {
	t.Parallel() // mostly waits
	p := newVeth(t)
	p.wait(t)
	why := errors.New("enough")
	for name, run := range map[string]func(context.Context) error{
		"ping": func(ctx context.Context) error {
			r, err := Ping(ctx, p.a, p.v4.Host.Addr, PingConfig{Interval: 10 * time.Millisecond, Count: 1000})
			if r.Sent == 0 || r.Sent == 1000 || r.Received == 0 {
				t.Errorf("%+v", r)
			}
			return err
		},
		"ping without answers": func(ctx context.Context) error {
			r, err := Ping(ctx, p.a, netip.MustParseAddr("192.0.2.99"), PingConfig{Count: 1, Timeout: time.Minute})
			if r.Sent != 1 || r.Lost != 1 {
				t.Errorf("%+v", r)
			}
			return err
		},
		"tcp": func(ctx context.Context) error {
			r, err := TCP(ctx, p.v6.Host, p.v6.Board, TCPConfig{Duration: time.Minute})
			if r.Bytes == 0 || r.Corrupt != 0 {
				t.Errorf("%+v", r)
			}
			return err
		},
		"udp": func(ctx context.Context) error {
			r, err := UDP(ctx, p.v6.Host, p.v6.Board, UDPConfig{Duration: time.Minute, Rate: 1000})
			if r.Received == 0 || r.Corrupt != 0 {
				t.Errorf("%+v", r)
			}
			return err
		},
		"wait": func(ctx context.Context) error {
			return WaitReachable(ctx, p.a, netip.MustParseAddr("192.0.2.99"))
		},
		"run": func(ctx context.Context) error {
			_, err := Run(ctx, []Pair{p.v4}, RunConfig{Ping: PingConfig{Count: 5}, Duration: time.Minute})
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithCancelCause(t.Context())
			timer := time.AfterFunc(150*time.Millisecond, func() { cancel(why) })
			defer timer.Stop()
			begin := time.Now()
			if err := run(ctx); !errors.Is(err, why) {
				t.Errorf("error %v", err)
			}
			if d := time.Since(begin); d > 10*time.Second {
				t.Errorf("took %v", d)
			}
		})
	}
}

func TestTCPSizes(t *testing.T) {
	p := newVeth(t)
	p.wait(t)
	for name, pair := range p.pairs() {
		for _, cfg := range []TCPConfig{{BufferSize: 1, Rate: 20e3}, {BufferSize: 1000}, {BufferSize: 8 << 20, Streams: 5}, {Rate: 1e6}} {
			cfg.Duration = 60 * time.Millisecond
			t.Run(fmt.Sprintf("%s/%d", name, cfg.BufferSize), func(t *testing.T) {
				r, err := TCP(t.Context(), pair.Board, pair.Host, cfg)
				if err != nil || r.Bytes == 0 || r.Bytes != r.Sent || r.FirstBadOffset != -1 {
					t.Errorf("%+v: %v", r, err)
				}
				if limit := cfg.Rate*r.Seconds + chunkLen; cfg.Rate > 0 && float64(r.Bytes) > limit {
					t.Errorf("%d bytes, at the rate given at most %.0f", r.Bytes, limit)
				}
			})
		}
	}
}

func TestLinkLocal(t *testing.T) {
	t.Parallel() // mostly waits
	p := newVeth(t)
	p.wait(t)
	var addr [2]netip.Addr
	for i, n := range []Endpoint{p.v6.Board, p.v6.Host} {
		h := handle(t, n.NS)
		l, err := h.LinkByName("l0")
		if err != nil {
			t.Fatal(err)
		}
		// Duplicate detection takes a second.
		for deadline := time.Now().Add(10 * time.Second); !addr[i].IsValid(); time.Sleep(10 * time.Millisecond) {
			as, err := h.AddrList(l, unix.AF_INET6)
			if err != nil {
				t.Fatal(err)
			}
			for _, a := range as {
				if ip, ok := netip.AddrFromSlice(a.IP); ok && ip.IsLinkLocalUnicast() && a.Flags&unix.IFA_F_TENTATIVE == 0 {
					addr[i] = ip.WithZone("l0")
				}
			}
			if time.Now().After(deadline) {
				t.Fatalf("no address of its own link: %v", as)
			}
		}
	}
	pair := Pair{Endpoint{p.a, addr[0]}, Endpoint{p.b, addr[1]}}
	// The zone of an address is of the namespace it is used in; the names are the same here.
	r, err := Run(t.Context(), []Pair{pair}, RunConfig{Duration: 50 * time.Millisecond, Ping: PingConfig{Count: 5, Interval: time.Millisecond}})
	if err != nil || !r.OK() || r.TCPGbps.BoardToHost == 0 || r.UDP64Kpps.HostToBoard == 0 {
		t.Errorf("%+v: %v", r, err)
	}
}

// TestPingWithoutRawSockets takes the capability away from the thread for a while.
func TestPingWithoutRawSockets(t *testing.T) {
	t.Parallel() // mostly waits
	p := newVeth(t)
	p.wait(t)
	without := func(f func() error) error {
		return p.a.Do(func() error {
			h := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
			var all, less [2]unix.CapUserData
			if err := unix.Capget(&h, &all[0]); err != nil {
				return err
			}
			less = all
			less[0].Effective &^= 1 << unix.CAP_NET_RAW
			if err := unix.Capset(&h, &less[0]); err != nil {
				return err
			}
			defer unix.Capset(&h, &all[0])
			return f()
		})
	}
	for name, pair := range p.pairs() { // a new namespace allows no group
		err := without(func() error {
			_, err := Ping(t.Context(), nil, pair.Host.Addr, PingConfig{Count: 1})
			return err
		})
		if !errors.Is(err, unix.EACCES) && !errors.Is(err, unix.EPERM) {
			t.Errorf("%s, forbidden: %v", name, err)
		}
	}
	group := fmt.Sprintf("%d %d", os.Getegid(), os.Getegid())
	err := p.a.Do(func() error {
		return os.WriteFile("/proc/sys/net/ipv4/ping_group_range", []byte(group), 0)
	})
	if err != nil {
		t.Fatal(err)
	}
	for name, pair := range p.pairs() {
		raw := true
		var r PingResult
		err := without(func() error {
			pg, err := newPinger(nil, pair.Host.Addr)
			if err != nil {
				return err
			}
			raw = pg.raw
			pg.f.Close()
			r, err = Ping(t.Context(), nil, pair.Host.Addr, PingConfig{Count: 10, Interval: time.Millisecond, Sizes: []int{0, 56, 3000}})
			return err
		})
		if err != nil || raw || r.Received != 10 || r.Duplicates != 0 || r.Corrupt != 0 {
			t.Errorf("%s: %+v, raw %v: %v", name, r, raw, err)
		}
	}
}

// TestNoAllocationInTheSteadyState counts what the whole process allocates while data flows.
func TestNoAllocationInTheSteadyState(t *testing.T) {
	p := newVeth(t)
	p.wait(t)
	measure := func(what string, done func() uint64, n uint64) {
		t.Helper()
		wait := func(until uint64) {
			t.Helper()
			for deadline := time.Now().Add(20 * time.Second); done() < until; time.Sleep(time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatalf("%s: stuck at %d of %d", what, done(), until)
				}
			}
		}
		wait(1)
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		wait(done() + n)
		runtime.ReadMemStats(&after)
		// The runtime's own are some; one for each of n would be far more.
		if got := after.Mallocs - before.Mallocs; got > n/100 {
			t.Errorf("%s: %d allocations for %d", what, got, n)
		}
	}
	u, err := StartUDP(t.Context(), p.v4.Board, p.v4.Host, UDPConfig{})
	if err != nil {
		t.Fatal(err)
	}
	measure("packets", func() uint64 { return u.Stats().Received }, 20000)
	if _, err := u.Stop(); err != nil {
		t.Error(err)
	}
	c, err := StartTCP(t.Context(), p.v4.Board, p.v4.Host, TCPConfig{BufferSize: 1000})
	if err != nil {
		t.Fatal(err)
	}
	measure("writes", func() uint64 { return uint64(c.Stats().Sent) / 1000 }, 20000)
	if _, err := c.Stop(); err != nil {
		t.Error(err)
	}
}
