package console

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/boardlink/boardlink/tty"
)

// screen reads what an End prints.
type screen struct {
	t   *testing.T
	end End
	mu  sync.Mutex
	all []byte
}

func newScreen(t *testing.T, end End) *screen {
	s := &screen{t: t, end: end}
	done := make(chan struct{})
	go func() {
		defer close(done)
		var b [512]byte
		for {
			n, err := end.Read(b[:])
			s.mu.Lock()
			s.all = append(s.all, b[:n]...)
			s.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	t.Cleanup(func() {
		if err := end.Close(); err != nil {
			t.Error(err)
		}
		<-done
	})
	return s
}

func (s *screen) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return string(s.all)
}

// see waits for text, and returns what was printed up to it, which is forgotten.
func (s *screen) see(text string) string {
	s.t.Helper()
	for begin := time.Now(); ; time.Sleep(time.Millisecond) {
		s.mu.Lock()
		i := bytes.Index(s.all, []byte(text))
		if i >= 0 {
			before := string(s.all[:i+len(text)])
			s.all = s.all[i+len(text):]
			s.mu.Unlock()
			return before
		}
		s.mu.Unlock()
		if time.Since(begin) > 20*time.Second {
			state, _ := s.end.State()
			s.t.Fatalf("%q does not come, but %q; %s", text, s.String(), state)
		}
	}
}

func (s *screen) key(text string) {
	s.t.Helper()
	if n, err := s.end.Write([]byte(text)); n != len(text) || err != nil {
		s.t.Fatalf("%q: %d, %v", text, n, err)
	}
}

// told collects what is logged.
type told struct {
	mu    sync.Mutex
	lines []string
}

func (l *told) logf(format string, args ...interface{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, fmt.Sprintf(format, args...))
}

func (l *told) all() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return append([]string(nil), l.lines...)
}

// A shell on a terminal of its own: it answers, has a size, interrupts its children by a key, and is started again when it ends.
func TestCommand(t *testing.T) {
	t.Parallel()
	var log told
	c, err := StartCommand([]string{"/bin/sh"}, log.logf)
	if err != nil {
		t.Fatal(err)
	}
	s := newScreen(t, c)
	c.Resize(tty.Size{Cols: 132, Rows: 43})
	s.key("PS1='$ '; stty size; tty; ps -o tty= -p $$\n")
	s.see("43 132\r\n")
	name := c.Joined()[strings.LastIndex(c.Joined(), "/dev/"):]
	s.see(name + "\r\n")
	s.see(strings.TrimPrefix(name, "/dev/"))
	s.key("cat\n")
	s.see("cat\r\n")
	s.key("ping\n")
	s.see("ping\r\n")
	s.see("ping\r\n") // it runs
	s.key("\x03")
	s.see("$ ") // a shell drops what was typed while its child is interrupted
	s.key("echo back in $TERM\n")
	s.see("back in " + map[bool]string{true: "vt220", false: os.Getenv("TERM")}[os.Getenv("TERM") == ""] + "\r\n")
	s.key("stty raw -echo; exit 3\n")
	s.see("exit 3")
	s.key("echo fresh; stty -a\n")
	if all := s.see(" icanon"); !strings.Contains(all, "fresh\r\n") || strings.Contains(all, "-icanon") {
		t.Errorf("the next program's terminal is not a fresh one: %q", all)
	}
	if text, n := c.State(); n["program_starts"] != 2 || !strings.Contains(text, "exit status 3") {
		t.Errorf("%q, %v", text, n)
	}
	if l := log.all(); len(l) != 1 || !strings.Contains(l[0], "/bin/sh ended: exit status 3; it is started again, after 250ms") {
		t.Errorf("%q", l)
	}
}

// A program that ignores the hang-up of its terminal does not stay.
func TestCommandStays(t *testing.T) {
	t.Parallel()
	var log told
	c, err := StartCommand([]string{"/bin/sh", "-c", "trap '' HUP; echo here; while :; do sleep 0.1; done"}, log.logf)
	if err != nil {
		t.Fatal(err)
	}
	s := newScreen(t, c)
	s.see("here")
	c.mu.Lock()
	pid := c.pid
	c.mu.Unlock()
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(fmt.Sprintf("/proc/%d", pid)); !os.IsNotExist(err) {
		t.Errorf("process %d is there: %v", pid, err)
	}
	if _, err := c.Write([]byte("x")); err != errClosed {
		t.Errorf("%v", err)
	}
}

// agetty hangs its terminal up when it starts (vhangup): nothing ends, and a login goes its way, again after it has ended.
func TestGetty(t *testing.T) {
	t.Parallel()
	path, err := exec.LookPath("agetty")
	if err != nil {
		path, err = exec.LookPath("/sbin/agetty")
	}
	if err != nil || os.Geteuid() != 0 {
		why := fmt.Sprintf("agetty, which needs root: %v, user %d", err, os.Geteuid())
		if os.Getenv("CI") == "true" {
			t.Fatal(why)
		}
		t.Skip(why)
	}
	login := filepath.Join(t.TempDir(), "login")
	if err := os.WriteFile(login, []byte("#!/bin/sh\necho \"login of $* on $(tty), $(stty size)\"\nread line\necho \"bye $line\"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	args, err := Words(path + ` -L -i -n -l ` + login + ` -o "-- someone" 115200 %t vt220`)
	if err != nil {
		t.Fatal(err)
	}
	var log told
	c, err := StartCommand(args, log.logf)
	if err != nil {
		t.Fatal(err)
	}
	s := newScreen(t, c)
	c.Resize(tty.Size{Cols: 100, Rows: 30})
	name := c.Joined()[strings.LastIndex(c.Joined(), "/dev/"):]
	for i := 0; i < 2; i++ {
		s.see("login of -- someone on " + name + ", 30 100\r\n")
		s.key(fmt.Sprint("number", i, "\n"))
		s.see(fmt.Sprint("bye number", i))
	}
}

// A terminal with a stable name: programs come and go, what is typed for nobody is dropped, the link is left to nobody else.
func TestPty(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "con0")
	if err := os.Symlink("/dev/pts/of-one-that-was-killed", path); err != nil {
		t.Fatal(err)
	}
	p, err := OpenPty(path)
	if err != nil {
		t.Fatal(err)
	}
	s := newScreen(t, p)
	if n, err := p.Write([]byte("nobody")); n != 0 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	for i := 0; i < 3; i++ {
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(f, "hello %d\n", i)
		s.see(fmt.Sprintf("hello %d\n", i)) // as it was printed: the terminal is raw
		want := fmt.Sprintf("\x03\r\n%d\x7f", i)
		s.key(want)
		b := make([]byte, 100)
		n, err := f.Read(b)
		for n < len(want) && err == nil {
			k := 0
			k, err = f.Read(b[n:])
			n += k
		}
		if string(b[:n]) != want || err != nil {
			t.Errorf("%q, %v", b[:n], err)
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
		for begin := time.Now(); !p.pty.HungUp(); time.Sleep(time.Millisecond) {
			if time.Since(begin) > 20*time.Second {
				t.Fatal("the terminal stays open")
			}
		}
	}
	if text, _ := p.State(); !strings.Contains(text, "no program") {
		t.Errorf("%q", text)
	}
	if p.Joined() != path+" ("+p.pty.Name()+")" {
		t.Error(p.Joined())
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("the link is left: %v", err)
	}
}

func TestPtyPath(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file, link := filepath.Join(dir, "file"), filepath.Join(dir, "link")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(file, link); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{file: "is not a symbolic link", link: "not to a pseudo-terminal", filepath.Join(dir, "no", "con0"): "no such file"} {
		if p, err := OpenPty(path); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v, want %q", path, err, want)
			if err == nil {
				p.Close()
			}
		}
	}
	if _, err := StartCommand([]string{"/bin/no-such-program"}, nil); err == nil || !strings.Contains(err.Error(), "/bin/no-such-program: ") {
		t.Errorf("%v", err)
	}
}

func TestWords(t *testing.T) {
	t.Parallel()
	for line, want := range map[string][]string{
		"/sbin/agetty -L  115200 %t vt220": {"/sbin/agetty", "-L", "115200", "%t", "vt220"},
		`sh -c "a 'b' c" ''`:               {"sh", "-c", "a 'b' c", ""},
		" a'b c'd ":                        {"ab cd"},
		"":                                 nil,
		"  ":                               nil,
		`''`:                               nil,
		`sh "x`:                            nil,
	} {
		if got, err := Words(line); !reflect.DeepEqual(got, want) || (err == nil) != (want != nil) {
			t.Errorf("%q: %q, %v", line, got, err)
		}
	}
}

// Records of the kernel's log become lines; overwritten ones are told of and counted.
func TestKmsgText(t *testing.T) {
	t.Parallel()
	k := &Kmsg{}
	got := ""
	for _, rec := range []string{
		"6,339,5140900,-;NET: Registered protocol family 10\n SUBSYSTEM=net\n DEVICE=+x\n",
		"30,340,5690716123,c,caller=T1;udevd[80]: a; b\n",
		"6,350,98888888,-;later\n",
		"nonsense\n",
		"1,2;3\n",
	} {
		got += string(k.text([]byte(rec)))
	}
	want := "[    5.140900] NET: Registered protocol family 10\r\n[ 5690.716123] udevd[80]: a; b\r\n" +
		"[boardlink: the kernel has overwritten 9 records]\r\n[   98.888888] later\r\nnonsense\n1,2;3\n"
	if got != want {
		t.Errorf("%q", got)
	}
	if _, n := k.State(); n["records"] != 5 || n["records_lost"] != 9 {
		t.Errorf("%v", n)
	}
}

// lackRoot skips a test of what only root may do; in CI, tests have it.
func lackRoot(t *testing.T, err error) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf("this test needs root, or CAP_SYSLOG: %v", err)
	}
	t.Skipf("this test needs root, or CAP_SYSLOG: %v", err)
}

// The kernel's own log is read, and goes on to be read; Close ends that.
func TestKmsg(t *testing.T) {
	t.Parallel()
	k, err := OpenKmsg()
	if err != nil {
		lackRoot(t, err)
	}
	s := newScreen(t, k)
	w, err := os.OpenFile(kmsgPath, os.O_WRONLY, 0)
	if err != nil {
		lackRoot(t, err)
	}
	defer w.Close()
	if _, err := fmt.Fprintf(w, "<7>boardlink test %d\n", os.Getpid()); err != nil {
		t.Fatal(err)
	}
	s.see(fmt.Sprintf("] boardlink test %d\r\n", os.Getpid()))
	if n, err := k.Write([]byte("x")); n != 0 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
}
