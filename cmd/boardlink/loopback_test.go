package main

import (
	"encoding/json"
	"fmt"
	"os"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/boardlink/boardlink/trial/netns/netnstest"
	"golang.org/x/sys/unix"
)

// number returns the number under a dotted name.
func number(t *testing.T, v any, name string) float64 {
	t.Helper()
	for _, k := range strings.Split(name, ".") {
		m, _ := v.(map[string]any)
		v = m[k]
	}
	f, ok := v.(float64)
	if !ok {
		t.Errorf("there is no number %s", name)
	}
	return f
}

// asUser are the ways to run it: as root, and as a user who may open /dev/net/tun and no more.
var asUser = map[string]string{"root": "", "nobody": "tun=0666 nobody"}

func lackUser(t *testing.T, stderr string) {
	t.Helper()
	if strings.Contains(stderr, "user namespace") {
		if os.Getenv("CI") == "true" {
			t.Fatalf("this test needs user namespaces: %s", stderr)
		}
		t.Skipf("this test needs user namespaces: %s", stderr)
	}
}

// TestLoopbackJSON: the figures that scripts read, under the names that were promised.
func TestLoopbackJSON(t *testing.T) {
	netnstest.Need(t)
	for who, how := range asUser {
		t.Run(who, func(t *testing.T) {
			t.Parallel()
			b := newBox(t)
			st, out, errs := b.run(how, "loopback", "--json", "--duration", "200ms", "--queues", "2", "--ring", "packed", "--devices", "net,console,disk,rng")
			lackUser(t, errs)
			if st != 0 || errs != "" {
				t.Fatalf("status %d: %s\n%s", st, errs, out)
			}
			var v any
			if err := json.Unmarshal([]byte(out), &v); err != nil {
				t.Fatalf("%v:\n%s", err, out)
			}
			for _, name := range []string{"ping.sent", "rtt_us.p50", "rtt_us.p99", "tcp_gbps.board_to_host", "tcp_gbps.host_to_board",
				"udp64_kpps.board_to_host", "udp64_kpps.host_to_board", "bus.reads_per_packet", "bus.writes_per_packet", "doorbells_per_packet",
				"bus.board_to_host.areas.descriptor.reads_per_packet", "bus.host_to_board.areas.payload.write_bytes_per_packet", "bus.host_to_board.idle_polls_per_packet"} {
				if number(t, v, name) < 0 {
					t.Errorf("%s is below 0", name)
				}
			}
			for _, name := range []string{"ping.sent", "rtt_us.p50", "tcp_gbps.board_to_host", "tcp_gbps.host_to_board", "udp64_kpps.board_to_host", "udp64_kpps.host_to_board",
				"console.bytes", "console.mb_per_second.board_to_host", "console.mb_per_second.host_to_board", "console.key_idle_us.p50", "console.key_beside_us.p50",
				"disk.write_mb_per_second", "disk.read_mb_per_second", "disk.ping_idle_us.p50", "disk.ping_beside_us.p50", "rng.bytes"} {
				if number(t, v, name) == 0 {
					t.Errorf("%s is 0", name)
				}
			}
			if n := number(t, v, "setup.queue_pairs"); n != 2 {
				t.Errorf("%v queue pairs", n)
			}
			if s, _ := v.(map[string]any)["setup"].(map[string]any); s["ring"] != "packed" {
				t.Errorf("rings %v", s["ring"])
			}
			if n := number(t, v, "disk.bytes"); n != 32<<20 {
				t.Errorf("a disk of %v bytes", n)
			}
			for _, name := range []string{"ping.lost", "corrupt", "console.corrupt", "console.lost", "disk.corrupt", "disk.ping_lost"} {
				if n := number(t, v, name); n != 0 {
					t.Errorf("%s is %v", name, n)
				}
			}
		})
	}
}

// TestLoopbackText: one row for each figure, aligned; with -v the log of both ends.
func TestLoopbackText(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	st, out, errs := b.run("", "loopback", "--duration", "100ms", "-v", "--link", "tun", "--no-offload")
	if st != 0 {
		t.Fatalf("status %d: %s", st, errs)
	}
	column := -1
	row := regexp.MustCompile(`^(\S+( \S+)*)  +(\S)`)
	names := map[string]bool{}
	for _, l := range strings.Split(strings.TrimSuffix(out, "\n"), "\n") {
		m := row.FindStringSubmatchIndex(l)
		if m == nil {
			t.Errorf("no row: %q", l)
			continue
		}
		names[l[m[2]:m[3]]] = true
		if column >= 0 && m[6] != column {
			t.Errorf("column %d, before %d: %q", m[6], column, l)
		}
		column = m[6]
	}
	for _, n := range []string{"link", "features", "ping", "tcp", "udp, 64 bytes", "corrupt", "bus, a frame", "bus, board to host", "bus, host to board"} {
		if !names[n] {
			t.Errorf("no row %q in:\n%s", n, out)
		}
	}
	if strings.Count(errs, "link up") != 2 {
		t.Errorf("-v does not show both ends:\n%s", errs)
	}
}

// children waits until three processes run: the command and both ends.
func (b *box) ends(n int) {
	b.t.Helper()
	until(b.t, 8*time.Second, "both ends run", func() bool { return len(b.processes()) >= n })
}

// TestLoopbackInterrupted: ^C at any time leaves nothing behind.
func TestLoopbackInterrupted(t *testing.T) {
	netnstest.Need(t)
	for who, how := range asUser {
		for _, sig := range []syscall.Signal{unix.SIGINT, unix.SIGTERM} {
			for _, after := range []time.Duration{0, 100 * time.Millisecond, time.Second} {
				t.Run(who+" "+sig.String()+" after "+after.String(), func(t *testing.T) {
					t.Parallel()
					b := newBox(t)
					p := b.start(nil, how, "loopback", "--duration", "30s")
					processes := 3
					if how != "" {
						processes = 4
						until(t, 5*time.Second, "the program", func() bool { return len(b.processes()) > 0 })
					}
					if after > 0 {
						b.ends(processes)
					}
					time.Sleep(after)
					st := p.end(sig, 5*time.Second)
					lackUser(t, p.err.String())
					// Before the program listens to signals they end it as they end any.
					if st != exitFail && !(after == 0 && (st == -1 || st == 128+int(sig))) {
						t.Errorf("status %d", st)
					}
					if e := p.err.String(); st == exitFail && e != "boardlink loopback: interrupted\n" || p.out.String() != "" {
						t.Errorf("it prints %q and %q", p.out.String(), e)
					}
				})
			}
		}
	}
}

// TestLoopbackKilled: SIGKILL at any time leaves no process and no file.
func TestLoopbackKilled(t *testing.T) {
	netnstest.Need(t)
	for who, how := range asUser {
		for _, early := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s early=%v", who, early), func(t *testing.T) {
				t.Parallel()
				b := newBox(t)
				p := b.start(nil, how, "loopback", "--duration", "30s")
				n := 3
				if how != "" {
					n = 4
				}
				if early {
					n-- // one end is missing
				}
				select {
				case <-p.done:
					lackUser(t, p.err.String())
				case <-time.After(300 * time.Millisecond):
				}
				b.ends(n)
				p.kill()
				until(t, 2*time.Second, "no process is left", func() bool { return len(b.processes()) == 0 })
				if files := b.files(); len(files) > 0 {
					t.Errorf("it leaves %q", files)
				}
			})
		}
	}
}
