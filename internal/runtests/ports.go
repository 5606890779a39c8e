package main

import (
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"text/tabwriter"

	"github.com/boardlink/boardlink/hwtest/ports"
)

// arches are the architectures that the packages below cmd must compile for.
var arches = []string{"amd64", "arm64", "ppc64", "ppc64le", "riscv64", "386", "arm"}

// crossPackage has the tests of the stage cross.
const crossPackage = "hwtest/ports"

// execEnv tells a test that starts its own binary again with which emulator to start it:
// without binfmt_misc the kernel cannot run a foreign one.
const execEnv = "BOARDLINK_TEST_EXEC"

// foreign are the machines of the stage foreign: emulator is QEMU's name of the processor, empty where amd64 runs
// the program itself; skip are the tests that do not run there.
var foreign = []struct {
	arch, emulator string
	memory         bool // the rooms of memoryRooms alone
	skip           []string
}{
	{"ppc64", "ppc64", false, emulatedSkip},                                       // big-endian
	{"386", "", false, []string{"TestPump", "TestMovedPump"}},                     // 32 bits; half a minute
	{"arm64", "aarch64", true, append([]string{"TestTwoProcesses"}, longSkip...)}, // reordered, see below
	{"ppc64le", "ppc64le", true, longSkip},
	{"riscv64", "riscv64", true, longSkip},
	{"arm", "arm", false, longSkip}, // 32 bits
}

// memoryRooms are what an architecture can break beside the order of bytes and the size of a word, which two others
// try everywhere: barriers, loads and stores, system calls, and what is built on them first.
var memoryRooms = map[string]bool{
	"mmio": true, "dma": true, "doorbell": true, "vring": true, "virtio": true, "virtiomsg": true, "frames": true,
	"pci": true, "pci/internal/access": true, "board/loopback": true, "tunbridge": true, "session": true,
}

func foreignNames() []string {
	var out []string
	for _, f := range foreign {
		out = append(out, f.arch)
	}
	return out
}

// emulatedSkip are the tests that have no place under qemu-user:
//   - those that look at interfaces by netlink and packet sockets, of which it converts a part only; the stage cross has
//     interfaces under emulated ends, looked at from outside;
//   - those that read /proc/self/smaps, which it makes up, or need a mount namespace, which it refuses (TestNoProc);
//   - TestSpin, which runs programs of this machine, and TestServerCredentials, which starts one as a user who cannot
//     read the test's own file;
//   - those of interfaces beside packet sockets (tunbridge/pump_limit_test.go), and the one of memory that is gone,
//     which the emulator reads before the kernel does;
//   - TestKernelPool: it knows no RNDADDENTROPY;
//   - those that need root, which this stage may not have, and what no processor is different in: TestGetty, TestKmsg, TestImageFull, TestBlockDevice;
//   - those that take minutes, while nothing in them depends on the processor (all that mutate a protocol, too), and
//     those that wait for time-outs.
var emulatedSkip = []string{"TestIface", "TestPump", "TestMovedPump", "TestPool$", "TestLinkRestartAnywhere", "TestHostileServer", "TestNoProc", "TestSpin", "TestServerCredentials",
	"TestOverlong", "TestSenderFollows", "TestLongestFrames", "TestManyPieces", "TestLittleRoom", "TestReadErrors", "TestMemoryGone", "TestLoggedFrames", "TestRefusedByKernel", "TestKernelPool",
	"TestGetty", "TestKmsg$", "TestImageFull", "TestBlockDevice"}

// longSkip is for the machines beside the big-endian one. TestConcurrent and
// TestTwoProcesses also rely on a store before a later load between two threads or processes: qemu-user 7.2 does
// not keep that order for arm64 on amd64.
var longSkip = append([]string{"TestConcurrent", "TestKill", "TestSplitRings", "TestPackedRings", "TestSleepProtocol", "TestLink", "TestLaps", "TestPostedWrites"}, emulatedSkip...)

// portTable is what make test-ports prints.
type portTable struct {
	order []string
	rows  map[string]*portRow
}

type portRow struct {
	packages int
	tests    counts
	cross    map[string]string // "agent", "host" -> result
}

var table = portTable{rows: map[string]*portRow{}}

func (t *portTable) row(name string) *portRow {
	r := t.rows[name]
	if r == nil {
		r = &portRow{cross: map[string]string{}}
		t.rows[name], t.order = r, append(t.order, name)
	}
	return r
}

// print prints the table, if there is one.
func (t *portTable) print(w io.Writer) {
	if len(t.order) == 0 {
		return
	}
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(tw, "target\tpackages\tpassed\tfailed\tskipped\tboard of an "+runtime.GOARCH+" carrier\tcarrier of an "+runtime.GOARCH+" board")
	for _, name := range t.order {
		r := t.rows[name]
		fmt.Fprint(tw, name)
		if r.packages == 0 {
			fmt.Fprint(tw, "\t-\t-\t-\t-")
		} else {
			fmt.Fprintf(tw, "\t%d\t%d\t%d\t%d", r.packages, r.tests.passed, r.tests.failed, r.tests.skipped)
		}
		for _, side := range []string{"agent", "host"} {
			s := r.cross[side]
			if s == "" {
				s = "-"
			}
			fmt.Fprint(tw, "\t"+s)
		}
		fmt.Fprintln(tw)
	}
	tw.Flush()
	fmt.Fprintln(w)
}

// portsStage builds everything for each architecture. Vet checks everything for one big-endian and one 32-bit machine, and
// elsewhere the packages with files of the architecture's own (assembly, above all); for this machine the stage vet
// does it.
func portsStage(r *run) {
	for _, a := range arches {
		if a == runtime.GOARCH {
			continue
		}
		r.out.doing(a)
		env := []string{"CGO_ENABLED=0", "GOOS=linux", "GOARCH=" + a}
		r.command(env, "go", "build", "./...")
		if a == "ppc64" || a == "arm" {
			r.command(env, "go", "vet", "./...")
		} else if own := r.ownFiles(a); len(own) > 0 {
			r.command(env, "go", append([]string{"vet"}, own...)...)
		}
	}
}

// ownFiles returns the packages that have files which are built for an architecture and not for every one.
func (r *run) ownFiles(arch string) []string {
	var out []string
	for _, p := range r.packages() {
		files, err := os.ReadDir(p.dir)
		if err != nil {
			r.failf("%v", err)
			continue
		}
		for _, f := range files {
			if n := f.Name(); strings.HasSuffix(n, ".s") || strings.HasSuffix(n, "_"+arch+".go") {
				out = append(out, p.path)
				break
			}
		}
	}
	return out
}

func foreignStage(r *run) {
	for _, f := range foreign {
		if f.arch == runtime.GOARCH {
			continue
		}
		if f.arch == "386" && !ports.Runs386() {
			r.note("386 is left out: %s", ports.No386)
			continue
		}
		var pkgs []string
		for _, p := range r.packages() {
			if p.below && p.tests && (!p.nets || p.rel == "tunbridge") && (!f.memory || memoryRooms[p.rel]) {
				pkgs = append(pkgs, p.path)
			}
		}
		args := []string{"-short", "-vet=off", "-timeout=5m", "-skip=^(" + strings.Join(f.skip, "|") + ")"}
		env := []string{"CGO_ENABLED=0", "GOOS=linux", "GOARCH=" + f.arch}
		if f.emulator != "" {
			emu := qemuUser(f.emulator)
			args = append(args, "-exec="+emu)
			env = append(env, execEnv+"="+emu)
		} else {
			args = append(args, asRoot...)
		}
		r.out.doing(f.arch)
		before := r.counts
		r.goTestSome(env, pkgs, args...)
		row := table.row(f.arch)
		row.packages = len(pkgs)
		row.tests = counts{r.passed - before.passed, r.failed - before.failed, r.skipped - before.skipped}
	}
}

func crossStage(r *run) {
	for _, t := range ports.Targets {
		table.row(t.Name)
	}
	r.onResult = func(text string) {
		// "ppc64 agent: ping ..."; variants ("ppc64 agent uncached: ...") are not shown.
		who, what, _ := strings.Cut(text, ": ")
		if f := strings.Fields(who); len(f) == 2 && table.rows[f[0]] != nil {
			table.rows[f[0]].cross[f[1]] = what
		}
	}
	r.tellSkips = true
	r.goTest(nil, append(append([]string{"-count=1", "-timeout=9m"}, asRoot...), "./"+crossPackage)...)
}
