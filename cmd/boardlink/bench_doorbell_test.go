package main

import (
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"

	"github.com/boardlink/boardlink/board/loopback"
)

// TestBenchDoorbell: the figures that scripts read, the table, a board.
func TestBenchDoorbell(t *testing.T) {
	b := newBox(t)
	few := []string{"bench", "doorbell", "--duration", "2ms", "--on", "any", "--processes", "2"}
	st, out, errs := b.run("", append(few, "--json")...)
	if st != 0 || errs != "" {
		t.Fatalf("status %d: %s\n%s", st, errs, out)
	}
	var v map[string]any
	if err := json.Unmarshal([]byte(out), &v); err != nil {
		t.Fatalf("%v:\n%s", err, out)
	}
	results, _ := v["results"].([]any)
	if len(results) != 8 {
		t.Fatalf("%d results", len(results))
	}
	for _, r := range results {
		for _, name := range []string{"round_trip.p50_ns", "round_trip.p99_ns", "round_trip.p999_ns", "round_trip.count", "lead_cpu_ns"} {
			if number(t, r, name) <= 0 {
				t.Errorf("%v: %s is not above 0", r, name)
			}
		}
	}
	st, out, errs = b.run("", append(few, "--pause", "100us")...)
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if st != 0 || len(lines) != 4+8 || len(lines[3]) != len(lines[11]) || !strings.Contains(lines[3], "p99.9") {
		t.Errorf("status %d: %s\n%s", st, errs, out)
	}

	path := filepath.Join(t.TempDir(), "s")
	s, err := loopback.NewServer(loopback.ServerConfig{Path: path, Size: 1 << 20, Vectors: 1})
	if err != nil {
		t.Fatal(err)
	}
	go s.Serve()
	defer s.Close()
	// A ring that is late on a busy machine is told, and the status is 1.
	st, out, errs = b.run("", "bench", "doorbell", "loopback:"+path, "--rings", "50", "--json")
	if st != 0 && !strings.Contains(errs, "did not come back") {
		t.Fatalf("status %d: %s\n%s", st, errs, out)
	}
	if err := json.Unmarshal([]byte(out), &v); err != nil {
		t.Fatalf("%v:\n%s", err, out)
	}
	if number(t, v, "board.write.count") <= 0 || st == 0 && number(t, v, "board.loop.p50_ns") <= 0 {
		t.Errorf("%s", out)
	}
	for _, bad := range []string{"--duration 0", "--duration 1h", "--duration x", "--pause -1s", "--pause 100ms", "--spin 0s", "--spin 1m", "--rings 0", "--processes 3", "--on moon", "--cpu 0", "--cpu -1,-1",
		"--cpu 0,9999", "--save /nonexistent/x.json", "nokind:x", "ivshmem:0000:ff:1f.7"} {
		st, out, errs := b.run("", append([]string{"bench", "doorbell"}, strings.Fields(bad)...)...)
		if st == 0 || out != "" || strings.Count(errs, "\n") != 1 {
			t.Errorf("%s: status %d, %q, %q", bad, st, out, errs)
		}
		if strings.HasPrefix(bad, "--") && st != exitUsage {
			t.Errorf("%s: status %d", bad, st)
		}
	}
}
