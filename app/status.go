package app

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/boardlink/boardlink/app/internal/statussock"
	"github.com/boardlink/boardlink/ctl"
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
	verbsAtOnce   = 64              // the same, of verbs
)

// Verb answers a request that came on the control socket, until the client or the program ends. conn says whether the client is
// there. Any number may be answered at once.
type Verb func(c *ctl.Conn, req *ctl.Request, conn *net.UnixConn)

// StatusServer answers whoever asks for the status of a program: JSON over HTTP on a unix socket. Any HTTP client can
// ask: curl --unix-socket PATH http://boardlink/status. It is the control socket, too: a first line that begins with a brace is a
// ctl.Request.
//
// It is written without net/http, which would be a third of a lean program: it has one page, and closes the
// connection after it (RFC 9112 allows a server to answer as HTTP/1.0).
type StatusServer struct {
	l     net.Listener
	verbs map[string]Verb
	busy  chan struct{} // as many as verbs are being answered
	quit  chan struct{}
	done  sync.WaitGroup
}

// ErrStatusTaken is what an error of ServeStatus matches where a live program serves the path already.
var ErrStatusTaken = statussock.ErrTaken

// ServeStatus answers at path with what get returns, until Close. A socket that nobody listens on is
// replaced. An empty path serves nothing.
func ServeStatus(path string, get func() status.Program) (*StatusServer, error) {
	return ServeControl(path, get, nil)
}

// ServeControl is ServeStatus for a program that has verbs.
func ServeControl(path string, get func() status.Program, verbs map[string]Verb) (*StatusServer, error) {
	s := &StatusServer{verbs: verbs, busy: make(chan struct{}, verbsAtOnce), quit: make(chan struct{})}
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
			once := new(sync.Once)
			release := func() { once.Do(func() { <-free }) }
			defer release()
			s.answer(c, get, release)
		}(c)
	}
}

// answer reads the head of a request and writes the page. A verb that may last calls release.
func (s *StatusServer) answer(c net.Conn, get func() status.Program, release func()) {
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
	limit := &io.LimitedReader{R: c, N: statusRequest}
	r := bufio.NewReader(limit)
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
	if strings.HasPrefix(first, "{") {
		limit.N = math.MaxInt64
		release()
		s.verb(ctl.NewConn(r, c), first, c)
		return
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

// verb answers a request.
func (s *StatusServer) verb(c *ctl.Conn, line string, conn net.Conn) {
	fail := func(kind, format string, args ...interface{}) {
		_ = c.SendLine(ctl.Reply{Boardlink: ctl.Version, Kind: kind, Error: fmt.Sprintf(format, args...)}) // the client may be gone
	}
	var req ctl.Request
	if err := ctl.Decode(line, &req); err != nil {
		fail(ctl.KindRequest, "%v", err)
		return
	}
	if req.Boardlink < 1 || req.Boardlink > ctl.Version {
		fail(ctl.KindRequest, "the request is of version %d, this program knows version %d", req.Boardlink, ctl.Version)
		return
	}
	v := s.verbs[req.Verb]
	u, ok := conn.(*net.UnixConn)
	if v == nil || !ok {
		fail(ctl.KindVerb, "this program has no verb %q", req.Verb)
		return
	}
	select {
	case s.busy <- struct{}{}:
		defer func() { <-s.busy }()
	default:
		fail(ctl.KindBusy, "there are %d requests at once, more are not answered", verbsAtOnce)
		return
	}
	_ = conn.SetDeadline(time.Time{})
	v(c, &req, u)
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
