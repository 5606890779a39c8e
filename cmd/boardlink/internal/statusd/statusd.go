// Package statusd serves and reads the status of a running host or agent: JSON over HTTP on a
// unix socket. Any HTTP client can ask: curl --unix-socket PATH http://boardlink/status
//
// In the room: the socket, its place, both ends of the conversation. Never in it: what a status
// says (package status), how it is printed.
package statusd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/boardlink/boardlink/cmd/internal/statussock"
	"github.com/boardlink/boardlink/status"
)

// DefaultPath returns the socket of a program of the given side and name.
func DefaultPath(side, name string) string {
	safe := strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' || r == '_' || r == '.' {
			return r
		}
		return '_'
	}, name)
	return filepath.Join(statussock.Dir(), side+"-"+safe+".sock")
}

// Server answers for one program.
type Server struct {
	path string
	http *http.Server
	done chan struct{}
}

// Serve answers at path with what get returns, until Close. A socket that nobody listens on is
// replaced. An empty path serves nothing.
func Serve(path string, get func() status.Program) (*Server, error) {
	if path == "" {
		return &Server{}, nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("status socket: %w", err)
	}
	l, err := statussock.Listen(path)
	if err != nil {
		return nil, err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		e.Encode(get())
	})
	s := &Server{path: path, done: make(chan struct{}),
		http: &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}}
	go func() {
		defer close(s.done)
		s.http.Serve(l)
	}()
	return s, nil
}

// Close ends the service and removes the socket.
func (s *Server) Close() error {
	if s.http == nil {
		return nil
	}
	err := s.http.Close()
	<-s.done
	return err
}

// What errors of Get match (errors.Is).
var (
	// ErrNobody: the socket is not there, or left by a program that has ended.
	ErrNobody = errors.New("no program listens there")
	// ErrDenied: this user may not ask.
	ErrDenied = errors.New("permission denied")
)

// Get asks the program at path.
func Get(ctx context.Context, path string) (status.Program, error) {
	var p status.Program
	c := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", path)
		},
	}}
	req, err := http.NewRequestWithContext(ctx, "GET", "http://boardlink/status", nil)
	if err != nil {
		return p, err
	}
	resp, err := c.Do(req)
	if err != nil {
		for _, e := range []error{syscall.ENOENT, syscall.ECONNREFUSED} {
			if errors.Is(err, e) {
				return p, fmt.Errorf("%s: %w: is it running, and with this --status?", path, ErrNobody)
			}
		}
		if errors.Is(err, syscall.EACCES) || errors.Is(err, syscall.EPERM) {
			return p, fmt.Errorf("%s: %w: ask as the user of that program, or as root", path, ErrDenied)
		}
		if ctx.Err() != nil {
			return p, fmt.Errorf("%s: no answer: %w", path, ctx.Err())
		}
		return p, fmt.Errorf("%s: what listens there does not speak HTTP: no boardlink program", path)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return p, fmt.Errorf("%s: answers %s: no boardlink program", path, resp.Status)
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, 16<<20)).Decode(&p); err != nil {
		return p, fmt.Errorf("%s: not the status of a boardlink program: %w", path, err)
	}
	return p, nil
}
