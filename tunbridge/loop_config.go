package tunbridge

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// LoopConfig says how a loop waits.
type LoopConfig struct {
	// BusyPoll is how long a loop with nothing to do busy-polls before it sleeps. 0: adaptive, at most
	// MaxBusyPoll, and never where a poll is a read across the bus. Negative: not at all. Else: so long, each time.
	BusyPoll time.Duration
	// CPU, if not empty, are the processors to which the loop's thread is locked.
	CPU []int
	// Off switches policies off, to measure what each is worth.
	Off Policy
}

// Policy is a set of heuristics of a loop. None of them changes what is moved, or in which order.
type Policy uint8

// The policies that LoopConfig.Off may name. Busy-polling has LoopConfig.BusyPoll.
const (
	SpeculativeReads Policy = 1 << iota // reads of the interface that nothing announced
	BatchEnds                           // batches that end where the last ones ended
	Dozing                              // sleeps that keep their place in Go's scheduler
)

// Pair returns the configuration of the loop of pair i: its processor is the i-th, counting round.
func (c LoopConfig) Pair(i int) LoopConfig {
	if n := len(c.CPU); n > 0 {
		c.CPU = c.CPU[i%n : i%n+1]
	}
	return c
}

// From returns the configuration for a device whose first pair has the n-th processor, counting round.
func (c LoopConfig) From(n int) LoopConfig {
	if len(c.CPU) > 0 {
		n %= len(c.CPU)
		c.CPU = append(append([]int(nil), c.CPU[n:]...), c.CPU[:n]...)
	}
	return c
}

// SetBusyPoll sets BusyPoll from what an operator writes: "auto", "off", or a duration of at most a second. Errors are the operator's.
func (c *LoopConfig) SetBusyPoll(s string) error {
	switch s {
	case "auto":
		c.BusyPoll = 0
		return nil
	case "off":
		c.BusyPoll = -1
		return nil
	}
	d, err := time.ParseDuration(s)
	if err != nil || d <= 0 || d > time.Second {
		return fmt.Errorf("%q is not a time for busy-polling: use auto, off, or a duration up to 1s, e.g. 50us", s)
	}
	c.BusyPoll = d
	return nil
}

// SetCPU sets CPU from a list as "0,2-3" (or "", none). The processors have to be those that this program may run on. Errors are the
// operator's.
func (c *LoopConfig) SetCPU(s string) error {
	c.CPU = nil
	if s == "" {
		return nil
	}
	var may unix.CPUSet
	if err := unix.SchedGetaffinity(0, &may); err != nil {
		return fmt.Errorf("which processors this program may run on: %w", err)
	}
	for _, part := range strings.Split(s, ",") {
		first, last := part, part
		if i := strings.IndexByte(part, '-'); i >= 0 {
			first, last = part[:i], part[i+1:]
		}
		a, err1 := strconv.ParseUint(first, 10, 16)
		b, err2 := strconv.ParseUint(last, 10, 16)
		if err1 != nil || err2 != nil || a > b {
			return fmt.Errorf("%q is not a list of processors: e.g. 1, 0,2 or 4-7", s)
		}
		for ; a <= b; a++ {
			if !may.IsSet(int(a)) {
				return fmt.Errorf("this program may not run on processor %d (it has %d)", a, may.Count())
			}
			c.CPU = append(c.CPU, int(a))
		}
	}
	return nil
}
