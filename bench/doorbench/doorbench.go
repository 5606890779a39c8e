//go:build linux

// Package doorbench measures how long it takes to wake the other side and to be woken by it: a round trip by each mechanism that
// this machine has, within a process and between two, on one processor and on two; and a board's doorbell to its interrupt.
//
// In the room: the mechanisms, the sides' loops and processes, what is measured. Never in it: rings, payload, printing.
package doorbench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"time"

	"github.com/boardlink/boardlink/bench/benchkit"
	"github.com/boardlink/boardlink/mmio"
	"golang.org/x/sys/unix"
)

// Mechanism is a way to wait and to be woken. "Locked" goroutines keep a thread to themselves.
type Mechanism string

// The mechanisms.
const (
	Read          Mechanism = "eventfd read"                  // blocks in read(2)
	ReadLocked    Mechanism = "eventfd read, locked"          //
	Netpoll       Mechanism = "netpoller"                     // Go's: os.File of an eventfd that does not block
	NetpollLocked Mechanism = "netpoller, locked"             //
	PPoll         Mechanism = "ppoll"                         // doorbell.Sleeper: what the data loops do
	PPollLocked   Mechanism = "ppoll, locked"                 //
	SpinPPoll     Mechanism = "spin, then ppoll"              // on shared memory; doorbells only for who sleeps
	SpinLocked    Mechanism = "spin, then ppoll, locked"      //
	Poll          Mechanism = "busy polling of shared memory" // locked
)

// Mechanisms are all of them.
var Mechanisms = []Mechanism{Read, ReadLocked, Netpoll, NetpollLocked, PPoll, PPollLocked, SpinPPoll, SpinLocked, Poll}

func (m Mechanism) locked() bool {
	return slices.Contains([]Mechanism{ReadLocked, NetpollLocked, PPollLocked, SpinLocked, Poll}, m)
}

// Where says which processors the sides run on.
type Where string

// The placements.
const (
	Apart Where = "two" // one each
	Same  Where = "one" // both on the first
	Any   Where = "any" // where the kernel puts them
)

// Config says what to measure. Zero fields have defaults.
type Config struct {
	// Command is what becomes the other sides (benchkit.Peer). Default: this program.
	Command    []string
	Mechanisms []Mechanism   // all
	Processes  []int         // 1, 2: both
	Where      []Where       // all
	CPU        []int         // two; the first two that this process may use
	Spin       time.Duration // of those that spin before they sleep; 50 us
	Pause      time.Duration // between two round trips, while the leading side spins; 0
	Duration   time.Duration // of each; 200 ms. A tenth more goes before, uncounted
	Step       func(string)  // if set, hears what is measured
}

// Result is a mechanism's.
type Result struct {
	Mechanism Mechanism        `json:"mechanism"`
	Processes int              `json:"processes"`
	Where     Where            `json:"processors"`
	Trip      benchkit.Latency `json:"round_trip"`
	// The processor time of each side in a round trip, with all of its process' threads, in nanoseconds; within a process, half
	// of what both take. The leading side's has the pause in it.
	LeadCPU float64 `json:"lead_cpu_ns"`
	EchoCPU float64 `json:"echo_cpu_ns"`
	// Sleeps are those of the leading side in a round trip: 0 where it only spins.
	Sleeps float64 `json:"lead_sleeps"`
}

// layout of the shared memory.
const (
	offLine  = 0 // benchkit.Line's, for polling
	offStop  = 512
	offLead  = 1024 // the words of the sides that spin, then sleep: 256 bytes each
	offEcho  = 2048
	memBytes = 4096
)

// patience is how long a side waits for the other.
const patience = 10 * time.Second

// order is a process'.
type order struct {
	Mechanism             Mechanism
	Lead, Echo            bool // the sides in this process
	CPU                   [2]int
	Spin, Pause, Duration time.Duration
}

// told is what a process reports.
type told struct {
	Trip  benchkit.Latency
	CPU   float64 // of a round trip
	Slept float64
}

func init() {
	benchkit.Register("door", func(b []byte) (any, error) {
		var o order
		if err := json.Unmarshal(b, &o); err != nil {
			return nil, err
		}
		return o.run()
	})
}

func (c *Config) defaults() error {
	if c.Mechanisms == nil {
		c.Mechanisms = Mechanisms
	}
	if c.Processes == nil {
		c.Processes = []int{2, 1}
	}
	if c.Where == nil {
		c.Where = []Where{Apart, Same, Any}
	}
	if c.CPU == nil {
		cpus, err := benchkit.CPUs()
		if err != nil {
			return err
		}
		c.CPU = []int{cpus[0], cpus[min(1, len(cpus)-1)]}
	}
	if len(c.CPU) != 2 || c.CPU[0] < 0 || c.CPU[1] < 0 {
		return fmt.Errorf("processors %v: two", c.CPU)
	}
	if c.Spin == 0 {
		c.Spin = 50 * time.Microsecond
	}
	if c.Duration == 0 {
		c.Duration = 200 * time.Millisecond
	}
	if c.Duration < 0 || c.Spin < 0 || c.Pause < 0 {
		return errors.New("a time below 0")
	}
	for _, m := range c.Mechanisms {
		if !slices.Contains(Mechanisms, m) {
			return fmt.Errorf("mechanism %q: one of %q", m, Mechanisms)
		}
	}
	if c.Step == nil {
		c.Step = func(string) {}
	}
	return nil
}

// possible tells which combinations mean something: two that spin need a processor each, and goroutines of one process can be
// kept on different processors only where they are locked to threads.
func (c *Config) possible(m Mechanism, processes int, w Where) bool {
	switch {
	case w == Apart && c.CPU[0] == c.CPU[1]:
		return false
	case m == Poll && w != Apart:
		return false
	case w == Apart && processes == 1:
		return m.locked()
	}
	return true
}

// Run measures.
func Run(ctx context.Context, c Config) ([]Result, error) {
	if err := c.defaults(); err != nil {
		return nil, err
	}
	all := []Result{}
	for _, w := range c.Where {
		for _, n := range c.Processes {
			for _, m := range c.Mechanisms {
				if !c.possible(m, n, w) {
					continue
				}
				what := fmt.Sprintf("%s, processes: %d, processors: %s", m, n, w)
				c.Step(what)
				r, err := c.one(ctx, m, n, w)
				if ctx.Err() != nil {
					return all, ctx.Err()
				}
				if err != nil {
					return all, fmt.Errorf("%s: %w", what, err)
				}
				all = append(all, *r)
			}
		}
	}
	return all, nil
}

func (c *Config) one(ctx context.Context, m Mechanism, processes int, w Where) (*Result, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*c.Duration+2*patience)
	defer cancel()
	files, _, err := benchkit.Files("doorbench", memBytes, 2, 0)
	if err != nil {
		return nil, err
	}
	defer benchkit.CloseFiles(files)
	o := order{Mechanism: m, CPU: [2]int{-1, -1}, Spin: c.Spin, Pause: c.Pause, Duration: c.Duration}
	only := [2]int{-1, -1} // which processors the processes may use
	switch {
	case w == Same:
		only = [2]int{c.CPU[0], c.CPU[0]}
	case w == Apart && processes == 2:
		only = [2]int{c.CPU[0], c.CPU[1]}
	case w == Apart:
		o.CPU = [2]int{c.CPU[0], c.CPU[1]}
	}
	r := &Result{Mechanism: m, Processes: processes, Where: w}
	if processes == 1 {
		o.Lead, o.Echo = true, true
		p, err := benchkit.StartOn(ctx, only[0], "door", &o, files, c.Command)
		if err != nil {
			return nil, err
		}
		var t told
		if err := p.Wait(&t); err != nil {
			return nil, err
		}
		r.Trip, r.LeadCPU, r.EchoCPU, r.Sleeps = t.Trip, t.CPU/2, t.CPU/2, t.Slept
		return r, nil
	}
	lead, echo := o, o
	lead.Lead, echo.Echo = true, true
	e, err := benchkit.StartOn(ctx, only[1], "door", &echo, files, c.Command)
	if err != nil {
		return nil, err
	}
	defer e.Stop()
	l, err := benchkit.StartOn(ctx, only[0], "door", &lead, files, c.Command)
	if err != nil {
		return nil, err
	}
	defer l.Stop()
	var tl, te told
	select {
	case <-l.Gone():
		if err := l.Wait(&tl); err != nil {
			return nil, fmt.Errorf("leading side: %w", err)
		}
		if err := e.Wait(&te); err != nil {
			return nil, fmt.Errorf("other side: %w", err)
		}
	case <-e.Gone():
		if err := e.Wait(&te); err != nil {
			return nil, fmt.Errorf("other side: %w", err)
		}
		if err := l.Wait(&tl); err != nil {
			return nil, fmt.Errorf("leading side: %w", err)
		}
	}
	r.Trip, r.LeadCPU, r.EchoCPU, r.Sleeps = tl.Trip, tl.CPU, te.CPU, tl.Slept
	return r, nil
}

// run is what a process does: one side, or both.
func (o *order) run() (*told, error) {
	b, err := unix.Mmap(benchkit.FirstFD, 0, memBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("mmap: %w", err)
	}
	ram, _ := mmio.FromBytes(b).RAM()
	if o.Mechanism == Poll && o.Lead && o.Echo && runtime.GOMAXPROCS(0) < 2 {
		runtime.GOMAXPROCS(2)
	}
	t := new(told)
	if o.Lead && o.Echo {
		done := make(chan error, 1)
		go func() {
			_, err := o.side(ram, false)
			done <- err
		}()
		if t, err = o.side(ram, true); err != nil {
			return nil, err
		}
		return t, <-done
	}
	return o.side(ram, o.Lead)
}

// side is one of the two, in a goroutine of its own.
func (o *order) side(ram mmio.RAM, lead bool) (*told, error) {
	if o.Mechanism.locked() {
		cpu := o.CPU[1]
		if lead {
			cpu = o.CPU[0]
		}
		unpin, err := benchkit.Pin(cpu)
		if err != nil {
			return nil, err
		}
		defer unpin()
	}
	w, err := newWaiter(o, ram, lead)
	if err != nil {
		return nil, err
	}
	if lead {
		return o.lead(ram, w)
	}
	return o.echo(ram, w)
}

// lead rings, waits, and looks at the clock.
func (o *order) lead(ram mmio.RAM, w waiter) (*told, error) {
	h := benchkit.NewHistogram()
	var cpu time.Duration
	var slept uint64
	counted := false
	began := time.Now()
	for now := began; now.Sub(began) < o.Duration; {
		if !counted && now.Sub(began) > o.Duration/10 {
			// The first ones find the other side, and the processors that the kernel chooses.
			counted = true
			h.Reset()
			cpu, slept = benchkit.ProcessCPU(), w.slept()
			now = time.Now()
			began = now
		}
		for o.Pause > 0 && time.Since(now) < o.Pause {
		}
		start := now
		if o.Pause > 0 {
			start = time.Now()
		}
		if err := w.ring(); err != nil {
			return nil, err
		}
		if err := w.wait(); err != nil {
			return nil, err
		}
		now = time.Now()
		h.Record(now.Sub(start))
		if !counted && now.Sub(began) >= o.Duration {
			began = now.Add(-o.Duration / 2) // one trip took all the time: there is to be one that counts
		}
	}
	t := &told{Trip: h.Latency()}
	n := float64(t.Trip.Count)
	t.CPU, t.Slept = float64(benchkit.ProcessCPU()-cpu)/n, float64(w.slept()-slept)/n
	ram.Store32(offStop, 1)
	mmio.Fence(mmio.Cached, mmio.FullBarrier)
	return t, w.ring()
}

// echo waits and rings.
func (o *order) echo(ram mmio.RAM, w waiter) (*told, error) {
	var cpu time.Duration
	trips := -1 // the first one, for which the other side had to be made
	for {
		if err := w.wait(); err != nil {
			return nil, err
		}
		if trips++; trips == 0 {
			cpu = benchkit.ProcessCPU()
		}
		if ram.Load32(offStop) != 0 {
			return &told{CPU: float64(benchkit.ProcessCPU()-cpu) / float64(max(1, trips))}, nil
		}
		if err := w.ring(); err != nil {
			return nil, err
		}
	}
}
