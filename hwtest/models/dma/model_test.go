package dmamodel

import (
	"encoding/binary"
	"math/bits"
	"strings"
	"testing"

	"github.com/boardlink/boardlink/mmio"
)

// A model that lets a broken rule pass proves nothing about an engine: here each rule is broken once, and the same without the
// mistake passes.

const (
	nearBase = 0x10000000
	farBase  = 0x80000000
	listAt   = nearBase + 0x8000
)

func memory() (near, far []byte, r []Range) {
	near, far = make([]byte, 0x10000), make([]byte, 0x10000)
	for i := range near {
		near[i] = byte(i)
	}
	return near, far, []Range{{Name: "near", Base: nearBase, Bytes: near}, {Name: "far", Base: farBase, Bytes: far, Far: true}}
}

// words writes little-endian 64-bit numbers to memory.
func words(b []byte, at uint64, big bool, v ...uint64) {
	for i, w := range v {
		if big {
			w = bits.ReverseBytes64(w)
		}
		binary.LittleEndian.PutUint64(b[at-nearBase+uint64(8*i):], w)
	}
}

func check(t *testing.T, what, want string, err error) {
	t.Helper()
	switch {
	case want == "" && err != nil:
		t.Errorf("%s: %v", what, err)
	case want != "" && (err == nil || !strings.Contains(err.Error(), want)):
		t.Errorf("%s: %v, want a violation with %q", what, err, want)
	}
}

func TestFSLBites(t *testing.T) {
	type regs map[uint64]uint32
	direct := func(m mmio.Mem, w func(off uint64, v uint32), change regs, skip uint64) {
		for _, off := range []uint64{0x18, 0x10, 0x20, 0x00} {
			v := regs{0x18: farBase, 0x10: nearBase, 0x20: 256, 0x00: 0x100804}[off]
			if c, ok := change[off]; ok {
				v = c
			}
			if off != skip {
				w(off, v)
			}
		}
		w(0x00, 0x100805)
	}
	for what, c := range map[string]struct {
		do   func(f *FSL, m mmio.Mem, w func(uint64, uint32), near []byte)
		want string
	}{
		"direct": {func(f *FSL, m mmio.Mem, w func(uint64, uint32), near []byte) { direct(m, w, nil, 0x99) }, ""},
		"direct without a source": {func(f *FSL, m mmio.Mem, w func(uint64, uint32), near []byte) { direct(m, w, nil, 0x10) },
			"with registers"},
		"no bytes": {func(f *FSL, m mmio.Mem, w func(uint64, uint32), near []byte) { direct(m, w, regs{0x20: 0}, 0x99) }, "transfer of 0 bytes"},
		"too many": {func(f *FSL, m mmio.Mem, w func(uint64, uint32), near []byte) {
			direct(m, w, regs{0x20: 0x4000000}, 0x99)
		}, "transfer of"},
		"no such place": {func(f *FSL, m mmio.Mem, w func(uint64, uint32), near []byte) { direct(m, w, regs{0x10: 0x500}, 0x99) }, "no memory there"},
		"64 bits":       {func(f *FSL, m mmio.Mem, w func(uint64, uint32), near []byte) { m.Store64(0x10, 1) }, "words of 32 bits"},
		"reserved register": {func(f *FSL, m mmio.Mem, w func(uint64, uint32), near []byte) { w(0x40, 1) },
			"reserved register"},
		"reserved bits in MR": {func(f *FSL, m mmio.Mem, w func(uint64, uint32), near []byte) { w(0, 1<<31) }, "reserved bits"},
		"reserved bits in SR": {func(f *FSL, m mmio.Mem, w func(uint64, uint32), near []byte) { w(4, 4) }, "reserved bits"},
		"written while busy": {func(f *FSL, m mmio.Mem, w func(uint64, uint32), near []byte) {
			direct(m, w, nil, 0x99)
			w(0x10, nearBase)
		}, "while the channel is busy"},
		"chain": {func(f *FSL, m mmio.Mem, w func(uint64, uint32), near []byte) {
			words(near, listAt, false, nearBase, farBase, listAt+32|0x10, 64)
			words(near, listAt+32, false, nearBase+64, farBase+64, 0x11, 64)
			w(8, listAt|0x10)
			w(0, 1)
		}, ""},
		"chain without CDAR": {func(f *FSL, m mmio.Mem, w func(uint64, uint32), near []byte) { w(0, 1) }, "without writing CDAR"},
		"descriptor not snooped": {func(f *FSL, m mmio.Mem, w func(uint64, uint32), near []byte) {
			words(near, listAt, false, nearBase, farBase, 0x11, 64)
			w(8, listAt)
			w(0, 1)
		}, "not snooped"},
		"descriptor not aligned": {func(f *FSL, m mmio.Mem, w func(uint64, uint32), near []byte) {
			w(8, listAt+8|0x10)
			w(0, 1)
		}, "not aligned to 32"},
		"no end": {func(f *FSL, m mmio.Mem, w func(uint64, uint32), near []byte) {
			words(near, listAt, false, nearBase, farBase, listAt|0x10, 64)
			w(8, listAt|0x10)
			w(0, 1)
		}, "does not end"},
		"wrong byte order": {func(f *FSL, m mmio.Mem, w func(uint64, uint32), near []byte) {
			words(near, listAt, true, nearBase, farBase, 0x11, 64<<32)
			w(8, listAt|0x10)
			w(0, 1)
		}, "more than 32 bits"},
	} {
		near, far, mem := memory()
		f := NewFSL(false, Options{Memory: mem})
		m := f.Mem()
		c.do(f, m, func(off uint64, v uint32) { m.Store32(off, v) }, near)
		if strings.HasPrefix(what, "written while") {
			check(t, what, c.want, f.Err())
			continue
		}
		if m.Load32(4)&4 != 0 {
			t.Errorf("%s: stays busy", what)
		}
		check(t, what, c.want, f.Err())
		if c.want == "" && (far[1] != 1 || far[100] != 100) {
			t.Errorf("%s: nothing was moved", what)
		}
	}
	// Big-endian: attributes are needed.
	_, _, mem := memory()
	f := NewFSL(true, Options{Memory: mem})
	m := f.Mem()
	for _, s := range [][2]uint32{{0x18, 0}, {0x1c, farBase}, {0x10, 0x50000}, {0x14, nearBase}, {0x20, 64}, {0, 4}, {0, 5}} {
		m.Store32(uint64(s[0]), bits.ReverseBytes32(s[1]))
	}
	m.Load32(4)
	check(t, "85xx without attributes", "do not snoop", f.Err())
}

func TestDWBites(t *testing.T) {
	for what, c := range map[string]struct {
		change func(near []byte, m mmio.Mem) // after all is set up, before the doorbell
		want   string
	}{
		"as it should be": {func(near []byte, m mmio.Mem) {}, ""},
		"no interrupt":    {func(near []byte, m mmio.Mem) { words(near, listAt+24, false, 1|64<<32) }, "raises no interrupt"},
		"cycle bit":       {func(near []byte, m mmio.Mem) { words(near, listAt, false, 0|64<<32) }, "ends at"},
		"link goes on":    {func(near []byte, m mmio.Mem) { words(near, listAt+48, false, 7) }, "has no end"},
		"link elsewhere":  {func(near []byte, m mmio.Mem) { words(near, listAt+56, false, 0) }, "not to the list's start"},
		"no toggle":       {func(near []byte, m mmio.Mem) { words(near, listAt+48, false, 4) }, "does not toggle"},
		"message to nowhere": {func(near []byte, m mmio.Mem) { words(near, listAt+24, false, 1|8|16|64<<32) },
			"without an address"},
		"wrong direction": {func(near []byte, m mmio.Mem) { words(near, listAt+8, false, farBase, nearBase) }, "not what a write channel can do"},
		"no bytes":        {func(near []byte, m mmio.Mem) { words(near, listAt, false, 1) }, "no bytes"},
		"no list enabled": {func(near []byte, m mmio.Mem) { m.Store32(0x200, 0) }, "no linked list"},
		"engine off":      {func(near []byte, m mmio.Mem) { m.Store32(0x0c, 0) }, "disabled"},
		"masked":          {func(near []byte, m mmio.Mem) { m.Store32(0x54, 1) }, "masked"},
		"list errors off": {func(near []byte, m mmio.Mem) { m.Store32(0x90, 0) }, "list errors disabled"},
		"reserved bits":   {func(near []byte, m mmio.Mem) { m.Store32(0x200, 1<<30) }, "reserved bits"},
		"no such channel": {func(near []byte, m mmio.Mem) { m.Store32(0x10, 7) }, "doorbell for channel 7"},
		"list far away": {func(near []byte, m mmio.Mem) { m.Store32(0x21c, farBase) },
			"lies across the bus"},
		"viewport": {func(near []byte, m mmio.Mem) { m.Store32(0xf8, 1) }, "store to register 0xf8"},
		"64 bits":  {func(near []byte, m mmio.Mem) { m.Store64(0x60, 1) }, "store of 8 bytes"},
		"status read only": {func(near []byte, m mmio.Mem) { m.Store32(0x4c, 1) },
			"store to register 0x4c"},
	} {
		near, far, mem := memory()
		d := NewDW(false, 2, 2, Options{Memory: mem})
		m := d.Mem()
		words(near, listAt, false, 1|64<<32, nearBase, farBase, 1|8|64<<32, nearBase+64, farBase+64, 6, listAt)
		for _, s := range [][2]uint32{{0x0c, 1}, {0x54, 0}, {0x90, 1}, {0x200, 0x300}, {0x21c, listAt}, {0x220, 0}} {
			m.Store32(uint64(s[0]), s[1])
		}
		c.change(near, m)
		m.Store32(0x10, 0)
		m.Load32(0x4c)
		check(t, what, c.want, d.Err())
		if c.want == "" {
			if far[1] != 1 || far[100] != 100 {
				t.Error("nothing was moved")
			}
			m.Store32(0x58, 1)
			check(t, "cleared too early", "while it runs still", d.Err())
		}
	}
}

func TestEDUBites(t *testing.T) {
	for what, c := range map[string]struct {
		src, dst, n, cmd uint64
		want             string
	}{
		"as it should be":  {farBase >> 4, 0x40000, 64, 1, ""},
		"QEMU dies":        {farBase >> 4, 0x40000, 4096, 1, "dies"},
		"no bytes":         {farBase >> 4, 0x40000, 0, 1, "0 bytes"},
		"not the buffer":   {farBase >> 4, 0x41000, 64, 1, "not inside the buffer"},
		"behind its end":   {farBase >> 4, 0x40fff, 64, 1, "not inside the buffer"},
		"above the mask":   {1 << 28, 0x40000, 64, 1, "cut to 28 bits"},
		"unmapped":         {0x100, 0x40000, 64, 1, "no memory there"},
		"starts nothing":   {farBase >> 4, 0x40000, 64, 2, "starts nothing"},
		"unknown command":  {farBase >> 4, 0x40000, 64, 9, "reserved bits"},
		"direction":        {farBase >> 4, 0x40000, 64, 3, "not inside the buffer"},
		"there and back":   {0x40000, farBase >> 4, 64, 3, ""},
		"interrupt wanted": {0x40000, farBase >> 4, 64, 7, ""},
	} {
		buf, host := make([]byte, 4096), make([]byte, 4096)
		e := NewEDU(Options{Memory: []Range{{Name: "buffer", Base: 0x40000, Bytes: buf}, {Name: "host", Base: farBase >> 4, Bytes: host, Far: true}}})
		m := e.Mem()
		m.Store64(0x80, c.src)
		m.Store64(0x88, c.dst)
		m.Store64(0x90, c.n)
		m.Store64(0x98, c.cmd)
		m.Load64(0x98)
		check(t, what, c.want, e.Err())
		if c.cmd&4 != 0 {
			m.Store64(0x80, c.src)
			m.Store64(0x88, c.dst)
			m.Store64(0x90, c.n)
			m.Store64(0x98, c.cmd)
			check(t, "not acknowledged", "not acknowledged", e.Err())
		}
	}
}
