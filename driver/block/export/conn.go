package export

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/driver/block"
	"github.com/boardlink/boardlink/nbd"
)

const (
	// readBuffer holds what was read of a client's requests, in bytes.
	readBuffer = 128 << 10
	// directRead is from how many missing bytes on the data of a write are read straight to their place.
	directRead = 16 << 10
	// sendVectors is how many pieces of replies one system call sends at most.
	sendVectors = 64
)

// conn is a client's connection. One goroutine reads requests (run). Replies are sent by whoever has them, as far as that does not block;
// what the client does not take at once is sent by a second goroutine (write).
type conn struct {
	s     *Server
	sock  *socket
	ended chan struct{}

	// run's own.
	buf     []byte
	r, w    int // what of buf is not parsed yet
	batch   []*block.Request
	refused bool // there are replies that nobody sends yet
	info    block.Info

	mu       sync.Mutex // guards what follows
	room     sync.Cond  // there is room for another request, or the connection has ended
	more     sync.Cond  // write has something to do
	requests int        // in flight: until their replies are sent
	bytes    uint64     // of their data
	out      []*op      // replies that nobody sends yet
	sending  bool       // somebody sends
	stalled  bool       // it is write
	over     bool       // the connection has ended; requests and replies are left as they are
	free     []*op
	users    int // goroutines that use the descriptor; the last one closes it

	snd sender
}

// op is a request of a client, with its reply.
type op struct {
	block.Request
	cookie uint64
	fua    bool // a flush has to follow
	size   uint64
	head   [nbd.SimpleReplyLen]byte
	data   *[]byte // from the buffers; nil: none
	pieces int     // of the reply that are not sent
}

func newConn(s *Server, sock *socket) *conn {
	c := &conn{s: s, sock: sock, ended: make(chan struct{}), buf: make([]byte, readBuffer), users: 2}
	c.room.L, c.more.L = &c.mu, &c.mu
	return c
}

// errEnded: the connection was ended by this side.
var errEnded = errors.New("the connection is closed")

// run serves the client until it goes.
func (c *conn) run(handshake bool) {
	err := c.serve(handshake)
	c.sock.sleep.Done()
	c.end()
	c.mu.Lock()
	c.leave()
	c.mu.Unlock()
	c.s.cfg.Disk.Cancel(c)
	if err != nil && !errors.Is(err, io.EOF) && err != errEnded {
		if !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, unix.EPIPE) {
			atomic.AddUint64(&c.s.n.Broken, 1)
		}
		c.s.cfg.Failed(err)
	}
}

// end ends the connection. Any goroutine may call it.
func (c *conn) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.over {
		c.over = true
		c.sock.shutdown()
	}
	c.more.Signal()
	c.room.Broadcast()
}

// leave notes that a goroutine does not use the descriptor any more. c.mu is held.
func (c *conn) leave() {
	if c.users--; c.users == 0 {
		unix.Close(c.sock.fd)
	}
}

func (c *conn) serve(handshake bool) error {
	if handshake {
		c.sock.deadline = time.Now().Add(handshakeTime)
		if err := c.handshake(); err != nil {
			return err
		}
		c.sock.deadline = time.Time{}
	} else {
		c.info, _ = c.s.cfg.Disk.Info()
	}
	for {
		for c.w-c.r >= nbd.RequestLen {
			var q nbd.Request
			if err := q.Parse(c.buf[c.r:]); err != nil {
				return err
			}
			c.r += nbd.RequestLen
			if q.Type == nbd.CmdDisc {
				c.submit()
				c.drain()
				return io.EOF
			}
			if err := c.request(&q); err != nil {
				return err
			}
		}
		c.submit()
		if err := c.fill(); err != nil {
			if err == io.EOF && c.w > c.r {
				err = fmt.Errorf("%w: the client has closed the connection in the middle of a request", nbd.ErrProtocol)
			}
			return err
		}
	}
}

// fill reads more into the buffer, which is not full.
func (c *conn) fill() error {
	if c.r > 0 {
		c.w = copy(c.buf, c.buf[c.r:c.w])
		c.r = 0
	}
	n, err := c.sock.read(c.buf[c.w:])
	c.w += n
	if n > 0 {
		return nil
	}
	return err
}

// submit hands over what was read, and sends the replies to what was refused.
func (c *conn) submit() {
	if len(c.batch) == 0 && !c.refused {
		return
	}
	c.refused = false
	c.s.cfg.Disk.Submit(c.batch...)
	for i := range c.batch {
		c.batch[i] = nil
	}
	c.batch = c.batch[:0]
	c.Flush()
}

// drain waits until all replies are sent.
func (c *conn) drain() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.requests > 0 && !c.over && c.waitRoom() {
	}
}

// request takes a request, with its data.
func (c *conn) request(q *nbd.Request) error {
	atomic.AddUint64(&c.s.n.Requests, 1)
	size := uint64(0)
	if q.Type == nbd.CmdWrite || q.Type == nbd.CmdRead {
		size = uint64(q.Length)
	}
	if size > nbd.MaxPayload {
		if q.Type == nbd.CmdWrite {
			return fmt.Errorf("%w: a write of %d bytes: at most %d go", nbd.ErrProtocol, q.Length, nbd.MaxPayload)
		}
		size = 0
	}
	o := c.admit(size)
	if o == nil {
		return errEnded
	}
	o.cookie, o.fua = q.Cookie, q.Flags&nbd.CmdFlagFUA != 0
	o.Request = block.Request{Offset: q.Offset, Length: uint64(q.Length), Owner: c, Tag: o}
	if size > 0 {
		o.data = takeBuffer(uint32(size))
		o.Data = (*o.data)[:size]
	}
	if q.Type == nbd.CmdWrite {
		if err := c.payload(o.Data); err != nil {
			return err
		}
	}
	if e := c.prepare(q, &o.Request); e != 0 {
		c.reply(o, e)
		c.refused = true
		return nil
	}
	c.batch = append(c.batch, &o.Request)
	return nil
}

// prepare makes the disk's request of one of the protocol; where it cannot be, it returns the error to reply.
func (c *conn) prepare(q *nbd.Request, r *block.Request) uint32 {
	flags := nbd.CmdFlagFUA
	switch q.Type {
	case nbd.CmdRead:
		r.Op = block.Read
		if uint64(len(r.Data)) != r.Length {
			return nbd.EINVAL
		}
	case nbd.CmdWrite:
		r.Op = block.Write
	case nbd.CmdFlush:
		r.Op, r.Offset, r.Length = block.Flush, 0, 0
	case nbd.CmdTrim:
		r.Op = block.Discard
	case nbd.CmdWriteZeroes:
		r.Op, r.Unmap = block.WriteZeroes, q.Flags&nbd.CmdFlagNoHole == 0
		flags |= nbd.CmdFlagNoHole
	default:
		return nbd.EINVAL
	}
	if q.Flags&^flags != 0 {
		return nbd.EINVAL
	}
	if r.Op != block.Flush && (r.Offset > c.info.Size || r.Length > c.info.Size-r.Offset) {
		if i, ok := c.s.cfg.Disk.Info(); ok {
			c.info = i // it may have grown
		}
		if r.Offset > c.info.Size || r.Length > c.info.Size-r.Offset {
			if r.Op == block.Read {
				return nbd.EINVAL
			}
			return nbd.ENOSPC
		}
	}
	return 0
}

// payload reads the data of a write.
func (c *conn) payload(data []byte) error {
	for {
		n := copy(data, c.buf[c.r:c.w])
		c.r += n
		if data = data[n:]; len(data) == 0 {
			return nil
		}
		// The buffer is empty. Nobody waits for what is to come.
		c.submit()
		if len(data) >= directRead {
			n, err := c.sock.read(data)
			if err != nil {
				return fmt.Errorf("%w: the client has closed the connection %d bytes before the end of a write (%v)", nbd.ErrProtocol, len(data), err)
			}
			data = data[n:]
			continue
		}
		if err := c.fill(); err != nil {
			return fmt.Errorf("%w: the client has closed the connection in the middle of a write (%v)", nbd.ErrProtocol, err)
		}
	}
}

// admit waits until there is room for a request with so many bytes of data; nil if the connection has ended.
func (c *conn) admit(size uint64) *op {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.requests >= maxRequests || c.requests > 0 && c.bytes+size > maxBytes {
		if c.over {
			return nil
		}
		if len(c.batch) > 0 || c.refused {
			c.mu.Unlock()
			c.submit()
			c.mu.Lock()
			continue
		}
		if !c.waitRoom() {
			return nil
		}
	}
	if c.over {
		return nil
	}
	c.requests++
	c.bytes += size
	o := new(op)
	if n := len(c.free); n > 0 {
		o, c.free = c.free[n-1], c.free[:n-1]
	}
	o.size = size
	return o
}

// hangupCheck is how often a connection that is not read is asked whether the client is still there.
const hangupCheck = time.Second

// waitRoom waits until there may be room. It returns false where the client has gone meanwhile. c.mu is held.
func (c *conn) waitRoom() bool {
	t := time.AfterFunc(hangupCheck, func() { c.mu.Lock(); c.room.Broadcast(); c.mu.Unlock() })
	c.room.Wait()
	if t.Stop() || c.over {
		return !c.over
	}
	return !c.sock.gone()
}

// settle gives back what a request took. c.mu is held.
func (c *conn) settle(o *op) {
	if o.data != nil {
		giveBuffer(o.data)
	}
	c.requests--
	c.bytes -= o.size
	o.Request, o.data = block.Request{}, nil
	c.free = append(c.free, o)
	c.room.Signal()
}

// Done implements block.Owner.
func (c *conn) Done(r *block.Request) {
	o := r.Tag.(*op)
	if o.fua && r.Err == nil {
		switch r.Op {
		case block.Write, block.Discard, block.WriteZeroes:
			// The data stays until the reply is sent, as it is accounted for.
			o.fua, r.Op, r.Offset, r.Length, r.Data = false, block.Flush, 0, 0, nil
			c.s.cfg.Disk.Submit(r)
			return
		}
	}
	e := uint32(0)
	if r.Err != nil {
		if e = nbd.ErrorOf(r.Err); r.Op == block.Read && e == nbd.ENOSPC {
			e = nbd.EINVAL
		}
	}
	c.reply(o, e)
}

// reply appends the reply to o to what is to be sent. Flush sends it.
func (c *conn) reply(o *op, e uint32) {
	if e != 0 {
		atomic.AddUint64(&c.s.n.Errors, 1)
	}
	if e != 0 || o.Op != block.Read {
		o.Data = nil
	}
	(&nbd.SimpleReply{Error: e, Cookie: o.cookie}).Put(o.head[:])
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.over {
		c.out = append(c.out, o)
	}
}
