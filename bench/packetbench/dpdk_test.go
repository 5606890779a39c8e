//go:build linux

package packetbench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/boardlink/boardlink/bench/benchkit"
)

// What testpmd of DPDK 22.11 prints.
const statsText = "show port stats all\r\n\r\n  ######################## NIC statistics for port 0  ########################\r\n" +
	"  RX-packets: 37468288   RX-missed: 0          RX-bytes:  2397970432\r\n  RX-errors: 0\r\n  RX-nombuf:  0         \r\n" +
	"  TX-packets: 0          TX-errors: 0          TX-bytes:  0\r\n\r\n  Throughput (since last show)\r\n" +
	"  Rx-pps:     15722829          Rx-bps:   8050088800\r\n  Tx-pps:            0          Tx-bps:            0\r\n"

func TestParseStats(t *testing.T) {
	if m, err := parseStats(statsText); m != 15.722829 || err != nil {
		t.Error(m, err)
	}
	if _, err := parseStats("testpmd> "); err == nil {
		t.Error("no figure, no error")
	}
}

// fake is a program that answers as testpmd does, so that the conversation is tested where DPDK is not installed.
const fake = `#!/bin/sh
printf 'EAL: Detected CPU lcores: 2\ntestpmd> '
while read -r l; do
	case "$l" in
	quit) exit 0 ;;
	"show port stats "*) printf '%s\r\n  Rx-pps:     2000000          Rx-bps:   1\r\n' "$l" ;;
	"set txpkts 666") echo EAL: Error; exit 3 ;;
	*) printf '%s\r\n' "$l" ;;
	esac
	printf 'testpmd> '
done
`

func fakeDPDK(t *testing.T) *DPDK {
	path := filepath.Join(t.TempDir(), testpmd)
	if err := os.WriteFile(path, []byte(fake), 0o755); err != nil {
		t.Fatal(err)
	}
	d := &DPDK{}
	var err error
	if d.host, err = start(context.Background(), "", path, nil); err != nil {
		t.Fatal(err)
	}
	if d.board, err = start(context.Background(), "", path, nil); err != nil {
		d.Close()
		t.Fatal(err)
	}
	t.Cleanup(d.Close)
	return d
}

func TestConversation(t *testing.T) {
	d := fakeDPDK(t)
	for _, dir := range []Direction{BoardToHost, HostToBoard, Echo} {
		if m, err := d.Measure(dir, 64, time.Millisecond); m != 2 || err != nil {
			t.Error(m, err)
		}
	}
	if _, err := d.Measure(BoardToHost, 666, time.Millisecond); !errors.Is(err, ErrNoDPDK) {
		t.Error(err)
	}
}

// A program that ends instead of asking is told of, and is no trap.
func TestEndsAtOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), testpmd)
	if err := os.WriteFile(path, []byte("#!/bin/sh\necho EAL: Cannot init memory\nexit 1\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := start(context.Background(), "", path, nil); !errors.Is(err, ErrNoDPDK) {
		t.Error(err)
	}
}

func TestCompare(t *testing.T) {
	d := fakeDPDK(t)
	r, err := Compare(context.Background(), Config{Duration: 2 * time.Millisecond, Runs: 1}, d, BothEnds, 2, func(string) {})
	if err != nil && err.Error() == "two processors are needed: the sides poll" && os.Getenv("CI") != "true" {
		t.Skip(err)
	}
	if err != nil || len(r.Turns) != 2 || r.Theirs.Median != 2 || r.Ratio.Median <= 0 || r.Turns[0].Trips[2] <= 0 {
		t.Errorf("%+v, %v", r, err)
	}
}

// Where testpmd is missing, that is said, and nothing is left behind.
func TestNoDPDK(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	if _, err := StartDPDK(context.Background(), Config{CPU: [2]int{1, 2}}); !errors.Is(err, ErrNoDPDK) {
		t.Error(err)
	}
}

// TestMixed: our two ends that stand in for one of DPDK's, joined by a vhost-user socket.
func TestMixed(t *testing.T) {
	for _, ring := range []string{"split", "packed"} {
		c := Config{Ring: ring, CPU: [2]int{-1, -1}, Bytes: 100}
		if err := c.defaults(); err != nil {
			t.Fatal(err)
		}
		at := filepath.Join(t.TempDir(), "s")
		host, err := startMixed(c, DeviceEnd, at)
		if err != nil {
			t.Fatal(err)
		}
		board, err := startMixed(c, DriverEnd, at)
		if err != nil {
			t.Fatal(err)
		}
		for _, dir := range []Direction{BoardToHost, HostToBoard, Echo} {
			c.Direction = dir
			a, b := &order{c: c}, &order{c: c}
			if err := errors.Join(host.begin(a), board.begin(b)); err != nil {
				t.Fatal(err)
			}
			a.counting.Store(true)
			b.counting.Store(true)
			for begin := time.Now(); a.moved.Load()+b.moved.Load() < 1000; time.Sleep(time.Millisecond) {
				if time.Since(begin) > time.Minute {
					t.Fatalf("%s, %s: %d and %d frames", ring, dir, a.moved.Load(), b.moved.Load())
				}
			}
			if err := errors.Join(board.finish(b), host.finish(a)); err != nil || a.corrupt+b.corrupt != 0 {
				t.Errorf("%s, %s: %v, %d and %d frames are corrupt", ring, dir, err, a.corrupt, b.corrupt)
			}
			if to := a.moved.Load() > 0; to != (dir != HostToBoard) {
				t.Errorf("%s, %s: the device side received: %v", ring, dir, to)
			}
			// What is under way is taken out.
			a, b = &order{c: c, drain: true}, &order{c: c, drain: true}
			if err := errors.Join(host.begin(a), board.begin(b)); err != nil {
				t.Fatal(err)
			}
			time.Sleep(dpdkSettle)
			if err := errors.Join(board.finish(b), host.finish(a)); err != nil {
				t.Fatal(err)
			}
		}
		if err := errors.Join(board.stop(), host.stop()); err != nil {
			t.Error(err)
		}
		for _, bad := range []struct {
			e Ends
			n int
		}{{DeviceEnd, mixedMax + 1}, {DriverEnd, 9000}} {
			if err := (Config{Bytes: bad.n}).CheckEnds(bad.e); err == nil {
				t.Errorf("frames of %d bytes with our %s side", bad.n, bad.e)
			}
		}
	}
}

// The real one, where it is installed and there are huge pages; else it is said in a line what is missing.
func TestDPDK(t *testing.T) {
	before, _ := os.ReadFile(hugePagesAt)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if _, err := StartDPDK(ctx, Config{CPU: [2]int{-1, 0}}); err == nil {
		t.Fatal("started without a processor for each side")
	}
	cpus, err := benchkit.CPUs()
	if err != nil {
		t.Fatal(err)
	}
	c := Config{CPU: [2]int{cpus[0], cpus[len(cpus)-1]}, Duration: 20 * time.Millisecond}
	if d, err := StartDPDK(ctx, c, BothEnds, DeviceEnd, DriverEnd); err == nil {
		// On a busy machine a short time may pass without a frame.
		patient := func(what string, f func() (float64, error)) {
			m, err := f()
			for i := 0; i < 20 && err != nil && strings.Contains(err.Error(), "no frames"); i++ {
				m, err = f()
			}
			if err != nil || m <= 0 {
				t.Errorf("%s: %v, %v", what, m, err)
			}
		}
		patient("DPDK alone", func() (float64, error) { return d.Measure(BoardToHost, 64, c.Duration) })
		// Each of our ends with one of theirs, in all directions; what came before has another length.
		for i, dir := range []Direction{BoardToHost, HostToBoard, Echo} {
			for _, e := range []Ends{DeviceEnd, DriverEnd} {
				c.Direction, c.Bytes = dir, 64+i*700
				patient(fmt.Sprintf("our %s side, %s", e, dir), func() (float64, error) { return d.MeasureMixed(c, e) })
			}
		}
		d.Close()
	} else if !errors.Is(err, ErrNoDPDK) || strings.Contains(err.Error(), "\n") {
		t.Error(err)
	}
	if after, _ := os.ReadFile(hugePagesAt); string(after) != string(before) {
		t.Errorf("%s: %s before, %s behind", hugePagesAt, before, after)
	}
}
