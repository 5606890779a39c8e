package house

import (
	"fmt"
	"go/ast"
	"go/build/constraint"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// checkDocs is the rule of comments: every exported symbol of a package that others
// can import has one.
func checkDocs(f *findings, file *ast.File) {
	for _, d := range file.Decls {
		switch d := d.(type) {
		case *ast.FuncDecl:
			if d.Name.IsExported() && d.Doc.Text() == "" && exportedRecv(d.Recv) {
				f.add(d.Pos(), "%s has no doc comment", d.Name.Name)
			}
		case *ast.GenDecl:
			for _, s := range d.Specs {
				switch s := s.(type) {
				case *ast.TypeSpec:
					if s.Name.IsExported() && s.Doc.Text() == "" && (d.Doc.Text() == "" || len(d.Specs) > 1) {
						f.add(s.Pos(), "type %s has no doc comment", s.Name.Name)
					}
				case *ast.ValueSpec:
					for _, n := range s.Names {
						if n.IsExported() && d.Doc.Text() == "" && s.Doc.Text() == "" && s.Comment.Text() == "" {
							f.add(n.Pos(), "%s has no doc comment", n.Name)
						}
					}
				}
			}
		}
	}
}

// exportedRecv tells whether a method's type is exported; true for functions.
func exportedRecv(recv *ast.FieldList) bool {
	if recv == nil || len(recv.List) == 0 {
		return true
	}
	t := recv.List[0].Type
	for {
		switch x := t.(type) {
		case *ast.StarExpr:
			t = x.X
		case *ast.IndexExpr:
			t = x.X
		case *ast.IndexListExpr:
			t = x.X
		case *ast.Ident:
			return x.IsExported()
		default:
			return true
		}
	}
}

func TestDocComments(t *testing.T) {
	fset := token.NewFileSet()
	f := &findings{fset: fset}
	documented := map[string]bool{}
	for _, s := range parseTree(t, fset) {
		if s.test {
			continue
		}
		if s.file.Doc.Text() != "" {
			documented[s.rel] = true
		}
		if s.file.Name.Name != "main" {
			checkDocs(f, s.file)
		}
	}
	for _, p := range tree(t) {
		if len(p.GoFiles)+len(p.IgnoredFiles) > 0 && !documented[p.rel()] {
			f.add(token.NoPos, "%s: no file has a package comment: say what is in the room and what never is", p.rel())
		}
	}
	f.report(t)
}

func TestDocCheckerBites(t *testing.T) {
	for src, want := range map[string]string{
		"func F() {}":           "F has no",
		"// F is.\nfunc F() {}": "",
		"func f() {}":           "",
		"type T int":            "type T has no",
		"// T is.\ntype T int":  "",
		"// T is.\ntype T int\nfunc (t *T) M() {}":    "M has no",
		"type t int\nfunc (t) M() {}":                 "",
		"const A = 1":                                 "A has no",
		"// All.\nconst (\nA = 1\nB = 2\n)":           "",
		"const (\nA = 1 // a\nB = 2\n)":               "B has no",
		"var E = 1":                                   "E has no",
		"// Both.\ntype (\n// A is.\nA int\nB int\n)": "type B has no",
		"//go:noinline\nfunc F() {}":                  "F has no",
	} {
		fset := token.NewFileSet()
		file, err := parser.ParseFile(fset, "x.go", "package x\n\n"+src+"\n", parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		f := &findings{fset: fset}
		checkDocs(f, file)
		all := strings.Join(f.list, "\n")
		if (want == "") != (all == "") || !strings.Contains(all, want) {
			t.Errorf("%q: found %q, want %q", src, all, want)
		}
	}
}

// needsGC returns an error unless the file's build constraint keeps every compiler
// but gc away. The assembly is gc's; gccgo takes the fallbacks.
func needsGC(src string) error {
	for _, line := range strings.Split(src, "\n") {
		line = strings.TrimSpace(line)
		if constraint.IsGoBuild(line) {
			x, err := constraint.Parse(line)
			if err != nil {
				return err
			}
			for _, other := range []bool{false, true} {
				if x.Eval(func(tag string) bool { return tag != "gc" && other }) {
					return fmt.Errorf("%s: another compiler than gc would take it", line)
				}
			}
			return nil
		}
		if line != "" && !strings.HasPrefix(line, "//") {
			break
		}
	}
	return fmt.Errorf("no //go:build gc at its top")
}

func TestAssemblyIsForGC(t *testing.T) {
	fset := token.NewFileSet()
	for _, s := range parseTree(t, fset) {
		for _, d := range s.file.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && fn.Body == nil {
				src, err := os.ReadFile(filepath.Join(root, s.name))
				if err == nil {
					err = needsGC(string(src))
				}
				if err != nil {
					t.Errorf("%s: %s is declared without a body: %v", s.name, fn.Name.Name, err)
				}
			}
		}
	}
	for _, p := range tree(t) {
		files, err := filepath.Glob(filepath.Join(p.Dir, "*.s"))
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range files {
			src, err := os.ReadFile(name)
			if err == nil {
				err = needsGC(string(src))
			}
			if err != nil {
				t.Errorf("%s/%s: %v", p.rel(), filepath.Base(name), err)
			}
		}
	}
}

func TestAssemblyCheckerBites(t *testing.T) {
	for src, bad := range map[string]bool{
		"//go:build gc\n\n#include \"textflag.h\"\n":         false,
		"// Barriers.\n\n//go:build gc && !purego\n\nTEXT ·": false,
		"//go:build (ppc64 || ppc64le) && gc\n":              false,
		"#include \"textflag.h\"\n":                          true,
		"//go:build ppc64 || ppc64le\n":                      true,
		"//go:build gc || ppc64\n":                           true,
		"//go:build !gc\n":                                   true,
		"TEXT ·x(SB)\n//go:build gc\n":                       true,
		"":                                                   true,
	} {
		if err := needsGC(src); (err != nil) != bad {
			t.Errorf("%q: %v, want bad=%v", src, err, bad)
		}
	}
}

// checkBenchLoop finds benchmarks that count to b.N: b.Loop keeps the compiler from
// dropping the work, and the set-up out of the time.
func checkBenchLoop(f *findings, file *ast.File) {
	for _, d := range file.Decls {
		fn, ok := d.(*ast.FuncDecl)
		if !ok || fn.Body == nil {
			continue
		}
		ast.Inspect(fn, func(n ast.Node) bool {
			ft, ok := n.(*ast.FuncType)
			if !ok {
				return true
			}
			for _, p := range ft.Params.List {
				star, ok := p.Type.(*ast.StarExpr)
				if !ok {
					continue
				}
				sel, ok := star.X.(*ast.SelectorExpr)
				if !ok || sel.Sel.Name != "B" {
					continue
				}
				if x, ok := sel.X.(*ast.Ident); !ok || x.Name != "testing" {
					continue
				}
				for _, name := range p.Names {
					findN(f, fn.Body, name.Name)
				}
			}
			return true
		})
	}
}

// findN finds b.N as the end of a loop. After b.Loop it is the number of iterations, which a
// metric may be divided by.
func findN(f *findings, body *ast.BlockStmt, b string) {
	end := func(n ast.Node) bool {
		if sel, ok := n.(*ast.SelectorExpr); ok && sel.Sel.Name == "N" {
			if x, ok := sel.X.(*ast.Ident); ok && x.Name == b {
				f.add(sel.Pos(), "a loop to %s.N: use for %s.Loop()", b, b)
			}
		}
		return true
	}
	ast.Inspect(body, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.ForStmt:
			if n.Cond != nil {
				ast.Inspect(n.Cond, end)
			}
		case *ast.RangeStmt:
			ast.Inspect(n.X, end)
		}
		return true
	})
}

func TestBenchmarksLoop(t *testing.T) {
	fset := token.NewFileSet()
	f := &findings{fset: fset}
	for _, s := range parseTree(t, fset) {
		if s.test {
			checkBenchLoop(f, s.file)
		}
	}
	f.report(t)
}

func TestBenchCheckerBites(t *testing.T) {
	for src, bad := range map[string]bool{
		"func BenchmarkX(b *testing.B) { for i := 0; i < b.N; i++ {} }":                                   true,
		"func BenchmarkX(b *testing.B) { b.Run(\"\", func(c *testing.B) { for range c.N {} }) }":          true,
		"func BenchmarkX(b *testing.B) { for b.Loop() {} }":                                               false,
		"func f(b *ring) int { return b.N }":                                                              false,
		"func BenchmarkX(b *testing.B) { for b.Loop() {}; b.ReportMetric(9/float64(b.N), \"reads/op\") }": false,
	} {
		fset := token.NewFileSet()
		file, err := parser.ParseFile(fset, "x.go", "package x\n"+src+"\n", 0)
		if err != nil {
			t.Fatal(err)
		}
		f := &findings{fset: fset}
		checkBenchLoop(f, file)
		if (len(f.list) > 0) != bad {
			t.Errorf("%q: found %q, want bad=%v", src, f.list, bad)
		}
	}
}
