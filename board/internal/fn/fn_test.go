package fn

import (
	"errors"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/mmio/mmiotest"
	"github.com/boardlink/boardlink/pci"
)

func TestWord(t *testing.T) {
	s := mmiotest.New(16)
	for _, tc := range []struct {
		width uint
		big   bool
		v     uint32
		want  string
	}{
		{8, false, 0x12, "\x12\x00\x00\x00"}, {8, true, 0x12, "\x12\x00\x00\x00"},
		{16, false, 0x1234, "\x34\x12\x00\x00"}, {16, true, 0x1234, "\x12\x34\x00\x00"},
		{32, false, 0x12345678, "\x78\x56\x34\x12"}, {32, true, 0x12345678, "\x12\x34\x56\x78"},
		{16, true, 0xffff1234, "\x12\x34\x00\x00"}, // as ClearByZeros stores
	} {
		s.Poke(8, make([]byte, 4))
		w := Word{Mem: s.Mem(mmio.Uncached), Off: 8, Width: tc.width, Big: tc.big}
		w.Store(tc.v)
		var got [4]byte
		s.Peek(8, got[:])
		if string(got[:]) != tc.want {
			t.Errorf("%d bits, big %v: % x", tc.width, tc.big, got)
		}
		if v := w.Load(); v != tc.v&(1<<tc.width-1) {
			t.Errorf("%d bits, big %v: %#x", tc.width, tc.big, v)
		}
	}
	if err := s.Err(); err != nil {
		t.Error(err)
	}
}

// TestRingOrder: the barrier of data and registers comes before the one store, which is all there is.
func TestRingOrder(t *testing.T) {
	data, regs := mmiotest.New(64), mmiotest.New(64)
	r := Reg{Data: data.Mem(mmio.WriteCombining), Word: Word{Mem: regs.Mem(mmio.Uncached), Off: 12, Width: 32}, Value: 0x30001}
	data.Record(true)
	regs.Record(true)
	if err := r.Ring(); err != nil {
		t.Fatal(err)
	}
	if l := data.Log(); len(l) != 1 || l[0].Op != mmiotest.Fence || l[0].Barrier != mmio.WriteBarrier {
		t.Errorf("data: %+v", l)
	}
	l := regs.Log()
	if len(l) != 2 || l[0].Op != mmiotest.Fence || l[1] != (mmiotest.Access{Op: mmiotest.Store, Off: 12, Width: 4, Value: 0x30001}) {
		t.Errorf("registers: %+v", l)
	}
	if n := testing.AllocsPerRun(100, func() { regs.Record(false); r.Ring() }); n != 0 {
		t.Errorf("%v allocations a ring", n)
	}
}

// cause is a register of a test: bits come back after a clear as often as told.
type cause struct {
	bits  chan uint32
	again int
	ones  bool
}

func (c *cause) Pending() (uint32, bool) {
	if c.ones {
		return 0, false
	}
	select {
	case b := <-c.bits:
		if c.again > 0 {
			c.again--
			c.bits <- b
		}
		return b, true
	default:
		return 0, true
	}
}

func (c *cause) Clear(uint32) {}

// TestDemux: each bit rings its vector once, bits beyond them none, and a shared line's
// interrupt without a bit is spurious.
func TestDemux(t *testing.T) {
	line, err := doorbell.NewEventfd()
	if err != nil {
		t.Fatal(err)
	}
	defer line.Close()
	c := &cause{bits: make(chan uint32, 8)}
	d, err := NewDemux("x:y", line, c, 3, nil)
	if err != nil {
		t.Fatal(err)
	}
	wait := func(what string, f func() bool) {
		t.Helper()
		for end := time.Now().Add(5 * time.Second); !f(); time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("not within 5 s: %s; %+v", what, d.Counters())
			}
		}
	}
	c.bits <- 0x5
	c.bits <- 0x11
	line.Ring()
	wait("rings", func() bool { return d.Counters().Rings == 3 })
	for v, want := range []uint64{2, 0, 1} {
		if n, _ := d.Waiters()[v].Ack(); n != want {
			t.Errorf("vector %d rung %d times, want %d", v, n, want)
		}
	}
	line.Ring()
	wait("spurious", func() bool { return d.Counters().Spurious == 1 })
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if n, _ := NewDemux("x:y", line, c, 33, nil); n != nil {
		t.Error("33 vectors")
	}
}

// TestDemuxDead: a register that nobody answers for does not take the processor.
func TestDemuxDead(t *testing.T) {
	p := make([]int, 2)
	if err := unix.Pipe2(p, unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(p[0])
	defer unix.Close(p[1])
	unix.Write(p[1], []byte{1})
	d, err := NewDemux("x:y", always(p[0]), &cause{ones: true}, 1, nil)
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(100 * time.Millisecond)
	d.Close()
	if n := d.Counters(); n.Dead == 0 || n.Dead > 12 || n.Rings != 0 {
		t.Errorf("%+v", n)
	}
}

// always is a line that stays asserted.
type always int

func (a always) FD() int              { return int(a) }
func (a always) Ack() (uint64, error) { return 1, nil }

func TestWrap(t *testing.T) {
	for p, want := range map[pci.Problem]error{pci.BadInput: board.ErrInput, pci.Absent: board.ErrAbsent, pci.Gone: board.ErrAbsent,
		pci.Wiped: board.ErrAbsent, pci.Busy: board.ErrSideTaken} {
		err := Wrap("x:y", "cannot", &pci.Error{Problem: p, Spec: "0000:00:04.0", Reason: "because"})
		if !errors.Is(err, want) {
			t.Errorf("%s: %v", p, err)
		}
	}
	err := Wrap("x:y", "cannot", &pci.Error{Problem: pci.Unbound, Spec: "0000:00:04.0", Reason: "because"})
	for _, c := range []error{board.ErrInput, board.ErrAbsent, board.ErrSideTaken} {
		if errors.Is(err, c) {
			t.Errorf("an unbound function: %v is %v", err, c)
		}
	}
	if Wrap("x:y", "cannot", nil) != nil {
		t.Error("no error became one")
	}
}
