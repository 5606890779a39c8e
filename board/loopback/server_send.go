package loopback

import (
	"encoding/binary"
	"fmt"
	"io"
	"time"

	"golang.org/x/sys/unix"
)

func (c *client) closeVectors() {
	for _, fd := range c.vectors {
		unix.Close(fd)
	}
	c.vectors = nil
}

// flushAll sends what waits, to whoever has room; s.mu is held.
func (s *Server) flushAll() {
	for again := true; again; {
		again = false
		for _, c := range s.clients {
			if c.flushing || len(c.queue) == 0 {
				continue
			}
			_, err := s.sendRaw(c)
			if err == nil && len(c.queue) > maxQueue {
				err = fmt.Errorf("%d messages unread", len(c.queue))
			}
			if err != nil {
				// The others now have one more message: go round again.
				s.remove(c, "cannot be sent to: "+err.Error())
				again = true
				break
			}
			if len(c.queue) > 0 {
				c.flushing = true
				s.wg.Add(1)
				go s.flushLater(c)
			}
		}
	}
}

// sendRaw is send on the client's connection; s.mu is held. It never blocks: no other write is under way
// on the connection, and the callback always returns true. Nor is the write left waiting in there: a
// full socket is one cause of three, and the other two have no event.
func (s *Server) sendRaw(c *client) (progress bool, err error) {
	e := c.raw.Write(func(fd uintptr) bool {
		progress, err = s.send(c, int(fd))
		return true
	})
	if err == nil {
		err = e
	}
	return progress, err
}

// send writes messages until the queue is empty or the socket is full; s.mu is held. It tells
// whether any went out.
func (s *Server) send(c *client, fd int) (progress bool, err error) {
	for len(c.queue) > 0 {
		var b [msgSize]byte
		m := c.queue[0]
		binary.LittleEndian.PutUint64(b[:], uint64(m.val))
		var oob []byte
		if m.fd >= 0 {
			oob = unix.UnixRights(m.fd)
		}
		n, err := unix.SendmsgN(fd, b[:], oob, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.EAGAIN, err == unix.ENOBUFS, err == unix.ETOOMANYREFS:
			// The last: too many descriptors of this user lie unread in sockets.
			return progress, nil
		case err != nil:
			return progress, err
		case n != msgSize:
			return progress, io.ErrShortWrite
		}
		c.queue = c.queue[1:]
		progress = true
	}
	c.queue = nil
	return progress, nil
}

// flushLater sends the rest of a queue as the client reads, and gives the client up when it does
// not.
func (s *Server) flushLater(c *client) {
	defer s.wg.Done()
	for end := time.Now().Add(s.cfg.Stuck); ; {
		s.mu.Lock()
		if c.gone {
			s.mu.Unlock()
			return
		}
		progress, err := s.sendRaw(c)
		if progress {
			end = time.Now().Add(s.cfg.Stuck)
		}
		if err == nil && len(c.queue) > 0 && time.Now().After(end) {
			err = fmt.Errorf("it has not read for %v, with %d messages waiting", s.cfg.Stuck, len(c.queue))
		}
		if err != nil {
			s.remove(c, "cannot be sent to: "+err.Error())
			s.flushAll()
			s.mu.Unlock()
			return
		}
		if len(c.queue) == 0 {
			c.flushing = false
			s.mu.Unlock()
			return
		}
		s.mu.Unlock()
		select {
		case <-s.done:
			return
		case <-time.After(10 * time.Millisecond):
		}
	}
}
