//go:build linux

package doorbench

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/boardlink/boardlink/bench/benchkit"
	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/board/loopback"
	"github.com/boardlink/boardlink/doorbell"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	os.Setenv("GORACE", "atexit_sleep_ms=0") // of the peers: else a second each
	benchkit.Peer()
	goleak.VerifyTestMain(m)
}

// TestMechanisms: each makes round trips, in one process and in two, on one processor and where it likes.
func TestMechanisms(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	for _, pause := range []time.Duration{0, 300 * time.Microsecond} {
		c := Config{Duration: 5 * time.Millisecond, Spin: 20 * time.Microsecond, Pause: pause}
		if pause > 0 {
			c.Mechanisms, c.Processes = []Mechanism{PPoll, SpinPPoll}, []int{2}
		}
		steps := 0
		c.Step = func(string) { steps++ }
		all, err := Run(ctx, c)
		if err != nil {
			t.Fatal(err)
		}
		if len(all) != steps || pause == 0 && len(all) < 4*8 {
			t.Errorf("%d results of %d steps", len(all), steps)
		}
		for _, r := range all {
			l := r.Trip
			if l.Count < 1 || l.P50 <= 0 || l.P99 < l.P50 || l.P999 < l.P99 || l.Max < l.P999 || r.LeadCPU <= 0 || r.EchoCPU < 0 {
				t.Errorf("%+v", r)
			}
			switch r.Mechanism {
			case Poll:
				if r.Sleeps != 0 {
					t.Errorf("%+v: sleeps", r)
				}
			case SpinPPoll, SpinLocked: // as it turns out
			default:
				if r.Sleeps < 1 {
					t.Errorf("%+v: does not sleep", r)
				}
			}
		}
	}
}

func TestRefuses(t *testing.T) {
	for _, c := range []Config{{Mechanisms: []Mechanism{"telepathy"}}, {CPU: []int{0}}, {CPU: []int{0, -1}}, {Duration: -1}, {Spin: -1}, {Pause: -1},
		{Command: []string{"/bin/true"}}, {Command: []string{"/nonexistent"}}} {
		if r, err := Run(context.Background(), c); err == nil {
			t.Errorf("%+v: %v", c, r)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := Run(ctx, Config{}); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// mute rings nobody.
type mute struct{ board.Board }

func (mute) RingSelf(uint32) (doorbell.Ringer, error) { return mute{}, nil }
func (mute) Ring() error                              { return nil }

// deaf has no way to ring itself.
type deaf struct{ board.Board }

// polling has no interrupts.
type polling struct{ board.Board }

func (p polling) Waiter(uint32) doorbell.Waiter { return doorbell.None }

func TestBoard(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	s, err := loopback.NewServer(loopback.ServerConfig{Path: path, Size: 1 << 20, Vectors: 1})
	if err != nil {
		t.Fatal(err)
	}
	go s.Serve()
	defer s.Close()
	b, err := board.Open("loopback:"+path, board.Options{Side: board.Host})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	ctx := context.Background()
	r, err := Board(ctx, b, 100)
	if err != nil {
		t.Fatal(err)
	}
	// A ring that took longer than LostAfter on a busy machine is told as lost.
	if int(r.Loop.Count)+r.Lost != 100 && r.Lost < 3 || r.Write.Count != r.Loop.Count+int64(r.Lost) || r.Loop.Count > 0 && r.Loop.P50 < r.Write.Min || !strings.Contains(r.Board, "loopback") {
		t.Errorf("%+v", r)
	}
	if r, err := Board(ctx, mute{b}, 100); err != nil || r.Lost != 3 || r.Loop.Count != 0 {
		t.Errorf("%+v, %v", r, err)
	}
	if _, err := Board(ctx, deaf{b}, 1); err != ErrNotSelf {
		t.Error(err)
	}
	if _, err := Board(ctx, polling{b}, 1); err != ErrNoInterrupts {
		t.Error(err)
	}
	ctx, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := Board(ctx, b, 1); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
