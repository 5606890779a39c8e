package doorbell_test

import (
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/doorbell"
)

const childEnv = "BOARDLINK_DOORBELL_CHILD"

func TestMain(m *testing.M) {
	switch os.Getenv(childEnv) {
	case "":
		goleak.VerifyTestMain(m)
	case "echo":
		os.Exit(echoChild())
	default:
		os.Exit(64)
	}
}

// echoChild rings descriptor 4 for each ring of descriptor 3, until descriptor 5 is rung.
func echoChild() int {
	var e [3]*doorbell.Eventfd
	for i := range e {
		var err error
		if e[i], err = doorbell.FromFD(3 + i); err != nil {
			println(err.Error())
			return 1
		}
	}
	s := doorbell.NewSleeper(doorbell.SleeperConfig{Doorbell: e[0], Stop: e[2]})
	for {
		why, err := s.Sleep(0)
		if err != nil {
			println(err.Error())
			return 1
		}
		if why&doorbell.Rung != 0 {
			if err := e[1].Ring(); err != nil {
				println(err.Error())
				return 1
			}
		}
		s.Found(why&doorbell.Rung != 0)
		if why&doorbell.Stopped != 0 {
			return 0
		}
	}
}

func newEventfd(t testing.TB) *doorbell.Eventfd {
	t.Helper()
	e, err := doorbell.NewEventfd()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.Close() })
	return e
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

// startEcho starts the echo process: it answers rings of the first by rings of the second.
func startEcho(t testing.TB) (to, from *doorbell.Eventfd) {
	to, from = newEventfd(t), newEventfd(t)
	stop := newEventfd(t)
	cmd := self(t)
	cmd.Env = append(os.Environ(), childEnv+"=echo")
	cmd.Stderr = os.Stderr
	for _, e := range []*doorbell.Eventfd{to, from, stop} {
		fd, err := unix.FcntlInt(uintptr(e.FD()), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		cmd.ExtraFiles = append(cmd.ExtraFiles, os.NewFile(uintptr(fd), "eventfd"))
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for _, f := range cmd.ExtraFiles {
		f.Close()
	}
	t.Cleanup(func() {
		if err := stop.Ring(); err != nil {
			t.Error(err)
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("child: %v", err)
		}
	})
	return to, from
}

func TestTwoProcesses(t *testing.T) {
	to, from := startEcho(t)
	s := doorbell.NewSleeper(doorbell.SleeperConfig{Doorbell: from})
	for i := 0; i < 2000; i++ {
		if err := to.Ring(); err != nil {
			t.Fatal(err)
		}
		for end := time.Now().Add(10 * time.Second); ; {
			why, err := s.Sleep(0)
			if err != nil {
				t.Fatal(err)
			}
			s.Found(why&doorbell.Rung != 0)
			if why&doorbell.Rung != 0 {
				break
			}
			if time.Now().After(end) {
				t.Fatalf("round trip %d: no answer", i)
			}
		}
	}
	if c := s.Counters().Snapshot(); c.Wakeups != 2000 || c.Spurious != 0 || c.Rescued != 0 {
		t.Errorf("%+v", c)
	}
}

func TestEventfdWire(t *testing.T) {
	// ivshmem's client-client protocol: 8 bytes, the number 1 in native order.
	e := newEventfd(t)
	if n, err := e.Ack(); n != 0 || err != nil {
		t.Fatalf("nothing pending: Ack = %d, %v", n, err)
	}
	for i := 0; i < 3; i++ {
		if err := e.Ring(); err != nil {
			t.Fatal(err)
		}
	}
	var b [8]byte
	if n, err := unix.Read(e.FD(), b[:]); n != 8 || err != nil || binary.NativeEndian.Uint64(b[:]) != 3 {
		t.Fatalf("read %d, %v, % x; three rings of 1 wanted", n, err, b)
	}
	// What a foreign client writes.
	binary.NativeEndian.PutUint64(b[:], 1)
	unix.Write(e.FD(), b[:])
	unix.Write(e.FD(), b[:])
	if n, err := e.Ack(); n != 2 || err != nil {
		t.Fatalf("Ack = %d, %v, want 2", n, err)
	}
	// A full counter: the ring is pending all the same.
	binary.NativeEndian.PutUint64(b[:], ^uint64(0)-1)
	if _, err := unix.Write(e.FD(), b[:]); err != nil {
		t.Fatal(err)
	}
	if err := e.Ring(); err != nil {
		t.Fatalf("ring of a full counter: %v", err)
	}
	if n, err := e.Ack(); n != ^uint64(0)-1 || err != nil {
		t.Fatalf("Ack = %#x, %v", n, err)
	}
}

func TestEventfdFlags(t *testing.T) {
	fd, err := unix.Eventfd(0, 0)
	if err != nil {
		t.Fatal(err)
	}
	e, err := doorbell.FromFD(fd)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	for _, e := range []*doorbell.Eventfd{e, newEventfd(t)} {
		fl, err := unix.FcntlInt(uintptr(e.FD()), unix.F_GETFL, 0)
		if err != nil || fl&unix.O_NONBLOCK == 0 {
			t.Errorf("flags %#x, %v: not O_NONBLOCK", fl, err)
		}
		fl, err = unix.FcntlInt(uintptr(e.FD()), unix.F_GETFD, 0)
		if err != nil || fl&unix.FD_CLOEXEC == 0 {
			t.Errorf("descriptor flags %#x, %v: not FD_CLOEXEC", fl, err)
		}
	}
}

func TestFromFDRefuses(t *testing.T) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(p[0])
	defer unix.Close(p[1])
	if _, err := doorbell.FromFD(p[1]); err == nil || !strings.Contains(err.Error(), "not an eventfd but pipe") {
		t.Errorf("pipe: %v", err)
	}
	if fl, err := unix.FcntlInt(uintptr(p[1]), unix.F_GETFL, 0); err != nil || fl&unix.O_NONBLOCK != 0 {
		t.Errorf("refused, but changed: flags %#x, %v", fl, err)
	}
	if _, err := doorbell.FromFD(1 << 20); err == nil {
		t.Error("a closed descriptor was taken")
	}
}

func TestEventfdClosed(t *testing.T) {
	e := newEventfd(t)
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	for i := 0; i < 3; i++ {
		if err := e.Ring(); err != doorbell.ErrClosed {
			t.Errorf("Ring: %v", err)
		}
		if _, err := e.Ack(); err != doorbell.ErrClosed {
			t.Errorf("Ack: %v", err)
		}
		e.Close()
	}
}

// TestCloseBesideRing closes while others ring, and takes the descriptor's number for another eventfd
// at once: no ring may reach that.
func TestCloseBesideRing(t *testing.T) {
	for i := 0; i < 200; i++ {
		e, err := doorbell.NewEventfd()
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		for g := 0; g < 2; g++ {
			wg.Add(1)
			go func() {
				defer wg.Done()
				for e.Ring() == nil {
				}
			}()
		}
		for n, _ := e.Ack(); n == 0; n, _ = e.Ack() {
			runtime.Gosched()
		}
		e.Close()
		// Not a bystander's: made after the Close, with the lowest number free.
		next, err := doorbell.NewEventfd()
		if err != nil {
			t.Fatal(err)
		}
		wg.Wait()
		if n, _ := next.Ack(); n != 0 {
			t.Fatalf("round %d: %d rings went to a descriptor that was reused", i, n)
		}
		next.Close()
	}
}

func TestSleepReasons(t *testing.T) {
	door, stop := newEventfd(t), newEventfd(t)
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(p[0])
	defer unix.Close(p[1])
	s := doorbell.NewSleeper(doorbell.SleeperConfig{Doorbell: door, Stop: stop, Extra: p[0], HasExtra: true, ExtraName: "tap9"})
	sleep := func(extra int16, want doorbell.Reason) {
		t.Helper()
		why, err := s.Sleep(extra)
		if err != nil || why != want {
			t.Fatalf("Sleep = %04b, %v, want %04b", why, err, want)
		}
	}
	sleep(doorbell.In, doorbell.Timeout)
	door.Ring()
	sleep(doorbell.In, doorbell.Rung)
	sleep(doorbell.In, doorbell.Timeout) // acknowledged
	unix.Write(p[1], []byte("x"))
	sleep(doorbell.In, doorbell.Extra)
	sleep(0, doorbell.Timeout) // not asked for
	door.Ring()
	sleep(doorbell.In, doorbell.Rung|doorbell.Extra)
	stop.Ring()
	sleep(0, doorbell.Stopped)
	sleep(0, doorbell.Stopped) // stays
	door.Ring()
	sleep(doorbell.In, doorbell.Rung|doorbell.Extra|doorbell.Stopped)

	w := doorbell.NewSleeper(doorbell.SleeperConfig{Extra: p[1], HasExtra: true})
	if why, err := w.Sleep(doorbell.Out); why != doorbell.Extra || err != nil {
		t.Fatalf("a pipe with room: %v, %v", why, err)
	}
}

// TestStopWakes stops loops that sleep for as long as they can.
func TestStopWakes(t *testing.T) {
	stop := newEventfd(t)
	var wg sync.WaitGroup
	fb := doorbell.Fallback{Min: time.Hour, Max: time.Hour}
	for i := 0; i < 4; i++ {
		s := doorbell.NewSleeper(doorbell.SleeperConfig{Doorbell: newEventfd(t), Stop: stop, Fallback: fb})
		wg.Add(1)
		go func() {
			defer wg.Done()
			if why, err := s.Sleep(0); why != doorbell.Stopped || err != nil {
				t.Errorf("Sleep = %v, %v", why, err)
			}
		}()
	}
	time.Sleep(10 * time.Millisecond)
	stop.Ring()
	wg.Wait() // an hour, were it not woken
}

// TestRescue drops every ring: the fallback must find the work, and say so.
func TestRescue(t *testing.T) {
	s := doorbell.NewSleeper(doorbell.SleeperConfig{Doorbell: newEventfd(t)})
	for i := 0; i < 10; i++ {
		if why, err := s.Sleep(0); why != doorbell.Timeout || err != nil {
			t.Fatalf("%v, %v", why, err)
		}
		s.Found(true)
		s.Found(true) // once only
	}
	if c := s.Counters().Snapshot(); c != (doorbell.Counters{Sleeps: 10, Timeouts: 10, Rescued: 10}) {
		t.Errorf("dropped rings: %+v", c)
	}
	s = doorbell.NewSleeper(doorbell.SleeperConfig{})
	for i := 0; i < 10; i++ {
		if why, err := s.Sleep(0); why != doorbell.Timeout || err != nil {
			t.Fatalf("%v, %v", why, err)
		}
		s.Found(i%2 == 0)
	}
	if c := s.Counters().Snapshot(); c != (doorbell.Counters{Sleeps: 10, Timeouts: 10, Polled: 5}) {
		t.Errorf("no doorbell: %+v", c)
	}
}

func TestSpurious(t *testing.T) {
	e := newEventfd(t)
	s := doorbell.NewSleeper(doorbell.SleeperConfig{Doorbell: e})
	for i := 0; i < 6; i++ {
		e.Ring()
		if why, err := s.Sleep(0); why != doorbell.Rung || err != nil {
			t.Fatalf("%v, %v", why, err)
		}
		s.Found(i < 4)
	}
	if c := s.Counters().Snapshot(); c != (doorbell.Counters{Sleeps: 6, Wakeups: 6, Spurious: 2}) {
		t.Errorf("%+v", c)
	}
}

// TestBadFDs: descriptors that went bad are an error with a name, not a loop.
func TestBadFDs(t *testing.T) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(p[0])
	unix.Close(p[1])
	s := doorbell.NewSleeper(doorbell.SleeperConfig{Extra: p[0], HasExtra: true, ExtraName: "tap9"})
	_, err := s.Sleep(doorbell.In)
	var fe *doorbell.FDError
	if !errors.As(err, &fe) || fe.FD != p[0] || fe.Revents&unix.POLLHUP == 0 || !strings.Contains(err.Error(), "tap9") {
		t.Errorf("hung up: %v", err)
	}
	s = doorbell.NewSleeper(doorbell.SleeperConfig{Doorbell: badFD(1 << 20)})
	if _, err := s.Sleep(0); !errors.As(err, &fe) || fe.Revents != unix.POLLNVAL || fe.Name != "doorbell" {
		t.Errorf("closed: %v", err)
	}
}

type badFD int

func (b badFD) FD() int            { return int(b) }
func (badFD) Ack() (uint64, error) { return 0, nil }

func TestCounted(t *testing.T) {
	var c doorbell.Counters
	e := newEventfd(t)
	r := &doorbell.Counted{R: e, C: &c}
	r.Ring()
	r.Ring()
	e.Close()
	if err := r.Ring(); err != doorbell.ErrClosed {
		t.Error(err)
	}
	if c.Snapshot() != (doorbell.Counters{Rings: 2, RingErrors: 1}) {
		t.Errorf("%+v", c)
	}
}

// TestNoAllocations holds everything that happens for a batch to none.
func TestNoAllocations(t *testing.T) {
	e, stop := newEventfd(t), newEventfd(t)
	s := doorbell.NewSleeper(doorbell.SleeperConfig{Doorbell: e, Stop: stop, Extra: 0, HasExtra: true})
	r := &doorbell.Counted{R: e, C: s.Counters()}
	fast := doorbell.NewSleeper(doorbell.SleeperConfig{Fallback: doorbell.Fallback{PollMin: time.Microsecond, PollMax: time.Microsecond}})
	for name, f := range map[string]func(){
		"ring and ack":  func() { e.Ring(); e.Ack() },
		"ack of none":   func() { e.Ack() },
		"ring, sleep":   func() { r.Ring(); s.Sleep(0); s.Found(true) },
		"sleep, polled": func() { fast.Sleep(0); fast.Found(true) },
	} {
		if n := testing.AllocsPerRun(100, f); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

func TestFanout(t *testing.T) {
	before := fds(t)
	src, err := doorbell.NewEventfd()
	if err != nil {
		t.Fatal(err)
	}
	f, err := doorbell.NewFanout(src, 4)
	if err != nil {
		t.Fatal(err)
	}
	ends := []doorbell.Waiter{f.Waiter(0), f.Waiter(1), f.Waiter(2)}
	for round := 0; round < 100; round++ {
		src.Ring()
		for i, end := range ends {
			s := doorbell.NewSleeper(doorbell.SleeperConfig{Doorbell: end, Fallback: doorbell.Fallback{Min: 10 * time.Second, Max: 10 * time.Second}})
			if why, err := s.Sleep(0); why != doorbell.Rung || err != nil {
				t.Fatalf("round %d, consumer %d: %v, %v", round, i, why, err)
			}
		}
	}
	if n, err := f.Waiter(3).Ack(); n != 0 || err != nil { // nobody had taken it
		t.Errorf("an end that was not taken was rung %d times: %v", n, err)
	}
	f.Close()
	f.Close()
	if err := f.Err(); err != nil {
		t.Error(err)
	}
	src.Close()

	// Nothing to share.
	f, err = doorbell.NewFanout(doorbell.None, 2)
	if err != nil {
		t.Fatal(err)
	}
	if fd := f.Waiter(1).FD(); fd != -1 {
		t.Errorf("FD = %d", fd)
	}
	f.Close()
	if _, err := doorbell.NewFanout(doorbell.None, 0); err == nil {
		t.Error("a fan-out to nobody")
	}

	// A source that fails.
	f, err = doorbell.NewFanout(badFD(1<<20), 1)
	if err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(10 * time.Second); f.Err() == nil; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("no error of a source that cannot be polled")
		}
	}
	f.Close()
	if after := fds(t); after != before {
		t.Errorf("%d descriptors open, %d before", after, before)
	}
}

func fds(t testing.TB) int {
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(d)
}

func BenchmarkRing(b *testing.B) {
	e := newEventfd(b)
	b.ReportAllocs()
	for b.Loop() {
		e.Ring()
	}
}

func BenchmarkRingAck(b *testing.B) {
	e := newEventfd(b)
	b.ReportAllocs()
	for b.Loop() {
		e.Ring()
		e.Ack()
	}
}

// BenchmarkSharedRing rings an eventfd that a peer has too, BenchmarkSharedRingAck acknowledges each ring.
func BenchmarkSharedRing(b *testing.B) {
	e := sharedEventfd(b)
	b.ReportAllocs()
	for b.Loop() {
		e.Ring()
	}
}

func BenchmarkSharedRingAck(b *testing.B) {
	e := sharedEventfd(b)
	b.ReportAllocs()
	for b.Loop() {
		e.Ring()
		e.Ack()
	}
}

func sharedEventfd(b *testing.B) *doorbell.Eventfd {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		b.Fatal(err)
	}
	e, err := doorbell.FromFD(fd)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { e.Close() })
	return e
}

func BenchmarkRingSleepFound(b *testing.B) {
	e, stop := newEventfd(b), newEventfd(b)
	s := doorbell.NewSleeper(doorbell.SleeperConfig{Doorbell: e, Stop: stop})
	b.ReportAllocs()
	for b.Loop() {
		e.Ring()
		s.Sleep(0)
		s.Found(true)
	}
}

// BenchmarkRoundTrip rings another process, which rings back; both sleep in ppoll in between.
func BenchmarkRoundTrip(b *testing.B) {
	to, from := startEcho(b)
	s := doorbell.NewSleeper(doorbell.SleeperConfig{Doorbell: from})
	b.ReportAllocs()
	for b.Loop() {
		to.Ring()
		for {
			why, err := s.Sleep(0)
			if err != nil {
				b.Fatal(err)
			}
			s.Found(why&doorbell.Rung != 0)
			if why&doorbell.Rung != 0 {
				break
			}
		}
	}
}
