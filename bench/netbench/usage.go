//go:build linux

package netbench

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// cpuTime returns the processor time of processes until now, threads that ended included, to the nanosecond.
func cpuTime(pids []int) (time.Duration, error) {
	var sum time.Duration
	for _, pid := range pids {
		// The clock of another process: the complement of its number, and CPUCLOCK_SCHED (clock_getcpuclockid(3)).
		var ts unix.Timespec
		if err := unix.ClockGettime(int32(^pid<<3|2), &ts); err != nil {
			return 0, fmt.Errorf("processor time of process %d: %w", pid, err)
		}
		sum += time.Duration(ts.Nano())
	}
	return sum, nil
}

// switches returns how many times the threads of processes were switched to another.
func switches(pids []int) (n uint64, err error) {
	for _, pid := range pids {
		tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
		if err != nil {
			return 0, err
		}
		for _, f := range tasks {
			b, err := os.ReadFile(f)
			if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
				continue // the thread has ended
			}
			if err != nil {
				return 0, err
			}
			for line := range bytes.Lines(b) {
				if k, v, _ := bytes.Cut(line, []byte(":")); bytes.HasSuffix(k, []byte("voluntary_ctxt_switches")) {
					m, err := strconv.ParseUint(string(bytes.TrimSpace(v)), 10, 64)
					if err != nil {
						return 0, fmt.Errorf("%s: %w", f, err)
					}
					n += m
				}
			}
		}
	}
	return n, nil
}
