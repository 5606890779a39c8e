package doorbell

import (
	"fmt"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Reason tells what ended a sleep: a set, as several things may happen at once.
type Reason uint8

const (
	// Rung: the doorbell was rung; it has been acknowledged.
	Rung Reason = 1 << iota
	// Extra: the extra file descriptor is ready.
	Extra
	// Stopped: the stop doorbell was rung. It stays rung, for all loops to see.
	Stopped
	// Timeout: nothing happened; the poll fallback asks to look for work all the same.
	Timeout
)

// Events of the extra file descriptor that Sleep can wait for.
const (
	In  int16 = unix.POLLIN  // it can be read
	Out int16 = unix.POLLOUT // it can be written
)

// Fallback is the range in which the poll fallback adapts. Zero fields take the default.
type Fallback struct {
	// Min and Max bound the sleep beside a doorbell that works: Min (1 ms) after a rescue,
	// doubling to Max (100 ms) while polls find nothing.
	Min, Max time.Duration
	// PollMin and PollMax do so where there is no doorbell, or where one after the other of its rings
	// went missing: 200 us and 4 ms, as then polling is what latency depends on.
	PollMin, PollMax time.Duration
}

func (f *Fallback) setDefaults() {
	def := func(d *time.Duration, v time.Duration) {
		if *d <= 0 {
			*d = v
		}
	}
	def(&f.Min, time.Millisecond)
	def(&f.Max, 100*time.Millisecond)
	def(&f.PollMin, 200*time.Microsecond)
	def(&f.PollMax, 4*time.Millisecond)
	if f.Max < f.Min {
		f.Max = f.Min
	}
	if f.PollMax < f.PollMin {
		f.PollMax = f.PollMin
	}
}

// missing is how many rescues in a row, with no ring in between, make a doorbell count as
// not wired.
const missing = 3

// FDError is a file descriptor that cannot be slept on any more.
type FDError struct {
	Name    string // "doorbell", "stop" or the extra descriptor's name
	FD      int
	Revents int16 // POLLERR, POLLHUP, POLLNVAL
}

// Error names the descriptor and what poll(2) reported.
func (e *FDError) Error() string {
	s := ""
	for _, f := range [...]struct {
		bit  int16
		name string
	}{{unix.POLLERR, "POLLERR"}, {unix.POLLHUP, "POLLHUP"}, {unix.POLLNVAL, "POLLNVAL"}} {
		if e.Revents&f.bit != 0 {
			s += " " + f.name
		}
	}
	return fmt.Sprintf("doorbell: cannot wait on %s (fd %d):%s", e.Name, e.FD, s)
}

// SleeperConfig is what a Sleeper is made of.
type SleeperConfig struct {
	// Doorbell is what wakes the loop; None (or nil) where there is nothing.
	Doorbell Waiter
	// Second, if not nil, is one more doorbell: that of the other queue which the loop serves.
	Second Waiter
	// Stop, if not nil, ends every sleep once it has been rung. It is shared by all loops of a
	// device, and never acknowledged by them.
	Stop *Eventfd
	// Extra is one more descriptor to wait for (a tun device); ignored unless HasExtra.
	Extra     int
	HasExtra  bool
	ExtraName string // for errors: "tap0"
	Fallback  Fallback
	// Counters, if not nil, is counted in; else the Sleeper has its own.
	Counters *Counters
	// Doze lets the first 20 ms of a sleep that follows upon work keep its place in Go's scheduler, so that what wakes it is seen
	// sooner. It is for data loops; they call Done at their end.
	Doze bool
}

// Sleeper is what a data loop sleeps on. It belongs to one goroutine, which need not be locked
// to a thread. It owns none of the descriptors: they stay open until the loop has stopped.
//
// The loop arms its notification, looks for work once more, calls Sleep, looks for work, and tells
// by Found whether there was any.
type Sleeper struct {
	fds   [4]unix.PollFd // doorbell, stop, extra, second doorbell
	ts    unix.Timespec
	doors [2]Waiter
	ends  [2]*End // doors whose descriptor may change
	deaf  bool    // a doorbell is missing
	extra int32
	name  string
	f     Fallback
	cur   time.Duration // of the next sleep
	idle  bool          // nothing ended the last sleep
	doze  bool          // SleeperConfig.Doze
	holds bool          // counted in holders
	lost  int           // rescues since the last ring
	last  Reason        // of the last sleep, until Found
	c     *Counters
}

// NewSleeper makes a Sleeper.
func NewSleeper(cfg SleeperConfig) *Sleeper {
	s := &Sleeper{doors: [2]Waiter{cfg.Doorbell, cfg.Second}, extra: -1, name: cfg.ExtraName, f: cfg.Fallback, c: cfg.Counters, doze: cfg.Doze}
	if s.doors[0] == nil {
		s.doors[0] = None
	}
	if s.c == nil {
		s.c = new(Counters)
	}
	if s.name == "" {
		s.name = "extra descriptor"
	}
	s.f.setDefaults()
	for i := range s.fds {
		s.fds[i] = unix.PollFd{Fd: -1, Events: unix.POLLIN} // poll skips negative ones
	}
	if cfg.Stop != nil {
		s.fds[1].Fd = int32(cfg.Stop.FD())
	}
	if cfg.HasExtra {
		s.extra = int32(cfg.Extra)
	}
	s.hear()
	s.cur, _ = s.limits()
	return s
}

// hear takes over the descriptors of the doorbells.
func (s *Sleeper) hear() {
	s.deaf = false
	for i, d := range s.doors {
		s.fds[doorFDs[i]].Fd, s.fds[doorFDs[i]].Revents = -1, 0
		if d != nil {
			s.fds[doorFDs[i]].Fd = int32(d.FD())
			s.deaf = s.deaf || d.FD() < 0
		}
		s.ends[i], _ = d.(*End)
	}
}

// Replace gives the Sleeper other doorbells, with the meaning of SleeperConfig's Doorbell and Second, and another place
// to count in; nil keeps the one that it has. The descriptors from before are not used any more. The time of
// the next sleep stays, within the limits of the new doorbells. Like all methods it is for the Sleeper's goroutine.
func (s *Sleeper) Replace(door, second Waiter, c *Counters) {
	if door == nil {
		door = None
	}
	if s.doors[0] != door || s.doors[1] != second {
		s.lost, s.last = 0, 0
	}
	s.doors = [2]Waiter{door, second}
	if c != nil {
		s.c = c
	}
	s.hear()
	min, max := s.limits()
	if s.cur < min {
		s.cur = min
	}
	if s.cur > max {
		s.cur = max
	}
}

// doorFDs are the places of the doorbells in Sleeper.fds.
var doorFDs = [2]int{0, 3}

// Counters returns where the Sleeper counts.
func (s *Sleeper) Counters() *Counters { return s.c }

// limits returns the range of the time-out. Where the doorbell is missing, the poll
// fallback carries the traffic, not just the accidents.
func (s *Sleeper) limits() (min, max time.Duration) {
	if s.deaf || s.lost >= missing {
		return s.f.PollMin, s.f.PollMax
	}
	return s.f.Min, s.f.Max
}

// Sleep waits until the doorbell is rung, the extra descriptor has one of the given events (In, Out; 0
// leaves it out), the stop doorbell is rung, or the poll fallback's time is up. A rung
// doorbell is acknowledged before Sleep returns: look for work after it. The error is an *FDError, or
// what Ack or ppoll(2) failed with; the loop should end then.
func (s *Sleeper) Sleep(extra int16) (Reason, error) {
	return s.sleep(extra, s.cur)
}

// sleep is Sleep for at most d, forever where d is negative.
func (s *Sleeper) sleep(extra int16, d time.Duration) (Reason, error) {
	s.last = 0
	atomic.AddUint64(&s.c.Sleeps, 1)
	why, err := s.poll(extra, d)
	if err != nil {
		return 0, err
	}
	s.idle = why == 0
	switch {
	case why&Rung != 0:
		s.lost = 0
		atomic.AddUint64(&s.c.Wakeups, 1)
	case why == 0:
		why = Timeout
		atomic.AddUint64(&s.c.Timeouts, 1)
	}
	s.last = why
	return why, nil
}

// Look is Sleep that does not wait, for a loop that stays awake: 0 where nothing has happened. It counts
// nothing, and Found does not go with it.
func (s *Sleeper) Look(extra int16) (Reason, error) {
	s.last = 0
	return s.poll(extra, 0)
}

func (s *Sleeper) poll(extra int16, d time.Duration) (Reason, error) {
	s.fds[2].Fd, s.fds[2].Events = -1, extra
	if extra != 0 {
		s.fds[2].Fd = s.extra
	}
	for i, e := range s.ends {
		if e != nil {
			s.fds[doorFDs[i]].Fd = int32(e.FD())
		}
	}
	n, err := s.ppoll(d)
	if err != nil {
		return 0, fmt.Errorf("doorbell: ppoll: %w", err)
	}
	if n == 0 {
		return 0, nil
	}
	const bad = unix.POLLERR | unix.POLLHUP | unix.POLLNVAL
	for i := range s.fds {
		if r := s.fds[i].Revents; r&bad != 0 && s.fds[i].Fd >= 0 && !s.saturated(i) {
			return 0, &FDError{Name: [...]string{"doorbell", "stop", s.name, "second doorbell"}[i], FD: int(s.fds[i].Fd), Revents: r}
		}
	}
	var why Reason
	for i, f := range doorFDs {
		if s.fds[f].Revents == 0 {
			continue
		}
		// Rings that somebody else took wake us for nothing: still a
		// reason to look.
		if _, err := s.doors[i].Ack(); err != nil {
			return 0, err
		}
		why |= Rung
	}
	if s.fds[1].Revents != 0 {
		why |= Stopped
	}
	if s.fds[2].Revents != 0 {
		why |= Extra
	}
	return why, nil
}

// saturated tells whether what poll reports of descriptor i is an eventfd whose counter overflowed (POLLERR alone): somebody, the kernel or a
// peer, rang without end. It is rung, and Ack sets the counter back.
func (s *Sleeper) saturated(i int) bool {
	if s.fds[i].Revents&(unix.POLLHUP|unix.POLLNVAL) != 0 {
		return false
	}
	for d, f := range doorFDs {
		if f == i {
			if e := s.ends[d]; e != nil {
				return e.eventfd()
			}
			_, ok := s.doors[d].(*Eventfd)
			return ok
		}
	}
	return false
}

// Found tells whether the look for work after the last Sleep found any that the doorbell stands
// for (what came from the extra descriptor does not count). It adapts the poll fallback, and counts
// rescued and spurious wake-ups. A second call after the same Sleep does nothing.
func (s *Sleeper) Found(work bool) {
	last := s.last
	s.last = 0
	switch {
	case last&Rung != 0:
		if !work && last&Extra == 0 {
			atomic.AddUint64(&s.c.Spurious, 1)
		}
	case last&Timeout == 0:
	case work:
		s.idle = false
		if s.deaf {
			atomic.AddUint64(&s.c.Polled, 1)
		} else {
			atomic.AddUint64(&s.c.Rescued, 1)
			if s.lost < missing {
				s.lost++
			}
		}
		s.cur, _ = s.limits()
		return
	default:
		s.cur *= 2
	}
	min, max := s.limits()
	if s.cur < min {
		s.cur = min
	}
	if s.cur > max {
		s.cur = max
	}
}
