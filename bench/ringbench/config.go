//go:build linux

package ringbench

import (
	"errors"
	"fmt"

	"github.com/boardlink/boardlink/bench/benchkit"
	"github.com/boardlink/boardlink/vring"
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
	if c.Ring == "" {
		c.Ring = "split"
	}
	if c.Placement == "" {
		c.Placement = "local"
	}
	if c.Memory == "" {
		c.Memory = "cached"
	}
	set(&c.Size, 256)
	set(&c.Batch, 64)
	set(&c.Outstanding, c.Size)
	set(&c.Runs, 31)
	set(&c.Buffers, 100000)
	set(&c.Spins, 200)
	switch {
	case c.Ring != "split" && c.Ring != "packed":
		return fmt.Errorf("ring %q: split or packed", c.Ring)
	case c.Placement != "local" && c.Placement != "window" && c.Placement != "push":
		return fmt.Errorf("placement %q: local, window or push", c.Placement)
	case c.Memory != "cached" && c.Memory != "write-combining" && c.Memory != "uncached":
		return fmt.Errorf("memory %q: cached, write-combining or uncached", c.Memory)
	case c.Size < 1 || c.Size > vring.MaxSize || c.Ring == "split" && c.Size&(c.Size-1) != 0:
		return fmt.Errorf("size %d: 1 to %d, and of a split ring a power of two", c.Size, vring.MaxSize)
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
		cpus, err := benchkit.CPUs()
		if err != nil {
			return err
		}
		if len(cpus) < 2 {
			return errors.New("two processors are needed: the sides poll")
		}
		c.CPU = []int{cpus[0], cpus[1]}
	}
	return nil
}

// Check returns what is wrong with c, nil where nothing is.
func (c Config) Check() error { return c.defaults() }
