package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/hwtest/dmabench"
	"github.com/boardlink/boardlink/pci"
	"github.com/boardlink/boardlink/virtiomsg"
)

type benchCmd struct {
	DMA benchDMACmd `cmd:"" name:"dma" help:"What the bus can do: copies by the processor and by DMA engines, both ways, every one checked."`
}

type benchDMACmd struct {
	Board    string        `arg:"" help:"\"loopback\" (this machine's memory alone), or a board: KIND:ARGUMENT, as for boardlink host. Its window is overwritten."`
	JSON     bool          `name:"json" help:"Print the result as JSON."`
	Plot     string        `placeholder:"FILE.svg" help:"Write a plot of throughput by size, with the limit of the link where it is known."`
	Duration time.Duration `default:"15ms" help:"Of each measurement."`
	MaxSize  string        `default:"4M" help:"Largest copy: 64 to 4M, with K or M."`
	Offset   string        `default:"0" help:"Where in the board's window to begin, with K, M or G."`
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
	var plot *os.File
	if c.Plot != "" {
		// Before the measurement, so that a bad name costs no time.
		if plot, err = os.Create(c.Plot); err != nil {
			return usageError{err}
		}
		defer plot.Close()
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	t, done, err := c.target(s, uint64(off))
	if err != nil {
		return err
	}
	defer done()
	p := newProgress(s.err, !c.JSON)
	var r *dmabench.Result
	// A board that goes away under the copies is an error, no crash.
	if gerr := pci.Guard(func() {
		r, err = dmabench.Run(ctx, t, dmabench.Config{Sizes: dmabench.DefaultSizes(int(max)), Duration: c.Duration, Step: p.step})
	}); gerr != nil {
		err = gerr
	}
	p.done()
	switch {
	case ctx.Err() != nil:
		return errors.New("interrupted")
	case err != nil:
		return err
	}
	if c.JSON {
		e := json.NewEncoder(s.out)
		e.SetIndent("", "  ")
		if err := e.Encode(r); err != nil {
			return err
		}
	} else {
		printBench(s, r)
	}
	if plot != nil {
		if err := dmabench.Plot(plot, r); err != nil {
			return err
		}
		if err := plot.Close(); err != nil {
			return err
		}
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

func printBench(s *streams, r *dmabench.Result) {
	fmt.Fprintf(s.out, "%s, memory of the board: %s\n", r.Target.Name, r.Target.Memory)
	if l := r.Target.Link; l != nil {
		fmt.Fprintf(s.out, "link: x%d at %g GT/s, payloads of %d bytes: at most %.0f MB/s each way\n", l.Width, l.SpeedGTps, l.MaxPayload, l.LimitMBps)
	}
	w := tabwriter.NewWriter(s.out, 0, 8, 2, ' ', tabwriter.AlignRight)
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
		fmt.Fprintf(s.out, "not measured: %s\n", k)
	}
	if q := r.Ratio; q != nil {
		fmt.Fprintf(s.out, "device copy by runtime copy, 64 KiB: %.2f host to board, %.2f board to host\n", q.HostToBoard, q.BoardToHost)
	}
	fmt.Fprintf(s.out, "%d measurements in %.1f s, %d corrupt\n", len(r.Points), r.Seconds, r.Corrupt)
}
