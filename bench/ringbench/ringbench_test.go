//go:build linux

package ringbench_test

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/boardlink/boardlink/bench/benchkit"
	"github.com/boardlink/boardlink/bench/ringbench"
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

// Every combination moves its buffers, and counts what it should.
func TestRun(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for _, ring := range []string{"split", "packed"} {
		for _, placement := range []string{"local", "window", "push"} {
			for i := 0; i < 4; i++ {
				c := ringbench.Config{Ring: ring, Placement: placement, Sleep: i&1 != 0, EventIdx: i&1 != 0, InOrder: i&2 != 0, Write: i == 1 || i == 2, Buffers: 20000, Runs: 2}
				if ring == "packed" {
					c.Size = 250
				}
				t.Run(fmt.Sprintf("%s %s sleep=%v in_order=%v", ring, placement, c.Sleep, c.InOrder), func(t *testing.T) {
					r, err := ringbench.Run(ctx, c)
					needTwo(t, err)
					if err != nil {
						t.Fatal(err)
					}
					t.Log(r)
					if r.NS <= 0 || r.RoundTripNS <= 0 || r.Ratio <= 0 || len(r.Runs) != 2 {
						t.Errorf("%+v", r)
					}
					if r.Lost != 0 {
						t.Errorf("%d wake-ups were lost", r.Lost)
					}
					reads, writes := r.Driver.Reads+r.Device.Reads, r.Driver.Writes+r.Device.Writes
					switch {
					case placement == "local":
						if reads != 0 || writes != 0 {
							t.Errorf("local memory: %f reads, %f writes across", reads, writes)
						}
					case placement == "push" && ring == "split":
						if reads != 0 || writes == 0 {
							t.Errorf("push: %f reads, %f writes across", reads, writes)
						}
					default:
						if reads == 0 || writes == 0 {
							t.Errorf("%f reads, %f writes across", reads, writes)
						}
					}
				})
			}
		}
	}
}

func TestRefuses(t *testing.T) {
	for _, c := range []ringbench.Config{{Ring: "round"}, {Placement: "moon"}, {Memory: "core"}, {Size: 3}, {Size: -1}, {Size: 1 << 17}, {Batch: 257}, {Batch: -1},
		{Outstanding: 1}, {Outstanding: 300}, {Runs: -1}, {Buffers: 1}} {
		if r, err := ringbench.Run(context.Background(), c); err == nil {
			t.Errorf("%+v: %v", c, r)
		}
	}
	if _, err := ringbench.Run(context.Background(), ringbench.Config{Peer: []string{"/bin/false"}, Buffers: 64}); err == nil {
		t.Error("a peer that does nothing")
	}
}

// BenchmarkTwoProcesses polls from two processes. The time of an iteration says nothing: the figures are those of
// the run.
func BenchmarkTwoProcesses(b *testing.B) {
	for _, ring := range []string{"split", "packed"} {
		for _, placement := range []string{"local", "window", "push"} {
			if ring == "packed" && placement == "push" {
				continue
			}
			for _, inOrder := range []bool{false, true} {
				for i := 0; i < 4; i++ {
					batch, wr := []int{1, 64}[i&1], i&2 != 0
					b.Run(fmt.Sprintf("%s/%s/inorder=%v/write=%v/batch=%d", ring, placement, inOrder, wr, batch), func(b *testing.B) {
						var r *ringbench.Result
						for b.Loop() {
							c := ringbench.Config{Ring: ring, Placement: placement, Batch: batch, InOrder: inOrder, Write: wr, EventIdx: true, Buffers: 20000, Runs: 51}
							var err error
							r, err = ringbench.Run(context.Background(), c)
							needTwo(b, err)
							if err != nil {
								b.Fatal(err)
							}
						}
						b.ReportMetric(0, "ns/op")
						b.ReportMetric(r.NS, "ns/buffer")
						b.ReportMetric(r.RoundTripNS, "ns/roundtrip")
						b.ReportMetric(r.Ratio, "roundtrips/buffer")
						b.ReportMetric(r.Best, "best-roundtrips/buffer")
						b.ReportMetric(r.Idle, "idle-polls/buffer")
						b.ReportMetric(r.Driver.Reads+r.Device.Reads, "reads/buffer")
						b.ReportMetric(r.Driver.Writes+r.Device.Writes, "writes/buffer")
					})
				}
			}
		}
	}
}
