package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/boardlink/boardlink/bench/dmabench"
	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/pci"
	"github.com/boardlink/boardlink/virtiomsg"
)

type benchDMACmd struct {
	Board string `arg:"" help:"\"loopback\" (this machine's memory alone), or a board: KIND:ARGUMENT, as for boardlink host. Its window is overwritten."`
	benchFlags
	Duration time.Duration `default:"15ms" help:"Of each measurement."`
	MaxSize  string        `default:"4M" help:"Largest copy: 64 to 4M, with K or M."`
	Offset   string        `default:"0" help:"Where in the board's window to begin, with K, M or G."`
	Verbose  bool          `short:"v" help:"Show every measurement, not only the best way in each direction."`
	Force    bool          `help:"Also where an agent has its link in the window: it loses it."`
}

func (c *benchDMACmd) Run(s *streams) error {
	max, err := parseSize(c.MaxSize)
	if err != nil {
		return err
	}
	if max < 64 || max > 4<<20 {
		return usagef("--max-size %s: 64 to 4M", c.MaxSize)
	}
	var off int64
	if c.Offset != "0" {
		if off, err = parseSize(c.Offset); err != nil {
			return err
		}
	}
	if off%4096 != 0 {
		return usagef("--offset %s: a multiple of 4K", c.Offset)
	}
	if c.Duration < 100*time.Microsecond || c.Duration > time.Minute {
		return usagef("--duration %v: 100us to 1m", c.Duration)
	}
	run, err := c.begin(s, [2]int{})
	if err != nil {
		return err
	}
	defer run.close()
	t, done, err := c.target(s, uint64(off))
	if err != nil {
		return err
	}
	defer done()
	var r *dmabench.Result
	// A board that goes away under the copies is an error, no crash.
	if gerr := pci.Guard(func() {
		r, err = dmabench.Run(run.ctx, t, dmabench.Config{Sizes: dmabench.DefaultSizes(int(max)), Duration: c.Duration, Step: run.step})
	}); gerr != nil {
		err = gerr
	}
	if r != nil {
		r.Environment = run.env
	}
	err = run.report(err, r, func(w io.Writer) { printBench(w, r, c.Verbose) }, func(w io.Writer) error { return dmabench.Plot(w, r) })
	if err != nil {
		return err
	}
	if r.Corrupt > 0 {
		fmt.Fprintf(s.err, "boardlink bench dma: %d measurements with bytes that did not arrive as they were sent\n", r.Corrupt)
		return statusError(exitFail)
	}
	return nil
}

// target opens what is measured.
func (c *benchDMACmd) target(s *streams, off uint64) (*dmabench.Target, func(), error) {
	if c.Board == "loopback" {
		t, err := dmabench.Loopback()
		if err != nil {
			return nil, nil, err
		}
		return t, func() { t.Close() }, nil
	}
	b, err := board.Open(c.Board, board.Options{Side: board.Host, Logf: func(f string, a ...any) { s.logger(false).Info(fmt.Sprintf(f, a...)) }})
	if err != nil {
		return nil, nil, err
	}
	if !c.Force {
		w := b.Window()
		var magic uint32
		// The agent's block is the first thing in the window (docs/wire.md, "Link page").
		if err := pci.Guard(func() { magic = w.Mem.Load32(0) }); err != nil {
			b.Close()
			return nil, nil, err
		}
		if magic == virtiomsg.Magic {
			b.Close()
			return nil, nil, usagef("%s: an agent has, or had, its link in the window; stop it, or measure behind it with --offset, and say --force", c.Board)
		}
	}
	t, err := dmabench.Board(b, off, 0)
	if err != nil {
		b.Close()
		return nil, nil, usageError{err}
	}
	return t, func() {
		t.Close()
		b.Close()
	}, nil
}

// printBench prints four lines: the best way in each direction, by the processor and by a DMA engine; all measurements with verbose.
func printBench(out io.Writer, r *dmabench.Result, verbose bool) {
	fmt.Fprintf(out, "%s, memory of the board: %s\n", r.Target.Name, r.Target.Memory)
	if l := r.Target.Link; l != nil {
		fmt.Fprintf(out, "link: x%d at %g GT/s, payloads of %d bytes: at most %.0f MB/s each way\n", l.Width, l.SpeedGTps, l.MaxPayload, l.LimitMBps)
	}
	fmt.Fprintln(out)
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	for _, d := range []dmabench.Direction{dmabench.HostToBoard, dmabench.BoardToHost} {
		for _, engine := range []bool{false, true} {
			by := "processor"
			if engine {
				by = "engine"
			}
			p := r.Best(d, engine)
			if p == nil {
				fmt.Fprintf(w, "%s\t%s\tnone\t\t\t\t\n", d, by)
				continue
			}
			fmt.Fprintf(w, "%s\t%s\t%.0f MB/s\t%s\t%s\t%s\n", d, by, p.MBps, sizeText(p.Size), p.Variant, flights(p))
		}
	}
	w.Flush()
	fmt.Fprintln(out)
	if verbose {
		printPoints(out, r)
	}
	more := "; -v shows all"
	if verbose {
		more = ""
	}
	fmt.Fprintf(out, "%d measurements in %.1f s, %d corrupt%s\n", len(r.Points), r.Seconds, r.Corrupt, more)
}

// sizeText is a size with its unit.
func sizeText(n int) string {
	s := dmabench.SizeString(n)
	if n < 1<<10 || n%(1<<10) != 0 {
		s += " bytes"
	}
	return s
}

// flights tells what the size alone does not.
func flights(p *dmabench.Point) string {
	var s []string
	if p.Engine {
		s = append(s, fmt.Sprintf("%d in flight", p.InFlight))
	}
	if !p.Aligned {
		s = append(s, "not aligned")
	}
	return strings.Join(s, ", ")
}

// printPoints prints the whole sweep.
func printPoints(out io.Writer, r *dmabench.Result) {
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "copy\tdirection\taligned\tin flight\tsize\tMB/s\tp50 us\tp99 us\tCPU\t")
	for _, p := range r.Points {
		aligned := "yes"
		if !p.Aligned {
			aligned = "no"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%s\t%.1f\t%.3f\t%.3f\t%.0f%%\t\n", p.Variant, p.Direction, aligned, p.InFlight, dmabench.SizeString(p.Size), p.MBps, p.P50, p.P99, 100*p.CPU)
	}
	w.Flush()
	for _, k := range r.Skipped {
		fmt.Fprintf(out, "not measured: %s\n", k)
	}
	if q := r.Ratio; q != nil {
		fmt.Fprintf(out, "device copy by runtime copy, 64 KiB: %.2f host to board, %.2f board to host\n", q.HostToBoard, q.BoardToHost)
	}
}
