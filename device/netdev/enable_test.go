package netdev

import (
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/vring"
)

// until waits until a condition holds.
func (r *restartRig) until(what string, f func() bool) {
	r.t.Helper()
	for end := soon(); !f(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			r.check()
			r.t.Fatalf("not within 30s: %s", what)
		}
	}
}

// TestQueuesDisabled: a disabled transmit queue takes frames and drops them, a disabled receive queue leaves them where they
// are, and gives them to the driver once it is enabled.
func TestQueuesDisabled(t *testing.T) {
	t.Parallel()
	r := newRestartRig(t)
	r.run()
	r.progress()
	used := func(i int) func() uint64 {
		return func() uint64 { return r.n.Status().Queues[i].Ring["done"] }
	}
	const moment = 30 * time.Millisecond // for what must not happen
	// To the driver: nothing comes, and nothing is lost.
	r.must(r.n.EnableQueue(0, false, soon()))
	at := used(0)()
	if time.Sleep(moment); used(0)() != at {
		t.Errorf("a disabled queue completes %d chains", used(0)()-at)
	}
	s := r.stopQueue(0)
	r.start(0, s.State) // stays disabled
	if time.Sleep(moment); used(0)() != 0 {
		t.Errorf("a disabled queue that was started anew completes %d chains", used(0)())
	}
	r.must(r.n.EnableQueue(0, true, soon()))
	r.progress()
	r.check()
	// From the driver: a whole window of frames comes back and never arrives; with so many missing the driver waits.
	r.must(r.n.EnableQueue(1, false, soon()))
	sent := r.n.Status().Queues[1].Pump["frames"]
	r.until("all frames that were written arrive", func() bool { return r.toEnd.count() == sent })
	r.until("a window of frames is dropped", func() bool { return used(1)() == sent+window })
	r.must(r.n.EnableQueue(1, true, soon()))
	if time.Sleep(moment); r.toEnd.count() != sent || used(1)() != sent+window {
		t.Errorf("%d frames of a disabled queue arrive, %d chains are completed", r.toEnd.count()-sent, used(1)()-sent)
	}
	r.check()
}

// stickyBell blocks who rings it until it is let go.
type stickyBell struct {
	on    uint32
	stuck uint32 // it has blocked
	free  chan struct{}
}

func (b *stickyBell) Ring() error {
	if atomic.LoadUint32(&b.on) != 0 {
		atomic.StoreUint32(&b.stuck, 1)
		<-b.free
	}
	return nil
}

// TestQueueStuck: a queue whose loop hangs is not stopped at the deadline, the device answers meanwhile, and the same call succeeds
// once the loop goes on: without a frame lost.
func TestQueueStuck(t *testing.T) {
	t.Parallel()
	r := newRestartRig(t)
	r.run()
	r.progress()
	b := &stickyBell{on: 1, free: make(chan struct{})}
	r.must(r.n.ChangeQueue(0, device.Change{Call: b}, soon()))
	r.until("the loop rings", func() bool { return atomic.LoadUint32(&b.stuck) != 0 })
	if _, err := r.n.StopQueue(0, time.Now().Add(20*time.Millisecond)); !errors.Is(err, device.ErrStuck) {
		t.Fatalf("stopped while its loop hangs: %v", err)
	}
	if s := r.n.Status(); !s.Queues[0].Ready {
		t.Error("a queue that did not stop counts as stopped")
	}
	atomic.StoreUint32(&b.on, 0)
	close(b.free)
	s := r.stopQueue(0)
	r.start(0, s.State)
	r.progress()
	r.check()
}

// TestQueueErrors: what a control plane must not do is an error, and does no harm.
func TestQueueErrors(t *testing.T) {
	t.Parallel()
	r := newRestartRig(t)
	if err := r.n.SetRunning(true, soon()); err == nil {
		t.Error("a device without queues runs")
	}
	r.run()
	if err := r.n.SetFeatures(virtio.FeaturesOf(virtio.Version1), device.Options{}); !errors.Is(err, device.ErrStarted) {
		t.Errorf("features of a running device: %v", err)
	}
	if err := r.n.StartQueue(0, device.Resources{Size: ringSize, Areas: r.areas(0), Table: &r.table, Kick: r.kick[0], Call: &r.call[0]}, vring.State{}); !errors.Is(err, device.ErrStarted) {
		t.Errorf("a queue is started twice: %v", err)
	}
	for _, i := range []int{-1, 2, 100} {
		if _, err := r.n.StopQueue(i, soon()); err == nil {
			t.Errorf("queue %d stops", i)
		}
		if err := r.n.ChangeQueue(i, device.Change{}, soon()); err == nil {
			t.Errorf("queue %d changes", i)
		}
		if err := r.n.EnableQueue(i, true, soon()); err == nil {
			t.Errorf("queue %d is enabled", i)
		}
	}
	s := r.stopQueue(1)
	if _, err := r.n.StopQueue(1, soon()); !errors.Is(err, device.ErrStopped) {
		t.Errorf("a queue is stopped twice: %v", err)
	}
	if err := r.n.ChangeQueue(1, device.Change{Call: &r.call[1]}, soon()); !errors.Is(err, device.ErrStopped) {
		t.Errorf("a stopped queue is changed: %v", err)
	}
	r.start(1, s.State)
	r.progress()
	// All rest, carrier off, and go on. What the kernel holds meanwhile it may drop: so nothing is compared any more.
	r.must(r.n.SetRunning(false, soon()))
	if st := r.n.Status(); st.Carrier {
		t.Error("the carrier stays")
	}
	done := func() uint64 { return r.n.Status().Queues[1].Ring["done"] }
	at := done()
	if time.Sleep(30 * time.Millisecond); done() != at {
		t.Errorf("%d chains are completed at rest", done()-at)
	}
	r.must(r.n.SetRunning(true, soon()))
	r.until("a queue moves after a rest", func() bool { return done() != at })
	r.must(r.n.Reset(soon()))
	r.must(r.n.Reset(soon()))
	if st := r.n.Status(); st.Carrier || st.Queues[0].Ready || st.Queues[1].Ready {
		t.Errorf("after a reset: %+v", st)
	}
}
