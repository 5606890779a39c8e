package main

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/boardlink/boardlink/bench/diskbench"
	"github.com/boardlink/boardlink/trial/netns/netnstest"
)

// TestBenchDisk: the figures that scripts read, and the table.
func TestBenchDisk(t *testing.T) {
	netnstest.Need(t)
	if _, err := exec.LookPath("fio"); err != nil {
		const why = "fio is missing (Debian: apt-get install fio)"
		if os.Getenv("CI") == "true" {
			t.Fatal(why)
		}
		t.Skip(why)
	}
	b := newBox(t)
	save := filepath.Join(t.TempDir(), "x.json")
	st, out, errs := b.run("", "bench", "disk", "--rounds", "1", "--duration", "20ms", "--size", "4M", "--only", "read, 4 KiB, depth 32", "--paths", "boardlink,file", "--save", save)
	if st != 0 || errs != "" {
		t.Fatalf("status %d: %s\n%s", st, errs, out)
	}
	for _, want := range []string{"boardlink", "file", "random read, 4 KiB, depth 32", "p50 us", "fio-"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in the table:\n%s", want, out)
		}
	}
	saved, err := os.ReadFile(save)
	if err != nil {
		t.Fatal(err)
	}
	var r diskbench.Result
	if err := json.Unmarshal(saved, &r); err != nil {
		t.Fatal(err)
	}
	if len(r.Figures) != 1 || r.Figures[0].Unit != "IOPS" || r.Figures[0].Paths["boardlink"].Median <= 0 || r.Figures[0].Paths["file"].Median <= 0 || r.Figures[0].OfQEMU != nil {
		t.Errorf("%+v", r.Figures)
	}
}
