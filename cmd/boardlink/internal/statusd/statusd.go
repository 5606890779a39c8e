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
	"sort"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/boardlink/boardlink/status"
)

// Dir returns where programs put their sockets: /run/boardlink for root, the user's runtime
// directory otherwise.
func Dir() string {
	if os.Geteuid() == 0 {
		return "/run/boardlink"
	}
	if d := os.Getenv("XDG_RUNTIME_DIR"); d != "" {
		return filepath.Join(d, "boardlink")
	}
	return filepath.Join(os.TempDir(), "boardlink-"+strconv.Itoa(os.Geteuid()))
}

// DefaultPath returns the socket of a program of the given side and name.
func DefaultPath(side, name string) string {
	safe := strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' || r == '_' || r == '.' {
			return r
		}
		return '_'
	}, name)
	return filepath.Join(Dir(), side+"-"+safe+".sock")
}

// Server answers for one program.
type Server struct {
	path string
	http *http.Server
	done chan struct{}
}

// ErrTaken: a live program serves the path already.
var ErrTaken = errors.New("another program serves this status socket")

// Serve answers at path with what get returns, until Close. A socket that nobody listens on is
// replaced. An empty path serves nothing.
func Serve(path string, get func() status.Program) (*Server, error) {
	if path == "" {
		return &Server{}, nil
	}
	const most = 107 // sun_path of unix(7) less its zero byte
	if len(path) > most {
		return nil, fmt.Errorf("status socket %s: the path has %d bytes, a unix socket's at most %d; choose another with --status", path, len(path), most)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("status socket: %w", err)
	}
	l, err := net.Listen("unix", path)
	if errors.Is(err, syscall.EADDRINUSE) {
		if c, derr := net.DialTimeout("unix", path, time.Second); derr == nil {
			c.Close()
			return nil, fmt.Errorf("status socket %s: %w (of the same --name?); choose another with --status", path, ErrTaken)
		}
		fi, serr := os.Lstat(path)
		if serr == nil && fi.Mode()&os.ModeSocket == 0 {
			return nil, fmt.Errorf("status socket %s: there is something else, no socket; choose another with --status", path)
		}
		os.Remove(path)
		l, err = net.Listen("unix", path)
	}
	if err != nil {
		return nil, fmt.Errorf("status socket %s: %w; choose another with --status", path, err)
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
				return p, fmt.Errorf("%s: no program listens there: is it running, and with this --status?", path)
			}
		}
		if errors.Is(err, syscall.EACCES) || errors.Is(err, syscall.EPERM) {
			return p, fmt.Errorf("%s: permission denied: ask as the user of that program, or as root", path)
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

// Find returns the sockets in Dir, sorted.
func Find() ([]string, error) {
	paths, err := filepath.Glob(filepath.Join(Dir(), "*.sock"))
	sort.Strings(paths)
	return paths, err
}
