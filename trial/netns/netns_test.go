//go:build linux

package netns

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// helperEnv names what this test binary does instead of the tests.
const helperEnv = "NETNS_TEST_HELPER"

func TestMain(m *testing.M) {
	switch os.Getenv(helperEnv) {
	case "":
		goleak.VerifyTestMain(m)
	case "print":
		// The namespace of the process, whether lo is up, whether there is a second interface.
		ifs, err := net.Interfaces()
		fmt.Println(mustID(threadNS), len(ifs), err)
	case "sleep":
		fmt.Println("started")
		time.Sleep(time.Minute)
	case "parent": // a process that starts a child with Pdeathsig and lives on
		helperParent()
	case "user":
		helperUser()
	default:
		os.Exit(3)
	}
}

func mustID(path string) string {
	s, err := os.Readlink(path)
	if err != nil {
		panic(err)
	}
	return s
}

func helper(name string, args ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), helperEnv+"="+name, "GORACE=atexit_sleep_ms=0")
	cmd.Stderr = os.Stderr
	return cmd
}

// needRoot skips, or fails on CI, without the rights for namespaces.
func needRoot(t testing.TB) {
	t.Helper()
	if NeedsUser() {
		missing(t, "needs CAP_SYS_ADMIN and CAP_NET_ADMIN")
	}
}

func missing(t testing.TB, what string) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatal(what)
	}
	t.Skip(what)
}

func newNS(t testing.TB) *NS {
	t.Helper()
	n, err := New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Close() })
	return n
}

func TestNewIsApartWithLoUp(t *testing.T) {
	needRoot(t)
	home := mustID(threadNS)
	n := newNS(t)
	var inside string
	err := n.Do(func() error {
		inside = mustID(threadNS)
		for _, a := range []string{"127.0.0.1:0", "[::1]:0"} {
			l, err := net.Listen("tcp", a)
			if err != nil {
				return err
			}
			defer l.Close()
			// The socket stays in the namespace; a connection shows that lo carries.
			c, err := net.Dial("tcp", l.Addr().String())
			if err != nil {
				return err
			}
			c.Close()
		}
		ifs, err := net.Interfaces()
		if err != nil || len(ifs) != 1 || ifs[0].Flags&net.FlagUp == 0 {
			return fmt.Errorf("interfaces %v, %v: want lo alone, up", ifs, err)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if inside == home {
		t.Errorf("Do ran in the namespace %v of the process", home)
	}
	dev, ino, err := n.ID()
	if err != nil || dev == 0 || fmt.Sprintf("net:[%d]", ino) != inside {
		t.Errorf("ID %d:%d, %v; inside is %v", dev, ino, err, inside)
	}
	if got := mustID(n.Path()); got != inside {
		t.Errorf("Path leads to %v, want %v", got, inside)
	}
}

// TestDoLeavesNoThreadBehind looks at the namespace of every thread after many calls.
func TestDoLeavesNoThreadBehind(t *testing.T) {
	needRoot(t)
	a, b := newNS(t), newNS(t)
	var wg sync.WaitGroup
	for i := range 64 {
		wg.Go(func() {
			n, other := a, b
			if i%2 == 1 {
				n, other = b, a
			}
			_, want, _ := n.ID()
			_, wantOther, _ := other.ID()
			err := n.Do(func() error {
				if got := mustID(threadNS); got != fmt.Sprintf("net:[%d]", want) {
					t.Errorf("in %v, want %d", got, want)
				}
				err := other.Do(func() error {
					if got := mustID(threadNS); got != fmt.Sprintf("net:[%d]", wantOther) {
						t.Errorf("inner: in %v, want %d", got, wantOther)
					}
					return nil
				})
				if got := mustID(threadNS); got != fmt.Sprintf("net:[%d]", want) {
					t.Errorf("after the inner Do: in %v, want %d", got, want)
				}
				return err
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	home := mustID("/proc/self/ns/net")
	tasks, err := filepath.Glob("/proc/self/task/*/ns/net")
	if err != nil || len(tasks) == 0 {
		t.Fatal(tasks, err)
	}
	for _, f := range tasks {
		if got, err := os.Readlink(f); err == nil && got != home {
			t.Errorf("%s is %v, want %v", f, got, home)
		}
	}
}

func TestDoReturnsWhatTheFunctionDoes(t *testing.T) {
	needRoot(t)
	n := newNS(t)
	mine := errors.New("mine")
	if err := n.Do(func() error { return mine }); err != mine {
		t.Errorf("got %v", err)
	}
	// testing's FailNow ends the goroutine.
	if err := n.Do(func() error { runtime.Goexit(); return nil }); err == nil {
		t.Error("no error of a function that did not return")
	}
	if err := n.Do(func() error { return n.Close() }); err != nil {
		t.Errorf("Close inside Do: %v", err)
	}
	for _, err := range []error{
		n.Do(func() error { t.Error("ran"); return nil }),
		n.Start(helper("print")),
		n.Close(), // the second does nothing
	} {
		if err != nil && err != ErrClosed {
			t.Error(err)
		}
	}
	if err := n.Do(nil); err != ErrClosed {
		t.Errorf("Do after Close: %v", err)
	}
	if _, _, err := n.ID(); err != ErrClosed || n.FD() != -1 {
		t.Errorf("after Close: ID %v, FD %d", err, n.FD())
	}
}

func TestNothingIsLeftOpen(t *testing.T) {
	needRoot(t)
	count := func() int {
		f, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(f)
	}
	before := count()
	for range 20 {
		n, err := New()
		if err != nil {
			t.Fatal(err)
		}
		if err := n.Do(func() error { return nil }); err != nil {
			t.Fatal(err)
		}
		cmd := helper("print")
		if err := n.Start(cmd); err != nil {
			t.Fatal(err)
		}
		cmd.Wait()
		o, err := Open(os.Getpid())
		if err != nil {
			t.Fatal(err)
		}
		o.Close()
		n.Close()
	}
	if after := count(); after > before+1 { // ReadDir has one open itself
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

func TestStartAndOpen(t *testing.T) {
	needRoot(t)
	n := newNS(t)
	_, ino, err := n.ID()
	if err != nil {
		t.Fatal(err)
	}
	for _, death := range []syscall.Signal{0, unix.SIGKILL} {
		cmd := helper("print")
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: death}
		var out strings.Builder
		cmd.Stdout = &out
		if err := n.Start(cmd); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); err != nil {
			t.Fatal(err)
		}
		if want := fmt.Sprintf("net:[%d] 1 <nil>\n", ino); out.String() != want {
			t.Errorf("the child printed %q, want %q", out.String(), want)
		}
		if err := n.Start(&exec.Cmd{Path: "/does/not/exist", SysProcAttr: &syscall.SysProcAttr{Pdeathsig: death}}); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("start of a program that is not there: %v", err)
		}
	}

	cmd := helper("sleep")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Start(cmd); err != nil {
		t.Fatal(err)
	}
	defer func() {
		cmd.Process.Kill()
		cmd.Wait()
	}()
	if _, err := io.ReadFull(out, make([]byte, len("started\n"))); err != nil {
		t.Fatal(err)
	}
	n.Close()
	o, err := Open(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	defer o.Close()
	if _, got, err := o.ID(); err != nil || got != ino {
		t.Errorf("Open of the child: %d, %v; want %d", got, err, ino)
	}
	if _, err := Open(1 << 30); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Open of no process: %v", err)
	}
}

// helperParent starts a child with Pdeathsig, ends threads, and reports whether the child lives;
// then waits to be killed.
func helperParent() {
	n, err := New()
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	cmd := helper("sleep")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	out, _ := cmd.StdoutPipe()
	if err := n.Start(cmd); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	io.ReadFull(out, make([]byte, len("started\n")))
	// Use up the idle threads: those of goroutines that end locked end, too.
	var wg sync.WaitGroup
	for range 64 {
		wg.Go(func() {
			runtime.LockOSThread()
			time.Sleep(10 * time.Millisecond)
		})
	}
	wg.Wait()
	time.Sleep(50 * time.Millisecond)
	fmt.Println(cmd.Process.Pid, alive(cmd.Process.Pid))
	select {}
}

// alive reports whether a process runs, as opposed to being gone or unreaped.
func alive(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	_, rest, ok := strings.Cut(string(b), ") ")
	return ok && rest[0] != 'Z' && rest[0] != 'X'
}

func TestPdeathsigGoesByTheProcess(t *testing.T) {
	needRoot(t)
	cmd := helper("parent")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var pid int
	var lives bool
	_, err = fmt.Fscan(out, &pid, &lives)
	cmd.Process.Kill()
	cmd.Wait()
	if err != nil || !lives {
		t.Fatalf("child %d, alive %v, %v: the end of a thread took it along", pid, lives, err)
	}
	for deadline := time.Now().Add(5 * time.Second); alive(pid); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("child %d outlived its parent", pid)
		}
	}
}
