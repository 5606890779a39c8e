//go:build linux

package packetbench

import (
	"context"
	"errors"
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
	"show port stats all") printf '%s\r\n  Rx-pps:     2000000          Rx-bps:   1\r\n' "$l" ;;
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
	if d.host, err = start(context.Background(), path, nil); err != nil {
		t.Fatal(err)
	}
	if d.board, err = start(context.Background(), path, nil); err != nil {
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
	if _, err := start(context.Background(), path, nil); !errors.Is(err, ErrNoDPDK) {
		t.Error(err)
	}
}

func TestCompare(t *testing.T) {
	d := fakeDPDK(t)
	r, err := Compare(context.Background(), Config{Duration: 2 * time.Millisecond, Runs: 1}, d, 2, func(string) {})
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
	if d, err := StartDPDK(ctx, Config{CPU: [2]int{cpus[0], cpus[len(cpus)-1]}}); err == nil {
		m, err := d.Measure(BoardToHost, 64, 20*time.Millisecond)
		d.Close()
		if err != nil || m <= 0 {
			t.Error(m, err)
		}
	} else if !errors.Is(err, ErrNoDPDK) || strings.Contains(err.Error(), "\n") {
		t.Error(err)
	}
	if after, _ := os.ReadFile(hugePagesAt); string(after) != string(before) {
		t.Errorf("%s: %s before, %s behind", hugePagesAt, before, after)
	}
}
