package vringtest

import (
	"encoding/binary"
	"fmt"
	"sync"
	"testing"
	"unsafe"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/vring"
	"golang.org/x/sys/unix"
)

// Bus is the model of a device's memory: it sees each access, insists on natural
// alignment, and counts.
type Bus struct {
	mu     sync.Mutex
	data   []byte
	Reads  uint64 // accesses so far
	Writes uint64
	Fences [3]uint64 // barriers so far, by mmio.Barrier
}

// NewBus returns a model of n zero bytes.
func NewBus(n int) *Bus { return &Bus{data: make([]byte, n)} }

func (b *Bus) at(off uint64, width uint) []byte {
	if off%uint64(width) != 0 || off+uint64(width) > uint64(len(b.data)) {
		panic(fmt.Sprintf("vringtest: access of %d bytes at %#x", width, off))
	}
	return b.data[off : off+uint64(width)]
}

// Load implements mmio.Bus.
func (b *Bus) Load(off uint64, width uint) uint64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.Reads++
	p := b.at(off, width)
	switch width {
	case 1:
		return uint64(p[0])
	case 2:
		return uint64(binary.LittleEndian.Uint16(p))
	case 4:
		return uint64(binary.LittleEndian.Uint32(p))
	}
	return binary.LittleEndian.Uint64(p)
}

// Store implements mmio.Bus.
func (b *Bus) Store(off uint64, width uint, v uint64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.Writes++
	p := b.at(off, width)
	switch width {
	case 1:
		p[0] = byte(v)
	case 2:
		binary.LittleEndian.PutUint16(p, uint16(v))
	case 4:
		binary.LittleEndian.PutUint32(p, uint32(v))
	default:
		binary.LittleEndian.PutUint64(p, v)
	}
}

// Barrier implements mmio.Bus.
func (b *Bus) Barrier(k mmio.Barrier) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.Fences[k]++
}

// Memory is a kind of memory to run a test on.
type Memory struct {
	Name string
	New  func(tb testing.TB, n int) mmio.Mem
	// Across marks the device side's region as lying across the bus.
	Across bool
}

// Heap is memory that the race detector watches.
var Heap = Memory{Name: "heap", New: func(tb testing.TB, n int) mmio.Mem {
	b := make([]uint64, (n+7)/8)
	return mmio.NewMem(unsafe.Pointer(&b[0]), uint64(n), mmio.Cached)
}}

// Mapped returns mapped memory of the given kind.
func Mapped(tb testing.TB, n int, kind mmio.Kind) mmio.Mem {
	b, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANON)
	if err != nil {
		tb.Fatalf("mmap of %d bytes: %v", n, err)
	}
	tb.Cleanup(func() {
		if err := unix.Munmap(b); err != nil {
			tb.Errorf("munmap: %v", err)
		}
	})
	return mmio.NewMem(unsafe.Pointer(&b[0]), uint64(n), kind)
}

// Memories are all kinds of memory.
var Memories = []Memory{
	Heap,
	{Name: "mmap", New: func(tb testing.TB, n int) mmio.Mem { return Mapped(tb, n, mmio.Cached) }},
	{Name: "across", Across: true, New: func(tb testing.TB, n int) mmio.Mem { return Mapped(tb, n, mmio.Cached) }},
	{Name: "uncached", Across: true, New: func(tb testing.TB, n int) mmio.Mem { return Mapped(tb, n, mmio.Uncached) }},
	{Name: "wc", Across: true, New: func(tb testing.TB, n int) mmio.Mem { return Mapped(tb, n, mmio.WriteCombining) }},
	{Name: "bus", Across: true, New: func(tb testing.TB, n int) mmio.Mem {
		return mmio.NewBusMem(NewBus(n), uint64(n), mmio.Uncached)
	}},
	{Name: "cachedbus", New: func(tb testing.TB, n int) mmio.Mem {
		return mmio.NewBusMem(NewBus(n), uint64(n), mmio.Cached)
	}},
}

// Ring makes the two sides of one kind of virtqueue.
type Ring struct {
	Name      string
	Packed    bool
	Sizes     func(n uint16) (desc, driver, device uint64)
	NewDriver func(vring.Config) (vring.Driver, error)
	NewDevice func(vring.Config) (vring.Device, error)
	// Resume makes a driver side from a record of Driver.Save.
	Resume func(vring.Config, []byte) (vring.Driver, error)
}

// Split is the split virtqueue.
var Split = Ring{
	Name:  "split",
	Sizes: vring.SplitSizes,
	NewDriver: func(c vring.Config) (vring.Driver, error) {
		d, err := vring.NewSplitDriver(c)
		if err != nil {
			return nil, err
		}
		return d, nil
	},
	NewDevice: func(c vring.Config) (vring.Device, error) {
		d, err := vring.NewSplitDevice(c)
		if err != nil {
			return nil, err
		}
		return d, nil
	},
	Resume: func(c vring.Config, record []byte) (vring.Driver, error) {
		d, err := vring.ResumeSplitDriver(c, record)
		if err != nil {
			return nil, err
		}
		return d, nil
	},
}

// Packed is the packed virtqueue.
var Packed = Ring{
	Name:   "packed",
	Packed: true,
	Sizes:  vring.PackedSizes,
	NewDriver: func(c vring.Config) (vring.Driver, error) {
		d, err := vring.NewPackedDriver(c)
		if err != nil {
			return nil, err
		}
		return d, nil
	},
	NewDevice: func(c vring.Config) (vring.Device, error) {
		d, err := vring.NewPackedDevice(c)
		if err != nil {
			return nil, err
		}
		return d, nil
	},
	Resume: func(c vring.Config, record []byte) (vring.Driver, error) {
		d, err := vring.ResumePackedDriver(c, record)
		if err != nil {
			return nil, err
		}
		return d, nil
	},
}

// Rings are all kinds of virtqueue.
var Rings = []Ring{Split, Packed}

// Between returns how far one index or position of a State lies behind the other, in a queue of n
// descriptors: in chains (split) or descriptors (packed).
func (r Ring) Between(n, from, to uint16) int {
	if !r.Packed {
		return int(to - from)
	}
	const wrap = 1 << 15
	d := int(to&^wrap) - int(from&^wrap)
	if (from^to)&wrap != 0 {
		d += int(n)
	}
	return d
}

// Start returns a state with nothing in flight, idx chains (split) or descriptors (packed) after
// the start.
func (r Ring) Start(n, idx uint16) vring.State {
	if !r.Packed || idx == 0 {
		return vring.State{Avail: idx, Used: idx}
	}
	pos := idx % n
	if idx/n%2 == 0 {
		pos |= 1 << 15
	}
	return vring.State{Avail: pos, Used: pos, Packed: true}
}

// Params is one point of the space that the suite covers.
type Params struct {
	Ring     Ring
	Memory   Memory
	EventIdx bool
	Indirect bool
	InOrder  bool
}

// String names the point.
func (p Params) String() string {
	s := p.Ring.Name + "/" + p.Memory.Name
	if p.EventIdx {
		s += "+event"
	}
	if p.Indirect {
		s += "+indirect"
	}
	if p.InOrder {
		s += "+inorder"
	}
	return s
}

// Each runs f on each point of a ring.
func Each(t *testing.T, r Ring, f func(t *testing.T, p Params)) {
	for _, m := range Memories {
		for i := 0; i < 6; i++ {
			p := Params{Ring: r, Memory: m, EventIdx: i&1 != 0, Indirect: i&2 != 0}
			if i >= 4 {
				p.InOrder, p.Indirect = true, i == 5
			}
			t.Run(p.String(), func(t *testing.T) { f(t, p) })
		}
	}
}

// Base is the link address of a rig's memory: not 0, and not the local offset.
const Base dma.Addr = 0x8_4000_0000

// IndirectMax is the size of a rig's indirect tables, cut to the queue size.
const IndirectMax = 8

// Rig is a queue in one memory, with room for payload behind it. The two sides see
// the memory through regions of their own.
type Rig struct {
	Params
	Size    uint16
	Mem     mmio.Mem
	DrvCfg  vring.Config
	DevCfg  vring.Config
	Ref     *dma.TableRef
	Account *dma.Account // of the device side
	Payload uint64       // offset of the payload
	// Offsets of the areas in Mem.
	DescOff, DriverOff, DeviceOff, IndirectOff uint64
}

func align(n, a uint64) uint64 { return (n + a - 1) &^ (a - 1) }

// NewRig lays a queue of n descriptors and payload bytes out in new memory. The device
// side accounts where the memory lies across.
func NewRig(tb testing.TB, p Params, n uint16, payload int) *Rig {
	tb.Helper()
	desc, driver, device := p.Ring.Sizes(n)
	r := &Rig{Params: p, Size: n}
	r.DescOff = 64
	r.DriverOff = align(r.DescOff+desc, 64)
	r.DeviceOff = align(r.DriverOff+driver, 64)
	r.IndirectOff = align(r.DeviceOff+device, 64)
	max := IndirectMax
	if max > int(n) {
		max = int(n)
	}
	tables := uint64(n) * uint64(max) * 16
	r.Payload = align(r.IndirectOff+tables, 4096)
	r.Mem = p.Memory.New(tb, int(r.Payload)+payload)
	r.Over(tb, r.Mem, r.Mem)
	return r
}

// Over points the rig's two sides at the given mappings of its memory.
func (r *Rig) Over(tb testing.TB, drv, dev mmio.Mem) {
	tb.Helper()
	desc, driver, device := r.Ring.Sizes(r.Size)
	rw := dma.DeviceRead | dma.DeviceWrite
	drvRegion := &dma.Region{Name: "board", Addr: Base, Mem: drv, Access: rw}
	devRegion := dma.Region{Name: "board", Addr: Base, Mem: dev, Access: rw, Across: r.Memory.Across}
	if r.Memory.Across {
		r.Account = new(dma.Account)
		devRegion.Account = r.Account
	}
	table, err := dma.NewTable(devRegion)
	if err != nil {
		tb.Fatal(err)
	}
	r.Ref = new(dma.TableRef)
	r.Ref.Store(table)
	span := func(g *dma.Region, off, n uint64) dma.Span {
		return dma.Span{Region: g, Off: off, Len: uint32(n)}
	}
	c := vring.Config{
		Name: "test0 q0", Size: r.Size, EventIdx: r.EventIdx, Indirect: r.Indirect, InOrder: r.InOrder,
		Desc:   span(drvRegion, r.DescOff, desc),
		Driver: span(drvRegion, r.DriverOff, driver),
		Device: span(drvRegion, r.DeviceOff, device),
	}
	r.DrvCfg = c
	r.DrvCfg.PayloadKind = drv.Kind()
	if r.Indirect {
		max := IndirectMax
		if max > int(r.Size) {
			max = int(r.Size)
		}
		r.DrvCfg.IndirectMax = max
		r.DrvCfg.IndirectMem = span(drvRegion, r.IndirectOff, uint64(r.Size)*uint64(max)*16)
	}
	r.DevCfg = c
	r.DevCfg.Table = r.Ref
	r.DevCfg.Desc.Region = &devRegion
	r.DevCfg.Driver.Region = &devRegion
	r.DevCfg.Device.Region = &devRegion
}

// Pair makes both sides.
func (r *Rig) Pair(tb testing.TB) (vring.Driver, vring.Device) {
	tb.Helper()
	drv, err := r.Ring.NewDriver(r.DrvCfg)
	if err != nil {
		tb.Fatal(err)
	}
	dev, err := r.Ring.NewDevice(r.DevCfg)
	if err != nil {
		tb.Fatal(err)
	}
	return drv, dev
}

// Addr returns the link address of payload byte off.
func (r *Rig) Addr(off uint64) dma.Addr { return Base + dma.Addr(r.Payload+off) }

// Poke writes payload by the driver side's mapping.
func (r *Rig) Poke(off uint64, b []byte) { r.Mem.CopyIn(r.Payload+off, b) }

// Peek reads payload by the driver side's mapping.
func (r *Rig) Peek(off uint64, n int) []byte {
	b := make([]byte, n)
	r.Mem.CopyOut(b, r.Payload+off)
	return b
}

// IndirectAddr returns the link address of the driver side's table for a head or buffer id.
func (r *Rig) IndirectAddr(id uint16) dma.Addr {
	return Base + dma.Addr(r.IndirectOff+uint64(id)*uint64(r.DrvCfg.IndirectMax)*16)
}
