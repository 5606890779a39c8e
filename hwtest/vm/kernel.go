package vm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"sort"
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
	// Sources are tried in order.
	Sources []Source
	// NoIOMMU replaces vfio.ko by one built with CONFIG_VFIO_NOIOMMU.
	NoIOMMU bool
}

// Source is a meta-package of a Debian suite that depends on a kernel's package.
type Source struct {
	URI, Suite, Package string
}

const (
	debian   = "http://deb.debian.org/debian"
	security = "http://deb.debian.org/debian-security"
)

// The kernels that machines boot.
var (
	// Linux612 is Linux 6.12 for x86 cloud machines.
	Linux612 = &KernelSpec{Name: "amd64-6.12", Arch: AMD64, Sources: []Source{
		{security, "bookworm-security", "linux-image-6.12-cloud-amd64"},
		{debian, "trixie", "linux-image-cloud-amd64"},
	}}
	// Linux61 is Linux 6.1 for x86 cloud machines.
	Linux61 = &KernelSpec{Name: "amd64-6.1", Arch: AMD64, Sources: []Source{
		{security, "bookworm-security", "linux-image-cloud-amd64"},
		{debian, "bookworm", "linux-image-cloud-amd64"},
	}}
	// Linux612PPC is Linux 6.12 for little-endian POWER with pages of 4 KiB: VFIO works (sPAPR TCE).
	Linux612PPC = &KernelSpec{Name: "ppc64le-6.12", Arch: PPC64LE, Sources: []Source{
		{debian, "trixie", "linux-image-powerpc64le"},
	}}
	// Linux61PPC is Linux 6.1 for little-endian POWER with pages of 64 KiB: vfio-pci does not bind, sysfs and
	// UIO work.
	Linux61PPC = &KernelSpec{Name: "ppc64le-6.1", Arch: PPC64LE, Sources: []Source{
		{debian, "bookworm", "linux-image-powerpc64le"},
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
		if err := k.buildNoIOMMU(ctx, cache); err != nil {
			return nil, err
		}
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
	if f := strings.Fields(string(b)); len(f) == 3 {
		k.Source = Source{f[0], f[1], f[2]}
	}
	images, _ := filepath.Glob(filepath.Join(dir, "boot", "vmlinu[xz]-*"))
	if len(images) != 1 {
		return nil, fmt.Errorf("kernel %s: %d images in %s: remove that folder", spec.Name, len(images), dir)
	}
	k.Image = images[0]
	_, k.Release, _ = strings.Cut(filepath.Base(k.Image), "-")
	return k, nil
}

func fetch(ctx context.Context, cache, dir string, spec *KernelSpec) (*Kernel, error) {
	if err := needTools("apt-get", "apt-cache", "dpkg-deb"); err != nil {
		return nil, err
	}
	var lacks []error
	for _, src := range spec.Sources {
		a, err := newApt(cache, spec.Arch, src.URI, src.Suite)
		if err != nil {
			return nil, err
		}
		Logf("fetching the kernel %s: %s of %s", spec.Name, src.Package, src.Suite)
		start := time.Now()
		tmp, err := a.kernel(ctx, src.Package, dir)
		if err != nil {
			if ctx.Err() != nil {
				return nil, err
			}
			lacks = append(lacks, err)
			continue
		}
		note := strings.Join([]string{src.URI, src.Suite, src.Package}, " ") + "\n"
		if err := os.WriteFile(filepath.Join(tmp, "source"), []byte(note), 0o644); err != nil {
			return nil, err
		}
		if err := os.RemoveAll(dir); err != nil {
			return nil, err
		}
		if err := os.Rename(tmp, dir); err != nil {
			return nil, err
		}
		Logf("fetched the kernel %s in %.0f s", spec.Name, time.Since(start).Seconds())
		return cached(spec, dir)
	}
	return nil, &MissingError{What: "the kernel " + spec.Name + " is not in the cache and apt cannot fetch it",
		Mend: "it takes a network that reaches Debian's mirrors", Err: errors.Join(lacks...)}
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

// apt is a state of apt's of our own, for one suite and architecture.
type apt struct {
	arch  Arch
	suite string
	dir   string
}

// keyring checks what apt downloads.
const keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"

func newApt(cache string, arch Arch, uri, suite string) (*apt, error) {
	if _, err := os.Stat(keyring); err != nil {
		return nil, &MissingError{What: "Debian's keys are missing", Mend: "apt-get install debian-archive-keyring", Err: err}
	}
	if m := os.Getenv("BOARDLINK_DEBIAN_MIRROR"); m != "" && uri == debian {
		uri = m
	}
	a := &apt{arch: arch, suite: suite, dir: filepath.Join(cache, "apt", suite+"-"+arch.debArch())}
	for _, d := range []string{"state/lists/partial", "cache/archives/partial", "etc"} {
		if err := os.MkdirAll(filepath.Join(a.dir, d), 0o755); err != nil {
			return nil, err
		}
	}
	// What the system configures holds (a proxy, say), but its hooks are for its own state.
	conf := fmt.Sprintf(`Dir::State "%[1]s/state";
Dir::State::status "%[1]s/state/status";
Dir::Cache "%[1]s/cache";
Dir::Etc::sourcelist "%[1]s/etc/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
APT::Architecture "%[2]s";
#clear APT::Architectures;
APT::Architectures { "%[2]s"; };
APT::Sandbox::User "";
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
Acquire::Languages "none";
Acquire::Retries "3";
Acquire::http::Timeout "30";
`, a.dir, arch.debArch())
	list := fmt.Sprintf("deb [signed-by=%s] %s %s main\n", keyring, uri, suite)
	for name, content := range map[string]string{"etc/apt.conf": conf, "etc/sources.list": list, "state/status": ""} {
		if err := os.WriteFile(filepath.Join(a.dir, name), []byte(content), 0o644); err != nil {
			return nil, err
		}
	}
	return a, nil
}

// run runs a program of apt's in dir and returns its output.
func (a *apt) run(ctx context.Context, dir, name string, args ...string) (string, error) {
	args = append([]string{"-c", filepath.Join(a.dir, "etc/apt.conf"), "-q"}, args...)
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive")
	cmd.SysProcAttr = deathsig()
	cmd.WaitDelay = 5 * time.Second
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s %s of %s: %w: %s", name, args[3], a.suite, err, strings.TrimSpace(errs.String()))
	}
	return out.String(), nil
}

// update reads the suite's list of packages, which apt checks against the keyring.
func (a *apt) update(ctx context.Context) error {
	_, err := a.run(ctx, a.dir, "apt-get", "--error-on=any", "update")
	return err
}

// depends returns the packages that a package depends on and that match.
func (a *apt) depends(ctx context.Context, pkg string, match *regexp.Regexp) ([]string, error) {
	out, err := a.run(ctx, a.dir, "apt-cache", "depends", pkg)
	if err != nil {
		return nil, err
	}
	var got []string
	for _, line := range strings.Split(out, "\n") {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "Depends: "); ok && match.MatchString(name) {
			got = append(got, name)
		}
	}
	sort.Strings(got)
	return got, nil
}

// version returns the version of a package that apt would download.
func (a *apt) version(ctx context.Context, pkg string) (string, error) {
	out, err := a.run(ctx, a.dir, "apt-cache", "show", "--no-all-versions", pkg)
	if err != nil {
		return "", err
	}
	for _, line := range strings.Split(out, "\n") {
		if v, ok := strings.CutPrefix(line, "Version: "); ok {
			return v, nil
		}
	}
	return "", fmt.Errorf("%s has no package %s", a.suite, pkg)
}

// unpack downloads a package, "name" or "name=version", and unpacks it into dir.
func (a *apt) unpack(ctx context.Context, pkg, dir string) error {
	tmp, err := os.MkdirTemp(a.dir, "deb-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	if _, err := a.run(ctx, tmp, "apt-get", "download", pkg); err != nil {
		return err
	}
	debs, _ := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if len(debs) != 1 {
		return fmt.Errorf("apt-get download %s: %d packages", pkg, len(debs))
	}
	if out, err := run(ctx, tmp, "dpkg-deb", "-x", debs[0], dir); err != nil {
		return fmt.Errorf("dpkg-deb -x %s: %w: %s", filepath.Base(debs[0]), err, out)
	}
	return nil
}

// isImage matches a kernel's package, as against the meta-package.
var isImage = regexp.MustCompile(`^linux-image-[0-9]+\.[0-9]+\.[0-9].*`)

// kernel unpacks the kernel that a meta-package depends on into a new folder beside dir.
func (a *apt) kernel(ctx context.Context, meta, dir string) (string, error) {
	if err := a.update(ctx); err != nil {
		return "", err
	}
	names, err := a.depends(ctx, meta, isImage)
	if err != nil {
		return "", err
	}
	if len(names) == 0 {
		return "", fmt.Errorf("%s has no package %s", a.suite, meta)
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return "", err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(dir), ".new-")
	if err != nil {
		return "", err
	}
	if err := os.Chmod(tmp, 0o755); err != nil {
		return "", err
	}
	if err := a.unpack(ctx, names[len(names)-1], tmp); err != nil {
		os.RemoveAll(tmp)
		return "", err
	}
	// Since Debian 13 the modules lie in /usr/lib.
	if _, err := os.Stat(filepath.Join(tmp, "lib")); err != nil {
		if err := os.Symlink("usr/lib", filepath.Join(tmp, "lib")); err != nil {
			return "", err
		}
	}
	return tmp, nil
}

// deathsig ends a child when this process ends. The signal follows the thread that started the child: it
// is for children that are waited for on the spot.
func deathsig() *unix.SysProcAttr { return &unix.SysProcAttr{Pdeathsig: unix.SIGKILL} }
