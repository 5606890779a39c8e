package doorbell

import (
	"runtime"
	"sync/atomic"
	"testing"
	"time"
)

// A nap ends when the extra descriptor is ready, and is not begun where the scheduler has no place to keep.
func TestNap(t *testing.T) {
	e, err := NewEventfd()
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(int(atomic.LoadInt32(&holders)) + 2))
	s := NewSleeper(SleeperConfig{Extra: e.FD(), HasExtra: true, Doze: true})
	if ready, err := s.Nap(In); ready || err != nil {
		t.Errorf("nothing happens: %v, %v", ready, err)
	}
	go func() {
		time.Sleep(time.Millisecond)
		e.Ring()
	}()
	ready := false
	for begin := time.Now(); !ready && time.Since(begin) < 20*time.Second; {
		if ready, err = s.Nap(In); err != nil {
			t.Fatal(err)
		}
	}
	if !ready {
		t.Error("a descriptor that is ready does not end it")
	}
	if runtime.Compiler == "gc" {
		runtime.GOMAXPROCS(int(atomic.LoadInt32(&holders)))
		if ready, err := s.Nap(In); ready || err != nil {
			t.Errorf("without a place it looks at the descriptor: %v, %v", ready, err)
		}
	}
	before := atomic.LoadInt32(&holders)
	s.Done()
	if after := atomic.LoadInt32(&holders); after != before-1 && runtime.Compiler == "gc" {
		t.Errorf("%d places are held after Done, %d before", after, before)
	}
}
