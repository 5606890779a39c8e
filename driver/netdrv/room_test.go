package netdrv

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/driver"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/tunbridge"
	"github.com/boardlink/boardlink/virtio"
)

// offHeap is where the memory for rings and buffers begins in a window (docs/wire.md, 1).
const offHeap = 3 * 4096

var testMemory = make([]byte, 64<<20)

// shared is the layout of the first of so many devices in shared memory of so many bytes, divided as
// docs/wire.md, section 8, has it.
func shared(size, devices int, push bool) driver.Layout {
	window, pool := size, 0
	if size >= 1<<20 {
		window, pool = size/2, size/2
	}
	part := func(name string, base dma.Addr, n int) *driver.Memory {
		return driver.Share(&dma.Region{Name: name, Addr: base, Mem: mmio.FromBytes(testMemory[:n]), Access: dma.DeviceRead | dma.DeviceWrite}, 0, 0, devices)
	}
	m := driver.Layout{Near: part("window", 1<<32, window-offHeap), Devices: devices}
	if m.Far = m.Near; push && pool > 0 {
		m.Far = part("pool", 1<<40, pool)
	}
	return m
}

type roomCase struct {
	size, devices, mtu int
	push, packed       bool
	merge              bool
	queue              uint16 // 0: not chosen
	queues             int    // 0: not chosen
	rxBuffer           uint32
}

var everything = virtio.FeaturesFromMask(tunbridge.NetFOffload).Or(virtio.FeaturesOf(virtio.Version1, virtio.EventIdx, virtio.IndirectDesc, virtio.InOrder,
	virtio.NetMTU, virtio.NetMAC, virtio.NetStatus, virtio.NetMQ, virtio.NetCtrlVQ))

// layOutOf does what a device's bring-up does with its memory. It returns the features that are left and the places.
func layOutOf(c roomCase) (virtio.Features, string, *bringUp, []place, error) {
	n := &Net{cfg: Config{Name: "net0", Queues: c.queues, QueueSize: c.queue, RXBuffer: c.rxBuffer}, limit: 4, sizeChosen: c.queue != 0}
	if c.queues != 0 {
		n.limit = c.queues
	}
	if c.queue == 0 {
		n.cfg.QueueSize = defaultQueueSize
	}
	f := everything
	if c.packed {
		f.Set(virtio.RingPacked)
	}
	if c.merge {
		f.Set(virtio.NetMrgRxbuf)
	}
	l := &bringUp{m: shared(c.size, c.devices, c.push), offers: 4, count: n.limit}
	f, note, err := n.fit(f, l.m, c.mtu, l.offers)
	if err != nil {
		return f, note, l, nil, err
	}
	l.acked = f
	l.maxRX, l.maxTX = tunbridge.MaxFrameToDriver(c.mtu, f.Mask()), tunbridge.MaxFrameToDevice(c.mtu, f.Mask())
	w, err := n.plan(l, c.mtu)
	if err != nil {
		return f, note, l, nil, err
	}
	var sizes []uint16
	for i := 0; i < 2*l.count; i++ {
		sizes = append(sizes, w.size)
	}
	if l.count > 1 {
		sizes = append(sizes, ctrlQueueSize)
	}
	places, err := n.reserve(l, sizes)
	return f, note, l, places, err
}

// check tells what is wrong with a layout.
func (c roomCase) check(l *bringUp, places []place) error {
	for i := 0; i < l.count; i++ {
		rx, tx := places[2*i], places[2*i+1]
		if uint64(tx.buffers.Len) < tunbridge.TXMemMin(l.maxTX) {
			return fmt.Errorf("%d bytes to send frames of %d", tx.buffers.Len, l.maxTX)
		}
		count := rx.buffers.Len / rx.bufferSize
		if count == 0 || int(count*rx.bufferSize) < l.maxRX || !c.merge && int(rx.bufferSize) < l.maxRX {
			return fmt.Errorf("%d receive buffers of %d bytes for frames of %d", count, rx.bufferSize, l.maxRX)
		}
	}
	return nil
}

var remedyOf = map[string]*regexp.Regexp{
	"window":  regexp.MustCompile(`a window at least (\d+) times as large`),
	"MTU":     regexp.MustCompile(`an MTU of at most (\d+) \(--mtu\)`),
	"devices": regexp.MustCompile(`no more than (\d+) of the \d+ devices`),
	"queues":  regexp.MustCompile(`fewer queue pairs \(--queues\), at most (\d+)`),
}

// TestRoom: with every window there is room for a device, by smaller queues, fewer pairs and no segmentation, or it is refused with
// advice; and all advice works when it is followed.
func TestRoom(t *testing.T) {
	came, refused := 0, 0
	for size := 64 << 10; size <= 16<<20; size *= 2 {
		for _, devices := range []int{1, 2, 8, 64} {
			for _, mtu := range []int{1280, 1500, 9000, 65521} {
				for _, kind := range []roomCase{{merge: true}, {merge: true, push: true}, {merge: true, packed: true}, {}, {merge: true, queues: 2}, {merge: true, queues: 4, push: true}} {
					for _, queue := range []uint16{0, 2, 4, 64, 1024} {
						c := kind
						c.size, c.devices, c.mtu, c.queue = size, devices, mtu, queue
						_, note, l, places, err := layOutOf(c)
						if err == nil {
							came++
							if err := c.check(l, places); err != nil {
								t.Errorf("%v: %v", c, err)
							}
							if l.count > 1 && c.queues == 0 && l.acked != everything && note != "" {
								t.Errorf("%v: %d pairs, and %s", c, l.count, note)
							}
							if c.queues != 0 && l.count != c.queues {
								t.Errorf("%v: %d pairs, the operator chose", c, l.count)
							}
							continue
						}
						refused++
						advice := 0
						for what, re := range remedyOf {
							m := re.FindStringSubmatch(err.Error())
							if m == nil {
								continue
							}
							advice++
							d, k := c, 0
							k, _ = strconv.Atoi(m[1])
							switch what {
							case "window":
								d.size *= k
							case "MTU":
								d.mtu = k
							case "devices":
								d.devices = k
							case "queues":
								d.queues = k
							}
							if d.size > len(testMemory) {
								continue
							}
							if _, _, l, places, derr := layOutOf(d); derr != nil {
								t.Errorf("%v: %v\nfollowed (%s): %v", c, err, what, derr)
							} else if derr := d.check(l, places); derr != nil {
								t.Errorf("%v: %v\nfollowed (%s): %v", c, err, what, derr)
							}
						}
						if advice == 0 {
							t.Errorf("%v: no advice: %v", c, err)
						}
						if mtu == 1500 && size >= 64<<10*devices && c.queues == 0 && c.merge {
							t.Errorf("%v: refused: %v", c, err)
						}
					}
				}
			}
		}
	}
	t.Logf("%d came up, %d were refused", came, refused)
	if came < 1000 || refused < 100 {
		t.Error("the table shows little")
	}
}

// TestRoomForSegmentation: which windows have room for frames of 64 KiB, what is said of those that have not, and how many pairs and
// descriptors there are.
func TestRoomForSegmentation(t *testing.T) {
	const rx, tx = tunbridge.NetFToDriverLong, tunbridge.NetFToDeviceLong
	for _, c := range []struct {
		roomCase
		long  uint64 // bits that are left
		pairs int
	}{
		{roomCase{size: 64 << 10, devices: 1, merge: true}, 0, 1},
		{roomCase{size: 128 << 10, devices: 1, merge: true}, 0, 1},
		{roomCase{size: 256 << 10, devices: 1, merge: true}, rx, 1},
		{roomCase{size: 512 << 10, devices: 1, merge: true}, rx | tx, 1},
		{roomCase{size: 1 << 20, devices: 1, merge: true, push: true}, rx | tx, 1},
		{roomCase{size: 1 << 20, devices: 8, merge: true, push: true}, 0, 1},
		{roomCase{size: 16 << 20, devices: 1, merge: true, push: true}, rx | tx, 4},
		{roomCase{size: 16 << 20, devices: 64, merge: true, push: true}, 0, 1},
		{roomCase{size: 32 << 20, devices: 64, merge: true, push: true}, rx | tx, 1},
		{roomCase{size: 16 << 20, devices: 1, merge: true, queue: 2}, rx | tx, 4},
		{roomCase{size: 16 << 20, devices: 1, merge: true, queue: 4}, rx | tx, 4},
		{roomCase{size: 16 << 20, devices: 1, queue: 2}, rx | tx, 4},
		{roomCase{size: 16 << 20, devices: 1, merge: true, queue: 4, rxBuffer: 2048}, tx, 4},
		{roomCase{size: 16 << 20, devices: 1, merge: true, queue: 64, rxBuffer: 2048}, rx | tx, 4},
	} {
		c.mtu = 1500
		f, note, l, places, err := layOutOf(c.roomCase)
		if err != nil {
			t.Errorf("%v: %v", c.roomCase, err)
			continue
		}
		if err := c.check(l, places); err != nil {
			t.Errorf("%v: %v", c.roomCase, err)
		}
		if got := f.Mask() & (rx | tx); got != c.long || l.count != c.pairs {
			t.Errorf("%v: %s, %d pairs; want %s, %d", c.roomCase, f.And(virtio.FeaturesFromMask(rx|tx)), l.count, virtio.FeaturesFromMask(c.long), c.pairs)
		}
		if f.Mask()&(tunbridge.NetFCSUM|tunbridge.NetFGuestCSUM) != tunbridge.NetFCSUM|tunbridge.NetFGuestCSUM {
			t.Errorf("%v: checksums need no room: %s", c.roomCase, f)
		}
		if (note != "") != (c.long != rx|tx) || note != "" && !strings.HasPrefix(note, "without ") {
			t.Errorf("%v: said %q", c.roomCase, note)
		}
		// The note's window has room for all.
		if m := remedyOf["window"].FindStringSubmatch(note); m != nil {
			k, _ := strconv.Atoi(m[1])
			d := c.roomCase
			d.size *= k
			if f, _, _, _, err := layOutOf(d); err != nil || f.Mask()&(rx|tx) != rx|tx {
				t.Errorf("%v: %s: followed: %s, %v", c.roomCase, note, f, err)
			}
		} else if note != "" && c.rxBuffer == 0 {
			t.Errorf("%v: no advice: %s", c.roomCase, note)
		}
	}
}
