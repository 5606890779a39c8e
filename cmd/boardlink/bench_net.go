package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/boardlink/boardlink/bench/netbench"
	"github.com/boardlink/boardlink/board/loopback"
	"github.com/boardlink/boardlink/trial"
	"github.com/boardlink/boardlink/trial/netns"
	"github.com/boardlink/boardlink/trial/traffic"
	"github.com/boardlink/boardlink/tunbridge"
)

type benchNetCmd struct {
	Paths    []string      `placeholder:"NAME" help:"What to measure: veth, one-process, two-processes, boardlink, and names of --also (default: all)."`
	MTU      []int         `name:"mtu" default:"1500,65000" help:"MTUs in bytes."`
	Rounds   int           `default:"3" help:"How often each figure is taken of each path, in turns."`
	Duration time.Duration `default:"300ms" help:"Of each measurement: TCP and UDP each way, pings."`
	Streams  []int         `default:"1,4" help:"TCP connections at once."`
	Verified bool          `help:"Check every byte of TCP; that takes its share of the processors, on all paths."`
	TCP      string        `name:"congestion-control" placeholder:"NAME" help:"Of TCP on all paths, set on each connection (default: the system's). With bbr its timers bound all of them; cubic is the kernel's own default."`
	Only     string        `placeholder:"REGEXP" help:"Only the measurements whose names match, e.g. '^ping flood|^tcp board'."`
	JSON     bool          `name:"json" help:"Print the result as JSON."`
	Save     string        `placeholder:"FILE.json" help:"Write the result as JSON to a file, too."`
	Verbose  bool          `short:"v" help:"Show the log of both ends."`

	Link      string   `enum:"tap,tun" default:"tap" help:"Of all interfaces. tap: Ethernet frames. tun: raw IP packets."`
	Offload   bool     `default:"true" negatable:"" help:"Of all interfaces: leave checksums and segmentation to the other side where the kernel can."`
	Placement string   `enum:"auto,window,push" default:"auto" help:"Where boardlink's rings and buffers lie (${enum})."`
	Ring      string   `enum:"auto,split,packed" default:"auto" help:"Kind of virtqueue (${enum})."`
	Memory    string   `enum:"cached,write-combining,uncached" default:"cached" help:"How memory across the bus is accessed (${enum})."`
	Window    string   `default:"16M" help:"Size of the shared memory: a power of two, with K, M or G."`
	Queues    int      `default:"1" help:"Queue pairs, of all interfaces: 1 to ${max_queues}."`
	BusyPoll  string   `default:"auto" placeholder:"DURATION" help:"How long boardlink's loops busy-poll before they sleep: auto, off, or e.g. 50us (default: ${default})."`
	CPU       []string `placeholder:"BOARD,HOST" help:"Processors to lock the loops of the board's end and of the host's to, e.g. 0,1 (default: none)."`
	HostArg   []string `placeholder:"FLAG" sep:"none" help:"Flag for boardlink host, e.g. --host-arg=--deny=event_idx; may be repeated."`
	AgentArg  []string `placeholder:"FLAG" sep:"none" help:"Flag for boardlink agent; may be repeated."`
	Also      []string `placeholder:"NAME,KEY=VALUE..." sep:"none" help:"Measure one more boardlink beside; may be repeated. Keys: exe (another program) placement ring memory window busy-poll host agent (a flag for that end); the flags above give the defaults."`
}

func (c *benchNetCmd) Run(s *streams) error {
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
	for i := range cfg.Boardlink {
		if c.Verbose {
			cfg.Boardlink[i].Trial.Log = s.err
		}
	}
	r, err := netbench.Run(run.ctx, cfg)
	var end *trial.EndError
	var setup *trial.SetupError
	var refused *traffic.CongestionError
	if errors.As(err, &setup) || errors.As(err, &refused) || errors.As(err, &end) && end.ExitCode() == exitUsage {
		err = usageError{err}
	}
	return run.report(err, r, func(w io.Writer) { printNet(w, r) }, nil)
}

// config checks the flags.
func (c *benchNetCmd) config() (cfg netbench.Config, err error) {
	limit := 65535
	if c.Link == "tap" {
		limit -= 14
	}
	for _, mtu := range c.MTU {
		if mtu < 1280 || mtu > limit {
			return cfg, usagef("--mtu %d: 1280 (IPv6 needs it) to %d", mtu, limit)
		}
	}
	if c.Duration < 10*time.Millisecond || c.Duration > time.Hour {
		return cfg, usagef("--duration %v: 10ms to 1h", c.Duration)
	}
	if c.Rounds < 1 || c.Rounds > 1000 {
		return cfg, usagef("--rounds %d: 1 to 1000", c.Rounds)
	}
	var only *regexp.Regexp
	if c.Only != "" {
		if only, err = regexp.Compile(c.Only); err != nil {
			return cfg, usagef("--only: %v", err)
		}
	}
	for i, n := range c.Streams {
		if n < 1 || n > 256 || slices.Contains(c.Streams[:i], n) {
			return cfg, usagef("--streams %d: 1 to 256, each once", n)
		}
	}
	exe, err := os.Executable()
	if err != nil {
		return cfg, err
	}
	var loop tunbridge.LoopConfig
	if err := loop.SetBusyPoll(c.BusyPoll); err != nil {
		return cfg, usagef("--busy-poll: %v", err)
	}
	if n := len(c.CPU); n != 0 && n != 2 {
		return cfg, usagef("--cpu: two processors are needed, of the board's end and the host's, %d are given", n)
	}
	for _, cpu := range c.CPU {
		if err := loop.SetCPU(cpu); err != nil {
			return cfg, usagef("--cpu: %v", err)
		}
	}
	if c.Queues < 1 || c.Queues > tunbridge.MaxQueues {
		return cfg, usagef("--queues %d: 1 to %d", c.Queues, tunbridge.MaxQueues)
	}
	base := netbench.Boardlink{Name: "boardlink", Trial: trial.Config{Exe: exe, Placement: c.Placement, Ring: c.Ring, Memory: c.Memory, Queues: c.Queues}}
	base.Trial.HostArgs, base.Trial.AgentArgs = []string{"--busy-poll", c.BusyPoll}, []string{"--busy-poll", c.BusyPoll}
	if len(c.CPU) > 0 {
		base.Trial.AgentArgs, base.Trial.HostArgs = append(base.Trial.AgentArgs, "--cpu", c.CPU[0]), append(base.Trial.HostArgs, "--cpu", c.CPU[1])
	}
	base.Trial.HostArgs, base.Trial.AgentArgs = append(base.Trial.HostArgs, c.HostArg...), append(base.Trial.AgentArgs, c.AgentArg...)
	if base.Trial.Window, err = windowSize(c.Window); err != nil {
		return cfg, usagef("--window %s: %v", c.Window, err)
	}
	cfg = netbench.Config{MTUs: c.MTU, Link: c.Link, Offload: c.Offload, Queues: c.Queues, Streams: c.Streams, Rounds: c.Rounds, Duration: c.Duration, Verified: c.Verified, Congestion: c.TCP, Only: only,
		Boardlink: []netbench.Boardlink{base}}
	for _, text := range c.Also {
		b, err := also(base, text)
		if err != nil {
			return cfg, usagef("--also %s: %v", text, err)
		}
		cfg.Boardlink = append(cfg.Boardlink, b)
	}
	known := []string{netbench.Veth, netbench.OneProcess, netbench.TwoProcesses}
	for _, b := range cfg.Boardlink {
		if slices.Contains(known, b.Name) {
			return cfg, usagef("--also %s: there is a path of that name", b.Name)
		}
		known = append(known, b.Name)
	}
	for i, name := range c.Paths {
		spoken := strings.ReplaceAll(name, "-", " ")
		if !slices.Contains(known, name) && slices.Contains(known, spoken) {
			name = spoken
		}
		if !slices.Contains(known, name) || slices.Contains(cfg.Paths, name) {
			return cfg, usagef("--paths %s: each once of %s", c.Paths[i], strings.ReplaceAll(strings.Join(known, ", "), " process", "-process"))
		}
		cfg.Paths = append(cfg.Paths, name)
	}
	if err := cfg.Check(); err != nil {
		return cfg, usageError{err}
	}
	return cfg, nil
}

func windowSize(text string) (int64, error) {
	n, err := parseSize(text)
	if err == nil && (n < loopback.MinSize || n&(n-1) != 0) {
		err = fmt.Errorf("a power of two, and at least %s", sizeString(loopback.MinSize))
	}
	return n, err
}

// also reads the description of one more boardlink.
func also(base netbench.Boardlink, text string) (netbench.Boardlink, error) {
	words := strings.Split(text, ",")
	b := base
	b.Name = words[0]
	if b.Name == "" || strings.ContainsAny(b.Name, "= ") {
		return b, errors.New("it begins with a name")
	}
	t := &b.Trial
	t.HostArgs, t.AgentArgs = slices.Clone(t.HostArgs), slices.Clone(t.AgentArgs)
	for _, kv := range words[1:] {
		k, v, ok := strings.Cut(kv, "=")
		if !ok {
			return b, fmt.Errorf("%q is not KEY=VALUE", kv)
		}
		var err error
		switch k {
		case "exe":
			t.Exe = v
		case "placement":
			t.Placement = v
		case "ring":
			t.Ring = v
		case "memory":
			t.Memory = v
		case "window":
			t.Window, err = windowSize(v)
		case "busy-poll":
			t.HostArgs, t.AgentArgs = append(t.HostArgs, "--busy-poll", v), append(t.AgentArgs, "--busy-poll", v)
		case "host":
			t.HostArgs = append(t.HostArgs, v)
		case "agent":
			t.AgentArgs = append(t.AgentArgs, v)
		default:
			err = fmt.Errorf("there is no key %s; there are exe placement ring memory window busy-poll host agent", k)
		}
		if err != nil {
			return b, err
		}
	}
	return b, nil
}

func printNet(out io.Writer, r *netbench.Result) {
	offload := "offloads on"
	if !r.Offload {
		offload = "offloads off"
	}
	fmt.Fprintf(out, "%s, %s, TCP with %s; %d rounds of %g s for each figure; cache line before each round: %s ns\n", r.Link, offload, r.Congestion, r.Rounds, r.Seconds, whole(r.RoundTrips))
	mtu := 0
	var w *tabwriter.Writer
	// Ratios of boardlink to the others.
	type column struct{ path, of string }
	var ratios []column
	for _, p := range r.Paths {
		if p == netbench.Veth || p == netbench.OneProcess || p == netbench.TwoProcesses {
			continue
		}
		for _, of := range []string{netbench.OneProcess, netbench.TwoProcesses} {
			if slices.Contains(r.Paths, of) {
				ratios = append(ratios, column{p, of})
			}
		}
	}
	for _, f := range r.Figures {
		if f.MTU != mtu {
			if w != nil {
				w.Flush()
			}
			mtu = f.MTU
			w = tabwriter.NewWriter(out, 0, 8, 2, ' ', tabwriter.AlignRight)
			fmt.Fprintf(w, "\nMTU %d\tunit\t", mtu)
			for _, p := range r.Paths {
				fmt.Fprintf(w, "%s\t", p)
			}
			for _, c := range ratios {
				fmt.Fprintf(w, "%s of %s\t", c.path, c.of)
			}
			fmt.Fprintln(w)
		}
		fmt.Fprintf(w, "%s\t%s\t", f.Name, f.Unit)
		for _, p := range r.Paths {
			cell(w, f.Paths, p)
		}
		for _, c := range ratios {
			m := f.OfOne
			if c.of == netbench.TwoProcesses {
				m = f.OfTwo
			}
			cell(w, m, c.path)
		}
		fmt.Fprintln(w)
	}
	if w != nil {
		w.Flush()
	}
	fmt.Fprintf(out, "\nmedian (min..max); a ratio is taken in each round. %d pings lost, %d frames dropped at taps.\n", r.PingsLost, r.Dropped)
}

func cell(w *tabwriter.Writer, m map[string]netbench.Series, name string) {
	v, ok := m[name]
	if !ok {
		fmt.Fprint(w, "-\t")
		return
	}
	fmt.Fprintf(w, "%s (%s..%s)\t", short(v.Median), short(v.Min), short(v.Max))
}

// short writes a number with three digits or so.
func short(v float64) string {
	switch {
	case v >= 100:
		return strconv.FormatFloat(v, 'f', 0, 64)
	case v >= 10:
		return strconv.FormatFloat(v, 'f', 1, 64)
	}
	return strconv.FormatFloat(v, 'f', 2, 64)
}

func whole(v []float64) string {
	var l []string
	for _, x := range v {
		l = append(l, strconv.FormatFloat(x, 'f', 0, 64))
	}
	return strings.Join(l, " ")
}
