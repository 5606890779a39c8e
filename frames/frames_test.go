package frames_test

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"testing"
	"time"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/frames"
	"github.com/boardlink/boardlink/vring"
	"github.com/boardlink/boardlink/vring/vringtest"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if how := os.Getenv(sharedEnv); how != "" {
		if err := echoProcess(how); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

const maxFrame = 1514

// memory returns the driver side's memory for n frames.
func memory(r *vringtest.Rig, n int) dma.Span {
	return dma.Span{Region: r.DrvCfg.Desc.Region, Off: r.Payload, Len: uint32(frames.MemSize(maxFrame, n))}
}

func rig(tb testing.TB, p vringtest.Params, n int) *vringtest.Rig {
	return vringtest.NewRig(tb, p, uint16(n), int(frames.MemSize(maxFrame, n)))
}

// ends makes both ends of a queue, board to host or host to board.
func ends(tb testing.TB, r *vringtest.Rig, toHost bool, drv, dev frames.Config) (frames.Sender, frames.Receiver) {
	tb.Helper()
	q, d := r.Pair(tb)
	drv.Name, drv.MaxFrame = "test0 q0", maxFrame
	dev.Name, dev.MaxFrame = "test0 q0", maxFrame
	must := func(err error) {
		if err != nil {
			tb.Fatal(err)
		}
	}
	if toHost {
		s, err := frames.NewDriverSender(drv, q, memory(r, int(r.Size)))
		must(err)
		v, err := frames.NewDeviceReceiver(dev, d)
		must(err)
		return s, v
	}
	v, err := frames.NewDriverReceiver(drv, q, memory(r, int(r.Size)))
	must(err)
	s, err := frames.NewDeviceSender(dev, d)
	must(err)
	return s, v
}

// flow makes frames, and checks that they arrive in order, whole.
type flow struct {
	rnd       *rand.Rand
	sums      []uint32
	lens      []int
	sent, got int
}

func newFlow(seed uint64) *flow { return &flow{rnd: rand.New(rand.NewPCG(seed, 1))} }

func (f *flow) fill(o *frames.Out) {
	n := 1 + f.rnd.IntN(maxFrame)
	b := o.Room[:n]
	v := f.rnd.Uint32()
	for i := range b {
		b[i] = byte(v)
		v = v*1664525 + 1013904223
		v ^= v >> 15
	}
	o.Len = n
	f.lens, f.sums = append(f.lens, n), append(f.sums, crc32.ChecksumIEEE(b))
	f.sent++
}

func (f *flow) check(tb testing.TB, b []byte) {
	tb.Helper()
	if f.got >= len(f.lens) || len(b) != f.lens[f.got] || crc32.ChecksumIEEE(b) != f.sums[f.got] {
		tb.Fatalf("frame %d of %d bytes is not what was sent", f.got, len(b))
	}
	f.got++
}

// Frames of all lengths cross every kind of ring and memory, both ways, whole and in order.
func TestRoundTrip(t *testing.T) {
	for _, ring := range vringtest.Rings {
		vringtest.Each(t, ring, func(t *testing.T, p vringtest.Params) {
			for i, toHost := range []bool{true, false, true} {
				copied := i == 2
				s, v := ends(t, rig(t, p, 16), toHost, frames.Config{Batch: 7}, frames.Config{Batch: 5, Copy: copied})
				f := newFlow(uint64(i))
				for f.got < 120 {
					out, err := s.Reserve(1 + f.rnd.IntN(9))
					if err != nil {
						t.Fatal(err)
					}
					n := f.rnd.IntN(len(out) + 1) // not all that was reserved
					for i := range out[:n] {
						f.fill(&out[i])
					}
					if err := s.Send(n); err != nil {
						t.Fatal(err)
					}
					in, err := v.Receive(1 + f.rnd.IntN(6))
					if err != nil {
						t.Fatal(err)
					}
					for _, b := range in {
						f.check(t, b)
					}
					if f.rnd.IntN(2) == 0 { // else the next Receive does it
						if err := v.Done(); err != nil {
							t.Fatal(err)
						}
					}
				}
				near := !p.Memory.Across && p.Memory.Name != "cachedbus"
				staged := func(st *frames.Stats) (n uint64) {
					st.Each(func(name string, v uint64) {
						if name == "staged" {
							n = v
						}
					})
					return n
				}
				if got := staged(v.Stats()); toHost && (got != 0) != (!near || copied) {
					t.Errorf("%d frames were staged", got)
				}
				if v.Stats().Frames() != uint64(f.got) || s.Stats().Frames() != uint64(f.sent) || v.Stats().Dropped() != 0 {
					t.Errorf("%d of %d counted as received, %d of %d as sent", v.Stats().Frames(), f.got, s.Stats().Frames(), f.sent)
				}
			}
		})
	}
}

// Both sides run at once, and sleep: nobody is left asleep, and Stop wakes them.
func TestSleep(t *testing.T) {
	for _, ring := range vringtest.Rings {
		for _, toHost := range []bool{true, false} {
			for _, event := range []bool{true, false} {
				t.Run(fmt.Sprintf("%s toHost=%v event=%v", ring.Name, toHost, event), func(t *testing.T) {
					var bells [3]*doorbell.Eventfd
					for i := range bells {
						e, err := doorbell.NewEventfd()
						if err != nil {
							t.Fatal(err)
						}
						defer e.Close()
						bells[i] = e
					}
					kick, call, stop := bells[0], bells[1], bells[2]
					// No poll fallback that could hide a lost wake-up.
					never := doorbell.Fallback{Min: time.Minute, Max: time.Minute}
					drv := frames.Config{Ring: kick, Sleep: doorbell.SleeperConfig{Doorbell: call, Stop: stop, Fallback: never}}
					dev := frames.Config{Ring: call, Sleep: doorbell.SleeperConfig{Doorbell: kick, Stop: stop, Fallback: never}, Copy: true}
					s, v := ends(t, rig(t, vringtest.Params{Ring: ring, Memory: vringtest.Heap, EventIdx: event}, 8), toHost, drv, dev)
					const count = 1000
					done := make(chan error, 1)
					go func() {
						for n := 0; n < count; {
							out, err := s.Reserve(3)
							if err == nil && len(out) == 0 {
								_, err = s.Wait()
							}
							for i := range out {
								out[i].Len = 4
								out[i].Room[0], out[i].Room[1] = byte(n+i), byte((n+i)>>8)
							}
							if err == nil {
								err = s.Send(len(out))
							}
							if err != nil {
								done <- err
								return
							}
							n += len(out)
						}
						done <- nil
					}()
					for n := 0; n < count; {
						in, err := v.Receive(8)
						if err != nil {
							t.Fatal(err)
						}
						for _, b := range in {
							if len(b) != 4 || int(b[0])|int(b[1])<<8 != n {
								t.Fatalf("frame %d: % x", n, b)
							}
							n++
						}
						if err := v.Done(); err != nil {
							t.Fatal(err)
						}
						if len(in) == 0 {
							if _, err := v.Wait(); err != nil {
								t.Fatal(err)
							}
						}
					}
					if err := <-done; err != nil {
						t.Fatal(err)
					}
					go stop.Ring()
					for {
						why, err := v.Wait()
						if err != nil {
							t.Fatal(err)
						}
						if why&doorbell.Stopped != 0 {
							break
						}
					}
					if s.Stats().Rings()+v.Stats().Rings() == 0 || v.Stats().Sleeps() == 0 {
						t.Errorf("%d and %d rings, %d sleeps", s.Stats().Rings(), v.Stats().Rings(), v.Stats().Sleeps())
					}
				})
			}
		}
	}
}

// Wait does not sleep where there is something.
func TestWaitPending(t *testing.T) {
	for _, toHost := range []bool{true, false} {
		s, v := ends(t, rig(t, vringtest.Params{Ring: vringtest.Split, Memory: vringtest.Heap, EventIdx: true}, 4), toHost, frames.Config{}, frames.Config{})
		for i := range 3 {
			if why, err := s.Wait(); why != 0 || err != nil {
				t.Fatal(i, why, err)
			}
			out, err := s.Reserve(1)
			if err != nil || len(out) != 1 {
				t.Fatal(out, err)
			}
			out[0].Len = 1
			if err := s.Send(1); err != nil {
				t.Fatal(err)
			}
		}
		if why, err := v.Wait(); why != 0 || err != nil {
			t.Fatal(why, err)
		}
		if in, err := v.Receive(64); err != nil || len(in) != 3 {
			t.Fatal(in, err)
		}
	}
}

// No frame costs an allocation: not in the steady state, in either direction, on any ring, whether staged or not.
func TestAllocations(t *testing.T) {
	for _, ring := range vringtest.Rings {
		for _, m := range vringtest.Memories {
			for _, toHost := range []bool{true, false} {
				s, v := ends(t, rig(t, vringtest.Params{Ring: ring, Memory: m}, 32), toHost, frames.Config{}, frames.Config{})
				one := func() {
					for range 10 {
						out, err := s.Reserve(20)
						if err != nil {
							t.Fatal(err)
						}
						for i := range out {
							out[i].Len = 100 + i
							out[i].Room[99] = 7
						}
						if err := s.Send(len(out)); err != nil {
							t.Fatal(err)
						}
						in, err := v.Receive(20)
						if err != nil || len(in) == 0 || in[0][99] != 7 {
							t.Fatal(len(in), err)
						}
						if err := v.Done(); err != nil {
							t.Fatal(err)
						}
					}
				}
				one()
				if n := testing.AllocsPerRun(20, one); n != 0 {
					t.Errorf("%s, %s, toHost=%v: %v allocations in 10 batches", ring.Name, m.Name, toHost, n)
				}
			}
		}
	}
}

// One publication for each batch: the other side's index moves once.
func TestOnePublication(t *testing.T) {
	for _, ring := range vringtest.Rings {
		r := rig(t, vringtest.Params{Ring: ring, Memory: vringtest.Heap}, 64)
		q, d := r.Pair(t)
		s, err := frames.NewDriverSender(frames.Config{MaxFrame: maxFrame}, q, memory(r, 64))
		if err != nil {
			t.Fatal(err)
		}
		v, err := frames.NewDeviceReceiver(frames.Config{MaxFrame: maxFrame}, d)
		if err != nil {
			t.Fatal(err)
		}
		q0, d0 := q.Stats().Load().Published, d.Stats().Load().Published
		for range 5 {
			out, _ := s.Reserve(32)
			for i := range out {
				out[i].Len = 64
			}
			if err := s.Send(len(out)); err != nil || len(out) != 32 {
				t.Fatal(len(out), err)
			}
			if in, err := v.Receive(32); err != nil || len(in) != 32 {
				t.Fatal(len(in), err)
			}
			if err := v.Done(); err != nil {
				t.Fatal(err)
			}
		}
		if a, b := q.Stats().Load().Published-q0, d.Stats().Load().Published-d0; a != 5 || b != 5 {
			t.Errorf("%s: 5 batches took %d and %d publications", ring.Name, a, b)
		}
	}
}

// A device that completes in another order: room comes back all the same, when its turn is there.
func TestOutOfOrder(t *testing.T) {
	for _, ring := range vringtest.Rings {
		r := rig(t, vringtest.Params{Ring: ring, Memory: vringtest.Heap}, 8)
		q, d := r.Pair(t)
		s, err := frames.NewDriverSender(frames.Config{MaxFrame: maxFrame}, q, memory(r, 8))
		if err != nil {
			t.Fatal(err)
		}
		rnd := rand.New(rand.NewPCG(3, 4))
		var held []vring.Used
		want, seen := 0, map[byte]bool{}
		for want < 200 || len(held) > 0 {
			out, err := s.Reserve(8)
			if err != nil {
				t.Fatal(err)
			}
			if want >= 200 {
				out = out[:0]
			}
			for i := range out {
				out[i].Len, out[i].Room[0] = 1, byte(want)
				want++
			}
			if err := s.Send(len(out)); err != nil {
				t.Fatal(err)
			}
			var b vring.Batch
			if _, err := d.Pop(&b, 8); err != nil {
				t.Fatal(err)
			}
			for _, c := range b.Chains {
				m := b.Spans[c.First]
				var f [frames.HeaderLen + 1]byte
				m.CopyOut(f[:], 0)
				seen[f[frames.HeaderLen]] = true
				held = append(held, vring.Used{ID: c.ID, Count: c.Count})
			}
			rnd.Shuffle(len(held), func(i, j int) { held[i], held[j] = held[j], held[i] })
			k := rnd.IntN(len(held) + 1)
			if err := d.Complete(held[:k]); err != nil {
				t.Fatal(err)
			}
			held = append(held[:0], held[k:]...)
		}
		if len(seen) != 200 {
			t.Errorf("%s: %d of 200 frames", ring.Name, len(seen))
		}
		if out, err := s.Reserve(8); err != nil || len(out) == 0 {
			t.Errorf("%s: %d free, %v", ring.Name, len(out), err)
		}
	}
}

// header returns a virtio-net header with the given first bytes.
func header(flags, gso byte) []byte {
	h := make([]byte, frames.HeaderLen)
	h[0], h[1] = flags, gso
	return h
}

// What another driver may send, well or badly: frames in any number of buffers, and what is no frame.
func TestForeignDriver(t *testing.T) {
	payload := bytes.Repeat([]byte{1, 2, 3, 4, 5}, 40)
	good := append(header(0, 0), payload...)
	cut := func(b []byte, at ...int) (l [][]byte) {
		last := 0
		for _, a := range append(at, len(b)) {
			l = append(l, b[last:a])
			last = a
		}
		return l
	}
	for _, ring := range vringtest.Rings {
		for _, m := range vringtest.Memories {
			for _, c := range []struct {
				name     string
				bufs     [][]byte
				writable int // buffers of that many bytes behind
				dropped  bool
			}{
				{"one buffer", cut(good), 0, false},
				{"header apart", cut(good, 12), 0, false},
				{"header in pieces", cut(good, 1, 5, 12, 13), 0, false},
				{"header and some", cut(good, 20, 100), 0, false},
				{"with a writable buffer", cut(good), 8, false},
				{"data valid", [][]byte{append(header(2, 0), payload...)}, 0, false},
				{"checksum", [][]byte{append(header(1, 0), payload...)}, 0, true},
				{"segmentation", [][]byte{append(header(0, 1), payload...)}, 0, true},
				{"segmentation, header apart", cut(append(header(0, 4), payload...), 12), 0, true},
				{"header alone", cut(good[:12]), 0, true},
				{"less than a header", cut(good[:5]), 0, true},
				{"writable only", nil, 100, true},
				{"too long", [][]byte{append(header(0, 0), make([]byte, maxFrame+1)...)}, 0, true},
				{"longest", [][]byte{append(header(0, 0), make([]byte, maxFrame)...)}, 0, false},
			} {
				for _, copied := range []bool{false, true} {
					r := vringtest.NewRig(t, vringtest.Params{Ring: ring, Memory: m}, 8, 8192)
					q, d := r.Pair(t)
					v, err := frames.NewDeviceReceiver(frames.Config{Name: "net0 tx", MaxFrame: maxFrame, Copy: copied}, d)
					if err != nil {
						t.Fatal(err)
					}
					var req vring.Request
					off := uint64(3) // no alignment
					var want []byte
					for _, b := range c.bufs {
						r.Poke(off, b)
						req.Bufs = append(req.Bufs, vring.Buffer{Addr: r.Addr(off), Len: uint32(len(b))})
						off += uint64(len(b)) + 5
						want = append(want, b...)
					}
					req.Readable = len(c.bufs)
					if c.writable > 0 {
						req.Bufs = append(req.Bufs, vring.Buffer{Addr: r.Addr(off), Len: uint32(c.writable)})
					}
					if n, err := q.Add([]vring.Request{req}); n != 1 || err != nil {
						t.Fatal(n, err)
					}
					in, err := v.Receive(8)
					if err != nil {
						t.Fatalf("%s, %s, %s: %v", ring.Name, m.Name, c.name, err)
					}
					if c.dropped != (len(in) == 0) || !c.dropped && !bytes.Equal(in[0], want[12:]) {
						t.Errorf("%s, %s, %s: received %d frames", ring.Name, m.Name, c.name, len(in))
					}
					if n := v.Stats().Dropped(); c.dropped != (n == 1) {
						t.Errorf("%s, %s, %s: %d dropped", ring.Name, m.Name, c.name, n)
					}
					if err := v.Done(); err != nil {
						t.Fatal(err)
					}
					var done [1]vring.Completion
					if n, err := q.Reap(done[:]); n != 1 || err != nil || done[0].Len != 0 {
						t.Errorf("%s, %s, %s: gave back %d %v %v", ring.Name, m.Name, c.name, n, done, err)
					}
				}
			}
		}
	}
}

// What another driver offers to receive into: in pieces, with too little room.
func TestForeignBuffers(t *testing.T) {
	for _, ring := range vringtest.Rings {
		for _, m := range vringtest.Memories {
			for _, pieces := range [][]uint32{{12 + maxFrame}, {12, maxFrame}, {5, 7, 1000, maxFrame}, {4000}} {
				r := vringtest.NewRig(t, vringtest.Params{Ring: ring, Memory: m}, 8, 8192)
				q, d := r.Pair(t)
				s, err := frames.NewDeviceSender(frames.Config{Name: "net0 rx", MaxFrame: maxFrame}, d)
				if err != nil {
					t.Fatal(err)
				}
				r.Poke(0, bytes.Repeat([]byte{0xa5}, 8192)) // whatever lay there before
				var req vring.Request
				off := uint64(1)
				for _, n := range pieces {
					req.Bufs = append(req.Bufs, vring.Buffer{Addr: r.Addr(off), Len: n})
					off += uint64(n) + 1
				}
				if n, err := q.Add([]vring.Request{req}); n != 1 || err != nil {
					t.Fatal(n, err)
				}
				out, err := s.Reserve(8)
				if err != nil || len(out) != 1 || len(out[0].Room) < maxFrame {
					t.Fatalf("%s, %s, %v: %d, %v", ring.Name, m.Name, pieces, len(out), err)
				}
				frame := bytes.Repeat([]byte{9, 8, 7}, 500)
				out[0].Len = copy(out[0].Room, frame)
				if err := s.Send(1); err != nil {
					t.Fatal(err)
				}
				var done [1]vring.Completion
				if n, err := q.Reap(done[:]); n != 1 || err != nil || int(done[0].Len) != 12+len(frame) {
					t.Fatal(n, done, err)
				}
				var got []byte
				off = 1
				for _, n := range pieces {
					got = append(got, r.Peek(off, int(n))...)
					if b := r.Peek(off+uint64(n), 1); b[0] != 0xa5 {
						t.Errorf("%s, %s, %v: wrote behind a buffer", ring.Name, m.Name, pieces)
					}
					off += uint64(n) + 1
				}
				head := make([]byte, 12)
				head[10] = 1 // num_buffers
				if !bytes.Equal(got[:12], head) || !bytes.Equal(got[12:12+len(frame)], frame) {
					t.Errorf("%s, %s, %v: header % x", ring.Name, m.Name, pieces, got[:12])
				}
			}
			r := vringtest.NewRig(t, vringtest.Params{Ring: ring, Memory: m}, 8, 8192)
			q, d := r.Pair(t)
			s, err := frames.NewDeviceSender(frames.Config{Name: "net0 rx", MaxFrame: maxFrame}, d)
			if err != nil {
				t.Fatal(err)
			}
			for _, n := range []uint32{12 + maxFrame, 11 + maxFrame} {
				if _, err := q.Add([]vring.Request{{Bufs: []vring.Buffer{{Addr: r.Addr(0), Len: n}}}}); err != nil {
					t.Fatal(err)
				}
			}
			if out, err := s.Reserve(1); err != nil || len(out) != 1 {
				t.Fatal(out, err)
			}
			if out, err := s.Reserve(8); err != nil || len(out) != 1 {
				t.Fatal(out, err) // what is left of what was popped
			}
			s.Close()
			if out, err := s.Reserve(8); !errors.Is(err, frames.ErrSmallBuffer) || len(out) != 0 {
				t.Errorf("%s, %s: %d, %v", ring.Name, m.Name, len(out), err)
			}
			if st := d.State(); ring.Between(8, st.Used, st.Avail) != 0 {
				t.Errorf("%s, %s: buffers kept: %+v", ring.Name, m.Name, st)
			}
		}
	}
}

// What a device may return: less than a header, a header that asks for work, no bytes.
func TestForeignDevice(t *testing.T) {
	for _, ring := range vringtest.Rings {
		for _, m := range vringtest.Memories {
			for _, c := range []struct {
				head    []byte
				n       uint32
				err     error
				dropped uint64
			}{
				{header(0, 0), 12 + 60, nil, 0}, {header(2, 0), 12 + 1, nil, 0}, {header(0, 0), 12, nil, 1}, {header(1, 0), 100, nil, 1}, {header(0, 3), 100, nil, 1},
				{header(0, 0), 11, frames.ErrShortBuffer, 0}, {header(0, 0), 0, frames.ErrShortBuffer, 0},
			} {
				r := rig(t, vringtest.Params{Ring: ring, Memory: m}, 4)
				q, d := r.Pair(t)
				v, err := frames.NewDriverReceiver(frames.Config{Name: "net0 rx", MaxFrame: maxFrame}, q, memory(r, 4))
				if err != nil {
					t.Fatal(err)
				}
				var b vring.Batch
				if n, err := d.Pop(&b, 1); n != 1 || err != nil {
					t.Fatal(n, err)
				}
				b.Spans[0].CopyIn(0, c.head)
				if err := d.Complete([]vring.Used{{ID: b.Chains[0].ID, Count: b.Chains[0].Count, Len: c.n}}); err != nil {
					t.Fatal(err)
				}
				in, err := v.Receive(4)
				want := 1 - int(c.dropped)
				if c.err != nil {
					want = 0
				}
				if !errors.Is(err, c.err) || len(in) != want || v.Stats().Dropped() != c.dropped {
					t.Errorf("%s, %s, %+v: %d frames, %d dropped, %v", ring.Name, m.Name, c, len(in), v.Stats().Dropped(), err)
				}
				if want == 1 && len(in[0]) != int(c.n)-12 {
					t.Errorf("%d bytes", len(in[0]))
				}
			}
		}
	}
}

// A ring that the peer breaks: its error comes through, and stays.
func TestBrokenRing(t *testing.T) {
	r := rig(t, vringtest.Params{Ring: vringtest.Split, Memory: vringtest.Heap}, 4)
	q, d := r.Pair(t)
	s, err := frames.NewDriverSender(frames.Config{MaxFrame: maxFrame}, q, memory(r, 4))
	if err != nil {
		t.Fatal(err)
	}
	v, err := frames.NewDeviceReceiver(frames.Config{MaxFrame: maxFrame}, d)
	if err != nil {
		t.Fatal(err)
	}
	out, _ := s.Reserve(4)
	for i := range out {
		out[i].Len = 1
	}
	if err := s.Send(4); err != nil {
		t.Fatal(err)
	}
	r.Mem.Store16(r.DeviceOff+2, 17) // used index
	r.Mem.Store16(r.DriverOff+2, 99) // available index
	for range 2 {
		if _, err := s.Reserve(1); !errors.Is(err, vring.ErrUsedJump) {
			t.Error(err)
		}
		if _, err := v.Receive(1); !errors.Is(err, vring.ErrIndexJump) {
			t.Error(err)
		}
	}
	if _, err := s.Wait(); err == nil {
		t.Error("waits on a broken queue")
	}
	if _, err := v.Wait(); err == nil {
		t.Error("waits on a broken queue")
	}
}

func TestMisuse(t *testing.T) {
	for _, toHost := range []bool{true, false} {
		s, _ := ends(t, rig(t, vringtest.Params{Ring: vringtest.Split, Memory: vringtest.Heap}, 8), toHost, frames.Config{}, frames.Config{})
		if err := s.Send(1); !errors.Is(err, frames.ErrCount) {
			t.Error(err)
		}
		out, err := s.Reserve(3)
		if err != nil || len(out) != 3 {
			t.Fatal(out, err)
		}
		for _, n := range []int{-1, 4} {
			if err := s.Send(n); !errors.Is(err, frames.ErrCount) {
				t.Error(n, err)
			}
		}
		for _, n := range []int{0, -1, maxFrame + 1} {
			out[0].Len = n
			if err := s.Send(1); !errors.Is(err, frames.ErrLen) {
				t.Error(n, err)
			}
		}
		for i := range out {
			out[i].Len = maxFrame
		}
		if err := s.Send(2); err != nil {
			t.Error(err)
		}
		if err := s.Send(1); err != nil { // the rest of what was reserved
			t.Error(err)
		}
		if err := s.Send(0); err != nil || s.Stats().Frames() != 3 {
			t.Error(err, s.Stats().Frames())
		}
		if out, err := s.Reserve(-1); err != nil || len(out) != 0 {
			t.Error(out, err)
		}
	}
}

func TestConfig(t *testing.T) {
	r := rig(t, vringtest.Params{Ring: vringtest.Split, Memory: vringtest.Heap}, 8)
	q, d := r.Pair(t)
	few := memory(r, 8)
	few.Len = 1000
	for _, c := range []frames.Config{{}, {MaxFrame: -1}, {MaxFrame: frames.MaxMaxFrame + 1}, {MaxFrame: 100, Batch: -1}, {MaxFrame: 100, Batch: frames.MaxBatch + 1}} {
		for i, f := range []func() error{
			func() error { _, err := frames.NewDriverSender(c, q, memory(r, 8)); return err },
			func() error { _, err := frames.NewDriverReceiver(c, q, memory(r, 8)); return err },
			func() error { _, err := frames.NewDeviceSender(c, d); return err },
			func() error { _, err := frames.NewDeviceReceiver(c, d); return err },
		} {
			if err := f(); !errors.Is(err, frames.ErrConfig) {
				t.Errorf("%d %+v: %v", i, c, err)
			}
		}
	}
	for _, m := range []dma.Span{{}, few} {
		if _, err := frames.NewDriverSender(frames.Config{MaxFrame: maxFrame}, q, m); !errors.Is(err, frames.ErrConfig) {
			t.Error(err)
		}
		if _, err := frames.NewDriverReceiver(frames.Config{MaxFrame: maxFrame}, q, m); !errors.Is(err, frames.ErrConfig) {
			t.Error(err)
		}
	}
	// Memory of three frames bounds what is in flight, wherever it starts.
	for off := range uint64(70) {
		m := memory(r, 3)
		m.Off += off
		r := rig(t, vringtest.Params{Ring: vringtest.Split, Memory: vringtest.Heap}, 8)
		q, _ := r.Pair(t)
		m.Region = r.DrvCfg.Desc.Region
		s, err := frames.NewDriverSender(frames.Config{MaxFrame: maxFrame}, q, m)
		if err != nil {
			t.Fatal(err)
		}
		if out, err := s.Reserve(8); err != nil || len(out) != 3 {
			t.Fatalf("offset %d: %d, %v", off, len(out), err)
		}
	}
}

// FuzzDeviceReceiver: chains of any shape, with any header: what comes out was in the buffers, and every chain goes back.
func FuzzDeviceReceiver(f *testing.F) {
	f.Add([]byte{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1, 2, 3}, []byte{15}, uint8(1), true)
	f.Add([]byte{1, 0, 9}, []byte{3, 12, 1}, uint8(3), false)
	f.Add([]byte{0, 4, 9}, []byte{1, 1, 200}, uint8(2), true)
	f.Add([]byte{}, []byte{9}, uint8(0), false)
	f.Fuzz(func(t *testing.T, head, lens []byte, readable uint8, packed bool) {
		p := vringtest.Params{Ring: vringtest.Split, Memory: vringtest.Heap}
		if packed {
			p.Ring = vringtest.Packed
		}
		r := vringtest.NewRig(t, p, 8, 8192)
		q, d := r.Pair(t)
		v, err := frames.NewDeviceReceiver(frames.Config{MaxFrame: 300}, d)
		if err != nil {
			t.Fatal(err)
		}
		if len(head) > 4096 {
			head = head[:4096]
		}
		r.Poke(0, head)
		var req vring.Request
		off := uint64(0)
		for _, n := range lens {
			if len(req.Bufs) == 8 || n == 0 {
				break
			}
			req.Bufs = append(req.Bufs, vring.Buffer{Addr: r.Addr(off), Len: uint32(n)})
			off += uint64(n)
		}
		if req.Readable = int(readable); req.Readable > len(req.Bufs) || len(req.Bufs) == 0 {
			return
		}
		total := 0
		for _, b := range req.Bufs[:req.Readable] {
			total += int(b.Len)
		}
		if _, err := q.Add([]vring.Request{req}); err != nil {
			t.Fatal(err)
		}
		in, err := v.Receive(1)
		if err != nil {
			t.Fatal(err)
		}
		sent := r.Peek(0, 8192)
		want := total > 12 && total <= 312 && sent[0]&1 == 0 && sent[1] == 0
		if want != (len(in) == 1) || want && !bytes.Equal(in[0], sent[12:total]) {
			t.Fatalf("%d bytes, header % x: %d frames", total, sent[:12], len(in))
		}
		if err := v.Done(); err != nil {
			t.Fatal(err)
		}
		var done [1]vring.Completion
		if n, err := q.Reap(done[:]); n != 1 || err != nil {
			t.Fatal(n, err)
		}
	})
}

// FuzzDriverReceiver: a device that returns any buffer with any length and header.
func FuzzDriverReceiver(f *testing.F) {
	f.Add([]byte{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 7}, uint16(13), uint8(0), true)
	f.Add([]byte{1, 0}, uint16(100), uint8(3), false)
	f.Add([]byte{}, uint16(3), uint8(2), false)
	f.Add([]byte{0, 0}, uint16(12), uint8(1), true)
	f.Fuzz(func(t *testing.T, b []byte, n uint16, which uint8, packed bool) {
		p := vringtest.Params{Ring: vringtest.Split, Memory: vringtest.Heap}
		if packed {
			p.Ring = vringtest.Packed
		}
		r := rig(t, p, 4)
		q, d := r.Pair(t)
		v, err := frames.NewDriverReceiver(frames.Config{MaxFrame: maxFrame}, q, memory(r, 4))
		if err != nil {
			t.Fatal(err)
		}
		var batch vring.Batch
		if n, err := d.Pop(&batch, 4); n != 4 || err != nil {
			t.Fatal(n, err)
		}
		c := batch.Chains[which%4]
		if len(b) > 12+maxFrame {
			b = b[:12+maxFrame]
		}
		batch.Spans[c.First].CopyIn(0, b)
		if err := d.Complete([]vring.Used{{ID: c.ID, Count: c.Count, Len: uint32(n)}}); err != nil {
			t.Fatal(err)
		}
		in, err := v.Receive(4)
		switch {
		case n > 12+maxFrame:
			if !errors.Is(err, vring.ErrUsedLen) {
				t.Fatal(err)
			}
		case n < 12:
			if !errors.Is(err, frames.ErrShortBuffer) {
				t.Fatal(err)
			}
		case err != nil:
			t.Fatal(err)
		default:
			full := make([]byte, 12+maxFrame)
			copy(full, b)
			want := n > 12 && full[0]&1 == 0 && full[1] == 0
			if want != (len(in) == 1) || want && !bytes.Equal(in[0], full[12:n]) {
				t.Fatalf("%d bytes, header % x: %d frames", n, full[:12], len(in))
			}
		}
	})
}

func BenchmarkFrames(b *testing.B) {
	for _, ring := range vringtest.Rings {
		for _, toHost := range []bool{true, false} {
			b.Run(fmt.Sprintf("%s/toHost=%v", ring.Name, toHost), func(b *testing.B) {
				s, v := ends(b, rig(b, vringtest.Params{Ring: ring, Memory: vringtest.Heap, EventIdx: true}, 256), toHost, frames.Config{}, frames.Config{})
				b.ReportAllocs()
				for b.Loop() { // 32 frames
					out, err := s.Reserve(32)
					for i := range out {
						out[i].Len = 64
						out[i].Room[0] = 1
					}
					if err == nil {
						err = s.Send(len(out))
					}
					if err == nil {
						_, err = v.Receive(32)
					}
					if err == nil {
						err = v.Done()
					}
					if err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}
