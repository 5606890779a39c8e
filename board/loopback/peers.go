package loopback

import (
	"errors"
	"fmt"
	"net"
	"sort"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/mmio"
)

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
			b.logf("%s: peer %d disconnected", b.spec, m.val)
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
		b.logf("%s: peer %d connected", b.spec, m.val)
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
