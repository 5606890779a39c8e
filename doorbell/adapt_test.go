package doorbell

import (
	"testing"
	"time"
)

// TestAdapt walks the poll fallback through its range, without sleeping.
func TestAdapt(t *testing.T) {
	e, err := NewEventfd()
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	fb := Fallback{Min: 1 * time.Millisecond, Max: 10 * time.Millisecond, PollMin: 100 * time.Microsecond, PollMax: 300 * time.Microsecond}
	s := NewSleeper(SleeperConfig{Doorbell: e, Fallback: fb})
	step := func(why Reason, found bool, want time.Duration) {
		t.Helper()
		if why&Rung != 0 {
			s.lost = 0
		}
		s.last = why
		s.Found(found)
		if s.cur != want {
			t.Errorf("next sleep %v, want %v", s.cur, want)
		}
	}
	const ms = time.Millisecond
	step(Timeout, false, 2*ms)
	step(Timeout, false, 4*ms)
	step(Rung, true, 4*ms)
	step(Extra, false, 4*ms)
	step(Timeout, false, 8*ms)
	step(Timeout, false, 10*ms)
	step(Timeout, false, 10*ms)
	step(Timeout, true, ms)
	step(Timeout, false, 2*ms)
	step(Timeout, true, ms)
	// The third in a row without a ring: polling is what there is.
	step(Timeout, true, 100*time.Microsecond)
	step(Timeout, false, 200*time.Microsecond)
	step(Timeout, false, 300*time.Microsecond)
	step(Timeout, true, 100*time.Microsecond)
	// It works after all.
	step(Rung, true, ms)
	step(Timeout, false, 2*ms)

	s = NewSleeper(SleeperConfig{Fallback: fb})
	step(Timeout, false, 200*time.Microsecond)
	step(Timeout, false, 300*time.Microsecond)
	step(Timeout, true, 100*time.Microsecond)
}
