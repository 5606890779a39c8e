package tunbridge

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// udpFlow sends a datagram from a port of the interface's own address, 10.9.0.1, to 10.9.0.2:9.
func udpFlow(t *testing.T, port uint16) {
	t.Helper()
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(s)
	if err := unix.Bind(s, &unix.SockaddrInet4{Port: int(port), Addr: [4]byte{10, 9, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Sendto(s, []byte("a flow's frame"), 0, &unix.SockaddrInet4{Port: 9, Addr: [4]byte{10, 9, 0, 2}}); err != nil {
		t.Fatal(err)
	}
}

// portOf returns the source port of a frame, 0 where it is not of one of the flows.
func portOf(it *Iface, f []byte) uint16 {
	f = f[it.HeaderLen():]
	if it.Type() == TAP {
		f = f[14:]
	}
	if len(f) < 28 || f[0] != 0x45 || f[9] != unix.IPPROTO_UDP || binary.BigEndian.Uint16(f[22:]) != 9 {
		return 0
	}
	return binary.BigEndian.Uint16(f[20:])
}

// reply is a frame of a flow in the other direction.
func reply(it *Iface, port uint16) []byte {
	f := make([]byte, it.HeaderLen())
	if it.Type() == TAP {
		m := it.MAC()
		f = append(append(append(f, m[:]...), peerMAC[:]...), 8, 0)
	}
	udp := []byte{0, 9, byte(port >> 8), byte(port), 0, 12, 0, 0, 1, 2, 3, 4} // no checksum: allowed over IPv4
	return append(f, ipv4(unix.IPPROTO_UDP, [4]byte{10, 9, 0, 2}, [4]byte{10, 9, 0, 1}, udp)...)
}

// arrives waits for the frame of a flow and returns the queue that it came by.
func arrives(t *testing.T, it *Iface, port uint16) int {
	t.Helper()
	buf := make([]byte, HeaderLen+MaxFrameLen)
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); {
		var fds []unix.PollFd
		for i := 0; i < it.Queues(); i++ {
			q := it.Queue(i)
			for {
				n, err := q.Read(buf)
				if err == ErrAgain {
					break
				}
				if err != nil {
					t.Fatal(err)
				}
				if portOf(it, buf[:n]) == port {
					return i
				}
			}
			fds = append(fds, unix.PollFd{Fd: int32(q.FD()), Events: unix.POLLIN})
		}
		unix.Poll(fds, 1000)
	}
	t.Fatalf("the frame from port %d does not arrive", port)
	return -1
}

// TestIfaceQueues: a flow comes out of the queue that its last frame was written to, as long as that queue is in use; queues
// out of use get nothing.
func TestIfaceQueues(t *testing.T) {
	forModes(t, func(t *testing.T, cfg Config) {
		fds := openFDs()
		cfg.Queues = 4
		it := mustOpen(t, cfg)
		if it.Queues() != 4 || it.InUse() != 1 || it.Queue(0) != it || len(it.Warnings()) != 0 {
			t.Fatalf("%d queues, %d in use, %q", it.Queues(), it.InUse(), it.Warnings())
		}
		ready(t, it, "10.9.0.1/24")
		neighbour(t, it, []byte{10, 9, 0, 2})
		for i := 0; i < 4; i++ {
			q := it.Queue(i)
			if q.Name() != "t0" || q.MTU() != 1500 || q.MAC() != it.MAC() || q.Index() != it.Index() || q.HeaderLen() != it.HeaderLen() || q.Type() != it.Type() {
				t.Errorf("queue %d is of another interface", i)
			}
		}
		const flows = 24
		check := func(inUse int, want func(f int) int) {
			t.Helper()
			for f := 0; f < flows; f++ {
				port := uint16(20000 + f)
				udpFlow(t, port)
				if got := arrives(t, it, port); got >= inUse || want != nil && got != want(f) {
					t.Errorf("with %d queues in use: flow %d came by queue %d", inUse, f, got)
				}
			}
		}
		check(1, nil)
		if err := it.SetQueues(4); err != nil || it.InUse() != 4 {
			t.Fatal(err)
		}
		for _, shift := range []int{0, 1} { // flows follow
			queue := func(f int) int { return (f + shift) % 4 }
			for f := 0; f < flows; f++ {
				if _, err := it.Queue(queue(f)).Write(reply(it, uint16(20000+f))); err != nil {
					t.Fatal(err)
				}
			}
			check(4, queue)
		}
		if err := it.SetQueues(2); err != nil {
			t.Fatal(err)
		}
		check(2, nil)
		// Out of use, it takes frames all the same.
		if _, err := it.Queue(3).Write(reply(it, 20000)); err != nil {
			t.Error(err)
		}
		if err := it.SetQueues(1); err != nil {
			t.Fatal(err)
		}
		check(1, nil)
		for i := 0; i < 3; i++ { // on and off, in one step
			if err := errors.Join(it.SetQueues(4), it.SetQueues(1)); err != nil {
				t.Fatal(err)
			}
		}
		for _, n := range []int{0, -1, 5} {
			if it.SetQueues(n) == nil {
				t.Errorf("%d queues can be in use", n)
			}
		}
		if err := it.Queue(1).Close(); err != nil || kernelLink(t, "t0") == nil {
			t.Errorf("Close of a queue: %v", err)
		}
		if err := it.Close(); err != nil || it.SetQueues(2) != ErrClosed {
			t.Error(err)
		}
		if kernelLink(t, "t0") != nil {
			t.Error("the interface outlived Close")
		}
		checkFDs(t, fds)
	})
}

// TestIfaceQueuesPersist: what is there is attached to with the queues it can have.
func TestIfaceQueuesPersist(t *testing.T) {
	forModes(t, func(t *testing.T, cfg Config) {
		fds := openFDs()
		for _, made := range []int{1, 4} {
			c := cfg
			c.Name, c.Persist, c.Queues = fmt.Sprintf("t%d", made), true, made
			mustOpen(t, c).Close()
			for _, n := range []int{0, 1, 2, 8} {
				c.Queues = n
				it := mustOpen(t, c)
				want := max(n, 1)
				if made == 1 {
					want = 1
				}
				if it.Queues() != want || !it.Attached() {
					t.Errorf("made with %d, opened with %d: it has %d", made, n, it.Queues())
				}
				if err := it.SetQueues(it.Queues()); err != nil {
					t.Error(err)
				}
				if w := strings.Join(it.Warnings(), "\n"); (made == 1 && n > 1) != strings.Contains(w, "ip link del t1") {
					t.Errorf("made with %d, opened with %d: warnings %q", made, n, w)
				}
				// Held: by one queue or several, nobody else gets it.
				_, err := Open(c)
				if !errors.Is(err, unix.EBUSY) {
					t.Errorf("made with %d: it is opened twice: %v", made, err)
				}
				wantUserError(t, err, "another process")
				it.Close()
			}
			if err := Remove(c.Name); err != nil {
				t.Error(err)
			}
		}
		checkFDs(t, fds)
	})
}

// TestIfaceQueuesOldKernel: without IFF_MULTI_QUEUE there is one queue, and a word about it.
func TestIfaceQueuesOldKernel(t *testing.T) {
	ifaceNS(t)
	refuse(t, refusal{unix.TUNGETFEATURES, 0, unix.EINVAL})
	fds := openFDs()
	for _, typ := range []LinkType{TAP, TUN} {
		it := mustOpen(t, Config{Name: "t0", Type: typ, Queues: 4})
		if it.Queues() != 1 || len(it.Warnings()) != 1 || !strings.Contains(it.Warnings()[0], "IFF_MULTI_QUEUE") {
			t.Errorf("%d queues, %q", it.Queues(), it.Warnings())
		}
		it.Close()
	}
	checkFDs(t, fds)
	for _, n := range []int{-1, MaxQueues + 1} {
		_, err := Open(Config{Name: "t0", Queues: n})
		wantUserError(t, err, "queues")
	}
}
