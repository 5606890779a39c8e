package engine

import (
	"fmt"
	"sort"

	"github.com/boardlink/boardlink/dma"
)

// Side is where memory lies, as an engine sees it.
type Side uint8

const (
	// Near is on the engine's own side of the bus: a board's engine and the board's memory.
	Near Side = iota
	// Far is across the bus: the host's memory.
	Far
)

// String returns "near" or "far".
func (s Side) String() string {
	if s == Near {
		return "near"
	}
	return "far"
}

// Window says how an engine reaches a range of link addresses. What lies in no window is never
// programmed.
type Window struct {
	Name string
	Link dma.Addr // of the first byte
	Size uint64   // in bytes
	// Bus is the address of the first byte as the engine's registers and descriptors take it.
	Bus  uint64
	Side Side
	// Access is what the engine may do there: dma.DeviceRead and dma.DeviceWrite.
	Access dma.Access
}

// lowBits are those in which link and bus address of a window agree, so that a copy's alignment can be
// judged by its link addresses.
const lowBits = 63

// Map is the windows of an engine. It is immutable.
type Map struct{ w []Window }

// NewMap makes a map. It refuses windows that overlap in link addresses, are empty, or pass the end of the
// address space, bus addresses above mask (0: no limit), and bus addresses that differ from
// the link addresses in the low 6 bits.
func NewMap(mask uint64, windows ...Window) (*Map, error) {
	m := &Map{w: append([]Window(nil), windows...)}
	sort.Slice(m.w, func(i, j int) bool { return m.w[i].Link < m.w[j].Link })
	for i := range m.w {
		w := &m.w[i]
		last, busLast := uint64(w.Link)+w.Size-1, w.Bus+w.Size-1
		switch {
		case w.Size == 0 || last < uint64(w.Link) || busLast < w.Bus:
			return nil, fmt.Errorf("engine: window %q of %#x bytes at %#x (bus address %#x) is empty or passes the end of the address space", w.Name, w.Size, uint64(w.Link), w.Bus)
		case mask != 0 && busLast > mask:
			return nil, fmt.Errorf("engine: window %q ends at bus address %#x, the engine reaches %#x: place its memory lower", w.Name, busLast, mask)
		case (uint64(w.Link)^w.Bus)&lowBits != 0:
			return nil, fmt.Errorf("engine: window %q: link address %#x and bus address %#x differ in the low bits", w.Name, uint64(w.Link), w.Bus)
		case i > 0 && uint64(m.w[i-1].Link)+m.w[i-1].Size-1 >= uint64(w.Link):
			return nil, fmt.Errorf("engine: windows %q and %q overlap at %#x", m.w[i-1].Name, w.Name, uint64(w.Link))
		}
	}
	return m, nil
}

// Find returns the bus address of n bytes, n > 0, at link address a, and the side where they lie; false where they do not
// all lie in one window that the engine may access so.
func (m *Map) Find(a dma.Addr, n uint32, need dma.Access) (bus uint64, side Side, ok bool) {
	for i := range m.w {
		w := &m.w[i]
		off := uint64(a - w.Link)
		if off < w.Size {
			return w.Bus + off, w.Side, uint64(n) <= w.Size-off && w.Access&need == need
		}
	}
	return 0, Near, false
}

// Windows returns a copy of the windows, by link address.
func (m *Map) Windows() []Window { return append([]Window(nil), m.w...) }
