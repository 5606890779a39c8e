// Package export serves a disk by the network block device protocol: to several clients on a unix socket, each of which may have
// many requests in flight. A client that does not read, or does not keep to the protocol, harms nobody else.
//
// It must not know what carries the disk, nor who the clients are.
package export

import (
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/boardlink/boardlink/driver/block"
	"github.com/boardlink/boardlink/nbd"
)

const (
	// MaxClients is how many clients there are at once; further ones are turned away.
	MaxClients = 16
	// maxRequests is how many requests of a client are in flight at once.
	maxRequests = 256
	// maxBytes bounds the data of a client's requests in flight, in bytes. One request of the largest size always goes.
	maxBytes = nbd.MaxPayload
	// handshakeTime limits the handshake, but for the time that the disk is waited for.
	handshakeTime = 30 * time.Second
	// readyTime limits how long a client waits for a disk that has never been up.
	readyTime = 10 * time.Second
	// socketBuffer is what the kernel is to hold for a client, in bytes: enough for a reply of 1 MiB.
	socketBuffer = 2 << 20
)

// Disk is what is served: a *block.Disk.
type Disk interface {
	Info() (block.Info, bool)
	Ready() <-chan struct{}
	Submit(reqs ...*block.Request)
	Cancel(block.Owner)
}

// Config says what is served.
type Config struct {
	Name string // of the export; clients may ask for it or for the empty name
	Disk Disk
	// Failed, if not nil, hears why a client's connection was closed, where the client did not close it. It does not block.
	Failed func(error)
}

// counters are updated with sync/atomic.
type counters struct {
	Clients  uint64 // that are connected
	Accepted uint64
	Refused  uint64 // for there were too many
	Broken   uint64 // that did not keep to the protocol, or went away in the middle of a message
	Requests uint64
	Replies  uint64
	Errors   uint64 // replies with an error
	Stalls   uint64 // times that a client did not take its replies at once
}

// Server serves one disk.
type Server struct {
	n counters // first: 64-bit alignment

	cfg  Config
	quit chan struct{}
	done sync.WaitGroup

	mu     sync.Mutex
	closed bool
	ls     []net.Listener
	conns  map[*conn]bool
}

// New returns a server without clients.
func New(cfg Config) *Server {
	if cfg.Failed == nil {
		cfg.Failed = func(error) {}
	}
	return &Server{cfg: cfg, quit: make(chan struct{}), conns: map[*conn]bool{}}
}

// errClosed: the server has ended.
var errClosed = errors.New("the server has ended")

// Serve takes clients from l, whose connections are *net.UnixConn, until Close, which closes l.
func (s *Server) Serve(l net.Listener) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		l.Close()
		return errClosed
	}
	s.ls = append(s.ls, l)
	s.done.Add(1)
	go s.accept(l)
	return nil
}

func (s *Server) accept(l net.Listener) {
	defer s.done.Done()
	for {
		c, err := l.Accept()
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
		u, ok := c.(*net.UnixConn)
		if !ok {
			c.Close()
			continue
		}
		_, _ = s.add(u, true) // a client that is turned away sees the end of its connection
	}
}

// Attach serves a connection that is past the handshake: the kernel's client. u belongs to the server from then on. It returns a channel that is
// closed when the connection has ended.
func (s *Server) Attach(u *net.UnixConn) (ended <-chan struct{}, err error) {
	c, err := s.add(u, false)
	if err != nil {
		return nil, err
	}
	return c.ended, nil
}

// add starts a client's connection, and takes u over.
func (s *Server) add(u *net.UnixConn, handshake bool) (*conn, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		u.Close()
		return nil, errClosed
	}
	if handshake && len(s.conns) >= MaxClients {
		u.Close()
		atomic.AddUint64(&s.n.Refused, 1)
		return nil, fmt.Errorf("%d clients are connected already", MaxClients)
	}
	sock, err := newSocket(u)
	if err != nil {
		return nil, err
	}
	c := newConn(s, sock)
	s.conns[c] = true
	atomic.AddUint64(&s.n.Clients, 1)
	atomic.AddUint64(&s.n.Accepted, 1)
	s.done.Add(2)
	go func() {
		defer s.done.Done()
		c.run(handshake)
		s.mu.Lock()
		delete(s.conns, c)
		s.mu.Unlock()
		atomic.AddUint64(&s.n.Clients, ^uint64(0))
		close(c.ended)
	}()
	go func() {
		defer s.done.Done()
		c.write()
	}()
	return c, nil
}

// Counters returns what was counted, by names.
func (s *Server) Counters() map[string]uint64 {
	return map[string]uint64{
		"export_clients": atomic.LoadUint64(&s.n.Clients), "export_accepted": atomic.LoadUint64(&s.n.Accepted), "export_refused": atomic.LoadUint64(&s.n.Refused),
		"export_broken": atomic.LoadUint64(&s.n.Broken), "export_requests": atomic.LoadUint64(&s.n.Requests), "export_replies": atomic.LoadUint64(&s.n.Replies),
		"export_errors": atomic.LoadUint64(&s.n.Errors), "export_stalls": atomic.LoadUint64(&s.n.Stalls)}
}

// Close closes the listeners and all connections. Requests of theirs that the disk has are completed, and nobody hears of it.
func (s *Server) Close() error {
	s.mu.Lock()
	var err error
	if !s.closed {
		s.closed = true
		close(s.quit)
		for _, l := range s.ls {
			if cerr := l.Close(); err == nil {
				err = cerr
			}
		}
		for c := range s.conns {
			c.end()
		}
	}
	s.mu.Unlock()
	s.done.Wait()
	return err
}
