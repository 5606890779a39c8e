package loopback_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/board/loopback"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/mmio"
)

const (
	childEnv = "BOARDLINK_LOOPBACK_CHILD" // "echo SIDE SPEC", "hold SIDE SPEC", "noproc SIDE SPEC"
	vectors  = 4
)

func TestMain(m *testing.M) {
	if s := os.Getenv(childEnv); s != "" {
		if err := child(strings.SplitN(s, " ", 3)); err != nil {
			fmt.Fprintln(os.Stderr, "child:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// The words of memory that the children use, 64 bits each.
const (
	wordPeer  = 0x1000 // the parent's peer number + 1, 0: not there yet
	wordSelf  = 0x1008 // the child's
	wordCount = 0x1010 // + 8 x vector: rings that were echoed
	wordStop  = 0x1100
)

// child opens a side. "echo" answers each ring of vector v by a ring of the parent's vector v, and ends when
// wordStop is set; "hold" only stays; "noproc" does so without /proc, in a mount namespace of its own.
func child(arg []string) error {
	if arg[0] == "serve" {
		s, err := loopback.NewServer(loopback.ServerConfig{Path: arg[2], Size: 1 << 20, Vectors: vectors})
		if err != nil {
			return err
		}
		return s.Serve()
	}
	side := board.Host
	if arg[1] == "agent" {
		side = board.Agent
	}
	if arg[0] == "noproc" {
		// Private first: the tmpfs must not reach the parent's namespace.
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return err
		}
		if err := unix.Mount("none", "/proc", "tmpfs", 0, ""); err != nil {
			return err
		}
		if _, err := os.Stat("/proc/self"); !os.IsNotExist(err) {
			return fmt.Errorf("/proc is still there: %v", err)
		}
	}
	b, err := board.Open(arg[2], board.Options{Side: side})
	if err != nil {
		return err
	}
	defer b.Close()
	m := b.Window().Mem
	m.Store64(wordSelf, uint64(b.Self().Peer)+1)
	fmt.Println("ready")
	if arg[0] != "echo" {
		select {}
	}
	for m.Load64(wordPeer) == 0 {
		time.Sleep(time.Millisecond)
	}
	info := board.RingInfo{Method: board.RingIvshmem, Peer: uint32(m.Load64(wordPeer) - 1), Vectors: vectors}
	stop, err := doorbell.NewEventfd()
	if err != nil {
		return err
	}
	defer stop.Close()
	var wg sync.WaitGroup
	errs := make(chan error, vectors)
	for v := uint32(0); v < vectors; v++ {
		r, err := b.Ringer(info, v)
		if err != nil {
			return err
		}
		s := doorbell.NewSleeper(doorbell.SleeperConfig{Doorbell: b.Waiter(v), Stop: stop})
		wg.Add(1)
		go func() {
			defer wg.Done()
			for n := uint64(0); ; {
				why, err := s.Sleep(0)
				if err == nil && why&doorbell.Rung != 0 {
					n++
					m.Store64(wordCount+8*uint64(v), n)
					// The peer, which came later, may ring before we have been told of it.
					for err = r.Ring(); err == loopback.ErrNoPeer && m.Load64(wordStop) == 0; err = r.Ring() {
						time.Sleep(time.Millisecond)
					}
				}
				if err != nil {
					errs <- err
					return
				}
				if why&doorbell.Stopped != 0 {
					return
				}
			}
		}()
	}
	for m.Load64(wordStop) == 0 && len(errs) == 0 {
		time.Sleep(time.Millisecond)
	}
	stop.Ring()
	wg.Wait()
	if len(errs) > 0 {
		return <-errs
	}
	return nil
}

// self returns a command that runs this test binary again: behind the emulator that runs it, where one
// does (internal/runtests says so).
func self(t testing.TB, args ...string) *exec.Cmd {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	words := append(strings.Fields(os.Getenv("BOARDLINK_TEST_EXEC")), exe)
	return exec.Command(words[0], append(words[1:], args...)...)
}

// start starts a child and waits until it has its board.
func start(t testing.TB, what string, side board.Side, spec string, files ...*os.File) *exec.Cmd {
	t.Helper()
	cmd := self(t)
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%s %s %s", childEnv, what, side, spec))
	cmd.Stderr = os.Stderr
	cmd.ExtraFiles = files
	if what == "noproc" {
		cmd.SysProcAttr = newMounts()
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if cmd.ProcessState == nil {
			cmd.Process.Kill()
			cmd.Wait()
		}
	})
	var b [6]byte
	if _, err := out.Read(b[:]); err != nil || string(b[:5]) != "ready" {
		cmd.Process.Kill()
		t.Fatalf("child %s %s: %q, %v; exit: %v", what, side, b, err, cmd.Wait())
	}
	return cmd
}

// newMounts asks for a mount namespace, without root inside a user namespace.
func newMounts() *syscall.SysProcAttr {
	a := &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
	if os.Getuid() != 0 {
		a.Cloneflags |= syscall.CLONE_NEWUSER
		a.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
	}
	return a
}

// log collects what a server or board says.
type log struct {
	mu sync.Mutex
	s  []string
}

func (l *log) f(format string, args ...interface{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.s = append(l.s, fmt.Sprintf(format, args...))
}

func (l *log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Join(l.s, "\n")
}

func socketPath(t testing.TB) string {
	// Not t.TempDir: the names of tests make it longer than a socket's path may be.
	d, err := os.MkdirTemp("", "bl")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(d) })
	return filepath.Join(d, "s")
}

func serve(t testing.TB, path string, change ...func(*loopback.ServerConfig)) (*loopback.Server, *log) {
	t.Helper()
	l := &log{}
	cfg := loopback.ServerConfig{Path: path, Size: 1 << 20, Vectors: vectors, Logf: l.f}
	for _, f := range change {
		f(&cfg)
	}
	s, err := loopback.NewServer(cfg)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.Serve() }()
	t.Cleanup(func() {
		s.Close()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return s, l
}

func open(t testing.TB, path string, o board.Options) *loopback.Board {
	t.Helper()
	b, err := loopback.Open(path, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	return b
}

func eventually(t testing.TB, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !f(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within 10 s: %s", what)
		}
	}
}

func fds(t testing.TB) int {
	t.Helper()
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(d)
}

// noLeak checks after everything else of the test that as many descriptors are open as now.
func noLeak(t *testing.T) {
	t.Helper()
	// The runtime's own, for its poller, come with the first file that polls, and stay.
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	w.Close()
	before := fds(t)
	t.Cleanup(func() {
		eventually(t, "descriptors given back", func() bool { return fds(t) <= before })
	})
}

// TestTwoProcesses rings another process on every vector, and is rung.
func TestTwoProcesses(t *testing.T) {
	noLeak(t)
	path := socketPath(t)
	s, _ := serve(t, path)
	for _, tc := range []struct {
		name  string
		first bool // the parent opens first
		fd    bool // the child inherits its connection
	}{{"parent first", true, false}, {"child first", false, false}, {"inherited", true, true}} {
		t.Run(tc.name, func(t *testing.T) {
			var b *loopback.Board
			if tc.first {
				b = open(t, path, board.Options{Side: board.Host})
			}
			spec, files := "loopback:"+path, []*os.File(nil)
			if tc.fd {
				f, err := s.Connect()
				if err != nil {
					t.Fatal(err)
				}
				spec, files = "loopback:fd=3", []*os.File{f}
			}
			cmd := start(t, "echo", board.Agent, spec, files...)
			for _, f := range files {
				f.Close()
			}
			if !tc.first {
				b = open(t, path, board.Options{Side: board.Host})
			}
			m := b.Window().Mem
			if b.PeerDead() {
				t.Error("the peer lives, and is said to be dead")
			}
			m.Store64(wordPeer, uint64(b.Self().Peer)+1)
			peer := board.RingInfo{Method: board.RingIvshmem, Peer: uint32(m.Load64(wordSelf) - 1), Vectors: vectors}
			if got := b.Self(); got.Vectors != vectors || got.Method != board.RingIvshmem {
				t.Fatalf("Self = %+v", got)
			}
			const rings = 100
			for v := uint32(0); v < vectors; v++ {
				r, err := b.Ringer(peer, v)
				if err != nil {
					t.Fatal(err)
				}
				eventually(t, "peer connected", func() bool { return len(b.Peers()) == 1 })
				w := doorbell.NewSleeper(doorbell.SleeperConfig{Doorbell: b.Waiter(v)})
				for i := 0; i < rings; i++ {
					if err := r.Ring(); err != nil {
						t.Fatal(err)
					}
					eventually(t, fmt.Sprintf("answer %d on vector %d", i, v), func() bool {
						why, err := w.Sleep(0)
						if err != nil {
							t.Fatal(err)
						}
						return why&doorbell.Rung != 0
					})
				}
				if n := m.Load64(wordCount + 8*uint64(v)); n != rings {
					t.Errorf("vector %d: the child was rung %d times, want %d", v, n, rings)
				}
				for o := uint32(0); o < vectors; o++ {
					if n, err := b.Waiter(o).Ack(); n != 0 || err != nil {
						t.Errorf("a ring of vector %d arrived on %d: %d, %v", v, o, n, err)
					}
				}
			}
			m.Store64(wordStop, 1)
			if err := cmd.Wait(); err != nil {
				t.Fatalf("child: %v", err)
			}
			m.Store64(wordStop, 0)
			m.Store64(wordPeer, 0)
			eventually(t, "disconnect announced", func() bool { return len(b.Peers()) == 0 })
			if !b.PeerDead() {
				t.Error("the peer went, and is not known to be dead")
			}
			b.Close()
		})
	}
}

// TestKill kills the peer again and again: its lock is free, its going announced, its number used anew, and the
// memory keeps what it wrote.
func TestKill(t *testing.T) {
	noLeak(t)
	path := socketPath(t)
	_, sl := serve(t, path)
	bl := &log{}
	b := open(t, path, board.Options{Side: board.Agent, Logf: bl.f})
	m := b.Window().Mem
	m.Store64(0, 0x0123456789abcdef)
	open := fds(t)
	last := uint64(1) // ours
	for i := 0; i < 8; i++ {
		for len(b.Events()) > 0 {
			<-b.Events()
		}
		m.Store64(wordSelf, 0)
		cmd := start(t, "hold", board.Host, "loopback:"+path)
		id := m.Load64(wordSelf)
		if id <= last { // no number comes back before all others were used
			t.Fatalf("round %d: the child's number is %d, want one above %d", i, int64(id)-1, int64(last)-1)
		}
		last = id
		if b.PeerDead() {
			t.Error("alive, and said to be dead")
		}
		ring, err := b.Ringer(board.RingInfo{Method: board.RingIvshmem, Peer: uint32(id - 1), Vectors: 1}, 0)
		if err != nil {
			t.Fatal(err)
		}
		eventually(t, "connect announced", func() bool { return len(b.Peers()) == 1 })
		if err := ring.Ring(); err != nil {
			t.Error(err)
		}
		<-b.Events()
		_, err = loopback.Open(path, board.Options{Side: board.Host})
		if !errors.Is(err, board.ErrSideTaken) || !strings.Contains(err.Error(), fmt.Sprintf("process %d", cmd.Process.Pid)) {
			t.Fatalf("side taken by %d: %v", cmd.Process.Pid, err)
		}
		cmd.Process.Kill()
		cmd.Wait()
		eventually(t, "disconnect announced", func() bool { return len(b.Peers()) == 0 })
		if !b.PeerDead() {
			t.Error("killed, and not known to be dead")
		}
		if err := ring.Ring(); err != loopback.ErrNoPeer {
			t.Errorf("ring of a dead peer: %v", err)
		}
	}
	if n := fds(t); n > open {
		t.Errorf("%d descriptors after 8 peers came and went, %d before", n, open)
	}
	if v := m.Load64(0); v != 0x0123456789abcdef {
		t.Errorf("memory: %#x", v)
	}
	// Both ends gone, the memory stays.
	b.Close()
	b2, err := loopback.Open(path, board.Options{Side: board.Host})
	if err != nil {
		t.Fatal(err)
	}
	m = b2.Window().Mem
	if v := m.Load64(0); v != 0x0123456789abcdef {
		t.Errorf("memory after both ends went: %#x", v)
	}
	b2.Close()
	if s := sl.String(); !strings.Contains(s, fmt.Sprintf("uid %d", os.Getuid())) {
		t.Errorf("the server's log has no credentials:\n%s", s)
	}
	if s := bl.String(); !strings.Contains(s, "peer 1 connected") || !strings.Contains(s, "peer 1 disconnected") {
		t.Errorf("the board's log:\n%s", s)
	}
}

// TestOneProcess has both sides in this process: the locks must still tell them apart.
func TestOneProcess(t *testing.T) {
	noLeak(t)
	path := socketPath(t)
	serve(t, path)
	var acc dma.Account
	wc := mmio.WriteCombining
	h := open(t, path, board.Options{Side: board.Host, Account: &acc, Kind: &wc})
	if !h.PeerDead() {
		t.Error("nobody is there, and not known to be dead")
	}
	a := open(t, path, board.Options{Side: board.Agent, Account: &acc})
	if h.PeerDead() || a.PeerDead() {
		t.Error("alive, and said to be dead")
	}
	for _, s := range []board.Side{board.Host, board.Agent} {
		_, err := loopback.Open(path, board.Options{Side: s})
		if !errors.Is(err, board.ErrSideTaken) {
			t.Errorf("%s a second time: %v", s, err)
		}
	}
	w := h.Window()
	if w.Addr != 0 || !w.Across || w.Account != &acc || w.Mem.Kind() != mmio.WriteCombining || w.Mem.Size() != 512<<10 || w.Access != dma.DeviceRead|dma.DeviceWrite {
		t.Errorf("host's window: %+v", w)
	}
	w = a.Window()
	if w.Addr != loopback.BusAddr || w.Across || w.Account != nil || w.Mem.Kind() != mmio.Cached {
		t.Errorf("agent's window: %+v", w)
	}
	// The pool is the other way round: the host's memory, across the bus for the agent.
	w, ok := h.Pool()
	if !ok || w.Addr != loopback.PoolAddr || w.Across || w.Account != nil || w.Mem.Kind() != mmio.Cached || w.Mem.Size() != 512<<10 {
		t.Errorf("host's pool: %v, %+v", ok, w)
	}
	ap, ok := a.Pool()
	if !ok || ap.Addr != loopback.PoolAddr || !ap.Across || ap.Account != &acc || ap.Mem.Size() != 512<<10 {
		t.Errorf("agent's pool: %v, %+v", ok, ap)
	}
	const mark = 0x1122334455667788
	ap.Mem.Store64(8, mark)
	aw, hw := a.Window(), h.Window()
	aw.Mem.Store64(8, mark+1)
	if got := w.Mem.Load64(8); got != mark {
		t.Errorf("the agent wrote %#x to the pool, the host reads %#x", uint64(mark), got)
	}
	if got := hw.Mem.Load64(8); got != mark+1 {
		t.Errorf("the agent wrote %#x to the window, the host reads %#x", uint64(mark+1), got)
	}
	eventually(t, "both know each other", func() bool { return len(h.Peers()) == 1 && len(a.Peers()) == 1 })
	r, err := h.Ringer(a.Self(), 3)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Ring(); err != nil {
		t.Fatal(err)
	}
	if n, err := a.Waiter(3).Ack(); n != 1 || err != nil {
		t.Errorf("Ack = %d, %v", n, err)
	}
	if n := testing.AllocsPerRun(100, func() { r.Ring() }); n != 0 {
		t.Errorf("%v allocations a ring", n)
	}
	for _, bad := range []struct {
		info board.RingInfo
		v    uint32
		want string
	}{
		{board.RingInfo{Method: board.RingRegister, Vectors: 1}, 0, "method 2"},
		{board.RingInfo{Method: board.RingIvshmem, Peer: 65536, Vectors: 1}, 0, "65536"},
		{board.RingInfo{Method: board.RingIvshmem, Peer: h.Self().Peer, Vectors: 1}, 0, "our own"},
		{board.RingInfo{Method: board.RingIvshmem, Peer: 7, Vectors: 2}, 2, "vector 2"},
	} {
		if _, err := h.Ringer(bad.info, bad.v); err == nil || !strings.Contains(err.Error(), bad.want) {
			t.Errorf("%+v: %v", bad, err)
		}
	}
	// A peer that polls is not rung: its eventfd stays silent.
	if r, err := h.Ringer(board.RingInfo{Method: board.RingNone}, 0); err != nil || r.Ring() != nil {
		t.Errorf("ringer of a peer that polls: %v", err)
	} else if n, _ := a.Waiter(0).Ack(); n != 0 {
		t.Errorf("a peer that polls was rung")
	}
	// More than the peer really has, and nobody.
	for _, info := range []board.RingInfo{
		{Method: board.RingIvshmem, Peer: a.Self().Peer, Vectors: 9},
		{Method: board.RingIvshmem, Peer: 77, Vectors: 9},
	} {
		r, err := h.Ringer(info, 8)
		if err != nil {
			t.Fatal(err)
		}
		if err := r.Ring(); err != loopback.ErrNoPeer {
			t.Errorf("%+v: %v", info, err)
		}
	}
	if fd := h.Waiter(vectors).FD(); fd != -1 {
		t.Errorf("a waiter beyond the vectors: fd %d", fd)
	}
	a.Close()
	a.Close()
	if !h.PeerDead() {
		eventually(t, "death", h.PeerDead)
	}
	b := open(t, path, board.Options{Side: board.Agent})
	b.Close()
}

// TestNoProc: where /proc is missing the lock is the process', and end and end still exclude and see
// each other, whichever kind of lock they hold.
func TestNoProc(t *testing.T) {
	noLeak(t)
	path := socketPath(t)
	serve(t, path)
	probe := exec.Command("/bin/true")
	probe.SysProcAttr = newMounts()
	if err := probe.Run(); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("no mount namespace to hide /proc in: %v", err)
		}
		t.Skipf("no mount namespace to hide /proc in: %v", err)
	}
	a := open(t, path, board.Options{Side: board.Agent})
	cmd := start(t, "noproc", board.Host, "loopback:"+path)
	if a.PeerDead() {
		t.Error("alive, and said to be dead")
	}
	second := self(t)
	second.Env = append(os.Environ(), childEnv+"=noproc agent loopback:"+path)
	second.SysProcAttr = newMounts()
	out, err := second.CombinedOutput()
	if err == nil || !strings.Contains(string(out), fmt.Sprintf("agent is held by process %d", os.Getpid())) {
		t.Errorf("taken by ours, %d: %v, %s", os.Getpid(), err, out)
	}
	// Last, as it makes our own number unknown: each close of the file drops a process' locks.
	_, err = loopback.Open(path, board.Options{Side: board.Host})
	if !errors.Is(err, board.ErrSideTaken) || !strings.Contains(err.Error(), fmt.Sprintf("process %d", cmd.Process.Pid)) {
		t.Errorf("taken by a lock of process %d: %v", cmd.Process.Pid, err)
	}
	cmd.Process.Kill()
	cmd.Wait()
	eventually(t, "death", a.PeerDead)
}

// TestServerLost: memory, doorbells and the knowledge of the peer's death outlive the server.
func TestServerLost(t *testing.T) {
	noLeak(t)
	path := socketPath(t)
	s, _ := serve(t, path)
	l := &log{}
	h := open(t, path, board.Options{Side: board.Host, Logf: l.f})
	cmd := start(t, "echo", board.Agent, "loopback:"+path)
	eventually(t, "peer", func() bool { return len(h.Peers()) == 1 })
	if h.ServerLost() {
		t.Error("lost too early")
	}
	s.Close()
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("the socket is still there: %v", err)
	}
	eventually(t, "loss seen", h.ServerLost)
	<-h.Events()
	eventually(t, "loss logged", func() bool { return strings.Contains(l.String(), "the server is lost") })
	m := h.Window().Mem
	r, err := h.Ringer(board.RingInfo{Method: board.RingIvshmem, Peer: uint32(m.Load64(wordSelf) - 1), Vectors: vectors}, 2)
	if err != nil {
		t.Fatal(err)
	}
	m.Store64(wordPeer, uint64(h.Self().Peer)+1)
	if err := r.Ring(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "answer", func() bool { n, _ := h.Waiter(2).Ack(); return n == 1 })
	if h.PeerDead() {
		t.Error("alive, and said to be dead")
	}
	cmd.Process.Kill()
	cmd.Wait()
	if !h.PeerDead() {
		t.Error("killed, and not known to be dead")
	}
	_, err = loopback.Open(path, board.Options{})
	if !errors.Is(err, board.ErrAbsent) || !strings.Contains(err.Error(), "boardlink serve") {
		t.Errorf("no server: %v", err)
	}
}

// TestSocketPath: the path's permissions, a live and a dead server on it, and things that are no socket.
func TestSocketPath(t *testing.T) {
	noLeak(t)
	path := socketPath(t)
	cfg := loopback.ServerConfig{Path: path, Size: 1 << 16, Vectors: 1}
	s, err := loopback.NewServer(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode() != os.ModeSocket|0o600 {
		t.Errorf("%v, %v", fi.Mode(), err)
	}
	if _, err := loopback.NewServer(cfg); !errors.Is(err, board.ErrInput) || !strings.Contains(err.Error(), "alive") {
		t.Errorf("second server: %v", err)
	}
	// Somebody else's socket in our place is not removed.
	os.Remove(path)
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
	s.Close()
	if _, err := os.Stat(path); err != nil {
		t.Errorf("removed a socket that was not its own: %v", err)
	}
	// A dead one's is replaced.
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
	if _, err := loopback.Open(path, board.Options{}); !errors.Is(err, board.ErrAbsent) {
		t.Errorf("open of a stale socket: %v", err)
	}
	cfg.Mode = 0o660
	if s, err = loopback.NewServer(cfg); err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode() != os.ModeSocket|0o660 {
		t.Errorf("%v, %v", fi.Mode(), err)
	}
	s.Close()
	if d, err := os.ReadDir(filepath.Dir(path)); err != nil || len(d) != 0 {
		t.Errorf("left behind: %v, %v", d, err)
	}

	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, f := range map[string]func(*loopback.ServerConfig){
		"not a socket": func(*loopback.ServerConfig) {},
		"folder":       func(c *loopback.ServerConfig) { c.Path = filepath.Join(path, "nope", "s") },
		"bytes":        func(c *loopback.ServerConfig) { c.Path += strings.Repeat("x", 100) },
		"power of two": func(c *loopback.ServerConfig) { c.Size = 3 << 16 },
		"65536 wanted": func(c *loopback.ServerConfig) { c.Size = 4096 },
		"0 vectors":    func(c *loopback.ServerConfig) { c.Vectors = 0 },
		"65 vectors":   func(c *loopback.ServerConfig) { c.Vectors = 65 },
	} {
		c := cfg
		f(&c)
		s, err := loopback.NewServer(c)
		if err == nil {
			s.Close()
		}
		if !errors.Is(err, board.ErrInput) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for arg, want := range map[string]string{
		path:                              "is not a socket",
		"":                                "missing",
		strings.Repeat("x", 108):          "108 bytes",
		"fd=x":                            "number",
		"fd=1000000":                      "not an open file",
		"fd=" + fmt.Sprint(os.Stdin.Fd()): "not a socket",
	} {
		if _, err := loopback.Open(arg, board.Options{}); !errors.Is(err, board.ErrInput) || !strings.Contains(err.Error(), want) {
			t.Errorf("Open(%q): %v", arg, err)
		}
	}
	if _, err := board.Open("loopback:"+path+"/x", board.Options{}); err == nil {
		t.Error("opened a path through a file")
	}
}

// TestServersRace starts many servers on one stale socket: one wins.
func TestServersRace(t *testing.T) {
	noLeak(t)
	path := socketPath(t)
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
	won := make(chan *loopback.Server, 8)
	for i := 0; i < cap(won); i++ {
		go func() {
			s, err := loopback.NewServer(loopback.ServerConfig{Path: path, Size: 1 << 16, Vectors: 1})
			if err != nil && !strings.Contains(err.Error(), "alive") {
				t.Error(err)
			}
			won <- s
		}()
	}
	n := 0
	var all []*loopback.Server
	for i := 0; i < cap(won); i++ {
		if s := <-won; s != nil {
			n++
			all = append(all, s)
		}
	}
	for _, s := range all {
		s.Close()
	}
	if n != 1 {
		t.Errorf("%d servers on one path", n)
	}
}

// conversation is a hostile server: it is handed each connection.
func conversation(t *testing.T, f func(c *net.UnixConn)) string {
	path := socketPath(t)
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	stop := make(chan struct{})
	wg.Add(1)
	go func() {
		defer wg.Done()
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Add(1)
			go func() {
				defer wg.Done()
				f(c.(*net.UnixConn))
				<-stop
				c.Close()
			}()
		}
	}()
	t.Cleanup(func() {
		close(stop)
		l.Close()
		wg.Wait()
	})
	return path
}

func say(c *net.UnixConn, val int64, fds ...int) {
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], uint64(val))
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	c.WriteMsgUnix(b[:], oob, nil)
}

func memfd(t *testing.T, size int64) int {
	fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC)
	if err != nil {
		t.Error(err) // not Fatal: conversations call it from goroutines of their own
	}
	if err := unix.Ftruncate(fd, size); err != nil {
		t.Error(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func eventfd(t *testing.T) int {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// TestHostileServer: whatever a socket answers that is no ivshmem server's is one clear error, within
// 5 seconds, and nothing stays behind.
func TestHostileServer(t *testing.T) {
	noLeak(t)
	ev := eventfd(t)
	small, odd := memfd(t, 4096), memfd(t, 1<<20+1)
	ro, err := unix.Open("/proc/self/exe", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(ro) })
	dir, err := unix.Open("/", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(dir) })
	var wg sync.WaitGroup
	// hello is a correct start, up to the memory.
	// Each has memory of its own: they would lock each other out.
	mem := func() int { return memfd(t, 1<<20) }
	hello := func(c *net.UnixConn) { say(c, 0); say(c, 3); say(c, -1, mem()) }
	onDisk, err := os.Create(filepath.Join(dirOnDisk(t), "memory"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { onDisk.Close() })
	if err := onDisk.Truncate(1 << 20); err != nil {
		t.Fatal(err)
	}
	// What our own server does where it has no room for a client is waited for.
	passes := map[string]bool{"closes": true, "closes later": true, "no vectors": true, "silent": true, "silent later": true}
	for _, tc := range []struct {
		name string
		f    func(c *net.UnixConn)
		want string
	}{
		{"memory on a disk", func(c *net.UnixConn) { say(c, 0); say(c, 3); say(c, -1, int(onDisk.Fd())) }, "only memfd, tmpfs and hugetlbfs"},
		{"closes", func(c *net.UnixConn) { c.Close() }, "closed the connection where the protocol version"},
		{"half a message", func(c *net.UnixConn) { c.Write([]byte{0, 0, 0}); c.Close() }, "3 bytes of a message"},
		{"text", func(c *net.UnixConn) { c.Write([]byte("HTTP/1.1 400 Bad Request\r\n\r\n")) }, "protocol version (0 wanted)"},
		{"version", func(c *net.UnixConn) { say(c, 1) }, "protocol version (0 wanted) is 1"},
		{"version with fd", func(c *net.UnixConn) { say(c, 0, ev) }, "is 0 with a file descriptor"},
		{"number", func(c *net.UnixConn) { say(c, 0); say(c, 65536) }, "number (0 to 65535 wanted) is 65536"},
		{"negative number", func(c *net.UnixConn) { say(c, 0); say(c, -1, mem()) }, "is -1 with"},
		{"closes later", func(c *net.UnixConn) { say(c, 0); c.Close() }, "closed the connection where the client's number"},
		{"no memory", func(c *net.UnixConn) { say(c, 0); say(c, 3); say(c, -1) }, "-1 without a file descriptor"},
		{"not memory", func(c *net.UnixConn) { say(c, 0); say(c, 3); say(c, 3, ev) }, "is 3 with"},
		{"two descriptors", func(c *net.UnixConn) { say(c, 0); say(c, 3); say(c, -1, mem(), ev) }, "more than one file descriptor"},
		{"eventfd as memory", func(c *net.UnixConn) { say(c, 0); say(c, 3); say(c, -1, ev) }, "is not a file"},
		{"folder as memory", func(c *net.UnixConn) { say(c, 0); say(c, 3); say(c, -1, dir) }, "is not a file"},
		{"read-only memory", func(c *net.UnixConn) { say(c, 0); say(c, 3); say(c, -1, ro) }, ""},
		{"small memory", func(c *net.UnixConn) { say(c, 0); say(c, 3); say(c, -1, small) }, "4096 bytes"},
		{"odd memory", func(c *net.UnixConn) { say(c, 0); say(c, 3); say(c, -1, odd) }, "multiple of the page"},
		{"no vectors", func(c *net.UnixConn) { hello(c); c.Close() }, "closed the connection where the interrupt vectors"},
		{"vector is memory", func(c *net.UnixConn) { hello(c); say(c, 3, mem()) }, "is not an eventfd"},
		{"vector without fd", func(c *net.UnixConn) { hello(c); say(c, 3) }, "own interrupt vector is 3 without"},
		{"peer's vector is memory", func(c *net.UnixConn) { hello(c); say(c, 5, mem()) }, "vector of peer 5"},
		{"peer's number", func(c *net.UnixConn) { hello(c); say(c, 70000, ev) }, "70000"},
		{"silent", func(c *net.UnixConn) {}, "silent"},
		{"silent later", func(c *net.UnixConn) { hello(c) }, "no interrupt vectors within"},
		{"a byte a time", func(c *net.UnixConn) {
			for i := 0; i < 40; i++ {
				c.Write([]byte{0})
				time.Sleep(100 * time.Millisecond)
			}
		}, ""},
	} {
		// All at once, as three of them wait for the deadline (and t.Parallel would run no more than
		// there are processors).
		path := conversation(t, tc.f)
		wg.Add(1)
		go func() {
			defer wg.Done()
			begin := time.Now()
			b, err := loopback.Open(path, board.Options{})
			if err == nil {
				b.Close()
				t.Errorf("%s: opened", tc.name)
				return
			}
			if d := time.Since(begin); d > 5*time.Second {
				t.Errorf("%s: took %v", tc.name, d)
			}
			if !strings.Contains(err.Error(), tc.want) || strings.Contains(err.Error(), "\n") || !strings.Contains(err.Error(), path) {
				t.Errorf("%s: error: %v\nwant: %s", tc.name, err, tc.want)
			}
			if errors.Is(err, board.ErrInput) == passes[tc.name] || errors.Is(err, board.ErrAbsent) != passes[tc.name] {
				t.Errorf("%s: of the wrong class: %v", tc.name, err)
			}
		}()
	}
	wg.Wait()
}

// dirOnDisk returns a directory that is not on tmpfs.
func dirOnDisk(t *testing.T) string {
	t.Helper()
	for _, base := range []string{os.TempDir(), "/var/tmp", "."} {
		var st unix.Statfs_t
		if err := unix.Statfs(base, &st); err != nil || uint32(st.Type) == unix.TMPFS_MAGIC || uint32(st.Type) == unix.RAMFS_MAGIC {
			continue
		}
		dir, err := os.MkdirTemp(base, "boardlink-test-")
		if err != nil {
			continue
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		return dir
	}
	t.Fatal("a directory on a file system other than tmpfs is missing (the system's temporary one, /var/tmp, this package's)")
	return ""
}

// TestServerCredentials: a server that another user runs is refused, unless the spec names the user.
func TestServerCredentials(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("this test needs root")
		}
		t.Skip("this test needs root")
	}
	noLeak(t)
	dir, err := os.MkdirTemp("", "bl-cred-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe")
	path := filepath.Join(dir, "s")
	cmd.Env = append(os.Environ(), childEnv+"=serve - "+path)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Credential: &syscall.Credential{Uid: 4242, Gid: 4242}}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { cmd.Process.Kill(); cmd.Wait() }()
	eventually(t, "the server", func() bool { _, err := os.Stat(path); return err == nil })
	for arg, want := range map[string]string{
		path:                  "runs as user 4242, neither as root nor as this program's user 0",
		path + ",server=4243": ",server=4242",
		path + ",server=x":    "the number of a user, or any",
		path + ",server=4242": "",
		path + ",server=any":  "",
	} {
		b, err := loopback.Open(arg, board.Options{Side: board.Host})
		if err == nil {
			b.Close()
		}
		if want == "" {
			if err != nil {
				t.Errorf("%s: %v", arg, err)
			}
		} else if err == nil || !errors.Is(err, board.ErrInput) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", arg, err, want)
		}
	}
}

// TestForeignServer: another server's habits that the protocol allows.
func TestForeignServer(t *testing.T) {
	noLeak(t)
	mem, ev := memfd(t, 1<<20), eventfd(t)
	next := make(chan func(*net.UnixConn))
	path := conversation(t, func(c *net.UnixConn) {
		// Bytes one by one, the memory unsealed, more peers, more vectors than we take, no hint at how many.
		for i := 0; i < 16; i++ {
			c.Write([]byte{0})
		}
		say(c, -1, mem)
		say(c, 9, ev)
		say(c, 9, ev)
		say(c, 4) // went before it came
		for i := 0; i < loopback.MaxVectors+3; i++ {
			say(c, 0, ev)
		}
		for f := range next {
			f(c)
		}
	})
	defer close(next)
	l := &log{}
	b := open(t, path, board.Options{Side: board.Agent, Logf: l.f})
	if got := b.Self(); got != (board.RingInfo{Method: board.RingIvshmem, Vectors: loopback.MaxVectors}) {
		t.Errorf("%+v", got)
	}
	if p := b.Peers(); len(p) != 1 || p[0] != 9 {
		t.Errorf("peers %v", p)
	}
	if !strings.Contains(l.String(), "not sealed") {
		t.Errorf("log: %s", l)
	}
	// A peer without a lock, as QEMU: it cannot be known to be dead while it is connected.
	if b.PeerDead() {
		t.Error("a foreign peer is said to be dead")
	}
	r, err := b.Ringer(board.RingInfo{Method: board.RingIvshmem, Peer: 9, Vectors: 3}, 2)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Ring(); err != loopback.ErrNoPeer {
		t.Errorf("a vector that the peer did not connect: %v", err)
	}
	next <- func(c *net.UnixConn) { say(c, 9, ev) }
	eventually(t, "third vector", func() bool { return r.Ring() == nil })
	next <- func(c *net.UnixConn) { say(c, 9) }
	eventually(t, "peer went", func() bool { return len(b.Peers()) == 0 })
	if !b.PeerDead() {
		t.Error("a foreign peer went, and is not known to be dead")
	}
	next <- func(c *net.UnixConn) { say(c, -7) }
	eventually(t, "nonsense taken for a loss", b.ServerLost)
	if b.PeerDead() {
		t.Error("nobody can know that any more")
	}
}

// TestNoDescriptorLeft: a peer's vector that finds no room in this process is not mistaken for the peer's
// going, and the peer's others keep their numbers.
func TestNoDescriptorLeft(t *testing.T) {
	noLeak(t)
	mem, ev := memfd(t, 1<<20), eventfd(t)
	next := make(chan func(*net.UnixConn))
	path := conversation(t, func(c *net.UnixConn) {
		say(c, 0)
		say(c, 0)
		say(c, -1, mem)
		say(c, 0, ev)
		for f := range next {
			f(c)
		}
	})
	defer close(next)
	l := &log{}
	b := open(t, path, board.Options{Side: board.Host, Logf: l.f})

	free, err := unix.FcntlInt(uintptr(ev), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(free)
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	tight := old
	tight.Cur = uint64(free)
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &tight); err != nil {
		t.Fatal(err)
	}
	next <- func(c *net.UnixConn) { say(c, 9, ev) }
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end) && !strings.Contains(l.String(), "lost"); {
		time.Sleep(time.Millisecond)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(l.String(), "vector 0 of peer 9 is lost") {
		t.Fatalf("log: %s", l)
	}
	next <- func(c *net.UnixConn) { say(c, 9, ev) }
	var r [2]doorbell.Ringer
	for v := range r {
		if r[v], err = b.Ringer(board.RingInfo{Method: board.RingIvshmem, Peer: 9, Vectors: 2}, uint32(v)); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "vector 1", func() bool { return r[1].Ring() == nil })
	if err := r[0].Ring(); err != loopback.ErrNoPeer {
		t.Errorf("the vector that was lost: %v", err)
	}
	if b.ServerLost() {
		t.Error("server taken for lost")
	}
}

// TestTurnedAwaySparingly: clients that come and go at the limit of their number make two warnings, not two each time; the debug
// log has all.
func TestTurnedAwaySparingly(t *testing.T) {
	noLeak(t)
	path := socketPath(t)
	warnings := &log{}
	s, l := serve(t, path, func(c *loopback.ServerConfig) { c.MaxClients, c.Warnf = 1, warnings.f })
	dial := func() net.Conn {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	const rounds = 20
	for range rounds {
		c := dial()
		eventually(t, "a client", func() bool { return s.Clients() == 1 })
		d := dial()
		if _, err := d.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("a client too many: %v", err)
		}
		d.Close()
		c.Close()
		eventually(t, "no client", func() bool { return s.Clients() == 0 })
	}
	dial().Close()
	eventually(t, "every line", func() bool {
		all := warnings.String() + l.String()
		return strings.Count(all, "no more clients are taken now") == rounds && strings.Count(all, "clients are taken again; 1 were turned away") == rounds
	})
	if n := strings.Count(warnings.String(), "clients are taken"); n != 2 {
		t.Errorf("%d warnings:\n%s", n, warnings)
	}
}

// TestHostileClients: clients that do not read, that talk, and a thousand of them do not keep others
// from their work.
func TestHostileClients(t *testing.T) {
	noLeak(t)
	path := socketPath(t)
	s, l := serve(t, path, func(c *loopback.ServerConfig) { c.MaxClients, c.Stuck = 8, 300*time.Millisecond })
	h := open(t, path, board.Options{Side: board.Host})
	dial := func() *net.UnixConn {
		for {
			c, err := net.Dial("unix", path)
			if err == nil {
				return c.(*net.UnixConn)
			}
			if !errors.Is(err, unix.EAGAIN) { // the server's backlog is full
				t.Fatal(err)
			}
			time.Sleep(time.Millisecond)
		}
	}
	stuck := dial()
	defer stuck.Close()
	eventually(t, "the stuck client", func() bool { return s.Clients() == 2 })
	// Enough comings and goings to fill the stuck client's socket.
	for i := 0; i < 200; i++ {
		a, err := loopback.Open(path, board.Options{Side: board.Agent})
		if err != nil {
			t.Fatalf("round %d: %v", i, err)
		}
		if got := a.Self().Vectors; got != vectors {
			t.Fatalf("round %d: %d vectors", i, got)
		}
		a.Close()
	}
	talker := dial()
	defer talker.Close()
	talker.Write([]byte("hello"))
	eventually(t, "the talker's dismissal", func() bool { return strings.Contains(l.String(), "sent data") })
	eventually(t, "the stuck client's dismissal", func() bool { return strings.Contains(l.String(), "it has not read for") })

	var crowd []*net.UnixConn
	for i := 0; i < 1000; i++ {
		c := dial()
		crowd = append(crowd, c)
		if i%100 == 99 { // descriptors are ours too: some stay, most go
			for _, c := range crowd[10:] {
				c.Close()
			}
			crowd = crowd[:10]
		}
	}
	if n := s.Clients(); n > 8 {
		t.Errorf("%d clients, 8 allowed", n)
	}
	for _, c := range crowd {
		c.Close()
	}
	eventually(t, "the crowd's going", func() bool { return s.Clients() == 1 })
	a := open(t, path, board.Options{Side: board.Agent})
	r, err := h.Ringer(a.Self(), 0)
	if err != nil {
		t.Fatal(err)
	}
	// The new client has a number of the crowd: until h has heard of all that came and went, rings
	// go to the number's former holder.
	eventually(t, "the new client rung", func() bool {
		r.Ring()
		n, err := a.Waiter(0).Ack()
		if err != nil {
			t.Fatal(err)
		}
		return n > 0
	})
	if h.ServerLost() || a.ServerLost() {
		t.Error("the server let good clients go")
	}
}

// TestSealed: no client can shrink the memory under the others.
func TestSealed(t *testing.T) {
	path := socketPath(t)
	serve(t, path)
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var fd = -1
	for fd < 0 {
		var b [8]byte
		oob := make([]byte, 64)
		_, n, _, _, err := c.(*net.UnixConn).ReadMsgUnix(b[:], oob)
		if err != nil {
			t.Fatal(err)
		}
		if n > 0 {
			cm, err := unix.ParseSocketControlMessage(oob[:n])
			if err != nil {
				t.Fatal(err)
			}
			f, err := unix.ParseUnixRights(&cm[0])
			if err != nil {
				t.Fatal(err)
			}
			fd = f[0]
		}
	}
	defer unix.Close(fd)
	for _, size := range []int64{0, 4096, 2 << 20} {
		if err := unix.Ftruncate(fd, size); err != unix.EPERM {
			t.Errorf("ftruncate to %d: %v", size, err)
		}
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_WRITE); err != unix.EPERM {
		t.Errorf("one more seal: %v", err)
	}
}

// TestQEMU has an ivshmem-doorbell device connect to our server: it is a peer as any other.
func TestQEMU(t *testing.T) {
	qemu, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("qemu-system-x86_64 is missing (Debian: qemu-system-x86)")
		}
		t.Skip("qemu-system-x86_64 is missing (Debian: qemu-system-x86)")
	}
	noLeak(t)
	path := socketPath(t)
	s, l := serve(t, path)
	h := open(t, path, board.Options{Side: board.Host})
	cmd := exec.Command(qemu, "-machine", "q35", "-accel", "tcg", "-m", "16", "-nodefaults", "-display", "none", "-S",
		"-chardev", "socket,path="+path+",id=ivs",
		"-device", fmt.Sprintf("ivshmem-doorbell,vectors=%d,chardev=ivs", vectors))
	var stderr strings.Builder
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		cmd.Process.Kill()
		cmd.Wait()
		if stderr.Len() > 0 {
			t.Errorf("QEMU says: %s", &stderr)
		}
	}()
	eventually(t, "QEMU's device as a peer", func() bool { return len(h.Peers()) == 1 })
	for v := uint32(0); v < vectors; v++ {
		r, err := h.Ringer(board.RingInfo{Method: board.RingIvshmem, Peer: h.Peers()[0], Vectors: vectors}, v)
		if err != nil {
			t.Fatal(err)
		}
		eventually(t, fmt.Sprintf("vector %d", v), func() bool { return r.Ring() == nil })
	}
	if h.PeerDead() {
		t.Error("QEMU is said to be dead")
	}
	// It reads on: comings and goings reach it, and it keeps its connection.
	for i := 0; i < 3; i++ {
		a := open(t, path, board.Options{Side: board.Agent})
		a.Close()
	}
	if s.Clients() < 2 {
		t.Errorf("QEMU left:\n%s", l)
	}
	cmd.Process.Kill()
	cmd.Wait()
	eventually(t, "its going", func() bool { return len(h.Peers()) == 0 })
	if !h.PeerDead() {
		t.Error("QEMU was killed, and is not known to be dead")
	}
}

func BenchmarkRing(b *testing.B) {
	path := socketPath(b)
	serve(b, path)
	h := open(b, path, board.Options{Side: board.Host})
	a := open(b, path, board.Options{Side: board.Agent})
	eventually(b, "peers", func() bool { return len(h.Peers()) == 1 })
	r, err := h.Ringer(a.Self(), 0)
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if err := r.Ring(); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkOpen(b *testing.B) {
	path := socketPath(b)
	serve(b, path)
	for b.Loop() {
		h, err := loopback.Open(path, board.Options{Side: board.Host})
		if err != nil {
			b.Fatal(err)
		}
		h.Close()
	}
}
