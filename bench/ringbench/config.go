//go:build linux

package ringbench

import (
	"fmt"

	"github.com/boardlink/boardlink/bench/benchkit"
)

// Config says what to measure. The zero value of a field stands for its default.
type Config struct {
	// Peer is the command that becomes the other side (benchkit.Peer). Default: this program.
	Peer []string `json:"-"`
	// Ring is "split" (default) or "packed".
	Ring string
	// Placement is "local" (default): all memory is near both sides, as between processes of one machine, and
	// nothing is counted. "window" and "push" are those of a board: what lies across is accounted, and
	// taken by the paths for it.
	Placement string
	// Memory is how the device side sees memory across: "cached" (default), "write-combining" or "uncached".
	Memory      string
	Size        int  // descriptors; default 256
	Batch       int  // buffers that either side moves at once; default 64
	Outstanding int  // buffers under way at most; default Size
	Sleep       bool // sleep on eventfds when there is nothing to do; else poll
	Spins       int  // with Sleep: polls in vain before; default 200
	EventIdx    bool // the event index is negotiated
	InOrder     bool // VIRTIO_F_IN_ORDER is
	// Write makes the buffers writable, and the device fill each to a length of its own, as frames are received; else they are
	// read, as frames are sent.
	Write bool
	// Buffers of one run; default 100000. Runs: default 31: many short ones, so that other programs do not disturb all.
	Buffers int
	Runs    int
	// CPU are the processors of driver and device side, -1 does not pin; nil are the first two that this process may use.
	CPU []int
}

func (c *Config) defaults() error {
	set := func(p *int, v int) {
		if *p == 0 {
			*p = v
		}
	}
	set(&c.Size, 256)
	set(&c.Batch, 64)
	set(&c.Outstanding, c.Size)
	set(&c.Runs, 31)
	set(&c.Buffers, 100000)
	set(&c.Spins, 200)
	l := benchkit.Layout{Ring: c.Ring, Placement: c.Placement, Memory: c.Memory, Size: c.Size}
	if err := l.Check(1); err != nil {
		return err
	}
	c.Ring, c.Placement, c.Memory = l.Ring, l.Placement, l.Memory
	switch {
	case c.Batch < 1 || c.Batch > c.Size:
		return fmt.Errorf("batch %d: 1 to the size of the ring (%d)", c.Batch, c.Size)
	case c.Outstanding < c.Batch || c.Outstanding > c.Size:
		return fmt.Errorf("%d outstanding: from a batch (%d) to the size of the ring (%d)", c.Outstanding, c.Batch, c.Size)
	case c.Runs < 1 || c.Buffers < c.Batch:
		return fmt.Errorf("%d runs of %d buffers: one at least, of a batch (%d) at least", c.Runs, c.Buffers, c.Batch)
	}
	if c.CPU != nil && len(c.CPU) != 2 {
		return fmt.Errorf("processors %v: two, of the driver and of the device side", c.CPU)
	}
	c.Buffers -= c.Buffers % c.Batch
	if c.CPU == nil {
		cpus, err := benchkit.TwoCPUs()
		if err != nil {
			return err
		}
		c.CPU = cpus[:]
	}
	return nil
}

// Check returns what is wrong with c, nil where nothing is.
func (c Config) Check() error { return c.defaults() }
