// Package plain serves the virtqueues of device models that need no great speed: each queue has a goroutine, which calls the
// model until there is nothing to do, and sleeps.
//
// It must not know what a device is for, nor what sets its queues up.
package plain

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/pci"
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/vring"
)

// Features are what all queues of a Set can do; besides them a model may offer virtio.RingPacked.
var Features = virtio.FeaturesOf(virtio.Version1, virtio.EventIdx, virtio.IndirectDesc)

// Model is what a device model does with its queues.
type Model interface {
	// Serve moves what it can at queue w.Index(), on the queue's goroutine. It does not block, takes a bounded part of what
	// there is, and says when it is to be called again. Each chain that it pops is settled when it returns, or handed over
	// with Worker.Later. An error ends the queue.
	Serve(w *Worker) (Next, error)
}

// Next says when Serve is to be called again; a positive one is a pause in nanoseconds, which only Wake ends earlier.
type Next time.Duration

const (
	// Again: at once, as there may be more to do.
	Again Next = 0
	// OnKick: when the driver has made buffers available.
	OnKick Next = -1
	// OnWake: when Wake is called.
	OnWake Next = -2
)

// Set is the queues of a device model, and implements their part of device.Device.
type Set struct {
	name  string
	model Model
	info  func(i int) device.QueueInfo
	doze  bool

	running bool
	inOrder bool // chains that are finished later are completed in the order in which they were popped
	acked   virtio.Features

	mu      sync.Mutex // guards what Status and Wake read
	queues  []queue
	notify  func(device.Event)
	starts  uint64
	broken  uint64
	lastErr error
}

type queue struct {
	w       *Worker // nil: the queue is not started
	enabled bool
	bells   *doorbell.Counters
	bus     *dma.QueueAccount
}

// New returns a Set of n queues. info describes one, as device.Device.Queue does.
func New(name string, n int, info func(i int) device.QueueInfo, m Model) *Set {
	s := &Set{name: name, model: m, info: info, queues: make([]queue, n), notify: func(device.Event) {}}
	for i := range s.queues {
		s.queues[i].bells, s.queues[i].bus = new(doorbell.Counters), new(dma.QueueAccount)
	}
	return s
}

// Doze has the queues' goroutines keep their places in Go's scheduler for a moment after work (doorbell.SleeperConfig.Doze). It is
// called before the first queue starts.
func (s *Set) Doze() { s.doze = true }

// Queues implements device.Device.
func (s *Set) Queues() int { return len(s.queues) }

// Notify implements device.Device.
func (s *Set) Notify(f func(device.Event)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.notify = f
}

// Tell tells the control plane that the configuration changed.
func (s *Set) Tell() {
	s.mu.Lock()
	f := s.notify
	s.mu.Unlock()
	f(device.Event{Queue: -1})
}

// Accept takes the features that the driver accepted, all of which were offered; else there is an error.
func (s *Set) Accept(accepted, offered virtio.Features) error {
	if bad := accepted.Without(offered); bad != (virtio.Features{}) {
		return fmt.Errorf("%s: the driver accepts features that were not offered: %s", s.name, bad)
	}
	if !accepted.Has(virtio.Version1) {
		return fmt.Errorf("%s: the driver does not accept version_1: only virtio 1.x drivers can use the device", s.name)
	}
	s.mu.Lock()
	s.acked = accepted
	s.mu.Unlock()
	return nil
}

// Accepted returns the features that the driver accepted, none before it did.
func (s *Set) Accepted() virtio.Features {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.acked
}

// InOrder says whether chains that are finished later are completed in the order in which they were popped (device.Options). It is
// called before queues are started.
func (s *Set) InOrder(on bool) { s.inOrder = on }

// find returns queue i, which is started or not as the caller needs it.
func (s *Set) find(i int, started bool) (*queue, error) {
	if i < 0 || i >= len(s.queues) || s.info(i).Max == 0 {
		return nil, fmt.Errorf("%s: there is no queue %d", s.name, i)
	}
	q := &s.queues[i]
	switch {
	case started && q.w == nil:
		return nil, fmt.Errorf("%s: %w", s.info(i).Name, device.ErrStopped)
	case !started && q.w != nil:
		return nil, fmt.Errorf("%s: %w", s.info(i).Name, device.ErrStarted)
	}
	return q, nil
}

// StartQueue implements device.Device.
func (s *Set) StartQueue(i int, r device.Resources, st vring.State) error {
	q, err := s.find(i, false)
	if err != nil {
		return err
	}
	w := &Worker{set: s, index: i, res: r, enabled: q.enabled, bells: q.bells, bus: q.bus, wake: make(chan struct{}, 1)}
	if r.Account != nil {
		w.bus = r.Account
	}
	if err := w.open(st); err != nil {
		return err
	}
	s.mu.Lock()
	q.w = w
	s.mu.Unlock()
	if s.running {
		return w.start()
	}
	return nil
}

// EnableQueue implements device.Device.
func (s *Set) EnableQueue(i int, on bool, deadline time.Time) error {
	if i < 0 || i >= len(s.queues) {
		return fmt.Errorf("%s: there is no queue %d", s.name, i)
	}
	q := &s.queues[i]
	if q.w == nil {
		q.enabled = on
		return nil
	}
	return s.change(q, deadline, func() error {
		q.enabled, q.w.enabled = on, on
		return nil
	})
}

// ChangeQueue implements device.Device.
func (s *Set) ChangeQueue(i int, c device.Change, deadline time.Time) error {
	q, err := s.find(i, true)
	if err != nil {
		return err
	}
	return s.change(q, deadline, func() error {
		w := q.w
		if c.Kick != nil {
			w.res.Kick = c.Kick
		}
		if c.Call != nil {
			w.res.Call = c.Call
		}
		if c.Log != nil {
			w.res.Log = *c.Log
			w.ring.SetLog(w.res.Log)
		}
		if c.Areas == nil {
			return nil
		}
		w.res.Areas = *c.Areas
		return w.open(w.ring.State())
	})
}

// change lets a started queue rest, calls f, and lets it move again if it did.
func (s *Set) change(q *queue, deadline time.Time, f func() error) error {
	if err := q.w.rest(deadline); err != nil {
		return err
	}
	if err := f(); err != nil {
		return err
	}
	if s.running {
		return q.w.start()
	}
	return nil
}

// StopQueue implements device.Device.
func (s *Set) StopQueue(i int, deadline time.Time) (device.Stopped, error) {
	q, err := s.find(i, true)
	if err != nil {
		return device.Stopped{}, err
	}
	if err := q.w.rest(deadline); err != nil {
		return device.Stopped{}, err
	}
	// What Serve settles it completes in the order of the ring, and what was handed over is completed: what an error left popped
	// is simply not popped.
	st := device.Stopped{State: q.w.ring.State().Rewound(), Err: q.w.err}
	s.mu.Lock()
	q.w = nil
	s.mu.Unlock()
	return st, nil
}

// SetRunning implements device.Device.
func (s *Set) SetRunning(on bool, deadline time.Time) error {
	s.running = on
	any := false
	for i := range s.queues {
		w := s.queues[i].w
		if w == nil {
			continue
		}
		any = true
		f := w.start
		if !on {
			f = func() error { return w.rest(deadline) }
		}
		if err := f(); err != nil {
			return err
		}
	}
	if on && !any {
		s.running = false
		return fmt.Errorf("%s: DRIVER_OK without a queue", s.name)
	}
	if on {
		s.mu.Lock()
		s.starts++
		s.lastErr = nil
		s.mu.Unlock()
	}
	return nil
}

// Reset implements device.Device.
func (s *Set) Reset(deadline time.Time) error {
	for i := range s.queues {
		if w := s.queues[i].w; w != nil {
			if err := w.rest(deadline); err != nil {
				return err
			}
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.running, s.acked = false, virtio.Features{}
	for i := range s.queues {
		s.queues[i].w, s.queues[i].enabled = nil, false
	}
	return nil
}

// Wake has Serve called for queue i, if it moves. Any goroutine may call it.
func (s *Set) Wake(i int) {
	s.mu.Lock()
	w := s.queues[i].w
	s.mu.Unlock()
	if w == nil {
		return
	}
	select {
	case w.wake <- struct{}{}:
	default: // it will look anyway
	}
}

// ended notes why a queue has ended by itself.
func (s *Set) ended(w *Worker) {
	s.mu.Lock()
	s.broken++
	s.lastErr = w.err
	f := s.notify
	s.mu.Unlock()
	f(device.Event{Broken: w.err, Queue: w.index})
}

// Describe adds the queues, features and counters to the status of the device.
func (s *Set) Describe(d *status.Device) {
	var names []string // before mu is taken, which info may need
	for i := range s.queues {
		names = append(names, s.info(i).Name)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	d.Negotiated = s.acked.Names()
	if d.Counters == nil {
		d.Counters = map[string]uint64{}
	}
	d.Counters["starts"], d.Counters["broken"] = s.starts, s.broken
	if s.lastErr != nil {
		d.LastError = s.lastErr.Error()
	}
	for i := range s.queues {
		q := &s.queues[i]
		qs := status.Queue{Index: i, Name: names[i], Doorbell: status.Counters(q.bells.Snapshot())}
		chains := uint64(0)
		if w := q.w; w != nil {
			st := w.ring.State()
			n := w.ring.Stats().Load()
			qs.Ready, qs.Size, qs.Avail, qs.Used, qs.Ring = true, w.res.Size, st.Avail, st.Used, status.Counters(n)
			chains = n.Done
		}
		q.bus.Describe(&qs, chains)
		d.Queues = append(d.Queues, qs)
	}
}

// Worker is a started queue. Its exported methods are for Model.Serve.
type Worker struct {
	set     *Set
	index   int
	res     device.Resources
	enabled bool
	bells   *doorbell.Counters
	bus     *dma.QueueAccount

	batch vring.Batch
	out   int // chains popped, and neither completed, given back, nor handed over
	sleep *doorbell.Sleeper
	wake  chan struct{}

	stop *doorbell.Eventfd // nil: the queue does not move
	quit chan struct{}     // closed when it is to rest
	done chan struct{}     // closed when it rests
	told bool              // quit is closed
	err  error             // what ended it; read when done is closed

	mu     sync.Mutex   // guards what follows
	ring   vring.Device // and its use; set while the queue rests
	one    [1]vring.Used
	line   line
	later  int           // chains handed over, and not finished
	failed error         // by Fail
	empty  chan struct{} // closed when later falls to 0; nil: nobody waits for that
}

// open makes the device side of the queue.
func (w *Worker) open(st vring.State) error {
	a, f := w.res.Areas, w.set.acked
	c := vring.Config{Name: w.set.info(w.index).Name, Size: w.res.Size,
		Desc: a.Desc.Accounted(&w.bus.Descriptor), Driver: a.Driver.Accounted(&w.bus.Driver), Device: a.Device.Accounted(&w.bus.Device),
		Table: w.res.Table.Accounted(&w.bus.Payload), State: st, EventIdx: f.Has(virtio.EventIdx), Indirect: f.Has(virtio.IndirectDesc), Log: w.res.Log, Journal: w.res.Journal}
	ring, err := newRing(c, f.Has(virtio.RingPacked))
	if err != nil {
		return err
	}
	w.set.mu.Lock()
	w.ring = ring
	w.set.mu.Unlock()
	return nil
}

// newRing makes the device side of a queue of the negotiated kind.
func newRing(c vring.Config, packed bool) (vring.Device, error) {
	if packed {
		return vring.NewPackedDevice(c)
	}
	return vring.NewSplitDevice(c)
}

// start lets the queue move.
func (w *Worker) start() (err error) {
	if w.stop != nil && w.told {
		return fmt.Errorf("%s: %w", w.set.info(w.index).Name, device.ErrStuck) // it was to rest, and does not yet
	}
	if w.stop != nil || w.err != nil {
		return nil
	}
	if w.stop, err = doorbell.NewEventfd(); err != nil {
		return err
	}
	w.quit, w.done, w.told = make(chan struct{}), make(chan struct{}), false
	w.sleep = doorbell.NewSleeper(doorbell.SleeperConfig{Doorbell: w.res.Kick, Stop: w.stop, Counters: w.bells, Doze: w.set.doze})
	go w.run()
	return nil
}

// rest waits until the queue does not move any more.
func (w *Worker) rest(deadline time.Time) error {
	if w.stop == nil {
		return nil
	}
	if !w.told {
		w.told = true
		close(w.quit)
		w.stop.Ring() // cannot fail: it is this program's alone
	}
	if deadline.IsZero() {
		<-w.done
	} else {
		t := time.NewTimer(time.Until(deadline))
		defer t.Stop()
		select {
		case <-w.done:
		case <-t.C:
			return fmt.Errorf("%s: %w", w.set.info(w.index).Name, device.ErrStuck)
		}
	}
	err := w.stop.Close()
	w.stop = nil
	return err
}

func (w *Worker) run() {
	defer close(w.done)
	var err error
	defer w.sleep.Done()
	if fault := pci.Guard(func() { err = w.loop() }); fault != nil {
		err = fault
	}
	w.end(err)
	w.end(w.failure())
	w.drain()
	w.end(w.failure())
}

// end notes an error that ends the queue, the first one, and tells of it.
func (w *Worker) end(err error) {
	if err == nil || w.err != nil {
		return
	}
	if errors.Is(err, pci.ErrGone) {
		err = &device.Error{Cause: device.CauseMemory, Err: err}
	}
	w.err = err
	w.set.ended(w)
}

// drain waits until all chains that were handed over are finished.
func (w *Worker) drain() {
	w.mu.Lock()
	if w.later == 0 {
		w.mu.Unlock()
		return
	}
	empty := make(chan struct{})
	w.empty = empty
	w.mu.Unlock()
	<-empty
}

// failure returns the error of Fail.
func (w *Worker) failure() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.failed
}

func (w *Worker) loop() error {
	for {
		next, err := w.set.model.Serve(w)
		if err == nil && w.out != 0 {
			panic(fmt.Sprintf("plain: %s: %d chains are neither completed, given back, nor handed over", w.set.info(w.index).Name, w.out))
		}
		if err == nil {
			err = w.failure()
		}
		if err != nil {
			return err
		}
		select {
		case <-w.quit:
			return nil
		default:
		}
		switch {
		case next == Again:
		case next == OnKick:
			if pending, err := w.armKick(); err != nil {
				return err
			} else if pending {
				continue
			}
			if why, err := w.sleep.Sleep(0); err != nil || why&doorbell.Stopped != 0 {
				return err
			}
		default:
			w.pause(next)
		}
	}
}

// pause waits for Wake, and for a positive d not longer than that.
func (w *Worker) pause(d Next) {
	var over <-chan time.Time
	if d > 0 {
		t := time.NewTimer(time.Duration(d))
		defer t.Stop()
		over = t.C
	}
	select {
	case <-w.wake:
	case <-over:
	case <-w.quit:
	}
}

// Index returns the number of the queue.
func (w *Worker) Index() int { return w.index }

// Enabled tells whether the queue is enabled. If not, what the driver sends by it is dropped, and it receives nothing.
func (w *Worker) Enabled() bool { return w.enabled }

// Pop takes up to max chains, 0 where there are none, and returns them with the spans that they refer to. Both are valid until the
// next Pop. An error is the driver's: the chains before it are returned with it, and are to be completed or given
// back all the same.
func (w *Worker) Pop(max int) ([]vring.Chain, []dma.Span, error) {
	b := &w.batch
	b.Chains, b.Spans = b.Chains[:0], b.Spans[:0]
	n, err := w.pop(max)
	w.sleep.Found(n > 0)
	w.out += n
	return b.Chains, b.Spans, err
}

// The ring is used under a lock, as chains that were handed over are finished by other goroutines. It is freed by defer, since a
// fault of the memory can tear these out (pci.Guard).

func (w *Worker) pop(max int) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.ring.Pop(&w.batch, max)
}

func (w *Worker) armKick() (bool, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.ring.ArmKick()
}

func (w *Worker) settleOne(ticket uint64, used vring.Used) (bool, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.set.inOrder {
		return w.ring.Settle(w.line.finish(ticket, used, w.res.Size), 0)
	}
	w.one[0] = used
	return w.ring.Settle(w.one[:], 0)
}

func (w *Worker) settle(used []vring.Used, rest int) (bool, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.ring.Settle(used, rest)
}

// Settle completes popped chains, in the order in which they were popped, gives the last rest ones back, and calls the driver if
// it asks for that.
func (w *Worker) Settle(used []vring.Used, rest int) error {
	call, err := w.settle(used, rest)
	w.out -= len(used) + rest
	w.call(call)
	return err
}

// call calls the driver if it asks for that. A call that is lost is made good by the driver's polling.
func (w *Worker) call(wanted bool) {
	if wanted {
		_ = doorbell.NoWait(w.res.Call).Ring()
	}
}

// Later hands over n of the popped chains: Serve leaves them, and Finish or Drop is called for each of them, from any goroutine and in
// any order. The queue does not rest before that. The tickets of the chains, in the order in which they were popped, count on from the
// result.
func (w *Worker) Later(n int) (ticket uint64) {
	w.out -= n
	w.mu.Lock()
	defer w.mu.Unlock()
	w.later += n
	ticket = w.line.next
	w.line.next += uint64(n)
	return ticket
}

// line is the chains that were handed over and are to be completed in order.
type line struct {
	next  uint64 // the ticket of the next chain
	first uint64 // that of the first chain that is not completed
	ended []vring.Used
	done  []bool
}

// finish takes a chain that is finished, and returns those that can be completed now, which are valid until the next call. There are
// no more than size chains without completion at any time.
func (l *line) finish(ticket uint64, used vring.Used, size uint16) []vring.Used {
	n := uint64(size)
	if uint64(len(l.done)) != 2*n {
		l.ended, l.done = make([]vring.Used, 2*n), make([]bool, 2*n) // twice: what can be completed is in one piece
	}
	i := ticket % n
	l.ended[i], l.ended[i+n], l.done[i] = used, used, true
	first := l.first % n
	k := uint64(0)
	for k < n && l.done[(first+k)%n] {
		l.done[(first+k)%n] = false
		k++
	}
	l.first += k
	return l.ended[first : first+k]
}

// Finish completes a chain that was handed over, and calls the driver if it asks for that. It is called in a pci.Guard. After an
// error or a fault the chain is still to be dropped.
func (w *Worker) Finish(ticket uint64, used vring.Used) error {
	call, err := w.settleOne(ticket, used)
	w.call(call)
	if err == nil {
		w.Drop(1) // last, as the doorbell may be closed then
	}
	return err
}

// Drop forgets n chains that were handed over without completing them: the queue is about to be reset, or has failed.
func (w *Worker) Drop(n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.later -= n; w.later == 0 && w.empty != nil {
		close(w.empty)
		w.empty = nil
	}
}

// Fail ends the queue with an error of a chain that was handed over. The caller then finishes or drops that chain.
func (w *Worker) Fail(err error) {
	w.mu.Lock()
	if w.failed == nil {
		w.failed = err
	}
	w.mu.Unlock()
	w.stop.Ring() // cannot fail: it is this program's alone
	select {
	case w.wake <- struct{}{}:
	default:
	}
}
