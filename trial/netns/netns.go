//go:build linux

// Package netns makes network namespaces that leave nothing behind, runs code and starts
// processes inside them, and enters a user namespace where the caller is not root.
//
// In the room: anonymous namespaces held by a file descriptor, the thread juggling that Go needs
// to work in them, the re-execution in a user namespace and what the kernel may say against it.
// Never in it: interfaces, addresses, routes (use netlink with FD), traffic.
package netns

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

// threadNS is the namespace of the calling thread; /proc/self/ns/net would be the main thread's.
const threadNS = "/proc/thread-self/ns/net"

// ErrClosed is returned by the methods of a closed NS.
var ErrClosed = errors.New("network namespace: already closed")

// NS is a network namespace held open by a descriptor. It has no name: it goes when the
// descriptor, the last process inside it and the last socket made in it are gone. Its methods may
// be called from any goroutine.
type NS struct {
	mu sync.Mutex
	fd int // -1 once closed
}

// New makes a network namespace of its own with lo up. It needs CAP_SYS_ADMIN and CAP_NET_ADMIN
// (see NeedsUser).
func New() (*NS, error) {
	n := &NS{fd: -1}
	err := onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			if errors.Is(err, unix.EPERM) {
				return fmt.Errorf("make a network namespace: %w: run as root or in a user namespace", err)
			}
			if errors.Is(err, unix.ENOSPC) {
				return fmt.Errorf("make a network namespace: %w: the limit user.max_net_namespaces is reached", err)
			}
			return fmt.Errorf("make a network namespace: %w", err)
		}
		fd, err := openNS(threadNS)
		if err != nil {
			return err
		}
		if err := loUp(); err != nil {
			unix.Close(fd)
			return err
		}
		n.fd = fd
		return nil
	})
	if err != nil {
		n.Close() // restoring the thread may have failed after the namespace was made
		return nil, err
	}
	return n, nil
}

// Open holds the network namespace of the process pid. It needs the right to read
// /proc/<pid>/ns/net.
func Open(pid int) (*NS, error) {
	fd, err := openNS(fmt.Sprintf("/proc/%d/ns/net", pid))
	if err != nil {
		return nil, err
	}
	return &NS{fd: fd}, nil
}

// Current holds the network namespace of the calling thread, which for a goroutine that is not
// locked to a thread is the namespace of the process.
func Current() (*NS, error) {
	fd, err := openNS(threadNS)
	if err != nil {
		return nil, err
	}
	return &NS{fd: fd}, nil
}

// FD returns the descriptor of the namespace, for setns and netlink; it belongs to n and is valid
// until Close. It is -1 once closed.
func (n *NS) FD() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.fd
}

// Path returns the name under which other programs reach the namespace while this process runs
// and n is open, for instance "nsenter --net=<path>".
func (n *NS) Path() string {
	return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), n.FD())
}

// ID returns the device and inode numbers of the namespace: two NS are the same namespace if and
// only if both are equal.
func (n *NS) ID() (dev, ino uint64, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.fd < 0 {
		return 0, 0, ErrClosed
	}
	var st unix.Stat_t
	if err := unix.Fstat(n.fd, &st); err != nil {
		return 0, 0, fmt.Errorf("stat a network namespace: %w", err)
	}
	return uint64(st.Dev), st.Ino, nil
}

// Close lets the namespace go; calls of Do and Start under way keep it until they return. A
// second Close does nothing.
func (n *NS) Close() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.fd < 0 {
		return nil
	}
	err := unix.Close(n.fd)
	n.fd = -1
	return err
}

// Do runs f inside the namespace and returns its error. f runs on a goroutine of its own, locked
// to a thread; goroutines that f starts are NOT in the namespace, sockets that f makes stay in it
// for good. Should the thread not find its way back, it is discarded.
func (n *NS) Do(f func() error) error {
	fd, err := n.dup()
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return onThread(func() error {
		if err := enter(fd); err != nil {
			return err
		}
		return f()
	})
}

// Start starts cmd inside the namespace, as cmd.Start does. With SysProcAttr.Pdeathsig the child
// gets the signal when this process ends, not when some thread of it does: the kernel counts the
// death of the parent's thread, so the thread is kept until the child is gone.
func (n *NS) Start(cmd *exec.Cmd) error {
	fd, err := n.dup()
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if cmd.SysProcAttr == nil || cmd.SysProcAttr.Pdeathsig == 0 {
		return onThread(func() error {
			if err := enter(fd); err != nil {
				return err
			}
			return cmd.Start()
		})
	}
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the child
		if err := enter(fd); err != nil {
			started <- err
			return
		}
		if err := cmd.Start(); err != nil {
			started <- err
			return
		}
		// Not reaped yet, so the number is still the child's.
		pidfd, err := unix.PidfdOpen(cmd.Process.Pid, 0)
		if err != nil {
			cmd.Process.Kill()
			cmd.Wait()
			started <- fmt.Errorf("watch process %d: %w", cmd.Process.Pid, err)
			return
		}
		started <- nil
		for {
			err := unix.Waitid(unix.P_PIDFD, pidfd, nil, unix.WEXITED|unix.WNOWAIT, nil)
			if !errors.Is(err, unix.EINTR) {
				break
			}
		}
		unix.Close(pidfd)
	}()
	return <-started
}

// dup returns a descriptor that a Close meanwhile does not take away.
func (n *NS) dup() (int, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.fd < 0 {
		return -1, ErrClosed
	}
	fd, err := unix.FcntlInt(uintptr(n.fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("duplicate the descriptor of a network namespace: %w", err)
	}
	return fd, nil
}

func enter(fd int) error {
	if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter a network namespace: %w", err)
	}
	return nil
}

func openNS(path string) (int, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open the network namespace %s: %w", path, err)
	}
	return fd, nil
}

// onThread runs f on a locked thread and brings the thread back to its namespace. When that
// fails the goroutine ends without unlocking, at which the runtime ends the thread.
func onThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		// Stands when f ends the goroutine (testing's FailNow does).
		err := errors.New("network namespace: the function did not return")
		defer func() { done <- err }()
		runtime.LockOSThread()
		home, oerr := openNS(threadNS)
		if oerr != nil {
			err = oerr
			return
		}
		defer unix.Close(home)
		defer func() {
			if rerr := unix.Setns(home, unix.CLONE_NEWNET); rerr != nil {
				if err == nil {
					err = fmt.Errorf("leave a network namespace: %w", rerr)
				}
				return
			}
			runtime.UnlockOSThread()
		}()
		err = f()
	}()
	return <-done
}

// loUp raises lo in the namespace of the calling thread.
func loUp() error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("raise lo: %w", err)
	}
	defer unix.Close(s)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return fmt.Errorf("raise lo: %w", err)
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, ifr); err != nil {
		return fmt.Errorf("raise lo: %w", err)
	}
	return nil
}
