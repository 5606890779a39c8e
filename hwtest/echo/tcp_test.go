package echo_test

import (
	"context"
	"flag"
	"net/netip"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/boardlink/boardlink/agent"
	"github.com/boardlink/boardlink/board/loopback"
	"github.com/boardlink/boardlink/device/netdev"
	"github.com/boardlink/boardlink/driver"
	"github.com/boardlink/boardlink/driver/netdrv"
	"github.com/boardlink/boardlink/host"
	"github.com/boardlink/boardlink/trial/netns"
	"github.com/boardlink/boardlink/trial/netns/netnstest"
	"github.com/boardlink/boardlink/trial/traffic"
	"github.com/boardlink/boardlink/tunbridge"
	"github.com/vishvananda/netlink"
)

var rounds = flag.Int("rounds", 40, "how often TestUnderTCP adds and removes a device")

// setUp gives an interface its address in its namespace.
func setUp(ifc *tunbridge.Iface, addr string) error {
	h, err := netlink.NewHandle()
	if err != nil {
		return err
	}
	defer h.Close()
	l, err := h.LinkByIndex(ifc.Index())
	if err != nil {
		return err
	}
	a, err := netlink.ParseAddr(addr)
	if err != nil {
		return err
	}
	if err := h.AddrAdd(l, a); err != nil {
		return err
	}
	return h.LinkSetUp(l)
}

// A TCP connection over a network device is held, each byte of it checked, while another device comes and goes on the same link. With one
// doorbell all queues share it; with several, that of the network device's queue is shared while the other device is there.
func TestUnderTCP(t *testing.T) {
	netnstest.Need(t)
	for _, c := range []struct {
		name      string
		vectors   int
		placement string
	}{{"one doorbell", 1, "window"}, {"several", 4, "push"}} {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "s")
			srv, err := loopback.NewServer(loopback.ServerConfig{Path: path, Size: 8 << 20, Vectors: c.vectors})
			if err != nil {
				t.Fatal(err)
			}
			served := make(chan error, 1)
			go func() { served <- srv.Serve() }()
			t.Cleanup(func() { srv.Close(); <-served })
			var ns [2]*netns.NS
			var at [2]traffic.Endpoint
			for i, addr := range []string{"10.9.0.1", "10.9.0.2"} {
				if ns[i], err = netns.New(); err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { ns[i].Close() })
				at[i] = traffic.Endpoint{NS: ns[i], Addr: netip.MustParseAddr(addr)}
			}
			e := newEnds(t, func(h *host.Config, a *agent.Config) {
				h.Board, a.Board, a.Placement, a.Shares = "loopback:"+path, "loopback:"+path, c.placement, 3
				err := ns[0].Do(func() error {
					n, err := netdev.New(netdev.Config{Name: "net0", Interface: tunbridge.Config{Name: "bl0", Offload: true, MTU: 1500}, BoardMAC: tunbridge.MAC{2, 0, 0, 0, 0, 1}})
					if err != nil {
						return err
					}
					h.Devices[0] = n
					return setUp(n.Interface(), "10.9.0.1/24")
				})
				if err == nil {
					err = ns[1].Do(func() error {
						n, err := netdrv.New(netdrv.Config{Name: "net0", Interface: tunbridge.Config{Name: "bl0", Offload: true}, QueueSize: 64})
						if err != nil {
							return err
						}
						a.Devices = []driver.Driver{n}
						return setUp(n.Interface(), "10.9.0.2/24")
					})
				}
				if err != nil {
					t.Fatal(err)
				}
				delete(h.Devices, 7)
			})
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
			defer cancel()
			if err := traffic.WaitReachable(ctx, ns[0], at[1].Addr); err != nil {
				t.Fatal(err)
			}
			resets := e.host.Status().Devices[0].Counters["starts"]
			for n := uint16(1); n < 4; n++ {
				e.remove(n, e.add(n))
			}
			tcp, err := traffic.StartTCP(ctx, at[0], at[1], traffic.TCPConfig{Rate: 2e6})
			if err != nil {
				t.Fatal(err)
			}
			files, routines := openFiles(t), runtime.NumGoroutine()
			for i := range *rounds {
				n := uint16(1 + i%3)
				e.remove(n, e.add(n))
			}
			var moved int64
			e.until("the connection goes on", func() bool {
				s := tcp.Stats()
				if moved == 0 {
					moved = s.Verified
				}
				return s.Err != nil || s.Verified > moved
			})
			if n := openFiles(t); n != files {
				t.Errorf("%d open files, %d before", n, files)
			}
			e.until("goroutines end", func() bool { return runtime.NumGoroutine() <= routines })
			r, err := tcp.Stop()
			if err != nil || r.Corrupt != 0 || r.ChecksumErrors != 0 || r.Bytes != r.Sent || r.Bytes == 0 {
				t.Errorf("the connection: %v, %+v", err, r)
			}
			h, a := e.host.Status(), e.agent.Status()
			if s := h.Devices[0].Counters["starts"]; s != resets || h.Counters["device_resets"] != 0 {
				t.Errorf("the network device was started %d times, and %d resets were asked for; want %d, none", s, h.Counters["device_resets"], resets)
			}
			if h.Counters["link_ups"] != 1 || a.Counters["link_ups"] != 1 || a.Counters["call_timeout"] != 0 {
				t.Errorf("the link came up %d and %d times, and %d requests had no answer", h.Counters["link_ups"], a.Counters["link_ups"], a.Counters["call_timeout"])
			}
			if free, all := e.agent.Shares(); free != 2 || all != 3 {
				t.Errorf("%d of %d parts of the memory are free, want 2 of 3", free, all)
			}
			t.Logf("%d devices came and went over %d bytes in %.1f s, longest gap %v", *rounds, r.Bytes, r.Seconds, r.LongestGap)
		})
	}
}
