package main

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestAgain: a test that fails beside others and passes alone is told of and counts as passed; one that fails
// always, and one whose bytes are corrupt once, fail.
func TestAgain(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"go.mod": "module " + modulePath + "\n\ngo 1.21\n",
		"x/x_test.go": `package x

import (
	"os"
	"testing"
)

func once(t *testing.T, name, why string) {
	if _, err := os.Stat(name); err != nil {
		os.WriteFile(name, nil, 0o600)
		t.Error(why)
	}
}

func TestUnsteady(t *testing.T) { t.Run("sub", func(t *testing.T) { once(t, "a", "1 of 30 lost, 0 corrupt") }) }
func TestCorrupt(t *testing.T)  { once(t, "b", "0 of 30 lost, 2 corrupt") }
func TestBroken(t *testing.T)   { t.Error("never works") }
`} {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Chdir(dir)
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	r := &run{ctx: context.Background(), log: io.Discard, out: newPrinter(null), again: true}
	r.goTest([]string{"GOFLAGS="}, "-count=1", modulePath+"/x")
	if want := (counts{passed: 2, failed: 2}); r.counts != want {
		t.Errorf("counted %v, want %v", r.counts, want)
	}
	if len(r.notes) != 1 || !strings.HasPrefix(r.notes[0], "UNSTEADY x TestUnsteady failed beside other tests") || !strings.Contains(r.notes[0], "1 of 30 lost") {
		t.Errorf("notes %q", r.notes)
	}
	if all := strings.Join(r.failures, "\n"); len(r.failures) != 2 || !strings.Contains(all, "2 corrupt") || !strings.Contains(all, "never works") {
		t.Errorf("failures %q", r.failures)
	}
}
