package app

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

	"github.com/boardlink/boardlink/app/internal/statussock"
	"github.com/boardlink/boardlink/status"
)

// StatusDir returns where programs of this user put their status sockets.
func StatusDir() string { return statussock.Dir() }

// FindStatus returns the status sockets of this machine that this user may see, and what else is to be told of them.
func FindStatus() (paths, notes []string) { return statussock.Find() }

// StatusPath returns the status socket of a program of the given side and name.
func StatusPath(side, name string) string {
	safe := strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' || r == '_' || r == '.' {
			return r
		}
		return '_'
	}, name)
	return filepath.Join(StatusDir(), side+"-"+safe+".sock")
}

const (
	statusTime    = 5 * time.Second // limits one conversation
	statusRequest = 16 << 10        // limits the head of a request, in bytes
	statusAtOnce  = 16              // limits how many conversations there are at once
)

// StatusServer answers whoever asks for the status of a program: JSON over HTTP on a unix socket. Any HTTP client can
// ask: curl --unix-socket PATH http://boardlink/status
//
// It is written without net/http, which would be a third of a lean program: it has one page, and closes the
// connection after it (RFC 9112 allows a server to answer as HTTP/1.0).
type StatusServer struct {
	l    net.Listener
	quit chan struct{}
	done sync.WaitGroup
}

// ErrStatusTaken is what an error of ServeStatus matches where a live program serves the path already.
var ErrStatusTaken = statussock.ErrTaken

// ServeStatus answers at path with what get returns, until Close. A socket that nobody listens on is
// replaced. An empty path serves nothing.
func ServeStatus(path string, get func() status.Program) (*StatusServer, error) {
	s := &StatusServer{quit: make(chan struct{})}
	if path == "" {
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
		s.serve(get)
	}()
	return s, nil
}

func (s *StatusServer) serve(get func() status.Program) {
	free := make(chan struct{}, statusAtOnce)
	for {
		c, err := s.l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // out of descriptors, which passes
			select {
			case <-s.quit:
				return
			case <-time.After(100 * time.Millisecond):
			}
			continue
		}
		select {
		case free <- struct{}{}:
		case <-s.quit:
			c.Close()
			return
		}
		s.done.Add(1)
		go func(c net.Conn) {
			defer s.done.Done()
			s.answer(c, get)
			<-free
		}(c)
	}
}

// answer reads the head of a request and writes the page.
func (s *StatusServer) answer(c net.Conn, get func() status.Program) {
	defer c.Close()
	over := make(chan struct{})
	defer close(over)
	go func() { // Close does not wait for a slow client
		select {
		case <-s.quit:
			c.Close()
		case <-over:
		}
	}()
	_ = c.SetDeadline(time.Now().Add(statusTime))
	r := bufio.NewReader(io.LimitReader(c, statusRequest))
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

// Close ends the service and removes the socket.
func (s *StatusServer) Close() error {
	if s.l == nil {
		return nil
	}
	close(s.quit)
	err := s.l.Close()
	s.done.Wait()
	return err
}
