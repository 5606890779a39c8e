package loopback_test

import (
	"fmt"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/board/loopback"
)

// FuzzServer is a server that says anything. Each message is two bytes: a number from a list, and what
// descriptor goes with it. Whatever comes: a board or an error, no panic, and no descriptor kept.
func FuzzServer(f *testing.F) {
	f.Add([]byte{1, 0, 2, 0, 0, 1, 2, 2, 2, 2, 3, 2, 3, 0})
	f.Add([]byte{1, 0, 2, 0, 0, 1, 3, 2, 3, 2, 2, 2, 3, 0, 4, 2, 2, 0})
	f.Add([]byte{1, 0, 2, 0, 0, 4})
	f.Add([]byte{1, 0, 2, 0, 0, 1, 5, 2, 6, 3})
	f.Fuzz(func(t *testing.T, script []byte) {
		if len(script) > 200 {
			return
		}
		var mem, ev int
		var err error
		if mem, err = unix.MemfdCreate("fuzz", unix.MFD_CLOEXEC); err != nil {
			t.Fatal(err)
		}
		defer unix.Close(mem)
		if err := unix.Ftruncate(mem, loopback.MinSize); err != nil {
			t.Fatal(err)
		}
		if ev, err = unix.Eventfd(0, unix.EFD_CLOEXEC); err != nil {
			t.Fatal(err)
		}
		defer unix.Close(ev)
		p, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		before := fds(t) - 2 // without the socket pair
		vals := [...]int64{-1, 0, 7, 3, 65535, 65536, -2, 1 << 62}
		for i := 0; i+1 < len(script); i += 2 {
			var b [8]byte
			v := vals[int(script[i])%len(vals)]
			for j := range b {
				b[j] = byte(v >> (8 * j))
			}
			var oob []byte
			switch script[i+1] % 5 {
			case 1:
				oob = unix.UnixRights(mem)
			case 2:
				oob = unix.UnixRights(ev)
			case 3:
				oob = unix.UnixRights(ev, mem)
			case 4:
				// More than a client has room for.
				many := make([]int, 20)
				for i := range many {
					many[i] = ev
				}
				oob = unix.UnixRights(many...)
			}
			n := 8
			if script[i+1] >= 0xf0 {
				n = 1 + int(script[i+1])&7
			}
			if err := unix.Sendmsg(p[0], b[:n], oob, nil, unix.MSG_DONTWAIT); err != nil {
				break
			}
		}
		unix.Close(p[0])
		b, err := loopback.Open(fmt.Sprintf("fd=%d", p[1]), board.Options{Side: board.Agent})
		if err == nil {
			b.PeerDead()
			b.Peers()
			b.Close()
		}
		// qemu-user offers the kernel twice the room for control messages and leaks the descriptors that the
		// program has no room for (7.2, do_sendrecvmsg_locked).
		emulated := os.Getenv("BOARDLINK_TEST_EXEC") != ""
		if _, err := os.Stat("/proc/self/fd"); err == nil && !emulated {
			eventually(t, "descriptors given back", func() bool { return fds(t) <= before })
		}
	})
}
