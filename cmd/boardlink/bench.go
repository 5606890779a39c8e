package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/boardlink/boardlink/bench/benchkit"
)

type benchCmd struct {
	DMA      benchDMACmd      `cmd:"" name:"dma" help:"What the bus can do: copies by the processor and by DMA engines, both ways, every one checked."`
	Ring     benchRingCmd     `cmd:"" name:"ring" help:"Virtqueues between two processes: time and bus accesses of a buffer."`
	Doorbell benchDoorbellCmd `cmd:"" name:"doorbell" help:"Waking and being woken: a round trip by each mechanism, or a board's doorbell to its interrupt."`
	Packets  benchPacketsCmd  `cmd:"" name:"packets" help:"Frames through the whole virtio path between two processes, without an interface; in turns with DPDK, where it is installed."`
	Net      benchNetCmd      `cmd:"" name:"net" help:"TCP, UDP and round trips between two namespaces, beside veth, one process and two processes."`
	Disk     benchDiskCmd     `cmd:"" name:"disk" help:"A disk of the host on the board, by fio, beside qemu-nbd and the image itself; needs fio and qemu-nbd."`
	All      benchAllCmd      `cmd:"" name:"all" help:"All of these, with their tables, and the results in files."`
}

// benchFlags are those of every benchmark.
type benchFlags struct {
	JSON bool   `name:"json" help:"Print the result as JSON."`
	Plot string `placeholder:"FILE.svg" help:"Write a plot of a sweep over sizes."`
	Save string `placeholder:"FILE.json" help:"Write the result as JSON to a file, too."`
}

// benchRun is a benchmark under way.
type benchRun struct {
	ctx        context.Context // ends at SIGINT and SIGTERM
	env        *benchkit.Environment
	step       func(string) // shows what goes on, on a terminal
	s          *streams
	json       bool
	plot, save *os.File
	progress   *progress
	stop       func()
}

// begin prepares: the files first, so that a bad name costs no time, then the environment. pair are the processors that will be used, as
// benchkit.Look has it. The caller calls close.
func (f *benchFlags) begin(s *streams, pair [2]int) (*benchRun, error) {
	r := &benchRun{s: s, json: f.JSON, stop: func() {}}
	for _, n := range []struct {
		name string
		to   **os.File
	}{{f.Plot, &r.plot}, {f.Save, &r.save}} {
		if n.name == "" {
			continue
		}
		var err error
		if *n.to, err = os.Create(n.name); err != nil {
			r.close()
			return nil, usageError{err}
		}
	}
	var err error
	if r.env, err = benchkit.Look(pair); err != nil {
		r.close()
		return nil, err
	}
	r.ctx, r.stop = signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	r.progress = newProgress(s.err, !f.JSON)
	r.step = r.progress.step
	return r, nil
}

func (r *benchRun) close() {
	r.settle()
	r.stop()
	for _, f := range []*os.File{r.plot, r.save} {
		if f != nil {
			f.Close()
		}
	}
}

// settle clears the progress line.
func (r *benchRun) settle() {
	if r.progress != nil {
		r.progress.done()
		r.progress = nil
	}
}

// report writes what was measured: result, which has the environment in it, as JSON, the table below the environment, the plot. err
// is the measurement's.
func (r *benchRun) report(err error, result any, table func(io.Writer), plot func(io.Writer) error) error {
	r.settle()
	switch {
	case r.ctx.Err() != nil:
		return errors.New("interrupted")
	case err != nil:
		return err
	}
	r.env.Finish()
	var to []io.Writer
	if r.json {
		to = append(to, r.s.out)
	} else {
		fmt.Fprintln(r.s.out, r.env)
		table(r.s.out)
	}
	if r.save != nil {
		to = append(to, r.save)
	}
	for _, w := range to {
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		if err := e.Encode(result); err != nil {
			return err
		}
	}
	if r.plot != nil {
		if err := plot(r.plot); err != nil {
			return err
		}
	}
	for _, f := range []*os.File{r.plot, r.save} {
		if f != nil {
			if err := f.Close(); err != nil {
				return err
			}
		}
	}
	r.plot, r.save = nil, nil
	return nil
}
