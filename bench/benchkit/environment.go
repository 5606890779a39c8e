//go:build linux

// Package benchkit is what the benchmarks have in common: the environment they ran in, a cache line passed between two
// processors, foreign processor time, processes of their own as the other side, percentiles, plots.
//
// In the room: what says how a figure came to be. Never in it: what is measured, flags, testing.T.
package benchkit

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Environment is the machine as a benchmark found it. Figures of two runs compare only where it is the same: on a
// shared machine the round trip alone moves them several-fold.
type Environment struct {
	Date    string `json:"date"`            // of the start, RFC 3339, UTC
	Build   string `json:"build,omitempty"` // the version of the program, where the build knows it
	CPU     string `json:"cpu"`             // the model of the processor
	CPUs    []int  `json:"cpus"`            // that this process may use
	Machine int    `json:"machine_cpus"`    // that are on line
	Kernel  string `json:"kernel"`          // release
	Go      string `json:"go"`              // version, system, architecture
	// CommandLine has the words of the kernel's that bear on speed.
	CommandLine string `json:"command_line,omitempty"`
	CPUIdle     string `json:"cpuidle,omitempty"` // driver/governor
	CPUFreq     string `json:"cpufreq,omitempty"` // governor of the first processor used
	HugePages   int    `json:"huge_pages"`        // reserved, of the default size
	HugeKiB     int    `json:"huge_page_kib"`
	THP         string `json:"transparent_huge_pages,omitempty"`
	Load        string `json:"load"` // average of 1, 5 and 15 minutes, at the start
	// Pair are the two processors used. RoundTripNS is the time of a cache line between them, there and back, at the start; 0
	// where it could not be measured: there is but one, or it was taken. Distance says what that is: "near" (below 250 ns)
	// or "far".
	Pair        [2]int  `json:"pair"`
	RoundTripNS float64 `json:"round_trip_ns"`
	Distance    string  `json:"distance,omitempty"`
	// Foreign is the share of these processors' time that went to others during the run, 0 to 1; negative: not measured.
	Foreign float64 `json:"foreign_cpu"`

	load *Load
}

// nearNS separates neighbours that share a cache from those that do not, in nanoseconds of a round trip.
const nearNS = 250

// Disturbed is the share of foreign processor time (Environment.Foreign) above which a run is better repeated.
const Disturbed = 0.04

// speedy matches words of the kernel's command line that bear on speed.
var speedy = regexp.MustCompile(`^(mitigations|no?smt|isolcpus|nohz|nohz_full|rcu_nocbs|idle|preempt|tsc|clocksource|(default_)?huge(pages|pagesz)|transparent_hugepage|sched_\w+|nested_\w+|\w*iommu\w*|` +
	`processor\.\w+|intel_idle\.\w+|intel_pstate|amd_pstate|cpuidle[\w.]*|haltpoll[\w.]*|cpufreq[\w.]*)(=|$)`)

// Look returns the environment, and begins to watch for foreign processor time (until Finish). pair are the processors that will be
// used: both 0, or one below 0 (not pinned), stand for the first two that this process may use. It takes some
// milliseconds on a quiet machine, and less than half a second on any.
func Look(pair [2]int) (*Environment, error) {
	cpus, err := CPUs()
	if err != nil {
		return nil, err
	}
	if pair == ([2]int{}) || pair[0] < 0 || pair[1] < 0 {
		pair = [2]int{cpus[0], cpus[0]}
		if len(cpus) > 1 {
			pair[1] = cpus[1]
		}
	}
	e := &Environment{Date: time.Now().UTC().Format(time.RFC3339), Build: build(), CPU: cpuModel(), CPUs: cpus, Machine: runtime.NumCPU(),
		Go: runtime.Version() + " " + runtime.GOOS + "/" + runtime.GOARCH, Pair: pair, Foreign: -1}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return nil, fmt.Errorf("uname: %w", err)
	}
	e.Kernel = unix.ByteSliceToString(u.Release[:])
	var words []string
	for _, w := range strings.Fields(firstLine("/proc/cmdline")) {
		if speedy.MatchString(w) {
			words = append(words, w)
		}
	}
	e.CommandLine = strings.Join(words, " ")
	const cpu = "/sys/devices/system/cpu"
	if d := firstLine(cpu + "/cpuidle/current_driver"); d != "" {
		e.CPUIdle = d + "/" + firstLine(cpu+"/cpuidle/current_governor_ro")
	}
	e.CPUFreq = firstLine(filepath.Join(cpu, "cpu"+strconv.Itoa(pair[0]), "cpufreq/scaling_governor"))
	if on := firstLine(cpu + "/online"); on != "" {
		e.Machine = countList(on)
	}
	e.HugePages, e.HugeKiB = meminfo("HugePages_Total"), meminfo("Hugepagesize")
	if _, thp, ok := strings.Cut(firstLine("/sys/kernel/mm/transparent_hugepage/enabled"), "["); ok {
		e.THP, _, _ = strings.Cut(thp, "]")
	}
	if f := strings.Fields(firstLine("/proc/loadavg")); len(f) >= 3 {
		e.Load = strings.Join(f[:3], " ")
	}
	if pair[0] != pair[1] {
		// Where it cannot be measured, the rest is still worth telling.
		if ns, err := RoundTrip(pair[0], pair[1]); err == nil {
			e.RoundTripNS, e.Distance = ns, Distance(ns)
		}
	}
	e.load = StartLoad()
	return e, nil
}

// Distance calls a round trip of a cache line near or far.
func Distance(ns float64) string {
	switch {
	case ns <= 0:
		return ""
	case ns < nearNS:
		return "near"
	}
	return "far"
}

// Finish sets Foreign, to be called when all processes that were started have been waited for.
func (e *Environment) Finish() {
	if e.load != nil {
		e.Foreign = e.load.Foreign()
		e.load = nil
	}
}

// String is what a benchmark prints in front of its table: two lines.
func (e *Environment) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s  %s, %d of %d processors; Linux %s; %s; load %s", e.Date, e.CPU, len(e.CPUs), e.Machine, e.Kernel, e.Go, e.Load)
	if e.Build != "" {
		fmt.Fprintf(&b, "; boardlink %s", e.Build)
	}
	b.WriteByte('\n')
	var l []string
	switch {
	case e.RoundTripNS > 0:
		l = append(l, fmt.Sprintf("cache line between processors %d and %d: %.0f ns (%s)", e.Pair[0], e.Pair[1], e.RoundTripNS, e.Distance))
	case e.Pair[0] == e.Pair[1]:
		l = append(l, fmt.Sprintf("processor %d alone", e.Pair[0]))
	default:
		l = append(l, fmt.Sprintf("cache line between processors %d and %d: could not be measured", e.Pair[0], e.Pair[1]))
	}
	if e.Foreign >= 0 {
		s := fmt.Sprintf("others took %.1f %% of the processors", 100*e.Foreign)
		if e.Foreign > Disturbed {
			s += " (disturbed: repeat)"
		}
		l = append(l, s)
	}
	if e.CPUIdle != "" {
		l = append(l, "idle "+e.CPUIdle)
	}
	if e.CPUFreq != "" {
		l = append(l, "frequency "+e.CPUFreq)
	}
	l = append(l, fmt.Sprintf("%d hugepages of %d KiB", e.HugePages, e.HugeKiB))
	if e.CommandLine != "" {
		l = append(l, e.CommandLine)
	}
	b.WriteString(strings.Join(l, "; "))
	return b.String()
}

func build() string {
	bi, ok := debug.ReadBuildInfo()
	if !ok {
		return ""
	}
	for _, kv := range bi.Settings {
		if kv.Key == "vcs.revision" && len(kv.Value) >= 12 {
			return kv.Value[:12]
		}
	}
	return ""
}

// firstLine returns the first line of a file, "" where there is none.
func firstLine(name string) string {
	b, err := os.ReadFile(name)
	if err != nil {
		return ""
	}
	s, _, _ := strings.Cut(string(b), "\n")
	return strings.TrimSpace(s)
}

// countList counts what a list as "0-3,6" names.
func countList(s string) int {
	n := 0
	for _, r := range strings.Split(s, ",") {
		lo, hi, ok := strings.Cut(r, "-")
		a, err := strconv.Atoi(lo)
		if err != nil {
			continue
		}
		b := a
		if ok {
			if b, err = strconv.Atoi(hi); err != nil {
				continue
			}
		}
		n += b - a + 1
	}
	return n
}

// cpuModel returns what /proc/cpuinfo calls the processor: architectures have different words for it.
func cpuModel() string {
	f, err := os.Open("/proc/cpuinfo")
	if err != nil {
		return runtime.GOARCH
	}
	defer f.Close()
	var part string
	for sc := bufio.NewScanner(f); sc.Scan(); {
		k, v, _ := strings.Cut(sc.Text(), ":")
		switch strings.TrimSpace(k) {
		case "model name", "cpu", "cpu model", "uarch", "Processor":
			if v = strings.TrimSpace(v); v != "" {
				return v
			}
		case "CPU part":
			part = runtime.GOARCH + ", part " + strings.TrimSpace(v)
		}
	}
	if part != "" {
		return part
	}
	return runtime.GOARCH
}

// meminfo returns a figure of /proc/meminfo, 0 where it is not there.
func meminfo(name string) int {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0
	}
	for _, l := range strings.Split(string(b), "\n") {
		if k, v, ok := strings.Cut(l, ":"); ok && k == name {
			n, _, _ := strings.Cut(strings.TrimSpace(v), " ")
			i, _ := strconv.Atoi(n)
			return i
		}
	}
	return 0
}
