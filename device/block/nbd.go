package block

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sort"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/nbd"
	"github.com/boardlink/boardlink/virtio"
)

const (
	// nbdPatience bounds a connection's handshake.
	nbdPatience = 10 * time.Second
	// A connection that is lost is made again after nbdBackoff, then after twice the time with each failure, up to nbdMaxBackoff.
	nbdBackoff    = 50 * time.Millisecond
	nbdMaxBackoff = 4 * time.Second
	// nbdParallel is how many requests are under way at a time. Those wait for the server, not in the kernel.
	nbdParallel = 64
	// nbdReplies is how many replies to one option a server may send.
	nbdReplies = 64
)

// NBDConfig says which server a disk lies on.
type NBDConfig struct {
	Path     string // of the server's socket
	Export   string // "": the server's default
	ReadOnly bool
	// Logf, if set, hears that the connection is lost, and that it is there again.
	Logf func(format string, args ...interface{})
}

// client is a Backend on an NBD server. Requests are under way at the same time, told apart by their cookies. Where the connection is
// lost they wait until it is made again, and are sent again.
type client struct {
	cfg   NBDConfig
	geo   Geometry
	flags uint16          // of the export
	ctx   context.Context // ends with Close
	stop  func()
	ended chan struct{}
	abort chan struct{} // has a request to give up what waits

	mu       sync.Mutex // guards what follows
	conn     *net.UnixConn
	trying   net.Conn         // of a handshake
	calls    map[uint64]*call // without an answer
	cookie   uint64
	giveUp   bool // Abort, until the calls are given up
	closed   bool
	lost     error // why there is no connection
	connects uint64

	send sync.Mutex // held while a request is written
}

// call is a request without an answer. The client's mu guards it, but for req and bufs, which do not change.
type call struct {
	req     nbd.Request
	bufs    []unix.Iovec
	done    chan error
	sent    *net.UnixConn // the connection that it was last sent by
	sending bool          // its buffers are being written
	ended   bool          // with err
	err     error
}

func newClient(cfg NBDConfig) *client {
	if cfg.Logf == nil {
		cfg.Logf = func(string, ...interface{}) {}
	}
	c := &client{cfg: cfg, calls: map[uint64]*call{}, ended: make(chan struct{}), abort: make(chan struct{}, 1)}
	c.ctx, c.stop = context.WithCancel(context.Background())
	c.geo.Name = "nbd " + cfg.Path
	if cfg.Export != "" {
		c.geo.Name += " " + cfg.Export
	}
	return c
}

// OpenNBD connects to an NBD server by its socket. Errors are one line for the user.
func OpenNBD(cfg NBDConfig) (Backend, error) {
	c := newClient(cfg)
	conn, e, s, err := c.dial()
	if err == nil {
		if err = c.measure(e, s); err != nil {
			conn.Close()
		}
	}
	if err != nil {
		c.stop()
		return nil, fmt.Errorf("%s: %w", c.geo.Name, err)
	}
	c.conn, c.connects = conn, 1
	go c.run(conn)
	return c, nil
}

// measure takes what the server says of the export.
func (c *client) measure(e nbd.ExportInfo, s nbd.BlockSize) error {
	const most = 64 << 10
	switch {
	case e.Size == 0 || e.Size%virtio.BlkSector != 0 || e.Size > 1<<63-1:
		return fmt.Errorf("the export has %d bytes, no multiple of %d", e.Size, virtio.BlkSector)
	case e.Flags&nbd.ReadOnly != 0 && !c.cfg.ReadOnly:
		return errors.New("the export is read-only: the disk needs the key ro")
	case s.Min > most || s.Min&(s.Min-1) != 0:
		return fmt.Errorf("the export has blocks of %d bytes, up to %d are possible", s.Min, most)
	}
	c.flags = e.Flags
	c.geo.Size, c.geo.ReadOnly, c.geo.Remote, c.geo.Parallel = e.Size, c.cfg.ReadOnly, true, nbdParallel
	c.geo.BlockSize = virtio.BlkSector
	if s.Min > c.geo.BlockSize {
		c.geo.BlockSize = s.Min
	}
	if s.Preferred > c.geo.BlockSize && s.Preferred&(s.Preferred-1) == 0 && s.Preferred <= most {
		c.geo.Physical = s.Preferred
	}
	c.geo.Discard = e.Flags&nbd.SendTrim != 0
	return nil
}

// dial connects and does the handshake.
func (c *client) dial() (*net.UnixConn, nbd.ExportInfo, nbd.BlockSize, error) {
	d := net.Dialer{Timeout: nbdPatience}
	conn, err := d.DialContext(c.ctx, "unix", c.cfg.Path)
	if err != nil {
		var op *net.OpError
		if errors.As(err, &op) {
			err = op.Err
		}
		return nil, nbd.ExportInfo{}, nbd.BlockSize{}, err
	}
	conn.SetDeadline(time.Now().Add(nbdPatience))
	c.mu.Lock()
	c.trying = conn
	c.mu.Unlock()
	e, s, err := handshake(conn, c.cfg.Export)
	c.mu.Lock()
	c.trying = nil
	c.mu.Unlock()
	if err != nil {
		conn.Close()
		return nil, e, s, err
	}
	conn.SetDeadline(time.Time{})
	return conn.(*net.UnixConn), e, s, nil
}

// handshake negotiates the export.
func handshake(conn io.ReadWriter, export string) (e nbd.ExportInfo, s nbd.BlockSize, err error) {
	var b [nbd.GreetingLen]byte
	if _, err := io.ReadFull(conn, b[:]); err != nil {
		return e, s, fmt.Errorf("the server's greeting: %w", err)
	}
	if m, o := binary.BigEndian.Uint64(b[:]), binary.BigEndian.Uint64(b[8:]); m != nbd.MagicInit || o != nbd.MagicOption {
		return e, s, fmt.Errorf("%w: the greeting begins with %#x %#x: it is no newstyle NBD server", nbd.ErrProtocol, m, o)
	}
	theirs := binary.BigEndian.Uint16(b[16:])
	if theirs&nbd.FlagFixedNewstyle == 0 {
		return e, s, fmt.Errorf("%w: the server has no fixed newstyle handshake", nbd.ErrProtocol)
	}
	ours := nbd.ClientFixedNewstyle
	if theirs&nbd.FlagNoZeroes != 0 {
		ours |= nbd.ClientNoZeroes
	}
	var f [4]byte
	binary.BigEndian.PutUint32(f[:], ours)
	g := nbd.Go{Name: export, Infos: []uint16{nbd.InfoBlockSize}}
	if _, err := conn.Write(append(f[:], option(nbd.OptGo, g.Encode())...)); err != nil {
		return e, s, err
	}
	known := false
	for i := 0; i < nbdReplies; i++ {
		kind, data, err := optionReply(conn, nbd.OptGo)
		switch {
		case err != nil:
			return e, s, err
		case kind == nbd.RepInfo:
			x, bs, err := nbd.ParseInfo(data)
			if err != nil {
				return e, s, err
			}
			if x != nil {
				e, known = *x, true
			}
			if bs != nil {
				s = *bs
			}
		case kind == nbd.RepAck && known:
			return e, s, nil
		case kind == nbd.RepErrUnsup:
			e, err = exportName(conn, export, ours&nbd.ClientNoZeroes != 0)
			return e, s, err
		case kind == nbd.RepErrUnknown:
			return e, s, fmt.Errorf("the server has no export %q", export)
		case kind&(1<<31) != 0:
			return e, s, fmt.Errorf("the server refuses the export %q: error %#x %q", export, kind, printable(data))
		default:
			return e, s, fmt.Errorf("%w: reply %#x to the option GO", nbd.ErrProtocol, kind)
		}
	}
	return e, s, fmt.Errorf("%w: more than %d replies to the option GO", nbd.ErrProtocol, nbdReplies)
}

// printable returns what a server says in words, as far as it fits in a line.
func printable(b []byte) string {
	if len(b) > 100 {
		b = b[:100]
	}
	return string(b)
}

// option returns an option with its data.
func option(kind uint32, data []byte) []byte {
	b := make([]byte, nbd.OptionLen, nbd.OptionLen+len(data))
	o := nbd.Option{Option: kind, Length: uint32(len(data))}
	o.Put(b)
	return append(b, data...)
}

// optionReply reads a reply to an option.
func optionReply(conn io.Reader, kind uint32) (uint32, []byte, error) {
	var b [nbd.OptionReplyLen]byte
	if _, err := io.ReadFull(conn, b[:]); err != nil {
		return 0, nil, fmt.Errorf("the handshake: %w", err)
	}
	var r nbd.OptionReply
	if err := r.Parse(b[:]); err != nil {
		return 0, nil, err
	}
	if r.Option != kind || r.Length > nbd.MaxOptionData {
		return 0, nil, fmt.Errorf("%w: a reply of %d bytes to option %d, want %d and up to %d bytes", nbd.ErrProtocol, r.Length, r.Option, kind, nbd.MaxOptionData)
	}
	data := make([]byte, r.Length)
	if _, err := io.ReadFull(conn, data); err != nil {
		return 0, nil, fmt.Errorf("the handshake: %w", err)
	}
	return r.Type, data, nil
}

// exportName is the way of servers that do not know the option GO.
func exportName(conn io.ReadWriter, export string, noZeroes bool) (e nbd.ExportInfo, err error) {
	if _, err := conn.Write(option(nbd.OptExportName, []byte(export))); err != nil {
		return e, err
	}
	n := 10
	if !noZeroes {
		n += nbd.ExportNamePad
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(conn, b); err != nil {
		return e, fmt.Errorf("the server refuses the export %q: %w", export, err)
	}
	return nbd.ExportInfo{Size: binary.BigEndian.Uint64(b), Flags: binary.BigEndian.Uint16(b[8:])}, nil
}

// run receives answers, and makes the connection again when it is lost, until Close.
func (c *client) run(conn *net.UnixConn) {
	defer close(c.ended)
	pause := nbdBackoff
	for {
		answers, err := c.receive(conn)
		if answers > 0 {
			pause = nbdBackoff
		}
		c.disconnect(conn, err)
		for conn = nil; conn == nil; {
			if c.surrender() {
				return
			}
			t := time.NewTimer(pause)
			select {
			case <-t.C:
				if pause *= 2; pause > nbdMaxBackoff {
					pause = nbdMaxBackoff
				}
				conn = c.reconnect()
			case <-c.abort:
			case <-c.ctx.Done():
			}
			t.Stop()
		}
	}
}

// disconnect ends the use of a connection.
func (c *client) disconnect(conn *net.UnixConn, why error) {
	conn.Close()
	c.send.Lock() // the one that writes fails now
	c.mu.Lock()
	c.conn, c.lost = nil, why
	quiet := c.closed || c.giveUp
	c.mu.Unlock()
	c.send.Unlock()
	if !quiet {
		c.cfg.Logf("%s: the connection is lost, requests wait until it is there again: %v", c.geo.Name, why)
	}
}

// surrender gives up what waits, where Abort or Close wants that, and tells whether the client is closed. There is no connection.
func (c *client) surrender() (closed bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.giveUp || c.closed {
		for id := range c.calls {
			c.finish(id, ErrAborted)
		}
		c.giveUp = false
	}
	return c.closed
}

// reconnect tries to make the connection again, and sends what waits. It returns nil where that is not possible.
func (c *client) reconnect() *net.UnixConn {
	conn, e, s, err := c.dial()
	if err == nil {
		other := client{cfg: c.cfg}
		if err = other.measure(e, s); err == nil && (other.geo.Size != c.geo.Size || other.geo.BlockSize != c.geo.BlockSize || other.flags != c.flags) {
			err = fmt.Errorf("the export is another one now: %d bytes in blocks of %d with flags %#x, it was %d, %d, %#x", other.geo.Size, other.geo.BlockSize,
				other.flags, c.geo.Size, c.geo.BlockSize, c.flags)
		}
		if err != nil {
			conn.Close()
		}
	}
	c.mu.Lock()
	if err != nil || c.closed || c.giveUp {
		if err == nil {
			conn.Close()
		} else {
			c.lost = err
		}
		c.mu.Unlock()
		return nil
	}
	var again []*call
	for _, p := range c.calls {
		again = append(again, p)
	}
	c.conn, c.lost = conn, nil
	c.connects++
	c.mu.Unlock()
	sort.Slice(again, func(i, j int) bool { return again[i].req.Cookie < again[j].req.Cookie })
	c.cfg.Logf("%s: connected again, %d requests are sent again", c.geo.Name, len(again))
	// Beside the receiver: the server may take no more before its answers are read.
	go func() {
		for _, p := range again {
			c.transmit(conn, p)
		}
	}()
	return conn
}

// receive takes answers from a connection until it fails, and returns their number.
func (c *client) receive(conn *net.UnixConn) (n uint64, err error) {
	var b [nbd.SimpleReplyLen]byte
	for ; ; n++ {
		if _, err := io.ReadFull(conn, b[:]); err != nil {
			return n, err
		}
		var r nbd.SimpleReply
		if err := r.Parse(b[:]); err != nil {
			return n, err
		}
		c.mu.Lock()
		p := c.calls[r.Cookie]
		known := p != nil && p.sent == conn && !p.ended
		c.mu.Unlock()
		if !known {
			return n, fmt.Errorf("%w: an answer to request %d, which waits for none", nbd.ErrProtocol, r.Cookie)
		}
		result := nbd.Errno(r.Error)
		if result == nil && p.req.Type == nbd.CmdRead {
			// p stays until it is finished, which only this goroutine does.
			for i := range p.bufs {
				if _, err := io.ReadFull(conn, view(p.bufs[i])); err != nil {
					if errors.Is(err, unix.EFAULT) {
						c.mu.Lock()
						c.finish(r.Cookie, ErrMemory)
						c.mu.Unlock()
					}
					return n, err
				}
			}
		}
		c.mu.Lock()
		c.finish(r.Cookie, result)
		c.mu.Unlock()
	}
}

// view returns a buffer for a system call.
func view(v unix.Iovec) []byte { return unsafe.Slice(v.Base, int(v.Len)) }

// finish ends a call, once nobody writes its buffers. mu is held.
func (c *client) finish(id uint64, err error) {
	p := c.calls[id]
	if !p.ended {
		p.ended, p.err = true, err
	}
	if !p.sending {
		delete(c.calls, id)
		p.done <- p.err
	}
}

// transmit sends a call by a connection, unless that is not the current one any more: then the next one gets it.
func (c *client) transmit(conn *net.UnixConn, p *call) {
	c.send.Lock()
	defer c.send.Unlock()
	c.mu.Lock()
	if c.conn != conn || p.ended || p.sent == conn {
		c.mu.Unlock()
		return
	}
	p.sent, p.sending = conn, true
	c.mu.Unlock()
	head := make([]byte, nbd.RequestLen)
	p.req.Put(head)
	bufs := net.Buffers{head}
	if p.req.Type == nbd.CmdWrite {
		for i := range p.bufs {
			bufs = append(bufs, view(p.bufs[i]))
		}
	}
	_, err := bufs.WriteTo(conn)
	c.mu.Lock()
	defer c.mu.Unlock()
	p.sending = false
	switch {
	case p.ended:
		c.finish(p.req.Cookie, nil)
	case errors.Is(err, unix.EFAULT):
		c.finish(p.req.Cookie, ErrMemory)
	}
	if err != nil {
		conn.Close() // the receiver sees it
	}
}

// do has a request answered.
func (c *client) do(kind, flags uint16, off, n uint64, bufs []unix.Iovec) error {
	if n > 1<<32-1 {
		return unix.EINVAL
	}
	p := &call{req: nbd.Request{Type: kind, Flags: flags, Offset: off, Length: uint32(n)}, bufs: bufs, done: make(chan error, 1)}
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return ErrAborted
	}
	c.cookie++
	p.req.Cookie = c.cookie
	c.calls[p.req.Cookie] = p
	conn := c.conn
	c.mu.Unlock()
	if conn != nil {
		c.transmit(conn, p)
	}
	return <-p.done
}

// Geometry implements Backend.
func (c *client) Geometry() Geometry { return c.geo }

// State tells of a connection that is lost.
func (c *client) State() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.lost == nil {
		return ""
	}
	return fmt.Sprintf("not connected: %v", c.lost)
}

// Counters returns what an operator may want to know besides.
func (c *client) Counters() map[string]uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return map[string]uint64{"nbd_connects": c.connects, "nbd_waiting": uint64(len(c.calls))}
}

// ReadAt implements Backend.
func (c *client) ReadAt(bufs []unix.Iovec, off uint64) error {
	return c.do(nbd.CmdRead, 0, off, total(bufs), bufs)
}

// WriteAt implements Backend.
func (c *client) WriteAt(bufs []unix.Iovec, off uint64, durable bool) error {
	flags := uint16(0)
	if durable && c.flags&nbd.SendFUA != 0 {
		flags = nbd.CmdFlagFUA
	}
	err := c.do(nbd.CmdWrite, flags, off, total(bufs), bufs)
	if err == nil && durable && flags == 0 {
		err = c.Flush()
	}
	return err
}

// Flush implements Backend. A server without that command has no cache.
func (c *client) Flush() error {
	if c.flags&nbd.SendFlush == 0 {
		return nil
	}
	return c.do(nbd.CmdFlush, 0, 0, 0, nil)
}

// Discard implements Backend.
func (c *client) Discard(off, n uint64) error {
	if c.flags&nbd.SendTrim == 0 {
		return ErrUnsupported
	}
	return unsupported(c.do(nbd.CmdTrim, 0, off, n, nil))
}

// WriteZeroes implements Backend.
func (c *client) WriteZeroes(off, n uint64, unmap bool) error {
	if c.flags&nbd.SendWriteZeroes == 0 {
		return ErrUnsupported
	}
	flags := uint16(0)
	if !unmap {
		flags = nbd.CmdFlagNoHole
	}
	return unsupported(c.do(nbd.CmdWriteZeroes, flags, off, n, nil))
}

// Abort implements Backend. What the server has and does not answer is given up with the connection.
func (c *client) Abort() {
	c.mu.Lock()
	if len(c.calls) > 0 && !c.closed {
		c.giveUp = true
		if c.conn != nil {
			c.conn.Close()
		}
		select {
		case c.abort <- struct{}{}:
		default:
		}
	}
	c.mu.Unlock()
}

// Close implements Backend.
func (c *client) Close() error {
	c.mu.Lock()
	was := c.closed
	c.closed = true
	conn := c.conn
	if c.trying != nil {
		c.trying.Close()
	}
	c.mu.Unlock()
	if was {
		return nil
	}
	c.stop()
	if conn != nil {
		var b [nbd.RequestLen]byte
		r := nbd.Request{Type: nbd.CmdDisc}
		r.Put(b[:])
		conn.SetWriteDeadline(time.Now().Add(time.Second))
		conn.Write(b[:]) // a farewell, if the server takes it
		conn.Close()
	}
	<-c.ended
	return nil
}
