package doorbell

import (
	"encoding/binary"
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// patience bounds waits that normally end within a fifth of a second.
const patience = 20 * time.Second

// shared returns an eventfd and the descriptor by which a hostile peer has it too: the same open file, made a blocking one.
func shared(t *testing.T) (e *Eventfd, peer int) {
	t.Helper()
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	if peer, err = unix.Dup(fd); err != nil { // not F_DUPFD: qemu-user loses the byte order of an eventfd by it
		t.Fatal(err)
	}
	if e, err = FromFD(fd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		e.Close()
		unix.Close(peer)
	})
	if err := unix.SetNonblock(peer, false); err != nil {
		t.Fatal(err)
	}
	return e, peer
}

// add adds n to the counter; what does not fit is left.
func add(t *testing.T, fd int, n uint64) {
	t.Helper()
	unix.SetNonblock(fd, true)
	defer unix.SetNonblock(fd, false)
	var b [8]byte
	binary.NativeEndian.PutUint64(b[:], n)
	if _, err := unix.Write(fd, b[:]); err != nil && err != unix.EAGAIN && err != unix.EINTR {
		t.Fatal(err)
	}
}

// take returns what is pending and sets it to 0.
func take(t *testing.T, fd int) uint64 {
	t.Helper()
	unix.SetNonblock(fd, true)
	defer unix.SetNonblock(fd, false)
	var b [8]byte
	if _, err := unix.Read(fd, b[:]); err == unix.EAGAIN || err == unix.EINTR {
		return 0
	} else if err != nil {
		t.Fatal(err)
	}
	return binary.NativeEndian.Uint64(b[:])
}

const full = 1<<64 - 2 // the most that writes add up to

// inTime runs f, which must end.
func inTime(t *testing.T, what string, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); f() }()
	select {
	case <-done:
	case <-time.After(patience):
		t.Fatalf("%s blocks", what)
	}
}

// without runs the test without what kernels may lack.
func without(t *testing.T, read, asyncIO bool) {
	if read {
		atomic.StoreUint32(&noReadNoWait, 1)
		t.Cleanup(func() { atomic.StoreUint32(&noReadNoWait, 0) })
	}
	if asyncIO {
		aio.mu.Lock()
		tried, ok := aio.tried, aio.ok
		aio.tried, aio.ok = true, false
		aio.mu.Unlock()
		t.Cleanup(func() {
			aio.mu.Lock()
			aio.tried, aio.ok = tried, ok
			aio.mu.Unlock()
		})
	}
}

// kernels are what the tests below run on: this one, and ones that lack the calls which cannot block.
func kernels(t *testing.T, f func(t *testing.T, asyncIO bool)) {
	for _, k := range []struct {
		name          string
		read, asyncIO bool
	}{{"this kernel", false, false}, {"no RWF_NOWAIT", true, false}, {"no RWF_NOWAIT, no io_submit", true, true}} {
		t.Run(k.name, func(t *testing.T) {
			without(t, k.read, k.asyncIO)
			f(t, aio.signal(-1) != errNoAIO) // emulators have none
		})
	}
}

// TestPeerBlocksRing: a ring that a peer makes block is freed and reported, and no later one blocks, full or not.
func TestPeerBlocksRing(t *testing.T) {
	kernels(t, func(t *testing.T, asyncIO bool) {
		e, peer := shared(t)
		before := Blocked()
		add(t, peer, full)
		var wg sync.WaitGroup
		var freed uint32
		for range 3 {
			wg.Go(func() {
				if errors.Is(e.Ring(), ErrBlocked) {
					atomic.AddUint32(&freed, 1)
				}
			})
		}
		inTime(t, "Ring", wg.Wait)
		if freed == 0 || Blocked() == before {
			t.Errorf("%d of 3 rings were reported as blocked, %d counted", freed, Blocked()-before)
		}
		inTime(t, "Ring", func() {
			add(t, peer, full)
			for range 100 {
				if err := e.Ring(); err != nil {
					t.Errorf("ring of a full eventfd after one that blocked: %v", err)
				}
			}
			for take(t, peer) != 0 { // a ring that waited may come after it
			}
			// Not the first one, perhaps: what frees a ring without RWF_NOWAIT may still be draining.
			for begin := time.Now(); take(t, peer) == 0; time.Sleep(time.Millisecond) {
				if err := e.Ring(); err != nil {
					t.Error(err)
				}
				if time.Since(begin) > patience {
					t.Fatal("a later ring does not arrive")
				}
			}
		})
	})
}

// TestPeerLetsOthersPass: a ring that blocks is freed also where the peer then sets O_NONBLOCK again, so that others ring the same
// eventfd all the time and are done at once.
func TestPeerLetsOthersPass(t *testing.T) {
	e, peer := shared(t)
	inTime(t, "Ring", func() {
		for err := error(nil); !errors.Is(err, ErrBlocked); { // unless the ring came too late to block
			unix.SetNonblock(peer, false)
			add(t, peer, full)
			done := make(chan error, 1)
			go func() { done <- e.Ring() }()
			for atomic.LoadUint32(&e.state)&users == 0 && len(done) == 0 {
				time.Sleep(time.Millisecond)
			}
			time.Sleep(10 * time.Millisecond)
			unix.SetNonblock(peer, true)
			for len(done) == 0 {
				if err := e.Ring(); err != nil && !errors.Is(err, ErrBlocked) {
					t.Error(err)
				}
				time.Sleep(time.Millisecond)
			}
			err = <-done
		}
	})
}

// TestCloseBeside: an eventfd that is closed while somebody uses it, and the watchdog marks it, gives its descriptor back.
func TestCloseBeside(t *testing.T) {
	for range 2000 {
		e, err := NewEventfd()
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		wg.Go(func() { e.Ring() })
		wg.Go(func() { // as Eventfd.free does
			for {
				if s := atomic.LoadUint32(&e.state); atomic.CompareAndSwapUint32(&e.state, s, s|slowBit) {
					return
				}
			}
		})
		e.Close()
		wg.Wait()
		if atomic.LoadUint32(&e.state)&goneBit == 0 {
			t.Fatal("the descriptor of a closed eventfd stays")
		}
	}
}

// TestPeerFillsAnew: a peer that fills the eventfd again whenever it is drained does not keep a ring.
func TestPeerFillsAnew(t *testing.T) {
	e, peer := shared(t)
	add(t, peer, full)
	var stop uint32
	var wg sync.WaitGroup
	wg.Go(func() {
		var b [8]byte
		binary.NativeEndian.PutUint64(b[:], full)
		for atomic.LoadUint32(&stop) == 0 {
			unix.SetNonblock(peer, true)
			unix.Write(peer, b[:])
			unix.SetNonblock(peer, false)
		}
	})
	inTime(t, "Ring", func() {
		for range 20 {
			if err := e.Ring(); err != nil && !errors.Is(err, ErrBlocked) {
				t.Error(err)
			}
		}
	})
	atomic.StoreUint32(&stop, 1)
	wg.Wait()
}

// TestRingNoWait: it does not block, and rings what is not full.
func TestRingNoWait(t *testing.T) {
	kernels(t, func(t *testing.T, asyncIO bool) {
		e, peer := shared(t)
		r := NoWait(e)
		for range 3 * aioEvents { // more than the kernel keeps completions for
			if err := r.Ring(); err != nil {
				t.Fatal(err)
			}
			if !asyncIO {
				for begin := time.Now(); !ready(peer, unix.POLLIN) && time.Since(begin) < patience; {
					time.Sleep(10 * time.Microsecond)
				}
			}
			if n := take(t, peer); n != 1 {
				t.Fatalf("%d rings pending after one", n)
			}
		}
		before := Blocked()
		add(t, peer, full)
		inTime(t, "RingNoWait", func() {
			for range 10 {
				if err := r.Ring(); err != nil {
					t.Error(err)
				}
			}
		})
		if Blocked() != before {
			t.Error("a ring that must not block did, and was freed")
		}
	})
	e, err := NewEventfd()
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	if err := NoWait(e).Ring(); err != nil {
		t.Error(err)
	}
	if n, err := e.Ack(); n != 1 || err != nil {
		t.Errorf("%d rings pending, %v", n, err)
	}
}

// TestPeerBlocksAck: an empty eventfd does not block, nor one that the peer drains at the last moment.
func TestPeerBlocksAck(t *testing.T) {
	kernels(t, func(t *testing.T, _ bool) {
		e, peer := shared(t)
		inTime(t, "Ack", func() {
			if n, err := e.Ack(); n != 0 || err != nil {
				t.Errorf("%d, %v of an empty one", n, err)
			}
		})
		var stop uint32
		var wg sync.WaitGroup
		wg.Go(func() {
			for atomic.LoadUint32(&stop) == 0 {
				add(t, peer, 1)
				take(t, peer)
			}
		})
		inTime(t, "Ack", func() {
			for end := time.Now().Add(300 * time.Millisecond); time.Now().Before(end); {
				if _, err := e.Ack(); err != nil {
					t.Error(err)
				}
			}
		})
		atomic.StoreUint32(&stop, 1)
		wg.Wait()
	})
}

// TestFreeAck: on a kernel without RWF_NOWAIT the read may block after all; it is freed.
func TestFreeAck(t *testing.T) {
	for _, asyncIO := range []bool{true, false} {
		without(t, true, !asyncIO)
		e, _ := shared(t)
		inTime(t, "read", func() {
			if _, ok := e.enter(); !ok {
				t.Error("closed")
			}
			var b [8]byte
			if _, err := unix.Read(e.fd, b[:]); err != nil { // as in ack, the peer having taken the ring that poll told of
				t.Error(err)
			}
			e.leave()
		})
	}
}

// TestSaturated: a counter that overflowed (the kernel can do that, and a peer by it) rings, and is no error.
func TestSaturated(t *testing.T) {
	if aio.signal(-1) == errNoAIO {
		// qemu-user has no io_submit.
		if os.Getenv("CI") == "true" && os.Getenv("BOARDLINK_TEST_EXEC") == "" {
			t.Fatal("io_submit is missing, without which no counter overflows")
		}
		t.Skip("io_submit is missing, without which no counter overflows")
	}
	e, peer := shared(t)
	stop, err := NewEventfd()
	if err != nil {
		t.Fatal(err)
	}
	defer stop.Close()
	s := NewSleeper(SleeperConfig{Second: e, Stop: stop, Fallback: Fallback{PollMin: patience, PollMax: patience}})
	add(t, peer, full)
	for range 2 {
		if err := aio.signal(peer); err != nil {
			t.Fatal(err)
		}
	}
	fds := []unix.PollFd{{Fd: int32(peer), Events: unix.POLLIN}}
	if unix.Poll(fds, 0); fds[0].Revents&unix.POLLERR == 0 {
		t.Fatalf("poll reports %#x: the counter has not overflowed", fds[0].Revents)
	}
	if why, err := s.Sleep(0); why != Rung || err != nil {
		t.Errorf("%v, %v", why, err)
	}
	if why, err := s.Look(0); why != 0 || err != nil {
		t.Errorf("the overflow stays: %v, %v", why, err)
	}
}

// TestCloseBlocked: an eventfd that is closed while a ring blocks is watched until that is freed, and its descriptor closed then.
func TestCloseBlocked(t *testing.T) {
	e, peer := shared(t)
	add(t, peer, full)
	done := make(chan error, 1)
	go func() { done <- e.Ring() }()
	for atomic.LoadUint32(&e.state)&users == 0 {
		time.Sleep(time.Millisecond)
	}
	time.Sleep(10 * time.Millisecond)
	e.Close()
	inTime(t, "Ring", func() { <-done })
	inTime(t, "the last leave", func() {
		for atomic.LoadUint32(&e.state)&goneBit == 0 {
			time.Sleep(time.Millisecond)
		}
	})
	if err := e.Ring(); err != ErrClosed {
		t.Errorf("ring after close: %v", err)
	}
}
