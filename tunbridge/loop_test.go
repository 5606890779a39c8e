package tunbridge

import (
	"fmt"
	"reflect"
	"testing"
	"time"

	"github.com/boardlink/boardlink/doorbell"
	"golang.org/x/sys/unix"
)

// A loop looks on for as long as has paid off on that occasion, and gives it up where it does not pay.
func TestBusyPollAdapts(t *testing.T) {
	var b busyPoll
	if d := b.next(false); d != 0 {
		t.Fatalf("%v before the first sleep", d)
	}
	b.last = sent
	b.slept(20*time.Microsecond, true)
	if d := b.next(false); d != minBusyPoll {
		t.Errorf("%v after one short sleep, want %v", d, minBusyPoll)
	}
	if d := b.next(true); d != 0 {
		t.Errorf("%v where a look is a read across the bus, want none", d)
	}
	b.last = received
	if d := b.next(false); d != 0 {
		t.Errorf("%v on another occasion, want none", d)
	}
	b.last = sent
	longest := func() {
		t.Helper()
		for i := 0; i < 10 && b.next(false) < MaxBusyPoll; i++ {
			b.slept(20*time.Microsecond, true)
		}
		if d := b.next(false); d != MaxBusyPoll {
			t.Errorf("%v after many short sleeps, want %v", d, MaxBusyPoll)
		}
	}
	longest()
	// The longest look in vain, and a short sleep, again and again: the other side waits for this processor.
	for i := 1; i < maxFruitless; i++ {
		b.slept(20*time.Microsecond, true)
	}
	if d := b.next(false); d != MaxBusyPoll {
		t.Errorf("%v after %d looks in vain", d, maxFruitless-1)
	}
	b.slept(20*time.Microsecond, true)
	for i := 0; i < restSleeps; i++ {
		if d := b.next(false); d != 0 {
			t.Fatalf("%v although all looks were in vain", d)
		}
		b.slept(20*time.Microsecond, true)
	}
	longest()
	// Looks that find something now and then are not in vain.
	for i := 0; i < 10; i++ {
		b.slept(20*time.Microsecond, true)
		b.found()
	}
	if d := b.next(false); d != MaxBusyPoll {
		t.Errorf("%v, although every other look finds something", d)
	}
	b.slept(20*time.Microsecond, false) // the poll fallback's time is up: nothing came
	if d := b.next(false); d >= MaxBusyPoll {
		t.Errorf("%v after a sleep that nothing ended", d)
	}
	for i := 0; i < 10; i++ {
		b.slept(time.Millisecond, true)
	}
	if d := b.next(false); d != 0 {
		t.Errorf("%v after many long sleeps, want none", d)
	}
	b.set(time.Millisecond)
	if d := b.next(true); d != time.Millisecond {
		t.Errorf("%v, %v is set", d, time.Millisecond)
	}
	b.set(-1)
	if d := b.next(false); d > 0 {
		t.Errorf("%v although it is off", d)
	}
}

// fakeHalf is a direction whose every step a test sets.
type fakeHalf struct {
	common
	asked int
	reads []bool // mayRead of each step
	next  func(mayRead bool) (ring, iface int)
	land  func() int // what an await brings
}

func (f *fakeHalf) Run() error             { return nil }
func (f *fakeHalf) begin() error           { return nil }
func (f *fakeHalf) ground()                {}
func (f *fakeHalf) arm() (arming, error)   { return arming{asked: f.asked}, nil }
func (f *fakeHalf) disarm()                {}
func (f *fakeHalf) shared() *common        { return &f.common }
func (f *fakeHalf) await() (result, error) { return result{ring: f.land()}, nil }
func (f *fakeHalf) step(t turn) (result, error) {
	f.want = t.want
	f.reads = append(f.reads, t.read)
	r, i := f.next(t.read)
	did := f.did(r, i)
	did.frames, did.flying, f.moved = i+f.moved, f.flying, 0
	return did, nil
}

// The interface is read speculatively once frames went out by it: rarely where such reads are empty, each time where they are not.
func TestLoopReadsSpeculatively(t *testing.T) {
	answer := false
	out := &fakeHalf{}
	out.next = func(bool) (int, int) {
		out.countFrame(1)
		return 8, 0 // chains
	}
	in := &fakeHalf{}
	in.next = func(mayRead bool) (int, int) {
		if !mayRead {
			return 0, 0
		}
		in.dry = true
		if answer {
			return 0, 1
		}
		return 0, 0
	}
	l := &Loop{out: out, in: in}
	run := func(n int) (reads int) {
		in.reads = nil
		for i := 0; i < n; i++ {
			if _, err := l.step(); err != nil {
				t.Fatal(err)
			}
		}
		for _, r := range in.reads {
			if r {
				reads++
			}
		}
		return reads
	}
	if n := run(640); n > 640/16 {
		t.Errorf("%d reads in vain for 640 frames", n)
	}
	answer = true
	run(64)
	if n := run(100); n != 100 {
		t.Errorf("%d reads for 100 frames that are answered each", n)
	}
	if l.busy.last != sent {
		t.Errorf("the last occasion is %d", l.busy.last)
	}
	// Known to be ready: read, whatever the ration says; and again while it is not dry.
	answer, l.ready, l.spec.credit, l.end = false, true, -1000, batchEnd{}
	out.next = func(bool) (int, int) { return 0, 0 }
	in.next = func(bool) (int, int) { in.dry = false; return 0, 1 }
	if n := run(3); n != 3 {
		t.Errorf("%d reads in 3 steps of an interface that is not dry", n)
	}
	in.next = func(bool) (int, int) { in.dry = true; return 0, 0 }
	if n := run(3); n != 1 {
		t.Errorf("%d reads in 3 steps of an interface that is dry", n)
	}
}

// Where batches are small, few reads of the interface find nothing, and no frame is left for long.
func TestLoopPredictsBatchEnds(t *testing.T) {
	for _, c := range []struct {
		name    string
		batches []int
		most    float64 // reads a frame
	}{
		{name: "single frames", batches: []int{1}, most: 1.1},
		{name: "pairs", batches: []int{2}, most: 1.1},
		{name: "mostly single frames", batches: []int{1, 1, 1, 1, 2, 1, 1, 1}, most: 1.1},
		{name: "of some", batches: []int{5, 5, 5, 6, 5, 4}, most: 1.2},
		{name: "many", batches: []int{30, 40, 64, 200}, most: 1.1},
		{name: "floods after single frames", batches: []int{1, 1, 1, 1, 1, 1, 1, 100}, most: 1.1},
	} {
		frames, reads, polls := 0, 0, 0
		in := &fakeHalf{}
		in.next = func(mayRead bool) (_, got int) {
			for in.dry = false; mayRead && !in.enough(got, 0); got++ {
				reads++
				if frames == 0 {
					in.dry = true
					break
				}
				frames--
			}
			return 0, got
		}
		l := &Loop{in: in}
		total, batches := 0, 0
		for round := 0; round < 200; round++ {
			for _, n := range c.batches {
				frames = n
				total += n
				batches++
				for frames > 0 {
					polls++
					l.ready = true
					l.end.polled(true)
					for l.ready {
						if _, err := l.step(); err != nil {
							t.Fatal(err)
						}
					}
				}
				l.end.polled(false)
			}
		}
		if got := float64(reads) / float64(total); got > c.most {
			t.Errorf("%s: %.3f reads a frame, at most %.2f expected", c.name, got, c.most)
		}
		// A poll finds what a predicted end left: in place of a read, and not often where batches are alike.
		if polls > batches*2 {
			t.Errorf("%s: %d polls for %d batches", c.name, polls, batches)
		}
	}
}

// While the ring keeps the loop busy it does not come to poll: then nothing is left to that.
func TestLoopPredictsNotWhileBusy(t *testing.T) {
	frames, moved := 0, 0
	out, in := &fakeHalf{}, &fakeHalf{}
	out.next = func(bool) (int, int) {
		for i := 0; i < moved; i++ {
			out.countFrame(1)
		}
		return moved, 0
	}
	in.next = func(mayRead bool) (_, got int) {
		for in.dry = false; mayRead && !in.enough(got, 0); got++ {
			if frames == 0 {
				in.dry = true
				break
			}
			frames--
		}
		return 0, got
	}
	l := &Loop{out: out, in: in}
	step := func(arrive int) int {
		frames += arrive
		if _, err := l.step(); err != nil {
			t.Fatal(err)
		}
		return frames
	}
	moved = 1
	step(1) // batches are of one frame
	if left := step(3); left != 2 {
		t.Errorf("%d frames are left by a predicted end after one, of three", left)
	}
	moved = maxPredictOut + 1
	for i := 0; i < 100; i++ {
		if left := step(3); left != 0 {
			t.Fatalf("step %d: %d frames are left beside a batch of %d from the ring", i, left, moved)
		}
	}
}

// A loop without room for a frame does not look on where it will be told of much room: the other side has the work, and may have no processor.
func TestLoopPollBudget(t *testing.T) {
	in := &fakeHalf{}
	l := &Loop{in: in}
	l.busy.budget[sent] = MaxBusyPoll
	l.busy.last = sent
	if d := l.pollBudget(); d != MaxBusyPoll {
		t.Errorf("looks on for %v, not %v", d, MaxBusyPoll)
	}
	l.inDid.starved = true
	if d := l.pollBudget(); d != MaxBusyPoll {
		t.Errorf("looks on for %v, not %v, although it is told of any room", d, MaxBusyPoll)
	}
	in.patient = true
	if d := l.pollBudget(); d != 0 {
		t.Errorf("looks on for %v without room for a frame", d)
	}
	l.busy.set(time.Millisecond)
	if d := l.pollBudget(); d != time.Millisecond {
		t.Errorf("looks on for %v, configured is 1ms", d)
	}
}

// Two pumps of the same direction, or of other interfaces, make no loop.
func TestNewLoopRefuses(t *testing.T) {
	stop, err := NewStop()
	if err != nil {
		t.Fatal(err)
	}
	defer stop.Close()
	half := func(name string, ifc *Iface, reads bool) *fakeHalf {
		return &fakeHalf{common: common{name: name, ifc: ifc, stop: stop, reads: reads}}
	}
	a, b := new(Iface), new(Iface)
	for name, pumps := range map[string][]Pump{
		"none":             {},
		"the same way":     {half("tx0", a, true), half("tx1", a, true)},
		"other interfaces": {half("tx0", a, true), half("rx0", b, false)},
	} {
		if _, err := NewLoop(LoopConfig{}, pumps...); err == nil {
			t.Errorf("%s: no error", name)
		} else {
			t.Logf("%s: %v", name, err)
		}
	}
}

func TestLoopConfigSet(t *testing.T) {
	var c LoopConfig
	for s, want := range map[string]time.Duration{"auto": 0, "50us": 50 * time.Microsecond, "1s": time.Second} {
		if err := c.SetBusyPoll(s); err != nil || c.BusyPoll != want {
			t.Errorf("%s: %v, %v", s, c.BusyPoll, err)
		}
	}
	if err := c.SetBusyPoll("off"); err != nil || c.BusyPoll >= 0 {
		t.Errorf("off: %v, %v", c.BusyPoll, err)
	}
	for _, s := range []string{"", "0", "-1s", "2s", "fast", "50"} {
		if err := c.SetBusyPoll(s); err == nil {
			t.Errorf("%q is taken", s)
		}
	}
	var may unix.CPUSet
	if err := unix.SchedGetaffinity(0, &may); err != nil {
		t.Fatal(err)
	}
	var has, not []int
	for i := 0; i < 1024 && (len(has) < 2 || len(not) < 1); i++ {
		if may.IsSet(i) {
			has = append(has, i)
		} else {
			not = append(not, i)
		}
	}
	if err := c.SetCPU(fmt.Sprint(has[0])); err != nil || !reflect.DeepEqual(c.CPU, has[:1]) {
		t.Errorf("%d: %v, %v", has[0], c.CPU, err)
	}
	if len(has) > 1 && has[1] == has[0]+1 {
		if err := c.SetCPU(fmt.Sprintf("%d-%d", has[0], has[1])); err != nil || !reflect.DeepEqual(c.CPU, has[:2]) {
			t.Errorf("%d-%d: %v, %v", has[0], has[1], c.CPU, err)
		}
		for i := 0; i < 5; i++ {
			if p := c.Pair(i); len(p.CPU) != 1 || p.CPU[0] != has[i%2] {
				t.Errorf("pair %d runs on %v", i, p.CPU)
			}
		}
	}
	for _, s := range []string{"x", "1-", "-1", "1-0", "0,,1", "70000", fmt.Sprint(not[0])} {
		if err := c.SetCPU(s); err == nil {
			t.Errorf("%q is taken: %v", s, c.CPU)
		} else {
			t.Log(err)
		}
	}
	if err := c.SetCPU(""); err != nil || c.CPU != nil {
		t.Errorf("none: %v, %v", c.CPU, err)
	}
}

// A sender without room asks to be woken when most of its frames are through: what it finds before, when the poll fallback wakes it, no
// doorbell was lost for.
func TestLoopRescues(t *testing.T) {
	bell, err := doorbell.NewEventfd()
	if err != nil {
		t.Fatal(err)
	}
	defer bell.Close()
	for _, c := range []struct {
		name       string
		asked      int
		out, in    int  // chains that the step after the sleep takes
		rung       bool // the doorbell ends the sleep
		want, spur uint64
	}{
		{name: "some of what was asked for", asked: 48, in: 47},
		{name: "all of it", asked: 48, in: 48, want: 1},
		{name: "buffers for what the interface has", in: 1, want: 1},
		{name: "nothing"},
		{name: "frames the other way too", asked: 48, out: 1, in: 10, want: 1},
		{name: "early", asked: 48, in: 10, rung: true},
		{name: "for nothing", asked: 48, rung: true, spur: 1},
	} {
		n := new(doorbell.Counters)
		in := &fakeHalf{common: common{starved: true}, asked: c.asked, next: func(bool) (int, int) { return c.in, 0 }}
		out := &fakeHalf{next: func(bool) (int, int) { return c.out, 0 }}
		l := &Loop{out: out, in: in, inDid: result{starved: true}, stats: new(Stats), sleeper: doorbell.NewSleeper(doorbell.SleeperConfig{
			Doorbell: bell, Fallback: doorbell.Fallback{Min: time.Millisecond, Max: time.Millisecond}, Counters: n})}
		if c.rung {
			bell.Ring()
		}
		if err := l.sleep(); err != nil {
			t.Fatal(err)
		}
		if n.Rescued != c.want || n.Spurious != c.spur || n.Sleeps != 1 {
			t.Errorf("%s: %+v, want %d rescued, %d spurious", c.name, *n, c.want, c.spur)
		}
	}
}

// While an engine keeps the frames of one direction, the other goes on: the loop neither waits for the engine where that has something to do,
// nor misses what comes.
func TestLoopWhileFlying(t *testing.T) {
	stop, err := NewStop()
	if err != nil {
		t.Fatal(err)
	}
	defer stop.Close()
	ready, err := doorbell.NewEventfd() // stands for the interface: readable where there are frames
	if err != nil {
		t.Fatal(err)
	}
	defer ready.Close()
	frames, read, awaits := 0, 0, 0
	in := &fakeHalf{}
	in.next = func(mayRead bool) (int, int) {
		if in.dry = true; !mayRead || frames == 0 {
			return 0, 0
		}
		in.dry = false
		frames--
		if read++; read == 11 {
			stop.Raise()
		}
		return 0, 1
	}
	out := &fakeHalf{common: common{flying: true}, next: func(bool) (int, int) { return 0, 0 }}
	out.land = func() int {
		if frames > 0 {
			t.Errorf("wait %d for the engine, with %d frames at the interface", awaits, frames)
		}
		switch awaits++; awaits {
		case 2: // meanwhile frames come
			frames = 10
			ready.Ring()
		case 3:
			if read != 10 {
				t.Errorf("%d frames of 10 were read while the engine has others", read)
			}
			ready.Ack()
		case 4: // it has landed, and has its answer at once
			frames = 1
			out.flying = false
			return 1
		}
		return 0
	}
	l := &Loop{out: out, in: in, stop: stop, stats: new(Stats), sleeper: doorbell.NewSleeper(doorbell.SleeperConfig{
		Stop: stop.Bell(), Extra: ready.FD(), HasExtra: true})}
	if err := l.Run(); err != nil {
		t.Fatal(err)
	}
	if awaits != 4 || read != 11 || l.busy.last != sent {
		t.Errorf("waited %d times, %d frames read, the last occasion is %d", awaits, read, l.busy.last)
	}
}
