// Package disk proves and measures a disk that is exported by NBD on a unix socket: it writes blocks with a check sum and their own number and
// version, and reads them back, with many requests in flight.
//
// It must not know what serves the disk.
package disk

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"

	"github.com/boardlink/boardlink/nbd"
)

// Client is a client of an export. Its methods may be used by several goroutines.
type Client struct {
	Size  uint64 // bytes
	Flags uint16 // of nbd.ExportInfo

	c net.Conn

	wmu sync.Mutex // to write a request

	mu     sync.Mutex
	next   uint64
	flight map[uint64]*call
	err    error // the connection has ended
	done   chan struct{}
}

type call struct {
	data []byte // of a read
	err  chan error
}

// Dial connects to an export, "" for the default one.
func Dial(path, name string) (*Client, error) {
	conn, err := net.Dial("unix", path)
	if err != nil {
		return nil, err
	}
	c := &Client{c: conn, flight: map[uint64]*call{}, done: make(chan struct{})}
	if err := c.handshake(name); err != nil {
		conn.Close()
		return nil, fmt.Errorf("export %q at %s: %w", name, path, err)
	}
	go c.receive()
	return c, nil
}

func (c *Client) handshake(name string) error {
	b := make([]byte, nbd.GreetingLen)
	if _, err := io.ReadFull(c.c, b); err != nil {
		return err
	}
	if binary.BigEndian.Uint64(b) != nbd.MagicInit || binary.BigEndian.Uint64(b[8:]) != nbd.MagicOption {
		return fmt.Errorf("%w: the server begins with %x", nbd.ErrProtocol, b)
	}
	data := (&nbd.Go{Name: name}).Encode()
	out := make([]byte, 4+nbd.OptionLen)
	binary.BigEndian.PutUint32(out, nbd.ClientFixedNewstyle|nbd.ClientNoZeroes)
	(&nbd.Option{Option: nbd.OptGo, Length: uint32(len(data))}).Put(out[4:])
	if _, err := c.c.Write(append(out, data...)); err != nil {
		return err
	}
	for {
		head := make([]byte, nbd.OptionReplyLen)
		if _, err := io.ReadFull(c.c, head); err != nil {
			return err
		}
		var r nbd.OptionReply
		if err := r.Parse(head); err != nil {
			return err
		}
		if r.Length > nbd.MaxOptionData {
			return fmt.Errorf("%w: a reply of %d bytes", nbd.ErrProtocol, r.Length)
		}
		data := make([]byte, r.Length)
		if _, err := io.ReadFull(c.c, data); err != nil {
			return err
		}
		switch r.Type {
		case nbd.RepAck:
			return nil
		case nbd.RepInfo:
			e, _, err := nbd.ParseInfo(data)
			if err != nil {
				return err
			}
			if e != nil {
				c.Size, c.Flags = e.Size, e.Flags
			}
		default:
			return fmt.Errorf("the server refuses it (%#x): %s", r.Type, data)
		}
	}
}

// receive reads replies until the connection ends.
func (c *Client) receive() {
	defer close(c.done)
	err := c.replies()
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.err = err
	for _, k := range c.flight {
		k.err <- err
	}
	c.flight = nil
}

func (c *Client) replies() error {
	head := make([]byte, nbd.SimpleReplyLen)
	for {
		if _, err := io.ReadFull(c.c, head); err != nil {
			return err
		}
		var r nbd.SimpleReply
		if err := r.Parse(head); err != nil {
			return err
		}
		c.mu.Lock()
		k := c.flight[r.Cookie]
		delete(c.flight, r.Cookie)
		c.mu.Unlock()
		if k == nil {
			return fmt.Errorf("%w: a reply to request %d, which is not in flight", nbd.ErrProtocol, r.Cookie)
		}
		if r.Error == 0 && k.data != nil {
			if _, err := io.ReadFull(c.c, k.data); err != nil {
				k.err <- err
				return err
			}
		}
		k.err <- nbd.Errno(r.Error)
	}
}

// do sends a request and waits for its end. data is written, into is read to.
func (c *Client) do(q nbd.Request, data, into []byte) error {
	k := &call{data: into, err: make(chan error, 1)}
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return c.err
	}
	c.next++
	q.Cookie = c.next
	c.flight[q.Cookie] = k
	c.mu.Unlock()
	b := make([]byte, nbd.RequestLen, nbd.RequestLen+len(data))
	q.Put(b)
	c.wmu.Lock()
	_, err := c.c.Write(append(b, data...))
	c.wmu.Unlock()
	if err != nil {
		c.c.Close() // receive ends the request
	}
	return <-k.err
}

// Read reads len(b) bytes at off.
func (c *Client) Read(b []byte, off uint64) error {
	return c.do(nbd.Request{Type: nbd.CmdRead, Offset: off, Length: uint32(len(b))}, nil, b)
}

// Write writes b at off. fua: it is on stable storage then.
func (c *Client) Write(b []byte, off uint64, fua bool) error {
	q := nbd.Request{Type: nbd.CmdWrite, Offset: off, Length: uint32(len(b))}
	if fua {
		q.Flags = nbd.CmdFlagFUA
	}
	return c.do(q, b, nil)
}

// Flush has all that was written before put on stable storage.
func (c *Client) Flush() error { return c.do(nbd.Request{Type: nbd.CmdFlush}, nil, nil) }

// Trim discards a range; Zero makes it zeros.
func (c *Client) Trim(off uint64, n uint32) error {
	return c.do(nbd.Request{Type: nbd.CmdTrim, Offset: off, Length: n}, nil, nil)
}

// Zero makes a range zeros.
func (c *Client) Zero(off uint64, n uint32) error {
	return c.do(nbd.Request{Type: nbd.CmdWriteZeroes, Offset: off, Length: n}, nil, nil)
}

// Close ends the connection.
func (c *Client) Close() error {
	b := make([]byte, nbd.RequestLen)
	(&nbd.Request{Type: nbd.CmdDisc}).Put(b)
	c.wmu.Lock()
	_, err := c.c.Write(b)
	c.wmu.Unlock()
	if cerr := c.c.Close(); err == nil && !errors.Is(cerr, net.ErrClosed) {
		err = cerr
	}
	<-c.done
	return err
}
