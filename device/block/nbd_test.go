package block

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/nbd"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/vring"
)

// server is an NBD server in memory that can be killed and come again.
type server struct {
	t     testing.TB
	path  string
	size  int
	flags uint16
	block uint32
	old   bool // does not know the option GO
	// hold has requests wait for an answer, out of order then.
	hold func(nbd.Request) bool

	mu     sync.Mutex
	mem    []byte
	ln     net.Listener
	conns  []net.Conn
	seen   []nbd.Request
	wg     sync.WaitGroup
	accept int
}

const allFlags = nbd.HasFlags | nbd.SendFlush | nbd.SendFUA | nbd.SendTrim | nbd.SendWriteZeroes

func newServer(t testing.TB, size int) *server {
	s := &server{t: t, path: filepath.Join(t.TempDir(), "nbd.sock"), size: size, flags: allFlags, mem: make([]byte, size)}
	t.Cleanup(s.kill)
	return s
}

// start lets it listen.
func (s *server) start() {
	s.t.Helper()
	os.Remove(s.path)
	ln, err := net.Listen("unix", s.path)
	if err != nil {
		s.t.Fatal(err)
	}
	s.mu.Lock()
	s.ln = ln
	s.mu.Unlock()
	s.wg.Add(1)
	go func() {
		defer s.wg.Done()
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			s.mu.Lock()
			s.conns = append(s.conns, c)
			s.accept++
			s.mu.Unlock()
			s.wg.Add(1)
			go func() {
				defer s.wg.Done()
				defer c.Close()
				if err := s.greet(c); err == nil {
					s.serve(c)
				}
			}()
		}
	}()
}

// kill ends it with all connections.
func (s *server) kill() {
	s.mu.Lock()
	if s.ln != nil {
		s.ln.Close()
	}
	for _, c := range s.conns {
		c.Close()
	}
	s.conns = nil
	s.mu.Unlock()
	s.wg.Wait()
}

func (s *server) greet(c net.Conn) error {
	var g [nbd.GreetingLen]byte
	binary.BigEndian.PutUint64(g[:], nbd.MagicInit)
	binary.BigEndian.PutUint64(g[8:], nbd.MagicOption)
	binary.BigEndian.PutUint16(g[16:], nbd.FlagFixedNewstyle)
	c.Write(g[:])
	var f [4]byte
	if _, err := io.ReadFull(c, f[:]); err != nil {
		return err
	}
	for {
		var h [nbd.OptionLen]byte
		if _, err := io.ReadFull(c, h[:]); err != nil {
			return err
		}
		var o nbd.Option
		if err := o.Parse(h[:]); err != nil || o.Length > 1000 {
			return fmt.Errorf("%v", err)
		}
		data := make([]byte, o.Length)
		if _, err := io.ReadFull(c, data); err != nil {
			return err
		}
		reply := func(kind uint32, p []byte) {
			var b [nbd.OptionReplyLen]byte
			r := nbd.OptionReply{Option: o.Option, Type: kind, Length: uint32(len(p))}
			r.Put(b[:])
			c.Write(append(b[:], p...))
		}
		e := nbd.ExportInfo{Size: uint64(s.size), Flags: s.flags}
		switch {
		case o.Option == nbd.OptGo && !s.old:
			g, err := nbd.ParseGo(data)
			if err != nil || g.Name != "" {
				reply(nbd.RepErrUnknown, nil)
				continue
			}
			reply(nbd.RepInfo, e.Encode())
			if s.block != 0 {
				bs := nbd.BlockSize{Min: s.block, Preferred: 4096, Max: 1 << 25}
				reply(nbd.RepInfo, bs.Encode())
			}
			reply(nbd.RepAck, nil)
			return nil
		case o.Option == nbd.OptExportName:
			b := make([]byte, 10+nbd.ExportNamePad)
			binary.BigEndian.PutUint64(b, e.Size)
			binary.BigEndian.PutUint16(b[8:], e.Flags)
			c.Write(b)
			return nil
		default:
			reply(nbd.RepErrUnsup, nil)
		}
	}
}

func (s *server) serve(c net.Conn) {
	var wmu sync.Mutex
	for {
		var b [nbd.RequestLen]byte
		if _, err := io.ReadFull(c, b[:]); err != nil {
			return
		}
		var r nbd.Request
		if err := r.Parse(b[:]); err != nil {
			s.t.Error(err)
			return
		}
		var data []byte
		if r.Type == nbd.CmdWrite {
			data = make([]byte, r.Length)
			if _, err := io.ReadFull(c, data); err != nil {
				return
			}
		}
		s.mu.Lock()
		s.seen = append(s.seen, r)
		held := s.hold != nil && s.hold(r)
		code := uint32(0)
		switch end := r.Offset + uint64(r.Length); {
		case held:
		case end > uint64(len(s.mem)):
			code = nbd.EINVAL
		case r.Type == nbd.CmdRead:
			data = append([]byte(nil), s.mem[r.Offset:end]...)
		case r.Type == nbd.CmdWrite:
			copy(s.mem[r.Offset:], data)
			data = nil
		case r.Type == nbd.CmdWriteZeroes:
			copy(s.mem[r.Offset:end], make([]byte, r.Length))
		}
		s.mu.Unlock()
		if r.Type == nbd.CmdDisc {
			return
		}
		if held {
			continue
		}
		var h [nbd.SimpleReplyLen]byte
		a := nbd.SimpleReply{Error: code, Cookie: r.Cookie}
		a.Put(h[:])
		wmu.Lock()
		c.Write(append(h[:], data...))
		wmu.Unlock()
	}
}

func (s *server) took() []nbd.Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.seen
	s.seen = nil
	return r
}

// await waits until the server has seen n requests.
func (s *server) await(n int) {
	s.t.Helper()
	for begin := time.Now(); ; time.Sleep(time.Millisecond) {
		s.mu.Lock()
		k := len(s.seen)
		s.mu.Unlock()
		if k >= n {
			return
		}
		if time.Since(begin) > 20*time.Second {
			s.t.Fatalf("%d requests, want %d", k, n)
		}
	}
}

func openNBD(t testing.TB, c NBDConfig) Backend {
	t.Helper()
	b, err := OpenNBD(c)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// All requests by a server, of the new handshake and of the old one.
func TestNBD(t *testing.T) {
	for _, old := range []bool{false, true} {
		s := newServer(t, 1<<20)
		s.old = old
		s.start()
		d := newDisk(t, Config{Backend: openNBD(t, NBDConfig{Path: s.path})}, mmio.Cached)
		if st := d.write(4, pattern(1, 8192)); st != virtio.BlkOK || !bytes.Equal(d.read(4, 8192), pattern(1, 8192)) || !bytes.Equal(s.mem[2048:][:8192], pattern(1, 8192)) {
			t.Fatalf("status %d, or the data differ", st)
		}
		r := d.request(virtio.BlkTIn, 5, false, 100, 300, 112)
		if st := d.do(r); st != virtio.BlkOK || !bytes.Equal(bytesOf(r.data...), pattern(1, 8192)[512:1024]) {
			t.Errorf("read to several buffers: status %d", st)
		}
		for _, c := range []struct {
			kind, flags uint32
			want        nbd.Request
		}{{virtio.BlkTDiscard, 0, nbd.Request{Type: nbd.CmdTrim, Offset: 4096, Length: 1024}},
			{virtio.BlkTWriteZeroes, 0, nbd.Request{Type: nbd.CmdWriteZeroes, Flags: nbd.CmdFlagNoHole, Offset: 4096, Length: 1024}},
			{virtio.BlkTWriteZeroes, virtio.BlkUnmap, nbd.Request{Type: nbd.CmdWriteZeroes, Offset: 4096, Length: 1024}},
			{virtio.BlkTFlush, 0, nbd.Request{Type: nbd.CmdFlush}}} {
			s.took()
			r := d.request(c.kind, 0, true)
			if c.kind != virtio.BlkTFlush {
				g := virtio.BlkSegment{Sector: 8, Sectors: 2, Flags: c.flags}.Encode()
				r.data = append(r.data, d.fill(d.Take(16), g[:]))
			}
			if st := d.do(r); st != virtio.BlkOK {
				t.Errorf("type %d: status %d", c.kind, st)
			}
			got := s.took()
			if len(got) != 1 {
				t.Fatalf("type %d: %d requests", c.kind, len(got))
			}
			if got[0].Cookie = 0; got[0] != c.want {
				t.Errorf("type %d: %+v, want %+v", c.kind, got[0], c.want)
			}
		}
		// With the write cache off a write is one with FUA.
		if err := d.b.WriteConfig(virtio.BlkWritebackOff, []byte{0}); err != nil {
			t.Fatal(err)
		}
		d.write(0, make([]byte, 512))
		if got := s.took(); len(got) != 1 || got[0].Flags != nbd.CmdFlagFUA {
			t.Errorf("a durable write: %+v", got)
		}
		if n := d.b.Status(); n.Counters["nbd_connects"] != 1 || n.Counters["failed"] != 0 || !strings.HasPrefix(n.Interface, "nbd ") {
			t.Errorf("%+v", n)
		}
	}
}

// Requests that the server had when it was killed are sent again when it is back, none twice, and those that came meanwhile with them.
func TestNBDReconnect(t *testing.T) {
	s := newServer(t, 1<<20)
	s.hold = func(r nbd.Request) bool { return r.Type == nbd.CmdWrite }
	s.start()
	var mu sync.Mutex
	var lines []string
	d := newDisk(t, Config{Backend: openNBD(t, NBDConfig{Path: s.path, Logf: func(f string, a ...interface{}) {
		mu.Lock()
		defer mu.Unlock()
		lines = append(lines, fmt.Sprintf(f, a...))
	}})}, mmio.Cached)
	add := func(i int) {
		r := d.request(virtio.BlkTOut, uint64(i), true, 512)
		d.fill(r.data[0], pattern(byte(i), 512))
		d.q.Add(r.vring(uint32(i)))
	}
	for i := 0; i < 8; i++ {
		add(i)
	}
	s.await(8)
	s.kill()
	for begin := time.Now(); !strings.Contains(d.b.Status().Interface, "not connected"); time.Sleep(time.Millisecond) {
		if time.Since(begin) > 20*time.Second {
			t.Fatalf("%+v", d.b.Status())
		}
	}
	for i := 8; i < 12; i++ {
		add(i)
	}
	if n, err := d.q.Reap(make([]vring.Completion, 16)); n != 0 || err != nil {
		t.Fatalf("%d requests ended without a server (%v)", n, err)
	}
	if _, err := d.b.StopQueue(0, time.Now().Add(20*time.Millisecond)); !errors.Is(err, device.ErrStuck) {
		t.Errorf("a queue whose requests wait: %v", err)
	}
	s.took()
	s.mu.Lock()
	s.hold = nil
	s.mu.Unlock()
	s.start()
	st, err := d.b.StopQueue(0, time.Time{})
	if err != nil || st.State.Avail != st.State.Used {
		t.Fatalf("%+v, %v", st, err)
	}
	d.q.Start(st.State)
	seen := map[uint32]bool{}
	for _, c := range d.q.Wait(12) {
		seen[c.Token] = true
	}
	if len(seen) != 12 || len(s.took()) != 12 {
		t.Errorf("%d requests ended", len(seen))
	}
	for i := 0; i < 12; i++ {
		if !bytes.Equal(s.mem[i*512:][:512], pattern(byte(i), 512)) {
			t.Errorf("sector %d differs", i)
		}
	}
	mu.Lock()
	defer mu.Unlock()
	if len(lines) != 2 || !strings.Contains(lines[0], "connection is lost") || !strings.Contains(lines[1], "requests are sent again") || d.b.Status().Counters["nbd_connects"] != 2 {
		t.Errorf("lines %q, %v", lines, d.b.Status().Counters)
	}
}

// A server that does not answer holds up neither a reset nor the end.
func TestNBDStuck(t *testing.T) {
	for _, killed := range []bool{false, true} {
		s := newServer(t, 1<<20)
		s.hold = func(nbd.Request) bool { return true }
		s.start()
		d := newDisk(t, Config{Backend: openNBD(t, NBDConfig{Path: s.path})}, mmio.Cached)
		for i := 0; i < 4; i++ {
			d.q.Add(d.request(virtio.BlkTIn, 0, false, 512).vring(uint32(i)))
		}
		s.await(4)
		if killed {
			s.kill()
		}
		if err := d.b.Reset(time.Now().Add(200 * time.Millisecond)); err != nil && !errors.Is(err, device.ErrStuck) {
			t.Fatal(err)
		}
		if err := d.b.Close(); err != nil {
			t.Fatal(err)
		}
		if n := d.b.Status().Counters; n["dropped"] != 4 {
			t.Errorf("killed %v: %v", killed, n)
		}
	}
}

// What is no server, or not the right one, is one line; an export that is another one after a reconnect is not used.
func TestNBDRefused(t *testing.T) {
	for want, f := range map[string]func(*server) NBDConfig{
		"no such file":                 func(s *server) NBDConfig { return NBDConfig{Path: "/none.sock"} },
		"no export \"x\"":              func(s *server) NBDConfig { return NBDConfig{Path: s.path, Export: "x"} },
		"needs the key ro":             func(s *server) NBDConfig { s.flags |= nbd.ReadOnly; return NBDConfig{Path: s.path} },
		"1000 bytes, no multiple":      func(s *server) NBDConfig { s.size = 1000; return NBDConfig{Path: s.path} },
		"0 bytes, no multiple":         func(s *server) NBDConfig { s.size = 0; return NBDConfig{Path: s.path} },
		"blocks of 700 bytes":          func(s *server) NBDConfig { s.block = 700; return NBDConfig{Path: s.path} },
		"blocks of 1048576 bytes, up ": func(s *server) NBDConfig { s.block = 1 << 20; return NBDConfig{Path: s.path} },
	} {
		s := newServer(t, 1<<20)
		cfg := f(s)
		s.start()
		if b, err := OpenNBD(cfg); err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: %v, %v", want, b, err)
		}
		s.kill()
	}
	s := newServer(t, 1<<20)
	s.start()
	b := openNBD(t, NBDConfig{Path: s.path})
	defer b.Close()
	s.kill()
	s.size = 2 << 20
	s.start()
	for begin := time.Now(); !strings.Contains(b.(*client).State(), "another one now: 2097152 bytes"); time.Sleep(time.Millisecond) {
		if time.Since(begin) > 20*time.Second {
			t.Fatal(b.(*client).State())
		}
	}
}

// FuzzNBDHandshake reads what a server says at first.
func FuzzNBDHandshake(f *testing.F) {
	var g [nbd.GreetingLen]byte
	binary.BigEndian.PutUint64(g[:], nbd.MagicInit)
	binary.BigEndian.PutUint64(g[8:], nbd.MagicOption)
	g[17] = 3
	reply := func(kind uint32, p []byte) []byte {
		b := make([]byte, nbd.OptionReplyLen)
		r := nbd.OptionReply{Option: nbd.OptGo, Type: kind, Length: uint32(len(p))}
		r.Put(b)
		return append(b, p...)
	}
	e, s := nbd.ExportInfo{Size: 1 << 20, Flags: allFlags}, nbd.BlockSize{Min: 512, Preferred: 4096, Max: 1 << 25}
	good := append(append(append(append([]byte{}, g[:]...), reply(nbd.RepInfo, e.Encode())...), reply(nbd.RepInfo, s.Encode())...), reply(nbd.RepAck, nil)...)
	f.Add(good)
	f.Add(append(append(append([]byte{}, g[:]...), reply(nbd.RepErrUnsup, nil)...), good[38:]...))
	f.Add(append(append([]byte{}, g[:]...), reply(nbd.RepErrPolicy, []byte("no\n"))...))
	f.Fuzz(func(t *testing.T, in []byte) {
		rw := struct {
			io.Reader
			io.Writer
		}{bytes.NewReader(in), io.Discard}
		e, s, err := handshake(rw, "x")
		if err != nil {
			if strings.Contains(err.Error(), "\n") || len(err.Error()) > 1000 {
				t.Errorf("%q", err)
			}
			return
		}
		c := client{cfg: NBDConfig{ReadOnly: true}}
		if err := c.measure(e, s); err == nil && (c.geo.Size%512 != 0 || c.geo.BlockSize < 512 || c.geo.BlockSize&(c.geo.BlockSize-1) != 0) {
			t.Errorf("%+v", c.geo)
		}
	})
}

// FuzzNBDReplies has a server say anything in answer to four requests. Each of them ends, when the client is closed at the latest, and
// nothing but their buffers is written.
func FuzzNBDReplies(f *testing.F) {
	reply := func(code uint32, cookie uint64, n int) []byte {
		b := make([]byte, nbd.SimpleReplyLen+n)
		r := nbd.SimpleReply{Error: code, Cookie: cookie}
		r.Put(b)
		return b
	}
	f.Add(bytes.Join([][]byte{reply(0, 3, 0), reply(0, 1, 512), reply(28, 2, 0), reply(0, 4, 0)}, nil))
	f.Add(append(reply(0, 1, 512), reply(0, 1, 512)...))
	f.Add(reply(0, 99, 0))
	f.Add(reply(0, 1, 100))
	f.Add([]byte("HTTP/1.1 400 Bad Request\r\n"))
	f.Fuzz(func(t *testing.T, in []byte) {
		if len(in) > 1<<16 {
			return
		}
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		var ends [2]*net.UnixConn
		for i, fd := range fds {
			file := os.NewFile(uintptr(fd), "pair")
			c, err := net.FileConn(file)
			if err != nil {
				t.Fatal(err)
			}
			file.Close()
			ends[i] = c.(*net.UnixConn)
		}
		c := newClient(NBDConfig{Path: "/none.sock"})
		if err := c.measure(nbd.ExportInfo{Size: 1 << 20, Flags: allFlags}, nbd.BlockSize{}); err != nil {
			t.Fatal(err)
		}
		c.conn = ends[0]
		go c.run(ends[0])
		mem := make([]byte, 3*512)
		var wg sync.WaitGroup
		for _, call := range []func() error{
			func() error { return c.ReadAt([]unix.Iovec{iovec(mem[512:600]), iovec(mem[600:1024])}, 0) },
			func() error { return c.WriteAt([]unix.Iovec{iovec(make([]byte, 4096))}, 0, false) },
			c.Flush,
			func() error { return c.Discard(0, 4096) },
		} {
			wg.Add(1)
			go func() { defer wg.Done(); call() }()
		}
		go io.Copy(io.Discard, ends[1])
		ends[1].Write(in)
		ends[1].CloseWrite()
		time.Sleep(100 * time.Microsecond)
		c.Close()
		wg.Wait()
		ends[1].Close()
		if !bytes.Equal(mem[:512], make([]byte, 512)) || !bytes.Equal(mem[1024:], make([]byte, 512)) {
			t.Fatal("bytes beside the buffer were written")
		}
	})
}
