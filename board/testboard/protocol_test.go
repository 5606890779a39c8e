package testboard_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/boardlink/boardlink/board"
	. "github.com/boardlink/boardlink/board/testboard"
	"github.com/boardlink/boardlink/mmio"
)

// The reference protocol: the agent produces, the host consumes. Data and index lie in
// host memory (their reader's), the suppression word in board memory (its reader's).
const (
	atIdx  = 0x00 // host memory
	atData = 0x40
	atWant = 0x00 // board memory
)

// mistakes leaves things out of the reference protocol.
type mistakes struct {
	noReadBack, noFullBarrier, noWriteBarrier, noReadBarrier, noRecheck, weakBarrier, bareRing bool
}

var errStale = errors.New("stale data")

func sleepProtocol(items uint32, m mistakes) func(b *Board) {
	return func(b *Board) {
		b.Name(board.Host, atIdx, 4, "idx")
		b.Name(board.Host, atData, 0x400, "data")
		b.Name(board.Agent, atWant, 4, "want")
		b.Go(board.Host, "consumer", func(p *Proc) {
			hm, bm := p.Mem(board.Host), p.Mem(board.Agent)
			for seen := uint32(0); seen < items; {
				idx := hm.Load32(atIdx)
				if idx == seen {
					bm.Store32(atWant, idx+1)
					bm.Barrier(mmio.FullBarrier)
					if !m.noReadBack {
						bm.Load32(atWant)
						bm.Barrier(mmio.ReadBarrier)
					}
					if m.noRecheck || hm.Load32(atIdx) == seen {
						p.WaitDoorbell(0)
					}
					continue
				}
				if !m.noReadBarrier {
					hm.Barrier(mmio.ReadBarrier)
				}
				for ; seen < idx; seen++ {
					if v := hm.Load32(atData + 4*uint64(seen)); v != seen+100 {
						p.Fail(errStale)
					}
				}
			}
		})
		b.Go(board.Agent, "producer", func(p *Proc) {
			hm, bm := p.Mem(board.Host), p.Mem(board.Agent)
			for i := uint32(0); i < items; i++ {
				hm.Store32(atData+4*uint64(i), i+100)
				if m.weakBarrier {
					bm.Barrier(mmio.WriteBarrier)
				} else if !m.noWriteBarrier {
					hm.Barrier(mmio.WriteBarrier)
				}
				hm.Store32(atIdx, i+1)
				if !m.noFullBarrier {
					hm.Barrier(mmio.FullBarrier)
				}
				if bm.Load32(atWant) == i+1 {
					if m.bareRing {
						p.RingBare(0)
					} else {
						p.Ring(0)
					}
				}
			}
		})
	}
}

// harshest is every reordering at once.
var harshest = Options{HostWindow: mmio.WriteCombining, AgentWindow: mmio.WriteCombining, Ordering: Weak, StaleLoads: true}

// runs scales the extent of a search, to 1 at least: 0 stands for defaults.
func runs(n int) int {
	if testing.Short() {
		n /= 10
	}
	if n /= raceFactor; n < 1 {
		return 1
	}
	return n
}

func TestSleepProtocolIsRight(t *testing.T) {
	for _, o := range []Options{{}, {Ordering: TSO}, {Ordering: TSO, StaleLoads: true, AgentWindow: mmio.WriteCombining}, harshest} {
		res := Explore(t, Search{Options: o, Runs: runs(4000), Bound: 2, MaxSystematic: 5000}, sleepProtocol(3, mistakes{}))
		if res.Complete < 1 {
			t.Errorf("%+v: the systematic search is complete to %d deviations only", o, res.Complete)
		}
	}
}

// TestSearchBites leaves one thing after the other out of the protocol: both searches
// must find it, each alone.
func TestSearchBites(t *testing.T) {
	wc := Options{AgentWindow: mmio.WriteCombining}
	for _, c := range []struct {
		name string
		o    Options
		m    mistakes
		kind FailureKind
	}{
		{"no read-back", Options{}, mistakes{noReadBack: true}, LostWakeup},
		{"no check after arming", Options{}, mistakes{noRecheck: true}, LostWakeup},
		{"no full barrier, TSO", Options{Ordering: TSO}, mistakes{noFullBarrier: true}, LostWakeup},
		{"no full barrier, weak", Options{Ordering: Weak}, mistakes{noFullBarrier: true}, LostWakeup},
		{"no write barrier, WC", wc, mistakes{noWriteBarrier: true}, CheckFailure},
		{"cached memory's write barrier, WC", wc, mistakes{weakBarrier: true}, CheckFailure},
		{"no read barrier", Options{StaleLoads: true}, mistakes{noReadBarrier: true}, CheckFailure},
		{"ring without a barrier, no full barrier, WC", wc, mistakes{bareRing: true, noFullBarrier: true}, LostWakeup},
	} {
		t.Run(c.name, func(t *testing.T) {
			check := func(how string, s Search) {
				s.Options = c.o
				res := Find(s, sleepProtocol(3, c.m))
				f := res.Failure
				if f == nil {
					t.Fatalf("%s: not found in %d schedules", how, res.Runs)
				}
				if f.Kind != c.kind || c.kind == CheckFailure && !errors.Is(f, errStale) {
					t.Fatalf("%s: found something else: %v", how, f)
				}
				t.Logf("%s: schedule %d, %s", how, res.Runs, f.Replay)
				again, err := Replay(s, f.Replay, sleepProtocol(3, c.m))
				if err != nil || again == nil || again.Kind != f.Kind || again.Trace != f.Trace {
					t.Fatalf("%s: the replay of %q differs: %v, %v", how, f.Replay, err, again)
				}
			}
			check("systematic", Search{Bound: 2, MaxSystematic: 20000})
			check("random", Search{Bound: -1, Runs: 20000, Seed: 1})
		})
	}
}

// TestHarmlessWhereOrdered: what the bus or the processor orders by itself is not
// reported.
func TestHarmlessWhereOrdered(t *testing.T) {
	for _, c := range []struct {
		name string
		o    Options
		m    mistakes
	}{
		{"no full barrier, SC", Options{}, mistakes{noFullBarrier: true}},
		{"no write barrier, uncached", Options{Ordering: Weak}, mistakes{noWriteBarrier: true}},
		{"no read barrier, loads in order", harshInOrder, mistakes{noReadBarrier: true}},
	} {
		t.Run(c.name, func(t *testing.T) {
			Explore(t, Search{Options: c.o, Runs: runs(5000), Bound: 1}, sleepProtocol(3, c.m))
		})
	}
}

var harshInOrder = Options{HostWindow: mmio.WriteCombining, AgentWindow: mmio.WriteCombining, Ordering: Weak}

func TestTraceTellsWhat(t *testing.T) {
	f := Find(Search{Bound: 2}, sleepProtocol(2, mistakes{noReadBack: true})).Failure
	if f == nil {
		t.Fatal("nothing found")
	}
	for _, want := range []string{"lost wake-up", "asleep are consumer", "store32 across agent:want", "arrives: host:idx", "BOARDLINK_REPLAY="} {
		if !strings.Contains(f.Error(), want) {
			t.Errorf("the report lacks %q:\n%v", want, f)
		}
	}
	t.Logf("%v", f)
}
