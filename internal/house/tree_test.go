package house

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"
	"sync"
	"testing"
)

// modulePath is the prefix of the project's import paths.
const modulePath = "github.com/boardlink/boardlink"

// root is the repository's root, seen from this package's directory.
const root = "../.."

// pkg is one package as `go list` sees it on one architecture, or one built from
// sources in a test.
type pkg struct {
	ImportPath   string
	Dir          string
	Name         string
	Export       string // compiled export data
	Standard     bool
	GoFiles      []string
	CgoFiles     []string
	SFiles       []string
	IgnoredFiles []string `json:"IgnoredGoFiles"`
	IgnoredOther []string `json:"IgnoredOtherFiles"`
	TestGoFiles  []string
	XTestGoFiles []string
	Imports      []string
	Error        *struct{ Err string }
	DepsErrors   []*struct{ Err string }
	ImportMap    map[string]string
}

// rel returns the path of the package inside the module: "vring", "board/loopback", "" for
// the root.
func (p *pkg) rel() string {
	return strings.TrimPrefix(strings.TrimPrefix(p.ImportPath, modulePath), "/")
}

// ours tells whether an import path is the project's own.
func ours(path string) bool {
	return path == modulePath || strings.HasPrefix(path, modulePath+"/")
}

// isStd tells whether an import path is the standard library's: no dot in its
// first element, and not ours.
func isStd(path string) bool {
	first, _, _ := strings.Cut(path, "/")
	return !strings.Contains(first, ".")
}

// goCommand runs the go command in the root and returns its standard output.
func goCommand(t testing.TB, dir string, env []string, args ...string) ([]byte, error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), env...)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		return out.Bytes(), fmt.Errorf("go %s: %w\n%s", args[0], err, bytes.TrimSpace(errOut.Bytes()))
	}
	return out.Bytes(), nil
}

// goList decodes the packages that go list -json prints.
func goList(t testing.TB, env []string, args ...string) []*pkg {
	t.Helper()
	out, err := goCommand(t, root, env, append([]string{"list", "-e", "-json"}, args...)...)
	if err != nil {
		t.Fatal(err)
	}
	var pkgs []*pkg
	dec := json.NewDecoder(bytes.NewReader(out))
	for {
		p := new(pkg)
		if err := dec.Decode(p); errors.Is(err, io.EOF) {
			return pkgs
		} else if err != nil {
			t.Fatalf("go list: %v", err)
		}
		pkgs = append(pkgs, p)
	}
}

var treeOnce struct {
	sync.Once
	pkgs []*pkg
}

// tree returns the packages of the project.
func tree(t testing.TB) []*pkg {
	t.Helper()
	treeOnce.Do(func() { treeOnce.pkgs = goList(t, nil, "./...") })
	if len(treeOnce.pkgs) < 2 {
		t.Fatal("go list finds no packages: the tests of the house have nothing to check")
	}
	return treeOnce.pkgs
}

// source is a parsed file. Its build constraints do not matter to the rules that look at
// sources only.
type source struct {
	name string // relative to the repository's root
	rel  string // of its package
	file *ast.File
	test bool
}

// parseTree parses all Go files of the tree, whatever they are built for.
func parseTree(t testing.TB, fset *token.FileSet) []source {
	t.Helper()
	var out []source
	for _, p := range tree(t) {
		files, err := filepath.Glob(filepath.Join(p.Dir, "*.go"))
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range files {
			base := filepath.Base(name)
			if base[0] == '_' || base[0] == '.' {
				continue
			}
			f, err := parser.ParseFile(fset, name, nil, parser.ParseComments|parser.SkipObjectResolution)
			if err != nil {
				t.Errorf("%v", err)
				continue
			}
			out = append(out, source{
				name: filepath.Join(p.rel(), base), rel: p.rel(), file: f,
				test: strings.HasSuffix(base, "_test.go"),
			})
		}
	}
	return out
}

// exports finds the compiled export data of packages.
type exports map[string]string

func (e exports) open(path string) (io.ReadCloser, error) {
	name := e[path]
	if name == "" {
		return nil, fmt.Errorf("no export data of %s: it does not compile", path)
	}
	return os.Open(name)
}

// checked is a package with its types.
type checked struct {
	rel   string
	fset  *token.FileSet
	files []*ast.File
	types *types.Package
	info  *types.Info
	errs  []error // of the type checker
}

// check type-checks parsed files as Go 1.18.
func check(path string, fset *token.FileSet, files []*ast.File, imp types.Importer, sizes types.Sizes) *checked {
	c := &checked{
		rel: strings.TrimPrefix(strings.TrimPrefix(path, modulePath), "/"), fset: fset, files: files,
		info: &types.Info{
			Types:      map[ast.Expr]types.TypeAndValue{},
			Defs:       map[*ast.Ident]types.Object{},
			Uses:       map[*ast.Ident]types.Object{},
			Selections: map[*ast.SelectorExpr]*types.Selection{},
			Instances:  map[*ast.Ident]types.Instance{},
			Implicits:  map[ast.Node]types.Object{},
		},
	}
	conf := types.Config{
		Importer:  imp,
		GoVersion: "go1.18",
		Sizes:     sizes,
		Error:     func(err error) { c.errs = append(c.errs, err) },
	}
	c.types, _ = conf.Check(path, fset, files, c.info)
	return c
}

// load type-checks the packages below cmd as they are built for linux on one
// architecture. A package whose imports do not compile is reported, and left out.
func load(t *testing.T, arch string) []*checked {
	t.Helper()
	var args []string
	for _, p := range tree(t) {
		if subset(p.rel()) {
			args = append(args, p.ImportPath)
		}
	}
	if len(args) == 0 {
		t.Fatal("no packages below cmd")
	}
	pkgs := goList(t, []string{"GOOS=linux", "GOARCH=" + arch, "CGO_ENABLED=0"}, append([]string{"-deps", "-export"}, args...)...)
	exp := exports{}
	for _, p := range pkgs {
		exp[p.ImportPath] = p.Export
	}
	fset := token.NewFileSet()
	imp := importer.ForCompiler(fset, "gc", exp.open)
	var out []*checked
	for _, p := range pkgs {
		if !ours(p.ImportPath) || !subset(p.rel()) {
			continue
		}
		var files []*ast.File
		for _, name := range p.GoFiles {
			f, err := parser.ParseFile(fset, filepath.Join(p.Dir, name), nil, parser.ParseComments|parser.SkipObjectResolution)
			if err != nil {
				t.Errorf("%v", err)
				continue
			}
			files = append(files, f)
		}
		if len(files) > 0 {
			out = append(out, check(p.ImportPath, fset, files, imp, types.SizesFor("gc", arch)))
		}
	}
	return out
}

// findings collects what a checker objects to, each with its place.
type findings struct {
	fset *token.FileSet
	list []string
}

func (f *findings) add(pos token.Pos, format string, args ...any) {
	where := ""
	if f.fset != nil && pos.IsValid() {
		p := f.fset.Position(pos)
		name := p.Filename
		if abs, err := filepath.Abs(root); err == nil {
			if r, err := filepath.Rel(abs, name); err == nil && !strings.HasPrefix(r, "..") {
				name = r
			}
		}
		where = fmt.Sprintf("%s:%d: ", name, p.Line)
	}
	f.list = append(f.list, where+fmt.Sprintf(format, args...))
}

// report makes the test fail with all findings, each once, in order.
func (f *findings) report(t testing.TB) {
	t.Helper()
	sort.Strings(f.list)
	last := ""
	for _, s := range f.list {
		if s != last {
			t.Error(s)
		}
		last = s
	}
}
