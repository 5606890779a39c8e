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
	st, out, errs := b.run("", "bench", "all", "--dir", dir, "--only", "ring-one,ring-window")
	if st != 0 || errs != "" || strings.Count(out, "== ") != 2 || !strings.Contains(out, "reads across") || !strings.Contains(out, dir) {
		t.Errorf("status %d: %s\n%s", st, errs, out)
	}
	for _, name := range []string{"ring-one", "ring-window"} {
		buf, err := os.ReadFile(filepath.Join(dir, name+".json"))
		if err != nil || !json.Valid(buf) {
			t.Errorf("%v: %s", err, buf)
		}
	}
	// A directory in the way of one result.
	if err := os.Mkdir(filepath.Join(dir, "ring-push.json"), 0o777); err != nil {
		t.Fatal(err)
	}
	st, out, errs = b.run("", "bench", "all", "--dir", dir, "--only", "ring-push,ring-one")
	lines := strings.Split(strings.TrimSpace(errs), "\n")
	if st != exitFail || len(lines) != 2 || !strings.Contains(lines[0], "ring-push.json") || !strings.Contains(lines[1], "ring-push (exit status 2)") || strings.Contains(lines[1], "ring-one") {
		t.Errorf("status %d: %q\n%s", st, errs, out)
	}
	st, out, errs = b.run("", "bench", "all", "--dir", dir, "--only", "ring-one", "--timeout", "1ns")
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
