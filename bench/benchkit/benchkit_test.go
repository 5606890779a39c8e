//go:build linux

package benchkit_test

import (
	"context"
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/boardlink/boardlink/bench/benchkit"
	"github.com/boardlink/boardlink/mmio"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func init() {
	benchkit.Register("echo", func(order []byte) (any, error) {
		var s string
		if err := json.Unmarshal(order, &s); err != nil {
			return nil, err
		}
		switch s {
		case "fail":
			return nil, errors.New("as ordered")
		case "die":
			os.Exit(7)
		case "stay":
			select {}
		}
		b, err := io.ReadAll(os.NewFile(benchkit.FirstFD, "file"))
		return s + string(b), err
	})
	// The other side of a line, in a process of its own.
	benchkit.Register("line", func(order []byte) (any, error) {
		b, err := unix.Mmap(benchkit.FirstFD, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			return nil, err
		}
		ram, _ := mmio.FromBytes(b).RAM()
		l := benchkit.NewLine(ram, false)
		if err := l.Meet(); err != nil {
			return nil, err
		}
		return l.RoundTrips(100)
	})
}

func TestMain(m *testing.M) {
	os.Setenv("GORACE", "atexit_sleep_ms=0") // of the peers: else a second each
	benchkit.Peer()
	goleak.VerifyTestMain(m)
}

func TestEnvironment(t *testing.T) {
	e, err := benchkit.Look([2]int{})
	if err != nil {
		t.Fatal(err)
	}
	cpus, err := benchkit.CPUs()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := time.Parse(time.RFC3339, e.Date); err != nil {
		t.Error(err)
	}
	if e.CPU == "" || len(e.CPUs) != len(cpus) || e.Machine < len(cpus) || e.Kernel == "" || !strings.Contains(e.Go, "linux/") || e.Load == "" || e.HugeKiB < 0 {
		t.Errorf("%+v", e)
	}
	if len(cpus) == 1 && e.RoundTripNS != 0 || e.RoundTripNS < 0 || (e.RoundTripNS > 0) != (e.Distance != "") || e.Foreign != -1 {
		t.Errorf("%+v", e)
	}
	e.Finish()
	if e.Foreign < 0 || e.Foreign > 1 {
		t.Errorf("foreign processor time %v", e.Foreign)
	}
	e.Finish() // has no effect
	if s := e.String(); strings.Count(s, "\n") != 1 || !strings.Contains(s, e.Kernel) || !strings.Contains(s, "processor") {
		t.Errorf("%q", s)
	}
	b, err := json.Marshal(e)
	var back benchkit.Environment
	if err == nil {
		err = json.Unmarshal(b, &back)
	}
	if err != nil || back.RoundTripNS != e.RoundTripNS || back.Kernel != e.Kernel || back.Pair != e.Pair {
		t.Errorf("%v: %s", err, b)
	}
}

func TestForeign(t *testing.T) {
	l := benchkit.StartLoad()
	// Own work is not foreign: with nothing taken off, it would be one processor of all.
	for start := benchkit.ProcessCPU(); benchkit.ProcessCPU()-start < 100*time.Millisecond; {
	}
	if f := l.Foreign(1 << 30); f < 0 || f > 1 {
		t.Errorf("%v", f)
	}
}

func TestParsePair(t *testing.T) {
	cpus, err := benchkit.CPUs()
	if err != nil {
		t.Fatal(err)
	}
	if p, err := benchkit.ParsePair("-1,-1"); err != nil || p != ([2]int{-1, -1}) {
		t.Errorf("%v, %v", p, err)
	}
	c := strings.TrimSpace(string(must(json.Marshal(cpus[0]))))
	if p, err := benchkit.ParsePair(c + "," + c); err != nil || p != ([2]int{cpus[0], cpus[0]}) {
		t.Errorf("%v, %v", p, err)
	}
	for _, s := range []string{"", "0", "a,b", "0,", "0,1,2", "-2,0", "99999,0"} {
		if p, err := benchkit.ParsePair(s); err == nil {
			t.Errorf("%q: %v", s, p)
		}
	}
}

func must(b []byte, err error) []byte {
	if err != nil {
		panic(err)
	}
	return b
}

func TestProcess(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	run := func(order string) (string, error) {
		t.Helper()
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		p, err := benchkit.Start(ctx, "echo", order, []*os.File{r}, nil)
		r.Close()
		if err != nil {
			t.Fatal(err)
		}
		w.WriteString(", and the file")
		w.Close()
		var s string
		err = p.Wait(&s)
		return s, err
	}
	if s, err := run("hello"); err != nil || s != "hello, and the file" {
		t.Errorf("%q, %v", s, err)
	}
	if _, err := run("fail"); err == nil || err.Error() != "as ordered" {
		t.Error(err)
	}
	if _, err := run("die"); err == nil || !strings.Contains(err.Error(), "exit status 7") {
		t.Error(err)
	}
	p, err := benchkit.Start(ctx, "echo", "stay", nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	p.Stop()
	if err := p.Wait(nil); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Error(err)
	}
	if p, err = benchkit.Start(ctx, "nobody", 0, nil, nil); err != nil {
		t.Fatal(err)
	}
	if err := p.Wait(nil); err == nil || !strings.Contains(err.Error(), "no role") {
		t.Error(err)
	}
	for _, c := range []string{"/bin/true", "/bin/false"} {
		if p, err = benchkit.Start(ctx, "echo", 0, nil, []string{c}); err != nil {
			t.Fatal(err)
		}
		if err := p.Wait(nil); err == nil {
			t.Errorf("%s has an answer", c)
		}
	}
	if _, err := benchkit.Start(ctx, "echo", 0, nil, []string{"/nonexistent"}); err == nil {
		t.Error("a program that is not there")
	}
	t.Setenv(benchkit.EnvPeer, "echo:")
	if _, err := benchkit.Start(ctx, "echo", "stay", nil, nil); err == nil {
		t.Error("a peer has started a peer")
	}
}

func TestLine(t *testing.T) {
	fd, err := unix.MemfdCreate("line", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "memory")
	defer f.Close()
	if err := f.Truncate(4096); err != nil {
		t.Fatal(err)
	}
	b, err := unix.Mmap(fd, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(b)
	p, err := benchkit.Start(context.Background(), "line", 0, []*os.File{f}, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Stop()
	ram, _ := mmio.FromBytes(b).RAM()
	l := benchkit.NewLine(ram, true)
	stop := errors.New("the other side has gone")
	l.Late = func() error {
		select {
		case <-p.Gone():
			return stop
		default:
			return nil
		}
	}
	if err := l.Meet(); err != nil {
		t.Fatal(err)
	}
	ns, err := l.RoundTrips(100)
	var theirs float64
	if werr := p.Wait(&theirs); werr != nil {
		t.Fatal(werr)
	}
	if err != nil || ns <= 0 || theirs <= 0 {
		t.Errorf("%v and %v ns, %v", ns, theirs, err)
	}
	if err := l.Meet(); err != stop {
		t.Errorf("alone: %v", err)
	}
}

func TestStats(t *testing.T) {
	for _, c := range []struct {
		v    []float64
		want float64
	}{{nil, 0}, {[]float64{3}, 3}, {[]float64{4, 1}, 2.5}, {[]float64{9, 1, 2}, 2}} {
		if m := benchkit.Median(c.v); m != c.want {
			t.Errorf("median of %v: %v", c.v, m)
		}
	}
	if s := benchkit.SpreadOf([]float64{3, 1, 2}); s != (benchkit.Spread{Median: 2, Min: 1, Max: 3, N: 3}) {
		t.Errorf("%+v", s)
	}
	h := benchkit.NewHistogram()
	if h.Latency() != (benchkit.Latency{}) {
		t.Error("an empty histogram")
	}
	for i := 1; i <= 1000; i++ {
		h.Record(time.Duration(i))
	}
	l := h.Latency()
	if l.Count != 1000 || l.P50 != 500 || l.P99 != 990 || l.P999 != 999 || l.Min != 1 || l.Max != 1000 || l.Mean < 500 || l.Mean > 501 {
		t.Errorf("%+v", l)
	}
	h.Record(-1)
	h.Record(time.Hour)
	if l := h.Latency(); l.Count != 1002 {
		t.Errorf("%+v", l)
	}
	if n := testing.AllocsPerRun(100, func() { h.Record(12345) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestPlot(t *testing.T) {
	for _, linear := range []bool{false, true} {
		p := benchkit.Plot{Title: "a < b & c", X: "size", Linear: linear, Limits: []benchkit.PlotLimit{{Y: 0.15, Text: "aim"}},
			Lines: []benchkit.PlotLine{{Name: "one", Points: []benchkit.PlotPoint{{1, 0.5}, {64, 0.2}}}, {Name: "two", Colour: 17, Dash: true, Points: []benchkit.PlotPoint{{2, 0.7}}}}}
		var b strings.Builder
		if err := p.Write(&b); err != nil {
			t.Fatal(err)
		}
		s := b.String()
		d := xml.NewDecoder(strings.NewReader(s))
		var err error
		for err == nil {
			_, err = d.Token()
		}
		if err != io.EOF || strings.Count(s, "<polyline") != 2 || strings.Count(s, `class="limit"`) != 1 || strings.Contains(s, "NaN") || strings.Contains(s, "Inf") || strings.Contains(s, `y="-`) {
			t.Errorf("%v:\n%s", err, s)
		}
	}
	for _, p := range []benchkit.Plot{{}, {Lines: []benchkit.PlotLine{{Points: []benchkit.PlotPoint{{1, 0}}}}}, {Lines: []benchkit.PlotLine{{Points: []benchkit.PlotPoint{{0, 1}}}}}} {
		if err := p.Write(io.Discard); err == nil {
			t.Errorf("%+v: drawn", p)
		}
	}
}
