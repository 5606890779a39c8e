package house

import (
	"go/ast"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// named are the pages whose files and names of code have to exist: what stands in backquotes there.
var named = []string{"docs/extending.md", "docs/architecture.md"}

var (
	quoted   = regexp.MustCompile("`([^`\n]+)`")
	filePath = regexp.MustCompile(`^[a-z][a-z0-9_-]*(/[a-z0-9_.-]+)+/?$`)
	goName   = regexp.MustCompile(`^([a-z][a-z0-9]*)\.([A-Z]\w*)(?:\.([A-Z]\w*))?$`)
)

// symbols are what packages declare, by the package's name: "device.Device", "device.Device.Reset". Packages of the same name
// are one.
func symbols(sources []source) map[string]bool {
	names := map[string]bool{}
	for _, s := range sources {
		if s.test {
			continue
		}
		p := s.file.Name.Name + "."
		names[p] = true
		for _, d := range s.file.Decls {
			switch d := d.(type) {
			case *ast.FuncDecl:
				n := p
				if d.Recv != nil {
					n += receiver(d.Recv.List[0].Type) + "."
				}
				names[n+d.Name.Name] = true
			case *ast.GenDecl:
				for _, spec := range d.Specs {
					switch spec := spec.(type) {
					case *ast.ValueSpec:
						for _, n := range spec.Names {
							names[p+n.Name] = true
						}
					case *ast.TypeSpec:
						names[p+spec.Name.Name] = true
						var members *ast.FieldList
						switch t := spec.Type.(type) {
						case *ast.StructType:
							members = t.Fields
						case *ast.InterfaceType:
							members = t.Methods
						default:
							continue
						}
						for _, f := range members.List {
							for _, n := range f.Names {
								names[p+spec.Name.Name+"."+n.Name] = true
							}
						}
					}
				}
			}
		}
	}
	return names
}

func receiver(t ast.Expr) string {
	if s, ok := t.(*ast.StarExpr); ok {
		t = s.X
	}
	if id, ok := t.(*ast.Ident); ok {
		return id.Name
	}
	return ""
}

// unknown returns what a page names and the tree does not have.
func unknown(page string, names map[string]bool, exists func(path string) bool) (bad []string) {
	for _, m := range quoted.FindAllStringSubmatch(page, -1) {
		n := m[1]
		switch parts := goName.FindStringSubmatch(n); {
		case parts != nil && names[parts[1]+"."]:
			if !names[n] {
				bad = append(bad, n)
			}
		case filePath.MatchString(n) && exists(strings.SplitN(n, "/", 2)[0]):
			if !exists(strings.TrimSuffix(strings.TrimSuffix(n, "/..."), "/")) {
				bad = append(bad, n)
			}
		}
	}
	return bad
}

// TestPagesNameWhatExists: files and names of code in the pages for who changes the code are those of the tree.
func TestPagesNameWhatExists(t *testing.T) {
	names := symbols(parseTree(t, token.NewFileSet()))
	exists := func(path string) bool {
		_, err := os.Stat(filepath.Join(root, path))
		return err == nil
	}
	for _, page := range named {
		b, err := os.ReadFile(filepath.Join(root, page))
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range unknown(string(b), names, exists) {
			t.Errorf("%s names %s, which does not exist", page, n)
		}
		if n := len(quoted.FindAllString(string(b), -1)); n < 40 {
			t.Errorf("%s: %d names found", page, n)
		}
	}
}

func TestPageCheckerBites(t *testing.T) {
	names := map[string]bool{"device.": true, "device.Device": true, "device.Device.Reset": true}
	exists := func(path string) bool {
		return path == "device" || path == "device/device.go" || path == "device/netdev"
	}
	page := "`device.Device`, `device.Device.Reset`, `device/device.go`, `device/netdev/`, `device/netdev/...`, `eth0.Foo`, `no/path`, `device.Gone`, `device.Device.Start`, `device/gone.go`"
	got := strings.Join(unknown(page, names, exists), " ")
	if got != "device.Gone device.Device.Start device/gone.go" {
		t.Errorf("found %q", got)
	}
}
