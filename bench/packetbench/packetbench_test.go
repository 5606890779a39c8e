//go:build linux

package packetbench_test

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/boardlink/boardlink/bench/benchkit"
	"github.com/boardlink/boardlink/bench/packetbench"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	os.Setenv("GORACE", "atexit_sleep_ms=0") // of the peers: else a second each
	benchkit.Peer()
	goleak.VerifyTestMain(m)
}

func needTwo(t testing.TB, err error) {
	t.Helper()
	if err != nil && strings.Contains(err.Error(), "two processors") && os.Getenv("CI") != "true" {
		t.Skip(err)
	}
}

// Every combination moves its frames, every byte of them checked, and counts what it should.
func TestRun(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	memory := []string{"cached", "write-combining", "uncached"}
	k := 0
	for _, ring := range []string{"split", "packed"} {
		for _, placement := range []string{"local", "window", "push"} {
			for _, d := range []packetbench.Direction{packetbench.BoardToHost, packetbench.HostToBoard, packetbench.Echo} {
				c := packetbench.Config{Ring: ring, Placement: placement, Direction: d, Memory: memory[k%3], Sleep: k&1 != 0, EventIdx: k&2 != 0, InOrder: k&4 != 0,
					Verify: true, Bytes: 64, Bytes2: 1514, Duration: 3 * time.Millisecond, Runs: 2}
				k++
				if ring == "packed" {
					c.Size = 250
				}
				t.Run(fmt.Sprintf("%s %s %s %s sleep=%v", ring, placement, d, c.Memory, c.Sleep), func(t *testing.T) {
					r, err := packetbench.Run(ctx, c)
					needTwo(t, err)
					if err != nil {
						t.Fatal(err)
					}
					t.Logf("%.2f Mpps, %.1f Gbit/s, %.2f round trips of %.0f ns", r.Mpps.Median, r.Gbps, r.RoundTrips, r.RoundTripNS)
					if r.Mpps.Median <= 0 || r.Gbps <= 0 || r.RoundTripNS <= 0 || len(r.Runs) != 2 || r.Frames == 0 || r.Corrupt != 0 {
						t.Errorf("%+v", r)
					}
					if (r.Latency != nil) != (d == packetbench.Echo) || r.Latency != nil && uint64(r.Latency.Count) != r.Stamped {
						t.Errorf("latency %+v of %d frames", r.Latency, r.Stamped)
					}
					reads := r.Driver.Reads + r.Device.Reads
					if placement == "local" && reads != 0 {
						t.Errorf("%v reads across", reads)
					}
					if placement == "push" && ring == "split" && (!c.Sleep && reads != 0 || r.Driver.Writes+r.Device.Writes == 0) {
						t.Errorf("push: %v reads, %v writes a frame", reads, r.Driver.Writes+r.Device.Writes)
					}
				})
			}
		}
	}
}

func TestBadConfig(t *testing.T) {
	for _, c := range []packetbench.Config{{Ring: "x"}, {Placement: "x"}, {Memory: "x"}, {Direction: "x"}, {Bytes: 10}, {Bytes: 70000}, {Bytes: 100, Bytes2: 90},
		{Size: 100}, {Size: 1}, {Batch: 300}, {Runs: -1}, {Duration: time.Hour}} {
		if r, err := packetbench.Run(context.Background(), c); err == nil {
			t.Errorf("%+v: %+v", c, r)
		}
	}
}
