package main

import (
	"fmt"
	"regexp"
	"strings"
)

// maxAgain bounds the tests of a stage that get a second chance: where more fail, the change is at fault, not the
// machine.
const maxAgain = 3

// grave are words of a failure that no load of the machine explains. Where a package prints one, none of its tests gets
// a second chance.
var grave = regexp.MustCompile(`DATA RACE|panic:|fatal error:|SIGSEGV|SIGBUS|exit status [02-9]|` +
	`[1-9]\d* corrupt|(?i:corrupt)"?: ?[1-9]|data is corrupt|not what was sent|came back (wrong|as)|\bdiffers?\b`)

// runAgain runs each test that failed beside others two more times alone. Tests of links run real programs against real
// time limits; on a machine that is busy with something else one of them fails now and then. A test that passes both
// times counts as passed, and the stage tells of it with its failure; one that does not has failed. Panics, data races, corrupt bytes,
// and packages that did not build or ran out of time are never excused.
func (r *run) runAgain(rep *report, env, args []string) {
	tests := rep.failedTests()
	if len(tests) == 0 || len(tests) > maxAgain {
		return
	}
	var flags []string
	for _, a := range args {
		if a != modulePath && !strings.HasPrefix(a, modulePath+"/") {
			flags = append(flags, a)
		}
	}
	for _, t := range tests {
		texts := rep.texts(t)
		if rep.died(t[0]) || grave.MatchString(rep.packageOutput(t[0])) {
			continue
		}
		short := strings.TrimPrefix(t[0], modulePath+"/") + " " + t[1]
		r.out.doing(short + ", again")
		a := append(append([]string{"test", "-json"}, flags...), "-count=2", "-failfast", "-run=^"+t[1]+"$", t[0])
		cmd := r.start(env, "go", a...)
		stdout, err := cmd.StdoutPipe()
		if err == nil {
			err = cmd.Start()
		}
		if err != nil {
			continue
		}
		second := newReport(r.log)
		second.read(stdout)
		if cmd.Wait() != nil || second.failed > 0 || second.passed == 0 {
			continue
		}
		rep.excuse(t)
		r.note("UNSTEADY %s failed beside other tests and passed twice alone:\n%s", short, firstLines(texts, 10))
	}
}

// died tells whether a package ended while a test of it ran.
func (p *report) died(pkg string) bool {
	for k := range p.open {
		if k[0] == pkg {
			return true
		}
	}
	return false
}

// packageOutput returns what a package said, but for its tests that passed.
func (p *report) packageOutput(pkg string) string {
	var all strings.Builder
	for k, b := range p.output {
		if k[0] == pkg {
			all.WriteString(b.String())
		}
	}
	return all.String()
}

// failedTests returns the top-level tests that failed, by package and name; nil where a package failed as a whole.
func (p *report) failedTests() [][2]string {
	var out [][2]string
	seen := map[[2]string]bool{}
	for _, k := range p.bad {
		if k[1] == "" {
			return nil
		}
		top := [2]string{k[0], topTest(k[1])}
		if !seen[top] {
			seen[top] = true
			out = append(out, top)
		}
	}
	return out
}

func topTest(name string) string {
	top, _, _ := strings.Cut(name, "/")
	return top
}

// texts returns what a top-level test and those of its subtests that failed said, the causes first.
func (p *report) texts(t [2]string) string {
	var all []string
	for _, k := range p.bad {
		if b := p.output[k]; k[0] == t[0] && topTest(k[1]) == t[1] && b != nil {
			if s := withoutFrame(b.String()); s != "" {
				all = append(all, fmt.Sprintf("%s\n%s", k[1], s))
			}
		}
	}
	return causeFirst(strings.Join(all, "\n"))
}

// excuse counts a top-level test and its subtests as passed.
func (p *report) excuse(t [2]string) {
	var bad [][2]string
	for _, k := range p.bad {
		if k[0] == t[0] && topTest(k[1]) == t[1] {
			p.failed--
			p.passed++
			p.unsteady++
		} else {
			bad = append(bad, k)
		}
	}
	p.bad = bad
}

func firstLines(text string, n int) string {
	l := strings.Split(text, "\n")
	if len(l) > n {
		l = l[:n]
	}
	return strings.Join(l, "\n")
}
