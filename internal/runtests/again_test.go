package main

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// onceTest is a package whose first test fails the first time.
const onceTest = `package p

import (
	"os"
	"testing"
)

func TestA(t *testing.T) {
	if _, err := os.Stat("a"); err != nil {
		os.WriteFile("a", nil, 0o600)
		t.Error("WHY")
	}
}
`

// TestAgain: a test that fails beside others and passes alone is told of and counts as passed; one that fails
// always, one whose bytes are corrupt once, and one of a program that did not reach its end, fail.
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
func TestBroken(t *testing.T) { t.Error("never works") }
`,
		// As package traffic says it.
		"c/c_test.go": strings.Replace(onceTest, "WHY", "tcp: data is corrupt: 5 of 4096 bytes", 1),
		// A later test takes the program down, without a word of its own.
		"d/d_test.go": strings.Replace(onceTest, "WHY", "1 of 30 lost", 1) + `
func TestZ(t *testing.T) {
	if _, err := os.Stat("z"); err != nil {
		os.WriteFile("z", nil, 0o600)
		os.Exit(1)
	}
}
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
	if want := (counts{passed: 2, failed: 1}); r.counts != want {
		t.Errorf("counted %v, want %v", r.counts, want)
	}
	if len(r.notes) != 1 || !strings.HasPrefix(r.notes[0], "UNSTEADY x TestUnsteady failed beside other tests") || !strings.Contains(r.notes[0], "1 of 30 lost") {
		t.Errorf("notes %q", r.notes)
	}
	if len(r.failures) != 1 || !strings.Contains(r.failures[0], "never works") {
		t.Errorf("failures %q", r.failures)
	}
	for pkg, want := range map[string]string{"c": "data is corrupt", "d": "1 of 30 lost"} {
		r := &run{ctx: context.Background(), log: io.Discard, out: newPrinter(null), again: true}
		r.goTest([]string{"GOFLAGS="}, "-count=1", modulePath+"/"+pkg)
		if all := strings.Join(r.failures, "\n"); r.failed == 0 || !strings.Contains(all, want) || len(r.notes) != 0 {
			t.Errorf("package %s: %v, failures %q, notes %q", pkg, r.counts, r.failures, r.notes)
		}
	}
}
