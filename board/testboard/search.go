package testboard

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/boardlink/boardlink/board"
)

// FailureKind tells what went wrong in a run.
type FailureKind uint8

const (
	// LostWakeup: nothing is under way, all processors sleep, and not all are done.
	LostWakeup FailureKind = iota
	// CheckFailure: a processor failed, or a check at the end.
	CheckFailure
	// StepFailure: no end after Search.MaxSteps.
	StepFailure
	// PanicFailure: a processor panicked.
	PanicFailure
	// HangFailure: a processor blocks on something that the scheduler does not know.
	HangFailure
)

// Failure is a run that went wrong.
type Failure struct {
	Kind   FailureKind
	Err    error
	Replay string // what BOARDLINK_REPLAY takes to run the same schedule again
	Trace  string // the last steps, one on a line
}

// Error implements error, with the trace.
func (f *Failure) Error() string {
	return fmt.Sprintf("%v\nreplay: BOARDLINK_REPLAY=%q\n%s", f.Err, f.Replay, f.Trace)
}

// Unwrap returns the error without the trace.
func (f *Failure) Unwrap() error { return f.Err }

// Search says how far to look.
type Search struct {
	Options
	// Runs is how many random schedules to run.
	Runs int
	// Seed of the random schedules; 0 takes one from the system.
	Seed uint64
	// Bound is in how many places a systematic schedule may deviate from a plain one.
	Bound int
	// FaultsOnly keeps the systematic search to deviations that are faults: one at every
	// step, with a Bound of 1.
	FaultsOnly bool
	// MaxSystematic is how many schedules the systematic search may run; where those of
	// a bound are more, as many are drawn from them at random. 0 means 5000.
	MaxSystematic int
	// MaxSteps is the number of steps after which a run is a live-lock; 0 means 20000.
	MaxSteps int
	// TraceLines is how many lines of a failure's trace to keep; 0 means 150.
	TraceLines int
}

// Result tells what a search did.
type Result struct {
	Runs     int // schedules run
	Steps    int // accesses, barriers and sleeps in all of them
	Complete int // all schedules with up to so many deviations were run; -1: none
	Failure  *Failure
}

// TB is what Explore needs of a testing.TB.
type TB interface {
	Helper()
	Logf(format string, args ...interface{})
	Fatalf(format string, args ...interface{})
}

// Explore runs the test that setup builds under many schedules and fails t at
// the first one that goes wrong. setup is called for each run; everything that it
// and its processors share must be made by it, and the processors must be
// deterministic.
//
// The environment variable BOARDLINK_SEARCH, a number, multiplies the extent of the search;
// BOARDLINK_REPLAY runs the one schedule that a failure printed.
func Explore(t TB, s Search, setup func(b *Board)) Result {
	t.Helper()
	if r := os.Getenv("BOARDLINK_REPLAY"); r != "" {
		f, err := Replay(s, r, setup)
		if err != nil {
			t.Fatalf("BOARDLINK_REPLAY: %v", err)
		}
		if f != nil {
			t.Fatalf("%v", f)
		}
		t.Logf("replayed: nothing went wrong")
		return Result{Runs: 1, Complete: -1}
	}
	if k, err := strconv.Atoi(os.Getenv("BOARDLINK_SEARCH")); err == nil && k > 1 {
		s.defaults()
		s.Runs *= k
		s.MaxSystematic *= k
	}
	res := Find(s, setup)
	if res.Failure != nil {
		t.Fatalf("schedule %d: %v", res.Runs, res.Failure)
	}
	t.Logf("%d schedules, %d steps, complete to %d deviations", res.Runs, res.Steps, res.Complete)
	return res
}

func (s *Search) defaults() {
	if s.MaxSystematic == 0 {
		s.MaxSystematic = 5000
	}
	if s.MaxSteps == 0 {
		s.MaxSteps = 20000
	}
	if s.TraceLines == 0 {
		s.TraceLines = 150
	}
}

// Find searches as Explore does, and returns what it found.
func Find(s Search, setup func(b *Board)) Result {
	s.defaults()
	if s.Seed == 0 {
		var err error
		if s.Seed, err = systemSeed(); err != nil {
			panic(err)
		}
	}
	x := &explorer{Search: s, setup: setup}
	x.res.Complete = -1
	if s.Bound >= 0 {
		x.systematic()
	}
	r := rng(s.Seed)
	for i := 0; i < s.Runs && x.res.Failure == nil; i++ {
		if x.horizon == 0 {
			x.random(r.next(), 1000)
		} else {
			x.random(r.next(), x.horizon)
		}
	}
	return x.res
}

// Replay runs one schedule, given as a Failure names it, and returns its failure.
func Replay(s Search, schedule string, setup func(b *Board)) (*Failure, error) {
	s.defaults()
	x := &explorer{Search: s, setup: setup}
	var seed uint64
	var horizon, base int
	if n, _ := fmt.Sscanf(schedule, "random seed=%v horizon=%d", &seed, &horizon); n == 2 && horizon > 0 {
		x.random(seed, horizon)
		return x.res.Failure, nil
	}
	if n, _ := fmt.Sscanf(schedule, "systematic base=%d", &base); n != 1 {
		return nil, fmt.Errorf("testboard: %q names no schedule", schedule)
	}
	var devs []deviation
	for _, w := range strings.Fields(schedule)[2:] {
		var d deviation
		if n, _ := fmt.Sscanf(w, "%d=%d", &d.at, &d.choice); n != 2 {
			return nil, fmt.Errorf("testboard: %q in %q is not a deviation", w, schedule)
		}
		devs = append(devs, d)
	}
	x.plain(base, devs)
	return x.res.Failure, nil
}

type explorer struct {
	Search
	setup   func(b *Board)
	res     Result
	trace   []op
	horizon int // steps of a typical run
}

func (x *explorer) random(seed uint64, horizon int) {
	if f := x.run(newRandom(seed, horizon)); f != nil {
		f.Replay = fmt.Sprintf("random seed=%#x horizon=%d", seed, horizon)
		x.res.Failure = f
	}
}

// plain runs the plain schedule of a base with deviations, and returns how many options
// there were at each choice.
func (x *explorer) plain(base int, devs []deviation) []uint16 {
	s := &systematic{devs: devs, faultsOnly: x.FaultsOnly}
	s.eager[0], s.eager[1] = base&1 != 0, base&2 != 0
	f := x.run(s)
	if f == nil && (s.broken || s.used < len(devs)) {
		f = &Failure{Kind: CheckFailure, Err: errors.New("the test is not deterministic: a schedule that was recorded does not fit")}
	}
	if f != nil {
		f.Replay = fmt.Sprintf("systematic base=%d", base)
		for _, d := range devs {
			f.Replay += fmt.Sprintf(" %d=%d", d.at, d.choice)
		}
		x.res.Failure = f
	}
	return s.points
}

// systematic runs all schedules with 0, 1, ... Bound deviations, as far as there is
// room for all of a bound; of the bound that has too many it draws some.
func (x *explorer) systematic() {
	left := x.MaxSystematic
	leaves := 0 // schedules with one deviation more than those run last
	r := rng(x.Seed)
	for bound := 0; bound <= x.Bound; bound++ {
		if bound > 0 && leaves > left {
			break
		}
		n := 0
		for base := 0; base < 4; base++ {
			n += x.level(base, nil, bound, &left, &leaves)
			if x.res.Failure != nil {
				return
			}
			if left <= 0 && base < 3 {
				return
			}
		}
		leaves = n
		x.res.Complete = bound
	}
	// Random walks down the tree.
	for x.res.Complete < x.Bound && left > 0 {
		base := r.n(4)
		var devs []deviation
		for k := 0; k <= x.Bound && left > 0; k++ {
			points := x.plain(base, devs)
			left--
			if x.res.Failure != nil {
				return
			}
			if k == x.Bound {
				break
			}
			from := 0
			if len(devs) > 0 {
				from = devs[len(devs)-1].at + 1
			}
			n := 0
			for i := from; i < len(points); i++ {
				n += int(points[i]) - 1
			}
			if n == 0 {
				break
			}
			d := r.n(n)
			for i := from; i < len(points); i++ {
				if d < int(points[i])-1 {
					devs = append(devs, deviation{i, d + 1})
					break
				}
				d -= int(points[i]) - 1
			}
		}
	}
}

// level runs all schedules with exactly bound more deviations behind devs, and returns
// how many there are with one more.
func (x *explorer) level(base int, devs []deviation, bound int, left, leaves *int) int {
	points := x.plain(base, devs)
	*left--
	if x.res.Failure != nil {
		return 0
	}
	from, n := 0, 0
	if len(devs) > 0 {
		from = devs[len(devs)-1].at + 1
	}
	for i := from; i < len(points); i++ {
		for c := 1; c < int(points[i]); c++ {
			if bound == 0 {
				n++
				continue
			}
			if *left <= 0 {
				return n
			}
			n += x.level(base, append(devs[:len(devs):len(devs)], deviation{i, c}), bound-1, left, leaves)
			if x.res.Failure != nil {
				return n
			}
		}
	}
	return n
}

// hang is how long a run may take: only a processor that blocks outside the model
// takes longer.
const hang = 60 * time.Second

func (x *explorer) run(p policy) *Failure {
	b := newBoard(x.Options, p, x.MaxSteps, x.trace)
	x.setup(b)
	if n := b.next(nil); n != nil {
		n.wake <- struct{}{}
		t := time.NewTimer(hang)
		select {
		case <-b.fin:
			t.Stop()
		case <-t.C:
			// The goroutines cannot be ended; leave them.
			return &Failure{Kind: HangFailure, Err: fmt.Errorf("%s blocks on something outside the model", b.cur.name), Trace: b.format(x.TraceLines)}
		}
	}
	b.over = true
	for _, q := range b.procs {
		select {
		case q.wake <- struct{}{}:
		default:
		}
	}
	b.wg.Wait()
	x.res.Runs++
	x.res.Steps += b.steps
	if b.steps > x.horizon {
		x.horizon = b.steps
	}
	if b.fail == nil {
		for _, q := range b.procs {
			q.c.drainIf(func(*store) bool { return true })
		}
		b.m.deliver(board.Host, b.m.post[board.Host].len())
		b.m.deliver(board.Agent, b.m.post[board.Agent].len())
		for _, check := range b.checks {
			if err := check(); err != nil {
				b.failed(CheckFailure, err)
				break
			}
		}
	}
	x.trace = b.trace
	if b.fail != nil {
		b.fail.Trace = b.format(x.TraceLines)
	}
	return b.fail
}

// format returns the last steps as text.
func (b *Board) format(lines int) string {
	var w strings.Builder
	from := 0
	if len(b.trace) > lines {
		from = len(b.trace) - lines
		fmt.Fprintf(&w, "  ... %d earlier steps\n", from)
	}
	for i := from; i < len(b.trace); i++ {
		fmt.Fprintf(&w, "  %5d %s\n", i, b.line(&b.trace[i]))
	}
	return w.String()
}

// place names an address: "host:avail.idx+2".
func (b *Board) place(of board.Side, off uint64) string {
	ns := b.names[of]
	for i := len(ns) - 1; i >= 0; i-- {
		if off >= ns[i].off && off-ns[i].off < ns[i].size {
			s := of.String() + ":" + ns[i].text
			if off > ns[i].off {
				s += fmt.Sprintf("+%d", off-ns[i].off)
			}
			return s
		}
	}
	return fmt.Sprintf("%s:%#x", of, off)
}

func (b *Board) line(o *op) string {
	who := "-"
	if int(o.proc) < len(b.procs) {
		who = b.procs[o.proc].name
	}
	far := ""
	if int(o.proc) < len(b.procs) && b.procs[o.proc].c.side != o.of {
		far = " across"
	}
	switch o.kind {
	case opLoad:
		s := fmt.Sprintf("%-10s load%d%s  %s = %#x", who, o.width*8, far, b.place(o.of, o.off), o.val)
		if o.flag != 0 {
			s += " (stale)"
		}
		return s
	case opStore:
		return fmt.Sprintf("%-10s store%d%s %s <- %#x", who, o.width*8, far, b.place(o.of, o.off), o.val)
	case opBarrier:
		return fmt.Sprintf("%-10s barrier %s %s", who, [...]string{"weak", "strong"}[o.flag&1], [...]string{"read", "write", "full"}[o.flag>>1])
	case opRing:
		return fmt.Sprintf("%-10s ring %s vector %d", who, o.of, o.val)
	case opWait, opWaitTimeout:
		s := fmt.Sprintf("%-10s awake, vector %d", who, o.val)
		if o.flag != 0 {
			s += " (timed out)"
		}
		return s
	case opYield:
		return fmt.Sprintf("%-10s yield", who)
	case opChance:
		return fmt.Sprintf("%-10s %s: %v", who, o.text, o.flag != 0)
	case opDone:
		return fmt.Sprintf("%-10s done", who)
	case evDeliver:
		if o.flag != 0 {
			return fmt.Sprintf("%-10s   arrives: ring %s vector %d", "", o.of, o.val)
		}
		return fmt.Sprintf("%-10s   arrives: %s <- %#x", "", b.place(o.of, o.off), o.val)
	case evFault:
		return fmt.Sprintf("%-10s ! %s", "", o.text)
	case evLog:
		return fmt.Sprintf("%-10s # %s", who, o.text)
	}
	return fmt.Sprintf("%-10s start", who)
}
