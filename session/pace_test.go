package session_test

import (
	"testing"
	"time"

	"github.com/boardlink/boardlink/session"
)

// TestBucket: a burst passes, then one each interval; what was not used adds up to the burst again, but not in
// time that is skipped.
func TestBucket(t *testing.T) {
	const every = 10 * time.Millisecond
	b := session.NewBucket(session.Rate{Every: every, Burst: 5})
	now := time.Now()
	take := func(d time.Duration) (n int) {
		for end := now.Add(d); !now.After(end); now = now.Add(time.Millisecond) {
			for b.Wait(now) == 0 {
				b.Take(now, 1)
				n++
			}
		}
		return n
	}
	if n := take(0); n != 5 {
		t.Errorf("a burst of %d", n)
	}
	if n := take(time.Second); n != 100 {
		t.Errorf("%d in a second", n)
	}
	if d := b.Wait(now); d <= 0 || d > every {
		t.Errorf("wait %v", d)
	}
	now = now.Add(time.Hour)
	if n := take(0); n != 5 {
		t.Errorf("%d after an hour", n)
	}
	b.Skip(now, time.Second)
	now = now.Add(time.Second)
	if n := take(0); n != 0 {
		t.Errorf("%d after a second that does not count", n)
	}
	now = now.Add(5 * every)
	if n := take(0); n != 5 {
		t.Errorf("%d after %v", n, 5*every)
	}
	b = session.NewBucket(session.Rate{Every: every, Burst: 4})
	b.Take(now, 10)
	if d := b.Wait(now); d != 7*every {
		t.Errorf("wait %v for what was taken in advance", d)
	}
}
