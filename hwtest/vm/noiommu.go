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
	"strings"
	"time"
)

// withNoIOMMU returns a kernel with a vfio.ko with CONFIG_VFIO_NOIOMMU in the place of the package's, which
// no Debian kernel has. Only code inside that module depends on the option, so it is the only one that is
// built: from Debian's source and headers of the same version. It is k itself, or, where the mirrors do not
// have all that k takes any more, a kernel of which they do, in a folder of its own.
func (k *Kernel) withNoIOMMU(ctx context.Context, cache string) (*Kernel, error) {
	if k.Spec.Arch != AMD64 {
		return nil, fmt.Errorf("kernel %s: the no-IOMMU module is built for amd64 only", k.Spec.Name)
	}
	other := k.Dir + "-noiommu"
	ready := func() (*Kernel, error) {
		if k.useNoIOMMU() {
			return k, nil
		}
		o, err := cached(k.Spec, other)
		if o == nil || err != nil || !o.useNoIOMMU() {
			return nil, err
		}
		return o, nil
	}
	if got, err := ready(); got != nil || err != nil {
		return got, err
	}
	unlock, err := lockFile(ctx, filepath.Join(cache, "fetch.lock"), "another process fetches a kernel")
	if err != nil {
		return nil, err
	}
	defer unlock()
	if got, err := ready(); got != nil || err != nil {
		return got, err
	}
	if err := needTools("apt-get", "apt-cache", "dpkg-deb", "tar", "xz", "make", "gcc"); err != nil {
		return nil, err
	}
	sweep(cache)
	// First the source and headers of the kernel that is there; then of others, with the kernel.
	failed, err := eachCandidate(ctx, cache, k.ownSource(), func(a *apt, c candidate) error {
		return makeNoIOMMU(ctx, a, cache, c, k.Release, k.Dir)
	})
	if err != nil {
		return nil, err
	}
	if failed != nil {
		others, err := eachCandidate(ctx, cache, k.Spec, func(a *apt, c candidate) error {
			return a.kernel(ctx, c, other, func(tmp, release string) error {
				return makeNoIOMMU(ctx, a, cache, c, release, tmp)
			})
		})
		if err != nil {
			return nil, err
		}
		if others != nil {
			others.lines = append(failed.lines, others.lines...)
			return nil, &MissingError{What: "no source and headers of a kernel " + k.Spec.Name + " to build vfio.ko with its no-IOMMU mode arrived from Debian's mirrors",
				Mend: mendMirror, Err: others}
		}
	}
	got, err := ready()
	if err == nil && got == nil {
		err = fmt.Errorf("kernel %s: vfio.ko was built and is not there", k.Spec.Name)
	}
	return got, err
}

// useNoIOMMU takes the vfio.ko that was built for the kernel, if there is one.
func (k *Kernel) useNoIOMMU() bool {
	out := filepath.Join(k.Dir, "noiommu", "vfio.ko")
	if _, err := os.Stat(out); err != nil {
		return false
	}
	k.extra["vfio"] = out
	return true
}

// ownSource chooses the very package that the kernel is from, wherever one of its sources has it.
func (k *Kernel) ownSource() *KernelSpec {
	own := *k.Spec
	own.Version, own.exact = k.Release, true
	return &own
}

// A kernel's headers are three packages.
var isHeaders = regexp.MustCompile(`^linux-(headers|kbuild)-`)

// majorMinor is what Debian's source packages are named by.
var majorMinor = regexp.MustCompile(`^[0-9]+\.[0-9]+`)

// makeNoIOMMU builds vfio.ko for the kernel of a candidate and puts it into the folder noiommu of dir.
func makeNoIOMMU(ctx context.Context, a *apt, cache string, c candidate, release, dir string) error {
	start := time.Now()
	Logf("building vfio.ko with its no-IOMMU mode for %s: fetching Debian's source", c)
	tmp, err := os.MkdirTemp(cache, "noiommu-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	if err := noIOMMUSource(ctx, a, c.version, release, tmp); err != nil {
		return err
	}

	headers := filepath.Join(tmp, "usr/src/linux-headers-"+release)
	// The package expects to be installed in the root.
	mk := filepath.Join(headers, "Makefile")
	b, err := os.ReadFile(mk)
	if err != nil {
		return err
	}
	b = bytes.ReplaceAll(b, []byte(" /usr/src/"), []byte(" "+tmp+"/usr/src/"))
	if err := os.WriteFile(mk, b, 0o644); err != nil {
		return err
	}
	src, err := filepath.Glob(filepath.Join(tmp, "linux-source-*/drivers/vfio"))
	if err != nil || len(src) != 1 {
		return badPackage{error: fmt.Errorf("the source of %s has no drivers/vfio", c.version)}
	}
	// Of the Makefile, what vfio.ko is made of.
	mk = filepath.Join(src[0], "Makefile")
	if b, err = os.ReadFile(mk); err != nil {
		return err
	}
	lines := []string{"obj-m := vfio.o", "ccflags-y := -DCONFIG_VFIO_NOIOMMU=1"}
	for _, l := range strings.Split(string(b), "\n") {
		if strings.HasPrefix(l, "vfio-") {
			lines = append(lines, l)
		}
	}
	if err := os.WriteFile(mk, []byte(strings.Join(lines, "\n")+"\n"), 0o644); err != nil {
		return err
	}
	cc := "gcc"
	if _, err := exec.LookPath("gcc-12"); err == nil { // Debian's kernels are built by it
		cc = "gcc-12"
	}
	// Type information for BPF takes a program that few systems have, and nothing here uses it.
	args := []string{"-C", headers, "M=" + src[0], "CC=" + cc, "HOSTCC=" + cc, "CONFIG_DEBUG_INFO_BTF_MODULES=", "modules"}
	if text, err := run(ctx, src[0], "make", args...); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return badPackage{error: fmt.Errorf("build vfio.ko for %s: %w: %s", release, err, firstError(text)), suite: true}
	}
	b, err = os.ReadFile(filepath.Join(src[0], "vfio.ko"))
	if err != nil {
		return err
	}
	out := filepath.Join(dir, "noiommu", "vfio.ko")
	if err := os.MkdirAll(filepath.Dir(out), 0o755); err != nil {
		return err
	}
	if err := errors.Join(os.WriteFile(out+".new", b, 0o644), os.Rename(out+".new", out)); err != nil {
		return err
	}
	Logf("built vfio.ko for %s in %.0f s", release, time.Since(start).Seconds())
	return nil
}

// firstError returns the first line of a compiler's or of make's output that says what failed.
func firstError(text string) string {
	lines := strings.Split(text, "\n")
	for _, l := range lines {
		if strings.Contains(l, "error") || strings.Contains(l, "Error") || strings.Contains(l, "not found") {
			return strings.TrimSpace(l)
		}
	}
	return strings.TrimSpace(lines[len(lines)-1])
}

// noIOMMUSource unpacks the headers of the kernel of that version and release, and its drivers/vfio, into dir.
func noIOMMUSource(ctx context.Context, a *apt, version, release, dir string) error {
	headers := "linux-headers-" + release
	source := "linux-source-" + majorMinor.FindString(release)
	all, err := a.versions(ctx, headers, source)
	if err != nil {
		return err
	}
	for _, p := range []string{headers, source} {
		if !has(all, p, version) {
			return badPackage{error: fmt.Errorf("the suite has no %s of that version", p)}
		}
	}
	more, err := a.depends(ctx, headers, version, isHeaders)
	if err != nil {
		return err
	}
	if err := a.unpack(ctx, headers, version, dir); err != nil {
		return fmt.Errorf("%s: %w", headers, err)
	}
	for _, p := range more {
		v := version
		if all, err := a.versions(ctx, p); err == nil && len(all) > 0 && !has(all, p, v) {
			v = all[0].version
		}
		if err := a.unpack(ctx, p, v, dir); err != nil {
			return fmt.Errorf("%s: %w", p, err)
		}
	}
	// Of the same version: the module is linked with the others of the package.
	if err := a.unpack(ctx, source, version, dir); err != nil {
		return fmt.Errorf("%s: %w", source, err)
	}
	tars, _ := filepath.Glob(filepath.Join(dir, "usr/src/linux-source-*.tar.xz"))
	if len(tars) != 1 {
		return badPackage{error: fmt.Errorf("linux-source %s holds %d archives", version, len(tars))}
	}
	if text, err := run(ctx, dir, "tar", "-xJf", tars[0], "--wildcards", "linux-source-*/drivers/vfio"); err != nil {
		return fmt.Errorf("unpack %s: %w\n%s", filepath.Base(tars[0]), err, text)
	}
	return nil
}

// run runs a program and returns what it printed.
func run(ctx context.Context, dir, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	cmd.SysProcAttr = deathsig()
	cmd.WaitDelay = 5 * time.Second
	out, err := cmd.CombinedOutput()
	return string(bytes.TrimSpace(out)), err
}

// has tells whether a package of that version is among them.
func has(all []candidate, pkg, version string) bool {
	for _, c := range all {
		if c.pkg == pkg && c.version == version {
			return true
		}
	}
	return false
}
