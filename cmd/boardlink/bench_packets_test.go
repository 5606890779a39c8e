package main

import (
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/boardlink/boardlink/bench/benchkit"
)

// TestBenchPackets: the figures that scripts read, the table, and the plot.
func TestBenchPackets(t *testing.T) {
	if cpus, err := benchkit.CPUs(); err != nil || len(cpus) < 2 {
		if os.Getenv("CI") == "true" {
			t.Fatal("two processors are needed")
		}
		t.Skip("two processors are needed")
	}
	b := newBox(t)
	dir := t.TempDir()
	plot, save := filepath.Join(dir, "x.svg"), filepath.Join(dir, "x.json")
	quick := []string{"bench", "packets", "--duration", "2ms", "--runs", "2"}
	st, out, errs := b.run("", append(quick, "--json", "--size", "64,1500", "--plot", plot, "--save", save)...)
	if st != 0 || errs != "" {
		t.Fatalf("status %d: %s\n%s", st, errs, out)
	}
	var v map[string]any
	if err := json.Unmarshal([]byte(out), &v); err != nil {
		t.Fatalf("%v:\n%s", err, out)
	}
	results, _ := v["results"].([]any)
	if len(results) != 12 {
		t.Fatalf("%d results of 2 rings, 3 directions, 2 sizes", len(results))
	}
	for i, r := range results {
		for _, name := range []string{"mpps.median", "gbit_per_s", "round_trip_ns", "bytes", "frames"} {
			if number(t, r, name) <= 0 {
				t.Errorf("result %d: %s is not above 0", i, name)
			}
		}
		if number(t, r, "corrupt") != 0 {
			t.Errorf("result %d: corrupt frames", i)
		}
	}
	if number(t, results[4], "latency.p50_ns") <= 0 || number(t, v, "environment.machine_cpus") <= 0 {
		t.Errorf("%v", results[4])
	}
	if saved, err := os.ReadFile(save); err != nil || string(saved) != out {
		t.Errorf("--save: %v\n%s", err, saved)
	}
	svg, err := os.ReadFile(plot)
	if err != nil {
		t.Fatal(err)
	}
	d := xml.NewDecoder(strings.NewReader(string(svg)))
	for err = nil; err == nil; _, err = d.Token() {
	}
	if err != io.EOF || strings.Count(string(svg), "<polyline") != 6 {
		t.Errorf("the plot: %v, %d lines", err, strings.Count(string(svg), "<polyline"))
	}

	st, out, errs = b.run("", append(quick, "--size", "64-1514", "--ring", "split", "--placement", "push", "--memory", "write-combining", "--verify", "--sleep")...)
	if st != 0 || errs != "" || !strings.Contains(out, "64-1514") || !strings.Contains(out, "p99.9 us") || !strings.Contains(out, "every byte") {
		t.Errorf("status %d: %s\n%s", st, errs, out)
	}
	bad := [][]string{{"--size", "x"}, {"--size", "63"}, {"--size", "64-"}, {"--size", "100-64"}, {"--size", "70000"}, {"--batch", "0"}, {"--batch", "300"}, {"--queue-size", "100"},
		{"--direction", "x"}, {"--cpu", "0,0"}, {"--cpu", "x"}, {"--duration", "1h"}, {"--duration", "0s"}, {"--runs", "0"}, {"--plot", "/nonexistent/x.svg"},
		{"--dpdk", "--sleep"}, {"--dpdk", "--size", "64-1500"}, {"--dpdk", "--placement", "push"}, {"--dpdk", "--turns", "0"},
		{"--ours", "device"}, {"--dpdk", "--ours", "x"}, {"--dpdk", "--ours", "driver", "--size", "64,2000"}}
	if _, err := exec.LookPath("dpdk-testpmd"); errors.Is(err, exec.ErrNotFound) {
		bad = append(bad, []string{"--dpdk", "--duration", "2ms"})
	}
	for _, args := range bad {
		st, out, errs := b.run("", append([]string{"bench", "packets"}, args...)...)
		if st != 2 || out != "" || errs == "" || strings.Count(strings.TrimSpace(errs), "\n") != 0 {
			t.Errorf("%v: status %d, %q, %q", args, st, out, errs)
		}
	}
}
