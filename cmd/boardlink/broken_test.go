package main

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/boardlink/boardlink/board/loopback"
	"github.com/boardlink/boardlink/cmd/boardlink/internal/statusd"
	"github.com/boardlink/boardlink/status"
	"github.com/boardlink/boardlink/trial/netns"
	"github.com/boardlink/boardlink/trial/netns/netnstest"
	"github.com/boardlink/boardlink/trial/traffic"
	"golang.org/x/sys/unix"
)

// shmServer is an ivshmem server whose memory is not sealed: it can be truncated under the clients.
type shmServer struct {
	t    *testing.T
	mem  int
	size int64
	l    *net.UnixListener
	done chan struct{}

	mu      sync.Mutex
	clients []*net.UnixConn // nil: gone
	vectors []int
}

func newShmServer(t *testing.T, path string, size int64) *shmServer {
	t.Helper()
	mem, err := unix.MemfdCreate("unsealed", unix.MFD_CLOEXEC)
	if err == nil {
		err = unix.Ftruncate(mem, size)
	}
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	s := &shmServer{t: t, mem: mem, size: size, l: l, done: make(chan struct{})}
	go s.serve()
	t.Cleanup(func() {
		l.Close()
		<-s.done
		s.mu.Lock()
		defer s.mu.Unlock()
		for i, c := range s.clients {
			if c != nil {
				c.Close()
			}
			unix.Close(s.vectors[i])
		}
		unix.Close(mem)
	})
	return s
}

// say sends one message, with a descriptor unless it is negative.
func (s *shmServer) say(c *net.UnixConn, val int64, fd int) {
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], uint64(val))
	var oob []byte
	if fd >= 0 {
		oob = unix.UnixRights(fd)
	}
	c.WriteMsgUnix(b[:], oob, nil)
}

func (s *shmServer) serve() {
	defer close(s.done)
	for {
		c, err := s.l.AcceptUnix()
		if err != nil {
			return
		}
		v, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
		if err != nil {
			s.t.Error(err)
			c.Close()
			continue
		}
		s.mu.Lock()
		id := len(s.clients)
		s.say(c, 0, -1)
		s.say(c, int64(id), -1)
		s.say(c, -1, s.mem)
		for i, o := range s.clients {
			if o != nil {
				s.say(o, int64(id), v)
				s.say(c, int64(i), s.vectors[i])
			}
		}
		s.say(c, int64(id), v)
		s.clients, s.vectors = append(s.clients, c), append(s.vectors, v)
		s.mu.Unlock()
		go func() {
			c.Read(make([]byte, 1))
			s.mu.Lock()
			defer s.mu.Unlock()
			s.clients[id] = nil
			c.Close()
			for _, o := range s.clients {
				if o != nil {
					s.say(o, int64(id), -1)
				}
			}
		}()
	}
}

func (s *shmServer) truncate(size int64) {
	s.t.Helper()
	if err := unix.Ftruncate(s.mem, size); err != nil {
		s.t.Fatal(err)
	}
}

// links returns the links of the program at a status socket.
func (b *box) links(name string) []status.Link {
	p, err := statusd.Get(b.t.Context(), b.path(name))
	if err != nil {
		return nil
	}
	return p.Links
}

func up(l status.Link) bool { return l.State == "up" && len(l.Devices) > 0 && l.Devices[0].Carrier }

// pinged fails the test where an address does not answer.
func pinged(t *testing.T, ns *netns.NS, addr string) {
	t.Helper()
	ctx := withTimeout(t, 10*time.Second)
	dst := netip.MustParseAddr(addr)
	if err := traffic.WaitReachable(ctx, ns, dst); err != nil {
		t.Fatal(err)
	}
	if r, err := traffic.Ping(ctx, ns, dst, traffic.PingConfig{Count: 5, Interval: time.Millisecond}); err != nil || r.Lost != 0 {
		t.Fatalf("ping %s: %+v, %v", addr, r, err)
	}
}

// TestTruncated: somebody truncates the shared memory of one of two boards of a host, under traffic.
// Host and agent live, the other board's link is not disturbed, and the link comes back with the memory.
func TestTruncated(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	far := [2]*netns.NS{}
	for i := range far {
		var err error
		if far[i], err = netns.New(); err != nil {
			t.Fatal(err)
		}
		defer far[i].Close()
	}
	const size = 4 << 20
	shm := newShmServer(t, b.path("unsealed"), size)
	srv := b.start(nil, "", "serve", b.path("sealed"), "--size", "4M")
	host := b.start(nil, "", "host", "--board", "loopback:"+b.path("sealed"), "--board", "loopback:"+b.path("unsealed"), "--status", b.path("h"), "--beat", "20ms", "--lost", "100",
		"--net", "board=0,name=bl0,addr=10.9.0.1/24", "--net", "board=1,name=bl1,addr=10.9.1.1/24")
	var agents [2]*program
	for i, path := range []string{"sealed", "unsealed"} {
		agents[i] = b.start(far[i], "", "agent", "--board", "loopback:"+b.path(path), "--status", b.path(fmt.Sprint("a", i)), "-i", "bl0",
			"--addr", fmt.Sprintf("10.9.%d.2/24", i), "--beat", "20ms", "--lost", "100")
	}
	defer func() {
		for _, p := range []*program{agents[0], agents[1], host, srv} {
			if code := p.end(unix.SIGTERM, 5*time.Second); code != 0 {
				t.Errorf("%v ended with %d:\n%s", p.cmd.Args, code, p.err.String())
			}
		}
		if t.Failed() {
			t.Logf("host:\n%sagent:\n%s", host.err.String(), agents[1].err.String())
		}
	}()
	allUp := func() bool {
		h, a0, a1 := b.links("h"), b.links("a0"), b.links("a1")
		return len(h) == 2 && len(a0) == 1 && len(a1) == 1 && up(h[0]) && up(h[1]) && up(a0[0]) && up(a1[0])
	}
	until(t, 10*time.Second, "both links come up", allUp)
	epoch := b.links("h")[0].Epoch
	for _, log := range []string{host.err.String(), agents[1].err.String()} {
		if strings.Count(log, "level=WARN msg=\"board loopback:")+strings.Count(log, "not sealed") != 1 {
			t.Errorf("unsealed memory is not told of once:\n%s", log)
		}
	}
	for _, left := range []int64{0, size / 2, 4096, 0} {
		pinged(t, b.ns, "10.9.1.2")
		ctx := withTimeout(t, 20*time.Second)
		var flood sync.WaitGroup
		flood.Go(func() {
			traffic.Ping(ctx, b.ns, netip.MustParseAddr("10.9.1.2"), traffic.PingConfig{Count: 300, Interval: 200 * time.Microsecond})
		})
		time.Sleep(10 * time.Millisecond)
		shm.truncate(left)
		until(t, 10*time.Second, fmt.Sprintf("both ends see %d bytes left", left), func() bool {
			h, a := b.links("h"), b.links("a1")
			if len(h) != 2 || len(a) != 1 {
				return false
			}
			if left >= loopback.MinSize { // a smaller board
				return up(h[1]) && up(a[0]) && h[1].Window.Size == uint64(left)/2 && a[0].Window.Size == uint64(left)/2
			}
			want := fmt.Sprintf("the shared memory has %d bytes", left)
			return h[1].State == "waiting for the board" && a[0].State == "waiting for the board" &&
				strings.Contains(h[1].LastError, want) && strings.Contains(a[0].LastError, want)
		})
		pinged(t, b.ns, "10.9.0.2")
		shm.truncate(size)
		until(t, 10*time.Second, "the links are up again", allUp)
		flood.Wait()
	}
	// At any moment of the handshake and of bringing the device up.
	for i := 0; i < 60; i++ {
		shm.truncate([]int64{0, size / 2, 4096, size/2 + 4096}[i%4])
		time.Sleep(time.Duration(i*7%11) * time.Millisecond)
		shm.truncate(size)
		time.Sleep(time.Duration(i*13%37) * time.Millisecond)
	}
	until(t, 20*time.Second, "the links are up at last", allUp)
	pinged(t, b.ns, "10.9.1.2")
	if l := b.links("h")[0]; l.Epoch != epoch {
		t.Error("the other board's link was disturbed")
	}
}

// TestSeveralBoards: a host with two boards of which one cannot be used serves the other, tries the bad
// one again, and shows what is wrong with it.
func TestSeveralBoards(t *testing.T) {
	netnstest.Need(t)
	for _, c := range []struct {
		name, spec string
		setup      func(t *testing.T, b *box) (mend func())
		want       string // in the status
	}{
		{"absent", "loopback:$D/bad", nil, "no rendezvous socket"},
		{"no socket", "loopback:$D/bad", func(t *testing.T, b *box) func() {
			if err := os.WriteFile(b.own("bad"), []byte("precious"), 0o600); err != nil {
				t.Fatal(err)
			}
			return func() { os.Remove(b.path("bad")); b.keep = nil }
		}, "not a socket"},
		{"a stranger", "loopback:$D/s", func(t *testing.T, b *box) func() { foreign("220 mail ESMTP\r\n", false)(t, b); return nil }, "not an ivshmem server"},
		{"hangs up", "loopback:$D/s", func(t *testing.T, b *box) func() { foreign("", true)(t, b); return nil }, "takes no more clients"},
		{"no function", "ivshmem:0000:7f:1f.7", nil, "0000:7f:1f.7"},
		{"no address", "ivshmem:nonsense", nil, "nonsense"},
		{"no description", "generic:$D/none.toml@0000:7f:1f.7", nil, "none.toml"},
		{"side taken", "loopback:$D/bad", func(t *testing.T, b *box) func() {
			serve(t, b, "bad")
			p := b.start(nil, "", "host", "--board", "loopback:"+b.path("bad"), "-i", "other", "--status", "none")
			until(t, 10*time.Second, "another host", func() bool { return strings.Contains(p.err.String(), "board opened") })
			return func() { p.end(unix.SIGTERM, 5*time.Second) }
		}, "the side host is held by process"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			b := newBox(t)
			var mend func()
			if c.setup != nil {
				mend = c.setup(t, b)
			}
			serve(t, b, "good")
			h := b.start(nil, "", "host", "--board", strings.ReplaceAll(c.spec, "$D", b.dir), "--board", "loopback:"+b.path("good"),
				"--status", b.path("h"), "--net", "board=0,name=bl0", "--net", "board=1,name=bl1")
			var l []status.Link
			until(t, 20*time.Second, "one waits, one runs", func() bool {
				l = b.links("h")
				return len(l) == 2 && l[0].State == "waiting for the board" && l[0].Counters["open_errors"] >= 3 && l[1].State == "waiting for the peer"
			})
			if !strings.Contains(l[0].LastError, c.want) {
				t.Errorf("status: %q, want %q", l[0].LastError, c.want)
			}
			if n := strings.Count(h.err.String(), `msg="waiting for the board"`); n != 1 {
				t.Errorf("%d lines about it", n)
			}
			if mend != nil {
				mend()
				if c.name == "no socket" {
					serve(t, b, "bad")
				}
				until(t, 20*time.Second, "the bad one is used, too", func() bool {
					l := b.links("h")
					return len(l) == 2 && l[0].State == "waiting for the peer"
				})
			}
			if code := h.end(unix.SIGTERM, 5*time.Second); code != 0 {
				t.Errorf("ended with status %d:\n%s", code, h.err.String())
			}
		})
	}
	t.Run("all", func(t *testing.T) {
		t.Parallel()
		b := newBox(t)
		st, _, errs := b.run("", "host", "--status", "none", "--board", "ivshmem:nonsense", "--board", "ivshmem:nonsense2", "--net", "board=0", "--net", "board=1")
		if st != exitUsage || strings.Count(errs, "\n") != 1 || !strings.Contains(errs, "nonsense2") {
			t.Errorf("no board can be used: status %d, %s", st, errs)
		}
	})
}

// TestLockHeld: a client of the rendezvous that is no end of a link locks the host's side and sits there.
// A host that starts waits, says why, and comes up when the client lets go.
func TestLockHeld(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	serve(t, b, "s")
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: b.path("s")})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	mem := -1
	for mem < 0 { // the third message has it
		oob := make([]byte, 64)
		_, n, _, _, err := c.ReadMsgUnix(make([]byte, 8), oob)
		if err != nil {
			t.Fatal(err)
		}
		if cm, err := unix.ParseSocketControlMessage(oob[:n]); err == nil && len(cm) > 0 {
			fds, err := unix.ParseUnixRights(&cm[0])
			if err != nil {
				t.Fatal(err)
			}
			mem = fds[0]
		}
	}
	defer unix.Close(mem)
	fd, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", mem), unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK, Start: 0, Len: 1}); err != nil {
		t.Fatal(err)
	}
	h := b.start(nil, "", "host", "--board", "loopback:"+b.path("s"), "--status", b.path("h"), "-i", "bl0")
	until(t, 10*time.Second, "the host waits", func() bool {
		l := b.links("h")
		return len(l) == 1 && l[0].State == "waiting for the board" && strings.Contains(l[0].LastError, "the side host is locked by this process or by a client")
	})
	unix.Close(fd)
	until(t, 10*time.Second, "the host has its board", func() bool {
		l := b.links("h")
		return len(l) == 1 && l[0].State == "waiting for the peer"
	})
	if code := h.end(unix.SIGTERM, 5*time.Second); code != 0 {
		t.Errorf("ended with status %d:\n%s", code, h.err.String())
	}
}

// TestFewFiles: a limit of open files that is too low is one line that says so, whatever it is.
func TestFewFiles(t *testing.T) {
	netnstest.Need(t)
	for _, n := range []int{8, 12, 20, 31, 40} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			t.Parallel()
			b := newBox(t)
			serve(t, b, "s")
			for _, args := range []string{
				"host --status none --queues 16 --board loopback:" + b.path("s"),
				"agent --status none --board loopback:" + b.path("s"),
				"serve " + b.path("x"),
			} {
				if n == 40 && !strings.Contains(args, "--queues 16") {
					continue // enough
				}
				st, out, errs := b.run(fmt.Sprint("files=", n), strings.Fields(args)...)
				if st != exitUsage || out != "" || strings.Count(errs, "\n") != 1 || !strings.Contains(errs, fmt.Sprintf("(RLIMIT_NOFILE) is %d", n)) {
					t.Errorf("%s: status %d, %s%s", args, st, out, errs)
				}
			}
		})
	}
}

// TestServeOutOfFiles: a server without free descriptors says so once; a starting agent waits, and is
// served when there are some.
func TestServeOutOfFiles(t *testing.T) {
	netnstest.Need(t)
	for name, room := range map[string]int{"for no connection": 0, "for a connection": 3} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBox(t)
			srv := b.start(nil, "", "serve", b.path("s"))
			until(t, 10*time.Second, "a server", func() bool { return strings.Contains(srv.err.String(), "msg=serving") })
			pid := srv.cmd.Process.Pid
			var old unix.Rlimit
			if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &old); err != nil {
				t.Fatal(err)
			}
			fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
			if err != nil {
				t.Fatal(err)
			}
			n := uint64(len(fds) + room)
			if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: n, Max: old.Max}, nil); err != nil {
				t.Fatal(err)
			}
			agent := b.start(nil, "", "agent", "--board", "loopback:"+b.path("s"), "--status", b.path("a"), "-i", "bl0")
			until(t, 20*time.Second, "the agent waits", func() bool {
				l := b.links("a")
				return len(l) == 1 && l[0].State == "waiting for the board" && l[0].Counters["open_errors"] >= 1
			})
			if l := b.links("a"); !strings.Contains(l[0].LastError, "takes no more clients now") {
				t.Errorf("the agent's error: %s", l[0].LastError)
			}
			if log := srv.err.String(); strings.Count(log, "level=WARN") != 1 || !strings.Contains(log, "too many open files") {
				t.Errorf("the server's log:\n%s", log)
			}
			if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, &old, nil); err != nil {
				t.Fatal(err)
			}
			until(t, 20*time.Second, "the agent has its board", func() bool {
				l := b.links("a")
				return len(l) == 1 && l[0].State == "waiting for the peer"
			})
			if log := srv.err.String(); strings.Count(log, "level=WARN") != 2 || !strings.Contains(log, "clients are taken again") {
				t.Errorf("the server's log:\n%s", log)
			}
			for _, p := range []*program{agent, srv} {
				if code := p.end(unix.SIGTERM, 5*time.Second); code != 0 {
					t.Errorf("%v ended with %d", p.cmd.Args, code)
				}
			}
		})
	}
}
