package doorbell

import (
	"runtime"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// watchEvery is how often the watchdog looks: a ring that blocks is freed after one to two of it.
const watchEvery = 100 * time.Millisecond

// freeFor limits how long the watchdog tries to free one eventfd in a look. A peer may fill the counter again each time it is drained.
const freeFor = 2 * time.Millisecond

// watch is the watchdog over all eventfds that are shared with peers. Its goroutine runs while there are some.
var watch watchdog

type watchdog struct {
	mu   sync.Mutex
	list []*Eventfd
	stop chan struct{}
}

// blocked counts the rings and acknowledgements that were found blocked and freed; with sync/atomic.
var blocked uint32

// Blocked returns how many eventfds of this process were found to block because of a peer, since its start. Each is counted once for
// each time that it is freed.
func Blocked() uint32 { return atomic.LoadUint32(&blocked) }

func (w *watchdog) add(e *Eventfd) {
	w.mu.Lock()
	defer w.mu.Unlock()
	e.place, e.seen = len(w.list), 0
	w.list = append(w.list, e)
	if len(w.list) == 1 {
		w.stop = make(chan struct{})
		go w.run(w.stop)
	}
}

// remove is called before e's descriptor is closed: the watchdog uses it under mu only.
func (w *watchdog) remove(e *Eventfd) {
	w.mu.Lock()
	defer w.mu.Unlock()
	last := len(w.list) - 1
	w.list[e.place] = w.list[last]
	w.list[e.place].place = e.place
	w.list[last] = nil
	if w.list = w.list[:last]; last == 0 {
		close(w.stop)
	}
}

func (w *watchdog) run(stop <-chan struct{}) {
	t := time.NewTicker(watchEvery)
	defer t.Stop()
	for {
		select {
		case <-stop:
			return
		case <-t.C:
			w.look()
		}
	}
}

// look frees what may not have come out of the kernel since the last look: somebody was in a call then, and somebody is now. That
// other calls have ended meanwhile means nothing: a peer that sets O_NONBLOCK again lets them pass, while one that had begun before
// goes on waiting. Somebody who was just not scheduled, or two calls, look the same; free does them no harm.
func (w *watchdog) look() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, e := range w.list {
		s := atomic.LoadUint32(&e.state)
		if s&users != 0 && e.seen&users != 0 {
			e.free(s/finished == e.seen/finished)
		}
		e.seen = s
	}
}

// free lets a Ring or Ack go on that blocks. A Ring blocks in a full eventfd only, and no honest side fills one: any other state is
// left as it is. still tells that no call has ended since the last look. Should it be blocked for longer, it is tried again with the
// next look.
func (e *Eventfd) free(still bool) {
	fds := [1]unix.PollFd{{Fd: int32(e.fd), Events: unix.POLLIN | unix.POLLOUT}}
	if _, err := unix.Poll(fds[:], 0); err != nil {
		return
	}
	switch r := fds[0].Revents; {
	case r&unix.POLLOUT == 0: // full: a ring
		for {
			now := atomic.LoadUint32(&e.state)
			if atomic.CompareAndSwapUint32(&e.state, now, now|slowBit) {
				break
			}
		}
		atomic.AddUint32(&blocked, 1)
		for end := time.Now().Add(freeFor); ; runtime.Gosched() {
			// Rings that came since it was drained are not to be lost, so only a full one is.
			if !ready(e.fd, unix.POLLOUT) {
				e.drain()
			}
			if atomic.LoadUint32(&e.state)&users == 0 || !time.Now().Before(end) {
				return
			}
		}
	case r&unix.POLLIN == 0 && still && atomic.LoadUint32(&noReadNoWait) != 0: // empty: an Ack, which can block on old kernels only
		atomic.AddUint32(&blocked, 1)
		_ = e.ringNoWait() // what it is for is only to free
	}
}

// drain takes what is pending, without blocking.
func (e *Eventfd) drain() {
	if atomic.LoadUint32(&noReadNoWait) == 0 {
		var count uint64
		_, err := readNoWait(e.fd, &count)
		if err != unix.EOPNOTSUPP && err != unix.ENOSYS && err != unix.EPERM {
			return
		}
		atomic.StoreUint32(&noReadNoWait, 1)
	}
	if ready(e.fd, unix.POLLIN) {
		e.help(&e.drainer, func() { e.ack() })
	}
}

// ringNoWait rings in a way that cannot block. The caller is between enter and leave, or holds watch.mu.
func (e *Eventfd) ringNoWait() error {
	err := aio.signal(e.fd)
	if err != errNoAIO {
		return err
	}
	if ready(e.fd, unix.POLLOUT) { // else it is full, which is as good as rung
		e.help(&e.ringer, func() { e.ring() })
	}
	return nil
}

// A helper is a goroutine that does for somebody who must not block what may block, should the peer be at it just now.
type helper struct{ state uint32 } // one of the states below; with sync/atomic

const (
	helperIdle = iota
	helperBusy
	helperAgain // busy, and asked once more since it began
)

// help has f done once more from now on, by h.
func (e *Eventfd) help(h *helper, f func()) {
	for !atomic.CompareAndSwapUint32(&h.state, helperIdle, helperBusy) {
		if s := atomic.LoadUint32(&h.state); s == helperAgain || atomic.CompareAndSwapUint32(&h.state, helperBusy, helperAgain) {
			return
		}
	}
	// One more user, also of an eventfd that is closed: the caller is, or frees, one. But for the watchdog the last one may just have
	// gone, with the descriptor.
	for s := atomic.LoadUint32(&e.state); !atomic.CompareAndSwapUint32(&e.state, s, s+1); s = atomic.LoadUint32(&e.state) {
		if s&goneBit != 0 {
			return
		}
	}
	go func() {
		defer e.leave()
		for {
			f()
			if atomic.CompareAndSwapUint32(&h.state, helperBusy, helperIdle) {
				return
			}
			atomic.StoreUint32(&h.state, helperBusy)
		}
	}()
}

// ready tells whether poll reports the events of a descriptor now.
func ready(fd int, events int16) bool {
	fds := [1]unix.PollFd{{Fd: int32(fd), Events: events}}
	for {
		_, err := unix.Poll(fds[:], 0)
		if err != unix.EINTR {
			return fds[0].Revents&events != 0
		}
	}
}

// noReadNoWait is 1 once the kernel was found not to know RWF_NOWAIT for eventfds (before Linux 5.8); with sync/atomic.
var noReadNoWait uint32

// readNoWait is read(2) of 8 bytes that does not block, whatever the flags of the open file are.
func readNoWait(fd int, count *uint64) (uintptr, unix.Errno) {
	iov := unix.Iovec{Base: (*byte)(unsafe.Pointer(count))}
	iov.SetLen(8)
	// At the current position, as a position of -1 says: an eventfd has no other.
	n, _, err := unix.Syscall6(unix.SYS_PREADV2, uintptr(fd), uintptr(unsafe.Pointer(&iov)), 1, ^uintptr(0), ^uintptr(0), unix.RWF_NOWAIT)
	return n, err
}
