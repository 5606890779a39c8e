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

// Sleepers keep their places in the scheduler while there is traffic, and leave one for others.
func TestDozeLeavesAPlace(t *testing.T) {
	a, bell := rungSleeper(t, Fallback{Min: time.Millisecond, Max: time.Millisecond})
	b, _ := rungSleeper(t, Fallback{})
	a.places, b.places = 2, 2
	may := func(s *Sleeper) bool {
		if !s.mayDoze() {
			return false
		}
		doneDozing()
		return true
	}
	if !may(a) {
		t.Error("may not doze at first")
	}
	if !a.mayDoze() || b.mayDoze() {
		t.Error("two may doze, or none, where there are two places")
	}
	doneDozing()
	if a.places = 1; may(a) {
		t.Error("may doze in the only place")
	}
	a.places = 2
	if why, err := a.Sleep(0); why != Timeout || err != nil {
		t.Fatalf("woken by %v, %v", why, err)
	}
	if may(a) {
		t.Error("may doze though nothing ended the last sleep")
	}
	a.Found(true)
	if !may(a) {
		t.Error("may not doze after work was found")
	}
	a.Sleep(0)
	a.Found(false)
	bell.Ring()
	if why, err := a.Sleep(0); why != Rung || err != nil {
		t.Fatalf("woken by %v, %v", why, err)
	}
	if !may(a) {
		t.Error("may not doze after it was woken")
	}
	if dozers != 0 {
		t.Errorf("%d doze although none sleeps", dozers)
	}
}

// A sleep lasts as long as asked, and is woken, whether it begins as a doze or not.
func TestSleepBeyondDoze(t *testing.T) {
	const long = dozeFor + 10*time.Millisecond
	s, bell := rungSleeper(t, Fallback{Min: long, Max: long})
	for _, places := range []int32{1, 2} {
		s.idle, s.places = false, places
		start := time.Now()
		if why, err := s.Sleep(0); why != Timeout || err != nil {
			t.Fatalf("woken by %v, %v", why, err)
		}
		if d := time.Since(start); d < long {
			t.Errorf("%d places: slept %v, not %v", places, d, long)
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
			t.Errorf("%d places: woken by %v", places, why)
		}
	}
}

// A sleeper that has told the scheduler nothing holds up no collection of garbage.
func TestDozeIsInterrupted(t *testing.T) {
	if runtime.Compiler != "gc" {
		t.Skip("only Go's own compiler's programs doze")
	}
	s, bell := rungSleeper(t, Fallback{})
	s.fds[2].Fd = -1
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
