package tunbridge

import (
	"fmt"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/boardlink/boardlink/doorbell"
	"golang.org/x/sys/unix"
)

// half is one direction of a queue pair, as its loop sees it. All calls come from the loop's goroutine.
type half interface {
	Pump
	shared() *common
	// begin is called once, before all others; end once, after all others, also where begin failed.
	begin() error
	end()
	// step moves a batch, if there is anything to move: ring is how many chains it took from the ring, iface how many
	// frames from the interface. It reads the interface only where mayRead is set, until common.dry or common.starved is.
	step(mayRead bool) (ring, iface int, err error)
	// arm asks to be notified by the ring if that is what the half waits for, and tells whether there is something to do already. To be
	// undone by disarm.
	arm() (pending bool, err error)
	disarm()
	// await waits a moment for what is flying (common.flying), and returns how many frames have come.
	await() (ring int, err error)
}

// LoopConfig says how a loop waits.
type LoopConfig struct {
	// BusyPoll is how long a loop with nothing to do looks on before it sleeps. 0: as long as has paid off lately, at most
	// MaxBusyPoll, and never where a look is a read across the bus. Negative: not at all. Else: so long, each time.
	BusyPoll time.Duration
	// CPU, if not empty, are the processors to which the loop's thread is locked.
	CPU []int
}

// Pair returns the configuration of the loop of pair i: its processor is the i-th, counting round.
func (c LoopConfig) Pair(i int) LoopConfig {
	if n := len(c.CPU); n > 0 {
		c.CPU = c.CPU[i%n : i%n+1]
	}
	return c
}

// From returns the configuration for a device whose first pair has the n-th processor, counting round.
func (c LoopConfig) From(n int) LoopConfig {
	if len(c.CPU) > 0 {
		n %= len(c.CPU)
		c.CPU = append(append([]int(nil), c.CPU[n:]...), c.CPU[:n]...)
	}
	return c
}

// MaxBusyPoll is the longest time that a loop looks on by itself before it sleeps: about what the two wake-ups of an answer take.
const MaxBusyPoll = 60 * time.Microsecond

// minBusyPoll is where adaption begins, and below which it is not worth the trouble.
const minBusyPoll = 8 * time.Microsecond

// looks is how often the rings are looked at for each look at the descriptors, and each offer of the processor.
const looks = 32

// A read of the interface on suspicion that finds nothing costs missFrames frames moved since, and there may be maxMisses at once.
const (
	missFrames = 24
	maxMisses  = 4
)

// A loop moves the frames of a queue pair, both ways, on one goroutine: what goes out by the interface often has its answer there at
// once, and one thread has to be woken where two had.
//
//	move what the rings and the interface hold, one batch each; nothing: look on for a while;
//	nothing: ask to be notified, look once more, sleep
type loop struct {
	name    string
	stop    *Stop
	sleeper *doorbell.Sleeper
	out     half // ring to interface; may be nil
	in      half // interface to ring; may be nil
	busy    busyPoll
	cpu     []int
	across  bool // a look at a ring is a read across the bus

	ready   bool // the interface may have a frame: poll said so, or the last batch ended before it was dry
	credit  int  // frames moved, of which reads of the interface on suspicion may take
	landed  int  // frames that await wrote
	guess   guess
	outTook int // chains that the last step took from the ring of out, and of in
	inTook  int
	stats   *Stats
}

// NewLoop returns the loop of a queue pair: two pumps of one side, with the same interface and the same Stop, one each way, or one alone. It runs
// them on one goroutine; they are not to be run by themselves.
func NewLoop(c LoopConfig, pumps ...Pump) (Pump, error) {
	l := &loop{cpu: c.CPU}
	l.busy.set(c.BusyPoll)
	for _, p := range pumps {
		h, ok := p.(half)
		if !ok {
			return nil, fmt.Errorf("tunbridge: a loop of %T: it has to be made of pumps", p)
		}
		place := &l.out
		if h.shared().reads {
			place = &l.in
		}
		if *place != nil {
			return nil, fmt.Errorf("tunbridge: %s and %s go the same way", (*place).shared().name, h.shared().name)
		}
		*place = h
	}
	first := l.in
	if l.out != nil {
		first = l.out
	}
	if first == nil {
		return nil, fmt.Errorf("tunbridge: a loop without pumps")
	}
	c1 := first.shared()
	l.name, l.stop, l.across, l.stats = c1.name, c1.stop, c1.across, c1.stats
	var second doorbell.Waiter
	if l.in != nil && l.out != nil {
		c2 := l.in.shared()
		if c2.ifc != c1.ifc || c2.stop != c1.stop {
			return nil, fmt.Errorf("tunbridge: %s and %s are of different interfaces or devices", c1.name, c2.name)
		}
		second = c2.wait
		l.across = l.across || c2.across
	}
	l.sleeper = doorbell.NewSleeper(doorbell.SleeperConfig{Doorbell: c1.wait, Second: second, Stop: c1.stop.Bell(),
		Extra: c1.ifc.FD(), HasExtra: true, ExtraName: c1.ifc.Name(), Fallback: c1.fallback, Counters: c1.bells, Doze: true})
	return l, nil
}

// alone runs one pump by itself.
func alone(h half) error {
	l, err := NewLoop(LoopConfig{}, h)
	if err != nil {
		return err
	}
	return l.Run()
}

// Run implements Pump.
func (l *loop) Run() (err error) {
	defer l.sleeper.Done()
	if len(l.cpu) > 0 {
		// Never unlocked: the thread ends with the goroutine that calls Run, or stays on its processors with it.
		runtime.LockOSThread()
		var set unix.CPUSet
		for _, c := range l.cpu {
			set.Set(c)
		}
		if err := unix.SchedSetaffinity(0, &set); err != nil {
			return fmt.Errorf("%s: run on processors %v: %w", l.name, l.cpu, err)
		}
	}
	for _, h := range [...]half{l.out, l.in} {
		if h == nil {
			continue
		}
		defer h.shared().flush()
		defer h.end()
		if err := h.begin(); err != nil {
			return err
		}
	}
	l.ready = l.in != nil // what came before the loop
	for !l.stop.Raised() {
		ring, iface, err := l.step()
		if err != nil {
			return err
		}
		if ring > 0 || iface > 0 {
			continue
		}
		if l.out != nil && l.out.shared().flying {
			if err := l.await(); err != nil {
				return err
			}
			continue
		}
		if d := l.patience(); d > 0 {
			more, err := l.look(d)
			if err != nil {
				return err
			}
			if more {
				if !l.guess.rest {
					l.busy.found()
				}
				continue
			}
		}
		if err := l.sleep(); err != nil {
			return err
		}
	}
	return nil
}

// poll looks at the descriptors. What the doorbells tell of has to be looked for after it.
func (l *loop) poll() (doorbell.Reason, error) {
	why, err := l.sleeper.Look(l.events())
	if err != nil {
		return 0, fmt.Errorf("%s: wait for a doorbell or a frame: %w", l.name, err)
	}
	l.guess.polled(why&doorbell.Extra != 0)
	if why&doorbell.Extra != 0 {
		l.ready = true
	}
	return why, nil
}

// step moves a batch each way. The ring first: what is written to the interface may have its answer there when that is read.
func (l *loop) step() (ring, iface int, err error) {
	if l.out != nil {
		if ring, _, err = l.out.step(false); err != nil {
			return ring, 0, err
		}
		ring += l.landed
		l.landed = 0
	}
	l.outTook, l.inTook = ring, 0
	if l.in == nil {
		if ring > 0 {
			l.busy.last = received
		}
		return ring, 0, nil
	}
	// Without knowing of a frame the interface is read after frames went out by it: their answers are often there. Not much more often
	// than that is so: a read that finds nothing is a system call, and the poll before a sleep tells as well.
	suspect := !l.ready && ring > 0 && l.credit >= 0
	in := l.in.shared()
	in.want = l.guess.next()
	out := 0 // frames: a frame may take many chains
	if l.out != nil {
		out, l.out.shared().moved = l.out.shared().moved, 0
	}
	if out > guessOut {
		in.want = 0 // the ring keeps the loop from the poll: what is left would wait, batch after batch
	}
	r, f, err := l.in.step(l.ready || suspect)
	l.inTook = r
	if err != nil {
		return ring + r, f, err
	}
	if l.ready || suspect {
		if suspect && f == 0 && in.dry {
			l.credit -= missFrames
		}
		// Unread for want of buffers: as soon as there are some.
		l.ready = !l.guess.read(f, in) && !in.dry
	}
	if l.credit += out + f; l.credit > (maxMisses-1)*missFrames {
		l.credit = (maxMisses - 1) * missFrames
	}
	switch {
	case f > 0:
		l.busy.last = sent
	case ring > 0:
		l.busy.last = received
	}
	return ring + r, f, nil
}

// await waits a moment for the frames that a DMA engine moves. Where that takes longer, the other direction does not wait for it: an
// engine may be stuck until its transfer is aborted.
func (l *loop) await() (err error) {
	if !l.guess.ended { // with a frame left, perhaps, there is no time to wait
		if l.landed, err = l.out.await(); err != nil || l.landed > 0 {
			return err
		}
	}
	_, err = l.poll()
	return err
}

// events are what the loop waits for at the interface: nothing while there is no room for a frame.
func (l *loop) events() int16 {
	if l.in == nil || l.in.shared().starved {
		return 0
	}
	return doorbell.In
}

// A guess is where a batch from the interface ends. To know takes a read that finds nothing: where batches are small, as those of
// super-packets are, nearly half of all reads. So a batch ends where the last ones did, and what is left tells by the poll that
// comes before any sleep; every so often, and soon where that poll finds some left, it goes on until it is known.
type guess struct {
	size  int  // frames of the last batch that was read until nothing was found
	done  int  // frames of this batch, which is read in several steps
	run   int  // batches since, ended by guess; from maxRun on it has to be known
	ended bool // the last batch did, and the descriptors have not been polled since
	rest  bool // this batch is what it left
}

const (
	maxGuess = 16 // frames; one read more does not matter in larger batches
	maxRun   = 16
	guessOut = 4 // frames: beside larger batches from the ring there is no guess
	leftRun  = 4 // what a batch that left some counts for
)

// next returns how many frames are to be read now, 0 for all.
func (g *guess) next() int {
	if g.size >= maxGuess || g.run >= maxRun {
		return 0
	}
	return g.size
}

// read notes that f frames were read, and tells whether that is likely all.
func (g *guess) read(f int, in *common) bool {
	g.ended = in.want > 0 && f == in.want
	switch g.done += f; {
	case g.ended:
		g.run++
		g.done, g.rest = 0, false
	case in.dry && g.done > 0:
		if !g.rest || g.done > g.size {
			g.size = g.done
		}
		g.done, g.run, g.rest = 0, 0, false
	}
	return g.ended
}

// polled notes that the descriptors were polled, and whether there are frames.
func (g *guess) polled(more bool) {
	if g.rest = g.ended && more; g.rest {
		g.run += leftRun
	}
	g.ended = false
}

// patience returns how long to look on now. Not at all where there is no room for a frame, and the other side rings once it has made much: it
// has the work of a whole ring, and may need this processor for it.
func (l *loop) patience() time.Duration {
	if l.busy.fixed == 0 && l.in != nil && l.in.shared().starved && l.in.shared().patient {
		return 0
	}
	return l.busy.next(l.across)
}

// look stays awake for d, until there is something to do.
//
// It offers the processor to whoever waits for it, at first and every so often: the kernel likes to put both ends, and who waits for
// their answer, on one processor, and then this is whom to wait for.
func (l *loop) look(d time.Duration) (bool, error) {
	end := time.Now().Add(d)
	for i := 0; !l.stop.Raised(); i++ {
		offer := i%looks == 0
		if offer && !l.guess.ended {
			// Raw: the call does not block, and the scheduler of Go has nothing to do meanwhile.
			unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
		}
		if !l.across || offer {
			ring, iface, err := l.step()
			if err != nil || ring > 0 || iface > 0 {
				return true, err
			}
		}
		if !offer {
			continue
		}
		l.stats.looked()
		why, err := l.poll()
		if err != nil {
			return false, err
		}
		if why&doorbell.Extra != 0 {
			return true, nil
		}
		if !time.Now().Before(end) {
			return false, nil
		}
	}
	return true, nil
}

// sleep asks to be notified, looks once more, and sleeps until the doorbell rings, the interface has a frame, the fallback polls,
// or Stop is raised.
func (l *loop) sleep() error {
	armed, starved := true, l.in != nil && l.in.shared().starved
	var why doorbell.Reason
	for _, h := range [...]half{l.out, l.in} {
		if h == nil {
			continue
		}
		pending, err := h.arm()
		if err != nil {
			return err
		}
		if pending {
			armed = false
			break
		}
	}
	if armed {
		for _, h := range [...]half{l.out, l.in} {
			if h != nil {
				h.shared().flush()
			}
		}
		start := time.Now()
		var err error
		if why, err = l.sleeper.Sleep(l.events()); err != nil {
			return fmt.Errorf("%s: wait for a doorbell or a frame: %w", l.name, err)
		}
		l.guess.polled(why&doorbell.Extra != 0)
		if !l.guess.rest { // with a frame left it was no sleep
			l.busy.slept(time.Since(start), why&doorbell.Timeout == 0)
		}
		l.stats.slept()
		if why&doorbell.Extra != 0 {
			l.ready = true
		}
	}
	for _, h := range [...]half{l.out, l.in} {
		if h != nil {
			h.disarm()
		}
	}
	if !armed {
		return nil
	}
	_, _, err := l.step()
	// What nobody was to ring for is no work that a doorbell stands for.
	switch {
	case !starved || l.inTook == 0 || l.outTook > 0:
		l.sleeper.Found(l.outTook > 0)
	case why&doorbell.Timeout == 0 || l.inTook >= l.in.shared().asked:
		l.sleeper.Found(true)
	default:
		// Some of the chains, and not yet as many as the doorbell was asked for: nothing was lost, and there is no reason to sleep
		// longer or shorter.
	}
	return err
}

// What a loop has done last decides what comes next: an answer comes soon, a question at any time.
const (
	received = iota // frames from the ring went to the interface, and nothing came back
	sent            // frames from the interface went to the ring
	occasions
)

// busyPoll adapts how long a loop looks on before it sleeps, for each occasion by itself: longer where sleeps have been
// shorter than it may look on, shorter where they were longer. That is how Linux polls before it halts (haltpoll). Where looking on as long
// as may be is in vain and a short sleep is not, the other side has no processor while this one looks: then not at all, for a while.
type busyPoll struct {
	fixed time.Duration // as configured; 0 adapts
	cur   [occasions]time.Duration
	vain  [occasions]int // looks of MaxBusyPoll, one after the other, that found nothing
	rest  [occasions]int // sleeps until the next try
	last  int            // occasion
}

// maxVain and restSleeps: so many long looks in vain, and then so many sleeps without.
const (
	maxVain    = 3
	restSleeps = 100
)

func (b *busyPoll) set(d time.Duration) { b.fixed = d }

// next returns how long to look on now.
func (b *busyPoll) next(across bool) time.Duration {
	if b.fixed != 0 {
		return b.fixed // negative: not at all
	}
	if across {
		return 0
	}
	return b.cur[b.last]
}

// found notes that there was something to do while the loop looked on.
func (b *busyPoll) found() { b.vain[b.last] = 0 }

// slept notes a sleep, which followed upon a look in vain if next was not 0, and whether something ended it.
func (b *busyPoll) slept(d time.Duration, woken bool) {
	c, short := &b.cur[b.last], woken && d < MaxBusyPoll
	switch {
	case b.rest[b.last] > 0:
		b.rest[b.last]--
	case short && *c == MaxBusyPoll:
		if b.vain[b.last]++; b.vain[b.last] == maxVain {
			*c, b.vain[b.last], b.rest[b.last] = 0, 0, restSleeps
		}
	case short:
		if *c *= 2; *c < minBusyPoll {
			*c = minBusyPoll
		}
		if *c > MaxBusyPoll {
			*c = MaxBusyPoll
		}
	default:
		if *c /= 2; *c < minBusyPoll {
			*c = 0
		}
	}
}

// SetBusyPoll sets BusyPoll from what an operator writes: "auto", "off", or a duration of at most a second. Errors are the operator's.
func (c *LoopConfig) SetBusyPoll(s string) error {
	switch s {
	case "auto":
		c.BusyPoll = 0
		return nil
	case "off":
		c.BusyPoll = -1
		return nil
	}
	d, err := time.ParseDuration(s)
	if err != nil || d <= 0 || d > time.Second {
		return fmt.Errorf("%q is no time to poll before a sleep: auto, off, or up to 1s, e.g. 50us", s)
	}
	c.BusyPoll = d
	return nil
}

// SetCPU sets CPU from a list as "0,2-3" (or "", none). The processors have to be those that this program may run on. Errors are the
// operator's.
func (c *LoopConfig) SetCPU(s string) error {
	c.CPU = nil
	if s == "" {
		return nil
	}
	var may unix.CPUSet
	if err := unix.SchedGetaffinity(0, &may); err != nil {
		return fmt.Errorf("which processors this program may run on: %w", err)
	}
	for _, part := range strings.Split(s, ",") {
		first, last := part, part
		if i := strings.IndexByte(part, '-'); i >= 0 {
			first, last = part[:i], part[i+1:]
		}
		a, err1 := strconv.ParseUint(first, 10, 16)
		b, err2 := strconv.ParseUint(last, 10, 16)
		if err1 != nil || err2 != nil || a > b {
			return fmt.Errorf("%q is no list of processors: e.g. 1, 0,2 or 4-7", s)
		}
		for ; a <= b; a++ {
			if !may.IsSet(int(a)) {
				return fmt.Errorf("this program may not run on processor %d (it has %d)", a, may.Count())
			}
			c.CPU = append(c.CPU, int(a))
		}
	}
	return nil
}
