package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"sort"
	"strings"
	"syscall"
	"time"
	"unsafe"
)

// counts counts runs of tests. A test that runs in several stages counts in each.
type counts struct{ passed, failed, skipped int }

func (c *counts) add(d counts) {
	c.passed += d.passed
	c.failed += d.failed
	c.skipped += d.skipped
}

// String is the last line of the output, which CI reads.
func (c counts) String() string {
	return fmt.Sprintf("%d passed, %d failed, %d skipped", c.passed, c.failed, c.skipped)
}

// run is a stage under way.
type run struct {
	ctx  context.Context
	log  io.Writer
	out  *printer
	name string
	live bool // print go test's line of each package as it comes
	idle bool // its commands get the time that others leave to the processors
	// tellSkips lists the skipped tests with their reasons.
	tellSkips bool
	// again gives a test that failed beside others a second chance alone (see runAgain).
	again bool
	// onResult, if set, hears of what tests log as "result: ...".
	onResult func(text string)

	counts
	failures []string
	notes    []string
	said     string
	skipWhy  string
	pkgs     []pkg
	listed   bool
}

// failf makes the stage fail, with a text that is shown below its line.
func (r *run) failf(format string, args ...any) {
	r.failures = append(r.failures, fmt.Sprintf(format, args...))
}

// note adds a text that is shown below the stage's line.
func (r *run) note(format string, args ...any) {
	r.notes = append(r.notes, fmt.Sprintf(format, args...))
}

// say sets what stands on the stage's line, behind the time.
func (r *run) say(text string) { r.said = text }

func (r *run) detail() string {
	if r.said != "" {
		return r.said
	}
	if r.counts == (counts{}) {
		return ""
	}
	return r.counts.String()
}

// start prepares a command in a process group of its own, which is killed as a
// whole when the stage's time is over or the user interrupts.
func (r *run) start(env []string, name string, args ...string) *exec.Cmd {
	fmt.Fprintf(r.log, "$ %s\n", strings.Join(append(append(append([]string{}, env...), name), args...), " "))
	cmd := exec.CommandContext(r.ctx, name, args...)
	cmd.Env = append(os.Environ(), env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// begin starts a prepared command. A child has the scheduling policy of the thread that forks it, so that of an idle
// stage is forked by a thread that has SCHED_IDLE and ends then.
func (r *run) begin(cmd *exec.Cmd) error {
	if !r.idle {
		return cmd.Start()
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		const schedIdle = 5    // linux/sched.h
		var param struct{ priority int32 }
		if _, _, e := syscall.RawSyscall(syscall.SYS_SCHED_SETSCHEDULER, 0, schedIdle, uintptr(unsafe.Pointer(&param))); e != 0 {
			fmt.Fprintf(r.log, "SCHED_IDLE: %v; the commands run as others do\n", e)
		}
		done <- cmd.Start()
	}()
	return <-done
}

// wait starts a prepared command and waits for its end.
func (r *run) wait(cmd *exec.Cmd) error {
	if err := r.begin(cmd); err != nil {
		return err
	}
	return cmd.Wait()
}

// output runs a command and returns its standard output; everything goes to the log.
func (r *run) output(env []string, name string, args ...string) (string, error) {
	cmd := r.start(env, name, args...)
	var out, errOut bytes.Buffer
	cmd.Stdout = io.MultiWriter(&out, r.log)
	cmd.Stderr = io.MultiWriter(&errOut, r.log)
	err := r.wait(cmd)
	if err != nil {
		err = fmt.Errorf("%s: %w\n%s", name, err, strings.TrimSpace(errOut.String()))
	}
	return out.String(), err
}

// command runs a command that says nothing where all is well. It returns false, and
// makes the stage fail with the command's output, where the command fails.
func (r *run) command(env []string, name string, args ...string) bool {
	cmd := r.start(env, name, args...)
	var out bytes.Buffer
	w := io.MultiWriter(&out, r.log)
	cmd.Stdout, cmd.Stderr = w, w // one writer: the lines keep their order
	err := r.wait(cmd)
	if err == nil {
		return true
	}
	line := strings.Join(append(append([]string{}, env...), filepath.Base(name)), " ")
	if len(args) > 0 {
		line += " " + args[0]
	}
	r.failf("%s: %v\n%s", line, err, strings.TrimRight(out.String(), "\n"))
	return false
}

// pkg is a package of the project.
type pkg struct {
	path, rel, dir string
	tests          bool
	below          bool // below cmd/: floors 0 to 5
	// nets: its tests look at interfaces or namespaces, or start virtual machines.
	nets bool
}

// packages returns all packages of the project, broken ones too.
func (r *run) packages() []pkg {
	if r.listed {
		return r.pkgs
	}
	r.listed = true
	out, err := r.output(nil, "go", "list", "-e", "-f",
		"{{.ImportPath}}\t{{.Dir}}\t{{len .TestGoFiles}}\t{{len .XTestGoFiles}}\t{{.TestImports}} {{.XTestImports}}", "./...")
	if err != nil {
		r.failf("%v", err)
	}
	for _, line := range strings.Split(strings.TrimSpace(out), "\n") {
		f := strings.Split(line, "\t")
		if len(f) != 5 {
			continue
		}
		p := pkg{path: f[0], dir: f[1], tests: f[2] != "0" || f[3] != "0"}
		p.rel = strings.TrimPrefix(strings.TrimPrefix(p.path, modulePath), "/")
		top, _, _ := strings.Cut(p.rel, "/")
		switch top {
		case "cmd", "bench", "trial", "hwtest", "internal", "":
		default:
			p.below = true
		}
		p.nets = strings.Contains(f[4], "/trial/netns") || strings.Contains(f[4], "/hwtest/vm") || strings.Contains(f[4], "/netlink")
		r.pkgs = append(r.pkgs, p)
	}
	return r.pkgs
}

func (r *run) belowCmd() []string {
	var out []string
	for _, p := range r.packages() {
		if p.below {
			out = append(out, p.path)
		}
	}
	return out
}

// goFiles returns the Go files of the tree, those not yet committed too.
func goFiles(r *run) ([]string, error) {
	var files []string
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (path == ".git" || path == ".cache" || path == "bin" || d.Name() == "testdata") {
			return filepath.SkipDir
		}
		if d.Type().IsRegular() && strings.HasSuffix(path, ".go") {
			files = append(files, path)
		}
		return nil
	})
	return files, err
}

// goTestSome is goTest for packages that may not be there.
func (r *run) goTestSome(env []string, pkgs []string, args ...string) {
	if len(pkgs) > 0 {
		r.goTest(env, append(args, pkgs...)...)
	}
}

// goTest runs go test -json and counts.
func (r *run) goTest(env []string, args ...string) {
	cmd := r.start(env, "go", append([]string{"test", "-json"}, args...)...)
	var errOut bytes.Buffer
	cmd.Stderr = io.MultiWriter(&errOut, r.log)
	stdout, err := cmd.StdoutPipe()
	if err == nil {
		err = r.begin(cmd)
	}
	if err != nil {
		r.failf("go test: %v", err)
		return
	}
	rep := newReport(r.log)
	rep.onPackage = func(line string) {
		if r.live {
			r.out.plain(line)
		}
	}
	rep.onTest = func(pkg, test string) {
		r.out.doing(strings.TrimPrefix(pkg, modulePath+"/") + " " + test)
	}
	rep.onResult = r.onResult
	rep.read(stdout)
	err = cmd.Wait()
	if r.again {
		r.runAgain(rep, env, args)
	}

	r.counts.add(rep.counts)
	prefix := ""
	for _, e := range env {
		if a, ok := strings.CutPrefix(e, "GOARCH="); ok {
			prefix = a + ": "
		}
	}
	for _, f := range rep.failures() {
		r.failures = append(r.failures, prefix+f)
	}
	if err != nil && rep.failed == 0 && rep.unsteady == 0 {
		r.failf("%sgo test: %v\n%s", prefix, err, strings.TrimSpace(errOut.String()))
	}
	if r.tellSkips {
		for _, s := range rep.skips {
			r.note("skipped %s", s)
		}
	}
}

// event is a line of go test -json (go doc test2json, go help buildjson).
type event struct {
	Action      string
	Package     string
	Test        string
	Output      string
	ImportPath  string
	FailedBuild string
}

// report reads the events of go test -json.
type report struct {
	counts
	log       io.Writer
	onPackage func(line string)
	onTest    func(pkg, test string)
	onResult  func(text string) // nil: nobody

	output map[[2]string]*strings.Builder // by package and test
	build  map[string]*strings.Builder    // by ImportPath
	bad    [][2]string                    // failed tests and packages, as they came
	badPkg map[string]int                 // failed tests of each package
	broken map[string]string              // package -> ImportPath of the failed build
	skips  []string

	unsteady int                // failed tests that runAgain took back
	open     map[[2]string]bool // tests that have begun and not ended
}

func newReport(log io.Writer) *report {
	return &report{
		log:       log,
		onPackage: func(string) {},
		onTest:    func(string, string) {},
		output:    map[[2]string]*strings.Builder{},
		build:     map[string]*strings.Builder{},
		badPkg:    map[string]int{},
		open:      map[[2]string]bool{},
		broken:    map[string]string{},
	}
}

func (p *report) read(in io.Reader) {
	dec := newLines(in)
	for dec.next() {
		line := dec.line
		var e event
		if len(line) == 0 || line[0] != '{' || json.Unmarshal(line, &e) != nil {
			fmt.Fprintf(p.log, "%s\n", line)
			continue
		}
		p.take(e)
	}
}

// pkgLine is what go test says of a whole package.
var pkgLine = regexp.MustCompile(`^(ok  |FAIL|---|\?   )\t\S+`)

// resultLine is what a test logs for the table of make test-ports.
var resultLine = regexp.MustCompile(`^\s+\S+\.go:\d+: result: (.*)\n$`)

func (p *report) take(e event) {
	key := [2]string{e.Package, e.Test}
	switch e.Action {
	case "pass", "fail", "skip":
		delete(p.open, key)
	}
	switch e.Action {
	case "build-output":
		io.WriteString(p.log, e.Output)
		b := p.build[e.ImportPath]
		if b == nil {
			b = new(strings.Builder)
			p.build[e.ImportPath] = b
		}
		b.WriteString(e.Output)
	case "output":
		io.WriteString(p.log, e.Output)
		b := p.output[key]
		if b == nil {
			b = new(strings.Builder)
			p.output[key] = b
		}
		b.WriteString(e.Output)
		if p.onResult != nil {
			if m := resultLine.FindStringSubmatch(e.Output); m != nil {
				p.onResult(m[1])
			}
		}
		if e.Test == "" && pkgLine.MatchString(e.Output) {
			p.onPackage(strings.TrimRight(e.Output, "\n"))
		}
	case "run":
		p.open[key] = true
		p.onTest(e.Package, e.Test)
	case "pass":
		if e.Test != "" {
			p.passed++
			delete(p.output, key)
		}
	case "skip":
		if e.Test != "" {
			p.skipped++
			p.skips = append(p.skips, strings.TrimPrefix(e.Package, modulePath+"/")+" "+e.Test+": "+p.reason(key))
		}
	case "fail":
		if e.Test != "" {
			p.failed++
			p.badPkg[e.Package]++
			p.bad = append(p.bad, key)
			return
		}
		if p.badPkg[e.Package] == 0 {
			p.failed++ // did not build, panicked outside a test, ran into its timeout
			p.broken[e.Package] = e.FailedBuild
			p.bad = append(p.bad, key)
		}
	}
}

// reasonLine is how testing prints a log line: indented, file, line, text.
var reasonLine = regexp.MustCompile(`(?m)^\s+\S+\.go:\d+: (.*)$`)

// reason returns the last thing that a test said.
func (p *report) reason(key [2]string) string {
	if b := p.output[key]; b != nil {
		if m := reasonLine.FindAllStringSubmatch(b.String(), -1); m != nil {
			return m[len(m)-1][1]
		}
	}
	return "no reason given"
}

// failures returns a text for each failed test, with its output.
func (p *report) failures() []string {
	var out []string
	seen := map[string]bool{}
	same := map[string]int{} // text -> index in out
	for _, key := range p.bad {
		name := strings.TrimPrefix(key[0], modulePath+"/")
		if key[1] != "" {
			name += " " + key[1]
		}
		var text string
		if b := p.output[key]; b != nil {
			text = b.String()
		}
		if ip := p.broken[key[0]]; key[1] == "" && ip != "" {
			if seen[ip] {
				continue // one broken package breaks many: say it once
			}
			seen[ip] = true
			if b := p.build[ip]; b != nil {
				text = b.String()
			}
		} else if key[1] == "" {
			// A panic or a timeout ends the binary inside a test, whose output has it.
			for _, k := range p.unfinished(key[0]) {
				text += p.output[k].String()
			}
		}
		text = causeFirst(withoutFrame(text))
		if text == "" && key[1] != "" && p.hasBadSubtest(key) {
			continue // the subtest says it
		}
		if i, ok := same[text]; ok && text != "" {
			out[i] = name + "\n" + out[i] // one cause, said once
			continue
		}
		same[text] = len(out)
		out = append(out, strings.TrimRight(name+"\n"+text, "\n"))
	}
	return out
}

// withoutFrame drops the lines that only say that a test starts, waits or ends.
func withoutFrame(text string) string {
	var out []string
	for _, l := range strings.Split(strings.TrimRight(text, "\n"), "\n") {
		if s := strings.TrimLeft(l, " "); !strings.HasPrefix(s, "=== ") && !strings.HasPrefix(s, "--- FAIL: ") {
			out = append(out, strings.TrimRight(l, " "))
		}
	}
	return strings.Trim(strings.Join(out, "\n"), "\n")
}

// logLine is a line that a program under test logged, behind the place where the test printed it.
var logLine = regexp.MustCompile(`^\s*(\S+\.go:\d+: )?time=\S+ level=`)

// causeFirst puts what the test itself said before what the programs under test logged: a reader may see the first
// lines alone.
func causeFirst(text string) string {
	var cause, log []string
	for _, l := range strings.Split(text, "\n") {
		if logLine.MatchString(l) {
			log = append(log, l)
		} else {
			cause = append(cause, l)
		}
	}
	return strings.Join(append(cause, log...), "\n")
}

func (p *report) hasBadSubtest(key [2]string) bool {
	for _, k := range p.bad {
		if k[0] == key[0] && strings.HasPrefix(k[1], key[1]+"/") {
			return true
		}
	}
	return false
}

// unfinished returns the tests of a package that neither passed nor failed.
func (p *report) unfinished(pkg string) [][2]string {
	var keys [][2]string
	for k := range p.output {
		if k[0] == pkg && k[1] != "" {
			keys = append(keys, k)
		}
	}
	sort.Slice(keys, func(i, j int) bool { return keys[i][1] < keys[j][1] })
	return keys
}

// lines reads lines of any length.
type lines struct {
	in   io.Reader
	buf  []byte
	line []byte
	err  error
}

func newLines(in io.Reader) *lines { return &lines{in: in} }

func (l *lines) next() bool {
	for {
		if i := bytes.IndexByte(l.buf, '\n'); i >= 0 {
			l.line, l.buf = l.buf[:i], l.buf[i+1:]
			return true
		}
		if l.err != nil {
			l.line, l.buf = l.buf, nil
			return len(l.line) > 0
		}
		chunk := make([]byte, 32<<10)
		n, err := l.in.Read(chunk)
		l.buf = append(l.buf, chunk[:n]...)
		l.err = err
	}
}

// fuzzFunc finds fuzz targets without compiling.
var fuzzFunc = regexp.MustCompile(`(?m)^func Fuzz[A-Z0-9_]\w*\(`)

// fuzzStage runs every fuzz target for a moment, two side by side with one worker each: half of their time is building
// and starting.
func fuzzStage(r *run, fuzztime time.Duration) {
	var targets []fuzzTarget
	for _, p := range r.packages() {
		if !hasFuzz(p.dir) {
			continue
		}
		r.out.doing(p.rel)
		out, err := r.output(nil, "go", "test", "-list=^Fuzz", p.path)
		if err != nil {
			r.failf("%v\n%s", err, strings.TrimSpace(out))
			continue
		}
		for _, name := range strings.Fields(out) {
			if strings.HasPrefix(name, "Fuzz") {
				targets = append(targets, fuzzTarget{p, name})
			}
		}
	}
	todo, results := make(chan fuzzTarget, len(targets)), make(chan string)
	for _, t := range targets {
		todo <- t
	}
	close(todo)
	for range 2 {
		go func() {
			for t := range todo {
				results <- fuzzOne(r, t, fuzztime)
			}
		}()
	}
	for range targets {
		if text := <-results; text == "" {
			r.passed++
		} else {
			r.failed++
			r.failf("%s", text)
		}
	}
	if r.counts == (counts{}) && len(r.failures) == 0 {
		r.skipWhy = "no fuzz targets yet"
	}
}

type fuzzTarget struct {
	pkg
	name string
}

func hasFuzz(dir string) bool {
	files, _ := filepath.Glob(filepath.Join(dir, "*_test.go"))
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && fuzzFunc.Match(b) {
			return true
		}
	}
	return false
}

// fuzzOne returns what failed, or nothing.
func fuzzOne(r *run, t fuzzTarget, fuzztime time.Duration) string {
	r.out.doing(t.rel + " " + t.name)
	args := []string{"test", "-run=^$", "-fuzz=^" + t.name + "$", "-fuzztime=" + fuzztime.String(), "-parallel=1", t.path}
	for try := 1; ; try++ {
		out, err := r.output(nil, "go", args...)
		if err == nil {
			return ""
		}
		// Before Go 1.27 the fuzzing engine reports the end of its own time as a
		// failure now and then (go.dev/issue/75804). No input failed then: again.
		if try < 3 && r.ctx.Err() == nil && strings.Contains(out, "context deadline exceeded") &&
			!strings.Contains(out, "Failing input written") && !strings.Contains(out, "panic:") {
			continue
		}
		return fmt.Sprintf("%s %s\n%s", t.rel, t.name, strings.TrimRight(out, "\n"))
	}
}
