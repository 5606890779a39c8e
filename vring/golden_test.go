package vring_test

import (
	"encoding/hex"
	"strings"
	"testing"
	"unsafe"

	"github.com/boardlink/boardlink/dma"
	"github.com/boardlink/boardlink/mmio"
	"github.com/boardlink/boardlink/vring"
)

// The byte images of a split ring, written down here a second time (virtio 1.2, 2.7.5 to 2.7.10), in which
// no two bytes of a field are alike: a field in the wrong order fails on every machine. Each side is held against
// them alone, so that the same mistake on both does not hide.

// goldenImage is memory with a queue of four descriptors: table at 0, driver area at 64, device area at 128, an indirect table
// for each head from 256 on.
type goldenImage struct {
	mem  mmio.Mem
	reg  *dma.Region
	refs *dma.TableRef
}

const imgBase dma.Addr = 0x0102_0304_0500_0000

const (
	imgDriver = 64
	imgDevice = 128
	imgTables = 256
	imgSize   = 4096
)

func newImage(t *testing.T, kind mmio.Kind, fill map[uint64]string) *goldenImage {
	t.Helper()
	words := make([]uint64, imgSize/8)
	for i := range words {
		words[i] = 0x5a5a5a5a5a5a5a5a // whoever owns a word writes it
	}
	mem := mmio.NewMem(unsafe.Pointer(&words[0]), imgSize, kind)
	i := &goldenImage{mem: mem, reg: &dma.Region{Name: "board", Addr: imgBase, Mem: mem, Access: dma.DeviceRead | dma.DeviceWrite}, refs: new(dma.TableRef)}
	table, err := dma.NewTable(*i.reg)
	if err != nil {
		t.Fatal(err)
	}
	i.refs.Store(table)
	for off, text := range fill {
		mem.CopyIn(off, unhex(t, text))
	}
	return i
}

func unhex(t *testing.T, text string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.Join(strings.Fields(text), ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func (i *goldenImage) config(s vring.State) vring.Config {
	desc, driver, device := vring.SplitSizes(4)
	span := func(off, n uint64) dma.Span { return dma.Span{Region: i.reg, Off: off, Len: uint32(n)} }
	return vring.Config{Name: "net0 tx0", Size: 4, EventIdx: true, State: s, Table: i.refs,
		Desc: span(0, desc), Driver: span(imgDriver, driver), Device: span(imgDevice, device)}
}

func (i *goldenImage) want(t *testing.T, what string, off uint64, text string) {
	t.Helper()
	want := unhex(t, text)
	got := make([]byte, len(want))
	i.mem.CopyOut(got, off)
	if string(got) != string(want) {
		t.Errorf("%s:\ngot  % x\nwant % x", what, got, want)
	}
}

// bothKinds runs a test for memory that is accessed directly, and for a device's.
func bothKinds(t *testing.T, f func(t *testing.T, kind mmio.Kind)) {
	for _, k := range []mmio.Kind{mmio.Cached, mmio.Uncached} {
		t.Run(k.String(), func(t *testing.T) { f(t, k) })
	}
}

// TestGoldenDriver: what the driver side writes, and how it reads what the device side wrote.
func TestGoldenDriver(t *testing.T) { bothKinds(t, goldenDriver) }

func goldenDriver(t *testing.T, kind mmio.Kind) {
	start := vring.State{Avail: 0x02fd, Used: 0x02fd}
	i := newImage(t, kind, map[uint64]string{imgDevice: "0000 fd02"})
	c := i.config(start)
	c.Indirect, c.IndirectMax, c.IndirectMin = true, 4, 3
	c.IndirectMem = dma.Span{Region: i.reg, Off: imgTables, Len: 4 * 4 * 16}
	q, err := vring.NewSplitDriver(c)
	if err != nil {
		t.Fatal(err)
	}
	i.want(t, "driver area at the start", imgDriver, "0000 fd02 0000 0000 0000 0000 fd02")
	i.want(t, "device area at the start", imgDevice, "0000 fd02 "+strings.Repeat("00", 32)+" fd02")
	n, err := q.Add([]vring.Request{
		{Bufs: []vring.Buffer{{0x1122334455667788, 0x00010203}, {0x2233445566778899, 0x00040506}}, Readable: 1, Token: 7},
		{Bufs: []vring.Buffer{{0x99aabbccddeeff01, 0x0708}, {0x0a0b0c0d0e0f1011, 0x090a}, {0x1213141516171819, 0x0b0c}}, Readable: 2, Token: 8},
	})
	if n != 2 || err != nil {
		t.Fatal(n, err)
	}
	// le64 addr, le32 len, le16 flags (1 next, 2 write, 4 indirect), le16 next
	i.want(t, "descriptor table", 0, `
		8877665544332211 03020100 0100 0100
		9988776655443322 06050400 0200 0000
		8001000504030201 30000000 0400 0000`) // table of head 2: imgTables + 2*4*16 = 0x180
	i.want(t, "indirect table", imgTables+2*4*16, `
		01ffeeddccbbaa99 08070000 0100 0100
		11100f0e0d0c0b0a 0a090000 0100 0200
		1918171615141312 0c0b0000 0200 0000`)
	// le16 flags, le16 idx, le16 ring[4] (entries 0x2fd and 0x2fe: slots 1 and 2), le16 used_event
	i.want(t, "driver area", imgDriver, "0000 ff02 0000 0000 0200 0000")
	if _, err := q.ArmCallAfter(2); err != nil {
		t.Fatal(err)
	}
	i.want(t, "used_event", imgDriver+4+2*4, "fe02")

	// avail_event 0x02fe: the second chain passes it; read in the other order it would not.
	i.mem.CopyIn(imgDevice+4+8*4, unhex(t, "fe02"))
	if !q.NeedKick() {
		t.Error("avail_event 0x02fe was passed, and no kick is due")
	}
	// le16 flags, le16 idx, then le32 id, le32 len: slots 1 and 2
	i.mem.CopyIn(imgDevice, unhex(t, "0000 ff02 ffffffff ffffffff 02000000 0a0b0000 00000000 03020000"))
	done := make([]vring.Completion, 4)
	if n, err := q.Reap(done); n != 2 || err != nil || done[0] != (vring.Completion{Token: 8, Len: 0x0b0a}) || done[1] != (vring.Completion{Token: 7, Len: 0x0203}) {
		t.Errorf("%d, %v, %+v", n, err, done[:n])
	}
}

// TestGoldenInOrder: one used element completes the chains before its own, too (VIRTIO_F_IN_ORDER).
func TestGoldenInOrder(t *testing.T) {
	bothKinds(t, func(t *testing.T, kind mmio.Kind) {
		i := newImage(t, kind, nil)
		c := i.config(vring.State{Avail: 0x02fd, Used: 0x02fd})
		c.InOrder = true
		q, err := vring.NewSplitDriver(c)
		if err != nil {
			t.Fatal(err)
		}
		for k := uint32(0); k < 2; k++ {
			if n, err := q.Add([]vring.Request{{Bufs: []vring.Buffer{{0x1122334455667788, 0x0506}}, Token: 7 + k}}); n != 1 || err != nil {
				t.Fatal(n, err)
			}
		}
		i.mem.CopyIn(imgDevice, unhex(t, "0000 ff02 5a5a5a5a 5a5a5a5a 01000000 04030000"))
		done := make([]vring.Completion, 4)
		if n, err := q.Reap(done); n != 2 || err != nil || done[0] != (vring.Completion{Token: 7, Len: 0x0506}) || done[1] != (vring.Completion{Token: 8, Len: 0x0304}) {
			t.Errorf("%d, %v, %+v", n, err, done)
		}
	})
}

// TestGoldenDevice: how the device side reads what the driver side wrote, and what it writes.
func TestGoldenDevice(t *testing.T) { bothKinds(t, goldenDevice) }

func goldenDevice(t *testing.T, kind mmio.Kind) {
	i := newImage(t, kind, map[uint64]string{
		0: `0008000504030201 03020000 0100 0100
			0009000504030201 05040000 0200 0000
			8001000504030201 20000000 0400 0000`,
		imgTables + 2*4*16: `
			010a000504030201 01010000 0100 0100
			030b000504030201 02020000 0200 0000`,
		imgDriver: "0000 ff02 0000 0000 0200 0000 0000",
	})
	c := i.config(vring.State{Avail: 0x02fd, Used: 0x02fd})
	c.Indirect = true
	q, err := vring.NewSplitDevice(c)
	if err != nil {
		t.Fatal(err)
	}
	i.want(t, "device area at the start", imgDevice, "0000 fd02 "+strings.Repeat("5a", 32)+" fd02")
	var b vring.Batch
	if n, err := q.Pop(&b, 4); n != 2 || err != nil {
		t.Fatal(n, err)
	}
	type span struct {
		off uint64
		n   uint32
	}
	want := []span{{0x800, 0x0203}, {0x900, 0x0405}, {0xa01, 0x0101}, {0xb03, 0x0202}}
	if len(b.Spans) != len(want) {
		t.Fatalf("%d spans", len(b.Spans))
	}
	for k, s := range b.Spans {
		if s.Off != want[k].off || s.Len != want[k].n {
			t.Errorf("span %d: %#x, %#x bytes; want %+v", k, s.Off, s.Len, want[k])
		}
	}
	if b.Chains[0].ID != 0 || b.Chains[1].ID != 2 || b.Chains[0].ReadLen != 0x0203 || b.Chains[0].WriteLen != 0x0405 {
		t.Errorf("chains %+v", b.Chains)
	}
	// used_event 0x02fe: the second completion passes it.
	i.mem.CopyIn(imgDriver+4+2*4, unhex(t, "fe02"))
	if err := q.Complete([]vring.Used{{ID: 2, Count: 1, Len: 0x0102}, {ID: 0, Count: 1, Len: 0x0304}}); err != nil {
		t.Fatal(err)
	}
	if !q.NeedCall() {
		t.Error("used_event 0x02fe was passed, and no call is due")
	}
	if _, err := q.ArmKick(); err != nil {
		t.Fatal(err)
	}
	// le16 flags, le16 idx, four of le32 id, le32 len, le16 avail_event
	i.want(t, "device area", imgDevice, "0000 ff02 5a5a5a5a 5a5a5a5a 02000000 02010000 00000000 04030000 5a5a5a5a 5a5a5a5a ff02")
}
