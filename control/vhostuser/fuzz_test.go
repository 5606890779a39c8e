package vhostuser

import (
	"io"
	"testing"
)

// pieces is a source that hands out bytes in pieces of given lengths.
type pieces struct {
	b    []byte
	cuts []byte
	i    int
}

func (p *pieces) recv(b, _ []byte) (n, oobn, flags int, err error) {
	if len(p.b) == 0 {
		return 0, 0, 0, nil
	}
	n = len(b)
	if len(p.cuts) > 0 {
		if k := int(p.cuts[p.i%len(p.cuts)]) + 1; k < n {
			n = k
		}
		p.i++
	}
	n = copy(b[:n], p.b)
	p.b = p.b[n:]
	return n, 0, 0, nil
}

// FuzzReader: whatever the bytes and however they are cut, the reader returns messages that are
// what was sent, and an error at the end; the decoders of payloads take any payload.
func FuzzReader(f *testing.F) {
	table := make([]byte, 8+2*regionLen)
	native.PutUint32(table, 2)
	f.Add(append(encodeMessage(SetMemTable, flagVersion, table), encodeMessage(GetFeatures, flagVersion, nil)...), []byte{0})
	f.Add(encodeMessage(SetVringAddr, flagVersion|flagNeedReply, make([]byte, vringAddrLen)), []byte{3, 1})
	f.Add(encodeMessage(GetConfig, flagVersion, config{offset: 1, data: make([]byte, 8)}.encode()), []byte{})
	f.Add(encodeMessage(SetFeatures, 2, encodeU64(1)), []byte{11})
	f.Fuzz(func(t *testing.T, b, cuts []byte) {
		n := new(counters)
		r := &reader{src: &pieces{b: b, cuts: cuts}, n: n}
		at, count := 0, uint64(0)
		for {
			m, err := r.next()
			if err != nil {
				if m != nil {
					t.Fatal("a message beside an error")
				}
				if err == io.EOF && at != len(b) {
					t.Fatalf("the end at %d of %d bytes", at, len(b))
				}
				break
			}
			if count++; n.Messages != count {
				t.Fatalf("%d messages counted, %d were read", n.Messages, count)
			}
			got := encodeMessage(m.req, m.flags, m.payload)
			if at+len(got) > len(b) || string(got) != string(b[at:at+len(got)]) {
				t.Fatalf("message at %d is % x", at, got)
			}
			at += len(got)
			decode(t, m)
		}
	})
}

// decode reads the payload in every way.
func decode(t *testing.T, m *message) {
	if rs, err := m.memTable(); err == nil && 8+len(rs)*regionLen > len(m.payload) {
		t.Fatalf("%d regions in %d bytes", len(rs), len(m.payload))
	}
	if c, err := m.config(); err == nil {
		if got := c.encode(); string(got) != string(m.payload) {
			t.Fatalf("configuration % x, want % x", got, m.payload)
		}
	}
	if s, err := m.vringState(); err == nil && string(s.encode()) != string(m.payload) {
		t.Fatalf("%+v of % x", s, m.payload)
	}
	if v, err := m.u64(); err == nil && string(encodeU64(v)) != string(m.payload) {
		t.Fatalf("%#x of % x", v, m.payload)
	}
	_, _ = m.vringAddr()
	_, _ = m.memRegion()
}
