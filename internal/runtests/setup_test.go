package main

import (
	"archive/zip"
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// scriptedApt puts an apt-get and an apt-cache into a directory that answer as the shell text says, with
// $* their arguments, and returns an installer that runs them and the file of the calls.
func scriptedApt(t *testing.T, get, cache string) (*installer, func() []string) {
	t.Helper()
	dir := t.TempDir()
	calls := filepath.Join(dir, "calls")
	for name, text := range map[string]string{"apt-get": get, "apt-cache": cache} {
		script := "#!/bin/sh\ncd " + dir + "\necho " + name + " \"$*\" >>calls\n" + text
		if err := os.WriteFile(filepath.Join(dir, name), []byte(script), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	r := &run{ctx: t.Context(), log: io.Discard}
	return &installer{run: r, apt: []string{filepath.Join(dir, "apt-get")}, cache: filepath.Join(dir, "apt-cache")}, func() []string {
		b, _ := os.ReadFile(calls)
		return strings.Split(strings.TrimSpace(string(b)), "\n")
	}
}

// fetchError prints what apt-get says of a package that the mirror has not.
func fetchError(file string) string {
	return `echo "E: Failed to fetch http://mirror/pool/` + file + `  404  Not Found [IP: 192.0.2.1 80]" >&2
echo "E: Unable to fetch some archives, maybe run apt-get update or try with --fix-missing?" >&2
exit 100
`
}

// TestInstallTriesAll: a package, or one that it depends on, that the mirror does not deliver: older versions, lists
// read anew, other packages, in that order; and all of it is named.
func TestInstallTriesAll(t *testing.T) {
	if !haveLists() {
		t.Log("apt-get update is called first here: this system has no lists")
	}
	tools := func(dir string) tool {
		return tool{name: "x", binaries: []string{filepath.Join(dir, "x")}, packages: []string{"x-12 x-dev", "x"}}
	}
	for _, c := range []struct {
		name, get, cache string
		ok               bool
		calls, tries     []string
	}{
		{
			name: "an older version of a dependency",
			get: `case "$*" in
*libx=5:1.1*) touch x ;;
*) ` + fetchError("libx_1.2+b%2b1_amd64.deb") + `;; esac
`,
			cache: `echo " libx | 5:1.2+b+1 | http://mirror stable-security/main amd64 Packages"
echo " libx | 5:1.1 | http://mirror stable/main amd64 Packages"
echo " libx | 5:1.1 | http://mirror stable/main Sources"
`,
			ok: true,
			calls: []string{"apt-get install x-12 x-dev", "apt-cache madison libx",
				"apt-get install --allow-downgrades x-12 x-dev libx=5:1.1"},
			tries: []string{"apt-get install x-12 x-dev: libx 1.2+b+1: 404 Not Found"},
		},
		{
			name: "lists read anew",
			get: `case "$*" in
update) if [ -e once ]; then touch new; else touch once; echo "E: Failed to fetch http://mirror/Packages.xz  Hash Sum mismatch" >&2; exit 100; fi ;;
*) if [ -e new ]; then touch x; else ` + fetchError("x-12_1_amd64.deb") + ` fi ;; esac
`,
			cache: `echo " x-12 | 1 | http://mirror stable/main amd64 Packages"
`,
			ok: true,
			calls: []string{"apt-get install x-12 x-dev", "apt-cache madison x-12", "apt-get install x", "apt-cache madison x-12",
				"apt-get update", "apt-get update", "apt-get install x-12 x-dev"},
			tries: []string{"apt-get install x-12 x-dev: x-12 1: 404 Not Found", "apt-get install x: x-12 1: 404 Not Found",
				"apt-get update: Failed to fetch http://mirror/Packages.xz Hash Sum mismatch"},
		},
		{
			name: "nothing",
			get: `case "$*" in update) ;; *) echo "E: Unable to locate package x" >&2; exit 100 ;; esac
`,
			calls: []string{"apt-get install x-12 x-dev", "apt-get install x", "apt-get update", "apt-get install x-12 x-dev", "apt-get install x"},
			tries: []string{"apt-get install x-12 x-dev: Unable to locate package x", "apt-get install x: Unable to locate package x",
				"apt-get install x-12 x-dev: Unable to locate package x", "apt-get install x: Unable to locate package x"},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, calls := scriptedApt(t, c.get, c.cache)
			if got := a.install(tools(filepath.Dir(a.apt[0]))); got != c.ok {
				t.Errorf("installed: %v", got)
			}
			got := calls()
			if !haveLists() && len(got) > 0 && got[0] == "apt-get update" {
				got = got[1:]
			}
			if strings.Join(got, "\n") != strings.Join(c.calls, "\n") {
				t.Errorf("calls\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(c.calls, "\n"))
			}
			if strings.Join(a.tries, "\n") != strings.Join(c.tries, "\n") {
				t.Errorf("tries\n%s\nwant\n%s", strings.Join(a.tries, "\n"), strings.Join(c.tries, "\n"))
			}
		})
	}
}

// TestStartsWithoutModules: nothing that this program imports has to be fetched before it can try again.
func TestStartsWithoutModules(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", "-f", "{{if not .Standard}}{{.ImportPath}}{{end}}", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	deps := strings.Fields(string(out))
	for _, d := range deps {
		if !strings.HasPrefix(d, modulePath+"/") {
			t.Errorf("imports %s", d)
		}
	}
	if len(deps) == 0 {
		t.Error("imports not even itself")
	}
}

// TestFetchModules: a module proxy that fails at first is asked again; one that goes on failing is one failure.
func TestFetchModules(t *testing.T) {
	old := modulePauses
	modulePauses = []time.Duration{time.Millisecond, time.Millisecond}
	defer func() { modulePauses = old }()
	var archive bytes.Buffer
	z := zip.NewWriter(&archive)
	for name, text := range map[string]string{"go.mod": "module example.org/m\n\ngo 1.18\n", "m.go": "package m\n"} {
		w, err := z.Create("example.org/m@v1.0.0/" + name)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprint(w, text)
	}
	z.Close()
	var mu sync.Mutex
	fail, asked := 1, 0
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		asked++
		if fail > 0 {
			fail--
			http.Error(w, "bad gateway", http.StatusBadGateway)
			return
		}
		switch filepath.Ext(r.URL.Path) {
		case ".info":
			fmt.Fprint(w, `{"Version":"v1.0.0","Time":"2026-01-01T00:00:00Z"}`)
		case ".mod":
			fmt.Fprint(w, "module example.org/m\n\ngo 1.18\n")
		case ".zip":
			w.Write(archive.Bytes())
		default:
			http.NotFound(w, r)
		}
	}))
	defer srv.Close()
	for k, v := range map[string]string{"GOPROXY": srv.URL, "GONOSUMDB": "example.org", "GOFLAGS": "-mod=mod -modcacherw", "GONOSUMCHECK": "1", "GONOPROXY": "none", "GOPRIVATE": "", "GOSUMDB": "off"} {
		t.Setenv(k, v)
	}
	for _, c := range []struct {
		fail     int
		failures int
	}{{1, 0}, {1000, 1}} {
		t.Setenv("GOMODCACHE", t.TempDir())
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "go.mod"), []byte("module example.org/x\n\ngo 1.18\n\nrequire example.org/m v1.0.0\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		mu.Lock()
		fail, asked = c.fail, 0
		mu.Unlock()
		r := &run{ctx: t.Context(), log: io.Discard, out: newPrinter(os.Stderr)}
		fetchModules(r, []moduleSet{{"the modules of x", dir, []string{"mod", "download"}}})
		if len(r.failures) != c.failures {
			t.Errorf("a proxy that fails %d times: %q, want %d failures", c.fail, r.failures, c.failures)
		}
		if c.failures > 0 && !strings.Contains(r.failures[0], "could not be fetched in 3 tries") {
			t.Errorf("failure: %s", r.failures[0])
		}
		mu.Lock()
		if asked < 2 {
			t.Errorf("the proxy was asked %d times", asked)
		}
		mu.Unlock()
	}
}

// TestTidy: a go.mod that says more than the code needs is found.
func TestTidy(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{"go.mod": "module example.org/x\n\ngo 1.18\n", "x.go": "package x\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for want := 0; want < 2; want++ {
		r := &run{ctx: t.Context(), log: io.Discard, out: newPrinter(os.Stderr)}
		tidy(r, dir)
		if len(r.failures) != want {
			t.Errorf("%d failures, want %d: %q", len(r.failures), want, r.failures)
		}
		if err := os.WriteFile(filepath.Join(dir, "go.mod"), []byte("module example.org/x\n\ngo 1.18\n\nrequire example.org/m v1.0.0\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		// No network for the second one: what nothing imports is not asked for.
		t.Setenv("GOFLAGS", "-mod=mod")
		t.Setenv("GOPROXY", "off")
	}
}
