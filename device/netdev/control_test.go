package netdev

import (
	"bytes"
	"errors"
	"testing"
	"time"
	"unsafe"

	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/tunbridge"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/vring"
)

// controlRig is a control queue with both sides in one memory.
type controlRig struct {
	t      testing.TB
	mem    []byte
	region *dma.Region
	drv    vring.Driver
	c      *control
	set    []int // what was asked for
	setErr error
}

const (
	controlQueue = 16
	controlMax   = 4      // pairs
	controlCmd   = 0x4000 // where the command lies
	controlAck   = 0x6000 // what is writable
	controlSize  = 0x8000
)

func newControlRig(t testing.TB, packed bool) *controlRig {
	r := &controlRig{t: t, mem: make([]byte, controlSize)}
	r.region = &dma.Region{Name: "test", Addr: 0x10000, Mem: mmio.FromBytes(r.mem), Access: dma.DeviceRead | dma.DeviceWrite}
	span := func(off uint64, n uint64) dma.Span { return dma.Span{Region: r.region, Off: off, Len: uint32(n)} }
	table, err := dma.NewTable(*r.region)
	if err != nil {
		t.Fatal(err)
	}
	var ref dma.TableRef
	ref.Store(table)
	c := vring.Config{Name: "test", Size: controlQueue, Desc: span(0, 16*controlQueue), Driver: span(0x1000, 6+2*controlQueue), Device: span(0x2000, 6+8*controlQueue)}
	dc := c
	dc.Table = &ref
	var dev vring.Device
	if packed {
		r.drv, err = vring.NewPackedDriver(c)
	} else {
		r.drv, err = vring.NewSplitDriver(c)
	}
	if err == nil {
		dev, err = newDeviceQueue(dc, packed)
	}
	if err != nil {
		t.Fatal(err)
	}
	stop, err := tunbridge.NewStop()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop.Close() })
	r.c = &control{name: "test ctrl", stop: stop, q: dev, max: controlMax, n: new(controlCounters), call: board.Silent, set: func(n int) error {
		if r.setErr == nil {
			r.set = append(r.set, n)
		}
		return r.setErr
	}}
	return r
}

// command sends a command in pieces of the given lengths and serves it. ack is what came back, of as many bytes as may be
// written.
func (r *controlRig) command(cmd []byte, cuts []int, ackLen int) (ack []byte, err error) {
	copy(r.mem[controlCmd:], cmd)
	for i := range r.mem[controlAck:] {
		r.mem[controlAck+i] = 0xee
	}
	req := vring.Request{Readable: len(cuts)}
	off := 0
	for _, n := range cuts {
		req.Bufs = append(req.Bufs, vring.Buffer{Addr: r.region.Addr + controlCmd + dma.Addr(off), Len: uint32(n)})
		off += n
	}
	if ackLen > 0 {
		req.Bufs = append(req.Bufs, vring.Buffer{Addr: r.region.Addr + controlAck, Len: uint32(ackLen)})
	}
	if n, err := r.drv.Add([]vring.Request{req}); n != 1 || err != nil {
		r.t.Fatalf("added %d: %v", n, err)
	}
	var b vring.Batch
	if n, err := r.c.q.Pop(&b, 1); n != 1 || err != nil {
		r.t.Fatalf("popped %d: %v", n, err)
	}
	if err := r.c.serve(&b, &b.Chains[0]); err != nil {
		return nil, err
	}
	var done [1]vring.Completion
	if n, err := r.drv.Reap(done[:]); n != 1 || err != nil || done[0].Len != 1 {
		r.t.Fatalf("reaped %d, %d bytes: %v", n, done[0].Len, err)
	}
	return r.mem[controlAck : controlAck+ackLen], nil
}

// check sends a command and compares the answer with what the specification says.
func (r *controlRig) check(cmd []byte, cuts []int, ackLen int) {
	r.t.Helper()
	want, pairs := virtio.NetCtrlErr, 0
	if len(cmd) == 4 && cmd[0] == 4 && cmd[1] == 0 {
		if pairs = int(cmd[2]) + 256*int(cmd[3]); pairs >= 1 && pairs <= controlMax && r.setErr == nil {
			want = virtio.NetCtrlOK
		}
	}
	was, calls := r.c.inUse, len(r.set)
	ack, err := r.command(cmd, cuts, ackLen)
	if ackLen == 0 {
		if !errors.Is(err, errNoAck) {
			r.t.Fatalf("a command without room for an acknowledgement: %v", err)
		}
		want = virtio.NetCtrlErr
	} else if err != nil {
		r.t.Fatal(err)
	} else {
		if ack[0] != want {
			r.t.Errorf("% x in pieces of %v: acknowledged with %d, want %d", cmd, cuts, ack[0], want)
		}
		if rest := ack[1:]; !bytes.Equal(rest, bytes.Repeat([]byte{0xee}, len(rest))) {
			r.t.Error("more than the acknowledgement was written")
		}
	}
	if !bytes.Equal(r.mem[controlCmd:controlCmd+len(cmd)], cmd) {
		r.t.Error("the command was written")
	}
	if want == virtio.NetCtrlOK {
		if r.c.inUse != pairs || (len(r.set) == calls) != (was == pairs) || len(r.set) > calls && r.set[calls] != pairs {
			r.t.Errorf("%d pairs asked for, %v were set", pairs, r.set[calls:])
		}
	} else if r.c.inUse != was || len(r.set) != calls {
		r.t.Errorf("a command that was refused set %v", r.set[calls:])
	}
}

func TestControl(t *testing.T) {
	for _, packed := range []bool{false, true} {
		r := newControlRig(t, packed)
		pairs := func(n uint16) []byte { b := virtio.EncodeNetCtrlPairs(n); return b[:] }
		for _, cuts := range [][]int{{4}, {2, 2}, {1, 1, 1, 1}, {3, 1}} { // framing is the driver's (virtio 1.2, 2.6.4)
			r.check(pairs(3), cuts, 1)
			r.check(pairs(1), cuts, 5)
		}
		for _, n := range []uint16{0, controlMax, controlMax + 1, 0x100 + controlMax, 0xffff, 2} {
			r.check(pairs(n), []int{4}, 1)
		}
		r.check([]byte{4}, []int{1}, 1)
		r.check([]byte{4, 0}, []int{1, 1}, 1)
		r.check([]byte{4, 0, 1}, []int{3}, 1)
		r.check([]byte{4, 0, 1, 0, 0}, []int{4, 1}, 1)
		r.check(append(pairs(1), make([]byte, 4096)...), []int{2, 4098}, 1)
		r.check([]byte{4, 1, 1, 0}, []int{4}, 1)
		r.check([]byte{0, 0, 1}, []int{3}, 1)    // promiscuous: not ours
		r.check([]byte{255, 255}, []int{2}, 256) //
		r.check(nil, nil, 1)                     // nothing to read
		if n := r.c.n.load(); n.ControlCommands == 0 || n.ControlRefused == 0 {
			t.Errorf("%+v", n)
		}
		r.setErr = errors.New("the kernel does not want to")
		r.check(pairs(3), []int{4}, 1)
		r.setErr = nil
		r.check(pairs(3), []int{4}, 1)
		r.check(pairs(1), []int{4}, 0) // last: the queue is out of step
	}
}

// TestControlPace: a driver that changes the number of pairs without end gets a bounded number of changes.
func TestControlPace(t *testing.T) {
	r := newControlRig(t, false)
	begin := time.Now()
	for i := range controlBurst + 4 {
		b := virtio.EncodeNetCtrlPairs(uint16(1 + i%2))
		r.check(b[:], []int{4}, 1)
	}
	if d := time.Since(begin); len(r.set) != controlBurst+4 || d < 4*controlPace {
		t.Errorf("%d changes in %v, %d at once and one each %v are allowed", len(r.set), d, controlBurst, controlPace)
	}
}

// FuzzControl serves commands of any bytes and framing, and compares with the specification.
func FuzzControl(f *testing.F) {
	f.Add([]byte{4, 0, 2, 0}, []byte{4}, byte(1), false)
	f.Add([]byte{4, 0, 0, 0}, []byte{1, 1, 2}, byte(1), true)
	f.Add([]byte{4, 0, 5, 0}, []byte{2, 2}, byte(9), false)
	f.Add([]byte{4, 0, 1, 0, 7, 7}, []byte{3, 3}, byte(1), true)
	f.Add([]byte{4, 1, 1, 0}, []byte{4}, byte(0), false)
	f.Add([]byte{4}, []byte{}, byte(1), false)
	f.Add([]byte{}, []byte{}, byte(1), true)
	f.Fuzz(func(t *testing.T, cmd, lengths []byte, ackLen byte, packed bool) {
		if len(cmd) > controlAck-controlCmd || len(cmd) == 0 && ackLen == 0 {
			return // no chain of this rig
		}
		var cuts []int
		left := len(cmd)
		for _, n := range lengths {
			if n == 0 || int(n) >= left || len(cuts) == controlQueue-3 {
				break
			}
			cuts = append(cuts, int(n))
			left -= int(n)
		}
		if left > 0 {
			cuts = append(cuts, left)
		}
		newControlRig(t, packed).check(cmd, cuts, int(ackLen))
	})
}

// TestAlignment: 32-bit machines count 64 bits at multiples of 8 bytes only, and promise these for the first word of an allocation
// alone (sync/atomic, "Bugs"). A driver's command would end the host there.
func TestAlignment(t *testing.T) {
	if off := unsafe.Offsetof(Net{}.ctl); off != 0 {
		t.Errorf("the counters of the control queue lie at offset %d of Net, they have to come first", off)
	}
}
