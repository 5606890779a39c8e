package daemon

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const childEnv = "BOARDLINK_DAEMON_CHILD"

func TestMain(m *testing.M) {
	what := os.Getenv(childEnv)
	if what == "" {
		os.Exit(m.Run())
	}
	// A program that ends with its context, or is stuck.
	q := Stderr()
	limit := StopLimit
	if what == "stuck, short" {
		limit = time.Second
	}
	ctx, stop := contextWithin(q, limit)
	defer stop()
	fmt.Println("ready")
	<-ctx.Done()
	fmt.Println("stopping")
	if what != "clean" {
		select {}
	}
	fmt.Fprintln(os.Stderr, "to nobody") // SIGPIPE does not end it
	q.Write([]byte("last line\n"))
	q.Flush(FlushLimit)
	os.Exit(0)
}

// TestSignals: each signal ends a program cleanly; one that is stuck ends by a second signal, or when its time is up.
func TestSignals(t *testing.T) {
	for _, c := range []struct {
		what    string
		signals []syscall.Signal
		code    int
		says    string
	}{
		{"clean", []syscall.Signal{unix.SIGTERM}, 0, "last line"},
		{"clean", []syscall.Signal{unix.SIGINT}, 0, "last line"},
		{"clean", []syscall.Signal{unix.SIGHUP}, 0, "last line"},
		{"stuck", []syscall.Signal{unix.SIGTERM, unix.SIGINT}, 1, "a second signal (interrupt)"},
		{"stuck, short", []syscall.Signal{unix.SIGHUP}, 1, "something is stuck, 1s after the signal (hangup)"},
	} {
		c := c
		t.Run(fmt.Sprint(c.what, c.signals), func(t *testing.T) {
			t.Parallel()
			var errs strings.Builder
			words := append(strings.Fields(os.Getenv("BOARDLINK_TEST_EXEC")), os.Args[0]) // behind the emulator that runs it, where one does
			cmd := exec.Command(words[0], words[1:]...)
			cmd.Env = append(os.Environ(), childEnv+"="+c.what)
			cmd.Stderr = &errs
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			defer cmd.Process.Kill()
			r := bufio.NewReader(out)
			for i, s := range c.signals {
				if _, err := r.ReadString('\n'); err != nil {
					t.Fatal(err)
				}
				if i > 0 {
					time.Sleep(once + 50*time.Millisecond)
				}
				if err := cmd.Process.Signal(s); err != nil {
					t.Fatal(err)
				}
			}
			io.Copy(io.Discard, r)
			cmd.Wait()
			if code := cmd.ProcessState.ExitCode(); code != c.code || !strings.Contains(errs.String(), c.says) {
				t.Errorf("status %d (%v), standard error %q", code, cmd.ProcessState, &errs)
			}
		})
	}
}

func pipe(t *testing.T) (r *os.File, w int) {
	t.Helper()
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	r = os.NewFile(uintptr(p[0]), "pipe")
	t.Cleanup(func() {
		r.Close()
		unix.Close(p[1])
	})
	return r, p[1]
}

// TestQueueUnread: a pipe that nobody reads takes what fits, nobody waits for it, and who reads later is told how many lines are missing.
func TestQueueUnread(t *testing.T) {
	r, w := pipe(t)
	q := NewQueue(w, 64<<10)
	const n = 10000
	for i := 0; i < n; i++ {
		fmt.Fprintf(q, "line %d %0100d\n", i, 0)
	}
	if q.Flush(10 * time.Millisecond) {
		t.Error("all is written to a pipe that nobody reads")
	}
	lost := q.Lost()
	if lost == 0 || lost >= n {
		t.Fatalf("%d of %d lines were lost", lost, n)
	}
	lines := make(chan string, 2*n)
	go func() {
		s := bufio.NewScanner(r)
		for s.Scan() {
			lines <- s.Text()
		}
		close(lines)
	}()
	if !q.Flush(20 * time.Second) {
		t.Fatal("what waits is not written once it is read")
	}
	fmt.Fprintln(q, "after")
	q.Flush(20 * time.Second)
	var got int
	told := uint64(0)
	for s := range lines {
		if strings.HasPrefix(s, "line ") {
			got++
		}
		if i := strings.Index(s, `msg="`); i >= 0 && strings.Contains(s, "lines of this log were lost") {
			var k uint64
			if _, err := fmt.Sscan(s[i+len(`msg="`):], &k); err != nil {
				t.Fatal(err)
			}
			told += k
		}
		if s == "after" {
			break
		}
	}
	if uint64(got)+lost != n || told != lost {
		t.Errorf("%d lines arrived, %d of %d were lost, %d told of", got, lost, n, told)
	}
}

// TestQueueLeft: a reader that left does not end the program, and every line counts as lost; a descriptor that is non-blocking is waited for.
func TestQueueLeft(t *testing.T) {
	r, w := pipe(t)
	r.Close()
	q := NewQueue(w, 64<<10)
	for i := 0; i < 10; i++ {
		fmt.Fprintln(q, "to nobody")
	}
	if !q.Flush(20*time.Second) || q.Lost() != 10 {
		t.Errorf("%d of 10 lines were lost", q.Lost())
	}
	r, w = pipe(t)
	unix.SetNonblock(w, true)
	q = NewQueue(w, 1<<20)
	text := strings.Repeat("x", 1000) + "\n"
	for i := 0; i < 500; i++ {
		io.WriteString(q, text)
	}
	got := make(chan int64)
	go func() {
		n, _ := io.Copy(io.Discard, io.LimitReader(r, int64(500*len(text))))
		got <- n
	}()
	if !q.Flush(20*time.Second) || q.Lost() != 0 || <-got != int64(500*len(text)) {
		t.Errorf("%d lines were lost", q.Lost())
	}
}
