package main

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sort"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/boardlink/boardlink/trial/netns"
	"github.com/boardlink/boardlink/trial/netns/netnstest"
	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// helperEnv makes the test binary change its own rights and then become the program in its arguments.
const helperEnv = "BOARDLINK_TEST_BECOME"

// exe is the program, in a directory that every user may enter.
var exe string

func TestMain(m *testing.M) {
	if how := os.Getenv(helperEnv); how != "" {
		fmt.Fprintln(os.Stderr, "become:", become(how))
		os.Exit(99)
	}
	os.Exit(testMain(m))
}

func testMain(m *testing.M) int {
	dir, err := os.MkdirTemp("", "boardlink-cmd-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	os.Chmod(dir, 0o755)
	exe = filepath.Join(dir, "boardlink")
	if out, err := exec.Command("go", "build", "-o", exe, ".").CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build: %v\n%s", err, out)
		return 1
	}
	code := m.Run()
	if code == 0 {
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	return code
}

// become acts on the words of how, and executes os.Args[1:]. It runs in a mount namespace of its
// own.
//
//	notun      /dev/net without a tun
//	tun=MODE   /dev/net with a tun of these permissions
//	run=DIR    with that directory as /run
//	nonetadmin without CAP_NET_ADMIN
//	files=N    with that limit of open files, soft and hard
//	nobody     as a user without rights
func become(how string) error {
	runtime.LockOSThread()
	os.Unsetenv(helperEnv)
	for _, w := range strings.Fields(how) {
		word, arg, _ := strings.Cut(w, "=")
		switch word {
		case "notun", "tun":
			if err := unix.Mount("tmpfs", "/dev/net", "tmpfs", 0, ""); err != nil {
				return fmt.Errorf("mount: %w", err)
			}
			if word == "notun" {
				continue
			}
			mode, err := strconv.ParseUint(arg, 8, 32)
			if err != nil {
				return err
			}
			if err := unix.Mknod(netns.TunPath, unix.S_IFCHR, int(unix.Mkdev(10, 200))); err != nil {
				return fmt.Errorf("mknod: %w", err)
			}
			if err := unix.Chmod(netns.TunPath, uint32(mode)); err != nil {
				return err
			}
		case "run":
			if err := os.MkdirAll(arg, 0o755); err != nil {
				return err
			}
			if err := unix.Mount(arg, "/run", "", unix.MS_BIND, ""); err != nil {
				return fmt.Errorf("mount: %w", err)
			}
		case "files":
			n, err := strconv.ParseUint(arg, 10, 32)
			if err != nil {
				return err
			}
			// syscall's, as its Exec would restore the soft limit that this process began with.
			if err := syscall.Setrlimit(unix.RLIMIT_NOFILE, &syscall.Rlimit{Cur: n, Max: n}); err != nil {
				return err
			}
		case "nonetadmin":
			if err := unix.Prctl(unix.PR_CAPBSET_DROP, unix.CAP_NET_ADMIN, 0, 0, 0); err != nil {
				return err
			}
		case "nobody":
			if err := syscall.Setgroups(nil); err != nil {
				return err
			}
			if err := syscall.Setgid(65534); err != nil {
				return err
			}
			if err := syscall.Setuid(65534); err != nil {
				return err
			}
		default:
			return fmt.Errorf("no such thing: %s", w)
		}
	}
	return syscall.Exec(os.Args[1], os.Args[1:], os.Environ())
}

// box is where programs run: a network namespace, a directory for everything they make, and a name of
// the program that nobody else runs. When the test ends it is to be as it was.
type box struct {
	t      testing.TB
	ns     *netns.NS
	dir    string // the working directory, TMPDIR and XDG_RUNTIME_DIR
	prog   string
	keep   []string // names in dir that the test itself made
	ifcs   []string // interfaces that it made
	all    []*program
	stderr *os.File // of the programs, instead of program.err; nil: none
}

func newBox(t testing.TB) *box {
	t.Helper()
	netnstest.Need(t)
	dir, err := os.MkdirTemp(filepath.Dir(exe), "box-") // short: unix sockets
	if err != nil {
		t.Fatal(err)
	}
	os.Chmod(dir, 0o777)
	b := &box{t: t, dir: filepath.Join(dir, "d"), prog: filepath.Join(dir, "boardlink"), ifcs: []string{"lo"}}
	if err := os.Mkdir(b.dir, 0o777); err != nil {
		t.Fatal(err)
	}
	os.Chmod(b.dir, 0o777)
	if err := os.Link(exe, b.prog); err != nil {
		t.Fatal(err)
	}
	if b.ns, err = netns.New(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, p := range b.all {
			p.kill()
		}
		b.clean()
		b.ns.Close()
		os.RemoveAll(dir)
	})
	return b
}

// path returns the path of a file in the box.
func (b *box) path(name string) string { return filepath.Join(b.dir, name) }

// own is path, for what the test makes and a program is to leave alone.
func (b *box) own(name string) string {
	b.keep = append(b.keep, name)
	return b.path(name)
}

// processes returns those that run the box's program.
func (b *box) processes() []string {
	var found []string
	links, _ := filepath.Glob("/proc/[0-9]*/exe")
	for _, l := range links {
		if p, err := os.Readlink(l); err == nil && p == b.prog {
			cmdline, _ := os.ReadFile(filepath.Join(filepath.Dir(l), "cmdline"))
			found = append(found, filepath.Dir(l)+": "+strings.ReplaceAll(string(cmdline), "\x00", " "))
		}
	}
	return found
}

// files returns what is in dir.
func (b *box) files() []string {
	var names []string
	filepath.WalkDir(b.dir, func(p string, d fs.DirEntry, err error) error {
		if rel, _ := filepath.Rel(b.dir, p); rel != "." {
			names = append(names, rel)
		}
		return nil
	})
	return names
}

func (b *box) interfaces() []string {
	var names []string
	err := b.ns.Do(func() error {
		h, err := netlink.NewHandle()
		if err != nil {
			return err
		}
		defer h.Close()
		ls, err := h.LinkList()
		for _, l := range ls {
			names = append(names, l.Attrs().Name)
		}
		return err
	})
	if err != nil {
		b.t.Error(err)
	}
	sort.Strings(names)
	return names
}

// clean fails the test where programs left anything: processes, files, interfaces. (Network
// namespaces have no names here: they go with their processes.)
func (b *box) clean() {
	b.t.Helper()
	// The kernel takes a moment to end what a death signal ends.
	for end := time.Now().Add(2 * time.Second); len(b.processes()) > 0 && time.Now().Before(end); {
		time.Sleep(5 * time.Millisecond)
	}
	if p := b.processes(); p != nil {
		b.t.Errorf("processes are left behind: %q", p)
	}
	sort.Strings(b.keep)
	if d := cmp.Diff(b.keep, b.files()); d != "" {
		b.t.Errorf("files are left behind, or gone:\n%s", d)
	}
	sort.Strings(b.ifcs)
	if d := cmp.Diff(b.ifcs, b.interfaces()); d != "" {
		b.t.Errorf("interfaces are left behind, or gone:\n%s", d)
	}
}

// output is what a program prints.
type output struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

type program struct {
	t        testing.TB
	cmd      *exec.Cmd
	out, err output
	done     chan struct{}
}

// start runs the program with args. how are the words of become; ns, where it is not nil, stands in for the
// box's namespace.
func (b *box) start(ns *netns.NS, how string, args ...string) *program {
	b.t.Helper()
	if ns == nil {
		ns = b.ns
	}
	p := &program{t: b.t, done: make(chan struct{}), cmd: exec.Command(b.prog, args...)}
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	p.cmd.Env = append(os.Environ(), "TMPDIR="+b.dir, "XDG_RUNTIME_DIR="+b.dir, "HOME=/nonexistent")
	if how != "" {
		p.cmd = exec.Command("/proc/self/exe", append([]string{b.prog}, args...)...)
		p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Unshareflags: unix.CLONE_NEWNS}
		p.cmd.Env = append(os.Environ(), "TMPDIR="+b.dir, "XDG_RUNTIME_DIR="+b.dir, "HOME=/nonexistent", helperEnv+"="+how)
	}
	p.cmd.Dir = b.dir
	p.cmd.Stdout, p.cmd.Stderr = &p.out, &p.err
	if b.stderr != nil {
		p.cmd.Stderr = b.stderr
	}
	if err := ns.Start(p.cmd); err != nil {
		b.t.Fatal(err)
	}
	go func() {
		p.cmd.Wait()
		close(p.done)
	}()
	b.all = append(b.all, p)
	return p
}

func (p *program) kill() {
	p.cmd.Process.Kill()
	<-p.done
}

// end sends a signal (0: none) and waits for the exit status, -1 where a signal ended the program.
func (p *program) end(sig syscall.Signal, limit time.Duration) int {
	p.t.Helper()
	if sig != 0 {
		p.cmd.Process.Signal(sig)
	}
	select {
	case <-p.done:
	case <-time.After(limit):
		p.t.Errorf("%v does not end within %v; standard error:\n%s", p.cmd.Args, limit, p.err.String())
		p.kill()
	}
	return p.cmd.ProcessState.ExitCode()
}

// run runs the program to its end.
func (b *box) run(how string, args ...string) (status int, stdout, stderr string) {
	b.t.Helper()
	p := b.start(nil, how, args...)
	status = p.end(0, time.Minute)
	return status, p.out.String(), p.err.String()
}

// until waits for a condition.
func until(t testing.TB, limit time.Duration, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(limit); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within %v: %s", limit, what)
		}
	}
}

func withTimeout(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}
