//go:build linux

package netbench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/boardlink/boardlink/bench/benchkit"
	"github.com/boardlink/boardlink/trial"
	"github.com/boardlink/boardlink/trial/traffic"
)

// Config says what to measure. The zero value of a field stands for its default, where it has one.
type Config struct {
	// Command runs this program, for the measuring sticks: it has to call benchkit.Peer. Default: this program.
	Command []string
	// Boardlink are the links to measure: Link, Offload and MTU of Trial are set to those below.
	Boardlink []Boardlink
	// Paths are measured in turns, by their names: Veth, OneProcess, TwoProcesses and names of Boardlink. Default: all.
	Paths    []string
	MTUs     []int         // bytes; default 1500 and 65000
	Link     string        // "tap" (default) or "tun"
	Offload  bool          // of all taps: checksums, TSO, USO
	Queues   int           // of the measuring sticks' taps, each with loops of its own; default 1
	Streams  []int         // TCP connections at once, each way; default 1 and 4
	Rounds   int           // default 3
	Duration time.Duration // of each measurement; default 300 ms
	Verified bool          // every byte of TCP is checked, which takes time of the processors
	// Congestion is the congestion control of the TCP connections, a name of net.ipv4.tcp_available_congestion_control;
	// default: the system's. One that paces (bbr) bounds all paths by its timers.
	Congestion string
	// SocketBuffer is the room in bytes for what is under way between two processes; default 1 MiB, with which they are faster than
	// with the kernel's default, and with 8 MiB.
	SocketBuffer int
	// Only, if set, leaves out the measurements whose names it does not match: "tcp board to host", "ping flood".
	Only *regexp.Regexp
	// Environment is the machine as the caller found it; nil: Run looks itself. The caller's Finish ends it.
	Environment *benchkit.Environment
	Step        func(string) // if set, hears what is measured
}

// Boardlink is a link to measure.
type Boardlink struct {
	Name  string
	Trial trial.Config
}

// Check tells what is wrong with c, as Run would.
func (c Config) Check() error { return c.setDefaults() }

func (c *Config) setDefaults() error {
	if c.Paths == nil {
		c.Paths = []string{Veth, OneProcess, TwoProcesses}
		for _, b := range c.Boardlink {
			c.Paths = append(c.Paths, b.Name)
		}
	}
	for i, name := range c.Paths {
		known := name == Veth || name == OneProcess || name == TwoProcesses ||
			slices.ContainsFunc(c.Boardlink, func(b Boardlink) bool { return b.Name == name })
		if !known || slices.Contains(c.Paths[:i], name) {
			return fmt.Errorf("path %q: is given twice, or there is none of that name", name)
		}
	}
	known, err := os.ReadFile(availableCongestion)
	if err != nil {
		return fmt.Errorf("which congestion controls TCP has: %w", err)
	}
	if names := strings.Fields(string(known)); c.Congestion != "" && !slices.Contains(names, c.Congestion) {
		return fmt.Errorf("congestion control %q: this kernel has %s (modprobe tcp_%s may load more)", c.Congestion, strings.Join(names, ", "), c.Congestion)
	}
	if c.Congestion == "" {
		now, err := os.ReadFile(congestionControl)
		if err != nil {
			return fmt.Errorf("the congestion control of TCP: %w", err)
		}
		c.Congestion = strings.TrimSpace(string(now))
	}
	if len(c.MTUs) == 0 {
		c.MTUs = []int{1500, 65000}
	}
	if len(c.Streams) == 0 {
		c.Streams = []int{1, 4}
	}
	if c.Link == "" {
		c.Link = "tap"
	}
	if c.Queues == 0 {
		c.Queues = 1
	}
	if c.SocketBuffer == 0 {
		c.SocketBuffer = 1 << 20
	}
	if c.Rounds == 0 {
		c.Rounds = 3
	}
	if c.Duration == 0 {
		c.Duration = 300 * time.Millisecond
	}
	if c.Step == nil {
		c.Step = func(string) {}
	}
	if len(measures(c)) == 0 {
		return fmt.Errorf("no measurement matches %v", c.Only)
	}
	return nil
}

// Series is what the rounds gave.
type Series struct {
	benchkit.Spread
	Rounds []float64 `json:"rounds"`
}

func series(v []float64) Series { return Series{benchkit.SpreadOf(v), v} }

// Figure is one of the figures, for each path that has it.
type Figure struct {
	MTU  int    `json:"mtu"`
	Name string `json:"name"`
	Unit string `json:"unit"`
	// More tells that more is better.
	More  bool              `json:"more_is_better"`
	Paths map[string]Series `json:"paths"`
	// Ratios of each other path, by its name, to one process and to two processes: each round's, for those that both have.
	OfOne map[string]Series `json:"of_one_process,omitempty"`
	OfTwo map[string]Series `json:"of_two_processes,omitempty"`
}

// Result is what was measured.
type Result struct {
	Environment *benchkit.Environment `json:"environment"`
	Paths       []string              `json:"paths"` // in the order of the table
	Link        string                `json:"link"`
	Offload     bool                  `json:"offload"`
	Queues      int                   `json:"queues"`
	Verified    bool                  `json:"verified"`
	Congestion  string                `json:"congestion_control"` // of TCP
	Rounds      int                   `json:"rounds"`
	Seconds     float64               `json:"seconds_each"` // of each measurement
	// RoundTrips are the times of a cache line between the two processors before each round, in nanoseconds; 0 where it was not measured.
	RoundTrips []float64 `json:"round_trips_ns"`
	Figures    []*Figure `json:"figures"`
	PingsLost  int       `json:"pings_lost"`
	Dropped    uint64    `json:"dropped"` // frames that taps refused, all paths
}

// Figure returns a figure, nil where there is none.
func (r *Result) Figure(mtu int, name string) *Figure {
	for _, f := range r.Figures {
		if f.MTU == mtu && f.Name == name {
			return f
		}
	}
	return nil
}

// add notes what a round gave.
func (r *Result) add(path string, v value) {
	f := r.Figure(v.mtu, v.name)
	if f == nil {
		f = &Figure{MTU: v.mtu, Name: v.name, Unit: v.unit, More: v.more, Paths: map[string]Series{}}
		r.Figures = append(r.Figures, f)
	}
	s := f.Paths[path]
	s.Rounds = append(s.Rounds, v.v)
	f.Paths[path] = s
}

// finish works out medians and ratios.
func (r *Result) finish() {
	for _, f := range r.Figures {
		for name, s := range f.Paths {
			f.Paths[name] = series(s.Rounds)
		}
		f.OfOne, f.OfTwo = f.ratios(OneProcess), f.ratios(TwoProcesses)
	}
}

// ratios compares with a path, round by round.
func (f *Figure) ratios(base string) map[string]Series {
	b, ok := f.Paths[base]
	if !ok || f.Unit == "%" {
		return nil
	}
	m := map[string]Series{}
	for name, s := range f.Paths {
		if name == base || len(s.Rounds) != len(b.Rounds) {
			continue
		}
		v := make([]float64, len(s.Rounds))
		for i := range v {
			if b.Rounds[i] == 0 {
				v = nil
				break
			}
			v[i] = s.Rounds[i] / b.Rounds[i]
		}
		if v != nil {
			m[name] = series(v)
		}
	}
	return m
}

// value is a figure of one round.
type value struct {
	mtu        int
	name, unit string
	more       bool
	v          float64
}

// Run measures. In each round all paths are started anew, every figure is taken of one path after the other, beginning with another one
// each round, and all are ended.
func Run(ctx context.Context, c Config) (r *Result, err error) {
	if err := c.setDefaults(); err != nil {
		return nil, err
	}
	// Threads of the traffic that have something to do never wait for others of this process.
	old := runtime.GOMAXPROCS(0)
	runtime.GOMAXPROCS(old + 2*slices.Max(c.Streams) + 4)
	defer runtime.GOMAXPROCS(old)
	r = &Result{Environment: c.Environment, Paths: c.Paths, Link: c.Link, Offload: c.Offload, Queues: c.Queues, Verified: c.Verified, Congestion: c.Congestion, Rounds: c.Rounds, Seconds: c.Duration.Seconds(),
		Figures: []*Figure{}}
	if r.Environment == nil {
		if r.Environment, err = benchkit.Look([2]int{}); err != nil {
			return nil, err
		}
		defer r.Environment.Finish()
	}
	for _, mtu := range c.MTUs {
		for n := range c.Rounds {
			if err := r.round(ctx, &c, mtu, n); err != nil {
				return nil, err
			}
		}
	}
	r.finish()
	return r, nil
}

func (r *Result) round(ctx context.Context, c *Config, mtu, n int) (err error) {
	at := fmt.Sprintf("MTU %d, round %d of %d: ", mtu, n+1, c.Rounds)
	e := r.Environment
	trip, _ := benchkit.RoundTrip(e.Pair[0], e.Pair[1]) // 0 where the machine has one processor, or they are busy
	r.RoundTrips = append(r.RoundTrips, trip)
	paths := make([]path, len(c.Paths))
	defer func() {
		for _, p := range paths {
			if p != nil {
				err = errors.Join(err, p.close())
			}
		}
	}()
	for i, name := range c.Paths {
		c.Step(at + "start " + name)
		if paths[i], err = startPath(ctx, c, name, mtu); err != nil {
			return err
		}
	}
	for _, m := range measures(c) {
		for i := range paths {
			i = (i + n) % len(paths)
			c.Step(at + m.name + ", " + c.Paths[i])
			if err := ctx.Err(); err != nil {
				return err
			}
			t := taker{c: c, p: paths[i], r: r, path: c.Paths[i], mtu: mtu}
			if err := m.take(ctx, &t); err != nil {
				return fmt.Errorf("%s, %s: %w", c.Paths[i], m.name, err)
			}
		}
	}
	for _, p := range paths {
		t, err := p.counts(ctx)
		if err != nil {
			return err
		}
		r.Dropped += t.Dropped
	}
	return nil
}

// measure is one thing that is done on each path.
type measure struct {
	name string
	take func(context.Context, *taker) error
}

// measures returns all of them.
func measures(c *Config) []measure {
	var l []measure
	for _, n := range c.Streams {
		for _, d := range []traffic.Direction{traffic.BoardToHost, traffic.HostToBoard} {
			name := "tcp " + d.String()
			if n > 1 {
				name = fmt.Sprintf("tcp %d streams %v", n, d)
			}
			l = append(l, measure{name, func(ctx context.Context, t *taker) error { return t.tcp(ctx, name, d, n) }})
		}
	}
	for _, d := range []traffic.Direction{traffic.BoardToHost, traffic.HostToBoard} {
		name := "udp 64 B " + d.String()
		l = append(l, measure{name, func(ctx context.Context, t *taker) error { return t.udp(ctx, name, d) }})
	}
	for _, p := range []struct {
		name     string
		interval time.Duration
		awake    bool
	}{
		{"ping each 500µs", 500 * time.Microsecond, false},
		{"ping each 500µs, awake", 500 * time.Microsecond, true},
		{"ping each 10ms", 10 * time.Millisecond, false},
		{"ping flood", 0, false},
	} {
		l = append(l, measure{p.name, func(ctx context.Context, t *taker) error { return t.ping(ctx, p.name, p.interval, p.awake) }})
	}
	l = append(l, measure{"ping under tcp", func(ctx context.Context, t *taker) error { return t.pingUnder(ctx, "ping under tcp") }})
	if c.Only != nil {
		l = slices.DeleteFunc(l, func(m measure) bool { return !c.Only.MatchString(m.name) })
	}
	return l
}

// taker measures one path.
type taker struct {
	c    *Config
	p    path
	r    *Result
	path string
	mtu  int
}

func (t *taker) add(name, unit string, more bool, v float64) {
	t.r.add(t.path, value{t.mtu, name, unit, more, v})
}

func (t *taker) ends(d traffic.Direction) (from, to traffic.Endpoint) {
	p := t.p.pair()
	if d == traffic.BoardToHost {
		return p.Board, p.Host
	}
	return p.Host, p.Board
}

// window is what happened while a load went on.
type window struct {
	seconds        float64
	received, sent uint64
	cpu            time.Duration // of the path's processes
	switches       uint64        // of their threads
	Counts                       // over a little more than the window
}

// watch measures a load after it has got going.
func (t *taker) watch(ctx context.Context, l load) (w window, err error) {
	if err := sleep(ctx, min(lingering, t.c.Duration)); err != nil {
		return w, err
	}
	pids := t.p.pids()
	c0, err := t.p.counts(ctx)
	if err != nil {
		return w, err
	}
	s0, err := switches(pids)
	if err != nil {
		return w, err
	}
	cpu0, err := cpuTime(pids)
	if err != nil {
		return w, err
	}
	begin, r0, n0 := time.Now(), l.received(), l.sent()
	for {
		if err := sleep(ctx, t.c.Duration); err != nil {
			return w, err
		}
		w.seconds, w.received, w.sent = time.Since(begin).Seconds(), l.received()-r0, l.sent()-n0
		if w.cpu, err = cpuTime(pids); err != nil {
			return w, err
		}
		w.cpu -= cpu0
		if w.switches, err = switches(pids); err != nil {
			return w, err
		}
		w.switches -= s0
		if w.Counts, err = t.p.counts(ctx); err != nil {
			return w, err
		}
		w.Counts = w.Counts.sub(c0)
		if w.received > 0 && w.sent > 0 && (w.Frames > 0 || len(pids) == 0) {
			return w, nil
		}
		// A machine that has more to do: without a frame, or while the sender waits for a processor, there is nothing to divide by.
		if time.Since(begin) > max(blastGrace, 2*t.c.Duration) {
			return w, fmt.Errorf("in %.1f s %d is sent and %d arrives", w.seconds, w.sent, w.received)
		}
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (t *taker) tcp(ctx context.Context, name string, d traffic.Direction, streams int) error {
	from, to := t.ends(d)
	l, err := startTCP(ctx, from, to, streams, t.c)
	if err != nil {
		return err
	}
	w, err := t.watch(ctx, l)
	if err := errors.Join(err, l.stop()); err != nil {
		return err
	}
	t.add(name, "Gbit/s", true, float64(w.received)*8/w.seconds/1e9)
	if w.Bytes == 0 {
		return nil // the kernel alone
	}
	gb := float64(w.received) / 1e9
	t.add(name+": cpu", "s/GB", false, w.cpu.Seconds()/gb)
	t.add(name+": switches", "/GB", false, float64(w.switches)/gb)
	gb = float64(w.Bytes) / 1e9
	t.add(name+": system calls", "/GB", false, float64(w.Syscalls)/gb)
	t.add(name+": system calls a frame", "", false, float64(w.Syscalls)/float64(w.Frames))
	t.addTaps(name, w)
	t.add(name+": bytes a frame", "bytes", true, float64(w.Bytes)/float64(w.Frames))
	if w.Rings > 0 {
		t.add(name+": doorbells a frame", "", false, float64(w.Rings)/float64(w.Frames))
	}
	return nil
}

func (t *taker) udp(ctx context.Context, name string, d traffic.Direction) error {
	from, to := t.ends(d)
	l, err := startUDP(ctx, from, to)
	if err != nil {
		return err
	}
	w, err := t.watch(ctx, l)
	if err := errors.Join(err, l.stop()); err != nil {
		return err
	}
	t.add(name, "kpps", true, float64(w.received)/w.seconds/1e3)
	t.add(name+": lost", "%", false, 100*(1-min(1, float64(w.received)/float64(w.sent))))
	if w.Frames > 0 {
		t.add(name+": cpu", "us a packet", false, w.cpu.Seconds()*1e6/float64(w.received))
		t.add(name+": system calls a frame", "", false, float64(w.Syscalls)/float64(w.Frames))
		t.addTaps(name, w)
	}
	return nil
}

// addTaps adds the reads and writes at each end's interface for a frame: one would be none in vain.
func (t *taker) addTaps(name string, w window) {
	if w.Frames > 0 && w.BoardTap+w.HostTap > 0 {
		t.add(name+": calls at the board's tap a frame", "", false, float64(w.BoardTap)/float64(w.Frames))
		t.add(name+": calls at the host's tap a frame", "", false, float64(w.HostTap)/float64(w.Frames))
	}
}

func (t *taker) ping(ctx context.Context, name string, interval time.Duration, awake bool) error {
	from, to := t.ends(traffic.HostToBoard)
	d := t.c.Duration
	if interval >= 10*time.Millisecond {
		d *= 3 // there are few of them
	}
	p, err := ping(ctx, from, to, interval, d, awake)
	if err != nil {
		return err
	}
	t.r.PingsLost += p.lost
	if len(p.rtt) == 0 {
		return errors.New("no answer")
	}
	t.add(name+": p50", "us", false, p.quantile(0.5))
	t.add(name+": p99", "us", false, p.quantile(0.99))
	return nil
}

// pingUnder pings while a stream goes the same way as the requests.
func (t *taker) pingUnder(ctx context.Context, name string) error {
	from, to := t.ends(traffic.HostToBoard)
	l, err := startTCP(ctx, from, to, 1, t.c)
	if err != nil {
		return err
	}
	err = sleep(ctx, min(lingering, t.c.Duration))
	if err == nil {
		err = t.ping(ctx, name, 2*time.Millisecond, false)
	}
	return errors.Join(err, l.stop())
}
