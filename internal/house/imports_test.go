package house

import (
	"go/ast"
	"go/parser"
	"go/token"
	"strconv"
	"strings"
	"testing"
)

// floors is the table of docs/architecture.md: an import points down. Sub-packages
// stand on the floor of their top folder, see floor.
var floors = map[string]int{
	"mmio": 0, "virtio": 0, "status": 0, "nbd": 0, "tty": 0, "ctl": 0,
	"dma":   1,
	"vring": 2, "doorbell": 2, "pci": 2,
	"board":     3,
	"virtiomsg": 4, "tunbridge": 4, "frames": 4, "device": 4, "driver": 4, "control": 4,
	"session": 5,
	"host":    6, "agent": 6,
	"app": 7,
	"cmd": 8, "examples": 8,
}

// top returns the first element of a package's path inside the module.
func top(rel string) string {
	t, _, _ := strings.Cut(rel, "/")
	return t
}

// subset tells whether a package has to stay within Go 1.18 and few imports: all
// rooms below cmd, and the lean programs.
func subset(rel string) bool {
	if forCmd(rel) {
		return false
	}
	if lean[rel] {
		return true
	}
	f, ok := floors[top(rel)]
	return ok && f < floors["cmd"]
}

// lean are the packages of cmd that gccgo compiles for old PowerPC (docs/ports.md).
var lean = map[string]bool{
	"cmd/boardlink-agent": true, "cmd/boardlink-host": true, "cmd/internal/lean": true,
}

// forCmd tells whether a package is cmd's, though it lies in the room that it is about: it may use current Go and
// other modules, and no program imports it but cmd.
func forCmd(rel string) bool { return rel == "pci/scan" }

// beside tells whether a package stands beside the floors: it tests, measures or builds. No
// room below cmd imports it.
func beside(rel string) bool { return ships(rel) || top(rel) == "hwtest" || top(rel) == "internal" }

// ships tells whether a package measures or proves links and is part of the program: cmd imports it, and it
// imports nothing of hwtest, which tests against hardware.
func ships(rel string) bool { return top(rel) == "bench" || top(rel) == "trial" }

// mayImport says whether package from may import package to, both inside the
// module, and why not.
func mayImport(from, to string) string {
	if top(to) == "cmd" || top(to) == "examples" {
		if top(from) == top(to) {
			return ""
		}
		return "nobody imports " + top(to)
	}
	if ships(from) && top(to) == "hwtest" {
		return top(from) + " ships with the program, hwtest does not"
	}
	if beside(from) {
		return ""
	}
	if top(from) == "cmd" && ships(to) {
		return ""
	}
	if beside(to) {
		return "no program imports " + top(to)
	}
	if forCmd(to) && top(from) != "cmd" {
		return to + " is for cmd alone"
	}
	ff, ok := floors[top(from)]
	if !ok {
		return "package " + from + " has no floor: add it to the table"
	}
	tf, ok := floors[top(to)]
	if !ok {
		return "package " + to + " has no floor: add it to the table"
	}
	switch {
	case ff > tf:
		return ""
	case (strings.HasPrefix(from, "device/") || strings.HasPrefix(from, "driver/")) && (to == "tunbridge" || to == "frames"):
		return "" // what device models and drivers join their queues to
	case strings.HasPrefix(from, "control/") && (to == "device" || to == "driver" || to == "virtiomsg"):
		return "" // what a control plane joins
	case from == "board/all" && top(to) == "board":
		return "" // the one list of kinds
	case top(from) == top(to):
		// Within a room: a sub-package may use its parents and internal ones; the
		// kinds of board do not know each other, and the room does not know its kinds.
		if strings.HasPrefix(from, to+"/") || strings.Contains(to, "/internal/") || strings.HasSuffix(to, "/internal") {
			return ""
		}
		return "inside a room only sub-packages import their parents"
	}
	return "an import only points down: floor " + strconv.Itoa(ff) + " imports floor " + strconv.Itoa(tf)
}

// mayUseModule says whether a package below cmd may import a path of another module.
func mayUseModule(rel, path string) bool {
	switch {
	case path == "golang.org/x/sys/unix":
		return true
	case path == "github.com/songgao/water":
		return top(rel) == "tunbridge"
	}
	return false
}

// bannedStd are standard packages that no package below cmd imports, and why.
var bannedStd = map[string]string{
	"math/rand":    "random numbers come from unix.Getrandom",
	"math/rand/v2": "random numbers come from unix.Getrandom",
	"C":            "no cgo: the programs are static",
	"plugin":       "no cgo: the programs are static",
}

// checkImports is the rule of the floors and of the modules, for one file.
func checkImports(f *findings, rel string, file *ast.File) {
	for _, spec := range file.Imports {
		path, err := strconv.Unquote(spec.Path.Value)
		if err != nil {
			f.add(spec.Pos(), "import %s", spec.Path.Value)
			continue
		}
		if ours(path) {
			to := strings.TrimPrefix(strings.TrimPrefix(path, modulePath), "/")
			if why := mayImport(rel, to); why != "" {
				f.add(spec.Pos(), "%s imports %s: %s", rel, to, why)
			}
			continue
		}
		if !subset(rel) {
			continue
		}
		if isStd(path) {
			if why, bad := bannedStd[path]; bad {
				f.add(spec.Pos(), "%s imports %s: %s", rel, path, why)
			}
		} else if !mayUseModule(rel, path) {
			f.add(spec.Pos(), "%s imports %s: below cmd only the standard library, golang.org/x/sys/unix and (tunbridge) water", rel, path)
		}
	}
}

func TestImportsPointDown(t *testing.T) {
	fset := token.NewFileSet()
	f := &findings{fset: fset}
	for _, s := range parseTree(t, fset) {
		if !s.test {
			checkImports(f, s.rel, s.file)
		}
	}
	f.report(t)
}

// TestEveryPackageHasAFloor: a new top folder is a decision, not an accident.
func TestEveryPackageHasAFloor(t *testing.T) {
	for _, p := range tree(t) {
		if _, ok := floors[top(p.rel())]; !ok && !beside(p.rel()) {
			t.Errorf("package %s has no floor: add it to the table in docs/architecture.md and here", p.ImportPath)
		}
	}
}

func TestImportCheckerBites(t *testing.T) {
	for _, c := range []struct {
		rel, imports string
		bad          bool
	}{
		{"vring", modulePath + "/dma", false},
		{"vring", modulePath + "/mmio", false},
		{"mmio", modulePath + "/dma", true},
		{"vring", modulePath + "/doorbell", true},
		{"dma", modulePath + "/dma", true},
		{"board/loopback", modulePath + "/board", false},
		{"board/loopback", modulePath + "/board/internal/x", false},
		{"board/loopback", modulePath + "/board/ivshmem", true},
		{"board", modulePath + "/board/loopback", true},
		{"board/all", modulePath + "/board/loopback", false},
		{"board/loopback", modulePath + "/board/all", true},
		{"app", modulePath + "/host", false},
		{"app", modulePath + "/app/internal/x", false},
		{"app", modulePath + "/cmd/internal/x", true},
		{"host", modulePath + "/app", true},
		{"virtiomsg", modulePath + "/board/loopback", false},
		{"tunbridge", modulePath + "/virtiomsg", true},
		{"host", modulePath + "/agent", true},
		{"device/netdev", modulePath + "/device", false},
		{"device/netdev", modulePath + "/tunbridge", false},
		{"device/netdev", modulePath + "/virtiomsg", true},
		{"device/netdev", modulePath + "/session", true},
		{"device", modulePath + "/tunbridge", true},
		{"driver/netdrv", modulePath + "/tunbridge", false},
		{"driver/netdrv", modulePath + "/session", true},
		{"control/x", modulePath + "/driver", false},
		{"control/x", modulePath + "/driver/netdrv", true},
		{"control/x", modulePath + "/session", true},
		{"driver", modulePath + "/control/x", true},
		{"driver/netdrv", modulePath + "/device", true},
		{"device", modulePath + "/device/netdev", true},
		{"host", modulePath + "/cmd/boardlink", true},
		{"examples/frames", modulePath + "/host", false},
		{"examples/frames", modulePath + "/cmd/boardlink", true},
		{"examples/frames", modulePath + "/hwtest/x", true},
		{"app", modulePath + "/examples/frames", true},
		{"hwtest", modulePath + "/cmd/boardlink", true},
		{"hwtest", modulePath + "/host", false},
		{"host", modulePath + "/hwtest", true},
		{"cmd/boardlink", modulePath + "/host", false},
		{"cmd/boardlink", modulePath + "/hwtest/x", true},
		{"cmd/boardlink", modulePath + "/bench/x", false},
		{"cmd/boardlink", modulePath + "/trial", false},
		{"bench/x", modulePath + "/trial", false},
		{"bench/x", modulePath + "/hwtest/x", true},
		{"trial", modulePath + "/hwtest/x", true},
		{"hwtest/x", modulePath + "/trial", false},
		{"host", modulePath + "/trial/x", true},
		{"cmd/boardlink", modulePath + "/internal/runtests", true},
		{"pci/scan", modulePath + "/pci", false},
		{"pci/scan", modulePath + "/pci/vfio", true},
		{"pci/scan", modulePath + "/board", true},
		{"pci/scan", "github.com/u-root/u-root/pkg/pci", false},
		{"pci", "github.com/u-root/u-root/pkg/pci", true},
		{"pci/vfio", modulePath + "/pci/internal/access", false},
		{"pci/vfio", modulePath + "/pci/uio", true},
		{"host", modulePath + "/pci/scan", true},
		{"cmd/boardlink", modulePath + "/pci/scan", false},
		{"newroom", modulePath + "/mmio", true},
		{"vring", "unsafe", false},
		{"vring", "math/rand", true},
		{"vring", "math/rand/v2", true},
		{"vring", "C", true},
		{"vring", "golang.org/x/sys/unix", false},
		{"vring", "golang.org/x/sys/cpu", true},
		{"vring", "github.com/songgao/water", true},
		{"tunbridge", "github.com/songgao/water", false},
		{"host", "github.com/vishvananda/netlink", true},
		{"cmd/boardlink", "github.com/vishvananda/netlink", false},
	} {
		fset := token.NewFileSet()
		file, err := parser.ParseFile(fset, "x.go", "package x\nimport _ \""+c.imports+"\"\n", parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		f := &findings{fset: fset}
		checkImports(f, c.rel, file)
		if (len(f.list) > 0) != c.bad {
			t.Errorf("%s imports %s: found %q, want bad=%v", c.rel, c.imports, f.list, c.bad)
		}
	}
}
