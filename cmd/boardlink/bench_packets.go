package main

import (
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/boardlink/boardlink/bench/benchkit"
	"github.com/boardlink/boardlink/bench/packetbench"
)

type benchPacketsCmd struct {
	benchFlags
	Size      string        `placeholder:"N,..." help:"Bytes of a frame: 64 to 65549, several with commas; N-M: lengths differ from frame to frame; \"sweep\": 64 to 9000. Default: 64,1500, with --plot sweep."`
	Direction string        `enum:"board-to-host,host-to-board,echo,both,all" default:"all" help:"board-to-host, host-to-board, both of them, echo (one frame to and fro: latency), or all."`
	Ring      string        `enum:"split,packed,both" default:"both" help:"split, packed or both."`
	Placement string        `enum:"local,window,push" default:"local" help:"local: all memory is near; window, push: as on a board, what lies across is counted."`
	Memory    string        `enum:"cached,write-combining,uncached" default:"cached" help:"How memory across is accessed: cached, write-combining, uncached."`
	QueueSize int           `default:"256" help:"Descriptors of each queue."`
	Batch     int           `default:"32" help:"Frames that a side moves at once (testpmd's burst is 32)."`
	Duration  time.Duration `default:"300ms" help:"Of each measurement."`
	Runs      int           `default:"9" help:"Into which a measurement is cut; the figures are medians."`
	Sleep     bool          `help:"Sleep on eventfds where there is nothing to do; else both sides poll."`
	Spins     int           `default:"200" help:"With --sleep: looks in vain before."`
	InOrder   bool          `help:"With VIRTIO_F_IN_ORDER."`
	EventIdx  bool          `default:"true" negatable:"" help:"With VIRTIO_F_EVENT_IDX."`
	Verify    bool          `help:"Write every byte and check it; else the first 64 are written, and each frame's length and number checked."`
	CPU       string        `name:"cpu" placeholder:"A,B" help:"Processors of the board and the host side; -1 is any. Default: the first two."`
	DPDK      bool          `name:"dpdk" help:"In turns with DPDK's virtio-user and vhost drivers (testpmd), one processor each; needs dpdk-testpmd and 512 MiB of huge pages, which it reserves as root for that time."`
	Ours      string        `enum:"both,device,driver,each" default:"both" help:"With --dpdk, which ends of the link are ours: both; device: the host's side, by a vhost-user socket to DPDK's virtio-user driver; driver: the board's, to DPDK's vhost; each: all three, one after the other. DPDK's two ends take turns with them. device and driver: frames up to 1514 bytes."`
	Turns     int           `default:"5" help:"With --dpdk."`
}

// benchPackets is the result.
type benchPackets struct {
	Environment *benchkit.Environment     `json:"environment"`
	Results     []*packetbench.Result     `json:"results,omitempty"`
	DPDK        []*packetbench.Comparison `json:"dpdk,omitempty"`
}

var sweep = []string{"64", "128", "256", "512", "1024", "1500", "2048", "4096", "9000"}

// configs returns what is to be measured.
func (c *benchPacketsCmd) configs() (todo []packetbench.Config, pair [2]int, err error) {
	base := packetbench.Config{Placement: c.Placement, Memory: c.Memory, Size: c.QueueSize, Batch: c.Batch, Sleep: c.Sleep, Spins: c.Spins,
		InOrder: c.InOrder, EventIdx: c.EventIdx, Verify: c.Verify, Duration: c.Duration, Runs: c.Runs}
	if c.CPU != "" {
		if pair, err = benchkit.ParsePair(c.CPU); err != nil {
			return nil, pair, usagef("--cpu: %v", err)
		}
		if base.CPU = pair; pair[0] == pair[1] && pair[0] >= 0 {
			return nil, pair, usagef("--cpu %s: the sides spin, and need a processor each", c.CPU)
		}
	}
	for _, n := range []struct {
		flag string
		v    int
	}{{"--queue-size", c.QueueSize}, {"--batch", c.Batch}, {"--runs", c.Runs}, {"--spins", c.Spins}, {"--turns", c.Turns}, {"--duration", int(c.Duration)}} {
		if n.v < 1 {
			return nil, pair, usagef("%s is too small", n.flag) // 0 would stand for the default
		}
	}
	if c.DPDK && (c.Placement != "local" || c.Sleep || c.Verify || strings.Contains(c.Size, "-")) {
		return nil, pair, usagef("--dpdk: with --placement local, frames of one length, and without --sleep and --verify, as testpmd has none of them")
	}
	if c.Ours != "both" && !c.DPDK {
		return nil, pair, usagef("--ours %s: with --dpdk only", c.Ours)
	}
	sizes := strings.Split(c.Size, ",")
	switch {
	case c.Size == "sweep" || c.Size == "" && c.Plot != "":
		sizes = sweep
	case c.Size == "":
		sizes = []string{"64", "1500"}
	}
	directions := map[string][]packetbench.Direction{"board-to-host": {packetbench.BoardToHost}, "host-to-board": {packetbench.HostToBoard}, "echo": {packetbench.Echo},
		"both": {packetbench.BoardToHost, packetbench.HostToBoard}, "all": {packetbench.BoardToHost, packetbench.HostToBoard, packetbench.Echo}}[c.Direction]
	rings := []string{c.Ring}
	if c.Ring == "both" {
		rings = []string{"split", "packed"}
	}
	for _, ring := range rings {
		for _, d := range directions {
			for _, size := range sizes {
				k := base
				k.Ring, k.Direction = ring, d
				lo, hi, ok := strings.Cut(size, "-")
				if !ok {
					hi = lo
				}
				var err, err2 error
				k.Bytes, err = strconv.Atoi(lo)
				k.Bytes2, err2 = strconv.Atoi(hi)
				if err != nil || err2 != nil || k.Bytes < 1 || k.Bytes2 < 1 {
					return nil, pair, usagef("--size %s: numbers with commas, N-M, or sweep", c.Size)
				}
				if err := k.Check(); err != nil {
					return nil, pair, usageError{err}
				}
				for _, e := range c.ends() {
					if err := k.CheckEnds(e); err != nil {
						return nil, pair, usageError{err}
					}
				}
				todo = append(todo, k)
			}
		}
	}
	return todo, pair, nil
}

func (c *benchPacketsCmd) Run(s *streams) error {
	todo, pair, err := c.configs()
	if err != nil {
		return err
	}
	run, err := c.begin(s, pair)
	if err != nil {
		return err
	}
	defer run.close()
	r := &benchPackets{Environment: run.env}
	if c.DPDK {
		err = c.compare(run, r, todo)
	} else {
		for _, k := range todo {
			run.step(fmt.Sprintf("%s, %s, %d bytes", k.Ring, k.Direction, k.Bytes))
			var one *packetbench.Result
			if one, err = packetbench.Run(run.ctx, k); err != nil {
				break
			}
			r.Results = append(r.Results, one)
		}
	}
	if errors.Is(err, packetbench.ErrNoDPDK) {
		err = usageError{err}
	}
	if err := run.report(err, r, r.print, r.plot); err != nil {
		return err
	}
	corrupt := uint64(0)
	for _, q := range r.Results {
		corrupt += q.Corrupt
	}
	if corrupt > 0 {
		fmt.Fprintf(s.err, "boardlink bench packets: %d frames were not what was sent\n", corrupt)
		return statusError(exitFail)
	}
	return nil
}

// ends are those of a link that are to be ours, one after the other.
func (c *benchPacketsCmd) ends() []packetbench.Ends {
	if c.Ours == "each" {
		return []packetbench.Ends{packetbench.BothEnds, packetbench.DeviceEnd, packetbench.DriverEnd}
	}
	return []packetbench.Ends{packetbench.Ends(c.Ours)}
}

// compare measures in turns with DPDK: one pair of its programs for each kind of ring, as that is decided at its start.
func (c *benchPacketsCmd) compare(run *benchRun, r *benchPackets, todo []packetbench.Config) error {
	for len(todo) > 0 {
		ring := todo[0].Ring
		run.step("DPDK, " + ring)
		todo[0].CPU = r.Environment.Pair
		d, err := packetbench.StartDPDK(run.ctx, todo[0], c.ends()...)
		if err != nil {
			return err
		}
		for err == nil && len(todo) > 0 && todo[0].Ring == ring {
			k := todo[0]
			k.CPU = r.Environment.Pair
			for _, e := range c.ends() {
				var one *packetbench.Comparison
				if one, err = packetbench.Compare(run.ctx, k, d, e, c.Turns, run.step); err != nil {
					break
				}
				r.DPDK = append(r.DPDK, one)
			}
			todo = todo[1:]
		}
		d.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

func (r *benchPackets) print(out io.Writer) {
	if len(r.DPDK) > 0 {
		r.printDPDK(out)
		return
	}
	c := r.Results[0]
	how := []string{"polling"}
	if c.Sleep {
		how[0] = "sleeping"
	}
	for _, f := range []struct {
		on   bool
		text string
	}{{c.InOrder, "in order"}, {c.EventIdx, "event index"}, {c.Verify, "every byte written and checked"}, {!c.Verify, "64 bytes written, number and length checked"}} {
		if f.on {
			how = append(how, f.text)
		}
	}
	fmt.Fprintf(out, "two processes, one copy of each frame, placement %s, memory across %s, queues of %d, batches of %d, %s; medians of %d runs (slowest..fastest)\n",
		c.Placement, c.Memory, c.Size, c.Batch, strings.Join(how, ", "), c.Mpps.N)
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "ring\tdirection\tbytes\tMpps\t\tGbit/s\tns\tof a cache line's ns\tround trips\treads across\twrites across\tsleeps\trings\tcorrupt\t")
	echo := false
	for _, q := range r.Results {
		echo = echo || q.Latency != nil
		fmt.Fprintf(w, "%s\t%s\t%s\t%.2f\t(%.2f..%.2f)\t%.1f\t%.1f\t%.0f\t%.3f\t%.2f\t%.2f\t%.4f\t%.4f\t%d\t\n", q.Ring, q.Direction, frameSize(q), q.Mpps.Median, q.Mpps.Min, q.Mpps.Max,
			q.Gbps, 1e3/q.Mpps.Median, q.RoundTripNS, q.RoundTrips, q.Driver.Reads+q.Device.Reads, q.Driver.Writes+q.Device.Writes, q.Sleeps, q.Rings, q.Corrupt)
	}
	w.Flush()
	if !echo {
		return
	}
	fmt.Fprintln(out, "one frame under way, there and back, with a clock read each time:")
	w = tabwriter.NewWriter(out, 0, 8, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "ring\tbytes\tframes\tmin us\tp50 us\tp99 us\tp99.9 us\tmax us\tcache line us\t")
	for _, q := range r.Results {
		if l := q.Latency; l != nil {
			fmt.Fprintf(w, "%s\t%s\t%d\t%s\t%s\t%s\t%s\t%s\t%s\t\n", q.Ring, frameSize(q), l.Count, benchkit.Micros(float64(l.Min)), benchkit.Micros(float64(l.P50)),
				benchkit.Micros(float64(l.P99)), benchkit.Micros(float64(l.P999)), benchkit.Micros(float64(l.Max)), benchkit.Micros(q.RoundTripNS))
		}
	}
	w.Flush()
}

func frameSize(q *packetbench.Result) string {
	if q.Bytes2 > 0 {
		return fmt.Sprintf("%d-%d", q.Bytes, q.Bytes2)
	}
	return strconv.Itoa(q.Bytes)
}

func (r *benchPackets) printDPDK(out io.Writer) {
	fmt.Fprintf(out, "in turns with DPDK %s (virtio-user and vhost by testpmd: txonly, rxonly; echo: io, one frame); Mpps, of echo millions of round trips a second\n", r.DPDK[0].DPDK)
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "ring\tdirection\tbytes\tours\tturn\tboardlink\tDPDK\tratio\tcache line ns before, between, behind\t\t")
	for _, q := range r.DPDK {
		for i, t := range q.Turns {
			note := ""
			if !t.Steady {
				note = "the processors moved"
			}
			fmt.Fprintf(w, "%s\t%s\t%d\t%s\t%d\t%.2f\t%.2f\t%.2f\t%.0f %.0f %.0f\t%s\t\n", q.Ring, q.Direction, q.Bytes, q.Ends, i+1, t.Ours, t.Theirs, t.Ratio, t.Trips[0], t.Trips[1], t.Trips[2], note)
		}
	}
	w.Flush()
	fmt.Fprintln(out, "medians of the turns in which the processors stayed (of all where they never did); worst..best:")
	w = tabwriter.NewWriter(out, 0, 8, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "ring\tdirection\tbytes\tours\tboardlink\tDPDK\tratio\t\tturns\t")
	for _, q := range r.DPDK {
		fmt.Fprintf(w, "%s\t%s\t%d\t%s\t%.2f\t%.2f\t%.2f\t(%.2f..%.2f)\t%d of %d\t\n", q.Ring, q.Direction, q.Bytes, q.Ends, q.Ours.Median, q.Theirs.Median, q.Ratio.Median, q.Ratio.Min, q.Ratio.Max, q.Steady, len(q.Turns))
	}
	w.Flush()
}

func (r *benchPackets) plot(w io.Writer) error {
	p := benchkit.Plot{Title: "Frames between two processes, Mpps by size", X: "bytes of a frame"}
	at := map[string]int{}
	add := func(name string, colour int, dash bool, x int, y float64) {
		i, ok := at[name]
		if !ok {
			i = len(p.Lines)
			at[name] = i
			p.Lines = append(p.Lines, benchkit.PlotLine{Name: name, Colour: colour, Dash: dash})
		}
		p.Lines[i].Points = append(p.Lines[i].Points, benchkit.PlotPoint{X: float64(x), Y: y})
	}
	colours := map[string]int{}
	colour := func(name string) int {
		if _, ok := colours[name]; !ok {
			colours[name] = len(colours)
		}
		return colours[name]
	}
	for _, q := range r.Results {
		name := fmt.Sprintf("%s, %s", q.Ring, q.Direction)
		add(name, colour(name), false, q.Bytes, q.Mpps.Median)
	}
	for _, q := range r.DPDK {
		name := fmt.Sprintf("%s, %s", q.Ring, q.Direction)
		if q.Ends != packetbench.BothEnds {
			name += fmt.Sprintf(", our %s side", q.Ends)
		}
		add(name, colour(name), false, q.Bytes, q.Ours.Median)
		add(name+", DPDK", colour(name), true, q.Bytes, q.Theirs.Median)
	}
	return p.Write(w)
}
