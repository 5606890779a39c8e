package app

import (
	"os"
	"runtime"

	"github.com/boardlink/boardlink/board"
)

// maxNapping bounds what napping adds.
const maxNapping = 8

// napping gives Go's scheduler more places than there are processors, for the goroutines of disks that keep theirs while they sleep for a moment
// (doorbell.SleeperConfig.Doze): one for each queue, and on an agent one for a client. They use no processor meanwhile. Whoever sets
// GOMAXPROCS decides it.
func napping(c *Config) {
	if os.Getenv("GOMAXPROCS") != "" {
		return
	}
	n := 0
	for i := range c.Disks {
		if n += c.Disks[i].Queues; c.Side == board.Agent {
			n++
		}
	}
	if n > maxNapping {
		n = maxNapping
	}
	if n > 0 {
		runtime.GOMAXPROCS(runtime.NumCPU() + n)
	}
}
