package vring_test

import (
	"testing"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/vring"
	"github.com/boardlink/boardlink/vring/vringtest"
)

// Flags of descriptors and rings, written down again on purpose (virtio 1.2, 2.7.5 to 2.7.8).
const (
	next     = 1
	write    = 2
	indirect = 4
)

// raw plays the other side by hand: words of a split ring in a rig's memory.
type raw struct {
	*vringtest.Rig
}

func (r raw) desc(i uint16, addr dma.Addr, n uint32, flags, nxt uint16) {
	r.descAt(r.DescOff+16*uint64(i), addr, n, flags, nxt)
}

// descAt writes a descriptor anywhere, in accesses that any alignment allows.
func (r raw) descAt(off uint64, addr dma.Addr, n uint32, flags, nxt uint16) {
	var b [16]byte
	for i := 0; i < 8; i++ {
		b[i] = byte(addr >> (8 * i))
	}
	for i := 0; i < 4; i++ {
		b[8+i] = byte(n >> (8 * i))
	}
	b[12], b[13], b[14], b[15] = byte(flags), byte(flags>>8), byte(nxt), byte(nxt>>8)
	r.Mem.CopyIn(off, b[:])
}

func (r raw) entry(idx, head uint16) {
	r.Mem.Store16(r.DriverOff+4+2*uint64(idx&(r.Size-1)), head)
}
func (r raw) availFlags(v uint16)   { r.Mem.Store16(r.DriverOff, v) }
func (r raw) availIdx(v uint16)     { r.Mem.Store16(r.DriverOff+2, v) }
func (r raw) getAvailFlags() uint16 { return r.Mem.Load16(r.DriverOff) }
func (r raw) getAvailIdx() uint16   { return r.Mem.Load16(r.DriverOff + 2) }
func (r raw) getEntry(idx uint16) uint16 {
	return r.Mem.Load16(r.DriverOff + 4 + 2*uint64(idx&(r.Size-1)))
}
func (r raw) usedEvent(v uint16)    { r.Mem.Store16(r.DriverOff+4+2*uint64(r.Size), v) }
func (r raw) getUsedEvent() uint16  { return r.Mem.Load16(r.DriverOff + 4 + 2*uint64(r.Size)) }
func (r raw) usedFlags(v uint16)    { r.Mem.Store16(r.DeviceOff, v) }
func (r raw) usedIdx(v uint16)      { r.Mem.Store16(r.DeviceOff+2, v) }
func (r raw) getUsedFlags() uint16  { return r.Mem.Load16(r.DeviceOff) }
func (r raw) getUsedIdx() uint16    { return r.Mem.Load16(r.DeviceOff + 2) }
func (r raw) availEvent(v uint16)   { r.Mem.Store16(r.DeviceOff+4+8*uint64(r.Size), v) }
func (r raw) getAvailEvent() uint16 { return r.Mem.Load16(r.DeviceOff + 4 + 8*uint64(r.Size)) }

func (r raw) used(idx uint16, id, n uint32) {
	off := r.DeviceOff + 4 + 8*uint64(idx&(r.Size-1))
	r.Mem.Store32(off, id)
	r.Mem.Store32(off+4, n)
}

func (r raw) getUsed(idx uint16) (id, n uint32) {
	off := r.DeviceOff + 4 + 8*uint64(idx&(r.Size-1))
	return r.Mem.Load32(off), r.Mem.Load32(off + 4)
}

// getDesc returns a descriptor as it stands in the ring.
func (r raw) getDesc(i uint16) (addr dma.Addr, n uint32, flags, nxt uint16) {
	return r.getDescAt(r.DescOff + 16*uint64(i))
}

func (r raw) getDescAt(off uint64) (addr dma.Addr, n uint32, flags, nxt uint16) {
	w := r.Mem.Load64(off + 8)
	return dma.Addr(r.Mem.Load64(off)), uint32(w), uint16(w >> 32), uint16(w >> 48)
}

// split returns parameters of a split ring.
func split(m vringtest.Memory, event, ind bool) vringtest.Params {
	return vringtest.Params{Ring: vringtest.Split, Memory: m, EventIdx: event, Indirect: ind}
}

// device makes a device side against a driver side played by hand.
func device(t testing.TB, p vringtest.Params, n uint16) (raw, *vring.SplitDevice) {
	t.Helper()
	r := raw{vringtest.NewRig(t, p, n, 65536)}
	d, err := vring.NewSplitDevice(r.DevCfg)
	if err != nil {
		t.Fatal(err)
	}
	return r, d
}

// driver makes a driver side against a device side played by hand.
func driver(t testing.TB, p vringtest.Params, n uint16) (raw, *vring.SplitDriver) {
	t.Helper()
	r := raw{vringtest.NewRig(t, p, n, 65536)}
	d, err := vring.NewSplitDriver(r.DrvCfg)
	if err != nil {
		t.Fatal(err)
	}
	return r, d
}
