package engine_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"
	"time"
	"unsafe"

	"github.com/boardlink/boardlink/dma"
	dmamodel "github.com/boardlink/boardlink/hwtest/models/dma"
	"github.com/boardlink/boardlink/mmio"
)

// FuzzMover: any sequence of copies, overlapping ones included, with failures in between, has the effect of doing them
// one after the other; no byte outside the destinations is touched.
func FuzzMover(f *testing.F) {
	op := func(b []byte, flags byte, dst, src, n uint16) []byte {
		b = append(b, flags)
		b = binary.LittleEndian.AppendUint16(b, dst)
		b = binary.LittleEndian.AppendUint16(b, src)
		return binary.LittleEndian.AppendUint16(b, n)
	}
	f.Add([]byte{0, 0, 0, 0})
	for i := byte(0); i < 4; i++ {
		// A copy on top of one in flight, its source overwritten, one that moves what the last one wrote on, one over itself.
		b := []byte{i, i, 3 * i, 16}
		b = op(b, 1, 0, 0, 4096)
		b = op(b, 1, 100, 8000, 4096)
		b = op(b, 2, 0, 50, 2000)
		b = op(b, 5, 16000, 4000, 384)
		b = op(b, 4, 1000, 1200, 3000)
		b = op(b, 3, 3000, 1000, 2500)
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < 4 {
			return
		}
		const guard, room = 4096, 20000
		var fault func(uint64) dmamodel.Fault
		if p := uint64(b[2] & 15); p != 0 {
			kind := []dmamodel.Fault{dmamodel.Error, dmamodel.Error, dmamodel.Stuck, dmamodel.Error}[b[2]>>4&3]
			fault = every(p, kind)
		}
		r := newRig(t, makes[b[0]&3], rigOptions{polls: int(b[1] & 3), fault: fault})
		m := dma.NewMover(dma.MoverConfig{Engine: r.e, Min: 1 + uint32(b[3]), Timeout: time.Millisecond})
		device := b[1]&4 != 0
		if device {
			r.region[0].Mem = mmio.NewMem(unsafe.Pointer(&r.mem[0][0]), memSize-descSize, mmio.Uncached)
		}
		var want [2][]byte
		for i := range want {
			fill(r.mem[i][:guard+room+guard], uint64(i))
			want[i] = bytes.Clone(r.mem[i][:guard+room+guard])
		}
		for b = b[4:]; len(b) >= 7 && m.Stats().Get("timeouts") < 20; b = b[7:] {
			to, from := int(b[0]&1), int(b[0]>>1&1)
			dst, src, n := uint32(binary.LittleEndian.Uint16(b[1:]))%room, uint32(binary.LittleEndian.Uint16(b[3:]))%room, uint32(binary.LittleEndian.Uint16(b[5:]))%8192
			if dst+n > room {
				n = room - dst
			}
			if src+n > room {
				n = room - src
			}
			over := to == from && n > 0 && dst < src+n && src < dst+n
			ticket, err := m.Queue(r.span(to, guard+dst, n), r.span(from, guard+src, n))
			if refuse := over && to == 0 && device; refuse != errors.Is(err, dma.ErrOverlap) || !refuse && err != nil {
				t.Fatalf("%d bytes at %#x of %d to %#x of %d: %v", n, src, from, dst, to, err)
			} else if refuse {
				continue
			}
			copy(want[to][guard+dst:guard+dst+n], want[from][guard+src:guard+src+n])
			switch b[0] >> 2 & 7 {
			case 1:
				m.Start()
			case 2:
				m.Landed()
			case 3:
				m.Wait(ticket)
				if !bytes.Equal(want[to][guard+dst:guard+dst+n], r.mem[to][guard+dst:guard+dst+n]) {
					t.Fatalf("ticket %d did not land", ticket)
				}
			}
		}
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
		for i := range want {
			if !bytes.Equal(want[i], r.mem[i][:guard+room+guard]) {
				at := 0
				for want[i][at] == r.mem[i][at] {
					at++
				}
				t.Errorf("memory %d differs from byte %#x on", i, at)
			}
		}
		r.check(t)
	})
}

// FuzzLists: two scatter/gather lists cut into copies move the bytes that the lists, taken in one piece, name.
func FuzzLists(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte{10, 3, 7, 255, 10, 0, 0, 0, 20})
	f.Add([]byte{1, 1, 1, 1, 1, 1, 255, 6})
	f.Add([]byte{5, 5, 255, 4, 5})
	f.Fuzz(func(t *testing.T, b []byte) {
		// Lengths of the one list, 255, those of the other.
		if len(b) > 200 {
			b = b[:200]
		}
		mem := [2][]byte{make([]byte, 64<<10), make([]byte, 64<<10)}
		fill(mem[1], 9)
		var lists [2][]dma.Span
		var flat [2][]int // address of each byte
		regions := [2]*dma.Region{
			{Name: "to", Addr: nearLink, Mem: mmio.FromBytes(mem[0]), Access: rw},
			{Name: "from", Addr: farLink, Mem: mmio.FromBytes(mem[1]), Access: rw},
		}
		side, at := 0, [2]int{7, 3}
		for _, n := range b {
			if n == 255 && side == 0 {
				side = 1
				continue
			}
			lists[side] = append(lists[side], dma.Span{Region: regions[side], Off: uint64(at[side]), Len: uint32(n)})
			for i := 0; i < int(n); i++ {
				flat[side] = append(flat[side], at[side]+i)
			}
			at[side] += int(n) + int(n)%5
		}
		seed := []dma.Copy{{Tag: 1}}
		got, err := dma.AppendCopies(seed, lists[0], lists[1], 42)
		if (len(flat[0]) == len(flat[1])) != (err == nil) || err != nil && (!errors.Is(err, dma.ErrListLength) || len(got) != 1) {
			t.Fatalf("%d bytes to %d: %d copies, %v", len(flat[1]), len(flat[0]), len(got), err)
		}
		if err != nil {
			return
		}
		want := make([]byte, len(mem[0]))
		for i, d := range flat[0] {
			want[d] = mem[1][flat[1][i]]
		}
		for _, c := range got[1:] {
			if c.Tag != 42 || c.Dst.Len != c.Src.Len || c.Src.Len == 0 {
				t.Fatalf("copy %+v", c)
			}
			dma.CopySpan(c.Dst, c.Src)
		}
		if !bytes.Equal(want, mem[0]) {
			t.Error("the bytes differ")
		}
	})
}
