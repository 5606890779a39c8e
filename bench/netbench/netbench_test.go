//go:build linux

package netbench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/boardlink/boardlink/bench/benchkit"
	"github.com/boardlink/boardlink/trial"
	"github.com/boardlink/boardlink/trial/netns/netnstest"
	"github.com/boardlink/boardlink/trial/traffic"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

var exe string

func TestMain(m *testing.M) {
	benchkit.Peer()
	os.Exit(testMain(m))
}

func testMain(m *testing.M) int {
	dir, err := os.MkdirTemp("", "boardlink-netbench-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	exe = filepath.Join(dir, "boardlink")
	cmd := exec.Command("go", "build", "-o", exe, "github.com/boardlink/boardlink/cmd/boardlink")
	if out, err := cmd.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build: %v\n%s", err, out)
		return 1
	}
	code := m.Run()
	if code == 0 {
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	return code
}

func short(link string, offload bool, queues int) Config {
	return Config{Boardlink: []Boardlink{{"boardlink", trial.Config{Exe: exe}}}, MTUs: []int{1500}, Rounds: 1, Streams: []int{2},
		Duration: 10 * time.Millisecond, Link: link, Offload: offload, Queues: queues}
}

// leftovers returns the processes that this one has left running.
func leftovers(t *testing.T) []string {
	t.Helper()
	tasks, err := filepath.Glob("/proc/self/task/*/children")
	if err != nil || len(tasks) == 0 {
		t.Fatal(tasks, err)
	}
	var l []string
	for _, f := range tasks {
		if b, err := os.ReadFile(f); err == nil { // a thread may end meanwhile
			l = append(l, strings.Fields(string(b))...)
		}
	}
	return l
}

// TestCongestionControl: the congestion control that is asked for, also one that the kernel does not allow to namespaces, is that of
// both ends of every connection; the machine keeps its own.
func TestCongestionControl(t *testing.T) {
	netnstest.Need(t)
	before, err := os.ReadFile(congestionControl)
	if err != nil {
		t.Fatal(err)
	}
	available, err := os.ReadFile(availableCongestion)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []Config{{Congestion: "vegan"}, {Congestion: "reno "}} {
		if err := c.Check(); err == nil {
			t.Errorf("TCP with %q", c.Congestion)
		}
	}
	c := short("tap", true, 1)
	for _, want := range append(strings.Fields(string(available)), "") {
		c.Congestion = want
		if err := c.setDefaults(); err != nil {
			t.Fatal(err)
		}
		if want == "" {
			want = strings.TrimSpace(string(before))
		}
		p, err := startPath(t.Context(), &c, Veth, 1500)
		if err != nil {
			t.Fatal(err)
		}
		e := p.pair()
		for _, c.Verified = range []bool{false, true} {
			l, err := startTCP(t.Context(), e.Host, e.Board, 2, &c)
			if err != nil {
				t.Fatal(err)
			}
			if got := congestionControls(t); len(got) != 4 || strings.Join(got, " ") != strings.Repeat(want+" ", 3)+want {
				t.Errorf("verified=%v: connections with %q, want 4 ends with %q", c.Verified, got, want)
			}
			if err := l.stop(); err != nil {
				t.Error(err)
			}
		}
		if err := p.close(); err != nil {
			t.Error(err)
		}
	}
	if now, err := os.ReadFile(congestionControl); err != nil || string(now) != string(before) {
		t.Errorf("TCP of the machine with %q, was %q (%v)", now, before, err)
	}
}

// congestionControls asks each connected TCP socket of this process.
func congestionControls(t *testing.T) []string {
	t.Helper()
	dir, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, f := range dir {
		fd, _ := strconv.Atoi(f.Name())
		if _, err := unix.Getpeername(fd); err != nil {
			continue
		}
		if name, err := unix.GetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION); err == nil {
			got = append(got, strings.TrimRight(name, "\x00"))
		}
	}
	return got
}

// TestCongestionRefused: what an unprivileged process may not set is one line that names the sysctl.
func TestCongestionRefused(t *testing.T) {
	err := error(&traffic.CongestionError{Name: "cubic", Err: unix.EPERM})
	b, _ := os.ReadFile("/proc/sys/net/ipv4/tcp_allowed_congestion_control")
	allowed := strings.TrimSpace(string(b))
	if want := fmt.Sprintf("sysctl -w net.ipv4.tcp_allowed_congestion_control=%q", allowed+" cubic"); !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
		t.Errorf("%v: want one line with %s", err, want)
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	var refused *traffic.CongestionError
	if err := traffic.SetCongestion(fd, "vegan"); !errors.As(err, &refused) || !errors.Is(err, unix.ENOENT) {
		t.Errorf("no such congestion control: %v", err)
	}
}

// TestPaths: each path carries everything, and has its figures.
func TestPaths(t *testing.T) {
	netnstest.Need(t)
	plain := short("tun", false, 2)
	plain.Paths, plain.Verified = []string{OneProcess, TwoProcesses, "boardlink"}, true
	for _, c := range []Config{short("tap", true, 1), plain} {
		t.Run(fmt.Sprintf("%s offload=%v queues=%d", c.Link, c.Offload, c.Queues), func(t *testing.T) {
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			r, err := Run(ctx, c)
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range r.Figures {
				for _, p := range r.Paths {
					s, ok := f.Paths[p]
					kernel := p == Veth
					bells := strings.Contains(f.Name, "doorbells") || strings.Contains(f.Name, "calls at the")
					if want := !(kernel && (strings.Contains(f.Name, ": cpu") || strings.Contains(f.Name, "switches") || strings.Contains(f.Name, "a frame") || strings.Contains(f.Name, "system calls"))) &&
						(!bells || p == "boardlink"); ok != want {
						t.Errorf("%s of %s: there is one: %v", f.Name, p, ok)
					}
					if ok && (len(s.Rounds) != c.Rounds || s.Median <= 0 && !bells && f.Unit != "%" && !strings.Contains(f.Name, "switches")) {
						t.Errorf("%s of %s: %+v", f.Name, p, s)
					}
					if !ok || f.Unit == "%" || bells || strings.Contains(f.Name, "switches") {
						continue
					}
					if one := f.Paths[OneProcess]; p != OneProcess && f.OfOne[p].Median != s.Median/one.Median {
						t.Errorf("%s of %s: ratio %v of %v", f.Name, p, f.OfOne[p], one)
					}
				}
			}
			if n := len(r.Figures); n < 2*(6+4)+2*5 {
				t.Errorf("%d figures", n)
			}
			// Super-packets, or each frame alone: counts, no times.
			for _, p := range plain.Paths {
				size := 0.0
				for _, way := range []string{"board to host", "host to board"} {
					size = max(size, r.Figure(1500, "tcp 2 streams "+way+": bytes a frame").Paths[p].Median)
				}
				if (size > 1600) != c.Offload {
					t.Errorf("%s, offload %v: %.0f bytes a frame", p, c.Offload, size)
				}
			}
			// One read and one write a frame, but for the one that is under way.
			if n := r.Figure(1500, "udp 64 B host to board: system calls a frame").Paths[OneProcess].Median; n < 1 || n > 4 {
				t.Errorf("%v system calls a frame in one process", n)
			}
			if r.PingsLost != 0 || len(r.RoundTrips) != 1 {
				t.Errorf("%d pings lost, %v", r.PingsLost, r.RoundTrips)
			}
			if _, err := json.Marshal(r); err != nil {
				t.Error(err)
			}
		})
	}
	if l := leftovers(t); len(l) != 0 {
		t.Errorf("processes %v are left", l)
	}
}

// TestInterrupted: wherever it is ended, nothing is left.
func TestInterrupted(t *testing.T) {
	netnstest.Need(t)
	for _, at := range []string{"start boardlink", "tcp 2 streams host to board, " + TwoProcesses, "udp 64 B board to host, " + Veth} {
		c := short("tap", true, 1)
		if strings.HasPrefix(at, "start") {
			c.Paths = []string{OneProcess, "boardlink"}
		} else {
			_, p, _ := strings.Cut(at, ", ")
			c.Paths = []string{p}
		}
		ctx, stop := context.WithCancel(context.Background())
		done := false
		c.Step = func(s string) {
			if strings.HasSuffix(s, at) {
				done = true
				stop()
			}
		}
		if _, err := Run(ctx, c); err == nil || ctx.Err() == nil || !done {
			t.Errorf("%s: %v", at, err)
		}
		stop()
		if l := leftovers(t); len(l) != 0 {
			t.Errorf("%s: processes %v are left", at, l)
		}
	}
}

func TestConfig(t *testing.T) {
	for _, paths := range [][]string{{"x"}, {Veth, Veth}, {"boardlink"}} {
		c := Config{Paths: paths}
		if _, err := Run(context.Background(), c); err == nil {
			t.Errorf("paths %v: no error", paths)
		}
	}
	none := Config{Only: regexp.MustCompile("^x")}
	if _, err := Run(context.Background(), none); err == nil {
		t.Error("nothing to measure: no error")
	}
	var c Config
	c.Boardlink = []Boardlink{{Name: "a"}, {Name: "b"}}
	if err := c.setDefaults(); err != nil || !slices.Equal(c.Paths, []string{Veth, OneProcess, TwoProcesses, "a", "b"}) {
		t.Errorf("%v, %v", c.Paths, err)
	}
}

// TestStickEnds: a stick whose interface is gone says so, and is no trap.
func TestStickEnds(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	w.Close()
	s, err := startStick(nil, [][2]*os.File{{r, r}})
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	select {
	case <-s.Gone():
	case <-time.After(10 * time.Second):
		t.Fatal("it runs without an interface")
	}
	if _, err := s.counts(); err == nil {
		t.Error("it counts without an interface")
	} else {
		t.Log(err)
	}
	s.close()
}

// TestRatios: round by round, and no ratio where there is nothing to divide by.
func TestRatios(t *testing.T) {
	var r Result
	for i, v := range []float64{10, 20, 40} {
		r.add(OneProcess, value{1500, "tcp", "Gbit/s", true, v})
		r.add("boardlink", value{1500, "tcp", "Gbit/s", true, v * float64(i+1)})
		r.add(TwoProcesses, value{1500, "tcp", "Gbit/s", true, 0})
		r.add(OneProcess, value{9000, "tcp", "Gbit/s", true, 1})
	}
	r.finish()
	f := r.Figure(1500, "tcp")
	if got := f.OfOne["boardlink"]; got.Median != 2 || got.Min != 1 || got.Max != 3 || len(f.OfOne) != 2 || len(f.OfTwo) != 0 {
		t.Errorf("%+v, %+v", f.OfOne, f.OfTwo)
	}
	if len(r.Figures) != 2 || r.Figure(9000, "tcp").Paths[OneProcess].N != 3 {
		t.Errorf("%+v", r.Figures)
	}
}
