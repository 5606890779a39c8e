package nbd

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"reflect"
	"testing"

	"golang.org/x/sys/unix"
)

// The bytes of each message are those of the protocol's document, and are read back as they were.
func TestGolden(t *testing.T) {
	req := Request{Flags: CmdFlagFUA, Type: CmdWrite, Cookie: 0x0102030405060708, Offset: 0x1122334455667788, Length: 0x99aabbcc}
	rep := SimpleReply{Error: EIO, Cookie: 0x0102030405060708}
	opt := Option{Option: OptGo, Length: 9}
	ans := OptionReply{Option: OptGo, Type: RepErrUnknown, Length: 3}
	put := func(n int, f func([]byte)) []byte {
		b := make([]byte, n)
		f(b)
		return b
	}
	g := Go{Name: "root", Infos: []uint16{InfoBlockSize}}
	for _, c := range []struct {
		what string
		got  []byte
		want string
	}{
		{"request", put(RequestLen, req.Put), "25609513" + "0001" + "0001" + "0102030405060708" + "1122334455667788" + "99aabbcc"},
		{"reply", put(SimpleReplyLen, rep.Put), "67446698" + "00000005" + "0102030405060708"},
		{"option", put(OptionLen, opt.Put), "49484156454f5054" + "00000007" + "00000009"},
		{"option's reply", put(OptionReplyLen, ans.Put), "0003e889045565a9" + "00000007" + "80000006" + "00000003"},
		{"go", g.Encode(), "00000004" + hex.EncodeToString([]byte("root")) + "0001" + "0003"},
		{"export", (&ExportInfo{Size: 1 << 20, Flags: HasFlags | SendFlush}).Encode(), "0000" + "0000000000100000" + "0005"},
		{"block size", (&BlockSize{512, 4096, 1 << 25}).Encode(), "0003" + "00000200" + "00001000" + "02000000"},
	} {
		if got := hex.EncodeToString(c.got); got != c.want {
			t.Errorf("%s: %s, want %s", c.what, got, c.want)
		}
	}
	var req2 Request
	var rep2 SimpleReply
	var opt2 Option
	var ans2 OptionReply
	for _, err := range []error{req2.Parse(put(RequestLen, req.Put)), rep2.Parse(put(SimpleReplyLen, rep.Put)),
		opt2.Parse(put(OptionLen, opt.Put)), ans2.Parse(put(OptionReplyLen, ans.Put))} {
		if err != nil {
			t.Error(err)
		}
	}
	if req2 != req || rep2 != rep || opt2 != opt || ans2 != ans {
		t.Errorf("read back: %+v %+v %+v %+v", req2, rep2, opt2, ans2)
	}
	if g2, err := ParseGo(g.Encode()); err != nil || !reflect.DeepEqual(g2, g) {
		t.Errorf("read back: %+v, %v", g2, err)
	}
	e, _, err := ParseInfo((&ExportInfo{Size: 77, Flags: 9}).Encode())
	if err != nil || e == nil || *e != (ExportInfo{77, 9}) {
		t.Errorf("read back: %+v, %v", e, err)
	}
	_, s, err := ParseInfo((&BlockSize{1, 2, 3}).Encode())
	if err != nil || s == nil || *s != (BlockSize{1, 2, 3}) {
		t.Errorf("read back: %+v, %v", s, err)
	}
	if e, s, err := ParseInfo([]byte{0, 1, 'x'}); e != nil || s != nil || err != nil {
		t.Errorf("an item of another type: %v %v %v", e, s, err)
	}
}

// What is no message of the protocol is refused with ErrProtocol.
func TestRefused(t *testing.T) {
	zero := make([]byte, 32)
	long := Go{Name: string(bytes.Repeat([]byte{'x'}, MaxName+1))}
	many := Go{Infos: make([]uint16, MaxInfoRequests+1)}
	parseGo := func(b []byte) error { _, err := ParseGo(b); return err }
	parseInfo := func(b []byte) error { _, _, err := ParseInfo(b); return err }
	for i, err := range []error{
		new(Request).Parse(zero), new(SimpleReply).Parse(zero), new(Option).Parse(zero), new(OptionReply).Parse(zero),
		parseGo(nil), parseGo(zero[:5]), parseGo([]byte{0, 0, 0, 1, 0, 0}), parseGo([]byte{255, 255, 255, 255, 0, 0}), parseGo([]byte{0, 0, 0, 0, 0, 1}),
		parseGo([]byte{0, 0, 0, 0, 0, 0, 7}), parseGo(long.Encode()), parseGo(many.Encode()),
		parseInfo(nil), parseInfo([]byte{0, 0, 1}), parseInfo([]byte{0, 3, 1}),
	} {
		if !errors.Is(err, ErrProtocol) {
			t.Errorf("case %d: %v", i, err)
		}
	}
}

func TestErrors(t *testing.T) {
	for _, e := range []uint32{EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN} {
		err := Errno(e)
		if got := ErrorOf(fmt.Errorf("disk: %w", err)); got != e {
			t.Errorf("%d is %v, and that is %d", e, err, got)
		}
	}
	if Errno(0) != nil || ErrorOf(nil) != 0 || Errno(4711) != unix.EINVAL || ErrorOf(errors.New("x")) != EIO || ErrorOf(unix.EROFS) != EPERM {
		t.Error("errors of no number")
	}
}

func FuzzParse(f *testing.F) {
	f.Add((&Go{Name: "root", Infos: []uint16{0, 3}}).Encode())
	f.Add((&BlockSize{512, 4096, 1 << 25}).Encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		if g, err := ParseGo(b); err == nil && !bytes.Equal(g.Encode(), b) {
			t.Errorf("%x is read as %+v", b, g)
		}
		if e, s, err := ParseInfo(b); err == nil && e != nil && !bytes.Equal(e.Encode(), b) || s != nil && !bytes.Equal(s.Encode(), b) {
			t.Errorf("%x is read as %+v, %+v", b, e, s)
		}
	})
}
