package vring_test

import (
	"errors"
	"testing"
	"unsafe"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/vring"
	"github.com/boardlink/boardlink/vring/vringtest"
)

// The fuzz targets compare with a second reader of the ring, written from the
// specification alone, over a copy of the memory.

// piece is a buffer as the reference sees it.
type piece struct {
	addr  uint64
	n     uint32
	write bool
}

// image is a copy of a rig's memory, at link addresses from base on.
type image struct {
	b          []byte
	base       uint64
	roAt, roTo uint64 // link addresses that the device may only read
}

// reachable tells whether the device may access the buffer.
func (m *image) reachable(addr uint64, n uint32, write bool) bool {
	last := addr + uint64(n) - 1
	if n == 0 || last < addr {
		return false
	}
	if addr >= m.base && last < m.base+uint64(len(m.b)) {
		return true
	}
	return addr >= m.roAt && last < m.roTo && !write
}

func (m *image) bytes(addr uint64, n uint32) []byte {
	if addr >= m.roAt && addr < m.roTo {
		return make([]byte, n) // nothing is ever written there
	}
	return m.b[addr-m.base:][:n]
}

var errBad = errors.New("bad chain")

// list is a chain as the reference reads it, buffer by buffer.
type list struct {
	m        *image
	bufs     []piece
	max      int // buffers; 0: any number
	writable bool
	total    uint64
}

// add takes one buffer, and tells whether the chain may have it.
func (l *list) add(addr uint64, n uint32, flags uint16) bool {
	w := flags&write != 0
	if !w && l.writable || !l.m.reachable(addr, n, w) || l.max > 0 && len(l.bufs) == l.max {
		return false
	}
	l.writable = w
	l.total += uint64(n)
	l.bufs = append(l.bufs, piece{addr, n, w})
	return l.total <= 1<<32-1
}

// table returns the bytes of an indirect table, nil where there can be none in a queue of size descriptors.
func (m *image) table(addr uint64, n uint32, size uint16) []byte {
	if n == 0 || n%16 != 0 || n/16 > uint32(size) || !m.reachable(addr, n, false) {
		return nil
	}
	return m.bytes(addr, n)
}

// same compares a popped chain with the reference's.
func same(c vring.Chain, spans []dma.Span, want []piece) bool {
	if int(c.Readable)+int(c.Writable) != len(want) {
		return false // each buffer lies in one region
	}
	var r, w uint32
	for i, p := range want {
		s := spans[int(c.First)+i]
		if uint64(s.Addr()) != p.addr || s.Len != p.n || (i >= int(c.Readable)) != p.write {
			return false
		}
		if s.Off+uint64(s.Len) > s.Region.Mem.Size() || p.write && s.Region.Access&dma.DeviceWrite == 0 {
			return false
		}
		if p.write {
			w += p.n
		} else {
			r += p.n
		}
	}
	return c.ReadLen == r && c.WriteLen == w
}

// reader takes numbers from fuzzed bytes; zeros when they are used up.
type reader struct{ b []byte }

func (r *reader) more() bool { return len(r.b) > 0 }

func (r *reader) u8() (v uint8) {
	if len(r.b) > 0 {
		v, r.b = r.b[0], r.b[1:]
	}
	return v
}

func (r *reader) u16() uint16 { return uint16(r.u8()) | uint16(r.u8())<<8 }

// fuzzRig is a rig on the heap, of any kind of memory: what stands there can be copied.
type fuzzRig struct {
	raw
	mem []byte
}

const fuzzPayload = 2048

// fuzzKind is the kind of memory that byte cfg of a program chooses, and whether it lies across.
func fuzzKind(cfg uint8) (mmio.Kind, bool) {
	kinds := [4]mmio.Kind{mmio.Cached, mmio.Cached, mmio.Uncached, mmio.WriteCombining}
	return kinds[cfg>>2&3], cfg>>2&3 != 0
}

// newFuzzRig makes the rig of a queue of size descriptors; p.Memory does not count.
func newFuzzRig(t testing.TB, p vringtest.Params, size uint16, kind mmio.Kind, across bool) *fuzzRig {
	f := &fuzzRig{}
	p.Memory = vringtest.Memory{Name: "fuzz", Across: across, New: func(tb testing.TB, n int) mmio.Mem {
		w := make([]uint64, (n+7)/8)
		f.mem = unsafe.Slice((*byte)(unsafe.Pointer(&w[0])), n)
		return mmio.NewMem(unsafe.Pointer(&w[0]), uint64(n), kind)
	}}
	f.raw = raw{vringtest.NewRig(t, p, size, fuzzPayload)}
	regions := append(f.Ref.Load().Regions(), dma.Region{Name: "ro", Addr: roBase, Mem: vringtest.Heap.New(t, 4096), Access: dma.DeviceRead})
	table, err := dma.NewTable(regions...)
	if err != nil {
		t.Fatal(err)
	}
	f.Ref.Store(table)
	return f
}

func (f *fuzzRig) image() *image {
	return &image{b: append([]byte(nil), f.mem...), base: uint64(vringtest.Base), roAt: uint64(roBase), roTo: uint64(roBase) + 4096}
}

// someDesc writes a descriptor with values that are worth trying.
func (f *fuzzRig) someDesc(r *reader, off uint64) {
	var addr dma.Addr
	switch a := r.u16(); a >> 13 {
	case 0:
		addr = roBase + dma.Addr(a&0x1fff)
	case 1:
		addr = ^dma.Addr(0) - dma.Addr(a&0xff)
	case 2:
		addr = vringtest.Base + dma.Addr(a&0x1fff)
	case 3:
		addr = dma.Addr(a)
	default:
		addr = f.Addr(uint64(a) % fuzzPayload)
	}
	var n uint32
	switch l := r.u8(); {
	case l < 100:
		n = uint32(l)
	case l < 180:
		n = uint32(l-100) * 16
	case l < 200:
		n = ^uint32(0) - uint32(l-180)
	default:
		n = uint32(l-200) << 10
	}
	flags, nxt := uint16(r.u8()), uint16(r.u8())
	if nxt > 250 {
		nxt = ^uint16(0) - nxt
	}
	f.descAt(off, addr, n, flags, nxt)
}

// addSeeds adds programs that reach deep: all ops in turn with small operands.
func addSeeds(f *testing.F) {
	f.Add([]byte{})
	for cfg := byte(0); cfg < 16; cfg++ {
		for _, step := range []byte{1, 3, 7, 11, 13, 29, 101} {
			b := []byte{3, cfg}
			for i := 0; i < 400; i++ {
				b = append(b, byte(i)*step+cfg)
			}
			f.Add(b)
		}
	}
}

// flight is a request that the driver side took.
type flight struct {
	token, writable uint32
	descs           int // of the ring
}

// someRequest makes a request of up to four buffers.
func (f *fuzzRig) someRequest(in *reader, token uint32) (vring.Request, flight) {
	n := int(in.u8()%4) + 1
	q := vring.Request{Token: token, Readable: int(in.u8()) % (n + 1)}
	fl := flight{token: token, descs: n}
	for i := 0; i < n; i++ {
		l := uint32(in.u8()) + 1
		q.Bufs = append(q.Bufs, vring.Buffer{Addr: f.Addr(0), Len: l})
		if i >= q.Readable {
			fl.writable += l
		}
	}
	if f.Indirect && n >= 2 && n <= f.DrvCfg.IndirectMax {
		fl.descs = 1
	}
	return q, fl
}

// refused checks what Add has to refuse, and tells whether that was so: where the queue is broken, by an error that is
// the one that broke it; a request that no queue of the size could take.
func (f *fuzzRig) refused(t *testing.T, q vring.Request, got int, err, broken error) bool {
	t.Helper()
	switch {
	case broken != nil:
		if got != 0 || err != broken {
			t.Fatal(got, err)
		}
	case len(q.Bufs) > int(f.Size):
		if got != 0 || !errors.Is(err, vring.ErrTooLong) {
			t.Fatal(got, err)
		}
	default:
		return false
	}
	return true
}

// popFailed checks the outcome of Pop of a broken queue, and that another error is one of the package.
func popFailed(t *testing.T, n int, err, broken error) {
	t.Helper()
	if broken != nil {
		if n != 0 || err != broken {
			t.Fatalf("Pop of a broken queue = %d, %v", n, err)
		}
		return
	}
	var e *vring.Error
	if !errors.As(err, &e) || e.Code == nil || e.Error() == "" {
		t.Fatalf("error %v", err)
	}
}

// deviceOp does what both device sides do alike: op 8 disarms, 9 asks whether to call.
func deviceOp(t *testing.T, d vring.Device, op uint8, broken error) {
	t.Helper()
	if op == 8 {
		d.DisarmKick()
	} else if d.NeedCall() && broken != nil {
		t.Fatal("a broken queue calls")
	}
}

// driverOp does what both driver sides do alike: op 7 disarms, 8 asks whether to kick.
func driverOp(t *testing.T, d vring.Driver, op uint8, broken error) {
	t.Helper()
	if op == 7 {
		d.DisarmCall()
	} else if d.NeedKick() && broken != nil {
		t.Fatal("a broken queue kicks")
	}
}
