//go:build linux

package models_test

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/boardlink/boardlink/agent"
	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/board/loopback"
	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/device/netdev"
	"github.com/boardlink/boardlink/driver"
	"github.com/boardlink/boardlink/driver/netdrv"
	"github.com/boardlink/boardlink/host"
	"github.com/boardlink/boardlink/hwtest/models"
	dmamodel "github.com/boardlink/boardlink/hwtest/models/dma"
	"github.com/boardlink/boardlink/trial/netns"
	"github.com/boardlink/boardlink/trial/traffic"
	"github.com/boardlink/boardlink/tunbridge"
)

// agentEnv makes this test program an agent of the board that it names.
const agentEnv = "BOARDLINK_TEST_AGENT"

func TestMain(m *testing.M) {
	if spec := os.Getenv(agentEnv); spec != "" {
		if err := runAgent(spec); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

const (
	hostAddr, boardAddr = "192.0.2.1", "192.0.2.2"
	killLink            = "k0"
)

func setUp(name, addr string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	a, err := netlink.ParseAddr(addr + "/24")
	if err != nil {
		return err
	}
	if err := netlink.AddrAdd(l, a); err != nil {
		return err
	}
	return netlink.LinkSetUp(l)
}

// runAgent is the process that is killed.
func runAgent(spec string) error {
	c := netdrv.Config{Name: "net0"}
	c.Interface.Name, c.Interface.Offload = killLink, true
	n, err := netdrv.New(c)
	if err != nil {
		return err
	}
	if err := setUp(killLink, boardAddr); err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(io.Discard, nil))
	return agent.NewLink(agent.Config{Name: "host0", Board: spec, Devices: []driver.Driver{n}, Placement: "window", Log: log}).Run(context.Background())
}

// TestEngineAgentKilled: the agent is killed under load, with transfers of its buffers under way, and another one starts, over and over, with
// DMA controllers of two makes: no transfer outlives the link it was for, and nothing arrives damaged.
func TestEngineAgentKilled(t *testing.T) {
	t.Parallel()
	if netns.NeedsUser() {
		missing(t, "needs CAP_SYS_ADMIN and CAP_NET_ADMIN")
	}
	for _, kind := range []string{"fsl85xx", "dw-edma"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			killAgents(t, kind, 1)
		})
	}
}

func killAgents(t *testing.T, kind string, kills int) {
	path := filepath.Join(t.TempDir(), "s")
	s, err := loopback.NewServer(loopback.ServerConfig{Path: path, Size: 8 << 20, Vectors: 8})
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve() }()
	t.Cleanup(func() {
		s.Close()
		<-served
	})
	var f faults
	f.set(dmamodel.Error, 1000)
	var mu sync.Mutex
	var ends []*models.Engined
	name := t.Name() + " host"
	openersMu.Lock()
	openers[name] = func(o board.Options) (board.Board, error) {
		b, err := loopback.Open(path, o)
		if err != nil {
			return nil, err
		}
		e, err := models.NewEngined(b, kind, dmamodel.Options{Fault: f.draw, Delay: 100 * time.Microsecond})
		if err != nil {
			return nil, err
		}
		mu.Lock()
		ends = append(ends, e)
		mu.Unlock()
		return e, nil
	}
	openersMu.Unlock()
	var ns [2]*netns.NS
	for i := range ns {
		if ns[i], err = netns.New(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ns[i].Close() })
	}
	var n *netdev.Net
	if err := ns[0].Do(func() error {
		c := netdev.Config{Name: "net0", BoardMAC: tunbridge.MAC{2, 0, 0, 0, 0, 2}} // the same for each agent, or neighbours have to be found anew
		c.Interface.Name, c.Interface.Offload, c.Interface.MTU = killLink, true, 1500
		var err error
		if n, err = netdev.New(c); err != nil {
			return err
		}
		return setUp(killLink, hostAddr)
	}); err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.NewTextHandler(logTo{t}, &slog.HandlerOptions{Level: slog.LevelWarn}))
	l := host.NewLink(host.Config{Name: "board0", Board: "model:" + name, Devices: map[uint16]device.Device{0: n}, Log: log,
		DMA: host.DMAConfig{Mode: host.DMAOn, Min: 64}})
	ctx, cancel := context.WithCancel(t.Context())
	var done sync.WaitGroup
	done.Go(func() {
		if err := l.Run(ctx); err != nil {
			t.Errorf("host: %v", err)
		}
	})
	stop := func() {
		cancel()
		done.Wait()
	}
	t.Cleanup(stop)
	boardEnd := func() (kill func()) {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), agentEnv+"=loopback:"+path)
		cmd.Stderr = os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if err := ns[1].Start(cmd); err != nil {
			t.Fatal(err)
		}
		var once sync.Once
		kill = func() {
			once.Do(func() {
				cmd.Process.Kill()
				cmd.Wait()
			})
		}
		t.Cleanup(kill)
		return kill
	}
	hostEnd := traffic.Endpoint{NS: ns[0], Addr: netip.MustParseAddr(hostAddr)}
	there := traffic.Endpoint{NS: ns[1], Addr: netip.MustParseAddr(boardAddr)}
	tctx, tcancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer tcancel()
	for k := 0; k <= kills; k++ {
		kill := boardEnd()
		if err := traffic.WaitReachable(tctx, ns[0], there.Addr); err != nil {
			t.Fatal(err)
		}
		if k == kills {
			for _, e := range [][2]traffic.Endpoint{{there, hostEnd}, {hostEnd, there}} {
				ping, err := traffic.Ping(tctx, e[0].NS, e[1].Addr, traffic.PingConfig{Count: 10, Interval: 2 * time.Millisecond, Sizes: []int{0, 56, 1400}})
				if err != nil || ping.Lost != 0 || ping.Corrupt != 0 {
					t.Errorf("ping %s: %+v, %v", e[1], ping, err)
				}
				tcp, err := traffic.TCP(tctx, e[0], e[1], traffic.TCPConfig{Duration: 100 * time.Millisecond})
				if err != nil || tcp.Corrupt != 0 {
					t.Errorf("TCP to %s: %+v, %v", e[1], tcp, err)
				}
			}
			break
		}
		// Packets of both directions under way when it dies.
		var udp []*traffic.UDPTraffic
		for _, e := range [][2]traffic.Endpoint{{there, hostEnd}, {hostEnd, there}} {
			u, err := traffic.StartUDP(tctx, e[0], e[1], traffic.UDPConfig{Duration: time.Minute, Size: 1400, Rate: 20000, Quiet: 20 * time.Millisecond})
			if err != nil {
				t.Fatal(err)
			}
			udp = append(udp, u)
		}
		before := moved(l.Status(), "engine_copies")
		eventually(t, "transfers", func() bool { return moved(l.Status(), "engine_copies") > before+200 })
		kill()
		eventually(t, "link down", func() bool { return l.Status().State != "up" })
		for _, u := range udp {
			if res, err := u.Stop(); res.Corrupt != 0 {
				t.Errorf("%+v, %v", res, err)
			}
		}
	}
	st := l.Status()
	t.Logf("%d transfers of %d bytes, %d failed, %d done over again, %d aborted; %d errors injected", moved(st, "engine_copies"), moved(st, "engine_bytes"),
		moved(st, "failed"), moved(st, "redone"), moved(st, "aborted"), atomic.LoadUint64(&f.hits))
	if moved(st, "disabled") != 0 || moved(st, "engine_copies") < 500 {
		t.Errorf("%v", st.Devices[0].Counters)
	}
	stop()
	mu.Lock()
	defer mu.Unlock()
	for _, e := range ends {
		e.Controller().Settle()
		if err := e.Controller().Err(); err != nil {
			t.Error(err)
		}
	}
}
