package lean

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/boardlink/boardlink/cmd/internal/statussock"
	"github.com/boardlink/boardlink/status"
)

// statusTime limits one conversation.
const statusTime = 5 * time.Second

// acceptPause is how long the server waits after it could not accept a connection.
const acceptPause = 100 * time.Millisecond

// maxRequest limits the head of a request, in bytes.
const maxRequest = 16 << 10

// statusServer answers `boardlink status`, and whoever else asks by HTTP on the unix socket, without the
// http package: the one page, then the connection closes (RFC 9112: a server may answer HTTP/1.0).
type statusServer struct {
	l    net.Listener
	done sync.WaitGroup
}

// serveStatus serves at path what get returns; nothing where the path is empty or "none". A socket that nobody
// listens on is replaced.
func serveStatus(path string, get func() status.Program) (*statusServer, error) {
	s := &statusServer{}
	if path == "" || path == "none" {
		return s, nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("status socket: %w", err)
	}
	l, err := statussock.Listen(path)
	if err != nil {
		return nil, err
	}
	s.l = l
	s.done.Add(1)
	go func() {
		defer s.done.Done()
		for {
			c, err := l.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil {
				time.Sleep(acceptPause) // out of descriptors or memory, which passes
				continue
			}
			s.done.Add(1)
			go func() {
				defer s.done.Done()
				answer(c, get)
			}()
		}
	}()
	return s, nil
}

// answer reads the head of a request and writes the page.
func answer(c net.Conn, get func() status.Program) {
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(statusTime))
	r := bufio.NewReader(io.LimitReader(c, maxRequest))
	first := ""
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			return
		}
		line = strings.TrimRight(line, "\r\n")
		if first == "" {
			first = line
		} else if line == "" {
			break
		}
	}
	if !strings.HasPrefix(first, "GET /status ") {
		io.WriteString(c, "HTTP/1.0 404 Not Found\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
		return
	}
	body, err := json.MarshalIndent(get(), "", "  ")
	if err != nil {
		io.WriteString(c, "HTTP/1.0 500 Internal Server Error\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
		return
	}
	fmt.Fprintf(c, "HTTP/1.0 200 OK\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s\n", len(body)+1, body)
}

// close ends the service; the socket goes with it.
func (s *statusServer) close() {
	if s.l != nil {
		s.l.Close()
		s.done.Wait()
	}
}
