// Package vmtest lets tests use virtual machines: it skips, or fails in CI, where the system lacks something, shows the
// console of a machine whose test failed, and runs the tests of another package inside of a machine.
//
// In the room: what needs testing.TB. Never in it: machines themselves (hwtest/vm).
package vmtest

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/boardlink/boardlink/hwtest/vm"
)

// Lacks ends the test: it skips it, or fails it where the environment says CI=true.
func Lacks(t testing.TB, format string, args ...any) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf("CI, and this system lacks: "+format, args...)
	}
	t.Skipf("this system lacks: "+format, args...)
}

// Boot boots a machine that ends with the test.
func Boot(t testing.TB, cfg vm.Config) *vm.VM {
	t.Helper()
	m, err := vm.Boot(t.Context(), cfg)
	if vm.IsMissing(err) {
		Lacks(t, "%v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the console of machine %s:\n%s", m.Name, m.Console())
			var log strings.Builder
			lines := m.KernelLog()
			if len(lines) > 60 {
				lines = lines[len(lines)-60:]
			}
			for _, l := range lines {
				fmt.Fprintf(&log, "<%d> %s\n", l.Level, l.Text)
			}
			t.Logf("the end of its kernel's log:\n%s", log.String())
		}
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}

// Run runs a program in the machine, at most for a minute, and fails the test if it fails. It returns standard output.
func Run(t testing.TB, m *vm.VM, program string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	out, err := m.Run(ctx, program, args...)
	if err != nil {
		t.Fatalf("%s %s: %v\n%s%s", program, strings.Join(args, " "), err, out.Stdout, out.Stderr)
	}
	return string(out.Stdout)
}

// Get reads a file of the machine, without the white space around it.
func Get(t testing.TB, m *vm.VM, path string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	b, err := m.Get(ctx, path)
	if err != nil {
		t.Fatal(err)
	}
	return string(bytes.TrimSpace(b))
}

// Short skips the test under -short, and says so even without -v.
func Short(t testing.TB, why string) {
	t.Helper()
	if testing.Short() {
		fmt.Fprintf(os.Stderr, "-short skips %s: %s\n", t.Name(), why)
		t.Skip("-short: " + why)
	}
}

// event is a line of go tool test2json.
type event struct {
	Action, Test, Output string
	Elapsed              float64
}

// result is a test that ran in the machine.
type result struct {
	name   string  // below its parent
	action string  // pass, fail, skip; empty: it did not end
	took   float64 // seconds
	output strings.Builder
	subs   []*result
}

// RunGoTest builds the tests of a package of this module for the machine, runs them there, and maps each to a subtest
// of t with its output and its end: passed, failed or skipped. env is added to the environment, with CI as it is
// here; args are the test binary's, such as "-test.run=TestVFIO"; without a -test.timeout it is 2 minutes. The package's
// testdata is there, and the working directory is the package's, as with go test. It fails where no
// test ran.
func RunGoTest(t *testing.T, m *vm.VM, pkg string, env []string, args ...string) {
	t.Helper()
	ctx := t.Context()
	arch := m.Kernel.Spec.Arch
	bin, err := vm.BuildTest(ctx, arch, pkg)
	if vm.IsMissing(err) {
		Lacks(t, "%v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	rel := pkg[strings.Index(pkg, "boardlink/boardlink/")+len("boardlink/boardlink/"):]
	dir := "/src/" + rel
	to := dir + "/" + filepath.Base(bin)
	if err := m.Put(ctx, to, bin); err != nil {
		t.Fatal(err)
	}
	if err := putTestdata(ctx, m, rel, dir); err != nil {
		t.Fatal(err)
	}
	timed := false
	for _, a := range args {
		timed = timed || strings.HasPrefix(a, "-test.timeout")
	}
	limit := 2 * time.Minute
	if !timed {
		args = append(args, "-test.timeout="+limit.String())
	}
	env = append([]string{"CI=" + os.Getenv("CI"), "BOARDLINK_IN_VM=" + m.Name}, env...)
	var out lockedBuffer
	_, err = m.RunCmd(ctx, vm.Cmd{Args: append([]string{to, "-test.v=test2json"}, args...), Env: env, Dir: dir, Stdout: &out, Stderr: &out})

	root, loose, parseErr := parse(ctx, out.Bytes())
	if parseErr != nil {
		t.Fatalf("%v\n%s", parseErr, out.Bytes())
	}
	ran := 0
	for _, r := range root {
		ran += report(t, r)
	}
	failed := false
	for _, r := range root {
		failed = failed || r.action == "fail" || r.action == ""
	}
	var exit *vm.ExitError
	switch {
	case err != nil && !errors.As(err, &exit):
		t.Fatalf("%v\n%s", err, loose)
	case err != nil && !failed:
		t.Fatalf("%v\n%s", err, loose)
	case ran == 0:
		t.Fatalf("no test of %s ran in machine %s with %v:\n%s", pkg, m.Name, args, loose)
	case loose != "":
		t.Logf("%s", loose)
	}
}

// report makes r a subtest and returns how many tests it stands for.
func report(t *testing.T, r *result) int {
	n := 1
	t.Run(r.name, func(t *testing.T) {
		for _, s := range r.subs {
			n += report(t, s)
		}
		if text := strings.TrimRight(r.output.String(), "\n"); text != "" {
			t.Logf("in the machine, in %.2f s:\n%s", r.took, text)
		} else if r.took >= 0.1 {
			t.Logf("in the machine, in %.2f s", r.took)
		}
		switch r.action {
		case "pass":
		case "skip":
			t.Skip("skipped in the machine")
		case "fail":
			t.Error("failed in the machine")
		default:
			t.Error("did not end in the machine")
		}
	})
	return n
}

// parse turns a test binary's output (with -test.v=test2json) into results.
func parse(ctx context.Context, out []byte) (root []*result, loose string, err error) {
	cmd := exec.CommandContext(ctx, "go", "tool", "test2json")
	cmd.Stdin = bytes.NewReader(out)
	b, err := cmd.Output()
	if err != nil {
		return nil, "", fmt.Errorf("go tool test2json: %w", err)
	}
	all := map[string]*result{}
	var other strings.Builder
	sc := bufio.NewScanner(bytes.NewReader(b))
	sc.Buffer(nil, 16<<20)
	for sc.Scan() {
		var e event
		if json.Unmarshal(sc.Bytes(), &e) != nil {
			continue
		}
		if e.Test == "" {
			if e.Output != "PASS\n" && e.Output != "FAIL\n" {
				other.WriteString(e.Output)
			}
			continue
		}
		r := all[e.Test]
		if r == nil {
			r = &result{name: e.Test}
			all[e.Test] = r
			// A subtest's name may hold a slash of its own: its parent is the longest known prefix.
			var parent *result
			for i := len(e.Test) - 1; i > 0 && parent == nil; i-- {
				if e.Test[i] == '/' {
					if parent = all[e.Test[:i]]; parent != nil {
						r.name = e.Test[i+1:]
					}
				}
			}
			if parent != nil {
				parent.subs = append(parent.subs, r)
			} else {
				root = append(root, r)
			}
		}
		switch e.Action {
		case "output":
			// The lines of its end would be taken for ours.
			if l := strings.TrimLeft(e.Output, " "); !strings.HasPrefix(l, "=== ") && !strings.HasPrefix(l, "--- ") {
				r.output.WriteString(e.Output)
			}
		case "pass", "fail", "skip":
			r.action, r.took = e.Action, e.Elapsed
		}
	}
	return root, strings.TrimSpace(other.String()), sc.Err()
}

// putTestdata copies the package's testdata.
func putTestdata(ctx context.Context, m *vm.VM, rel, dir string) error {
	top, err := vm.Root(ctx)
	if err != nil {
		return err
	}
	from := filepath.Join(top, rel, "testdata")
	return filepath.WalkDir(from, func(p string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) && p == from {
			return filepath.SkipAll
		}
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		name, err := filepath.Rel(from, p)
		if err != nil {
			return err
		}
		return m.Put(ctx, dir+"/testdata/"+filepath.ToSlash(name), p)
	})
}
