package vm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Arch is a guest's architecture, by Go's name.
type Arch string

// The architectures that machines are made of.
const (
	AMD64   Arch = "amd64"   // QEMU's q35
	PPC64LE Arch = "ppc64le" // QEMU's pseries
)

// KernelSpec names a kernel by where it comes from. Use one of the variables.
type KernelSpec struct {
	// Name is the kernel's folder in the cache.
	Name string
	// Arch is what it runs on.
	Arch Arch
	// Version and Flavour choose among the kernels of a suite: "6.12" and "cloud-amd64" mean every
	// package linux-image-6.12.*-cloud-amd64.
	Version, Flavour string
	// Sources are tried in order, and of each all its kernels, the newest first, until one arrives.
	Sources []Source
	// NoIOMMU replaces vfio.ko by one built with CONFIG_VFIO_NOIOMMU.
	NoIOMMU bool
	// exact: Version is a kernel's whole release, with the flavour.
	exact bool
}

// Source is a suite of a Debian archive.
type Source struct {
	URI, Suite string
}

const (
	debian   = "http://deb.debian.org/debian"
	security = "http://deb.debian.org/debian-security"
)

// The kernels that machines boot. The suites of Debian 12 come first where they have the version: the
// programs in their kernels' headers run on Debian 12 and later.
var (
	// Linux612 is Linux 6.12 for x86 cloud machines.
	Linux612 = &KernelSpec{Name: "amd64-6.12", Arch: AMD64, Version: "6.12", Flavour: "cloud-amd64", Sources: []Source{
		{security, "bookworm-security"},
		{debian, "bookworm-backports"},
		{debian, "trixie"},
		{security, "trixie-security"},
	}}
	// Linux61 is Linux 6.1 for x86 cloud machines.
	Linux61 = &KernelSpec{Name: "amd64-6.1", Arch: AMD64, Version: "6.1", Flavour: "cloud-amd64", Sources: []Source{
		{security, "bookworm-security"},
		{debian, "bookworm"},
	}}
	// Linux612PPC is Linux 6.12 for little-endian POWER with pages of 4 KiB: VFIO works (sPAPR TCE).
	Linux612PPC = &KernelSpec{Name: "ppc64le-6.12", Arch: PPC64LE, Version: "6.12", Flavour: "powerpc64le", Sources: []Source{
		{debian, "trixie"},
		{debian, "bookworm-backports"},
		{security, "trixie-security"},
		{security, "bookworm-security"},
	}}
	// Linux61PPC is Linux 6.1 for little-endian POWER with pages of 64 KiB: vfio-pci does not bind, sysfs and
	// UIO work.
	Linux61PPC = &KernelSpec{Name: "ppc64le-6.1", Arch: PPC64LE, Version: "6.1", Flavour: "powerpc64le", Sources: []Source{
		{debian, "bookworm"},
		{security, "bookworm-security"},
	}}
)

// debArch is Debian's name of an architecture.
func (a Arch) debArch() string {
	if a == PPC64LE {
		return "ppc64el"
	}
	return string(a)
}

// Kernel is a kernel in the cache.
type Kernel struct {
	Spec *KernelSpec
	// Release is what uname -r says.
	Release string
	// Image is the file that QEMU boots.
	Image string
	// Dir holds the package's content, among it lib/modules.
	Dir string
	// Source is where it came from.
	Source Source
	// extra holds modules that replace the package's, by name.
	extra map[string]string
}

// CacheDir returns the directory for kernels: $BOARDLINK_CACHE, else boardlink in the user's
// cache directory. It makes it.
func CacheDir() (string, error) {
	dir := os.Getenv("BOARDLINK_CACHE")
	if dir == "" {
		base, err := os.UserCacheDir()
		if err != nil {
			return "", &MissingError{What: "no directory for kernels", Mend: "set BOARDLINK_CACHE", Err: err}
		}
		dir = filepath.Join(base, "boardlink")
	}
	dir, err := filepath.Abs(dir)
	if err == nil {
		err = os.MkdirAll(dir, 0o755)
	}
	if err != nil {
		return "", &MissingError{What: "no directory for kernels", Mend: "set BOARDLINK_CACHE", Err: err}
	}
	return dir, nil
}

// Logf hears what takes long, such as a download: one line each. It is standard error's by default.
var Logf = func(format string, args ...any) {
	fmt.Fprintf(os.Stderr, format+"\n", args...)
}

// Fetch returns the kernel, out of the cache or, the first time, from Debian. An error that is a
// MissingError means that this system cannot get it.
func Fetch(ctx context.Context, spec *KernelSpec) (*Kernel, error) {
	cache, err := CacheDir()
	if err != nil {
		return nil, err
	}
	base := *spec
	base.NoIOMMU = false
	dir := filepath.Join(cache, "kernels", spec.Name)
	k, err := cached(&base, dir)
	if err == nil && k == nil {
		var unlock func()
		if unlock, err = lockFile(ctx, filepath.Join(cache, "fetch.lock"), "another process fetches a kernel"); err != nil {
			return nil, err
		}
		if k, err = cached(&base, dir); err == nil && k == nil {
			k, err = fetch(ctx, cache, dir, &base)
		}
		unlock()
	}
	if err != nil {
		return nil, err
	}
	if spec.NoIOMMU {
		return k.withNoIOMMU(ctx, cache)
	}
	return k, nil
}

// cached returns a kernel that was unpacked before, nil if there is none.
func cached(spec *KernelSpec, dir string) (*Kernel, error) {
	b, err := os.ReadFile(filepath.Join(dir, "source"))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	k := &Kernel{Spec: spec, Dir: dir, extra: map[string]string{}}
	if f := strings.Fields(string(b)); len(f) >= 2 {
		k.Source = Source{f[0], f[1]}
	}
	images, _ := filepath.Glob(filepath.Join(dir, "boot", "vmlinu[xz]-*"))
	if len(images) != 1 {
		return nil, fmt.Errorf("kernel %s: %d images in %s: remove that folder", spec.Name, len(images), dir)
	}
	k.Image = images[0]
	_, k.Release, _ = strings.Cut(filepath.Base(k.Image), "-")
	return k, nil
}

// fetch unpacks a kernel into dir. The caller holds the lock on fetch.lock.
func fetch(ctx context.Context, cache, dir string, spec *KernelSpec) (*Kernel, error) {
	if err := needTools("apt-get", "apt-cache", "dpkg-deb"); err != nil {
		return nil, err
	}
	sweep(cache)
	start := time.Now()
	failed, err := eachCandidate(ctx, cache, spec, func(a *apt, c candidate) error {
		Logf("fetching the kernel %s: %s", spec.Name, c)
		return a.kernel(ctx, c, dir, nil)
	})
	if err != nil {
		return nil, err
	}
	if failed != nil {
		return nil, &MissingError{What: "the kernel " + spec.Name + " is not in the cache, and Debian's mirrors did not deliver one",
			Mend: mendMirror, Err: failed}
	}
	Logf("fetched the kernel %s in %.0f s", spec.Name, time.Since(start).Seconds())
	return cached(spec, dir)
}

// mendMirror is what helps where a download failed.
const mendMirror = "it takes a network that reaches Debian's mirrors, or BOARDLINK_DEBIAN_MIRROR=URI of another one; " +
	"a mirror that is being updated works again after some minutes"

// sweep removes what a fetch that was killed left in the cache.
func sweep(cache string) {
	for _, pattern := range []string{"kernels/.new-*", "noiommu-*", "apt/*/deb-*", "apt/*/cache/archives/partial/*"} {
		left, _ := filepath.Glob(filepath.Join(cache, pattern))
		for _, p := range left {
			os.RemoveAll(p)
		}
	}
}

// toolPackage is the Debian package of each program that is run.
var toolPackage = map[string]string{
	"apt-get": "apt", "apt-cache": "apt", "dpkg-deb": "dpkg", "xz": "xz-utils", "make": "make", "gcc": "gcc", "tar": "tar",
	"qemu-system-x86_64": "qemu-system-x86", "qemu-system-ppc64": "qemu-system-ppc",
}

// needTools returns a MissingError for the first program that is not installed.
func needTools(names ...string) error {
	for _, n := range names {
		if _, err := exec.LookPath(n); err != nil {
			return &MissingError{What: n + " is missing", Mend: "apt-get install " + toolPackage[n]}
		}
	}
	return nil
}

// deathsig ends a child when this process ends. The signal follows the thread that started the child: it
// is for children that are waited for on the spot.
func deathsig() *unix.SysProcAttr { return &unix.SysProcAttr{Pdeathsig: unix.SIGKILL} }
