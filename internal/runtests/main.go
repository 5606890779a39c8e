// Command runtests is what `make test` runs: it installs what the tests need,
// runs every check and every test of the project, and ends with one line that
// counts the tests.
//
// In the room: the list of stages, the set-up by apt, the reading of `go test
// -json`, the printing. Never in it: what a check checks; that is in the tests
// themselves, package internal/house for the rules of the house.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

// modulePath is the prefix of the project's import paths.
const modulePath = "github.com/boardlink/boardlink"

// logDir receives the full output of each stage, below the repository's root.
const logDir = ".cache/runtests"

func main() {
	var (
		only     = flag.String("only", "", "comma-separated `stages` to run; all if empty")
		list     = flag.Bool("list", false, "list the stages and exit")
		fuzztime = flag.Duration("fuzztime", 2*time.Second, "how long each fuzz target runs")
		setup    = flag.Bool("setup", true, "install missing tools with apt-get")
		sudo     = flag.Bool("sudo", isCI(), "when not root, run the tests that may need it through sudo (default: if CI=true)")
	)
	flag.Usage = func() {
		fmt.Fprintln(flag.CommandLine.Output(), "usage: go run ./internal/runtests [flags]")
		flag.PrintDefaults()
	}
	flag.Parse()
	if flag.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "runtests: unexpected argument %q; stages are chosen by -only\n", flag.Arg(0))
		os.Exit(2)
	}
	if *sudo {
		asRoot = sudoExec()
	}
	all := stages(*fuzztime)
	if *list {
		for _, s := range all {
			fmt.Printf("%-8s %s\n", s.name, s.what)
		}
		return
	}
	chosen, err := choose(all, *only)
	if err != nil {
		fmt.Fprintln(os.Stderr, "runtests:", err)
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	os.Exit(runAll(ctx, chosen, *setup))
}

// choose returns the stages named in the comma-separated list, in their own order.
func choose(all []stage, list string) ([]stage, error) {
	if list == "" {
		return all, nil
	}
	want := make(map[string]bool)
	for _, n := range strings.Split(list, ",") {
		want[strings.TrimSpace(n)] = true
	}
	var out []stage
	for _, s := range all {
		if want[s.name] {
			out = append(out, s)
			delete(want, s.name)
		}
	}
	for n := range want {
		return nil, fmt.Errorf("no stage %q; -list names them", n)
	}
	return out, nil
}

// needModules tells whether any of the stages needs modules.
func needModules(chosen []stage) bool {
	for _, s := range chosen {
		if s.name != "gofmt" {
			return true
		}
	}
	return false
}

// isCI tells whether a missing tool is a failure (true) or a reason to skip.
func isCI() bool { return os.Getenv("CI") == "true" }

// runAll runs the stages, whatever their results, and returns the exit status: 0, or 1 if one failed, or 130 after an
// interrupt. Stages that only compile and check run in a row beside the others, with the time that those leave to the
// processors; in each row one stage runs after the other.
func runAll(ctx context.Context, chosen []stage, setup bool) int {
	start := time.Now()
	root, err := findRoot()
	if err == nil {
		err = os.Chdir(root)
	}
	if err == nil {
		err = os.MkdirAll(logDir, 0o777)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "runtests:", err)
		return 1
	}

	out := newPrinter(os.Stdout)
	var total counts
	var failed, skipped []string
	var mu sync.Mutex
	note := func(name string, r result) {
		mu.Lock()
		defer mu.Unlock()
		total.add(r.counts)
		switch {
		case r.err != nil:
			failed = append(failed, name)
			if r.failed == 0 {
				total.failed++ // a failed check is a failed test, so that "0 failed" is never wrong
			}
		case r.skip != "":
			skipped = append(skipped, name)
			total.skipped++
		}
	}

	missing := map[string]string{}
	tools := toolsFor(chosen)
	if modules := needModules(chosen); modules || len(tools) > 0 {
		s := stage{name: "setup", limit: 15 * time.Minute, run: func(r *run) {
			missing = provide(r, tools, setup)
			if modules {
				fetchModules(r, moduleSets)
			}
		}}
		note(s.name, s.do(ctx, out, nil))
	}
	row := func(stages []stage, out *printer) {
		for _, s := range stages {
			if ctx.Err() != nil {
				break
			}
			note(s.name, s.do(ctx, out, missing))
		}
	}
	first, beside := rows(chosen)
	side, done := out.beside(), make(chan struct{})
	go func() {
		defer close(done)
		row(beside, side)
	}()
	row(first, out)
	side.mute(false)
	<-done

	fmt.Println()
	table.print(os.Stdout)
	if ctx.Err() != nil {
		fmt.Println("interrupted: the stages that did not run are not counted")
		fmt.Println(total)
		return 130
	}
	fmt.Printf("%d stages in %s; full output in %s/\n", len(chosen), seconds(time.Since(start)), logDir)
	if len(skipped) > 0 {
		fmt.Println("stages skipped:", strings.Join(skipped, " "))
	}
	if len(failed) > 0 {
		fmt.Println("stages failed: ", strings.Join(failed, " "))
	}
	fmt.Println(total)
	if len(failed) > 0 {
		return 1
	}
	return 0
}

// rows parts the stages into those that run one after the other, and those that run beside them.
func rows(chosen []stage) (first, beside []stage) {
	for _, s := range chosen {
		if s.idle {
			beside = append(beside, s)
		} else {
			first = append(first, s)
		}
	}
	if len(first) == 0 {
		return beside, nil
	}
	return first, beside
}

// findRoot returns the nearest parent directory that holds the project's go.mod.
func findRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		b, err := os.ReadFile(filepath.Join(dir, "go.mod"))
		if err == nil && strings.HasPrefix(string(b), "module "+modulePath+"\n") {
			return dir, nil
		}
		up := filepath.Dir(dir)
		if up == dir {
			return "", errors.New("no go.mod of " + modulePath + " here or above: run me inside the checkout")
		}
		dir = up
	}
}

// stage is one line of the output.
type stage struct {
	name  string
	what  string        // for -list
	needs []string      // names of tools (see tools) without which there is no point in it
	wants []string      // tools without which some of its tests skip, and say so
	limit time.Duration // the stage is killed after that
	idle  bool          // runs beside the others, with the time that they leave to the processors
	run   func(*run)
}

// result is what is known after a stage.
type result struct {
	counts
	err  error  // the stage failed
	skip string // why the stage did not run at all
}

// do runs the stage and prints its line.
func (s stage) do(ctx context.Context, out *printer, missing map[string]string) (res result) {
	for _, n := range s.needs {
		if why, ok := missing[n]; ok {
			if isCI() {
				res.err = errors.New(why)
				out.line(s.name, "FAIL", 0, why)
			} else {
				res.skip = why
				out.line(s.name, "skip", 0, why)
			}
			return res
		}
	}
	user := ctx // ends by an interrupt only
	ctx, cancel := context.WithTimeout(ctx, s.limit)
	defer cancel()
	logName := filepath.Join(logDir, s.name+".log")
	log, err := os.Create(logName)
	if err != nil {
		out.line(s.name, "FAIL", 0, err.Error())
		res.err = err
		return res
	}
	defer log.Close()

	start := time.Now()
	r := &run{ctx: ctx, log: log, out: out, name: s.name, idle: s.idle}
	out.begin(s.name)
	s.run(r)
	out.end()
	took := time.Since(start)

	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		r.failf("killed: took more than %s", s.limit)
	}
	res.counts = r.counts
	switch {
	case user.Err() != nil:
		out.line(s.name, "stop", took, "interrupted")
		res.err = user.Err()
		return res
	case len(r.failures) > 0 || r.failed > 0:
		res.err = errors.New("failed")
		out.line(s.name, "FAIL", took, r.detail())
		out.block(r.failures, logName)
	case r.skipWhy != "":
		res.skip = r.skipWhy
		out.line(s.name, "skip", took, r.skipWhy)
	default:
		out.line(s.name, "ok", took, r.detail())
	}
	out.block(r.notes, "")
	return res
}

// stages returns what make test runs: quick answers first.
func stages(fuzztime time.Duration) []stage {
	return []stage{
		{name: "gofmt", what: "gofmt -l of every Go file", limit: time.Minute, run: gofmtStage},
		{name: "vet", what: "go vet ./...", limit: 30 * time.Minute, idle: true, run: func(r *run) {
			r.out.doing("./...")
			r.command(nil, "go", "vet", "./...")
		}},
		{name: "lint", what: "go mod tidy; staticcheck; and its check of 64-bit alignment for 386", limit: 30 * time.Minute, idle: true, run: lintStage},
		{name: "house", what: "the rules of the house: floors, imports, language level, comments, files", wants: []string{"git"}, limit: 10 * time.Minute, run: func(r *run) {
			r.goTest(nil, "-skip=^TestGo118Build", "./internal/house")
		}},
		{name: "go118", what: "the packages below cmd built as Go 1.18 with golang.org/x/sys v0.6.0, by gc and by gccgo",
			needs: []string{"gccgo", "gcc"}, limit: 40 * time.Minute, idle: true, run: func(r *run) {
				r.goTest(nil, "-run=^TestGo118Build", "./internal/house")
			}},
		{name: "test", what: "go test of all packages that have no stage of their own", wants: []string{"gcc", "ip", "qemu-system", "fio", "losetup", "agetty", "spin"}, limit: 12 * time.Minute, run: testStage},
		{name: "machines", what: "the tests that boot virtual machines with PCI boards", wants: []string{"gcc", "ip", "qemu-system", "qemu-ppc", "xz", "make", "keyring", "dpdk", "e2fs"},
			limit: 25 * time.Minute, run: machinesStage},
		{name: "race", what: "go test -race -short of the packages below cmd", needs: []string{"gcc"}, limit: 10 * time.Minute, run: raceStage},
		{name: "fuzz", what: "every fuzz target for a moment", limit: 20*time.Minute + 100*fuzztime, run: func(r *run) { fuzzStage(r, fuzztime) }},
		{name: "ports", what: "go build of everything, and go vet of what is an architecture's own, for " + strings.Join(arches, " "), limit: 40 * time.Minute, idle: true, run: portsStage},
		{name: "foreign", what: "the tests of the packages below cmd on foreign machines: " + strings.Join(foreignNames(), " "),
			needs: []string{"qemu-user"}, limit: 15 * time.Minute, run: foreignStage},
		{name: "cross", what: "links between this machine and foreign ones, as either end",
			needs: []string{"qemu-user"}, wants: []string{"gccgo-ppc", "gccgo-ppc64"}, limit: 10 * time.Minute, run: crossStage},
	}
}

func gofmtStage(r *run) {
	files, err := goFiles(r)
	if err != nil {
		r.failf("%v", err)
		return
	}
	bin := "gofmt" // the one of the Go that runs, where it has one
	if goroot, err := r.output(nil, "go", "env", "GOROOT"); err == nil {
		if p := filepath.Join(strings.TrimSpace(goroot), "bin", "gofmt"); isFile(p) {
			bin = p
		}
	}
	out, err := r.output(nil, bin, append([]string{"-l"}, files...)...)
	if err != nil {
		r.failf("%v", err)
	}
	if out != "" {
		r.failf("not formatted, run gofmt -w on:\n%s", strings.TrimRight(out, "\n"))
	}
}

func isFile(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.Mode().IsRegular()
}

func lintStage(r *run) {
	tidy(r, ".")
	tidy(r, "tools")
	// A build in a scratch place instead of `go tool`, so that GOARCH=386 below
	// chooses what is checked, not what runs.
	bin := filepath.Join(".cache", "bin", "staticcheck")
	r.out.doing("building staticcheck")
	if !r.command(nil, "go", "build", "-buildvcs=false", "-modfile=tools/go.mod", "-o", bin, "honnef.co/go/tools/cmd/staticcheck") {
		return
	}
	r.out.doing("staticcheck ./...")
	r.command(nil, bin, "./...")
	r.out.doing("staticcheck for 386")
	if pkgs := r.belowCmd(); len(pkgs) > 0 {
		r.command([]string{"GOARCH=386", "CGO_ENABLED=0"}, bin, append([]string{"-checks=SA1027"}, pkgs...)...)
	}
}

func testStage(r *run) {
	var pkgs []string
	for _, p := range r.packages() {
		if p.rel != "internal/house" && p.rel != crossPackage && !usesMachines(p.rel) { // have stages of their own
			pkgs = append(pkgs, p.path)
		}
	}
	r.live, r.tellSkips, r.again = true, true, true
	r.goTest(nil, append(append([]string{"-count=1", "-timeout=5m"}, asRoot...), pkgs...)...)
	if r.skipped > 0 && os.Geteuid() != 0 && asRoot == nil {
		r.note("what needs root runs with: make test SUDO=1")
	}
}

// usesMachines tells whether a package's tests boot virtual machines.
func usesMachines(rel string) bool {
	files, _ := filepath.Glob(filepath.Join(rel, "*_test.go"))
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && bytes.Contains(b, []byte(`boardlink/hwtest/vm`)) {
			return true
		}
	}
	return rel == "hwtest/vm"
}

// machinesStage runs one machine after the other: two at a time would starve each other.
func machinesStage(r *run) {
	var pkgs []string
	for _, p := range r.packages() {
		if p.tests && usesMachines(p.rel) {
			pkgs = append(pkgs, p.path)
		}
	}
	r.live, r.tellSkips, r.again = true, true, true
	r.goTest(nil, append(append([]string{"-count=1", "-p=1", "-timeout=15m"}, asRoot...), pkgs...)...)
}

func raceStage(r *run) {
	var pkgs []string
	for _, p := range r.packages() {
		if p.below && p.tests {
			pkgs = append(pkgs, p.path)
		}
	}
	r.goTestSome([]string{"CGO_ENABLED=1"}, pkgs, append([]string{"-race", "-short", "-timeout=5m"}, asRoot...)...)
}
