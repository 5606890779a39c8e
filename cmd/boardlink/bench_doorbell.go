package main

import (
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/boardlink/boardlink/bench/benchkit"
	"github.com/boardlink/boardlink/bench/doorbench"
	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/pci"
)

type benchDoorbellCmd struct {
	Board     string        `arg:"" optional:"" help:"A board, KIND:ARGUMENT as for boardlink host: its own doorbell to its own interrupt. No host may use it meanwhile. Default: this machine's mechanisms."`
	JSON      bool          `name:"json" help:"Print the result as JSON."`
	Save      string        `placeholder:"FILE.json" help:"Write the result as JSON to a file, too."`
	Duration  time.Duration `default:"200ms" help:"Of each mechanism."`
	Pause     time.Duration `default:"0s" help:"Between two round trips, in which the leading side spins and the other goes to sleep."`
	Spin      time.Duration `default:"50us" help:"Of those that look at shared memory for a while before they sleep."`
	Processes string        `enum:"1,2,both" default:"both" help:"Both sides in one process, or in two (1, 2, both)."`
	On        string        `enum:"one,two,any,all" default:"all" help:"Processors of the sides: the same one, two, where the kernel puts them (one, two, any, all)."`
	CPU       string        `name:"cpu" placeholder:"A,B" help:"Processors. Default: the first two."`
	Rings     int           `default:"10000" help:"Of a board."`
}

// benchDoorbell is the result.
type benchDoorbell struct {
	Environment *benchkit.Environment  `json:"environment"`
	PauseNS     int64                  `json:"pause_ns"`
	SpinNS      int64                  `json:"spin_ns"`
	Results     []doorbench.Result     `json:"results,omitempty"`
	Board       *doorbench.BoardResult `json:"board,omitempty"`
}

func (c *benchDoorbellCmd) Run(s *streams) error {
	cfg := doorbench.Config{Duration: c.Duration, Pause: c.Pause, Spin: c.Spin}
	var pair [2]int
	if c.CPU != "" {
		var err error
		if pair, err = benchkit.ParsePair(c.CPU); err != nil {
			return usagef("--cpu: %v", err)
		}
		if pair[0] < 0 || pair[1] < 0 {
			return usagef("--cpu %s: two processors; to leave them to the kernel, say --on any", c.CPU)
		}
		cfg.CPU = pair[:]
	}
	switch {
	case c.Duration < time.Millisecond || c.Duration > time.Minute:
		return usagef("--duration %v: 1ms to 1m", c.Duration)
	case c.Pause < 0 || c.Pause > time.Second || c.Pause*10 > c.Duration:
		return usagef("--pause %v: 0 to 1s, and ten of them in --duration (%v)", c.Pause, c.Duration)
	case c.Spin < time.Microsecond || c.Spin > 100*time.Millisecond:
		return usagef("--spin %v: 1us to 100ms", c.Spin)
	case c.Rings < 1 || c.Rings > 1e7:
		return usagef("--rings %d: 1 to 10000000", c.Rings)
	}
	if c.Processes != "both" {
		cfg.Processes = []int{int(c.Processes[0] - '0')}
	}
	if c.On != "all" {
		cfg.Where = []doorbench.Where{doorbench.Where(c.On)}
	}
	run, err := (&benchFlags{JSON: c.JSON, Save: c.Save}).begin(s, pair)
	if err != nil {
		return err
	}
	defer run.close()
	r := &benchDoorbell{Environment: run.env, PauseNS: int64(c.Pause), SpinNS: int64(c.Spin)}
	if c.Board == "" {
		cfg.Step = run.step
		r.Results, err = doorbench.Run(run.ctx, cfg)
	} else {
		run.step("ringing")
		r.Board, err = c.board(run, s)
	}
	if err = run.report(err, r, r.print, nil); err != nil {
		return err
	}
	if r.Board != nil && r.Board.Lost > 0 {
		fmt.Fprintf(s.err, "boardlink bench doorbell: %d rings did not come back as interrupts within %v\n", r.Board.Lost, doorbench.LostAfter)
		return statusError(exitFail)
	}
	return nil
}

func (c *benchDoorbellCmd) board(run *benchRun, s *streams) (r *doorbench.BoardResult, err error) {
	b, err := board.Open(c.Board, board.Options{Side: board.Host, Logf: func(f string, a ...any) { s.logger(false).Info(fmt.Sprintf(f, a...)) }})
	if err != nil {
		return nil, err
	}
	defer b.Close()
	if gerr := pci.Guard(func() { r, err = doorbench.Board(run.ctx, b, c.Rings) }); gerr != nil {
		err = gerr
	}
	return r, err
}

func (r *benchDoorbell) print(out io.Writer) {
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', tabwriter.AlignRight)
	us := func(ns int64) string { return benchkit.Micros(float64(ns)) }
	if b := r.Board; b != nil {
		fmt.Fprintf(out, "%s: its doorbell, rung by this side for itself, until this program has slept, was woken and has acknowledged; us\n", b.Board)
		fmt.Fprintln(w, "\tp50\tp99\tp99.9\tmax\tprocessor\tn\t")
		fmt.Fprintf(w, "doorbell write\t%s\t%s\t%s\t%s\t\t%d\t\n", us(b.Write.P50), us(b.Write.P99), us(b.Write.P999), us(b.Write.Max), b.Write.Count)
		fmt.Fprintf(w, "doorbell to interrupt\t%s\t%s\t%s\t%s\t%s\t%d\t\n", us(b.Loop.P50), us(b.Loop.P99), us(b.Loop.P999), us(b.Loop.Max), benchkit.Micros(b.CPU), b.Loop.Count)
		w.Flush()
		return
	}
	fmt.Fprintf(out, "round trips, us; pause between them %v; those that spin before they sleep do so for %v\n", time.Duration(r.PauseNS), time.Duration(r.SpinNS))
	fmt.Fprintln(w, "mechanism\tprocesses\tprocessors\tp50\tp99\tp99.9\tprocessor time: leading\tother side\tsleeps\tn\t")
	for _, q := range r.Results {
		fmt.Fprintf(w, "%s\t%d\t%s\t%s\t%s\t%s\t%s\t%s\t%.3f\t%d\t\n", q.Mechanism, q.Processes, q.Where, us(q.Trip.P50), us(q.Trip.P99), us(q.Trip.P999),
			benchkit.Micros(q.LeadCPU), benchkit.Micros(q.EchoCPU), q.Sleeps, q.Trip.Count)
	}
	w.Flush()
}
