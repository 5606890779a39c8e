package app

import (
	"os"
	"runtime"
	"testing"

	"github.com/boardlink/boardlink/board"
)

// Disks add places to the scheduler, within bounds, unless GOMAXPROCS is set.
func TestNapping(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(0))
	if v, ok := os.LookupEnv("GOMAXPROCS"); ok {
		os.Unsetenv("GOMAXPROCS")
		defer os.Setenv("GOMAXPROCS", v)
	}
	n := runtime.NumCPU()
	for _, c := range []struct {
		side  board.Side
		disks []Disk
		want  int
	}{{board.Host, []Disk{{Queues: 2}}, n + 2}, {board.Agent, []Disk{{Queues: 2}, {Queues: 1}}, n + 5}, {board.Agent, []Disk{{Queues: 16}}, n + maxNapping}} {
		napping(&Config{Side: c.side, Disks: c.disks})
		if got := runtime.GOMAXPROCS(0); got != c.want {
			t.Errorf("%v, %d disks: %d places, want %d", c.side, len(c.disks), got, c.want)
		}
	}
	runtime.GOMAXPROCS(n)
	napping(&Config{Side: board.Agent})
	t.Setenv("GOMAXPROCS", "3")
	napping(&Config{Side: board.Agent, Disks: []Disk{{Queues: 2}}})
	if got := runtime.GOMAXPROCS(0); got != n {
		t.Errorf("%d places, want %d", got, n)
	}
}
