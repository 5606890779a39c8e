package loopback

import (
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/board/internal/share"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
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

// RingSelf implements board.SelfRinging.
func (b *Board) RingSelf(v uint32) (doorbell.Ringer, error) {
	if uint64(v) >= uint64(len(b.own)) {
		return nil, fmt.Errorf("%s: vector %d of this side, which has %d", b.spec, v, len(b.own))
	}
	return b.own[v], nil
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
