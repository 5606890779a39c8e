package main

import (
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"sort"
	"strings"

	"github.com/boardlink/boardlink/hwtest/ports"
)

// tool is a program that a stage needs and that does not come with Go.
type tool struct {
	name     string
	binaries []string // any of them will do
	packages []string // Debian packages that bring it: the first that can be installed
	why      string
	// unless tells that the tree as it is does not use the tool; nil: it does.
	unless func() bool
}

// tools is all that `make test` may install.
var tools = []tool{
	{"gcc", []string{"gcc"}, []string{"gcc libc6-dev"}, "the race detector and cgo", nil},
	{"git", []string{"git"}, []string{"git"}, "to know the files of the tree", nil},
	{"gccgo", gccgoNames, []string{"gccgo-12", "gccgo-13", "gccgo-14", "gccgo"}, "to compile the packages as Go 1.18", nil},
	{"gccgo-ppc", crossNames("powerpc-linux-gnu-gccgo"), []string{"gccgo-12-powerpc-linux-gnu gcc-12-powerpc-linux-gnu", "gccgo-powerpc-linux-gnu gcc-powerpc-linux-gnu"}, "to compile the lean programs for 32-bit PowerPC", nil},
	{"gccgo-ppc64", crossNames("powerpc64-linux-gnu-gccgo"), []string{"gccgo-12-powerpc64-linux-gnu gcc-12-powerpc64-linux-gnu", "gccgo-powerpc64-linux-gnu gcc-powerpc64-linux-gnu"}, "to compile the lean programs for 64-bit PowerPC below POWER8", nil},
	{"qemu-user", []string{"qemu-ppc64-static", "qemu-ppc64"}, []string{"qemu-user-static", "qemu-user"}, "to run tests on a big-endian processor", nil},
	{"ip", []string{"ip"}, []string{"iproute2"}, "the tests with network namespaces", nil},
	{"qemu-system", []string{"qemu-system-x86_64"}, []string{"qemu-system-x86"}, "the tests against QEMU's PCI devices", nil},
	{"qemu-ppc", []string{"qemu-system-ppc64"}, []string{"qemu-system-ppc"}, "the tests with POWER machines", nil},
	{"dpdk", []string{"dpdk-testpmd"}, []string{"dpdk-dev"}, "the tests with DPDK as a vhost-user front end", nil},
	{"fio", []string{"fio"}, []string{"fio"}, "the tests that write disks and read them back", nil},
	{"e2fs", []string{"/sbin/mkfs.ext4"}, []string{"e2fsprogs"}, "the guest with a file system on a disk of ours", nil},
	{"losetup", []string{"losetup", "/sbin/losetup"}, []string{"mount"}, "the disk on a block device", nil},
	{"agetty", []string{"agetty", "/sbin/agetty"}, []string{"util-linux"}, "a getty on a console", nil},
	{"spin", []string{"spin"}, []string{"spin"}, "to search the model of the sleep protocol", nil},
	{"xz", []string{"xz"}, []string{"xz-utils"}, "to unpack kernel modules", nil},
	{"make", []string{"make"}, []string{"make"}, "to build a kernel module for machines without IOMMU", nil},
	{"keyring", []string{"/usr/share/keyrings/debian-archive-keyring.gpg"}, []string{"debian-archive-keyring"}, "to check kernels", nil},
}

// gccgoNames are the gccgo releases that compile Go 1.18; the newer ones do too.
// internal/house looks for the same.
var gccgoNames = []string{"gccgo-12", "gccgo-13", "gccgo-14", "gccgo-15", "gccgo"}

// crossNames are the names of a cross gccgo; hwtest/ports looks for the same.
func crossNames(name string) []string {
	var out []string
	for _, v := range ports.GccgoVersions {
		out = append(out, name+v)
	}
	return out
}

// toolsFor returns the tools that the stages need.
func toolsFor(chosen []stage) []tool {
	need := map[string]bool{}
	for _, s := range chosen {
		for _, n := range s.needs {
			need[n] = true
		}
		for _, n := range s.wants {
			need[n] = true
		}
	}
	var out []tool
	for _, t := range tools {
		if need[t.name] && (t.unless == nil || !t.unless()) {
			out = append(out, t)
		}
	}
	return out
}

// find returns the path of the tool, "" if it is not installed. The directories of
// system programs count even where a user's PATH lacks them.
func (t tool) find() string {
	for _, b := range t.binaries {
		if p, err := exec.LookPath(b); err == nil {
			return p
		}
		if _, err := os.Stat(b); filepath.IsAbs(b) && err == nil {
			return b // a file, not a program
		}
		for _, dir := range []string{"/usr/sbin", "/sbin"} {
			p := filepath.Join(dir, b)
			if st, err := os.Stat(p); err == nil && st.Mode()&0o111 != 0 {
				return p
			}
		}
	}
	return ""
}

// qemuUser returns the emulator of a processor, by QEMU's name of it.
func qemuUser(arch string) string {
	t := tool{binaries: []string{"qemu-" + arch + "-static", "qemu-" + arch}}
	if p := t.find(); p != "" {
		return p
	}
	return t.binaries[0]
}

// provide installs what is missing and returns, for each tool that is still
// missing, what to say on the lines of the stages that need it.
func provide(r *run, want []tool, install bool) map[string]string {
	var lack []tool
	for _, t := range want {
		if p := t.find(); p != "" {
			fmt.Fprintf(r.log, "%s: %s\n", t.name, p)
		} else {
			lack = append(lack, t)
		}
	}
	if len(lack) == 0 {
		r.say("nothing to install")
		return nil
	}

	why := "-setup=false"
	var got []string
	tries := map[string][]string{}
	if install {
		var apt []string
		if apt, why = aptGet(); apt != nil {
			why = "apt-get could not install it, see " + filepath.Join(logDir, "setup.log")
			a := &installer{run: r, apt: apt, cache: "apt-cache"}
			for _, t := range lack {
				r.out.doing("apt-get install " + t.packages[0])
				if a.install(t) {
					got = append(got, t.name)
				} else {
					tries[t.name] = a.tries
				}
			}
		}
	}
	sort.Strings(got)
	missing := map[string]string{}
	for _, t := range lack {
		if t.find() != "" {
			continue
		}
		line := fmt.Sprintf("%s is missing (%s): %s; by hand: apt-get install %s", t.binaries[0], t.why, why, t.packages[0])
		for _, l := range tries[t.name] {
			line += "\n  tried: " + l
		}
		missing[t.name] = t.binaries[0] + " is missing, see setup"
		if isCI() {
			r.failf("%s", line)
		} else {
			r.note("%s", line)
		}
	}
	if len(got) > 0 {
		r.say("installed " + strings.Join(got, " "))
	}
	return missing
}

// aptGet returns the command that runs apt-get as root, or nil and why there is none.
func aptGet() ([]string, string) {
	apt, err := exec.LookPath("apt-get")
	if err != nil {
		return nil, "this system has no apt-get"
	}
	cmd := []string{"env", "DEBIAN_FRONTEND=noninteractive", "LC_ALL=C", apt, "-y", "-q", "--no-install-recommends",
		"-o", "DPkg::Lock::Timeout=300", "-o", "Acquire::Retries=2", "-o", "Acquire::http::Timeout=30"}
	if os.Geteuid() == 0 {
		return cmd, ""
	}
	sudo, err := exec.LookPath("sudo")
	if err != nil {
		return nil, "not root, and there is no sudo"
	}
	if exec.Command(sudo, "-n", "true").Run() == nil {
		return append([]string{sudo, "-n"}, cmd...), ""
	}
	// A password has to be asked for, in the open, before output is captured.
	if st, err := os.Stdin.Stat(); err == nil && st.Mode()&os.ModeCharDevice != 0 && !isCI() {
		fmt.Println("sudo is asked for, to install what the tests need:")
		ask := exec.Command(sudo, "-v")
		ask.Stdin, ask.Stdout, ask.Stderr = os.Stdin, os.Stdout, os.Stderr
		if ask.Run() == nil {
			return append([]string{sudo, "-n"}, cmd...), ""
		}
	}
	return nil, "not root, and sudo wants a password"
}

// asRoot is the flag of go test that runs test binaries as root; empty when we are
// root, or are not to be.
var asRoot []string

// sudoExec returns that flag where sudo asks for no password. The tests keep the environment,
// but a go command they start writes into root's own cache: root's files in the user's
// would break the user's next build.
func sudoExec() []string {
	sudo, err := exec.LookPath("sudo")
	if os.Geteuid() == 0 || err != nil || exec.Command(sudo, "-n", "true").Run() != nil {
		return nil
	}
	return []string{"-exec=" + sudo + " -n -E env HOME=/root GOCACHE=/root/.cache/go-build GOMODCACHE=/root/go/pkg/mod 'PATH=" + os.Getenv("PATH") + "'"}
}

// installer installs packages one tool at a time, so that one that is not to be
// had does not cost the others.
type installer struct {
	run   *run
	apt   []string
	cache string // apt-cache
	anew  bool   // the lists were read again after a failure
	tries []string
}

// install installs the first of the tool's packages that can be had. What fails is tried once more with lists
// read anew, since they may be older than the archive, and with other versions of the packages that the
// mirror does not deliver. tries tells what was tried, and what was answered.
func (a *installer) install(t tool) bool {
	a.tries = nil
	if !haveLists() {
		a.update()
	}
	for {
		for _, p := range t.packages {
			if a.versions(strings.Fields(p)) && t.find() != "" {
				return true
			}
			if a.run.ctx.Err() != nil {
				return false
			}
		}
		if a.anew {
			return false
		}
		a.anew = true
		a.update()
	}
}

// update reads the lists of packages, once more if that fails: a mirror may be in the middle of an update.
func (a *installer) update() {
	for try := 0; try < 2; try++ {
		out, err := a.get("update")
		if err == nil {
			return
		}
		a.tries = append(a.tries, "apt-get update: "+answer(out, err))
	}
}

// notFetched is apt's line of a package that it could not get, with the mirror's answer.
var notFetched = regexp.MustCompile(`(?m)^E: Failed to fetch \S*/([^/\s_]+)_([^/\s_]+)_[^/\s_]+\.deb +(.*?)(?: +\[IP: [^]]*\])?$`)

// firstComplaint is any of apt's lines of errors.
var firstComplaint = regexp.MustCompile(`(?m)^E: (.*?)(?: +\[IP: [^]]*\])?$`)

// answer is the first line that says why apt failed.
func answer(out string, err error) string {
	if m := firstComplaint.FindStringSubmatch(out); m != nil {
		return strings.Join(strings.Fields(m[1]), " ")
	}
	line, _, _ := strings.Cut(err.Error(), "\n")
	return line
}

// versions installs packages; where the mirror does not deliver one of them, or of those that they
// depend on, an older version of it.
func (a *installer) versions(packages []string) bool {
	gone := map[string]bool{} // "name=version"
	pins := map[string]string{}
	for try := 0; try < 6; try++ {
		args := []string{"install"}
		if len(pins) > 0 {
			args = append(args, "--allow-downgrades")
		}
		for _, p := range packages {
			if pins[p] == "" {
				args = append(args, p)
			}
		}
		var names []string
		for p := range pins {
			names = append(names, p)
		}
		sort.Strings(names)
		for _, p := range names {
			args = append(args, p+"="+pins[p])
		}
		out, err := a.get(args...)
		if err == nil {
			return true
		}
		line := "apt-get " + strings.Join(args, " ") + ": "
		missing := notFetched.FindAllStringSubmatch(out, -1)
		if len(missing) == 0 || a.run.ctx.Err() != nil {
			a.tries = append(a.tries, line+answer(out, err))
			return false
		}
		other := false
		for _, m := range missing {
			name, version := unescape(m[1]), unescape(m[2])
			line += name + " " + version + ": " + strings.Join(strings.Fields(m[3]), " ") + "; "
			gone[name+"="+withoutEpoch(version)] = true
			delete(pins, name)
			for _, v := range a.madison(name) {
				if !gone[name+"="+withoutEpoch(v)] {
					pins[name] = v
					other = true
					break
				}
			}
		}
		a.tries = append(a.tries, strings.TrimSuffix(line, "; "))
		if !other {
			return false
		}
	}
	return false
}

// unescape undoes what stands as %2b in addresses.
func unescape(s string) string {
	if u, err := url.PathUnescape(s); err == nil {
		return u
	}
	return s
}

// withoutEpoch is a version as files are named by it.
func withoutEpoch(v string) string {
	if _, after, ok := strings.Cut(v, ":"); ok {
		return after
	}
	return v
}

// madison returns the versions of a package that the lists name, in apt's order: the newest first.
func (a *installer) madison(name string) []string {
	out, err := a.run.output([]string{"LC_ALL=C"}, a.cache, "madison", name)
	if err != nil {
		return nil
	}
	var got []string
	for _, l := range strings.Split(out, "\n") {
		if f := strings.Split(l, "|"); len(f) == 3 && strings.Contains(f[2], " Packages") {
			got = append(got, strings.TrimSpace(f[1]))
		}
	}
	return got
}

// get runs apt-get and returns all that it printed.
func (a *installer) get(args ...string) (string, error) {
	out, err := a.run.output(nil, a.apt[0], append(append([]string{}, a.apt[1:]...), args...)...)
	if err != nil {
		out += "\n" + err.Error()
	}
	return out, err
}

// haveLists tells whether apt-get update was ever run.
func haveLists() bool {
	m, _ := filepath.Glob("/var/lib/apt/lists/*_Packages*")
	return len(m) > 0
}
