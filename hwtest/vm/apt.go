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
)

// apt is a state of apt's of our own, for one suite and architecture.
type apt struct {
	arch Arch
	src  Source
	dir  string
}

// keyring checks what apt downloads.
const keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"

// trustAll makes apt take archives without a signature. Only a test sets it.
var trustAll = false

// retries is how often apt asks again for what broke off or was not answered, after 1, 2, ... seconds.
var retries = 2

func newApt(cache string, arch Arch, src Source) (*apt, error) {
	if _, err := os.Stat(keyring); err != nil {
		return nil, &MissingError{What: "Debian's keys are missing", Mend: "apt-get install debian-archive-keyring", Err: err}
	}
	a := &apt{arch: arch, src: src, dir: filepath.Join(cache, "apt", src.Suite+"-"+arch.debArch())}
	if m := os.Getenv("BOARDLINK_DEBIAN_MIRROR"); m != "" && src.URI == debian {
		a.src.URI = m
	}
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
Acquire::Retries "%[3]d";
Acquire::http::Timeout "30";
`, a.dir, arch.debArch(), retries)
	trust := "signed-by=" + keyring
	if trustAll {
		trust = "trusted=yes"
	}
	list := fmt.Sprintf("deb [%s] %s %s main\n", trust, a.src.URI, a.src.Suite)
	for name, content := range map[string]string{"etc/apt.conf": conf, "etc/sources.list": list, "state/status": ""} {
		if err := os.WriteFile(filepath.Join(a.dir, name), []byte(content), 0o644); err != nil {
			return nil, err
		}
	}
	return a, nil
}

// aptError is what a program of apt's answered.
type aptError struct {
	op     string // "apt-get update", say
	err    error
	stderr string
}

// failedFetch is apt's line of a file that it could not get, with the mirror's answer.
var failedFetch = regexp.MustCompile(`(?m)^E: Failed to fetch \S+ +(.*?)(?: +\[IP: [^]]*\])?$`)

// anyError is any of apt's lines of errors.
var anyError = regexp.MustCompile(`(?m)^E: (.*)$`)

// noAnswer is what apt says where nothing at the mirror's address answers.
var noAnswer = regexp.MustCompile(`Could not resolve|failure resolving|Could not connect|Unable to connect|Cannot initiate the connection|` +
	`[Cc]onnection timed out|Connection refused|Network is unreachable|No route to host`)

// Error is one line: the mirror's answer, or apt's first complaint.
func (e *aptError) Error() string {
	for _, line := range []*regexp.Regexp{failedFetch, anyError} {
		if m := line.FindStringSubmatch(e.stderr); m != nil {
			return strings.Join(strings.Fields(m[1]), " ")
		}
	}
	if line, _, _ := strings.Cut(strings.TrimSpace(e.stderr), "\n"); line != "" {
		return e.op + ": " + line
	}
	return fmt.Sprintf("%s: %v", e.op, e.err)
}

func (e *aptError) Unwrap() error { return e.err }

// unreachable tells whether nothing at the mirror's address answered.
func (e *aptError) unreachable() bool { return noAnswer.MatchString(e.stderr) }

// run runs a program of apt's in dir and returns its output. The program's own failure is an *aptError.
func (a *apt) run(ctx context.Context, dir, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, append([]string{"-c", filepath.Join(a.dir, "etc/apt.conf"), "-q"}, args...)...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive")
	cmd.SysProcAttr = deathsig()
	cmd.WaitDelay = 5 * time.Second
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			return "", fmt.Errorf("%s: %w", name, ctx.Err())
		}
		if strings.Contains(errs.String(), "No space left on device") {
			return "", fmt.Errorf("%s: no space left on the device of %s", name, a.dir)
		}
		op := name
		for _, a := range args {
			if !strings.HasPrefix(a, "-") {
				op += " " + a
				break
			}
		}
		return "", &aptError{op: op, err: err, stderr: errs.String()}
	}
	return out.String(), nil
}

// update reads the suite's list of packages, which apt checks against the keyring. If it fails, the list
// that was there before stays. With anew, no cache on the way may answer.
func (a *apt) update(ctx context.Context, anew bool) error {
	args := []string{"--error-on=any", "update"}
	if anew {
		args = append([]string{"--option=Acquire::http::No-Cache=true"}, args...)
	}
	_, err := a.run(ctx, a.dir, "apt-get", args...)
	return err
}

// haveIndex tells whether there is a list of packages, of now or of an earlier update.
func (a *apt) haveIndex() bool {
	m, _ := filepath.Glob(filepath.Join(a.dir, "state/lists/*_Packages*"))
	return len(m) > 0
}

// depends returns the packages that a package of that version depends on and that match.
func (a *apt) depends(ctx context.Context, pkg, version string, match *regexp.Regexp) ([]string, error) {
	out, err := a.run(ctx, a.dir, "apt-cache", "depends", pkg+"="+version)
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

// versions returns all versions of the packages that the suite's list has, the newest first.
func (a *apt) versions(ctx context.Context, names ...string) ([]candidate, error) {
	if len(names) == 0 {
		return nil, nil
	}
	out, err := a.run(ctx, a.dir, "apt-cache", append([]string{"madison"}, names...)...)
	if err != nil {
		return nil, err
	}
	var got []candidate
	seen := map[candidate]bool{}
	for _, line := range strings.Split(out, "\n") {
		f := strings.Split(line, "|")
		if len(f) != 3 || !strings.Contains(f[2], " Packages") {
			continue
		}
		c := candidate{src: a.src, pkg: strings.TrimSpace(f[0]), version: strings.TrimSpace(f[1])}
		if !seen[c] {
			seen[c] = true
			got = append(got, c)
		}
	}
	sort.SliceStable(got, func(i, j int) bool { return compareVersions(got[i].version, got[j].version) > 0 })
	return got, nil
}

// unpack downloads a package of a version and unpacks it into dir.
func (a *apt) unpack(ctx context.Context, pkg, version, dir string) error {
	tmp, err := os.MkdirTemp(a.dir, "deb-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	if _, err := a.run(ctx, tmp, "apt-get", "download", pkg+"="+version); err != nil {
		return err
	}
	debs, _ := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if len(debs) != 1 {
		return badPackage{error: fmt.Errorf("apt-get download %s=%s: %d packages", pkg, version, len(debs))}
	}
	if out, err := run(ctx, tmp, "dpkg-deb", "-x", debs[0], dir); err != nil {
		err = fmt.Errorf("dpkg-deb -x %s: %w: %s", filepath.Base(debs[0]), err, out)
		if ctx.Err() == nil && !strings.Contains(out, "No space left on device") {
			err = badPackage{error: err}
		}
		return err
	}
	return nil
}

// kernel unpacks a kernel and, if more is not nil, what more adds, into dir, which appears complete or
// not at all.
func (a *apt) kernel(ctx context.Context, c candidate, dir string, more func(tmp, release string) error) (err error) {
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(dir), ".new-")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.RemoveAll(tmp)
		}
	}()
	if err := os.Chmod(tmp, 0o755); err != nil {
		return err
	}
	if err := a.unpack(ctx, c.pkg, c.version, tmp); err != nil {
		return err
	}
	// Since Debian 13 the modules lie in /usr/lib.
	if _, err := os.Stat(filepath.Join(tmp, "lib")); err != nil {
		if err := os.Symlink("usr/lib", filepath.Join(tmp, "lib")); err != nil {
			return err
		}
	}
	images, _ := filepath.Glob(filepath.Join(tmp, "boot/vmlinu[xz]-*"))
	if len(images) != 1 {
		return badPackage{error: fmt.Errorf("the package holds %d files boot/vmlinu[xz]-*", len(images))}
	}
	_, release, _ := strings.Cut(filepath.Base(images[0]), "-")
	if _, err := os.Stat(filepath.Join(tmp, "lib/modules", release, "modules.builtin")); err != nil {
		return badPackage{error: errors.New("the package has no lib/modules/" + release + "/modules.builtin")}
	}
	if more != nil {
		if err := more(tmp, release); err != nil {
			return err
		}
	}
	note := strings.Join([]string{c.src.URI, c.src.Suite, c.pkg, c.version}, " ") + "\n"
	if err := os.WriteFile(filepath.Join(tmp, "source"), []byte(note), 0o644); err != nil {
		return err
	}
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	return os.Rename(tmp, dir)
}
