package vring_test

import (
	"errors"
	"fmt"
	"math/rand"
	"strings"
	"testing"

	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/vring"
	"github.com/boardlink/boardlink/vring/vringtest"
)

// killBus is memory as a process sees it that is killed at one of its stores, before it or behind it.
type killBus struct {
	*vringtest.Bus
	left   int // stores until then; below 0: never
	behind bool
}

// killed is how it ends.
type killed struct{}

func (b *killBus) Store(off uint64, width uint, v uint64) {
	if b.left == 0 && !b.behind {
		b.left--
		panic(killed{})
	}
	b.Bus.Store(off, width, v)
	if b.left == 0 {
		b.left--
		panic(killed{})
	}
	if b.left > 0 {
		b.left--
	}
}

// alive runs f, and tells whether it came to its end.
func alive(f func()) (whole bool) {
	defer func() {
		if r := recover(); r != nil {
			if _, ok := r.(killed); !ok {
				panic(r)
			}
		}
	}()
	f()
	return true
}

// journalWork moves chains between a driver side that lives, and device sides that are killed and followed by others.
type journalWork struct {
	resumeWork
	bus   *killBus
	kills int
}

// device makes a device side that goes on where the journal says.
func (w *journalWork) device() {
	w.t.Helper()
	s, err := vring.JournalState(w.r.DevCfg)
	if err == nil {
		if s.Avail != s.Used || !s.Packed {
			w.t.Fatalf("state %+v", s)
		}
		w.r.DevCfg.State = s
		w.dev, err = vring.NewPackedDevice(w.r.DevCfg)
	}
	if err != nil {
		w.t.Fatal(err)
	}
	w.popped = nil
}

// inOrder completes some of what was popped, in the order of the ring, as devices do that rewind.
func (w *journalWork) inOrder() {
	w.batch.Chains, w.batch.Spans = w.batch.Chains[:0], w.batch.Spans[:0]
	n, err := w.dev.Pop(&w.batch, 1+w.rnd.Intn(6))
	if err != nil {
		w.t.Fatal(err)
	}
	w.popped = append(w.popped, w.batch.Chains[:n]...)
	var used []vring.Used
	for k := w.rnd.Intn(len(w.popped) + 1); k > 0; k-- {
		c := w.popped[0]
		w.popped = w.popped[1:]
		l := c.WriteLen
		if l > 0 && w.rnd.Intn(2) == 0 {
			l = uint32(w.rnd.Intn(int(l)))
		}
		used = append(used, vring.Used{ID: c.ID, Count: c.Count, Len: l})
	}
	if err := w.dev.Complete(used); err != nil {
		w.t.Fatal(err)
	}
	w.dev.NeedCall()
}

// TestJournalKilled kills the device side of a packed queue at every store in turn, before it and behind it: the next one goes
// on, and each chain comes back once.
func TestJournalKilled(t *testing.T) {
	const size = 8
	for i := 0; i < 16; i++ {
		p := vringtest.Params{Ring: vringtest.Packed, EventIdx: i&1 != 0, Indirect: i&2 != 0, InOrder: i&4 != 0}
		behind := i&8 != 0
		t.Run(fmt.Sprintf("%s behind=%v", p.String(), behind), func(t *testing.T) {
			t.Parallel()
			for at := 0; at < 40; at++ {
				bus := &killBus{Bus: vringtest.NewBus(1 << 16), left: -1, behind: behind}
				p := p
				p.Memory = vringtest.Memory{Name: "kill", New: func(testing.TB, int) mmio.Mem { return mmio.NewBusMem(bus.Bus, 1<<16, mmio.Cached) }}
				r := vringtest.NewRig(t, p, size, 4096)
				r.Over(t, mmio.NewBusMem(bus.Bus, 1<<16, mmio.Cached), mmio.NewBusMem(bus, 1<<16, mmio.Cached))
				w := &journalWork{resumeWork: resumeWork{t: t, r: r, rnd: rand.New(rand.NewSource(int64(at))), flying: map[uint32]uint32{}}, bus: bus}
				var err error
				if w.drv, err = r.Ring.NewDriver(r.DrvCfg); err != nil {
					t.Fatal(err)
				}
				if used, err := vring.PackedRingTouched(r.DevCfg); used || err != nil {
					t.Fatal("a new ring is touched", err)
				}
				r.DevCfg.Journal = &vring.Journal{Words: make([]uint64, vring.JournalWords(size))}
				r.DevCfg.Journal.Reset(vring.State{Avail: wrap, Used: wrap, Packed: true})
				w.device()
				for k := 0; k < 300; k++ {
					w.add()
					bus.left = at
					for !alive(w.inOrder) {
						if used, err := vring.PackedRingTouched(r.DevCfg); !used || err != nil {
							t.Fatal("a ring in use is not touched", err)
						}
						w.kills++
						// The next one may be killed as soon.
						bus.left = w.rnd.Intn(at + 1)
						for !alive(w.device) {
							w.kills++
							bus.left = -1
						}
						bus.left = -1
					}
					bus.left = -1
					w.reap()
				}
				for end := 0; len(w.flying) > 0; end++ {
					if end > 10000 {
						t.Fatalf("store %d: %d chains never came back", at, len(w.flying))
					}
					w.inOrder()
					w.reap()
				}
				if w.drv.Free() != size || w.back < 100 || at == 0 && w.kills < 100 {
					t.Fatalf("store %d: %d descriptors are free, %d chains came back, killed %d times", at, w.drv.Free(), w.back, w.kills)
				}
			}
		})
	}
}

// TestJournalRefused: a journal of another queue, or damaged.
func TestJournalRefused(t *testing.T) {
	r := vringtest.NewRig(t, vringtest.Params{Ring: vringtest.Packed, Memory: vringtest.Heap}, 7, 4096)
	r.DevCfg.Journal = nil
	if _, err := vring.JournalState(r.DevCfg); !errors.Is(err, vring.ErrConfig) || !strings.Contains(err.Error(), "no journal") {
		t.Error(err)
	}
	r.DevCfg.Journal = &vring.Journal{Words: make([]uint64, 7)}
	if _, err := vring.JournalState(r.DevCfg); !errors.Is(err, vring.ErrConfig) || !strings.Contains(err.Error(), "a journal of 7 words, 8 are needed") {
		t.Error(err)
	}
	if _, err := vring.NewPackedDevice(r.DevCfg); !errors.Is(err, vring.ErrConfig) {
		t.Error(err)
	}
	for _, c := range []struct {
		words []uint64
		says  string
	}{
		{[]uint64{7 | 7<<16}, "positions 7 and 7 in a queue of 7"},
		{[]uint64{5 | 3<<16}, "descriptors in flight"},
		{[]uint64{1 | 3<<16 | 3<<32}, "3 used descriptors for 2"},
		{[]uint64{1 | 3<<16 | 1<<32, 1 << 48}, "2 descriptors, and 1 used ones for 1"},
		{[]uint64{1 | 3<<16 | 2<<32, 0, 2 << 48}, "used descriptor 0 of none"},
		{[]uint64{1 | 3<<16 | 1<<32, 7 << 48}, "2 descriptors, and 1 used ones for 7"},
	} {
		r.DevCfg.Journal.Words = make([]uint64, 8)
		copy(r.DevCfg.Journal.Words, c.words)
		if s, err := vring.JournalState(r.DevCfg); !errors.Is(err, vring.ErrState) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%#x: %+v, %v, want %q", c.words, s, err, c.says)
		}
	}
}
