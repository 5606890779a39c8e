//go:build linux

// Package packetbench measures frames through the whole virtio path without an interface: package frames on virtqueues in shared
// memory, the driver side (the board) in this process, the device side (the host) in one that it starts, each on a
// processor of its own. For comparison it runs DPDK's vhost and virtio-user drivers as such a pair, in turns.
//
// In the room: the processes, the loops of both sides, what is measured, DPDK's programs. Never in it: flags, printing, testing.T.
//
// # What is done for each frame
//
// As DPDK's testpmd does it in its modes txonly and rxonly. The sender writes the frame's first 64 bytes, with its number in them; what
// is behind them stays as it is. One copy of the whole frame is made, by the device side (the host), as vhost does: from the ring's
// buffers to memory of its own where it receives, from memory of its own to the ring's buffers where it sends. The driver
// side sends and receives in place, as virtio-user does. The receiver looks at each frame's length and number. (testpmd's looks at
// nothing.) Of Echo the answer goes first, then the buffer back, where the sides poll. With Verify, the sender writes every byte, and the receiver checks a checksum of all.
package packetbench

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"runtime/debug"
	"slices"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/boardlink/boardlink/bench/benchkit"
	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/frames"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/vring"
	"golang.org/x/sys/unix"
)

// Direction is where frames go.
type Direction string

// The directions. Echo has one frame under way, to and fro: for latency.
const (
	BoardToHost Direction = "board to host"
	HostToBoard Direction = "host to board"
	Echo        Direction = "echo"
)

// Config says what to measure. The zero value of a field stands for its default.
type Config struct {
	// Peer is the command that becomes the other side (benchkit.Peer). Default: this program.
	Peer []string `json:"-"`
	// Direction; default BoardToHost.
	Direction Direction
	// Ring is "split" (default) or "packed".
	Ring string
	// Placement is "local" (default): all memory is near both sides, as between processes of one machine. "window" and
	// "push" are those of a board: what lies across is accounted, and taken by the paths for it.
	Placement string
	// Memory is how a side sees memory across: "cached" (default), "write-combining" or "uncached".
	Memory string
	// Bytes is the length of frames without header: 64 (default) to 65549. Where Bytes2 is above it, lengths lie between the two and differ
	// from frame to frame.
	Bytes    int
	Bytes2   int
	Size     int  // descriptors of each queue; default 256
	Batch    int  // frames that either side moves at once; default 32, as testpmd
	Sleep    bool // sleep on eventfds when there is nothing to do; else poll
	Spins    int  // with Sleep: polls in vain before; default 200
	EventIdx bool // the event index is negotiated
	InOrder  bool // VIRTIO_F_IN_ORDER is
	Verify   bool // every byte is written, and checked
	// Duration of all runs; default 300 ms. Runs: default 9: many short ones, so that other programs do not disturb all.
	Duration time.Duration
	Runs     int
	// CPU are the processors of board and host side; both 0 leave the first two that this process may use, -1 does
	// not pin.
	CPU [2]int
}

// Result is what was measured.
type Result struct {
	Direction Direction `json:"direction"`
	Ring      string    `json:"ring"`
	Placement string    `json:"placement"`
	Memory    string    `json:"memory"`
	Bytes     int       `json:"bytes"`
	Bytes2    int       `json:"bytes_max,omitempty"`
	Size      int       `json:"ring_size"`
	Batch     int       `json:"batch"`
	Sleep     bool      `json:"sleep"`
	EventIdx  bool      `json:"event_idx"`
	InOrder   bool      `json:"in_order"`
	Verify    bool      `json:"verify"`
	CPU       [2]int    `json:"cpu"`
	Frames    uint64    `json:"frames"`            // of all runs
	Stamped   uint64    `json:"stamped,omitempty"` // of them, those of Echo's runs for Latency: every other run, which Mpps leaves out
	// Mpps and Gbps are medians of the runs, of the frames' own bytes: no header, no gaps.
	Mpps benchkit.Spread `json:"mpps"`
	Gbps float64         `json:"gbit_per_s"`
	// RoundTripNS is that of a cache line between the two processors, the median; RoundTrips the time of a frame in units of it, run by run.
	RoundTripNS float64  `json:"round_trip_ns"`
	RoundTrips  float64  `json:"round_trips_per_packet"`
	Runs        []Sample `json:"runs"`
	// Latency is there for Echo: from one frame to the next.
	Latency *benchkit.Latency `json:"latency,omitempty"`
	// Of each frame, the accesses across the bus by the two sides.
	Driver Bus `json:"driver_bus"`
	Device Bus `json:"device_bus"`
	// Of each frame, how often the sides slept, and rang. Rescued sleeps are those that a time-out ended although there was work.
	Sleeps  float64 `json:"sleeps_per_packet"`
	Rings   float64 `json:"rings_per_packet"`
	Rescued uint64  `json:"rescued"`
	Corrupt uint64  `json:"corrupt"` // frames that were not what was sent
}

// Sample is one of the runs. Before and After are the round trips around it, in nanoseconds.
type Sample struct {
	Mpps   float64 `json:"mpps"`
	Before float64 `json:"round_trip_before_ns"`
	After  float64 `json:"round_trip_after_ns"`
}

// Bus is what went across, for each frame.
type Bus struct {
	Reads      float64 `json:"reads"`
	Writes     float64 `json:"writes"`
	ReadBytes  float64 `json:"read_bytes"`
	WriteBytes float64 `json:"write_bytes"`
}

const (
	boardBase dma.Addr = 0x1000_0000
	hostBase  dma.Addr = 0x9_0000_0000

	minBytes   = 64
	tripRounds = 2000
	patience   = 30 * time.Second
	warmUp     = 20000 // frames of the first run, which says how many make a run
	lengths    = 1021  // of different frames, where they vary: prime

	// In the memory of the board: the round trip's line, the number of frames of a run, the areas of the queues, buffers.
	offOrder = 1024
	offAreas = 4096
	areaStep = 1 << 20 // of a queue: three areas
	offData  = offAreas + 2*areaStep
)

func (c *Config) defaults() error {
	set := func(p *int, v int) {
		if *p == 0 {
			*p = v
		}
	}
	str := func(p *string, v string) {
		if *p == "" {
			*p = v
		}
	}
	str((*string)(&c.Direction), string(BoardToHost))
	str(&c.Ring, "split")
	str(&c.Placement, "local")
	str(&c.Memory, "cached")
	set(&c.Bytes, 64)
	set(&c.Bytes2, c.Bytes)
	set(&c.Size, 256)
	set(&c.Batch, 32)
	set(&c.Runs, 9)
	set(&c.Spins, 200)
	if c.Duration == 0 {
		c.Duration = 300 * time.Millisecond
	}
	switch {
	case c.Direction != BoardToHost && c.Direction != HostToBoard && c.Direction != Echo:
		return fmt.Errorf("direction %q: %q, %q or %q", c.Direction, BoardToHost, HostToBoard, Echo)
	case c.Ring != "split" && c.Ring != "packed":
		return fmt.Errorf("ring %q: split or packed", c.Ring)
	case c.Placement != "local" && c.Placement != "window" && c.Placement != "push":
		return fmt.Errorf("placement %q: local, window or push", c.Placement)
	case c.Memory != "cached" && c.Memory != "write-combining" && c.Memory != "uncached":
		return fmt.Errorf("memory %q: cached, write-combining or uncached", c.Memory)
	case c.Bytes < minBytes || c.Bytes > frames.MaxMaxFrame || c.Bytes2 < c.Bytes || c.Bytes2 > frames.MaxMaxFrame:
		return fmt.Errorf("frames of %d to %d bytes: %d to %d", c.Bytes, c.Bytes2, minBytes, frames.MaxMaxFrame)
	case c.Size < 2 || c.Size > vring.MaxSize || c.Ring == "split" && c.Size&(c.Size-1) != 0:
		return fmt.Errorf("queue of %d descriptors: 2 to %d, and of a split ring a power of two", c.Size, vring.MaxSize)
	case c.Batch < 1 || c.Batch > c.Size || c.Batch > frames.MaxBatch:
		return fmt.Errorf("batch of %d: 1 to %d, and not above the size of the queue (%d)", c.Batch, frames.MaxBatch, c.Size)
	case c.Runs < 1 || c.Duration < time.Millisecond || c.Duration > patience:
		return fmt.Errorf("%d runs of %v in all: one at least, 1ms to %v", c.Runs, c.Duration, patience)
	}
	if c.CPU == ([2]int{}) {
		cpus, err := benchkit.CPUs()
		if err != nil {
			return err
		}
		if len(cpus) < 2 {
			return errors.New("two processors are needed: the sides poll")
		}
		c.CPU = [2]int{cpus[0], cpus[1]}
	}
	return nil
}

// Check returns what is wrong with c, or with the machine for it; nil where Run would begin.
func (c Config) Check() error { return c.defaults() }

// sizes returns the length of the memory for the frames of one queue, and of each of the two memories.
func (c *Config) sizes() (data, mem int) {
	data = (int(frames.MemSize(c.Bytes2, c.Size)) + 4095) &^ 4095
	return data, offData + 2*data
}

// queue numbers.
const (
	tx = iota // board to host
	rx
)

// side is one process' view.
type side struct {
	c        *Config
	device   bool
	b        []byte
	mem      mmio.RAM
	line     *benchkit.Line
	bus      *dma.QueueAccount // allocated on its own: aligned everywhere
	deadline time.Time
	gone     atomic.Bool // the peer

	bells  [4]*doorbell.Eventfd // kick and call of each queue
	stop   *doorbell.Eventfd
	counts *doorbell.Counters
	out    frames.Sender // whichever the direction needs
	in     frames.Receiver

	length   []int // of the frames, over and over
	own      [][]byte
	template [minBytes]byte
	sent     uint64 // numbers of the next frame
	got      uint64
	corrupt  uint64
}

func (c *Config) lengths() []int {
	l := make([]int, lengths)
	for i := range l {
		l[i] = c.Bytes + i*37%(c.Bytes2-c.Bytes+1)
	}
	return l
}

func newSide(c *Config, device bool, memfd int, bells []int) (_ *side, err error) {
	data, memSize := c.sizes()
	b, err := unix.Mmap(memfd, 0, 2*memSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return nil, fmt.Errorf("mmap: %w", err)
	}
	s := &side{c: c, device: device, b: b, bus: new(dma.QueueAccount), counts: new(doorbell.Counters), deadline: time.Now().Add(patience), length: c.lengths()}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	for i := range s.bells {
		fd, err := unix.FcntlInt(uintptr(bells[i]), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return nil, err
		}
		if s.bells[i], err = doorbell.FromFD(fd); err != nil {
			unix.Close(fd)
			return nil, err
		}
	}
	if s.stop, err = doorbell.NewEventfd(); err != nil {
		return nil, err
	}
	s.mem, _ = mmio.FromBytes(b[:offAreas]).RAM()
	s.line = benchkit.NewLine(s.mem, !device)
	s.line.Late = s.late
	kind := map[string]mmio.Kind{"cached": mmio.Cached, "write-combining": mmio.WriteCombining, "uncached": mmio.Uncached}[c.Memory]
	region := func(name string, addr dma.Addr, off int, across bool) *dma.Region {
		r := &dma.Region{Name: name, Addr: addr, Access: dma.DeviceRead | dma.DeviceWrite}
		k := mmio.Cached
		if across {
			r.Across, r.Account, k = true, new(dma.Account), kind // queues have accounts of their own
		}
		r.Mem = mmio.NewMem(unsafe.Pointer(&b[off]), uint64(memSize), k)
		return r
	}
	board := region("board", boardBase, 0, device && c.Placement != "local")
	host := region("host", hostBase, memSize, !device && c.Placement != "local")
	far := board
	if c.Placement == "push" {
		far = host
	}
	var ref *dma.TableRef
	if device {
		t, err := dma.NewTable(*board, *host)
		if err != nil {
			return nil, err
		}
		ref = new(dma.TableRef)
		ref.Store(t)
	}
	queue := func(n int) vring.Config {
		sizes := vring.SplitSizes
		if c.Ring == "packed" {
			sizes = vring.PackedSizes
		}
		desc, driver, dev := sizes(uint16(c.Size))
		off := uint64(offAreas + n*areaStep)
		q := vring.Config{Name: [...]string{"tx", "rx"}[n], Size: uint16(c.Size), EventIdx: c.EventIdx, InOrder: c.InOrder,
			Desc:   dma.Span{Region: far, Off: off, Len: uint32(desc)}.Accounted(&s.bus.Descriptor),
			Driver: dma.Span{Region: far, Off: off + areaStep/2, Len: uint32(driver)}.Accounted(&s.bus.Driver),
			Device: dma.Span{Region: board, Off: off + areaStep*3/4, Len: uint32(dev)}.Accounted(&s.bus.Device)}
		if ref != nil {
			q.Table = ref.Accounted(&s.bus.Payload)
		}
		if far != board || kind != mmio.Cached {
			q.PayloadKind = kind
		}
		return q
	}
	end := func(n int) frames.Config {
		f := frames.Config{Name: [...]string{"tx", "rx"}[n], MaxFrame: c.Bytes2, Batch: c.Batch, Copy: true}
		kick, call := s.bells[2*n], s.bells[2*n+1]
		f.Ring, f.Sleep = doorbell.Ringer(kick), doorbell.SleeperConfig{Doorbell: call, Stop: s.stop, Counters: s.counts}
		if device {
			f.Ring, f.Sleep.Doorbell = call, kick
		}
		return f
	}
	memory := [2]dma.Span{{Region: far, Off: offData, Len: uint32(data)}, {Region: board, Off: uint64(offData + data), Len: uint32(data)}}
	if !device {
		drv := func(n int) (vring.Driver, error) {
			if c.Ring == "packed" {
				return vring.NewPackedDriver(queue(n))
			}
			return vring.NewSplitDriver(queue(n))
		}
		if c.Direction != HostToBoard {
			q, err := drv(tx)
			if err != nil {
				return nil, err
			}
			if s.out, err = frames.NewDriverSender(end(tx), q, memory[tx].Accounted(&s.bus.Payload)); err != nil {
				return nil, err
			}
		}
		if c.Direction != BoardToHost {
			q, err := drv(rx)
			if err != nil {
				return nil, err
			}
			if s.in, err = frames.NewDriverReceiver(end(rx), q, memory[rx].Accounted(&s.bus.Payload)); err != nil {
				return nil, err
			}
		}
	} else {
		// The driver side sets the rings up; the first meeting says that it has.
		if err := s.line.Meet(); err != nil {
			return nil, err
		}
		dev := func(n int) (vring.Device, error) {
			if c.Ring == "packed" {
				return vring.NewPackedDevice(queue(n))
			}
			return vring.NewSplitDevice(queue(n))
		}
		if c.Direction != HostToBoard {
			q, err := dev(tx)
			if err != nil {
				return nil, err
			}
			if s.in, err = frames.NewDeviceReceiver(end(tx), q); err != nil {
				return nil, err
			}
		}
		if c.Direction != BoardToHost {
			q, err := dev(rx)
			if err != nil {
				return nil, err
			}
			if s.out, err = frames.NewDeviceSender(end(rx), q); err != nil {
				return nil, err
			}
			// What it sends lies in memory of its own first, one frame beside the other.
			s.own = make([][]byte, c.Size)
			stride := (c.Bytes2 + 63) / 64 * 64
			all := make([]byte, c.Size*stride)
			for i := range s.own {
				s.own[i] = all[i*stride : i*stride+c.Bytes2 : i*stride+c.Bytes2]
			}
		}
	}
	copy(s.template[:], header)
	return s, nil
}

// header is an Ethernet, IPv4 and UDP header between documentation addresses (RFC 5737); nobody looks at it.
var header = []byte{
	2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0,
	0x45, 0, 0, 50, 0, 0, 0, 0, 64, 17, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2,
	0, 9, 0, 9, 0, 30, 0, 0,
}

const (
	offNumber = 48 // of the frame's number, 64 bits
	offSum    = 56 // of the checksum of what is behind the first 64 bytes, and the number
)

func (s *side) close() error {
	for _, e := range append(s.bells[:], s.stop) {
		if e != nil {
			e.Close()
		}
	}
	return unix.Munmap(s.b)
}

var errPatience = errors.New("the other side does not answer")

// late is asked now and then by whoever waits.
func (s *side) late() error {
	if s.gone.Load() || time.Now().After(s.deadline) {
		return errPatience
	}
	return nil
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// fill makes frame number n of length bytes, every byte of it.
func fill(b []byte, n uint64) {
	x := n*0x9e3779b97f4a7c15 + 1
	p := b[minBytes:]
	for ; len(p) >= 8; p = p[8:] {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		binary.LittleEndian.PutUint64(p, x)
	}
	for i := range p {
		p[i] = byte(x >> (8 * i))
	}
	binary.LittleEndian.PutUint64(b[offSum:], uint64(sum(b, n)))
}

func sum(b []byte, n uint64) uint32 {
	return crc32.Update(uint32(n), castagnoli, b[minBytes:])
}

// fill writes len(out) frames.
func (s *side) fill(out []frames.Out) {
	sent, length, at, own := s.sent, s.length, int(s.sent%lengths), s.own
	t := &s.template
	from := int(sent % uint64(s.c.Size))
	for i := range out {
		n := length[at]
		if at++; at == len(length) {
			at = 0
		}
		o := &out[i]
		o.Len = n
		b := o.Room
		if own != nil {
			b = own[from]
			if from++; from == len(own) {
				from = 0
			}
		}
		*(*[minBytes]byte)(b) = *t
		binary.LittleEndian.PutUint64(b[offNumber:], sent)
		if s.c.Verify {
			fill(b[:n], sent)
		}
		sent++
	}
	if own != nil {
		// Behind all of the batch, as testpmd makes a burst before it sends it.
		from = int(s.sent % uint64(s.c.Size))
		for i := range out {
			o := &out[i]
			copy(o.Room[:o.Len], own[from])
			if from++; from == len(own) {
				from = 0
			}
		}
	}
	s.sent = sent
}

// check looks at frames.
func (s *side) check(in [][]byte) {
	got, length, at := s.got, s.length, int(s.got%lengths)
	for _, f := range in {
		n := length[at]
		if at++; at == len(length) {
			at = 0
		}
		if len(f) != n || binary.LittleEndian.Uint64(f[offNumber:]) != got || s.c.Verify && binary.LittleEndian.Uint64(f[offSum:]) != uint64(sum(f, got)) {
			s.corrupt++
		}
		got++
	}
	s.got = got
}

// idle counts looks in vain, and waits where that is asked for.
type idle int

func (i *idle) nothing(s *side, wait func() (doorbell.Reason, error)) error {
	*i++
	if *i&(1<<18-1) == 0 {
		if err := s.late(); err != nil {
			return err
		}
	}
	if !s.c.Sleep || int(*i) < s.c.Spins {
		if s.c.Direction != Echo {
			relax()
		}
		return nil
	}
	*i = 0
	if _, err := wait(); err != nil {
		return err
	}
	return s.late()
}

// send sends n frames.
func (s *side) send(n int) error {
	var id idle
	for n > 0 {
		out, err := s.out.Reserve(min(n, s.c.Batch))
		if err != nil {
			return err
		}
		if len(out) == 0 {
			if err := id.nothing(s, s.out.Wait); err != nil {
				return err
			}
			continue
		}
		id = 0
		s.fill(out)
		if err := s.out.Send(len(out)); err != nil {
			return err
		}
		n -= len(out)
	}
	return nil
}

// receive takes n frames.
func (s *side) receive(n int) error {
	var id idle
	for n > 0 {
		in, err := s.in.Receive(s.c.Batch)
		if err != nil {
			return err
		}
		if len(in) == 0 {
			if err := id.nothing(s, s.in.Wait); err != nil {
				return err
			}
			continue
		}
		id = 0
		s.check(in)
		n -= len(in)
		if s.c.Direction == Echo && !s.c.Sleep {
			continue // the answer goes first: the next Receive gives the buffer back
		}
		if err := s.in.Done(); err != nil {
			return err
		}
	}
	return nil
}

// echo passes one frame to and fro, n times. The leading side tells the times.
func (s *side) echo(n int, h *benchkit.Histogram) error {
	last := time.Now()
	for ; n > 0; n-- {
		if !s.device {
			if err := s.send(1); err != nil {
				return err
			}
		}
		if err := s.receive(1); err != nil {
			return err
		}
		if s.device {
			if err := s.send(1); err != nil {
				return err
			}
			continue
		}
		if h == nil {
			continue
		}
		now := time.Now()
		h.Record(now.Sub(last))
		last = now
	}
	return nil
}

// run is one run of n frames, by the driver side or the device side.
func (s *side) run(n int, h *benchkit.Histogram) error {
	switch {
	case s.c.Direction == Echo:
		return s.echo(n, h)
	case (s.c.Direction == BoardToHost) != s.device:
		return s.send(n)
	}
	return s.receive(n)
}

// pace is how often relax reads a word of its own.
const pace = 4

var idleWord uint64

// relax lets a moment pass between two looks, so that the line is not taken from who writes it.
func relax() {
	for i := 0; i < pace; i++ {
		mmio.Load64(unsafe.Pointer(&idleWord))
	}
}

// told is what the peer reports.
type told struct {
	Bus     dma.QueueAccount
	Bells   doorbell.Counters
	Rings   uint64
	Corrupt uint64
	Dropped uint64
}

func init() {
	// The device side's process. Its files: memory, and the doorbells.
	benchkit.Register("packets", func(order []byte) (any, error) {
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
	const f = benchkit.FirstFD
	s, err := newSide(c, true, f, []int{f + 1, f + 2, f + 3, f + 4})
	if err != nil {
		return err
	}
	defer s.close()
	for i := 0; i <= c.Runs; i++ { // the first one warms up
		if _, err := s.measure(i, nil); err != nil {
			return err
		}
	}
	s.tell(t)
	return nil
}

func (s *side) tell(t *told) {
	t.Bus, t.Bells, t.Corrupt = *s.bus, s.counts.Snapshot(), s.corrupt
	for _, st := range s.stats() {
		t.Rings += st.Rings()
		t.Dropped += st.Dropped()
	}
}

func (s *side) stats() (l []*frames.Stats) {
	if s.out != nil {
		l = append(l, s.out.Stats())
	}
	if s.in != nil {
		l = append(l, s.in.Stats())
	}
	return l
}

// measure is one run by either side, between two round trips. The leading side returns how long it took; the other one learns
// from it how many frames it has.
func (s *side) measure(i int, h *benchkit.Histogram) (m Sample, err error) {
	s.deadline = time.Now().Add(patience)
	if m.Before, err = s.line.RoundTrips(tripRounds); err != nil {
		return m, err
	}
	if i == 1 {
		// Forget what was counted while warming up. Nobody else counts meanwhile.
		*s.bus, *s.counts = dma.QueueAccount{}, doorbell.Counters{}
	}
	if err := s.line.Meet(); err != nil {
		return m, err
	}
	n := int(s.mem.Load64(offOrder))
	start := time.Now()
	if err := s.run(n, h); err != nil {
		return m, err
	}
	if err := s.line.Meet(); err != nil {
		return m, err
	}
	m.Mpps = float64(n) / float64(time.Since(start).Nanoseconds()) * 1e3
	m.After, err = s.line.RoundTrips(tripRounds)
	return m, err
}

// Run measures. Errors name what is wrong with cfg, or with the machine.
func Run(ctx context.Context, cfg Config) (*Result, error) {
	c := cfg
	if err := c.defaults(); err != nil {
		return nil, err
	}
	_, memSize := c.sizes()
	fd, err := unix.MemfdCreate("packetbench", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memfd_create: %w", err)
	}
	files := []*os.File{os.NewFile(uintptr(fd), "memory")}
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	if err := files[0].Truncate(int64(2 * memSize)); err != nil {
		return nil, err
	}
	var bells []int
	for i := 0; i < 4; i++ {
		e, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
		if err != nil {
			return nil, fmt.Errorf("eventfd: %w", err)
		}
		files = append(files, os.NewFile(uintptr(e), "eventfd"))
		bells = append(bells, e)
	}
	s, err := newSide(&c, false, fd, bells)
	if err != nil {
		return nil, err
	}
	defer s.close()
	r := &Result{Direction: c.Direction, Ring: c.Ring, Placement: c.Placement, Memory: c.Memory, Bytes: c.Bytes, Size: c.Size, Batch: c.Batch,
		Sleep: c.Sleep, EventIdx: c.EventIdx, InOrder: c.InOrder, Verify: c.Verify, CPU: c.CPU}
	if c.Bytes2 > c.Bytes {
		r.Bytes2 = c.Bytes2
	}
	p, err := benchkit.Start(ctx, "packets", &c, files, c.Peer)
	if err != nil {
		return nil, err
	}
	defer p.Stop()
	result := make(chan error, 1)
	go func() { result <- r.lead(&c, s) }()
	var t, own told
	select {
	case err = <-result:
		if err != nil {
			p.Stop()
			err = fmt.Errorf("board side: %w", err)
		} else if err = p.Wait(&t); err != nil {
			err = fmt.Errorf("host side: %w", err)
		}
	case <-p.Gone():
		// This side may still be behind the last round trip, or wait for ever.
		if err = p.Wait(&t); err != nil {
			err = fmt.Errorf("host side: %w", err)
			s.gone.Store(true)
			s.stop.Ring()
		}
		if lerr := <-result; err == nil && lerr != nil {
			err = fmt.Errorf("board side: %w", lerr)
		}
	}
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	if err != nil {
		return nil, err
	}
	s.tell(&own)
	n := float64(r.Frames)
	r.Driver, r.Device = perFrame(&own.Bus, n), perFrame(&t.Bus, n)
	r.Sleeps = float64(own.Bells.Sleeps+t.Bells.Sleeps) / n
	r.Rings = float64(own.Rings+t.Rings) / n
	r.Rescued = own.Bells.Rescued + t.Bells.Rescued
	r.Corrupt = own.Corrupt + t.Corrupt + own.Dropped + t.Dropped
	return r, nil
}

// lead is the driver side.
func (r *Result) lead(c *Config, s *side) error {
	unpin, err := benchkit.Pin(c.CPU[0])
	if err != nil {
		return err
	}
	defer unpin()
	// Nothing is allocated in the runs; what was before them is not to be collected in them.
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	if err := s.line.Meet(); err != nil {
		return err
	}
	h := benchkit.NewHistogram()
	n := warmUp
	if c.Direction == Echo || c.Duration < 20*time.Millisecond {
		n = warmUp / 10
	}
	n = max(n-n%c.Batch, c.Batch)
	var mpps, trips, ratio []float64
	for i := 0; i <= c.Runs; i++ { // the first one warms up
		s.mem.Store64(offOrder, uint64(n))
		// Reading the clock for each frame takes part of the time that it tells: there are runs without.
		stamps := h
		if i&1 != 0 && c.Runs > 1 {
			stamps = nil
		}
		m, err := s.measure(i, stamps)
		if err != nil {
			return err
		}
		if i == 0 {
			n = int(m.Mpps * 1e6 * c.Duration.Seconds() / float64(c.Runs))
			n = max(n-n%c.Batch, c.Batch)
			h.Reset()
			continue
		}
		r.Runs = append(r.Runs, m)
		r.Frames += uint64(n)
		if c.Direction == Echo && stamps != nil && c.Runs > 1 {
			r.Stamped += uint64(n)
			continue
		}
		rt := min(m.Before, m.After) // the one that was disturbed less
		mpps, trips, ratio = append(mpps, m.Mpps), append(trips, rt), append(ratio, 1e3/m.Mpps/rt)
	}
	r.Mpps = benchkit.SpreadOf(mpps)
	total := 0
	for _, l := range s.length {
		total += l
	}
	r.Gbps = r.Mpps.Median * 8e-3 * float64(total) / lengths
	r.RoundTripNS, r.RoundTrips = benchkit.Median(trips), benchkit.Median(ratio)
	if c.Direction == Echo {
		l := h.Latency()
		r.Latency = &l
	}
	return nil
}

func perFrame(a *dma.QueueAccount, n float64) Bus {
	var b Bus
	for _, p := range []*dma.Account{&a.Descriptor, &a.Driver, &a.Device, &a.Payload} {
		l := p.Load()
		b.Reads += float64(l.Reads) / n
		b.Writes += float64(l.Writes) / n
		b.ReadBytes += float64(l.ReadBytes) / n
		b.WriteBytes += float64(l.WriteBytes) / n
	}
	return b
}

// Best returns the fastest run, in millions of frames a second.
func (r *Result) Best() float64 {
	return slices.MaxFunc(r.Runs, func(a, b Sample) int {
		if a.Mpps < b.Mpps {
			return -1
		}
		return 1
	}).Mpps
}
