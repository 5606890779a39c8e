package loopback

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/board/internal/share"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/pci"
)

var (
	_ board.Served    = (*Board)(nil)
	_ board.Pooled    = (*Board)(nil)
	_ board.Vanishing = (*Board)(nil)
)

// anyServer stands for every user in Board.server.
const anyServer = -2

// Open opens an end of the board at the server's socket, or over the inherited connection "fd=N". It
// returns within 5 seconds. Errors match board.ErrAbsent where nobody serves the path (yet), or the
// server takes no more clients now, board.ErrSideTaken where a live process holds o.Side (both, where
// whoever holds it does not tell its process, as our ends do), board.ErrInput where the path or what
// is behind it is wrong.
//
// The server hands out the memory, so it is trusted with this program's link. It must run as
// this program's user or as root; "PATH,server=UID" names one more user, "PATH,server=any" takes
// whoever listens. Whoever passed "fd=N" on is trusted.
func Open(arg string, o board.Options) (*Board, error) {
	b := &Board{
		spec:   Name + ":" + arg,
		side:   o.Side,
		logf:   o.Logf,
		events: make(chan struct{}, 1),
		done:   make(chan struct{}),
		peers:  map[int64][]*doorbell.Eventfd{},
		lock:   sideLock{fd: -1},
		server: -1,
	}
	if b.logf == nil {
		b.logf = func(string, ...interface{}) {}
	}
	if i := strings.LastIndex(arg, ",server="); i >= 0 {
		who := arg[i+len(",server="):]
		if who == "any" {
			b.server = anyServer
		} else if n, err := strconv.ParseUint(who, 10, 31); err == nil {
			b.server = int(n)
		} else {
			return nil, b.fail(board.ErrInput, fmt.Sprintf("server=%s: want the number of a user, or any", who), nil)
		}
		arg = arg[:i]
	}
	if err := b.connect(arg); err != nil {
		return nil, err
	}
	if err := b.handshake(o); err != nil {
		close(b.done) // no reader yet
		b.Close()
		var e *board.Error
		if errors.As(err, &e) {
			return nil, err
		}
		return nil, b.fail(board.ErrInput, "what listens there is not an ivshmem server (boardlink serve)", err)
	}
	_ = b.conn.SetReadDeadline(time.Time{})
	go b.read()
	return b, nil
}

func (b *Board) fail(class error, reason string, err error) error {
	return &board.Error{Spec: b.spec, Reason: reason, Class: class, Err: err}
}

func (b *Board) connect(arg string) error {
	if strings.HasPrefix(arg, "fd=") {
		n, err := strconv.ParseUint(arg[len("fd="):], 10, 31)
		if err != nil {
			return b.fail(board.ErrInput, "fd= wants the number of an open file descriptor", nil)
		}
		// A duplicate: whatever fd is, it is not ours to close before it is known to be
		// what we were meant to take.
		dup, err := unix.FcntlInt(uintptr(n), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return b.fail(board.ErrInput, arg+" is not an open file descriptor", err)
		}
		f := os.NewFile(uintptr(dup), arg)
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			return b.fail(board.ErrInput, arg+" is not a socket", err)
		}
		uc, ok := c.(*net.UnixConn)
		if typ, err := unix.GetsockoptInt(int(n), unix.SOL_SOCKET, unix.SO_TYPE); !ok || err != nil || typ != unix.SOCK_STREAM {
			c.Close()
			return b.fail(board.ErrInput, arg+" is not a unix stream socket", nil)
		}
		unix.Close(int(n))
		b.conn = uc
		return nil
	}
	if arg == "" {
		return b.fail(board.ErrInput, "the path of the rendezvous socket is missing (loopback:PATH)", nil)
	}
	if len(arg) > maxPath {
		return b.fail(board.ErrInput, fmt.Sprintf("the path has %d bytes, a unix socket's at most %d", len(arg), maxPath), nil)
	}
	c, err := net.DialTimeout("unix", arg, handshakeTime)
	switch {
	case err == nil:
		b.conn = c.(*net.UnixConn)
		if err := b.checkServer(); err != nil {
			c.Close()
			return err
		}
		return nil
	case errors.Is(err, unix.ENOENT):
		return b.fail(board.ErrAbsent, "no rendezvous socket there; start one with: boardlink serve "+arg, nil)
	case errors.Is(err, unix.ECONNREFUSED):
		if fi, e := os.Stat(arg); e == nil && fi.Mode()&os.ModeSocket == 0 {
			return b.fail(board.ErrInput, "is not a socket", nil)
		}
		return b.fail(board.ErrAbsent, "nobody serves the rendezvous socket any more; start: boardlink serve "+arg, nil)
	case errors.Is(err, unix.EAGAIN), os.IsTimeout(err):
		return b.fail(board.ErrAbsent, "the server does not accept connections", nil)
	case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE), errors.Is(err, unix.ENOMEM), errors.Is(err, unix.ENOBUFS):
		return b.fail(nil, "cannot connect to the rendezvous socket now", err)
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return b.fail(nil, "not permitted to connect to the rendezvous socket: run as its user, or have it served with another --mode", err)
	}
	return b.fail(board.ErrInput, "cannot connect to the rendezvous socket", err)
}

// checkServer refuses a server of a stranger.
func (b *Board) checkServer() error {
	if b.server == anyServer {
		return nil
	}
	u, err := credentials(b.conn)
	if err != nil {
		return b.fail(nil, "cannot tell which user the server runs as", err)
	}
	if uid := int(u.Uid); uid != 0 && uid != os.Geteuid() && uid != b.server {
		return b.fail(board.ErrInput, fmt.Sprintf("the server (process %d) runs as user %d, neither as root nor as this program's user %d; if it is to be trusted, append ,server=%d",
			u.Pid, uid, os.Geteuid(), uid), nil)
	}
	return nil
}

// turnedAway is the error of a server that hangs up or says nothing. Our own does so where it has no
// descriptors or no room for one more client, and both pass.
func (b *Board) turnedAway(err error) error {
	return b.fail(board.ErrAbsent, "the server takes no more clients now (see its log), or is not an ivshmem server (boardlink serve)", err)
}

// handshake reads up to the last of this client's own vectors.
func (b *Board) handshake(o board.Options) error {
	end := time.Now().Add(handshakeTime)
	_ = b.conn.SetReadDeadline(end)
	b.dec = newDecoder(b.conn)
	bad := func(what string, m message) error {
		if m.fd >= 0 {
			unix.Close(m.fd)
			return fmt.Errorf("%s is %d with a file descriptor", what, m.val)
		}
		return fmt.Errorf("%s is %d without a file descriptor", what, m.val)
	}
	get := func(what string) (message, error) {
		m, err := b.dec.next()
		switch {
		case err == nil && m.lost:
			return m, b.fail(nil, "cannot take what the server sent", errTruncated)
		case err == nil:
			return m, nil
		case err == io.EOF, errors.Is(err, unix.ECONNRESET):
			return m, b.turnedAway(fmt.Errorf("it closed the connection where %s was due", what))
		case os.IsTimeout(err):
			return m, b.turnedAway(fmt.Errorf("it was silent for %v where %s was due", handshakeTime, what))
		}
		return m, fmt.Errorf("reading %s: %w", what, err)
	}

	m, err := get("the protocol version")
	if err != nil {
		return err
	}
	if m.val != protocolVersion || m.fd >= 0 {
		return bad(fmt.Sprintf("the protocol version (%d wanted)", protocolVersion), m)
	}
	if m, err = get("the client's number"); err != nil {
		return err
	}
	if m.val < 0 || m.val > maxID || m.fd >= 0 {
		return bad("the client's number (0 to 65535 wanted)", m)
	}
	b.id = m.val
	if m, err = get("the shared memory"); err != nil {
		return err
	}
	if m.val != shmID || m.fd < 0 {
		return bad("the shared memory (-1 with one wanted)", m)
	}
	want, err := b.takeMemory(m.fd, o)
	if err != nil {
		return err
	}

	// Other peers, then our own vectors. How many is not told: from our own server we know, else
	// a message of another kind or silence ends them.
	for len(b.own) == 0 || len(b.own) != want {
		if want == 0 && len(b.own) > 0 {
			grace := time.Now().Add(graceTime)
			if grace.After(end) {
				grace = end
			}
			_ = b.conn.SetReadDeadline(grace)
		}
		m, err := b.dec.next()
		if err != nil {
			if os.IsTimeout(err) && len(b.own) > 0 {
				break
			}
			if os.IsTimeout(err) {
				return b.turnedAway(fmt.Errorf("it gave no interrupt vectors within %v", handshakeTime))
			}
			if err == io.EOF || errors.Is(err, unix.ECONNRESET) {
				return b.turnedAway(fmt.Errorf("it closed the connection where the interrupt vectors were due"))
			}
			return fmt.Errorf("reading the interrupt vectors: %w", err)
		}
		if m.lost {
			return b.fail(nil, "cannot take what the server sent", errTruncated)
		}
		if m.val != b.id {
			if err := b.peer(m); err != nil {
				return err
			}
			if len(b.own) > 0 {
				break
			}
			continue
		}
		if m.fd < 0 {
			return bad("an own interrupt vector", m)
		}
		if len(b.own) == MaxVectors {
			unix.Close(m.fd)
			continue
		}
		e, err := doorbell.FromFD(m.fd)
		if err != nil {
			unix.Close(m.fd)
			return fmt.Errorf("own vector %d: %w", len(b.own), err)
		}
		b.own = append(b.own, e)
	}
	return nil
}

// takeMemory checks, locks and maps the shared memory; it owns fd. It returns how many vectors the server
// gives, 0 where it does not say.
func (b *Board) takeMemory(fd int, o board.Options) (vectors int, err error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return 0, err
	}
	page := int64(os.Getpagesize())
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		err = fmt.Errorf("the shared memory is not a file (mode %#o)", st.Mode)
	case checkFS(fd) != nil:
		err = checkFS(fd)
	case st.Size < MinSize:
		err = fmt.Errorf("the shared memory has %d bytes, at least %d wanted", st.Size, MinSize)
	case st.Size%page != 0:
		err = fmt.Errorf("the shared memory has %d bytes, a multiple of the page (%d) wanted", st.Size, page)
	case int64(int(st.Size)) != st.Size:
		err = fmt.Errorf("the shared memory has %d bytes, more than this machine can address", st.Size)
	}
	if err != nil {
		unix.Close(fd)
		return 0, b.fail(board.ErrInput, "what the server gives cannot be the board", err)
	}
	if l, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd)); err == nil {
		if i := strings.Index(l, memfdName); i >= 0 {
			_, _ = fmt.Sscanf(l[i+len(memfdName):], "%d", &vectors)
		}
		if vectors < 0 || vectors > MaxVectors {
			vectors = 0
		}
	}
	if seals, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0); err != nil || seals&unix.F_SEAL_SHRINK == 0 {
		warnf := o.Warnf
		if warnf == nil {
			warnf = b.logf
		}
		warnf("%s: the shared memory is not sealed (F_SEAL_SHRINK): a server or client that truncates it takes the link down", b.spec)
	}
	b.lock = openLock(fd)
	if !b.lock.ofd {
		b.logf("%s: /proc is missing: the lock of the side is the process'", b.spec)
	}
	if pid, err := b.lock.take(o.Side); err == unix.EAGAIN {
		if pid != 0 {
			return 0, b.fail(board.ErrSideTaken, fmt.Sprintf("the side %s is held by process %d; stop it first", o.Side, pid), nil)
		}
		// Our own ends tell their process. What does not may be any client, and must not end this program.
		return 0, b.fail(board.ErrAbsent, fmt.Sprintf("the side %s is locked by this process or by a client that does not tell its own (boardlink serve -v names its clients)", o.Side), board.ErrSideTaken)
	} else if err != nil {
		return 0, fmt.Errorf("lock of the side %s: %w", o.Side, err)
	}
	b.mem, err = unix.Mmap(b.lock.fd, 0, int(st.Size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return 0, fmt.Errorf("mapping %d bytes of shared memory: %w", st.Size, err)
	}
	b.unmap = pci.GuardShared(uintptr(unsafe.Pointer(&b.mem[0])), uint64(len(b.mem)), "board "+b.spec)
	b.share(o)
	return vectors, nil
}

// checkFS refuses memory on a file system that may have to ask somebody for a page, as FUSE and NFS do: a
// thread that waits for it there cannot be stopped, and Go's collector waits for the thread. ramfs is
// tmpfs of kernels without CONFIG_SHMEM.
func checkFS(fd int) error {
	var st unix.Statfs_t
	for {
		err := unix.Fstatfs(fd, &st)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return fmt.Errorf("file system of the shared memory: %w", err)
		}
		break
	}
	switch uint32(st.Type) {
	case unix.TMPFS_MAGIC, unix.HUGETLBFS_MAGIC, unix.RAMFS_MAGIC:
		return nil
	}
	return fmt.Errorf("the shared memory is a file on a file system of type %#x: only memfd, tmpfs and hugetlbfs are taken", uint32(st.Type))
}

// share divides the shared memory: the lower half stands for the board's, the upper half for the
// host's. What is the other side's lies across the bus, and is accounted.
func (b *Board) share(o board.Options) {
	base, size := unsafe.Pointer(&b.mem[0]), uint64(len(b.mem))
	across := mmio.Cached
	if o.Kind != nil {
		across = *o.Kind
	}
	part := func(name string, off, n uint64, addr dma.Addr, local bool) dma.Region {
		r := dma.Region{Name: name, Addr: addr, Access: dma.DeviceRead | dma.DeviceWrite, Across: !local}
		kind := mmio.Cached
		if !local {
			kind, r.Account = across, o.Account
		}
		r.Mem = mmio.NewMem(unsafe.Add(base, off), n, kind)
		return r
	}
	agent := o.Side == board.Agent
	size, pool := share.Split(size)
	if pool != 0 {
		b.pool = part("pool", size, pool, PoolAddr, !agent)
	}
	addr := dma.Addr(0)
	if agent {
		addr = BusAddr
	}
	b.region = part("board", 0, size, addr, agent)
}
