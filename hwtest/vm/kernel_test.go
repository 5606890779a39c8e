package vm_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/boardlink/boardlink/hwtest/vm"
	"github.com/boardlink/boardlink/hwtest/vm/vmtest"
)

// needApt ends the test where there is no apt.
func needApt(t *testing.T) {
	t.Helper()
	for _, f := range []string{"/usr/bin/apt-get", "/usr/share/keyrings/debian-archive-keyring.gpg"} {
		if _, err := os.Stat(f); err != nil {
			vmtest.Lacks(t, "%v", err)
		}
	}
}

// quiet keeps progress lines out of the way.
func quiet(t *testing.T) {
	old := vm.Logf
	vm.Logf = t.Logf
	t.Cleanup(func() { vm.Logf = old })
}

// TestFetchRefusesUnsigned: what is not signed by Debian is not booted.
func TestFetchRefusesUnsigned(t *testing.T) {
	needApt(t)
	quiet(t)
	t.Setenv("BOARDLINK_CACHE", t.TempDir())
	// An archive as a man in the middle would make it.
	repo := t.TempDir()
	dir := filepath.Join(repo, "dists/evil/main/binary-amd64")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{
		filepath.Join(dir, "Packages"):            "Package: linux-image-6.12.1-evil\nVersion: 1\nArchitecture: amd64\n",
		filepath.Join(repo, "dists/evil/Release"): "Suite: evil\nComponents: main\nArchitectures: amd64\nDate: Thu, 01 Jan 2026 00:00:00 UTC\n",
	} {
		if err := os.WriteFile(name, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	_, err := vm.Fetch(t.Context(), &vm.KernelSpec{Name: "evil", Arch: vm.AMD64, Version: "6.12", Flavour: "evil", Sources: []vm.Source{{URI: "file:" + repo, Suite: "evil"}}})
	if err == nil || !strings.Contains(err.Error(), "not signed") {
		t.Fatalf("an archive without a signature: %v", err)
	}
}

func TestFetchMissing(t *testing.T) {
	needApt(t)
	quiet(t)
	cache := t.TempDir()
	t.Setenv("BOARDLINK_CACHE", cache)
	nowhere := &vm.KernelSpec{Name: "nowhere", Arch: vm.AMD64, Version: "6.12", Flavour: "amd64", Sources: []vm.Source{{URI: "file:" + cache, Suite: "none"}}}
	var missing *vm.MissingError
	if _, err := vm.Fetch(t.Context(), nowhere); !errors.As(err, &missing) || !strings.Contains(err.Error(), "nowhere") || !strings.Contains(err.Error(), "network") {
		t.Errorf("no network: %v", err)
	}
	if left, _ := filepath.Glob(filepath.Join(cache, "kernels", "*")); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
	t.Setenv("PATH", t.TempDir())
	if _, err := vm.Fetch(t.Context(), nowhere); !errors.As(err, &missing) || missing.What != "apt-get is missing" {
		t.Errorf("no apt-get: %v", err)
	}
	if _, err := vm.Boot(t.Context(), vm.Pseries()); !errors.As(err, &missing) || missing.What != "qemu-system-ppc64 is missing" || !strings.Contains(missing.Mend, "qemu-system-ppc") {
		t.Errorf("no QEMU: %v", err)
	}
}
