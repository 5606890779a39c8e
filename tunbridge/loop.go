package tunbridge

import (
	"errors"
	"fmt"
	"runtime"
	"time"

	"github.com/boardlink/boardlink/doorbell"
	"golang.org/x/sys/unix"
)

// half is one direction of a queue pair, as its loop sees it. All calls come from the loop's goroutine.
type half interface {
	Pump
	shared() *common
	// begin is called before all others, and again after ground.
	begin() error
	// ground ends a batch for good, also after an error and before begin: what was done is completed, the rest given back to the ring,
	// nothing is in flight, and no memory of the peer is remembered.
	ground()
	// step moves a batch, if there is anything to move.
	step(turn) (result, error)
	// arm asks to be notified by the ring if that is what the half waits for. To be undone by disarm.
	arm() (arming, error)
	disarm()
	// await waits a moment for what is flying.
	await() (result, error)
}

// turn is what a loop lets a half do in one step.
type turn struct {
	read bool // the interface, which is not read else, unless the last result was starved
	want int  // how many frames to read; 0: as many as a batch may have
}

// result is what a half did in one step, and what it waits for.
type result struct {
	ring    int  // chains that it took from the ring
	frames  int  // that it read from the interface, or wrote to it
	dry     bool // the last read found nothing
	starved bool // there is no room for a frame: the interface is not read
	flying  bool // an engine has frames on their way to this side, and nothing is to do but to wait for them
}

// arming is what became of the wish to be notified.
type arming struct {
	pending bool // there is something to do already
	asked   int  // where the half is starved: how many chains the ring is to notify of
}

// yieldPeriod is how many polls of the rings go with one poll of the descriptors and one yield of the processor.
const yieldPeriod = 32

// A Loop moves the frames of a queue pair, both ways, on one goroutine: what goes out by the interface often has
// its answer there at once, so that one thread wakes up instead of two.
//
// Its policies are types of their own, each with a switch in LoopConfig.Off: busyPoll, speculative, batchEnd, and
// dozing (package doorbell).
//
//	move what the rings and the interface hold, one batch each; nothing: busy-poll for a budget;
//	nothing: arm the notifications, check once more, sleep
type Loop struct {
	name    string
	stop    *Stop
	box     *mailbox // nil: the pumps stay, and stop ends the loop
	ifc     *Iface
	sleeper *doorbell.Sleeper
	out     half // ring to interface; may be nil
	in      half // interface to ring; may be nil
	busy    busyPoll
	cpu     []int
	across  bool // to check a ring is a read across the bus

	ready  bool // the interface may have a frame: poll said so, or the last batch ended before it was drained
	spec   speculative
	landed result // of await, for the next step
	end    batchEnd
	outDid result // in the last step
	inDid  result
	stats  *Stats
}

// NewLoop returns the loop of a queue pair whose pumps stay: two of one side, with the same interface and the same Stop, one each way, or one alone. It runs
// them on one goroutine; they are not to be run by themselves.
func NewLoop(c LoopConfig, pumps ...Pump) (Pump, error) {
	l := newLoop(c)
	for _, p := range pumps {
		h, ok := p.(half)
		if !ok {
			return nil, fmt.Errorf("tunbridge: a loop of %T: it has to be made of pumps", p)
		}
		c := h.shared()
		if l.ifc != nil && (c.ifc != l.ifc || c.stop != l.stop) {
			return nil, fmt.Errorf("tunbridge: %s and %s are of different interfaces or devices", l.name, c.name)
		}
		l.name, l.stop, l.ifc = c.name, c.stop, c.ifc
		if err := l.put(h); err != nil {
			return nil, err
		}
	}
	if l.first() == nil {
		return nil, fmt.Errorf("tunbridge: a loop without pumps")
	}
	c1 := l.first().shared()
	l.name = c1.name
	l.makeSleeper(c1.fallback, c)
	l.wire()
	return l, nil
}

func newLoop(c LoopConfig) *Loop {
	l := &Loop{cpu: c.CPU}
	l.busy.set(c.BusyPoll)
	l.spec.off, l.end.off = c.Off&SpeculativeReads != 0, c.Off&BatchEnds != 0
	return l
}

// put gives a half its place.
func (l *Loop) put(h half) error {
	place := &l.out
	if h.shared().reads {
		place = &l.in
	}
	if *place != nil {
		return fmt.Errorf("tunbridge: %s and %s go the same way", (*place).shared().name, h.shared().name)
	}
	*place = h
	return nil
}

// first returns the half whose counters are those of the loop, nil where there is none.
func (l *Loop) first() half {
	if l.out != nil {
		return l.out
	}
	return l.in
}

// makeSleeper makes the loop able to sleep; wire gives it doorbells.
func (l *Loop) makeSleeper(f doorbell.Fallback, c LoopConfig) {
	l.sleeper = doorbell.NewSleeper(doorbell.SleeperConfig{Stop: l.stop.Bell(), Extra: l.ifc.FD(), HasExtra: true, ExtraName: l.ifc.Name(),
		Fallback: f, Doze: c.Off&Dozing == 0})
}

// wire makes doorbells and counters those of the halves that are there.
func (l *Loop) wire() {
	first := l.first()
	if first == nil {
		return
	}
	c1 := first.shared()
	l.stats, l.across = c1.stats, c1.across
	var second doorbell.Waiter
	if l.out != nil && l.in != nil {
		c2 := l.in.shared()
		second, l.across = c2.wait, l.across || c2.across
		if second == nil {
			second = doorbell.None
		}
	}
	l.sleeper.Replace(c1.wait, second, c1.bells)
}

// alone runs one pump by itself.
func alone(h half) error {
	l, err := NewLoop(LoopConfig{}, h)
	if err != nil {
		return err
	}
	return l.Run()
}

// Run implements Pump, for a loop of NewLoop.
func (l *Loop) Run() error {
	if err := l.pin(); err != nil {
		return err
	}
	return l.run()
}

// pin puts the goroutine on the loop's processors, if it has some. It is never unlocked: the thread ends with the goroutine, or stays on
// its processors with it.
func (l *Loop) pin() error {
	if len(l.cpu) == 0 {
		return nil
	}
	runtime.LockOSThread()
	var set unix.CPUSet
	for _, c := range l.cpu {
		set.Set(c)
	}
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		return fmt.Errorf("%s: run on processors %v: %w", l.name, l.cpu, err)
	}
	return nil
}

// run moves frames until Stop is raised or, with a mailbox, no pump is left.
func (l *Loop) run() (err error) {
	defer l.sleeper.Done()
	defer l.ground()
	if err := l.begin(); err != nil {
		return err
	}
	for {
		if l.stop.Raised() {
			if !l.attend() {
				return nil
			}
			if err := l.begin(); err != nil {
				return err
			}
			continue
		}
		if l.first() == nil {
			return nil
		}
		moved, err := l.step()
		if err != nil {
			return err
		}
		if moved || l.first() == nil {
			continue
		}
		if l.outDid.flying {
			if err := l.await(); err != nil {
				return err
			}
			continue
		}
		if d := l.pollBudget(); d > 0 {
			more, err := l.pollBusily(d)
			if err != nil {
				return err
			}
			if more {
				if !l.end.rest {
					l.busy.found()
				}
				continue
			}
		}
		if err := l.sleep(); err != nil {
			return err
		}
	}
}

// begin begins, or goes on after ground.
func (l *Loop) begin() error {
	for _, h := range [...]half{l.out, l.in} {
		if h == nil {
			continue
		}
		if err := h.begin(); err != nil {
			if err = l.broke(h, err); err != nil {
				return err
			}
		}
	}
	l.ready = l.in != nil // what came before
	l.landed, l.outDid, l.inDid = result{}, result{}, result{}
	l.end.polled(false)
	return nil
}

// poll looks at the descriptors. What the doorbells tell of has to be looked for after it.
func (l *Loop) poll() (doorbell.Reason, error) {
	why, err := l.sleeper.Look(l.events())
	if err != nil {
		return 0, l.cannotWait(err)
	}
	l.end.polled(why&doorbell.Extra != 0)
	if why&doorbell.Extra != 0 {
		l.ready = true
	}
	return why, nil
}

// cannotWait explains why the descriptors cannot be waited for. A tun descriptor reports POLLERR once its interface
// is removed.
func (l *Loop) cannotWait(err error) error {
	var fe *doorbell.FDError
	if errors.As(err, &fe) && fe.FD == l.ifc.FD() && fe.Revents&unix.POLLERR != 0 {
		return fmt.Errorf("%s: wait for a frame from %s: %w", l.name, l.ifc.Name(), ErrGone)
	}
	return fmt.Errorf("%s: wait for a doorbell or a frame: %w", l.name, err)
}

// step moves a batch each way, and tells whether anything moved. The ring first: what is written to the interface may have its
// answer there when that is read.
func (l *Loop) step() (moved bool, err error) {
	var out, in result
	if l.out != nil {
		if out, err = l.out.step(turn{}); err != nil {
			if err = l.broke(l.out, err); err != nil {
				return false, err
			}
			out.flying = false
		}
		out.ring, out.frames = out.ring+l.landed.ring, out.frames+l.landed.frames
		l.landed = result{}
	}
	if l.in != nil {
		if in, err = l.read(&out); err != nil {
			err = l.broke(l.in, err)
		}
	}
	switch {
	case in.frames > 0:
		l.busy.last = sent
	case out.ring > 0:
		l.busy.last = received
	}
	l.outDid, l.inDid = out, in
	return out.ring > 0 || in.ring > 0 || in.frames > 0, err
}

// read lets the half that reads the interface take its turn, after the other one did out.
func (l *Loop) read(out *result) (result, error) {
	speculate := !l.ready && out.ring > 0 && l.spec.allowed()
	t := turn{read: l.ready || speculate, want: l.end.next()}
	if out.frames > maxPredictOut { // a frame may take many chains
		t.want = 0 // the ring keeps the loop from polling: frames that are left would wait, batch after batch
	}
	in, err := l.in.step(t)
	if err != nil {
		return in, err
	}
	if t.read {
		if speculate && in.frames == 0 && in.dry {
			l.spec.missed()
		}
		// Left unread for lack of buffers: it is read as soon as there are some.
		l.ready = !l.end.read(t.want, in) && !in.dry
	}
	l.spec.earned(out.frames + in.frames)
	return in, nil
}

// await waits a moment for the frames that a DMA engine moves. Where that takes longer, the other direction does not wait for it: an
// engine may be stuck until its transfer is aborted.
func (l *Loop) await() (err error) {
	if !l.end.predicted { // a frame that may have been left must not wait
		if l.landed, err = l.out.await(); err != nil {
			return l.broke(l.out, err)
		}
		if l.landed.ring > 0 {
			return nil
		}
	}
	_, err = l.poll()
	return err
}

// events are what the loop waits for at the interface: nothing while there is no room for a frame.
func (l *Loop) events() int16 {
	if l.in == nil || l.inDid.starved || l.in.shared().muted {
		return 0
	}
	return doorbell.In
}

// pollBudget returns how long to busy-poll now. Not at all where there is no room for a frame and the other side
// rings once it has made much: it has the work of a whole ring, and may need this processor for it.
func (l *Loop) pollBudget() time.Duration {
	if l.busy.fixed == 0 && l.in != nil && l.inDid.starved && l.in.shared().patient {
		return 0
	}
	return l.busy.next(l.across)
}

// pollBusily stays awake for d, or until there is work, which it tells.
//
// It yields the processor first and once every yieldPeriod polls: the kernel often places both ends, and the
// process that waits for their answer, on one processor.
func (l *Loop) pollBusily(d time.Duration) (bool, error) {
	end := time.Now().Add(d)
	for i := 0; !l.stop.Raised(); i++ {
		yield := i%yieldPeriod == 0
		if yield && !l.end.predicted {
			// Raw: the call does not block, and the scheduler of Go has nothing to do meanwhile.
			unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
		}
		if !l.across || yield {
			if moved, err := l.step(); err != nil || moved {
				return true, err
			}
		}
		if !yield {
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
func (l *Loop) sleep() error {
	if l.first() == nil {
		return nil
	}
	armed, starved, asked := true, l.inDid.starved, 0
	var why doorbell.Reason
	for _, h := range [...]half{l.out, l.in} {
		if h == nil {
			continue
		}
		a, err := h.arm()
		if err != nil {
			return l.broke(h, err) // the other one's notification is armed: that costs a doorbell at most
		}
		if a.pending {
			armed = false
			break
		}
		if h == l.in {
			asked = a.asked
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
			return l.cannotWait(err)
		}
		l.end.polled(why&doorbell.Extra != 0)
		if !l.end.rest { // with a frame left it was no sleep
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
	_, err := l.step()
	// What nobody was to ring for is no work that a doorbell stands for.
	switch {
	case !starved || l.inDid.ring == 0 || l.outDid.ring > 0:
		l.sleeper.Found(l.outDid.ring > 0)
	case why&doorbell.Timeout == 0 || l.inDid.ring >= asked:
		l.sleeper.Found(true)
	default:
		// Some of the chains, and not yet as many as the doorbell was asked for: nothing was lost, and there is no reason to sleep
		// longer or shorter.
	}
	return err
}
