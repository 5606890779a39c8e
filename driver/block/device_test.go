package block

import (
	"errors"
	"fmt"
	"sync"
	"testing"

	"go.uber.org/goleak"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/driver"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/vring"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fake is a host's block device, and the Transport to it: requests are executed by the test's goroutine, when and in the order that
// the test wants.
type fake struct {
	t        *testing.T
	features virtio.Features
	config   virtio.BlkConfig
	max      uint16
	disk     []byte // the content, which outlives a fake: the host's file
	serial   string

	mu     sync.Mutex
	status uint32
	acked  virtio.Features
	queues map[int]*fakeQueue
	mems   []*driver.Memory
	reads  uint32 // end of what was read of the configuration
}

type fakeQueue struct {
	size              uint16
	desc, drv, dev    dma.Addr
	q                 *vring.SplitDevice
	kick, call        *doorbell.Eventfd
	table             *dma.TableRef
	batch             vring.Batch
	flushes, segments int
}

// popped is a request that the device has taken.
type popped struct {
	q     *fakeQueue
	chain vring.Chain
	spans []dma.Span
}

func newFake(t *testing.T, disk []byte) *fake {
	f := &fake{t: t, disk: disk, max: 256, serial: "a serial number",
		features: virtio.FeaturesOf(virtio.Version1, virtio.EventIdx, virtio.BlkFlush, virtio.BlkDiscard, virtio.BlkWriteZeroes, virtio.BlkBlkSize),
		config:   virtio.BlkConfig{Capacity: uint64(len(disk)) / 512, BlkSize: 512}, queues: map[int]*fakeQueue{}}
	t.Cleanup(f.close)
	return f
}

func (f *fake) close() {
	for _, q := range f.queues {
		q.kick.Close()
		q.call.Close()
	}
}

func (f *fake) queue(i int) *fakeQueue {
	f.mu.Lock()
	defer f.mu.Unlock()
	q := f.queues[i]
	if q == nil {
		q = &fakeQueue{}
		var err error
		if q.kick, err = doorbell.NewEventfd(); err != nil {
			f.t.Fatal(err)
		}
		if q.call, err = doorbell.NewEventfd(); err != nil {
			f.t.Fatal(err)
		}
		f.queues[i] = q
	}
	return q
}

func (f *fake) Features() (virtio.Features, error) { return f.features, nil }

func (f *fake) SetFeatures(a virtio.Features) error {
	if bad := a.Without(f.features); bad != (virtio.Features{}) {
		f.t.Errorf("the driver accepts %s, which was not offered", bad)
	}
	f.acked = a
	return nil
}

func (f *fake) Config(off, n uint32) ([]byte, error) {
	if n > 40 {
		return nil, errors.New("too much at once")
	}
	if f.reads < off+n {
		f.reads = off + n
	}
	b := f.config.Encode()
	return append([]byte(nil), b[off:off+n]...), nil
}

func (f *fake) WriteConfig(uint32, []byte) error { return errors.New("read-only") }

func (f *fake) SetStatus(s uint32) (uint32, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.status = s
	return s, nil
}

func (f *fake) QueueMax(i int) (uint16, error) { return f.max, nil }

func (f *fake) SetQueue(i int, size uint16, desc, drv, dev dma.Addr) error {
	q := f.queue(i)
	q.size, q.desc, q.drv, q.dev = size, desc, drv, dev
	seen := map[*driver.Memory]bool{}
	var regions []dma.Region
	for _, m := range f.mems {
		if !seen[m] {
			seen[m] = true
			regions = append(regions, *m.Region)
		}
	}
	table, err := dma.NewTable(regions...)
	if err != nil {
		return err
	}
	q.table = new(dma.TableRef)
	q.table.Store(table)
	area := func(a dma.Addr, n uint64, acc dma.Access) dma.Span {
		s, err := table.Translate(nil, a, uint32(n), acc)
		if err != nil || len(s) != 1 {
			f.t.Fatalf("area at %#x: %v, %v", a, s, err)
		}
		return s[0]
	}
	d, r, v := vring.SplitSizes(size)
	q.q, err = vring.NewSplitDevice(vring.Config{Name: "fake", Size: size, Desc: area(desc, d, dma.DeviceRead), Driver: area(drv, r, dma.DeviceRead),
		Device: area(dev, v, dma.DeviceWrite), Table: q.table, EventIdx: f.acked.Has(virtio.EventIdx)})
	return err
}

func (f *fake) Kick(i int) doorbell.Ringer { return f.queue(i).kick }
func (f *fake) Call(i int) doorbell.Waiter { return f.queue(i).call }

// layout returns memory for the driver: near and far bytes, far 0 for placement window.
func (f *fake) layout(near, far int) driver.Layout {
	region := func(name string, addr dma.Addr, n int, a dma.Access) *driver.Memory {
		r := &dma.Region{Name: name, Addr: addr, Mem: mmio.FromBytes(make([]byte, n)), Access: a}
		return &driver.Memory{Region: r, Alloc: dma.NewAllocator(addr, uint64(n))}
	}
	m := driver.Layout{Devices: 1}
	if far == 0 {
		m.Near = region("window", 1<<20, near, dma.DeviceRead|dma.DeviceWrite)
		m.Far = m.Near
	} else { // what the driver is not to mix up: the device may do one thing only
		m.Near, m.Far = region("window", 1<<20, near, dma.DeviceWrite), region("pool", 1<<32, far, dma.DeviceRead)
	}
	f.mems = []*driver.Memory{m.Near, m.Far}
	return m
}

// pop takes all requests that are available.
func (f *fake) pop() (all []popped) {
	f.mu.Lock()
	running := f.status&virtio.StatusDriverOK != 0
	f.mu.Unlock()
	if !running {
		return nil
	}
	for i := 0; i < len(f.queues); i++ {
		q := f.queues[i]
		for q.q != nil {
			q.batch.Chains, q.batch.Spans = q.batch.Chains[:0], q.batch.Spans[:0]
			n, err := q.q.Pop(&q.batch, 16)
			if err != nil {
				f.t.Errorf("the driver breaks the ring: %v", err)
				return all
			}
			if n == 0 {
				if pending, _ := q.q.ArmKick(); !pending {
					break
				}
			}
			for _, c := range q.batch.Chains {
				spans := q.batch.Spans[c.First : c.First+int32(c.Readable)+int32(c.Writable)]
				all = append(all, popped{q: q, chain: c, spans: append([]dma.Span(nil), spans...)})
			}
		}
	}
	return all
}

// gather returns the bytes of spans.
func gather(spans []dma.Span) (all []byte) {
	for _, s := range spans {
		b := make([]byte, s.Len)
		s.CopyOut(b, 0)
		all = append(all, b...)
	}
	return all
}

func scatter(spans []dma.Span, b []byte) {
	for _, s := range spans {
		n := min(int(s.Len), len(b))
		s.CopyIn(0, b[:n])
		b = b[n:]
	}
}

// do executes a request on the disk, and returns its status and how many bytes it wrote before that.
func (f *fake) do(p popped) (status byte, wrote uint32) {
	in := gather(p.spans[:p.chain.Readable])
	out := p.spans[p.chain.Readable:]
	if len(in) < virtio.BlkHeaderLen || p.chain.WriteLen < 1 || out[len(out)-1].Len != 1 {
		f.t.Errorf("a request of %d bytes to read and %d to write", len(in), p.chain.WriteLen)
		return virtio.BlkIOErr, 0
	}
	h := virtio.DecodeBlkHeader(in)
	data := in[virtio.BlkHeaderLen:]
	from := h.Sector * 512
	n := uint64(p.chain.WriteLen - 1)
	switch h.Type {
	case virtio.BlkTIn:
		if from+n > uint64(len(f.disk)) {
			f.t.Errorf("a read of %d bytes at %d", n, from)
			return virtio.BlkIOErr, 0
		}
		scatter(out, f.disk[from:from+n])
		return virtio.BlkOK, uint32(n)
	case virtio.BlkTOut:
		if from+uint64(len(data)) > uint64(len(f.disk)) {
			f.t.Errorf("a write of %d bytes at %d", len(data), from)
			return virtio.BlkIOErr, 0
		}
		copy(f.disk[from:], data)
	case virtio.BlkTFlush:
		p.q.flushes++
	case virtio.BlkTGetID:
		b := make([]byte, virtio.BlkIDLen)
		copy(b, f.serial)
		scatter(out, b)
		return virtio.BlkOK, virtio.BlkIDLen
	case virtio.BlkTDiscard, virtio.BlkTWriteZeroes:
		if len(data) != virtio.BlkSegmentLen {
			f.t.Errorf("a segment of %d bytes", len(data))
			return virtio.BlkUnsupp, 0
		}
		s := virtio.DecodeBlkSegment(data)
		max := f.config.MaxDiscard
		if h.Type == virtio.BlkTWriteZeroes {
			max = f.config.MaxZeroes
		}
		if max != 0 && s.Sectors > max || s.Sectors == 0 || (s.Sector+uint64(s.Sectors))*512 > uint64(len(f.disk)) {
			f.t.Errorf("a segment of %d sectors at %d", s.Sectors, s.Sector)
			return virtio.BlkUnsupp, 0
		}
		p.q.segments++
		clear(f.disk[s.Sector*512 : (s.Sector+uint64(s.Sectors))*512])
	default:
		return virtio.BlkUnsupp, 0
	}
	return virtio.BlkOK, 0
}

// answer completes a request.
func (f *fake) answer(p popped, status byte, wrote uint32) {
	last := p.spans[len(p.spans)-1]
	last.CopyIn(0, []byte{status})
	f.complete(p, wrote+1)
}

func (f *fake) complete(p popped, n uint32) {
	if err := p.q.q.Complete([]vring.Used{{ID: p.chain.ID, Count: p.chain.Count, Len: n}}); err != nil {
		f.t.Error(err)
	}
	if p.q.q.NeedCall() {
		p.q.call.Ring()
	}
}

// serve executes what comes, until stop is closed.
func (f *fake) serve() (stop func()) {
	quit, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-quit:
				return
			default:
			}
			for _, p := range f.pop() {
				f.execute(p)
			}
			f.wait()
		}
	}()
	return func() { close(quit); <-done }
}

// execute executes a request and answers it.
func (f *fake) execute(p popped) {
	status, wrote := f.do(p)
	f.answer(p, status, wrote)
}

// wait waits until queue 0 is kicked, or a moment.
func (f *fake) wait() {
	s := doorbell.NewSleeper(doorbell.SleeperConfig{Doorbell: f.queue(0).kick})
	s.Sleep(0)
}

// owner collects what has ended.
type owner struct {
	mu      sync.Mutex
	flushed int
	c       chan *Request
}

func newOwner() *owner { return &owner{c: make(chan *Request, 4096)} }

func (o *owner) Done(r *Request) { o.c <- r }
func (o *owner) Flush() {
	o.mu.Lock()
	o.flushed++
	o.mu.Unlock()
}

// do submits a request and waits for its end.
func do(d *Disk, r Request) ([]byte, error) {
	o := newOwner()
	r.Owner = o
	d.Submit(&r)
	<-o.c
	return r.Data, r.Err
}

func mustBe(t *testing.T, what string, got, want interface{}) {
	t.Helper()
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("%s: %v, want %v", what, got, want)
	}
}
