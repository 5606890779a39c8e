//go:build !race

package testboard_test

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"testing"
)

// TestSpin has spin search a model of the sleep protocol for lost wake-ups: there is none, and each step that is left out
// makes one. The model's queue has one descriptor here; by hand it takes two (spin/sleep.pml).
func TestSpin(t *testing.T) {
	for tool, from := range map[string]string{"spin": "spin", "gcc": "gcc libc6-dev"} {
		if _, err := exec.LookPath(tool); err != nil {
			if os.Getenv("CI") == "true" {
				t.Fatalf("%s is missing: apt-get install %s", tool, from)
			}
			t.Skipf("%s is missing: apt-get install %s", tool, from)
		}
	}
	model, err := filepath.Abs(filepath.Join("spin", "sleep.pml"))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name   string
		define []string
		lost   bool
	}{
		{"as it is", nil, false},
		{"no read-back", []string{"-DNO_READBACK", "-DPUSH=1"}, true},
		{"no read-back, window", []string{"-DNO_READBACK", "-DPUSH=0", "-DEVENT=1"}, false}, // there it is another read
		{"no second look", []string{"-DNO_RECHECK"}, true},
		{"no barrier before the suppression word is read", []string{"-DNO_FENCE_C", "-DPUSH=0"}, true},
		{"no barrier behind the suppression word", []string{"-DNO_FENCE_D", "-DPUSH=0"}, true},
		{"doorbell overtakes", []string{"-DOVERTAKE", "-DPUSH=1", "-DEVENT=1"}, true},
		{"completion overtakes", []string{"-DRELAXED", "-DPUSH=1"}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			run := func(name string, arg ...string) []byte {
				cmd := exec.CommandContext(t.Context(), name, arg...)
				cmd.Dir = dir
				out, err := cmd.CombinedOutput()
				if err != nil {
					t.Fatalf("%s: %v\n%s", cmd, err, out)
				}
				return out
			}
			run("spin", append(append([]string{"-DN=1"}, c.define...), "-a", model)...)
			level := "-O0" // the first error is soon found
			if !c.lost {
				level = "-O1"
			}
			run("gcc", level, "-w", "-DSAFETY", "-o", "pan", "pan.c")
			out := run(filepath.Join(dir, "pan"), "-m200000", "-w21")
			m := regexp.MustCompile(`errors: (\d+)`).FindSubmatch(out)
			if m == nil || bytes.Contains(out, []byte("max search depth too small")) || bytes.Contains(out, []byte("out of memory")) {
				t.Fatalf("the search is not complete:\n%s", out)
			}
			n, _ := strconv.Atoi(string(m[1]))
			if (n != 0) != c.lost || c.lost != bytes.Contains(out, []byte("invalid end state (at depth")) {
				t.Errorf("lost wake-ups found: %v, expected: %v\n%s", n != 0, c.lost, out)
			}
		})
	}
}
