//go:build linux

// Package ringbench measures virtqueues between two processes: the driver side in this one, the device side in
// one that it starts, over shared memory, each on a processor of its own.
//
// In the room: the processes, the loops of both sides, what is measured. Never in it: payload
// (buffers are not touched), interfaces, printing.
package ringbench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/boardlink/boardlink/bench/benchkit"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/vring"
	"golang.org/x/sys/unix"
)

// Config says what to measure. The zero value of a field stands for its default.
type Config struct {
	// Peer is the command that becomes the other side (benchkit.Peer). Default: this program.
	Peer []string `json:"-"`
	// Ring is "split" (default) or "packed".
	Ring string
	// Placement is "local" (default): all memory is near both sides, as between processes of one machine, and
	// nothing is counted. "window" and "push" are those of a board: what lies across is accounted, and
	// taken by the paths for it.
	Placement string
	// Memory is how the device side sees memory across: "cached" (default), "write-combining" or "uncached".
	Memory      string
	Size        int  // descriptors; default 256
	Batch       int  // buffers that either side moves at once; default 64
	Outstanding int  // buffers under way at most; default Size
	Sleep       bool // sleep on eventfds when there is nothing to do; else poll
	Spins       int  // with Sleep: polls in vain before; default 200
	EventIdx    bool // the event index is negotiated
	InOrder     bool // VIRTIO_F_IN_ORDER is
	// Write makes the buffers writable, and the device fill each to a length of its own, as frames are received; else they are
	// read, as frames are sent.
	Write bool
	// Buffers of one run; default 100000. Runs: default 31: many short ones, so that other programs do not disturb all.
	Buffers int
	Runs    int
	// CPU are the processors of driver and device side, -1 does not pin; nil are the first two that this process may use.
	CPU []int
}

// Result is what was measured.
type Result struct {
	Ring        string `json:"ring"`
	Placement   string `json:"placement"`
	Memory      string `json:"memory"`
	Size        int    `json:"size"`
	Batch       int    `json:"batch"`
	Outstanding int    `json:"outstanding"`
	Sleep       bool   `json:"sleep"`
	EventIdx    bool   `json:"event_idx"`
	InOrder     bool   `json:"in_order"`
	Write       bool   `json:"write"`
	Buffers     int    `json:"buffers"`
	CPU         []int  `json:"cpu"`
	// NS is the time for a buffer, there and back, RoundTripNS that of a cache line between the two processors, measured around
	// each run; Ratio is the first in units of the second, run by run. All are medians; Best is the fastest run in units of the median round trip:
	// what remains where other programs disturb most runs.
	NS          float64  `json:"ns_per_buffer"`
	RoundTripNS float64  `json:"round_trip_ns"`
	Ratio       float64  `json:"round_trips_per_buffer"`
	Best        float64  `json:"best_round_trips_per_buffer"`
	Runs        []Sample `json:"runs"`
	// Each buffer's accesses across the bus, of the two sides, over all runs.
	Driver Bus `json:"driver_bus"`
	Device Bus `json:"device_bus"`
	// Idle is how often a side looked for each buffer and found nothing: polling, each look across the bus is a read
	// that is counted above.
	Idle float64 `json:"idle_polls_per_buffer"`
	// InVain is how many of the reads across were such looks: what is left without them does not depend on who waits for whom.
	InVain float64 `json:"reads_in_vain"`
	// With Sleep, how often each side slept for each buffer, and rang.
	Sleeps float64 `json:"sleeps_per_buffer"`
	Rings  float64 `json:"rings_per_buffer"`
	Lost   uint64  `json:"lost_wakeups"` // found by a time-out of a second: a defect
}

// Sample is one of the runs.
type Sample struct {
	NS          float64 `json:"ns_per_buffer"`
	RoundTripNS float64 `json:"round_trip_ns"`
}

// Bus is what went across, for each buffer.
type Bus struct {
	Reads      float64 `json:"reads"`
	Writes     float64 `json:"writes"`
	ReadBytes  float64 `json:"read_bytes"`
	WriteBytes float64 `json:"write_bytes"`
	FlushReads float64 `json:"flush_reads"`
	// Areas is the same, by area: "descriptor", "driver", "device". There is no payload.
	Areas map[string]Bus `json:"areas,omitempty"`
}

// Both memories lie in one file: the board's, then the host's, each with a link address.
const (
	memSize            = 8 << 20
	boardBase dma.Addr = 0x1000_0000
	hostBase  dma.Addr = 0x9_0000_0000
	offDesc            = 4096 // of the board's: behind the round trip's line
	offDriver          = offDesc + 32768*16
	offDevice          = offDriver + 1<<17
	offData            = 2 << 20

	pingRounds = 2000
	patience   = 30 * time.Second
)

func (c *Config) defaults() error {
	set := func(p *int, v int) {
		if *p == 0 {
			*p = v
		}
	}
	if c.Ring == "" {
		c.Ring = "split"
	}
	if c.Placement == "" {
		c.Placement = "local"
	}
	if c.Memory == "" {
		c.Memory = "cached"
	}
	set(&c.Size, 256)
	set(&c.Batch, 64)
	set(&c.Outstanding, c.Size)
	set(&c.Runs, 31)
	set(&c.Buffers, 100000)
	set(&c.Spins, 200)
	switch {
	case c.Ring != "split" && c.Ring != "packed":
		return fmt.Errorf("ring %q: split or packed", c.Ring)
	case c.Placement != "local" && c.Placement != "window" && c.Placement != "push":
		return fmt.Errorf("placement %q: local, window or push", c.Placement)
	case c.Memory != "cached" && c.Memory != "write-combining" && c.Memory != "uncached":
		return fmt.Errorf("memory %q: cached, write-combining or uncached", c.Memory)
	case c.Size < 1 || c.Size > vring.MaxSize || c.Ring == "split" && c.Size&(c.Size-1) != 0:
		return fmt.Errorf("size %d: 1 to %d, and of a split ring a power of two", c.Size, vring.MaxSize)
	case c.Batch < 1 || c.Batch > c.Size:
		return fmt.Errorf("batch %d: 1 to the size of the ring (%d)", c.Batch, c.Size)
	case c.Outstanding < c.Batch || c.Outstanding > c.Size:
		return fmt.Errorf("%d outstanding: from a batch (%d) to the size of the ring (%d)", c.Outstanding, c.Batch, c.Size)
	case c.Runs < 1 || c.Buffers < c.Batch:
		return fmt.Errorf("%d runs of %d buffers: one at least, of a batch (%d) at least", c.Runs, c.Buffers, c.Batch)
	}
	if c.CPU != nil && len(c.CPU) != 2 {
		return fmt.Errorf("processors %v: two, of the driver and of the device side", c.CPU)
	}
	c.Buffers -= c.Buffers % c.Batch
	if c.CPU == nil {
		cpus, err := benchkit.CPUs()
		if err != nil {
			return err
		}
		if len(cpus) < 2 {
			return errors.New("two processors are needed: the sides poll")
		}
		c.CPU = []int{cpus[0], cpus[1]}
	}
	return nil
}

// frames is how many different buffers there are, length the bytes of one.
const frames = 65521

func length(i int) uint32 { return 60 + uint32(i*37%1440) }

// side is one process' view: its regions, its queue's configuration.
type side struct {
	c        *Config
	mem      []byte
	kick     int // eventfds
	call     int
	line     *benchkit.Line
	bus      *dma.QueueAccount
	queue    vring.Config
	deadline time.Time
	gone     atomic.Bool // the peer
	buffer   dma.Addr    // where the buffers lie

	sleeps, rings uint64
	lost, idle    uint64

	// What the loops work with is here, not made by each run: its first touch takes longer than all buffers.
	reqs  []vring.Request
	done  []vring.Completion
	bufs  []vring.Buffer
	batch vring.Batch
	used  []vring.Used
}

func newSide(c *Config, device bool, memfd, kick, call int) (*side, error) {
	b, err := unix.Mmap(memfd, 0, 2*memSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return nil, fmt.Errorf("mmap: %w", err)
	}
	s := &side{c: c, mem: b, kick: kick, call: call, bus: new(dma.QueueAccount), deadline: time.Now().Add(patience)}
	ram, _ := mmio.FromBytes(b[:benchkit.LineBytes]).RAM()
	s.line = benchkit.NewLine(ram, !device)
	s.line.Late = s.late
	kind := map[string]mmio.Kind{"cached": mmio.Cached, "write-combining": mmio.WriteCombining, "uncached": mmio.Uncached}[c.Memory]
	region := func(name string, addr dma.Addr, off int, across bool) *dma.Region {
		r := &dma.Region{Name: name, Addr: addr, Access: dma.DeviceRead | dma.DeviceWrite}
		k := mmio.Cached
		if across {
			r.Across, r.Account, k = true, new(dma.Account), kind // the areas have accounts of their own
		}
		r.Mem = mmio.NewMem(unsafe.Pointer(&b[off]), memSize, k)
		return r
	}
	local := c.Placement == "local"
	board := region("board", boardBase, 0, device && !local)
	host := region("host", hostBase, memSize, !device && !local)
	far := board
	s.buffer = boardBase + offData
	if c.Placement == "push" {
		far = host
		s.buffer = hostBase + offData
	}
	sizes := vring.SplitSizes
	if c.Ring == "packed" {
		sizes = vring.PackedSizes
	}
	desc, driver, dev := sizes(uint16(c.Size))
	s.queue = vring.Config{Name: "bench", Size: uint16(c.Size), EventIdx: c.EventIdx, InOrder: c.InOrder,
		Desc:   dma.Span{Region: far, Off: offDesc, Len: uint32(desc)}.Accounted(&s.bus.Descriptor),
		Driver: dma.Span{Region: far, Off: offDriver, Len: uint32(driver)}.Accounted(&s.bus.Driver),
		Device: dma.Span{Region: board, Off: offDevice, Len: uint32(dev)}.Accounted(&s.bus.Device)}
	if !device {
		s.reqs, s.done = make([]vring.Request, c.Batch), make([]vring.Completion, c.Batch)
		// As frames that are sent: no descriptor is what it was one lap ago, so that what rings save by not
		// writing what does not change is not measured. Their number is prime.
		s.bufs = make([]vring.Buffer, frames)
		for i := range s.bufs {
			s.bufs[i] = vring.Buffer{Addr: s.buffer + dma.Addr(i*64), Len: length(i)}
		}
	} else {
		s.used = make([]vring.Used, 0, c.Batch)
		t, err := dma.NewTable(*board, *host)
		if err != nil {
			return nil, err
		}
		s.queue.Table = new(dma.TableRef)
		s.queue.Table.Store(t)
	}
	return s, nil
}

func (s *side) close() error { return unix.Munmap(s.mem) }

var errPatience = errors.New("the other side does not answer")

// late is asked now and then by whoever waits.
func (s *side) late() error {
	if s.gone.Load() || time.Now().After(s.deadline) {
		return errPatience
	}
	return nil
}

func (s *side) ring(fd int) error {
	one := [8]byte{1} // whatever the byte order: not 0
	_, err := unix.Write(fd, one[:])
	s.rings++
	return err
}

func (s *side) wait(fd int) error {
	s.sleeps++
	for {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, 1000)
		if n > 0 {
			var b [8]byte
			_, err = unix.Read(fd, b[:])
			return err
		}
		if err == nil {
			s.lost++
			return s.late()
		}
		if err != unix.EINTR {
			return err
		}
	}
}

func (s *side) driver(q vring.Driver) error {
	c := s.c
	reqs, done, bufs := s.reqs, s.done, s.bufs
	readable := 1
	if c.Write {
		readable = 0
	}
	added, back, at, idle := 0, 0, 0, 0
	for back < c.Buffers {
		busy := false
		if added < c.Buffers && added-back+c.Batch <= c.Outstanding {
			for i := range reqs {
				reqs[i].Bufs, reqs[i].Readable = bufs[at:at+1:at+1], readable
				if at++; at == len(bufs) {
					at = 0
				}
			}
			n, err := q.Add(reqs)
			if err != nil {
				return err
			}
			if n != len(reqs) {
				return fmt.Errorf("%d of %d buffers fit", n, len(reqs))
			}
			added += n
			busy = true
			if q.NeedKick() {
				if err := s.ring(s.kick); err != nil {
					return err
				}
			}
		}
		n, err := q.Reap(done)
		if err != nil {
			return err
		}
		back += n
		if busy || n > 0 {
			idle = 0
			continue
		}
		idle++
		if idle&(1<<18-1) == 0 {
			if err := s.late(); err != nil {
				return err
			}
		}
		if !c.Sleep || idle < c.Spins {
			relax()
			continue
		}
		idle = 0
		pending, err := q.ArmCall()
		if err != nil {
			return err
		}
		if !pending {
			if err := s.wait(s.call); err != nil {
				return err
			}
		}
		q.DisarmCall()
	}
	return nil
}

func (s *side) device(q vring.Device) error {
	c := s.c
	b, used := &s.batch, s.used
	idle := 0
	for got := 0; got < c.Buffers; {
		b.Chains, b.Spans, used = b.Chains[:0], b.Spans[:0], used[:0]
		n, err := q.Pop(b, c.Batch)
		if err != nil {
			return err
		}
		if n > 0 {
			idle = 0
			got += n
			for i := range b.Chains {
				ch := &b.Chains[i]
				u := vring.Used{ID: ch.ID, Count: ch.Count}
				if ch.WriteLen != 0 {
					u.Len = ch.WriteLen - 1
				}
				used = append(used, u)
			}
			if err := q.Complete(used); err != nil {
				return err
			}
			if q.NeedCall() {
				if err := s.ring(s.call); err != nil {
					return err
				}
			}
			continue
		}
		idle++
		if idle&(1<<18-1) == 0 {
			if err := s.late(); err != nil {
				return err
			}
		}
		if !c.Sleep || idle < c.Spins {
			relax()
			continue
		}
		idle = 0
		pending, err := q.ArmKick()
		if err != nil {
			return err
		}
		if !pending {
			if err := s.wait(s.kick); err != nil {
				return err
			}
		}
		q.DisarmKick()
	}
	return nil
}

// pace is how often relax reads a word of its own.
const pace = 16

var idleWord uint64

// relax lets a moment pass between two looks, so that the line is not taken from who writes it.
func relax() {
	for i := 0; i < pace; i++ {
		mmio.Load64(unsafe.Pointer(&idleWord))
	}
}

// told is what the peer reports.
type told struct {
	Bus           dma.QueueAccount
	Sleeps, Rings uint64
	Lost, Idle    uint64
}

func init() {
	// The device side's process. Its files: memory, kick, call.
	benchkit.Register("ring", func(order []byte) (any, error) {
		var c Config
		if err := json.Unmarshal(order, &c); err != nil {
			return nil, err
		}
		var t told
		return &t, serve(&c, &t)
	})
}

func serve(c *Config, t *told) error {
	unpin, err := benchkit.Pin(c.CPU[1])
	if err != nil {
		return err
	}
	defer unpin()
	s, err := newSide(c, true, benchkit.FirstFD, benchkit.FirstFD+1, benchkit.FirstFD+2)
	if err != nil {
		return err
	}
	defer s.close()
	// The driver side sets up the ring; the first round trip says that it has.
	if _, err := s.line.RoundTrips(pingRounds); err != nil {
		return err
	}
	var q vring.Device
	if c.Ring == "packed" {
		q, err = vring.NewPackedDevice(s.queue)
	} else {
		q, err = vring.NewSplitDevice(s.queue)
	}
	if err != nil {
		return err
	}
	q.DisarmKick()
	for i := 0; i <= c.Runs; i++ { // the first one warms up
		s.deadline = time.Now().Add(patience)
		if _, err := s.line.RoundTrips(pingRounds); err != nil {
			return err
		}
		if i == 1 {
			s.start(q.Stats())
		}
		if err := s.device(q); err != nil {
			return err
		}
		if _, err := s.line.RoundTrips(pingRounds); err != nil {
			return err
		}
	}
	t.Bus, t.Sleeps, t.Rings, t.Lost, t.Idle = *s.bus, s.sleeps, s.rings, s.lost, idle(q.Stats())-s.idle
	return nil
}

// start forgets what was counted while warming up. Nobody else counts meanwhile.
func (s *side) start(q *vring.Stats) {
	s.sleeps, s.rings, s.idle = 0, 0, idle(q)
	*s.bus = dma.QueueAccount{}
}

// idle returns how often a side has looked in vain.
func idle(q *vring.Stats) uint64 {
	c := q.Load()
	return c.IndexReads - c.IndexMoved
}

// Check returns what is wrong with c, nil where nothing is.
func (c Config) Check() error { return c.defaults() }

// Run measures. Errors name what is wrong with cfg, or with the machine.
func Run(ctx context.Context, cfg Config) (*Result, error) {
	c := cfg
	if err := c.defaults(); err != nil {
		return nil, err
	}
	fd, err := unix.MemfdCreate("ringbench", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memfd_create: %w", err)
	}
	files := []*os.File{os.NewFile(uintptr(fd), "memory")}
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	if err := files[0].Truncate(2 * memSize); err != nil {
		return nil, err
	}
	for i := 0; i < 2; i++ {
		e, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
		if err != nil {
			return nil, fmt.Errorf("eventfd: %w", err)
		}
		files = append(files, os.NewFile(uintptr(e), "eventfd"))
	}
	s, err := newSide(&c, false, fd, int(files[1].Fd()), int(files[2].Fd()))
	if err != nil {
		return nil, err
	}
	defer s.close()
	r := &Result{Ring: c.Ring, Placement: c.Placement, Memory: c.Memory, Size: c.Size, Batch: c.Batch, Outstanding: c.Outstanding,
		Sleep: c.Sleep, EventIdx: c.EventIdx, InOrder: c.InOrder, Write: c.Write, Buffers: c.Buffers, CPU: c.CPU}
	p, err := benchkit.Start(ctx, "ring", &c, files, c.Peer)
	if err != nil {
		return nil, err
	}
	defer p.Stop()
	result := make(chan error, 1)
	go func() { result <- r.lead(&c, s) }()
	var t told
	select {
	case err = <-result:
		if err != nil {
			p.Stop()
			err = fmt.Errorf("driver side: %w", err)
		} else if err = p.Wait(&t); err != nil {
			err = fmt.Errorf("device side: %w", err)
		}
	case <-p.Gone():
		// This side may still be behind the last round trip, or wait for ever.
		if err = p.Wait(&t); err != nil {
			err = fmt.Errorf("device side: %w", err)
			s.gone.Store(true)
		}
		if lerr := <-result; err == nil && lerr != nil {
			err = fmt.Errorf("driver side: %w", lerr)
		}
	}
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	if err != nil {
		return nil, err
	}
	n := float64(c.Buffers) * float64(c.Runs)
	r.Device = perQueue(&t.Bus, n)
	r.Sleeps = (r.Sleeps + float64(t.Sleeps)) / n
	r.Rings = (r.Rings + float64(t.Rings)) / n
	switch {
	case c.Placement == "window":
		r.InVain = float64(t.Idle) / n // the device side looks across
	case c.Placement == "push" && c.Ring == "packed":
		r.InVain = r.Idle / n // the driver side
	}
	r.Idle = (r.Idle + float64(t.Idle)) / n
	r.Lost += t.Lost
	return r, nil
}

// lead is the driver side.
func (r *Result) lead(c *Config, s *side) error {
	unpin, err := benchkit.Pin(c.CPU[0])
	if err != nil {
		return err
	}
	defer unpin()
	var q vring.Driver
	if c.Ring == "packed" {
		q, err = vring.NewPackedDriver(s.queue)
	} else {
		q, err = vring.NewSplitDriver(s.queue)
	}
	if err != nil {
		return err
	}
	if _, err := s.line.RoundTrips(pingRounds); err != nil {
		return err
	}
	q.DisarmCall()
	for i := 0; i <= c.Runs; i++ { // the first one warms up
		s.deadline = time.Now().Add(patience)
		before, err := s.line.RoundTrips(pingRounds)
		if err != nil {
			return err
		}
		if i == 1 {
			s.start(q.Stats())
		}
		start := time.Now()
		if err := s.driver(q); err != nil {
			return err
		}
		took := float64(time.Since(start).Nanoseconds()) / float64(c.Buffers)
		after, err := s.line.RoundTrips(pingRounds)
		if err != nil {
			return err
		}
		if i == 0 {
			continue
		}
		rt := before // the one that was disturbed less
		if after < rt {
			rt = after
		}
		r.Runs = append(r.Runs, Sample{took, rt})
	}
	r.summarise()
	r.Driver = perQueue(s.bus, float64(c.Buffers)*float64(c.Runs))
	r.Sleeps, r.Rings, r.Lost = float64(s.sleeps), float64(s.rings), s.lost
	r.Idle = float64(idle(q.Stats()) - s.idle)
	return nil
}

func perQueue(a *dma.QueueAccount, n float64) Bus {
	b := Bus{Areas: make(map[string]Bus)}
	for name, acc := range map[string]dma.Account{"descriptor": a.Descriptor, "driver": a.Driver, "device": a.Device} {
		p := perBuffer(acc, n)
		b.Areas[name] = p
		b.Reads += p.Reads
		b.Writes += p.Writes
		b.ReadBytes += p.ReadBytes
		b.WriteBytes += p.WriteBytes
		b.FlushReads += p.FlushReads
	}
	return b
}

// summarise takes the medians from the runs.
func (r *Result) summarise() {
	var ns, trip, ratio []float64
	for _, s := range r.Runs {
		ns, trip, ratio = append(ns, s.NS), append(trip, s.RoundTripNS), append(ratio, s.NS/s.RoundTripNS)
	}
	r.NS, r.RoundTripNS, r.Ratio = benchkit.Median(ns), benchkit.Median(trip), benchkit.Median(ratio)
	r.Best = slices.Min(ns) / r.RoundTripNS
}

// Add takes the runs of another measurement with the same configuration into r: those that were made in turns with others.
func (r *Result) Add(o *Result) {
	a, b := float64(len(r.Runs)*r.Buffers), float64(len(o.Runs)*o.Buffers)
	mean := func(p *float64, v float64) { *p = (*p*a + v*b) / (a + b) }
	bus := func(to *Bus, from Bus) {
		mean(&to.Reads, from.Reads)
		mean(&to.Writes, from.Writes)
		mean(&to.ReadBytes, from.ReadBytes)
		mean(&to.WriteBytes, from.WriteBytes)
		mean(&to.FlushReads, from.FlushReads)
	}
	for _, d := range []struct{ to, from *Bus }{{&r.Driver, &o.Driver}, {&r.Device, &o.Device}} {
		bus(d.to, *d.from)
		for name, area := range d.to.Areas {
			bus(&area, d.from.Areas[name])
			d.to.Areas[name] = area
		}
	}
	mean(&r.Idle, o.Idle)
	mean(&r.InVain, o.InVain)
	mean(&r.Sleeps, o.Sleeps)
	mean(&r.Rings, o.Rings)
	r.Lost += o.Lost
	r.Runs = append(r.Runs, o.Runs...)
	r.summarise()
}

func perBuffer(a dma.Account, n float64) Bus {
	return Bus{Reads: float64(a.Reads) / n, Writes: float64(a.Writes) / n, ReadBytes: float64(a.ReadBytes) / n,
		WriteBytes: float64(a.WriteBytes) / n, FlushReads: float64(a.FlushReads) / n}
}

// String is the result in a line.
func (r *Result) String() string {
	how := "polling"
	if r.Sleep {
		how = "sleeping"
	}
	if r.InOrder {
		how += ", in order"
	}
	return fmt.Sprintf("%s, %s, batch %d of %d, %s: %.1f ns a buffer, %.3f round trips of %.0f ns (at best %.3f); bus: %s reads, %s writes",
		r.Ring, r.Placement, r.Batch, r.Outstanding, how, r.NS, r.Ratio, r.RoundTripNS, r.Best,
		strconv.FormatFloat(r.Driver.Reads+r.Device.Reads, 'f', 2, 64), strconv.FormatFloat(r.Driver.Writes+r.Device.Writes, 'f', 2, 64))
}
