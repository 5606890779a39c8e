package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/alecthomas/kong"
)

// TestBenchAll: results in files; one that cannot run leaves the others alone, and is told in the end.
func TestBenchAll(t *testing.T) {
	needTwoCPUs(t)
	b := newBox(t)
	dir := filepath.Join(t.TempDir(), "x", "y")
	// The one in which the sides wait for each other least: where others take their processors, the others take minutes.
	st, out, errs := b.run("", "bench", "all", "--dir", dir, "--only", "ring-window")
	if st != 0 || errs != "" || strings.Count(out, "== ") != 1 || !strings.Contains(out, "reads across") || !strings.Contains(out, dir) {
		t.Errorf("status %d: %s\n%s", st, errs, out)
	}
	result := func() {
		t.Helper()
		buf, err := os.ReadFile(filepath.Join(dir, "ring-window.json"))
		if err != nil || !json.Valid(buf) {
			t.Errorf("%v: %s", err, buf)
		}
	}
	result()
	// Directories in the way of two results: what comes between them is measured all the same.
	if err := os.Remove(filepath.Join(dir, "ring-window.json")); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"ring-one.json", "ring-push.json"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o777); err != nil {
			t.Fatal(err)
		}
	}
	st, out, errs = b.run("", "bench", "all", "--dir", dir, "--only", "ring-one,ring-push,ring-window")
	lines := strings.Split(strings.TrimSpace(errs), "\n")
	if st != exitFail || len(lines) != 3 || strings.Count(out, "== ") != 3 || !strings.Contains(lines[0], "ring-one.json") || !strings.Contains(lines[1], "ring-push.json") ||
		!strings.Contains(lines[2], "ring-one (exit status 2), ring-push (exit status 2)") || strings.Contains(lines[2], "ring-window") {
		t.Errorf("status %d: %q\n%s", st, errs, out)
	}
	result()
	st, out, errs = b.run("", "bench", "all", "--dir", dir, "--only", "ring-window", "--timeout", "1ns")
	if st != exitFail || !strings.Contains(errs, "took more than 1ns") {
		t.Errorf("status %d: %q\n%s", st, errs, out)
	}
	for _, bad := range []string{"--only moon", "--timeout 0s", "--dir /proc/nothing"} {
		st, out, errs := b.run("", append([]string{"bench", "all"}, strings.Fields(bad)...)...)
		if st != exitUsage || out != "" || strings.Count(errs, "\n") != 1 {
			t.Errorf("%s: status %d, %q, %q", bad, st, out, errs)
		}
	}
}

// TestBenchAllCommands: what the list says is understood.
func TestBenchAllCommands(t *testing.T) {
	b := newBox(t)
	st, out, errs := b.run("", "bench", "all", "--list")
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if st != 0 || errs != "" || len(lines) != len(allBenchmarks) {
		t.Fatalf("status %d: %s\n%s", st, errs, out)
	}
	for _, l := range lines {
		var c struct {
			Bench benchCmd `cmd:""`
		}
		p, err := kong.New(&c, vars())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := p.Parse(strings.Fields(l)[1:]); err != nil {
			t.Errorf("%s: %v", l, err)
		}
	}
}
