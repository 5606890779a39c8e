package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/boardlink/boardlink/board/generic"
	"github.com/google/go-cmp/cmp"
)

// inTest runs a command inside the test: for commands that need no rights and end by themselves.
func inTest(args ...string) (status int, stdout, stderr string) {
	var o, e strings.Builder
	status = run(args, &o, &e)
	return status, o.String(), e.String()
}

// TestCheck: what is printed of good and bad files, and read by scripts.
func TestCheck(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	good := file("good.toml", "name = 'x'\n[host.window]\nbar = 1\n[agent.window]\nsize = 0x10000\n")
	half := file("half.toml", "[host.window]\nbar = 1\n")
	bad := file("bad.toml", "[host.window]\nbar = 9\noffset = 3\n[agent.window]\n")
	none := filepath.Join(dir, "none.toml")
	st, out, errs := inTest("check", good, half, bad, none, dir)
	want := "D/good.toml: ok: describes both ends, and they agree\n" +
		"D/half.toml: ok: describes the host's end; there is no [agent]\n" +
		"D/bad.toml:2: host.window.bar: 9: BARs are 0 to 5\n" +
		"D/bad.toml:3: host.window.offset: 0x3 is not a multiple of 8\n" +
		"D/bad.toml:4: agent.window.size: is missing: a multiple of 0x1000 from 0x10000 on\n" +
		"D/none.toml: cannot be read: no such file or directory\n" +
		"D: cannot be read: is a directory\n"
	if d := cmp.Diff(want, strings.Replace(out, dir, "D", -1)); st != 2 || errs != "" || d != "" {
		t.Errorf("status %d, %q:\n%s", st, errs, d)
	}
	if st, out, errs := inTest("check", good, half); st != 0 || errs != "" || strings.Count(out, "\n") != 2 {
		t.Errorf("good files: status %d, %q, %q", st, out, errs)
	}
	st, out, errs = inTest("check", "--json", good, bad)
	var v []checked
	if err := json.Unmarshal([]byte(out), &v); err != nil || st != 2 || errs != "" || len(v) != 2 {
		t.Fatalf("status %d, %v: %q, %q", st, err, out, errs)
	}
	if d := cmp.Diff(checked{File: good, OK: true, Name: "x", Sides: []string{"host", "agent"}, Problems: []generic.Problem{}}, v[0]); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff(generic.Problem{Line: 2, Key: "host.window.bar", Reason: "9: BARs are 0 to 5"}, v[1].Problems[0]); v[1].OK || len(v[1].Problems) != 3 || d != "" {
		t.Error(v[1], d)
	}
}

// TestSamples: each is named, and good; its CHANGE marks and nothing else are what a user fills in.
func TestSamples(t *testing.T) {
	names := strings.Split(sampleNames(), ", ")
	if len(names) != 3 {
		t.Errorf("%v", names)
	}
	for _, n := range names {
		st, text, errs := inTest("check", "--sample", n)
		if st != 0 || errs != "" || !strings.Contains(text, "CHANGE") {
			t.Fatalf("%s: status %d, %q", n, st, errs)
		}
		c, problems := generic.Check([]byte(text))
		if problems != nil || c.Host == nil || c.Agent == nil {
			t.Errorf("%s: %v", n, problems)
		}
	}
	for _, bad := range [][]string{{"check"}, {"check", "--sample", "none"}, {"check", "--sample", "polled", "x.toml"}} {
		if st, out, errs := inTest(bad...); st != 2 || out != "" || strings.Count(errs, "\n") != 1 {
			t.Errorf("%v: status %d, %q, %q", bad, st, out, errs)
		}
	}
}

// TestDoctorReadsTheFile: a description at fault is told of before the function, which may not even be there.
func TestDoctorReadsTheFile(t *testing.T) {
	bad := filepath.Join(t.TempDir(), "bad.toml")
	if err := os.WriteFile(bad, []byte("[host.window]\nbar = 9\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, spec := range []string{"generic:" + bad, "generic:" + bad + "@0000:ff:1f.7"} {
		st, _, errs := inTest("doctor", "--json", spec)
		if st != 2 || !strings.Contains(errs, "line 2: host.window.bar: 9: BARs are 0 to 5") || strings.Count(errs, "\n") != 1 {
			t.Errorf("%s: status %d, %q", spec, st, errs)
		}
	}
}
