package doorbell_test

import (
	"sync/atomic"
	"testing"
	"time"

	"github.com/boardlink/boardlink/doorbell"
)

// slow is a poll fallback that makes good nothing within a test: a ring that is lost hangs it.
var slow = doorbell.Fallback{Min: time.Minute, Max: time.Minute}

// user sleeps on an end of a doorbell and counts its wakes until it is stopped.
type user struct {
	wakes uint64
	stop  *doorbell.Eventfd
	done  chan error
}

func newUser(t *testing.T, w doorbell.Waiter) *user {
	u := &user{stop: newEventfd(t), done: make(chan error, 1)}
	go func() {
		s := doorbell.NewSleeper(doorbell.SleeperConfig{Doorbell: w, Stop: u.stop, Fallback: slow})
		for {
			why, err := s.Sleep(0)
			if err != nil || why&doorbell.Stopped != 0 {
				u.done <- err
				return
			}
			if why&doorbell.Rung != 0 {
				atomic.AddUint64(&u.wakes, 1)
			}
		}
	}()
	return u
}

func (u *user) end(t *testing.T) {
	t.Helper()
	u.stop.Ring()
	if err := <-u.done; err != nil {
		t.Error(err)
	}
}

func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(50 * time.Microsecond) {
		if time.Now().After(end) {
			t.Fatal("not within 20 s: " + what)
		}
	}
}

// A user that sleeps hears each ring, however often others come to share its doorbell and leave again; and they hear theirs.
func TestAssignedComeAndGo(t *testing.T) {
	bell := newEventfd(t)
	a, err := doorbell.Assign([]doorbell.Waiter{newEventfd(t), bell}, []doorbell.User{{Bell: 0}, {Bell: 1}})
	if err != nil {
		t.Fatal(err)
	}
	first := newUser(t, a.Waiter(1))
	ring := func(users ...*user) {
		t.Helper()
		var before []uint64
		for _, u := range users {
			before = append(before, atomic.LoadUint64(&u.wakes))
		}
		bell.Ring()
		for i, u := range users {
			i, u := i, u
			until(t, "a ring is heard", func() bool { return atomic.LoadUint64(&u.wakes) > before[i] })
		}
	}
	ring(first)
	shared := 0 // descriptors while there is one user, once the doorbell was shared
	for round := 0; round < 50; round++ {
		second, err := a.Add(doorbell.User{Bell: 1})
		if err != nil {
			t.Fatal(err)
		}
		u2 := newUser(t, a.Waiter(second))
		ring(first, u2)
		third, err := a.Add(doorbell.User{Bell: 1})
		if err != nil {
			t.Fatal(err)
		}
		u3 := newUser(t, a.Waiter(third))
		ring(first, u2, u3)
		u2.end(t)
		u2.stop.Close()
		a.Remove(second)
		ring(first, u3)
		u3.end(t)
		u3.stop.Close()
		a.Remove(third)
		a.Remove(third) // nobody any more
		ring(first)
		if n := fds(t); shared == 0 {
			shared = n
		} else if n != shared {
			t.Fatalf("round %d: %d descriptors, %d after the first", round, n, shared)
		}
	}
	if _, err := a.Add(doorbell.User{Bell: 2}); err == nil {
		t.Error("a user of a doorbell that is not there")
	}
	first.end(t)
	if err := a.Close(); err != nil {
		t.Error(err)
	}
}

// Where a doorbell has no descriptor, those who come poll as all others do.
func TestAssignedNone(t *testing.T) {
	before := fds(t)
	a, err := doorbell.Assign([]doorbell.Waiter{doorbell.None}, []doorbell.User{{}})
	if err != nil {
		t.Fatal(err)
	}
	n, err := a.Add(doorbell.User{})
	if err != nil {
		t.Fatal(err)
	}
	for _, u := range []int{0, n} {
		if fd := a.Waiter(u).FD(); fd != -1 {
			t.Errorf("user %d: FD = %d", u, fd)
		}
	}
	a.Remove(n)
	a.Close()
	if after := fds(t); after != before {
		t.Errorf("%d descriptors open, %d before", after, before)
	}
}

// A loop that sleeps on an end of a shared doorbell, or of one that could come to be shared, allocates nothing.
func TestAssignedNoAllocations(t *testing.T) {
	bells := []doorbell.Waiter{newEventfd(t), newEventfd(t)}
	a, err := doorbell.Assign(bells, []doorbell.User{{Bell: 0}, {Bell: 1}, {Bell: 1}})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	for u := 0; u < 2; u++ {
		s := doorbell.NewSleeper(doorbell.SleeperConfig{Doorbell: a.Waiter(u), Fallback: doorbell.Fallback{Min: 1, Max: 1}})
		if n := testing.AllocsPerRun(100, func() {
			s.Look(0)
			s.Sleep(0)
		}); n != 0 {
			t.Errorf("user %d: %v allocations", u, n)
		}
	}
}
