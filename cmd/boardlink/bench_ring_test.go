package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/boardlink/boardlink/bench/benchkit"
)

// needTwoCPUs skips where there is one processor for both sides.
func needTwoCPUs(t *testing.T) {
	t.Helper()
	cpus, err := benchkit.CPUs()
	if err != nil {
		t.Fatal(err)
	}
	if len(cpus) < 2 {
		if os.Getenv("CI") == "true" {
			t.Fatal("two processors are needed")
		}
		t.Skip("two processors are needed")
	}
}

// TestBenchRing: the figures that scripts read, the table, the sweep.
func TestBenchRing(t *testing.T) {
	needTwoCPUs(t)
	b := newBox(t)
	plot, save := filepath.Join(t.TempDir(), "x.svg"), filepath.Join(t.TempDir(), "x.json")
	few := []string{"bench", "ring", "--buffers", "1000", "--runs", "2"}
	st, out, errs := b.run("", append(few, "--placement", "window", "--memory", "uncached", "--sleep", "--json", "--save", save)...)
	if st != 0 || errs != "" {
		t.Fatalf("status %d: %s\n%s", st, errs, out)
	}
	var v map[string]any
	if err := json.Unmarshal([]byte(out), &v); err != nil {
		t.Fatalf("%v:\n%s", err, out)
	}
	if saved, err := os.ReadFile(save); err != nil || string(saved) != out {
		t.Errorf("what was saved is not what was printed: %v", err)
	}
	results, _ := v["results"].([]any)
	if len(results) != 2 {
		t.Fatalf("%d results", len(results))
	}
	for i, ring := range []string{"split", "packed"} {
		r := results[i]
		for _, name := range []string{"ns_per_buffer", "round_trip_ns", "round_trips_per_buffer", "device_bus.reads", "device_bus.writes"} {
			if number(t, r, name) <= 0 {
				t.Errorf("%s: %s is not above 0", ring, name)
			}
		}
		if m := r.(map[string]any); m["ring"] != ring || len(m["runs"].([]any)) != 2 {
			t.Errorf("%s: %v", ring, m)
		}
	}
	if number(t, v, "environment.machine_cpus") < 2 {
		t.Error("one processor")
	}

	st, out, errs = b.run("", append(few, "--size", "16", "--batch", "4", "--ring", "packed", "--in-order", "--plot", plot)...)
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if st != 0 || len(lines) != 4+5 || len(lines[3]) != len(lines[8]) || !strings.Contains(lines[2], "in order") || strings.Contains(out, "split") {
		t.Errorf("status %d: %s\n%s", st, errs, out)
	}
	if svg, err := os.ReadFile(plot); err != nil || strings.Count(string(svg), "<polyline") != 2 {
		t.Errorf("%v: %s", err, svg)
	}
	for _, bad := range []string{"--ring round", "--placement moon", "--memory core", "--size 3", "--size 0", "--batch 0", "--batch -1", "--batch 257", "--outstanding 1", "--outstanding 300", "--runs 0", "--runs -1",
		"--buffers 1", "--cpu 0", "--cpu 0,0", "--cpu 0,9999", "--spins -1", "--save /nonexistent/x.json", "extra"} {
		st, out, errs := b.run("", append([]string{"bench", "ring"}, strings.Fields(bad)...)...)
		if st != exitUsage || out != "" || strings.Count(errs, "\n") != 1 {
			t.Errorf("%s: status %d, %q, %q", bad, st, out, errs)
		}
	}
}
