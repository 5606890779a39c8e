package tunbridge

import (
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/boardlink/boardlink/doorbell"
	"golang.org/x/sys/unix"
)

// fakeDevice is a device side's pump whose every step a test sets.
type fakeDevice struct {
	fakeHalf
	mu       sync.Mutex
	steps    int
	grounded bool
	fail     error
	busy     bool // each step moves something, so that the loop does not sleep
}

func (f *fakeDevice) change(c Change) { f.common.change(c) }

func (f *fakeDevice) begin() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.grounded = false
	return nil
}

func (f *fakeDevice) ground() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.grounded = true
}

func (f *fakeDevice) step(turn) (result, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.steps++
	err := f.fail
	f.fail = nil
	var res result
	if f.busy {
		res.frames = 1
	}
	return res, err
}

func (f *fakeDevice) state() (steps int, grounded bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.steps, f.grounded
}

// mailboxRig is a loop over an interface that never has a frame.
func mailboxRig(t *testing.T) (l *Loop, out, in *fakeDevice, broken chan error) {
	t.Helper()
	fd, err := doorbell.NewEventfd()
	if err != nil {
		t.Fatal(err)
	}
	ifc := &Iface{fd: fd.FD(), name: "bl0"}
	ifc.first = ifc
	broken = make(chan error, 10)
	l, err = OpenLoop(LiveConfig{Name: "net0 pair 0", Iface: ifc, Fallback: doorbell.Fallback{Min: time.Millisecond, Max: time.Millisecond},
		Broken: func(p DevicePump, err error) { broken <- err }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(time.Now().Add(30 * time.Second)); err != nil {
			t.Error(err)
		}
		fd.Close()
	})
	pump := func(name string, reads bool) *fakeDevice {
		return &fakeDevice{fakeHalf: fakeHalf{common: common{name: name, ifc: ifc, wait: doorbell.None, stats: new(Stats), reads: reads}}}
	}
	return l, pump("tx0", false), pump("rx0", true), broken
}

// moves waits until a pump is asked for another step.
func (f *fakeDevice) moves(t *testing.T) {
	t.Helper()
	was, _ := f.state()
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(time.Millisecond) {
		if now, _ := f.state(); now > was {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%s does not move", f.name)
		}
	}
}

func soon() time.Time { return time.Now().Add(30 * time.Second) }

// TestMailbox: pumps come and go while a loop runs, whatever is posted finds both grounded, and the loop ends with its last pump.
func TestMailbox(t *testing.T) {
	t.Parallel()
	l, out, in, broken := mailboxRig(t)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	running := func() bool {
		l.box.mu.Lock()
		defer l.box.mu.Unlock()
		return l.box.running
	}
	ended := func() {
		t.Helper()
		for end := time.Now().Add(30 * time.Second); running(); time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal("the loop goes on without a pump")
			}
		}
	}
	must(l.Do(func() error { return nil }, soon()))
	if running() {
		t.Error("a loop without pumps runs")
	}
	must(l.Attach(soon(), out))
	out.moves(t)
	must(l.Attach(soon(), in, out)) // one of them is there
	in.moves(t)
	out.moves(t)
	for i := 0; i < 100; i++ {
		must(l.Do(func() error {
			_, a := out.state()
			if _, b := in.state(); !a || !b {
				t.Errorf("grounded: %v, %v", a, b)
			}
			return nil
		}, soon()))
	}
	if err := l.Do(func() error { return ErrMalformed }, soon()); err != ErrMalformed {
		t.Errorf("an error comes back as %v", err)
	}
	_, again, _, _ := mailboxRig(t)
	if err := l.Attach(soon(), again); err == nil {
		t.Error("two pumps go the same way")
	}
	// One leaves, the other goes on.
	must(l.Detach(soon(), out))
	was, grounded := out.state()
	in.moves(t)
	if now, _ := out.state(); now != was || !grounded {
		t.Errorf("a pump that left moves, or is not grounded (%v)", grounded)
	}
	must(l.Attach(soon(), out))
	out.moves(t)
	// One fails, the other goes on, and the loop without it can be posted to.
	out.mu.Lock()
	out.fail = errors.New("its queue")
	out.mu.Unlock()
	if err := <-broken; err.Error() != "its queue" {
		t.Errorf("told %v", err)
	}
	in.moves(t)
	in.mu.Lock()
	in.fail = errors.New("the other queue")
	in.mu.Unlock()
	<-broken
	ended()
	must(l.Detach(soon(), in))
	// It starts again. What is the interface's fault ends both.
	must(l.Attach(soon(), out, in))
	in.moves(t)
	out.mu.Lock()
	out.fail = ErrGone
	out.mu.Unlock()
	if err := <-broken; !errors.Is(err, ErrGone) {
		t.Errorf("told %v", err)
	}
	ended()
	select {
	case err := <-broken:
		t.Errorf("told of the same error twice: %v", err)
	default:
	}
}

// TestMailboxFull: many post at once, while pumps fail at any time: all are served.
func TestMailboxFull(t *testing.T) {
	t.Parallel()
	l, out, in, broken := mailboxRig(t)
	done := make(chan struct{})
	go func() {
		for {
			select {
			case <-broken:
			case <-done:
				return
			}
		}
	}()
	var wg sync.WaitGroup
	for i, p := range []*fakeDevice{out, in, out, in} {
		i, p := i, p
		wg.Add(1)
		go func() {
			defer wg.Done()
			for n := 0; n < 200; n++ {
				var err error
				switch (n + i) % 3 {
				case 0:
					err = l.Attach(soon(), p)
				case 1:
					err = l.Do(func() error { return nil }, soon())
				default:
					p.mu.Lock()
					p.fail = unix.EIO
					p.mu.Unlock()
					err = l.Detach(soon(), p)
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		}()
	}
	wg.Wait()
	close(done)
}

// TestMailboxBell: a loop that is awake sees the flag of a Raise before its bell. It must leave the bell quiet all the
// same: a rung one would end every sleep at once, for ever.
func TestMailboxBell(t *testing.T) {
	t.Parallel()
	l, out, _, _ := mailboxRig(t)
	out.busy = true
	if err := l.Attach(soon(), out); err != nil {
		t.Fatal(err)
	}
	until := func(grounded bool) {
		t.Helper()
		for end := soon(); ; time.Sleep(time.Millisecond) {
			if _, g := out.state(); g == grounded {
				return
			}
			if time.Now().After(end) {
				t.Fatalf("the pump does not come to grounded = %v", grounded)
			}
		}
	}
	until(false)
	l.box.mu.Lock() // as Do holds it while it calls Raise, which is played in two steps
	atomic.StoreUint32(&l.stop.raised, 1)
	until(true)
	err := l.stop.bell.Ring()
	l.box.mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	until(false)
	l.box.mu.Lock()
	defer l.box.mu.Unlock()
	if n, err := l.stop.bell.Ack(); n != 0 || l.stop.Raised() {
		t.Errorf("the bell is still rung (%d, %v), raised: %v", n, err, l.stop.Raised())
	}
}
