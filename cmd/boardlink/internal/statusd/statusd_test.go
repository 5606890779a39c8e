package statusd

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/boardlink/boardlink/app"
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
