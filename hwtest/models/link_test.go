//go:build linux

package models_test

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	vnetns "github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/agent"
	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/device/netdev"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/driver"
	"github.com/boardlink/boardlink/driver/netdrv"
	"github.com/boardlink/boardlink/host"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/trial/netns"
	"github.com/boardlink/boardlink/trial/traffic"
)

// opener opens an end of a modelled board.
type opener func(o board.Options) (board.Board, error)

var (
	openersMu sync.Mutex
	openers   = map[string]opener{}
)

// The session opens boards by spec: "model:NAME host" asks the test.
func init() {
	board.Register(board.Kind{Name: "model", Help: "of a test", Open: func(arg string, o board.Options) (board.Board, error) {
		openersMu.Lock()
		f := openers[arg]
		openersMu.Unlock()
		if f == nil {
			return nil, &board.Error{Spec: "model:" + arg, Reason: "no such test", Class: board.ErrInput}
		}
		return f(o)
	}})
}

func missing(t testing.TB, what string) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatal(what)
	}
	t.Skip(what)
}

// rig is a link between two ends in this process, each with a tap in a namespace of its own.
type rig struct {
	t         testing.TB
	ns        [2]*netns.NS
	host      *host.Link
	agent     *agent.Link
	placement string
	devices   int
	dma       host.DMAConfig
	kind      *mmio.Kind // of the memory across the bus at the host
	stop      context.CancelFunc
	done      sync.WaitGroup
	acct      [2]dma.Account
}

// tweak changes the rig before it starts.
type tweak func(*rig)

const linkName = "l%d"

func start(t testing.TB, open [2]opener, tweaks ...tweak) *rig {
	t.Helper()
	if netns.NeedsUser() {
		missing(t, "needs CAP_SYS_ADMIN and CAP_NET_ADMIN")
	}
	r := &rig{t: t, placement: "auto", devices: 1}
	for _, f := range tweaks {
		f(r)
	}
	log := slog.New(slog.NewTextHandler(logTo{t}, &slog.HandlerOptions{Level: slog.LevelInfo}))
	for i := range r.ns {
		ns, err := netns.New()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ns.Close() })
		r.ns[i] = ns
	}
	specs := [2]string{}
	openersMu.Lock()
	for i, f := range open {
		name := t.Name() + " " + board.Side(i).String()
		openers[name], specs[i] = f, "model:"+name
	}
	openersMu.Unlock()

	backends := map[uint16]device.Device{}
	var nets []driver.Driver
	for d := 0; d < r.devices; d++ {
		var hc netdev.Config
		hc.Name, hc.Number = fmt.Sprintf("net%d", d), uint16(d)
		hc.Interface.Name, hc.Interface.Offload, hc.Interface.MTU = fmt.Sprintf(linkName, d), true, 1500
		var ac netdrv.Config
		ac.Name, ac.Number = hc.Name, hc.Number
		ac.Interface.Name, ac.Interface.Offload = hc.Interface.Name, true
		if err := r.ns[board.Host].Do(func() error {
			n, err := netdev.New(hc)
			if err == nil {
				backends[uint16(d)] = n
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
		if err := r.ns[board.Agent].Do(func() error {
			n, err := netdrv.New(ac)
			if err == nil {
				nets = append(nets, n)
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}
	r.host = host.NewLink(host.Config{Name: "board0", Board: specs[board.Host], Devices: backends, Log: log.With("side", "host"), DMA: r.dma,
		Options: board.Options{Kind: r.kind, Account: &r.acct[0], Logf: debugTo(log, "host")}})
	r.agent = agent.NewLink(agent.Config{Name: "host0", Board: specs[board.Agent], Devices: nets, Placement: r.placement,
		Log: log.With("side", "agent"), Options: board.Options{Account: &r.acct[1], Logf: debugTo(log, "agent")}})
	for i, ns := range r.ns {
		h, err := netlink.NewHandleAt(vnetns.NsHandle(ns.FD()), unix.NETLINK_ROUTE)
		if err != nil {
			t.Fatal(err)
		}
		for d := 0; d < r.devices; d++ {
			l, err := h.LinkByName(fmt.Sprintf(linkName, d))
			if err != nil {
				t.Fatal(err)
			}
			a, _ := netlink.ParseAddr(fmt.Sprintf("192.0.%d.%d/24", d+2, i+1))
			if err := h.AddrAdd(l, a); err != nil {
				t.Fatal(err)
			}
			if err := h.LinkSetUp(l); err != nil {
				t.Fatal(err)
			}
		}
		h.Close()
	}
	ctx, cancel := context.WithCancel(context.Background())
	r.stop = cancel
	r.done.Add(2)
	go func() {
		defer r.done.Done()
		if err := r.host.Run(ctx); err != nil {
			t.Errorf("host: %v", err)
		}
	}()
	go func() {
		defer r.done.Done()
		if err := r.agent.Run(ctx); err != nil {
			t.Errorf("agent: %v", err)
		}
	}()
	t.Cleanup(r.close)
	return r
}

func (r *rig) close() {
	r.stop()
	r.done.Wait()
}

func debugTo(log *slog.Logger, side string) func(string, ...interface{}) {
	return func(f string, args ...interface{}) { log.Info(fmt.Sprintf(f, args...), "side", side) }
}

// logTo is the test's log.
type logTo struct{ t testing.TB }

func (l logTo) Write(p []byte) (int, error) {
	l.t.Logf("%s", p)
	return len(p), nil
}

var _ io.Writer = logTo{}

func eventually(t testing.TB, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !f(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within 20 s: %s", what)
		}
	}
}

// carries tells that all devices of a side run.
func carries(l status.Link) bool {
	if l.State != "up" || len(l.Devices) == 0 {
		return false
	}
	for _, d := range l.Devices {
		if !d.Carrier {
			return false
		}
	}
	return true
}

func (r *rig) up() bool { return carries(r.host.Status()) && carries(r.agent.Status()) }

func (r *rig) waitUp() {
	r.t.Helper()
	eventually(r.t, "link up", r.up)
}

func (r *rig) pair(d int) traffic.Pair {
	a := func(side int) netip.Addr { return netip.MustParseAddr(fmt.Sprintf("192.0.%d.%d", d+2, side+1)) }
	return traffic.Pair{Host: traffic.Endpoint{NS: r.ns[0], Addr: a(0)}, Board: traffic.Endpoint{NS: r.ns[1], Addr: a(1)}}
}

// try sends pings and checked TCP both ways over device d.
func (r *rig) try(d int) {
	r.t.Helper()
	p := r.pair(d)
	ctx, cancel := context.WithTimeout(r.t.Context(), 30*time.Second)
	defer cancel()
	if err := traffic.WaitReachable(ctx, p.Board.NS, p.Host.Addr); err != nil {
		r.t.Fatal(err)
	}
	for _, e := range [][2]traffic.Endpoint{{p.Board, p.Host}, {p.Host, p.Board}} {
		ping, err := traffic.Ping(ctx, e[0].NS, e[1].Addr, traffic.PingConfig{Count: 30, Interval: 5 * time.Millisecond, Sizes: []int{0, 1, 56, 1400}})
		if err != nil || ping.Lost != 0 || ping.Corrupt != 0 {
			r.t.Errorf("ping %s: %d of %d lost, %d corrupt, %v", e[1], ping.Lost, ping.Sent, ping.Corrupt, err)
		}
		tcp, err := traffic.TCP(ctx, e[0], e[1], traffic.TCPConfig{Duration: 300 * time.Millisecond})
		if err != nil || tcp.Corrupt != 0 {
			r.t.Errorf("TCP to %s: %+v, %v", e[1], tcp, err)
		}
	}
}

// bells sums up a counter of the doorbells that a side sleeps on.
func bells(l status.Link, name string) uint64 {
	n := uint64(0)
	for _, d := range l.Devices {
		for _, q := range d.Queues {
			n += q.Doorbell[name]
		}
	}
	return n
}
