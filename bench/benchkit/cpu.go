//go:build linux

package benchkit

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// CPUs returns the processors that this process may use, in order; at least one.
func CPUs() (cpus []int, err error) {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return nil, fmt.Errorf("sched_getaffinity: %w", err)
	}
	for i := 0; len(cpus) < set.Count(); i++ {
		if set.IsSet(i) {
			cpus = append(cpus, i)
		}
	}
	if len(cpus) == 0 {
		return nil, errors.New("sched_getaffinity: no processor")
	}
	return cpus, nil
}

// ParsePair reads two processors, "A,B". They may be the same; -1 leaves a side where the kernel puts it.
func ParsePair(s string) (pair [2]int, err error) {
	a, b, ok := strings.Cut(s, ",")
	cpus, err := CPUs()
	if err != nil {
		return pair, err
	}
	for i, w := range []string{a, b} {
		n, err := strconv.Atoi(w)
		if !ok || err != nil {
			return pair, fmt.Errorf("processors %q: two numbers, A,B", s)
		}
		found := n == -1
		for _, c := range cpus {
			found = found || c == n
		}
		if !found {
			return pair, fmt.Errorf("processors %q: %d is none of those that may be used: %v", s, n, cpus)
		}
		pair[i] = n
	}
	return pair, nil
}

// Pin keeps the calling goroutine on a thread of its own, and that on a processor; -1: on any. unpin undoes it; it is to be
// called by the same goroutine.
func Pin(cpu int) (unpin func(), err error) {
	runtime.LockOSThread()
	if cpu < 0 {
		return runtime.UnlockOSThread, nil
	}
	var old, set unix.CPUSet
	if err = unix.SchedGetaffinity(0, &old); err == nil {
		set.Set(cpu)
		err = unix.SchedSetaffinity(0, &set)
	}
	if err != nil {
		runtime.UnlockOSThread()
		return nil, fmt.Errorf("pin to processor %d: %w", cpu, err)
	}
	return func() {
		// A thread that cannot be let go stays locked, and ends with its goroutine.
		if unix.SchedSetaffinity(0, &old) == nil {
			runtime.UnlockOSThread()
		}
	}, nil
}

// ProcessCPU returns the processor time of this process, all its threads.
func ProcessCPU() time.Duration {
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &ts) != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}

// Load watches how busy the processors are that this process may use.
type Load struct {
	cpus    []int
	start   time.Time
	busy    time.Duration // of these processors, all that runs
	own     time.Duration // of this process and its children that were waited for
	invalid bool
}

// StartLoad begins to watch.
func StartLoad() *Load {
	l := &Load{start: time.Now()}
	var err, err2 error
	l.cpus, err = CPUs()
	l.busy, err2 = busy(l.cpus)
	l.own = own()
	l.invalid = err != nil || err2 != nil
	return l
}

// Foreign returns which share of the processors' time since StartLoad others took, 0 to 1, or -1 where it cannot be told. What
// runs in this process and in its children that were waited for is not foreign, nor is what processes live among pids have
// used so far, which must have been started since; work that the kernel does in threads of its own is. The kernel counts in
// ticks of 10 ms: below a second the figure is rough.
func (l *Load) Foreign(pids ...int) float64 {
	took := time.Since(l.start)
	now, err := busy(l.cpus)
	if l.invalid || err != nil || took <= 0 {
		return -1
	}
	f := now - l.busy - (own() - l.own)
	for _, p := range pids {
		f -= processTime(p)
	}
	share := f.Seconds() / (took.Seconds() * float64(len(l.cpus)))
	return max(0, min(1, share))
}

// userHz is the unit of /proc/stat and /proc/PID/stat, in ticks a second: USER_HZ, the same on all Linux architectures that Go knows.
const userHz = 100

// busy returns how long processors have run anything: all but the columns idle and iowait of /proc/stat, proc(5). guest is in user
// already.
func busy(cpus []int) (time.Duration, error) {
	f, err := os.Open("/proc/stat")
	if err != nil {
		return 0, err
	}
	defer f.Close()
	want := map[string]bool{}
	for _, c := range cpus {
		want["cpu"+strconv.Itoa(c)] = true
	}
	ticks := int64(0)
	sc := bufio.NewScanner(f)
	sc.Buffer(nil, 1<<20) // the line of the interrupts is long
	for sc.Scan() {
		w := strings.Fields(sc.Text())
		if len(w) == 0 || !want[w[0]] {
			continue
		}
		for i, col := range w[1:] {
			if i == 3 || i == 4 || i > 7 {
				continue
			}
			n, err := strconv.ParseInt(col, 10, 64)
			if err != nil {
				return 0, fmt.Errorf("/proc/stat: %w", err)
			}
			ticks += n
		}
		delete(want, w[0])
	}
	if err := sc.Err(); err != nil {
		return 0, err
	}
	if len(want) > 0 {
		return 0, errors.New("/proc/stat does not have all processors")
	}
	return time.Duration(ticks) * (time.Second / userHz), nil
}

func own() (d time.Duration) {
	for _, who := range []int{unix.RUSAGE_SELF, unix.RUSAGE_CHILDREN} {
		var u unix.Rusage
		if unix.Getrusage(who, &u) == nil {
			d += time.Duration(u.Utime.Nano() + u.Stime.Nano())
		}
	}
	return d
}

// processTime returns the processor time of another process, 0 where it is gone.
func processTime(pid int) time.Duration {
	s := firstLine(fmt.Sprintf("/proc/%d/stat", pid))
	if i := strings.LastIndexByte(s, ')'); i >= 0 { // the name may have anything in it
		if w := strings.Fields(s[i+1:]); len(w) > 12 {
			u, _ := strconv.ParseInt(w[11], 10, 64)
			k, _ := strconv.ParseInt(w[12], 10, 64)
			return time.Duration(u+k) * (time.Second / userHz)
		}
	}
	return 0
}
