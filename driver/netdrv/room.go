package netdrv

import (
	"fmt"
	"math"
	"strings"

	"github.com/boardlink/boardlink/driver"
	"github.com/boardlink/boardlink/tunbridge"
	"github.com/boardlink/boardlink/virtio"
	"github.com/boardlink/boardlink/vring"
)

// Where a device's part of the memory is small, less is set up in it: fewer queue pairs, where the operator did not choose
// their number; smaller queues and receive buffers; no segmentation (TSO, USO), whose frames are of 64 KiB. What does not do
// even so is refused, before the host is told anything, with what would do.

// minQueueSize is the queue size below which segmentation is given up first, and the number of pairs.
const minQueueSize = 16

// wanted is what a device is to have room for.
type wanted struct {
	pairs         int
	size          uint16 // of a pair's queues
	packed, merge bool
	rxBuffer      uint32 // as the operator chose it, 0 where not
	maxRX, maxTX  int    // longest frames with headers
	longRX        bool   // maxRX is that of segmentation
}

// never is more memory than there can be.
const never = math.MaxUint64 / 4

// rings returns how many bytes of rings the host writes (near), and how many it reads (far).
func (w *wanted) rings() (near, far uint64) {
	near, far = ringSizes(w.size, w.packed)
	near, far = 2*uint64(w.pairs)*near, 2*uint64(w.pairs)*far
	if w.pairs > 1 {
		n, f := ringSizes(ctrlQueueSize, w.packed)
		near, far = near+n+64, far+f+64
	}
	return near, far
}

// ringSizes returns how many bytes the areas of one queue take, each on lines of its own.
func ringSizes(size uint16, packed bool) (near, far uint64) {
	desc, driver, device := vring.SplitSizes(size)
	if packed {
		desc, driver, device = vring.PackedSizes(size)
	}
	return lines(device), lines(desc) + lines(driver)
}

// lines rounds n up to lines of 64 bytes.
func lines(n uint64) uint64 { return (n + 63) &^ 63 }

// rxMin returns how many bytes of receive buffers a pair takes at least. For frames of 64 KiB it is room for two: with less, a
// host waits after each small frame, too, until it is taken.
func (w *wanted) rxMin() uint64 {
	n := lines(uint64(w.maxRX))
	if w.merge && w.rxBuffer != 0 && lines(uint64(w.rxBuffer))*uint64(w.size) < uint64(w.maxRX) {
		return never // the operator's buffers, one for each descriptor, do not do
	}
	if w.longRX {
		n = tunbridge.LongRoom
	}
	return n
}

func (w *wanted) txMin() uint64 { return tunbridge.TXMemMin(w.maxTX) }

// need returns how much memory it takes at least.
func (w *wanted) need() (near, far uint64) {
	near, far = w.rings()
	return near + uint64(w.pairs)*w.rxMin(), far + uint64(w.pairs)*w.txMin()
}

// fits tells whether memory m, of which nothing is in use, does.
func (w *wanted) fits(m driver.Layout) bool {
	near, far := w.need()
	if m.Near == m.Far {
		return near+far <= m.Near.Alloc.FreeBytes()
	}
	return near <= m.Near.Alloc.FreeBytes() && far <= m.Far.Alloc.FreeBytes()
}

// shrink halves the queue size until w fits, or it is least, and tells whether it fits. Where the size is not the operator's, rings
// do not take more than a quarter of the memory.
func (w *wanted) shrink(m driver.Layout, least uint16, chosen bool) bool {
	for !chosen && w.size > minQueueSize && w.ringsTooLarge(m) {
		w.size /= 2
	}
	for !w.fits(m) {
		if w.size <= least {
			return false
		}
		w.size /= 2
	}
	return true
}

func (w *wanted) ringsTooLarge(m driver.Layout) bool {
	near, far := w.rings()
	if m.Near == m.Far {
		return 4*(near+far) > m.Near.Alloc.FreeBytes()
	}
	return 4*near > m.Near.Alloc.FreeBytes() || 4*far > m.Far.Alloc.FreeBytes()
}

// wants returns what features f ask for with an MTU, for as few pairs as there may be.
func (n *Net) wants(f virtio.Features, mtu, offers int) wanted {
	w := wanted{pairs: 1, size: n.cfg.QueueSize, packed: f.Has(virtio.RingPacked), merge: f.Has(virtio.NetMrgRxbuf), rxBuffer: n.cfg.RXBuffer}
	if f.Has(virtio.NetMQ) && n.cfg.Queues > 1 {
		if w.pairs = n.limit; w.pairs > offers {
			w.pairs = offers
		}
	}
	w.frames(f, mtu)
	return w
}

// plan chooses how many pairs are set up, l.count at most, and how large their queues are.
func (n *Net) plan(l *bringUp, mtu int) (wanted, error) {
	if n.cfg.Queues == 0 {
		least := uint64(minPairMemory)
		if l.m.Near == l.m.Far {
			least *= 2
		}
		for l.count > 1 && (l.m.Near.Alloc.FreeBytes() < uint64(l.count)*least || l.m.Far.Alloc.FreeBytes() < uint64(l.count)*least) {
			l.count--
		}
	}
	w := n.wants(l.acked, mtu, l.offers)
	least := w.size
	if least > minQueueSize {
		least = minQueueSize
	}
	for w.pairs = l.count; !w.shrink(l.m, least, n.sizeChosen); w.pairs = l.count {
		switch {
		case l.count > 1 && n.cfg.Queues == 0:
			l.count--
			w.size = n.cfg.QueueSize
		case least > 2:
			least = 2
		default:
			return w, n.tooSmall(w, l.acked, l.m, mtu) // the MTU was changed meanwhile
		}
	}
	return w, nil
}

func (w *wanted) frames(f virtio.Features, mtu int) {
	w.maxRX, w.maxTX = tunbridge.MaxFrameToDriver(mtu, f.Mask()), tunbridge.MaxFrameToDevice(mtu, f.Mask())
	w.longRX = f.Mask()&tunbridge.NetFToDriverLong != 0
}

// fit takes those segmentation bits from f for which memory m is too small, and says why. An error is that not even the MTU's
// frames have room; it says what would do.
func (n *Net) fit(f virtio.Features, m driver.Layout, mtu, offers int) (virtio.Features, string, error) {
	toDriver, toDevice := virtio.FeaturesFromMask(tunbridge.NetFToDriverLong), virtio.FeaturesFromMask(tunbridge.NetFToDeviceLong)
	full := f
	for _, without := range [...]virtio.Features{{}, toDevice, toDriver, toDriver.Or(toDevice)} {
		f = full.Without(without)
		w := n.wants(f, mtu, offers)
		least := uint16(2)
		if f.Mask()&(tunbridge.NetFToDriverLong|tunbridge.NetFToDeviceLong) != 0 && w.size > minQueueSize {
			least = minQueueSize
		}
		if w.shrink(m, least, n.sizeChosen) {
			lost := full.Without(f)
			if lost == (virtio.Features{}) {
				return f, "", nil
			}
			if w = n.wants(full, mtu, offers); w.rxMin() == never {
				return f, fmt.Sprintf("without %s: %d receive buffers of %d bytes (--queue-size, --rx-buffer) hold no frame of 64 KiB", lost, w.size, w.rxBuffer), nil
			}
			return f, fmt.Sprintf("without %s: frames of 64 KiB have no room in %s: use a window %s", lost, m, n.larger(w, m)), nil
		}
	}
	w := n.wants(f, mtu, offers)
	w.size = 2
	return f, "", n.tooSmall(w, f, m, mtu)
}

// would tells whether w would fit with memory factor times as large, and so many devices to share it.
func (w *wanted) would(m driver.Layout, factor uint64, devices int) bool {
	part := func(k *driver.Memory) uint64 { return k.Region.Mem.Size() * factor / uint64(devices) &^ 4095 }
	near, far := w.need()
	if m.Near == m.Far {
		return near+far <= part(m.Near)
	}
	return near <= part(m.Near) && far <= part(m.Far)
}

// larger says how much larger the window has to be for w. Memory that is all window may be the half of it only when it is
// larger (docs/wire.md, section 8).
func (n *Net) larger(w wanted, m driver.Layout) string {
	if w.size > minQueueSize {
		w.size = minQueueSize
	}
	for f := uint64(2); f <= 1<<20; f *= 2 {
		half := f
		if m.Near == m.Far {
			half = f / 2
		}
		if w.would(m, half, m.Devices) {
			return fmt.Sprintf("at least %d times as large", f)
		}
	}
	return "of a few MiB"
}

// tooSmall is the refusal of a device for which memory m does not do, whatever is left out.
func (n *Net) tooSmall(w wanted, f virtio.Features, m driver.Layout, mtu int) error {
	near, far := w.need()
	if w.rxMin() == never {
		return fmt.Errorf("%s: %d receive buffers of %d bytes (--queue-size, --rx-buffer) are too few for frames of %d: leave out --rx-buffer or use larger ones",
			n.cfg.Name, w.size, w.rxBuffer, w.maxRX)
	}
	remedies := []string{"a window " + n.larger(w, m)}
	low, high := 0, mtu // the largest MTU that has room
	for low < high {
		mid := (low + high + 1) / 2
		if w.frames(f, mid); w.fits(m) {
			low = mid
		} else {
			high = mid - 1
		}
	}
	if low >= tunbridge.MinMTU6 {
		remedies = append(remedies, fmt.Sprintf("an MTU of at most %d (--mtu)", low))
	}
	w.frames(f, mtu)
	for fewer := w; fewer.pairs > 1; {
		if fewer.pairs--; fewer.fits(m) {
			remedies = append(remedies, fmt.Sprintf("fewer queue pairs (--queues), at most %d", fewer.pairs))
			break
		}
	}
	for d := m.Devices - 1; d >= 1; d-- {
		if w.would(m, 1, d) {
			remedies = append(remedies, fmt.Sprintf("no more than %d of the %d devices", d, m.Devices))
			break
		}
	}
	return fmt.Errorf("%s: %s are too few for frames of %d bytes, which take %d and %d with their rings: use %s",
		n.cfg.Name, m, w.maxRX, near, far, strings.Join(remedies, ", or "))
}
