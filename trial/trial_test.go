//go:build linux

package trial_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/trial"
	"github.com/boardlink/boardlink/trial/netns"
	"github.com/boardlink/boardlink/trial/netns/netnstest"
	"github.com/boardlink/boardlink/trial/traffic"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

var exe string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "boardlink-test-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	exe = filepath.Join(dir, "boardlink")
	cmd := exec.Command("go", "build", "-o", exe, "github.com/boardlink/boardlink/cmd/boardlink")
	if out, err := cmd.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build: %v\n%s", err, out)
		os.Exit(1)
	}
	code := m.Run()
	os.RemoveAll(dir)
	if code == 0 {
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

func start(t testing.TB, c trial.Config) *trial.Rig {
	t.Helper()
	netnstest.Need(t)
	c.Exe = exe
	r, err := trial.Start(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("host:\n%s\nagent:\n%s", r.Log(board.Host), r.Log(board.Agent))
		}
	})
	waitUp(t, r)
	return r
}

func waitUp(t testing.TB, r *trial.Rig) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	err := r.WaitUp(ctx)
	// An agent that has failed a few times, as the other end's interface was taken away, tries on.
	for setup := new(trial.SetupError); errors.As(err, &setup) && ctx.Err() == nil; err = r.WaitUp(ctx) {
		time.Sleep(50 * time.Millisecond)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func getStatus(t testing.TB, r *trial.Rig, s board.Side) status.Program {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	p, err := r.Status(ctx, s)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// checkBus: with placement push nobody reads, whatever the area and the direction; in placement window each read is one of the
// host's, of what the board has to say: descriptors, the driver area, and frames from the board.
func checkBus(t *testing.T, placement string, packed bool, b trial.Bus) {
	t.Helper()
	for _, w := range []struct {
		name    string
		b       trial.Way
		toBoard bool
	}{{"board to host", b.BoardToHost, false}, {"host to board", b.HostToBoard, true}} {
		a := w.b.Areas
		for _, r := range []struct {
			area          string
			p             status.PerFrame
			reads, writes bool // in placement window
		}{
			{"descriptor", a.Descriptor, true, packed},
			{"driver", a.Driver, true, false},
			{"device", a.Device, false, true},
			{"payload", a.Payload, !w.toBoard, w.toBoard},
		} {
			if placement == "push" {
				r.reads, r.writes = false, true
				if r.area == "descriptor" && w.toBoard {
					r.writes = r.p.Writes != 0 // the same buffers again and again: what has not changed is not written
				}
			} else if packed && r.area == "device" {
				r.writes = r.p.Writes != 0 // event suppression: written before sleeping only
			}
			if (r.p.Reads != 0) != r.reads || (r.p.Writes != 0) != r.writes ||
				(r.p.ReadBytes != 0) != r.reads || (r.p.WriteBytes != 0) != r.writes {
				t.Errorf("%s, %s, %s: %+v a frame; reads expected: %v, writes: %v", placement, w.name, r.area, r.p, r.reads, r.writes)
			}
		}
		if w.b.Frames == 0 || placement == "push" && w.b.IdlePolls != 0 || w.b.IdlePolls > w.b.Reads {
			t.Errorf("%s: %+v", w.name, w.b)
		}
	}
}

// The main job, in every mode that an operator can choose.
func TestModes(t *testing.T) {
	netnstest.Need(t)
	for _, c := range []trial.Config{
		{Link: "tap", Offload: true, MTU: 1500},
		{Link: "tap", Offload: true, MTU: 65000},
		{Link: "tap", Offload: false, MTU: 1500},
		{Link: "tap", Offload: false, MTU: 65000},
		{Link: "tun", Offload: true, MTU: 1500},
		{Link: "tun", Offload: false, MTU: 65000},
		{Link: "tap", Offload: true, MTU: 1500, Placement: "window"},
		{Link: "tun", Offload: false, MTU: 1500, Placement: "window"},
		{Link: "tap", Offload: true, MTU: 1500, Placement: "window", AgentArgs: []string{"--ring", "packed"}},
		{Link: "tun", Offload: false, MTU: 65000, Placement: "window", AgentArgs: []string{"--ring", "packed", "--queue-size", "64"}},
		{Link: "tap", Offload: true, MTU: 1500, Memory: "uncached", Placement: "window", AgentArgs: []string{"--ring", "packed"}, HostArgs: []string{"--deny", "in_order,event_idx"}},
		{Link: "tap", Offload: true, MTU: 1500, Memory: "uncached"},
		{Link: "tap", Offload: true, MTU: 1500, Memory: "uncached", Placement: "window"},
		{Link: "tap", Offload: true, MTU: 1500, Memory: "write-combining", Window: 2 << 20, Vectors: 1},
		{Link: "tap", Offload: true, MTU: 1500, Window: 512 << 10}, // too small for a pool
		{Link: "tap", Offload: true, MTU: 1500, HostArgs: []string{"--no-pool"}},
		{Link: "tap", Offload: true, MTU: 1500, HostArgs: []string{"--deny", "event_idx,mrg_rxbuf,indirect_desc"}},
		{Link: "tap", Offload: true, MTU: 1500, Nets: 3, Vectors: 2},
		{Link: "tap", Offload: true, MTU: 1500, HostArgs: []string{"--no-interrupts"}, AgentArgs: []string{"--no-interrupts"}},
	} {
		name := fmt.Sprintf("%s offload=%v mtu=%d %s %s %d vectors=%d nets=%d %s", c.Link, c.Offload, c.MTU, c.Placement, c.Memory, c.Window>>10, c.Vectors, c.Nets, strings.Join(append(c.HostArgs, c.AgentArgs...), " "))
		t.Run(name, func(t *testing.T) {
			c.Exe = exe
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			res, err := trial.Run(ctx, c, traffic.RunConfig{Duration: 120 * time.Millisecond,
				Ping: traffic.PingConfig{Count: 50, Interval: 2 * time.Millisecond}})
			if err != nil {
				t.Fatal(err)
			}
			if !res.OK() || res.TCPGbps.BoardToHost == 0 || res.TCPGbps.HostToBoard == 0 || res.UDP64Kpps.BoardToHost == 0 || res.UDP64Kpps.HostToBoard == 0 {
				t.Errorf("%+v", res)
			}
			if (res.GSOFrames != 0) != c.Offload {
				t.Errorf("%d super-packets with offload=%v", res.GSOFrames, c.Offload)
			}
			if res.Bus.Writes == 0 || res.DoorbellsPerFrame == 0 {
				t.Errorf("nothing was counted: %+v, %f doorbells", res.Bus, res.DoorbellsPerFrame)
			}
			want := "push"
			if c.Placement == "window" || c.Window == 512<<10 || slices.Contains(c.HostArgs, "--no-pool") {
				want = "window"
			}
			if got, want := slices.Contains(res.Setup.Negotiated, "ring_packed"), slices.Contains(c.AgentArgs, "packed"); got != want {
				t.Errorf("packed rings: %v, want %v", got, want)
			}
			if res.Setup.Placement != want {
				t.Errorf("placement %s, want %s", res.Setup.Placement, want)
			}
			// What placement push is for: nothing is read across the bus but the flush before a sleep.
			if (res.Bus.Reads == 0) != (want == "push") {
				t.Errorf("placement %s: %f reads across the bus a frame", want, res.Bus.Reads)
			}
			// A read or a write at each interface, and few reads that find nothing: at most 1.1 at each.
			if res.SyscallsPerFrame > 2.2 {
				t.Errorf("%.3f system calls a frame at both interfaces", res.SyscallsPerFrame)
			}
			checkBus(t, want, slices.Contains(c.AgentArgs, "packed"), res.Bus)
			t.Logf("ping %.0f us, tcp %.1f/%.1f Gbit/s, udp %.0f/%.0f kpps, %.1f reads, %.1f writes, %.3f doorbells, %.3f system calls a frame, %d rescued", res.RTT.P50,
				res.TCPGbps.BoardToHost, res.TCPGbps.HostToBoard, res.UDP64Kpps.BoardToHost, res.UDP64Kpps.HostToBoard,
				res.Bus.Reads, res.Bus.Writes, res.DoorbellsPerFrame, res.SyscallsPerFrame, res.Rescued)
		})
	}
}

// TestDoor: both ends joined by a vhost-user socket, the agent as front end, carry what they carry over a board.
func TestDoor(t *testing.T) {
	netnstest.Need(t)
	for _, c := range []trial.Config{
		{Offload: true, MTU: 1500},
		{Offload: false, MTU: 9000, Ring: "packed", Queues: 2},
		{Offload: true, MTU: 65000, Ring: "packed"},
	} {
		c.Exe, c.Door = exe, "vhost-user"
		t.Run(fmt.Sprintf("offload=%v mtu=%d %s queues=%d", c.Offload, c.MTU, c.Ring, c.Queues), func(t *testing.T) {
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			res, err := trial.Run(ctx, c, traffic.RunConfig{Duration: 120 * time.Millisecond,
				Ping: traffic.PingConfig{Count: 50, Interval: 2 * time.Millisecond}})
			if err != nil {
				t.Fatal(err)
			}
			if !res.OK() || res.TCPGbps.BoardToHost == 0 || res.TCPGbps.HostToBoard == 0 || res.UDP64Kpps.BoardToHost == 0 || res.UDP64Kpps.HostToBoard == 0 {
				t.Errorf("%+v", res)
			}
			if (res.GSOFrames != 0) != c.Offload {
				t.Errorf("%d super-packets with offload=%v", res.GSOFrames, c.Offload)
			}
			if s := res.Setup; s.Door != "vhost-user" || s.MTU != c.MTU || (s.Ring == "packed") != (c.Ring == "packed") || s.Pairs != max(1, c.Queues) {
				t.Errorf("set up as %+v", s)
			}
		})
	}
}

// carrier is what the kernel counted of an interface. Link notifications would not do: the
// kernel gathers those that follow each other within a second.
type carrier struct {
	index   int
	off, on uint32
}

func carrierOf(t *testing.T, ns *netns.NS, name string) (c carrier) {
	t.Helper()
	const ifaUp, ifaDown = 47, 48 // IFLA_CARRIER_UP_COUNT, IFLA_CARRIER_DOWN_COUNT
	err := ns.Do(func() error {
		h, err := netlink.NewHandle()
		if err != nil {
			return err
		}
		defer h.Close()
		l, err := h.LinkByName(name)
		if err != nil {
			return err
		}
		c.index = l.Attrs().Index
		req := nl.NewNetlinkRequest(unix.RTM_GETLINK, unix.NLM_F_ACK)
		msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
		msg.Index = int32(c.index)
		req.AddData(msg)
		out, err := req.Execute(unix.NETLINK_ROUTE, 0)
		if err != nil {
			return err
		}
		attrs, err := nl.ParseRouteAttr(out[0][unix.SizeofIfInfomsg:])
		if err != nil {
			return err
		}
		for _, a := range attrs {
			switch a.Attr.Type {
			case ifaUp:
				c.on = binary.NativeEndian.Uint32(a.Value)
			case ifaDown:
				c.off = binary.NativeEndian.Uint32(a.Value)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// load is traffic that goes on through kills: a TCP connection and UDP packets each way.
type load struct {
	tcp [2]*traffic.TCPTraffic
	udp [2]*traffic.UDPTraffic
}

func startLoad(t *testing.T, ctx context.Context, r *trial.Rig) *load {
	t.Helper()
	l := new(load)
	p := r.Pairs(0)[0]
	for i, ends := range [][2]traffic.Endpoint{{p.Board, p.Host}, {p.Host, p.Board}} {
		var err error
		// Paced: the test is about kills, and the machine has to have time for them.
		if l.tcp[i], err = traffic.StartTCP(ctx, ends[0], ends[1], traffic.TCPConfig{Rate: 20 << 20, Grace: 30 * time.Second}); err != nil {
			t.Fatal(err)
		}
		if l.udp[i], err = traffic.StartUDP(ctx, ends[0], ends[1], traffic.UDPConfig{Size: 64, Rate: 2000}); err != nil {
			t.Fatal(err)
		}
	}
	return l
}

// restartTCP ends the connections, checked to their last byte, and starts new ones.
func (l *load) restartTCP(t *testing.T, ctx context.Context, r *trial.Rig) {
	t.Helper()
	p := r.Pairs(0)[0]
	for i, ends := range [][2]traffic.Endpoint{{p.Board, p.Host}, {p.Host, p.Board}} {
		res, err := l.tcp[i].Stop()
		if err != nil || res.Corrupt != 0 {
			t.Errorf("TCP (direction %d): %v, %+v", i, err, res)
		}
		if l.tcp[i], err = traffic.StartTCP(ctx, ends[0], ends[1], traffic.TCPConfig{Rate: 20 << 20, Grace: 30 * time.Second}); err != nil {
			t.Fatal(err)
		}
	}
}

// describe logs what a failure may be due to.
func describe(t *testing.T, r *trial.Rig) {
	for _, side := range []board.Side{board.Host, board.Agent} {
		for _, cmd := range [][]string{{"ip", "-s", "neigh"}, {"ip", "-s", "link", "show", trial.Interface(0)}, {"ss", "-tineo"}} {
			c := exec.Command(cmd[0], cmd[1:]...)
			r.NS(side).Do(func() error {
				out, _ := c.CombinedOutput()
				t.Logf("%s: %v:\n%s", side, cmd, out)
				return nil
			})
		}
		t.Logf("%s: %+v", side, getStatus(t, r, side).Links)
	}
}

// flows waits until more UDP packets arrive in both directions and returns how long it took.
func (l *load) flows(t *testing.T, r *trial.Rig, limit time.Duration) time.Duration {
	t.Helper()
	begin := time.Now()
	for i := range l.udp {
		base := l.udp[i].Stats().Received
		for l.udp[i].Stats().Received == base {
			if time.Since(begin) > limit {
				describe(t, r)
				t.Fatalf("UDP (direction %d) does not flow %v after the start", i, limit)
			}
			time.Sleep(time.Millisecond)
		}
	}
	return time.Since(begin)
}

// moves waits until both TCP connections move on.
func (l *load) moves(t *testing.T, r *trial.Rig, limit time.Duration) {
	t.Helper()
	begin := time.Now()
	for i := range l.tcp {
		base := l.tcp[i].Stats().Verified
		for l.tcp[i].Stats().Verified == base {
			if s := l.tcp[i].Stats(); s.Err != nil || time.Since(begin) > limit {
				describe(t, r)
				t.Fatalf("TCP (direction %d) does not move on %v after the start: %+v", i, limit, s)
			}
			time.Sleep(time.Millisecond)
		}
	}
}

func (l *load) stop(t *testing.T) {
	t.Helper()
	for i := range l.tcp {
		res, err := l.tcp[i].Stop()
		if err != nil || res.Corrupt != 0 {
			t.Errorf("TCP (direction %d): %v, %+v", i, err, res)
		}
		u, err := l.udp[i].Stop()
		if err != nil || u.Corrupt != 0 {
			t.Errorf("UDP (direction %d): %v, %+v", i, err, u)
		}
	}
}

// Either end is killed under load and started again: the interfaces stay, traffic goes on.
func TestKill(t *testing.T) {
	times := 20
	if testing.Short() {
		times = 3
	}
	for _, side := range []board.Side{board.Host, board.Agent} {
		t.Run(side.String(), func(t *testing.T) {
			ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
			defer cancel()
			r := start(t, trial.Config{Offload: true, Persist: true})
			survivor := side.Other()
			w := carrierOf(t, r.NS(survivor), trial.Interface(0))
			l := startLoad(t, ctx, r)
			l.flows(t, r, 3*time.Second)
			l.moves(t, r, 3*time.Second)
			var worst time.Duration
			for n := 0; n < times; n++ {
				if n > 0 {
					// Connections that lived through one kill each: the outage counts as a round trip, and over
					// many kills the kernel's retransmission time-out grows past any limit.
					l.restartTCP(t, ctx, r)
					l.moves(t, r, 5*time.Second)
				}
				if err := r.Kill(side); err != nil {
					t.Fatal(err)
				}
				time.Sleep(300 * time.Millisecond)
				begin := time.Now()
				if err := r.StartSide(side); err != nil {
					t.Fatal(err)
				}
				l.flows(t, r, 5*time.Second)
				if d := time.Since(begin); d > worst {
					worst = d
				}
				l.moves(t, r, 10*time.Second) // by its next retransmission
			}
			l.stop(t)
			waitUp(t, r)
			now := carrierOf(t, r.NS(survivor), trial.Interface(0))
			if off, on := now.off-w.off, now.on-w.on; now.index != w.index || off < uint32(times) || on < uint32(times) {
				t.Errorf("the survivor's interface: index %d, before %d; carrier off %d and on %d times, want %d", now.index, w.index, off, on, times)
			}
			t.Logf("%d kills, UDP flowed again after at most %v", times, worst)
		})
	}
}

// A stopped end is lost, and does no harm when it wakes: neither to the other end that waits for it,
// nor to one that was started anew meanwhile.
func TestStopped(t *testing.T) {
	for _, side := range []board.Side{board.Host, board.Agent} {
		for _, replace := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, other end replaced %v", side, replace), func(t *testing.T) {
				t.Parallel() // they sleep, mostly
				ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
				defer cancel()
				r := start(t, trial.Config{Offload: true, Persist: true})
				survivor := side.Other()
				w := carrierOf(t, r.NS(survivor), trial.Interface(0))
				l := startLoad(t, ctx, r)
				l.flows(t, r, 3*time.Second)
				if err := r.Signal(side, syscall.SIGSTOP); err != nil {
					t.Fatal(err)
				}
				time.Sleep(1500 * time.Millisecond)
				if replace {
					if err := r.Kill(survivor); err != nil {
						t.Fatal(err)
					}
					if err := r.StartSide(survivor); err != nil {
						t.Fatal(err)
					}
				}
				time.Sleep(1500 * time.Millisecond)
				if up := getStatus(t, r, survivor).Links[0].State == "up"; up {
					t.Error("the other end holds the link up with a stopped peer")
				}
				if now := carrierOf(t, r.NS(survivor), trial.Interface(0)); now.off == w.off {
					t.Error("the carrier stayed on")
				}
				if err := r.Signal(side, syscall.SIGCONT); err != nil {
					t.Fatal(err)
				}
				l.flows(t, r, 5*time.Second)
				l.moves(t, r, 10*time.Second)
				l.stop(t)
				waitUp(t, r)
				for _, s := range []board.Side{board.Host, board.Agent} {
					for _, d := range getStatus(t, r, s).Links[0].Devices {
						if d.Counters["broken"] != 0 {
							t.Errorf("the %s found a broken queue: %s", s, d.LastError)
						}
					}
				}
				if now := carrierOf(t, r.NS(survivor), trial.Interface(0)); now.index != w.index {
					t.Error("the interface was removed")
				}
			})
		}
	}
}
