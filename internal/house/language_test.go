package house

import (
	"bufio"
	"fmt"
	"go/ast"
	"go/build/constraint"
	"go/constant"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"testing"
)

// lastOld is the newest minor release of Go whose language and library the packages below
// cmd may use: gccgo, which boards with old processors depend on, has Go 1.18
// without generics.
const lastOld = 18

// checkLanguage is the rule of the language level, for one type-checked package. What
// the type checker itself refuses as Go 1.18 (range over int and func, min, max, clear,
// unsafe.String) is in c.errs.
func checkLanguage(f *findings, c *checked) {
	for _, err := range c.errs {
		if te, ok := err.(types.Error); ok {
			f.add(te.Pos, "as Go 1.%d: %s", lastOld, te.Msg)
		} else {
			f.add(token.NoPos, "as Go 1.%d: %v", lastOld, err)
		}
	}
	for _, file := range c.files {
		checkSyntax(f, file)
		checkLoopVars(f, c.info, file)
		ast.Inspect(file, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.Ident:
				if _, ok := c.info.Instances[n]; ok {
					f.add(n.Pos(), "%s is generic", n.Name)
				}
				if o := c.info.Uses[n]; o != nil && o.Pkg() == nil && o.Name() == "comparable" {
					f.add(n.Pos(), "comparable is for generics")
				}
			case *ast.CallExpr:
				checkErrorf(f, c.info, n)
			}
			return true
		})
	}
}

// checkSyntax finds what needs no types: declarations of generics, and files that raise
// their own language level.
func checkSyntax(f *findings, file *ast.File) {
	for _, g := range file.Comments {
		for _, c := range g.List {
			if c.Pos() > file.Package || !constraint.IsGoBuild(c.Text) {
				continue
			}
			if x, err := constraint.Parse(c.Text); err != nil {
				f.add(c.Pos(), "%v", err)
			} else if v := constraint.GoVersion(x); v != "" && minor(v) > lastOld {
				f.add(c.Pos(), "the build constraint raises the language level to %s", v)
			}
		}
	}
	ast.Inspect(file, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.FuncType:
			if n.TypeParams != nil {
				f.add(n.Pos(), "a generic function")
			}
		case *ast.TypeSpec:
			if n.TypeParams != nil {
				f.add(n.Pos(), "type %s is generic", n.Name.Name)
			}
		case *ast.IndexListExpr:
			f.add(n.Pos(), "a generic type or function is instantiated")
		case *ast.UnaryExpr:
			if n.Op == token.TILDE {
				f.add(n.Pos(), "a constraint of generics")
			}
		}
		return true
	})
}

func minor(v string) int {
	n, _ := strconv.Atoi(strings.TrimPrefix(v, "go1."))
	return n
}

// checkLoopVars finds closures over loop variables, and their addresses: Go 1.22 makes
// a variable for each iteration, older ones share a single one, and only the language
// version of go.mod, which the old toolchains do not see, tells which it is.
func checkLoopVars(f *findings, info *types.Info, file *ast.File) {
	ast.Inspect(file, func(n ast.Node) bool {
		vars := map[types.Object]bool{}
		def := func(e ast.Expr) {
			if id, ok := e.(*ast.Ident); ok && info.Defs[id] != nil {
				vars[info.Defs[id]] = true
			}
		}
		switch n := n.(type) {
		case *ast.RangeStmt:
			def(n.Key)
			def(n.Value)
		case *ast.ForStmt:
			if a, ok := n.Init.(*ast.AssignStmt); ok && a.Tok == token.DEFINE {
				for _, e := range a.Lhs {
					def(e)
				}
			}
		}
		if len(vars) > 0 {
			findLoopVars(f, info, n, vars)
		}
		return true
	})
}

func findLoopVars(f *findings, info *types.Info, loop ast.Node, vars map[types.Object]bool) {
	ast.Inspect(loop, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.FuncLit:
			ast.Inspect(n.Body, func(m ast.Node) bool {
				if id, ok := m.(*ast.Ident); ok && vars[info.Uses[id]] {
					f.add(id.Pos(), "a closure uses the loop variable %s: pass it, or copy it first", id.Name)
				}
				return true
			})
		case *ast.UnaryExpr:
			if n.Op == token.AND {
				if id := baseVar(info, n.X); id != nil && vars[info.Uses[id]] {
					f.add(n.Pos(), "the address of loop variable %s: index the slice, or copy it first", id.Name)
				}
			}
		}
		return true
	})
}

// baseVar returns the variable that x is a part of, without going through a
// pointer, slice or map; nil if there is none.
func baseVar(info *types.Info, x ast.Expr) *ast.Ident {
	for {
		switch e := x.(type) {
		case *ast.Ident:
			return e
		case *ast.ParenExpr:
			x = e.X
		case *ast.SelectorExpr:
			if s := info.Selections[e]; s == nil || s.Indirect() {
				return nil
			}
			x = e.X
		case *ast.IndexExpr:
			t := info.TypeOf(e.X)
			if t == nil {
				return nil
			}
			if _, ok := t.Underlying().(*types.Array); !ok {
				return nil
			}
			x = e.X
		default:
			return nil
		}
	}
}

// checkErrorf finds fmt.Errorf with more than one %w, which Go 1.20 brought.
func checkErrorf(f *findings, info *types.Info, call *ast.CallExpr) {
	sel, ok := call.Fun.(*ast.SelectorExpr)
	if !ok || len(call.Args) == 0 {
		return
	}
	fn, ok := info.Uses[sel.Sel].(*types.Func)
	if !ok || fn.FullName() != "fmt.Errorf" {
		return
	}
	if v := info.Types[call.Args[0]].Value; v != nil && v.Kind() == constant.String &&
		strings.Count(constant.StringVal(v), "%w") > 1 {
		f.add(call.Pos(), "fmt.Errorf with more than one %%w")
	}
}

// api is what the releases of Go after 1.18 added to the standard library.
type api struct {
	added map[string]int  // "sync/atomic.Bool", "bytes.Buffer.Available" -> minor release
	old   map[string]bool // packages that Go 1.18 had
}

// apiLine is a line of Go's api/go1.N.txt: "pkg os, method (*File) X(...)", "pkg syscall
// (linux-amd64), const Y = 1", "pkg sync/atomic, type Bool struct".
var apiLine = regexp.MustCompile(`^pkg ([\w/.]+)(?: \([\w-]+\))?, (func|method|type|const|var) (?:\(\*?(\w+)(?:\[[^\]]*\])?\) )?(\w+)(?:\[[^\]]*\])?(?: (?:struct|interface), (\w+))?`)

// readAPI reads Go's own lists of its API.
func readAPI(dir string) (*api, error) {
	a := &api{added: map[string]int{}, old: map[string]bool{"unsafe": true, "C": true}}
	known := map[string]bool{}
	for n := 0; ; n++ {
		name := "go1.txt"
		if n > 0 {
			name = fmt.Sprintf("go1.%d.txt", n)
		}
		file, err := os.Open(filepath.Join(dir, name))
		if err != nil {
			if n <= lastOld+1 {
				return nil, err
			}
			return a, nil
		}
		in := bufio.NewScanner(file)
		in.Buffer(nil, 1<<20)
		for in.Scan() {
			m := apiLine.FindStringSubmatch(in.Text())
			if m == nil {
				continue
			}
			key := m[1] + "."
			if m[3] != "" {
				key += m[3] + "."
			}
			key += m[4]
			if m[5] != "" && m[5] != "embedded" {
				key += "." + m[5]
			}
			if n <= lastOld {
				known[key], a.old[m[1]] = true, true
			} else if _, seen := a.added[key]; !seen && !known[key] {
				a.added[key] = n
			}
		}
		err = in.Err()
		file.Close()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
	}
}

// checkAPI is the rule of the library level, for one type-checked package.
func checkAPI(f *findings, a *api, c *checked) {
	for _, file := range c.files {
		for _, spec := range file.Imports {
			if path, err := strconv.Unquote(spec.Path.Value); err == nil && isStd(path) && !ours(path) && !a.old[path] {
				f.add(spec.Pos(), "package %s came after Go 1.%d", path, lastOld)
			}
		}
	}
	// A field does not know its struct.
	fields := map[types.Object]string{}
	for _, p := range c.types.Imports() {
		if !isStd(p.Path()) {
			continue
		}
		for _, name := range p.Scope().Names() {
			if tn, ok := p.Scope().Lookup(name).(*types.TypeName); ok {
				if st, ok := tn.Type().Underlying().(*types.Struct); ok {
					for i := 0; i < st.NumFields(); i++ {
						fields[st.Field(i)] = p.Path() + "." + name + "." + st.Field(i).Name()
					}
				}
			}
		}
	}
	for id, o := range c.info.Uses {
		if o.Pkg() == nil || !isStd(o.Pkg().Path()) {
			continue
		}
		key := o.Pkg().Path() + "." + o.Name()
		switch o := o.(type) {
		case *types.Func:
			if recv := o.Type().(*types.Signature).Recv(); recv != nil {
				t := recv.Type()
				if p, ok := t.(*types.Pointer); ok {
					t = p.Elem()
				}
				named, ok := t.(*types.Named)
				if !ok {
					continue
				}
				key = o.Pkg().Path() + "." + named.Obj().Name() + "." + o.Name()
			}
		case *types.Var:
			if o.IsField() {
				key = fields[o]
			}
		}
		if n, late := a.added[key]; late {
			f.add(id.Pos(), "%s came with Go 1.%d; Go 1.%d is the level", key, n, lastOld)
		}
	}
}

// goAPI reads the lists of the Go that runs the test.
func goAPI(t *testing.T) *api {
	t.Helper()
	out, err := goCommand(t, root, nil, "env", "GOROOT")
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(strings.TrimSpace(string(out)), "api")
	a, err := readAPI(dir)
	if err != nil {
		lacks(t, "the lists of Go's API (%v): they are part of Go's own distribution, or of Debian's golang-src", err)
	}
	return a
}

// lacks ends a test for want of something outside: a failure in CI, a skip elsewhere.
func lacks(t testing.TB, format string, args ...any) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf("needs "+format, args...)
	}
	t.Skipf("needs "+format, args...)
}

// TestGo118 holds the packages below cmd to the language and library of Go 1.18. On a
// big-endian and on a 32-bit machine other files are built.
func TestGo118(t *testing.T) {
	a := goAPI(t)
	arches := []string{"amd64", "ppc64", "386"}
	if testing.Short() {
		arches = []string{runtime.GOARCH}
	}
	for _, arch := range arches {
		t.Run(arch, func(t *testing.T) {
			f := &findings{}
			for _, c := range load(t, arch) {
				f.fset = c.fset
				checkLanguage(f, c)
				checkAPI(f, a, c)
			}
			f.report(t)
		})
	}
}

func TestLanguageCheckerBites(t *testing.T) {
	a := goAPI(t)
	deps := goList(t, nil, "-deps", "-export", "fmt", "sync/atomic", "errors", "bytes", "net", "time", "slices", "log/slog")
	exp := exports{}
	for _, p := range deps {
		exp[p.ImportPath] = p.Export
	}
	for _, c := range []struct{ name, src, want string }{
		{"clean", `import ("fmt"; "sync/atomic")
			type s struct{ n uint64 }
			func (s *s) add() error { atomic.AddUint64(&s.n, 1); return fmt.Errorf("x: %w", error(nil)) }
			func f(b []int, m map[string][4]int, p []*s) {
				for i := 0; i < 3; i++ { j := i; go func() { _ = j }(); _ = &b[i] }
				for _, q := range p { _ = &q.n }
				for k := range m { go func(k string) { _ = k }(k) }
			}`, ""},
		{"range over int", `func f() { for i := range 10 { _ = i } }`, "cannot range over 10"},
		{"range over func", `func f(g func(func(int) bool)) { for i := range g { _ = i } }`, "cannot range over g"},
		{"min", `var x = func(a, b int) int { return min(a, b) }`, "min requires go1.21"},
		{"clear", `func f(m map[int]int) { clear(m) }`, "clear requires go1.21"},
		{"generic function", `func f[T any](t T) T { return t }`, "a generic function"},
		{"generic type", `type s[T any] struct{ t T }`, "type s is generic"},
		{"constraint", `type c interface { ~int | ~uint }`, "a constraint of generics"},
		{"generic of the library", `import "slices"
			func f(x []int) { slices.Sort(x) }`, "Sort is generic"},
		{"package too new", `import "log/slog"
			var l *slog.Logger`, "package log/slog came after"},
		{"atomic type", `import "sync/atomic"
			var x atomic.Uint32`, "sync/atomic.Uint32 came with Go 1.19"},
		{"errors.Join", `import "errors"
			var e = errors.Join(nil)`, "errors.Join came with Go 1.20"},
		{"method too new", `import "bytes"
			func f(b *bytes.Buffer) { b.AvailableBuffer() }`, "bytes.Buffer.AvailableBuffer came with Go 1.21"},
		{"field too new", `import "net"
			var c = net.ListenConfig{KeepAliveConfig: net.KeepAliveConfig{}}`, "net.ListenConfig.KeepAliveConfig came with Go 1.23"},
		{"constant too new", `import "time"
			var c = time.DateOnly`, "time.DateOnly came with Go 1.20"},
		{"function too new", `import "fmt"
			var c = fmt.Append(nil, 1)`, "fmt.Append came with Go 1.19"},
		{"two %w", `import "fmt"
			func f(a, b error) error { return fmt.Errorf("%w: %w", a, b) }`, "more than one %w"},
		{"closure in for", `func f() { for i := 0; i < 3; i++ { defer func() { _ = i }() } }`, "closure uses the loop variable i"},
		{"closure in range", `func f(x []int) { for _, v := range x { go func() { println(v) }() } }`, "closure uses the loop variable v"},
		{"closure in an inner block", `func f(x []int) { for k := range x { if k > 1 { for { g := func() int { return k }; g() } } } }`, "closure uses the loop variable k"},
		{"address", `func f(x []int) (p *int) { for _, v := range x { p = &v }; return }`, "address of loop variable v"},
		{"address of a part", `func f(x [][2]struct{ n int }) (p *int) { for _, v := range x { p = &v[1].n }; return }`, "address of loop variable v"},
	} {
		t.Run(c.name, func(t *testing.T) {
			fset := token.NewFileSet()
			file, err := parser.ParseFile(fset, "x.go", "package x\n"+c.src, parser.ParseComments|parser.SkipObjectResolution)
			if err != nil {
				t.Fatal(err)
			}
			imp := importer.ForCompiler(fset, "gc", exp.open)
			ck := check("x", fset, []*ast.File{file}, imp, types.SizesFor("gc", "amd64"))
			f := &findings{fset: fset}
			checkLanguage(f, ck)
			checkAPI(f, a, ck)
			all := strings.Join(f.list, "\n")
			if (c.want == "") != (all == "") || !strings.Contains(all, c.want) {
				t.Errorf("found %q, want %q", all, c.want)
			}
		})
	}
}

func TestFileVersionCheckerBites(t *testing.T) {
	for src, bad := range map[string]bool{
		"//go:build go1.21\n\npackage x\n":        true,
		"//go:build linux && go1.19\n\npackage x": true,
		"//go:build go1.18 && linux\n\npackage x": false,
		"//go:build gc\n\npackage x":              false,
	} {
		fset := token.NewFileSet()
		file, err := parser.ParseFile(fset, "x.go", src, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		f := &findings{fset: fset}
		checkSyntax(f, file)
		if (len(f.list) > 0) != bad {
			t.Errorf("%q: found %q, want bad=%v", src, f.list, bad)
		}
	}
}
