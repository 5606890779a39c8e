package main

import (
	"fmt"
	"path/filepath"
	"strings"
	"time"
)

// moduleSet is a set of modules that the go command fetches when it is first run.
type moduleSet struct {
	what string
	dir  string // where its go.mod is; empty: the project's root
	args []string
}

// moduleSets are all modules that the stages need.
var moduleSets = []moduleSet{
	{"the modules of the programs and tests", "", []string{"list", "-deps", "-test", "-f", "{{/**/}}", "./..."}},
	{"the modules of staticcheck", "", []string{"list", "-modfile=tools/go.mod", "-deps", "-f", "{{/**/}}", "honnef.co/go/tools/cmd/staticcheck"}},
	{"the modules of the build as Go 1.18", "internal/house/testdata/go118", []string{"mod", "download"}},
}

// modulePauses stand between the tries.
var modulePauses = []time.Duration{2 * time.Second, 10 * time.Second}

// fetchModules fetches modules ahead of the stages, and tries again where the network or the module proxy
// fails for a moment: no stage then fails for that, and a lasting failure is said once.
func fetchModules(r *run, sets []moduleSet) {
	for _, s := range sets {
		r.out.doing("fetching " + s.what)
		var said []string
		for try := 0; ; try++ {
			args := s.args
			if s.dir != "" {
				args = append([]string{"-C", filepath.FromSlash(s.dir)}, args...)
			}
			out, err := r.output(nil, "go", args...)
			if err == nil || r.ctx.Err() != nil {
				break
			}
			line := strings.TrimSpace(err.Error() + "\n" + out)
			if len(said) == 0 || said[len(said)-1] != line {
				said = append(said, line)
			}
			if try == len(modulePauses) {
				r.failf("%s could not be fetched in %d tries:\n%s\nit takes a network that reaches the module proxy, or GOPROXY of another one",
					s.what, try+1, strings.Join(said, "\n"))
				return
			}
			fmt.Fprintf(r.log, "again in %s\n", modulePauses[try])
			select {
			case <-time.After(modulePauses[try]):
			case <-r.ctx.Done():
			}
		}
	}
}

// tidy fails where go mod tidy would change the go.mod or go.sum in a directory. It asks for modules that nothing else
// needs, and tries again where they cannot be fetched.
func tidy(r *run, dir string) {
	r.out.doing("go mod tidy in " + dir)
	for try := 0; ; try++ {
		out, err := r.output(nil, "go", "-C", dir, "mod", "tidy", "-diff")
		if err == nil || r.ctx.Err() != nil {
			return
		}
		if strings.HasPrefix(out, "diff ") {
			r.failf("%s is not tidy, run go mod tidy there:\n%s", filepath.Join(dir, "go.mod"), strings.TrimSpace(out))
			return
		}
		if try == len(modulePauses) {
			r.failf("go mod tidy in %s: %v", dir, err)
			return
		}
		select {
		case <-time.After(modulePauses[try]):
		case <-r.ctx.Done():
		}
	}
}
