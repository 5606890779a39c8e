package house

import (
	"bytes"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf8"
)

// maxFile is the size in bytes that no file of the tree exceeds.
const maxFile = 1 << 20

// pictures are the only files that are not text, and stand below docs.
var pictures = map[string]bool{".png": true, ".jpg": true, ".gif": true}

// checkFile is the rule of the files: text without the traces of one machine. The
// strings in traces must not occur.
func checkFile(name string, content []byte, traces []string) []string {
	var bad []string
	if len(content) > maxFile {
		bad = append(bad, fmt.Sprintf("%d bytes: too large for the tree", len(content)))
	}
	if strings.HasPrefix(name, "docs/") && pictures[strings.ToLower(filepath.Ext(name))] {
		return bad
	}
	if bytes.IndexByte(content, 0) >= 0 || !utf8.Valid(content) {
		return append(bad, "not text: no binaries in the tree")
	}
	for i, line := range strings.Split(string(content), "\n") {
		if strings.HasSuffix(line, "\r") {
			bad = append(bad, fmt.Sprintf("line %d: ends in CR LF", i+1))
		}
		if strings.HasPrefix(line, "<<<<<<< ") || strings.HasPrefix(line, ">>>>>>> ") {
			bad = append(bad, fmt.Sprintf("line %d: an unsolved merge", i+1))
		}
		for _, tr := range traces {
			if strings.Contains(line, tr) {
				bad = append(bad, fmt.Sprintf("line %d: %q belongs to this machine", i+1, tr))
			}
		}
	}
	return bad
}

// commonRoots are directories that many machines have, and that documents may name.
var commonRoots = map[string]bool{
	"app": true, "bin": true, "boot": true, "build": true, "builds": true, "data": true, "dev": true, "etc": true,
	"github": true, "go": true, "home": true, "lib": true, "media": true, "mnt": true, "opt": true, "proc": true,
	"root": true, "run": true, "sbin": true, "srv": true, "src": true, "sys": true, "tmp": true, "usr": true,
	"var": true, "workspace": true, "workspaces": true,
}

// machineTraces returns strings that tell on which machine a file was written: where
// the checkout lies, and a module proxy that is not the public one.
func machineTraces(dir, goproxy string) []string {
	var out []string
	dir = filepath.ToSlash(dir)
	parts := strings.Split(strings.Trim(dir, "/"), "/")
	if len(parts) > 1 {
		out = append(out, dir+"/")
	}
	if parts[0] != "" && !commonRoots[parts[0]] {
		out = append(out, "/"+parts[0]+"/")
	}
	for _, p := range strings.FieldsFunc(goproxy, func(r rune) bool { return r == ',' || r == '|' }) {
		if u, err := url.Parse(p); err == nil && u.Host != "" && u.Host != "proxy.golang.org" {
			out = append(out, u.Host)
		}
	}
	return out
}

// trackedFiles returns the files that git knows or would add.
func trackedFiles(t *testing.T, dir string) []string {
	t.Helper()
	// The directory may belong to another user than root, who runs the test.
	cmd := exec.CommandContext(t.Context(), "git", "-c", "safe.directory="+dir, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
	cmd.Dir = dir
	out, err := cmd.Output()
	if err != nil {
		lacks(t, "git and a checkout (git ls-files: %v)", err)
	}
	return strings.FieldsFunc(string(out), func(r rune) bool { return r == 0 })
}

func TestFiles(t *testing.T) {
	dir, err := filepath.Abs(root)
	if err != nil {
		t.Fatal(err)
	}
	proxy, err := goCommand(t, root, nil, "env", "GOPROXY")
	if err != nil {
		t.Fatal(err)
	}
	traces := machineTraces(dir, strings.TrimSpace(string(proxy)))
	files := trackedFiles(t, dir)
	if len(files) == 0 {
		t.Fatal("git lists no files")
	}
	for _, name := range files {
		path := filepath.Join(dir, name)
		st, err := os.Lstat(path)
		if err != nil || !st.Mode().IsRegular() {
			continue // deleted but not committed yet; a symbolic link
		}
		content, err := os.ReadFile(path)
		if err != nil {
			t.Error(err)
			continue
		}
		for _, b := range checkFile(name, content, traces) {
			t.Errorf("%s: %s", name, b)
		}
	}
}

func TestFileCheckerBites(t *testing.T) {
	traces := machineTraces("/farm7/ann/boardlink", "https://go.example.net/x,https://proxy.golang.org,direct")
	for _, c := range []struct {
		name, content string
		bad           bool
	}{
		{"a.go", "package a\n", false},
		{"a", "\x7fELF\x02\x00", true},
		{"a.md", "\xff\xfe", true},
		{"docs/path.png", "\x89PNG\x00", false},
		{"path.png", "\x89PNG\x00", true},
		{"a.go", "package a\r\n", true},
		{"a.go", "package a\n<<<<<<< HEAD\n", true},
		{"a.md", "see /farm7/ann/boardlink/a.go\n", true},
		{"a.md", "see /farm7/tools\n", true},
		{"a.md", "GOPROXY=https://go.example.net/x\n", true},
		{"a.md", "GOPROXY=https://proxy.golang.org, /tmp/x, /dev/net/tun\n", false},
		{"a.md", strings.Repeat("x\n", maxFile), true},
	} {
		if got := checkFile(c.name, []byte(c.content), traces); (len(got) > 0) != c.bad {
			t.Errorf("%s %.20q: found %q, want bad=%v", c.name, c.content, got, c.bad)
		}
	}
	for dir, want := range map[string]int{"/home/ann/boardlink": 1, "/builds": 0, "/boardlink": 1, "/x/y": 2} {
		if got := machineTraces(dir, "direct"); len(got) != want {
			t.Errorf("%s: traces %q, want %d", dir, got, want)
		}
	}
}
