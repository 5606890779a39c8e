package netdev

import (
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/vring"
	"golang.org/x/sys/unix"
)

var restartModes = []struct {
	name string
	bits []virtio.Feature
}{
	{"split", nil},
	{"split, event index, in order", []virtio.Feature{virtio.EventIdx, virtio.InOrder}},
	{"packed, event index", []virtio.Feature{virtio.RingPacked, virtio.EventIdx}},
	{"packed, in order", []virtio.Feature{virtio.RingPacked, virtio.InOrder}},
}

// TestQueuesRestart stops and starts the queues of a device at random under traffic, swaps its memory and its doorbells, and breaks queues.
// State goes out by StopQueue and in by StartQueue. No frame may be lost, or come twice, or be damaged.
func TestQueuesRestart(t *testing.T) {
	for _, m := range restartModes {
		m := m
		t.Run(m.name, func(t *testing.T) {
			t.Parallel()
			r := newRestartRig(t, m.bits...)
			r.run()
			r.progress()
			steps := []struct {
				name string
				f    func()
			}{
				{"restart", func() {
					i := r.rand(2)
					r.start(i, r.stopQueue(i).State)
				}},
				{"restart both", func() {
					a, b := r.stopQueue(0), r.stopQueue(1)
					r.start(1, b.State)
					r.start(0, a.State)
				}},
				{"stay stopped while the other moves", func() {
					i := r.rand(2)
					s := r.stopQueue(i)
					moves := [2]*arrivals{&r.toDriver, &r.toEnd}[1-i]
					for was, end := moves.count(), soon(); moves.count() < was+window; time.Sleep(100 * time.Microsecond) {
						if time.Now().After(end) {
							r.check()
							t.Fatalf("queue %d does not move while %d is stopped", 1-i, i)
						}
					}
					r.start(i, s.State)
				}},
				{"swap the memory", r.swap},
				{"swap the memory while one is stopped", func() {
					i := r.rand(2)
					s := r.stopQueue(i)
					r.swap()
					r.start(i, s.State)
				}},
				{"another doorbell", func() {
					i := r.rand(2)
					k := newBell(t)
					r.must(r.n.ChangeQueue(i, device.Change{Kick: k}, soon()))
					r.kickMu.Lock()
					r.kick[i] = k
					r.kickMu.Unlock()
				}},
				{"break a ring", r.breakRing},
				{"break a doorbell", r.breakBell},
				{"fault", r.fault},
			}
			for n := 0; n < 60; n++ {
				s := steps[n%len(steps)]
				if n >= len(steps) {
					s = steps[r.rand(len(steps))]
				}
				r.last = append(r.last, s.name)
				s.f()
				r.check()
				if r.rand(3) == 0 {
					r.progress()
				}
			}
			r.progress()
			r.check()
			if s := r.n.Status(); s.Counters["starts"] != 1 || !s.Carrier {
				t.Errorf("%d starts, carrier %v", s.Counters["starts"], s.Carrier)
			}
			t.Logf("%d frames from the driver, %d to it", r.toEnd.count(), r.toDriver.count())
		})
	}
}

// swap replaces the mapping of the memory. The old one is unmapped: who touches it faults.
func (r *restartRig) swap() {
	old := r.dev
	r.dev = r.remap()
	r.table.Store(r.dev.table)
	for i := range r.layout {
		a := r.areas(i)
		if err := r.n.ChangeQueue(i, device.Change{Areas: &a}, soon()); err != nil && !errors.Is(err, device.ErrStopped) {
			r.t.Fatal(err)
		}
	}
	old.unmap()
}

// breakRing makes half of the buffers of a queue untranslatable, which breaks its ring amid a batch, and goes on from what was
// left.
func (r *restartRig) breakRing() {
	i := r.rand(2)
	half := [2]uint64{ringSize * bufBytes / 2, ringBytes / 2}
	if i == 0 {
		r.table.Store(r.tableOf(r.dev, ringBytes, half[0]))
	} else {
		r.table.Store(r.tableOf(r.dev, half[1], ringBytes))
	}
	e := r.broken()
	if e.Queue != i || device.CauseOf(e.Broken) != device.CausePeer || !errors.Is(e.Broken, vring.ErrTranslate) {
		r.t.Errorf("queue %d is broken: the event tells of %d: %v", i, e.Queue, e.Broken)
	}
	r.table.Store(r.dev.table)
	s := r.stopQueue(i)
	if !errors.Is(s.Err, vring.ErrTranslate) {
		r.t.Errorf("queue %d stopped with %v", i, s.Err)
	}
	r.start(i, s.State)
}

// breakBell makes a doorbell of the driver's count as one that blocks.
func (r *restartRig) breakBell() {
	i := r.rand(2)
	atomic.StoreUint32(&r.call[i].blocks, 1)
	if !r.features.Has(virtio.EventIdx) { // with the event index the driver, which never sleeps, is hardly ever called
		if e := r.broken(); e.Queue != i || !errors.Is(e.Broken, doorbell.ErrBlocked) || device.CauseOf(e.Broken) != device.CausePeer {
			r.t.Errorf("queue %d is blocked: the event tells of %d: %v", i, e.Queue, e.Broken)
		}
	}
	s := r.stopQueue(i)
	atomic.StoreUint32(&r.call[i].blocks, 0)
	for done := false; !done; {
		select {
		case <-r.events:
		default:
			done = true
		}
	}
	r.start(i, s.State)
}

// fault takes half of the driver's frames away from the device, amid a batch, as a board that is pulled does: both queues end, and go
// on where they were.
func (r *restartRig) fault() {
	part := r.dev.b[txPart+ringBytes/2 : txPart+ringBytes]
	r.must(unix.Mprotect(part, unix.PROT_NONE))
	e := r.broken()
	if device.CauseOf(e.Broken) != device.CauseMemory {
		r.t.Errorf("a fault: the event tells of queue %d: %v", e.Queue, e.Broken)
	}
	r.must(unix.Mprotect(part, unix.PROT_READ|unix.PROT_WRITE))
	for i := range r.layout {
		r.start(i, r.stopQueue(i).State)
	}
}
