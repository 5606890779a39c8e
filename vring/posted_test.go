package vring_test

import (
	"encoding/binary"
	"fmt"
	"runtime"
	"testing"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/vring"
)

// world is two memories joined by a bus with posted writes: a write across is under way
// until it is delivered, in order; a read across pushes the reader's own writes before
// it, and its completion those that the other side had sent until then. Each side is a
// coroutine that stops at each access; a seeded scheduler decides what happens next.
type world struct {
	mem    [2][]byte // local to side 0 (host, device side), side 1 (board, driver side)
	queue  [2][]func()
	sent   [2]int // writes ever queued, and delivered
	landed [2]int
	bell   [2]bool // rung for this side
	rest   [2]bool // asleep
	over   [2]bool // finished
	resume [2]chan bool
	parked chan int
	live   bool // past the set-up: accesses are scheduled
	err    error
}

const (
	hostSide  = 0
	boardSide = 1
)

func newWorld() *world {
	w := &world{parked: make(chan int)}
	for i := range w.mem {
		w.mem[i] = make([]byte, 16384)
		w.resume[i] = make(chan bool)
	}
	return w
}

// pause lets the scheduler choose; a world that is given up ends its sides here.
func (w *world) pause(side int) {
	if !w.live {
		return
	}
	w.parked <- side
	if !<-w.resume[side] {
		runtime.Goexit()
	}
}

func (w *world) deliver(side int) {
	f := w.queue[side][0]
	w.queue[side] = w.queue[side][1:]
	w.landed[side]++
	f()
}

// post sends a write, or a doorbell, across.
func (w *world) post(side int, f func()) {
	if !w.live {
		f()
		return
	}
	w.queue[side] = append(w.queue[side], f)
	w.sent[side]++
}

// port is how one side sees one memory.
type port struct {
	w      *world
	side   int
	memory int
}

func (p port) Barrier(mmio.Barrier) {} // orders a processor, nothing that is on the bus

func (p port) Load(off uint64, width uint) uint64 {
	w := p.w
	w.pause(p.side)
	across := p.memory != p.side
	if across {
		for len(w.queue[p.side]) > 0 {
			w.deliver(p.side)
		}
	}
	b := w.mem[p.memory][off : off+uint64(width)]
	var v uint64
	switch width {
	case 2:
		v = uint64(binary.LittleEndian.Uint16(b))
	case 4:
		v = uint64(binary.LittleEndian.Uint32(b))
	case 8:
		v = binary.LittleEndian.Uint64(b)
	default:
		v = uint64(b[0])
	}
	if across {
		// The completion is under way; what the other side sent before it arrives first.
		upto := w.sent[1-p.side]
		w.pause(p.side)
		for w.landed[1-p.side] < upto {
			w.deliver(1 - p.side)
		}
	}
	return v
}

func (p port) Store(off uint64, width uint, v uint64) {
	p.w.pause(p.side)
	write := func() {
		b := p.w.mem[p.memory][off : off+uint64(width)]
		for i := range b {
			b[i] = byte(v >> (8 * i))
		}
	}
	if p.memory != p.side {
		p.w.post(p.side, write)
		return
	}
	write()
}

// sleep waits for the bell of this side.
func (w *world) sleep(side int) {
	for !w.bell[side] {
		w.rest[side] = true
		w.pause(side)
	}
	w.rest[side] = false
	w.bell[side] = false
}

func (w *world) ring(side int) {
	w.post(side, func() { w.bell[1-side] = true })
}

// placement says where the areas lie, and whether the queues know what lies across.
type placement struct {
	name   string
	push   bool
	honest bool
}

func (w *world) queues(t testing.TB, p placement, event bool) (*vring.SplitDriver, *vring.SplitDevice) {
	rw := dma.DeviceRead | dma.DeviceWrite
	base := [2]dma.Addr{0x100000, 0x200000}
	var regions [2][2]dma.Region // by side, memory
	for side := range regions {
		for m := range regions[side] {
			kind := mmio.Cached
			if m != side {
				kind = mmio.Uncached
			}
			regions[side][m] = dma.Region{Name: fmt.Sprint("memory ", m), Addr: base[m], Access: rw, Across: m != side && p.honest,
				Mem: mmio.NewBusMem(port{w, side, m}, uint64(len(w.mem[m])), kind)}
		}
	}
	const n = 4
	desc, driver, device := vring.SplitSizes(n)
	config := func(side int) vring.Config {
		at := boardSide
		if p.push {
			at = hostSide
		}
		return vring.Config{Name: "world0", Size: n, EventIdx: event,
			Desc:   dma.Span{Region: &regions[side][at], Off: 0, Len: uint32(desc)},
			Driver: dma.Span{Region: &regions[side][at], Off: 1024, Len: uint32(driver)},
			Device: dma.Span{Region: &regions[side][boardSide], Off: 2048, Len: uint32(device)}}
	}
	drv, err := vring.NewSplitDriver(config(boardSide))
	if err != nil {
		t.Fatal(err)
	}
	c := config(hostSide)
	table, err := dma.NewTable(regions[hostSide][0], regions[hostSide][1])
	if err != nil {
		t.Fatal(err)
	}
	c.Table = new(dma.TableRef)
	c.Table.Store(table)
	dev, err := vring.NewSplitDevice(c)
	if err != nil {
		t.Fatal(err)
	}
	return drv, dev
}

// run passes count chains through the world under one schedule, and reports whether it came to
// an end. Both sides sleep whenever there is nothing to do.
func (w *world) run(drv *vring.SplitDriver, dev *vring.SplitDevice, count int, seed uint64) (done bool) {
	random := func(n uint64) uint64 { // xorshift64*
		seed ^= seed >> 12
		seed ^= seed << 25
		seed ^= seed >> 27
		return seed * 0x2545f4914f6cdd1d >> 33 % n
	}
	driver := func() error {
		added, back := 0, 0
		comp := make([]vring.Completion, 4)
		for back < count {
			drv.DisarmCall()
			for {
				moved := false
				if added < count {
					n, err := drv.Add([]vring.Request{{Bufs: []vring.Buffer{{Addr: 0x200000 + 8192, Len: 16}}, Readable: 1, Token: uint32(added)}})
					if err != nil {
						return err
					}
					added += n
					moved = n > 0
					if drv.NeedKick() {
						w.ring(boardSide)
					}
				}
				n, err := drv.Reap(comp)
				if err != nil {
					return err
				}
				for _, c := range comp[:n] {
					if int(c.Token) != back {
						return fmt.Errorf("token %d, want %d", c.Token, back)
					}
					back++
				}
				if !moved && n == 0 {
					break
				}
			}
			if back == count {
				break
			}
			pending, err := drv.ArmCall()
			if err != nil {
				return err
			}
			if !pending {
				w.sleep(boardSide)
			}
		}
		return nil
	}
	device := func() error {
		var b vring.Batch
		for got := 0; got < count; {
			dev.DisarmKick()
			for {
				b.Chains, b.Spans = b.Chains[:0], b.Spans[:0]
				n, err := dev.Pop(&b, 2)
				if err != nil {
					return err
				}
				if n == 0 {
					break
				}
				got += n
				var used []vring.Used
				for _, c := range b.Chains {
					used = append(used, vring.Used{ID: c.ID})
				}
				if err := dev.Complete(used); err != nil {
					return err
				}
				if dev.NeedCall() {
					w.ring(hostSide)
				}
			}
			if got == count {
				break
			}
			pending, err := dev.ArmKick()
			if err != nil {
				return err
			}
			if !pending {
				w.sleep(hostSide)
			}
		}
		return nil
	}
	w.live = true
	for side, body := range []func() error{device, driver} {
		go func() {
			finished := false
			defer func() {
				if finished {
					w.over[side] = true
				}
				w.parked <- side
			}()
			if !<-w.resume[side] {
				return
			}
			if err := body(); err != nil {
				w.err = err
			}
			finished = true
		}()
	}
	// How often writes arrive, and which side is faster, differ from schedule to schedule.
	arrive, bias := 1+random(40), 1+random(9)
	for w.err == nil {
		var can [2]bool
		for s := range can {
			can[s] = !w.over[s] && (!w.rest[s] || w.bell[s])
		}
		queued := len(w.queue[0]) + len(w.queue[1])
		if !can[0] && !can[1] && queued == 0 {
			break
		}
		if queued > 0 && (random(100) < arrive || !can[0] && !can[1]) {
			s := int(random(2))
			if len(w.queue[s]) == 0 {
				s = 1 - s
			}
			w.deliver(s)
			continue
		}
		if !can[0] && !can[1] {
			continue
		}
		s := 0
		if random(10) < bias {
			s = 1
		}
		if !can[s] {
			s = 1 - s
		}
		w.resume[s] <- true
		<-w.parked
	}
	done = w.over[0] && w.over[1]
	for s := range w.over {
		if !w.over[s] {
			w.resume[s] <- false
			<-w.parked
		}
	}
	return done
}

// TestPostedWrites searches schedules for a lost wake-up: both sides sleep, and nothing is
// under way. A queue that does not know what lies across does not read back, and must
// be caught at it with placement push; else the search would be worth nothing.
func TestPostedWrites(t *testing.T) {
	schedules := uint64(5000)
	if testing.Short() || vring.RaceEnabled {
		schedules = 500
	}
	for _, p := range []placement{{"window", false, true}, {"push", true, true}, {"push, no read back", true, false}} {
		for _, event := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/%v", p.name, event), func(t *testing.T) {
				lost := 0
				for seed := uint64(1); seed <= schedules; seed++ {
					w := newWorld()
					drv, dev := w.queues(t, p, event)
					done := w.run(drv, dev, 7, seed*0x9e3779b97f4a7c15)
					if w.err != nil {
						t.Fatalf("schedule %d: %v", seed, w.err)
					}
					if done {
						continue
					}
					lost++
					if p.honest {
						t.Fatalf("schedule %d: lost wake-up; driver %+v %+v, device %+v %+v", seed, drv.State(), drv.Stats().Load(), dev.State(), dev.Stats().Load())
					}
				}
				if !p.honest && lost == 0 {
					t.Errorf("%d schedules, and not one wake-up lost without reading back", schedules)
				}
				t.Logf("%d of %d schedules lost a wake-up", lost, schedules)
			})
		}
	}
}
