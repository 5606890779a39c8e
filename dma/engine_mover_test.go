package dma_test

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
)

// slowEngine is an engine whose transfers take a number of polls, with limits of its own: what Mover promises of
// alignment, order and allocations is counted here. Real engines' registers are tested in dma/engine.
type slowEngine struct {
	caps  dma.Caps
	polls int
	q     []dma.Copy
	left  int
	seen  []dma.Copy // all that were submitted, where keep is set
	keep  bool
	fail  error
}

func (e *slowEngine) Caps() dma.Caps { return e.caps }

func (e *slowEngine) Submit(batch []dma.Copy) (int, error) {
	for i, c := range batch {
		if len(e.q) == e.caps.Depth {
			return i, nil
		}
		if uint32(c.Dst.Addr())%e.caps.AlignDst != 0 || uint32(c.Src.Addr())%e.caps.AlignSrc != 0 || c.Src.Len%e.caps.AlignLen != 0 || c.Src.Len > e.caps.MaxLen {
			return i, dma.ErrLimits
		}
		e.q = append(e.q, c)
		if e.keep {
			e.seen = append(e.seen, c)
		}
	}
	return len(batch), nil
}

func (e *slowEngine) Poll(done []dma.Completion) int {
	if e.left++; len(e.q) == 0 || e.left <= e.polls {
		return 0
	}
	e.left = 0
	n := copy2(done, e.q, e.fail)
	e.q = e.q[:copy(e.q, e.q[n:])]
	return n
}

func copy2(done []dma.Completion, q []dma.Copy, err error) int {
	n := 0
	for ; n < len(done) && n < len(q); n++ {
		if err == nil {
			dma.CopySpan(q[n].Dst, q[n].Src)
		}
		done[n] = dma.Completion{Tag: q[n].Tag, Err: err}
	}
	return n
}

func (e *slowEngine) Waiter() dma.EngineWaiter { return nil }
func (e *slowEngine) Abort() error             { e.fail = dma.ErrAborted; e.polls = 0; return nil }
func (e *slowEngine) Close() error             { return nil }

func ram(name string, addr dma.Addr, n int) (*dma.Region, []byte) {
	b := make([]byte, n+8)
	if o := uintptr(unsafe.Pointer(&b[0])) & 7; o != 0 {
		b = b[8-o:]
	}
	b = b[:n]
	return &dma.Region{Name: name, Addr: addr, Mem: mmio.FromBytes(b), Access: rw}, b
}

func slow(align, alignLen, maxLen uint32, polls int) *slowEngine {
	return &slowEngine{caps: dma.Caps{Name: "slow", AlignDst: align, AlignSrc: (align + 1) / 2, AlignLen: alignLen, MaxLen: maxLen, Depth: 16, Channels: 1}, polls: polls, q: make([]dma.Copy, 0, 16)}
}

// TestMoverCuts: the engine gets what its limits allow, aligned and not too long; the processor does heads, tails, and what
// does not fit at all.
func TestMoverCuts(t *testing.T) {
	dst, db := ram("dst", 0x10000, 20000)
	src, sb := ram("src", 0x80000, 20000)
	for i := range sb {
		sb[i] = byte(i * 7)
	}
	for _, c := range []struct {
		doff, soff, n     uint64
		engine, processor int // pieces
	}{
		{0, 0, 8192, 2, 0},
		{0, 0, 8193, 2, 1},
		{8, 8, 4096, 1, 1}, // 8 bytes ahead
		{3, 3, 9000, 3, 2},
		{1, 2, 9000, 0, 1}, // never aligned together
		{16, 8, 9000, 3, 0},
		{8, 16, 9000, 3, 1},
		{0, 0, 255, 0, 1}, // below Min
		{5, 5, 264, 0, 1}, // its middle is below Min
	} {
		e := slow(16, 4, 4096+8, 1)
		e.keep = true
		m := dma.NewMover(dma.MoverConfig{Engine: e, Min: 256})
		for i := range db {
			db[i] = 0xa5
		}
		err := m.Move([]dma.Copy{{Dst: dma.Span{Region: dst, Off: c.doff, Len: uint32(c.n)}, Src: dma.Span{Region: src, Off: c.soff, Len: uint32(c.n)}}})
		if err != nil || !bytes.Equal(db[c.doff:c.doff+c.n], sb[c.soff:c.soff+c.n]) || bytes.Count(db, []byte{0xa5}) < len(db)-int(c.n) {
			t.Errorf("%+v: %v, or the bytes are wrong", c, err)
		}
		s := m.Stats()
		if len(e.seen) != c.engine || int(s.Get("cpu_copies")) != c.processor || s.Get("refused") != 0 || s.Get("engine_bytes")+s.Get("cpu_bytes") != c.n {
			t.Errorf("%+v: %d by the engine, %d by the processor, %d refused, %d+%d bytes", c, len(e.seen), s.Get("cpu_copies"), s.Get("refused"), s.Get("engine_bytes"), s.Get("cpu_bytes"))
		}
	}
}

// TestMoverOrder: tickets land in order, and Landed never promises too much.
func TestMoverOrder(t *testing.T) {
	dst, db := ram("dst", 0x100000, 1<<20)
	src, sb := ram("src", 0x800000, 1<<20)
	for i := range sb {
		sb[i] = byte(i>>12) + byte(i)*3 + 1
	}
	m := dma.NewMover(dma.MoverConfig{Engine: slow(1, 1, 1<<20, 3), Min: 1})
	m.Caps()
	landed := uint64(0)
	for i := uint64(1); i <= 256; i++ {
		off := (i - 1) * 4096
		ticket, err := m.Queue(dma.Span{Region: dst, Off: off, Len: 4096}, dma.Span{Region: src, Off: off, Len: 4096})
		if err != nil || ticket != i {
			t.Fatalf("ticket %d, %v, want %d", ticket, err, i)
		}
		if i%5 == 0 {
			m.Start()
		}
		l := m.Landed()
		if l < landed || l > i {
			t.Fatalf("landed %d after %d of %d", l, landed, i)
		}
		landed = l
		if !bytes.Equal(db[:landed*4096], sb[:landed*4096]) {
			t.Fatalf("not all below ticket %d has landed", landed)
		}
	}
	m.Wait(256)
	if !bytes.Equal(db, sb) {
		t.Error("the bytes differ")
	}
	if err := m.Close(); err != nil {
		t.Error(err)
	}
	if _, err := m.Queue(dma.Span{Region: dst, Len: 1}, dma.Span{Region: src, Len: 1}); !errors.Is(err, dma.ErrEngineClosed) {
		t.Errorf("Queue after Close: %v", err)
	}
}

// TestMoverRefuses: the caller's mistakes are errors that name the copy.
func TestMoverRefuses(t *testing.T) {
	a, _ := ram("a", 0x1000, 4096)
	dev := *a
	dev.Mem = mmio.NewMem(mustPointer(a.Mem), 4096, mmio.Uncached)
	m := dma.NewMover(dma.MoverConfig{Engine: slow(1, 1, 1<<20, 0), Min: 1})
	if _, err := m.Queue(dma.Span{Region: a, Len: 9}, dma.Span{Region: a, Off: 100, Len: 10}); !errors.Is(err, dma.ErrBadCopy) {
		t.Error(err)
	}
	_, err := m.Queue(dma.Span{Region: &dev, Len: 10}, dma.Span{Region: &dev, Off: 9, Len: 10})
	if !errors.Is(err, dma.ErrOverlap) || !strings.Contains(err.Error(), "0x1009") {
		t.Error(err)
	}
	if n, err := m.Queue(dma.Span{Region: a}, dma.Span{Region: a}); n != 1 || err != nil {
		t.Error("a copy of no bytes:", n, err)
	}
	m.Wait(1)
	defer func() {
		if recover() == nil {
			t.Error("waits for a ticket that was never given")
		}
	}()
	m.Wait(2)
}

func mustPointer(m mmio.Mem) unsafe.Pointer {
	r, ok := m.RAM()
	if !ok {
		panic("no RAM")
	}
	return r.Pointer(0)
}

// TestMoverWithout: no engine is an engine that never does anything.
func TestMoverWithout(t *testing.T) {
	dst, db := ram("dst", 0x100000, 4096)
	src, sb := ram("src", 0x800000, 4096)
	sb[4095] = 9
	m := dma.NewMover(dma.MoverConfig{})
	n, err := m.Queue(dma.Span{Region: dst, Len: 4096}, dma.Span{Region: src, Len: 4096})
	if n != 1 || err != nil || m.Landed() != 1 || db[4095] != 9 || m.Enabled() || m.Stats().Get("cpu_copies") != 1 {
		t.Error(n, err, m.Landed(), m.Enabled())
	}
}

func TestMoverDoesNotAllocate(t *testing.T) {
	dst, _ := ram("dst", 0x100000, 1<<18)
	src, _ := ram("src", 0x800000, 1<<18)
	for _, polls := range []int{0, 2} {
		m := dma.NewMover(dma.MoverConfig{Engine: slow(8, 1, 1<<20, polls), Min: 64})
		if n := testing.AllocsPerRun(50, func() {
			for i := uint64(0); i < 40; i++ {
				if _, err := m.Queue(dma.Span{Region: dst, Off: i*4096 + i, Len: 3000}, dma.Span{Region: src, Off: i*4096 + i, Len: 3000}); err != nil {
					t.Fatal(err)
				}
			}
			m.Start()
			m.Landed()
			m.Wait(m.Landed())
		}); n != 0 {
			t.Errorf("%v allocations for 40 copies", n)
		}
	}
}

// TestWaitFor: who has something else to do gets back to it, as often as a transfer takes, and finds out like everybody else that one is late.
func TestWaitFor(t *testing.T) {
	dst, to := ram("dst", 0x100000, 4096)
	src, from := ram("src", 0x800000, 4096)
	for i := range from {
		from[i] = byte(i * 7)
	}
	d, s := dma.Span{Region: dst, Len: 4096}, dma.Span{Region: src, Len: 4096}
	e := slow(1, 1, 4096, 1<<30) // stuck
	m := dma.NewMover(dma.MoverConfig{Engine: e, Min: 1, Timeout: 50 * time.Millisecond})
	ticket, err := m.Queue(d, s)
	if err != nil {
		t.Fatal(err)
	}
	calls := 1
	for !m.WaitFor(ticket, time.Microsecond) {
		calls++
	}
	if calls < 2 || m.Stats().Get("timeouts") != 1 || m.Stats().Get("aborted") != 1 || !bytes.Equal(to, from) {
		t.Errorf("a transfer that is stuck: %d calls, %d time-outs, %d aborted, landed: %v", calls, m.Stats().Get("timeouts"), m.Stats().Get("aborted"), bytes.Equal(to, from))
	}
	e = slow(1, 1, 4096, 3)
	m = dma.NewMover(dma.MoverConfig{Engine: e, Min: 1, Spin: time.Minute, Timeout: time.Minute})
	if ticket, err = m.Queue(d, s); err != nil {
		t.Fatal(err)
	}
	if !m.WaitFor(ticket, time.Minute) || m.Stats().Get("engine_copies") != 1 {
		t.Error("a transfer that is not late has not landed")
	}
	if !m.WaitFor(ticket, 0) {
		t.Error("what has landed is waited for")
	}
}

// TestCalibrate: an engine that is faster from some length on is used from there, one that never is, never; the
// operator's word counts for more.
func TestCalibrate(t *testing.T) {
	dst, _ := ram("dst", 0x100000, 1<<20)
	src, _ := ram("src", 0x800000, 1<<20)
	d, s := dma.Span{Region: dst, Len: 1 << 20}, dma.Span{Region: src, Len: 1 << 20}
	// A transfer of nothing costs the same at every length, so it is faster at long ones.
	fast := slow(1, 1, 1<<20, 0)
	fast.fail = nil
	m := dma.NewMover(dma.MoverConfig{Engine: &idleEngine{*fast}, Spin: time.Second})
	if n := m.Calibrate(d, s, 100*time.Millisecond); n == dma.Never || n < 64 || n > 1<<18 || m.Min() != n || !m.Enabled() {
		t.Errorf("an engine that takes no time: %d, %d", n, m.Min())
	}
	m = dma.NewMover(dma.MoverConfig{Engine: slow(1, 1, 1<<20, 2000), Spin: time.Second})
	if n := m.Calibrate(d, s, 20*time.Millisecond); n != dma.Never || m.Enabled() {
		t.Errorf("an engine that waits: %d", n)
	}
	m = dma.NewMover(dma.MoverConfig{Engine: slow(1, 1, 1<<20, 2000), Spin: time.Second, Min: 99})
	if n := m.Calibrate(d, s, 20*time.Millisecond); n != dma.Never || m.Min() != 99 || !m.Enabled() {
		t.Errorf("with a length set: %d, %d", n, m.Min())
	}
	e := slow(1, 1, 1<<20, 0)
	e.fail = dma.ErrTransfer
	m = dma.NewMover(dma.MoverConfig{Engine: e})
	if n := m.Calibrate(d, s, 20*time.Millisecond); n != dma.Never || m.Enabled() {
		t.Errorf("an engine that fails: %d", n)
	}
}

// idleEngine says it has copied.
type idleEngine struct{ slowEngine }

func (e *idleEngine) Poll(done []dma.Completion) int {
	n := 0
	for ; n < len(done) && n < len(e.q); n++ {
		done[n] = dma.Completion{Tag: e.q[n].Tag}
	}
	e.q = e.q[:copy(e.q, e.q[n:])]
	return n
}

func BenchmarkMover(b *testing.B) {
	dst, _ := ram("dst", 0x100000, 1<<18)
	src, _ := ram("src", 0x800000, 1<<18)
	m := dma.NewMover(dma.MoverConfig{Engine: &idleEngine{*slow(1, 1, 1<<20, 0)}, Min: 1})
	i := uint64(0)
	for b.Loop() {
		m.Queue(dma.Span{Region: dst, Off: i % 64 * 4096, Len: 1514}, dma.Span{Region: src, Off: i % 64 * 4096, Len: 1514})
		if i++; i%16 == 0 {
			m.Wait(i)
		}
	}
}
