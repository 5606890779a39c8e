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

// buildNoIOMMU puts a vfio.ko with CONFIG_VFIO_NOIOMMU in the place of the package's, which no Debian
// kernel has. Only code inside that module depends on the option, so it is the only one that is built:
// from Debian's source and headers of the same version.
func (k *Kernel) buildNoIOMMU(ctx context.Context, cache string) error {
	out := filepath.Join(k.Dir, "noiommu", "vfio.ko")
	if _, err := os.Stat(out); err != nil {
		unlock, err := lockFile(ctx, filepath.Join(cache, "fetch.lock"), "another process fetches a kernel")
		if err != nil {
			return err
		}
		defer unlock()
		if _, err := os.Stat(out); err != nil {
			if err := k.makeNoIOMMU(ctx, cache, out); err != nil {
				return err
			}
		}
	}
	k.extra["vfio"] = out
	return nil
}

// A kernel's headers are three packages.
var isHeaders = regexp.MustCompile(`^linux-(headers|kbuild)-`)

// majorMinor is what Debian's source packages are named by.
var majorMinor = regexp.MustCompile(`^[0-9]+\.[0-9]+`)

func (k *Kernel) makeNoIOMMU(ctx context.Context, cache, out string) error {
	if k.Spec.Arch != AMD64 {
		return fmt.Errorf("kernel %s: the no-IOMMU module is built for amd64 only", k.Spec.Name)
	}
	if err := needTools("apt-get", "apt-cache", "dpkg-deb", "tar", "xz", "make", "gcc"); err != nil {
		return err
	}
	a, err := newApt(cache, k.Spec.Arch, k.Source.URI, k.Source.Suite)
	if err != nil {
		return err
	}
	start := time.Now()
	Logf("building vfio.ko with its no-IOMMU mode for %s: fetching Debian's source", k.Release)
	tmp, err := os.MkdirTemp(cache, "noiommu-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	if err := k.noIOMMUSource(ctx, a, tmp); err != nil {
		if ctx.Err() != nil {
			return err
		}
		return &MissingError{What: "the source of the kernel " + k.Release + " cannot be fetched",
			Mend: "it takes a network that reaches Debian's mirrors; if they have newer kernels only, remove " + k.Dir, Err: err}
	}

	headers := filepath.Join(tmp, "usr/src/linux-headers-"+k.Release)
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
	dir, err := filepath.Glob(filepath.Join(tmp, "linux-source-*/drivers/vfio"))
	if err != nil || len(dir) != 1 {
		return fmt.Errorf("the source of %s has no drivers/vfio", k.Release)
	}
	// Of the Makefile, what vfio.ko is made of.
	mk = filepath.Join(dir[0], "Makefile")
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
	args := []string{"-C", headers, "M=" + dir[0], "CC=" + cc, "HOSTCC=" + cc, "CONFIG_DEBUG_INFO_BTF_MODULES=", "modules"}
	if text, err := run(ctx, dir[0], "make", args...); err != nil {
		return fmt.Errorf("build vfio.ko for %s: %w\n%s", k.Release, err, text)
	}
	b, err = os.ReadFile(filepath.Join(dir[0], "vfio.ko"))
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(out), 0o755); err != nil {
		return err
	}
	if err := errors.Join(os.WriteFile(out+".new", b, 0o644), os.Rename(out+".new", out)); err != nil {
		return err
	}
	Logf("built vfio.ko for %s in %.0f s", k.Release, time.Since(start).Seconds())
	return nil
}

// noIOMMUSource unpacks the kernel's headers and drivers/vfio into dir.
func (k *Kernel) noIOMMUSource(ctx context.Context, a *apt, dir string) error {
	if err := a.update(ctx); err != nil {
		return err
	}
	headers := "linux-headers-" + k.Release
	version, err := a.version(ctx, headers)
	if err != nil {
		return err
	}
	more, err := a.depends(ctx, headers, isHeaders)
	if err != nil {
		return err
	}
	for _, p := range append(more, headers) {
		if err := a.unpack(ctx, p, dir); err != nil {
			return err
		}
	}
	// Of the same version: the module is linked with the others of the package.
	if err := a.unpack(ctx, "linux-source-"+majorMinor.FindString(k.Release)+"="+version, dir); err != nil {
		return err
	}
	tars, _ := filepath.Glob(filepath.Join(dir, "usr/src/linux-source-*.tar.xz"))
	if len(tars) != 1 {
		return fmt.Errorf("linux-source %s holds %d archives", version, len(tars))
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
