package main

import (
	"io"
	"strings"
	"testing"
)

// events is what go 1.26 test -json says of a package that has a passing test, a
// subtest that fails, a skipped test, and of a package that does not build.
const events = `{"Action":"start","Package":"github.com/boardlink/boardlink/a"}
{"Action":"run","Package":"github.com/boardlink/boardlink/a","Test":"TestGood"}
{"Action":"output","Package":"github.com/boardlink/boardlink/a","Test":"TestGood","Output":"--- PASS: TestGood (0.00s)\n"}
{"Action":"pass","Package":"github.com/boardlink/boardlink/a","Test":"TestGood","Elapsed":0}
{"Action":"run","Package":"github.com/boardlink/boardlink/a","Test":"TestBad"}
{"Action":"run","Package":"github.com/boardlink/boardlink/a","Test":"TestBad/sub"}
{"Action":"output","Package":"github.com/boardlink/boardlink/a","Test":"TestBad/sub","Output":"    a_test.go:7: descriptor 3 is wrong\n"}
{"Action":"fail","Package":"github.com/boardlink/boardlink/a","Test":"TestBad/sub","Elapsed":0}
{"Action":"fail","Package":"github.com/boardlink/boardlink/a","Test":"TestBad","Elapsed":0}
{"Action":"run","Package":"github.com/boardlink/boardlink/a","Test":"TestSkip"}
{"Action":"output","Package":"github.com/boardlink/boardlink/a","Test":"TestSkip","Output":"    a_test.go:9: needs /dev/net/tun\n"}
{"Action":"skip","Package":"github.com/boardlink/boardlink/a","Test":"TestSkip","Elapsed":0}
{"Action":"output","Package":"github.com/boardlink/boardlink/a","Output":"FAIL\n"}
{"Action":"output","Package":"github.com/boardlink/boardlink/a","Output":"FAIL\tgithub.com/boardlink/boardlink/a\t0.001s\n"}
{"Action":"fail","Package":"github.com/boardlink/boardlink/a","Elapsed":0.001}
{"ImportPath":"github.com/boardlink/boardlink/b [b.test]","Action":"build-output","Output":"b/b.go:3:1: undefined: x\n"}
{"ImportPath":"github.com/boardlink/boardlink/b [b.test]","Action":"build-fail"}
{"Action":"start","Package":"github.com/boardlink/boardlink/b"}
{"Action":"output","Package":"github.com/boardlink/boardlink/b","Output":"FAIL\tgithub.com/boardlink/boardlink/b [build failed]\n"}
{"Action":"fail","Package":"github.com/boardlink/boardlink/b","Elapsed":0,"FailedBuild":"github.com/boardlink/boardlink/b [b.test]"}
{"Action":"run","Package":"github.com/boardlink/boardlink/c","Test":"TestPanic"}
{"Action":"output","Package":"github.com/boardlink/boardlink/c","Test":"TestPanic","Output":"panic: out of range\n"}
{"Action":"output","Package":"github.com/boardlink/boardlink/c","Output":"FAIL\tgithub.com/boardlink/boardlink/c\t0.001s\n"}
{"Action":"fail","Package":"github.com/boardlink/boardlink/c","Elapsed":0.001}
no event at all
`

func TestReport(t *testing.T) {
	rep := newReport(io.Discard)
	var pkgLines []string
	rep.onPackage = func(l string) { pkgLines = append(pkgLines, l) }
	rep.read(strings.NewReader(events))

	if want := (counts{passed: 1, failed: 4, skipped: 1}); rep.counts != want {
		t.Errorf("counted %v, want %v", rep.counts, want)
	}
	if got := rep.String(); got != "1 passed, 4 failed, 1 skipped" {
		t.Errorf("last line is %q", got)
	}
	if len(pkgLines) != 3 {
		t.Errorf("package lines: %q, want 3", pkgLines)
	}
	if len(rep.skips) != 1 || rep.skips[0] != "a TestSkip: needs /dev/net/tun" {
		t.Errorf("skips: %q", rep.skips)
	}
	all := strings.Join(rep.failures(), "\n")
	for _, want := range []string{"a TestBad/sub", "descriptor 3 is wrong", "undefined: x", "panic: out of range"} {
		if !strings.Contains(all, want) {
			t.Errorf("failures lack %q:\n%s", want, all)
		}
	}
}

func TestLinesOfAnyLength(t *testing.T) {
	long := strings.Repeat("x", 1<<20)
	l := newLines(strings.NewReader("a\n" + long + "\n\nend"))
	var got []string
	for l.next() {
		got = append(got, string(l.line))
	}
	if len(got) != 4 || got[0] != "a" || got[1] != long || got[2] != "" || got[3] != "end" {
		t.Errorf("read %d lines", len(got))
	}
}

func TestChoose(t *testing.T) {
	all := []stage{{name: "a"}, {name: "b"}, {name: "c"}}
	got, err := choose(all, "c, a")
	if err != nil || len(got) != 2 || got[0].name != "a" || got[1].name != "c" {
		t.Errorf("choose: %v, %v", got, err)
	}
	if _, err := choose(all, "a,nosuch"); err == nil {
		t.Error("an unknown stage is accepted")
	}
}

// TestRows: idle stages run beside the others, in a row of their own; where there is nothing else they are the only row.
func TestRows(t *testing.T) {
	a, b, c := stage{name: "a", idle: true}, stage{name: "b"}, stage{name: "c", idle: true}
	first, beside := rows([]stage{a, b, c})
	if len(first) != 1 || first[0].name != "b" || len(beside) != 2 || beside[1].name != "c" {
		t.Errorf("rows: %v beside %v", first, beside)
	}
	if first, beside = rows([]stage{a, c}); len(first) != 2 || beside != nil {
		t.Errorf("rows of idle stages: %v beside %v", first, beside)
	}
}

// TestIdle: what an idle stage starts has the scheduling policy SCHED_IDLE, and nothing else has it afterwards.
func TestIdle(t *testing.T) {
	r := &run{ctx: t.Context(), log: io.Discard, idle: true}
	policy := func() string {
		out, err := r.output(nil, "cat", "/proc/self/stat")
		if err != nil {
			t.Fatal(err)
		}
		return strings.Fields(out[strings.LastIndexByte(out, ')'):])[39]
	}
	if got := policy(); got != "5" {
		t.Errorf("the policy is %s, want 5 (SCHED_IDLE)", got)
	}
	if r.idle = false; policy() != "0" {
		t.Errorf("the policy of others is %s, want 0", policy())
	}
}

// TestToolsAreKnown: a stage that needs a tool nobody can install would never be skipped.
func TestToolsAreKnown(t *testing.T) {
	known := map[string]bool{}
	for _, x := range tools {
		known[x.name] = true
	}
	for _, s := range stages(0) {
		for _, n := range append(s.wants, s.needs...) {
			if !known[n] {
				t.Errorf("stage %s needs %q, which is not in the list of tools", s.name, n)
			}
		}
	}
}

// TestCauseFirst: what the test said stands before what the programs logged.
func TestCauseFirst(t *testing.T) {
	got := causeFirst("    l_test.go:1: time=2026 level=INFO msg=up\n    l_test.go:9: 3 of 30 lost\ntime=2026 level=WARN msg=down\nmore")
	want := "    l_test.go:9: 3 of 30 lost\nmore\n    l_test.go:1: time=2026 level=INFO msg=up\ntime=2026 level=WARN msg=down"
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// TestExcuse: a test that is taken back counts as passed with its subtests; a package that failed as a whole excuses
// none; grave words are found.
func TestExcuse(t *testing.T) {
	rep := newReport(io.Discard)
	rep.read(strings.NewReader(events))
	if got := rep.failedTests(); got != nil {
		t.Errorf("a package did not build, but the tests %q would be run again", got)
	}
	a := "github.com/boardlink/boardlink/a"
	rep = newReport(io.Discard)
	for _, l := range strings.Split(events, "\n") {
		if strings.Contains(l, "boardlink/a\"") {
			rep.read(strings.NewReader(l + "\n"))
		}
	}
	bad := [2]string{a, "TestBad"}
	if got := rep.failedTests(); len(got) != 1 || got[0] != bad {
		t.Fatalf("failed tests: %q", got)
	}
	if s := rep.texts(bad); !strings.Contains(s, "TestBad/sub\n    a_test.go:7: descriptor 3 is wrong") {
		t.Errorf("texts: %q", s)
	}
	rep.excuse(bad)
	if want := (counts{passed: 3, failed: 0, skipped: 1}); rep.counts != want || len(rep.failures()) != 0 {
		t.Errorf("counted %v, want %v; failures %q", rep.counts, want, rep.failures())
	}
	for _, s := range []string{"WARNING: DATA RACE", "panic: x", "0 of 30 lost, 3 corrupt", "{Corrupt:12}", `"corrupt": 3`, "ping 10.66.0.1: data is corrupt: 2 packets", "frame 7 is not what was sent", "the bytes at 0x10 differ"} {
		if !grave.MatchString(s) {
			t.Errorf("%q is excused", s)
		}
	}
	for _, s := range []string{"1 of 30 lost, 0 corrupt", "not within 20 s: link up", "{Corrupt:0}", `"corrupt": 0`, "exit status 1"} {
		if grave.MatchString(s) {
			t.Errorf("%q is not excused", s)
		}
	}
}
