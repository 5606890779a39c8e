package vm_test

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/boardlink/boardlink/hwtest/vm"
)

// mirror is an archive of Debian's kind with faults: kernels of a few bytes, in suites whose lists may name
// files that are not there.
type mirror struct {
	*httptest.Server
	mu       sync.Mutex
	files    map[string][]byte // by path
	next     map[string][]byte // replaces files once a package was asked for that is not there
	cut      map[string]bool   // packages that break off in the middle
	packages []string          // the packages that were asked for, with "404 " or "cut " in front of those that did not arrive
}

func newMirror(t *testing.T) *mirror {
	t.Helper()
	for _, e := range []string{"http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"} {
		t.Setenv(e, "")
	}
	m := &mirror{files: map[string][]byte{}, cut: map[string]bool{}}
	m.Server = httptest.NewServer(m)
	t.Cleanup(m.Close)
	return m
}

func (m *mirror) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	m.mu.Lock()
	defer m.mu.Unlock()
	b, ok := m.files[r.URL.Path]
	deb, isDeb := strings.CutPrefix(r.URL.Path, "/pool/")
	switch {
	case !ok:
		if isDeb {
			m.packages = append(m.packages, "404 "+deb)
			for p, b := range m.next {
				m.files[p] = b
			}
		}
		http.NotFound(w, r)
		return
	case m.cut[deb]:
		m.packages = append(m.packages, "cut "+deb)
		w.Header().Set("Content-Length", fmt.Sprint(len(b)))
		w.Write(b[:len(b)/2])
		panic(http.ErrAbortHandler)
	case isDeb:
		m.packages = append(m.packages, deb)
	}
	w.Write(b)
}

// asked returns the packages that were asked for, each once in a row: apt asks again for what broke off.
func (m *mirror) asked() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []string
	for _, p := range m.packages {
		if len(out) == 0 || out[len(out)-1] != p {
			out = append(out, p)
		}
	}
	return out
}

// deb builds a kernel's package.
func deb(t *testing.T, pkg, version string) []byte {
	t.Helper()
	dir := t.TempDir()
	release := strings.TrimPrefix(pkg, "linux-image-")
	for name, content := range map[string]string{
		"DEBIAN/control":                                    "Package: " + pkg + "\nVersion: " + version + "\nArchitecture: amd64\nMaintainer: nobody <nobody@example.org>\nDescription: a kernel\n",
		"boot/vmlinuz-" + release:                           "kernel " + version,
		"usr/lib/modules/" + release + "/modules.builtin":   "kernel/fs/ext4/ext4.ko\n",
		"usr/lib/modules/" + release + "/kernel/net/tun.ko": "a module",
	} {
		p := filepath.Join(dir, "root", name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(p), 0o755), os.WriteFile(p, []byte(content), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	out := filepath.Join(dir, "out.deb")
	if b, err := exec.Command("dpkg-deb", "--root-owner-group", "-Znone", "--build", filepath.Join(dir, "root"), out).CombinedOutput(); err != nil {
		t.Fatalf("dpkg-deb: %v: %s", err, b)
	}
	b, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// list makes the files of a suite that names the packages, each "name version".
func list(t *testing.T, suite string, packages map[string][]byte) map[string][]byte {
	t.Helper()
	var b strings.Builder
	for p, content := range packages {
		name, version, _ := strings.Cut(p, " ")
		fmt.Fprintf(&b, "Package: %s\nVersion: %s\nArchitecture: amd64\nFilename: pool/%s_%s.deb\nSize: %d\nSHA256: %x\n\n", name, version, name, version, len(content), sha256.Sum256(content))
	}
	index := []byte(b.String())
	release := fmt.Sprintf("Suite: %[1]s\nCodename: %[1]s\nComponents: main\nArchitectures: amd64\nDate: Thu, 01 Jan 2026 00:00:00 UTC\nSHA256:\n %x %d main/binary-amd64/Packages\n",
		suite, sha256.Sum256(index), len(index))
	return map[string][]byte{
		"/dists/" + suite + "/main/binary-amd64/Packages": index,
		"/dists/" + suite + "/Release":                    []byte(release),
	}
}

func add(files map[string][]byte, more map[string][]byte) {
	for p, b := range more {
		files[p] = b
	}
}

const (
	k100 = "linux-image-6.12.100+deb13-cloud-amd64"
	k99  = "linux-image-6.12.99+deb13-cloud-amd64"
	k90  = "linux-image-6.12.90+deb12.1-cloud-amd64"
)

func (m *mirror) spec(suites ...string) *vm.KernelSpec {
	s := &vm.KernelSpec{Name: "fake", Arch: vm.AMD64, Version: "6.12", Flavour: "cloud-amd64"}
	for _, suite := range suites {
		s.Sources = append(s.Sources, vm.Source{URI: m.URL, Suite: suite})
	}
	return s
}

// leftovers returns what a fetch left in the cache besides the kernels that arrived.
func leftovers(t *testing.T, cache string, kernels int) []string {
	t.Helper()
	var out []string
	for _, pattern := range []string{"kernels/.new-*", "noiommu-*", "apt/*/deb-*", "apt/*/cache/archives/*.deb", "apt/*/cache/archives/partial/*"} {
		l, _ := filepath.Glob(filepath.Join(cache, pattern))
		out = append(out, l...)
	}
	if l, _ := filepath.Glob(filepath.Join(cache, "kernels", "*")); len(l) != kernels {
		out = append(out, l...)
	}
	return out
}

// TestFetchTriesAll: a newer kernel that does not arrive, a list that is behind, a suite that is missing, a
// download that breaks off: the next is tried, in order; if none arrives, the message names all.
func TestFetchTriesAll(t *testing.T) {
	needApt(t)
	vm.FakeMirrors(t)
	quiet(t)
	b100, b99, b90 := deb(t, k100, "6.12.100-1"), deb(t, k99, "6.12.99-1"), deb(t, k90, "6.12.90-2~bpo12+1")
	pool := func(name, version string) string { return "/pool/" + name + "_" + version + ".deb" }
	for _, c := range []struct {
		name    string
		lay     func(m *mirror)
		suites  []string
		asked   []string // in order
		release string   // of the kernel that arrives; empty: none does
		says    []string // the message's lines, in order, without the mend
	}{
		{
			name: "the newest is gone",
			lay: func(m *mirror) {
				add(m.files, list(t, "new", map[string][]byte{k100 + " 6.12.100-1": b100, k99 + " 6.12.99-1": b99}))
				m.files[pool(k99, "6.12.99-1")] = b99
			},
			suites:  []string{"new"},
			asked:   []string{"404 " + k100 + "_6.12.100-1.deb", k99 + "_6.12.99-1.deb"},
			release: "6.12.99+deb13-cloud-amd64",
		},
		{
			name: "the list is behind the files",
			lay: func(m *mirror) {
				add(m.files, list(t, "new", map[string][]byte{k99 + " 6.12.99-1": b99}))
				m.files[pool(k100, "6.12.100-1")] = b100
				m.next = list(t, "new", map[string][]byte{k100 + " 6.12.100-1": b100})
			},
			suites:  []string{"new"},
			asked:   []string{"404 " + k99 + "_6.12.99-1.deb", k100 + "_6.12.100-1.deb"},
			release: "6.12.100+deb13-cloud-amd64",
		},
		{
			name: "a suite is missing, another has no such kernel, a download breaks off",
			lay: func(m *mirror) {
				add(m.files, list(t, "empty", map[string][]byte{"linux-image-6.12.90+deb12-rt-amd64 1": b90, "linux-image-6.12.90+deb12-cloud-amd64-dbg 1": b90}))
				add(m.files, list(t, "cut", map[string][]byte{k100 + " 6.12.100-1": b100}))
				add(m.files, list(t, "old", map[string][]byte{k90 + " 6.12.90-2~bpo12+1": b90}))
				m.files[pool(k100, "6.12.100-1")] = b100
				m.files[pool(k90, "6.12.90-2~bpo12+1")] = b90
				m.cut[k100+"_6.12.100-1.deb"] = true
			},
			suites:  []string{"none", "empty", "cut", "old"},
			asked:   []string{"cut " + k100 + "_6.12.100-1.deb", k90 + "_6.12.90-2~bpo12+1.deb"},
			release: "6.12.90+deb12.1-cloud-amd64",
		},
		{
			name: "nothing arrives",
			lay: func(m *mirror) {
				add(m.files, list(t, "new", map[string][]byte{k100 + " 6.12.100-1": b100, k99 + " 6.12.99-1": b99}))
				add(m.files, list(t, "old", map[string][]byte{k90 + " 6.12.90-2~bpo12+1": b90}))
				m.files[pool(k90, "6.12.90-2~bpo12+1")] = append([]byte("?"), b90[1:]...) // not what the list says
			},
			suites: []string{"none", "new", "old"},
			asked:  []string{"404 " + k100 + "_6.12.100-1.deb", "404 " + k99 + "_6.12.99-1.deb", k90 + "_6.12.90-2~bpo12+1.deb"},
			says: []string{"the kernel fake is not in the cache, and Debian's mirrors did not deliver one:",
				"  none: list of packages: 404 Not Found",
				"  new: 404 Not Found: " + k100 + " 6.12.100-1, " + k99 + " 6.12.99-1",
				"  old: Hash Sum mismatch: " + k90 + " 6.12.90-2~bpo12+1"},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			cache := t.TempDir()
			t.Setenv("BOARDLINK_CACHE", cache)
			m := newMirror(t)
			c.lay(m)
			k, err := vm.Fetch(t.Context(), m.spec(c.suites...))
			if got := m.asked(); strings.Join(got, "\n") != strings.Join(c.asked, "\n") {
				t.Errorf("asked for\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(c.asked, "\n"))
			}
			if c.release == "" {
				var missing *vm.MissingError
				if !errors.As(err, &missing) {
					t.Fatalf("no kernel arrives: %v, want a MissingError", err)
				}
				want := strings.Join(c.says, "\n") + "\n(" + missing.Mend + ")"
				if err.Error() != want || !strings.Contains(missing.Mend, "BOARDLINK_DEBIAN_MIRROR") {
					t.Errorf("message\n%v\nwant\n%s", err, want)
				}
				if l := leftovers(t, cache, 0); len(l) != 0 {
					t.Errorf("left behind: %v", l)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if k.Release != c.release {
				t.Errorf("kernel %s, want %s", k.Release, c.release)
			}
			if b, err := os.ReadFile(filepath.Join(k.Dir, "lib/modules", k.Release, "kernel/net/tun.ko")); string(b) != "a module" {
				t.Errorf("its module: %q, %v", b, err)
			}
			if l := leftovers(t, cache, 1); len(l) != 0 {
				t.Errorf("left behind: %v", l)
			}
		})
	}
}

// TestFetchKeepsOldList: a list that was read before serves where the mirror's is broken now, and what an
// earlier process left behind half-way is removed.
func TestFetchKeepsOldList(t *testing.T) {
	needApt(t)
	vm.FakeMirrors(t)
	quiet(t)
	cache := t.TempDir()
	t.Setenv("BOARDLINK_CACHE", cache)
	m := newMirror(t)
	b := deb(t, k99, "6.12.99-1")
	add(m.files, list(t, "new", map[string][]byte{k99 + " 6.12.99-1": b}))
	if _, err := vm.Fetch(t.Context(), m.spec("new")); !vm.IsMissing(err) {
		t.Fatalf("a package that is not there: %v", err)
	}
	// The mirror is being updated: Release is newer than the list it names.
	m.mu.Lock()
	m.files["/pool/"+k99+"_6.12.99-1.deb"] = b
	m.files["/dists/new/Release"] = list(t, "new", map[string][]byte{k100 + " 6.12.100-1": b})["/dists/new/Release"]
	m.mu.Unlock()
	for _, d := range []string{"kernels/.new-1", "noiommu-1", "apt/new-amd64/deb-1"} {
		if err := os.MkdirAll(filepath.Join(cache, d, "boot"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	k, err := vm.Fetch(t.Context(), m.spec("new"))
	if err != nil {
		t.Fatal(err)
	}
	if k.Release != "6.12.99+deb13-cloud-amd64" {
		t.Errorf("kernel %s", k.Release)
	}
	if l := leftovers(t, cache, 1); len(l) != 0 {
		t.Errorf("left behind: %v", l)
	}
}

// TestFetchUnreachable: a mirror that nothing answers for is asked once, not once for each suite and version.
func TestFetchUnreachable(t *testing.T) {
	needApt(t)
	vm.FakeMirrors(t)
	quiet(t)
	t.Setenv("BOARDLINK_CACHE", t.TempDir())
	m := newMirror(t)
	host := strings.TrimPrefix(m.URL, "http://")
	m.Close()
	_, err := vm.Fetch(t.Context(), m.spec("a", "b", "c"))
	if !vm.IsMissing(err) || strings.Count(err.Error(), "list of packages: ") != 1 || strings.Count(err.Error(), "not tried: "+host+" does not answer") != 2 {
		t.Errorf("nothing answers: %v", err)
	}
}

// TestCompareVersions compares neighbours of a sorted list with dpkg, and all with all by the list.
func TestCompareVersions(t *testing.T) {
	needApt(t)
	v := []string{"6.1", "6.1a", "6.1+a", "6.1.0-56", "6.12~rc1-1", "6.12-1", "6.12.90-1~bpo12+1", "6.12.90-1", "6.12.90-2~bpo12+1", "6.12.100-1~deb12u1", "6.12.100-1", "007", "1:0"}
	for i, a := range v {
		if i > 0 {
			if err := exec.Command("dpkg", "--compare-versions", v[i-1], "lt", a).Run(); err != nil {
				t.Errorf("%s before %s, dpkg says otherwise: %v", v[i-1], a, err)
			}
		}
		for j, b := range v {
			if c := vm.CompareVersions(a, b); (c < 0) != (i < j) || (c > 0) != (i > j) {
				t.Errorf("%s and %s compare as %d", a, b, c)
			}
		}
	}
	if c := vm.CompareVersions("007-0", "7"); c != 0 {
		t.Errorf("007-0 and 7 compare as %d", c)
	}
}
