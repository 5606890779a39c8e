package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/boardlink/boardlink/board/loopback"
)

// TestMain lets the test program be the example.
func TestMain(m *testing.M) {
	if os.Getenv("FRAMES_EXAMPLE") != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

// counts are the counters that an end printed last.
type counts struct{ ups, sent, received, corrupt, lost uint64 }

// proc is one end, a process of its own.
type proc struct {
	t        *testing.T
	cmd      *exec.Cmd
	mu       sync.Mutex
	out, log bytes.Buffer
}

func start(t *testing.T, args ...string) *proc {
	t.Helper()
	words := append(strings.Fields(os.Getenv("BOARDLINK_TEST_EXEC")), os.Args[0]) // behind the emulator that runs it, where one does
	words = append(append(words, args...), "-every", "20ms")
	p := &proc{t: t, cmd: exec.Command(words[0], words[1:]...)}
	p.cmd.Env = append(os.Environ(), "FRAMES_EXAMPLE=1")
	p.cmd.Stdout, p.cmd.Stderr = writer{p, &p.out}, writer{p, &p.log}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if p.cmd.ProcessState == nil {
			p.cmd.Process.Kill()
			p.cmd.Wait()
		}
	})
	return p
}

type writer struct {
	p *proc
	b *bytes.Buffer
}

func (w writer) Write(b []byte) (int, error) {
	w.p.mu.Lock()
	defer w.p.mu.Unlock()
	return w.b.Write(b)
}

// last returns the last whole line of counters.
func (p *proc) last() (c counts) {
	p.mu.Lock()
	defer p.mu.Unlock()
	lines := strings.Split(p.out.String(), "\n")
	if len(lines) < 2 {
		return c
	}
	var side string
	if _, err := fmt.Sscanf(lines[len(lines)-2], "side=%s ups=%d sent=%d received=%d corrupt=%d lost=%d", &side, &c.ups, &c.sent, &c.received, &c.corrupt, &c.lost); err != nil {
		p.t.Fatalf("line %q: %v", lines[len(lines)-2], err)
	}
	return c
}

func (p *proc) text() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.log.String()
}

// wait waits until the process has come up so often and has received so many frames.
func (p *proc) wait(ups, received uint64) {
	p.t.Helper()
	for begin := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		c := p.last()
		if c.ups >= ups && c.received >= received {
			return
		}
		if time.Since(begin) > 60*time.Second {
			p.t.Fatalf("%+v, want %d ups and %d frames received; log:\n%s", c, ups, received, p.text())
		}
	}
}

// end stops the process and checks its counters.
func (p *proc) end() {
	p.t.Helper()
	p.cmd.Process.Signal(syscall.SIGTERM)
	if err := p.cmd.Wait(); err != nil {
		p.t.Errorf("%v; log:\n%s", err, p.text())
	}
	if c := p.last(); c.corrupt != 0 || c.lost != 0 {
		p.t.Errorf("%+v: frames are corrupt or lost; log:\n%s", c, p.text())
	}
}

func serve(t *testing.T) (spec string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "a.sock")
	s, err := loopback.NewServer(loopback.ServerConfig{Path: path, Size: 4 << 20, Vectors: 8})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.Serve() }()
	t.Cleanup(func() {
		s.Close()
		<-done
	})
	return "loopback:" + path
}

// Two processes exchange frames by the documented commands, and either one may be killed and started again.
func TestProcesses(t *testing.T) {
	t.Parallel()
	spec := serve(t)
	const some = 5000
	h, a := start(t, "-side", "host", "-board", spec), start(t, "-side", "agent", "-board", spec)
	h.wait(1, some)
	a.wait(1, some)

	a.cmd.Process.Kill()
	a.cmd.Wait()
	from := h.last()
	a = start(t, "-side", "agent", "-board", spec)
	h.wait(from.ups+1, from.received+some)
	a.wait(1, some)

	from = a.last()
	h.end()
	h = start(t, "-side", "host", "-board", spec)
	h.wait(1, some)
	a.wait(from.ups+1, from.received+some)
	a.end()
	h.end()
}

func TestUsage(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{{}, {"-side", "host"}, {"-side", "both", "-board", "loopback:x"}, {"-side", "host", "-board", "loopback:x", "-every", "0"},
		{"-side", "host", "-board", "loopback:x", "more"}, {"-nonsense"}} {
		var out, log bytes.Buffer
		if err := run(context.Background(), args, &out, &log); err != errUsage || out.Len() > 0 || log.Len() == 0 {
			t.Errorf("%q: %v, %q, %q", args, err, &out, &log)
		}
	}
	var out, log bytes.Buffer
	if err := run(context.Background(), []string{"-side", "agent", "-board", "loopback:x", "-mtu", "12"}, &out, &log); err == nil || !strings.Contains(err.Error(), "68 to 65521") {
		t.Errorf("MTU 12: %v", err)
	}
}
