package vhostuser

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

var (
	// ErrTimeout: the back end does not read a request, or does not answer it in time.
	ErrTimeout = errors.New("the back end does not answer")
	// ErrRefused: the back end answered that it cannot do what was asked for.
	ErrRefused = errors.New("the back end refuses it")
	// ErrAnswer: an answer that belongs to no request, or to another one.
	ErrAnswer = errors.New("unexpected answer")
	// errCancelled: the program ends.
	errCancelled = errors.New("cancelled")
)

// backConn is a connection to a back end. Requests are made one at a time, from one goroutine; a
// second goroutine reads what the back end answers. An error of the connection is final: all later
// requests fail with it.
type backConn struct {
	c     *net.UnixConn
	raw   syscall.RawConn
	n     *frontCounters
	limit time.Duration // for an answer

	cancel  <-chan struct{} // ends the wait for an answer; nil: nothing does but limit
	acks    bool            // REPLY_ACK was negotiated
	answers chan *message   // read, and not taken yet
	ended   chan struct{}   // closed when the reader has ended
	readErr error           // why; valid then
	broken  error           // why no request is possible any more
}

// newBackConn begins a conversation over c, which belongs to it from then on.
func newBackConn(c *net.UnixConn, n *frontCounters, cl *closer, limit time.Duration) (*backConn, error) {
	src, err := newSocket(c)
	if err != nil {
		c.Close()
		return nil, err
	}
	b := &backConn{c: c, raw: src.raw, n: n, limit: limit, answers: make(chan *message, 1), ended: make(chan struct{})}
	go b.read(&reader{src: src, n: &n.reader, closer: cl, replies: true})
	return b, nil
}

// read hands over answers. There is one request at a time, so two answers that wait are one too
// many.
func (b *backConn) read(r *reader) {
	defer close(b.ended)
	for {
		m, err := r.next()
		if err != nil {
			b.readErr = err
			return
		}
		if n := m.close(); n > 0 { // no answer to a request of ours brings descriptors
			atomic.AddUint64(&b.n.DescriptorsClosed, uint64(n))
		}
		select {
		case b.answers <- m:
		default:
			b.readErr = b.unexpected(m)
			return
		}
	}
}

// unexpected makes an error about an answer that nobody waits for.
func (b *backConn) unexpected(m *message) error {
	atomic.AddUint64(&b.n.Unexpected, 1)
	return m.errorf(ErrAnswer, "nothing was asked")
}

// fail ends the connection because of err, unless it has ended before, and returns why it did.
func (b *backConn) fail(err error) error {
	if b.broken == nil {
		b.broken = err
		b.c.Close()
	}
	return b.broken
}

// close ends the connection and waits for its reader.
func (b *backConn) close() {
	b.fail(net.ErrClosed)
	<-b.ended
}

// lost returns why the reader has ended, which it has.
func (b *backConn) lost() error {
	if errors.Is(b.readErr, io.EOF) {
		return fmt.Errorf("the back end has closed the connection: %w", io.EOF)
	}
	return b.readErr
}

// tell makes a request that has no answer but an acknowledgement, and waits for that where
// REPLY_ACK was negotiated.
func (b *backConn) tell(req Request, payload []byte, fds ...int) error {
	flags := uint32(flagVersion)
	if b.acks {
		flags |= flagNeedReply
	}
	if err := b.send(req, flags, payload, fds); err != nil || !b.acks {
		return err
	}
	m, err := b.await(req)
	if err != nil {
		return err
	}
	v, err := m.u64()
	if err != nil {
		atomic.AddUint64(&b.n.Malformed, 1)
		return b.fail(err)
	}
	if v != 0 {
		atomic.AddUint64(&b.n.Refused, 1)
		return m.errorf(ErrRefused, "it answers %d", v)
	}
	return nil
}

// ask makes a request and returns its answer.
func (b *backConn) ask(req Request, payload []byte) (*message, error) {
	if err := b.send(req, flagVersion, payload, nil); err != nil {
		return nil, err
	}
	return b.await(req)
}

// askU64 makes a request whose answer is one number.
func (b *backConn) askU64(req Request) (uint64, error) {
	m, err := b.ask(req, nil)
	if err != nil {
		return 0, err
	}
	v, err := m.u64()
	if err != nil {
		atomic.AddUint64(&b.n.Malformed, 1)
		return 0, b.fail(err)
	}
	return v, nil
}

// send writes a request with descriptors.
func (b *backConn) send(req Request, flags uint32, payload []byte, fds []int) error {
	if b.broken != nil {
		return b.broken
	}
	select {
	case m := <-b.answers:
		return b.fail(b.unexpected(m))
	default:
	}
	p, oob := encodeMessage(req, flags, payload), []byte(nil)
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	if err := b.c.SetWriteDeadline(time.Now().Add(b.limit)); err != nil {
		return b.fail(err)
	}
	for len(p) > 0 {
		var n int
		var err error
		werr := b.raw.Write(func(fd uintptr) bool {
			for {
				n, err = unix.SendmsgN(int(fd), p, oob, nil, unix.MSG_NOSIGNAL)
				if err != unix.EINTR {
					return err != unix.EAGAIN
				}
			}
		})
		if errors.Is(werr, os.ErrDeadlineExceeded) {
			atomic.AddUint64(&b.n.Timeouts, 1)
			return b.fail(&Error{Request: req, Code: ErrTimeout, Detail: fmt.Sprintf("it does not read for %v", b.limit)})
		}
		if werr != nil {
			err = werr
		}
		if err != nil {
			return b.fail(fmt.Errorf("%s: sendmsg: %w", req, err))
		}
		p, oob = p[n:], nil // the descriptors went with the first byte
	}
	return nil
}

// await waits for the answer to a request.
func (b *backConn) await(req Request) (*message, error) {
	t := time.NewTimer(b.limit)
	defer t.Stop()
	var m *message
	select {
	case m = <-b.answers:
	case <-b.ended:
		select {
		case m = <-b.answers: // it was read before the end
		default:
			return nil, b.fail(fmt.Errorf("answer to %s: %w", req, b.lost()))
		}
	case <-b.cancel:
		return nil, b.fail(fmt.Errorf("answer to %s: %w", req, errCancelled))
	case <-t.C:
		atomic.AddUint64(&b.n.Timeouts, 1)
		return nil, b.fail(&Error{Request: req, Code: ErrTimeout, Detail: fmt.Sprintf("nothing comes for %v", b.limit)})
	}
	if m.req != req {
		atomic.AddUint64(&b.n.Unexpected, 1)
		return nil, b.fail(m.errorf(ErrAnswer, "%s was asked", req))
	}
	return m, nil
}
