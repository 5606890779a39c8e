package vm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// module is the path of the Go module that programs of the guest are built from.
const module = "github.com/boardlink/boardlink"

// Build builds a program of this module for a guest, static, and returns its file, which lies in
// the cache and is overwritten by the next Build of the same package and architecture.
func Build(ctx context.Context, arch Arch, pkg string) (string, error) {
	return goBuild(ctx, arch, pkg, "build")
}

// BuildTest builds a package's tests for a guest, as Build.
func BuildTest(ctx context.Context, arch Arch, pkg string) (string, error) {
	return goBuild(ctx, arch, pkg, "test", "-c")
}

func goBuild(ctx context.Context, arch Arch, pkg string, verb ...string) (string, error) {
	cache, err := CacheDir()
	if err != nil {
		return "", err
	}
	rel, ok := strings.CutPrefix(pkg, module+"/")
	if !ok {
		return "", fmt.Errorf("go %s %s: not a package of %s", verb[0], pkg, module)
	}
	root, err := Root(ctx)
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, "bin", string(arch))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	name := strings.ReplaceAll(rel, "/", "-")
	if verb[0] == "test" {
		name += ".test"
	}
	out := filepath.Join(dir, name)
	tmp := fmt.Sprintf("%s.%d", out, os.Getpid())
	defer os.Remove(tmp)
	args := append(append([]string{}, verb...), "-buildvcs=false", "-o", tmp, pkg)
	if _, err := goRun(ctx, root, []string{"CGO_ENABLED=0", "GOOS=linux", "GOARCH=" + string(arch), "GOFLAGS="}, args...); err != nil {
		return "", err
	}
	if _, err := os.Stat(tmp); err != nil {
		return "", fmt.Errorf("go %s %s made nothing: a package without tests?", strings.Join(verb, " "), pkg)
	}
	return out, os.Rename(tmp, out)
}

// Root returns the folder of go.mod. The test's working directory lies inside of it.
func Root(ctx context.Context) (string, error) {
	out, err := goRun(ctx, "", nil, "list", "-m", "-f", "{{.Dir}}", module)
	return strings.TrimSpace(out), err
}

func goRun(ctx context.Context, dir string, env []string, args ...string) (string, error) {
	if _, err := exec.LookPath("go"); err != nil {
		return "", &MissingError{What: "go is missing: the guest's programs are built when they are needed", Err: errors.Unwrap(err)}
	}
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), env...)
	cmd.WaitDelay = 5 * time.Second
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, strings.TrimSpace(errs.String()))
	}
	return out.String(), nil
}
