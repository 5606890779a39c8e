package vhostuser

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// pair returns a connected pair of stream sockets: the front end's descriptor, and the back end's
// connection.
func pair(t testing.TB) (front int, back *net.UnixConn) {
	t.Helper()
	p, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(p[1]), "back")
	c, err := net.FileConn(f)
	f.Close()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); unix.Close(p[0]) })
	return p[0], c.(*net.UnixConn)
}

func readerOf(t testing.TB, c *net.UnixConn) *reader {
	t.Helper()
	s, err := newSocket(c)
	if err != nil {
		t.Fatal(err)
	}
	return &reader{src: s, n: new(counters)}
}

// send writes bytes with descriptors.
func send(t testing.TB, fd int, b []byte, fds ...int) {
	t.Helper()
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	if err := unix.Sendmsg(fd, b, oob, nil, 0); err != nil {
		t.Fatal(err)
	}
}

// openFDs counts the descriptors of this process that are the file of fd.
func openFDs(t testing.TB, of int) int {
	t.Helper()
	var want unix.Stat_t
	if err := unix.Fstat(of, &want); err != nil {
		t.Fatal(err)
	}
	es, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, e := range es {
		var st unix.Stat_t
		if unix.Stat("/proc/self/fd/"+e.Name(), &st) == nil && st.Dev == want.Dev && st.Ino == want.Ino {
			n++
		}
	}
	return n
}

// memfd makes a file in memory.
func memfd(t testing.TB, size int64) int {
	t.Helper()
	fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.Ftruncate(fd, size); err != nil {
		t.Fatal(err)
	}
	return fd
}

func TestReaderSplitAtEveryByte(t *testing.T) {
	a := encodeMessage(SetVringNum, flagVersion|flagNeedReply, vringState{1, 256}.encode())
	b := encodeMessage(SetVringKick, flagVersion, encodeU64(3))
	both := append(append([]byte(nil), a...), b...)
	fd := memfd(t, 4096)
	front, back := pair(t)
	r := readerOf(t, back)
	for cut := 0; cut <= len(both); cut++ {
		done := make(chan struct{})
		go func(cut int) {
			defer close(done)
			// The descriptor comes with a byte of the second message: its first one, or its part
			// behind the cut.
			switch {
			case cut <= len(a):
				if cut > 0 {
					send(t, front, both[:cut])
				}
				if cut < len(a) {
					send(t, front, both[cut:len(a)])
				}
				send(t, front, b, fd)
			default:
				send(t, front, a)
				send(t, front, both[len(a):cut])
				if cut < len(both) {
					send(t, front, both[cut:], fd)
				}
			}
		}(cut)
		m, err := r.next()
		if err != nil {
			t.Fatalf("cut at %d: %v", cut, err)
		}
		if s, err := m.vringState(); m.req != SetVringNum || !m.needReply() || err != nil || s != (vringState{1, 256}) || len(m.fds) != 0 {
			t.Fatalf("cut at %d: %v %+v %v, %d descriptors", cut, m.req, s, err, len(m.fds))
		}
		m, err = r.next()
		if err != nil {
			t.Fatalf("cut at %d: %v", cut, err)
		}
		want := 1
		if cut == len(both) {
			want = 0
		}
		if v, err := m.u64(); m.req != SetVringKick || m.needReply() || err != nil || v != 3 || len(m.fds) != want {
			t.Fatalf("cut at %d: %v %d %v, %d descriptors, want %d", cut, m.req, v, err, len(m.fds), want)
		}
		if n := m.close(); n != want {
			t.Fatalf("cut at %d: %d descriptors closed, want %d", cut, n, want)
		}
		<-done
	}
	if n := openFDs(t, fd); n != 1 {
		t.Errorf("%d descriptors of the file are open, want 1", n)
	}
}

func TestReaderMerged(t *testing.T) {
	front, back := pair(t)
	r := readerOf(t, back)
	var all []byte
	for i := uint64(0); i < 50; i++ {
		all = append(all, encodeMessage(SetFeatures, flagVersion, encodeU64(i))...)
	}
	send(t, front, all)
	for i := uint64(0); i < 50; i++ {
		m, err := r.next()
		if err != nil {
			t.Fatal(err)
		}
		if v, err := m.u64(); err != nil || v != i {
			t.Fatalf("message %d carries %d, %v", i, v, err)
		}
	}
	unix.Shutdown(front, unix.SHUT_WR)
	if _, err := r.next(); err != io.EOF {
		t.Errorf("at the end: %v, want EOF", err)
	}
	if r.n.Messages != 50 {
		t.Errorf("%d messages counted", r.n.Messages)
	}
}

func TestReaderRefuses(t *testing.T) {
	ok := encodeMessage(SetFeatures, flagVersion, encodeU64(1))
	head := func(flags, size uint32) []byte {
		b := append([]byte(nil), ok[:headerLen]...)
		native.PutUint32(b[4:], flags)
		native.PutUint32(b[8:], size)
		return b
	}
	for _, c := range []struct {
		name string
		b    []byte
		want error
	}{
		{"version 0", head(0, 8), ErrVersion},
		{"version 2", head(2, 8), ErrVersion},
		{"a reply", head(flagVersion|flagReply, 8), ErrVersion},
		{"too long", head(flagVersion, maxPayload+1), ErrLength},
		{"the longest number", head(flagVersion, 1<<32-1), ErrLength},
		{"half a header", ok[:7], io.ErrUnexpectedEOF},
		{"a header alone", ok[:headerLen], io.ErrUnexpectedEOF},
		{"half a payload", ok[:headerLen+3], io.ErrUnexpectedEOF},
	} {
		t.Run(c.name, func(t *testing.T) {
			front, back := pair(t)
			fd := memfd(t, 1)
			send(t, front, c.b, fd, fd)
			unix.Shutdown(front, unix.SHUT_WR)
			if m, err := readerOf(t, back).next(); !errors.Is(err, c.want) || m != nil {
				t.Errorf("%v, want %v", err, c.want)
			}
			if n := openFDs(t, fd); n != 1 {
				t.Errorf("%d descriptors of the file are open, want 1", n)
			}
		})
	}
}

// TestReaderFlood: descriptors beyond those that a message may carry never stay open.
func TestReaderFlood(t *testing.T) {
	msg := encodeMessage(SetFeatures, flagVersion, encodeU64(1))
	for _, c := range []struct {
		name string
		each []int // descriptors with each piece of the message
		ok   bool
	}{
		{"8 at once", []int{8}, true},
		{"9 at once", []int{9}, false},
		{"253 at once", []int{253}, false},
		{"8 in two pieces", []int{5, 3}, true},
		{"9 in two pieces", []int{5, 4}, false},
		{"1 beyond 8", []int{8, 1}, false},
		{"100 with each byte", []int{100, 100, 100, 100, 100}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			front, back := pair(t)
			fd := memfd(t, 1)
			b := msg
			for i, n := range c.each {
				fds := make([]int, n)
				for j := range fds {
					fds[j] = fd
				}
				k := 1
				if i == len(c.each)-1 {
					k = len(b)
				}
				send(t, front, b[:k], fds...)
				b = b[k:]
			}
			m, err := readerOf(t, back).next()
			if c.ok {
				if err != nil || len(m.fds) != 8 {
					t.Fatalf("%v, want 8 descriptors", err)
				}
				if n := openFDs(t, fd); n != 9 {
					t.Errorf("%d descriptors of the file are open, want 9", n)
				}
				m.close()
			} else if !errors.Is(err, ErrDescriptors) {
				t.Errorf("%v, want %v", err, ErrDescriptors)
			}
			if n := openFDs(t, fd); n != 1 {
				t.Errorf("%d descriptors of the file are open at the end, want 1", n)
			}
		})
	}
}

// TestReaderClose: closing the connection ends a wait for a message.
func TestReaderClose(t *testing.T) {
	_, back := pair(t)
	r := readerOf(t, back)
	done := make(chan error)
	go func() { _, err := r.next(); done <- err }()
	time.Sleep(10 * time.Millisecond)
	back.Close()
	select {
	case err := <-done:
		if err == nil {
			t.Error("a message came out of a connection that was closed")
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the reader does not end")
	}
}

// inOrder joins fields, which are given little-endian, in this machine's order of bytes: vhost-user has the order of
// the machine that both ends run on.
func inOrder(fields ...[]byte) []byte {
	little := binary.NativeEndian.Uint16([]byte{1, 0}) == 1
	var b []byte
	for _, f := range fields {
		for i := range f {
			if little {
				b = append(b, f[i])
			} else {
				b = append(b, f[len(f)-1-i])
			}
		}
	}
	return b
}

// TestGolden holds the layouts to the bytes of the specification.
func TestGolden(t *testing.T) {
	u32 := func(v byte) []byte { return []byte{v, 0, 0, 0} }
	for _, c := range []struct {
		name      string
		got, want []byte
	}{
		{"SET_VRING_NUM", encodeMessage(SetVringNum, flagVersion|flagNeedReply, vringState{2, 0x100}.encode()),
			inOrder(u32(8), u32(9), u32(8), u32(2), []byte{0, 1, 0, 0})},
		{"GET_FEATURES", encodeReply(GetFeatures, encodeU64(featProtocol|1<<32)),
			inOrder(u32(1), u32(5), u32(8), []byte{0, 0, 0, 0x40, 1, 0, 0, 0})},
		{"GET_CONFIG", encodeReply(GetConfig, config{offset: 6, flags: 1, data: []byte{0xa, 0xb}}.encode()),
			inOrder(u32(24), u32(5), u32(14), u32(6), u32(2), u32(1), []byte{0xa}, []byte{0xb})},
	} {
		if !bytes.Equal(c.got, c.want) {
			t.Errorf("%s: % x, want % x", c.name, c.got, c.want)
		}
	}
	run := func(from byte, n int) []byte { // n bytes that count up
		b := make([]byte, n)
		for i := range b {
			b[i] = from + byte(i)
		}
		return b
	}
	table := [][]byte{u32(2), u32(0)}
	for i := 0; i < 8; i++ { // two regions of four fields
		table = append(table, run(byte(8*i), 8))
	}
	b := append(inOrder(table...), make([]byte, 6*regionLen)...) // QEMU sends room for all
	rs, err := (&message{req: SetMemTable, payload: b}).memTable()
	if err != nil || len(rs) != 2 || rs[1] != (region{0x2726252423222120, 0x2f2e2d2c2b2a2928, 0x3736353433323130, 0x3f3e3d3c3b3a3938}) {
		t.Errorf("%#x, %v", rs, err)
	}
	b = inOrder(run(0, 4), run(4, 4), run(8, 8), run(16, 8), run(24, 8), run(32, 8))
	a, err := (&message{req: SetVringAddr, payload: b}).vringAddr()
	if err != nil || a != (vringAddr{0x03020100, 0x07060504, 0x0f0e0d0c0b0a0908, 0x1716151413121110, 0x1f1e1d1c1b1a1918, 0x2726252423222120}) {
		t.Errorf("%#x, %v", a, err)
	}
}

// mapsOf counts the mappings of a file in this process.
func mapsOf(t testing.TB, fd int) int {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, line := range strings.Split(string(b), "\n") {
		if f := strings.Fields(line); len(f) > 5 && f[4] == strconv.FormatUint(st.Ino, 10) && strings.HasPrefix(f[5], "/memfd:test") {
			n++
		}
	}
	return n
}
