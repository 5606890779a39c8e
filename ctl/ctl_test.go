package ctl

import (
	"bytes"
	"reflect"
	"strings"
	"testing"
)

// What is sent is received; the text on the wire is the contract with other versions.
func TestMessages(t *testing.T) {
	var wire bytes.Buffer
	c := NewConn(&wire, &wire)
	for _, m := range []struct {
		v    interface{}
		data string
		want string
	}{
		{Request{Boardlink: 1, Verb: VerbConsole, Console: &ConsoleRequest{Name: "con0", Who: "me", TakeOver: true, Back: -1, Size: Size{80, 25}}}, "",
			`{"boardlink":1,"verb":"console","console":{"name":"con0","who":"me","take_over":true,"back":-1,"cols":80,"rows":25}}` + "\n"},
		{Reply{Boardlink: 1, Error: "no", Kind: KindNotFound}, "", `{"boardlink":1,"error":"no","kind":"not_found"}` + "\n"},
		{Message{Type: Output, Lost: 7}, "\x00\n\xff", `{"type":"output","bytes":3,"lost":7}` + "\n\x00\n\xff"},
		{Message{Type: Attached, Bytes: 9, State: &State{Link: "board0", Name: "con0", Keyboard: true, Terminals: []string{"*me"}}}, "",
			`{"type":"attached","bytes":9,"state":{"link":"board0","name":"con0","running":false,"keyboard":true,"terminals":["*me"]}}` + "\n"},
	} {
		msg, is := m.v.(Message)
		if is {
			if err := c.Send(msg, []byte(m.data)); err != nil {
				t.Fatal(err)
			}
		} else if err := c.SendLine(m.v); err != nil {
			t.Fatal(err)
		}
		if got := wire.String(); got != m.want {
			t.Errorf("%q, want %q", got, m.want)
		}
		if !is {
			got := reflect.New(reflect.TypeOf(m.v))
			if err := c.ReceiveLine(got.Interface()); err != nil || !reflect.DeepEqual(got.Elem().Interface(), m.v) {
				t.Errorf("%+v, %v", got.Elem(), err)
			}
			continue
		}
		got, data, err := c.Receive(nil)
		if len(m.data) > 0 {
			msg.Bytes = len(m.data)
		}
		if err != nil || string(data) != m.data || !reflect.DeepEqual(got, msg) {
			t.Errorf("%+v, %q, %v", got, data, err)
		}
	}
}

// FuzzReceive: whatever comes is a message with the bytes that it says, or an error.
func FuzzReceive(f *testing.F) {
	f.Add([]byte(`{"type":"output","bytes":3}` + "\nabc"))
	f.Add([]byte(`{"type":"output","bytes":-1}` + "\nabc"))
	f.Add([]byte(`{"type":"output","bytes":1e9}` + "\nabc"))
	f.Add([]byte(strings.Repeat("x", maxLine+1) + "\n"))
	f.Fuzz(func(t *testing.T, in []byte) {
		c := NewConn(bytes.NewReader(in), nil)
		for n := 0; ; n++ {
			m, b, err := c.Receive(nil)
			if err != nil {
				return
			}
			if m.Type != Attached && len(b) != m.Bytes || len(b) > len(in) || n > len(in) {
				t.Fatalf("%+v, %q", m, b)
			}
		}
	})
}
