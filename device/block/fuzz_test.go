package block

import (
	"bytes"
	"testing"
	"time"

	"github.com/boardlink/boardlink/device"
	"github.com/boardlink/boardlink/device/internal/plaintest"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/vring"
)

// FuzzRequests gives the disk chains of any layout with headers and segments of any content. Each is answered with a status, or breaks
// the queue; nothing but what the driver made writable is written, and of the image nothing but the sectors of requests that succeeded.
//
// The input is a sequence of requests: a byte with the number of readable buffers (3 bits) and writable ones (3), a byte for the length
// of each, then the readable bytes as far as there are any.
func FuzzRequests(f *testing.F) {
	for _, h := range []virtio.BlkHeader{{Type: virtio.BlkTIn}, {Type: virtio.BlkTOut, Sector: 3}, {Type: virtio.BlkTFlush}, {Type: virtio.BlkTGetID}, {Type: 99}, {Sector: 1 << 60}} {
		b := h.Encode()
		f.Add(append([]byte{1 | 2<<3, 16, 255, 1}, b[:]...))
		f.Add(append([]byte{2 | 1<<3, 16, 255, 1}, b[:]...))
		f.Add(append([]byte{1 | 1<<3, 15, 1}, b[:]...))
	}
	for _, kind := range []uint32{virtio.BlkTDiscard, virtio.BlkTWriteZeroes} {
		b, s := virtio.BlkHeader{Type: kind}.Encode(), virtio.BlkSegment{Sector: 2, Sectors: 2, Flags: kind >> 2 & 1}.Encode()
		f.Add(append(append([]byte{2 | 1<<3, 16, 16, 1}, b[:]...), s[:]...))
	}
	const size = 64 << 10
	f.Fuzz(func(t *testing.T, in []byte) {
		if len(in) > 4096 {
			return
		}
		be := newFake(size)
		b, err := New(Config{Name: "root", Backend: be, Serial: "fuzz"})
		if err != nil {
			t.Fatal(err)
		}
		d := &disk{b: b, t: t, Rig: plaintest.NewKind(t, b, split(b), 1<<20, mmio.Kind(len(in)%2)*mmio.Uncached)}
		d.q = d.Queue(0, 16)
		d.q.Start(vring.State{})
		defer b.Close()
		next := func() byte {
			if len(in) == 0 {
				return 0
			}
			v := in[0]
			in = in[1:]
			return v
		}
		for k := 0; k < 8 && len(in) > 0; k++ {
			n := next()
			readable, writable := int(n&7), int(n>>3&7)
			if readable+writable == 0 {
				continue
			}
			var spans []dma.Span
			for i := 0; i < readable+writable; i++ {
				l := uint64(next())
				if l >= 200 { // some whole sectors
					l = (l - 199) * 512
				}
				if l == 0 {
					l = 1
				}
				spans = append(spans, d.Take(l+2).Sub(1, uint32(l)))
			}
			var out []byte
			for _, s := range spans[:readable] {
				p := make([]byte, s.Len)
				for i := range p {
					if p[i] = next(); len(in) == 0 {
						break
					}
				}
				s.CopyIn(0, p)
				out = append(out, p...)
			}
			var r vring.Request
			for _, s := range spans {
				r.Bufs = append(r.Bufs, vring.Buffer{Addr: s.Addr(), Len: s.Len})
			}
			r.Readable = readable
			writeLen := len(bytesOf(spans[readable:]...))
			if writeLen > 0 { // a status that is none
				s := spans[len(spans)-1]
				s.CopyIn(s.Len-1, []byte{0xff})
			}
			before := append([]byte(nil), be.mem...)
			d.q.Add(r)
			if len(out) < virtio.BlkHeaderLen || writeLen < 1 {
				if err := d.Broken(); err == nil || device.CauseOf(err) != device.CausePeer {
					t.Fatalf("a malformed request: %v", err)
				}
				return
			}
			c := d.q.Wait(1)[0]
			if int(c.Len) != writeLen {
				t.Fatalf("a length of %d, of %d", c.Len, writeLen)
			}
			got := bytesOf(spans[readable:]...)
			st := got[len(got)-1]
			h := virtio.DecodeBlkHeader(out)
			off := h.Sector * 512
			switch {
			case st > virtio.BlkUnsupp:
				t.Fatalf("status %d", st)
			case st != virtio.BlkOK:
				if !bytes.Equal(before, be.mem) {
					t.Fatalf("a request of type %d that was refused (%d) changed the image", h.Type, st)
				}
			case h.Type == virtio.BlkTIn:
				if !bytes.Equal(got[:len(got)-1], before[off:][:len(got)-1]) || !bytes.Equal(before, be.mem) {
					t.Fatal("a read differs")
				}
			case h.Type == virtio.BlkTOut:
				copy(before[off:], out[virtio.BlkHeaderLen:])
				if !bytes.Equal(before, be.mem) {
					t.Fatal("a write differs")
				}
			case h.Type == virtio.BlkTDiscard, h.Type == virtio.BlkTWriteZeroes:
				for g := out[virtio.BlkHeaderLen:]; len(g) > 0; g = g[virtio.BlkSegmentLen:] {
					s := virtio.DecodeBlkSegment(g)
					for i := s.Sector * 512; i < (s.Sector+uint64(s.Sectors))*512; i++ {
						before[i] = be.mem[i]
					}
				}
				if !bytes.Equal(before, be.mem) {
					t.Fatal("more than the segments changed")
				}
			}
			// One byte before and one behind each buffer are nobody's.
			for _, s := range spans {
				edge := dma.Span{Region: s.Region, Off: s.Off - 1, Len: s.Len + 2}
				if e := bytesOf(edge); e[0] != 0 || e[len(e)-1] != 0 {
					t.Fatal("a byte beside a buffer was written")
				}
			}
		}
		if err := b.Reset(time.Time{}); err != nil {
			t.Fatal(err)
		}
	})
}
