//go:build linux

package packetbench

import (
	"fmt"
	"time"

	"github.com/boardlink/boardlink/bench/benchkit"
	"github.com/boardlink/boardlink/frames"
)

// Direction is where frames go.
type Direction string

// The directions. Echo has one frame under way, to and fro: for latency.
const (
	BoardToHost Direction = "board to host"
	HostToBoard Direction = "host to board"
	Echo        Direction = "echo"
)

// Config says what to measure. The zero value of a field stands for its default.
type Config struct {
	// Peer is the command that becomes the other side (benchkit.Peer). Default: this program.
	Peer []string `json:"-"`
	// Direction; default BoardToHost.
	Direction Direction
	// Ring is "split" (default) or "packed".
	Ring string
	// Placement is "local" (default): all memory is near both sides, as between processes of one machine. "window" and
	// "push" are those of a board: what lies across is accounted, and taken by the paths for it.
	Placement string
	// Memory is how a side sees memory across: "cached" (default), "write-combining" or "uncached".
	Memory string
	// Bytes is the length of frames without header: 64 (default) to 65549. Where Bytes2 is above it, lengths lie between the two and differ
	// from frame to frame.
	Bytes    int
	Bytes2   int
	Size     int  // descriptors of each queue; default 256
	Batch    int  // frames that either side moves at once; default 32, as testpmd
	Sleep    bool // sleep on eventfds when there is nothing to do; else poll
	Spins    int  // with Sleep: polls in vain before; default 200
	EventIdx bool // the event index is negotiated
	InOrder  bool // VIRTIO_F_IN_ORDER is
	Verify   bool // every byte is written, and checked
	// Duration of all runs; default 300 ms. Runs: default 9: many short ones, so that other programs do not disturb all.
	Duration time.Duration
	Runs     int
	// CPU are the processors of board and host side; both 0 leave the first two that this process may use, -1 does
	// not pin.
	CPU [2]int
}

const (
	minBytes = 64
	lengths  = 1021 // of different frames, where they vary: prime
)

func (c *Config) defaults() error {
	set := func(p *int, v int) {
		if *p == 0 {
			*p = v
		}
	}
	if c.Direction == "" {
		c.Direction = BoardToHost
	}
	set(&c.Bytes, 64)
	set(&c.Bytes2, c.Bytes)
	set(&c.Size, 256)
	set(&c.Batch, 32)
	set(&c.Runs, 9)
	set(&c.Spins, 200)
	if c.Duration == 0 {
		c.Duration = 300 * time.Millisecond
	}
	l := c.layout()
	if err := l.Check(2); err != nil {
		return err
	}
	c.Ring, c.Placement, c.Memory = l.Ring, l.Placement, l.Memory
	switch {
	case c.Direction != BoardToHost && c.Direction != HostToBoard && c.Direction != Echo:
		return fmt.Errorf("direction %q: %q, %q or %q", c.Direction, BoardToHost, HostToBoard, Echo)
	case c.Bytes < minBytes || c.Bytes > frames.MaxMaxFrame || c.Bytes2 < c.Bytes || c.Bytes2 > frames.MaxMaxFrame:
		return fmt.Errorf("frames of %d to %d bytes: %d to %d", c.Bytes, c.Bytes2, minBytes, frames.MaxMaxFrame)
	case c.Batch < 1 || c.Batch > c.Size || c.Batch > frames.MaxBatch:
		return fmt.Errorf("batch of %d: 1 to %d, and not above the size of the queue (%d)", c.Batch, frames.MaxBatch, c.Size)
	case c.Runs < 1 || c.Duration < time.Millisecond || c.Duration > benchkit.Patience:
		return fmt.Errorf("%d runs of %v in all: one at least, 1ms to %v", c.Runs, c.Duration, benchkit.Patience)
	}
	if c.CPU == ([2]int{}) {
		cpus, err := benchkit.TwoCPUs()
		if err != nil {
			return err
		}
		c.CPU = cpus
	}
	return nil
}

func (c *Config) layout() benchkit.Layout {
	return benchkit.Layout{Ring: c.Ring, Placement: c.Placement, Memory: c.Memory, Size: c.Size}
}

// Check returns what is wrong with c, or with the machine for it; nil where Run would begin.
func (c Config) Check() error { return c.defaults() }

// sizes returns the length of the memory for the frames of one queue, and of each of the two memories.
func (c *Config) sizes() (data, mem int) {
	data = (int(frames.MemSize(c.Bytes2, c.Size)) + 4095) &^ 4095
	return data, offData + 2*data
}

// lengths are those of the frames, over and over.
func (c *Config) lengths() []int {
	l := make([]int, lengths)
	for i := range l {
		l[i] = c.Bytes + i*37%(c.Bytes2-c.Bytes+1)
	}
	return l
}
