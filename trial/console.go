//go:build linux

package trial

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/ctl"
	"github.com/boardlink/boardlink/trial/traffic"
)

const (
	consoleName  = "con0"
	consolePty   = "con0.pty"
	consoleBytes = 1 << 20 // each way
	consoleKeys  = 200     // typed one after the other
	// consolePatience bounds each wait for a byte.
	consolePatience = 20 * time.Second
)

// ConsoleResult is what the console did.
type ConsoleResult struct {
	Bytes   uint64 `json:"bytes"` // each way
	MBps    Rates  `json:"mb_per_second"`
	Corrupt uint64 `json:"corrupt"` // bytes that are not what was sent there
	Lost    uint64 `json:"lost"`    // bytes that the terminal was told it lost
	// Key is the round trip of a key that the board echoes when nothing else runs, Beside the one beside a flood of frames to
	// the board.
	Key    traffic.RTT `json:"key_idle_us"`
	Beside traffic.RTT `json:"key_beside_us"`
}

// Rates is a figure for each direction.
type Rates = traffic.BothWays

// consoleArgs returns the flags of a side for the console.
func (r *Rig) consoleArgs(s board.Side) []string {
	if s == board.Host {
		return []string{"--console", fmt.Sprintf("name=%s,scrollback=%d", consoleName, 2*consoleBytes)}
	}
	return []string{"--console", "name=" + consoleName + ",pty=" + r.place.childPath(consolePty)}
}

// terminal is both ends of the console: what a program on the board has, and what somebody at the host has.
type terminal struct {
	board *os.File
	host  *ctl.Conn
	conn  net.Conn
	lost  uint64
	rest  []byte // printed and not yet taken
}

// Console tries the console: bytes each way, keys that are echoed, and the same beside a flood of frames.
func (r *Rig) Console(ctx context.Context) (c ConsoleResult, err error) {
	t, err := r.openTerminal(ctx)
	if err != nil {
		return c, fmt.Errorf("console: %w", err)
	}
	defer t.close()
	stop := context.AfterFunc(ctx, t.close)
	defer stop()
	defer func() {
		c.Lost = t.lost
		if ctx.Err() != nil {
			err = ctx.Err()
		} else if err != nil {
			err = fmt.Errorf("console: %w", err)
		}
	}()
	data := make([]byte, consoleBytes)
	fillBlocks(data, 0)
	c.Bytes = consoleBytes
	for _, way := range []struct {
		write func([]byte) error
		read  func([]byte) error
		to    *float64
	}{{t.print, t.seen, &c.MBps.BoardToHost}, {t.typed, t.got, &c.MBps.HostToBoard}} {
		took, bad, err := carry(data, way.write, way.read)
		c.Corrupt += bad
		if err != nil {
			return c, err
		}
		*way.to = float64(consoleBytes) / 1e6 / took.Seconds()
	}
	if c.Key, err = t.keys(ctx, nil); err != nil {
		return c, err
	}
	fctx, cancel := context.WithCancel(ctx)
	flooded := make(chan error, 1)
	p := r.Pairs(0)[0]
	go func() {
		_, err := traffic.UDP(fctx, p.Host, p.Board, traffic.UDPConfig{Duration: time.Minute, Size: 64})
		flooded <- err
	}()
	c.Beside, err = t.keys(ctx, flooded)
	cancel()
	<-flooded
	return c, err
}

// openTerminal opens both ends of the console, once the board drives it.
func (r *Rig) openTerminal(ctx context.Context) (*terminal, error) {
	t := new(terminal)
	wctx, cancel := context.WithTimeout(ctx, consolePatience)
	defer cancel()
	for {
		var err error
		if t.board, err = os.OpenFile(r.place.path(consolePty), os.O_RDWR|unix.O_NOCTTY|unix.O_NONBLOCK, 0); err == nil {
			break
		}
		select {
		case <-wctx.Done():
			return nil, err
		case <-time.After(10 * time.Millisecond):
		}
	}
	err := t.attach(wctx, r.StatusSocket(board.Host))
	if err != nil {
		t.close()
		return nil, err
	}
	return t, nil
}

func (t *terminal) attach(ctx context.Context, sock string) (err error) {
	if t.conn, err = new(net.Dialer).DialContext(ctx, "unix", sock); err != nil {
		return err
	}
	t.host = ctl.NewConn(t.conn, t.conn)
	req := ctl.Request{Boardlink: ctl.Version, Verb: ctl.VerbConsole, Console: &ctl.ConsoleRequest{Name: consoleName, Who: "loopback"}}
	if err := t.host.SendLine(req); err != nil {
		return err
	}
	if _, err := io.WriteString(t.conn, "\n"); err != nil {
		return err
	}
	var reply ctl.Reply
	if err := t.host.ReceiveLine(&reply); err != nil {
		return err
	}
	if reply.Error != "" {
		return errors.New(reply.Error)
	}
	for { // until the board drives it
		_ = t.conn.SetReadDeadline(time.Now().Add(consolePatience))
		m, _, err := t.host.Receive(nil)
		if err != nil {
			return err
		}
		if m.State != nil && m.State.Running {
			return nil
		}
	}
}

func (t *terminal) close() {
	if t.board != nil {
		t.board.Close()
	}
	if t.conn != nil {
		t.conn.Close()
	}
}

// print writes on the board's side, seen reads what of it comes to the host's.
func (t *terminal) print(b []byte) error {
	_ = t.board.SetWriteDeadline(time.Now().Add(consolePatience))
	_, err := t.board.Write(b)
	return err
}

func (t *terminal) seen(b []byte) error {
	for len(b) > 0 {
		if len(t.rest) == 0 {
			_ = t.conn.SetReadDeadline(time.Now().Add(consolePatience))
			m, out, err := t.host.Receive(nil)
			if err != nil {
				return err
			}
			t.lost += m.Lost
			if m.Type == ctl.Output {
				t.rest = out
			}
			continue
		}
		n := copy(b, t.rest)
		b, t.rest = b[n:], t.rest[n:]
	}
	return nil
}

// typed types at the host's side, got reads what of it comes to the board's.
func (t *terminal) typed(b []byte) error {
	_ = t.conn.SetWriteDeadline(time.Now().Add(consolePatience))
	return t.host.Send(ctl.Message{Type: ctl.Input}, b)
}

func (t *terminal) got(b []byte) error {
	_ = t.board.SetReadDeadline(time.Now().Add(consolePatience))
	_, err := io.ReadFull(t.board, b)
	return err
}

// carry sends data in pieces, and counts the bytes that differ at the other end.
func carry(data []byte, write, read func([]byte) error) (took time.Duration, bad uint64, err error) {
	const piece = 4096
	begin := time.Now()
	sent := make(chan error, 1)
	go func() {
		for b := data; len(b) > 0; b = b[min(piece, len(b)):] {
			if err := write(b[:min(piece, len(b))]); err != nil {
				sent <- err
				return
			}
		}
		sent <- nil
	}()
	got := make([]byte, piece)
	for off := 0; off < len(data); off += piece {
		n := min(piece, len(data)-off)
		if err = read(got[:n]); err != nil {
			break
		}
		if !bytes.Equal(got[:n], data[off:off+n]) {
			bad += wrongBytes(got[:n], uint64(off))
		}
	}
	if err == nil {
		err = <-sent
	}
	return time.Since(begin), bad, err
}

// keys types keys one after the other, each when the board's echo of the last one is there, until stop has something.
func (t *terminal) keys(ctx context.Context, stop chan error) (traffic.RTT, error) {
	var took []float64
	for i := 0; i < consoleKeys; i++ {
		select {
		case err := <-stop:
			stop <- nil
			return traffic.RTT{}, fmt.Errorf("the flood ends early: %w", err)
		default:
		}
		key := byte('a' + i%26)
		begin, b := time.Now(), []byte{key}
		if err := t.typed(b); err != nil {
			return traffic.RTT{}, err
		}
		for _, step := range []func([]byte) error{t.got, t.print, t.seen} {
			if err := step(b); err != nil {
				return traffic.RTT{}, err
			}
		}
		if b[0] != key {
			return traffic.RTT{}, fmt.Errorf("key %q came back as %q", key, b)
		}
		took = append(took, float64(time.Since(begin).Nanoseconds())/1e3)
	}
	slices.Sort(took)
	at := func(q int) float64 { return took[min(len(took)-1, len(took)*q/100)] }
	return traffic.RTT{P50: at(50), P90: at(90), P99: at(99), Max: took[len(took)-1]}, ctx.Err()
}
