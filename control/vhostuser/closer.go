package vhostuser

import (
	"fmt"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/doorbell"
)

// maxClosing is how many descriptors may wait for their close before no more are taken from a peer.
const maxClosing = 32

// closeFD closes a descriptor of this process' own making, or one that was found to be an eventfd or
// a file in memory; an error leaves it closed too.
func closeFD(fd int) { _ = unix.Close(fd) }

// closer closes descriptors that a peer sent. What they are is the peer's choice, and close(2) of
// some waits for others: of a socket with SO_LINGER for who should read what was sent, of a file of
// FUSE for its program. A goroutine of its own waits for those, while there are some. The nil closer
// closes at once.
type closer struct {
	mu  sync.Mutex
	fds []int // the first one is being closed
}

// close closes fd, now or later.
func (c *closer) close(fd int) {
	if c == nil || inMemory(fd) || doorbell.IsEventfd(fd) {
		closeFD(fd)
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.fds = append(c.fds, fd); len(c.fds) == 1 {
		go c.run(fd)
	}
}

func (c *closer) run(fd int) {
	for {
		closeFD(fd)
		c.mu.Lock()
		c.fds = c.fds[1:]
		if len(c.fds) == 0 {
			c.mu.Unlock()
			return
		}
		fd = c.fds[0]
		c.mu.Unlock()
	}
}

// full returns an error while too many descriptors wait: then no message is read, as more might come
// with it.
func (c *closer) full() error {
	if c == nil {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.fds) < maxClosing {
		return nil
	}
	return fmt.Errorf("%w: %d of them that were of no use do not close, as sockets with SO_LINGER or files of FUSE can: the connection is given up until they have",
		ErrDescriptors, len(c.fds))
}
