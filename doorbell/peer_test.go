package doorbell

import (
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// TestFromPeer: of what a peer passes, eventfds alone are taken, and of those that this side waits for, none that counts down.
func TestFromPeer(t *testing.T) {
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pipe[1])
	if _, err := FromPeer(pipe[0], false); !errors.Is(err, ErrNoEventfd) {
		t.Errorf("a pipe: %v", err)
	}
	if err := unix.Close(pipe[0]); err != nil {
		t.Errorf("the descriptor is not the caller's after an error: %v", err)
	}
	for _, c := range []struct {
		name   string
		flags  int
		value  uint
		waited bool
		want   error
	}{
		{"waited for", 0, 0, true, nil},
		{"waited for, rung", 0, 7, true, nil},
		{"waited for, blocking and nearly full", 0, 1<<32 - 1, true, nil},
		{"semaphore, rung by this side", unix.EFD_SEMAPHORE, 5, false, nil},
		{"semaphore, waited for", unix.EFD_SEMAPHORE, 0, true, ErrSemaphore},
		{"semaphore, waited for, filled", unix.EFD_SEMAPHORE, 1<<32 - 1, true, ErrSemaphore},
	} {
		fd, err := unix.Eventfd(c.value, c.flags|unix.EFD_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		// Both ways to tell agree, whichever of them this kernel has.
		if counts, known := semaphore(fd); known && counts != (c.flags != 0) {
			t.Errorf("%s: the kernel says %v", c.name, counts)
		}
		if got := takesAll(fd); got != (c.flags == 0) {
			t.Errorf("%s: takes all rings: %v", c.name, got)
		}
		e, err := FromPeer(fd, c.waited)
		if !errors.Is(err, c.want) || (err == nil) != (c.want == nil) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
		if err == nil {
			err = e.Close()
		} else {
			err = unix.Close(fd)
		}
		if err != nil {
			t.Errorf("%s: close: %v", c.name, err)
		}
	}
	if IsEventfd(int(os.Stdin.Fd())) {
		t.Error("the standard input is taken for an eventfd")
	}
}
