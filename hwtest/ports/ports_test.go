//go:build linux

package ports_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/hwtest/ports"
	"github.com/boardlink/boardlink/trial"
	"github.com/boardlink/boardlink/trial/netns/netnstest"
	"github.com/boardlink/boardlink/trial/traffic"
	"go.uber.org/goleak"
)

// bin receives the programs of all machines.
var bin string

func TestMain(m *testing.M) {
	var err error
	if bin, err = os.MkdirTemp("", "boardlink-ports-"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	os.RemoveAll(bin)
	if code == 0 {
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// root is the module's root, seen from this directory.
var root = filepath.Join("..", "..")

func lacks(t testing.TB, format string, args ...any) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf(format, args...)
	}
	t.Skipf(format, args...)
}

// nativeCommand builds the program of this machine and returns how an end of it is started.
func nativeCommand(t testing.TB, s board.Side) []string {
	t.Helper()
	path, err := ports.BuildNative(root, bin)
	if err != nil {
		t.Fatal(err)
	}
	return []string{path, s.String()}
}

func command(t testing.TB, m ports.Target, s board.Side) []string {
	t.Helper()
	path, err := m.Build(root, bin, s)
	if errors.Is(err, ports.ErrTool) {
		lacks(t, "%v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	words, err := m.Command(path, s)
	if err != nil {
		lacks(t, "%v", err)
	}
	return words
}

// Limits are wide: an emulated end is ten times slower, and the machine may be busy.
const upTime = 30 * time.Second

func waitUp(t testing.TB, r *trial.Rig) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), upTime)
	defer cancel()
	if err := r.WaitUp(ctx); err != nil {
		t.Fatal(err)
	}
}

// run pings both ways, with IPv4 and IPv6, sends TCP whose every byte is checked both ways, and UDP
// packets.
func run(t testing.TB, r *trial.Rig, d time.Duration) traffic.Result {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	res, err := traffic.Run(ctx, r.Pairs(0), traffic.RunConfig{Duration: d, Ready: upTime,
		Ping: traffic.PingConfig{Count: 25, Interval: 2 * time.Millisecond, Timeout: 5 * time.Second},
		UDP:  traffic.UDPConfig{Rate: 2000}})
	if err != nil {
		t.Fatal(err)
	}
	if !res.OK() || res.TCPGbps.BoardToHost == 0 || res.TCPGbps.HostToBoard == 0 || res.UDP64Kpps.BoardToHost == 0 || res.UDP64Kpps.HostToBoard == 0 {
		t.Errorf("%+v", res)
	}
	return res
}

// cases are what TestCross runs: the machine, the end that it is, and how memory across the bus is accessed.
type testCase struct {
	ports.Target
	side      board.Side
	memory    string // "" is cached
	placement string
	ring      string // "" is split
}

func (c testCase) String() string {
	return strings.TrimSpace(c.Name + " " + c.side.String() + " " + strings.Join(strings.Fields(c.memory+" "+c.placement+" "+c.ring), " "))
}

func cases() []testCase {
	var out []testCase
	for _, m := range ports.Targets {
		out = append(out, testCase{Target: m, side: board.Agent})
		if !m.AgentOnly {
			out = append(out, testCase{Target: m, side: board.Host})
		}
		// The copy loops for device memory, in both byte orders and both sizes of a word.
		if m.Name == "ppc64" || m.Name == "ppc-603e" || m.Name == "386" {
			out = append(out, testCase{m, board.Agent, "uncached", "push", ""}, testCase{m, board.Host, "uncached", "window", ""})
			out = append(out, testCase{m, board.Agent, "", "window", "packed"}, testCase{m, board.Host, "", "window", "packed"})
		}
	}
	return out
}

// TestCross: each kind of machine is the board of a native carrier and the carrier of a native board. The link
// comes up, carries traffic, and comes up again after each end was killed.
func TestCross(t *testing.T) {
	netnstest.Need(t)
	for _, m := range cases() {
		t.Run(m.String(), func(t *testing.T) {
			if m.Arch == "386" && !ports.Runs386() {
				t.Skip(ports.No386)
			}
			c := trial.Config{Offload: m.memory == "", Persist: true, Memory: m.memory, Placement: m.placement}
			c.Command[m.side] = command(t, m.Target, m.side)
			c.Command[m.side.Other()] = nativeCommand(t, m.side.Other())
			if m.Deny != "" {
				c.HostArgs = []string{"--deny", m.Deny}
			}
			if m.ring != "" {
				c.AgentArgs = []string{"--ring", m.ring}
			}
			t.Parallel() // the programs are built: from here on most is waiting
			cross(t, m, c)
		})
	}
}

func cross(t *testing.T, m testCase, c trial.Config) {
	r, err := trial.Start(c)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("host:\n%s\nagent:\n%s", r.Log(board.Host), r.Log(board.Agent))
		}
	}()
	waitUp(t, r)
	whatRuns(t, r, m)
	res := run(t, r, 300*time.Millisecond)
	negotiated(t, r, m)
	for _, s := range []board.Side{m.side, m.side.Other()} {
		if err := r.Kill(s); err != nil {
			t.Fatal(err)
		}
		if err := r.StartSide(s); err != nil {
			t.Fatal(err)
		}
		waitUp(t, r)
		again := run(t, r, 100*time.Millisecond)
		res.Ping.Sent += again.Ping.Sent
		res.Ping.Received += again.Ping.Received
	}
	if t.Failed() {
		return
	}
	// make test-ports prints this line; its table has the plain cases.
	t.Logf("result: %v: ping %d of %d, TCP %.1f/%.1f Gbit/s", m, res.Ping.Received, res.Ping.Sent, res.TCPGbps.HostToBoard, res.TCPGbps.BoardToHost)
}

// whatRuns checks that the end under test is what it is said to be: the emulator, with the program of the target.
func whatRuns(t *testing.T, r *trial.Rig, m testCase) {
	t.Helper()
	prefix, err := m.Prefix()
	if err != nil || len(prefix) == 0 {
		return // the program was checked when it was built
	}
	ctx, cancel := context.WithTimeout(context.Background(), upTime)
	defer cancel()
	p, err := r.Status(ctx, m.side)
	if err != nil {
		t.Fatal(err)
	}
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", p.PID))
	if err != nil {
		t.Fatal(err)
	}
	want, err := filepath.EvalSymlinks(prefix[0])
	if err != nil {
		t.Fatal(err)
	}
	if exe != want {
		t.Errorf("the %s is run by %s, not by %s", m.side, exe, want)
	}
}

// negotiated checks that the two ends agree, and that what was denied is off and the rest of what matters to byte
// order is on.
func negotiated(t *testing.T, r *trial.Rig, m testCase) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), upTime)
	defer cancel()
	var seen [2]string
	for _, s := range []board.Side{board.Host, board.Agent} {
		p, err := r.Status(ctx, s)
		if err != nil {
			t.Fatal(err)
		}
		d := p.Links[0].Devices[0]
		seen[s] = strings.Join(d.Negotiated, " ")
		on := map[string]bool{}
		for _, f := range d.Negotiated {
			on[f] = true
		}
		want := []string{"version_1", "event_idx", "indirect_desc", "mrg_rxbuf"}
		if on["ring_packed"] != (m.ring == "packed") {
			t.Errorf("%s: packed ring negotiated: %v, asked for: %q", s, on["ring_packed"], m.ring)
		}
		if m.memory == "" {
			want = append(want, "csum", "guest_csum", "host_tso4", "guest_tso4")
		}
		for _, f := range want {
			if on[f] == strings.Contains(m.Deny, f) {
				t.Errorf("%s: feature %s: negotiated %v (denied: %q)", s, f, on[f], m.Deny)
			}
		}
	}
	if seen[0] != seen[1] {
		t.Errorf("the ends disagree:\nhost  %s\nagent %s", seen[0], seen[1])
	}
}
