package statusd

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/boardlink/boardlink/app"
	"github.com/boardlink/boardlink/ctl"
	"github.com/boardlink/boardlink/status"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
)

func TestServeAndGet(t *testing.T) {
	defer goleak.VerifyNone(t)
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	path := filepath.Join(t.TempDir(), "deep", "s.sock")
	want := status.Program{Side: "host", PID: 7, Links: []status.Link{{Name: "a", Counters: map[string]uint64{"x": 1 << 60}}}}
	s, err := app.ServeStatus(path, func() status.Program { return want })
	if err != nil {
		t.Fatal(err)
	}
	got, err := Get(ctx, path)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Fatal(d)
	}
	if _, err := app.ServeStatus(path, nil); !errors.Is(err, app.ErrStatusTaken) {
		t.Fatalf("a second server: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Fatalf("the socket is left behind: %v", err)
	}
	if _, err := Get(ctx, path); err == nil || !strings.Contains(err.Error(), "no program listens") {
		t.Fatalf("nobody there: %v", err)
	}
}

func TestStaleAndForeign(t *testing.T) {
	defer goleak.VerifyNone(t)
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	path := filepath.Join(t.TempDir(), "s.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close() // what a killed program leaves
	s, err := app.ServeStatus(path, func() status.Program { return status.Program{} })
	if err != nil {
		t.Fatalf("a stale socket is in the way: %v", err)
	}
	s.Close()

	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := app.ServeStatus(file, nil); err == nil {
		t.Fatal("a file was taken for a socket")
	}
	if b, _ := os.ReadFile(file); string(b) != "precious" {
		t.Fatal("a user's file was replaced")
	}

	foreign, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer foreign.Close()
	go func() {
		c, err := foreign.Accept()
		if err == nil {
			c.Write([]byte("220 mail\r\n"))
			c.Close()
		}
	}()
	if _, err := Get(ctx, path); err == nil {
		t.Fatal("a mail server passed for a program of ours")
	}
}

// A program with verbs answers requests, and status beside them; one without says so, and so does one of before, which knows HTTP only. What
// is malformed or of a later version is refused in words.
func TestAsk(t *testing.T) {
	defer goleak.VerifyNone(t)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	dir := t.TempDir()
	program := func() status.Program { return status.Program{Side: "host"} }
	verbs := map[string]app.Verb{"echo": func(c *ctl.Conn, req *ctl.Request, _ *net.UnixConn) {
		if c.SendLine(ctl.Reply{Boardlink: ctl.Version}) != nil {
			return
		}
		for {
			m, b, err := c.Receive(nil)
			if err != nil || c.Send(m, b) != nil {
				return
			}
		}
	}}
	with, without, old := filepath.Join(dir, "with"), filepath.Join(dir, "without"), filepath.Join(dir, "old")
	s, err := app.ServeControl(with, program, verbs)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	s2, err := app.ServeStatus(without, program)
	if err != nil {
		t.Fatal(err)
	}
	defer s2.Close()
	l, err := net.Listen("unix", old)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan struct{})
	go func() { // as programs before verbs did it: the head up to an empty line
		defer close(served)
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		for r := bufio.NewReader(c); ; {
			if line, err := r.ReadString('\n'); err != nil || line == "\n" {
				break
			}
		}
		io.WriteString(c, "HTTP/1.0 404 Not Found\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
	}()
	defer func() { l.Close(); <-served }()

	var conns []net.Conn
	for range 20 { // more than questions for the status are answered at once
		c, conn, err := Ask(ctx, with, ctl.Request{Verb: "echo"})
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, conn)
		if err := c.Send(ctl.Message{Type: ctl.Input}, []byte("hello")); err != nil {
			t.Fatal(err)
		}
		if m, b, err := c.Receive(nil); err != nil || m.Type != ctl.Input || string(b) != "hello" {
			t.Errorf("%+v, %q, %v", m, b, err)
		}
	}
	if p, err := Get(ctx, with); err != nil || p.Side != "host" {
		t.Errorf("%+v, %v", p, err)
	}
	for _, c := range conns {
		c.Close()
	}
	for path, want := range map[string]string{with: `has no verb "console"`, without: `has no verb "console"`, old: "only tells its status", filepath.Join(dir, "none"): "no program listens"} {
		_, _, err := Ask(ctx, path, ctl.Request{Verb: ctl.VerbConsole})
		if err == nil || !strings.Contains(err.Error(), want) || errors.Is(err, ErrRefused) == errors.Is(err, ErrNobody) {
			t.Errorf("%s: %v, want %q", path, err, want)
		}
	}
	for line, want := range map[string]string{`{"boardlink":2,"verb":"echo"}`: "of version 2, this program knows version 1", `{nonsense`: "is not what boardlink programs say", `{}`: "of version 0"} {
		conn, err := net.Dial("unix", with)
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(conn, line+"\n\n")
		var r ctl.Reply
		if err := ctl.NewConn(conn, conn).ReceiveLine(&r); err != nil || r.Kind != ctl.KindRequest || !strings.Contains(r.Error, want) {
			t.Errorf("%s: %+v, %v", line, r, err)
		}
		conn.Close()
	}
}
