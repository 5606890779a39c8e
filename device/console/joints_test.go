package console

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"
)

func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for begin := time.Now(); !ok(); time.Sleep(time.Millisecond) {
		if time.Since(begin) > 20*time.Second {
			t.Fatalf("%s does not happen", what)
		}
	}
}

// lines collects what is logged.
type lines struct {
	mu  sync.Mutex
	all []string
}

func (l *lines) logf(format string, args ...interface{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all = append(l.all, fmt.Sprintf(format, args...))
}

func (l *lines) get() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return append([]string(nil), l.all...)
}

// A log file has what was printed, also after it was rotated or removed; one that exists is added to.
func TestLog(t *testing.T) {
	t.Parallel()
	b := newBoard(t, 0)
	b.start()
	path := filepath.Join(t.TempDir(), "con0.log")
	if err := os.WriteFile(path, []byte("from before\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var told lines
	b.print([]byte("before the log\n"))
	if err := b.Log(path, told.logf); err != nil {
		t.Fatal(err)
	}
	has := func(path, want string) {
		t.Helper()
		until(t, fmt.Sprintf("%q in the log", want), func() bool {
			got, err := os.ReadFile(path)
			return err == nil && string(got) == want
		})
	}
	b.print([]byte("one\n"))
	has(path, "from before\nbefore the log\none\n")
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	time.Sleep(rotated)
	b.print([]byte("two\n"))
	has(path, "two\n")
	has(path+".1", "from before\nbefore the log\none\n")
	until(t, "a count", func() bool { return b.Status().Counters["log_bytes"] == 23 })
	if s := b.Status(); s.Counters["log_lost"] != 0 || s.Interface != logName {
		t.Errorf("%+v", s)
	}
	b.print([]byte("the last words"))
	if err := b.Console.Close(); err != nil {
		t.Fatal(err)
	}
	has(path, "two\nthe last words")
	if l := told.get(); len(l) != 0 {
		t.Errorf("%q", l)
	}
}

// A disk that is full is told of once, stalls nobody, and what is missing is counted.
func TestLogFull(t *testing.T) {
	t.Parallel()
	b := newBoard(t, 0)
	b.start()
	path := filepath.Join(t.TempDir(), "con0.log")
	if err := os.Symlink("/dev/full", path); err != nil {
		t.Fatal(err)
	}
	var told lines
	if err := b.Log(path, told.logf); err != nil {
		t.Fatal(err)
	}
	for i := 0; i < 5; i++ {
		b.print([]byte("12345678"))
		until(t, "a loss", func() bool { return b.Status().Counters["log_lost"] == 8*uint64(i+1) })
	}
	if l := told.get(); len(l) != 1 || !strings.Contains(l[0], path) || !strings.Contains(l[0], "no space left on device") {
		t.Errorf("%q", l)
	}
	if n := b.Status().Notes; len(n) != 1 || !strings.Contains(n[0], "no space left") {
		t.Errorf("%q", n)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	time.Sleep(rotated)
	b.print([]byte("again"))
	until(t, "the second line", func() bool { return len(told.get()) == 2 })
	if l := told.get()[1]; !strings.Contains(l, "is written again; 40 bytes are missing") {
		t.Errorf("%q", l)
	}
	if got, err := os.ReadFile(path); string(got) != "again" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	if err := b.Log(filepath.Join(t.TempDir(), "no", "log"), told.logf); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%v", err)
	}
}

// A pseudo-terminal is one of the terminals while a program has it open, and types if nobody else does.
func TestTerminalFile(t *testing.T) {
	t.Parallel()
	b := newBoard(t, 0)
	b.start()
	for i := uint32(0); i < 16; i++ {
		b.offer(i)
	}
	path := filepath.Join(t.TempDir(), "con0")
	if err := b.Terminal(path); err != nil {
		t.Fatal(err)
	}
	b.print([]byte("before anybody looks"))
	attached := func(want string) {
		t.Helper()
		until(t, want, func() bool { return b.Status().Interface == want })
	}
	attached("nobody")
	for i := 0; i < 2; i++ {
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		attached(path)
		fmt.Fprintf(f, "\x03key %d\r", i)
		if got := b.receive(); string(got) != fmt.Sprintf("\x03key %d\r", i) {
			t.Errorf("%q", got)
		}
		attached("*" + path)
		b.print([]byte("answer\n"))
		p := make([]byte, 100)
		if n, err := f.Read(p); string(p[:n]) != "answer\n" || err != nil {
			t.Errorf("%q, %v", p[:n], err)
		}
		// Another one takes the keyboard over: what is typed here is dropped and counted.
		other := b.Attach("other", 0)
		if err := other.Keyboard(true); err != nil {
			t.Fatal(err)
		}
		fmt.Fprint(f, "lost")
		until(t, "a loss", func() bool { return b.Status().Counters["pty_typed_lost"] == 4*uint64(i+1) })
		other.Close()
		b.print([]byte("not read by this one"))
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		attached("nobody")
	}
	// One that types more than the board takes, and goes, is seen to go; so is one that does not read.
	if _, err := b.StopQueue(toDriver, time.Time{}); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	attached(path)
	if _, err := f.Write(make([]byte, 2*maxTyped)); err != nil {
		t.Fatal(err)
	}
	until(t, "a full queue", func() bool { return b.Status().Counters["typed_waiting"] == maxTyped })
	b.print(make([]byte, 100<<10))
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	attached("nobody")
	if err := b.Console.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("the link is left: %v", err)
	}
}

// Terminals hear of each other, of the keyboard, and of the board that comes and goes; one that waits to type hears that the keyboard is taken.
func TestState(t *testing.T) {
	b := newBoard(t, MinScrollback)
	one := b.Attach("one", -1)
	next := func(want State) {
		t.Helper()
		n, _, s, err := one.Next(make([]byte, 1))
		if n != 0 || s == nil || err != nil || !reflect.DeepEqual(*s, want) {
			t.Errorf("%d, %+v, %v, want %+v", n, s, err, want)
		}
	}
	next(State{Terminals: []string{"one"}})
	b.start()
	next(State{Terminals: []string{"one"}, Running: true})
	two := b.Attach("two", 0)
	next(State{Terminals: []string{"one", "two"}, Running: true})
	if err := one.Keyboard(false); err != nil {
		t.Fatal(err)
	}
	next(State{Terminals: []string{"*one", "two"}, Running: true, Keyboard: true})
	typed := make(chan error, 1)
	go func() {
		_, err := one.Write(make([]byte, maxTyped+1))
		typed <- err
	}()
	until(t, "a full queue", func() bool { return b.Status().Counters["typed_waiting"] == maxTyped })
	if done, _ := one.Drained(); done {
		t.Error("the board has it already")
	}
	if err := two.Keyboard(true); err != nil {
		t.Fatal(err)
	}
	if err := <-typed; !errors.Is(err, ErrReadOnly) {
		t.Errorf("%v", err)
	}
	next(State{Terminals: []string{"*two", "one"}, Running: true})
	_, wait := two.Drained()
	for i := uint32(0); i < 16; i++ {
		b.offer(i)
	}
	for done := false; !done; done, wait = two.Drained() {
		<-wait
	}
	two.Close()
	next(State{Terminals: []string{"one"}, Running: true})
	b.print(make([]byte, MinScrollback+10))
	if n := one.Kept(); n != MinScrollback {
		t.Errorf("%d bytes are kept", n)
	}
	if err := b.Reset(time.Time{}); err != nil {
		t.Fatal(err)
	}
	if n, lost, s, err := one.Next(make([]byte, 5)); n != 5 || lost != 10 || s == nil || s.Running || err != nil {
		t.Errorf("%d, %d, %+v, %v", n, lost, s, err)
	}
}
