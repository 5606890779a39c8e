package export

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/boardlink/boardlink/driver/block"
	"github.com/boardlink/boardlink/nbd"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// disk is a disk in memory. Requests end on a goroutine of their own, in any order; those before them that are held end with release.
type disk struct {
	info  block.Info
	ready chan struct{}

	mu      sync.Mutex
	content []byte
	flushes int
	unmaps  int
	hold    bool
	held    []*block.Request
	gone    []block.Owner
	ends    sync.WaitGroup
}

func newDisk(size int) *disk {
	d := &disk{info: block.Info{Size: uint64(size), BlockSize: 512, Flush: true, Discard: true, WriteZeroes: true}, content: make([]byte, size), ready: make(chan struct{})}
	close(d.ready)
	return d
}

func (d *disk) Info() (block.Info, bool) {
	select {
	case <-d.ready:
		d.mu.Lock()
		defer d.mu.Unlock()
		return d.info, true
	default:
		return block.Info{}, false
	}
}
func (d *disk) Ready() <-chan struct{} { return d.ready }

func (d *disk) Cancel(o block.Owner) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.gone = append(d.gone, o)
}

func (d *disk) Submit(rs ...*block.Request) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, r := range rs {
		if d.hold {
			d.held = append(d.held, r)
			continue
		}
		d.start(r)
	}
}

func (d *disk) start(r *block.Request) {
	d.ends.Add(1)
	go func() {
		defer d.ends.Done()
		o := r.Owner
		r.Err = d.do(r)
		o.Done(r)
		o.Flush()
	}()
}

func (d *disk) release() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.hold = false
	for _, r := range d.held {
		d.start(r)
	}
	d.held = nil
}

func (d *disk) do(r *block.Request) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if r.Op != block.Flush {
		if (r.Offset|r.Length)%512 != 0 {
			return block.ErrAlign
		}
		if r.Offset+r.Length > uint64(len(d.content)) {
			return block.ErrRange
		}
	}
	switch area := d.content[r.Offset : r.Offset+r.Length]; r.Op {
	case block.Read:
		copy(r.Data, area)
	case block.Write:
		if len(r.Data) > 0 && r.Data[0] == 0xee {
			return block.ErrIO
		}
		copy(area, r.Data)
	case block.Flush:
		d.flushes++
	case block.Discard, block.WriteZeroes:
		if r.Unmap {
			d.unmaps++
		}
		clear(area)
	}
	return nil
}

func serve(t testing.TB, d *disk) (s *Server, path string) {
	t.Helper()
	s = New(Config{Name: "root", Disk: d})
	path = filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Serve(l); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		d.release()
		d.ends.Wait()
	})
	return s, path
}

// client is a client of the protocol.
type client struct {
	t testing.TB
	net.Conn
}

func dial(t testing.TB, path string) *client {
	t.Helper()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(60 * time.Second))
	return &client{t, c}
}

func (c *client) read(n int) []byte {
	c.t.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(c, b); err != nil {
		c.t.Fatalf("reading %d bytes: %v", n, err)
	}
	return b
}

func (c *client) greet(flags uint32) {
	c.t.Helper()
	b := c.read(nbd.GreetingLen)
	if binary.BigEndian.Uint64(b) != nbd.MagicInit || binary.BigEndian.Uint64(b[8:]) != nbd.MagicOption || binary.BigEndian.Uint16(b[16:]) != 3 {
		c.t.Fatalf("greeting %x", b)
	}
	binary.Write(c, binary.BigEndian, flags)
}

func (c *client) option(opt uint32, data []byte) {
	b := make([]byte, nbd.OptionLen)
	(&nbd.Option{Option: opt, Length: uint32(len(data))}).Put(b)
	c.Write(append(b, data...))
}

// reply reads a reply to an option, which has to be of this kind.
func (c *client) reply(opt, kind uint32) []byte {
	c.t.Helper()
	var r nbd.OptionReply
	if err := r.Parse(c.read(nbd.OptionReplyLen)); err != nil {
		c.t.Fatal(err)
	}
	data := c.read(int(r.Length))
	if r.Option != opt || r.Type != kind {
		c.t.Fatalf("reply %+v %q, want one of %#x to %d", r, data, kind, opt)
	}
	return data
}

// connect goes through the handshake.
func connect(t testing.TB, path string) *client {
	t.Helper()
	c := dial(t, path)
	c.greet(3)
	c.option(nbd.OptGo, (&nbd.Go{Name: "root"}).Encode())
	c.reply(nbd.OptGo, nbd.RepInfo)
	c.reply(nbd.OptGo, nbd.RepInfo)
	c.reply(nbd.OptGo, nbd.RepAck)
	return c
}

func (c *client) send(q nbd.Request, data []byte) {
	b := make([]byte, nbd.RequestLen)
	q.Put(b)
	c.Write(append(b, data...))
}

func (c *client) simple() nbd.SimpleReply {
	c.t.Helper()
	var r nbd.SimpleReply
	if err := r.Parse(c.read(nbd.SimpleReplyLen)); err != nil {
		c.t.Fatal(err)
	}
	return r
}

// do sends a request and reads its reply.
func (c *client) do(q nbd.Request, data []byte) (uint32, []byte) {
	c.t.Helper()
	q.Cookie = 77
	c.send(q, data)
	r := c.simple()
	if r.Cookie != 77 {
		c.t.Fatalf("cookie %d", r.Cookie)
	}
	if q.Type == nbd.CmdRead && r.Error == 0 {
		return 0, c.read(int(q.Length))
	}
	return r.Error, nil
}

func (c *client) ended() {
	c.t.Helper()
	if b, err := io.ReadAll(c); len(b) != 0 || err != nil && !strings.Contains(err.Error(), "reset") {
		c.t.Errorf("the connection is not closed: %q, %v", b, err)
	}
}

func TestHandshake(t *testing.T) {
	d := newDisk(1 << 20)
	d.info.BlockSize, d.info.Preferred = 4096, 1<<16
	_, path := serve(t, d)
	c := dial(t, path)
	c.greet(3)
	c.option(nbd.OptStructuredReply, nil)
	c.reply(nbd.OptStructuredReply, nbd.RepErrUnsup)
	c.option(4711, make([]byte, 1000))
	c.reply(4711, nbd.RepErrUnsup)
	c.option(nbd.OptList, nil)
	if b := c.reply(nbd.OptList, nbd.RepServer); string(b) != "\x00\x00\x00\x04root" {
		t.Errorf("the list is %q", b)
	}
	c.reply(nbd.OptList, nbd.RepAck)
	c.option(nbd.OptList, []byte{1})
	c.reply(nbd.OptList, nbd.RepErrInvalid)
	c.option(nbd.OptGo, []byte{1})
	c.reply(nbd.OptGo, nbd.RepErrInvalid)
	c.option(nbd.OptGo, (&nbd.Go{Name: "other"}).Encode())
	if b := c.reply(nbd.OptGo, nbd.RepErrUnknown); !strings.Contains(string(b), `"root"`) {
		t.Errorf("the error does not name the export: %q", b)
	}
	for _, opt := range []uint32{nbd.OptInfo, nbd.OptGo} {
		c.option(opt, (&nbd.Go{Infos: []uint16{nbd.InfoBlockSize}}).Encode())
		e, _, err := nbd.ParseInfo(c.reply(opt, nbd.RepInfo))
		want := nbd.ExportInfo{Size: 1 << 20, Flags: nbd.HasFlags | nbd.SendFlush | nbd.SendFUA | nbd.SendTrim | nbd.SendWriteZeroes | nbd.CanMultiConn}
		if err != nil || e == nil || *e != want {
			t.Errorf("export %+v, %v, want %+v", e, err, want)
		}
		_, s, err := nbd.ParseInfo(c.reply(opt, nbd.RepInfo))
		if err != nil || s == nil || *s != (nbd.BlockSize{Min: 4096, Preferred: 1 << 16, Max: 32 << 20}) {
			t.Errorf("sizes %+v, %v", s, err)
		}
		c.reply(opt, nbd.RepAck)
	}
	if e, b := c.do(nbd.Request{Type: nbd.CmdRead, Length: 4096}, nil); e != 0 || !bytes.Equal(b, make([]byte, 4096)) {
		t.Errorf("read: %d", e)
	}

	// The option of old clients, with and without the zeros behind its answer; read-only.
	d.mu.Lock()
	d.info.ReadOnly = true
	d.mu.Unlock()
	for _, flags := range []uint32{1, 3} {
		c := dial(t, path)
		c.greet(flags)
		c.option(nbd.OptExportName, []byte("root"))
		n := 10
		if flags == 1 {
			n += 124
		}
		b := c.read(n)
		if binary.BigEndian.Uint64(b) != 1<<20 || binary.BigEndian.Uint16(b[8:]) != nbd.HasFlags|nbd.SendFlush|nbd.SendFUA|nbd.CanMultiConn|nbd.ReadOnly || !bytes.Equal(b[10:], make([]byte, n-10)) {
			t.Errorf("answer %x", b)
		}
		if e, _ := c.do(nbd.Request{Type: nbd.CmdRead, Length: 512}, nil); e != 0 {
			t.Errorf("read: %d", e)
		}
		c.send(nbd.Request{Type: nbd.CmdDisc}, nil)
		c.ended()
	}
	c = dial(t, path)
	c.greet(3)
	c.option(nbd.OptAbort, nil)
	c.reply(nbd.OptAbort, nbd.RepAck)
	c.ended()
}

// Every command does what it says, and every error is the one of the protocol.
func TestCommands(t *testing.T) {
	d := newDisk(1 << 20)
	s, path := serve(t, d)
	c := connect(t, path)
	fill := bytes.Repeat([]byte{7}, 8192)
	for i, q := range []struct {
		nbd.Request
		data []byte
		want uint32
	}{
		{nbd.Request{Type: nbd.CmdWrite, Offset: 4096, Length: 8192}, fill, 0},
		{nbd.Request{Type: nbd.CmdWrite, Flags: nbd.CmdFlagFUA, Offset: 16384, Length: 512}, fill[:512], 0},
		{nbd.Request{Type: nbd.CmdTrim, Offset: 4096, Length: 512}, nil, 0},
		{nbd.Request{Type: nbd.CmdWriteZeroes, Offset: 8192, Length: 512}, nil, 0},
		{nbd.Request{Type: nbd.CmdWriteZeroes, Flags: nbd.CmdFlagNoHole | nbd.CmdFlagFUA, Offset: 8704, Length: 512}, nil, 0},
		{nbd.Request{Type: nbd.CmdFlush}, nil, 0},
		{nbd.Request{Type: nbd.CmdWrite, Offset: 1<<20 - 512, Length: 1024}, fill[:1024], nbd.ENOSPC},
		{nbd.Request{Type: nbd.CmdWrite, Offset: 1 << 63, Length: 1024}, fill[:1024], nbd.ENOSPC},
		{nbd.Request{Type: nbd.CmdTrim, Offset: 1<<64 - 512, Length: 512}, nil, nbd.ENOSPC},
		{nbd.Request{Type: nbd.CmdRead, Offset: 1 << 20, Length: 512}, nil, nbd.EINVAL},
		{nbd.Request{Type: nbd.CmdRead, Offset: 1, Length: 512}, nil, nbd.EINVAL},
		{nbd.Request{Type: nbd.CmdWrite, Offset: 0, Length: 3}, fill[:3], nbd.EINVAL},
		{nbd.Request{Type: nbd.CmdRead, Length: 1<<25 + 512}, nil, nbd.EINVAL},
		{nbd.Request{Type: nbd.CmdRead, Flags: nbd.CmdFlagDF, Length: 512}, nil, nbd.EINVAL},
		{nbd.Request{Type: nbd.CmdCache, Length: 512}, nil, nbd.EINVAL},
		{nbd.Request{Type: 99}, nil, nbd.EINVAL},
		{nbd.Request{Type: nbd.CmdWrite, Length: 512}, bytes.Repeat([]byte{0xee}, 512), nbd.EIO},
		{nbd.Request{Type: nbd.CmdWrite, Flags: nbd.CmdFlagFUA, Length: 512}, bytes.Repeat([]byte{0xee}, 512), nbd.EIO},
	} {
		if e, _ := c.do(q.Request, q.data); e != q.want {
			t.Errorf("case %d, %+v: error %d, want %d", i, q.Request, e, q.want)
		}
	}
	want := make([]byte, 1<<20)
	copy(want[4096:], fill)
	copy(want[16384:], fill[:512])
	clear(want[4096 : 4096+512])
	clear(want[8192 : 8192+1024])
	if e, b := c.do(nbd.Request{Type: nbd.CmdRead, Length: 1 << 20}, nil); e != 0 || !bytes.Equal(b, want) {
		t.Errorf("the disk has other bytes than were written (error %d)", e)
	}
	d.mu.Lock()
	if d.flushes != 3 || d.unmaps != 1 { // one asked for, two for FUA
		t.Errorf("%d flushes, want 3; %d unmaps, want 1", d.flushes, d.unmaps)
	}
	// It grows.
	d.content = append(d.content, bytes.Repeat([]byte{9}, 512)...)
	d.info.Size += 512
	d.mu.Unlock()
	if e, b := c.do(nbd.Request{Type: nbd.CmdRead, Offset: 1 << 20, Length: 512}, nil); e != 0 || b[0] != 9 {
		t.Errorf("behind what was the end: error %d", e)
	}
	if n := s.Counters(); n["export_requests"] != 20 || n["export_errors"] != 12 || n["export_broken"] != 0 || n["export_clients"] != 1 {
		t.Errorf("counters: %v", n)
	}
}

// Many requests in flight, of several clients, in one stream of bytes each that is cut anywhere: each is answered once, with its own data.
func TestPipelined(t *testing.T) {
	d := newDisk(8 << 20)
	_, path := serve(t, d)
	var all sync.WaitGroup
	for k := 0; k < 3; k++ {
		k := k
		c := connect(t, path)
		all.Add(1)
		go func() {
			defer all.Done()
			const n = 600
			sizes := []int{512, 4096, 512, 60 << 10, 4096, 300 << 10}
			base := k * (2 << 20)
			var stream []byte
			for i := 0; i < n; i++ {
				size := sizes[i%len(sizes)]
				q := nbd.Request{Type: nbd.CmdWrite, Cookie: uint64(i), Offset: uint64(base), Length: uint32(size)}
				if i%2 == 1 {
					q.Type = nbd.CmdRead
				}
				b := make([]byte, nbd.RequestLen)
				q.Put(b)
				if stream = append(stream, b...); q.Type == nbd.CmdWrite {
					stream = append(stream, bytes.Repeat([]byte{byte(k + 1)}, size)...)
				}
			}
			go func() {
				for cut := 1; len(stream) > 0; cut = cut*7%100003 + 1 {
					m := min(cut, len(stream))
					if _, err := c.Write(stream[:m]); err != nil {
						return
					}
					stream = stream[m:]
				}
			}()
			seen := map[uint64]bool{}
			for len(seen) < n {
				var r nbd.SimpleReply
				head := make([]byte, nbd.SimpleReplyLen)
				if _, err := io.ReadFull(c, head); err != nil {
					t.Error(err)
					return
				}
				if err := r.Parse(head); err != nil || r.Error != 0 || r.Cookie >= n || seen[r.Cookie] {
					t.Errorf("client %d: %+v, %v", k, r, err)
					return
				}
				seen[r.Cookie] = true
				if r.Cookie%2 == 1 {
					b := make([]byte, sizes[r.Cookie%uint64(len(sizes))])
					if _, err := io.ReadFull(c, b); err != nil {
						t.Error(err)
						return
					}
					for _, v := range b {
						if v != 0 && v != byte(k+1) {
							t.Errorf("client %d reads a byte %d of somebody else", k, v)
							return
						}
					}
				}
			}
		}()
	}
	all.Wait()
}

// What is not of the protocol closes that connection, and none other.
func TestHostile(t *testing.T) {
	d := newDisk(1 << 20)
	s, path := serve(t, d)
	good := connect(t, path)
	req := func(q nbd.Request) []byte {
		b := make([]byte, nbd.RequestLen)
		q.Put(b)
		return b
	}
	opt := func(o nbd.Option) []byte {
		b := make([]byte, nbd.OptionLen)
		o.Put(b)
		return b
	}
	for i, h := range []struct {
		go_  bool // after the handshake
		send []byte
	}{
		{false, []byte{0, 0, 0, 9}},
		{false, append([]byte{0, 0, 0, 3}, make([]byte, 16)...)},
		{false, append([]byte{0, 0, 0, 3}, opt(nbd.Option{Option: nbd.OptGo, Length: 1 << 31})...)},
		{false, append([]byte{0, 0, 0, 3}, opt(nbd.Option{Option: nbd.OptExportName, Length: 0xffffffff})...)},
		{false, append(append([]byte{0, 0, 0, 3}, opt(nbd.Option{Option: nbd.OptExportName, Length: 1})...), 'x')},
		{false, append([]byte{0, 0, 0, 3}, bytes.Repeat(opt(nbd.Option{Option: 99}), maxOptions+1)...)},
		{true, make([]byte, nbd.RequestLen)},
		{true, req(nbd.Request{Type: nbd.CmdWrite, Length: nbd.MaxPayload + 1})},
		{true, req(nbd.Request{Type: nbd.CmdWrite, Length: 0xffffffff})},
	} {
		c := dial(t, path)
		if h.go_ {
			c.Close()
			c = connect(t, path)
		} else {
			c.read(nbd.GreetingLen)
		}
		c.Write(h.send)
		c.SetDeadline(time.Now().Add(30 * time.Second))
		b, err := io.ReadAll(c)
		if err != nil && !strings.Contains(err.Error(), "reset") || len(b) > maxOptions*nbd.OptionReplyLen {
			t.Errorf("case %d: the connection is not closed: %d bytes, %v", i, len(b), err)
		}
	}
	// Those that go in the middle.
	for _, cut := range []int{1, nbd.RequestLen - 1, nbd.RequestLen, nbd.RequestLen + 100, nbd.RequestLen + 20000} {
		c := connect(t, path)
		c.Write(append(req(nbd.Request{Type: nbd.CmdWrite, Length: 1 << 16}), make([]byte, 1<<16)...)[:cut])
		c.Close()
	}
	for begin := time.Now(); s.Counters()["export_clients"] > 1; time.Sleep(time.Millisecond) {
		if time.Since(begin) > 30*time.Second {
			t.Fatalf("connections are left: %v", s.Counters())
		}
	}
	if e, _ := good.do(nbd.Request{Type: nbd.CmdWrite, Length: 512}, make([]byte, 512)); e != 0 {
		t.Errorf("the other client's write: %d", e)
	}
	if n := s.Counters(); n["export_broken"] < 9 {
		t.Errorf("counters: %v", n)
	}
}

// A client that does not read, one that sends half a request, and one that came and went while the disk was away, hold up nobody.
func TestStalled(t *testing.T) {
	d := newDisk(4 << 20)
	s, path := serve(t, d)
	lazy, half, other := connect(t, path), connect(t, path), connect(t, path)
	const n = 100 // more than is kept for a client, and than the socket takes
	go func() {
		for i := 0; i < n; i++ {
			lazy.send(nbd.Request{Type: nbd.CmdRead, Cookie: uint64(i), Length: 1 << 20}, nil)
		}
	}()
	half.send(nbd.Request{Type: nbd.CmdWrite, Length: 1 << 20}, make([]byte, 1000))
	until(t, "a stall", func() bool { return s.Counters()["export_stalls"] > 0 })
	for i := 0; i < 50; i++ {
		if e, _ := other.do(nbd.Request{Type: nbd.CmdWrite, Length: 4096}, make([]byte, 4096)); e != 0 {
			t.Fatalf("error %d", e)
		}
	}
	seen := map[uint64]bool{}
	for len(seen) < n {
		r := lazy.simple()
		if r.Error != 0 || seen[r.Cookie] {
			t.Fatalf("%+v", r)
		}
		seen[r.Cookie] = true
		lazy.read(1 << 20)
	}

	d.mu.Lock()
	d.hold = true
	d.mu.Unlock()
	gone := connect(t, path)
	for i := 0; i < maxRequests+10; i++ {
		gone.send(nbd.Request{Type: nbd.CmdRead, Length: 512}, nil)
	}
	until(t, "a full connection", func() bool { d.mu.Lock(); defer d.mu.Unlock(); return len(d.held) == maxRequests })
	gone.Close()
	until(t, "the end of a connection that is not read", func() bool { return s.Counters()["export_clients"] == 3 })
	d.mu.Lock()
	canceled := len(d.gone)
	d.mu.Unlock()
	if canceled != 1 {
		t.Errorf("the requests of %d clients are given up, want 1", canceled)
	}
	d.release()
	if e, _ := other.do(nbd.Request{Type: nbd.CmdFlush}, nil); e != 0 {
		t.Fatalf("error %d", e)
	}

	// There are not more than MaxClients.
	var cs []*client
	for i := 0; i < MaxClients-3; i++ {
		cs = append(cs, connect(t, path))
	}
	dial(t, path).ended()
	cs[0].Close()
	until(t, "a place", func() bool { return s.Counters()["export_clients"] == MaxClients-1 })
	connect(t, path)
	if n := s.Counters(); n["export_refused"] != 1 {
		t.Errorf("counters: %v", n)
	}
}

func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for begin := time.Now(); !ok(); time.Sleep(time.Millisecond) {
		if time.Since(begin) > 30*time.Second {
			t.Fatalf("%s does not happen", what)
		}
	}
}

// The kernel's client is past the handshake. A client of a disk that is not known yet waits for it.
func TestAttach(t *testing.T) {
	d := newDisk(1 << 20)
	d.ready = make(chan struct{})
	s, path := serve(t, d)
	c := dial(t, path)
	c.greet(3)
	c.option(nbd.OptGo, (&nbd.Go{}).Encode())
	c.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("an answer, though the disk is not known")
	}
	c.SetReadDeadline(time.Now().Add(60 * time.Second))
	close(d.ready)
	c.reply(nbd.OptGo, nbd.RepInfo)

	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path + "2", Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	k := dial(t, path+"2")
	u, err := l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	ended, err := s.Attach(u)
	if err != nil {
		t.Fatal(err)
	}
	if e, _ := k.do(nbd.Request{Type: nbd.CmdWrite, Offset: 512, Length: 512}, make([]byte, 512)); e != 0 {
		t.Errorf("error %d", e)
	}
	select {
	case <-ended:
		t.Error("the connection has ended")
	default:
	}
	k.Close()
	<-ended
}

func FuzzClient(f *testing.F) {
	req := func(q nbd.Request) []byte {
		b := make([]byte, nbd.RequestLen)
		q.Put(b)
		return b
	}
	opt := make([]byte, nbd.OptionLen)
	(&nbd.Option{Option: nbd.OptExportName}).Put(opt)
	hello := append([]byte{0, 0, 0, 3}, opt...)
	f.Add(append(append([]byte(nil), hello...), req(nbd.Request{Type: nbd.CmdRead, Length: 512})...))
	f.Add(append(append(append([]byte(nil), hello...), req(nbd.Request{Type: nbd.CmdWrite, Length: 512})...), make([]byte, 512)...))
	f.Add(append(append([]byte(nil), hello...), req(nbd.Request{Type: nbd.CmdWriteZeroes, Offset: 1 << 40, Length: 1 << 31, Flags: 0xffff})...))
	d := newDisk(1 << 16)
	s, path := serve(f, d)
	f.Fuzz(func(t *testing.T, b []byte) {
		c := dial(t, path)
		c.Write(b)
		c.Conn.(*net.UnixConn).CloseWrite()
		io.Copy(io.Discard, c) // ends, whatever it was
		c.Close()
		if n := s.Counters()["export_clients"]; n > MaxClients {
			t.Errorf("%d clients", n)
		}
		c = connect(t, path)
		if e, _ := c.do(nbd.Request{Type: nbd.CmdRead, Length: 512}, nil); e != 0 {
			t.Error(fmt.Sprint("a good client's read fails: ", e))
		}
		c.Close()
	})
}
