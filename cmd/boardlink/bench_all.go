package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/boardlink/boardlink/bench/benchkit"
)

type benchAllCmd struct {
	Dir     string        `default:".cache/bench" help:"Where the results go, as NAME.json and NAME.svg. It is made where there is none."`
	Only    []string      `placeholder:"NAME" help:"Only these: dma, ring, ring-window ... See --list."`
	List    bool          `help:"Print what would run, and stop."`
	Timeout time.Duration `default:"5m" help:"Of each benchmark."`
}

// allBenchmarks is what bench all, and with it make bench, runs: within ten minutes on two processors.
var allBenchmarks = []struct {
	name string
	args string // behind "boardlink bench"
	plot bool
	// needs is somebody else's program, to compare with: where it is not installed, that is no fault.
	needs string
}{
	{name: "dma", args: "dma loopback", plot: true},
	{name: "ring", args: "ring"},
	{name: "ring-in-order", args: "ring --in-order"},
	{name: "ring-batches", args: "ring --runs 15", plot: true},
	{name: "ring-one", args: "ring --batch 1 --outstanding 1"},
	{name: "ring-window", args: "ring --placement window --memory uncached --batch 32"},
	{name: "ring-push", args: "ring --placement push --memory uncached --batch 32"},
	{name: "packets", args: "packets"},
	{name: "packets-sizes", args: "packets --direction board-to-host --duration 200ms", plot: true},
	{name: "packets-dpdk", args: "packets --dpdk", needs: "dpdk-testpmd"},
	{name: "doorbell", args: "doorbell"},
	{name: "doorbell-idle", args: "doorbell --pause 300us --duration 300ms --processes 2"},
	{name: "net", args: "net"},
}

func (c *benchAllCmd) Run(s *streams) error {
	names := []string{}
	for _, b := range allBenchmarks {
		names = append(names, b.name)
	}
	for _, o := range c.Only {
		if !slices.Contains(names, o) {
			return usagef("--only %s: one of %s", o, strings.Join(names, " "))
		}
	}
	if c.Timeout <= 0 {
		return usagef("--timeout %v: above 0", c.Timeout)
	}
	exe, err := benchkit.Command()
	if err != nil {
		return err
	}
	if !c.List {
		if err := os.MkdirAll(c.Dir, 0o777); err != nil {
			return usageError{err}
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	start := time.Now()
	var failed, left []string
	for i, b := range allBenchmarks {
		if len(c.Only) > 0 && !slices.Contains(c.Only, b.name) {
			continue
		}
		args := append([]string{"bench"}, strings.Fields(b.args)...)
		args = append(args, "--save", filepath.Join(c.Dir, b.name+".json"))
		if b.plot {
			args = append(args, "--plot", filepath.Join(c.Dir, b.name+".svg"))
		}
		if c.List {
			fmt.Fprintln(s.out, "boardlink "+strings.Join(args, " "))
			continue
		}
		if b.needs != "" {
			if _, err := exec.LookPath(b.needs); err != nil {
				left = append(left, b.name+" (needs "+b.needs+")")
				continue
			}
		}
		fmt.Fprintf(s.out, "== %d of %d, after %.0f s: boardlink bench %s\n", i+1, len(allBenchmarks), time.Since(start).Seconds(), b.args)
		if err := c.one(ctx, s, append(exe, args...)); err != nil {
			failed = append(failed, fmt.Sprintf("%s (%v)", b.name, err))
		}
		if ctx.Err() != nil {
			return errors.New("interrupted")
		}
		fmt.Fprintln(s.out)
	}
	if c.List {
		return nil
	}
	fmt.Fprintf(s.out, "%.0f s; results in %s\n", time.Since(start).Seconds(), c.Dir)
	if len(left) > 0 {
		fmt.Fprintf(s.out, "left out: %s\n", strings.Join(left, ", "))
	}
	if len(failed) > 0 {
		return fmt.Errorf("these could not run here, or found something wrong; each has said so above: %s", strings.Join(failed, ", "))
	}
	return nil
}

// one runs a benchmark in a process of its own: one that fails, or hangs, leaves the others alone.
func (c *benchAllCmd) one(ctx context.Context, s *streams, command []string) error {
	ctx, cancel := context.WithTimeout(ctx, c.Timeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, command[0], command[1:]...)
	// It shows its progress itself, where these are a terminal. An interrupt reaches it from there.
	cmd.Stdout, cmd.Stderr = s.out, s.err
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	err := cmd.Run()
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return fmt.Errorf("took more than %v", c.Timeout)
	}
	return err
}
