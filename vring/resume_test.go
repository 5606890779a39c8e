package vring_test

import (
	"bytes"
	"errors"
	"math/rand"
	"testing"

	"github.com/boardlink/boardlink/vring"
	"github.com/boardlink/boardlink/vring/vringtest"
)

// resumeWork moves chains between a driver side, which is replaced by a resumed one at random, and a device side. Each
// chain has a token and a length of its own, so that a lost, repeated or exchanged one shows.
type resumeWork struct {
	t      testing.TB
	r      *vringtest.Rig
	rnd    *rand.Rand
	drv    vring.Driver
	dev    vring.Device
	next   uint32            // token
	flying map[uint32]uint32 // token: writable bytes
	popped []vring.Chain
	batch  vring.Batch
	back   int
}

func (w *resumeWork) add() {
	var reqs []vring.Request
	for n := w.rnd.Intn(4); n > 0; n-- {
		q := vring.Request{Token: w.next}
		w.next++
		pieces := 1 + w.rnd.Intn(3)
		if pieces > int(w.r.Size) {
			pieces = int(w.r.Size)
		}
		q.Readable = w.rnd.Intn(pieces + 1)
		for i := 0; i < pieces; i++ {
			q.Bufs = append(q.Bufs, vring.Buffer{Addr: w.r.Addr(uint64(w.rnd.Intn(256))), Len: uint32(1 + w.rnd.Intn(64))})
		}
		reqs = append(reqs, q)
	}
	n, err := w.drv.Add(reqs)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, q := range reqs[:n] {
		var writable uint32
		for _, b := range q.Bufs[q.Readable:] {
			writable += b.Len
		}
		w.flying[q.Token] = writable
	}
	w.drv.NeedKick()
}

func (w *resumeWork) serve() {
	w.batch.Chains, w.batch.Spans = w.batch.Chains[:0], w.batch.Spans[:0]
	n, err := w.dev.Pop(&w.batch, 1+w.rnd.Intn(4))
	if err != nil {
		w.t.Fatal(err)
	}
	w.popped = append(w.popped, w.batch.Chains[:n]...)
	var used []vring.Used
	for k := w.rnd.Intn(len(w.popped) + 1); k > 0; k-- {
		i := 0
		if !w.r.InOrder {
			i = w.rnd.Intn(len(w.popped))
		}
		c := w.popped[i]
		w.popped = append(w.popped[:i], w.popped[i+1:]...)
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

func (w *resumeWork) reap() {
	done := make([]vring.Completion, 1+w.rnd.Intn(5))
	n, err := w.drv.Reap(done)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, d := range done[:n] {
		limit, ok := w.flying[d.Token]
		if !ok || d.Len > limit {
			w.t.Fatalf("chain %d came back with %d bytes of %d, in flight %v", d.Token, d.Len, limit, ok)
		}
		delete(w.flying, d.Token)
		w.back++
	}
}

// resume replaces the driver side by one made from its record.
func (w *resumeWork) resume() {
	rec, err := w.drv.Save()
	if err != nil {
		w.t.Fatal(err)
	}
	drv, err := w.r.Ring.Resume(w.r.DrvCfg, rec)
	if err != nil {
		w.t.Fatal(err)
	}
	if drv.State() != w.drv.State() || drv.Free() != w.drv.Free() {
		w.t.Fatalf("resumed with state %+v and %d free descriptors, want %+v and %d", drv.State(), drv.Free(), w.drv.State(), w.drv.Free())
	}
	again, err := drv.Save()
	if err != nil {
		w.t.Fatal(err)
	}
	if !bytes.Equal(rec, again) {
		w.t.Fatal("a resumed driver side saves another record than it was made from")
	}
	if len(w.flying) > 0 && w.rnd.Intn(4) == 0 {
		if !w.r.EventIdx {
			w.dev.ArmKick() // asks for kicks
		}
		if !drv.NeedKick() {
			w.t.Fatal("the first NeedKick after a resumption tells nothing, and the device may have missed a kick")
		}
	}
	w.drv = drv
}

// TestResumeDriver stops and resumes the driver side at random under traffic, in each kind of queue and memory.
func TestResumeDriver(t *testing.T) {
	for _, ring := range vringtest.Rings {
		vringtest.Each(t, ring, func(t *testing.T, p vringtest.Params) {
			for _, size := range []uint16{1, 2, 8, 32} {
				r := vringtest.NewRig(t, p, size, 4096)
				w := &resumeWork{t: t, r: r, rnd: rand.New(rand.NewSource(int64(size))), flying: map[uint32]uint32{}}
				w.drv, w.dev = r.Pair(t)
				for i := 0; i < 600; i++ {
					switch w.rnd.Intn(5) {
					case 0, 1:
						w.add()
					case 2:
						w.serve()
					case 3:
						w.reap()
					case 4:
						w.resume()
					}
				}
				for end := 0; len(w.flying) > 0; end++ {
					if end > 10000 {
						t.Fatalf("size %d: %d chains never came back", size, len(w.flying))
					}
					w.serve()
					w.reap()
				}
				if w.back < 25 {
					t.Errorf("size %d: only %d chains came back", size, w.back)
				}
				if w.drv.Free() != int(size) {
					t.Errorf("size %d: %d descriptors are free at the end", size, w.drv.Free())
				}
			}
		})
	}
}

// busyRecord returns a record of a driver side with chains in flight, and the rig it belongs to.
func busyRecord(tb testing.TB, p vringtest.Params, size uint16) ([]byte, *vringtest.Rig) {
	tb.Helper()
	r := vringtest.NewRig(tb, p, size, 4096)
	w := &resumeWork{t: tb, r: r, rnd: rand.New(rand.NewSource(7)), flying: map[uint32]uint32{}}
	w.drv, w.dev = r.Pair(tb)
	for i := 0; i < 40 || len(w.flying) == 0; i++ {
		w.add()
		w.serve()
		if i%3 == 0 {
			w.reap()
		}
	}
	rec, err := w.drv.Save()
	if err != nil {
		tb.Fatal(err)
	}
	return rec, r
}

// A record of another queue, another version, or a damaged one is refused as a state.
func TestResumeRefusals(t *testing.T) {
	for _, ring := range vringtest.Rings {
		p := vringtest.Params{Ring: ring, Memory: vringtest.Heap, EventIdx: true}
		rec, r := busyRecord(t, p, 16)
		change := func(at int, v byte) []byte {
			b := append([]byte(nil), rec...)
			b[at] ^= v
			return b
		}
		other := vringtest.Split
		if !ring.Packed {
			other = vringtest.Packed
		}
		foreign, _ := busyRecord(t, vringtest.Params{Ring: other, Memory: vringtest.Heap, EventIdx: true}, 16)
		small, _ := busyRecord(t, p, 8)
		ordered, _ := busyRecord(t, vringtest.Params{Ring: ring, Memory: vringtest.Heap, EventIdx: true, InOrder: true}, 16)
		for name, b := range map[string][]byte{
			"empty": nil, "head only": rec[:8], "cut": rec[:len(rec)-1], "long": append(append([]byte(nil), rec...), 0),
			"magic": change(0, 1), "version": change(4, 2), "kind": change(6, 8), "features": change(7, 1), "size": change(8, 1),
			"other kind": foreign, "other size": small, "other features": ordered,
		} {
			_, err := r.Ring.Resume(r.DrvCfg, b)
			var e *vring.Error
			if !errors.As(err, &e) || e.Code != vring.ErrState || e.Queue != r.DrvCfg.Name {
				t.Errorf("%s: %s: %v, want an ErrState of %s", ring.Name, name, err, r.DrvCfg.Name)
			}
		}
	}
}

// FuzzResumeDriver resumes from arbitrary records: one is refused, or gives a driver side that works on within its memory.
func FuzzResumeDriver(f *testing.F) {
	for i := 0; i < 4; i++ {
		rec, _ := busyRecord(f, vringtest.Params{Ring: vringtest.Rings[i/2], Memory: vringtest.Heap, EventIdx: true, InOrder: i%2 == 1}, 8)
		f.Add(rec, i/2 == 1, i%2 == 1)
	}
	f.Fuzz(func(t *testing.T, rec []byte, packed, inOrder bool) {
		ring := vringtest.Split
		if packed {
			ring = vringtest.Packed
		}
		_, r := busyRecord(t, vringtest.Params{Ring: ring, Memory: vringtest.Heap, EventIdx: true, InOrder: inOrder}, 8)
		drv, err := r.Ring.Resume(r.DrvCfg, rec)
		if err != nil {
			return
		}
		done := make([]vring.Completion, 8)
		for i := 0; i < 20; i++ {
			if n := drv.Free(); n < 0 || n > 8 {
				t.Fatalf("%d free descriptors of 8", n)
			}
			if _, err := drv.Add([]vring.Request{{Bufs: []vring.Buffer{{Addr: r.Addr(0), Len: 4}, {Addr: r.Addr(8), Len: 4}}, Readable: 1}}); err != nil {
				return
			}
			drv.NeedKick()
			if _, err := drv.Reap(done); err != nil {
				return // what the rig's memory holds is not of this record
			}
			if _, err := drv.ArmCallAfter(3); err != nil {
				return
			}
		}
	})
}
