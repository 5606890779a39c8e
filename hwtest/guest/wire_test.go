package guest_test

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/boardlink/boardlink/hwtest/guest"
)

func TestFrames(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var sent []*guest.Frame
		var b bytes.Buffer
		for range rapid.IntRange(1, 5).Draw(t, "frames") {
			f := &guest.Frame{
				ID: rapid.Uint64().Draw(t, "id"), Op: guest.OpStart,
				Args: rapid.SliceOfN(rapid.String(), 1, 4).Draw(t, "args"),
				Code: rapid.Int().Draw(t, "code"),
				Data: rapid.SliceOf(rapid.Byte()).Draw(t, "data"),
			}
			if err := guest.Write(&b, f); err != nil {
				t.Fatal(err)
			}
			sent = append(sent, f)
		}
		for _, want := range sent {
			got, err := guest.Read(&b)
			if err != nil {
				t.Fatal(err)
			}
			if len(want.Data) == 0 {
				want.Data = []byte{}
			}
			if d := cmp.Diff(want, got); d != "" {
				t.Fatal(d)
			}
		}
		if _, err := guest.Read(&b); err != io.EOF {
			t.Fatalf("after the last frame: %v, want io.EOF", err)
		}
	})
}

func TestFrameBounds(t *testing.T) {
	if err := guest.Write(io.Discard, &guest.Frame{Data: make([]byte, guest.MaxData+1)}); err == nil {
		t.Error("data above MaxData was sent")
	}
	if err := guest.Write(io.Discard, &guest.Frame{Text: strings.Repeat("x", guest.MaxHeader)}); err == nil {
		t.Error("a header above MaxHeader was sent")
	}
	var b bytes.Buffer
	if err := guest.Write(&b, &guest.Frame{Op: guest.EvData, Data: []byte("data")}); err != nil {
		t.Fatal(err)
	}
	whole := b.Bytes()
	for n := 1; n < len(whole); n++ {
		if _, err := guest.Read(bytes.NewReader(whole[:n])); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%d of %d bytes: %v, want io.ErrUnexpectedEOF", n, len(whole), err)
		}
	}
	if _, err := guest.Read(strings.NewReader("Kernel panic - not syncing")); err == nil || errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("what is no frame: %v, want an error that says so", err)
	}
}

func FuzzRead(f *testing.F) {
	var b bytes.Buffer
	guest.Write(&b, &guest.Frame{Op: guest.EvData, ID: 7, Data: []byte("data")})
	f.Add(b.Bytes())
	f.Add([]byte("\x02\x00\x00\x00\x00\x00\x00\x00{}"))
	f.Add([]byte("\xff\xff\xff\xff\xff\xff\xff\xff"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		fr, err := guest.Read(r)
		if err == nil && len(fr.Data) > len(b) {
			t.Fatalf("%d bytes of data out of %d", len(fr.Data), len(b))
		}
	})
}
