package console

import (
	"bytes"
	"sync"
	"testing"
	"time"
	"unsafe"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/doorbell"
	"github.com/boardlink/boardlink/driver"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/virtio"
)

// hostile is a host that answers each kick by writing bytes of its choice where the driver reads: into device areas and buffers.
type hostile struct {
	region *dma.Region
	config []byte
	status uint32

	mu    sync.Mutex
	data  []byte
	areas [queues]dma.Addr
	bells [queues]*doorbell.Eventfd
}

func (h *hostile) Features() (virtio.Features, error) {
	return virtio.FeaturesOf(virtio.ConsoleSize, virtio.Version1, virtio.EventIdx, virtio.IndirectDesc), nil
}
func (h *hostile) SetFeatures(virtio.Features) error { return nil }
func (h *hostile) Config(off, n uint32) ([]byte, error) {
	b := h.config
	if uint32(len(b)) > n {
		b = b[:n]
	}
	return b, nil
}
func (h *hostile) WriteConfig(uint32, []byte) error { return nil }
func (h *hostile) SetStatus(s uint32) (uint32, error) {
	h.status = s
	return s, nil
}
func (h *hostile) QueueMax(int) (uint16, error) { return 256, nil }
func (h *hostile) SetQueue(i int, _ uint16, _, _, device dma.Addr) error {
	h.areas[i] = device
	return nil
}
func (h *hostile) Kick(i int) doorbell.Ringer { return &kick{h, i} }
func (h *hostile) Call(i int) doorbell.Waiter { return h.bells[i] }

type kick struct {
	h *hostile
	i int
}

func (k *kick) RingNoWait() error { return k.Ring() }

// Ring writes the next bytes.
func (k *kick) Ring() error {
	h := k.h
	h.mu.Lock()
	defer h.mu.Unlock()
	n := 20
	if n > len(h.data) {
		n = len(h.data)
	}
	if n > 0 {
		h.region.Mem.CopyIn(uint64(h.areas[k.i]-h.region.Addr), h.data[:n])
		h.data = h.data[n:]
	}
	return h.bells[k.i].Ring()
}

// FuzzHost: whatever a host writes, the driver ends its loops with an error or goes on; it does not panic, stops, and passes on no more
// than was offered.
func FuzzHost(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte{80, 0, 25, 0, 0, 0, 1, 0, 15, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	f.Add(bytes.Repeat([]byte{0, 0, 255, 255, 7, 0, 0, 0, 255, 255, 255, 255, 0, 0, 0, 0, 0, 1, 0, 0}, 8))
	f.Fuzz(func(t *testing.T, data []byte) {
		words := make([]uint64, 16<<10/8)
		table, err := dma.NewTable(dma.Region{Name: "heap", Addr: 0x10000, Mem: mmio.NewMem(unsafe.Pointer(&words[0]), 16<<10, mmio.Cached), Access: dma.DeviceRead | dma.DeviceWrite})
		if err != nil {
			t.Fatal(err)
		}
		h := &hostile{region: &table.Regions()[0]}
		if len(data) > 4 {
			h.config, h.data = data[:4], data[4:]
		} else {
			h.config = data
		}
		for i := range h.bells {
			if h.bells[i], err = doorbell.NewEventfd(); err != nil {
				t.Fatal(err)
			}
			defer h.bells[i].Close()
		}
		end := newMemory()
		c, err := New(Config{Name: "con0", End: end})
		if err != nil {
			t.Fatal(err)
		}
		m := &driver.Memory{Region: h.region, Alloc: dma.NewAllocator(h.region.Addr, 16<<10)}
		broken := make(chan error, queues)
		err = c.Up(h, driver.Layout{Near: m, Far: m, Devices: 1}, func(err error) { broken <- err })
		if (err != nil) != (len(data) < 4) {
			t.Fatal(err)
		}
		if err == nil {
			end.print([]byte("hello"))
			select {
			case <-broken:
			case <-time.After(2 * time.Millisecond):
			}
		}
		c.Down()
		n := c.Status().Counters
		if err == nil && n["printed"]+n["printed_unsure"] > 5 || n["in_flight"] != 0 || n["typed"] > 256*Backlog {
			t.Fatalf("%v", n)
		}
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
	})
}
