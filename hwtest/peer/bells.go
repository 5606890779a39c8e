package peer

import (
	"encoding/binary"
	"net"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Bells connects to the rendezvous server at path as a client of its own, and returns the eventfds of all others, at least
// least of them: the open files that those ring and are rung by. They live as long as the test.
func Bells(t testing.TB, path string, least int) []int {
	t.Helper()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	var fds []int
	t.Cleanup(func() {
		c.Close()
		for _, fd := range fds {
			unix.Close(fd)
		}
	})
	self := int64(-1)
	for n := 0; ; n++ {
		var b [8]byte
		oob := make([]byte, 64)
		c.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
		k, on, _, _, err := c.(*net.UnixConn).ReadMsgUnix(b[:], oob)
		if err != nil || k != len(b) {
			if len(fds) < least {
				t.Fatalf("%d eventfds of the other clients, %d wanted: %v", len(fds), least, err)
			}
			return fds
		}
		v := int64(binary.LittleEndian.Uint64(b[:]))
		if n == 1 {
			self = v
		}
		if on == 0 {
			continue
		}
		ms, err := unix.ParseSocketControlMessage(oob[:on])
		if err != nil {
			t.Fatal(err)
		}
		got, err := unix.ParseUnixRights(&ms[0])
		if err != nil {
			t.Fatal(err)
		}
		if n == 2 || v == self { // the memory, and our own vectors
			unix.Close(got[0])
			continue
		}
		fds = append(fds, got[0])
	}
}

// Tamper makes shared eventfds blocking ones and keeps them full, or empty, until the returned function is called, which leaves them
// empty and non-blocking.
func Tamper(fds []int, fill bool) (stop func()) {
	done := make(chan struct{})
	var wg sync.WaitGroup
	for _, fd := range fds {
		wg.Add(1)
		go func(fd int) {
			defer wg.Done()
			for {
				// Non-blocking for these calls, so that the attack itself ends; blocking nearly all the time.
				unix.SetNonblock(fd, true)
				if fill {
					// Only an empty one takes so much at once, and it may be rung in between.
					for n := 0; n < 10 && addTo(fd, 1) == nil; n++ {
						empty(fd)
						addTo(fd, 1<<64-2)
					}
				} else {
					empty(fd)
				}
				unix.SetNonblock(fd, false)
				select {
				case <-done:
					unix.SetNonblock(fd, true)
					empty(fd)
					return
				case <-time.After(500 * time.Microsecond):
				}
			}
		}(fd)
	}
	return func() {
		close(done)
		wg.Wait()
	}
}

func addTo(fd int, n uint64) error {
	var b [8]byte
	*(*uint64)(unsafe.Pointer(&b)) = n
	_, err := unix.Write(fd, b[:])
	return err
}

func empty(fd int) {
	var b [8]byte
	unix.Read(fd, b[:])
}
