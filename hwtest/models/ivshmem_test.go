//go:build linux

package models_test

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/board/ivshmem"
	"github.com/boardlink/boardlink/board/loopback"
	"github.com/boardlink/boardlink/hwtest/models"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/pci"
)

func newIvshmem(t testing.TB, size uint64) *models.Ivshmem {
	t.Helper()
	s, err := models.NewIvshmem(size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Err(); err != nil {
			t.Error(err)
		}
		s.Close()
	})
	return s
}

// ivshmemEnds opens both ends, each by a device of its own.
type ivshmemEnds struct {
	s       *models.Ivshmem
	vectors [2]int
	off     [2]bool // interrupts
	mu      sync.Mutex
	f       [2]*models.Function
}

func (e *ivshmemEnds) openers() (l [2]opener) {
	for i := range l {
		side := i
		l[i] = func(o board.Options) (board.Board, error) {
			f := e.s.Function(uint32(3+side), e.vectors[side])
			e.mu.Lock()
			e.f[side] = f
			e.mu.Unlock()
			b, err := ivshmem.New("ivshmem:model", f, o, ivshmem.Config{NoInterrupts: e.off[side]})
			if err != nil {
				return nil, err
			}
			return b, nil
		}
	}
	return l
}

// TestIvshmemLink: both ends by devices whose memory is device memory to both, also what stands for their own;
// placements window and push, and one side without interrupts.
func TestIvshmemLink(t *testing.T) {
	for _, tc := range []struct {
		name, placement string
		off             [2]bool
	}{
		{"window", "window", [2]bool{}},
		{"push", "push", [2]bool{}},
		{"host polls", "window", [2]bool{true, false}},
		{"agent polls", "push", [2]bool{false, true}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newIvshmem(t, 16<<20)
			e := &ivshmemEnds{s: s, vectors: [2]int{4, 6}, off: tc.off}
			r := start(t, e.openers(), func(r *rig) { r.placement = tc.placement })
			r.waitUp()
			r.try(0)
			if p := r.agent.Status().Placement; p != tc.placement {
				t.Errorf("placement %s", p)
			}
			for i, f := range e.f {
				n := uint64(0)
				for _, v := range f.Raised() {
					n += v
				}
				if (n < 50) != tc.off[i] || tc.off[i] && n != 0 {
					t.Errorf("%s: %d interrupts (%v)", board.Side(i), n, f.Raised())
				}
			}
			if _, lost := s.Rings(); lost > 4 {
				t.Errorf("%d rings for nobody", lost) // before the other side is open, at most
			}
		})
	}
}

// TestUnconfined: a board without an IOMMU that masters the bus is announced in one line; one that is confined, or does not
// master the bus, is not.
func TestUnconfined(t *testing.T) {
	s := newIvshmem(t, 4<<20)
	for _, c := range []struct {
		mode pci.Mode
		off  bool // interrupts
		want int
	}{{pci.VFIO, false, 0}, {pci.VFIONoIOMMU, false, 1}, {pci.VFIONoIOMMU, true, 0}} {
		var lines []string
		f := s.Function(7, 3).In(c.mode)
		b, err := ivshmem.New("ivshmem:model", f, board.Options{Warnf: func(format string, args ...interface{}) {
			lines = append(lines, fmt.Sprintf(format, args...))
		}}, ivshmem.Config{NoInterrupts: c.off})
		if err != nil {
			t.Fatal(err)
		}
		if len(lines) != c.want || c.want == 1 && !strings.HasPrefix(lines[0], "ivshmem:model: no IOMMU confines the board, and it masters the bus") {
			t.Errorf("mode %s, interrupts off: %v: %q", c.mode, c.off, lines)
		}
		b.Close()
	}
}

// TestIvshmem: what an opened device tells, and divides as loopback does.
func TestIvshmem(t *testing.T) {
	s := newIvshmem(t, 4<<20)
	for _, side := range []board.Side{board.Host, board.Agent} {
		for _, kind := range []mmio.Kind{mmio.Uncached, mmio.WriteCombining} {
			k := kind
			o := board.Options{Side: side}
			if k != mmio.Uncached {
				o.Kind = &k
			}
			b, err := ivshmem.New("ivshmem:model", s.Function(7, 3), o, ivshmem.Config{})
			if err != nil {
				t.Fatal(err)
			}
			w, p := b.Window(), func() (r struct {
				addr, size uint64
				across     bool
			}) {
				p, ok := b.Pool()
				if !ok {
					t.Fatal("no pool")
				}
				r.addr, r.size, r.across = uint64(p.Addr), p.Mem.Size(), p.Across
				return r
			}()
			if w.Mem.Kind() != k || w.Mem.Size() != 2<<20 || p.size != 2<<20 || p.addr != uint64(loopback.PoolAddr) {
				t.Errorf("%s, %s: window %+v, pool %+v", side, k, w, p)
			}
			if w.Across != (side == board.Host) || p.across != (side == board.Agent) || (w.Addr == loopback.BusAddr) != (side == board.Agent) {
				t.Errorf("%s: window %+v, pool %+v", side, w, p)
			}
			if i := b.Self(); i.Method != board.RingIvshmem || i.Peer != 7 || i.Vectors != 3 || b.PeerDead() {
				t.Errorf("%+v", i)
			}
			for _, bad := range []struct {
				info board.RingInfo
				v    uint32
				want string
			}{
				{board.RingInfo{Method: board.RingRegister, Vectors: 1}, 0, "method 2"},
				{board.RingInfo{Method: board.RingIvshmem, Peer: 1 << 16, Vectors: 1}, 0, "65536"},
				{board.RingInfo{Method: board.RingIvshmem, Peer: 7, Vectors: 1}, 0, "our own"},
				{board.RingInfo{Method: board.RingIvshmem, Peer: 9, Vectors: 2}, 2, "vector 2"},
			} {
				if _, err := b.Ringer(bad.info, bad.v); err == nil || !strings.Contains(err.Error(), bad.want) {
					t.Errorf("%+v: %v", bad, err)
				}
			}
			r, err := b.Ringer(board.RingInfo{Method: board.RingIvshmem, Peer: 9, Vectors: 4}, 3)
			if err != nil {
				t.Fatal(err)
			}
			if n := testing.AllocsPerRun(10, func() { r.Ring() }); n != 0 {
				t.Errorf("%v allocations a ring", n)
			}
			if err := b.Close(); err != nil {
				t.Error(err)
			}
			b.Close()
		}
	}
}

// TestIvshmemRefused: what is no such device, or not ready.
func TestIvshmemRefused(t *testing.T) {
	s, odd := newIvshmem(t, 1<<20), newIvshmem(t, 3<<20)
	mod := func(change func(*pci.Info)) *models.Function {
		f := s.Function(1, 1)
		change(f.Info())
		return f
	}
	pulled := s.Function(1, 1)
	pulled.Pull()
	cached := mmio.Cached
	for _, tc := range []struct {
		name  string
		f     *models.Function
		o     board.Options
		class error
		want  string
	}{
		{"device", mod(func(i *pci.Info) { i.Device = 1 }), board.Options{}, board.ErrInput, "1af4:0001"},
		{"revision", mod(func(i *pci.Info) { i.Revision = 0 }), board.Options{}, board.ErrInput, "revision 0"},
		{"pulled", pulled, board.Options{}, board.ErrAbsent, "no peer number"},
		{"no number", s.Function(0xffffffff, 1), board.Options{}, board.ErrAbsent, "no peer number"},
		{"number", s.Function(70000, 1), board.Options{}, nil, "0x11170"},
		{"size", odd.Function(1, 1), board.Options{}, board.ErrInput, "power of two"},
		{"cached", s.Function(1, 1), board.Options{Kind: &cached}, board.ErrInput, "device memory"},
	} {
		_, err := ivshmem.New("ivshmem:x", tc.f, tc.o, ivshmem.Config{})
		if err == nil || !strings.Contains(err.Error(), tc.want) || (tc.class != nil && !errors.Is(err, tc.class)) || !tc.f.Closed() {
			t.Errorf("%s: %v (closed: %v)", tc.name, err, tc.f.Closed())
		}
	}
	// A plain device: memory alone.
	b, err := ivshmem.New("ivshmem:plain", s.Function(0, 0), board.Options{}, ivshmem.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if i := b.Self(); i.Method != board.RingNone {
		t.Errorf("%+v", i)
	}
	r, err := b.Ringer(board.RingInfo{Method: board.RingIvshmem, Peer: 0, Vectors: 2}, 1)
	if err != nil || r.Ring() != ivshmem.ErrNoDoorbell {
		t.Errorf("ring without a doorbell: %v", err)
	}
	for _, bad := range []string{"", "x", "0000:00:04.0,mode=what", "0000:00:04.0,x=1", "0000:00:04.0,mode", "0000:00:04.0,interrupts=off,interrupts=on"} {
		if _, err := board.Open("ivshmem:"+bad, board.Options{}); !errors.Is(err, board.ErrInput) {
			t.Errorf("%q: %v", bad, err)
		}
	}
	if _, err := board.Open("ivshmem:0000:ff:1f.7,mode=vfio", board.Options{}); !errors.Is(err, board.ErrAbsent) {
		t.Errorf("a function that is not there: %v", err)
	}
}
