package vm

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// lockFile takes an exclusive lock on the file, which it makes. It says why it waits, once.
func lockFile(ctx context.Context, path, why string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o666)
	if err != nil {
		return nil, err
	}
	for said := false; ; {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if err != unix.EWOULDBLOCK && err != unix.EINTR {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		if !said {
			Logf("waiting: %s", why)
			said = true
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("wait for %s: %w", path, ctx.Err())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// turn is this process's right to have machines: one process at a time has it, so that
// tests of several packages do not take the processors from each other.
var turn struct {
	mu     sync.Mutex
	users  int
	unlock func()
}

// takeTurn waits for the turn. Each call needs one of giveTurn.
func takeTurn(ctx context.Context) error {
	dir, err := CacheDir()
	if err != nil {
		return err
	}
	turn.mu.Lock()
	defer turn.mu.Unlock()
	if turn.users == 0 {
		// Who waits for the machines holds the queue: a process that gives its turn and wants the next waits behind.
		const why = "another process has virtual machines"
		leave, err := lockFile(ctx, filepath.Join(dir, "queue.lock"), why)
		if err != nil {
			return err
		}
		turn.unlock, err = lockFile(ctx, filepath.Join(dir, "machines.lock"), why)
		leave()
		if err != nil {
			return err
		}
	}
	turn.users++
	return nil
}

func giveTurn() {
	turn.mu.Lock()
	defer turn.mu.Unlock()
	if turn.users--; turn.users == 0 {
		turn.unlock()
		turn.unlock = nil
	}
}
