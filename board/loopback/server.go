package loopback

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/board"
)

const (
	// maxPath is the longest path of a unix socket: sun_path of unix(7) less its zero byte.
	maxPath = 107
	// refusePause is how far apart the lines are at least that tell of clients which cannot be taken: clients
	// can make them come as often as they like.
	refusePause = time.Minute
	// maxQueue bounds the messages that wait for a client whose socket is full.
	maxQueue = 1 << 14
)

// ServerConfig is what a Server is made of.
type ServerConfig struct {
	// Path is the unix socket's. Empty makes a server without one: clients come by Connect only.
	Path string
	// Mode is the socket's permissions; 0 means 0600.
	Mode os.FileMode
	// Size is the shared memory's, in bytes: a power of two, as a QEMU device makes a BAR of it,
	// and at least MinSize.
	Size int64
	// Vectors is the number of doorbells of each client, 1 to MaxVectors.
	Vectors int
	// MaxClients bounds the clients that are connected at once, others are turned away; 0 means 64.
	MaxClients int
	// Stuck is how long a client may leave its full socket unread before it is disconnected; 0
	// means 5 s.
	Stuck time.Duration
	// Logf, if set, hears of clients that come and go, and why. It must not call the server.
	Logf func(format string, args ...interface{})
	// Warnf, if set, hears when clients cannot be taken, and when they can be again: a line for each,
	// however many clients try, and once a minute at most; Logf hears of the others. Without it Logf hears
	// of all.
	Warnf func(format string, args ...interface{})
}

// Server is an ivshmem server: it gives each client the shared memory, the doorbells of all others and
// its own, and tells everyone who comes and goes. The memory and its content live until Close: a client
// that was killed finds the same memory when it connects again.
//
// A client that does not read cannot hold up others: what it leaves unread waits in its socket, then in a queue, and
// when nothing moves for ServerConfig.Stuck it is disconnected. Clients send nothing; one that does is
// disconnected.
type Server struct {
	cfg  ServerConfig
	shm  int
	ln   *net.UnixListener // nil without a path
	stat unix.Stat_t       // of the socket we made
	wg   sync.WaitGroup
	done chan struct{}

	mu      sync.Mutex
	clients map[int]*client
	closed  bool
	refused string    // why clients are not taken now; empty: they are
	turned  int       // clients turned away since
	warned  bool      // Warnf was told of it
	warning time.Time // when it was last
	// nextID is where the search for a client's number begins. A number is not used again before all others were,
	// as in QEMU's own server: QEMU's device (7.2) frees its record of a client that goes and corrupts its heap
	// when the number comes back.
	nextID int
}

// client is one connection. Its fields are guarded by Server.mu.
type client struct {
	id   int
	who  string
	conn *net.UnixConn
	raw  interface {
		Write(func(uintptr) bool) error
	}
	vectors  []int // eventfds that ring it
	queue    []message
	flushing bool // a goroutine waits for room in the socket
	gone     bool
}

// NewServer makes the memory and the socket: clients may connect from then on, and are answered by
// Serve. A path that a live server uses is an error that matches board.ErrInput; a socket that
// a dead one left is replaced. The caller must Close the server.
func NewServer(cfg ServerConfig) (*Server, error) {
	bad := func(format string, args ...interface{}) error {
		return &board.Error{Spec: Name + ":" + cfg.Path, Reason: fmt.Sprintf(format, args...), Class: board.ErrInput}
	}
	if cfg.Size < MinSize || cfg.Size&(cfg.Size-1) != 0 || cfg.Size%int64(os.Getpagesize()) != 0 || int64(int(cfg.Size)) != cfg.Size {
		return nil, bad("a memory of %d bytes: a power of two of at least %d wanted", cfg.Size, MinSize)
	}
	if cfg.Vectors < 1 || cfg.Vectors > MaxVectors {
		return nil, bad("%d vectors: 1 to %d wanted", cfg.Vectors, MaxVectors)
	}
	if cfg.MaxClients == 0 {
		cfg.MaxClients = 64
	}
	if cfg.MaxClients < 0 || cfg.MaxClients > maxID+1 {
		return nil, bad("%d clients: 1 to %d wanted", cfg.MaxClients, maxID+1)
	}
	if cfg.Stuck <= 0 {
		cfg.Stuck = 5 * time.Second
	}
	if cfg.Mode == 0 {
		cfg.Mode = 0o600
	}
	if cfg.Logf == nil {
		cfg.Logf = func(string, ...interface{}) {}
	}
	if cfg.Warnf == nil {
		cfg.Warnf = cfg.Logf
	}
	s := &Server{cfg: cfg, clients: map[int]*client{}, done: make(chan struct{})}
	if cfg.Path != "" {
		if err := s.listen(bad); err != nil {
			return nil, err
		}
	}
	if err := s.makeMemory(); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

// makeMemory makes the memfd. It is sealed: a client that shrank it would crash all others.
func (s *Server) makeMemory() error {
	fd, err := unix.MemfdCreate(fmt.Sprintf("%s%d", memfdName, s.cfg.Vectors), unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return fmt.Errorf("loopback: memfd: %w", err)
	}
	if err = unix.Ftruncate(fd, s.cfg.Size); err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL)
	}
	if err != nil {
		unix.Close(fd)
		return fmt.Errorf("loopback: memfd of %d bytes: %w", s.cfg.Size, err)
	}
	s.mu.Lock()
	s.shm = fd
	s.mu.Unlock()
	return nil
}

// listen makes the socket under a name of its own, and moves it to the path when it is complete: nobody
// sees it with other permissions or before it listens, and a stale one is replaced at once.
func (s *Server) listen(bad func(string, ...interface{}) error) error {
	dir, base := filepath.Split(s.cfg.Path)
	if dir == "" {
		dir = "./"
	}
	var r [4]byte
	if _, err := unix.Getrandom(r[:], 0); err != nil {
		return fmt.Errorf("loopback: random: %w", err)
	}
	tmp := fmt.Sprintf("%s.bl%x", dir, r)
	if base == "" || len(s.cfg.Path) > maxPath || len(tmp) > maxPath {
		return bad("the path has %d bytes; 1 to %d wanted, with a name of up to 11 in its folder", len(s.cfg.Path), maxPath)
	}
	// Two servers that start at once must not each take the other's socket for a stale one.
	d, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return bad("cannot open the folder %s: %v", dir, err)
	}
	defer unix.Close(d)
	for end := time.Now().Add(2 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		err := unix.Flock(d, unix.LOCK_EX|unix.LOCK_NB)
		if err == nil || err != unix.EWOULDBLOCK && err != unix.EINTR {
			break // a file system without flock has to do without
		}
		if time.Now().After(end) {
			return bad("the folder %s is locked by another program (flock)", dir)
		}
	}
	var st unix.Stat_t
	switch err := unix.Lstat(s.cfg.Path, &st); {
	case err == unix.ENOENT:
	case err != nil:
		return bad("cannot look at the path: %v", err)
	case st.Mode&unix.S_IFMT != unix.S_IFSOCK:
		return bad("the path exists and is not a socket")
	default:
		c, err := net.DialTimeout("unix", s.cfg.Path, time.Second)
		if err == nil {
			c.Close()
			return bad("another server is alive on this path; stop it, or use another path")
		}
		if !errors.Is(err, unix.ECONNREFUSED) && !errors.Is(err, unix.ENOENT) {
			return bad("the path is in use: %v", err)
		}
		s.cfg.Logf("%s: replacing the socket that a dead server left", s.cfg.Path)
	}

	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("loopback: socket: %w", err)
	}
	f := os.NewFile(uintptr(fd), s.cfg.Path)
	defer f.Close() // FileListener makes a duplicate
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: tmp}); err != nil {
		return bad("cannot make a socket in %s: %v", dir, err)
	}
	err = unix.Chmod(tmp, uint32(s.cfg.Mode.Perm()))
	if err == nil {
		err = unix.Listen(fd, 128)
	}
	if err == nil {
		err = unix.Lstat(tmp, &s.stat)
	}
	if err == nil {
		err = unix.Rename(tmp, s.cfg.Path)
	}
	if err != nil {
		unix.Unlink(tmp)
		return bad("cannot make the socket: %v", err)
	}
	l, err := net.FileListener(f)
	if err != nil {
		unix.Unlink(s.cfg.Path)
		return fmt.Errorf("loopback: %w", err)
	}
	s.ln = l.(*net.UnixListener)
	s.ln.SetUnlinkOnClose(false) // see Close
	return nil
}

// Path returns the socket's path.
func (s *Server) Path() string { return s.cfg.Path }

// Serve answers clients until Close, and returns nil then. A server without a path only waits.
func (s *Server) Serve() error {
	if s.ln == nil {
		<-s.done
		return nil
	}
	for {
		c, err := s.ln.AcceptUnix()
		switch {
		case err == nil:
			s.admit(c)
		case errors.Is(err, net.ErrClosed):
			return nil
		case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE), errors.Is(err, unix.ENOBUFS),
			errors.Is(err, unix.ENOMEM), errors.Is(err, unix.EAGAIN), errors.Is(err, unix.ECONNABORTED):
			// Passes when somebody leaves; the connection waits meanwhile.
			s.mu.Lock()
			s.refuse(err.Error())
			s.mu.Unlock()
			select {
			case <-s.done:
				return nil
			case <-time.After(50 * time.Millisecond):
			}
		default:
			return fmt.Errorf("loopback: accept on %s: %w", s.cfg.Path, err)
		}
	}
}

// Connect makes a client's connection without a path: the file is to be passed to a child process,
// which opens "loopback:fd=N", and closed here.
func (s *Server) Connect() (*os.File, error) {
	p, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("loopback: socketpair: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(p[0]), "server"), os.NewFile(uintptr(p[1]), "client")
	c, err := net.FileConn(ours)
	ours.Close()
	if err == nil && !s.admit(c.(*net.UnixConn)) {
		err = errors.New("turned away")
	}
	if err != nil {
		theirs.Close()
		return nil, fmt.Errorf("loopback: connect: %w", err)
	}
	return theirs, nil
}

// admit takes a client in: it owns conn.
func (s *Server) admit(conn *net.UnixConn) bool {
	c := &client{conn: conn, who: peerCred(conn)}
	raw, err := conn.SyscallConn()
	if err != nil {
		conn.Close()
		return false
	}
	c.raw = raw
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		conn.Close()
		return false
	}
	if len(s.clients) >= s.cfg.MaxClients {
		s.turned++
		s.refuse(fmt.Sprintf("%d clients are connected, the last one to be turned away is %s", len(s.clients), c.who))
		conn.Close()
		return false
	}
	for c.id = s.nextID; s.clients[c.id] != nil; {
		c.id = (c.id + 1) & maxID
	}
	s.nextID = (c.id + 1) & maxID
	for i := 0; i < s.cfg.Vectors; i++ {
		fd, err := unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
		if err != nil {
			s.turned++
			s.refuse(fmt.Sprintf("a doorbell for %s: %v", c.who, err))
			c.closeVectors()
			conn.Close()
			return false
		}
		c.vectors = append(c.vectors, fd)
	}
	if s.refused != "" {
		tell := s.cfg.Logf
		if s.warned {
			tell = s.cfg.Warnf
		}
		tell("%s: clients are taken again; %d were turned away", s.cfg.Path, s.turned)
		s.refused, s.turned, s.warned = "", 0, false
	}
	s.cfg.Logf("%s: client %d came: %s", s.cfg.Path, c.id, c.who)

	// The order is ivshmem-spec.rst's: others hear first, so that whoever answers to the
	// newcomer can ring it.
	c.queue = append(c.queue,
		message{val: protocolVersion, fd: -1},
		message{val: int64(c.id), fd: -1},
		message{val: shmID, fd: s.shm})
	for _, o := range s.clients {
		for _, fd := range c.vectors {
			o.queue = append(o.queue, message{val: int64(c.id), fd: fd})
		}
		for _, fd := range o.vectors {
			c.queue = append(c.queue, message{val: int64(o.id), fd: fd})
		}
	}
	for _, fd := range c.vectors {
		c.queue = append(c.queue, message{val: int64(c.id), fd: fd})
	}
	s.clients[c.id] = c
	s.flushAll()
	if c.gone {
		return false
	}
	s.wg.Add(1)
	go s.watch(c)
	return true
}

// refuse tells that clients are not taken now, once until they are again; s.mu is held.
func (s *Server) refuse(why string) {
	const text = "%s: no more clients are taken now: %s"
	switch {
	case s.warned:
	case s.warning.IsZero() || time.Since(s.warning) >= refusePause:
		s.warned, s.warning = true, time.Now()
		s.cfg.Warnf(text, s.cfg.Path, why)
	case s.refused == "":
		s.cfg.Logf(text, s.cfg.Path, why)
	}
	s.refused = why
}

// watch waits for the end of a client's connection.
func (s *Server) watch(c *client) {
	defer s.wg.Done()
	var b [1]byte
	n, err := c.conn.Read(b[:])
	why := "closed the connection"
	if n > 0 {
		why = "sent data, which an ivshmem client never does"
	} else if err != nil && err != io.EOF {
		why = err.Error()
	}
	s.mu.Lock()
	s.remove(c, why)
	s.flushAll()
	s.mu.Unlock()
}

// remove takes a client out and tells the others; s.mu is held. What the others were to be told of its coming is
// forgotten, as its doorbells are closed now.
func (s *Server) remove(c *client, why string) {
	if c.gone {
		return
	}
	c.gone = true
	c.conn.Close()
	delete(s.clients, c.id)
	c.queue = nil
	if !s.closed {
		s.cfg.Logf("%s: client %d went: %s (%s)", s.cfg.Path, c.id, why, c.who)
	}
	for _, o := range s.clients {
		keep := o.queue[:0]
		for _, m := range o.queue {
			if m.fd < 0 || m.val != int64(c.id) {
				keep = append(keep, m)
			}
		}
		if unheard := len(o.queue) - len(keep); unheard < len(c.vectors) {
			keep = append(keep, message{val: int64(c.id), fd: -1})
		}
		o.queue = keep
	}
	c.closeVectors()
}

// Clients returns how many clients are connected.
func (s *Server) Clients() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.clients)
}

// Close disconnects all clients, ends Serve, removes the socket (if it is still ours) and gives the
// memory back; clients that have it mapped keep it. A second Close does nothing.
func (s *Server) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	close(s.done)
	if s.ln != nil {
		var st unix.Stat_t
		if unix.Lstat(s.cfg.Path, &st) == nil && st.Dev == s.stat.Dev && st.Ino == s.stat.Ino {
			unix.Unlink(s.cfg.Path)
		}
		s.ln.Close()
	}
	for _, c := range s.clients {
		c.gone = true
		c.conn.Close()
		c.closeVectors()
	}
	s.clients = map[int]*client{}
	s.mu.Unlock()
	s.wg.Wait()
	if s.shm > 0 {
		unix.Close(s.shm)
	}
	return nil
}

// credentials returns who is at the other end, as it was when the connection was made.
func credentials(c *net.UnixConn) (u *unix.Ucred, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	cerr := raw.Control(func(fd uintptr) {
		u, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if cerr != nil {
		return nil, cerr
	}
	return u, err
}

// peerCred names the process at the other end.
func peerCred(c *net.UnixConn) string {
	u, err := credentials(c)
	if err != nil {
		return "unknown process"
	}
	return fmt.Sprintf("pid %d, uid %d", u.Pid, u.Uid)
}
