package house

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// gccgoNames are the gccgo releases that compile Go 1.18; the newer ones do too.
// internal/runtests installs one of them.
var gccgoNames = []string{"gccgo-12", "gccgo-13", "gccgo-14", "gccgo-15", "gccgo"}

// oldModule writes a module of its own into a scratch directory: the packages below cmd and the lean programs
// without their tests, in a go.mod that says Go 1.18 and golang.org/x/sys v0.6.0. The
// project's own go.mod cannot: its other modules want a newer x/sys.
func oldModule(t *testing.T) (dir string, pkgs []string) {
	t.Helper()
	dir = t.TempDir()
	for _, name := range []string{"go.mod", "go.sum"} {
		copyFile(t, filepath.Join("testdata", "go118", name), filepath.Join(dir, name))
	}
	for _, p := range tree(t) {
		if (top(p.rel()) == "cmd" || top(p.rel()) == "examples") && !lean[p.rel()] || forCmd(p.rel()) || beside(p.rel()) {
			continue
		}
		to := filepath.Join(dir, p.rel())
		if err := os.MkdirAll(to, 0o777); err != nil {
			t.Fatal(err)
		}
		for _, pattern := range []string{"*.go", "*.s", "*.h"} {
			files, err := filepath.Glob(filepath.Join(p.Dir, pattern))
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range files {
				if !strings.HasSuffix(f, "_test.go") {
					copyFile(t, f, filepath.Join(to, filepath.Base(f)))
				}
			}
		}
		if len(p.GoFiles)+len(p.IgnoredFiles) > 0 {
			pkgs = append(pkgs, "./"+p.rel())
		}
	}
	if len(pkgs) == 0 {
		t.Fatal("no packages below cmd")
	}
	return dir, pkgs
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err == nil {
		err = os.WriteFile(to, b, 0o666)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// fetchModules makes the two modules available, so that want of a network is told
// from code that does not compile.
func fetchModules(t *testing.T, dir string) {
	t.Helper()
	if _, err := goCommand(t, dir, nil, "mod", "download"); err != nil {
		lacks(t, "golang.org/x/sys v0.6.0 from the module proxy: %v", err)
	}
}

// TestGo118BuildOldSys: the packages compile with the x/sys of early 2023, which is
// what old systems package, for every architecture that their assembly is for.
func TestGo118BuildOldSys(t *testing.T) {
	dir, pkgs := oldModule(t)
	fetchModules(t, dir)
	for _, arch := range []string{"amd64", "arm64", "ppc64", "ppc64le", "riscv64", "386", "arm"} {
		t.Run(arch, func(t *testing.T) {
			env := []string{"GOFLAGS=-mod=readonly", "GOOS=linux", "GOARCH=" + arch, "CGO_ENABLED=0"}
			if _, err := goCommand(t, dir, env, append([]string{"build"}, pkgs...)...); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestGo118BuildGccgo: a compiler that knows Go 1.18 without generics, and no assembly of gc's,
// compiles the packages.
func TestGo118BuildGccgo(t *testing.T) {
	gccgo := ""
	for _, n := range gccgoNames {
		if p, err := exec.LookPath(n); err == nil {
			gccgo = p
			break
		}
	}
	if gccgo == "" {
		lacks(t, "gccgo: apt-get install gccgo-12")
	}
	dir, pkgs := oldModule(t)
	fetchModules(t, dir)
	env := []string{"GOFLAGS=-mod=readonly", "GCCGO=" + gccgo, "CGO_ENABLED=1"}
	args := []string{"build", "-compiler=gccgo", "-gccgoflags=-O1"}
	if _, err := goCommand(t, dir, env, append(args, pkgs...)...); err != nil {
		t.Error(err)
	}

	// It bites: what only newer compilers know must fail here.
	bad := filepath.Join(dir, "bad")
	if err := os.Mkdir(bad, 0o777); err != nil {
		t.Fatal(err)
	}
	src := "package bad\n\nfunc f[T any](t T) T { return t }\n\nvar _ = f(1)\n"
	if err := os.WriteFile(filepath.Join(bad, "bad.go"), []byte(src), 0o666); err != nil {
		t.Fatal(err)
	}
	if _, err := goCommand(t, dir, env, append(args, "./bad")...); err == nil {
		t.Errorf("%s compiles generics: it proves nothing", gccgo)
	}
}
