package main

import (
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/boardlink/boardlink/bench/benchkit"
	"github.com/boardlink/boardlink/bench/ringbench"
)

type benchRingCmd struct {
	benchFlags
	Ring        string `enum:"split,packed,both" default:"both" help:"split, packed or both, in turns."`
	Placement   string `enum:"local,window,push" default:"local" help:"local: all memory is near; window, push: as on a board, what lies across is counted."`
	Memory      string `enum:"cached,write-combining,uncached" default:"cached" help:"How memory across is accessed: cached, write-combining, uncached."`
	Size        int    `default:"256" help:"Descriptors of the queue."`
	Batch       int    `default:"64" help:"Buffers that a side moves at once. With --plot: up to this, and on to the queue's size."`
	Outstanding int    `help:"Buffers under way at most. Default: the queue's size."`
	Sleep       bool   `help:"Sleep on eventfds where there is nothing to do; else both sides poll."`
	Spins       int    `default:"200" help:"With --sleep: looks in vain before."`
	InOrder     bool   `help:"With VIRTIO_F_IN_ORDER."`
	EventIdx    bool   `default:"true" negatable:"" help:"With VIRTIO_F_EVENT_IDX."`
	Write       bool   `help:"Buffers are written, as frames received; else read, as frames sent."`
	CPU         string `name:"cpu" placeholder:"A,B" help:"Processors of the driver and the device side; -1 is any. Default: the first two."`
	Buffers     int    `default:"20000" help:"Of one run: short ones, so that others do not disturb all."`
	Runs        int    `default:"51" help:"The figures are medians."`
}

// benchRing is the result.
type benchRing struct {
	Environment *benchkit.Environment `json:"environment"`
	Results     []*ringbench.Result   `json:"results"`
}

func (c *benchRingCmd) Run(s *streams) error {
	base := ringbench.Config{Placement: c.Placement, Memory: c.Memory, Size: c.Size, Batch: c.Batch, Outstanding: c.Outstanding, Sleep: c.Sleep, Spins: c.Spins,
		InOrder: c.InOrder, EventIdx: c.EventIdx, Write: c.Write, Buffers: c.Buffers, Runs: c.Runs}
	var pair [2]int
	if c.CPU != "" {
		var err error
		if pair, err = benchkit.ParsePair(c.CPU); err != nil {
			return usagef("--cpu: %v", err)
		}
		base.CPU = pair[:]
		if pair[0] == pair[1] && pair[0] >= 0 {
			return usagef("--cpu %s: the sides spin, and need a processor each", c.CPU)
		}
	}
	for _, n := range []struct {
		flag string
		v    int
	}{{"--size", c.Size}, {"--batch", c.Batch}, {"--runs", c.Runs}, {"--buffers", c.Buffers}, {"--spins", c.Spins}, {"--outstanding", c.Outstanding + 1}} {
		if n.v < 1 {
			return usagef("%s is too small", n.flag) // 0 would stand for the default
		}
	}
	rings := []string{c.Ring}
	if c.Ring == "both" {
		rings = []string{"split", "packed"}
	}
	batches := []int{c.Batch}
	if c.Plot != "" {
		batches = nil
		for n := 1; n <= c.Size && (c.Outstanding == 0 || n <= c.Outstanding); n *= 2 {
			batches = append(batches, n)
		}
	}
	// Both kinds of ring meet the same disturbances: in turns.
	rounds := min(3, c.Runs)
	var todo []ringbench.Config
	for _, batch := range batches {
		for _, ring := range rings {
			k := base
			k.Ring, k.Batch = ring, batch
			if err := k.Check(); err != nil {
				return usageError{err}
			}
			todo = append(todo, k)
		}
	}
	run, err := c.begin(s, pair)
	if err != nil {
		return err
	}
	defer run.close()
	r := &benchRing{Environment: run.env}
	err = func() error {
		for i := 0; i < len(todo); i += len(rings) {
			for round := range rounds {
				for j, k := range todo[i : i+len(rings)] {
					k.Runs = (c.Runs + round) / rounds
					run.step(fmt.Sprintf("%s, batch %d, %d of %d", k.Ring, k.Batch, round+1, rounds))
					one, err := ringbench.Run(run.ctx, k)
					if err != nil {
						return err
					}
					if round == 0 {
						r.Results = append(r.Results, one)
					} else {
						r.Results[i+j].Add(one)
					}
				}
			}
		}
		return nil
	}()
	if err := run.report(err, r, r.print, r.plot); err != nil {
		return err
	}
	for _, q := range r.Results {
		if q.Lost > 0 {
			fmt.Fprintf(s.err, "boardlink bench ring: %d wake-ups were lost\n", q.Lost)
			return statusError(exitFail)
		}
	}
	return nil
}

func (r *benchRing) print(out io.Writer) {
	c := r.Results[0]
	how := "polling"
	if c.Sleep {
		how = "sleeping"
	}
	if c.InOrder {
		how += ", in order"
	}
	if c.EventIdx {
		how += ", event index"
	}
	dir := "read"
	if c.Write {
		dir = "written"
	}
	fmt.Fprintf(out, "two processes, placement %s, memory across %s, queue of %d, buffers %s, %s; %d runs of %d buffers; each there and back\n",
		c.Placement, c.Memory, c.Size, dir, how, len(c.Runs), c.Buffers)
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "ring\tbatch\tunder way\tns a buffer\tof a cache line's ns\tround trips\tbest\treads across\tin vain\twrites across\tidle looks\tsleeps\trings\t")
	for _, q := range r.Results {
		fmt.Fprintf(w, "%s\t%d\t%d\t%.1f\t%.0f\t%.3f\t%.3f\t%.2f\t%.2f\t%.2f\t%.2f\t%.4f\t%.4f\t\n", q.Ring, q.Batch, q.Outstanding, q.NS, q.RoundTripNS, q.Ratio, q.Best,
			q.Driver.Reads+q.Device.Reads, q.InVain, q.Driver.Writes+q.Device.Writes, q.Idle, q.Sleeps, q.Rings)
	}
	w.Flush()
}

func (r *benchRing) plot(w io.Writer) error {
	p := benchkit.Plot{Title: "A buffer there and back between two processes, in round trips of a cache line", X: "buffers in a batch", Linear: true,
		YText: func(v float64) string { return fmt.Sprintf("%.2g", v) }}
	at := map[string]int{}
	for _, q := range r.Results {
		i, ok := at[q.Ring]
		if !ok {
			i = len(p.Lines)
			at[q.Ring] = i
			p.Lines = append(p.Lines, benchkit.PlotLine{Name: q.Ring + ", median", Colour: i / 2}, benchkit.PlotLine{Name: q.Ring + ", best", Colour: i / 2, Dash: true})
		}
		p.Lines[i].Points = append(p.Lines[i].Points, benchkit.PlotPoint{X: float64(q.Batch), Y: q.Ratio})
		p.Lines[i+1].Points = append(p.Lines[i+1].Points, benchkit.PlotPoint{X: float64(q.Batch), Y: q.Best})
	}
	return p.Write(w)
}
