package vhostuser

import (
	"errors"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// lingering returns a socket whose close(2) waits for minutes: its peer does not read what was sent. release lets it go on.
func lingering(t *testing.T) (fd int, release func()) {
	t.Helper()
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	ln, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	check(err)
	defer unix.Close(ln)
	check(unix.SetsockoptInt(ln, unix.SOL_SOCKET, unix.SO_RCVBUF, 4096))
	check(unix.Bind(ln, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}))
	check(unix.Listen(ln, 1))
	at, err := unix.Getsockname(ln)
	check(err)
	fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	check(err)
	check(unix.Connect(fd, at))
	peer, _, err := unix.Accept4(ln, unix.SOCK_CLOEXEC)
	check(err)
	check(unix.SetNonblock(fd, true))
	for b := make([]byte, 1<<16); err == nil; {
		_, err = unix.Write(fd, b)
	}
	if err != unix.EAGAIN {
		t.Fatal(err)
	}
	check(unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1, Linger: 600}))
	released := false
	release = func() {
		if !released {
			released = true
			unix.Close(peer) // with bytes unread: the connection is reset
		}
	}
	t.Cleanup(release)
	return fd, release
}

// TestBlockingClose: sockets whose close waits for minutes hold up neither the connection that they came with, nor the door's end.
func TestBlockingClose(t *testing.T) {
	d := newDoor(t, newEcho(t, 1))
	f := newFront(t, d.connect(t))
	f.negotiate(kinds[0].f, allProto)
	var release []func()
	for _, r := range []struct {
		req     Request
		payload []byte
	}{
		{SetVringKick, encodeU64(0)}, // no doorbell
		{SetVringErr, encodeU64(1)},
		{AddMemReg, slot(region{1 << 40, mib, 1 << 45, 0})}, // no memory
		{SetVringNum, vringState{0, 1 << 20}.encode()},      // none wanted
	} {
		fd, rel := lingering(t)
		release = append(release, rel)
		b := encodeMessage(r.req, flagVersion|flagNeedReply, r.payload)
		// The door has the last descriptor of the socket when it has the whole message.
		send(t, f.fd, b[:4], fd)
		unix.Close(fd)
		send(t, f.fd, b[4:])
		got, _, p, err := f.recv()
		if err != nil || got != r.req || len(p) != 8 || native.Uint64(p) == 0 {
			t.Fatalf("%s with a socket: answer %s, %x, %v", r.req, got, p, err)
		}
	}
	if err := d.stop(); err != nil {
		t.Error(err)
	}
	d.closer.mu.Lock()
	if n := len(d.closer.fds); n != 4 {
		t.Errorf("%d descriptors wait, want 4: the sockets do not block", n)
	}
	d.closer.mu.Unlock()
	for _, r := range release {
		r()
	}
	empty(t, &d.closer)
}

// empty waits until all is closed.
func empty(t *testing.T, c *closer) {
	t.Helper()
	for end := time.Now().Add(limit); ; time.Sleep(time.Millisecond) {
		c.mu.Lock()
		n := len(c.fds)
		c.mu.Unlock()
		if n == 0 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%d descriptors are still not closed", n)
		}
	}
}

// TestCloserFull: no message is read while many descriptors wait for their close.
func TestCloserFull(t *testing.T) {
	var c closer
	fd, release := lingering(t)
	c.close(fd)
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(p[0])
	for i := 1; i < maxClosing; i++ {
		if err := c.full(); err != nil {
			t.Fatalf("%d descriptors: %v", i, err)
		}
		d, err := unix.FcntlInt(uintptr(p[1]), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		c.close(d)
	}
	unix.Close(p[1])
	s, to := bytesFrom(encodeMessage(GetFeatures, flagVersion, nil))
	n := new(counters)
	r := &reader{src: s, n: n, closer: &c}
	if m, err := r.next(); !errors.Is(err, ErrDescriptors) || m != nil || *to != 0 || n.load()["descriptors_stuck"] != 1 {
		t.Errorf("%v, %v, %d reads, %v", m, err, *to, n.load())
	}
	// What needs no wait does not queue up behind them.
	mem := memfd(t, mib)
	d, err := unix.FcntlInt(uintptr(mem), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	c.close(d)
	if n := openFDs(t, mem); n != 1 {
		t.Errorf("%d descriptors of the file in memory", n)
	}
	release()
	empty(t, &c)
	if m, err := r.next(); err != nil || m.req != GetFeatures {
		t.Errorf("%+v, %v", m, err)
	}
	if k, err := unix.Read(p[0], make([]byte, 1)); k != 0 || err != nil {
		t.Errorf("the pipe has a writer left: %d, %v", k, err)
	}
}

// counted is a source that counts its reads.
type counted struct {
	b     []byte
	reads int
}

func (c *counted) recv(p, _ []byte) (n, oobn, flags int, err error) {
	c.reads++
	n = copy(p, c.b)
	c.b = c.b[n:]
	return n, 0, 0, nil
}

func bytesFrom(b []byte) (source, *int) {
	c := &counted{b: b}
	return c, &c.reads
}

// TestSemaphore: an eventfd of which each read takes one ring only is no kick.
func TestSemaphore(t *testing.T) {
	d := newDoor(t, newEcho(t, 1))
	f := newFront(t, d.connect(t))
	f.negotiate(kinds[0].f, allProto)
	fd, err := unix.Eventfd(1<<31, unix.EFD_SEMAPHORE|unix.EFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if f.ask(SetVringKick, encodeU64(0), fd) {
		t.Error("it is taken")
	}
	f.set(SetVringCall, encodeU64(0), fd) // rung only
	if n := d.n.load(); n["failed"] != 1 {
		t.Errorf("%v", n)
	}
}
