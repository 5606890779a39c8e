package loopback

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sort"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
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

// Name is the kind's name in a board spec.
const Name = "loopback"

const (
	// MinSize is the least memory that is taken for a board, in bytes.
	MinSize = share.MinSize
	// BusAddr is what the agent's end declares as bus address of the window's first byte. No bus is
	// there; a number above 32 bits that is not 0 makes a missing translation show.
	BusAddr = share.BusAddr
	// PoolAddr is the bus address of the pool.
	PoolAddr = share.PoolAddr
	// PoolMinSize is the least shared memory, in bytes, of which the upper half is the pool: memory
	// that stands for the host's. Of less, all is the window.
	PoolMinSize = share.PoolMinSize
)

const (
	// handshakeTime is how long a server may take to send everything a client needs.
	handshakeTime = 4 * time.Second
	// graceTime is the silence that ends a client's own vectors where the server is not ours: the
	// protocol does not tell how many will come.
	graceTime = 100 * time.Millisecond
)

// memfdName carries the number of vectors to our own clients, who find it in /proc/self/fd.
const memfdName = "boardlink-ivshmem-vectors-"

// ErrNoPeer is returned by Ring where no peer with this number is connected, or not with that many
// vectors. Like the doorbell register of an ivshmem device, nothing else happens then.
var ErrNoPeer = errors.New("loopback: no such peer is connected")

func init() {
	board.Register(board.Kind{
		Name: Name,
		Help: "PATH[,server=UID|any] of the rendezvous socket (boardlink serve), or fd=N",
		Open: func(arg string, o board.Options) (board.Board, error) {
			b, err := Open(arg, o)
			if err != nil {
				return nil, err
			}
			return b, nil
		},
	})
}

// Board is an end of a loopback link.
type Board struct {
	spec   string
	side   board.Side
	logf   func(format string, args ...interface{})
	conn   *net.UnixConn
	dec    *decoder
	id     int64
	lock   sideLock
	mem    []byte
	server int    // user that the server may run as beside root and our own, -1: none, anyServer
	unmap  func() // takes mem out of the guarded ranges
	region dma.Region
	pool   dma.Region // Mem is zero where there is none
	own    []*doorbell.Eventfd
	events chan struct{}
	once   sync.Once
	done   chan struct{} // closed when the reader has ended

	serverLost uint32 // atomic
	sawPeer    uint32 // atomic: the other side's lock was seen held

	mu    sync.Mutex
	peers map[int64][]*doorbell.Eventfd // nil entries: vectors that could not be taken
}

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
			return nil, b.fail(board.ErrInput, fmt.Sprintf("server=%s: the number of a user, or any", who), nil)
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
		return nil, b.fail(board.ErrInput, "what listens there is no ivshmem server (boardlink serve)", err)
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
			return b.fail(board.ErrInput, arg+" is no open file descriptor", err)
		}
		f := os.NewFile(uintptr(dup), arg)
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			return b.fail(board.ErrInput, arg+" is no socket", err)
		}
		uc, ok := c.(*net.UnixConn)
		if typ, err := unix.GetsockoptInt(int(n), unix.SOL_SOCKET, unix.SO_TYPE); !ok || err != nil || typ != unix.SOCK_STREAM {
			c.Close()
			return b.fail(board.ErrInput, arg+" is no unix stream socket", nil)
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
			return b.fail(board.ErrInput, "is no socket", nil)
		}
		return b.fail(board.ErrAbsent, "nobody serves the rendezvous socket any more; start: boardlink serve "+arg, nil)
	case errors.Is(err, unix.EAGAIN), os.IsTimeout(err):
		return b.fail(board.ErrAbsent, "the server does not accept connections", nil)
	case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE), errors.Is(err, unix.ENOMEM), errors.Is(err, unix.ENOBUFS):
		return b.fail(nil, "cannot connect to the rendezvous socket now", err)
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return b.fail(nil, "may not connect to the rendezvous socket: run as its user, or have it served with another --mode", err)
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
	return b.fail(board.ErrAbsent, "the server takes no more clients now (its log tells), or is no ivshmem server (boardlink serve)", err)
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
		err = fmt.Errorf("the shared memory is no file (mode %#o)", st.Mode)
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

// peer handles a connect or disconnect notification; it owns m.fd.
func (b *Board) peer(m message) error {
	if m.val < 0 || m.val > maxID {
		if m.fd >= 0 {
			unix.Close(m.fd)
		}
		return fmt.Errorf("a peer's number is %d (0 to 65535 wanted)", m.val)
	}
	if m.fd < 0 && !m.lost {
		b.mu.Lock()
		l, ok := b.peers[m.val]
		// Closed before it is seen to have gone: who has looked rings nobody any more.
		for _, e := range l {
			if e != nil {
				e.Close()
			}
		}
		delete(b.peers, m.val)
		b.mu.Unlock()
		if ok {
			b.logf("%s: peer %d went", b.spec, m.val)
			b.event()
		}
		return nil
	}
	var e *doorbell.Eventfd
	if m.fd >= 0 {
		var err error
		if e, err = doorbell.FromFD(m.fd); err != nil {
			unix.Close(m.fd)
			return fmt.Errorf("a vector of peer %d: %w", m.val, err)
		}
	}
	b.mu.Lock()
	n := len(b.peers[m.val])
	if n < MaxVectors {
		b.peers[m.val] = append(b.peers[m.val], e)
	}
	b.mu.Unlock()
	if n >= MaxVectors && e != nil {
		e.Close()
	}
	if e == nil {
		b.logf("%s: vector %d of peer %d is lost: %v", b.spec, n, m.val, errTruncated)
	}
	if n == 0 {
		b.logf("%s: peer %d came", b.spec, m.val)
	}
	b.notePeer()
	b.event()
	return nil
}

// event leaves a token for whoever watches.
func (b *Board) event() {
	select {
	case b.events <- struct{}{}:
	default:
	}
}

// read follows the peers until the connection ends.
func (b *Board) read() {
	defer close(b.done)
	for {
		m, err := b.dec.next()
		if err == nil && m.val == b.id {
			if m.fd >= 0 {
				unix.Close(m.fd) // late or surplus: stays unconnected
				continue
			}
			err = errors.New("the server says that this client is gone")
		}
		if err == nil {
			err = b.peer(m)
		}
		if err != nil {
			b.notePeer()
			atomic.StoreUint32(&b.serverLost, 1)
			b.dec.drop()
			if !errors.Is(err, net.ErrClosed) {
				b.logf("%s: the server is lost (%v); memory and doorbells stay, new peers will not be met", b.spec, err)
			}
			b.event()
			return
		}
	}
}

// String returns the board's spec.
func (b *Board) String() string { return b.spec }

// Window implements board.Board: the lower half of the shared memory, or all of one that is small.
func (b *Board) Window() dma.Region { return b.region }

// Pool implements board.Pooled: the upper half of the shared memory.
func (b *Board) Pool() (dma.Region, bool) { return b.pool, b.pool.Mem.Size() != 0 }

// Self returns this end's peer number and vectors.
func (b *Board) Self() board.RingInfo {
	return board.RingInfo{Method: board.RingIvshmem, Peer: uint32(b.id), Vectors: uint32(len(b.own))}
}

// Waiter returns the end of this side's vector v.
func (b *Board) Waiter(v uint32) doorbell.Waiter {
	if uint64(v) >= uint64(len(b.own)) {
		return doorbell.None
	}
	return b.own[v]
}

// Peers returns the numbers of the other clients that are connected to the server, in order.
func (b *Board) Peers() []uint32 {
	b.mu.Lock()
	defer b.mu.Unlock()
	l := make([]uint32, 0, len(b.peers))
	for id := range b.peers {
		l = append(l, uint32(id))
	}
	sort.Slice(l, func(i, j int) bool { return l[i] < l[j] })
	return l
}

// ringer rings by number, as the doorbell register of an ivshmem device does.
type ringer struct {
	b    *Board
	peer int64
	v    uint32
	kind mmio.Kind
	e    *doorbell.Eventfd // found last
}

// Ring rings the peer; ErrNoPeer where there is none with this number and vector now. doorbell.ErrBlocked tells that the peer
// made it block, which a watchdog ended.
func (r *ringer) Ring() error { return r.ring((*doorbell.Eventfd).Ring) }

// RingNoWait implements doorbell.NoWaitRinger.
func (r *ringer) RingNoWait() error { return r.ring((*doorbell.Eventfd).RingNoWait) }

func (r *ringer) ring(ring func(*doorbell.Eventfd) error) error {
	if r.kind != mmio.Cached {
		// Gathered stores must be out first. For cached memory the eventfd's own lock
		// orders them.
		mmio.Fence(r.kind, mmio.WriteBarrier)
	}
	if r.e != nil {
		if err := ring(r.e); err != doorbell.ErrClosed {
			return err
		}
		r.e = nil // went, and perhaps came again
	}
	r.b.mu.Lock()
	if l := r.b.peers[r.peer]; uint64(r.v) < uint64(len(l)) {
		r.e = l[r.v]
	}
	r.b.mu.Unlock()
	if r.e == nil {
		return ErrNoPeer
	}
	if err := ring(r.e); err != doorbell.ErrClosed {
		return err
	}
	r.e = nil
	return ErrNoPeer
}

// Ringer returns what rings vector v of the peer that declared itself as info.
func (b *Board) Ringer(info board.RingInfo, v uint32) (doorbell.Ringer, error) {
	switch {
	case info.Method == board.RingNone:
		return board.Silent, nil
	case info.Method != board.RingIvshmem:
		return nil, fmt.Errorf("%s: the peer is rung by method %d; a loopback board knows %d (ivshmem) only", b.spec, info.Method, board.RingIvshmem)
	case info.Peer > maxID:
		return nil, fmt.Errorf("%s: peer number %d is not in 0 to %d", b.spec, info.Peer, maxID)
	case int64(info.Peer) == b.id:
		return nil, fmt.Errorf("%s: the peer declares our own number %d", b.spec, info.Peer)
	case v >= info.Vectors:
		return nil, fmt.Errorf("%s: vector %d of peer %d, which has %d", b.spec, v, info.Peer, info.Vectors)
	}
	return &ringer{b: b, peer: int64(info.Peer), v: v, kind: b.region.Mem.Kind()}, nil
}

// RingSelf implements board.SelfRinging.
func (b *Board) RingSelf(v uint32) (doorbell.Ringer, error) {
	if uint64(v) >= uint64(len(b.own)) {
		return nil, fmt.Errorf("%s: vector %d of this side, which has %d", b.spec, v, len(b.own))
	}
	return b.own[v], nil
}

// PeerDead tells whether nobody of the other side has the memory mapped. The lock of its side
// answers for our own programs. A QEMU device takes no lock, but is a connected peer: so as long
// as any other peer is connected, and where the server that would tell is lost, only a lock that was held
// before and is free now shows a death.
func (b *Board) PeerDead() bool {
	if b.notePeer() {
		return false
	}
	if b.ServerLost() {
		return atomic.LoadUint32(&b.sawPeer) != 0
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.peers) == 0
}

// notePeer tells whether the other side's lock is held, or cannot be asked for, and remembers
// that it once was.
func (b *Board) notePeer() bool {
	taken, err := b.lock.taken(b.side.Other())
	if err == nil && taken {
		atomic.StoreUint32(&b.sawPeer, 1)
	}
	return err != nil || taken
}

// ServerLost tells that the connection to the server is gone.
func (b *Board) ServerLost() bool { return atomic.LoadUint32(&b.serverLost) != 0 }

// Gone implements board.Vanishing: the file of the shared memory was truncated, which makes accesses
// fault.
func (b *Board) Gone() error {
	var st unix.Stat_t
	if err := unix.Fstat(b.lock.fd, &st); err == nil && st.Size < int64(len(b.mem)) {
		return b.fail(board.ErrAbsent, fmt.Sprintf("somebody truncated the shared memory, from %d to %d bytes", len(b.mem), st.Size), nil)
	}
	return nil
}

// Events becomes readable when a peer came or went, or the server was lost.
func (b *Board) Events() <-chan struct{} { return b.events }

// Close leaves the server, and gives the memory, the lock of the side and the doorbells back.
func (b *Board) Close() error {
	b.once.Do(func() {
		b.conn.Close()
		<-b.done
		if b.dec != nil {
			b.dec.drop()
		}
		b.mu.Lock()
		peers := b.peers
		b.peers = nil
		b.mu.Unlock()
		for _, l := range peers {
			for _, e := range l {
				if e != nil {
					e.Close()
				}
			}
		}
		for _, e := range b.own {
			e.Close()
		}
		if b.mem != nil {
			b.unmap()
			_ = unix.Munmap(b.mem)
		}
		if b.lock.fd >= 0 {
			unix.Close(b.lock.fd)
		}
	})
	return nil
}
