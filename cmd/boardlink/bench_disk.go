package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/boardlink/boardlink/bench/diskbench"
	"github.com/boardlink/boardlink/bench/netbench"
	"github.com/boardlink/boardlink/trial"
	"github.com/boardlink/boardlink/trial/netns"
)

type benchDiskCmd struct {
	Paths    []string      `placeholder:"NAME" help:"What to measure: boardlink, qemu-nbd, file (fio on the image itself), and names of --also (default: all)."`
	Rounds   int           `default:"3" help:"How often each figure is taken of each path, in turns."`
	Duration time.Duration `default:"1s" help:"Of each measurement."`
	Size     string        `default:"256M" help:"Of each path's image, with K, M or G."`
	Dir      string        `placeholder:"DIR" help:"Where the images are made (default: the directory for temporary files)."`
	DiskKeys string        `placeholder:"KEYS" help:"Further keys of the host's --disk, e.g. direct,cache=none."`
	Only     string        `placeholder:"REGEXP" help:"Only the measurements whose names match, e.g. 'depth 32'."`
	JSON     bool          `name:"json" help:"Print the result as JSON."`
	Save     string        `placeholder:"FILE.json" help:"Write the result as JSON to a file, too."`
	Verbose  bool          `short:"v" help:"Show the log of both ends."`

	Placement string   `enum:"auto,window,push" default:"auto" help:"Where boardlink's rings and buffers lie (${enum})."`
	Memory    string   `enum:"cached,write-combining,uncached" default:"cached" help:"How memory across the bus is accessed (${enum})."`
	Window    string   `default:"16M" help:"Size of the shared memory: a power of two, with K, M or G."`
	Also      []string `placeholder:"NAME,KEY=VALUE..." sep:"none" help:"Measure one more boardlink beside; may be repeated. Keys: exe (another program) placement memory window host agent (a flag for that end); the flags above give the defaults."`
}

func (c *benchDiskCmd) Run(s *streams) error {
	cfg, err := c.config()
	if err != nil {
		return err
	}
	if err := netns.CheckTun(); err != nil {
		return usageError{err}
	}
	if netns.NeedsUser() {
		return usageError{netns.EnterUser()} // does not return where it can be
	}
	run, err := (&benchFlags{JSON: c.JSON, Save: c.Save}).begin(s, [2]int{})
	if err != nil {
		return err
	}
	defer run.close()
	cfg.Step, cfg.Environment = run.step, run.env
	if c.Verbose {
		for i := range cfg.Boardlink {
			cfg.Boardlink[i].Trial.Log = s.err
		}
	}
	r, err := diskbench.Run(run.ctx, cfg)
	var end *trial.EndError
	var setup *trial.SetupError
	if errors.As(err, &setup) || errors.As(err, &end) && end.ExitCode() == exitUsage {
		err = usageError{err}
	}
	return run.report(err, r, func(w io.Writer) { printDisk(w, r) }, nil)
}

// config checks the flags.
func (c *benchDiskCmd) config() (cfg diskbench.Config, err error) {
	if c.Duration < 10*time.Millisecond || c.Duration > time.Hour {
		return cfg, usagef("--duration %v: 10ms to 1h", c.Duration)
	}
	if c.Rounds < 1 || c.Rounds > 1000 {
		return cfg, usagef("--rounds %d: 1 to 1000", c.Rounds)
	}
	cfg = diskbench.Config{Paths: c.Paths, Dir: c.Dir, Rounds: c.Rounds, Duration: c.Duration, DiskKeys: c.DiskKeys}
	if cfg.Size, err = parseSize(c.Size); err != nil || cfg.Size < 4<<20 || cfg.Size%4096 != 0 {
		return cfg, usagef("--size %s: a number of bytes, 4M at least", c.Size)
	}
	if c.Only != "" {
		if cfg.Only, err = regexp.Compile(c.Only); err != nil {
			return cfg, usagef("--only: %v", err)
		}
	}
	exe, err := os.Executable()
	if err != nil {
		return cfg, err
	}
	base := netbench.Boardlink{Name: "boardlink", Trial: trial.Config{Exe: exe, Placement: c.Placement, Memory: c.Memory}}
	if base.Trial.Window, err = windowSize(c.Window); err != nil {
		return cfg, usagef("--window %s: %v", c.Window, err)
	}
	links := []netbench.Boardlink{base}
	for _, text := range c.Also {
		b, err := also(base, text)
		if err != nil {
			return cfg, usagef("--also %s: %v", text, err)
		}
		if b.Name == diskbench.QEMU || b.Name == diskbench.File || slices.ContainsFunc(links, func(o netbench.Boardlink) bool { return o.Name == b.Name }) {
			return cfg, usagef("--also %s: there is a path of that name", b.Name)
		}
		links = append(links, b)
	}
	for _, b := range links {
		cfg.Boardlink = append(cfg.Boardlink, diskbench.Boardlink(b))
	}
	if err := cfg.Check(); err != nil {
		return cfg, usageError{err}
	}
	return cfg, nil
}

func printDisk(out io.Writer, r *diskbench.Result) {
	fmt.Fprintf(out, "%s; %s; images of %s; %d rounds of %g s for each figure\n\n", r.FIO, r.QEMU, sizeString(uint64(r.Size)), r.Rounds, r.Seconds)
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', tabwriter.AlignRight)
	fmt.Fprint(w, "\tunit\t")
	for _, p := range r.Paths {
		fmt.Fprintf(w, "%s\t", p)
	}
	var ratios []string
	for _, p := range r.Paths {
		if p != diskbench.QEMU && p != diskbench.File && slices.Contains(r.Paths, diskbench.QEMU) {
			ratios = append(ratios, p)
			fmt.Fprintf(w, "%s of %s\t", p, diskbench.QEMU)
		}
	}
	fmt.Fprintln(w)
	spread := func(s diskbench.Series) { fmt.Fprintf(w, "%s (%s..%s)\t", short(s.Median), short(s.Min), short(s.Max)) }
	for _, f := range r.Figures {
		fmt.Fprintf(w, "%s\t%s\t", f.Name, f.Unit)
		for _, p := range r.Paths {
			spread(f.Paths[p])
		}
		for _, p := range ratios {
			spread(f.OfQEMU[p])
		}
		fmt.Fprint(w, "\n\tp50 us\t")
		for _, p := range r.Paths {
			spread(f.P50[p])
		}
		for range ratios {
			fmt.Fprint(w, "\t")
		}
		fmt.Fprintln(w)
	}
	w.Flush()
	fmt.Fprintln(out, "\nmedian (min..max); a ratio is taken in each round.")
}
