//go:build gc

// Only programs of Go's own compiler doze.

package doorbell

import (
	"runtime"
	"testing"
	"time"
)

func rungSleeper(t *testing.T, f Fallback) (*Sleeper, *Eventfd) {
	t.Helper()
	e, err := NewEventfd()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.Close() })
	return NewSleeper(SleeperConfig{Doorbell: e, Fallback: f}), e
}

// Sleepers keep their places in the scheduler while there is traffic, if there is one for each, and one for all others.
func TestDozeLeavesAPlace(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(2))
	a, bell := rungSleeper(t, Fallback{Min: time.Millisecond, Max: time.Millisecond})
	if a.mayDoze() || holders != 0 {
		t.Error("may doze unasked")
	}
	a.doze = true
	if !a.mayDoze() {
		t.Error("may not doze at first")
	}
	b, _ := rungSleeper(t, Fallback{})
	b.doze = true
	if b.mayDoze() || a.mayDoze() {
		t.Error("there are two places, and two that may want to doze: none is left")
	}
	runtime.GOMAXPROCS(3)
	if !a.mayDoze() || !b.mayDoze() {
		t.Error("there are three places, and two do not doze")
	}
	runtime.GOMAXPROCS(2)
	b.Done()
	b.Done()
	if !a.mayDoze() {
		t.Error("may not doze though the other is done")
	}
	if why, err := a.Sleep(0); why != Timeout || err != nil {
		t.Fatalf("woken by %v, %v", why, err)
	}
	if a.mayDoze() {
		t.Error("may doze though nothing ended the last sleep")
	}
	a.Found(true)
	if !a.mayDoze() {
		t.Error("may not doze after work was found")
	}
	a.Sleep(0)
	a.Found(false)
	bell.Ring()
	if why, err := a.Sleep(0); why != Rung || err != nil {
		t.Fatalf("woken by %v, %v", why, err)
	}
	if !a.mayDoze() {
		t.Error("may not doze after it was woken")
	}
	runtime.GOMAXPROCS(1)
	if a.mayDoze() {
		t.Error("may doze in the only place")
	}
	if a.Done(); holders != 0 {
		t.Errorf("%d hold places although all are done", holders)
	}
}

// A sleep lasts as long as asked, and is woken, whether it begins as a doze or not.
func TestSleepBeyondDoze(t *testing.T) {
	const long = dozeFor + 10*time.Millisecond
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(2))
	s, bell := rungSleeper(t, Fallback{Min: long, Max: long})
	defer s.Done()
	for _, doze := range []bool{false, true} {
		s.idle, s.doze = false, doze
		start := time.Now()
		if why, err := s.Sleep(0); why != Timeout || err != nil {
			t.Fatalf("woken by %v, %v", why, err)
		}
		if d := time.Since(start); d < long {
			t.Errorf("doze %v: slept %v, not %v", doze, d, long)
		}
		s.Found(false)
		done := make(chan Reason)
		s.idle = false
		go func() {
			why, _ := s.sleep(0, -1)
			done <- why
		}()
		time.Sleep(long)
		bell.Ring()
		if why := <-done; why != Rung {
			t.Errorf("doze %v: woken by %v", doze, why)
		}
	}
}

// A sleeper that has told the scheduler nothing holds up no collection of garbage.
func TestDozeIsInterrupted(t *testing.T) {
	s, bell := rungSleeper(t, Fallback{})
	started, done := make(chan bool), make(chan int)
	go func() {
		close(started)
		n, err := s.rawPpoll(time.Minute)
		if err != nil {
			t.Error(err)
		}
		done <- n
	}()
	<-started
	for i := 0; i < 3; i++ {
		time.Sleep(5 * time.Millisecond)
		runtime.GC() // stops every goroutine
	}
	bell.Ring()
	if n := <-done; n != 1 {
		t.Error("the garbage collection waited for the end of the sleep")
	}
}
