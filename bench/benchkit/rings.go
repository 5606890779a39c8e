//go:build linux

package benchkit

import (
	"errors"
	"fmt"
	"os"
	"unsafe"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/vring"
	"golang.org/x/sys/unix"
)

// What benchmarks of virtqueues between two processes have in common: two memories in one file that both map,
// the board's and behind it the host's, and queues in them.

// Link addresses of the two memories.
const (
	BoardBase dma.Addr = 0x1000_0000
	HostBase  dma.Addr = 0x9_0000_0000
)

var kinds = map[string]mmio.Kind{"cached": mmio.Cached, "write-combining": mmio.WriteCombining, "uncached": mmio.Uncached}

// Layout says which kind of ring is measured, and where it lies. An empty field stands for the first value.
type Layout struct {
	Ring      string // "split" or "packed"
	Placement string // "local": all memory is near both sides; "window" or "push": as those of a board
	Memory    string // how a side sees memory across: "cached", "write-combining" or "uncached"
	Size      int    // descriptors of a queue
}

// Check sets what is empty, but for Size, and returns what is wrong with l, of a ring of min descriptors at least.
func (l *Layout) Check(min int) error {
	for _, d := range []struct {
		p *string
		v string
	}{{&l.Ring, "split"}, {&l.Placement, "local"}, {&l.Memory, "cached"}} {
		if *d.p == "" {
			*d.p = d.v
		}
	}
	_, known := kinds[l.Memory]
	switch {
	case l.Ring != "split" && l.Ring != "packed":
		return fmt.Errorf("ring %q: split or packed", l.Ring)
	case l.Placement != "local" && l.Placement != "window" && l.Placement != "push":
		return fmt.Errorf("placement %q: local, window or push", l.Placement)
	case !known:
		return fmt.Errorf("memory %q: cached, write-combining or uncached", l.Memory)
	case l.Size < min || l.Size > vring.MaxSize || l.Ring == "split" && l.Size&(l.Size-1) != 0:
		return fmt.Errorf("queue of %d descriptors: %d to %d, and of a split ring a power of two", l.Size, min, vring.MaxSize)
	}
	return nil
}

// Memories are the two memories, as one side sees them.
type Memories struct {
	Layout
	Bytes []byte      // of the file: first those of the board's memory
	Board *dma.Region // in both, what the device writes lies here
	Host  *dma.Region
	Far   *dma.Region // where what the driver side writes lies: the board's memory, the host's of "push"
	Kind  mmio.Kind   // of memory across
	Bus   *dma.QueueAccount
	table *dma.TableRef // of the device side
}

// MapMemories maps the file fd, of two memories of size bytes. Close unmaps it.
func MapMemories(l Layout, fd, size int, device bool) (*Memories, error) {
	b, err := unix.Mmap(fd, 0, 2*size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return nil, fmt.Errorf("mmap: %w", err)
	}
	// The account is allocated on its own: aligned everywhere.
	m := &Memories{Layout: l, Bytes: b, Kind: kinds[l.Memory], Bus: new(dma.QueueAccount)}
	region := func(name string, addr dma.Addr, off int, across bool) *dma.Region {
		r := &dma.Region{Name: name, Addr: addr, Access: dma.DeviceRead | dma.DeviceWrite}
		k := mmio.Cached
		if across {
			r.Across, r.Account, k = true, new(dma.Account), m.Kind // the queues have accounts of their own
		}
		r.Mem = mmio.NewMem(unsafe.Pointer(&b[off]), uint64(size), k)
		return r
	}
	local := l.Placement == "local"
	m.Board = region("board", BoardBase, 0, device && !local)
	m.Host = region("host", HostBase, size, !device && !local)
	m.Far = m.Board
	if l.Placement == "push" {
		m.Far = m.Host
	}
	if device {
		t, err := dma.NewTable(*m.Board, *m.Host)
		if err != nil {
			m.Close()
			return nil, err
		}
		m.table = new(dma.TableRef)
		m.table.Store(t)
	}
	return m, nil
}

// Close unmaps the file.
func (m *Memories) Close() error { return unix.Munmap(m.Bytes) }

// Queue describes a queue whose descriptor, driver and device areas lie at the given offsets. What goes across for it counts
// in Bus.
func (m *Memories) Queue(name string, desc, driver, device uint64) vring.Config {
	sizes := vring.SplitSizes
	if m.Ring == "packed" {
		sizes = vring.PackedSizes
	}
	n, a, u := sizes(uint16(m.Size))
	c := vring.Config{Name: name, Size: uint16(m.Size),
		Desc:   dma.Span{Region: m.Far, Off: desc, Len: uint32(n)}.Accounted(&m.Bus.Descriptor),
		Driver: dma.Span{Region: m.Far, Off: driver, Len: uint32(a)}.Accounted(&m.Bus.Driver),
		Device: dma.Span{Region: m.Board, Off: device, Len: uint32(u)}.Accounted(&m.Bus.Device)}
	if m.table != nil {
		c.Table = m.table.Accounted(&m.Bus.Payload)
	}
	return c
}

// Driver makes the driver side of a queue.
func (m *Memories) Driver(c vring.Config) (vring.Driver, error) {
	if m.Ring == "packed" {
		return vring.NewPackedDriver(c)
	}
	return vring.NewSplitDriver(c)
}

// Device makes the device side of a queue, which the driver side has set up.
func (m *Memories) Device(c vring.Config) (vring.Device, error) {
	if m.Ring == "packed" {
		return vring.NewPackedDevice(c)
	}
	return vring.NewSplitDevice(c)
}

// Bus is what went across, for each buffer or frame.
type Bus struct {
	Reads      float64 `json:"reads"`
	Writes     float64 `json:"writes"`
	ReadBytes  float64 `json:"read_bytes"`
	WriteBytes float64 `json:"write_bytes"`
}

// BusOf is what accounts say of n buffers.
func BusOf(n float64, accounts ...*dma.Account) (b Bus) {
	for _, a := range accounts {
		l := a.Load()
		b.Reads += float64(l.Reads) / n
		b.Writes += float64(l.Writes) / n
		b.ReadBytes += float64(l.ReadBytes) / n
		b.WriteBytes += float64(l.WriteBytes) / n
	}
	return b
}

// Files makes what two processes share: a memory file of the given name and bytes, and behind it eventfds, which are made with the
// given flags. fds are their descriptors. CloseFiles closes them.
func Files(name string, bytes int64, eventfds, flags int) (files []*os.File, fds []int, err error) {
	defer func() {
		if err != nil {
			CloseFiles(files)
		}
	}()
	add := func(fd int, name string) {
		files, fds = append(files, os.NewFile(uintptr(fd), name)), append(fds, fd)
	}
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return files, nil, fmt.Errorf("memfd_create: %w", err)
	}
	add(fd, "memory")
	if err := files[0].Truncate(bytes); err != nil {
		return files, nil, err
	}
	for i := 0; i < eventfds; i++ {
		e, err := unix.Eventfd(0, unix.EFD_CLOEXEC|flags)
		if err != nil {
			return files, nil, fmt.Errorf("eventfd: %w", err)
		}
		add(e, "eventfd")
	}
	return files, fds, nil
}

// CloseFiles closes files.
func CloseFiles(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// TwoCPUs returns the first two processors that this process may use.
func TwoCPUs() ([2]int, error) {
	cpus, err := CPUs()
	if err != nil {
		return [2]int{}, err
	}
	if len(cpus) < 2 {
		return [2]int{}, errors.New("two processors are needed: the sides poll")
	}
	return [2]int{cpus[0], cpus[1]}, nil
}
