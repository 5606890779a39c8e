package export

import (
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// sender is what a connection's replies are sent with. It belongs to whoever has set conn.sending.
type sender struct {
	ops    []*op    // replies that are not sent completely
	ended  []*op    // those that are, to be settled
	pieces [][]byte // what is left of them
	n      int      // what the last system call sent, in bytes
	err    error    // what it failed with
}

// Flush implements block.Owner: it sends the replies that there are, as far as the client takes them at once.
func (c *conn) Flush() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.sending || c.over {
		return // whoever sends looks for more before it stops
	}
	c.sending = true
	c.users++
	defer c.leave()
	for c.next() {
		c.mu.Unlock()
		c.send()
		c.snd.advance()
		c.mu.Lock()
		c.settleSent()
		if err := c.snd.err; err != nil && err != unix.EINTR {
			// write goes on with it. It finds the same error, unless it is that the client does not read.
			atomic.AddUint64(&c.s.n.Stalls, 1)
			c.stalled = true
			c.more.Signal()
			return
		}
	}
	c.sending = false
}

// write sends what the client did not take at once, until the connection ends.
func (c *conn) write() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		for !c.stalled && !c.over {
			c.more.Wait()
		}
		for !c.over && c.next() {
			c.mu.Unlock()
			if c.send(); c.snd.err == unix.EAGAIN {
				if c.snd.err = c.await(); c.snd.err == nil {
					c.send()
				}
			}
			c.snd.advance()
			c.mu.Lock()
			c.settleSent()
			if err := c.snd.err; err != nil && err != unix.EINTR && err != unix.EAGAIN && !c.over {
				c.over = true
				c.sock.shutdown() // run sees it
			}
		}
		if c.over {
			break
		}
		c.stalled, c.sending = false, false
	}
	c.room.Broadcast()
	c.leave()
}

// await waits until the client has taken something. c.sending is ours.
func (c *conn) await() error {
	_, err := unix.Poll([]unix.PollFd{{Fd: int32(c.sock.fd), Events: unix.POLLOUT}}, -1)
	return err
}

// send is one system call. c.sending is ours.
func (c *conn) send() {
	c.snd.n, c.snd.err = unix.SendmsgBuffers(c.sock.fd, c.snd.pieces, nil, nil, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT)
}

// next adds replies to what is being sent, as many as one system call takes, and tells whether there are any. c.mu is held, and c.sending
// is ours.
func (c *conn) next() bool {
	s := &c.snd
	i := 0
	for i < len(c.out) && len(s.pieces)+2 <= sendVectors {
		o := c.out[i]
		s.ops, s.pieces, o.pieces = append(s.ops, o), append(s.pieces, o.head[:]), 1
		if len(o.Data) > 0 {
			s.pieces, o.pieces = append(s.pieces, o.Data), 2
		}
		i++
	}
	if i > 0 {
		n := copy(c.out, c.out[i:])
		for k := n; k < len(c.out); k++ {
			c.out[k] = nil
		}
		c.out = c.out[:n]
	}
	return len(s.pieces) > 0
}

// advance drops what was sent.
func (s *sender) advance() {
	if s.err != nil {
		return
	}
	i, k, n := 0, 0, s.n
	for i < len(s.pieces) && n >= len(s.pieces[i]) {
		n -= len(s.pieces[i])
		i++
		if s.ops[k].pieces--; s.ops[k].pieces == 0 {
			s.ended = append(s.ended, s.ops[k])
			k++
		}
	}
	left := copy(s.pieces, s.pieces[i:])
	for j := left; j < len(s.pieces); j++ {
		s.pieces[j] = nil
	}
	if s.pieces = s.pieces[:left]; left > 0 {
		s.pieces[0] = s.pieces[0][n:]
	}
	left = copy(s.ops, s.ops[k:])
	for j := left; j < len(s.ops); j++ {
		s.ops[j] = nil
	}
	s.ops = s.ops[:left]
}

// settleSent gives back what the requests took whose replies are sent. c.mu is held.
func (c *conn) settleSent() {
	for i, o := range c.snd.ended {
		c.snd.ended[i] = nil
		atomic.AddUint64(&c.s.n.Replies, 1)
		c.settle(o)
	}
	c.snd.ended = c.snd.ended[:0]
}
